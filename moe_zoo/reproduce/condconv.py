"""CondConv's experiments: kernels mixed from experts against static ones, route functions, placement, and the
trade-off of accuracy and cost over experts and widths.

CondConv: Conditionally Parameterized Convolutions for Efficient Inference, Yang, Bender, Le, Ngiam, NeurIPS 2019,
https://arxiv.org/abs/1904.04971.
"""
from typing import Any, Optional

import timm

from moe_zoo.analysis.charts import curves
from moe_zoo.analysis.page import Figure
from moe_zoo.layers.cond_conv import ROUTE_FNS

from .experiment import Arm, Claim, Experiment
from .training import Data, accuracy, cost, fit, load_images, scattered

PAPER = '[CondConv, Yang et al., NeurIPS 2019](https://arxiv.org/abs/1904.04971)'
SETTING = (
    'The network is a MobileNetV1 of 5 separable blocks for images of 32 x 32 pixels in place of 13 for 224 x 224. All '
    'arms follow one recipe, with the learning rate that served the static network best on the validation images.'
)
FACTS = "a secondary source's notes on the paper's tables"  # figures that the paper's text was not at hand to check

# Separable blocks: 8 x 8 positions, so that mixing 8 kernels costs little beside convolving with the mixture, and at
# width 0.25 just 8 channels: too few for scattered digits, as those of MobileNetV1 are for ImageNet, so that capacity
# decides.
BLOCKS = [['dsa_r1_k3_s2_c32'], ['dsa_r4_k3_s1_c32']]
NONE = 6  # start block beyond the last: no block is mixed
STATIC = {'start_block': NONE, 'cond_fc': False}


def load(folder: Optional[str]) -> Data:
    """Digits that are turned, shrunk and moved, or the images of a folder as they are."""
    data = load_images(folder, size=32)
    return scattered(data) if folder is None else data


def run_mobilenet(options: dict[str, Any], seed: int, data: Data) -> dict[str, Any]:
    """Train a MobileNetV1 of the width in percent that `options` names, with the model keywords beside it."""
    keywords = dict(options)
    name = f'condconv_mobilenetv1_{keywords.pop("width", 25):03d}'
    model = timm.create_model(name, arch_def=BLOCKS, **data.model_kwargs, **keywords)
    fit(model, data, epochs=6, batch_size=32, lr=0.3, seed=seed)
    return {'accuracy': accuracy(model, data.test), **cost(model, data)}


def trade_off(results: dict[str, Any]) -> list[Figure]:
    """Accuracy over MACs, a line for every width, a point for every number of experts."""
    lines: dict[int, list[tuple[float, float]]] = {}
    for arm in results['arms']:
        point = arm['metrics']['macs']['mean'] / 1000, arm['metrics']['accuracy']['mean']
        lines.setdefault(arm['options']['width'], []).append(point)
    named = [(f'width {width / 100:g}', sorted(line)) for width, line in lines.items()]
    alt = '; '.join(f'{name}: {", ".join(f"{x:.0f} k {y:.1f} %" for x, y in line)}' for name, line in named)
    chart = curves(named, 'thousand MACs an image', 'test accuracy, %')
    return [Figure(chart, f'Accuracy over MACs. {alt}', 'A line is a width; its points have 1 (static) to 32 experts.')]


def _claim(text: str, better: str, worse: str, published: Optional[float] = None, source: str = '') -> Claim:
    """A claim on accuracy; the deviation is that of 8 experts and static in a pilot of 5 seeds on validation images."""
    return Claim(text, 'accuracy', better, worse, 3.2, published, source)


CONDCONV = Experiment(
    name='condconv',
    title='CondConv: 8 experts against a static network',
    paper=PAPER,
    question=f'{SETTING} Blocks 3 to 5 and the classifier are mixed from 8 experts, at 1.07 times the MACs.',
    arms=(Arm('static', STATIC), Arm('8 experts', {'start_block': 3, 'num_experts': 8})),
    claims=(_claim(
        'Kernels mixed from 8 experts make a MobileNetV1 more accurate at MACs within 10 %.', '8 experts', 'static',
        1.8, f'top-1 on ImageNet 71.9 to 73.7 %, {FACTS}'),),
    run=run_mobilenet,
    load=load,
    seeds=30,
    cards=('condconv_mobilenetv1_025',),
)

ROUTES = Experiment(
    name='condconv-routes',
    title='CondConv: route functions',
    paper=PAPER,
    question=f'{SETTING} All blocks but the first and the classifier are mixed from 8 experts (32 in the paper). What '
             'the functions but `sigmoid` and `softmax` are is ours: the paper names them, and its definitions were '
             'not at hand.',
    arms=tuple(Arm(name, {'start_block': 2, 'num_experts': 8, 'route_fn': name}) for name in ROUTE_FNS),
    claims=(
        _claim('Independent sigmoids route better than a softmax.', 'sigmoid', 'softmax',
               1.5, f'MobileNetV1 0.25, 32 experts, ImageNet top-1 62.0 and 60.5 %, {FACTS}'),
        _claim('A router in every block is better than one for all of them.', 'sigmoid', 'single'),
        _claim('A router in every block is better than one for two blocks.', 'sigmoid', 'partially_shared'),
        _claim('A linear router is better than one with a small hidden layer.', 'sigmoid', 'hidden_small'),
        _claim('A medium hidden layer is better than none.', 'hidden_medium', 'sigmoid'),
        _claim('A linear router is better than one with a large hidden layer.', 'sigmoid', 'hidden_large'),
        _claim('Routers are better off without the decision before theirs.', 'sigmoid', 'hierarchical'),
    ),
    run=run_mobilenet,
    load=load,
    seeds=12,
    cards=('condconv_mobilenetv1_025',),
)

STARTS = {1: 'all blocks', 3: 'blocks 3 to 5', 5: 'block 5', NONE: 'no block'}

PLACEMENT = Experiment(
    name='condconv-placement',
    title='CondConv: which layers to mix',
    paper=PAPER,
    question=f'{SETTING} 8 experts (32 in the paper) in the blocks from a start block on, with the classifier (FC) or '
             'without.',
    arms=tuple(
        Arm(f'{blocks}{" + FC" if fc else ""}', {'start_block': start, 'cond_fc': fc, 'num_experts': 8})
        for start, blocks in STARTS.items() for fc in (True, False)),
    claims=(
        _claim('Mixing the later half of the blocks is better than mixing the classifier alone.',
               'blocks 3 to 5 + FC', 'no block + FC',
               7.8, f'first mixed block 7 of 13 and none, ImageNet top-1 62.0 and 54.2 %, {FACTS}'),
        _claim('Mixing all blocks is better than mixing the last.', 'all blocks + FC', 'block 5 + FC',
               3., f'first mixed block 1 and 13, 62.5 and 59.5 %, {FACTS}'),
        _claim('Mixing all blocks is better than mixing their later half.', 'all blocks + FC', 'blocks 3 to 5 + FC',
               .5, f'first mixed block 1 and 7, 62.5 and 62.0 %, {FACTS}'),
        _claim('Mixing the classifier helps beside mixed blocks.', 'blocks 3 to 5 + FC', 'blocks 3 to 5'),
    ),
    run=run_mobilenet,
    load=load,
    seeds=12,
    cards=('condconv_mobilenetv1_025',),
)

WIDTHS, EXPERTS = (25, 50, 75, 100), (1, 2, 4, 8, 16, 32)


def _grid_options(width: int, num_experts: int) -> dict[str, Any]:
    mixed = {'start_block': 3, 'num_experts': num_experts} if num_experts > 1 else STATIC
    return {'width': width, **mixed}


GRID = Experiment(
    name='condconv-experts',
    title='CondConv: accuracy against cost over experts and widths',
    paper=PAPER,
    question=f'{SETTING} Blocks 3 to 5 and the classifier are mixed. An arm `0.5 x 8` has width 0.5 and 8 experts; '
             'with 1 it is the static network.',
    arms=tuple(Arm(f'{w / 100:g} x {n}', _grid_options(w, n)) for w in WIDTHS for n in EXPERTS),
    claims=(
        _claim('32 experts make a MobileNetV1 of width 0.5 more accurate.', '0.5 x 32', '0.5 x 1',
               7.8, 'ImageNet top-1 63.8 to 71.6 %, abstract of the first version, whose MACs fit 32 experts'),
        _claim('32 experts make a MobileNetV1 of width 1.0 more accurate.', '1 x 32', '1 x 1',
               3.9, '71.9 to 75.8 %, abstract on OpenReview, whose MACs fit 32 experts'),
        _claim('32 experts make a MobileNetV1 of width 0.25 more accurate.', '0.25 x 32', '0.25 x 1'),
        _claim('At width 0.25, 32 experts are better than 2.', '0.25 x 32', '0.25 x 2'),
    ),
    run=run_mobilenet,
    load=load,
    seeds=8,
    cards=('condconv_mobilenetv1_050',),
    charts=trade_off,
)

EXPERIMENTS = (CONDCONV, ROUTES, PLACEMENT, GRID)
