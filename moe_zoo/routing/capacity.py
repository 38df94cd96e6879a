"""Capacity: how many items an expert takes, and who is dropped when it is full.

Letters: T routed items, S items a group, E experts, K chosen experts, C slots an expert has in a group.
"""
import math
from typing import Optional

import torch

from ..errors import InputError
from .routers import top_k


def compute_capacity(
        num_items: int,
        num_experts: int,
        num_selected: int,
        capacity_factor: float,
        multiple_of: Optional[int] = 4,
        rounding: str = 'ceil',
) -> int:
    """Slots an expert has in a group of `num_items` items: ceil(S K factor / E), raised to a multiple (V-MoE).

    >>> compute_capacity(34, num_experts=4, num_selected=2, capacity_factor=0.6)  # ceil(10.2) = 11, raised to 12
    12

    Args:
        multiple_of: Raise to a multiple of it; None or 1 does not.
        rounding: 'ceil' or 'round'.

    Raises:
        InputError: No slot would be left, or the rounding is unknown.
    """
    # The original's order of operations, so that ceil meets the same floating-point edge cases.
    exact = num_items * num_selected * capacity_factor / num_experts
    capacity = math.ceil(exact) if rounding == 'ceil' else _round(exact)
    if torch.jit.is_scripting():
        assert capacity >= 1, 'capacity_factor leaves no slot'
    else:
        _check_capacity(capacity, num_items, num_experts, num_selected, capacity_factor, rounding)
    if multiple_of is not None and multiple_of > 1:
        capacity = -(-capacity // multiple_of) * multiple_of
    return capacity


def _check_capacity(
        capacity: int,
        num_items: int,
        num_experts: int,
        num_selected: int,
        capacity_factor: float,
        rounding: str,
) -> None:
    if rounding not in ('ceil', 'round'):
        raise InputError(f"capacity rounding {rounding!r}: use 'ceil' or 'round'.")
    if capacity < 1:
        raise InputError(
            f'capacity_factor={capacity_factor} leaves {capacity} slots for a group of {num_items} items with '
            f'{num_selected} of {num_experts} experts: use at least {num_experts / (num_items * num_selected):.4g}.')


def _round(value: float) -> int:
    """Python's round, half to even, which TorchScript's is not."""
    lower = math.floor(value)
    rest = value - lower
    return lower if rest < 0.5 or (rest == 0.5 and lower % 2 == 0) else lower + 1


def keep_within_capacity(
        indices: torch.Tensor,
        weights: torch.Tensor,
        num_experts: int,
        capacity: int,
        batch_priority: bool = False,
) -> torch.Tensor:
    """Which (item, expert) pairs of each group find a slot.

    All first choices are served before all second ones. Within a rank of choice, items come in order of position, or,
    with `batch_priority`, of falling largest weight, ties in order of position (V-MoE, algorithms 1 and 2). A dropped
    choice falls through to nothing.

    Args:
        indices: (G, S, K) chosen experts, best first.
        weights: (G, S, K) their gates, the largest of which is the priority; (G, S, 1) will do.
        capacity: C.

    Returns:
        (G, S, K) bool, True where the pair is kept.
    """
    if not batch_priority:
        return _keep_first(indices, num_experts, capacity)
    order = top_k(weights.amax(dim=-1), indices.shape[1])[1]  # (G, S)
    index = order.unsqueeze(-1).expand_as(indices)
    kept = _keep_first(indices.gather(1, index), num_experts, capacity)
    return torch.zeros_like(kept).scatter(1, index, kept)


def keep_chosen_by_experts(indices: torch.Tensor, gates: torch.Tensor, capacity: int) -> torch.Tensor:
    """Which pairs are kept where every expert takes the items of a group that it likes best (Zhou et al. 2022).

    An expert takes the `capacity` items of largest gate, ties in order of position, all where there are fewer. An item
    may be taken by any number of experts, or by none.

    Args:
        indices: (G, S, E) every expert once for each item, in any order.
        gates: (G, S, E) gate of every expert, by number.
        capacity: C.

    Returns:
        (G, S, E) bool beside `indices`.
    """
    best = top_k(gates.transpose(1, 2), min(capacity, gates.shape[1]))[1].transpose(1, 2)  # (G, C, E)
    taken = torch.zeros_like(gates, dtype=torch.bool).scatter(1, best, torch.ones_like(best, dtype=torch.bool))
    return taken.gather(2, indices)


def _keep_first(indices: torch.Tensor, num_experts: int, capacity: int) -> torch.Tensor:
    groups, size, selected = indices.shape
    choices = indices.transpose(1, 2).reshape(groups, selected * size)  # rank of choice first, then position
    mask = torch.nn.functional.one_hot(choices, num_experts)  # (G, K*S, E)
    slot = (mask.cumsum(dim=1) * mask).sum(dim=-1) - 1  # (G, K*S) slots given before, at the chosen expert
    return (slot < capacity).reshape(groups, selected, size).transpose(1, 2)
