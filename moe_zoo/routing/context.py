"""How records leave the layers: a context that the outermost forward opens for one call.

Layers call `record` unconditionally; it does nothing where no context is open, so nothing is left on a module.
The tensor operations of a layer must not depend on an open context: non-re-entrant gradient checkpointing recomputes
the forward after it has closed.
"""
import contextlib
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .types import Routing


class RoutingContext:
    """One open context.

    Attributes:
        records: (layer, Routing) pairs in the order of execution.
        image_sizes: (B, 2) true height and width of every image in a padded batch, or None.
        padded_size: (height, width) of the padded batch, or None.
    """

    def __init__(
            self,
            image_sizes: Optional[torch.Tensor] = None,
            padded_size: Optional[Tuple[int, int]] = None,
            isolated: bool = False,
    ):
        self.records: List[Tuple[nn.Module, Routing]] = []
        self.image_sizes = image_sizes
        self.padded_size = padded_size
        self.isolated = isolated

    @property
    def routings(self) -> List[Routing]:
        return [routing for _, routing in self.records]

    def add(self, module: nn.Module, routing: Routing) -> None:
        self.records.append((module, routing))


# Open contexts, innermost last. One process forwards one model at a time: not meant for threads.
_OPEN: List[RoutingContext] = []


class routing_context:
    """Collect the records of everything that runs inside.

    >>> with routing_context() as context:
    ...     logits = model(images)
    >>> context.routings

    Args:
        image_sizes: (B, 2) true height and width of every image, for gates that pool a padded batch.
        padded_size: (height, width) of that batch; required with `image_sizes`.
        isolated: Keep the records from contexts opened outside (used by `checkpoint_routed`).
    """

    def __init__(
            self,
            image_sizes: Optional[torch.Tensor] = None,
            padded_size: Optional[Tuple[int, int]] = None,
            isolated: bool = False,
    ):
        self.context = RoutingContext(image_sizes, padded_size, isolated)

    def __enter__(self) -> RoutingContext:
        _OPEN.append(self.context)
        return self.context

    def __exit__(self, *exc_info) -> None:
        _OPEN.pop()


class _Unheard(RoutingContext):
    """The outermost context of a process, until a layer in training speaks: then it knows whether anybody listens."""

    def __init__(self, tell: Callable[[nn.Module, Routing], None]):
        super().__init__()
        self.tell = tell

    def add(self, module: nn.Module, routing: Routing) -> None:
        if torch.compiler.is_compiling() or not (module.training and torch.is_grad_enabled()):
            return
        if routing.losses or any(hasattr(m, 'end_step') or hasattr(m, 'set_epoch') for m in module.modules()):
            _OPEN.remove(self)
            if not _OPEN:
                self.tell(module, routing)


def on_unheard(tell: Callable[[nn.Module, Routing], None]) -> None:
    """Call `tell` at most once: where the first routed layer in training that wants auxiliary losses or notices of
    steps and epochs is heard by no context, so that a loop which knows nothing of them is training it."""
    _OPEN.insert(0, _Unheard(tell))


def record(module: nn.Module, routing: Routing) -> None:
    """Hand a layer's decision to every open context. Does nothing where none is open."""
    for context in reversed(_OPEN):
        context.add(module, routing)
        if context.isolated:
            break


def current_image_sizes() -> Optional[Tuple[torch.Tensor, Tuple[int, int]]]:
    """((B, 2) true sizes, padded (height, width)) of the batch being run, or None where nothing is padded."""
    for context in reversed(_OPEN):
        if context.image_sizes is not None:
            return context.image_sizes, context.padded_size
    return None


@contextlib.contextmanager
def trace_routing(model: nn.Module) -> Iterator[Dict[str, List[Routing]]]:
    """Watch the routers of any model without touching its code.

    >>> with trace_routing(model) as trace:
    ...     model(images)
    >>> trace['blocks.5.mlp'][0].indices

    Args:
        model: Any module that holds routed layers of this package, wrapped or not.

    Returns:
        Module name to the list of its records, detached, in execution order; filled as the model runs.
    """
    context = _TraceContext(model)
    _OPEN.append(context)
    try:
        yield context.trace
    finally:
        _OPEN.remove(context)


class _TraceContext(RoutingContext):
    """Files records by the name of their layer, and keeps no graph."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {id(module): name for name, module in model.named_modules()}
        self.trace: Dict[str, List[Routing]] = {}

    def add(self, module: nn.Module, routing: Routing) -> None:
        name = self.names.get(id(module))
        if name is not None:
            self.trace.setdefault(name, []).append(routing.detach())


def checkpoint_routed(function: Callable, *inputs: torch.Tensor, use_reentrant: bool = False) -> Any:
    """Gradient checkpointing that keeps the gradient of auxiliary losses, re-entrant or not.

    Records made inside leave the checkpointed region as outputs of it, which is the only way that survives every kind
    of checkpointing, and are then handed to the contexts outside.

    Args:
        function: Takes and returns tensors; may hold routed layers.
        inputs: Its arguments.
        use_reentrant: As in `torch.utils.checkpoint.checkpoint`.

    Returns:
        What `function` returns.
    """
    layers: List[Tuple[nn.Module, List[int], Routing]] = []
    # The recomputation runs after the outer context has closed, and must still see the image sizes.
    sizes = current_image_sizes() or (None, None)

    def run(*args):
        with routing_context(*sizes, isolated=True) as context:
            outputs = function(*args)
        flat: List[torch.Tensor] = []
        layers.clear()
        for module, routing in context.records:
            positions = [i for i, field in enumerate(routing) if isinstance(field, torch.Tensor)]
            flat.extend(routing[i] for i in positions)
            # Only the plain fields are kept here: the tensors travel as outputs.
            plain = Routing(*(None if isinstance(f, torch.Tensor) else f for f in routing))
            layers.append((module, positions, plain))
        return (outputs, *flat)

    outputs, *flat = checkpoint(run, *inputs, use_reentrant=use_reentrant)
    tensors = iter(flat)
    for module, positions, plain in layers:
        fields = list(plain)
        for i in positions:
            fields[i] = next(tensors)
        record(module, Routing(*fields))
    return outputs
