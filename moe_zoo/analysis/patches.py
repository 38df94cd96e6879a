"""Discriminative routing: do experts keep the patch that has the label, and drop the others?

The measure of pMoE (Chowdhury et al., ICML 2023, https://arxiv.org/abs/2306.04073), from the records of layers whose
experts choose patches.

Letters: B images, n patches an image, l of them an expert, E experts, Y classes.
"""
from typing import NamedTuple, Optional

import torch

from ..errors import InputError
from ..routing import Routing


class PatchPrecision(NamedTuple):
    """Shares over a set of images; an expert that chooses blindly has l / n and 1 - l / n.

    Attributes:
        kept: Of the images, those whose label patch the expert took.
        dropped: Of the other patches, those that it did not take.
    """
    kept: float
    dropped: float


def label_patch_kept(routing: Routing, position: torch.Tensor) -> torch.Tensor:
    """(B, E) bool: whether an expert took the patch of each image that has the label.

    Args:
        routing: A record of B n patches, `shape` beginning with B.
        position: (B,) patch with the label, row by row from 0.
    """
    taken = _taken(routing)
    if position.shape != taken.shape[:1] or bool(((position < 0) | (position >= taken.shape[1])).any()):
        raise InputError(
            f'position: give one patch from 0 to {taken.shape[1] - 1} for each of the {taken.shape[0]} images.')
    return taken[torch.arange(len(position)), position.cpu()]


def right_experts(routing: Routing, position: torch.Tensor, target: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(Y,) the expert of each class: the one that takes its label patch most often, the first of several.

    Where experts are not tied to classes by construction (joint training), choose them on validation images.

    Args:
        routing, position: As in `label_patch_kept`.
        target: (B,) classes.
        num_classes: Y; a class without images gets expert 0.
    """
    kept = label_patch_kept(routing, position).double()
    votes = torch.zeros(num_classes, kept.shape[1], dtype=kept.dtype).index_add(0, target.cpu(), kept)
    return votes.argmax(dim=1)


def patch_precision(routing: Routing, position: torch.Tensor, expert: Optional[torch.Tensor] = None) -> PatchPrecision:
    """How well experts tell the label patch from the others.

    Args:
        routing, position: As in `label_patch_kept`.
        expert: (B,) the right expert of each image; None averages over all experts.
    """
    taken, kept = _taken(routing), label_patch_kept(routing, position)
    others = taken.shape[1] - 1
    dropped = others - (taken.sum(dim=1) - kept.long())  # (B, E) patches without label that were not taken
    if expert is not None:
        row = torch.arange(len(kept))
        kept, dropped = kept[row, expert.cpu()], dropped[row, expert.cpu()]
    return PatchPrecision(kept.double().mean().item(), (dropped.double().mean() / max(others, 1)).item())


def _taken(routing: Routing) -> torch.Tensor:
    """(B, n, E) bool."""
    if not routing.by_expert or routing.kept is None or len(routing.shape) < 2:
        raise InputError('routing: this measure is of layers whose experts choose patches, such as pMoE.')
    return routing.kept.cpu().reshape(routing.shape[0], -1, routing.num_experts)
