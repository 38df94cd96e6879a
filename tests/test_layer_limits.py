"""Layers at their limits: where one way to compute ends and another begins, the least and the most that is allowed,
devices, number types, and norms that are not the usual ones.

Where two ways give the same numbers, only which one is taken tells whether a limit moved: the tests look. Tensors on
the meta device stand in for a GPU: what is made on the CPU on the way refuses to meet them.

Letters: B images, C input channels, O output channels, E experts, n elements of a kernel.
"""
import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from kept_numbers import wave
from test_cond_conv import GEOMETRIES, build
from test_numbers import FUSIONS, LAYERS, MAP, PADDED, RECORDS, prepared
from torch import nn
from torch.nn import functional as F

from moe_zoo import layers, losses, routing
from moe_zoo.errors import InputError
from moe_zoo.layers import ChannelGate, cond_conv, deep_moe, fast_linear, ordered_kernels
from moe_zoo.layers.cond_conv import CondConv2d, convolutions_beat_matmul
from moe_zoo.layers.deep_moe import ChannelGated, scale_channels
from moe_zoo.layers.routed import batch_norm_of_images, channels_last_on_cpu
from moe_zoo.layers.situational_fusion import SituationalFusion, linear_cka, measure_affinity
from moe_zoo.routing import Routing, routing_context
from moe_zoo.routing.routers import _Router

needs_orders = pytest.mark.skipif(not ordered_kernels._HAS_ORDERS, reason='a CPU without AVX-512, or an older torch')
needs_onednn = pytest.mark.skipif(not fast_linear._HAS_ONEDNN, reason='torch has no oneDNN here, or the CPU no AVX-512')


# Devices and number types

def tensors(record: Routing) -> dict:
    return {name: (tuple(field.shape), field.dtype) for name, field in record._asdict().items()
            if isinstance(field, torch.Tensor)}


def run(module: nn.Module, x: torch.Tensor, **context) -> tuple[torch.Tensor, list[Routing]]:
    with routing_context(**context) as found:
        out = module(x)
    return (out.weights, [out]) if isinstance(out, Routing) else (out, list(found.routings))


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('training', [False, True])
def test_everything_happens_where_the_input_is(name, training):
    make, shape = LAYERS[name]
    for context in ({}, PADDED) if shape == MAP and name != 'mlp on a map' else ({},):
        module = make().train(training)
        here, records = run(module, wave(*shape), **context)
        there, ghosts = run(module.to('meta'), torch.empty(shape, device='meta'), **context)
        assert there.is_meta and there.shape == here.shape and there.dtype == here.dtype
        assert [tensors(ghost) for ghost in ghosts] == [tensors(record) for record in records]
        for ghost in ghosts:
            assert all(field.is_meta for field in ghost if isinstance(field, torch.Tensor))
            for loss in ('importance', 'importance_unbiased', 'kl', 'gshard', 'z', 'gate_l1', 'gate_entropy'):
                assert losses.LOSSES[loss](ghost).is_meta


@pytest.mark.parametrize('name', FUSIONS)
def test_a_fusion_happens_where_the_image_is(name):
    module = FUSIONS[name]().to('meta')
    inputs = [torch.empty(3, 4, 16, 16), [torch.empty(3, dim) for dim in module.dims], torch.empty(3, 2)]
    inputs = [[each.to('meta') for each in part] if isinstance(part, list) else part.to('meta') for part in inputs]
    with routing_context() as context:
        out = module(*inputs)
    record, = context.routings
    assert out.is_meta and out.shape == (3, 4) and tensors(record)['weights'] == ((3, len(module.dims)), torch.float32)
    assert losses.LOSSES['affinity'](record).is_meta


@pytest.mark.parametrize('name', RECORDS)
def test_losses_happen_where_the_record_is(name):
    record = RECORDS[name]()._replace(inside=None)  # how many of them count is data
    ghost = Routing(*(field.to('meta') if isinstance(field, torch.Tensor) else field for field in record))
    for loss in losses.LOSSES:
        if loss != 'vmoe_load' or record.group_chances is None:
            assert losses.LOSSES[loss](ghost).is_meta and losses.LOSSES[loss](ghost).shape == ()
    pairs = torch.zeros(2, 3, dtype=torch.int64, device='meta')
    assert losses.jsd_loss(ghost, pairs).is_meta


@pytest.mark.parametrize('name', LAYERS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_maps_keep_their_type_decisions_are_float32_and_counts_are_integers(name, dtype):
    make, shape = LAYERS[name]
    module = make()
    counts = {key: buffer.dtype for key, buffer in module.named_buffers() if not buffer.is_floating_point()}
    out, records = run(module.to(dtype), wave(*shape).to(dtype), **(PADDED if shape == MAP else {}))
    assert out.dtype == (torch.float32 if name in ('embedding', 'channel gate') else dtype)  # these two decide
    for record in records:
        assert {field.dtype for field in record if isinstance(field, torch.Tensor)} <= {
            torch.float32, torch.int64, torch.bool}
        assert {record.logits.dtype, record.gates.dtype, record.weights.dtype} == {torch.float32}
    assert counts == {key: buffer.dtype for key, buffer in module.named_buffers() if buffer.dtype != dtype}
    wanted = {'dynamic conv': {'routing_fn.epoch'}, 'moe conv of one': {'router.constraint.steps'},
              'mlp sigmoid': {'router.constraint.load'}}.get(name, set())
    assert {key for key in counts if 'num_batches_tracked' not in key} == wanted


@pytest.mark.parametrize('build', [
    partial(layers.LocalExperts, 4, 2, gate_hidden_features=3),
    partial(layers.MoEStage, [], 4), partial(SituationalFusion, [4, 3], 2, goal_dim=2, goal_to_gate=True, head_dim=3),
    partial(layers.MoEConv2d, 4, 4, 3, gate='conv_gap', constraint='relative'),
    partial(layers.MoEConv2d, 4, 4, 3, constraint='bias', bias=True), partial(layers.ShallowEmbedding, 10, dim=4),
    partial(layers.PatchMoEConv2d, 4, 4, kernel_size=3)], ids=lambda build: build.func.__name__)
def test_parts_are_made_where_and_as_asked(build):
    for asked in ({'device': 'meta'}, {'dtype': torch.float64}):
        if build.func is layers.MoEStage:
            build = partial(layers.MoEStage, [nn.Conv2d(4, 4, 1, **asked) for _ in range(2)], 4)
        module = build(**asked)
        if 'device' in asked:
            assert all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
        else:
            assert {parameter.dtype for parameter in module.parameters()} == {torch.float64}


# Which way is taken: CondConv

@pytest.mark.parametrize('images, size, experts, kwargs, few', [
    (8, (8, 8), 2, {}, True),  # 8 images, and 2 x 64 = 128 outputs of experts
    (7, (8, 8), 2, {}, False), (8, (8, 9), 2, {}, False), (8, (3, 43), 1, {}, False), (8, (8, 16), 1, {}, True),
    (8, (16, 16), 2, dict(stride=2), True), (8, (8, 8), 2, dict(groups=2), False)])
def test_every_expert_runs_on_eight_images_of_128_outputs(images, size, experts, kwargs, few, monkeypatch):
    layer, calls = CondConv2d(4, 4, 3, num_experts=experts, **kwargs), []
    monkeypatch.setattr(cond_conv, 'can_order', lambda *_: False)
    forward_experts = layer.forward_experts
    monkeypatch.setattr(layer, 'forward_experts', lambda *args: calls.append(1) or forward_experts(*args))
    x, a = torch.randn(images, 4, *size), torch.rand(images, experts)
    torch.testing.assert_close(layer(x, a), layer.forward_reference(x, a), rtol=1e-4, atol=1e-5)
    assert calls == [1] * few
    assert not layer.to('meta')._few_positions(x.to('meta'))


@pytest.mark.parametrize('images, channels, kwargs, call', [
    # 512 channels: a kernel of 512 x 512 x 9 = 2,359,296, of which 2,500,000 elements are 542 output channels
    (1, 512, {}, (1, 512)), (2, 512, {}, (2, 256)),  # 271, in sixteens; 8 images: 67
    (8, 512, {}, (8, 64)), (9, 512, {}, (8, 64)), (8, 512, dict(groups=2), (8, 512)),
    (8, 256, {}, (8, 128)), (8, 128, {}, (8, 128)),  # 135; 2,500,000 / (8 x 1,152) = 271 are more than there are
    (9, 512, dict(groups=512), (9, 512)), (0, 128, {}, (1, 128))])
def test_a_call_has_eight_images_and_ten_megabytes_of_kernels(images, channels, kwargs, call):
    layer = CondConv2d(channels, channels, 3, num_experts=1, device='meta', **kwargs)
    assert layer._call_size(torch.empty(images, channels, 1, 1)) == call
    assert layer._call_size(torch.empty(images, channels, 1, 1, device='meta')) == (images, channels)
    assert (layer.images_per_call, layer.weights_per_call, layer.weights_kept) == (8, 2_500_000, 5_000_000)


def test_slow_products_are_amds_with_avx_512_and_mkl(monkeypatch):
    """The answer is kept for a process: asked here anew."""
    beats = convolutions_beat_matmul.__wrapped__
    for name, capability, mkl, answer in (
            ('AMD EPYC 9354', 'AVX512', True, True), ('Intel(R) Xeon(R)', 'AVX512', True, False),
            ('AMD EPYC 7502', 'AVX2', True, False), ('AMD EPYC 9354', 'AVX512', False, False)):
        monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda name=name: {'cpu_name': name}, raising=False)
        monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda capability=capability: capability)
        monkeypatch.setattr(torch.backends.mkl, 'is_available', lambda mkl=mkl: mkl)
        assert beats() is answer
    monkeypatch.delattr(torch.cpu, 'get_capabilities')
    assert not beats()


@pytest.mark.parametrize('batch', [1, 3])
@pytest.mark.parametrize('geometry', [name for name in GEOMETRIES if 'pointwise' not in name])
def test_windows_for_onnx_equal_the_plain_convolution(geometry, batch, monkeypatch):
    """A model for ONNX is made in tests that are slow; what it computes is computed here."""
    layer, calls, windows = build(geometry), [], CondConv2d._convolve_windows
    monkeypatch.setattr(cond_conv, 'becomes_onnx', lambda: True)
    monkeypatch.setattr(CondConv2d, '_convolve_windows', lambda *args: calls.append(1) or windows(*args))
    for size in ((12, 17), (11, 16)):
        x, a = torch.randn(batch, 4, *size, dtype=torch.float64), torch.rand(batch, 3, dtype=torch.float64)
        torch.testing.assert_close(layer(x, a), layer.forward_reference(x, a))
    assert len(calls) == 2


def test_a_linear_layer_mixes_its_matrix_for_one_image_and_the_outputs_for_more(monkeypatch):
    calls, mix = [], layers.CondLinear._mix_outputs
    monkeypatch.setattr(layers.CondLinear, '_mix_outputs', lambda *args: calls.append(len(args[1])) or mix(*args))
    for features in (1, 3):
        layer = layers.CondLinear(features, 2, num_experts=2)
        for images in (0, 1, 2):
            assert layer(torch.randn(images, features)).shape == (images, 2)
    assert calls == [0, 2, 0, 2]


@pytest.mark.parametrize('route_fn', cond_conv.ROUTE_FNS)
def test_only_a_later_block_of_a_hierarchy_takes_the_decision_before(route_fn):
    made = [cond_conv.MixedConv2d(4, 4, 1) for _ in range(3)]
    for position, layer in enumerate(made):
        layer.set_routing(4, 4, route_fn, position=position)
    assert [layer.takes_previous for layer in made] == [False, *[route_fn == 'hierarchical'] * 2]


def test_layers_with_a_router_of_their_own_as_torchscript():
    for layer, x in ((layers.RoutedConv2d(4, 6, 3, 2, bias=True), wave(3, 4, 5, 7)),
                     (layers.DynamicConv2d(4, 6, 1), wave(3, 4, 5, 7)), (layers.CondLinear(4, 6), wave(3, 4))):
        scripted = torch.jit.script(prepared(layer).eval())
        for images in (x, x[:1]):
            torch.testing.assert_close(scripted(images), layer(images))


def test_no_images():
    for layer in (CondConv2d(4, 6, 3, stride=2, bias=True), CondConv2d(4, 6, 1), CondConv2d(4, 8, 3, groups=4)):
        x = torch.zeros(0, 4, 9, 7, requires_grad=True)
        out = layer(x, torch.zeros(0, 4))
        assert out.shape == layer.output_shape(x.shape)
        out.sum().backward()
        assert not any(p.grad.any() for p in layer.parameters())


# Which way is taken: oneDNN

def fresh(module, monkeypatch, capability='AVX512', mkldnn=True):
    """The module as a computer with this CPU would import it."""
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    monkeypatch.setattr(torch.backends.mkldnn, 'is_available', lambda: mkldnn)
    spec = importlib.util.spec_from_file_location(f'{module.__name__}_anew', Path(module.__file__))
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.mark.parametrize('module, flag', [(ordered_kernels, '_HAS_ORDERS'), (fast_linear, '_HAS_ONEDNN')])
def test_onednn_is_asked_where_it_is_and_the_cpu_has_avx_512(module, flag, monkeypatch):
    assert not getattr(fresh(module, monkeypatch, capability='AVX2'), flag)
    assert not getattr(fresh(module, monkeypatch, mkldnn=False), flag)
    wanted = ['_reorder_convolution_weight', '_nbytes'] if flag == '_HAS_ORDERS' else ['_linear_pointwise']
    assert getattr(fresh(module, monkeypatch), flag) == all(hasattr(torch.ops.mkldnn, name) for name in wanted)
    monkeypatch.setattr(torch.ops, 'mkldnn', object())  # an older torch
    assert not getattr(fresh(module, monkeypatch), flag)


@needs_onednn
@pytest.mark.parametrize('threads', [1, 2])
def test_onednn_multiplies_from_33_million_products_a_thread(threads, monkeypatch):
    monkeypatch.setattr(torch, 'get_num_threads', lambda: threads)
    weight, rows = torch.zeros(64, 64), threads * 2 ** 13  # x 2 ** 12
    assert fast_linear.uses_onednn(torch.zeros(rows, 64), weight)
    assert not fast_linear.uses_onednn(torch.zeros(rows - 1, 64), weight)


@pytest.mark.parametrize('kernel, channels', [
    (576, 512),  # 300,000 elements are 520 output channels of 64 x 9, in steps of 64
    (2343, 128), (2344, 64), (4688, 64), (300_001, 64)])  # 128.04; 127.99; 63.99: 64 are the fewest
def test_kernels_are_mixed_in_parts_that_stay_in_the_cache(kernel, channels):
    assert ordered_kernels._channels(torch.empty(2, 700 * kernel, device='meta'), 700) == channels


# Channels of DeepMoE

class Gated(ChannelGated):
    """A 3 x 3 convolution of stride 2 to 3 channels and a 1 x 1 one to 2, a gate behind each."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(2, 3, 3, 2, 1), nn.Conv2d(3, 2, 1)])
        self.norms = nn.ModuleList([nn.BatchNorm2d(3, eps=.5), nn.BatchNorm2d(2, affine=False)])
        self.gated = nn.ModuleList([ChannelGate(3, 4), ChannelGate(2, 4)])
        self.act = nn.Tanh()
        self.count_experts()

    def chain(self):
        return [(*link, self.act) for link in zip(self.convs, self.norms, self.gated)]

    def forward(self, x, e):
        for i, (conv, norm, gate, act) in enumerate(self.chain()):
            x = scale_channels(norm(conv(x)), gate.gates(e))
            x = act(x) if i == 0 else x
        return x


def test_costs_of_gated_channels_by_hand():
    block = Gated()
    # 5 x 7 becomes 3 x 4: 12 x 54 and 12 x 6 MACs, gates 3 x 4 and 2 x 4
    assert block.max_macs((2, 2, 5, 7)) == 2 * (12 * 54 + 12 * 6 + 12 + 8) and block.num_experts == 5
    # A channel: 18 weights and a bias, 2 of the norm, 4 of the gate; then 3 and 1, none, 4
    assert block.expert_sizes() == [25, 25, 25, 8, 8]
    # 1.5 of 3 channels live: half of 648; a quarter of 2 live and half of what comes in: 7/8 of 72
    assert block.spared_macs((2, 2, 5, 7), [1., .5, 0., .5, 0.]) == 2 * (324 + 63)
    assert block.spared_macs((2, 2, 5, 7), [1.] * 5) == 0


@pytest.mark.parametrize('dead', [[], [0], [4], [0, 1], [0, 4], [0, 1, 2], [3, 4], [0, 1, 2, 3, 4]])
def test_live_channels_of_a_block_with_biases(dead):
    block, x, e = prepared(Gated()).eval(), wave(2, 2, 5, 7), wave(2, 4).abs() + .1
    for place in range(5):
        with torch.no_grad():
            gate, row = (block.gated[0], place) if place < 3 else (block.gated[1], place - 3)
            gate.weight[row].abs_().mul_(-1 if place in dead else 1)
    live, channels = block.run_live(x, e)
    expected = block(x, e)
    channels = torch.arange(2) if channels is None else channels
    torch.testing.assert_close(live, expected[:, channels])
    assert not expected[:, [c for c in range(2) if c not in channels]].any()
    assert set(range(2)) - {c - 3 for c in dead} <= set(channels.tolist())


@pytest.mark.parametrize('size', [(1, 1), (1, 2), (2, 1), (3, 3)])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_kernels_between_some_channels(size, memory_format):
    weight = torch.randn(5, 4, *size).to(memory_format=memory_format)
    outs, ins = torch.tensor([3, 0]), torch.tensor([2])
    assert torch.equal(deep_moe._cut(weight, ins, outs), weight[outs][:, ins])
    assert torch.equal(deep_moe._cut(weight, ins, None), weight[:, ins])
    assert torch.equal(deep_moe._cut(weight, None, outs), weight[outs]) and deep_moe._cut(weight, None, None) is weight


def test_a_fresh_embedding():
    """He's normal on the fan out; activations overwrite their input."""
    embedding = layers.ShallowEmbedding(10, widths=(64, 128), stem_width=32)
    for conv in (m for m in embedding.modules() if isinstance(m, nn.Conv2d)):
        assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.out_channels)) ** .5, rel=.1)
        assert conv.bias is None
    assert all(m.inplace for m in embedding.modules() if isinstance(m, nn.ReLU))


@pytest.mark.parametrize('frozen', [False, True])
@pytest.mark.parametrize('training', [False, True])
def test_a_new_classifier_of_the_embedding_is_as_the_embedding_is(frozen, training):
    embedding = layers.ShallowEmbedding(10, widths=(4,), dim=3)
    embedding.freeze(frozen)
    embedding.train(training).reset_classifier(5)
    assert embedding.classifier.training == (training and not frozen)
    assert {p.requires_grad for p in embedding.classifier.parameters()} == {not frozen}
    assert embedding.classifier.weight.shape == (5, 3)


# Norms and memory

@pytest.mark.parametrize('images, size', [(2, (1, 1)), (5, (1, 1)), (2, (2, 3))])
@pytest.mark.parametrize('with_statistics', [True, False])
def test_a_norm_whose_images_all_count_is_the_usual_one(images, size, with_statistics):
    """Defaults included; two values a channel are the fewest that have a variance."""
    x, normed = wave(images, 3, *size), []
    kept = [[torch.tensor([1., 2., 3.]), torch.tensor([4., 5., 6.])] if with_statistics else [None, None] for _ in '12']
    normed.append(F.batch_norm(x, *kept[0], training=True))
    with batch_norm_of_images(torch.ones(images, dtype=torch.bool)):
        normed.append(F.batch_norm(x, *kept[1], training=True))
    torch.testing.assert_close(normed[1], normed[0])
    torch.testing.assert_close(kept[1], kept[0])


@pytest.mark.parametrize('shape, fewest, changed', [
    ((4, 2, 5, 5), 4, True), ((3, 8, 5, 5), 4, False), ((1, 2, 5, 5), 1, True), ((0, 2, 5, 5), 1, False),
    ((4, 2, 5), 1, False), ((4, 2, 5), 8, False)])
def test_maps_of_enough_images_lie_channels_last(shape, fewest, changed):
    x = wave(*shape)
    found = channels_last_on_cpu(x, fewest)
    assert torch.equal(found, x) and (found is not x) == changed
    assert not changed or found.is_contiguous(memory_format=torch.channels_last)
    ghost = x.to('meta')
    assert channels_last_on_cpu(ghost, fewest) is ghost


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('norm_first', [False, True])
def test_norms_of_patch_experts_keep_what_they_were_made_with(training, norm_first):
    """A large epsilon, momentum and scale; single cells, where the chosen ones alone are computed."""
    made = [layers.PatchMoEConv2d(
        4, 3, 2, 5, norm_first=norm_first, norm_layer=partial(nn.BatchNorm2d, eps=.7, momentum=.3, **kwargs)).train(
        training) for kwargs in ({}, {'affine': False}) for _ in range(2)]
    for fast, plain in (made[:2], made[2:]):
        plain.load_state_dict(prepared(fast).state_dict())
        plain.computes_chosen = lambda: False
        x = wave(3, 4, 5, 6)
        torch.testing.assert_close(fast(x), plain(x))
        for one, other in zip(fast.buffers(), plain.buffers()):
            torch.testing.assert_close(one, other)


# The least and the most

def test_a_stage_of_one_expert_takes_dense_weights():
    stage = layers.MoEStage([nn.Conv2d(2, 2, 1)], 2, num_selected=1)
    dense = nn.Conv2d(2, 2, 1)
    stage.load_state_dict({**{k: v for k, v in stage.state_dict().items() if 'experts' not in k}, **dense.state_dict()})
    assert torch.equal(stage.experts[0].bias, dense.bias)


def test_a_router_with_a_bias_starts_without_preference():
    router = _Router(4, 3, 2, True)
    assert router.weight.any() and router.bias.tolist() == [0., 0., 0.]


CARD = torch.rand(3, 4)
REFUSED = {  # one step beyond what is allowed
    'CondLinear rate': (lambda: layers.CondLinear(4, 4, expert_drop_rate=1.), 'expert_drop_rate=1.0'),
    'CondLinear below': (lambda: layers.CondLinear(4, 4, expert_drop_rate=-.01), 'expert_drop_rate=-0.01'),
    'fusion rate': (lambda: SituationalFusion([4], 2, representation_drop=1.), 'representation_drop=1.0'),
    'fusion below': (lambda: SituationalFusion([4], 2, representation_drop=-.01), 'representation_drop=-0.01'),
    'fusion of one': (lambda: SituationalFusion([4, 4], 2, 'single'), "mode='single' with 2"),
    'fusion of none': (lambda: SituationalFusion([], 2), 'num_experts=0'),
    'one output': (lambda: SituationalFusion([4, 4], 1), 'One output'),
    'affinity above': (lambda: SituationalFusion([4, 4], 2, affinity=[[0, 1.001], [1.001, 0]]), 'affinity holds 1.001'),
    'affinity below': (lambda: SituationalFusion([4, 4], 2, affinity=[[0, -.1], [-.1, 0]]), 'affinity holds -0.1'),
    'affinity lopsided': (lambda: SituationalFusion([4, 4], 2, affinity=[[0, .5], [.50002, 0]]), 'not symmetric'),
    'softmax': (lambda: routing.SoftmaxRouter(4, 2, 0.), 'temperature=0.0'),
    'annealed': (lambda: routing.AnnealedSoftmaxRouter(4, 2, .99), 'temperature=0.99'),
    'epochs': (lambda: routing.AnnealedSoftmaxRouter(4, 2, anneal_epochs=0), 'anneal_epochs=0'),
    'cosine': (lambda: routing.CosineTopKRouter(4, 2, temperature=.0099), 'temperature=0.0099: use at least 0.01'),
    'projection': (lambda: routing.CosineTopKRouter(4, 2, projection_features=0), 'projection_features=0'),
    'selected': (lambda: routing.NoisyTopKRouter(4, 2, 3), 'num_selected=3 with num_experts=2'),
    'selected none': (lambda: routing.NoisyTopKRouter(4, 2, 0), 'num_selected=0'),
    'patches': (lambda: layers.PatchMoE(1, 8, 2, 8, 0), 'patches_per_expert=0'),
    'patch size': (lambda: layers.PatchMoE(1, 8, (1, 0), 8, 1), 'patch_size=\\(1, 0\\)'),
    'filters': (lambda: layers.PatchMoE(1, 0, 2, 8), 'num_filters=0'),
    'too many patches': (lambda: layers.PatchMoE(1, 8, 2, 8, 5)(torch.zeros(1, 1, 4, 4)), 'choose between 1 and 4'),
    'kernel': (lambda: layers.PatchMoEConv2d(4, 4, kernel_size=2), 'kernel_size=2'),
    'no kernel': (lambda: layers.PatchMoEConv2d(4, 4, kernel_size=-1), 'kernel_size=-1'),
    'groups': (lambda: layers.MoEConv2d(4, 4, groups=0), 'groups=0'),
    'input groups': (lambda: layers.MoEConv2d(3, 4, groups=2), 'groups=2'),
    'output groups': (lambda: layers.MoEConv2d(4, 3, groups=2), 'groups=2'),
    'reduction': (lambda: layers.DynamicConv2d(4, 4, reduction=0), 'reduction=0'),
    'embedding': (lambda: layers.ShallowEmbedding(0), 'embed_dim=0'),
    'map': (lambda: layers.MoEConv2d(4, 4, gate='conv')(torch.zeros(1, 4, 2, 3)), 'map of 2 x 3'),
    'map across': (lambda: layers.MoEConv2d(4, 4, gate='conv')(torch.zeros(1, 4, 3, 2)), 'map of 3 x 2'),
    'capacity': (lambda: routing.compute_capacity(1, 2, 1, 1., rounding='round'), 'leaves 0 slots'),
    'images': (lambda: measure_affinity(
        SituationalFusion([4, 4], 2), torch.zeros(3, 3, 8, 8), [CARD, CARD]), 'measured on 3 images'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_one_step_further_is_refused(name):
    make, message = REFUSED[name]
    with pytest.raises(InputError, match=message):
        make()


def test_the_most_is_allowed():
    SituationalFusion([4, 4], 2, affinity=[[0, 1], [1, 0]])
    SituationalFusion([4, 4], 2, affinity=[[0, .5], [.500005, 0]])  # rounding
    SituationalFusion([4, 4], 1, mix='logits')
    routing.CosineTopKRouter(4, 2, temperature=.01)
    routing.NoisyTopKRouter(4, 2, 2)
    layers.PatchMoE(1, 8, 2, 8, 4)(torch.zeros(1, 1, 4, 4))
    layers.MoEConv2d(4, 4, gate='conv')(torch.zeros(1, 4, 3, 3))
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert linear_cka(x, x @ torch.tensor([[0., 1., 0.], [1., 0., 0.], [0., 0., 1.]])).item() == pytest.approx(1)
    # 1.5 slots are 2 rounded up, 2 to the even one; 0.75 are 1
    assert [routing.compute_capacity(n, 4, 1, 1., 1, 'round') for n in (3, 6, 10)] == [1, 2, 2]
