"""The command of the experiments: `tools/reproduce.py NAME...`, `moe-zoo reproduce NAME...`."""
import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Optional

from rich.console import Console

from moe_zoo.errors import InputError, MissingPackage, exit_on_input_error

from . import FILES, find_experiment
from .report import checkout, draw_figures, publish, verdict_line, write_page
from .runner import reproduce

HELP = """\
Train the arms of an experiment over several seeds, test its claims and write

  DIR/index.html          one section for every experiment that was run: figures, tables, verdicts
  DIR/NAME/results.json   the plan (claims, test, seeds, smallest detectable effect), fixed before the first run, and
                          every number that came out
  DIR/NAME/runs/          one file a finished run: an interrupted experiment goes on where it was

The verdict on a claim is "effect seen" or "opposite" where the 95 % interval of the paired difference is on one side
of 0; "not seen" where it is not, although an effect as large as the paper's would have been found; else "undecided".

examples:
  python tools/reproduce.py --list
  python tools/reproduce.py condconv
  python tools/reproduce.py condconv --data-dir cifar10 --seeds 10
  python tools/reproduce.py finetune-cnn finetune-vit --data-dir cifar10
  python tools/reproduce.py all
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add('names', metavar='NAME', nargs='*', help='experiments, or "all"')
    add('--list', action='store_true', help='print the experiments and what each of them asks')
    add('--seeds', metavar='N', type=int, help="seeds 0 to N - 1 (default: the experiment's own number)")
    add('--data-dir', metavar='DIR', help="images in place of scikit-learn's digits: folders of one class each in "
        'train/ and test/ (or val/), or an npz with x_train, y_train, x_test, y_test; vowels: a CSV of the table')
    add('--jobs', metavar='J', type=int, help='worker processes, of one thread each (default: one for every core)')
    add('--output', metavar='DIR', type=Path, default=Path('runs/reproduce'), help='folder of all this (default: '
        '%(default)s); choose another one for other images, whose results take the place of those that are there')
    add('--pilot', action='store_true', help='measure on the validation images, with other seeds, into DIR/pilot: for '
        'choosing hyper-parameters and the deviation that a claim expects')
    add('--publish', action='store_true', help='copy the results, without the single runs, to docs/experiments, and '
        "renew the README's table and figures, docs/families and the cards from what is there; results on other data "
        'than those of NAME.json go to NAME-DATA.json')
    add('--figures', action='store_true', help="run nothing: draw the README's figures, docs/figures, again from "
        'docs/experiments')
    add('--page', action='store_true', help='run nothing: write the page again from the results in DIR')
    return result


@exit_on_input_error
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run experiments; returns the exit code."""
    args = parser().parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)
    if args.list:
        for name in FILES:
            experiment = find_experiment(name)
            console.print(f'{name:<20}{experiment.claims[0].text}', markup=False)
        return 0
    if args.page:
        console.print(f"page in '{write_page(args.output)}'", markup=False)
        return 0
    if args.figures:
        for path in draw_figures(checkout()):
            console.print(f"figure in '{path}'", markup=False)
        return 0
    if not args.names:
        raise InputError(f'Name an experiment, or all: {", ".join(FILES)}.')
    if args.jobs is not None and args.jobs < 1:
        raise InputError(f'--jobs {args.jobs}: at least one process is needed.')
    if args.pilot:
        if args.publish:
            raise InputError('--pilot --publish: a pilot chooses; only what was measured on test images is published.')
        args.output /= 'pilot'
    experiments = [find_experiment(name) for name in (FILES if 'all' in args.names else args.names)]
    for experiment in experiments:
        try:
            _run(experiment, args, console)
        except MissingPackage as error:
            if len(experiments) == 1:
                raise
            console.print(f'{experiment.name} is left out: {error}', markup=False)
    if (args.output / 'index.html').is_file():
        console.print(f"page in '{args.output / 'index.html'}'", markup=False)
    return 0


def _run(experiment, args: argparse.Namespace, console: Console) -> None:
    """One experiment to its verdict line; the page says so where it ends early."""
    page = partial(write_page, args.output, experiment.name)
    try:
        results = reproduce(
            experiment, args.output, args.seeds, args.data_dir, args.jobs, args.pilot, on_change=page)
    except (InputError, RuntimeError, KeyboardInterrupt) as error:
        if (args.output / experiment.name / 'results.json').is_file():
            page(failure=str(error) or 'Interrupted: the same command goes on from here.')
        raise
    if args.pilot:
        for claim, found in zip(experiment.claims, results['claims']):
            console.print(
                f'{claim.better} minus {claim.worse}, {claim.metric}: {found["difference"]:+.3g}, deviation of the '
                f'paired differences {found["deviation"]:.3g}', markup=False)
        return
    console.print(f'{experiment.name}: {verdict_line(results)}', markup=False)
    if args.publish:
        console.print(f"published in '{publish(results)}'", markup=False)
