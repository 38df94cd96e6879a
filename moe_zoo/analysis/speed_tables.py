"""What `tools/benchmark.py` prints: rows of comparisons as a table for a terminal, and the conditions below it."""
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from .timing import Ratio

Row = Mapping[str, Any]


def table(command: str, rows: Sequence[Row]) -> Table:
    """The rows of one command."""
    tables = {'model': _models, 'compile': _compiled, 'detector': _detectors, 'data': _loading}
    return tables.get(command, _layers)(rows)


def conditions(machine: Mapping[str, Any], rounds: int, rows: Sequence[Row]) -> str:
    """What the timings depend on besides the program."""
    loads = [load for row in rows for load in row['loads']]
    during = f'{min(loads):.1f} to {max(loads):.1f} while timing' if loads else ''
    return (
        f'{machine["device"]}, {machine["cores"]} cores, torch threads: {machine["threads"]}, {machine["clock"]} time, '
        f'{rounds} rounds; load {machine["load"]:.1f} before, {during}; torch {machine["torch"]}, '
        f'timm {machine["timm"]}')


def _models(rows: Sequence[Row]) -> Table:
    found = _table('model / twin', 'mode', 'images', 'MACs', 'time', 'at most', '', 'ms', 'MB', 'optimiser, ms')
    for row in rows:
        found.add_row(
            f'{row["model"]} /\n{textwrap.fill(twin_of(row), 32)}', row['mode'], str(row['batch_size']),
            f'{row["macs_ratio"]:.3f}', str(Ratio(**row['time_ratio'])), *_aim(row), _times(row), _memory(row),
            _times(row, 'optimizer_seconds'))
    for row in rows:
        if 'reading_seconds' in row:
            found.caption = (f'{row["model"]}: reading the {row["expert_bytes"] / 1e6:,.0f} MB of its experts once '
                             f'takes {milliseconds(row["reading_seconds"])}')
    return found


def twin_of(row: Row) -> str:
    """The other side of a model's row, with what makes it this twin."""
    twin = row['twin'] + ''.join(f' {key}={value}' for key, value in row['twin_args'].items())
    twin += ', channels-last' if row.get('twin_channels_last') else ''
    return twin + (', wider MLPs' if row['equal_macs'] else '')


def _compiled(rows: Sequence[Row]) -> Table:
    found = _table('model', 'mode', 'images', 'compiled / eager', 'ms', 'compilation', 'graph breaks')
    for row in rows:
        found.add_row(row['model'], row['mode'], str(row['batch_size']), str(Ratio(**row['time_ratio'])), _times(row),
                      f'{row["compile_seconds"]:.1f} s', str(row['graph_breaks']))
    return found


def _detectors(rows: Sequence[Row]) -> Table:
    found = _table('detector, one image', 'mode', 'input', 'parameters', 'GMACs', 'ms', 'MB', 'MACs', 'time', 'at most',
                   '')
    for row in rows:
        first = row['first']
        found.add_row(
            textwrap.fill(row['config'].rpartition('/')[2].replace('.yaml', ''), 32), row['mode'],
            'x'.join(map(str, row['input_size'][1:])), f'{row["parameters"]:,}', f'{row["macs"] / 1e9:,.3f}',
            milliseconds(row['seconds'])[:-3], f'{row["memory"] / 1e6:,.1f}',
            '1' if first else f'{row["macs_ratio"]:.3f}',
            '1' if first else str(Ratio(**row['time_ratio'])), *_aim(row))
    return found


def _loading(rows: Sequence[Row]) -> Table:
    found = _table('data', 'beside', 'time ratio', 'images a second', 'of the other', 'workers')
    for row in rows:
        found.add_row(
            row['about'], row['twin'], str(Ratio(**row['time_ratio'])),
            *(f'{row["images"] / statistics.median(row[key]):,.0f}' for key in ('seconds', 'twin_seconds')),
            str(row['workers']))
    return found


def _layers(rows: Sequence[Row]) -> Table:
    found = _table('case', 'mode', 'layer', 'beside', 'time', 'at most', '', 'ms', 'MB')
    for row in rows:
        found.add_row(row['case'], row['mode'], row['layer'], row['twin'], str(Ratio(**row['time_ratio'])), *_aim(row),
                      _times(row), _memory(row))
    return found


def _table(*headings: str) -> Table:
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        found.add_column(heading, overflow='fold', no_wrap=not number)
    return found


def _aim(row: Row) -> tuple[str, str]:
    return '' if row['at_most'] is None else f'{row["at_most"]:.2f}', row['verdict']


def _times(row: Row, key: str = 'seconds') -> str:
    """Of ours / of the other."""
    return ' / '.join(milliseconds(row[name])[:-3] for name in (key, f'twin_{key}') if name in row)


def milliseconds(seconds: Sequence[float]) -> str:
    """Their median."""
    return f'{1e3 * statistics.median(seconds):,.2f} ms'


def _memory(row: Row) -> str:
    return ' / '.join(f'{row[name] / 1e6:,.1f}' for name in ('memory', 'twin_memory') if name in row)
