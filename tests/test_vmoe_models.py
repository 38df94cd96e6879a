"""The V-MoE models: sizes, positions, heads, checkpoints, and the contract of a timm model.

Letters: B images, N tokens, D width, E experts, K chosen experts.
"""
import copy
import json
import math

import numpy as np
import pytest
import timm
import torch
from timm.layers import set_reentrant_ckpt
from timm.models import get_model_args, get_notrace_functions, get_notrace_modules, group_parameters, save_for_hf
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch.nn import functional as F
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import moe_zoo  # noqa: F401 - registers the models
from moe_zoo.checkpoints import import_vmoe
from moe_zoo.errors import InputError
from moe_zoo.losses import auxiliary_losses
from moe_zoo.models.vmoe import VMoE, checkpoint_filter_fn, from_config, sincos2d_table
from moe_zoo.routing import trace_routing

TINY = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=10, num_experts=4)


def tiny(**kwargs):
    """Four blocks of width 32, experts in 1 and 3; all experts and the head start different from zero."""
    args = {**TINY, 'representation_size': 0, 'same_init': False, 'head_zero_init': False, **kwargs}
    return timm.create_model('vmoe_vit_s', **args)


def test_size_of_the_small_one_exactly():
    model = timm.create_model('vmoe_vit_s', device='meta')
    assert sum(p.numel() for p in model.parameters()) == 56_999_400
    assert [i for i, block in enumerate(model.blocks) if hasattr(block.mlp, 'router')] == [5, 7]
    assert (len(model.blocks), model.embed_dim) == (8, 512)
    assert model.blocks[5].mlp.fc1.weight.shape == (8, 2048, 512)


@pytest.mark.parametrize('layers, depth, expected', [
    ('last_2', 8, [5, 7]),  # of odd number, not the last two
    ('last_5', 32, [23, 25, 27, 29, 31]),
    ('every_2', 12, [1, 3, 5, 7, 9, 11]),
    ('every_3', 8, [2, 5]),
    ((0, 3), 4, [0, 3]),
])
def test_which_blocks_are_routed(layers, depth, expected):
    model = tiny(moe_layers=layers, depth=depth, device='meta')
    assert [i for i, block in enumerate(model.blocks) if hasattr(block.mlp, 'router')] == expected


def test_sincos_table_by_hand():
    # D = 8: two frequencies, 1 and 1/100 for a temperature of 100. Position (row 1, column 2) of a 2 x 3 grid is row 5.
    table = sincos2d_table(2, 3, 8, 100., torch.zeros(1))
    x, y = [2., 0.02], [1., 0.01]
    expected = [f(v) for values, f in ((x, math.sin), (x, math.cos), (y, math.sin), (y, math.cos)) for v in values]
    torch.testing.assert_close(table[0, 5], torch.tensor(expected))


def test_position_tables_resize_corner_to_corner():
    """On a line from 0 to 3, three points to five: 0, 0.75, 1.5, 2.25, 3 if the ends stay, and the class row stays."""
    model = tiny(img_size=16, class_token=True, device='cpu')  # a grid of 2 x 2
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[0, 0] = 7.
        model.pos_embed[0, 1:] = torch.tensor([0., 3., 0., 3.]).unsqueeze(1)  # columns 0 and 3 in both rows
    state = copy.deepcopy(model.state_dict())
    model.set_input_size(img_size=(32, 32))
    expected = torch.tensor([0., 1., 2., 3.]).repeat(4)
    assert model.pos_embed.shape == (1, 17, 32)
    torch.testing.assert_close(model.pos_embed[0, :, 0], torch.cat([torch.tensor([7.]), expected]))
    # Loading into a model of the larger size does the same.
    larger = tiny(img_size=32)
    larger.pretrained_cfg['input_size'] = (3, 16, 16)
    torch.testing.assert_close(checkpoint_filter_fn(state, larger)['pos_embed'], model.pos_embed.detach())


@pytest.mark.parametrize('pos_embed', ['learn', 'sincos2d', 'none'])
def test_dynamic_size_equals_a_model_set_to_that_size(pos_embed):
    dynamic = tiny(pos_embed=pos_embed, dynamic_img_size=True).eval()
    fixed = tiny(pos_embed=pos_embed).eval()
    fixed.load_state_dict(dynamic.state_dict())
    fixed.set_input_size(img_size=(48, 64))
    x = torch.randn(2, 3, 48, 64)
    torch.testing.assert_close(dynamic(x), fixed(x))
    with pytest.raises(AssertionError, match="doesn't match model"):
        fixed(torch.randn(2, 3, 32, 32))


def test_class_token_takes_the_first_row_of_the_table():
    model = tiny().eval()
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[:, 0] = 5.
        tokens = model._pos_embed(torch.zeros(2, 16, 32))
    assert tokens.shape == (2, 17, 32)
    assert (tokens[:, 0] == 5.).all() and not tokens[:, 1:].any()


@pytest.mark.parametrize('pool, class_token', [('token', True), ('token', False), ('avg', False), ('map', False)])
def test_pooling_and_heads(pool, class_token):
    model = tiny(global_pool=pool, class_token=class_token, representation_size=24).eval()
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    assert features.shape == (2, 16 + class_token, 32)
    assert model.head_hidden_size == 24 and model.num_features == 32
    hidden = model.forward_head(features, pre_logits=True)
    pooled = {'token': features[:, 0], 'avg': features.mean(1)}
    pooled = pooled[pool] if pool in pooled else model.attn_pool(features)
    torch.testing.assert_close(hidden, torch.tanh(F.linear(
        pooled, model.pre_logits.fc.weight, model.pre_logits.fc.bias)))
    torch.testing.assert_close(model(x), model.head(hidden))
    model.reset_classifier(7)
    assert model(x).shape == (2, 7) and model.head.in_features == 24
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), hidden)


def test_initial_weights_are_the_originals():
    model = timm.create_model('vmoe_vit_s', **{**TINY, 'num_classes': 100, 'global_pool': 'map', 'class_token': False})
    assert not model.head.weight.any()
    assert model.head.bias[0].item() == pytest.approx(-math.log(100))
    qkv = model.blocks[0].attn.qkv.weight  # each of the three is Xavier uniform on 32 and 32: sqrt(6 / 64) = 0.306
    assert 0.28 < qkv.abs().max() <= 0.3062
    moe = model.blocks[1].mlp
    assert (moe.fc1.weight == moe.fc1.weight[:1]).all()
    assert 0 < moe.fc1.bias.abs().max() < 1e-5
    assert model.attn_pool.latent.abs().max() <= math.sqrt(6 / 33)
    # Router: Lecun normal, truncated at two deviations: sqrt(1 / 32) = 0.177 after the cut, so at most 0.402.
    assert moe.router.weight.std().item() == pytest.approx(0.177, rel=0.25)
    assert moe.router.weight.abs().max() <= 0.403


def test_weights_can_be_made_again_after_to_empty():
    model = tiny(device='meta').to_empty(device='cpu')
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(math.nan)
    model.init_weights()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(model.eval()(torch.randn(1, 3, 32, 32))).all()


def losses_and_gradients(model, run=None):
    """Task and auxiliary loss with the noise of one seed; the auxiliary part is made heavy enough to be seen."""
    model.zero_grad()
    torch.manual_seed(1)
    output, routings = (model if run is None else run)(torch.randn(9, 3, 32, 32))
    loss = F.cross_entropy(output, torch.arange(9)) + 100. * sum(auxiliary_losses(routings).values())
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize('reentrant', [False, True])
def test_checkpointing_keeps_every_gradient(reentrant):
    model = tiny().train()
    model.set_aux_loss(True)
    expected = losses_and_gradients(model)
    assert expected[1]['blocks.1.mlp.router.weight'].any()
    model.set_grad_checkpointing()
    set_reentrant_ckpt(reentrant)
    try:
        loss, gradients = losses_and_gradients(model)
    finally:
        set_reentrant_ckpt(False)
    assert loss == expected[0]
    for name, gradient in expected[1].items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


def test_compiled_training_returns_the_records():
    model = tiny().train()
    model.set_aux_loss(True)
    expected = losses_and_gradients(model)
    torch._dynamo.reset()
    loss, gradients = losses_and_gradients(model, torch.compile(model, backend='aot_eager', fullgraph=True))
    assert loss == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(gradients[name], gradient, msg=name, rtol=1e-4, atol=1e-5)


def test_exported_model_takes_any_batch():
    model = tiny().eval()
    batch = torch.export.Dim('batch', min=1, max=64)
    exported = torch.export.export(model, (torch.randn(3, 3, 32, 32),), dynamic_shapes=({0: batch},)).module()
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning')
@pytest.mark.parametrize('kwargs', [
    {},
    dict(pos_embed='sincos2d', global_pool='avg', class_token=False, qk_norm=True),
    dict(dynamic_img_size=True, global_pool='map', representation_size=16, eval_capacity_factor=0.5),
])
def test_scripted_model(kwargs, tmp_path):
    model = tiny(**kwargs).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.jit.script(model).save(tmp_path / 'model.pt')
    torch.testing.assert_close(torch.jit.load(tmp_path / 'model.pt')(x), model(x))


@pytest.mark.parametrize('kwargs', [
    dict(dynamic_img_size=True),
    dict(dynamic_img_size=True, pos_embed='sincos2d'),
    dict(global_pool='map', qk_norm=True),
])
def test_traced_by_fx(kwargs):
    """With routed layers as leaves, as timm traces."""
    model = tiny(**kwargs).eval()
    leaves = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    _, nodes = get_graph_node_names(model, tracer_kwargs=leaves)
    traced = create_feature_extractor(model, return_nodes=[nodes[-1]], tracer_kwargs=leaves)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(traced(x)[nodes[-1]], model(x))


@pytest.mark.filterwarnings('ignore')
def test_captured_in_training_a_model_returns_its_output_alone():
    """Graphs carry no records, whatever the switch."""
    model, x = tiny(noise_std=0., capacity_factor=None).train(), torch.randn(2, 3, 32, 32)
    expected = model(x)
    model.set_aux_loss(True)
    leaves = dict(leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions())
    nodes = get_graph_node_names(model, tracer_kwargs=leaves)[0]
    assert nodes[-1] == 'head'
    for captured in (
            torch.export.export(model, (x,)).module(),
            torch.jit.script(model),
            torch.jit.trace(model, (x,), check_trace=False),
    ):
        torch.testing.assert_close(captured(x), expected)
    assert isinstance(model(x), tuple)


def test_evaluation_is_deterministic_and_images_are_independent():
    model = tiny().eval()
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        together = model(x)
        assert torch.equal(model(x), together)
        torch.testing.assert_close(torch.cat([model(image.unsqueeze(0)) for image in x]), together)


def test_every_parameter_gets_a_gradient_from_two_images():
    model = tiny(num_experts=16).train()
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_decay_and_layer_groups():
    model = tiny(global_pool='map', class_token=False)
    no_decay, decay = param_groups_weight_decay(
        model, weight_decay=0.1, no_weight_decay_list=model.no_weight_decay())
    names = {id(p): name for name, p in model.named_parameters()}
    # The original decays what flax calls kernels, routers and experts included, and nothing else.
    assert all(names[id(p)].endswith('weight') and p.ndim > 1 for p in decay['params'])
    assert {'pos_embed', 'attn_pool.latent', 'blocks.1.mlp.fc1.bias'} <= {names[id(p)] for p in no_decay['params']}
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups['blocks.1.mlp.fc1.weight'] == groups['blocks.1.mlp.router.weight'] == groups['blocks.1.norm1.weight']
    # The layer-wise groups of timm do not go by the name of a bias, and a stack of them has two axes.
    layers = param_groups_layer_decay(model, 0.1, model.no_weight_decay(), layer_decay=0.5)
    decayed = {names[id(p)] for group in layers for p in group['params'] if group['weight_decay']}
    assert decayed == {names[id(p)] for p in decay['params']}


def test_round_trip_through_timms_folder_format(tmp_path):
    model = tiny(moe_layers=[0, 3], losses=dict(importance=0.01), representation_size=24).eval()
    json.dumps(get_model_args(model))
    save_for_hf(model, tmp_path, model_config=dict(num_classes=10))
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(x), model(x))
    assert again.blocks[0].mlp.router.losses == (('importance', 0.01),)


def test_features_for_other_models():
    model = timm.create_model('vmoe_vit_s', **TINY, features_only=True).eval()
    features = model(torch.randn(2, 3, 32, 32))
    assert [f.shape for f in features] == [(2, 32, 4, 4)] * 3
    assert model.feature_info.reduction() == [8, 8, 8]


def test_pretrained_without_a_file_says_what_to_import(tmp_path):
    with pytest.raises(InputError, match='vmoe_vit_s has no file to download.*vmoe_s32_last2.*convert_checkpoint'):
        timm.create_model('vmoe_vit_s', pretrained=True)
    # Given weights, timm's own machinery loads them.
    model = tiny()
    overlay = dict(state_dict=model.state_dict(), num_classes=10)
    loaded = tiny(pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def flax_tree(model):
    """The parameters of a tiny model under the original's names and shapes, written out again by hand."""
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    tree = {
        'embedding/kernel': state['patch_embed.proj.weight'].transpose(2, 3, 1, 0),
        'embedding/bias': state['patch_embed.proj.bias'],
        'cls': state['cls_token'],
        'Encoder/posembed_input/pos_embedding': state['pos_embed'],
        'Encoder/encoder_norm/scale': state['norm.weight'],
        'Encoder/encoder_norm/bias': state['norm.bias'],
        'head/kernel': state['head.weight'].T,
        'head/bias': state['head.bias'],
    }
    for i, block in enumerate(model.blocks):
        ours, theirs = f'blocks.{i}.', f'Encoder/encoderblock_{i}/'
        for n, norm in enumerate(('norm1', 'norm2')):
            tree[f'{theirs}LayerNorm_{n}/scale'] = state[f'{ours}{norm}.weight']
            tree[f'{theirs}LayerNorm_{n}/bias'] = state[f'{ours}{norm}.bias']
        for n, name in enumerate(('query', 'key', 'value')):
            rows = slice(32 * n, 32 * (n + 1))
            tree[f'{theirs}SelfAttention/{name}/kernel'] = state[f'{ours}attn.qkv.weight'][rows].T.reshape(32, 4, 8)
            tree[f'{theirs}SelfAttention/{name}/bias'] = state[f'{ours}attn.qkv.bias'][rows].reshape(4, 8)
        tree[f'{theirs}SelfAttention/out/kernel'] = state[f'{ours}attn.proj.weight'].T.reshape(4, 8, 32)
        tree[f'{theirs}SelfAttention/out/bias'] = state[f'{ours}attn.proj.bias']
        routed = hasattr(block.mlp, 'router')
        if f'{ours}mlp.router.weight' in state:
            tree[f'{theirs}Moe/Router/dense/kernel'] = state[f'{ours}mlp.router.weight'].T
        elif routed:
            tree[f'{theirs}Moe/Router/mu'] = state[f'{ours}mlp.router.mu'].transpose(2, 0, 1)
            tree[f'{theirs}Moe/Router/scale'] = state[f'{ours}mlp.router.scale'].reshape(())
        for n in (0, 1):
            name = f'{theirs}{"Moe/Mlp" if routed else "Mlp"}/Dense_{n}'
            tree[f'{name}/kernel'] = state[f'{ours}mlp.fc{n + 1}.weight'].swapaxes(-1, -2)
            tree[f'{name}/bias'] = state[f'{ours}mlp.fc{n + 1}.bias']
    return tree


def test_import_takes_bare_and_prefixed_keys_and_files(tmp_path):
    model = tiny()
    tree = flax_tree(model)
    torch.testing.assert_close(import_vmoe(tree), dict(model.state_dict()))
    torch.testing.assert_close(import_vmoe({f'params/{k}': v for k, v in tree.items()}), dict(model.state_dict()))
    np.savez(tmp_path / 'weights.npz', **tree)
    overlay = dict(file=str(tmp_path / 'weights.npz'), custom_load=True)
    loaded = tiny(pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict())


def test_import_is_strict():
    tree = flax_tree(tiny())

    def without(*keys):
        return {k: v for k, v in tree.items() if k not in keys}
    refused = [
        (without('embedding/bias'), "The weights have no 'embedding/bias'"),
        (without('Encoder/encoderblock_1/Moe/Router/dense/kernel'),
         "The weights have no 'Encoder/encoderblock_1/Moe/Router/dense/kernel'"),
        (without('head/kernel'), "The weights have no 'head/kernel'"),
        ({**tree, 'step': np.zeros(1)}, "1 of the keys belong to no V-MoE that is known here, the first is 'step'."),
        ({**tree, 'params/cls': tree['cls']}, "The weights hold 'cls' twice"),
        ({**tree, 'Encoder/encoderblock_1/Moe/Router/dense/kernel': np.zeros((32, 2, 2))},
         "'Encoder/encoderblock_1/Moe/Router/dense/kernel' has the shape (32, 2, 2): that is an ensemble (E3"),
        ({**tree, 'Encoder/encoder_norm/scale': np.ones(31)},
         "'Encoder/encoder_norm/scale' has the shape (31,): (32,) would fit the other arrays."),
        ({**tree, 'Encoder/encoderblock_0/SelfAttention/out/kernel': np.zeros((8, 4, 32))},
         "'Encoder/encoderblock_0/SelfAttention/out/kernel' has the shape (8, 4, 32): (4, 8, 32) would fit"),
        ({}, "The weights have no 'embedding/kernel'"),
    ]
    for weights, message in refused:
        with pytest.raises(InputError) as error:
            import_vmoe(weights)
        assert str(error.value).startswith(message)


ENTRY = dict(
    num_classes=10, patch_size=(8, 8), hidden_size=32,
    encoder=dict(num_layers=2, mlp_dim=50, num_heads=4, moe=dict(
        num_experts=4, layers=(1,), group_size=34,
        router=dict(num_selected_experts=2, dispatcher=dict(name='einsum', capacity_factor=1.5, batch_priority=True)))))


def changed(path, value):
    """ENTRY with one field set."""
    entry = copy.deepcopy(ENTRY)
    at = entry
    for key in path[:-1]:
        at = at.setdefault(key, {})
    at[path[-1]] = value
    return entry


def test_from_config_reads_every_field():
    model = from_config(ENTRY, img_size=32)
    moe = model.blocks[1].mlp
    assert moe.hidden_features == 50 and model.blocks[0].mlp.fc1.out_features == 50
    assert (moe.num_selected, moe.group_size, moe.batch_priority) == (2, 34, True)
    assert (moe.capacity_factor, moe.eval_capacity_factor) == (1.5, 1.5)  # the original keeps it in evaluation
    # Defaults of the original's classes, not of its configurations.
    assert moe.router.losses == (('importance', 1.0), ('vmoe_load', 1.0))
    assert model.head.bias[0].item() == 0. and moe.capacity_multiple_of == 4

    router, dispatcher = ('encoder', 'moe', 'router'), ('encoder', 'moe', 'router', 'dispatcher')
    assert from_config(changed(('encoder', 'moe', 'dropout_rate'), 0.2)).blocks[1].mlp.drop1.p == 0.2
    assert from_config(changed(('encoder', 'moe', 'mlp_dim'), 20)).blocks[1].mlp.hidden_features == 20
    assert not from_config(changed(('encoder', 'moe', 'split_rngs'), ['params'])).blocks[1].mlp.fc1.same_init
    dropout = from_config(changed(('encoder', 'dropout_rate'), 0.1))
    assert (dropout.pos_drop.p, dropout.blocks[0].attn.proj_drop.p, dropout.blocks[1].mlp.drop2.p) == (0.1, 0.1, 0.1)
    assert from_config(changed(('encoder', 'attention_dropout_rate'), 0.3)).blocks[0].attn.attn_drop.p == 0.3
    assert from_config(changed((*router, 'noise_std'), 0.)).blocks[1].mlp.router.noise_std == 0.
    assert from_config(changed((*router, 'deterministic'), False)).blocks[1].mlp.router.deterministic is False
    assert from_config(changed((*router, 'gshard_loss_weight'), 0.1)).blocks[1].mlp.router.losses[2] == ('gshard', 0.1)
    assert from_config(changed((*dispatcher, 'capacity_multiple_of'), None)).blocks[1].mlp._capacity(34) == 26  # 25.5
    assert from_config(changed((*dispatcher, 'bfloat16'), True)).blocks[1].mlp.bfloat16_dispatch
    slots = changed(dispatcher, dict(name='indices', capacity=5, batch_priority=False))
    assert from_config(slots).eval().blocks[1].mlp._capacity(34) == 5
    norms = from_config({**changed(('encoder', 'attention_qk_norm'), True), 'classifier': 'map'})
    assert norms.blocks[0].attn.q_norm.bias is None and norms.attn_pool.k_norm.bias is None
    assert from_config({**ENTRY, 'classifier': '0'}).cls_token is None
    assert from_config({**ENTRY, 'num_classes': None, 'representation_size': 24}).pre_logits.fc.out_features == 24
    assert not any(hasattr(b.mlp, 'router') for b in from_config(changed(('encoder', 'moe'), None)).blocks)


def test_the_table_that_comes_tells_the_size_of_square_images():
    """16 x 8 patches on 32 x 32 pixels: 2 x 4 positions and the class token."""
    source = from_config({**ENTRY, 'patch_size': (16, 8)}, img_size=32, group_size=None)
    assert source.pos_embed.shape[1] == 9
    model = from_config({**ENTRY, 'patch_size': (16, 8)}, group_size=None)
    model.load_state_dict(source.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.eval()(x), source.eval()(x))
    assert model.patch_embed.grid_size == (2, 4)


def test_first_patch_pooling_without_a_class_token():
    entry = {**ENTRY, 'classifier': '0', 'head_kernel_zero_init': False}
    model = from_config(entry, img_size=32, group_size=None).eval()
    features = model.forward_features(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 16, 32)
    torch.testing.assert_close(model.forward_head(features), model.head(features[:, 0]))


@pytest.mark.parametrize('entry, message', [
    (changed(('encoder', 'moe', 'router', 'dispatcher', 'capacity_facto'), 1.), 'The dispatcher entry has an unknown'),
    (changed(('encoder', 'num_layer'), 2), "The encoder entry has an unknown field 'num_layer'. Did you mean"),
    (changed(('classifier',), 'mean'), "classifier='mean' is unknown. Known: token, 0, gap, map."),
    (changed(('encoder', 'moe', 'router', 'name'), 'SoftRoute'), "The router 'SoftRoute' is not built here. Did you"),
    (changed(('encoder', 'moe', 'router'), dict(name='SoftRouter', num_slots=2, capacity_factor=1.0)),
     'The router entry has num_slots=2 and capacity_factor=1.0: give exactly one of the two.'),
    (changed(('encoder', 'moe', 'router'), dict(name='SoftRouter', num_slots=2, noise_std=1.0)),
     "The router entry has noise_std=1.0: only 0 is built here for 'SoftRouter'."),
    (changed(('encoder', 'moe', 'router', 'dispatcher', 'capacity'), 4), 'The dispatcher entry has capacity=4 and'),
    (changed(('encoder', 'moe', 'router', 'num_selected_experts'), 5), 'num_selected=5 with num_experts=4'),
    (changed(('encoder', 'moe', 'layers'), (2,)), 'moe_layers has 2, but the 2 blocks are numbered 0 to 1.'),
    (changed(('encoder', 'position_emb'), dict(name='rope')), "pos_embed='rope' is unknown: use 'learn', 'sincos2d'"),
    ({k: v for k, v in ENTRY.items() if k != 'hidden_size'}, "The model entry has no 'hidden_size'."),
])
def test_from_config_refuses_in_one_sentence(entry, message):
    with pytest.raises(InputError) as error:
        from_config(entry)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize('kwargs, message', [
    (dict(moe_layers='first_2'), "moe_layers='first_2': use block numbers, 'last_n' or 'every_n'"),
    (dict(num_selected=9), 'num_selected=9 with num_experts=4: choose between 1 and 4 experts.'),
    (dict(pos_embed='sincos2d', embed_dim=6, num_heads=1), "embed_dim=6 with pos_embed='sincos2d': use a"),
])
def test_bad_keywords_are_one_sentence(kwargs, message):
    with pytest.raises(InputError) as error:
        tiny(**kwargs)
    assert str(error.value).startswith(message)
    with pytest.raises(TypeError):
        tiny(not_a_keyword=1)


def test_analysis_needs_no_model_code():
    model = tiny().eval()
    with torch.no_grad(), trace_routing(model) as trace:
        model(torch.randn(3, 3, 32, 32))
    assert list(trace) == ['blocks.1.mlp', 'blocks.3.mlp']
    assert trace['blocks.3.mlp'][0].shape == (3, 17)
    assert isinstance(model, VMoE)
