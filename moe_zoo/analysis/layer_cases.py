"""What `tools/benchmark.py layer` times: routed layers beside plain and rival layers.

Maps are 14 x 14 unless said otherwise. Images are spread evenly over the experts, which is the hard case: where all
choose one expert, dispatching is free.

Letters: B images, C channels, E experts, K chosen experts.
"""
import fnmatch
import functools
import itertools
import sys
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import torch
from timm.layers import CondConv2d as TimmCondConv2d
from timm.layers import Mlp
from torch import nn

from ..errors import InputError, nearest
from ..layers import CondConv2d, MoEConv2d, MoEMlp, MoEStage, SoftMoEMlp
from ..layers.deep_moe import ChannelGate, ChannelGated
from .model_cases import make_forward, memory_of
from .peers import make_peer
from .timing import Settings, comparison, finish

MODES = ('forward', 'train')
T = TypeVar('T')


class Contender(NamedTuple):
    """A module, and the inputs that it is called with; no module where it comes of a package that is not installed."""
    name: str
    module: nn.Module | None
    inputs: tuple[torch.Tensor, ...]


class Case(NamedTuple):
    """One comparison.

    Attributes:
        about: One line for people: layer, sizes, batch.
        build: Makes the contenders; the first is this package's layer, the others are what it is measured by.
        modes: Those of `MODES` that are timed.
    """
    about: str
    build: Callable[[], list[Contender]]
    modes: tuple[str, ...] = MODES


def make_layer_run(contender: Contender, mode: str) -> Callable[[], None]:
    """One forward of a layer, or one forward and backward to its inputs and parameters."""
    _, module, inputs = contender
    if mode == 'forward':
        return make_forward(module, inputs)
    module.train()
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    slope = torch.ones_like(module(*inputs))

    def step() -> None:
        output = module(*inputs)
        for leaf in (*inputs, *module.parameters()):
            leaf.grad = None
        output.backward(slope)
        finish(slope)

    return step


def benchmark_layer(name: str, mode: str, case: Case, settings: Settings) -> list[dict]:
    """Time the contenders of one case; those of packages that are not installed are said and left out.

    Returns:
        One row for each contender after the first: the ratio of time, every timing in seconds, memory in bytes.
    """
    contenders = []
    for contender, module, inputs in case.build():
        if module is None:
            print(f'note: {name} goes without {contender}, which `tools/setup.sh --bench` installs', file=sys.stderr)
        else:
            inputs = tuple(x.to(settings.device) for x in inputs)
            contenders.append(Contender(contender, module.to(settings.device), inputs))
    runs = [make_layer_run(contender, mode) for contender in contenders]
    timings = settings.alternate(runs)
    memory = [memory_of(contender.module, run, settings.device) for contender, run in zip(contenders, runs)]
    row = {'kind': 'layer', 'case': name, 'about': case.about, 'layer': contenders[0].name}
    return [
        row | comparison(other.name, mode, timings.seconds[0], seconds, timings.loads, (memory[0], held))
        for other, seconds, held in zip(contenders[1:], timings.seconds[1:], memory[1:])]


def cases() -> dict[str, Case]:
    """Every case by its name."""
    found = _cond_conv_cases()
    for num_selected in (1, 2):
        for kind, layer in (('conv', 'MoEConv2d'), ('stage', 'MoEStage')):
            found[f'moe-{kind}-k{num_selected}-b8'] = Case(
                f'{layer}, {num_selected} of 4 convolutions 3x3 256-256, map 20x20, 8 images, gate included',
                functools.partial(choose, layer, num_selected))
    found |= _token_cases()
    for batch in (1, 8):
        found[f'deepmoe-half-b{batch}'] = Case(
            'DeepMoE convolution and norm, 3x3 256-256, half of the channels live on both sides, map 14x14, '
            f'{batch} image{"s with one mask" if batch > 1 else ""}',
            functools.partial(half_live, batch), modes=('forward',))
    return found


def _cond_conv_cases() -> dict[str, Case]:
    shapes = {
        '1x1': dict(in_channels=512, out_channels=128, kernel_size=1, size=14),
        '3x3': dict(in_channels=256, out_channels=256, kernel_size=3, size=14),
        'dw': dict(in_channels=256, out_channels=256, kernel_size=3, groups=256, size=14),
        'map7': dict(in_channels=512, out_channels=512, kernel_size=3, size=7),  # last stage of condconv_resnet50
    }
    found = {}
    for (kind, shape), num_experts, batch in itertools.product(shapes.items(), (4, 8), (1, 8, 32)):
        name = f'condconv-{kind}-e{num_experts}-b{batch}'
        k, size = shape['kernel_size'], shape['size']
        about = (
            f'CondConv2d {k}x{k}{" depthwise" if kind == "dw" else ""} {shape["in_channels"]}-{shape["out_channels"]}, '
            f'{num_experts} experts, map {size}x{size}, {batch} image{"s" if batch > 1 else ""}')
        found[name] = Case(about, functools.partial(cond_conv, num_experts, batch, **shape))
    return found


def _token_cases() -> dict[str, Case]:
    found = {}
    for num_selected, batch in itertools.product((1, 2), (8, 32)):
        found[f'tokens-k{num_selected}-b{batch}'] = Case(
            f'MoEMlp, {num_selected} of 8 experts, width 384, hidden 1536, {batch} x 197 tokens, nothing dropped',
            functools.partial(tokens, num_selected, batch))
    for num_selected in (1, 2):
        found[f'tokens-dropping-k{num_selected}-b32'] = Case(
            f'MoEMlp, {num_selected} of 8 experts, width 384, hidden 1536, 32 x 197 tokens, capacity factor 1 an image',
            functools.partial(dropping_tokens, num_selected, 32))
    found['soft-tokens-b32'] = Case(
        'SoftMoEMlp, 8 experts of 25 slots, width 384, hidden 1536, 32 x 197 tokens',
        functools.partial(soft_tokens, 32))
    return found


def cond_conv(num_experts: int, batch: int, size: int, in_channels: int, **shape: int) -> list[Contender]:
    """Our mixed convolution, the plain one of the same shape, and timm's with the same weights."""
    x, weights = torch.randn(batch, in_channels, size, size), torch.rand(batch, num_experts)
    ours = CondConv2d(in_channels, num_experts=num_experts, **shape)
    theirs = TimmCondConv2d(in_channels, num_experts=num_experts, **shape)
    theirs.load_state_dict(ours.state_dict())
    plain = nn.Conv2d(in_channels, padding=shape['kernel_size'] // 2, bias=False, **shape)
    return [
        Contender('CondConv2d', ours, (x, weights)),
        Contender('nn.Conv2d', plain, (x,)),
        Contender('timm CondConv2d', theirs, (x, weights)),
    ]


class _Sum(nn.Module):
    """All experts on all images: what K chosen ones cost where nobody has to choose."""

    def __init__(self, experts: Iterable[nn.Module]):
        super().__init__()
        self.experts = nn.ModuleList(experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(expert(x) for expert in self.experts)


def choose(layer: str, num_selected: int, batch: int = 8, channels: int = 256, size: int = 20) -> list[Contender]:
    """K of 4 convolutions for every image, and K convolutions for the whole batch."""
    def convs(count: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(count)]

    if layer == 'MoEConv2d':
        ours = MoEConv2d(channels, channels, 3, num_experts=4, num_selected=num_selected, noise=False)
    else:
        ours = MoEStage(convs(4), channels, num_selected, noise=False)
    x = spread_choices(ours.router, torch.randn(batch, channels, size, size))
    return [Contender(layer, ours, (x,)), Contender('chosen experts alone', _Sum(convs(num_selected)), (x,))]


def spread_choices(router: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Images whose pooled channels make a linear gate choose experts b, b + 1 ... (modulo E) for image b."""
    experts, images = router.num_experts, torch.arange(x.shape[0])
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts, router.weight.shape[1]))
        for rank in range(experts):  # 3 is far above what averaging noise leaves in a channel
            x[images, (images + rank) % experts] += 3. * (experts - rank)
    return x


class _LiveConv(ChannelGated):
    """A gated convolution with its norm, computed on live channels, of an input that has live channels only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.gate = ChannelGate(channels, 1)
        self.live = torch.arange(0, channels, 2)  # of the input; the gate keeps as many, at other places
        with torch.no_grad():
            self.gate.weight[:channels // 2] = -1.
        self.count_experts()

    def chain(self) -> list[tuple]:
        return [(self.conv, self.norm, self.gate, nn.Identity())]

    def forward(self, x: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return self.run_live(x, e, self.live)[0]


def half_live(batch: int, channels: int = 256, size: int = 14) -> list[Contender]:
    """A convolution from half of its channels to half of its channels, and the dense one; both with their norm."""
    layer, x = _LiveConv(channels), torch.randn(batch, channels, size, size)
    return [
        Contender('live channels', layer, (x[:, layer.live].contiguous(), torch.ones(batch, 1))),
        Contender('dense', nn.Sequential(layer.conv, layer.norm), (x,)),
    ]


def tokens(num_selected: int, batch: int, width: int = 384, **layer_args) -> list[Contender]:
    """K of 8 experts for every token, one dense MLP of K times the width, and the peer that drops nothing either."""
    layer = MoEMlp(width, 4 * width, num_experts=8, num_selected=num_selected, capacity_factor=None, **layer_args)
    return _beside_others(layer, batch, num_selected, 'pytorch-mixtures')


def dropping_tokens(num_selected: int, batch: int, width: int = 384, **layer_args) -> list[Contender]:
    """The same with slots for K / E of the tokens of every image, and the peers that drop what finds none."""
    layer = MoEMlp(
        width, 4 * width, num_experts=8, num_selected=num_selected, capacity=197 * num_selected // 8, group_images=1,
        **layer_args)
    others = ['mixture-of-experts'] + ['st-moe-pytorch'] * (num_selected > 1)
    return _beside_others(layer, batch, num_selected, *others)


def soft_tokens(batch: int, width: int = 384) -> list[Contender]:
    """About as many slots as tokens."""
    return _beside_others(SoftMoEMlp(width, 4 * width, num_experts=8, num_slots=25), batch, 1, 'soft-moe-pytorch')


def _beside_others(layer: MoEMlp | SoftMoEMlp, batch: int, num_selected: int, *others: str) -> list[Contender]:
    width = layer.in_features
    x = torch.randn(batch, 197, width)
    modules = {type(layer).__name__: layer, 'dense Mlp': Mlp(width, num_selected * layer.hidden_features)}
    modules |= {name: make_peer(name, layer) for name in others}
    return [Contender(name, module, (x,)) for name, module in modules.items()]


def find_cases(patterns: Iterable[str]) -> dict[str, Case]:
    """The cases of these names or shell patterns; all of them where none is given.

    Raises:
        InputError: A name or pattern that fits no case.
    """
    return select(patterns, cases(), 'layer case', ' `benchmark.py layer --list` shows all.')


def select(patterns: Iterable[str], known: dict[str, T], kind: str, otherwise: str) -> dict[str, T]:
    """What names or shell patterns choose; everything where none is given.

    Args:
        patterns: The names or patterns.
        known: What there is, by name.
        kind: What that is, for the message.
        otherwise: What the message says where no name is like the one given.

    Raises:
        InputError: A name or pattern that fits nothing.
    """
    chosen: dict[str, T] = {}
    for pattern in patterns:
        found = {name: each for name, each in known.items() if fnmatch.fnmatchcase(name, pattern)}
        if not found:
            raise InputError(f'There is no {kind} {pattern!r}.{nearest(pattern, known) or otherwise}')
        chosen |= found
    return chosen or known
