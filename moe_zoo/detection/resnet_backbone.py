"""A backbone for detectron2: its own ResNet with a routed last stage, under a feature pyramid."""
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, build_resnet_backbone
from detectron2.modeling.backbone import ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem

from ..errors import InputError
from ..layers.moe_stage import MoEStage
from .pyramid import moe_options, pyramid, warn_frozen


@BACKBONE_REGISTRY.register()
def build_moe_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """detectron2's own ResNet whose res5 is a routed stage of E copies of it, under P3 to P7.

    The closest precedent is the backbone variant of Pavlitska et al. 2022 (E = 4, K = 2, KL loss with weight 0.25).
    Weights for the dense ResNet, a classifier's or a detector's, load as they are: res5 becomes every expert, moved a
    little (MOE.RES5.PERTURB).

    Raises:
        InputError: K is not between 1 and E, res5 is not among OUT_FEATURES, or NORM is a synchronised one.
    """
    options = moe_options(cfg).RES5
    resnet_options = cfg.MODEL.RESNETS
    if 'res5' not in resnet_options.OUT_FEATURES:
        raise InputError(f'MODEL.RESNETS.OUT_FEATURES {list(resnet_options.OUT_FEATURES)}: the routed stage is res5, '
                         'add it.')
    if 'Sync' in str(resnet_options.NORM):
        raise InputError(f'MODEL.RESNETS.NORM {resnet_options.NORM!r}: experts see different images on every rank and '
                         "cannot synchronise; use 'FrozenBN', 'BN' or 'GN'.")
    if resnet_options.NORM == 'FrozenBN' and not cfg.MODEL.WEIGHTS:
        warn_frozen('MODEL.RESNETS.NORM BN MODEL.BACKBONE.FREEZE_AT 0')
    resnet = _resnet(cfg, input_shape)
    stage = MoEStage.from_dense(
        resnet.res5,
        in_chs=resnet.res5[0].in_channels,
        num_experts=options.NUM_EXPERTS,
        num_selected=options.NUM_SELECTED,
        constraint=None,
        noise=options.NOISE,
        losses=[tuple(pair) for pair in options.LOSSES],
        perturb=options.PERTURB,
    )
    resnet.res5 = resnet.stages[-1] = stage  # it is a child by name, and runs from the list
    return pyramid(cfg, resnet)


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
