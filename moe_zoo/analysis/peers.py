"""Token layers of others beside ours: same sizes and, as far as they have them, the same weights.

`tools/setup.sh --bench` installs them; nothing else needs them. What they compute, and where it is what ours does:

| package | choice | full experts | equals |
| --- | --- | --- | --- |
| pytorch-mixtures | top-k, then softmax | none: nothing is dropped | `MoEMlp(router='shazeer', noise_std=0)` |
| mixture-of-experts | softmax, top-2 | drop, image by image | `MoEMlp(router_args=dict(renormalise=True))`, no bias |
| st-moe-pytorch | softmax, top-k, k > 1 | drop, image by image | the same, with a bias |
| soft-moe-pytorch | every slot a mixture | none | - (it norms the tokens) |

Letters: D width, E experts, K chosen experts, S tokens an image.
"""
import warnings
from collections.abc import Callable

import torch
from torch import nn

from ..layers import MoEMlp, SoftMoEMlp


class _FirstOutput(nn.Module):
    """A layer that returns losses besides, without them."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


def pytorch_mixtures(ours: MoEMlp) -> nn.Module:
    from pytorch_mixtures import MoEConfig, TopkMoE
    layer = TopkMoE(MoEConfig(
        ours.in_features, ours.hidden_features, ours.num_experts, expert_fn='ff', expert_act='gelu', router_fn='topk',
        capacity_factor=None, topk=ours.num_selected, dtype=torch.float32))
    with torch.no_grad():
        layer.weight.copy_(ours.router.weight.t())
    _copy_experts(ours, [(expert.up, expert.down) for expert in layer.experts])
    return layer


def mixture_of_experts(ours: MoEMlp) -> nn.Module:
    """With K = 1 it looks for a second expert too, and leaves it out."""
    from mixture_of_experts import MoE
    policy = 'all' if ours.num_selected == 2 else 'none'
    layer = MoE(
        ours.in_features, ours.num_experts, ours.hidden_features, nn.GELU,
        second_policy_train=policy, second_policy_eval=policy,
        capacity_factor_train=ours.num_selected, capacity_factor_eval=ours.num_selected)
    with torch.no_grad():
        layer.gate.w_gating.copy_(ours.router.weight.t())
        layer.experts.w1.copy_(ours.fc1.weight.transpose(1, 2))
        layer.experts.w2.copy_(ours.fc2.weight.transpose(1, 2))
    return _FirstOutput(layer)


def st_moe_pytorch(ours: MoEMlp) -> nn.Module:
    """Threshold 0: no choice is left out at random."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of its type hints
        from st_moe_pytorch import MoE
    D, M = ours.in_features, ours.hidden_features
    experts = nn.ModuleList(
        nn.Sequential(nn.Linear(D, M), nn.GELU(), nn.Linear(M, D)) for _ in range(ours.num_experts))
    layer = MoE(
        D, ours.num_experts, gating_top_n=ours.num_selected, experts=experts, threshold_train=0., threshold_eval=0.,
        capacity_factor_train=float(ours.num_selected), capacity_factor_eval=float(ours.num_selected))
    with torch.no_grad():
        layer.gate.to_gates.weight.copy_(ours.router.weight)
    _copy_experts(ours, [(expert[0], expert[2]) for expert in experts])
    return _FirstOutput(layer)


def soft_moe_pytorch(ours: SoftMoEMlp) -> nn.Module:
    from soft_moe_pytorch import SoftMoE
    layer = SoftMoE(
        ours.in_features, num_experts=ours.num_experts, num_slots=ours.num_slots,
        expert_mult=ours.hidden_features // ours.in_features)
    _copy_experts(ours, [(expert[0], expert[3]) for expert in layer.experts.experts])
    return layer


PEERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    'pytorch-mixtures': pytorch_mixtures,
    'mixture-of-experts': mixture_of_experts,
    'st-moe-pytorch': st_moe_pytorch,
    'soft-moe-pytorch': soft_moe_pytorch,
}


def make_peer(name: str, ours: nn.Module) -> nn.Module | None:
    """A layer of another package with the sizes and weights of ours; None where the package is not installed."""
    try:
        return PEERS[name](ours)
    except ImportError:
        return None


@torch.no_grad()
def _copy_experts(ours: MoEMlp | SoftMoEMlp, theirs: list[tuple[nn.Linear, nn.Linear]]) -> None:
    for e, layers in enumerate(theirs):
        for stack, linear in zip((ours.fc1, ours.fc2), layers):
            linear.weight.copy_(stack.weight[e])
            linear.bias.copy_(torch.zeros(()) if stack.bias is None else stack.bias[e])
