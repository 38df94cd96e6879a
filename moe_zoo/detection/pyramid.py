"""What every backbone of ours stands under: a feature pyramid, P3 to P7 or P2 to P6.

Feature Pyramid Networks, Lin et al. 2017, arXiv 1612.03144; P6 and P7 as in RetinaNet, Lin et al. 2017, arXiv
1708.02002; for plain transformers, which have maps of one stride only, the simple feature pyramid of ViTDet, Li et al.
2022, arXiv 2203.16527. All modules are detectron2's own.
"""
import logging
from typing import Sequence, Union

from detectron2.config import CfgNode
from detectron2.modeling import FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from detectron2.modeling.backbone.vit import SimpleFeaturePyramid

from ..errors import InputError

STRIDES = {'res2': 4, 'res3': 8, 'res4': 16, 'res5': 32}  # the names that detectron2's parts look for
# MODEL.FPN.IN_FEATURES decides which levels there are.
LEVELS = {
    ('res3', 'res4', 'res5'): 'P3 to P7, for RetinaNet and FCOS',
    ('res2', 'res3', 'res4', 'res5'): 'P2 to P6, for Faster and Mask R-CNN',
}


def pyramid(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """Maps of several strides under detectron2's FPN; P6 and P7 by strided convolutions on res5, or P6 from P5.

    Raises:
        InputError: The backbone lacks what MODEL.FPN.IN_FEATURES asks for, or that is neither of `LEVELS`.
    """
    levels = _check_levels(cfg.MODEL.FPN.IN_FEATURES, bottom_up.output_shape())
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    fpn = FPN(
        bottom_up=bottom_up,
        in_features=levels,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block(levels, bottom_up.output_shape()['res5'].channels, channels, 'res5'),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
    _check_heads(cfg, fpn)
    return fpn


def simple_pyramid(cfg: CfgNode, net: Backbone) -> 'SimplePyramid':
    """The one map of a plain transformer at the strides that MODEL.FPN.IN_FEATURES names.

    The norm is MODEL.FPN.NORM, and that of ViTDet, LN, where this is empty.
    """
    levels = _check_levels(cfg.MODEL.FPN.IN_FEATURES, STRIDES)
    made = SimplePyramid(net, levels, cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NORM or 'LN')
    _check_heads(cfg, made)
    return made


class SimplePyramid(SimpleFeaturePyramid):
    """detectron2's simple feature pyramid on the map of any stride, padding images to what its coarsest level needs.

    Args:
        net: Backbone that gives one map.
        levels: A key of `LEVELS`.
        out_channels: Channels of every level.
        norm: As in detectron2's `get_norm`.

    Raises:
        InputError: A level is more than four times as fine as the map, or more than twice as coarse.
    """

    def __init__(self, net: Backbone, levels: Sequence[str], out_channels: int = 256, norm: str = 'LN'):
        (name, shape), = net.output_shape().items()
        scales = [shape.stride / STRIDES[level] for level in levels]
        if not 0.5 <= min(scales) <= max(scales) <= 4:
            raise InputError(
                f'MODEL.FPN.IN_FEATURES {list(levels)}: a simple feature pyramid makes strides {shape.stride // 4} to '
                f'{2 * shape.stride} of patches of {shape.stride} pixels; set MOE.TIMM.ARGS.patch_size 16.')
        super().__init__(
            net, name, out_channels, scales, top_block(levels, out_channels, out_channels, 'p5'), norm)

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility  # which detectron2's class would pass on under a name that nobody reads

    @property
    def padding_constraints(self):
        return {'square_size': self._square_pad}


def top_block(
        levels: Sequence[str],
        in_channels: int,
        out_channels: int,
        in_feature: str,
) -> Union[LastLevelMaxPool, LastLevelP6P7]:
    """What makes the levels above P5, by those below; `in_channels` and `in_feature` are for P6 and P7 only."""
    return LastLevelMaxPool() if 'res2' in levels else LastLevelP6P7(in_channels, out_channels, in_feature)


def _check_levels(asked: Sequence[str], given: Sequence[str]) -> Sequence[str]:
    levels = tuple(asked)
    if levels not in LEVELS or not set(levels) <= set(given):
        fitting = {names: what for names, what in LEVELS.items() if set(names) <= set(given)}
        ways = ' or '.join(f'{list(names)} ({what})' for names, what in (fitting or LEVELS).items())
        raise InputError(f'MODEL.FPN.IN_FEATURES {list(levels)}: this backbone gives {list(given)}; '
                         f'{"use" if fitting else "a pyramid needs"} {ways}.')
    return levels


def _check_heads(cfg: CfgNode, made: Backbone) -> None:
    """Raises: InputError: A head of detectron2's own detectors reads a level that there is not."""
    heads = {'RetinaNet': ('RETINANET',), 'RCNN': ('RPN', 'ROI_HEADS')}
    for family, nodes in heads.items():
        for node in nodes if family in cfg.MODEL.META_ARCHITECTURE else ():
            asked = list(cfg.MODEL[node].IN_FEATURES)
            if not set(asked) <= set(made.output_shape()):
                raise InputError(f'MODEL.{node}.IN_FEATURES {asked}: MODEL.FPN.IN_FEATURES '
                                 f'{list(cfg.MODEL.FPN.IN_FEATURES)} makes {list(made.output_shape())}.')


def moe_options(cfg: CfgNode) -> CfgNode:
    if 'MOE' not in cfg:
        raise InputError('The config has no node MOE: call moe_zoo.detection.add_moe_config(cfg) after get_cfg(), '
                         'or run the script through moe-zoo run.')
    return cfg.MOE


def warn_frozen(remedy: str) -> None:
    logging.getLogger(__name__).warning(
        'MODEL.WEIGHTS is empty and BatchNorm is frozen: random weights without normalisation diverge within a few '
        'iterations. Give weights, or train from scratch with %s.', remedy)
