"""Losses that switch experts off.

Letters: B images, E experts.
"""
import torch

from ..routing.types import Routing


def gate_l1_loss(routing: Routing) -> torch.Tensor:
    """L1 norm of the gates of an image, sum over the E gates, mean over the images (DeepMoE, Wang et al. 2019).

    Summed over the layers by `auxiliary_losses`, it does not depend on the batch size. An empty batch costs nothing.
    """
    return routing.gates.abs().sum() / max(1, routing.gates.shape[0])
