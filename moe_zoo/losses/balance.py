"""Losses that balance the use of experts: pure functions of a `Routing`, one scalar each, weight not applied.

Letters: T routed items, E experts, K chosen experts, G groups.

Coefficients of variation are computed as variance / mean^2, never through a standard deviation, whose gradient is not
finite at perfect balance. Losses are taken per group and averaged over groups in proportion to their items, which is
the plain mean of V-MoE where groups are equal.
"""
import math
from typing import Callable, Iterator, Optional, Tuple

import torch
from torch.nn import functional as F

from ..routing.types import Routing


def squared_cv(values: torch.Tensor, unbiased: bool = False, eps: float = 1e-10) -> torch.Tensor:
    """Squared coefficient of variation over the last axis: var / (mean^2 + eps).

    >>> squared_cv(torch.tensor([1., 3.]))  # mean 2, population variance 1
    tensor(0.2500)

    Args:
        values: (..., E).
        unbiased: Divide the variance by E - 1 instead of E. With one expert the result is 0 either way.
    """
    if values.shape[-1] == 1:
        return torch.zeros_like(values[..., 0])
    mean = values.mean(dim=-1)
    variance = (values - mean.unsqueeze(-1)).square().mean(dim=-1)
    if unbiased:
        variance = variance * (values.shape[-1] / (values.shape[-1] - 1))
    return variance / (mean.square() + eps)


def _groups(routing: Routing, *fields: Optional[torch.Tensor]) -> Iterator[Tuple[float, Tuple[torch.Tensor, ...]]]:
    """Yield (share of all items, fields as (G, S, ...)) for the full groups, then for the shorter last one."""
    total = routing.logits.shape[0]
    size = min(routing.group_size or total, total)
    full = total // size * size
    if full:
        yield full / total, tuple(f[:full].unflatten(0, (full // size, size)) for f in fields)
    if full < total:
        yield (total - full) / total, tuple(f[full:].unsqueeze(0) for f in fields)


def _mean_over_groups(routing: Routing, loss: Callable, *fields: torch.Tensor) -> torch.Tensor:
    """Apply `loss`: (G, S, ...) fields -> (G,), and average over groups by their share of items."""
    if routing.logits.shape[0] == 0:
        return routing.logits.sum() * 0.0
    return sum(share * loss(*grouped).mean() for share, grouped in _groups(routing, *fields))


def importance_loss(routing: Routing, unbiased: bool = False) -> torch.Tensor:
    """Squared CV of the importance, the sum of gates over the items of a group (Shazeer 2017, eq. 6 and 7; V-MoE).

    All of the weight on one of E experts gives E - 1 with the population variance, and E with the unbiased one
    (which the CNN layers of Pavlitska et al. 2022 use); perfect balance gives 0.
    """
    return _mean_over_groups(routing, lambda gates: squared_cv(gates.sum(dim=1), unbiased), routing.gates)


def importance_loss_unbiased(routing: Routing) -> torch.Tensor:
    """`importance_loss` with the unbiased variance (Pavlitska et al. 2022): at most E, at least 0."""
    return importance_loss(routing, unbiased=True)


def kl_loss(routing: Routing) -> torch.Tensor:
    """KL divergence of the mean gate from the uniform distribution (Pavlitska et al. 2022): at most ln E.

    sum_i p_i ln(p_i E) with p_i the share of expert i in the importance of the group.
    """
    def kl(gates: torch.Tensor) -> torch.Tensor:
        share = gates.sum(dim=1) + 1e-10
        share = share / share.sum(dim=-1, keepdim=True)
        return (share * (share * share.shape[-1]).log()).sum(dim=-1)
    return _mean_over_groups(routing, kl, routing.gates)


def _normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def load_loss(routing: Routing) -> torch.Tensor:
    """Squared CV of the smooth load with Shazeer's two thresholds (Shazeer 2017, appendix A, eq. 8 to 10).

    P(x, i) = Phi((clean logit_i - threshold_i) / std_i), where the threshold is the k-th largest noisy logit without
    expert i: the (k+1)-th where i was chosen, the k-th where it was not. Zero where nothing is random: without noise,
    in evaluation, or with K = E.
    """
    selected = routing.indices.shape[-1] if routing.indices is not None else routing.num_experts
    if routing.noisy_logits is None or selected >= routing.num_experts:
        return routing.logits.sum() * 0.0
    top = torch.topk(routing.noisy_logits, selected + 1, dim=-1).values
    if_in, if_out = top[:, -1:], top[:, -2:-1]
    threshold = torch.where(routing.noisy_logits > if_in, if_in, if_out)
    probability = _normal_cdf((routing.logits - threshold) / routing.noise_std)
    return _mean_over_groups(routing, lambda p: squared_cv(p.sum(dim=1)), probability)


def vmoe_load_loss(routing: Routing) -> torch.Tensor:
    """Squared CV of the smooth load with V-MoE's one threshold, the k-th largest noisy logit of the item.

    P(x, i) = 1 - Phi((threshold - clean logit_i) / std) (Riquelme et al. 2021, appendix A; the threshold keeps its
    gradient, as in the original code). Zero where there is no noise, or where experts choose: their loads are equal.
    """
    if routing.noisy_logits is None or routing.indices is None or routing.by_expert:
        return routing.logits.sum() * 0.0
    threshold = torch.topk(routing.noisy_logits, routing.indices.shape[-1], dim=-1).values[:, -1:]
    probability = 1.0 - _normal_cdf((threshold - routing.logits) / routing.noise_std)
    return _mean_over_groups(routing, lambda p: squared_cv(p.mean(dim=1)), probability)


def gshard_loss(routing: Routing) -> torch.Tensor:
    """E^2 mean_e(f_e m_e): f_e the share of items whose best expert is e, m_e its mean gate; balanced is 1.

    The same as the Switch Transformer's E sum_e(f_e m_e) (Lepikhin et al. 2020; Fedus et al. 2021, eq. 4). The noisy
    gates count where there is noise. Differentiable through m_e only.
    """
    gates = routing.gates if routing.noisy_logits is None else torch.softmax(routing.noisy_logits, dim=-1)

    def gshard(gates: torch.Tensor) -> torch.Tensor:
        experts = gates.shape[-1]
        share = F.one_hot(gates.argmax(dim=-1), experts).to(gates.dtype).mean(dim=1)
        return experts ** 2 * (share * gates.mean(dim=1)).mean(dim=-1)
    return _mean_over_groups(routing, gshard, gates)


def z_loss(routing: Routing) -> torch.Tensor:
    """Mean squared log-sum-exp of the logits, which keeps them small (ST-MoE, Zoph et al. 2022, eq. 5)."""
    return _mean_over_groups(
        routing, lambda logits: torch.logsumexp(logits, dim=-1).square().mean(dim=1), routing.logits)
