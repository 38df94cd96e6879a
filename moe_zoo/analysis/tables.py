"""Tables of numbers: as a terminal shows them, and as CSV, Markdown and LaTeX.

A `Grid` holds plain values, a missing one being None. Drawn, the quantities of a column share one unit, which its
heading names; CSV keeps every digit.
"""
import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Union

from rich import box
from rich.table import Table
from rich.text import Text

from ..errors import InputError, nearest

Value = Union[str, int, float, None]
TEX = str.maketrans({
    **{character: f'\\{character}' for character in '&%$#_{}'},
    '\\': r'\textbackslash{}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}'})
PREFIXES = ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k'))


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        key: Its name for `--sort` and in CSV.
        heading: What a reader sees above it.
        kind: 'text'; 'mark', which is not drawn where it is missing; 'count' and 'bytes', which get a unit for the
            column; 'percent' (of 100); 'ratio'.
        unit_with: Columns of one word here share their unit.
    """
    key: str
    heading: str
    kind: str = 'count'
    unit_with: str = ''


@dataclass(frozen=True)
class Grid:
    """Rows of values below columns; `title` stands above, and names the table in LaTeX."""
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Value, ...], ...]

    def sorted_by(self, key: str) -> 'Grid':
        """Text from a to z, numbers from large to small; what is missing comes last."""
        position = [column.key for column in self.columns].index(key)
        known = [row for row in self.rows if row[position] is not None]
        known.sort(key=lambda row: row[position], reverse=self.columns[position].kind not in ('text', 'mark'))
        return replace(self, rows=(*known, *(row for row in self.rows if row[position] is None)))

    def without_empty_columns(self) -> 'Grid':
        """Only the columns in which something stands."""
        kept = [i for i in range(len(self.columns)) if any(row[i] is not None for row in self.rows)]
        columns = tuple(self.columns[i] for i in kept)
        return replace(self, columns=columns, rows=tuple(tuple(row[i] for i in kept) for row in self.rows))


def sort_grids(grids: Sequence[Grid], key: str) -> list[Grid]:
    """Every grid that has the column, sorted by it; the others as they are.

    Raises:
        InputError: None has it.
    """
    known = list(dict.fromkeys(column.key for grid in grids for column in grid.columns))
    if key not in known:
        raise InputError(f'--sort {key!r}: there is no such column.{nearest(key, known)} Known: {", ".join(known)}.')
    return [grid.sorted_by(key) if key in [c.key for c in grid.columns] else grid for grid in grids]


def stacked(grids: Sequence[Grid]) -> Grid:
    """One grid of the rows of all, each behind the title of its own; columns that one lacks are empty there."""
    columns = {column.key: column for grid in grids for column in grid.columns}
    rows = []
    for grid in grids:
        keys = [column.key for column in grid.columns]
        rows += [(grid.title, *(dict(zip(keys, row)).get(key) for key in columns)) for row in grid.rows]
    return Grid('', (Column('of', 'of', 'text'), *columns.values()), tuple(rows))


def as_rich(grid: Grid) -> Table:
    """For a terminal, without the title: every line fits its width, long names are folded."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    headings, rows = _drawn(grid)
    for column, heading in zip(grid.columns, headings):
        text = column.kind in ('text', 'mark')
        table.add_column(heading, justify='left' if text else 'right', overflow='fold', no_wrap=not text)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def as_csv(grid: Grid) -> str:
    """Headings are the keys of the columns; numbers in full."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow([column.key for column in grid.columns])
    for row in grid.rows:
        writer.writerow(['' if value is None else value.strip() if isinstance(value, str) else value for value in row])
    return text.getvalue()


def as_markdown(grid: Grid) -> str:
    """A table as GitHub shows it."""
    headings, rows = _drawn(grid)
    marks = ['---' if column.kind in ('text', 'mark') else '---:' for column in grid.columns]
    escaped = [[cell.replace('|', '\\|').replace('\n', ' ').strip() for cell in row] for row in (headings, *rows)]
    indent = [_indentation(row) for row in rows]
    lines = [escaped[0], marks, *([f'{"&nbsp;" * 2 * n}{row[0]}', *row[1:]] for n, row in zip(indent, escaped[1:]))]
    body = '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
    return (f'**{grid.title}**\n\n' if grid.title else '') + body + '\n'


def as_latex(grid: Grid) -> str:
    """A tabular of the package booktabs, the title as a comment above it."""
    headings, rows = _drawn(grid)
    spec = ''.join('l' if column.kind in ('text', 'mark') else 'r' for column in grid.columns)
    body = [
        r'\quad ' * _indentation(row) + ' & '.join(_tex(cell.strip()) for cell in row) + r' \\' for row in rows]
    head = ' & '.join(_tex(heading.replace('\n', ' ')) for heading in headings) + r' \\'
    lines = [f'% {grid.title}'] if grid.title else []
    lines += [r'% \usepackage{booktabs}', rf'\begin{{tabular}}{{{spec}}}', r'\toprule', head, r'\midrule', *body]
    return '\n'.join([*lines, r'\bottomrule', r'\end{tabular}']) + '\n'


WRITERS: dict[str, Callable[[Grid], str]] = {'csv': as_csv, 'markdown': as_markdown, 'latex': as_latex}


def quantity(value: float) -> str:
    """Four digits and a prefix: '4.208 G', '56.00 M', '123'."""
    size, prefix = next(((s, p) for s, p in PREFIXES if value >= s), (1, ''))
    digits = 3 - math.floor(math.log10(value / size)) if prefix else 0
    return f'{value / size:.{digits}f} {prefix}'.rstrip()


def _indentation(row: Sequence[str]) -> int:
    """Levels of two spaces before the first cell."""
    return (len(row[0]) - len(row[0].lstrip())) // 2


def _drawn(grid: Grid) -> tuple[list[str], list[tuple[str, ...]]]:
    """Headings with units, and the cells as text."""
    values = [[row[i] for row in grid.rows] for i in range(len(grid.columns))]
    drawn = []
    for i, column in enumerate(grid.columns):
        alike = [j for j, other in enumerate(grid.columns) if j == i or column.unit_with == other.unit_with != '']
        sizes = [abs(value) for j in alike for value in values[j] if value] if column.kind in ('count', 'bytes') else []
        drawn.append(_draw(column, values[i], sizes))
    return [heading for heading, _ in drawn], list(zip(*(cells for _, cells in drawn)))


def _draw(column: Column, values: list[Value], sizes: list[float]) -> tuple[str, list[str]]:
    forms = {'text': '{}', 'mark': '{}', 'percent': '{:.2f} %', 'ratio': '{:,.3f}'}
    size, prefix, decimals = unit_of(sizes)
    unit, heading = prefix + ('B' if column.kind == 'bytes' else ''), column.heading
    if unit:  # on a line of its own, so that columns stay narrow
        heading += f'\n({unit})'
    form = forms.get(column.kind, f'{{:,.{decimals}f}}')
    numbers = [value / size if column.kind in ('count', 'bytes') and value is not None else value for value in values]
    missing = '' if column.kind == 'mark' else '-'
    return heading, [missing if value is None else form.format(value) for value in numbers]


def unit_of(sizes: list[float]) -> tuple[float, str, int]:
    """One unit for a column, in which the largest value has at most four digits before the point, and as many behind it
    as give the smallest three, unless it is a ten-thousandth of the largest."""
    largest = max(sizes, default=0)
    size, prefix = next(((s, p) for s, p in reversed(PREFIXES) if largest < s * 1e4), PREFIXES[0])
    if largest < 1e4:
        return 1, '', 0
    smallest = max(min(sizes), largest / 1e4)
    return size, prefix, max(0, 2 - math.floor(math.log10(smallest / size)))


def _tex(text: str) -> str:
    sign = '$-$' if text[:1] == '-' and text[1:2].isdigit() else ''
    return sign + text[bool(sign):].translate(TEX)
