"""Auxiliary losses: pure functions of `Routing` records, and the one place that weighs and sums them."""
from typing import Callable, Dict, Optional, Sequence

import torch

from ..errors import InputError, nearest
from ..routing.exchange import gather_routing
from ..routing.types import Routing
from .affinity import affinity_loss, gate_entropy_loss
from .balance import (
    gshard_loss,
    importance_loss,
    importance_loss_unbiased,
    kl_loss,
    load_loss,
    squared_cv,
    vmoe_load_loss,
    z_loss,
)
from .consistency import CONSISTENCY_LOSSES, jsd_loss, prc_loss, prc_terms
from .local import class_mixture_loss, competitive_loss, cooperative_loss, mixture_loss, responsibilities
from .sparsity import gate_l1_loss
from .target import embedding_loss, linear_router_loss

__all__ = [
    'BALANCE_LOSSES',
    'CONSISTENCY_LOSSES',
    'LOSSES',
    'TARGET_LOSSES',
    'affinity_loss',
    'auxiliary_losses',
    'balance',
    'class_mixture_loss',
    'competitive_loss',
    'cooperative_loss',
    'embedding_loss',
    'gate_entropy_loss',
    'gate_l1_loss',
    'gshard_loss',
    'importance_loss',
    'importance_loss_unbiased',
    'jsd_loss',
    'kl_loss',
    'linear_router_loss',
    'load_loss',
    'mixture_loss',
    'prc_loss',
    'prc_terms',
    'responsibilities',
    'squared_cv',
    'vmoe_load_loss',
    'z_loss',
]

LOSSES: Dict[str, Callable[[Routing], torch.Tensor]] = {
    'importance': importance_loss,
    'importance_unbiased': importance_loss_unbiased,
    'load': load_loss,
    'vmoe_load': vmoe_load_loss,
    'gshard': gshard_loss,
    'switch': gshard_loss,
    'z': z_loss,
    'kl': kl_loss,
    'gate_l1': gate_l1_loss,
    'affinity': affinity_loss,
    'gate_entropy': gate_entropy_loss,
}

# Those that even out the use of the experts; 'z' and 'gate_l1' do other things.
BALANCE_LOSSES = ('importance', 'importance_unbiased', 'load', 'vmoe_load', 'gshard', 'switch', 'kl')

# Losses that also want the labels of the batch.
TARGET_LOSSES: Dict[str, Callable[[Routing, torch.Tensor], torch.Tensor]] = {
    'embedding': embedding_loss,
    'linear_router': linear_router_loss,
}


def auxiliary_losses(
        routings: Sequence[Routing],
        target: Optional[torch.Tensor] = None,
        over_ranks: bool = False,
) -> Dict[str, torch.Tensor]:
    """The weighted auxiliary losses that the records ask for, summed over layers, by name.

    Args:
        routings: Records of one forward, each with its (name, weight) pairs in `losses`.
        target: (B,) classes or (B, classes) soft targets of the images, for records that ask for one of
            `TARGET_LOSSES`.
        over_ranks: Take the statistics over the batches of all ranks of a distributed run, one after another, as one
            process with the whole batch would, instead of over that of this rank; see `gather_routing`. Losses that
            want the target are means over images, and stay those of the rank.

    Returns:
        Name to a differentiable scalar; empty where no layer asks for one. Their sum is added to the task loss.

    Raises:
        InputError: A record names an unknown loss, or one that needs the target, which was not given.
    """
    totals: Dict[str, torch.Tensor] = {}
    for routing in routings:
        whole = gather_routing(routing) if over_ranks and routing.losses else routing
        for name, weight in routing.losses:
            value = weight * _loss(name, whole if name in LOSSES else routing, target)
            totals[name] = totals[name] + value if name in totals else value
    return totals


def _loss(name: str, routing: Routing, target: Optional[torch.Tensor]) -> torch.Tensor:
    if name in LOSSES:
        return LOSSES[name](routing)
    if name not in TARGET_LOSSES:
        known = [*LOSSES, *TARGET_LOSSES]
        raise InputError(f'Unknown auxiliary loss {name!r}.{nearest(name, known)} Known: {", ".join(known)}.')
    if target is None:
        raise InputError(f'The auxiliary loss {name!r} needs labels: call auxiliary_losses(routings, target).')
    return TARGET_LOSSES[name](routing, target)


@torch.no_grad()
def balance(routing: Routing) -> Dict[str, torch.Tensor]:
    """How evenly one layer used its experts; for logs, not for gradients.

    Returns:
        share: (E,) share of the kept choices (of the gate mass, where every expert is mixed), summing to one.
        cv: Coefficient of variation of the shares; 0 is perfect balance.
        entropy: Entropy of the shares divided by ln E; 1 is perfect balance (1 where E = 1).
        dropped: Share of the choices that found no slot (of the items that no expert took, where experts choose).
        live: Share of all pairs of item and expert that are in use; for gates that may be zero.
    """
    routing = routing.without_padding()
    experts = routing.num_experts
    if routing.indices is None:
        mass = routing.weights.float().sum(dim=0)
        used = (routing.weights != 0).sum()
    else:
        chosen = torch.nn.functional.one_hot(routing.indices, experts).float()  # (T, K, E)
        if routing.kept is not None:
            chosen = chosen * routing.kept.unsqueeze(-1)
        mass = chosen.sum(dim=(0, 1))
        used = mass.sum()
    share = mass / mass.sum().clamp_min(1e-12)
    entropy = -(share * share.clamp_min(1e-12).log()).sum()
    full = torch.log(torch.tensor(float(experts)))
    return {
        'share': share,
        'cv': squared_cv(share).sqrt(),
        'entropy': entropy / full if experts > 1 else torch.ones_like(entropy),
        'dropped': routing.dropped(),
        'live': used / max(1, routing.logits.numel()),
    }
