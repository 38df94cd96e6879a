"""Which expert of a detector serves small, medium and large objects, and what each could do alone.

    tools/analyze_object_sizes.py --config-file configs/coco/X.yaml --weights model_final.pth [--control planted]

Gate mass by object size with its tests (see `moe_zoo.analysis.object_sizes`), and COCO's AP by size with every expert
forced and left free. On one process.
"""
import argparse
import contextlib
import io
import json
import logging
import math
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from ..analysis.figures import save, size_figure
from ..analysis.force import force_expert, routed_layers
from ..analysis.object_sizes import SizeAnalysis, SizeCollector, planted_sizes, size_table, untrained_routers
from ..errors import InputError, atomic_write, exit_on_input_error
from .checkpoint import SafeCheckpointer
from .config import load_config
from .train import Trainer

METRICS = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl')
CONTROLS = {
    'untrained': (False, 'routers drawn anew: must not separate'),
    'planted': (True, 'routers that know the object sizes: must separate'),
}


class Scenes:
    """The test set of a config: its images as the detector takes them, its objects, and COCO's metrics.

    Args:
        cfg: A config with our keys.

    Raises:
        InputError: DATASETS.TEST does not name exactly one usable set.
    """

    def __init__(self, cfg: CfgNode):
        if len(cfg.DATASETS.TEST) != 1:
            raise InputError(f'DATASETS.TEST {list(cfg.DATASETS.TEST)}: the analysis takes one data set.')
        self.name = cfg.DATASETS.TEST[0]
        self.loader = Trainer.build_test_loader(cfg, self.name)
        self.evaluator = Trainer.build_evaluator(cfg, self.name)
        self.coco = self.evaluator._coco_api

    def objects(self, image: Dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """(O, 4) boxes as shares of width and height, and (O,) areas; crowds are no objects."""
        entries = [a for a in self.coco.imgToAnns[image['image_id']] if not a.get('iscrowd', 0)]
        boxes = np.array([a['bbox'] for a in entries], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # x, y, width, height to corners
        return boxes / np.tile([image['width'], image['height']], 2), np.array([a['area'] for a in entries])

    @torch.no_grad()
    def run(
            self,
            model: nn.Module,
            title: str,
            collector: Optional[SizeCollector] = None,
            metrics: bool = True,
    ) -> Optional[Dict[str, Optional[float]]]:
        """One pass over the images.

        Args:
            model: A detector in evaluation mode.
            title: What the progress line calls the pass.
            collector: Receives gates and objects.
            metrics: Whether COCO's are wanted.

        Returns:
            `METRICS` in percent, None for one that cannot be measured; None without `metrics`.
        """
        self.evaluator.reset()
        for batch in _progress(self.loader, title):
            watch = contextlib.nullcontext()
            if collector is not None:
                watch = collector.batch(*zip(*map(self.objects, batch)))
            with watch:
                outputs = model(batch)
            if metrics:
                self.evaluator.process(batch, outputs)
        if not metrics:
            return None
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what we print better
            found = self.evaluator.evaluate()['bbox']
        return {key: found[key] if math.isfinite(found[key]) else None for key in METRICS}


def analyze_detector(
        cfg: CfgNode,
        model: nn.Module,
        controls: tuple[str, ...] = (),
        ap: bool = True,
        permutations: int = 999,
        shuffles: Optional[int] = None,
        alpha: float = 0.01,
        seed: int = 0,
) -> Dict[str, Any]:
    """The whole analysis of a detector on DATASETS.TEST.

    Args:
        cfg: Its config.
        model: The detector, weights loaded; its training mode is restored.
        controls: Names of `CONTROLS` to be run as well.
        ap: Whether to measure AP, which takes a pass for every expert.
        permutations, shuffles, alpha, seed: See `moe_zoo.analysis.object_sizes`; None shuffles as often as alpha needs.

    Returns:
        sizes: The `SizeAnalysis` of the detector.
        controls: Name to that of the control.
        ap: 'free' and 'expert 0', ... to `METRICS`; empty without `ap`.

    Raises:
        InputError: The detector has no routed layer, or the data set cannot be used.
    """
    layers = routed_layers(model)
    scenes = Scenes(cfg)
    shuffles = shuffles or max(1999, math.ceil(len(layers) / alpha))

    def collect(title: str, around: Callable = lambda collector: contextlib.nullcontext(), metrics: bool = False):
        collector = SizeCollector(model, shuffles, seed)
        with around(collector), collector:
            found = scenes.run(model, title, collector, metrics)
            return collector, collector.analyze(permutations, alpha), found

    training = model.training
    model.eval()
    try:
        collector, sizes, free = collect('left free', metrics=ap)
        around = {
            'untrained': lambda c: untrained_routers(collector.routers, seed + 1),
            'planted': lambda c: planted_sizes(model, c),
        }
        checked = {name: collect(f'control: {name}', around[name])[1] for name in controls}
        rows = {'free': free} if ap else {}
        for expert in range(min(layer.num_experts for layer in layers.values()) if ap else 0):
            with force_expert(model, expert, keep_mass=True):
                rows[f'expert {expert}'] = scenes.run(model, f'expert {expert} forced')
    finally:
        model.train(training)
    return {'sizes': sizes, 'controls': checked, 'ap': rows}


def report(found: Dict[str, Any]) -> str:
    """The analysis as text."""
    lines = [size_table(found['sizes'])]
    if found['ap']:
        lines += ['', 'AP in % by object size, one expert forced in every routed layer (with the whole combine weight)',
                  f'{"":<10}' + ''.join(f'{key:>8}' for key in METRICS)]
        for name, row in found['ap'].items():
            lines.append(f'{name:<10}' + ''.join(f'{"-":>8}' if v is None else f'{v:8.1f}' for v in row.values()))
    for name, control in found['controls'].items():
        lines += ['', *textwrap.wrap(control_sentence(name, control), 118)]
    return '\n'.join(lines)


def control_sentence(name: str, control: SizeAnalysis) -> str:
    """What a control had to show and did show."""
    expected, what = CONTROLS[name]
    strongest = max(control.layers, key=lambda layer: layer.separation)
    outcome = 'as it must' if control.separates == expected else 'AGAINST EXPECTATION: do not trust the verdicts above'
    return (f'Control {name} ({what}): {"separates" if control.separates else "does not separate"}, {outcome} '
            f'(separation {strongest.separation:.3f}, p = {strongest.chance_p:.3f} for permuted images, '
            f'{"none" if strongest.untrained_p is None else f"{strongest.untrained_p:.3f}"} for shuffled routers).')


@exit_on_input_error
def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    """Analyse a detector; see `--help`.

    Returns:
        What object_sizes.json holds.
    """
    parser = _parser()
    args = parser.parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    cfg, model = _load(args)
    output = Path(args.output or Path(cfg.OUTPUT_DIR) / 'object_sizes')
    cfg.OUTPUT_DIR = str(output)  # where detectron2 leaves its detections
    found = analyze_detector(
        cfg, model, tuple(dict.fromkeys(args.control)), args.ap, args.permutations, args.shuffles, args.alpha,
        args.seed)
    content = {
        'config': args.config_file, 'weights': args.weights, 'dataset': cfg.DATASETS.TEST[0],
        'sizes': found['sizes'].as_dict(), 'ap': found['ap'],
        'controls': {name: control.as_dict() for name, control in found['controls'].items()},
    }
    text = json.dumps(content, indent=1)
    print(text if args.json else report(found))
    with atomic_write(output / 'object_sizes.json') as part:
        part.write_text(text, encoding='utf-8')
    written = [output / 'object_sizes.json']
    if args.figure:
        written.append(save(size_figure(found['sizes'], found['ap']), output / 'object_sizes.png'))
    print(f'written: {", ".join(map(str, written))}', file=sys.stderr)
    return content


def _load(args: argparse.Namespace) -> tuple[CfgNode, nn.Module]:
    cfg = load_config(args.config_file, args.opts)
    if cfg.MODEL.DEVICE == 'cuda' and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = 'cpu'
    logging.getLogger('fvcore.common.checkpoint').setLevel(logging.WARNING)
    torch.manual_seed(args.seed)  # of what is drawn where no weights are given
    model = build_model(cfg)
    if args.weights:
        SafeCheckpointer(model, complete=True).load(args.weights)
    else:
        print('No --weights: an untrained detector is analysed.', file=sys.stderr)
    return cfg, model


def _progress(loader, title: str) -> Iterator[Any]:
    """Batches of a loader, with a line to stderr at the start and every five seconds."""
    total, start = len(loader), time.monotonic()
    last = start
    print(f'{title}: {total} batches', file=sys.stderr)
    for done, batch in enumerate(loader):
        now = time.monotonic()
        if done and now - last >= 5:
            last = now
            left = (now - start) / done * (total - done)
            print(f'{title}: {done} of {total}, about {left:.0f} s left', file=sys.stderr)
        yield batch


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        description='Which expert of a detector serves small, medium and large objects (COCO area limits), and AP by '
                    'size with every expert forced and left free. Prints a table; writes object_sizes.json and .png.',
        epilog='KEY VALUE pairs change the config, as in MOE.DATA.ROOT DIR.')
    parser.add_argument('--config-file', required=True, metavar='FILE', help='detectron2 yaml')
    parser.add_argument('--weights', default='', metavar='FILE', help='checkpoint (none: untrained)')
    parser.add_argument('--output', metavar='DIR', help='folder of the results (default: OUTPUT_DIR/object_sizes)')
    parser.add_argument('--json', action='store_true', help='print the JSON instead of the table')
    parser.add_argument('--figure', action=argparse.BooleanOptionalAction, default=True, help='draw the figure')
    parser.add_argument('--ap', action=argparse.BooleanOptionalAction, default=True,
                        help='measure AP by size, which takes one pass over the images for every expert')
    parser.add_argument('--control', action='append', choices=list(CONTROLS), default=[],
                        help='run the test on routers that must not (untrained) or must (planted) separate sizes')
    parser.add_argument('--permutations', type=int, default=999, metavar='N', help='of images (default: 999)')
    parser.add_argument('--shuffles', type=int, default=None, metavar='N',
                        help='of router weights (default: 1999, or more where many layers ask for it)')
    parser.add_argument('--alpha', type=float, default=0.01, help='level of both tests (default: 0.01)')
    parser.add_argument('--seed', type=int, default=0, help='of permutations, shuffles and controls (default: 0)')
    parser.add_argument('opts', nargs='*', metavar='KEY VALUE', help='config keys to change')
    return parser


if __name__ == '__main__':
    main()
