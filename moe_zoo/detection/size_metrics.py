"""COCO's AP, AP50 and AR by object size from what an evaluator gathered, and which objects were found.

Letters: T thresholds of overlap, R recalls, C categories, A area ranges, M limits of detections an image.
"""
import contextlib
import io
from typing import Any, Dict, List, Optional

import numpy as np
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from pycocotools.cocoeval import COCOeval

AREAS = ('', 's', 'm', 'l')  # all objects, small, medium, large: the order of COCO's area ranges
METRICS = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', 'AP50s', 'AP50m', 'AP50l', 'AR', 'ARs', 'ARm', 'ARl')


def detections(evaluator: COCOEvaluator) -> List[Dict[str, Any]]:
    """What an evaluator was given so far, in COCO's format and numbers of categories."""
    known = evaluator._metadata.get('thing_dataset_id_to_contiguous_id') or {}
    back = {contiguous: number for number, contiguous in known.items()}
    return [
        {**entry, 'category_id': back.get(entry['category_id'], entry['category_id'])}
        for prediction in evaluator._predictions for entry in prediction['instances']]


def size_metrics(coco: Any, found: List[Dict[str, Any]]) -> Dict[str, Optional[float]]:
    """`METRICS` in percent; None for one that cannot be measured: no such object, or no detection at all."""
    if not found:
        return dict.fromkeys(METRICS)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what we print better
        outcome = coco_evaluation.COCOeval_opt(coco, coco.loadRes([dict(entry) for entry in found]), 'bbox')
        outcome.evaluate()
        outcome.accumulate()
    precision = np.asarray(outcome.eval['precision'])[..., -1]  # (T, R, C, A), 100 detections an image
    recall = np.asarray(outcome.eval['recall'])[..., -1]  # (T, C, A)
    values = {'AP75': _mean(precision[5, :, :, 0])}
    for a, area in enumerate(AREAS):
        values[f'AP{area}'] = _mean(precision[:, :, :, a])
        values[f'AP50{area}'] = _mean(precision[0, :, :, a])
        values[f'AR{area}'] = _mean(recall[:, :, a])
    return {key: values[key] for key in METRICS}


def _mean(values: np.ndarray) -> Optional[float]:
    """Percent; -1 stands for a category without such objects."""
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else None


def found_objects(coco: Any, found: List[Dict[str, Any]], overlap: float = 0.5) -> Dict[int, float]:
    """Annotation id to the score of the detection that COCO matches with it, of its category and with this overlap.

    Of pycocotools itself: the fast code keeps no matches.
    """
    if not found:
        return {}
    with contextlib.redirect_stdout(io.StringIO()):
        outcome = COCOeval(coco, coco.loadRes([dict(entry) for entry in found]), 'bbox')
        outcome.params.iouThrs = np.array([overlap])
        outcome.params.areaRng, outcome.params.areaRngLbl = [[0, 1e10]], ['all']
        outcome.params.maxDets = [100]
        outcome.evaluate()
    matches = {}
    for image in filter(None, outcome.evalImgs):
        scores = dict(zip(image['dtIds'], image['dtScores']))
        for number, detection in zip(image['gtIds'], image['gtMatches'][0]):
            if detection:
                matches[number] = float(scores[int(detection)])
    return matches
