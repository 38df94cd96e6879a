#!/usr/bin/env python
"""Puts small faults into the package, one at a time, and counts those that the tests notice.

    tools/mutation.py --sample 400         a stratified sample; run it again to go on where it stopped
    tools/mutation.py --report             the table, and every fault that nothing noticed
    tools/mutation.py --help               the rest

A fault is a mutant (tools/mutants.py lists the kinds). It lives in a clone in a temporary folder, never in the
checkout. Which tests reach a line is measured once, with coverage; they run those first that cover most of the file a
second, until one fails. Each mutant has a process of its own, forked from one that has imported torch but nothing of
ours. Time is processor time, so that a busy machine changes nothing.

Everything is kept in runs/mutation/ID, ID being git's name of what moe_zoo/ holds: `map/`, what each test file reaches
(made anew when the file changes), and `results.jsonl`, one line a mutant.
"""
import argparse
import contextlib
import fnmatch
import hashlib
import importlib.util
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Optional

from mutants import Mutant, read_mutants

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ['moe_zoo/routing', 'moe_zoo/losses', 'moe_zoo/layers', 'moe_zoo/analysis']
PAGE = ROOT / 'docs' / 'mutation.md'
EXPLAINED = Path(__file__).with_suffix('.toml')
# Imported before the fork, where they are installed; nothing of ours may be.
PRELOAD = ('numpy', 'torch', 'torchvision', 'timm', 'pytest', '_pytest.assertion.rewrite', 'yaml', 'rich.table',
           'torch._dynamo', 'torch.distributed', 'matplotlib.figure', 'hypothesis', 'coverage')
MEMORY = 6 << 30  # bytes a process: a fault must not take the machine
SLACK = 10  # seconds of processor time on top of three times what the tests take
PATIENCE = 40  # wall-clock seconds for each of those, before a process that waits for ever is ended
ELSEWHERE = 99  # exit code
SETTINGS = """[run]
include = {copy}/moe_zoo/*
parallel = true
data_file = {parts}/data
context = ${{MUTATION_TEST}}
patch = _exit, fork
disable_warnings = no-data-collected, module-not-imported
"""
NOTICED = ('killed', 'timed out')
EXAMPLES = """
examples:
  %(prog)s --list                                   how many mutants each file has
  %(prog)s --sample 400 --workers 2                 400 of them, every file by its share; again: goes on
  %(prog)s --all                                    every one: hours
  %(prog)s --only 'moe_zoo/routing/*' --all         of some files
  %(prog)s --map --slow --workers 2                 tests marked slow count too; it takes as long as they do
  %(prog)s --report                                 table and survivors of what has been run
  %(prog)s --again                                  after writing tests: the survivors once more, by all tests
  %(prog)s --show 1a2b3c4d5e6f                      one of them, and the tests that reach it
  %(prog)s --publish                                writes the table into docs/mutation.md

A survivor that is no fault (the program does the same) is explained in tools/mutation.toml:
  [[explained]]
  file = "moe_zoo/routing/types.py"
  before = "the line as it is"
  after = "the line as it became"
  why = "one sentence"
It still counts as a survivor; the list says why.
"""


# ---- which tests reach what

@dataclass
class Reach:
    """What the tests of one file reach.

    Attributes:
        file: The test file.
        seconds: Processor time of each test that passes on the sound program.
        imports: Processor time until the first of them starts.
        failing: Tests that do not, which are left out.
        lines: Source file -> line -> tests, by their position in `seconds`.
        at_import: Source file -> lines that run when it is imported.
    """
    file: str
    seconds: dict[str, float]
    imports: float
    failing: list[str]
    lines: dict[str, dict[int, list[int]]]
    at_import: dict[str, list[int]]

    @classmethod
    def read(cls, path: Path) -> 'Reach':
        kept = json.loads(path.read_text())
        lines = {file: {int(line): tests for line, tests in of.items()} for file, of in kept['lines'].items()}
        return cls(kept['file'], kept['seconds'], kept['imports'], kept['failing'], lines, kept['at_import'])

    def of(self, path: str, first: int, last: int) -> set[str]:
        """The tests that run one of these lines."""
        names = list(self.seconds)
        return {names[i] for line, tests in self.lines.get(path, {}).items() if first <= line <= last for i in tests}


class Tests:
    """All maps together."""

    def __init__(self, folder: Path, repository: Path):
        self.reaches = [Reach.read(path) for path in sorted(folder.glob('*.json'))]
        self.reaches = [reach for reach in self.reaches if (repository / reach.file).exists()]

    def choose(self, mutant: Mutant, limit: float = math.inf) -> tuple[dict[str, list[str]], float, int]:
        """The tests that reach a mutant, up to `limit` seconds.

        Those files come first that cover most of the mutated file a second; in a file, the fastest tests.

        Returns:
            Test file -> tests in order; their seconds; how many tests reach it in all.
        """
        reached = [(reach, reach.of(mutant.path, mutant.first, mutant.last)) for reach in self.reaches]
        if not any(names for _, names in reached):
            imported = any(mutant.first <= line <= mutant.last for reach in self.reaches
                           for line in reach.at_import.get(mutant.path, ()))
            if imported:  # a constant: whoever runs anything of the file
                reached = [(reach, reach.of(mutant.path, 1, sys.maxsize)) for reach in self.reaches]
        reached = [(reach, names) for reach, names in reached if names]
        reached.sort(key=lambda pair: -len(pair[0].lines[mutant.path]) / self._sum(*pair))
        chosen, seconds = {}, 0.
        for reach, names in reached:
            for name in sorted(names, key=reach.seconds.get):
                more = reach.seconds[name] + (0 if reach.file in chosen else reach.imports)
                if seconds + more <= limit or not chosen:
                    chosen.setdefault(reach.file, []).append(name)
                    seconds += more
        return chosen, seconds, sum(len(names) for _, names in reached)

    @staticmethod
    def _sum(reach: Reach, names: Iterable[str]) -> float:
        return reach.imports + sum(reach.seconds[name] for name in names)


# ---- running tests in a process of their own

class Selected:
    """A pytest plugin: runs the named tests in the order given, and tells which one failed first."""

    def __init__(self, names: Optional[Iterable[str]], report: Callable[[str], Any]):
        self.order = None if names is None else {name: i for i, name in enumerate(names)}
        self.report = report

    def pytest_collection_modifyitems(self, items: list) -> None:
        if self.order is not None:
            items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.report(report.nodeid)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.report(report.nodeid)


class Measured(Selected):
    """The same for a map: every test is a context of coverage, and is timed."""

    def __init__(self, coverage):
        super().__init__(None, lambda name: self.failing.add(name))
        self.coverage = coverage
        self.seconds: dict[str, float] = {}
        self.passed: set[str] = set()
        self.failing: set[str] = set()
        self.imports = 0.

    def pytest_collection_finish(self) -> None:
        self.imports = processor_time()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)
        os.environ['MUTATION_TEST'] = nodeid
        self.seconds[nodeid] = -processor_time()

    def pytest_runtest_logreport(self, report) -> None:
        super().pytest_runtest_logreport(report)
        if report.when == 'call' and report.passed:
            self.passed.add(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] += processor_time()
        self.coverage.switch_context('')


def processor_time() -> float:
    """Seconds of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


def preload() -> None:
    """Import what every test needs and no mutant changes."""
    os.environ.update(OMP_NUM_THREADS='1', MOE_ZOO_TEST_DATA=os.environ.get(
        'MOE_ZOO_TEST_DATA', str(ROOT.parent / 'shared' / 'data')))
    for name in PRELOAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert 'moe_zoo' not in sys.modules


def in_child(copy: Path, work: Callable[[], int], seconds: float) -> str:
    """Run `work` in a forked process that sees the copy; 'passed', 'failed' or 'timed out'.

    Args:
        copy: Clone with the mutant.
        work: Returns an exit code.
        seconds: Of processor time. Forty times as many by the clock end what waits for ever.
    """
    child = os.fork()
    if not child:
        code = 70
        try:
            enter(copy, seconds)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    try:
        status = wait(child, time.monotonic() + PATIENCE * seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # whatever the tests left running
    if status == ELSEWHERE << 8:
        raise SystemExit('moe_zoo was not imported from the copy')
    if status is None or os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return 'timed out'
    return 'passed' if status == 0 else 'failed'


def wait(child: int, until: float) -> Optional[int]:
    """The status of a process that ends in time; of another, which is killed, None."""
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        time.sleep(.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def enter(copy: Path, seconds: float) -> None:
    """Make this process one that works in the copy, quietly, and within limits."""
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(copy)
    log = os.open(copy.parent / 'log.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.path[:] = [str(copy)] + [p for p in sys.path if p and Path(p).resolve() not in (ROOT, ROOT / 'tools')]
    os.environ['PYTHONPATH'] = str(copy)  # for the processes that tests start
    sys.dont_write_bytecode = True
    os.environ['PYTHONDONTWRITEBYTECODE'] = '1'
    sys.argv = ['pytest']
    if not Path(importlib.util.find_spec('moe_zoo').origin).is_relative_to(copy):
        os._exit(ELSEWHERE)


def run_pytest(copy: Path, files: Iterable[str], plugin: Selected, *options: str) -> int:
    """The exit code; 0 too where a mutant made the tests vanish, which nobody would have noticed."""
    import pytest
    code = int(pytest.main([
        *files, '-q', '--tb=short', '-p', 'no:cacheprovider', '--rootdir', str(copy), '--basetemp',
        str(copy.parent / 'pytest'), *options], plugins=[plugin]))
    return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else code


def make_copy(folder: Path, commit: str) -> Path:
    """A clone of the commit whose compiled files are checked against the text, not against its time."""
    copy = folder / 'checkout'
    subprocess.run(['git', 'clone', '-q', '--shared', '--no-checkout', str(ROOT), str(copy)], check=True)
    subprocess.run(['git', '-C', str(copy), '-c', 'advice.detachedHead=false', 'checkout', '-q', commit], check=True)
    subprocess.run([sys.executable, '-m', 'compileall', '-q', '--invalidation-mode', 'checked-hash',
                    str(copy / 'moe_zoo')], check=True)
    return copy


# ---- the map

def unmapped(copy: Path, kept: Path, slow: bool, names: list[str]) -> list[tuple[str, str]]:
    """The test files, and marks of their text, of which is not known what they reach."""
    files = list(dict.fromkeys(path for name in names for path in sorted((copy / 'tests').glob(f'{name}.py'))))
    found = []
    for path in files:
        target = kept / 'map' / f'{path.stem}.json'
        mark = hashlib.sha256(path.read_bytes()).hexdigest()[:12] + (' slow' if slow else '')
        if not target.exists() or json.loads(target.read_text())['mark'] not in (mark, f'{mark} slow'):
            found.append((path.name, mark))
    return found


def map_file(kept: Path, copy: Path, number: str, item: tuple[str, str]) -> None:
    """Measure what a test file reaches and keep it."""
    started = time.monotonic()
    path, mark = copy / 'tests' / item[0], item[1]
    target = kept / 'map' / f'{path.stem}.json'
    part = target.with_suffix('.part')
    part.parent.mkdir(parents=True, exist_ok=True)
    part.unlink(missing_ok=True)
    ended = in_child(copy, partial(measure, copy, path, part, mark), 3600)
    if not part.exists():
        shutil.copy(copy.parent / 'log.txt', target.with_suffix('.log'))
        failing = [f'the file: {ended}']
        part.write_text(json.dumps(dict(
            file=f'tests/{path.name}', mark=mark, seconds={}, imports=0., failing=failing, lines={}, at_import={})))
    part.replace(target)
    reach = Reach.read(target)
    say(f'map {number} {path.name}: {len(reach.seconds)} tests, {len(reach.failing)} left out, '
        f'{time.monotonic() - started:.0f} s')


def measure(copy: Path, path: Path, target: Path, mark: str) -> int:
    """In a child: run a test file under coverage and write its `Reach`."""
    import coverage
    parts = copy.parent / 'coverage'
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir()
    (parts / 'settings').write_text(SETTINGS.format(copy=copy, parts=parts))
    os.environ['COVERAGE_PROCESS_START'] = str(parts / 'settings')  # of the processes that tests start
    measuring = coverage.Coverage(data_file=None, config_file=False, include=[f'{copy}/moe_zoo/*'], messages=False)
    measuring.start()
    plugin = Measured(measuring)
    run_pytest(copy, [str(path)], plugin, '-m', 'not gpu' if mark.endswith('slow') else 'not slow and not gpu')
    measuring.stop()
    names = {name: position for position, name in enumerate(sorted(plugin.passed - plugin.failing))}
    lines: dict[str, dict[int, set[int]]] = {}
    at_import: dict[str, set[int]] = {}
    for data in [measuring.get_data(), *read_parts(parts)]:
        for file in data.measured_files():
            source = Path(file).relative_to(copy).as_posix()
            for line, contexts in data.contexts_by_lineno(file).items():
                tests = {names[context] for context in contexts if context in names}
                if tests:
                    lines.setdefault(source, {}).setdefault(line, set()).update(tests)
                if '' in contexts:
                    at_import.setdefault(source, set()).add(line)
    target.write_text(json.dumps(dict(
        file=path.relative_to(copy).as_posix(), mark=mark, imports=round(plugin.imports, 3), lines=lines,
        at_import=at_import, failing=sorted(plugin.failing),
        seconds={name: round(plugin.seconds[name], 3) for name in names}), default=sorted))
    return 0


def read_parts(folder: Path) -> Iterator[Any]:
    """What processes of the tests left, each with the test as its context; not of one that was killed as it wrote."""
    import coverage
    for path in folder.glob('data.*'):
        data = coverage.CoverageData(str(path))
        with contextlib.suppress(coverage.CoverageException):
            data.read()
            yield data


# ---- the mutants

@dataclass
class Results:
    """What has been run: a file of JSON lines, of which the last about a mutant counts."""
    path: Path
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # the last one of a run that was killed
                entry = json.loads(line)
                self.found[entry['key']] = entry

    def add(self, entry: dict[str, Any]) -> None:
        self.found[entry['key']] = entry
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open('a') as file:
            file.write(json.dumps(entry) + '\n')


def sample(mutants: list[Mutant], number: Optional[int], seed: int) -> list[Mutant]:
    """`number` mutants, every file by its share (largest remainders), in an order that mixes the files.

    The order of a file's mutants depends on the seed alone: a larger sample contains the smaller one, but for rounding.
    """
    def draw(mutant: Mutant) -> str:
        return hashlib.sha256(f'{seed} {mutant.key}'.encode()).hexdigest()

    files: dict[str, list[Mutant]] = {}
    for mutant in sorted(mutants, key=draw):
        files.setdefault(mutant.path, []).append(mutant)
    number = min(len(mutants) if number is None else number, len(mutants))
    shares = {path: number * len(found) / len(mutants) for path, found in files.items()}
    quotas = {path: math.floor(share) for path, share in shares.items()}
    for path in sorted(shares, key=lambda p: (quotas[p] - shares[p], p))[:number - sum(quotas.values())]:
        quotas[path] += 1
    return sorted((mutant for path, found in files.items() for mutant in found[:quotas[path]]), key=draw)


def try_mutant(copy: Path, mutant: Mutant, tests: Tests, limit: float) -> dict[str, Any]:
    """Run the tests that reach a mutant; the entry says what became of it."""
    chosen, seconds, reaching = tests.choose(mutant, limit)
    names = [name for of_file in chosen.values() for name in of_file]
    entry = dict(key=mutant.key, path=mutant.path, kind=mutant.kind, line=mutant.line, before=mutant.before,
                 after=mutant.after, tests=len(names), reaching=reaching, by='')
    if not names:
        return entry | dict(result='no test')
    file, failed = copy / mutant.path, copy.parent / 'failed.txt'
    source = file.read_bytes()
    failed.unlink(missing_ok=True)

    def work() -> int:
        plugin = Selected(names, lambda name: failed.write_text(name) if not failed.exists() else None)
        return run_pytest(copy, files, plugin, '-x')

    try:
        file.write_bytes(mutant.apply(source))
        files = list(chosen)[:1]  # most die in the first file: spare them the imports of the others
        ended = in_child(copy, work, 3 * seconds + SLACK)
        if ended == 'passed' and len(chosen) > 1:
            files = list(chosen)[1:]
            ended = in_child(copy, work, 3 * seconds + SLACK)
    finally:
        file.write_bytes(source)
    entry['by'] = failed.read_text() if failed.exists() else ''
    return entry | dict(result={'passed': 'survived', 'failed': 'killed'}.get(ended, ended))


def run_mutant(tests: Tests, results: Results, limit: float, copy: Path, number: str, mutant: Mutant) -> None:
    entry = try_mutant(copy, mutant, tests, limit)
    results.add(entry)
    say(f'{number} {entry["result"]}: {mutant.path}:{mutant.line} {mutant.kind}')


def share_out(items: list, workers: int, commit: str, work: Callable[[Path, str, Any], None]) -> None:
    """Fork workers, each with a copy of the commit of its own; `work(copy, '3/10', item)` is called once an item."""
    children = []
    try:
        for worker in range(min(workers, len(items))):
            child = os.fork()
            if not child:
                numbered = [(f'{number}/{len(items)}', item) for number, item in enumerate(items, 1)]
                os._exit(run_worker(numbered[worker::workers], commit, work))
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
    except BaseException:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)
        raise
    if any(codes):
        raise SystemExit('a worker stopped; what was run is kept')


def run_worker(items: list[tuple[str, Any]], commit: str, work: Callable[[Path, str, Any], None]) -> int:
    try:
        with temporary_folder() as folder:
            copy = make_copy(folder, commit)
            for number, item in items:
                work(copy, number, item)
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix='mutation-'))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def control(results: Results, mutants: list[Mutant], tests: Tests, commit: str) -> None:
    """Run the tests that killed on the sound program: one that fails there has proved nothing."""
    known = {mutant.key for mutant in mutants}
    killers = {entry['by'] for key, entry in results.found.items() if key in known and entry.get('by')}
    files: dict[str, list[str]] = {}
    for reach in tests.reaches:
        for name in killers & set(reach.seconds):
            if f'sound {name}' not in results.found:
                files.setdefault(reach.file, []).append(name)
    seconds = {name: time for reach in tests.reaches for name, time in reach.seconds.items()}
    with temporary_folder() as folder:
        copy = make_copy(folder, commit) if files else folder
        for file, names in files.items():
            failed = copy.parent / 'failed.txt'
            failed.write_text('')

            def note(name: str, failed=failed) -> None:
                with failed.open('a') as lines:
                    lines.write(name + '\n')

            run = partial(run_pytest, copy, [file], Selected(names, note))
            ended = in_child(copy, run, 3 * sum(seconds[name] for name in names) + SLACK)
            bad = set(failed.read_text().split('\n')) if ended != 'timed out' else set(names)
            for name in names:
                results.add(dict(key=f'sound {name}', passed=name not in bad))
                if name in bad:
                    say(f'{name} fails on the sound program too: what it killed does not count')


# ---- telling

def outcomes(mutants: list[Mutant], results: Results) -> dict[str, str]:
    """Key -> result of those that have been run; a kill by a test that fails without a fault is none."""
    found = {}
    for mutant in mutants:
        entry = results.found.get(mutant.key)
        if entry:
            sound = results.found.get(f'sound {entry["by"]}', dict(passed=True))['passed']
            found[mutant.key] = entry['result'] if sound else 'survived'
    return found


def interval(part: int, whole: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share, in percent; the share of all mutants lies in it 95 times of 100."""
    if not whole:
        return 0., 100.
    share, z2 = part / whole, z * z / whole
    middle, half = share + z2 / 2, z * math.sqrt(share * (1 - share) / whole + z2 / (4 * whole))
    return 100 * (middle - half) / (1 + z2), 100 * (middle + half) / (1 + z2)


def table(mutants: list[Mutant], found: dict[str, str]) -> str:
    """Markdown: a line for each package, then one for each file."""
    whole, counts = Counter(), {}
    for mutant in mutants:
        package = mutant.path.rpartition('/')[0]
        for name in (f'**{package}**', mutant.path.removeprefix('moe_zoo/'), '**all**'):
            whole[name] += 1
            if mutant.key in found:
                counts.setdefault(name, Counter())[found[mutant.key]] += 1
    lines = ['| where | mutants | run | killed | timed out | survived | no test reaches | noticed |',
             '| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |']
    for name in sorted(counts, key=lambda n: (not n.startswith('**'), n)):
        count = counts[name]
        run, noticed = sum(count.values()), sum(count[word] for word in NOTICED)
        cells = [whole[name], run, *(count[word] for word in ('killed', 'timed out', 'survived', 'no test'))]
        lines.append(f'| {name} | ' + ' | '.join(f'{cell:,}' for cell in cells) + f' | {100 * noticed / run:.0f} % |')
    return '\n'.join(lines)


def verdict(found: dict[str, str], whole: int, explained: int) -> str:
    """One sentence about the share."""
    noticed, run = sum(result in NOTICED for result in found.values()), len(found)
    if not run:
        return 'Nothing has been run.'
    low, high = interval(noticed, run)
    range_ = '' if run == whole else f' ({low:.1f} to {high:.1f} %, Wilson, 95 %)'
    return (f'{noticed:,} of {run:,} mutants were noticed: {100 * noticed / run:.1f} %{range_}. '
            f'Of the other {run - noticed:,}, {explained:,} are explained.')


def explanations() -> dict[tuple[str, str, str], str]:
    if not EXPLAINED.exists():
        return {}
    entries = tomllib.loads(EXPLAINED.read_text(encoding='utf-8')).get('explained', [])
    return {(entry['file'], entry['before'], entry['after']): entry['why'] for entry in entries}


def report(mutants: list[Mutant], found: dict[str, str], results: Results) -> None:
    why, explained = explanations(), 0
    for mutant in mutants:
        result = found.get(mutant.key)
        if result in ('survived', 'no test'):
            reason = why.get((mutant.path, mutant.before, mutant.after), '')
            explained += bool(reason)
            entry = results.found[mutant.key]
            print(f'{mutant.key}  {mutant.path}:{mutant.line}  {mutant.where}  {mutant.kind}  '
                  f'{result}, {entry["tests"]} of {entry["reaching"]} tests')
            print(f'  - {mutant.before}\n  + {mutant.after}' + (f'\n  = {reason}' if reason else ''))
    print(f'\n{table(mutants, found)}\n\n{verdict(found, len(mutants), explained)}')


def publish(mutants: list[Mutant], found: dict[str, str], commit: str, seed: int) -> None:
    """Write the table between the markers of the page."""
    why = explanations()
    left = [mutant for mutant in mutants if found.get(mutant.key) in ('survived', 'no test')]
    explained = sum((mutant.path, mutant.before, mutant.after) in why for mutant in left)
    drawn = 'all mutants' if len(found) == len(mutants) else f'a sample with seed {seed}, every file by its share'
    words = (f'Commit {commit[:12]}, {time.strftime("%d %B %Y", time.gmtime()).lstrip("0")}, {drawn}. '
             f'{verdict(found, len(mutants), explained)}')
    begin, end = '<!-- mutation -->', '<!-- /mutation -->'
    text, marked = re.subn(f'{begin}.*{end}', lambda _: f'{begin}\n\n{words}\n\n{table(mutants, found)}\n\n{end}',
                           PAGE.read_text(encoding='utf-8'), flags=re.S)
    if marked != 1:
        raise SystemExit(f'{PAGE} needs the markers {begin} and {end} once.')
    PAGE.write_text(text, encoding='utf-8')
    print(f'wrote {PAGE}')


def show(key: str, mutants: list[Mutant], tests: Tests) -> None:
    found = [mutant for mutant in mutants if mutant.key.startswith(key)]
    if not found:
        raise SystemExit(f'--show {key!r}: there is no such mutant; --report names them.')
    for mutant in found:
        chosen, seconds, _ = tests.choose(mutant)
        print(f'{mutant.path}:{mutant.line} in {mutant.where or "the file"}, {mutant.kind}\n'
              f'  - {mutant.before}\n  + {mutant.after}\n{seconds:.0f} s of tests reach it:')
        print('\n'.join(f'  {name}' for names in chosen.values() for name in names))


def say(text: str) -> None:
    print(f'{time.strftime("%H:%M:%S")} {text}', flush=True)


def git(*words: str) -> str:
    done = subprocess.run(['git', '-C', str(ROOT), *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f'git {" ".join(words)}: {done.stderr.strip()}')
    return done.stdout.strip()


def parse(arguments: Optional[list[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument('--sample', type=int, metavar='N', help='run N mutants, every file by its share')
    what.add_argument('--all', action='store_true', help='run every mutant')
    what.add_argument('--list', action='store_true', help='count the mutants of every file')
    what.add_argument('--map', action='store_true', help='only measure which tests reach what')
    what.add_argument('--again', action='store_true', help='run what survived once more, without --seconds')
    what.add_argument('--report', action='store_true', help='print the table and the survivors')
    what.add_argument('--publish', action='store_true', help='write the table into docs/mutation.md')
    what.add_argument('--show', metavar='KEY', help='print one mutant and the tests that reach it')
    parser.add_argument('--only', default='*', metavar='GLOB', help='of these files, as "moe_zoo/losses/*"')
    parser.add_argument('--tests', nargs='+', default=['test_*'], metavar='NAME',
                        help='map only these test files, in this order, as: test_routing "test_cost*"')
    parser.add_argument('--slow', action='store_true', help='map tests marked slow too')
    parser.add_argument('--commit', default='HEAD', help='what is mutated; default %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='of the sample; default %(default)s')
    parser.add_argument('--workers', type=int, default=1, help='processes; default %(default)s')
    parser.add_argument('--seconds', type=float, metavar='S',
                        help='of tests that a mutant gets, in processor time; default 60, with --again all')
    found = parser.parse_args(arguments)
    if not any((found.sample, found.all, found.list, found.map, found.again, found.report, found.publish, found.show)):
        parser.error('say what to do, as --sample 400; --help has examples')
    return found


def main(arguments: Optional[list[str]] = None) -> None:
    found = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # tidy up on the way
    commit = git('rev-parse', '--verify', f'{found.commit}^{{commit}}')
    kept = ROOT / 'runs' / 'mutation' / git('rev-parse', f'{commit}:moe_zoo')[:12]
    results = Results(kept / 'results.jsonl')
    with temporary_folder() as folder:
        copy = make_copy(folder, commit)
        mutants = [m for m in read_mutants(copy, FOLDERS) if fnmatch.fnmatch(m.path, found.only)]
        if found.list:
            counts = Counter(mutant.path for mutant in mutants)
            print('\n'.join(f'{count:6,} {path}' for path, count in counts.items()), f'\n{len(mutants):6,} in all')
            return
        if found.map or found.again or found.sample or found.all:
            preload()
            todo = unmapped(copy, kept, found.slow, found.tests)
            share_out(todo, found.workers, commit, partial(map_file, kept))
        tests = Tests(kept / 'map', copy)
    known = outcomes(mutants, results)
    if found.show:
        show(found.show, mutants, tests)
    elif found.report:
        report(mutants, known, results)
    elif found.publish:
        publish(mutants, known, commit, found.seed)
    elif not found.map:
        if found.again:
            todo = [mutant for mutant in mutants if known.get(mutant.key) in ('survived', 'no test')]
        else:
            todo = sample(mutants, None if found.all else found.sample, found.seed)
            todo = [mutant for mutant in todo if mutant.key not in known]
        limit = found.seconds or (math.inf if found.again else 60.)
        say(f'{len(todo)} mutants to run, {len(known)} known')
        share_out(todo, found.workers, commit, partial(run_mutant, tests, results, limit))
        results = Results(results.path)
        control(results, mutants, tests, commit)
        print(verdict(outcomes(mutants, results), len(mutants), 0))


if __name__ == '__main__':
    main()
