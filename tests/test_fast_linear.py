"""Kernels of experts: oneDNN's product and torch's grouped one are held to the plain loop, values and gradients.

Letters: T rows, D width, M hidden width, E experts, K chosen experts.
"""
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from moe_zoo.layers import MoEMlp, SoftMoEMlp, expert_mlps, fast_linear

needs_onednn = pytest.mark.skipif(not fast_linear._HAS_ONEDNN, reason='torch has no oneDNN here, or the CPU no AVX-512')


def layer(**kwargs) -> MoEMlp:
    made = MoEMlp(12, 20, **{'num_experts': 5, 'num_selected': 2, 'same_init': False, 'noise_std': 0., **kwargs})
    nn.init.normal_(made.router.weight)
    for linear in (made.fc1, made.fc2):
        nn.init.normal_(linear.bias)
    return made


def gradients(made: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, and the gradients of the input and of every parameter; every element of the output has its own slope."""
    made.zero_grad()
    x = x.clone().requires_grad_()
    y = made(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in made.parameters())]


@pytest.fixture
def onednn(monkeypatch) -> list[int]:
    """Small products too. Returns the rows of every product that oneDNN computed."""
    rows, multiply = [], fast_linear._multiply
    monkeypatch.setattr(fast_linear, 'ONEDNN_MACS', 1)
    monkeypatch.setattr(
        fast_linear, '_multiply', lambda x, *args: rows.append(x.shape[0]) or multiply(x, *args))
    return rows


@needs_onednn
@pytest.mark.parametrize('make', [
    lambda: layer(), lambda: layer(num_selected=1, glu='first'), lambda: layer(norm_layer=nn.LayerNorm, out_features=7),
    lambda: layer(capacity_factor=0.4), lambda: SoftMoEMlp(12, 20, num_experts=3, num_slots=4, same_init=False)])
def test_experts_by_onednn_equal_the_plain_loop(make, onednn, monkeypatch):
    made, x = make(), torch.randn(4, 9, 12)
    found = gradients(made, x)
    # Twice an expert forward, and for each of these products two backward; no expert is idle here.
    assert len(onednn) == 3 * 2 * made.num_experts
    monkeypatch.setattr(fast_linear, 'ONEDNN_MACS', 1 << 60)
    onednn.clear()
    for one, other in zip(found, gradients(made, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert not onednn


@needs_onednn
def test_gradients_are_computed_where_they_are_wanted_and_can_be_differentiated(onednn):
    x, weight, bias = (torch.randn(*size, requires_grad=True) for size in ((5, 16), (8, 16), (8,)))
    for wanted in ([x], [weight], [bias], [x, weight, bias]):
        slope = torch.randn(5, 8, requires_grad=True)
        seconds = []
        for run in (fast_linear.linear, F.linear):
            first = torch.autograd.grad(run(x, weight, bias), wanted, slope, create_graph=True)
            squares = sum(g.square().sum() for g in first)
            seconds.append([*first, *torch.autograd.grad(squares, [slope, *wanted], allow_unused=True)])
        for one, other in zip(*seconds, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    x.requires_grad_(False)
    onednn.clear()
    fast_linear.linear(x, weight).sum().backward()
    assert onednn == [5, 8]  # the product, and the gradient of the weight alone


@needs_onednn
def test_onednn_is_for_large_float32_products_that_nobody_counts(onednn, monkeypatch):
    x, weight = torch.randn(4, 16), torch.randn(8, 16)
    uses = fast_linear.uses_onednn
    assert uses(x, weight)
    assert not uses(x.double(), weight.double()) and not uses(x.bfloat16(), weight.bfloat16())
    assert not uses(x.to('meta'), weight.to('meta'))
    with torch.autocast('cpu', torch.bfloat16):
        assert not uses(x, weight)
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        assert not uses(x, weight)
    made, tokens = layer().eval(), torch.randn(4, 9, 12)
    onednn.clear()
    with FlopCounterMode(display=False) as counter:
        assert not uses(x, weight)
        made(tokens)
    assert counter.get_total_flops() // 2 == made.max_macs(tokens.shape) and not onednn
    monkeypatch.setattr(fast_linear, 'ONEDNN_MACS', 4 * 8 * 16 + 1)
    assert not uses(x, weight)
    assert fast_linear.linear(x[:0], weight).shape == (0, 8)


@pytest.mark.parametrize('num_selected', [1, 3])
def test_the_grouped_product_equals_the_loop(num_selected, monkeypatch):
    """In float32 on the CPU: nobody has run it on a GPU, for which it is meant. With K = 1 expert 2 gets nothing."""
    made, x = layer(num_selected=num_selected, norm_layer=nn.LayerNorm, glu='first'), torch.randn(4, 9, 12)
    choose = made.router.choose

    def choose_others(tokens):
        logits, gates, weights, indices, *noise = choose(tokens)
        return logits, gates, weights, torch.where(indices == 2, 4, indices), *noise
    if num_selected == 1:
        made.router.choose = choose_others
    expected = gradients(made, x)
    calls, product = [], F.grouped_mm
    monkeypatch.setattr(F, 'grouped_mm', lambda *args, **kwargs: calls.append(1) or product(*args, **kwargs))
    monkeypatch.setattr(expert_mlps, 'can_group', lambda *_: True)
    found = gradients(made, x)
    assert len(calls) == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    if num_selected == 1:
        assert not made.fc1.weight.grad[2].any() and made.fc1.weight.grad[4].any()
    assert made(x[:0]).shape == (0, 9, 12)  # without tokens the loop runs, as everywhere


def test_the_grouped_product_is_for_cuda_in_bfloat16():
    for dtype in (torch.float32, torch.bfloat16):
        assert not fast_linear.can_group(torch.randn(3, 16, dtype=dtype), torch.randn(2, 8, 16, dtype=dtype))
