"""Constraints with a state, worked by hand over a few steps: who is excluded when, and what is saved."""
import math

import pytest
import torch
from torch import nn

from moe_zoo.errors import InputError
from moe_zoo.layers import MoEStage
from moe_zoo.losses import LOSSES, auxiliary_losses, balance
from moe_zoo.routing import NoisyTopKRouter, checkpoint_routed, end_step, routing_context


def router(constraint, value=None, experts=2, selected=1, **kwargs):
    """Logits are the inputs; every expert's weight is 1 where one is chosen."""
    made = NoisyTopKRouter(
        experts, experts, selected, noise=False, losses=(), constraint=constraint, constraint_value=value, **kwargs)
    nn.init.eye_(made.weight)
    return made.train()


def loads(made, x):
    """Images an expert, in one training step."""
    chosen = torch.bincount(made(x).indices.flatten(), minlength=made.num_experts).tolist()
    end_step(made)
    return chosen


def prefer(first, images=4, experts=2):
    """So many images of `images` prefer expert 0, the others expert 1."""
    x = torch.zeros(images, experts)
    x[:first, 0] = 2.
    x[first:, 1] = 2.
    return x


def test_relative_importance_by_hand():
    # Ibar = 4 / 2 = 2. All four want expert 0: R_0 = (4 - 2) / 2 = 1, R_1 = -1; 1 > 0.5 excludes expert 0, so that
    # expert 1 gets all: R = (0, 0). The third step goes to expert 0 again: nothing is forgotten, nothing averaged.
    made, x = router('relative'), prefer(4)
    table = []
    for _ in range(4):
        table.append((loads(made, x), made.constraint.excess.tolist(), made.constraint.excluded().tolist()))
    assert table == [
        ([4, 0], [1, -1], [True, False]),
        ([0, 4], [0, 0], [False, False]),
        ([4, 0], [1, -1], [True, False]),
        ([0, 4], [0, 0], [False, False]),
    ]


def test_relative_importance_adds_up_over_steps():
    # Three of four want expert 0: R_0 grows by (3 - 2) / 2 = 0.5 a step; 0.5 is not above 0.5, 1 is. Excluded, it loses
    # 1, not 0.5: all four images go to expert 1.
    made, x = router('relative'), prefer(3)
    table = [(loads(made, x), made.constraint.excess.tolist()) for _ in range(4)]
    assert table == [([3, 1], [0.5, -0.5]), ([3, 1], [1, -1]), ([0, 4], [0, 0]), ([3, 1], [0.5, -0.5])]


def test_mean_importance_by_hand():
    # A is the mean of I / B over steps, 1 / E = 1/2, m = 0.31. All want expert 0: A_0 = 1, 1 - 0.5 > 0.31: excluded.
    # Step 2: A_0 = (1 + 0) / 2 = 1/2, not excluded. Step 3: (1 + 0 + 1) / 3 = 2/3, 1/6 above: not excluded.
    # Step 4: 3/4, 1/4 above. Step 5: 4/5, 0.3 above. Step 6: 5/6, 1/3 above: excluded. Step 7: 5/7.
    made, x = router('mean', 0.31), prefer(4)
    table = [(loads(made, x)[0], made.constraint.excess[0].item() + 0.5) for _ in range(7)]
    assert [load for load, _ in table] == [4, 0, 4, 4, 4, 4, 0]
    torch.testing.assert_close([mean for _, mean in table], [1., 1 / 2, 2 / 3, 3 / 4, 4 / 5, 5 / 6, 5 / 7],
                               rtol=1e-5, atol=1e-6)


def test_default_thresholds_are_those_of_the_analysed_runs():
    assert (router('relative').constraint.value, router('mean').constraint.value) == (0.5, 0.3)


def test_an_excluded_expert_has_weight_zero_and_the_others_all_of_it():
    # Three experts, two chosen, logits ln 4, ln 3, ln 1. Expert 0 is excluded: of 3 and 1, 3/4 and 1/4.
    made = router('relative', experts=3, selected=2)
    made.constraint.excess.copy_(torch.tensor([1., -0.5, -0.5]))
    routing = made(torch.tensor([[4., 3., 1.]]).log())
    assert routing.indices.tolist() == [[1, 2]] and routing.kept.all()
    torch.testing.assert_close(routing.weights, torch.tensor([[0.75, 0.25]]))
    assert routing.logits[0, 0].isfinite()  # the record's logits are those of the gate


@pytest.mark.parametrize('selected', [1, 2, 3])
def test_fewer_live_experts_than_wanted_use_those_that_are_left(selected):
    made = router('relative', experts=3, selected=selected)
    made.constraint.excess.copy_(torch.tensor([1., 0.75, -1.75]))
    x = torch.tensor([[4., 3., 1.]]).log().requires_grad_()
    routing = made(x)
    assert routing.combine_matrix().tolist() == [[0, 0, 1]]
    assert routing.kept.tolist() == [[True] + [False] * (selected - 1)]
    assert balance(routing)['share'].tolist() == [0, 0, 1]
    (routing.weights.sum() + routing.gates.square().sum()).backward()
    assert x.grad.isfinite().all() and made.weight.grad.isfinite().all()


def test_never_all_are_excluded():
    # With m = -1 every expert is above it; the least used one stays.
    made = router('relative', -1., experts=3)
    made.constraint.excess.copy_(torch.tensor([0.2, -0.1, -0.1 - 1e-3]))
    assert made.constraint.excluded().tolist() == [True, True, False]


@pytest.mark.parametrize('constraint', ['relative', 'mean'])
def test_exclusion_is_for_training_only(constraint):
    made, x = router(constraint), prefer(4)
    loads(made, x)
    assert made.constraint.excluded().tolist() == [True, False]
    state = {name: value.clone() for name, value in made.state_dict().items()}
    assert made.eval()(x).indices.flatten().tolist() == [0] * 4
    end_step(made)
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())


@pytest.mark.parametrize('constraint', ['relative', 'mean', 'bias'])
def test_state_is_saved_and_goes_on(constraint):
    made, x = router(constraint, 0.31), prefer(3)
    loads(made, x)
    other = router(constraint, 0.31)
    other.load_state_dict(made.state_dict())
    for _ in range(5):
        assert loads(made, x) == loads(other, x)
    fresh = router(constraint, 0.31)
    assert any(not torch.equal(a, b) for a, b in zip(made.state_dict().values(), fresh.state_dict().values()))


def test_selection_bias_chooses_and_does_not_weigh():
    # Softmax of ln 6, ln 3, ln 1 is 0.6, 0.3, 0.1; a bias of 0.4 on the third puts it between (0.6, 0.3, 0.5).
    made = router('bias', experts=3, selected=2)
    made.constraint.selection_bias.copy_(torch.tensor([0., 0., 0.4]))
    routing = made.eval()(torch.tensor([[6., 3., 1.]]).log())
    assert routing.indices.tolist() == [[0, 2]] and routing.kept is None
    torch.testing.assert_close(routing.weights, torch.tensor([[6 / 7, 1 / 7]]))


def test_selection_bias_of_an_expert_with_no_probability_left():
    made = router('bias', experts=2)
    made.constraint.selection_bias.copy_(torch.tensor([-2., 0.]))
    routing = made(torch.tensor([[200., 0.]]))  # exp(-200) is 0 in float32
    assert routing.indices.tolist() == [[1]] and routing.weights.tolist() == [[1]]


def test_several_forwards_are_one_step():
    # Two halves of the batch under accumulation: I = (2 + 1, 0 + 1), as the whole batch of the second test.
    made, x = router('relative'), prefer(3)
    made(x[:2])
    assert made.constraint.excess.tolist() == [0, 0]
    made(x[2:])
    end_step(made)
    assert made.constraint.excess.tolist() == [0.5, -0.5]
    end_step(made)  # a step that this router did not see
    assert made.constraint.excess.tolist() == [0.5, -0.5] and made.constraint.steps == 1


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('constraint', ['relative', 'mean', 'bias'])
def test_recomputation_under_checkpointing_moves_nothing_twice(constraint, reentrant):
    torch.manual_seed(0)
    experts = [nn.Conv2d(4, 4, 1) for _ in range(4)]
    stage = MoEStage(experts, 4, 1, constraint=constraint, constraint_value=0.1, noise=False)
    nn.init.normal_(stage.router.weight)
    plain = MoEStage([nn.Conv2d(4, 4, 1) for _ in range(4)], 4, 1, constraint=constraint, constraint_value=0.1,
                     noise=False)
    plain.load_state_dict(stage.state_dict())
    for _ in range(3):
        x = torch.randn(6, 4, 5, 5, requires_grad=True)
        checkpoint_routed(stage, x, use_reentrant=reentrant).sum().backward()
        plain(x).sum().backward()
        end_step(stage)
        end_step(plain)
        for name, value in stage.state_dict().items():
            torch.testing.assert_close(value, plain.state_dict()[name])


def test_soft_constraints_by_hand():
    # One of 4 experts takes all: the squared coefficient of variation with the unbiased variance is 4, KL is ln 4.
    made = NoisyTopKRouter(4, 4, 1, noise=False, losses=())
    nn.init.eye_(made.weight)
    routing = made(torch.eye(4)[[2, 2, 2]])
    assert LOSSES['importance_unbiased'](routing).item() == pytest.approx(4)
    assert LOSSES['kl'](routing).item() == pytest.approx(math.log(4), rel=1e-5)
    routing = made(torch.eye(4))
    assert LOSSES['importance_unbiased'](routing).item() == pytest.approx(0, abs=1e-6)
    assert LOSSES['kl'](routing).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize('constraint, value, losses, noisy', [
    ('importance', None, (('importance_unbiased', 0.5),), True),
    ('importance', 0.25, (('importance_unbiased', 0.25),), True),
    ('kl', None, (('kl', 0.5),), True),
    ('relative', None, (), False),
    ('mean', None, (), False),
    ('bias', None, (), True),
    (None, None, (), True),
])
def test_a_layer_takes_the_constraint_by_name(constraint, value, losses, noisy):
    stage = MoEStage([nn.Conv2d(4, 4, 1) for _ in range(3)], 4, constraint=constraint, constraint_value=value)
    assert stage.router.losses == losses
    assert (stage.router.noise_weight is not None) == noisy
    with routing_context() as context:
        stage.train()(torch.randn(4, 4, 5, 5))
    assert len(auxiliary_losses(context.routings)) == len(losses)


def test_noise_can_be_had_with_a_hard_constraint():
    stage = MoEStage([nn.Conv2d(4, 4, 1) for _ in range(3)], 4, constraint='relative', noise=True)
    stage.router.constraint.excess.copy_(torch.tensor([1., -0.5, -0.5]))
    routing = stage.router(torch.randn(5, 4))
    assert 0 not in routing.indices and routing.noisy_logits.isfinite().all()


def test_an_unknown_constraint_is_told_its_neighbours():
    with pytest.raises(InputError, match=r"constraint='relativ' is not one of relative, mean, bias\. Did you"):
        router('relativ')
    with pytest.raises(InputError, match=r"constraint='importnce' is not one of importance, kl, relative, mean, bias, "
                                         r"none\. Did you mean 'importance'\?"):
        MoEStage([nn.Conv2d(4, 4, 1) for _ in range(3)], 4, constraint='importnce')
    with pytest.raises(InputError, match=r"gate='gapfc' is not one of gap_fc, conv_gap, .*Did you mean 'gap_fc'"):
        MoEStage([nn.Conv2d(4, 4, 1) for _ in range(3)], 4, gate='gapfc')
