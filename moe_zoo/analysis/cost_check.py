"""The same count by fvcore, which traces a model instead of watching it run: where the two differ, and why.

fvcore counts some operators that are free by our convention, and passes over others with a warning; a third kind of
difference is one that nothing here explains, and that deserves a look at both.
"""
import contextlib
import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InputError, MissingPackage
from .cost import count
from .cost_counter import evaluation
from .cost_routed import chooses, outermost

CONVOLUTION, PRODUCT, ATTENTION = 'convolution', 'matrix product', 'attention'
DEFORMABLE = 'deformable convolution'
# fvcore's names of operators
PRODUCTS = {'addmm', 'bmm', 'einsum', 'linear', 'matmul', 'mm'}
FREE = {
    'adaptive_avg_pool2d': 'pooling', 'batch_norm': 'normalisation', 'grid_sampler': 'interpolation',
    'group_norm': 'normalisation', 'instance_norm': 'normalisation', 'layer_norm': 'normalisation',
    'upsample_bilinear2d': 'interpolation', 'upsample_nearest2d': 'interpolation',
}
# What of the operators that fvcore passes over can hold a product; the others are elementwise or move data.
UNKNOWN_PRODUCTS = (
    'attention', 'addbmm', 'addmv', 'baddbmm', 'bilinear', 'cdist', 'chain_matmul', 'deform_conv', 'dot', 'einsum',
    'grouped_mm', 'gru', 'lstm', 'mv', 'PythonOp', 'rnn', 'tensordot', 'trilinear', 'CallFunction', 'CallMethod')


@dataclass(frozen=True)
class Comparison:
    """MACs of one kind of operator by both counters, on the same input.

    Attributes:
        operator: Kind of operator: 'convolution', 'matrix product', 'attention', or fvcore's name of it.
        ours: As `count` has it.
        fvcore: As fvcore has it.
        why: Cause of the difference; empty where there is none.
        explained: False where no cause is known.
    """
    operator: str
    ours: int
    fvcore: int
    why: str = ''
    explained: bool = True


def check_with_fvcore(model: nn.Module, inputs: Any) -> list[Comparison]:
    """Count by both, operator by operator.

    Routed layers show a tracer their padded path, because it cannot follow a choice; where a model holds some, ours is
    therefore the count on meta tensors, on which they take that path too.

    Args:
        model: As in `count`, but not on the meta device, where nothing can be traced.
        inputs: A tensor, or a tuple of tensors.

    Raises:
        MissingPackage: fvcore is not installed.
        InputError: fvcore cannot trace the model; the message has our count.
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    padded = any(chooses(layer) for layer in outermost(model).values())
    cost = count(*_on_meta(model, arguments)) if padded else count(model, arguments)
    theirs, passed_over, added = _trace(model, arguments, cost.macs_executed)
    ours = Counter()
    for operator, macs in cost.by_operator.items():
        ours[_kind(operator)] += macs
    ours[ATTENTION] += added[ATTENTION]  # the matrix products that it is counted as
    ours[PRODUCT] -= added[ATTENTION]
    note = 'both on the padded path of the routed layers' if padded else ''
    rows = [_compare(kind, ours[kind], theirs[kind], added, passed_over, note) for kind in _kinds(ours, theirs)]
    return [row for row in rows if row.ours or row.fvcore]


def _kinds(ours: Counter, theirs: Counter) -> list[str]:
    return list(dict.fromkeys([CONVOLUTION, PRODUCT, ATTENTION, DEFORMABLE, *ours, *theirs]))


def _kind(operator: str) -> str:
    """The kind of one of our operators: 'aten.convolution', 'torchvision.deform_conv2d', a matrix product."""
    if 'deform_conv' in operator:
        return DEFORMABLE
    if 'conv' in operator:
        return CONVOLUTION
    return PRODUCT


def _compare(kind: str, ours: int, theirs: int, added: Counter, passed_over: Counter, note: str) -> Comparison:
    if ours == theirs:
        return Comparison(kind, ours, theirs, note if kind in (CONVOLUTION, PRODUCT) else '')
    if kind in FREE:
        return Comparison(kind, ours, theirs, f'{FREE[kind]} is free by our convention')
    if kind in added and ours == added[kind]:
        return Comparison(kind, ours, theirs, 'fvcore passes over it; its closed form is ours')
    unknown = ', '.join(f'{op} ({calls} x)' for op, calls in sorted(passed_over.items()))
    if ours > theirs and unknown:
        return Comparison(kind, ours, theirs, f'fvcore passes over {unknown}')
    return Comparison(kind, ours, theirs, 'no cause is known', explained=False)


def _trace(model: nn.Module, arguments: tuple, counted: int) -> tuple[Counter, Counter, Counter]:
    """fvcore's MACs by kind, how often it met operators that it does not know and that may hold a product, and the
    closed forms of those that are known here, which it is taught for this call."""
    try:
        from fvcore.nn import FlopCountAnalysis
    except ImportError as error:
        raise MissingPackage('fvcore is not installed: pip install fvcore.') from error
    analysis = FlopCountAnalysis(model, arguments)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings('none')
    analysis.set_op_handle(**HANDLES)
    try:
        with evaluation(model), _plain_attention():
            by_operator, passed_over = analysis.by_operator(), analysis.unsupported_ops()
    except Exception as error:  # of whatever kind: any model may be traced
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip('.')
        raise InputError(
            f'fvcore cannot trace {type(model).__name__}, of which {counted:,} MACs were counted: {reason}.') from error
    theirs, added = Counter(), Counter()
    for operator, macs in by_operator.items():
        if operator in (ATTENTION, DEFORMABLE):
            added[operator] += round(macs)
        else:
            kind = CONVOLUTION if operator == 'conv' else PRODUCT if operator in PRODUCTS else operator
            theirs[kind] += round(macs)
    products = Counter({op: n for op, n in passed_over.items() if any(word in op for word in UNKNOWN_PRODUCTS)})
    return theirs, products, added


def _attention_macs(inputs: list, outputs: list) -> Counter:
    """Two products for every query: with all keys, and of the weights with all values."""
    query, key, value = (value.type().sizes() for value in inputs[:3])
    return Counter({ATTENTION: math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])})


def _deformable_macs(inputs: list, outputs: list) -> Counter:
    weight, out = inputs[1].type().sizes(), outputs[0].type().sizes()
    return Counter({DEFORMABLE: math.prod(weight) * out[0] * math.prod(out[2:])})


HANDLES = {'aten::scaled_dot_product_attention': _attention_macs, 'torchvision::deform_conv2d': _deformable_macs}


def _on_meta(model: nn.Module, arguments: tuple) -> tuple[nn.Module, tuple]:
    """A copy of the model without memory, and its arguments."""
    memo: dict[int, Any] = {id(b): b.to('meta') for b in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach().to('meta'), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo), torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda x: x.to('meta'), arguments)


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """nn.MultiheadAttention as its parts: the native fast path is one operator to a tracer."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
