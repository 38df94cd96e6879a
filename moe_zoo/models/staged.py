"""timm's staged networks with routed layers in their blocks: what the families of mixed kernels share.

A model is built by timm as its dense twin; a family then puts its layers in place.

Letters: O output channels, E experts.
"""
from functools import partial
from typing import Any, Dict, Iterator, List, Optional, Tuple, Type

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_condconv_initializer, use_reentrant_ckpt
from timm.models.efficientnet import decode_arch_def, resolve_act_layer, resolve_bn_args, round_channels
from torch import nn

from ..checkpoints import is_routed
from ..errors import InputError
from ..layers import RoutedModel
from ..layers.cond_conv import CondConv2d, CondLinear
from ..layers.routed import channels_last_on_cpu
from ..routing import checkpoint_routed
from .pretrained import build
from .pretrained import checkpoint_filter_fn as upcycling_filter_fn

# A dense architecture in timm's block strings: type, repeats, kernel, stride, expansion, channels.
MOBILENETV2 = [
    ['ds_r1_k3_s1_c16'], ['ir_r2_k3_s2_e6_c24'], ['ir_r3_k3_s2_e6_c32'], ['ir_r4_k3_s2_e6_c64'],
    ['ir_r3_k3_s1_e6_c96'], ['ir_r3_k3_s2_e6_c160'], ['ir_r1_k3_s1_e6_c320'],
]


def imagenet_cfg(paper_ids: str, **kwargs) -> Dict[str, Any]:
    """A `default_cfgs` entry of a ResNet for ImageNet without weights, as timm's; `kwargs` replace what differs."""
    return {
        'url': '', 'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc', 'license': 'apache-2.0', 'paper_ids': paper_ids,
        **kwargs,
    }


class RoutedStage(nn.Sequential):
    """A stage whose blocks decide for themselves. Checkpoints block by block, and keeps the records' gradient."""

    def __init__(self, *blocks: nn.Module):
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_routed(block, x, use_reentrant=use_reentrant_ckpt())
            else:
                x = block(x)
        return x


class StagedModel(RoutedModel):
    """Mixin of timm's ResNet and its mobile family with routed stages, first in the bases."""

    def forward(self, x: torch.Tensor):
        """As timm's, batches in channels-last memory on a CPU: dense layers keep it, mixed convolutions leave it."""
        if torch.jit.is_scripting():
            return self.forward_head(self.forward_features(x))  # TorchScript knows no super()
        return super().forward(channels_last_on_cpu(x, fewest=2))

    def stage_slots(self) -> List[Tuple[nn.Module, str]]:
        """(parent, attribute name) of every stage, in order."""
        if hasattr(self, 'blocks'):
            return [(self.blocks, str(i)) for i in range(len(self.blocks))]
        return [(self, f'layer{i}') for i in (1, 2, 3, 4)]

    def stages(self) -> List[nn.Sequential]:
        return [getattr(parent, name) for parent, name in self.stage_slots()]

    def mixed_convs(self) -> Iterator[CondConv2d]:
        return (module for module in self.modules() if isinstance(module, CondConv2d))

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        # timm's own flag stays off: it would run the blocks past their stage.
        for stage in self.stages():
            stage.grad_checkpointing = enable

    def init_resnet_experts(self) -> None:
        """timm's initialisation of a ResNet's convolutions, for every expert."""
        for conv in self.mixed_convs():
            get_condconv_initializer(_kaiming_fan_out, conv.num_experts, conv.weight_shape)(conv.weight)


def _kaiming_fan_out(weight: torch.Tensor) -> None:
    nn.init.kaiming_normal_(weight, mode='fan_out', nonlinearity='relu')


def create_mobile(
        model_cls: Type[nn.Module],
        variant: str,
        pretrained: bool,
        arch_def: List[List[str]],
        width: float = 1.0,
        act_layer: str = 'relu',
        stem_size: int = 32,
        feature_cfg: Optional[Dict] = None,
        **kwargs,
) -> nn.Module:
    """A network of timm's mobile family from block strings.

    Args:
        model_cls: A subclass of timm's EfficientNet or MobileNetV3.
        variant, pretrained: As in timm.
        arch_def: Block strings.
        width: Multiplies all channels.
        act_layer, stem_size: As in timm.
        feature_cfg: Of features_only; stages are flattened unless it says otherwise.
        kwargs: `bn_eps`, `bn_momentum`, `pad_type` and the rest of timm's keywords.
    """
    kwargs.setdefault('act_layer', act_layer)
    try:
        activation = resolve_act_layer(kwargs)
    except KeyError as error:
        raise InputError(f'act_layer={error} is no activation of timm.') from error
    model_kwargs = dict(
        block_args=decode_arch_def(arch_def),
        stem_size=stem_size,
        round_chs_fn=partial(round_channels, multiplier=width),
        act_layer=activation,
        norm_layer=kwargs.pop('norm_layer', None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
        **kwargs,
    )
    return build(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=feature_cfg or dict(flatten_sequential=True),
        **model_kwargs,
    )


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Dense weights are upcycled, those of timm's CondConv models pass; kernels stored with all axes are flattened.

    Args:
        state_dict: Weights by name, experts as (E, elements) or (E, O, C / groups, height, width).
        model: The model they are for.
    """
    if not is_routed(state_dict, model):
        return upcycling_filter_fn(state_dict, model)
    mixed = {
        f'{name}.weight' for name, module in model.named_modules() if isinstance(module, (CondConv2d, CondLinear))}
    return {k: v.flatten(1) if k in mixed and v.ndim > 2 else v for k, v in state_dict.items()}
