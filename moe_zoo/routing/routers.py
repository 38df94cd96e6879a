"""Routers: features in, `Routing` out. Always named for what they do, because the order of softmax and top-k differs.

Letters: T routed items, D features, E experts, K chosen experts.

| router | gates | source |
| --- | --- | --- |
| `SigmoidRouter` | sigmoid of every logit, all experts mixed | CondConv, Yang et al. 2019 |
| `SoftmaxRouter` | tempered softmax, all experts mixed | Dynamic Convolution, Chen et al. 2020 |
| `AnnealedSoftmaxRouter` | the same with a temperature that falls by the epoch | the same |
| `NoisyTopKRouter` | learned noise, top-k, **then** softmax over the k kept | Shazeer et al. 2017 |
| `HierarchicalRouter` (hierarchical.py) | the same on two levels, groups of experts and experts | the same |
| `SoftmaxTopKRouter` | softmax over all experts, **then** top-k, not renormalised | V-MoE, Riquelme et al. 2021 |
| `CosineTopKRouter` | the same of scaled cosines between item and expert | Swin-MoE (Tutel, Hwang et al. 2022) |
| `SigmoidTopKRouter` | sigmoid, top-k by gate plus bias, chosen gates normalised | Wang et al. 2024 |

Router arithmetic is float32 whatever the autocast: differences between logits decide, and bfloat16 has three digits.
"""
import math
import numbers
from typing import Optional, Sequence, Tuple

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import InputError
from .constraints import SelectionBias, create_constraint
from .types import Routing

Losses = Tuple[Tuple[str, float], ...]
MAX_FACTOR = 100.0  # of a cosine

# logits (T, E), gates (T, E), weights (T, K), indices (T, K), noisy logits, standard deviation of the noise
Choice = Tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Optional[torch.Tensor], Optional[torch.Tensor]]


def check_num_selected(num_selected: int, num_experts: int) -> None:
    """Raises: InputError: `num_selected` is not between 1 and `num_experts`, or one of them is no whole number."""
    for name, value in (('num_experts', num_experts), ('num_selected', num_selected)):
        if not isinstance(value, numbers.Integral):
            raise InputError(f'{name}={value!r}: use a whole number.')
    if num_experts < 1:
        raise InputError(f'num_experts={num_experts}: a routed layer needs at least one expert.')
    if not 1 <= num_selected <= num_experts:
        raise InputError(
            f'num_selected={num_selected} with num_experts={num_experts}: choose between 1 and {num_experts} experts.')


def linear_float32(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
    """(T, D) features of any floating type to (T, E) float32 logits, outside autocast."""
    bias = None if bias is None else bias.float()
    if torch.jit.is_scripting():  # TorchScript has no autocast to leave
        return F.linear(x.float(), weight.float(), bias)
    else:
        if x.is_meta:  # which has no autocast either
            return F.linear(x.float(), weight.float(), bias)
        with torch.autocast(device_type=x.device.type, enabled=False):
            return F.linear(x.float(), weight.float(), bias)


def becomes_onnx() -> bool:
    """Whether a graph for ONNX is being made. Elsewhere torch.onnx, slow to load, is not asked."""
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def top_k(values: torch.Tensor, k: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """The k largest of the last axis and their indices, best first, ties to the lower index.

    `torch.topk` breaks ties as it likes, and gates that underflow to zero do tie. ONNX has one sort only, which
    is stable.
    """
    if not torch.jit.is_scripting():
        if becomes_onnx():
            values = values.int() if values.dtype == torch.int8 else values  # of which onnxruntime has no sort
            values, indices = torch.sort(values, dim=-1, descending=True)
            return values[..., :k], indices[..., :k]
    values, indices = torch.sort(values, dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def softmax_of_chosen(logits: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Softmax over the chosen logits of the last axis alone; of one, p / p.detach() with p the softmax over all."""
    if indices.shape[-1] > 1:
        return torch.softmax(logits.gather(-1, indices), dim=-1)
    # In logarithms, because a bias may choose an expert whose p is 0 in float32.
    chosen = torch.log_softmax(logits, dim=-1).gather(-1, indices)
    return torch.exp(chosen - chosen.detach())


def normal_cdf(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def choice_probability(logits: torch.Tensor, noisy: torch.Tensor, std: torch.Tensor, k: int) -> torch.Tensor:
    """Probability that an expert is among the k chosen if only its own noise is drawn again (Shazeer 2017, eq. 8, 9).

    P(x, i) = Phi((clean logit_i - threshold_i) / std_i), where the threshold is the k-th largest noisy logit without
    expert i: the (k+1)-th where i was chosen, the k-th where it was not.

    Args:
        logits, noisy, std: (..., E) clean logits, those that decided, and the standard deviation of their noise.
        k: Chosen experts; all ones where these are all.
    """
    if k >= logits.shape[-1]:
        return torch.ones_like(logits)
    top = torch.topk(noisy, k + 1, dim=-1).values
    if_in, if_out = top[..., -1:], top[..., -2:-1]
    threshold = torch.where(noisy > if_in, if_in, if_out)
    return normal_cdf((logits - threshold) / std)


class _Router(nn.Module):
    """A linear map to logits, and what every router shares.

    Args:
        in_features: D.
        num_experts: E.
        num_selected: K; equals E where every expert is mixed.
        bias: Whether the linear map has one.
        losses: (name, weight) pairs written into the record.
    """

    def __init__(
            self,
            in_features: int,
            num_experts: int,
            num_selected: int,
            bias: bool,
            losses: Sequence[Tuple[str, float]] = (),
            device=None,
            dtype=None,
    ):
        super().__init__()
        check_num_selected(num_selected, num_experts)
        self.in_features = in_features
        self.num_experts = num_experts
        self.num_selected = num_selected
        self.losses: Losses = tuple((str(name), float(weight)) for name, weight in losses if weight)
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Lecun normal, truncated at two standard deviations, as the original V-MoE; zero bias."""
        std = 1.0 / math.sqrt(self.in_features) / 0.87962566103423978
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def compute_logits(self, x: torch.Tensor) -> torch.Tensor:
        return linear_float32(x, self.weight, self.bias)

    def sample_noise(self, logits: torch.Tensor) -> torch.Tensor:
        """(T, E) standard normal noise; tests put recorded noise here."""
        return torch.randn_like(logits)

    def macs(self, num_items: int) -> int:
        """MACs of the decision for `num_items` items."""
        return num_items * self.in_features * self.num_experts

    def extra_repr(self) -> str:
        return f'{self.in_features}, num_experts={self.num_experts}, num_selected={self.num_selected}'


class SigmoidRouter(_Router):
    """a = sigmoid(x R + b); every expert is mixed, the weights need not sum to one (CondConv, section 3).

    Initialised as timm's CondConv routing functions: Glorot uniform, zero bias, so that every gate starts near 1/2.

    Args:
        hidden_features: Units of a hidden layer, a = sigmoid(relu(x H + h) R + b); None for one linear map.
    """

    def __init__(
            self,
            in_features: int,
            num_experts: int,
            bias: bool = True,
            hidden_features: Optional[int] = None,
            losses=(),
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        super().__init__(hidden_features or in_features, num_experts, num_experts, bias, losses, **dd)
        self.hidden = nn.Linear(in_features, hidden_features, **dd) if hidden_features else None

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def compute_logits(self, x: torch.Tensor) -> torch.Tensor:
        if self.hidden is not None:
            x = linear_float32(x, self.hidden.weight, self.hidden.bias).relu()
        return linear_float32(x, self.weight, self.bias)

    def macs(self, num_items: int) -> int:
        hidden = 0 if self.hidden is None else self.hidden.weight.numel()
        return super().macs(num_items) + num_items * hidden

    def mix(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """x: (T, D). Returns (T, E) logits and gates; the arithmetic, in the part of Python TorchScript reads."""
        logits = self.compute_logits(x)
        return logits, torch.sigmoid(logits)

    @torch.jit.ignore
    def forward(self, x: torch.Tensor) -> Routing:
        """x: (T, D). Returns a record with (T, E) weights."""
        logits, gates = self.mix(x)
        return Routing(logits, gates, gates, shape=(x.shape[0],), losses=self.losses)


class SoftmaxRouter(SigmoidRouter):
    """a = softmax((x R + b) / temperature); every expert is mixed (Dynamic Convolution, eq. 2; CondConv's ablation)."""

    def __init__(
            self,
            in_features: int,
            num_experts: int,
            temperature: float = 1.0,
            bias: bool = True,
            hidden_features: Optional[int] = None,
            losses=(),
            device=None,
            dtype=None,
    ):
        super().__init__(in_features, num_experts, bias, hidden_features, losses, device=device, dtype=dtype)
        if not temperature > 0:
            raise InputError(f'temperature={temperature}: a softmax needs a temperature above 0.')
        self.temperature = float(temperature)

    def temper(self, logits: torch.Tensor) -> torch.Tensor:
        """(T, E) logits, divided by the temperature."""
        return logits / self.temperature

    def mix(self, x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """x: (T, D). Returns (T, E) logits and gates that sum to one."""
        logits = self.compute_logits(x)
        return logits, torch.softmax(self.temper(logits), dim=-1)


class AnnealedSoftmaxRouter(SoftmaxRouter):
    """A softmax whose temperature falls linearly from `temperature` to 1 over `anneal_epochs`, and stays there.

    It follows from the epoch alone, in training and in evaluation: an integer in a buffer, which is saved with the
    weights and which a moving average of them copies. `moe_zoo.routing.set_epoch(model, epoch)` sets it.

    Raises:
        InputError: A temperature below 1, or `anneal_epochs` is no whole number above 0.
    """

    def __init__(
            self,
            in_features: int,
            num_experts: int,
            temperature: float = 30.0,
            anneal_epochs: int = 10,
            bias: bool = True,
            hidden_features: Optional[int] = None,
            losses=(),
            device=None,
            dtype=None,
    ):
        super().__init__(
            in_features, num_experts, temperature, bias, hidden_features, losses, device=device, dtype=dtype)
        if not isinstance(anneal_epochs, numbers.Integral) or anneal_epochs < 1:
            raise InputError(f'anneal_epochs={anneal_epochs!r}: use a whole number of epochs, at least 1.')
        if temperature < 1:
            raise InputError(f'temperature={temperature}: annealing ends at 1, so start at 1 or above.')
        self.anneal_epochs = int(anneal_epochs)
        self.register_buffer('epoch', torch.zeros((), dtype=torch.int64, device=device))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, 'epoch'):  # the first call comes from the base class
            nn.init.zeros_(self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Take the temperature of an epoch, counted from 0."""
        self.epoch.fill_(epoch)

    def current_temperature(self) -> torch.Tensor:
        """T of the epoch, a scalar: no value leaves the device, and one compiled graph serves every epoch."""
        left = (1.0 - self.epoch / self.anneal_epochs).clamp(min=0.0)
        return 1.0 + (self.temperature - 1.0) * left

    def temper(self, logits: torch.Tensor) -> torch.Tensor:
        return logits / self.current_temperature()


class _TopKRouter(_Router):
    """A router that chooses K of E experts: `choose` holds its arithmetic, in the part of Python TorchScript reads."""

    def choose(self, x: torch.Tensor) -> Choice:
        """x: (T, D). Returns the fields of the record as a plain tuple."""
        raise NotImplementedError

    @torch.jit.ignore
    def forward(self, x: torch.Tensor, inside: Optional[torch.Tensor] = None) -> Routing:
        """A record with (T, K) weights.

        Args:
            x: (T, D).
            inside: (T,) bool, the items that count; the others are decided upon alike. None counts all.
        """
        logits, gates, weights, indices, noisy, std = self.choose(x)
        constraint = getattr(self, 'constraint', None)
        if constraint is not None and self.training:
            counted = slice(None) if inside is None else inside
            constraint.observe(indices[counted], gates[counted])
        kept = weights > 0 if constraint is not None and constraint.excludes else None
        return Routing(
            logits, gates, weights, indices, kept, noisy_logits=noisy, noise_std=std,
            shape=(x.shape[0],), losses=self.losses, inside=inside)


class NoisyTopKRouter(_TopKRouter):
    """Noisy top-k gating: softmax over the k largest noisy logits, after the choice (Shazeer et al. 2017, eq. 3 to 5).

    H = x W_g + eps * (softplus(x W_noise) + noise_epsilon), eps standard normal, in training only. No biases; both
    matrices start at zero, which gives every expert the same expected load.

    With K = 1 the softmax over one logit is constantly 1; the weight is then p / p.detach() with p the softmax over
    all experts, so that its value is 1 and the router still hears the task loss.

    A constraint with a state (`moe_zoo.routing.constraints`) may exclude experts, whose weight is then exactly 0, or
    add a bias to the scores that choose.

    Args:
        noise: Whether to learn and add noise; without it the noise matrix does not exist.
        noise_epsilon: Added to the standard deviation (1e-2 in the authors' code).
        zero_init: False draws the gate weights as `_Router` does, for gates without noise, where a zero matrix would
            send everything to the first experts.
        constraint: A key of `STEP_CONSTRAINTS` ('relative', 'mean', 'bias'), or None.
        constraint_value: Its threshold or rate; None is its default.
    """

    def __init__(
            self,
            in_features: int,
            num_experts: int,
            num_selected: int = 2,
            noise: bool = True,
            noise_epsilon: float = 1e-2,
            zero_init: Optional[bool] = None,
            losses: Sequence[Tuple[str, float]] = (('importance', 0.1), ('load', 0.1)),
            constraint: Optional[str] = None,
            constraint_value: Optional[float] = None,
            device=None,
            dtype=None,
    ):
        self.noise = noise
        self.noise_epsilon = noise_epsilon
        self.zero_init = noise if zero_init is None else zero_init
        super().__init__(in_features, num_experts, num_selected, False, losses, device=device, dtype=dtype)
        self.noise_weight = None
        if noise:
            self.noise_weight = nn.Parameter(torch.zeros(num_experts, in_features, device=device, dtype=dtype))
        self.constraint = None
        if constraint is not None:
            self.constraint = create_constraint(constraint, num_experts, constraint_value, device=device)

    def reset_parameters(self) -> None:
        if self.zero_init:
            nn.init.zeros_(self.weight)
        else:
            super().reset_parameters()
        if getattr(self, 'noise_weight', None) is not None:  # the first call comes from the base class
            nn.init.zeros_(self.noise_weight)

    def choose(self, x: torch.Tensor) -> Choice:
        logits = self.compute_logits(x)
        deciding = logits
        noisy: Optional[torch.Tensor] = None
        std: Optional[torch.Tensor] = None
        noise_weight = self.noise_weight
        if noise_weight is not None and self.training:
            std = F.softplus(linear_float32(x, noise_weight)) + self.noise_epsilon
            deciding = logits + self.sample_noise(logits) * std
            noisy = deciding
        scores = deciding
        constraint = self.constraint
        if constraint is not None:
            deciding, scores = constraint.decide(deciding)
        indices = top_k(scores, self.num_selected)[1]
        weights = softmax_of_chosen(deciding, indices)
        gates = torch.zeros_like(logits).scatter(1, indices, weights)
        return logits, gates, weights, indices, noisy, std


class SoftmaxTopKRouter(_TopKRouter):
    """V-MoE's router: softmax over all experts first, top-k after, not renormalised (Riquelme et al. 2021, eq. 2).

    Noise of fixed standard deviation `noise_std / E` is added to the logits in training; the noisy gates choose,
    rank and weigh, the clean ones enter the importance loss.

    Args:
        noise_std: Numerator of the noise's standard deviation; 0 switches it off.
        renormalise: Divide the chosen gates by their sum; at K = 1 by a detached copy, so that the value is 1 and the
            gradient stays. The original does not.
        deterministic: True never adds noise, False adds it in evaluation too; None follows the training mode.
    """

    def __init__(
            self,
            in_features: int,
            num_experts: int,
            num_selected: int = 2,
            noise_std: float = 1.0,
            renormalise: bool = False,
            deterministic: Optional[bool] = None,
            losses: Sequence[Tuple[str, float]] = (('importance', 0.005), ('vmoe_load', 0.005)),
            device=None,
            dtype=None,
    ):
        super().__init__(in_features, num_experts, num_selected, False, losses, device=device, dtype=dtype)
        self.noise_std = float(noise_std)
        self.renormalise = renormalise
        self.deterministic = deterministic

    def choose(self, x: torch.Tensor) -> Choice:
        logits = self.compute_logits(x)
        gates = torch.softmax(logits, dim=-1)
        deciding = gates
        noisy: Optional[torch.Tensor] = None
        std: Optional[torch.Tensor] = None
        deterministic = self.deterministic
        if self.noise_std > 0 and (self.training if deterministic is None else not deterministic):
            std = logits.new_full([], self.noise_std / self.num_experts)
            noisy = logits + self.sample_noise(logits) * std
            deciding = torch.softmax(noisy, dim=-1)
        weights, indices = top_k(deciding, self.num_selected)
        if self.renormalise:
            weights = _normalise(weights)
        return logits, gates, weights, indices, noisy, std


class CosineTopKRouter(SoftmaxTopKRouter):
    """`SoftmaxTopKRouter` whose logits are cosines, times a learned factor of at most 100.

    A linear map takes an item to P dimensions, where every expert is a direction; as in Tutel (Hwang et al. 2022, arXiv
    2206.03382), https://github.com/microsoft/tutel/blob/main/tutel/gates/cosine_top.py, with which one of the released
    Swin-MoEs was trained.

    Args:
        projection_features: P.
        temperature: One divided by the factor at the start.
        Others: As in `SoftmaxTopKRouter`.

    Raises:
        InputError: P below 1, or a temperature that the factor cannot reach.
    """

    def __init__(
            self,
            in_features: int,
            num_experts: int,
            num_selected: int = 2,
            noise_std: float = 1.0,
            renormalise: bool = False,
            deterministic: Optional[bool] = None,
            losses: Sequence[Tuple[str, float]] = (('importance', 0.005), ('vmoe_load', 0.005)),
            projection_features: int = 256,
            temperature: float = 0.5,
            device=None,
            dtype=None,
    ):
        dd = {'device': device, 'dtype': dtype}
        if not isinstance(projection_features, numbers.Integral) or projection_features < 1:
            raise InputError(f'projection_features={projection_features!r}: use a whole number, at least 1.')
        if not temperature >= 1 / MAX_FACTOR:
            raise InputError(f'temperature={temperature}: use at least {1 / MAX_FACTOR}.')
        super().__init__(
            projection_features, num_experts, num_selected, noise_std, renormalise, deterministic, losses, **dd)
        self.projection = nn.Linear(in_features, projection_features, **dd)
        self.log_factor = nn.Parameter(torch.full((1,), -math.log(temperature), **dd))
        self.max_log_factor = math.log(MAX_FACTOR)

    def compute_logits(self, x: torch.Tensor) -> torch.Tensor:
        x = linear_float32(x, self.projection.weight, self.projection.bias)
        factor = self.log_factor.float().clamp(max=self.max_log_factor).exp()
        return linear_float32(F.normalize(x, dim=-1), F.normalize(self.weight.float(), dim=-1)) * factor

    def macs(self, num_items: int) -> int:
        return super().macs(num_items) + num_items * self.projection.weight.numel()


class SigmoidTopKRouter(_TopKRouter):
    """Sigmoid gates, top-k by gate plus a bias per expert that counts for the choice only, chosen gates normalised.

    The bias moves by `bias_rate` against the load after every optimiser step (`moe_zoo.routing.end_step(model)`):
    up for experts below the mean, down for those above, over the loads of all ranks. It is a buffer, saved with the
    model, and frozen in evaluation (auxiliary-loss-free balancing, Wang et al. 2024, arXiv 2408.15664, algorithm 1).
    """

    def __init__(
            self,
            in_features: int,
            num_experts: int,
            num_selected: int = 2,
            bias_rate: float = 1e-3,
            losses: Sequence[Tuple[str, float]] = (),
            device=None,
            dtype=None,
    ):
        super().__init__(in_features, num_experts, num_selected, False, losses, device=device, dtype=dtype)
        self.constraint = SelectionBias(num_experts, bias_rate, device=device)

    def choose(self, x: torch.Tensor) -> Choice:
        logits = self.compute_logits(x)
        gates = torch.sigmoid(logits)
        indices = top_k(self.constraint.favour(gates), self.num_selected)[1]
        weights = _normalise(gates.gather(1, indices))
        return logits, gates, weights, indices, None, None


def _normalise(weights: torch.Tensor) -> torch.Tensor:
    """(T, K) chosen gates to sum one; at K = 1 the value is 1 and the gradient that of log p."""
    total = weights.sum(dim=-1, keepdim=True)
    if weights.shape[-1] == 1:
        total = total.detach()
    return weights / total.clamp_min(1.2e-38)  # the smallest normal float32
