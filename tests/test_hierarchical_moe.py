"""The sparsely-gated layer on two levels, and the paper's own numbers for both (Shazeer et al. 2017).

Letters: B images, N tokens, T items, D width, E experts in A groups, K chosen experts, K / L groups of L experts each.
"""
import math
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from moe_zoo.analysis.force import force_expert
from moe_zoo.checkpoints.shrink import merge, prune
from moe_zoo.errors import InputError
from moe_zoo.layers import MoEMlp
from moe_zoo.losses import LOSSES, auxiliary_losses, squared_cv
from moe_zoo.losses.balance import hierarchical_load
from moe_zoo.routing import HierarchicalRouter, NoisyTopKRouter, checkpoint_routed, routing_context, trace_routing
from moe_zoo.routing.routers import choice_probability, normal_cdf

D, A, E = 8, 3, 12  # groups of 4

# TorchScript is deprecated, and timm's contract still asks for it; tracing warns of every shape that it freezes.
pytestmark = [
    pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning'),
    pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning'),
]


def small(num_selected=4, groups_selected=2, **kwargs):
    """Three groups of four experts; gates drawn, so that they differ."""
    layer = MoEMlp(
        D, 16, num_experts=E, num_selected=num_selected, router='hierarchical', same_init=False, capacity_factor=None,
        router_args=dict(num_groups=A, groups_selected=groups_selected), **kwargs)
    for router in (layer.router, layer.router.groups):
        nn.init.normal_(router.weight)
        if router.noise_weight is not None:
            nn.init.normal_(router.noise_weight)
    return layer


def record_of(layer, x):
    with routing_context() as context:
        layer(x)
    return context.routings[0]


def kept_softmax(logits, k):
    """Softmax of the k largest, zero elsewhere."""
    least = logits.topk(k, dim=-1).values[..., -1:]
    return torch.softmax(logits.masked_fill(logits < least, float('-inf')), dim=-1)


def plain(layer, x, groups_selected, selected_in_group):
    """sum_i sum_j G_primary_i G_i_j E_ij(x), every gate and every expert computed, without noise."""
    primary = kept_softmax(x @ layer.router.groups.weight.T, groups_selected)  # (B, N, A)
    inside = kept_softmax((x @ layer.router.weight.T).unflatten(-1, (A, E // A)), selected_in_group)
    gates = (primary.unsqueeze(-1) * inside).flatten(-2)  # (B, N, E)
    outputs = torch.stack([
        F.linear(F.gelu(F.linear(x, w1, b1)), w2, b2)
        for w1, b1, w2, b2 in zip(layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias)], dim=2)
    return (gates.unsqueeze(-1) * outputs).sum(dim=2), gates


# The layer.

@pytest.mark.parametrize('num_selected, groups_selected', [(4, 2), (6, 3), (12, 3)])
def test_output_and_gradients_are_those_of_the_plain_sum(num_selected, groups_selected):
    layer = small(num_selected, groups_selected).eval()
    x, weights = torch.randn(2, 5, D, requires_grad=True), torch.randn(2, 5, D)
    results = []
    for run in (layer, lambda x: plain(layer, x, groups_selected, num_selected // groups_selected)[0]):
        y = run(x)
        inputs = (x, layer.fc1.weight, layer.fc2.bias, layer.router.weight, layer.router.groups.weight)
        results.append([y, *torch.autograd.grad((y * weights).sum(), inputs)])
    for ours, expected in zip(*results):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize('num_selected, groups_selected', [(2, 2), (3, 1), (1, 1)])
def test_one_of_a_level_has_a_gate_of_one_that_still_learns(num_selected, groups_selected):
    layer = small(num_selected, groups_selected).eval()
    x = torch.randn(2, 5, D)
    y = layer(x)
    torch.testing.assert_close(y, plain(layer, x, groups_selected, num_selected // groups_selected)[0])
    y.square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-3 and layer.router.groups.weight.grad.abs().max() > 1e-3


def test_the_record_is_of_pairs_of_group_and_expert():
    layer = small().eval()
    x = torch.randn(2, 5, D)
    record = record_of(layer, x)
    gates = plain(layer, x, 2, 2)[1].flatten(0, 1)
    torch.testing.assert_close(record.gates, gates)
    torch.testing.assert_close(record.combine_matrix(), gates)
    assert (record.weights.diff(dim=1) <= 0).all()  # best first
    assert record.gates.sum().item() == pytest.approx(10)  # importance sums to the batch
    assert (record.shape, record.num_experts, layer.num_selected) == ((2, 5), 12, 4)
    # The softmax of the logits is the joint one where the gate of a group ran, and even within the others.
    primary = torch.softmax(x.view(10, D) @ layer.router.groups.weight.T, dim=1)
    inside = torch.softmax((x.view(10, D) @ layer.router.weight.T).view(10, A, 4), dim=2)
    ran = record.gates.view(10, A, 4).sum(dim=2, keepdim=True) > 0
    joint = primary.unsqueeze(2) * torch.where(ran, inside, 0.25)
    torch.testing.assert_close(torch.softmax(record.logits, dim=1), joint.flatten(1))


def test_only_chosen_experts_and_gates_of_chosen_groups_run(monkeypatch):
    layer = small().eval()
    with torch.no_grad():
        layer.router.groups.weight.copy_(torch.tensor([[2.0], [1.0], [0.0]]).expand(A, D))
        layer.router.weight.copy_(torch.arange(12.0).view(12, 1).expand(E, D))
    chunks, gated = [], []
    run, linear = layer.run_experts, F.linear
    layer.run_experts = lambda given: chunks.extend(map(len, given)) or run(given)
    monkeypatch.setattr(
        'moe_zoo.routing.hierarchical.linear_float32', lambda x, weight: gated.append(len(x)) or linear(x, weight))
    layer(torch.rand(2, 5, D))  # above zero: groups 0 and 1, and the last two experts of each
    assert gated == [10, 10, 0]
    assert chunks == [0, 0, 10, 10] * 2 + [0] * 4


def test_every_parameter_gets_a_gradient_and_an_idle_one_zeros():
    layer = small()
    x = torch.randn(1, 1, D)
    with routing_context() as context:
        y = layer(x)
    (y.sum() + sum(auxiliary_losses(context.routings).values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    used = set(context.routings[0].indices.flatten().tolist())
    assert [e for e, grad in enumerate(layer.fc1.weight.grad) if grad.any()] == sorted(used)


def test_in_evaluation_no_image_depends_on_another_and_nothing_is_random():
    layer = small().eval()
    x = torch.randn(5, 6, D)
    torch.testing.assert_close(layer(x), torch.cat([layer(image.unsqueeze(0)) for image in x]))
    record = record_of(layer, x)
    assert record.noisy_logits is None and record.chances is None
    assert auxiliary_losses([record])['load'] == 0
    assert record_of(small(noise_std=0), x).noisy_logits is None
    with force_expert(layer, 7):
        assert set(record_of(layer, x).indices[:, 0].tolist()) == {7}


def test_scripted_and_traced_equal_eager_and_meta_runs():
    layer = small().eval()
    x = torch.randn(3, 5, D)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))
    torch.testing.assert_close(torch.jit.trace(layer, (x,))(x), layer(x))
    assert layer.to('meta')(x.to('meta')).shape == x.shape


@pytest.mark.slow
def test_compiled_and_exported_equal_eager():
    layer = small().eval()
    x = torch.randn(3, 5, D)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend='aot_eager', fullgraph=True)(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


def test_no_token_and_other_types():
    assert small()(torch.randn(2, 0, D)).shape == (2, 0, D)
    layer = small().to(torch.bfloat16)
    record = record_of(layer, torch.randn(2, 5, D, dtype=torch.bfloat16))
    assert record.logits.dtype == record.chances.dtype == torch.float32


def test_cost_by_hand():
    layer = small()
    # A token: the gate of 3 groups and those of 2 groups of 4 experts, 8 * (3 + 8) = 88; 4 experts of 2 * 8 * 16 = 256.
    assert layer.max_macs((2, 5, D)) == 10 * (88 + 4 * 256)
    # Gates: clean and noisy, of 3 groups and 12 experts; an expert is 256 weights and 16 + 8 biases.
    assert sum(p.numel() for p in layer.router.parameters()) == 2 * 8 * 15
    assert layer.active_parameters() == 240 + 4 * 280


@pytest.mark.parametrize('kwargs, message', [
    (dict(num_groups=5), 'num_groups=5 does not divide num_experts=12: use a divisor.'),
    (dict(num_groups=0), 'num_groups=0: use a whole number of 1 or more.'),
    (dict(groups_selected=3), 'num_selected=4 from groups_selected=3 groups of 4 experts: choose equally many from '
                              'each, 1 to 4.'),
    (dict(groups_selected=4), 'num_selected=4 with num_experts=3: choose between 1 and 3 experts.'),
    (dict(num_groups=6, groups_selected=1), 'num_selected=4 from groups_selected=1 groups of 2 experts'),
    (dict(num_group=3), "router_args has 'num_group'. Did you mean 'num_groups'"),
])
def test_bad_groups_are_one_sentence(kwargs, message):
    with pytest.raises(InputError) as error:
        MoEMlp(D, num_experts=E, num_selected=4, router='hierarchical', router_args=dict(dict(num_groups=A), **kwargs))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize('shrink', [prune, merge])
def test_experts_are_not_moved_to_other_groups(shrink):
    """Of two groups of four the heaviest four may be three of one: the rest would answer for a group that it is not."""
    model = timm.create_model(
        'vmoe_vit_b', embed_dim=16, depth=2, num_heads=2, img_size=16, patch_size=8, num_classes=3, num_experts=8,
        router='hierarchical', router_args=dict(num_groups=2, groups_selected=1)).eval()
    with torch.no_grad(), trace_routing(model) as trace:
        model(torch.randn(2, 3, 16, 16))
    with pytest.raises(InputError, match="^'blocks.1.mlp' chooses groups first .* all groups have to keep as many"):
        shrink(model, trace, keep=4)


# Its load loss.

def watched_noise(router):
    """Let a router draw its noise, and keep what it drew."""
    drawn, draw = [], router.sample_noise
    router.sample_noise = lambda logits: drawn.append(draw(logits)) or drawn[-1]
    return drawn


def probability(clean, noisy, std, k):
    """Phi((clean_i - k-th largest of the noisy logits without i) / std_i), expert by expert."""
    found = []
    for i in range(len(clean)):
        others = torch.cat([noisy[:i], noisy[i + 1:]])
        found.append(normal_cdf((clean[i] - others.sort(descending=True).values[k - 1]) / std[i]))
    return torch.stack(found)


def test_load_is_that_of_the_paper_item_by_item():
    """Load_primary_i Load_i(X_i)_j / |X_i|, with loops over items and groups."""
    router = small().router
    group_noise, noise = watched_noise(router.groups), watched_noise(router)
    x = torch.randn(20, D)
    record = router(x)

    def level(weight, noise_weight, given, drawn):
        clean, std = weight @ given, F.softplus(noise_weight @ given) + 1e-2
        return clean, clean + drawn * std, std

    primary, load, count = torch.zeros(A), torch.zeros(A, 4), torch.zeros(A)
    for t in range(20):
        clean, noisy, std = level(router.groups.weight, router.groups.noise_weight, x[t], group_noise[0][t])
        primary = primary + probability(clean, noisy, std, 2)
        for rank, group in enumerate(noisy.topk(2).indices.tolist()):
            own = slice(4 * group, 4 * group + 4)
            found = probability(*level(router.weight[own], router.noise_weight[own], x[t], noise[0][t, rank]), 2)
            load = load + F.one_hot(torch.tensor(group), A).unsqueeze(1) * found
            count[group] += 1
    expected = (load * (primary / count).unsqueeze(1)).flatten()
    assert count.tolist() != [count[0]] * A
    torch.testing.assert_close(LOSSES['load'](record), squared_cv(expected))


def test_load_by_hand():
    """Two groups of two, three items of which two went to group 0: its load is P summed, times 1.5 / 2."""
    chances = torch.tensor([[0.5, 0.5, 0, 0], [0.9, 0.1, 0, 0], [0, 0, 0.25, 0.75]])
    group_chances = torch.tensor([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]])
    went = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    expected = torch.tensor([1.4 * 0.75, 0.6 * 0.75, 0.25 * 1.5, 0.75 * 1.5])  # 1.5 / 2 and 1.5 / 1
    torch.testing.assert_close(hierarchical_load(chances, group_chances, went), expected)
    empty = hierarchical_load(chances[:2], group_chances[:2], went[:2])
    assert empty[2:].tolist() == [0, 0]  # a group without items has no load, and no NaN


def test_load_has_a_gradient_for_the_gates_of_both_levels_with_and_without_checkpointing():
    layer, x = small(), torch.randn(2, 5, D, requires_grad=True)
    gradients = []
    runs = [layer, *(partial(checkpoint_routed, layer, use_reentrant=reentrant) for reentrant in (False, True))]
    for run in runs:
        layer.zero_grad()
        torch.manual_seed(1)
        with routing_context() as context:
            y = run(x)
        (0 * y.sum() + LOSSES['load'](context.routings[0])).backward()
        gradients.append([p.grad.clone() for p in layer.router.parameters()])
    assert len(gradients[0]) == 4 and all(gradient.abs().max() > 1e-4 for gradient in gradients[0])
    for ours, expected in zip(gradients[1] + gradients[2], gradients[0] * 2):
        torch.testing.assert_close(ours, expected)


# Numbers of the paper, for one level and for two.

FLAT = NoisyTopKRouter(5, 8, num_selected=2)
TWO_LEVELS = HierarchicalRouter(5, 8, num_selected=2, num_groups=4, groups_selected=2)


def load_of(router, x):
    record = router(x)
    if record.group_chances is None:
        return choice_probability(record.logits, record.noisy_logits, record.noise_std, router.num_selected).sum(dim=0)
    groups = record.indices // router.group_experts
    return hierarchical_load(
        record.chances, record.group_chances, F.one_hot(groups, router.num_groups).amax(dim=1).float())


@pytest.mark.parametrize('router', [FLAT, TWO_LEVELS], ids=['flat', 'two levels'])
def test_at_zero_every_expert_expects_an_equal_load(router):
    """B k / n = 4000 * 2 / 8 = 1000 each, whatever the items; a single P deviates by less than 1/2: 4 * 32 in sum."""
    assert not any(p.any() for p in router.parameters())
    load = load_of(router, torch.randn(4000, 5))
    torch.testing.assert_close(load, torch.full((8,), 1000.0), atol=128, rtol=0)
    assert squared_cv(load) < 0.01


@pytest.mark.parametrize('router', [FLAT, TWO_LEVELS], ids=['flat', 'two levels'])
def test_loads_sum_to_what_is_chosen(router):
    """k * 4000 = 8000 in expectation, whatever the gates: sum_i P(i) is the expected number of chosen experts."""
    router = type(router)(5, 8, **dict(num_selected=2, **({} if router is FLAT else dict(num_groups=4))))
    for parameter in router.parameters():
        nn.init.normal_(parameter)
    assert load_of(router, torch.randn(4000, 5)).sum().item() == pytest.approx(8000, abs=160)


def test_two_experts_in_closed_form():
    """Logits (1.5, 0), k = 1: P(1) = Phi((1.5 - s e2) / s), P(2) = Phi((0 - 1.5 - s e1) / s)."""
    router = NoisyTopKRouter(1, 2, num_selected=1)
    router.weight.data[0] = 1.5
    noise = torch.tensor([[0.3, -0.4]])
    router.sample_noise = lambda logits: noise
    record = router(torch.ones(1, 1))
    s = math.log(2) + 0.01
    expected = torch.tensor([[1.5 - s * -0.4, -(1.5 + s * 0.3)]]) / s
    torch.testing.assert_close(
        choice_probability(record.logits, record.noisy_logits, record.noise_std, 1), normal_cdf(expected))


def test_the_experts_of_the_language_model():
    """512 -> 1024 -> 512 without biases: 1,048,576 weights; four of them are 4.19 M MACs a position."""
    options = dict(act_layer=nn.ReLU, bias=False, num_selected=4, capacity_factor=None, device='meta')
    flat = MoEMlp(512, 1024, num_experts=32, router='shazeer', **options)
    hierarchical = MoEMlp(512, 1024, num_experts=256, router='hierarchical', router_args=dict(num_groups=16), **options)
    for layer in (flat, hierarchical):
        assert sum(p.numel() for group in layer.expert_parameters() for p in group) == 1_048_576 * layer.num_experts
        assert layer.max_macs((1, 1, 512)) - layer.router.macs(1) == 4_194_304
    # The gate: d n on one level; 16 groups and 2 * 16 experts on two, instead of 256.
    assert (flat.router.macs(1), hierarchical.router.macs(1)) == (512 * 32, 512 * (16 + 32))
    assert sum(p.numel() for p in flat.router.parameters()) == 2 * 512 * 32


def test_the_choice_without_a_record_is_that_of_the_record():
    """What TorchScript computes, which has no records."""
    router = HierarchicalRouter(D, E, num_groups=A, zero_init=False).eval()
    x = torch.randn(5, D)
    logits, gates, weights, indices, _, _ = router.choose(x)
    routing = router(x)
    assert torch.equal(logits, routing.logits) and torch.equal(gates, routing.gates)
    assert torch.equal(weights, routing.weights) and torch.equal(indices, routing.indices)
