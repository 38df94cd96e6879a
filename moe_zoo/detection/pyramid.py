"""What every backbone of ours stands under: a feature pyramid P3 to P7, as RetinaNet wants it (Lin et al. 2017, arXiv
1708.02002)."""
import logging
from typing import List

from detectron2.config import CfgNode
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7

from ..errors import InputError


def pyramid(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """P3 to P5 from res3 to res5, P6 and P7 by strided convolutions on res5."""
    shapes = bottom_up.output_shape()
    missing: List[str] = [name for name in cfg.MODEL.FPN.IN_FEATURES if name not in shapes]
    if missing or not cfg.MODEL.FPN.IN_FEATURES:
        raise InputError(f'MODEL.FPN.IN_FEATURES {list(cfg.MODEL.FPN.IN_FEATURES)}: this backbone gives '
                         f"{list(shapes)}; RetinaNet takes ['res3', 'res4', 'res5'].")
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7(shapes['res5'].channels, channels),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


def moe_options(cfg: CfgNode) -> CfgNode:
    if 'MOE' not in cfg:
        raise InputError('The config has no node MOE: call moe_zoo.detection.add_moe_config(cfg) after get_cfg(), '
                         'or run the script through moe-zoo run.')
    return cfg.MOE


def warn_frozen(remedy: str) -> None:
    logging.getLogger(__name__).warning(
        'MODEL.WEIGHTS is empty and BatchNorm is frozen: random weights without normalisation diverge within a few '
        'iterations. Give weights, or train from scratch with %s.', remedy)
