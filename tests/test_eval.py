"""Evaluation: the figures of training again, corrupt images, class maps, and what is not loaded."""
import json

import numpy as np
import pytest
import torch
from image_folders import write_images
from PIL import Image

from moe_zoo.engine.config import load_config
from moe_zoo.engine.data import LEFT_OUT, CheckedImages, open_dataset
from moe_zoo.engine.evaluate import evaluate, main
from moe_zoo.engine.train import train
from moe_zoo.errors import InputError

RECIPE = dict(
    model='vmoe_vit_s', img_size=16, batch_size=8, workers=0, opt='adamw', lr=1e-2, epochs=2, warmup_epochs=0,
    device='cpu', model_ema=True, model_kwargs=dict(
        patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=4, representation_size=0))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp('trained')
    write_images(root / 'data', {'train': 12, 'validation': 6})
    return train({**RECIPE, 'data_dir': str(root / 'data')}, output=root / 'run', quiet=True), root / 'data'


def test_the_checkpoint_knows_its_recipe(trained, tmp_path, capsys):
    """Metrics of the last epoch again, of the model and of its average; cost and expert use beside them."""
    result, data = trained
    last = result['history'][-1]
    main(['--checkpoint', result['checkpoint'], '--json', str(tmp_path / 'out.json')])
    printed = capsys.readouterr().out
    assert f'top-1 {last["eval_top1"]:.2f} %' in printed and 'on 12 images' in printed
    assert 'blocks.1.mlp' in printed and f'{result["macs"]:,} MACs' in printed
    figures = json.loads((tmp_path / 'out.json').read_text())
    assert figures['top1'] == last['eval_top1'] and figures['loss'] == pytest.approx(last['eval_loss'], rel=1e-6)
    assert figures['usage'][0]['items'] == 12 * 5  # four patches and the class token of every image
    averaged = evaluate(checkpoint=result['checkpoint'], use_ema=True, quiet=True, usage=False)
    assert averaged['loss'] == pytest.approx(last['eval_ema_loss'], rel=1e-6)


def test_corrupt_images_are_named_and_left_out(trained, tmp_path, capsys):
    """One of seven dark images is truncated, one is text: 12 images count, as without them."""
    result, _ = trained
    data = write_images(tmp_path / 'data', {'validation': 6})
    good = evaluate(checkpoint=result['checkpoint'], overrides={'data_dir': str(data)}, quiet=True, usage=False)
    folder = data / 'validation' / 'dark'
    (folder / '03b.png').write_bytes((folder / '03.png').read_bytes()[:300])
    (folder / '04b.png').write_text('not an image')
    found = evaluate(checkpoint=result['checkpoint'], overrides={'data_dir': str(data)}, usage=False)
    assert (found['images'], found['top1'], found['top5']) == (12, good['top1'], good['top5'])
    assert found['loss'] == pytest.approx(good['loss'], rel=1e-6)
    assert found['corrupt'] == [str(folder / '03b.png'), str(folder / '04b.png')]
    warned = capsys.readouterr().err
    assert f"skipped corrupt image '{folder / '03b.png'}'" in warned and '2 corrupt images skipped so far' in warned
    with pytest.raises(InputError, match=f"Corrupt image '{folder / '03b.png'}': --strict-data refuses"):
        evaluate(checkpoint=result['checkpoint'], overrides={'data_dir': str(data)}, strict_data=True, quiet=True)


@pytest.mark.parametrize('workers', [0, 2])
def test_corrupt_images_in_training(tmp_path, workers):
    """The next readable image takes the place of a corrupt one; the path and the count are told."""
    data = write_images(tmp_path / 'data', {'train': 8, 'validation': 2})
    bad = data / 'train' / 'bright' / '02.png'
    bad.write_bytes(b'\x89PNG broken')
    recipe = {**RECIPE, 'data_dir': str(data), 'workers': workers, 'epochs': 1}
    result = train(recipe, output=tmp_path / 'run', quiet=True)
    assert result['corrupt'] == [str(bad)]
    assert result['warnings'][-2:] == [
        f"skipped corrupt image '{bad}'", '1 corrupt image skipped so far; --strict-data refuses them']
    with pytest.raises(InputError, match='--strict-data refuses data with unreadable images'):
        train(recipe, output=tmp_path / 'strict', strict_data=True, quiet=True)


def test_replacement_and_target(tmp_path):
    """Index 1 of (good, bad, good): index 2 in training, the mark of a left-out image in evaluation."""
    data = write_images(tmp_path, {'train': 3})
    (data / 'train' / 'bright' / '01.png').write_text('')
    args = load_config({'data_dir': str(data), 'val_split': 'train'})
    training, evaluation = open_dataset(args, True), open_dataset(args, False)
    assert isinstance(training, CheckedImages)
    assert np.array_equal(np.asarray(training[1][0]), np.asarray(training[2][0])) and training[1][1] == 0
    assert evaluation[1][1] == LEFT_OUT and evaluation[2][1] == 0 and evaluation[3][1] == 1


def test_a_class_without_evaluation_images(tmp_path):
    """The index of the classes after it must not shift: folders a, b, c in training, a, c in evaluation."""
    from moe_zoo.engine.data import class_names, open_datasets
    for split, names in (('train', 'abc'), ('validation', 'ac')):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(tmp_path / split / name / '0.png')
    args = load_config({'data_dir': str(tmp_path)})
    train_set, evaluation = open_datasets(args)
    assert class_names(evaluation) == class_names(train_set) == {'a': 0, 'b': 1, 'c': 2}
    assert [evaluation[i][1] for i in range(2)] == [0, 2] and args.num_classes == 3


def test_safetensors_and_plain_weights(trained, tmp_path):
    from safetensors.torch import save_file
    result, data = trained
    weights = torch.load(result['checkpoint'], weights_only=True)['state_dict']
    save_file(weights, tmp_path / 'w.safetensors')
    torch.save(weights, tmp_path / 'w.pth')
    for name in ('w.safetensors', 'w.pth'):
        found = evaluate({**RECIPE, 'data_dir': str(data)}, checkpoint=tmp_path / name, quiet=True, usage=False)
        assert found['top1'] == result['history'][-1]['eval_top1']
    options = {name: RECIPE[name] for name in ('model', 'model_kwargs', 'img_size', 'workers')}
    named = evaluate(overrides=dict(options, data_dir=str(data)), checkpoint=tmp_path / name, quiet=True, usage=False)
    assert named['top1'] == found['top1']


def test_thousand_classes_through_a_class_map(shared_data):
    """200 folders of ImageNet classes: their index comes from the list of all 1000, not from the folders."""
    samples = shared_data / 'imagenet-1k-samples'
    if not samples.is_dir():
        pytest.skip('imagenet-1k-samples is missing')
    synsets = (samples / 'synsets.txt').read_text().split()
    args = load_config({'data_dir': str(samples / 'images'), 'class_map': str(samples / 'synsets.txt'),
                        'num_classes': 1000})
    dataset = open_dataset(args, False)
    from pathlib import Path
    assert len(dataset) == 200
    for index in (0, 57, 199):
        assert synsets[dataset.reader.samples[index][1]] == Path(dataset.reader.samples[index][0]).parent.name
