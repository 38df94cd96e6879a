"""detectron2's ResNet with routed stages: what they are, what dense weights become in them, what is refused."""
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip('detectron2', reason='detectron2 is not installed')

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import CfgNode  # noqa: E402
from detectron2.layers import FrozenBatchNorm2d  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from detectron2.modeling.backbone import BasicStem, ResNet  # noqa: E402
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402
from torch import nn  # noqa: E402

from moe_zoo.analysis import count  # noqa: E402
from moe_zoo.detection import load_config, route_resnet  # noqa: E402
from moe_zoo.detection.checkpoint import SafeCheckpointer  # noqa: E402
from moe_zoo.detection.upstream import with_plain_pickles  # noqa: E402
from moe_zoo.errors import InputError  # noqa: E402
from moe_zoo.layers import DynamicConv2d, MoEStage, sparse_inference  # noqa: E402
from moe_zoo.layers.cond_conv import MixingLayer  # noqa: E402
from moe_zoo.routing import end_step, set_epoch, trace_routing  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')  # of detectron2's older code

LAYERS = {
    'moe': dict(perturb=0., num_selected=2, constraint='none'),
    'condconv': {},
    'dyconv': {},
    'deepmoe': dict(embed_dim=8, embed_widths=(8, 8), embed_stem=4),
}
SMALL = [
    'MODEL.DEVICE', 'cpu', 'MODEL.RESNETS.STEM_OUT_CHANNELS', '8', 'MODEL.RESNETS.RES2_OUT_CHANNELS', '8',
    'MODEL.FPN.OUT_CHANNELS', '8',
]


def dense_resnet(bottleneck=False, norm='BN', freeze_at=0):
    """A ResNet of 8, 16, 32 and 64 channels, whose norms have statistics that are not 0 and 1."""
    stages, in_channels = [], 8
    for i in range(4):
        kwargs = dict(bottleneck_channels=4 * 2 ** i) if bottleneck else {}
        blocks = ResNet.make_stage(
            BottleneckBlock if bottleneck else BasicBlock, 2, in_channels=in_channels, out_channels=8 * 2 ** i,
            stride_per_block=[1 if i == 0 else 2, 1], norm=norm, **kwargs)
        stages.append(blocks)
        in_channels = 8 * 2 ** i
    resnet = ResNet(BasicStem(3, 8, norm), stages, out_features=['res3', 'res4', 'res5'], freeze_at=freeze_at)
    for module in resnet.modules():
        if isinstance(module, (nn.BatchNorm2d, FrozenBatchNorm2d)):
            for name, low in (('running_mean', -0.2), ('running_var', 0.6), ('weight', 0.8), ('bias', -0.2)):
                getattr(module, name).data.uniform_(low, low + 0.4)
    return resnet.eval()


def maps(resnet, x):
    with torch.no_grad():
        return resnet(x)


@pytest.mark.parametrize('layer', LAYERS)
@pytest.mark.parametrize('bottleneck, norm', [(False, 'BN'), (True, 'FrozenBN')])
def test_dense_weights_keep_their_function_in_every_kind_of_layer(layer, bottleneck, norm):
    dense = dense_resnet(bottleneck, norm)
    routed = route_resnet(dense_resnet(bottleneck, norm), layer, ['res4', 'res5'], num_experts=3, **LAYERS[layer])
    found = routed.load_state_dict(dense.state_dict(), strict=False)
    assert not found.unexpected_keys
    assert all('router' in key or 'routing_fn' in key or 'gate' in key or 'embedding' in key
               for key in found.missing_keys)
    x = torch.randn(2, 3, 64, 64)
    for name, wanted in maps(dense, x).items():
        torch.testing.assert_close(maps(routed.eval(), x)[name], wanted, rtol=1e-4, atol=1e-4)
    again = route_resnet(dense_resnet(bottleneck, norm), layer, ['res4', 'res5'], num_experts=3, **LAYERS[layer])
    again.load_state_dict(routed.state_dict())  # its own weights load strictly, and as they are
    for key, value in again.state_dict().items():
        assert torch.equal(value, routed.state_dict()[key])


def test_moved_copies_change_the_maps_by_about_a_tenth():
    """What a stage of `moe` does not keep with perturb=0.1, as its table says."""
    dense, x = dense_resnet(), torch.randn(2, 3, 64, 64)
    routed = route_resnet(dense_resnet(), 'moe', ['res5'], perturb=0.1).eval()
    routed.load_state_dict(dense.state_dict(), strict=False)
    wanted = maps(dense, x)['res5']
    moved = ((maps(routed, x)['res5'] - wanted).norm() / wanted.norm()).item()
    assert 0.01 < moved < 0.3
    first, second = (expert[0].conv1.weight for expert in list(routed.res5.experts)[:2])
    assert not torch.equal(first, second)  # symmetry is broken


def test_symmetry_is_broken_where_kernels_are_mixed():
    routed = route_resnet(dense_resnet(), 'condconv', ['res5'], num_experts=4)
    dense = dense_resnet()
    routed.load_state_dict(dense.state_dict(), strict=False)
    kernels = routed.res5[0].conv1.conv.weight  # (E, elements); gates of 1/2 each
    wanted = dense.res5[0].conv1.weight
    torch.testing.assert_close((kernels.sum(dim=0) / 2).view_as(wanted), wanted)
    spread = (2 * kernels.view(4, *wanted.shape) - wanted).std()
    assert 0.05 * wanted.std() < spread < 0.2 * wanted.std()


@pytest.mark.parametrize('layer', LAYERS)
def test_every_parameter_gets_a_gradient_and_an_image_stands_for_itself(layer):
    routed = route_resnet(dense_resnet(), layer, ['res3', 'res5'], num_experts=3, **LAYERS[layer])
    x = torch.randn(2, 3, 64, 64)
    sum(value.square().mean() for value in routed.train()(x).values()).backward()
    trained = {name: p for name, p in routed.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    routed.eval()
    for name, value in maps(routed, x).items():
        torch.testing.assert_close(value[:1], maps(routed, x[:1])[name], rtol=1e-4, atol=1e-4)
    with torch.no_grad(), trace_routing(routed) as trace:
        routed(x)
    # Two stages of two blocks: one decision a stage; a block; a convolution (two a block and two shortcuts); a gate of
    # both convolutions of a block, and the embedding, whose record asks for no loss.
    assert len(trace) == {'moe': 2, 'condconv': 4, 'dyconv': 2 * 2 * 2 + 2, 'deepmoe': 8 + 1}[layer]
    assert all(routing.shape == (2,) for records in trace.values() for routing in records)


@pytest.mark.parametrize('layer', LAYERS)
def test_stated_costs_are_those_that_are_counted(layer):
    routed = route_resnet(dense_resnet(True), layer, ['res5'], num_experts=3, **LAYERS[layer]).eval()
    cost = count(routed, torch.randn(1, 3, 64, 64))
    assert cost.macs_max == cost.macs_executed and not cost.uncounted


def test_layers_of_a_stage_are_those_of_their_papers():
    stage = route_resnet(dense_resnet(True), 'condconv', num_experts=3).res5
    assert all(isinstance(block, MixingLayer) and block.names == ('conv1', 'conv2', 'conv3') for block in stage)
    assert type(stage[0].shortcut).__name__ == 'Conv2d'
    stage = route_resnet(dense_resnet(True), 'dyconv').res5
    assert isinstance(stage[0].shortcut.conv, DynamicConv2d) and isinstance(stage[0].conv2.conv, DynamicConv2d)
    stage = route_resnet(dense_resnet(True), 'dyconv', dynamic_shortcut=False).res5
    assert not isinstance(stage[0].shortcut.norm, DynamicConv2d) and not hasattr(stage[0].shortcut, 'conv')
    stage = route_resnet(dense_resnet(True), 'deepmoe', **LAYERS['deepmoe']).res5
    assert [gate is None for _, _, gate, _ in stage[0].chain()] == [False, False, True]
    resnet = route_resnet(dense_resnet(), 'moe', ['res4', 'res5'])
    assert isinstance(resnet.res4, MoEStage) and isinstance(resnet.res5, MoEStage)
    assert resnet.stages[2] is resnet.res4 and resnet.stages[3] is resnet.res5


@pytest.mark.parametrize('norm', ['BN', 'FrozenBN'])
def test_a_dead_gate_removes_its_channel_and_need_not_be_computed(norm):
    routed = route_resnet(dense_resnet(norm=norm), 'deepmoe', ['res5'], **LAYERS['deepmoe']).eval()
    for gate in (routed.res5[0].gate1, routed.res5[1].gate2):
        gate.weight.data[::2] = 0
    x = torch.randn(1, 3, 64, 64)
    whole = maps(routed, x)['res5']
    with sparse_inference(routed):
        sparse = maps(routed, x)['res5']
        cheap = count(routed, x).macs_executed
    torch.testing.assert_close(sparse, whole)
    assert cheap < count(routed, x).macs_executed
    # Block 1: half of its inner map goes, from the convolution that makes it and the one that reads it; block 2: half
    # of the output of its second. 3 x 3 convolutions on 2 x 2 maps, from 32 or 64 to 64 channels.
    conv = lambda ins, outs: ins * outs * 9 * 4  # noqa: E731
    assert count(routed, x).macs_executed - cheap == conv(32, 32) + conv(32, 64) + conv(64, 32)


def test_the_temperature_of_dynamic_convolution_follows_the_epoch():
    routed = route_resnet(dense_resnet(), 'dyconv', temperature=11., anneal_epochs=5)
    routers = [m.routing_fn for m in routed.modules() if isinstance(m, DynamicConv2d)]
    set_epoch(routed, 2)  # 11 - (11 - 1) * 2 / 5 = 7
    assert {router.current_temperature().item() for router in routers} == {7.}


def test_a_hard_constraint_excludes_in_training_only():
    routed = route_resnet(dense_resnet(), 'moe', num_experts=2, num_selected=1, constraint='relative',
                          constraint_value=0.5).train()
    router = routed.res5.router
    router.weight.data = torch.stack([torch.ones_like(router.weight[0]), -torch.ones_like(router.weight[0])])
    x = torch.randn(2, 3, 64, 64)
    chosen = []
    for _ in range(2):
        with trace_routing(routed) as trace:
            routed(x)
        chosen.append(trace['res5'][0].indices.flatten().tolist())
        end_step(routed)  # R = (2 - 1) / 1 = 1 > 0.5 for the first expert after one step
    assert chosen == [[0, 0], [1, 1]]
    with torch.no_grad(), trace_routing(routed.eval()) as trace:
        routed(x)
    assert trace['res5'][0].indices.flatten().tolist() == [0, 0]


@pytest.mark.parametrize('call, message', [
    (dict(layer='condcnov'), "LAYER 'condcnov' is not one of moe, condconv, dyconv, deepmoe. Did you mean 'condconv'"),
    (dict(stages=['res6']), r"STAGES \['res6'\]: this ResNet has res2, res3, res4, res5"),
    (dict(layer='dyconv', temprature=3), "'temprature': for the layer dyconv .*Did you mean 'temperature'"),
    (dict(layer='condconv', num_selected=3), "'num_selected': for the layer condconv there are route_fn"),
    (dict(layer='condconv', route_fn='single'), "route_fn 'single': blocks of detectron2 hand no decision on; use"),
    (dict(stages=['res3', 'res5']), r'res3 is frozen, and a routed stage trains: MODEL.BACKBONE.FREEZE_AT 2 at most'),
    (dict(num_selected=5), 'num_selected=5 with num_experts=4'),
])
def test_what_cannot_be_routed_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        route_resnet(dense_resnet(freeze_at=3), **call)


# --- checkpoints as detectron2 has them

def tiny(layer='moe', *opts):
    cfg = load_config('configs/demo/retinanet_digits.yaml', [*SMALL, 'MOE.RESNET.LAYER', layer, *opts])
    if layer == 'deepmoe':
        cfg.MOE.RESNET.ARGS = CfgNode(LAYERS[layer])
    return build_model(cfg).eval()


def dense_detector():
    model = tiny('moe', 'MODEL.META_ARCHITECTURE', 'RetinaNet', 'MODEL.BACKBONE.NAME', 'build_dense_test_backbone')
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2), module.running_var.uniform_(0.6, 1.)
    return model


@pytest.fixture(scope='module', autouse=True)
def dense_backbone():
    from detectron2.modeling import BACKBONE_REGISTRY

    from moe_zoo.detection.pyramid import pyramid
    from moe_zoo.detection.resnet_backbone import _resnet
    if 'build_dense_test_backbone' not in BACKBONE_REGISTRY:
        def build_dense_test_backbone(cfg, input_shape):
            return pyramid(cfg, _resnet(cfg, input_shape))
        BACKBONE_REGISTRY.register(build_dense_test_backbone)


def features(model, x):
    with torch.no_grad():
        return model.backbone(x)['p5']


@pytest.mark.parametrize('checkpointer', [DetectionCheckpointer, SafeCheckpointer])
@pytest.mark.parametrize('layer', LAYERS)
def test_a_dense_detector_of_the_model_zoo_starts_every_kind(layer, checkpointer, tmp_path):
    """A .pkl with full names, as detectron2's model zoo has, by its own checkpointer (upstream's tools) and by ours."""
    dense, model = dense_detector(), tiny(layer, 'MOE.RESNET.PERTURB', '0.' if layer == 'moe' else '0.1')
    weights = {key: value.numpy() for key, value in dense.state_dict().items()}
    file = tmp_path / 'model_final.pkl'
    file.write_bytes(pickle.dumps({'model': weights, '__author__': 'Detectron2 Model Zoo'}))
    checkpointer(model).load(str(file))
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(features(model, x), features(dense, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('layer, losses', [
    ('moe', {'kl', 'load'}), ('condconv', set()), ('dyconv', set()), ('deepmoe', {'gate_l1'})])
def test_detectors_of_every_kind_ask_for_the_losses_of_their_papers(layer, losses):
    instances = Instances((64, 64), gt_boxes=Boxes(torch.tensor([[4., 4., 40., 40.]])), gt_classes=torch.tensor([0]))
    image = {'image': torch.randint(0, 255, (3, 64, 64), dtype=torch.uint8), 'instances': instances}
    with EventStorage():
        found = tiny(layer).train()([image, image])
    assert set(found) == {'loss_cls', 'loss_box_reg', *(f'loss_moe_{name}' for name in losses)}
    if layer == 'deepmoe':  # every gate is 1: two blocks, two gated maps of 64 channels each, weight 0.001
        assert found['loss_moe_gate_l1'].item() == pytest.approx(2 * 2 * 64 * 1e-3)


CAFFE2 = {'shortcut': 'branch1', 'conv1': 'branch2a', 'conv2': 'branch2b', 'conv3': 'branch2c'}


def caffe2_names(state):
    """Names of MSRA's R-50.pkl: res_conv1_bn_s, res2_0_branch2a_w, ...; an affine map in the place of statistics."""
    found = {}
    for key, value in state.items():
        *layer, part = key.removeprefix('stem.').split('.')
        if part in ('running_mean', 'running_var', 'num_batches_tracked'):
            continue
        norm = layer[-1] == 'norm'
        layer = [CAFFE2.get(name, name) if key.startswith('res') else name for name in layer if name != 'norm']
        if norm and not key.startswith('res'):
            layer = ['res', *layer]
        part = {'weight': 's' if norm else 'w', 'bias': 'b'}[part]
        found['_'.join([*layer, *(['bn'] if norm else []), part])] = value
    return found


def test_names_of_r50_pkl():
    resnet = dense_resnet(True)
    names = set(caffe2_names(resnet.state_dict()))
    assert {'conv1_w', 'res_conv1_bn_s', 'res_conv1_bn_b', 'res3_0_branch1_w', 'res5_1_branch2c_bn_b'} <= names


@pytest.mark.parametrize('layer', LAYERS)
def test_r50_pkl_starts_every_kind(layer, tmp_path):
    """The flat file of Caffe2 names with AffineChannel norms, in NumPy arrays of Python 2."""
    opts = ['MODEL.RESNETS.NORM', 'FrozenBN']
    dense, model = dense_detector(), tiny(layer, *opts, 'MOE.RESNET.PERTURB', '0.' if layer == 'moe' else '0.1')
    for module in dense.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.running_mean), nn.init.ones_(module.running_var)
    weights = caffe2_names(dense.backbone.bottom_up.state_dict())
    file = tmp_path / 'R-18.pkl'
    file.write_bytes(pickle.dumps({key: value.numpy() for key, value in weights.items()}, protocol=2))
    SafeCheckpointer(model).load(str(file))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        found, wanted = model.backbone.bottom_up(x)['res5'], dense.backbone.bottom_up(x)['res5']
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_classifier_under_a_meta_architecture_of_detectron2s_own_is_no_silent_loss(tmp_path):
    weights = caffe2_names(dense_detector().backbone.bottom_up.state_dict())
    (tmp_path / 'R-18.pkl').write_bytes(pickle.dumps({key: value.numpy() for key, value in weights.items()}))
    model = tiny('condconv', 'MODEL.META_ARCHITECTURE', 'RetinaNet')
    with pytest.raises(InputError, match='res5: the norms of this stage .* but no kernel: .* under MoERetinaNet'):
        SafeCheckpointer(model).load(str(tmp_path / 'R-18.pkl'))


def test_torchvisions_and_timms_names_start_a_stage(tmp_path):
    timm = pytest.importorskip('timm')
    classifier = timm.create_model('resnet18', num_classes=3, channels=(8, 16, 32, 64), stem_width=4).eval()
    names = {key: value for key, value in classifier.state_dict().items()}
    names['conv1.weight'] = torch.randn(8, 3, 7, 7)  # this width of timm's stem has other sizes
    names.update({f'bn1.{key}': torch.rand(8) + 0.5 for key in ('weight', 'bias', 'running_mean', 'running_var')})
    names['layer1.0.conv1.weight'] = torch.randn(8, 8, 3, 3)
    model = tiny('condconv')
    torch.save(names, tmp_path / 'resnet18.pth')
    SafeCheckpointer(model).load(str(tmp_path / 'resnet18.pth'))
    resnet = model.backbone.bottom_up
    assert torch.equal(resnet.stem.conv1.weight, names['conv1.weight'])
    assert torch.equal(resnet.stem.conv1.norm.running_var, names['bn1.running_var'])
    assert torch.equal(resnet.res3[0].shortcut.norm.weight, names['layer2.0.downsample.1.weight'])
    kernels = resnet.res5[1].conv2.conv.weight.sum(dim=0) / 2  # four gates of 1/2
    torch.testing.assert_close(kernels.view(64, 64, 3, 3), names['layer4.1.conv2.weight'])
    model = tiny('condconv', 'MODEL.RESNETS.DEPTH', '50')
    with pytest.raises(InputError, match='res3.0 is in its 1 x 1 convolution.* set MODEL.RESNETS.STRIDE_IN_1X1 False'):
        SafeCheckpointer(model).load(str(tmp_path / 'resnet18.pth'))


def test_dense_weights_of_another_width_are_told_by_stage_and_tensor(tmp_path):
    dense = {key: torch.zeros(1) if 'res5.0.conv2.weight' in key else value
             for key, value in dense_detector().state_dict().items()}
    torch.save({'model': dense}, tmp_path / 'dense.pth')
    with pytest.raises(InputError, match=r"dense.pth' .*: backbone.bottom_up.res5: The dense weights are of another "
                                         r'architecture than the model: 0.conv2.conv.weight is of shape \(1,\)'):
        SafeCheckpointer(tiny('condconv')).load(str(tmp_path / 'dense.pth'))


# --- pickles of strangers

def load(content, tmp_path):
    file = tmp_path / 'file.pkl'
    file.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    return SafeCheckpointer(nn.Linear(2, 2))._load_file(str(file))['model']


@pytest.mark.parametrize('protocol', range(6))
def test_arrays_of_every_protocol_are_read(protocol, tmp_path):
    arrays = {
        'row': np.arange(6, dtype='<f4').reshape(2, 3), 'column': np.asfortranarray(np.arange(6.).reshape(2, 3)),
        'cut': np.arange(12, dtype='i8').reshape(3, 4)[::2, ::2], 'big': np.array([1, 2], dtype='>i4'),
        'scalar': np.float32(0.5), 'none': np.zeros((0, 4), 'f2'), 'flag': np.array(True)}
    found = load(pickle.dumps({'model': arrays, '__author__': 'x'}, protocol=protocol), tmp_path)
    assert list(found) == list(arrays)
    for name, wanted in arrays.items():
        assert np.array_equal(found[name], wanted) and found[name].dtype == wanted.dtype.newbyteorder('=')


EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"  # an array, before its state


def test_arrays_of_python_2_are_read(tmp_path):
    """Its strings are pickled as such: two float32, 1 and 2, in bytes that no UTF-8 is."""
    array = EMPTY + (b"(I1\n(I2\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
                     b"I00\nS'\\x00\\x00\\x80?\\x00\\x00\\x00@'\ntb")
    found = load(b"(dS'conv1_w'\n" + array + b's.', tmp_path)
    assert found['conv1_w'].tolist() == [1., 2.] and found['conv1_w'].dtype == np.float32


class Calls:
    """Pickles as a call."""
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize('content', [
    {'model': Calls(eval, '1')},
    {'model': Calls(getattr, dict, 'get')},  # the way to everything else
    {'model': Calls(np.load, 'x')},
    {'model': Calls(np.memmap, 'x')},
    {'model': Calls(torch.load, 'x')},
    Calls(open, 'harm', 'w'),
    {'model': {'a': np.array([{}], dtype=object)}, '__author__': 'x'},  # objects in an array
    {'model': {'a': np.array([(1, 2.)], dtype='i4,f4')}, '__author__': 'x'},
    {'model': {'a': np.array(['text'])}, '__author__': 'x'},
    b"cos\nsystem\n(S'echo harm'\ntR.",
    b"cbuiltins\ndict.__class__\n(S'x'\n(t(dtR.",  # a dotted name
    b'\x80\x04\x8c\x05numpy\x8c\x11ndarray.__class__\x93.',
    b'cnumpy\nndarray\n(I1000000000000\ntR.',  # memory that the file does not fill
    EMPTY + b"(I1\n(I1000000000\ntcnumpy\ndtype\n(S'f4'\nI0\nI1\ntRI00\nS'1234'\ntb.",
    EMPTY + b"(I1\n(I1\ntcnumpy\ndtype\n(S'O8'\nI0\nI1\ntRI00\nS'12345678'\ntb.",
    b"ccodecs\nencode\n(S'x'\nS'zip'\ntR.",
    b"c_codecs\nencode\n(S'x'\nS'zip'\ntR.",
    b"c_codecs\nencode\n(dS'__code__'\nNs" + b'b.',  # to change what it may name
    b'cnumpy\ndtype\n}b.',
    b"(dS'model'\n",  # cut short
    b'S"x"\n0' * 3 + b'.',
    b'',
    b'(' * 100000 + b'l' * 100000 + b'.',
    b'\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.',  # bytes beyond any memory
    [1, 2],
    'model __author__',
    {'model': 3, '__author__': 'x'},
    {'model': {'weight': [1, 2]}, '__author__': 'x'},
])
def test_hostile_pickles_are_refused_in_one_sentence(content, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / 'evil.pkl'
    file.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
    with pytest.raises(InputError, match=r"^Checkpoint '.*evil.pkl' is truncated, or no checkpoint of this model: .*"):
        SafeCheckpointer(nn.Linear(2, 2)).load(str(file))
    assert 'harm' not in capfd.readouterr().out and not (tmp_path / 'harm').exists()


def test_one_pickle_cannot_change_how_the_next_is_read(tmp_path):
    evil = b"c_codecs\nencode\n(N(dS'__defaults__'\n(S'a'\nS'latin1'\ntstb."  # state None, slots {__defaults__: ...}
    with pytest.raises(InputError):
        (tmp_path / 'evil.pkl').write_bytes(evil)
        SafeCheckpointer(nn.Linear(2, 2)).load(str(tmp_path / 'evil.pkl'))
    assert load({'model': {'a': np.ones(2)}, '__author__': 'x'}, tmp_path)['a'].tolist() == [1., 1.]


def test_shared_containers_are_not_walked(tmp_path):
    """Lists of lists of the same lists: 2^60 entries for whoever reads them all."""
    bomb = []
    for _ in range(60):
        bomb = [bomb, bomb]
    found = load({'model': {'a': np.ones(2)}, 'other': bomb, '__author__': 'x'}, tmp_path)
    assert found['a'].tolist() == [1., 1.]


def test_detectron2s_own_tools_read_pickles_no_other_way(tmp_path, monkeypatch):
    """What `moe_zoo.run` puts in the place of the method of their checkpointer."""
    safe = with_plain_pickles(DetectionCheckpointer._load_file)
    monkeypatch.setattr(DetectionCheckpointer, '_load_file', safe)
    for name, content in (('evil', Calls(open, str(tmp_path / 'harm'), 'w')), ('good', np.ones((2, 2), 'f4'))):
        (tmp_path / f'{name}.pkl').write_bytes(pickle.dumps({'model': {'weight': content}, '__author__': 'x'}))
    layer = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"Checkpoint '.*evil.pkl' is not read: it asks for io.open, which is neither"):
        DetectionCheckpointer(layer).load(str(tmp_path / 'evil.pkl'))
    assert not (tmp_path / 'harm').exists()
    DetectionCheckpointer(layer).load(str(tmp_path / 'good.pkl'))
    assert layer.weight.tolist() == [[1., 1.], [1., 1.]]
    torch.save({'model': nn.Linear(2, 2).state_dict()}, tmp_path / 'other.pth')
    DetectionCheckpointer(layer).load(str(tmp_path / 'other.pth'))
    assert layer.weight.tolist() != [[1., 1.], [1., 1.]]
