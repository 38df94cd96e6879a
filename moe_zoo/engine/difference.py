"""Is one run better than another? The difference of their accuracy on the same images: `moe-zoo compare`.

    moe-zoo compare output/train/vmoe output/train/vit      # two runs, or the folders of their seeds
    moe-zoo compare output/train/vmoe                       # a run and the dense twin that was trained beside it

The interval is that of a paired bootstrap: images are drawn with replacement, the same ones for both sides; where there
are several seeds, seeds are drawn too. It speaks of other images of this kind and other seeds, not of other data.

Letters: N images, S seeds of a side, R resamples, P patterns (images that all seeds of both sides judge alike).
"""
import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from ..analysis.run_folders import Training
from ..analysis.runs import Run, read_runs
from ..errors import InputError, atomic_write, counted, exit_on_input_error
from .compare import mean_and_deviation
from .config import parse_command_line
from .evaluate import averaged, evaluate
from .outcomes import FILE, Outcomes, read_outcomes

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 1 << 22  # numbers drawn at a time


@dataclass(frozen=True)
class Difference:
    """What a paired bootstrap says of one side minus the other. Accuracies in percent, differences in points.

    Attributes:
        ours, theirs: (S,) accuracy by seed.
        mean: Difference of their means.
        low, high: Ends of the 95 % interval.
        images, resamples, random_state: Of the bootstrap.
        paired_seeds: Whether seeds were drawn in pairs, as both sides have the same ones.
        only_ours, only_theirs, both, neither: Images that one side, both or none got right; with several seeds the
            mean over pairs (of one seed of each side).
    """
    ours: Tuple[float, ...]
    theirs: Tuple[float, ...]
    mean: float
    low: float
    high: float
    images: int
    resamples: int
    random_state: int
    paired_seeds: bool
    only_ours: float
    only_theirs: float
    both: float
    neither: float

    @property
    def told(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def paired_difference(
        ours: np.ndarray,
        theirs: np.ndarray,
        paired_seeds: bool = False,
        resamples: int = RESAMPLES,
        random_state: int = 0,
) -> Difference:
    """Bootstrap the difference of two accuracies on the same images.

    A resample draws N of the N images for both sides alike. Of S > 1 seeds it draws S - 1, with replacement: the mean
    of S - 1 draws from S values has the variance of the values with divisor S (S - 1), which is the unbiased one of
    the mean of S seeds. What image and seed do together is drawn with both: the interval is rather wide than narrow.

    Args:
        ours: (S, N) whether the seeds of one side got the images right.
        theirs: (S, N) of the other side, which may have another number of seeds.
        paired_seeds: Row s of both sides belongs together (the same seed, so the same batches).
        resamples: R.
        random_state: Of the draws.

    Raises:
        InputError: There are no images, not equally many, or no resamples.
    """
    ours, theirs = (np.atleast_2d(np.asarray(side, dtype=bool)) for side in (ours, theirs))
    if ours.shape[1] != theirs.shape[1] or not ours.size or paired_seeds and len(ours) != len(theirs):
        raise InputError(f'A paired comparison needs the same images (and seeds) on both sides, not {ours.shape} and '
                         f'{theirs.shape} outcomes.')
    if resamples < 100:
        raise InputError(f'--resamples {resamples}: give at least 100, or there is no interval to speak of.')
    patterns, counts = np.unique(np.concatenate([ours, theirs]), axis=1, return_counts=True)
    first, second = (side.astype(float) for side in np.split(patterns, [len(ours)]))  # (S, P) each
    images, random = ours.shape[1], np.random.default_rng(random_state)
    found = []
    step = max(1, CHUNK // len(counts))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        weights = random.multinomial(images, counts / images, size) / images  # (R, P)
        if paired_seeds:
            found.append(((weights @ (first - second).T) * _seeds(random, size, len(first))).sum(axis=1))
        else:
            found.append(sum(
                sign * ((weights @ side.T) * _seeds(random, size, len(side))).sum(axis=1)
                for sign, side in ((1, first), (-1, second))))
    low, high = np.quantile(np.concatenate(found), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    right, theirs_right = ours.mean(axis=0), theirs.mean(axis=0)  # (N,) share of the seeds
    both = (ours & theirs).mean(axis=0).sum() if paired_seeds else (right * theirs_right).sum()
    return Difference(
        tuple(100 * ours.mean(axis=1)), tuple(100 * theirs.mean(axis=1)), 100 * float((right - theirs_right).mean()),
        100 * float(low), 100 * float(high), images, resamples, random_state, paired_seeds,
        only_ours=float(right.sum() - both), only_theirs=float(theirs_right.sum() - both), both=float(both),
        neither=float(images - right.sum() - theirs_right.sum() + both))


def _seeds(random: np.random.Generator, size: int, seeds: int) -> np.ndarray:
    """(R, S) weights of the seeds in every resample."""
    draws = max(1, seeds - 1)
    return random.multinomial(draws, np.full(seeds, 1 / seeds), size) / draws


# ---- runs

@dataclass
class Side:
    """One side of a comparison.

    Attributes:
        name: For the sentences.
        seeds: As trained; (None,) for a file of outcomes.
        outcomes: Of every seed.
        run: None for a file of outcomes.
    """
    name: str
    seeds: Tuple[Optional[int], ...]
    outcomes: List[Outcomes]
    run: Optional[Run] = None

    @property
    def right(self) -> np.ndarray:
        """(S, N)"""
        return np.stack([outcomes.right for outcomes in self.outcomes])


def open_sides(
        paths: Sequence[Union[str, Path]],
        overrides: Mapping[str, Any] = {},  # noqa: B006 - read only
) -> List[Side]:
    """Both sides of a comparison.

    Args:
        paths: Two runs (folders) or files of outcomes; or one run, whose dense twin is the other side.
        overrides: Options by which the checkpoints are evaluated anew, such as another data_dir; without any, what the
            runs kept of their last evaluation will do.

    Raises:
        InputError: A path is no finished run, holds several, has no twin, or is a detector's.
    """
    sides: List[Any] = []
    for path in map(Path, paths):
        sides.append(path if path.is_file() else _find_run(path))
    if len(sides) == 1:
        run = sides[0]
        if isinstance(run, Path) or run.twin is None:
            raise InputError(f"'{paths[0]}' has no dense twin beside it: name the other run, or train with --twin.")
        sides.append(run.twin)
    return [_open_side(side, overrides) for side in sides]


def _find_run(path: Path) -> Run:
    """The one run in a folder (its twin aside)."""
    found = read_runs([path])
    for sentence in found.left_out:
        print(f'warning: {sentence}', file=sys.stderr)
    root = path.resolve()
    runs = [run for run in found.runs
            if 'twin' not in run.trainings[0].folder.resolve().relative_to(root).parts] or found.runs
    if len(runs) > 1:
        raise InputError(f"'{path}' holds {len(runs)} runs ({', '.join(run.name for run in runs[:4])}): name one.")
    if runs[0].kind == 'detection':
        raise InputError(
            f"'{path}' is a detector's run: average precision is no mean over images, and its folder keeps no outcome "
            'of an image; only classifiers are compared.')
    return runs[0]


def _open_side(side: Union[Path, Run], overrides: Mapping[str, Any]) -> Side:
    if isinstance(side, Run):
        outcomes = [outcomes_of(training, overrides) for training in side.trainings]
        return Side(side.name, side.seeds, outcomes, side)
    if overrides:
        raise InputError(f"'{side}' is a file of outcomes, which cannot be evaluated anew: name runs, or leave out "
                         f'{", ".join(overrides)}.')
    found = read_outcomes(side)
    return Side(side.stem, (None,), [found])


def outcomes_of(training: Training, overrides: Mapping[str, Any] = {}) -> Outcomes:  # noqa: B006 - read only
    """What a run made of every image at its end: as it kept it, or by its last checkpoint.

    Args:
        training: One finished training.
        overrides: Options by which the checkpoint is evaluated anew.

    Raises:
        InputError: There is neither, or the data are gone.
    """
    kept = training.folder / FILE
    if kept.is_file() and not overrides:
        return read_outcomes(kept)
    if training.checkpoint is None:
        raise InputError(f"'{training.folder}' keeps neither {FILE} nor last.pth.tar.")
    print(f"evaluating '{training.checkpoint}'", file=sys.stderr)
    found = evaluate_run(training, overrides)['outcomes']
    if not overrides:
        found.write(kept)
    return found


def evaluate_run(training: Training, overrides: Mapping[str, Any] = {}, **options) -> Dict[str, Any]:  # noqa: B006
    """`evaluate` of the weights that a run ended with (of their average, if it has one), cropping as training did."""
    options = {'usage': False, 'quiet': True, **options}
    return evaluate(overrides=overrides, checkpoint=training.checkpoint, use_ema=averaged(training.options),
                    as_trained=True, **options)


def check_same_images(sides: Sequence[Side]) -> None:
    """Raises: InputError: Not all seeds of all sides saw the same images in the same order."""
    def name(side: Side, seed: Optional[int]) -> str:
        return f"'{side.name}'" + (f' (seed {seed})' if len(side.seeds) > 1 else '')

    remedy = 'give --data-dir DIR (and val_split=NAME) to evaluate both on the same images.'
    every = [(name(side, seed), one) for side in sides for seed, one in zip(side.seeds, side.outcomes)]
    (first, wanted), *others = every
    for other, found in others:
        if len(found) != len(wanted):
            raise InputError(f'{first} saw {counted(len(wanted), "image")}, {other} {len(found):,}: {remedy}')
        for i in range(len(wanted)):
            if found.images[i] != wanted.images[i]:
                alike = sorted(found.images) == sorted(wanted.images)
                order = 'the images in another order' if alike else 'other images'
                raise InputError(f"{other} saw {order}: image {i + 1} is '{wanted.images[i]}' for {first} and "
                                 f"'{found.images[i]}' there; {remedy}")
        wrong = (found.targets != wanted.targets).nonzero()[0]
        if len(wrong):
            i = int(wrong[0])
            raise InputError(f"{other} saw other labels: image '{wanted.images[i]}' is of class {wanted.targets[i]} "
                             f'for {first} and {found.targets[i]} there; {remedy}')


def compare_runs(
        paths: Sequence[Union[str, Path]],
        overrides: Mapping[str, Any] = {},  # noqa: B006 - read only
        resamples: int = RESAMPLES,
        random_state: int = 0,
) -> Tuple[List[Side], Difference]:
    """Two runs (or a run and its twin) and the difference of their accuracy, see `open_sides`, `paired_difference`.

    Raises:
        InputError: A run cannot be used, or they saw different images.
    """
    sides = open_sides(paths, overrides)
    check_same_images(sides)
    paired = sides[0].seeds == sides[1].seeds
    return sides, paired_difference(sides[0].right, sides[1].right, paired, resamples, random_state)


# ---- command line

def describe(sides: Sequence[Side], found: Difference) -> List[str]:
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
    return lines


def parser() -> argparse.ArgumentParser:
    """The command line; options of the evaluation are `key=value`."""
    result = argparse.ArgumentParser(
        prog=sys.argv[0], formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__,
        epilog='Runs are compared by what they kept of their last evaluation (outcomes.json), or by their last '
               'checkpoint.\nAverage precision of detectors is not compared: nothing of it is kept by image.')
    add = result.add_argument
    add('runs', metavar='RUN', nargs='+',
        help='folder of a run or of its seeds, or a file of eval-imagenet --outcomes; one run alone: against its twin')
    add('--data-dir', metavar='DIR', help='evaluate both on these images instead; also val_split=NAME')
    add('--resamples', type=int, default=RESAMPLES, metavar='R', help=f'draws of images (default {RESAMPLES})')
    add('--seed', type=int, default=0, metavar='N', help='random state of the draws (default 0)')
    add('--json', metavar='OUT', help='also write the figures to this file')
    return result


@exit_on_input_error
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = parser()
    arguments.set_defaults(options=[])
    flags, overrides = parse_command_line(argv, arguments)
    texts = [text for text in flags.runs if '=' in text and not Path(text).exists()]
    if texts:
        from .config import parse_overrides
        overrides.update(parse_overrides(texts))
    paths = [path for path in flags.runs if path not in texts]
    if len(paths) not in (1, 2):
        raise InputError(f'{counted(len(paths), "run")} given: name two runs, or one that has a twin.')
    sides, found = compare_runs(paths, overrides, flags.resamples, flags.seed)
    print('\n'.join(describe(sides, found)))
    if flags.json:
        with atomic_write(flags.json) as temporary:
            temporary.write_text(json.dumps({'sides': [side.name for side in sides], **asdict(found)}, indent=1) + '\n')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
