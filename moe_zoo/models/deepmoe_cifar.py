"""Dense ResNet and VGG for 32 x 32 images, which timm does not have, and the DeepMoE networks on them.

DeepMoE: Deep Mixture of Experts via Shallow Embedding, Wang et al., UAI 2019, https://arxiv.org/abs/1806.01531.
ResNet-56 and -110: He et al. 2016, https://arxiv.org/abs/1512.03385, section 4.2, with 1 x 1 convolutions as shortcuts
where the shape changes. VGG-16: Simonyan and Zisserman 2015, with batch norm and one linear layer.

Letters: B images, C channels, D mixture weights.
"""
from typing import Any, Callable, Dict, List, Optional, Tuple, Type, Union

import torch
from timm.layers import DropPath, create_classifier, get_device_dtype
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, downsample_conv, feature_take_indices
from torch import nn
from torch.nn import functional as F

from .deepmoe_blocks import DeepMoEModel, GatedStage, PlainBlock, gates_of_weights
from .pretrained import build

__all__ = ['CifarNet', 'DeepMoECifarNet']


class CifarNet(nn.Module):
    """3 x 3 stem at full resolution, stages that halve it, pool, linear classifier: residual or plain by its blocks.

    Any image size works (VGG: from 16 x 16); the networks are meant for 32 x 32.

    Args:
        block: timm's BasicBlock, or `PlainBlock` for VGG.
        layers: Blocks in each stage.
        channels: Planes of each stage.
        num_classes: 0 leaves the classifier out.
        in_chans: Channels of the image.
        stem_width: Channels of the stem.
        global_pool: As in timm.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth of the last residual block, growing linearly.
        block_args: Further arguments of the blocks.
        zero_init_last: Start the last norm of a residual block at zero.
    """

    def __init__(
            self,
            block: Type[nn.Module],
            layers: Tuple[int, ...],
            channels: Tuple[int, ...] = (16, 32, 64),
            num_classes: int = 10,
            in_chans: int = 3,
            stem_width: int = 16,
            global_pool: str = 'avg',
            drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
            block_args: Optional[Dict[str, Any]] = None,
            zero_init_last: bool = False,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, stem_width, 3, padding=1, bias=False, **dd)
        self.bn1 = norm_layer(stem_width, **dd)
        self.act1 = nn.ReLU(inplace=True)
        rates = torch.linspace(0, drop_path_rate, sum(layers), device='cpu').tolist()
        stages, in_chs = [], stem_width
        for i, (depth, planes) in enumerate(zip(layers, channels)):
            stages.append(_stage(
                block, in_chs, planes, depth, 2 if i else 1, [rates.pop(0) for _ in range(depth)],
                norm_layer=norm_layer, **(block_args or {}), **dd))
            in_chs = planes * block.expansion
        self.blocks = nn.Sequential(*stages)
        self.feature_info = [
            dict(num_chs=planes * block.expansion, reduction=2 ** i, module=f'blocks.{i}')
            for i, planes in enumerate(channels)]
        self.num_features = in_chs
        self.global_pool, self.fc = create_classifier(self.num_features, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.init_weights(zero_init_last)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """timm's initialisation of a ResNet."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            if zero_init_last and hasattr(module, 'zero_init_last'):
                module.zero_init_last()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(stem=r'^conv1|^bn1', blocks=r'^blocks\.(\d+)' if coarse else r'^blocks\.(\d+)\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """A new classifier; None keeps the pooling."""
        self.num_classes = num_classes
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, **get_device_dtype(self))
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def conditions(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """What the stages take beside the features: nothing here."""
        return ()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x, flatten=True)
        return self.blocks(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.global_pool(x)
        if self.drop_rate > 0.:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """The outputs of the stages; arguments as in timm's ResNet."""
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        taken, last = feature_take_indices(len(self.feature_info), indices)
        conditions = self.conditions(x)
        x = self.act1(self.bn1(self.conv1(x)))
        features = []
        for i, stage in enumerate(list(self.blocks)[:last + 1] if stop_early else self.blocks):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x, *conditions)
            if i in taken:
                features.append(x)
        return features if intermediates_only else (x, features)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Drop the stages behind the last one asked for, and the head with them."""
        taken, last = feature_take_indices(len(self.feature_info), indices)
        prune_end = last + 1 < len(self.feature_info)
        self.blocks = self.blocks[:last + 1]
        if prune_end:
            self.num_features = self.head_hidden_size = self.feature_info[last]['num_chs']
        if prune_head or prune_end:
            self.reset_classifier(0, '')
        return taken


def _stage(
        block: Type[nn.Module],
        in_chs: int,
        planes: int,
        depth: int,
        stride: int,
        drop_path: List[float],
        **kwargs,
) -> nn.Sequential:
    """Blocks of one stage; the first takes the stride and, in a residual network, the shortcut that changes shape."""
    blocks = []
    for i in range(depth):
        first = dict(stride=stride) if i == 0 else {}
        if not issubclass(block, PlainBlock):
            first.update(drop_path=DropPath(drop_path[i]) if drop_path[i] else None)
            if i == 0 and (stride > 1 or in_chs != planes * block.expansion):
                first.update(downsample=downsample_conv(
                    in_chs, planes * block.expansion, 1, stride, norm_layer=kwargs['norm_layer'],
                    device=kwargs['device'], dtype=kwargs['dtype']))
        blocks.append(block(in_chs, planes, **first, **kwargs))
        in_chs = planes * block.expansion
    return nn.Sequential(*blocks)


class DeepMoECifarNet(DeepMoEModel, CifarNet):
    """`CifarNet` with gated blocks and an embedding network. Arguments: see `DeepMoEModel` and `CifarNet`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.blocks = GatedStage(*self.blocks)

    def conditions(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        return (self.embedding(x),)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        e = self.embedding(x)
        return self.blocks(self.act1(self.bn1(self.conv1(x))), e)


def _cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    return {
        'url': url, 'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (8, 8),
        'crop_pct': 1.0, 'interpolation': 'bicubic',
        'mean': (0.4914, 0.4822, 0.4465), 'std': (0.2470, 0.2435, 0.2616),  # of CIFAR-10's training images
        'first_conv': ('conv1', 'embedding.convs.0'), 'classifier': 'fc', 'license': 'apache-2.0',
        'paper_ids': 'arXiv:1806.01531',
        **kwargs,
    }


def _dense_cfg(paper: str, **kwargs) -> Dict[str, Any]:
    return _cfg(first_conv='conv1', paper_ids=paper, **kwargs)


default_cfgs = generate_default_cfgs({
    'deepmoe_resnet56_cifar.untrained': _cfg(),
    'deepmoe_resnet110_cifar.untrained': _cfg(),
    'deepmoe_vgg16_cifar.untrained': _cfg(pool_size=(2, 2)),
    'deepmoe_resnet56_cifar_dense.untrained': _dense_cfg('arXiv:1512.03385'),
    'deepmoe_resnet110_cifar_dense.untrained': _dense_cfg('arXiv:1512.03385'),
    'deepmoe_vgg16_cifar_dense.untrained': _dense_cfg('arXiv:1409.1556', pool_size=(2, 2)),
})

# VGG-16 without its first convolution, which is the stem; its fifth max-pool is the global one.
_VGG16 = dict(
    block=PlainBlock, layers=(1, 2, 3, 3, 3), channels=(64, 128, 256, 512, 512), stem_width=64, global_pool='max')


def _create_cifar(variant: str, pretrained: bool = False, **kwargs) -> CifarNet:
    dense = variant.endswith('_dense')
    # A list of stages would lose the mixture weights on the way.
    feature_cfg = dict(
        dict(flatten_sequential=True) if dense else dict(feature_cls='getter'),
        out_indices=tuple(range(len(kwargs['layers']))))
    if not dense:
        kwargs = gates_of_weights(variant, pretrained, kwargs)
        kwargs = dict(dict(embed_widths=(64, 64, 128, 256), embed_stem=0), **kwargs)
    return build(
        CifarNet if dense else DeepMoECifarNet,
        variant,
        pretrained,
        feature_cfg=dict(feature_cfg, **kwargs.pop('feature_cfg', {})),
        **kwargs,
    )


@register_model
def deepmoe_resnet56_cifar(pretrained: bool = False, **kwargs) -> DeepMoECifarNet:
    """wide-DeepMoE ResNet-56 for 32 x 32 images: inner channels doubled."""
    model_args = dict(block=BasicBlock, layers=(9, 9, 9), channels=(16, 32, 64))
    return _create_cifar('deepmoe_resnet56_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def deepmoe_resnet110_cifar(pretrained: bool = False, **kwargs) -> DeepMoECifarNet:
    """wide-DeepMoE ResNet-110 for 32 x 32 images: inner channels doubled."""
    model_args = dict(block=BasicBlock, layers=(18, 18, 18), channels=(16, 32, 64))
    return _create_cifar('deepmoe_resnet110_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def deepmoe_vgg16_cifar(pretrained: bool = False, **kwargs) -> DeepMoECifarNet:
    """wide-DeepMoE VGG-16 for 32 x 32 images: all channels but the stem's doubled and gated."""
    return _create_cifar('deepmoe_vgg16_cifar', pretrained, **dict(_VGG16, **kwargs))


@register_model
def deepmoe_resnet56_cifar_dense(pretrained: bool = False, **kwargs) -> CifarNet:
    """Dense ResNet-56 for 32 x 32 images."""
    model_args = dict(block=BasicBlock, layers=(9, 9, 9), channels=(16, 32, 64))
    return _create_cifar('deepmoe_resnet56_cifar_dense', pretrained, **dict(model_args, **kwargs))


@register_model
def deepmoe_resnet110_cifar_dense(pretrained: bool = False, **kwargs) -> CifarNet:
    """Dense ResNet-110 for 32 x 32 images."""
    model_args = dict(block=BasicBlock, layers=(18, 18, 18), channels=(16, 32, 64))
    return _create_cifar('deepmoe_resnet110_cifar_dense', pretrained, **dict(model_args, **kwargs))


@register_model
def deepmoe_vgg16_cifar_dense(pretrained: bool = False, **kwargs) -> CifarNet:
    """Dense VGG-16 with batch norm for 32 x 32 images."""
    return _create_cifar('deepmoe_vgg16_cifar_dense', pretrained, **dict(_VGG16, **kwargs))
