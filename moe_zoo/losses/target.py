"""Losses of a router that is trained on the labels, too: functions of a `Routing` and the target of the batch.

Letters: B images, E experts.
"""
import torch
from torch.nn import functional as F

from ..routing.types import Routing


def embedding_loss(routing: Routing, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the record's logits: an embedding network that predicts the class (DeepMoE, Wang et al. 2019).

    Args:
        routing: A record of (B, E) logits, one a class.
        target: (B,) class indices, or (B, E) soft targets.
    """
    return F.cross_entropy(routing.logits, target if target.is_floating_point() else target.long())
