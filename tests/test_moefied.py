"""`moefy` and the name `moefied`: the function is kept, routing is heard, arguments rebuild it, refusals are clear."""
import copy
import json
import pickle

import pytest
import test_timm_host
import timm
import timm_host
import torch
from host_contract import fx_model
from image_folders import write_images
from timm.layers import Format, GluMlp, Mlp, SwiGLU, set_reentrant_ckpt
from timm.models import save_for_hf
from torch import nn

import moe_zoo
from moe_zoo import cli
from moe_zoo.checkpoints.shrink import prune
from moe_zoo.errors import InputError
from moe_zoo.layers import DynamicConv2d, MoEConv2d, MoEMlp, RoutedConv2d
from moe_zoo.losses import auxiliary_losses
from moe_zoo.routing import trace_routing

SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
SMALL_SWIN = dict(depths=(1, 1, 1, 1), embed_dim=24, num_heads=(1, 2, 4, 8))
# base, its keywords, size of an image, targets, layer, keywords of the layer
CASES = {
    'resnet': ('resnet18', {}, 64, 'layer4.*.conv2', 'condconv', {}, RoutedConv2d, 2),
    'resnet-chosen': ('resnet18', {}, 64, ['layer4.0.conv1', 'layer4.1.conv?'], 'moe_conv', {'num_selected': 1},
                      MoEConv2d, 3),
    'efficientnet': ('tf_efficientnet_lite0', {}, 64, 'blocks.5.*.conv_dw', 'dyconv', {}, DynamicConv2d, 4),
    'convnext': ('convnext_atto', {}, 64, 'stages.3.*.mlp', 'moe_mlp', {}, MoEMlp, 2),
    'swin': ('swinv2_cr_tiny_224', {'img_size': 224, 'depths': (1, 1, 1, 1)}, 224, 'stages.3.*.mlp', 'moe_mlp', {},
             MoEMlp, 1),
    'vit': ('vit_tiny_patch16_224', SMALL, 32, 'blocks.*.mlp', 'moe_mlp', {'num_selected': 1}, MoEMlp, 2),
    'eva-glu': ('eva02_tiny_patch14_224', {**SMALL, 'img_size': 28, 'patch_size': 14, 'swiglu_mlp': True}, 28,
                'blocks.*.mlp', 'moe_mlp', {}, MoEMlp, 2),
    'eva-swiglu': ('eva02_base_patch14_224', {**SMALL, 'img_size': 28, 'patch_size': 14}, 28, 'blocks.*.mlp',
                   'moe_mlp', {}, MoEMlp, 2),
    'vit-glu': ('vit_tiny_patch16_224', {**SMALL, 'mlp_layer': GluMlp}, 32, 'blocks.*.mlp', 'moe_mlp', {}, MoEMlp, 2),
}


def dense(base: str, **kwargs) -> torch.nn.Module:
    """A model whose every weight tells, with norms that have seen something."""
    torch.manual_seed(0)
    model = timm.create_model(base, num_classes=5, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize('case', CASES)
def test_the_function_is_kept(case):
    base, kwargs, size, targets, layer, args, cls, count = CASES[case]
    model, x = dense(base, **kwargs), torch.randn(2, 3, size, size)
    with torch.no_grad():
        before = model(x)
        assert before.std() > 1e-3
        routed = moe_zoo.moefy(model, targets, layer, num_experts=4, **args)
        with trace_routing(routed) as trace:
            after = routed(x)
    assert routed is model
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert len(trace) == count and all(isinstance(routed.get_submodule(name), cls) for name in trace)


def test_it_trains_with_its_auxiliary_losses():
    model = moe_zoo.moefy(dense('vit_tiny_patch16_224', **SMALL), 'blocks.0.mlp', num_experts=4).train()
    model.set_aux_loss(True)
    logits, routings = model(torch.randn(4, 3, 32, 32))
    assert len(routings) == 1 and routings[0].indices.shape == (4 * 17, 2)
    losses = auxiliary_losses(routings)
    assert set(losses) == {'importance', 'vmoe_load'}
    (logits.square().sum() + sum(losses.values())).backward()
    assert all(p.grad is not None for p in model.parameters())
    chosen = routings[0].indices[routings[0].kept].unique()
    moved = model.blocks[0].mlp.fc1.weight.grad.abs().sum(dim=(1, 2)).gt(0)
    assert moved.nonzero().flatten().tolist() == chosen.tolist()


def test_it_is_one_model_with_its_copies():
    """EMA copies a model; a copy must be as routed as the original, and independent of it."""
    model = moe_zoo.moefy(dense('resnet18'), 'layer4.*.conv2', 'condconv', num_experts=2)
    twin, x = copy.deepcopy(model), torch.randn(1, 3, 64, 64)
    assert type(twin) is type(model)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), model(x))
        twin.layer4[0].conv2.weight.zero_()
        assert not torch.allclose(twin(x), model(x))


@pytest.mark.parametrize('case', ['resnet-chosen', 'efficientnet', 'convnext'])
@pytest.mark.parametrize('to', [torch.bfloat16, torch.channels_last], ids=str)
def test_a_type_and_a_memory_format_stay(case, to):
    base, kwargs, size, targets, layer, args, _, _ = CASES[case]
    to = dict(memory_format=to) if to is torch.channels_last else dict(dtype=to)
    model, x = dense(base, **kwargs).to(**to), torch.randn(1, 3, size, size).to(**to)
    with torch.no_grad():
        before = model(x)
        after = moe_zoo.moefy(model, targets, layer, num_experts=2, **args)(x)
    assert after.dtype == before.dtype and {p.dtype for p in model.parameters()} == {x.dtype}
    # bfloat16 rounds to 1 in 256, in every layer
    atol = before.abs().max().item() / 32 if x.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(after, before, atol=atol, rtol=0)


def test_narrow_experts_are_slices_of_the_mlp():
    model, x = dense('vit_tiny_patch16_224', **SMALL), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        layer = moe_zoo.moefy(model, 'blocks.1.mlp', num_experts=4, expert_ratio=2).blocks[1].mlp
        assert layer.fc1.weight.shape == (8, 64, 32)  # 4 x 2 experts of 128 / 2
        torch.testing.assert_close(model(x), before, atol=1e-4, rtol=1e-4)


def test_of_any_image_size_it_is_traced_as_its_base():
    """timm resizes the table of positions by a function that FX has to leave whole."""
    model = dense('vit_tiny_patch16_224', dynamic_img_size=True, **SMALL)
    moe_zoo.moefy(model, 'blocks.*.mlp', num_experts=2)
    x = torch.randn(1, 3, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(next(iter(fx_model(model)(x).values())), model(x))


@pytest.mark.slow
def test_compiled_it_returns_its_records():
    model = timm.create_model('convnext_atto', depths=(1, 1, 1, 1), num_classes=5)
    model = moe_zoo.moefy(model, 'stages.2.*.mlp', num_experts=2, noise_std=0.).train()
    model.set_aux_loss(True)
    compiled, x = torch.compile(model, backend='aot_eager', fullgraph=True), torch.randn(2, 3, 64, 64)
    router = model.stages[2].blocks[0].mlp.router.weight

    def gradient(run):
        logits, routings = run(x)
        loss = logits.square().sum() + sum(auxiliary_losses(routings).values())
        return torch.autograd.grad(loss, router)[0]

    expected = gradient(model)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient(compiled), expected, atol=1e-5, rtol=1e-3)
    with pytest.raises(InputError, match='^The model is compiled: give moefy the model itself, and compile what it re'):
        moe_zoo.moefy(compiled, '*.mlp')


def test_other_layers_of_a_model_that_is_routed_already():
    model = moe_zoo.moefy(dense('resnet18'), 'layer4.0.conv2', 'condconv', num_experts=2)
    cls, x = type(model), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        model.layer4[0].conv2.weight.mul_(1.5)  # it has been trained
        before = model(x)
        moe_zoo.moefy(model, 'layer4.1.conv2', 'moe_conv', num_experts=4)
        torch.testing.assert_close(model(x), before, atol=1e-4, rtol=1e-4)
    assert type(model) is cls and isinstance(model.layer4[0].conv2, RoutedConv2d)
    with pytest.raises(InputError, match='matches only RoutedConv2d'):
        moe_zoo.moefy(model, 'layer4.0.conv2', 'moe_conv')


def test_registered_name_takes_keywords_of_layer_and_base():
    model = timm.create_model(
        'moefied', base='vit_tiny_patch16_224', targets='blocks.1.mlp', layer='moe_mlp', num_experts=4, num_selected=1,
        num_classes=7, in_chans=1, **SMALL)
    assert isinstance(model.blocks[1].mlp, MoEMlp) and model.blocks[1].mlp.num_selected == 1
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 7)
    assert model.pretrained_cfg['architecture'] == 'moefied'
    assert model.pretrained_cfg['mean'] == timm.get_pretrained_cfg('vit_tiny_patch16_224').mean
    assert not model.pretrained_cfg.get('hf_hub_id') and not model.pretrained_cfg.get('url')
    with pytest.raises(TypeError, match='no_such_keyword'):
        timm.create_model('moefied', no_such_keyword=1)


def test_features_of_a_convnext_for_an_fpn():
    kwargs = dict(base='convnext_atto', targets='stages.2.*.mlp', layer='moe_mlp', num_experts=2)
    model = timm.create_model('moefied', features_only=True, out_indices=(1, 2, 3), **kwargs)
    assert model.feature_info.channels() == [80, 160, 320] and model.feature_info.reduction() == [8, 16, 32]
    assert [tuple(f.shape[1:]) for f in model(torch.randn(1, 3, 64, 64))] == [(80, 8, 8), (160, 4, 4), (320, 2, 2)]
    assert len(timm.create_model('moefied', features_only=True, **kwargs).feature_info.channels()) == 4  # its stages


# base and its keywords, size of an image, targets, layer
BASES = {
    'convnext': (dict(base='convnext_atto'), 64, 'stages.2.*.mlp', 'moe_mlp'),
    'swinv2': (dict(base='swinv2_tiny_window8_256', img_size=64, **SMALL_SWIN), 64, 'layers.*.mlp', 'moe_mlp'),
    'vit': (dict(base='vit_tiny_patch16_224', **{**SMALL, 'depth': 3}), 32, 'blocks.*.mlp', 'moe_mlp'),
    'resnet': (dict(base='resnet18', layers=(1, 1, 1, 2), channels=(8, 8, 16, 16)), 64, 'layer4.*.conv2', 'condconv'),
    'efficientnet': (dict(base='efficientnet_b0'), 64, 'blocks.5.*.conv_pw', 'dyconv'),
}


@pytest.mark.parametrize('case, chosen', [*((case, {}) for case in BASES), ('convnext', dict(out_indices=(-2, -1)))])
def test_features_are_those_of_the_base(case, chosen):
    kwargs, size, targets, layer = BASES[case]
    base_args = {key: value for key, value in kwargs.items() if key != 'base'}
    weights = dense(kwargs['base'], **base_args).state_dict()
    both = dict(pretrained=True, pretrained_cfg_overlay=dict(state_dict=weights), features_only=True, **chosen)
    base = timm.create_model(kwargs['base'], **base_args, **both).eval()
    model = timm.create_model('moefied', targets=targets, layer=layer, num_experts=2, **kwargs, **both).eval()
    assert model.feature_info.channels() == base.feature_info.channels()
    assert model.feature_info.reduction() == base.feature_info.reduction()
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        expected, found = base(x), model(x)
    if getattr(base, 'output_fmt', None) == Format.NHWC:
        expected = [each.permute(0, 3, 1, 2) for each in expected]
    assert model.output_fmt == Format.NCHW and all(each.std() > 1e-3 for each in expected)
    torch.testing.assert_close(found, list(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('base, targets, layer, levels', [
    ('vgg11', 'features.18', 'condconv', (0, 1, 2, 3, 4, 5)), ('crossvit_9_240', '*.mlp', 'moe_mlp', (2, 5))])
def test_levels_are_those_that_timm_gives_for_the_base(base, targets, layer, levels):
    kwargs = dict(features_only=True, device='meta')
    model = timm.create_model('moefied', base=base, targets=targets, layer=layer, **kwargs)
    assert model.feature_info.out_indices == levels
    assert model.feature_info.channels() == timm.create_model(base, **kwargs).feature_info.channels()


def test_dense_weights_of_the_base_are_upcycled_and_its_own_are_taken(tmp_path):
    base, x = dense('resnet18'), torch.randn(1, 3, 64, 64)
    kwargs = dict(base='resnet18', targets='layer4.*.conv2', layer='condconv', num_experts=2, num_classes=5)
    weights = {**base.state_dict()}
    overlay = dict(state_dict=weights, num_classes=5)
    model = timm.create_model('moefied', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(x), base(x), atol=1e-4, rtol=1e-4)
    own = {name: value + 0.01 if 'routing_fn' in name else value for name, value in model.state_dict().items()}
    overlay = dict(state_dict=own, num_classes=5)
    again = timm.create_model('moefied', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    assert all(torch.equal(value, own[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize('case', BASES)
def test_saved_to_a_folder_and_reloaded_from_its_arguments(case, tmp_path):
    kwargs, size, targets, layer = BASES[case]
    weights = dense(**kwargs).state_dict()
    model = timm.create_model(
        'moefied', targets=targets, layer=layer, num_experts=2, num_classes=5, pretrained=True,
        pretrained_cfg_overlay=dict(state_dict=weights, num_classes=5), **kwargs).eval()
    save_for_hf(model, tmp_path)
    args = json.loads((tmp_path / 'config.json').read_text())['model_args']
    assert not {'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay'} & set(args) and args['base'] == kwargs['base']
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize('case, kind', [('eva-glu', GluMlp), ('eva-swiglu', SwiGLU), ('vit-glu', GluMlp), ('vit', Mlp)])
def test_experts_are_what_the_mlp_was(case, kind):
    """The cases above hold what they say, and cost k of them."""
    base, kwargs, _, _, _, args, _, _ = CASES[case]
    model = dense(base, **kwargs)
    assert type(model.blocks[0].mlp) is kind
    macs = sum(p.numel() for p in model.blocks[0].mlp.parameters() if p.dim() > 1)
    layer = moe_zoo.moefy(model, 'blocks.0.mlp', num_experts=4, **args).blocks[0].mlp
    assert layer.max_macs((1, 5, 32)) == 5 * (layer.num_selected * macs + 4 * 32)  # and the router


@pytest.mark.parametrize('reentrant', [False, True])
def test_gradient_checkpointing(reentrant):
    """Plain checkpointing keeps the gradients of the auxiliary losses; the re-entrant kind would drop them."""
    model = moe_zoo.moefy(dense('vit_tiny_patch16_224', **SMALL), 'blocks.1.mlp', num_experts=4, noise_std=0.).train()
    model.set_aux_loss(True)
    x = torch.randn(4, 3, 32, 32)

    def router_gradient():
        model.zero_grad()
        _, routings = model(x)
        sum(auxiliary_losses(routings).values()).backward()
        return model.blocks[1].mlp.router.weight.grad.clone()

    wanted = router_gradient()
    model.set_grad_checkpointing(True)
    set_reentrant_ckpt(reentrant)
    try:
        if reentrant:
            with pytest.raises(InputError, match='^Re-entrant gradient checkpointing loses the gradient of auxiliary'):
                router_gradient()
        else:
            assert wanted.abs().max() > 0
            torch.testing.assert_close(router_gradient(), wanted)
    finally:
        set_reentrant_ckpt(False)


def test_what_moefy_made_is_saved_and_pruned_as_what_it_has_become(tmp_path):
    small = dict(layers=(1, 1, 1, 2), channels=(8, 8, 16, 16))
    model, x = dense('resnet18', **small), torch.randn(2, 3, 32, 32)
    moe_zoo.moefy(model, 'layer4.*.conv2', 'moe_conv', num_experts=4)
    with torch.no_grad(), trace_routing(model) as trace:
        model(x)
    assert model._model_args['base'] == 'resnet18.a1_in1k' and model._model_args['num_classes'] == 5
    for each in (model, prune(model, trace, keep=2)):
        save_for_hf(each, tmp_path)
        again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
        assert again.layer4[0].conv2.num_experts == each.layer4[0].conv2.num_experts
        with torch.no_grad():
            assert torch.equal(again(x), each(x))
    # A second round is not what the name can say, and a model of none of timm's names has no arguments.
    moe_zoo.moefy(model, 'layer3.*.conv2', 'condconv', num_experts=2)
    routed = timm.create_model('condconv_resnet18', num_experts=3, **small)  # of which `num_experts` is said already
    moe_zoo.moefy(routed, 'layer1.*.conv2', 'moe_conv', num_experts=4)
    plain = moe_zoo.moefy(timm.models.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1)), 'conv1', 'condconv')
    for each in (model, routed, plain):
        with torch.no_grad(), trace_routing(each.eval()) as trace:
            each(x)
        with pytest.raises(InputError, match='ResNet: only a model made by timm.create_model can be made again'):
            prune(each, trace, keep=2)


def test_a_routed_stem_takes_other_channels():
    base = dense('resnet18')
    overlay = dict(state_dict=base.state_dict(), num_classes=5)
    kwargs = dict(num_classes=5, in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay)
    model = timm.create_model('moefied', base='resnet18', targets='conv1', num_experts=3, **kwargs).eval()
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            model(x), timm.create_model('resnet18', **kwargs).eval()(x), atol=1e-4, rtol=1e-4)


def test_pickled_whole_it_is_the_same_model():
    model, x = timm.create_model('moefied', base='resnet18', num_classes=5).eval(), torch.randn(2, 3, 32, 32)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_a_distilled_base_keeps_its_two_outputs():
    model = timm.create_model(
        'moefied', base='deit_tiny_distilled_patch16_224', targets='blocks.1.mlp', layer='moe_mlp', num_classes=5,
        **SMALL).train()
    model.set_distilled_training()
    outputs = model(torch.randn(2, 3, 32, 32))
    assert [tuple(each.shape) for each in outputs] == [(2, 5), (2, 5)]


def test_refusals():
    model = dense('resnet18')
    before = model.state_dict().keys()
    for targets, layer, message in [
        ('layer4.*.conv9', 'condconv', r"^targets='layer4.\*.conv9' matches no module, and layer='condconv' replaces a "
                                       r"plain convolution. Did you mean 'layer4.1.conv"),
        ('layer4.*.bn1', 'condconv', "matches only BatchNorm2d, and layer='condconv' replaces a plain convolution"),
        ('layer4.*', 'moe_mlp',
         r"^targets='layer4.\*' matches only BasicBlock, .* replaces timm's Mlp, GluMlp or SwiGLU\.$"),
        ('layer4.*.conv2', 'condcnv', "^layer='condcnv' is unknown. Did you mean 'condconv'"),
    ]:
        with pytest.raises(InputError, match=message):
            moe_zoo.moefy(model, targets, layer)
    with pytest.raises(InputError, match="^'dyconv' has no keyword 'temprature'. Did you mean 'temperature'"):
        moe_zoo.moefy(model, 'layer4.*.conv2', 'dyconv', temprature=1)
    for targets in ([], None, 5, [None]):
        with pytest.raises(InputError, match='^targets=.*: give the name of a module, or a pattern of names'):
            moe_zoo.moefy(model, targets, 'condconv')
    assert model.state_dict().keys() == before and type(model) is timm.models.ResNet
    # 64 hidden units in the first of two MLPs, 66 in the second: 4 narrower experts for each expert fit the first alone
    two = nn.Sequential(Mlp(8, 64), Mlp(8, 66))
    with pytest.raises(InputError, match='expert_ratio=4 does not divide the hidden width 66'):
        moe_zoo.moefy(two, '*', expert_ratio=4)
    assert all(type(module) is Mlp for module in two)
    with pytest.raises(InputError, match="^base='resnet81' is no model of timm. Did you mean 'resnet18'"):
        timm.create_model('moefied', base='resnet81')
    with pytest.raises(InputError, match='^base=5 is no model of timm'):
        timm.create_model('moefied', base=5)
    with pytest.raises(InputError, match="^base='resnet18.nothing': resnet18 has no weights of this tag. Did you"):
        timm.create_model('moefied', base='resnet18.nothing')
    with pytest.raises(InputError, match="^pretrained=True: base='mobilenetv2_035' has no file to download; pass"):
        timm.create_model('moefied', base='mobilenetv2_035', targets='conv_stem', pretrained=True)


# timm's own tests. Its two lists go by name, so that a token model under this name is put into the one of token models,
# as the name of its base is; sizes of images are those of what is built.

REFUSED = [
    (['base=resnet81'], "base='resnet81' is no model of timm. Did you mean 'resnet18'"),
    (['base=resnet18', 'targets=layer9.*'], "targets='layer9.*' matches no module, and layer='condconv' repl"),
    (['base=resnet18', 'layer=condcnv'], "layer='condcnv' is unknown. Did you mean 'condconv'"),
    (['base=resnet18', 'num_selected=1'], "unexpected keyword argument 'num_selected'. Did you mean 'num_experts'?"),
]


def refusal(arguments, capsys) -> str:
    """What the command line says: one line, exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(each) for each in arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith('error: ') and error.count('\n') == 1
    return error


@pytest.mark.parametrize('options, message', [
    *REFUSED,
    (['base=resnet10t'], 'of another architecture than the model: conv1.0.weight is missing in them, and the')
])
def test_what_cannot_be_converted_is_told_and_nothing_written(options, message, tmp_path, capsys):
    torch.save(timm.create_model('resnet18').state_dict(), tmp_path / 'dense.pth')
    error = refusal(['convert-checkpoint', 'upcycle', tmp_path / 'dense.pth', tmp_path / 'out.safetensors', '--model',
                     'moefied', '--model-kwargs', *options], capsys)
    assert message in error and [path.name for path in tmp_path.iterdir()] == ['dense.pth']


@pytest.mark.parametrize('options, message', [
    *REFUSED,
    (['base=resnet18'], "the weights of base='resnet18' cannot be fetched"),
    (['base=mobilenetv2_035', 'targets=conv_stem'], "base='mobilenetv2_035' has no file to download"),
])
def test_what_cannot_be_finetuned_is_told_and_nothing_written(options, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'hub'))
    folder = write_images(tmp_path / 'data', {'train': 1, 'val': 1})
    error = refusal(['finetune', '--model', 'moefied', '--data-dir', folder, f'output={tmp_path / "run"}',
                     *(f'model_kwargs.{option}' for option in options)], capsys)
    assert message in error and not (tmp_path / 'run').exists()
    if 'fetched' in message or 'download' in message:
        assert error.endswith('as pretrained_path=FILE (finetune: --from-dense FILE).\n')


def test_weights_that_modules_share_are_told():
    model = dense('vit_tiny_patch16_224', **SMALL)
    model.blocks[1].mlp.fc1.weight = model.blocks[0].mlp.fc1.weight
    for targets in ('blocks.0.mlp', 'blocks.1.mlp', '*'):
        with pytest.raises(InputError, match=r'^targets: blocks.0.mlp.fc1.weight and blocks.1.mlp.fc1.weight are one '):
            moe_zoo.moefy(model, targets)
    model.blocks[1].mlp = model.blocks[0].mlp  # one module at two places
    with pytest.raises(InputError, match=r'^targets: blocks.0.mlp.fc1.weight and blocks.1.mlp.fc1.weight are one '):
        moe_zoo.moefy(model, 'blocks.1.mlp')


def test_parts_of_routed_layers_are_no_targets():
    model = timm.create_model('moe_resnet18', layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), num_classes=5)
    with pytest.raises(InputError, match=r"^targets='layer4.\*.conv1' matches only Conv2d inside routed layers, and"):
        moe_zoo.moefy(model, 'layer4.*.conv1', 'condconv')
    moe_zoo.moefy(model, '*.conv1', 'condconv')
    assert {name.partition('.')[0] for name, m in model.named_modules() if isinstance(m, RoutedConv2d)} == {
        'layer1', 'layer2', 'layer3'}


def test_overlapping_patterns_replace_once():
    model = moe_zoo.moefy(dense('vit_tiny_patch16_224', **SMALL), ('blocks.*.mlp', 'blocks.0.*', '*mlp'), num_experts=2)
    assert [name for name, m in model.named_modules() if isinstance(m, MoEMlp)] == ['blocks.0.mlp', 'blocks.1.mlp']


def test_weights_that_cannot_be_upcycled_leave_the_model_as_it_is():
    model, x = dense('resnet18'), torch.randn(1, 3, 64, 64)
    conv = model.layer4[0].conv2
    conv.weight_v = nn.Parameter(conv.weight.detach())  # as old code normalises weights: they are no parameter
    del conv.weight
    conv.weight = conv.weight_v.data
    with torch.no_grad():
        before = model(x)
        with pytest.raises(InputError, match='layer4.0.conv2.weight is missing in them'):
            moe_zoo.moefy(model, 'layer4.*.conv2', 'condconv')
        assert type(model) is timm.models.ResNet and type(model.layer4[0].conv2) is nn.Conv2d
        assert torch.equal(model(x), before)


@pytest.mark.slow
@test_timm_host.needs_timm_tests
@pytest.mark.parametrize('kwargs, tests', [
    (dict(base='convnext_atto', targets='stages.2.*.mlp', layer='moe_mlp'), test_timm_host.GRID),
    (dict(base='tf_efficientnet_lite0', targets='blocks.5.*.conv_pw', layer='dyconv'), test_timm_host.GRID),
    (dict(base='resnet26', targets='layer4.*.conv2', layer='moe_conv'), test_timm_host.GRID),
    (dict(base='swinv2_tiny_window8_256', targets='layers.3.*.mlp', layer='moe_mlp', img_size=128, **SMALL_SWIN,
          pretrained_cfg_overlay=dict(input_size=(3, 128, 128), pool_size=(4, 4))), test_timm_host.GRID),
    (dict(base='vit_tiny_patch16_224', targets='blocks.*.mlp', layer='moe_mlp', num_experts=4, depth=4),
     test_timm_host.TOKENS),
], ids=lambda value: value['base'] if isinstance(value, dict) else '')
def test_timms_own_tests_pass_on_other_bases(kwargs, tests, tmp_path):
    non_std = [*timm_host.NON_STD_FILTERS, *['moefied'] * (tests is test_timm_host.TOKENS)]
    found = timm_host.run(
        ['moefied'], test_timm_host.MODULES, tmp_path, non_std=non_std, kwargs={'moefied': kwargs})
    test_timm_host.check('moefied', found['moefied'], tests)
