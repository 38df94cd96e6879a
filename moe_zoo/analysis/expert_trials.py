"""Accuracy where routers are overruled: one expert forced, or another number of experts an item.

Letters: N images, E experts, K chosen experts.
"""
from functools import partial
from typing import Any, Callable, ContextManager, Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import nn

from ..layers import ChannelGate
from .expert_records import Batches
from .force import choosing_layers, force_expert, keep_largest, routed_layers, select_experts
from .usage import evaluation_mode

Pass = Callable[[str], Batches]  # title of a pass over the same images to its batches of (images, targets)

MOST_FORCED = 64  # experts of a layer
NUMBERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)  # K that are tried
CHANNELS = (.05, .1, .25, .5, .75, 1.)  # shares of channels


class Proportion(NamedTuple):
    """Percent right, its standard error, and the difference to the free router, paired image by image."""
    accuracy: float
    se: float
    difference: Optional[float] = None
    difference_se: Optional[float] = None


def proportion(right: torch.Tensor, free: Optional[torch.Tensor] = None) -> Proportion:
    """Percent of an (N,) bool tensor that is true, and against another one of the same images.

    The standard error of 0 or N right ones is that of one wrong or right: nobody is infallible on N images.
    """
    count = len(right)
    share = float(right.double().mean())
    bounded = min(max(share, 1 / count), 1 - 1 / count) if count > 1 else 0.5
    error = 100 * (bounded * (1 - bounded) / count) ** 0.5
    if free is None:
        return Proportion(100 * share, error)
    change = right.double() - free.double()
    return Proportion(
        100 * share, error, 100 * float(change.mean()), 100 * float(change.std(unbiased=False)) / count ** 0.5)


@torch.no_grad()
def predict_right(model: nn.Module, batches: Batches) -> torch.Tensor:
    """(N,) bool: which images a model gets right."""
    with evaluation_mode(model):
        return torch.cat([(model(images).argmax(dim=1) == targets).cpu() for images, targets in batches])


def forced_accuracies(model: nn.Module, run: Pass, free: torch.Tensor, layers: Sequence[str]) -> Dict[str, Any]:
    """Accuracy with every expert forced, in every layer at once and in each of some.

    Args:
        model: The classifier.
        run: Gives the batches of a pass.
        free: (N,) bool, what is right without force.
        layers: Names of the layers to force one by one.

    Returns:
        everywhere: A row for every expert that all layers have; layers: name to a row for every expert.
    """
    experts = {name: layer.num_experts for name, layer in routed_layers(model).items()}

    def rows(number: int, layer: Optional[str] = None) -> List[Dict[str, Any]]:
        found = []
        for expert in range(number):
            where = layer or 'every layer'
            with force_expert(model, expert, layer, keep_mass=True):
                right = predict_right(model, run(f'expert {expert} forced in {where}'))
            found.append({'expert': expert, **proportion(right, free)._asdict()})
        return found

    return {
        'everywhere': rows(common_experts(model)),
        'layers': {name: rows(experts[name], name) for name in layers},
    }


def common_experts(model: nn.Module) -> int:
    """Experts that all layers have and that can be forced in all of them; 0 where these are channels, or too many."""
    layers = routed_layers(model).values()
    fewest = min(layer.num_experts for layer in layers)
    return 0 if fewest > MOST_FORCED or any(isinstance(layer, ChannelGate) for layer in layers) else fewest


class Sweep(NamedTuple):
    """One number of experts to try: what to call it, whether the model was trained with it, and how to set it."""
    label: str
    native: bool
    around: Callable[[], ContextManager]


def sweeps(model: nn.Module, mixes: bool) -> List[Sweep]:
    """The numbers of experts to try: K of the layers that choose; where all are mixed, the K of largest weight, of
    channels a share of them.

    Args:
        model: The classifier.
        mixes: Whether its layers mix all experts, so that the rest can be cut off. With neither, there is nothing.
    """
    choosers = [modules[0] for modules in choosing_layers(model).values()]
    layers = choosers or list(routed_layers(model).values())
    if not (choosers or mixes):
        return []
    if any(isinstance(layer, ChannelGate) for layer in layers):
        return [Sweep(f'{100 * share:.0f} % of channels', share == 1, partial(keep_largest, model, share, False))
                for share in CHANNELS]
    most, native = max(layer.num_experts for layer in layers), {layer.num_selected for layer in layers}
    numbers = sorted({k for k in NUMBERS if k < most} | native | {most})
    change = select_experts if choosers else keep_largest
    return [Sweep(f'K = {k}', native == {k}, partial(change, model, k)) for k in numbers]


def swept_accuracies(model: nn.Module, run: Pass, free: torch.Tensor, mixes: bool) -> List[Dict[str, Any]]:
    """Accuracy for all of `sweeps`."""
    result = []
    for sweep in sweeps(model, mixes):
        with sweep.around():
            right = predict_right(model, run(f'{sweep.label} in every layer'))
        result.append({'k': sweep.label, 'native': sweep.native, **proportion(right, free)._asdict()})
    return result
