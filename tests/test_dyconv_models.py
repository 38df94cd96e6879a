"""Dynamic Convolution models: exact sizes, dense twins, who attends, and the temperature in training and averages.

timm's own tests run on every name in test_timm_host.py; here stands what timm cannot know.
"""
import pytest
import timm
import torch
from image_folders import write_images
from small_models import load_dense_kernels, randomise_statistics
from timm.utils import ModelEmaV3
from torch import nn

from moe_zoo.engine.checkpoint import read_checkpoint
from moe_zoo.engine.train import train
from moe_zoo.errors import InputError
from moe_zoo.layers import DynamicConv2d
from moe_zoo.models import staged
from moe_zoo.routing import set_epoch, trace_routing

NAMES = timm.list_models('dyconv_*')
TWINS = {
    'dyconv_resnet10': ('resnet18', dict(layers=(1, 1, 1, 1))),
    'dyconv_resnet18': ('resnet18', {}),
    'dyconv_resnet50': ('resnet50', {}),
    'dyconv_mobilenetv2_050': ('mobilenetv2_050', {}),
    'dyconv_mobilenetv2_100': ('mobilenetv2_100', {}),
    'dyconv_mobilenetv3_small_100': ('mobilenetv3_small_100', {}),
}
# One name a kind of network.
KINDS = ['dyconv_mobilenetv2_050', 'dyconv_mobilenetv3_small_100', 'dyconv_resnet10',
         pytest.param('dyconv_resnet50', marks=pytest.mark.slow)]
# Four basic blocks of 8 to 16 channels.
TINY = dict(stem_width=8, stem_type='deep', channels=(8, 8, 16, 16), num_classes=2)


def tiny(**kwargs) -> nn.Module:
    return timm.create_model('dyconv_resnet10', **dict(TINY, **kwargs))


def temperatures(model: nn.Module) -> set[float]:
    routers = [module.routing_fn for module in model.modules() if isinstance(module, DynamicConv2d)]
    return {round(router.current_temperature().item(), 5) for router in routers}


def test_six_names_are_registered():
    assert sorted(NAMES) == sorted(TWINS)


@pytest.mark.parametrize('name', NAMES)
def test_parameters_follow_the_formula(name):
    # dense + (E - 1) R + sum over layers of C h + h + h E + E, with R the elements that are mixed, h = C // 6
    E = 3
    twin, kwargs = TWINS[name]
    dense = sum(p.numel() for p in timm.create_model(twin, device='meta', **kwargs).parameters())
    model = timm.create_model(name, num_experts=E, reduction=6, device='meta')
    expected = dense
    for conv in (m for m in model.modules() if isinstance(m, DynamicConv2d)):
        hidden = max(1, conv.in_channels // 6)
        expected += (E - 1) * conv.weight[0].numel()
        expected += conv.in_channels * hidden + hidden + hidden * E + E
    assert sum(p.numel() for p in model.parameters()) == expected


def test_resnet10_is_one_basic_block_a_stage():
    assert sum(p.numel() for p in timm.create_model('resnet18', layers=(1, 1, 1, 1)).parameters()) == 5_418_792


@pytest.mark.parametrize('name, kwargs, static', [
    ('dyconv_resnet18', {}, ['conv1']),
    ('dyconv_resnet18', dict(dynamic_downsample=False),
     ['conv1', 'layer2.0.downsample.0', 'layer3.0.downsample.0', 'layer4.0.downsample.0']),
    ('dyconv_mobilenetv2_050', {}, ['conv_stem', 'conv_head']),
    ('dyconv_mobilenetv2_050', dict(dynamic_head=True), ['conv_stem']),
    ('dyconv_mobilenetv3_small_100', {}, ['conv_stem', 'blocks.5.0.conv', 'conv_head']),
    ('dyconv_mobilenetv3_small_100', dict(dynamic_head=True), ['conv_stem']),
])
def test_which_convolutions_stay_static(name, kwargs, static):
    model = timm.create_model(name, device='meta', **kwargs)
    found = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and '.se.' not in n]
    assert found == static
    assert isinstance(model.get_classifier(), nn.Linear)
    if 'v3' in name:  # both convolutions of squeeze-and-excitation, in 9 of 11 blocks
        assert sum(isinstance(m, nn.Conv2d) and '.se.' in n for n, m in model.named_modules()) == 18


@pytest.mark.parametrize('name', KINDS)
def test_copies_of_the_dense_kernels_are_the_dense_network(name):
    twin, kwargs = TWINS[name]
    dense = timm.create_model(twin, num_classes=7, **kwargs).eval()
    randomise_statistics(dense)
    model = timm.create_model(name, num_classes=7).eval()
    load_dense_kernels(model, dense)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', ['dyconv_resnet18', 'dyconv_mobilenetv2_050'])
def test_experts_start_as_the_dense_convolution_does(name):
    model = timm.create_model(name)
    conv = model.layer4[1].conv2 if 'resnet' in name else model.blocks[5][0].conv_dw
    # ResNet: kaiming normal, fan out 512 * 9. MobileNet: the fan out of a depthwise kernel is 3 * 3.
    std = (2 / (512 * 9)) ** 0.5 if 'resnet' in name else (2 / 9) ** 0.5
    for expert in conv.weight.unbind(0):
        assert expert.std().item() == pytest.approx(std, rel=0.1)
    assert not torch.equal(conv.weight[0], conv.weight[1])


@pytest.mark.parametrize('name', KINDS)
def test_every_layer_attends_to_its_own_input(name):
    model = timm.create_model(name, num_classes=7).eval()
    inputs = {}
    convs = {n: m for n, m in model.named_modules() if isinstance(m, DynamicConv2d)}
    for layer, conv in convs.items():
        conv.register_forward_pre_hook(lambda module, args, layer=layer: inputs.__setitem__(layer, args[0].clone()))
    with trace_routing(model) as trace, torch.no_grad():
        model(torch.randn(4, 3, 64, 64))
    assert set(trace) == set(convs) and len(convs) == {
        'dyconv_resnet10': 4 * 2 + 3, 'dyconv_resnet50': 16 * 3 + 4, 'dyconv_mobilenetv2_050': 2 + 16 * 3,
        'dyconv_mobilenetv3_small_100': 2 + 10 * 3}[name]
    for layer, (routing,) in trace.items():
        assert routing.weights.shape == (4, 4) and routing.indices is None and routing.losses == ()
        logits = convs[layer].routing_fn.compute_logits(inputs[layer].mean((2, 3)))
        torch.testing.assert_close(routing.weights, (logits / 30).softmax(1))


@pytest.mark.parametrize('name', KINDS)
def test_an_image_does_not_see_its_neighbours(name):
    model = timm.create_model(name, temperature=1., num_classes=7).eval()
    x = torch.randn(10, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[3:4], model(x[3:4]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointing_keeps_the_gradient_of_output_and_records(reentrant, monkeypatch):
    monkeypatch.setattr(staged, 'use_reentrant_ckpt', lambda: reentrant)
    model = tiny(temperature=1.).double()
    model.set_aux_loss(True)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        out, routings = model(x)
        assert len(routings) == 12  # 4 blocks of 2, and as many shortcuts: every stage changes channels or size
        (out.square().mean() + sum(r.gates.square().sum() for r in routings)).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-3, atol=1e-5)
    assert grads[0]['layer1.0.conv1.routing_fn.weight'].abs().max() > 1e-3


@pytest.mark.parametrize('kwargs, message', [
    (dict(temperature=0.9), 'temperature=0.9: annealing ends at 1'),
    (dict(anneal_epochs=-2), 'anneal_epochs=-2: use a whole number of epochs'),
    (dict(reduction=0), 'reduction=0: use a whole number of at least 1'),
    (dict(num_experts=0), 'num_experts=0: a routed layer needs at least one expert'),
])
@pytest.mark.parametrize('name', ['dyconv_resnet10', 'dyconv_mobilenetv2_050'])
def test_bad_arguments_are_refused_in_a_sentence(name, kwargs, message):
    with pytest.raises(InputError, match=message):
        timm.create_model(name, device='meta', **kwargs)


def test_a_head_that_is_not_there_cannot_be_dynamic():
    with pytest.raises(InputError, match='dynamic_head=True: this network has no head convolution'):
        timm.create_model('dyconv_mobilenetv2_050', device='meta', num_features=0, dynamic_head=True)


# The temperature in training

def test_a_moving_average_copies_the_epoch():
    """And so evaluates at the temperature of the trained model, at every epoch."""
    model = tiny(anneal_epochs=4, temperature=9.)
    average = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(4, 3, 32, 32)
    for epoch, expected in enumerate((9., 7., 5., 3., 1., 1.)):
        set_epoch(model, epoch)
        model.train()
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
            average.update(model)
        assert temperatures(average.module) == temperatures(model) == {expected}
        with trace_routing(average.module) as trace, torch.no_grad():
            average.module.eval()(x)
        for routing, in trace.values():
            torch.testing.assert_close(routing.weights, (routing.logits / expected).softmax(1))
    # The weights are an average, not a copy.
    assert not torch.equal(average.module.layer1[0].conv1.weight, model.layer1[0].conv1.weight)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """16 training and 8 evaluation images of two classes, dark and bright."""
    return write_images(tmp_path_factory.mktemp('images'), {'train': 8, 'validation': 4})


def run(images, folder, **options):
    kwargs = {k: v for k, v in TINY.items() if k != 'num_classes'}
    recipe = dict(
        model='dyconv_resnet10', model_kwargs=dict(kwargs, anneal_epochs=2, temperature=5.), img_size=32, batch_size=8,
        workers=0, opt='sgd', lr=1e-2, epochs=4, warmup_epochs=0, device='cpu', data_dir=str(images), model_ema=True,
        model_ema_decay=0.9, log_interval=1000)
    resume = options.pop('resume', None)
    return train(recipe, options, output=folder, resume=resume, quiet=True)


def test_the_trainer_anneals_and_resumes(images, tmp_path):
    """5 - 2 epoch, in the weights and in their average of every checkpoint; a resumed run is the uninterrupted one."""
    whole = run(images, tmp_path / 'whole')
    for epoch in range(4):
        checkpoint = read_checkpoint(tmp_path / 'whole' / f'checkpoint-{epoch}.pth.tar')
        for key in ('state_dict', 'state_dict_ema'):
            model = tiny(anneal_epochs=2, temperature=5.)
            model.load_state_dict(checkpoint[key])
            assert temperatures(model) == {(5., 3., 1., 1.)[epoch]}
    run(images, tmp_path / 'parts', stop_epoch=1)
    parts = run(images, tmp_path / 'parts', resume='auto')
    one, other = (read_checkpoint(tmp_path / name / 'last.pth.tar') for name in ('whole', 'parts'))
    for key in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(value, other[key][name]) for name, value in one[key].items())
    assert [row['train_loss'] for row in parts['history']] == [row['train_loss'] for row in whole['history']]
