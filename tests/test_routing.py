"""Routers, capacity, records and the context: numbers small enough to check by hand."""
import math

import pytest
import torch
from torch import nn

from moe_zoo.errors import InputError
from moe_zoo.routing import (
    CosineTopKRouter,
    NoisyTopKRouter,
    Routing,
    SigmoidRouter,
    SigmoidTopKRouter,
    SoftmaxRouter,
    SoftmaxTopKRouter,
    checkpoint_routed,
    compute_capacity,
    current_image_sizes,
    end_step,
    keep_within_capacity,
    record,
    routing_context,
    trace_routing,
)

TOP_K = [NoisyTopKRouter, SoftmaxTopKRouter, SigmoidTopKRouter, CosineTopKRouter]


def identity_router(cls, **kwargs):
    """A router whose logits are its two or three inputs."""
    size = kwargs.pop('size', 3)
    router = cls(size, size, **kwargs)
    nn.init.eye_(router.weight)
    return router.eval()


def test_softmax_before_top_k_is_not_renormalised():
    # exp(ln 4), exp(ln 3), exp(ln 1) = 4, 3, 1 of 8: the two largest gates are 1/2 and 3/8.
    routing = identity_router(SoftmaxTopKRouter)(torch.tensor([[4.0, 3.0, 1.0]]).log())
    assert routing.indices.tolist() == [[0, 1]]
    torch.testing.assert_close(routing.weights, torch.tensor([[4 / 8, 3 / 8]]))
    torch.testing.assert_close(routing.gates, torch.tensor([[4 / 8, 3 / 8, 1 / 8]]))


def test_softmax_after_top_k_sums_to_one():
    # The same logits after the choice: 4 and 3 of 7, and nothing for the third.
    routing = identity_router(NoisyTopKRouter)(torch.tensor([[4.0, 3.0, 1.0]]).log())
    torch.testing.assert_close(routing.weights, torch.tensor([[4 / 7, 3 / 7]]))
    torch.testing.assert_close(routing.gates, torch.tensor([[4 / 7, 3 / 7, 0.0]]))


def test_cosines_are_scaled_by_a_learned_factor_with_a_bound():
    """Experts at 0 and 90 degrees, an item at atan(4 / 3) after the projection: cosines 3/5 and 4/5, at any length."""
    router = CosineTopKRouter(3, 2, projection_features=2, temperature=0.1).eval()
    with torch.no_grad():
        router.projection.weight.copy_(torch.tensor([[6.0, 0, 0], [0, 2, 0]]))
        router.projection.bias.copy_(torch.tensor([0.0, 6.0]))
        router.weight.copy_(torch.tensor([[7.0, 0], [0, 0.5]]))
    x = torch.tensor([[1.0, 1, 9]])  # to (6, 8)
    routing = router(x)
    torch.testing.assert_close(routing.logits, torch.tensor([[6.0, 8.0]]))
    torch.testing.assert_close(routing.weights, torch.tensor([[8.0, 6.0]]).softmax(1))
    router.log_factor.data.fill_(9.0)  # e^9 is more than 100
    torch.testing.assert_close(router(x).logits, torch.tensor([[60.0, 80.0]]))
    assert router.macs(5) == 5 * (3 * 2 + 2 * 2)
    with pytest.raises(InputError, match='temperature=0.001: use at least 0.01.'):
        CosineTopKRouter(3, 2, temperature=0.001)
    with pytest.raises(InputError, match='projection_features=0: use a whole number, at least 1.'):
        CosineTopKRouter(3, 2, projection_features=0)


def test_sigmoid_top_k_normalises_and_its_bias_only_chooses():
    # sigmoid(ln 3) = 3/4, sigmoid(0) = 1/2, sigmoid(-ln 3) = 1/4.
    x = torch.tensor([[math.log(3), 0.0, -math.log(3)]])
    router = identity_router(SigmoidTopKRouter)
    torch.testing.assert_close(router(x).weights, torch.tensor([[0.6, 0.4]]))  # 3/4 and 1/2 of 5/4
    router.constraint.selection_bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
    routing = router(x)
    assert routing.indices.tolist() == [[2, 0]]
    torch.testing.assert_close(routing.weights, torch.tensor([[0.25, 0.75]]))  # the gates without the bias


def test_selection_bias_moves_against_the_load_in_training_only():
    router = SigmoidTopKRouter(2, 4, num_selected=1, bias_rate=0.5)
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[3.0, 0], [2, 0], [1, 0], [0, 0]]))
    x = torch.tensor([[1.0, 0.0]] * 4)  # all four items choose expert 0; the mean load is 1
    router.eval()(x)
    end_step(router)
    assert router.constraint.selection_bias.tolist() == [0, 0, 0, 0]
    router.train()(x)
    end_step(router)
    assert router.constraint.selection_bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    assert router.constraint.load.tolist() == [0, 0, 0, 0]
    assert 'constraint.selection_bias' in router.state_dict()
    assert router(x).indices.flatten().tolist() == [1] * 4  # sigmoid(3) - .5 = .45 against sigmoid(2) + .5


def test_dense_routers_mix_every_expert():
    x = torch.tensor([[math.log(3), 0.0]])
    sigmoid, softmax = SigmoidRouter(2, 2), SoftmaxRouter(2, 2, temperature=2.0)
    for router in (sigmoid, softmax):
        nn.init.eye_(router.weight)
    torch.testing.assert_close(sigmoid(x).weights, torch.tensor([[0.75, 0.5]]))
    root = math.sqrt(3)  # exp(ln 3 / 2) against exp(0)
    torch.testing.assert_close(softmax(x).weights, torch.tensor([[root / (root + 1), 1 / (root + 1)]]))
    assert sigmoid(x).indices is None


@pytest.mark.parametrize('router', [
    NoisyTopKRouter(5, 4, 1), NoisyTopKRouter(5, 4, 1, noise=False), SoftmaxTopKRouter(5, 4, 1),
    SoftmaxTopKRouter(5, 4, 1, renormalise=True), SigmoidTopKRouter(5, 4, 1)], ids=lambda r: type(r).__name__)
def test_one_chosen_expert_keeps_the_task_gradient_of_the_router(router):
    nn.init.normal_(router.weight)
    routing = router(torch.randn(6, 5))
    (routing.weights * torch.randn(6, 1)).sum().backward()
    assert router.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize('cls', TOP_K)
def test_logits_are_float32_under_autocast(cls):
    router = cls(16, 4)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        routing = router(torch.randn(8, 16).bfloat16())
    assert routing.logits.dtype == routing.weights.dtype == torch.float32


@pytest.mark.parametrize('cls', TOP_K)
def test_evaluation_is_deterministic_and_training_noise_is_new(cls):
    router = cls(16, 4)
    nn.init.normal_(router.weight)
    x = torch.randn(8, 16)
    router.eval()
    assert torch.equal(router(x).weights, router(x).weights)
    assert router(x).noisy_logits is None
    if cls is not SigmoidTopKRouter:
        router.train()
        assert not torch.equal(router(x).noisy_logits, router(x).noisy_logits)


def test_noise_of_both_routers_has_the_stated_spread():
    # Zero matrices: std = softplus(0) + 0.01 = ln 2 + 0.01 for Shazeer, noise_std / E for V-MoE.
    routing = NoisyTopKRouter(3, 4)(torch.randn(7, 3))
    torch.testing.assert_close(routing.noise_std, torch.full((7, 4), math.log(2) + 0.01))
    assert SoftmaxTopKRouter(3, 4, noise_std=2.0)(torch.randn(7, 3)).noise_std.item() == 0.5


@pytest.mark.parametrize('cls', TOP_K)
def test_too_many_chosen_experts_is_one_sentence(cls):
    with pytest.raises(InputError, match='num_selected=5 with num_experts=4: choose between 1 and 4 experts.'):
        cls(8, 4, num_selected=5)


def test_temperature_must_be_positive():
    with pytest.raises(InputError, match='temperature=0: a softmax needs a temperature above 0.'):
        SoftmaxRouter(8, 4, temperature=0)


# Capacity.

def test_capacity_rounds_half_to_even():
    # items * K * factor / E with one expert: 2.5 and 3.5 are as far from the number below as from the one above
    rounded = [compute_capacity(1, 1, 1, factor, multiple_of=1, rounding='round') for factor in (2.4, 2.5, 2.6, 3.5)]
    assert rounded == [2, 2, 3, 4]


def test_capacity_of_the_original():
    # 34 tokens, 2 of 4 experts, factor 0.6: 34 * 2 * 0.6 / 4 = 10.2, up to 11, up to a multiple of 4.
    assert compute_capacity(34, 4, 2, 0.6) == 12
    assert compute_capacity(34, 4, 2, 0.6, multiple_of=None) == 11
    assert compute_capacity(34, 4, 2, 0.6, multiple_of=1, rounding='round') == 10
    with pytest.raises(InputError, match='leaves 0 slots for a group of 2 items'):
        compute_capacity(2, 64, 1, 1.0, rounding='round')
    with pytest.raises(InputError, match="use 'ceil' or 'round'"):
        compute_capacity(2, 4, 1, 1.0, rounding='floor')


def test_first_choices_before_second_ones():
    # Three items, two experts, two slots. First choices: item 0 -> 0, item 1 -> 0, item 2 -> 1. Second choices: items
    # 0 and 1 want expert 1, which has one slot left, item 2 wants expert 0, which is full.
    indices = torch.tensor([[[0, 1], [0, 1], [1, 0]]])
    weights = torch.tensor([[[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]]])
    kept = keep_within_capacity(indices, weights, num_experts=2, capacity=2)
    assert kept.tolist() == [[[True, True], [True, False], [True, False]]]
    # With priority, item 1 (0.9) is served first, then 2, then 0: item 1 takes the slot that item 0 had.
    kept = keep_within_capacity(indices, weights, num_experts=2, capacity=2, batch_priority=True)
    assert kept.tolist() == [[[True, False], [True, True], [True, False]]]


def test_equal_priorities_keep_the_order_of_position():
    indices = torch.zeros(1, 5, 1, dtype=torch.int64)
    kept = keep_within_capacity(indices, torch.full((1, 5, 1), 0.5), 2, capacity=3, batch_priority=True)
    assert kept.flatten().tolist() == [True, True, True, False, False]


@pytest.mark.parametrize('batch_priority', [False, True])
def test_no_expert_exceeds_its_capacity_and_no_slot_is_wasted(batch_priority):
    weights, indices = torch.rand(3, 50, 8).topk(2)
    kept = keep_within_capacity(indices, weights, 8, capacity=9, batch_priority=batch_priority)
    for g in range(3):
        wanted = torch.bincount(indices[g].flatten(), minlength=8)
        got = torch.bincount(indices[g][kept[g]], minlength=8)
        assert torch.equal(got, wanted.clamp(max=9))


def test_combine_matrix_leaves_out_what_was_dropped():
    routing = Routing(
        logits=torch.zeros(2, 3), gates=torch.zeros(2, 3), weights=torch.tensor([[0.5, 0.25], [0.75, 0.125]]),
        indices=torch.tensor([[2, 0], [1, 2]]), kept=torch.tensor([[True, True], [True, False]]))
    assert routing.combine_matrix().tolist() == [[0.25, 0.0, 0.5], [0.0, 0.75, 0.0]]


# The context.

class Routed(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = SoftmaxTopKRouter(4, 3, 2)

    def forward(self, x):
        routing = self.router(x)
        record(self, routing)
        return x * routing.weights.sum(dim=1, keepdim=True)


def test_records_go_to_every_open_context_and_nowhere_else():
    layer = Routed()
    before = dict(vars(layer))
    layer(torch.randn(2, 4))  # nothing open: nothing kept
    with routing_context() as outer:
        layer(torch.randn(2, 4))
        with routing_context() as inner:
            layer(torch.randn(2, 4))
    assert [len(outer.routings), len(inner.routings)] == [2, 1]
    assert outer.records[0][0] is layer
    assert vars(layer) == before


def test_context_closes_on_an_error():
    with pytest.raises(RuntimeError, match='halt'), routing_context(torch.ones(1, 2), (4, 4)):
        assert current_image_sizes() is not None
        raise RuntimeError('halt')
    assert current_image_sizes() is None


def test_trace_names_the_layers_and_keeps_no_graph():
    model = nn.Sequential(Routed(), nn.ReLU(), Routed())
    with trace_routing(model) as trace:
        model(torch.randn(2, 4))
        model(torch.randn(2, 4))
    assert {name: len(routings) for name, routings in trace.items()} == {'0': 2, '2': 2}
    assert not trace['0'][0].weights.requires_grad


@pytest.mark.parametrize('use_reentrant', [False, True])
def test_checkpointing_keeps_the_gradient_of_what_was_recorded(use_reentrant):
    layer, x = Routed(), torch.randn(5, 4, requires_grad=True)

    def gradients(run):
        layer.zero_grad()
        torch.manual_seed(1)
        with routing_context() as context:
            y = run(x)
        (y.square().sum() + context.routings[0].gates.square().sum()).backward()
        return layer.router.weight.grad.clone()

    expected = gradients(layer)
    without = gradients(lambda x: layer(x) + 0 * x)
    assert torch.equal(expected, without)
    torch.testing.assert_close(gradients(lambda x: checkpoint_routed(layer, x, use_reentrant=use_reentrant)), expected)


def test_checkpointing_sees_the_image_sizes_again():
    seen = []

    def function(x):
        seen.append(current_image_sizes() is not None)
        return (x * 2).exp()

    x = torch.randn(2, 3, requires_grad=True)
    with routing_context(torch.ones(2, 2), (4, 4)):
        y = checkpoint_routed(function, x)
    y.sum().backward()
    assert seen == [True, True]
