"""Losses that pull the routes of corresponding patches of two views together: functions of a `Routing` and its pairs.

Kada, Yoshihashi, Kawakami, Ikehata, Sato: `jsd_loss` is that of their poster (MIRU 2023), `prc_loss` that of the
article (IEEE OJSP 6, 2025, doi 10.1109/OJSP.2025.3536853) as its code has it.

Probabilities are the float32 softmax over the experts of the logits without noise, whatever chooses: with experts that
choose tokens (Expert Choice) it is the softmax they rank tokens by, with Soft MoE the weight of each expert's slots
together; pMoE's experts have filters of their own, and theirs is a comparison of the answers. Both views get gradient.
The normaliser is the number of pairs in the batch that the record is of. Under DistributedDataParallel it is the batch
of a rank, and DDP averages over the ranks, as for all auxiliary losses; with accumulation it is the part at hand.

Letters: T routed items, P matched pairs, E experts.
"""
from typing import Callable, Dict, Tuple

import torch

from ..routing.types import Routing


def jsd_loss(routing: Routing, pairs: torch.Tensor, weight: float = 1.0, eps: float = 1e-7) -> torch.Tensor:
    """Jensen-Shannon divergence of the routes of a pair, mean over the matched pairs; natural logarithm, ln 2 at most.

    JSD(p, q) = 1/2 sum_e(p_e ln(p_e / m_e) + q_e ln(q_e / m_e)), m = (p + q) / 2. Two uniform routes have none: with a
    large weight the routers become flat, and which experts are chosen then depends on the view more, not less.

    Args:
        routing: Record of T items.
        pairs: (2, ...) int64 rows of it that correspond, see `moe_zoo.data.match_items`; -1 where there is none.
        weight: Of the loss; the poster states none.
        eps: Added inside the logarithms.

    Returns:
        A scalar; 0, with gradients of 0, where no pair is matched.
    """
    p, q, matched = _probabilities(routing, pairs)
    middle = ((p + q) / 2 + eps).log()
    divergence = (p * ((p + eps).log() - middle) + q * ((q + eps).log() - middle)).sum(dim=1) / 2
    return weight * (divergence * matched).sum() / matched.sum().clamp_min(1)


def prc_loss(
        routing: Routing,
        pairs: torch.Tensor,
        diagonal_weight: float = 5e-3,
        off_diagonal_weight: float = 5e-2,
) -> torch.Tensor:
    """Weighted sum of `prc_terms`. It balances the experts, too, so that losses which do are to be switched off.

    Args:
        routing, pairs: As in `jsd_loss`.
        diagonal_weight, off_diagonal_weight: Of the two terms; the defaults are the original's.

    Returns:
        A scalar; 0, with gradients of 0, where no pair is matched.
    """
    diagonal, off_diagonal = prc_terms(routing, pairs)
    return diagonal_weight * diagonal + off_diagonal_weight * off_diagonal


def prc_terms(routing: Routing, pairs: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """mean_i (M_ii - 1)^2 and mean_{i != j} M_ij^2 of M = E / P sum over the pairs of r1^T r2, an E x E matrix.

    Consistent routes to one expert each, the experts used alike, give M = I and 0 for both; uniform routes M = 1 / E
    everywhere; everything sent to one expert E - 1 for the first.
    """
    p, q, matched = _probabilities(routing, pairs)
    E = routing.num_experts
    total = matched.sum()
    with torch.autocast(device_type=p.device.type, enabled=False):  # which would round the products
        M = (p * matched.unsqueeze(1)).t() @ q * (E / total.clamp_min(1))
    own = torch.eye(E, device=M.device, dtype=torch.bool)
    diagonal = (M.diagonal() - 1).square().mean()
    off_diagonal = M.masked_fill(own, 0).square().sum() / max(E * (E - 1), 1)
    return diagonal * (total > 0), off_diagonal * (total > 0)


# Name to a function of a record, its pairs and the weights.
CONSISTENCY_LOSSES: Dict[str, Callable[..., torch.Tensor]] = {'jsd': jsd_loss, 'prc': prc_loss}


def _probabilities(routing: Routing, pairs: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(n, E) routes of the first and of the second items of n pairs, and (n,) float32, 1 where there is a pair."""
    gates = torch.softmax(routing.logits.float(), dim=-1)
    first, second = (gates.index_select(0, side.clamp_min(0)) for side in pairs.flatten(1))
    return first, second, (pairs >= 0).all(dim=0).flatten().float()
