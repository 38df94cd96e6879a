"""CondConv layers: the fast computation against the plain ones, routers, expert dropout, cost.

Letters: B images, C input channels, O output channels, E experts.
"""
import pytest
import torch
from timm.layers import CondConv2d as TimmCondConv2d
from torch import nn
from torch.nn import functional as F

from moe_zoo.errors import InputError
from moe_zoo.layers import cond_conv
from moe_zoo.layers.cond_conv import (
    ROUTE_FNS,
    CondConv2d,
    CondLinear,
    RoutedConv2d,
    create_routing_fn,
)
from moe_zoo.routing import SigmoidRouter, SoftmaxRouter, routing_context, trace_routing

# One row a way through `convolve`: pointwise, depthwise, full, grouped; with what can bend each of them.
GEOMETRIES = {
    'pointwise': dict(kernel_size=1),
    'pointwise_stride_bias': dict(kernel_size=1, stride=2, bias=True),
    'pointwise_same_stride': dict(kernel_size=1, stride=2, padding='same'),
    'pointwise_padded': dict(kernel_size=1, padding=1),
    'pointwise_grouped': dict(kernel_size=1, groups=2),
    'depthwise': dict(kernel_size=3, groups=4, out_channels=4),
    'depthwise_multiplier_same': dict(kernel_size=5, stride=2, groups=4, out_channels=8, padding='same', bias=True),
    'full': dict(kernel_size=3),
    'full_stride_dilation_bias': dict(kernel_size=3, stride=2, dilation=2, bias=True),
    'full_same_stride': dict(kernel_size=3, stride=2, padding='same'),
    'oblong_valid': dict(kernel_size=(3, 5), stride=(1, 2), padding='valid'),
    'grouped': dict(kernel_size=3, groups=2, bias=True),
}


def build(geometry: str, num_experts: int = 3, dtype=torch.float64) -> CondConv2d:
    kwargs = dict(dict(in_channels=4, out_channels=6), **GEOMETRIES[geometry])
    return CondConv2d(num_experts=num_experts, dtype=dtype, **kwargs)


def gradients(function, *leaves: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of a loss whose derivative differs at every output."""
    out = function()
    slopes = torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()
    return list(torch.autograd.grad((out * slopes).sum(), leaves))


def test_a_kernel_is_the_weighted_sum_of_the_experts():
    layer = CondConv2d(1, 1, 1, num_experts=2, bias=True)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.], [10.]]))
        layer.bias.copy_(torch.tensor([[1.], [-1.]]))
    x = torch.tensor([3., 5.]).view(2, 1, 1, 1)
    a = torch.tensor([[1., .5], [0., .25]])
    # image 0: kernel 1 * 2 + .5 * 10 = 7, bias 1 * 1 - .5 = .5: 3 * 7 + .5; image 1: kernel 2.5, bias -.25: 12.25
    assert layer(x, a).flatten().tolist() == [21.5, 12.25]


@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize('batch', [1, 3, 11])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_fast_path_equals_both_plain_ones(geometry, batch, memory_format):
    layer = build(geometry)
    x = torch.randn(batch, 4, 17, 19, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    a = torch.rand(batch, 3, dtype=torch.float64, requires_grad=True)
    expected = layer.forward_reference(x, a)
    leaves = [x, a, *layer.parameters()]
    torch.testing.assert_close(layer(x, a), expected)
    torch.testing.assert_close(layer.forward_experts(x, a), expected)
    torch.testing.assert_close(gradients(lambda: layer(x, a), *leaves),
                               gradients(lambda: layer.forward_reference(x, a), *leaves))
    torch.testing.assert_close(gradients(lambda: layer.forward_experts(x, a), *leaves),
                               gradients(lambda: layer.forward_reference(x, a), *leaves))
    assert layer.output_shape(x.shape) == tuple(expected.shape)


@pytest.mark.parametrize('geometry', ['full', 'full_stride_dilation_bias', 'full_same_stride', 'oblong_valid'])
def test_batches_of_small_maps_run_every_expert(geometry, monkeypatch):
    layer = build(geometry)
    x = torch.randn(8, 4, 5, 7, dtype=torch.float64, requires_grad=True)  # at most 35 positions times 3 experts
    a = torch.rand(8, 3, dtype=torch.float64, requires_grad=True)
    leaves, forward_experts, calls = [x, a, *layer.parameters()], layer.forward_experts, []
    expected = gradients(lambda: layer.forward_reference(x, a), *leaves)
    monkeypatch.setattr(layer, 'forward_experts', lambda *args: calls.append(1) or forward_experts(*args))
    torch.testing.assert_close(gradients(lambda: layer(x, a), *leaves), expected)
    assert len(calls) == 1
    # fewer images, larger maps: a kernel for every image
    calls.clear()
    layer(x[:7], a[:7])
    layer(torch.randn(8, 4, 25, 25, dtype=torch.float64), a)
    assert not calls


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_one_expert_of_weight_one_is_the_plain_convolution(geometry):
    layer = build(geometry, num_experts=1)
    x = torch.randn(2, 4, 7, 9, dtype=torch.float64)
    plain = layer._convolve_plain(x, layer.weight[0], None if layer.bias is None else layer.bias[0])
    torch.testing.assert_close(layer(x, torch.ones(2, 1)), plain)


@pytest.mark.parametrize('geometry', ['pointwise_stride_bias', 'depthwise', 'full', 'depthwise_multiplier_same'])
def test_weights_move_between_timm_and_here(geometry):
    layer = build(geometry, dtype=torch.float32)
    timm_layer = TimmCondConv2d(num_experts=3, **dict(dict(in_channels=4, out_channels=6), **GEOMETRIES[geometry]))
    layer.load_state_dict(timm_layer.state_dict())
    x, a = torch.randn(3, 4, 8, 8), torch.rand(3, 3)
    torch.testing.assert_close(layer(x, a), timm_layer(x, a))


def test_from_conv_keeps_the_geometry():
    conv = nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 1), groups=2, bias=True)
    layer = CondConv2d.from_conv(conv, num_experts=1)
    with torch.no_grad():
        layer.weight.copy_(conv.weight.view(1, -1))
        layer.bias.copy_(conv.bias.view(1, -1))
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(layer(x, torch.ones(2, 1)), conv(x))


def test_every_expert_is_initialised_for_itself():
    layer = CondConv2d(16, 32, 3, num_experts=4)
    # kaiming_uniform with a = sqrt(5): 1 / sqrt(fan in) of one kernel, not of the (E, n) stack
    bound = (16 * 9) ** -0.5
    for expert in layer.weight.detach().unbind(0):
        assert 0.95 * bound < expert.abs().max() <= bound
    assert not torch.equal(layer.weight[0], layer.weight[1])


def test_large_batches_go_in_calls_of_eight_images(monkeypatch):
    monkeypatch.setattr(cond_conv, 'can_order', lambda *args: False)  # which go image by image
    groups, conv2d = [], F.conv2d
    monkeypatch.setattr(F, 'conv2d', lambda *args: groups.append(args[6]) or conv2d(*args))
    x, a = torch.randn(19, 4, 9, 9), torch.rand(19, 3)
    build('full', dtype=torch.float32)(x, a)
    assert groups == [8, 8, 3]
    groups.clear()
    build('depthwise', dtype=torch.float32)(x, a)
    assert groups == [4 * 19]
    groups.clear()
    build('full', dtype=torch.float32).to('meta')(x.to('meta'), a.to('meta'))
    assert groups == [19]  # shape-static: no loop over the batch


@pytest.mark.parametrize('geometry', ['full_stride_dilation_bias', 'full_same_stride', 'grouped'])
@pytest.mark.parametrize('batch', [3, 19])
def test_output_channels_go_in_several_calls_where_kernels_are_large(geometry, batch, monkeypatch):
    kwargs = GEOMETRIES[geometry] | dict(in_channels=4, out_channels=40, num_experts=3, dtype=torch.float64)
    layer, made, conv2d = CondConv2d(**kwargs), [], F.conv2d
    layer.weights_per_call = 1000  # 3 images times 40 x 4 x 9 elements are 4,320
    layer.weights_kept = 0
    x = torch.randn(batch, 4, 17, 19, dtype=torch.float64, requires_grad=True)
    a = torch.rand(batch, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, a, *layer.parameters()]
    expected = layer.forward_reference(x, a)
    slopes = gradients(lambda: layer.forward_reference(x, a), *leaves)
    monkeypatch.setattr(F, 'conv2d', lambda *args: made.append((args[6], args[1].shape[0])) or conv2d(*args))
    torch.testing.assert_close(layer(x, a), expected)
    torch.testing.assert_close(gradients(lambda: layer(x, a), *leaves), slopes)
    images = {3: (3,), 19: (8, 8, 3)}[batch]
    channels = (40,) if geometry == 'grouped' else (16, 16, 8)  # 16 are the fewest
    groups = 2 if geometry == 'grouped' else 1
    assert made[:len(made) // 2] == [(n * groups, n * c) for c in channels for n in images]


def test_kernels_of_several_calls_are_not_kept_for_backward_and_can_be_differentiated_twice():
    layer = CondConv2d(2, 2, 3, num_experts=2, dtype=torch.float64)
    layer.images_per_call, layer.weights_kept = 2, 107
    x = torch.randn(3, 2, 9, 9, dtype=torch.float64, requires_grad=True)  # 81 positions: too many for all experts
    a = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        out = layer(x, a)
    assert kept == [tuple(x.shape), tuple(a.shape), tuple(layer.weight.shape)]
    ours, plain = (
        torch.autograd.grad(out.square().sum(), (x, a, layer.weight), create_graph=True)
        for out in (out, layer.forward_reference(x, a)))
    torch.testing.assert_close(ours, plain)
    twice = [torch.autograd.grad(sum(g.sum() for g in first), (x, a, layer.weight)) for first in (ours, plain)]
    torch.testing.assert_close(*twice)


def test_few_kernels_are_kept_for_backward_and_output_channels_stay_together(monkeypatch):
    layer, made, conv2d = CondConv2d(2, 32, 3, num_experts=2, dtype=torch.float64), [], F.conv2d
    monkeypatch.setattr(F, 'conv2d', lambda *args: made.append((args[6], args[1].shape[0])) or conv2d(*args))
    layer.images_per_call, layer.weights_per_call = 2, 700  # a kernel has 32 * 2 * 9 = 576 elements
    x = torch.randn(3, 2, 9, 9, dtype=torch.float64, requires_grad=True)
    a = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    for weights_kept, calls in ((3 * 576, [(2, 64), (1, 32)]), (3 * 576 - 1, [(2, 32), (1, 16)] * 2)):
        layer.weights_kept = weights_kept
        made.clear()
        slopes = gradients(lambda: layer(x, a), x, a, layer.weight)
        assert made == calls
        torch.testing.assert_close(slopes, gradients(lambda: layer.forward_reference(x, a), x, a, layer.weight))
    made.clear()
    layer.weights_kept = 3 * 576
    with torch.no_grad():
        layer(x, a)
    assert made == [(2, 32), (1, 16)] * 2


@pytest.mark.parametrize('geometry', ['pointwise', 'pointwise_stride_bias', 'pointwise_same_stride'])
@pytest.mark.parametrize('batch', [1, 11])
def test_pointwise_as_a_convolution_or_a_product(geometry, batch, monkeypatch):
    layer = build(geometry)
    x = torch.randn(batch, 4, 5, 7, dtype=torch.float64, requires_grad=True)
    a = torch.rand(batch, 3, dtype=torch.float64, requires_grad=True)
    leaves, groups, conv2d = [x, a, *layer.parameters()], [], F.conv2d
    expected, slopes = layer.forward_reference(x, a), gradients(lambda: layer.forward_reference(x, a), *leaves)
    monkeypatch.setattr(F, 'conv2d', lambda *args: groups.append(args[6]) or conv2d(*args))
    in_calls = {1: [1], 11: [8, 3]}[batch]
    for faster, threads, calls in ((True, 1, in_calls), (True, 2, in_calls), (False, 2, [])):
        monkeypatch.setattr(cond_conv, 'convolutions_beat_matmul', lambda faster=faster: faster)
        monkeypatch.setattr(torch, 'get_num_threads', lambda threads=threads: threads)
        torch.testing.assert_close(layer(x, a), expected)
        assert groups == calls
        torch.testing.assert_close(gradients(lambda: layer(x, a), *leaves), slopes)
        groups.clear()


def test_pointwise_keeps_channels_last(monkeypatch):
    monkeypatch.setattr(cond_conv, 'convolutions_beat_matmul', lambda: False)  # which go in contiguous memory
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    out = build('pointwise', dtype=torch.float32)(x, torch.rand(2, 3))
    assert out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous()


@pytest.mark.parametrize('geometry', ['pointwise', 'depthwise', 'full_same_stride'])
def test_autocast_reaches_every_way(geometry):
    layer = build(geometry, dtype=torch.float32)
    for batch, size in ((1, 6), (9, 6), (9, 20)):  # one image, many small maps, many larger ones
        x, a = torch.randn(batch, 4, size, size), torch.rand(batch, 3)
        with torch.autocast('cpu', torch.bfloat16):
            out = layer(x, a)
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), layer(x, a), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize('geometry', ['pointwise', 'depthwise', 'full_same_stride'])
def test_images_do_not_meet(geometry):
    layer = build(geometry)
    x, a = torch.randn(10, 4, 7, 7, dtype=torch.float64), torch.rand(10, 3)
    alone = layer(x[4:5], a[4:5])
    torch.testing.assert_close(layer(x, a)[4:5], alone)


@pytest.mark.parametrize('geometry', ['pointwise', 'depthwise', 'full', 'full_same_stride'])
def test_compile_export_and_script(geometry):
    layer = build(geometry, dtype=torch.float32).eval()
    x, a = torch.randn(9, 4, 8, 8), torch.rand(9, 3)
    expected = layer(x, a)
    torch.testing.assert_close(torch.compile(layer, backend='eager', fullgraph=True)(x, a), expected)
    torch.testing.assert_close(torch.jit.script(layer)(x, a), expected)
    batch = {0: torch.export.Dim('batch', min=2, max=64)}
    exported = torch.export.export(layer, (x[:3], a[:3]), dynamic_shapes=(batch, batch)).module()
    torch.testing.assert_close(exported(x, a), expected)


def test_macs_of_a_convolution():
    layer = CondConv2d(4, 6, 3, stride=2, bias=True, num_experts=3)
    # kernel 6 * 4 * 9 = 216; output 4 x 4. An image: mix kernels 3 * 216 and biases 3 * 6, convolve 16 * 216.
    assert layer.macs((2, 4, 8, 8)) == 2 * (648 + 18 + 3456)


@pytest.mark.parametrize('layer, message', [
    (lambda: CondConv2d(4, 4, 1, num_experts=0), 'num_experts=0: a routed layer needs at least one expert'),
    (lambda: create_routing_fn('sigmoids', 4, 2), "route_fn='sigmoids' is not one of .* Did you mean 'sigmoid'"),
    (lambda: CondLinear(4, 4, num_experts=0), 'num_experts=0'),
    (lambda: CondLinear(4, 4, expert_drop_rate=1.), 'expert_drop_rate=1.0: choose a probability'),
])
def test_bad_values_are_refused_in_a_sentence(layer, message):
    with pytest.raises(InputError, match=message):
        layer()


# Routers

def test_kinds_of_router():
    kinds = {name: create_routing_fn(name, 16, 4) for name in ROUTE_FNS}
    for name, kind in [('sigmoid', SigmoidRouter), ('softmax', SoftmaxRouter), ('single', SigmoidRouter),
                       ('partially_shared', SigmoidRouter), ('hierarchical', SigmoidRouter)]:
        assert type(kinds[name]) is kind and kinds[name].in_features == 16
    units = {name: kinds[f'hidden_{name}'].hidden.out_features for name in ('small', 'medium', 'large')}
    assert units == {'small': 2, 'medium': 16, 'large': 128}  # C / 8, C, 8 C
    # Later in a chain of blocks:
    assert [create_routing_fn('single', 16, 4, position=p) is None for p in range(4)] == [False, True, True, True]
    shared = [create_routing_fn('partially_shared', 16, 4, position=p) is None for p in range(4)]
    assert shared == [False, True, False, True]
    assert create_routing_fn('hierarchical', 16, 4, position=1).in_features == 16 + 4


def test_hidden_router_is_a_small_network():
    router = SigmoidRouter(2, num_experts=1, hidden_features=2)
    with torch.no_grad():
        router.hidden.weight.copy_(torch.tensor([[1., 0.], [0., 1.]]))
        router.hidden.bias.copy_(torch.tensor([0., 1.]))
        router.weight.copy_(torch.tensor([[2., 3.]]))
        router.bias.copy_(torch.tensor([-1.]))
    routing = router(torch.tensor([[-5., 1.]]))
    # relu(-5), relu(1 + 1) = 0, 2; 2 * 0 + 3 * 2 - 1 = 5
    assert routing.logits.tolist() == [[5.]]
    torch.testing.assert_close(routing.weights, torch.tensor([[5.]]).sigmoid())
    assert router.macs(3) == 3 * (2 * 2 + 2 * 1)


def test_a_routed_convolution_pools_decides_and_records():
    layer = RoutedConv2d(4, 6, 1, num_experts=3)
    x = torch.randn(5, 4, 6, 6)
    with trace_routing(layer) as trace:
        out = layer(x)
    routing, = trace['']
    expected = torch.sigmoid(x.mean((2, 3)) @ layer.routing_fn.weight.t() + layer.routing_fn.bias)
    torch.testing.assert_close(routing.weights, expected)
    assert routing.indices is None and routing.shape == (5,) and routing.losses == ()
    torch.testing.assert_close(out, layer.forward_reference(x, expected))
    # router 4 * 3, kernels 3 * 24, convolution 36 * 24, for each of 5 images
    assert layer.max_macs(x.shape) == 5 * (12 + 72 + 864)


def test_padding_does_not_move_a_gate():
    layer = RoutedConv2d(4, 6, 1, num_experts=3)
    x = torch.randn(1, 4, 4, 4)
    padded = F.pad(x, (0, 4, 0, 4))
    with routing_context(image_sizes=torch.tensor([[32, 32]]), padded_size=(64, 64)):
        inside = layer.route(padded)
    torch.testing.assert_close(inside, layer.route(x))
    assert not torch.allclose(layer.route(padded), inside)


@pytest.mark.parametrize('how', ['autocast', 'bfloat16'])
def test_router_arithmetic_is_float32(how):
    layer = RoutedConv2d(4, 6, 1, num_experts=3)
    x = torch.randn(2, 4, 6, 6)
    if how == 'bfloat16':
        layer, x = layer.bfloat16(), x.bfloat16()
    with trace_routing(layer) as trace, torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert trace[''][0].logits.dtype == trace[''][0].weights.dtype == torch.float32
    # Exact in float32: bfloat16 products would be off by a thousandth.
    pooled, weight, bias = x.mean((2, 3)).float(), layer.routing_fn.weight.float(), layer.routing_fn.bias.float()
    torch.testing.assert_close(trace[''][0].logits, pooled @ weight.t() + bias, rtol=1e-6, atol=1e-6)


def test_expert_dropout_drops_whole_experts_of_an_image():
    layer = RoutedConv2d(4, 6, 1, num_experts=50, expert_drop_rate=0.25)
    x = torch.randn(40, 4, 3, 3)
    with trace_routing(layer) as trace:
        layer(x)
        layer.eval()
        layer(x)
    trained, evaluated = trace['']
    assert torch.equal(evaluated.weights, evaluated.gates)
    dropped = trained.weights == 0
    assert 0.2 < dropped.float().mean() < 0.3  # 2000 draws of 0.25: standard deviation 0.01
    torch.testing.assert_close(trained.weights[~dropped], trained.gates[~dropped] / 0.75)
    torch.testing.assert_close(trained.gates, evaluated.gates)


# The classifier

def test_a_linear_layer_mixes_matrix_and_bias():
    layer = CondLinear(2, 1, num_experts=2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1., 2.], [10., 20.]]))
        layer.bias.copy_(torch.tensor([[4.], [8.]]))
        layer.routing_fn.weight.zero_()  # every gate is sigmoid(0) = 1/2
    # matrix (11, 22) / 2, bias 12 / 2: 1 * 5.5 + 3 * 11 + 6
    assert layer(torch.tensor([[1., 3.]])).tolist() == [[44.5]]
    assert layer(torch.tensor([[1., 3.], [0., 0.]])).tolist() == [[44.5], [6.]]
    # a row: router 2 * 2, matrices 2 * 2, biases 2 * 1, product 2
    assert layer.max_macs((5, 2)) == 5 * (4 + 4 + 2 + 2)


@pytest.mark.parametrize('bias', [True, False])
def test_one_image_and_many_are_computed_alike(bias):
    layer = CondLinear(6, 5, bias=bias, num_experts=3, dtype=torch.float64)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    torch.testing.assert_close(layer(x), torch.cat([layer(row) for row in x.split(1)]), rtol=1e-6, atol=1e-6)
    together = gradients(lambda: layer(x), *leaves)
    one_by_one = gradients(lambda: torch.cat([layer(row) for row in x.split(1)]), *leaves)
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-6)  # gates are float32
    assert all(g.abs().sum() > 0 for g in together)


def test_a_linear_layer_starts_like_a_plain_one():
    layer, bound = CondLinear(64, 10, num_experts=4), 64 ** -0.5
    for parameter in (layer.weight, layer.bias):
        assert 0.9 * bound < parameter.abs().max() <= bound
    assert layer.weight.shape == (4, 640) and layer.bias.shape == (4, 10)
