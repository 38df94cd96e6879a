"""`pretrained=True`: which file a model starts from, what is done with it, and one sentence where there is none.

No trained weights of most of these models exist, but those of their dense twins in timm do: they are loaded from the
twin's own hub repository and upcycled while they load (`moe_zoo.checkpoints.upcycle`). The tag of such an entry tells,
as in `condconv_resnet50.up_a1_in1k`.
"""
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Tuple

import torch
from timm.models import adapt_input_conv, build_model_with_cfg, get_pretrained_cfg, resolve_pretrained_cfg
from torch import nn

from ..checkpoints import is_routed, upcycle
from ..checkpoints.archive import refuse_packed
from ..errors import InputError
from ..layers import RoutedLayer, ShallowEmbedding

# What an entry takes over from that of its weights: how images were prepared, also for testing.
AS_TRAINED = ('mean', 'std', 'crop_pct', 'interpolation', 'test_input_size', 'test_crop_pct', 'license')
# What a name without a file to download takes besides weights of its own.
TAKES = {
    **dict.fromkeys(
        ('condconv_mobilenetv1_025', 'condconv_mobilenetv1_050', 'condconv_mobilenetv1_075'),
        'those of the dense network (this name with start_block=14, cond_fc=False)'),
    'dyconv_resnet10': "those of timm's resnet18 with layers=(1, 1, 1, 1)",
    'moe_resnet18_cifar': 'those of the dense network (this name with stages=())',
    'deepmoe_resnet56_cifar': 'those of deepmoe_resnet56_cifar_dense',
    'deepmoe_resnet110_cifar': 'those of deepmoe_resnet110_cifar_dense',
    'deepmoe_vgg16_cifar': 'those of deepmoe_vgg16_cifar_dense',
}
HOW = 'as pretrained_cfg_overlay=dict(file=...)'  # how a file is passed, in sentences; scripts say their own way


def upcycled_cfgs(sources: Mapping[str, str], cfg: Callable[..., Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """Entries of `default_cfgs` for models that start from timm's weights of another.

    Args:
        sources: Name of the model to that of the weights, such as 'resnet50.a1_in1k'.
        cfg: Makes an entry from what differs from the family's.
    """
    return {name.replace('.', '.up_'): entry for name, entry in trained_cfgs(sources, cfg).items()}


def trained_cfgs(sources: Mapping[str, str], cfg: Callable[..., Dict[str, Any]]) -> Dict[str, Dict[str, Any]]:
    """The same for weights that fit as they are."""
    entries = {}
    for name, source in sources.items():
        twin = get_pretrained_cfg(source)
        as_trained = {key: getattr(twin, key) for key in AS_TRAINED if getattr(twin, key) is not None}
        entries[f'{name}.{twin.tag}'] = cfg(hf_hub_id=twin.hf_hub_id, **as_trained)
    return entries


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """The weights of a dense network are upcycled, those of the model itself pass as they are.

    A classifier for other classes, or none, leaves the model its own; the first convolution stays the dense one, which
    timm fits to other input channels; where it is routed it is fitted before.
    """
    cfg = model.pretrained_cfg
    if is_routed(state_dict, model):
        # timm drops a classifier for other classes; the one that DeepMoE's embedding may have goes with it.
        gone = [f'{name}.classifier.' for name, module in model.named_modules() if isinstance(module, ShallowEmbedding)]
        others = model.num_classes != cfg.get('num_classes')
        return {k: v for k, v in state_dict.items() if not (others and k.startswith(tuple(gone)))}
    ignore: List[str] = [] if model.num_classes else ['pre_logits']  # which features do without
    for classifier in _names(cfg.get('classifier')):
        if model.num_classes != cfg.get('num_classes') or f'{classifier}.weight' not in state_dict:
            ignore.append(classifier)
    stems = _names(cfg.get('first_conv')) if model.in_chans != cfg['input_size'][0] else []
    stems = [name for name in stems if f'{name}.weight' in state_dict]
    routed = {f'{name}.weight' for name in stems if isinstance(model.get_submodule(name), RoutedLayer)}
    if routed:
        stems = [name for name in stems if f'{name}.weight' not in routed]
        state_dict = {
            k: adapt_input_conv(model.in_chans, v) if k in routed else v for k, v in state_dict.items()}
    upcycled = upcycle(state_dict, model, ignore=ignore + stems)
    return {**upcycled, **{k: v for k, v in state_dict.items() if k.rpartition('.')[0] in stems}}


def build(
        model_cls: Callable[..., nn.Module],
        variant: str,
        pretrained: bool,
        pretrained_filter_fn: Callable = checkpoint_filter_fn,
        takes: str = '',
        **kwargs,
) -> nn.Module:
    """timm's `build_model_with_cfg`, which loads or says in one sentence which file to pass.

    Args:
        takes: What a name without a file to download takes besides weights of its own, where `TAKES` does not tell.

    Raises:
        InputError: There is no file to load, it is missing, truncated or no checkpoint, it cannot be downloaded, or it
            is of another model; or keywords make no model.
    """
    kwargs = dict(kwargs)
    if kwargs.get('features_only'):
        kwargs.setdefault('num_classes', 0)  # weights of any classes do
    built: List[nn.Module] = []

    def make(*args, **keywords) -> nn.Module:
        try:
            built.append(model_cls(*args, **keywords))
        except (ArithmeticError, LookupError, AttributeError, AssertionError, RuntimeError, TypeError) as error:
            if isinstance(error, TypeError) and '\n' not in str(error):  # Python's own; torch's have many lines
                raise
            raise InputError(f'{variant} cannot be built with these keywords: {_said(error)}.') from error
        return built[-1]

    if not pretrained:
        return build_model_with_cfg(make, variant, False, **kwargs)
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
    if not (cfg.has_weights or cfg.state_dict or cfg.source):
        others = takes or TAKES.get(variant)
        raise InputError(
            f'pretrained=True: {variant} has no file to download; pass weights of its own'
            f'{f", or {others}," if others else ""} {HOW}.')
    local = cfg.state_dict or cfg.file or cfg.source == 'local-dir'
    if cfg.file and not cfg.state_dict and not Path(cfg.file).exists():
        raise InputError(f"pretrained=True: there is no file '{cfg.file}'.")
    if cfg.file and not cfg.state_dict:
        refuse_packed(cfg.file)
    loaded: List[Mapping[str, Any]] = []  # weights as timm is going to load them, and those of the model

    def filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
        loaded[:] = [pretrained_filter_fn(state_dict, model), model.state_dict()]
        return loaded[0]

    try:
        return build_model_with_cfg(make, variant, True, pretrained_filter_fn=filter_fn, **kwargs)
    except (RuntimeError, AttributeError) as error:  # the latter where the first convolution has another name
        shapes = [{k: tuple(v.shape) for k, v in weights.items() if not k.endswith('num_batches_tracked')}
                  for weights in loaded]
        different = misfit(*shapes) if shapes else ''
        if cfg.file and built and not loaded:
            raise _unreadable(cfg.file, error) from error
        if not different:
            raise
        raise InputError(
            f'pretrained=True: the weights are not those of {variant} with these keywords: {different}.') from error
    except OSError as error:
        if local:
            if built and not loaded:
                raise _unreadable(cfg.file, error) from error
            raise
        raise InputError(
            f'pretrained=True: the weights of {variant} are those of {cfg.hf_hub_id or cfg.url}, which cannot be '
            f'fetched ({type(error).__name__}); pass its model.safetensors {HOW}.'
        ) from error
    except InputError:
        raise
    except Exception as error:  # a stranger's file fails in every way
        if not (cfg.file and built and not loaded):
            raise
        raise _unreadable(cfg.file, error) from error


def _unreadable(file: str, error: BaseException) -> InputError:
    return InputError(f"pretrained=True: the file '{file}' is truncated, or no checkpoint: {_said(error)}.")


def _said(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip('.:')


def misfit(found: Mapping[str, Tuple[int, ...]], wanted: Mapping[str, Tuple[int, ...]]) -> str:
    """The first tensor whose shape differs from what a model wants, as a clause; empty where all fit."""
    for key in [*wanted, *found]:
        if wanted.get(key) != found.get(key):
            shapes = [f'of shape {of[key]}' if key in of else 'missing' for of in (found, wanted)]
            return f'{key} is {shapes[0]} in them, and {shapes[1]} in the model'
    return ''


def _names(value: Any) -> List[str]:
    return [] if not value else [value] if isinstance(value, str) else list(value)
