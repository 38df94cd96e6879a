"""Balanced mixture-of-experts ResNets: a residual stage, or every 3 x 3 convolution of it, routed image by image.

Pavlitska, Hubschneider, Struppek, Zöllner, "Balancing Expert Utilization in Mixture-of-Experts Layers Embedded in CNNs"
(arXiv 2204.10598; IJCNN 2023 as "Sparsely-gated Mixture-of-Expert Layers for CNN Interpretability"). An expert is a
narrow copy of the whole stage, about half as large, so that two of four cost about what the stage cost.

Letters: B images, C channels, E experts, K chosen experts an image.
"""
import copy
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple, Type, Union

import torch
from timm.layers import get_act_layer, get_norm_layer
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet, downsample_conv
from torch import nn

from ..errors import InputError, nearest
from ..layers import MoEConv2d, MoEStage
from ..routing import check_num_selected
from .pretrained import build, upcycled_cfgs
from .staged import RoutedStage, StagedModel, imagenet_cfg

__all__ = ['MoEResNet']

LAYERS = {
    'stage': 'one routed layer in the place of a stage, experts are narrow copies of the stage (default)',
    'conv': 'every 3 x 3 convolution of the stage is a routed layer with a gate of its own',
}
# Width inside an expert for stages 1 to 4 of 64, 128, 256 and 512 planes; its last block is as wide as the stage's.
WIDTHS = {BasicBlock: (25, 50, 90, 180), Bottleneck: (24, 58, 140, 200)}
PLANES = (64, 128, 256, 512)
# Options of timm's ResNet that an expert's blocks are not built with, and their values without effect.
PLAIN = dict(
    cardinality=1, base_width=64, block_reduce_first=1, down_kernel_size=1, avg_down=False, aa_layer=None,
    drop_block_rate=0., block_args=None)


class MoEResNet(StagedModel, ResNet):
    """timm's ResNet with routed stages.

    Args:
        block: BasicBlock or Bottleneck.
        layers: Blocks in each of the 4 stages.
        stages: Stages that are routed, from 1; an int is one of them, () is the dense network.
        layer: A key of `LAYERS`.
        num_experts: E.
        num_selected: K.
        widths: Planes of an expert's blocks but the last, one number or one for each of `stages`; None is the paper's.
        gate: A key of `moe_zoo.layers.image_moe.GATES`.
        constraint: A key of `moe_zoo.layers.image_moe.CONSTRAINTS`; 'none' for none.
        constraint_value: Its weight, threshold or rate; None is its default.
        noise: Learned noise on the gates in training; None is yes, but not under 'relative' and 'mean'.
        residual: Add a shortcut around each routed stage: identity, or a strided 1 x 1 convolution and BatchNorm where
            shapes change; no ReLU after. None is yes where a whole stage is routed.
        small_stem: A 3 x 3 stem of stride 1 without pooling, for images of 32 pixels.
        kwargs: As in timm's ResNet.

    Raises:
        InputError: A value out of range, an unknown name, or an option that experts are not built with.
    """

    def __init__(
            self,
            block: Type[Union[BasicBlock, Bottleneck]],
            layers: Tuple[int, ...],
            stages: Union[int, Sequence[int]] = (4,),
            layer: str = 'stage',
            num_experts: int = 4,
            num_selected: int = 2,
            widths: Union[None, int, Sequence[int]] = None,
            gate: str = 'gap_fc',
            constraint: Optional[str] = 'importance',
            constraint_value: Optional[float] = None,
            noise: Optional[bool] = None,
            residual: Optional[bool] = None,
            small_stem: bool = False,
            **kwargs,
    ):
        stages = (stages,) if isinstance(stages, int) else tuple(stages)
        _check(stages, layer, widths, residual, kwargs)
        check_num_selected(num_selected, num_experts)
        super().__init__(block, layers, **kwargs)
        dd = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
        if small_stem:
            self.shrink_stem(dd)
        routing = dict(
            num_selected=num_selected, gate=gate, constraint=constraint, constraint_value=constraint_value, noise=noise,
            **dd)
        planes = kwargs.get('channels', PLANES)
        for number in (1, 2, 3, 4):
            blocks = list(getattr(self, f'layer{number}'))
            if number in stages and layer == 'stage':
                width = _width(widths, stages.index(number), block, number, planes)
                blocks = [_route_stage(blocks, width, num_experts, residual is not False, routing, kwargs)]
            elif number in stages:
                _route_convs(blocks, num_experts, routing)
            setattr(self, f'layer{number}', RoutedStage(*blocks))
        self.init_weights(kwargs.get('zero_init_last', True))

    def shrink_stem(self, dd: Dict[str, Any]) -> None:
        """3 x 3, stride 1, no pooling: feature maps are 4 times larger than in timm's ResNet."""
        if not isinstance(self.conv1, nn.Conv2d):
            raise InputError("small_stem=True has one 3 x 3 convolution: leave stem_type at ''.")
        self.conv1 = nn.Conv2d(self.in_chans, self.conv1.out_channels, 3, padding=1, bias=False, **dd)
        self.maxpool = nn.Identity()
        for info in self.feature_info:
            info['reduction'] = max(1, info['reduction'] // 4)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """timm's initialisation of a ResNet, for every expert."""
        super().init_weights(zero_init_last)
        for module in self.modules():
            if isinstance(module, MoEConv2d):
                for kernel in module.weight.detach():
                    nn.init.kaiming_normal_(kernel, mode='fan_out', nonlinearity='relu')


def _check(stages: Tuple[int, ...], layer: str, widths: Any, residual: Optional[bool], kwargs: Dict[str, Any]) -> None:
    if not set(stages) <= {1, 2, 3, 4} or len(set(stages)) < len(stages):
        raise InputError(f'stages={stages}: choose among 1, 2, 3 and 4, each once.')
    if layer not in LAYERS:
        raise InputError(f'layer={layer!r} is not one of {", ".join(LAYERS)}.{nearest(layer, LAYERS)}')
    if layer == 'conv':
        for name, value in (('widths', widths), ('residual', residual)):
            if value not in (None, False):
                raise InputError(f"{name}={value} is for layer='stage': otherwise an expert is one convolution.")
    elif stages:
        for name, plain in PLAIN.items():
            if kwargs.get(name, plain) != plain:
                raise InputError(
                    f"{name}={kwargs[name]!r}: the experts of a routed stage are plain ResNet blocks; leave it out, or "
                    "use layer='conv'.")
    if widths is not None and not isinstance(widths, int) and len(widths) != len(stages):
        raise InputError(f'widths={tuple(widths)}: give one number, or one for each of {len(stages)} routed stages.')
    if widths is not None and min((widths,) if isinstance(widths, int) else widths) < 1:
        raise InputError(f'widths={widths}: an expert is at least 1 channel wide.')


def _width(widths: Union[None, int, Sequence[int]], index: int, block: type, number: int, planes: Sequence[int]) -> int:
    """Planes of an expert's blocks but the last; the paper's numbers are scaled where the stage is of another width."""
    if widths is None:
        return max(1, round(WIDTHS[block][number - 1] * planes[number - 1] / PLANES[number - 1]))
    return widths if isinstance(widths, int) else widths[index]


def _route_stage(
        dense: List[nn.Module],
        width: int,
        num_experts: int,
        residual: bool,
        routing: Dict[str, Any],
        kwargs: Dict[str, Any],
) -> MoEStage:
    """A routed layer in the place of the blocks of a stage."""
    in_chs, out_chs = dense[0].conv1.in_channels, _out_chs(dense[-1])
    experts = [_narrow_stage(dense, width, kwargs) for _ in range(num_experts)]
    shortcut = None
    if residual:
        shortcut = _match(in_chs, out_chs, dense[0].stride, kwargs) or nn.Identity()
    return MoEStage(experts, in_chs, shortcut=shortcut, **routing)


def _narrow_stage(dense: List[nn.Module], width: int, kwargs: Dict[str, Any]) -> nn.Sequential:
    """One expert: the blocks of the stage, all but the last with `width` planes, each followed by the next's shape."""
    blocks, in_chs = [], dense[0].conv1.in_channels
    for i, model in enumerate(dense):
        last = i == len(dense) - 1
        planes = _out_chs(model) // model.expansion if last else width
        spatial = model.conv2 if model.expansion > 1 else model.conv1  # the convolution that strides
        blocks.append(type(model)(
            in_chs,
            planes,
            stride=model.stride,
            downsample=_match(in_chs, planes * model.expansion, model.stride, kwargs),
            dilation=model.dilation,
            first_dilation=spatial.dilation[0],
            drop_path=copy.deepcopy(model.drop_path),
            **_block_kwargs(kwargs),
        ))
        in_chs = planes * model.expansion
    return nn.Sequential(*blocks)


def _match(in_chs: int, out_chs: int, stride: int, kwargs: Dict[str, Any]) -> Optional[nn.Module]:
    """1 x 1 convolution and norm, or None where shapes agree already."""
    if stride == 1 and in_chs == out_chs:
        return None
    options = _block_kwargs(kwargs)
    options.pop('act_layer')
    return downsample_conv(in_chs, out_chs, 1, stride, **options)


def _block_kwargs(kwargs: Dict[str, Any]) -> Dict[str, Any]:
    return dict(
        act_layer=get_act_layer(kwargs.get('act_layer', nn.ReLU)),
        norm_layer=get_norm_layer(kwargs.get('norm_layer', nn.BatchNorm2d)),
        device=kwargs.get('device'),
        dtype=kwargs.get('dtype'),
    )


def _out_chs(block: nn.Module) -> int:
    return (block.conv3 if block.expansion > 1 else block.conv2).out_channels


def _route_convs(blocks: List[nn.Module], num_experts: int, routing: Dict[str, Any]) -> None:
    """Every 3 x 3 convolution of the blocks becomes a routed layer, in place."""
    for block in blocks:
        for name, conv in list(block.named_children()):
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                setattr(block, name, MoEConv2d.from_conv(conv, num_experts, **routing))


_cfg = partial(imagenet_cfg, 'arXiv:2204.10598')

default_cfgs = generate_default_cfgs({
    **upcycled_cfgs({'moe_resnet18': 'resnet18.a1_in1k', 'moe_resnet50': 'resnet50.a1_in1k'}, _cfg),
    'moe_resnet18_cifar.untrained': _cfg(
        num_classes=100, input_size=(3, 32, 32), pool_size=(4, 4), crop_pct=1.0,
        mean=(0.5071, 0.4865, 0.4409), std=(0.2009, 0.1984, 0.2023)),
})


def _create_moe_resnet(variant: str, pretrained: bool = False, **kwargs) -> MoEResNet:
    return build(MoEResNet, variant, pretrained, **kwargs)


@register_model
def moe_resnet18(pretrained: bool = False, **kwargs) -> MoEResNet:
    """ResNet-18, stage 4 replaced by 4 narrow experts, 2 an image."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_moe_resnet('moe_resnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def moe_resnet50(pretrained: bool = False, **kwargs) -> MoEResNet:
    """ResNet-50, stage 4 replaced by 4 narrow experts, 2 an image."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_moe_resnet('moe_resnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def moe_resnet18_cifar(pretrained: bool = False, **kwargs) -> MoEResNet:
    """ResNet-18 for 32 pixels (3 x 3 stem, no pooling), stage 4 replaced by 4 narrow experts, 2 an image."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2), small_stem=True)
    return _create_moe_resnet('moe_resnet18_cifar', pretrained, **dict(model_args, **kwargs))
