"""Figures about the experts of a classifier, by matplotlib, from the numbers of `moe_zoo.analysis.experts`.

Letters: E experts.
"""
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np
import torch

from .expert_records import BINS
from .experts import spread
from .figures import COLOURS, _legend, _panels, _short, save

MOST = 12  # rows or columns of a panel that stay legible


def write_figures(result: Mapping[str, Any], pixels: torch.Tensor, folder: Path) -> List[Path]:
    """Draw what there is to draw into PNG files of a folder.

    Args:
        result: From `moe_zoo.engine.analyze_experts.analyze_classifier`.
        pixels: (N, C, H, W) uint8, the images in order.

    Raises:
        InputError: matplotlib is not installed.
    """
    layers = [layer for layer in result['layers'] if layer['layer'] in result['drawn_layers']]
    figures = {
        'usage': usage_bars(layers),
        'classes': class_maps(layers, result['classes'], result['targets']),
        'gates': gate_histograms(layers),
        'depth': class_variance(result['layers']),
        'otherwise': accuracies(result),
    }
    if result['places'] and result['shown']:
        figures['patches'] = patches(result, pixels)
        figures['logits'] = logit_maps(result, pixels)
    return [save(figure, folder / f'{name}.png') for name, figure in figures.items() if figure is not None]


def usage_bars(layers: Sequence[Mapping[str, Any]]):
    """Share of the weight of every expert, one bar a layer."""
    figure, (axis,) = _panels(1, height=0.9 + 0.35 * len(layers))
    left = np.zeros(len(layers))
    for e in range(max(layer['experts'] for layer in layers)):
        shares = np.array([100 * layer['importance'][e] if e < layer['experts'] else 0. for layer in layers])
        axis.barh(range(len(layers)), shares, left=left, color=COLOURS[e % len(COLOURS)], edgecolor='white',
                  linewidth=.3, label=f'expert {e}' if e < MOST else None)
        left += shares
    axis.set_yticks(range(len(layers)), [_short(layer['layer']) for layer in layers], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel('share of the weight, %')
    _legend(figure, axis)
    return figure


def class_maps(layers: Sequence[Mapping[str, Any]], classes: Sequence[str], targets: Sequence[int]):
    """Share of the weight by class and expert, one panel for each of three layers."""
    rows = spread(sorted(set(targets)), 2 * MOST)
    chosen = spread(layers, 3)
    figure, axes = _panels(len(chosen), height=1.2 + 0.2 * len(rows))
    for axis, layer in zip(axes, chosen):
        shares = 100 * np.array([layer['classes']['share'][y] for y in rows])
        image = axis.imshow(shares, aspect='auto', cmap='YlGnBu', vmin=0)
        axis.set_yticks(range(len(rows)), [classes[y] for y in rows], fontsize=7)
        columns = spread(range(len(layer['listed'])), MOST)
        axis.set_xticks(columns, [layer['listed'][c] for c in columns], fontsize=7)
        axis.set_title(_short(layer['layer']), fontsize=9)
        axis.set_xlabel('expert')
        figure.colorbar(image, ax=axis, label='share of the weight, %')
    return figure


def gate_histograms(layers: Sequence[Mapping[str, Any]]):
    """All gate values, one panel a layer."""
    figure, axes = _panels(len(layers))
    for axis, layer in zip(axes, layers):
        counts = np.array(layer['gates']['counts'])
        axis.bar((np.arange(BINS) + .5) / BINS, 100 * counts / counts.sum(), 0.95 / BINS, color=COLOURS[0])
        axis.set_title(_short(layer['layer']), fontsize=9)
        axis.set_xlabel('gate value')
        axis.set_ylabel('share, %')
        axis.spines[['top', 'right']].set_visible(False)
    return figure


def class_variance(layers: Sequence[Mapping[str, Any]]):
    """Share of the variance of the gates that lies between classes, layer by layer, with standard errors."""
    splits = [(layer['layer'], layer['gates']['variance']) for layer in layers]
    splits = [(name, split) for name, split in splits if split['between'] is not None]
    if not splits:
        return None
    figure, (axis,) = _panels(1, height=3.2)
    axis.errorbar(range(len(splits)), [100 * s['between'] for _, s in splits],
                  [200 * (s['between_se'] or 0) for _, s in splits], fmt='o-', color=COLOURS[0], capsize=3,
                  label='between classes, ± 2 standard errors')
    axis.axhline(100 * splits[0][1]['chance'], color='grey', linestyle='--', label='chance')
    axis.set_xticks(range(len(splits)), [_short(name, 22) for name, _ in splits], rotation=45, ha='right', fontsize=7)
    axis.set_ylabel('variance between classes, %')
    axis.set_ylim(bottom=0)
    axis.spines[['top', 'right']].set_visible(False)
    _legend(figure, axis)
    return figure


def accuracies(result: Mapping[str, Any]):
    """Accuracy with experts forced, and with other numbers of them; None where nothing was tried."""
    panels: Dict[str, List[Mapping[str, float]]] = {}
    if result['forced']:
        panels = {'one expert in every layer': result['forced']['everywhere'], **result['forced']['layers']}
    panels['the largest gates alone'] = result['k']
    panels = {name: rows for name, rows in panels.items() if rows}
    if not panels:
        return None
    figure, axes = _panels(len(panels))
    for axis, (name, rows) in zip(axes, panels.items()):
        places = range(len(rows))
        axis.errorbar([row['accuracy'] for row in rows], places, xerr=[2 * row['se'] for row in rows], fmt='o',
                      color=COLOURS[0], capsize=3, markersize=4)
        axis.axvline(result['free']['accuracy'], color='grey', linestyle='--')
        labels = [row['k'] if 'k' in row else f'expert {row["expert"]}' for row in rows]
        shown = spread(places, 2 * MOST)
        axis.set_yticks(shown, [labels[i] for i in shown], fontsize=7)
        axis.invert_yaxis()
        axis.set_title(_short(name), fontsize=9)
        axis.set_xlabel('accuracy, % (line: free)')
        axis.spines[['top', 'right']].set_visible(False)
    return figure


def patches(result: Mapping[str, Any], pixels: torch.Tensor):
    """Every shown image, and over it the expert that weighs most in every patch, for up to two layers."""
    places = spread(result['places'], 2)
    rows = len(result['shown'])
    figure, axes = _panels(3 * rows, height=2.2)
    for row, image in enumerate(result['shown']):
        photo = _photo(pixels[image])
        axes[3 * row].imshow(photo)
        axes[3 * row].set_title(result['classes'][result['targets'][image]], fontsize=9)
        for number, place in enumerate(places, 1):
            axis = axes[3 * row + number]
            axis.imshow(photo)
            extent = (-.5, photo.shape[1] - .5, photo.shape[0] - .5, -.5)
            axis.imshow(_colours(place['images'][row]['top']), extent=extent)
            axis.set_title(_short(place['layer']), fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    for e in range(min(len(COLOURS), max(max(place['experts']) for place in places) + 1)):
        axes[0].plot([], [], 's', color=COLOURS[e], label=f'expert {e}')
    _legend(figure, axes[0])
    return figure


def logit_maps(result: Mapping[str, Any], pixels: torch.Tensor):
    """What the last router that sees places thinks of every place of the first image, one panel an expert."""
    place, image = result['places'][-1], result['shown'][0]
    maps, experts = np.array(place['images'][0]['logits']), place['experts'][:MOST - 1]
    figure, axes = _panels(1 + len(experts), height=2.4)
    axes[0].imshow(_photo(pixels[image]))
    axes[0].set_title(result['classes'][result['targets'][image]], fontsize=9)
    for axis, expert, values in zip(axes[1:], experts, maps):
        shades = axis.imshow(values, cmap='YlGnBu', vmin=maps.min(), vmax=maps.max())
        axis.set_title(f'expert {expert}', fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    figure.colorbar(shades, ax=list(axes), label=f'logit in {_short(place["layer"])}')
    return figure


def _photo(pixels: torch.Tensor) -> np.ndarray:
    array = pixels.permute(1, 2, 0).numpy()
    return array.repeat(3, axis=2) if array.shape[2] == 1 else array[:, :, :3]


def _colours(top: Sequence[Sequence[Optional[int]]]) -> np.ndarray:
    """(rows, columns, 4): the colour of every patch, half transparent; white over those that no expert took."""
    table = [[int(c[i:i + 2], 16) / 255 for i in (1, 3, 5)] for c in COLOURS]
    return np.array([[(1., 1., 1., .8) if e is None else (*table[e % len(table)], .5) for e in row] for row in top])
