"""What ranks exchange, by hand: threads stand in for the ranks, so that it can be looked at in a moment.

tests/test_parallel.py runs the same on torch.distributed, in processes, in tests that are slow.

Letters: T items, E experts, R ranks.
"""
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe_zoo.routing import Routing, constraints, exchange


class Threads:
    """Those of torch.distributed's collectives that the package calls, between threads of one process."""

    def __init__(self, ranks: int):
        self.ranks, self.here = ranks, threading.local()
        self.barrier, self.parts = threading.Barrier(ranks, timeout=20), [None] * ranks

    def run(self, function) -> list:
        def start(rank):
            self.here.rank = rank
            try:
                return function(rank)
            except BaseException:
                self.barrier.abort()
                raise
        with ThreadPoolExecutor(self.ranks) as pool:
            return [each.result() for each in [pool.submit(start, rank) for rank in range(self.ranks)]]

    def is_available(self):
        return True

    is_initialized = is_available

    def get_world_size(self, group=None):
        return self.ranks

    def get_rank(self, group=None):
        return self.here.rank

    def swap(self, value) -> list:
        self.parts[self.here.rank] = value
        self.barrier.wait()
        found = list(self.parts)
        self.barrier.wait()
        return found

    def all_to_all_single(self, out, x, found=None, sent=None, group=None):
        parts = self.swap(x.split(sent or [len(x) // self.ranks] * self.ranks))
        parts = [of_rank[self.here.rank] for of_rank in parts]
        assert found is None or [len(part) for part in parts] == found
        assert out.shape == torch.cat(parts).shape and x.is_contiguous()
        out.copy_(torch.cat(parts))

    def all_gather(self, parts, x):
        assert len(parts) == self.ranks and x.is_contiguous()
        for part, value in zip(parts, self.swap(x)):
            part.copy_(value)

    def all_reduce(self, x):
        x.copy_(sum(self.swap(x.clone())))


@pytest.fixture
def ranks(monkeypatch):
    def make(number: int) -> Threads:
        made = Threads(number)
        for module in (exchange, constraints):
            monkeypatch.setattr(module, 'dist', made)
        return made
    return make


@pytest.mark.parametrize('sizes', [
    [[1, 2, 0, 3], [2, 0, 1, 1]], [[0, 0, 0, 0], [2, 1, 1, 2]], [[0, 3, 0, 0], [0, 1, 0, 0]],  # idle ranks, too
    [[2]], [[0, 0, 0, 0], [0, 0, 0, 0]], [[1, 0, 2, 1, 0, 3], [0, 2, 1, 1, 0, 0], [2, 0, 0, 0, 0, 1]]])
def test_items_travel_to_their_expert_and_back(sizes, ranks):
    """Expert e multiplies by e + 1, and so it does the gradient; each rank sees its own experts' items alone."""
    R, E = len(sizes), len(sizes[0])
    L, group, seen = E // R, ranks(R), {}
    batches = [torch.arange(2. * sum(of_rank)).view(-1, 2) + 100 * r for r, of_rank in enumerate(sizes)]

    def work(rank):
        x = batches[rank].clone().requires_grad_()
        scales = torch.arange(rank * L, (rank + 1) * L).add(1.).requires_grad_()

        def run(chunks):
            seen[rank] = [chunk.detach() for chunk in chunks]
            some = any(len(chunk) for chunk in chunks)
            return [chunk * scale for chunk, scale in zip(chunks, scales) if len(chunk) or not some]

        made = exchange.ExpertExchange()
        assert made.ranks == R
        outputs = made.run(list(x.split(sizes[rank])), run)
        slopes = torch.arange(1., 1 + 2 * sum(sizes[rank])).view(-1, 2)
        (torch.cat(outputs) * slopes).sum().backward()
        return [each.detach() for each in outputs], x.grad, scales.grad, slopes

    found = group.run(work)
    parts = [batch.split(of_rank) for batch, of_rank in zip(batches, sizes)]
    for rank, (outputs, of_x, _, slopes) in enumerate(found):
        wanted = [part * (e + 1) for e, part in enumerate(parts[rank]) if len(part)]
        assert [each.tolist() for each in outputs] == ([each.tolist() for each in wanted] or [[]])
        factors = torch.arange(1., E + 1).repeat_interleave(torch.tensor(sizes[rank]))
        assert torch.equal(of_x, slopes * factors.unsqueeze(1))
        for e, chunk in enumerate(seen[rank], start=rank * L):  # by expert, then by the rank they come from
            assert torch.equal(chunk, torch.cat([part[e] for part in parts]))
    for e in range(E):
        of_scale = sum((slopes.split(sizes[rank])[e] * parts[rank][e]).sum() for rank, (*_, slopes) in enumerate(found))
        assert found[e // L][2][e % L] == of_scale


def record(rank: int) -> Routing:
    logits = torch.tensor([[1., 2.], [3., 4.], [5., 6.]]) + 10 * rank
    return Routing(
        logits.requires_grad_(), logits, logits[:, :1], torch.tensor([[0], [1], [rank]]), noise_std=torch.tensor(.5),
        shape=(1, 3), affinity=torch.ones(3, 3), losses=(('z', 1.),))


def test_records_of_all_ranks_are_that_of_the_whole_batch(ranks):
    def work(rank):
        mine = record(rank)
        whole = exchange.gather_routing(mine)
        (whole.logits * torch.arange(12.).view(6, 2) * (rank + 1)).sum().backward()
        return mine.logits.grad, whole.detach()

    found = ranks(2).run(work)
    for rank, (grad, whole) in enumerate(found):
        assert whole.logits.tolist() == [[1, 2], [3, 4], [5, 6], [11, 12], [13, 14], [15, 16]]
        assert whole.indices.tolist() == [[0], [1], [0], [0], [1], [1]] and whole.weights.shape == (6, 1)
        assert whole.shape == (2, 3) and whole.noise_std == .5 and whole.losses == (('z', 1.),)
        assert whole.affinity.shape == (3, 3)  # though it has as many rows as there are items
        # every rank's loss uses the rows of this one: slopes 0 to 5 or 6 to 11, times 1 + 2
        assert grad.flatten().tolist() == [3. * (n + 6 * rank) for n in range(6)]


def test_alone_a_record_is_the_whole_batch(ranks):
    group, alone = ranks(1), record(0)
    assert group.run(lambda rank: exchange.gather_routing(alone) is alone) == [True]
    group.is_initialized = lambda: False
    group.ranks = 2
    assert exchange.gather_routing(alone) is alone


def test_constraints_move_by_what_all_ranks_counted(ranks):
    """Loads of 3 and 1 together, though the first rank saw 0 and 1: the bias of the first expert falls."""
    def work(rank):
        bias, share = constraints.SelectionBias(2, .25), constraints.RelativeImportance(2)
        gates = torch.tensor([[[.5, 1.]], [[2.5, 0.]]][rank])
        for constraint in (bias, share):
            constraint.observe(torch.tensor([[1]] if rank == 0 else [[0], [0], [0]]), gates)
            constraint.end_step()
        return bias.selection_bias.tolist(), share.excess.tolist()

    # importance 3 and 1 of 4: twice their share of 2, less 1
    assert ranks(2).run(work) == [([-.25, .25], [.5, -.5])] * 2
