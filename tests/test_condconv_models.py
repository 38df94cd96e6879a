"""CondConv models: exact sizes, the dense networks they grow from, timm's own CondConv, routing functions, heads.

timm's own tests run on every name in test_timm_host.py; here stands what timm cannot know.
"""
import json

import pytest
import timm
import torch
from small_models import load_dense_kernels, randomise_statistics
from timm.models.resnet import BasicBlock
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from moe_zoo.analysis.cost import count
from moe_zoo.errors import InputError
from moe_zoo.layers.cond_conv import ROUTE_FNS, CondConv2d, CondLinear
from moe_zoo.models import condconv_blocks, staged
from moe_zoo.models.condconv_resnet import CondConvResNet
from moe_zoo.models.staged import checkpoint_filter_fn
from moe_zoo.routing import trace_routing

NAMES = timm.list_models('condconv_*')
SMALLEST = 'condconv_mobilenetv1_025'
# One name a kind of block; the rest of the family differs in depth and width.
KINDS = [
    SMALLEST,
    pytest.param('condconv_resnet18', marks=pytest.mark.slow),
    pytest.param('condconv_resnet50', marks=pytest.mark.slow),
    pytest.param('condconv_mobilenetv2_100', marks=pytest.mark.slow),
    pytest.param('condconv_efficientnet_b0', marks=pytest.mark.slow),
]


def create(name: str = SMALLEST, **kwargs) -> nn.Module:
    return timm.create_model(name, **dict(dict(num_experts=3, num_classes=7), **kwargs))


def images(batch: int = 2, size: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size)


def test_eleven_names_are_registered():
    assert sorted(NAMES) == sorted([
        'condconv_resnet18', 'condconv_resnet34', 'condconv_resnet50', 'condconv_mobilenetv1_025',
        'condconv_mobilenetv1_050', 'condconv_mobilenetv1_075', 'condconv_mobilenetv1_100', 'condconv_mobilenetv2_100',
        'condconv_mnasnet_a1', 'condconv_efficientnet_b0', 'condconv_efficientnet_lite0'])


# Size and cost; what the paper's networks cost is in test_known_costs.py.

def test_routers_of_resnet50():
    model = timm.create_model('condconv_resnet50', device='meta')
    routers = [m for m in model.modules() if hasattr(m, 'mix')]
    # 1024 * 8 + 8, twice 2048 * 8 + 8, classifier 2048 * 8 + 8
    assert sum(p.numel() for r in routers for p in r.parameters()) == 57_376
    assert not any(isinstance(m, CondConv2d) for m in model.layer4[0].downsample.modules())


@pytest.mark.parametrize('name', KINDS)
def test_a_layer_states_what_the_counter_sees(name):
    # Batch of 2: the classifier then takes the cheaper way, every other layer exactly its bound.
    model = timm.create_model(name, num_experts=3, device='meta')
    cost = count(model, torch.empty(2, 3, 96, 96, device='meta'))
    for layer, module in model.named_modules():
        if isinstance(module, condconv_blocks.CondConvBlock):
            assert cost.by_module_max[layer] == cost.by_module[layer] > 0
    assert cost.macs_max - cost.macs_executed in (0, 2 * (model.num_features * 1000 - 3 * 1000))


# The networks they grow from

@pytest.mark.parametrize('name, twin', [
    (SMALLEST.replace('025', '100'), 'mobilenetv1_100'),
    pytest.param('condconv_resnet18', 'resnet18', marks=pytest.mark.slow),
    pytest.param('condconv_resnet34', 'resnet34', marks=pytest.mark.slow),
    pytest.param('condconv_resnet50', 'resnet50', marks=pytest.mark.slow),
    pytest.param('condconv_mobilenetv2_100', 'mobilenetv2_100', marks=pytest.mark.slow),
    pytest.param('condconv_mnasnet_a1', 'semnasnet_100', marks=pytest.mark.slow),
    pytest.param('condconv_efficientnet_b0', 'tf_efficientnet_b0', marks=pytest.mark.slow),
    pytest.param('condconv_efficientnet_lite0', 'tf_efficientnet_lite0', marks=pytest.mark.slow),
])
def test_copies_of_the_dense_kernels_mixed_by_a_softmax_are_the_dense_network(name, twin):
    dense = timm.create_model(twin, num_classes=7).eval()
    randomise_statistics(dense)
    model = create(name, route_fn='softmax').eval()  # its gates sum to one
    load_dense_kernels(model, dense)
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('experts, twin', [(8, 'tf_efficientnet_cc_b0_8e'),
                                           pytest.param(4, 'tf_efficientnet_cc_b0_4e', marks=pytest.mark.slow)])
def test_weights_of_timms_condconv_give_timms_outputs(experts, twin, tmp_path):
    reference = timm.create_model(twin).eval()
    randomise_statistics(reference)
    file = tmp_path / 'weights.pth'
    torch.save(reference.state_dict(), file)
    # The way of a user: as a pretrained file, strictly loaded.
    model = timm.create_model(
        'condconv_efficientnet_b0', num_experts=experts, pretrained=True, pretrained_cfg_overlay=dict(file=str(file)),
    ).eval()
    x = images(size=96)
    with torch.no_grad():
        expected = reference(x)
        # Logits of these random norms reach 1,500; rounding alone moves them by 2e-5 of that.
        torch.testing.assert_close(model(x), expected, rtol=0, atol=2e-4 * expected.abs().max().item())
    reference.train()
    model.train()
    # The gradient, too: of a router, an expert stack, and a layer before them all. In one layout of memory, since norms
    # over 18 values magnify rounding.
    x = x.contiguous(memory_format=torch.channels_last)
    for each in (model, reference):
        torch.manual_seed(0)
        each(x).square().sum().backward()
    theirs = dict(reference.named_parameters())
    for name in ('blocks.4.0.routing_fn.weight', 'blocks.5.1.conv_pw.weight', 'conv_stem.weight'):
        torch.testing.assert_close(model.get_parameter(name).grad, theirs[name].grad, rtol=1e-3, atol=1e-3)


def test_expert_kernels_stored_with_all_their_axes_are_flattened():
    model = create()
    state = model.state_dict()
    stored = dict(state)
    stored['blocks.4.0.conv_pw.weight'] = state['blocks.4.0.conv_pw.weight'].view(3, 256, 128, 1, 1)
    stored['classifier.weight'] = state['classifier.weight'].view(3, 7, 256)
    filtered = checkpoint_filter_fn(stored, model)
    assert all(torch.equal(filtered[key], state[key]) for key in state)


@pytest.mark.parametrize('name', ['condconv_resnet18', 'condconv_efficientnet_b0'])
def test_experts_start_as_the_dense_convolution_does(name):
    model = timm.create_model(name, num_experts=2)
    conv = model.layer4[0].conv2 if 'resnet' in name else model.blocks[5][0].conv_dw
    # ResNet: kaiming normal, fan out 512 * 9. EfficientNet: fan out of a depthwise kernel is 5 * 5.
    std = (2 / (512 * 9)) ** 0.5 if 'resnet' in name else (2 / 25) ** 0.5
    for expert in conv.weight.unbind(0):
        assert expert.std().item() == pytest.approx(std, rel=0.05)


# Routing

@pytest.mark.parametrize('name', KINDS)
def test_one_decision_a_block_and_one_for_the_classifier(name):
    model = create(name).eval()
    with trace_routing(model) as trace, torch.no_grad():
        model(images(batch=4))
    blocks = [n for n, m in model.named_modules() if isinstance(m, condconv_blocks.CondConvBlock)]
    own = {'condconv_efficientnet_b0': [], 'condconv_mobilenetv2_100': ['conv_head', 'classifier'],
           SMALLEST: ['classifier']}.get(name, ['fc'])
    assert list(trace) == blocks + own
    assert len(blocks) == {'condconv_efficientnet_b0': 8, 'condconv_mobilenetv2_100': 11, SMALLEST: 8}.get(name, 3)
    for routing, in trace.values():
        assert routing.weights.shape == (4, 3) and routing.shape == (4,) and routing.indices is None
        assert torch.equal(routing.weights, routing.logits.sigmoid())
    assert not vars(model).get('records')


@pytest.mark.parametrize('route_fn, deciding', [
    ('sigmoid', range(8)), ('softmax', range(8)), ('single', [0]), ('partially_shared', [0, 2, 4, 6]),
    ('hidden_small', range(8)), ('hierarchical', range(8)),
])
def test_who_decides(route_fn, deciding):
    model = create(route_fn=route_fn).eval()
    blocks = [(n, m) for n, m in model.named_modules() if isinstance(m, condconv_blocks.CondConvBlock)]
    used = {}
    for name, block in blocks:
        block.conv_dw.register_forward_pre_hook(lambda module, args, name=name: used.__setitem__(name, args[1]))
    with trace_routing(model) as trace, torch.no_grad():
        model(images())
    assert list(trace) == [blocks[i][0] for i in deciding] + ['classifier']
    latest = None
    for name, _ in blocks:  # a block that does not decide uses the latest decision before it
        latest = trace[name][0].weights if name in trace else latest
        torch.testing.assert_close(used[name], latest)
    if route_fn == 'softmax':
        torch.testing.assert_close(latest.sum(1), torch.ones(2))


def test_hierarchical_routers_hear_the_decision_before():
    model = create(route_fn='hierarchical').eval()
    first, second = model.blocks[3][0], model.blocks[3][1]
    x = torch.randn(1, 128, 4, 4)
    decisions = [second.route(x, torch.full((1, 3), value)) for value in (0., 1.)]
    columns = second.routing_fn.weight[:, 128:].sum(1)
    torch.testing.assert_close(decisions[1].logit() - decisions[0].logit(), columns.unsqueeze(0), rtol=1e-4, atol=1e-5)
    assert first.routing_fn.in_features == 64 and second.routing_fn.in_features == 128 + 3


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('name', [SMALLEST, pytest.param('condconv_resnet18', marks=pytest.mark.slow)])
@pytest.mark.parametrize('route_fn', ROUTE_FNS)
def test_every_routing_function_lives_in_timm(route_fn, name):
    model = create(name, route_fn=route_fn, start_block=5)
    x = images()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    out = model(x)
    torch.testing.assert_close(torch.jit.script(model)(x), out, rtol=1e-4, atol=1e-5)
    features, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(model.forward_head(features), out)
    torch.testing.assert_close(model.forward_features(x), features)
    early = model.forward_intermediates(x, indices=[1, 2], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, [intermediates[1], intermediates[2]])
    backbone = create(name, route_fn=route_fn, start_block=5, features_only=True, out_indices=(2, 4)).eval()
    backbone.load_state_dict(_names_of_backbone(model, backbone), strict=True)
    torch.testing.assert_close(backbone(x), [intermediates[2], intermediates[4]])


def _names_of_backbone(model: nn.Module, backbone: nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights under the names of its features_only wrapper (a prefix, or flattened stages)."""
    wanted, state = backbone.state_dict().keys(), model.state_dict()
    names = {f'model.{k}': v for k, v in state.items()} if next(iter(wanted)).startswith('model.') else {
        k.replace('blocks.', 'blocks_', 1): v for k, v in state.items()}
    return {k: names[k] for k in wanted}


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('route_fn', ['sigmoid', 'single', 'hierarchical'])
def test_checkpointing_keeps_the_gradient_of_output_and_records(route_fn, reentrant, monkeypatch):
    for module in (condconv_blocks, staged):
        monkeypatch.setattr(module, 'use_reentrant_ckpt', lambda: reentrant)
    model = create(route_fn=route_fn).double()
    model.set_aux_loss(True)
    x = images(batch=4).double().requires_grad_()
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)
        out, routings = model(x)
        assert len(routings) == {'sigmoid': 9, 'single': 2, 'hierarchical': 9}[route_fn]
        (out.square().mean() + sum(r.gates.square().sum() for r in routings)).backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name in grads[0]:
        # Gates are float32 in a model of doubles; a lost record would be off by the gradient itself.
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-3, atol=1e-5)
    assert grads[0]['blocks.3.0.routing_fn.weight'].abs().max() > 1e-2


def test_checkpointing_recomputes_every_block(monkeypatch):
    calls = []
    monkeypatch.setattr('moe_zoo.routing.context.checkpoint', lambda *args, **kwargs: (
        calls.append(1), torch_checkpoint(*args, **kwargs))[1])
    model = create()
    model.set_grad_checkpointing()
    model(images())
    assert len(calls) == 13


@pytest.mark.parametrize('name', KINDS)
def test_an_image_does_not_see_its_neighbours(name):
    model = create(name).eval().double()
    randomise_statistics(model)
    x = images(batch=10).double()
    others = torch.cat([-x[:3], x[3:4], 2 * x[4:]])
    with torch.no_grad():
        together, elsewhere, alone = model(x)[3:4], model(others)[3:4], model(x[3:4])
    largest = alone.abs().max().item()
    torch.testing.assert_close(together, elsewhere, rtol=0, atol=1e-9 * largest)
    # Routers decide in float32, whose rounding depends on the size of the batch, and deep networks amplify it.
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3 * largest)


def test_records_are_returned_only_on_request_and_in_training():
    model = create()
    assert isinstance(model(images()), torch.Tensor)
    model.set_aux_loss(True)
    output, routings = model(images())
    assert output.shape == (2, 7) and len(routings) == 9
    assert isinstance(model.eval()(images()), torch.Tensor)


# Heads

@pytest.mark.parametrize('name', [SMALLEST, 'condconv_resnet18'])
def test_the_mixed_classifier_survives_resets(name):
    model = create(name, device='meta', dtype=torch.float64).eval()
    head = model.get_classifier()
    assert isinstance(head, CondLinear) and head.num_experts == 3
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    x = torch.empty(2, 3, 64, 64, device='meta', dtype=torch.float64)
    assert model(x).shape == (2, model.num_features)
    model.reset_classifier(5, 'catavgmax')
    head = model.get_classifier()
    assert isinstance(head, CondLinear) and (head.in_features, head.out_features) == (2 * model.num_features, 5)
    assert {(p.device.type, p.dtype) for p in head.parameters()} == {('meta', torch.float64)}
    assert not any(module.training for module in head.modules())
    assert model(x).shape == (2, 5)
    model.prune_intermediate_layers([2])
    model.reset_classifier(4, 'avg')
    assert isinstance(model.get_classifier(), CondLinear) and model(x).shape == (2, 4)


def test_a_plain_classifier_stays_plain():
    model = create('condconv_efficientnet_b0', device='meta')
    model.reset_classifier(5)
    assert type(model.get_classifier()) is nn.Linear
    model = create(cond_fc=False, device='meta')
    model.reset_classifier(5)
    assert type(model.get_classifier()) is nn.Linear


def test_an_image_net_head_is_left_out_for_other_classes(tmp_path):
    source = create(num_classes=1000)
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    model = timm.create_model(
        SMALLEST, num_experts=3, num_classes=5, in_chans=1, pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / 'weights.pth')))
    assert model.classifier.weight.shape == (3, 5 * 256)
    assert torch.equal(model.blocks[4][0].conv_pw.weight, source.blocks[4][0].conv_pw.weight)
    torch.testing.assert_close(model.conv_stem.weight, source.conv_stem.weight.sum(1, keepdim=True))


# Arguments

@pytest.mark.parametrize('kwargs, message', [
    (dict(start_block=0), 'start_block=0: choose between 1 and 13, the number of blocks, or 14'),
    (dict(start_block=15), 'start_block=15'),
    (dict(num_experts=0), 'num_experts=0: a routed layer needs at least one expert'),
    (dict(route_fn='sigmod'), "route_fn='sigmod' is not one of .* Did you mean 'sigmoid'"),
    (dict(route_fn='singel'), "Did you mean 'single'"),
    (dict(expert_drop_rate=-0.1), 'expert_drop_rate=-0.1: choose a probability'),
    (dict(cond_head=True), 'cond_head=True: this network has no head convolution'),
])
def test_bad_arguments_are_refused_in_a_sentence(kwargs, message):
    with pytest.raises(InputError, match=message):
        create(device='meta', **kwargs)


def test_a_chain_is_refused_where_it_cannot_run():
    with pytest.raises(InputError, match='CondConvResNet does not run'):
        CondConvResNet(BasicBlock, (1, 1, 1, 1), route_fn='single')


def test_nothing_mixed_is_the_dense_network():
    model = timm.create_model('condconv_mobilenetv1_100', start_block=14, cond_fc=False)
    dense = timm.create_model('mobilenetv1_100')
    dense.load_state_dict(model.state_dict())
    x = images()
    torch.testing.assert_close(model.eval()(x), dense.eval()(x))


@pytest.mark.parametrize('name', ['condconv_resnet18', SMALLEST])
def test_saved_with_its_arguments_and_created_from_the_folder(name, tmp_path):
    kwargs = dict(num_experts=2, num_classes=4, route_fn='single', expert_drop_rate=0.1, start_block=6)
    model = timm.create_model(name, **kwargs).eval()
    timm.models.save_for_hf(model, tmp_path, model_args=json.loads(json.dumps(kwargs)))
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = images()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_decay_and_layer_groups():
    model = create('condconv_resnet18', device='meta')
    plain, decayed = param_groups_weight_decay(model, weight_decay=1.0)
    names = {id(p): n for n, p in model.named_parameters()}
    kept, shrunk = ({names[id(p)] for p in group['params']} for group in (plain, decayed))
    assert plain['weight_decay'] == 0.0 and {'fc.bias', 'fc.routing_fn.bias', 'layer4.0.routing_fn.bias'} <= kept
    assert {'fc.weight', 'layer4.0.conv1.weight', 'layer4.0.routing_fn.weight'} <= shrunk
    groups = timm.models.group_parameters(model, model.group_matcher(), reverse=True)
    block = {group for name, group in groups.items() if name.startswith('layer4.0.')}
    assert len(block) == 1  # experts, router and norms of a block decay together
