"""Is one run better than another? Two runs, or a run and its twin, on the same images: `moe-zoo compare`.

    moe-zoo compare output/train/vmoe output/train/vit      # two runs, or the folders of their seeds
    moe-zoo compare output/train/vmoe                       # a run and the dense twin that was trained beside it
    moe-zoo compare output/moe output/dense                 # two detectors

Difference of top-1 accuracy (of AP) with the 95 % interval of a paired bootstrap: images are drawn with replacement,
the same ones for both sides; where there are several seeds, seeds are drawn too.
"""
import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, List, Mapping, Optional, Sequence

from ..analysis.bootstrap import RESAMPLES, AccuracyDifference
from ..analysis.runs import Run
from ..errors import InputError, MissingPackage, atomic_write, counted, exit_on_input_error
from .compare import mean_and_deviation
from .config import parse_command_line, parse_overrides
from .difference import Side, compare_runs, find_sides

FEWER = 1000  # resamples of detectors, whose AP takes a while


def describe(sides: Sequence[Side], found: AccuracyDifference) -> List[str]:
    """The comparison as lines to print."""
    lines = []
    for side, scores in zip(sides, (found.ours, found.theirs)):
        of = f' over {counted(len(scores), "seed")}' if len(scores) > 1 else ''
        cost = f'; at most {side.run.macs_max:,.0f} MACs an image' if side.run and side.run.macs_max else ''
        lines.append(f'{side.name}: top-1 {mean_and_deviation(scores)} %{of}{cost}')
    drawn = f'the {counted(found.images, "image")}'
    if max(len(found.ours), len(found.theirs)) > 1:
        drawn += ' and the seeds, ' + ('in pairs' if found.paired_seeds else 'each side by itself')
    verdict = 'it leaves out 0' if found.told else 'it holds 0: the two cannot be told apart by these images'
    lines += [
        f'difference {found.mean:+.2f} points, 95 % interval {found.low:+.2f} to {found.high:+.2f}: {verdict}',
        f'right on both {found.both:,.4g}, on the first alone {found.only_ours:,.4g}, on the second alone '
        f'{found.only_theirs:,.4g}, on neither {found.neither:,.4g}'
        + (' (mean over seeds)' if max(len(found.ours), len(found.theirs)) > 1 else ''),
        f'paired bootstrap: {found.resamples:,} resamples of {drawn}; random state {found.random_state}',
    ]
    if min(len(found.ours), len(found.theirs)) == 1:
        lines.append('one seed: how much another seed would change the result is not in the interval')
    elif min(len(found.ours), len(found.theirs)) < 4:
        lines.append('few seeds: where seeds differ by more than images do, the interval is too narrow')
    return lines


def parser() -> argparse.ArgumentParser:
    """The command line; options of the evaluation are `key=value`."""
    result = argparse.ArgumentParser(
        prog=sys.argv[0], formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog='Classifiers are compared by what they kept of their last evaluation (outcomes.json), or by their last\n'
               'checkpoint; detectors by inference/coco_instances_results.json of their last evaluation.')
    add = result.add_argument
    add('runs', metavar='RUN', nargs='+',
        help='folder of a run or of its seeds, or a file of eval-imagenet --outcomes; one run alone: against its twin')
    add('--data-dir', metavar='DIR', help='evaluate both classifiers on these images instead; also val_split=NAME')
    add('--per-image-groups', action='store_true',
        help='evaluate both classifiers anew, with routing groups of one image each')
    add('--resamples', type=int, metavar='R', help=f'draws of images (default {RESAMPLES}; of detectors {FEWER})')
    add('--seed', type=int, default=0, metavar='N', help='random state of the draws (default 0)')
    add('--json', metavar='OUT', help='also write the figures to this file')
    return result


@exit_on_input_error
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser()
    arguments.set_defaults(options=[])
    flags, overrides = parse_command_line(argv, arguments)
    options = [text for text in flags.runs if '=' in text and not Path(text).exists()]
    overrides.update(parse_overrides(options))
    if flags.per_image_groups:
        overrides['per_image_groups'] = True
    paths = [path for path in flags.runs if path not in options]
    if len(paths) not in (1, 2):
        raise InputError(f'{counted(len(paths), "run")} given: name two runs, or one that has a twin.')
    if any(isinstance(side, Run) and side.kind == 'detection' for side in find_sides(paths)):
        lines, figures = _compare_detectors(paths, overrides, flags)
    else:
        sides, found = compare_runs(paths, overrides, flags.resamples or RESAMPLES, flags.seed)
        lines, figures = describe(sides, found), {'sides': [side.name for side in sides], **asdict(found)}
    print('\n'.join(lines))
    if flags.json:
        with atomic_write(flags.json) as temporary:
            temporary.write_text(json.dumps(figures, indent=1) + '\n')
    return 0


def _compare_detectors(paths: Sequence[str], overrides: Mapping[str, Any], flags: argparse.Namespace):
    try:
        from ..detection.difference import compare_detectors
    except ModuleNotFoundError as error:
        raise MissingPackage(f'Detectors are compared with {error.name!r}, which is not installed: tools/setup.sh '
                             'installs what detection needs.') from error
    if overrides:
        raise InputError(f'{", ".join(overrides)}: detectors are compared by the detections of their last evaluation, '
                         'which no option changes; evaluate them anew by train-coco --eval-only.')
    names, found = compare_detectors(find_sides(paths), flags.resamples or FEWER, flags.seed)
    verdict = 'it leaves out 0' if found.told else 'it holds 0: the two cannot be told apart by these images'
    lines = [f'{name}: AP of boxes {mean_and_deviation(scores)} %'
             for name, scores in zip(names, (found.ours, found.theirs))]
    return [
        *lines,
        f'difference {found.mean:+.2f} points, 95 % interval {found.low:+.2f} to {found.high:+.2f}: {verdict}',
        f'paired bootstrap: {found.resamples:,} resamples of the {counted(found.images, "image")}; random state '
        f'{found.random_state}'], {'sides': names, **asdict(found)}


if __name__ == '__main__':
    raise SystemExit(main())
