"""Figures of a classification from its outcomes by image: accuracy by class, calibration, accuracy on ReaL labels.

All in percent. Letters: N images.
"""
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from ..errors import InputError
from .outcomes import Outcomes

BINS = 15  # of confidence, as Guo et al. 2017 take them


def accuracy_by_class(outcomes: Outcomes, classes: Sequence[str]) -> List[Dict[str, Any]]:
    """A row for every class that has images.

    Args:
        outcomes: Of N images.
        classes: Name of every class.

    Returns:
        Rows with class (its index), name, images, top1, top5, and predicted: of how many images it was the likeliest.
    """
    size = max(len(classes), int(outcomes.targets.max()) + 1, int(outcomes.likeliest.max()) + 1)
    images = np.bincount(outcomes.targets, minlength=size)
    first, five = (
        np.bincount(outcomes.targets, weights=right, minlength=size) for right in (outcomes.right, outcomes.among_five))
    predicted = np.bincount(outcomes.likeliest[:, 0], minlength=size)
    return [
        {'class': y, 'name': classes[y] if y < len(classes) else str(y), 'images': int(images[y]),
         'top1': 100 * float(first[y]) / int(images[y]), 'top5': 100 * float(five[y]) / int(images[y]),
         'predicted': int(predicted[y])}
        for y in images.nonzero()[0].tolist()
    ]


def calibration(outcomes: Outcomes, bins: int = BINS) -> Dict[str, Any]:
    """Expected calibration error: how far confidence and accuracy lie apart, in the mean over the images.

    The images are sorted into bins of equal width by the probability p of their likeliest class, low < p <= high; the
    error is the mean over images of |accuracy - mean p| of their bin (Guo et al., On Calibration of Modern Neural
    Networks, ICML 2017).

    Returns:
        error (in points of percent), bins, and table: for each bin low, high, images, confidence and accuracy (None
        where it is empty).

    Raises:
        InputError: `bins` is no positive number.
    """
    if bins < 1:
        raise InputError(f'--bins {bins}: give the number of bins of confidence, at least 1.')
    edges = np.linspace(0, 1, bins + 1)
    position = np.digitize(outcomes.confidence, edges[1:-1], right=True)
    images = np.bincount(position, minlength=bins)
    confidence, right = (
        np.bincount(position, weights=values, minlength=bins) for values in (outcomes.confidence, outcomes.right))
    table = [
        {'low': float(edges[i]), 'high': float(edges[i + 1]), 'images': int(images[i]),
         'confidence': 100 * float(confidence[i] / images[i]) if images[i] else None,
         'accuracy': 100 * float(right[i] / images[i]) if images[i] else None}
        for i in range(bins)
    ]
    return {'error': 100 * float(np.abs(right - confidence).sum() / len(outcomes)), 'bins': bins, 'table': table}


def real_accuracy(outcomes: Outcomes, labels: Sequence[Optional[Sequence[int]]]) -> Dict[str, Any]:
    """Accuracy where any of an image's labels counts as right; images without a label are left out.

    Args:
        outcomes: Of N images.
        labels: The labels of each, see `moe_zoo.engine.labels.real_labels_of`.

    Returns:
        images (with labels), top1, top5.

    Raises:
        InputError: No image has a label.
    """
    rows = [(row, set(each)) for row, each in zip(outcomes.likeliest.tolist(), labels) if each]
    if not rows:
        raise InputError('--real-labels: none of the images has a label in this file.')
    first = sum(row[0] in accepted for row, accepted in rows)
    five = sum(not accepted.isdisjoint(row) for row, accepted in rows)
    return {'images': len(rows), 'top1': 100 * first / len(rows), 'top5': 100 * five / len(rows)}
