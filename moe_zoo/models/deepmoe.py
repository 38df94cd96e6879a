"""DeepMoE ResNets for ImageNet: channels of every block scaled or removed by gates from a shallow embedding network.

Deep Mixture of Experts via Shallow Embedding, Wang, Yu, Dunlap, Ma, Wang, Mirhoseini, Darrell, Gonzalez, UAI 2019,
https://arxiv.org/abs/1806.01531. wide-DeepMoE doubles the gated channels inside the blocks, narrow-DeepMoE does not.
The CIFAR networks are in `deepmoe_cifar`.

Letters: B images, C channels, D mixture weights.
"""
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, feature_take_indices

from ..layers.routed import channels_last_on_cpu
from .deepmoe_blocks import DeepMoEModel, gates_of_weights
from .pretrained import build, upcycled_cfgs

__all__ = ['DeepMoEResNet']


class DeepMoEResNet(DeepMoEModel, ResNet):
    """timm's ResNet with gated blocks and an embedding network. Arguments: see `DeepMoEModel` and timm's ResNet."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        e = self.embedding(x)
        x = self.stem(x)
        x = self.layer1(x, e)
        x = self.layer2(x, e)
        x = self.layer3(x, e)
        x = self.layer4(x, e)
        return x

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """In channels-last memory on a CPU, which takes a third of the time; what comes out lies as the image does."""
        if torch.jit.is_scripting():
            return self.maxpool(self.act1(self.bn1(self.conv1(x))))
        else:
            image = channels_last_on_cpu(x)
            y = self.maxpool(self.act1(self.bn1(self.conv1(image))))
            return y if image is x else y.contiguous()

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
        e = self.embedding(x)
        x = self.act1(self.bn1(self.conv1(x)))
        features = [x] if 0 in taken else []
        x = self.maxpool(x)
        for number, stage in enumerate(self.stages()[:last if stop_early else 4], start=1):
            x = stage(x, e)
            if number in taken:
                features.append(x)
        return features if intermediates_only else (x, features)


def _cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    return {
        'url': url, 'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': ('conv1', 'embedding.convs.0'), 'classifier': 'fc', 'license': 'apache-2.0',
        'paper_ids': 'arXiv:1806.01531',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(upcycled_cfgs({
    'deepmoe_resnet18': 'resnet18.a1_in1k',
    'deepmoe_resnet34': 'resnet34.a1_in1k',
    'deepmoe_resnet50': 'resnet50.a1_in1k',
    'deepmoe_narrow_resnet18': 'resnet18.a1_in1k',
    'deepmoe_narrow_resnet34': 'resnet34.a1_in1k',
    'deepmoe_narrow_resnet50': 'resnet50.a1_in1k',
}, _cfg))


def _create_deepmoe_resnet(variant: str, pretrained: bool = False, **kwargs) -> DeepMoEResNet:
    kwargs = gates_of_weights(variant, pretrained, kwargs)
    kwargs.setdefault('zero_init_last', False)  # the norm before a gate would hide it from the first gradient
    return build(
        DeepMoEResNet,
        variant,
        pretrained,
        # A list of stages would lose the mixture weights on the way.
        feature_cfg=dict(dict(feature_cls='getter'), **kwargs.pop('feature_cfg', {})),
        **kwargs,
    )


@register_model
def deepmoe_resnet18(pretrained: bool = False, **kwargs) -> DeepMoEResNet:
    """wide-DeepMoE ResNet-18: both convolutions of every block gated, inner channels doubled."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_deepmoe_resnet('deepmoe_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def deepmoe_resnet34(pretrained: bool = False, **kwargs) -> DeepMoEResNet:
    """wide-DeepMoE ResNet-34: both convolutions of every block gated, inner channels doubled."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return _create_deepmoe_resnet('deepmoe_resnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def deepmoe_resnet50(pretrained: bool = False, **kwargs) -> DeepMoEResNet:
    """wide-DeepMoE ResNet-50, bottleneck type A: the first 1 x 1 and the 3 x 3 gated, their channels doubled."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_deepmoe_resnet('deepmoe_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def deepmoe_narrow_resnet18(pretrained: bool = False, **kwargs) -> DeepMoEResNet:
    """narrow-DeepMoE ResNet-18: gated at the width of the dense network."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2), width=1.)
    return _create_deepmoe_resnet('deepmoe_narrow_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def deepmoe_narrow_resnet34(pretrained: bool = False, **kwargs) -> DeepMoEResNet:
    """narrow-DeepMoE ResNet-34: gated at the width of the dense network."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3), width=1.)
    return _create_deepmoe_resnet('deepmoe_narrow_resnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def deepmoe_narrow_resnet50(pretrained: bool = False, **kwargs) -> DeepMoEResNet:
    """narrow-DeepMoE ResNet-50, bottleneck type A: gated at the width of the dense network."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), width=1.)
    return _create_deepmoe_resnet('deepmoe_narrow_resnet50', pretrained, **dict(model_args, **kwargs))
