"""CondConv's experiments: kernels mixed from experts, against a static network of the same cost.

CondConv: Conditionally Parameterized Convolutions for Efficient Inference, Yang, Bender, Le, Ngiam, NeurIPS 2019,
https://arxiv.org/abs/1904.04971.
"""
from functools import partial
from typing import Any

import timm

from .experiment import Arm, Claim, Experiment
from .training import Data, accuracy, cost, fit, load_images

PAPER = '[CondConv, Yang et al., NeurIPS 2019](https://arxiv.org/abs/1904.04971)'

# A MobileNetV1 of five blocks for small images; with channels of width 0.25 it is far too small for ten digits, as
# MobileNetV1 is for ImageNet, which is where more capacity at the same cost can show.
SMALL = [['dsa_r1_k3_s1_c32'], ['dsa_r2_k3_s1_c64'], ['dsa_r2_k3_s2_c64']]
STATIC = {'start_block': 6, 'cond_fc': False}


def run_small(options: dict[str, Any], seed: int, data: Data) -> dict[str, Any]:
    """Train the small MobileNetV1 with the model keywords in `options`."""
    model = timm.create_model('condconv_mobilenetv1_025', arch_def=SMALL, **data.model_kwargs, **options)
    fit(model, data, epochs=12, batch_size=32, lr=0.05, seed=seed, shift=1)
    return {'accuracy': accuracy(model, data.test), **cost(model, data)}


EXPERIMENTS = (
    Experiment(
        name='condconv',
        title='CondConv: 8 experts against a static network',
        paper=PAPER,
        question='',
        arms=(Arm('static', STATIC), Arm('8 experts', {'start_block': 3, 'num_experts': 8})),
        claims=(Claim(
            'Mixing kernels from 8 experts makes a MobileNetV1 more accurate at MACs within 10 %.',
            'accuracy', '8 experts', 'static', deviation=3., published=1.8,
            source='MobileNetV1 on ImageNet, top-1 71.9 to 73.7 %'),),
        run=run_small,
        load=partial(load_images, size=32),
        seeds=10,
    ),
)
