"""Expert Choice and Soft MoE, where experts choose or mix the tokens: layers, records, costs, models.

Letters: B images, N tokens, D width, M hidden width, T all tokens, E experts, C tokens an expert takes, P slots an
expert has.
"""
import copy

import pytest
import timm
import torch
from timm.layers import Mlp, get_notrace_modules
from torch import nn
from torch.nn import functional as F

import moe_zoo  # noqa: F401 - registers the models
from moe_zoo.analysis import count
from moe_zoo.analysis.force import force_expert
from moe_zoo.analysis.usage import measure_usage
from moe_zoo.errors import InputError
from moe_zoo.layers import MoEMlp, SoftMoEMlp, moe_mlp
from moe_zoo.losses import LOSSES, auxiliary_losses, balance
from moe_zoo.models.vmoe import from_config
from moe_zoo.routing import dispatch_reference, routing_context, trace_routing
from moe_zoo.routing.capacity import keep_chosen_by_experts

pytestmark = [
    pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning'),
    pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning'),
]

EXPERT_CHOICE = dict(
    router='expert_choice', capacity_factor=1.0, capacity_multiple_of=1, capacity_rounding='round', group_images=1)


def choosing(**kwargs):
    """Eight wide, four experts, all different, which take half the tokens of every image."""
    return MoEMlp(8, 16, **{'num_experts': 4, 'num_selected': 2, 'same_init': False, **EXPERT_CHOICE, **kwargs})


def soft(**kwargs):
    """Eight wide, four experts, all different, of three slots."""
    return SoftMoEMlp(8, 16, **{'num_experts': 4, 'num_slots': 3, 'same_init': False, **kwargs})


LAYERS = {'expert_choice': choosing, 'soft': soft}


def record_of(layer, x):
    with routing_context() as context:
        layer(x)
    (routing,) = context.routings
    return routing


def run_expert(layer, e, x):
    return F.linear(F.gelu(F.linear(x, layer.fc1.weight[e], layer.fc1.bias[e])), layer.fc2.weight[e], layer.fc2.bias[e])


# Expert Choice


def test_two_experts_choose_among_four_tokens():
    """Logits (x, 0): expert 0 likes large x, expert 1 small x. Each takes two: tokens 3 and 1, and tokens 0 and 2."""
    layer = MoEMlp(1, 4, num_experts=2, num_selected=1, same_init=False, noise_std=0., **EXPERT_CHOICE)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[1.], [0.]]))
    x = torch.tensor([1., 3., 2., 4.]).view(1, 4, 1)
    record = record_of(layer, x)
    taken = record._replace(weights=torch.ones_like(record.weights)).combine_matrix()
    assert taken.tolist() == [[0, 1], [1, 0], [0, 1], [1, 0]]
    gates = torch.softmax(torch.stack([x.flatten(), torch.zeros(4)], dim=1), dim=1)
    torch.testing.assert_close(record.combine_matrix(), gates * taken)
    expected = [gates[t, e] * run_expert(layer, e, x[0, t]) for t, e in enumerate((1, 0, 1, 0))]
    torch.testing.assert_close(layer(x)[0], torch.stack(expected))


def test_a_token_may_have_no_expert_or_all():
    """Equal gates: both experts, of one slot, take the first token."""
    layer = MoEMlp(1, 4, num_experts=2, capacity=1, same_init=False, noise_std=0., router='expert_choice')
    with torch.no_grad():
        layer.router.weight.zero_()
    x = torch.randn(1, 3, 1)
    record = record_of(layer, x)
    assert record.kept.sum(dim=1).tolist() == [2, 0, 0]
    y = layer(x)[0]
    torch.testing.assert_close(y[0], 0.5 * (run_expert(layer, 0, x[0, 0]) + run_expert(layer, 1, x[0, 0])))
    assert not y[1:].any()
    # Two of three tokens have no expert; no expert is busier than another.
    assert record.dropped().item() == pytest.approx(2 / 3)
    assert balance(record)['dropped'].item() == pytest.approx(2 / 3)
    assert balance(record)['share'].tolist() == [0.5, 0.5]


def test_the_choice_by_a_plain_loop():
    gates = torch.rand(3, 10, 4).round(decimals=1)  # with ties
    indices = torch.stack([torch.randperm(4) for _ in range(30)]).view(3, 10, 4)
    kept = keep_chosen_by_experts(indices, gates, 4)
    for g in range(3):
        for e in range(4):
            best = sorted(range(10), key=lambda t: -gates[g, t, e].item())[:4]  # Python's sort is stable
            found = [t for t in range(10) if kept[g, t][indices[g, t] == e].item()]
            assert found == sorted(best)
    assert keep_chosen_by_experts(indices, gates, 99).all()


@pytest.mark.parametrize('num_experts, num_selected, factor, images, group_images', [
    (4, 2, 1.0, 5, 1), (4, 1, 0.5, 5, 3), (8, 2, 1.0, 4, 2), (3, 1, 2.0, 3, 1), (2, 2, 1.0, 3, 1), (4, 1, None, 2, 1)])
def test_fast_paths_equal_the_reference(monkeypatch, num_experts, num_selected, factor, images, group_images):
    """Values, and gradients of the input and of every parameter, router included."""
    layer = choosing(num_experts=num_experts, num_selected=num_selected, capacity_factor=factor,
                     group_images=group_images)
    x, mixer = torch.randn(2, images, 6, 8)
    noise = torch.randn(images * 6, num_experts)
    layer.router.sample_noise = lambda logits: noise

    def run():
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        (y * mixer).sum().backward()
        return [y.detach(), inputs.grad, *(p.grad for p in layer.parameters())]

    fast = run()
    monkeypatch.setattr(moe_mlp, 'wants_static_shapes', lambda x: True)
    static = run()
    monkeypatch.setattr(moe_mlp, 'dispatch_padded', lambda x, routing, *_: dispatch_reference(
        x, routing, layer.run_experts))
    for expected, *others in zip(run(), fast, static):
        for other in others:
            torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-6)
    assert all(gradient.abs().max() > 0 for gradient in fast)


def test_capacity_is_the_choice_in_evaluation_too():
    x = torch.randn(2, 10, 8)
    # round(10 * 2 * 1.0 / 4) = 5 tokens an expert and image, in training and in evaluation.
    for layer in (choosing(), choosing().eval()):
        record = record_of(layer, x)
        taken = record._replace(weights=torch.ones_like(record.weights)).combine_matrix().view(2, 10, 4)
        assert (taken.sum(dim=1) == 5).all()
        assert record.kept.float().sum(dim=1).mean() == 2  # K experts a token on average
    assert choosing(eval_capacity_factor=0.4).eval()._capacity(10) == 2
    assert record_of(choosing(capacity=99).eval(), x).kept.all()  # more than there are


def test_where_shapes_are_static_experts_get_what_they_take():
    """Two images of 10 tokens, round(10 * 2 * 1.0 / 4) = 5 an expert and image: not 20 tokens an expert."""
    layer = choosing().to('meta')
    seen = []
    layer.act.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    assert layer(torch.empty(2, 10, 8, device='meta')).shape == (2, 10, 8)
    assert seen == [(4, 2 * 5, 16)]


def test_noise_chooses_and_weighs_in_training_only():
    x = torch.randn(2, 10, 8)
    record = record_of(choosing(), x)
    assert record.noise_std.item() == 0.25  # noise_std / E
    noisy = torch.softmax(record.noisy_logits, dim=-1)
    torch.testing.assert_close(record.weights, noisy.gather(1, record.indices))
    assert record_of(choosing().eval(), x).noisy_logits is None
    assert record_of(choosing(router_args=dict(deterministic=True)), x).noisy_logits is None


def test_losses_read_the_record():
    x = torch.randn(2, 10, 8)
    assert auxiliary_losses([record_of(choosing(), x)]) == {}
    record = record_of(choosing(losses=dict(z=1e-3, importance=0.1)), x)
    assert set(auxiliary_losses([record])) == {'z', 'importance'}
    assert LOSSES['vmoe_load'](record) == LOSSES['load'](record) == 0  # loads are equal by construction


def test_groups_of_images_make_images_compete():
    x = torch.randn(4, 6, 8)
    for layer, independent in ((choosing(), True), (choosing(group_images=2), False)):
        layer.eval()
        nn.init.normal_(layer.router.weight)
        alone = torch.cat([layer(image.unsqueeze(0)) for image in x])
        assert torch.allclose(layer(x), alone, atol=1e-6) == independent


def test_costs_of_both_by_hand():
    # Three images of 10 tokens. Router 10 * 8 * 4 = 320 an image; an expert and token 8 * 16 + 16 * 8 = 256.
    layer = choosing()
    assert layer.max_macs((3, 10, 8)) == 3 * (320 + 4 * 5 * 256)
    # Two groups of 15: round(15 * 2 / 4) = 8, half to even.
    assert choosing(group_size=15).max_macs((3, 10, 8)) == 3 * 320 + 2 * 4 * 8 * 256
    assert layer.active_parameters() == 32 + 2 * 280  # router, and on average two of four experts of 280 parameters
    # Soft: 12 slots. Logits, and both mixtures, 10 * 12 * 8 = 960 each; 12 slots through an expert.
    layer = soft()
    assert layer.max_macs((3, 10, 8)) == 3 * (3 * 960 + 12 * 256)
    assert soft(group_size=5).max_macs((3, 10, 8)) == 3 * 3 * 960 + 6 * 12 * 256
    assert layer.active_parameters() == sum(p.numel() for p in layer.parameters()) == 4 * 3 * 8 + 1 + 4 * 280
    for layer in (choosing(), soft()):
        cost = count(layer, torch.randn(3, 10, 8))
        assert cost.macs_executed == cost.macs_max and not cost.uncounted


@pytest.mark.parametrize('kwargs, message', [
    (dict(num_selected=5), 'num_selected=5 with num_experts=4: choose between 1 and 4 experts'),
    (dict(capacity=0), 'capacity=0: use at least 1'),
    (dict(group_size=0), 'group_size=0: use at least 1'),
    (dict(router_args=dict(noise=1)), "router_args has 'noise'. Did you mean 'noise_std'?"),
    (dict(router='expert_choise'), "router='expert_choise' is unknown. Did you mean 'expert_choice'?"),
])
def test_bad_keywords_of_expert_choice_are_one_sentence(kwargs, message):
    with pytest.raises(InputError) as error:
        choosing(**kwargs)
    assert str(error.value).startswith(message)


def test_groups_that_do_not_divide_and_no_slot_are_one_sentence():
    with pytest.raises(InputError) as error:
        choosing(group_size=16)(torch.randn(3, 10, 8))
    assert str(error.value) == (
        'group_size=16 does not divide the 30 tokens of a batch of shape (3, 10): use a divisor, or leave it out for '
        'groups of one image.')
    with pytest.raises(InputError) as error:
        soft(group_size=16)(torch.randn(3, 10, 8))
    assert str(error.value).startswith('group_size=16 does not divide the 30 tokens of a batch of shape (3, 10)')
    # round(10 * 2 * 0.09 / 4) = round(0.45) = 0
    with pytest.raises(InputError) as error:
        choosing(capacity_factor=0.09)(torch.randn(3, 10, 8))
    assert str(error.value) == (
        'capacity_factor=0.09 leaves 0 slots for a group of 10 items with 2 of 4 experts: use at least 0.2.')


# Soft MoE


def test_one_expert_of_one_slot_by_hand():
    """The slot is the softmax over cosines of the tokens; every token gets what comes out, with weight 1."""
    layer = SoftMoEMlp(2, 4, num_experts=1, num_slots=1)
    with torch.no_grad():
        layer.router.mu.copy_(torch.tensor([5., 0.]).view(1, 1, 2))
        layer.router.scale.fill_(2.)
    x = torch.tensor([[3., 4.], [0., 7.]])  # cosines with the first axis: 3 / 5 and 0
    mixed = torch.softmax(torch.tensor([2 * 0.6, 0.]), dim=0) @ x
    expected = run_expert(layer, 0, mixed).expand(1, 2, 2)
    torch.testing.assert_close(layer(x.unsqueeze(0)), expected, rtol=1e-5, atol=1e-6)


def test_output_is_what_the_formulas_say():
    layer = soft().eval()
    with torch.no_grad():
        layer.router.scale.fill_(3.)
    x = torch.randn(2, 5, 8)
    mu = F.normalize(layer.router.mu, dim=-1)  # (E, P, D)
    logits = 3 * torch.einsum('bnd,epd->bnep', F.normalize(x, dim=-1), mu)
    dispatch = logits.softmax(dim=1)
    combine = logits.flatten(2).softmax(dim=-1).view_as(logits)
    slots = torch.einsum('bnep,bnd->bepd', dispatch, x)
    outputs = torch.stack([run_expert(layer, e, slots[:, e]) for e in range(4)], dim=1)  # (B, E, P, D)
    torch.testing.assert_close(
        layer(x), torch.einsum('bnep,bepd->bnd', combine, outputs), rtol=1e-4, atol=1e-5)


def test_the_record_of_soft_moe():
    layer = soft(losses=dict(z=1e-3))
    x = torch.randn(2, 5, 8)
    record = record_of(layer, x)
    assert (record.shape, record.group_size, record.indices, record.kept) == ((2, 5), 5, None, None)
    assert record.slot_logits.shape == (10, 4, 3)
    # The weight of an expert is that of its slots in the softmax over all 12.
    torch.testing.assert_close(record.weights, record.slot_logits.flatten(1).softmax(-1).view(10, 4, 3).sum(-1))
    torch.testing.assert_close(record.logits, record.slot_logits.exp().sum(-1).log())
    assert balance(record)['share'].sum().item() == pytest.approx(1) and balance(record)['dropped'] == 0
    assert set(auxiliary_losses([record])) == {'z'}
    assert record.detach().slot_logits.grad_fn is None


@pytest.mark.parametrize('kwargs, message', [
    (dict(num_slots=0), 'num_slots=0: use at least 1'),
    (dict(num_experts=0), 'num_experts=0: a routed layer needs at least one expert'),
    (dict(losses=dict(zz=1.)), "losses has 'zz'."),
])
def test_bad_keywords_of_soft_moe_are_one_sentence(kwargs, message):
    with pytest.raises(InputError) as error:
        soft(**kwargs)
    assert str(error.value).startswith(message)
    with pytest.raises(TypeError):
        soft(batch_priority=True)  # of the other layer


# Both


@pytest.mark.parametrize('name', LAYERS)
def test_every_parameter_has_a_gradient(name):
    layer = LAYERS[name]()
    layer(torch.randn(2, 6, 8)).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())


@pytest.mark.parametrize('name', LAYERS)
def test_compiled_exported_scripted_and_traced_equal_eager(name):
    layer = LAYERS[name]().eval()
    x = torch.randn(3, 5, 8)
    expected = layer(x)
    torch._dynamo.reset()
    batch = torch.export.Dim('batch', min=1, max=64)
    runs = {
        'compiled': torch.compile(layer, backend='aot_eager', fullgraph=True),
        'exported': torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module(),
        'scripted': torch.jit.script(layer),
        'traced': torch.jit.trace(layer, (x,)),
    }
    for kind, run in runs.items():
        torch.testing.assert_close(run(x), expected, msg=kind)
    more = torch.randn(7, 5, 8)
    torch.testing.assert_close(runs['exported'](more), layer(more))
    assert layer.to('meta')(x.to('meta')).shape == x.shape
    assert type(layer) in get_notrace_modules()


@pytest.mark.parametrize('name', LAYERS)
def test_maps_other_types_autocast_and_an_empty_batch(name):
    layer = LAYERS[name]().eval()
    x = torch.randn(2, 3, 5, 8)
    maps = copy.deepcopy(layer)
    maps.use_conv = True
    torch.testing.assert_close(maps(x.permute(0, 3, 1, 2)), layer(x).permute(0, 3, 1, 2))
    exact = record_of(layer, x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        mixed = record_of(layer, x)
        y = layer(x)
    assert torch.equal(mixed.logits, exact.logits)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.03)
    half = copy.deepcopy(layer).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16 and record_of(half, x.bfloat16()).weights.dtype == torch.float32
    empty = layer(torch.zeros(0, 3, 8))
    assert empty.shape == (0, 3, 8)
    empty.sum().backward()


@pytest.mark.parametrize('name', LAYERS)
def test_bfloat16_dispatch_rounds_what_the_experts_return(name):
    layer = LAYERS[name](bfloat16_dispatch=True).eval()
    x = torch.randn(2, 6, 8)
    seen = []
    layer.drop2.register_forward_hook(lambda module, args, output: seen.append(output))
    rounded = layer(x)
    layer.bfloat16_dispatch = False
    assert not torch.equal(rounded, layer(x))
    torch.testing.assert_close(rounded, layer(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize('name', LAYERS)
def test_an_expert_can_be_forced(name):
    """Every token then has expert 2 alone: with Soft MoE what its slots mixed, with Expert Choice the token itself."""
    layer = LAYERS[name]().eval()
    model = nn.Sequential(layer)
    x = torch.randn(2, 6, 8)
    slot_logits = record_of(layer, x).slot_logits
    with force_expert(model, 2):
        y = model(x)
    if name == 'expert_choice':
        expected = run_expert(layer, 2, x)
    else:
        logits = slot_logits[:, 2].view(2, 6, 3)
        slots = torch.einsum('bnp,bnd->bpd', logits.softmax(dim=1), x)
        expected = torch.einsum('bnp,bpd->bnd', logits.softmax(dim=2), run_expert(layer, 2, slots))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


# Models


def tiny(name, **kwargs):
    args = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=4, num_classes=10, num_experts=4,
                moe_layers=(1, 3), representation_size=0, same_init=False, head_zero_init=False)
    return timm.create_model(name, **{**args, **kwargs})


NAMES = ['vmoe_vit_s_ec', 'vmoe_vit_b_ec', 'softmoe_vit_s']


def test_the_full_size_models():
    model = timm.create_model('softmoe_vit_s', device='meta')
    assert [i for i, block in enumerate(model.blocks) if hasattr(block.mlp, 'router')] == [6, 7, 8, 9, 10, 11]
    layer = model.blocks[6].mlp
    assert (len(model.blocks), model.embed_dim, model.patch_embed.num_patches) == (12, 384, 196)
    assert layer.router.mu.shape == (128, 1, 384) and layer.fc1.weight.shape == (128, 1536, 384)
    assert model.cls_token is None and model.global_pool == 'avg' and model.blocks[0].attn.q_norm.bias is None
    assert isinstance(model.blocks[5].mlp, Mlp)
    # 50 tokens with the class token: round(50 * 2 / 8) = 12 (12.5, half to even); 197: round(49.25) = 49.
    for name, tokens, taken in (('vmoe_vit_s_ec', 50, 12), ('vmoe_vit_b_ec', 197, 49)):
        layer = timm.create_model(name, device='meta').blocks[7].mlp
        assert layer.by_expert and layer._capacity(tokens) == taken
        # Beside its namesake with other routers it has the same parameters, and may load them.
        twin = timm.create_model(name.removesuffix('_ec'), device='meta')
        assert {k: v.shape for k, v in twin.state_dict().items()} == {
            k: v.shape for k, v in timm.create_model(name, device='meta').state_dict().items()}


@pytest.mark.parametrize('name', NAMES)
def test_evaluation_is_deterministic_and_images_are_independent(name):
    model = tiny(name).eval()
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        together = model(x)
        assert torch.equal(model(x), together)
        torch.testing.assert_close(torch.cat([model(image.unsqueeze(0)) for image in x]), together)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('checkpointing', [False, True])
def test_training_returns_records_and_gradients(name, checkpointing):
    losses = dict(z=0.1)
    model = tiny(name, losses=losses, **({} if 'soft' in name else dict(noise_std=0.))).train()
    plain = copy.deepcopy(model)
    for each in (model, plain):
        each.set_aux_loss(True)
    model.set_grad_checkpointing(checkpointing)
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for each in (model, plain):
        logits, routings = each(x)
        (logits.square().mean() + sum(auxiliary_losses(routings).values())).backward()
        assert len(routings) == 2 and all(r.shape == (2, each.pos_embed.shape[1]) for r in routings)
        gradients.append([p.grad for p in each.parameters()])
    for ours, expected in zip(*gradients):
        assert ours is not None
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize('name', NAMES)
def test_usage_of_a_trained_model_can_be_measured(name):
    kwargs = {} if 'soft' in name else dict(num_selected=1)
    usages = measure_usage(tiny(name, **kwargs), [(torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 1]))])
    assert list(usages) == ['blocks.1.mlp', 'blocks.3.mlp']
    for usage in usages.values():
        assert usage.share.sum().item() == pytest.approx(1)
        assert usage.class_mass.sum(dim=1).tolist() == pytest.approx([1, 1])
        if 'soft' in name:
            assert usage.dropped == 0
        else:
            # round(17 / 4) = 4 tokens an expert: at least one of the 17 of an image has none.
            assert usage.share.tolist() == [0.25] * 4 and 1 / 17 - 1e-6 < usage.dropped < 1


def test_what_the_original_calls_no_kernel_does_not_decay():
    model = tiny('softmoe_vit_s')
    assert {'blocks.1.mlp.router.mu', 'blocks.3.mlp.router.mu', 'pos_embed'} <= model.no_weight_decay()
    assert 'blocks.1.mlp.router.mu' not in tiny('vmoe_vit_s_ec').no_weight_decay()


def test_keywords_of_the_other_layer_are_unknown():
    with pytest.raises(TypeError, match='batch_priority'):
        tiny('softmoe_vit_s', batch_priority=True)
    with pytest.raises(TypeError, match='num_slots'):
        tiny('vmoe_vit_s_ec', num_slots=2)


def test_configurations_of_both():
    def entry(router, **moe):
        return dict(num_classes=10, patch_size=8, hidden_size=32, classifier='gap', encoder=dict(
            num_layers=2, mlp_dim=64, num_heads=4, moe=dict(num_experts=4, layers=(1,), router=router, **moe)))
    dispatcher = dict(capacity_factor=1.0, capacity_ceil_or_round='round', capacity_multiple_of=1)
    layer = from_config(entry(dict(name='NoisyTopItemsPerExpertRouter', dispatcher=dispatcher))).blocks[1].mlp
    assert layer.by_expert and layer.num_selected == 1 and layer.router.losses == ()
    assert layer._capacity(16) == 4  # S / E
    # round(16 * 1.3 / 4) = round(5.2) = 5 slots of a group of 16.
    slots = from_config(entry(dict(name='SoftRouter', capacity_factor=1.3), group_size=16)).blocks[1].mlp
    assert slots.num_slots == 5 and slots.group_size == 16
    with pytest.raises(InputError, match='has capacity_factor=1.3, but the moe entry has no group_size'):
        from_config(entry(dict(name='SoftRouter', capacity_factor=1.3)))


def test_slots_reach_the_trace():
    model = tiny('softmoe_vit_s', num_slots=2).eval()
    with torch.no_grad(), trace_routing(model) as trace:
        model(torch.randn(3, 3, 32, 32))
    assert trace['blocks.3.mlp'][0].slot_logits.shape == (3 * 16, 4, 2)
