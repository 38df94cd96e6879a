"""Dynamic Convolution's experiment: the temperature of the attention over kernels.

Dynamic Convolution: Attention over Convolution Kernels, Chen, Dai, Liu, Chen, Yuan, Liu, CVPR 2020,
https://arxiv.org/abs/1912.03458.
"""
import copy
import math
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from moe_zoo.layers import DynamicConv2d
from moe_zoo.routing import trace_routing

from .experiment import Arm, Claim, Experiment
from .training import Data, accuracy, cost, fit, load_images, predict

FACTS = "MobileNetV2 0.5x on ImageNet, a secondary source's notes on the paper's table of temperatures"

# Six blocks at half width: deep enough for kernels and attentions to get into each other's way.
BLOCKS = [['ds_r1_k3_s1_c16'], ['ir_r2_k3_s2_e6_c24'], ['ir_r4_k3_s1_e6_c24']]
IMAGES = 100  # to learn from: with all of them nothing is left to gain


def run_mobilenet(options: dict[str, Any], seed: int, data: Data) -> dict[str, Any]:
    """Train a dynamic MobileNetV2 with these keywords; raw weights, their average, and what the attention is good for.

    Returns:
        accuracy, accuracy_ema: With the weights of the last step, and with their moving average.
        average_kernel, best_kernel: Accuracy where every image gets the plain average of the kernels, or the one kernel
            that its attention prefers.
        evenness: Entropy of the attention in shares of its maximum, over layers and images; 1 is the plain average.
    """
    model = timm.create_model(
        'dyconv_mobilenetv2_050', arch_def=BLOCKS, num_features=64, **data.model_kwargs, **options)
    some = torch.randperm(len(data.train.targets), generator=torch.Generator().manual_seed(seed))[:IMAGES]
    few = data._replace(train=data.train.take(some))
    average = fit(model, few, epochs=60, batch_size=32, lr=0.4, seed=seed, shift=1, ema=0.97)
    return {
        'accuracy': accuracy(model, data.test),
        'accuracy_ema': accuracy(average, data.test),
        'average_kernel': accuracy(sharpened(model, 0.), data.test),
        'best_kernel': accuracy(sharpened(model, 1e6), data.test),
        'evenness': evenness(model, data),
        **cost(model, data),
    }


def sharpened(model: nn.Module, factor: float) -> nn.Module:
    """A copy whose attentions are softmax(factor z): 0 gives the average kernel, a large one the best alone."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, DynamicConv2d):
            module.routing_fn.temper = lambda logits: factor * logits
    return model


def evenness(model: nn.Module, data: Data) -> float:
    """Mean entropy of the attentions on the test images, divided by ln K; 1 for a single kernel."""
    with trace_routing(model) as trace:
        predict(model, data.test.images)
    weights = torch.stack([torch.cat([record.weights for record in records]) for records in trace.values()])
    entropy = torch.special.entr(weights).sum(dim=-1).mean().item()  # weights: (layers, images, K)
    return entropy / math.log(weights.shape[-1]) if weights.shape[-1] > 1 else 1.


TEMPERATURE = Experiment(
    name='dyconv-temperature',
    title='Dynamic Convolution: the temperature of the attention',
    paper='[Dynamic Convolution, Chen et al., CVPR 2020](https://arxiv.org/abs/1912.03458)',
    question=f'A MobileNetV2 of half width with 7 blocks for images of 16 x 16 pixels, in place of 17 for 224 x 224, '
             f'learns from {IMAGES} images, others for every seed, for 60 epochs, at the learning rate that served the '
             'static network best on the validation images. Each of its 20 dynamic convolutions mixes 4 kernels; '
             'static is the same network with one. The temperature is constant, or falls from 30 to 1 over the first '
             '10 epochs. `accuracy_ema` is that of a moving average of the weights; `average_kernel` and `best_kernel` '
             'are those of the trained network whose attention is made flat, or takes its maximum alone.',
    arms=(
        Arm('static', {'num_experts': 1}),
        Arm('T = 1', {'temperature': 1., 'anneal_epochs': 0}),
        Arm('T = 30', {'temperature': 30., 'anneal_epochs': 0}),
        Arm('T = 30 to 1', {'temperature': 30., 'anneal_epochs': 10}),
    ),
    claims=(
        Claim('Annealing the temperature from 30 to 1 makes a dynamic network more accurate than a temperature of 1.',
              'accuracy', 'T = 30 to 1', 'T = 1', deviation=2., published=5.1, source=f'69.9 and 64.8 %, {FACTS}'),
        Claim('So it does by the moving average of the weights.', 'accuracy_ema', 'T = 30 to 1', 'T = 1', 2.),
        Claim('A constant temperature of 30 is better than one of 1.', 'accuracy', 'T = 30', 'T = 1', 2.,
              published=4.6, source=f'69.4 and 64.8 %, {FACTS}'),
        Claim('Annealing is better than a constant temperature of 30.', 'accuracy', 'T = 30 to 1', 'T = 30', 2.,
              published=.5, source=f'69.9 and 69.4 %, {FACTS}'),
        Claim('The annealed dynamic network is better than the static one.', 'accuracy', 'T = 30 to 1', 'static', 2.,
              published=4.5, source=f'69.9 and 65.4 %, {FACTS}'),
        Claim('At a temperature of 1 throughout, the dynamic network is worse than the static one.', 'accuracy',
              'static', 'T = 1', 2., published=.6, source=f'65.4 and 64.8 %, {FACTS}'),
    ),
    run=run_mobilenet,
    load=partial(load_images, size=16),
    seeds=16,
    cards=('dyconv_mobilenetv2_050',),
)

EXPERIMENTS = (TEMPERATURE,)
