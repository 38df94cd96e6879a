"""The page about finished runs, from real trainings: what is measured, what is drawn, what is said of what is missing.

The fixture trains a mixture of two blocks and its twin for two epochs; what a folder says is held by test_runs.py.
"""
import base64
import html
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from image_folders import write_images
from run_files import epochs, write_classifier

from moe_zoo.analysis import count_images, measure_runs, report_cli
from moe_zoo.analysis.report_cli import main, report
from moe_zoo.analysis.report_page import quantity, report_page, training_command
from moe_zoo.analysis.runs import LayerUse, Measured, read_runs
from moe_zoo.analysis.usage import measure_usage
from moe_zoo.engine.compare import run_all
from moe_zoo.engine.inference import load_images, open_classifier
from moe_zoo.errors import InputError

# Two blocks of width 16 on four patches, the second routed.
RECIPE = dict(
    model='vmoe_vit_s', model_kwargs=dict(patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1],
                                          num_experts=4, num_selected=2, representation_size=0),
    img_size=16, batch_size=8, workers=0, opt='adamw', lr=1e-2, epochs=2, warmup_epochs=1, device='cpu',
    checkpoint_hist=1, log_interval=1000, seed=3)


@pytest.fixture(scope='module', autouse=True)
def few_rounds():
    """Timing is not what these tests are about."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_runs, 'ROUNDS', 3)
        patch.setattr(measure_runs, 'ROUND', .01)
        yield


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Folder with the run `small` and its twin, of 12 + 6 images."""
    root = tmp_path_factory.mktemp('report')
    images = write_images(root / 'shades', {'train': 6, 'validation': 3})
    run_all({**RECIPE, 'data_dir': str(images)}, {'output': str(root), 'experiment': 'small'}, twin=True)
    return root


@pytest.fixture(scope='module')
def page(trained):
    """The runs, and the folder that the page was written to."""
    out = trained / 'page'
    return report([trained / 'small'], out), out


def text_of(out):
    """What a reader sees, without marks."""
    body = re.sub(r'<(style|script)>.*?</\1>', '', (out / 'index.html').read_text(encoding='utf-8'), flags=re.S)
    return ' '.join(html.unescape(re.sub(r'<[^>]+>', ' ', body)).replace('\u00a0', ' ').split())


def downloads(out):
    """File name to content of everything that can be saved from a page."""
    found = re.findall(r'download="([^"]+)" href="data:application/json;base64,([^"]+)"',
                       (out / 'index.html').read_text(encoding='utf-8'))
    return {name: json.loads(base64.b64decode(content)) for name, content in found}


def test_what_is_measured_is_what_the_checkpoint_does(trained, page):
    """MACs of the evaluation images and the shares of the experts, computed here by themselves."""
    run, twin = page[0].runs
    assert (run.name, twin.name, run.twin) == ('small', 'small/twin', twin)
    classifier, dataset = open_classifier(trained / 'small' / 'last.pth.tar', overrides={'workers': 0})
    images = load_images(classifier, dataset, 100)
    pixels = classifier.normalise(images.pixels)
    costs = count_images(classifier.model, list(pixels.split(1)))
    assert run.measured.images == 6 and run.measured.input_size == (3, 16, 16)
    assert run.measured.macs_executed == costs.mean and run.measured.macs_sd == costs.std
    assert run.measured.parameters == sum(p.numel() for p in classifier.model.parameters())
    usage, = measure_usage(classifier.model, [(pixels, images.targets)]).values()
    use, = run.use
    assert use.layer == 'blocks.1.mlp' and use.share == pytest.approx(usage.share.tolist())
    assert use.dead == tuple(usage.dead) and use.evenness == pytest.approx(usage.entropy)
    assert twin.use == () and twin.measured.macs_executed == twin.macs_max
    assert run.macs_ratio == run.measured.macs_executed / twin.measured.macs_executed
    assert run.measured.session == twin.measured.session and run.time_ratio.median > 0


def test_the_page_says_it_in_words_and_gives_the_numbers_away(page):
    found, out = page
    run, twin = found.runs
    text = text_of(out)
    assert '2 models on shades: accuracy against cost' in text
    assert f'{run.mean():.2f}' in text and f'{run.macs_ratio:.2f} × its twin' in text
    assert quantity(run.measured.macs_executed) in text and 'Top-1 accuracy against time.' in text
    files = downloads(out)
    assert set(files) == {'runs.json', 'shades-macs.json', 'shades-time.json', 'shades-score.json', 'shades-loss.json',
                          'small-evenness.json', 'small-experts.json'}
    points = {row['run']: row['million MACs an image'] for row in files['shades-macs.json']}
    assert points == {each.name: each.measured.macs_executed / 1e6 for each in found.runs}
    assert files['shades-loss.json']['small'] == [[row['step'], row['loss']] for row in run.curve]
    assert files['runs.json'][0]['measured']['macs_executed'] == run.measured.macs_executed
    assert f'{quantity(run.measured.macs_executed)} MACs an image of 16 x 16 pixels' in text or run.mean() < twin.mean()
    figures = re.findall(r'<figure>.*?</figure>', (out / 'index.html').read_text(encoding='utf-8'), re.S)
    assert len(figures) == 6 and all('download=' in figure for figure in figures)


def test_the_page_fetches_nothing(page):
    content = (page[1] / 'index.html').read_text(encoding='utf-8')
    sources = re.findall(r'(?:src|href)="([^"]*)"', content)
    assert sources and all(source.startswith(('data:', '#')) for source in sources)
    assert '@import' not in content and 'url(' not in content and 'fetch(' not in content


def test_a_second_report_measures_nothing_anew(page, trained, monkeypatch):
    found, out = page
    monkeypatch.setattr(report_cli, 'reopen', lambda training: pytest.fail('measured again'))
    again = report([trained / 'small'], out)
    assert [run.measured for run in again.runs] == [run.measured for run in found.runs]


def test_a_new_checkpoint_is_measured_and_all_of_its_data_timed_again(page, trained, tmp_path):
    shutil.copytree(trained / 'small', tmp_path / 'small')
    first = report([tmp_path / 'small'], tmp_path / 'out')
    path = tmp_path / 'small' / 'last.pth.tar'
    content = torch.load(path, weights_only=True)
    path.unlink()  # a hard link of others
    torch.save({**content, 'more': torch.zeros(1000)}, path)
    second = report([tmp_path / 'small'], tmp_path / 'out')
    before, after = ([run.measured for run in found.runs] for found in (first, second))
    assert before[0].macs_executed == after[0].macs_executed and before[1].macs_executed == after[1].macs_executed
    assert all(a.seconds != b.seconds for a, b in zip(before, after))
    assert after[0].session == after[1].session


def test_without_measuring_macs_at_most_are_shown_as_such(trained, tmp_path):
    found = report([trained / 'small'], tmp_path, measure=False)
    run = found.runs[0]
    assert run.measured is None and run.macs_max
    text = text_of(tmp_path)
    assert f'{quantity(run.macs_max)} at most' in text and 'million MACs an image (at most, where not counted)' in text
    assert 'time an image' not in text and 'who does the work' not in text
    assert not (tmp_path / 'measured.json').exists()


def test_data_that_moved_and_weights_that_are_gone_are_said(trained, tmp_path):
    shutil.copytree(trained / 'small', tmp_path / 'runs' / 'small')
    (tmp_path / 'runs' / 'small' / 'twin' / 'last.pth.tar').write_bytes(b'no weights')
    content = torch.load(tmp_path / 'runs' / 'small' / 'last.pth.tar', weights_only=True)
    content['args']['data_dir'] = str(tmp_path / 'gone')
    torch.save(content, tmp_path / 'runs' / 'small' / 'last.pth.tar')
    run, twin = report([tmp_path / 'runs'], tmp_path / 'out').runs
    assert run.measured.images == 0 and run.use == () and twin.measured is None
    text = text_of(tmp_path / 'out')
    assert 'small : its data are not where they were: MACs and time are those of noise' in text
    assert 'small/twin : it was not measured: ' in text


def test_what_is_left_out_is_on_the_page_and_on_the_terminal(trained, tmp_path, capsys):
    write_classifier(tmp_path / 'stopped', epochs(50.), epochs=9)
    (tmp_path / 'measured.json').write_text('{"broken": ')  # a file of ours that was cut is made anew
    assert main([str(trained / 'small'), str(tmp_path / 'stopped'), '--out', str(tmp_path), '--no-measure']) == 0
    sentence = f"'{tmp_path / 'stopped'}' is unfinished: 1 of 9 epochs are done."
    out, err = capsys.readouterr()
    assert f'left out: {sentence}' in err and out == f'2 models: {tmp_path / "index.html"}\n'
    assert sentence in text_of(tmp_path) and '1 folder could not be used.' in text_of(tmp_path)


def test_the_files_for_a_paper_are_written_beside_the_page(trained, tmp_path):
    pytest.importorskip('matplotlib')
    words = ['--out', str(tmp_path), '--no-measure', '--paper', str(tmp_path / 'paper')]
    assert main([str(trained / 'small'), *words]) == 0
    assert {'table.tex', 'table.csv', 'references.bib'} <= {path.name for path in (tmp_path / 'paper').iterdir()}
    assert (tmp_path / 'index.html').is_file()


def test_no_run_is_an_error_of_one_sentence_and_leaves_the_old_page(tmp_path, capsys):
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'index.html').write_text('the page before')
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), '--out', str(tmp_path / 'out')])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: There is no finished run to report. '")
    assert (tmp_path / 'out' / 'index.html').read_text() == 'the page before'


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(['--help'])
    text = ' '.join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and 'moe-zoo report runs/softmoe --out runs/report' in text and '--paper DIR' in text


def test_the_analysis_of_a_run_is_on_the_page_and_a_broken_one_is_named(trained, tmp_path, monkeypatch):
    from moe_zoo.engine.analyze_experts import main as analyze
    monkeypatch.setattr('sys.argv', ['analyze-experts'])
    shutil.copytree(trained / 'small', tmp_path / 'small')
    folder = tmp_path / 'small'
    analyze(['--checkpoint', str(folder / 'last.pth.tar'), '--out', str(folder / 'experts'), '--no-figures',
             '--no-force', 'workers=0'])
    (folder / 'twin' / 'object_sizes.json').write_text('[1]')
    report([folder], tmp_path / 'out', measure=False)
    text = text_of(tmp_path / 'out')
    assert 'What the experts of small do' in text and 'Which classes and images an expert serves.' in text
    assert 'beside this page' not in text  # that section names a file which is not there
    assert f"'{folder / 'twin' / 'object_sizes.json'}' is no analysis that can be read" in text
    expected = json.loads((folder / 'experts' / 'experts.json').read_text())
    assert downloads(tmp_path / 'out')['small-analysis.json'] == expected


def measured_run(tmp_path, macs=(130., 100.), seconds=(2., 1.), layers=()):
    """A mixture and its twin of chosen cost."""
    write_classifier(tmp_path / 'a', epochs(60., 80., fc=[.9, 1.]), model='condconv_resnet18')
    write_classifier(tmp_path / 'a' / 'twin', epochs(60., 79.), model='resnet18')
    found = read_runs([tmp_path / 'a'])
    for run, cost, time, used in zip(found.runs, macs, seconds, (layers, ())):
        run.measured = Measured(4, (3, 8, 8), 100, 50, cost, cost, 0., (), used, (time, time, time), 'now')
    return found


def test_macs_that_do_not_turn_into_time_are_said_next_to_the_number(tmp_path):
    report_page(measured_run(tmp_path)).write(tmp_path / 'index.html')
    text = text_of(tmp_path)
    assert '2e+03 ms' not in text and '2 s 2.00 × its twin MACs do not turn into time' in text
    assert 'a runs 1.30 × the MACs of its twin in 2.00 × its time (spread 0.00)' in text
    report_page(measured_run(tmp_path, seconds=(1.3, 1.))).write(tmp_path / 'index.html')
    assert 'do not turn into time' not in text_of(tmp_path)


def test_dead_experts_are_counted_and_named(tmp_path):
    layers = (LayerUse('fc', (.7, .3, 0.), (.7, .3, 0.), .55, .25, (2,)),
              LayerUse('blocks.0', (.5, .5), (.5, .5), 1., 0., ()),
              LayerUse('gate', (1., 0.), (1., 0.), 0., 0., (1,), channels=True))
    report_page(measured_run(tmp_path, layers=layers)).write(tmp_path / 'index.html')
    text = text_of(tmp_path)
    assert '1 of 5 experts are dead , in 1 of 2 layers.' in text  # channels are not counted among them
    assert 'a fc 3 0.550 25.0 % 0.0 to 70.0 % expert 2' in text
    assert 'a blocks.0 2 1.000 0.0 % 50.0 to 50.0 % none' in text
    assert downloads(tmp_path)['a-experts.json'] == {
        'fc': {'share': [.7, .3, 0.], 'dead': [2]}, 'blocks.0': {'share': [.5, .5], 'dead': []}}


def test_the_cheapest_of_each_accuracy_is_recommended_with_its_command(tmp_path):
    """100 MACs reach 79 %, 130 reach 80 %; a third run costs more than the first and reaches less."""
    found = measured_run(tmp_path)
    write_classifier(tmp_path / 'b', epochs(10., 70.), model='resnet34')
    worse = read_runs([tmp_path / 'b']).runs[0]
    worse.measured = found.runs[0].measured
    report_page(type(found)([*found.runs, worse], [])).write(tmp_path / 'index.html')
    text = text_of(tmp_path)
    assert 'from MACs most accurate Top-1 accuracy 100 a/twin 79.00 % 130 a 80.00 % To train' in text
    assert f'moe-zoo train-imagenet --config {tmp_path / "a" / "args.yaml"} experiment=again' in text


def test_of_equals_the_cheapest_reaches_most(tmp_path):
    found = measured_run(tmp_path)
    write_classifier(tmp_path / 'b', epochs(10., 80.), model='resnet34')
    cheap = read_runs([tmp_path / 'b']).runs[0]
    cheap.measured = found.runs[1].measured
    report_page(type(found)([*found.runs, cheap], [])).write(tmp_path / 'index.html')
    assert 'b reaches most, 80.00 %, with 100 MACs an image' in text_of(tmp_path)


def test_live_channels_are_drawn_where_gates_switch_them_off(tmp_path):
    rows = [{**row, 'live_layer1.0': .9 - row['epoch'] / 10} for row in epochs(10., 30.)]
    found = read_runs([write_classifier(tmp_path / 'a', rows, model='deepmoe_resnet18')])
    found.runs[0].versions = {'commit': 'e42f42d0' * 5 + '-dirty', 'torch': '2.14.1+cu130'}
    report_page(found).write(tmp_path / 'index.html')
    text = text_of(tmp_path)
    assert 'Channels that are on of a .' in text and 'Evenness of the experts' not in text
    assert downloads(tmp_path)['a-live.json'] == {'layer1.0': [[1, .9], [2, pytest.approx(.8)]]}
    assert 'Trained by commit e42f42d0e42f-dirty Trained with torch 2.14.1+cu130' in text


@pytest.mark.parametrize('number, text', [
    (0, '0'), (999, '999'), (1234, '1.23 k'), (999600, '1000 k'), (1.5e6, '1.5 M'), (4.089e9, '4.09 G'), (2e12, '2 T')])
def test_quantity(number, text):
    assert quantity(number) == text


def test_the_command_is_known():
    from moe_zoo.cli import TOOLS
    assert TOOLS['report'][0] == report_cli.__name__
    with pytest.raises(InputError, match='There is no finished run'):
        report([], 'nowhere')


@pytest.mark.slow
def test_a_detector_and_its_dense_twin(tmp_path, repository):
    """Both trained for a few steps by the tool, then measured on their test images."""
    pytest.importorskip('detectron2', reason='detectron2 is not installed')
    from moe_zoo.data.scenes import write_scenes
    from moe_zoo.detection.train import main as train
    scenes = write_scenes(tmp_path / 'scenes', train=4, val=4, image_size=160, classes=range(5))
    config = tmp_path / 'tiny.yaml'
    config.write_text(DETECTOR.format(base=repository / 'configs' / 'coco' / 'Base-RetinaNet.yaml'))
    for name, stages in (('moe', "['res5']"), ('dense', '[]')):
        train(['--config-file', str(config), 'MOE.DATA.ROOT', str(scenes), 'MOE.RESNET.STAGES', stages,
               'OUTPUT_DIR', str(tmp_path / 'runs' / name)])
    found = report([tmp_path / 'runs'], tmp_path / 'out')
    runs = {run.name: run for run in found.runs}
    moe, dense = runs['moe'], runs['dense']
    assert moe.twin is dense and moe.family == 'moe' and dense.family == 'dense' and moe.dataset == 'scenes'
    assert moe.parameters == moe.measured.parameters > dense.parameters  # which its folder does not tell
    assert moe.measured.images == 4 and moe.measured.input_size == (3, 64, 64)
    assert moe.measured.macs_executed > dense.measured.macs_executed > 0  # two of four experts run
    use, = moe.use
    assert use.layer == 'backbone.bottom_up.res5' and len(use.share) == 4 and sum(use.share) == pytest.approx(1)
    assert moe.time_ratio is not None and 'loss' in moe.curve[0]
    assert 'scenes: who does the work' in text_of(tmp_path / 'out')


DETECTOR = """
_BASE_: {base}
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  BACKBONE: {{NAME: build_moe_resnet_fpn_backbone, FREEZE_AT: 0}}
  RESNETS: {{DEPTH: 18, STEM_OUT_CHANNELS: 8, RES2_OUT_CHANNELS: 8, NORM: BN}}
  FPN: {{OUT_CHANNELS: 8, NORM: BN}}
  RETINANET: {{NUM_CLASSES: 5, NUM_CONVS: 1, NORM: BN}}
INPUT: {{MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}}
DATALOADER: {{NUM_WORKERS: 0}}
SOLVER: {{IMS_PER_BATCH: 2, BASE_LR: 0.001, MAX_ITER: 20, WARMUP_ITERS: 2, STEPS: [15]}}
SEED: 1
"""


def test_commands_quote_folders():
    run = SimpleNamespace(kind='classification', trainings=[SimpleNamespace(folder=Path('a run'))])
    assert training_command(run) == "moe-zoo train-imagenet --config 'a run/args.yaml' experiment=again"
