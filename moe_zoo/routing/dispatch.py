"""Dispatchers move items to experts and back: one plain reference, and faster ones that tests hold to it.

An expert function takes a list of inputs or a stack of them and does not know about routing. Here the experts are
given as `run(inputs)`: a list of E tensors (T_e, D) to a list of E tensors (T_e, D_out), or, for the static paths,
`run_stacked((E, C, D)) -> (E, C, D_out)`.

Letters: T routed items, D width, E experts, K chosen experts, C slots.
"""
from typing import Callable, List, Sequence

import torch

from .types import Routing


def dispatch_reference(
        x: torch.Tensor,
        routing: Routing,
        run_stacked: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Every item through every expert, then the weighted sum: obviously right, shape-static, E / K times the cost.

    Args:
        x: (T, D).
        run_stacked: (E, T, D) -> (E, T, D_out).

    Returns:
        (T, D_out), in the type of x.
    """
    matrix = routing.combine_matrix()  # (T, E)
    outputs = run_stacked(x.unsqueeze(0).expand(routing.num_experts, -1, -1))  # (E, T, D_out)
    return torch.einsum('te,etd->td', matrix.to(outputs.dtype), outputs)


def dispatch_sorted(
        x: torch.Tensor,
        routing: Routing,
        run: Callable[[Sequence[torch.Tensor]], List[torch.Tensor]],
) -> torch.Tensor:
    """Only the kept pairs, sorted by expert, one chunk an expert; the fast path on CPU.

    Args:
        x: (T, D).
        run: E tensors (T_e, D), some of them empty, to E tensors (T_e, D_out).

    Returns:
        (T, D_out), in the type of x.
    """
    num_items, selected = routing.indices.shape
    experts = routing.indices.reshape(-1)  # (T * K)
    if routing.kept is not None:
        # Dropped pairs are sorted behind the last expert and never moved.
        experts = torch.where(routing.kept.reshape(-1), experts, routing.num_experts)
    order = torch.argsort(experts, stable=True)
    sizes = torch.bincount(experts, minlength=routing.num_experts + 1).tolist()
    num_kept = sum(sizes[:-1])
    order = order[:num_kept]
    items = order // selected
    outputs = torch.cat(run(x.index_select(0, items).split(sizes[:-1])))  # (T_kept, D_out)
    weights = routing.weights.reshape(-1).index_select(0, order).to(outputs.dtype)
    outputs = outputs * weights.unsqueeze(-1)
    if num_kept == num_items * selected:
        # Undo the permutation and sum over choices: a gather, where index_add would serialise.
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(num_kept, device=order.device))
        return outputs.index_select(0, inverse).view(num_items, selected, -1).sum(dim=1)
    return outputs.new_zeros(num_items, outputs.shape[-1]).index_add(0, items, outputs)


def dispatch_padded(
        x: torch.Tensor,
        routing: Routing,
        run_stacked: Callable[[torch.Tensor], torch.Tensor],
        capacity: int,
) -> torch.Tensor:
    """Kept pairs in a buffer of `capacity` slots an expert: static shapes for compile and export.

    Args:
        x: (T, D).
        run_stacked: (E, C, D) -> (E, C, D_out).
        capacity: C, at least the largest number of kept pairs an expert has over all groups together.

    Returns:
        (T, D_out), in the type of x.
    """
    num_items, selected = routing.indices.shape
    experts = routing.indices.reshape(-1)
    mask = torch.nn.functional.one_hot(experts, routing.num_experts)  # (T * K, E)
    if routing.kept is not None:
        mask = mask * routing.kept.reshape(-1, 1)
    slot = (mask.cumsum(dim=0) * mask).sum(dim=-1) - 1  # -1 where dropped
    # One slot more takes what was dropped.
    position = torch.where(slot >= 0, experts * capacity + slot, routing.num_experts * capacity)
    repeated = x.repeat_interleave(selected, dim=0)
    buffer = x.new_zeros(routing.num_experts * capacity + 1, x.shape[-1]).index_copy(0, position, repeated)
    outputs = run_stacked(buffer[:-1].view(routing.num_experts, capacity, -1))
    outputs = torch.cat([outputs.flatten(0, 1), outputs.new_zeros(1, outputs.shape[-1])])
    gathered = outputs.index_select(0, position) * routing.weights.reshape(-1, 1).to(outputs.dtype)
    return gathered.view(num_items, selected, -1).sum(dim=1)
