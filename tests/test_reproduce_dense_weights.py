"""The experiments that begin with trained weights: equal budgets, equal starts, and what is left of pruned networks.

On 32 x 32 pixels the routed blocks of the small ConvNeXt have 16, 16 and 4 tokens: 36, of width 48 and hidden width
192, so that an expert costs a token 2 * 48 * 192 = 18,432 MACs and a router of 8 another 384.
"""
import json

import pytest
import torch

from moe_zoo.analysis import count
from moe_zoo.analysis.timing import Ratio
from moe_zoo.layers import RoutedLayer
from moe_zoo.reproduce import dense_weights, find_experiment, report, runner
from moe_zoo.reproduce.training import Data, Split, predict
from moe_zoo.routing import Routing, trace_routing

DENSE, TOKENS, EXPERT = 1_348_176, 36, 18_432
ROUTED = DENSE + TOKENS * (EXPERT + 8 * 48)  # two experts in place of an MLP, and the router


@pytest.fixture(scope='module')
def data() -> Data:
    """400 pictures of noise to learn from: 8 batches."""
    images = torch.randn(400, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(400) % 10)
    few = split.take(torch.arange(60))
    return Data(split, few, few, 10, 'noise')


@pytest.fixture(scope='module')
def routed(data):
    """A network with token experts that differ, and what they did."""
    torch.manual_seed(0)
    return differing(dense_weights.make_routed(data, **dense_weights.TOKENS), data)


@pytest.fixture(scope='module')
def mixed(data):
    torch.manual_seed(0)
    return differing(dense_weights.make_routed(data, **dense_weights.MIXED), data)


def differing(model, data):
    for parameter in model.parameters():
        parameter.data += .1 * torch.randn_like(parameter)
    with trace_routing(model) as trace:
        predict(model, data.train.images[:100])
    return model, dict(trace)


def flat_results(name, metrics):
    """Results in which every run of every arm came out alike."""
    experiment = find_experiment(name)
    runs = [{'arm': arm.name, 'seed': seed, 'seconds': 1., 'metrics': dict(metrics)}
            for arm in experiment.arms for seed in (0, 1)]
    claims = [{**vars(claim), 'detectable': 1.} for claim in experiment.claims]
    plan = {'seeds': [0, 1], 'test': '', 'data': '', 'claims': claims, 'written': ''}
    return experiment, runner.summarise(experiment, plan, {}, runs)


# Upcycling

def test_budgets_by_hand():
    # 480 steps that cost 1.5 of a dense one are 720 of those; the checkpoint's 1200 dense steps are 800 routed ones
    assert dense_weights.budgets(480, 1200, macs=1.5, duration=1.75) == {
        'steps': 480, 'macs': 720, 'time': 840, 'macs in all': 1280}


def test_every_arm_gets_its_steps_and_begins_where_it_says(data, monkeypatch):
    """Nothing is trained: only who would be, for how many steps."""
    calls, images = [], data.test.images[:8]

    def watch(model, part, epochs, seed):
        for parameter in model.parameters():
            if not calls:
                parameter.data += .05 * torch.randn_like(parameter)  # the checkpoint: as if it had learned
        calls.append((len(part.train.targets), epochs * (len(part.train.targets) // 50), predict(model, images), seed))

    monkeypatch.setattr(dense_weights, 'learn', watch)
    monkeypatch.setattr(dense_weights, 'step_time', lambda routed, dense, data: Ratio(1.75, 1.7, 1.8))
    experiment = find_experiment('upcycle')
    found = dict(zip([arm.name for arm in experiment.arms], experiment.run(
        [arm.options for arm in experiment.arms], 3, data)))
    json.dumps(found)
    (_, _, checkpoint, _), *tuned = calls
    # half of the images: 4 batches, 30 epochs of them; all images: 8 batches, 6 epochs of them
    assert [call[:2] for call in calls] == [
        (200, 120), (400, 48), (400, round(48 * ROUTED / DENSE)), (400, 84), (400, 48 + round(120 * DENSE / ROUTED)),
        (400, 48)]
    assert [metrics['steps'] for metrics in found.values()] == [48, 72, 84, 128, 48]
    for _, _, logits, seed in calls[1:4]:  # upcycled, dense, dense
        assert (logits - checkpoint).abs().max() < 1e-4 and seed == 3
    assert (tuned[3][2] - checkpoint).abs().max() > .01 and torch.equal(tuned[3][2], tuned[4][2])
    assert found['upcycled']['moved'] < 1e-4 and found['upcycled']['step_time'] == 1.75
    assert found['upcycled']['step_macs'] == ROUTED / DENSE
    # three passes of 50 images a step
    assert found['upcycled']['gmacs'] == pytest.approx(48 * 150 * ROUTED / 1e9)
    assert found['dense, same MACs']['gmacs'] == pytest.approx(72 * 150 * DENSE / 1e9)
    assert found['upcycled']['gmacs_in_all'] == pytest.approx(150 * (48 * ROUTED + 120 * DENSE) / 1e9)
    short, whole = found['from scratch, same steps'], found['from scratch, same MACs in all']
    assert short['gmacs_in_all'] == short['gmacs'] == pytest.approx(found['upcycled']['gmacs'])
    assert whole['gmacs_in_all'] == pytest.approx(found['upcycled']['gmacs_in_all'], rel=.01)
    starts = [metrics['start'] for metrics in found.values()]
    assert starts[0] == starts[1] == starts[2] and starts[3] == starts[4]


def test_macs_are_those_of_the_formula(data):
    images = data.test.images[:2]
    assert count(dense_weights.make_dense(data), images).macs_executed == 2 * DENSE
    counted = count(dense_weights.make_routed(data, **dense_weights.TOKENS), images)
    assert counted.macs_executed == counted.macs_max == 2 * ROUTED  # nothing is dropped


def test_steps_are_timed_on_copies(data, monkeypatch):
    monkeypatch.setattr(dense_weights, 'ROUNDS', 3)
    monkeypatch.setattr(dense_weights, 'TIMED', 1)
    dense = dense_weights.make_dense(data)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    found = dense_weights.step_time(dense, dense, data)
    assert 0 < found.low <= found.median <= found.high
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_half_of_the_images_are_mirrored():
    images, targets = torch.arange(2.).expand(200, 1, 1, 2), torch.arange(200)
    found, same = dense_weights.flipped(images, targets, torch.Generator().manual_seed(0))
    mirrored = (found == torch.tensor([1., 0.])).all(dim=3).flatten()
    assert torch.equal(found[~mirrored], images[~mirrored]) and same is targets
    assert 70 < mirrored.sum() < 130


def test_the_page_shows_accuracy_over_macs():
    experiment, results = flat_results('upcycle', {'accuracy': 50., 'gmacs_in_all': 90.})
    figure, = experiment.charts(results)
    assert 'upcycled: 90 thousand million MACs, 50.0 %' in figure.alt
    assert report.section(results).title == experiment.title


# Pruning

@pytest.mark.parametrize('arm', find_experiment('prune').arms, ids=lambda arm: arm.name)
def test_every_arm_has_the_experts_of_its_name(arm, data, routed, mixed):
    model, trace = routed if arm.options['kind'] == 'tokens' else mixed
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smaller = dense_weights.shrunk(model, trace, arm.options['how'], arm.options['keep'], 0, data)
    keep = arm.options['keep']
    sizes = {(m.num_experts, m.num_selected) for m in smaller.modules() if isinstance(m, RoutedLayer)}
    folded = arm.options['how'] == 'folded'
    assert sizes == (set() if folded else {(keep, min(keep, 2) if arm.options['kind'] == 'tokens' else keep)})
    if not folded:
        assert arm.name.removeprefix('CondConv, ').startswith(f'{keep} ')
    if arm.options['how'] == 'whole':
        torch.testing.assert_close(predict(smaller, data.test.images), predict(model, data.test.images))
    for parameter in smaller.parameters():
        parameter.data.zero_()  # what is trained on is a copy
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_by_mass_the_heaviest_stay_and_at_random_as_many_others(data, routed):
    model, trace = routed
    name = 'stages.1.blocks.0.mlp'
    mass = torch.cat([routing.combine_matrix() for routing in trace[name]]).sum(dim=0)
    heaviest = mass.topk(4).indices.sort().values
    rows = model.get_submodule(name).router.weight
    kept = dense_weights.shrunk(model, trace, 'mass', 4, 0, data).get_submodule(name).router.weight
    assert torch.equal(kept, rows[heaviest])
    others = [dense_weights.shrunk(model, trace, 'random', 4, seed, data).get_submodule(name).router.weight
              for seed in range(3)]
    assert all(other.shape == kept.shape for other in others) and not all(torch.equal(o, kept) for o in others)
    again = dense_weights.shrunk(model, trace, 'random', 4, 2, data).get_submodule(name).router.weight
    assert torch.equal(again, others[2])


def test_a_shuffled_trace_weighs_other_experts():
    weights = torch.tensor([[.7, .3, 0.], [.9, .1, 0.]])
    trace = {'a': [Routing(weights[:1], weights[:1], weights[:1]), Routing(weights[1:], weights[1:], weights[1:])]}
    found = set()
    for seed in range(20):
        routing, = dense_weights.shuffled(trace, torch.Generator().manual_seed(seed))['a']
        found.add(tuple(routing.combine_matrix().sum(dim=0).tolist()))
    assert len(found) == 6  # every order of the three
    for masses in found:
        assert sorted(masses) == pytest.approx([0, .4, 1.6])
    # 1.6 of 2, and in another layer a half
    even = torch.full((1, 2), .5)
    assert dense_weights.mass_kept(trace, 1) == pytest.approx(80)
    assert dense_weights.mass_kept({**trace, 'b': [Routing(even, even, even)]}, 1) == pytest.approx(65)


def test_all_arms_of_a_kind_come_from_one_training(data, monkeypatch):
    learned = []

    def watch(model, data, epochs, seed, **settings):
        learned.append((epochs, settings))

    monkeypatch.setattr(dense_weights, 'learn', watch)
    monkeypatch.setattr(dense_weights, 'ROUNDS', 3)
    experiment = find_experiment('prune')
    found = dict(zip([arm.name for arm in experiment.arms], experiment.run(
        [arm.options for arm in experiment.arms], 0, data)))
    json.dumps(found)
    # two networks, and an epoch for every arm
    assert learned == [(12, {})] * 2 + [(1, {'lr': 1e-3, 'warmup_epochs': 0})] * len(experiment.arms)
    for claim in experiment.claims:
        assert {claim.better, claim.worse} <= found.keys() and claim.metric in found[claim.better]
    for metrics in found.values():
        assert metrics['recovered'] == metrics['accuracy'] and metrics['gain'] == 0
        assert metrics['latency'] > 0 <= metrics['latency_spread']
    # a column of a router is 48 MACs a token; with one expert left, one is chosen
    for name, experts, chosen in (('8 experts', 8, 2), ('4 by mass', 4, 2), ('2 merged', 2, 2), ('1 at random', 1, 1)):
        macs = DENSE + TOKENS * ((chosen - 1) * EXPERT + experts * 48)
        assert found[name]['executed'] == found[name]['at_most'] == macs / 1000
        assert found[name]['chosen'] == chosen
    assert found['CondConv, folded']['executed'] == DENSE / 1000
    # an MLP has 48 * 192 * 2 weights, 192 + 48 biases, and 48 in the router
    assert found['8 experts']['parameters'] - found['4 by mass']['parameters'] == pytest.approx(
        3 * 4 * (EXPERT + 240 + 48) / 1000)


def test_the_page_shows_accuracy_over_experts():
    experiment, results = flat_results('prune', {'accuracy': 40., 'recovered': 45., 'gain': 5.})
    tokens, mixed = experiment.charts(results)
    assert 'by mass: 1 40.0 %, 2 40.0 %, 4 40.0 %, 8 40.0 %; by mass, recovered: 1 45.0 %' in tokens.alt
    assert 'at random, recovered' in tokens.alt and 'folded' not in tokens.alt
    assert 'folded: 1 40.0 %, 8 40.0 %' in mixed.alt and 'merged' not in mixed.alt
    assert report.section(results).title == experiment.title


@pytest.mark.slow
def test_both_run_on_photographs(shared_data, monkeypatch):
    """A few of them, an epoch each."""
    data = find_experiment('upcycle').load(str(shared_data / 'cifar10'))
    assert data.description == 'cifar10, 32 x 32 pixels: 4,000 train, 1,000 validation, 1,000 test'
    some = data.validation.take(torch.arange(100))
    few = data._replace(train=data.train.take(torch.arange(0, 4000, 20)), validation=some, test=some)
    for name, value in (('PRETRAINED', 1), ('TUNED', 1), ('EPOCHS', 1), ('ROUNDS', 3), ('TIMED', 1)):
        monkeypatch.setattr(dense_weights, name, value)
    for name in ('upcycle', 'prune'):
        experiment = find_experiment(name)
        found = experiment.run([arm.options for arm in experiment.arms], 0, few)
        assert len(found) == len(experiment.arms) and all(0 <= metrics['accuracy'] <= 100 for metrics in found)
        json.dumps(found)
