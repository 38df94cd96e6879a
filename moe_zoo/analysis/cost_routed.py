"""What only routed layers and their records can tell of a cost: experts, bounds, and what a measured load executes.

A layer knows what it may cost and how much of that a load spares (`RoutedLayer.max_macs`, `spared_macs`). A routed
layer inside another is the affair of the outer one.

Letters: T routed items, E experts, K chosen.
"""
from collections.abc import Mapping, Sequence

from torch import nn

from ..errors import InputError
from ..layers.routed import RoutedLayer
from ..routing import Routing
from .usage import uses

Loads = Mapping[str, Sequence[float]]
Calls = Mapping[str, Sequence[tuple[tuple[int, ...], int]]]  # shape of the input, MACs executed
Trace = Mapping[str, Sequence[Routing]]


def elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def outermost(model: nn.Module) -> dict[str, RoutedLayer]:
    """The outermost routed layers by name."""
    layers: dict[str, RoutedLayer] = {}
    for name, module in model.named_modules():  # parents come first
        inside = any(name.startswith(f'{outer}.') or outer == '' for outer in layers)
        if isinstance(module, RoutedLayer) and not inside:
            layers[name] = module
    return layers


def active_parameters(model: nn.Module) -> int:
    """Parameters that one routed item meets: all of them, but only K of the E experts of each routed layer."""
    idle = sum(elements(layer) - layer.active_parameters() for layer in outermost(model).values())
    return elements(model) - idle


def parameters_by_expert(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name of an outermost routed layer to the parameters of its experts; layers whose experts have none are absent."""
    sizes = {name: tuple(layer.expert_sizes()) for name, layer in outermost(model).items()}
    return {name: each for name, each in sizes.items() if any(each)}


def load_of(records: Sequence[Routing]) -> list[float] | None:
    """(E,) how many times an item used each expert, on average: kept choices, or weights that are not zero.

    Returns:
        None for records without data, which are those of meta tensors.
    """
    used, items = 0., 0
    for record in records:
        if record.logits.is_meta:
            return None
        used = used + uses(record).double().sum(dim=0).cpu()
        items += len(record.logits)
    return (used / max(items, 1)).tolist()


def load_of_layer(name: str, layer: RoutedLayer, loads: Loads) -> list[float] | None:
    """(E,) load of a layer, by its own record or else by those of the routers inside it (the gates of a block), in
    their order. None where nothing tells it.

    Raises:
        InputError: A load of another number of experts.
    """
    prefix = f'{name}.' if name else ''
    inner = [prefix + each for each, _ in layer.named_modules()]
    names = [name] if name in loads else [each for each in inner if each in loads]
    load = [float(share) for each in names for share in loads[each]]
    if not load:
        return None
    if len(load) != layer.num_experts:
        if name not in loads:  # routers of layers inside, not of this one
            return None
        raise InputError(f"load['{name}'] is of {len(load)} experts: the layer has {layer.num_experts}.")
    return load


def chooses(layer: RoutedLayer) -> bool:
    """Does what a layer computes depend on what its router decides?"""
    return type(layer).spared_macs is not RoutedLayer.spared_macs


def measured(name: str, trace: Trace, call: int | None = None, calls: int = 1) -> Loads:
    """The loads that a layer and the routers inside it recorded, in one of its calls or in all."""
    loads = {}
    for each, records in trace.items():
        if each == name or name == '' or each.startswith(f'{name}.'):
            one = call is not None and len(records) == calls
            load = load_of(records[call:call + 1] if one else records)
            if load is not None:
                loads[each] = load
    return loads


def expected_macs(model: nn.Module, at_most: int, calls: Calls, trace: Trace, load: Loads | None) -> float | None:
    """`at_most`, less what a load spares in all calls of routed layers; None where the load of one is not known.

    Args:
        model: Whose cost this is.
        at_most: Its MACs with K experts for every item.
        calls: Of the outermost routed layers.
        trace: Records of these calls, which tell the load where `load` is None.
        load: A load that was measured elsewhere.
    """
    layers = outermost(model)
    spared = 0.
    for name, of_layer in calls.items():
        layer = layers[name]
        for i, (shape, _) in enumerate(of_layer if chooses(layer) else ()):
            loads = measured(name, trace, i, len(of_layer)) if load is None else load
            shares = load_of_layer(name, layer, loads)
            if shares is None:
                return None
            spared += layer.spared_macs(shape, shares)
    return at_most - spared


def used_parameters(model: nn.Module, calls: Calls, trace: Trace) -> int | None:
    """All parameters but those of experts that nothing used; None where the load of a layer is not known."""
    layers = outermost(model)
    idle = 0
    for name in calls:
        layer = layers[name]
        if chooses(layer):
            load = load_of_layer(name, layer, measured(name, trace))
            if load is None:
                return None
            idle += sum(size for size, times in zip(layer.expert_sizes(), load) if times == 0)
    return elements(model) - idle
