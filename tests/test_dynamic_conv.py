"""Dynamic convolutions: the attention by hand, its temperature by the epoch, the fast paths against the loop.

Letters: B images, C input channels, O output channels, E experts.
"""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moe_zoo.errors import InputError
from moe_zoo.layers import DynamicConv2d
from moe_zoo.layers.dynamic_conv import AnnealedSoftmaxRouter
from moe_zoo.routing import routing_context, set_epoch, trace_routing

# One row a way through CondConv2d.convolve: pointwise, depthwise, full, grouped.
GEOMETRIES = {
    'pointwise_stride_bias': dict(kernel_size=1, stride=2, bias=True),
    'depthwise': dict(kernel_size=3, padding=1, groups=8, out_channels=8),
    'full_same_stride': dict(kernel_size=3, stride=2, padding='same'),
    'grouped_bias': dict(kernel_size=3, groups=2, bias=True),
}


def build(geometry: str = 'full_same_stride', **kwargs) -> DynamicConv2d:
    return DynamicConv2d(**dict(dict(in_channels=8, out_channels=6, num_experts=3), **GEOMETRIES[geometry], **kwargs))


def by_hand(temperature: float = 30., anneal_epochs: int = 10) -> DynamicConv2d:
    """C = 2, one hidden unit, two kernels 1 x 1 with weights 1 and 5: z = (2 h, -h) with h = relu(x_1 - x_2 + 1)."""
    layer = DynamicConv2d(2, 1, 1, num_experts=2, temperature=temperature, anneal_epochs=anneal_epochs)
    router = layer.routing_fn
    with torch.no_grad():
        router.hidden.weight.copy_(torch.tensor([[1., -1.]]))
        router.hidden.bias.fill_(1.)
        router.weight.copy_(torch.tensor([[2.], [-1.]]))
        router.bias.zero_()
        layer.weight.copy_(torch.tensor([[1., 1.], [5., 5.]]))
    return layer


def test_a_layer_by_hand():
    layer = by_hand()
    x = torch.tensor([3., 2.]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    # pooled (3, 2), h = 3 - 2 + 1 = 2, z = (4, -2), difference 6
    for epoch, temperature in ((0, 30.), (5, 15.5), (10, 1.)):
        set_epoch(layer, epoch)
        first = 1 / (1 + math.exp(-6 / temperature))
        with trace_routing(layer) as trace:
            out = layer(x)
        routing, = trace['']
        assert routing.logits.tolist() == [[4., -2.]]
        torch.testing.assert_close(routing.weights, torch.tensor([[first, 1 - first]]))
        # every position: (3 + 2) times the mixed weight
        torch.testing.assert_close(out, torch.full((1, 1, 4, 4), 5 * (first * 1 + (1 - first) * 5)))
    # An input below the hidden unit's threshold cannot choose: 1 - 4 + 1 < 0, z = 0.
    negative = layer(torch.tensor([1., 4.]).view(1, 2, 1, 1))
    torch.testing.assert_close(negative, torch.full((1, 1, 1, 1), 5 * 3.))  # (1 + 4) * (1 + 5) / 2


@pytest.mark.parametrize('temperature, anneal_epochs, expected', [
    # 30 - 2.9 epoch
    (30., 10, {0: 30., 1: 27.1, 2: 24.2, 5: 15.5, 9: 3.9, 10: 1., 11: 1., 299: 1.}),
    # 9 - 2 epoch
    (9., 4, {0: 9., 1: 7., 3: 3., 4: 1., 5: 1.}),
    (1., 10, {0: 1., 5: 1., 10: 1.}),
])
def test_temperature_by_epoch(temperature, anneal_epochs, expected):
    layer = DynamicConv2d(4, 4, 1, temperature=temperature, anneal_epochs=anneal_epochs)
    for epoch, value in expected.items():
        set_epoch(layer, epoch)
        for mode in (True, False):  # one temperature in training and evaluation
            layer.train(mode)
            assert layer.routing_fn.current_temperature().item() == pytest.approx(value, rel=1e-6)
    assert layer.routing_fn.current_temperature().item() == 1.  # exactly


def test_a_constant_temperature_has_no_epoch():
    layer = build(temperature=30., anneal_epochs=0)
    before = layer(torch.ones(1, 8, 5, 5))
    set_epoch(layer, 10)
    assert torch.equal(layer(torch.ones(1, 8, 5, 5)), before)
    assert not any('epoch' in name for name in layer.state_dict())


@pytest.mark.parametrize('temperature, gates', [
    (1e6, [0.25, 0.25, 0.25, 0.25]),  # hot: the plain average
    (1e-3, [0., 0., 1., 0.]),  # cold: the best alone
])
def test_limits_of_the_temperature(temperature, gates):
    layer = DynamicConv2d(4, 2, 3, temperature=temperature, anneal_epochs=0).double()
    with torch.no_grad():
        layer.routing_fn.bias.copy_(torch.tensor([-1., 0., 2., 1.]))
        layer.routing_fn.weight.zero_()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    kernel = (torch.tensor(gates, dtype=torch.float64) @ layer.weight).view(layer.weight_shape)
    torch.testing.assert_close(layer(x), F.conv2d(x, kernel, padding=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('temperature', [30., 1., 0.05])
def test_attention_lies_on_the_simplex(temperature):
    layer = DynamicConv2d(8, 4, 1, num_experts=5, temperature=temperature, anneal_epochs=0)
    with trace_routing(layer) as trace:
        layer(10 * torch.randn(50, 8, 3, 3))
    weights = trace[''][0].weights
    assert weights.min() >= 0 and weights.shape == (50, 5)
    torch.testing.assert_close(weights.sum(1), torch.ones(50))
    assert weights.std(0).max() > 0  # it depends on the image


@pytest.mark.parametrize('channels, reduction, hidden', [(64, 4, 16), (10, 4, 2), (3, 4, 1), (2, 16, 1), (8, 1, 8)])
def test_size_of_an_attention(channels, reduction, hidden):
    K = 4
    layer = DynamicConv2d(channels, 6, 3, num_experts=K, reduction=reduction, bias=True)
    attention = sum(p.numel() for p in layer.routing_fn.parameters())
    assert attention == channels * hidden + hidden + hidden * K + K
    assert sum(p.numel() for p in layer.parameters()) == attention + K * (6 * channels * 9 + 6)
    # an image of 8 x 8: attention C h + h K, mixing K (kernel and bias), convolution
    assert layer.max_macs((2, channels, 8, 8)) == 2 * (
        channels * hidden + hidden * K + K * (54 * channels + 6) + 64 * 54 * channels)


@pytest.mark.parametrize('geometry', GEOMETRIES)
def test_no_images(geometry):
    layer = build(geometry)
    x = torch.randn(2, 8, 9, 9)
    assert layer(x[:0]).shape == (0, *layer(x).shape[1:])


@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize('batch, size', [(1, 9), (3, 9), (11, 17), (9, 5)])
def test_a_batch_equals_its_images_one_by_one(geometry, batch, size):
    """Values and every gradient, the attention's included; no image sees another."""
    layer = build(geometry, temperature=2., reduction=1, dtype=torch.float64)  # 8 hidden units: some are alive
    x = torch.randn(batch, 8, size, size, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]

    def loop() -> torch.Tensor:
        outputs = []
        for image in x.split(1):
            hidden = layer.routing_fn.hidden(image.mean((2, 3)).float().double()).relu()
            z = F.linear(hidden, layer.routing_fn.weight, layer.routing_fn.bias)
            outputs.append(layer.forward_reference(image, torch.softmax(z / 2., dim=1)))
        return torch.cat(outputs)

    expected, found = loop(), layer(x)
    slopes = torch.arange(found.numel(), dtype=found.dtype).view_as(found).cos()
    # gates are float32 in a layer of doubles
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    theirs = torch.autograd.grad((expected * slopes).sum(), leaves)
    ours = torch.autograd.grad((found * slopes).sum(), leaves)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert ours[2].abs().max() > 1e-4 and all(g.abs().max() > 0 for g in ours)


@pytest.mark.parametrize('how', ['autocast', 'bfloat16'])
def test_attention_is_float32(how):
    layer = build('full_same_stride', temperature=4.)
    x = torch.randn(2, 8, 6, 6)
    if how == 'bfloat16':
        layer, x = layer.bfloat16(), x.bfloat16()
    with trace_routing(layer) as trace, torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
        out = layer(x)
    routing, router = trace[''][0], layer.routing_fn
    assert out.dtype == torch.bfloat16 and router.epoch.dtype == torch.int64
    assert routing.logits.dtype == routing.weights.dtype == torch.float32
    # Exact in float32; bfloat16 products would be off by a thousandth.
    hidden = (x.mean((2, 3)).float() @ router.hidden.weight.float().t() + router.hidden.bias.float()).relu()
    logits = hidden @ router.weight.float().t() + router.bias.float()
    torch.testing.assert_close(routing.logits, logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(routing.weights, (logits / 4).softmax(1), rtol=1e-5, atol=1e-6)


def test_padding_does_not_move_the_attention():
    layer = build(temperature=1.)
    x = torch.randn(1, 8, 4, 4)
    padded = F.pad(x, (0, 4, 0, 4))
    with routing_context(image_sizes=torch.tensor([[32, 32]]), padded_size=(64, 64)):
        inside = layer.route(padded)
    torch.testing.assert_close(inside, layer.route(x))
    assert not torch.allclose(layer.route(padded), inside, atol=1e-4)


def test_the_epoch_travels_with_the_weights():
    layer, other = build(), build()
    set_epoch(layer, 7)
    other.load_state_dict(layer.state_dict())
    assert other.routing_fn.epoch.item() == 7 and other.routing_fn.current_temperature().item() == pytest.approx(9.7)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(other(x), layer(x))
    other.routing_fn.reset_parameters()  # a fresh start
    assert other.routing_fn.epoch.item() == 0
    meta = build(device='meta')
    assert meta.routing_fn.epoch.is_meta and meta(torch.empty(2, 8, 5, 5, device='meta')).shape == (2, 6, 3, 3)


def test_drop_in_for_a_convolution():
    conv = nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), groups=2, bias=True)
    layer = DynamicConv2d.from_conv(conv, num_experts=3, reduction=2, temperature=5., anneal_epochs=2)
    with torch.no_grad():  # three times the same kernel: whatever the attention, the convolution itself
        layer.weight.copy_(conv.weight.view(1, -1).expand(3, -1))
        layer.bias.copy_(conv.bias.view(1, -1).expand(3, -1))
    x = torch.randn(2, 4, 9, 8)
    torch.testing.assert_close(layer(x), conv(x))
    router = layer.routing_fn
    assert (router.hidden.out_features, router.temperature, router.anneal_epochs) == (2, 5., 2)


def test_one_compiled_graph_serves_every_epoch():
    layer = build(temperature=5.).eval()
    x = torch.randn(3, 8, 6, 6)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    for epoch in (0, 1, 2, 10):
        set_epoch(layer, epoch)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1
    scripted = torch.jit.script(layer)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close((scripted(x), exported(x)), (layer(x), layer(x)))


@pytest.mark.parametrize('kwargs, message', [
    (dict(temperature=0.), 'temperature=0.0: a softmax needs a temperature above 0'),
    (dict(temperature=-3., anneal_epochs=0), 'temperature=-3.0: a softmax needs a temperature above 0'),
    (dict(temperature=0.5), 'temperature=0.5: annealing ends at 1, so start at 1 or above'),
    (dict(anneal_epochs=-1), 'anneal_epochs=-1: use a whole number of epochs, at least 1'),
    (dict(anneal_epochs=2.5), 'anneal_epochs=2.5: use a whole number of epochs'),
    (dict(reduction=0), 'reduction=0: use a whole number of at least 1'),
    (dict(reduction=0.25), 'reduction=0.25: use a whole number of at least 1'),
    (dict(num_experts=0), 'num_experts=0: a routed layer needs at least one expert'),
])
def test_bad_values_are_refused_in_a_sentence(kwargs, message):
    with pytest.raises(InputError, match=message):
        DynamicConv2d(4, 4, 3, **kwargs)


def test_annealing_over_no_epochs_is_not_annealing():
    with pytest.raises(InputError, match='anneal_epochs=0: use a whole number of epochs, at least 1'):
        AnnealedSoftmaxRouter(4, 2, anneal_epochs=0)
