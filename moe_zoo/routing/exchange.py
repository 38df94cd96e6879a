"""What travels between the processes of a run: items to the rank of their expert and back, and records to all ranks.

Only torch.distributed's own collectives, on any backend that has them (gloo, NCCL). Every rank of a group calls them in
the same order, whatever its router decided.

Letters: T routed items of a rank, D width, E experts, R ranks, L = E / R experts a rank.
"""
from typing import Any, Callable, List, Optional, Sequence

import torch
import torch.distributed as dist

from .types import Routing


class ExpertExchange:
    """Runs E experts of which every rank of a group holds L: rank r those from r L on.

    Items travel to the rank of their expert, and what it makes of them travels back, each in one all-to-all of uneven
    parts; nothing is padded, nothing is dropped. Gradients travel the same ways.

    Args:
        group: The ranks that share the experts; None for all.
    """

    def __init__(self, group: Optional[dist.ProcessGroup] = None):
        self.group = group
        self.ranks = dist.get_world_size(group)

    def run(
            self,
            chunks: List[torch.Tensor],
            run: Callable[[List[torch.Tensor]], List[torch.Tensor]],
    ) -> List[torch.Tensor]:
        """What `run(chunks)` would return on a rank that holds all experts.

        Args:
            chunks: E tensors (T_e, D), some of them empty.
            run: L tensors to the tensors (T_l, D_out) of those that are not empty, of all L where all are.

        Returns:
            The tensors (T_e, D_out) of the chunks that are not empty; one empty one where all are.
        """
        R, L = self.ranks, len(chunks) // self.ranks
        sent = torch.tensor([len(chunk) for chunk in chunks], device=chunks[0].device).view(R, L)
        found = torch.empty_like(sent)
        dist.all_to_all_single(found, sent, group=self.group)
        to_rank, from_rank = sent.sum(dim=1).tolist(), found.sum(dim=1).tolist()
        # What arrives is sorted by rank, then by expert; experts want it sorted by expert, then by rank.
        arrived = _AllToAll.apply(torch.cat(chunks), from_rank, to_rank, self.group)
        outputs = torch.cat(run(_regroup(arrived, found.tolist())))
        sizes = found.t().tolist()
        outputs = torch.cat(_regroup(outputs, sizes))
        returned = _AllToAll.apply(outputs, to_rank, from_rank, self.group)
        return [chunk for chunk in returned.split(sent.flatten().tolist()) if len(chunk)] or [returned]


def _regroup(x: torch.Tensor, sizes: Sequence[Sequence[int]]) -> List[torch.Tensor]:
    """Rows in parts [i][j], sorted by i, then by j, to one tensor for each j, sorted by i."""
    parts = x.split([size for row in sizes for size in row])
    columns = len(sizes[0])
    return [torch.cat(parts[j::columns]) for j in range(columns)]


class _AllToAll(torch.autograd.Function):
    """(sum of `sent`, D) rows to (sum of `found`, D): `sent[r]` of them to rank r, `found[r]` from it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, found: List[int], sent: List[int], group: Optional[dist.ProcessGroup]):
        ctx.found, ctx.sent, ctx.group = found, sent, group
        arrived = x.new_empty(sum(found), *x.shape[1:])
        dist.all_to_all_single(arrived, x.contiguous(), found, sent, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        return _AllToAll.apply(grad, ctx.sent, ctx.found, ctx.group), None, None, None


class _AllGather(torch.autograd.Function):
    """(T, ...) of every rank to (R T, ...), rank by rank. Every rank uses the result: their gradients are summed."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def gather_routing(routing: Routing) -> Routing:
    """The record that one process would have made of the batches of all ranks, one after another, with its graph.

    A loss of it is that of the whole batch, alike on every rank; the mean over ranks of its gradients, which
    DistributedDataParallel takes, is the gradient of that loss. Groups of items are counted anew from the first item
    of the first rank on.

    Args:
        routing: Of this rank; all ranks have equally many items.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return routing
    items = len(routing.logits)
    gathered = {
        name: _AllGather.apply(field) for name, field in routing._asdict().items()
        if isinstance(field, torch.Tensor) and name != 'affinity' and field.dim() and len(field) == items}
    shape = (routing.shape[0] * dist.get_world_size(), *routing.shape[1:])
    return routing._replace(**gathered, shape=shape)
