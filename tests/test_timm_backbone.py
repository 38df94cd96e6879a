"""`build_timm_fpn_backbone`: any model of timm or moe_zoo under a pyramid, with weights, frozen parts and padding."""
import logging
from functools import partial

import pytest
import timm
import torch

pytest.importorskip('detectron2', reason='detectron2 is not installed')

from detectron2.config import CfgNode  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from detectron2.modeling.meta_arch import FCOS  # noqa: E402
from detectron2.modeling.meta_arch.fcos import FCOSHead  # noqa: E402
from detectron2.structures import PolygonMasks  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402
from test_detection import SMALL, images, path_of  # noqa: E402
from timm.layers import SyncBatchNormAct  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from moe_zoo.detection import MoEFCOS, TimmBackbone, load_config  # noqa: E402
from moe_zoo.errors import InputError  # noqa: E402
from moe_zoo.layers import RoutedLayer  # noqa: E402
from moe_zoo.layers.cond_conv import CondConv2d  # noqa: E402
from moe_zoo.layers.moe_conv import MoEConv2d  # noqa: E402
from moe_zoo.routing import trace_routing  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')  # of detectron2's older code

SLOW = pytest.mark.slow
VIT = dict(embed_dim=32, num_heads=2, depth=4)
VMOE = dict(VIT, patch_size=16, moe_layers='every_2', num_experts=4)
P2 = ['MODEL.FPN.IN_FEATURES', "['res2', 'res3', 'res4', 'res5']"]
# name -> model, its keywords
MODELS = {
    'condconv': ('condconv_mobilenetv1_025', dict(num_experts=2)),
    'vmoe': ('vmoe_vit_s', VMOE),
    'expert_choice': ('vmoe_vit_s_ec', VMOE),
    'soft': ('softmoe_vit_s', dict(VMOE, num_experts=3)),
    'moe_mlp': ('moefied', dict(base='convnext_atto', depths=(1, 1, 2, 1), dims=(8, 16, 16, 24),
                                targets='stages.2.*.mlp', layer='moe_mlp', num_experts=3)),
    'moefied_vit': ('moefied', dict(VIT, base='vit_tiny_patch16_224', targets='blocks.[13].mlp', layer='moe_mlp')),
}
LARGE = {
    'condconv_resnet': ('condconv_resnet18', dict(num_experts=2)),
    'dyconv': ('dyconv_resnet18', dict(num_experts=2)),
    'moe_conv': ('moefied', dict(base='resnet18', targets=['layer3.*.conv2', 'layer4.*.conv2'], layer='moe_conv',
                                 num_experts=3)),
    'moe_resnet': ('moe_resnet18', dict(channels=(8, 8, 8, 8))),
    'deepmoe': ('deepmoe_resnet18', {}),
}
LARGE = [pytest.param(*value, id=key, marks=SLOW) for key, value in LARGE.items()]
ALL = [*(pytest.param(*value, id=key) for key, value in MODELS.items()), *LARGE]
FEW = [*(pytest.param(*value, id=key, marks=() if key in ('condconv', 'vmoe') else SLOW)
         for key, value in MODELS.items()), *LARGE]


def detector(name, args=None, *opts, base='coco/Base-RetinaNet'):
    """A small detector whose backbone is a timm model."""
    cfg = load_config(path_of(base), [
        *SMALL, 'MODEL.BACKBONE.NAME', 'build_timm_fpn_backbone', 'MODEL.FPN.OUT_CHANNELS', '8',
        'MODEL.RETINANET.NUM_CONVS', '1', 'MODEL.RETINANET.NUM_CLASSES', '3', 'MODEL.PIXEL_STD', '[60., 60., 60.]',
        'MODEL.RETINANET.SCORE_THRESH_TEST', '0.0', 'MOE.TIMM.CHECK_INPUT', 'False', 'MOE.TIMM.NAME', name, *opts])
    cfg.MOE.TIMM.ARGS = CfgNode(args or {})
    torch.manual_seed(0)
    return build_model(cfg)


def without_positions(model):
    """The original V-MoE resizes its table by another rule than timm, so that on other grids the two differ."""
    if hasattr(model, 'pos_embed'):
        nn.init.zeros_(model.pos_embed)
    return model


def saved(tmp_path, model):
    path = tmp_path / 'weights.pth.tar'
    torch.save({'state_dict': model.state_dict(), 'arch': 'some'}, path)
    return str(path)


# --- which models, and which levels

@pytest.mark.parametrize('name', ['resnet18', 'convnext_atto', pytest.param('condconv_resnet18', marks=SLOW),
                                  pytest.param('swin_tiny_patch4_window7_224', marks=SLOW)])
def test_timm_models_give_the_stages_of_a_resnet(name):
    backbone = TimmBackbone(name).eval()
    shapes = backbone.output_shape()
    assert {key: shape.stride for key, shape in shapes.items()} == {'res2': 4, 'res3': 8, 'res4': 16, 'res5': 32}
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 96))
    for key, value in maps.items():  # Swin thinks in channels last
        assert value.shape == (1, shapes[key].channels, 64 // shapes[key].stride, 96 // shapes[key].stride)


@pytest.mark.parametrize('name, args', [*FEW[:len(MODELS)], pytest.param(
    'vit_tiny_patch16_224', VIT, id='vit', marks=SLOW)])
@pytest.mark.parametrize('opts, levels', [([], range(3, 8)), (P2, range(2, 7))], ids=['P3-P7', 'P2-P6'])
def test_levels_follow_the_features_asked_for(name, args, opts, levels):
    backbone = detector(name, args, *opts, base='coco/Base-RetinaNet' if not opts else 'coco/Base-RCNN-FPN').backbone
    assert {key: shape.stride for key, shape in backbone.output_shape().items()} == {f'p{n}': 2 ** n for n in levels}
    assert backbone.size_divisibility == 32
    with torch.no_grad():
        maps = backbone.eval()(torch.randn(2, 3, 64, 96))
    for n in levels:  # the pyramid rounds up where an image is narrower than a stride
        assert maps[f'p{n}'].shape == (2, 8, -(-64 // 2 ** n), -(-96 // 2 ** n))


@pytest.mark.parametrize('name, args, opts, message', [
    ('resnet81', {}, [], "'resnet81' is no model of timm or moe_zoo. Did you mean 'resnet18'"),
    ('resnet18', {'experts': 2}, [], "with MOE.TIMM.ARGS {'experts': 2}: .*unexpected keyword argument 'experts'"),
    ('condconv_resnet18', {'num_expert': 2}, [],
     "unexpected keyword argument 'num_expert'. Did you mean 'num_experts'"),
    pytest.param('inception_v4', {}, [], r'it gives \(1, 384, 13, 21\) for a 128 x 192 image at stride 8', marks=SLOW),
    ('levit_128s', {}, [], r"'levit_128s' has feature maps of stride \[16, 32, 64\], and a feature pyramid needs 8"),
    ('vit_tiny_patch16_224', dict(VIT, patch_size=14), [], 'has patches of 14 pixels.*ARGS.patch_size 16'),
    ('vmoe_vit_s', dict(VMOE, patch_size=32), P2, 'makes strides 8 to 64 of patches of 32 pixels.*patch_size 16'),
    ('cait_xxs24_224', dict(VIT), [], 'cannot stand under a feature pyramid: it does not take a 128 x 192 ima'),
    ('resnet18', {}, ['MODEL.FPN.IN_FEATURES', "['res4', 'res5']"],
     r"IN_FEATURES \['res4', 'res5'\]: this backbone gives .*needs \['res3', 'res4', 'res5'\] \(P3 to P7, for Retina"),
    ('resnet18', {}, ['MODEL.FPN.IN_FEATURES', "['res1', 'res3', 'res4', 'res5']"], r"this backbone gives \['res3'"),
    ('resnet18', {}, P2, r"RETINANET.IN_FEATURES \['p3', .*'p7'\]: .* makes \['p2', 'p3', 'p4', 'p5', 'p6'\].$"),
    ('resnet18', {'output_stride': 16}, [], r"'resnet18' has feature maps of stride \[2, 4, 8, 16, 16\]"),
    ('vmoe_vit_s', dict(VMOE, group_size=7), [], 'group_size=7 does not divide'),
    ('vmoe_vit_s', VMOE, ['MOE.TIMM.PRETRAINED', 'True'], '^MOE.TIMM.PRETRAINED True: .* as MOE.TIMM.CHECKPOINT.$'),
    ('resnet18', {}, ['MOE.TIMM.NORM', 'FrozenBn'], "NORM 'FrozenBn' is not one of .*Did you mean 'FrozenBN'"),
    ('moe_resnet18', dict(channels=(8, 8, 8, 8)), ['MOE.TIMM.NORM', 'SyncBN'], "'SyncBN': experts with a BatchNorm"),
    ('resnet18', {}, ['MODEL.BACKBONE.FREEZE_AT', '6'], 'FREEZE_AT 6: use 0 to 5, 1 for what is before 4 stages'),
    ('vit_tiny_patch16_224', VIT, ['MODEL.BACKBONE.FREEZE_AT', '6'], 'FREEZE_AT 6: use 0 to 5'),
])
def test_what_cannot_be_a_backbone_is_one_sentence(name, args, opts, message):
    with pytest.raises(InputError, match=message) as error:
        detector(name, args, *opts)
    assert '\n' not in str(error.value)


def test_colours_are_checked_against_the_model():
    rgb = ['MOE.TIMM.CHECK_INPUT', 'True', 'INPUT.FORMAT', 'RGB', 'MODEL.PIXEL_MEAN', '[123.675, 116.28, 103.53]',
           'MODEL.PIXEL_STD', '[58.395, 57.12, 57.375]']
    with pytest.raises(InputError, match="INPUT.FORMAT 'BGR': resnet18 expects 'RGB'"):
        detector('resnet18', {}, *rgb, 'INPUT.FORMAT', 'BGR')
    with pytest.raises(InputError, match=r'MODEL.PIXEL_MEAN .*expects \[123.675, 116.28, 103.53\]'):
        detector('resnet18', {}, *rgb, 'MODEL.PIXEL_MEAN', '[103.53, 116.28, 123.675]')
    with pytest.raises(InputError, match=r'MODEL.PIXEL_MEAN .*expects \[127.5, 127.5, 127.5\]'):
        detector('vmoe_vit_s', VMOE, *rgb)
    detector('resnet18', {}, *rgb)
    detector('resnet18', {}, *rgb, 'INPUT.FORMAT', 'BGR', 'MOE.TIMM.CHECK_INPUT', 'False')


def test_positions_follow_the_image():
    """On images of its own size a V-MoE is what it is as a classifier; on others its table is resized."""
    backbone = TimmBackbone('vmoe_vit_s', dict(VMOE, img_size=64)).eval()
    model = timm.create_model('vmoe_vit_s', **dict(VMOE, img_size=64)).eval()
    state = backbone.net.model.state_dict()
    model.load_state_dict(state, strict=False)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        wanted = model.forward_intermediates(x, indices=1, norm=False, intermediates_only=True)[0]
        torch.testing.assert_close(backbone(x)['res4'], wanted)
    wide = timm.create_model('vmoe_vit_s', **dict(VMOE, img_size=(96, 160))).eval()
    place, grid = state['pos_embed'][:, :1], state['pos_embed'][:, 1:].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (6, 10), mode='bilinear', align_corners=True).flatten(2).mT  # as V-MoE's own code
    wide.load_state_dict({**state, 'pos_embed': torch.cat([place, grid], dim=1)}, strict=False)
    x = torch.randn(2, 3, 96, 160)
    with torch.no_grad():
        wanted = wide.forward_intermediates(x, indices=1, norm=False, intermediates_only=True)[0]
        torch.testing.assert_close(backbone(x)['res4'], wanted)
    assert state['pos_embed'].shape == (1, 1 + 4 * 4, 32)  # the parameter keeps its size


@pytest.mark.parametrize('name, args', [pytest.param(*MODELS[key], id=key, marks=SLOW if key == 'soft' else ())
                                        for key in ('vmoe', 'expert_choice', 'soft')])
def test_an_image_does_not_depend_on_its_company(name, args):
    model = detector(name, args).eval()
    inputs = images((64, 96), (64, 96), (64, 96))
    together, alone = run(model, inputs), run(model, inputs[1:2])
    for level, value in alone.items():
        torch.testing.assert_close(together[level][1:2], value, rtol=1e-4, atol=1e-5)


# --- frozen parts, norms, checkpointing

def trained(model):
    return {name for name, p in model.net.named_parameters() if p.requires_grad}


def test_stages_and_their_batch_norm_are_frozen():
    backbone = TimmBackbone('resnet18', freeze_at=2)
    assert {name.split('.')[0] for name in trained(backbone)} == {'layer2', 'layer3', 'layer4'}
    kinds = {part: any(isinstance(m, nn.BatchNorm2d) for m in getattr(backbone.net, part).modules())
             for part in ('layer1', 'layer2')}
    assert kinds == {'layer1': False, 'layer2': True}
    assert not isinstance(backbone.net.bn1, nn.BatchNorm2d)
    assert not trained(TimmBackbone('resnet18', freeze_at=5))


@pytest.mark.parametrize('name, args, freeze_at, first', [
    (*MODELS['vmoe'], 3, 2), pytest.param(*MODELS['moefied_vit'], 1, 0, marks=SLOW),
    ('vit_tiny_patch16_224', VIT, 5, 4)])
def test_blocks_of_a_transformer_are_frozen(name, args, freeze_at, first):
    """1 is patches, class token and positions; 3 two blocks of four as well; 5 all of them."""
    backbone = TimmBackbone(name, args, freeze_at=freeze_at)
    assert {int(key.split('blocks.')[1].split('.')[0]) for key in trained(backbone)} == set(range(first, 4))
    everything = {key.split('blocks.')[0] for key in dict(backbone.net.named_parameters())}
    assert {'model.', 'model.pos_embed', 'model.patch_embed.proj.weight'} <= everything  # but these are not trained


def test_batch_norm_is_fixed_or_synchronised():
    fixed = TimmBackbone('condconv_mobilenetv1_025', norm='FrozenBN')
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fixed.modules())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(fixed.train()(x), fixed.eval()(x))
    plain = TimmBackbone('condconv_mobilenetv1_025', norm='')
    norms = [m for m in plain.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    torch.manual_seed(0)
    synced = TimmBackbone('condconv_mobilenetv1_025', norm='SyncBN', freeze_at=1)
    found = [m for m in synced.modules() if isinstance(m, (nn.SyncBatchNorm, SyncBatchNormAct))]
    assert len(found) == len(norms) - 3  # those of the stem and the block before stride 4 are fixed maps


def test_norms_of_ranks_without_cuda_are_not_synchronised(monkeypatch):
    monkeypatch.setattr('moe_zoo.detection.timm_backbone.get_world_size', lambda: 2)
    with pytest.raises(InputError, match="MOE.TIMM.NORM 'SyncBN' with MODEL.DEVICE 'cpu': .* use '' or 'FrozenBN'"):
        detector(*MODELS['condconv'], 'MOE.TIMM.NORM', 'SyncBN')


def test_random_weights_under_frozen_batch_norm_are_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger('moe_zoo'), 'propagate', True)  # a run before may have switched it off
    with caplog.at_level(logging.WARNING):
        detector('vit_tiny_patch16_224', VIT, 'MODEL.BACKBONE.FREEZE_AT', '2')  # which has none
        assert not caplog.text
        detector('condconv_mobilenetv1_025', {}, 'MOE.TIMM.NORM', 'FrozenBN')
    assert 'diverge within a few iterations' in caplog.text and "MOE.TIMM.NORM ''" in caplog.text


@pytest.mark.parametrize('name, args', [
    *FEW, pytest.param('resnet18', {}, id='dense', marks=SLOW),
    pytest.param('vit_tiny_patch16_224', VIT, id='dense_vit', marks=SLOW)])
def test_checkpointing_changes_no_loss_and_no_gradient(name, args):
    """Images of unlike size, so that what is computed anew must know the padding too; noise of the same draw."""
    plain = detector(name, args).train()
    again = detector(name, args, 'MOE.TIMM.CHECKPOINTING', 'True').train()
    again.load_state_dict(plain.state_dict())
    inputs, found, calls = images((50, 64), (64, 90)), [], {id(plain): 0, id(again): 0}

    def count(module, args, key):
        calls[key] += 1

    for model in (plain, again):
        for module in model.backbone.modules():
            module.register_forward_pre_hook(partial(count, key=id(model)))
        torch.manual_seed(3)
        with EventStorage():
            losses = model(inputs)
        sum(losses.values()).backward()
        found.append((losses, {key: p.grad for key, p in model.named_parameters()}))
    assert calls[id(again)] > 1.5 * calls[id(plain)]
    (losses, grads), (other_losses, other_grads) = found
    torch.testing.assert_close(other_losses, losses)
    assert all(grad is not None for grad in grads.values())
    torch.testing.assert_close(other_grads, grads, rtol=1e-3, atol=1e-5)


# --- weights

def test_a_classifier_of_any_classes_loads(tmp_path):
    classifier = timm.create_model('resnet18', num_classes=7)
    backbone = TimmBackbone('resnet18', checkpoint=saved(tmp_path, classifier))
    assert torch.equal(backbone.net.layer4[1].conv2.weight, classifier.layer4[1].conv2.weight)


@pytest.mark.parametrize('key', ['vmoe', *(pytest.param(key, marks=SLOW) for key in MODELS if key != 'vmoe')])
def test_a_routed_classifier_of_any_classes_loads(key, tmp_path):
    name, args = MODELS[key]
    classifier = timm.create_model(name, num_classes=7, **args)
    for parameter in classifier.parameters():
        nn.init.normal_(parameter, std=0.1)
    state = TimmBackbone(name, args, checkpoint=saved(tmp_path, classifier)).net.model.state_dict()
    wanted = classifier.state_dict()
    assert len(state) > 20 and all(torch.equal(value, wanted[k]) for k, value in state.items())


@pytest.mark.parametrize('name, args, twin', [
    ('condconv_mobilenetv1_025', dict(num_experts=2), dict(model_name='mobilenetv1_100', channel_multiplier=0.25)),
    ('vmoe_vit_s', VMOE, dict(VIT, model_name='vit_tiny_patch16_224', act_layer='gelu_tanh')),
    ('moefied', MODELS['moe_mlp'][1],
     dict(model_name='convnext_atto', **{k: MODELS['moe_mlp'][1][k] for k in ('depths', 'dims')}))])
def test_dense_weights_are_upcycled(name, args, twin, tmp_path):
    """The map of the dense twin, by a backbone that starts from its file."""
    if name.startswith('condconv'):
        twin = dict(model_name=name, start_block=14, cond_fc=False)  # timm has no such width
    classifier = without_positions(timm.create_model(num_classes=5, **twin))
    for module in classifier.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
    path = saved(tmp_path, classifier)
    dense = TimmBackbone(twin.pop('model_name'), twin, checkpoint=path).eval()
    routed = TimmBackbone(name, args, checkpoint=path).eval()
    assert any(isinstance(m, RoutedLayer) for m in routed.modules())
    x = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(routed(x)['res5' if 'res5' in routed(x) else 'res4'],
                                   dense(x)['res5' if 'res5' in dense(x) else 'res4'], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name, args, source, message', [
    ('resnet18', {}, 'convnext_atto', r"lacks 100 tensors of resnet18 \(first 'conv1.weight'\): are they weights of"),
    ('resnet18', dict(layers=(2, 2, 2, 3)), 'resnet18', r"lacks 10 tensors of resnet18 \(first 'layer4.2.conv1.weight"),
    ('resnet18', dict(layers=(1, 1, 1, 1)), 'resnet26', 'cannot be loaded into resnet18: .*size mismatch'),
    ('condconv_mobilenetv1_025', {}, 'convnext_atto', 'cannot be loaded into condconv_mobilenetv1_025: '),
    ('vmoe_vit_s', VMOE, 'vit_tiny_patch16_224', 'cannot be loaded into vmoe_vit_s: '),
])
def test_weights_of_another_model_are_refused(name, args, source, message, tmp_path):
    path = saved(tmp_path, timm.create_model(source))
    with pytest.raises(InputError, match=f"MOE.TIMM.CHECKPOINT '{path}' {message}") as error:
        TimmBackbone(name, args, checkpoint=path)
    assert '\n' not in str(error.value)


def test_files_that_are_no_weights_are_refused(tmp_path):
    (tmp_path / 'bad.pth').write_bytes(b'PK\x03\x04 not a checkpoint')
    for file in ('bad.pth', 'absent.pth'):
        with pytest.raises(InputError, match=f"MOE.TIMM.CHECKPOINT '.*{file}' cannot be loaded into resnet18"):
            TimmBackbone('resnet18', checkpoint=str(tmp_path / file))


# --- padding

def run(model, inputs):
    """The levels of the pyramid, as the heads of a detector see them."""
    found = {}
    hook = model.backbone.register_forward_hook(lambda module, args, output: found.update(output))
    with torch.no_grad():
        model(inputs)
    hook.remove()
    return found


def see_one_position_only(model):
    """Take from a network all that looks beyond a place: then padding can reach an image through the gates alone."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, CondConv2d, MoEConv2d)):
            height, width = module.kernel_size
            kernels = module.weight.data.view(-1, *module.weight_shape) if isinstance(module, CondConv2d) \
                else module.weight.data
            centre = torch.zeros_like(kernels)
            centre[..., height // 2, width // 2] = kernels[..., height // 2, width // 2]
            kernels.copy_(centre if module.stride in (1, (1, 1)) or height % 2 else kernels)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.constant_(module.bias, 0.5)  # the padding is not zero inside a network
        elif hasattr(module, 'qkv'):
            nn.init.zeros_(module.proj.weight)
    for name, parameter in model.named_parameters():
        if name.endswith('pos_embed'):
            nn.init.zeros_(parameter)


@torch.no_grad()
def with_lively_gates(model):
    for module in model.modules():
        for part in ('router', 'routing_fn'):
            router = getattr(module, part, None)
            if isinstance(module, RoutedLayer) and isinstance(getattr(router, 'weight', None), nn.Parameter):
                nn.init.normal_(router.weight, std=router.weight.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize('name, args', ALL)
def test_gates_and_features_of_an_image_are_those_it_has_alone(name, args):
    """Where nothing but gates and slots could carry padding into an image, its whole pyramid stays as it is."""
    if 'capacity' not in args and name == 'vmoe_vit_s':
        args = dict(args, eval_capacity_factor=0.7, group_images=1)  # slots are scarce
    model = with_lively_gates(detector(name, args).eval())
    see_one_position_only(model)
    inputs = images((60, 50), (96, 128))
    with trace_routing(model) as alone:
        wanted = run(model, inputs[:1])
    with trace_routing(model) as padded:
        found = run(model, inputs)
    assert alone
    for layer, (routing, *_) in padded.items():
        counted = routing.logits
        if len(routing.shape) > 1:  # tokens: those on the first image, in order
            first = torch.zeros(routing.shape[0], counted.shape[0] // routing.shape[0], dtype=torch.bool)
            first[0] = True
            counted = counted[first.flatten() & routing.inside]
        own = alone[layer][0].without_padding().logits
        torch.testing.assert_close(counted[:len(own)], own, rtol=1e-3, atol=1e-4, msg=layer)
    levels = {level: found[level][:1, :, :-(-60 // 2 ** n), :-(-50 // 2 ** n)]
              for n, level in ((3, 'p3'), (4, 'p4'), (5, 'p5'))}
    for level, value in levels.items():
        torch.testing.assert_close(value, wanted[level][:, :, :value.shape[2], :value.shape[3]], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('name, args, source, source_args', [
    pytest.param('moefied', MODELS['moe_mlp'][1], 'convnext_atto',
                 {k: MODELS['moe_mlp'][1][k] for k in ('depths', 'dims')}, marks=SLOW),
    ('vmoe_vit_s', dict(VMOE, router_args=dict(renormalise=True)), 'vit_tiny_patch16_224',
     dict(VIT, act_layer='gelu_tanh')),
    pytest.param('dyconv_resnet18', dict(num_experts=2), 'resnet18', {}, marks=SLOW),
    pytest.param('moefied', LARGE[2].values[1], 'resnet18', {}, marks=SLOW),
])
def test_detections_move_by_padding_as_the_dense_twins_do(name, args, source, source_args, tmp_path):
    """A real network, into whose borders padding leaks, and experts that keep the function of the dense one: whatever
    its gates do, detections of an image in a batch differ from those alone as much as the twin's, and no more."""
    torch.manual_seed(0)
    path = saved(tmp_path, without_positions(timm.create_model(source, num_classes=5, **source_args)))
    twin = detector(source, source_args, 'MOE.TIMM.CHECKPOINT', path).eval()
    model = detector(name, args, 'MOE.TIMM.CHECKPOINT', path).eval()
    for module in twin.head.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    shared = {k: v for k, v in twin.state_dict().items() if '.net.' not in k and '.bottom_up.' not in k}
    model.load_state_dict(shared, strict=False)
    if name != 'dyconv_resnet18':  # whose experts differ: only equal gates keep the function
        with_lively_gates(model)
    inputs = images((60, 50), (96, 128))
    moved = []
    for each in (twin, model):
        with torch.no_grad():
            alone, padded = (each(batch)[0]['instances'].scores[:10] for batch in (inputs[:1], inputs))
        moved.append(padded - alone)
    most = moved[0].abs().max().item()
    assert most > 1e-4
    torch.testing.assert_close(moved[1], moved[0], rtol=0, atol=0.02 * most)


# --- under detectron2's detectors

def with_masks(inputs):
    for each in inputs:
        instances = each['instances']
        instances.gt_masks = PolygonMasks([[[4., 4., 40., 4., 40., 40.]]] * len(instances))
    return inputs


@pytest.mark.parametrize('key', ['condconv', pytest.param('vmoe', marks=SLOW), pytest.param('moe_mlp', marks=SLOW)])
@pytest.mark.parametrize('meta_arch', [pytest.param('GeneralizedRCNN', marks=SLOW), 'MoEGeneralizedRCNN'])
def test_mask_rcnn_trains_and_detects_on_p2_to_p6(key, meta_arch):
    model = detector(*MODELS[key], 'MODEL.META_ARCHITECTURE', meta_arch, 'MODEL.MASK_ON', 'True',
                     'MODEL.ROI_BOX_HEAD.FC_DIM', '16', 'MODEL.ROI_MASK_HEAD.CONV_DIM', '8',
                     'MODEL.ROI_HEADS.NUM_CLASSES', '3', base='coco/Base-RCNN-FPN')
    with EventStorage():
        losses = model.train()(with_masks(images((50, 64), (64, 90))))
    balanced = {'loss_moe_importance', 'loss_moe_vmoe_load'} if meta_arch[:3] == 'MoE' and key != 'condconv' else set()
    assert balanced | {'loss_cls', 'loss_mask', 'loss_rpn_cls'} <= set(losses)
    assert balanced == {name for name in losses if 'moe' in name}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.backbone.parameters())
    with torch.no_grad():
        assert 'instances' in model.eval()(images((50, 64)))[0]


@pytest.mark.parametrize('key', [pytest.param('condconv', marks=SLOW), 'vmoe'])
@pytest.mark.parametrize('arch', [pytest.param(FCOS, marks=SLOW), MoEFCOS])
def test_fcos_trains_and_detects_on_p3_to_p7(key, arch):
    backbone, levels = detector(*MODELS[key]).backbone, [f'p{n}' for n in range(3, 8)]
    model = arch(
        backbone=backbone, head=FCOSHead(
            input_shape=[backbone.output_shape()[level] for level in levels], num_classes=3, conv_dims=[8]),
        head_in_features=levels, num_classes=3, pixel_mean=[120.] * 3, pixel_std=[60.] * 3)
    with EventStorage():
        losses = model.train()(images((50, 64), (64, 90)))
    assert {name for name in losses if 'moe' in name} == (
        {'loss_moe_importance', 'loss_moe_vmoe_load'} if arch is MoEFCOS and key == 'vmoe' else set())
    sum(losses.values()).backward()
    with torch.no_grad():
        assert 'instances' in model.eval()(images((50, 64)))[0]


@pytest.mark.parametrize('key', ['vmoe', pytest.param('moe_mlp', marks=SLOW)])
def test_a_frozen_backbone_trains_its_heads(key):
    """Its gates still decide and are still logged, but nothing of it moves."""
    model = detector(*MODELS[key], 'MODEL.BACKBONE.FREEZE_AT', '5').train()
    with EventStorage():
        losses = model(images((50, 64), (64, 90)))
    sum(losses.values()).backward()
    net = model.backbone.net if hasattr(model.backbone, 'net') else model.backbone.bottom_up
    assert all(p.grad is None for p in net.parameters())
    assert all(p.grad is not None for p in model.head.parameters())
