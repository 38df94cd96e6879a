"""`tools/count_flops.py`: what models cost, as a table and as JSON.

A named model is counted on meta tensors: no memory, no weights, what the architecture can cost at most. What a routed
model executes depends on its weights and on the images, so that needs `--images`, and `--weights` for a trained router.
"""
import argparse
import dataclasses
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table
from timm.data import create_transform, resolve_model_data_config
from torch import nn

import moe_zoo
from moe_zoo.engine.checkpoint import check_fits, find_weights, read_checkpoint
from moe_zoo.errors import InputError, atomic_write, counted, exit_on_input_error, nearest, nearest_keyword

from ..layers.routed import RoutedLayer
from .cost import Cost, ImageCosts, count, count_images

IMAGE_SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp'}

EXAMPLES = """
examples:
  %(prog)s condconv_resnet50 resnet50                     a routed model beside its dense twin
  %(prog)s vmoe_vit_s --model-kwargs num_experts=16      with other keywords of the model
  %(prog)s vit_small_patch16_224 --img-size 640           any timm model, at any size that it takes
  %(prog)s vmoe_vit_s --images photos --weights best.pth.tar        what it executes on these images
  %(prog)s --config-file configs/coco/retinanet_condconv_r50_fpn_1x.yaml --img-size 800x1216

One unit: a multiply-accumulate is one MAC (twice that are FLOPs). Matrix products and convolutions count, attention
included; normalisation, pooling, activations and moving data do not. "At most" is the router plus the chosen number of
experts for every token or image, without padding; "executed" is what ran on the images. Operators that are neither
counted nor known to be free are named.
"""


@dataclasses.dataclass(frozen=True)
class Result:
    """One row: a model, its cost on a blank input of `input_size` (C, H, W), and on images where they were given.

    `open_ended`: what is executed depends on weights and images, so that the blank input says nothing of it.
    """
    name: str
    input_size: tuple[int, ...]
    open_ended: bool
    cost: Cost
    images: ImageCosts | None = None
    counted: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


@exit_on_input_error
def main(argv: list[str] | None = None) -> int:
    """Count what the command line names and print it; returns the exit code."""
    args = _parser().parse_args(argv)
    if not args.names and not args.config_file:
        raise InputError('Give the names of models, or --config-file with the config of a detector.')
    if args.weights and not args.images:
        raise InputError('--weights matters only for what is executed on images: give --images too.')
    results = [_count_detector(args)] if args.config_file else [_count_named(name, args) for name in args.names]
    depth = args.depth if args.depth is not None else int(len(results) == 1)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(cost_table(results))
    for line in remarks(results):
        console.print(line, highlight=False, markup=False)
    for result in results if depth else ():
        console.print(module_table(result, depth))
    if args.json:
        report = {'unit': 'MACs', 'moe_zoo': moe_zoo.__version__, 'timm': timm.__version__, 'torch': torch.__version__}
        report['models'] = [_as_json(result) for result in results]
        with atomic_write(args.json) as path:
            path.write_text(json.dumps(report, indent=1) + '\n', encoding='utf-8')
        console.print(f'wrote {args.json}', highlight=False, markup=False)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Parameters and MACs of models: at most, and as executed on images.',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add('names', nargs='*', metavar='NAME', help='models of timm or moe_zoo; with --config-file: KEY VALUE overrides')
    add('--config-file', metavar='F', help='a detectron2 config: counts the whole detector')
    add('--images', metavar='DIR', help='count what is executed on every image below DIR: mean, spread, extremes')
    add('--max-images', type=int, metavar='N', help='only the first N of them, by path')
    add('--weights', metavar='W', help='checkpoint to execute with: what a router chooses depends on its weights')
    add('--img-size', metavar='HxW', help="size, or one side of a square (default: the model's own; for a detector the "
        'smallest test size of its config by 1.5 times that, and images are always resized as the config says)')
    add('--model-kwargs', nargs='*', default=[], metavar='K=V', help='keywords of the model, e.g. num_experts=4')
    add('--depth', type=int, metavar='D', help='levels of modules to list (default: 1 for a single model, else 0)')
    add('--json', metavar='OUT', help='write everything that was counted to this file')
    return parser


def count_model(name: str, img_size: tuple[int, int] | None = None, **kwargs: Any) -> Cost:
    """Cost of a registered model on one image, counted on meta tensors (no weights, no memory).

    Args:
        name: A model of timm or moe_zoo.
        img_size: (height, width); the model's own by default.
        kwargs: Keywords of the model.

    Raises:
        InputError: No such model or keyword, or a size that the model does not take.
    """
    model = build_model(name, 'meta', img_size, **kwargs)
    return _count_once(name, model, torch.empty(1, *_input_size(model, img_size), device='meta'))


def build_model(name: str, device: str, img_size: tuple[int, int] | None = None, **kwargs: Any) -> nn.Module:
    """`timm.create_model` without weights, at `img_size`, with one clear sentence where that cannot be.

    Raises:
        InputError: No such model or keyword, or a size that the model does not take.
    """
    if not name.startswith(('hf-hub:', 'local-dir:')) and not timm.is_model(name):
        raise InputError(f'timm and moe_zoo have no model {name!r}.{nearest(name, timm.list_models())}')
    try:
        model = timm.create_model(name, device=device, **kwargs)
        if img_size and hasattr(model, 'set_input_size'):
            model.set_input_size(img_size=img_size)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        asked = ', '.join([*(f'{k}={v!r}' for k, v in kwargs.items()), *([f'img_size={img_size}'] if img_size else [])])
        reason = _first_line(error) + nearest_keyword(error, partial(timm.create_model, name, device='meta'))
        raise InputError(f'{name} cannot be built with {asked or "its defaults"}: {reason}') from error
    return model


def _count_named(name: str, args: argparse.Namespace) -> Result:
    kwargs, img_size = _keywords(args.model_kwargs), parse_size(args.img_size)
    model = build_model(name, 'meta', img_size, **kwargs)
    size = _input_size(model, img_size)
    cost = _count_once(name, model, torch.empty(1, *size, device='meta'))
    result = Result(name, size, depends_on_input(model, cost), cost)
    if not args.images:
        return result
    model = build_model(name, 'cpu', img_size, **kwargs)
    if args.weights:
        weights = find_weights(read_checkpoint(args.weights), args.weights)
        check_fits(model, weights, args.weights, name)
        model.load_state_dict(weights)
    transform = create_transform(**resolve_model_data_config(model, {'input_size': size}), is_training=False)

    def read(path: Path) -> torch.Tensor:
        with Image.open(path) as image:
            return transform(image.convert('RGB' if size[0] == 3 else 'L')).unsqueeze(0)

    return _on_images(result, model, read, args)


def _count_detector(args: argparse.Namespace) -> Result:
    for message in ('.*torch.jit.script. is deprecated', 'torch.meshgrid'):  # detectron2's own affair
        warnings.filterwarnings('ignore', message)
    from moe_zoo.detection import count_inputs as detection  # an extra: imported where it is asked for

    cfg, model = detection.load(args.config_file, args.names, args.weights)
    inputs = detection.noise(cfg, parse_size(args.img_size))
    name = Path(args.config_file).stem
    cost = _count_once(name, model, inputs)
    result = Result(name, tuple(inputs[0]['image'].shape), depends_on_input(model, cost), cost)
    return _on_images(result, model, lambda path: detection.read(cfg, path), args) if args.images else result


def _on_images(result: Result, model: nn.Module, read: Callable[[Path], Any], args: argparse.Namespace) -> Result:
    """Add what is executed on every readable image below `args.images`, one at a time."""
    folder = Path(args.images)
    if not folder.is_dir():
        raise InputError(f"--images: '{folder}' is not a folder.")
    paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in IMAGE_SUFFIXES)[:args.max_images]
    counted, skipped = [], []

    def inputs():
        for path in paths:
            try:
                x = read(path)
            except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for broken files
                skipped.append(str(path))
                print(f'skipped {path}: {_first_line(error)}', file=sys.stderr)
                continue
            counted.append(str(path))
            yield x

    costs = count_images(model, inputs())
    if not counted:
        kinds = ', '.join(sorted(IMAGE_SUFFIXES))
        found = f'{len(skipped)} unreadable; looked for {kinds}'
        raise InputError(f"--images: '{folder}' holds no readable image ({found}).")
    return dataclasses.replace(result, images=costs, counted=tuple(counted), skipped=tuple(skipped))


def _count_once(name: str, model: nn.Module, inputs: Any) -> Cost:
    try:
        return count(model, inputs)
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        shape = tuple(inputs.shape) if isinstance(inputs, torch.Tensor) else 'its input'
        raise InputError(f'{name} cannot be run on {shape}: {_first_line(error)}') from error


def depends_on_input(model: nn.Module, cost: Cost) -> bool:
    """Can what is executed differ from what was counted? Where experts are chosen, or the counted path pads."""
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    return any(layer.num_selected < layer.num_experts for layer in layers) or cost.macs_executed != cost.macs_max


def _input_size(model: nn.Module, img_size: tuple[int, int] | None) -> tuple[int, ...]:
    channels, *own = resolve_model_data_config(model)['input_size']
    return (channels, *(img_size or own))


def parse_size(text: str | None) -> tuple[int, int] | None:
    """'640' or '800x1216' -> (height, width)."""
    if text is None:
        return None
    sides = text.split('x')
    if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
        raise InputError(f'--img-size {text!r} is neither one side, as 224, nor height x width, as 800x1216.')
    return (int(sides[0]), int(sides[-1]))


def _keywords(pairs: list[str]) -> dict[str, Any]:
    """['num_experts=4', 'route_fn=softmax'] -> {'num_experts': 4, 'route_fn': 'softmax'}."""
    keywords = {}
    for pair in pairs:
        key, equals, value = pair.partition('=')
        if not equals or not key.isidentifier():
            raise InputError(f'--model-kwargs: {pair!r} is not of the form key=value.')
        try:
            keywords[key] = json.loads({'True': 'true', 'False': 'false', 'None': 'null'}.get(value, value))
        except json.JSONDecodeError:
            keywords[key] = value
    return keywords


def cost_table(results: list[Result]) -> Table:
    """One row a model."""
    table = _table('cost of one image (MACs: multiply-accumulates)')
    table.add_column('model', overflow='fold')
    for heading in ('input', 'parameters', 'active', 'MACs at most', 'MACs executed'):
        table.add_column(heading, justify='right', overflow='fold')
    for result in results:
        cost = result.cost
        size, at_most = 'x'.join(map(str, result.input_size)), cost.macs_max
        if result.images and set(result.images.at_most) != {at_most}:  # a detector, on images of other sizes
            size, at_most = 'images', round(statistics.fmean(result.images.at_most))
        figures = (f'{n:,}' for n in (cost.parameters, cost.active_parameters, at_most))
        table.add_row(result.name, size, *figures, _executed(result))
    return table


def _executed(result: Result) -> str:
    if result.images:
        return f'{result.images.mean:,.0f} +- {result.images.std:,.0f}'
    return '-' if result.open_ended else f'{result.cost.macs_executed:,}'


def remarks(results: list[Result]) -> list[str]:
    """What has to be said beside the table: images, and what was not counted."""
    lines = []
    for result in results:
        images = result.images
        if images:
            low, high = min(images.executed), max(images.executed)
            skipped = f', {len(result.skipped)} unreadable skipped' if result.skipped else ''
            on = counted(len(images.executed), 'image') + skipped
            lines.append(f'{result.name}: executed on {on}, from {low:,} to {high:,} MACs')
        missing = {**result.cost.uncounted, **(images.uncounted if images else {})}
        for op, where in sorted(missing.items()):
            lines.append(f'{result.name}: NOT COUNTED {op}, in {", ".join(m or "the model itself" for m in where[:3])}')
    if any(result.open_ended and not result.images for result in results):
        lines.append('"-": what a routed model executes depends on weights and images; --images DIR measures it.')
    return lines


def module_table(result: Result, depth: int) -> Table:
    """MACs by module, down to `depth` levels; rows of less than 0.005 % of the whole are left out."""
    measured = result.images or result.cost
    executed = measured.by_module if result.images or not result.open_ended else {}
    table = _table()
    table.add_column(f'module of {result.name}', overflow='fold')
    for heading in ('MACs at most', 'share', *(['MACs executed'] if executed else [])):
        table.add_column(heading, justify='right')
    total = measured.by_module_max[''] or 1
    for name, macs in measured.by_module_max.items():
        level = name.count('.') + 1 if name else 0
        if level <= depth and macs >= 5e-5 * total:
            ran = [f'{executed.get(name, 0):,.0f}'] if executed else []
            table.add_row('  ' * level + (name or 'whole model'), f'{macs:,.0f}', f'{100 * macs / total:.2f} %', *ran)
    return table


def _table(title: str | None = None) -> Table:
    return Table(title=title, title_justify='left', box=box.SIMPLE_HEAD, pad_edge=False)


def _as_json(result: Result) -> dict[str, Any]:
    entry = {'name': result.name, 'input_size': result.input_size, **dataclasses.asdict(result.cost)}
    if result.open_ended:
        del entry['macs_executed'], entry['by_module'], entry['by_operator']  # of a blank input: no figure to quote
    images = result.images
    if images:
        columns = zip(result.counted, images.executed, images.at_most)
        entry['executed'] = {
            'mean': images.mean, 'std': images.std, 'min': min(images.executed), 'max': max(images.executed),
            'by_module': images.by_module, 'uncounted': images.uncounted, 'skipped': result.skipped,
            'images': [{'path': p, 'macs_executed': e, 'macs_max': m} for p, e, m in columns],
        }
    return entry


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == '__main__':
    sys.exit(main())
