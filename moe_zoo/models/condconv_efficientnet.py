"""CondConv MobileNetV1, MobileNetV2, MnasNet-A1 and EfficientNets: the later blocks mixed from experts.

CondConv: Conditionally Parameterized Convolutions for Efficient Inference, Yang, Bender, Le, Ngiam, NeurIPS 2019,
https://arxiv.org/abs/1904.04971. MnasNet and EfficientNet: every block of the last three groups, head and classifier
plain. MobileNetV1: from the sixth separable block on, and the classifier. MobileNetV2: from the seventh block on, the
1 x 1 head and the classifier, the choice that fits the paper's cost (its appendix could not be consulted).
`condconv_efficientnet_b0` is the network of timm's `tf_efficientnet_cc_b0_8e`, parameter names included: its weights
load as they are.

Letters: B images, C channels, E experts.
"""
from functools import partial
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.efficientnet import (
    BN_EPS_TF_DEFAULT,
    EfficientNet,
    efficientnet_init_weights,
    feature_take_indices,
)
from torch import nn

from ..errors import InputError
from ..layers.cond_conv import CHAINED, CondLinear, RoutedConv2d
from .condconv_blocks import CondConvModel
from .pretrained import trained_cfgs, upcycled_cfgs
from .staged import MOBILENETV2, create_mobile, imagenet_cfg

__all__ = ['CondConvEfficientNet', 'ChainedCondConvEfficientNet']


class Chain(nn.Sequential):
    """All stages of a chained network."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        previous: Optional[torch.Tensor] = None
        for stage in self:
            x, previous = stage(x, previous)
        return x


class CondConvEfficientNet(CondConvModel, EfficientNet):
    """timm's EfficientNet, the class of the whole mobile family, with CondConv blocks.

    Args:
        block_args: As in timm's EfficientNet.
        num_experts: E.
        start_block: First block that is mixed, counted from 1 over all stages.
        cond_fc: Whether the classifier is mixed too, by a router of its own on the pooled features.
        cond_head: Whether the 1 x 1 head convolution is mixed too, by a router of its own.
        expert_drop_rate: Probability of dropping an expert of an image in training.
        route_fn: A key of `moe_zoo.layers.cond_conv.ROUTE_FNS`.
        kwargs: As in timm's EfficientNet.
    """

    def __init__(
            self,
            block_args: List[List[Dict[str, Any]]],
            num_experts: int = 8,
            start_block: int = 1,
            cond_fc: bool = False,
            cond_head: bool = False,
            expert_drop_rate: float = 0.,
            route_fn: str = 'sigmoid',
            **kwargs,
    ):
        super().__init__(block_args, **kwargs)
        self.condition(num_experts, start_block, cond_fc, expert_drop_rate, route_fn)
        if cond_head:
            if not isinstance(self.conv_head, nn.Conv2d):
                raise InputError('cond_head=True: this network has no head convolution; only False fits.')
            self.conv_head = RoutedConv2d.from_conv(self.conv_head, **self._own_routing())
        efficientnet_init_weights(self)  # knows timm's CondConv2d, and so ours: every expert for itself
        if isinstance(self.classifier, CondLinear):
            # The same function's rule for a classifier.
            bound = self.num_classes ** -0.5
            nn.init.uniform_(self.classifier.weight, -bound, bound)
            nn.init.zeros_(self.classifier.bias)


class ChainedCondConvEfficientNet(CondConvEfficientNet):
    """The same for route functions where a block needs the decision of the one before it."""
    chained = True

    def condition(self, *args, **kwargs) -> None:
        super().condition(*args, **kwargs)
        self.blocks = Chain(*self.blocks)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            extra_blocks: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """As timm's EfficientNet."""
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        ends = list(range(len(self.blocks) + 1)) if extra_blocks else self.stage_ends
        taken, last = feature_take_indices(len(ends), indices)
        taken, last = [ends[i] for i in taken], ends[last] if stop_early else len(self.blocks)
        x = self.bn1(self.conv_stem(x))
        stem = [x] if 0 in taken else []
        x, features = self.run_chain(x, taken, last)
        if intermediates_only:
            return stem + features
        if last == self.stage_ends[-1]:
            x = self.bn2(self.conv_head(x))
        return x, stem + features


_cfg = partial(imagenet_cfg, 'arXiv:1904.04971', first_conv='conv_stem', classifier='classifier')

default_cfgs = generate_default_cfgs({
    'condconv_mobilenetv1_025.untrained': _cfg(),
    'condconv_mobilenetv1_050.untrained': _cfg(),
    'condconv_mobilenetv1_075.untrained': _cfg(),
    **upcycled_cfgs({
        'condconv_mobilenetv1_100': 'mobilenetv1_100.ra4_e3600_r224_in1k',
        'condconv_mobilenetv2_100': 'mobilenetv2_100.ra_in1k',
        'condconv_mnasnet_a1': 'semnasnet_100.rmsp_in1k',
        'condconv_efficientnet_lite0': 'tf_efficientnet_lite0.in1k',
    }, _cfg),
    # Not upcycled: trained CondConv weights, ported by timm.
    **trained_cfgs({'condconv_efficientnet_b0': 'tf_efficientnet_cc_b0_8e.in1k'}, _cfg),
})

# Dense architectures in timm's block strings: type, repeats, kernel, stride, expansion, channels, squeeze-excitation.
MOBILENETV1 = [
    ['dsa_r1_k3_s1_c64'], ['dsa_r2_k3_s2_c128'], ['dsa_r2_k3_s2_c256'], ['dsa_r6_k3_s2_c512'], ['dsa_r2_k3_s2_c1024'],
]
MNASNET_A1 = [
    ['ds_r1_k3_s1_e1_c16_noskip'], ['ir_r2_k3_s2_e6_c24'], ['ir_r3_k5_s2_e3_c40_se0.25'], ['ir_r4_k3_s2_e6_c80'],
    ['ir_r2_k3_s1_e6_c112_se0.25'], ['ir_r3_k5_s2_e6_c160_se0.25'], ['ir_r1_k3_s1_e6_c320'],
]
EFFICIENTNET_B0 = [
    ['ds_r1_k3_s1_e1_c16_se0.25'], ['ir_r2_k3_s2_e6_c24_se0.25'], ['ir_r2_k5_s2_e6_c40_se0.25'],
    ['ir_r3_k3_s2_e6_c80_se0.25'], ['ir_r3_k5_s1_e6_c112_se0.25'], ['ir_r4_k5_s2_e6_c192_se0.25'],
    ['ir_r1_k3_s1_e6_c320_se0.25'],
]
EFFICIENTNET_LITE0 = [[blocks[0].removesuffix('_se0.25')] for blocks in EFFICIENTNET_B0]


def _create_condconv_efficientnet(variant: str, pretrained: bool, **kwargs) -> CondConvEfficientNet:
    chained = kwargs.get('route_fn') in CHAINED
    # A list of stages would break a chain.
    feature_cfg = dict(feature_cls='getter') if chained else dict(flatten_sequential=True)
    feature_cfg.update(kwargs.pop('feature_cfg', {}))
    return create_mobile(
        ChainedCondConvEfficientNet if chained else CondConvEfficientNet,
        variant,
        pretrained,
        feature_cfg=feature_cfg,
        **kwargs,
    )


def _condconv_mobilenetv1(variant: str, pretrained: bool, width: float, **kwargs) -> CondConvEfficientNet:
    model_args = dict(arch_def=MOBILENETV1, width=width, num_features=0, act_layer='relu6', start_block=6, cond_fc=True)
    return _create_condconv_efficientnet(variant, pretrained, **dict(model_args, **kwargs))


@register_model
def condconv_mobilenetv1_025(pretrained: bool = False, **kwargs) -> CondConvEfficientNet:
    """MobileNetV1 of width 0.25, blocks 6 to 13 and classifier mixed from 8 experts."""
    return _condconv_mobilenetv1('condconv_mobilenetv1_025', pretrained, width=0.25, **kwargs)


@register_model
def condconv_mobilenetv1_050(pretrained: bool = False, **kwargs) -> CondConvEfficientNet:
    """MobileNetV1 of width 0.5, blocks 6 to 13 and classifier mixed from 8 experts."""
    return _condconv_mobilenetv1('condconv_mobilenetv1_050', pretrained, width=0.5, **kwargs)


@register_model
def condconv_mobilenetv1_075(pretrained: bool = False, **kwargs) -> CondConvEfficientNet:
    """MobileNetV1 of width 0.75, blocks 6 to 13 and classifier mixed from 8 experts."""
    return _condconv_mobilenetv1('condconv_mobilenetv1_075', pretrained, width=0.75, **kwargs)


@register_model
def condconv_mobilenetv1_100(pretrained: bool = False, **kwargs) -> CondConvEfficientNet:
    """MobileNetV1, blocks 6 to 13 and classifier mixed from 8 experts."""
    return _condconv_mobilenetv1('condconv_mobilenetv1_100', pretrained, width=1.0, **kwargs)


@register_model
def condconv_mobilenetv2_100(pretrained: bool = False, **kwargs) -> CondConvEfficientNet:
    """MobileNetV2, blocks 7 to 17, head convolution and classifier mixed from 8 experts."""
    model_args = dict(arch_def=MOBILENETV2, act_layer='relu6', start_block=7, cond_head=True, cond_fc=True)
    return _create_condconv_efficientnet('condconv_mobilenetv2_100', pretrained, **dict(model_args, **kwargs))


@register_model
def condconv_mnasnet_a1(pretrained: bool = False, **kwargs) -> CondConvEfficientNet:
    """MnasNet-A1 (timm's semnasnet_100), its last three groups, blocks 11 to 16, mixed from 8 experts."""
    model_args = dict(arch_def=MNASNET_A1, start_block=11)
    return _create_condconv_efficientnet('condconv_mnasnet_a1', pretrained, **dict(model_args, **kwargs))


@register_model
def condconv_efficientnet_b0(pretrained: bool = False, **kwargs) -> CondConvEfficientNet:
    """EfficientNet-B0 as in TensorFlow, its last three groups, blocks 9 to 16, mixed from 8 experts."""
    model_args = dict(
        arch_def=EFFICIENTNET_B0, act_layer='swish', start_block=9, pad_type='same', bn_eps=BN_EPS_TF_DEFAULT)
    return _create_condconv_efficientnet('condconv_efficientnet_b0', pretrained, **dict(model_args, **kwargs))


@register_model
def condconv_efficientnet_lite0(pretrained: bool = False, **kwargs) -> CondConvEfficientNet:
    """EfficientNet-Lite0 as in TensorFlow, its last three groups, blocks 9 to 16, mixed from 8 experts."""
    model_args = dict(
        arch_def=EFFICIENTNET_LITE0, act_layer='relu6', fix_stem=True, start_block=9,
        pad_type='same', bn_eps=BN_EPS_TF_DEFAULT)
    return _create_condconv_efficientnet('condconv_efficientnet_lite0', pretrained, **dict(model_args, **kwargs))
