"""Dynamic Convolution ResNets and MobileNets: the kernels of nearly every convolution mixed by an attention of its own.

Dynamic Convolution: Attention over Convolution Kernels, Chen, Dai, Liu, Chen, Yuan, Liu, CVPR 2020,
https://arxiv.org/abs/1912.03458. Dynamic are all convolutions but the stem, 1 x 1 shortcuts included, and not those
inside squeeze-and-excitation; in the MobileNets those of the bottlenecks only, the choice that fits the paper's count
of parameters. Classifiers are static. A model is built by timm as its dense twin, then its convolutions are replaced.

Letters: E experts (the paper's K).
"""
from functools import partial
from typing import Any, Dict, List, Tuple, Type, Union

from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models.efficientnet import EfficientNet, efficientnet_init_weights, round_channels
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import nn

from ..errors import InputError
from ..layers import DynamicConv2d
from .pretrained import build, upcycled_cfgs
from .staged import MOBILENETV2, RoutedStage, StagedModel, checkpoint_filter_fn, create_mobile, imagenet_cfg

__all__ = ['DynamicResNet', 'DynamicEfficientNet', 'DynamicMobileNetV3']


class DynamicModel(StagedModel):
    """Mixin of the dynamic models, first in the bases of a timm model that has been built as its dense twin."""

    def make_dynamic(self, static: Tuple[str, ...], **kwargs) -> None:
        """Put dynamic convolutions into every stage.

        Args:
            static: Attribute names of what stays as it is.
            kwargs: Of `DynamicConv2d`: num_experts, reduction, temperature, anneal_epochs.
        """
        for parent, name in self.stage_slots():
            stage = getattr(parent, name)
            _replace_convs(stage, static, kwargs)
            setattr(parent, name, RoutedStage(*stage))


def _replace_convs(module: nn.Module, static: Tuple[str, ...], kwargs: Dict[str, Any]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and name not in static:
            setattr(module, name, DynamicConv2d.from_conv(child, **kwargs))
        elif name not in static:
            _replace_convs(child, static, kwargs)


class DynamicResNet(DynamicModel, ResNet):
    """timm's ResNet with dynamic convolutions.

    Args:
        block: BasicBlock or Bottleneck.
        layers: Blocks in each of the 4 stages.
        num_experts: E.
        reduction: Input channels to hidden units of every attention.
        temperature: Of the attentions in the first epoch; see `moe_zoo.layers.DynamicConv2d`.
        anneal_epochs: Epochs until it is 1; 0 keeps it constant.
        dynamic_downsample: Whether the 1 x 1 shortcuts are dynamic too.
        kwargs: As in timm's ResNet.
    """

    def __init__(
            self,
            block: Type[Union[BasicBlock, Bottleneck]],
            layers: Tuple[int, ...],
            num_experts: int = 4,
            reduction: int = 4,
            temperature: float = 30.,
            anneal_epochs: int = 10,
            dynamic_downsample: bool = True,
            **kwargs,
    ):
        super().__init__(block, layers, **kwargs)
        self.make_dynamic(
            ('se',) if dynamic_downsample else ('se', 'downsample'), num_experts=num_experts, reduction=reduction,
            temperature=temperature, anneal_epochs=anneal_epochs)
        self.init_resnet_experts()


class DynamicMobile(DynamicModel):
    """What the mobile networks share: the head, and timm's initialisation, which knows stacks of experts.

    Args:
        block_args: As in timm's EfficientNet.
        num_experts, reduction, temperature, anneal_epochs: As in `DynamicResNet`.
        dynamic_head: Whether the 1 x 1 convolutions behind the bottlenecks are dynamic too.
        kwargs: As in timm's class.

    Raises:
        InputError: `dynamic_head` for a network that has no head convolution.
    """

    def __init__(
            self,
            block_args: List[List[Dict[str, Any]]],
            num_experts: int = 4,
            reduction: int = 4,
            temperature: float = 30.,
            anneal_epochs: int = 10,
            dynamic_head: bool = False,
            **kwargs,
    ):
        super().__init__(block_args, **kwargs)
        conv_kwargs = dict(
            num_experts=num_experts, reduction=reduction, temperature=temperature, anneal_epochs=anneal_epochs)
        # 'conv' is the one convolution of timm's ConvBnAct, which stands behind MobileNetV3's bottlenecks.
        self.make_dynamic(('se',) if dynamic_head else ('se', 'conv'), **conv_kwargs)
        if dynamic_head:
            if not isinstance(self.conv_head, nn.Conv2d):
                raise InputError('dynamic_head=True: this network has no head convolution; only False fits.')
            self.conv_head = DynamicConv2d.from_conv(self.conv_head, **conv_kwargs)
        efficientnet_init_weights(self)


class DynamicEfficientNet(DynamicMobile, EfficientNet):
    """timm's EfficientNet, which is its MobileNetV2, with dynamic convolutions; arguments as in `DynamicMobile`."""


class DynamicMobileNetV3(DynamicMobile, MobileNetV3):
    """timm's MobileNetV3 with dynamic convolutions; arguments as in `DynamicMobile`."""


_cfg = partial(imagenet_cfg, 'arXiv:1912.03458')
_mobile_cfg = partial(_cfg, first_conv='conv_stem', classifier='classifier')

default_cfgs = generate_default_cfgs({
    'dyconv_resnet10.untrained': _cfg(),
    **upcycled_cfgs({
        'dyconv_resnet18': 'resnet18.a1_in1k',
        'dyconv_resnet50': 'resnet50.a1_in1k',
    }, _cfg),
    **upcycled_cfgs({
        'dyconv_mobilenetv2_050': 'mobilenetv2_050.lamb_in1k',
        'dyconv_mobilenetv2_100': 'mobilenetv2_100.ra_in1k',
        'dyconv_mobilenetv3_small_100': 'mobilenetv3_small_100.lamb_in1k',
    }, _mobile_cfg),
})

# timm's block strings, with 'se' squeeze-and-excitation and 'nre' ReLU in the place of hard swish.
MOBILENETV3_SMALL = [
    ['ds_r1_k3_s2_e1_c16_se0.25_nre'], ['ir_r1_k3_s2_e4.5_c24_nre', 'ir_r1_k3_s1_e3.67_c24_nre'],
    ['ir_r1_k5_s2_e4_c40_se0.25', 'ir_r2_k5_s1_e6_c40_se0.25'], ['ir_r2_k5_s1_e3_c48_se0.25'],
    ['ir_r3_k5_s2_e6_c96_se0.25'], ['cn_r1_k1_s1_c576'],
]


def _create_dyconv_resnet(variant: str, pretrained: bool = False, **kwargs) -> DynamicResNet:
    return build(DynamicResNet, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **kwargs)


@register_model
def dyconv_resnet10(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-10, one basic block a stage, every convolution but the stem mixed from 4 kernels."""
    model_args = dict(block=BasicBlock, layers=(1, 1, 1, 1))
    return _create_dyconv_resnet('dyconv_resnet10', pretrained, **dict(model_args, **kwargs))


@register_model
def dyconv_resnet18(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-18, every convolution but the stem mixed from 4 kernels."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_dyconv_resnet('dyconv_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def dyconv_resnet50(pretrained: bool = False, **kwargs) -> DynamicResNet:
    """ResNet-50, every convolution but the stem mixed from 4 kernels."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_dyconv_resnet('dyconv_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def dyconv_mobilenetv2_050(pretrained: bool = False, **kwargs) -> DynamicEfficientNet:
    """MobileNetV2 of width 0.5, the convolutions of its bottlenecks mixed from 4 kernels."""
    model_args = dict(arch_def=MOBILENETV2, width=0.5, act_layer='relu6')
    return create_mobile(DynamicEfficientNet, 'dyconv_mobilenetv2_050', pretrained, **dict(model_args, **kwargs))


@register_model
def dyconv_mobilenetv2_100(pretrained: bool = False, **kwargs) -> DynamicEfficientNet:
    """MobileNetV2, the convolutions of its bottlenecks mixed from 4 kernels."""
    model_args = dict(arch_def=MOBILENETV2, act_layer='relu6')
    return create_mobile(DynamicEfficientNet, 'dyconv_mobilenetv2_100', pretrained, **dict(model_args, **kwargs))


@register_model
def dyconv_mobilenetv3_small_100(pretrained: bool = False, **kwargs) -> DynamicMobileNetV3:
    """MobileNetV3-Small, the convolutions of its bottlenecks mixed from 4 kernels, squeeze-and-excitation static."""
    model_args = dict(
        arch_def=MOBILENETV3_SMALL, act_layer='hard_swish', stem_size=16, num_features=1024, se_layer=partial(
            SqueezeExcite, gate_layer='hard_sigmoid', force_act_layer=nn.ReLU, rd_round_fn=round_channels))
    return create_mobile(
        DynamicMobileNetV3, 'dyconv_mobilenetv3_small_100', pretrained, **dict(model_args, **kwargs))
