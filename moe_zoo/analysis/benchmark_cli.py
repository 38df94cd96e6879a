"""`tools/benchmark.py`: the time of a routed model beside that of its dense twin.

Machines drift, so single timings say little: model and twin take turns, every round yields one ratio, and what is
reported is the median ratio with its interquartile range. A ratio that lies closer to 1 than that range is wide is not
quoted. Time stands next to MACs, because MACs that are saved or added do not always turn into time.

Letters: B images.
"""
import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import moe_zoo
from moe_zoo.cards import card
from moe_zoo.errors import InputError, atomic_write, exit_on_input_error

from ..losses import auxiliary_losses
from .cost import count
from .count_cli import build_model

MODES = {'forward': 'evaluation mode, no gradients', 'train': 'forward, losses, backward and an SGD step'}


@dataclass(frozen=True)
class Ratio:
    """Time of the model over time of its twin.

    Attributes:
        median: Median over the rounds.
        spread: Interquartile range over the rounds.
        resolved: Is the difference from 1 larger than the spread? Otherwise the median must not be quoted.
    """
    median: float
    spread: float
    resolved: bool

    def __str__(self) -> str:
        if self.resolved:
            return f'{self.median:.2f} (spread {self.spread:.2f})'
        return f'not resolved (spread {self.spread:.2f})'


def ratio(model: Sequence[float], twin: Sequence[float]) -> Ratio:
    """Median and spread of the ratios of paired timings.

    Raises:
        InputError: Fewer than 3 rounds, from which no spread can be told.
    """
    if len(model) < 3:
        raise InputError(f'--rounds {len(model)}: use at least 3, or there is no spread to judge the ratio by.')
    ratios = [a / b for a, b in zip(model, twin, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method='inclusive')
    return Ratio(median, high - low, abs(median - 1) > high - low)


def alternate(
        runs: Sequence[Callable[[], None]],
        rounds: int,
        min_seconds: float = 0.2,
        clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Seconds of one call of each function, `rounds` times, taking turns; who goes first changes every round.

    Args:
        runs: What to time. Each is called once to warm up, and then as often as fills `min_seconds`.
        rounds: Timings of each.
        min_seconds: A timing is the mean over as many calls as take this long.
        clock: Seconds; work on a device has to be finished when a function returns.

    Returns:
        For each function, its `rounds` timings in seconds a call.
    """
    def timed(run: Callable[[], None], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls

    for run in runs:
        run()
    calls = [max(1, round(min_seconds / max(timed(run, 1), 1e-9))) for run in runs]
    seconds: list[list[float]] = [[] for _ in runs]
    for i in range(rounds):
        order = range(len(runs)) if i % 2 == 0 else reversed(range(len(runs)))
        for k in order:
            seconds[k].append(timed(runs[k], calls[k]))
    return seconds


def make_run(model: nn.Module, x: torch.Tensor, mode: str) -> Callable[[], None]:
    """One forward or one training step as a function without arguments, finished when it returns."""
    def finish() -> None:
        if x.is_cuda:
            torch.cuda.synchronize()

    def forward() -> None:
        with torch.inference_mode():
            model(x)
        finish()

    if mode == 'forward':
        model.eval()
        return forward

    model.train()
    if hasattr(model, 'set_aux_loss'):
        model.set_aux_loss(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    target = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)

    def step() -> None:
        output = model(x)
        output, routings = output if isinstance(output, tuple) else (output, [])
        loss = sum(auxiliary_losses(routings, target).values(), F.cross_entropy(output, target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        finish()

    return step


def benchmark(name: str, mode: str, batch_size: int, rounds: int, img_size: int | None, device: str) -> dict:
    """Time one model against the dense twin that its card names.

    Returns:
        What was run, the ratio of MACs, the ratio of time, and every timing in seconds.

    Raises:
        InputError: No such model, or a size that it does not take.
    """
    entry = card(name)
    channels, *own = entry['input']['size']
    size = (img_size, img_size) if img_size else tuple(own)
    keywords = entry.get('twin_args', {})
    models = [build_model(name, device, size), build_model(entry['twin'], device, size, **keywords)]
    x = torch.rand(batch_size, channels, *size, device=device)
    macs = [count(model, x).macs_max for model in models]
    seconds = alternate([make_run(model, x, mode) for model in models], rounds)
    return {
        'model': name, 'twin': entry['twin'], 'twin_args': keywords, 'mode': mode, 'batch_size': batch_size,
        'input_size': [channels, *size], 'macs_ratio': macs[0] / macs[1],
        'time_ratio': asdict(ratio(*seconds)), 'seconds': seconds[0], 'twin_seconds': seconds[1],
    }


@exit_on_input_error
def main(argv: list[str] | None = None) -> int:
    """Benchmark what the command line names; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.rounds < 3 or args.batch_size < 1:
        raise InputError(f'--rounds {args.rounds} --batch-size {args.batch_size}: use at least 3 rounds and 1 image.')
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        raise InputError(f'--device {args.device}: torch sees no CUDA device here; use cpu.')
    for name in args.names:
        card(name)  # a wrong name is said before an hour of timings
    if os.getloadavg()[0] > os.cpu_count() / 2:
        print(f'note: load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores; others are busy here', file=sys.stderr)
    modes = [args.mode] if args.mode else list(MODES)
    rows = []
    for name in args.names:
        for mode in modes:
            rows.append(benchmark(name, mode, args.batch_size, args.rounds, args.img_size, args.device))
            print(f'{name}, {mode}: {Ratio(**rows[-1]["time_ratio"])}', file=sys.stderr)
    Console(width=None if sys.stdout.isatty() else 120).print(_table(rows))
    if args.json:
        with atomic_write(args.json) as path:
            path.write_text(json.dumps({'machine': machine(args.device), 'rows': rows}, indent=1) + '\n')
        print(f'wrote {args.json}')
    return 0


def machine(device: str) -> dict:
    """What a timing depends on besides the model."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux says more
        found = re.search(r'^model name\s*: (.+)$', Path('/proc/cpuinfo').read_text(), re.M)
        cpu = found[1] if found else cpu
    return {
        'device': torch.cuda.get_device_name(device) if device.startswith('cuda') else cpu,
        'cores': os.cpu_count(), 'threads': torch.get_num_threads(), 'load': os.getloadavg(),
        'torch': torch.__version__, 'timm': timm.__version__, 'moe_zoo': moe_zoo.__version__,
    }


def _table(rows: list[dict]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ('model / twin', 'mode', 'images', 'MACs ratio', 'time ratio', 'model', 'twin'):
        table.add_column(heading, overflow='fold')
    for row in rows:
        twin = row['twin'] + ''.join(f' {key}={value}' for key, value in row['twin_args'].items())
        times = (f'{1e3 * statistics.median(row[key]):,.1f} ms' for key in ('seconds', 'twin_seconds'))
        table.add_row(
            f'{row["model"]} / {twin}', row['mode'], str(row['batch_size']), f'{row["macs_ratio"]:.3f}',
            str(Ratio(**row['time_ratio'])), *times)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Time of routed models as a ratio to their dense twins (cards name them), in alternating rounds.')
    add = parser.add_argument
    add('names', nargs='+', metavar='NAME', help='models of moe_zoo (moe-zoo list shows them)')
    add('--mode', choices=MODES, help='; '.join(f'{mode}: {what}' for mode, what in MODES.items()) + ' (default: both)')
    add('--batch-size', type=int, default=8, metavar='B', help='images a batch (default: 8)')
    add('--rounds', type=int, default=9, metavar='R', help='timings of each, in turns (default: 9, at least 3)')
    add('--img-size', type=int, metavar='S', help="side of the images (default: the card's)")
    add('--device', default='cpu', help='cpu or cuda (default: cpu)')
    add('--threads', type=int, metavar='T', help="torch threads (default: torch's choice)")
    add('--json', metavar='OUT', help='write every timing to this file')
    return parser


if __name__ == '__main__':
    sys.exit(main())
