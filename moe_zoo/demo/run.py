"""Stages that run one after another, remember what they finished, and tell it on one page.

A stage keeps everything it makes in a folder of its name. `stage.json` in there says for which settings it was made,
how long it took and, once it is finished, what came out. A finished stage is not done again; one that was interrupted
goes on where its own work can (a training resumes from its last checkpoint); one whose recipe or seed changed starts
again, and so does whatever builds on it.
"""
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import resource
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import yaml
from rich.console import Console
from rich.table import Table as TerminalTable

import moe_zoo
from moe_zoo.analysis.page import Block, Page, Section, Stats, Table, duration
from moe_zoo.errors import InputError, atomic_write

RECORD = 'stage.json'
KEPT = ('seconds', 'facts', 'memory', 'result')  # of a stage's progress


@dataclass(frozen=True)
class Settings:
    """What a person chose for a run.

    Attributes:
        out: Folder of the page and of every stage.
        seed: Of every random choice.
        recipes: Folder of the recipes.
        skip: Stage key -> why it is left out.
        overrides: Recipe file name -> options that win over the file.
    """
    out: Path
    seed: int
    recipes: Path
    skip: dict[str, str]
    overrides: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Stage:
    """One part of the demonstration, and one section of the page.

    Attributes:
        key: Name of its folder.
        title: Heading of its section.
        promise: What the section will show; stands there until there is a result.
        seconds: About how long it takes on two cores.
        work: (settings, own folder, results of what it needs by key) -> a result that JSON can hold.
        show: (settings, result, own folder) -> the result in one sentence, and the blocks of the section.
        needs: Keys of the stages it builds on.
        recipes: Recipe files that decide the result.
        missing: Says what is not installed, or nothing.
    """
    key: str
    title: str
    promise: str
    seconds: float
    work: Callable[[Settings, Path, dict[str, dict]], dict]
    show: Callable[[Settings, dict, Path], tuple[str, list[Block]]]
    needs: tuple[str, ...] = ()
    recipes: tuple[str, ...] = ()
    missing: Callable[[], str] = lambda: ''


@dataclass
class Progress:
    """Where a stage stands."""
    status: str = 'pending'
    seconds: float = 0.
    result: Optional[dict] = None
    reason: str = ''
    facts: dict[str, str] = field(default_factory=dict)
    memory: int = 0


class Run:
    """All stages in order: does what is not done, and rewrites the page after every change."""

    def __init__(self, stages: Sequence[Stage], settings: Settings, title: str, lead: str, console: Console):
        self.stages = stages
        self.settings = settings
        self.title, self.lead = title, lead
        self.console = console
        self.page = settings.out / 'index.html'
        self.progress: dict[str, Progress] = {}
        for stage in stages:  # those that others build on come first
            self.progress[stage.key] = self._remembered(stage)

    def finish(self) -> None:
        """Do every stage that is not done.

        Raises:
            InputError: A stage could not use what it was given. The page says so, and the stages before it are kept.
        """
        self.write_page()
        self.console.print(f'The page, rewritten after every stage: {plain(str(self.page))}')
        for number, stage in enumerate(self.stages, 1):
            progress = self.progress[stage.key]
            self.console.print()
            self.console.rule(f'[bold]{number} of {len(self.stages)} · {stage.title}', align='left')
            if progress.status == 'pending':
                self._do(stage, progress)
                self.write_page()
                self._print(stage)
            elif progress.status == 'done':
                self._print(stage, 'kept from before · ')
            else:
                self.console.print(f'Skipped: {plain(progress.reason)}')
        total = sum(progress.seconds for progress in self.progress.values())
        page = plain(str(self.page.resolve()))
        self.console.print(f'\nFinished, {duration(total)} of work in all. Open {page} in a browser.')

    def write_page(self) -> None:
        """Write index.html for how things stand."""
        sections = [self.section(stage) for stage in self.stages]
        parts = [self.progress[stage.key] for stage in self.stages]
        about = merged_facts([part.facts for part in parts])
        if about:
            about.append(('Time', duration(sum(part.seconds for part in parts))))
            about.append(('Peak memory', f'{max(part.memory for part in parts) / 2**30:.1f} GB'))
        Page(self.title, self.lead, sections, about).write(self.page)

    def section(self, stage: Stage) -> Section:
        """The section of one stage for how things stand."""
        progress = self.progress[stage.key]
        if progress.status == 'done':
            headline, blocks = stage.show(self.settings, progress.result, self.settings.out / stage.key)
            return Section(stage.title, 'done', headline, blocks, progress.seconds)
        if progress.status in ('skipped', 'failed'):
            return Section(stage.title, progress.status, progress.reason)
        headline = f'{stage.promise} {progress.reason}'.strip()
        return Section(stage.title, progress.status, headline, seconds=self._expected(stage))

    def _do(self, stage: Stage, progress: Progress) -> None:
        """Run one stage; whatever happens, its time is remembered and the page says where it stands."""
        todo = [s for s in self.stages if self.progress[s.key].status == 'pending']
        rest = sum(self._expected(s) for s in todo)
        self.console.print(f'[dim]About {duration(self._expected(stage))}; about {duration(rest)} to the end.[/dim]')
        progress.status = 'running'
        self.write_page()
        folder, made_for = self.settings.out / stage.key, self.made_for(stage)
        self._remember(stage, progress, made_for)
        started = time.perf_counter()
        try:
            results = {key: self.progress[key].result for key in stage.needs}
            result = stage.work(self.settings, folder, results)
            progress.result, progress.status = json.loads(json.dumps(result)), 'done'
        except Exception as error:
            kind = '' if isinstance(error, InputError) else f'{type(error).__name__}: '
            progress.status, progress.reason = 'failed', f'{kind}{error}'
            raise
        finally:
            progress.seconds += time.perf_counter() - started
            if progress.status == 'running':
                progress.status, progress.reason = 'pending', 'Interrupted: the next run goes on from here.'
            progress.facts, progress.memory = facts(self.settings), peak_memory()
            self._remember(stage, progress, made_for)
            self.write_page()

    def _expected(self, stage: Stage) -> float:
        """About how long a stage will take, from how long the ones before took on this machine."""
        done = [s for s in self.stages if self.progress[s.key].status == 'done']
        planned, taken = sum(s.seconds for s in done), sum(self.progress[s.key].seconds for s in done)
        return stage.seconds * (taken / planned if planned > 30 else 1)

    def _remembered(self, stage: Stage) -> Progress:
        """What an earlier run left of a stage; a folder made for other settings is emptied before it is used again."""
        folder = self.settings.out / stage.key
        record, reason = read_record(folder), self._obstacle(stage)
        if reason and record is None:
            return Progress('skipped', reason=reason)
        made_for = self.made_for(stage)  # refuses a missing recipe before anything runs
        if record is not None and record.pop('made_for') == made_for:
            if record['result'] is not None:
                return Progress('done', **record)
            return Progress('skipped', reason=reason) if reason else Progress(**record)
        if reason:
            return Progress('skipped', reason=reason)
        if record is not None:
            self.console.print(f"'{stage.title}' was made for another seed, recipe or version: it starts again.")
            shutil.rmtree(folder)
        return Progress()

    def _obstacle(self, stage: Stage) -> str:
        """Why a stage cannot be done, or nothing."""
        reason = self.settings.skip.get(stage.key) or stage.missing()
        absent = [s.title for s in self.stages if s.key in stage.needs and self.progress[s.key].status == 'skipped']
        return reason or (f'It builds on a part that was skipped: {", ".join(absent)}.' if absent else '')

    def _remember(self, stage: Stage, progress: Progress, made_for: str) -> None:
        record = {'made_for': made_for, **{name: getattr(progress, name) for name in KEPT}}
        with atomic_write(self.settings.out / stage.key / RECORD) as path:
            path.write_text(json.dumps(record, indent=1), encoding='utf-8')

    def made_for(self, stage: Stage) -> str:
        """A hash of what decides the result of a stage, that of the stages it builds on included."""
        upstream = [self.made_for(s) for s in self.stages if s.key in stage.needs]
        texts = [text for name in stage.recipes for text in read_with_bases(self.settings.recipes / name)]
        overrides = [self.settings.overrides.get(name, {}) for name in stage.recipes]
        everything = [stage.key, moe_zoo.__version__, self.settings.seed, texts, overrides, upstream]
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:16]

    def _print(self, stage: Stage, prefix: str = '') -> None:
        """The section on the terminal: headline, numbers and tables."""
        section = self.section(stage)
        for block in section.blocks:
            if isinstance(block, Table):
                self.console.print(terminal_table(block))
            elif isinstance(block, Stats):
                self.console.print('   '.join(f'[bold]{value}[/bold] {what}' for value, what in block.items))
        took = f'[dim]({prefix}{duration(section.seconds)})[/dim]'
        self.console.print(f'[green]✓[/green] {plain(section.headline)} {took}')


def read_recipe(path: Path) -> str:
    """The text of a recipe.

    Raises:
        InputError: It cannot be read.
    """
    try:
        return path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The recipe '{path}' cannot be read: {error}.") from error


def read_with_bases(path: Path) -> list[str]:
    """The text of a recipe, and of those that it builds on by detectron2's `_BASE_`.

    Raises:
        InputError: One of them cannot be read.
    """
    text = read_recipe(path)
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"The recipe '{path}' is not valid YAML: {' '.join(str(error).split())}.") from error
    bases = content.get('_BASE_', []) if isinstance(content, dict) else []
    bases = bases if isinstance(bases, list) else [bases]
    return [text, *(base for name in bases for base in read_with_bases(path.parent / Path(name).expanduser()))]


def read_record(folder: Path) -> Optional[dict]:
    """The record of a stage's folder, or None where there is no folder yet.

    Raises:
        InputError: The folder was not made by a stage, or its record cannot be read.
    """
    if not folder.exists():
        return None
    try:
        record = json.loads((folder / RECORD).read_text(encoding='utf-8'))
        return {key: record[key] for key in ('made_for', *KEPT)}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(
            f"'{folder}' is in the way: it holds no readable {RECORD}, so it is not known to be ours; move it away or"
            ' choose another --out.'
        ) from None


def forget(stages: Sequence[Stage], out: Path) -> None:
    """Remove the folders that stages made below `out`, and nothing else."""
    for stage in stages:
        if read_record(out / stage.key) is not None:
            shutil.rmtree(out / stage.key)


def plain(text: str) -> str:
    """Prose of the page without its marks, safe to print with rich."""
    text = re.sub(r'\[([^\]]+)\]\(https?://[^\s)]+\)', r'\1', text)
    return re.sub(r'`|\*\*', '', text).replace('[', r'\[')


def terminal_table(table: Table) -> TerminalTable:
    """The same table for the terminal."""
    drawn = TerminalTable(title=plain(table.caption) or None, title_justify='left', title_style='dim')
    for name, right in zip(table.columns, table.numeric()):
        drawn.add_column(plain(name), justify='right' if right else 'left')
    for row in table.texts():
        drawn.add_row(*map(plain, row))
    return drawn


def facts(settings: Settings) -> dict[str, str]:
    """What the numbers of a stage depend on, as it ends."""
    from ..analysis.origin import commit, short_commit
    return {
        'Date': time.strftime('%Y-%m-%d'),
        'Seed': str(settings.seed),
        'Commit': short_commit(found) if (found := commit()) else 'not a git checkout',
        'Versions': ', '.join(versions()),
        'Hardware': hardware(),
    }


def merged_facts(parts: Sequence[dict[str, str]]) -> list[tuple[str, str]]:
    """The facts of all parts: once where they agree, else with the numbers of the parts that they hold for."""
    merged = []
    for name in next(filter(None, parts), {}):
        holds: dict[str, list[str]] = {}
        for number, part in enumerate(parts, 1):
            if part:
                holds.setdefault(part[name], []).append(str(number))
        texts = [f'{value} (part {", ".join(numbers)})' for value, numbers in holds.items()]
        merged.append((name, next(iter(holds)) if len(holds) == 1 else '; '.join(texts)))
    return merged


def versions() -> list[str]:
    """`name version` of Python and of every package that numbers depend on, where it is installed."""
    found = [f'Python {platform.python_version()}', f'moe_zoo {moe_zoo.__version__}']
    for name in ('torch', 'torchvision', 'timm', 'detectron2', 'sal-detectron2', 'scikit-learn', 'numpy'):
        try:
            found.append(f'{name} {importlib.metadata.version(name)}')
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """Cores this process may use, processor, memory, GPU."""
    import torch
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r'model name\s*:\s*(.+)', Path('/proc/cpuinfo').read_text(encoding='utf-8'))
        name = found[1] if found else name
    except OSError:
        pass
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else 'no GPU'
    return f'{cores} cores of {name}, {memory:.0f} GB of memory, {gpu}'


def peak_memory() -> int:
    """Largest resident size of this process or of one child so far, in bytes."""
    unit = 1 if sys.platform == 'darwin' else 1024
    return unit * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
