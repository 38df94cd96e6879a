"""`SoftMoEMlp`: the feed-forward layer of Soft MoE, drop-in for timm's `Mlp`.

Letters: B images, D width, T routed tokens (of the whole batch), E experts, G groups, S tokens a group, P slots an
expert has in a group.
"""
import math
from typing import List, Mapping, Optional, Sequence, Tuple, Type, Union

import torch
from timm.layers import register_notrace_module
from torch import nn

from ..routing import Routing, SoftRouter, check_num_selected, record
from .expert_mlps import ExpertMlps, check_at_least_one, known_losses


@register_notrace_module
class SoftMoEMlp(ExpertMlps):
    """A soft mixture of MLPs: every slot of an expert reads a mixture of all tokens of a group, every token a mixture
    of all slots (Soft MoE, Puigcerver et al. 2023, section 2).

    Nothing is chosen and nothing is dropped; the cost is that of E P slots a group. A group is one image, so that no
    image depends on another. The record has the weight of every expert for every token; `slot_logits` tells the rest.

    Both mixtures are matrix products in the type of the tokens or of the autocast; their weights are float32.

    Args:
        num_experts: E.
        num_slots: P, slots an expert has in a group.
        losses: Weight of each auxiliary loss by name; the paper has none.
        group_size: Tokens a group, S, instead of an image's; must divide the tokens of every batch.
        same_init: All experts start equal, as in V-MoE's code.
        bfloat16_dispatch: Round what travels to and from the experts to bfloat16, as the original does.

    The others are those of `MoEMlp`.

    Raises:
        InputError: No expert or no slot, an unknown loss; in forward, tokens that `group_size` does not divide.
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
            num_experts: int = 128,
            num_slots: int = 1,
            losses: Optional[Mapping[str, float]] = None,
            group_size: Optional[int] = None,
            same_init: bool = True,
            bfloat16_dispatch: bool = False,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        check_num_selected(num_experts, num_experts)
        check_at_least_one(num_slots=num_slots)
        super().__init__(
            in_features, hidden_features or in_features, out_features, act_layer, norm_layer, bias, drop, use_conv,
            num_experts, 1, group_size, same_init, bfloat16_dispatch, **dd)
        self.num_selected = num_experts
        self.num_slots = num_slots
        self.router = SoftRouter(in_features, num_experts, num_slots, known_losses(losses or {}), **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ..., D) to (B, ..., out_features); (B, D, H, W) with `use_conv`."""
        if self.use_conv:
            x = x.permute(0, 2, 3, 1)
        tokens = x.reshape(-1, x.shape[-1])  # (T, D)
        group_size = self._group_size(x)
        if torch.jit.is_scripting():
            slot_logits, _, weights = self.router.mix(tokens)
            y = self._mix(tokens, slot_logits, weights, group_size)
        else:
            self._check_groups(x, tokens.shape[0])
            inside = self._inside(x)
            routing: Routing = self.router(tokens)._replace(
                shape=tuple(x.shape[:-1]), group_size=group_size, inside=inside)
            record(self, routing)
            y = self._mix(tokens, routing.slot_logits, routing.weights, group_size, inside)
        y = y.reshape(list(x.shape[:-1]) + [y.shape[-1]])
        return y.permute(0, 3, 1, 2) if self.use_conv else y

    def _mix(
            self,
            tokens: torch.Tensor,
            slot_logits: torch.Tensor,
            weights: torch.Tensor,
            group_size: int,
            inside: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """(T, D) tokens, (T, E, P) slot logits and (T, E) weights of the experts to (T, out_features).

        Slots read the tokens `inside`, (T,) bool, where it is given; all tokens read the slots.
        """
        E, P, S = self.num_experts, self.num_slots, group_size
        G = tokens.shape[0] // S
        reading = slot_logits
        if inside is not None:
            reading = reading.masked_fill(~inside.view(-1, 1, 1), -1e30)  # finite: a group may be padding alone
        dispatch = torch.softmax(reading.reshape(G, S, E * P), dim=1).to(tokens.dtype)
        x = torch.bmm(dispatch.transpose(1, 2), self._round(tokens).reshape(G, S, self.in_features))
        x = x.reshape(G, E, P, self.in_features).transpose(0, 1).reshape(E, G * P, self.in_features)
        if self.exchange is None:
            y = self.run_stacked(x)
        else:
            y = torch.stack(self.exchange.run(list(x.unbind(0)), self._run_chunks))
        y = y.reshape(E, G, P, self.out_features).transpose(0, 1).reshape(G, E * P, self.out_features)
        # The softmax over all slots is that over the experts times that over the slots of each.
        combine = (weights.unsqueeze(-1) * torch.softmax(slot_logits, dim=-1)).reshape(G, S, E * P).to(y.dtype)
        return torch.bmm(combine, y).flatten(0, 1).to(tokens.dtype)

    @torch.jit.unused
    def _run_chunks(self, chunks: List[torch.Tensor]) -> List[torch.Tensor]:
        """One tensor (C, D) an expert, all of one length, to one (C, out_features) each."""
        return list(self.run_stacked(torch.stack(chunks)).unbind(0))

    def max_macs(self, input_shape: Sequence[int]) -> int:
        """Slot logits, both mixtures, and every slot of every group through its expert; biases are free."""
        num_tokens = math.prod(input_shape) // self.in_features
        group_size = self.group_size or num_tokens // input_shape[0]
        slots = self.num_experts * self.num_slots
        mixtures = num_tokens * slots * (self.in_features + self.out_features)
        experts = num_tokens // group_size * slots * self._expert_macs()
        return self.router.macs(num_tokens) + mixtures + experts

    def extra_repr(self) -> str:
        return f'num_experts={self.num_experts}, num_slots={self.num_slots}, {self._group_repr()}'
