"""Kernels mixed in oneDNN's order: values against the plain computation, and who goes that way.

Letters: B images, E experts.
"""
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moe_zoo.layers import cond_conv, ordered_kernels
from moe_zoo.layers.cond_conv import CondConv2d

needs_orders = pytest.mark.skipif(not ordered_kernels._HAS_ORDERS, reason='a CPU without AVX-512, or an older torch')

GEOMETRIES = {
    'plain': dict(kernel_size=3),
    'stride_dilation_bias': dict(kernel_size=3, stride=2, dilation=2, bias=True),
    'same_stride': dict(kernel_size=3, stride=2, padding='same'),
    'oblong_valid': dict(kernel_size=(3, 5), stride=(1, 2), padding='valid'),
    'pointwise_padded': dict(kernel_size=1, padding=1),
}


@pytest.fixture
def ordered(monkeypatch) -> list[tuple]:
    """Shapes of the batches that came to `convolve_ordered`."""
    came, convolve = [], ordered_kernels.convolve_ordered
    monkeypatch.setattr(
        cond_conv, 'convolve_ordered', lambda x, *args: came.append(tuple(x.shape)) or convolve(x, *args))
    return came


@needs_orders
@pytest.mark.parametrize('geometry', GEOMETRIES)
@pytest.mark.parametrize('channels', [(5, 6), (32, 150)])  # less than oneDNN's blocks, and calls of 64, 64, 22 channels
def test_values_are_those_of_the_plain_convolution(geometry, channels, ordered, monkeypatch):
    monkeypatch.setattr(ordered_kernels, 'ELEMENTS', 1)
    layer = CondConv2d(*channels, num_experts=2, **GEOMETRIES[geometry])
    x, a = torch.randn(9, channels[0], 21, 23), torch.rand(9, 2)  # too many positions for all experts
    weight = layer.weight.detach().clone()
    for without_gradients in (torch.no_grad, torch.inference_mode):
        ordered.clear()
        with without_gradients():
            expected, out = layer.forward_reference(x, a), layer(x, a)
        assert len(ordered) == 1 and out.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
        assert torch.equal(layer.weight, weight)  # mixtures are written into memory of the ordered kernels


@needs_orders
def test_with_gradients_another_way_is_taken_to_the_same_values(ordered):
    layer = CondConv2d(2, 2, 3, num_experts=2)
    x, a = torch.randn(8, 2, 9, 9), torch.rand(8, 2)
    out = layer(x, a)
    assert not ordered
    with torch.no_grad():
        torch.testing.assert_close(layer(x, a), out.detach())
    assert ordered


@needs_orders
@torch.no_grad()
def test_an_image_does_not_meet_another_and_a_batch_comes_out_the_same_every_time(ordered):
    layer = CondConv2d(4, 6, 3, num_experts=2)
    x, a = torch.randn(16, 4, 9, 9), torch.rand(16, 2)
    out = layer(x, a)
    assert torch.equal(out, layer(x, a)) and len(ordered) == 2
    torch.testing.assert_close(out[8:], layer(x[8:], a[8:]), rtol=0., atol=0.)


@needs_orders
@pytest.mark.parametrize('stride', [1, 2])
@torch.no_grad()
def test_pointwise_in_channels_last_memory_goes_that_way_where_mkl_is_slow(stride, ordered, monkeypatch):
    layer = CondConv2d(4, 6, 1, stride=stride, num_experts=2)
    x, a = torch.randn(8, 4, 9, 9), torch.rand(8, 2)
    nhwc, expected = x.contiguous(memory_format=torch.channels_last), layer.forward_reference(x, a)
    for slow, inputs, calls in ((True, nhwc, 1), (True, x, 0), (False, nhwc, 0)):
        monkeypatch.setattr(cond_conv, 'convolutions_beat_matmul', lambda slow=slow: slow)
        ordered.clear()
        torch.testing.assert_close(layer(inputs, a), expected)
        assert len(ordered) == calls


@needs_orders
@torch.no_grad()
def test_who_goes_that_way(ordered):
    layer = CondConv2d(4, 6, 3, num_experts=2)
    x, a = torch.randn(8, 4, 9, 9), torch.rand(8, 2)
    out = layer(x, a)
    assert len(ordered) == 1
    for other, inputs in [
        (layer, (x[:7], a[:7])),  # fewer than 4 images an expert
        (CondConv2d(4, 6, 1, num_experts=2), (x, a)),
        (CondConv2d(4, 6, 3, groups=2, num_experts=2), (x, a)),
        (CondConv2d(4, 6, 3, num_experts=2, dtype=torch.float64), (x.double(), a)),
        (CondConv2d(4, 6, 3, num_experts=2, device='meta'), (x.to('meta'), a.to('meta'))),
        (torch.compile(layer, backend='eager', fullgraph=True), (x, a)),
    ]:
        other(*inputs)
        assert len(ordered) == 1
    with torch.autocast('cpu', torch.bfloat16):
        layer(x, a)
    with FlopCounterMode(display=False) as counter:
        layer(x, a)
    assert len(ordered) == 1
    # 8 images: a kernel of 6 * 4 * 9 from 2, 9 x 9 positions of it; two operations a MAC
    assert counter.get_total_flops() == 2 * 8 * (2 * 216 + 81 * 216)
    with torch.backends.mkldnn.flags(enabled=False):
        torch.testing.assert_close(layer(x, a), out, rtol=1e-4, atol=1e-5)
    assert len(ordered) == 1
