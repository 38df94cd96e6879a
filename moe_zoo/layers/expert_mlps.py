"""What the layers of E small MLPs share: stacked weights, groups of tokens, checks of keywords.

Letters: B images, D width, M hidden width of an expert, T routed tokens (of the whole batch), E experts, S tokens a
group, C tokens of an expert.
"""
import numbers
from typing import List, Mapping, Optional, Tuple, Type, Union

import torch
from timm.layers import to_2tuple
from torch import nn
from torch.nn import functional as F

from ..errors import InputError, nearest
from ..losses import LOSSES
from ..routing.dispatch import wants_static_shapes
from .fast_linear import can_group, grouped_linear, linear, uses_onednn
from .routed import RoutedLayer, tokens_inside, unbind_biases


class ExpertLinear(nn.Module):
    """E linear maps in one stack: weight (E, out, in), bias (E, out).

    The attribute is called `bias` so that timm exempts it from weight decay, as it does by name where ndim > 1.

    Args:
        same_init: All experts start from one draw, as in V-MoE, where routing alone breaks the symmetry.
    """

    def __init__(
            self,
            num_experts: int,
            in_features: int,
            out_features: int,
            bias: bool = True,
            same_init: bool = True,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_experts = num_experts
        self.same_init = same_init
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features, **dd))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features, **dd)) if bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier uniform on an expert's own fans, biases N(0, 1e-6), as the original's MLP."""
        draws = 1 if self.same_init else self.num_experts
        for parameter in (self.weight, self.bias):
            if parameter is None:
                continue
            drawn = torch.empty_like(parameter[:draws])
            for one in drawn:
                if one.ndim == 2:
                    nn.init.xavier_uniform_(one)
                else:
                    nn.init.normal_(one, std=1e-6)
            parameter.copy_(drawn.expand_as(parameter))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (E, C, in), row e for expert e. Returns (E, C, out)."""
        weight, bias = self.local()
        if bias is None:
            return torch.bmm(x, weight.transpose(1, 2))
        return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))

    def local(self) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """Weight and bias of the experts that this process holds: of all, unless several processes share them."""
        return self.weight, self.bias

    def unbind(self) -> Tuple[List[torch.Tensor], List[Optional[torch.Tensor]]]:
        """The weights and the biases of `local`, one by one."""
        # One unbind, whose backward is one stack with zeros for experts that were not run. Indexing weight[e] instead
        # would make every gradient a zero tensor of the whole stack.
        weight, bias = self.local()
        return list(weight.unbind(0)), unbind_biases(bias, weight.shape[0])

    def extra_repr(self) -> str:
        experts, outs, ins = self.weight.shape
        return f'{ins}, {outs}, num_experts={experts}, bias={self.bias is not None}'


class Glu(nn.Module):
    """A gated linear unit: one half of the channels, activated, times the other.

    Args:
        act: Of the gating half.
        half: Which one that is: 'first' as in SwiGLU, 'last' as in timm's GluMlp.

    Shapes:
        (..., 2 M) -> (..., M).

    Raises:
        InputError: `half` is neither.
    """
    first: torch.jit.Final[bool]

    def __init__(self, act: nn.Module, half: str):
        super().__init__()
        if half not in ('first', 'last'):
            raise InputError(f"glu={half!r}: use 'first' or 'last', the half that gates, or None.")
        self.act = act
        self.first = half == 'first'

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, dim=-1)
        return self.act(a) * b if self.first else a * self.act(b)


class ExpertMlps(RoutedLayer):
    """E MLPs in stacks and the grouping of tokens: what `MoEMlp` and `SoftMoEMlp` share."""

    def __init__(
            self,
            in_features: int,
            hidden_features: int,
            out_features: Optional[int],
            act_layer: Type[nn.Module],
            norm_layer: Optional[Type[nn.Module]],
            bias: Union[bool, Tuple[bool, bool]],
            drop: Union[float, Tuple[float, float]],
            use_conv: bool,
            num_experts: int,
            group_images: int,
            group_size: Optional[int],
            same_init: bool,
            bfloat16_dispatch: bool,
            glu: Optional[str] = None,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        check_at_least_one(group_images=group_images, group_size=group_size)
        self.in_features = in_features
        self.hidden_features = hidden_features  # M
        self.out_features = out_features or in_features
        self.use_conv = use_conv
        self.num_experts = num_experts
        self.group_images = group_images
        self.group_size = group_size
        self.bfloat16_dispatch = bfloat16_dispatch
        self.exchange = None  # an `ExpertExchange` where other processes hold some of the experts
        bias = to_2tuple(bias)
        drop = to_2tuple(drop)
        self.glu = glu
        widths = self.hidden_features * (2 if glu else 1)
        self.fc1 = ExpertLinear(self.num_experts, in_features, widths, bias[0], same_init, **dd)
        self.act = Glu(act_layer(), glu) if glu else act_layer()
        self.drop1 = nn.Dropout(drop[0])
        self.norm = norm_layer(self.hidden_features, **dd) if norm_layer is not None else nn.Identity()
        self.fc2 = ExpertLinear(self.num_experts, self.hidden_features, self.out_features, bias[1], same_init, **dd)
        self.drop2 = nn.Dropout(drop[1])

    def run_experts(self, chunks: List[torch.Tensor]) -> List[torch.Tensor]:
        """Chunk e, (T_e, D), through expert e. Returns (T_e, out_features) for the chunks that are not empty."""
        nothing = True  # no token at all: run every expert on none, so that gradients exist
        for chunk in chunks:
            nothing = nothing and chunk.shape[0] == 0
        if not torch.jit.is_scripting():
            if can_group(chunks[0], self.fc1.weight, self.fc2.weight) and not nothing:
                return self._run_grouped(chunks)
        weights1, biases1 = self.fc1.unbind()
        weights2, biases2 = self.fc2.unbind()
        outputs: List[torch.Tensor] = []
        for e, chunk in enumerate(chunks):
            if chunk.shape[0] > 0 or nothing:
                y = _linear(self._round(chunk), weights1[e], biases1[e])
                y = self.norm(self.drop1(self.act(y)))
                y = _linear(y, weights2[e], biases2[e])
                outputs.append(self._round(self.drop2(y)))
        return outputs

    @torch.jit.unused
    def _run_grouped(self, chunks: List[torch.Tensor]) -> List[torch.Tensor]:
        """The same with each of the two maps of all experts in one product."""
        sizes = [len(chunk) for chunk in chunks]
        rows = torch.tensor(sizes, device=chunks[0].device)
        y = grouped_linear(self._round(torch.cat(chunks)), *self.fc1.local(), rows)
        y = grouped_linear(self.norm(self.drop1(self.act(y))), *self.fc2.local(), rows)
        return list(self._round(self.drop2(y)).split([size for size in sizes if size]))

    def run_stacked(self, x: torch.Tensor) -> torch.Tensor:
        """(E, C, D), row e through expert e, to (E, C, out_features)."""
        if not torch.jit.is_scripting():
            if self.exchange is None and uses_onednn(x[0], self.fc1.weight[0]):
                return torch.stack(self.run_experts(list(x.unbind(0))))
        y = self.norm(self.drop1(self.act(self.fc1(self._round(x)))))
        return self._round(self.drop2(self.fc2(y)))

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.bfloat16).to(x.dtype) if self.bfloat16_dispatch else x

    def _group_size(self, x: torch.Tensor) -> int:
        """S for a batch (B, ..., D)."""
        group_size = self.group_size
        if group_size is None:
            group_size = self.group_images
            for size in x.shape[1:-1]:
                group_size = group_size * size
        return group_size

    def _inside(self, x: torch.Tensor) -> Optional[torch.Tensor]:
        """(T,) bool, tokens of (B, ..., D) that are no padding; None where all count. Static graphs count all."""
        if wants_static_shapes(x):
            return None
        inside = tokens_inside(x)
        return None if inside is None or bool(inside.all()) else inside

    def _check_groups(self, x: torch.Tensor, num_tokens: int) -> None:
        """Raises: InputError: An explicit group size does not divide the tokens of a batch (B, ..., D)."""
        if self.group_size is not None and num_tokens % self.group_size:
            images = 'one image' if self.group_images == 1 else f'{self.group_images} images'
            raise InputError(
                f'group_size={self.group_size} does not divide the {num_tokens} tokens of a batch of shape '
                f'{tuple(x.shape[:-1])}: use a divisor, or leave it out for groups of {images}.')

    def expert_parameters(self) -> List[List[nn.Parameter]]:
        return [[p] for layer in (self.fc1, self.fc2) for p in layer.parameters()]

    def _expert_macs(self) -> int:
        """MACs of one expert for one token."""
        return self.hidden_features * ((2 if self.glu else 1) * self.in_features + self.out_features)

    def _group_repr(self) -> str:
        return f'group_size={self.group_size}' if self.group_size else f'group_images={self.group_images}'


def group_by_image(model: nn.Module) -> None:
    """Make the tokens of every image a group of their own: capacity, priority and losses then count image by image, and
    no image depends on what else is in its batch. Afterwards `group_images` is 1, whatever the model was built with."""
    for module in model.modules():
        if isinstance(module, ExpertMlps):
            module.group_images, module.group_size = 1, None


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    if torch.jit.is_scripting():
        return F.linear(x, weight, bias)
    else:
        return linear(x, weight, bias)


def check_at_least_one(**values: Optional[int]) -> None:
    """Raises: InputError: A keyword is below 1, or no whole number."""
    for name, value in values.items():
        if value is not None and not isinstance(value, numbers.Integral):
            raise InputError(f'{name}={value!r}: use a whole number.')
        if value is not None and value < 1:
            raise InputError(f'{name}={value}: use at least 1.')


def known_losses(losses: Mapping[str, float]) -> Tuple[Tuple[str, float], ...]:
    """Weights by name as pairs. Raises: InputError: A name is unknown."""
    for loss in losses:
        if loss not in LOSSES:
            raise InputError(f'losses has {loss!r}.{nearest(loss, LOSSES)} Known: {", ".join(LOSSES)}.')
    return tuple(losses.items())
