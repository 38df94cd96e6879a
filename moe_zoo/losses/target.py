"""Losses of a router that is trained on the labels, too: functions of a `Routing` and the target of the batch.

Letters: B images, n patches an image, E experts.
"""
import torch
from torch.nn import functional as F

from ..errors import InputError
from ..routing.types import Routing


def embedding_loss(routing: Routing, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the record's logits: an embedding network that predicts the class (DeepMoE, Wang et al. 2019).

    Args:
        routing: A record of (B, E) logits, one a class.
        target: (B,) class indices, or (B, E) soft targets.
    """
    return F.cross_entropy(routing.logits, target if target.is_floating_point() else target.long())


def linear_router_loss(routing: Routing, target: torch.Tensor) -> torch.Tensor:
    """-y (s_1 - s_0), s_e the sum of expert e's logits over the patches of an image, averaged over images.

    By it the routers of pMoE are trained alone (Chowdhury et al. 2023), before the experts: expert 1 learns to like the
    patches of class 1, y = +1, expert 0 those of class 0, y = -1. It is linear, so that only the length of training and
    the rate bound the routers.

    Args:
        routing: A record of (B n, 2) logits whose `shape` begins with B.
        target: (B,) or (B, 1) classes 0 and 1, as whole numbers or as probabilities of class 1; or (B, 2) soft targets.

    Raises:
        InputError: There are not two experts, or targets other than two classes.
    """
    if routing.num_experts != 2:
        raise InputError(f"The loss 'linear_router' is of 2 experts, one a class, not of {routing.num_experts}.")
    B = routing.shape[0]
    if target.numel() == 2 * B and target.dim() == 2:
        y = (target[:, 1] - target[:, 0]).float()
    else:
        y = 2 * target.reshape(-1).float() - 1
        if target.numel() != B or bool((y.abs() > 1).any()):
            raise InputError("The loss 'linear_router' is of 2 classes: use targets 0 and 1.")
    score = routing.logits.view(B, -1, 2).sum(dim=1)  # (B, 2)
    return -(y * (score[:, 1] - score[:, 0])).mean()
