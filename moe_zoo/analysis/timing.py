"""Timing of things that do the same, as ratios.

Machines drift, so single timings say little: what is compared takes turns, every round yields one ratio, and what is
reported is the median ratio with its quartiles. A ratio that lies closer to 1 than the quartiles lie apart is not
quoted.
"""
import contextlib
import itertools
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

from ..errors import InputError

# Seconds. CPU time leaves out what other programs do meanwhile; it counts every thread, waiting ones too unless
# OMP_WAIT_POLICY=passive lets them sleep, and so shows work, not how well threads share it.
CLOCKS = {'wall': time.perf_counter, 'cpu': time.process_time}


class Settings(NamedTuple):
    """How a comparison is timed.

    Attributes:
        rounds: Timings of each contender, in turns.
        device: cpu or cuda.
        clock: A key of `CLOCKS`.
        min_seconds: A timing is the mean over as many calls as take this long.
    """
    rounds: int = 9
    device: str = 'cpu'
    clock: str = 'wall'
    min_seconds: float = 0.2

    def alternate(self, runs: Sequence[Callable[[], None]]) -> 'Timings':
        return alternate(runs, self.rounds, self.min_seconds, CLOCKS[self.clock])


@dataclass(frozen=True)
class Ratio:
    """Time of one thing over time of another: median and quartiles over the rounds."""
    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Interquartile range."""
        return self.high - self.low

    @property
    def resolved(self) -> bool:
        """Is the difference from 1 larger than the spread? Otherwise the median must not be quoted."""
        return abs(self.median - 1) > self.spread

    def judge(self, at_most: float) -> str:
        """'reached' or 'missed' where three rounds of four agree about a target, 'not resolved' where they do not."""
        if self.high <= at_most:
            return 'reached'
        return 'missed' if self.low > at_most else 'not resolved'

    def __str__(self) -> str:
        if self.resolved:
            return f'{self.median:.2f} (spread {self.spread:.2f})'
        return f'not resolved (spread {self.spread:.2f})'


class Timings(NamedTuple):
    """Attributes:
        seconds: For each thing timed, seconds a call in every round.
        loads: Load average of the machine at the end of every round.
    """
    seconds: list[list[float]]
    loads: list[float]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Median and quartiles of the ratios of paired timings.

    Raises:
        InputError: Fewer than 3 rounds, from which no spread can be told.
    """
    if len(ours) < 3:
        raise InputError(f'--rounds {len(ours)}: use at least 3, or there is no spread to judge the ratio by.')
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method='inclusive')
    return Ratio(median, low, high)


def alternate(
        runs: Sequence[Callable[[], None]],
        rounds: int,
        min_seconds: float = 0.2,
        clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Time one call of each function, `rounds` times, taking turns; who goes first changes every round.

    Args:
        runs: What to time. Each is called once to warm up, then for `min_seconds` to see how often that is, and in
            every round as often.
        rounds: Timings of each.
        min_seconds: A timing is the mean over as many calls as take this long.
        clock: Seconds; work on a device has to be finished when a function returns.
    """
    def timed(run: Callable[[], None], calls: int) -> float:
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls

    def fastest(run: Callable[[], None]) -> float:
        """Of all calls in `min_seconds`: one alone may have been held up, and a round of few calls tells little."""
        found, until = [], clock() + min_seconds
        while not found or clock() < until:
            found.append(timed(run, 1))
        return min(found)

    for run in runs:
        run()
    calls = [max(1, round(min_seconds / max(fastest(run), 1e-9))) for run in runs]
    timings = Timings([[] for _ in runs], [])
    for i in range(rounds):
        order = range(len(runs)) if i % 2 == 0 else reversed(range(len(runs)))
        for k in order:
            timings.seconds[k].append(timed(runs[k], calls[k]))
        timings.loads.append(os.getloadavg()[0])
    return timings


def peak_memory(run: Callable[[], None], device: str) -> int:
    """Bytes that a call holds at most at one time beyond what was there before, as the allocator of torch counts."""
    if device.startswith('cuda'):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler prints when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == '[memory]']
    held = itertools.accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns()))
    return max(held, default=0)


def settle_memory() -> None:
    """Let glibc keep freed memory up to its limit of 32 MB a block, as it does once a model of any size has run.

    Until a large block was freed once, each call of a small layer fetches its buffers from the system anew, and what is
    timed is page faults.
    """
    torch.empty(31 << 20, dtype=torch.uint8).fill_(0)


def machine(device: str) -> dict:
    """What a timing depends on besides the program."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux says more
        found = re.search(r'^model name\s*: (.+)$', Path('/proc/cpuinfo').read_text(), re.M)
        cpu = found[1] if found else cpu
    return {
        'device': torch.cuda.get_device_name(device) if device.startswith('cuda') else cpu,
        'cores': os.cpu_count(), 'threads': torch.get_num_threads(), 'load': os.getloadavg()[0],
        'torch': torch.__version__, 'timm': timm.__version__,
    }


def comparison(
        twin: str,
        mode: str,
        ours: Sequence[float],
        theirs: Sequence[float],
        loads: Sequence[float],
        memory: Sequence[int] = (),
) -> dict[str, Any]:
    """The part of a row that every benchmark has.

    Args:
        twin: What stands on the other side.
        mode: What was timed of both.
        ours, theirs: Seconds a call in every round.
        loads: Of the machine in every round.
        memory: Bytes that a call of ours and of theirs holds at most; empty where it was not measured.
    """
    row = {'twin': twin, 'mode': mode, 'time_ratio': asdict(ratio(ours, theirs)), 'loads': list(loads),
           'seconds': list(ours), 'twin_seconds': list(theirs)}
    return row | (dict(zip(('memory', 'twin_memory'), memory)) if memory else {})


def finish(x: Any) -> None:
    """Wait for a GPU. A detector takes a list, of which it is not known where it went."""
    if torch.cuda.is_available() and not (isinstance(x, torch.Tensor) and x.device.type == 'cpu'):
        torch.cuda.synchronize()
