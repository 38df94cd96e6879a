"""Patch-level routing: in every image every expert takes the few patches that its own router likes best (pMoE).

Patch-level Routing in Mixture-of-Experts is Provably Sample-efficient for Convolutional Neural Networks, Chowdhury,
Zhang, Wang, Liu, Chen, ICML 2023, https://arxiv.org/abs/2306.04073. Experts choose patches, not patches experts: a
patch may go to several experts or to none, every expert has exactly l patches of every image, and nothing needs to be
balanced. The authors compute densely, on a map whose other patches are set to zero (`run_reference` here); where the
same numbers follow from the chosen patches alone, only these are computed (`run_chosen`).

Every expert works on every image, so that all parameters are active ones; what is saved is positions.

Letters: B images, C channels, H x W positions, n = rows x columns patches an image, l of them chosen by an expert,
D elements of a patch, E experts, O output channels of an expert.
"""
from functools import partial
from typing import Callable, Final, List, Tuple, Union

import torch
from timm.layers import register_notrace_module, to_2tuple
from torch import nn
from torch.nn import functional as F

from ..errors import InputError, nearest
from ..routing import Routing, check_num_selected, linear_float32, record
from ..routing.routers import top_k
from .routed import RoutedLayer

# Where the softmax stands. The authors' code has the first for its two-layer networks and the second for its WRNs.
GATE_ORDERS = {
    'after': 'softmax over the l chosen logits of an expert: its gates in an image sum to 1 (theory, MNIST)',
    'before': 'softmax over all n logits of an expert, the l chosen ones kept as they are: at most 1 (WRN)',
    'hard': '1 for each chosen patch, which sends no gradient to the routers (separate training)',
}
# What trains; see `PatchMoE.set_mode`.
MODES = ('joint', 'router', 'experts')


class PatchRouter(nn.Module):
    """One linear filter of patch size an expert, without bias; every expert takes the l patches that answer strongest.

    Args:
        in_chans: C.
        patch_size: Height and width of a patch in cells of the map.
        num_experts: E.
        patches_per_expert: l.
        gate_order: A key of `GATE_ORDERS`.
        init_std: Of the filters; tiny, so that the gates start equal.

    Raises:
        InputError: An unknown `gate_order`, or a number below 1.
    """

    def __init__(
            self,
            in_chans: int,
            patch_size: Union[int, Tuple[int, int]],
            num_experts: int,
            patches_per_expert: int,
            gate_order: str = 'after',
            init_std: float = 1e-4,
            device=None,
            dtype=None,
    ):
        super().__init__()
        check_num_selected(num_experts, num_experts)
        self.patch_size: Tuple[int, int] = to_2tuple(patch_size)
        if gate_order not in GATE_ORDERS:
            hint = nearest(gate_order, GATE_ORDERS)
            raise InputError(f'gate_order={gate_order!r} is not one of {", ".join(GATE_ORDERS)}.{hint}')
        if patches_per_expert < 1 or min(self.patch_size) < 1:
            raise InputError(
                f'patches_per_expert={patches_per_expert}, patch_size={patch_size}: use 1 or more for both.')
        self.num_experts = num_experts
        self.patches_per_expert = patches_per_expert
        self.gate_order = gate_order
        self.init_std = init_std
        self.losses: Tuple[Tuple[str, float], ...] = ()
        elements = in_chans * self.patch_size[0] * self.patch_size[1]
        self.weight = nn.Parameter(torch.empty(num_experts, elements, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.init_std)

    def choose(self, patches: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The arithmetic, in the part of Python TorchScript reads.

        Args:
            patches: (B, n, D).

        Returns:
            logits: (B, n, E) float32.
            gates: (B, n, E) before the choice where the softmax stands there, else after it.
            weights: (B, n, E) after the choice, zero for patches that the expert did not take.
            kept: (B, n, E) bool, which those are.
        """
        logits = linear_float32(patches, self.weight)
        by_expert = logits.transpose(1, 2)  # (B, E, n)
        top, chosen = top_k(by_expert, self.patches_per_expert)  # (B, E, l)
        gates = by_expert
        if self.gate_order == 'before':
            gates = torch.softmax(by_expert, dim=-1)
            values = gates.gather(2, chosen)
        elif self.gate_order == 'after':
            values = torch.softmax(top, dim=-1)
        else:
            values = torch.ones_like(top)
        weights = torch.zeros_like(by_expert).scatter(2, chosen, values)
        if self.gate_order != 'before':
            gates = weights
        kept = torch.zeros_like(by_expert).scatter(2, chosen, 1.) > 0  # a bool True would not survive torch.jit.trace
        return logits, gates.transpose(1, 2), weights.transpose(1, 2), kept.transpose(1, 2)

    @torch.jit.ignore
    def forward(self, patches: torch.Tensor) -> Routing:
        """patches: (B, n, D). Returns a record of T = B n patches, whose `kept` pairs are what the experts took."""
        logits, gates, weights, kept = (field.reshape(-1, self.num_experts) for field in self.choose(patches))
        indices = torch.arange(self.num_experts, device=patches.device).expand_as(kept)
        return Routing(
            logits, gates, weights, indices, kept, shape=tuple(patches.shape[:2]), losses=self.losses, by_expert=True)

    def extra_repr(self) -> str:
        return (f'num_experts={self.num_experts}, patch_size={self.patch_size}, '
                f'patches_per_expert={self.patches_per_expert}, gate_order={self.gate_order!r}')


class PatchLayer(RoutedLayer):
    """What both patch-routed layers share. A subclass makes `router` and says how its experts run.

    A record has one row a patch, `shape` (B, rows, columns), and is `by_expert`: `kept` says which patches an expert
    took, and a patch that none of them took is dropped.
    """

    def route(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Decide, and record the decision.

        Args:
            x: (B, C, H, W).

        Returns:
            patches: (B, n, D).
            weights: (B, n, E), float32.

        Raises:
            InputError: The patches do not fill the map, or there are fewer than l.
        """
        height, width = self.router.patch_size
        if torch.jit.is_scripting():
            patches = to_patches(x, height, width)
            return patches, self.router.choose(patches)[2]
        else:
            self._check_map(x)
            patches = to_patches(x, height, width)
            B, n, _ = patches.shape
            routing = self.router(patches)._replace(shape=(B, x.shape[2] // height, x.shape[3] // width))
            record(self, routing)
            return patches, routing.combine_matrix().view(B, n, self.num_experts)

    def _check_map(self, x: torch.Tensor) -> None:
        (height, width), (H, W) = self.router.patch_size, x.shape[2:]
        check_patch_size(self.router.patch_size, x)
        n, wanted = H // height * (W // width), self.router.patches_per_expert
        if wanted > n:
            raise InputError(
                f'patches_per_expert={wanted}, but a map of {H} x {W} has {n} patches of {height} x {width}: '
                f'choose between 1 and {n}.')

    def chosen(self, weights: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Where the experts have work.

        Args:
            weights: (B, n, E).

        Returns:
            items: (E, B s) rows of the B n patches that every expert took, s = l unless somebody overruled the router.
            gates: (E, B s) their weights.
        """
        B, n, E = weights.shape
        taken = weights.detach().transpose(1, 2) != 0
        slots = self.router.patches_per_expert
        if not (weights.is_meta or torch.compiler.is_compiling() or torch.jit.is_tracing()):
            slots = max(slots, int(taken.sum(dim=2).max())) if B else slots
        position = top_k(taken.to(torch.int8), slots)[1]  # (B, E, s), in the order of the map
        gates = weights.transpose(1, 2).gather(2, position)
        items = position + n * torch.arange(B, device=weights.device).view(B, 1, 1)
        return items.transpose(0, 1).reshape(E, B * slots), gates.transpose(0, 1).reshape(E, B * slots)


@register_notrace_module
class PatchMoE(PatchLayer):
    """Experts that are filters as large as a patch, without bias: the first layer of the paper's two-layer network.

    Output channel (s, r) at patch j of an image is G_js <w_sr, x_j>, and 0 where expert s did not take the patch; a
    ReLU follows. Weighing what comes out is the same as weighing what goes in, as the authors do.

    Args:
        in_chans: C.
        num_filters: Filters of all experts together, m = E O.
        patch_size: Height and width of a patch.
        num_experts: E.
        patches_per_expert: l.
        gate_order: A key of `GATE_ORDERS`.
        init_std: Of the filters.
        router_init_std: Of the routers' filters.

    Shapes:
        (B, C, H, W) -> (B, m, rows, columns).

    Raises:
        InputError: `num_experts` does not divide `num_filters`, or what `PatchRouter` raises.
    """

    def __init__(
            self,
            in_chans: int,
            num_filters: int = 40,
            patch_size: Union[int, Tuple[int, int]] = 28,
            num_experts: int = 8,
            patches_per_expert: int = 6,
            gate_order: str = 'after',
            init_std: float = 0.01,
            router_init_std: float = 1e-4,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.router = PatchRouter(
            in_chans, patch_size, num_experts, patches_per_expert, gate_order, router_init_std, **dd)
        self.num_experts = self.num_selected = num_experts
        self.num_filters = num_filters
        self.in_chans = in_chans
        self.init_std = init_std
        self.mode = 'joint'
        if num_filters < 1 or num_filters % num_experts:
            raise InputError(f'num_filters={num_filters} with num_experts={num_experts}: use a multiple of it.')
        elements = self.router.weight.shape[1]
        self.weight = nn.Parameter(torch.empty(num_experts, num_filters // num_experts, elements, **dd))
        nn.init.normal_(self.weight, std=init_std)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        patches, weights = self.route(x)
        if torch.jit.is_scripting():
            return self.run_reference(x, weights)
        else:
            return self.run_chosen(x, patches, weights)

    def run_reference(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Every expert convolves the whole image, in which the patches have been multiplied by its gates."""
        height, width = self.router.patch_size
        outputs: List[torch.Tensor] = []
        for e, weight in enumerate(self.weight.unbind(0)):
            masked = x * gate_map(weights[:, :, e], x, height, width)
            kernel = weight.reshape(-1, self.in_chans, height, width)
            outputs.append(F.conv2d(masked, kernel, stride=(height, width)))
        return torch.cat(outputs, dim=1)

    def run_chosen(self, x: torch.Tensor, patches: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The chosen patches of all experts, as many for each, in one batched matrix product."""
        B, n, D = patches.shape
        items, gates = self.chosen(weights)  # (E, B s)
        rows = patches.reshape(B * n, D).index_select(0, items.flatten()).view(*items.shape, D)
        hidden = torch.bmm(rows, self.weight.transpose(1, 2))  # (E, B s, O)
        hidden = hidden * gates.to(hidden.dtype).unsqueeze(2)
        # Row (b n + j) E + s of the result is what expert s makes of patch j of image b.
        position = items * self.num_experts + torch.arange(self.num_experts, device=x.device).unsqueeze(1)
        out = hidden.new_zeros(B * n * self.num_experts, hidden.shape[2])
        out = out.index_copy(0, position.flatten(), hidden.flatten(0, 1))
        height, width = self.router.patch_size
        return out.view(B, x.shape[2] // height, x.shape[3] // width, self.num_filters).permute(0, 3, 1, 2)

    def set_mode(self, mode: str) -> None:
        """Choose what trains; the paper's separate training is 'router', then 'experts', both with hard gates.

        Args:
            mode: 'joint': routers and experts by the loss of the task, which reaches a router through the gates of the
                patches it chose. 'router': routers alone, by the linear loss (`moe_zoo.losses.linear_router_loss`,
                which the record asks for: `set_aux_loss(True)` on the model, or our training tool). 'experts': experts
                alone. What does not train has `requires_grad` off. Under DDP call `MoEClassificationTask.set_epoch`,
                which wraps the model anew, or use `find_unused_parameters`.

        Raises:
            InputError: An unknown mode, or separate training without hard gates or two experts.
        """
        if mode not in MODES:
            raise InputError(f'mode={mode!r} is not one of {", ".join(MODES)}.{nearest(mode, MODES)}')
        if mode != 'joint':
            self.check_separate('mode', mode)
        self.mode = mode
        self.router.losses = (('linear_router', 1.0),) if mode == 'router' else ()
        self.router.weight.requires_grad_(mode != 'experts')
        self.weight.requires_grad_(mode != 'router')

    def check_separate(self, name: str, value: object) -> None:
        """Raises: InputError: The argument `name` asks for separate training, which has 2 experts and hard gates."""
        order = self.router.gate_order
        if self.num_experts != 2 or order != 'hard':
            raise InputError(
                f'{name}={value!r} with num_experts={self.num_experts}, gate_order={order!r}: separate training has '
                "num_experts=2, one a class, and gate_order='hard'.")

    def expert_parameters(self) -> List[List[nn.Parameter]]:
        return [[self.weight]]

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        """MACs of the routers on all n patches, and of every expert on its l."""
        B, C, H, W = input_shape
        chosen = self.router.patches_per_expert * self.weight.numel()
        return B * (C * H * W * self.num_experts + chosen)

    def extra_repr(self) -> str:
        return f'{self.in_chans}, num_filters={self.num_filters}'


class PatchExpert(nn.Module):
    """Norm, activation and convolution of one expert, on the map of its patches: a pre-activation branch of a WRN.

    Args:
        norm_first: Norm and activation before the gates; else after them, as the authors', so that the patches that
            were not chosen are a constant afterwards, not zero.
    """
    norm_first: Final[bool]

    def __init__(
            self,
            in_chans: int,
            out_chans: int,
            kernel_size: int,
            norm_first: bool,
            norm_layer: Callable[..., nn.Module],
            act_layer: Callable[..., nn.Module],
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm_first = norm_first
        self.norm = norm_layer(in_chans, **dd)
        self.act = act_layer()
        self.conv = nn.Conv2d(in_chans, out_chans, kernel_size, padding=kernel_size // 2, **dd)

    def forward(self, x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """x: (B, C, H, W), gates: (B, 1, H, W), zero outside the chosen patches. Returns (B, O, H, W)."""
        if self.norm_first:
            return self.conv(self.act(self.norm(x)) * gates)
        return self.conv(self.act(self.norm(x * gates)))

    def run_rows(self, rows: torch.Tensor, gates: torch.Tensor, total: int) -> torch.Tensor:
        """The same for a 1 x 1 convolution, on single positions.

        Args:
            rows: (P, C) the chosen positions; with `norm_first` they come normalised.
            gates: (P,).
            total: Positions of the whole map, B H W; all others are zero to the norm.

        Returns:
            (P + 1, O): the last row is what comes out wherever nothing was chosen.
        """
        rows = F.pad(rows * gates.to(rows.dtype).unsqueeze(1), (0, 0, 0, 1))
        if not self.norm_first:
            rows = self.act(_sparse_batch_norm(self.norm, rows, total))
        return F.linear(rows, self.conv.weight.flatten(1), self.conv.bias)


@register_notrace_module
class PatchMoEConv2d(PatchLayer):
    """Pre-activation experts on their patches of a map, outputs side by side: the layer of WRN-pMoE.

    Every expert multiplies the patches it chose by their gates, sets the others to zero, and runs norm, activation and
    a convolution of stride 1 over the whole map, so that larger kernels see across the border of a patch.

    Single cells with a 1 x 1 convolution need the chosen cells only (`run_chosen`), BatchNorm in training included: its
    statistics are those of the whole map. Everything else, and any norm but nn.BatchNorm2d, runs densely.

    Args:
        in_chans: C.
        expert_chans: O.
        num_experts: E.
        patches_per_expert: l.
        patch_size: Height and width of a patch in cells.
        kernel_size: Of the experts' convolutions, odd.
        gate_order: A key of `GATE_ORDERS`.
        norm_first: See `PatchExpert`.
        norm_layer: Of the experts, one each.
        act_layer: Of the experts.
        router_init_std: Of the routers' filters.

    Shapes:
        (B, C, H, W) -> (B, E O, H, W).

    Raises:
        InputError: An even kernel, or what `PatchRouter` raises.
    """

    def __init__(
            self,
            in_chans: int,
            expert_chans: int,
            num_experts: int = 4,
            patches_per_expert: int = 16,
            patch_size: Union[int, Tuple[int, int]] = 1,
            kernel_size: int = 1,
            gate_order: str = 'before',
            norm_first: bool = False,
            norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
            act_layer: Callable[..., nn.Module] = nn.ReLU,
            router_init_std: float = 1e-4,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise InputError(f'kernel_size={kernel_size}: the experts keep the size of the map; use an odd number.')
        self.router = PatchRouter(
            in_chans, patch_size, num_experts, patches_per_expert, gate_order, router_init_std, **dd)
        self.num_experts = self.num_selected = num_experts
        make = partial(
            PatchExpert, in_chans, expert_chans, kernel_size, norm_first, norm_layer, act_layer, **dd)
        self.experts = nn.ModuleList([make() for _ in range(num_experts)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, weights = self.route(x)
        if torch.jit.is_scripting():
            return self.run_reference(x, weights)
        else:
            return self.run_chosen(x, weights) if self.computes_chosen() else self.run_reference(x, weights)

    def run_reference(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Every expert on the whole map, as the authors compute."""
        height, width = self.router.patch_size
        outputs: List[torch.Tensor] = []
        for e, expert in enumerate(self.experts):
            outputs.append(expert(x, gate_map(weights[:, :, e], x, height, width)))
        return torch.cat(outputs, dim=1)

    def computes_chosen(self) -> bool:
        """Whether the chosen cells are enough: single cells, 1 x 1 convolutions, and norms known to the letter."""
        expert = self.experts[0]
        single = self.router.patch_size == (1, 1) and expert.conv.kernel_size == (1, 1)
        plain = all(
            type(expert.norm) is nn.BatchNorm2d and expert.norm.track_running_stats and expert.norm.momentum is not None
            for expert in self.experts)
        return single and (expert.norm_first or plain)

    def run_chosen(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Only the chosen cells, and once what every other cell becomes."""
        B, C, H, W = x.shape
        outputs = []
        for expert, items, gates in zip(self.experts, *(each.unbind(0) for each in self.chosen(weights))):
            source = expert.act(expert.norm(x)) if expert.norm_first else x
            rows = source.permute(0, 2, 3, 1).reshape(-1, C).index_select(0, items)
            rows = expert.run_rows(rows, gates, B * H * W)
            out = rows[-1:].expand(B * H * W, -1).index_copy(0, items, rows[:-1])
            outputs.append(out.view(B, H, W, expert.conv.out_channels))
        return torch.cat(outputs, dim=3).permute(0, 3, 1, 2)

    def expert_parameters(self) -> List[List[nn.Parameter]]:
        return [list(group) for group in zip(*(expert.parameters() for expert in self.experts))]

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        """MACs of the routers on all patches, and of every expert on its l cells and once on an empty one.

        Where it takes the whole map to compute an expert, all of its positions count.
        """
        B, C, H, W = input_shape
        router = B * H * W * C * self.num_experts
        positions = B * H * W
        if self.computes_chosen():
            positions = B * self.router.patches_per_expert + 1
        return router + positions * sum(expert.conv.weight.numel() for expert in self.experts)


def check_patch_size(patch_size: Tuple[int, int], x: torch.Tensor) -> None:
    """Raises: InputError: Patches of this height and width do not fill a (B, C, H, W) map."""
    (height, width), (H, W) = patch_size, x.shape[2:]
    if H % height or W % width:
        raise InputError(
            f'patch_size={height} x {width} does not divide a map of {H} x {W}: use a divisor, or another image size.')


def to_patches(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, C, H, W) to (B, n, C height width): patches in the order of the map, elements as in a kernel."""
    B, C, H, W = x.shape
    x = x.reshape(B, C, H // height, height, W // width, width).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(B, (H // height) * (W // width), C * height * width)


def gate_map(weights: torch.Tensor, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, n) weights of one expert to a (B, 1, H, W) map in the type of x, constant on every patch."""
    B, _, H, W = x.shape
    gates = weights.to(x.dtype).reshape(B, 1, H // height, W // width)
    return gates.repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)


def _sparse_batch_norm(norm: nn.BatchNorm2d, rows: torch.Tensor, total: int) -> torch.Tensor:
    """What BatchNorm makes of `total` positions of which all but the given ones are zero, at the given ones.

    Args:
        norm: Its running statistics move as they would for the whole map.
        rows: (P + 1, C), the last one zero.
        total: At least P.
    """
    if not norm.training:
        return F.batch_norm(rows, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    given = rows[:-1].float() if rows.dtype in (torch.float16, torch.bfloat16) else rows[:-1]
    mean = given.sum(dim=0) / total
    variance = ((given - mean).square().sum(dim=0) + (total - len(given)) * mean.square()) / total
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        unbiased = variance * (total / max(total - 1, 1))
        norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), norm.momentum)
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    out = (rows - mean) * scale
    return (out if norm.bias is None else out + norm.bias).to(rows.dtype)

