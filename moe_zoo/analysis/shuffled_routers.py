"""Routers that learned nothing: versions of a trained router whose weights keep their values and lose their places.

They meet the features that the trained router met, and where experts choose items, every expert takes as many items of
each group as it did.

Letters: N images, T routed items, t items of an image, D features, E experts, R shuffled versions, O objects, S size
classes, G groups of items.
"""
import copy
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from ..routing import Routing
from .object_gates import SIZES, Layout, Objects, gate_shares

PLACES = 4  # of an object that are looked at; neighbours tell much the same
BUFFER_ITEMS = 4096  # router calls are gathered up to so many items, then all versions run on them at once
COMPETING_ITEMS = 8192  # where experts choose all items of a group are needed: no further batch after so many


@dataclass
class Call:
    """What a router met in one batch, and how the outcome counts for object sizes.

    Attributes:
        features: (T, D), or (N, t, D) for a router that takes the items of an image together.
        weights: (S, T) how much every item counts for the objects of a class.
        group_size: Items a group, where experts choose and the layer, not the router, says how many; else None.
        taken: (G, E) how many items of each group every expert took, beside `group_size`.
        inside: (T,) bool, which items could be taken; None is all.
    """
    features: torch.Tensor
    weights: np.ndarray
    group_size: Optional[int] = None
    taken: Optional[torch.Tensor] = None
    inside: Optional[torch.Tensor] = None


class ShuffledRouters:
    """All versions of one router, run batch by batch.

    Args:
        router: Takes features and returns a `Routing`.
        count: R.
        seed: Of the shuffles.

    Attributes:
        observed: (S, E) sums over objects of what the router itself did on the items looked at.
        versions: (R, S, E) the same of every version.
        objects: (S,) how many objects these are.
    """

    def __init__(self, router: nn.Module, count: int, seed: int):
        self.router, self.count, self.seed = copy.deepcopy(router).eval(), count, seed
        for module in self.router.modules():
            module._forward_hooks.clear()
        self.parameters = {name: p.detach() for name, p in self.router.named_parameters()}
        self.observed, self.versions, self.objects = 0., 0., np.zeros(len(SIZES))
        self.items = 0
        self._waiting: List[Call] = []

    def add(
            self,
            features: torch.Tensor,
            routing: Routing,
            layout: Layout,
            objects: Sequence[Objects],
    ) -> None:
        """A batch: what the router was given, the record of its layer, and the objects of the images."""
        if routing.by_expert and self.items >= COMPETING_ITEMS:
            return
        weights = item_weights(layout, objects, len(routing.logits))
        self.items += len(routing.logits)
        self.observed = self.observed + weights @ gate_shares(routing)
        self.objects += [sum(int((each.sizes == s).sum()) for each in objects) for s in range(len(SIZES))]
        if not routing.by_expert:
            used = weights.any(axis=0)  # the others do not change what these get
            self._waiting.append(Call(features[torch.from_numpy(used).to(features.device)], weights[:, used]))
        elif features.dim() == 2:
            size = routing.group_size or len(routing.logits)
            taken = taken_by_expert(routing, size)
            self._waiting.append(Call(features, weights, size, taken, routing.inside))
        else:
            self._waiting.append(Call(features, weights))
        if sum(len(call.features) for call in self._waiting) >= BUFFER_ITEMS:
            self.run()

    @torch.no_grad()
    def run(self) -> None:
        """Run all versions on what is waiting."""
        calls = [call for call in self._waiting if call.features.numel()]
        self._waiting = []
        while calls:
            alike = [call for call in calls if _joins(calls[0], call)]
            calls = [call for call in calls if not any(call is other for other in alike)]
            self.versions = self.versions + self._sums(_joined(alike))

    def _sums(self, call: Call) -> np.ndarray:
        """(R, S, E) sums of one call."""
        weights, sums = torch.from_numpy(call.weights), []
        for state in self._states():
            routing = functional_call(self.router, state, (call.features,))
            if call.group_size is not None:
                routing = choose_again(routing, call.group_size, call.taken, call.inside)
            elif not routing.by_expert:
                routing = routing._replace(kept=None)
            shares = routing.combine_matrix()
            shares = shares / shares.sum(dim=1, keepdim=True).clamp_min(1e-12)
            sums.append((weights @ shares.cpu().double()).numpy())
        return np.stack(sums)

    def _states(self) -> Iterator[Dict[str, torch.Tensor]]:
        """The parameters of every version; the same versions in every call."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.count):
            yield {
                name: p.flatten()[torch.randperm(p.numel(), generator=generator).to(p.device)].view_as(p)
                for name, p in self.parameters.items()}


def _joins(first: Call, call: Call) -> bool:
    """Whether two calls can be run as one."""
    def kind(each: Call) -> tuple:
        return each.features.shape[1:], each.group_size, each.inside is None
    whole = first.group_size is None or len(first.features) % first.group_size == 0
    return call is first or (whole and kind(call) == kind(first))


def _joined(calls: List[Call]) -> Call:
    taken, inside = (
        None if getattr(calls[0], key) is None else torch.cat([getattr(call, key) for call in calls])
        for key in ('taken', 'inside'))
    return Call(torch.cat([call.features for call in calls]), np.concatenate([call.weights for call in calls], axis=1),
                calls[0].group_size, taken, inside)


def item_weights(layout: Layout, objects: Sequence[Objects], items: int) -> np.ndarray:
    """(S, T) how much every routed item counts for the objects of each size class: each object counts once.

    Of the places inside an object the `PLACES` are looked at that lie evenly over them.
    """
    out = np.zeros((len(SIZES), items))
    for n, (order, each) in enumerate(zip(layout.order, objects)):
        spread = layout.spread[n if len(layout.spread) > 1 else 0]
        inside = each.at(layout.kind, len(spread)) @ spread  # (O, t)
        if layout.kind == 'place':
            inside = np.stack([_thinned(row) for row in inside]) if len(inside) else inside
        np.add.at(out, (each.sizes[:, None], order[None]), inside)
    return out


def _thinned(row: np.ndarray) -> np.ndarray:
    places = np.flatnonzero(row > 1e-9)
    chosen = places[np.linspace(0, len(places) - 1, min(PLACES, len(places))).round().astype(int)]
    out = np.zeros_like(row)
    out[chosen] = 1 / len(chosen)
    return out


def taken_by_expert(routing: Routing, group_size: int) -> torch.Tensor:
    """(G, E) how many items of each group every expert took; the last group may be shorter."""
    kept = routing.kept if routing.kept is not None else torch.ones_like(routing.indices, dtype=torch.bool)
    taken = torch.zeros_like(routing.logits).scatter(1, routing.indices, kept.to(routing.logits.dtype))
    return _in_groups(taken, group_size, 0.)[0].sum(dim=1)


def choose_again(
        routing: Routing,
        group_size: int,
        taken: torch.Tensor,
        inside: Optional[torch.Tensor] = None,
) -> Routing:
    """A record in which every expert takes so many items of each group, those that it likes best.

    Args:
        routing: With every item offered to every expert.
        group_size: Items a group; the last one may be shorter.
        taken: (G, E).
        inside: (T,) bool, the items that may be taken; None is all.
    """
    likings = routing.logits.softmax(dim=-1)
    likings = likings if inside is None else likings.masked_fill(~inside[:, None], -1.)
    likings, rows = _in_groups(likings, group_size, -1.)
    ranked = likings.sort(dim=1, descending=True).values
    least = ranked.gather(1, taken[:, None].long().sub(1).clamp_min(0))  # (G, 1, E) liking of the last one taken
    kept = ((likings >= least) & (taken[:, None] > 0)).flatten(0, 1)[:rows]  # by the number of the expert
    return routing._replace(kept=kept.gather(1, routing.indices))


def _in_groups(values: torch.Tensor, size: int, filling: float) -> Tuple[torch.Tensor, int]:
    """(T, E) to (G, size, E), the last group filled up, and T."""
    rows = len(values)
    padded = nn.functional.pad(values, (0, 0, 0, -rows % size), value=filling)
    return padded.unflatten(0, (-1, size)), rows
