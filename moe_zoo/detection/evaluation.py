"""COCO metrics of a detector: pycocotools' twelve numbers by faster-coco-eval, and AP by category and object size.

Letters: C categories.
"""
import logging
import math
import os
from typing import Any, Dict, Optional, Sequence

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.data.samplers import InferenceSampler
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.utils import comm
from tabulate import tabulate

from ..errors import InputError
from ..faults import interruptible
from .coco import ReadableMapper, load_datasets, unreadable_images

_LOGGER = logging.getLogger(__name__)
RECALLS = ('AR1', 'AR10', 'AR100', 'ARs', 'ARm', 'ARl')
SIZES = ('', 's', 'm', 'l')  # all objects, small, medium, large: the order of COCO's area ranges


def use_fast_metrics() -> None:
    """Let detectron2's evaluators compute by faster-coco-eval, which gives pycocotools' numbers in less time.

    Called when `moe_zoo.detection` is imported. detectron2's own fast code needs compiling and knows no masks better.
    """
    try:
        from faster_coco_eval import COCOeval_faster
    except ImportError:
        _LOGGER.warning('faster-coco-eval is not installed: COCO metrics come from pycocotools, several times slower.')
        return
    coco_evaluation.COCOeval_opt = COCOeval_faster


class Evaluator(COCOEvaluator):
    """detectron2's evaluator, with all twelve numbers of COCO and AP of every category by object size.

    Keys beside detectron2's: `AR1`, `AR10`, `AR100`, `ARs`, `ARm`, `ARl`, and `APs-<category>`, `APm-<category>`,
    `APl-<category>` beside `AP-<category>`, all in percent; NaN where there is nothing to measure.
    """

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, class_names: Optional[Sequence[str]] = None):
        if iou_type == 'keypoints' or coco_eval is None:
            return super()._derive_coco_results(coco_eval, iou_type, class_names)
        results = super()._derive_coco_results(coco_eval, iou_type)  # without categories: ours say more
        results.update((key, _percent(value)) for key, value in zip(RECALLS, coco_eval.stats[6:]))
        if class_names is None or len(class_names) <= 1:
            return results
        table = category_table(coco_eval)
        for name, row in zip(class_names, table):
            results.update((f'AP{size}-{name}', value) for size, value in zip(SIZES, row))
        _LOGGER.info('%s AP in %% by category and object size:\n%s', iou_type, _as_text(
            class_names, table, self._counts(iou_type)))
        return results

    def evaluate(self, img_ids: Optional[Sequence[int]] = None) -> Dict[str, Any]:
        """As detectron2's.

        Raises:
            InputError: No image was read; detectron2 would go on with no metrics at all.
        """
        found = super().evaluate(img_ids)
        if not found and comm.is_main_process():
            raise InputError(f"No image of the test set '{self._metadata.name}' can be read; the log names them.")
        return found

    def _counts(self, iou_type: str) -> Dict[int, np.ndarray]:
        """Objects of each category (by position), all and by size; crowds are none."""
        position = {category: i for i, category in enumerate(sorted(self._coco_api.getCatIds()))}
        counts = np.zeros((len(position), len(SIZES)), dtype=int)
        limits = [(0, 1e10), (0, 32 ** 2), (32 ** 2, 96 ** 2), (96 ** 2, 1e10)]  # COCO's, both ends inside
        for entry in self._coco_api.anns.values():
            if not entry.get('iscrowd', 0):
                counts[position[entry['category_id']]] += [low <= entry['area'] <= high for low, high in limits]
        return counts


def category_table(coco_eval: Any) -> np.ndarray:
    """(C, 4) AP in percent over all, small, medium and large objects; NaN where a category has none of a size."""
    precision = coco_eval.eval['precision'][..., -1]  # thresholds, recalls, categories, sizes; 100 detections an image
    values = np.where(precision > -1, precision, np.nan).reshape(-1, *precision.shape[2:])
    counted = np.isfinite(values).sum(axis=0)
    return np.where(counted > 0, 100 * np.nansum(values, axis=0) / np.maximum(counted, 1), np.nan)


def _as_text(names: Sequence[str], table: np.ndarray, counts: np.ndarray) -> str:
    rows = []
    for name, values, objects in zip(names, table, counts):
        rows.append([name, *(f'{v:.1f} ({n})' if math.isfinite(v) else '-' for v, n in zip(values, objects))])
    heads = ['category', 'AP (objects)', 'small', 'medium', 'large']
    return tabulate(rows, headers=heads, tablefmt='pipe', colalign=('left', *['right'] * 4))


def _percent(value: float) -> float:
    return 100 * float(value) if value > -1 else math.nan


def build_evaluator(cfg: CfgNode, name: str) -> Evaluator:
    """The evaluator of a COCO data set: boxes, and masks where the model has them.

    Raises:
        InputError: Annotations lack the area, which decides what is small.
    """
    tasks = ('bbox', 'segm') if cfg.MODEL.MASK_ON else ('bbox',)
    evaluator = Evaluator(name, tasks=tasks, output_dir=os.path.join(cfg.OUTPUT_DIR, 'inference'))
    if any('area' not in annotation for annotation in evaluator._coco_api.anns.values()):
        raise InputError(f"'{evaluator._metadata.json_file}' has annotations without area, which COCO's metrics "
                         'for small, medium and large objects need.')
    return evaluator


def build_test_loader(cfg: CfgNode, name: str) -> 'NonEmpty':
    """Batches of one image of a data set, this rank's share; unreadable images are left out.

    Raises:
        InputError: As `load_datasets`.
    """
    dataset = load_datasets(cfg, [name], filter_empty=False)
    return NonEmpty(build_detection_test_loader(
        dataset,
        mapper=ReadableMapper(cfg, False, unreadable_images(cfg)),
        sampler=InferenceSampler(len(dataset)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=_readable,
    ), checks=len(dataset) // comm.get_world_size())


class NonEmpty:
    """A loader without the batches that hold no readable image; between two, a training may be asked to leave.

    Args:
        loader: Of one rank.
        checks: Batches that all ranks have.
    """

    def __init__(self, loader, checks: Optional[int] = None):
        self.loader, self.checks = loader, checks

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        return (batch for batch in interruptible(self.loader, self.checks) if batch)


def _readable(batch):
    return [image for image in batch if image]
