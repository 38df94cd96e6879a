"""timm's residual blocks with channel gates, and what all DeepMoE models share.

Deep Mixture of Experts via Shallow Embedding, Wang et al., UAI 2019, https://arxiv.org/abs/1806.01531. The layers are
in `moe_zoo.layers.deep_moe`. A dense network is built with gated blocks; the embedding network, which sees the image,
stands beside it and hands its mixture weights to every block.

Letters: B images, C channels, D mixture weights, H x W positions.
"""
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Type, Union

import torch
from timm.layers import register_notrace_module, use_reentrant_ckpt
from timm.models import resolve_pretrained_cfg
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.nn import functional as F

from ..errors import InputError, nearest
from ..layers.deep_moe import ChannelGate, ChannelGated, Link, ShallowEmbedding, live_channels, scale_channels
from ..routing import checkpoint_routed
from .staged import StagedModel

# Convolutions of a bottleneck, counted from 1, that are gated. Shortcut, stem and classifier never are.
BOTTLENECKS: Dict[str, Tuple[int, ...]] = {'A': (1, 2), 'B': (2,)}
WIDENINGS = ('inner', 'all')


class GatedBlock(ChannelGated):
    """What the gated blocks share: `conv1`, `bn1`, `act1` and so on are the dense block's, `gate1` is None or a gate.

    A gate multiplies after the norm of its convolution and before the activation, or before the residual is added.
    """
    num_convs = 0

    def widen(self, gated: Sequence[int], width: float, norm_layer: Callable[..., nn.Module]) -> None:
        """Multiply the channels of gated convolutions inside the block, and name the convolutions that get gates.

        Args:
            gated: Numbers of the gated convolutions, from 1.
            width: Factor. The channels that leave the block stay.
            norm_layer: Makes the norms of the wider maps.
        """
        self.gated = tuple(gated)
        in_chs = self.conv1.in_channels
        for i in range(1, self.num_convs + 1):
            conv = getattr(self, f'conv{i}')
            widened = i in self.gated and i < self.num_convs
            out_chs = max(1, round(conv.out_channels * width)) if widened else conv.out_channels
            if (in_chs, out_chs) != (conv.in_channels, conv.out_channels):
                dd = {'device': conv.weight.device, 'dtype': conv.weight.dtype}
                setattr(self, f'conv{i}', nn.Conv2d(
                    in_chs, out_chs, conv.kernel_size, conv.stride, conv.padding, conv.dilation, bias=False, **dd))
                setattr(self, f'bn{i}', norm_layer(out_chs, **dd))
            in_chs = out_chs

    def add_gates(self, dim: int, **kwargs) -> None:
        """Make the gates. `kwargs` are further arguments of `ChannelGate`."""
        for i in range(1, self.num_convs + 1):
            weight = getattr(self, f'conv{i}').weight
            gate = None
            if i in self.gated:
                gate = ChannelGate(weight.shape[0], dim, **kwargs, device=weight.device, dtype=weight.dtype)
            setattr(self, f'gate{i}', gate)
        self.count_experts()

    def chain(self) -> List[Link]:
        return [
            tuple(getattr(self, f'{part}{i}') for part in ('conv', 'bn', 'gate', 'act'))
            for i in range(1, self.num_convs + 1)]


class GatedResidualBlock(GatedBlock):
    """A gated block with a shortcut, which is never gated."""

    def add_live_shortcut(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """The residual block on live channels: where the last map has dead ones, the shortcut alone stands."""
        y, live = self.run_live(x, e)
        shortcut = x if self.downsample is None else self.downsample(x)
        y = y + shortcut if live is None else shortcut.index_add(1, live, y)
        return getattr(self, f'act{self.num_convs}')(y)

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        macs = super().max_macs(input_shape)
        if self.downsample is not None:  # a shortcut makes the block's output
            positions = input_shape[0] * (-(-input_shape[2] // self.stride)) * (-(-input_shape[3] // self.stride))
            macs += sum(positions * m.weight.numel() for m in self.downsample.modules() if isinstance(m, nn.Conv2d))
        return macs


def _check_parts(**parts: Any) -> None:
    for name, value in parts.items():
        if value is not None and value != 1:
            raise InputError(f'{name}={value!r}: DeepMoE blocks have none; leave it out.')


@register_notrace_module
class GatedBasicBlock(GatedResidualBlock, BasicBlock):
    """ResNet's block of two 3 x 3 convolutions, both gated; only the map between them can be widened.

    Args:
        width: Factor on the inner channels.
        Others: As in timm's block.
    """
    num_convs = 2

    def __init__(
            self,
            *args,
            width: float = 1.,
            norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
            **kwargs,
    ):
        _check_parts(aa_layer=kwargs.get('aa_layer'), attn_layer=kwargs.get('attn_layer'))
        super().__init__(*args, norm_layer=norm_layer, **kwargs)
        self.widen((1, 2), width, norm_layer)

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if self.runs_live(x):
                return self.add_live_shortcut(x, e)
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        x = scale_channels(x, self.gate1.gates(e))
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.conv2(x)
        x = self.bn2(x)
        x = scale_channels(x, self.gate2.gates(e))
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x = x + shortcut
        return self.act2(x)


@register_notrace_module
class GatedBottleneck(GatedResidualBlock, Bottleneck):
    """ResNet's bottleneck with its first 1 x 1 and its 3 x 3 gated (type A), or its 3 x 3 alone (type B).

    Args:
        width: Factor on the gated inner channels.
        bottleneck: A key of `BOTTLENECKS`.
        Others: As in timm's block.
    """
    num_convs = 3

    def __init__(
            self,
            *args,
            width: float = 1.,
            bottleneck: str = 'A',
            norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
            **kwargs,
    ):
        _check_parts(
            aa_layer=kwargs.get('aa_layer'), attn_layer=kwargs.get('attn_layer'), cardinality=kwargs.get('cardinality'))
        super().__init__(*args, norm_layer=norm_layer, **kwargs)
        self.widen(BOTTLENECKS[bottleneck], width, norm_layer)

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if self.runs_live(x):
                return self.add_live_shortcut(x, e)
        shortcut = x
        x = self.conv1(x)
        x = self.bn1(x)
        if self.gate1 is not None:
            x = scale_channels(x, self.gate1.gates(e))
        x = self.act1(x)
        x = self.conv2(x)
        x = self.bn2(x)
        x = scale_channels(x, self.gate2.gates(e))
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.conv3(x)
        x = self.bn3(x)
        if self.drop_path is not None:
            x = self.drop_path(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x = x + shortcut
        return self.act3(x)


@register_notrace_module
class Halve(nn.MaxPool2d):
    """Max-pool by 2. Raises: InputError: The (B, C, H, W) map is a single row or column."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if min(x.shape[2:]) < 2:
                raise InputError(
                    f'A max-pool meets a map of {x.shape[2]} x {x.shape[3]}, which it cannot halve: use larger images.')
        return F.max_pool2d(x, 2)


class PlainBlock(nn.Module):
    """One layer of a plain network such as VGG: 3 x 3 convolution, norm, activation; at stride 2 a max-pool before."""
    expansion = 1

    def __init__(
            self,
            inplanes: int,
            planes: int,
            stride: int = 1,
            act_layer: Type[nn.Module] = nn.ReLU,
            norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.pool = Halve(2) if stride == 2 else nn.Identity()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, padding=1, bias=False, **dd)
        self.bn1 = norm_layer(planes, **dd)
        self.act1 = act_layer(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act1(self.bn1(self.conv1(self.pool(x))))


@register_notrace_module
class GatedPlainBlock(GatedBlock, PlainBlock):
    """A plain layer, gated.

    On live channels it also leaves out the input channels that are zero everywhere, such as the dead ones of the layer
    before it.
    """
    num_convs = 1

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gated = (1,)

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        x = self.pool(x)
        if not torch.jit.is_scripting():
            if self.runs_live(x):
                return self.run_alone(x, e)
        x = self.conv1(x)
        x = self.bn1(x)
        x = scale_channels(x, self.gate1.gates(e))
        return self.act1(x)

    def run_alone(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        inputs = live_channels(x)
        y, live = self.run_live(x if inputs is None else x.index_select(1, inputs), e, inputs)
        y = self.act1(y)
        if live is None:
            return y
        return y.new_zeros(len(y), self.conv1.out_channels, *y.shape[2:]).index_copy(1, live, y)

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        return super().max_macs(self._pooled(input_shape))

    def spared_macs(self, input_shape: Tuple[int, ...], load: Sequence[float]) -> float:
        return super().spared_macs(self._pooled(input_shape), load)

    def _pooled(self, input_shape: Tuple[int, ...]) -> Tuple[int, ...]:
        halves = 2 if isinstance(self.pool, nn.MaxPool2d) else 1
        return (*input_shape[:2], input_shape[2] // halves, input_shape[3] // halves)


GATED: Dict[Type[nn.Module], Type[GatedBlock]] = {
    BasicBlock: GatedBasicBlock,
    Bottleneck: GatedBottleneck,
    PlainBlock: GatedPlainBlock,
}


class GatedStage(nn.Sequential):
    """A stage whose blocks all take the mixture weights too. Checkpoints block by block, and keeps the records."""

    def __init__(self, *blocks: nn.Module):
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_routed(block, x, e, use_reentrant=use_reentrant_ckpt())
            else:
                x = block(x, e)
        return x


class DeepMoEModel(StagedModel):
    """Mixin of the DeepMoE models, first in the bases of a dense network that takes `block` and `channels`.

    Args:
        block: The dense block; a key of `GATED`.
        layers: Blocks in each stage.
        channels: Planes of each stage.
        width: Factor on the gated channels: 2 is wide-DeepMoE, 1 narrow-DeepMoE.
        widen: Which channels `width` multiplies: 'inner', the gated maps inside a block, or 'all' planes of all stages.
            A plain network (VGG) has no inner maps: all its planes are gated, and widened.
        bottleneck: 'A' gates the first 1 x 1 and the 3 x 3 convolution of a bottleneck, 'B' the 3 x 3 alone.
        gate_init: 'ones', or (low, high) of a uniform distribution; see `ChannelGate`.
        gate_l1: lambda, the weight of the L1 norm of all gates: sum over the channels and layers of an image, mean over
            the images.
        embed_dim: D; None is `num_classes` (128 where there are none).
        embed_widths: Channels of the embedding's convolutions of stride 2.
        embed_stem: Channels of the embedding's convolution of stride 1; 0 leaves it out.
        embed_softmax: Whether the mixture weights are a softmax.
        embed_loss: mu, the weight of the embedding's cross-entropy.
        block_args: Further arguments of the blocks.
        kwargs: As in the dense network.

    Raises:
        InputError: A value out of range, or a part that gated blocks do not have.
    """

    def __init__(
            self,
            block: Type[nn.Module],
            layers: Tuple[int, ...],
            channels: Tuple[int, ...] = (64, 128, 256, 512),
            width: float = 2.,
            widen: str = 'inner',
            bottleneck: str = 'A',
            gate_init: Union[str, Sequence[float]] = 'ones',
            gate_l1: float = 1e-3,
            embed_dim: Optional[int] = None,
            embed_widths: Sequence[int] = (64, 128, 256, 512, 512),
            embed_stem: int = 64,
            embed_softmax: bool = True,
            embed_loss: float = 1.,
            block_args: Optional[Dict[str, Any]] = None,
            device=None,
            dtype=None,
            **kwargs,
    ):
        dd = {'device': device, 'dtype': dtype}
        _check_options(width, widen, bottleneck)
        block_args = dict(block_args or {})
        if widen == 'all' or block is PlainBlock:
            channels = tuple(max(1, round(c * width)) for c in channels)
        else:
            block_args['width'] = width
        if block is Bottleneck:
            block_args['bottleneck'] = bottleneck
        super().__init__(GATED[block], layers, channels=channels, block_args=block_args, **kwargs, **dd)
        self.embedding = ShallowEmbedding(
            self.num_classes, self.in_chans, embed_widths, embed_stem,
            (self.num_classes or 128) if embed_dim is None else embed_dim, embed_softmax, embed_loss, **dd)
        # An argument of the saved model, which timm adds those of create_model to: the gates outlive the classes.
        self._model_args = {'embed_dim': self.embedding.dim}
        for parent, name in self.stage_slots():
            stage = GatedStage(*getattr(parent, name))
            for each in stage:
                each.add_gates(self.embedding.dim, init=gate_init, l1=gate_l1)
            setattr(parent, name, stage)
        self.register_buffer('gates_frozen', torch.zeros((), dtype=torch.bool, device=device))

    @torch.jit.ignore
    def freeze_gates(self, freeze: bool = True) -> None:
        """Second stage of the training: embedding and gates stay as they are, their losses go, the rest trains on.

        Call it between two steps; the frozen parameters lose `requires_grad` and their gradient, so that an optimiser
        built before passes them by, and the embedding's norms keep their statistics through `train()`. The state is
        saved with the weights. A model inside DistributedDataParallel has to be wrapped anew afterwards, which
        `MoEClassificationTask.freeze_gates` does; our trainer calls that one (option `freeze_gates`).

        Args:
            freeze: False undoes it.
        """
        self.gates_frozen.fill_(freeze)
        for module in self.modules():
            if isinstance(module, (ShallowEmbedding, ChannelGate)):
                module.freeze(freeze)
        self.embedding.train(self.training)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # Only where the state changes: what a user froze by hand stays as it is.
        if not self.gates_frozen.is_meta and bool(self.gates_frozen) != getattr(self.embedding, 'frozen', False):
            self.freeze_gates(bool(self.gates_frozen))

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """As the dense network's; the embedding then predicts the new classes too, and the gates stay."""
        super().reset_classifier(num_classes, global_pool)
        if isinstance(self.embedding, ShallowEmbedding):
            self.embedding.reset_classifier(num_classes)

    def prune_intermediate_layers(self, *args, **kwargs) -> List[int]:
        """As the dense network's; the embedding goes where no gated block is left."""
        taken = super().prune_intermediate_layers(*args, **kwargs)
        for parent, name in self.stage_slots():
            if not isinstance(getattr(parent, name), GatedStage):  # emptied
                setattr(parent, name, GatedStage())
        if not any(len(stage) for stage in self.stages()):
            self.embedding = nn.Identity()
        return taken

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """As the dense network's; the embedding belongs to the stem."""
        matcher = super().group_matcher(coarse)
        return dict(matcher, stem=matcher['stem'] + r'|^embedding')


def gates_of_weights(variant: str, pretrained: bool, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Keywords of a model without classes, with gates as wide as those of the weights that it is going to load."""
    if not pretrained or not (kwargs.get('features_only') or kwargs.get('num_classes') == 0):
        return kwargs
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    return {'embed_dim': cfg.num_classes or None, **kwargs}


def _check_options(width: float, widen: str, bottleneck: str) -> None:
    if not width > 0:
        raise InputError(f'width={width}: give a factor above 0; 2 is the wide network, 1 the narrow one.')
    for name, value, accepted in (('widen', widen, WIDENINGS), ('bottleneck', bottleneck, BOTTLENECKS)):
        if value not in accepted:
            raise InputError(f'{name}={value!r}: use {" or ".join(map(repr, accepted))}.{nearest(value, accepted)}')
