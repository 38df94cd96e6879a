"""A backbone for detectron2: any timm or moe_zoo model that gives features, under a feature pyramid.

A model with maps of strides 8, 16 and 32 (and 4) stands under an FPN, a plain vision transformer or V-MoE under the
simple feature pyramid of its last map.

The gates of routed layers and the capacity of token experts leave the padding of a batch out if they know the sizes of
the images, which the meta-architectures of `with_moe_losses` (MoERetinaNet, ...) hand over. Under an unmodified one of
detectron2 they see the padded batch.
"""
import contextlib
import logging
import re
from functools import partial
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Union

import timm
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.utils.comm import get_world_size
from timm.layers import Format, convert_sync_batchnorm
from timm.utils.model import freeze_batch_norm_2d
from torch import nn

from ..errors import InputError, counted, nearest, nearest_keyword
from ..layers import RoutedLayer, ShallowEmbedding
from ..layers.moe_stage import MoEStage
from ..models.pretrained import HOW
from ..routing import checkpoint_routed
from .pyramid import STRIDES, SimplePyramid, moe_options, pyramid, simple_pyramid, warn_frozen

NAMES = {stride: name for name, stride in STRIDES.items()}
UNTOLD = 'untold'
NORMS = {'': 'as the model has them', 'FrozenBN': 'fixed affine maps', 'SyncBN': 'synchronised over all ranks, on CUDA'}


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Union[FPN, SimplePyramid]:
    """The timm or moe_zoo model that MOE.TIMM names, under P3 to P7 or P2 to P6, as MODEL.FPN.IN_FEATURES says.

    Raises:
        InputError: Unknown model or keyword, no maps of the strides asked for, weights that do not fit, or a config
            whose colour order, mean or std are not the model's.
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
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        norm=options.NORM,
        grad_checkpointing=options.CHECKPOINTING,
    )
    if options.NORM == 'SyncBN' and cfg.MODEL.DEVICE == 'cpu' and get_world_size() > 1:
        raise InputError("MOE.TIMM.NORM 'SyncBN' with MODEL.DEVICE 'cpu': torch synchronises norms on CUDA only; use "
                         "'' or 'FrozenBN'.")
    if options.CHECK_INPUT:
        _check_input(cfg, bottom_up)
    frozen = any('FrozenBatchNorm' in type(module).__name__ for module in bottom_up.modules())
    if frozen and not (options.PRETRAINED or options.CHECKPOINT or cfg.MODEL.WEIGHTS):
        warn_frozen("MOE.TIMM.NORM '' MODEL.BACKBONE.FREEZE_AT 0")
    return simple_pyramid(cfg, bottom_up) if bottom_up.plain else pyramid(cfg, bottom_up)


class TimmBackbone(Backbone):
    """The feature maps of a timm model by the names of detectron2's ResNet: res2 to res5 for strides 4 to 32.

    A plain transformer, all of whose blocks have one stride, gives its last map only, before the last norm. Its table
    of positions is resized to every batch.

    Args:
        name: Model name as in `timm.create_model`.
        model_args: Its keywords.
        in_chans: Channels of the image.
        pretrained: Load the weights that timm knows for this name.
        checkpoint: Or a classification checkpoint of this model, or of the dense model that it grew from.
        out_features: Which of the maps to give; of those of a plain transformer the last one whatever it says.
        freeze_at: See `freeze`.
        norm: What to do with BatchNorm, a key of `NORMS`.
        grad_checkpointing: Compute activations anew in backward; the auxiliary losses keep their gradient.

    Attributes:
        plain: Whether there is one map only.

    Raises:
        InputError: See `build_timm_fpn_backbone`.
    """

    def __init__(
            self,
            name: str,
            model_args: Optional[Dict[str, Any]] = None,
            in_chans: int = 3,
            pretrained: bool = False,
            checkpoint: str = '',
            out_features: Sequence[str] = tuple(STRIDES),
            freeze_at: int = 0,
            norm: str = '',
            grad_checkpointing: bool = False,
    ):
        super().__init__()
        model_args = dict(model_args or {}, in_chans=in_chans)
        with _one_sentence(name, model_args):
            infos = _sketch(name, model_args).feature_info.info
        self.plain = len({info['reduction'] for info in infos}) == 1
        # The deepest map of each stride: some models list several.
        index = {info['reduction']: i for i, info in enumerate(infos) if info['reduction'] in NAMES}
        _check_strides(name, [info['reduction'] for info in infos], self.plain)
        self._stages = [info['module'] for info in infos] if self.plain else [
            infos[index[stride]]['module'] if stride in index else '' for stride in NAMES]
        strides = [stride for stride in sorted(index) if self.plain or NAMES[stride] in out_features]
        self.net = _create_for_any_size(
            name, model_args, pretrained, checkpoint, tuple(index[stride] for stride in strides))
        self.pretrained_cfg = self.net.pretrained_cfg
        self._out_features = [NAMES[stride] for stride in strides]
        self._out_feature_strides = dict(zip(self._out_features, strides))
        self._out_feature_channels = dict(zip(self._out_features, self.net.feature_info.channels()))
        for module in self.net.modules():
            if isinstance(module, ShallowEmbedding):
                module.reset_classifier(0)  # its loss wants the class of an image
        self.freeze(freeze_at)
        self.set_norm(norm)
        if grad_checkpointing:
            self.set_grad_checkpointing()

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """x: (B, C, H, W), H and W multiples of 32. Returns name to (B, C', H / stride, W / stride)."""
        return dict(zip(self._out_features, _maps(self.net, x)))

    def freeze(self, freeze_at: int) -> None:
        """Freeze as detectron2's ResNet: 1 is all before the first stage, 2 that stage as well, and so on.

        Stages are res2 to res5, or the blocks of a plain transformer. Parameters are frozen in the order of their
        registration, up to the end of that stage, which is their order of use in timm's models. BatchNorm in a frozen
        part becomes a fixed affine map.

        Raises:
            InputError: There are fewer stages, or they are no modules.
        """
        if not 0 <= freeze_at <= len(self._stages) + 1:
            raise InputError(f'MODEL.BACKBONE.FREEZE_AT {freeze_at}: use 0 to {len(self._stages) + 1}, 1 for what is '
                             f'before {counted(len(self._stages), "stage")}.')
        if not freeze_at:
            return
        forms = self._forms(self._stages[max(freeze_at - 2, 0)])
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

    def set_norm(self, norm: str) -> None:
        """Make every BatchNorm what `norm` says, a key of `NORMS`.

        Raises:
            InputError: An unknown norm, or one that waits for ranks inside experts.
        """
        if norm not in NORMS:
            raise InputError(f'MOE.TIMM.NORM {norm!r} is not one of {", ".join(map(repr, NORMS))}.'
                             f'{nearest(norm, NORMS)}')
        if norm == 'FrozenBN':
            self.net = freeze_batch_norm_2d(self.net)
        elif norm == 'SyncBN':
            for module in self.net.modules():
                if isinstance(module, MoEStage) and _has_batch_norm(module.experts):
                    raise InputError("MOE.TIMM.NORM 'SyncBN': experts with a BatchNorm see different images on every "
                                     "rank and cannot synchronise; use '' or 'FrozenBN'.")
            self.net = convert_sync_batchnorm(self.net)

    def set_grad_checkpointing(self) -> None:
        """Compute activations anew in backward, with the same image sizes and losses that keep their gradient."""
        model = getattr(self.net, 'model', self.net)
        switch = getattr(type(model), 'set_grad_checkpointing', None)
        routed = any(isinstance(module, RoutedLayer) for module in self.net.modules())
        if not routed or (switch and switch.__module__.startswith('moe_zoo.')):
            try:
                switch(model, True)
            except (AssertionError, TypeError) as error:  # by which timm says that it cannot
                raise InputError(f"MOE.TIMM.CHECKPOINTING True: {self.pretrained_cfg['architecture']} cannot compute "
                                 'its activations anew; leave it False.') from error
            return
        for name in filter(None, self._stages):  # a timm model with layers of ours, which timm's own would not know
            stage = model.get_submodule(name)
            stage.forward = partial(_checkpointed, stage.forward)

    def _forms(self, name: str) -> List[str]:
        """Names that a module may have in an extractor: one that flattens a model calls its `blocks.1` `blocks_1`, one
        that wraps it puts it a level down."""
        return [head + form for form in (name, name.replace('.', '_', 1)) for head in ('', 'model.')] if name else []


def _checkpointed(forward: Callable, x: torch.Tensor, **kwargs) -> torch.Tensor:
    return checkpoint_routed(partial(forward, **kwargs), x) if torch.is_grad_enabled() else forward(x, **kwargs)


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())


def _maps(net: nn.Module, x: torch.Tensor) -> List[torch.Tensor]:
    """(B, C, H, W) maps; extractors of some transformers give channels last."""
    channels_last = getattr(net, 'output_fmt', Format.NCHW) == Format.NHWC
    return [m.permute(0, 3, 1, 2).contiguous() if channels_last else m for m in net(x)]


def _check_strides(name: str, strides: List[int], plain: bool) -> None:
    if plain and strides[0] not in NAMES:
        raise InputError(f'MOE.TIMM.NAME {name!r} has patches of {strides[0]} pixels, and a simple feature pyramid '
                         'needs 16 or 32: set MOE.TIMM.ARGS.patch_size 16, if the model takes it.')
    if not plain and not {8, 16, 32} <= set(strides):
        raise InputError(f'MOE.TIMM.NAME {name!r} has feature maps of stride {strides}, and a feature pyramid needs 8, '
                         '16 and 32, or blocks of one stride: choose a hierarchical model or a plain transformer.')


def _create_for_any_size(
        name: str,
        model_args: Dict[str, Any],
        pretrained: bool,
        checkpoint: str,
        out_indices: tuple,
) -> nn.Module:
    """The extractor, its image size freed where that is fixed and timm can free it, which a small image tells."""
    reasons: List[str] = []
    for freed in ({}, {'strict_img_size': False}, {'dynamic_img_size': True}):
        args = {**model_args, **freed}
        try:
            reasons.append(_check_maps(_sketch(name, args, out_indices), model_args['in_chans']))
            if reasons[-1] == UNTOLD:
                reasons[-1] = _check_maps(_build(name, args, out_indices), model_args['in_chans'])
        except Exception:
            if not freed:
                raise
            continue  # the model does not know this keyword
        if not reasons[-1]:
            return _load(name, args, out_indices, pretrained, checkpoint)
    raise InputError(f'MOE.TIMM.NAME {name!r} cannot stand under a feature pyramid: {reasons[-1]}; set what helps in '
                     'MOE.TIMM.ARGS, or choose another model.')


@torch.no_grad()
def _check_maps(net: nn.Module, in_chans: int) -> str:
    """Run a small image through: free image sizes, layout and strides are what a pyramid builds on.

    Returns:
        What is wrong, or an empty string; `UNTOLD` where a sketch cannot tell.
    """
    training = net.training
    device = next(net.parameters()).device
    try:
        maps = _maps(net.eval(), torch.zeros(1, in_chans, 128, 192, device=device))
    except Exception as error:  # a model of any origin may refuse in any way
        if device.type == 'meta' and (isinstance(error, NotImplementedError) or 'meta' in str(error)):
            return UNTOLD
        return f'it does not take a 128 x 192 image ({" ".join(str(error).split())[:200]})'
    finally:
        net.train(training)
    for value, channels, stride in zip(maps, net.feature_info.channels(), net.feature_info.reduction()):
        wanted = (1, channels, 128 // stride, 192 // stride)
        if value.shape != wanted:
            return f'it gives {tuple(value.shape)} for a 128 x 192 image at stride {stride}, where {wanted} is needed'
    return ''


def _load(
        name: str,
        model_args: Dict[str, Any],
        out_indices: tuple,
        pretrained: bool,
        checkpoint: str,
) -> nn.Module:
    """The extractor with the weights of a file, those that timm knows, or random ones.

    Raises:
        InputError: The file cannot be read, or lacks a part of the model.
    """
    overlay = {}
    if checkpoint:  # a number of classes that no model has: the file's classifier, whatever its classes, is left out
        overlay = dict(pretrained_cfg_overlay=dict(file=checkpoint, num_classes=-1))
    with _missing_names() as missing, _one_sentence(name, model_args, checkpoint):
        net = _build(name, {**model_args, **overlay}, out_indices, pretrained or bool(checkpoint))
    if not checkpoint:
        return net
    own = {key.removeprefix('model.').replace('.', '_') for key in net.state_dict()}
    lacking = [key for key in missing if key.replace('.', '_') in own]
    if lacking:
        raise InputError(f"MOE.TIMM.CHECKPOINT '{checkpoint}' lacks {counted(len(lacking), 'tensor')} of {name} (first "
                         f'{lacking[0]!r}): are they weights of another model?')
    return net


@contextlib.contextmanager
def _missing_names() -> Iterator[List[str]]:
    """Collect what a file of weights lacks: features take what there is, and timm tells its log alone."""
    logger, names = logging.getLogger('timm.models._builder'), []
    level, shown = logger.level, logger.getEffectiveLevel()

    def listen(record: logging.LogRecord) -> bool:
        found = re.match(r'Missing keys \((.+?)\)', record.getMessage())
        names.extend(found[1].split(', ') if found else ())
        return record.levelno >= shown

    logger.addFilter(listen)
    logger.setLevel(logging.INFO)
    try:
        yield names
    finally:
        logger.setLevel(level)
        logger.removeFilter(listen)


def _sketch(name: str, model_args: Dict[str, Any], out_indices: Optional[tuple] = None) -> nn.Module:
    """The extractor without memory, or, of a model that does not know of devices, a real one."""
    try:
        return _build(name, dict(model_args, device='meta'), out_indices)
    except Exception:
        return _build(name, model_args, out_indices)


def _build(
        name: str,
        model_args: Dict[str, Any],
        out_indices: Optional[tuple] = None,
        pretrained: bool = False,
) -> nn.Module:
    kwargs = dict(model_args)
    if out_indices is not None:
        kwargs['out_indices'] = out_indices
    if timm.is_model(name) and timm.model_entrypoint(name).__module__.startswith('moe_zoo.'):
        kwargs['feature_cls'] = 'getter'  # which runs the model's own forward: chained stages forget checkpointing
    return timm.create_model(name, pretrained=pretrained, features_only=True, **kwargs)


@contextlib.contextmanager
def _one_sentence(name: str, model_args: Dict[str, Any], checkpoint: str = '') -> Iterator[None]:
    """What timm raises where it cannot build a model, as an InputError."""
    try:
        yield
    except Exception as error:
        reason = ' '.join(str(error).split())
        reason = reason if isinstance(error, InputError) else reason[:300]
        if not timm.is_model(name):
            hint = nearest(name, timm.list_models())
            raise InputError(f'MOE.TIMM.NAME {name!r} is no model of timm or moe_zoo.{hint}') from error
        if checkpoint:
            raise InputError(f"MOE.TIMM.CHECKPOINT '{checkpoint}' cannot be loaded into {name}: {reason}") from error
        if HOW in reason:
            reason = reason.replace('pretrained=True', 'MOE.TIMM.PRETRAINED True').replace(
                HOW, 'as MOE.TIMM.CHECKPOINT')
            raise InputError(reason) from error
        shown = {key: value for key, value in model_args.items() if key != 'in_chans'}
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
                f'MODEL.{key} {given}: {backbone.pretrained_cfg["architecture"]} expects '
                f'{[round(w, 3) for w in wanted]} (in RGB, 0 to 255); {remedy}.')
