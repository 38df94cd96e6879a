"""moe_zoo in detectron2: backbones, meta-architectures, and data sets, registered on import.

The only package that imports detectron2, whose defaults it extends by the config node MOE, whose COCO metrics it
computes by faster-coco-eval, and whose images it reads by `moe_zoo.data.images`. Backbones: `build_timm_fpn_backbone`,
`build_moe_resnet_fpn_backbone`; meta-architectures: `MoERetinaNet`, `MoEFCOS`, `MoEGeneralizedRCNN`, others by
`with_moe_losses`; data sets: `digit_scenes_train`, `digit_scenes_val`.
"""
import warnings

with warnings.catch_warnings():
    warnings.simplefilter('ignore', FutureWarning)  # of older code: detectron2 and fvcore script functions on import
    import detectron2.modeling  # noqa: F401
    from detectron2.config.defaults import _C

from .coco import register_coco, register_digit_scenes
from .config import add_moe_config, load_config
from .evaluation import use_fast_metrics
from .heads import MoERetinaNetHead
from .images import use_careful_reading
from .meta_arch import EpochHook, MoEFCOS, MoEGeneralizedRCNN, MoERetinaNet, with_moe_losses
from .pyramid import SimplePyramid
from .resnet_backbone import build_moe_resnet_fpn_backbone, route_resnet
from .timm_backbone import TimmBackbone, build_timm_fpn_backbone

__all__ = [
    'EpochHook',
    'MoEFCOS',
    'MoEGeneralizedRCNN',
    'MoERetinaNet',
    'MoERetinaNetHead',
    'SimplePyramid',
    'TimmBackbone',
    'add_moe_config',
    'build_moe_resnet_fpn_backbone',
    'build_timm_fpn_backbone',
    'load_config',
    'register_coco',
    'register_digit_scenes',
    'route_resnet',
    'with_moe_losses',
]

add_moe_config(_C)
use_fast_metrics()
use_careful_reading()
register_digit_scenes()
