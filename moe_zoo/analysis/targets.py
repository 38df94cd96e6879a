"""The ratios that `tools/benchmark.py` aims at, in one table, and whether a measurement reaches them.

Of a model, the ratio is to its dense twin at 32 images, of a layer to the contender that is named, everywhere on two
threads of a CPU. A row is what the benchmarks make: a dictionary with `kind`, `mode`, `twin` and, by kind, `model`,
`case` or `config`.
"""
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .timing import Ratio

PEERS = ('timm CondConv2d', 'pytorch-mixtures', 'mixture-of-experts', 'st-moe-pytorch', 'soft-moe-pytorch')
WORD = 4  # bytes of a float32

Row = Mapping[str, Any]


class Target(NamedTuple):
    """Attributes:
        at_most: The ratio aimed at.
        about: What is compared, for people.
        match: Fields of a row to the value, or shell pattern, that they have where the target is meant.
        what: 'time', or 'memory' of a training step.
    """
    at_most: float
    about: str
    match: Mapping[str, Any]
    what: str = 'time'

    def fits(self, row: Row) -> bool:
        """Is the target about this row?"""
        return all(fnmatch.fnmatchcase(str(row.get(key)), str(value)) for key, value in self.match.items())


class Judgement(NamedTuple):
    """What became of a target in one row; `measured` is the ratio, or that it cannot be told."""
    target: Target
    row: Row
    measured: str
    verdict: str


def _model(name: str, forward: float, train: float, **match: Any) -> list[Target]:
    match = {'kind': 'model', 'model': name, 'batch_size': 32, 'equal_macs': False, 'live': None,
             'twin_channels_last': False} | match
    twin = ('its dense twin' + ', made as wide as MACs are equal' * match['equal_macs']
            + ' in channels-last memory, as ours' * match['twin_channels_last'])
    return [Target(forward, f'{name}, 32 images, forward, to {twin}', match | {'mode': 'forward'}),
            Target(train, f'{name}, 32 images, training step, to {twin}', match | {'mode': 'train'})]


def _layer(at_most: float, about: str, case: str, twin: str, mode: str = '*') -> Target:
    words = {'forward': ', forward', 'train': ', forward and backward'}.get(mode, '')
    return Target(at_most, about + words, {'kind': 'layer', 'case': case, 'twin': twin, 'mode': mode})


TARGETS = (
    *_model('condconv_mobilenetv2_100', 1.25, 1.25),
    *_model('condconv_resnet50', 1.25, 1.35),
    *_model('dyconv_resnet18', 1.30, 1.35),
    *_model('vmoe_vit_s', 1.10, 1.12, equal_macs=True),
    *_model('moe_resnet18', 1.15, 1.20),
    *_model('condconv_mobilenetv2_100', 1.25, 1.25, twin_channels_last=True),
    *_model('condconv_resnet50', 1.25, 1.35, twin_channels_last=True),
    *_model('dyconv_resnet18', 1.30, 1.35, twin_channels_last=True),
    *_model('moe_resnet18', 1.15, 1.20, twin_channels_last=True),
    Target(1.30, 'vmoe_vit_s, 32 images, memory of a training step beyond weights and moments, less the gradients of '
           'the experts that the twin has not, to its dense twin, made as wide as MACs are equal',
           {'kind': 'model', 'model': 'vmoe_vit_s', 'batch_size': 32, 'equal_macs': True, 'mode': 'train'}, 'memory'),
    Target(0.60, 'deepmoe_resnet50, one image, half of the channels live: those alone computed, embedding included, to '
           'all computed and masked', {'kind': 'model', 'model': 'deepmoe_resnet50', 'batch_size': 1, 'live': 0.5}),
    *(_layer(1., f'a layer to that of {peer}', '*', peer, 'train') for peer in PEERS),
    _layer(1., 'CondConv 1x1, 4 experts, 8 or 32 images, to that of timm', 'condconv-1x1-e4-b[!1]*', PEERS[0],
           'forward'),
    _layer(1.10, 'CondConv 1x1, 4 experts, 8 images, to nn.Conv2d', 'condconv-1x1-e4-b8', 'nn.Conv2d'),
    _layer(1.10, 'CondConv 1x1, 4 experts, 32 images, to nn.Conv2d', 'condconv-1x1-e4-b32', 'nn.Conv2d'),
    _layer(1 / 1.5, 'CondConv 3x3, 4 experts, 32 images, to that of timm', 'condconv-3x3-e4-b32', PEERS[0], 'forward'),
    _layer(1.05, '32 x 197 tokens, 1 or 2 of 8 experts, to a dense MLP of equal MACs', 'tokens-k?-b32', 'dense Mlp',
           'forward'),
    _layer(1.15, '32 x 197 tokens, 1 or 2 of 8 experts, to a dense MLP of equal MACs', 'tokens-k?-b32', 'dense Mlp',
           'train'),
    _layer(1.15, '1 of 4 convolutions, 8 images, to that one alone', 'moe-conv-k1-b8', 'chosen experts alone'),
    _layer(1.15, '1 of 4 stages, 8 images, to that one alone', 'moe-stage-k1-b8', 'chosen experts alone'),
    _layer(0.75, 'a gated convolution, one image, half of the channels live on both sides, to the dense one',
           'deepmoe-half-b1', 'dense'),
    Target(1.10, 'a detector with experts in res5, forward, to its dense twin of equal MACs',
           {'kind': 'detector', 'mode': 'forward', 'twin': '*, dense and wider', 'equal_macs': True, 'first': False}),
    Target(0.25, "COCO's metrics by faster-coco-eval, to pycocotools", {'kind': 'coco-eval'}),
)


def aim_of(row: Row) -> float | None:
    """The ratio of time that a row aims at, if any."""
    return next((target.at_most for target in TARGETS if target.what == 'time' and target.fits(row)), None)


def judged(row: Row) -> dict[str, Any]:
    """A row with `at_most` and `verdict` of its time: 'reached', 'missed', 'not resolved', or '' without an aim."""
    aim = aim_of(row)
    return {**row, 'at_most': aim, 'verdict': '' if aim is None else Ratio(**row['time_ratio']).judge(aim)}


def judge(rows: Iterable[Row]) -> list[Judgement]:
    """Every target in every row that it is about, in the order of the table."""
    rows, found = list(rows), []
    for target in TARGETS:
        for row in filter(target.fits, rows):
            if target.what == 'memory':
                share = memory_ratio(row)
                found.append(Judgement(
                    target, row, f'{share:.2f}', 'reached' if share <= target.at_most else 'missed'))
            else:
                ratio = Ratio(**row['time_ratio'])
                found.append(Judgement(target, row, str(ratio), ratio.judge(target.at_most)))
    return found


def memory_ratio(row: Row) -> float:
    """Memory of a training step of a model to that of its twin, gradients of the model's further parameters left out.

    Both hold activations and gradients, and neither weights nor moments, which are there before: what further
    parameters need of those is theirs.
    """
    gradients = WORD * (row['parameters'] - row['twin_parameters'])
    return (row['memory'] - gradients) / row['twin_memory']
