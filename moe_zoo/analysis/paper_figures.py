"""Figures of a report in print: as wide as one column or two, in type of 7 points, by matplotlib.

A run looks the same in every figure of its group: its colour comes with a marker and a dash of its own, so that
colour-blind eyes and grey paper tell runs apart; dense runs are hollow. Letters: E experts.
"""
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .figures import COLOURS, _panels, _short, import_matplotlib
from .runs import KINDS, LayerUse, Run

WIDTHS = {'1col': 3.25, '2col': 6.75}  # inches
POINTS = 7  # of all type
GREY = '#52616d'
STYLE = {
    'font.family': ['DejaVu Sans', 'sans-serif'],  # comes with matplotlib; SVG falls back on the reader's
    'font.size': POINTS, 'axes.labelsize': POINTS, 'axes.titlesize': POINTS, 'xtick.labelsize': POINTS,
    'ytick.labelsize': POINTS, 'legend.fontsize': POINTS,
    'pdf.fonttype': 42,  # TrueType, embedded
    'svg.fonttype': 'none',  # text stays text, to be edited and found
    'svg.hashsalt': 'moe_zoo',  # one figure, one file
    'text.parse_math': False,  # a name may hold a dollar
    'axes.linewidth': .6, 'axes.edgecolor': GREY, 'axes.spines.top': False, 'axes.spines.right': False,
    'axes.grid': True, 'axes.axisbelow': True, 'grid.color': '#d8dfe4', 'grid.linewidth': .5,
    'xtick.major.width': .6, 'ytick.major.width': .6, 'xtick.major.size': 2.5, 'ytick.major.size': 2.5,
    'lines.linewidth': 1.1, 'lines.markersize': 4.5, 'lines.markeredgewidth': .9, 'legend.frameon': False,
    'legend.handlelength': 2.6, 'legend.columnspacing': 1.2, 'legend.handletextpad': .5,
}
MARKERS = 'osD^vPX<'
DASHES = ('-', (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (2.5, 1)))
CELLS_WITH_NUMBERS = 9  # experts in a row


@dataclass(frozen=True)
class Look:
    """How a run is drawn, and under which name."""
    name: str
    colour: str
    marker: str
    dash: Any
    hollow: bool

    @property
    def style(self) -> dict[str, Any]:
        face = 'white' if self.hollow else self.colour
        return {'color': self.colour, 'marker': self.marker, 'markerfacecolor': face, 'markeredgecolor': self.colour}


def looks_of(runs: Sequence[Run], names: Mapping[Run, str]) -> dict[Run, Look]:
    """A look for each run; of each kind, the first 64 differ in marker or colour, the first 40 in marker or dash."""
    found, seen = {}, {True: 0, False: 0}
    for run in runs:
        number = seen[run.routed]
        seen[run.routed] += 1
        colour = COLOURS[(number + number // len(MARKERS)) % len(COLOURS)] if run.routed else GREY
        marker, dash = MARKERS[number % len(MARKERS)], DASHES[number % len(DASHES)]
        found[run] = Look(names[run], colour, marker, dash, not run.routed)
    return found


def score_against(
        looks: Mapping[Run, Look],
        places: Mapping[Run, tuple[float, float, float]],
        x_label: str,
        width: float,
):
    """The score of every run against what it costs; a line joins a routed run to its dense twin.

    Args:
        looks: From `looks_of`.
        places: Run to what it costs, with the lower and the upper end of its bar, above 0.
        x_label: What that is, with its unit.
        width: Of the figure in inches.

    Returns:
        matplotlib.figure.Figure
    """
    figure, (axis,) = _panels(1, .5 * min(width, 4.6), width)
    for run, (x, low, high) in places.items():
        look, sd = looks[run], run.sd()
        if run.twin in places:
            axis.plot([places[run.twin][0], x], [run.twin.mean(), run.mean()], color=GREY, linewidth=.7, zorder=1.5)
        axis.errorbar(
            x, run.mean(), yerr=sd, xerr=[[x - low], [high - x]] if high > low else None, linestyle='none',
            elinewidth=.8, capsize=1.8, capthick=.8, **look.style)
    _scale(axis, [end for ends in places.values() for end in ends])
    axis.margins(x=.06, y=.1)
    axis.set_xlabel(x_label)
    axis.set_ylabel(KINDS[next(iter(places)).kind][1])
    _legend(figure, [looks[run] for run in places], width, lines=False)
    return figure


def learning_curves(looks: Mapping[Run, Look], width: float):
    """Loss, score, evenness of the experts and live channels over the training, one line a run.

    Layers are drawn as their mean, over a band from the least to the largest.

    Returns:
        matplotlib.figure.Figure
    """
    first = next(iter(looks))
    series = {  # label -> run to points
        'training loss': {run: _points(run, 'loss') for run in looks},
        KINDS[first.kind][1]: {run: _points(run, 'score') for run in looks},
        'evenness of the experts': {run: _over_layers(run.balance) for run in looks},
        'share of channels on': {run: _over_layers(run.live) for run in looks},
    }
    drawn = {label: lines for label, lines in series.items() if any(lines.values())}
    columns = 1 if width < 4 else len(drawn) if len(drawn) < 4 else 2
    figure, axes = _panels(len(drawn), 1.5 if columns > 1 else 1.35, width, columns)
    for axis, (label, lines) in zip(axes, drawn.items()):
        for run, points in lines.items():
            if points:
                x, y, low, high = zip(*points)
                look = looks[run]
                axis.plot(x, y, linestyle=look.dash, markevery=(.02, .2), markersize=3.2, **look.style)
                if low != high:
                    axis.fill_between(x, low, high, color=look.colour, alpha=.13, linewidth=0)
        axis.set_ylabel(label)
        axis.xaxis.get_major_locator().set_params(integer=True)
    for axis in axes[-columns:]:
        axis.set_xlabel(first.unit)
    _legend(figure, list(looks.values()), width)
    return figure


def usage_map(use: Sequence[LayerUse], width: float):
    """Share of every expert of every layer as a multiple of the fair share 1/E; crosses mark dead experts.

    Returns:
        matplotlib.figure.Figure
    """
    most = max(len(layer.share) for layer in use)
    times = [[share * len(layer.share) for share in layer.share] + [math.nan] * (most - len(layer.share))
             for layer in use]
    top = max(2., max(value for row in times for value in row if value == value))
    figure, (axis,) = _panels(1, max(.9, .17 * len(use)), width)
    image = axis.imshow(times, aspect='auto', cmap='YlGnBu', vmin=0, vmax=top, interpolation='nearest')
    axis.grid(False)
    numbers = most <= CELLS_WITH_NUMBERS
    for y, (layer, row) in enumerate(zip(use, times)):
        for e, value in enumerate(row[:len(layer.share)]):
            colour = 'white' if value > .55 * top else 'black'
            if e in layer.dead:
                axis.plot(e, y, 'x', color=colour, markersize=4 if numbers else 2.5)
            elif numbers:
                axis.text(e, y, f'{value:.1f}', ha='center', va='center', color=colour)
    axis.set_yticks(range(len(use)), [_short(layer.layer, 22 if width < 4 else 34) for layer in use])
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlim(-.5, most - .5)
    axis.set_xlabel('expert')
    figure.colorbar(image, ax=axis, label='times the fair share', pad=.02).outline.set_visible(False)
    return figure


def _points(run: Run, key: str) -> list[tuple[float, float, float, float]]:
    return [(row['step'], row[key], row[key], row[key]) for row in run.curve if key in row]


def _over_layers(layers: Mapping[str, Sequence[tuple[float, float]]]) -> list[tuple[float, float, float, float]]:
    """(step, mean over the layers, the least of them, the largest)."""
    steps: dict[float, list[float]] = {}
    for points in layers.values():
        for step, value in points:
            steps.setdefault(step, []).append(value)
    return [(step, statistics.fmean(values), min(values), max(values)) for step, values in sorted(steps.items())]


def _scale(axis, values: Sequence[float]) -> None:
    """Logarithmic where the values span a factor of 3, so that there are round numbers to write."""
    ticker = import_matplotlib().ticker
    if max(values) >= 3 * min(values):
        axis.set_xscale('log')
        axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=12))
        axis.xaxis.set_minor_locator(ticker.NullLocator())
    else:
        axis.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f'{x:g}'))


def _legend(figure, looks: Sequence[Look], width: float, lines: bool = True) -> None:
    """The names below, in as many columns as their length allows; the figure grows by their rows."""
    most = 46 if width < 4 else 80
    names = [_short(look.name, most) for look in looks]
    lines2d = import_matplotlib().lines.Line2D
    handles = [lines2d([], [], linestyle=look.dash if lines else 'none', **look.style) for look in looks]
    each = (.45 if lines else .3) + .062 * max(map(len, names))  # inches: a letter is .062 wide on the average
    columns = max(1, min(len(names), int(width / each)))
    figure.set_figheight(figure.get_figheight() + .14 * -(-len(names) // columns))
    figure.legend(
        handles, names, loc='outside lower center', ncols=columns, handlelength=None if lines else 1.2, labelspacing=.3)
