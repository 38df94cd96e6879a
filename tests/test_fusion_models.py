"""fusion_trio: normalisation, sizes and freezing of its encoders, and what the whole adds to the layer."""
import dataclasses
import json

import pytest
import timm
import torch
from timm.models import _registry, get_pretrained_cfg, group_parameters, save_for_hf
from timm.optim import create_optimizer_v2
from torch.nn import functional as F

import moe_zoo  # noqa: F401 - registers the models
from moe_zoo.analysis import count
from moe_zoo.engine.task import MoEClassificationTask
from moe_zoo.errors import InputError
from moe_zoo.layers.situational_fusion import MODES, measure_affinity

SMALL = ('test_resnet', 'test_efficientnet', 'test_vit')  # of timm's, made for tests: 160 x 160
ANY_SIZE = ('test_resnet', 'test_efficientnet')
AFFINITY = ((0., .5, .2), (.5, 0., .1), (.2, .1, 0.))


def trio(encoders=SMALL, num_classes=5, **kwargs):
    size = dict(img_size=64) if 'test_vit' in encoders else {}
    return timm.create_model('fusion_trio', encoders=encoders, num_classes=num_classes, **size, **kwargs)


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 64)


def test_every_encoder_sees_the_images_as_it_normalises_them():
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (timm.data.IMAGENET_DEFAULT_MEAN,
                                                               timm.data.IMAGENET_DEFAULT_STD))
    model = trio().eval()
    seen, gate = [], []
    for encoder in model.encoders:
        encoder.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.fusion.gate.register_forward_pre_hook(lambda module, args: gate.append(args[0]))
    model((images - mean) / std)
    own = [((images - 0.5) / 0.5), (images - mean) / std, ((images - 0.5) / 0.5)]  # ResNet's and ViT's of timm's tests
    for found, expected in zip(seen, own):
        torch.testing.assert_close(found, expected)
    assert torch.equal(gate[0], (images - mean) / std)
    # images may come in with other statistics: those of the configuration
    grey = trio(pretrained_cfg_overlay=dict(mean=(0.5,) * 3, std=(0.5,) * 3))
    assert [encoder.normalises for encoder in grey.encoders] == [False, True, False]


def test_other_numbers_of_channels_are_normalised_by_the_mean_of_the_statistics():
    model = trio(ANY_SIZE, in_chans=1).eval()
    assert model(torch.randn(2, 1, 64, 64)).shape == (2, 5)
    scale, shift = model.encoders[0].scale, model.encoders[0].shift
    assert scale.shape == (1, 1, 1, 1)
    # (0.229 + 0.224 + 0.225) / 3 / 0.5 = 0.452, and ((0.485 + 0.456 + 0.406) / 3 - 0.5) / 0.5 = -0.102
    assert (scale.item(), shift.item()) == pytest.approx((0.452, -0.102))


@pytest.mark.parametrize('mode', MODES)
def test_every_parameter_gets_a_gradient_in_every_mode(mode, x):
    model = trio(mode=mode, single=1).train()
    F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert len(model.encoders) == (1 if mode == 'single' else 3)


@pytest.mark.parametrize('mode', MODES)
def test_no_image_depends_on_another_and_evaluation_repeats_itself(mode, x):
    model = trio(mode=mode, representation_drop=0.5, drop_rate=0.5, affinity=AFFINITY).eval()
    y = model(x)
    assert torch.equal(model(x), y)
    torch.testing.assert_close(torch.cat([model(x[:1]), model(x[1:])]), y, rtol=1e-4, atol=1e-5)


def test_a_single_representation_costs_no_other():
    whole, one = (timm.create_model('fusion_trio', device='meta', **kwargs).eval()
                  for kwargs in ({}, dict(mode='single', single=1)))
    image = torch.empty(1, 3, 224, 224, device='meta')
    cost, single = count(whole, image), count(one, image)
    assert [encoder.name for encoder in one.encoders] == ['mobilenetv3_small_100']
    # MobileNetV3-small without its classifier, and a new one of 1024 x 1000
    encoder = count(timm.create_model('mobilenetv3_small_100', device='meta', num_classes=0), image)
    assert single.macs_max == single.macs_executed == encoder.macs_max + 1024 * 1000
    assert single.parameters == single.active_parameters == encoder.parameters + 1025 * 1000
    assert cost.macs_max == cost.macs_executed > 50 * single.macs_max
    assert cost.active_parameters == cost.parameters  # dense: everything runs


def test_frozen_encoders_do_not_move(x):
    model = trio(freeze_encoders=True).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = create_optimizer_v2(model, opt='adamw', lr=0.1, weight_decay=0.1)
    for _ in range(2):  # the weights of the router start at zero: the gate moves in the second step
        F.cross_entropy(model(x), torch.tensor([0, 1])).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, _ in model.named_parameters() if name.startswith('fusion.')}
    assert model.training and not any(module.training for module in model.encoders.modules() if module is not
                                      model.encoders)
    loose = trio().train()
    before = {name: tensor.clone() for name, tensor in loose.encoders.named_buffers()}
    loose(x)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in loose.encoders.named_buffers())


def test_losses_go_through_the_task(x):
    model = trio(losses=[['affinity', 0.5], ['gate_entropy', 0.1]], affinity=AFFINITY)
    task = MoEClassificationTask(model, F.cross_entropy, verbose=False)
    result = task.train()(x, torch.tensor([0, 1]))
    # even gates of a new model: (0.5 + 0.2 + 0.1) * 2 / 9, and no lack of entropy
    assert float(result['loss_affinity']) == pytest.approx(0.5 * 1.6 / 9)
    assert float(result['loss_gate_entropy']) == pytest.approx(0., abs=1e-6)
    torch.testing.assert_close(result['loss'], result['task_loss'] + 0.5 * 1.6 / 9, rtol=1e-5, atol=1e-5)


def test_affinity_is_measured_and_saved(x):
    model = trio()
    images = torch.randn(8, 3, 64, 64)
    affinity = measure_affinity(model, images)
    model.fusion.set_affinity(affinity)
    assert affinity.shape == (3, 3) and affinity.max() > 0 and model.training
    other = trio()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.fusion.affinity, affinity)


def test_feature_levels_are_the_last_maps_from_fine_to_coarse(x):
    model = trio(('test_resnet', 'test_vit'), features_only=True).eval()
    assert model.feature_info.reduction() == [16, 32] and model.feature_info.channels() == [64, 96]
    assert [tuple(each.shape) for each in model(x)] == [(2, 64, 4, 4), (2, 96, 2, 2)]
    coarse = trio(('test_resnet', 'test_vit'), features_only=True, out_indices=[1])
    assert [encoder.name for encoder in coarse.model.encoders] == ['test_resnet']
    assert [tuple(each.shape) for each in coarse(x)] == [(2, 96, 2, 2)]


def test_no_weight_decay_and_groups():
    model = trio()
    assert model.no_weight_decay() >= {'encoders.2.net.pos_embed', 'encoders.2.net.cls_token'}
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups.values()) == {0, 1}
    assert all((groups[name] == 1) == name.startswith('fusion.') for name in groups)


def test_a_saved_model_is_loaded_again_without_a_download(tmp_path, x):
    model = trio(freeze_encoders=True, affinity=AFFINITY, losses=[['affinity', 0.1]], mode='feature').eval()
    save_for_hf(model, tmp_path)
    arguments = json.loads((tmp_path / 'config.json').read_text())['model_args']
    assert not {'pretrained', 'encoder_pretrained'} & set(arguments) and arguments['freeze_encoders']
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert torch.equal(again(x), model(x)) and not again.encoders[0].training
    assert again.fusion.router.losses == (('affinity', 0.1),)


def test_pretrained_means_the_weights_of_the_encoders(tmp_path, monkeypatch, x):
    nets = {}
    for name in ANY_SIZE:  # a file beside the name in the hub: what timm loads first
        nets[name] = timm.create_model(name).eval()
        path = tmp_path / f'{name}.pth'
        torch.save(nets[name].state_dict(), path)
        local = dataclasses.replace(get_pretrained_cfg(name), file=str(path))
        monkeypatch.setitem(_registry._model_pretrained_cfgs, name, local)
    model = trio(ANY_SIZE, pretrained=True).eval()
    for encoder in model.encoders:
        loaded, source = encoder.net.state_dict(), nets[encoder.name].state_dict()
        assert loaded and all(torch.equal(loaded[key], source[key]) for key in loaded)
    assert 'pretrained' not in model._model_args
    # weights of the whole go before those of the encoders
    state = trio(ANY_SIZE).state_dict()
    whole = trio(ANY_SIZE, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state, num_classes=5))
    assert all(torch.equal(tensor, state[name]) for name, tensor in whole.state_dict().items())


def test_weights_that_cannot_be_fetched_are_one_sentence(monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(InputError, match=r"weights of the encoder 'test_resnet\.r160_in1k' cannot be fetched \("):
        trio(['test_resnet.r160_in1k'], pretrained=True)


@pytest.mark.parametrize('kwargs, message', [
    (dict(encoders=['resnet18', 'vit_base_patch16_384']),
     r"The encoder 'vit_base_patch16_384' takes images of 384 x 384 only, and the images are 224 x 224: use encoders "
     r'of one input size, or give img_size to build all of them for one\.'),
    (dict(encoders=['resnet18', 'resnet_18']), r"timm has no model 'resnet_18'\. Did you mean 'resnet18'"),
    (dict(encoders=[]), 'at least one expert'),
    (dict(encoders=['resnet18.a9_in1k']), r"timm has no weights 'resnet18\.a9_in1k'\. Did you mean 'resnet18\."),
    (dict(encoders=['xcit_nano_12_p16_224'], img_size=100), r"The encoder 'xcit_nano_12_p16_224' cannot be built with"),
    (dict(encoders=['resnet18', 'crossvit_9_240'], img_size=224),
     r"The encoder 'crossvit_9_240' cannot run on images of 224 x 224, though timm builds it for them: use other "
     r'encoders, or an img_size such as its own, 240 x 240\.'),
    (dict(encoders=['mobilenetv2_035'], pretrained=True), "'mobilenetv2_035' cannot be built .*: No pretrained"),
    (dict(mode='single', single=3), r'single=3: there are 3 encoders, counted from 0'),
    (dict(mode='actions'), r"mode='actions' is not one of action, feature, concat, mean, single\."),
    (dict(affinity=[[0, .2, 0], [.9, 0, 0], [0, 0, 0]]), r'affinity is not symmetric, \[0\]\[1\] is 0\.2 and'),
    (dict(encoder_pretrained=True), r"encoder_pretrained: say pretrained=True for timm's weights of the encoders"),
])
def test_a_wrong_argument_is_one_sentence(kwargs, message):
    with pytest.raises(InputError, match=message):
        timm.create_model('fusion_trio', device='meta', **kwargs)


def test_encoders_of_another_size_are_built_for_the_size_that_is_asked_for():
    model = timm.create_model('fusion_trio', encoders=('resnet18', 'vit_tiny_patch16_384'), img_size=96, num_classes=3)
    assert model.encoders[1].net.patch_embed.img_size == (96, 96)
    assert model.eval()(torch.randn(1, 3, 96, 96)).shape == (1, 3)
