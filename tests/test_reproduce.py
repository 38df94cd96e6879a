"""Experiments: the statistics by hand, the verdicts, runs that resume and fail by name, what is told of them."""
import json
import pickle
import re
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from moe_zoo.analysis import origin
from moe_zoo.cards import cards
from moe_zoo.errors import InputError
from moe_zoo.reproduce import FILES, Arm, Claim, Experiment, cli, find_experiment, report, runner, training
from moe_zoo.reproduce.training import Data, Split
from moe_zoo.reproduce.verdict import Paired, detectable_effect, judge, paired_test, power

SPLIT = Split(torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]))


def load_four(folder):
    return Data(SPLIT, SPLIT._replace(images=SPLIT.images + 1), SPLIT, 2, 'four images')


def run_four(options, seed, data):
    """Says how often it was called, and fails while a file is there."""
    with open(options['log'], 'a', encoding='utf-8') as log:
        log.write(f'{options["gain"]} {seed}\n')
    if options['gain'] and seed == 0 and Path(options['trap']).exists():
        raise ValueError('fell into the trap')
    noise = torch.rand(()).item() / 100  # drawn from the seed's state
    return {'accuracy': 50 + options['gain'] + seed + noise, 'threads': torch.get_num_threads(), 'curve': [1, 2, 3]}


def experiment_of_four(folder, gain=2):
    options = {'log': str(folder / 'log'), 'trap': str(folder / 'trap')}
    arms = Arm('a', {**options, 'gain': 0}), Arm('b b', {**options, 'gain': gain})
    claim = Claim('b is better.', 'accuracy', 'b b', 'a', deviation=1., published=1.5, source='a table')
    return Experiment('four', 'Four images', 'a paper', 'Is b better?', arms, (claim,), run_four, load_four)


# --- Statistics -------------------------------------------------------------------------------------------------------

def test_paired_test_by_hand():
    found = paired_test([11, 22, 33], [10, 20, 30])
    # Differences 1, 2, 3: mean 2, s = 1, t = 2 / (1 / sqrt(3)) = 3.4641. With 2 degrees of freedom the two-sided p is
    # 1 - t / sqrt(2 + t^2) = 1 - 3.4641 / sqrt(14) = 0.07418; the 97.5 % quantile is 4.3027, times 0.57735 is 2.4841.
    assert found.n == 3 and found.mean == 2 and found.deviation == pytest.approx(1)
    assert found.p == pytest.approx(0.07418, abs=1e-5)
    assert (found.low, found.high) == pytest.approx((2 - 2.4841, 2 + 2.4841), abs=1e-4)


def test_differences_without_spread_leave_no_doubt():
    assert paired_test([3, 4], [1, 2]) == Paired(2, 0, 2, 2, 0, 2)
    assert paired_test([1, 2], [1, 2]) == Paired(0, 0, 0, 0, 1, 2)
    assert paired_test([97.3 + .1, 96.1 + .1], [97.3, 96.1]).p == 0  # equal but for rounding


def test_arms_of_different_length_are_not_paired():
    with pytest.raises(ValueError):
        paired_test([1, 2, 3], [1, 2])


def test_power_and_detectable_effect_are_those_of_the_tables():
    # Published tables of the paired t-test at 5 %, two-sided: 34 pairs find half a deviation with a power of 0.808,
    # and 10 pairs need 0.996 deviations for a power of 0.8.
    assert power(.5, 1, 34) == pytest.approx(.808, abs=5e-4)
    assert detectable_effect(1, 10) == pytest.approx(.996, abs=5e-4)
    assert detectable_effect(3, 10) == pytest.approx(3 * .996, abs=2e-3)
    assert detectable_effect(0, 10) == 0


@pytest.mark.parametrize('low, high, deviation, published, verdict', [
    (.1, 2, 1, None, 'effect seen'),
    (-2, -.1, 1, 5, 'opposite'),
    (-.1, 2, 1, 1., 'not seen'),  # 10 pairs detect 0.996 deviations: an effect of 1 would have been found
    (-.1, 2, 1, .99, 'undecided'),
    (-.1, 2, 1, None, 'undecided'),
    (0, 0, 0, .1, 'not seen'),
])
def test_verdicts(low, high, deviation, published, verdict):
    assert judge(Paired((low + high) / 2, deviation, low, high, .5, 10), published) == verdict


@pytest.mark.parametrize('level, verdict', [(90, 'not seen'), (99, 'undecided')])
def test_an_effect_that_has_no_room_is_not_missed(tmp_path, level, verdict):
    """Without spread every effect is detectable; but 99 + 1.5 points are more than all."""
    experiment = experiment_of_four(tmp_path)
    runs = [{'arm': arm, 'seed': seed, 'seconds': 1., 'metrics': {'accuracy': level}}
            for arm in ('a', 'b b') for seed in (0, 1)]
    plan = runner._planned(experiment, [0, 1], load_four(None), tmp_path)
    results = runner.summarise(experiment, plan, {}, runs)
    assert results['status'] == 'done' and results['claims'][0]['verdict'] == verdict


# --- Running ----------------------------------------------------------------------------------------------------------

def test_a_failing_run_is_named_and_the_rest_is_kept_and_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'COMPUTES', ())  # whoever edits the code while this runs does not disturb it
    experiment, log = experiment_of_four(tmp_path), tmp_path / 'log'
    (tmp_path / 'trap').touch()
    with pytest.raises(RuntimeError, match="four: arm 'b b', seed 0 failed: ValueError: fell into the trap"):
        runner.reproduce(experiment, tmp_path, seeds=2, jobs=1)
    half = json.loads((tmp_path / 'four' / 'results.json').read_text())
    assert half['status'] == 'running' and not half['claims']
    assert half['plan']['claims'][0]['detectable'] == pytest.approx(detectable_effect(1, 2))
    kept = json.loads((tmp_path / 'four' / 'runs' / 'a-seed0.json').read_text())

    (tmp_path / 'trap').unlink()
    log.unlink()
    fork = runner.multiprocessing.get_context('fork')  # starts in no time; above it was the real thing, 'spawn'
    monkeypatch.setattr(runner.multiprocessing, 'get_context', lambda kind: fork)
    results = runner.reproduce(experiment, tmp_path, seeds=2, jobs=2)
    assert sorted(log.read_text().splitlines()) == ['0 1', '2 0', '2 1']  # a with seed 0 is there already
    a, b = (arm['metrics'] for arm in results['arms'])
    assert a['accuracy']['values'][0] == kept['metrics']['accuracy']
    assert a['accuracy']['values'] == pytest.approx([50, 51], abs=.01)
    assert b['accuracy']['mean'] == pytest.approx(52.5, abs=.01)
    assert a['threads']['mean'] == 1 and 'curve' not in a
    assert a['accuracy']['values'][0] + 2 == pytest.approx(b['accuracy']['values'][0])  # one seed, one random state
    assert results['claims'][0]['verdict'] == 'effect seen'
    assert results['plan'] == half['plan']
    assert json.loads((tmp_path / 'four' / 'results.json').read_text()) == results

    runner.reproduce(experiment, tmp_path, seeds=2)
    assert len(log.read_text().splitlines()) == 3  # nothing was left to do


def run_both(options, seed, data):
    """One call for all arms."""
    with open(options[0]['log'], 'a', encoding='utf-8') as log:
        log.write(f'{seed} ')
    shared = torch.rand(()).item()
    return [{'accuracy': shared + each['gain']} for each in options]


def test_arms_that_share_a_training_are_run_in_one_call(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, 'COMPUTES', ())
    experiment = replace(experiment_of_four(tmp_path), run=run_both, together=True)
    fork = runner.multiprocessing.get_context('fork')
    monkeypatch.setattr(runner.multiprocessing, 'get_context', lambda kind: fork)
    results = runner.reproduce(experiment, tmp_path, seeds=2, jobs=1)
    assert (tmp_path / 'log').read_text() == '0 1 '
    assert [arm['name'] for arm in results['arms']] == ['a', 'b b'] and len(results['runs']) == 4
    # the gain of 2 is all that tells them apart
    assert (results['claims'][0]['difference'], results['claims'][0]['deviation']) == (pytest.approx(2), 0)
    (tmp_path / 'four' / 'runs' / 'a-seed1.json').unlink()  # one that is missing takes the others of its seed along
    assert runner.reproduce(experiment, tmp_path, seeds=2, jobs=1)['claims'] == results['claims']
    assert (tmp_path / 'log').read_text() == '0 1 1 '


def test_runs_made_for_something_else_are_not_taken(tmp_path, monkeypatch):
    experiment, other = experiment_of_four(tmp_path), experiment_of_four(tmp_path, gain=3)
    code = runner.fingerprint(experiment, load_four(None))
    keys = [runner.made_for(code, arm, 0) for arm in (experiment.arms[1], other.arms[1])]
    assert keys[0] != keys[1] != runner.made_for(code, experiment.arms[1], 1)
    run = {'made_for': keys[0], 'arm': 'b b', 'seed': 0, 'seconds': 1., 'metrics': {}}
    runner._write_json(runner._run_file(tmp_path, 'b b', 0), run)
    assert runner._kept(tmp_path, experiment.arms[1], 0, keys[0])['arm'] == 'b b'
    assert runner._kept(tmp_path, other.arms[1], 0, keys[1]) is None
    assert runner._kept(tmp_path, Arm('b_b', {}), 0, keys[0]) is None  # another arm with a file of that name
    data = load_four(None)
    assert runner.fingerprint(experiment, data._replace(train=data.validation)) != code
    monkeypatch.setattr(runner, 'COMPUTES', runner.COMPUTES[1:])
    assert runner.fingerprint(experiment, data) != code


@pytest.mark.parametrize('changed', [False, True])
def test_results_name_their_commit_and_changes_since(tmp_path, monkeypatch, changed):
    package = tmp_path / 'moe_zoo'
    package.mkdir()
    (package / '__init__.py').touch()
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=a', '-c', 'user.email=a@b']
    for command in (['init', '-q'], ['add', '.'], ['commit', '-q', '-m', 'first']):
        subprocess.run([*git, *command], check=True)
    (tmp_path / 'README.md').write_text('published')  # is no change of what computes
    if changed:
        (package / 'new.py').touch()
    monkeypatch.setattr(origin, '__file__', str(package / 'analysis' / 'origin.py'))
    head = subprocess.run([*git, 'rev-parse', 'HEAD'], capture_output=True, text=True).stdout[:12]
    assert runner._made_by()['commit'] == head + '-dirty' * changed
    assert set(runner._made_by()) == {'moe_zoo', 'commit', 'torch', 'timm'}
    monkeypatch.setattr(origin, '__file__', str(package / 'venv' / 'moe_zoo' / 'analysis' / 'origin.py'))
    assert runner._made_by()['commit'] is None  # installed inside another's repository


def test_a_pilot_never_sees_the_test_images():
    data = runner._without_test(load_four, None)
    assert data.test is data.validation and data.description == 'four images; pilot, measured on validation'


def test_a_run_must_return_finite_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, '_WORK', [lambda options, seed, data: {'accuracy': float('nan')}, False, None])
    with pytest.raises(ArithmeticError, match='accuracy is not a finite number'):
        runner._run([Arm('a', {})], 0)


@pytest.mark.parametrize('metrics', [{'acuracy': 50.}, {'accuracy': [50.]}])
def test_a_metric_that_no_run_returns_is_told_at_the_first_run(tmp_path, metrics):
    run = {'arm': 'b b', 'seed': 0, 'seconds': 1., 'metrics': metrics}
    with pytest.raises(RuntimeError, match="the claim 'b is better.' needs the number 'accuracy', and arm 'b b' retur"):
        runner._check_metrics(experiment_of_four(tmp_path), run)
    runner._check_metrics(experiment_of_four(tmp_path), {**run, 'arm': 'c'})


def test_an_experiment_that_does_not_hold_together_is_refused(tmp_path):
    good = experiment_of_four(tmp_path)
    parts = {name: getattr(good, name) for name in good.__dataclass_fields__}
    with pytest.raises(InputError, match="four: the claim 'c' names 'z', not one of"):
        Experiment(**{**parts, 'claims': (Claim('c', 'accuracy', 'z', 'a', 1.),)})
    with pytest.raises(InputError, match='four: arms need names of their own'):
        Experiment(**{**parts, 'arms': (good.arms[0], good.arms[0])})


# --- The registry and the command -------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', FILES)
def test_every_experiment_is_whole(name):
    experiment = find_experiment(name)
    assert experiment.name == name and experiment.question
    assert experiment.seeds >= (3 if name == 'bccd' else 5)  # a run of it takes a quarter of an hour
    assert set(experiment.cards) <= set(cards())
    json.dumps([arm.options for arm in experiment.arms])
    pickle.dumps((experiment.run, experiment.load))  # they travel to worker processes
    for claim in experiment.claims:
        assert claim.deviation > 0 and claim.text.endswith('.')
        assert claim.published is None or claim.source, f'{claim.text} has a published effect without a source'
    files = {runner._run_file(Path(), arm.name, 0) for arm in experiment.arms}
    assert len(files) == len(experiment.arms)


def _refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and not printed.out and printed.err.count('\n') == 1
    return printed.err.removeprefix('error: ').rstrip()


@pytest.mark.parametrize('arguments, message', [
    (['condcnv'], "There is no experiment 'condcnv'. Did you mean 'condconv' or "),
    (['condconv', 'zzz'], "There is no experiment 'zzz'. Known are condconv, condconv-routes, "),
    ([], 'Name an experiment, or all: condconv, condconv-routes, '),
    (['condconv', '--seeds', '1'], '--seeds 1: a paired test needs at least 2 seeds.'),
    (['condconv', '--jobs', '0'], '--jobs 0: at least one process is needed.'),
    (['condconv', '--pilot', '--publish'], '--pilot --publish: a pilot chooses; only what was measured on test'),
])
def test_what_the_command_cannot_do_is_one_sentence(capsys, tmp_path, arguments, message):
    assert _refused(capsys, *arguments, '--output', str(tmp_path)).startswith(message)
    assert not list(tmp_path.iterdir())


def test_data_that_are_not_there_are_one_sentence(capsys, tmp_path):
    arguments = ['condconv', '--output', str(tmp_path / 'out'), '--data-dir', str(tmp_path)]
    assert _refused(capsys, *arguments).startswith(
        f"--data-dir '{tmp_path}' holds neither one npz file nor the folders train and test (or val)")
    (tmp_path / 'a.npz').write_text('no archive')
    assert _refused(capsys, *arguments).startswith(f"--data-dir '{tmp_path / 'a.npz'}' is no npz with x_train, y_tr")
    assert not (tmp_path / 'out').exists()


def test_list_and_help(capsys):
    assert cli.main(['--list']) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(FILES)
    with pytest.raises(SystemExit):
        cli.main(['--help'])
    out = capsys.readouterr().out
    assert 'not seen' in out and 'examples:' in out


# --- Training ---------------------------------------------------------------------------------------------------------

def test_digits_have_three_disjoint_balanced_splits():
    pytest.importorskip('sklearn')
    data = training.load_digits_data(16)
    sizes = [len(split.targets) for split in (data.train, data.validation, data.test)]
    assert sizes == [1157, 285, 355]  # 285: the floor of a fifth of every class of 1,442
    assert data.model_kwargs == {'in_chans': 1, 'num_classes': 10}
    assert data.train.images.shape == (1157, 1, 16, 16)
    assert float(data.train.images.mean()) == pytest.approx(0, abs=1e-5)
    assert float(data.train.images.std()) == pytest.approx(1, abs=1e-5)
    images = torch.cat([split.images for split in (data.train, data.validation, data.test)]).flatten(1)
    assert len(images.unique(dim=0)) == len(images) == 1797
    assert len(data.validation.targets.unique()) == 10


def test_an_npz_and_folders_are_read_alike(tmp_path):
    """Eight training images of two classes, each class of one grey: 128 in class 0, 255 in class 1."""
    grey, targets = np.array([128, 255] * 5, dtype=np.uint8), np.array([0, 1] * 5)
    images = np.broadcast_to(grey[:, None, None], (10, 6, 6))
    np.savez(tmp_path / 'some.npz', x_train=images, y_train=targets, x_test=images[:4], y_test=targets[:4])
    for part, number in (('train', 10), ('val', 4)):
        for i in range(number):
            (tmp_path / 'folders' / part / str(targets[i])).mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(tmp_path / 'folders' / part / str(targets[i]) / f'{i}.png')
    archive = training.load_folder(str(tmp_path / 'some.npz'), 4)
    folders = training.load_folder(str(tmp_path / 'folders'), 4)
    assert archive.model_kwargs == {'in_chans': 1, 'num_classes': 2}
    assert folders.model_kwargs == {'in_chans': 3, 'num_classes': 2}
    for data in (archive, folders):
        assert [len(split.targets) for split in data[:3]] == [8, 2, 4]  # a fifth of 5 images of each class is held out
        assert data.validation.targets.sort().values.tolist() == [0, 1]
        assert data.train.images.shape[-2:] == (4, 4)
        ones = data.train.images[data.train.targets == 1]
        # Half of the pixels at 128, half at 255, standardised: -1 and 1, but for the n - 1 of the deviation.
        assert torch.allclose(ones, torch.ones(()), atol=.02)
    assert archive.description == 'some.npz, 4 x 4 pixels: 8 train, 2 validation, 4 test'


def test_a_folder_of_validation_images_is_used_and_classes_must_agree(tmp_path):
    for part, grey in (('train', 0), ('train', 200), ('val', 100), ('test', 50)):
        for name in ('cat', 'dog'):
            (tmp_path / part / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((4, 4), grey, dtype=np.uint8)).save(tmp_path / part / name / f'{grey}.png')
    data = training.load_folder(str(tmp_path), 4)
    assert [len(split.targets) for split in data[:3]] == [4, 2, 2]
    # Greys 0 and 200 have the mean 100: what was 100 is 0, what was 50 lies half a deviation below.
    assert data.validation.images.abs().max() < .01 and float(data.test.images.mean()) == pytest.approx(-.5, abs=.01)
    (tmp_path / 'test' / 'dog').rename(tmp_path / 'test' / 'eel')
    with pytest.raises(InputError, match='its parts hold folders of different classes'):
        training.load_folder(str(tmp_path), 4)
    (tmp_path / 'test' / 'eel').rename(tmp_path / 'test' / 'dog')
    (tmp_path / 'val' / 'cat' / '100.png').write_text('no image')
    with pytest.raises(InputError, match=r"The image '.*100.png' cannot be read"):
        training.load_folder(str(tmp_path), 4)


def test_shifted_images_are_moved_and_their_edge_is_repeated():
    images = torch.arange(9.).view(1, 1, 3, 3).repeat(64, 1, 1, 1)
    moved = training.shifted(images, 1, torch.Generator().manual_seed(0))
    found = {tuple(image.flatten().int().tolist()) for image in moved}
    assert (0, 1, 2, 3, 4, 5, 6, 7, 8) in found  # not moved
    assert (0, 0, 1, 0, 0, 1, 3, 3, 4) in found  # down and right by one
    assert (1, 2, 2, 4, 5, 5, 7, 8, 8) in found  # left by one
    assert len(found) == 9


def test_scattered_images_keep_their_ground_and_their_splits():
    """A white square of 8 x 8 pixels on a ground of -1 shrinks to at least a quarter of its area, and stays inside."""
    images = torch.full((8, 1, 16, 16), -1.)
    images[:, :, 4:12, 4:12] = 1
    split = Split(images, torch.arange(8))
    data = training.scattered(Data(split, split, split, 8, 'squares'))
    assert [len(part.targets) for part in data[:3]] == [32, 16, 16]
    assert data.train.targets.tolist() == list(range(8)) * 4
    assert data.description == 'squares, scattered: 4 copies of a training image, 2 of the others'
    area = (data.train.images + 1).sum(dim=(1, 2, 3)) / 2  # in pixels
    assert 14 < area.min() < 30 < area.max() < 66 and float(data.train.images.min()) == -1
    assert len(data.train.images.flatten(1).unique(dim=0)) == 32
    assert not torch.equal(data.validation.images, data.test.images)
    ring = data.train.images.clone()
    ring[:, :, 1:-1, 1:-1] = -1
    assert (ring == -1).flatten(1).all(dim=1).float().mean() > .7  # most squares touch no edge, wherever they went
    again = training.scattered(Data(split, split, split, 8, 'squares'))
    assert torch.equal(again.train.images, data.train.images)


def test_batches_are_those_of_the_seed_whatever_the_model_draws():
    split = Split(torch.arange(10.).view(10, 1, 1, 1), torch.arange(10))

    def epochs(draws):
        order = torch.Generator().manual_seed(3)
        for _ in range(2):
            for batch in training.batches(split, 4, order, shift=1):
                torch.rand(draws)
                yield batch.targets.tolist()

    first, second = list(epochs(0)), list(epochs(5))
    assert first == second and [len(batch) for batch in first] == [4] * 4
    assert first[:2] != first[2:]
    whole = list(training.batches(split, 64, torch.Generator()))
    assert len(whole) == 1 and sorted(whole[0].targets.tolist()) == list(range(10))


class Told(nn.Linear):
    """A classifier of flat images that remembers what it was told."""

    def __init__(self):
        super().__init__(4, 2)
        self.epochs, self.steps = [], 0

    def forward(self, x):
        return super().forward(x.flatten(1))

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def end_step(self):
        self.steps += 1


def test_fit_learns_and_tells_the_model_of_epochs_and_steps():
    targets = torch.arange(32) % 2
    images = torch.randn(32, 1, 2, 2) * .1
    images[:, 0, 0, 0] += 2. * targets - 1
    split = Split(images, targets)
    data = Data(split, split, split, 2, '')
    model, seen = Told(), []
    averaged = training.fit(
        model, data, epochs=5, batch_size=8, lr=.5, ema=.9, on_epoch=lambda epoch, model: seen.append(epoch))
    assert training.accuracy(model, data.test) == 100
    assert model.epochs == [0, 1, 2, 3, 4] and model.steps == 5 * 4 and seen == [1, 2, 3, 4, 5]
    assert not model.training and not averaged.training
    assert not torch.equal(averaged.module.weight, model.weight)
    assert training.fit(Told(), data, epochs=1) is None
    part = Told()
    training.fit(part, data, epochs=1.6, batch_size=8, lr=.5)  # 1.6 times 4 batches are 6.4
    assert part.epochs == [0, 1] and part.steps == 6
    assert training.cost(model, data) == {'parameters': 10, 'macs': 8}


def test_accuracy_by_hand():
    split = Split(torch.tensor([1., 2., -1., -2.]).view(4, 1, 1, 1), torch.tensor([0, 0, 0, 1]))

    class Sign(nn.Module):
        def forward(self, x):
            return torch.cat([x.flatten(1), -x.flatten(1)], dim=1)

    assert training.accuracy(Sign(), split) == 75  # the third is taken for 1


# --- What is told -----------------------------------------------------------------------------------------------------

@pytest.fixture
def results(tmp_path):
    """a: 50, 51, 52; b: 51, 53, 55. Differences 1, 2, 3, see `test_paired_test_by_hand`."""
    experiment = experiment_of_four(tmp_path)
    runs = [{'arm': arm, 'seed': seed, 'seconds': 1., 'metrics': {'accuracy': 50 + seed + gain * (1 + seed), 'x': [1]}}
            for arm, gain in (('a', 0), ('b b', 1)) for seed in (0, 1, 2)]
    plan = runner._planned(experiment, [0, 1, 2], load_four(None), tmp_path)
    return runner.summarise(experiment, plan, {'moe_zoo': '0', 'commit': 'abc', 'torch': '2', 'timm': '1'}, runs)


def test_the_verdict_line(results):
    # 3 pairs detect 3.26 deviations, more than the published 1.5: no effect of that size could be missed for sure.
    assert detectable_effect(1, 3) == pytest.approx(3.26, abs=.01)
    assert report.verdict_line(results) == (
        'undecided: b b minus a +2.00 points of accuracy (95 % interval -0.48 to +4.48, p = 0.074, 3 seeds; '
        'detectable 3.26; published +1.5)')


def test_the_section_shows_arms_claims_and_every_run(results, monkeypatch, tmp_path):
    monkeypatch.setattr(report, 'find_experiment', lambda name: experiment_of_four(tmp_path))
    section = report.section(results)
    page = report.Page('', '', [section]).html()
    assert section.status == 'done' and section.headline.startswith('**Undecided: b b minus a')
    assert 'Claim 1.</strong> b is better. Published: a table.' in page
    assert '53 ± 2' in page and '51 ± 1' in page  # means and deviations of 51, 53, 55 and of 50, 51, 52
    assert page.count('<circle') >= 6 and 'four images' in page
    half = {**results, 'status': 'running', 'runs': results['runs'][:4]}
    assert report.section(half).headline == 'b is better. 4 of 6 runs are done.'
    assert report.section(half, 'failed', 'It broke.').headline == 'b is better. 4 of 6 runs are done. It broke.'


def test_results_of_other_arms_are_not_given_to_todays_charts(results, monkeypatch, tmp_path):
    def charts(_):
        return ['drawn today']

    now = replace(experiment_of_four(tmp_path), charts=charts)
    monkeypatch.setattr(report, 'find_experiment', lambda name: now)
    assert 'drawn today' in report.section(results).blocks
    monkeypatch.setattr(report, 'find_experiment', lambda name: replace(
        now, arms=(*now.arms, Arm('new', {}))))
    assert 'drawn today' not in report.section(results).blocks


def test_charts_of_single_runs_are_left_out_of_published_results(results, monkeypatch, tmp_path):
    charts = iter([lambda found: [f'{len(found["runs"])} drawn'], lambda found: [found['missing']]])
    monkeypatch.setattr(report, 'find_experiment', lambda name: now)
    now = replace(experiment_of_four(tmp_path), charts=next(charts))
    assert '6 drawn' in report.section(results).blocks
    published = {key: value for key, value in results.items() if key != 'runs'}
    assert 'Its charts draw single runs, which are not among what is published.' in report.section(published).blocks
    now = replace(now, charts=next(charts))
    with pytest.raises(KeyError, match='missing'):  # a mistake is none of these
        report.section(published)


def test_the_page_says_which_experiment_runs_which_waits_and_which_failed(results, monkeypatch, tmp_path):
    monkeypatch.setattr(report, 'FILES', {'one': '', 'four': '', 'absent': ''})
    for name in ('one', 'four'):
        half = {**results, 'name': name, 'title': f'Title of {name}', 'status': 'running', 'runs': []}
        runner._write_json(tmp_path / name / 'results.json', half)
    page = report.write_page(tmp_path, 'four').read_text()
    assert re.findall(r'<section id="s." class="(\w+)"', page) == ['pending', 'running']
    page = report.write_page(tmp_path, 'four', 'It broke.').read_text()
    assert re.findall(r'<section id="s." class="(\w+)"', page) == ['pending', 'failed']
    assert page.index('Title of one') < page.index('Title of four') and 'It broke.' in page


@pytest.fixture
def published_at(monkeypatch, tmp_path):
    """README, page of a family and card of a checkout in which 'four' is an experiment, whose chart is shown."""
    monkeypatch.setattr(report, 'FILES', {'four': 'four'})
    experiment = replace(experiment_of_four(tmp_path), cards=('model',), pictured=True, charts=lambda results: [
        report.Figure('<svg viewBox="0 0 9 9"></svg>', results['plan']['data'])])
    monkeypatch.setattr(report, 'find_experiment', lambda name: experiment)
    card = tmp_path / 'registry' / 'family' / 'model.toml'
    card.parent.mkdir(parents=True)
    card.write_text('name = "model"\n')
    card.with_name('other.toml').write_text('name = "other"\n')
    readme = tmp_path / 'README.md'
    readme.write_text('before\n<!-- experiments -->\nold\n<!-- /experiments -->\nafter\n')
    page = tmp_path / 'docs' / 'families' / 'four.md'
    page.parent.mkdir(parents=True)
    page.write_text('before\n<!-- claims: four -->\nold\n<!-- /claims -->\nafter\n')
    return readme, page, card


def test_publishing_keeps_no_runs_and_renews_the_table_and_the_cards(results, published_at, tmp_path):
    readme, page, card = published_at
    path = report.publish(results, tmp_path)
    assert path == tmp_path / 'docs' / 'experiments' / 'four.json' and path.stat().st_size < report.MOST_BYTES
    kept = json.loads(path.read_text())
    assert 'runs' not in kept and kept['arms'][1]['metrics']['accuracy']['values'] == [51, 53, 55]
    assert '"values": [ 51, 53, 55 ]' in path.read_text()
    text = readme.read_text()
    assert text.startswith('before\n<!-- experiments -->\n| experiment ') and text.endswith('after\n')
    assert ('| `four` | b is better | 51.00 to 53.00, +2.00 points (-0.48 to +4.48) | 3 | 3.26 | +1.5 '
            '| **undecided** | none |') in text
    assert 'old' not in text
    assert '| [`four`](../experiments/four.json), 3 seeds | b is better | +2.00 points (-0.48 to +4.48) | +1.5 ' in (
        page.read_text()) and page.read_text().endswith('<!-- /claims -->\nafter\n')
    row, = tomllib.loads(card.read_text())['measured']
    assert row.items() >= {
        'experiment': 'four', 'dataset': 'four images', 'mean': 2., 'std': 1., 'seeds': 3, 'verdict': 'undecided',
        'metric': 'small version, b b minus a, accuracy in points', 'commit': 'abc'}.items()
    assert card.with_name('other.toml').read_text() == 'name = "other"\n'
    written = card.read_text()
    report.publish(results, tmp_path)
    assert readme.read_text() == text and card.read_text() == written
    with pytest.raises(InputError, match='four is not finished'):
        report.publish({**results, 'status': 'running'}, tmp_path)
    with pytest.raises(InputError, match='bytes of results; at most 40000 are published'):
        report.publish({**results, 'question': 'x' * 40_000}, tmp_path)


def test_results_on_other_data_are_published_beside_the_first(results, published_at, tmp_path):
    readme, page, card = published_at
    report.publish(results, tmp_path)
    first = tmp_path / 'docs' / 'experiments' / 'four.json'
    kept, figure = first.read_bytes(), (tmp_path / 'docs' / 'figures' / 'four.svg').read_bytes()
    cells = {**results, 'plan': {**results['plan'], 'data': "cell's: 9 train", 'seeds': [0, 1]}}
    for _ in range(2):  # again is no third file
        path = report.publish(cells, tmp_path)
        assert path == first.with_name('four-cells.json')
        assert json.loads(path.read_text())['plan']['data'] == "cell's: 9 train"
    assert first.read_bytes() == kept and sorted(first.parent.iterdir()) == [path, first]
    assert (tmp_path / 'docs' / 'figures' / 'four.svg').read_bytes() == figure
    assert [path.name for path in (tmp_path / 'docs' / 'figures').iterdir()] == ['four.svg']
    assert re.findall(r'^\| (`four`.*?) \|', readme.read_text(), re.M) == ['`four`', '`four` on cells']
    assert re.findall(r'^\| (\[.*?) \|', page.read_text(), re.M) == [
        '[`four`](../experiments/four.json), 3 seeds', '[`four`](../experiments/four-cells.json) on cells, 2 seeds']
    rows = tomllib.loads(card.read_text())['measured']
    assert [row['dataset'] for row in rows] == ['four images', "cell's: 9 train"]
    # More of the first data are the first data.
    again = {**results, 'plan': {**results['plan'], 'data': 'four images: 9 train'}}
    assert report.publish(again, tmp_path) == first and first.read_bytes() != kept


def test_the_readme_and_the_cards_show_what_was_published(repository):
    folder, readme = repository / 'docs' / 'experiments', (repository / 'README.md').read_text(encoding='utf-8')
    assert {path for path, _ in report._published(folder)} == set(folder.iterdir())
    for path, results in report._published(folder):
        assert path.stat().st_size <= report.MOST_BYTES and results['status'] == 'done'
        fixed = {(c.better, c.worse, c.metric, c.published) for c in find_experiment(results['name']).claims}
        told = {(c['better'], c['worse'], c['metric'], c['published']) for c in results['plan']['claims']}
        assert told == fixed
    found = re.search(r'<!-- experiments -->\n(.*?)<!-- /experiments -->', readme, re.S)
    if found:
        assert found[1] == report.readme_table(folder)
    rows = report.card_rows(folder)
    for path in (repository / 'registry').glob('*/*.toml'):
        text = path.read_text(encoding='utf-8')
        assert report.renewed_card(text, rows.get(path.stem, [])) == text


# --- The real thing ---------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_an_experiment_is_interrupted_resumed_and_told(repository, tmp_path):
    pytest.importorskip('sklearn')
    command = [sys.executable, 'tools/reproduce.py', 'condconv', '--seeds=2', '--jobs=1', '--pilot', '--output',
               str(tmp_path)]  # one worker: when the first run is there, others are not
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    listens = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what a shell starts in the background does not
    start = partial(subprocess.Popen, command, cwd=repository, text=True, preexec_fn=listens, **pipes)
    process, runs = start(), tmp_path / 'pilot' / 'condconv' / 'runs'
    deadline = time.monotonic() + 300
    while not list(runs.glob('*-seed*.json')) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.endswith('interrupted\n')
    page = (tmp_path / 'pilot' / 'index.html').read_text()
    assert 'Interrupted: the same command goes on from here.' in page

    first = min(runs.glob('*.json'), key=lambda path: path.stat().st_mtime)
    before = first.stat().st_mtime_ns
    process = start()
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error
    assert 'runs kept from before' in out and '8 experts minus static, accuracy: ' in out
    assert first.stat().st_mtime_ns == before
    results = json.loads((runs.parent / 'results.json').read_text())
    assert results['status'] == 'done' and results['plan']['seeds'] == [1000, 1001]
    static, experts = (arm['metrics'] for arm in results['arms'])
    assert 1 < experts['macs']['mean'] / static['macs']['mean'] <= 1.1  # MACs within 10 %
    assert min(static['accuracy']['mean'], experts['accuracy']['mean']) > 60  # of ten classes; pilots had 80 and 84
