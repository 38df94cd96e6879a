"""Is one detector better than another? The difference of their AP on the same images, by a paired bootstrap.

AP is no mean over images: every resample sorts the detections of the drawn images anew, as COCO's evaluation would,
an image that was drawn twice counting twice. What the detectors found is read from the files that their last evaluation
left; nothing is run.

Letters: I images, D detections of a category, T thresholds of overlap, R resamples, S seeds of a side.
"""
import contextlib
import io
import sys
from pathlib import Path
from typing import Any, List, Sequence, Tuple

import numpy as np
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ..analysis.bootstrap import Difference, between, check_resamples, interval
from ..analysis.run_folders import Training
from ..analysis.runs import Run
from ..documents import parse_json
from ..errors import InputError
from .config import load_config

DETECTIONS = 'inference/coco_instances_results.json'


class WeightedAp:
    """AP of boxes of one detector, for any weights of the images.

    Args:
        truth: COCO annotations.
        found: Detections in COCO's format, with the numbers of its categories.
    """

    def __init__(self, truth: COCO, found: List[dict]):
        self.images = sorted(truth.getImgIds())
        self.categories: List[tuple] = []
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells of its progress
            outcome = COCOeval(truth, truth.loadRes([dict(each) for each in found]) if found else COCO(), 'bbox')
            if not found:
                outcome.cocoDt.dataset = {**truth.dataset, 'annotations': []}
                outcome.cocoDt.createIndex()
            outcome.params.areaRng, outcome.params.areaRngLbl = [outcome.params.areaRng[0]], ['all']
            outcome.evaluate()
        self.recalls = outcome.params.recThrs
        step = len(outcome.params.imgIds)
        for start in range(0, len(outcome.evalImgs), step):
            self._add_category(outcome.evalImgs[start:start + step], outcome.params.maxDets[-1])

    def _add_category(self, matches: Sequence[Any], most: int) -> None:
        """One category: its objects by image, and its detections, the surest first."""
        objects, columns = np.zeros(len(matches)), []
        for image, match in enumerate(matches):
            if match is None:
                continue
            objects[image] = np.sum(np.asarray(match['gtIgnore']) == 0)
            scores = np.asarray(match['dtScores'], dtype=float)[:most]
            ignored = np.asarray(match['dtIgnore'], dtype=bool)[:, :most]
            matched = np.asarray(match['dtMatches'])[:, :most] > 0
            columns.append((scores, np.full(len(scores), image), matched & ~ignored, ~matched & ~ignored))
        if not columns:
            return
        scores, image, right, wrong = (np.concatenate(each, axis=-1) for each in zip(*columns))
        order = np.argsort(-scores, kind='mergesort')  # as COCO's evaluation sorts
        self.categories.append((objects, image[order], right[:, order], wrong[:, order]))

    def __call__(self, weights: np.ndarray) -> float:
        """AP in percent where image i counts `weights[i]` times; NaN where these hold no object.

        Args:
            weights: (I,) in the order of the images' numbers.
        """
        values = []
        for objects, image, right, wrong in self.categories:
            total = weights @ objects
            if not total:
                continue
            counted = weights[image]
            hits, misses = np.cumsum(right * counted, axis=1), np.cumsum(wrong * counted, axis=1)  # (T, D)
            precision = hits / np.maximum(hits + misses, np.spacing(1))
            precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            padded = np.pad(precision, ((0, 0), (0, 1)))  # recalls that are not reached have none
            reached = [np.searchsorted(row, self.recalls, side='left') for row in hits / total]
            values.append(np.mean([row[at] for row, at in zip(padded, reached)]))
        return 100 * float(np.mean(values)) if values else float('nan')


def compare_detectors(sides: Sequence[Any], resamples: int, random_state: int = 0) -> Tuple[List[str], Difference]:
    """Names of two runs (with their seeds), and the difference of their AP.

    Args:
        sides: Of `moe_zoo.engine.difference.find_sides`.
        resamples: R.
        random_state: Of the draws.

    Raises:
        InputError: A side is no detector's run, keeps no detections, or saw other images.
    """
    for side in sides:
        if not isinstance(side, Run) or side.kind != 'detection':
            raise InputError(f"'{getattr(side, 'name', side)}' is no detector's run: two detectors are compared by AP.")
    check_resamples(resamples)
    first = _truth(sides[0].trainings[0])
    measured = []
    for side in sides:
        for training in side.trainings:
            _check_same(first, _truth(training), training)
        measured.append([WeightedAp(first, _detections(training)) for training in side.trainings])
    print(f'AP of {resamples:,} resamples', file=sys.stderr)
    return [side.name for side in sides], ap_difference(
        *measured, paired_seeds=sides[0].seeds == sides[1].seeds, resamples=resamples, random_state=random_state)


def ap_difference(
        ours: Sequence[WeightedAp],
        theirs: Sequence[WeightedAp],
        paired_seeds: bool,
        resamples: int,
        random_state: int = 0,
) -> Difference:
    """Bootstrap the difference of two AP on the same images; seeds as in `moe_zoo.engine.difference`.

    A resample without any object is drawn again.
    """
    images, random = len(ours[0].images), np.random.default_rng(random_state)
    has_objects = sum(objects for objects, *_ in ours[0].categories) > 0
    drawn: List[np.ndarray] = []
    while len(drawn) < resamples:
        weights = random.multinomial(images, np.full(images, 1 / images))
        if weights[has_objects].any():
            drawn.append(weights)
    first, second = (np.array([[ap(weights) for ap in side] for weights in drawn]) for side in (ours, theirs))
    low, high = interval(between(first, second, paired_seeds, random))
    whole = [tuple(ap(np.ones(images)) for ap in side) for side in (ours, theirs)]
    return Difference(*whole, float(np.mean(whole[0]) - np.mean(whole[1])), low, high, images, resamples,
                        random_state, paired_seeds)


def _truth(training: Training) -> COCO:
    """The annotations that a run was evaluated on last."""
    cfg = load_config(training.folder / 'config.yaml')
    if len(cfg.DATASETS.TEST) != 1:
        raise InputError(f"'{training.folder}' was evaluated on {len(cfg.DATASETS.TEST)} data sets: its detections are "
                         'those of the last one alone; evaluate it on one.')
    path = MetadataCatalog.get(cfg.DATASETS.TEST[0]).get('json_file', '')
    if not Path(path).is_file():
        raise InputError(f"'{training.folder}' was evaluated on '{path or cfg.DATASETS.TEST[0]}', which is not there.")
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(path)


def _check_same(first: COCO, other: COCO, training: Training) -> None:
    if first.imgs.keys() != other.imgs.keys() or any(
            each['file_name'] != other.imgs[number]['file_name'] for number, each in first.imgs.items()):
        raise InputError(f"'{training.folder}' was evaluated on other images than the first run.")


def _detections(training: Training) -> List[dict]:
    path = training.folder / DETECTIONS
    try:
        return parse_json(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise InputError(f"'{training.folder}' keeps no {DETECTIONS}: evaluate it by train-coco --eval-only.") from None
    except ValueError as error:
        raise InputError(f"'{path}' is damaged: {error}.") from error
