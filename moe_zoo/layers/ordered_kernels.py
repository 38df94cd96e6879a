"""Convolutions with a kernel for every image, mixed in the order in which oneDNN, torch's library on a CPU, reads it.

oneDNN copies every kernel that it is given into an order of its own, which for a kernel that meets one small map takes
as long as to convolve. Any order is linear: so the experts are ordered, once a call, and what is mixed of them is in
order. A mixed kernel is used at once, while it is in the cache, and its memory is that of the next.

Letters: B images, C input channels, O output channels, E experts, n elements of a kernel.
"""
import ctypes
from typing import Any, List, NamedTuple, Tuple

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from ..routing.dispatch import wants_static_shapes

# Elements of the kernels that are mixed at once, some output channels of one image: 1.2 MB, which stay in the cache.
ELEMENTS = 300_000
_IMAGES = 4  # whose gradients of kernels become gradients of experts at once
_POSITIONS = 256  # Up to here a kernel's gradient is faster as a matrix product than as oneDNN's gradient.
_HAS_ORDERS = (
    torch.backends.mkldnn.is_available() and 'AVX512' in torch.backends.cpu.get_cpu_capability() and all(
        hasattr(torch.ops.mkldnn, name) for name in (
            'data_ptr', '_nbytes', '_reorder_convolution_weight', '_convolution_pointwise', '_linear_pointwise')))


class Geometry(NamedTuple):
    """Of a convolution without groups."""
    out_channels: int
    kernel_size: Tuple[int, int]
    stride: Tuple[int, int]
    padding: Tuple[int, int]
    dilation: Tuple[int, int]


def can_order(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `convolve_ordered` takes this batch and is worth it: float32 on a CPU with AVX-512, of which no graph is
    made and which nobody counts; and so many images that ordering E experts is less than ordering B kernels."""
    if not _HAS_ORDERS or wants_static_shapes(x) or is_in_torch_dispatch_mode():
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
    """Convolve every image with its mixture of the experts.

    Args:
        x: (B, C, H, W).
        mixture: (B, E).
        weight: (E, n), a kernel (O, C, height, width) a row.
        geometry: Of the convolution.

    Returns:
        (B, O, H', W') in channels-last memory.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if torch.is_grad_enabled():
        return _ConvolveOrdered.apply(x, mixture, weight, geometry)
    return _convolve(x, mixture, weight, geometry)


def _convolve(x: torch.Tensor, mixture: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> torch.Tensor:
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


class _ConvolveOrdered(torch.autograd.Function):
    """`_convolve`, whose backward mixes the kernels of a few images again: nothing of their size is kept."""

    @staticmethod
    def forward(x: torch.Tensor, mixture: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> torch.Tensor:
        return _convolve(x, mixture, weight, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple, output: torch.Tensor) -> None:
        x, mixture, weight, ctx.geometry = inputs
        ctx.save_for_backward(x, mixture, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        x, mixture, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            needed = ctx.needs_input_grad[:3]
            leaves = [leaf for leaf, wanted in zip((x, mixture, weight), needed) if wanted]
            out = _convolve_plainly(x, mixture, weight, ctx.geometry)
            found = iter(torch.autograd.grad(out, leaves, grad, create_graph=True))
            return *(next(found) if wanted else None for wanted in needed), None
        grad = grad.contiguous(memory_format=torch.channels_last)
        return *_gradients(x, mixture, weight, ctx.geometry, grad, ctx.needs_input_grad[0]), None


def _convolve_plainly(x: torch.Tensor, mixture: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    O, kernel_size, stride, padding, dilation = geometry
    kernels = torch.mm(mixture, weight).view(x.shape[0], O, x.shape[1], *kernel_size)
    return torch.cat([
        F.conv2d(image, kernel, None, stride, padding, dilation)
        for image, kernel in zip(x.split(1), kernels.unbind(0))])


def _gradients(
        x: torch.Tensor,
        mixture: torch.Tensor,
        weight: torch.Tensor,
        geometry: Geometry,
        grad: torch.Tensor,
        of_x: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (or None), mixture and weight; x and grad are in channels-last memory."""
    O, (height, width), *place = geometry
    E, C = weight.shape[0], x.shape[1]
    # (E, O, height, width, C): the order in which kernels meet maps in channels-last memory, and their windows too
    experts = weight.view(E, O, C, height, width).permute(0, 1, 3, 4, 2).reshape(E, -1)
    of_experts, of_mixture = torch.empty_like(experts), torch.zeros_like(mixture)
    of_images = torch.zeros_like(x) if of_x else None
    slopes = grad.permute(0, 2, 3, 1).flatten(1, 2)  # (B, H'W', O)
    channels, row = _channels(weight, O), height * width * C
    kernels = weight.new_empty(min(_IMAGES, x.shape[0]), min(channels, O) * row)
    for i in range(0, x.shape[0], _IMAGES):
        images, few = x[i:i + _IMAGES].split(1), mixture[i:i + _IMAGES]
        windows = [_windows(image, geometry) for image in images] if slopes.shape[1] <= _POSITIONS else None
        for j in range(0, O, channels):
            part = slice(j * row, (j + channels) * row)
            mixed = torch.mm(few, experts[:, part])
            found = kernels.flatten()[:mixed.numel()].view_as(mixed)
            for b, image in enumerate(images):
                slope = grad[i + b:i + b + 1, j:j + channels].contiguous(memory_format=torch.channels_last)
                kernel = mixed[b].view(-1, height, width, C).permute(0, 3, 1, 2)
                of_image, of_kernel, _ = torch.ops.aten.convolution_backward(
                    slope, image, kernel, None, *place, False, (0, 0), 1, (of_x, windows is None, False))
                if of_x:
                    of_images[i + b:i + b + 1] += of_image
                if windows is None:
                    of_kernel = of_kernel.permute(0, 2, 3, 1)
                else:
                    of_kernel = torch.ops.mkldnn._linear_pointwise(
                        slopes[i + b, :, j:j + channels].t(), windows[b].t(), None, 'none', [], '')
                found[b].view_as(of_kernel).copy_(of_kernel)
            if i == 0:
                of_experts[:, part] = few.t() @ found
            else:
                of_experts[:, part].addmm_(few.t(), found)
            of_mixture[i:i + _IMAGES].addmm_(found, experts[:, part].t())
    return of_images, of_mixture, of_experts.view(E, O, height, width, C).permute(0, 1, 4, 2, 3).reshape(E, -1)


def _windows(image: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    """(1, C, H, W) in channels-last memory to (H'W', height x width x C): what a kernel sees at every position."""
    _, (height, width), (down, right), padding, (rows, columns) = geometry
    x = F.pad(image.permute(0, 2, 3, 1)[0], (0, 0, padding[1], padding[1], padding[0], padding[0]))
    H = (x.shape[0] - rows * (height - 1) - 1) // down + 1
    W = (x.shape[1] - columns * (width - 1) - 1) // right + 1
    line, place, channel = x.stride()
    return x.as_strided(
        (H, W, height, width, x.shape[2]), (line * down, place * right, line * rows, place * columns, channel),
    ).reshape(H * W, -1)
