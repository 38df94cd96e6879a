"""Padding of detection batches stays out of gates, statistics, losses and capacity."""
import math

import pytest
import torch
from torch import nn

from moe_zoo.layers import DynamicConv2d, MoEConv2d, MoEMlp, RoutedConv2d, ShallowEmbedding, SoftMoEMlp, masked_mean
from moe_zoo.layers.image_moe import GATES
from moe_zoo.layers.moe_stage import MoEStage
from moe_zoo.layers.routed import tokens_inside
from moe_zoo.losses import LOSSES, balance
from moe_zoo.routing import routing_context

ROUTERS = ['vmoe', 'cosine', 'shazeer', 'hierarchical', 'sigmoid', 'expert_choice']


def run(layer, x, sizes, padded):
    """What a layer records under a context, with its output."""
    with routing_context(torch.tensor(sizes), padded) as context:
        y = layer(x)
    return y, context.routings[-1]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def stage(gate):
    return MoEStage([nn.Conv2d(3, 3, 1) for _ in range(4)], 3, gate=gate)


IMAGE_LAYERS = {
    'condconv': lambda: RoutedConv2d(3, 3, 1),
    'dyconv': lambda: DynamicConv2d(3, 3, 1),
    'moe_conv': lambda: MoEConv2d(3, 3, 1),
    **{gate: lambda gate=gate: stage(gate) for gate in GATES},
}


def test_a_mean_leaves_out_the_cells_that_begin_beyond_the_image():
    x = torch.arange(6.).view(1, 1, 2, 3).expand(2, -1, -1, -1)  # 0 1 2 / 3 4 5, cells of 32 pixels
    with routing_context(torch.tensor([[32, 65], [33, 64]]), (64, 96)):
        pooled = masked_mean(x)
    assert pooled[:, 0].tolist() == [1, 2]  # one row of three cells: 0 1 2; two rows of two: 0 1 3 4


@pytest.mark.parametrize('height, pixels, mean', [(60, 96, 0), (64, 96, 0), (65, 96, 0.5), (90, 160, 0.5)])
def test_the_last_cell_of_a_coarse_map_may_be_cut_short(height, pixels, mean):
    """96 pixels are two cells of stride 64, not of 48; 160 are three, not of 53."""
    cells = -(-pixels // 64)
    x = torch.arange(float(cells)).view(1, 1, cells, 1)
    with routing_context(torch.tensor([[height, 64]]), (pixels, 64)):
        assert masked_mean(x).item() == mean


@pytest.mark.parametrize('name', IMAGE_LAYERS)
def test_gates_of_an_image_are_equal_alone_and_padded(name):
    torch.manual_seed(0)
    layer = IMAGE_LAYERS[name]().eval()
    for parameter in layer.parameters():  # gates that start at zero would be equal whatever they see
        nn.init.normal_(parameter, generator=seeded(1))
    image = torch.randn(1, 3, 4, 5, generator=seeded())  # 4 x 5 cells of 8 pixels
    batch = torch.randn(2, 3, 8, 8, generator=seeded(2)) * 9
    batch[:1, :, :4, :5] = image
    alone = run(layer, image, [[30, 40]], (32, 40))[1]
    padded = run(layer, batch, [[30, 40], [64, 50]], (64, 64))[1]
    torch.testing.assert_close(padded.logits[:1], alone.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(padded.weights[:1], alone.weights, rtol=1e-5, atol=1e-5)
    with routing_context() as unaware:
        layer(batch)
    assert (unaware.routings[0].logits[:1] - alone.logits).abs().max() > 1e-2  # padding would have moved it


def test_the_embedding_of_deepmoe_pools_the_image_alone():
    embedding = ShallowEmbedding(0, widths=(4, 4), stem_width=0, dim=5).eval()
    embedding.convs = nn.AvgPool2d(64, ceil_mode=True)  # a network without a border, so that features are the same
    embedding.fc = nn.Linear(3, 5)
    image = torch.randn(1, 3, 64, 64, generator=seeded())
    batch = torch.full((1, 3, 96, 160), 7.)
    batch[:, :, :64, :64] = image
    alone = run(embedding, image, [[60, 64]], (64, 64))[0]
    torch.testing.assert_close(run(embedding, batch, [[60, 64]], (96, 160))[0], alone)


def test_tokens_are_told_from_padding_by_their_place():
    with routing_context(torch.tensor([[32, 16], [16, 48]]), (32, 48)):
        inside = tokens_inside(torch.zeros(2, 7, 4))  # a class token and 2 x 3 patches of 16 pixels
        grid = tokens_inside(torch.zeros(2, 2, 3, 4))
        assert tokens_inside(torch.zeros(2, 40, 4)) is None  # no grid over the image
        assert tokens_inside(torch.zeros(12, 2, 2, 4)) is None  # twelve windows
    first, second = [1, 0, 0, 1, 0, 0], [1, 1, 1, 0, 0, 0]
    assert inside.int().tolist() == [1, *first, 1, *second]
    assert grid.int().tolist() == [*first, *second]
    assert tokens_inside(torch.zeros(2, 7, 4)) is None


def mlp(router, **kwargs):
    torch.manual_seed(0)
    kwargs = dict(dict(num_experts=4, num_selected=2, group_images=1, noise_std=0., capacity_factor=.7,
                       capacity_multiple_of=1), **kwargs)
    if router == 'hierarchical':
        kwargs['router_args'] = dict(num_groups=2, groups_selected=2)
    layer = MoEMlp(8, 16, router=router, same_init=False, **kwargs)
    nn.init.normal_(layer.router.weight, std=1.)
    return layer


def alone_and_padded():
    """An image of 2 x 2 patches and its class token; the same as the first of two in a batch of 3 x 4 patches."""
    image = torch.randn(1, 5, 8, generator=seeded())
    batch = torch.randn(2, 13, 8, generator=seeded(1))
    place = [0, 1, 2, 5, 6]  # class token, two rows of two out of four columns
    batch[0, place] = image[0]
    return image, batch, place


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('router', ROUTERS)
def test_tokens_of_an_image_find_the_same_slots_alone_and_padded(router, training):
    layer = mlp(router).train(training)
    image, batch, place = alone_and_padded()
    wanted, alone = run(layer, image, [[32, 32]], (32, 32))
    found, padded = run(layer, batch, [[32, 32], [48, 64]], (48, 64))
    assert alone.inside is None
    assert padded.inside.view(2, 13)[0].nonzero().flatten().tolist() == place and padded.inside[13:].all()
    torch.testing.assert_close(padded.weights[place], alone.weights)
    assert torch.equal(padded.indices[place], alone.indices)
    torch.testing.assert_close(found[0, place], wanted[0])
    outside = ~padded.inside
    if alone.kept is None:  # evaluation drops nothing
        assert padded.kept is None
        return
    assert torch.equal(padded.kept[place], alone.kept) and not alone.kept.all()
    # Padding is computed as a dense MLP would, beyond the slots; but experts that choose do not choose it.
    assert padded.kept[outside].all() if router != 'expert_choice' else not padded.kept[outside].any()
    counted = padded.without_padding()
    assert counted.logits.shape == (5 + 13, 4) and torch.equal(padded.dropped(), counted.dropped())


def test_slots_of_soft_experts_read_no_padding():
    torch.manual_seed(0)
    layer = SoftMoEMlp(8, 16, num_experts=4, num_slots=2, same_init=False)
    image, batch, place = alone_and_padded()
    wanted, _ = run(layer, image, [[32, 32]], (32, 32))
    found, routing = run(layer, batch, [[32, 32], [48, 64]], (48, 64))
    torch.testing.assert_close(found[0, place], wanted[0])
    assert routing.inside.sum() == 5 + 13
    assert (layer(batch)[0, place] - wanted[0]).abs().max() > 1e-4  # without a context it would


@pytest.mark.parametrize('router, losses', [
    ('vmoe', ['importance', 'importance_unbiased', 'kl', 'vmoe_load', 'gshard', 'z']), ('shazeer', ['load'])])
def test_losses_are_those_of_the_images_alone(router, losses):
    layer = mlp(router, noise_std=1.).train()
    layer.router.sample_noise = torch.zeros_like
    image, batch, _ = alone_and_padded()
    first = run(layer, image, [[32, 32]], (32, 32))[1]
    second = run(layer, batch[1:], [[48, 64]], (48, 64))[1]
    both = run(layer, batch, [[32, 32], [48, 64]], (48, 64))[1]
    for name in losses:
        loss = LOSSES[name]
        wanted = (5 * loss(first) + 13 * loss(second)) / 18  # groups of one image, by their tokens
        torch.testing.assert_close(loss(both), wanted, msg=name)
        assert loss(both._replace(inside=None)) != loss(both)


def test_balance_and_states_count_the_images_alone():
    layer = mlp('sigmoid').train()
    image, batch, _ = alone_and_padded()
    parts = [run(layer, image, [[32, 32]], (32, 32))[1], run(layer, batch[1:], [[48, 64]], (48, 64))[1]]
    apart = layer.router.constraint.load.clone()
    assert apart.sum() == 18 * 2  # two experts a token
    layer.router.constraint.load.zero_()
    both = run(layer, batch, [[32, 32], [48, 64]], (48, 64))[1]
    assert torch.equal(layer.router.constraint.load, apart)
    kept = torch.cat([part.indices[part.kept] for part in parts])
    share = torch.bincount(kept, minlength=4) / len(kept)
    torch.testing.assert_close(balance(both)['share'], share)
    assert balance(both)['dropped'].item() == pytest.approx(1 - len(kept) / 36)


def test_capacity_follows_the_tokens_of_each_group():
    """S K factor / E = 5 x 2 x 0.7 / 4 = 1.75, so 2 slots; 13 x 2 x 0.7 / 4 = 4.55, so 5; groups of both: 18 -> 7."""
    image, batch, _ = alone_and_padded()
    for group_images, slots in ((1, (2, 5)), (2, (7,))):
        layer = mlp('vmoe', group_images=group_images).train()
        nn.init.zeros_(layer.router.weight)  # every token wants experts 0 and 1
        kept = run(layer, batch, [[32, 32], [48, 64]], (48, 64))[1].without_padding().kept
        taken = [kept[:5].sum().item(), kept[5:].sum().item()]
        assert (taken if group_images == 1 else [sum(taken)]) == [2 * n for n in slots]
        assert all(math.ceil(n * 2 * .7 / 4) == s for n, s in zip((5, 13) if group_images == 1 else (18,), slots))
