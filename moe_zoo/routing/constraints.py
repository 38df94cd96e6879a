"""What keeps experts in use without a loss: a state that a top-k router carries from step to step.

Two hard constraints exclude experts that had more than their share (Pavlitska et al. 2022, arXiv 2204.10598), and one
selection bias makes idle experts more likely to be chosen (Wang et al. 2024, arXiv 2408.15664). All work in training
only. The forward counts, `end_step` moves the state, once an optimiser step and over all ranks: within a step every
forward decides alike, and a count that gradient checkpointing doubles changes nothing, because shares and signs are all
that is read from it.

Letters: T routed items, E experts, K chosen experts.
"""
from typing import Dict, Optional, Tuple, Type

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from ..errors import InputError, nearest


class StepConstraint(nn.Module):
    """A state moved against the use of the experts.

    Args:
        num_experts: E.
        value: What the subclass calls threshold or rate; None is its default.
    """
    default_value: float
    excludes: bool = False  # whether an item may be left with fewer than K experts

    def __init__(self, num_experts: int, value: Optional[float] = None, device=None):
        super().__init__()
        self.num_experts = num_experts
        self.value = float(self.default_value if value is None else value)

    def decide(self, logits: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """(T, E) logits to those that weigh the experts, and to the scores whose K largest are chosen."""
        raise NotImplementedError

    def observe(self, indices: torch.Tensor, gates: torch.Tensor) -> None:
        """Count what was decided in training: (T, K) chosen experts, (T, E) gates."""
        raise NotImplementedError

    def end_step(self) -> None:
        """Move the state by what was counted since the last call, and start counting anew."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()

    def extra_repr(self) -> str:
        return f'{self.value:g}'


class RelativeImportance(StepConstraint):
    """Exclude expert i while R_i > m, with R_i the sum over all steps of (I_i - mean I) / mean I: nothing is forgotten.

    I_i is the importance of the expert, the sum of its gates over the items of a step. An excluded expert's logit is
    -inf, before the choice and the softmax: its weight is 0 and its R_i falls by 1 a step until the others caught up.
    Where fewer than K experts are left, an item uses those. The R_i sum to zero, so that for m >= 0 one is always left;
    the least used expert is never excluded, whatever m and rounding.

    The value is the threshold m (0.5 in the authors' analysed runs).
    """
    default_value = 0.5
    excludes = True

    def __init__(self, num_experts: int, value: Optional[float] = None, device=None):
        super().__init__(num_experts, value, device)
        # float32 and integers whatever the model's dtype: small steps of a large sum vanish in bfloat16.
        self.register_buffer('excess', torch.zeros(num_experts, device=device, dtype=torch.float32))
        self.register_buffer('importance', torch.zeros(num_experts, device=device, dtype=torch.float32))
        self.register_buffer('steps', torch.zeros((), device=device, dtype=torch.int64))

    def excluded(self) -> torch.Tensor:
        """(E,) bool: the experts that the next training step leaves out."""
        return (self.excess > self.value) & (self.excess > self.excess.min())

    def decide(self, logits: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        if self.training:
            logits = logits.masked_fill(self.excluded(), float('-inf'))
        return logits, logits

    def observe(self, indices: torch.Tensor, gates: torch.Tensor) -> None:
        with torch.no_grad():
            self.importance.copy_(self.importance + gates.detach().sum(dim=0))

    def move(self, share: torch.Tensor) -> torch.Tensor:
        """(E,) shares of the importance of a step to the step of `excess`: (I_i - mean I) / mean I."""
        return share * self.num_experts - 1

    @torch.no_grad()
    def end_step(self) -> None:
        total = _sum_over_ranks(self.importance).float().sum()
        if total > 0:
            self.steps += 1
            self.excess += self.move(self.importance.float() / total).to(self.excess.dtype)
        self.importance.zero_()


class MeanImportance(RelativeImportance):
    """Exclude expert i while A_i - 1/E > m, with A_i the mean over all steps of its share of the importance, I_i / T.

    As `RelativeImportance` otherwise; `excess` is A_i - 1/E. The value is the threshold m (0.3 in the authors' analysed
    runs).
    """
    default_value = 0.3

    def move(self, share: torch.Tensor) -> torch.Tensor:
        """The step of a running mean of I_i / T - 1/E."""
        return (share - 1 / self.num_experts - self.excess) / self.steps


class SelectionBias(StepConstraint):
    """A bias on the scores that choose, not on the weights: it moves by a fixed rate against the load of every step.

    Up for experts below the mean load, down for those above (auxiliary-loss-free balancing, algorithm 1). The scores
    are gates between 0 and 1, a softmax over all experts unless the router brings its own. The bias stays at work in
    evaluation, where it does not move. The value is the rate.
    """
    default_value = 1e-3

    def __init__(self, num_experts: int, value: Optional[float] = None, device=None):
        super().__init__(num_experts, value, device)
        self.register_buffer('selection_bias', torch.zeros(num_experts, device=device, dtype=torch.float32))
        self.register_buffer('load', torch.zeros(num_experts, device=device, dtype=torch.int64))

    def favour(self, gates: torch.Tensor) -> torch.Tensor:
        """(T, E) gates to scores."""
        return gates.detach() + self.selection_bias.float()

    def decide(self, logits: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        return logits, self.favour(torch.softmax(logits, dim=-1))

    def observe(self, indices: torch.Tensor, gates: torch.Tensor) -> None:
        with torch.no_grad():
            self.load.copy_(self.load + F.one_hot(indices.flatten(), self.num_experts).sum(dim=0))

    @torch.no_grad()
    def end_step(self) -> None:
        load = _sum_over_ranks(self.load).double()
        self.selection_bias += self.value * torch.sign(load.mean() - load).to(self.selection_bias.dtype)
        self.load.zero_()


def _sum_over_ranks(count: torch.Tensor) -> torch.Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
    return count


STEP_CONSTRAINTS: Dict[str, Type[StepConstraint]] = {
    'relative': RelativeImportance,
    'mean': MeanImportance,
    'bias': SelectionBias,
}


def create_constraint(name: str, num_experts: int, value: Optional[float] = None, device=None) -> StepConstraint:
    """Raises: InputError: `name` is not a key of `STEP_CONSTRAINTS`."""
    if name not in STEP_CONSTRAINTS:
        raise InputError(
            f'constraint={name!r} is not one of {", ".join(STEP_CONSTRAINTS)}.{nearest(name, STEP_CONSTRAINTS)}')
    return STEP_CONSTRAINTS[name](num_experts, value, device=device)
