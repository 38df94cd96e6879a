"""pMoE: convolutional networks whose experts choose patches, the two-layer form of the theory and the wide ResNet.

Patch-level Routing in Mixture-of-Experts is Provably Sample-efficient for Convolutional Neural Networks, Chowdhury,
Zhang, Wang, Liu, Chen, ICML 2023, https://arxiv.org/abs/2306.04073. Original code (TensorFlow):
https://github.com/nowazrabbani/pMoE_CNN.

`pmoe_cnn`: filters as large as a patch, ReLU, mean over the patches, output weights that are drawn once and never
trained. `pmoe_wrn10_10`: a wide ResNet of one block a group, whose third group is a convolution and a patch-routed
layer. Both have a dense twin.

Letters: B images, C channels, n patches an image, l of them an expert, E experts, m filters of all experts together.
"""
from functools import partial
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple, Union

import torch
from timm.layers import ClassifierHead, get_device_dtype, register_notrace_module, to_2tuple, use_reentrant_ckpt
from timm.models import generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn
from torch.nn import functional as F

from ..errors import InputError, nearest
from ..layers import PatchMoE, PatchMoEConv2d, RoutedModel
from ..layers.patch_moe import check_patch_size
from ..routing import checkpoint_routed
from .pretrained import build

__all__ = ['PatchCNN', 'PMoECNN', 'WideResNet', 'PMoEWideResNet']

# How the fixed output weights of a two-layer network are drawn.
OUTPUT_WEIGHTS = {
    'normal': 'standard normal (joint training, CNN)',
    'signed': 'the filters of expert e speak for class e: +1 against -1, shared between two logits (separate training)',
}
# What the sum over patches is divided by.
NORMALISE = {'patches': 'n, the patches of an image (code)', 'chosen': 'l, the patches of an expert (theory)'}


class PatchNet(nn.Module):
    """What the four networks share: stages in a row, a norm, a head.

    Args:
        stages: In order; each is a feature level.
        channels: Output channels of every stage.
        reductions: Input pixels a position of its output.
        norm: After the last stage.
        head: Pools and classifies.
        num_classes: Of the head.
        in_chans: Channels of the images.
    """

    def __init__(
            self,
            stages: Sequence[nn.Module],
            channels: Sequence[int],
            reductions: Sequence[int],
            norm: nn.Module,
            head: ClassifierHead,
            num_classes: int,
            in_chans: int,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.feature_info = [
            dict(num_chs=chs, reduction=reduction, module=f'stages.{i}')
            for i, (chs, reduction) in enumerate(zip(channels, reductions))]
        self.num_features = channels[-1]
        self.stages = nn.Sequential(*stages)
        self.norm = norm
        self.head = head
        self.head_hidden_size = head.num_features

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Nothing beyond timm's rule."""
        return set()

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """A new head; see timm's models."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """As timm's networks: the outputs of the stages in `indices`, the last one after the norm if asked."""
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        taken, most = feature_take_indices(len(self.feature_info), indices)
        last = len(self.feature_info) - 1
        intermediates = []
        for i, stage in enumerate(self.stages):
            if stop_early and i > most:
                break
            x = self._run_stage(stage, x)
            if i in taken:
                intermediates.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return intermediates
        return (self.norm(x) if i == last else x), intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove what these features do not need; see timm's models."""
        taken, most = feature_take_indices(len(self.feature_info), indices)
        cut = most < len(self.stages) - 1
        self.stages = self.stages[:most + 1]
        if prune_norm or cut:
            self.norm = nn.Identity()  # it is as wide as the last stage
        if cut:
            self.num_features = self.feature_info[most]['num_chs']
        if prune_head or cut:
            self.reset_classifier(0, '')
        return taken

    def _run_stage(self, stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing:
            return checkpoint_routed(stage, x, use_reentrant=use_reentrant_ckpt())
        return stage(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to the map before pooling."""
        if torch.jit.is_scripting():
            x = self.stages(x)
        else:
            for stage in self.stages:
                x = self._run_stage(stage, x)
        return self.norm(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        return self.head(x, pre_logits=pre_logits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


# The two-layer networks

class FixedLinear(nn.Module):
    """Output weights that are drawn once and never trained: a buffer `weight` (classes, m), no bias.

    Args:
        in_features: m.
        num_classes: 1 is one logit for two classes.
        output_weights: A key of `OUTPUT_WEIGHTS`.
        num_experts: E, for 'signed': the filters come in E equal blocks.

    Raises:
        InputError: An unknown key, or 'signed' where classes and experts do not match.
    """

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            output_weights: str = 'normal',
            num_experts: int = 1,
            device=None,
            dtype=None,
    ):
        super().__init__()
        _check_key('output_weights', output_weights, OUTPUT_WEIGHTS)
        weight = torch.empty(num_classes, in_features, device=device, dtype=dtype)
        if output_weights == 'signed':
            if num_experts < 2 or num_classes not in ((1, 2) if num_experts == 2 else (num_experts,)):
                raise InputError(
                    f"output_weights='signed' with num_experts={num_experts}, num_classes={num_classes}: "
                    'use one expert a class, 2 experts for a single logit.')
            votes = torch.eye(num_experts) - 1 / num_experts  # 2 classes: +1/2 against -1/2, whose logits differ by 1
            votes = votes[1:] - votes[:1] if num_classes == 1 else votes
            weight.copy_(votes.repeat_interleave(in_features // num_experts, dim=1))
        else:
            nn.init.normal_(weight)
        self.register_buffer('weight', weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)

    def extra_repr(self) -> str:
        return f'{self.weight.shape[1]}, {self.weight.shape[0]}'


class FixedHead(ClassifierHead):
    """timm's pooling head with a `FixedLinear` classifier, also after a reset."""

    def __init__(
            self,
            in_features: int,
            num_classes: int,
            pool_type: str = 'avg',
            drop_rate: float = 0.,
            output_weights: str = 'normal',
            num_experts: int = 1,
            device=None,
            dtype=None,
    ):
        super().__init__(in_features, 0, pool_type, drop_rate, device=device, dtype=dtype)
        self.output_weights = output_weights
        self.num_experts = num_experts
        self._draw(num_classes, device, dtype)

    def _draw(self, num_classes: int, device, dtype) -> None:
        if num_classes > 0:
            fc = FixedLinear(
                self.num_features, num_classes, self.output_weights, self.num_experts, device=device, dtype=dtype)
            self.fc = fc.train(self.training)

    def reset(self, num_classes: int, pool_type: Optional[str] = None, device=None, dtype=None, **kwargs) -> None:
        """See timm's ClassifierHead."""
        super().reset(0, pool_type, device=device, dtype=dtype, **kwargs)
        self._draw(num_classes, device, dtype)


@register_notrace_module
class PatchConv2d(nn.Conv2d):
    """One filter response a patch: a convolution whose kernel and stride are the patch, and fills the image."""

    def __init__(self, in_chans: int, num_filters: int, patch_size: Tuple[int, int], device=None, dtype=None):
        super().__init__(in_chans, num_filters, patch_size, stride=patch_size, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            check_patch_size(self.kernel_size, x)
        return self._conv_forward(x, self.weight, self.bias)


class PatchScale(nn.Module):
    """Makes the mean over the n patches of a map the sum over them divided by l."""

    def __init__(self, patches_per_expert: int):
        super().__init__()
        self.patches_per_expert = patches_per_expert

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (x.shape[2] * x.shape[3] / self.patches_per_expert)


class TwoLayerNet(PatchNet):
    """f(x) = sum over filters r and patches j of a_r relu(filter response rj), divided by n or l; a is never trained.

    There is no `get_classifier`: nothing in the head is trained. The three feature levels are the responses, the same
    after the ReLU and after the normalisation.
    """

    def __init__(
            self,
            filters: nn.Module,
            scale: nn.Module,
            head: FixedHead,
            patch_size: Tuple[int, int],
            num_classes: int,
            in_chans: int,
    ):
        super().__init__(
            (filters, nn.ReLU(), scale), 3 * (head.in_features,), 3 * (max(patch_size),), nn.Identity(), head,
            num_classes, in_chans)


class PatchCNN(TwoLayerNet):
    """The CNN that pMoE is compared with: every filter sees every patch.

    Args:
        num_classes: 1 is the paper's single logit.
        in_chans: Channels of the images.
        global_pool: 'avg' is the paper's mean over patches.
        num_filters: m.
        patch_size: Height and width of a patch in pixels.
        init_std: Of the filters; the output weights are standard normal.
        drop_rate: Dropout before the output weights.

    Raises:
        InputError: In forward, patches that do not fill the image.
    """

    def __init__(
            self,
            num_classes: int = 2,
            in_chans: int = 1,
            global_pool: str = 'avg',
            num_filters: int = 40,
            patch_size: Union[int, Tuple[int, int]] = 28,
            init_std: float = 0.1,
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        patch_size = to_2tuple(patch_size)
        filters = PatchConv2d(in_chans, num_filters, patch_size, **dd)
        nn.init.normal_(filters.weight, std=init_std)
        head = FixedHead(num_filters, num_classes, global_pool, drop_rate, **dd)
        super().__init__(filters, nn.Identity(), head, patch_size, num_classes, in_chans)


class PMoECNN(RoutedModel, TwoLayerNet):
    """The two-layer network of the theory with patch-level routing.

    Joint training is any training loop. Separate training has two experts, one a class, and hard gates: routers first,
    by a linear loss, then frozen while the experts train. Our training tool does it by itself with `router_epochs`; a
    loop of one's own calls `set_mode('router')`, adds the auxiliary losses of the records (`set_aux_loss`), and
    `set_mode('experts')` for the second part.

    >>> timm.create_model('pmoe_cnn', num_experts=2, patches_per_expert=2, gate_order='hard', output_weights='signed',
    ...                   init_std=0.1, router_init_std=0.1, router_epochs=100)

    Args:
        num_classes: 1 is the paper's single logit.
        in_chans: Channels of the images.
        global_pool: 'avg' is the paper's mean over patches.
        num_filters: m, over all experts.
        patch_size: Height and width of a patch in pixels.
        num_experts: E.
        patches_per_expert: l.
        gate_order: A key of `moe_zoo.layers.patch_moe.GATE_ORDERS`.
        normalise: A key of `NORMALISE`; a constant factor, which changes the effective learning rate.
        init_std: Of the filters.
        router_init_std: Of the routers.
        output_weights: A key of `OUTPUT_WEIGHTS`.
        router_epochs: Epochs that train the routers alone, and after which they are frozen; needs hard gates.
        drop_rate: Dropout before the output weights.

    Raises:
        InputError: A value out of range; in forward, patches that do not fill the image, or fewer of them than l.
    """

    def __init__(
            self,
            num_classes: int = 2,
            in_chans: int = 1,
            global_pool: str = 'avg',
            num_filters: int = 40,
            patch_size: Union[int, Tuple[int, int]] = 28,
            num_experts: int = 8,
            patches_per_expert: int = 6,
            gate_order: str = 'after',
            normalise: str = 'patches',
            init_std: float = 0.01,
            router_init_std: float = 1e-4,
            output_weights: str = 'normal',
            router_epochs: int = 0,
            drop_rate: float = 0.,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        _check_key('normalise', normalise, NORMALISE)
        patch_size = to_2tuple(patch_size)
        filters = PatchMoE(
            in_chans, num_filters, patch_size, num_experts, patches_per_expert, gate_order, init_std,
            router_init_std, **dd)
        head = FixedHead(num_filters, num_classes, global_pool, drop_rate, output_weights, num_experts, **dd)
        scale = nn.Identity() if normalise == 'patches' else PatchScale(patches_per_expert)
        super().__init__(filters, scale, head, patch_size, num_classes, in_chans)
        self.router_epochs = router_epochs
        if router_epochs > 0:
            filters.check_separate('router_epochs', router_epochs)

    @torch.jit.ignore
    def set_mode(self, mode: str) -> None:
        """Choose what trains: 'joint', 'router' or 'experts'; see `moe_zoo.layers.PatchMoE.set_mode`."""
        self.stages[0].set_mode(mode)

    @torch.jit.ignore
    def set_epoch(self, epoch: int) -> None:
        """Routers alone in the first `router_epochs` epochs, experts alone after them; called as an epoch begins."""
        if self.router_epochs > 0:
            self.set_mode('router' if epoch < self.router_epochs else 'experts')

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(stem=r'^stages\.0\.router', blocks=r'^stages\.(\d+)')


# The wide ResNets

class PreActBlock(nn.Module):
    """Pre-activation block of two 3 x 3 convolutions; a change of width or size goes through a 1 x 1 convolution."""

    def __init__(self, in_chs: int, out_chs: int, stride: int, bn_args: Dict[str, float], device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = nn.BatchNorm2d(in_chs, **bn_args, **dd)
        self.act1 = nn.ReLU()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(out_chs, **bn_args, **dd)
        self.act2 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, **dd)
        same = in_chs == out_chs and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_chs, out_chs, 1, stride, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(self.act1(self.norm1(x)))
        y = self.conv2(self.act2(self.norm2(y)))
        return self.shortcut(x) + y


class WideResNet(PatchNet):
    """WRN of pre-activation blocks, strides 1, 2, 2, with biases in its convolutions; WRN-10-10 by default.

    Args:
        num_classes, in_chans, global_pool: As in timm.
        stem_chs: Channels of the stem.
        channels: Channels of the three groups.
        depths: Blocks of the three groups.
        drop_rate: Dropout before the classifier.
        bn_eps, bn_momentum: Of every batch norm; the defaults are those of Keras.
        last_group: Makes another third group from (in channels, out channels, bn_args, dd).
    """

    def __init__(
            self,
            num_classes: int = 10,
            in_chans: int = 3,
            global_pool: str = 'avg',
            stem_chs: int = 16,
            channels: Tuple[int, int, int] = (160, 320, 640),
            depths: Tuple[int, int, int] = (1, 1, 1),
            drop_rate: float = 0.,
            bn_eps: float = 1e-3,
            bn_momentum: float = 0.01,
            last_group: Optional[Callable[..., nn.Module]] = None,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        bn_args = dict(eps=bn_eps, momentum=bn_momentum)
        last_group = last_group or partial(_group, depth=depths[2], stride=2)
        stages = (
            nn.Conv2d(in_chans, stem_chs, 3, padding=1, **dd),
            _group(stem_chs, channels[0], bn_args, dd, depths[0], stride=1),
            _group(channels[0], channels[1], bn_args, dd, depths[1], stride=2),
            last_group(channels[1], channels[2], bn_args, dd),
        )
        norm = nn.Sequential(nn.BatchNorm2d(channels[2], **bn_args, **dd), nn.ReLU())
        head = ClassifierHead(channels[2], num_classes, global_pool, drop_rate, **dd)
        super().__init__(stages, (stem_chs, *channels), (1, 1, 2, 4), norm, head, num_classes, in_chans)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):  # as Keras draws them
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def get_classifier(self) -> nn.Module:
        return self.head.fc

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        return dict(stem=r'^stages\.0', blocks=[(r'^stages\.(\d+)', None), (r'^norm', (99999,))])


class PMoEWideResNet(RoutedModel, WideResNet):
    """WRN-pMoE: the third group is norm, ReLU, a 3 x 3 convolution of stride 2 and a patch-routed layer, no shortcut.

    Args:
        num_experts: E; each has `channels[2] / E` output channels.
        patches_per_expert: l.
        patch_size: Height and width of a patch in cells of the last map, an eighth of the image's cells for 32 pixels.
        kernel_size: Of the experts' convolutions.
        gate_order: A key of `moe_zoo.layers.patch_moe.GATE_ORDERS`.
        norm_first: Norm and ReLU of an expert before its gates; see `moe_zoo.layers.patch_moe.PatchExpert`.
        router_init_std: Of the routers.
        kwargs: As in `WideResNet`; the third of `depths` is without meaning.

    Raises:
        InputError: A value out of range; in forward, patches that do not fill the map, or fewer of them than l.
    """

    def __init__(
            self,
            num_classes: int = 10,
            num_experts: int = 4,
            patches_per_expert: int = 16,
            patch_size: Union[int, Tuple[int, int]] = 1,
            kernel_size: int = 1,
            gate_order: str = 'before',
            norm_first: bool = False,
            router_init_std: float = 1e-4,
            **kwargs,
    ):
        routed_args = dict(
            num_experts=num_experts, patches_per_expert=patches_per_expert, patch_size=patch_size,
            kernel_size=kernel_size, gate_order=gate_order, norm_first=norm_first, router_init_std=router_init_std)
        super().__init__(num_classes, last_group=partial(_routed_group, routed_args=routed_args), **kwargs)


def _group(in_chs: int, out_chs: int, bn_args: Dict, dd: Dict, depth: int, stride: int) -> nn.Sequential:
    first = PreActBlock(in_chs, out_chs, stride, bn_args, **dd)
    return nn.Sequential(first, *[PreActBlock(out_chs, out_chs, 1, bn_args, **dd) for _ in range(depth - 1)])


def _routed_group(in_chs: int, out_chs: int, bn_args: Dict, dd: Dict, routed_args: Dict[str, Any]) -> nn.Sequential:
    experts = routed_args['num_experts']
    if experts < 1 or out_chs % experts:
        raise InputError(f'num_experts={experts} with {out_chs} channels in the last group: use a divisor of them.')
    norm_layer = partial(nn.BatchNorm2d, **bn_args)
    return nn.Sequential(
        norm_layer(in_chs, **dd),
        nn.ReLU(),
        nn.Conv2d(in_chs, out_chs, 3, stride=2, padding=1, **dd),
        PatchMoEConv2d(out_chs, out_chs // experts, norm_layer=norm_layer, **routed_args, **dd),
    )


def _check_key(name: str, value: str, known: Dict[str, str]) -> None:
    if value not in known:
        raise InputError(f'{name}={value!r} is not one of {", ".join(known)}.{nearest(value, known)}')


def _cfg(**kwargs) -> Dict[str, Any]:
    return {'url': '', 'crop_pct': 1.0, 'interpolation': 'bilinear', 'license': 'apache-2.0',
            'paper_ids': 'arXiv:2306.04073', 'classifier': 'head.fc', 'first_conv': 'stages.0', **kwargs}


def _digits_cfg(**kwargs) -> Dict[str, Any]:
    """112 x 112 grey images of 4 x 4 digits, pixels from 0 to 1; 3 x 3 digits are the fewest of which l = 6 differ."""
    return _cfg(num_classes=2, input_size=(1, 112, 112), min_input_size=(1, 84, 84), pool_size=(4, 4), mean=(0.,),
                std=(1.,), **kwargs)


def _cifar_cfg(**kwargs) -> Dict[str, Any]:
    return _cfg(num_classes=10, input_size=(3, 32, 32), pool_size=(8, 8), mean=(0., 0., 0.), std=(1., 1., 1.), **kwargs)


default_cfgs = generate_default_cfgs({
    'pmoe_cnn.untrained': _digits_cfg(),
    'pmoe_cnn_dense.untrained': _digits_cfg(),
    'pmoe_wrn10_10.untrained': _cifar_cfg(),
    'pmoe_wrn10_10_dense.untrained': _cifar_cfg(),
})


def _create(model_cls: type, variant: str, pretrained: bool, **kwargs) -> PatchNet:
    levels = 4 if issubclass(model_cls, WideResNet) else 3
    feature_cfg = dict(out_indices=tuple(range(levels)), flatten_sequential=True)
    return build(model_cls, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def pmoe_cnn(pretrained: bool = False, **kwargs) -> PMoECNN:
    """Two layers, 8 experts of 5 filters, each on 6 of 16 patches, jointly trained."""
    return _create(PMoECNN, 'pmoe_cnn', pretrained, **kwargs)


@register_model
def pmoe_cnn_dense(pretrained: bool = False, **kwargs) -> PatchCNN:
    """The CNN of as many filters, all of them on all patches."""
    return _create(PatchCNN, 'pmoe_cnn_dense', pretrained, **kwargs)


@register_model
def pmoe_wrn10_10(pretrained: bool = False, **kwargs) -> PMoEWideResNet:
    """WRN-10-10 for 32 x 32 images, last group routed: 4 experts of 160 channels, each on 16 of 64 cells."""
    return _create(PMoEWideResNet, 'pmoe_wrn10_10', pretrained, **kwargs)


@register_model
def pmoe_wrn10_10_dense(pretrained: bool = False, **kwargs) -> WideResNet:
    """WRN-10-10: three groups of one pre-activation block, 160, 320 and 640 channels."""
    return _create(WideResNet, 'pmoe_wrn10_10_dense', pretrained, **kwargs)
