"""What a model costs: parameters, MACs, activations, memory, and what could not be counted.

One unit everywhere: one multiply-accumulate (MAC) is one; `cost_formulas` says which operators count. Three numbers for
a routed model: `macs_max`, what the architecture can cost (its router plus `num_selected` experts for every item, no
padding), `macs_executed`, what it did cost on these inputs, and `macs_expected`, what an executor without padding would
compute under a measured load. The last two are properties of weights and inputs: quote them for a set of images
(`count_images`), with their spread. An operator that is neither counted nor known to be free is listed by name.

Letters: B images, E experts, K chosen.
"""
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import InputError, nearest
from .cost_counter import ByOperator, Tally, forward_memory
from .cost_routed import (
    Calls,
    Loads,
    active_parameters,
    elements,
    expected_macs,
    parameters_by_expert,
    used_parameters,
)


@dataclass(frozen=True)
class Cost:
    """The cost of one forward pass in evaluation mode. MACs and activations are totals over the images of the input.

    Attributes:
        images: Images in the input.
        parameters: Elements of all parameters.
        active_parameters: The same, with K of E experts of every routed layer: what one routed item meets.
        used_parameters: What the images of the input met, all their items together: everything but the experts that
            nothing chose. None where the choice is not known (on meta tensors).
        parameters_by_module: Module name to its parameters, children included.
        parameters_by_expert: Name of a routed layer to the parameters of each of its experts.
        macs_max: Router plus K experts for every item, no padding. Equal to `macs_executed` without routed layers.
        macs_executed: What ran. A path that pads, or computes every expert, costs what it computed.
        macs_expected: Router plus the experts that a load asks for, no padding: of the load that was given, or else of
            the one that these inputs caused. None where neither is known (on meta tensors).
        by_module: Module name to executed MACs, children included; '' is the whole model.
        by_module_max: The same at most; the inside of a routed layer is left out, as only the layer knows its bound.
        by_operator: Operator name to executed MACs.
        activations: Elements that the counted operators put out, which are matrix products and convolutions.
        activations_by_module: As `by_module`.
        activations_by_operator: As `by_operator`.
        peak_memory: Bytes of all tensors that were alive at one time, at most: parameters, buffers, input, and what the
            pass made on its way, on the path that the model takes by itself (fused attention, if it has it). Without
            what kernels allocate for themselves. An estimate on meta tensors, where routed layers pad.
        uncounted: Operators that ran, are not counted and not known to be free, to the modules that called them.
    """
    images: int
    parameters: int
    active_parameters: int
    used_parameters: int | None
    parameters_by_module: dict[str, int]
    parameters_by_expert: dict[str, tuple[int, ...]]
    macs_max: int
    macs_executed: int
    macs_expected: float | None
    by_module: dict[str, int]
    by_module_max: dict[str, int]
    by_operator: dict[str, int]
    activations: int
    activations_by_module: dict[str, int]
    activations_by_operator: dict[str, int]
    peak_memory: int
    uncounted: dict[str, tuple[str, ...]]


class CountError(InputError):
    """A model could not be run on its input. `cost` is what was counted until then."""

    def __init__(self, message: str, cost: Cost):
        super().__init__(message)
        self.cost = cost


class Spread(NamedTuple):
    """A figure over a set of images; `std` is the sample standard deviation, 0 for a single image."""
    mean: float
    std: float
    least: float
    most: float


@dataclass(frozen=True)
class ImageCosts:
    """What every image of a set costs, one at a time. `spread` sums a figure up.

    Attributes:
        executed: MACs that ran, by image.
        at_most: Router plus K experts for every item, by image; constant unless the images differ in size.
        expected: Router plus the experts that the image chose, no padding; their mean is what is expected under the
            load that the set causes.
        used_parameters: Everything but the experts that nothing in the image chose.
        activations: Elements that matrix products and convolutions put out.
        peak_memory: Bytes, as in `Cost`.
        by_module: Mean of executed MACs by module name.
        by_module_max: Mean of MACs at most, as in `Cost`.
        by_operator: Mean of executed MACs by operator name.
        uncounted: As in `Cost`, over all images.
    """
    executed: tuple[int, ...]
    at_most: tuple[int, ...]
    expected: tuple[float, ...]
    used_parameters: tuple[int, ...]
    activations: tuple[int, ...]
    peak_memory: tuple[int, ...]
    by_module: dict[str, float]
    by_module_max: dict[str, float]
    by_operator: dict[str, float]
    uncounted: dict[str, tuple[str, ...]]

    def spread(self, figure: str = 'executed') -> Spread:
        """Mean, deviation and extremes of one of the figures by image."""
        values = getattr(self, figure)
        std = statistics.stdev(values) if len(values) > 1 else 0.
        return Spread(statistics.fmean(values), std, min(values), max(values))

    @property
    def mean(self) -> float:
        return self.spread().mean

    @property
    def std(self) -> float:
        """Sample standard deviation over the images, 0 for a single one."""
        return self.spread().std


def count(model: nn.Module, inputs: Any, load: Loads | None = None) -> Cost:
    """Count one forward pass of any module in evaluation mode; the model is left as it was.

    Runs on meta tensors too, where a model of any size costs no memory. Routed layers then take their padded path, so
    that `macs_executed` describes that path; `macs_max` does not depend on it.

    A model with fused attention runs twice: once with attention as its matrix products, which can be counted, once as
    it is, to measure memory.

    An operator that torch does not know gets a formula by `torch.utils.flop_counter.register_flop_formula` (in FLOPs,
    two a MAC), and is then counted here.

    Args:
        model: A timm model, a detector, any module.
        inputs: Its argument; a tuple holds several, a dictionary holds keywords. A detector's list of dictionaries is
            one argument.
        load: Layer name to (E,) times that an item used each expert, on average: `LayerUsage.load` of a data set that
            `measure_usage` has seen. `macs_expected` is of these inputs otherwise.

    Raises:
        CountError: The model cannot be run on this input; it holds what was counted until then.
        InputError: `load` does not fit the model.
    """
    if load is not None:
        _check_load(model, load)
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (_as_tuple(inputs), {})

    def run() -> None:
        model(*args, **kwargs)

    tally = Tally(model)
    try:
        with tally.counting(inputs):
            run()
        if tally.replaced_attention:
            tally.peak = forward_memory(model, run, inputs)
    except Exception as error:  # of whatever kind: any model may be counted
        cost = _cost(tally, inputs, load)
        raise CountError(_failure(tally, inputs, error, cost), cost) from error
    cost = _cost(tally, inputs, load)
    if load is not None and cost.macs_expected is None:
        raise InputError(f'load: it lacks a routed layer that ran; it names {", ".join(load) or "none"}.')
    return cost


def count_images(model: nn.Module, inputs: Iterable[Any]) -> ImageCosts:
    """Count what each image of a set costs.

    Args:
        model: As in `count`; not on the meta device, where nothing is chosen.
        inputs: The model's input for one image at a time: (1, C, H, W), or a list of one dictionary for a detector.

    Raises:
        CountError: The model cannot be run on one of the images.
    """
    costs = [count(model, each) for each in inputs]
    uncounted: dict[str, set[str]] = defaultdict(set)
    for cost in costs:
        for op, where in cost.uncounted.items():
            uncounted[op].update(where)
    return ImageCosts(
        executed=tuple(cost.macs_executed for cost in costs),
        at_most=tuple(cost.macs_max for cost in costs),
        expected=tuple(cost.macs_expected for cost in costs),
        used_parameters=tuple(cost.used_parameters for cost in costs),
        activations=tuple(cost.activations for cost in costs),
        peak_memory=tuple(cost.peak_memory for cost in costs),
        by_module=_mean(cost.by_module for cost in costs),
        by_module_max=_mean(cost.by_module_max for cost in costs),
        by_operator=_mean(cost.by_operator for cost in costs),
        uncounted={op: tuple(sorted(where)) for op, where in uncounted.items()},
    )


def _cost(tally: Tally, inputs: Any, load: Loads | None) -> Cost:
    model, calls = tally.model, tally.calls
    macs, activations = tally.macs(), tally.activations()
    executed = _by_module(model, macs)
    at_most = _at_most(executed, calls, model)
    outputs = _by_module(model, activations)
    return Cost(
        images=_num_images(inputs),
        parameters=elements(model),
        active_parameters=active_parameters(model),
        used_parameters=used_parameters(model, calls, tally.trace),
        parameters_by_module={name: size for name, module in model.named_modules() if (size := elements(module))},
        parameters_by_expert=parameters_by_expert(model),
        macs_max=at_most[''],
        macs_executed=executed[''],
        macs_expected=expected_macs(model, at_most[''], calls, tally.trace, load),
        by_module=executed,
        by_module_max=at_most,
        by_operator=macs[''],
        activations=outputs[''],
        activations_by_module=outputs,
        activations_by_operator=activations[''],
        peak_memory=tally.peak,
        uncounted=tally.uncounted(),
    )


def _by_module(model: nn.Module, rows: ByOperator) -> dict[str, int]:
    """Sums by module, in the order of the model; containers that are never called get their children's sum."""
    total = {name: sum(ops.values()) for name, ops in rows.items()}
    modules = dict(model.named_modules())
    for name, module in reversed(modules.items()):  # children come before their parents
        if name not in total:
            inside = [total[f'{name}.{child}'] for child, _ in module.named_children() if f'{name}.{child}' in total]
            if inside:
                total[name] = sum(inside)
    order = {name: i for i, name in enumerate(modules)}
    return {name: total[name] for name in sorted(total, key=lambda name: order.get(name, len(order)))}


def _at_most(executed: dict[str, int], calls: Calls, model: nn.Module) -> dict[str, int]:
    """Put the bound of every routed layer in the place of what it executed, up to the whole model."""
    inside = tuple(f'{layer}.' for layer in calls if layer)
    bound = {name: macs for name, macs in executed.items() if not name.startswith(inside)}
    if '' in calls:  # the model is a routed layer itself
        bound = {'': executed['']}
    for name, of_layer in calls.items():
        layer = model.get_submodule(name)
        more = sum(layer.max_macs(shape) - ran for shape, ran in of_layer)
        parts = name.split('.') if name else []
        for depth in range(len(parts) + 1):
            outer = '.'.join(parts[:depth])
            bound[outer] = bound.get(outer, 0) + more
    return bound


def _mean(rows: Iterable[dict[str, int]]) -> dict[str, float]:
    """Mean by name; a module that an image did not reach costs it 0."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: statistics.fmean(row.get(name, 0) for row in rows) for name in names}


def _as_tuple(inputs: Any) -> tuple:
    return inputs if isinstance(inputs, tuple) else (inputs,)


def _num_images(inputs: Any) -> int:
    """Images of an input: the length of a detector's list, or the first axis of the first tensor."""
    first = _as_tuple(inputs)[:1]
    if first and isinstance(first[0], list):
        return len(first[0])
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    return tensors[0].shape[0] if tensors and tensors[0].dim() else 1


def _check_load(model: nn.Module, load: Loads) -> None:
    names = dict(model.named_modules())
    for name in load:
        if name not in names:
            raise InputError(f'load: the model has no layer {name!r}.{nearest(name, names)}')


def _failure(tally: Tally, inputs: Any, error: Exception, cost: Cost) -> str:
    """One sentence: what cannot be run on what, why, where, and what had been counted."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    shape = tuple(tensors[0].shape) if tensors else type(inputs).__name__
    meta = ', meta tensors,' if tensors and tensors[0].is_meta else ''
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip('.')
    where = f"module '{tally.innermost}'" if tally.innermost else 'the model itself'
    return (
        f'{tally.root} cannot be run on {shape}{meta} and counted no further than {cost.macs_executed:,} MACs, '
        f'in {where}: {reason}.')
