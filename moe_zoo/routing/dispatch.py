"""Dispatchers move items to experts and back: one plain reference, and faster ones that tests hold to it.

An expert does not know about routing. Experts are given as `run(chunks)`: E tensors (T_e, D) in, and the tensors
(T_e, D_out) of those that got an item out, in order; or, for the static buffer, as `run_stacked((E, C, D))`, which
returns (E, C, D_out).

Combine weights stay float32 whatever the experts compute in; the result has the type of the input.

Letters: T routed items, D width, E experts, K chosen experts, C slots.
"""
from typing import Callable, List, Optional, Tuple

import torch

from .routers import top_k
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

    Of rows as wide as the tokens it holds those that the experts get and those that they return, K a token each, and
    the sum; what an expert returns is weighed chunk by chunk.

    Args:
        x: (T, D).
        run: E tensors (T_e, D), some of them empty, to the tensors (T_e, D_out) of the others.

    Returns:
        (T, D_out), in the type of x.
    """
    items, weights, sizes = sort_pairs(routing.indices, routing.weights, routing.kept, routing.num_experts)
    outputs = run(list(x.index_select(0, items).split(sizes)))
    return combine_sorted(outputs, items, weights, x.shape[0]).to(x.dtype)


def dispatch_padded(
        x: torch.Tensor,
        routing: Routing,
        run_stacked: Callable[[torch.Tensor], torch.Tensor],
        capacity: int,
) -> torch.Tensor:
    """`capacity` items an expert, kept or not: static shapes for meta tensors, compile and export.

    An expert that keeps fewer gets others besides, with weight zero.

    Args:
        x: (T, D).
        run_stacked: (E, C, D) -> (E, C, D_out).
        capacity: C, at least the largest number of kept pairs an expert has over all groups together, at most T.

    Returns:
        (T, D_out), in the type of x.
    """
    taken = _taken(routing.indices, routing.kept, routing.num_experts)
    items = top_k(taken.to(torch.int8), capacity)[1]  # (E, C), the kept ones first
    outputs = run_stacked(x.index_select(0, items.flatten()).view(routing.num_experts, capacity, -1))
    outputs = outputs * routing.combine_matrix().t().gather(1, items).unsqueeze(-1)
    total = torch.zeros(x.shape[0], outputs.shape[-1], device=outputs.device, dtype=outputs.dtype)
    return total.index_add_(0, items.flatten(), outputs.flatten(0, 1)).to(x.dtype)


def sort_pairs(
        indices: torch.Tensor,
        weights: torch.Tensor,
        kept: Optional[torch.Tensor],
        num_experts: int,
) -> Tuple[torch.Tensor, torch.Tensor, List[int]]:
    """Order the kept (item, expert) pairs by expert, and by item inside an expert.

    Args:
        indices: (T, K) chosen experts, all different.
        weights: (T, K) their weights.
        kept: (T, K) bool; None keeps all.

    Returns:
        items: (P,) the item of every kept pair.
        weights: (P,) its weight.
        sizes: Pairs an expert, E numbers that sum to P.
    """
    taken = _taken(indices, kept, num_experts)
    matrix = torch.zeros(taken.shape, device=weights.device, dtype=weights.dtype)
    matrix = matrix.scatter(0, indices.t(), weights.t())
    sizes: List[int] = taken.sum(dim=1).tolist()
    return taken.nonzero()[:, 1], torch.masked_select(matrix, taken), sizes


def combine_sorted(
        outputs: List[torch.Tensor],
        items: torch.Tensor,
        weights: torch.Tensor,
        num_items: int,
) -> torch.Tensor:
    """Weigh what experts return, and add it up by item.

    Args:
        outputs: Tensors (., D_out), of P rows together.
        items: (P,) item of every row.
        weights: (P,) float32.
        num_items: T.

    Returns:
        (T, D_out) in float32, or in float64 where the outputs are.
    """
    sizes = [output.shape[0] for output in outputs]
    dtype = torch.result_type(outputs[0], weights)
    total = torch.zeros(num_items, outputs[0].shape[1], device=weights.device, dtype=dtype)
    # An item is in a chunk once at most, so that the order of additions does not matter on any device. For backward,
    # index_add_ would keep the products, scatter_add_ keeps the index alone.
    for output, item, weight in zip(outputs, items.split(sizes), weights.split(sizes)):
        total = total.scatter_add_(0, item.unsqueeze(1).expand_as(output), output * weight.unsqueeze(1))
    return total


def _taken(indices: torch.Tensor, kept: Optional[torch.Tensor], num_experts: int) -> torch.Tensor:
    """(E, T) bool, which items an expert gets."""
    taken = torch.zeros(num_experts, indices.shape[0], device=indices.device, dtype=torch.bool)
    if kept is None:
        kept = torch.ones_like(indices, dtype=torch.bool)
    return taken.scatter(0, indices.t(), kept.t())


def combine_all(outputs: List[torch.Tensor], matrix: torch.Tensor) -> torch.Tensor:
    """Weighted sum of E outputs (T, D_out) by the columns of a float32 (T, E) matrix."""
    total = outputs[0] * matrix[:, :1]
    for expert in range(1, len(outputs)):
        total = total + outputs[expert] * matrix[:, expert:expert + 1]
    return total


def wants_static_shapes(x: torch.Tensor) -> bool:
    """True where no value can be read: meta tensors, compilation and export, tracing."""
    return x.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing()
