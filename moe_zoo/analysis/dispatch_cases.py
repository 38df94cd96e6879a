"""What `tools/benchmark.py dispatch` times: the ways of tokens to their experts and back, beside the experts alone.

Every way gets the same choice, spread evenly, and runs the same MLPs, so that what differs is the way: sorting and
moving, padding, one grouped product, or travelling to another process (here to the only one, which is what the code
costs without a network). The experts alone get their tokens in chunks that were made beforehand.

Letters: T tokens, D width, E experts, K chosen experts.
"""
import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from ..layers import MoEMlp
from ..layers.fast_linear import grouped_linear
from ..routing import ExpertExchange, Routing, dispatch_padded, dispatch_sorted
from .layer_cases import Contender, make_layer_run, select
from .model_cases import memory_of, spread_evenly
from .timing import Settings, comparison

WIDTH = 192  # D, of ViT-Ti: the smaller the experts, the more the way to them matters
TOKENS, EXPERTS, SELECTED = (1576, 6304), (8, 32), (1, 2)  # 8 and 32 images of 197 tokens

Way = Callable[[torch.Tensor], torch.Tensor]


def cells() -> dict[str, tuple[int, int, int]]:
    """Name to tokens, experts and K."""
    return {f'tokens{t}-e{e}-k{k}': (t, e, k) for t, e, k in itertools.product(TOKENS, EXPERTS, SELECTED)}


def find_cells(patterns: Iterable[str]) -> dict[str, tuple[int, int, int]]:
    """The cells of these names or shell patterns; all of them where none is given.

    Raises:
        InputError: A name or pattern that fits no cell.
    """
    return select(patterns, cells(), 'cell of dispatch', ' `benchmark.py dispatch --help` shows all.')


class Alone(nn.Module):
    """The experts on chunks that nobody had to choose or to move; what they return stays where it is."""

    def __init__(self, layer: MoEMlp, sizes: list[int]):
        super().__init__()
        self.layer = layer
        self.sizes = sizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.layer.run_experts(list(x.split(self.sizes))))


class Dispatched(nn.Module):
    """The experts behind one way of getting there."""

    def __init__(self, layer: MoEMlp, way: Way):
        super().__init__()
        self.layer = layer
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.way(x)


def benchmark_dispatch(name: str, mode: str, settings: Settings, width: int = WIDTH) -> list[dict]:
    """Time every way of one cell.

    Returns:
        One row for each way, its ratio of time to that of the experts alone.
    """
    T, E, K = cells()[name]
    layer = MoEMlp(width, 4 * width, num_experts=E, num_selected=K, device=settings.device)
    x = torch.randn(T, width, device=settings.device)
    routing = spread_evenly('', layer.router(x)._replace(shape=(T,)))
    routing = Routing(*(f.detach() if isinstance(f, torch.Tensor) else f for f in routing))
    sizes = routing.indices.flatten().bincount(minlength=E).tolist()
    with exchange_of_one() as exchange:
        found = find_ways(layer, routing, max(sizes), exchange)
        ways = {way: Dispatched(layer, function) for way, function in found.items()}
        contenders = [Contender(way, module, (x,)) for way, module in ways.items()]
        contenders.append(Contender('experts alone', Alone(layer, sizes), (x.repeat(K, 1),)))
        runs = [make_layer_run(contender, mode) for contender in contenders]
        timings = settings.alternate(runs)
        memory = [memory_of(contender.module, run, settings.device) for contender, run in zip(contenders, runs)]
    row = {'kind': 'dispatch', 'case': name, 'about': f'{T} tokens of width {width}, {K} of {E} experts'}
    return [
        row | {'layer': way} | comparison(contenders[-1].name, mode, seconds, timings.seconds[-1], timings.loads,
                                          (held, memory[-1]))
        for way, seconds, held in zip(ways, timings.seconds, memory)]


def find_ways(layer: MoEMlp, routing: Routing, capacity: int, exchange: ExpertExchange) -> dict[str, Way]:
    """The ways of a choice; `capacity` is the number of tokens of the busiest expert."""
    return {
        'sorted': lambda x: dispatch_sorted(x, routing, layer.run_experts),
        'padded': lambda x: dispatch_padded(x, routing, layer.run_stacked, capacity),
        'grouped': lambda x: dispatch_sorted(x, routing, functools.partial(run_grouped, layer)),
        'exchange': lambda x: dispatch_sorted(
            x, routing, functools.partial(exchange.run, run=layer.run_experts)),
    }


def run_grouped(layer: MoEMlp, chunks: list[torch.Tensor]) -> list[torch.Tensor]:
    """What `run_experts` returns, each of the two maps of all experts in one product."""
    sizes = [len(chunk) for chunk in chunks]
    rows = torch.tensor(sizes, device=chunks[0].device)
    y = layer.act(grouped_linear(torch.cat(chunks), *layer.fc1.local(), rows))
    return list(grouped_linear(y, *layer.fc2.local(), rows).split([size for size in sizes if size]))


@contextlib.contextmanager
def exchange_of_one() -> Iterator[ExpertExchange]:
    """An exchange among this process alone, in a group made for it where there is none."""
    if dist.is_initialized():
        yield ExpertExchange()
        return
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield ExpertExchange()
    finally:
        dist.destroy_process_group()
