"""A checkpoint knows its classes: predictions by name, and the analysis of a trained model on folders."""
import json

import pytest
import torch
from image_folders import write_images

from moe_zoo.engine import analyze_experts
from moe_zoo.engine.checkpoint import read_checkpoint
from moe_zoo.engine.data import class_list
from moe_zoo.engine.evaluate import evaluate
from moe_zoo.engine.inference import load_images, open_classifier
from moe_zoo.engine.predict import describe, find_run, main
from moe_zoo.engine.train import train
from moe_zoo.errors import InputError

RECIPE = dict(
    model='vmoe_vit_s', img_size=16, batch_size=8, workers=0, opt='adamw', lr=1e-2, epochs=4, warmup_epochs=0,
    device='cpu', smoothing=0., scale=[0.9, 1.], color_jitter=0., model_kwargs=dict(
        patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=4, representation_size=0))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp('trained')
    write_images(root / 'data', {'train': 24, 'validation': 6})
    return train({**RECIPE, 'data_dir': str(root / 'data')}, output=root / 'run', quiet=True), root


def test_class_list():
    assert class_list({'b': 1, 'a': 0}, 2) == ['a', 'b']
    assert class_list({'z': 2, 'far': 9}, 3) == ['0', '1', 'z'] and class_list(None, 2) == ['0', '1']


def test_checkpoints_know_their_classes(trained):
    assert read_checkpoint(trained[0]['checkpoint'])['moe_zoo']['classes'] == ['bright', 'dark']


def test_predictions_have_names_and_experts(trained, capsys):
    result, root = trained
    assert result['top1'] == 100  # dark and bright are easy to tell: the names below follow
    files = [str(root / 'data' / 'validation' / name / '00.png') for name in ('dark', 'bright')]
    assert main([str(root / 'run'), *files]) == 0
    first, second = capsys.readouterr().out.split(files[1])
    assert first.splitlines()[0] == files[0]
    assert first.splitlines()[1].split()[-1] == 'dark' and second.splitlines()[1].split()[-1] == 'bright'
    assert 'blocks.1.mlp' in first and 'of 5 items' in first  # four patches and the class token
    assert main([str(root / 'run'), files[0], '--json']) == 0
    found, = json.loads(capsys.readouterr().out)
    assert [row['name'] for row in found['classes']] == ['dark', 'bright']
    assert sum(row['probability'] for row in found['classes']) == pytest.approx(1)
    layer, = found['layers']
    assert layer['items'] == 5 and sum(layer['weight']) == pytest.approx(1) and sum(layer['first']) == pytest.approx(1)


def test_a_bad_image_does_not_stop_the_others(trained, capsys, tmp_path):
    _, root = trained
    good = root / 'data' / 'validation' / 'dark' / '00.png'
    (tmp_path / 'cut.png').write_bytes(good.read_bytes()[:300])
    (tmp_path / 'text.png').write_text('no image')
    bad = [str(tmp_path / name) for name in ('cut.png', 'text.png', 'gone.png')]
    assert main([str(root / 'run'), *bad, str(good)]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith(f'{good}\n') and printed.err.count('\n') == 3
    assert f"The image '{bad[0]}' cannot be read: " in printed.err and f"The image '{bad[1]}' cannot" in printed.err
    assert f"There is no image '{bad[2]}'." in printed.err
    assert main([str(root / 'run'), bad[1], '--json']) == 2
    assert 'cannot be read' in json.loads(capsys.readouterr().out)[0]['error']


def test_runs_are_folders_or_files(trained, tmp_path):
    _, root = trained
    best = root / 'run' / 'model_best.pth.tar'
    assert find_run(root / 'run') == best and find_run(best) == best
    (tmp_path / 'last.pth.tar').touch()
    assert find_run(tmp_path).name == 'last.pth.tar'
    with pytest.raises(InputError, match='has no model_best.pth.tar or last.pth.tar'):
        find_run(root)
    with pytest.raises(InputError, match=r"The run 'nowhere' is no folder and no checkpoint"):
        find_run(type(root)('nowhere'))


def test_lines_of_mixed_layers_and_channels():
    layers = [
        {'layer': 'conv', 'kind': 'mix', 'items': 1, 'weight': [.5, .05, .2, .1, .15], 'first': None},
        {'layer': 'gate1', 'kind': 'channels', 'items': 1, 'weight': [.5, 0., .5], 'first': None},
    ]
    assert describe({'classes': [{'name': 'cat', 'probability': .971}], 'layers': layers}) == [
        '   97.1 %  cat',
        '  conv   experts 0 (50 %), 2 (20 %), 4 (15 %), 3 (10 %) and 1 more of the weight',
        '  gate1  2 of 3 channels on',
    ]


def test_the_checkpoint_numbers_the_folders(trained, tmp_path):
    """A folder without one of the classes keeps the numbers of the others; one with another class is refused."""
    result, root = trained
    write_images(tmp_path / 'data', {'validation': 3})
    for file in (tmp_path / 'data' / 'validation' / 'bright').iterdir():
        file.unlink()
    (tmp_path / 'data' / 'validation' / 'bright').rmdir()
    options = {'data_dir': str(tmp_path / 'data')}
    classifier, dataset = open_classifier(result['checkpoint'], overrides=options)
    images = load_images(classifier, dataset, 10)
    assert classifier.classes == ['bright', 'dark'] and images.targets.tolist() == [1, 1, 1]
    assert evaluate(checkpoint=result['checkpoint'], overrides=options, usage=False, quiet=True)['top1'] == 100
    (tmp_path / 'data' / 'validation' / 'dark').rename(tmp_path / 'data' / 'validation' / 'dusk')
    for tool in (open_classifier, evaluate):
        with pytest.raises(InputError, match='has classes that the model was not trained on: dusk'):
            tool(checkpoint=result['checkpoint'], overrides=options)


def test_what_the_model_sees_is_what_evaluation_feeds_it(trained):
    """The same numbers as timm's loader, image by image, though they wait as pixels."""
    from moe_zoo.engine.data import create_loaders
    result, root = trained
    classifier, dataset = open_classifier(result['checkpoint'])
    images = load_images(classifier, dataset, 100)
    loader = create_loaders(classifier.args, classifier.data_config, None, dataset, classifier.device).eval
    expected = torch.cat([batch for batch, _ in loader])
    assert torch.allclose(torch.cat([batch for batch, _ in images.batches(classifier, 5)]), expected, atol=1e-6)
    few = load_images(open_classifier(result['checkpoint'])[0], open_classifier(result['checkpoint'])[1], 4)
    assert few.targets.tolist() == [0, 0, 1, 1] and few.total == 12  # evenly over the folders


def test_the_analysis_of_a_trained_model(trained, tmp_path, capsys):
    """On folders, with a corrupt image: it is named and left out; the accuracy is that of evaluation."""
    result, _ = trained
    data = write_images(tmp_path / 'data', {'validation': 6})
    (data / 'validation' / 'dark' / '03.png').write_text('no image')
    code = analyze_experts.main([
        '--checkpoint', result['checkpoint'], '--data-dir', str(data), '--out', str(tmp_path / 'out'), '--json',
        '--no-figures', '--images', '1'])
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert code == 0 and found == json.loads((tmp_path / 'out' / 'experts.json').read_text())
    assert found['trained'] and found['images'] == 11 and found['free']['accuracy'] == 100
    assert f"skipped corrupt image '{data / 'validation' / 'dark' / '03.png'}'" in printed.err
    assert 'UNTRAINED' not in printed.err and found['files'][0] == 'bright/00.png'
    page = (tmp_path / 'out' / 'index.html').read_text()
    assert '1 image could not be read' in page and '11 images' in page
