"""A trained detector as one TorchScript file, which runs on torch and torchvision alone.

    import torch, torchvision  # the latter has the operators nms and roi_align
    boxes, classes, scores = torch.jit.load('model.ts')(image)
"""
import json
import warnings
from typing import Any, Dict, List, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.export import TracingAdapter
from torch import nn

from ..errors import InputError, atomic_write, counted
from .count_inputs import load_weights, noise

NAMES = {'boxes': 'pred_boxes', 'classes': 'pred_classes', 'scores': 'scores', 'masks': 'pred_masks'}


def export(cfg: CfgNode, file: str) -> str:
    """Write the detector of MODEL.WEIGHTS as TorchScript, after comparing its outputs with those of the detector.

    The file takes one image, (3, H, W) float32 of 0 to 255 with the colours in the order of INPUT.FORMAT, resized as
    INPUT says for testing, and returns boxes (N, 4) in its pixels, classes (N,), scores (N,) and, of a model of masks,
    masks (N, H, W). What it is stands in it as the extra file `moe_zoo.json`.

    Args:
        cfg: A config; its weights must be complete.
        file: Receives the model.

    Returns:
        What was written, in a sentence.

    Raises:
        InputError: Weights are missing or do not fit, or the traced detector does not give the detector's outputs.
    """
    model, about = load_weights(cfg)
    first, other = noise(cfg, seed=0), noise(cfg, seed=1)
    turned = noise(cfg, tuple(first[0]['image'].shape[:0:-1]), seed=2)  # W x H
    thresholds = [m for m in model.modules() if hasattr(m, 'test_score_thresh')]
    given = [m.test_score_thresh for m in thresholds]
    for module in thresholds:  # noise has no objects: compare what would be thrown away
        module.test_score_thresh = 0.
    traced = _trace(model, first)
    boxes = _compare(model, traced, other)
    try:
        boxes += _compare(model, traced, turned)
        size = 'of any size'
    except InputError:
        size = 'of {} x {} pixels'.format(*first[0]['image'].shape[1:])
    for module, threshold in zip(thresholds, given):
        module.test_score_thresh = threshold
    traced = _trace(model, first)
    outputs = _names(model, first)
    about.update(input=f'one image {size}, (3, height, width) float32 in 0..255, {cfg.INPUT.FORMAT}', outputs=outputs)
    with atomic_write(file) as part:
        torch.jit.save(traced, str(part), _extra_files={'moe_zoo.json': json.dumps(about)})
    return (f"'{file}' is TorchScript for torch and torchvision: it takes {about['input']}, and returns "
            f"{', '.join(outputs)}; equal to the detector's on {counted(boxes, 'detection')} in images of noise.")


def load_exported(file: str) -> Tuple[nn.Module, Dict[str, Any]]:
    """An exported detector, and what it says of itself."""
    extra = {'moe_zoo.json': ''}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model = torch.jit.load(file, _extra_files=extra)
    return model, json.loads(extra['moe_zoo.json'])


def _detect(model: nn.Module, inputs: List[Dict[str, Any]]) -> Tuple[torch.Tensor, ...]:
    found = model(inputs)[0]['instances']
    tensors = [found.get(field) for field in NAMES.values() if found.has(field)]
    return tuple(value if isinstance(value, torch.Tensor) else value.tensor for value in tensors)


@torch.no_grad()
def _names(model: nn.Module, inputs: List[Dict[str, Any]]) -> List[str]:
    found = model(inputs)[0]['instances']
    return [name for name, field in NAMES.items() if found.has(field)]


@torch.no_grad()
def _trace(model: nn.Module, inputs: List[Dict[str, Any]]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of tracing: the comparison says what matters
        adapter = TracingAdapter(model, [{'image': inputs[0]['image']}], inference_func=_detect)
        try:
            return torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        except (RuntimeError, ValueError, TypeError) as error:
            raise InputError('This detector cannot be exported: tracing fails with '
                             f'{" ".join(str(error).split())[:200]}.') from error


@torch.no_grad()
def _compare(model: nn.Module, traced: nn.Module, inputs: List[Dict[str, Any]]) -> int:
    """Number of detections in an image that the traced model gives as the model does.

    Raises:
        InputError: One differs.
    """
    wanted = _detect(model, [{'image': inputs[0]['image']}])
    try:
        same = _same(traced(inputs[0]['image']), wanted)
    except RuntimeError:  # an operator met a size that tracing wrote down
        same = False
    if not same:
        raise InputError('This detector cannot be exported: traced, it gives other detections on an image that it was '
                         'not traced with.')
    return len(wanted[0])


def _same(found: Tuple[torch.Tensor, ...], wanted: Tuple[torch.Tensor, ...]) -> bool:
    """Whether both are the same detections, whatever the order of those with equal scores: sorting leaves it open."""
    if any(a.shape != b.shape for a, b in zip(found, wanted)) or not _close(found[2], wanted[2]).all():
        return False
    if not len(wanted[0]):
        return True
    pairs = torch.stack([
        _close(a.flatten(1).unsqueeze(1), b.flatten(1)).all(dim=2)
        for a, b in ((a.unsqueeze(1), b.unsqueeze(1)) for a, b in zip(found[:3], wanted))]).all(dim=0)  # (N, N)
    if not (pairs.any(dim=0) & pairs.any(dim=1)).all():
        return False
    order = pairs.int().argmax(dim=1)
    return all(bool(_close(a, b[order]).all()) for a, b in zip(found[3:], wanted[3:]))


def _close(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.isclose(a.float(), b.float(), rtol=1e-4, atol=1e-4)
