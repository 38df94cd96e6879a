"""Linear maps of experts by the fastest kernel that there is for them.

On a CPU torch multiplies float32 matrices by MKL, which on processors that are not Intel's leaves AVX-512 unused:
oneDNN, which torch uses for convolutions, is twice as fast on an AMD EPYC. On CUDA the maps of all experts are one
grouped matrix product in bfloat16.

Letters: T rows, D width in, M width out, E experts.
"""
from typing import Any, Optional, Tuple

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..routing.dispatch import wants_static_shapes

# Multiply-accumulates of a thread from which on oneDNN is called. It prepares itself for every shape that is new to it,
# and the number of an expert's rows changes from batch to batch: that takes as long as MKL takes for this many.
ONEDNN_MACS = 1 << 25
_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
    and 'AVX512' in torch.backends.cpu.get_cpu_capability())


def linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """F.linear: (T, D), (M, D) and (M,) to (T, M)."""
    if uses_onednn(x, weight):
        if torch.is_grad_enabled():
            return _OneDnnLinear.apply(x, weight, bias)
        return _multiply(x, weight, bias)
    return F.linear(x, weight, bias)


def uses_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `linear` calls oneDNN: large float32 products on a CPU with AVX-512, of which no graph is made and which
    nobody counts, since counters do not know the operator."""
    if not _HAS_ONEDNN or wants_static_shapes(x) or is_in_torch_dispatch_mode():
        return False
    if x.device.type != 'cpu' or torch.is_autocast_enabled('cpu') or not torch.backends.mkldnn.enabled:
        return False
    macs = x.shape[0] * weight.numel()
    return x.dtype == weight.dtype == torch.float32 and macs >= ONEDNN_MACS * torch.get_num_threads()


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')


class _OneDnnLinear(torch.autograd.Function):

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
        return _multiply(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple, output: torch.Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (  # by `linear`, so that they can be differentiated again
            linear(grad, weight.t()) if of_x else None,
            linear(grad.t(), x.t()) if of_weight else None,
            grad.sum(dim=0) if of_bias else None)


def can_group(x: torch.Tensor, *weights: torch.Tensor) -> bool:
    """Whether torch's grouped matrix product takes these experts, (E, M, D) each: on CUDA from compute capability 8.0
    on, in bfloat16, be it by autocast, with rows of whole 16 bytes."""
    if not x.is_cuda or not hasattr(F, 'grouped_mm') or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    return _compute_type(x) == torch.bfloat16 and all(size % 8 == 0 for w in weights for size in w.shape[1:])


def grouped_linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        sizes: torch.Tensor,
) -> torch.Tensor:
    """Rows sorted by expert, each through the linear map of its own, in one product.

    Args:
        x: (T, D).
        weight: (E, M, D).
        bias: (E, M) or None.
        sizes: (E,) int64, rows of every expert.

    Returns:
        (T, M) in the type of the autocast, or that of x.
    """
    dtype = _compute_type(x)
    y = F.grouped_mm(x.to(dtype), weight.to(dtype).transpose(1, 2), offs=sizes.cumsum(0).to(torch.int32))
    if bias is None:
        return y
    return y + bias.to(dtype).repeat_interleave(sizes, dim=0, output_size=x.shape[0])


def _compute_type(x: torch.Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
