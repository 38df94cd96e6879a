"""The record of one routing decision.

Letters: T routed items (images, tokens, map positions; flattened), E experts, K chosen experts an item.
"""
from typing import NamedTuple, Optional, Tuple

import torch


class Routing(NamedTuple):
    """What a router decided for T items: the one currency between layers, losses, analysis and cost counting.

    A named tuple: immutable, and a pytree, so that gradient checkpointing, DDP and torch.compile see its tensors.
    All floating-point fields are float32, whatever the autocast.

    Attributes:
        logits: (T, E) router logits without noise.
        gates: (T, E) the gate vector that the importance loss sums: softmax of the clean logits (V-MoE), the sparse
            gates after noise and top-k (Shazeer), the sigmoids or softmax that mix the kernels (CondConv).
        weights: combine weights, (T, K) beside `indices`, or (T, E) where every expert is mixed.
        indices: (T, K) chosen experts, best first; None where every expert is mixed.
        kept: (T, K) bool, False where capacity dropped the pair; None where nothing can be dropped.
        noisy_logits: (T, E) the logits that decided, where noise was added; else None.
        noise_std: () or (T, E) standard deviation of that noise; None without, and where noise is of two levels.
        shape: Shape of the items before flattening: (B,) one decision an image, (B, N) tokens, (B, H, W) positions.
        group_size: Items a group, in order, the last group may be shorter; None is one group.
        losses: (name, weight) pairs of the auxiliary losses that the layer asks for; see `moe_zoo.losses.LOSSES`.
        by_expert: Experts chose items, not items experts (Expert Choice): K = E, `kept` are the pairs that were chosen,
            and an item is dropped where no expert took it.
        slot_logits: (T, E, P) logits of every slot, where an expert reads P mixtures of the items of a group instead of
            items (Soft MoE); their log-sum-exp over P is `logits`. Else None.
        affinity: (E, E) how much two experts tell the same, from 0 to 1, where the layer knows it (SituationalFusion).
            Here because a loss is a function of the record alone, and a tensor field travels as all others do.
        chances: (T, E) where experts are chosen on two levels with noise: probability that an expert is chosen in its
            group if only its own noise is drawn again, zero in groups that the item did not choose. Else None.
        group_chances: (T, A) the same for the A groups.
        inside: (T,) bool, False for tokens that lie on the padding of their image: they are computed, but take no slot
            and count in no statistic and no loss. None where nothing is padded.
        levels: L where the items are the levels of a feature pyramid, finest first, image by image: shape is (B, L).
            0 where they are anything else.
    """
    logits: torch.Tensor
    gates: torch.Tensor
    weights: torch.Tensor
    indices: Optional[torch.Tensor] = None
    kept: Optional[torch.Tensor] = None
    noisy_logits: Optional[torch.Tensor] = None
    noise_std: Optional[torch.Tensor] = None
    shape: Tuple[int, ...] = ()
    group_size: Optional[int] = None
    losses: Tuple[Tuple[str, float], ...] = ()
    by_expert: bool = False
    slot_logits: Optional[torch.Tensor] = None
    affinity: Optional[torch.Tensor] = None
    chances: Optional[torch.Tensor] = None
    group_chances: Optional[torch.Tensor] = None
    inside: Optional[torch.Tensor] = None
    levels: int = 0

    @property
    def num_experts(self) -> int:
        return self.logits.shape[-1]

    def combine_matrix(self) -> torch.Tensor:
        """(T, E) weight of every expert for every item; zero where not chosen or dropped."""
        if self.indices is None:
            return self.weights
        weights = self.weights if self.kept is None else self.weights * self.kept
        return torch.zeros_like(self.logits).scatter(1, self.indices, weights.to(self.logits.dtype))

    def dropped(self) -> torch.Tensor:
        """Share of the choices that found no slot; where experts choose, share of the items that none of them took."""
        kept = self.without_padding().kept
        if kept is None:
            return self.logits.new_zeros(())
        kept = kept.any(dim=1) if self.by_expert else kept
        return 1.0 - kept.float().mean()

    def without_padding(self) -> 'Routing':
        """The record of the items that count, as one flat group of them; itself where nothing is padded."""
        if self.inside is None:
            return self
        items = len(self.inside)
        fields = (f[self.inside] if isinstance(f, torch.Tensor) and f.dim() and len(f) == items else f for f in self)
        return Routing(*fields)._replace(inside=None, shape=(int(self.inside.sum()),), group_size=None)

    def detach(self) -> 'Routing':
        """The same record without its graph."""
        return Routing(*(f.detach() if isinstance(f, torch.Tensor) else f for f in self))
