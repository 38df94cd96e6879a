"""Two experiments with trained weights: a dense checkpoint that goes on as a mixture of experts, and fewer experts.

Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints, Komatsuzaki et al., ICLR 2023,
https://arxiv.org/abs/2212.05055. The network of both is a small ConvNeXt with routed layers (`moefied`).
Letters: B images, C channels, H x W pixels, E experts, K chosen experts, T routed tokens.
"""
import copy
import statistics
import time
from functools import partial
from typing import Any

import timm
import torch
from torch import nn

from moe_zoo.analysis import count
from moe_zoo.analysis.charts import curves, scatter
from moe_zoo.analysis.page import Figure
from moe_zoo.analysis.timing import Ratio, alternate, ratio
from moe_zoo.checkpoints import merge, prune, to_dense, upcycle
from moe_zoo.layers import RoutedLayer
from moe_zoo.routing import Routing, trace_routing

from .experiment import Arm, Claim, Experiment
from .training import Data, accuracy, fit, load_images, predict

BATCH = 50
BASE = 'convnext_atto'
SHAPE = {'depths': (1, 2, 1, 1), 'dims': (24, 48, 48, 48), 'patch_size': 2, 'kernel_sizes': 3, 'ls_init_value': None}
EXPERTS, SELECTED = 8, 2
# Nothing is dropped, so that what evaluation counts is what training executes.
TOKENS = {
    'layer': 'moe_mlp', 'targets': ['stages.1.*.mlp', 'stages.2.*.mlp'], 'num_experts': EXPERTS,
    'num_selected': SELECTED, 'capacity_factor': None}
MIXED = {'layer': 'condconv', 'targets': ['stages.*.conv_dw', 'stages.*.downsample.1'], 'num_experts': EXPERTS}
LR = 2e-3
ROUNDS = 7  # of alternating timings

# Upcycling
PRETRAINED, TUNED = 30, 6  # epochs: of half of the images, dense; of all of them, upcycled
PASSES = 3  # a step is a forward pass and two of its size backward, for the inputs and for the weights
TIMED = 4  # steps in every timing

# Pruning
EPOCHS, RECOVERY_LR = 12, 1e-3
TRACED, COUNTED = 1000, 50  # training images whose gates are measured; images whose MACs are counted

SETTING = (
    'Images are those in the folder of --data-dir, brought to 32 x 32 pixels: for CIFAR-10, with which everything was '
    "chosen, train/CLASS/*.png and test/CLASS/*.png, or an npz. Without it they are scikit-learn's digits. The network "
    f'is a ConvNeXt of 5 blocks, 24 and 48 channels wide, with {EXPERTS} experts in a routed layer, {SELECTED} a token '
    'where tokens choose, and no capacity, so that what is counted is what is executed.'
)

Trace = dict[str, list[Routing]]


def make_dense(data: Data) -> nn.Module:
    """A ConvNeXt of 5 blocks."""
    return timm.create_model(BASE, **SHAPE, **data.model_kwargs)


def make_routed(data: Data, **layer: Any) -> nn.Module:
    """The same with routed layers; see `moe_zoo.models.moefied.moefied`."""
    return timm.create_model('moefied', base=BASE, **layer, **SHAPE, **data.model_kwargs)


def learn(model: nn.Module, data: Data, epochs: float, seed: int, lr: float = LR, warmup_epochs: int = 1) -> None:
    """Train on images that are shifted by up to 4 pixels and flipped, half of them."""
    fit(model, data, epochs=epochs, batch_size=BATCH, lr=lr, opt='adamw', weight_decay=.05,
        warmup_epochs=warmup_epochs, seed=seed, shift=4, prepare=flipped)


def flipped(images: torch.Tensor, targets: torch.Tensor, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, C, H, W), half of them mirrored, and their targets."""
    mirrored = torch.rand(len(images), generator=random) < .5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images), targets


# --- Upcycling --------------------------------------------------------------------------------------------------------

def run_arms(options: list[dict[str, str]], seed: int, data: Data) -> list[dict[str, Any]]:
    """Make one dense checkpoint, and go on from it, or begin anew, once for every arm.

    `start` of an arm is 'upcycled', 'dense' or 'scratch', `steps` a key of `budgets`.

    Returns:
        accuracy: Percent.
        start: The same before the arm's own training.
        steps: Of the arm's own training.
        gmacs: Thousand million MACs of it; `gmacs_in_all`: with those of the checkpoint that it began from.
        step_macs, step_time: Of 'upcycled': MACs and time of a step over those of the dense network; the time is
            measured in the run, on the CPU's clock, with the quartiles `step_time_low` and `step_time_high`.
        moved: Of 'upcycled': the largest difference of a logit from that of the dense checkpoint.
    """
    per_epoch = len(data.train.targets) // BATCH
    half = torch.randperm(len(data.train.targets), generator=torch.Generator().manual_seed(seed))[::2]
    dense = make_dense(data)
    learn(dense, data._replace(train=data.train.take(half)), PRETRAINED, seed)
    routed, images = upcycled(dense, data), data.train.images[:BATCH]
    costs = {each: PASSES * count(each, images).macs_executed for each in (dense, routed)}  # MACs of a step
    more, longer = costs[routed] / costs[dense], step_time(routed, dense, data)
    first = PRETRAINED * (len(half) // BATCH)
    budget = budgets(TUNED * per_epoch, first, more, longer.median)
    moved = (predict(routed, images) - predict(dense, images)).abs().max().item()

    found = []
    for start, steps in ((each['start'], budget[each['steps']]) for each in options):
        torch.manual_seed(seed)  # how many steps were measured out to the arms before must not matter
        like = dense if start == 'dense' else routed
        model = make_routed(data, **TOKENS) if start == 'scratch' else copy.deepcopy(like)
        before = accuracy(model, data.test)
        learn(model, data, steps / per_epoch, seed)
        own, earlier = steps * costs[like] / 1e9, 0 if start == 'scratch' else first * costs[dense] / 1e9
        found.append({
            'accuracy': accuracy(model, data.test), 'start': before, 'steps': steps, 'gmacs': own,
            'gmacs_in_all': own + earlier})
        if start == 'upcycled':
            found[-1].update(
                moved=moved, step_macs=more, step_time=longer.median, step_time_low=longer.low,
                step_time_high=longer.high)
    return found


def upcycled(dense: nn.Module, data: Data) -> nn.Module:
    """A routed network that starts with the function of the dense one."""
    model = make_routed(data, **TOKENS)
    model.load_state_dict(upcycle(dense.state_dict(), model))
    return model


def budgets(tuned: int, first: int, macs: float, duration: float) -> dict[str, int]:
    """Steps of an arm, by what it has in common with the upcycled one.

    Args:
        tuned: Steps of the upcycled arm.
        first: Steps that made the dense checkpoint, on batches of the same size.
        macs, duration: Of a step of the routed network, over those of a step of the dense one.

    Returns:
        steps: As many steps.
        macs, time: A dense network's steps that cost as many MACs, that last as long.
        macs in all: A routed network's steps that cost as many MACs as upcycling and the checkpoint together.
    """
    return {
        'steps': tuned,
        'macs': round(tuned * macs),
        'time': round(tuned * duration),
        'macs in all': tuned + round(first / macs),
    }


def step_time(routed: nn.Module, dense: nn.Module, data: Data) -> Ratio:
    """Time of a training step of copies of one network over that of another, on the CPU's clock, taking turns."""
    few = data._replace(train=data.train.take(torch.arange(TIMED * BATCH)))
    copies = copy.deepcopy(routed), copy.deepcopy(dense)
    runs = [partial(learn, model, few, epochs=1, seed=0) for model in copies]
    seconds = alternate(runs, ROUNDS, min_seconds=0., clock=time.process_time).seconds
    return ratio(*seconds)


def cost_chart(results: dict[str, Any]) -> list[Figure]:
    """Accuracy of every arm over all the MACs that went into it."""
    points = [
        (arm['name'], arm['metrics']['gmacs_in_all']['mean'], arm['metrics']['accuracy']['mean'],
         arm['options']['start'] == 'upcycled') for arm in results['arms']]
    alt = '; '.join(f'{name}: {x:,.0f} thousand million MACs, {y:.1f} %' for name, x, y, _ in points)
    chart = scatter(points, 'thousand million MACs of training, checkpoint included', 'test accuracy, %')
    return [Figure(chart, f'Accuracy over training MACs. {alt}', 'Means over the seeds.')]


UNREAD = "the paper's figures were not at hand"
UPCYCLED, SAME_MACS, SAME_TIME = 'upcycled', 'dense, same MACs', 'dense, same time'
SCRATCH, SHORT = 'from scratch, same MACs in all', 'from scratch, same steps'


def _more_accurate(worse: str, text: str, deviation: float) -> Claim:
    return Claim(text, 'accuracy', UPCYCLED, worse, deviation, source=UNREAD)


UPCYCLE = Experiment(
    name='upcycle',
    title='Upcycling: a dense checkpoint goes on as a mixture of experts',
    paper='[Sparse Upcycling, Komatsuzaki et al., ICLR 2023](https://arxiv.org/abs/2212.05055)',
    question=f'{SETTING} `{UPCYCLED}`: the network is trained dense for {PRETRAINED} epochs of half of the training '
             'images, drawn by the seed, which is the checkpoint; three of its MLPs become experts, copies of them, so '
             f'that it starts with the function of the checkpoint (`moved`); then {TUNED} epochs of all training '
             f'images. `{SAME_MACS}` and `{SAME_TIME}` go on with the checkpoint as it is, in as many steps as cost as '
             'many MACs or take as long. MACs of a step are three times those counted of its forward pass; its time '
             'is measured in every run, in alternating rounds (`step_time`, over that of a dense step), so that this '
             'one arm is not repeated to the step, and speaks of networks so narrow that dispatching takes as long as '
             f'computing. `{SCRATCH}` begins the mixture anew, for the MACs of the checkpoint and the upcycling '
             'together, all of them on all training images, half of which the checkpoint did not see; '
             f'`{SHORT}` has those of the upcycling. The rate of 0.002 was chosen on the validation images, with one '
             'seed and similar lengths: of 0.002 and 0.005 for the checkpoint, 0.001, 0.002 and 0.004 to go on with '
             'it, 0.002 and 0.004 upcycled; so were two experts a token rather than one. From scratch has the rate of '
             'the checkpoint. The schedule begins anew with the fine-tuning.',
    arms=(
        Arm(UPCYCLED, {'start': 'upcycled', 'steps': 'steps'}),
        Arm(SAME_MACS, {'start': 'dense', 'steps': 'macs'}),
        Arm(SAME_TIME, {'start': 'dense', 'steps': 'time'}),
        Arm(SCRATCH, {'start': 'scratch', 'steps': 'macs in all'}),
        Arm(SHORT, {'start': 'scratch', 'steps': 'steps'}),
    ),
    claims=(
        _more_accurate(SAME_MACS, 'Upcycled, a dense checkpoint becomes more accurate than trained on as it is for as '
                       'many MACs.', 1.3),
        _more_accurate(SAME_TIME, 'So it does against training on as it is for as long.', 1.3),
        _more_accurate(SCRATCH, 'Upcycling is more accurate than the mixture of experts from scratch for as many MACs '
                       'as upcycling and the checkpoint took together.', 1.3),
        _more_accurate(SHORT, 'Upcycling is more accurate than the mixture of experts from scratch for as many steps.',
                       1.3),
    ),
    run=run_arms,
    load=load_images,
    seeds=8,
    charts=cost_chart,
    computes=('analysis/timing.py',),
    cards=('moefied',),
    together=True,
)


# --- Pruning ----------------------------------------------------------------------------------------------------------

def run_kept(options: list[dict[str, Any]], seed: int, data: Data) -> list[dict[str, Any]]:
    """Train one network of each kind, and make a smaller one of it for every arm; see `shrunk`.

    Returns:
        accuracy: Percent, as it is made smaller.
        recovered: The same after an epoch of further training; `gain`: what that epoch brought.
        chosen: Experts of a layer for one token or image; 1 where the network is dense.
        mass: Percent of the gates' weight that the experts had which stay, mean over the layers; of arms 'by mass'.
        executed, at_most: Thousand MACs of an image, mean over `COUNTED` images.
        latency: Milliseconds of one image, median of alternating rounds; `latency_spread`: their interquartile range.
        parameters: Thousands.
    """
    whole = {kind: trained(kind, seed, data) for kind in dict.fromkeys(each['kind'] for each in options)}
    models = [shrunk(*whole[each['kind']], each['how'], each['keep'], seed, data) for each in options]
    latency = latencies(models, data.test.images[:1])
    found = []
    for each, model, (median, spread) in zip(options, models, latency):
        before = accuracy(model, data.test)
        cost = count(model, data.test.images[:COUNTED])
        learn(model, data, 1, seed, lr=RECOVERY_LR, warmup_epochs=0)
        after = accuracy(model, data.test)
        metrics = {
            'accuracy': before, 'recovered': after, 'gain': after - before, 'chosen': chosen(model),
            'executed': cost.macs_executed / cost.images / 1000, 'at_most': cost.macs_max / cost.images / 1000,
            'parameters': cost.parameters / 1000, 'latency': median, 'latency_spread': spread}
        if each['how'] == 'mass':
            metrics['mass'] = mass_kept(whole[each['kind']][1], each['keep'])
        found.append(metrics)
    return found


def trained(kind: str, seed: int, data: Data) -> tuple[nn.Module, Trace]:
    """A whole network of a kind, 'tokens' or 'mixed', and what its experts did on training images."""
    torch.manual_seed(seed)
    model = make_routed(data, **{'tokens': TOKENS, 'mixed': MIXED}[kind])
    learn(model, data, EPOCHS, seed)
    with trace_routing(model) as trace:
        predict(model, data.train.images[:TRACED])
    return model, dict(trace)


def shrunk(model: nn.Module, trace: Trace, how: str, keep: int, seed: int, data: Data) -> nn.Module:
    """A smaller network: 'whole' (a copy), 'mass' (the experts of most weight stay), 'random', 'merged' or 'folded'."""
    if how == 'whole':
        return copy.deepcopy(model)
    if how == 'mass':
        return prune(model, trace, keep=keep)
    if how == 'random':
        return prune(model, shuffled(trace, torch.Generator().manual_seed(seed)), keep=keep)
    if how == 'merged':
        return merge(model, trace, keep=keep)
    dense = make_dense(data).eval()
    dense.load_state_dict(to_dense(model, trace))
    return dense


def combine_matrices(trace: Trace) -> dict[str, torch.Tensor]:
    """(T, E) weights of every expert by layer."""
    return {name: torch.cat([routing.combine_matrix() for routing in records]) for name, records in trace.items()}


def shuffled(trace: Trace, random: torch.Generator) -> Trace:
    """A trace in which the experts of every layer have changed places: what it says of each is about another one."""
    found = {}
    for name, weights in combine_matrices(trace).items():
        weights = weights[:, torch.randperm(weights.shape[1], generator=random)]
        found[name] = [Routing(weights, weights, weights)]
    return found


def mass_kept(trace: Trace, keep: int) -> float:
    """Percent of the weight in the heaviest experts, mean over the layers."""
    masses = [weights.sum(dim=0) for weights in combine_matrices(trace).values()]
    return 100 * statistics.fmean((mass.topk(keep).values.sum() / mass.sum()).item() for mass in masses)


def chosen(model: nn.Module) -> int:
    """K of the routed layers, which have the same; 1 of a dense network."""
    found, = {layer.num_selected for layer in model.modules() if isinstance(layer, RoutedLayer)} or {1}
    return found


def latencies(models: list[nn.Module], image: torch.Tensor) -> list[tuple[float, float]]:
    """(median, interquartile range) of the milliseconds of every model, all of them taking turns."""
    runs = [lambda model=model: predict(model, image) for model in models]
    found = []
    for seconds in alternate(runs, ROUNDS, min_seconds=.03).seconds:
        low, median, high = statistics.quantiles(seconds, n=4, method='inclusive')
        found.append((round(1000 * median, 4), round(1000 * (high - low), 4)))
    return found


def experts_chart(results: dict[str, Any]) -> list[Figure]:
    """Accuracy over the experts that are left, before and after recovery: a figure a kind, a line for every way."""
    return [_curves(results, kind, name) for kind, name in (('tokens', 'token experts'), ('mixed', 'CondConv'))]


def _curves(results: dict[str, Any], kind: str, name: str) -> Figure:
    lines: dict[str, list[tuple[float, ...]]] = {}
    for arm in results['arms']:
        how, keep = arm['options']['how'], arm['options']['keep']
        if arm['options']['kind'] != kind:
            continue
        for way in WAYS if how == 'whole' else [how]:
            for metric, when in (('accuracy', ''), ('recovered', ', recovered')):
                point = keep, *(arm['metrics'][metric][key] for key in ('mean', 'std'))
                lines.setdefault(f'{WAYS[way]}{when}', []).append(point)
    drawn = [(way, sorted(line)) for way, line in lines.items() if len(line) > 1]
    alt = '; '.join(f'{way}: {", ".join(f"{x} {y:.1f} %" for x, y, _ in line)}' for way, line in drawn)
    return Figure(
        curves(drawn, 'experts', 'test accuracy, %'), f'Accuracy over experts, {name}. {alt}',
        f'{name[:1].upper()}{name[1:]}: mean and standard deviation over the seeds, as they are made smaller and after '
        'an epoch of recovery.')


WAYS = {'mass': 'by mass', 'random': 'at random', 'merged': 'merged', 'folded': 'folded'}
ELSEWHERE = 'no paper at hand prunes these layers'


def _arms() -> tuple[Arm, ...]:
    def arm(kind: str, how: str, keep: int) -> Arm:
        name = f'{keep} {WAYS.get(how, "experts")}' if how != 'folded' else 'folded'
        return Arm(name if kind == 'tokens' else f'CondConv, {name}', {'kind': kind, 'how': how, 'keep': keep})

    fewer = EXPERTS // 2, EXPERTS // 4, EXPERTS // 8
    return (
        arm('tokens', 'whole', EXPERTS),
        *(arm('tokens', how, keep) for keep in fewer for how in ('mass', 'random', 'merged')),
        arm('mixed', 'whole', EXPERTS), *(arm('mixed', 'mass', keep) for keep in fewer), arm('mixed', 'folded', 1))


PRUNE = Experiment(
    name='prune',
    title='Pruning: accuracy and cost against the experts that stay',
    paper='[V-MoE, Riquelme et al., NeurIPS 2021](https://arxiv.org/abs/2106.05974)',
    question=f'{SETTING} It is trained for {EPOCHS} epochs with token experts, or with its depthwise and downsampling '
             f'kernels mixed from {EXPERTS} (`CondConv`), and then made smaller: `by mass` the experts stay in every '
             f'layer whose gates weighed most on {TRACED:,} training images, `at random` as many others, by the same '
             'numbers in another order, `merged` joins those that are most alike, `folded` is the one dense network '
             'of the mean gates. `accuracy` is that before, `recovered` that after one epoch of training with a rate '
             f'of {RECOVERY_LR:g}, which was not searched, `gain` the difference; whole networks get this epoch too. '
             'With one expert left a token chooses one. `executed` and `at_most` are thousand MACs of an image, the '
             'same where nothing is padded, `parameters` thousands, `latency` the median milliseconds of one image, in '
             'alternating rounds (their interquartile range beside it), which is reported and not tested, as it '
             'depends on what else runs. `mass` is the percent of the weight of the gates that stays.',
    arms=_arms(),
    claims=(
        Claim('Half of the experts chosen by the weight of their gates keep more accuracy than half of them chosen at '
              'random.', 'accuracy', '4 by mass', '4 at random', 2.1, source=ELSEWHERE),
        Claim('So does a quarter of them.', 'accuracy', '2 by mass', '2 at random', 2.1, source=ELSEWHERE),
        Claim('An epoch of recovery brings the network with half of its experts more than the whole one.', 'gain',
              '4 by mass', '8 experts', 2.1, source=ELSEWHERE),
        Claim('After recovery, the whole network is still more accurate than that with half of its experts.',
              'recovered', '8 experts', '4 by mass', 1.6, source=ELSEWHERE),
        Claim('Joining experts that are alike keeps more accuracy than removing those of least weight.', 'accuracy',
              '4 merged', '4 by mass', 2.3, source=ELSEWHERE),
        Claim('CondConv folded into one dense network and given an epoch of recovery is less accurate than whole.',
              'recovered', 'CondConv, 8 experts', 'CondConv, folded', 1.6, source=ELSEWHERE),
    ),
    run=run_kept,
    load=load_images,
    seeds=8,
    charts=experts_chart,
    computes=('analysis/timing.py',),
    cards=('moefied',),
    together=True,
)

EXPERIMENTS = (UPCYCLE, PRUNE)
