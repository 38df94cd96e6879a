"""`eval-imagenet --record`: what a finished run becomes on its card, and what is refused."""
import json
import shutil
import tomllib

import pytest
from image_folders import write_images
from test_eval_compare import write_run

from moe_zoo.analysis.runs import read_runs
from moe_zoo.engine import record as recorder
from moe_zoo.engine.compare import run_all
from moe_zoo.engine.config import load_config
from moe_zoo.engine.evaluate_cli import main
from moe_zoo.engine.record import check_split, command, model_arguments, nearest_recipe, record
from moe_zoo.errors import InputError
from moe_zoo.resources import folder

RECIPE = dict(
    model='vmoe_vit_s', img_size=16, batch_size=8, workers=0, opt='adamw', lr=1e-3, epochs=1, warmup_epochs=0,
    device='cpu', model_kwargs=dict(patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=4,
                                    representation_size=0))


def run_of(path):
    return read_runs([path]).runs[0]


def test_the_recipe_of_a_run_is_found_and_so_is_what_it_changed():
    """A run of the digits' recipe with other epochs and seed; the rate and classes that it filled in are no change."""
    options = vars(load_config('demo/vmoe_vit_s_digits.yaml', {'epochs': 3, 'seed': 7, 'workers': 5, 'output': 'x'}))
    config, changed = nearest_recipe(options)
    assert (config, changed) == ('configs/demo/vmoe_vit_s_digits.yaml', {'epochs': 3})
    args = load_config('imagenet/condconv_resnet50.yaml', {'model_kwargs': {'num_experts': 4}, 'data_dir': 'd'})
    assert load_config('imagenet/condconv_resnet50.yaml').num_classes is None
    config, changed = nearest_recipe({**vars(args), 'num_classes': 1000})
    assert config == 'configs/imagenet/condconv_resnet50.yaml' and list(changed) == ['model_kwargs']
    assert command(config, changed, args, [0, 1], True) == (
        'python tools/train_imagenet.py --config configs/imagenet/condconv_resnet50.yaml --data-dir DIR '
        "'model_kwargs={num_experts: 4}' --seeds 0 1 --twin")
    with pytest.raises(InputError, match=r"No recipe in configs/ is of the model 'resnet18'"):
        nearest_recipe({'model': 'resnet18'})


def test_the_model_of_a_run_can_be_built_again():
    args = load_config(RECIPE, {'num_classes': 2, 'drop': 0.3})
    assert model_arguments(args) == {'num_classes': 2, 'img_size': 16, **RECIPE['model_kwargs']}


def test_images_that_served_to_choose_are_refused(tmp_path):
    data = write_images(tmp_path / 'data', {'train': 4})
    right = [True] * 4
    common = dict(dataset='', data_dir=str(data), train_split='train')
    write_run(tmp_path / 'a', right, val_split='validation', val_share=0.25, **common)
    with pytest.raises(InputError, match=r"a': its evaluation images are the share of the training images "
                                         r"\(val_share=0.25\) that was held out for choosing; name others, with val_"):
        check_split(run_of(tmp_path / 'a'), {})
    with pytest.raises(InputError, match=r'\(val_split=train\) are those that it was trained on; name others'):
        check_split(run_of(tmp_path / 'a'), {'val_split': 'train'})
    write_images(tmp_path / 'data', {'test': 1})
    check_split(run_of(tmp_path / 'a'), {'val_split': 'test'})
    write_run(tmp_path / 'b', right, val_split='test', sched='plateau', **common)
    with pytest.raises(InputError, match=r'images chose its learning rate \(sched=plateau\); name other'):
        check_split(run_of(tmp_path / 'b'), {})
    check_split(run_of(tmp_path / 'b'), {'data_dir': str(tmp_path / 'elsewhere')})


def test_what_is_no_finished_run_of_a_model_with_a_card_is_refused(tmp_path, capsys):
    write_run(tmp_path / 'a', [True] * 4, epochs=2)
    with pytest.raises(InputError, match=r"no finished run.*a' is unfinished: 1 of 2 epochs are done"):
        record([tmp_path / 'a'])
    write_run(tmp_path / 'c', [True] * 4)
    with pytest.raises(InputError, match=r"--record takes finished runs only\. '.*a' is unfinished"):
        record([tmp_path / 'a', tmp_path / 'c'])
    write_run(tmp_path / 'b', [True] * 4, model='resnet18', routed=False)
    with pytest.raises(InputError, match="no model 'resnet18' in moe_zoo"):
        record([tmp_path / 'b'])
    with pytest.raises(SystemExit):
        main(['--record', str(tmp_path / 'c'), '--checkpoint', 'x.pth'])
    assert 'error: --checkpoint with --record, which evaluates the weights and the recipe' in capsys.readouterr().err


def test_a_changed_checkout_is_told(monkeypatch, tmp_path, capsys):
    write_run(tmp_path / 'a', [True] * 4)
    run = run_of(tmp_path / 'a')
    assert recorder._commit(run) == 'unknown'
    object.__setattr__(run.trainings[0], 'versions', {'commit': 'a' * 40})
    monkeypatch.setattr(recorder, 'uncommitted', lambda: False)
    assert recorder._commit(run) == 'a' * 12 and not capsys.readouterr().err
    monkeypatch.setattr(recorder, 'uncommitted', lambda: True)
    assert recorder._commit(run) == 'a' * 12 + '-dirty'
    assert capsys.readouterr().err == 'warning: moe_zoo has uncommitted changes; the row is marked as such\n'
    object.__setattr__(run.trainings[0], 'versions', {'commit': 'a' * 40 + '-dirty'})
    monkeypatch.setattr(recorder, 'uncommitted', lambda: False)
    assert recorder._commit(run) == 'a' * 12 + '-dirty'


@pytest.mark.slow
def test_seeds_and_twins_become_one_row(tmp_path, capsys):
    """Trained, recorded, recorded again with a seed less: one row, which says what the runs were."""
    data = write_images(tmp_path / 'data', {'train': 8, 'test': 3})
    recipe = {**RECIPE, 'data_dir': str(data), 'val_split': 'test'}
    run_all(recipe, {'output': str(tmp_path), 'experiment': 'run'}, seeds=[0, 1], twin=True)
    root = tmp_path / 'checkout'
    (root / 'registry').mkdir(parents=True)
    shutil.copytree(folder('registry') / 'vmoe', root / 'registry' / 'vmoe')
    (root / 'README.md').write_text('')
    card = root / 'registry' / 'vmoe' / 'vmoe_vit_s.toml'
    before = len(tomllib.loads(card.read_text())['measured'])
    (path, row), = record([tmp_path / 'run'], data_name='noise', root=root).items()
    assert path == card and tomllib.loads(card.read_text())['measured'][before:] == [row]
    assert (row['dataset'], row['data'], row['images'], row['seeds']) == ('noise', '16 train, 6 test', 6, [0, 1])
    assert (row['epochs'], row['pixels'], row['model_args']['img_size']) == (1, 16, 16)
    scores = [training.metrics['top1'] for training in run_of(tmp_path / 'run').trainings]
    assert row['mean'] == round(sum(scores) / 2, 2) and row['twin']['model'] == 'vit_base_patch32_224'
    assert row['macs_executed'] > 0 and row['twin']['macs'] < row['macs'] and row['twin']['seeds'] == [0, 1]
    filed = json.loads((tmp_path / 'run' / 'results.json').read_text())['versions']  # of when the run began
    assert row['commit'].startswith((filed['commit'] or 'unknown')[:12]) and row['hardware'] == filed['hardware']
    assert ' of ' in row['hardware']
    assert row['command'].endswith('--seeds 0 1 --twin') and 'epochs=1' in row['command']
    shutil.rmtree(tmp_path / 'run' / 'seed1')
    (path, row), = record([tmp_path / 'run'], data_name='noise', root=root).items()
    assert tomllib.loads(card.read_text())['measured'][before:] == [row] and row['seeds'] == [0] and 'std' not in row
    with pytest.raises(InputError, match='a row speaks of ImageNet only where all 50,000 images'):
        record([tmp_path / 'run'], data_name='ImageNet samples', root=root)
