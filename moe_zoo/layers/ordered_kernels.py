"""Convolutions with a kernel for every image, mixed in the order in which oneDNN, torch's library on a CPU, reads it.

oneDNN copies every kernel that it is given into an order of its own, which for a kernel that meets one small map takes
as long as to convolve. Any order is linear: so the experts are ordered, once a call, and what is mixed of them is in
order. A mixed kernel is used at once, while it is in the cache, and its memory is that of the next.

Letters: B images, C input channels, O output channels, E experts, n elements of a kernel.
"""
import ctypes
from typing import List, NamedTuple, Tuple

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..routing.dispatch import wants_static_shapes

# Elements of the kernels that are mixed at once, some output channels of one image: 1.2 MB, which stay in the cache.
ELEMENTS = 300_000
_HAS_ORDERS = (
    torch.backends.mkldnn.is_available() and 'AVX512' in torch.backends.cpu.get_cpu_capability() and all(
        hasattr(torch.ops.mkldnn, name) for name in (
            'data_ptr', '_nbytes', '_reorder_convolution_weight', '_convolution_pointwise')))


class Geometry(NamedTuple):
    """Of a convolution without groups."""
    out_channels: int
    kernel_size: Tuple[int, int]
    stride: Tuple[int, int]
    padding: Tuple[int, int]
    dilation: Tuple[int, int]


def can_order(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `convolve_ordered` takes this batch and is worth it: float32 on a CPU with AVX-512, without gradients, of
    which no graph is made and which nobody counts; and so many images that ordering E experts is less than ordering B
    kernels."""
    if not _HAS_ORDERS or torch.is_grad_enabled() or wants_static_shapes(x) or is_in_torch_dispatch_mode():
        return False
    if x.device.type != 'cpu' or torch.is_autocast_enabled('cpu') or not torch.backends.mkldnn.enabled:
        return False
    return x.dtype == weight.dtype == torch.float32 and x.shape[0] >= 4 * weight.shape[0]


def convolve_ordered(
        x: torch.Tensor,
        mixture: torch.Tensor,
        weight: torch.Tensor,
        geometry: Geometry,
) -> torch.Tensor:
    """Convolve every image with its mixture of the experts, without gradients.

    Args:
        x: (B, C, H, W).
        mixture: (B, E).
        weight: (E, n), a kernel (O, C, height, width) a row.
        geometry: Of the convolution.

    Returns:
        (B, O, H', W') in channels-last memory.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    O, kernel_size, stride, padding, dilation = geometry
    E, C = weight.shape[0], x.shape[1]
    place = (padding, stride, dilation, 1)
    images, columns = x.split(1), []
    for few in weight.view(E, O, C, *kernel_size).split(_channels(weight, O), dim=1):
        ordered = [
            torch.ops.mkldnn._reorder_convolution_weight(kernel, *place, (1, *x.shape[1:])) for kernel in few.unbind(0)]
        experts = torch.stack([_memory(kernel) for kernel in ordered])
        mixed = ordered[0]  # its memory takes one mixture after the other
        elements = _memory(mixed).unsqueeze(0)
        parts: List[torch.Tensor] = []
        for image, one in zip(images, mixture.split(1)):
            torch.mm(one, experts, out=elements)
            parts.append(torch.ops.mkldnn._convolution_pointwise(image, mixed, None, *place, 'none', [], ''))
        columns.append(torch.cat(parts))
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


def _channels(weight: torch.Tensor, out_channels: int) -> int:
    """Output channels of the kernels that are mixed at once, a multiple of what oneDNN takes together."""
    return max(64, ELEMENTS * out_channels // weight.shape[1] // 64 * 64)


def _memory(ordered: torch.Tensor) -> torch.Tensor:
    """The elements of a kernel in oneDNN's order, to read and write; they live as long as the kernel."""
    size = torch.ops.mkldnn._nbytes(ordered)
    memory = (ctypes.c_char * size).from_address(torch.ops.mkldnn.data_ptr(ordered))
    return torch.frombuffer(memory, dtype=torch.float32)
