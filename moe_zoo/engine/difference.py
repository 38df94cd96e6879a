"""Is one run better than another? The difference of their accuracy on the same images (`moe-zoo compare`).

The interval is that of a paired bootstrap: images are drawn with replacement, the same ones for both sides; where there
are several seeds, seeds are drawn too. It speaks of other images of this kind and other seeds, not of other data.

Letters: N images, S seeds of a side.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from ..analysis.bootstrap import RESAMPLES, AccuracyDifference, paired_difference
from ..analysis.run_folders import Training
from ..analysis.runs import Run, read_runs
from ..errors import InputError, counted
from .evaluate import averaged, evaluate
from .outcomes import FILE, Outcomes, read_outcomes


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


def find_sides(paths: Sequence[Union[str, Path]]) -> List[Union[Path, Run]]:
    """Both sides of a comparison: runs, or files of outcomes.

    Args:
        paths: Two runs (folders) or files of outcomes; or one run, whose dense twin is the other side.

    Raises:
        InputError: A folder is no finished run, holds several, or has no twin.
    """
    sides: List[Union[Path, Run]] = [path if path.is_file() else find_run(path) for path in map(Path, paths)]
    if len(sides) > 1:
        return sides
    run, = sides
    if isinstance(run, Path) or run.twin is None:
        raise InputError(f"'{paths[0]}' has no dense twin beside it: name the other run, or train with --twin.")
    return [run, run.twin]


def find_run(path: Path) -> Run:
    """The one run in a folder, its twin aside.

    Raises:
        InputError: There is none that is finished, or there are several.
    """
    found = read_runs([path])
    for sentence in found.left_out:
        print(f'warning: {sentence}', file=sys.stderr)
    root = path.resolve()
    runs = [run for run in found.runs
            if 'twin' not in run.trainings[0].folder.resolve().relative_to(root).parts] or found.runs
    if len(runs) > 1:
        raise InputError(f"'{path}' holds {len(runs)} runs ({', '.join(run.name for run in runs[:4])}): name one.")
    return runs[0]


def open_side(side: Union[Path, Run], overrides: Mapping[str, Any]) -> Side:
    """What one side made of every image.

    Args:
        side: Of `find_sides`.
        overrides: Options by which the checkpoints are evaluated anew, such as another data_dir; without any, what the
            runs kept of their last evaluation will do.

    Raises:
        InputError: It is a detector's, or has neither outcomes nor a checkpoint.
    """
    if isinstance(side, Run) and side.kind != 'classification':
        raise InputError(f"'{side.trainings[0].folder}' is a detector's run: compare it with another detector's.")
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
) -> Tuple[List[Side], AccuracyDifference]:
    """Two runs (or a run and its twin) and the difference of their accuracy, see `find_sides`, `paired_difference`.

    Raises:
        InputError: A run cannot be used, or they saw different images.
    """
    sides = [open_side(side, overrides) for side in find_sides(paths)]
    check_same_images(sides)
    paired = sides[0].seeds == sides[1].seeds
    return sides, paired_difference(sides[0].right, sides[1].right, paired, resamples, random_state)
