"""Smaller again: experts removed or joined by what they did on data, and mixtures folded into one dense network.

Letters: E experts, N experts that stay, K chosen experts, T routed items.
"""
import copy
import re
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

import timm
import torch
from torch import nn

from ..errors import InputError, counted
from ..layers import (
    ChannelGate,
    ChannelGated,
    MoEConv2d,
    MoEMlp,
    MoEStage,
    RoutedLayer,
    ShallowEmbedding,
    SituationalFusion,
)
from ..layers.cond_conv import MixingLayer
from ..routing import AnnealedSoftmaxRouter, HierarchicalRouter, Routing, SoftmaxRouter
from .upcycle_layers import mixed_parts

Trace = Mapping[str, Sequence[Routing]]
StateDict = Dict[str, torch.Tensor]


class Plan(NamedTuple):
    """How the experts of one layer become fewer.

    Attributes:
        kernels: (N, E) weights of the old experts in the new ones.
        router: (N, E) the same for the rows of the router.
        shift: (N,) what the new logits gain, where the router has biases.
    """
    kernels: torch.Tensor
    router: torch.Tensor
    shift: torch.Tensor


def prune(model: nn.Module, trace: Trace, keep: Optional[int] = None, share: Optional[float] = None) -> nn.Module:
    """A copy of a model without the experts that carried least, in every routed layer, and without their router rows.

    >>> with trace_routing(model) as trace, torch.no_grad():
    ...     model(images)
    >>> smaller = prune(model, trace, keep=4)

    All layers keep equally many, so that `num_experts` and `num_selected` in the arguments of the new model tell it all
    and a saved one is created again as small. K is lowered to what is left. What the gates of a softmax lose goes to
    the others; sigmoid gates (CondConv) lose it.

    Args:
        model: Made by timm.create_model; it is not changed.
        trace: Records of `moe_zoo.routing.trace_routing(model)`, whose combine weights are the mass of an expert.
        keep: Experts that stay, N.
        share: Or the share of a layer's mass below which an expert goes; N is then what the layer needs that needs
            most.

    Raises:
        InputError: Not exactly one of `keep` and `share`, more experts kept than there are, a layer without records,
            or a model whose experts cannot be taken apart.
    """
    masses = _masses(model, trace)
    _check_separable(model, masses)
    if (keep is None) == (share is None):
        raise InputError(f'keep={keep}, share={share}: give exactly one of the two.')
    if share is not None and not (isinstance(share, (int, float)) and 0 <= share < 1):
        raise InputError(f"share={share!r}: use a share of a layer's mass, from 0 to less than 1.")
    if keep is None:
        keep = max(1, max(int((mass >= share * mass.sum()).sum()) for mass in masses.values()))
    _check_count(keep, masses)
    plans = {}
    for name, mass in masses.items():
        stay = mass.topk(keep).indices.sort().values
        choice = torch.eye(len(mass))[stay]
        plans[name] = Plan(choice, choice, torch.zeros(keep))
    return _rebuilt(model, plans, keep)


def merge(model: nn.Module, trace: Trace, keep: int) -> nn.Module:
    """A copy of a model in whose layers the experts that are most alike have been joined, pair by pair.

    Likeness is the cosine of the weights that an expert has. A joined expert is the mean of its two by their mass, its
    router row the mean of the two rows. Equal experts whose kernels are mixed are joined without a loss: their gates
    add up, which a softmax learns through its bias, and to which the kernel is scaled under sigmoids. Experts that are
    chosen keep their size; what two equal ones did for a token, one and the next in its ranking now do.

    Args:
        model, trace, keep: As in `prune`.
    """
    masses = _masses(model, trace)
    _check_separable(model, masses)
    _check_count(keep, masses)
    plans = {}
    for name, mass in masses.items():
        layer = model.get_submodule(name)
        router = getattr(layer, 'routing_fn', None)
        if isinstance(layer, MixingLayer) and router is None:  # it has the gates of the layer before it
            plans[name] = plans[next(reversed(plans))]
            continue
        groups = _alike(_weights_of(layer), keep)
        choice = torch.stack([torch.eye(len(mass))[group].sum(dim=0) for group in groups])  # (N, E) of 0 and 1
        sizes = choice.sum(dim=1, keepdim=True)
        by_mass = choice * (mass + 1e-12)
        kernels = by_mass / by_mass.sum(dim=1, keepdim=True)
        shift = torch.zeros(keep)
        if isinstance(router, SoftmaxRouter):
            annealed = isinstance(router, AnnealedSoftmaxRouter)
            temperature = router.current_temperature().cpu() if annealed else router.temperature
            shift = sizes.squeeze(1).log() * temperature
        elif isinstance(layer, MixingLayer):
            kernels = kernels * sizes
        plans[name] = Plan(kernels, choice / sizes, shift)
    return _rebuilt(model, plans, keep)


def to_dense(model: nn.Module, trace: Trace) -> StateDict:
    """The weights of the dense network that a model of mixed kernels or channel gates is on average.

    >>> timm.create_model('resnet50').load_state_dict(to_dense(condconv_resnet50, trace))

    Kernels are mixed by their mean gates (CondConv, Dynamic Convolution); mean channel gates (DeepMoE) go into the norm
    before them, so that a channel that was never live is zero. Exact where gates are constant.

    Args:
        model, trace: As in `prune`.

    Returns:
        Weights by timm's names, of the network that the model was made from. The widened maps of a DeepMoE stay: timm
        has such a network of bottlenecks (`wide_resnet50_2`), and none of basic blocks.

    Raises:
        InputError: A layer chooses its experts, which no dense layer is the mean of, or has no records.
    """
    state = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, RoutedLayer) and not isinstance(layer, (MixingLayer, ChannelGate, ChannelGated)):
            raise InputError(
                f'to_dense: {name!r} is a {type(layer).__name__}, which chooses its experts; only mixed kernels and '
                'channel gates have a mean.')
    gates = _masses(model, trace, mean=True)
    for name, mean in gates.items():
        layer = model.get_submodule(name)
        if isinstance(layer, MixingLayer):
            _fold_kernels(name, layer, mean, state)
    for name, block in model.named_modules():
        if isinstance(block, ChannelGated):
            _fold_gates(name, block, gates, state)
    gone = [f'{name}.routing_fn.' for name, m in model.named_modules() if isinstance(m, MixingLayer)]
    gone += [f'{name}.' for name, m in model.named_modules() if isinstance(m, (ChannelGate, ShallowEmbedding))]
    return {k: v for k, v in state.items() if not k.startswith(tuple(gone)) and k != 'gates_frozen'}


def _fold_kernels(name: str, layer: MixingLayer, mean: torch.Tensor, state: StateDict) -> None:
    for key, kernel, shape in mixed_parts(name, layer):
        state[f'{key}.weight'] = (mean.to(kernel.weight) @ kernel.weight.detach()).view(shape)
        if kernel.bias is not None:
            state[f'{key}.bias'] = mean.to(kernel.bias) @ kernel.bias.detach()


def _fold_gates(name: str, block: ChannelGated, gates: Mapping[str, torch.Tensor], state: StateDict) -> None:
    names = {id(m): f'{name}.{path}' for path, m in block.named_modules()}
    for _, norm, gate, _ in block.chain():
        if gate is not None:
            mean = gates[names[id(gate)]].to(norm.weight)
            for part in ('weight', 'bias'):
                state[f'{names[id(norm)]}.{part}'] = getattr(norm, part).detach() * mean


def _masses(model: nn.Module, trace: Trace, mean: bool = False) -> Dict[str, torch.Tensor]:
    """(E,) sum, or mean over items, of the combine weights of every routed layer.

    A layer that reuses the decision of the one before it has that one's.
    """
    masses: Dict[str, torch.Tensor] = {}
    last: Optional[torch.Tensor] = None
    for name, layer in model.named_modules():
        if not isinstance(layer, RoutedLayer) or isinstance(layer, ChannelGated):
            continue
        if isinstance(layer, MixingLayer) and layer.routing_fn is None and last is not None:
            masses[name] = last
            continue
        records = trace.get(name)
        if not records:
            raise InputError(
                f'trace has no records of {name!r}: run images through the model under '
                'moe_zoo.routing.trace_routing(model).')
        matrix = torch.cat([routing.combine_matrix() for routing in records]).float().cpu()  # (T, E)
        if matrix.shape[1] != layer.num_experts:
            raise InputError(
                f'trace is of another model: {name!r} has {counted(layer.num_experts, "expert")}, and its records have '
                f'{matrix.shape[1]}.')
        masses[name] = last = matrix.mean(dim=0) if mean else matrix.sum(dim=0)
    if not masses:
        raise InputError(f'{type(model).__name__} has no routed layers.')
    return masses


def _check_separable(model: nn.Module, masses: Mapping[str, torch.Tensor]) -> None:
    for name in masses:
        layer = model.get_submodule(name)
        if isinstance(layer, (ChannelGate, SituationalFusion)):
            raise InputError(
                f'{name!r} is a {type(layer).__name__}: how many experts it has follows from the network around it, and'
                ' none of them can go alone.')
        if isinstance(getattr(layer, 'router', None), HierarchicalRouter):
            raise InputError(
                f'{name!r} chooses groups first and then an expert in each: all groups have to keep as many, and none'
                ' of its experts can go alone.')


def _check_count(keep: int, masses: Mapping[str, torch.Tensor]) -> None:
    fewest = min(len(mass) for mass in masses.values())
    if type(keep) is not int or not 1 <= keep <= fewest:
        raise InputError(f'keep={keep!r}: choose between 1 and {fewest}, as there are {counted(fewest, "expert")}.')


def _weights_of(layer: RoutedLayer) -> torch.Tensor:
    """(E, all weights of an expert)."""
    groups = layer.expert_parameters()
    rows = [torch.stack(list(g)) if len(g) > 1 else g[0] for g in groups]
    return torch.cat([row.detach().float().flatten(1) for row in rows], dim=1)


def _alike(weights: torch.Tensor, count: int) -> List[List[int]]:
    """Experts in `count` groups: the two groups with the nearest means are joined until so many are left."""
    groups = [[e] for e in range(len(weights))]
    while len(groups) > count:
        means = torch.nn.functional.normalize(torch.stack([weights[g].mean(dim=0) for g in groups]), dim=1)
        likeness = (means @ means.t()).fill_diagonal_(-2.)
        i, j = sorted(divmod(int(likeness.argmax()), len(groups)))
        groups[i] += groups.pop(j)
    return groups


def _rebuilt(model: nn.Module, plans: Mapping[str, Plan], keep: int) -> nn.Module:
    """The model of the same arguments with fewer experts, and its weights."""
    cfg, args = getattr(model, 'pretrained_cfg', None), getattr(model, '_model_args', None)
    if args is None or not cfg:
        raise InputError(f'{type(model).__name__}: only a model made by timm.create_model can be made again smaller.')
    ratio = args.get('expert_ratio', 1)
    if keep % ratio:
        raise InputError(f'keep={keep} with expert_ratio={ratio}: use a multiple of it.')
    args = dict(args, num_experts=keep // ratio)
    # Layers that choose may choose all of their experts; those that mix have no such argument.
    chosen = [m.num_selected for m in map(model.get_submodule, plans) if isinstance(m, (MoEConv2d, MoEMlp, MoEStage))]
    if chosen:
        args['num_selected'] = min(min(chosen), keep) // ratio
    if hasattr(model, 'num_classes'):
        args['num_classes'] = model.num_classes
    smaller = timm.create_model(cfg['architecture'], **args)
    smaller.load_state_dict(_fewer(model, smaller.state_dict(), plans))
    smaller.pretrained_cfg = smaller.default_cfg = copy.copy(cfg)
    parameter = next(model.parameters())
    return smaller.to(device=parameter.device, dtype=parameter.dtype).train(model.training)


def _fewer(model: nn.Module, wanted: StateDict, plans: Mapping[str, Plan]) -> StateDict:
    """The state of a model with fewer experts."""
    state, modules = model.state_dict(), dict(model.named_modules())
    experts = {id(p) for name in plans for group in modules[name].expert_parameters() for p in group}
    owned = {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in experts}
    made = {}
    for key, value in wanted.items():
        layer = max((name for name in plans if key.startswith(f'{name}.')), key=len, default=None)
        if layer is None:
            made[key] = state[key]
            continue
        plan = plans[layer]
        place = re.match(rf'{re.escape(layer)}\.experts\.(\d+)\.(.*)', key)
        if place and key in state and state[key].shape == value.shape:  # experts that are modules
            parts = [state[f'{layer}.experts.{e}.{place[2]}'] for e in range(plan.kernels.shape[1])]
            made[key] = _combine(plan.kernels[int(place[1])].unsqueeze(0), torch.stack(parts))[0]
        elif state[key].shape == value.shape:
            made[key] = state[key]
        else:
            made[key] = _rows(key, state[key], plan, key in owned)
        if made[key].shape != value.shape:
            raise InputError(
                f'{key} of shape {tuple(state[key].shape)} cannot be taken apart by experts: '
                f'{type(modules[layer]).__name__} with these options keeps its number of experts.')
    return made


def _rows(key: str, value: torch.Tensor, plan: Plan, kernel: bool) -> torch.Tensor:
    if value.dim() == 0 or value.shape[0] != plan.kernels.shape[1]:
        return value
    rows = _combine(plan.kernels if kernel else plan.router, value)
    if key.endswith(('router.bias', 'routing_fn.bias')):
        rows = rows + plan.shift.to(rows)
    return rows


def _combine(weights: torch.Tensor, stack: torch.Tensor) -> torch.Tensor:
    """(N, E) weights times a stack (E, ...); of integers the first that counts."""
    if not stack.is_floating_point():
        return stack[weights.ne(0).float().argmax(dim=1)]
    return torch.tensordot(weights.to(stack.device), stack.float(), dims=1).to(stack.dtype)
