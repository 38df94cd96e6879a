"""Do routes stay with what they show? The share of patches whose experts change with the view, of any routed model.

An image is compared with a crop of it, enlarged and perhaps flipped, and with itself under growing noise. Patches of
both correspond as in `moe_zoo.data.match_patches`; prefix tokens are left out. What is compared is the set of experts
that work on a patch: the K chosen ones, those that took it where experts choose, or the one of largest weight where all
are mixed. Measure and figure follow Kada et al. (MIRU 2023; IEEE OJSP 6, 2025, doi 10.1109/OJSP.2025.3536853).

Letters: B images, C channels, H x W pixels, T routed items, E experts, K chosen experts, h x w patches.
"""
import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn

from ..data import Grid, match_items, random_view
from ..errors import InputError
from ..layers.routed import token_grid
from ..routing import Routing, trace_routing
from . import charts
from .page import Figure, Section, Stats, Table
from .usage import evaluation_mode

AREA = (0.25, 1.0)  # share of the image that the crop covers
SIGMAS = (0.05, 0.1, 0.2, 0.4, 0.8)


def find_grid(shape: Sequence[int], image_size: Tuple[int, int]) -> Grid:
    """The grid of a routing record.

    Args:
        shape: `Routing.shape`: (B, h, w) positions of a map, or (B, N) tokens.
        image_size: Height and width of the images, which tells the grid of tokens.

    Raises:
        InputError: The record has no patches, or its tokens fill no grid.
    """
    if len(shape) == 3:
        return Grid(shape[1], shape[2])
    found = token_grid(shape[1], image_size) if len(shape) == 2 else None
    if found is None:
        raise InputError(
            f'A routing record of shape {tuple(shape)} has no grid of patches over an image of {image_size[0]} x'
            f' {image_size[1]} pixels.')
    prefix, rows, columns = found
    return Grid(rows, columns, prefix)


def chosen_sets(routing: Routing) -> torch.Tensor:
    """(T, E) bool: which experts an item goes to, whether or not there is room: capacity is not the router's choice."""
    chosen = torch.zeros_like(routing.logits, dtype=torch.bool)
    if routing.indices is None:
        return chosen.scatter(1, routing.weights.argmax(dim=1, keepdim=True), True)
    return chosen.scatter(1, routing.indices, routing.kept if routing.by_expert else True)


@dataclass
class _Changes:
    """Running counts of the pairs of one layer under one change of the image."""
    pairs: int = 0
    changed: int = 0
    first: Counter = field(default_factory=Counter)  # how often each set was chosen in the image
    second: Counter = field(default_factory=Counter)  # and in what it was changed to

    def add(self, first: torch.Tensor, second: torch.Tensor) -> None:
        """first, second: (P, E) bool sets of corresponding patches."""
        self.pairs += len(first)
        self.changed += int((first != second).any(dim=1).sum())
        for counts, sets in ((self.first, first), (self.second, second)):
            rows, numbers = np.unique(np.packbits(sets.numpy(), axis=1), axis=0, return_counts=True)
            counts.update({row.tobytes(): int(number) for row, number in zip(rows, numbers)})

    def as_dict(self) -> Dict[str, Any]:
        """Shares; None where nothing corresponded."""
        if not self.pairs:
            return {'changed': None, 'chance': None, 'pairs': 0}
        alike = sum(number * self.second[key] for key, number in self.first.items())
        return {
            'changed': self.changed / self.pairs, 'chance': 1 - alike / self.pairs ** 2, 'pairs': self.pairs}


@torch.no_grad()
def measure_consistency(
        model: nn.Module,
        loader: Iterable,
        area: Tuple[float, float] = AREA,
        hflip: float = 0.5,
        sigmas: Sequence[float] = SIGMAS,
        seed: int = 0,
        device: Optional[torch.device] = None,
        max_batches: Optional[int] = None,
) -> Dict[str, Any]:
    """Share of corresponding patches whose set of experts changes, by layer and overall, in evaluation mode.

    The same seed and images give the same crops and the same noise, so that models can be compared pair by pair.

    Args:
        model: Any module that routes tokens or positions; its training mode is restored.
        loader: Yields (images, targets) or images, (B, C, H, W), standardised as the model wants them.
        area: Range of the share of the image that a crop covers.
        hflip: Probability that a crop is flipped.
        sigmas: Standard deviations of the noise, in units of the standardised pixels. The noise of an image is one
            picture, which is scaled.
        seed: Of crops and noise.
        device: Where to send the images; None leaves them where they are.
        max_batches: Stop after so many.

    Returns:
        For JSON. images; area, hflip, sigmas, seed; left_out: names of layers that decide once an image;
        overall: `crop` and, in order of the sigmas, `noise` (see below, over the pairs of all layers);
        layers: in order, each with layer, experts, selected, rows, columns, `crop` and `noise`, which are
            changed: share of the pairs whose sets differ,
            chance: what that share would be if the choices of the second view were dealt to the patches of all images
                at random,
            pairs: how many there were,
            and, of noise, sigma.

    Raises:
        InputError: The model routes no patches, or the loader is empty.
    """
    generator = torch.Generator().manual_seed(seed)
    layers: Dict[str, _Layer] = {}
    left_out: Dict[str, None] = {}
    seen = 0
    with evaluation_mode(model):
        for batch in itertools.islice(loader, max_batches):
            images = batch[0] if isinstance(batch, (tuple, list)) else batch
            images = images if device is None else images.to(device)
            seen += len(images)
            for column, change in enumerate(_changed(model, images, area, hflip, sigmas, generator)):
                for name, first in change.before.items():
                    if len(first.shape) < 2:
                        left_out[name] = None
                    else:
                        layer = layers.setdefault(name, _Layer(1 + len(sigmas)))
                        layer.add(column, first, change.after[name], change, images.shape[-2:])
    if not seen:
        raise InputError('loader is empty: consistency needs at least one batch of images.')
    if not layers:
        raise InputError(f'model: {type(model).__name__} routes no patches, so that there are no routes to compare.')
    found = {name: [each.as_dict() for each in layer.changes] for name, layer in layers.items()}
    return {
        'images': seen, 'area': list(area), 'hflip': hflip, 'sigmas': list(sigmas), 'seed': seed,
        'overall': _columns([_pooled(column) for column in zip(*found.values())], sigmas),
        'layers': [
            {'layer': name, **layers[name].facts, **_columns(columns, sigmas)} for name, columns in found.items()],
        'left_out': list(left_out),
    }


class _Change(NamedTuple):
    """What a batch became, and the records of both: maps and areas as `moe_zoo.data.match_patches` takes them."""
    maps: torch.Tensor
    areas: torch.Tensor
    before: Dict[str, Routing]
    after: Dict[str, Routing]


class _Layer:
    """What is counted of one layer: for the crop, then for every noise."""

    def __init__(self, columns: int):
        self.changes = [_Changes() for _ in range(columns)]
        self.facts: Dict[str, Any] = {}

    def add(self, column: int, first: Routing, second: Routing, change: _Change, image_size: Tuple[int, int]) -> None:
        grid = find_grid(first.shape, image_size)
        selected = None if first.indices is None or first.by_expert else first.indices.shape[1]
        self.facts = {
            'experts': first.num_experts, 'selected': selected, 'rows': grid.rows, 'columns': grid.columns}
        pairs = patch_pairs(change.maps, change.areas, image_size, grid)
        sets = torch.cat([chosen_sets(first), chosen_sets(second)])
        self.changes[column].add(sets[pairs[0]].cpu(), sets[pairs[1]].cpu())


def _changed(model: nn.Module, images: torch.Tensor, area, hflip, sigmas, generator) -> Iterator[_Change]:
    """The crop, then every noise."""
    view, maps, areas = crop_pairs(images, area, hflip, generator)
    noise = torch.randn(images.shape, generator=generator).to(images)
    before = _records(model, images)
    yield _Change(maps, areas, before, _records(model, view))
    unmoved, whole = maps[:, :1].expand(-1, 2, 3, 3), torch.ones_like(areas)
    for sigma in sigmas:
        yield _Change(unmoved, whole, before, _records(model, images + sigma * noise))


def crop_pairs(
        images: torch.Tensor,
        area: Tuple[float, float],
        hflip: float,
        generator: torch.Generator,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Crops of (B, C, H, W) images; (B, 2, 3, 3) maps and (B, 2) areas of the images as they are and of the crops."""
    view, maps, areas = random_view(images, area, hflip=hflip, generator=generator)
    same = torch.eye(3, device=images.device).expand(len(images), 3, 3)
    return view, torch.stack([same, maps], dim=1), torch.stack([torch.ones_like(areas), areas], dim=1)


def patch_pairs(maps: torch.Tensor, areas: torch.Tensor, image_size: Tuple[int, int], grid: Grid) -> torch.Tensor:
    """(2, P) item numbers of the patches that correspond, those of the first view first, prefix tokens left out."""
    pairs = match_items(maps, areas, image_size, grid, match_prefix=False).flatten(1)
    # Whichever view is finer, items of the first one have the lower numbers.
    return pairs[:, (pairs >= 0).all(dim=0)].sort(dim=0).values


def _records(model: nn.Module, images: torch.Tensor) -> Dict[str, Routing]:
    """Layer name to its record; a layer that routes several times has a number behind its name from the second on."""
    with trace_routing(model) as trace:
        model(images)
    return {name if not i else f'{name}#{i + 1}': r for name, records in trace.items() for i, r in enumerate(records)}


def _columns(found: Sequence[Dict[str, Any]], sigmas: Sequence[float]) -> Dict[str, Any]:
    return {'crop': found[0], 'noise': [{'sigma': sigma, **each} for sigma, each in zip(sigmas, found[1:])]}


def _pooled(found: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    """Means over the pairs of all layers."""
    found = [each for each in found if each['pairs']]
    pairs = sum(each['pairs'] for each in found)
    means = {
        name: sum(each[name] * each['pairs'] for each in found) / pairs if pairs else None
        for name in ('changed', 'chance')}
    return {**means, 'pairs': pairs}


@torch.no_grad()
def locate_pairs(
        model: nn.Module,
        images: torch.Tensor,
        layer: Optional[str] = None,
        area: Tuple[float, float] = AREA,
        hflip: float = 0.5,
        seed: int = 0,
) -> Dict[str, Any]:
    """Which expert has which corresponding patch of a few images and of their crops, in one layer; to be drawn.

    Args:
        model: Any module that routes tokens or positions; its training mode is restored.
        images: (B, C, H, W).
        layer: Name of the layer; None takes the last one with patches.
        area, hflip, seed: Of the crops, as in `measure_consistency`.

    Returns:
        For JSON. layer, experts, area, hflip, seed; images: for each, `image` and `crop`, rows of the best expert of
        every patch (the one of largest weight; None where nothing corresponds, or no expert took the patch), and
        `changed`, rows of booleans, for the patches of the crop: whether the set of experts differs.

    Raises:
        InputError: The model has no such layer, or routes no patches.
    """
    view, maps, areas = crop_pairs(images, area, hflip, torch.Generator().manual_seed(seed))
    with evaluation_mode(model):
        before, after = _records(model, images), _records(model, view)
    names = [name for name, routing in before.items() if len(routing.shape) > 1]
    if not names or layer not in (None, *names):
        raise InputError(
            f'layer={layer!r} is not one of those that route patches: {", ".join(names) or "this model has none"}.')
    layer = layer or names[-1]
    B, size, first = len(images), images.shape[-2:], before[layer]
    grid = find_grid(first.shape, size)
    pairs = patch_pairs(maps, areas, size, grid).cpu()
    sets = torch.cat([chosen_sets(first), chosen_sets(after[layer])]).cpu()
    best = torch.cat([_best(first), _best(after[layer])]).cpu()
    shown, changed = torch.zeros(len(best), dtype=torch.bool), torch.zeros(len(best), dtype=torch.bool)
    shown[pairs.flatten()] = True
    changed[pairs[1][(sets[pairs[0]] != sets[pairs[1]]).any(dim=1)]] = True

    def rows(values: torch.Tensor) -> List[Any]:
        """(2 B N) to the patches of every view."""
        return values.reshape(2, B, -1)[:, :, grid.num_prefix_tokens:].reshape(2, B, grid.rows, -1).tolist()

    best = rows(torch.where(shown, best, -1))
    plain = [[[[None if e < 0 else e for e in row] for row in patches] for patches in views] for views in best]
    return {
        'layer': layer, 'experts': first.num_experts, 'area': list(area), 'hflip': hflip, 'seed': seed,
        'images': [
            {'image': image, 'crop': crop, 'changed': change}
            for image, crop, change in zip(*plain, rows(changed)[1])],
    }


def _best(routing: Routing) -> torch.Tensor:
    """(T,) the expert of largest weight; -1 where experts choose and none did."""
    weights = (routing if routing.by_expert else routing._replace(kept=None)).combine_matrix()
    return torch.where(weights.sum(dim=1) > 0, weights.argmax(dim=1), -1)


def describe_consistency(named: Sequence[Tuple[str, Dict[str, Any]]]) -> str:
    """The result in one sentence.

    Args:
        named: (name, result of `measure_consistency`) pairs.
    """
    texts = []
    for name, result in named:
        crop = result['overall']['crop']
        found = 'nothing to compare' if crop['changed'] is None else (
            f'{_percent(crop["changed"])} of them (by chance {_percent(crop["chance"])})')
        texts.append(f'{name}: {found}' if len(named) > 1 else found)
    return f'Patches that show the same thing get other experts after crop and flip: {"; ".join(texts)}.'


def consistency_section(
        named: Sequence[Tuple[str, Dict[str, Any]]],
        picture: Optional[bytes] = None,
        caption: str = '',
) -> Section:
    """A section of the page: how often routes change, by layer and by noise, and views with their patches.

    Args:
        named: (name, result of `measure_consistency`) pairs of one set of images: one model, or one before and after
            training.
        picture: A PNG of `moe_zoo.analysis.view_figures.views_figure`; None shows none.
        caption: What the picture shows.
    """
    result = named[-1][1]
    prose = (
        f'Each of {result["images"]:,} images is routed twice: as it is, and as a crop of {_range(result["area"])} of'
        f' its area, enlarged and flipped with a probability of {result["hflip"]:g}. A patch of the crop and the patch'
        ' of the image that lies under its centre show the same thing; they **change** where the sets of experts they'
        ' get differ. **By chance** is the share that would change if the choices were dealt to the patches at random;'
        ' near it, the place in the picture decides, or nothing does, and not what is shown. Fewer is not better by'
        ' itself: a router that sends everything to one expert reaches 0, and chance with it; an untrained one may'
        ' follow plain brightness, which a crop hardly changes. Read it beside chance and accuracy.')
    rows = [
        [f'{name}: `{layer["layer"]}`' if len(named) > 1 else f'`{layer["layer"]}`', layer['experts'],
         '–' if layer['selected'] is None else layer['selected'], f'{layer["rows"]} x {layer["columns"]}',
         _percent(layer['crop']['changed']), _percent(layer['crop']['chance'])]
        for name, each in named for layer in each['layers']]
    columns = ['layer', 'experts', 'chosen', 'patches', 'changed', 'by chance']
    blocks: List[Any] = [
        Stats([(_percent(each['overall']['crop']['changed']),
                f'{name}: change under crop and flip' if len(named) > 1 else 'change under crop and flip')
               for name, each in named]),
        prose, Table(columns, rows, 'Patches whose experts change under crop and flip')]
    if any(each['sigmas'] for _, each in named):
        blocks.append(_noise_chart(named))
    if picture is not None:
        blocks += [caption, Figure(  # words between, or it would stand beside the chart, half as wide
            picture, 'Images and their crops, every corresponding patch in the colour of its best expert.')]
    if result['left_out']:
        listed = ', '.join(f'`{name}`' for name in result['left_out'])
        blocks.append(f'Left out, because they decide once an image: {listed}.')
    return Section('Do routes stay with what they show?', 'done', describe_consistency(named), blocks)


def _noise_chart(named: Sequence[Tuple[str, Dict[str, Any]]]) -> Figure:
    lines = []
    for name, result in named:
        points = [(each['sigma'], 100 * each['changed']) for each in result['overall']['noise']]
        lines.append((name, [(0.0, 0.0), *points]))
    text = '; '.join(f'{name}: {", ".join(f"{y:.1f} % at {x:g}" for x, y in line[1:])}' for name, line in lines)
    return Figure(
        charts.curves(lines, 'noise, deviations of a pixel', 'patches that change, %', '{:.0f}', log=False),
        f'Share of patches whose experts change under noise. {text}.',
        'The same images under growing Gaussian noise, nothing moved; over all layers.')


def _percent(share: Optional[float]) -> str:
    return '–' if share is None else f'{100 * share:.1f} %'


def _range(area: Sequence[float]) -> str:
    return f'{100 * area[0]:g} to {100 * area[1]:g} %'
