"""`LocalExperts`: the first mixture of experts, every expert on every input, blended by a gate that may see more.

Adaptive Mixtures of Local Experts, Jacobs, Jordan, Nowlan and Hinton, Neural Computation 3(1), 1991; Evaluation of
Adaptive Mixtures of Competing Experts, Nowlan and Hinton, NIPS 3, 1990.

Letters: B images or cases, D input width, O output width, F width of what the gate sees, T items (B and all further
axes but the last), E experts.
"""
import math
from typing import Callable, List, Optional, Sequence, Tuple

import torch
from torch import nn

from ..errors import InputError
from ..routing import Routing, SoftmaxRouter, record
from .routed import RoutedLayer


class LocalExperts(RoutedLayer):
    """y = sum_i p_i o_i: E experts on the same input, p the softmax of a gating network with an input of its own.

    The losses of the paper want every expert's own output (`moe_zoo.losses.mixture_loss` and its relatives):

    >>> layer = LocalExperts(2, 4, num_experts=4, gate_features=5)
    >>> outputs, routing = layer.forward_experts(formants, torch.cat([formants, speaker], dim=1))
    >>> loss = mixture_loss(outputs, routing.logits, target)

    Args:
        in_features: D.
        out_features: O.
        num_experts: E.
        expert: Makes one expert, called with `in_features`, `out_features`, `device` and `dtype` by name.
        act_layer: Makes the last activation of all experts, for example `partial(nn.Softmax, dim=-1)`; None for none.
        gate_features: F; None where the gate sees what the experts see.
        gate_hidden_features: Units of a hidden layer of the gate; None for a linear one.

    Raises:
        InputError: No expert; in forward, a gate input whose width or number of items does not fit.
    """

    def __init__(
            self,
            in_features: int,
            out_features: int,
            num_experts: int = 4,
            expert: Callable[..., nn.Module] = nn.Linear,
            act_layer: Optional[Callable[[], nn.Module]] = None,
            gate_features: Optional[int] = None,
            gate_hidden_features: Optional[int] = None,
            losses: Sequence[Tuple[str, float]] = (),
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.in_features = in_features
        self.out_features = out_features
        self.gate_features = gate_features or in_features
        self.num_experts = num_experts
        self.num_selected = num_experts
        self.router = SoftmaxRouter(
            self.gate_features, num_experts, hidden_features=gate_hidden_features, losses=losses, **dd)
        self.experts = nn.ModuleList(
            expert(in_features=in_features, out_features=out_features, **dd) for _ in range(num_experts))
        self.act = nn.Identity() if act_layer is None else act_layer()

    def forward(self, x: torch.Tensor, gate_input: Optional[torch.Tensor] = None) -> torch.Tensor:
        """(B, ..., D) to (B, ..., O). Arguments are those of `forward_experts`."""
        outputs, routing = self.forward_experts(x, gate_input)
        y = (routing.weights.unsqueeze(-1) * outputs).sum(dim=1)
        return y.to(outputs.dtype).reshape(*x.shape[:-1], -1)

    def forward_experts(
            self,
            x: torch.Tensor,
            gate_input: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Routing]:
        """What every expert says, and how the gate weighs it.

        Args:
            x: (B, ..., D).
            gate_input: (B, ..., F); None where it is x.

        Returns:
            (T, E, O) outputs, and the record, whose logits and weights are (T, E).
        """
        seen = x if gate_input is None else gate_input
        if seen.shape[-1] != self.gate_features or seen.shape[:-1] != x.shape[:-1]:
            raise InputError(
                f'gate_input: the gate sees shape {tuple(seen.shape)}, and for {tuple(x.shape)} it wants '
                f'{(*x.shape[:-1], self.gate_features)}.')
        routing: Routing = self.router(seen.reshape(-1, self.gate_features))._replace(shape=tuple(x.shape[:-1]))
        record(self, routing)
        items = x.reshape(-1, self.in_features)
        return self.act(torch.stack([expert(items) for expert in self.experts], dim=1)), routing

    def expert_parameters(self) -> List[List[nn.Parameter]]:
        return [list(group) for group in zip(*(expert.parameters() for expert in self.experts))]

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        """The gate and the linear layers of every expert, for every item; what else an expert is made of is free."""
        items = math.prod(input_shape[:-1])
        experts = sum(m.weight.numel() for m in self.experts.modules() if isinstance(m, nn.Linear))
        return self.router.macs(items) + items * experts

    def extra_repr(self) -> str:
        return f'{self.in_features}, {self.out_features}, gate_features={self.gate_features}'
