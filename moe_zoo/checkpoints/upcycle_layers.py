"""How each kind of routed layer starts from dense weights; `upcycle` has the table.

A rule returns what makes each tensor of its layer, by name, so that tensors are made in the order of the model and one
at a time.

Letters: E experts, K chosen experts, D width, M hidden width of an expert, O output channels, r slices of a dense MLP.
"""
import math
from typing import Callable, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import nn

from ..errors import InputError
from ..layers import ChannelGate, CondConv2d, CondLinear, MoEConv2d, MoEMlp, MoEStage, ShallowEmbedding
from ..layers.cond_conv import MixingLayer
from ..layers.moe_stage import perturbed
from ..routing import CosineTopKRouter, ExpertChoiceRouter, SoftmaxRouter, SoftmaxTopKRouter
from .kmeans import router_of_clusters

Makers = Dict[str, Callable[[], torch.Tensor]]
NOISE = 0.1  # relative to the standard deviation of a weight, where it leaves the function as it is


class Dense:
    """Dense weights by name, whose shapes are checked where they are taken."""

    def __init__(self, weights: Mapping[str, torch.Tensor]):
        self.weights = weights
        self.unused = dict.fromkeys(weights)

    def __contains__(self, name: str) -> bool:
        return name in self.weights

    def shape(self, name: str) -> Tuple[int, ...]:
        """Of a tensor; () where there is none."""
        return tuple(self.weights[name].shape) if name in self.weights else ()

    def take(self, name: str, shape: Tuple[int, ...]) -> torch.Tensor:
        """A tensor of that shape, at least float32 where it is a floating one."""
        found = self.weights.get(name)
        if found is None or tuple(found.shape) != shape:
            what = 'missing' if found is None else f'of shape {tuple(found.shape)}'
            raise InputError(
                f'The dense weights are of another architecture than the model: {name} is {what} in them, and the model'
                f' takes shape {shape}.')
        self.unused.pop(name, None)
        return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found

    def check_all_used(self) -> None:
        for name in self.unused:
            raise InputError(
                f'The dense weights are of another architecture than the model: {name} of shape {self.shape(name)} is'
                ' in them, and the model has nothing of that name.')


class Job(NamedTuple):
    """What `upcycle` was asked for; see there. `own` is the model's state dictionary."""
    dense: Dense
    model: nn.Module
    own: Mapping[str, torch.Tensor]
    router: Optional[str]
    method: str
    noise: Optional[float]
    tokens: Mapping[str, torch.Tensor]

    def keep(self, prefix: str) -> Makers:
        """The model's own tensors under a name."""
        return {k: lambda v=v: v for k, v in self.own.items() if k.startswith(f'{prefix}.')}

    def start_router(self, name: str, default: str) -> Makers:
        """A router, `name`, that starts as asked for, or by default; what is not its last map stays as it is."""
        makers = self.keep(name)
        if (default if self.router in (None, 'kmeans') else self.router) == 'zero':
            for key in (f'{name}.weight', f'{name}.bias'):
                if key in makers:
                    makers[key] = lambda key=key: torch.zeros_like(self.own[key])
        return makers

    def copies(self, value: torch.Tensor, key: str, count: int, noise: float) -> torch.Tensor:
        """(count, *shape): copies of a tensor, moved each its own way where there is noise."""
        if not noise:
            return value.expand(count, *value.shape)
        return torch.stack([perturbed(value, key, i, noise) for i in range(count)])


def mixed_kernels(name: str, layer: MixingLayer, job: Job) -> Makers:
    """CondConv and Dynamic Convolution: kernel_e = (dense + noise_e) / (sum of gates), the noises summing to zero.

    A zero router's gates are 1/2 each by a sigmoid, 1/E by a softmax.
    """
    makers = {} if layer.routing_fn is None else job.start_router(f'{name}.routing_fn', 'zero')
    total = 1. if isinstance(layer.routing_fn, SoftmaxRouter) else layer.num_experts / 2
    noise = NOISE if job.noise is None else job.noise

    def make(key: str, shape: Tuple[int, ...]) -> torch.Tensor:
        value = job.dense.take(key, shape)
        kernels = job.copies(value, key, layer.num_experts, noise)
        return ((kernels + (value - kernels.mean(dim=0))) / total).flatten(1)

    for path, kernel, shape in mixed_parts(name, layer):
        makers[f'{path}.weight'] = lambda p=path, s=shape: make(f'{p}.weight', s)
        if kernel.bias is not None:
            makers[f'{path}.bias'] = lambda p=path, s=shape: make(f'{p}.bias', s[:1])
    return makers


def mixed_parts(name: str, layer: MixingLayer) -> List[Tuple[str, nn.Module, Tuple[int, ...]]]:
    """(name, module, shape of the dense kernel) of what a layer's gates mix: itself, or convolutions inside."""
    if isinstance(layer, CondLinear):
        return [(name, layer, (layer.out_features, layer.in_features))]
    if isinstance(layer, CondConv2d):
        return [(name, layer, tuple(layer.weight_shape))]
    return [
        (f'{name}.{path}', conv, tuple(conv.weight_shape)) for path, conv in layer.named_modules()
        if type(conv) is CondConv2d]


def expert_convs(name: str, layer: MoEConv2d, job: Job) -> Makers:
    """K of E convolutions: copies, whose gates sum to one under any router."""
    makers = {**job.start_router(f'{name}.router', 'random'), **job.keep(f'{name}.gate')}
    for part in ('weight', 'bias'):
        if getattr(layer, part) is not None:
            key = f'{name}.{part}'
            shape = tuple(getattr(layer, part).shape[1:])
            makers[key] = lambda k=key, s=shape: job.copies(job.dense.take(k, s), k, layer.num_experts, job.noise or 0.)
    return makers


def expert_stages(name: str, layer: MoEStage, job: Job) -> Makers:
    """K of E stages beside a shortcut, which starts at zero by its norm.

    The dense stage is of the layer's own name, or of that of the one-layer Sequential around it. Experts as wide as it
    are copies. A narrow one has a part of the channels, other ones than the next expert; its weights on them are scaled
    so that sums of independent channels keep their variance, which the norms have stored; a shortcut that the dense
    stage did not need passes its channels on.
    """
    makers = {**job.start_router(f'{name}.router', 'random'), **job.keep(f'{name}.gate')}
    makers.update(_zero_shortcut(name, layer, job))
    around = job.model.get_submodule(name.rpartition('.')[0])
    stage = name.rpartition('.')[0] if isinstance(around, nn.Sequential) and len(around) == 1 else name
    first = f'{name}.experts.0.'
    widths = {}  # size of an axis in an expert -> in the dense stage, where these differ
    for key in job.own:
        if key.startswith(first):
            shapes = tuple(job.own[key].shape), job.dense.shape(f'{stage}.{key.removeprefix(first)}')
            widths.update({a: b for a, b in zip(*shapes) if a < b})
    for e in range(layer.num_experts):
        prefix = f'{name}.experts.{e}.'
        for key in [k for k in job.own if k.startswith(prefix)]:
            source = f'{stage}.{key.removeprefix(prefix)}'
            makers[key] = lambda k=key, s=source, e=e: _expert_of_stage(k, s, e, layer.num_experts, widths, job)
    return makers


def _zero_shortcut(name: str, layer: MoEStage, job: Job) -> Makers:
    makers = job.keep(f'{name}.shortcut')
    for path, module in [] if layer.shortcut is None else layer.shortcut.named_modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)):
            for part, parameter in module.named_parameters():
                key = '.'.join(filter(None, (name, 'shortcut', path, part)))
                makers[key] = lambda p=parameter: torch.zeros_like(p)
    return makers


def _expert_of_stage(
        key: str,
        source: str,
        expert: int,
        num_experts: int,
        widths: Mapping[int, int],
        job: Job,
) -> torch.Tensor:
    """A tensor of one expert from the dense one, `source`."""
    like = job.own[key]
    shape, found = tuple(like.shape), job.dense.shape(source)

    def channels(size: int, of: int) -> torch.Tensor:
        return (torch.arange(size) + expert * of // num_experts) % of

    if source not in job.dense and len(shape) < 2 and ('downsample' in source or not like.is_floating_point()):
        return like  # the norm of a shortcut that is new, or a counter that old files lack
    if source not in job.dense and widths and 'downsample' in source:
        outs, ins = (channels(n, widths[n]) if n in widths else torch.arange(n) for n in shape[:2])
        return _pass_on(like, outs, ins)
    narrow = len(found) == len(shape) and found[2:] == shape[2:] and all(a <= b for a, b in zip(shape, found))
    value = job.dense.take(source, found if narrow else shape)
    for axis, (size, of) in enumerate(zip(shape[:2], found[:2])):
        if size < of:
            value = value.index_select(axis, channels(size, of)) * (math.sqrt(of / size) if axis == 1 else 1.)
    return perturbed(value, key, expert, job.noise or 0.)


def _pass_on(like: torch.Tensor, outs: torch.Tensor, ins: torch.Tensor) -> torch.Tensor:
    """A 1 x 1 convolution that passes on the channels that output and input have in common."""
    return (outs.unsqueeze(1) == ins).to(like.dtype).view(like.shape)


def expert_mlps(name: str, layer: MoEMlp, job: Job) -> Makers:
    """K of E MLPs: copies, or slices number i mod r, whose outputs are scaled so that r / E of all makes the dense MLP.

    The output weights are divided by what the gates of the chosen sum to under a zero router, and multiplied by r.
    """
    total, fixed = _sum_of_gates(layer)
    M, D, O = layer.hidden_features, layer.in_features, layer.out_features
    r = _slices(name, layer, job)
    makers = _start_token_router(name, layer, job, 'random' if fixed and r == 1 else 'zero')
    index = torch.arange(layer.num_experts) % r
    halves = 2 if layer.glu else 1
    one = (1, 1) if layer.use_conv and len(job.dense.shape(f'{name}.fc1.weight')) == 4 else ()

    def experts(key: str, parts: torch.Tensor) -> torch.Tensor:
        """(r, ...) slices to (E, ...) experts."""
        if r == 1:
            return job.copies(parts[0], key, layer.num_experts, job.noise or 0.)
        return torch.stack([perturbed(parts[s], key, e, job.noise or 0.) for e, s in enumerate(index)])

    def fc1(key: str, shape: Tuple[int, ...]) -> torch.Tensor:
        """Of a GLU, both halves: in one tensor, or, as timm's SwiGLU has them, in two."""
        apart = [key.replace('.fc1.', f'.fc1_{half}.') for half in 'gx']
        if layer.glu and apart[0] in job.dense:
            value = torch.stack([job.dense.take(half, shape) for half in apart])
        else:
            value = job.dense.take(key, (halves * shape[0], *shape[1:]))
        return experts(key, value.reshape(halves, r, M, *shape[1:2]).transpose(0, 1).flatten(1, 2))

    def fc2(key: str) -> torch.Tensor:
        value = job.dense.take(key, (O, r * M, *one)).reshape(O, r, M)
        return experts(key, value.permute(1, 0, 2) * (r / total))

    makers[f'{name}.fc1.weight'] = lambda: fc1(f'{name}.fc1.weight', (r * M, D, *one))
    makers[f'{name}.fc2.weight'] = lambda: fc2(f'{name}.fc2.weight')
    if layer.fc1.bias is not None:
        makers[f'{name}.fc1.bias'] = lambda: fc1(f'{name}.fc1.bias', (r * M,))
    if layer.fc2.bias is not None:
        makers[f'{name}.fc2.bias'] = lambda: (
            job.dense.take(f'{name}.fc2.bias', (O,)) / total).expand(layer.num_experts, O)
    makers.update(job.keep(f'{name}.shared'))
    for part in ('weight', 'bias'):  # shared experts add nothing at first
        if f'{name}.shared.fc2.{part}' in makers:
            makers[f'{name}.shared.fc2.{part}'] = lambda k=f'{name}.shared.fc2.{part}': torch.zeros_like(job.own[k])
    return makers


def _slices(name: str, layer: MoEMlp, job: Job) -> int:
    """r: how many experts are as wide as the dense MLP."""
    if job.method == 'copy':
        return 1
    width = (job.dense.shape(f'{name}.fc2.weight') or (0, 0))[1]
    if width == 0 or width % layer.hidden_features or layer.num_experts % (width // layer.hidden_features):
        raise InputError(
            f"method='split': {name} has {layer.num_experts} experts of width {layer.hidden_features}, which cannot be"
            f' slices of a dense MLP of width {width}: as many of them must make it as divide their number.')
    return width // layer.hidden_features


def _sum_of_gates(layer: MoEMlp) -> Tuple[float, bool]:
    """What the gates that a token meets sum to under a zero router, and whether that is best left to a random one.

    It is where the sum is one under any router; and where experts choose tokens but not all of them, because a zero
    router has all of them choose the same.
    """
    E, K = layer.num_experts, layer.num_selected
    if isinstance(layer.router, ExpertChoiceRouter):
        factor = layer.eval_capacity_factor
        # A capacity in tokens is taken to hold all of them: how many there will be is not known here.
        taken = E if factor is None or layer.capacity is not None else min(E, K * factor)
        return taken / E, taken < E
    if isinstance(layer.router, SoftmaxTopKRouter) and not layer.router.renormalise:
        return K / E, K == E
    return 1., True


def _start_token_router(name: str, layer: MoEMlp, job: Job, default: str) -> Makers:
    if isinstance(layer.router, CosineTopKRouter):
        if job.router not in (None, 'random'):
            raise InputError(f'router={job.router!r}: {name!r} compares directions, which can only start at random.')
        default = 'random'
    makers = job.start_router(f'{name}.router', default)
    if job.router == 'kmeans':
        if name not in job.tokens:
            raise InputError(
                f"router='kmeans': tokens has no features for {name!r}; token_features(dense_model, names, images) "
                'collects them.')
        makers[f'{name}.router.weight'] = lambda: router_of_clusters(job.tokens[name], layer.num_experts)
    return makers


def gates(name: str, layer: ChannelGate, job: Job) -> Makers:
    """DeepMoE's gates are one: weights of one on mixture weights that sum to one."""
    return {f'{name}.weight': lambda: torch.ones_like(layer.weight)}


def embedding(name: str, layer: ShallowEmbedding, job: Job) -> Makers:
    """DeepMoE's embedding is new; mixture weights that are no softmax are made to sum to one."""
    makers = job.keep(name)
    if not layer.softmax:
        makers[f'{name}.fc.weight'] = lambda: torch.zeros_like(layer.fc.weight)
        makers[f'{name}.fc.bias'] = lambda: torch.full_like(layer.fc.bias, 1 / layer.dim)
    return makers


def widened(key: str, shape: Tuple[int, ...], job: Job) -> torch.Tensor:
    """A tensor of a network with more channels: channel i is a copy of channel i mod C of the dense one.

    Copies share the weights that lead from them, each its part and a noise that sums to zero (Net2Net, Chen et al.,
    ICLR 2016, https://arxiv.org/abs/1511.05641).
    """
    found = job.dense.shape(key)
    if key not in job.dense and 'downsample' in key:  # the dense block just added its input, which is narrower now
        if len(shape) < 2:  # its norm
            return job.own[key]
        return _pass_on(job.own[key], torch.arange(shape[0]) % shape[1], torch.arange(shape[1]))
    wider = len(found) == len(shape) and found[2:] == shape[2:] and all(a <= b for a, b in zip(found, shape))
    value = job.dense.take(key, found if wider else shape)
    if found == shape:
        return value
    value = value.index_select(0, torch.arange(shape[0]) % found[0])
    if len(shape) < 2 or shape[1] == found[1]:
        return value
    times = math.ceil(shape[1] / found[1])
    there = (torch.arange(times * found[1]) < shape[1]).view(times, 1, found[1], *[1] * (len(shape) - 2))
    noise = NOISE if job.noise is None else job.noise
    moved = job.copies(value, key, times, noise) - value
    parts = value / there.sum(dim=0) + moved * there
    parts = (parts - (moved * there).sum(dim=0) / there.sum(dim=0)) * there  # (times, outs, ins, ...)
    return parts.transpose(0, 1).flatten(1, 2)[:, :shape[1]]
