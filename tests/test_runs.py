"""Finished runs, read: what each file says, seeds that become one run, twins that are found, folders that are not used.

Numbers are chosen by hand; that real trainings leave such files is held by tests/test_report.py.
"""
import json
import math

import pytest
from run_files import epochs, iterations, write_classifier, write_detector

from moe_zoo.analysis.run_folders import _network
from moe_zoo.analysis.runs import LayerUse, Measured, read_runs
from moe_zoo.errors import InputError

TWIN = dict(model='vit_small_patch16_224', dataset='digits')


def only(*folders):
    found = read_runs(folders)
    assert not found.left_out
    run, = found.runs
    return run


def test_what_a_classifier_says(tmp_path):
    rows = epochs(10., 30., **{'blocks.1.mlp': [.5, .75]})
    folder = write_classifier(tmp_path / 'a', rows, seed=7, data_dir='here/cifar10', dataset='')
    run = only(folder)
    assert (run.name, run.kind, run.model) == ('a', 'classification', 'vmoe_vit_s')
    assert run.family == 'vmoe' and run.routed
    assert (run.dataset, run.seeds, run.metric) == ('cifar10', (7,), 'top1')
    assert run.mean() == 30 and run.sd() is None and run.mean('top5') == 99 and run.mean('loss') == 1.5
    assert run.curve == [{'step': 1, 'loss': 2., 'score': 10.}, {'step': 2, 'loss': 1., 'score': 30.}]
    assert run.balance == {'blocks.1.mlp': [(1, .5), (2, .75)]}
    assert run.unit == 'epoch' and run.use == () and run.dead == {} and run.parameters is None
    json.dumps(run.as_dict())


def test_an_epoch_without_evaluation_keeps_its_loss_alone(tmp_path):
    rows = epochs(10., 30.)
    del rows[0]['eval_top1']
    assert only(write_classifier(tmp_path / 'a', rows)).curve == [
        {'step': 1, 'loss': 2.}, {'step': 2, 'loss': 1., 'score': 30.}]


def test_the_moving_average_is_what_counts_where_there_is_one(tmp_path):
    rows = epochs(10., 30.)
    for row in rows:
        row['eval_ema_top1'] = row['eval_top1'] + 5
    run = only(write_classifier(tmp_path / 'a', rows))
    assert run.mean() == 35 and run.curve[0]['score'] == 15


def test_channels_that_are_on_are_told_apart_from_balance(tmp_path):
    rows = [{**row, 'live_layer1.0': .9 - row['epoch'] / 10} for row in epochs(10., 30.)]
    run = only(write_classifier(tmp_path / 'a', rows, model='deepmoe_resnet18'))
    assert run.routed and run.family == 'deepmoe' and run.balance == {}
    assert run.live == {'layer1.0': [(1, .9), (2, pytest.approx(.8))]}


def test_seeds_become_one_run_with_its_sample_deviation(tmp_path):
    for seed, top1 in enumerate((90., 92., 97.)):
        write_classifier(tmp_path / 'x' / f'seed{seed}', epochs(50., top1, fc=[.5 + seed / 10, 1.]), seed=seed)
    run = only(tmp_path)
    # mean (90 + 92 + 97) / 3 = 93; squared differences 9 + 1 + 16 = 26, over 2 is 13
    assert run.name == 'x' and run.seeds == (0, 1, 2)
    assert run.mean() == 93 and run.sd() == pytest.approx(math.sqrt(13))
    assert run.balance['fc'] == [(1, pytest.approx(.6)), (2, 1.)]


def test_another_recipe_or_the_same_seed_again_is_another_run(tmp_path):
    write_classifier(tmp_path / 'a', epochs(50.), seed=0)
    write_classifier(tmp_path / 'b', epochs(60.), seed=1, lr=.5)
    write_classifier(tmp_path / 'c', epochs(70.), seed=0)
    assert {run.name: run.mean() for run in read_runs([tmp_path]).runs} == {'a': 50, 'b': 60, 'c': 70}


def test_names_are_as_long_as_it_takes_to_tell_runs_apart(tmp_path):
    for name in ('one/x', 'two/x', 'y'):
        write_classifier(tmp_path / name, epochs(50.))
    assert [run.name for run in read_runs([tmp_path]).runs] == ['one/x', 'two/x', 'y']


def test_the_twin_below_a_run_is_its_own(tmp_path):
    for name in ('a', 'b'):
        for seed, gain in enumerate((1., 4.)):
            place = tmp_path / name / f'seed{seed}'
            write_classifier(place, epochs(80. + gain, fc=[1.]), seed=seed)
            write_classifier(place / 'twin', epochs(80.), seed=seed, **TWIN)
        # b's own twin is as good a match for a by its recipe, but a has one of its own
    runs = {run.name: run for run in read_runs([tmp_path]).runs}
    assert set(runs) == {'a', 'a/twin', 'b', 'b/twin'}
    for name in ('a', 'b'):
        assert runs[name].twin is runs[f'{name}/twin'] and runs[name].gain == (1, 4)
        assert runs[f'{name}/twin'].twin is None and runs[f'{name}/twin'].family == 'dense'


def test_a_twin_trained_elsewhere_is_found_by_card_and_recipe(tmp_path):
    write_classifier(tmp_path / 'moe', epochs(80., fc=[1.]), model='condconv_resnet18', model_kwargs={'num_experts': 4})
    write_classifier(tmp_path / 'dense', epochs(79.), model='resnet18')
    write_classifier(tmp_path / 'other_recipe', epochs(70.), model='resnet18', lr=.3)
    write_classifier(tmp_path / 'other_net', epochs(60.), model='resnet34')
    runs = {run.name: run for run in read_runs([tmp_path]).runs}
    assert runs['moe'].twin is runs['dense']
    del runs
    (tmp_path / 'dense' / 'args.yaml').unlink()
    runs = {run.name: run for run in read_runs([tmp_path]).runs}
    assert runs['moe'].twin is None  # neither the other recipe nor the other network


def test_costs_and_versions_come_from_the_results_above(tmp_path):
    for seed in (0, 1):
        write_classifier(tmp_path / 'x' / f'seed{seed}', epochs(80.), seed=seed)
        write_classifier(tmp_path / 'x' / f'seed{seed}' / 'twin', epochs(80.), seed=seed, **TWIN)
    entry = lambda place, n: {'folder': f'moved/since/x/{place}', 'parameters': n, 'active_parameters': n, 'macs': n}
    results = {'versions': {'commit': 'abc'}, 'model': [entry('seed0', 10), entry('seed1', 10)],
               'twin': [entry('seed0/twin', 3), entry('seed1/twin', 3)]}
    (tmp_path / 'x' / 'results.json').write_text(json.dumps(results))
    runs = {run.name: run for run in read_runs([tmp_path]).runs}
    assert (runs['x'].parameters, runs['x'].macs_max, runs['x'].versions) == (10, 10, {'commit': 'abc'})
    assert runs['x/twin'].parameters == 3


def test_what_a_detector_says(tmp_path):
    metrics = {'bbox': {'AP': 40., 'AP50': 60., 'APs': None}}
    lines = [*iterations((.5, .5), (.25, .75)), {'iteration': 40, 'bbox/AP': 40.}]
    run = only(write_detector(tmp_path / 'det', lines, metrics))
    assert (run.kind, run.model, run.dataset, run.metric) == ('detection', 'RetinaNet', 'cells', 'AP')
    assert run.family == 'moe' and run.routed
    assert run.mean() == 40 and run.mean('AP50') == 60 and run.mean('APs') is None
    assert run.curve == [{'step': 20, 'loss': 3.}, {'step': 40, 'loss': 2., 'score': 40.}]
    # -(1/4 ln 1/4 + 3/4 ln 3/4) / ln 2 = (0.5 + 0.75 log2(4/3)) = 0.5 + 0.3113 bits
    assert run.balance == {'res5': [(20, 1.), (40, pytest.approx(.8113, abs=1e-4))]}
    assert run.unit == 'iteration'


def test_a_detector_routes_where_its_config_asks_for_it_or_its_log_shows_it(tmp_path):
    plain, metrics = [{'iteration': 19, 'total_loss': 1.}], {'bbox': {'AP': 40.}}
    assert only(write_detector(tmp_path / 'asked', plain, metrics)).routed
    logged = only(write_detector(tmp_path / 'logged', iterations((.5, .5)), metrics, stages=(), seed=-1))
    neither = only(write_detector(tmp_path / 'neither', plain, metrics, stages=(), seed=0))
    assert logged.routed and not neither.routed
    assert logged.seeds == (None,) and neither.seeds == (0,)  # a seed below 0 was drawn


def test_a_dense_detector_is_the_twin_of_one_that_differs_in_its_network(tmp_path):
    metrics = {'bbox': {'AP': 40.}}
    write_detector(tmp_path / 'moe', iterations((.5, .5)), metrics)
    write_detector(tmp_path / 'dense', [{'iteration': 19, 'total_loss': 1.}], {'bbox': {'AP': 39.}}, stages=())
    other = write_detector(tmp_path / 'longer', [{'iteration': 19, 'total_loss': 1.}], metrics, stages=())
    (other / 'config.yaml').write_text((other / 'config.yaml').read_text().replace('MAX_ITER: 100', 'MAX_ITER: 200'))
    runs = {run.name: run for run in read_runs([tmp_path]).runs}
    assert runs['moe'].twin is runs['dense'] and runs['moe'].gain == (1,) and runs['dense'].family == 'dense'


def break_summary(folder):
    (folder / 'summary.csv').write_text('epoch,eval_top1\n0,ninety\n')


def lose_an_epoch(folder):
    (folder / 'summary.csv').write_text('epoch,eval_top1\n0,50.\n,60.\n')


def break_options(folder):
    (folder / 'args.yaml').write_text('model: [unclosed')


def cut_summary(folder):
    path = folder / 'summary.csv'
    path.write_text(path.read_text()[:-4])


def write_results(folder, versions=None, **costs):
    entry = {'folder': str(folder), **costs}
    (folder / 'results.json').write_text(json.dumps({'model': [entry], 'versions': versions or {}}))


@pytest.mark.parametrize('spoil, says', [
    (lambda folder: (folder / 'summary.csv').unlink(), 'is unfinished: 0 of 2 epochs are done.'),
    (lambda folder: write_classifier(folder, epochs(50.), epochs=9), 'is unfinished: 1 of 9 epochs are done.'),
    (lambda folder: write_classifier(folder, epochs(50.), epochs=9, stop_epoch=3), 'is unfinished: 1 of 3 epochs'),
    (break_summary, "is damaged: could not convert string to float: 'ninety'."),
    (lose_an_epoch, 'is damaged: summary.csv has a row without an epoch.'),
    (break_options, "is damaged: args.yaml is not yaml: expected ',' or ']', but got '<stream end>' in line 1."),
    (lambda folder: (folder / 'args.yaml').write_text('lr: 1'), 'is of another program: its args.yaml names no model'),
    (lambda folder: (folder / 'args.yaml').write_text('just words'), 'is damaged: args.yaml holds no options.'),
    (lambda folder: (folder / 'args.yaml').write_bytes(b'\xff\xfe\x00'), 'is damaged: '),
    (lambda folder: (folder / 'results.json').write_text('{"model": ['), 'is damaged: '),
    (lambda folder: write_classifier(folder, epochs(50.), model=18), 'is damaged: model is 18, which is no text.'),
    (lambda folder: write_classifier(folder, epochs(50.), model_kwargs=[1]), 'is damaged: '),
    (cut_summary, 'is damaged: the last row of summary.csv is cut off.'),
    (lambda folder: write_results(folder, macs='many'), "is damaged: macs_max is 'many', which is no number."),
    (lambda folder: write_results(folder, versions={'commit': 7}), 'is damaged: commit is 7, which is no text.'),
])
def test_a_folder_that_cannot_be_used_is_named_and_left_out(tmp_path, spoil, says):
    write_classifier(tmp_path / 'good', epochs(50., 60.))
    spoil(write_classifier(tmp_path / 'bad', epochs(50., 60.)))
    found = read_runs([tmp_path])
    assert [run.name for run in found.runs] == ['good']
    sentence, = found.left_out
    assert sentence.startswith(f"'{tmp_path / 'bad'}' {says}") and '\n' not in sentence


def test_what_is_not_finite_was_not_measured(tmp_path):
    rows = epochs(50., math.nan, fc=[.5, math.nan])
    rows[1]['train_loss'] = math.inf
    run = only(write_classifier(tmp_path / 'a', rows))
    assert run.scores() == () and run.problems == ['it measured no top1.']
    assert run.curve == [{'step': 1, 'loss': 2., 'score': 50.}] and run.balance == {'fc': [(1, .5)]}


def test_detectors_that_cannot_be_used(tmp_path):
    write_detector(tmp_path / 'good', iterations((.5, .5)), {'bbox': {'AP': 1.}})
    write_detector(tmp_path / 'stopped', iterations((.5, .5), (.5, .5)), None)
    write_detector(tmp_path / 'evaluated', [{'iteration': 0, 'bbox/AP': 3.}], {'bbox': {'AP': 3.}})
    (write_detector(tmp_path / 'cut', [], {}) / 'metrics.json').write_text('{"iteration": 1')
    write_detector(tmp_path / 'words', iterations((.5, .5)), {'bbox': {'AP': 'good'}})
    write_detector(tmp_path / 'list', iterations((.5, .5)), [1])
    found = read_runs([tmp_path])
    assert [run.name for run in found.runs] == ['good']
    cut, evaluated, listed, stopped, words = sorted(found.left_out)
    assert f"'{tmp_path / 'list'}' is damaged: " in listed
    assert f"'{tmp_path / 'words'}' is damaged: AP is 'good', which is no number." == words
    assert f"'{tmp_path / 'stopped'}' is unfinished: it has no results.json after 40 of 100 iterations." == stopped
    assert f"'{tmp_path / 'evaluated'}' holds no training: metrics.json logs no iteration." == evaluated
    assert f"'{tmp_path / 'cut'}' is damaged: " in cut


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(InputError) as error:
        read_runs([tmp_path / 'empty', tmp_path / 'nowhere'])
    assert str(error.value) == (
        f"There is no finished run to report. '{tmp_path / 'empty'}' holds no run: neither args.yaml nor config.yaml "
        f"is in it or below it. '{tmp_path / 'nowhere'}' is no folder.")


def measured(macs, seconds, session='now', layers=()):
    return Measured(4, (3, 32, 32), 100, 50, macs, macs, 0., (), layers, seconds, session)


@pytest.mark.parametrize('seconds, becomes', [
    ((1.1, 1.2, 1.3), True),  # 1.2 times the MACs in 1.2 times the time
    ((2.0, 2.1, 2.2), False),  # 1.2 times the MACs in 2.1 times the time, quartiles 0.1 apart
    ((1.0, 2.1, 3.4), True),  # the same, but quartiles are 1.2 apart: not to be told
])
def test_macs_become_time_unless_the_time_exceeds_them_by_more_than_its_spread(tmp_path, seconds, becomes):
    write_classifier(tmp_path / 'a', epochs(80., fc=[1.]))
    write_classifier(tmp_path / 'a' / 'twin', epochs(80.), **TWIN)
    run, twin = read_runs([tmp_path]).runs
    assert run.macs_become_time is None and run.macs_ratio is None
    run.measured, twin.measured = measured(120, seconds), measured(100, (1., 1., 1.))
    assert run.macs_ratio == 1.2 and run.time_ratio.median == seconds[1] and run.macs_become_time is becomes
    twin.measured = measured(100, (1., 1., 1.), session='last week')  # times of two sessions are not compared
    assert run.time_ratio is None and run.macs_become_time is None


def test_what_was_measured_survives_json_and_names_the_dead(tmp_path):
    layers = (LayerUse('fc', (.9, .1, 0.), (.9, .1, 0.), .3, .05, (2,)),
              LayerUse('gate', (1., 0.), (1., 0.), 0., 0., (1,), channels=True))
    run = only(write_classifier(tmp_path / 'a', epochs(80., fc=[1.])))
    run.measured = measured(120, (1., 2., 3., 4.), layers=layers)
    assert run.dead == {'fc': (2,)}  # a channel that is off is no dead expert
    assert run.measured.latency == (1.75, 2.5, 3.25)
    again = Measured.from_json(json.loads(json.dumps(run.as_dict()['measured'])))
    assert again == run.measured


@pytest.mark.parametrize('name, options, expected', [
    ('build_resnet_fpn_backbone', {}, ('', '', False)),
    ('build_moe_resnet_fpn_backbone', {'RESNET': {'STAGES': ['res5'], 'LAYER': 'cond'}}, ('', 'cond', True)),
    ('build_moe_resnet_fpn_backbone', {'RESNET': {'STAGES': [], 'LAYER': 'cond'}}, ('', '', False)),
    ('build_resnet_fpn_backbone', {'HEAD': {'SUBNETS': 'cls'}}, ('', 'moe', True)),
    ('build_timm_fpn_backbone', {'TIMM': {'NAME': 'condconv_resnet50'}}, ('condconv_resnet50', '', True)),
    ('build_timm_fpn_backbone', {'TIMM': {'NAME': 'resnet50'}}, ('resnet50', '', False)),
])
def test_what_a_detector_is_made_of(name, options, expected):
    assert _network({'MODEL': {'BACKBONE': {'NAME': name}}, 'MOE': options}) == expected
