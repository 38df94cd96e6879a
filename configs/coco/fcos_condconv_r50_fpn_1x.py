"""FCOS on CondConv ResNet-50 with eight experts; detectron2 has FCOS for LazyConfigs only.

    moe-zoo run lazyconfig_train_net.py --config-file configs/coco/fcos_condconv_r50_fpn_1x.py --num-gpus 8

Schedule 1x: 90,000 iterations of 16 images = 1.44 M images, 12.2 epochs of COCO 2017. Weights: timm's ResNet-50,
upcycled. No paper has this detector. Ours: not run.
"""
from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from moe_zoo.detection import MoEFCOS, TimmBackbone

model = get_config('common/models/fcos.py').model
model._target_ = MoEFCOS
model.backbone.bottom_up = L(TimmBackbone)(
    name='condconv_resnet50', pretrained=True, out_features=['res3', 'res4', 'res5'], freeze_at=2, norm='FrozenBN')
model.pixel_mean = [123.675, 116.28, 103.53]  # RGB, ImageNet's mean and std times 255
model.pixel_std = [58.395, 57.12, 57.375]

dataloader = get_config('common/data/coco.py').dataloader
dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.image_format = 'RGB'
optimizer = get_config('common/optim.py').SGD
optimizer.lr = 0.01
lr_multiplier = get_config('common/coco_schedule.py').lr_multiplier_1x
train = get_config('common/train.py').train
train.output_dir = 'runs/fcos_condconv_r50_fpn_1x'
