"""Routers that decide from the experts' side: experts choose items, or read mixtures of all of them.

Letters: T routed items, D features, E experts, P slots an expert has in a group.

| router | what an expert gets | source |
| --- | --- | --- |
| `ExpertChoiceRouter` | the items of a group that it likes best | Zhou et al. 2022, in V-MoE's code |
| `SoftRouter` | P mixtures of all items of a group | Soft MoE, Puigcerver et al. 2023 |
"""
import math
from typing import Optional, Sequence, Tuple

import torch
from torch import nn

from .routers import Losses, SoftmaxTopKRouter, linear_float32
from .types import Routing


class ExpertChoiceRouter(SoftmaxTopKRouter):
    """Softmax over all experts, then every expert takes the items of largest gate (Zhou et al. 2022, section 3).

    The gates, and the noise in training, are those of `SoftmaxTopKRouter`; the noisy gates choose and weigh. The record
    offers every item to every expert, best first. Which pairs are taken depends on the group and its capacity, which
    the layer knows: it sets `kept`. Loads are equal by construction, so that no loss is needed.

    Args:
        noise_std: Numerator of the noise's standard deviation `noise_std / E`; 0 switches it off.
        deterministic: True never adds noise, False adds it in evaluation too; None follows the training mode.
    """

    def __init__(
            self,
            in_features: int,
            num_experts: int,
            noise_std: float = 1.0,
            deterministic: Optional[bool] = None,
            losses: Sequence[Tuple[str, float]] = (),
            device=None,
            dtype=None,
    ):
        super().__init__(
            in_features, num_experts, num_experts, noise_std, deterministic=deterministic, losses=losses,
            device=device, dtype=dtype)

    @torch.jit.ignore
    def forward(self, x: torch.Tensor, inside: Optional[torch.Tensor] = None) -> Routing:
        """x: (T, D), inside: (T,) bool. Returns a record with (T, E) weights, in which nothing is chosen yet."""
        return super().forward(x, inside)._replace(by_expert=True)


class SoftRouter(nn.Module):
    """Soft MoE's router: every slot reads a mixture of items, every item a mixture of slots (Puigcerver et al. 2023).

    The logit of an item and a slot is scale * cos(x, mu_ep), up to 1e-6 under the roots. A softmax over the items of a
    group mixes them into slots; one over all E P slots mixes what comes back. In the record, the logit of an expert is
    the log-sum-exp of its slots, so that its gate, the softmax over experts, is the weight of its slots together.

    Args:
        num_slots: P.
        losses: (name, weight) pairs written into the record; the paper needs none.
    """

    def __init__(
            self,
            in_features: int,
            num_experts: int,
            num_slots: int = 1,
            losses: Sequence[Tuple[str, float]] = (),
            device=None,
            dtype=None,
    ):
        super().__init__()
        self.in_features = in_features
        self.num_experts = num_experts
        self.num_slots = num_slots
        self.losses: Losses = tuple((str(name), float(weight)) for name, weight in losses if weight)
        self.mu = nn.Parameter(torch.empty(num_experts, num_slots, in_features, device=device, dtype=dtype))
        self.scale = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random directions (their length does not count), scale 1."""
        nn.init.normal_(self.mu, std=1.0 / math.sqrt(self.in_features))
        nn.init.ones_(self.scale)

    def mix(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x: (T, D). Returns (T, E, P) slot logits, and (T, E) logits and gates of the experts."""
        mu = _unit(self.mu.float()) * self.scale.float()
        slot_logits = linear_float32(_unit(x.float()), mu.flatten(0, 1)).unflatten(1, (self.num_experts, -1))
        logits = torch.logsumexp(slot_logits, dim=-1)
        return slot_logits, logits, torch.softmax(logits, dim=-1)

    @torch.jit.ignore
    def forward(self, x: torch.Tensor) -> Routing:
        """x: (T, D). Returns a record with (T, E) weights."""
        slot_logits, logits, gates = self.mix(x)
        return Routing(logits, gates, gates, shape=(x.shape[0],), losses=self.losses, slot_logits=slot_logits)

    def macs(self, num_items: int) -> int:
        """MACs of the decision for `num_items` items."""
        return num_items * self.in_features * self.num_experts * self.num_slots

    def extra_repr(self) -> str:
        return f'{self.in_features}, num_experts={self.num_experts}, num_slots={self.num_slots}'


def _unit(x: torch.Tensor) -> torch.Tensor:
    """To length one, as the original: the smallest squared length is 1e-6."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)
