"""RetinaNet on V-MoE-S/32 under a simple feature pyramid: the model of the yaml file of this name, trained by AdamW.

    moe-zoo run lazyconfig_train_net.py --config-file configs/coco/retinanet_vmoe_s_fpn_1x.py --num-gpus 8
        model.backbone.net.checkpoint=runs/vmoe_vit_s/model_best.pth.tar

Schedule 1x: 90,000 iterations of 16 images = 1.44 M images, 12.2 epochs of COCO 2017. Weights: as in the yaml file.
Ours: not run.
"""
from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

from moe_zoo.detection import MoERetinaNet, SimplePyramid, TimmBackbone

from .retinanet_condconv_r50_fpn_1x import dataloader, lr_multiplier, train  # noqa: F401

model = get_config('common/models/retinanet.py').model
model._target_ = MoERetinaNet
model.backbone = L(SimplePyramid)(
    net=L(TimmBackbone)(name='vmoe_vit_s', checkpoint=''), levels=['res3', 'res4', 'res5'], out_channels=256, norm='LN')
model.pixel_mean = model.pixel_std = [127.5, 127.5, 127.5]
model.input_format = 'RGB'

optimizer = get_config('common/optim.py').AdamW
train.output_dir = 'runs/retinanet_vmoe_s_fpn_1x_lazy'
