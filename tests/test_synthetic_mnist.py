"""Synthetic MNIST and the measure of discriminative routing.

Letters: N images, n patches an image, E experts.
"""
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from moe_zoo.analysis.patches import label_patch_kept, patch_precision, right_experts
from moe_zoo.data import build_synthetic_mnist, load_digit_sources, shade_border, write_synthetic_mnist
from moe_zoo.data.synthetic_mnist import Source
from moe_zoo.errors import InputError
from moe_zoo.routing import Routing


def plain_digits(copies: int = 3) -> Source:
    """2 x 2 pixels of grey 10 d + c for copy c of digit d: what a patch shows can be read from it."""
    labels = np.repeat(np.arange(10), copies)
    grey = 10 * labels + np.tile(np.arange(copies), 10)
    return Source(np.broadcast_to(grey[:, None, None], (len(grey), 2, 2)).astype(np.uint8), labels)


def patches(images: np.ndarray, size: int) -> np.ndarray:
    """(N, H, W) to (N, n, size, size)."""
    N, H, W = images.shape
    return images.reshape(N, H // size, size, W // size, size).transpose(0, 1, 3, 2, 4).reshape(N, -1, size, size)


def test_one_patch_has_the_label_and_the_others_show_2_to_9():
    data = build_synthetic_mnist(plain_digits(), 60, seed=1)
    assert data.images.shape == (60, 8, 8) and data.images.dtype == np.uint8
    assert np.bincount(data.labels).tolist() == [30, 30]
    shown = patches(data.images, 2)
    assert (shown == shown[..., :1, :1]).all()
    digit = shown[..., 0, 0] // 10  # (N, 16)
    of_label = np.arange(16) == data.positions[:, None]
    assert (digit[of_label] == data.labels).all()
    assert set(digit[~of_label].tolist()) == set(range(2, 10))
    assert len(set(data.positions.tolist())) == 16


def test_digits_come_again_only_when_all_were_shown():
    data = build_synthetic_mnist(plain_digits(copies=5), 10, grid=2)
    grey = patches(data.images, 2)[np.arange(10), data.positions, 0, 0]
    assert sorted(grey.tolist()) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14]
    # 30 other patches of 40 digits: each at most once
    others = patches(data.images, 2)[np.arange(4) != data.positions[:, None]][:, 0, 0]
    assert len(set(others.tolist())) == 30


def test_a_seed_repeats_itself_and_others_differ():
    one, again, other = (build_synthetic_mnist(plain_digits(), 20, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(one, again))
    assert not np.array_equal(one.images, other.images)


def test_splits_of_scikit_learns_digits_share_no_digit():
    sources = load_digit_sources()
    assert {split: len(source.labels) for split, source in sources.items()} == {
        'train': 1085, 'validation': 357, 'test': 355}  # validation: a quarter of every class, rounded down
    assert all(source.images.shape[1:] == (8, 8) for source in sources.values())
    seen = [{image.tobytes() for image in source.images} for source in sources.values()]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    assert load_digit_sources(patch_size=12)['test'].images.shape == (355, 12, 12)


def test_an_npz_takes_their_place(tmp_path):
    images, labels = np.arange(40)[:, None, None] * np.ones((1, 3, 3)), np.arange(40) % 10
    np.savez(tmp_path / 'mnist.npz', x_train=images.astype(np.uint8), y_train=labels, x_test=images.astype(np.uint8),
             y_test=labels)
    for source in (tmp_path, tmp_path / 'mnist.npz'):
        sources = load_digit_sources(str(source))
        # one of four of every digit is held out
        assert [len(sources[split].labels) for split in ('train', 'validation', 'test')] == [30, 10, 40]
        assert np.bincount(sources['validation'].labels).tolist() == [1] * 10


def test_real_mnist(shared_data):
    sources = load_digit_sources(str(shared_data / 'mnist'))
    data = build_synthetic_mnist(sources['test'], 4)
    assert data.images.shape == (4, 112, 112) and sum(len(s.labels) for s in sources.values()) == 20_000


def test_a_frame_has_the_shade_of_the_class_or_lies():
    data = shade_border(build_synthetic_mnist(plain_digits(), 40), .9, width=1, shades=(7, 99), seed=2)
    inner = np.zeros((8, 8), dtype=bool)
    inner[1:-1, 1:-1] = True
    frame = data.images[:, ~inner]
    assert (frame == frame[:, :1]).all()
    assert ((frame[:, 0] == 99) == (data.labels == 1)).sum() == 36  # 90 % of 40
    plain = build_synthetic_mnist(plain_digits(), 40).images
    assert (data.images[:, inner] == plain[:, inner]).all()


def test_folders_for_the_training_tool(tmp_path):
    write_synthetic_mnist(tmp_path, counts=(6, 4, 2), patch_size=5, grid=2)
    files = [str(path.relative_to(tmp_path).parent) for path in tmp_path.rglob('*.png')]
    assert Counter(files) == {
        'train/0': 3, 'train/1': 3, 'validation/0': 2, 'validation/1': 2, 'test/0': 1, 'test/1': 1}
    with Image.open(next((tmp_path / 'train').rglob('*.png'))) as image:
        assert (image.size, image.mode) == ((10, 10), 'L')


@pytest.mark.parametrize('call, message', [
    (lambda: load_digit_sources('nowhere.npz'), "'nowhere.npz' is neither an npz file nor a folder with one"),
    (lambda: load_digit_sources(patch_size=0), 'patch_size=0: a patch has at least 1 pixel'),
    (lambda: build_synthetic_mnist(plain_digits(), 0), 'count=0, grid=4: use 1 or more for both'),
    (lambda: build_synthetic_mnist(Source(np.zeros((2, 2, 2), np.uint8), np.array([2, 3])), 4),
     'source: a digit from 0 to 9 is missing'),
    (lambda: shade_border(build_synthetic_mnist(plain_digits(), 4), 1.5), r'agreement=1\.5, width=1: use a share '),
])
def test_what_cannot_be_built(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize('arrays, message', [
    (dict(x_train=np.zeros((2, 3, 3), np.uint8)), 'is not an npz with x_train, y_train, x_test, y_test: .*y_train'),
    ({name: np.zeros((2, 3, 3, 3)) for name in ('x_train', 'y_train', 'x_test', 'y_test')}, 'holds no grey digits'),
])
def test_an_npz_of_something_else(tmp_path, arrays, message):
    np.savez(tmp_path / 'other.npz', **arrays)
    with pytest.raises(InputError, match=message):
        load_digit_sources(str(tmp_path / 'other.npz'))


# Discriminative routing

def choices() -> Routing:
    """Two images of four patches, two experts, two patches each. The label is in patch 1, then in patch 3."""
    kept = torch.zeros(2, 4, 2, dtype=torch.bool)
    kept[0, [0, 1], 0] = True  # expert 0, image 0: keeps the label patch and one other
    kept[1, [0, 1], 0] = True  # image 1: misses it
    kept[0, [2, 3], 1] = True
    kept[1, [2, 3], 1] = True
    weights = kept.float().view(8, 2)
    return Routing(weights, weights, weights, torch.arange(2).expand(8, 2), kept.view(8, 2), shape=(2, 2, 2),
                   by_expert=True)


def test_precision_by_hand():
    position, target = torch.tensor([1, 3]), torch.tensor([0, 1])
    assert label_patch_kept(choices(), position).tolist() == [[True, False], [False, True]]
    experts = right_experts(choices(), position, target, 2)
    assert experts.tolist() == [0, 1]
    # the right experts keep both label patches, and drop 2 of 3 others
    assert patch_precision(choices(), position, experts[target]) == pytest.approx((1., 2 / 3))
    # the wrong ones keep none, and drop 1 of 3 others
    assert patch_precision(choices(), position, experts[1 - target]) == pytest.approx((0., 1 / 3))
    # all experts: half the label patches, as l / n; others (2 + 1 + 1 + 2) / 12
    assert patch_precision(choices(), position) == pytest.approx((.5, .5))


def test_precision_wants_records_of_patches():
    with pytest.raises(InputError, match='this measure is of layers whose experts choose patches'):
        patch_precision(choices()._replace(by_expert=False), torch.tensor([1, 3]))
    with pytest.raises(InputError, match='position: give one patch from 0 to 3 for each of the 2 images'):
        patch_precision(choices(), torch.tensor([1, 4]))
