"""Training on two views of every image whose corresponding patches shall take the same routes: `route_consistency=`.

The losses are in `moe_zoo.losses.consistency`, the views and their patches in `moe_zoo.data`. Every routed layer with
patches adds a term of its own, as in PRC's code; each uses the matches of its own grid, so that maps after strides have
fewer. Layers that decide once an image have nothing to compare and are left as they are.

Letters: B images, each in two views; C channels, H x W pixels.
"""
import argparse
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn

from ..analysis.consistency import find_grid
from ..analysis.usage import evaluation_mode
from ..data import TwoViewTransform, ViewTargets, check_areas, match_items
from ..errors import InputError, nearest
from ..losses import BALANCE_LOSSES, CONSISTENCY_LOSSES
from ..routing import Routing, trace_routing
from .task import MoEClassificationTask

# The poster states no weight. Uniform routes agree, too, so that a large one flattens the routes, and the few chosen
# experts of a patch then change more often, not less: this is about that of V-MoE's balance losses.
WEIGHTS: Dict[str, Tuple[float, ...]] = {'jsd': (0.01,), 'prc': (5e-3, 5e-2)}


class RouteConsistencyTask(MoEClassificationTask):
    """Classification loss on both views, auxiliary losses, and a consistency loss over all routed layers with patches.

    `loss='prc'` balances the experts by itself: the losses that do (`moe_zoo.losses.BALANCE_LOSSES`) are switched off;
    a selection bias or another constraint inside a router stays. Training both views doubles the compute of an image.

    Args:
        model: A model with token or map routing.
        loss: A key of `moe_zoo.losses.CONSISTENCY_LOSSES`: 'jsd' (poster, 2023) or 'prc' (article, 2025).
        weights: Its weights: one for 'jsd', those of the diagonal and of the other terms for 'prc'; None for
            `WEIGHTS`. `loss='jsd', weights=(0,)` is the control: two views, and nothing that compares them.
        match_prefix: Whether the class token of one view corresponds to that of the other; see
            `moe_zoo.data.match_patches`.
        args, kwargs: As `MoEClassificationTask`.

    Raises:
        InputError: An unknown loss, or another number of weights.
    """

    def __init__(
            self,
            model: nn.Module,
            *args,
            loss: str = 'jsd',
            weights: Optional[Sequence[float]] = None,
            match_prefix: bool = True,
            **kwargs,
    ):
        check_weights(loss, weights)
        super().__init__(model, *args, **kwargs)
        self.loss = loss
        self.weights = tuple(weights or WEIGHTS[loss])
        self.match_prefix = match_prefix

    def forward(self, input: torch.Tensor, target: ViewTargets) -> Dict[str, Any]:
        """One forward through the model and all losses.

        Args:
            input: (2B, C, H, W), view 1 of all images, then view 2.
            target: What belongs to them, see `moe_zoo.data.pair_up`.

        Returns:
            As `MoEClassificationTask`, with `loss_jsd` or `loss_prc`.
        """
        output, routings = self.run(input)
        if not self.training:
            return self.add_up(output, target.targets, routings, {})
        value = route_consistency(routings, target, input.shape[-2:], self.loss, self.weights, self.match_prefix)
        if self.loss == 'prc':
            routings = [without_balance(routing) for routing in routings]
        auxiliary = self.auxiliary_losses(routings, target.targets)
        return self.add_up(output, target.targets, routings, {**auxiliary, self.loss: value})


def check_weights(loss: str, weights: Optional[Sequence[float]]) -> None:
    """Raises: InputError: The consistency loss is unknown, or has another number of weights."""
    if loss not in WEIGHTS:
        raise InputError(f'route_consistency={loss!r}: use jsd or prc.{nearest(str(loss), WEIGHTS)}')
    if weights and (len(weights) != len(WEIGHTS[loss]) or min(weights) < 0):
        wanted = 'one number' if loss == 'jsd' else 'two numbers, of the diagonal and of the other terms,'
        raise InputError(f'route_consistency_weight={list(weights)} with route_consistency={loss}: give {wanted} >= 0.')


def route_consistency(
        routings: Sequence[Routing],
        target: ViewTargets,
        image_size: Tuple[int, int],
        loss: str = 'jsd',
        weights: Optional[Sequence[float]] = None,
        match_prefix: bool = True,
) -> torch.Tensor:
    """The consistency loss, summed over the records that have patches.

    Args:
        routings: Records of one forward of the 2B views.
        target: Their geometry.
        image_size: Height and width of the views.
        loss: A key of `CONSISTENCY_LOSSES`.
        weights: Of that loss; None for `WEIGHTS`.
        match_prefix: See `moe_zoo.data.match_patches`.

    Raises:
        InputError: No record has patches, or its tokens fill no grid.
    """
    pairs: Dict[Tuple[int, ...], torch.Tensor] = {}  # layers of one shape share them
    terms: List[torch.Tensor] = []
    for routing in routings:
        if not has_patches(routing):
            continue
        if routing.shape not in pairs:
            grid = find_grid(routing.shape, image_size)
            pairs[routing.shape] = match_items(target.maps, target.areas, image_size, grid, match_prefix)
        terms.append(CONSISTENCY_LOSSES[loss](routing, pairs[routing.shape], *(weights or WEIGHTS[loss])))
    if not terms:
        raise InputError(f'route_consistency={loss}: no routed layer with patches was active in this forward.')
    return sum(terms)


def has_patches(routing: Routing) -> bool:
    """Whether tokens or positions of a map were routed, not whole images."""
    return len(routing.shape) > 1


def without_balance(routing: Routing) -> Routing:
    """The same record, asking for no loss that balances the experts."""
    return routing._replace(losses=tuple(pair for pair in routing.losses if pair[0] not in BALANCE_LOSSES))


@torch.no_grad()
def check_routes(model: nn.Module, name: str, images: torch.Tensor) -> None:
    """Raises: InputError: The model routes whole images only, or nothing at all, or its tokens fill no grid.

    Args:
        model: The model, run once in evaluation mode.
        name: For the message.
        images: (B, C, H, W) any images.
    """
    with evaluation_mode(model), trace_routing(model) as trace:
        model(images)
    records = [routing for each in trace.values() for routing in each]
    for routing in filter(has_patches, records):
        find_grid(routing.shape, images.shape[-2:])
    if not any(map(has_patches, records)):
        reason = 'decides once an image' if records else 'routes nothing'
        raise InputError(
            f'route_consistency compares the routes of patches, but {name!r} {reason}: leave the option out, or train a'
            ' model that routes tokens or positions, such as vmoe_vit_s.')


# Options that cannot be had together with two views, and why.
EXCLUDED = {
    'mixup': 'mixed images have no patches that correspond', 'cutmix': 'mixed images have no patches that correspond',
    'cutmix_minmax': 'mixed images have no patches that correspond', 'aug_splits': 'two views take the place of splits',
    'no_aug': 'two equal views teach nothing', 'train_crop_mode': 'its views are random resized crops',
}


def check_options(args: argparse.Namespace) -> None:
    """Raises: InputError: Options that exclude `route_consistency`, or weights or areas that it does not take."""
    check_weights(args.route_consistency, args.route_consistency_weight)
    check_areas((args.view_areas[:2], args.view_areas[2:]), 'view_areas')
    chosen = f'with route_consistency={args.route_consistency}'
    for option, reason in EXCLUDED.items():
        value = getattr(args, option)
        if value and value != 'rrc':
            raise InputError(f'{option}={value} {chosen}: {reason}; leave one of them out.')
    if str(args.aa or '').startswith('augmix'):
        raise InputError(f'aa={args.aa} {chosen}: where pixels go cannot be followed; use rand-... or leave aa out.')


def two_view_transform(
        args: argparse.Namespace,
        size: Tuple[int, int],
        interpolation: str,
        augment: Callable,
        finish: Callable,
) -> TwoViewTransform:
    """The transform of a recipe: `view_areas` in the place of `scale`, everything else as timm made it.

    Args:
        args: Options.
        size: Height and width.
        interpolation: As timm's transforms take it.
        augment: timm's operations after crop and flip (RandAugment, colours, blur).
        finish: timm's last part, image to tensor.
    """
    areas = (args.view_areas[:2], args.view_areas[2:])
    return TwoViewTransform(size, areas, args.ratio, args.hflip, args.vflip, interpolation, augment, finish)
