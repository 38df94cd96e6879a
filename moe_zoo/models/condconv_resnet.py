"""CondConv ResNets: the convolutions of the last blocks and the classifier mixed from experts.

CondConv: Conditionally Parameterized Convolutions for Efficient Inference, Yang, Bender, Le, Ngiam, NeurIPS 2019,
https://arxiv.org/abs/1904.04971. In ResNet-50 the last 3 residual blocks, which are all of stage 4, and the fully
connected layer; the 1 x 1 shortcuts are not mixed. ResNet-18 and -34 follow the same rule.

Letters: B images, C channels, E experts.
"""
from functools import partial
from typing import List, Optional, Tuple, Type, Union

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, feature_take_indices

from ..layers.cond_conv import CHAINED
from .condconv_blocks import ChainedStage, CondConvModel
from .pretrained import build, upcycled_cfgs
from .staged import checkpoint_filter_fn, imagenet_cfg

__all__ = ['CondConvResNet', 'ChainedCondConvResNet']


class CondConvResNet(CondConvModel, ResNet):
    """timm's ResNet with CondConv blocks.

    Args:
        block: BasicBlock or Bottleneck.
        layers: Blocks in each of the 4 stages.
        num_experts: E.
        start_block: First block that is mixed, counted from 1 over all stages; None is the third last.
        cond_fc: Whether the classifier is mixed too, by a router of its own on the pooled features.
        expert_drop_rate: Probability of dropping an expert of an image in training.
        route_fn: A key of `moe_zoo.layers.cond_conv.ROUTE_FNS`.
        kwargs: As in timm's ResNet.
    """
    classifier_name = 'fc'

    def __init__(
            self,
            block: Type[Union[BasicBlock, Bottleneck]],
            layers: Tuple[int, ...],
            num_experts: int = 8,
            start_block: Optional[int] = None,
            cond_fc: bool = True,
            expert_drop_rate: float = 0.,
            route_fn: str = 'sigmoid',
            **kwargs,
    ):
        super().__init__(block, layers, **kwargs)
        if start_block is None:
            start_block = max(1, sum(layers) - 2)
        self.condition(num_experts, start_block, cond_fc, expert_drop_rate, route_fn)
        self.init_resnet_experts()


class ChainedCondConvResNet(CondConvResNet):
    """The same for route functions where a block needs the decision of the one before it."""
    chained = True

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        previous: Optional[torch.Tensor] = None
        x, previous = self.layer1(x, previous)
        x, previous = self.layer2(x, previous)
        x, previous = self.layer3(x, previous)
        x, previous = self.layer4(x, previous)
        return x

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """As timm's ResNet."""
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        taken, last = feature_take_indices(5, indices)
        x = self.act1(self.bn1(self.conv1(x)))
        stem = [x] if 0 in taken else []
        x, features = self.run_chain(self.maxpool(x), taken, last if stop_early else 4)
        return stem + features if intermediates_only else (x, stem + features)

    def prune_intermediate_layers(self, *args, **kwargs) -> List[int]:
        """As timm's ResNet, which empties the stages that are not needed."""
        taken = super().prune_intermediate_layers(*args, **kwargs)
        for parent, name in self.stage_slots():
            if not len(getattr(parent, name)):
                setattr(parent, name, ChainedStage())
        return taken


_cfg = partial(imagenet_cfg, 'arXiv:1904.04971')

default_cfgs = generate_default_cfgs(upcycled_cfgs({
    'condconv_resnet18': 'resnet18.a1_in1k',
    'condconv_resnet34': 'resnet34.a1_in1k',
    'condconv_resnet50': 'resnet50.a1_in1k',
}, _cfg))


def _create_condconv_resnet(variant: str, pretrained: bool = False, **kwargs) -> CondConvResNet:
    chained = kwargs.get('route_fn') in CHAINED
    feature_cfg = dict(feature_cls='getter') if chained else {}  # a list of stages would break the chain
    return build(
        ChainedCondConvResNet if chained else CondConvResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(feature_cfg, **kwargs.pop('feature_cfg', {})),
        **kwargs,
    )


@register_model
def condconv_resnet18(pretrained: bool = False, **kwargs) -> CondConvResNet:
    """ResNet-18, last 3 blocks and classifier mixed from 8 experts."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_condconv_resnet('condconv_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def condconv_resnet34(pretrained: bool = False, **kwargs) -> CondConvResNet:
    """ResNet-34, last 3 blocks (stage 4) and classifier mixed from 8 experts."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return _create_condconv_resnet('condconv_resnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def condconv_resnet50(pretrained: bool = False, **kwargs) -> CondConvResNet:
    """ResNet-50, last 3 blocks (stage 4) and classifier mixed from 8 experts."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_condconv_resnet('condconv_resnet50', pretrained, **dict(model_args, **kwargs))
