"""The experiment of balanced experts: soft and hard constraints on a routed stage of a small ResNet.

Pavlitska, Hubschneider, Struppek, Zöllner, "Balancing Expert Utilization in Mixture-of-Experts Layers Embedded in CNNs"
(https://arxiv.org/abs/2204.10598).
Letters: N test images, E experts, K chosen experts an image, Y classes.
"""
from typing import Any, Optional

import timm
import torch
from torch import nn
from torch.nn import functional as F

from moe_zoo.analysis.charts import curves, heat_map
from moe_zoo.analysis.force import force_expert
from moe_zoo.analysis.page import Figure
from moe_zoo.analysis.usage import LIVING_SHARE
from moe_zoo.losses import squared_cv
from moe_zoo.routing import trace_routing

from .experiment import Arm, Claim, Experiment
from .training import Data, accuracy, cost, fit, load_images, predict, scattered

EXPERTS, SELECTED = 4, 2
STAGE = 'layer4.0'  # the routed layer
CONSTRAINTS = ('none', 'importance', 'kl', 'relative', 'mean', 'bias')
UNREAD = "the paper's tables could not be read"


def load(folder: Optional[str]) -> Data:
    """Digits that are turned, shrunk and moved, or the images of a folder as they are."""
    data = load_images(folder, size=16)
    return scattered(data, copies=2) if folder is None else data


def run_resnet(options: dict[str, Any], seed: int, data: Data) -> dict[str, Any]:
    """Train a ResNet whose last stage is routed with these keywords, and take its experts apart on the test images.

    Returns:
        accuracy: Percent, with K = 2.
        k1 .. k4: The same with another K at test time.
        cv, cv_importance: Coefficient of variation over the experts of the images they were chosen for, and of the
            weight they had, in percent; 0 is perfect balance.
        living: Experts with more than 1 % of the weight.
        information: Mutual information of expert and class in bits, an image's expert being drawn by its weights.
        forced: Mean over the experts of the accuracy where all images go through this one alone.
        forced_by_expert, pairs, classes: That accuracy of each; (E, E) images that chose both i and j, those that chose
            i on the diagonal; (Y, E) mean weight of each expert in a class.
    """
    model = timm.create_model(
        'moe_resnet18_cifar', layers=(1, 1, 1, 2), channels=(16, 16, 16, 32), num_experts=EXPERTS,
        num_selected=SELECTED, **data.model_kwargs, **options)
    fit(model, data, epochs=8, batch_size=32, lr=1e-2, opt='adam', weight_decay=0., seed=seed, shift=1)
    forced = []
    for expert in range(EXPERTS):
        with force_expert(model, expert):
            forced.append(accuracy(model, data.test))
    return {
        'accuracy': accuracy(model, data.test),
        **use(model, data),
        'forced': sum(forced) / EXPERTS,
        'forced_by_expert': forced,
        **sweep(model, data),
        **cost(model, data),
    }


def use(model: nn.Module, data: Data) -> dict[str, Any]:
    """Who was chosen for what on the test images, see `run_resnet`."""
    with trace_routing(model) as trace:
        predict(model, data.test.images)
    weights = torch.cat([routing.combine_matrix() for routing in trace[STAGE]]).double()  # (N, E), rows sum to 1
    chosen = (weights > 0).double()
    joint = F.one_hot(data.test.targets, data.num_classes).double().t() @ weights / len(weights)  # (Y, E)
    return {
        'cv': 100 * squared_cv(chosen.sum(dim=0)).sqrt().item(),
        'cv_importance': 100 * squared_cv(weights.sum(dim=0)).sqrt().item(),
        'living': int((weights.mean(dim=0) > LIVING_SHARE).sum()),
        'information': mutual_information(joint),
        'pairs': (chosen.t() @ chosen).long().tolist(),
        'classes': (joint / joint.sum(dim=1, keepdim=True)).tolist(),
    }


def mutual_information(joint: torch.Tensor) -> float:
    """In bits, of a (Y, E) table of probabilities that sum to one."""
    apart = joint.sum(dim=1, keepdim=True) * joint.sum(dim=0, keepdim=True)
    return torch.where(joint > 0, joint * (joint / apart).log2(), 0.).sum().item()


def sweep(model: nn.Module, data: Data) -> dict[str, float]:
    """Accuracy with K = 1 .. E at test time; K is set back."""
    stage, found = model.get_submodule(STAGE), {}
    for k in range(1, EXPERTS + 1):
        stage.set_num_selected(k)
        found[f'k{k}'] = accuracy(model, data.test)
    stage.set_num_selected(SELECTED)
    return found


def figures(results: dict[str, Any]) -> list[Figure]:
    """Accuracy over K; for one seed of two arms, classes by expert and pairs of experts."""
    lines = [
        (arm['name'], [(k, arm['metrics'][f'k{k}']['mean']) for k in range(1, EXPERTS + 1)])
        for arm in results['arms']]
    alt = '; '.join(f'{name}: {", ".join(f"{y:.1f} %" for _, y in line)}' for name, line in lines)
    blocks = [Figure(
        curves(lines, 'experts an image at test time', 'test accuracy, %', x_format='{:.0f}', log=False),
        f'Accuracy over the number of experts at test time. {alt}', 'All networks were trained with two.')]
    experts = [f'expert {e}' for e in range(EXPERTS)]
    for name in ('importance', 'relative'):
        run = next(run for run in results['runs'] if run['arm'] == name)
        classes = [[100 * share for share in row] for row in run['metrics']['classes']]
        chart = heat_map([str(y) for y in range(len(classes))], experts, classes, 'class')
        blocks.append(Figure(
            chart, f'Share of the weight that every expert has in every class, in percent, {name}',
            f'Classes by expert, percent of the weight: `{name}`, seed {run["seed"]}.'))
        chart = heat_map(experts, experts, run['metrics']['pairs'])
        blocks.append(Figure(
            chart, f'Test images that chose two experts together, {name}',
            f'Test images that two experts share (all of its own on the diagonal): `{name}`, seed {run["seed"]}.'))
    return blocks


def _evener(name: str, deviation: float) -> Claim:
    return Claim(
        f'{name} makes the use of experts more even than no constraint: a smaller coefficient of variation of their '
        'activations.', 'cv', 'none', name, deviation, source=UNREAD)


BALANCE = Experiment(
    name='balance',
    title='Balanced experts: soft and hard constraints',
    paper='[Balanced MoE, Pavlitska et al., 2022](https://arxiv.org/abs/2204.10598)',
    question='A ResNet of 5 blocks for images of 16 x 16 pixels, in place of ResNet-18 for CIFAR-100, whose last stage '
             f'is {EXPERTS} narrow copies, {SELECTED} an image. Soft constraints are losses of weight 0.5, hard ones '
             'exclude experts in training (thresholds 0.5 and 0.3), `bias` moves a selection bias. As the authors have '
             'it, the gate has noise in training, but not under the hard constraints. Adam for 8 epochs in place of '
             '150. The setting was searched on the validation images, with one or two seeds each of several '
             'combinations of learning rate, length, noise, routed stage and data: it is one where the importance loss '
             'balances. At smaller rates, so few steps leave a gate that treats all images alike, whatever the '
             'constraint. The rate was not tuned for each constraint, so accuracies do not rank them. `cv` and '
             '`cv_importance` are in percent of the mean; '
             '`information` is that of expert and class, in bits, and stands for specialisation; `forced` is the mean '
             'accuracy of single experts that take all images.',
    arms=tuple(Arm(name, {'constraint': name}) for name in CONSTRAINTS),
    claims=(
        _evener('importance', 12.),
        _evener('kl', 12.),
        _evener('relative', 12.),
        _evener('mean', 12.),
        _evener('bias', 30.),
        Claim('The soft constraint importance balances better than the hard one relative.', 'cv', 'relative',
              'importance', 17., source=UNREAD),
        Claim('Experts specialise more under importance than under relative.', 'information', 'importance', 'relative',
              .1, source=UNREAD, unit='bits'),
        Claim('Experts specialise more under importance than without a constraint.', 'information', 'importance',
              'none', .15, source=UNREAD, unit='bits'),
        Claim('The hard constraint relative makes the network more accurate than the soft one importance.', 'accuracy',
              'relative', 'importance', 2., source=UNREAD),
        Claim('The hard constraint mean makes the network more accurate than no constraint.', 'accuracy', 'mean',
              'none', 2., source=UNREAD),
        Claim('A single expert that takes all images is more accurate under relative than under importance.', 'forced',
              'relative', 'importance', 2., source=UNREAD),
    ),
    run=run_resnet,
    load=load,
    charts=figures,
    cards=('moe_resnet18_cifar',),
)

EXPERIMENTS = (BALANCE,)
