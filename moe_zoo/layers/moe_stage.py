"""An image-level routed stage: every image passes through the few experts chosen for it, and an expert is any module.

The layer of Pavlitska et al. 2022 (arXiv 2204.10598), which replaces one residual stage of a CNN.
Letters: B images, C input channels, O output channels, E experts, K chosen experts an image.
"""
import copy
import zlib
from typing import Dict, List, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from timm.layers import register_notrace_module
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from ..errors import InputError
from ..routing import Routing
from .image_moe import ImageMoE, must_be_static, weigh
from .routed import batch_norm_of_images, single_value_batch_norm


@register_notrace_module
class MoEStage(ImageMoE):
    """y_b = sum over the K experts chosen for image b of weight_bk * expert_k(x_b), plus shortcut(x_b) if it has one.

    The gate is, by default, global average pooling (over the true area of padded images) and one linear map, then noisy
    top-k with the softmax after the choice (Shazeer et al. 2017). An expert runs only on the images that chose it; one
    that no image chose runs nothing, and its parameters get zero gradients.

    With BatchNorm inside the experts the statistics of a training step are those of the images an expert sees. Where
    shapes must be static (meta tensors, compilation, export) every expert meets every image, and the others are left
    out of its statistics: the numbers are the same.

    Args:
        experts: E modules from (B, C, H, W) to maps of one common shape; whole residual stages, usually.
        in_chs: C.
        num_selected: K.
        gate: A key of `moe_zoo.layers.image_moe.GATES`.
        constraint: A key of `moe_zoo.layers.image_moe.CONSTRAINTS`, or None. The authors use 'importance' or 'kl' with
            weight 0.5 on CIFAR-100 and 0.25 on COCO, 'relative' and 'mean' with thresholds 0.5 and 0.3.
        constraint_value: Its weight, threshold or rate; None is its default.
        noise: Learned noise on the gate logits in training; None is yes, but not under 'relative' and 'mean'.
        losses: Further (name, weight) auxiliary losses; see `moe_zoo.losses.LOSSES`.
        shortcut: Module from (B, C, H, W) to maps of the experts' shape, whose output is added (the residual variant).
        perturb: Size of the noise that separates copies of one dense stage, relative to the standard deviation of each
            weight; used by `from_dense`, and when a dense stage's weights are loaded under this layer's name.

    Raises:
        InputError: K is not between 1 and E, an unknown gate or constraint, or an expert holds a SyncBatchNorm.
    """

    def __init__(
            self,
            experts: Sequence[nn.Module],
            in_chs: int,
            num_selected: int = 2,
            gate: str = 'gap_fc',
            constraint: Optional[str] = 'importance',
            constraint_value: Optional[float] = None,
            noise: Optional[bool] = None,
            losses: Sequence[Tuple[str, float]] = (),
            shortcut: Optional[nn.Module] = None,
            perturb: float = 0.1,
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.set_gate(
            in_chs, len(experts), num_selected, gate, constraint, constraint_value, noise, losses,
            device=device, dtype=dtype)
        self.experts = nn.ModuleList(experts)
        self.shortcut = shortcut
        self.perturb = perturb
        _refuse_sync_batch_norm(self.experts)

    @classmethod
    def from_dense(cls, stage: nn.Module, in_chs: int, num_experts: int = 4, perturb: float = 0.1, **kwargs):
        """Experts as copies of a dense stage, each moved a little, because equal experts would stay equal.

        Args:
            stage: The dense stage; it is not changed.
            perturb: Standard deviation of the move, relative to that of each weight. 0 leaves exact copies.
            kwargs: Further arguments of the class.
        """
        if num_experts < 1:
            raise InputError(f'num_experts={num_experts}: a routed stage needs at least one expert.')
        experts = [copy.deepcopy(stage) for _ in range(num_experts)]
        for index, expert in enumerate(experts):
            with torch.no_grad():
                for name, parameter in expert.named_parameters():
                    parameter.copy_(perturbed(parameter, name, index, perturb))
        return cls(experts, in_chs, perturb=perturb, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W). Returns maps of the experts' shape."""
        if torch.jit.is_scripting():
            y = self.combine_all(x, self.gate_weights(x))
        else:
            y = self._forward_eager(x)
        if self.shortcut is not None:
            y = y + self.shortcut(x)
        return y

    def _forward_eager(self, x: torch.Tensor) -> torch.Tensor:
        routing = self.route(x)
        return self.combine_reference(x, routing) if must_be_static(x) else self.combine_sparse(x, routing)

    def combine_all(self, x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Every expert on every image, weighed by a (B, E) matrix."""
        parts: List[torch.Tensor] = []
        for e, expert in enumerate(self.experts):
            parts.append(weigh(expert(x), matrix[:, e]))
        return torch.stack(parts).sum(dim=0)

    def combine_reference(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """The same for a record: shape-static, E / K times the cost. BatchNorm heeds the images of its expert alone."""
        matrix = routing.combine_matrix()
        if not self.training:
            return self.combine_all(x, matrix)
        self._check_ranks()
        parts = []
        for expert, weights in zip(self.experts, matrix.unbind(1)):
            with batch_norm_of_images(weights.detach() > 0):
                parts.append(weigh(expert(x), weights))
        return torch.stack(parts).sum(dim=0)

    def combine_sparse(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Every expert on the images that chose it. Which ones is data: not for compiled graphs."""
        self._check_ranks()
        parts, position = self.group(x, routing)
        tracing = torch.jit.is_tracing()
        busy = [expert for expert, part in enumerate(parts) if tracing or len(part)] or [0]  # one, for the shape
        outputs = []
        for expert in busy:
            with single_value_batch_norm(self.experts[expert], enabled=not tracing and len(parts[expert]) == 1):
                outputs.append(self.experts[expert](parts[expert]))
        weights = routing.weights
        if self.training and len(busy) < len(self.experts):
            weights = weights + _touch([e for i, e in enumerate(self.experts) if i not in busy], weights)
        return self.combine(outputs, position, weights)

    def _check_ranks(self) -> None:
        if self.training and dist.is_available() and dist.is_initialized():
            _refuse_sync_batch_norm(self.experts)  # a loop may have converted them after construction

    def expert_parameters(self) -> List[List[nn.Parameter]]:
        """One list of E parameters for every parameter of an expert; experts of unlike build are listed one by one."""
        lists = [list(expert.parameters()) for expert in self.experts]
        if len({tuple(p.shape for p in parameters) for parameters in lists}) == 1:
            return [list(group) for group in zip(*lists)]
        return lists

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        """MACs of the gate, the shortcut and the K most expensive experts for every image of (B, C, H, W)."""
        shortcut = 0 if self.shortcut is None else _macs(self.shortcut, tuple(input_shape))
        costs = sorted(self._expert_macs(input_shape), reverse=True)
        return self.gate_macs(input_shape[0]) + shortcut + sum(costs[:self.num_selected])

    def spared_macs(self, input_shape: Tuple[int, ...], load: Sequence[float]) -> float:
        """The K most expensive experts for every image, less those that ran."""
        costs = self._expert_macs(input_shape)
        ran = sum(times * cost for times, cost in zip(load, costs))
        return sum(sorted(costs, reverse=True)[:self.num_selected]) - ran

    def expert_sizes(self) -> List[int]:
        return [sum(p.numel() for p in expert.parameters()) for expert in self.experts]

    def _expert_macs(self, input_shape: Tuple[int, ...]) -> List[int]:
        """MACs of every expert on all images."""
        return [input_shape[0] * _macs(expert, (1, *input_shape[1:])) for expert in self.experts]

    def _load_from_state_dict(self, state_dict: Dict[str, torch.Tensor], prefix: str, *args) -> None:
        """Weights of the dense stage, found under this layer's own name, become those of every expert."""
        wanted = set(self.experts[0].state_dict())
        for key in [k for k in state_dict if k.startswith(prefix) and k[len(prefix):] in wanted]:
            name = key[len(prefix):]
            value = state_dict.pop(key)
            for e in range(self.num_experts):
                state_dict[f'{prefix}experts.{e}.{name}'] = perturbed(value, name, e, self.perturb)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f'num_experts={self.num_experts}, num_selected={self.num_selected}'


def _touch(idle: List[nn.Module], like: torch.Tensor) -> torch.Tensor:
    """A zero that depends on every parameter of the idle experts: zero gradients instead of None, at no cost.

    Sums of empty slices, because 0 * parameter would turn an infinite weight into NaN. DDP then finds every parameter.
    """
    parts = [p.reshape(-1)[:0] if p.dim() == 0 else p[:0] for e in idle for p in e.parameters() if p.requires_grad]
    return sum((p.sum().to(like.dtype) for p in parts), like.new_zeros(()))


def perturbed(value: torch.Tensor, name: str, expert: int, perturb: float) -> torch.Tensor:
    """Expert number `expert`'s version of a dense weight; norms and biases (fewer than two axes) stay as they are.

    The noise follows from the names alone, so that the ranks of a distributed run that load the same file agree.
    """
    if value.dim() < 2 or perturb == 0 or not value.is_floating_point() or value.is_meta:
        return value.detach().clone()
    generator = torch.Generator().manual_seed(zlib.crc32(f'{expert}.{name}'.encode()))
    noise = torch.randn(value.shape, generator=generator).to(device=value.device, dtype=value.dtype)
    return value.detach() + perturb * value.detach().std() * noise


def _refuse_sync_batch_norm(experts: nn.Module) -> None:
    if any(isinstance(m, nn.SyncBatchNorm) for m in experts.modules()):
        raise InputError(
            'SyncBatchNorm inside the experts of a routed stage: ranks would wait for each other where an expert gets '
            'images on one of them only; use BatchNorm, FrozenBatchNorm or GroupNorm there.')


def _macs(module: nn.Module, input_shape: Tuple[int, ...]) -> int:
    """MACs of one forward, counted on a copy without memory, unseen by a counter that is running."""
    memo = {id(b): b.to('meta') for b in module.buffers()}
    memo.update({id(p): nn.Parameter(p.detach().to('meta'), requires_grad=False) for p in module.parameters()})
    ghost = copy.deepcopy(module, memo).eval()
    with _disable_current_modes(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        ghost(torch.empty(input_shape, device='meta'))
    return counter.get_total_flops() // 2  # it counts a multiply-add as two
