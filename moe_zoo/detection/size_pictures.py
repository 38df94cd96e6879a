"""Scenes whose boxes have the colour of the expert that leads them."""
import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from ..analysis.figures import COLOURS
from ..analysis.object_gates import SIZES, Objects, size_classes
from ..analysis.object_sizes import LayerSizes, SizeCollector
from ..analysis.usage import evaluation_mode
from .images import read_image

CONFIDENT = 0.5  # score from which a detection is drawn; where none has it, the best ones up to as many as objects
SIDE = 480  # pixels of the longer side of a picture, at least
GREY = '#7b8794'  # of what no expert leads


def draw_scenes(scenes, model: nn.Module, layer: LayerSizes, count: int) -> list[tuple[str, bytes, str]]:
    """Pictures of some images of a test set: by turns those in which small, medium and large objects prevail, and of
    these the ones with most sizes and objects.

    Args:
        scenes: A `moe_zoo.detection.object_sizes.Scenes`.
        model: The detector.
        layer: The routed layer whose experts colour the boxes.
        count: How many pictures.

    Returns:
        (file name, bytes of a JPEG, what it shows in words) of each.
    """
    if count < 1:
        return []
    dataset = scenes.loader.loader.dataset
    ranked = []  # (turn, prevailing size, number of the image)
    found = [_sizes(scenes, number) for number in sorted(scenes.coco.imgs)]  # as detectron2 orders them
    for size in range(len(SIZES)):
        of_size = [i for i, each in enumerate(found) if each.any() and each.argmax() == size]
        best = sorted(of_size, key=lambda i: (-(found[i] > 0).sum(), -min(found[i].sum(), 9), i))[:count]
        ranked += [(turn, size, i) for turn, i in enumerate(best)]
    with evaluation_mode(model):
        return [_picture(scenes, model, layer.name, dataset[i], i) for *_, i in sorted(ranked)[:count]]


def _sizes(scenes, image_id: int) -> np.ndarray:
    """(S,) number of objects of each size class."""
    areas = [a['area'] for a in scenes.entries({'image_id': image_id})]
    return np.bincount(size_classes(areas), minlength=len(SIZES))


@torch.no_grad()
def _picture(scenes, model: nn.Module, layer: str, image: dict[str, Any], index: int) -> tuple[str, bytes, str]:
    instances = model([image])[0]['instances'].to('cpu')
    instances = instances[instances.scores.argsort(descending=True)]
    objects = scenes.objects(image)
    confident = int((instances.scores > CONFIDENT).sum()) or min(len(instances), len(objects.areas))
    boxes = instances.pred_boxes.tensor[:confident].double().numpy()
    gates = _gates(scenes, model, layer, image, boxes)
    canvas = Image.fromarray(read_image(image['file_name'], format='RGB'))
    scale = max(1, -(-SIDE // max(canvas.size)))
    canvas = canvas.resize([side * scale for side in canvas.size])
    pen = ImageDraw.Draw(canvas)
    missed = _missed(objects.boxes * np.tile([image['width'], image['height']], 2), boxes)
    for box in missed:
        _dashed(pen, (box * scale).tolist())
    leaders = [int(gate.argmax()) if gate.sum() > 1e-9 else -1 for gate in gates]
    for box, gate, leader in zip((boxes * scale).tolist(), gates, leaders):
        _labelled(pen, box, leader, f'{leader}: {100 * gate[leader]:.0f} %' if leader >= 0 else 'no one')
    file = io.BytesIO()
    canvas.save(file, 'JPEG', quality=88)
    return f'scene_{index:04d}.jpg', file.getvalue(), _words(objects, leaders, len(missed))


def _gates(scenes, model: nn.Module, layer: str, image: dict[str, Any], boxes: np.ndarray) -> np.ndarray:
    """(n, E) gate vectors of detected boxes, by the rule that objects have theirs."""
    shares = boxes / np.tile([image['width'], image['height']], 2)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    detected = Objects(shares, areas, scenes.levels(shares, image))
    with SizeCollector(model, shuffles=0) as collector, collector.batch([detected]):
        model([image])
    return collector.gates(layer)


def _missed(objects: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """The objects that no box overlaps by a half."""
    low = np.maximum(objects[:, None, :2], boxes[None, :, :2])
    high = np.minimum(objects[:, None, 2:], boxes[None, :, 2:])
    common = np.clip(high - low, 0, None).prod(axis=2)
    areas = [(b[:, 2:] - b[:, :2]).prod(axis=1) for b in (objects, boxes)]
    overlap = common / np.maximum(areas[0][:, None] + areas[1][None] - common, 1e-12)
    return objects[overlap.max(axis=1, initial=0.) < 0.5]


def _labelled(pen: ImageDraw.ImageDraw, box: list[float], expert: int, text: str) -> None:
    colour, font = COLOURS[expert % len(COLOURS)] if expert >= 0 else GREY, ImageFont.load_default(12)
    x0, y0, x1, y1 = box
    pen.rectangle((x0, y0, x1, y1), outline=colour, width=3)
    width = pen.textlength(text, font=font) + 6
    top = y0 - 15 if y0 >= 15 else y0
    pen.rectangle((x0, top, x0 + width, top + 15), fill=colour)
    pen.text((x0 + 3, top + 1), text, fill='white', font=font)


def _dashed(pen: ImageDraw.ImageDraw, box: list[float], dash: int = 6) -> None:
    x0, y0, x1, y1 = box
    for start in np.arange(x0, x1, 2 * dash):
        for y in (y0, y1):
            pen.line((start, y, min(start + dash, x1), y), fill='white', width=2)
    for start in np.arange(y0, y1, 2 * dash):
        for x in (x0, x1):
            pen.line((x, start, x, min(start + dash, y1)), fill='white', width=2)


def _words(objects: Objects, leaders: list[int], missed: int) -> str:
    """`2 small and 1 large object; detections led by expert 0: 2, by expert 3: 1; 0 missed.`"""
    sizes = [f'{n} {size}' for n, size in zip(np.bincount(objects.sizes, minlength=3), SIZES) if n]
    led = ', '.join(f'{leaders.count(e)} by {f"expert {e}" if e >= 0 else "no one"}' for e in sorted(set(leaders)))
    return f'Objects: {", ".join(sizes) or "none"}. Detections led: {led or "none"}. Missed: {missed}.'
