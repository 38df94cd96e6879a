"""The experiment of situational fusion, with two small buildings and a few steps of training."""
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from moe_zoo.data import navigation
from moe_zoo.errors import InputError
from moe_zoo.reproduce import runner
from moe_zoo.reproduce import situational_fusion as fusion
from moe_zoo.reproduce.report import section

SMALL = partial(fusion.load, buildings=(1, 1, 1), size=28)
K = len(fusion.NAMES)


@pytest.fixture(scope='module')
def data():
    return SMALL(None)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(fusion, 'STEPS', 10)
    monkeypatch.setattr(fusion, 'BATCH', 32)
    monkeypatch.setattr(fusion, 'SIZE', 28)


def test_worlds_are_different_buildings_with_what_is_seen_in_them(data):
    train, validation, test = data[:3]
    assert data.description.startswith('generated buildings of 28 x 28 cells: 1 buildings (')
    assert [int(world.cell[0, 0]) for world in (train, validation, test)] == [0, 1000, 2000]
    plan = navigation.generate_plan(2000, size=28)
    assert torch.equal(test.distance, navigation.build_graph(plan).distance)
    n = len(train.situation)
    assert train.pictures.shape == (n, 3, 16, 64) and train.representations.shape == (n, K, 256)
    assert len(test.places) == 1024 and test.openness.min() > 0
    with pytest.raises(InputError, match="--data-dir 'maps': situational-fusion generates its buildings and reads no"):
        fusion.load('maps')


def test_imitation_counts_all_optimal_actions_as_right():
    probabilities = torch.tensor([[.5, .3, .2], [.1, .1, .8]])
    optimal = torch.tensor([[True, True, False], [False, True, False]])
    # -(ln 0.8 + ln 0.1) / 2
    assert fusion.imitation(probabilities.log(), optimal).item() == pytest.approx(-(math.log(.8) + math.log(.1)) / 2)


def test_success_of_the_labels_and_of_chance(data):
    assert fusion.success(data.test.optimal.float(), data.test) == 100
    assert fusion.success(torch.ones(4, len(data.test.situation), 9), data.test) < 15


@pytest.mark.parametrize('mode, only', [
    ('single', 'semantics'), ('mean', None), ('concat', None), ('feature', None), ('action', None)])
def test_agents_give_probabilities(data, mode, only):
    agent = fusion.Agent(mode, only)
    some = torch.arange(5)
    output = agent(data.train.pictures[some], data.train.representations[some], torch.tensor([0, 1, 2, 3, 0]))
    assert output.shape == (5, 9)
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(5))


def test_policy_is_that_of_every_goal(data):
    agent = fusion.Agent('action').eval()
    table = fusion.policy(agent, data.test, batch_size=100)
    assert table.shape == (4, len(data.test.situation), 9)
    some = torch.tensor([3, 200])
    for goal in (0, 3):
        rows = agent(data.test.pictures[some], data.test.representations[some], torch.full((2,), goal)).exp()
        torch.testing.assert_close(table[goal, some], rows)


def test_heads_learn_each_for_itself(data, short):
    torch.manual_seed(0)
    together = fusion.train_heads(data.train, seed=3)
    torch.manual_seed(0)
    start, number, alone = fusion.Agent('mean'), fusion.NAMES.index('edges'), fusion.Agent('single', 'edges')
    alone.fusion.heads[0].load_state_dict(start.fusion.heads[number].state_dict())
    fusion.train(alone, data.train, seed=3)
    for ours, theirs in zip(together.fusion.heads[number].parameters(), alone.fusion.heads[0].parameters()):
        torch.testing.assert_close(ours, theirs)
    assert not torch.equal(together.fusion.heads[number][0].weight, start.fusion.heads[number][0].weight)


def test_gates_are_trained_on_the_heads_of_the_single_agents(data, short, monkeypatch):
    agents = []
    monkeypatch.setattr(fusion, 'assess', lambda agent, data: agents.append(agent) or {})
    options = [{'mode': 'single', 'only': 'depth'}, {'mode': 'mean'}, {'mode': 'action'},
               {'mode': 'action', 'end_to_end': True}]
    assert fusion.run_agents(options, 1, data) == [{}] * 4
    single, mean, action, end_to_end = (agent.fusion for agent in agents)
    assert single.heads[0] is mean.heads[0] is action.heads[0] is not end_to_end.heads[0]
    assert action.router.weight.any() and end_to_end.router.weight.any()  # they began at zero
    torch.manual_seed(1)
    assert torch.equal(fusion.train_heads(data.train, 1).fusion.heads[2][0].weight, action.heads[2][0].weight)


def test_affinity_is_measured_on_places(data):
    affinity = fusion.measure(data.train)
    assert torch.equal(affinity, affinity.T) and not affinity.diagonal().any()
    # Depth is nearer to the normals of the same walls than to where furniture is.
    depth, normals, semantics = (fusion.NAMES.index(name) for name in ('depth', 'normals', 'semantics'))
    assert affinity[depth, normals] > 2 * affinity[depth, semantics]


def test_even_weights_do_not_shift_and_a_gate_is_read_where_it_looks(data, monkeypatch):
    even = fusion.look_at_gate(fusion.Agent('mean'), data.test)
    assert [even[name] for name in ('geometry_shift', 'meaning_shift', 'openness')] == pytest.approx([0, 0, 0])
    assert even['representations'] == pytest.approx(K)
    # Depth alone in corridors, semantics alone elsewhere.
    corridor = (data.test.situation == navigation.IN_CORRIDOR)
    weights = torch.zeros(len(corridor), K)
    weights[corridor, fusion.NAMES.index('depth')] = 1.
    weights[~corridor, fusion.NAMES.index('semantics')] = 1.
    monkeypatch.setattr(fusion, 'weigh', lambda agent, world: weights)
    found = fusion.look_at_gate(None, data.test)
    assert found['geometry_shift'] == pytest.approx(100) and found['meaning_shift'] == pytest.approx(100)
    assert found['representations'] == pytest.approx(1) and found['redundancy'] == 0
    assert found['weights']['corridors'] == [float(name == 'depth') for name in fusion.NAMES]
    share, open_ = (~corridor).double(), data.test.openness.double()
    by_hand = ((share - share.mean()) * (open_ - open_.mean())).mean() / (
        share.std(correction=0) * open_.std(correction=0))
    assert found['openness'] == pytest.approx(by_hand.item(), abs=1e-6)


def test_the_gate_does_not_see_what_is_dropped(data):
    """Only the head of the representation that is zeroed tells something else."""
    agent = fusion.Agent('action').eval()
    some = torch.arange(3)
    inputs = data.train.pictures[some], data.train.representations[some], torch.tensor([0, 1, 2])
    zeroed = inputs[1].clone()
    zeroed[:, 2] = 0
    with torch.no_grad(), fusion.disturb_representations(agent, [2]):
        dropped = agent(*inputs)
    with torch.no_grad():
        torch.testing.assert_close(dropped, agent(inputs[0], zeroed, inputs[2]))
        heads = agent.candidates(zeroed, inputs[2]).exp()
        torch.testing.assert_close(dropped.exp(), heads.mean(dim=1))  # an untrained gate weighs evenly


def test_a_run_says_what_agents_can_do(data, short):
    some = [arm for arm in fusion.EXPERIMENT.arms if arm.name in ('random', 'depth', 'action + affinity')]
    random, depth, fused = fusion.run_agents([arm.options for arm in some], 0, data)
    assert set(random) == {'success', 'success_seen'} and 'dropped' not in depth
    assert fused['hurt_noised'] == fused['success'] - fused['noised']
    assert 0 < fused['optimal'] < 100 and fused['redundancy'] > 0
    graph = navigation.build_graph(navigation.generate_plan(2000, size=28))
    cells = graph.cell[:, 1:].tolist()
    for metrics in (depth, fused):
        assert metrics['episode']['building'] == 2000
        way = [cells.index(point[:2]) for point in metrics['episode']['way']]
        assert all(there in graph.following[here] for here, there in zip(way, way[1:]))


@pytest.mark.slow
def test_the_experiment_runs_to_its_section(data, short, monkeypatch, tmp_path):
    fork = runner.multiprocessing.get_context('fork')  # keeps what `short` changed
    monkeypatch.setattr(runner.multiprocessing, 'get_context', lambda kind: fork)
    monkeypatch.setattr(runner, 'COMPUTES', ())
    experiment = replace(fusion.EXPERIMENT, load=SMALL)
    results = runner.reproduce(experiment, tmp_path, seeds=2, jobs=2, pilot=True)
    assert results['status'] == 'done' and len(results['claims']) == len(experiment.claims)
    arms = {arm['name']: arm['metrics'] for arm in results['arms']}
    assert set(arms['random']) == {'success', 'success_seen'}
    for name in ('action', 'feature', 'concat', 'mean'):
        assert arms[name]['hurt_dropped']['mean'] == pytest.approx(
            arms[name]['success']['mean'] - arms[name]['dropped']['mean'])
    assert 'dropped' not in arms['depth'] and abs(arms['concat']['geometry_shift']['mean']) < 1e-9
    run = next(run for run in results['runs'] if run['arm'] == 'action')['metrics']
    assert run['episode']['building'] == 1000  # a pilot looks at validation
    figure = next(block for block in section(results).blocks if getattr(block, 'image', '').count('<polyline') == 1)
    assert figure.image.count('<circle') == len(run['episode']['way']) + 1
