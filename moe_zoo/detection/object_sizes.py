"""Which expert of a detector serves small, medium and large objects, and what each could do alone.

    tools/analyze_object_sizes.py --config-file configs/coco/X.yaml --weights model_final.pth [--trials forced k]

One pass over the test set gives gate mass by object size with its tests (see `moe_zoo.analysis.object_sizes`) beside
COCO's metrics. Every trial, a forced or dropped expert or another number of them, is one more evaluation, and so is
every control. On one process.
"""
import argparse
import contextlib
import json
import logging
import math
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from rich.console import Console
from rich.progress import track
from torch import nn

from ..analysis.figures import save, size_figure
from ..analysis.force import choosing_layers, drop_expert, force_expert, keep_largest, routed_layers, select_experts
from ..analysis.object_gates import Objects
from ..analysis.object_sizes import SizeCollector, check_tests, planted_sizes, size_table, untrained_routers
from ..analysis.page import Page
from ..analysis.size_page import CONTROLS, control_sentence, matches_by_expert, size_section, trial_table
from ..analysis.usage import evaluation_mode
from ..errors import InputError, atomic_write, counted, exit_on_input_error, nearest
from .checkpoint import SafeCheckpointer
from .config import load_config
from .evaluation import build_evaluator, build_test_loader
from .size_metrics import detections, found_objects, size_metrics
from .size_pictures import CONFIDENT, draw_scenes

TRIALS = {
    'forced': 'each expert does all the work, with the whole combine weight',
    'dropped': 'each expert is taken out',
    'k': 'another number of experts work for an item, from 1 to all',
}
MOST_TRIED = 16  # experts that are forced and dropped
NUMBERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)  # K that are tried


class Scenes:
    """The test set of a config: its images as the detector takes them, its objects, and COCO's metrics.

    Args:
        cfg: A config with our keys.
        model: The detector, whose anchors tell the FPN level of an object; None does without levels.
        quiet: Show no progress.

    Raises:
        InputError: DATASETS.TEST does not name exactly one usable set.
    """

    def __init__(self, cfg: CfgNode, model: Optional[nn.Module] = None, quiet: bool = False):
        if len(cfg.DATASETS.TEST) != 1:
            raise InputError(f'DATASETS.TEST {list(cfg.DATASETS.TEST)}: the analysis takes one data set.')
        self.loader = build_test_loader(cfg, cfg.DATASETS.TEST[0])
        self.evaluator = build_evaluator(cfg, cfg.DATASETS.TEST[0])
        self.coco = self.evaluator._coco_api
        self.anchors = anchor_sizes(model)
        self.quiet, self.passes, self.expected = quiet, 0, 1

    def entries(self, image: dict[str, Any]) -> list[dict[str, Any]]:
        """The annotations of an image; crowds are no objects."""
        return [a for a in self.coco.imgToAnns[image['image_id']] if not a.get('iscrowd', 0)]

    def objects(self, image: dict[str, Any]) -> Objects:
        """The objects of an image."""
        entries = self.entries(image)
        boxes = np.array([a['bbox'] for a in entries], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # x, y, width, height to corners
        shares = boxes / np.tile([image['width'], image['height']], 2)
        return Objects(shares, [a['area'] for a in entries], self.levels(shares, image))

    def levels(self, boxes: np.ndarray, image: dict[str, Any]) -> Optional[np.ndarray]:
        """(O,) the level whose anchors overlap each box most, both centred on one point; None without anchors.

        Args:
            boxes: (O, 4) as shares of width and height.
            image: As the detector takes it: its tensor has the size that anchors are for.
        """
        if self.anchors is None:
            return None
        height, width = image['image'].shape[-2:]
        sides = (boxes[:, 2:] - boxes[:, :2]) * [width, height]
        return best_levels(sides, self.anchors)

    @torch.no_grad()
    def run(
            self,
            model: nn.Module,
            title: str,
            collector: Optional[SizeCollector] = None,
            metrics: bool = True,
    ) -> Optional[dict[str, Optional[float]]]:
        """One pass over the images, announced by its number.

        Args:
            model: A detector in evaluation mode.
            title: What the progress line calls the pass.
            collector: Receives gates and objects.
            metrics: Whether COCO's are wanted.

        Returns:
            `METRICS` in percent, None for one that cannot be measured; None without `metrics`.
        """
        self.evaluator.reset()
        self.passes += 1
        number = f'pass {self.passes} of {max(self.expected, self.passes)}'
        for batch in self.loader if self.quiet else _progress(self.loader, f'{number}, {title}'):
            watch = contextlib.nullcontext()
            if collector is not None:
                watch = collector.batch(list(map(self.objects, batch)))
            with watch:
                outputs = model(batch)
            if metrics:
                self.evaluator.process(batch, outputs)
        return size_metrics(self.coco, detections(self.evaluator)) if metrics else None

    def found(self) -> np.ndarray:
        """(O,) whether a confident detection of the last pass matches each object, in the order of a collector."""
        matches = found_objects(self.coco, [d for d in detections(self.evaluator) if d['score'] > CONFIDENT])
        seen = [prediction['image_id'] for prediction in self.evaluator._predictions]
        return np.array([a['id'] in matches for i in seen for a in self.entries({'image_id': i})], dtype=bool)


def anchor_sizes(model: Optional[nn.Module]) -> Optional[list[np.ndarray]]:
    """(A, 2) width and height of the anchors of every FPN level, in pixels of the network's input."""
    cells = getattr(getattr(model, 'anchor_generator', None), 'cell_anchors', None)
    return None if cells is None else [(c[:, 2:] - c[:, :2]).detach().cpu().double().numpy() for c in cells]


def best_levels(sides: np.ndarray, anchors: Sequence[np.ndarray]) -> np.ndarray:
    """(O, 2) sides of boxes to (O,) the level with the anchor of largest overlap, the finest of equal ones."""
    best = []
    for level in anchors:
        common = np.minimum(sides[:, None], level[None]).prod(axis=2)
        union = sides.prod(axis=1)[:, None] + level.prod(axis=1)[None] - common
        best.append((common / union).max(axis=1))
    return np.stack(best).argmax(axis=0)


Trial = tuple[str, Callable[[], AbstractContextManager]]  # name of a row, and what is done to the routers


def plan_trials(
        model: nn.Module,
        kinds: Sequence[str],
        layer: Optional[str] = None,
        experts: Optional[Sequence[int]] = None,
) -> list[Trial]:
    """The evaluations beyond the first one.

    Args:
        model: The detector.
        kinds: Keys of `TRIALS`.
        layer: Name of the only layer to be overruled; None is all.
        experts: Numbers of the experts to force and drop; None is all that every layer has, up to `MOST_TRIED`.

    Raises:
        InputError: There is no such layer or expert, or the layer does not decide.
    """
    layers = routed_layers(model)
    if layer is not None and layer not in layers:
        raise InputError(f'--layer {layer!r} is no routed layer; there are {", ".join(layers)}.')
    if layer is not None and hasattr(layers[layer], 'router') and layers[layer].router is None:
        raise InputError(f'--layer {layer!r} follows the decisions of another layer and has none to overrule.')
    chosen = [each for name, each in layers.items() if layer in (None, name)]
    fewest = min(each.num_experts for each in chosen)
    experts = list(range(min(fewest, MOST_TRIED)) if experts is None else dict.fromkeys(experts))
    if any(not 0 <= expert < fewest for expert in experts):
        raise InputError(f'--experts {" ".join(map(str, experts))}: these layers have the experts 0 to {fewest - 1}.')
    trials: list[Trial] = []
    if 'forced' in kinds:
        trials += [(f'expert {e}', partial(force_expert, model, e, layer, keep_mass=True)) for e in experts]
    if 'dropped' in kinds and fewest > 1:
        trials += [(f'without {e}', partial(drop_expert, model, e, layer)) for e in experts]
    if 'k' in kinds:
        trials += _numbers(model, layer, max(each.num_experts for each in chosen))
    return trials


def _numbers(model: nn.Module, layer: Optional[str], most: int) -> list[Trial]:
    """Other numbers of experts: of layers that choose; where none does, the largest weights of those that mix."""
    choosers = {name: modules[0] for name, modules in choosing_layers(model).items() if layer in (None, name)}
    mixing = all(module.num_selected == module.num_experts for module in routed_layers(model).values())
    if not choosers and (layer is not None or not mixing):
        return []
    native = {module.num_selected for module in choosers.values()} or {most}
    numbers = sorted({k for k in NUMBERS if k < most} | {most})
    change = partial(select_experts, layer=layer) if choosers else keep_largest
    return [(f'K = {k}', partial(change, model, k)) for k in numbers if native != {k}]


def analyze_detector(
        cfg: CfgNode,
        model: nn.Module,
        controls: Sequence[str] = (),
        trials: Sequence[str] = tuple(TRIALS),
        permutations: int = 999,
        shuffles: Optional[int] = None,
        alpha: float = 0.01,
        seed: int = 0,
        layer: Optional[str] = None,
        experts: Optional[Sequence[int]] = None,
) -> dict[str, Any]:
    """The whole analysis of a detector on DATASETS.TEST.

    Args:
        cfg: Its config.
        model: The detector, weights loaded; its training mode is restored.
        controls: Names of `CONTROLS` to be run as well, one pass each.
        trials: Keys of `TRIALS`.
        permutations, shuffles, alpha, seed: See `moe_zoo.analysis.object_sizes`; None shuffles as often as alpha needs.
        layer, experts: See `plan_trials`.

    Returns:
        sizes: The `SizeAnalysis` of the detector.
        controls: Name to that of the control.
        ap: 'free', 'expert 0', 'without 0', 'K = 1', ... to `METRICS`.
        matches: See `matches_by_expert`.
        passes: How many evaluations this took.
        seconds: Of the first pass with its tests, and of everything.
        scenes: The `Scenes`, for pictures.

    Raises:
        InputError: The detector has no routed layer, or the data set cannot be used.
    """
    check_tests(alpha, permutations, 0 if shuffles is None else shuffles, seed)  # rather than after a pass
    started = time.monotonic()
    layers = routed_layers(model)
    rows = plan_trials(model, trials, layer, experts)
    scenes = Scenes(cfg, model)
    scenes.expected = 1 + len(controls) + len(rows)
    if shuffles is None:
        shuffles = max(499, math.ceil(len(layers) / alpha))
    if scenes.expected > 1:
        print(f'{scenes.expected} passes over {counted(len(scenes.loader), "image")}: 1 with the router left free, '
              f'{counted(len(controls), "control")}, {counted(len(rows), "trial")}', file=sys.stderr)

    def collect(title: str, around: Callable = lambda collector: contextlib.nullcontext(), metrics: bool = False):
        collector = SizeCollector(model, shuffles, seed)
        with around(collector), collector:
            found = scenes.run(model, title, collector, metrics)
            return collector, collector.analyze(permutations, alpha), found

    with evaluation_mode(model):
        collector, sizes, free = collect('left free', metrics=True)
        matches = matches_by_expert(sizes.strongest, collector.sizes, scenes.found())
        first = time.monotonic() - started
        around = {
            'untrained': lambda c: untrained_routers(collector.routers, seed + 1),
            'planted': lambda c: planted_sizes(model, c),
        }
        checked = {name: collect(f'control {name}', around[name])[1] for name in controls}
        ap = {'free': free}
        for name, overruled in rows:
            with overruled():
                ap[name] = scenes.run(model, name)
    return {'sizes': sizes, 'controls': checked, 'ap': ap, 'matches': matches, 'passes': scenes.passes,
            'seconds': {'first': first, 'all': time.monotonic() - started}, 'scenes': scenes}


def report(found: dict[str, Any]) -> str:
    """The analysis as text."""
    lines = [size_table(found['sizes']), '', *trial_table(found['ap'])]
    for name, control in found['controls'].items():
        lines += ['', *textwrap.wrap(control_sentence(name, control), 118)]
    return '\n'.join(lines)


@exit_on_input_error
def main(argv: Optional[list[str]] = None) -> dict[str, Any]:
    """Analyse a detector; see `--help`.

    Returns:
        What object_sizes.json holds.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = _parser().parse_intermixed_args(argv)
    trials, experts = _kinds(args.trials), _experts(args.experts)
    cfg, model = _load(args)
    output = Path(args.output or Path(cfg.OUTPUT_DIR) / 'object_sizes')
    cfg.OUTPUT_DIR = str(output)
    found = analyze_detector(
        cfg, model, tuple(dict.fromkeys(args.control)), trials, args.permutations, args.shuffles, args.alpha,
        args.seed, args.layer, experts)
    content = {'command': shlex.join(['python', 'tools/analyze_object_sizes.py', *argv]),
               **as_content(found, args, cfg)}
    text = json.dumps(content, indent=1)
    print(text if args.json else report(found))
    with atomic_write(output / 'object_sizes.json') as part:
        part.write_text(text, encoding='utf-8')
    written = [output / 'object_sizes.json']
    if args.figure:
        written.append(save(size_figure(found['sizes'], found['ap']), output / 'object_sizes.png'))
    pictures = draw_scenes(found['scenes'], model, found['sizes'].strongest, args.pictures)
    for name, picture, _ in pictures:
        with atomic_write(output / name) as part:
            part.write_bytes(picture)
    _page(content, pictures).write(output / 'index.html')
    written.append(output / 'index.html')
    print(f'written: {", ".join(map(str, written))}', file=sys.stderr)
    return content


def as_content(found: dict[str, Any], args: argparse.Namespace, cfg: CfgNode) -> dict[str, Any]:
    """What the JSON holds and the page shows."""
    return {
        'config': args.config_file, 'weights': args.weights, 'dataset': cfg.DATASETS.TEST[0],
        'sizes': found['sizes'].as_dict(), 'ap': found['ap'], 'matches': found['matches'],
        'controls': {name: {**control.as_dict(), 'sentence': control_sentence(name, control)}
                     for name, control in found['controls'].items()},
        'passes': found['passes'], 'seconds': found['seconds'],
    }


def _page(content: dict[str, Any], pictures: Sequence[tuple[str, bytes, str]]) -> Page:
    lead = f'`{content["config"]}` on `{content["dataset"]}`: which experts serve small, medium and large objects.'
    return Page('Experts and object sizes', lead, [size_section(content, pictures, f'$ {content["command"]}')])


def _load(args: argparse.Namespace) -> tuple[CfgNode, nn.Module]:
    cfg = load_config(args.config_file, args.opts)
    logging.getLogger('fvcore.common.checkpoint').setLevel(logging.WARNING)
    torch.manual_seed(args.seed)  # of what is drawn where no weights are given
    model = build_model(cfg)
    if args.weights:
        SafeCheckpointer(model, complete=True).load(args.weights)
    else:
        print('No --weights: an untrained detector is analysed.', file=sys.stderr)
    return cfg, model


def _progress(loader, title: str) -> Iterator[Any]:
    """Batches of a loader, with a bar on a terminal, else a line at the start and every five seconds."""
    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(loader, title, len(loader), console=console)
        return
    total, start = len(loader), time.monotonic()
    last = start
    print(f'{title}: {counted(total, "image")}', file=sys.stderr)
    for done, batch in enumerate(loader):
        now = time.monotonic()
        if done and now - last >= 5:
            last = now
            left = (now - start) / done * (total - done)
            print(f'{title}: {done} of {total}, about {left:.0f} s left', file=sys.stderr)
        yield batch


def _kinds(text: str) -> list[str]:
    """`forced,k` to names of `TRIALS`; `none` to none."""
    kinds = [] if text == 'none' else text.split(',')
    for kind in kinds:
        if kind not in TRIALS:
            raise InputError(f'--trials {text!r}: {kind!r} is not one of {", ".join(TRIALS)}, none.'
                             f'{nearest(kind, TRIALS)}')
    return kinds


def _experts(text: Optional[str]) -> Optional[list[int]]:
    try:
        return text and [int(word) for word in text.split(',')]
    except ValueError:
        raise InputError(f'--experts {text!r}: give numbers, such as 0,2.') from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        description='Which expert of a detector serves small, medium and large objects (COCO area limits), and AP, '
                    'AP50 and AR by size with experts forced, dropped and in other numbers. Prints tables; writes '
                    'index.html, object_sizes.json, a figure and scenes whose boxes have the colour of the leading '
                    'expert.',
        epilog='KEY VALUE pairs change the config, as in MOE.DATA.ROOT DIR.')
    add = parser.add_argument
    add('--config-file', required=True, metavar='FILE', help='detectron2 yaml')
    add('--weights', default='', metavar='FILE', help='checkpoint (none: untrained)')
    add('--output', metavar='DIR', help='folder of the results (default: OUTPUT_DIR/object_sizes)')
    add('--json', action='store_true', help='print the JSON instead of the tables')
    add('--figure', action=argparse.BooleanOptionalAction, default=True, help='draw the figure')
    add('--pictures', type=int, default=6, metavar='N', help='scenes to draw (default: 6)')
    add('--trials', default=','.join(TRIALS), metavar='KINDS',
        help='what to try, each expert and each K being one more evaluation: none, or some of these by commas '
             '(default: all): ' + '; '.join(f'{name}: {what}' for name, what in TRIALS.items()))
    add('--layer', metavar='NAME', help='overrule this routed layer only (default: all of them)')
    add('--experts', metavar='E,E',
        help=f'experts to force and drop, by commas (default: all, up to {MOST_TRIED})')
    add('--control', action='append', choices=list(CONTROLS), default=[],
        help='one more pass with routers that must not (untrained) or must (planted) separate sizes')
    add('--permutations', type=int, default=999, metavar='N', help='of images (default: 999)')
    add('--shuffles', type=int, default=None, metavar='N',
        help='of router weights (default: 499, or more where many layers ask for it; 0: no such test, no verdict)')
    add('--alpha', type=float, default=0.01, help='level of both tests (default: 0.01)')
    add('--seed', type=int, default=0, help='of permutations, shuffles and controls (default: 0)')
    add('opts', nargs='*', metavar='KEY VALUE', help='config keys to change')
    return parser


if __name__ == '__main__':
    main()
