"""DeepMoE: every channel of a convolution is an expert, which a gate scales, or removes, image by image.

Deep Mixture of Experts via Shallow Embedding, Wang et al., UAI 2019, https://arxiv.org/abs/1806.01531. A shallow
network turns the image into mixture weights e, once. Every gated layer has a head g = ReLU(W e), whose C gates multiply
the normalised feature maps before the nonlinearity. A zero gate removes a channel: of the convolution that makes it and
of the one that reads it. Training multiplies and computes everything; `sparse_inference` computes live channels only.

Letters: B images, C channels of a gated layer (its experts), D mixture weights, H x W positions.
"""
import contextlib
from typing import Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from timm.layers import register_notrace_module
from torch import nn
from torch.nn import functional as F

from ..errors import InputError, nearest
from ..routing import Routing, linear_float32, record
from .routed import RoutedLayer, channels_last_on_cpu, masked_mean, single_value_batch_norm

Link = Tuple[nn.Conv2d, nn.Module, Optional['ChannelGate'], nn.Module]


@register_notrace_module
class ShallowEmbedding(nn.Module):
    """Image to mixture weights e: 3 x 3 convolutions of stride 2, average pool, a linear layer, softmax.

    The logits under the softmax are also a prediction of the class, which the embedding loss (cross-entropy, weight mu)
    trains. Where D is not the number of classes, a linear layer of its own makes that prediction from them.

    Args:
        num_classes: Classes of the embedding loss; 0 leaves the loss out.
        in_chans: Channels of the image.
        widths: Output channels of the convolutions of stride 2.
        stem_width: Channels of a convolution of stride 1, followed by a max-pool of stride 2, before them; 0 for none.
        dim: D; None is `num_classes`.
        softmax: Whether e is the softmax of the logits, or the logits themselves.
        loss_weight: mu.

    Shapes:
        (B, in_chans, H, W) -> (B, D), float32.

    Raises:
        InputError: D is below 1, or there are no convolutions.
    """
    def __init__(
            self,
            num_classes: int,
            in_chans: int = 3,
            widths: Sequence[int] = (64, 128, 256, 512, 512),
            stem_width: int = 64,
            dim: Optional[int] = None,
            softmax: bool = True,
            loss_weight: float = 1.,
            device=None,
            dtype=None,
    ):
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        dim = num_classes if dim is None else dim
        if dim < 1:
            raise InputError(f'embed_dim={dim}: the embedding needs at least one mixture weight.')
        if not widths:
            raise InputError('embed_widths is empty: the embedding needs at least one convolution.')
        layers: List[nn.Module] = []
        if stem_width:
            layers += [*_conv_norm_act(in_chans, stem_width, 1, **dd), nn.MaxPool2d(3, stride=2, padding=1)]
        for in_chs, out_chs in zip((stem_width or in_chans, *widths), widths):
            layers += _conv_norm_act(in_chs, out_chs, 2, **dd)
        self.convs = nn.Sequential(*layers)
        self.fc = nn.Linear(widths[-1], dim, **dd)
        self.dim = dim
        self.softmax = softmax
        self.loss_weight = loss_weight
        self.frozen = False
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """Predict other classes from the same mixture weights: the gates keep their meaning."""
        self.num_classes = num_classes
        self.losses = (('embedding', float(self.loss_weight)),) if num_classes and self.loss_weight else ()
        self.classifier = None
        if num_classes not in (0, self.dim):
            self.classifier = nn.Linear(
                self.dim, num_classes, device=self.fc.weight.device, dtype=self.fc.weight.dtype)
            self.classifier.requires_grad_(not self.frozen).train(self.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            pooled = self.convs(x).mean(dim=(2, 3))
        else:
            alone = self.training and x.shape[0] == 1 and not torch.compiler.is_compiling()
            with single_value_batch_norm(self.convs, enabled=alone):
                pooled = masked_mean(self.convs(channels_last_on_cpu(x)))
        logits = linear_float32(pooled, self.fc.weight, self.fc.bias)
        e = torch.softmax(logits, dim=1) if self.softmax else logits
        if self.classifier is not None:
            # Empty sums: loops that know of no embedding loss find a zero gradient on the prediction, and DDP finds it.
            e = e + self.classifier.weight[:0].sum() + self.classifier.bias[:0].sum()
        if not torch.jit.is_scripting():
            self._record(logits)
        return e

    def _record(self, logits: torch.Tensor) -> None:
        if self.classifier is not None:
            logits = linear_float32(logits, self.classifier.weight, self.classifier.bias)
        share = torch.softmax(logits, dim=1)
        losses = () if self.frozen else self.losses
        record(self, Routing(logits, share, share, shape=(logits.shape[0],), losses=losses))

    def freeze(self, freeze: bool = True) -> None:
        """Stop, or resume, the training of the network; frozen, its norms use their running statistics."""
        _set_frozen(self, freeze)
        self.train(self.training)

    def train(self, mode: bool = True) -> 'ShallowEmbedding':
        """As nn.Module's; a frozen network stays in evaluation mode."""
        return super().train(mode and not self.frozen)


class ChannelGate(RoutedLayer):
    """One head of the sparse gating network: g = ReLU(W e), no bias, float32.

    Args:
        channels: C.
        dim: D.
        init: 'ones' for a matrix of ones, where a softmax e makes every gate 1 and the network starts as the dense one;
            or (low, high) of a uniform distribution.
        l1: lambda, the weight of the L1 norm of the gates in the loss.

    Raises:
        InputError: An unknown `init`.
    """
    def __init__(
            self,
            channels: int,
            dim: int,
            init: Union[str, Sequence[float]] = 'ones',
            l1: float = 1e-3,
            device=None,
            dtype=None,
    ):
        super().__init__()
        if init != 'ones' and (isinstance(init, str) or len(init) != 2):
            raise InputError(f"gate_init={init!r}: use 'ones', or two numbers (low, high) of a uniform distribution.")
        self.num_experts = self.num_selected = channels
        self.init = init
        self.losses = (('gate_l1', float(l1)),) if l1 else ()
        self.frozen = False
        self.keep: Optional[torch.Tensor] = None  # set by `sparse_inference` for its time
        self.weight = nn.Parameter(torch.empty(channels, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.init == 'ones':
            nn.init.ones_(self.weight)
        else:
            nn.init.uniform_(self.weight, *self.init)

    def mix(self, e: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """(B, D) to (B, C) logits and gates; the arithmetic, in the part of Python TorchScript reads."""
        logits = linear_float32(e, self.weight)
        return logits, F.relu(logits)

    @torch.jit.ignore
    def forward(self, e: torch.Tensor) -> Routing:
        """(B, D) to a record with (B, C) weights."""
        logits, gates = self.mix(e)
        losses = () if self.frozen else self.losses
        return Routing(logits, gates, gates, shape=(logits.shape[0],), losses=losses)

    def gates(self, e: torch.Tensor) -> torch.Tensor:
        """The decision, recorded: what a block multiplies its maps by.

        Shapes:
            (B, D) -> (B, C), float32.
        """
        if torch.jit.is_scripting():
            return self.mix(e)[1]
        else:
            routing = self(e)
            record(self, routing)
            return routing.weights

    def live(self, gates: torch.Tensor) -> Optional[torch.Tensor]:
        """Indices of the channels to compute: of those kept, or else that some image wants. None stands for all.

        Those that images want are filled up with dead ones, see `_fill_up`.
        """
        if self.keep is None:
            return _fill_up((gates != 0).any(dim=0))
        return None if bool(self.keep.all()) else self.keep.nonzero().squeeze(1)

    def freeze(self, freeze: bool = True) -> None:
        """Stop, or resume, the training of the gates."""
        _set_frozen(self, freeze)

    def expert_parameters(self) -> List[List[nn.Parameter]]:
        return [[self.weight]]

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        """MACs of W e for every row of (B, D)."""
        return input_shape[0] * self.weight.numel()

    def extra_repr(self) -> str:
        return f'num_experts={self.num_experts}, dim={self.weight.shape[1]}, init={self.init!r}'


class ChannelGated(RoutedLayer):
    """Base of a block whose convolutions are gated by channel.

    Forward takes the block's input (B, C, H, W) and the mixture weights e (B, D). In evaluation and inside
    `sparse_inference` it must return what `run_live` makes of the chain. `num_experts` is the number of gated channels;
    all of them may be live, so `num_selected` is the same.
    """
    sparse = False  # set by `sparse_inference` for its time

    def chain(self) -> List[Link]:
        """(convolution, norm, gate or None, activation) in order; the convolutions have one group."""
        raise NotImplementedError

    def gates(self) -> List[ChannelGate]:
        return [gate for _, _, gate, _ in self.chain() if gate is not None]

    def count_experts(self) -> None:
        """To be called at the end of the constructor of a subclass."""
        self.num_experts = self.num_selected = sum(gate.num_experts for gate in self.gates())

    def runs_live(self, x: torch.Tensor) -> bool:
        """Whether this call computes live channels only: which these are is data, and meta tensors have none."""
        return self.sparse and not self.training and not x.is_meta and not torch.compiler.is_exporting()

    @torch.compiler.disable
    def run_live(
            self,
            x: torch.Tensor,
            e: torch.Tensor,
            inputs: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """The chain up to its last norm and gate, dead channels left out.

        Args:
            x: (B, C, H, W), of the channels `inputs` only where these are given.
            e: (B, D).
            inputs: Indices of the input channels in x.

        Returns:
            Maps of the live channels, and the indices of these; None where all are there.
        """
        links = self.chain()
        for i, (conv, norm, gate, act) in enumerate(links):
            gates = None if gate is None else gate.gates(e)
            outputs = None if gate is None else gate.live(gates)
            x = _live_norm(norm, _live_conv(conv, x, inputs, outputs), outputs)
            if gates is not None:
                x = scale_channels(x, gates if outputs is None else gates.index_select(1, outputs))
            if i + 1 < len(links):
                x = act(x)
            inputs = outputs
        return x, inputs

    def max_macs(self, input_shape: Tuple[int, ...]) -> int:
        """MACs of all channels, the gates included, for every image of (B, C, H, W)."""
        B, macs, size = input_shape[0], 0, tuple(input_shape[2:])
        for conv, _, _, _ in self.chain():
            size = _output_size(conv, size)
            macs += B * size[0] * size[1] * conv.weight.numel()
        return macs + sum(gate.max_macs((B,)) for gate in self.gates())

    def spared_macs(self, input_shape: Tuple[int, ...], load: Sequence[float]) -> float:
        """MACs between channels of which one is dead, as far as `load`, how often each is live, tells.

        Exact for one image; over many, the convolutions of a block are taken to be independent of each other. All input
        channels of the block are taken to be live.
        """
        macs, size, inputs, shares = 0., tuple(input_shape[2:]), 1., list(load)
        for conv, _, gate, _ in self.chain():
            size = _output_size(conv, size)
            outputs = 1.
            if gate is not None:
                outputs = sum(shares[:gate.num_experts]) / gate.num_experts
                shares = shares[gate.num_experts:]
            macs += size[0] * size[1] * conv.weight.numel() * (1 - inputs * outputs)
            inputs = outputs
        return input_shape[0] * macs

    def expert_sizes(self) -> List[int]:
        """Parameters of every gated channel: its filter, norm and row of the gate."""
        sizes: List[int] = []
        for conv, norm, gate, _ in self.chain():
            if gate is not None:
                makers = sum(p.numel() for module in (conv, norm, gate) for p in module.parameters())
                sizes += [makers // gate.num_experts] * gate.num_experts
        return sizes


@contextlib.contextmanager
def sparse_inference(model: nn.Module, keep: Optional[Mapping[str, torch.Tensor]] = None) -> Iterator[nn.Module]:
    """Compute live channels only, in evaluation mode: convolutions are cut to the channels whose gate is not zero.

    >>> with torch.no_grad(), sparse_inference(model.eval()):
    ...     logits = model(image)  # (1, 3, H, W)

    A single image runs its own live channels. A batch runs the channels that at least one of its images wants, with
    every image's own gates, so that only the cost, never the result, depends on the neighbours (but for rounding).
    Or all images run the channels of a mask that is given: then channels outside it count as removed. What images want
    is filled up to a multiple of C / 16 by dead channels, so that another image's shapes are seldom new.

    Args:
        model: A model with channel gates, in evaluation mode; it is left as it was.
        keep: Name of a gate ('layer1.0.gate1') to a bool mask (C,) of the channels to compute; gates that are not named
            follow the images. The union over a set of images: `{name: (records[0].gates != 0).any(0)}` over the items
            of `moe_zoo.routing.trace_routing`.

    Raises:
        InputError: The model has no gates or is training, a norm has no running statistics, or a mask does not fit.
    """
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, ChannelGated)}
    gates = {name: m for name, m in model.named_modules() if isinstance(m, ChannelGate)}
    if not blocks:
        raise InputError(f'sparse_inference: {type(model).__name__} has no channel gates; use a DeepMoE model.')
    for name, block in blocks.items():
        _check_block(name, block)
    for name, mask in (keep or {}).items():
        _check_mask(name, mask, gates)
    before = [(block, block.sparse) for block in blocks.values()], [(gate, gate.keep) for gate in gates.values()]
    try:
        for block in blocks.values():
            block.sparse = True
        for name, gate in gates.items():
            mask = (keep or {}).get(name)
            gate.keep = None if mask is None else mask.to(gate.weight.device)
        yield model
    finally:
        for block, sparse in before[0]:
            block.sparse = sparse
        for gate, mask in before[1]:
            gate.keep = mask


def scale_channels(x: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) maps times (B, C) float32 gates, in the type of the maps."""
    return x * gates.to(x.dtype).unsqueeze(2).unsqueeze(3)


def live_channels(x: torch.Tensor) -> Optional[torch.Tensor]:
    """Indices of the channels of (B, C, H, W) that are not zero everywhere, filled up; None where all are there."""
    return _fill_up((x != 0).flatten(2).any(dim=2).any(dim=0))


def _fill_up(mask: torch.Tensor) -> Optional[torch.Tensor]:
    """Indices of the channels in a (C,) mask, and of so many others that their number is a multiple of C / 16.

    Every number is a shape, and oneDNN prepares itself for each new one at the cost of several convolutions. None
    stands for all channels.
    """
    live = mask.nonzero().squeeze(1)
    missing = -len(live) % max(1, len(mask) // 16)
    if len(live) + missing >= len(mask):
        return None
    return live if not missing else torch.cat([live, (~mask).nonzero()[:missing, 0]])


def _conv_norm_act(in_chs: int, out_chs: int, stride: int, **dd) -> List[nn.Module]:
    conv = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False, **dd)
    nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
    return [conv, nn.BatchNorm2d(out_chs, **dd), nn.ReLU(inplace=True)]


def _set_frozen(module: nn.Module, freeze: bool) -> None:
    """Frozen parameters lose their gradient: an optimiser then neither decays them nor moves them by momentum."""
    module.frozen = freeze
    module.requires_grad_(not freeze)
    for parameter in module.parameters():
        parameter.grad = None


def _output_size(conv: nn.Conv2d, size: Tuple[int, ...]) -> Tuple[int, ...]:
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, conv.kernel_size, conv.stride, conv.padding, conv.dilation))


def _live_conv(
        conv: nn.Conv2d,
        x: torch.Tensor,
        inputs: Optional[torch.Tensor],
        outputs: Optional[torch.Tensor],
) -> torch.Tensor:
    """The convolution from the channels `inputs`, which is what x has, to the channels `outputs`."""
    if inputs is None and outputs is None:
        return conv(x)
    weight, bias = _cut(conv.weight, inputs, outputs), conv.bias
    if bias is not None and outputs is not None:
        bias = bias.index_select(0, outputs)
    if weight.numel() == 0:  # nothing comes in, or nothing goes out
        y = x.new_zeros(len(x), len(weight), *_output_size(conv, x.shape[2:]))
        return y if bias is None else y + bias[:, None, None]
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation)


def _cut(weight: torch.Tensor, inputs: Optional[torch.Tensor], outputs: Optional[torch.Tensor]) -> torch.Tensor:
    """(O, I, height, width) kernels between the channels given; None stands for all."""
    if inputs is not None and outputs is not None and weight.shape[2:].numel() > 1 and weight.is_contiguous():
        # One copy, of what is needed only, on all threads: axis by axis, the first cut alone leaves a larger one.
        pairs = outputs.unsqueeze(1) * weight.shape[1] + inputs
        rows = weight.flatten(0, 1).index_select(0, pairs.flatten())
        return rows.view(*pairs.shape, *weight.shape[2:])
    if outputs is not None:
        weight = weight.index_select(0, outputs)
    if inputs is not None and weight.shape[2:].numel() == 1:  # index_select would run on one thread
        return weight.flatten(1).gather(1, inputs.expand(len(weight), -1)).unflatten(1, (-1, 1, 1))
    return weight if inputs is None else weight.index_select(1, inputs)


def _live_norm(norm: nn.Module, x: torch.Tensor, channels: Optional[torch.Tensor]) -> torch.Tensor:
    if channels is None:
        return norm(x)
    if len(channels) == 0:
        return x
    mean, var, weight, bias = (
        None if v is None else v.index_select(0, channels)
        for v in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    return F.batch_norm(x, mean, var, weight, bias, False, 0., norm.eps)


def _check_block(name: str, block: ChannelGated) -> None:
    if block.training:
        raise InputError(f"sparse_inference: block '{name}' is in training mode; call model.eval() first.")
    for _, norm, gate, _ in block.chain():
        if gate is not None and getattr(norm, 'running_mean', None) is None:  # frozen norms have one
            raise InputError(
                f"sparse_inference: block '{name}' has a {type(norm).__name__}; channels can be left out of a "
                'BatchNorm2d with running statistics only.')


def _check_mask(name: str, mask: torch.Tensor, gates: Dict[str, ChannelGate]) -> None:
    if name not in gates:
        raise InputError(f'keep: there is no gate {name!r}.{nearest(name, gates)} Gates: {", ".join(gates)}.')
    if mask.dtype != torch.bool or tuple(mask.shape) != (gates[name].num_experts,):
        raise InputError(
            f'keep[{name!r}] is {str(mask.dtype).removeprefix("torch.")} of shape {tuple(mask.shape)}: give a bool mask'
            f' of shape ({gates[name].num_experts},).')
