"""moe_zoo in detectron2: backbones, a meta-architecture, and data sets, registered on import.

The only package that imports detectron2. Backbones: `build_timm_fpn_backbone`, `build_moe_resnet_fpn_backbone`;
meta-architecture: `MoERetinaNet`; data sets: `digit_scenes_train`, `digit_scenes_val`.
"""
import warnings

with warnings.catch_warnings():
    warnings.simplefilter('ignore', FutureWarning)  # of older code: detectron2 and fvcore script functions on import
    import detectron2.modeling  # noqa: F401

from .coco import register_coco, register_digit_scenes
from .config import add_moe_config, install, load_config
from .resnet_backbone import build_moe_resnet_fpn_backbone
from .retinanet import MoERetinaNet
from .timm_backbone import TimmBackbone, build_timm_fpn_backbone

__all__ = [
    'MoERetinaNet',
    'TimmBackbone',
    'add_moe_config',
    'build_moe_resnet_fpn_backbone',
    'build_timm_fpn_backbone',
    'install',
    'load_config',
    'register_coco',
    'register_digit_scenes',
]

register_digit_scenes()
