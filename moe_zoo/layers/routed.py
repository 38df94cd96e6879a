"""What every routed layer and every routed model shares.

Letters: B images, C channels, E experts.
"""
import contextlib
import math
from typing import Iterator, List, Optional, Sequence, Set, Tuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..routing import current_image_sizes, routing_context


class RoutedLayer(nn.Module):
    """A layer whose router chooses or mixes experts; what analysis and cost counting may ask of it.

    Attributes:
        num_experts: E.
        num_selected: Experts an item uses; equals E where all are mixed.
    """
    num_experts: int
    num_selected: int

    def expert_parameters(self) -> List[List[nn.Parameter]]:
        """One list per expert-indexed group: `[p]` for a stacked parameter (leading axis E), E parameters where experts
        are separate modules. Layers that mix every expert name theirs too."""
        raise NotImplementedError(f'{type(self).__name__} does not name its expert parameters')

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        """MACs of the router and `num_selected` experts for every item of an input of this shape, without padding."""
        raise NotImplementedError(f'{type(self).__name__} does not state its cost')

    def spared_macs(self, input_shape: Tuple[int, ...], load: Sequence[float]) -> float:
        """What of `max_macs` an input of this shape need not execute under a measured load.

        Args:
            input_shape: As in `max_macs`.
            load: (E,) how many times an item used expert e, on average; choices that found no slot are none.

        Returns:
            0 for a layer that computes the same whatever its router decides.
        """
        return 0.

    def expert_sizes(self) -> List[int]:
        """Parameters of every expert; what experts share, and the router, are in none of them."""
        sizes = [0] * self.num_experts
        for group in self.expert_parameters():
            stacked = len(group) == 1
            for e in range(self.num_experts):
                sizes[e] += group[0].numel() // self.num_experts if stacked else group[e].numel()
        return sizes

    def active_parameters(self) -> int:
        """Parameters one item uses: everything but the experts it did not choose."""
        total = sum(p.numel() for p in self.parameters())
        if self.num_selected == self.num_experts:
            return total
        experts = sum(p.numel() for group in self.expert_parameters() for p in group)
        return total - experts + experts * self.num_selected // self.num_experts


class RoutedModel:
    """Mixin of routed timm models: put it first in the bases.

    `set_aux_loss(True)` makes a model in training return `(output, [Routing, ...])`; the records are how auxiliary
    losses reach the optimiser, because only what forward returns survives accumulation, scaling, checkpointing,
    compilation and DDP alike. Off by default, so that every loop that knows nothing of it gets a plain tensor.
    """
    aux_loss: bool = False

    @torch.jit.ignore
    def set_aux_loss(self, enable: bool = True) -> None:
        """Return routing records beside the output while training."""
        self.aux_loss = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """What the model exempts, and the biases of experts: stacked, they have two axes, and timm's layer-wise groups,
        unlike its plain ones, exempt a bias by its one axis alone."""
        inherited = getattr(super(), 'no_weight_decay', set)()
        return set(inherited) | {
            name for name, parameter in self.named_parameters() if parameter.ndim > 1 and name.endswith('.bias')}

    def forward(self, x: torch.Tensor):
        if torch.jit.is_scripting():
            return self.forward_head(self.forward_features(x))  # TorchScript knows no super()
        if not (self.aux_loss and self.training) or is_captured(x):
            return super().forward(x)
        with routing_context() as context:
            output = super().forward(x)
        return output, context.routings


def is_captured(x: torch.Tensor) -> bool:
    """Whether a graph is being made (FX, export, torch.jit.trace), whose only output is the model's."""
    return isinstance(x, torch.fx.Proxy) or torch.compiler.is_exporting() or torch.jit.is_tracing()


def channels_last_on_cpu(x: torch.Tensor, fewest: int = 1) -> torch.Tensor:
    """(B, C, H, W) in channels-last memory on a CPU, of at least `fewest` images.

    Dense convolutional networks take 0.6 to 0.8 of the time then: max-pools and norms gain most, and convolutions need
    not reorder their maps. They do copy contiguous kernels for every call, which a single image of a large network does
    not pay for. Graphs that are captured or compiled choose for themselves.
    """
    if is_captured(x) or torch.compiler.is_compiling():
        return x
    if x.device.type != 'cpu' or x.dim() != 4 or x.shape[0] < fewest:
        return x
    return x.contiguous(memory_format=torch.channels_last)


def unbind_biases(bias: Optional[torch.Tensor], num_experts: int) -> List[Optional[torch.Tensor]]:
    """(E, ...) biases of all experts, or None, to one an expert."""
    biases: List[Optional[torch.Tensor]] = []
    if bias is None:
        for _ in range(num_experts):
            biases.append(None)
    else:
        for each in bias.unbind(0):
            biases.append(each)
    return biases


def masked_mean(x: torch.Tensor, cut: int = 0) -> torch.Tensor:
    """Global average pool over the true area of every image.

    Under a context that carries image sizes (a padded detection batch) positions whose receptive cell starts beyond
    the image are left out, so that padding does not move a gate; without one this is the plain mean.

    Args:
        x: (B, C, H, W).
        cut: Rows and columns that x lost at the end of every image to a convolution without padding, or a slice.

    Returns:
        (B, C) in the type of x.
    """
    sizes = current_image_sizes()
    if sizes is None:
        return x.mean(dim=(2, 3))
    inside = _cells_inside(x.shape[-2:], x.device, *sizes, cut)
    wide = torch.promote_types(x.dtype, torch.float32)  # in which thousands of cells are counted without rounding
    total = (x * inside.to(x.dtype).unsqueeze(1)).sum(dim=(2, 3), dtype=wide)
    return (total / inside.sum(dim=(1, 2)).unsqueeze(1)).to(x.dtype)


def tokens_inside(x: torch.Tensor) -> Optional[torch.Tensor]:
    """Which tokens of a padded batch lie on their image, tokens in front of the patches among them.

    Args:
        x: (B, N, D) or (B, H, W, D).

    Returns:
        (T,) bool; None without a context that carries image sizes, and where tokens are no grid of square patches over
        the whole of every image (those of windows, for example).
    """
    sizes = current_image_sizes()
    if sizes is None or x.shape[0] != sizes[0].shape[0] or x.dim() not in (3, 4):
        return None
    grid = (0, x.shape[1], x.shape[2]) if x.dim() == 4 else token_grid(x.shape[1], sizes[1])
    if grid is None:
        return None
    inside = _cells_inside(grid[1:], x.device, *sizes)
    return F.pad(inside.flatten(1), (grid[0], 0), value=True).flatten()


def token_grid(tokens: int, input_size: Tuple[int, int]) -> Optional[Tuple[int, int, int]]:
    """(tokens in front, rows, columns) of a sequence of patches: the only whole square patch that gives their number.

    >>> token_grid(197, (224, 224))
    (1, 14, 14)

    Returns:
        None where no square patch gives this number of tokens with at most 8 in front.
    """
    height, width = input_size
    for front in range(min(9, tokens)):
        patch = round((height * width / (tokens - front)) ** 0.5)
        if patch and height % patch == 0 and width % patch == 0 \
                and (height // patch) * (width // patch) == tokens - front:
            return front, height // patch, width // patch
    return None


def _cells_inside(
        cells: Tuple[int, int],
        device: torch.device,
        true: torch.Tensor,
        padded: Tuple[int, int],
        cut: int = 0,
) -> torch.Tensor:
    """(B, H, W) bool: a cell belongs to the image where its first pixel does."""
    true = true.to(device=device, dtype=torch.float32)
    spans = []
    for axis in (0, 1):
        number = cells[axis] + cut
        count = torch.ceil(true[:, axis] / _cell_size(int(padded[axis]), int(number))) - cut
        spans.append(torch.arange(cells[axis], device=device) < count.clamp(1, cells[axis]).unsqueeze(1))
    return spans[0].unsqueeze(2) & spans[1].unsqueeze(1)


def _cell_size(pixels: int, cells: int) -> float:
    """Pixels from one cell to the next: a power of two where one gives this number of cells, of which the last may be
    cut short, as the two of stride 64 on 96 pixels."""
    power = 2 ** math.ceil(math.log2(pixels / cells))
    return power if -(-pixels // power) == cells else pixels / cells


@contextlib.contextmanager
def single_value_batch_norm(module: nn.Module, enabled: bool) -> Iterator[None]:
    """Let BatchNorm layers that meet one value a channel use their running statistics: it has no variance.

    That happens to an expert chosen by a single image, or to an embedding of one, whose maps have shrunk to 1x1.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)] if enabled else []
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


class batch_norm_of_images(TorchFunctionMode):
    """Let BatchNorm in training take its statistics, and the running ones, from some images of a batch only.

    For experts that meet images which did not choose them, because shapes must be static: what comes out for the others
    is what would come out without these. As in `single_value_batch_norm`, where the images have no more than one value
    a channel the running statistics are used; they then stay as they are. `num_batches_tracked` counts every call.

    Args:
        images: (B,) bool.
    """

    def __init__(self, images: torch.Tensor):
        super().__init__()
        self.images = images

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.batch_norm:
            return _batch_norm_of_images(self.images, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _batch_norm_of_images(
        images: torch.Tensor,
        x: torch.Tensor,
        running_mean: Optional[torch.Tensor],
        running_var: Optional[torch.Tensor],
        weight: Optional[torch.Tensor] = None,
        bias: Optional[torch.Tensor] = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
) -> torch.Tensor:
    """F.batch_norm, of whose (B, C, H, W) maps some are not there to the statistics."""
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    inside = images.to(wide.dtype).view(-1, 1, 1, 1)
    count = inside.sum() * (x.shape[2] * x.shape[3])
    mean = (wide * inside).sum(dim=(0, 2, 3)) / count.clamp(min=1)
    var = ((wide - mean.view(-1, 1, 1)).square() * inside).sum(dim=(0, 2, 3)) / count.clamp(min=1)
    if running_mean is not None:
        before = running_mean.clone(), running_var.clone()
        with torch.no_grad():
            unbiased = var * (count / (count - 1).clamp(min=1))
            for running, of_batch in ((running_mean, mean), (running_var, unbiased)):
                running.lerp_(of_batch.to(running.dtype), momentum * (count > 1).to(running.dtype))
        mean, var = (torch.where(count > 1, now, old.to(now.dtype)) for now, old in zip((mean, var), before))
    scale = torch.rsqrt(var + eps) if weight is None else torch.rsqrt(var + eps) * weight
    out = (wide - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)
    return (out if bias is None else out + bias.view(-1, 1, 1)).to(x.dtype)
