"""Runs an experiment: every arm with every seed in worker processes, each finished run kept, then the results.

    OUTPUT/NAME/runs/ARM-seedN.json   one finished run; not repeated unless its options, its data or the code changed
    OUTPUT/NAME/results.json          the plan, written before the first run, and all that came out, see `summarise`
"""
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch

import moe_zoo
from moe_zoo.analysis.origin import short_commit, versions
from moe_zoo.engine.log import Clock, Reporter, track
from moe_zoo.errors import InputError, atomic_write
from moe_zoo.faults import locked

from .experiment import Arm, Experiment
from .training import Data
from .verdict import LEVEL, POWER, detectable_effect, judge, paired_test

__all__ = ['reproduce', 'summarise']

TEST = f'two-sided paired t-test by seed at {LEVEL:.0%}; detectable: found with a probability of {POWER:.0%}'
# What a run computes with, besides its data and the file of its experiment: another text of these makes other runs.
COMPUTES = ('routing', 'losses', 'layers', 'checkpoints', 'models', 'analysis/consistency.py', 'analysis/cost.py',
            'analysis/cost_counter.py', 'analysis/cost_formulas.py', 'analysis/cost_routed.py', 'analysis/force.py',
            'analysis/usage.py', 'data/correspondence.py', 'data/two_views.py', 'data/vowels.py',
            'engine/consistency.py', 'engine/task.py', 'reproduce/training.py')

PILOT = 1000  # first seed of a pilot

Run = dict[str, Any]


def reproduce(
        experiment: Experiment,
        output: Path,
        seeds: Optional[int] = None,
        data_dir: Optional[str] = None,
        jobs: Optional[int] = None,
        pilot: bool = False,
        on_change: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Do the runs that are not done yet, and write the results.

    Args:
        experiment: What to run.
        output: Folder of all experiments; files go to a folder of the experiment's name in it.
        seeds: How many, from 0; None is the experiment's own number.
        data_dir: Images to use in place of the default.
        jobs: Worker processes; None is one for every core.
        pilot: Measure on the validation images, with seeds that the experiment itself does not use: for choosing
            hyper-parameters, and for the deviation that a claim expects.
        on_change: Called when results.json was written.

    Returns:
        What results.json holds.

    Raises:
        InputError: The data or `seeds` cannot be used, or a run says so; or another process runs the experiment.
        RuntimeError: A run failed; it is named. Those that finished are kept.
    """
    count = experiment.seeds if seeds is None else seeds
    if count < 2:
        raise InputError(f'--seeds {count}: a paired test needs at least 2 seeds.')
    seeds = [seed + PILOT * pilot for seed in range(count)]
    folder = output / experiment.name
    if experiment.files:
        experiment = replace(experiment, load=partial(experiment.load, files=folder))
    if pilot:
        experiment = replace(experiment, load=partial(_without_test, experiment.load))
    with locked(folder, 'choose another --output'):
        return _reproduce(experiment, folder, seeds, data_dir, jobs, on_change)


def _reproduce(
        experiment: Experiment,
        folder: Path,
        seeds: list[int],
        data_dir: Optional[str],
        jobs: Optional[int],
        on_change: Callable[[], None],
) -> dict[str, Any]:
    data = experiment.load(data_dir)
    code, reporter = fingerprint(experiment, data), Reporter()
    plan = _planned(experiment, seeds, data, folder)
    made_by = _made_by()
    done, todo = _kept_and_left(experiment, folder, code, seeds)

    def write() -> dict[str, Any]:
        results = summarise(experiment, plan, made_by, done)
        _write_json(folder / 'results.json', results)
        on_change()
        return results

    results = write()
    reporter.say(f'{experiment.name}: {len(experiment.arms)} arms x {len(seeds)} seeds on {plan["data"]}'
                 + (f'; {len(done)} runs kept from before' if done else ''))
    clock = Clock(len(todo), 0)
    with contextlib.closing(_parallel(experiment, data_dir, todo, jobs)) as finished:
        for number, unit in enumerate(track(reporter, finished, len(todo), experiment.name), 1):
            for arm, run in unit:
                _check_metrics(experiment, run)
                key = made_for(code, arm, run['seed'])
                _write_json(_run_file(folder, run['arm'], run['seed']), {'made_for': key, **run})
                done.append(run)
                reporter.say(f'{number}/{len(todo)} {describe(run)}; {clock.left(number)} left')
            results = write()
    return results


def _check_metrics(experiment: Experiment, run: Run) -> None:
    """Tell of a misspelt metric at the first run rather than after the last."""
    for claim in experiment.claims:
        if run['arm'] in (claim.better, claim.worse) and claim.metric not in _averages([run]):
            raise RuntimeError(
                f'{experiment.name}: the claim {claim.text!r} needs the number {claim.metric!r}, and arm '
                f'{run["arm"]!r} returns {", ".join(run["metrics"])}')


def summarise(
        experiment: Experiment,
        plan: dict[str, Any],
        made_by: dict[str, Any],
        runs: list[Run],
) -> dict[str, Any]:
    """The results as JSON holds them; `status` is 'running' until every run is there.

    Returns:
        name, title, paper, question: Of the experiment.
        plan: `written` (date), `seeds`, `test`, `data`, `claims`: the fields of each with its `detectable` effect.
        made_by: Versions and commit.
        arms: name, options, and `metrics`: every number of its runs to `mean`, `std` (sample) and `values` by seed.
        claims: In the plan's order, once all runs are there: difference, low, high (95 % interval), p, deviation and
            detectable effect as observed, verdict.
        runs: arm, seed, seconds, metrics.
        seconds: Of all runs together.
    """
    runs = sorted(runs, key=lambda run: run['seed'])
    by_arm = {arm.name: [run for run in runs if run['arm'] == arm.name] for arm in experiment.arms}
    complete = len(runs) == len(plan['seeds']) * len(by_arm)
    arms = [{**arm._asdict(), 'metrics': _averages(by_arm[arm.name])} for arm in experiment.arms]
    results = {
        **{field: getattr(experiment, field) for field in ('name', 'title', 'paper', 'question')},
        'status': 'done' if complete else 'running', 'plan': plan, 'made_by': made_by, 'arms': arms,
        'claims': [], 'seconds': sum(run['seconds'] for run in runs), 'runs': runs,
    }
    if complete:
        metrics = {arm['name']: arm['metrics'] for arm in arms}
        results['claims'] = [_decide(claim, metrics) for claim in plan['claims']]
    return results


def _decide(claim: dict[str, Any], metrics: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One claim of the plan against what was measured; `points` are percent, of which there are 100."""
    found = paired_test(*(metrics[claim[side]][claim['metric']]['values'] for side in ('better', 'worse')))
    expected = claim['published']
    if expected and claim['unit'] == 'points' and metrics[claim['worse']][claim['metric']]['mean'] + expected > 100:
        expected = None  # there is no room for it: its absence would say nothing
    return {
        'difference': found.mean, 'low': found.low, 'high': found.high, 'p': found.p, 'deviation': found.deviation,
        'detectable': detectable_effect(found.deviation, found.n), 'verdict': judge(found, expected),
    }


def _averages(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """Every number that all of these runs return."""
    averages = {}
    for name, first in runs[0]['metrics'].items() if runs else ():
        values = [run['metrics'].get(name) for run in runs]
        if isinstance(first, (int, float)) and all(isinstance(value, (int, float)) for value in values):
            std = statistics.stdev(values) if len(values) > 1 else 0.
            averages[name] = {'mean': statistics.fmean(values), 'std': std, 'values': values}
    return averages


def _without_test(load: Callable, data_dir: Optional[str]) -> Data:
    data = load(data_dir)
    return data._replace(test=data.validation, description=f'{data.description}; pilot, measured on validation')


def _planned(experiment: Experiment, seeds: list[int], data: Data, folder: Path) -> dict[str, Any]:
    """The plan; the one on disk, with its date, where nothing of it has changed."""
    claims = [
        {**vars(claim), 'detectable': detectable_effect(claim.deviation, len(seeds))} for claim in experiment.claims]
    plan = {'seeds': seeds, 'test': TEST, 'data': data.description, 'claims': claims}
    try:
        before = json.loads((folder / 'results.json').read_text(encoding='utf-8'))['plan']
    except (OSError, ValueError, KeyError, TypeError):
        before = {}
    written = before.pop('written', None)
    return {'written': written if before == plan else time.strftime('%Y-%m-%d %H:%M'), **plan}


def _made_by() -> dict[str, Optional[str]]:
    """Versions; the commit says whether the package was changed since. (README and cards change by publishing.)"""
    found = versions()
    return found | {'commit': found['commit'] and short_commit(found['commit'])}


def fingerprint(experiment: Experiment, data: Data) -> str:
    """A hash of what all runs of an experiment compute with: data and code."""
    package = Path(moe_zoo.__file__).parent
    parts = (*COMPUTES, *experiment.computes)
    found = [path for name in parts for path in ([package / name] if '.' in name else (package / name).glob('*.py'))]
    found.append(Path(experiment.run.__code__.co_filename))
    state = hashlib.sha256(torch.__version__.encode())
    for path in sorted(found):
        state.update(path.read_bytes())
    for part in (data.train, data.validation, data.test):
        for tensor in part:
            state.update(tensor.numpy().tobytes())
    return state.hexdigest()


def made_for(code: str, arm: Arm, seed: int) -> str:
    """A hash of what decides the outcome of one run."""
    return hashlib.sha256(json.dumps([code, arm.options, seed], sort_keys=True).encode()).hexdigest()[:16]


def _run_file(folder: Path, arm: str, seed: int) -> Path:
    return folder / 'runs' / f'{re.sub(r"[^a-zA-Z0-9_.=-]+", "_", arm)}-seed{seed}.json'


def _kept_and_left(
        experiment: Experiment,
        folder: Path,
        code: str,
        seeds: list[int],
) -> tuple[list[Run], list[tuple[list[Arm], int]]]:
    """Finished runs of before, and the arms and seeds that are left; arms that are trained together stay so."""
    units = [list(experiment.arms)] if experiment.together else [[arm] for arm in experiment.arms]
    kept, left = [], []
    for seed in seeds:
        for arms in units:
            runs = [_kept(folder, arm, seed, made_for(code, arm, seed)) for arm in arms]
            if None in runs:
                left.append((arms, seed))
            else:
                kept += runs
    return kept, left


def _kept(folder: Path, arm: Arm, seed: int, key: str) -> Optional[Run]:
    """A finished run of before, if it was made for the same."""
    try:
        run = json.loads(_run_file(folder, arm.name, seed).read_text(encoding='utf-8'))
        return run if run.pop('made_for') == key and (run['arm'], run['seed']) == (arm.name, seed) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')


def describe(run: Run) -> str:
    """`static seed 0: accuracy 97.18, macs 4.1e+05 (12 s)`."""
    numbers = [f'{name} {value:.4g}' for name, value in run['metrics'].items() if isinstance(value, (int, float))]
    return f'{run["arm"]} seed {run["seed"]}: {", ".join(numbers[:4])} ({run["seconds"]:.0f} s)'


# --- Worker processes -------------------------------------------------------------------------------------------------

_WORK: list = []  # in a worker: the function that runs arms, whether it runs them together, and the data


def _parallel(
        experiment: Experiment,
        data_dir: Optional[str],
        todo: list[tuple[list[Arm], int]],
        jobs: Optional[int],
) -> Iterator[list[tuple[Arm, Run]]]:
    """Arms with their finished runs, as they come; on leaving, no worker is left."""
    if not todo:
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    jobs = min(jobs or cores, len(todo))
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        jobs, multiprocessing.get_context('spawn'), _start_worker,
        (experiment.run, experiment.together, experiment.load, data_dir))
    try:
        futures = {pool.submit(_run, arms, seed): (arms, seed) for arms, seed in todo}
        for future in as_completed(futures):
            arms, seed = futures[future]
            try:
                runs = future.result()
            except BrokenProcessPool as error:
                raise RuntimeError(
                    f'{experiment.name}: a worker process was killed; if memory ran out, use fewer --jobs.') from error
            except Exception as error:
                where = f'{experiment.name}: arm {", ".join(repr(arm.name) for arm in arms)}, seed {seed}'
                if isinstance(error, InputError):
                    raise InputError(f'{where}: {error}') from error
                raise RuntimeError(f'{where} failed: {type(error).__name__}: {error}') from error
            yield list(zip(arms, runs))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()


def _start_worker(run: Callable, together: bool, load: Callable, data_dir: Optional[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _WORK[:] = run, together, load(data_dir)


def _end_with_parent() -> None:
    """A killed parent leaves its pool behind, which would wait for work for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _run(arms: list[Arm], seed: int) -> list[Run]:
    """One arm, or those that are trained together, among which the time is shared out."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    started = time.perf_counter()
    run, together, data = _WORK
    options = [arm.options for arm in arms]
    metrics = run(options, seed, data) if together else [run(options[0], seed, data)]
    seconds = (time.perf_counter() - started) / len(arms)
    for found in metrics:
        broken = [name for name, value in found.items() if isinstance(value, float) and not math.isfinite(value)]
        if broken:
            raise ArithmeticError(f'{", ".join(broken)} is not a finite number')
    return [
        {'arm': arm.name, 'seed': seed, 'seconds': seconds, 'metrics': found}
        for arm, found in zip(arms, metrics, strict=True)]
