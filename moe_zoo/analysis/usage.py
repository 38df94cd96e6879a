"""Which experts are used, how evenly, and by which classes: numbers from the records of any routed model.

Letters: B images, T routed items, E experts, K chosen experts, Y classes.
"""
import contextlib
from dataclasses import dataclass, field
from typing import Dict, Iterable, List, Optional

import torch
from torch import nn

from ..errors import InputError
from ..routing import Routing, trace_routing

LIVING_SHARE = 0.01  # an expert lives when it carries more than 1 % (Pavlitska et al. 2022)


def living_share(num_experts: int) -> float:
    """Share of the combine weight above which an expert lives: 1 %; of more than ten, a tenth of a fair share."""
    return min(LIVING_SHARE, 0.1 / num_experts)


@dataclass
class LayerUsage:
    """What one routed layer did with a data set. Shares sum to one over the experts.

    Attributes:
        name: Module name of the layer.
        items: Routed items seen: images, tokens or positions.
        choices: (E,) kept choices an expert; the sum of its weights where every expert is mixed.
        mass: (E,) sum of combine weights an expert.
        dropped: Share of the choices that found no slot (of the items that no expert took, where experts choose).
        class_mass: (Y, E) mean share of combine weight an expert has in the images of a class, rows sum to one; None
            without targets; a row of a class that was not seen is zero.
        used: (E,) items that an expert computed: its kept choices, or the items where its weight is not zero; None, in
            records without it, stands for `choices`.
    """
    name: str
    items: int
    choices: torch.Tensor
    mass: torch.Tensor
    dropped: float
    class_mass: Optional[torch.Tensor] = None
    used: Optional[torch.Tensor] = None

    @property
    def num_experts(self) -> int:
        return len(self.choices)

    @property
    def share(self) -> torch.Tensor:
        """(E,) share of the choices (of the weight, where every expert is mixed)."""
        return self.choices / self.choices.sum().clamp_min(1e-12)

    @property
    def load(self) -> List[float]:
        """(E,) times an item used each expert, on average: what `moe_zoo.analysis.count` expects MACs of."""
        used = self.choices if self.used is None else self.used
        return (used / max(self.items, 1)).tolist()

    @property
    def importance(self) -> torch.Tensor:
        """(E,) share of the combine weight."""
        return self.mass / self.mass.sum().clamp_min(1e-12)

    @property
    def cv(self) -> float:
        """Coefficient of variation of `share` with the population deviation; 0 is perfect balance."""
        return float(self.share.std(unbiased=False) / self.share.mean().clamp_min(1e-12))

    @property
    def entropy(self) -> float:
        """Entropy of `share` divided by ln E; 1 is perfect balance."""
        share = self.share
        if len(share) == 1:
            return 1.0
        return float(torch.special.entr(share).sum() / torch.tensor(float(len(share))).log())

    @property
    def living(self) -> int:
        """Experts that carry more than `living_share` of the combine weight."""
        return self.num_experts - len(self.dead)

    @property
    def dead(self) -> List[int]:
        """The other experts, by number."""
        return (self.importance <= living_share(self.num_experts)).nonzero().flatten().tolist()

    def as_dict(self) -> Dict:
        """Plain numbers for JSON."""
        return {
            'layer': self.name, 'items': self.items, 'share': self.share.tolist(),
            'load': self.load, 'importance': self.importance.tolist(), 'cv': self.cv, 'entropy': self.entropy,
            'living': self.living, 'dead': self.dead, 'dropped': self.dropped,
            'class_mass': None if self.class_mass is None else self.class_mass.tolist(),
        }


@dataclass
class UsageSums:
    """Running sums of one layer."""
    items: int = 0
    dropped: float = 0.  # share times items
    choices: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    mass: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    used: torch.Tensor = field(default_factory=lambda: torch.zeros(()))
    by_class: Dict[int, torch.Tensor] = field(default_factory=dict)
    images: Dict[int, int] = field(default_factory=dict)

    def add(self, routing: Routing, targets: Optional[List[int]]) -> None:
        routing = routing.without_padding()
        weights = routing.combine_matrix().double().cpu()  # (T, E)
        self.items += len(weights)
        self.mass = self.mass + weights.sum(dim=0)
        self.used = self.used + uses(routing).double().sum(dim=0).cpu()
        if routing.indices is None:
            self.choices = self.choices + weights.sum(dim=0)
        else:
            chosen = routing.indices.cpu()
            kept = torch.ones_like(chosen, dtype=torch.bool) if routing.kept is None else routing.kept.cpu()
            self.choices = self.choices + torch.bincount(chosen[kept], minlength=weights.shape[1]).double()
            self.dropped += float(routing.dropped()) * len(weights)
        if targets is not None and routing.shape and routing.shape[0] == len(targets):
            shares = image_shares(routing, weights)
            for share, target in zip(shares, targets):
                self.by_class[target] = self.by_class.get(target, 0) + share
                self.images[target] = self.images.get(target, 0) + 1

    def finish(self, name: str, num_classes: int) -> LayerUsage:
        table = None
        if self.by_class:
            table = torch.zeros(num_classes, len(self.mass), dtype=torch.float64)
            for target, total in self.by_class.items():
                table[target] = total / self.images[target]
        return LayerUsage(
            name, self.items, self.choices, self.mass, self.dropped / max(self.items, 1), table, self.used)


def uses(routing: Routing) -> torch.Tensor:
    """(T, E) bool: which experts compute for an item: its kept choices, or the weights that are not zero."""
    if routing.indices is None:
        return routing.weights != 0
    kept = torch.ones_like(routing.indices, dtype=torch.bool) if routing.kept is None else routing.kept
    return torch.zeros_like(routing.logits, dtype=torch.bool).scatter(1, routing.indices, kept)


def image_shares(routing: Routing, weights: Optional[torch.Tensor] = None) -> torch.Tensor:
    """(B, E) share of combine weight that every expert has in an image, all items of an image counting by weight.

    Args:
        routing: A record whose `shape` begins with the images.
        weights: Its (T, E) combine matrix, where it is at hand.
    """
    weights = routing.combine_matrix() if weights is None else weights
    per_image = weights.reshape(routing.shape[0], -1, weights.shape[-1]).sum(dim=1)  # (B, E)
    return per_image / per_image.sum(dim=1, keepdim=True).clamp_min(1e-12)


@torch.no_grad()
def measure_usage(
        model: nn.Module,
        loader: Iterable,
        device: Optional[torch.device] = None,
        num_classes: Optional[int] = None,
        max_batches: Optional[int] = None,
) -> Dict[str, LayerUsage]:
    """Run a model in evaluation mode over a data set and count what its routed layers chose.

    A layer that routes more than once in a forward (on every level of a pyramid) is counted over all of them.

    Args:
        model: Any module that holds routed layers; its training mode is restored.
        loader: Yields (images, targets); or images alone, or the list of dictionaries that a detector takes, in which
            cases there is no table by class.
        device: Where to send the images; None leaves them where they are. A detector sends its own.
        num_classes: Rows of the table by class; None takes the largest target seen plus one.
        max_batches: Stop after so many.

    Returns:
        Layer name to its usage, in the order of the network.

    Raises:
        InputError: The model has no active routed layer, or the loader is empty.
    """
    sums: Dict[str, UsageSums] = {}
    batches, largest = 0, -1
    with evaluation_mode(model):
        for batch in loader:
            scenes = isinstance(batch, list) and isinstance(batch[0], dict)
            images, targets = batch[:2] if isinstance(batch, (tuple, list)) and not scenes else (batch, None)
            with trace_routing(model) as trace:
                model(images if device is None or scenes else images.to(device))
            targets = _class_indices(targets)
            for name, records in trace.items():
                for routing in records:
                    sums.setdefault(name, UsageSums()).add(routing, targets)
            largest = max([largest, *(targets or [])])
            batches += 1
            if batches == max_batches:
                break
    if not batches:
        raise InputError('loader is empty: expert usage needs at least one batch of images.')
    if not sums:
        raise InputError(f'model: {type(model).__name__} has no active routed layer, so there is no usage to measure.')
    return {name: total.finish(name, num_classes or largest + 1) for name, total in sums.items()}


def _class_indices(targets) -> Optional[List[int]]:
    """Plain class numbers, or None where targets are missing or soft (mixup)."""
    if targets is None:
        return None
    targets = torch.as_tensor(targets)
    return targets.tolist() if targets.ndim == 1 and not targets.is_floating_point() else None


@contextlib.contextmanager
def evaluation_mode(model: nn.Module):
    """Put a model into evaluation mode and give every module its own mode back after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def usage_table(usages: Dict[str, LayerUsage]) -> str:
    """A plain-text table, one row a layer; of more than 64 experts (channels) the least and the largest share."""
    width = max([len('layer'), *map(len, usages)])
    rows = [f'{"layer":<{width}}  experts  living     cv  entropy  dropped  share of every expert, %']
    for name, usage in usages.items():
        listed = usage.share.tolist()
        few = usage.num_experts <= 64
        span = f'{100 * min(listed):.2f} to {100 * max(listed):.2f}'
        shares = ' '.join(f'{100 * s:.1f}' for s in listed) if few else span
        rows.append(
            f'{name:<{width}}  {usage.num_experts:>7}  {usage.living:>6}  {usage.cv:>5.2f}  {usage.entropy:>7.3f}  '
            f'{100 * usage.dropped:>5.1f} %  {shares}'
        )
    return '\n'.join(rows)
