"""Dense weights in a routed model, whose function they keep at the start: "upcycling".

For token experts: Sparse Upcycling, Komatsuzaki et al., ICLR 2023, https://arxiv.org/abs/2212.05055.

| layer | how it starts | the function |
| --- | --- | --- |
| CondConv, Dynamic Convolution | kernels that the gates of a zero router mix to the dense one | kept |
| `MoEConv2d` | copies; the gates of the chosen sum to one | kept |
| `MoEStage` as wide as the dense stage | copies, beside a shortcut of zero | kept, but for a shortcut without a norm |
| `MoEStage` of narrow experts | every expert has other channels of the stage | not kept: most of the stage is missing |
| DeepMoE | gates of one; a further channel is a copy of one and shares its outgoing weights with it | kept |
| `MoEMlp`, gates that sum to one | copies, or slices of which all are chosen | kept |
| `MoEMlp`, gates as V-MoE's | the same, scaled by E / K, under a zero router | kept, but for the router 'cosine' |
| `MoEMlp`, Expert Choice | copies | kept where every expert takes every token, at a capacity factor of E / K |

"Kept": the logits differ by rounding, below 1e-4 where they are of the order of 10, in evaluation mode. In training a
capacity still drops tokens, and norms inside experts see their own images only. What is not kept, on random dense
weights: with experts of a third of the channels (`moe_resnet18`) logits move by about half of the largest, with Expert
Choice at its default capacity by about a third.

Letters: E experts, K chosen experts, D width, N tokens.
"""
import re
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Type

import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from ..errors import InputError, nearest
from ..layers import ChannelGate, ChannelGated, MoEConv2d, MoEMlp, MoEStage, RoutedLayer, ShallowEmbedding
from ..layers.cond_conv import MixingLayer
from .upcycle_layers import (
    Dense,
    Job,
    Makers,
    embedding,
    expert_convs,
    expert_mlps,
    expert_stages,
    gates,
    mixed_kernels,
    widened,
)

StateDict = Dict[str, torch.Tensor]

ROUTERS = {
    'zero': 'weights of zero: all gates are equal',
    'random': 'as the model has been initialised',
    'kmeans': 'directions of clusters of token features (`tokens`), for `MoEMlp`; other layers as by default',
}
METHODS = {
    'copy': 'every token expert is as wide as the dense MLP, and a copy of it (default)',
    'split': 'token experts are slices of the dense MLP, which several of them make together',
}
RULES: List[Tuple[Type[nn.Module], Callable[[str, nn.Module, Job], Makers]]] = [
    (MixingLayer, mixed_kernels),
    (MoEConv2d, expert_convs),
    (MoEStage, expert_stages),
    (MoEMlp, expert_mlps),
    (ChannelGate, gates),
    (ShallowEmbedding, embedding),
]


def upcycle(
        dense: Mapping[str, torch.Tensor],
        model: nn.Module,
        router: Optional[str] = None,
        method: str = 'copy',
        noise: Optional[float] = None,
        tokens: Optional[Mapping[str, torch.Tensor]] = None,
        ignore: Sequence[str] = (),
) -> StateDict:
    """The weights with which a routed model starts as a dense one; the model is not changed.

    >>> dense = timm.create_model('resnet50', pretrained=True)
    >>> model = timm.create_model('condconv_resnet50')
    >>> model.load_state_dict(upcycle(dense.state_dict(), model))

    Symmetry is broken: kernels that are mixed get a noise whose gate-weighted sum is zero, and so do the weights on
    the copied channels of a DeepMoE; experts that are chosen are equal at first, and part because each meets other
    images or tokens.

    A LayerScale that the model does not have is folded into the layer before it; a table of positions is resized as
    timm does. Activations are the model's: where the dense ViT has the exact GELU and the model that by tanh, logits
    move by about 7e-4; give the model the `act_layer` of the source.

    Args:
        dense: Weights by timm's names, of the network that the model grows from.
        model: Any model with routed layers of this package, under timm's names.
        router: A key of `ROUTERS`. None is 'zero' where the function depends on it (mixed kernels, gates of V-MoE),
            else 'random'.
        method: A key of `METHODS`.
        noise: Size of the noise relative to the standard deviation of each weight. None is 0.1 where it leaves the
            function as it is, and 0 for experts that are chosen.
        tokens: For 'kmeans', (N, D) inputs of each routed MLP by its name; see `token_features`.
        ignore: Names of modules that keep the weights of the model, such as ('fc',) for another number of classes.

    Returns:
        A state dictionary for the model, strict.

    Raises:
        InputError: The weights are of another architecture (the first tensor that differs is named), a layer cannot
            take dense weights, or an argument is unknown.
    """
    for argument, value, known in (('router', router, ROUTERS), ('method', method, METHODS)):
        if value is not None and value not in known:
            raise InputError(f'{argument}={value!r} is not one of {", ".join(known)}.{nearest(value, known)}')
    if noise is not None and not noise >= 0:
        raise InputError(f'noise={noise}: use a share of the standard deviation of a weight, 0 or more.')
    own = model.state_dict()
    source = Dense(_adapted({k: v for k, v in dense.items() if not _within(k, ignore)}, model, own))
    job = Job(source, model, own, router, method, noise, tokens or {})
    makers = _makers(job)
    made = {}
    for name, value in own.items():
        tensor = value if _within(name, ignore) else makers[name]()
        made[name] = tensor.to(value.dtype)
    source.check_all_used()
    return made


def is_routed(state: Mapping[str, torch.Tensor], model: nn.Module) -> bool:
    """Whether weights go into a model as they are: routers are among them, or the model has none."""
    routers = []
    for name, layer in _routed(model):
        routers += [f'{name}.weight'] if isinstance(layer, ChannelGate) else [f'{name}.router.', f'{name}.routing_fn.']
    own = [name for name in model.state_dict() if name.startswith(tuple(routers))]
    return not own or any(name in state for name in own)


@torch.no_grad()
def token_features(
        model: nn.Module,
        names: Sequence[str],
        images: torch.Tensor,
) -> Dict[str, torch.Tensor]:
    """What the MLPs of a dense ViT read: tokens for `upcycle(..., router='kmeans')`.

    Args:
        model: The dense model; it runs once, in the mode it is in.
        names: Modules, such as 'blocks.11.mlp'.
        images: (B, C, H, W).

    Returns:
        (N, D) by name, all tokens of all images.

    Raises:
        InputError: The model has no module of such a name.
    """
    modules = dict(model.named_modules())
    found: StateDict = {}
    hooks = []
    try:
        for name in names:
            if name not in modules:
                raise InputError(f'There is no module {name!r} in the model.{nearest(name, modules)}')
            hooks.append(modules[name].register_forward_pre_hook(
                lambda _, inputs, name=name: found.update({name: inputs[0].flatten(0, -2)})))
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _routed(model: nn.Module) -> Iterator[Tuple[str, nn.Module]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, (RoutedLayer, ShallowEmbedding)))


def _makers(job: Job) -> Makers:
    """What makes every tensor of the model, in its order."""
    gated = tuple(f'{name}.' for name, layer in _routed(job.model) if isinstance(layer, ChannelGated))
    makers: Makers = {}
    for name, layer in _routed(job.model):
        rule = next((rule for kind, rule in RULES if isinstance(layer, kind)), None)
        if rule is not None:
            makers.update(rule(name, layer, job))
        elif not isinstance(layer, ChannelGated):
            raise InputError(
                f'{name!r} is a {type(layer).__name__}, which no dense layer can start: load weights of its own.')
    if not makers:
        raise InputError(f'{type(job.model).__name__} has no routed layers: load the dense weights as they are.')
    for name, value in job.own.items():
        if name not in makers:
            makers[name] = _plain(name, value, job, gated)
    return makers


def _plain(name: str, value: torch.Tensor, job: Job, gated: Tuple[str, ...]) -> Callable[[], torch.Tensor]:
    """A tensor outside routed layers, or a norm or shortcut inside one."""
    if not value.is_floating_point() and name not in job.dense:  # counters of norms, which old files lack; flags
        return lambda: value
    may_widen = gated and (
        name.startswith(gated) or isinstance(job.model.get_submodule(name.rpartition('.')[0]), nn.Linear))
    if may_widen:
        return lambda: widened(name, tuple(value.shape), job)
    return lambda: job.dense.take(name, tuple(value.shape))


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f'{module}.') for module in modules)


def _adapted(dense: StateDict, model: nn.Module, own: StateDict) -> StateDict:
    """LayerScale folded where the model has none, and the table of positions on the model's grid."""
    dense = dict(dense)
    for name in [n for n in dense if re.fullmatch(r'.*\.ls[12]\.gamma', n) and n not in own]:
        scale = dense.pop(name)
        block, layer = name.removesuffix('.gamma').rsplit('.', 1)
        for part in ('weight', 'bias'):
            target = f'{block}.{"attn.proj" if layer == "ls1" else "mlp.fc2"}.{part}'
            if target in dense:
                dense[target] = dense[target] * (scale if part == 'bias' else scale.unsqueeze(1))
    table, wanted = dense.get('pos_embed'), own.get('pos_embed')
    if table is not None and wanted is not None and table.shape != wanted.shape and hasattr(model, 'patch_embed'):
        prefix = 0 if getattr(model, 'no_embed_class', False) else getattr(model, 'num_prefix_tokens', 1)
        side = (table.shape[1] - prefix) ** 0.5
        if side == int(side):  # otherwise it is of another kind, which is told by its shape
            dense['pos_embed'] = resample_abs_pos_embed(
                table, new_size=list(model.patch_embed.grid_size), num_prefix_tokens=prefix)
    return dense
