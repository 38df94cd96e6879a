"""Charts of the page redrawn for print by matplotlib: in the page's light colours, in type that does not scale.

Knows what `moe_zoo.analysis.charts` draws with: rect, line, polyline, circle, text, and groups that are turned. Lengths
across follow the width of the figure, lengths down do so by less; marks and type keep their size.
"""
import re
from typing import Any
from xml.etree import ElementTree

from ..errors import InputError
from .figures import import_matplotlib
from .page import STYLE as PAGE_STYLE

NARROW = .532  # points a unit of a chart at the width of one column: type of 13 units is then 7 points
MARGIN = 10  # units at both sides: the type of print is a little wider than that of screens


def redraw(chart: str, width: float):
    """A chart as a figure.

    Args:
        chart: SVG text of `moe_zoo.analysis.charts`.
        width: In inches.

    Returns:
        matplotlib.figure.Figure

    Raises:
        InputError: It holds an element that no chart is drawn with.
    """
    root = ElementTree.fromstring(chart)
    _, _, wide, high = map(float, root.get('viewBox').split())
    down = max(NARROW, .6 * 72 * width / wide)
    figure = import_matplotlib().figure.Figure(figsize=(width, high * down / 72))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.set_xlim(-MARGIN, wide + MARGIN)
    axis.set_ylim(high, 0)
    light = PAGE_STYLE.read_text(encoding='utf-8').partition('}')[0]
    palette = dict(re.findall(r'(--[\w-]+):\s*(#\w+)', light))
    for element in root:
        _draw(axis, element, palette, 0.)
    return figure


def _draw(axis, element: ElementTree.Element, palette: dict[str, str], turned: float) -> None:
    kind = element.tag.rpartition('}')[2]
    number = {key: float(value) for key, value in element.attrib.items() if re.fullmatch(r'-?[\d.]+', value)}
    fill, stroke = (_colour(element.get(key, default), palette) for key, default in (
        ('fill', 'currentColor'), ('stroke', 'none')))
    order = {'zorder': 2 + len(axis.get_children())}  # as in the chart: what comes later lies above
    lines = {'color': stroke, 'linewidth': .7 * NARROW * number.get('stroke-width', 1.5),
             'linestyle': (0, (4, 2)) if element.get('stroke-dasharray') else '-', **order}
    if kind == 'g':
        angle = float(re.match(r'rotate\((\S+)', element.get('transform'))[1])
        for child in element:
            _draw(axis, child, palette, -angle)
    elif kind == 'rect':
        patch = import_matplotlib().patches.Rectangle(
            (number.get('x', 0), number.get('y', 0)), number['width'], number['height'], facecolor=fill,
            edgecolor=stroke, linewidth=lines['linewidth'], alpha=number.get('fill-opacity'), **order)
        axis.add_patch(patch)
    elif kind == 'line':
        ends = [number['x1'], number['x2']], [number['y1'], number['y2']]
        axis.plot(*ends, alpha=number.get('stroke-opacity'), **lines)
    elif kind == 'polyline':
        points = [tuple(map(float, point.split(','))) for point in element.get('points').split()]
        axis.plot(*zip(*points), **lines)
    elif kind == 'circle':
        axis.plot(number['cx'], number['cy'], 'o', markersize=2 * NARROW * number['r'], markerfacecolor=fill,
                  markeredgecolor=stroke if stroke != 'none' else fill, alpha=number.get('fill-opacity'), **order)
    elif kind == 'text':
        _write(axis, element, number, color=fill, rotation=turned, **order)
    elif kind != 'title':
        raise InputError(f'chart: a figure for print is made of no <{kind}>.')


def _write(axis, element: ElementTree.Element, number: dict[str, float], rotation: float, **style: Any) -> None:
    side = {'start': 'left', 'middle': 'center', 'end': 'right'}[element.get('text-anchor', 'start')]
    align = {'ha': 'center', 'va': 'center'} if rotation else {'ha': side, 'va': 'baseline'}
    axis.text(number['x'], number['y'], ''.join(element.itertext()), rotation=rotation, **align, **style)


def _colour(value: str, palette: dict[str, str]) -> str:
    name = re.fullmatch(r'var\((--[\w-]+)\)', value)
    return palette[name[1]] if name else palette['--ink'] if value == 'currentColor' else value
