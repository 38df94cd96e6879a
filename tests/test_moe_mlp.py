"""`MoEMlp` on its own: what it computes, what it costs, and that it behaves like timm's Mlp.

Letters: B images, N tokens, D width, M hidden width, E experts, K chosen experts.
"""
import copy
import inspect
from functools import partial

import pytest
import torch
from timm.layers import LayerNorm, Mlp, get_notrace_modules
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.nn import functional as F

from moe_zoo.errors import InputError
from moe_zoo.layers.moe_mlp import MoEMlp
from moe_zoo.losses import auxiliary_losses
from moe_zoo.routing import routing_context

# TorchScript is deprecated, and timm's contract still asks for it; tracing warns of every shape that it freezes.
pytestmark = [
    pytest.mark.filterwarnings('ignore:.torch.jit:FutureWarning'),
    pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning'),
]

ROUTERS = ['vmoe', 'cosine', 'shazeer', 'sigmoid']


def small(**kwargs):
    """Eight wide, four experts, all different."""
    return MoEMlp(8, 16, **{'num_experts': 4, 'same_init': False, **kwargs})


def record_of(layer, x):
    with routing_context() as context:
        layer(x)
    (routing,) = context.routings
    return routing


def test_signature_starts_like_timms_mlp():
    timm_args = [name for name in inspect.signature(Mlp).parameters if name not in ('device', 'dtype')]
    assert list(inspect.signature(MoEMlp).parameters)[:len(timm_args)] == timm_args
    assert list(inspect.signature(MoEMlp).parameters)[-2:] == ['device', 'dtype']


def test_timms_transformer_takes_it_as_its_mlp():
    model = VisionTransformer(
        img_size=16, patch_size=8, embed_dim=8, depth=2, num_heads=2, num_classes=3, scale_mlp_norm=True,
        mlp_layer=partial(MoEMlp, num_experts=3), weight_init='jax', fix_init=True).train()
    with routing_context() as context:
        model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert [record.shape for record in context.routings] == [(2, 5), (2, 5)]
    assert all(p.grad is not None for p in model.parameters())


def test_one_expert_with_gate_one_is_timms_mlp():
    """E = K = 1: the softmax over one logit is 1."""
    layer = MoEMlp(8, 16, num_experts=1, num_selected=1, norm_layer=LayerNorm).eval()
    mlp = Mlp(8, 16, norm_layer=LayerNorm)
    with torch.no_grad():
        for ours, theirs in ((layer.fc1, mlp.fc1), (layer.fc2, mlp.fc2)):
            ours.weight.copy_(theirs.weight)
            ours.bias.copy_(theirs.bias)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(layer(x), mlp(x))


def test_output_is_the_gated_sum_of_the_chosen_experts():
    layer = small().eval()
    x = torch.randn(2, 3, 8)
    gates = torch.softmax(x @ layer.router.weight.T, dim=-1)
    experts = torch.stack([
        F.linear(F.gelu(F.linear(x, layer.fc1.weight[e], layer.fc1.bias[e])), layer.fc2.weight[e], layer.fc2.bias[e])
        for e in range(4)], dim=2)  # (B, N, E, D)
    chosen = gates * (gates >= gates.topk(2).values[..., -1:])
    torch.testing.assert_close(layer(x), (chosen.unsqueeze(-1) * experts).sum(dim=2))


def test_maps_and_tokens_are_routed_alike():
    layer = small().eval()
    channels_first = copy.deepcopy(layer)
    channels_first.use_conv = True
    x = torch.randn(2, 3, 5, 8)
    torch.testing.assert_close(channels_first(x.permute(0, 3, 1, 2)), layer(x).permute(0, 3, 1, 2))
    assert record_of(layer, x).shape == (2, 3, 5)


@pytest.mark.parametrize('router, args', [
    ('vmoe', {}), ('vmoe', dict(renormalise=True)), ('cosine', dict(renormalise=True)), ('shazeer', {}),
    ('sigmoid', {})])
def test_one_selected_expert_keeps_the_routers_task_gradient(router, args):
    layer = small(num_selected=1, router=router, router_args=args)
    nn.init.normal_(layer.router.weight)
    x = torch.randn(2, 3, 8)
    layer(x).square().sum().backward()
    assert layer.router.weight.grad.abs().max() > 1e-4
    weights = record_of(layer, x).weights
    if router != 'vmoe' or args:
        torch.testing.assert_close(weights, torch.ones(6, 1))  # p / p.detach()
    else:
        assert (weights < 1).all()


def test_idle_experts_get_zero_gradients_without_being_run():
    layer = small(num_selected=1, noise_std=0., capacity_factor=None)
    with torch.no_grad():
        layer.router.weight.zero_()[2] = 1.  # every token of positive sum goes to expert 2
    seen = []
    layer.act.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    layer(torch.rand(2, 3, 8)).sum().backward()
    assert seen == [6]
    for parameter in (layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias):
        assert parameter.grad is not None
        assert [bool(g.any()) for g in parameter.grad] == [False, False, True, False]


@pytest.mark.parametrize('router', ROUTERS)
def test_in_evaluation_no_image_depends_on_another(router):
    layer = small(router=router, capacity_factor=0.5).eval()
    nn.init.normal_(layer.router.weight)
    x = torch.randn(5, 6, 8)
    alone = torch.cat([layer(image.unsqueeze(0)) for image in x])
    torch.testing.assert_close(layer(x), alone)
    assert record_of(layer, x).kept is None
    # The original's factor is a keyword; a small one makes images compete, 4.0 with E/K = 2 cannot.
    layer.eval_capacity_factor = 4.0
    torch.testing.assert_close(layer(x), alone)
    layer.eval_capacity_factor = 0.2
    assert not torch.allclose(layer(x), alone)


def test_groups_of_images_or_of_tokens():
    x = torch.randn(10, 3, 8)
    assert record_of(small(), x).group_size == 24  # 8 images of 3 tokens; the last group has 2 images
    assert record_of(small(group_images=4), x).group_size == 12
    assert record_of(small(group_size=15), x).group_size == 15  # half of 30: groups may cut through an image
    with pytest.raises(InputError, match=r'group_size=16 does not divide the 30 tokens of a batch of shape \(10, 3\)'):
        small(group_size=16)(x)


def test_capacity_keywords():
    x = torch.randn(8, 4, 8)  # one group of 32 tokens
    # ceil(32 * 2 * 0.33 / 4) = ceil(5.28) = 6, raised to a multiple of 4: 8.
    assert small(capacity_factor=0.33)._capacity(32) == 8
    assert small(capacity_factor=0.33, capacity_multiple_of=1)._capacity(32) == 6
    assert small(capacity_factor=0.33, capacity_multiple_of=1, capacity_rounding='round')._capacity(32) == 5
    layer = small(capacity=3).eval()  # in evaluation too
    record = record_of(layer, x)
    counts = torch.bincount(record.indices[record.kept], minlength=4)
    assert counts.tolist() == [3, 3, 3, 3]
    assert record_of(small(capacity_factor=None), x).kept is None


@pytest.mark.parametrize('factor', [None, 0.5])
def test_experts_that_a_constraint_excludes_are_not_run(factor):
    layer = small(router='shazeer', router_args=dict(constraint='relative', zero_init=False), capacity_factor=factor)
    layer.router.constraint.excess.copy_(torch.tensor([1., 1., -1., -1.]))  # above 0.5: excluded
    x = torch.randn(8, 4, 8)
    record = record_of(layer, x)
    assert set(record.indices[record.kept].tolist()) == {2, 3}
    chunks = []
    run = layer.run_experts
    layer.run_experts = lambda given: chunks.extend(map(len, given)) or run(given)
    layer(x)
    assert chunks[:2] == [0, 0] and all(chunks[2:])
    # Without a capacity every token has both; ceil(32 * 2 * 0.5 / 4) = 8 slots an expert with it.
    assert chunks[2:] == ([32, 32] if factor is None else [8, 8])


def test_losses_by_name():
    x = torch.randn(2, 3, 8)
    assert record_of(small(), x).losses == (('importance', 0.005), ('vmoe_load', 0.005))
    assert record_of(small(losses={}), x).losses == ()
    assert set(auxiliary_losses([record_of(small(losses=dict(z=1e-3, gshard=0.01)), x)])) == {'z', 'gshard'}


def test_shared_experts_see_every_token_unweighted():
    layer = small(num_shared_experts=2).eval()
    x = torch.randn(2, 3, 8)
    shared = layer.shared
    assert shared.fc1.out_features == 32  # two experts of width 16 that all tokens use are one of width 32
    layer.shared = None
    routed = layer(x)
    layer.shared = shared
    torch.testing.assert_close(layer(x), routed + shared(x))


def test_expert_ratio_means_more_and_narrower_experts_at_equal_cost():
    coarse, fine = small(), small(expert_ratio=4)
    assert (fine.num_experts, fine.num_selected, fine.hidden_features) == (16, 8, 4)
    experts = [sum(p.numel() for p in (m.fc1.weight, m.fc1.bias, m.fc2.weight)) for m in (coarse, fine)]
    assert experts[0] == experts[1]

    def expert_macs(layer):
        return layer.max_macs((2, 3, 8)) - layer.router.macs(6)
    # 6 tokens x 2 experts x (8 * 16 + 16 * 8) = 3072, and 6 x 8 x (8 * 4 + 4 * 8) = 3072.
    assert expert_macs(coarse) == expert_macs(fine) == 3072
    with pytest.raises(InputError, match='expert_ratio=3 does not divide the hidden width 16'):
        small(expert_ratio=3)


def test_cost_by_hand():
    layer = small(num_shared_experts=1)
    # A token: router 8 * 4 = 32; three experts of 8 * 16 + 16 * 8 = 256 each. 2 x 3 tokens: 6 * (32 + 768) = 4800.
    assert layer.max_macs((2, 3, 8)) == 4800
    # Parameters: router 32, four experts of 8*16 + 16 + 16*8 + 8 = 280, shared 280; an item meets two of the four.
    assert sum(p.numel() for p in layer.parameters()) == 32 + 4 * 280 + 280
    assert layer.active_parameters() == 32 + 2 * 280 + 280


def test_stacked_parameters_decay_as_timm_would_decay_a_linear():
    layer = small()
    no_decay, decay = param_groups_weight_decay(layer, weight_decay=0.1)
    assert {id(p) for p in no_decay['params']} == {id(layer.fc1.bias), id(layer.fc2.bias)}
    assert {id(p) for p in decay['params']} == {id(layer.router.weight), id(layer.fc1.weight), id(layer.fc2.weight)}


def test_experts_start_equal_or_each_on_its_own():
    same, different = MoEMlp(8, 16, num_experts=4), small()
    assert (same.fc1.weight[0] == same.fc1.weight[3]).all()
    assert (different.fc1.weight[0] != different.fc1.weight[3]).all()
    # Xavier uniform on an expert's own fans: at most sqrt(6 / (8 + 16)) = 0.5.
    assert 0.45 < different.fc1.weight.abs().max() <= 0.5


def test_dropout_acts_inside_experts_only_in_training():
    layer = small(drop=0.5, noise_std=0.)
    x = torch.randn(2, 3, 8)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_noise_is_in_training_only_and_can_be_forced():
    x = torch.randn(2, 3, 8)
    assert record_of(small(), x).noisy_logits is not None
    assert record_of(small().eval(), x).noisy_logits is None
    assert record_of(small(router_args=dict(deterministic=False)).eval(), x).noisy_logits is not None
    assert record_of(small(router_args=dict(deterministic=True)), x).noisy_logits is None
    assert record_of(small(router='shazeer', noise_std=0), x).noisy_logits is None


def test_bfloat16_dispatch_rounds_what_travels():
    layer = small(bfloat16_dispatch=True).eval()
    x = torch.randn(2, 3, 8)
    with routing_context() as context:
        y = layer(x)
    record = context.routings[0]
    experts = [
        F.linear(F.gelu(F.linear(x.bfloat16().float().view(6, 8), w1, b1)), w2, b2).bfloat16().float()
        for w1, b1, w2, b2 in zip(layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias)]
    expected = sum(record.combine_matrix()[:, e:e + 1] * experts[e] for e in range(4))
    torch.testing.assert_close(y.view(6, 8), expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_other_types_keep_their_type_and_route_in_float32(dtype):
    layer = small().to(dtype).eval()
    x = torch.randn(2, 3, 8, dtype=dtype)
    assert layer(x).dtype == dtype
    assert record_of(layer, x).weights.dtype == torch.float32


def test_autocast_leaves_the_router_in_float32():
    layer = small().eval()
    x = torch.randn(2, 3, 8)
    exact = record_of(layer, x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        mixed = record_of(layer, x)
        y = layer(x)
    assert torch.equal(mixed.logits, exact.logits)
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.02)


def test_a_forward_leaves_nothing_on_the_module():
    layer = small()
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    attributes = set(vars(layer))
    layer(torch.randn(2, 3, 8))
    assert set(vars(layer)) == attributes
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize('router, capacity', [
    ('vmoe', None), ('vmoe', 0.5), ('cosine', 0.5), ('shazeer', 0.5), ('sigmoid', None)])
def test_compiled_exported_scripted_and_traced_equal_eager(router, capacity):
    layer = small(router=router, eval_capacity_factor=capacity, num_shared_experts=1).eval()
    nn.init.normal_(layer.router.weight)
    x = torch.randn(3, 5, 8)
    expected = layer(x)
    torch._dynamo.reset()
    runs = {
        'compiled': torch.compile(layer, backend='aot_eager', fullgraph=True),
        'exported': torch.export.export(layer, (x,)).module(),
        'scripted': torch.jit.script(layer),
        'traced': torch.jit.trace(layer, (x,)),
    }
    for name, run in runs.items():
        torch.testing.assert_close(run(x), expected, msg=name)
    assert layer.to('meta')(x.to('meta')).shape == x.shape


def test_compiled_training_equals_eager():
    layer = small(capacity_factor=0.6, batch_priority=True, noise_std=0.)
    x = torch.randn(9, 5, 8)
    torch._dynamo.reset()
    gradients = []
    for run in (layer, torch.compile(layer, backend='aot_eager', fullgraph=True)):
        layer.zero_grad()
        run(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in layer.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_exported_batch_is_free():
    layer = small().eval()
    batch = torch.export.Dim('batch', min=1, max=64)
    exported = torch.export.export(layer, (torch.randn(3, 5, 8),), dynamic_shapes=({0: batch},)).module()
    x = torch.randn(17, 5, 8)
    torch.testing.assert_close(exported(x), layer(x))


def test_a_scripted_layer_survives_saving(tmp_path):
    layer = small(eval_capacity_factor=0.5).eval()
    x = torch.randn(3, 5, 8)
    torch.jit.script(layer).save(tmp_path / 'layer.pt')
    torch.testing.assert_close(torch.jit.load(tmp_path / 'layer.pt')(x), layer(x))


def test_fx_takes_the_layer_as_a_leaf():
    assert MoEMlp in get_notrace_modules()


@pytest.mark.parametrize('kwargs, message', [
    (dict(num_selected=5), 'num_selected=5 with num_experts=4: choose between 1 and 4 experts'),
    (dict(router='vmo'), "router='vmo' is unknown. Did you mean 'vmoe'?"),
    (dict(losses=dict(importence=1.)), "losses has 'importence'. Did you mean 'importance'"),
    (dict(num_selected=1.5), 'num_selected=1.5: use a whole number'),
    (dict(router_args=dict(renormalize=True)), "router_args has 'renormalize'. Did you mean 'renormalise'?"),
    (dict(noise_std=-1.), 'noise_std=-1.0, num_shared_experts=0: use 0 or more for both'),
    (dict(num_shared_experts=-1), 'noise_std=1.0, num_shared_experts=-1: use 0 or more for both'),
    (dict(capacity=0), 'capacity=0: use at least 1'),
    (dict(capacity=2.5), 'capacity=2.5: use a whole number'),
    (dict(group_size=0), 'group_size=0: use at least 1'),
    (dict(capacity_factor=0.), 'capacity_factor=0.0: use a number above 0, or None to drop nothing'),
    (dict(capacity_rounding='floor'), "capacity_rounding='floor': use 'ceil' or 'round'"),
])
def test_bad_keywords_are_one_sentence(kwargs, message):
    with pytest.raises(InputError) as error:
        small(**kwargs)
    assert str(error.value).startswith(message)
