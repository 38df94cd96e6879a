"""The blocks of timm's ResNet and EfficientNet families with mixed convolutions, and what CondConv models share.

A block has one router, on its input, for all of its convolutions; shortcut, squeeze-and-excitation and normalisation
stay as they are (CondConv, Yang et al., NeurIPS 2019, https://arxiv.org/abs/1904.04971, section 3). A model is built by
timm as its dense twin; `condition_blocks` then puts the blocks below in place of those from `start_block` on.

Letters: B images, C channels, H x W positions, E experts.
"""
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type

import torch
from timm.layers import register_notrace_module, use_reentrant_ckpt
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from ..errors import InputError
from ..layers.cond_conv import (
    CHAINED,
    ROUTE_FNS,
    CondConv2d,
    CondLinear,
    MixingLayer,
    create_routing_fn,
)
from ..routing import checkpoint_routed
from .staged import RoutedStage, StagedModel


@register_notrace_module
class CondConvBlock(MixingLayer):
    """What the mixed blocks share. Each takes over the parts of a timm block, under the same names.

    Forward takes the block's input (B, C, H, W) and, where another layer decided, its (B, E) `routing_weights`.

    Args:
        block: A timm block; its main convolutions are replaced, the rest is taken over.
        num_experts: E.
        route_fn: A key of `moe_zoo.layers.cond_conv.ROUTE_FNS`.
        expert_drop_rate: Probability of dropping an expert in training.
        position: Place among the CondConv blocks of the model, from 0.

    Raises:
        InputError: The block has an anti-aliasing filter, or a value is out of range.
    """
    convs: Tuple[str, ...] = ()  # names of the convolutions that are mixed, in order

    def __init__(
            self,
            block: nn.Module,
            num_experts: int,
            route_fn: str = 'sigmoid',
            expert_drop_rate: float = 0.,
            position: int = 0,
    ):
        nn.Module.__init__(self)
        self.__dict__.update(block.__dict__)  # submodules and attributes alike
        if not isinstance(block.aa, (nn.Identity, type(None))):
            raise InputError('aa_layer: CondConv blocks have no anti-aliasing; leave it out.')
        first = getattr(block, self.convs[0])
        for name in self.convs:
            setattr(self, name, CondConv2d.from_conv(getattr(block, name), num_experts))
        self.set_routing(
            first.in_channels, num_experts, route_fn, expert_drop_rate, position,
            device=first.weight.device, dtype=first.weight.dtype)
        self.routes_itself = route_fn not in CHAINED

    def mixed_convs(self) -> List[CondConv2d]:
        return [getattr(self, name) for name in self.convs]

    def expert_parameters(self) -> List[List[nn.Parameter]]:
        return [[p] for conv in self.mixed_convs() for p in (conv.weight, conv.bias) if p is not None]

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        """All convolutions of the block; the router too where the block calls it, not where its stage does."""
        macs, shape = 0, input_shape
        for conv in self.mixed_convs():
            macs += conv.macs(shape)
            shape = conv.output_shape(shape)
        if self.routes_itself:
            macs += self.router_macs(input_shape[0])
        mixed = {id(conv) for conv in self.mixed_convs()}
        for name, conv in self.named_modules():
            if isinstance(conv, nn.Conv2d) and id(conv) not in mixed:
                # A shortcut makes the block's output, squeeze-and-excitation one position.
                positions = shape[2] * shape[3] if name.startswith('downsample') else 1
                macs += input_shape[0] * positions * conv.weight.numel()
        return macs


class CondConvBasicBlock(CondConvBlock, BasicBlock):
    """ResNet's block of two 3 x 3 convolutions, both mixed."""
    convs = ('conv1', 'conv2')

    def forward(self, x: torch.Tensor, routing_weights: Optional[torch.Tensor] = None) -> torch.Tensor:
        if routing_weights is None:
            routing_weights = self.route(x)
        shortcut = x
        x = self.conv1(x, routing_weights)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.conv2(x, routing_weights)
        x = self.bn2(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act2(x)


class CondConvBottleneck(CondConvBlock, Bottleneck):
    """ResNet's bottleneck, its three convolutions mixed."""
    convs = ('conv1', 'conv2', 'conv3')

    def forward(self, x: torch.Tensor, routing_weights: Optional[torch.Tensor] = None) -> torch.Tensor:
        if routing_weights is None:
            routing_weights = self.route(x)
        shortcut = x
        x = self.conv1(x, routing_weights)
        x = self.bn1(x)
        x = self.act1(x)
        x = self.conv2(x, routing_weights)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.conv3(x, routing_weights)
        x = self.bn3(x)
        if self.se is not None:
            x = self.se(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        return self.act3(x)


class CondConvDepthwiseSeparable(CondConvBlock, DepthwiseSeparableConv):
    """MobileNetV1's pair of depthwise and pointwise convolution, both mixed."""
    convs = ('conv_dw', 'conv_pw')

    def forward(self, x: torch.Tensor, routing_weights: Optional[torch.Tensor] = None) -> torch.Tensor:
        if routing_weights is None:
            routing_weights = self.route(x)
        shortcut = x
        x = self.conv_dw(x, routing_weights)
        x = self.bn1(x)
        x = self.se(x)
        x = self.conv_pw(x, routing_weights)
        x = self.bn2(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


class CondConvInvertedResidual(CondConvBlock, InvertedResidual):
    """MobileNetV2's inverted residual: expansion, depthwise and projection mixed, squeeze-and-excitation not."""
    convs = ('conv_pw', 'conv_dw', 'conv_pwl')

    def forward(self, x: torch.Tensor, routing_weights: Optional[torch.Tensor] = None) -> torch.Tensor:
        if routing_weights is None:
            routing_weights = self.route(x)
        shortcut = x
        x = self.conv_pw(x, routing_weights)
        x = self.bn1(x)
        x = self.conv_dw(x, routing_weights)
        x = self.bn2(x)
        x = self.se(x)
        x = self.conv_pwl(x, routing_weights)
        x = self.bn3(x)
        if self.has_skip:
            x = self.drop_path(x) + shortcut
        return x


_MIXED: Dict[Type[nn.Module], Type[CondConvBlock]] = {
    BasicBlock: CondConvBasicBlock,
    Bottleneck: CondConvBottleneck,
    DepthwiseSeparableConv: CondConvDepthwiseSeparable,
    InvertedResidual: CondConvInvertedResidual,
}


@register_notrace_module
class ChainedStage(nn.Sequential):
    """A stage that hands the decision of one CondConv block on to the next, and to the next stage."""

    def __init__(self, *blocks: nn.Module):
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(
            self,
            x: torch.Tensor,
            previous: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """x: (B, C, H, W), previous: (B, E) or None. Returns both after the stage."""
        for block in self:
            if hasattr(block, 'routing_fn'):  # isinstance, in the words that TorchScript resolves early
                previous = block.route(x, previous)
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint_routed(block, x, previous, use_reentrant=use_reentrant_ckpt())
                else:
                    x = block(x, previous)
            elif self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_routed(block, x, use_reentrant=use_reentrant_ckpt())
            else:
                x = block(x)
        return x, previous


class CondConvModel(StagedModel):
    """Mixin of the CondConv models, first in the bases of a timm model that has been built as its dense twin.

    A subclass names its classifier; for chained route functions it also runs the chain.
    """
    chained = False  # whether the stages are ChainedStages
    classifier_name = 'classifier'

    def condition(
            self,
            num_experts: int,
            start_block: int,
            cond_fc: bool,
            expert_drop_rate: float,
            route_fn: str,
    ) -> None:
        """Mix the blocks from `start_block` (from 1) to the last, and the classifier.

        Raises:
            InputError: A value out of range, or a route function that this class cannot run.
        """
        num_blocks = sum(len(stage) for stage in self.stages())
        if not 1 <= start_block <= num_blocks + 1:
            raise InputError(
                f'start_block={start_block}: choose between 1 and {num_blocks}, the number of blocks, '
                f'or {num_blocks + 1} to mix none of them.')
        if (route_fn in CHAINED) != self.chained and route_fn in ROUTE_FNS:
            raise InputError(f'{type(self).__name__} does not run route_fn={route_fn!r}; create the model by its name.')
        self.cond_fc = cond_fc
        self.routing_kwargs: Dict[str, Any] = dict(
            num_experts=num_experts, route_fn=route_fn, expert_drop_rate=expert_drop_rate)
        create_routing_fn(route_fn, 1, num_experts)  # refuses bad values where no block would
        stage_cls = ChainedStage if self.chained else RoutedStage
        index = 0
        for parent, name in self.stage_slots():
            blocks = list(getattr(parent, name))
            for i, block in enumerate(blocks):
                index += 1
                if index >= start_block:
                    blocks[i] = _MIXED[type(block)](block, position=index - start_block, **self.routing_kwargs)
            setattr(parent, name, stage_cls(*blocks))
        self.condition_classifier()

    def condition_classifier(self) -> None:
        """Put a mixed classifier in the place of a linear one."""
        linear = getattr(self, self.classifier_name)
        if self.cond_fc and isinstance(linear, nn.Linear):
            mixed = CondLinear(
                linear.in_features, linear.out_features, **self._own_routing(),
                device=linear.weight.device, dtype=linear.weight.dtype)
            setattr(self, self.classifier_name, mixed.train(self.training))

    def _own_routing(self) -> Dict[str, Any]:
        """Keywords of layers outside the chain of blocks, which decide for themselves."""
        return dict(self.routing_kwargs, route_fn='sigmoid') if self.chained else self.routing_kwargs

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """As timm's; the new classifier is mixed like the old one."""
        super().reset_classifier(num_classes, global_pool)
        self.condition_classifier()

    def run_chain(
            self,
            x: torch.Tensor,
            taken: Sequence[int],
            last: int,
    ) -> Tuple[torch.Tensor, List[torch.Tensor]]:
        """Run chained stages 1 to `last` and keep the outputs of those in `taken`."""
        features: List[torch.Tensor] = []
        previous = None
        for number, stage in enumerate(self.stages()[:last], start=1):
            x, previous = stage(x, previous)
            if number in taken:
                features.append(x)
        return x, features
