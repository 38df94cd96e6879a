"""An image-level routed stage: every image passes through the few experts chosen for it, and an expert is any module.

The layer of Pavlitska et al. 2022 (arXiv 2204.10598), which replaces one residual stage of a CNN.
Letters: B images, C channels, E experts, K chosen experts an image.
"""
import contextlib
import copy
import zlib
from typing import Dict, Iterator, List, Sequence, Tuple

import torch
import torch.distributed as dist
from timm.layers import register_notrace_module
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from ..errors import InputError
from ..routing import NoisyTopKRouter, Routing, record
from .routed import RoutedLayer, masked_mean


@register_notrace_module
class MoEStage(RoutedLayer):
    """y_b = sum over the K experts chosen for image b of weight_bk * expert_k(x_b).

    The gate is global average pooling (over the true area of padded images) and one linear map, then noisy top-k with
    the softmax after the choice (Shazeer et al. 2017). An expert runs only on the images that chose it; one that no
    image chose runs nothing, and its parameters get zero gradients.

    With BatchNorm inside the experts the statistics of a training step are those of the images an expert sees, so that
    there, and only there, the numbers differ from running every expert on every image.

    Args:
        experts: E modules from (B, C, H, W) to maps of one common shape; whole residual stages, usually.
        in_chs: C.
        num_selected: K.
        noise: Learned noise on the gate logits in training.
        losses: (name, weight) auxiliary losses; see `moe_zoo.losses.LOSSES`. The authors use 'importance_unbiased' or
            'kl', with 0.5 on CIFAR-100 and 0.25 on COCO.
        perturb: Size of the noise that separates copies of one dense stage, relative to the standard deviation of each
            weight; used by `from_dense`, and when a dense stage's weights are loaded under this layer's name.

    Raises:
        InputError: K is not between 1 and E, or an expert holds a SyncBatchNorm.
    """

    def __init__(
            self,
            experts: Sequence[nn.Module],
            in_chs: int,
            num_selected: int = 2,
            noise: bool = True,
            losses: Sequence[Tuple[str, float]] = (('importance_unbiased', 0.5),),
            perturb: float = 0.1,
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.router = NoisyTopKRouter(
            in_chs, len(experts), num_selected, noise=noise, losses=losses, device=device, dtype=dtype)
        self.experts = nn.ModuleList(experts)
        self.in_chs = in_chs
        self.num_experts = len(experts)
        self.num_selected = num_selected
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
                    parameter.copy_(_perturbed(parameter, name, index, perturb))
        return cls(experts, in_chs, perturb=perturb, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W). Returns maps of the experts' shape."""
        routing = self.router(masked_mean(x))
        record(self, routing)
        if x.device.type == 'meta' or torch.compiler.is_exporting():
            return self.combine_reference(x, routing)
        return self.combine_sparse(x, routing)

    def combine_reference(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Every expert on every image, then the weighted sum: shape-static, E / K times the cost."""
        matrix = routing.combine_matrix()  # (B, E)
        return sum(_scale(expert(x), matrix[:, e]) for e, expert in enumerate(self.experts))

    @torch.compiler.disable
    def combine_sparse(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Every expert on the images that chose it. Which ones is data: a compiled graph breaks here."""
        if dist.is_available() and dist.is_initialized() and self.training:
            _refuse_sync_batch_norm(self.experts)  # a loop may have converted them after construction
        chosen = torch.zeros_like(routing.logits).scatter(1, routing.indices, 1.) > 0  # (B, E)
        matrix = routing.combine_matrix()
        # A trace must hold for other images too: there every expert runs, on a batch that may be empty.
        run_empty = torch.jit.is_tracing() and not self.training
        counts = None if run_empty else chosen.sum(dim=0).tolist()
        y, idle = None, []
        for e, expert in enumerate(self.experts):
            if counts is not None and counts[e] == 0 and not (x.shape[0] == 0 and e == 0):
                idle.append(expert)
                continue
            images = chosen[:, e].nonzero().squeeze(1)
            with _single_value_batch_norm(expert, enabled=counts is not None and counts[e] == 1):
                part = expert(x.index_select(0, images))
            part = _scale(part, matrix[:, e].index_select(0, images))
            if y is None:
                y = part.new_zeros((x.shape[0], *part.shape[1:]))
            y = y.index_add(0, images, part)
        return y + _touch(idle, y) if self.training and idle else y

    def expert_parameters(self) -> List[List[nn.Parameter]]:
        """One list of E parameters for every parameter of an expert; experts of unlike build are listed one by one."""
        lists = [list(expert.parameters()) for expert in self.experts]
        if len({tuple(p.shape for p in parameters) for parameters in lists}) == 1:
            return [list(group) for group in zip(*lists)]
        return lists

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        """MACs of the gate and the K most expensive experts for every image of (B, C, H, W)."""
        images = input_shape[0]
        costs = sorted((_macs(expert, (1, *input_shape[1:])) for expert in self.experts), reverse=True)
        return self.router.macs(images) + images * sum(costs[:self.num_selected])

    def _load_from_state_dict(self, state_dict: Dict[str, torch.Tensor], prefix: str, *args) -> None:
        """Weights of the dense stage, found under this layer's own name, become those of every expert."""
        wanted = set(self.experts[0].state_dict())
        for key in [k for k in state_dict if k.startswith(prefix) and k[len(prefix):] in wanted]:
            name = key[len(prefix):]
            value = state_dict.pop(key)
            for e in range(self.num_experts):
                state_dict[f'{prefix}experts.{e}.{name}'] = _perturbed(value, name, e, self.perturb)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f'num_experts={self.num_experts}, num_selected={self.num_selected}'


def _scale(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(B, ...) maps times (B,) float32 weights, in the type of the maps."""
    return y * weights.to(y.dtype).view(-1, *[1] * (y.dim() - 1))


def _touch(idle: List[nn.Module], like: torch.Tensor) -> torch.Tensor:
    """A zero that depends on every parameter of the idle experts: zero gradients instead of None, at no cost.

    Sums of empty slices, because 0 * parameter would turn an infinite weight into NaN. DDP then finds every parameter.
    """
    parts = [p.reshape(-1)[:0] if p.dim() == 0 else p[:0] for e in idle for p in e.parameters() if p.requires_grad]
    return sum((p.sum().to(like.dtype) for p in parts), like.new_zeros(()))


def _perturbed(value: torch.Tensor, name: str, expert: int, perturb: float) -> torch.Tensor:
    """Expert number `expert`'s version of a dense weight; norms and biases (fewer than two axes) stay as they are.

    The noise follows from the names alone, so that the ranks of a distributed run that load the same file agree.
    """
    if value.dim() < 2 or perturb == 0 or not value.is_floating_point() or value.is_meta:
        return value.detach().clone()
    generator = torch.Generator().manual_seed(zlib.crc32(f'{expert}.{name}'.encode()))
    noise = torch.randn(value.shape, generator=generator).to(device=value.device, dtype=value.dtype)
    return value.detach() + perturb * value.detach().std() * noise


@contextlib.contextmanager
def _single_value_batch_norm(expert: nn.Module, enabled: bool) -> Iterator[None]:
    """Let BatchNorm layers that meet one value a channel use their running statistics: it has no variance.

    That happens to an expert chosen by a single image whose maps have shrunk to 1x1.
    """
    norms = [m for m in expert.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if enabled else []
    frozen = []

    def freeze_for_this_call(norm: nn.Module, inputs: Tuple[torch.Tensor, ...]) -> None:
        if norm.training and inputs[0].numel() == inputs[0].shape[1]:
            norm.eval()
            frozen.append(norm)

    hooks = [norm.register_forward_pre_hook(freeze_for_this_call) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for norm in frozen:
            norm.train()


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
