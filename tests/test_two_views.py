"""Two views that carry their geometry, the patches of both that correspond, and the losses on their routes."""
import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment_transform, rand_augment_transform
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms

from moe_zoo.data import (
    FINE_TUNING_AREAS,
    PRETRAINING_AREAS,
    Grid,
    TwoViewTransform,
    ViewTargets,
    collate_two_views,
    match_items,
    match_patches,
    random_view,
    random_views,
)
from moe_zoo.errors import InputError
from moe_zoo.losses import CONSISTENCY_LOSSES, jsd_loss, prc_loss, prc_terms
from moe_zoo.routing import Routing

H, W = 48, 56  # of the views
GAIN = 4  # a pixel's red is 4 y and its green 4 x: bytes resolve a quarter of a pixel


def coordinate_image(size: int = 60) -> Image.Image:
    """Every pixel says where it is; blue marks what is image, not fill."""
    y, x = np.meshgrid(np.arange(size), np.arange(size), indexing='ij')
    return Image.fromarray(np.stack([GAIN * y, GAIN * x, np.full_like(x, 255)], axis=-1).astype(np.uint8))


def to_array(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).double()


def errors_of(view: torch.Tensor, to_view: torch.Tensor) -> torch.Tensor:
    """(n, 2) painted minus predicted coordinates of all pixels of a view that are solid image, off its border."""
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing='ij')
    points = torch.stack([y, x, torch.ones_like(x)]).double().flatten(1)
    source = (torch.linalg.inv(to_view.double()) @ points).view(3, H, W)[:2]
    painted = view[..., :2].permute(2, 0, 1) / GAIN + 0.5
    fill = torch.nn.functional.max_pool2d((view[None, ..., 2] < 255).double(), 5, stride=1, padding=2)[0] > 0
    solid = ~fill & ((source > 3) & (source < 57)).all(dim=0)
    return (painted - source)[:, solid].t()


def affine(*operations, layers: int = 1):
    return rand_augment_transform(
        f'rand-m9-n{layers}-p1', {'interpolation': Image.BILINEAR, 'img_mean': (0, 0, 0), 'translate_const': 12},
        transforms=list(operations))


@pytest.mark.parametrize('operation', [
    None, 'ShearX', 'ShearY', 'TranslateX', 'TranslateY', 'TranslateXRel', 'TranslateYRel', 'Rotate'])
def test_matrices_say_where_pixels_went(operation):
    """Crop, flips and every affine operation of timm against painted coordinates, which PIL cuts to whole bytes: up to
    1/4 of a pixel for each of two resamplings, and no more than 1/8 (half a byte) in the mean."""
    augment = None if operation is None else affine(operation)
    transform = TwoViewTransform(
        (H, W), ((0.3, 0.7), (0.6, 1.0)), vflip=0.5, interpolation='bilinear', augment=augment, finish=to_array)
    found, maps = [], []
    for _ in range(20):
        drawn = transform(coordinate_image())
        found += [errors_of(view, to_view) for view, to_view in zip(drawn.views, drawn.maps)]
        maps.append(drawn.maps)
    found, maps = torch.cat(found), torch.cat(maps)
    assert len(found) > 20_000
    assert found.abs().max() < 0.55 and found.mean(dim=0).abs().max() < 0.14
    assert (maps[:, 1, 1] < 0).any() and (maps[:, 0, 0] < 0).any()  # both flips were among them
    linear = torch.tensor([operation in ('ShearX', 'Rotate'), operation in ('ShearY', 'Rotate')])
    assert torch.equal((maps[:, [1, 0], [0, 1]] != 0).any(dim=0), linear)


def test_operations_compose():
    """Four in a row, among them a photometric one, inside of a Compose: still the same place, up to four roundings."""
    names = ['ShearX', 'ShearY', 'TranslateXRel', 'TranslateY', 'Rotate']
    augment = transforms.Compose([affine(*names, layers=3), transforms.RandomApply([affine('Rotate')], p=0.5)])
    transform = TwoViewTransform((H, W), ((0.6, 0.9), (0.6, 1.0)), augment=augment, finish=to_array)
    found = []
    for _ in range(20):
        drawn = transform(coordinate_image())
        found += [errors_of(view, to_view) for view, to_view in zip(drawn.views, drawn.maps)]
    found = torch.cat(found)
    assert len(found) > 5_000 and found.abs().max() < 1.6 and found.mean(dim=0).abs().max() < 0.6


def test_photometric_operations_leave_the_geometry():
    """The same crops and flips with and without a change of colours, which draws from torch."""
    def draw(augment):
        random.seed(3)
        return TwoViewTransform(32, hflip=1.0, augment=augment)(coordinate_image())
    plain, coloured = draw(None), draw(transforms.ColorJitter(0.9, 0.9, 0.9))
    assert torch.equal(plain.maps, coloured.maps) and torch.equal(plain.areas, coloured.areas)
    assert not torch.equal(plain.views[0], coloured.views[0])


def test_auto_augment_is_followed_and_the_given_object_is_left_alone():
    policy = auto_augment_transform('original', {})
    function = policy.policy[0][0].aug_fn
    transform = TwoViewTransform(32, augment=policy)
    followed = {type(op.aug_fn).__name__ for part in transform.augment.policy for op in part}
    assert '_Followed' in followed and 'function' in followed
    assert policy.policy[0][0].aug_fn is function
    tilted = [transform(coordinate_image()).maps[:, [0, 1], [1, 0]] for _ in range(20)]
    assert torch.stack(tilted).any()


@pytest.mark.parametrize('areas', [FINE_TUNING_AREAS, PRETRAINING_AREAS])
def test_areas_are_those_of_the_crops(areas):
    """And the determinant of a map is (view area) / (crop area): 32^2 / (share 60^2)."""
    transform = TwoViewTransform(32, areas)
    drawn = default_collate([transform(coordinate_image()) for _ in range(100)])
    assert drawn.maps.shape == (100, 2, 3, 3) and drawn.views[1].shape == (100, 3, 32, 32)
    for view, (low, high) in enumerate(areas):
        share = drawn.areas[:, view]
        assert low - 0.02 < share.min() < low + 0.1 and high - 0.1 < share.max() < high + 0.02
    determinant = torch.linalg.det(drawn.maps.double()).abs()
    torch.testing.assert_close(determinant, 32 ** 2 / (drawn.areas.double() * 60 ** 2), rtol=1e-4, atol=0)


@pytest.mark.parametrize('wrong, message', [
    (dict(areas=((0.5, 0.4), (0.6, 1.0))), r'areas=.*give two ranges of shares above 0 and up to 1'),
    (dict(areas=((0.0, 0.4), (0.6, 1.0))), r'areas='),
    (dict(augment=transforms.RandomRotation(5)), 'RandomRotation cannot be'),
    (dict(augment=transforms.Compose([transforms.RandomHorizontalFlip()])), 'pixels go in RandomHorizontalFlip cannot'),
])
def test_refused(wrong, message):
    with pytest.raises(InputError, match=message):
        TwoViewTransform(32, **wrong)


def test_views_of_a_batch_in_memory():
    """Painted coordinates again, exact here, because bilinear interpolation of a plane is the plane."""
    y, x = torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing='ij')
    images = torch.stack([y, x]).expand(30, 2, H, W)
    views, maps, areas = random_view(images, (0.2, 1.0))
    points = torch.stack([y, x, torch.ones_like(x)]).flatten(1)
    source = (torch.linalg.inv(maps) @ points)[:, :2].reshape(30, 2, H, W)
    limit = torch.tensor([H, W]).view(2, 1, 1) - 0.5
    inside = ((source > 0.5) & (source < limit)).all(dim=1, keepdim=True).expand_as(views)
    assert inside.float().mean() > 0.9
    torch.testing.assert_close(views[inside], source[inside], rtol=0, atol=1e-3)
    assert (maps[:, 1, 1] < 0).any() and (maps[:, 1, 1] > 0).any()
    torch.testing.assert_close(torch.linalg.det(maps).abs(), 1 / areas, rtol=1e-4, atol=0)
    again = random_view(images, (0.2, 1.0), generator=torch.Generator().manual_seed(1))[1]
    assert torch.equal(again, random_view(images, (0.2, 1.0), generator=torch.Generator().manual_seed(1))[1])


def test_collated_batches_are_view_by_view():
    transform = TwoViewTransform(16)
    samples = [(transform(coordinate_image()), i) for i in range(3)]
    images, targets = next(iter(DataLoader(samples, batch_size=3, collate_fn=collate_two_views)))
    assert isinstance(targets, ViewTargets) and targets.targets.tolist() == [0, 1, 2, 0, 1, 2]
    for i, (drawn, _) in enumerate(samples):
        assert torch.equal(images[i], drawn.views[0]) and torch.equal(images[3 + i], drawn.views[1])
        assert torch.equal(targets.maps[i], drawn.maps) and torch.equal(targets.areas[i], drawn.areas)
    assert targets.to(torch.float64).maps.dtype == torch.float64


FLIP = torch.tensor([[1., 0., 0.], [0., -1., 384.], [0., 0., 1.]])  # of a view of 384 pixels


def stack(*maps: torch.Tensor) -> torch.Tensor:
    """(1, 2, 3, 3) maps of two views of one image."""
    return torch.stack(maps).unsqueeze(0)


@pytest.mark.parametrize('size, patches', [(384, 144), (224, 49)])
def test_flip_alone(size, patches):
    """Patches of 32 pixels: (r, c) meets (r, L - 1 - c), and every one is matched; a class token shifts all by one."""
    flip = FLIP.clone()
    flip[1, 2] = size
    side = size // 32
    expected = torch.arange(patches).view(side, side).flip(1).flatten()
    for first, second in ((torch.eye(3), flip), (flip, torch.eye(3)), (flip, flip @ flip)):
        index, finer = match_patches(stack(first, second), torch.ones(1, 2), (size, size), Grid(side, side))
        assert torch.equal(index[0], expected) and finer.tolist() == [0]
    token, _ = match_patches(stack(torch.eye(3), flip), torch.ones(1, 2), (size, size), Grid(side, side, 1))
    assert token.shape == (1, patches + 1) and token[0, 0] == 0 and torch.equal(token[0, 1:], expected + 1)
    alone, _ = match_patches(stack(torch.eye(3), flip), torch.ones(1, 2), (size, size), Grid(side, side, 1), False)
    assert alone[0, 0] == -1 and torch.equal(alone[0, 1:], expected + 1)


def crop(top: float, left: float, height: float, width: float, size: float = 8.0) -> torch.Tensor:
    y, x = size / height, size / width
    return torch.tensor([[y, 0., -top * y], [0., x, -left * x], [0., 0., 1.]])


def test_the_finer_view_comes_first():
    """The upper left quarter of an image of 8 x 8, 4 x 4 patches of 2 pixels. Centres of the crop's patches lie at 0.5,
    1.5, 2.5, 3.5 of the image, so in its patches 0, 0, 1, 1: four share one. The other way round only 2 x 2 match."""
    whole, quarter = crop(0, 0, 8, 8), crop(0, 0, 4, 4)
    expected = [0, 0, 1, 1, 0, 0, 1, 1, 4, 4, 5, 5, 4, 4, 5, 5]
    for maps, areas, second in (((whole, quarter), [1., .25], 1), ((quarter, whole), [.25, 1.], 0)):
        index, finer = match_patches(stack(*maps), torch.tensor([areas]), (8, 8), Grid(4, 4))
        assert index[0].tolist() == expected and finer.tolist() == [second]
    index, _ = match_patches(stack(whole, quarter), torch.tensor([[.25, 1.]]), (8, 8), Grid(4, 4))
    assert torch.equal(index[0].view(4, 4) >= 0, torch.arange(4).view(4, 1).maximum(torch.arange(4)) < 2)


def test_item_numbers():
    """Two images of 2 x 2 patches and a class token, N = 5. Image 0 is not moved; of image 1 view 2 is finer."""
    maps = torch.stack([torch.stack([crop(0, 0, 8, 8), crop(0, 0, 8, 8)]),
                        torch.stack([crop(0, 0, 8, 8), crop(4, 0, 4, 4)])])
    pairs = match_items(maps, torch.tensor([[1., 1.], [1., .25]]), (8, 8), Grid(2, 2, 1))
    # View 1: items 0 to 4 and 5 to 9; view 2: 10 to 14 and 15 to 19. The lower left quarter lies in patch 2, token 3.
    assert pairs[:, 0].tolist() == [[0, 1, 2, 3, 4], [10, 11, 12, 13, 14]]
    assert pairs[:, 1].tolist() == [[15, 16, 17, 18, 19], [5, 8, 8, 8, 8]]


def test_matches_against_painted_coordinates():
    """The place that is painted in the middle of a patch of the finer view lies, in the coarser view, in the matched
    patch: found by looking for it among all of its pixels. 4 x 4 pixels a patch; places near an edge are left out."""
    y, x = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(32) + 0.5, indexing='ij')
    drawn = random_views(torch.stack([y, x]).expand(12, 2, 32, 32), ((0.1, 0.7), (0.3, 1.0)))
    index, finer = match_patches(drawn.maps, drawn.areas, (32, 32), Grid(8, 8))
    checked = missed = 0
    for image in range(12):
        fine, coarse = drawn.views[finer[image]][image], drawn.views[1 - finer[image]][image]
        middle = torch.nn.functional.avg_pool2d(fine[:, 1:31, 1:31], 2, stride=4).flatten(1)  # of its 2 x 2 pixels
        distance = (coarse.flatten(1)[:, None] - middle[:, :, None]).square().sum(dim=0)  # (64, 1024)
        pixel = distance.argmin(dim=1)
        step = (coarse[0, 16, 16] - coarse[0, 17, 16]).abs() + (coarse[1, 16, 16] - coarse[1, 16, 17]).abs()
        for patch in range(64):
            row, column = divmod(int(pixel[patch]), 32)
            near_edge = row % 4 in (0, 3) or column % 4 in (0, 3)
            if distance[patch].min().sqrt() > step:  # nothing like it in the other view
                assert index[image, patch] == -1
                missed += 1
            elif not near_edge:
                assert index[image, patch] == row // 4 * 8 + column // 4
                checked += 1
    assert checked > 100 and missed > 30


def test_matches_depend_on_the_relation_of_the_views_alone():
    """Whatever further map stands before both; and a perspective map is divided out."""
    drawn = random_views(torch.rand(16, 1, 32, 32))
    index, finer = match_patches(drawn.maps, drawn.areas, (32, 32), Grid(8, 8))
    before = torch.tensor([[1.1, 0.2, 3.], [-0.3, 0.9, -2.], [0.001, 0.002, 1.]])
    moved, _ = match_patches(drawn.maps @ before, drawn.areas, (32, 32), Grid(8, 8))
    assert (moved == index).float().mean() > 0.99  # but for centres on an edge
    scaled, _ = match_patches(drawn.maps * torch.tensor([2., 5.]).view(1, 2, 1, 1), drawn.areas, (32, 32), Grid(8, 8))
    assert (scaled == index).float().mean() > 0.99
    both = torch.stack([drawn.maps, drawn.maps[:, [1, 0]]])
    for maps, areas, expected in ((both[0], drawn.areas, finer), (both[1], drawn.areas[:, [1, 0]], 1 - finer)):
        again, side = match_patches(maps, areas, (32, 32), Grid(8, 8))
        assert torch.equal(again, index) and torch.equal(side, expected)


def record(logits: torch.Tensor, shape=()) -> Routing:
    return Routing(logits, logits.softmax(dim=-1), logits, shape=shape or (len(logits),))


ONE_HOT = 200.0 * torch.eye(8)  # logits that send item e to expert e
SAME = torch.stack([torch.arange(8), torch.arange(8, 16)])


def test_jsd_numbers():
    """0 of equal routes, ln 2 of two different experts, mean over the pairs: (0 + ln 2) / 2 of one of each."""
    assert jsd_loss(record(torch.randn(8, 8).repeat(2, 1)), SAME) == 0
    other = record(torch.cat([ONE_HOT, ONE_HOT.roll(1, 0)]))
    assert float(jsd_loss(other, SAME)) == pytest.approx(math.log(2), abs=1e-6)
    assert float(jsd_loss(other, SAME, weight=0.5)) == pytest.approx(math.log(2) / 2, abs=1e-6)
    pairs = torch.tensor([[0, 1, -1, 5], [8, 8, -1, -1]])  # item 8 has expert 7: two pairs, both of different experts
    assert float(jsd_loss(other, pairs)) == pytest.approx(math.log(2), abs=1e-6)
    half = torch.tensor([[0, 0], [0, 8]])
    assert float(jsd_loss(other, half)) == pytest.approx(math.log(2) / 2, abs=1e-6)
    # p = (3/4, 1/4), q = (1/4, 3/4), m = (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2) = 0.130812
    p = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).log()
    assert float(jsd_loss(record(p), torch.tensor([[0], [1]]))) == pytest.approx(0.130812, abs=1e-6)


def test_losses_of_routes_that_underflow_and_of_one_expert_are_finite():
    sure = torch.tensor([[200.0, 0.0], [0.0, 200.0]])  # softmax 1 and 0 in float32
    pair = torch.tensor([[0], [1]])
    for logits, jsd, prc in (
            (sure, math.log(2), 0.005 + 0.05 * 2),  # M = 2 p^T q = 2 at (0, 1): mean (0 - 1)^2, mean of 0 and 4
            (sure[:1].repeat(2, 1), 0, 0.005),  # 2 at (0, 0): mean of (2 - 1)^2 and (0 - 1)^2
            (torch.zeros(2, 1), 0, 0)):  # one expert: M = 1, and nothing off the diagonal
        assert float(jsd_loss(record(logits), pair)) == pytest.approx(jsd, abs=1e-6)
        assert float(prc_loss(record(logits), pair)) == pytest.approx(prc, abs=1e-6)


def test_prc_numbers():
    """M = I of one-hot, balanced, consistent routes; uniform ones M = 1/8: 7/8 squared is 0.765625, 1/8 squared
    0.015625, 5e-3 and 5e-2 of them 0.004609; a collapse M_11 = 8: (7^2 + 7 * 1) / 8 = 7."""
    consistent = record(torch.cat([ONE_HOT, ONE_HOT]))
    assert [float(t) for t in prc_terms(consistent, SAME)] == [0, 0] and prc_loss(consistent, SAME) == 0
    uniform = record(torch.zeros(16, 8))
    assert [float(t) for t in prc_terms(uniform, SAME)] == [0.765625, 0.015625]
    assert float(prc_loss(uniform, SAME)) == pytest.approx(0.004609, abs=5e-7)
    assert float(prc_loss(uniform, SAME, 1.0, 2.0)) == 0.765625 + 2 * 0.015625
    collapse = record(ONE_HOT[:1].expand(16, 8))
    assert [float(t) for t in prc_terms(collapse, SAME)] == [7, 0]
    # Balanced, but every patch goes elsewhere in the other view: M_ii = 0, and 8 of 56 other entries are 1.
    swapped = prc_terms(record(torch.cat([ONE_HOT, ONE_HOT.roll(1, 0)])), SAME)
    assert [float(t) for t in swapped] == pytest.approx([1, 8 / 56])


def test_prc_is_float32_under_autocast():
    routing = record(torch.randn(64, 8))
    pairs = torch.stack([torch.arange(32), torch.arange(32, 64)])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        inside = prc_loss(routing, pairs)
    assert inside.dtype == torch.float32 and torch.equal(inside, prc_loss(routing, pairs))


@pytest.mark.parametrize('name', CONSISTENCY_LOSSES)
def test_losses_read_the_logits_without_noise(name):
    routing = record(torch.randn(16, 8))
    noisy = routing._replace(noisy_logits=torch.randn(16, 8), gates=torch.rand(16, 8), weights=torch.rand(16, 8))
    assert torch.equal(CONSISTENCY_LOSSES[name](routing, SAME), CONSISTENCY_LOSSES[name](noisy, SAME))


@pytest.mark.parametrize('name', CONSISTENCY_LOSSES)
def test_gradient_goes_through_both_views(name):
    """Of all paired items, and of none but these; the gradient is that of finite differences."""
    logits = torch.randn(16, 8, dtype=torch.float64, requires_grad=True)
    pairs = SAME[:, :6]
    CONSISTENCY_LOSSES[name](record(logits), pairs).backward()
    moved = logits.grad.abs().sum(dim=1) > 0
    assert torch.equal(moved, torch.isin(torch.arange(16), pairs.flatten()))
    step, item = 1e-2, 11  # of the second view
    up, down = (logits.detach().clone() for _ in range(2))
    up[item, 3] += step
    down[item, 3] -= step
    slope = CONSISTENCY_LOSSES[name](record(up), pairs) - CONSISTENCY_LOSSES[name](record(down), pairs)
    assert float(slope) / (2 * step) == pytest.approx(float(logits.grad[item, 3]), rel=0.02, abs=1e-5)


@pytest.mark.parametrize('name', CONSISTENCY_LOSSES)
@pytest.mark.parametrize('prefix', [0, 1])
def test_views_without_overlap(name, prefix):
    """Opposite corners: nothing corresponds, not even class tokens; loss 0 and gradients 0, neither is NaN."""
    maps = stack(crop(0, 0, 4, 4), crop(4, 4, 4, 4))
    pairs = match_items(maps, torch.full((1, 2), 0.25), (8, 8), Grid(4, 4, prefix))
    assert (pairs == -1).all()
    logits = torch.randn(2 * (16 + prefix), 8, requires_grad=True)
    loss = CONSISTENCY_LOSSES[name](record(logits), pairs)
    loss.backward()
    assert loss.item() == 0 and torch.equal(logits.grad, torch.zeros_like(logits))
    # A view without extent has no inverse, and no counterparts.
    flat = stack(torch.zeros(3, 3), torch.eye(3))
    assert (match_items(flat, torch.ones(1, 2), (8, 8), Grid(4, 4)) == -1).all()
