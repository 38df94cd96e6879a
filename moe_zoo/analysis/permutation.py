"""The statistics behind the object-size analysis: a measure of separation, permuted images, p-values for many, and
means of objects that come in images.

Plain NumPy. Letters: N images, L levels, P positions of a gate map, O objects, S size classes, E experts, R
repetitions, C statistics.
"""
from typing import Optional

import numpy as np


def separation(mass: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """How far each expert's gate mass differs between size classes.

    Args:
        mass: (..., S, E); rows of classes without objects are ignored.
        counts: (S,) objects in every class.

    Returns:
        (..., E) root of the between-class variance. Its norm over E is the separation of the layer.
    """
    share = counts / counts.sum()
    mass = np.where((counts > 0)[:, None], mass, 0.)
    mean = np.einsum('s,...se->...e', share, mass)
    variance = np.einsum('s,...se->...e', share, (mass - mean[..., None, :]) ** 2)
    return np.where(variance > 1e-18, np.sqrt(variance), 0.)  # rounding is no separation


def permuted_mass(gates: np.ndarray, objects: np.ndarray, permutations: np.ndarray) -> np.ndarray:
    """Gate mass by size class with the gate maps permuted among the images.

    What the gates of one image say of the objects of another is worked out once for every pair of images, so that a
    permutation is a sum of N such entries.

    Args:
        gates: (N, P, E).
        objects: (N, S, P) how much every position counts for the objects of a class.
        permutations: (R, N) the image whose gates image n gets.

    Returns:
        (R, S, E).
    """
    images, sizes, positions = objects.shape
    experts = gates.shape[-1]
    counts = np.maximum(objects.sum(axis=(0, 2)), 1e-12)
    rows = objects.transpose(1, 0, 2).reshape(sizes * images, positions)
    boxes_of = np.argsort(permutations, axis=1)  # (R, N) the image whose boxes meet the gates of image m
    out = np.zeros((len(permutations), sizes, experts))
    step = max(1, 8_000_000 // (sizes * images * experts))  # bounds the memory of the pairs
    for start in range(0, images, step):
        some = gates[start:start + step]
        pairs = (rows @ some.transpose(1, 0, 2).reshape(positions, -1)).reshape(sizes, images, len(some), experts)
        for m in range(len(some)):
            out += pairs[:, boxes_of[:, start + m], m].transpose(1, 0, 2)
    return out / counts[:, None]


def level_permutations(images: int, levels: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """(count, N * L) permutations that exchange images, and within every image its levels; entry n * L + l."""
    order = np.stack([rng.permutation(images) for _ in range(count)])  # (R, N)
    within = np.argsort(rng.random((count, images, levels)), axis=2)  # (R, N, L)
    return (order[:, :, None] * levels + within).reshape(count, images * levels)


def clustered_means(
        values: np.ndarray,
        weights: np.ndarray,
        images: np.ndarray,
) -> tuple[np.ndarray, Optional[np.ndarray]]:
    """Weighted means of objects, and half the width of their 95 % intervals, where the objects of an image are no
    independent cases: the images are (linearised variance of a ratio, Student's t).

    Args:
        values: (O, E).
        weights: (O,) at least 0, some above.
        images: (O,) number of the image of each object, from 0.

    Returns:
        mean: (E,).
        half: (E,); None where the weights are those of fewer than four images. (The number of images is the one that
            equal weights would have: the square of the sum of their weights over the sum of the squares.)
    """
    mean = weights @ values / weights.sum()
    by_image = np.bincount(images, weights)
    number = by_image.sum() ** 2 / (by_image ** 2).sum()
    if number < 4:
        return mean, None
    off = np.stack([np.bincount(images, column) for column in (weights[:, None] * (values - mean)).T], axis=1)
    error = np.sqrt((off ** 2).sum(axis=0) * number / (number - 1)) / weights.sum()
    return mean, t_quantile(number - 1) * error


def t_quantile(freedom: float) -> float:
    """97.5 % quantile of Student's t from 3 degrees of freedom on, to 1 %: Fisher's expansion about the normal one."""
    z = 1.959964
    terms = (z, (z ** 3 + z) / 4, (5 * z ** 5 + 16 * z ** 3 + 3 * z) / 96,
             (3 * z ** 7 + 19 * z ** 5 + 17 * z ** 3 - 15 * z) / 384)
    return sum(term / freedom ** power for power, term in enumerate(terms))


def curve(
        values: np.ndarray,
        areas: np.ndarray,
        images: np.ndarray,
        points: int = 25,
) -> list[tuple[float, np.ndarray, np.ndarray]]:
    """Mean of objects as a smooth function of their area: a Gaussian window on the logarithm of the area, as wide as
    Silverman's rule says.

    Args:
        values: (O, E).
        areas: (O,) above 0.
        images: As in `clustered_means`.
        points: From the 2nd to the 98th percentile of the areas; left out where fewer than four images contribute.

    Returns:
        (area, (E,) mean, (E,) half width of its 95 % interval) of every point.
    """
    logs = np.log(areas)
    width = 1.06 * logs.std() * len(logs) ** -0.2
    if not width > 0:
        return []
    found = []
    for at in np.linspace(*np.percentile(logs, (2, 98)), points):
        mean, half = clustered_means(values, np.exp(-0.5 * ((logs - at) / width) ** 2), images)
        if half is not None:
            found.append((float(np.exp(at)), mean, half))
    return found


def max_p(observed: np.ndarray, null: np.ndarray) -> np.ndarray:
    """p-values that hold for all statistics at once (single-step max-T, Westfall and Young 1993).

    Args:
        observed: (C,) statistics, large ones significant.
        null: (R, C) the same under the null hypothesis.

    Returns:
        (C,) share of the R + 1 outcomes, the observed one included, whose largest standardised statistic reaches
        this one. A statistic that never varies has 1.
    """
    both = np.concatenate([observed[None], null])
    spread = both.std(axis=0)
    constant = spread <= 1e-12 * np.abs(both).max(axis=0)
    z = np.where(constant, -np.inf, (both - both.mean(axis=0)) / np.where(constant, 1., spread))
    reached = (z[1:].max(axis=1)[:, None] >= z[0] - 1e-9).sum(axis=0)
    return np.where(constant, 1., (1 + reached) / len(both))
