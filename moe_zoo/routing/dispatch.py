"""Dispatchers move items to experts and back: one plain reference, and faster ones that tests hold to it.

An expert does not know about routing. Experts are given as `run(chunks)`: E tensors (T_e, D) in, and the tensors
(T_e, D_out) of those that got an item out, in order; or, for the static buffer, as `run_stacked((E, C, D))`, which
returns (E, C, D_out).

Combine weights stay float32 whatever the experts compute in; the result has the type of the input.

Letters: T routed items, D width, E experts, K chosen experts, C slots.
"""
from typing import Callable, List, Optional, Tuple

import torch
from torch.nn import functional as F

from .types import Routing


def dispatch_reference(
        x: torch.Tensor,
        routing: Routing,
        run: Callable[[List[torch.Tensor]], List[torch.Tensor]],
) -> torch.Tensor:
    """Every item through every expert, then the weighted sum: obviously right, shape-static, E / K times the cost.

    Args:
        x: (T, D).
        run: E tensors (T, D) to E tensors (T, D_out).

    Returns:
        (T, D_out), in the type of x.
    """
    return combine_all(run([x] * routing.num_experts), routing.combine_matrix()).to(x.dtype)


def dispatch_sorted(
        x: torch.Tensor,
        routing: Routing,
        run: Callable[[List[torch.Tensor]], List[torch.Tensor]],
) -> torch.Tensor:
    """Only the kept pairs, sorted by expert, one chunk an expert; the fast path on CPU.

    Args:
        x: (T, D).
        run: E tensors (T_e, D), some of them empty, to the tensors (T_e, D_out) of the others.

    Returns:
        (T, D_out), in the type of x.
    """
    items, position, sizes = sort_pairs(routing.indices, routing.kept, routing.num_experts)
    outputs = run(list(x.index_select(0, items).split(sizes)))
    return combine_sorted(outputs, position, routing.weights).to(x.dtype)


def dispatch_padded(
        x: torch.Tensor,
        routing: Routing,
        run_stacked: Callable[[torch.Tensor], torch.Tensor],
        capacity: int,
) -> torch.Tensor:
    """Kept pairs in a buffer of `capacity` slots an expert: static shapes for meta tensors, compile and export.

    Args:
        x: (T, D).
        run_stacked: (E, C, D) -> (E, C, D_out).
        capacity: C, at least the largest number of kept pairs an expert has over all groups together.

    Returns:
        (T, D_out), in the type of x.
    """
    selected = routing.indices.shape[1]
    mask = F.one_hot(routing.indices.reshape(-1), routing.num_experts)  # (T * K, E)
    if routing.kept is not None:
        mask = mask * routing.kept.reshape(-1, 1)
    slot = (mask.cumsum(dim=0) * mask).sum(dim=-1) - 1  # -1 where dropped
    # One slot more takes what was dropped, and gives zero back.
    end = routing.num_experts * capacity
    position = torch.where(slot >= 0, routing.indices.reshape(-1) * capacity + slot, end)  # (T * K)
    buffer = x.new_zeros(end + 1, x.shape[-1]).index_copy(0, position, x.repeat_interleave(selected, dim=0))
    outputs = run_stacked(buffer[:-1].view(routing.num_experts, capacity, -1)).flatten(0, 1)
    outputs = torch.cat([outputs, outputs.new_zeros(1, outputs.shape[-1])])
    gathered = outputs.index_select(0, position) * routing.weights.reshape(-1, 1)
    return gathered.view(x.shape[0], selected, -1).sum(dim=1).to(x.dtype)


def sort_pairs(
        indices: torch.Tensor,
        kept: Optional[torch.Tensor],
        num_experts: int,
) -> Tuple[torch.Tensor, torch.Tensor, List[int]]:
    """Order the kept (item, expert) pairs by expert, and by item inside an expert.

    Args:
        indices: (T, K) chosen experts.
        kept: (T, K) bool; None keeps all.

    Returns:
        items: (P,) the item of every kept pair, in the new order.
        position: (T, K) where each pair went; P for those that were dropped.
        sizes: Pairs an expert, E numbers that sum to P.
    """
    experts = indices.reshape(-1)
    if kept is not None:
        # Dropped pairs are sorted behind the last expert and never moved.
        experts = torch.where(kept.reshape(-1), experts, num_experts)
    order = torch.argsort(experts, stable=True)
    sizes: List[int] = torch.bincount(experts, minlength=num_experts + 1)[:num_experts].tolist()
    num_kept = sum(sizes)
    position = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    items = torch.div(order[:num_kept], indices.shape[1], rounding_mode='floor')
    return items, position.clamp(max=num_kept).view_as(indices), sizes


def combine_sorted(outputs: List[torch.Tensor], position: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Gather every item's outputs and sum them by weight.

    Args:
        outputs: Tensors (., D_out) that concatenate to P rows.
        position: (T, K) row of each pair; P reads zero.
        weights: (T, K) float32.

    Returns:
        (T, D_out) in float32, or in float64 where the outputs are.
    """
    zero = torch.zeros(1, outputs[0].shape[-1], device=outputs[0].device, dtype=outputs[0].dtype)
    rows = torch.cat(outputs + [zero])
    rows = rows.to(torch.result_type(rows, weights))
    # Gathers, weighs and sums in one pass, without a copy of the gathered rows.
    return F.embedding_bag(position, rows, per_sample_weights=weights.to(rows.dtype), mode='sum')


def combine_all(outputs: List[torch.Tensor], matrix: torch.Tensor) -> torch.Tensor:
    """Weighted sum of E outputs (T, D_out) by the columns of a float32 (T, E) matrix."""
    total = outputs[0] * matrix[:, :1]
    for expert in range(1, len(outputs)):
        total = total + outputs[expert] * matrix[:, expert:expert + 1]
    return total


def wants_static_shapes(x: torch.Tensor) -> bool:
    """True where no value can be read: meta tensors, compilation and export, tracing."""
    return x.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing()
