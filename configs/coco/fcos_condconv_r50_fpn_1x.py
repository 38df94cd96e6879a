"""FCOS on CondConv ResNet-50 with eight experts; detectron2 has FCOS for LazyConfigs only.

    moe-zoo run lazyconfig_train_net.py --config-file configs/coco/fcos_condconv_r50_fpn_1x.py --num-gpus 8

Schedule 1x: 90,000 iterations of 16 images = 1.44 M images, 12.2 epochs of COCO 2017. Weights: timm's ResNet-50,
upcycled. No paper has this detector. Ours: not run.
"""
from detectron2.model_zoo import get_config

from moe_zoo.detection import MoEFCOS

from .retinanet_condconv_r50_fpn_1x import dataloader, lr_multiplier, optimizer, train  # noqa: F401
from .retinanet_condconv_r50_fpn_1x import model as retinanet

model = get_config('common/models/fcos.py').model
model._target_ = MoEFCOS
model.backbone.bottom_up = retinanet.backbone.bottom_up
model.pixel_mean, model.pixel_std = retinanet.pixel_mean, retinanet.pixel_std  # RGB
train.output_dir = 'runs/fcos_condconv_r50_fpn_1x'
