"""Fresh weights: their distributions, and `reset_parameters`, which leaves nothing of what was there.

The largest of many uniform draws is close to the bound, and the deviation of many normal draws close to the one asked
for: with 40,000 draws within 1 % and 2 %.
"""
import math
from functools import partial

import pytest
import torch

from moe_zoo.layers import (
    ChannelGate,
    CondConv2d,
    CondLinear,
    DynamicConv2d,
    MoEConv2d,
    MoEMlp,
    PatchMoE,
    PatchMoEConv2d,
    RoutedConv2d,
    ShallowEmbedding,
    SoftMoEMlp,
)
from moe_zoo.layers.expert_mlps import ExpertLinear
from moe_zoo.routing import (
    AnnealedSoftmaxRouter,
    CosineTopKRouter,
    ExpertChoiceRouter,
    HierarchicalRouter,
    NoisyTopKRouter,
    SigmoidRouter,
    SigmoidTopKRouter,
    SoftmaxRouter,
    SoftmaxTopKRouter,
    SoftRouter,
)


def _check_uniform(values: torch.Tensor, bound: float) -> None:
    assert .99 * bound < values.max() <= bound and -bound <= values.min() < -.99 * bound
    assert values.std().item() == pytest.approx(bound / math.sqrt(3), rel=.02)


@pytest.mark.parametrize('cls', [SoftmaxTopKRouter, CosineTopKRouter, ExpertChoiceRouter, SigmoidTopKRouter])
def test_token_routers_draw_a_normal_cut_at_two_deviations(cls):
    router = cls(400, 100)
    features = router.weight.shape[1]  # of the cosine router those of its projection
    std = 1 / math.sqrt(features)
    most = 2 * std / 0.87962566  # cut there, a normal has 0.8796 of its deviation
    assert router.weight.std().item() == pytest.approx(std, rel=.02)
    assert .99 * most < router.weight.max() <= most and -most <= router.weight.min() < -.99 * most


@pytest.mark.parametrize('cls', [SigmoidRouter, SoftmaxRouter, AnnealedSoftmaxRouter])
def test_image_routers_draw_glorots_uniform(cls):
    router = cls(400, 100)
    _check_uniform(router.weight, math.sqrt(6 / (400 + 100)))
    assert not router.bias.any()
    assert cls(4, 2, bias=False).bias is None


@pytest.mark.parametrize('cls', [NoisyTopKRouter, HierarchicalRouter])
def test_noisy_routers_start_at_zero_unless_they_have_no_noise(cls):
    """Shazeer et al. 2017, appendix A: all zero, so that noise alone spreads the first images over the experts."""
    assert not cls(400, 100).weight.any() and not cls(400, 100).noise_weight.any()
    quiet = cls(400, 100, noise=False)
    assert quiet.weight.std().item() == pytest.approx(1 / 20, rel=.02) and quiet.noise_weight is None
    assert cls(4, 8, zero_init=False).weight.any() and not cls(4, 8, noise=False, zero_init=True).weight.any()


def test_slots_of_the_soft_router_have_random_directions():
    router = SoftRouter(400, 50, num_slots=2)
    assert router.mu.std().item() == pytest.approx(1 / 20, rel=.02) and router.mu.mean().abs() < 1e-3
    assert router.scale.tolist() == [1]
    assert router(torch.zeros(3, 400)).logits.isfinite().all()  # a token of zeros has no direction


def test_kernels_are_drawn_as_torch_draws_those_of_one_layer():
    """Uniform within 1 / sqrt(fan in), for every expert."""
    conv = MoEConv2d(64, 64, 3, num_experts=4, groups=2, bias=True)  # 32 channels x 9 a kernel
    _check_uniform(conv.weight, 1 / math.sqrt(32 * 9))
    assert conv.bias.abs().max() <= 1 / math.sqrt(32 * 9) and conv.bias.std() > .5 / math.sqrt(32 * 9)
    linear = CondLinear(100, 200, num_experts=4)
    _check_uniform(linear.weight, .1)
    assert linear.bias.abs().max() <= .1 and linear.bias.std() > .05


@pytest.mark.parametrize('same', [True, False])
def test_experts_of_tokens_start_alike_or_apart(same):
    """Glorot uniform on the fans of one expert, and biases of deviation 1e-6."""
    stack = ExpertLinear(4, 100, 300, same_init=same)
    _check_uniform(stack.weight, math.sqrt(6 / (100 + 300)))
    assert stack.bias.std().item() == pytest.approx(1e-6, rel=.15)
    assert torch.equal(stack.weight[0], stack.weight[3]) == torch.equal(stack.bias[0], stack.bias[3]) == same


def test_gates_of_channels():
    assert ChannelGate(4, 3).weight.tolist() == [[1, 1, 1]] * 4
    drawn = ChannelGate(400, 100, init=(-1, 3)).weight
    assert -1 <= drawn.min() < -.99 and 2.99 < drawn.max() <= 3


BUILDS = [
    partial(SoftmaxTopKRouter, 4, 3), partial(SigmoidTopKRouter, 4, 3), partial(CosineTopKRouter, 4, 3),
    partial(NoisyTopKRouter, 4, 3), partial(NoisyTopKRouter, 4, 3, noise=False),
    partial(NoisyTopKRouter, 4, 3, constraint='mean'), partial(HierarchicalRouter, 4, 8),
    partial(SigmoidRouter, 4, 3, hidden_features=2), partial(SoftmaxRouter, 4, 3, hidden_features=2),
    partial(AnnealedSoftmaxRouter, 4, 3, hidden_features=2), partial(SoftRouter, 4, 3),
    partial(ExpertChoiceRouter, 4, 3), partial(ChannelGate, 4, 3), partial(ChannelGate, 4, 3, init=(0, 1)),
    partial(MoEConv2d, 4, 4, 3, bias=True), partial(MoEConv2d, 4, 4, 3, gate='conv'),
    partial(CondConv2d, 4, 4, 3, bias=True), partial(RoutedConv2d, 4, 4, 3), partial(CondLinear, 4, 3),
    partial(DynamicConv2d, 4, 4, 3, bias=True), partial(ExpertLinear, 2, 3, 4), partial(SoftMoEMlp, 4, num_experts=2),
    partial(MoEMlp, 4, num_experts=2, num_shared_experts=1), partial(MoEMlp, 4, num_experts=4, router='cosine'),
    partial(PatchMoE, 1, num_filters=2, patch_size=2, num_experts=2), partial(PatchMoEConv2d, 4, 4),
    partial(ShallowEmbedding, 10)]


@pytest.mark.parametrize('build', BUILDS, ids=lambda build: build.func.__name__)
def test_a_reset_leaves_nothing(build):
    module = build()
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(7)
    parts = [part for part in module.modules() if hasattr(part, 'reset_parameters')]
    for part in parts:
        part.reset_parameters()
        for name, tensor in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            assert not (tensor == 7).any() or name == 'log_factor', name
    assert parts


@pytest.mark.parametrize('build', BUILDS, ids=lambda build: build.func.__name__)
def test_everything_is_made_where_and_as_asked(build):
    there = build(device='meta')
    assert all(tensor.is_meta for tensor in (*there.parameters(), *there.buffers()))
    assert {parameter.dtype for parameter in build(dtype=torch.float64).parameters()} == {torch.float64}
