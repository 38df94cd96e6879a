"""Figures of what experts do, drawn by matplotlib into files. matplotlib is imported when a figure is made.

Numbers in, a figure out; `save` writes it. Letters: E experts.
"""
from pathlib import Path
from typing import Dict, Optional, Sequence, Union

from ..errors import InputError, atomic_write
from .object_sizes import SIZES, SizeAnalysis
from .usage import LayerUsage

COLOURS = ('#0e8a8a', '#d9822b', '#4c6fd1', '#b8448f', '#6a9a2d', '#c4453c', '#7a5cc0', '#8a7440')  # of the page
AP_SIZES = ('APs', 'APm', 'APl')
MOST_LAYERS = 12  # panels that stay legible


def size_figure(analysis: SizeAnalysis, ap: Optional[Dict[str, Dict[str, float]]] = None):
    """Gate mass by object size, one panel a layer, and AP by object size with every expert forced.

    Of more than twelve layers the twelve with the largest separation are drawn.

    Args:
        analysis: From `moe_zoo.analysis.object_sizes`.
        ap: Row name ('free', 'expert 0', ...) to COCO's APs, APm and APl in percent; None draws no such panel.

    Returns:
        matplotlib.figure.Figure
    """
    strongest = sorted(analysis.layers, key=lambda layer: -layer.separation)[:MOST_LAYERS]
    layers = [layer for layer in analysis.layers if layer in strongest]
    figure, axes = _panels(len(layers) + bool(ap))
    for axis, layer in zip(axes, layers):
        rows = {f'expert {e}': 100 * layer.mass[:, e] for e in range(layer.mass.shape[1])}
        _grouped_bars(axis, rows, SIZES)
        axis.set_ylabel('gate mass, %')
        found = {True: 'separates', False: 'no separation', None: 'no verdict'}[layer.separates]
        axis.set_title(f'{_short(layer.name)}: {found}', fontsize=9)
    if ap:
        rows = {name: [values.get(key) for key in AP_SIZES] for name, values in ap.items()
                if name == 'free' or name.startswith('expert ')}
        _grouped_bars(axes[-1], rows, SIZES, offset=-1 if 'free' in rows else 0)
        axes[-1].set_ylabel('AP, %')
        axes[-1].set_title('AP, each expert forced and left free', fontsize=9)
    _legend(figure, axes[len(layers)] if ap else axes[0])
    return figure


def usage_figure(usages: Dict[str, LayerUsage]):
    """Share of every expert, one bar a layer, against the fair share.

    Args:
        usages: From `moe_zoo.analysis.usage.measure_usage`.

    Returns:
        matplotlib.figure.Figure
    """
    if not usages:
        raise InputError('usages is empty: there is no layer to draw.')
    figure, (axis,) = _panels(1, height=0.8 + 0.35 * len(usages))
    left = [0.] * len(usages)
    for e in range(max(usage.num_experts for usage in usages.values())):
        shares = [100 * float(u.share[e]) if e < u.num_experts else 0. for u in usages.values()]
        axis.barh(range(len(usages)), shares, left=left, color=COLOURS[e % len(COLOURS)], edgecolor='white',
                  label=f'expert {e}')
        left = [a + b for a, b in zip(left, shares)]
    axis.set_yticks(range(len(usages)), [_short(name) for name in usages], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel('share of the choices, %')
    _legend(figure, axis)
    return figure


def class_figure(usage: LayerUsage, classes: Optional[Sequence[str]] = None):
    """Gate mass by class and expert as a map of shades.

    Args:
        usage: Of one layer, measured with targets.
        classes: Names of the classes; None for their numbers.

    Returns:
        matplotlib.figure.Figure
    """
    if usage.class_mass is None:
        raise InputError(f'usage of {usage.name!r} was measured without targets: there is no table by class.')
    rows = classes or [str(i) for i in range(len(usage.class_mass))]
    figure, (axis,) = _panels(1, height=1.2 + 0.22 * len(rows))
    image = axis.imshow(100 * usage.class_mass.numpy(), aspect='auto', cmap='YlGnBu', vmin=0)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_xticks(range(usage.num_experts))
    axis.set_xlabel('expert')
    axis.set_title(_short(usage.name), fontsize=9)
    figure.colorbar(image, ax=axis, label='gate mass, %')
    return figure


def save(figure, path: Union[str, Path]) -> Path:
    """Write a figure as PNG, SVG or PDF, by the ending of `path`; renamed into place."""
    path = Path(path)
    if path.suffix not in ('.png', '.svg', '.pdf'):
        raise InputError(f"figure '{path}': end its name in .png, .svg or .pdf.")
    dates = {'.pdf': {'CreationDate': None}, '.svg': {'Date': None}}  # left out: one figure, one file
    with atomic_write(path) as part:
        figure.savefig(part, format=path.suffix[1:], dpi=150, metadata=dates.get(path.suffix))
    return path


def import_matplotlib():
    """The package.

    Raises:
        InputError: It is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError:
        raise InputError('Figures need matplotlib, which is not installed: pip install matplotlib.') from None
    return matplotlib


def _panels(count: int, height: float = 2.6, width: Optional[float] = None, most: int = 3):
    """A figure without pyplot, which would keep it and choose a window system, and its axes.

    Args:
        count: Axes, of which `most` stand in a row.
        height: Of a row in inches.
        width: Of the figure; None for what its columns need on a page.
    """
    columns = min(count, most)
    rows = -(-count // columns)
    figure = import_matplotlib().figure.Figure(
        figsize=(width or max(4.8, 3.4 * columns), height * rows + 0.5), layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in axes[count:]:
        unused.set_axis_off()
    return figure, axes[:count]


def _grouped_bars(axis, rows: Dict[str, Sequence[Optional[float]]], groups: Sequence[str], offset: int = 0) -> None:
    """One group of bars a column; row i has the colour of expert i + offset, and a negative one is grey."""
    width = 0.8 / len(rows)
    for i, (name, values) in enumerate(rows.items()):
        heights = [0. if v is None or v != v else v for v in values]
        colour = COLOURS[(i + offset) % len(COLOURS)] if i + offset >= 0 else '#7b8794'
        left = [g - 0.4 + (i + 0.5) * width for g in range(len(groups))]
        axis.bar(left, heights, 0.9 * width, color=colour, label=name)
    axis.set_xticks(range(len(groups)), groups)
    axis.set_ylim(bottom=0)
    axis.spines[['top', 'right']].set_visible(False)


def _legend(figure, axis) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=min(len(labels), 9), fontsize=8, frameon=False)


def _short(name: str, length: int = 34) -> str:
    """The end of a long module name, which is what tells layers apart."""
    return name if len(name) <= length else f'...{name[-length + 3:]}'
