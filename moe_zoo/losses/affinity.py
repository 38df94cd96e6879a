"""Losses of gates that mix representations: no weight for related ones together, no weight for one alone.

Situational Fusion of Visual Representation for Visual Navigation, Shen et al., ICCV 2019, arXiv 1908.09073. The paper
regularises by the affinity between tasks; its formula was not at hand, and both formulas here are this project's.

Letters: B images, K representations (the experts).
"""
import math

import torch

from ..errors import InputError
from ..routing.types import Routing


def affinity_loss(routing: Routing) -> torch.Tensor:
    """w^T A w over pairs of different representations, averaged over the images.

    High where two representations that tell much the same (A_ij near 1) get weight together, so that unrelated ones may
    share weight for less. It spreads nothing by itself: weights on ONE expert cost 0 whatever A is, and where A is the
    same for all pairs they are the only ones that do. With ones off the diagonal the loss is 1 - sum w_i^2: for even
    weights 1 - 1/K, which is 0.96 at K = 25. What spreads the weights is the task, or `gate_entropy_loss` beside this
    one; the differences in A then decide over whom.

    Args:
        routing: A record with `affinity` (K, K); its diagonal does not count.

    Raises:
        InputError: The record has no affinity.
    """
    if routing.affinity is None:
        raise InputError("The loss 'affinity' needs a record with an affinity of experts, as SituationalFusion's.")
    affinity = routing.affinity * (1 - torch.eye(routing.num_experts, device=routing.affinity.device))
    return ((routing.gates @ affinity) * routing.gates).sum() / max(1, routing.gates.shape[0])


def gate_entropy_loss(routing: Routing) -> torch.Tensor:
    """ln K less the entropy of the gates of an image, averaged over images: 0 for even gates, ln K for a single one.

    Unlike 'kl', which wants the mean gate of a batch even, it wants those of every image so.
    """
    gates = routing.gates
    lack = math.log(routing.num_experts) + torch.xlogy(gates, gates.clamp_min(1e-20)).sum(dim=1)
    return lack.sum() / max(1, gates.shape[0])
