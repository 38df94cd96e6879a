"""`MoEConv2d`: k of N convolutions an image, drop-in for a convolution of anyone's CNN.

The Conv-MoE layer of Pavlitska et al. 2022 (arXiv 2204.10598): experts are whole convolutions, with one gate a layer.
Letters: B images, C input channels, O output channels, E experts, K chosen experts an image, G groups.
"""
import math
from typing import Callable, List, Optional, Sequence, Tuple

import torch
from timm.layers import Conv2dSame, pad_same, register_notrace_module, to_2tuple
from timm.layers.padding import get_padding_value
from torch import nn
from torch.nn import functional as F

from ..errors import InputError
from ..routing import Routing
from .cond_conv import CondConv2d
from .image_moe import ImageMoE, must_be_static, weigh
from .moe_stage import perturbed
from .routed import unbind_biases


@register_notrace_module
class MoEConv2d(ImageMoE):
    """y_b = sum over the K experts chosen for image b of weight_bk * (W_k * x_b + bias_k).

    An expert meets only the images that chose it, all of them in one library call; one that no image chose runs
    nothing and gets zero gradients. On meta tensors, under compilation and export, and in TorchScript every expert
    meets every image.

    The weights of a dense convolution, found under this layer's name, become those of every expert, each moved a little
    (`perturb`), because equal experts would stay equal.

    Args:
        in_channels: C.
        out_channels: O.
        kernel_size: int or (height, width).
        stride: int or (height, width).
        padding: int, (height, width), or timm's '' (symmetric), 'same' (TensorFlow's), 'valid'.
        dilation: int or (height, width).
        groups: G.
        bias: One an expert and channel.
        num_experts: E.
        num_selected: K.
        gate, constraint, constraint_value, noise, losses: As in `MoEStage`.
        perturb: Size of the noise that separates copies of a dense kernel, relative to its standard deviation.

    Shapes:
        weight (E, O, C / G, height, width), bias (E, O); (B, C, H, W) -> (B, O, H', W').

    Raises:
        InputError: K is not between 1 and E, an unknown gate or constraint, or groups that do not divide the channels.
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
            num_selected: int = 2,
            gate: str = 'gap_fc',
            constraint: Optional[str] = 'importance',
            constraint_value: Optional[float] = None,
            noise: Optional[bool] = None,
            losses: Sequence[Tuple[str, float]] = (),
            perturb: float = 0.1,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise InputError(f'groups={groups} does not divide {in_channels} input and {out_channels} output channels.')
        self.set_gate(
            in_channels, num_experts, num_selected, gate, constraint, constraint_value, noise, losses, **dd)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = to_2tuple(kernel_size)
        self.stride = to_2tuple(stride)
        value, self.dynamic_padding = get_padding_value(padding, kernel_size, stride=stride, dilation=dilation)
        self.padding = to_2tuple(value)
        self.dilation = to_2tuple(dilation)
        self.groups = groups
        self.perturb = perturb
        shape = (num_experts, out_channels, in_channels // groups, *self.kernel_size)
        self.weight = nn.Parameter(torch.empty(shape, **dd))
        self.bias = nn.Parameter(torch.empty(num_experts, out_channels, **dd)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, num_experts: int = 4, **kwargs) -> 'MoEConv2d':
        """A layer of the same geometry, device and dtype, with fresh experts. `kwargs` go to the constructor."""
        return cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
            padding='same' if isinstance(conv, Conv2dSame) else conv.padding,
            dilation=conv.dilation, groups=conv.groups, bias=conv.bias is not None, num_experts=num_experts,
            **dict(dict(device=conv.weight.device, dtype=conv.weight.dtype), **kwargs))

    def reset_parameters(self) -> None:
        """nn.Conv2d's initialisation for every expert: uniform within 1 / sqrt(fan in), kernel and bias."""
        bound = 1 / math.sqrt(math.prod(self.weight.shape[2:]))
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, O, H', W')."""
        if torch.jit.is_scripting():
            return self.convolve_all(x, self.gate_weights(x))
        else:
            routing = self.route(x)
            return self.convolve_reference(x, routing) if must_be_static(x) else self.convolve_sparse(x, routing)

    def convolve_all(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Every expert on every image, weighed by a (B, E) matrix."""
        parts: List[torch.Tensor] = []
        biases = unbind_biases(self.bias, self.num_experts)
        for e, weight in enumerate(self.weight.unbind(0)):
            parts.append(weigh(self.convolve(x, weight, biases[e]), matrix[:, e]))
        return torch.stack(parts).sum(dim=0)

    def convolve_reference(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The same for a record: shape-static, E / K times the cost."""
        return self.convolve_all(x, routing.combine_matrix())

    def convolve_sparse(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Every expert on the images that chose it. Which ones is data: not for compiled graphs."""
        parts, position = self.group(x, routing)
        run_all = torch.jit.is_tracing() or x.shape[0] == 0
        # One unbind, whose backward is one stack with zeros for idle experts: indexing weight[e] would make every
        # gradient a zero tensor of the whole stack.
        experts = zip(parts, self.weight.unbind(0), unbind_biases(self.bias, self.num_experts))
        outputs = [self.convolve(part, weight, bias) for part, weight, bias in experts if run_all or len(part)]
        return self.combine(outputs, position, routing.weights)

    def convolve(self, x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
        """One expert: (B, C, H, W) and (O, C / G, height, width) to (B, O, H', W')."""
        if self.dynamic_padding:
            x = pad_same(x, self.kernel_size, self.stride, self.dilation)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    output_shape = CondConv2d.output_shape  # the same attributes describe the same geometry

    def expert_parameters(self) -> List[List[nn.Parameter]]:
        return [[p] for p in (self.weight, self.bias) if p is not None]

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        """MACs of the gate and of K convolutions for every image of (B, C, H, W)."""
        return self.gate_macs(input_shape[0]) + self.num_selected * self._expert_macs(input_shape)

    def spared_macs(self, input_shape: Tuple[int, ...], load: Sequence[float]) -> float:
        """Convolutions of the images for which fewer than K experts ran."""
        return (self.num_selected - sum(load)) * self._expert_macs(input_shape)

    def _expert_macs(self, input_shape: Tuple[int, ...]) -> int:
        """MACs of one expert on every image."""
        B, _, H, W = self.output_shape(input_shape)
        return B * H * W * math.prod(self.weight.shape[1:])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], *args, **kwargs) -> 'MoEConv2d':
        """The kernels of all experts as one of 4 axes: `to(memory_format=torch.channels_last)` refuses 5."""
        def apply(t: torch.Tensor) -> torch.Tensor:
            return fn(t.flatten(0, 1)).unflatten(0, t.shape[:2]) if t.dim() == 5 else fn(t)
        return super()._apply(apply, *args, **kwargs)

    def _load_from_state_dict(self, state_dict, prefix: str, *args) -> None:
        for name, parameter in (('weight', self.weight), ('bias', self.bias)):
            value = state_dict.get(prefix + name)
            if value is not None and parameter is not None and value.shape == parameter.shape[1:]:
                copies = [perturbed(value, name, e, self.perturb) for e in range(self.num_experts)]
                state_dict[prefix + name] = torch.stack(copies)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f'{self.in_channels}, {self.out_channels}, num_experts={self.num_experts}, '
            f'num_selected={self.num_selected}, kernel_size={self.kernel_size}, stride={self.stride}, '
            f'padding={"same" if self.dynamic_padding else self.padding}, dilation={self.dilation}, '
            f'groups={self.groups}, bias={self.bias is not None}')
