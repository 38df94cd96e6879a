"""One counted forward pass: MACs, activations, bytes and whatever nobody counted, by module and operator.

torch's `FlopCounterMode` counts the MACs, with attention as its two matrix products. Below it, where decompositions
have become the operators that really run, `_Watch` sees the rest.
"""
import contextlib
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from ..layers.routed import RoutedLayer
from ..routing import Routing, trace_routing
from .cost_formulas import FORMULAS, is_free, op_name
from .cost_routed import outermost

ByOperator = dict[str, dict[str, int]]  # module name to operator name to a number


class Tally:
    """What a forward pass in evaluation mode cost, once it has run inside `counting`.

    Attributes:
        calls: Name of an outermost routed layer to (shape of its input, MACs executed inside) of every call.
        trace: Name of a layer to its routing records.
        peak: Bytes, as `forward_memory` measures them.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.root = type(model).__name__
        self.calls: dict[str, list[tuple[tuple[int, ...], int]]] = {}
        self.trace: dict[str, list[Routing]] = {}
        self.peak = 0
        self._flops = FlopCounterMode(display=False, custom_mapping=FORMULAS)
        self._watch: _Watch | None = None

    @contextlib.contextmanager
    def counting(self, inputs: Any) -> Iterator[None]:
        """Count what runs inside; `inputs` are there already, and so not what it allocates."""
        memory = LiveBytes([*self.model.parameters(), *self.model.buffers(), *_tensors(inputs)])
        self._watch = _Watch(self._flops, memory)
        with evaluation(self.model), _countable_attention(), self._routed_calls(), trace_routing(self.model) as trace:
            self.trace = trace
            try:
                with self._watch.attention, self._watch, self._flops:
                    yield
            finally:
                self.peak = memory.peak

    @property
    def replaced_attention(self) -> bool:
        """Whether attention ran as two matrix products where the model would have run a fused kernel."""
        return self._watch.attention.seen

    @property
    def innermost(self) -> str:
        """The module that is running, or was when an error ended the pass."""
        return self._relative(_innermost(self._flops))

    def macs(self) -> ByOperator:
        """Executed MACs; '' is the whole model."""
        counts = self._flops.get_flop_counts()
        return self._by_module({m: {op_name(op): n // 2 for op, n in ops.items()} for m, ops in counts.items()})

    def activations(self) -> ByOperator:
        """Elements that matrix products and convolutions put out."""
        return self._by_module(self._watch.activations)

    def uncounted(self) -> dict[str, tuple[str, ...]]:
        """Operators nobody counted to the modules that called them."""
        return {op: tuple(sorted(map(self._relative, where))) for op, where in self._watch.uncounted.items()}

    def _relative(self, name: str) -> str:
        """The tracker's names begin with the class of the model ('Global' is everything): make them the model's own."""
        return '' if name in ('Global', self.root) else name.removeprefix(f'{self.root}.')

    def _by_module(self, counts: ByOperator) -> ByOperator:
        """Names of the model; the tracker has its class beside 'Global', which holds as much or more."""
        rows = {self._relative(name): dict(ops) for name, ops in counts.items() if name != self.root}
        return {'': {}, **rows}

    @contextlib.contextmanager
    def _routed_calls(self) -> Iterator[None]:
        handles = []

        def watch(name: str, layer: RoutedLayer) -> None:
            started = []

            def before(module, args, kwargs):
                started.append(self._flops.get_total_flops())

            def after(module, args, kwargs, output):
                x = args[0] if args else next(iter(kwargs.values()))
                executed = (self._flops.get_total_flops() - started.pop()) // 2
                self.calls.setdefault(name, []).append((tuple(x.shape), executed))

            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after, with_kwargs=True))

        try:
            for name, layer in outermost(self.model).items():
                watch(name, layer)
            yield
        finally:
            for handle in handles:
                handle.remove()


def forward_memory(model: nn.Module, run: Callable[[], Any], inputs: Any) -> int:
    """Bytes of all tensors that are alive at one time, at most, while `run` runs the model in evaluation mode.

    Parameters, buffers and inputs are among them. What kernels allocate for themselves is not: no tensor holds it.
    """
    memory = LiveBytes([*model.parameters(), *model.buffers(), *_tensors(inputs)])
    with evaluation(model), _Bytes(memory):
        run()
    return memory.peak


class LiveBytes:
    """Bytes of the storages that tensors share, from when they are first met until torch frees them.

    Attributes:
        peak: The most at one time.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]):
        self.now = self.peak = 0
        self._alive: set[int] = set()
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: torch.Tensor) -> None:
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # a sparse or nested tensor: none of its own
            return
        key = storage._cdata
        if key in self._alive:
            return
        self._alive.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


class _Bytes(TorchDispatchMode):
    """Shows every output to a `LiveBytes`."""
    supports_higher_order_operators = True

    def __init__(self, memory: LiveBytes):
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for tensor in _tensors(out):
            self.memory.add(tensor)
        return out


class _Watch(_Bytes):
    """Sees what really ran below the counter: counts what it puts out, and files what nobody counted."""

    def __init__(self, counter: FlopCounterMode, memory: LiveBytes):
        super().__init__(memory)
        self.counter = counter
        self.attention = _Attention()
        self.activations: ByOperator = defaultdict(lambda: defaultdict(int))
        self.uncounted: dict[str, set[str]] = defaultdict(set)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(func, types, args, kwargs)
        packet = getattr(func, '_overloadpacket', func)
        if packet in self.counter.flop_registry:
            made = next(iter(_tensors(out)), None)  # a fused kernel returns statistics for the backward pass behind it
            for module in self.counter.mod_tracker.parents:
                self.activations[module][op_name(packet)] += 0 if made is None else made.numel()
        elif not is_free(func, packet, args, kwargs or {}):
            self.uncounted[op_name(packet)].add(_innermost(self.counter))
        return out


class _Attention(TorchFunctionMode):
    """Notes whether the model calls attention that has fused kernels."""
    FUSED = {F.scaled_dot_product_attention, F.multi_head_attention_forward}

    def __init__(self):
        super().__init__()
        self.seen = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen |= func in self.FUSED
        return func(*args, **kwargs or {})


def _innermost(counter: FlopCounterMode) -> str:
    return max(counter.mod_tracker.parents, key=lambda name: (name != 'Global', name.count('.')))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's and parameter's own flag back afterwards."""
    training = [module for module in model.modules() if module.training]
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in trained:  # a parameter as an argument of a module trips torch's module tracker otherwise
        p.requires_grad_(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for p in trained:
            p.requires_grad_(True)


@contextlib.contextmanager
def _countable_attention() -> Iterator[None]:
    """Attention as its two matrix products: the fused kernels for CPU and the native fast path hide them."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
