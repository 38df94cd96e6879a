"""The experiment of consistent routes: what its arms train on and what it measures, on a short training."""
import json
from functools import partial

import pytest
import torch

from moe_zoo.engine.consistency import RouteConsistencyTask
from moe_zoo.layers import MoEMlp
from moe_zoo.reproduce import find_experiment, training
from moe_zoo.reproduce import route_consistency as experiment_file
from moe_zoo.reproduce.training import Data, Split


@pytest.fixture(scope='module')
def few():
    """64 digits to learn from, 32 to measure on."""
    data = find_experiment('route-consistency').load(None)
    some = data.test.take(torch.arange(32))
    return data._replace(train=data.train.take(torch.arange(64)), validation=some, test=some)


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(experiment_file, 'fit', partial(_short, experiment_file.fit))


def _short(fit, *args, **settings):
    return fit(*args, **{**settings, 'epochs': 1})


def test_every_arm_returns_the_metrics_of_the_claims(few, short):
    experiment = find_experiment('route-consistency')
    found = {}
    for arm in experiment.arms:
        torch.manual_seed(0)
        found[arm.name] = experiment.run(arm.options, 0, few)
    json.dumps(found)
    for claim in experiment.claims:
        for arm in (claim.better, claim.worse):
            assert 0 <= found[arm][claim.metric] <= 100
    for metrics in found.values():
        shares = [metrics[f'noise_{sigma:g}'] for sigma in experiment_file.SIGMAS]
        assert 0 < shares[0] < shares[-1]  # more noise, other routes
        assert metrics['chance'] <= 100
    assert len({metrics['crop'] for metrics in found.values()}) == 3  # the losses do something


def test_all_arms_see_the_same_views_of_the_same_images(few, monkeypatch):
    seen = []

    class Watched(RouteConsistencyTask):
        def forward(self, input, target):
            seen[-1].append((input, target))
            return super().forward(input, target)

    monkeypatch.setattr(experiment_file, 'RouteConsistencyTask', Watched)
    monkeypatch.setattr(experiment_file, 'fit', partial(_short, training.fit))
    for arm in find_experiment('route-consistency').arms:
        seen.append([])
        experiment_file.run_views(arm.options, 0, few)
    for batches in zip(*seen):
        (first, target), *others = batches
        assert first.shape == (64, 1, 24, 24)  # 32 images in two views
        assert torch.equal(target.targets[:32], target.targets[32:])
        assert not torch.equal(first[:32], first[32:])
        assert all(torch.equal(first, other) and torch.equal(target.maps, geometry.maps) for other, geometry in others)
    assert len(seen[0]) == 2


def test_use_of_experts_by_hand():
    """Expert 0 is chosen by three tokens, expert 1 by one: mean 2, deviation 1, which is 50 %."""
    layer = MoEMlp(2, 4, num_experts=2, num_selected=1)
    layer.router.weight.data.copy_(torch.tensor([[1., 0.], [0., 0.]]))  # logits are the first number and 0
    images = torch.tensor([[1., 0.], [1., 0.], [1., 0.], [-1., 0.]]).view(4, 1, 2)
    split = Split(images, torch.zeros(4, dtype=torch.int64))
    found = experiment_file.use(layer, Data(split, split, split, 2, ''))
    # the largest gate is 1 / (1 + e^-1) = 73.106 % everywhere
    assert found == {'cv': pytest.approx(50), 'gate': pytest.approx(73.106, abs=1e-3)}
