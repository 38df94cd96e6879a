"""The set of comparisons that docs/speed.md is made of, and the file that they are gathered in, one by one.

The set is a list of command lines of `tools/benchmark.py`, each with the seconds that one of its comparisons takes on
two cores that nobody else uses: together less than 25 minutes. Every row of the file carries the line, name and
mode that it came from, and the commit that was measured; what is there is not measured again.
"""
import gc
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import InputError, atomic_write, counted
from .targets import judged
from .timing import Ratio

FAMILIES = (  # a small model of each
    'condconv_resnet18 dyconv_resnet10 moe_resnet18 deepmoe_narrow_resnet18 vmoe_vit_s pmoe_cnn fusion_trio moefied')
PUBLISHED = (
    ('model vmoe_vit_s --equal-macs --batch-size 32 --rounds 5', 20),
    ('model condconv_mobilenetv2_100 dyconv_resnet18 moe_resnet18 --batch-size 32 --rounds 5', 23),
    ('model condconv_resnet50 --batch-size 32 --rounds 5', 55),
    ('model condconv_mobilenetv2_100 dyconv_resnet18 moe_resnet18 --twin-channels-last --batch-size 32 --rounds 5', 23),
    ('model condconv_resnet50 --twin-channels-last --batch-size 32 --rounds 3', 40),
    ('model condconv_resnet50 --batch-size 1 --mode forward --floor --rounds 9', 8),
    ('model deepmoe_resnet50 --batch-size 1 --live 0.5 --rounds 9', 8),
    ('layer condconv-*-e4-* --rounds 5', 5),
    ('layer tokens-k?-b32 tokens-dropping-k2-b32 soft-tokens-b32 --rounds 5', 9),
    ('layer moe-*-k1-b8 deepmoe-half-* --rounds 5', 4),
    ('dispatch tokens6304-*-k2 --rounds 5', 7),
    ('detector configs/coco/retinanet_moe_res5_r50_fpn_1x.yaml --equal-macs --img-size 480x640 --rounds 5', 30),
    ('coco-eval --rounds 5', 20),
    ('data --images 320 --rounds 5', 15),
    (f'compile {FAMILIES} --rounds 3', 32),
)
SAME = ('device', 'cores', 'threads', 'torch', 'timm', 'clock', 'moe_zoo')  # of a machine, for one file
DIGITS = 4  # of numbers in the file

Report = dict[str, Any]


class Key(NamedTuple):
    """What a row of the file is known by: command line, name of the comparison, what is timed."""
    line: str
    name: str
    mode: str


Planned = tuple[Key, float, Callable[[], list[dict]]]


def chosen(commands: Sequence[str] | None) -> list[tuple[str, float]]:
    """The lines of the set, or those of some commands, with the seconds of each of their comparisons."""
    return [(line, seconds) for line, seconds in PUBLISHED if not commands or line.split()[0] in commands]


def plan() -> str:
    """The set, for --help."""
    return '\n'.join(['the set:', *(f'  {line}' for line, _ in PUBLISHED)])


def run(planned: Sequence[Planned], path: Path, now: Mapping[str, Any], commit: Callable[[], str | None]) -> int:
    """Measure what the file lacks, and write it after every comparison.

    Args:
        planned: Key, expected seconds and how to measure, which returns rows.
        path: The file, which may hold some of them.
        now: What is known of this machine.
        commit: Tells the commit that runs.

    Returns:
        0.

    Raises:
        InputError: The file is of another machine or program, or comparisons failed; the others are in it.
    """
    report = read(path) if path.is_file() else {'machine': dict(now), 'rows': []}
    _check_machine(report['machine'], now, path)
    known = {key_of(row) for row in report['rows']}
    failed = []
    columns = (TextColumn('{task.description}'), BarColumn(), TextColumn('{task.percentage:.0f} %'),
               TimeElapsedColumn(), TextColumn('left'), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task('', total=sum(seconds for _, seconds, _ in planned))
        for number, (key, seconds, measure) in enumerate(planned, 1):
            progress.update(task, description=f'{number}/{len(planned)} {key.name} {key.mode}'[:48])
            if key not in known:
                try:
                    rows = [judged(row) | {'job': list(key), 'commit': commit()} for row in measure()]
                except Exception:  # one of many must not end a run of minutes
                    failed.append(key)
                    progress.console.print(traceback.format_exc(), markup=False, highlight=False)
                else:
                    report['rows'] += rows
                    write(path, report['machine'], report['rows'])
                    progress.console.print(*map(_said, rows), sep='\n', markup=False, highlight=False)
                gc.collect()
            progress.advance(task, seconds)
    if failed:
        raise InputError(
            f'{counted(len(failed), "comparison")} of {len(planned)} failed, as printed above, the first is '
            f"'{failed[0].line}' ({failed[0].name}, {failed[0].mode}); the others are in '{path}'.")
    print(f"{counted(len(planned), 'comparison')} in '{path}'", file=sys.stderr)
    return 0


def _said(row: Mapping[str, Any]) -> str:
    words = (*row['job'][1:], row.get('layer'), 'to', row['twin'], Ratio(**row['time_ratio']), row['verdict'])
    return ' '.join(str(word) for word in words if word)


def key_of(row: Mapping[str, Any]) -> Key:
    return Key(*row['job'])


def read(path: Path) -> Report:
    """What `run` wrote.

    Raises:
        InputError: The file is missing, or of another program.
    """
    try:
        report = json.loads(path.read_text(encoding='utf-8'))
        machine, rows = report['machine'], report['rows']
        for row in rows:
            Key(*row['job']), Ratio(**row['time_ratio']), row['commit'], row['kind']
        [machine[key] for key in SAME]
    except FileNotFoundError:
        raise InputError(f"There is no file '{path}'; `benchmark.py all --json FILE` writes one.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"'{path}' is not what `benchmark.py all` writes ({type(error).__name__}: {error}).") from error
    return report


def merge(paths: Sequence[Path]) -> Report:
    """The comparisons of several files; where two have the same, those of the later one, in the order of the set.

    Raises:
        InputError: They are of different machines, or one cannot be read.
    """
    first, *others = [(path, read(path)) for path in paths]
    rows: dict[Key, list[dict]] = {}
    for path, report in (first, *others):
        _check_machine(first[1]['machine'], report['machine'], path)
        for key in {key_of(row): None for row in report['rows']}:
            rows[key] = [row for row in report['rows'] if key_of(row) == key]
    order = {line: number for number, (line, _) in enumerate(PUBLISHED)}
    keys = sorted(rows, key=lambda key: order.get(key.line, len(order)))
    return {'machine': first[1]['machine'], 'rows': [row for key in keys for row in rows[key]]}


def _check_machine(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    for key in SAME:
        if before[key] != now[key]:
            raise InputError(f"'{path}' and what is measured here differ in {key}, {before[key]!r} and {now[key]!r}: "
                             'they do not belong into one table; name another file.')


def write(path: str | Path, machine: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """A JSON file, a row a line, numbers with `DIGITS` digits."""
    lines = ',\n'.join(json.dumps(_rounded(row)) for row in rows)
    with atomic_write(path) as part:
        part.write_text(f'{{"machine": {json.dumps(_rounded(machine))},\n"rows": [\n{lines}\n]}}\n', encoding='utf-8')


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return float(f'{value:.{DIGITS}g}') if isinstance(value, float) else value
