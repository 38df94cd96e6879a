"""What the folder of a run does not tell, measured on its checkpoint: MACs that run, time, who does the work.

MACs are counted image by image on some of the evaluation images, expert use on more of them. Time is that of one image,
forward, on the machine that measures: all runs on one data set take turns, so that what disturbs one disturbs all. What
was measured is kept in a file and taken from there as long as the checkpoint is the same.
"""
import json
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..documents import parse_json
from ..errors import InputError, atomic_write
from ..layers import ChannelGate, RoutedLayer, ShallowEmbedding
from .cost import count, count_images
from .run_folders import Training
from .runs import LayerUse, Measured, Run, by_data
from .timing import alternate, machine
from .usage import LayerUsage, measure_usage

COUNTED = 16  # images whose MACs are counted
USED = 1000  # images at most on which expert use is measured
ROUNDS, ROUND = 9, .1  # of timing, and seconds of one at least


@dataclass
class Opened:
    """The model of a training, ready to run.

    Attributes:
        model: In evaluation mode, with the weights of the checkpoint.
        inputs: What the model takes for one image, for up to `COUNTED` images, evenly over the evaluation data.
        batches: Evaluation data for `measure_usage`; None where there are none.
        real: Whether `inputs` are images of the data; otherwise one of noise, because the data are not there.
        device: Where the model is.
        precision: A context that the recipe evaluates under.
    """
    model: nn.Module
    inputs: Sequence[Any]
    batches: Iterable | None
    real: bool
    device: str = 'cpu'
    precision: Callable[[], AbstractContextManager] = nullcontext

    @property
    def input_size(self) -> tuple[int, ...]:
        first = self.inputs[0]
        return tuple(first[0]['image'].shape) if isinstance(first, list) else tuple(first.shape[1:])

    def forward(self) -> None:
        """One image through the model, to the end."""
        with torch.inference_mode(), self.precision():
            self.model(self.inputs[0])
        if self.device.startswith('cuda'):
            torch.cuda.synchronize()


def measure_runs(
        runs: Sequence[Run],
        reopen: Callable[[Training], Opened],
        kept: Path,
        say: Callable[[str], None] = lambda text: None,
) -> None:
    """Give every run its `measured`, and a sentence in its `problems` where that is not possible.

    Args:
        runs: From `read_runs`. The first seed of each is measured.
        reopen: Brings back the model of a training and its data, or raises InputError.
        kept: File that holds what was measured before, and then what was measured now.
        say: Told of what is being done.

    Raises:
        InputError: `kept` cannot be written because the disk is full.
    """
    known = _known(kept)
    for group in by_data(runs).values():
        stamps = {run.name: _stamp(run) for run in group}
        for run in group:
            entry = known.get(_key(run))
            if entry and entry['stamp'] == stamps[run.name]:
                _adopt(run, entry['measured'])
        missing = [run for run in group if run.measured is None]
        if missing:
            _measure_group(group, missing, reopen, say)
        for run in group:
            if run.measured:
                known[_key(run)] = {'stamp': stamps[run.name], 'measured': run.measured}
    with atomic_write(kept) as part:
        content = {key: {**entry, 'measured': asdict(entry['measured'])} for key, entry in known.items()}
        part.write_text(json.dumps(content, indent=1), encoding='utf-8')


def recall(runs: Sequence[Run], kept: Path) -> None:
    """Give every run what was measured before, and nothing else."""
    known = _known(kept)
    for run in runs:
        entry = known.get(_key(run))
        if entry and entry['stamp'] == _stamp(run):
            _adopt(run, entry['measured'])


def _adopt(run: Run, measured: Measured) -> None:
    run.measured = measured
    for name in ('parameters', 'active_parameters', 'macs_max'):  # a detector's folder does not tell
        if getattr(run, name) is None:
            setattr(run, name, getattr(measured, name))


def _measure_group(
        group: Sequence[Run],
        missing: Sequence[Run],
        reopen: Callable[[Training], Opened],
        say: Callable[[str], None],
) -> None:
    """Count what is missing, and time all of a group anew: times are compared within one session only."""
    opened: dict[str, Opened] = {}
    for run in group:
        try:
            say(f'{run.name}: measuring' if run in missing else f'{run.name}: timing again beside the new ones')
            opened[run.name] = _reopened(run, reopen)
            if run in missing:
                _adopt(run, measure(opened[run.name]))
        except (InputError, OSError, RuntimeError) as error:  # RuntimeError: torch's, of weights that do not fit
            run.problems.append(f'it was not measured: {" ".join(str(error).split())}')
            opened.pop(run.name, None)
    if not opened:
        return
    say(f'timing one image of {len(opened)} models in turns, {ROUNDS} rounds')
    seconds = alternate([each.forward for each in opened.values()], ROUNDS, min_seconds=ROUND).seconds
    session, device = time.strftime('%Y-%m-%d %H:%M:%S'), next(iter(opened.values())).device
    for run in group:
        if run.name in opened and run.measured:
            rounds = seconds[list(opened).index(run.name)]
            run.measured = replace(run.measured, seconds=tuple(rounds), session=session, machine=machine(device))


def _reopened(run: Run, reopen: Callable[[Training], Opened]) -> Opened:
    training = run.trainings[0]
    if training.checkpoint is None:
        raise InputError(f"there is no checkpoint in '{training.folder}'.")
    opened = reopen(training)
    if not opened.real:
        run.problems.append(
            'its data are not where they were: MACs and time are those of noise, the use of its experts is unknown.')
    return opened


def measure(opened: Opened) -> Measured:
    """Everything but time."""
    model = opened.model
    with opened.precision():
        cost = count(model, opened.inputs[0])
        images = count_images(model, opened.inputs)
        layers = _use(opened) if opened.batches is not None else ()
    return Measured(
        images=len(opened.inputs) if opened.real else 0, input_size=opened.input_size, parameters=cost.parameters,
        active_parameters=cost.active_parameters, macs_max=sum(images.at_most) / len(images.at_most),
        macs_executed=images.mean, macs_sd=images.std, uncounted=tuple(images.uncounted), layers=layers)


def _use(opened: Opened) -> tuple[LayerUse, ...]:
    modules = dict(opened.model.named_modules())
    if not any(isinstance(module, RoutedLayer) for module in modules.values()):
        return ()
    try:
        usages = measure_usage(opened.model, opened.batches)
    except InputError:  # routed layers, none of them active
        return ()
    return tuple(
        layer_use(usage, isinstance(modules.get(name), ChannelGate)) for name, usage in usages.items()
        if not isinstance(modules.get(name), ShallowEmbedding))  # whose experts are classes


def layer_use(usage: LayerUsage, channels: bool = False) -> LayerUse:
    """The same as plain numbers."""
    return LayerUse(
        usage.name, tuple(usage.share.tolist()), tuple(usage.importance.tolist()), usage.entropy, usage.dropped,
        tuple(usage.dead), channels)


# ---- what was measured before

def _key(run: Run) -> str:
    return str(run.trainings[0].folder.resolve())


def _stamp(run: Run) -> list[int]:
    """Changes with the checkpoint."""
    if run.trainings[0].checkpoint is None:
        return []
    found = run.trainings[0].checkpoint.stat()
    return [found.st_size, found.st_mtime_ns]


def _known(kept: Path) -> dict[str, dict[str, Any]]:
    """What the file holds; nothing where it is missing or not ours: it can be measured again."""
    try:
        content = parse_json(kept.read_text(encoding='utf-8'))
        return {key: {**entry, 'measured': Measured.from_json(entry['measured'])} for key, entry in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
