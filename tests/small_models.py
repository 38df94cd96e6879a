"""Every registered model, small enough for a test of all of them, and awake: its routes matter and differ.

Fresh networks are often half asleep (heads and gates of zeros, experts that are all alike), and a test of them shows
nothing. Here what is zero is drawn, and batch norms know the images.

Letters: B images, T routed items, n items an image, E experts.
"""
from typing import Any, Dict, List, Tuple

import timm
import torch
from torch import nn

import moe_zoo  # noqa: F401 - registers the models
from moe_zoo.routing import Routing, trace_routing

NAMES = tuple(sorted(
    name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith('moe_zoo.')))
# A member of each family.
FAMILIES = (
    'condconv_mobilenetv1_025', 'deepmoe_resnet56_cifar', 'dyconv_resnet10', 'fusion_trio', 'moe_resnet18_cifar',
    'moefied', 'pmoe_cnn', 'pmoe_wrn10_10', 'softmoe_vit_s', 'vmoe_vit_s', 'vmoe_vit_s_ec')
MOST = 8  # images
TOKENS = dict(
    embed_dim=64, depth=3, num_heads=4, moe_layers=[0, 2], representation_size=32, head_zero_init=False,
    same_init=False, img_size=56)
RESNET = dict(layers=(1, 1, 1, 1), channels=(16, 24, 32, 40))
VGG = dict(layers=(1, 1, 1, 1, 1), channels=(16, 16, 24, 24, 32))
PMOE = dict(router_init_std=1.0)  # 1e-4, the paper's, is below any margin
SMALL: Dict[str, Dict[str, Any]] = {
    'deepmoe_resnet56_cifar': dict(layers=(1, 1, 1)),
    'deepmoe_resnet110_cifar': dict(layers=(2, 2, 2)),
    'deepmoe_resnet56_cifar_dense': dict(layers=(1, 1, 1)),
    'deepmoe_resnet110_cifar_dense': dict(layers=(2, 2, 2)),
    'deepmoe_vgg16_cifar': VGG,
    'deepmoe_vgg16_cifar_dense': VGG,
    'fusion_trio': dict(encoders=('test_resnet', 'test_efficientnet')),
    'moefied': dict(base='resnet10t'),
    'pmoe_cnn': PMOE,
    'pmoe_wrn10_10': dict(PMOE, channels=(16, 24, 32)),
    'pmoe_wrn10_10_dense': dict(channels=(16, 24, 32)),
    'softmoe_vit_s': dict(TOKENS, num_experts=8, img_size=64),
}


def keywords(name: str) -> Dict[str, Any]:
    """What makes a model small."""
    if name in SMALL:
        return SMALL[name]
    if 'vit_' in name:
        patch = timm.create_model(name, device='meta').patch_embed.patch_size[0]
        return dict(TOKENS, img_size=4 * patch)
    if 'resnet' in name and not name.endswith('cifar'):
        return RESNET
    return dict(num_experts=3) if name.startswith('condconv') else {}


def image_size(name: str, model: nn.Module) -> Tuple[int, int, int]:
    """Channels, height and width of its images."""
    if hasattr(model, 'patch_embed'):
        return model.in_chans, *model.patch_embed.img_size
    channels, height, width = model.pretrained_cfg['input_size']
    side = height if name.startswith('pmoe') else min(height, 64 if 'resnet' in name else 128)  # of their 32nd parts
    return channels, side, min(width, side)


def small_model(name: str, **more: Any) -> nn.Module:
    """The model in evaluation mode, always with the same weights."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **{**keywords(name), **more})
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    _settle_batch_norms(model, images_of(name, model, MOST))
    return model.eval()


@torch.no_grad()
def _settle_batch_norms(model: nn.Module, x: torch.Tensor) -> None:
    """Running statistics of these very images: with others, values of a fresh network grow from layer to layer, and
    errors with them."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()  # nothing is dropped and no noise is added
    for norm in norms:
        norm.train().momentum = 1.0
    model(x)
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def randomise_statistics(model: nn.Module) -> None:
    """Norms that do something: at their initial values a wrong eps or a lost norm would not show."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)


def load_dense_kernels(model: nn.Module, dense: nn.Module) -> None:
    """Give a model that mixes kernels those of its dense twin, every expert a copy; routing functions stay."""
    weights = dense.state_dict()
    for key, value in model.state_dict().items():
        if 'routing_fn' in key:
            weights[key] = value
        elif value.shape != weights[key].shape:  # (E, elements) here, one kernel there
            weights[key] = weights[key].flatten().expand(len(value), -1)
    model.load_state_dict(weights)


def images_of(name: str, model: nn.Module, number: int) -> torch.Tensor:
    """The first of `MOST` images of noise, each of another contrast and brightness."""
    x = torch.randn(MOST, *image_size(name, model), generator=torch.Generator().manual_seed(1))
    levels = torch.linspace(-1, 1, MOST).view(-1, 1, 1, 1)
    return (x * (1 + 0.5 * levels) + levels.flip(0))[:number]


@torch.no_grad()
def run_traced(model: nn.Module, x: torch.Tensor) -> Tuple[torch.Tensor, List[Routing]]:
    """Logits, and the records of all routed layers in order."""
    with trace_routing(model) as trace:
        logits = model(x)
    return logits, [routing for routings in trace.values() for routing in routings]


def routes(routing: Routing, margin: float = 1e-5) -> Tuple[torch.Tensor, torch.Tensor]:
    """Who was chosen, and where that was no close call.

    Returns:
        chosen: (B, n, E) bool, or float32 weights where every expert is mixed.
        sure: Broadcasts to it: whether the margin between the last that was chosen and the first that was not is
            larger than `margin`, in what decided.
    """
    B, E = routing.shape[0], routing.num_experts
    logits = routing.logits.view(B, -1, E)
    if routing.indices is None:
        return routing.weights.view(B, -1, E), torch.ones(1, 1, 1, dtype=torch.bool)
    axis = 1 if routing.by_expert else 2  # experts rank the items of an image, or items the experts
    pairs = torch.zeros_like(routing.logits).scatter(1, routing.indices, 1.)
    if routing.by_expert:
        pairs = pairs * torch.zeros_like(pairs).scatter(1, routing.indices, routing.kept.float())
    chosen = pairs.view(B, -1, E) > 0
    # Experts of a token rank by logits or, alike, their softmax; tokens of an expert by the softmax, patches by logits.
    of_tokens = routing.by_expert and bool((routing.gates.sum(dim=1) - 1).abs().max() < 1e-3)
    scores = logits.softmax(dim=-1) if of_tokens else logits
    last = scores.masked_fill(~chosen, float('inf')).amin(dim=axis, keepdim=True)
    first = scores.masked_fill(chosen, float('-inf')).amax(dim=axis, keepdim=True)
    return chosen, last - first > margin
