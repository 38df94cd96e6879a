"""Consistent routes: whether corresponding patches of two views can be taught to go to the same experts, and its price.

Kada, Yoshihashi, Kawakami, Ikehata, Sato: poster at MIRU 2023 (`jsd`); "Robustifying Routers Against Input
Perturbations for Sparse Mixture-of-Experts Vision Transformers", IEEE Open Journal of Signal Processing 6 (2025), doi
10.1109/OJSP.2025.3536853 (`prc`).
"""
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from moe_zoo.analysis.charts import curves
from moe_zoo.analysis.consistency import measure_consistency
from moe_zoo.analysis.page import Figure
from moe_zoo.data import ViewTargets, pair_up, random_views
from moe_zoo.engine.consistency import RouteConsistencyTask
from moe_zoo.losses import squared_cv
from moe_zoo.routing import trace_routing

from .experiment import Arm, Claim, Experiment
from .training import Data, accuracy, fit, load_images, predict

SIDE, PATCH = 24, 4
AREAS = ((.25, .7), (.6, 1.))  # of the crops, as the original's fine-tuning but for the lower end of the first: .05
SIGMAS = (.1, .2, .4, .8)
NOISE = .4  # the noise at which the claims are tested


def run_views(options: dict[str, Any], seed: int, data: Data) -> dict[str, Any]:
    """Train a V-MoE on two views of every image with these keywords of `RouteConsistencyTask`.

    Returns:
        accuracy: Percent, of whole images.
        crop, noise_S: Percent of the patches whose two experts change when the image is cropped and perhaps flipped,
            or has noise of a standard deviation S, over all routed layers.
        chance, chance_noise: What `crop` and `noise_S` at `NOISE` would be if experts were dealt out at random.
        cv, gate: See `use`.
    """
    model = timm.create_model(
        'vmoe_vit_s', img_size=SIDE, patch_size=PATCH, embed_dim=64, depth=4, num_heads=4, representation_size=0,
        **data.model_kwargs)
    fit(model, data, epochs=12, batch_size=32, lr=2e-3, opt='adamw', weight_decay=.05, warmup_epochs=2, seed=seed,
        make_task=partial(RouteConsistencyTask, **options), prepare=two_views)
    changes = measure_consistency(model, data.test.images.split(256), sigmas=SIGMAS)['overall']
    noise = {each['sigma']: each for each in changes['noise']}
    return {
        'accuracy': accuracy(model, data.test),
        'crop': 100 * changes['crop']['changed'],
        **{f'noise_{sigma:g}': 100 * each['changed'] for sigma, each in noise.items()},
        'chance': 100 * changes['crop']['chance'],
        'chance_noise': 100 * noise[NOISE]['chance'],
        **use(model, data),
    }


def two_views(images: torch.Tensor, targets: torch.Tensor, random: torch.Generator) -> tuple[torch.Tensor, ViewTargets]:
    """A batch of B images as one of 2B views."""
    return pair_up(random_views(images, AREAS, generator=random), targets)


def use(model: nn.Module, data: Data) -> dict[str, float]:
    """How the experts are used on the test images, mean over the routed layers.

    Returns:
        cv: Coefficient of variation over the experts of the tokens that chose them, percent; 0 is perfect balance.
        gate: Mean of the largest gate of a token, percent; flat gates have 100 / E.
    """
    with trace_routing(model) as trace:
        predict(model, data.test.images)
    cv, gate = [], []
    for records in trace.values():
        chosen = torch.cat([routing.indices for routing in records]).flatten()
        load = chosen.bincount(minlength=records[0].num_experts)
        cv.append(100 * squared_cv(load.double()).sqrt().item())
        gate.append(100 * torch.cat([routing.gates for routing in records]).amax(dim=1).mean().item())
    return {'cv': sum(cv) / len(cv), 'gate': sum(gate) / len(gate)}


def noise_curves(results: dict[str, Any]) -> list[Figure]:
    """Share of changed routes over the noise, a line an arm."""
    lines = [
        (arm['name'], [(s, *(arm['metrics'][f'noise_{s:g}'][key] for key in ('mean', 'std'))) for s in SIGMAS])
        for arm in results['arms']]
    alt = '; '.join(f'{name}: {", ".join(f"{x:g} {y:.1f} %" for x, y, _ in line)}' for name, line in lines)
    return [Figure(
        curves(lines, 'standard deviation of the noise', 'patches whose experts change, %'),
        f'Changed routes over noise. {alt}',
        'Mean and standard deviation over the seeds; noise in units of the standardised pixels.')]


UNREAD = 'the numbers of the changes were not at hand'
PAGE = "V-MoE-S/32, top-2, ImageNet 75.84 to 76.27 %, the authors' project page"


def _steadier(arm: str, metric: str, text: str, deviation: float) -> Claim:
    """The arm without a loss has more changes."""
    return Claim(text, metric, 'none', arm, deviation, source=UNREAD)


CONSISTENCY = Experiment(
    name='route-consistency',
    title='Consistent routes: the same experts for the same patch of two views',
    paper='[PRC, Kada et al., IEEE OJSP 2025](https://doi.org/10.1109/OJSP.2025.3536853)',
    question='All arms learn from two views of every image, crops of 25 to 70 % and of 60 to 100 % of it that are '
             'perhaps flipped, both supervised: the same images, views and compute. `none` compares nothing; `jsd` '
             'adds the divergence of the routes of corresponding patches (the poster of 2023) to the losses that '
             'balance the experts; `prc` puts its two terms in their place (the article of 2025). A V-MoE of 4 blocks '
             'of width 64, experts in two, 2 of 8 a token, on digits of 24 x 24 pixels, 36 patches, 12 epochs. With '
             'so few steps the weights of prc that its authors released, which are meant for 300 epochs of ImageNet, '
             'change little (a pilot: 72.7 to 70.8 % of `crop`), so that ten times as much is used; the poster states '
             'no weight for jsd: of 0.05 and 1, a pilot was more accurate with 0.05. '
             '`crop` and `noise` are the percent of the patches whose two experts change when an image is cropped (25 '
             'to 100 %) and flipped, or noised by so many standard deviations; `chance` is what dealing experts at '
             'random would give; `cv` is the imbalance of the experts, `gate` the mean of the largest gate, which is '
             '12.5 where a router has no preference: flat gates are consistent, and anything tips their choice.',
    arms=(
        Arm('none', {'loss': 'jsd', 'weights': [0.]}), Arm('jsd', {'loss': 'jsd', 'weights': [.05]}),
        Arm('prc', {'loss': 'prc', 'weights': [.05, .5]})),
    claims=(
        _steadier('prc', 'crop', 'PRC makes fewer patches change their experts under crop and flip.', 4.),
        _steadier('jsd', 'crop', 'So does the divergence of the poster.', 3.),
        _steadier('prc', f'noise_{NOISE:g}', 'PRC makes fewer patches change their experts under noise.', 2.5),
        _steadier('jsd', f'noise_{NOISE:g}', 'So does the divergence of the poster.', 4.),
        Claim('Accuracy does not fall under PRC: the paper has it rise.', 'accuracy', 'prc', 'none', 2., .43, PAGE),
        Claim('Accuracy does not fall under the divergence of the poster.', 'accuracy', 'jsd',
              'none', 2.),
    ),
    run=run_views,
    load=partial(load_images, size=SIDE),
    seeds=6,
    charts=noise_curves,
    cards=('vmoe_vit_s',),
)

EXPERIMENTS = (CONSISTENCY,)
