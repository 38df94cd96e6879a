"""Charts as SVG text in the colours of the page, so that they follow its light and dark. Standard library only.

Every chart is 440 units wide, with text that is still readable when a phone shows it at three quarters of that.
Letters: E experts.
"""
import html
import math
from typing import Sequence

from moe_zoo.errors import InputError

__all__ = ['expert_colour', 'heat_map', 'scatter', 'share_bars', 'ticks']

WIDTH = 440
COLOURS = 8  # --expert-0 .. --expert-7 of page.css


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
    left, right, top, bottom = 58, 14, 14, 280
    exponents = [math.log10(x) for _, x, _, _ in points]
    low, high = min(exponents) - .25, max(exponents) + .25
    marks = ticks(min(y for _, _, y, _ in points), max(y for _, _, y, _ in points))

    def across(exponent: float) -> float:
        return left + (exponent - low) / (high - low) * (WIDTH - left - right)

    def up(y: float) -> float:
        return bottom - (y - marks[0]) / (marks[-1] - marks[0]) * (bottom - top)

    parts = []
    for mark in marks:
        parts.append(_line(left, up(mark), WIDTH - right, up(mark)))
        parts.append(_text(left - 8, up(mark) + 4, y_format.format(mark), 'end', soft=True))
    for mark in _log_ticks(low, high):
        x = across(math.log10(mark))
        parts.append(_line(x, bottom, x, bottom + 5))
        parts.append(_text(x, bottom + 20, x_format.format(mark), soft=True))
    parts.append(_text((left + WIDTH - right) / 2, bottom + 42, x_label))
    parts.append(f'<g transform="rotate(-90 14 {(top + bottom) / 2})">{_text(14, (top + bottom) / 2, y_label)}</g>')
    placed = [(name, across(e), up(y), bold) for (name, _, y, bold), e in zip(points, exponents)]
    taken = [(cx - 8, cy - 8, cx + 8, cy + 8) for _, cx, cy, _ in placed]
    for name, cx, cy, emphasised in placed:
        style = 'fill="var(--accent)"' if emphasised else 'fill="var(--card)"'
        parts.append(f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="6" {style} stroke="var(--accent)" stroke-width="2"/>')
        parts.append(_text(*_place(cx, cy, name, taken, left, bottom), name, 'start'))
    return _svg(bottom + 52, parts)


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
    x = 0.
    for expert in range(most):
        word = f'expert {expert}' if expert == 0 else str(expert)
        parts.append(f'<rect x="{x}" y="{y}" width="12" height="12" rx="2" fill="{expert_colour(expert)}"/>')
        parts.append(_text(x + 17, y + 11, word, 'start', soft=True))
        x += 31 + 7.5 * len(word)
    return _svg(y + 18, parts)


def heat_map(
        row_names: Sequence[str],
        column_names: Sequence[str],
        values: Sequence[Sequence[float]],
        row_label: str = '',
        column_label: str = '',
        value_format: str = '{:.0f}',
) -> str:
    """A table of shades: the larger the value, the darker its cell. Values are at least 0 and are written in."""
    most = max((value for row in values for value in row), default=0) or 1
    left = 30 + 7.5 * max(map(len, row_names))
    width, height = (WIDTH - left) / len(column_names), 24
    parts = [_text(left + (WIDTH - left) / 2, 13, column_label)] if column_label else []
    for column, name in enumerate(column_names):
        parts.append(_text(left + (column + .5) * width, 33, name, soft=True))
    for row, (name, cells) in enumerate(zip(row_names, values)):
        y = 42 + row * height
        parts.append(_text(left - 8, y + 16, name, 'end', soft=True))
        for column, value in enumerate(cells):
            x, shade = left + column * width, .5 * max(0., value) / most  # half at most: the number stays legible
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{y + 1}" width="{width - 2:.1f}" height="{height - 2}" rx="2" '
                f'fill="var(--accent)" fill-opacity="{shade:.2f}"/>')
            parts.append(_text(x + width / 2, y + 16, value_format.format(value)))
    bottom = 42 + len(row_names) * height
    if row_label:
        parts.append(f'<g transform="rotate(-90 12 {(42 + bottom) / 2})">{_text(12, (42 + bottom) / 2, row_label)}</g>')
    return _svg(bottom + 4, parts)


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


def _line(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="var(--line)"/>'
