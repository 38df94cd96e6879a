"""What `tools/benchmark.py model` and `compile` time: routed models beside dense twins, compiled ones beside eager.

A training step is forward, losses and backward. The optimiser goes over parameters, not over MACs, and mixtures have
many of them: its time stands apart.

Letters: B images.
"""
import contextlib
import copy
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..cards import card, dense_twin
from ..errors import InputError
from ..layers import ChannelGate, MoEMlp, RoutedLayer, sparse_inference
from ..losses import auxiliary_losses
from ..routing import Routing
from .cost import count
from .force import rewrite_routing
from .timing import Settings, comparison, finish, peak_memory

Build = Callable[..., nn.Module]  # name, device, (height, width), keywords


# ---- one model

def make_run(model: nn.Module, x: torch.Tensor, mode: str) -> Callable[[], None]:
    """One forward, or one training step without the optimiser, as a function, finished when it returns."""
    if mode == 'forward':
        return make_forward(model, (x,))
    model.train()
    if hasattr(model, 'set_aux_loss'):
        model.set_aux_loss(True)
    target = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)

    def step() -> None:
        model.zero_grad()
        output = model(x)
        output, routings = output if isinstance(output, tuple) else (output, [])
        sum(auxiliary_losses(routings, target).values(), F.cross_entropy(output, target)).backward()
        finish(x)

    return step


def make_forward(module: nn.Module, inputs: tuple[Any, ...]) -> Callable[[], None]:
    """One forward in evaluation mode, without gradients."""
    module.eval()

    def forward() -> None:
        with torch.inference_mode():
            module(*inputs)
        finish(inputs[0])

    return forward


def memory_of(module: nn.Module, run: Callable[[], None], device: str) -> int:
    """Bytes that a call holds at most beyond weights and input, gradients included."""
    module.zero_grad()
    return peak_memory(run, device)


def optimizer_seconds(models: Sequence[nn.Module], settings: Settings) -> list[list[float]]:
    """Seconds of a step of AdamW in every round, for models that have gradients."""
    def stepping(model: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0., weight_decay=0.)

        def step() -> None:
            optimizer.step()
            finish(next(model.parameters()))

        return step

    return settings.alternate([stepping(model) for model in models]).seconds


def spread_evenly(layer: str, routing: Routing) -> Routing:
    """Item t chooses experts t, t + 1 ... modulo E: as balanced as training can make it.

    Fresh routers send most items to the same few experts, which is faster than any use of the model would be.
    """
    if routing.indices is None or routing.by_expert:
        return routing
    items, ranks = (torch.arange(n, device=routing.indices.device) for n in routing.indices.shape)
    return routing._replace(indices=(items[:, None] + ranks) % routing.num_experts)


# ---- beside its dense twin

def benchmark_model(
        name: str,
        mode: str,
        build: Build,
        settings: Settings,
        batch_size: int = 8,
        img_size: int | None = None,
        equal_macs: bool = False,
        floor: bool = False,
        twin_channels_last: bool = False,
) -> list[dict]:
    """Time one model, its items spread evenly over its experts, against the dense twin that its card names.

    Args:
        name: Of the model.
        mode: 'forward' or 'train'.
        build: Makes a model of a name, a device, a size and keywords.
        settings: How it is timed.
        batch_size: B.
        img_size: Side of the images; None for that of the card.
        equal_macs: Widen the MLPs of the twin until MACs are equal.
        floor: Time also how long it takes to read the weights of the experts once.
        twin_channels_last: Put the twin and its images into channels-last memory, as many of ours do on a CPU by
            themselves: what is left is the cost of routing.

    Returns:
        One row: what was run, the ratio of MACs, the ratio of time, every timing in seconds, memory in bytes.

    Raises:
        InputError: A size that the model does not take, or a model that is dense itself; with `equal_macs`, one that
            has no `MoEMlp`.
    """
    twin, keywords = dense_twin(card(name))
    x = _images(name, batch_size, img_size, settings.device)
    models = [build(each, settings.device, tuple(x.shape[2:]), **own) for each, own in ((name, {}), (twin, keywords))]
    if equal_macs and not widen(models[1], models[0]):
        raise InputError(f'--equal-macs widens MLPs that stand beside a MoEMlp, and {name} has none: leave it out.')
    macs = [count(model, x[:1]).macs_max for model in models]
    images = [x, x]
    if twin_channels_last:
        models[1].to(memory_format=torch.channels_last)
        images[1] = x.contiguous(memory_format=torch.channels_last)
    row = {
        'kind': 'model', 'model': name, 'twin_args': keywords, 'equal_macs': equal_macs, 'live': None,
        'twin_channels_last': twin_channels_last,
        'batch_size': batch_size, 'input_size': list(x.shape[1:]), 'macs_ratio': macs[0] / macs[1]}
    row |= {key: sum(p.numel() for p in model.parameters())
            for key, model in zip(('parameters', 'twin_parameters'), models)}
    with rewrite_routing(models[0], spread_evenly):
        runs = [make_run(model, own, mode) for model, own in zip(models, images)]
        reading = [read_experts(models[0])] if floor else []
        timings = settings.alternate([*runs, *reading])
        memory = [memory_of(model, run, settings.device) for model, run in zip(models, runs)]
    row |= comparison(twin, mode, *timings.seconds[:2], timings.loads, memory)
    if mode == 'train':
        row |= dict(zip(('optimizer_seconds', 'twin_optimizer_seconds'), optimizer_seconds(models, settings)))
    if floor:
        row |= {'reading_seconds': timings.seconds[2], 'expert_bytes': expert_bytes(models[0])}
    return [row]


def _images(name: str, batch_size: int, img_size: int | None, device: str) -> torch.Tensor:
    channels, *own = card(name)['input']['size']
    return torch.rand(batch_size, channels, *((img_size, img_size) if img_size else own), device=device)


def widen(twin: nn.Module, model: nn.Module) -> list[str]:
    """Give a dense twin the MACs of a routed model: its MLPs beside a `MoEMlp` become as wide as K experts.

    The router's own MACs stay a difference, and what else the model has that its twin has not.

    Returns:
        Names of the MLPs; none where the model has no `MoEMlp`.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MoEMlp)}
    for name, layer in layers.items():
        dense = twin.get_submodule(name)
        hidden = (layer.num_selected + layer.num_shared_experts) * layer.hidden_features
        place = {'device': dense.fc1.weight.device, 'dtype': dense.fc1.weight.dtype}
        dense.fc1 = nn.Linear(layer.in_features, hidden, **place)
        dense.fc2 = nn.Linear(hidden, layer.out_features, **place)
    return list(layers)


# ---- the least that mixing costs

def expert_weights(model: nn.Module) -> list[torch.Tensor]:
    """The parameters of the experts of every routed layer."""
    layers = [module for module in model.modules() if isinstance(module, RoutedLayer)]
    return [p.detach() for layer in layers for group in layer.expert_parameters() for p in group]


def expert_bytes(model: nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in expert_weights(model))


def read_experts(model: nn.Module) -> Callable[[], None]:
    """Read the weights of all experts once, by summing them: kernels cannot be mixed in less time than that."""
    weights = expert_weights(model)

    def read() -> None:
        for weight in weights:
            weight.sum()
        finish(weights[0])

    return read


# ---- live channels alone

def benchmark_live(
        name: str,
        share: float,
        build: Build,
        settings: Settings,
        batch_size: int = 1,
        img_size: int | None = None,
) -> list[dict]:
    """Time a model with channel gates that computes its live channels alone, against itself computing and masking all.

    Args:
        share: Of the channels of every gate that are live.

    The others are those of `benchmark_model`.

    Raises:
        InputError: A model without channel gates, or a share that is none.
    """
    if not 0 < share <= 1:
        raise InputError(f'--live {share:g}: give the share of the channels that stay live, above 0 and at most 1.')
    x = _images(name, batch_size, img_size, settings.device)
    masked = build(name, settings.device, tuple(x.shape[2:])).eval()
    gates = [module for module in masked.modules() if isinstance(module, ChannelGate)]
    for gate in gates:
        close(gate, share)
    sliced = copy.deepcopy(masked)
    with sparse_inference(sliced):
        runs = [make_forward(model, (x,)) for model in (sliced, masked)]
        with torch.inference_mode():
            difference = float((sliced(x) - masked(x)).abs().max() / masked(x).abs().max())
        if not difference < 1e-3:
            raise InputError(f'{name}: sliced and masked outputs differ by {difference:g}: their times say nothing.')
        timings = settings.alternate(runs)
        memory = [memory_of(model, run, settings.device) for model, run in zip((sliced, masked), runs)]
    row = {'kind': 'model', 'model': name, 'twin_args': {}, 'equal_macs': False, 'live': share, 'macs_ratio': 1.,
           'batch_size': batch_size, 'input_size': list(x.shape[1:]), 'difference': difference}
    return [row | comparison('all channels, masked', 'forward', *timings.seconds, timings.loads, memory)]


@torch.no_grad()
def close(gate: ChannelGate, share: float) -> None:
    """Leave a share of the channels open, at even distances, whatever the image: mixture weights are never negative."""
    channels = torch.arange(gate.num_experts, device=gate.weight.device)
    is_open = ((channels + 1) * share).floor() > (channels * share).floor()
    gate.weight.copy_(torch.where(is_open, 1., -1.)[:, None].expand_as(gate.weight))


# ---- compiled beside eager

def benchmark_compiled(
        name: str,
        mode: str,
        build: Build,
        settings: Settings,
        batch_size: int = 8,
        img_size: int | None = None,
) -> list[dict]:
    """Time a model under torch.compile against the same model without.

    Returns:
        One row; `compile_seconds` is the first call, compilation into an empty cache included, and `graph_breaks` how
        many times the graph was left.

    Raises:
        InputError: It cannot be compiled.
    """
    x = _images(name, batch_size, img_size, settings.device)
    model = build(name, settings.device, tuple(x.shape[2:]))
    row = {'kind': 'compile', 'model': name, 'batch_size': batch_size, 'input_size': list(x.shape[1:])}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with _empty_cache():
        run = make_run(torch.compile(model), x, mode)
        start = time.perf_counter()
        try:
            run()
        except Exception as error:  # whatever a compiler raises
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(f'{name} cannot be compiled for {mode}: {reason}') from error
        row |= {'compile_seconds': time.perf_counter() - start,
                'graph_breaks': sum(torch._dynamo.utils.counters['graph_break'].values())}
        timings = settings.alternate([run, make_run(model, x, mode)])
    return [row | comparison('eager', mode, *timings.seconds, timings.loads)]


@contextlib.contextmanager
def _empty_cache() -> Iterator[None]:
    """What the compiler keeps goes to a folder of its own for a while, so that everything is compiled anew."""
    variable = 'TORCHINDUCTOR_CACHE_DIR'
    before = os.environ.get(variable)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[variable] = str(Path(folder))
        try:
            yield
        finally:
            os.environ.pop(variable)
            if before is not None:
                os.environ[variable] = before
