"""What every routed layer and every routed model shares.

Letters: B images, C channels, E experts.
"""
import contextlib
from typing import Iterator, List, Optional, Tuple

import torch
from torch import nn

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

    def forward(self, x: torch.Tensor):
        if torch.jit.is_scripting():
            return self.forward_head(self.forward_features(x))  # TorchScript knows no super()
        if not (self.aux_loss and self.training) or _is_captured(x):
            return super().forward(x)
        with routing_context() as context:
            output = super().forward(x)
        return output, context.routings


def _is_captured(x: torch.Tensor) -> bool:
    """Whether a graph is being made (FX, export, torch.jit.trace), whose only output is the model's."""
    return isinstance(x, torch.fx.Proxy) or torch.compiler.is_exporting() or torch.jit.is_tracing()


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
    true, padded = sizes
    height, width = x.shape[-2:]
    true = true.to(device=x.device, dtype=torch.float32)
    # A cell belongs to the image where its first pixel does: ceil(true * cells / padded) cells.
    rows = (torch.ceil(true[:, 0] * (height + cut) / padded[0]) - cut).clamp(1, height)
    columns = (torch.ceil(true[:, 1] * (width + cut) / padded[1]) - cut).clamp(1, width)
    inside = (
        (torch.arange(height, device=x.device)[None, :, None] < rows[:, None, None])
        & (torch.arange(width, device=x.device)[None, None, :] < columns[:, None, None])
    ).to(x.dtype)  # (B, H, W)
    return (x * inside.unsqueeze(1)).sum(dim=(2, 3)) / inside.sum(dim=(1, 2)).unsqueeze(1)


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
