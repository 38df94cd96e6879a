"""Charts as SVG text in the colours of the page, so that they follow its light and dark. Standard library only.

Every chart is 440 units wide, with text that is still readable when a phone shows it at three quarters of that.
Letters: E experts.
"""
import base64
import html
import itertools
import math
import statistics
from dataclasses import dataclass
from typing import Callable, Mapping, Sequence

from moe_zoo.errors import InputError

__all__ = [
    'Mark', 'curves', 'estimates', 'expert_colour', 'grid_map', 'heat_map', 'histogram', 'intervals', 'pictures',
    'ratios', 'scatter', 'share_bars', 'strips', 'ticks', 'trade_offs']

WIDTH = 440
LETTER = 7.5  # wide at most, on average
LEFT, BOTTOM = 58, 280  # of the plane of scatter and curves
COLOURS = 8  # --expert-0 .. --expert-7 of page.css
DOTTED = 40  # points of a line that are drawn as dots too


def expert_colour(expert: int) -> str:
    """The page's colour of an expert; from the ninth expert on they come again."""
    return f'var(--expert-{expert % COLOURS})'


def scatter(
        points: Sequence[tuple[str, float, float, bool]],
        x_label: str,
        y_label: str,
        y_format: str = '{:.1f}',
        x_format: str = '{:g}',
) -> str:
    """Points with their names, x on a logarithmic scale.

    Args:
        points: (name, x > 0, y, emphasised). Emphasised points are filled, the others are rings.
        x_label, y_label: Written along the axes, units included.
        y_format, x_format: Of the numbers at the axes.
    """
    if not points or any(x <= 0 for _, x, _, _ in points):
        raise InputError(f'points={points!r}: a chart on a logarithmic scale needs at least one point, and x above 0.')
    across, up, parts = _axes(
        [x for _, x, _, _ in points], [y for _, _, y, _ in points], x_label, y_label, x_format, y_format)
    placed = [(name, across(x), up(y), bold) for name, x, y, bold in points]
    taken = [(cx - 8, cy - 8, cx + 8, cy + 8) for _, cx, cy, _ in placed]
    for name, cx, cy, emphasised in placed:
        style = 'fill="var(--accent)"' if emphasised else 'fill="var(--card)"'
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="6" {style} stroke="var(--accent)" stroke-width="2"/>')
        parts.append(_text(*_place(cx, cy, name, taken, LEFT, BOTTOM), name, 'start'))
    return _svg(BOTTOM + 52, parts)


@dataclass(frozen=True)
class Mark:
    """A point of `trade_offs`.

    Attributes:
        name: What it is; shown beside the pointer.
        x: Above 0.
        y: Its height.
        series: Decides colour and shape: a number, which names in the legend belong to.
        hollow: An outline, for dense networks.
        x_range: (from, to) of a bar across; None draws none.
        y_half: Half the length of an upright bar; None draws none.
    """
    name: str
    x: float
    y: float
    series: int
    hollow: bool = False
    x_range: tuple[float, float] | None = None
    y_half: float | None = None


def trade_offs(
        marks: Sequence[Mark],
        joined: Sequence[tuple[int, int]],
        series: Sequence[str],
        x_label: str,
        y_label: str,
        x_format: str = '{:g}',
        y_format: str = '{:.1f}',
        most: float = math.inf,
) -> str:
    """What is reached over what it costs: points that differ in shape as well as colour, some joined by lines.

    Args:
        marks: The points. x is on a logarithmic scale where the largest is more than three times the smallest.
        joined: Pairs of positions in `marks`.
        series: Names for the legend, by number.
        x_label, y_label: Written along the axes, units included.
        x_format, y_format: Of the numbers at the axes and beside the pointer.
        most: The largest value that y can have: bars are cut there.
    """
    if not marks or any(mark.x <= 0 for mark in marks):
        raise InputError('marks: a chart of costs needs at least one point, and costs above 0.')
    xs = [x for mark in marks for x in (mark.x, *(mark.x_range or ()))]
    ys = [end for mark in marks for half in [max(mark.y_half or 0, .5)]  # room for a point
          for end in (mark.y - half, min(mark.y + half, most))]
    across, up, parts = _axes(xs, ys, x_label, y_label, x_format, y_format, max(xs) > 3 * min(xs))
    places = [(across(mark.x), up(mark.y)) for mark in marks]
    for a, b in joined:
        (x0, y0), (x1, y1) = places[a], places[b]
        parts.append(
            f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" '
            f'stroke="{expert_colour(marks[b].series)}" stroke-width="1.5" stroke-dasharray="5 3"/>')
    for mark, (x, y) in zip(marks, places):
        colour = expert_colour(mark.series)
        bars = [(across(mark.x_range[0]), y, across(mark.x_range[1]), y)] if mark.x_range else []
        bars += [(x, up(mark.y - mark.y_half), x, up(min(mark.y + mark.y_half, most)))] if mark.y_half else []
        parts += [f'<line x1="{a:.1f}" y1="{b:.1f}" x2="{c:.1f}" y2="{d:.1f}" stroke="{colour}"/>'
                  for a, b, c, d in bars]
        text = f'{mark.name}: {x_format.format(mark.x)}, {y_format.format(mark.y)}'
        parts.append(_shape(mark.series, x, y, mark.hollow, text))
    y = BOTTOM + 62
    for number, name in enumerate(series):  # one a line: names of runs are long
        parts.append(_shape(number, LEFT + 6, y + 20 * number, False, name))
        parts.append(_text(LEFT + 20, y + 20 * number + 4, name, 'start', soft=True))
    return _svg(y + 20 * len(series), parts)


SHAPES = (  # outlines around (0, 0) of about one area; with eight colours, forty series differ
    'M-6 0A6 6 0 1 0 6 0A6 6 0 1 0 -6 0Z', 'M-5.3 -5.3H5.3V5.3H-5.3Z', 'M0 -7.5L7.5 0L0 7.5L-7.5 0Z',
    'M0 -7L7 5.5H-7Z', 'M0 7L7 -5.5H-7Z')


def _shape(series: int, x: float, y: float, hollow: bool, title: str) -> str:
    colour = expert_colour(series)
    return (
        f'<path transform="translate({x:.1f} {y:.1f})" d="{SHAPES[series % len(SHAPES)]}" stroke="{colour}" '
        f'stroke-width="2" fill="{"var(--card)" if hollow else colour}"><title>{html.escape(title)}</title></path>')


def curves(
        lines: Sequence[tuple[str, Sequence[tuple[float, ...]]]],
        x_label: str,
        y_label: str,
        y_format: str = '{:.1f}',
        x_format: str = '{:g}',
        log: bool = True,
        least: float = -math.inf,
        series: Sequence[int] = (),
        dashed: Sequence[int] = (),
        span: tuple[float, ...] = (),
) -> str:
    """Points joined by lines, one colour a line, which are named below.

    Args:
        lines: (name, [(x, y), ...]) in order of x; a third number is a deviation, drawn as a bar from y - d to y + d.
        x_label, y_label: Written along the axes, units included.
        y_format, x_format: Of the numbers at the axes.
        log: Whether x, which is then above 0, is on a logarithmic scale.
        least: Bars are cut there: the smallest value that y can have.
        series: Number of the colour of each line; none counts on from 0.
        dashed: Positions of the lines that are dashed.
        span: Values that the upright axis has to reach.
    """
    points = [point for _, line in lines for point in line]
    if not points or (log and any(x <= 0 for x, *_ in points)):
        raise InputError(f'lines={lines!r}: a chart needs at least one point, and on a logarithmic scale x above 0.')
    ends = [(x, end) for x, y, *deviation in points for d in deviation or [0] for end in (max(y - d, least), y + d)]
    across, up, parts = _axes(
        [x for x, _ in ends], [*(y for _, y in ends), *span], x_label, y_label, x_format, y_format, log)
    names = []
    for number, (name, line) in enumerate(lines):
        colour = expert_colour(series[number] if series else number)
        path = ' '.join(f'{across(a):.1f},{up(b):.1f}' for a, b, *_ in line)
        dash = ' stroke-dasharray="5 3"' if number in dashed else ''
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}>'
            f'<title>{html.escape(name)}</title></polyline>')
        for a, b, *deviation in line if len(line) <= DOTTED else ():
            parts += [
                f'<line x1="{across(a):.1f}" y1="{up(max(b - d, least)):.1f}" x2="{across(a):.1f}" '
                f'y2="{up(b + d):.1f}" stroke="{colour}" stroke-opacity=".6"/>' for d in deviation]
            parts.append(
                f'<circle cx="{across(a):.1f}" cy="{up(b):.1f}" r="4" fill="{colour}">'
                f'<title>{html.escape(name)}: {x_format.format(a)}, {y_format.format(b)}</title></circle>')
        names.append((name, colour, number in dashed))
    return _svg(_names_of_lines(parts, names), parts)


def _names_of_lines(parts: list[str], names: Sequence[tuple[str, str, bool]]) -> float:
    """Add (name, colour, hollow) below a plane, in as many lines as they need, and return where they end."""
    x, y = LEFT, BOTTOM + 66
    for name, colour, hollow in names:
        width = 31 + LETTER * len(name)
        if x + width > WIDTH and x > LEFT:
            x, y = LEFT, y + 20
        fill = f'fill="none" stroke="{colour}" stroke-width="2"' if hollow else f'fill="{colour}"'
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" rx="2" {fill}/>')
        parts.append(_text(x + 17, y + 11, name, 'start', soft=True))
        x += width
    return y + 18


def intervals(rows: Sequence[tuple[str, Sequence[float]]], x_label: str, x_format: str = '{:g}') -> str:
    """One row a name: its values as dots, their mean as a bar.

    Args:
        rows: (name, values), at least one value a row.
        x_label: Written along the axis, unit included.
        x_format: Of the numbers at the axis.
    """
    values = [value for _, row in rows for value in row]
    marks = ticks(min(values), max(values))
    left, height = min(30 + LETTER * max(len(name) for name, _ in rows), WIDTH / 2), 26
    bottom = height * len(rows) + 6

    def across(value: float) -> float:
        return left + (value - marks[0]) / (marks[-1] - marks[0]) * (WIDTH - left - 24)

    parts = []
    for mark in marks:
        parts.append(_line(across(mark), 0, across(mark), bottom))
        parts.append(_text(across(mark), bottom + 16, x_format.format(round(mark, 10)), soft=True))
    parts.append(_text((left + WIDTH - 24) / 2, bottom + 38, x_label))
    for number, (name, row) in enumerate(rows):
        y = height * (number + .5) + 3
        mean = sum(row) / len(row)
        parts.append(_text(left - 10, y + 4, name, 'end'))
        for value in row:
            parts.append(f'<circle cx="{across(value):.1f}" cy="{y}" r="4" fill="var(--accent)" fill-opacity=".45"/>')
        parts.append(
            f'<rect x="{across(mean) - 1.5:.1f}" y="{y - 9}" width="3" height="18" fill="var(--accent)">'
            f'<title>{html.escape(name)}: mean {mean:.4g}</title></rect>')
    return _svg(bottom + 46, parts)


def _axes(
        xs: Sequence[float],
        ys: Sequence[float],
        x_label: str,
        y_label: str,
        x_format: str,
        y_format: str,
        log: bool = True,
) -> tuple[Callable[[float], float], Callable[[float], float], list[str]]:
    """Where x and y values lie in the drawing, and the axes around them."""
    right, top = 14, 14
    scale = math.log10 if log else float
    low, high = min(map(scale, xs)), max(map(scale, xs))
    margin = .25 if log else .05 * (high - low) or 1.
    low, high = low - margin, high + margin
    marks = ticks(min(ys), max(ys))

    def across(x: float) -> float:
        return LEFT + (scale(x) - low) / (high - low) * (WIDTH - LEFT - right)

    def up(y: float) -> float:
        return BOTTOM - (y - marks[0]) / (marks[-1] - marks[0]) * (BOTTOM - top)

    parts = []
    for mark in marks:
        parts.append(_line(LEFT, up(mark), WIDTH - right, up(mark)))
        parts.append(_text(LEFT - 8, up(mark) + 4, y_format.format(mark), 'end', soft=True))
    for mark in _log_ticks(low, high) if log else [m for m in ticks(low, high) if low <= m <= high]:
        x = across(mark)
        parts.append(_line(x, BOTTOM, x, BOTTOM + 5))
        parts.append(_text(x, BOTTOM + 20, x_format.format(mark), soft=True))
    middle = (top + BOTTOM) / 2
    parts.append(_text((LEFT + WIDTH - right) / 2, BOTTOM + 42, x_label))
    parts.append(f'<g transform="rotate(-90 14 {middle})">{_text(14, middle, y_label)}</g>')
    return across, up, parts


def _place(cx: float, cy: float, name: str, taken: list, left: float, bottom: float) -> tuple[float, float]:
    """Where a point's name covers no point and no other name: right of it, left, above, below, further away."""
    width = 7.3 * len(name)
    spots = [(cx + 12, cy + 4), (cx - 12 - width, cy + 4)]
    spots += [(cx - width / 2, cy + dy) for dy in (-13, 22, -30, 39, -47, 56)]
    for x, y in spots:
        x = min(max(x, left + 2), WIDTH - width)
        box = (x, y - 12, x + width, y + 3)
        free = all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken)
        if free and 0 < box[1] and box[3] < bottom:
            break
    taken.append(box)
    return x, y


def share_bars(rows: Sequence[tuple[str, Sequence[float]]]) -> str:
    """One bar a layer, divided among its experts.

    Args:
        rows: (name, E shares that sum to one).
    """
    most = max(len(shares) for _, shares in rows)
    parts, y = [], 0
    for name, shares in rows:
        parts.append(_text(0, y + 14, name, 'start'))
        x = 0.
        for expert, share in enumerate(shares):
            width = share * WIDTH
            label = f'{name}, expert {expert}: {100 * share:.1f} %'
            parts.append(
                f'<rect x="{x:.2f}" y="{y + 21}" width="{max(width - 1, 0):.2f}" height="20" rx="2" '
                f'fill="{expert_colour(expert)}"><title>{html.escape(label)}</title></rect>')
            x += width
        y += 54
    names = ('expert 0', *map(str, range(1, most)))
    return _svg(_legend(parts, [(name, expert_colour(e)) for e, name in enumerate(names)], y), parts)


def heat_map(
        row_names: Sequence[str],
        column_names: Sequence[str],
        values: Sequence[Sequence[float | None]],
        row_label: str = '',
        column_label: str = '',
        value_format: str = '{:.0f}',
) -> str:
    """A table of shades: the larger the value, the darker its cell. Values are at least 0 and are written in where the
    columns are wide enough; None is left blank. Names without room are cut, and whole beside the pointer."""
    most = max((value for row in values for value in row if value is not None), default=0) or 1
    left = min(30 + LETTER * max(map(len, row_names)), WIDTH / 2)
    width, height = (WIDTH - left) / len(column_names), 24
    parts = [_fitted(left + (WIDTH - left) / 2, 13, column_label, WIDTH - left)] if column_label else []
    # Of many columns some are named, and their values shown beside the pointer; three letters are never cut.
    every = math.ceil(max(22, LETTER * min(max(map(len, column_names)), 3) + 6) / width)
    for column, name in enumerate(column_names):
        if column % every == 0:
            middle = left + (column + .5) * width
            middle = min(middle, WIDTH - LETTER / 2 * len(name)) if every > 1 else middle
            parts.append(_fitted(middle, 33, name, every * width, soft=True))
    for row, (name, cells) in enumerate(zip(row_names, values)):
        y = 42 + row * height
        parts.append(_fitted(left - 8, y + 16, name, left - 30, 'end', soft=True))
        for column, value in enumerate(cells):
            if value is None:
                continue
            x, shade = left + column * width, .5 * max(0., value) / most  # half at most: the number stays legible
            text = value_format.format(value)
            box = (f'<rect x="{x + 1:.1f}" y="{y + 1}" width="{max(width - 2, 1):.1f}" height="{height - 2}" rx="2" '
                   f'fill="var(--accent)" fill-opacity="{shade:.2f}"')
            if every == 1:
                parts += [f'{box}/>', _text(x + width / 2, y + 16, text)]
            else:
                parts.append(f'{box}><title>{html.escape(f"{name}, {column_names[column]}: {text}")}</title></rect>')
    bottom = 42 + len(row_names) * height
    if row_label:
        parts.append(f'<g transform="rotate(-90 12 {(42 + bottom) / 2})">{_text(12, (42 + bottom) / 2, row_label)}</g>')
    return _svg(bottom + 4, parts)


def histogram(counts: Sequence[int], x_label: str, low: float = 0., high: float = 1.) -> str:
    """Bars over equal parts of [low, high], as shares of all in percent."""
    shares = [100 * count / max(sum(counts), 1) for count in counts]
    across, up, parts = _axes([low, high], [0., *shares], x_label, 'share, %', '{:g}', '{:.0f}', log=False)
    width = (high - low) / len(counts)
    for number, share in enumerate(shares):
        x = low + number * width
        label = f'{x:.2f} to {x + width:.2f}: {share:.1f} %'
        parts.append(
            f'<rect x="{across(x) + .5:.1f}" y="{up(share):.1f}" width="{across(x + width) - across(x) - 1:.1f}" '
            f'height="{BOTTOM - up(share):.1f}" fill="var(--accent)"><title>{label}</title></rect>')
    return _svg(BOTTOM + 52, parts)


def estimates(
        rows: Sequence[tuple[str, float, float]],
        x_label: str,
        reference: tuple[str, float] | None = None,
) -> str:
    """One row a name: an estimate as a dot and two standard errors to either side as a line.

    Args:
        rows: (name, value, standard error).
        x_label: Written along the axis, unit included.
        reference: (name, value) of an upright line to compare with.
    """
    ends = [value + sign * 2 * error for _, value, error in rows for sign in (-1, 1)]
    ends += [reference[1]] if reference else []
    marks = ticks(min(ends), max(ends))
    left, height = min(30 + LETTER * max(len(name) for name, _, _ in rows), WIDTH / 2), 26
    top = 22 if reference else 0
    bottom = top + height * len(rows) + 6

    def across(value: float) -> float:
        return left + (value - marks[0]) / (marks[-1] - marks[0]) * (WIDTH - left - 24)

    parts = []
    for mark in marks:
        parts.append(_line(across(mark), top, across(mark), bottom))
        parts.append(_text(across(mark), bottom + 16, f'{round(mark, 10):g}', soft=True))
    parts.append(_text((left + WIDTH - 24) / 2, bottom + 38, x_label))
    if reference:
        x = across(reference[1])
        parts.append(f'<line x1="{x:.1f}" y1="{top - 4}" x2="{x:.1f}" y2="{bottom}" stroke="currentColor" '
                     'stroke-width="1.5" stroke-dasharray="4 3"/>')
        parts.append(_text(min(max(x, left), WIDTH - 60), 12, f'{reference[0]} {reference[1]:.1f}', soft=True))
    for number, (name, value, error) in enumerate(rows):
        y = top + height * (number + .5) + 3
        parts.append(_text(left - 10, y + 4, name, 'end'))
        x0, x1 = across(value - 2 * error), across(value + 2 * error)
        parts.append(f'<line x1="{x0:.1f}" y1="{y}" x2="{x1:.1f}" y2="{y}" stroke="var(--accent)" stroke-width="2"/>')
        parts.append(f'<circle cx="{across(value):.1f}" cy="{y}" r="5" fill="var(--accent)">'
                     f'<title>{html.escape(name)}: {value:.1f}, standard error {error:.1f}</title></circle>')
    return _svg(bottom + 46, parts)


def ratios(groups: Mapping[str, Sequence[tuple[str, Sequence[float], float | None]]], x_label: str) -> str:
    """Ratios in groups, each under its name: a dot a value, a bar at the median, a broken line at 1.

    Args:
        groups: Name to rows of (label, values, the value aimed at or None).
        x_label: Written along the axis.
    """
    marks = ticks(.5, max([value for rows in groups.values() for _, values, _ in rows for value in values] + [1.5]))
    left, right, y = 150, WIDTH - 24, 0
    parts: list[str] = []

    def across(value: float) -> float:
        return left + (value - marks[0]) / (marks[-1] - marks[0]) * (right - left)

    def bar(value: float, width: int, colour: str) -> str:
        return (f'<rect x="{across(value) - width / 2:.1f}" y="{y + 2}" width="{width}" height="18" '
                f'fill="var(--{colour})"/>')

    for name, rows in groups.items():
        parts.append(_text(0, y + 16, name, 'start'))
        y += 22
        for label, values, aim in rows:
            parts.append(_text(left - 12, y + 15, label, 'end', soft=True))
            parts += [f'<circle cx="{across(value):.1f}" cy="{y + 11}" r="4" fill="var(--accent)" fill-opacity=".45"/>'
                      for value in values]
            parts.append(bar(statistics.median(values), 3, 'accent'))
            parts += [] if aim is None else [bar(aim, 2, 'bad')]
            y += 22
        y += 6
    parts += [_text(across(mark), y + 16, f'{mark:g}', soft=True) for mark in marks]
    parts.append(_text(WIDTH / 2, y + 38, x_label))
    one = (f'<line x1="{across(1):.1f}" y1="0" x2="{across(1):.1f}" y2="{y}" stroke="currentColor" '
           'stroke-dasharray="4 3"/>')
    return _svg(y + 46, [*(_line(across(mark), 0, across(mark), y) for mark in marks), one, *parts])


def strips(
        rows: Sequence[tuple[str, Sequence[Sequence[float]]]],
        names: Sequence[str],
        columns: Sequence[str],
        column_label: str,
) -> str:
    """One strip a row: in every column a dot for each name, all strips on a scale of their own from 0.

    Args:
        rows: (title, a list of values, one a column, for each name).
        names: What the colours stand for.
        columns: Names of the columns.
        column_label: What they are.
    """
    parts, y, left, height = [], 0., 40, 84
    width = (WIDTH - left) / len(columns)
    for title, series in rows:
        most = max((v for values in series for v in values), default=0) or 1
        parts.append(_text(0, y + 13, title, 'start'))
        base = y + 30 + height
        for level in (0, 1):
            parts.append(_line(left, base - level * height, WIDTH, base - level * height))
            parts.append(_text(left - 6, base - level * height + 4, f'{level * most:.2g}', 'end', soft=True))
        for number, (name, values) in enumerate(zip(names, series)):
            shift = (number + 1) / (len(names) + 1)
            for column, value in enumerate(values):
                parts.append(
                    f'<circle cx="{left + (column + shift) * width:.1f}" cy="{base - height * value / most:.1f}" r="4" '
                    f'fill="{expert_colour(number)}"><title>{html.escape(f"{title}, {columns[column]}, {name}")}: '
                    f'{value:.3f}</title></circle>')
        y = base + 14
    for column, name in enumerate(columns):
        parts.append(_text(left + (column + .5) * width, y + 4, name, soft=True))
    parts.append(_text(left + (WIDTH - left) / 2, y + 24, column_label))
    end = _legend(parts, [(name, expert_colour(n)) for n, name in enumerate(names)], y + 40)
    return _svg(end, parts)


def pictures(
        panels: Sequence[tuple[str, bytes, Sequence[Sequence[str | None]] | None]],
        columns: int,
        legend: Sequence[tuple[str, str]] = (),
        ratio: float = 1.,
) -> str:
    """Pictures side by side, each under its name; over each, if wanted, a grid of colours.

    Args:
        panels: (name, bytes of a PNG or JPEG, rows of colours or None). A cell that is None is veiled.
        columns: Pictures in a row.
        legend: (name, colour), written below.
        ratio: Height of a picture over its width.
    """
    gap = 8
    width = (WIDTH - gap * (columns - 1)) / columns
    height, parts = width * ratio, []
    for number, (name, picture, grid) in enumerate(panels):
        x, y = number % columns * (width + gap), number // columns * (height + 28)
        kind = 'jpeg' if picture[:2] == b'\xff\xd8' else 'png'
        parts.append(_text(x, y + 13, name, 'start', soft=True))
        parts.append(
            f'<image x="{x:.1f}" y="{y + 20:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'preserveAspectRatio="none" style="image-rendering:{"auto" if kind == "jpeg" else "pixelated"}" '
            f'href="data:image/{kind};base64,{base64.b64encode(picture).decode()}"/>')
        parts += _grid(grid, x, y + 20, width, height) if grid else []
    end = -(-len(panels) // columns) * (height + 28)
    return _svg(_legend(parts, legend, end + 4) if legend else end, parts)


def _grid(grid: Sequence[Sequence[str | None]], x: float, y: float, width: float, height: float) -> list[str]:
    """Cells of colours, neighbours of one colour in a row as one rectangle."""
    parts, down, across = [], height / len(grid), width / len(grid[0])
    for row, cells in enumerate(grid):
        start = 0
        for column in range(1, len(cells) + 1):
            if column == len(cells) or cells[column] != cells[start]:
                colour, opacity = (cells[start], .5) if cells[start] else ('var(--card)', .8)
                parts.append(
                    f'<rect x="{x + start * across:.1f}" y="{y + row * down:.1f}" '
                    f'width="{(column - start) * across:.1f}" height="{down:.1f}" fill="{colour}" '
                    f'fill-opacity="{opacity}" shape-rendering="crispEdges"/>')
                start = column
    return parts


def _legend(parts: list[str], entries: Sequence[tuple[str, str]], y: float) -> float:
    """Add colours with their names, in as many lines as they need, and return where they end."""
    x = 0.
    for name, colour in entries:
        width = 31 + LETTER * len(name)
        if x + width > WIDTH and x > 0:
            x, y = 0., y + 20
        parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="12" height="12" rx="2" fill="{colour}"/>')
        parts.append(_text(x + 17, y + 11, name, 'start', soft=True))
        x += width
    return y + 18


def grid_map(
        fills: Sequence[Sequence[str]],
        marks: Sequence[tuple[int, int, str]],
        way: Sequence[tuple[int, int, int]],
        names: Sequence[str],
) -> str:
    """A map of square cells with a way on it, from a ring to a dot, each of its points in the colour of an expert.

    Args:
        fills: Colour of every cell by row; an empty one is left out.
        marks: (row, column, letter) written into cells.
        way: (row, column, expert) of every point.
        names: Of the experts; those on the way are explained below.
    """
    side, parts = WIDTH / len(fills[0]), []
    for row, cells in enumerate(fills):
        for fill, run in itertools.groupby(enumerate(cells), key=lambda cell: cell[1]):  # neighbours of one colour
            columns = [column for column, _ in run]
            if fill:
                parts.append(
                    f'<rect x="{columns[0] * side:.1f}" y="{row * side:.1f}" width="{len(columns) * side + .1:.1f}" '
                    f'height="{side + .4:.1f}" fill="{fill}"/>')  # over the seam to the next row
    for row, column, letter in marks:
        parts.append(_text((column + .5) * side, (row + .5) * side + 4, letter))
    points = [((column + .5) * side, (row + .5) * side, expert) for row, column, expert in way]
    path = ' '.join(f'{x:.1f},{y:.1f}' for x, y, _ in points)
    parts.append(f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="1.5"/>')
    for x, y, expert in points:
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{.36 * side:.1f}" fill="{expert_colour(expert)}"/>')
    x, y, _ = points[0]
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{.7 * side:.1f}" fill="none" stroke="currentColor" '
                 'stroke-width="2"/>')
    left, y = 0., len(fills) * side + 12
    for expert in sorted({expert for *_, expert in way}):
        parts.append(f'<rect x="{left}" y="{y}" width="12" height="12" rx="2" fill="{expert_colour(expert)}"/>')
        parts.append(_text(left + 17, y + 11, names[expert], 'start', soft=True))
        left += 31 + LETTER * len(names[expert])
    return _svg(y + 18, parts)


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers that enclose [low, high]: multiples of 1, 2 or 5 times a power of ten, about as many as asked."""
    span = max(high - low, 1e-9 * max(abs(high), 1), 1e-12)
    step = 10 ** math.floor(math.log10(span / about))
    step *= next(m for m in (1, 2, 5, 10) if span / (m * step) <= about)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between 10**low and 10**high."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    return [m * 10. ** p for p in powers for m in (1, 2, 5) if low <= math.log10(m * 10. ** p) <= high]


def _svg(height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH * 1.2:.0f}" '
        f'font-size="13" fill="currentColor">{"".join(parts)}</svg>'
    )


def _text(x: float, y: float, text: str, anchor: str = 'middle', soft: bool = False) -> str:
    fill = ' fill="var(--soft)"' if soft else ''
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{fill}>{html.escape(text)}</text>'


def _fitted(x: float, y: float, text: str, room: float, anchor: str = 'middle', soft: bool = False) -> str:
    """Text in a space of this width; its beginning, where it is longer, and all of it beside the pointer."""
    letters = int(room / LETTER + 1e-6)
    if len(text) <= letters:
        return _text(x, y, text, anchor, soft)
    shown = f'{text[:max(letters - 1, 1)].rstrip()}…'
    return f'<g><title>{html.escape(text)}</title>{_text(x, y, shown, anchor, soft)}</g>'


def _line(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="var(--line)"/>'
