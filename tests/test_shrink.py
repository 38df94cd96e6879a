"""Fewer experts, joined experts, no experts: what goes, what stays, and when the function stays with it.

Letters: E experts, K chosen experts, T items.
"""
import json
import re

import pytest
import timm
import timm_host
import torch
from host_contract import check_host_contract
from test_timm_host import MODULES, SMALLEST, check, expected_tests, needs_timm_tests
from test_upcycle import RESNET, ROUTED_VIT, difference, lively
from timm.task import FeatureDistillationTask, LogitDistillationTask
from torch import nn

from moe_zoo.checkpoints import merge, prune, to_dense, upcycle
from moe_zoo.errors import InputError
from moe_zoo.routing import Routing, trace_routing

BASED_ON_RESNET = dict(base='resnet18', targets='layer4.*.conv2')


def routed(name: str, **kwargs) -> nn.Module:
    """A small model that does something at once: V-MoE's head starts at zero."""
    shape = dict(ROUTED_VIT, head_zero_init=False) if 'vit' in name else RESNET
    return lively(timm.create_model(name, **{**shape, 'num_classes': 5, **kwargs})).eval()


def upcycled(name: str, noise: float = 0., **kwargs):
    """(dense ResNet, the routed model that starts from it)."""
    dense = lively(timm.create_model('resnet18', num_classes=5, **RESNET)).eval()
    model = routed(name, **kwargs)
    model.load_state_dict(upcycle(dense.state_dict(), model, noise=noise))
    return dense, model


def traced(model: nn.Module, images: int = 4):
    with trace_routing(model) as trace, torch.no_grad():
        model(torch.randn(images, 3, 32, 32))
    return trace


def with_masses(model: nn.Module, mass) -> dict:
    """A trace of one item in which every layer weighs its experts so."""
    weights = torch.tensor([mass])
    return {name: [Routing(weights, weights, weights)] for name in traced(model)}


# Pruning

@pytest.mark.parametrize('limits', [dict(keep=2), dict(share=0.01)])
def test_experts_that_no_gate_opens_go_without_a_trace(limits):
    model = routed('condconv_resnet18', num_experts=4)
    for name, parameter in model.named_parameters():
        if name.endswith('routing_fn.bias'):
            nn.init.zeros_(parameter)
            parameter.data[[1, 3]] = -40.  # sigmoid(-40) = 4e-18
    smaller = prune(model, traced(model), **limits)
    assert smaller._model_args['num_experts'] == 2
    kernels = 'layer4.1.conv2.weight', 'layer4.1.routing_fn.weight', 'fc.weight', 'fc.bias'
    for name in kernels:
        assert torch.equal(smaller.state_dict()[name], model.state_dict()[name][[0, 2]])
    assert difference(model, smaller) < 1e-5
    assert model.layer4[1].conv2.num_experts == 4


@pytest.mark.parametrize('name, kwargs, keep, num_selected', [
    ('vmoe_vit_b', {}, 3, 2),
    ('vmoe_vit_b', dict(num_selected=2), 1, 1),
    ('vmoe_vit_b', dict(num_selected=4), 3, 3),  # all of them were chosen
    ('moe_resnet18', dict(layer='conv', num_selected=4), 2, 2),
    ('vmoe_vit_b', dict(num_experts=4, num_selected=2, expert_ratio=2), 2, 1),  # 8 experts of half the width
    ('vmoe_vit_b', dict(router='shazeer'), 2, 2),
    ('moe_resnet18', dict(num_selected=3, constraint='relative'), 2, 2),
    ('moe_resnet18', dict(layer='conv'), 1, 1),
    ('vmoe_vit_b_ec', {}, 2, 2),
    ('softmoe_vit_s', dict(moe_layers=(1,)), 2, None),
    ('dyconv_resnet18', {}, 2, None),
])
def test_every_kind_of_layer_is_pruned(name, kwargs, keep, num_selected):
    model = routed(name, **kwargs)
    mass = [1., 5., 2., 4., 3., 3., 3., 3.][:8 if 'expert_ratio' in kwargs else 4]
    smaller = prune(model, with_masses(model, mass), keep=keep)
    ratio = kwargs.get('expert_ratio', 1)
    assert smaller._model_args['num_experts'] == keep // ratio
    if num_selected:
        layers = [m for m in smaller.modules() if hasattr(m, 'num_selected') and hasattr(m, 'router')]
        assert all((m.num_experts, m.num_selected) == (keep, num_selected * ratio) or 'ec' in name for m in layers)
    assert smaller(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_the_heaviest_stay_in_their_order():
    model = routed('vmoe_vit_b')
    smaller = prune(model, with_masses(model, [1., 5., 2., 4.]), keep=2)
    old, new = model.blocks[1].mlp, smaller.blocks[1].mlp
    assert torch.equal(new.fc2.weight, old.fc2.weight[[1, 3]])
    assert torch.equal(new.router.weight, old.router.weight[[1, 3]])
    by_share = prune(model, with_masses(model, [1., 5., 2., 4.]), share=0.2)  # 0.2 of 12 are 2.4
    assert torch.equal(by_share.blocks[1].mlp.fc2.weight, new.fc2.weight)
    stage = routed('moe_resnet18')
    fewer = prune(stage, with_masses(stage, [3., 1., 2., 4.]), keep=2)
    for new, old in ((0, 0), (1, 3)):
        state = stage.layer4[0].experts[old].state_dict()
        assert all(torch.equal(v, state[k]) for k, v in fewer.layer4[0].experts[new].state_dict().items())


def test_unused_experts_of_a_choice_are_not_missed():
    model = routed('moe_resnet18', layer='conv', num_experts=6, num_selected=1, noise=False)
    x = torch.randn(2, 3, 32, 32)
    with trace_routing(model) as trace, torch.no_grad():
        expected = model(x)
        smaller = prune(model, trace, share=1e-6)
        assert smaller._model_args['num_experts'] < 6
        torch.testing.assert_close(smaller(x), expected)


def test_a_chain_keeps_the_same_experts_everywhere():
    model = routed('condconv_resnet18', num_experts=4, route_fn='single')
    trace = with_masses(model, [1., 5., 2., 4.])
    assert len(trace) == 2  # one decision for all blocks, one for the classifier
    smaller = prune(model, trace, keep=2)
    assert torch.equal(smaller.layer4[1].conv1.weight, model.layer4[1].conv1.weight[[1, 3]])


SHRUNK = {
    'vmoe_vit_b': {}, 'condconv_resnet18': dict(num_experts=4), 'moe_resnet18': {},
    'moefied': dict(BASED_ON_RESNET, layer='moe_conv', num_experts=4)}


@pytest.mark.parametrize('name, shrink', [*((name, prune) for name in SHRUNK), ('condconv_resnet18', merge)])
def test_shrunk_it_is_a_model_of_timms(name, shrink):
    model = routed(name, **SHRUNK[name])
    smaller = shrink(model, traced(model), keep=2)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())
    check_host_contract(smaller)


def test_pruned_it_is_saved_and_created_small(tmp_path):
    model = routed('vmoe_vit_b')
    model.reset_classifier(3)
    smaller = prune(model, traced(model), keep=1)
    timm.models.save_for_hf(smaller, tmp_path, model_args=dict(smaller._model_args))
    stored = json.loads((tmp_path / 'config.json').read_text())['model_args']
    assert (stored['num_experts'], stored['num_selected']) == (1, 1)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), smaller(x)) and again(x).shape == (2, 3)


# Joining

@pytest.mark.parametrize('name, kwargs', [
    ('condconv_resnet18', dict(num_experts=4)), ('condconv_resnet18', dict(num_experts=4, route_fn='single')),
    ('condconv_resnet18', dict(num_experts=4, route_fn='softmax')), ('dyconv_resnet18', {}),
])
def test_equal_experts_are_joined_without_a_loss(name, kwargs):
    model = routed(name, **kwargs)
    for value in model.state_dict().values():  # 0 and 2 are equal, and 1 and 3, with their router rows
        if value.dim() and value.shape[0] == 4:
            value[2:] = value[:2]
    smaller = merge(model, traced(model), keep=2)
    assert smaller._model_args['num_experts'] == 2
    assert difference(model, smaller) < 1e-5


def test_copies_that_are_chosen_are_joined_without_a_loss():
    dense = lively(timm.create_model('vit_tiny_patch16_224', num_classes=5, **{
        key: value for key, value in ROUTED_VIT.items() if key not in ('act_layer', 'num_experts')})).eval()
    model = routed('vmoe_vit_b', router_args=dict(renormalise=True))
    model.load_state_dict(upcycle(dense.state_dict(), model))
    assert difference(model, merge(model, traced(model), keep=1)) < 1e-5


def test_the_most_alike_are_joined_by_their_mass():
    model = routed('vmoe_vit_b')
    fc1 = model.blocks[1].mlp.fc1
    with torch.no_grad():
        for parameter in (*fc1.parameters(), *model.blocks[1].mlp.fc2.parameters()):
            nn.init.normal_(parameter)
            parameter[3] = parameter[1] + 0.01 * torch.randn_like(parameter[1])
    smaller = merge(model, with_masses(model, [1., 1., 1., 3.]), keep=3)
    weights = smaller.blocks[1].mlp.fc1.weight
    torch.testing.assert_close(weights[1], (fc1.weight[1] + 3 * fc1.weight[3]) / 4)
    assert torch.equal(weights[[0, 2]], fc1.weight[[0, 2]])
    router = model.blocks[1].mlp.router.weight
    torch.testing.assert_close(smaller.blocks[1].mlp.router.weight[1], router[[1, 3]].mean(0))


# Folding

@pytest.mark.parametrize('name, kwargs', [
    ('condconv_resnet18', dict(num_experts=3)), ('condconv_resnet18', dict(route_fn='single')),
    ('dyconv_resnet18', {}), ('deepmoe_narrow_resnet18', {}),
])
def test_what_was_upcycled_folds_back(name, kwargs):
    dense, model = upcycled(name, noise=0.1, **kwargs)
    state = to_dense(model, traced(model))
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in dense.state_dict().items()}
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name, twin, kwargs', [
    ('condconv_resnet18', 'resnet18', dict(num_experts=3)),
    ('condconv_resnet18', 'resnet18', dict(num_experts=3, route_fn='hierarchical')),
    ('dyconv_resnet18', 'resnet18', {}),
    ('deepmoe_narrow_resnet18', 'resnet18', {}),
    # its 3 x 3 are widened, as those of the wide network
    pytest.param('deepmoe_resnet50', 'wide_resnet50_2', {}, marks=pytest.mark.slow),
    ('moefied', 'resnet18', dict(BASED_ON_RESNET, layer='condconv', num_experts=3)),
    *(pytest.param(f'{kind}_{name}', twin, dict(layers=None, channels=None), marks=pytest.mark.slow)
      for kind, name, twin in [
          ('condconv', 'mobilenetv1_100', 'mobilenetv1_100'), ('condconv', 'mobilenetv2_100', 'mobilenetv2_100'),
          ('condconv', 'mnasnet_a1', 'semnasnet_100'), ('condconv', 'efficientnet_lite0', 'tf_efficientnet_lite0'),
          ('condconv', 'efficientnet_b0', 'tf_efficientnet_b0'),
          ('dyconv', 'mobilenetv2_050', 'mobilenetv2_050'),
          ('dyconv', 'mobilenetv3_small_100', 'mobilenetv3_small_100')]),
])
def test_constant_gates_fold_exactly(name, twin, kwargs):
    """Into timm's own network, of timm's own class."""
    model = routed(name, **kwargs)
    shape = {key: value for key, value in RESNET.items() if kwargs.get(key, value)}
    dense = timm.create_model(twin, num_classes=5, **shape).eval()
    assert type(dense).__module__.startswith('timm.models.')
    for parameter in last_router_weights(model, 'weight'):
        nn.init.zeros_(parameter)
    for parameter in last_router_weights(model, 'bias'):
        nn.init.normal_(parameter)
    dense.load_state_dict(to_dense(model, traced(model)))
    assert difference(model, dense) < (1e-5 if 'channels' not in kwargs else 1e-3)  # rounding in 50 layers, unnormed
    check_host_contract(dense)


def test_other_gates_fold_on_average():
    model = routed('condconv_resnet18', num_experts=3)
    dense = timm.create_model('resnet18', num_classes=5, **RESNET).eval()
    dense.load_state_dict(to_dense(model, traced(model)))
    assert 1e-4 < difference(model, dense) < 1


def last_router_weights(model: nn.Module, kind: str) -> list[nn.Parameter]:
    """What the images have an effect on the gates through."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        router = re.match(rf'(.*routing_fn|embedding\.fc)\..*{kind}$|(.*routing_fn|embedding\.fc)\.{kind}$', name)
        if router:
            found[router[1] or router[2]] = parameter  # of two layers the second
    return list(found.values())


def test_channels_that_are_never_live_are_zero():
    _, model = upcycled('deepmoe_narrow_resnet18')
    nn.init.zeros_(model.layer2[0].gate1.weight[3:5])
    nn.init.constant_(model.layer2[0].gate1.weight[6], 0.5)  # its gate is 1/2 of every image
    state = to_dense(model, traced(model))
    norm = model.layer2[0].bn1
    assert not state['layer2.0.bn1.weight'][3:5].any() and not state['layer2.0.bn1.bias'][3:5].any()
    torch.testing.assert_close(state['layer2.0.bn1.weight'][6], norm.weight[6] / 2)
    dense = timm.create_model('resnet18', num_classes=5, **RESNET)
    dense.load_state_dict(state)
    assert difference(model, dense) < 1e-5


# Bad input

@pytest.mark.parametrize('call, message', [
    (lambda m, t: prune(m, t, keep=5), 'keep=5: choose between 1 and 4, as there are 4 experts.'),
    (lambda m, t: merge(m, t, keep=0), 'keep=0: choose between 1 and 4'),
    (lambda m, t: merge(m, t, keep=2.), 'keep=2.0: choose between 1 and 4'),
    (lambda m, t: prune(m, t, keep='2'), "keep='2': choose between 1 and 4"),
    (lambda m, t: prune(m, t, share=1.5), "share=1.5: use a share of a layer's mass, from 0 to less than 1."),
    (lambda m, t: prune(m, t, share=float('nan')), 'share=nan: use a share'),
    (lambda m, t: prune(routed('vmoe_vit_b', num_experts=3), t, keep=2),
     "trace is of another model: 'blocks.1.mlp' has 3 experts, and its records have 4."),
    (lambda m, t: prune(m, t), 'keep=None, share=None: give exactly one of the two.'),
    (lambda m, t: prune(m, t, keep=1, share=0.5), 'give exactly one of the two'),
    (lambda m, t: prune(m, {}, keep=1), "trace has no records of 'blocks.1.mlp': run images through the model under"),
    (lambda m, t: to_dense(m, t), "to_dense: 'blocks.1.mlp' is a MoEMlp, which chooses its experts"),
    (lambda m, t: prune(m.blocks, {name.removeprefix('blocks.'): r for name, r in t.items()}, keep=1),
     'Sequential: only a model made by timm.create_model can be made again smaller.'),
    (lambda m, t: prune(timm.create_model('resnet18', **RESNET), {}, keep=1), 'ResNet has no routed layers.'),
])
def test_what_cannot_shrink_is_told(call, message):
    model = routed('vmoe_vit_b')
    with pytest.raises(InputError, match=re.escape(message)):
        call(model, traced(model))


@pytest.mark.parametrize('shrink', [prune, merge])
@pytest.mark.parametrize('name, kwargs, message', [
    ('deepmoe_resnet18', RESNET, ' is a ChannelGate: how many experts it has follows from the network around it'),
    ('fusion_trio', dict(encoders=('resnet10t', 'resnet14t')), "^'fusion' is a SituationalFusion: how many experts"),
])
def test_channels_and_encoders_are_no_experts_to_remove(shrink, name, kwargs, message):
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    with pytest.raises(InputError, match=message):
        shrink(model, traced(model), keep=2)


def test_experts_of_a_hierarchy_cannot_be_taken_apart():
    model = routed('condconv_resnet18', num_experts=4, route_fn='hierarchical')
    with pytest.raises(InputError, match='routing_fn.weight of shape .* cannot be taken apart by experts'):
        prune(model, traced(model), keep=2)


# A smaller student

@pytest.mark.parametrize('task_cls', [LogitDistillationTask, FeatureDistillationTask])
def test_timms_distillation_takes_routed_teachers_and_students(task_cls, tmp_path):
    name = 'condconv_mobilenetv1_025'  # the teacher is created by its name, as timm's --kd-model-name does
    teacher = timm.create_model(name, num_classes=5)
    torch.save(teacher.state_dict(), tmp_path / 'teacher.pth')
    student = routed('vmoe_vit_b').train()
    task = task_cls(student, name, teacher_pretrained_path=str(tmp_path / 'teacher.pth'), verbose=False)
    x = torch.randn(2, 3, 32, 32)
    result = task.train()(x, torch.tensor([1, 3]))
    result['loss'].backward()
    assert student.blocks[1].mlp.router.weight.grad.abs().sum() > 0
    inside = dict(task.named_modules())
    taught = next(m for m in inside.values() if type(m) is type(teacher))
    assert torch.equal(taught.state_dict()['classifier.weight'], teacher.state_dict()['classifier.weight'])
    assert not taught.training and all(p.grad is None for p in taught.parameters())


# Keywords that make a model small enough for all of timm's tests, of four experts
PRUNED = {
    SMALLEST: dict(num_experts=4),
    'vmoe_vit_s': dict(depth=4, embed_dim=32, num_heads=2, representation_size=32, num_experts=4),
    'moe_resnet18': dict(channels=(8, 8, 16, 16), num_experts=4),
}


@needs_timm_tests
@pytest.mark.slow
def test_pruned_models_pass_timms_own_tests(tmp_path):
    """A pruned or merged model is its name with other keywords, which a saved one is created from."""
    smaller = {}
    for name, kwargs in PRUNED.items():
        model = timm.create_model(name, **kwargs).eval()
        with trace_routing(model) as trace, torch.no_grad():
            model(torch.randn(2, *model.default_cfg['input_size']))
        args = prune(model, trace, keep=2)._model_args
        assert args['num_experts'] == 2
        smaller[name] = {key: value for key, value in args.items() if key != 'num_classes'}
    found = timm_host.run(PRUNED, MODULES, tmp_path, kwargs=smaller)
    for name in PRUNED:
        check(name, found[name], expected_tests(name, meta=False))
