"""Any timm model made routed: modules chosen by name give way to routed layers that start as what they were.

`moefy` changes a model at hand; `moefied` is the same as a registered name, for scripts that only know names.

Letters: E experts.
"""
import copy
import dataclasses
import fnmatch
import functools
import inspect
import logging
import sys
from typing import Any, Callable, Dict, List, Sequence, Type, Union

import timm
import torch
from timm.layers import Conv2dSame, GluMlp, Mlp, SwiGLU
from timm.models import generate_default_cfgs, get_notrace_functions, register_model
from torch import nn

from ..checkpoints import upcycle
from ..errors import InputError, nearest
from ..layers import DynamicConv2d, MoEConv2d, MoEMlp, RoutedConv2d, RoutedLayer, RoutedModel
from .pretrained import HOW, build

_logger = logging.getLogger(__name__)

LAYERS: Dict[str, Type[RoutedLayer]] = {
    'condconv': RoutedConv2d,
    'dyconv': DynamicConv2d,
    'moe_conv': MoEConv2d,
    'moe_mlp': MoEMlp,
}
# What a routed layer takes from the module that it replaces, and no keyword may set.
TAKEN = (
    'in_features', 'hidden_features', 'out_features', 'act_layer', 'norm_layer', 'drop', 'use_conv', 'in_channels',
    'out_channels', 'glu', 'kernel_size', 'stride', 'padding', 'dilation', 'groups', 'bias', 'device', 'dtype',
)
UNTRAINED = 'untrained'  # tag of the name's own configuration, which is that of the default base
# Sources of weights in a configuration of timm's.
SOURCES = ('url', 'file', 'state_dict', 'hf_hub_id')


def moefy(
        model: nn.Module,
        targets: Union[str, Sequence[str]],
        layer: str = 'moe_mlp',
        num_experts: int = 8,
        **layer_args: Any,
) -> nn.Module:
    """Replace modules of a model by routed layers, which start with the function that they had (`upcycle`).

    >>> model = timm.create_model('resnet18', pretrained=True)
    >>> model = moe_zoo.moefy(model, 'layer4.*.conv2', layer='condconv', num_experts=4)

    What was replaced is logged. Token experts are those of `MoEMlp` with gates that sum to one, because V-MoE's own
    would scale what the model has learned. A model of timm.create_model is from then on one of the name `moefied`: so
    timm.models.save_for_hf and push_to_hf_hub save it, and `moe_zoo.checkpoints.prune` makes it smaller.

    Args:
        model: Any timm model, or module with timm's layers; changed in place, and made a `RoutedModel`.
        targets: Names of modules, or patterns of them such as 'blocks.*.mlp' ('*' also spans dots).
        layer: What they become: 'condconv', 'dyconv' or 'moe_conv' instead of convolutions, 'moe_mlp' instead of
            timm's `Mlp`, `GluMlp` and `SwiGLU`.
        num_experts: E.
        layer_args: Further keywords of that layer.

    Returns:
        The same model.

    Raises:
        InputError: A pattern matches no module that can be replaced, `layer` or a keyword of it is unknown.
    """
    if layer not in LAYERS:
        raise InputError(f'layer={layer!r} is unknown.{nearest(layer, LAYERS)} Known: {", ".join(LAYERS)}.')
    known = layer_keywords(layer)
    for keyword in layer_args:
        if keyword not in known:
            raise InputError(f'{layer!r} has no keyword {keyword!r}.{nearest(keyword, known)}')
    if hasattr(model, '_orig_mod'):
        raise InputError('The model is compiled: give moefy the model itself, and compile what it returns.')
    names = find_targets(model, targets, layer)
    _replace(model, names, layer, dict(layer_args, num_experts=num_experts))
    _remember(model, dict(layer_args, targets=names, layer=layer, num_experts=num_experts))
    if not isinstance(model, RoutedModel):
        model.__class__ = _routed_class(type(model))
    _logger.info(f'{len(names)} modules became {LAYERS[layer].__name__} of {num_experts} experts: {", ".join(names)}')
    return model


def _replace(model: nn.Module, names: Sequence[str], layer: str, layer_args: Dict[str, Any]) -> None:
    """Put routed layers with the weights of what they replace; a model for which that fails stays as it is."""
    dense, make = model.state_dict(), _mlp if layer == 'moe_mlp' else _conv
    before = [name for name, module in model.named_modules() if isinstance(module, RoutedLayer)]
    replaced = {name: model.get_submodule(name) for name in names}
    made = {
        name: make(module, LAYERS[layer], **layer_args).train(module.training) for name, module in replaced.items()}
    try:
        _put(model, made)
        if not any(value.is_meta for value in dense.values()):
            method = 'split' if layer_args.get('expert_ratio', 1) > 1 else 'copy'
            model.load_state_dict(upcycle(dense, model, method=method, ignore=before))
    except Exception:
        _put(model, replaced)
        raise


def _remember(model: nn.Module, routed_args: Dict[str, Any]) -> None:
    """Make timm's record of how to make a model that of the name `moefied`, so that it is saved as what it has become.

    What that name does not know leaves it without a record: a second round of `moefy`, and a base that has been given
    keywords which its new layers have too.
    """
    args, cfg = vars(model).pop('_model_args', None), getattr(model, 'pretrained_cfg', None)
    if args is None or not cfg or cfg['architecture'] == 'moefied' or args.keys() & routed_args.keys():
        return
    base = '.'.join(filter(None, (cfg['architecture'], cfg.get('tag'))))
    try:
        timm.get_pretrained_cfg(base)
    except RuntimeError:  # a tag of a folder, or of a repository of its own
        base = cfg['architecture']
    model._model_args = {**args, 'base': base, **routed_args}
    model.pretrained_cfg = model.default_cfg = {**cfg, **dict.fromkeys(SOURCES), 'architecture': 'moefied', 'tag': None}


def _put(model: nn.Module, modules: Dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        model.set_submodule(name, module)


def layer_keywords(layer: str) -> List[str]:
    """Keywords of `moefy` for a kind of layer."""
    keywords = [
        keyword for cls in LAYERS[layer].__mro__ if '__init__' in vars(cls)
        for keyword, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)]
    return [k for k in dict.fromkeys(keywords) if k not in ('self', 'num_experts', *TAKEN)]


def find_targets(model: nn.Module, patterns: Union[str, Sequence[str]], layer: str) -> List[str]:
    """Names of the modules that match, can be replaced and are not part of another one of them.

    Raises:
        InputError: A pattern matches nothing, or nothing that can be replaced, or what others share.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not (isinstance(patterns, (list, tuple)) and patterns and all(isinstance(each, str) for each in patterns)):
        raise InputError(f'targets={patterns!r}: give the name of a module, or a pattern of names.')
    modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
    routed = tuple(f'{name}.' for name, module in modules.items() if isinstance(module, RoutedLayer))
    fits, wanted = _is_conv, 'a plain convolution'
    if layer == 'moe_mlp':
        fits, wanted = _is_mlp, "timm's Mlp, GluMlp or SwiGLU"
    candidates = [name for name, module in modules.items() if fits(module) and not name.startswith(routed)]
    found: List[str] = []
    for pattern in patterns:
        matched = [name for name in modules if fnmatch.fnmatchcase(name, pattern)]
        usable = [name for name in matched if name in candidates]
        if not usable:
            hint = nearest(pattern, candidates) or (f' There are {", ".join(candidates[:4])}.' if candidates else '')
            kinds = sorted({
                type(modules[name]).__name__ + ' inside routed layers' * name.startswith(routed) for name in matched})
            what = f'only {", ".join(kinds[:4])}' if matched else 'no module'
            raise InputError(f'targets={pattern!r} matches {what}, and layer={layer!r} replaces {wanted}.{hint}')
        found += usable
    names = [name for name in candidates if name in found and not any(name.startswith(f'{o}.') for o in found)]
    _check_unshared(model, names)
    return names


def _check_unshared(model: nn.Module, names: Sequence[str]) -> None:
    """Raises: InputError: Another module has a weight of one that is to be replaced, and would lose it or keep it."""
    owners: Dict[nn.Parameter, List[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter, []).append(name)
    for name in names:
        for parameter in model.get_submodule(name).parameters():
            first, *others = owners[parameter]
            if others:
                raise InputError(
                    f'targets: {first} and {others[0]} are one weight, and experts cannot share it with another module;'
                    ' choose modules with weights of their own.')


def _is_mlp(module: nn.Module) -> bool:
    return type(module) in (Mlp, GluMlp, SwiGLU)


def _is_conv(module: nn.Module) -> bool:
    return type(module) in (nn.Conv2d, Conv2dSame) and getattr(module, 'padding_mode', 'zeros') == 'zeros'


def _conv(conv: nn.Conv2d, cls: Callable[..., nn.Module], **kwargs) -> nn.Module:
    padding = 'same' if isinstance(conv, Conv2dSame) else conv.padding
    return cls(
        conv.in_channels, conv.out_channels, conv.kernel_size, stride=conv.stride, padding=padding,
        dilation=conv.dilation, groups=conv.groups, bias=conv.bias is not None,
        device=conv.weight.device, dtype=conv.weight.dtype, **kwargs)


def _mlp(mlp: Union[Mlp, GluMlp, SwiGLU], cls: Type[MoEMlp], **kwargs) -> nn.Module:
    if kwargs.get('router', 'vmoe') in ('vmoe', 'cosine'):
        kwargs['router_args'] = dict({'renormalise': True}, **(kwargs.get('router_args') or {}))
    normed = not isinstance(mlp.norm, nn.Identity)
    fc1, glu = getattr(mlp, 'fc1', None), None
    if isinstance(mlp, SwiGLU):
        fc1, glu = mlp.fc1_g, 'first'
    elif isinstance(mlp, GluMlp):
        glu = 'last' if mlp.gate_last else 'first'
    return cls(
        fc1.weight.shape[1], mlp.fc2.weight.shape[1], mlp.fc2.weight.shape[0],
        act_layer=lambda: copy.deepcopy(mlp.act),
        norm_layer=(lambda features, **dd: copy.deepcopy(mlp.norm)) if normed else None,
        bias=(fc1.bias is not None, mlp.fc2.bias is not None), drop=(mlp.drop1.p, mlp.drop2.p), glu=glu,
        use_conv=isinstance(fc1, nn.Conv2d), device=fc1.weight.device, dtype=fc1.weight.dtype, **kwargs)


@functools.lru_cache(maxsize=None)
def _routed_class(cls: Type[nn.Module]) -> Type[nn.Module]:
    """A class of the same models that also return their routing records when asked to."""
    for module in {parent.__module__ for parent in cls.__mro__ if parent.__module__.startswith('timm.')}:
        _leave_whole(vars(sys.modules[module]))
    return type(f'Moefied{cls.__name__}', (_Moefied, cls), {})


def _leave_whole(names: Dict[str, Any]) -> None:
    """Let FX leave functions whole that timm wants whole, in a module of timm's.

    FX looks for them in the module of the forward that it begins with, which is ours and no longer the base's.
    """
    whole = get_notrace_functions()
    for name in [name for name, value in names.items() if callable(value) and value in whole]:
        exec('wrap(name)', names, {'wrap': torch.fx.wrap, 'name': name})  # it goes by the module of its caller


class _Moefied(RoutedModel):
    """`RoutedModel` for a forward that is timm's."""

    def forward(self, x: torch.Tensor):
        if torch.jit.is_scripting():
            return self.forward_head(self.forward_features(x))  # TorchScript knows no super()
        else:
            output = super().forward(x)
            # Distilled models return a tuple of their own.
            if isinstance(output, tuple) and isinstance(output[1], list) and torch.is_grad_enabled():
                _refuse_lost_gradients(output[1])
            return output

    @torch.jit.ignore
    def __reduce_ex__(self, protocol: int):
        # Pickle looks classes up by name, and this one is made at run time.
        return (_bare, (type(self).__bases__[1],), *super().__reduce_ex__(protocol)[2:])


def _bare(cls: Type[nn.Module]) -> nn.Module:
    """A routed model without its state, for pickle."""
    routed = _routed_class(cls)
    return routed.__new__(routed)


def _refuse_lost_gradients(routings: Sequence[Any]) -> None:
    """Raises: InputError: Records that ask for a loss come without a graph: re-entrant checkpointing cut it off."""
    if any(routing.losses and not routing.logits.requires_grad for routing in routings):
        raise InputError(
            'Re-entrant gradient checkpointing loses the gradient of auxiliary losses: use timm.layers'
            '.set_reentrant_ckpt(False), or freeze the routers by losses={}.')


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7), 'crop_pct': 0.95,
        'interpolation': 'bicubic', 'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225),
        'first_conv': 'conv1', 'classifier': 'fc', **kwargs,
    }


default_cfgs = generate_default_cfgs({f'moefied.{UNTRAINED}': _cfg()})


def _build(base: str, targets: Any, layer: str, layer_args: Dict[str, Any], pretrained: bool, **kwargs) -> nn.Module:
    if pretrained:  # a pattern without a match is told before anything is downloaded
        find_targets(timm.create_model(base, **{**kwargs, 'device': 'meta'}), targets, layer)
    try:
        model = timm.create_model(base, pretrained=pretrained, **kwargs)
    except OSError as error:
        raise InputError(
            f'pretrained=True: the weights of base={base!r} cannot be fetched ({type(error).__name__}); pass its'
            f' model.safetensors {HOW}.') from error
    except RuntimeError as error:
        if not pretrained or timm.get_pretrained_cfg(base).has_weights:
            raise
        raise InputError(
            f'pretrained=True: base={base!r} has no file to download; pass weights of it {HOW}.') from error
    model = moefy(model, targets, layer, **layer_args)
    vars(model).pop('_model_args', None)  # create_model records what it was asked for
    return model


@register_model
def moefied(
        pretrained: bool = False,
        base: str = 'resnet18',
        targets: Union[str, Sequence[str]] = 'layer4.*.conv2',
        layer: str = 'condconv',
        num_experts: int = 8,
        **kwargs,
) -> nn.Module:
    """Any timm model, routed by `moefy`.

    >>> timm.create_model('moefied', base='convnext_tiny.fb_in1k', targets='stages.2.*.mlp', layer='moe_mlp',
    ...                   num_experts=8, num_selected=2, pretrained=True)

    Args:
        pretrained: Begin with the base's weights, upcycled; or, for a model saved by timm, with its own.
        base: Name of the model, with its tag.
        targets, layer, num_experts: As in `moefy`.
        kwargs: Keywords of the layer, and of the base.

    Raises:
        InputError: See `moefy`; the base is unknown.
    """
    if layer not in LAYERS:
        raise InputError(f'layer={layer!r} is unknown.{nearest(layer, LAYERS)} Known: {", ".join(LAYERS)}.')
    keywords = layer_keywords(layer)
    layer_args = {key: kwargs.pop(key) for key in keywords if key in kwargs}
    given, overlay = kwargs.pop('pretrained_cfg', None), kwargs.pop('pretrained_cfg_overlay', None) or {}
    own = given if isinstance(given, dict) or dataclasses.is_dataclass(given) else None
    if isinstance(given, dict) and given.get('tag') == UNTRAINED:
        # Scripts look up a name's configuration and overlay it before they build, when they know no base.
        ours = timm.get_pretrained_cfg('moefied').to_dict()
        own, overlay = None, {**{key: value for key, value in given.items() if value != ours.get(key)}, **overlay}
    of_base = pretrained and own is None and not any(overlay.get(source) for source in SOURCES)
    return build(
        functools.partial(
            _build, base=base, targets=targets, layer=layer, pretrained=of_base,
            layer_args=dict(layer_args, num_experts=num_experts), cache_dir=kwargs.get('cache_dir')),
        'moefied',
        pretrained=pretrained and not of_base,
        pretrained_cfg=own or _cfg_of(base),
        pretrained_cfg_overlay=overlay,
        feature_cfg=dict(feature_cls='getter', **_out_indices(base, **kwargs)),
        **kwargs,
    )


def _out_indices(base: str, features_only: bool = False, out_indices: Any = None, **kwargs) -> Dict[str, Any]:
    """The levels that timm gives for the base."""
    if not features_only or out_indices is not None:
        return {}
    features = timm.create_model(base, features_only=True, **{**kwargs, 'device': 'meta'})
    return {'out_indices': features.feature_info.out_indices}


def _cfg_of(base: str) -> Any:
    """The base's configuration without its source of weights, which are not those of the routed model."""
    plain, _, tag = str(base).partition('.')
    if not timm.is_model(plain):
        raise InputError(f'base={base!r} is no model of timm.{nearest(plain, timm.list_models())}')
    try:
        found = timm.get_pretrained_cfg(base)
    except RuntimeError:
        tags = timm.list_pretrained(f'{plain}.*')
        raise InputError(f'base={base!r}: {plain} has no weights of this tag.{nearest(base, tags)}') from None
    empty = {source: None for source in SOURCES if hasattr(found, source)}
    return dataclasses.replace(found, architecture='moefied', tag=None, **empty)
