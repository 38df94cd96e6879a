"""pMoE's experiments: what they measure, on networks small enough to train here."""
import json

import pytest
import torch

from moe_zoo.reproduce import find_experiment, pmoe
from moe_zoo.reproduce.training import accuracy


@pytest.fixture
def short(monkeypatch):
    """Few images and epochs."""
    monkeypatch.setattr(pmoe, 'COUNTS', (20, 40))
    monkeypatch.setattr(pmoe, 'EPOCHS', 2)


@pytest.fixture(scope='module')
def framed():
    return pmoe.load_patches(None, framed=True)


@pytest.mark.parametrize('curve, level, expected', [
    # straight from 50 % at 100 to 90 % at 200 images: 70 % at 150 of 200
    ({100: 50., 200: 90.}, 70., 75.),
    ({100: 50., 200: 90.}, 90., 100.),
    # it begins above the level: the first point; it never gets there: all
    ({100: 50., 200: 90.}, 40., 50.),
    ({100: 50., 200: 90.}, 95., 100.),
    # the first time counts, from a point below: 60 % lies a quarter of the way from 100 to 200
    ({100: 50., 200: 90., 400: 50.}, 60., 31.25),
    ({100: 50., 200: 50., 400: 50.}, 50., 25.),
])
def test_images_needed_for_an_accuracy(curve, level, expected):
    assert pmoe.needed(curve, level) == pytest.approx(expected)


def test_frames_agree_with_95_of_100_and_can_be_turned_round(framed):
    for split in (framed.train, framed.validation, framed.test):
        shade = split.images[:, 0, 0, 0]
        agrees = (shade > 0) == (split.targets == 1)
        assert agrees.double().mean().item() == .95
        assert shade.unique().tolist() == pytest.approx([0., 64 / 255])
    images = framed.test.images
    other = pmoe.other_frame(images)
    assert ((other[:, 0, 0, 0] > 0) != (images[:, 0, 0, 0] > 0)).all()
    assert torch.equal(other[..., 1:-1, 1:-1], images[..., 1:-1, 1:-1])
    torch.testing.assert_close(pmoe.other_frame(other), images)


def test_smaller_sets_are_balanced_parts_of_larger_ones(framed, monkeypatch):
    taken = []
    monkeypatch.setattr(pmoe, 'fit', lambda model, data, **settings: taken.append(data.train))
    models = [pmoe.train(pmoe.JOINT, framed, count, seed) for count, seed in ((20, 0), (40, 0), (20, 0), (20, 1))]
    small, large, again, other = ({image.numpy().tobytes() for image in split.images} for split in taken)
    assert taken[0].targets.bincount().tolist() == [10, 10] and small < large and small == again and small != other
    first, _, second, third = (model.stages[0].weight for model in models)
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_separate_training_has_its_router_epochs(framed, monkeypatch):
    epochs = []
    monkeypatch.setattr(pmoe, 'fit', lambda *args, **settings: epochs.append(settings['epochs']))
    for options in (pmoe.CNN, pmoe.JOINT, pmoe.SEPARATE):
        pmoe.train(options, framed, 20, 0)
    assert epochs == [150, 150, 250]


def test_the_expert_of_a_class_in_separate_training_is_its_own(framed, short):
    model = pmoe.train(dict(pmoe.SEPARATE, router_epochs=5), framed, 20, 0)
    test = framed.test
    taken = pmoe._record(model, test).kept.view(1000, 16, 2)
    mine = taken[torch.arange(1000), test.positions, test.targets]
    found = pmoe.precision(model, pmoe.SEPARATE, framed)
    assert found['label_kept'] == pytest.approx(100 * mine.double().mean().item())
    # two of sixteen patches are taken: 14 of the 15 others are dropped where one of the two is the label's, else 13
    assert found['others_dropped'] == pytest.approx(100 * (13 + found['label_kept'] / 100) / 15)


@pytest.mark.parametrize('name', ['pmoe-samples', 'pmoe-spurious'])
def test_every_arm_returns_the_metrics_of_the_claims(name, short):
    experiment = find_experiment(name)
    data = experiment.load(None)
    returned = {arm.name: experiment.run(arm.options, 0, data) for arm in experiment.arms}
    json.dumps(returned)
    for claim in experiment.claims:
        metric = claim.metric.replace('_100', '_20').replace('_400', '_40')
        for arm in (claim.better, claim.worse):
            assert 0 <= returned[arm][metric] <= 100
    assert all(('label_kept' in metrics) == ('pMoE' in arm or 'routers' in arm) for arm, metrics in returned.items())


def test_random_routers_stay_as_they_are(framed, monkeypatch):
    monkeypatch.setattr(pmoe, 'EPOCHS', 1)
    trained = pmoe.train(pmoe.RANDOM, framed, 40, 0).stages[0]
    monkeypatch.setattr(pmoe, 'EPOCHS', 0)
    fresh = pmoe.train(pmoe.RANDOM, framed, 40, 0).stages[0]
    assert torch.equal(trained.router.weight, fresh.router.weight) and not torch.equal(trained.weight, fresh.weight)


@pytest.mark.slow
def test_a_cnn_takes_the_shortcut_and_pmoe_the_digit(framed):
    reversed_ = pmoe.Split(pmoe.other_frame(framed.validation.images), framed.validation.targets)
    scores = [accuracy(pmoe.train(options, framed, 400, 0), reversed_) for options in (pmoe.CNN, pmoe.JOINT)]
    assert scores[0] < 50 < 75 < scores[1]
