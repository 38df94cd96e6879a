"""Every file that is read, damaged at random: it works, or one sentence refuses it. Nothing in it is run."""
import inspect
import io
import itertools
import json
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from fuzzing import ODD_VALUES, SECONDS, answer, damage, fuzz, mutate
from image_folders import write_images
from run_files import epochs, iterations, write_classifier, write_detector
from safetensors.torch import save_file
from test_convert_checkpoint import write_checkpoint
from test_vmoe_models import flax_tree, tiny

from moe_zoo import cli
from moe_zoo.analysis.report_cli import report
from moe_zoo.cards import cards
from moe_zoo.checkpoints.convert_cli import convert_dense, convert_vmoe
from moe_zoo.documents import parse_json, parse_yaml
from moe_zoo.engine.checkpoint import find_weights, read_checkpoint
from moe_zoo.engine.config import load_config
from moe_zoo.engine.inference import open_classifier, recipe_of
from moe_zoo.engine.train import train

pytestmark = pytest.mark.filterwarnings('ignore')
TINY = dict(patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=2, representation_size=0,
            img_size=16, num_classes=2)


# ---- texts

@pytest.mark.parametrize('times', SECONDS)
def test_yaml_and_json_of_any_bytes(times):
    text = 'a: [1, 2.5, {b: x, c: null}]\nd: true\ne: &a [1]\nf: [*a, *a, 2001-01-01, 1:30]\n'

    def check(random):
        found = damage(text.encode(), random).decode(errors='replace')
        try:
            parse_yaml(found)
        except yaml.YAMLError as error:
            assert str(error)
        try:
            parse_json(json.dumps(mutate(json.loads('{"a": [1, {"b": 2}], "c": "x"}'), random)) + found[:2])
        except ValueError as error:
            assert str(error)
    fuzz(check, 50 * times)


BOMBS = {  # what each text would be, and is refused as
    'aliases of aliases': '\n'.join(
        ['a0: &a0 [x, x, x, x, x, x, x, x, x, x]', *(f'a{n}: &a{n} [{", ".join([f"*a{n - 1}"] * 10)}]'
                                                    for n in range(1, 12))]),
    'merges of merges': '\n'.join(
        ['a0: &a0 {x: 1}', *(f'a{n}: &a{n} {{<<: [{", ".join([f"*a{n - 1}"] * 10)}]}}' for n in range(1, 12))]),
    'itself': 'a: &a [*a]',
    'deep': '[' * 1200,
    'deep and closed': '[' * 150 + ']' * 150,
    'deep blocks': '- ' * 3000,
    'a number': 'a: ' + '9' * 5000,
    'a number in bases': 'a: 0x' + 'f' * 50000,
    'a number of times': 'a: 1' + ':59' * 50000,
    'a date': 'a: 2001-99-99',
    'a tag': '!!python/object/apply:os.system ["touch made"]',
    'a float': '!!float x',
    'a flag': '!!bool x',
    'a key': '? [a]\n: b',
}


@pytest.mark.parametrize('text', BOMBS.values(), ids=BOMBS)
def test_short_texts_that_would_be_long(text, tmp_path):
    """As YAML, in a recipe and on the command line."""
    with pytest.raises(yaml.YAMLError) as told:
        parse_yaml(text)
    assert told.value.problem
    (tmp_path / 'recipe.yaml').write_text(text)
    assert "recipe.yaml' is not valid YAML: " in answer(lambda: load_config(tmp_path / 'recipe.yaml'))


@pytest.mark.parametrize('text', ['[' * 100000, '[' * 150 + ']' * 150, '{"a":' * 2000, '9' * 3000, '-' + '9' * 5000])
def test_json_that_would_end_python(text):
    with pytest.raises(ValueError, match='nested more than 100 deep|is too long'):
        parse_json(text)


def test_plain_texts_are_what_they_were(repository):
    for path in sorted((repository / 'configs').glob('*/*.yaml')):
        assert parse_yaml(path.read_text()) == yaml.safe_load(path.read_text())
    assert parse_yaml('') is None and parse_json('[1, -2, 1e3, "x", null]') == [1, -2, 1000., 'x', None]
    assert parse_yaml('a: &a {x: 1}\nb: {<<: *a, y: 2}') == {'a': {'x': 1}, 'b': {'x': 1, 'y': 2}}


def write_damaged(path, text, random):
    """YAML that is damaged as text, or has values of other kinds."""
    if random.random() < .5:
        path.write_bytes(damage(text.encode(), random))
    else:
        path.write_text(yaml.safe_dump(mutate(yaml.safe_load(text), random)))


@pytest.mark.parametrize('times', SECONDS)
def test_recipes(times, repository, tmp_path):
    """Through a file and through the command line."""
    texts = [path.read_text() for path in sorted((repository / 'configs').glob('*/*.yaml'))
             if 'model:' in path.read_text()]
    path, answers = tmp_path / 'recipe.yaml', []

    def check(random):
        write_damaged(path, random.choice(texts), random)
        answers.append(answer(lambda: load_config(path)))
        key = random.choice(('lr', 'epochs', 'model_kwargs', 'model_kwargs.x', 'scale', 'opt_betas', 'amp', 'x'))
        value = random.choice(['1', 'x', '[', '{a: 1', '1e999', '.inf', '2001-99-99', '!!float x', '*a', 'a=1', *map(
            str, ODD_VALUES)])
        answers.append(answer(lambda: load_config({}, [f'{key}={value}'])))
    fuzz(check, 40 * times)
    assert None in answers and any(answers)


@pytest.mark.parametrize('times', SECONDS)
def test_detectron2_configs(times, repository, tmp_path):
    pytest.importorskip('detectron2')
    from moe_zoo.detection import load_config as load_detector
    folder = repository / 'configs' / 'coco'
    texts = [path.read_text().replace('_BASE_: ', f'_BASE_: {folder}/').replace('"', '')
             for path in sorted(folder.glob('*.yaml'))]
    path, answers = tmp_path / 'own.yaml', []

    def check(random):
        write_damaged(path, random.choice(texts), random)
        answers.append(answer(lambda: load_detector(path)))
    fuzz(check, 12 * times)
    assert None in answers and any(answers)


@pytest.mark.parametrize('text', [*BOMBS.values(), '_BASE_: own.yaml', '_BASE_: [own.yaml]'], ids=[*BOMBS, '1', 'n'])
def test_detectron2_configs_that_would_be_long(text, tmp_path):
    pytest.importorskip('detectron2')
    from moe_zoo.detection import load_config as load_detector
    (tmp_path / 'own.yaml').write_text(text)
    assert 'own.yaml' in answer(lambda: load_detector(tmp_path / 'own.yaml'))


@pytest.mark.parametrize('times', SECONDS)
def test_cards(times, repository, tmp_path):
    """What `moe-zoo list`, `show` and `cards --check` say of a registry with one damaged card."""
    from moe_zoo.card_tables import accuracy_table, card_text, find, listing, models_table, values
    from moe_zoo.cards_cli import _form_drifts
    texts = [path.read_text() for path in sorted((repository / 'registry').glob('*/*.toml'))]
    path, answers = tmp_path / 'family' / 'name.toml', []
    path.parent.mkdir()

    def tell(_):
        known = cards(tmp_path)
        for entry in known.values():
            list(_form_drifts(entry))
            card_text(entry, 100)
        listing(find(known), ('model', 'MACs'), 100), values(find(known))
        return models_table(known), accuracy_table(known)

    def check(random):
        path.write_bytes(damage(random.choice(texts).encode(), random))
        answers.append(answer(lambda: cli._of_cards(tell, [])))
    fuzz(check, 30 * times)
    path.write_text('a = ' + '[' * 5000)
    assert 'is not valid TOML' in answer(lambda: cards(tmp_path))
    assert None in answers and any(answers)


# ---- weights

@pytest.fixture(scope='module')
def checkpoint():
    """A small V-MoE as training saves it: weights, what it was built from, its classes."""
    model = timm.create_model('vmoe_vit_s', **TINY)
    kwargs = {key: value for key, value in TINY.items() if key not in ('img_size', 'num_classes')}
    return {
        'epoch': 3, 'arch': 'vmoe_vit_s', 'state_dict': model.state_dict(), 'version': 2,
        'args': {'model': 'vmoe_vit_s', 'img_size': 16, 'num_classes': 2, 'model_kwargs': kwargs, 'device': 'cpu'},
        'moe_zoo': {'epoch': 4, 'batch': 0, 'classes': ['cat', 'dog']}}


def saved(content, legacy=False):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


MODEST = tuple(value for value in ODD_VALUES if not isinstance(value, int) or abs(value) < 2 ** 31)


@pytest.mark.parametrize('times', SECONDS)
def test_checkpoints(times, checkpoint, tmp_path):
    """Of both of torch's formats, damaged as bytes and as values; read as `moe-zoo predict` reads them."""
    whole, path, answers = [saved(checkpoint, legacy) for legacy in (False, True)], tmp_path / 'last.pth.tar', []

    def check(random):
        if random.random() < .5:
            path.write_bytes(damage(random.choice(whole), random))
        else:
            weights = mutate(dict(list(checkpoint['state_dict'].items())[:3]), random) if random.random() < .2 else \
                checkpoint['state_dict']
            rest = {key: value for key, value in checkpoint.items() if key != 'state_dict'}
            rest = mutate(rest, random, MODEST)
            path.write_bytes(saved({'state_dict': weights, **rest} if isinstance(rest, dict) else rest))
        answers.append(answer(lambda: find_weights(read_checkpoint(path), path)))
        answers.append(answer(lambda: open_classifier(path, with_data=False)))
    fuzz(check, 15 * times)
    assert None in answers and any(answers)


def test_a_checkpoint_cannot_let_an_evaluation_run_code(checkpoint):
    """What a recipe may say, a stranger's checkpoint may not; nor are its classes and options of any kind."""
    args = {**checkpoint['args'], 'dataset': 'hfds/a/b', 'dataset_trust_remote_code': True, 'device_modules': ['evil']}
    recipe = recipe_of(None, {'args': args}, {}, 'a.pth')
    assert recipe['dataset'] == 'hfds/a/b' and not {'dataset_trust_remote_code', 'device_modules'} & recipe.keys()
    assert 'does not say what it was trained with' in answer(lambda: recipe_of(None, {'args': 5}, {}, 'a.pth'))


def test_a_checkpoint_cannot_ask_for_a_network_that_it_does_not_hold(checkpoint, tmp_path):
    """Blocks a million wide over weights of 16: they are refused before they are built."""
    kwargs = {**checkpoint['args']['model_kwargs'], 'embed_dim': 2 ** 20, 'num_heads': 2 ** 10}
    torch.save({**checkpoint, 'args': {**checkpoint['args'], 'model_kwargs': kwargs}}, tmp_path / 'a.pth')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert 'does not fit the model' in answer(lambda: open_classifier(tmp_path / 'a.pth', with_data=False))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB; the network has terabytes


def test_a_resumed_run_removes_its_own_checkpoints_alone(tmp_path):
    """timm keeps a list of files in the checkpoint, and removes the worst of them when it holds too many."""
    from moe_zoo.engine.checkpoint import AtomicCheckpointSaver
    folder, other = tmp_path / 'run', tmp_path / 'thesis.pth.tar'
    folder.mkdir()
    names = ['checkpoint-1.pth.tar', 'notes-1.pth.tar', str(other), '../thesis.pth.tar', 'checkpoint-../../x.pth.tar']
    for path in (folder / names[0], folder / names[1], other):
        path.touch()
    model = torch.nn.Linear(1, 1)
    saver = AtomicCheckpointSaver(
        model, torch.optim.SGD(model.parameters()), checkpoint_dir=str(folder), recovery_dir=str(folder),
        run_state=dict)
    saver.load_state_dict({'checkpoint_files': [(name, 1.) for name in names]})
    assert [Path(path).name for path, _ in saver.checkpoint_files] == names[:1]


@pytest.fixture(scope='module')
def interrupted(tmp_path_factory):
    """A recipe of four updates; checkpoints of a run of it, after the first epoch and one update later."""
    root = tmp_path_factory.mktemp('interrupted')
    kwargs = {key: value for key, value in TINY.items() if key not in ('img_size', 'num_classes')}
    recipe = dict(
        model='vmoe_vit_s', model_kwargs=kwargs, img_size=16, data_dir=str(write_images(root, {'train': 4})), workers=0,
        val_split='', batch_size=4, epochs=2, opt='adamw', lr=1e-3, warmup_epochs=0, device='cpu', checkpoint_hist=2)
    train(recipe, dict(recovery_interval=1), output=root / 'run', quiet=True)
    paths = [root / 'run' / f'{name}.pth.tar' for name in ('checkpoint-0', 'recovery-1-0')]
    return recipe, {path: read_checkpoint(path) for path in paths}


@pytest.mark.parametrize('times', SECONDS)
def test_runs_that_are_resumed(times, interrupted, tmp_path):
    """All of a checkpoint but its weights is of other values; with it a training goes on, or one sentence refuses."""
    recipe, checkpoints = interrupted
    answers, number = [], itertools.count()

    def check(random):
        path, content = random.choice(list(checkpoints.items()))
        content = {**content, 'saver': json.loads(json.dumps(content['saver']))}  # lists, whose values are replaced
        part = random.choice(('saver', 'moe_zoo', 'optimizer', 'epoch'))
        changed = mutate(content[part], random, MODEST) if part != 'epoch' else random.choice(MODEST)
        folder = tmp_path / str(next(number))
        folder.mkdir()
        torch.save({**content, part: changed}, folder / path.name.replace('checkpoint-0', 'last'))
        answers.append(answer(lambda: train(recipe, output=folder, resume='auto', quiet=True)))
    fuzz(check, 5 * times)
    assert None in answers and any(answers)


@pytest.mark.parametrize('times', SECONDS)
def test_safetensors_and_weights_from_files(times, checkpoint, tmp_path):
    """A file for `pretrained=True` in Python, and for `convert-checkpoint upcycle`."""
    path = tmp_path / 'w.safetensors'
    save_file(checkpoint['state_dict'], path)
    files, answers = {'.safetensors': path.read_bytes(), '.pth': saved(checkpoint['state_dict'])}, []

    def check(random):
        suffix = random.choice(list(files))
        path = tmp_path / f'w{suffix}'
        path.write_bytes(damage(files[suffix], random))
        overlay = dict(file=str(path), num_classes=2)
        answers.append(answer(lambda: timm.create_model(
            'vmoe_vit_s', pretrained=True, pretrained_cfg_overlay=overlay, **TINY)))
        answers.append(answer(lambda: convert_dense(path, tmp_path / 'out.safetensors', 'vmoe_vit_s', TINY)))
    fuzz(check, 10 * times)
    assert None in answers and any(answers)


@pytest.fixture(scope='module')
def detector(repository, tmp_path_factory):
    pytest.importorskip('detectron2')
    from detectors import TINY_RETINANET
    from detectron2.modeling import build_model

    from moe_zoo.detection import load_config as load_detector
    path = tmp_path_factory.mktemp('detector') / 'own.yaml'
    path.write_text(TINY_RETINANET.format(base=repository / 'configs' / 'coco' / 'Base-RetinaNet.yaml'))
    return build_model(load_detector(path)), path


@pytest.mark.parametrize('times', SECONDS)
def test_weights_of_detectors(times, detector, tmp_path):
    """.pkl of every protocol, .pth and .safetensors, through our checkpointer and through detectron2's own scripts'."""
    from detectron2.checkpoint import DetectionCheckpointer

    from moe_zoo.detection.checkpoint import SafeCheckpointer
    from moe_zoo.detection.upstream import with_plain_pickles
    model, answers = detector[0], []
    weights = {name: value.numpy() for name, value in list(model.state_dict().items())[:9]}
    content = {'model': weights, '__author__': 'us', 'matching_heuristics': True}
    file = tmp_path / 'w.safetensors'
    save_file({name: torch.as_tensor(value) for name, value in weights.items()}, file)
    files = [('.pkl', pickle.dumps(content, protocol)) for protocol in range(6)] + [
        ('.pth', saved({'model': model.state_dict()})), ('.safetensors', file.read_bytes())]
    load_upstream = with_plain_pickles(DetectionCheckpointer._load_file)

    def check(random):
        suffix, data = random.choice(files)
        if suffix == '.pkl' and random.random() < .4:
            data = pickle.dumps(mutate({**content, 'model': dict(list(weights.items())[:2])}, random))
        path = tmp_path / f'w{suffix}'
        path.write_bytes(damage(data, random) if random.random() < .8 else data)
        answers.append(answer(lambda: SafeCheckpointer(model).load(str(path))))
        if suffix == '.pkl':
            answers.append(answer(lambda: load_upstream(SafeCheckpointer(model), str(path))))
    fuzz(check, 25 * times)
    assert None in answers and any(answers)


@pytest.mark.parametrize('times', SECONDS)
def test_released_checkpoints(times, tmp_path):
    """`PREFIX.index` and its data files, of a V-MoE of four blocks."""
    prefix = write_checkpoint(tmp_path / 'small', flax_tree(tiny(depth=2, moe_layers=(1,))))
    files, answers = {path: path.read_bytes() for path in sorted(tmp_path.glob('small.*'))}, []

    def check(random):
        path = random.choice(list(files))
        path.write_bytes(damage(files[path], random))
        try:
            answers.append(answer(lambda: convert_vmoe(prefix, tmp_path / 'out.safetensors')))
        finally:
            path.write_bytes(files[path])
    fuzz(check, 15 * times)
    assert any(answers) and answer(lambda: convert_vmoe(prefix, tmp_path / 'out.safetensors')) is None


# ---- runs

@pytest.mark.parametrize('times', SECONDS)
def test_folders_of_runs(times, tmp_path, capsys):
    """A classifier's and a detector's: each file damaged in turn; the other run still makes a page."""
    routed = write_classifier(tmp_path / 'runs' / 'a', epochs(90., 95., **{'blocks.1.mlp': (.9, .8)}), model_kwargs={})
    write_classifier(tmp_path / 'runs' / 'a' / 'twin', epochs(80., 85.), model='vit_base_patch32_224')
    write_detector(tmp_path / 'runs' / 'd', iterations((.5, .5), (.6, .4)), {'bbox': {'AP': 10., 'AP50': 20.}})
    (routed / 'results.json').write_text(json.dumps({
        'model': [{'folder': str(routed), 'parameters': 10, 'active_parameters': 5, 'macs': 7}], 'twin': [],
        'versions': {'moe_zoo': '1', 'commit': 'abc', 'torch': '2'}}))
    answer(lambda: report([tmp_path / 'runs'], tmp_path / 'out', measure=False))
    files = {path: path.read_bytes() for path in sorted((tmp_path / 'runs').rglob('*.*')) if path.is_file()}

    def check(random):
        path = random.choice(list(files))
        if random.random() < .5 or path.suffix == '.csv':
            path.write_bytes(damage(files[path], random))
        elif path.suffix == '.yaml':
            path.write_text(yaml.safe_dump(mutate(yaml.safe_load(files[path]), random)))
        else:
            lines = files[path].decode().splitlines() if path.name == 'metrics.json' else [files[path].decode()]
            path.write_text('\n'.join(json.dumps(mutate(json.loads(line), random)) for line in lines))
        try:
            assert answer(lambda: report([tmp_path / 'runs'], tmp_path / 'out', measure=False)) is None
        finally:
            path.write_bytes(files[path])
    fuzz(check, 15 * times)


# ---- COCO

def coco():
    """Two images of 8 x 6, objects with a polygon, with runs as numbers and with runs as text."""
    objects = [
        dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 4, 4], area=16, iscrowd=0, segmentation=[[1, 1, 5, 1, 5, 5]]),
        dict(id=2, image_id=1, category_id=2, bbox=[0, 0, 2., 2], area=4, iscrowd=1,
             segmentation={'size': [6, 8], 'counts': [6, 12, 30]}),
        dict(id=3, image_id=2, category_id=1, bbox=[0, 0, 1, 6], area=6, iscrowd=0,
             segmentation={'size': [6, 8], 'counts': '06Z1'})]
    return {'images': [dict(id=n, file_name=f'{n}.png', width=8, height=6) for n in (1, 2)], 'annotations': objects,
            'categories': [{'id': 1, 'name': 'cat'}, {'id': 2, 'name': 'dog'}]}


@pytest.fixture
def coco_data(detector, tmp_path):
    """Opens a COCO JSON as training does, maps its images with their masks, and evaluates perfect boxes on it."""
    from detectron2.structures import Boxes, Instances
    from PIL import Image

    from moe_zoo.detection import load_config as load_detector
    from moe_zoo.detection.coco import ReadableMapper, load_datasets, register_coco
    from moe_zoo.detection.evaluation import build_evaluator
    cfg = load_detector(detector[1], [
        'MODEL.RETINANET.NUM_CLASSES', '2', 'MODEL.MASK_ON', 'True', 'INPUT.MASK_FORMAT', 'bitmask',
        'INPUT.MIN_SIZE_TRAIN', '(12,)', 'OUTPUT_DIR', str(tmp_path / 'run')])
    (tmp_path / 'images').mkdir()
    for number in (1, 2):
        Image.new('RGB', (8, 6)).save(tmp_path / 'images' / f'{number}.png')
    path = tmp_path / 'own.json'

    def open_it(evaluate=True):
        register_coco('fuzzed', str(path), str(tmp_path / 'images'))
        dicts = load_datasets(cfg, ['fuzzed'], False)
        mapper = ReadableMapper(cfg, True)
        for entry in dicts:
            mapper(entry)
        if not evaluate:
            return
        evaluator = build_evaluator(cfg, 'fuzzed')
        evaluator._tasks = ('bbox', 'segm')
        evaluator.reset()
        for entry in dicts:
            found = Instances((6, 8))
            found.pred_boxes, found.scores = Boxes(torch.tensor([[0., 0., 3., 3.]])), torch.ones(1)
            found.pred_classes, found.pred_masks = torch.zeros(1, dtype=torch.long), torch.ones(1, 6, 8) > 0
            evaluator.process([{'image_id': entry['image_id']}], [{'instances': found}])
        evaluator.evaluate()
    return path, open_it


@pytest.mark.parametrize('times', SECONDS)
def test_coco(times, coco_data):
    path, open_it = coco_data
    path.write_text(json.dumps(coco()))
    assert answer(open_it) is None
    answers = []

    def check(random):
        if random.random() < .3:
            path.write_bytes(damage(json.dumps(coco()).encode(), random))
        else:
            path.write_text(json.dumps(mutate(coco(), random)))
        answers.append(answer(open_it))
    fuzz(check, 25 * times)
    assert any(answers)


@pytest.mark.parametrize('change, said', [
    (dict(segmentation=[[0, 0, 1e9, 0, 1e9, 1e9]]), 'segmentation .* is not the corners'),
    (dict(segmentation=[[0, 0, 1e7, 0, 1e7, 1]]), 'segmentation .* is not the corners'),
    (dict(segmentation={'size': [60000, 80000], 'counts': '06Z1'}), 'cover its image of 8 x 6 pixels'),
    (dict(segmentation={'size': [6, 8], 'counts': [6, 10 ** 6, 30]}), 'cover its image of 8 x 6 pixels'),
    (dict(segmentation={'size': [6, 8], 'counts': '06Z'}), 'cover its image of 8 x 6 pixels'),
    (dict(bbox=[0, 0, float('inf'), 1]), 'bbox .* four numbers'), (dict(id=2 ** 63), 'whole number of 64 bits')])
def test_coco_that_would_end_the_process(coco_data, change, said):
    """pycocotools, left alone with the first and the third and 1 GB of memory, ends by a segmentation fault."""
    path, open_it = coco_data
    content = coco()
    content['annotations'][0].update(change)
    path.write_text(json.dumps(content))
    assert re.search(said, answer(open_it))
    content = coco()
    content['images'][0].update(width=80000, height=60000)
    path.write_text(json.dumps(content))
    assert 'numbers of pixels that can be read' in answer(open_it)


# ---- keywords of models

SMALL = {  # a name a family, small enough to be built many times
    'condconv_mobilenetv1_025': dict(num_classes=3), 'dyconv_resnet10': dict(num_classes=3),
    'deepmoe_resnet56_cifar': dict(num_classes=3), 'moe_resnet18_cifar': dict(num_classes=3),
    'pmoe_cnn': {}, 'vmoe_vit_s': TINY, 'softmoe_vit_s': dict(TINY, moe_layers=[1]),
    'vmoe_vit_s_ec': TINY, 'moefied': dict(base='resnet10t', targets='layer4.0.conv2', num_classes=3),
    'fusion_trio': dict(encoders=['resnet10t', 'test_efficientnet'], num_classes=3)}
SAID = (TypeError, ValueError)
AT_WORK = (RuntimeError, AssertionError)  # of torch and timm, about an option of timm's, such as drop_path_rate=1e308


def keywords_of(model):
    """Every keyword that the classes of a model and of its routed layers take."""
    from moe_zoo.layers import RoutedLayer
    parts = [model, *(part for part in model.modules() if isinstance(part, RoutedLayer))]
    classes = {cls for part in parts for cls in type(part).__mro__}
    found = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    return sorted(found - {'self', 'args', 'kwargs', 'device', 'dtype', 'depth'}) + ['x']


@pytest.mark.parametrize('times', SECONDS)
@pytest.mark.parametrize('name', SMALL)
def test_keywords(name, times):
    """Built and run, in training and in evaluation, or refused when it is built."""
    known = keywords_of(timm.create_model(name, device='meta', **SMALL[name]))
    values = (*MODEST, 2, 3, 16, 64, 'sigmoid', 'softmax', 'relu', (1, 2), [0, 1], {'num_experts': 2})

    def check(random):
        more = {random.choice(known): random.choice(values) for _ in range(random.randint(1, 2))}
        built = []
        answer(lambda: built.append(timm.create_model(name, **{**SMALL[name], **more})), *SAID)
        for training in (True, False) if built else ():
            image = torch.zeros(2, getattr(built[0], 'in_chans', 3), *[16 if 'img_size' in SMALL[name] else 32] * 2)
            answer(partial(built[0].train(training), image), *SAID, *AT_WORK)
    fuzz(check, 2 * times)


# ---- what would run, or take all memory

MADE = 'made by a stranger'


class Harm:
    """Unpickled, it makes a file."""

    def __reduce__(self):
        return os.system, (f"touch '{MADE}'",)


class Storage:
    """Pickled as torch pickles the storage of a tensor, by an identity beside the stream."""


class _Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return ('storage', Harm(), '0', 'cpu', 1) if isinstance(value, Storage) else None


def torch_zip(content, pack=zipfile.ZIP_STORED, extra=()):
    """An archive as torch writes it, around a pickle of our own."""
    stream, file = io.BytesIO(), io.BytesIO()
    _Pickler(stream, 2).dump(content)
    with zipfile.ZipFile(file, 'w', pack, compresslevel=1) as archive:
        for name, data in (('data.pkl', stream.getvalue()), ('byteorder', b'little'), ('version', b'3\n'), *extra):
            archive.writestr(f'archive/{name}', data)
    return file.getvalue()


def tensor_of(storage, count):
    """A pickle's way to say: a tensor of so many numbers in a storage."""
    class Rebuilt:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (storage, 0, (count,), (1,), False, OrderedDict())
    return Rebuilt()


def harmful():
    """Files that would run a command, by name."""
    nested = {'model': {'a': [({'b': Harm()},)]}, 'state_dict': OrderedDict(a=Harm())}
    return {
        'reduce.pth': pickle.dumps({'state_dict': Harm()}), 'nested.pth': saved(nested), 'old.pth': saved(nested, True),
        'identity.pth': torch_zip({'state_dict': {'a': tensor_of(Storage(), 1)}}),
        'build.pth': torch_zip({'state_dict': Harm()}), 'reduce.pkl': pickle.dumps(Harm(), 0),
        'nested.pkl': pickle.dumps(nested), 'wrapped.pkl': pickle.dumps({'model': {'a': np.array([Harm()], object)}}),
        'named.pkl': b"cos\nsystem\n(S'touch made'\ntR.", 'module.pkl': b"cbuiltins\nexec\n(S'import os'\ntR.",
        'stack.pkl': b'\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.', 'tag.npz': b'PK\x03\x04' + bytes(40)}


def endless():
    """Files that would take far more memory than they have bytes, by name."""
    zeros = bytes(600 * 2 ** 20)
    pickled = pickle.dumps({'model': {'a': np.zeros(3, np.float32)}}, 4)
    return {
        'memo.pkl': b'\x80\x02Nr\xff\xff\xff\x7f.', 'bytes.pkl': b'\x80\x04\x8e' + struct.pack('<Q', 2 ** 40) + b'x',
        'text.pkl': b'\x80\x04\x8d' + struct.pack('<Q', 2 ** 62),
        'frame.pkl': b'\x80\x04\x95' + struct.pack('<Q', 2 ** 50),
        'shape.pkl': pickled.replace(b'K\x03\x85', b'J\xff\xff\xff\x7f\x85', 1),
        'packed.pth': torch_zip({'state_dict': {}}, zipfile.ZIP_DEFLATED, [('data/0', zeros)]),
        'spread.pth': saved({'state_dict': {'head.weight': torch.zeros(1).expand(10 ** 6, 10 ** 6)}}),
        'header.safetensors': struct.pack('<Q', 2 ** 60) + b'{}',
        'shape.safetensors': _safetensors([10 ** 12], 4 * 10 ** 12), 'flow.safetensors': _safetensors([2 ** 62, 8], 0),
        'deep.safetensors': struct.pack('<Q', 100000) + b'[' * 100000,
        'text.index': b'\x82\xabshard_count\xdb\xff\xff\xff\xff' + bytes(60),
        'list.index': b'\x82\xabshard_count\xdd\xff\xff\xff\xff' + bytes(60),
        'deep.index': b'\x82\xabshard_count\x01\xa5index' + b'\x81\xa1a' * 5000}


def _safetensors(shape, size):
    text = json.dumps({'a': {'dtype': 'F32', 'shape': shape, 'data_offsets': [0, size]}}).encode()
    return struct.pack('<Q', len(text)) + text + bytes(64)


STRANGERS = """
import json, resource, sys, traceback, warnings
warnings.simplefilter('ignore')
import timm, torch
from functools import partial
from pathlib import Path
import moe_zoo
from moe_zoo.checkpoints.convert_cli import convert_dense, convert_vmoe
from moe_zoo.engine.checkpoint import find_weights, read_checkpoint
from moe_zoo.engine.inference import open_classifier
from moe_zoo.errors import InputError
try:
    from moe_zoo.detection.checkpoint import SafeCheckpointer
    from moe_zoo.detection.upstream import with_plain_pickles
    from detectron2.checkpoint import DetectionCheckpointer
    upstream = with_plain_pickles(DetectionCheckpointer._load_file)
    detector = SafeCheckpointer(torch.nn.Linear(2, 2))
    detectors = [detector.load, lambda path: upstream(detector, path)]
except ImportError:
    detectors = []
tiny = json.loads(sys.argv[1])
readers = {
    '.index': [lambda path: convert_vmoe(path, 'out.safetensors')],
    '.pkl': [*detectors, lambda path: load_config_of(path)],
    '': [lambda path: find_weights(read_checkpoint(path), path), lambda path: open_classifier(path, with_data=False),
         lambda path: convert_dense(path, 'out.safetensors', 'vmoe_vit_s', tiny), *detectors[:1],
         lambda path: timm.create_model(
             'vmoe_vit_s', pretrained=True, pretrained_cfg_overlay=dict(file=path, num_classes=2), **tiny)]}
def load_config_of(path):
    from moe_zoo.engine.labels import read_class_map
    read_class_map(path)
with open('/proc/self/statm') as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2 ** 30,) * 2)
def peak():  # bytes; ru_maxrss would be that of the process that started this one
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith('VmHWM'))
before = peak()
for path in sorted(Path('.').glob('*.*')):
    for number, read in enumerate(readers.get(path.suffix, readers[''])):
        try:
            read(str(path))
            said = 'WORKED'
        except InputError as error:
            said = str(error)
        except BaseException as error:
            said = f'RAW {type(error).__name__}: {error}'
        print(json.dumps([path.name, number, said]), flush=True)
print(json.dumps(['peak', 0, peak() - before]))
"""


@pytest.mark.slow
def test_nothing_is_run_and_no_memory_is_taken(tmp_path):
    """Each file through every reader of its kind, in a process that may take 1 GB more than it has."""
    files = {**harmful(), **endless()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    done = subprocess.run([sys.executable, '-c', STRANGERS, json.dumps(TINY)], cwd=tmp_path, capture_output=True,
                          text=True, timeout=300, env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])})
    assert done.returncode == 0, done.stderr[-2000:]
    *told, (_, _, peak) = map(json.loads, done.stdout.splitlines())
    assert {name for name, _, _ in told} == files.keys()
    wrong = [each for each in told if each[2] == 'WORKED' or each[2].startswith('RAW') or '\n' in each[2]]
    assert not wrong
    assert peak < 500e6 and {path.name for path in tmp_path.iterdir()} == files.keys()
