"""What routed layers did with a set of images, layer by layer, and which expert had which place of an image.

Letters: N images, T routed items, E experts, Y classes, B images of a batch.
"""
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Optional, Tuple

import torch
from torch import nn

from ..errors import InputError
from ..layers import ChannelGate, RoutedLayer
from ..layers.routed import token_grid
from ..routing import Routing, trace_routing
from .force import routed_layers
from .usage import LayerUsage, UsageSums, evaluation_mode, image_shares

Batches = Iterable[Tuple[torch.Tensor, torch.Tensor]]

BINS = 20  # of the histogram of gates, on [0, 1]; what lies above 1 is counted in the last
MOST_MAPS = 16  # experts of a layer whose maps of logits are kept
KINDS = {
    'mix': 'every expert takes part, weighed by its gate',
    'top-k': 'the K experts of largest gate take part',
    'by expert': 'every expert takes the items that it likes best',
    'soft': 'every expert reads mixtures of all items',
    'channels': 'every channel is an expert, which a gate scales or switches off',
}
UNITS = ('image', 'token', 'position')  # by the number of axes of a record's shape


@dataclass
class LayerExperts:
    """What one routed layer did with N images.

    Attributes:
        name: Module name; `name#1` is the second record of one forward.
        layer: The module.
        kind: A key of `KINDS`.
        unit: What is routed: image, token or position.
        usage: Shares, balance, drops.
        shares: (N, E) share of combine weight that an expert has in an image.
        gates: (N, E) mean gate of an expert over the items of an image; of those that it took, where experts choose.
        counts: (BINS,) gate values of all items.
        zeros: Gate values that are exactly 0.
        best: (N, E) the largest weight that an expert has at a place of an image; None where there are no places.
        places: (N, E) that place, row by row from 0.
        grid: (rows, columns) of places.
    """
    name: str
    layer: RoutedLayer
    kind: str
    unit: str
    usage: LayerUsage
    shares: torch.Tensor
    gates: torch.Tensor
    counts: torch.Tensor
    zeros: int
    best: Optional[torch.Tensor] = None
    places: Optional[torch.Tensor] = None
    grid: Optional[Tuple[int, int]] = None


@dataclass
class Watched:
    """One pass: the layers in the order of the network, and (N,) targets and predicted classes."""
    layers: Dict[str, LayerExperts]
    targets: torch.Tensor
    predicted: torch.Tensor
    skipped: Dict[str, str]

    @property
    def right(self) -> torch.Tensor:
        return self.targets == self.predicted


class _Sums:
    """Running sums of one layer."""

    def __init__(self, layer: RoutedLayer, routing: Routing):
        self.layer, self.kind, self.unit = layer, kind_of(layer, routing), UNITS[len(routing.shape) - 1]
        self.usage, self.counts, self.zeros = UsageSums(), torch.zeros(BINS, dtype=torch.int64), 0
        self.shares: List[torch.Tensor] = []
        self.gates: List[torch.Tensor] = []
        self.best: List[torch.Tensor] = []
        self.grid: Optional[Tuple[int, int, int]] = None

    def add(self, routing: Routing, targets: List[int], size: Tuple[int, int]) -> None:
        gates = routing.gates.float().cpu()
        self.usage.add(routing, targets)
        self.shares.append(image_shares(routing).float().cpu())
        # Where experts choose, a gate that nobody used may be part of a sum over the image that is always 1.
        used = routing.combine_matrix().float().cpu() if routing.by_expert else gates
        self.gates.append(used.reshape(routing.shape[0], -1, used.shape[-1]).mean(dim=1))
        self.counts += torch.histc(gates.clamp(0, 1), BINS, 0, 1).long()
        self.zeros += int((gates == 0).sum())
        self.grid = grid_of(routing, size)
        if self.grid is not None:
            weights = routing.combine_matrix().float().cpu().reshape(routing.shape[0], -1, gates.shape[-1])
            self.best.append(torch.stack(weights[:, self.grid[0]:].max(dim=1)))  # (2, B, E) weights and places

    def finish(self, name: str, num_classes: int) -> LayerExperts:
        best, places = torch.cat(self.best, dim=1) if self.best else (None, None)
        return LayerExperts(
            name, self.layer, self.kind, self.unit, self.usage.finish(name, num_classes), torch.cat(self.shares),
            torch.cat(self.gates), self.counts, self.zeros, best, None if places is None else places.long(),
            self.grid and self.grid[1:])


def grid_of(routing: Routing, size: Tuple[int, int]) -> Optional[Tuple[int, int, int]]:
    """(tokens in front, rows, columns) of the places that a record is about in images of (height, width), or None."""
    if len(routing.shape) == 3:
        return 0, routing.shape[1], routing.shape[2]
    return token_grid(routing.shape[1], size) if len(routing.shape) == 2 else None


def kind_of(layer: nn.Module, routing: Routing) -> str:
    """The key of `KINDS` that a layer and its record belong to."""
    if isinstance(layer, ChannelGate):
        return 'channels'
    if routing.slot_logits is not None:
        return 'soft'
    if routing.indices is None:
        return 'mix'
    return 'by expert' if routing.by_expert else 'top-k'


@torch.no_grad()
def watch(model: nn.Module, batches: Batches, num_classes: int) -> Watched:
    """Run a model in evaluation mode over images and keep what every routed layer did with each of them.

    Args:
        model: Any classifier that holds routed layers; its training mode is restored.
        batches: (images, targets), on the device of the model.
        num_classes: Y.

    Raises:
        InputError: There is no image, or no active routed layer.
    """
    layers, sums, skipped = routed_layers(model), {}, {}
    targets: List[int] = []
    predicted: List[torch.Tensor] = []
    with evaluation_mode(model):
        for images, batch_targets in batches:
            with trace_routing(model) as trace:
                predicted.append(model(images).argmax(dim=1).cpu())
            targets += batch_targets.tolist()
            for name, routing in numbered(trace, layers):
                if not routing.shape or routing.shape[0] != len(images):
                    skipped[name] = 'it sees some of the images only'
                    continue
                sums.setdefault(name, _Sums(layers[name.partition('#')[0]], routing)).add(
                    routing, batch_targets.tolist(), tuple(images.shape[2:]))
    if not predicted:
        raise InputError('There is no image to look at.')
    found = {name: total.finish(name, num_classes) for name, total in sums.items() if name not in skipped}
    if not found:
        raise InputError(f'{type(model).__name__} has no active routed layer: there is no expert to analyse.')
    return Watched(found, torch.tensor(targets), torch.cat(predicted), skipped)


def numbered(trace: Dict[str, List[Routing]], layers: Dict[str, RoutedLayer]) -> Iterable[Tuple[str, Routing]]:
    """Records of routed layers, the second one of a layer under the name `layer#1`."""
    for name, records in trace.items():
        if name in layers:
            for number, routing in enumerate(records):
                yield (f'{name}#{number}' if number else name), routing


# ---- where in the image

@torch.no_grad()
def locate(model: nn.Module, images: torch.Tensor) -> List[Dict[str, Any]]:
    """Which expert had which place of a few images, in every layer that routes tokens or positions.

    Args:
        model: The classifier.
        images: (B, C, H, W).

    Returns:
        For every such layer: layer, kind, rows, columns, experts (the numbers of those listed) and images, a list of
        top (rows x columns, the expert with the largest weight; None where none took the place), share (of this
        expert), front (the experts of the tokens in front), logits (a map for each listed expert) and, where experts
        choose, taken (the flat places that each listed expert took).
    """
    layers, found = routed_layers(model), []
    with evaluation_mode(model), trace_routing(model) as trace:
        model(images)
    for name, routing in numbered(trace, layers):
        place = grid_of(routing, tuple(images.shape[2:]))
        if place is not None and routing.shape[0] == len(images):
            found.append(_places(name, kind_of(layers[name.partition('#')[0]], routing), routing, *place))
    return found


def _places(name: str, kind: str, routing: Routing, front: int, rows: int, columns: int) -> Dict[str, Any]:
    B, E = routing.shape[0], routing.num_experts
    weights = routing.combine_matrix().float().cpu().reshape(B, -1, E)
    logits = routing.logits.float().cpu().reshape(B, -1, E)[:, front:]
    listed = sorted(weights.sum(dim=(0, 1)).argsort(descending=True, stable=True)[:MOST_MAPS].tolist())
    images = []
    for weight, logit in zip(weights, logits):
        total, (best, top) = weight.sum(dim=1), weight.max(dim=1)
        tops = [int(e) if w > 0 else None for e, w in zip(top, total)]
        shares = [round(float(b / w), 4) if w > 0 else None for b, w in zip(best, total)]
        image = {
            'front': tops[:front], 'top': _in_rows(tops[front:], columns), 'share': _in_rows(shares[front:], columns),
            'logits': [_in_rows([round(v, 4) for v in logit[:, e].tolist()], columns) for e in listed],
        }
        if routing.by_expert:
            image['taken'] = [(weight[front:, e] > 0).nonzero().flatten().tolist() for e in listed]
        images.append(image)
    return {'layer': name, 'kind': kind, 'rows': rows, 'columns': columns, 'experts': listed, 'images': images}


def _in_rows(values: List[Any], columns: int) -> List[List[Any]]:
    return [values[i:i + columns] for i in range(0, len(values), columns)]
