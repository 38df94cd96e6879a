"""The statistics behind the object-size analysis: a measure of separation, permuted images, and p-values for many.

Plain NumPy. Letters: N images, P positions of a gate map, S size classes, E experts, R repetitions, C statistics.
"""
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

    Args:
        gates: (N, P, E).
        objects: (N, S, P) how much every position counts for the objects of a class.
        permutations: (R, N) the image whose gates image n gets.

    Returns:
        (R, S, E).
    """
    images, sizes, positions = objects.shape
    counts = np.maximum(objects.sum(axis=(0, 2)), 1e-12)
    flat = gates.reshape(images * positions, -1)
    out = np.empty((len(permutations), sizes, gates.shape[-1]))
    step = max(1, 4_000_000 // objects.size)  # bounds the memory of one product
    for start in range(0, len(permutations), step):
        some = permutations[start:start + step]
        # Boxes go to the gates: entry m is the image whose boxes meet the gates of image m.
        moved = objects[np.argsort(some, axis=1)]  # (r, N, S, P)
        rows = moved.transpose(0, 2, 1, 3).reshape(len(some) * sizes, images * positions)
        out[start:start + step] = (rows @ flat).reshape(len(some), sizes, -1)
    return out / counts[:, None]


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
