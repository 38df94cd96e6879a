"""Synthetic MNIST: images of 4 x 4 digits, one of which has the label; the data of pMoE's theory.

Chowdhury et al., ICML 2023, https://arxiv.org/abs/2306.04073. One patch, at a random position, shows a 0 or a 1 and is
the class of the image; the other patches show digits from 2 to 9 and say nothing. The authors' arrays are not at hand:
this builds such images from MNIST in an npz file, 112 x 112 pixels, or from the digits inside scikit-learn.

Letters: N images, M digits of a source, P pixels along a patch.
"""
from pathlib import Path
from typing import Dict, NamedTuple, Optional, Tuple, Union

import numpy as np
from PIL import Image

from moe_zoo.errors import InputError

from .digits import load_digits_split

SPLITS = ('train', 'validation', 'test')
HELD_OUT = 0.25  # of every class of the training digits, for validation


class Source(NamedTuple):
    """Single digits to build images of: images (M, P, P) uint8, ink 255 on 0, and labels (M,) int64, 0..9."""
    images: np.ndarray
    labels: np.ndarray


class SyntheticMnist(NamedTuple):
    """Built images.

    Attributes:
        images: (N, grid P, grid P) uint8.
        labels: (N,) int64, 0 or 1, as many of each, the odd one of class 0.
        positions: (N,) int64, the patch that shows the label, row by row from 0.
    """
    images: np.ndarray
    labels: np.ndarray
    positions: np.ndarray


def load_digit_sources(source: Optional[str] = None, patch_size: Optional[int] = None) -> Dict[str, Source]:
    """Digits for training, validation and test; no digit is in two of them.

    Args:
        source: An npz file with `x_train`, `y_train`, `x_test`, `y_test` (MNIST: uint8 (M, 28, 28), integers), or a
            folder with one; None takes scikit-learn's 1,797 digits of 8 x 8 pixels.
        patch_size: Pixels that digits are brought to; None leaves them as they are.

    Raises:
        InputError: The file is not such an npz, scikit-learn is missing, or `patch_size` is below 1.
    """
    if patch_size is not None and patch_size < 1:
        raise InputError(f'patch_size={patch_size}: a patch has at least 1 pixel.')
    x_train, y_train, x_test, y_test = load_digits_split() if source is None else _read_npz(source)
    held_out = np.zeros(len(y_train), dtype=bool)
    order = np.random.default_rng(0).permutation(len(y_train))
    for digit in range(10):
        of_class = order[y_train[order] == digit]
        held_out[of_class[:int(HELD_OUT * len(of_class))]] = True
    parts = ((x_train[~held_out], y_train[~held_out]), (x_train[held_out], y_train[held_out]), (x_test, y_test))
    return {split: Source(_resized(images, patch_size), labels) for split, (images, labels) in zip(SPLITS, parts)}


def build_synthetic_mnist(source: Source, count: int, grid: int = 4, seed: int = 0) -> SyntheticMnist:
    """Images of grid x grid digits, in random order.

    Digits are drawn without replacement, anew when all have been used, so that a small set shows different digits.

    Args:
        source: Digits; those of one split.
        count: N.
        grid: Patches along a side; 4 in the paper.
        seed: Of everything random. A smaller set of the same seed is not a part of a larger one.

    Raises:
        InputError: `count` or `grid` is below 1, or a digit is missing in the source.
    """
    if count < 1 or grid < 1:
        raise InputError(f'count={count}, grid={grid}: use 1 or more for both.')
    random = np.random.default_rng(seed)
    n, size = grid * grid, source.images.shape[1]
    labels = random.permutation(np.arange(count) % 2)
    positions = random.integers(n, size=count)
    digits = np.empty((count, n), dtype=np.int64)  # which digit of the source is where
    of_label = np.arange(n) == positions[:, None]
    digits[~of_label] = _draw(np.flatnonzero(source.labels > 1), count * (n - 1), random)
    for label in (0, 1):
        mine = labels == label
        digits[of_label & mine[:, None]] = _draw(np.flatnonzero(source.labels == label), int(mine.sum()), random)
    patches = source.images[digits].reshape(count, grid, grid, size, size)
    images = patches.transpose(0, 1, 3, 2, 4).reshape(count, grid * size, grid * size)
    return SyntheticMnist(np.ascontiguousarray(images), labels, positions)


def shade_border(
        data: SyntheticMnist,
        agreement: float,
        width: int = 1,
        shades: Tuple[int, int] = (0, 255),
        seed: int = 0,
) -> SyntheticMnist:
    """Frame every image in the shade of its class, or of the other one: a shortcut that may not hold.

    Args:
        data: Images without a frame.
        agreement: Share of the images whose frame is that of their class, rounded to whole images.
        width: Of the frame in pixels; it covers what is there.
        shades: Grey of the frame of class 0 and of class 1.
        seed: Of the choice of images.

    Raises:
        InputError: `agreement` is not a share, or the frame is wider than half the image.
    """
    side = data.images.shape[1]
    if not 0 <= agreement <= 1 or not 1 <= width <= side // 2:
        raise InputError(
            f'agreement={agreement}, width={width}: use a share from 0 to 1, and from 1 to {side // 2} pixels.')
    lies = np.random.default_rng(seed).permutation(len(data.labels)) >= round(agreement * len(data.labels))
    frame = np.ones((side, side), dtype=bool)
    frame[width:-width, width:-width] = False
    shade = np.asarray(shades, dtype=np.uint8)[data.labels ^ lies]
    return data._replace(images=np.where(frame, shade[:, None, None], data.images))


def write_synthetic_mnist(
        folder: Union[str, Path],
        source: Optional[str] = None,
        counts: Tuple[int, int, int] = (1000, 1000, 1000),
        patch_size: int = 28,
        grid: int = 4,
        seed: int = 0,
) -> Path:
    """Write train/, validation/ and test/ with a folder for each class, for any tool that reads folders of images.

    Args:
        folder: Receives them.
        source, patch_size: As in `load_digit_sources`.
        counts: Images of the three.
        grid, seed: As in `build_synthetic_mnist`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    sources = load_digit_sources(source, patch_size)
    for number, (split, count) in enumerate(zip(SPLITS, counts)):
        data = build_synthetic_mnist(sources[split], count, grid, seed + number)
        for index, (image, label) in enumerate(zip(data.images, data.labels)):
            path = folder / split / str(label) / f'{index:05d}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


def _read_npz(source: str) -> Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    path = Path(source).expanduser()
    archives = [path] if path.is_file() else sorted(path.glob('*.npz'))
    if len(archives) != 1:
        raise InputError(f"'{source}' is neither an npz file nor a folder with one: digits come in one npz of MNIST.")
    try:
        with np.load(archives[0], allow_pickle=False) as arrays:
            x_train, y_train, x_test, y_test = (arrays[name] for name in ('x_train', 'y_train', 'x_test', 'y_test'))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"'{archives[0]}' is not an npz with x_train, y_train, x_test, y_test: {error}") from error
    if x_train.ndim != 3 or x_test.shape[1:] != x_train.shape[1:] or x_train.dtype != np.uint8:
        raise InputError(f"'{archives[0]}' holds no grey digits: x_train and x_test are to be uint8 (M, P, P).")
    return x_train, y_train.astype(np.int64), x_test, y_test.astype(np.int64)


def _resized(images: np.ndarray, size: Optional[int]) -> np.ndarray:
    if size is None or images.shape[1:] == (size, size):
        return images
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.BILINEAR)) for image in images])


def _draw(pool: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """`count` entries of a pool, none a second time before all others."""
    if count and not len(pool):
        raise InputError('source: a digit from 0 to 9 is missing; images need all of them.')
    rounds = [random.permutation(pool) for _ in range(-(-count // max(len(pool), 1)))]
    return np.concatenate([np.empty(0, dtype=np.int64), *rounds])[:count]
