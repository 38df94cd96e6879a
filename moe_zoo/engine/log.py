"""What a run tells: progress with the time left, losses by name, balance by layer, summary.csv, TensorBoard, warnings.

Letters: E experts.
"""
import contextlib
import csv
import math
import sys
import time
from pathlib import Path
from typing import Any, Callable, Collection, Dict, Iterable, List, Mapping, Optional

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..errors import atomic_write

Row = Dict[str, Any]
LEAST_SHARE = 0.1  # of the fair share: below it an expert is as good as unused


class EpochLog:
    """Running sums of one epoch, kept on the device so that no step waits for them."""

    def __init__(self):
        self.weight = 0.0
        self.losses: Dict[str, torch.Tensor] = {}
        self.layers: Dict[str, Dict[str, torch.Tensor]] = {}
        self.reduced = False

    def add(self, result: Mapping[str, Any], images: int) -> None:
        """Add one forward of the task: its losses and balance, weighted by the images it saw."""
        self.weight += images
        for name, value in result.items():
            if name == 'task_loss' or name.startswith('loss'):
                self.losses[name] = self.losses.get(name, 0.0) + _wide(value) * images
        for layer, measures in result['balance'].items():
            sums = self.layers.setdefault(layer, {})
            for name, value in measures.items():
                sums[name] = sums.get(name, 0.0) + _wide(value) * images

    def reduce(self) -> None:
        """Sum over the ranks, at the end of the epoch; again, nothing, also after a restart."""
        if self.reduced or not self.losses or not (dist.is_available() and dist.is_initialized()):
            return
        self.reduced = True
        sums = [*self.losses.values(), *(v for layer in self.layers.values() for v in layer.values())]
        device = sums[0].device
        weight = torch.tensor([self.weight], device=device, dtype=sums[0].dtype)
        flat = torch.cat([weight, *(s.reshape(-1) for s in sums)])
        dist.all_reduce(flat)
        self.weight = float(flat[0])
        position = 1
        for value in sums:
            value.copy_(flat[position:position + value.numel()].reshape(value.shape))
            position += value.numel()

    def means(self) -> Dict[str, float]:
        """Loss name to mean; `loss` first, which is what was differentiated."""
        return {name: float(value) / max(self.weight, 1.0) for name, value in self.losses.items()}

    def balance(self) -> Dict[str, Dict[str, torch.Tensor]]:
        """Layer name to the means of `moe_zoo.losses.balance` over the epoch."""
        weight = max(self.weight, 1.0)
        return {layer: {name: (v / weight).cpu() for name, v in sums.items()} for layer, sums in self.layers.items()}

    def state_dict(self) -> Dict[str, Any]:
        return {'weight': self.weight, 'losses': self.losses, 'layers': self.layers, 'reduced': self.reduced}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises: LookupError, TypeError, AttributeError: These are no sums."""
        self.weight, self.losses, self.layers = state['weight'], dict(state['losses']), dict(state['layers'])
        self.reduced = state.get('reduced', False)
        sums = [*self.losses.values(), *(v for layer in self.layers.values() for v in layer.values())]
        if not all(isinstance(each, torch.Tensor) for each in sums):
            raise TypeError('the sums of its epoch are no tensors')
        describe_losses(self.means()), describe_balance(self.balance())  # as at the end of the epoch


def describe_losses(losses: Mapping[str, float]) -> str:
    """`loss 1.234 = task 1.200 + importance 0.034`, or just the loss where nothing is added to it."""
    parts = [f'{name.removeprefix("loss_")} {value:.4g}' for name, value in losses.items() if name.startswith('loss_')]
    text = f'loss {losses["loss"]:.4g}'
    return f'{text} = task {losses["task_loss"]:.4g} + {" + ".join(parts)}' if parts else text


def describe_balance(balance: Mapping[str, Mapping[str, torch.Tensor]]) -> str:
    """Entropy of the experts' shares by layer, 1 where all are used alike, with what capacity dropped."""
    texts = []
    for layer, measures in balance.items():
        dropped = float(measures['dropped'])
        texts.append(f'{layer} {float(measures["entropy"]):.3f}' + (f' (dropped {dropped:.1%})' if dropped else ''))
    return '  '.join(texts)


def describe_live(live: Mapping[str, float]) -> str:
    """Share of the channels that the gates of DeepMoE leave on: the mean over the layers, and the least."""
    least = min(live, key=live.get)
    return f'{sum(live.values()) / len(live):.1%} in the mean of {len(live)} layers, least {least} {live[least]:.1%}'


class BalanceWatch:
    """Notices experts that an epoch left without work. Every layer is named once.

    Args:
        model_name: For the warnings.
        spared: Layers that are meant to switch experts off.
    """

    def __init__(self, model_name: str, spared: Collection[str] = ()):
        self.model_name = model_name
        self.spared = spared
        self.seen: set = set()

    def check(
            self,
            balance: Mapping[str, Mapping[str, torch.Tensor]],
            has_routed_layers: bool,
            epoch: int = 1,
    ) -> List[str]:
        """The warnings of an epoch (counted from 1): what is wrong, in which layer, and what helps."""
        if not balance:
            return self._nothing_routed(has_routed_layers)
        messages = []
        for layer, measures in balance.items():
            share = measures['share']
            fair = 1.0 / len(share)
            if layer in self.seen or layer in self.spared or float(share.min()) >= LEAST_SHARE * fair:
                continue
            self.seen.add(layer)
            starved = [str(i) for i, s in enumerate(share.tolist()) if s < LEAST_SHARE * fair]
            many = 's' if len(starved) > 1 else ''
            messages.append(
                f"Layer '{layer}': expert{many} {', '.join(starved[:8])} of {len(share)} got less than a tenth of the"
                f' fair share of {fair:.2%} in epoch {epoch} (the least {float(share.min()):.2%}); should it last,'
                ' raise the weights of its balance losses, add router noise, or use fewer experts (num_experts).')
        return messages

    def _nothing_routed(self, has_routed_layers: bool) -> List[str]:
        if '' in self.seen:
            return []
        self.seen.add('')
        if has_routed_layers:
            return [
                f"No routed layer of '{self.model_name}' was active this epoch: forward returned no routing records, so"
                ' no auxiliary loss was added; give the model a working `set_aux_loss(True)`.']
        return [
            f"No routed layer is active: '{self.model_name}' has none with these options and trains as a dense model;"
            ' `moe-zoo list` names models that route.']


class Reporter:
    """Console, summary.csv and TensorBoard of one run; silent on every rank but the first.

    Args:
        quiet: Print nothing but warnings.
        on_epoch: Called with the row of every finished epoch.
    """

    def __init__(self, quiet: bool = False, on_epoch: Optional[Callable[[Row], None]] = None):
        self.out = Console(quiet=quiet, highlight=False, soft_wrap=True)
        self.err = Console(stderr=True, highlight=False, soft_wrap=True)
        self.on_epoch = on_epoch
        self.folder: Optional[Path] = None
        self.rows: List[Row] = []
        self.warnings: List[str] = []
        self.board = None
        self.primary = True
        self.bar: Optional[Progress] = None

    def open(self, folder: Path, first_epoch: int) -> None:
        """Start writing into `folder`, or go on: rows from `first_epoch` on are dropped."""
        self.folder = folder
        path = folder / 'summary.csv'
        if first_epoch and path.is_file():
            with open(path, newline='', encoding='utf-8') as file:
                rows = [{k: _number(v) for k, v in row.items() if v != ''} for row in csv.DictReader(file)]
            self.rows = [row for row in rows if row['epoch'] < first_epoch]
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(folder / 'tensorboard'), purge_step=first_epoch)
        except ImportError:
            self.say('tensorboard is not installed: the run is logged to summary.csv alone')

    def say(self, text: str) -> None:
        if self.primary:
            (self.bar.console if self.bar else self.out).print(text, markup=False)

    def warn(self, text: str) -> None:
        if self.primary:
            self.warnings.append(text)
            (self.bar.console if self.bar else self.err).print(f'warning: {text}', markup=False)

    def add_epoch(self, row: Row, balance: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """File the row of a finished epoch everywhere."""
        self.rows.append(row)
        if self.folder is not None:
            self._write_summary()
            self._write_board(row, balance)
        if self.on_epoch is not None:
            self.on_epoch(row)

    def _write_summary(self) -> None:
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with atomic_write(self.folder / 'summary.csv') as temporary:
            with open(temporary, 'w', newline='', encoding='utf-8') as file:
                writer = csv.DictWriter(file, columns)
                writer.writeheader()
                writer.writerows(self.rows)

    def _write_board(self, row: Row, balance: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        if self.board is None:
            return
        for name, value in row.items():
            if name != 'epoch' and not name.startswith('balance_'):
                self.board.add_scalar(name.replace('_', '/', 1) if '_' in name else name, value, row['epoch'])
        for layer, measures in balance.items():
            for name in ('entropy', 'cv', 'dropped'):
                self.board.add_scalar(f'{layer}/{name}', float(measures[name]), row['epoch'])
            for expert, share in enumerate(measures['share'].tolist()):
                self.board.add_scalar(f'{layer}/share_of_expert_{expert}', share, row['epoch'])
        self.board.flush()

    def close(self) -> None:
        if self.board is not None:
            with contextlib.suppress(OSError):  # a full disk has been told of already
                self.board.close()


class Clock:
    """Time left, from the time that each of the updates so far took, evaluation included."""

    def __init__(self, total: int, done: int):
        self.total, self.first, self.start = total, done, time.monotonic()

    def left(self, done: int) -> str:
        taken = time.monotonic() - self.start
        if done <= self.first:
            return '?'
        return duration(taken / (done - self.first) * (self.total - done))


def duration(seconds: float) -> str:
    """75 -> '1:15', 4000 -> '1:06:40'."""
    seconds = int(math.ceil(seconds))
    hours, minutes = divmod(seconds // 60, 60)
    return f'{hours}:{minutes:02d}:{seconds % 60:02d}' if hours else f'{minutes}:{seconds % 60:02d}'


def track(reporter: Reporter, batches: Iterable, total: int, title: str) -> Iterable:
    """Iterate with a bar where a person watches; plain otherwise."""
    if not (reporter.primary and reporter.out.is_terminal and not reporter.out.quiet and sys.stdout.isatty()):
        yield from batches
        return
    columns = (TextColumn('{task.description}'), BarColumn(bar_width=20), TextColumn('{task.completed}/{task.total}'),
               TextColumn('{task.fields[status]}'))
    with Progress(*columns, console=reporter.out, transient=True) as bar:
        reporter.bar = bar
        task = bar.add_task(title, total=total, status='')
        bar.status = lambda text: bar.update(task, status=text)
        try:
            for batch in batches:
                yield batch
                bar.advance(task)
        finally:
            reporter.bar = None


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to(torch.float32 if value.device.type == 'mps' else torch.float64)


def _number(text: str) -> Any:
    try:
        return int(text)
    except ValueError:
        try:
            return float(text)
        except ValueError:
            return text
