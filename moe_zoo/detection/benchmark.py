"""What `tools/benchmark.py` times of detectors: one image through each, and COCO's metrics by two libraries."""
import contextlib
import copy
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.layers import Conv2d
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from torch import nn

from ..analysis import count
from ..analysis.force import rewrite_routing
from ..analysis.model_cases import make_forward, memory_of, spread_evenly
from ..analysis.timing import Settings, comparison, finish
from ..errors import InputError
from ..layers import MoEStage, RoutedLayer
from .coco import register_coco
from .config import load_config
from .count_inputs import noise
from .evaluation import Evaluator
from .resnet_backbone import convs

CATEGORIES, OBJECTS, DETECTIONS = 80, 7, 100  # COCO's: categories, and of each image


def benchmark_detectors(
        configs: list[str],
        opts: list[str],
        mode: str,
        settings: Settings,
        size: tuple[int, int] | None = None,
        equal_macs: bool = False,
) -> list[dict]:
    """Time one image through detectors, each beside the first; their MACs and memory.

    Args:
        configs: Files.
        opts: Keys and values to change in all of them.
        mode: 'forward', or 'train': losses and backward of an image with 7 objects.
        settings: How it is timed.
        size: Of the image; None for the test size of the config.
        equal_macs: Time one config, after its dense twin of equal MACs.

    Returns:
        One row for each config; with `equal_macs` the first is that of the dense twin.

    Raises:
        InputError: A config cannot be used, or with `equal_macs` there are several, or it has no twin.
    """
    warnings.filterwarnings('ignore', category=FutureWarning)  # detectron2's own affair, as the next
    warnings.filterwarnings('ignore', message='torch.meshgrid')
    names = list(configs)
    built = [build_detector(name, opts, settings.device, size) for name in names]
    if equal_macs:
        if len(names) > 1:
            raise InputError(f'--equal-macs compares one config with its dense twin, and there are {len(names)}.')
        names = [f'{names[0]}, dense and wider', *names]
        built.insert(0, (build_twin(configs[0], opts, settings.device, size), built[0][1]))
    costs = [count(model, inputs) for model, inputs in built]
    runs = [make_run(model, inputs, mode) for model, inputs in built]
    with contextlib.ExitStack() as spread:
        for model, _ in built:
            if any(isinstance(module, RoutedLayer) for module in model.modules()):
                spread.enter_context(rewrite_routing(model, spread_evenly))
        timings = settings.alternate(runs)
        memory = [memory_of(model, run, settings.device) for (model, _), run in zip(built, runs)]
    return [
        {'kind': 'detector', 'config': config, 'first': number == 0, 'opts': opts, 'equal_macs': equal_macs,
         'input_size': list(inputs[0]['image'].shape), 'parameters': cost.parameters, 'macs': cost.macs_max,
         'macs_ratio': cost.macs_max / costs[0].macs_max}
        | comparison(names[0], mode, seconds, timings.seconds[0], timings.loads, (held, memory[0]))
        for number, (config, (_, inputs), cost, held, seconds) in enumerate(
            zip(names, built, costs, memory, timings.seconds))]


def make_run(model: nn.Module, inputs: list[dict[str, Any]], mode: str) -> Callable[[], None]:
    """One forward, or one training step without the optimiser, of one image, as a function."""
    if mode == 'forward':
        return make_forward(model, (inputs,))
    model.train()
    inputs = [{**image, 'instances': _objects(*image['image'].shape[1:])} for image in inputs]

    def step() -> None:
        model.zero_grad()
        with EventStorage():  # detectron2's heads write into one
            sum(model(copy.copy(inputs)).values()).backward()
        finish(inputs)

    return step


def _objects(height: int, width: int) -> Instances:
    """As many as an image of COCO has, in a row, of the first category, each a box and its mask."""
    left = torch.arange(OBJECTS) * (width // OBJECTS)
    top = torch.full_like(left, height // 4)
    boxes = torch.stack([left, top, left + width // OBJECTS, top + height // 2], dim=1)
    masks = torch.zeros(OBJECTS, height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.tolist()):
        mask[y0:y1, x0:x1] = True
    classes = torch.zeros(OBJECTS, dtype=torch.int64)
    return Instances((height, width), gt_boxes=Boxes(boxes.float()), gt_classes=classes, gt_masks=BitMasks(masks))


def benchmark_coco(images: int, settings: Settings) -> list[dict]:
    """Time COCO's metrics on generated objects, through detectron2's evaluator.

    Raises:
        InputError: The metrics differ, or there is no image.
    """
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = runs = coco_runs(images, Path(folder))
        difference = largest_difference(ours(), theirs())
        if difference > 1e-9:
            raise InputError(f'faster-coco-eval and pycocotools differ by {difference:g} %: their times say nothing.')
        timings = settings._replace(min_seconds=0).alternate(runs)
    row = {'kind': 'coco-eval', 'case': 'coco-eval', 'about': f'{images} images', 'layer': 'faster-coco-eval',
           'difference': difference}
    return [row | comparison('pycocotools', 'evaluate', *timings.seconds, timings.loads)]


def build_detector(
        config: str,
        opts: list[str],
        device: str,
        size: tuple[int, int] | None,
) -> tuple[nn.Module, list[dict[str, Any]]]:
    """The detector of a config with random weights, which cost what trained ones do, and one image of noise for it.

    Raises:
        InputError: The config cannot be used.
    """
    cfg = load_config(config, opts)
    cfg.MODEL.DEVICE = device
    cfg.MODEL.WEIGHTS = ''
    cfg.MOE.TIMM.PRETRAINED = False
    with _quiet('moe_zoo.detection'):  # of frozen BatchNorm under random weights
        return build_model(cfg).eval(), noise(cfg, size)


@contextlib.contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Loggers that tell of errors only, for a while."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def build_twin(
        config: str,
        opts: list[str],
        device: str,
        size: tuple[int, int] | None,
) -> nn.Module:
    """The dense twin of a detector whose ResNet has stages of experts: those stages plain, and as wide as K experts.

    Raises:
        InputError: There is no such stage.
    """
    model, _ = build_detector(config, opts, device, size)
    routed = {name: stage for name, stage in model.backbone.named_modules() if isinstance(stage, MoEStage)}
    if not routed or load_config(config, opts).MODEL.BACKBONE.NAME != 'build_moe_resnet_fpn_backbone':
        raise InputError(f"--equal-macs widens stages of detectron2's ResNet that stand for experts, and '{config}' "
                         'has none: leave it out.')
    twin, _ = build_detector(config, [*opts, 'MOE.RESNET.STAGES', '[]'], device, size)
    for name, stage in routed.items():
        widen(twin.backbone.get_submodule(name), stage.num_selected)
    return twin.to(device).eval()


def widen(stage: nn.Sequential, times: int) -> None:
    """Let the blocks of a stage of detectron2's ResNet be as wide inside as makes its MACs at least so many times more.

    What enters and leaves the stage keeps its channels.
    """
    x = torch.zeros(1, stage[0].in_channels, 16, 16, device=stage[0].conv1.weight.device)
    enough = times * count(stage, x).macs_max
    width = stage[0].conv1.out_channels
    low, high = width, 2 * times * width  # more than so many times, because the shortcut stays as it is
    while low < high:
        width = (low + high) // 2
        _set_width(stage, width)
        if count(stage, x).macs_max < enough:
            low = width + 1
        else:
            high = width
    _set_width(stage, high)


def _set_width(stage: nn.Sequential, width: int) -> None:
    for block in stage:
        names = convs(block)
        for name in names:
            conv = getattr(block, name)
            setattr(block, name, Conv2d(
                conv.in_channels if name == names[0] else width,
                conv.out_channels if name == names[-1] else width,
                conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.bias is not None,
                norm=conv.norm if name == names[-1] else type(conv.norm)(width), activation=conv.activation
            ).to(conv.weight))


def coco_runs(images: int, folder: Path, seed: int = 0) -> tuple[Callable[[], dict], Callable[[], dict]]:
    """detectron2's evaluator on generated objects and detections: by faster-coco-eval, and by pycocotools.

    Args:
        images: Number of images, each with 7 objects on average and 100 detections of 80 categories.
        folder: Receives the objects as COCO JSON.
        seed: Of both.

    Returns:
        Functions without arguments that measure everything and return the metrics of boxes.

    Raises:
        InputError: Fewer than one image.
    """
    if images < 1:
        raise InputError(f'--images {images}: at least one image is needed.')
    truth, found = _generate(np.random.default_rng(seed), images)
    file = folder / 'generated.json'
    file.write_text(json.dumps(truth))
    name = f'generated in {folder}'
    register_coco(name, str(file), str(folder))
    with _quiet('detectron2'):
        DatasetCatalog.get(name)

    def measure(fast: bool) -> dict:
        with _quiet('detectron2', 'moe_zoo'), contextlib.redirect_stdout(io.StringIO()):
            evaluator = Evaluator(name, tasks=('bbox',), distributed=False, use_fast_impl=fast)
            evaluator.reset()
            evaluator._predictions = [{'image_id': image, 'instances': rows} for image, rows in found.items()]
            return evaluator.evaluate()['bbox']

    return lambda: measure(True), lambda: measure(False)


def _generate(rng: np.random.Generator, images: int) -> tuple[dict, dict[int, list[dict]]]:
    """COCO JSON, and detections by image: two of three near an object of their class, scores tied in hundredths.

    Category ids start from 0, so that detectron2's change of ids to those of the JSON, made in place, changes nothing.
    """
    annotations, found = [], {}
    for image in range(1, images + 1):
        count = 1 + rng.poisson(OBJECTS - 1)
        sides = np.exp(rng.uniform(np.log(8), np.log(300), (count, 2)))
        boxes = np.concatenate([rng.uniform(0, 1, (count, 2)) * (640 - sides), sides], axis=1)
        classes = rng.integers(CATEGORIES, size=count)
        for box, category in zip(boxes, classes):
            annotations.append({
                'id': len(annotations) + 1, 'image_id': image, 'category_id': int(category), 'bbox': box.tolist(),
                'area': float(box[2] * box[3]), 'iscrowd': int(rng.uniform() < 0.01)})
        which = rng.integers(count, size=DETECTIONS)
        near = boxes[which] * np.exp(rng.normal(scale=0.1, size=(DETECTIONS, 4)))
        right = rng.uniform(size=DETECTIONS) < 0.67
        labels = np.where(right, classes[which], rng.integers(CATEGORIES, size=DETECTIONS))
        scores = rng.uniform(size=DETECTIONS).round(2)
        found[image] = [{'image_id': image, 'category_id': int(label), 'bbox': box.tolist(), 'score': float(score)}
                        for label, box, score in zip(labels, near, scores)]
    return {
        'images': [{'id': i, 'file_name': f'{i}.png', 'height': 640, 'width': 640} for i in found],
        'categories': [{'id': i, 'name': f'category {i}'} for i in range(CATEGORIES)],
        'annotations': annotations}, found


def largest_difference(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Of two sets of metrics; NaN in both is no difference.

    Raises:
        InputError: Only one of them could measure something.
    """
    pairs = [(ours[key], theirs[key]) for key in theirs]
    if any(np.isnan(a) != np.isnan(b) for a, b in pairs):
        raise InputError('The two libraries do not measure the same metrics.')
    return max(abs(a - b) for a, b in pairs if not np.isnan(a))
