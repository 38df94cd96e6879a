"""A small member of every family, whose routers tell images apart: for what becomes of models in compiled graphs.

Letters: B images.
"""
import timm
import torch
from torch import nn

from moe_zoo.layers import RoutedLayer
from moe_zoo.layers.deep_moe import ChannelGate
from moe_zoo.routing import Routing, set_epoch, trace_routing

RESNET = dict(layers=(1, 1, 1, 1), channels=(8, 8, 16, 16))
VIT = dict(patch_size=8, embed_dim=32, depth=2, num_heads=2, moe_layers=(1,), num_experts=4, head_zero_init=False)
# By what is told apart: name, keywords, side of the images.
CASES = {
    'condconv_resnet': ('condconv_resnet18', dict(RESNET, num_experts=3, start_block=4), 32),
    'condconv_mobile': ('condconv_mobilenetv1_025', dict(num_experts=3), 32),
    'dyconv_resnet': ('dyconv_resnet10', dict(channels=(8, 8, 16, 16)), 32),
    'deepmoe_resnet': ('deepmoe_narrow_resnet18', dict(RESNET, embed_widths=(8, 8), embed_stem=8), 32),
    'deepmoe_vgg': ('deepmoe_vgg16_cifar', dict(layers=(1, 1, 1, 1, 1), channels=(16, 16, 24, 24, 32)), 32),
    'moe_resnet': ('moe_resnet18_cifar', dict(RESNET, widths=8), 32),
    'moe_resnet_conv': ('moe_resnet18_cifar', dict(RESNET, layer='conv', num_selected=1, gate='conv'), 32),
    'pmoe_cnn': ('pmoe_cnn', {}, None),
    'pmoe_wrn': ('pmoe_wrn10_10', dict(channels=(8, 8, 16)), 32),
    'vmoe': ('vmoe_vit_s', VIT, 32),
    'vmoe_capacity': ('vmoe_vit_s', dict(VIT, eval_capacity_factor=0.6, batch_priority=True, group_images=1), 32),
    'expert_choice': ('vmoe_vit_s_ec', VIT, 32),
    'softmoe': ('softmoe_vit_s', dict(VIT, qk_norm=False), 32),
    'fusion': ('fusion_trio', dict(encoders=('test_resnet', 'test_vit'), img_size=32), 32),
    'moefied_mlp': ('moefied', dict(base='test_convnext', targets='*.3.*.0.mlp', layer='moe_mlp', num_experts=4), 32),
    'moefied_conv': ('moefied', dict(base='test_resnet', targets='layer4.*2', layer='condconv', num_experts=3), 32),
}


def build(case: str) -> nn.Module:
    """A model of 7 classes in evaluation mode."""
    torch.manual_seed(0)
    name, kwargs, _ = CASES[case]
    size = {'img_size': 32} if 'vit' in name else {}
    model = timm.create_model(name, num_classes=7, **size, **kwargs)
    for layer in model.modules():
        if isinstance(layer, ChannelGate):
            nn.init.uniform_(layer.weight, -4, 4)
        elif isinstance(layer, RoutedLayer):
            for key, parameter in layer.named_parameters():
                if key.split('.')[0] in ('router', 'routing_fn') and parameter.dim() > 1:
                    nn.init.normal_(parameter, std=3 * parameter.shape[-1] ** -0.5)
    set_epoch(model, 100)  # temperatures have fallen to 1
    _settle_norms(model, batch(case, 8))
    return model.eval()


@torch.no_grad()
def _settle_norms(model: nn.Module, x: torch.Tensor) -> None:
    """Statistics of images in every BatchNorm, without which a deep network has next to no output."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.8  # not all: no channel may be blown up that hardly varies
    model.train()(x)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def batch(case: str, number: int, seed: int = 0) -> torch.Tensor:
    """(B, C, H, W): coarse and fine noise, each image in a colour of its own."""
    name, _, side = CASES[case]
    chans, *size = (3, side, side) if side else timm.get_pretrained_cfg(name).input_size
    generator = torch.Generator().manual_seed(seed)
    coarse = nn.functional.interpolate(torch.randn(number, chans, 4, 4, generator=generator), size, mode='bilinear')
    colour = torch.randn(number, chans, 1, 1, generator=generator)
    return 3 * colour + 2 * coarse + torch.randn(number, chans, *size, generator=generator)


def decisions(model: nn.Module, x: torch.Tensor) -> dict[str, Routing]:
    """The record of every routed layer."""
    with torch.no_grad(), trace_routing(model) as trace:
        model(x)
    return {name: record for name, (record, *_) in trace.items()}
