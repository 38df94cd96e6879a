"""Situational fusion of timm's networks: several encoders, a head on each, mixed by a gate that looks at the raw image.

Situational Fusion of Visual Representation for Visual Navigation, Shen, Xu, Zhu, Guibas, Fei-Fei, Savarese, ICCV 2019,
https://arxiv.org/abs/1908.09073: there 25 Taskonomy encoders and a policy on each, here any encoders of timm and a
classifier on each.

Letters: B images, C channels, K encoders, D_k values of the representation of encoder k.
"""
from functools import partial
from typing import Any, Dict, List, Optional, Sequence, Set, Tuple, Union

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import get_device_dtype, to_2tuple
from timm.models import generate_default_cfgs, register_model, resolve_pretrained_cfg
from timm.models._features import feature_take_indices
from torch import nn

from ..errors import InputError, nearest
from ..layers import RoutedModel
from ..layers.situational_fusion import Encoder, SituationalFusion
from .pretrained import build

__all__ = ['FusionNet', 'PlainFusionNet']

TRIO = ('resnet18', 'mobilenetv3_small_100', 'vit_tiny_patch16_224')
SIZE = (224, 224)


class TimmEncoder(Encoder):
    """A timm network without its head, on images as this network normalises them.

    Args:
        name: Of the network in timm.
        mean, std: By which the images that come in were normalised.
        in_chans: Their channels.
        img_size: Where the network is for images of one size only, build it for this one; None leaves it.
        pretrained: Load timm's weights of it.
        freeze: Keep it as it is.

    Attributes:
        num_features: D of its representation, after pooling.

    Raises:
        InputError: The network cannot be built for such images, or its weights cannot be fetched.
    """

    def __init__(
            self,
            name: str,
            mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
            std: Sequence[float] = IMAGENET_DEFAULT_STD,
            in_chans: int = 3,
            img_size: Optional[Tuple[int, int]] = None,
            pretrained: bool = False,
            freeze: bool = False,
            device=None,
            dtype=None,
    ):
        cfg = resolve_pretrained_cfg(name)
        size = dict(img_size=img_size) if img_size is not None and cfg.fixed_input_size else {}
        try:
            net = timm.create_model(
                name, pretrained=pretrained, num_classes=0, in_chans=in_chans, **size, device=device, dtype=dtype)
        except (AssertionError, RuntimeError, TypeError) as error:
            if isinstance(error, InputError):  # of an encoder that is ours
                raise
            wanted = f'in_chans={in_chans}' + ''.join(f', {key}={value}' for key, value in size.items())
            raise InputError(f'The encoder {name!r} cannot be built with {wanted}: {error}') from error
        except OSError as error:
            raise InputError(
                f"pretrained=True: timm's weights of the encoder {name!r} cannot be fetched ({type(error).__name__}); "
                'pass weights of the whole model as pretrained_cfg_overlay=dict(file=...).') from error
        if size:
            _check_runs(name, in_chans, img_size)
        super().__init__(net, freeze)
        self.name = name
        self.num_features = net.head_hidden_size
        # (x std + mean - mean_k) / std_k, mean over the channels where images do not have those of the statistics.
        given, own = (torch.tensor(each, device='cpu') for each in ((mean, std), (cfg.mean, cfg.std)))
        scale, shift = given[1] / own[1], (given[0] - own[0]) / own[1]
        if in_chans != len(scale):
            scale, shift = (each.mean().expand(in_chans) for each in (scale, shift))
        self.normalises = bool((scale - 1).abs().max() > 1e-6 or shift.abs().max() > 1e-6)
        for key, value in (('scale', scale), ('shift', shift)):
            buffer = torch.empty(1, in_chans, 1, 1, device=device, dtype=dtype)
            self.register_buffer(key, buffer.copy_(value.view(1, -1, 1, 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) to (B, D)."""
        return self.net(self.normalise(x))

    def normalise(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale + self.shift if self.normalises else x

    def forward_map(self, x: torch.Tensor, norm: bool = False) -> Tuple[torch.Tensor, torch.Tensor]:
        """(B, C, H, W) to (B, D) and the network's last feature map."""
        features, maps = self.net.forward_intermediates(self.normalise(x), indices=1, norm=norm, output_fmt='NCHW')
        return self.net.forward_head(features), maps[-1]


class PlainFusionNet(nn.Module):
    """Encoders of timm, a classifier on each, mixed by what a gate makes of the raw image.

    The output is by default the logarithm of a mixture of distributions (see `SituationalFusion`): a cross-entropy and
    an argmax take it as they take logits. `forward_features` returns what the head needs, the K representations and
    the image; feature levels (`features_only`) are the last maps of the encoders, the finest first.

    Args:
        encoders: Names of timm models.
        num_classes: 0 returns the weighted representations side by side.
        in_chans: C.
        img_size: Build encoders that are for images of one size for this one; None is 224 x 224, which they then must
            be for.
        mode: A key of `moe_zoo.layers.situational_fusion.MODES`; 'single' builds one encoder only.
        single: Which, for 'single'.
        mix: 'probabilities' or 'logits'; see `SituationalFusion`, as for the next five.
        representation_drop: Probability of dropping a representation of an image in training.
        drop_rate: Dropout of the representations before the heads.
        affinity: (K, K) how much the representations tell the same.
        losses: Auxiliary losses of the gate.
        head_dim: Units of a hidden layer in every head.
        freeze_encoders: Keep the encoders as they are. They had better be pretrained.
        encoder_pretrained: Load timm's weights of the encoders. Not for `create_model`, where `pretrained` says it.
        mean, std: By which the images that come in were normalised; every encoder gets them as it wants them.

    Raises:
        InputError: An encoder that timm does not have, encoders of different input sizes, or what `SituationalFusion`
            raises.
    """

    def __init__(
            self,
            encoders: Sequence[str] = TRIO,
            num_classes: int = 1000,
            in_chans: int = 3,
            img_size: Optional[Union[int, Tuple[int, int]]] = None,
            mode: str = 'action',
            single: int = 0,
            mix: str = 'probabilities',
            representation_drop: float = 0.,
            drop_rate: float = 0.,
            affinity: Any = None,
            losses: Sequence[Tuple[str, float]] = (),
            head_dim: int = 0,
            freeze_encoders: bool = False,
            encoder_pretrained: bool = False,
            mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
            std: Sequence[float] = IMAGENET_DEFAULT_STD,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        names = _chosen(encoders, mode, single)
        if img_size is None:
            _check_sizes(names)
        else:
            img_size = to_2tuple(img_size)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.encoders = nn.ModuleList([
            TimmEncoder(name, mean, std, in_chans, img_size, encoder_pretrained, freeze_encoders, **dd)
            for name in names])
        dims = [encoder.num_features for encoder in self.encoders]
        self.fusion = SituationalFusion(
            dims, num_classes, mode, mix, in_chans=in_chans, head_dim=head_dim, drop_rate=drop_rate,
            representation_drop=representation_drop, affinity=None if mode == 'single' else affinity, losses=losses,
            **dd)
        self._describe()

    def _describe(self) -> None:
        self.num_features = self.head_hidden_size = sum(encoder.num_features for encoder in self.encoders)
        last = [encoder.net.feature_info[-1] for encoder in self.encoders]
        self.levels = sorted(range(len(last)), key=lambda k: last[k]['reduction'])  # the encoder of every level
        self.feature_info = [
            dict(num_chs=last[k]['num_chs'], reduction=last[k]['reduction'], module=f'encoders.{k}')
            for k in self.levels]

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """What the encoders say."""
        return {
            f'encoders.{k}.net.{name}' for k, encoder in enumerate(self.encoders)
            for name in getattr(encoder.net, 'no_weight_decay', set)()}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Two groups, encoders and fusion: networks of different depths have no blocks in common."""
        return dict(stem=r'^encoders', blocks=[(r'^fusion', None)])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for encoder in self.encoders:
            encoder.net.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fusion.heads

    def reset_classifier(self, num_classes: int) -> None:
        """New heads. Every encoder keeps its own pooling."""
        self.num_classes = num_classes
        self.fusion.reset_heads(num_classes, **get_device_dtype(self))

    def forward_features(self, x: torch.Tensor) -> List[torch.Tensor]:
        """(B, C, H, W) to the K representations (B, D_k), and the image itself, for the gate."""
        features: List[torch.Tensor] = []
        for encoder in self.encoders:
            features.append(encoder(x))
        features.append(x)
        return features

    def forward_head(self, features: List[torch.Tensor], pre_logits: bool = False) -> torch.Tensor:
        """What `forward_features` returned to (B, classes); `pre_logits` as in `SituationalFusion`."""
        return self.fusion(features[-1], features[:-1], None, pre_logits)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[List[torch.Tensor], List[torch.Tensor]]]:
        """The maps of the levels in `indices`; see timm's models. `stop_early` runs no others."""
        assert output_fmt in ('NCHW',), 'Output shape must be NCHW.'
        taken, _ = feature_take_indices(len(self.levels), indices)
        wanted = [self.levels[i] for i in taken]
        maps: Dict[int, torch.Tensor] = {}
        features: List[torch.Tensor] = []
        for k, encoder in enumerate(self.encoders):
            if k in wanted:
                representation, maps[k] = encoder.forward_map(x, norm)
                features.append(representation)
            elif not (stop_early and intermediates_only):
                features.append(encoder(x))
        intermediates = [maps[k] for k in wanted]
        return intermediates if intermediates_only else ([*features, x], intermediates)

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove the encoders of other features, with heads and gate; where those stay, so do all encoders.

        Returns:
            The indices of these features from now on.
        """
        taken, _ = feature_take_indices(len(self.levels), indices)
        if not prune_head:
            return taken
        self.encoders = nn.ModuleList([self.encoders[self.levels[i]] for i in taken])
        self.num_classes = 0
        dims = [encoder.num_features for encoder in self.encoders]
        fusion = SituationalFusion(dims, 0, 'concat', **get_device_dtype(self))
        self.fusion = fusion.train(self.training)
        self._describe()
        return list(range(len(taken)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


class FusionNet(RoutedModel, PlainFusionNet):
    """The same with `set_aux_loss`."""


def _chosen(encoders: Sequence[str], mode: str, single: int) -> List[str]:
    """The names that are to be built."""
    names = [encoders] if isinstance(encoders, str) else list(encoders)
    for name in names:
        if not timm.is_model(name):
            raise InputError(f'encoders: timm has no model {name!r}.{nearest(name, timm.list_models())}')
        if '.' in name and name not in timm.list_models(f'{name.partition(".")[0]}.*', include_tags=True):
            raise InputError(f'encoders: timm has no weights {name!r}.{nearest(name, timm.list_pretrained())}')
    if mode != 'single':
        return names
    if not 0 <= single < len(names):
        raise InputError(f'single={single}: there are {len(names)} encoders, counted from 0.')
    return [names[single]]


def _check_sizes(names: Sequence[str]) -> None:
    """Raises: InputError: An encoder takes images of one size only, and it is not 224 x 224."""
    for name in names:
        cfg = resolve_pretrained_cfg(name)
        size = cfg.input_size[-2:]
        if cfg.fixed_input_size and size != SIZE:
            raise InputError(
                f'The encoder {name!r} takes images of {size[0]} x {size[1]} only, and the images are {SIZE[0]} x '
                f'{SIZE[1]}: use encoders of one input size, or give img_size to build all of them for one.')


def _check_runs(name: str, in_chans: int, img_size: Tuple[int, int]) -> None:
    """Raises: InputError: timm builds the encoder for images that it then cannot take, as CrossViTs of most sizes."""
    net = timm.create_model(name, num_classes=0, in_chans=in_chans, img_size=img_size, device='meta').eval()
    try:
        net(torch.empty(1, in_chans, *img_size, device='meta'))
    except RuntimeError as error:
        own = resolve_pretrained_cfg(name).input_size
        raise InputError(
            f'The encoder {name!r} cannot run on images of {img_size[0]} x {img_size[1]}, though timm builds it for'
            f' them: use other encoders, or an img_size such as its own, {own[-2]} x {own[-1]}.') from error


def _cfg(**kwargs) -> Dict[str, Any]:
    """Like a ViT's: its size is fixed because an encoder's is."""
    return {
        'url': '', 'num_classes': 1000, 'input_size': (3, *SIZE), 'fixed_input_size': True, 'pool_size': None,
        'crop_pct': 0.875, 'interpolation': 'bicubic', 'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': ('encoders.0.net.conv1', 'encoders.1.net.conv_stem', 'encoders.2.net.patch_embed.proj',
                       'fusion.gate.convs.0'),
        'classifier': ('fusion.heads.0', 'fusion.heads.1', 'fusion.heads.2'),
        'license': 'apache-2.0', 'paper_ids': 'arXiv:1908.09073', **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'fusion_trio.untrained': _cfg(),
})


def _create_fusion(variant: str, pretrained: bool = False, **kwargs) -> FusionNet:
    """`pretrained`: the weights that the configuration names (a file, a folder of timm's, a hub's), or else timm's own
    of every encoder. It is no argument of the model, so that a saved model is loaded again without a download.
    """
    if 'encoder_pretrained' in kwargs:
        raise InputError(
            "encoder_pretrained: say pretrained=True for timm's weights of the encoders; saved with the arguments of "
            'the model, it would start a download whenever the model is loaded.')
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    whole = bool(cfg.has_weights or cfg.state_dict or cfg.source)
    kwargs.setdefault('img_size', None)  # which timm would fill in: None says that nobody asked for a size
    return build(
        partial(FusionNet, encoder_pretrained=pretrained and not whole, mean=cfg.mean, std=cfg.std),
        variant,
        pretrained and whole,
        feature_cfg=dict(out_indices=len(kwargs.get('encoders', TRIO)), feature_cls='getter'),
        **kwargs,
    )


@register_model
def fusion_trio(pretrained: bool = False, **kwargs) -> FusionNet:
    """Situational fusion of ResNet-18, MobileNetV3-small and ViT-Ti/16, or of other `encoders`."""
    return _create_fusion('fusion_trio', pretrained, **kwargs)
