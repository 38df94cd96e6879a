"""Patch-routed layers: gates by hand, chosen patches against whole maps, the linear loss of the routers.

Letters: B images, C channels, n patches an image, l of them an expert, E experts.
"""
import copy
import math

import pytest
import torch
from torch import nn

from moe_zoo.analysis import count
from moe_zoo.analysis.force import force_expert
from moe_zoo.errors import InputError
from moe_zoo.layers import PatchMoE, PatchMoEConv2d
from moe_zoo.layers.patch_moe import GATE_ORDERS, PatchRouter, gate_map, to_patches
from moe_zoo.losses import auxiliary_losses, balance, linear_router_loss
from moe_zoo.routing import Routing, routing_context


def four_patches(gate_order: str, logits=((0., 1., 2., 3.), (3., 0., 0., 2.)), chosen: int = 2) -> Routing:
    """The record of one image of four 1 x 1 patches with E channels, whose channels are the logits of the E experts."""
    router = PatchRouter(2, 1, 2, chosen, gate_order)
    with torch.no_grad():
        router.weight.copy_(torch.eye(2))
    return router(torch.tensor(logits).t().unsqueeze(0))  # (1, n, D)


def columns(field: torch.Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in column] for column in field.t().tolist()]


# Gates

def test_softmax_after_the_choice():
    # expert 0 takes patches 3 and 2: logits 3 and 2, e / (e + 1) = .7311; expert 1 takes 0 and 3: 3 and 2 likewise
    routing = four_patches('after')
    assert columns(routing.weights) == [[0, 0, .2689, .7311], [.7311, 0, 0, .2689]]
    assert columns(routing.gates) == columns(routing.weights)
    assert columns(routing.kept.long()) == [[0, 0, 1, 1], [1, 0, 0, 1]]


def test_softmax_before_the_choice_is_not_renormalised():
    # expert 0: 1 + e + e^2 + e^3 = 31.1929; e^2 / 31.1929 = .2369, e^3 / 31.1929 = .6439, together .8808
    # expert 1: e^3 + 1 + 1 + e^2 = 29.4746; e^3 / 29.4746 = .6815, e^2 / 29.4746 = .2507
    routing = four_patches('before')
    assert columns(routing.weights) == [[0, 0, .2369, .6439], [.6815, 0, 0, .2507]]
    assert columns(routing.gates) == [[.0321, .0871, .2369, .6439], [.6815, .0339, .0339, .2507]]


def test_hard_gates_are_one():
    assert columns(four_patches('hard').weights) == [[0, 0, 1, 1], [1, 0, 0, 1]]


@pytest.mark.parametrize('gate_order, total', [('after', 1.), ('before', 16 / 64), ('hard', 16.)])
def test_sum_of_the_gates_of_an_expert_at_equal_logits(gate_order, total):
    # 16 of 64 patches: 1, l / n = .25, and l; ties go to the first patches
    router = PatchRouter(3, 1, 4, 16, gate_order, init_std=0.)
    routing = router(torch.randn(2, 64, 3))
    torch.testing.assert_close(routing.combine_matrix().view(2, 64, 4).sum(dim=1), torch.full((2, 4), total))
    assert routing.kept.view(2, 64, 4)[:, :16].all() and not routing.kept.view(2, 64, 4)[:, 16:].any()


def test_gates_sum_to_one_whatever_the_logits():
    router = PatchRouter(5, 1, 3, 6, 'after', init_std=3.)
    weights = router(torch.randn(4, 16, 5)).weights.view(4, 16, 3)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4, 3))
    assert ((weights > 0).sum(dim=1) == 6).all()


def test_experts_choose_so_a_patch_may_go_to_two_or_to_none():
    routing = four_patches('after')
    # patch 3 goes to both, patch 1 to none: 1 of 4 is dropped, and both experts have half of the choices
    assert routing.by_expert and routing.kept.sum(dim=1).tolist() == [1, 0, 1, 2]
    assert routing.dropped() == .25
    assert balance(routing)['share'].tolist() == [.5, .5]


def test_router_arithmetic_is_float32_under_autocast():
    layer = PatchMoE(1, 4, 2, 2, 1)
    with torch.autocast('cpu', torch.bfloat16), routing_context() as context:
        layer(torch.randn(2, 1, 4, 4))
    assert context.routings[0].logits.dtype == context.routings[0].weights.dtype == torch.float32


# The two ways to compute

def gradients(function, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of a loss whose derivative differs at every output; zeros where there is none."""
    out = function()
    slopes = torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()
    found = torch.autograd.grad((out * slopes).sum(), leaves, allow_unused=True)
    return [out.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found))]


def test_an_image_by_hand():
    # Patches of 1 x 2 pixels: (1, 2), (3, 4) / (5, 6), (7, 8). Two experts of one filter each, l = 1, gates 1 (softmax
    # of one). Router 0 likes the first pixel: patch 3; router 1 dislikes it: patch 0.
    layer = PatchMoE(1, 2, (1, 2), 2, 1)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1., 0.], [-1., 0.]]))
        layer.weight.copy_(torch.tensor([[[1., 10.]], [[-1., 1.]]]))
    y = layer(torch.arange(1., 9.).view(1, 1, 2, 4))
    # expert 0 at patch 3: 7 + 80; expert 1 at patch 0: -1 + 2
    assert y.tolist() == [[[[0., 0.], [0., 87.]], [[1., 0.], [0., 0.]]]]


@pytest.mark.parametrize('gate_order', GATE_ORDERS)
def test_chosen_patches_equal_the_masked_image(gate_order):
    layer = PatchMoE(2, 12, (4, 6), 3, 2, gate_order, .3, .3, dtype=torch.float64)
    x = torch.randn(5, 2, 12, 12, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    torch.testing.assert_close(
        gradients(lambda: layer(x), *leaves), gradients(lambda: layer.run_reference(x, layer.route(x)[1]), *leaves))


@pytest.mark.parametrize('layer, size', [
    (PatchMoE(1, 4, 2, 2, 1), (1, 4, 4)), (PatchMoEConv2d(4, 3, 2, 3), (4, 4, 4))])
def test_no_images(layer, size):
    y = layer.eval()(torch.randn(2, *size))
    assert layer(torch.randn(0, *size)).shape == (0, *y.shape[1:])


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('norm_first', [True, False])
@pytest.mark.parametrize('gate_order', GATE_ORDERS)
def test_chosen_cells_equal_the_masked_map_batch_norm_included(gate_order, norm_first, training):
    layer = PatchMoEConv2d(
        6, 5, 3, 4, gate_order=gate_order, norm_first=norm_first, router_init_std=.5, dtype=torch.float64)
    for expert in layer.experts:
        nn.init.uniform_(expert.norm.weight)
        nn.init.normal_(expert.norm.bias)
        nn.init.normal_(expert.norm.running_mean)
        nn.init.uniform_(expert.norm.running_var)
    layer.train(training)
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64, requires_grad=True)
    assert layer.computes_chosen()
    torch.testing.assert_close(
        gradients(lambda: layer(x), x, *layer.parameters()),
        gradients(lambda: twin.run_reference(x, twin.route(x)[1]), x, *twin.parameters()))
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())  # running statistics


def test_norm_after_the_gates_makes_unchosen_cells_a_constant_and_norm_first_zero_input():
    for norm_first in (False, True):
        layer = PatchMoEConv2d(4, 3, 1, 2, norm_first=norm_first).eval()
        expert = layer.experts[0]
        nn.init.constant_(expert.norm.bias, .5)
        with routing_context() as context:
            y = layer(torch.randn(1, 4, 3, 3)).flatten(2)[0]  # (O, n)
        empty = ~context.routings[0].kept[:, 0]
        # relu(beta - gamma mean / std) = relu(.5 - 0), or nothing at all
        through = expert.conv.weight.flatten(1).sum(dim=1) * (0. if norm_first else .5) + expert.conv.bias
        torch.testing.assert_close(y[:, empty], through.unsqueeze(1).expand(3, 7))


def test_patches_of_several_cells_and_kernels_see_over_the_border():
    # one expert, one of four 2 x 2 patches, a 3 x 3 kernel of ones without norm: 4 cells reach 9, a corner of the map
    layer = PatchMoEConv2d(1, 1, 1, 1, 2, 3, 'hard', norm_layer=lambda *args, **kwargs: nn.Identity())
    assert not layer.computes_chosen()
    with torch.no_grad():
        layer.router.weight.fill_(1.)
        layer.experts[0].conv.weight.fill_(1.)
        layer.experts[0].conv.bias.zero_()
    x = torch.zeros(1, 1, 4, 4)
    x[..., :2, :2] = 1.
    # (4, 4, 2, 0) in the first two rows, half of it in the third, nothing in the last
    assert layer(x)[0, 0].tolist() == [[4, 4, 2, 0], [4, 4, 2, 0], [2, 2, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize('layer, size', [
    (PatchMoE(1, 4, 2, 2, 1), (2, 1, 4, 4)), (PatchMoEConv2d(4, 3, 2, 3), (2, 4, 4, 4))])
def test_a_forced_expert_takes_every_patch(layer, size):
    x = torch.randn(size)
    with force_expert(layer, 1), torch.no_grad():
        y = layer.eval()(x)
        weights = torch.zeros(2, 4 if size[1] == 1 else 16, 2)
        weights[:, :, 1] = 1.
        torch.testing.assert_close(y, layer.run_reference(x, weights))


@pytest.mark.parametrize('layer, size', [
    (PatchMoE(1, 4, 2, 2, 1), (2, 1, 4, 4)), (PatchMoEConv2d(4, 3, 2, 3), (2, 4, 4, 4))])
def test_captured_graphs_choose_anew(layer, size):
    # the shapes of the chosen patches are static, so that a graph made from one input holds for others
    layer.router.init_std = 1.
    layer.router.reset_parameters()
    x, other = torch.randn(size), torch.randn(size)
    with torch.no_grad():
        expected = layer.eval()(other)
        torch.testing.assert_close(torch.export.export(layer, (x,)).module()(other), expected)
        torch.testing.assert_close(torch.jit.trace(layer, x, check_trace=False)(other), expected)
        torch.testing.assert_close(torch.jit.script(layer)(other), expected)
        torch.testing.assert_close(torch.compile(layer, backend='eager', fullgraph=True)(other), expected)


def test_patches_are_cut_in_the_order_of_the_map():
    x = torch.arange(16.).view(1, 1, 4, 4)
    assert to_patches(x, 2, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert gate_map(torch.tensor([[1., 2., 3., 4.]]), x, 2, 2)[0, 0].tolist() == [
        [1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


# Training

def test_routers_hear_the_task_through_the_softmax_only():
    layer = PatchMoE(1, 4, 2, 2, 2, init_std=1., router_init_std=1.)
    x = torch.randn(3, 1, 4, 4)

    def loss_of(order: str) -> torch.Tensor:
        layer.router.gate_order = order
        return layer(x).square().sum()

    gradient, = torch.autograd.grad(loss_of('after'), layer.router.weight)
    assert gradient.abs().min() > 0
    assert torch.autograd.grad(loss_of('hard'), layer.router.weight, allow_unused=True) == (None,)
    # A softmax over one chosen logit is constantly 1: no gradient either, whatever was chosen.
    layer.router.patches_per_expert = 1
    assert torch.autograd.grad(loss_of('after'), layer.router.weight)[0].abs().max() == 0


def test_linear_loss_by_hand():
    # two images of two patches; sums over patches: image 0 (1 + 3, 2 + 0) = (4, 2), image 1 (0 + 1, 5 + 5) = (1, 10)
    logits = torch.tensor([[1., 2.], [3., 0.], [0., 5.], [1., 5.]], requires_grad=True)
    routing = Routing(logits, logits, logits, shape=(2, 1, 2), losses=(('linear_router', 1.),))
    # class 0, y = -1: 2 - 4 = -2; class 1, y = +1: -(10 - 1) = -9; the mean of -2 and -9
    target = torch.tensor([0, 1])
    assert linear_router_loss(routing, target) == -5.5
    assert linear_router_loss(routing, target.float().unsqueeze(1)) == -5.5  # as BCE has it
    assert linear_router_loss(routing, torch.eye(2)) == -5.5
    # soft targets of .75 and .25: y = -.5 and .5
    assert linear_router_loss(routing, torch.tensor([[.75, .25], [.25, .75]])) == -2.75
    auxiliary_losses([routing], target)['linear_router'].backward()
    # y / B with the sign of the expert, for every patch of the image
    assert logits.grad.tolist() == [[-.5, .5], [-.5, .5], [.5, -.5], [.5, -.5]]


def test_modes_of_separate_training():
    layer = PatchMoE(1, 4, 2, 2, 2, 'hard')
    assert layer.router.losses == ()
    for mode, router, experts, losses in (
            ('router', True, False, (('linear_router', 1.),)), ('experts', False, True, ()), ('joint', True, True, ())):
        layer.set_mode(mode)
        assert (layer.router.weight.requires_grad, layer.weight.requires_grad) == (router, experts)
        assert layer.router.losses == losses


# Cost

@pytest.mark.parametrize('batch', [1, 3])
def test_what_runs_is_what_the_layer_states(batch):
    # routers: 16 patches x 784 x 8; experts: 8 x 6 patches x 784 x 5
    layer = PatchMoE(1, 40, 28, 8, 6)
    cost = count(layer, torch.randn(batch, 1, 112, 112))
    assert cost.macs_executed == cost.macs_max == batch * (16 * 784 * 8 + 48 * 784 * 5)
    assert cost.active_parameters == cost.parameters == 784 * 8 + 784 * 40
    # routers: 64 cells x 640 x 4; experts: 16 cells x 640 x 160 x 4, and one empty cell a batch
    layer = PatchMoEConv2d(640, 160)
    cost = count(layer, torch.randn(batch, 640, 8, 8))
    assert cost.macs_executed == cost.macs_max == batch * 64 * 640 * 4 + (batch * 16 + 1) * 640 * 160 * 4
    # a 3 x 3 kernel takes the whole map: 256 cells x 9 x 64 x 8 x 2
    layer = PatchMoEConv2d(64, 8, 2, 2, 4, 3)
    cost = count(layer, torch.randn(batch, 64, 16, 16))
    assert cost.macs_executed == cost.macs_max == batch * (256 * 64 * 2 + 256 * 9 * 64 * 8 * 2)


def test_expert_parameters_are_all_but_the_routers():
    for layer in (PatchMoE(1, 4, 2, 2, 1), PatchMoEConv2d(4, 3, 2, 3)):
        found = {id(p) for group in layer.expert_parameters() for p in group}
        assert found == {id(p) for p in layer.parameters()} - {id(layer.router.weight)}


def test_router_starts_tiny():
    weight = PatchMoE(1, 40, 28).router.weight
    assert weight.shape == (8, 784) and weight.std().item() == pytest.approx(1e-4, rel=.05)
    assert math.isclose(PatchMoE(1, 40, 28).weight.std().item(), .01, rel_tol=.05)


# Bad input

@pytest.mark.parametrize('kwargs, message', [
    (dict(gate_order='befor'), r"gate_order='befor' is not one of after, before, hard\. Did you mean 'before'\?"),
    (dict(patches_per_expert=0), 'patches_per_expert=0, patch_size=2: use 1 or more for both'),
    (dict(num_experts=0), 'num_experts=0: a routed layer needs at least one expert'),
    (dict(num_experts=3), 'num_filters=40 with num_experts=3: use a multiple of it'),
])
def test_arguments_that_cannot_work(kwargs, message):
    with pytest.raises(InputError, match=message):
        PatchMoE(1, **{**dict(patch_size=2), **kwargs})


def test_maps_that_cannot_work():
    with pytest.raises(InputError, match='patch_size=28 x 28 does not divide a map of 100 x 112: use a divisor'):
        PatchMoE(1)(torch.zeros(1, 1, 100, 112))
    sentence = 'patches_per_expert=6, but a map of 56 x 56 has 4 patches of 28 x 28: choose between 1 and 4'
    with pytest.raises(InputError, match=sentence):
        PatchMoE(1)(torch.zeros(1, 1, 56, 56))
    with pytest.raises(InputError, match='kernel_size=2: the experts keep the size of the map; use an odd number'):
        PatchMoEConv2d(4, 3, kernel_size=2)


def test_modes_that_cannot_work():
    with pytest.raises(InputError, match=r"mode='routers' is not one of joint, router, experts\. Did you mean "):
        PatchMoE(1).set_mode('routers')
    with pytest.raises(InputError, match="mode='router' with num_experts=8, gate_order='after': separate training"):
        PatchMoE(1).set_mode('router')
    three = torch.zeros(4, 3)
    with pytest.raises(InputError, match="'linear_router' is of 2 experts, one a class, not of 3"):
        linear_router_loss(Routing(three, three, three, shape=(2, 2)), torch.tensor([0, 1]))
    with pytest.raises(InputError, match="'linear_router' is of 2 classes: use targets 0 and 1"):
        linear_router_loss(Routing(three[:, :2], three, three, shape=(2, 2)), torch.tensor([0, 2]))
