"""Losses that balance the use of experts: pure functions of a `Routing`, one scalar each, weight not applied.

Letters: T routed items, E experts, K chosen experts, G groups.

Coefficients of variation are computed as variance / mean^2, never through a standard deviation, whose gradient is not
finite at perfect balance. Losses are taken per group and averaged over groups in proportion to their items, which is
the plain mean of V-MoE where groups are equal.
"""
from typing import Callable, Iterator, Optional, Tuple

import torch
from torch.nn import functional as F

from ..routing.routers import choice_probability, normal_cdf
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
    if routing.inside is not None:  # groups differ in size by their padding: one by one
        yield from _groups_inside(routing.inside, size, fields)
        return
    full = total // size * size
    if full:
        yield full / total, tuple(f[:full].unflatten(0, (full // size, size)) for f in fields)
    if full < total:
        yield (total - full) / total, tuple(f[full:].unsqueeze(0) for f in fields)


def _groups_inside(inside: torch.Tensor, size: int, fields: Tuple[torch.Tensor, ...]):
    """Yield the groups of `size` items without their padding, as (share of all that count, fields (1, S, ...))."""
    total = int(inside.sum())
    for rows, *parts in zip(inside.split(size), *(f.split(size) for f in fields)):
        items = int(rows.sum())
        if items:
            yield items / total, tuple(part[rows].unsqueeze(0) for part in parts)


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


def load_loss(routing: Routing) -> torch.Tensor:
    """Squared CV of the smooth load, the sum of `choice_probability` over items (Shazeer 2017, appendix A, eq. 8-10).

    Where experts are chosen on two levels it is that of `hierarchical_load`. Zero where nothing is random: without
    noise, in evaluation, or with K = E.
    """
    selected = routing.indices.shape[-1] if routing.indices is not None else routing.num_experts
    if routing.noisy_logits is None or selected >= routing.num_experts:
        return routing.logits.sum() * 0.0
    if routing.group_chances is not None:
        first = routing.group_chances
        groups = torch.div(routing.indices, routing.num_experts // first.shape[1], rounding_mode='floor')
        went = torch.zeros_like(first).scatter(1, groups, 1.0)
        return _mean_over_groups(
            routing, lambda *fields: squared_cv(hierarchical_load(*fields)), routing.chances, first, went)
    probability = choice_probability(routing.logits, routing.noisy_logits, routing.noise_std, selected)
    return _mean_over_groups(routing, lambda p: squared_cv(p.sum(dim=1)), probability)


def hierarchical_load(chances: torch.Tensor, group_chances: torch.Tensor, went: torch.Tensor) -> torch.Tensor:
    """Load_primary(X)_i Load_i(X_i)_j / |X_i|, X_i the items that chose group i (Shazeer 2017, appendix B).

    In this form, rather than as Load_i alone, it has a gradient for the gate of the groups.

    Args:
        chances: (..., T, E) choice probability of every expert in its group, zero for an item that did not choose that.
        group_chances: (..., T, A) of every group.
        went: (..., T, A) one where the item chose the group, else zero.

    Returns:
        (..., E) load of every expert.
    """
    share = group_chances.sum(dim=-2) / went.sum(dim=-2).clamp_min(1.0)  # (..., A)
    return (chances.sum(dim=-2).unflatten(-1, (share.shape[-1], -1)) * share.unsqueeze(-1)).flatten(-2)


def vmoe_load_loss(routing: Routing) -> torch.Tensor:
    """Squared CV of the smooth load with V-MoE's one threshold, the k-th largest noisy logit of the item.

    P(x, i) = 1 - Phi((threshold - clean logit_i) / std) (Riquelme et al. 2021, appendix A; the threshold keeps its
    gradient, as in the original code). Zero where there is no noise, or where experts choose: their loads are equal.
    """
    if routing.noise_std is None or routing.indices is None or routing.by_expert:
        return routing.logits.sum() * 0.0
    threshold = torch.topk(routing.noisy_logits, routing.indices.shape[-1], dim=-1).values[:, -1:]
    probability = 1.0 - normal_cdf((threshold - routing.logits) / routing.noise_std)
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
