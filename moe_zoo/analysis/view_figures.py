"""Images beside their crops, corresponding patches in the colour of their expert; matplotlib is imported to draw.

Letters: B images, C channels, H x W pixels, h x w patches.
"""
from collections import Counter
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch

from ..data import random_view
from ..errors import InputError
from .figures import COLOURS

OTHERS = '#9aa3ab'  # experts beyond the eight most chosen ones
PANEL = 2.1  # inches
LEAST_TEXT = 5  # points


def views_figure(named: Sequence[Tuple[str, Dict[str, Any]]], pictures: torch.Tensor):
    """One row an image, two panels a model: the image, and its crop, with the best expert of every patch.

    Patches without a counterpart stay grey. A black frame marks patches of the crop whose experts differ from those of
    their counterpart. Numbers are written where patches are large enough. With more than eight experts the eight most
    chosen ones of the figure have colours, and the others share a grey.

    Args:
        named: (name, result of `moe_zoo.analysis.consistency.locate_pairs`) pairs of the same images and crops.
        pictures: (B, C, H, W) the images as they are to be seen, from 0 to 1, of one or three channels.

    Returns:
        matplotlib.figure.Figure

    Raises:
        InputError: Results of other images or crops, or matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('Figures need matplotlib, which is not installed: pip install matplotlib.') from None
    drawn = [(pairs['area'], pairs['hflip'], pairs['seed'], len(pairs['images'])) for _, pairs in named]
    if not drawn or any(each != drawn[0] for each in drawn) or drawn[0][3] != len(pictures):
        raise InputError(f'named: results of the same {len(pictures)} images and the same crops are needed.')
    area, hflip, seed, count = drawn[0]
    crops = random_view(pictures, tuple(area), hflip=hflip, generator=torch.Generator().manual_seed(seed))[0]
    colours = _colours(named)
    figure = Figure(figsize=(2 * PANEL * len(named), PANEL * count + 1.0), layout='constrained')
    axes = figure.subplots(count, 2 * len(named), squeeze=False)
    for column, (name, pairs) in enumerate(named):
        for row, patches in enumerate(pairs['images']):
            left, right = axes[row, 2 * column], axes[row, 2 * column + 1]
            _draw(left, pictures[row], patches['image'], None, colours)
            _draw(right, crops[row], patches['crop'], patches['changed'], colours)
        title = f'{name}: ' if len(named) > 1 else ''
        axes[0, 2 * column].set_title(f'{title}image', fontsize=9)
        axes[0, 2 * column + 1].set_title(f'{title}crop', fontsize=9)
    _legend(figure, colours, any(pairs['experts'] > len(colours) for _, pairs in named))
    return figure


def _colours(named: Sequence[Tuple[str, Dict[str, Any]]]) -> Dict[int, str]:
    """Expert to colour: all of at most eight, else the eight most chosen, in order of their numbers."""
    experts = max(pairs['experts'] for _, pairs in named)
    if experts <= len(COLOURS):
        return dict(enumerate(COLOURS[:experts]))
    used = Counter(
        expert for _, pairs in named for image in pairs['images'] for view in ('image', 'crop')
        for line in image[view] for expert in line if expert is not None)
    return dict(zip(sorted(expert for expert, _ in used.most_common(len(COLOURS))), COLOURS))


def _draw(
        axis,
        picture: torch.Tensor,
        experts: List[List[Optional[int]]],
        changed: Optional[List[List[bool]]],
        colours: Dict[int, str],
) -> None:
    """One view: a light grey picture under translucent patches, which are 1 high and 1 wide here."""
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke
    rows, columns = len(experts), len(experts[0])
    grey = 0.3 + 0.7 * picture.float().mean(dim=0).clamp(0, 1).cpu().numpy()
    extent = (0, columns, rows, 0)
    stretch = picture.shape[1] * columns / (picture.shape[2] * rows)  # patches need not be square
    axis.imshow(grey, cmap='gray', vmin=0, vmax=1, extent=extent, aspect=stretch)
    paint = np.zeros((rows, columns, 4))
    size = min(8.0, 0.5 * 72 * (PANEL - 0.2) / max(rows, columns))
    for y, line in enumerate(experts):
        for x, expert in enumerate(line):
            if expert is None:
                continue
            paint[y, x] = (*to_rgb(colours.get(expert, OTHERS)), 0.62)
            if size >= LEAST_TEXT:
                axis.text(x + 0.5, y + 0.5, str(expert), ha='center', va='center_baseline', fontsize=size,
                          color='#111111', path_effects=[withStroke(linewidth=1.4, foreground='white')])
            if changed is not None and changed[y][x]:
                axis.add_patch(Rectangle((x + 0.08, y + 0.08), 0.84, 0.84, fill=False, color='black', linewidth=1.1))
    axis.imshow(paint, extent=extent, aspect=stretch, interpolation='nearest')
    axis.set_xticks([])
    axis.set_yticks([])


def _legend(figure, colours: Dict[int, str], others: bool) -> None:
    from matplotlib.patches import Patch
    handles = [Patch(color=colour, label=f'expert {expert}') for expert, colour in colours.items()]
    if others:
        handles.append(Patch(color=OTHERS, label='other experts'))
    handles.append(Patch(facecolor='none', edgecolor='black', label='experts differ'))
    columns = max(1, min(len(handles), int(figure.get_figwidth() / 1.5)))
    figure.legend(handles=handles, loc='outside lower center', ncols=columns, fontsize=8, frameon=False)
