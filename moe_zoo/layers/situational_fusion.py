"""Situational fusion: several representations of an image, each with a head of its own, weighted by what is in sight.

Situational Fusion of Visual Representation for Visual Navigation, Shen, Xu, Zhu, Guibas, Fei-Fei, Savarese, ICCV 2019,
https://arxiv.org/abs/1908.09073. K frozen encoders describe the same image; a head on each proposes an output (a policy
over actions there, classes here); a light gate on the raw image gives the weights by which the proposals are summed.

Letters: B images, C channels, K representations (the experts), D_k values of representation k, G values of the goal,
O outputs of a head.
"""
import contextlib
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from timm.layers import register_notrace_module
from torch import nn
from torch.nn import functional as F

from ..errors import InputError, counted, nearest
from ..routing import Routing, SoftmaxRouter, check_num_selected, record
from .image_moe import pooled
from .routed import RoutedLayer

MODES = {
    'action': 'a head for each representation, their outputs summed by the weights of the gate (the paper, default)',
    'feature': 'representations scaled by the weights of the gate and concatenated, one head',
    'concat': 'representations concatenated, one head, no gate',
    'mean': 'a head for each representation, the mean of their outputs, no gate',
    'single': 'one representation, one head, no gate',
}
MIXES = {
    'probabilities': 'a mixture of distributions; the output is its logarithm (default)',
    'logits': 'a weighted sum of logits',
}


class ImageGate(nn.Module):
    """A light network on the raw image: 3 x 3 convolutions of stride 2, each with a norm of its image and ReLU; pooled.

    Args:
        in_chans: C.
        widths: Channels of the convolutions.

    Shapes:
        (B, C, H, W) -> (B, widths[-1]).
    """

    def __init__(self, in_chans: int = 3, widths: Sequence[int] = (16, 32, 64), device=None, dtype=None):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        layers: List[nn.Module] = []
        for in_chs, out_chs in zip((in_chans, *widths), widths):
            conv = nn.Conv2d(in_chs, out_chs, 3, stride=2, padding=1, bias=False, **dd)
            layers += [conv, nn.GroupNorm(1, out_chs, **dd), nn.ReLU()]
        self.convs = nn.Sequential(*layers)
        self.num_features = widths[-1] if widths else in_chans

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pooled(self.convs(x))

    def macs(self, input_shape: Tuple[int, ...]) -> int:
        B, _, H, W = input_shape
        total = 0
        for conv in self.convs:
            if isinstance(conv, nn.Conv2d):
                H, W = (H + 1) // 2, (W + 1) // 2
                total += B * H * W * conv.weight.numel()
        return total


class EvenRouter(nn.Module):
    """The same weight for every expert, 1 / K, whatever comes in: the router of modes without a gate."""

    def __init__(self, num_experts: int):
        super().__init__()
        self.num_experts = num_experts

    def mix(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """x: (B, ...). Returns (B, K) logits and gates."""
        logits = torch.zeros([x.shape[0], self.num_experts], device=x.device, dtype=torch.float32)
        return logits, torch.softmax(logits, dim=-1)

    @torch.jit.ignore
    def forward(self, x: torch.Tensor) -> Routing:
        """x: (B, ...). Returns a record with (B, K) weights."""
        logits, gates = self.mix(x)
        return Routing(logits, gates, gates, shape=(x.shape[0],))

    def macs(self, num_items: int) -> int:
        return 0


@register_notrace_module
class SituationalFusion(RoutedLayer):
    """Heads on K representations, and the gate that weighs them by the raw image.

    What it returns by `mode` and `mix`: with 'action' and 'mean' the mixture of the heads' distributions, as
    **log-probabilities** (a cross-entropy and an argmax take them as they take logits), or the weighted sum of their
    logits with `mix='logits'`, which losses of independent classes (BCE) need; with 'feature' and 'concat' the logits
    of the one head. Without outputs (`num_outputs=0`), and with `pre_logits`, every mode returns the representations
    side by side, each times K w_k, so that even weights leave them as they are.

    The gate never sees the representations. It starts with even weights, as 'mean' and 'concat' have them (our choice).
    Its softmax is float32; the record has (B, K) logits, gates and weights and the matrix `affinity`, and serves
    everything that reads records or overrules them (`force_expert`), in modes without a gate as well.

    Args:
        dims: D_k of every representation; maps are flattened.
        num_outputs: O.
        mode: A key of `MODES`; 'single' is for one representation.
        mix: A key of `MIXES`, for 'action' and 'mean'.
        gate: From the layer's input to (B, F) features, with `num_features` and `macs(input_shape)`; None makes an
            `ImageGate`.
        in_chans: C, for that one.
        goal_dim: G of a goal that enters every head; 0 for none.
        goal_to_gate: Whether it enters the gate as well.
        head_dim: Units of a hidden ReLU layer in every head; 0 for linear heads.
        drop_rate: Dropout of the values that heads see.
        representation_drop: Probability of dropping a representation of an image in training. One at least stays, and
            the weights of those that stay are scaled to sum to one.
        affinity: (K, K) how much the representations tell the same, symmetric, from 0 to 1; the diagonal does not
            count. None is all zeros, by which the loss 'affinity' costs nothing, until `set_affinity`.
        losses: (name, weight) auxiliary losses of the gate, such as ('affinity', 0.1), ('gate_entropy', 0.01);
            see `moe_zoo.losses.LOSSES`. Modes without a gate have none.

    Shapes:
        x (B, C, H, W), representations K of (B, D_k) or (B, ...), goal (B, G) -> (B, O), or (B, sum D_k).

    Raises:
        InputError: An unknown mode or mix, a value out of range, an affinity that is none; in forward, representations
            or a goal that are not those of the constructor.
    """
    concatenates: torch.jit.Final[bool]
    mixes_logits: torch.jit.Final[bool]
    goal_to_gate: torch.jit.Final[bool]

    def __init__(
            self,
            dims: Sequence[int],
            num_outputs: int,
            mode: str = 'action',
            mix: str = 'probabilities',
            gate: Optional[nn.Module] = None,
            in_chans: int = 3,
            goal_dim: int = 0,
            goal_to_gate: bool = False,
            head_dim: int = 0,
            drop_rate: float = 0.,
            representation_drop: float = 0.,
            affinity: Any = None,
            losses: Sequence[Tuple[str, float]] = (),
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        _check(dims, mode, mix, representation_drop)
        self.dims = tuple(dims)
        self.num_experts = self.num_selected = len(dims)
        self.mode = mode
        self.concatenates = mode in ('feature', 'concat')
        self.mixes_logits = mix == 'logits'
        self.goal_dim = goal_dim
        self.goal_to_gate = goal_to_gate
        self.head_dim = head_dim
        self.drop_rate = float(drop_rate)
        self.representation_drop = float(representation_drop)
        self.gate = None
        self.router = EvenRouter(self.num_experts)
        if mode in ('action', 'feature'):
            self.gate = ImageGate(in_chans, **dd) if gate is None else gate
            in_features = self.gate.num_features + (goal_dim if goal_to_gate else 0)
            self.router = SoftmaxRouter(in_features, self.num_experts, losses=losses, **dd)
            nn.init.zeros_(self.router.weight)
        self.register_buffer('affinity', torch.zeros(self.num_experts, self.num_experts, device=device))
        if affinity is not None:
            self.set_affinity(affinity)
        self.reset_heads(num_outputs, **dd)

    def reset_heads(self, num_outputs: int, device=None, dtype=None) -> None:
        """New heads of as many outputs, in the training mode of the layer; 0 leaves them out.

        Raises:
            InputError: One output, where it would be a probability.
        """
        if num_outputs == 1 and not (self.concatenates or self.mixes_logits):
            raise InputError("One output with mix='probabilities' is a distribution over one class: use mix='logits'.")
        self.num_outputs = num_outputs
        widths = [sum(self.dims)] if self.concatenates else self.dims
        heads = [self._head(width + self.goal_dim, device, dtype) for width in widths] if num_outputs else []
        self.heads = nn.ModuleList(heads).train(self.training)

    def _head(self, in_features: int, device, dtype) -> nn.Module:
        dd = {'device': device, 'dtype': dtype}
        if not self.head_dim:
            return nn.Linear(in_features, self.num_outputs, **dd)
        hidden, last = nn.Linear(in_features, self.head_dim, **dd), nn.Linear(self.head_dim, self.num_outputs, **dd)
        return nn.Sequential(hidden, nn.ReLU(), last)

    @torch.jit.ignore
    def set_affinity(self, matrix: Any) -> None:
        """Take another matrix for the loss 'affinity': see `check_affinity`, `measure_affinity`."""
        self.affinity.copy_(check_affinity(matrix, self.num_experts))

    def forward(
            self,
            x: torch.Tensor,
            representations: List[torch.Tensor],
            goal: Optional[torch.Tensor] = None,
            pre_logits: bool = False,
    ) -> torch.Tensor:
        features = [F.dropout(each.flatten(1), self.drop_rate, self.training) for each in representations]
        if not torch.jit.is_scripting():
            self._check_inputs(features, goal)
        weights = self.weigh(x, goal)
        if pre_logits or self.num_outputs == 0:
            return self.scale(features, weights)
        if self.concatenates:
            return self.propose([self.scale(features, weights)], goal)[:, 0]
        return self.mix(self.propose(features, goal), weights)

    @torch.jit.export
    def propose(self, features: List[torch.Tensor], goal: Optional[torch.Tensor] = None) -> torch.Tensor:
        """What every head says of its own representation: for heads that are trained one by one, before the gate.

        Shapes:
            features K of (B, D_k), goal (B, G) -> (B, K, O) logits. K is 1 where one head sees all, of sum D_k values.
        """
        outputs: List[torch.Tensor] = []
        for k, head in enumerate(self.heads):
            seen = features[k] if goal is None else torch.cat([features[k], goal.to(features[k].dtype)], dim=1)
            outputs.append(head(seen))
        return torch.stack(outputs, dim=1)

    def weigh(self, x: torch.Tensor, goal: Optional[torch.Tensor] = None) -> torch.Tensor:
        """Decide, and record the decision.

        Shapes:
            x (B, C, H, W), goal (B, G) -> (B, K), float32.
        """
        situation = x if self.gate is None else self.gate(x)
        if self.goal_to_gate and self.gate is not None:
            assert goal is not None
            situation = torch.cat([situation, goal.to(situation.dtype)], dim=1)
        if torch.jit.is_scripting():
            return self.drop(self.router.mix(situation)[1])
        else:
            routing = self.router(situation)
            # A copy: what leaves a re-entrant checkpoint gets a gradient function, which the buffer must not.
            affinity = self.affinity.to(torch.float32, copy=True)
            routing = routing._replace(weights=self.drop(routing.weights), affinity=affinity)
            record(self, routing)
            return routing.weights

    def drop(self, weights: torch.Tensor) -> torch.Tensor:
        """(B, K) weights without the representations that this call drops, in training."""
        if self.representation_drop > 0. and self.training:
            draw = torch.rand_like(weights)
            stays = (draw >= self.representation_drop) | (draw == draw.max(dim=1, keepdim=True)[0])
            weights = renormalise(weights, stays)
        return weights

    def scale(self, features: List[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
        """K of (B, D_k), weights (B, K). Returns (B, sum D_k): each times K w_k."""
        scaled: List[torch.Tensor] = []
        for k, each in enumerate(features):
            scaled.append(each * (self.num_experts * weights[:, k:k + 1]).to(each.dtype))
        return torch.cat(scaled, dim=1)

    def mix(self, outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """(B, K, O) logits of the heads, (B, K) weights. Returns (B, O), computed in float32, in their type."""
        weights = weights.unsqueeze(2)
        if self.mixes_logits:
            return (weights * outputs.float()).sum(dim=1).to(outputs.dtype)
        # ln sum_k w_k p_k. A weight of 0 counts as the smallest float: its logarithm and its gradient stay finite.
        shares = weights.clamp_min(1.2e-38).log() + torch.log_softmax(outputs.float(), dim=2)
        return torch.logsumexp(shares, dim=1).to(outputs.dtype)

    @torch.jit.ignore
    def _check_inputs(self, features: List[torch.Tensor], goal: Optional[torch.Tensor]) -> None:
        found = tuple(each.shape[1] for each in features)
        if found != self.dims:
            raise InputError(f'representations of {found} values: the fusion was made for {self.dims}.')
        goal_dim = 0 if goal is None else goal.shape[1]
        if goal_dim != self.goal_dim:
            raise InputError(f'goal of {goal_dim} values: the fusion was made for goal_dim={self.goal_dim}.')

    def expert_parameters(self) -> List[List[nn.Parameter]]:
        """The heads, where each representation has its own."""
        return [] if self.concatenates else [list(group) for group in zip(*(h.parameters() for h in self.heads))]

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        """MACs of gate, router and all heads for images of this shape. The encoders are not the layer's."""
        heads = sum(m.weight.numel() for m in self.heads.modules() if isinstance(m, nn.Linear))
        gate = 0 if self.gate is None else self.gate.macs(input_shape)
        return gate + self.router.macs(input_shape[0]) + input_shape[0] * heads

    def extra_repr(self) -> str:
        return f'dims={self.dims}, num_outputs={self.num_outputs}, mode={self.mode!r}'


class Encoder(nn.Module):
    """A network that turns an image into one representation, and can be frozen.

    Frozen, it has no gradient and stays in evaluation mode: norms keep their statistics whatever `train` says.
    """

    def __init__(self, net: nn.Module, freeze: bool = False):
        super().__init__()
        self.net = net
        self.frozen = freeze
        if freeze:
            self.requires_grad_(False)
            self.train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def train(self, mode: bool = True) -> 'Encoder':
        return super().train(mode and not self.frozen)


def renormalise(weights: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
    """(B, K) weights of the representations that stay (bool), scaled to sum to one; even where they were all 0."""
    weights = (weights + 1e-12) * stays.to(weights.dtype)
    return weights / weights.sum(dim=1, keepdim=True)


def check_affinity(matrix: Any, size: int) -> torch.Tensor:
    """A (K, K) float32 tensor with zero diagonal of anything that torch makes a matrix of.

    Raises:
        InputError: Another shape, a value outside [0, 1], or it is not symmetric.
    """
    wanted = f'give a symmetric {size} x {size} matrix of values from 0 to 1'
    try:
        matrix = torch.as_tensor(matrix, dtype=torch.float32, device='cpu').clone()
    except (TypeError, ValueError, RuntimeError):
        raise InputError(f'affinity={matrix!r} is no matrix: {wanted}.') from None
    if matrix.shape != (size, size):
        raise InputError(f'affinity of shape {tuple(matrix.shape)} for {counted(size, "representation")}: {wanted}.')
    matrix.fill_diagonal_(0.)
    outside = ~((matrix >= 0) & (matrix <= 1))
    if outside.any():
        raise InputError(f'affinity holds {matrix[outside][0]:.4g}: {wanted}.')
    gap = (matrix - matrix.T).abs()
    if gap.max() > 1e-5:
        i, j = divmod(int(gap.argmax()), size)
        raise InputError(
            f'affinity is not symmetric, [{i}][{j}] is {matrix[i, j]:.4g} and [{j}][{i}] is {matrix[j, i]:.4g}: '
            f'{wanted}.')
    return matrix


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Linear centred kernel alignment of two representations of the same images: 1 for equal ones up to a rotation.

    By the unbiased estimate of HSIC (Song et al. 2012, eq. 5): the plain one gives unrelated representations that have
    more values than there are images an alignment near 1. Below 0, where the estimate may fall, it is 0.

    Args:
        x: (N, ...), N at least 4.
        y: (N, ...).
    """
    kernels = [each.double().flatten(1) for each in (x, y)]
    kernels = [(each - each.mean(dim=0)) @ (each - each.mean(dim=0)).T for each in kernels]
    a, b = (kernel.fill_diagonal_(0.) for kernel in kernels)
    norm = (_hsic(a, a) * _hsic(b, b)).clamp_min(0.).sqrt()
    return (_hsic(a, b) / norm.clamp_min(1e-300)).clamp(0., 1.).float()


def _hsic(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(N, N) kernels with zero diagonal; not divided by N (N - 3), which an alignment does not need."""
    n = a.shape[0]
    return (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (a.sum(dim=0) @ b.sum(dim=0))


@torch.no_grad()
def measure_affinity(model: nn.Module, *inputs: Any) -> torch.Tensor:
    """How much the representations of a model tell the same, by `linear_cka` on a calibration batch.

    >>> fusion.set_affinity(measure_affinity(model, images))

    Args:
        model: Any module that holds one `SituationalFusion`; run once in evaluation mode, left as it was.
        inputs: Its arguments; images that are as different as those to come, some hundred.

    Returns:
        (K, K), symmetric, zero diagonal, on the CPU.

    Raises:
        InputError: The model has no fusion, or there are fewer than 4 images.
    """
    seen: List[List[torch.Tensor]] = []

    def look(layer, representations):
        seen.append([each.detach() for each in representations])
        return representations

    training = [module for module in model.modules() if module.training]
    with _representations(model, look):
        try:
            model.eval()
            model(*inputs)
        finally:
            for module in training:
                module.training = True
    K, images = len(seen[0]), len(seen[0][0])
    if images < 4:
        raise InputError(f'An affinity measured on {counted(images, "image")}: use 4 at least, better some hundred.')
    affinity = torch.zeros(K, K)
    for i in range(K):
        for j in range(i):
            affinity[i, j] = affinity[j, i] = linear_cka(seen[0][i], seen[0][j]).cpu()
    return affinity


@contextlib.contextmanager
def disturb_representations(
        model: nn.Module,
        chosen: Sequence[int],
        noise: Optional[float] = None,
        renormalised: bool = False,
        generator: Optional[torch.Generator] = None,
) -> Iterator[None]:
    """Lose some representations for a while, or blur them: how much does a fusion depend on each?

    >>> with disturb_representations(model, [0, 2]):
    ...     accuracy = evaluate(model)

    Args:
        model: Any module that holds a `SituationalFusion`.
        chosen: Indices of the representations.
        noise: Standard deviation of normal noise that is added, over the root mean square of the values of each image;
            None sets them to zero.
        renormalised: Tell the gate, too: their weights are 0, those of the others scaled to sum to one.
        generator: Of the noise.

    Raises:
        InputError: The model has no fusion, or no such representation; all of them, where weights are to be scaled.
    """
    def disturb(layer, representations):
        return [blur(each) if k in chosen else each for k, each in enumerate(representations)]

    def blur(phi):
        if noise is None:
            return torch.zeros_like(phi)
        size = phi.float().flatten(1).square().mean(dim=1).sqrt().view(-1, *[1] * (phi.dim() - 1))
        drawn = torch.randn(phi.shape, generator=generator, device=phi.device)
        return phi + (noise * size * drawn).to(phi.dtype)

    def reweigh(router, inputs, routing):
        stays = torch.ones_like(routing.weights, dtype=torch.bool)
        stays[:, list(chosen)] = False
        return routing._replace(weights=renormalise(routing.weights, stays))

    with _representations(model, disturb) as layers, contextlib.ExitStack() as hooks:
        for layer in layers.values():
            wrong = [k for k in chosen if not 0 <= k < layer.num_experts]
            if wrong or (renormalised and len(set(chosen)) == layer.num_experts):
                raise InputError(
                    f'chosen={list(chosen)}: the fusion has {layer.num_experts} representations, counted from 0, '
                    'and one has to stay where weights are renormalised.')
            if renormalised:
                hooks.callback(layer.router.register_forward_hook(reweigh).remove)
        yield


@contextlib.contextmanager
def _representations(model: nn.Module, change) -> Iterator[Dict[str, SituationalFusion]]:
    """Put `change(layer, representations)` before every fusion of a model; yields them by name."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SituationalFusion)}
    if not layers:
        raise InputError(f'model: {type(model).__name__} has no SituationalFusion.')

    def before(layer, args, kwargs):
        if len(args) > 1:
            return (args[0], change(layer, args[1]), *args[2:]), kwargs
        return args, {**kwargs, 'representations': change(layer, kwargs['representations'])}

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers.values()]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def _check(dims: Sequence[int], mode: str, mix: str, representation_drop: float) -> None:
    for argument, name, known in (('mode', mode, MODES), ('mix', mix, MIXES)):
        if name not in known:
            raise InputError(f'{argument}={name!r} is not one of {", ".join(known)}.{nearest(name, known)}')
    check_num_selected(len(dims), len(dims))
    if mode == 'single' and len(dims) > 1:
        raise InputError(f"mode='single' with {len(dims)} representations: hand over the one that is to be used.")
    if not 0. <= representation_drop < 1.:
        raise InputError(
            f'representation_drop={representation_drop}: choose a probability of at least 0 and below 1.')
