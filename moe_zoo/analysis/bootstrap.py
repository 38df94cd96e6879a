"""The paired bootstrap: is one of two models better on the same images, and by how much?

Images are drawn with replacement, the same ones for both sides; where a side has several seeds, seeds are drawn too.

Letters: N images, S seeds of a side, R resamples, P patterns (images that all seeds of both sides judge alike).
"""
from dataclasses import dataclass

import numpy as np

from ..errors import InputError

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 1 << 22  # numbers drawn at a time


@dataclass(frozen=True)
class Difference:
    """What a paired bootstrap says of one side minus the other. Figures in percent, differences in points.

    Attributes:
        ours, theirs: (S,) figure by seed.
        mean: Difference of their means.
        low, high: Ends of the 95 % interval.
        images, resamples, random_state: Of the bootstrap.
        paired_seeds: Whether seeds were drawn in pairs, as both sides have the same ones.
    """
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    mean: float
    low: float
    high: float
    images: int
    resamples: int
    random_state: int
    paired_seeds: bool

    @property
    def told(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class AccuracyDifference(Difference):
    """The difference of two accuracies.

    Attributes:
        only_ours, only_theirs, both, neither: Images that one side, both or none got right; with several seeds the
            mean over pairs (of one seed of each side).
    """
    only_ours: float
    only_theirs: float
    both: float
    neither: float


def paired_difference(
        ours: np.ndarray,
        theirs: np.ndarray,
        paired_seeds: bool = False,
        resamples: int = RESAMPLES,
        random_state: int = 0,
) -> AccuracyDifference:
    """Bootstrap the difference of two accuracies on the same images.

    A resample draws N of the N images for both sides alike. Of S > 1 seeds it draws S - 1, with replacement: the mean
    of S - 1 draws from S values has the variance of the values with divisor S (S - 1), which is the unbiased one of
    the mean of S seeds. What image and seed do together is drawn with both: the interval is rather wide than narrow.

    Args:
        ours: (S, N) whether the seeds of one side got the images right.
        theirs: (S, N) of the other side, which may have another number of seeds.
        paired_seeds: Row s of both sides belongs together (the same seed, so the same batches).
        resamples: R.
        random_state: Of the draws.

    Raises:
        InputError: There are no images, not equally many, or no resamples.
    """
    ours, theirs = (np.atleast_2d(np.asarray(side, dtype=bool)) for side in (ours, theirs))
    if ours.shape[1] != theirs.shape[1] or not ours.size or paired_seeds and len(ours) != len(theirs):
        raise InputError(f'A paired comparison needs the same images (and seeds) on both sides, not {ours.shape} and '
                         f'{theirs.shape} outcomes.')
    check_resamples(resamples)
    patterns, counts = np.unique(np.concatenate([ours, theirs]), axis=1, return_counts=True)
    first, second = (side.astype(float) for side in np.split(patterns, [len(ours)]))  # (S, P) each
    images, random = ours.shape[1], np.random.default_rng(random_state)
    found = []
    step = max(1, CHUNK // len(counts))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        weights = random.multinomial(images, counts / images, size) / images  # (R, P)
        found.append(between(weights @ first.T, weights @ second.T, paired_seeds, random))
    low, high = interval(np.concatenate(found))
    right, theirs_right = ours.mean(axis=0), theirs.mean(axis=0)  # (N,) share of the seeds
    both = (ours & theirs).mean(axis=0).sum() if paired_seeds else (right * theirs_right).sum()
    return AccuracyDifference(
        tuple(100 * ours.mean(axis=1)), tuple(100 * theirs.mean(axis=1)), 100 * float((right - theirs_right).mean()),
        100 * float(low), 100 * float(high), images, resamples, random_state, paired_seeds,
        only_ours=float(right.sum() - both), only_theirs=float(theirs_right.sum() - both), both=float(both),
        neither=float(images - right.sum() - theirs_right.sum() + both))


def between(first: np.ndarray, second: np.ndarray, paired_seeds: bool, random: np.random.Generator) -> np.ndarray:
    """(R,) differences of resamples, whose seeds are drawn.

    Args:
        first: (R, S) figure of every seed of one side on every resample of the images.
        second: The same of the other side.
        paired_seeds: Draw the same seeds for both.
        random: Of the draws.
    """
    if paired_seeds:
        return ((first - second) * _seeds(random, *first.shape)).sum(axis=1)
    return (first * _seeds(random, *first.shape)).sum(axis=1) - (second * _seeds(random, *second.shape)).sum(axis=1)


def check_resamples(number: int) -> None:
    """Raises: InputError: These are too few."""
    if number < 100:
        raise InputError(f'--resamples {number}: give at least 100, or there is no interval to speak of.')


def interval(values: np.ndarray) -> tuple[float, float]:
    """Ends of the middle 95 % of resampled values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _seeds(random: np.random.Generator, size: int, seeds: int) -> np.ndarray:
    """(R, S) weights of the seeds in every resample."""
    draws = max(1, seeds - 1)
    return random.multinomial(draws, np.full(seeds, 1 / seeds), size) / draws
