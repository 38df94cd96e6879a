"""`MoEMlp`: the feed-forward layer of V-MoE, drop-in for timm's `Mlp`.

Letters: B images, D width, M hidden width of an expert, T routed tokens (of the whole batch), E experts, K chosen ones,
S tokens a group, C slots an expert has in a group.
"""
import functools
import inspect
import math
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Type, Union

import torch
from timm.layers import GluMlp, Mlp, register_notrace_module
from torch import nn

from ..errors import InputError, nearest
from ..routing import (
    CosineTopKRouter,
    ExpertChoiceRouter,
    HierarchicalRouter,
    NoisyTopKRouter,
    Routing,
    SigmoidTopKRouter,
    SoftmaxTopKRouter,
    check_num_selected,
    compute_capacity,
    dispatch_padded,
    dispatch_reference,
    dispatch_sorted,
    keep_chosen_by_experts,
    keep_within_capacity,
    record,
)
from ..routing.dispatch import combine_sorted, sort_pairs, wants_static_shapes
from .expert_mlps import ExpertMlps, check_at_least_one, known_losses

ROUTERS = {
    'vmoe': SoftmaxTopKRouter,
    'cosine': CosineTopKRouter,
    'shazeer': NoisyTopKRouter,
    'hierarchical': HierarchicalRouter,
    'sigmoid': SigmoidTopKRouter,
    'expert_choice': ExpertChoiceRouter,
}


@register_notrace_module
class MoEMlp(ExpertMlps):
    """A sparse mixture of MLPs: every token goes through K of E experts, the sum weighted by their gates.

    As in V-MoE (Riquelme et al. 2021, section 2), with its defaults, except that in evaluation nothing is dropped
    unless `eval_capacity_factor` or `capacity` asks for it: then no image depends on another. The batch is cut into
    groups of S consecutive tokens, image by image; capacity, priority and losses are per group. By default a group is
    `group_images` images, and the last one of a batch may be smaller, with its own capacity.

    A token whose choices were all dropped gets zero, so that only the residual connection around the layer passes it.
    With K = 1 the output is scaled by a gate below 1; where a router normalises its gates the value is 1 and the
    gradient that of p / p.detach(). An expert that received no token is not run and gets zero gradients.

    In a padded detection batch, whose context carries the sizes of the images, groups, capacity, statistics and losses
    are those of the tokens on the images alone. Padding still passes through its experts, as through a dense MLP, but
    no expert chooses it.

    With the router 'expert_choice' (Zhou et al. 2022) every expert takes the C tokens of a group that it likes best: K
    is the mean number of experts a token gets, a token may get none or all, and capacity is the choice itself, also in
    evaluation. `group_images=1` then keeps images independent.

    Where shapes must be static (compilation, export, tracing, meta tensors) experts fill padded buffers, whose size is
    the capacity. Without one, as in evaluation by default, every expert then sees every token: E / K times the cost.

    Input and output are (B, ..., D) or, with `use_conv`, (B, D, H, W); float32 routing, whatever the autocast.

    Args:
        in_features: D.
        hidden_features: M times `expert_ratio`; D if None.
        out_features: D if None.
        act_layer: Activation.
        norm_layer: Norm of the hidden layer, one for all experts; None for none.
        bias: Biases of the two layers.
        drop: Dropout after the activation and after the output of an expert.
        use_conv: Tokens are the positions of a (B, D, H, W) map.
        num_experts: E.
        num_selected: K.
        router: 'vmoe' (softmax before top-k), 'cosine' (the same of cosines), 'shazeer' (noisy top-k before softmax),
            'hierarchical' (the same on two levels, with `router_args=dict(num_groups=4, groups_selected=2)`), 'sigmoid'
            (normalised sigmoid gates, choice corrected by a bias that balances the load), 'expert_choice' (see above).
        router_args: Further keywords of that router, for example `dict(renormalise=True)`.
        noise_std: Noise on the logits in training: numerator of the standard deviation `noise_std / E` for 'vmoe',
            'cosine' and 'expert_choice'; for 'shazeer' and 'hierarchical', whose noise is learned, 0 switches it off;
            without meaning for 'sigmoid'.
        losses: Weight of each auxiliary loss by name; None for the router's own, {} for none.
        capacity_factor: Slots an expert has in training, relative to S K / E; None drops nothing, as any factor of
            E / K or more.
        eval_capacity_factor: The same in evaluation (the original used 4.0, which drops nothing either at E=8, K=2);
            with 'expert_choice', None is the factor of training.
        capacity: Slots an expert has in a group, training or not; overrides both factors.
        capacity_multiple_of: A capacity that comes from a factor is raised to a multiple of it.
        capacity_rounding: 'ceil' or 'round', before that.
        batch_priority: Serve tokens by falling gate instead of by position ('expert_choice' always does).
        group_images: Images a group.
        group_size: Tokens a group instead, S; must divide the tokens of every batch.
        num_shared_experts: Experts of the same width that every token uses, unweighted.
        expert_ratio: r times as many experts of a width r times smaller, r times as many chosen: equal MACs.
        same_init: All experts start equal, as in the original.
        bfloat16_dispatch: Round what travels to and from the experts to bfloat16, as the original does on TPUs.
        glu: Gated experts, whose first layer is twice as wide: 'first' or 'last' is the half that goes through the
            activation and gates the other, as in timm's SwiGLU and GluMlp; None for plain ones.

    Raises:
        InputError: K above E, a hidden width that `expert_ratio` does not divide, an unknown router, loss or rounding,
            a capacity or group below 1; in forward, tokens that `group_size` does not divide.
    """

    def __init__(
            self,
            in_features: int,
            hidden_features: Optional[int] = None,
            out_features: Optional[int] = None,
            act_layer: Type[nn.Module] = nn.GELU,
            norm_layer: Optional[Type[nn.Module]] = None,
            bias: Union[bool, Tuple[bool, bool]] = True,
            drop: Union[float, Tuple[float, float]] = 0.,
            use_conv: bool = False,
            num_experts: int = 8,
            num_selected: int = 2,
            router: str = 'vmoe',
            router_args: Optional[Dict[str, Any]] = None,
            noise_std: float = 1.0,
            losses: Optional[Mapping[str, float]] = None,
            capacity_factor: Optional[float] = 1.05,
            eval_capacity_factor: Optional[float] = None,
            capacity: Optional[int] = None,
            capacity_multiple_of: int = 4,
            capacity_rounding: str = 'ceil',
            batch_priority: bool = False,
            group_images: int = 8,
            group_size: Optional[int] = None,
            num_shared_experts: int = 0,
            expert_ratio: int = 1,
            same_init: bool = True,
            bfloat16_dispatch: bool = False,
            glu: Optional[str] = None,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        hidden_features = hidden_features or in_features
        check_at_least_one(capacity=capacity, expert_ratio=expert_ratio)
        _check_positive(capacity_factor=capacity_factor, eval_capacity_factor=eval_capacity_factor)
        check_num_selected(num_selected, num_experts)
        if noise_std < 0 or num_shared_experts < 0:
            raise InputError(f'noise_std={noise_std}, num_shared_experts={num_shared_experts}: use 0 or more for both.')
        if hidden_features % expert_ratio:
            raise InputError(
                f'expert_ratio={expert_ratio} does not divide the hidden width {hidden_features}: use a divisor.')
        if capacity_rounding not in ('ceil', 'round'):
            raise InputError(f"capacity_rounding={capacity_rounding!r}: use 'ceil' or 'round'.")
        super().__init__(
            in_features, hidden_features // expert_ratio, out_features, act_layer, norm_layer, bias, drop, use_conv,
            num_experts * expert_ratio, group_images, group_size, same_init, bfloat16_dispatch, glu, **dd)
        self.num_selected = num_selected * expert_ratio
        self.num_shared_experts = num_shared_experts
        self.by_expert = router == 'expert_choice'
        if self.by_expert and eval_capacity_factor is None:
            eval_capacity_factor = capacity_factor  # there, capacity is the choice itself
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.capacity = capacity
        self.capacity_multiple_of = capacity_multiple_of
        self.capacity_rounding = capacity_rounding
        self.batch_priority = batch_priority

        self.router = create_router(
            router, in_features, self.num_experts, self.num_selected, noise_std, losses, router_args, **dd)
        # n MLPs of width M that all tokens use are one of width n * M.
        mlp = functools.partial(GluMlp, gate_last=glu == 'last') if glu else Mlp
        self.shared = mlp(
            in_features, num_shared_experts * self.hidden_features * (2 if glu else 1), self.out_features,
            act_layer=act_layer, norm_layer=norm_layer, bias=bias, drop=drop, **dd,
        ) if num_shared_experts else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ..., D) to (B, ..., out_features); (B, D, H, W) with `use_conv`."""
        if self.use_conv:
            x = x.permute(0, 2, 3, 1)
        tokens = x.reshape(-1, x.shape[-1])  # (T, D)
        if torch.jit.is_scripting():
            y = self._mix_scripted(tokens, self._group_size(x))
        else:
            y = self._mix(tokens, x)
        if self.shared is not None:
            y = y + self.shared(tokens)
        y = y.reshape(list(x.shape[:-1]) + [y.shape[-1]])
        return y.permute(0, 3, 1, 2) if self.use_conv else y

    def _mix(self, tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        group_size = self._group_size(x)
        self._check_groups(x, tokens.shape[0])
        inside = self._inside(x)
        routing: Routing = self.router(tokens, inside)
        deciding = routing.logits if routing.noisy_logits is None else routing.noisy_logits
        kept = self._keep(routing.indices, deciding, group_size, routing.by_expert, inside)
        if routing.kept is not None:  # a constraint of the router excluded experts
            kept = routing.kept if kept is None else routing.kept & kept
        routing = routing._replace(kept=kept, shape=tuple(x.shape[:-1]), group_size=group_size)
        record(self, routing)
        if self.exchange is not None:
            return dispatch_sorted(tokens, routing, functools.partial(self.exchange.run, run=self.run_experts))
        if not wants_static_shapes(tokens):
            return dispatch_sorted(tokens, routing, self.run_experts)
        if routing.kept is None:
            return dispatch_reference(tokens, routing, self.run_experts)
        return dispatch_padded(tokens, routing, self.run_stacked, self._slots(tokens.shape[0], group_size))

    def _mix_scripted(self, tokens: torch.Tensor, group_size: int) -> torch.Tensor:
        """`_mix` without a record: TorchScript knows no variable-length tuple."""
        logits, _, weights, indices, noisy, _ = self.router.choose(tokens)
        kept = self._keep(indices, logits if noisy is None else noisy, group_size, self.by_expert)
        items, weights, sizes = sort_pairs(indices, weights, kept, self.num_experts)
        outputs = self.run_experts(list(tokens.index_select(0, items).split(sizes)))
        return combine_sorted(outputs, items, weights, tokens.shape[0]).to(tokens.dtype)

    def _capacity(self, num_tokens: int) -> int:
        """C for a group of that many tokens; 0 where nothing is dropped."""
        if self.capacity is not None:
            return self.capacity
        factor: Optional[float] = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None or factor * self.num_selected >= self.num_experts:
            return 0  # an expert has a slot for every token
        return compute_capacity(
            num_tokens, self.num_experts, self.num_selected, factor, self.capacity_multiple_of, self.capacity_rounding)

    def _slots(self, num_tokens: int, group_size: int) -> int:
        """The most tokens an expert gets in all groups together."""
        full, rest = num_tokens // group_size, num_tokens % group_size
        return full * self._slots_of_group(group_size) + (self._slots_of_group(rest) if rest else 0)

    def _slots_of_group(self, size: int) -> int:
        capacity = self._capacity(size)
        return size if capacity == 0 else min(capacity, size)

    def _keep(
            self,
            indices: torch.Tensor,
            deciding: torch.Tensor,
            group_size: int,
            by_expert: bool,
            inside: Optional[torch.Tensor] = None,
    ) -> Optional[torch.Tensor]:
        """(T, K) bool: which pairs find a slot, group by group; None where nothing can be dropped.

        Groups and their capacity are those of the tokens `inside`, (T,) bool, where it is given. Padding needs no slot
        to be computed, as a dense MLP would; experts that choose leave it out.
        """
        num_tokens = indices.shape[0]
        overruled = self.by_expert and not by_expert  # by a record that was rewritten: nothing to choose any more
        if overruled or self._capacity(group_size) == 0 or num_tokens == 0:
            return None
        # The largest gate of the softmax decides the order; with V-MoE's router it is the first choice's weight.
        gates = torch.softmax(deciding.detach(), dim=-1)  # (T, E)
        full = num_tokens // group_size * group_size
        kept: List[torch.Tensor] = []
        if inside is not None:
            found = torch.full(indices.shape, not by_expert, device=indices.device)
            for start in range(0, num_tokens, group_size):
                items = start + inside[start:start + group_size].nonzero().squeeze(1)
                if len(items) > 0:
                    found[items] = self._keep_of_groups(indices[items], gates[items], len(items), by_expert)
            return found
        for start, stop, size in ((0, full, group_size), (full, num_tokens, num_tokens - full)):
            if stop > start:
                kept.append(self._keep_of_groups(indices[start:stop], gates[start:stop], size, by_expert))
        return torch.cat(kept)

    def _keep_of_groups(
            self,
            indices: torch.Tensor,
            gates: torch.Tensor,
            size: int,
            by_expert: bool,
    ) -> torch.Tensor:
        """The same for groups of one size: (T, K) chosen experts and (T, E) gates to (T, K) bool."""
        chosen = indices.reshape(-1, size, indices.shape[1])
        likings = gates.reshape(-1, size, self.num_experts)
        if by_expert:
            found = keep_chosen_by_experts(chosen, likings, self._capacity(size))
        else:
            found = keep_within_capacity(chosen, likings, self.num_experts, self._capacity(size), self.batch_priority)
        return found.reshape(-1, indices.shape[1])

    def max_macs(self, input_shape: Sequence[int]) -> int:
        """Router, K experts and the shared ones for every token; all slots where experts choose. Biases are free."""
        num_tokens = math.prod(input_shape) // self.in_features
        experts = (self._max_pairs(input_shape) + num_tokens * self.num_shared_experts) * self._expert_macs()
        return self.router.macs(num_tokens) + experts

    def spared_macs(self, input_shape: Sequence[int], load: Sequence[float]) -> float:
        """The pairs of token and expert that capacity dropped."""
        num_tokens = math.prod(input_shape) // self.in_features
        return (self._max_pairs(input_shape) - num_tokens * sum(load)) * self._expert_macs()

    def _max_pairs(self, input_shape: Sequence[int]) -> int:
        """Pairs of token and expert without drops."""
        num_tokens = math.prod(input_shape) // self.in_features
        if not self.by_expert:
            return num_tokens * self.num_selected
        group_size = self.group_size or self.group_images * (num_tokens // input_shape[0])
        return self.num_experts * self._slots(num_tokens, group_size)

    def extra_repr(self) -> str:
        return (
            f'num_experts={self.num_experts}, num_selected={self.num_selected}, '
            f'capacity_factor={self.capacity_factor}, eval_capacity_factor={self.eval_capacity_factor}, '
            f'batch_priority={self.batch_priority}, {self._group_repr()}')


def create_router(
        name: str,
        in_features: int,
        num_experts: int,
        num_selected: int,
        noise_std: float = 1.0,
        losses: Optional[Mapping[str, float]] = None,
        router_args: Optional[Dict[str, Any]] = None,
        device=None,
        dtype=None,
) -> nn.Module:
    """A router that chooses K of E experts, by name; see `MoEMlp`.

    Raises:
        InputError: The router, one of the losses or a keyword of the router is unknown.
    """
    if name not in ROUTERS:
        raise InputError(f'router={name!r} is unknown.{nearest(name, ROUTERS)} Known: {", ".join(ROUTERS)}.')
    args: Dict[str, Any] = dict(router_args or {})
    sizes = [in_features, num_experts, num_selected]
    if name == 'expert_choice':
        sizes.pop()  # every token is offered to every expert
    if name in ('vmoe', 'cosine', 'expert_choice'):
        args.setdefault('noise_std', noise_std)
    elif name in ('shazeer', 'hierarchical'):
        args.setdefault('noise', noise_std != 0)
    if losses is not None:
        args['losses'] = known_losses(losses)
    known = list(inspect.signature(ROUTERS[name]).parameters)[len(sizes):-2]
    for keyword in args:
        if keyword not in known:
            raise InputError(
                f'router_args has {keyword!r}.{nearest(keyword, known)} Known to {name!r}: {", ".join(known)}.')
    return ROUTERS[name](*sizes, device=device, dtype=dtype, **args)


def _check_positive(**values: Optional[float]) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            raise InputError(f'{name}={value}: use a number above 0, or None to drop nothing.')
