"""Upcycling: a routed model starts with the function of a dense one, and its experts part in training.

Letters: E experts, D width.
"""
import math
import re
from collections import OrderedDict

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.layers import GluMlp, SwiGLU, resample_abs_pos_embed
from torch import nn
from torch.nn import functional as F

from moe_zoo import cli
from moe_zoo.checkpoints import is_routed, token_features, upcycle
from moe_zoo.checkpoints.kmeans import router_of_clusters
from moe_zoo.engine import MoEClassificationTask
from moe_zoo.errors import InputError
from moe_zoo.layers import MoEMlp
from moe_zoo.routing import end_step, trace_routing

RESNET = dict(layers=(1, 1, 1, 2), channels=(8, 8, 16, 16))
# Also `act_layer`: these twins have the exact GELU.
VIT = dict(embed_dim=32, depth=2, num_heads=2, img_size=32, patch_size=8)
ROUTED_VIT = dict(VIT, act_layer='gelu', num_experts=4)
TWINS = {
    'resnet18': RESNET, 'resnet50': RESNET, 'vit_tiny_patch16_224': VIT,
    'deepmoe_vgg16_cifar_dense': dict(channels=(8, 8, 16, 16, 16), stem_width=8)}


def lively(model: nn.Module) -> nn.Module:
    """Norms and biases that do something: at their initial values a lost one would not show."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return model


def pair(twin: str, name: str, kwargs=None, twin_kwargs=None):
    """A dense network, and a routed one that has not heard of it."""
    dense = timm.create_model(twin, num_classes=5, **{**TWINS.get(twin, {}), **(twin_kwargs or {})})
    shape = ROUTED_VIT if 'vit' in name else TWINS.get(twin, {})
    return lively(dense), timm.create_model(name, num_classes=5, **{**shape, **(kwargs or {})})


def difference(dense: nn.Module, model: nn.Module, size: int = 32) -> float:
    """The largest of two images, relative to the largest logit."""
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected, found = dense.eval()(x), model.eval()(x)
    return ((found - expected).abs().max() / expected.abs().max()).item()


slow = pytest.mark.slow
KEPT = [
    ('resnet18', 'condconv_resnet18', dict(num_experts=3), {}),
    ('resnet18', 'condconv_resnet18', dict(num_experts=3, route_fn='softmax'), {}),
    ('resnet18', 'condconv_resnet18', dict(num_experts=3, route_fn='single'), {}),
    ('resnet18', 'condconv_resnet18', dict(num_experts=3, route_fn='hierarchical'), {}),
    ('resnet18', 'condconv_resnet18', dict(num_experts=1, route_fn='hidden_small'), {}),
    ('resnet18', 'dyconv_resnet18', {}, {}),
    ('resnet18', 'moe_resnet18', dict(layer='conv', stages=(3, 4)), {}),
    ('resnet18', 'moe_resnet18', dict(widths=16), {}),  # as wide as the stage
    ('resnet18', 'moe_resnet18', dict(widths=16, num_selected=1, residual=False, gate='relu_gap_fc'), {}),
    ('resnet18', 'deepmoe_narrow_resnet18', {}, {}),
    ('resnet18', 'deepmoe_resnet18', {}, {}),
    ('resnet18', 'deepmoe_resnet18', dict(width=1.5, embed_softmax=False), {}),
    ('resnet18', 'deepmoe_resnet18', dict(widen='all'), {}),
    ('resnet50', 'deepmoe_resnet50', {}, {}),
    ('deepmoe_vgg16_cifar_dense', 'deepmoe_vgg16_cifar', {}, {}),
    ('vit_tiny_patch16_224', 'vmoe_vit_b', {}, {}),
    ('vit_tiny_patch16_224', 'vmoe_vit_b', dict(num_selected=1), {}),
    ('vit_tiny_patch16_224', 'vmoe_vit_b', dict(router_args=dict(renormalise=True)), {}),
    ('vit_tiny_patch16_224', 'vmoe_vit_b', dict(router='shazeer', num_shared_experts=2), {}),
    ('vit_tiny_patch16_224', 'vmoe_vit_b', dict(router='sigmoid'), {}),
    ('vit_tiny_patch16_224', 'vmoe_vit_b', dict(router='cosine', router_args=dict(renormalise=True)), {}),
    ('vit_tiny_patch16_224', 'vmoe_vit_b_ec', dict(capacity_factor=3.), {}),  # no more than all tokens
    ('vit_tiny_patch16_224', 'vmoe_vit_b_ec', dict(capacity_factor=2.), {}),  # 2 K slots for E = 4: all tokens
    ('vit_tiny_patch16_224', 'vmoe_vit_b_ec', dict(capacity=1000), {}),  # all tokens, whatever the factor
    ('mobilenetv1_100', 'condconv_mobilenetv1_100', {}, {}),
    pytest.param('mobilenetv2_100', 'condconv_mobilenetv2_100', {}, {}, marks=slow),
    pytest.param('semnasnet_100', 'condconv_mnasnet_a1', {}, {}, marks=slow),
    pytest.param('tf_efficientnet_b0', 'condconv_efficientnet_b0', {}, {}, marks=slow),
    pytest.param('tf_efficientnet_lite0', 'condconv_efficientnet_lite0', {}, {}, marks=slow),
    pytest.param('mobilenetv2_050', 'dyconv_mobilenetv2_050', {}, {}, marks=slow),
    pytest.param('mobilenetv3_small_100', 'dyconv_mobilenetv3_small_100', {}, {}, marks=slow),
    pytest.param('wide_resnet50_2', 'condconv_resnet50', dict(base_width=128, num_experts=2), {}, marks=slow),
    pytest.param('wide_resnet50_2', 'dyconv_resnet50', dict(base_width=128, num_experts=2), {}, marks=slow),
]


@pytest.mark.parametrize('twin, name, kwargs, options', KEPT)
def test_the_function_is_kept(twin, name, kwargs, options):
    dense, model = pair(twin, name, kwargs)
    assert difference(dense, model) > 0.1
    model.load_state_dict(upcycle(dense.state_dict(), model, **options))
    assert difference(dense, model) < 1e-5


@pytest.mark.parametrize('kwargs, twin_kwargs', [
    (dict(), dict(init_values=0.3)),  # LayerScale is folded
    (dict(init_values=0.3), dict(init_values=0.3)),
    (dict(class_token=False, global_pool='avg', fc_norm=True), dict(class_token=False, global_pool='avg')),
    (dict(patch_size=16), dict(patch_size=16)),
    (dict(patch_size=14, img_size=28), dict(patch_size=14, img_size=28)),
    (dict(patch_size=32, img_size=64), dict(patch_size=32, img_size=64)),
    (dict(reg_tokens=2, no_embed_class=True), dict(reg_tokens=2, no_embed_class=True)),
])
def test_shapes_of_vision_transformers(kwargs, twin_kwargs):
    dense, model = pair('vit_tiny_patch16_224', 'vmoe_vit_b', kwargs, twin_kwargs)
    for name, gamma in dense.named_parameters():
        if 'ls' in name:
            nn.init.uniform_(gamma, 0.2, 2.)
    model.load_state_dict(upcycle(dense.state_dict(), model))
    assert difference(dense, model, model.patch_embed.img_size[0]) < 1e-5


def test_the_table_of_positions_is_resized_as_timm_does():
    dense, model = pair('vit_tiny_patch16_224', 'vmoe_vit_b', dict(img_size=48))  # 4 x 4 to 6 x 6 patches
    table = upcycle(dense.state_dict(), model)['pos_embed']
    assert table.shape == (1, 37, 32)
    assert torch.equal(table, resample_abs_pos_embed(dense.pos_embed.detach(), new_size=[6, 6]))


def test_the_other_gelu_is_the_only_difference():
    dense, model = pair('vit_tiny_patch16_224', 'vmoe_vit_b', dict(act_layer='gelu_tanh'))
    model.load_state_dict(upcycle(dense.state_dict(), model))
    assert 1e-6 < difference(dense, model) < 1e-2
    tanh = pair('vit_tiny_patch16_224', 'vmoe_vit_b', {}, dict(act_layer='gelu_tanh'))[0]
    tanh.load_state_dict(dense.state_dict())
    assert difference(tanh, model) < 1e-5


# Experts that are parts

@pytest.mark.parametrize('kwargs', [
    dict(num_selected=4),  # 4 gates of 1/4
    dict(num_selected=4, router_args=dict(renormalise=True)),
])
def test_slices_make_the_dense_mlp_together(kwargs):
    # The dense MLP is 128 wide, an expert 32.
    dense, model = pair('vit_tiny_patch16_224', 'vmoe_vit_b', dict(kwargs, expert_mlp_ratio=1.))
    model.load_state_dict(upcycle(dense.state_dict(), model, method='split'))
    assert difference(dense, model) < 1e-5
    experts, mlp = model.blocks[1].mlp, dense.blocks[1].mlp
    assert torch.equal(experts.fc1.weight[1], mlp.fc1.weight[32:64])
    torch.testing.assert_close(experts.fc2.weight[1], 4 * mlp.fc2.weight[:, 32:64])
    assert torch.equal(experts.fc2.bias[1], mlp.fc2.bias)


def test_fewer_slices_cost_less_and_keep_less():
    dense, model = pair('vit_tiny_patch16_224', 'vmoe_vit_b', dict(num_selected=2, expert_mlp_ratio=1.))
    model.load_state_dict(upcycle(dense.state_dict(), model, method='split'))
    assert 1e-3 < difference(dense, model) < 1.


def test_expert_ratio_makes_slices_too():
    # 2 x 2 experts of half the width: the first 2 of 4 chosen are the two halves, twice.
    kwargs = dict(num_experts=4, num_selected=2, expert_ratio=2)
    dense, model = pair('vit_tiny_patch16_224', 'vmoe_vit_b', kwargs)
    model.load_state_dict(upcycle(dense.state_dict(), model, method='split'))
    assert difference(dense, model) < 1e-5


def test_slices_that_do_not_fit_are_refused():
    dense, model = pair('vit_tiny_patch16_224', 'vmoe_vit_b', dict(num_experts=3, expert_mlp_ratio=1.))
    with pytest.raises(InputError, match='blocks.1.mlp has 3 experts of width 32, which cannot be slices of a dense MLP'
                                         ' of width 128'):
        upcycle(dense.state_dict(), model, method='split')


def test_experts_choose_copies_of_the_dense_mlp_but_not_all_tokens():
    dense, model = pair('vit_tiny_patch16_224', 'vmoe_vit_b_ec', dict(num_experts=8))
    model.load_state_dict(upcycle(dense.state_dict(), model))
    assert model.blocks[1].mlp.router.weight.std() > 0  # under a zero router all experts would choose the same tokens
    # a gate is about 1/8, and 2 of 8 experts take a token on average
    torch.testing.assert_close(model.blocks[1].mlp.fc2.weight[3], 4 * dense.blocks[1].mlp.fc2.weight)
    assert 1e-3 < difference(dense, model) < 1.


def test_narrow_stages_have_channels_of_the_dense_one():
    dense, model = pair('resnet18', 'moe_resnet18', dict(widths=4))
    model.load_state_dict(upcycle(dense.state_dict(), model))
    experts, stage = model.layer4[0].experts, dense.layer4
    # Expert e of 4 starts at channel 4 e of 16: together they have them all.
    assert torch.equal(experts[1][0].conv1.weight, stage[0].conv1.weight[4:8])
    assert torch.equal(experts[1][0].bn2.running_mean, stage[0].bn2.running_mean[4:8])
    # sqrt(16 / 4) for sums over a quarter of the channels
    torch.testing.assert_close(experts[3][1].conv1.weight, 2 * stage[1].conv1.weight[:, 12:16])
    # The dense second block adds its input; the expert's puts its 4 channels where they were.
    passed = experts[2][1].downsample[0].weight.flatten(1)  # (16, 4)
    assert torch.equal(passed, torch.eye(16)[:, 8:12])
    assert not model.layer4[0].shortcut[1].weight.any()
    assert difference(dense, model) > 1e-2


# Symmetry

def test_the_noise_of_mixed_kernels_cancels():
    dense, model = pair('resnet18', 'condconv_resnet18', dict(num_experts=4))
    state = upcycle(dense.state_dict(), model)
    kernels, kernel = state['layer4.0.conv1.weight'], dense.layer4[0].conv1.weight
    torch.testing.assert_close(kernels.sum(0) / 2, kernel.flatten())  # four gates of 1/2
    # Noise of a tenth of the kernel's spread, less its mean over 4 experts, over a sum of gates of 2.
    spread = 0.1 * kernel.std().item() * math.sqrt(3 / 4) / 2
    assert (kernels - kernel.flatten() / 2).std().item() == pytest.approx(spread, rel=0.05)
    assert not state['layer4.0.routing_fn.weight'].any() and not state['layer4.0.routing_fn.bias'].any()
    assert not torch.equal(kernels[0], kernels[1])
    again = upcycle(dense.state_dict(), model)
    assert all(torch.equal(state[key], again[key]) for key in state)


def train(model: nn.Module, steps: int = 50) -> None:
    """On labels that the mean colour of an image tells."""
    task = MoEClassificationTask(model.train(), verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(steps):
        y = torch.randint(0, 5, (8,))
        x = torch.randn(8, 3, 32, 32) + y.view(-1, 1, 1, 1) - 2
        task(x, y)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        end_step(model)


@pytest.mark.parametrize('twin, name, kwargs, weight', [
    ('resnet18', 'condconv_resnet18', dict(num_experts=3), 'layer4.1.conv2.weight'),
    ('resnet18', 'dyconv_resnet18', dict(num_experts=3, temperature=1., anneal_epochs=0), 'layer4.1.conv2.weight'),
    ('resnet18', 'moe_resnet18', dict(layer='conv', num_experts=3), 'layer4.1.conv2.weight'),
    ('vit_tiny_patch16_224', 'vmoe_vit_b', dict(num_experts=3), 'blocks.1.mlp.fc1.weight'),
    ('vit_tiny_patch16_224', 'vmoe_vit_b', dict(num_experts=3, router_args=dict(renormalise=True)),
     'blocks.1.mlp.fc1.weight'),
    ('resnet18', 'deepmoe_resnet18', dict(embed_stem=0, embed_widths=(8, 8)), 'layer4.1.conv1.weight'),
])
def test_kernels_and_gates_part_in_training(twin, name, kwargs, weight):
    dense, model = pair(twin, name, kwargs)
    start = upcycle(dense.state_dict(), model, router='zero')
    model.load_state_dict(start)
    train(model)
    other = 16 if 'deepmoe' in name else 1  # experts are channels there, and 16 starts as a copy of 0
    moves = [model.state_dict()[weight][i] - start[weight][i] for i in (0, other)]
    # Equal experts would have moved alike, but for rounding; a copied channel has other outgoing weights.
    assert (moves[0] - moves[1]).norm() > 1e-3 * moves[0].norm() > 0
    with trace_routing(model.eval()) as trace, torch.no_grad():
        model(torch.randn(8, 3, 32, 32) + torch.linspace(-2, 2, 8).view(-1, 1, 1, 1))
    logits = trace['blocks.1.mlp' if 'vit' in name else next(reversed(trace))][0].logits
    assert (logits - logits[:, :1]).abs().max() > 1e-4  # all equal at the start


def test_without_noise_mixed_kernels_stay_equal():
    dense, model = pair('resnet18', 'condconv_resnet18', dict(num_experts=3))
    model.load_state_dict(upcycle(dense.state_dict(), model, noise=0.))
    train(model, steps=3)
    kernels = model.layer4[1].conv2.weight
    torch.testing.assert_close(kernels[0], kernels[1])


def test_noise_on_chosen_experts_is_for_those_who_ask():
    dense, model = pair('vit_tiny_patch16_224', 'vmoe_vit_b')
    weight = dense.blocks[1].mlp.fc1.weight
    copies = upcycle(dense.state_dict(), model)['blocks.1.mlp.fc1.weight']
    assert torch.equal(copies, weight.expand(4, -1, -1))
    moved = upcycle(dense.state_dict(), model, noise=0.2)['blocks.1.mlp.fc1.weight']
    assert (moved - weight).std().item() == pytest.approx(0.2 * weight.std().item(), rel=0.05)


# Routers

def test_a_router_of_clusters_sends_each_to_an_expert():
    # Three clusters around (1, 0, 0) and so on, far from the origin along (5, 5, 5).
    centres = torch.eye(3).repeat_interleave(20, dim=0) + 5
    tokens = centres + 0.05 * torch.randn(60, 3)
    weights = router_of_clusters(tokens, 3)
    chosen = (tokens @ weights.t()).argmax(dim=1).view(3, 20)
    assert (chosen == chosen[:, :1]).all() and len(set(chosen[:, 0].tolist())) == 3
    assert (tokens @ weights.t()).std().item() == pytest.approx(1., abs=1e-5)


def test_clusters_are_those_of_directions_from_the_mean():
    tokens = torch.randn(60, 6) * torch.linspace(0.1, 10, 60).unsqueeze(1)  # long ones count as much as short ones
    tokens = torch.cat([tokens, -tokens])
    # What all tokens have in common is orthogonal to the rest here, and how much of it there is changes nothing.
    little, much = (F.pad(tokens, (0, 1), value=common) for common in (0.1, 10.))
    torch.testing.assert_close(router_of_clusters(little, 4), router_of_clusters(much, 4))


def test_routers_of_clusters_say_nothing_of_the_mean():
    # A router has no bias that would subtract what its rows said of it.
    tokens = torch.tensor([3., -1., 2.]) + torch.randn(50, 3) * torch.tensor([3., 1., 1.])
    weights = router_of_clusters(tokens, 3)
    torch.testing.assert_close(weights @ tokens.mean(dim=0), torch.zeros(3), atol=1e-5, rtol=0)
    assert weights.norm(dim=1).min() > 0.1


def test_no_cluster_stays_empty():
    tokens = torch.eye(8).repeat_interleave(10, dim=0) + 0.01 * torch.randn(80, 8)
    chosen = (tokens @ router_of_clusters(tokens, 8).t()).argmax(dim=1)
    assert len(set(chosen[::10].tolist())) == 8
    # Two directions and three clusters: the third begins anew where there are tokens.
    assert router_of_clusters(torch.tensor([[1., 0.], [-1., 0.]]).repeat(10, 1), 3).norm(dim=1).min() > 0.1


def test_token_features_start_the_routers_of_a_model():
    kwargs = dict(router_args=dict(renormalise=True))
    dense, model = pair('vit_tiny_patch16_224', 'vmoe_vit_b', kwargs)
    names = [name for name, m in model.named_modules() if isinstance(m, MoEMlp)]
    tokens = token_features(dense.eval(), names, torch.randn(4, 3, 32, 32))
    assert {name: t.shape for name, t in tokens.items()} == {'blocks.1.mlp': (4 * 17, 32)}
    state = upcycle(dense.state_dict(), model, router='kmeans', tokens=tokens)
    assert torch.equal(state['blocks.1.mlp.router.weight'], router_of_clusters(tokens['blocks.1.mlp'], 4))
    model.load_state_dict(state)
    assert difference(dense, model) < 1e-5
    assert not any(m._forward_pre_hooks for m in dense.modules())


def test_a_random_router_is_the_models_own():
    dense, model = pair('resnet18', 'condconv_resnet18')
    state = upcycle(dense.state_dict(), model, router='random')
    assert torch.equal(state['fc.routing_fn.weight'], model.fc.routing_fn.weight)


# Other classes, other types

def test_routers_stay_random_where_the_function_does_not_ask_for_zero():
    # All 4 of 4 are chosen, so that V-MoE's gates sum to one whatever they are.
    dense, model = pair('vit_tiny_patch16_224', 'vmoe_vit_b', dict(num_selected=4))
    state = upcycle(dense.state_dict(), model)
    weight = state['blocks.1.mlp.router.weight']
    assert torch.equal(weight, model.blocks[1].mlp.router.weight) and weight.any()


def test_a_part_can_keep_the_models_own_weights():
    dense, _ = pair('resnet18', 'condconv_resnet18')
    model = timm.create_model('condconv_resnet18', num_classes=3, **RESNET)
    state = upcycle(dense.state_dict(), model, ignore=('fc',))
    assert torch.equal(state['fc.weight'], model.fc.weight)
    assert torch.equal(state['fc.routing_fn.weight'], model.fc.routing_fn.weight)
    assert torch.equal(state['conv1.weight'], dense.conv1.weight)
    model.load_state_dict(state)


def test_half_precision_and_files_without_counters():
    dense, model = pair('resnet18', 'condconv_resnet18')
    weights = {k: v.half() for k, v in dense.state_dict().items() if not k.endswith('num_batches_tracked')}
    state = upcycle(weights, model)
    assert all(state[key].dtype == value.dtype for key, value in model.state_dict().items())
    model.load_state_dict(state)
    assert difference(dense, model) < 0.05


def test_weights_of_a_routed_model_are_told_from_dense_ones():
    for twin, name in (('resnet18', 'condconv_resnet18'), ('resnet18', 'deepmoe_resnet18'),
                       ('resnet18', 'moe_resnet18'), ('vit_tiny_patch16_224', 'vmoe_vit_b')):
        dense, model = pair(twin, name)
        assert is_routed(model.state_dict(), model) and not is_routed(dense.state_dict(), model)
        assert is_routed(dense.state_dict(), dense)


# Bad input

@pytest.mark.parametrize('twin, name, kwargs, message', [
    # The first in the model's order: its 3 x 3 convolution meets a 1 x 1.
    ('resnet50', 'condconv_resnet18', {}, 'layer1.0.conv1.weight is of shape (8, 64, 1, 1) in them, and the model takes'
                                          ' shape (8, 64, 3, 3)'),
    ('resnet18', 'condconv_resnet18', dict(layers=(1, 1, 1, 3)),
     'layer4.2.conv1.weight is missing in them, and the model takes shape (16, 16, 3, 3)'),
    ('resnet18', 'condconv_resnet18', dict(layers=(1, 1, 1, 1)),
     'layer4.1.conv1.weight of shape (16, 16, 3, 3) is in them, and the model has nothing of that name'),
    ('resnet18', 'condconv_resnet18', dict(num_classes=3),
     'fc.weight is of shape (5, 16) in them, and the model takes shape (3, 16)'),
    ('resnet18', 'deepmoe_resnet18', dict(channels=(4, 8, 16, 16)),
     'layer1.0.conv2.weight is of shape (8, 8, 3, 3) in them, and the model takes shape (4, 8, 3, 3)'),
    ('resnet18', 'moe_resnet18', dict(widths=32),
     'layer4.0.conv1.weight is of shape (16, 16, 3, 3) in them, and the model takes shape (32, 16, 3, 3)'),
    ('vit_tiny_patch16_224', 'vmoe_vit_b', dict(expert_mlp_ratio=2.),
     'blocks.1.mlp.fc1.weight is of shape (128, 32) in them, and the model takes shape (64, 32)'),
    ('vit_tiny_patch16_224', 'vmoe_vit_b', dict(global_pool='avg', class_token=False),
     'pos_embed is of shape (1, 17, 32) in them, and the model takes shape (1, 16, 32)'),
])
def test_another_architecture_is_told_by_its_first_tensor(twin, name, kwargs, message):
    dense, model = pair(twin, name)
    model = timm.create_model(name, **{**dict(num_classes=5), **(ROUTED_VIT if 'vit' in name else RESNET), **kwargs})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError, match=re.escape(message)) as error:
        upcycle(dense.state_dict(), model)
    assert str(error.value).startswith('The dense weights are of another architecture than the model: ')
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('options, message', [
    (dict(router='zeros'), "router='zeros' is not one of zero, random, kmeans. Did you mean 'zero'"),
    (dict(method='splits'), "method='splits' is not one of copy, split. Did you mean 'split'"),
    (dict(noise=-1.), 'noise=-1.0: use a share'),
    (dict(router='kmeans'), "tokens has no features for 'blocks.1.mlp'"),
])
def test_bad_arguments_are_refused_in_a_sentence(options, message):
    dense, model = pair('vit_tiny_patch16_224', 'vmoe_vit_b')
    with pytest.raises(InputError, match=re.escape(message)):
        upcycle(dense.state_dict(), model, **options)


def test_directions_have_no_zero():
    dense, model = pair('vit_tiny_patch16_224', 'vmoe_vit_b', dict(router='cosine'))
    for router in ('zero', 'kmeans'):
        with pytest.raises(InputError, match=f"router='{router}': 'blocks.1.mlp' compares directions, which can only"):
            upcycle(dense.state_dict(), model, router=router)
    state = upcycle(dense.state_dict(), model)
    assert torch.equal(state['blocks.1.mlp.router.weight'], model.blocks[1].mlp.router.weight)


def test_models_that_take_no_dense_weights_say_so():
    dense, model = pair('vit_tiny_patch16_224', 'softmoe_vit_s', dict(moe_layers=(1,)))
    with pytest.raises(InputError, match="'blocks.1.mlp' is a SoftMoEMlp, which no dense layer can start"):
        upcycle(dense.state_dict(), model)
    with pytest.raises(InputError, match='VisionTransformer has no routed layers'):
        upcycle(dense.state_dict(), dense)
    with pytest.raises(InputError, match="no module 'blocks.1.mpl' in the model. Did you mean 'blocks.1.mlp'"):
        token_features(dense, ['blocks.1.mpl'], torch.randn(1, 3, 32, 32))


# The command line. A MobileNet is as small as a registered name gets.

@pytest.fixture
def dense_file(tmp_path):
    """A checkpoint of timm's saver, of a dense MobileNetV2 of half width."""
    dense = lively(timm.create_model('mobilenetv2_050', num_classes=5))
    path = tmp_path / 'dense.pth.tar'
    torch.save({'state_dict': dense.state_dict(), 'epoch': 3}, path)
    return path, dense


def convert(*arguments) -> None:
    cli.main(['convert-checkpoint', 'upcycle', *map(str, arguments)])


def test_a_file_becomes_a_file_of_the_routed_model(dense_file, tmp_path, capsys):
    path, dense = dense_file
    out = tmp_path / 'routed.safetensors'
    convert(path, out, '--model', 'dyconv_mobilenetv2_050', '--model-kwargs', 'num_classes=5', 'num_experts=2')
    said = capsys.readouterr().out
    assert f"timm.create_model('dyconv_mobilenetv2_050', checkpoint_path='{out}', num_classes=5, num_experts=2)" in said
    assert 'upcycled, not trained' in said
    with safe_open(out, 'pt') as file:
        assert file.metadata()['source'] == 'dense.pth.tar' and file.metadata()['note'] == 'upcycled, not trained'
    model = timm.create_model('dyconv_mobilenetv2_050', checkpoint_path=str(out), num_classes=5, num_experts=2)
    assert difference(dense, model) < 1e-5
    convert(path, out, '--model', 'dyconv_mobilenetv2_050', '--ignore', 'classifier', '--noise', '0')  # 1000 classes


@pytest.mark.parametrize('arguments, message', [
    (['--model', 'dyconv_mobilenetv2_100', '--model-kwargs', 'num_classes=5'],
     'of another architecture than the model: conv_stem.weight is of shape (16, 3, 3, 3) in them'),
    (['--model', 'dyconv_mobilenetv2_5'], "--model 'dyconv_mobilenetv2_5' is unknown. Did you mean"),
    (['--model', 'dyconv_mobilenetv2_050', '--model-kwargs', 'num_expert=5'], "Did you mean 'num_experts'?"),
    (['--model', 'dyconv_mobilenetv2_050', '--model-kwargs', 'five'], "Cannot read 'five': options are given as key="),
    (['--model', 'mobilenetv2_050', '--model-kwargs', 'num_classes=5'], 'EfficientNet has no routed layers'),
    (['--model', 'dyconv_mobilenetv2_050', '--ignore', 'clasifier'],
     "--ignore 'clasifier': the model has no part of that name. Did you mean 'classifier'"),
    (['--model', 'dyconv_mobilenetv2_050', '--method', 'split'], '--method split: the model has no token experts'),
])
def test_what_cannot_be_upcycled_is_told_and_nothing_written(dense_file, tmp_path, capsys, arguments, message):
    out = tmp_path / 'routed.safetensors'
    with pytest.raises(SystemExit) as stopped:
        convert(dense_file[0], out, *arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith('error: ') and error.count('\n') == 1
    assert message in error
    assert list(tmp_path.iterdir()) == [dense_file[0]]


def vit_file(tmp_path):
    """A dense ViT, its file, a folder of images, and the arguments of the routed one."""
    dense = timm.create_model('vit_tiny_patch16_224', num_classes=5, **VIT)
    save_file(dense.state_dict(), tmp_path / 'vit.safetensors')
    for i in range(3):
        (tmp_path / 'photos' / str(i)).mkdir(parents=True)
        pixels = torch.randint(256, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).save(tmp_path / 'photos' / str(i) / 'photo.png')
    kwargs = [f'{key}={value}' for key, value in {**ROUTED_VIT, 'num_classes': 5}.items()]
    return dense, ['--model', 'vmoe_vit_b', '--model-kwargs', *kwargs, "router_args={'renormalise': True}"]


def test_routers_start_from_clusters_of_images(tmp_path, capsys):
    dense, arguments = vit_file(tmp_path)
    source, out = tmp_path / 'vit.safetensors', tmp_path / 'routed.safetensors'
    convert(source, out, *arguments, '--router', 'kmeans', '--images', tmp_path / 'photos')
    model = timm.create_model(
        'vmoe_vit_b', num_classes=5, **ROUTED_VIT, router_args=dict(renormalise=True), checkpoint_path=str(out))
    assert difference(dense, model) < 1e-5
    # The tokens are those of the dense network, whose statistics are the model's.
    transform = create_transform(**resolve_data_config(dict(img_size=32), model=model), is_training=False)
    images = torch.stack([transform(Image.open(tmp_path / f'photos/{i}/photo.png')) for i in range(3)])
    tokens = token_features(dense.eval(), ['blocks.1.mlp'], images)['blocks.1.mlp']
    assert tokens.shape == (3 * 17, 32)
    logits = tokens @ model.blocks[1].mlp.router.weight.t()
    assert logits.std().item() == pytest.approx(1., abs=1e-3) and len(logits.argmax(dim=1).unique()) == 4
    convert(source, out, *arguments, '--router', 'random')
    assert capsys.readouterr().out.count('upcycled, not trained') == 2


@pytest.mark.parametrize('arguments, message', [
    (['--router', 'kmeans'], '--router kmeans and --images DIR belong together'),
    (['--images', 'photos'], '--router kmeans and --images DIR belong together'),
    (['--router', 'kmeans', '--images', 'none'], "--images '{}/none': there are no images in it."),
    (['--router', 'kmeans', '--images', 'torn'], "The image '{}/torn/a.png' cannot be read"),
    (['--router', 'kmeans', '--images', 'photos', '--model', 'condconv_mobilenetv1_025'], 'of another architecture'),
])
def test_clusters_need_images_and_tokens(tmp_path, capsys, arguments, message):
    _, keywords = vit_file(tmp_path)
    (tmp_path / 'torn').mkdir()
    (tmp_path / 'torn' / 'a.png').write_bytes(b'PNG')
    keywords = keywords if '--model' not in arguments else []
    given = [tmp_path / each if each in ('photos', 'none', 'torn') else each for each in arguments]
    with pytest.raises(SystemExit) as stopped:
        convert(tmp_path / 'vit.safetensors', tmp_path / 'routed.safetensors', *keywords, *given)
    assert stopped.value.code == 2 and message.format(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / 'routed.safetensors').exists()


def test_models_without_token_experts_have_no_clusters(dense_file, tmp_path, capsys):
    with pytest.raises(SystemExit):
        convert(dense_file[0], tmp_path / 'a.safetensors', '--model', 'dyconv_mobilenetv2_050', '--model-kwargs',
                'num_classes=5', '--router', 'kmeans', '--images', tmp_path)
    assert '--router kmeans: the model has no token experts' in capsys.readouterr().err
    with pytest.raises(InputError, match='4 experts need as many tokens at least, and there are 3.'):
        router_of_clusters(torch.randn(3, 8), 4)


def test_files_that_are_no_weights_are_told(dense_file, tmp_path, capsys):
    (tmp_path / 'torn.pth').write_bytes(dense_file[0].read_bytes()[:1000])
    for dense, out, message in (
            (tmp_path / 'none.pth', 'a.safetensors', 'There is no checkpoint file'),
            (tmp_path / 'torn.pth', 'a.safetensors', 'it is truncated after 1,000 bytes'),
            (dense_file[0], 'a.pth', 'use a name that ends in .safetensors')):
        with pytest.raises(SystemExit) as stopped:
            convert(dense, tmp_path / out, '--model', 'dyconv_mobilenetv2_050')
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ['dense.pth.tar', 'torn.pth']


@pytest.mark.parametrize('kind, half', [(GluMlp, 'last'), (SwiGLU, 'first')])
def test_slices_of_a_gated_mlp_make_it_together(kind, half):
    """Two slices of half the width, each twice among four experts that all are chosen: the dense GLU."""
    torch.manual_seed(0)
    dense = nn.Sequential(OrderedDict(mlp=kind(8, 24 if kind is GluMlp else 12, norm_layer=None)))
    layer = MoEMlp(8, 6, num_experts=4, num_selected=4, glu=half, router_args={'renormalise': True},
                   act_layer=type(dense.mlp.act), capacity_factor=None)
    model = nn.Sequential(OrderedDict(mlp=layer)).eval()
    model.load_state_dict(upcycle(dense.state_dict(), model, method='split'))
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(model(x), dense(x), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))
    with pytest.raises(InputError, match="^glu='middle': use 'first' or 'last'"):
        MoEMlp(8, 6, glu='middle')
