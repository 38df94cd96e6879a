"""Auxiliary losses on tables small enough to check by hand."""
import math

import pytest
import torch

from moe_zoo.errors import InputError
from moe_zoo.losses import BALANCE_LOSSES, LOSSES, auxiliary_losses, balance, load_loss, squared_cv, vmoe_load_loss
from moe_zoo.routing import NoisyTopKRouter, Routing, SoftmaxTopKRouter


def routing_of(gates, **fields):
    gates = torch.tensor(gates)
    weights, indices = gates.topk(fields.pop('k', 1))
    return Routing(logits=gates.clamp_min(1e-30).log(), gates=gates, weights=weights, indices=indices, **fields)


def normal_cdf(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_squared_cv():
    # (1, 3): mean 2, squared deviations 1 and 1: 1 / 4 with the population variance, 2 / 4 with the unbiased one.
    values = torch.tensor([1.0, 3.0])
    assert squared_cv(values).item() == pytest.approx(0.25)
    assert squared_cv(values, unbiased=True).item() == pytest.approx(0.5)
    assert squared_cv(values * 7).item() == pytest.approx(0.25)  # scale-free
    assert squared_cv(torch.tensor([5.0])).item() == 0


def test_all_on_one_of_four_experts():
    routing = routing_of([[1.0, 0, 0, 0]] * 6)
    assert LOSSES['importance'](routing).item() == pytest.approx(3)  # E - 1
    assert LOSSES['importance_unbiased'](routing).item() == pytest.approx(4)  # E
    assert LOSSES['kl'](routing).item() == pytest.approx(math.log(4), rel=1e-5)
    assert LOSSES['gshard'](routing).item() == pytest.approx(4)  # E^2 * (1 * 1) / E


def test_perfect_balance_has_finite_gradients():
    logits = torch.zeros(8, 4, requires_grad=True)
    gates = torch.softmax(logits, dim=-1)
    noisy = logits + torch.randn(8, 4)
    routing = Routing(
        logits, gates, *torch.softmax(noisy, -1).topk(2), noisy_logits=noisy, noise_std=torch.tensor(0.25),
        affinity=torch.ones(4, 4))
    values = {name: loss(routing) for name, loss in LOSSES.items()}
    assert values['importance'].item() == values['importance_unbiased'].item() == 0
    assert values['kl'].item() == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(sum(values.values()), logits)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_zero_noise_gradient_at_perfectly_equal_loads():
    # Every noisy logit and every clean one equal: the standard deviation's own derivative would be 0 / 0 here.
    logits = torch.zeros(8, 4, requires_grad=True)
    routing = Routing(
        logits, torch.softmax(logits, -1), *logits.topk(2), noisy_logits=logits + 0, noise_std=torch.tensor(0.25))
    for name in ('importance', 'load', 'vmoe_load'):
        (gradient,) = torch.autograd.grad(LOSSES[name](routing), logits, retain_graph=True)
        assert gradient.isfinite().all(), name


def test_load_of_shazeer_by_hand():
    # Two experts, k = 1, clean logits (0.5, 0), noisy (0.9, 0.3), std (0.4, 0.2). Expert 0 was chosen: its threshold
    # is the second noisy logit 0.3; expert 1 was not: its threshold is the first, 0.9.
    p = [normal_cdf((0.5 - 0.3) / 0.4), normal_cdf((0.0 - 0.9) / 0.2)]
    mean = sum(p) / 2
    expected = ((p[0] - mean) ** 2 + (p[1] - mean) ** 2) / 2 / mean ** 2
    logits = torch.tensor([[0.5, 0.0]])
    routing = Routing(
        logits, logits, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64),
        noisy_logits=torch.tensor([[0.9, 0.3]]), noise_std=torch.tensor([[0.4, 0.2]]))
    assert load_loss(routing).item() == pytest.approx(expected, rel=1e-5)


def test_load_of_vmoe_by_hand():
    # The same numbers with V-MoE's one threshold, the first noisy logit 0.9 for both, std 0.25.
    p = [1 - normal_cdf((0.9 - 0.5) / 0.25), 1 - normal_cdf((0.9 - 0.0) / 0.25)]
    mean = sum(p) / 2
    expected = ((p[0] - mean) ** 2 + (p[1] - mean) ** 2) / 2 / mean ** 2
    logits = torch.tensor([[0.5, 0.0]])
    routing = Routing(
        logits, logits, torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64),
        noisy_logits=torch.tensor([[0.9, 0.3]]), noise_std=torch.tensor(0.25))
    assert vmoe_load_loss(routing).item() == pytest.approx(expected, rel=1e-4)


def test_expected_load_is_k_times_the_batch():
    # Each item goes to exactly k experts, so the smooth loads sum to B k in expectation: 20,000 items, k = 2 of 5.
    router = NoisyTopKRouter(4, 5, num_selected=2)
    routing = router(torch.randn(20_000, 4))
    top = routing.noisy_logits.topk(3).values
    threshold = torch.where(routing.noisy_logits > top[:, 2:], top[:, 2:], top[:, 1:2])
    load = torch.special.ndtr((routing.logits - threshold) / routing.noise_std).sum()
    assert load.item() == pytest.approx(40_000, rel=0.01)
    assert load_loss(routing).item() < 1e-3  # zero matrices: equal loads


@pytest.mark.parametrize('name', ['load', 'vmoe_load'])
def test_load_is_zero_where_nothing_is_random(name):
    router = SoftmaxTopKRouter(4, 5).eval()
    assert LOSSES[name](router(torch.randn(6, 4))).item() == 0


def test_groups_are_averaged_by_their_items():
    # Four items: a group of three, all on expert 0 (CV^2 = 1), and a last one of one item, balanced (CV^2 = 0).
    routing = routing_of([[1.0, 0.0]] * 3 + [[0.5, 0.5]], group_size=3)
    assert LOSSES['importance'](routing).item() == pytest.approx(0.75 * 1 + 0.25 * 0)
    # One group: importance (3.5, 0.5), mean 2, CV^2 = 2.25 / 4.
    assert LOSSES['importance'](routing._replace(group_size=None)).item() == pytest.approx(0.5625)


@pytest.mark.parametrize('name', [*BALANCE_LOSSES, 'z'])
def test_a_group_is_judged_as_a_whole_and_by_itself(name):
    """Of twelve items in two groups: the mean of both, each of which depends on no order of its items or experts."""
    router = NoisyTopKRouter(4, 5, num_selected=2)
    torch.nn.init.normal_(router.weight)
    record = router(torch.randn(12, 4))
    fields = ('logits', 'gates', 'weights', 'indices', 'noisy_logits', 'noise_std')

    def loss(rows, group_size=None):
        part = {field: getattr(record, field)[rows] for field in fields}
        return LOSSES[name](record._replace(**part, shape=(len(rows),), group_size=group_size)).item()

    first, second = torch.arange(6), torch.arange(6, 12)
    assert loss(torch.arange(12), group_size=6) == pytest.approx((loss(first) + loss(second)) / 2, rel=1e-5)
    assert loss(first.flip(0)) == pytest.approx(loss(first), rel=1e-5)
    one_by_one = sum(loss(row) for row in first.split(1)) / 6
    assert (loss(first) == pytest.approx(one_by_one, rel=1e-5)) == (name == 'z')  # which alone has no group


def test_z_loss():
    # Two logits ln 3 and ln 1: log-sum-exp is ln 4.
    routing = routing_of([[3.0, 1.0]])
    assert LOSSES['z'](routing).item() == pytest.approx(math.log(4) ** 2)


def test_losses_are_weighted_and_summed_over_layers_by_name():
    routing = routing_of([[1.0, 0, 0, 0]] * 2, losses=(('importance', 0.5), ('gshard', 0.25)))
    losses = auxiliary_losses([routing, routing])
    assert losses['importance'].item() == pytest.approx(2 * 0.5 * 3)
    assert losses['gshard'].item() == pytest.approx(2 * 0.25 * 4)
    assert auxiliary_losses([routing_of([[1.0, 0.0]])]) == {}
    with pytest.raises(InputError, match="Unknown auxiliary loss 'importence'. Did you mean 'importance'"):
        auxiliary_losses([routing._replace(losses=(('importence', 1.0),))])


def test_balance_counts_what_was_kept():
    # Four items choose experts 0 0 0 1 of two; one of expert 0 is dropped: shares 2/3 and 1/3.
    routing = routing_of([[0.9, 0.1]] * 3 + [[0.1, 0.9]])._replace(
        kept=torch.tensor([[True], [True], [False], [True]]))
    diagnostics = balance(routing)
    torch.testing.assert_close(diagnostics['share'], torch.tensor([2 / 3, 1 / 3]))
    assert diagnostics['cv'].item() == pytest.approx((1 / 6) / (1 / 2))
    assert diagnostics['dropped'].item() == pytest.approx(0.25)
    assert diagnostics['live'].item() == pytest.approx(3 / 8)  # of 4 items x 2 experts
    gates = torch.tensor([[0.5, 0.0], [2.0, 1.0]])
    assert balance(Routing(gates, gates, gates))['live'].item() == 0.75
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)) / math.log(2)
    assert diagnostics['entropy'].item() == pytest.approx(entropy)


@pytest.mark.parametrize('name', sorted(LOSSES))
def test_an_empty_batch_costs_nothing(name):
    empty = torch.zeros(0, 4, requires_grad=True)
    routing = Routing(empty, empty, empty[:, :2], torch.zeros(0, 2, dtype=torch.int64), noisy_logits=empty,
                      noise_std=torch.tensor(1.0), affinity=torch.ones(4, 4))
    loss = LOSSES[name](routing)
    loss.backward()
    assert loss.item() == 0


def test_the_embedding_loss_is_a_cross_entropy_and_wants_the_labels():
    # softmax of (0, ln 3) is (1/4, 3/4): -ln(1/4) = ln 4 for class 0
    routing = routing_of([[0.0, math.log(3.0)]])._replace(losses=(('embedding', 0.5),))
    routing = routing._replace(logits=torch.tensor([[0.0, math.log(3.0)]]))
    found = auxiliary_losses([routing], torch.tensor([0]))
    assert found['embedding'].item() == pytest.approx(0.5 * math.log(4.0))
    # soft targets (1/2, 1/2): the mean of ln 4 and ln 4/3
    soft = auxiliary_losses([routing], torch.tensor([[0.5, 0.5]]))
    assert soft['embedding'].item() == pytest.approx(0.25 * (math.log(4.0) + math.log(4.0 / 3.0)))
    with pytest.raises(InputError, match=r"'embedding' needs labels: call auxiliary_losses\(routings, target\)"):
        auxiliary_losses([routing])


def test_the_load_loss_reaches_an_expert_that_no_item_chose():
    """Logits 4, 3, 2 and 1 for every item, without the draw: experts 0 and 1 are chosen, 2 and 3 are not."""
    gradients = {}
    for name in ('kl', 'load'):
        router = NoisyTopKRouter(1, 4, num_selected=2)
        router.sample_noise = torch.zeros_like
        with torch.no_grad():
            router.weight.copy_(torch.tensor([[4.], [3.], [2.], [1.]]))
        routing = router(torch.ones(5, 1))
        assert set(routing.indices.flatten().tolist()) == {0, 1}
        LOSSES[name](routing).backward()
        gradients[name] = router.weight.grad[:, 0]
    assert gradients['kl'][2:].tolist() == [0, 0] and gradients['kl'][0] != 0
    assert (gradients['load'][2:] < 0).all()  # descent raises their logits
