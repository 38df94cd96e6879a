"""Two levels of noisy top-k: groups of experts first, then experts within the chosen groups (Shazeer et al. 2017, B).

Letters: T routed items, D features, E experts in A groups of N, K chosen experts: L in each of K / L chosen groups.
"""
import math
import numbers
from typing import Optional, Sequence, Tuple

import torch
from torch.nn import functional as F

from ..errors import InputError
from .dispatch import wants_static_shapes
from .routers import Choice, NoisyTopKRouter, choice_probability, linear_float32, softmax_of_chosen, top_k
from .types import Routing

# A choice, and the choice probabilities (T, E) and (T, A) of both levels, empty without noise.
Decision = Tuple[Choice, torch.Tensor, torch.Tensor]


class HierarchicalRouter(NoisyTopKRouter):
    """G_ij = G_primary_i G_i_j: a noisy top-k gate over the groups, and one in each of them over its experts.

    The gate of a group runs on the items that chose the group alone. Experts are numbered group by group. In the record
    the gates are the products, so that the importance loss counts pairs of group and expert; the logit of an expert is
    that of its group plus the logarithm of the softmax within it, which is taken as even where the gate of the group
    did not run; and `group_chances`, `chances` are what the load loss is made of.

    Args:
        num_experts: E.
        num_selected: K.
        num_groups: A; divides E.
        groups_selected: K / L; divides K.
        noise, noise_epsilon, zero_init: Of both levels, as in `NoisyTopKRouter`.

    Raises:
        InputError: Groups that do not divide the experts, or more chosen than there are.
    """

    def __init__(
            self,
            in_features: int,
            num_experts: int,
            num_selected: int = 4,
            num_groups: int = 4,
            groups_selected: int = 2,
            noise: bool = True,
            noise_epsilon: float = 1e-2,
            zero_init: Optional[bool] = None,
            losses: Sequence[Tuple[str, float]] = (('importance', 0.1), ('load', 0.1)),
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        for name, value in (('num_groups', num_groups), ('groups_selected', groups_selected)):
            if not isinstance(value, numbers.Integral) or value < 1:
                raise InputError(f'{name}={value!r}: use a whole number of 1 or more.')
        super().__init__(
            in_features, num_experts, num_selected, noise, noise_epsilon, zero_init, losses, **dd)
        if num_experts % num_groups:
            raise InputError(f'num_groups={num_groups} does not divide num_experts={num_experts}: use a divisor.')
        self.num_groups = num_groups
        self.group_experts = num_experts // num_groups  # N
        self.selected_in_group = num_selected // groups_selected  # L
        if num_selected % groups_selected or self.selected_in_group > self.group_experts:
            raise InputError(
                f'num_selected={num_selected} from groups_selected={groups_selected} groups of {self.group_experts} '
                f'experts: choose equally many from each, 1 to {self.group_experts}.')
        self.groups = NoisyTopKRouter(
            in_features, num_groups, groups_selected, noise, noise_epsilon, zero_init, losses=(), **dd)

    def choose(self, x: torch.Tensor) -> Choice:
        return self.decide(x)[0]

    @torch.jit.ignore
    def forward(self, x: torch.Tensor, inside: Optional[torch.Tensor] = None) -> Routing:
        """x: (T, D), inside: (T,) bool or None. Returns a record with (T, K) weights."""
        (logits, gates, weights, indices, noisy, _), chances, group_chances = self.decide(x)
        routing = Routing(
            logits, gates, weights, indices, noisy_logits=noisy, shape=(x.shape[0],), losses=self.losses,
            inside=inside)
        return routing if noisy is None else routing._replace(chances=chances, group_chances=group_chances)

    def decide(self, x: torch.Tensor) -> Decision:
        """Both levels; x: (T, D)."""
        group_logits, _, group_weights, groups, group_noisy, group_std = self.groups.choose(x)
        logits = self._of_groups(x, groups, self.weight)  # (T, K / L, N)
        deciding = logits
        noisy: Optional[torch.Tensor] = None
        chances, group_chances = logits.new_empty(0), logits.new_empty(0)
        noise_weight = self.noise_weight
        if noise_weight is not None and group_noisy is not None and group_std is not None:
            std = F.softplus(self._of_groups(x, groups, noise_weight)) + self.noise_epsilon
            deciding = logits + self.sample_noise(logits) * std
            chance = choice_probability(logits, deciding, std, self.selected_in_group)
            chances = self._spread(groups, chance, 0.)
            group_chances = choice_probability(group_logits, group_noisy, group_std, groups.shape[1])
            noisy = self._joint(group_noisy, groups, deciding)
        chosen = top_k(deciding, self.selected_in_group)[1]  # (T, K / L, L)
        weights = group_weights.unsqueeze(-1) * softmax_of_chosen(deciding, chosen)
        weights, order = top_k(weights.flatten(1), self.num_selected)
        indices = (groups.unsqueeze(-1) * self.group_experts + chosen).flatten(1).gather(1, order)
        joint = self._joint(group_logits, groups, logits)
        gates = torch.zeros_like(joint).scatter(1, indices, weights)
        # The noise of two levels has no single deviation.
        return (joint, gates, weights, indices, noisy, None), chances, group_chances

    def _of_groups(self, x: torch.Tensor, groups: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The (E, D) map of a level, for the (T, K / L) groups of every item only: (T, K / L, N) in float32."""
        if torch.jit.is_scripting():
            return self._of_all_groups(x, groups, weight)
        else:
            if wants_static_shapes(x):
                return self._of_all_groups(x, groups, weight)
            order = torch.argsort(groups.flatten(), stable=True)  # pairs of item and group, by group
            sizes = torch.bincount(groups.flatten(), minlength=self.num_groups).tolist()
            chunks = x.index_select(0, order // groups.shape[1]).split(sizes)
            maps = weight.view(self.num_groups, self.group_experts, -1).unbind(0)
            rows = torch.cat([linear_float32(chunk, each) for chunk, each in zip(chunks, maps)])
            return rows[order.argsort()].view(*groups.shape, self.group_experts)

    def _of_all_groups(self, x: torch.Tensor, groups: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The same by the maps of all groups, whose shapes are static."""
        rows = linear_float32(x, weight).view(-1, self.num_groups, self.group_experts)
        return rows.gather(1, groups.unsqueeze(-1).expand(-1, -1, self.group_experts))

    def _joint(self, group_logits: torch.Tensor, groups: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """(T, A) and (T, K / L, N) logits to (T, E)."""
        even = -math.log(self.group_experts)
        inside = torch.log_softmax(logits, dim=-1)
        return group_logits.repeat_interleave(self.group_experts, dim=1) + self._spread(groups, inside, even)

    def _spread(self, groups: torch.Tensor, values: torch.Tensor, rest: float) -> torch.Tensor:
        """(T, K / L, N) values of the chosen groups to (T, E), with `rest` for the other groups."""
        full = values.new_full([values.shape[0], self.num_groups, self.group_experts], rest)
        return full.scatter(1, groups.unsqueeze(-1).expand_as(values), values).flatten(1)

    def macs(self, num_items: int) -> int:
        """MACs of the decision for `num_items` items: the gate of the groups, and those of the chosen groups."""
        chosen = self.num_selected // self.selected_in_group
        return num_items * self.in_features * (self.num_groups + chosen * self.group_experts)

    def extra_repr(self) -> str:
        return f'{super().extra_repr()}, num_groups={self.num_groups}, selected_in_group={self.selected_in_group}'
