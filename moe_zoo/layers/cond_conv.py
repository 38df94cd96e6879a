"""CondConv: convolutions and linear layers whose kernel is mixed, image by image, from the kernels of all experts.

CondConv: Conditionally Parameterized Convolutions for Efficient Inference, Yang, Bender, Le, Ngiam, NeurIPS 2019,
https://arxiv.org/abs/1904.04971. out(x) = (a_1 W_1 + ... + a_E W_E) * x with a = r(x), one vector an image: no top-k,
no auxiliary loss. Parameters are laid out as in timm's CondConv2d, `weight` (E, elements of one kernel) and `bias`
(E, out), so that weights move between the two.

Letters: B images, C input channels, O output channels, H x W positions, E experts.
"""
import functools
import math
from typing import Any, List, Optional, Tuple

import torch
from timm.layers import CondConv2d as TimmCondConv2d
from timm.layers import Conv2dSame, pad_same, register_notrace_module
from torch import nn
from torch.nn import functional as F

from ..errors import InputError, nearest
from ..routing import SigmoidRouter, SoftmaxRouter, check_num_selected, record
from ..routing.routers import becomes_onnx
from .ordered_kernels import Geometry, can_order, convolve_ordered
from .routed import RoutedLayer, masked_mean

# Where the decision of a block comes from. The paper compares such functions; their exact definitions were not at hand,
# so those but 'sigmoid', the paper's default, and 'softmax' are this project's, and no fidelity is claimed for them.
# Layers outside the chain of blocks (head convolution, classifier) have a router of their own in every case.
ROUTE_FNS = {
    'sigmoid': 'every block decides for itself: sigmoid of one linear map of its pooled input (default)',
    'softmax': 'the same with a softmax',
    'single': 'the first block decides, all later ones reuse its decision',
    'partially_shared': 'every other block decides, the block after it reuses the decision',
    'hidden_small': 'sigmoid after a hidden ReLU layer of C / 8 units',
    'hidden_medium': 'sigmoid after a hidden ReLU layer of C units',
    'hidden_large': 'sigmoid after a hidden ReLU layer of 8 C units',
    'hierarchical': 'sigmoid of one linear map of the pooled input and the decision of the block before, concatenated',
}
_HIDDEN_RATIO = {'hidden_small': 1 / 8, 'hidden_medium': 1., 'hidden_large': 8.}
CHAINED = ('single', 'partially_shared', 'hierarchical')  # a block needs the decision of the one before it


def create_routing_fn(
        route_fn: str,
        in_features: int,
        num_experts: int,
        position: int = 0,
        device=None,
        dtype=None,
) -> Optional[SigmoidRouter]:
    """The router of one layer.

    Args:
        route_fn: A key of `ROUTE_FNS`.
        in_features: Channels of the layer's input, C.
        num_experts: E.
        position: Place of the layer in its chain of CondConv blocks, from 0; layers outside a chain are at 0.

    Returns:
        A router of (B, C) features, or None where the decision of the block before is reused.

    Raises:
        InputError: `route_fn` is unknown or `num_experts` below 1.
    """
    dd = {'device': device, 'dtype': dtype}
    if route_fn not in ROUTE_FNS:
        hint = nearest(route_fn, ROUTE_FNS)
        raise InputError(f'route_fn={route_fn!r} is not one of {", ".join(ROUTE_FNS)}.{hint}')
    check_num_selected(num_experts, num_experts)
    if (route_fn == 'single' and position > 0) or (route_fn == 'partially_shared' and position % 2 == 1):
        return None
    if route_fn == 'softmax':
        return SoftmaxRouter(in_features, num_experts, **dd)
    if route_fn in _HIDDEN_RATIO:
        hidden_features = max(1, int(in_features * _HIDDEN_RATIO[route_fn]))
        return SigmoidRouter(in_features, num_experts, hidden_features=hidden_features, **dd)
    if route_fn == 'hierarchical' and position > 0:
        in_features += num_experts
    return SigmoidRouter(in_features, num_experts, **dd)


@functools.cache
def convolutions_beat_matmul() -> bool:
    """Whether this CPU multiplies matrices at half the speed of its convolutions.

    True for AMD's with AVX-512, which oneDNN's convolutions use and MKL, behind torch.bmm, does not. Measured there,
    two threads, 1 x 1 from 512 to 128 channels on 14 x 14, 8 and 32 images, time over that of a plain convolution: bmm
    2.0 and 1.9, convolutions 1.35 and 1.25. On Intel's CPUs bmm was at or below the plain convolution.
    """
    capabilities = getattr(torch.cpu, 'get_capabilities', dict)()  # younger than the oldest torch that timm takes
    amd = str(capabilities.get('cpu_name', '')).startswith('AMD')
    return amd and torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == 'AVX512'


@register_notrace_module
class CondConv2d(TimmCondConv2d):
    """Convolution with a kernel mixed for every image; takes the place of timm's CondConv2d, weights included.

    The kernels are mixed first, then every image meets its own: for 1 x 1 in a batched matrix product (or in a
    convolution, on CPUs where that is faster: `convolutions_beat_matmul`), otherwise in a convolution with B x groups
    groups. On CPU larger batches go in several calls (`_call_size`), without gradients image by image with kernels in
    the library's own order (`ordered_kernels`), or, where maps are small, every expert runs and the outputs are mixed
    (`_few_positions`).
    Under torch.compile, export and on meta tensors it is one call whatever B. `forward_reference` and
    `forward_experts` compute the same in the two plain ways; the tests hold `forward` to them.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: int or (height, width).
        stride: int or (height, width).
        padding: int, (height, width), or timm's '' (symmetric), 'same' (TensorFlow's), 'valid'.
        dilation: int or (height, width).
        groups: As in nn.Conv2d.
        bias: Mixed like the kernel where present.
        num_experts: E.

    Shapes:
        x (B, C, H, W), routing_weights (B, E) -> (B, O, H', W').
    """

    def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size=3,
            stride=1,
            padding='',
            dilation=1,
            groups: int = 1,
            bias: bool = False,
            num_experts: int = 4,
            device=None,
            dtype=None,
    ):
        check_num_selected(num_experts, num_experts)
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, num_experts,
            device=device, dtype=dtype)
        # 'same' padding of a 1 x 1 kernel is none, whatever the stride.
        self.pointwise = self.kernel_size == (1, 1) and groups == 1 and self.padding == (0, 0)
        self.depthwise = groups == in_channels
        self.images_per_call = 8
        self.weights_per_call = 2_500_000
        self.weights_kept = 5_000_000  # of a batch, for backward; where there are more they are mixed again

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, num_experts: int, **kwargs) -> 'CondConv2d':
        """A layer of the same geometry, device and dtype, with fresh experts. `kwargs` go to the constructor."""
        return cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
            padding='same' if isinstance(conv, Conv2dSame) else conv.padding,
            dilation=conv.dilation, groups=conv.groups, bias=conv.bias is not None, num_experts=num_experts,
            device=conv.weight.device, dtype=conv.weight.dtype, **kwargs)

    def forward(self, x: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
        return self.convolve(x, routing_weights)

    def convolve(self, x: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
        """What `forward` does, under a name that a subclass with another `forward` can call."""
        routing_weights = routing_weights.to(self.weight.dtype)
        if not torch.jit.is_scripting():
            if x.shape[0] == 0:  # which would be a convolution of no groups
                return self.forward_experts(x, routing_weights)
        if self.pointwise:
            if not torch.jit.is_scripting():
                # Maps in contiguous memory would have to be copied: 1.3 to 1.6 of the time of `_convolve_pointwise`.
                nhwc = x.is_contiguous(memory_format=torch.channels_last)
                if nhwc and can_order(x, self.weight) and convolutions_beat_matmul():
                    return self._convolve_ordered(x, routing_weights)
            return self._convolve_pointwise(x, routing_weights)
        if not torch.jit.is_scripting():
            if self._few_positions(x):
                return self.forward_experts(x, routing_weights)
        if self.dynamic_padding:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        if not torch.jit.is_scripting():
            if becomes_onnx():
                return self._convolve_windows(x, routing_weights)
            if self.groups == 1 and can_order(x, self.weight):
                return self._convolve_ordered(x, routing_weights)
        return self._convolve_in_calls(x, routing_weights, self.stride)

    def _few_positions(self, x: torch.Tensor) -> bool:
        """Whether it is faster to run every expert and to mix the outputs: many images, each of few positions.

        Time then goes into the mixed kernels, one an image, not into convolving. Measured on CPU, 3 x 3 with 512
        channels, 8 and 32 images, time of all experts over that of mixed kernels, forward and training:

        | experts, map | 4, 2x2   | 4, 4x4        | 8, 4x4     | 4, 7x7   |
        | ------------ | -------- | ------------- | ---------- | -------- |
        | 8 images     | 0.4, 0.6 | 0.7, 0.7      | 1.2, 1.2   | 1.3, 1.4 |
        | 32 images    |          | 0.5, 0.5      | 0.9, 0.7   |          |
        """
        if x.device.type != 'cpu' or self.groups > 1 or torch.compiler.is_compiling():
            return False
        _, _, H, W = self.output_shape(x.shape)
        return x.shape[0] >= self.images_per_call and self.num_experts * H * W <= 128

    def _convolve_in_calls(
            self,
            x: torch.Tensor,
            routing_weights: torch.Tensor,
            stride: Tuple[int, int],
    ) -> torch.Tensor:
        """One library call for every few images and output channels; x is padded where the padding is dynamic.

        For backward kernels are kept up to `weights_kept`, 20 MB a layer, and output channels then stay together: 3 x 3
        with 256 channels and 8 images 0.95, 1 x 1 with 32 images 0.92 of the time of mixing them again.
        """
        images, channels = self._call_size(x)
        again = False
        if not torch.jit.is_scripting():
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a graph is for every number of images
                again = x.shape[0] * self.weight.shape[1] > self.weights_kept
                if not again:
                    channels = self.out_channels
        if images >= x.shape[0] and channels >= self.out_channels:
            return self._convolve_grouped(x, routing_weights, self.weight, self.bias, stride)
        if not torch.jit.is_scripting():
            if again and self.bias is None and not torch.is_autocast_enabled('cpu'):
                return _MixAgain.apply(x, routing_weights, self.weight, self, stride)
        return self._convolve_calls(x, routing_weights, images, channels, stride)

    def _convolve_calls(
            self,
            x: torch.Tensor,
            routing_weights: torch.Tensor,
            images: int,
            channels: int,
            stride: Tuple[int, int],
    ) -> torch.Tensor:
        # split, whose backward writes the gradient of the whole stack once, not w[:, i:j], which does so every time
        weights = self.weight.split(self.weight.shape[1] // self.out_channels * channels, dim=1)
        columns: List[torch.Tensor] = []
        for j, weight in enumerate(weights):
            bias: Optional[torch.Tensor] = None
            if self.bias is not None:
                bias = self.bias.split(channels, dim=1)[j]
            parts: List[torch.Tensor] = []
            mixtures = routing_weights.split(images)
            for i, few in enumerate(x.split(images)):
                parts.append(self._convolve_grouped(few, mixtures[i], weight, bias, stride))
            columns.append(parts[0] if len(parts) == 1 else torch.cat(parts))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)

    def _call_size(self, x: torch.Tensor) -> Tuple[int, int]:
        """Images and output channels of a call: all of them, but on CPU at most 8 images and 10 MB of mixed kernels.

        Larger buffers leave the cache, and glibc returns them to the system after every call: most of the time is then
        spent on page faults. All the images of a call share one pass over the experts. Measured with two threads, time
        over that of a plain convolution, forward and training, beside that of a single call, which is timm's:

        | 3 x 3                                | in calls | one call |
        | ------------------------------------ | -------- | -------- |
        | 256 channels, 14x14, 4 experts, B 8  | 1.7, 1.6 | 1.7, 1.6 |
        | 256 channels, 14x14, 4 experts, B 32 | 1.7, 1.7 | 2.7, 2.5 |
        | 512 channels, 7x7, 8 experts, B 8    | 3.8, 4.3 | 8.0, 7.5 |
        | 512 channels, 7x7, 8 experts, B 32   | 4.0, 4.5 | 8.5, 7.9 |
        """
        everything = (x.shape[0], self.out_channels)
        if not torch.jit.is_scripting():
            if torch.compiler.is_compiling():
                return everything
        if x.device.type != 'cpu' or self.depthwise:
            return everything
        images = max(1, min(x.shape[0], self.images_per_call))
        fitting = self.weights_per_call * self.out_channels // (images * self.weight.shape[1])
        if self.groups > 1 or fitting >= self.out_channels:
            return images, self.out_channels
        return images, max(16, fitting // 16 * 16)

    def _convolve_ordered(self, x: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
        geometry = Geometry(self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation)
        out = convolve_ordered(x, routing_weights, self.weight, geometry)
        if self.bias is not None:
            out = out + torch.matmul(routing_weights, self.bias)[:, :, None, None]
        return out

    def _convolve_pointwise(self, x: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
        if self.stride[0] > 1 or self.stride[1] > 1:
            x = x[:, :, ::self.stride[0], ::self.stride[1]]
        B, C, H, W = x.shape
        nhwc = x.is_contiguous(memory_format=torch.channels_last)
        if not torch.jit.is_scripting():
            if x.device.type == 'cpu' and not torch.compiler.is_compiling() and convolutions_beat_matmul():
                one_thread = torch.get_num_threads() == 1
                if B == 1 and not one_thread:  # as it lies, 0.9 to 0.97 of the time of a row
                    return self._convolve_grouped(x, routing_weights, self.weight, self.bias, (1, 1))
                # As one row of H x W positions: the library's blocks along a row are then full. On one thread torch
                # leaves a 1 x 1 convolution to MKL unless it has a stride, which one along an axis of length one is:
                # 0.5 to 0.8 of the time. On two threads training would take 1.4 times as long.
                stride = (2 if one_thread else 1, 1)
                out = self._convolve_in_calls(x.reshape(B, C, 1, H * W), routing_weights, stride)
                return out.reshape(B, self.out_channels, H, W)
        weight = torch.matmul(routing_weights, self.weight).reshape(B, self.out_channels, C)
        if nhwc:
            out = torch.bmm(x.permute(0, 2, 3, 1).reshape(B, H * W, C), weight.transpose(1, 2))  # (B, HW, O)
            if self.bias is not None:
                out = out + torch.matmul(routing_weights, self.bias).unsqueeze(1)
            return out.reshape(B, H, W, self.out_channels).permute(0, 3, 1, 2)
        out = torch.bmm(weight, x.reshape(B, C, H * W))  # (B, O, HW)
        if self.bias is not None:
            out = out + torch.matmul(routing_weights, self.bias).unsqueeze(2)
        return out.reshape(B, self.out_channels, H, W)

    def _convolve_grouped(
            self,
            x: torch.Tensor,
            routing_weights: torch.Tensor,
            weight: torch.Tensor,
            bias: Optional[torch.Tensor],
            stride: Tuple[int, int],
    ) -> torch.Tensor:
        """All images as groups of one convolution, with the experts' kernels of some output channels or of all."""
        B, C, H, W = x.shape
        weight = torch.matmul(routing_weights, weight).reshape(
            -1, C // self.groups, self.kernel_size[0], self.kernel_size[1])
        if bias is not None:
            bias = torch.matmul(routing_weights, bias).reshape(-1)
        out = F.conv2d(
            x.reshape(1, B * C, H, W), weight, bias, stride, self.padding, self.dilation, self.groups * B)
        return out.reshape(B, out.shape[1] // B, out.shape[2], out.shape[3])

    def _convolve_windows(self, x: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
        """Every position of a kernel as a shifted map, then one matrix product an image and group; x as above.

        For ONNX, whose convolutions have a number of groups that is written down, and so would the batch be.
        """
        (height, width), (down, right), (rows, columns) = self.kernel_size, self.stride, self.dilation
        x = F.pad(x, (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        B, C = x.shape[:2]
        H = (x.shape[2] - rows * (height - 1) - 1) // down + 1
        W = (x.shape[3] - columns * (width - 1) - 1) // right + 1
        shifted = torch.stack([
            x[:, :, i:i + down * (H - 1) + 1:down, j:j + right * (W - 1) + 1:right]
            for i in range(0, rows * height, rows) for j in range(0, columns * width, columns)], dim=2)
        weight = torch.matmul(routing_weights, self.weight).reshape(
            B * self.groups, self.out_channels // self.groups, -1)
        out = torch.bmm(weight, shifted.reshape(B * self.groups, -1, H * W)).reshape(B, self.out_channels, H, W)
        return out if self.bias is None else out + torch.matmul(routing_weights, self.bias).view(B, -1, 1, 1)

    def forward_reference(self, x: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
        """Mix, then convolve, one image after the other: the definition."""
        routing_weights = routing_weights.to(self.weight.dtype)
        outputs = []
        for image, a in zip(x.split(1), routing_weights.unbind(0)):
            bias = None if self.bias is None else a @ self.bias
            outputs.append(self._convolve_plain(image, a @ self.weight, bias))
        return torch.cat(outputs)

    def forward_experts(self, x: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
        """Run every expert on every image, then mix what comes out: equal, because convolution is linear in W."""
        routing_weights = routing_weights.to(self.weight.dtype)
        out = 0.
        for e, (weight, a) in enumerate(zip(self.weight.unbind(0), routing_weights.unbind(1))):
            bias = None if self.bias is None else self.bias.unbind(0)[e]
            y = self._convolve_plain(x, weight, bias)
            out = out + a.view(-1, 1, 1, 1).to(y.dtype) * y  # under autocast y is narrower than a
        return out

    def _convolve_plain(self, x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
        if self.dynamic_padding:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return F.conv2d(x, weight.view(self.weight_shape), bias, self.stride, self.padding, self.dilation, self.groups)

    def output_shape(self, input_shape: Tuple[int, ...]) -> Tuple[int, int, int, int]:
        """(B, C, H, W) to (B, O, H', W')."""
        size = []
        for n, k, s, p, d in zip(input_shape[2:], self.kernel_size, self.stride, self.padding, self.dilation):
            size.append(-(-n // s) if self.dynamic_padding else (n + 2 * p - d * (k - 1) - 1) // s + 1)
        return input_shape[0], self.out_channels, size[0], size[1]

    def macs(self, input_shape: Tuple[int, ...]) -> int:
        """MACs of mixing the kernels and of the convolution, for all images of the input."""
        B, _, H, W = self.output_shape(input_shape)
        mixing = self.weight.numel() + (0 if self.bias is None else self.bias.numel())
        return B * (mixing + H * W * math.prod(self.weight_shape))

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, {self.out_channels}, num_experts={self.num_experts}, kernel_size={self.kernel_size}, '
            f'stride={self.stride}, padding={"same" if self.dynamic_padding else self.padding}, '
            f'dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}')


class _MixAgain(torch.autograd.Function):
    """`CondConv2d._convolve_calls` without bias, whose backward mixes the kernels of a call again.

    Kept, the kernels of a batch are B times a kernel for every layer, memory that has to be fetched from the system in
    every step; mixed again, the kernels of a call and their gradient are still in the cache when the experts' is taken.
    """

    @staticmethod
    def forward(x: torch.Tensor, a: torch.Tensor, weight: torch.Tensor, layer: CondConv2d, stride: Tuple[int, int]):
        return layer._convolve_calls(x, a, *layer._call_size(x), stride)

    @staticmethod
    def setup_context(ctx: Any, inputs: Tuple, output: torch.Tensor) -> None:
        x, a, weight, ctx.layer, ctx.stride = inputs
        ctx.save_for_backward(x, a, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor):
        x, a, weight = ctx.saved_tensors
        layer, of_x = ctx.layer, ctx.needs_input_grad[0]
        images, channels = layer._call_size(x)
        if torch.is_grad_enabled():  # to be differentiated again
            leaves = [t for t, needed in zip((x, a, weight), ctx.needs_input_grad) if needed]
            out = layer._convolve_calls(x, a, images, channels, ctx.stride)
            found = iter(torch.autograd.grad(out, leaves, grad, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None
        grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if of_x else None
        grad_a, grad_weight = torch.zeros_like(a), torch.zeros_like(weight)
        width = weight.shape[1] // layer.out_channels * channels
        for j, (experts, slope) in enumerate(zip(weight.split(width, dim=1), grad_weight.split(width, dim=1))):
            for i in range(0, x.shape[0], images):
                few, mixture = x[i:i + images], a[i:i + images]
                of_few, of_kernels, _ = torch.ops.aten.convolution_backward(
                    grad[i:i + images, j * channels:(j + 1) * channels].reshape(1, -1, *grad.shape[2:]),
                    few.reshape(1, -1, *x.shape[2:]),
                    torch.mm(mixture, experts).view(-1, x.shape[1] // layer.groups, *layer.kernel_size),
                    None, ctx.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups * len(few),
                    (of_x, True, False))
                of_kernels = of_kernels.view(len(few), -1)
                slope.addmm_(mixture.t(), of_kernels)
                grad_a[i:i + images].addmm_(of_kernels, experts.t())
                if of_x:
                    grad_x[i:i + images] += of_few.view_as(few)
        return grad_x, grad_a, grad_weight, None, None


class MixingLayer(RoutedLayer):
    """A routed layer that decides once an image how to mix its experts: the router, expert dropout and the record.

    Expert dropout: in training every expert of every image is dropped with probability `expert_drop_rate` and the
    others are scaled by 1 / (1 - rate), which keeps the expected kernel; an image may lose all of them.

    Attributes:
        routing_fn: The router, or None where the decision of the layer before is reused.
        takes_previous: Whether the router also sees the decision of the layer before.
    """
    takes_previous: torch.jit.Final[bool]

    def set_routing(
            self,
            in_features: int,
            num_experts: int,
            route_fn: str = 'sigmoid',
            expert_drop_rate: float = 0.,
            position: int = 0,
            device=None,
            dtype=None,
    ) -> None:
        """Make the router. To be called by the constructor of a subclass, after nn.Module's own.

        Raises:
            InputError: An unknown `route_fn`, `num_experts` below 1, or a rate outside [0, 1).
        """
        if not 0. <= expert_drop_rate < 1.:
            raise InputError(f'expert_drop_rate={expert_drop_rate}: choose a probability of at least 0 and below 1.')
        router = create_routing_fn(route_fn, in_features, num_experts, position, device=device, dtype=dtype)
        self.set_router(router, num_experts, expert_drop_rate, route_fn == 'hierarchical' and position > 0)

    def set_router(
            self,
            router: Optional[SigmoidRouter],
            num_experts: int,
            expert_drop_rate: float = 0.,
            takes_previous: bool = False,
    ) -> None:
        """The same for a router that exists."""
        self.routing_fn = router
        self.num_experts = self.num_selected = num_experts
        self.expert_drop_rate = float(expert_drop_rate)
        self.takes_previous = takes_previous

    def route(self, x: torch.Tensor, previous: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Decide, and record the decision.

        Args:
            x: (B, C, H, W), or (B, C) where it is pooled already.
            previous: (B, E) decision of the layer before, for layers that reuse or extend it.

        Returns:
            (B, E) weights, float32.
        """
        if self.routing_fn is not None:
            return self._decide(x, previous)
        else:  # spelled out: TorchScript then leaves the branch that cannot be taken alone
            if previous is None:
                raise RuntimeError('this block reuses the routing weights of the block before it: hand them over')
            return previous

    def _decide(self, x: torch.Tensor, previous: Optional[torch.Tensor]) -> torch.Tensor:
        if torch.jit.is_scripting():
            pooled = x.mean(dim=(2, 3)) if x.dim() == 4 else x
        else:
            pooled = masked_mean(x) if x.dim() == 4 else x
        if self.takes_previous:
            assert previous is not None
            pooled = torch.cat([pooled, previous.to(pooled.dtype)], dim=1)
        if torch.jit.is_scripting():
            return self.drop_experts(self.routing_fn.mix(pooled)[1])
        else:
            routing = self.routing_fn(pooled)
            routing = routing._replace(weights=self.drop_experts(routing.weights))
            record(self, routing)
            return routing.weights

    def drop_experts(self, weights: torch.Tensor) -> torch.Tensor:
        if self.expert_drop_rate > 0.:
            weights = F.dropout(weights, self.expert_drop_rate, self.training)
        return weights

    def router_macs(self, num_images: int) -> int:
        return 0 if self.routing_fn is None else self.routing_fn.macs(num_images)


class MixedConv2d(MixingLayer, CondConv2d):
    """A CondConv2d with a router of its own, which the constructor of a subclass makes: drop-in for nn.Conv2d."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolve(x, self.route(x))

    def expert_parameters(self) -> List[List[nn.Parameter]]:
        return [[p] for p in (self.weight, self.bias) if p is not None]

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        return self.router_macs(input_shape[0]) + self.macs(input_shape)


class RoutedConv2d(MixedConv2d):
    """CondConv for a convolution that stands outside a block.

    Args: As in `CondConv2d`, then `route_fn` and `expert_drop_rate`.
    """

    def __init__(self, in_channels: int, *args, route_fn: str = 'sigmoid', expert_drop_rate: float = 0., **kwargs):
        super().__init__(in_channels, *args, **kwargs)
        self.set_routing(
            in_channels, self.num_experts, route_fn, expert_drop_rate,
            device=self.weight.device, dtype=self.weight.dtype)


@register_notrace_module
class CondLinear(MixingLayer):
    """A linear layer mixed for every image by a router of its own: the paper's classifier, a 1 x 1 CondConv.

    One image is computed by mixing the matrix, E + 1 times O x C MACs; several by one product with all experts and a
    mix of the E results, which is as much to compute but never holds B mixed matrices (7 times faster at 32 images).

    Args:
        in_features: C.
        out_features: O.
        bias: Mixed like the matrix.
        num_experts: E.
        route_fn: As in `create_routing_fn`; a linear layer decides for itself whatever the chain.
        expert_drop_rate: As in `MixingLayer`.

    Shapes:
        (B, C) -> (B, O).
    """

    def __init__(
            self,
            in_features: int,
            out_features: int,
            bias: bool = True,
            num_experts: int = 8,
            route_fn: str = 'sigmoid',
            expert_drop_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.in_features = in_features
        self.out_features = out_features
        self.set_routing(in_features, num_experts, route_fn, expert_drop_rate, **dd)
        self.weight = nn.Parameter(torch.empty(num_experts, out_features * in_features, **dd))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, **dd)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation for every expert: uniform within 1 / sqrt(C), matrix and bias."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        routing_weights = self.route(x).to(self.weight.dtype)
        if x.shape[0] == 1:
            weight = torch.matmul(routing_weights, self.weight).reshape(1, self.out_features, self.in_features)
            out = torch.bmm(weight, x.unsqueeze(2)).squeeze(2)
        else:
            out = self._mix_outputs(x, routing_weights)
        if self.bias is not None:
            out = out + torch.matmul(routing_weights, self.bias)
        return out

    def _mix_outputs(self, x: torch.Tensor, routing_weights: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.weight.reshape(self.num_experts * self.out_features, self.in_features))
        out = out.reshape(x.shape[0], self.num_experts, self.out_features)
        return torch.bmm(routing_weights.to(out.dtype).unsqueeze(1), out).squeeze(1)

    def expert_parameters(self) -> List[List[nn.Parameter]]:
        return [[p] for p in (self.weight, self.bias) if p is not None]

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        B = input_shape[0]
        mixing = self.weight.numel() + (0 if self.bias is None else self.bias.numel())
        return self.router_macs(B) + B * (mixing + self.in_features * self.out_features)

    def extra_repr(self) -> str:
        return f'{self.in_features}, {self.out_features}, num_experts={self.num_experts}, bias={self.bias is not None}'
