"""What routed layers share that choose experts once an image: the gate, its constraint, and the dispatch by image.

Pavlitska, Hubschneider, Struppek, Zöllner, "Balancing Expert Utilization in Mixture-of-Experts Layers Embedded in CNNs"
(arXiv 2204.10598; IJCNN 2023 as "Sparsely-gated Mixture-of-Expert Layers for CNN Interpretability"). The definitions
follow what the authors' experiment code says; its successor's gates (arXiv 2509.05086) are named beside them.

Letters: B images, C channels, H x W positions, E experts, K chosen experts an image, P chosen pairs of image and
expert, F features that the gate sees.
"""
import numbers
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import InputError, nearest
from ..routing import STEP_CONSTRAINTS, NoisyTopKRouter, Routing, check_num_selected, linear_float32, record
from .routed import RoutedLayer, masked_mean

GATES = {
    'gap_fc': 'global average pool, one linear map (default)',
    'conv_gap': '3 x 3 convolution to 256 channels, pool, one linear map, no non-linearity between',
    'relu_gap_fc': 'ReLU of the map, pool, one linear map: what the "FCGate" of the authors\' code computes',
    'conv': "3 x 3 convolution straight to E channels, pool (the successor's \"Conv-GAP\")",
    'random_fc': 'as gap_fc, the matrix drawn once and never trained: a control',
}

# What the value of each means. The first two are losses, the others have a state (`moe_zoo.routing.constraints`).
CONSTRAINTS = {
    'importance': 'weight of the squared coefficient of variation of the importance, unbiased variance (default, 0.5)',
    'kl': 'weight of the KL divergence of the mean gate from the uniform distribution (0.5)',
    'relative': 'threshold of the relative importance, summed over all steps (0.5)',
    'mean': 'threshold of the mean importance over all steps, less 1 / E (0.3)',
    'bias': 'rate of a selection bias against the load (0.001)',
    'none': 'nothing; as None, which timm.create_model would take for "the default"',
}
_LOSSES = {'importance': 'importance_unbiased', 'kl': 'kl'}


def pooled(x: torch.Tensor, cut: int = 0) -> torch.Tensor:
    """(B, C, H, W) to (B, C), over the true area of padded images; `cut` as in `masked_mean`."""
    if torch.jit.is_scripting():
        return x.mean(dim=(2, 3))
    else:
        return masked_mean(x, cut)


class Pool(nn.Module):
    """(B, C, H, W) to (B, C), of the map or of its positive part."""

    def __init__(self, in_chs: int, relu: bool = False):
        super().__init__()
        self.num_features = in_chs
        self.relu = relu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return pooled(x.relu() if self.relu else x)

    def macs(self, num_images: int) -> int:
        return 0


class PoolPatches(nn.Module):
    """(B, C, H, W) to (B, F): a 3 x 3 convolution without padding, then the average pool; or the pool alone, F = 9 C.

    Both are linear, so the pool comes first: the mean over all places of a 3 x 3 window is nine pooled, shifted maps,
    and the convolution becomes one small matrix product with the very same weights.

    Args:
        in_chs: C.
        out_chs: Channels of the convolution, F; None leaves it to the router's own matrix.
    """

    def __init__(self, in_chs: int, out_chs: Optional[int] = None, device=None, dtype=None):
        super().__init__()
        self.num_features = 9 * in_chs if out_chs is None else out_chs
        self.conv = None if out_chs is None else nn.Conv2d(in_chs, out_chs, 3, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2] - 2, x.shape[3] - 2
        if not torch.jit.is_scripting():
            if height < 1 or width < 1:
                raise InputError(
                    f'A gate with a 3 x 3 convolution meets a map of {x.shape[2]} x {x.shape[3]}: it needs 3 x 3; '
                    "use gate='gap_fc', an earlier stage or larger images.")
        shifts = [pooled(x[:, :, n // 3:n // 3 + height, n % 3:n % 3 + width], 2) for n in range(9)]
        patches = torch.stack(shifts, dim=2).flatten(1)  # (B, C * 9), as a kernel is laid out
        conv = self.conv
        if conv is None:
            return patches
        return linear_float32(patches, conv.weight.flatten(1), conv.bias)

    def macs(self, num_images: int) -> int:
        return 0 if self.conv is None else num_images * self.conv.weight.numel()


class ImageMoE(RoutedLayer):
    """A layer whose gate chooses K of E experts for every image, and runs each on its own images only."""

    def set_gate(
            self,
            in_chs: int,
            num_experts: int,
            num_selected: int = 2,
            gate: str = 'gap_fc',
            constraint: Optional[str] = 'importance',
            constraint_value: Optional[float] = None,
            noise: Optional[bool] = None,
            losses: Sequence[Tuple[str, float]] = (),
            device=None,
            dtype=None,
    ) -> None:
        """Make the gate and its router. To be called by the constructor of a subclass, after nn.Module's own.

        Args:
            in_chs: C.
            num_experts: E.
            num_selected: K.
            gate: A key of `GATES`.
            constraint: A key of `CONSTRAINTS`, or None.
            constraint_value: Its weight, threshold or rate; None is the default of `CONSTRAINTS`.
            noise: Learned noise on the logits in training. None is the authors' choice: yes, but not under the hard
                constraints 'relative' and 'mean', nor with a random gate.
            losses: Further (name, weight) auxiliary losses, see `moe_zoo.losses.LOSSES`.

        Raises:
            InputError: An unknown gate or constraint, a `constraint_value` that is no number, or K that is not between
                1 and E.
        """
        if not isinstance(constraint_value, (numbers.Real, type(None))):
            raise InputError(f'constraint_value={constraint_value!r}: use a number.')
        dd = {'device': device, 'dtype': dtype}
        constraint = 'none' if constraint is None else constraint
        for argument, name, known in (('gate', gate, GATES), ('constraint', constraint, CONSTRAINTS)):
            if name not in known:
                raise InputError(f'{argument}={name!r} is not one of {", ".join(known)}.{nearest(name, known)}')
        if constraint in _LOSSES:
            weight = 0.5 if constraint_value is None else constraint_value
            losses = ((_LOSSES[constraint], weight), *losses)
        if noise is None:
            noise = constraint not in ('relative', 'mean') and gate != 'random_fc'
        self.gate = _create_features(gate, in_chs, **dd)
        self.router = NoisyTopKRouter(
            self.gate.num_features,
            num_experts,
            num_selected,
            noise=noise,
            zero_init=noise and gate != 'random_fc',
            losses=losses,
            constraint=constraint if constraint in STEP_CONSTRAINTS else None,
            constraint_value=constraint_value,
            **dd,
        )
        if gate == 'random_fc':
            self.router.weight.requires_grad_(False)
        self.in_chs = in_chs
        self.num_experts = num_experts
        self.num_selected = num_selected

    def set_num_selected(self, num_selected: int) -> None:
        """Choose another number of experts an image from now on, of a trained layer too."""
        check_num_selected(num_selected, self.num_experts)
        self.num_selected = self.router.num_selected = num_selected

    def route(self, x: torch.Tensor) -> Routing:
        """x: (B, C, H, W). Decide, and record the decision."""
        routing = self.router(self.gate(x))
        record(self, routing)
        return routing

    def gate_weights(self, x: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W). Returns (B, E) weights, 0 where not chosen; the decision as TorchScript reads it."""
        return self.router.choose(self.gate(x))[1]

    def group(self, x: torch.Tensor, routing: Routing) -> Tuple[List[torch.Tensor], torch.Tensor]:
        """Gather the images of every expert. Which ones is data: not for compiled graphs.

        A choice of weight 0 (an excluded expert, where fewer than K are left) is no choice.

        Args:
            x: (B, C, H, W).

        Returns:
            parts: E tensors (B_e, C, H, W), some of them empty.
            position: (B, K) where the image of each choice stands among all P; P where the choice is none.
        """
        chosen = routing.combine_matrix().detach() > 0  # (B, E)
        channels_last = _lie_channels_last(x)  # which index_select would forget
        x = x.permute(0, 2, 3, 1) if channels_last else x
        if torch.jit.is_tracing():  # a trace must hold for other images, and so for other sizes
            parts = [x.index_select(0, column.nonzero().squeeze(1)) for column in chosen.unbind(1)]
        else:
            images = chosen.t().nonzero()[:, 1]  # (P,), by expert
            parts = list(x.index_select(0, images).split(chosen.sum(dim=0).tolist()))
        parts = [part.permute(0, 3, 1, 2) for part in parts] if channels_last else parts
        place = chosen.t().reshape(-1).cumsum(dim=0).view(chosen.shape[1], -1).t() - 1  # (B, E)
        return parts, torch.where(chosen, place, chosen.sum()).gather(1, routing.indices)

    def combine(self, outputs: List[torch.Tensor], position: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sums of what the experts gave for their images.

        Args:
            outputs: (B_e, O, H', W') of the experts that ran, in order; one at least, for the shape.
            position: (B, K) from `group`.
            weights: (B, K) float32.

        Returns:
            (B, O, H', W'), in the type of the outputs.
        """
        channels_last = _lie_channels_last(outputs[0])  # maps travel as rows, in the order in which they lie in memory
        maps = [y.permute(0, 2, 3, 1) if channels_last else y for y in outputs]
        y = _gather_sums([each.flatten(1) for each in maps], position, weights).to(outputs[0].dtype)
        y = y.view(position.shape[0], *maps[0].shape[1:])
        return y.permute(0, 3, 1, 2) if channels_last else y

    def gate_macs(self, num_images: int) -> int:
        return self.gate.macs(num_images) + self.router.macs(num_images)


def must_be_static(x: torch.Tensor) -> bool:
    """Whether shapes must not depend on what is chosen: on the meta device, under compilation and export."""
    return x.is_meta or torch.compiler.is_compiling()


def weigh(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(B, O, H, W) maps times (B,) float32 weights, in the type of the maps."""
    return y * weights.to(y.dtype).view(-1, 1, 1, 1)


def _gather_sums(outputs: List[torch.Tensor], position: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sums of rows by weight.

    Args:
        outputs: Tensors (., F) that concatenate to P rows.
        position: (B, K) row of each choice; P reads zero.
        weights: (B, K) float32.

    Returns:
        (B, F) in float32, or in float64 where the outputs are.
    """
    rows = torch.cat(outputs + [outputs[0].new_zeros(1, outputs[0].shape[-1])])
    rows = rows.to(torch.result_type(rows, weights))
    # Gathers, weighs and sums in one pass, without a copy of the gathered rows.
    return F.embedding_bag(position, rows, per_sample_weights=weights.to(rows.dtype), mode='sum')


def _lie_channels_last(x: torch.Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _create_features(gate: str, in_chs: int, device=None, dtype=None) -> nn.Module:
    dd = {'device': device, 'dtype': dtype}
    convolutions: Dict[str, Optional[int]] = {'conv_gap': 256, 'conv': None}
    if gate in convolutions:
        return PoolPatches(in_chs, convolutions[gate], **dd)
    return Pool(in_chs, relu=gate == 'relu_gap_fc')
