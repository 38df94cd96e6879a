"""A backbone for detectron2: its own ResNet with routed stages, which dense weights start.

| layer | what a routed stage is | the function of the dense weights |
| --- | --- | --- |
| moe | K of E copies of the stage for every image | kept with `perturb=0` |
| condconv | the kernels of a block mixed by its one router, shortcuts left alone | kept |
| dyconv | every kernel mixed by an attention of its own, shortcuts too | kept |
| deepmoe | gates on the channels of a block's first two convolutions, from an embedding of the image | kept |

Papers, in this order: Pavlitska et al. 2022 (arXiv 2204.10598), Yang et al. 2019 (1904.04971), Chen et al. 2020
(1912.03458), Wang et al. 2019 (1806.01531). "Kept": in evaluation mode the maps differ by rounding. Copies that
`perturb=0.1` moves apart at once do not keep it: the maps of a random ResNet-50 move by 16 % of their norm with res5
routed, by 28 % with res4 and res5. Without it they part because each meets other images.

Letters: B images, C channels, E experts, K chosen experts an image, D mixture weights.
"""
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, build_resnet_backbone
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock
from timm.layers import get_condconv_initializer
from torch import nn
from torch.nn import functional as F

from ..checkpoints import is_routed, upcycle
from ..errors import InputError, nearest
from ..layers import DynamicConv2d
from ..layers.cond_conv import CHAINED, ROUTE_FNS, CondConv2d, MixingLayer
from ..layers.deep_moe import ChannelGate, ChannelGated, Link, ShallowEmbedding, scale_channels
from ..layers.moe_stage import MoEStage
from .pyramid import moe_options, pyramid, warn_frozen

LAYERS: Dict[str, Tuple[str, ...]] = {  # a kind of routed stage, and its keywords
    'moe': ('num_selected', 'gate', 'constraint', 'constraint_value', 'noise', 'losses'),  # as in MoEStage
    'condconv': ('route_fn', 'expert_drop_rate'),
    'dyconv': ('reduction', 'temperature', 'anneal_epochs', 'dynamic_shortcut'),
    'deepmoe': ('gate_init', 'gate_l1', 'embed_dim', 'embed_widths', 'embed_stem'),
}


@BACKBONE_REGISTRY.register()
def build_moe_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """detectron2's own ResNet with the routed stages that MOE.RESNET names, under a feature pyramid.

    Weights of a dense detector start it under any meta-architecture; those of a classifier, whose names begin at the
    stage (`R-50.pkl`), under those that `with_moe_losses` makes, which give such names their place.

    Raises:
        InputError: A value of MOE.RESNET cannot be used, or NORM is a synchronised one inside experts.
    """
    options = moe_options(cfg).RESNET
    if cfg.MODEL.RESNETS.NORM == 'FrozenBN' and not cfg.MODEL.WEIGHTS:
        warn_frozen('MODEL.RESNETS.NORM BN MODEL.BACKBONE.FREEZE_AT 0')
    kwargs = dict(options.ARGS)
    if options.LAYER == 'moe':
        kwargs.update(
            num_selected=options.NUM_SELECTED,
            gate=options.GATE,
            constraint=options.CONSTRAINT,
            constraint_value=options.CONSTRAINT_VALUE,
            noise=options.NOISE,
            losses=[tuple(pair) for pair in options.LOSSES],
        )
    resnet = route_resnet(
        _resnet(cfg, input_shape), options.LAYER, options.STAGES, options.NUM_EXPERTS, options.PERTURB, **kwargs)
    return pyramid(cfg, resnet)


def route_resnet(
        resnet: ResNet,
        layer: str = 'moe',
        stages: Sequence[str] = ('res5',),
        num_experts: int = 4,
        perturb: float = 0.1,
        **kwargs,
) -> ResNet:
    """detectron2's ResNet with some of its stages routed; in a LazyConfig, `L(route_resnet)(resnet=L(ResNet)(...))`.

    Args:
        resnet: Of basic or bottleneck blocks. Its modules are taken over.
        layer: A key of `LAYERS`.
        stages: Names of the stages to be routed, among res2 to res5.
        num_experts: E. DeepMoE has none: its channels are its experts.
        perturb: How far copies of a dense weight are moved apart, relative to its standard deviation.
        kwargs: Of the kind of layer, see `LAYERS`.

    Returns:
        The ResNet; for DeepMoE another one, whose forward runs the embedding first.

    Raises:
        InputError: An unknown layer, stage or keyword, a frozen stage, or a block that cannot be routed.
    """
    if layer not in LAYERS:
        raise InputError(f'MOE.RESNET.LAYER {layer!r} is not one of {", ".join(LAYERS)}.{nearest(layer, LAYERS)}')
    for name in kwargs:
        if name not in LAYERS[layer]:
            raise InputError(f'MOE.RESNET.ARGS {name!r}: for the layer {layer} there are {", ".join(LAYERS[layer])}.'
                             f'{nearest(name, LAYERS[layer])}')
    for name in stages:
        _check_stage(resnet, name, stages)
    if layer == 'deepmoe':
        resnet = GatedResNet(resnet, **{k: kwargs.pop(k) for k in list(kwargs) if k.startswith('embed_')})
        kwargs['dim'] = resnet.embedding.dim
    makers = {'moe': _moe, 'condconv': _condconv, 'dyconv': _dyconv, 'deepmoe': _deepmoe}
    for name in stages:
        stage = makers[layer](getattr(resnet, name), num_experts=num_experts, perturb=perturb, **kwargs)
        resnet.stages[resnet.stage_names.index(name)] = stage  # it runs from the list, and is a child by name
        setattr(resnet, name, stage)
    return resnet


def _check_stage(resnet: ResNet, name: str, stages: Sequence[str]) -> None:
    where = f'MOE.RESNET.STAGES {list(stages)}'
    if name not in resnet.stage_names:
        raise InputError(f'{where}: this ResNet has {", ".join(resnet.stage_names)}; it ends at the last of '
                         'MODEL.RESNETS.OUT_FEATURES.')
    stage = getattr(resnet, name)
    if not any(p.requires_grad for p in stage.parameters()):
        raise InputError(f'{where}: {name} is frozen, and a routed stage trains: MODEL.BACKBONE.FREEZE_AT '
                         f'{int(name[-1]) - 1} at most.')
    for block in stage:
        if type(block) not in (BasicBlock, BottleneckBlock):
            raise InputError(f'{where}: {name} has a {type(block).__name__}, and only basic and bottleneck blocks can '
                             'be routed.')


# ---- what a stage becomes

def _moe(stage: nn.Sequential, num_experts: int, perturb: float, **kwargs) -> MoEStage:
    if any('Sync' in type(module).__name__ for module in stage.modules()):
        raise InputError("MODEL.RESNETS.NORM 'SyncBN': experts see different images on every rank and cannot "
                         "synchronise; use 'FrozenBN', 'BN' or 'GN'.")
    return MoEStage.from_dense(stage, stage[0].in_channels, num_experts, perturb, **kwargs)


def _condconv(stage: nn.Sequential, num_experts: int, perturb: float, **kwargs) -> 'UpcycledStage':
    if kwargs.get('route_fn') in CHAINED:
        raise InputError(f'MOE.RESNET.ARGS route_fn {kwargs["route_fn"]!r}: blocks of detectron2 hand no decision on; '
                         f'use one of {", ".join(fn for fn in ROUTE_FNS if fn not in CHAINED)}.')
    return UpcycledStage([MixedBlock(block, num_experts, **kwargs) for block in stage], perturb)


def _dyconv(
        stage: nn.Sequential,
        num_experts: int,
        perturb: float,
        dynamic_shortcut: bool = True,
        **kwargs,
) -> 'UpcycledStage':
    for block in stage:
        for name, conv in list(block.named_children()):
            if name != 'shortcut' or dynamic_shortcut:
                setattr(block, name, ConvNorm(_drawn(DynamicConv2d.from_conv(conv, num_experts, **kwargs)), conv.norm))
    return UpcycledStage(stage, perturb)


def _deepmoe(stage: nn.Sequential, num_experts: int, perturb: float, dim: int, **kwargs) -> 'UpcycledStage':
    return GatedStage([GatedBlock(block, dim, **kwargs) for block in stage], perturb)


def _drawn(conv: CondConv2d) -> CondConv2d:
    """The same with kernels drawn as detectron2 draws those of a ResNet, each expert's by itself."""
    draw = partial(nn.init.kaiming_normal_, mode='fan_out', nonlinearity='relu')
    get_condconv_initializer(draw, conv.num_experts, conv.weight_shape)(conv.weight)
    return conv


class ConvNorm(nn.Module):
    """A routed convolution and the norm that detectron2 keeps inside its own.

    The weights are `conv.weight` and `norm.*`, where the dense ones are `weight` and `norm.*`: a checkpointer that
    compares shapes by name then leaves the dense kernel to `UpcycledStage`.
    """

    def __init__(self, conv: nn.Module, norm: Optional[nn.Module]):
        super().__init__()
        self.conv = conv
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: torch.Tensor, *mixture: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x, *mixture))


class UpcycledStage(nn.Sequential):
    """A stage of routed blocks. Loading the dense stage under its name upcycles it.

    Args:
        blocks: The blocks.
        perturb: As in `route_resnet`.
    """

    def __init__(self, blocks: Sequence[nn.Module], perturb: float):
        super().__init__(*blocks)
        self.perturb = perturb

    def _load_from_state_dict(self, state_dict: Dict[str, torch.Tensor], prefix: str, *args) -> None:
        given = {key[len(prefix):]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if given and not is_routed(given, self):
            if not any(f'{name}.weight' in given for name, m in self.named_modules() if isinstance(m, ConvNorm)):
                raise InputError(
                    f'{prefix.rstrip(".")}: the norms of this stage are found, but no kernel: those of a classifier '
                    'reach it only under MoERetinaNet or what with_moe_losses makes.')
            for key in given:
                del state_dict[prefix + key]
            try:
                made = self._upcycled(given)
            except InputError as error:
                raise InputError(f'{prefix.rstrip(".")}: {error}') from error
            state_dict.update({prefix + key: value for key, value in made.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _upcycled(self, given: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
        own = self.state_dict()
        dense = {}
        for key, value in given.items():
            layer, _, part = key.rpartition('.')
            wrapped = part in ('weight', 'bias') and f'{layer}.conv.{part}' in own
            if key in own or wrapped or part != 'num_batches_tracked':  # which a frozen norm does not have
                dense[f'{layer}.conv.{part}' if wrapped else key] = value
        # Files of Caffe2 have their statistics in the affine map: the norms know what to do without.
        absent = {key: value for key, value in own.items() if key not in dense and key.rpartition('.')[2] in STATISTICS}
        made = upcycle({**absent, **dense}, self, noise=self.perturb)
        return {key: value for key, value in made.items() if key not in absent}


STATISTICS = ('running_mean', 'running_var', 'num_batches_tracked')


class MixedBlock(MixingLayer):
    """A residual block of detectron2 with its convolutions mixed by one router, its shortcut left alone.

    Args:
        block: The dense block, whose norms and shortcut are taken over.
        num_experts: E.
        route_fn: A key of `moe_zoo.layers.cond_conv.ROUTE_FNS` that is not chained.
        expert_drop_rate: As in `MixingLayer`.
    """

    def __init__(self, block: nn.Module, num_experts: int, route_fn: str = 'sigmoid', expert_drop_rate: float = 0.):
        super().__init__()
        self.shortcut = block.shortcut
        self.names = convs(block)
        for name in self.names:
            conv = getattr(block, name)
            setattr(self, name, ConvNorm(_drawn(CondConv2d.from_conv(conv, num_experts)), conv.norm))
        self.set_routing(block.in_channels, num_experts, route_fn, expert_drop_rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the block's maps."""
        weights, y = self.route(x), x
        for name in self.names:
            y = getattr(self, name)(y if y is x else F.relu_(y), weights)
        return F.relu_(y + (x if self.shortcut is None else self.shortcut(x)))

    def expert_parameters(self) -> List[List[nn.Parameter]]:
        convs = [getattr(self, name).conv for name in self.names]
        return [[p] for conv in convs for p in (conv.weight, conv.bias) if p is not None]

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        """The router, all mixed convolutions, and the shortcut."""
        macs, shape = self.router_macs(input_shape[0]), input_shape
        for name in self.names:
            conv = getattr(self, name).conv
            macs, shape = macs + conv.macs(shape), conv.output_shape(shape)
        return macs + _shortcut_macs(self.shortcut, shape)


class GatedBlock(ChannelGated):
    """A residual block of detectron2 with channel gates behind the norms of its first two convolutions.

    Args:
        block: The dense block, whose parts are taken over.
        dim: D.
        gate_init: 'ones', or (low, high) of a uniform distribution.
        gate_l1: Weight of the L1 norm of the gates in the loss.
    """

    def __init__(self, block: nn.Module, dim: int, gate_init: Any = 'ones', gate_l1: float = 1e-3):
        super().__init__()
        self.shortcut = block.shortcut
        self.names = convs(block)
        self.act = nn.ReLU()
        for i, name in enumerate(self.names, start=1):
            conv = getattr(block, name)
            norm, conv.norm = conv.norm, None  # the norm runs beside it: gates stand between norm and activation
            setattr(self, name, ConvNorm(conv, norm))
            setattr(self, f'gate{i}', ChannelGate(conv.out_channels, dim, gate_init, gate_l1) if i < 3 else None)
        self.count_experts()

    def chain(self) -> List[Link]:
        convs = [getattr(self, name) for name in self.names]
        return [(each.conv, each.norm, getattr(self, f'gate{i}'), self.act) for i, each in enumerate(convs, start=1)]

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """Maps (B, C, H, W) and mixture weights (B, D) to the block's maps."""
        shortcut = x if self.shortcut is None else self.shortcut(x)
        if self.runs_live(x):
            y, live = self.run_live(x, e)
            return F.relu_(y + shortcut if live is None else shortcut.index_add(1, live, y))
        y = x
        for conv, norm, gate, act in self.chain():
            y = norm(conv(y if y is x else act(y)))
            y = y if gate is None else scale_channels(y, gate.gates(e))
        return F.relu_(y + shortcut)

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        stride = 1 if self.shortcut is None else self.shortcut.stride[0]
        positions = (input_shape[0], 0, -(-input_shape[2] // stride), -(-input_shape[3] // stride))
        return super().max_macs(input_shape) + _shortcut_macs(self.shortcut, positions)


class GatedStage(UpcycledStage):
    """A stage whose blocks take the mixture weights too."""

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        for block in self:
            x = block(x, e)
        return x


class GatedResNet(ResNet):
    """detectron2's ResNet beside a shallow embedding of the image, which gives the gated stages their mixture weights.

    A detector has no class of an image, so that the embedding learns from the detector's losses alone.

    Args:
        resnet: Taken over whole.
        embed_dim: D.
        embed_widths, embed_stem: Channels, see `ShallowEmbedding`.
    """

    def __init__(
            self,
            resnet: ResNet,
            embed_dim: int = 128,
            embed_widths: Sequence[int] = (64, 128, 256, 512, 512),
            embed_stem: int = 64,
    ):
        nn.Module.__init__(self)
        self.__dict__.update(resnet.__dict__)  # submodules and attributes alike
        self.embedding = ShallowEmbedding(0, resnet.stem.in_channels, embed_widths, embed_stem, embed_dim)

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """x: (B, C, H, W). Returns name to maps, as the dense ResNet."""
        e = self.embedding(x)
        x = self.stem(x)
        maps = {'stem': x}
        for name, stage in zip(self.stage_names, self.stages):
            x = maps[name] = stage(x, e) if isinstance(stage, GatedStage) else stage(x)
        return {name: maps[name] for name in self._out_features}


def convs(block: nn.Module) -> Tuple[str, ...]:
    """Names of the convolutions of a basic or bottleneck block, without the shortcut's."""
    return tuple(name for name in ('conv1', 'conv2', 'conv3') if hasattr(block, name))


def _shortcut_macs(shortcut: Optional[nn.Conv2d], output_shape: Tuple[int, ...]) -> int:
    """Of a 1 x 1 convolution to (B, ., H, W)."""
    return 0 if shortcut is None else output_shape[0] * output_shape[2] * output_shape[3] * shortcut.weight.numel()


def _resnet(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """What detectron2 builds; it fixes the width of ResNet-18 and 34, and here RES2_OUT_CHANNELS sets that too."""
    options = cfg.MODEL.RESNETS
    if options.DEPTH not in (18, 34) or options.RES2_OUT_CHANNELS == 64:
        return build_resnet_backbone(cfg, input_shape)
    stem = BasicStem(in_channels=input_shape.channels, out_channels=options.STEM_OUT_CHANNELS, norm=options.NORM)
    stages, in_channels = [], options.STEM_OUT_CHANNELS
    for i, num_blocks in enumerate([2, 2, 2, 2] if options.DEPTH == 18 else [3, 4, 6, 3]):
        stages.append(ResNet.make_stage(
            BasicBlock,
            num_blocks,
            in_channels=in_channels,
            out_channels=options.RES2_OUT_CHANNELS * 2 ** i,
            stride_per_block=[1 if i == 0 else 2] + [1] * (num_blocks - 1),
            norm=options.NORM,
        ))
        in_channels = options.RES2_OUT_CHANNELS * 2 ** i
    return ResNet(stem, stages, out_features=options.OUT_FEATURES, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
