"""MoEConv2d: the sparse path against the reference, idle experts, timm's ways to pad, gates with a convolution."""
import copy

import pytest
import torch
from timm.layers import create_conv2d
from torch import nn

from moe_zoo.analysis import count
from moe_zoo.analysis.force import force_expert
from moe_zoo.errors import InputError
from moe_zoo.layers import MoEConv2d, MoEStage
from moe_zoo.layers.image_moe import GATES, PoolPatches
from moe_zoo.routing import trace_routing


def layer(*args, **kwargs) -> MoEConv2d:
    made = MoEConv2d(*args, **dict(dict(num_experts=3, noise=False), **kwargs))
    nn.init.normal_(made.router.weight)
    return made


def choose(made: MoEConv2d, experts) -> torch.Tensor:
    """Images whose channel means are the logits: image b prefers expert experts[b]."""
    with torch.no_grad():
        made.router.weight.copy_(torch.eye(made.num_experts, made.in_chs))
    x = torch.randn(len(experts), made.in_chs, 6, 6) * 1e-3
    for b, expert in enumerate(experts):
        x[b, expert] += 4.
    return x


@pytest.mark.parametrize('selected', [1, 2, 3])
@pytest.mark.parametrize('kwargs', [
    {}, dict(bias=True, stride=2), dict(groups=2, padding='same', stride=2), dict(kernel_size=(1, 5), dilation=(1, 2)),
])
def test_sparse_path_equals_reference_in_values_and_gradients(selected, kwargs):
    made = layer(4, 6, num_selected=selected, **kwargs).double()
    x = torch.randn(5, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for convolve in (made.convolve_sparse, made.convolve_reference):
        y = convolve(x, made.router(made.gate(x)))
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
        found.append([y.detach(), *torch.autograd.grad(loss, [x, *made.parameters()])])
    for sparse, reference in zip(*found):
        torch.testing.assert_close(sparse, reference, rtol=1e-6, atol=1e-6)  # the weights are float32
    assert found[0][0].shape == made.output_shape(x.shape)


def test_values_by_hand():
    # Kernels 1, 2 and 3 times the input; image 0 prefers expert 2 by 4 to 0 and 0: weights softmax(4, 0), second
    # choice expert 0 by order. 3 * w + 1 * (1 - w) with w = 1 / (1 + exp(-4)).
    made = MoEConv2d(1, 1, 1, num_experts=3, num_selected=2, noise=False)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([1., 2., 3.]).view(3, 1, 1, 1, 1))
        made.router.weight.copy_(torch.tensor([[0.], [0.], [4.]]))
    w = torch.sigmoid(torch.tensor(4.)).item()
    assert made(torch.ones(1, 1, 2, 2)).flatten().tolist() == pytest.approx([3 * w + 1 - w] * 4)


def test_idle_experts_get_zero_gradients_and_are_not_run():
    made = layer(4, 6, num_selected=1, bias=True)
    x = choose(made, [0, 0, 2])
    with torch.no_grad():
        made.weight[1].fill_(float('inf'))
    made(x).square().sum().backward()
    assert made.weight.grad.isfinite().all() and made.bias.grad.isfinite().all()
    assert [bool(g.any()) for g in made.weight.grad] == [True, False, True]
    assert [bool(g.any()) for g in made.bias.grad] == [True, False, True]
    x = choose(made, [0, 0, 2])
    cost = count(made, x)
    assert cost.macs_executed == made.max_macs(x.shape) == 3 * (4 * 3 + 36 * 6 * 4 * 9)  # k experts for every image


@pytest.mark.parametrize('padding', ['', 'same', 'valid', 1])
@pytest.mark.parametrize('stride', [1, 2])
def test_one_forced_expert_is_timms_convolution(padding, stride):
    made = layer(4, 6, 3, stride=stride, padding=padding).eval()
    conv = create_conv2d(4, 6, 3, stride=stride, padding=padding, bias=False)
    conv.weight.data.copy_(made.weight[1])
    x = torch.randn(2, 4, 7, 8)
    with force_expert(made, 1):
        torch.testing.assert_close(made(x), conv(x))


def test_from_conv_takes_over_the_geometry_and_dense_weights_load():
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=True, dtype=torch.float64)
    made = MoEConv2d.from_conv(conv, num_experts=3, num_selected=1, perturb=0.)
    assert made.weight.shape == (3, 6, 2, 3, 3) and made.weight.dtype == torch.float64
    made.load_state_dict(conv.state_dict(), strict=False)
    x = torch.randn(3, 4, 7, 7, dtype=torch.float64)
    torch.testing.assert_close(made.eval()(x), conv(x))
    apart = MoEConv2d.from_conv(conv, num_experts=2, perturb=0.1)
    apart.load_state_dict(conv.state_dict(), strict=False)
    moved = (apart.weight[0] - conv.weight).std() / conv.weight.std()
    assert 0.05 < moved < 0.15 and not torch.equal(apart.weight[0], apart.weight[1])
    assert torch.equal(apart.bias[0], conv.bias) and torch.equal(apart.bias[1], conv.bias)
    apart.load_state_dict(copy.deepcopy(apart).state_dict(), strict=True)


def test_channels_last_stays_and_changes_nothing():
    made = layer(4, 6, num_selected=2).eval()
    x = torch.randn(5, 4, 8, 8)
    y = made(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, made(x))


def test_a_network_with_it_can_be_made_channels_last():
    # nn.Module.to asks this layout of weights of 4 and of 5 axes, and torch refuses it for 5.
    made = layer(4, 6, bias=True)
    x = torch.randn(5, 4, 8, 8)
    y = made(x)
    y.sum().backward()
    weight, grad = made.weight.clone(), made.weight.grad.clone()
    nn.Sequential(made).to(memory_format=torch.channels_last)
    assert made.weight[0].is_contiguous(memory_format=torch.channels_last) and not made.weight[0].is_contiguous()
    assert torch.equal(made.weight, weight) and torch.equal(made.weight.grad, grad)
    torch.testing.assert_close(made(x.to(memory_format=torch.channels_last)), y)
    assert made.double().weight.dtype == torch.float64 and made.weight.shape == weight.shape


def test_an_empty_batch_meta_script_and_export():
    made = layer(4, 6, stride=2, bias=True).eval()
    x = torch.randn(3, 4, 8, 8)
    assert made(x[:0]).shape == (0, 6, 4, 4)
    assert copy.deepcopy(made).to('meta')(x.to('meta')).shape == (3, 6, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(made)(x), made(x))
        torch.testing.assert_close(torch.export.export(made, (x,)).module()(x), made(x))
        torch.testing.assert_close(torch.compile(made, backend='aot_eager')(x), made(x))


def test_k_can_be_changed_on_a_trained_layer():
    made = layer(4, 6, num_selected=2).eval()
    x = torch.randn(5, 4, 8, 8)
    before = made(x)
    for k in (1, 3, 2):
        made.set_num_selected(k)
        with trace_routing(made) as trace:
            y = made(x)
        assert trace[''][0].indices.shape == (5, k)
        assert made.max_macs((1, 4, 8, 8)) == 4 * 3 + k * 64 * 6 * 4 * 9
    assert torch.equal(y, before)
    with pytest.raises(InputError, match='num_selected=4 with num_experts=3: choose between 1 and 3 experts.'):
        made.set_num_selected(4)


@pytest.mark.parametrize('outs', [None, 5])
def test_pooling_before_the_convolution_of_a_gate_is_pooling_after_it(outs):
    gate = PoolPatches(4, outs)
    conv = gate.conv or nn.Conv2d(4, 7, 3)
    x = torch.randn(2, 4, 6, 5)
    found = gate(x)
    if outs is None:  # the router's matrix is the kernel
        found = nn.functional.linear(found, conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(found, conv(x).mean(dim=(2, 3)))


def test_a_gate_with_a_convolution_names_a_map_that_is_too_small():
    made = MoEConv2d(4, 4, 1, gate='conv_gap')
    with pytest.raises(InputError, match=r'meets a map of 2 x 8: it needs 3 x 3'):
        made(torch.randn(1, 4, 2, 8))


@pytest.mark.parametrize('gate, features', [
    ('gap_fc', 4), ('relu_gap_fc', 4), ('conv_gap', 256), ('conv', 36), ('random_fc', 4)])
def test_gates(gate, features):
    assert gate in GATES and len(GATES) == 5
    stage = MoEStage([nn.Conv2d(4, 4, 1) for _ in range(3)], 4, gate=gate)
    x = torch.randn(4, 4, 6, 6)
    assert stage.gate(x).shape == (4, features) and stage.router.weight.shape == (3, features)
    convolution = 4 * 256 * 9 if gate == 'conv_gap' else 0
    assert stage.max_macs((1, 4, 6, 6)) == convolution + 3 * features + 2 * 36 * 16
    stage.train()(x).square().sum().backward()
    trained = [name for name, p in stage.named_parameters() if not name.startswith('experts') and p.grad is not None]
    router, conv = ['router.weight', 'router.noise_weight'], ['gate.conv.weight', 'gate.conv.bias']
    assert sorted(trained) == sorted({'random_fc': [], 'conv_gap': conv + router}.get(gate, router))
    if gate == 'random_fc':  # drawn once, without noise: images differ, decisions repeat
        assert stage.router.weight.any() and torch.equal(stage.router(stage.gate(x)).indices,
                                                         stage.router(stage.gate(x)).indices)


def test_relu_comes_before_the_pool():
    # One channel of +1 and -1: mean 0, mean of the positive part 1/2.
    stage = MoEStage([nn.Conv2d(1, 1, 1) for _ in range(2)], 1, gate='relu_gap_fc')
    assert stage.gate(torch.tensor([[[[1., -1.]]]])).tolist() == [[0.5]]


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match='num_selected=5 with num_experts=4: choose between 1 and 4'):
        MoEConv2d(4, 4, num_selected=5)
    with pytest.raises(InputError, match='groups=3 does not divide 4 input and 6 output channels'):
        MoEConv2d(4, 6, groups=3)


def test_noisy_gates_start_at_zero_but_the_one_that_is_never_trained():
    """From zero every expert has the same chance; drawn once and for all, the control must not be zero."""
    for gate in ('gap_fc', 'relu_gap_fc', 'random_fc'):
        weight = MoEConv2d(4, 6, 3, gate=gate, noise=True).router.weight
        assert bool((weight == 0).all()) == (gate != 'random_fc')
    assert MoEConv2d(4, 6, 3, gate='gap_fc', noise=False).router.weight.abs().min() > 0
