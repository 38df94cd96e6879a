"""RetinaNet on CondConv ResNet-50 with eight experts: the model, weights and schedule of the yaml file of this name.

    moe-zoo run lazyconfig_train_net.py --config-file configs/coco/retinanet_condconv_r50_fpn_1x.py --num-gpus 8

Schedule 1x: 90,000 iterations of 16 images = 1.44 M images, 12.2 epochs of COCO 2017. Ours: not run.
"""
from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from moe_zoo.detection import MoERetinaNet, TimmBackbone

model = get_config('common/models/retinanet.py').model
model._target_ = MoERetinaNet
model.backbone.bottom_up = L(TimmBackbone)(
    name='condconv_resnet50', pretrained=True, out_features=['res3', 'res4', 'res5'], freeze_at=2, norm='FrozenBN')
model.pixel_mean = [123.675, 116.28, 103.53]  # RGB, ImageNet's mean and std times 255
model.pixel_std = [58.395, 57.12, 57.375]
model.input_format = 'RGB'

dataloader = get_config('common/data/coco.py').dataloader
dataloader.train.mapper.use_instance_mask = False
dataloader.train.mapper.image_format = 'RGB'
optimizer = get_config('common/optim.py').SGD
optimizer.lr = 0.01
lr_multiplier = get_config('common/coco_schedule.py').lr_multiplier_1x
train = get_config('common/train.py').train
train.output_dir = 'runs/retinanet_condconv_r50_fpn_1x_lazy'
