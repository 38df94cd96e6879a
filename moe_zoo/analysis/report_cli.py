"""One page about finished runs: `moe-zoo report`.

    moe-zoo report runs/vmoe_digits runs/condconv_digits --out runs/report
"""
import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from .. import __version__
from ..errors import counted, exit_on_input_error
from ..layers.expert_mlps import group_by_image
from .measure_runs import Opened, measure_runs, recall
from .report_page import report_page
from .run_folders import Training
from .runs import Found, read_runs


def reopen(training: Training, per_image_groups: bool = False) -> Opened:
    """The model of a training and its data, by the package that trained it.

    Args:
        per_image_groups: Make routing groups of one image each.

    Raises:
        InputError: They cannot be had.
    """
    if training.kind == 'classification':
        from ..engine.reopen import reopen as reopen_of_kind
    else:
        from ..detection.reopen import reopen as reopen_of_kind
    opened = reopen_of_kind(training)
    if per_image_groups:
        group_by_image(opened.model)
    return opened


def report(paths: Sequence[Path], out: Path, measure: bool = True, per_image_groups: bool = False) -> Found:
    """Read runs, measure what their folders do not tell, and write `out`/index.html.

    Args:
        paths: Folders of runs, or folders that hold such.
        out: Receives the page, and measured.json, from which a second report takes what did not change.
        measure: Whether to measure; otherwise only what measured.json knows is shown.
        per_image_groups: Measure with routing groups of one image each; what was so measured has a file of its own.

    Returns:
        What is on the page.

    Raises:
        InputError: No finished run is left.
    """
    found = read_runs(paths)
    for sentence in found.left_out:
        _say(f'left out: {sentence}')
    kept = out / ('measured_by_image.json' if per_image_groups else 'measured.json')
    if measure:
        measure_runs(found.runs, functools.partial(reopen, per_image_groups=per_image_groups), kept, _say)
    else:
        recall(found.runs, kept)
    report_page(found, [('Written by', f'moe_zoo {__version__}')]).write(out / 'index.html')
    return found


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog=sys.argv[0],
        description='Puts finished runs side by side on one page that needs no network: accuracy against the MACs that '
                    'ran and against time, mixtures joined to their dense twins, learning curves with the balance of '
                    'the experts, who does the work, dead experts, and a table to sort and filter. A folder that is '
                    'unfinished, damaged or no run is named and left out.',
        epilog='Example: moe-zoo train-imagenet --config configs/digits/softmoe_vit_s.yaml output=runs '
               'experiment=softmoe --twin --seeds 0 1 2, then moe-zoo report runs/softmoe --out runs/report, and open '
               'runs/report/index.html. Runs that differ in nothing but the seed become one point with its deviation; '
               'the dense twin is found beside its mixture, or by its recipe. To show what analyze-experts and '
               'analyze-object-sizes found too, let them write into the folder of the run (--out RUN/experts, '
               '--output RUN/object_sizes).')
    add = result.add_argument
    add('runs', nargs='+', metavar='RUN', type=Path,
        help='folder that train-imagenet or train-coco wrote, or one that holds several')
    add('--out', metavar='DIR', type=Path, required=True, help='where to write index.html and measured.json')
    add('--no-measure', action='store_true',
        help='build no model: show MACs at most, without time and expert use, or what measured.json knows')
    add('--per-image-groups', action='store_true',
        help='measure with routing groups of one image each: what capacity drops then depends on no batch size')
    add('--paper', metavar='DIR', type=Path,
        help='also write every figure as PDF and SVG at the width of one and of two columns, the table as LaTeX and '
             'CSV, and the BibTeX of the families')
    return result


@exit_on_input_error
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit code."""
    flags = parser().parse_args(argv)
    found = report(flags.runs, flags.out, not flags.no_measure, flags.per_image_groups)
    if flags.paper:
        from .paper import write_paper
        write_paper(found.runs, flags.paper)
        _say(f'for a paper: {flags.paper}')
    print(f'{counted(len(found.runs), "model")}: {flags.out / "index.html"}')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
