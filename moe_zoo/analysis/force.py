"""Overrule the routers of any model for a while: force one expert, choose more or fewer, or apply a rule of your own.

Letters: T routed items, E experts, K chosen experts.
"""
import contextlib
import math
from typing import Callable, Dict, Iterator, List, Optional, Union

import torch
from torch import nn

from ..errors import InputError, counted, nearest
from ..layers import RoutedLayer
from ..routing import (
    ExpertChoiceRouter,
    HierarchicalRouter,
    NoisyTopKRouter,
    Routing,
    SigmoidTopKRouter,
    SoftmaxTopKRouter,
)
from ..routing.routers import top_k

CHOOSING = (NoisyTopKRouter, SigmoidTopKRouter, SoftmaxTopKRouter)  # routers that know K
OTHERWISE = (ExpertChoiceRouter, HierarchicalRouter)  # of these, whose K is no free number


def routed_layers(model: nn.Module, required: bool = True) -> Dict[str, RoutedLayer]:
    """Name to layer of every routed layer of a model.

    Raises:
        InputError: There is none, and `required`.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RoutedLayer)}
    if required and not layers:
        raise InputError(f'model: {type(model).__name__} has no routed layer.')
    return layers


@contextlib.contextmanager
def rewrite_routing(
        model: nn.Module,
        rule: Callable[[str, Routing], Routing],
        layer: Optional[str] = None,
) -> Iterator[None]:
    """Replace what routers decide by what a rule makes of it.

    The rule sits between the router and its layer, so that dispatch, capacity and records follow it. A layer that
    reuses the decision of another follows that one.

    Args:
        model: Any module that holds routed layers; uncompiled, because compiled code passes hooks by.
        rule: Takes the name of the routed layer and the router's record, with `shape` (T,), and returns the record to
            be used instead.
        layer: Name of the only layer to be overruled; None for all.

    Raises:
        InputError: The model has no routed layer, or none of this name.
    """
    layers = routed_layers(model)
    if layer is not None and layer not in layers:
        raise InputError(
            f'layer={layer!r} is no routed layer.{nearest(layer, layers)} Routed layers: {", ".join(layers)}.')
    hooks = []
    for name in layers if layer is None else [layer]:
        def overrule(module, inputs, output, name=name):
            return rule(name, output) if isinstance(output, Routing) else None
        inner = [m for n, m in layers[name].named_modules() if not _inside_other(f'{name}.{n}', name, layers)]
        hooks += [module.register_forward_hook(overrule) for module in inner]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _inside_other(path: str, name: str, layers: Dict[str, RoutedLayer]) -> bool:
    """Whether a module under the layer `name` belongs to another routed layer, nested in it."""
    nested = [other for other in layers if other != name and other.startswith(f'{name}.' if name else '')]
    return any(f'{path.lstrip(".")}.'.startswith(f'{other}.') for other in nested)


def force_expert(model: nn.Module, expert: int, layer: Optional[str] = None, keep_mass: bool = False):
    """Send every item to one expert, in every routed layer or in one; a context manager.

    >>> with force_expert(model, 2):
    ...     logits = model(images)

    Sparse layers run this expert on all items; layers that mix their experts use its kernel alone.

    Args:
        model: Any module that holds routed layers.
        expert: Index of the expert.
        layer: Name of the only layer to be forced; None forces all.
        keep_mass: Give the expert the sum of the item's combine weights instead of 1. The same where weights sum to one
            (softmax after top-k); where they do not (the sigmoids of CondConv, V-MoE's gates), it keeps the scale that
            the following layers were trained with.

    Raises:
        InputError: A forced layer has no such expert, the model has no routed layer, or none of this name.
    """
    for name, module in routed_layers(model).items():
        if layer in (None, name) and not 0 <= expert < module.num_experts:
            raise InputError(
                f'expert={expert}: layer {name!r} has {module.num_experts} experts, 0 to {module.num_experts - 1}.')

    def rule(name: str, routing: Routing) -> Routing:
        experts = torch.full(routing.logits.shape[:1], expert, dtype=torch.int64, device=routing.logits.device)
        return assign(routing, experts, keep_mass)
    return rewrite_routing(model, rule, layer)


@contextlib.contextmanager
def drop_expert(model: nn.Module, expert: int, layer: Optional[str] = None) -> Iterator[None]:
    """Take an expert out for a while, in every routed layer or in one.

    Layers that choose the K best experts of an item decide as if it were not there: its logit is minus infinity, and
    the next best takes its place. Elsewhere the other experts of an item share the weight that all had together.

    Args:
        model: Any module that holds routed layers.
        expert: Index of the expert.
        layer: Name of the only layer to lose it; None is all.

    Raises:
        InputError: A layer has no such expert or no other one, the model has no routed layer, or none of this name.
    """
    layers = routed_layers(model)
    for name, module in layers.items():
        if layer in (None, name) and not (0 <= expert < module.num_experts and module.num_experts > 1):
            raise InputError(f'expert={expert}: layer {name!r} has {counted(module.num_experts, "expert")}, of which '
                             'one of several can be dropped.')
    choosers = choosing_layers(model)
    routers = [m for name, found in choosers.items() if layer in (None, name) for m in found[1:]]

    def rule(name: str, routing: Routing) -> Routing:
        return routing if name in choosers else without_expert(routing, expert)

    def masked(compute: Callable) -> Callable:
        return lambda x: compute(x).index_fill(1, torch.tensor([expert], device=x.device), -math.inf)

    with rewrite_routing(model, rule, layer):
        for router in routers:
            router.compute_logits = masked(router.compute_logits)
        try:
            yield
        finally:
            for router in routers:
                del router.compute_logits


def without_expert(routing: Routing, expert: int) -> Routing:
    """A record in which one expert has no weight, and the others of an item share the weight that all had together."""
    others = torch.arange(routing.num_experts, device=routing.logits.device) != expert
    kept = others.expand_as(routing.weights) if routing.indices is None else others[routing.indices]
    left = routing.weights * kept
    scale = routing.weights.sum(dim=1) / left.sum(dim=1).clamp_min(1e-30)
    return routing._replace(weights=left * torch.where(left.sum(dim=1) > 0, scale, 0.)[:, None])


@contextlib.contextmanager
def select_experts(model: nn.Module, num_selected: int, layer: Optional[str] = None) -> Iterator[None]:
    """Let layers that choose the K best experts of an item choose another number of them for a while.

    Inside, such a layer is the one that its constructor makes with this K: gates, capacity and dispatch follow. A layer
    with fewer experts chooses all of them. Layers that mix every expert, whose experts choose, or that choose groups
    first (K is then a product) are left alone.

    Args:
        model: Any module that holds routed layers.
        num_selected: K, at least 1.
        layer: Name of the only layer to be changed; None changes all.

    Raises:
        InputError: K is below 1, no layer chooses, or none has this name.
    """
    choosers = choosing_layers(model)
    if num_selected < 1:
        raise InputError(f'num_selected={num_selected}: choose at least 1 expert.')
    if not choosers or layer is not None and layer not in choosers:
        where = type(model).__name__ if layer is None else f'layer {layer!r}'
        raise InputError(f'{where} has no router that chooses the best experts of an item.')
    changed = [m for name in (choosers if layer is None else [layer]) for m in choosers[name]]
    before = [module.num_selected for module in changed]
    try:
        for module in changed:
            module.num_selected = min(num_selected, module.num_experts)
        yield
    finally:
        for module, number in zip(changed, before):
            module.num_selected = number


def keep_largest(model: nn.Module, num_kept: Union[int, float], keep_mass: bool = True):
    """Where every expert is mixed, let only those with the largest weights of an item count; a context manager.

    Args:
        model: Any module that holds routed layers. Those that choose, or whose experts choose, are left alone.
        num_kept: K as an int, or as a float the share of the experts of a layer, rounded up.
        keep_mass: Give them the sum of all weights of the item, which the following layers were trained with.

    Raises:
        InputError: The model has no routed layer, or nothing would be kept.
    """
    if not num_kept > 0:
        raise InputError(f'num_kept={num_kept}: keep at least 1 expert, or a share above 0.')

    def rule(name: str, routing: Routing) -> Routing:
        k = math.ceil(num_kept * routing.num_experts) if isinstance(num_kept, float) else num_kept
        if routing.indices is not None or k >= routing.num_experts:
            return routing
        largest, chosen = top_k(routing.weights, k)
        weights = torch.zeros_like(routing.weights).scatter(1, chosen, largest)
        if keep_mass:
            weights = weights * (routing.weights.sum(dim=1) / weights.sum(dim=1).clamp_min(1e-30))[:, None]
        return routing._replace(gates=weights, weights=weights)
    return rewrite_routing(model, rule)


def choosing_layers(model: nn.Module) -> Dict[str, List[nn.Module]]:
    """Name of every layer that chooses the K best experts of an item, to the modules that know K: it and its router."""
    layers = routed_layers(model)
    found = {}
    for name, layer in layers.items():
        routers = [
            m for n, m in layer.named_modules()
            if isinstance(m, CHOOSING) and not _inside_other(f'{name}.{n}', name, layers)]
        if routers and not any(isinstance(router, OTHERWISE) for router in routers):
            found[name] = [layer, *routers]
    return found


def assign(routing: Routing, experts: torch.Tensor, keep_mass: bool = False) -> Routing:
    """A record in which every item goes to one given expert.

    Args:
        routing: The record to start from; logits and everything that is not a choice stay.
        experts: (T,) expert of every item.
        keep_mass: See `force_expert`.

    Returns:
        A record of the same kind: one-hot (T, E) weights where experts are mixed; (T, K) choices where they are chosen,
        the given expert first and K - 1 others with weight 0, because layers may rely on K. Where experts chose the
        items, they no longer do.
    """
    mass = routing.combine_matrix().sum(dim=1) if keep_mass else torch.ones_like(routing.weights[:, 0])
    one_hot = nn.functional.one_hot(experts, routing.num_experts).to(mass.dtype) * mass[:, None]
    if routing.indices is None:
        return routing._replace(gates=one_hot, weights=one_hot, noisy_logits=None, noise_std=None)
    others = torch.arange(routing.indices.shape[1], device=experts.device)
    indices = (experts[:, None] + others) % routing.num_experts  # (T, K)
    weights = torch.where(others == 0, mass[:, None], torch.zeros_like(mass[:, None]))
    return routing._replace(
        gates=one_hot, weights=weights, indices=indices, kept=None, by_expert=False,
        noisy_logits=None, noise_std=None)
