"""V-MoE's experiment: accuracy against the capacity of experts in evaluation, with and without batch priority.

Scaling Vision with Sparse Mixture of Experts, Riquelme et al., NeurIPS 2021, https://arxiv.org/abs/2106.05974.
Letters: N images, T tokens of a batch, K chosen experts, C channels, H x W pixels.
"""
import contextlib
from collections.abc import Iterator
from typing import Any, Optional

import timm
import torch
from torch import nn
from torch.nn import functional as F

from moe_zoo.analysis.charts import curves
from moe_zoo.analysis.force import rewrite_routing
from moe_zoo.analysis.page import Figure
from moe_zoo.layers import MoEMlp
from moe_zoo.routing import Routing, trace_routing

from .experiment import Arm, Claim, Experiment
from .training import Data, Split, accuracy, fit, load_images, shifted

SIDE, PATCH, MARGIN = 32, 4, 8
CAPACITIES = (.05, .1, .2, .3, .5, .75, 1., 2., 8.)  # with one of 8 experts a token, 8 drops nothing
SMALL = .2  # where the claims are tested first
BATCH = 71  # images a group in evaluation; it divides the 355 test images of the digits


def load(folder: Optional[str]) -> Data:
    """Digits of half the side of an image, centred for training and elsewhere in other images; or those of a folder."""
    if folder is not None:
        return load_images(folder, SIDE)
    data = load_images(None, SIDE - 2 * MARGIN)
    ground = data.train.images.min().item()
    parts = [split._replace(images=F.pad(split.images, (MARGIN,) * 4, value=ground)) for split in data[:3]]
    for part in (1, 2):
        moved = shifted(parts[part].images, MARGIN, torch.Generator().manual_seed(part))
        parts[part] = parts[part]._replace(images=moved)
    return Data(*parts, data.num_classes, f'{data.description}, anywhere on a ground of {SIDE} x {SIDE}')


def run_orders(options: list[dict[str, Any]], seed: int, data: Data) -> list[dict[str, Any]]:
    """Train one V-MoE, and evaluate it once for every arm: its `order` is that in which experts serve tokens.

    Returns:
        accuracy_C: Percent, where experts have slots for C times the tokens' choices; at 8 nothing is dropped.
        dropped_C: Percent of the choices that found no slot.
        busy, calm: At `SMALL`, percent of the first choices that found a slot: those of the quarter of an image's
            patches with the most contrast, and those of the others.
    """
    model = timm.create_model(
        'vmoe_vit_s', img_size=SIDE, patch_size=PATCH, embed_dim=64, depth=4, num_heads=4, moe_layers=(0, 1, 2, 3),
        num_selected=1, representation_size=0, **data.model_kwargs)
    fit(model, data, epochs=20, batch_size=32, lr=2e-3, opt='adamw', weight_decay=.05, warmup_epochs=2, seed=seed,
        shift=MARGIN)
    return [measure(model, data.test, each['order']) for each in options]


def measure(model: nn.Module, split: Split, order: str) -> dict[str, float]:
    """What `run_orders` returns of an order."""
    found = {}
    for capacity in CAPACITIES:
        with serving(model, order, capacity), trace_routing(model) as trace:
            found[f'accuracy_{capacity:g}'] = accuracy(model, split, BATCH)
        records = [routing for each in trace.values() for routing in each]
        found[f'dropped_{capacity:g}'] = 100 * sum(r.dropped().item() for r in records) / len(records)
        if capacity == SMALL:
            found.update(kept_by_contrast(records, split.images))
    return found


@contextlib.contextmanager
def serving(model: nn.Module, order: str, capacity: float) -> Iterator[None]:
    """Let experts have so many slots in evaluation, served in this order over all images of a batch.

    Args:
        model: Its `MoEMlp`s are set back afterwards.
        order: 'position' (image by image), 'priority' (by falling largest gate) or 'random' (by falling largest gate of
            a random router, while experts and weights are chosen as ever).
        capacity: Factor on T K / E slots an expert.
    """
    settings = {'group_images': BATCH, 'eval_capacity_factor': capacity, 'batch_priority': order != 'position'}
    layers = [module for module in model.modules() if isinstance(module, MoEMlp)]
    before = [{name: getattr(layer, name) for name in settings} for layer in layers]
    generator = torch.Generator().manual_seed(0)

    def shuffle(name: str, routing: Routing) -> Routing:
        return routing._replace(logits=torch.randn(routing.logits.shape, generator=generator))

    with contextlib.ExitStack() as stack:
        for layer, own in zip(layers, before):
            stack.callback(vars(layer).update, own)
            vars(layer).update(settings)
        if order == 'random':
            stack.enter_context(rewrite_routing(model, shuffle))
        yield


def kept_by_contrast(records: list[Routing], images: torch.Tensor) -> dict[str, float]:
    """`busy` and `calm`, see `run_orders`.

    Args:
        records: Of all layers, in any order as long as the batches of a layer are in theirs.
        images: (N, C, H, W).
    """
    patches = F.unfold(images, PATCH, stride=PATCH)  # (N, C * patch area, patches)
    contrast = patches.std(dim=1)
    rank = contrast.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    busy = rank < contrast.shape[1] // 4  # (N, patches)
    kept = torch.cat([_first_kept(routing) for routing in records]).view(-1, *busy.shape)  # (layers, N, patches)
    return {
        name: 100 * kept[:, which].double().mean().item() for name, which in (('busy', busy), ('calm', ~busy))}


def _first_kept(routing: Routing) -> torch.Tensor:
    """(B, patches) bool: whether the first choice of a patch found a slot; class tokens left out."""
    first = torch.ones(routing.shape, dtype=torch.bool)
    if routing.kept is not None:
        first = routing.kept[:, 0].view(routing.shape)
    return first[:, 1:]


def capacity_curves(results: dict[str, Any]) -> list[Figure]:
    """Accuracy over capacity, a line an order."""
    lines = [
        (arm['name'], [(c, *(arm['metrics'][f'accuracy_{c:g}'][key] for key in ('mean', 'std'))) for c in CAPACITIES])
        for arm in results['arms']]
    alt = '; '.join(f'{name}: {", ".join(f"{x:g} {y:.1f} %" for x, y, _ in line)}' for name, line in lines)
    return [Figure(
        curves(lines, 'capacity of the experts in evaluation', 'test accuracy, %'), f'Accuracy over capacity. {alt}',
        'Mean and standard deviation over the seeds; the networks are the same for every line.')]


UNREAD = 'the paper draws curves; their numbers were not at hand'
POSITION, FIRST, RANDOM = 'in order', 'by priority', 'at random'


def _more_accurate(capacity: float, than: str, text: str, deviation: float) -> Claim:
    return Claim(text, f'accuracy_{capacity:g}', FIRST, than, deviation, source=UNREAD)


PRIORITY = Experiment(
    name='vmoe-priority',
    title='V-MoE: priority of tokens where experts lack capacity',
    paper='[V-MoE, Riquelme et al., NeurIPS 2021](https://arxiv.org/abs/2106.05974)',
    question='One network a seed, trained with capacity 1.05 and without priority as ever, is evaluated with less '
             f'capacity: experts serve the tokens of {BATCH} images `{POSITION}`, image after image, `{FIRST}`, which '
             f'is by falling gate, or `{RANDOM}`, the control that tells whether gates know what matters. Where tokens '
             'are dropped, the answer on an image depends on the others of its group, in any order; with room for all '
             'the three are the same network, whose accuracy is that at capacity 8. The network has 4 blocks of width '
             '64, all routed, 8 experts, one a token; with experts in half of the blocks a pilot found that even a '
             'tenth of the capacity costs 1 to 6 points only, and with two experts a token the second hardly counts. '
             'Images are digits of 16 x 16 pixels anywhere on a ground of 32 x 32, 64 patches. `busy`: of the quarter '
             f'of the patches of an image with the most contrast, the percent that finds a slot at capacity {SMALL:g}; '
             '`calm`: of the others.',
    arms=(
        Arm(POSITION, {'order': 'position'}), Arm(FIRST, {'order': 'priority'}), Arm(RANDOM, {'order': 'random'})),
    claims=(
        _more_accurate(SMALL, POSITION, 'With a fifth of the capacity a trained network is more accurate where tokens '
                       'of large gates are served first than in order of position.', 2.4),
        _more_accurate(.5, POSITION, 'So it is with half of the capacity.', 1.8),
        _more_accurate(.05, POSITION, 'So it is with a twentieth of the capacity.', 1.8),
        _more_accurate(SMALL, RANDOM, 'With a fifth of the capacity, serving by gate is better than serving at random.',
                       2.8),
        Claim('Large gates are where there is something to see: patches with contrast keep their experts more often.',
              'busy', FIRST, RANDOM, 3.5, source=UNREAD),
    ),
    run=run_orders,
    load=load,
    seeds=8,
    charts=capacity_curves,
    cards=('vmoe_vit_s',),
    together=True,
)

EXPERIMENTS = (PRIORITY,)
