"""pMoE's experiments on synthetic MNIST: accuracy against the number of training images, and a shortcut that fails.

Patch-level Routing in Mixture-of-Experts is Provably Sample-efficient for Convolutional Neural Networks, Chowdhury,
Zhang, Wang, Liu, Chen, ICML 2023, https://arxiv.org/abs/2306.04073.
"""
from functools import partial
from typing import Any, NamedTuple, Optional

import timm
import torch
from torch import nn

from moe_zoo.analysis.charts import curves
from moe_zoo.analysis.page import Figure
from moe_zoo.analysis.patches import patch_precision, right_experts
from moe_zoo.data import build_synthetic_mnist, load_digit_sources, shade_border
from moe_zoo.routing import trace_routing

from .experiment import Arm, Claim, Experiment
from .training import Data, Split, accuracy, fit, predict

PAPER = '[pMoE, Chowdhury et al., ICML 2023](https://arxiv.org/abs/2306.04073)'
COUNTS = (20, 50, 100, 200, 400)  # training images
EPOCHS = 150  # of experts and CNNs, as the authors'
SHADE = 64  # of a frame, of 255; the other shade is black
AGREEMENT = 0.95

# Each with the learning rate of 0.005 to 0.16, by factors of 2, that served it best on the validation images. Whatever
# is not here is the model's default: 40 filters in all, joint training of 8 experts on 6 of 16 patches.
CNN = {'model': 'pmoe_cnn_dense', 'lr': 0.02}
SMALL_CNN = {'model': 'pmoe_cnn_dense', 'lr': 0.02, 'num_filters': 4}
JOINT = {'model': 'pmoe_cnn', 'lr': 0.08}
SEPARATE = {
    'model': 'pmoe_cnn', 'lr': 0.08, 'num_experts': 2, 'patches_per_expert': 2, 'gate_order': 'hard',
    'output_weights': 'signed', 'init_std': 0.1, 'router_init_std': 0.1, 'router_epochs': 100,
}
RANDOM = {'model': 'pmoe_cnn', 'lr': 0.04, 'gate_order': 'hard'}  # no gradient reaches these routers


class PatchSplit(NamedTuple):
    """As `Split`, with the patch of each image that shows the label, and pixels from 0 to 1."""
    images: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor


def load_patches(folder: Optional[str], framed: bool = False) -> Data:
    """Synthetic MNIST: 2,000 images to draw training images from, 1,000 for validation and for test.

    Args:
        folder: With an npz of MNIST; None takes scikit-learn's digits.
        framed: Frame every image in the shade of its class, for a share of `AGREEMENT`.
    """
    splits = []
    for seed, (source, count) in enumerate(zip(load_digit_sources(folder).values(), (2000, 1000, 1000))):
        built = build_synthetic_mnist(source, count, seed=seed)
        if framed:
            built = shade_border(built, AGREEMENT, shades=(0, SHADE), seed=seed)
        splits.append(PatchSplit(
            torch.from_numpy(built.images).unsqueeze(1) / 255, torch.from_numpy(built.labels),
            torch.from_numpy(built.positions)))
    digits = "scikit-learn's digits" if folder is None else 'MNIST'
    size = '{} x {} pixels'.format(*splits[0].images.shape[2:])
    return Data(*splits, 2, f'16 of {digits} an image, {size}: 2,000 train, 1,000 validation, 1,000 test')


def train(options: dict[str, Any], data: Data, count: int, seed: int) -> nn.Module:
    """Train a network of `options`, its name and learning rate and the model keywords beside them, on few images.

    The images of a seed are half of either class, and those of a smaller count are among those of a larger one. The
    same options, count and seed give the same network.
    """
    keywords = dict(options)
    name, lr = keywords.pop('model'), keywords.pop('lr')
    order = torch.randperm(len(data.train.targets), generator=torch.Generator().manual_seed(seed))
    some = torch.cat([order[data.train.targets[order] == label][:count // 2] for label in (0, 1)])
    torch.manual_seed(1000 * seed + count)
    model = timm.create_model(name, patch_size=data.train.images.shape[-1] // 4, **data.model_kwargs, **keywords)
    few = data._replace(train=Split(data.train.images[some], data.train.targets[some]))
    fit(model, few, epochs=EPOCHS + keywords.get('router_epochs', 0), batch_size=20, lr=lr, seed=seed, weight_decay=0.,
        warmup_epochs=0, sched='none')
    return model


def run_samples(options: dict[str, Any], seed: int, data: Data) -> dict[str, Any]:
    """Learn from more and more images.

    Returns:
        accuracy_N: With N training images, percent.
        samples, samples_equal: Training images that reach the accuracy of the CNN of 4 and of 40 filters with all
            images, in percent of all; 100 where they do not, and for that CNN itself.
        label_kept, others_dropped: See `precision`, with all images; for networks with routers.
    """
    models = {count: train(options, data, count, seed) for count in COUNTS}
    curve = {count: accuracy(model, data.test) for count, model in models.items()}
    samples = {}
    for name, cnn in (('samples', SMALL_CNN), ('samples_equal', CNN)):
        if options == cnn:
            samples[name] = 100.
        else:
            samples[name] = needed(curve, accuracy(train(cnn, data, COUNTS[-1], seed), data.test))
    return {
        **{f'accuracy_{count}': percent for count, percent in curve.items()},
        **samples,
        **(precision(models[COUNTS[-1]], options, data) if options['model'] == 'pmoe_cnn' else {}),
    }


def needed(curve: dict[int, float], level: float) -> float:
    """Where a curve, straight between its points, first reaches a level: in percent of its last point, which caps it.

    Below the first point nothing was measured: a curve that begins above the level needs its first point.
    """
    counts = list(curve)
    for before, count in zip([counts[0], *counts], counts):
        if curve[count] >= level:
            rise = curve[count] - curve[before]
            share = 1. if rise == 0 else (level - curve[before]) / rise
            return 100 * (before + share * (count - before)) / counts[-1]
    return 100.


def precision(model: nn.Module, options: dict[str, Any], data: Data) -> dict[str, float]:
    """Discriminative routing on the test images, percent.

    Returns:
        label_kept: Images whose label patch is taken by the expert of its class.
        others_dropped: Of the other patches, those that this expert drops. In joint training the expert of a class is
            the one that takes its label patch most often on the validation images.
    """
    right = torch.arange(2)
    if options.get('output_weights') != 'signed':
        right = right_experts(_record(model, data.validation), data.validation.positions, data.validation.targets, 2)
    found = patch_precision(_record(model, data.test), data.test.positions, right[data.test.targets])
    return {'label_kept': 100 * found.kept, 'others_dropped': 100 * found.dropped}


def _record(model: nn.Module, split: PatchSplit):
    with trace_routing(model) as trace:
        predict(model, split.images, batch_size=len(split.images))
    return trace['stages.0'][0]


def run_spurious(options: dict[str, Any], seed: int, data: Data) -> dict[str, Any]:
    """Learn from images whose frame agrees with the label on 95 of 100.

    Returns:
        accuracy: Where it disagrees on 95 of 100: every test image with the other frame.
        accuracy_agree: On the test images as they are, where it agrees as in training.
        label_kept, others_dropped: As in `run_samples`, on these.
    """
    model = train(options, data, COUNTS[-1], seed)
    return {
        'accuracy': accuracy(model, Split(other_frame(data.test.images), data.test.targets)),
        'accuracy_agree': accuracy(model, data.test),
        **(precision(model, options, data) if options['model'] == 'pmoe_cnn' else {}),
    }


def other_frame(images: torch.Tensor) -> torch.Tensor:
    """(N, 1, H, W) framed images, each with the frame of the other class."""
    other = SHADE / 255 - images
    other[..., 1:-1, 1:-1] = images[..., 1:-1, 1:-1]
    return other


def learning_curves(results: dict[str, Any]) -> list[Figure]:
    """Accuracy over training images, a line an arm."""
    lines = [
        (arm['name'], [(count, arm['metrics'][f'accuracy_{count}']['mean']) for count in COUNTS])
        for arm in results['arms']]
    alt = '; '.join(f'{name}: {", ".join(f"{x} images {y:.1f} %" for x, y in line)}' for name, line in lines)
    return [Figure(curves(lines, 'training images', 'test accuracy, %'), f'Accuracy over training images. {alt}',
                   'Mean over the seeds.')]


SETTING = (
    'An image shows 16 digits: a 0 or a 1, its class, in a random place, and 15 others from 2 to 9. Training, '
    'validation and test share no digit. `CNN` has 40 filters of patch size, as many as all experts of pMoE together; '
    'output weights are random and fixed. In joint training 8 experts take 6 patches of each image; in separate '
    'training 2 experts, one a class, take 2, by routers that a linear loss has trained before. `random routers` are '
    'those of joint training, never trained. Epochs, batch size and initialisation are those of the code of the '
    'authors; with momentum, and two logits in place of one. `label_kept`: images whose label patch is taken by the '
    'expert of their class; `others_dropped`: other patches that it drops. Chance is 37.5 and 62.5 % for 8 experts, '
    '12.5 and 87.5 % for 2. ')
MARKS = 'reference lines in the plotting code of the authors: 600 images of pMoE reach the CNN of 4 filters with 1,000'

SAMPLES = Experiment(
    name='pmoe-samples',
    title='pMoE: how many training images it takes',
    paper=PAPER,
    question=SETTING + f'Networks learn from {", ".join(map(str, COUNTS))} images. `samples`: how many of them, in '
             f'percent of {COUNTS[-1]}, reach the accuracy of the CNN of 4 filters, which the code of the authors has, '
             'with all; `samples_equal`: that of the CNN of 40.',
    arms=(
        Arm('CNN of 4 filters', SMALL_CNN), Arm('CNN', CNN), Arm('pMoE joint', JOINT), Arm('pMoE separate', SEPARATE),
        Arm('random routers', RANDOM)),
    claims=(
        Claim('Joint pMoE needs fewer training images than the CNN of equal hidden size to be as accurate as that is '
              'with all.', 'samples_equal', 'CNN', 'pMoE joint', deviation=4., unit='points of 100'),
        Claim('It needs fewer than the CNN of 4 filters, with which the authors compare it.', 'samples',
              'CNN of 4 filters', 'pMoE joint', 4., published=40., source=MARKS, unit='points of 100'),
        Claim('Separately trained pMoE needs fewer than the CNN of equal hidden size.', 'samples_equal', 'CNN',
              'pMoE separate', 8., unit='points of 100'),
        Claim('From 100 images joint pMoE is more accurate than the CNN of equal hidden size.', 'accuracy_100',
              'pMoE joint', 'CNN', 4.),
        Claim('From 100 images joint training is better than separate training.', 'accuracy_100', 'pMoE joint',
              'pMoE separate', 3.),
        Claim('What helps is what the routers learn: random ones do worse.', 'accuracy_400', 'pMoE joint',
              'random routers', 10.),
        Claim('Joint training teaches an expert to keep the label patch of its class.', 'label_kept', 'pMoE joint',
              'random routers', 12.),
    ),
    run=run_samples,
    load=load_patches,
    seeds=8,
    charts=learning_curves,
    cards=('pmoe_cnn',),
)

SPURIOUS = Experiment(
    name='pmoe-spurious',
    title='pMoE: a shortcut that fails',
    paper=PAPER,
    question=SETTING + f'Every image has a frame of one pixel, black or a dark grey ({SHADE} of 255), which agrees '
             f'with the class of {AGREEMENT:.0%} of the {COUNTS[-1]} training images. `accuracy` is measured with the '
             f'other frame, which agrees with {1 - AGREEMENT:.0%}, `accuracy_agree` on test images framed as for '
             'training. In the paper the shortcut is the colour of hair in photographs of faces; what is known of its '
             'result is that pMoE reaches the plain network with a fifth fewer images, no difference of accuracies.',
    arms=(
        Arm('CNN of 4 filters', SMALL_CNN), Arm('CNN', CNN), Arm('pMoE joint', JOINT), Arm('pMoE separate', SEPARATE),
        Arm('random routers', RANDOM)),
    claims=(
        Claim('Where the shortcut fails, joint pMoE is more accurate than the CNN of equal hidden size.', 'accuracy',
              'pMoE joint', 'CNN', deviation=7.),
        Claim('So is separately trained pMoE.', 'accuracy', 'pMoE separate', 'CNN', 5.),
        Claim('Joint training resists the shortcut better than separate training.', 'accuracy', 'pMoE joint',
              'pMoE separate', 7.),
        Claim('Where the shortcut holds, joint pMoE is more accurate, too.', 'accuracy_agree', 'pMoE joint', 'CNN', 1.),
    ),
    run=run_spurious,
    load=partial(load_patches, framed=True),
    seeds=10,
    cards=('pmoe_cnn',),
)

EXPERIMENTS = (SAMPLES, SPURIOUS)
