"""A backbone for detectron2: any hierarchical timm or moe_zoo model under a feature pyramid."""
from functools import partial
from typing import Any, Dict, List, Optional, Sequence

import timm
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from timm.layers import Format
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

from ..errors import InputError, nearest, nearest_keyword
from .pyramid import moe_options, pyramid, warn_frozen

STAGES = {4: 'res2', 8: 'res3', 16: 'res4', 32: 'res5'}  # stride -> the name that detectron2's parts look for


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """A timm or moe_zoo model, named by MOE.TIMM, under P3 to P7.

    Raises:
        InputError: Unknown model or keyword, strides other than 8, 16 and 32, or a config whose colour order, mean or
            std are not the model's.
    """
    options = moe_options(cfg).TIMM
    bottom_up = TimmBackbone(
        options.NAME,
        dict(options.ARGS),
        in_chans=input_shape.channels,
        pretrained=options.PRETRAINED,
        checkpoint=options.CHECKPOINT,
        # A map that nobody uses would leave parameters without gradient.
        out_features=[*cfg.MODEL.FPN.IN_FEATURES, 'res5'],
    )
    if options.CHECK_INPUT:
        _check_input(cfg, bottom_up)
    frozen = options.FROZEN_BN or cfg.MODEL.BACKBONE.FREEZE_AT > 0
    if frozen and not (options.PRETRAINED or options.CHECKPOINT or cfg.MODEL.WEIGHTS):
        warn_frozen('MOE.TIMM.FROZEN_BN False MODEL.BACKBONE.FREEZE_AT 0')
    bottom_up.freeze(cfg.MODEL.BACKBONE.FREEZE_AT, options.FROZEN_BN)
    return pyramid(cfg, bottom_up)


class TimmBackbone(Backbone):
    """The feature maps of a timm model by the names of detectron2's ResNet: res2 to res5 for strides 4 to 32.

    Args:
        name: Model name as in `timm.create_model`.
        model_args: Its keywords.
        in_chans: Channels of the image.
        pretrained: Load the weights that timm knows for this name.
        checkpoint: Or a classification checkpoint of this model.
        out_features: Which of the maps to give.
    """

    def __init__(
            self,
            name: str,
            model_args: Optional[Dict[str, Any]] = None,
            in_chans: int = 3,
            pretrained: bool = False,
            checkpoint: str = '',
            out_features: Sequence[str] = tuple(STAGES.values()),
    ):
        super().__init__()
        model_args = dict(model_args or {}, in_chans=in_chans)
        infos = _create(name, model_args).feature_info.info
        # The deepest map of each stride: some models list several.
        index = {info['reduction']: i for i, info in enumerate(infos) if info['reduction'] in STAGES}
        if not {8, 16, 32} <= set(index):
            raise InputError(
                f'MOE.TIMM.NAME {name!r} has feature maps of stride {[info["reduction"] for info in infos]}, and a '
                'feature pyramid needs 8, 16 and 32: choose a hierarchical model (plain vision transformers have one '
                'stride only).')
        if checkpoint:
            model_args['pretrained_cfg_overlay'] = dict(file=checkpoint)
        self._modules_of_stages = {STAGES[stride]: infos[i]['module'] for stride, i in index.items()}
        strides = [stride for stride in sorted(index) if STAGES[stride] in out_features]
        self.net = _create_for_any_size(
            name, model_args, bool(pretrained or checkpoint), tuple(index[stride] for stride in strides))
        self.pretrained_cfg = self.net.pretrained_cfg
        self._out_features = [STAGES[stride] for stride in strides]
        self._out_feature_strides = dict(zip(self._out_features, strides))
        self._out_feature_channels = dict(zip(self._out_features, self.net.feature_info.channels()))

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """x: (B, C, H, W), H and W multiples of 32. Returns name to (B, C', H / stride, W / stride)."""
        return dict(zip(self._out_features, _maps(self.net, x)))

    def freeze(self, freeze_at: int, frozen_bn: bool) -> None:
        """Freeze as detectron2's ResNet: 1 is all before res2, 2 res2 as well, and so on to 5.

        Parameters are frozen in the order of their registration, up to the end of that stage, which is their order of
        use in timm's models. BatchNorm in a frozen part, or everywhere with `frozen_bn`, becomes a fixed affine map.
        """
        if frozen_bn:
            self.net = freeze_batch_norm_2d(self.net)
        if not freeze_at:
            return
        # An extractor that flattens a model calls its `blocks.1` `blocks_1`; one that wraps it puts it a level down.
        stage = self._modules_of_stages.get(f'res{max(freeze_at, 2)}', '')
        forms = [head + form for form in (stage, stage.replace('.', '_', 1)) for head in ('', 'model.')]
        names = [name for name, module in self.net.named_modules() if list(module.parameters(recurse=False))]
        inside = [i for i, name in enumerate(names) if any(f'{name}.'.startswith(f'{form}.') for form in forms)]
        if not inside:
            raise InputError(f'MODEL.BACKBONE.FREEZE_AT {freeze_at}: the stages of this model cannot be told apart by '
                             'module; use 0.')
        for name in names[:inside[-1] + 1 if freeze_at > 1 else inside[0]]:
            module = self.net.get_submodule(name)
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                parent, _, child = name.rpartition('.')
                setattr(self.net.get_submodule(parent), child, freeze_batch_norm_2d(module))


def _maps(net: nn.Module, x: torch.Tensor) -> List[torch.Tensor]:
    """(B, C, H, W) maps; extractors of some transformers give channels last."""
    channels_last = getattr(net, 'output_fmt', Format.NCHW) == Format.NHWC
    return [m.permute(0, 3, 1, 2).contiguous() if channels_last else m for m in net(x)]


def _create_for_any_size(name: str, model_args: Dict[str, Any], pretrained: bool, out_indices: tuple) -> nn.Module:
    """The extractor, its image size freed where that is fixed and timm can free it; checked on a small image."""
    refusal = None
    for freed in ({}, {'strict_img_size': False}, {'dynamic_img_size': True}):
        try:
            net = _create(name, {**model_args, **freed}, pretrained, out_indices)
        except InputError as error:
            if not freed:
                raise
            refusal = refusal or error
            continue
        reason = _check_maps(net, model_args['in_chans'])
        if not reason:
            return net
        refusal = refusal or InputError(
            f'MOE.TIMM.NAME {name!r} cannot stand under a feature pyramid: {reason}; set what helps in MOE.TIMM.ARGS, '
            'or choose another model.')
    raise refusal


@torch.no_grad()
def _check_maps(net: nn.Module, in_chans: int) -> str:
    """Run a small image through: free image sizes, layout and strides are what a pyramid builds on.

    Returns:
        What is wrong, or an empty string.
    """
    training = net.training
    try:
        maps = _maps(net.eval(), torch.zeros(1, in_chans, 128, 192))
    except Exception as error:  # a model of any origin may refuse in any way
        return f'it does not take a 128 x 192 image ({" ".join(str(error).split())[:200]})'
    finally:
        net.train(training)
    for value, channels, stride in zip(maps, net.feature_info.channels(), net.feature_info.reduction()):
        wanted = (1, channels, 128 // stride, 192 // stride)
        if value.shape != wanted:
            return f'it gives {tuple(value.shape)} for a 128 x 192 image at stride {stride}, where {wanted} is needed'
    return ''


def _create(name: str, model_args: Dict[str, Any], pretrained: bool = False, out_indices=None) -> nn.Module:
    """timm.create_model with features_only, and its refusals as one sentence."""
    if out_indices is not None:
        model_args = dict(model_args, out_indices=out_indices)
    try:
        return timm.create_model(name, pretrained=pretrained, features_only=True, **model_args)
    except Exception as error:
        reason = ' '.join(str(error).split())[:300]
        if not timm.is_model(name):
            hint = nearest(name, timm.list_models())
            raise InputError(f'MOE.TIMM.NAME {name!r} is no model of timm or moe_zoo.{hint}') from error
        if 'pretrained_cfg_overlay' in model_args:
            file = model_args['pretrained_cfg_overlay']['file']
            raise InputError(f"MOE.TIMM.CHECKPOINT '{file}' cannot be loaded into {name}: {reason}") from error
        shown = {k: v for k, v in model_args.items() if k not in ('in_chans', 'out_indices')}
        hint = nearest_keyword(error, partial(timm.create_model, name, device='meta'))
        raise InputError(f'MOE.TIMM.NAME {name!r} cannot be built as a backbone with MOE.TIMM.ARGS {shown}: {reason}'
                         f'{hint}') from error


def _check_input(cfg: CfgNode, backbone: TimmBackbone) -> None:
    """detectron2 defaults to BGR and Caffe's means; a timm model expects RGB and its own mean and std."""
    mean = [255 * m for m in backbone.pretrained_cfg['mean']]
    std = [255 * s for s in backbone.pretrained_cfg['std']]
    remedy = 'MOE.TIMM.CHECK_INPUT False trusts the config as it is'
    if cfg.INPUT.FORMAT != 'RGB':
        raise InputError(f"INPUT.FORMAT {cfg.INPUT.FORMAT!r}: {backbone.pretrained_cfg['architecture']} expects 'RGB'; "
                         f'{remedy}.')
    for key, wanted in (('PIXEL_MEAN', mean), ('PIXEL_STD', std)):
        given = list(cfg.MODEL[key])
        if len(given) == len(wanted) and any(abs(g - w) > 0.5 for g, w in zip(given, wanted)):
            raise InputError(
                f"MODEL.{key} {given}: {backbone.pretrained_cfg['architecture']} expects "
                f'{[round(w, 3) for w in wanted]} (in RGB, 0 to 255); {remedy}.')
