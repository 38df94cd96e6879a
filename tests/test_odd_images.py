"""A thousand odd images: sound ones are read to the right pixels, broken ones are left out, named and counted."""
import json
import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from detectors import TINY_RETINANET
from odd_images import BROKEN, SOUND, picture, write_odd_images
from PIL import Image
from torch.utils.data import DataLoader

from moe_zoo.data.images import UnreadableImage, open_image, read_image
from moe_zoo.engine import evaluate_cli, predict, train
from moe_zoo.engine.config import load_config
from moe_zoo.engine.data import LEFT_OUT, open_dataset

pytestmark = pytest.mark.filterwarnings('ignore')  # Pillow's, on the files below
FEW, MANY = 60, 1000  # files; every kind is among 60
OPTIONS = dict(
    model='vmoe_vit_s', img_size=16, batch_size=8, workers=0, opt='adamw', lr=1e-3, epochs=1, warmup_epochs=0,
    device='cpu', model_kwargs=dict(
        patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=4, representation_size=0))


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    """Two classes, odd and even; what timm's reader finds of them, by path."""
    root = tmp_path_factory.mktemp('odd')
    odd = [each for n, name in enumerate(('even', 'odd')) for split in ('train', 'validation')
           for each in write_odd_images(root / split / name, FEW // 2, seed=n, kinds=_every_second(n))]
    return root, {str(each.path): each for each in odd if not each.path.is_dir()}


def _every_second(first):
    kinds = {**SOUND, **BROKEN}
    return {kind: kinds[kind] for kind in list(kinds)[first::2]}


def near(found, wanted, off):
    found = np.asarray(found)
    return found.shape == wanted.shape and np.abs(found.astype(int) - wanted).mean() <= off


def check_pixels(odd):
    """Each as a classifier and as a detector reads it. Returns how many of each kind were read, and were not."""
    read, refused = Counter(), Counter()
    for each in odd:
        if each.pixels is None:
            with pytest.raises(UnreadableImage) as told:
                read_image(each.path, 'RGB')
            assert str(told.value) and '\n' not in str(told.value)
            refused[each.kind] += 1
            continue
        assert near(read_image(each.path, 'RGB'), each.pixels, each.off), each.kind
        assert near(open_image(each.path, upright=True).convert('RGB'), each.upright, each.off), each.kind
        read[each.kind] += 1
    assert read.keys() == SOUND.keys() and refused.keys() == BROKEN.keys()
    return sum(read.values()), sum(refused.values())


def test_sound_images_have_the_right_pixels_and_broken_ones_a_reason(tmp_path):
    assert sum(check_pixels(write_odd_images(tmp_path, FEW))) == FEW


def test_grey_stays_grey_in_the_mode_that_is_asked_for(tmp_path):
    image = Image.fromarray(np.array([[0, 257 * 7, 257 * 255]], np.uint16))
    image.save(tmp_path / 'words.png')
    assert np.asarray(read_image(tmp_path / 'words.png', 'L')).tolist() == [[0, 7, 255]]


def test_postscript_is_never_handed_to_ghostscript(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, 'Ghostscript', lambda *_, **__: pytest.fail('it was'))
    path = tmp_path / 'photo.jpg'
    Image.new('RGB', (8, 8)).save(path, format='EPS')
    with pytest.raises(UnreadableImage, match='it is no image'):
        read_image(path, 'RGB')


# ---- classification

@pytest.mark.parametrize('training', [False, True])
def test_no_image_comes_with_the_label_of_another(few, training):
    """In evaluation a broken image stands for nothing; in training the next readable one comes, with its own label."""
    root, known = few
    args = load_config({'data_dir': str(root), 'val_split': 'train'})
    dataset = open_dataset(args, training)
    files = [dataset.filename(n, absolute=True) for n in range(len(dataset))]
    labels = {file: int('/odd/' in file) for file in files}  # classes are numbered by name: even, odd
    items = list(dataset)
    assert len(items) == len(files) and {Path(file).parent.name for file in files} == {'even', 'odd'}
    for number, (image, target) in enumerate(items):
        after = files[number:] + files[:number]
        file = next(file for file in after if known[file].pixels is not None)
        assert near(image, known[file].pixels, known[file].off), file
        assert target == (labels[file] if training or file == files[number] else LEFT_OUT)
    assert dataset.corrupt_files() == [file for file in files if known[file].pixels is None]


def test_a_data_set_ends(few):
    dataset = open_dataset(load_config({'data_dir': str(few[0])}), True)
    for beyond in (len(dataset), -1):
        with pytest.raises(IndexError):
            dataset[beyond]


def test_training_evaluation_and_prediction_name_what_they_leave_out(few, tmp_path, capsys):
    root, known = few
    broken = {split: sorted(file for file, each in known.items() if each.pixels is None and f'/{split}/' in file)
              for split in ('train', 'validation')}
    result = train.train({**OPTIONS, 'data_dir': str(root)}, output=tmp_path / 'run')
    assert sorted(result['corrupt']) == sorted(broken['train'] + broken['validation'])
    told = capsys.readouterr().err
    assert all(f"skipped corrupt image '{file}'" in told for file in result['corrupt'])

    assert evaluate_cli.main(['--checkpoint', result['checkpoint'], '--json', str(tmp_path / 'out.json')]) == 0
    sound = [file for file, each in known.items() if each.pixels is not None and '/validation/' in file]
    found, told = json.loads((tmp_path / 'out.json').read_text()), capsys.readouterr()
    assert f'on {len(sound)} images' in ' '.join(told.out.split()) and sorted(found['corrupt']) == broken['validation']
    assert f'{len(broken["validation"])} corrupt images skipped so far' in told.err

    assert predict.main([str(tmp_path / 'run'), *sound, *broken['validation'], '--json']) == 2
    told = capsys.readouterr()
    assert told.err.count('error: ') == told.err.count('\n') == len(broken['validation'])
    assert sum('classes' in each for each in json.loads(told.out)) == len(sound)


@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_nothing_but_broken_images_is_one_sentence(tmp_path, capsys, workers):
    for split in ('train', 'validation'):
        for name in ('a', 'b'):
            write_odd_images(tmp_path / 'data' / split / name, 6, kinds={'truncated': BROKEN['truncated']})
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(json.dumps({**OPTIONS, 'data_dir': str(tmp_path / 'data'), 'workers': workers}))
    with pytest.raises(SystemExit) as stop:
        train.main(['--config', str(recipe), f'output={tmp_path}', 'experiment=run'])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and last.startswith('error: All 12 images are unreadable, the first is ')
    model = train.build_model(load_config({**OPTIONS, 'num_classes': 2}))
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'w.pth')
    with pytest.raises(SystemExit) as stop:
        evaluate_cli.main(['--checkpoint', str(tmp_path / 'w.pth'), '--config', str(recipe)])
    told = capsys.readouterr().err
    assert stop.value.code == 2 and 'error: All 12 images are unreadable' in told and 'Traceback' not in told


def test_a_thin_image_is_cut_to_its_middle_where_the_model_would_have_looked(tmp_path):
    """3 x 9,000 pixels: of the whole at 48 x 144,000, and of its middle 300 at 48 x 4,800, the same 32 pixels."""
    from timm.data import create_transform
    found = picture(np.random.default_rng(0), height=3, width=9000)
    Image.fromarray(found).save(tmp_path / 'thin.png')
    look = create_transform((3, 32, 32), crop_pct=32 / 48, interpolation='bilinear')
    cut = read_image(tmp_path / 'thin.png', 'RGB')
    assert cut.size == (300, 3)
    torch.testing.assert_close(look(cut), look(Image.fromarray(found)), atol=.02, rtol=0)


# ---- detection

@pytest.fixture
def scenes(few, tmp_path, repository):
    """The files of the few as a COCO data set of one category, and the arguments of a detector for it."""
    pytest.importorskip('detectron2', reason='detectron2 is not installed')
    known = {file: each for file, each in few[1].items() if '/train/' in file}
    images = [dict(id=n, file_name=file, width=each.upright.shape[1] if each.pixels is not None else 30,
                   height=each.upright.shape[0] if each.pixels is not None else 30)
              for n, (file, each) in enumerate(known.items())]
    objects = [dict(id=n, image_id=n, category_id=1, bbox=[0, 0, 1, 1], area=1, iscrowd=0) for n in range(len(images))]
    (tmp_path / 'all.json').write_text(json.dumps(
        {'images': images, 'annotations': objects, 'categories': [{'id': 1, 'name': 'thing'}]}))
    base = repository / 'configs' / 'coco' / 'Base-RetinaNet.yaml'
    (tmp_path / 'own.yaml').write_text(TINY_RETINANET.format(base=base))
    places = [str(tmp_path / 'all.json'), str(few[0])]
    return known, ['--config-file', str(tmp_path / 'own.yaml'), 'MODEL.RETINANET.NUM_CLASSES', '1',
                   'MOE.DATA.TRAIN_JSON', places[0], 'MOE.DATA.TRAIN_IMAGES', places[1], 'MOE.DATA.TEST_JSON',
                   places[0], 'MOE.DATA.TEST_IMAGES', places[1], 'INPUT.MIN_SIZE_TRAIN', '(32,)',
                   'INPUT.MIN_SIZE_TEST', '32', 'INPUT.MAX_SIZE_TEST', '4000', 'INPUT.MAX_SIZE_TRAIN', '4000',
                   'SOLVER.MAX_ITER', '2', 'SOLVER.IMS_PER_BATCH', '2', 'SOLVER.STEPS', '()', 'OUTPUT_DIR',
                   str(tmp_path / 'run')]


def test_a_mapper_reads_the_same_pixels_and_leaves_out_the_same_files(scenes, tmp_path, monkeypatch, caplog):
    from moe_zoo.detection import load_config as load_detector
    from moe_zoo.detection.coco import ReadableMapper, load_datasets, skipped_images
    monkeypatch.setattr(logging.getLogger('moe_zoo'), 'propagate', True)
    known, argv = scenes
    cfg = load_detector(argv[1], [*argv[2:], 'INPUT.FORMAT', 'RGB'])
    mapper = ReadableMapper(cfg, False, tmp_path / 'list.txt')
    monkeypatch.setattr(mapper, 'augmentations', lambda given: given)  # as they are
    with caplog.at_level(logging.WARNING):
        for entry in load_datasets(cfg, cfg.DATASETS.TEST, False):
            each, found = known[entry['file_name']], mapper(entry)
            assert bool(found) == (each.pixels is not None), each.kind
            assert not found or near(found['image'].permute(1, 2, 0), each.upright, each.off), each.kind
    broken = sorted(file for file, each in known.items() if each.pixels is None)
    assert skipped_images(tmp_path / 'list.txt') == broken
    assert all(f"image '{file}' cannot be read" in caplog.text for file in broken)


@pytest.mark.slow
def test_a_detector_trains_evaluates_and_predicts_past_broken_images(scenes, tmp_path, capsys):
    from moe_zoo.detection import predict as predict_coco
    from moe_zoo.detection import train as train_coco
    known, argv = scenes
    broken = sorted(file for file, each in known.items() if each.pixels is None)
    train_coco.main(argv)
    assert f'Unreadable images skipped: {len(broken)} ' in capsys.readouterr().out
    folder = tmp_path / 'some'
    folder.mkdir()
    for number, file in enumerate(known):
        (folder / f'{number}.png').symlink_to(file)
    code = predict_coco.main([*argv[:2], '--weights', str(tmp_path / 'run' / 'model_final.pth'),
                              '--images', str(folder), '--output', str(tmp_path / 'drawn'), '--threshold', '0',
                              *argv[2:]])
    told = capsys.readouterr()
    assert code == 2 and told.err.count('error: ') == len(broken) and 'Traceback' not in told.err
    assert len(json.loads((tmp_path / 'drawn' / 'predictions.json').read_text())['images']) == len(known) - len(broken)


def test_a_detector_without_one_readable_image_is_told(scenes, tmp_path, capsys):
    """In evaluation as in training: metrics of nothing are none."""
    from moe_zoo.detection import train as train_coco
    known, argv = scenes
    content = json.loads((tmp_path / 'all.json').read_text())
    content['images'] = [each for each in content['images'] if known[each['file_name']].pixels is None]
    (tmp_path / 'all.json').write_text(json.dumps(content))
    for more in ([], ['--eval-only']):
        with pytest.raises(SystemExit) as stop:
            train_coco.main([*argv, *more])
        told = capsys.readouterr()
        assert stop.value.code == 2 and told.err.count('error: No image of the ') == 1, told.err
        assert 'Traceback' not in told.err + told.out


# ---- a thousand

MEASURED = """
import resource, sys, warnings
warnings.simplefilter('ignore')
from moe_zoo.engine.config import load_config
from moe_zoo.engine.data import create_loaders, open_dataset
import torch
args = load_config({'data_dir': sys.argv[1], 'val_split': 'train', 'workers': 0, 'batch_size': 16, 'device': 'cpu'})
args.distributed, args.rank, args.world_size = False, 0, 1
dataset = open_dataset(args, False)
config = dict(input_size=(3, 224, 224), mean=(0, 0, 0), std=(1, 1, 1), interpolation='bicubic', crop_pct=.875,
              crop_mode='center')
with open('/proc/self/statm') as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 2 ** 30,) * 2)  # another GB of addresses, and no more
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loader = create_loaders(args, config, None, dataset, torch.device('cpu')).eval
read = sum(int((target >= 0).sum()) for _, target in loader)
print(read, len(dataset.corrupt_files()), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_a_thousand_take_little_memory(tmp_path):
    """Bombs of 2.7 GB, texts of 64 MB and rows that would be resized to a million pixels and more are among them."""
    odd = write_odd_images(tmp_path / 'train' / 'a', MANY)
    sound, broken = check_pixels(odd)
    assert sound + broken == MANY
    directories = sum(each.path.is_dir() for each in odd)  # which timm's reader does not take for images
    done = subprocess.run([sys.executable, '-c', MEASURED, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    read, corrupt, megabytes = map(int, done.stdout.split())
    assert (read, corrupt) == (sound, broken - directories) and megabytes < 400


@pytest.mark.slow
def test_a_thousand_through_workers(tmp_path):
    """Each of two workers marks what it could not read; nothing is lost between them."""
    odd = write_odd_images(tmp_path / 'train' / 'a', MANY, seed=1)
    dataset = open_dataset(load_config({'data_dir': str(tmp_path), 'val_split': 'train'}), False)
    dataset.transform = lambda image: torch.tensor(image.size)
    targets = torch.cat([target for _, target in DataLoader(dataset, batch_size=50, num_workers=2)])
    broken = [str(each.path) for each in odd if each.pixels is None and not each.path.is_dir()]
    assert sorted(dataset.corrupt_files()) == sorted(broken)
    assert targets.tolist().count(LEFT_OUT) == len(broken) and len(targets) == len(dataset)
