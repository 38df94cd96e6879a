"""`tools/count_flops.py`: what models cost, as a table, and as JSON, CSV, Markdown and LaTeX.

A named model is counted on meta tensors: no memory, no weights, what the architecture can cost at most. What a routed
model executes depends on its weights and on the images, so that needs `--images`, and `--weights` for a trained router.
"""
import argparse
import dataclasses
import json
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from timm.data import create_transform, resolve_model_data_config
from torch import nn

import moe_zoo
from moe_zoo.cards import card, dense_twin
from moe_zoo.engine.checkpoint import check_fits, find_weights, read_checkpoint
from moe_zoo.errors import (
    InputError,
    MissingPackage,
    atomic_write,
    exit_on_input_error,
    nearest,
    nearest_keyword,
)

from ..data.images import UnreadableImage, read_image
from ..layers.routed import RoutedLayer
from .cost import Cost, CountError, count, count_images
from .cost_check import check_with_fvcore
from .count_remarks import Timings, remarks, time_notes, uncounted_words
from .count_tables import BY, Result, breakdown, check_grid, comparison, model_grid
from .tables import WRITERS, Grid, as_csv, as_rich, sort_grids, stacked
from .usage import measure_usage

IMAGE_SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp'}
WIDTH = 100  # columns, where there is no terminal
CONFIG_SUFFIXES = ('.yaml', '.yml', '.py')
# Figures of `Cost` that weights and images decide where experts are chosen.
OF_ONE_INPUT = (
    'used_parameters', 'macs_executed', 'macs_expected', 'by_module', 'by_operator', 'activations',
    'activations_by_module', 'activations_by_operator', 'peak_memory')

EXAMPLES = """
examples:
  %(prog)s condconv_resnet50 resnet50                    a routed model beside a dense one
  %(prog)s vmoe_vit_s --model-kwargs num_experts=16      with other keywords of the model
  %(prog)s vit_small_patch16_224 --img-size 640          any timm model, at any size that it takes
  %(prog)s --compare vmoe_vit_s twin --depth 2           where it differs from its dense twin
  %(prog)s --compare resnet50 resnet101 --by operator
  %(prog)s vmoe_vit_s --by expert                        their parameters; with --images their load
  %(prog)s vmoe_vit_s --images photos --weights W        what it executes on these images
  %(prog)s --config-file configs/coco/retinanet_condconv_r50_fpn_1x.yaml --img-size 800x1216
  %(prog)s --compare configs/coco/retinanet_{moe_res5,condconv}_r50_fpn_1x.yaml
  %(prog)s resnet18 resnet34 resnet50 --sort macs_max --latex table.tex
  %(prog)s resnet50 --strict --check --csv -             for scripts: all digits, complete, checked

One unit: a multiply-accumulate is one MAC (twice that are FLOPs). Matrix products and convolutions
count, attention included; normalisation, pooling, activations and moving data do not.
  active       parameters that one image or token meets: of every routed layer the chosen experts
  at most      MACs of the router and the chosen number of experts for every token or image, without
               padding
  executed     what ran on the images: a path that pads, or computes all experts, costs all of that
  expected     what those images chose costs without padding
  activations  numbers that matrix products and convolutions put out
  memory       bytes of all tensors alive at one time, weights among them
MACs are not time: a star stands where some of them take longer than others, or where time passes
without any; a line below says why. --times FILE adds what tools/benchmark.py --json measured of the
same models. Operators neither counted nor known to be free are named.
"""


@exit_on_input_error
def main(argv: list[str] | None = None) -> int:
    """Count what the command line names and print it; returns the exit code."""
    args = _parser().parse_args(argv)
    _check_arguments(args)
    timings = Timings(args.times) if args.times else None
    results = [_count_target(target, args) for target in _targets(args)]
    if timings:
        results = [dataclasses.replace(r, time_notes=(*r.time_notes, *timings.of(r.name))) for r in results]
    grids = [model_grid(results), *_details(results, args)]
    if args.sort:
        grids = sort_grids(grids, args.sort)
    texts = _texts(results, grids, args)
    _show(results, [*grids, *(check_grid(result) for result in results if result.check)], drawn='-' not in texts)
    for out, text in texts.items():
        if out == '-':
            print(text, end='')
        else:
            with atomic_write(out) as path:
                path.write_text(text, encoding='utf-8')
            print(f'wrote {out}', file=sys.stderr)
    if args.strict:
        _refuse_doubts(results)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Parameters, MACs, activations and memory of models: at most, and as executed on images.',
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument_group('what to count').add_argument
    add('names', nargs='*', metavar='NAME', help='models of timm or moe_zoo; with --config-file: KEY VALUE overrides')
    add('--config-file', metavar='F', help='a detectron2 config: counts the whole detector')
    add('--compare', nargs=2, metavar=('A', 'B'), help='two models (or two configs of detectors) side by side; B may '
        'be "twin", the dense network that the card of A names')
    add('--img-size', metavar='HxW', help="size, or one side of a square (default: the model's own; for a detector the "
        'smallest test size of its config by 1.5 times that, and images are always resized as the config says)')
    add('--model-kwargs', nargs='*', default=[], metavar='K=V', help='keywords of the models, e.g. num_experts=4')
    add('--images', metavar='DIR', help='count what is executed on every image below DIR: mean, spread, extremes')
    add('--max-images', type=int, metavar='N', help='only the first N of them, by path')
    add('--weights', metavar='W', help='checkpoint to execute with: what a router chooses depends on its weights')
    add = parser.add_argument_group('what to show').add_argument
    add('--by', choices=BY, help='break costs down by module (default for a single model), operator or expert')
    add('--depth', type=int, metavar='D', help='levels of modules to list (default: 1)')
    add('--sort', metavar='COLUMN', help='sort tables by a column: model, parameters, active, macs_max, activations '
        '... (any that the CSV has); numbers from large to small')
    add('--times', metavar='FILE', help='say beside the MACs what tools/benchmark.py --json measured of these models')
    add('--check', action='store_true', help='count by fvcore too, and say where the two differ and why')
    add('--strict', action='store_true', help='exit with code 2 if an operator was not counted, or a check fails')
    add = parser.add_argument_group('files to write ("-" prints the text instead of the table)').add_argument
    add('--json', metavar='OUT', help='everything that was counted')
    add('--csv', metavar='OUT', help='the table of models in full digits; with --by or --compare, that table')
    add('--markdown', metavar='OUT', help='the tables as Markdown')
    add('--latex', metavar='OUT', help='the tables as LaTeX, for the package booktabs')
    return parser


def _check_arguments(args: argparse.Namespace) -> None:
    if not args.names and not args.config_file and not args.compare:
        raise InputError('Give the names of models, --compare A B, or --config-file with the config of a detector.')
    if args.compare and (args.names or args.config_file):
        raise InputError(f'--compare {" ".join(args.compare)} takes both models itself: leave out '
                         f'{args.names[0] if args.names else "--config-file"}.')
    if args.weights and not args.images:
        raise InputError('--weights matters only for what is executed on images: give --images too.')
    if args.weights and len(_targets(args)) > 1:
        raise InputError('--weights are those of one model: count one at a time.')
    if args.compare and args.by == 'expert':
        raise InputError('--compare goes by module or operator; experts of two models have nothing to pair them by.')
    if args.depth is not None and args.depth < 0:
        raise InputError(f'--depth {args.depth}: the whole model is 0, its children are 1.')
    stdout = [kind for kind in ('json', *WRITERS) if getattr(args, kind) == '-']
    if len(stdout) > 1:
        raise InputError(f'--{stdout[0]} - and --{stdout[1]} - both print; give one of them a file.')


def _targets(args: argparse.Namespace) -> list[str]:
    return [args.config_file] if args.config_file else args.compare or args.names


def _details(results: Sequence[Result], args: argparse.Namespace) -> list[Grid]:
    """What stands below the table of models."""
    depth = 1 if args.depth is None else args.depth
    if args.compare:
        return [comparison(*results, args.by or 'module', depth)]
    asked = args.by or (args.depth is None and len(results) == 1) or args.depth
    return [breakdown(result, args.by or 'module', depth) for result in results] if asked else []


def _show(results: Sequence[Result], grids: Sequence[Grid], drawn: bool) -> None:
    """The tables on standard output, and what has to be said of them; that alone, on standard error, if not `drawn`."""
    file = sys.stdout if drawn else sys.stderr
    console = Console(file=file, width=None if file.isatty() else WIDTH, highlight=False, markup=False)
    lines = [textwrap.fill(line, console.width, subsequent_indent='  ', break_long_words=False, break_on_hyphens=False)
             for line in remarks(results)]
    for i, grid in enumerate(grids if drawn else ()):
        console.print(f'\n{grid.title}' if i else grid.title, style='bold')
        console.print(as_rich(grid))
        if not i and lines:
            console.print('\n'.join(lines))
    if not drawn and lines:
        console.print('\n'.join(lines))


def _texts(results: Sequence[Result], grids: Sequence[Grid], args: argparse.Namespace) -> dict[str, str]:
    """File name, or '-', to what is written there."""
    asked = grids if args.by or args.compare or args.depth else grids[:1]
    texts = {}
    if args.json:
        texts[args.json] = json.dumps(_as_json(results), indent=1) + '\n'
    if args.csv:
        texts[args.csv] = as_csv(stacked(asked[1:]) if asked[1:] else grids[0])
    for kind in ('markdown', 'latex'):
        if out := getattr(args, kind):
            texts[out] = '\n'.join(WRITERS[kind](grid) for grid in asked)
    return texts


def count_model(name: str, img_size: tuple[int, int] | None = None, **kwargs: Any) -> Cost:
    """Cost of a registered model on one image, counted on meta tensors (no weights, no memory).

    A model that does not run there is counted on real tensors, with random weights.

    Args:
        name: A model of timm or moe_zoo.
        img_size: (height, width); the model's own by default.
        kwargs: Keywords of the model.

    Raises:
        InputError: No such model or keyword, or a size that the model does not take.
    """
    return _count_blank(name, img_size, kwargs)[1]


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


def _count_target(target: str, args: argparse.Namespace) -> Result:
    """A model by name, the dense twin of the first one, or a detector by its config."""
    if args.config_file:
        return _count_detector(target, args.names, args)
    if target.endswith(CONFIG_SUFFIXES):
        return _count_detector(target, [], args)
    if args.compare and target == 'twin':
        name, keywords = dense_twin(card(args.compare[0]))
        return _count_named(name, keywords, args)
    return _count_named(target, _keywords(args.model_kwargs), args)


def _count_named(name: str, kwargs: dict[str, Any], args: argparse.Namespace) -> Result:
    img_size = parse_size(args.img_size)
    model, cost, note = _count_blank(name, img_size, kwargs)
    size = _input_size(model, img_size)
    result = Result(name, size, depends_on_input(model, cost), cost, notes=note, time_notes=time_notes(model, cost))
    if not args.images and not args.check:
        return result
    model = build_model(name, 'cpu', img_size, **kwargs)
    if args.check:
        result = _checked(result, model, torch.rand(1, *size))
    if not args.images:
        return result
    if args.weights:
        weights = find_weights(read_checkpoint(args.weights), args.weights)
        check_fits(model, weights, args.weights, name)
        model.load_state_dict(weights)
    transform = create_transform(**resolve_model_data_config(model, {'input_size': size}), is_training=False)

    def read(path: Path) -> torch.Tensor:
        return transform(read_image(path, 'RGB' if size[0] == 3 else 'L')).unsqueeze(0)

    return _on_images(result, model, read, args)


def _count_blank(
        name: str, img_size: tuple[int, int] | None, kwargs: dict[str, Any]) -> tuple[nn.Module, Cost, tuple[str, ...]]:
    """A model, its cost on one blank image, and why that was not a meta tensor where it was not."""
    model = build_model(name, 'meta', img_size, **kwargs)
    size = _input_size(model, img_size)
    try:
        return model, count(model, torch.empty(1, *size, device='meta')), ()
    except CountError as error:
        if 'meta' not in str(error.__cause__).lower():
            raise InputError(f'{name}: {error}') from error
        reason = _first_line(error.__cause__)
    model = build_model(name, 'cpu', img_size, **kwargs)
    note = f'counted on real tensors with random weights, because on meta tensors: {reason}'
    return model, _count_once(name, model, torch.zeros(1, *size)), (note,)


def _count_detector(config: str, overrides: list[str], args: argparse.Namespace) -> Result:
    for message in ('.*torch.jit.script. is deprecated', 'torch.meshgrid'):  # detectron2's own affair
        warnings.filterwarnings('ignore', message)
    from moe_zoo.detection import count_inputs as detection  # an extra: imported where it is asked for

    cfg, model = detection.load(config, overrides, args.weights)
    inputs = detection.noise(cfg, parse_size(args.img_size))
    name = Path(config).stem
    cost = _count_once(name, model, inputs)
    result = Result(
        name, tuple(inputs[0]['image'].shape), depends_on_input(model, cost), cost,
        time_notes=time_notes(model, cost))
    if args.check:
        result = _checked(result, model, inputs)
    return _on_images(result, model, lambda path: detection.read(cfg, path), args) if args.images else result


def _checked(result: Result, model: nn.Module, inputs: Any) -> Result:
    """Add the count by fvcore, or why there is none."""
    try:
        return dataclasses.replace(result, check=tuple(check_with_fvcore(model, inputs)))
    except MissingPackage:
        raise
    except InputError as error:
        return dataclasses.replace(result, notes=(*result.notes, f'not checked: {error}'))


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
            except UnreadableImage as error:
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
    loads = {}
    if args.by == 'expert' and result.cost.parameters_by_expert:
        loads = {name: usage.load for name, usage in measure_usage(model, (read(Path(p)) for p in counted)).items()}
    return dataclasses.replace(result, images=costs, counted=tuple(counted), skipped=tuple(skipped), loads=loads)


def _count_once(name: str, model: nn.Module, inputs: Any) -> Cost:
    try:
        return count(model, inputs)
    except CountError as error:
        raise InputError(f'{name}: {error}') from error


def depends_on_input(model: nn.Module, cost: Cost) -> bool:
    """Can what is executed differ from what was counted? Where experts are chosen, or the counted path pads."""
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    return any(layer.num_selected < layer.num_experts for layer in layers) or cost.macs_executed != cost.macs_max


def _refuse_doubts(results: Sequence[Result]) -> None:
    """
    Raises:
        InputError: An operator was not counted, or fvcore counts it otherwise and no cause is known.
    """
    doubts = []
    for result in results:
        doubts += [f'{result.name} does not count {words}' for words in uncounted_words(result.uncounted)]
        doubts += [f'{result.name} has {row.ours:,} MACs of {row.operator}, and fvcore counts {row.fvcore:,}'
                   for row in result.check if not row.explained]
    if doubts:
        raise InputError(f'--strict: {"; ".join(doubts)}.')


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


def _as_json(results: Sequence[Result]) -> dict[str, Any]:
    versions = {'moe_zoo': moe_zoo.__version__, 'timm': timm.__version__, 'torch': torch.__version__}
    return {'unit': 'MACs', **versions, 'models': [_entry(result) for result in results]}


def _entry(result: Result) -> dict[str, Any]:
    entry = {'name': result.name, 'input_size': result.input_size, **dataclasses.asdict(result.cost)}
    if result.open_ended:  # of a blank input: no figures to quote
        for key in OF_ONE_INPUT:
            del entry[key]
    images = result.images
    if images:
        columns = zip(result.counted, images.executed, images.at_most, images.expected, strict=True)
        entry['executed'] = {
            **dict(zip(('mean', 'std', 'min', 'max'), images.spread())),
            'by_module': images.by_module, 'by_operator': images.by_operator, 'uncounted': images.uncounted,
            'skipped': result.skipped, 'load': result.loads,
            'images': [dict(zip(('path', 'macs_executed', 'macs_max', 'macs_expected'), row)) for row in columns],
        }
    entry['fvcore'] = [dataclasses.asdict(row) for row in result.check]
    entry |= {'notes': result.notes, 'time_notes': result.time_notes}
    return entry


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == '__main__':
    sys.exit(main())
