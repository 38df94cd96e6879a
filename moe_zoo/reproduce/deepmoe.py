"""DeepMoE's experiment: accuracy against executed MACs, over the weight of the gates' L1 norm, of dense, narrow and
wide networks, and what the embedding loss is good for.

Deep Mixture of Experts via Shallow Embedding, Wang et al., UAI 2019, https://arxiv.org/abs/1806.01531.
"""
from functools import partial
from typing import Any

import timm

from moe_zoo.analysis import count_images
from moe_zoo.analysis.charts import curves
from moe_zoo.analysis.page import Figure
from moe_zoo.layers import ChannelGate, sparse_inference
from moe_zoo.routing import trace_routing

from .experiment import Arm, Claim, Experiment
from .training import Data, accuracy, fit, load_images, predict

# Three residual blocks of 2 to 4 planes, so that ten digits leave something to be wished for.
BASE = {'layers': (1, 1, 1), 'channels': (2, 4, 4), 'stem_width': 2}
EMBEDDING = {'embed_widths': (4, 6)}
EPOCHS, JOINT = 16, 12  # after so many of them, embedding and gates are frozen
COUNTED = 50  # images whose MACs are counted, one at a time


def run_resnet(options: dict[str, Any], seed: int, data: Data) -> dict[str, Any]:
    """Train a network of `options`: its kind ('dense', 'narrow', 'wide') and the model keywords beside it.

    Returns:
        accuracy: Percent.
        executed: Thousand MACs of an image, mean over `COUNTED` images: live channels, embedding network and gates.
        live: Percent of the gated channels that an image uses, mean over the images.
        described: Percent of the images whose class the embedding network names.
    """
    keywords = dict(options)
    kind = keywords.pop('kind')
    images = data.test.images[:COUNTED].split(1)
    if kind == 'dense':
        model = timm.create_model('deepmoe_resnet56_cifar_dense', **BASE, **data.model_kwargs, **keywords)
        train(model, data, seed)
        return {'accuracy': accuracy(model, data.test), 'executed': count_images(model, images).mean / 1000}
    model = timm.create_model(
        'deepmoe_resnet56_cifar', width=2. if kind == 'wide' else 1., **BASE, **EMBEDDING, **data.model_kwargs,
        **keywords)
    train(model, data, seed)
    with trace_routing(model) as trace:
        predict(model, data.test.images, batch_size=len(data.test.images))
    gates = [trace[name][0].gates for name, m in model.named_modules() if isinstance(m, ChannelGate)]
    described = trace['embedding'][0].logits.argmax(dim=1) == data.test.targets
    with sparse_inference(model):
        executed = count_images(model, images).mean / 1000
    return {
        'accuracy': accuracy(model, data.test),
        'executed': executed,
        'live': 100 * sum((g > 0).sum().item() for g in gates) / sum(g.numel() for g in gates),
        'described': 100 * described.double().mean().item(),
    }


def train(model: Any, data: Data, seed: int) -> None:
    """Jointly, then with frozen gates where there are any."""
    def freeze(finished: int, model: Any) -> None:
        if finished == JOINT and hasattr(model, 'freeze_gates'):
            model.freeze_gates()

    fit(model, data, epochs=EPOCHS, batch_size=32, lr=0.2, seed=seed, shift=1, on_epoch=freeze)


def trade_off(results: dict[str, Any]) -> list[Figure]:
    """Accuracy over executed MACs: a line for every kind of network, a point for every weight of the L1 norm."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for arm in results['arms']:
        name = arm['options']['kind'] + (', no embedding loss' if 'embed_loss' in arm['options'] else '')
        point = arm['metrics']['executed']['mean'], arm['metrics']['accuracy']['mean']
        lines.setdefault(name, []).append(point)
    named = [(name, sorted(line)) for name, line in lines.items()]
    alt = '; '.join(f'{name}: {", ".join(f"{x:.0f} k {y:.1f} %" for x, y in line)}' for name, line in named)
    chart = curves(named, 'thousand MACs executed an image', 'test accuracy, %')
    return [Figure(
        chart, f'Accuracy over executed MACs. {alt}',
        'Every point is a weight of the L1 norm of the gates; the MACs are those of live channels, the embedding '
        'network and the gates.')]


def _arms() -> tuple[Arm, ...]:
    gated = [
        Arm(f'{kind} {l1:g}', {'kind': kind, 'gate_l1': l1})
        for kind, weights in (('narrow', (0.005, 0.02, 0.04)), ('wide', (0.005, 0.02, 0.03, 0.04, 0.06)))
        for l1 in weights]
    blind = [
        Arm(f'wide {l1:g}, no embedding loss', {'kind': 'wide', 'gate_l1': l1, 'embed_loss': 0.})
        for l1 in (0.005, 0.04)]
    return (Arm('dense', {'kind': 'dense'}), *gated, *blind)


UNREAD = "the paper's tables were not at hand"

DEEPMOE = Experiment(
    name='deepmoe',
    title='DeepMoE: accuracy against executed MACs',
    paper='[DeepMoE, Wang et al., UAI 2019](https://arxiv.org/abs/1806.01531)',
    question='A residual network of 3 blocks of 2, 4 and 4 planes for images of 16 x 16 pixels, in place of 27 blocks '
             'of 16 to 64 for 32 x 32: dense, with gates (narrow), and with gates and twice the inner channels (wide). '
             'The number of an arm is the weight of the L1 norm of the gates. All arms follow one recipe; gates and '
             f'embedding network are frozen after {JOINT} of {EPOCHS} epochs. `executed` is in thousand MACs of an '
             'image on live channels, everything included; the embedding network takes 5.8 of them, 14 % of the dense '
             'network where the paper is quoted with 2 %. `live` is the share of gated channels in use and `described` '
             'the share of images whose class the embedding network names, in percent.',
    arms=_arms(),
    claims=(
        Claim('wide-DeepMoE is more accurate than the dense network at no more MACs.', 'accuracy', 'wide 0.04', 'dense',
              deviation=2., source=UNREAD),
        Claim('It does execute fewer MACs.', 'executed', 'dense', 'wide 0.04', deviation=8., source=UNREAD,
              unit='thousand MACs'),
        Claim('With almost all channels live, wide-DeepMoE is more accurate than the dense network.', 'accuracy',
              'wide 0.005', 'dense', deviation=2., source=UNREAD),
        Claim('wide-DeepMoE is more accurate than narrow-DeepMoE that keeps almost all channels.', 'accuracy',
              'wide 0.04', 'narrow 0.005', deviation=2., source=UNREAD),
        Claim('The embedding loss makes sparse wide-DeepMoE more accurate.', 'accuracy', 'wide 0.04',
              'wide 0.04, no embedding loss', deviation=15., source=UNREAD),
        Claim('So it does where almost all channels are live.', 'accuracy', 'wide 0.005',
              'wide 0.005, no embedding loss', deviation=2., source=UNREAD),
    ),
    run=run_resnet,
    load=partial(load_images, size=16),
    seeds=8,
    charts=trade_off,
    cards=('deepmoe_resnet56_cifar',),
)

EXPERIMENTS = (DEEPMOE,)
