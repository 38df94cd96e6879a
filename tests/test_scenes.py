"""Digits and digit scenes: fixed split, same bytes from the same arguments, boxes that match the pixels."""
import json

import numpy as np
import pytest

from moe_zoo.data import DigitsDataset, load_digits_split, scenes, size_class, write_scenes
from moe_zoo.engine.config import load_config
from moe_zoo.engine.data import open_dataset
from moe_zoo.errors import InputError

pytest.importorskip('sklearn')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('scenes') / 'a', train=40, val=20, seed=3)


def annotations(folder, split):
    return json.loads((folder / 'annotations' / f'instances_{split}.json').read_text())


def all_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def test_digit_split_is_stratified_disjoint_and_fixed():
    x_train, y_train, x_test, y_test = load_digits_split()
    assert x_train.shape == (1442, 8, 8) and x_train.dtype == np.uint8 and x_train.max() == 255
    # scikit-learn has 178, 182, 177, 183, 181, 182, 181, 179, 174, 180 of each; a fifth, rounded down:
    assert np.bincount(y_test).tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert np.bincount(np.concatenate([y_train, y_test])).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert not {x.tobytes() for x in x_train} & {x.tobytes() for x in x_test}
    again, other = load_digits_split(), load_digits_split(seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(again, (x_train, y_train, x_test, y_test)))
    assert not np.array_equal(other[2], x_test)


def test_digits_dataset_gives_images_for_timm():
    dataset = DigitsDataset('test', transform=lambda image: np.asarray(image), target_transform=lambda y: y + 100)
    x_test, y_test = load_digits_split()[2:]
    image, target = dataset[7]
    assert len(dataset) == 355 and image.shape == (8, 8, 3) and target == y_test[7] + 100
    assert np.array_equal(image[..., 0], x_test[7]) and np.array_equal(image[..., 2], x_test[7])
    assert open_dataset(load_config({'dataset': 'digits', 'in_chans': 1}), True)[0][0].mode == 'L'  # one channel
    with pytest.raises(InputError, match="split must be 'train' or 'test' for the digits, not 'dev'"):
        DigitsDataset('dev')


def test_size_class_uses_coco_limits():
    # 32^2 = 1024 and 96^2 = 9216; COCO counts a limit itself on both sides, we count it as medium.
    assert [size_class(a) for a in (1023, 1024, 9216, 9217)] == ['small', 'medium', 'medium', 'large']


def test_scenes_are_the_same_bytes_from_the_same_seed(folder, tmp_path):
    again = write_scenes(tmp_path / 'again', train=40, val=20, seed=3)
    assert all_bytes(again) == all_bytes(folder)
    other = write_scenes(tmp_path / 'other', train=4, val=4, seed=4)
    assert all_bytes(other)['train/000001.png'] != all_bytes(folder)['train/000001.png']
    # A longer set begins with the shorter one.
    shorter = write_scenes(tmp_path / 'shorter', train=8, val=4, seed=3)
    assert all_bytes(shorter)['train/000008.png'] == all_bytes(folder)['train/000008.png']


@pytest.mark.parametrize('split', ['train', 'val'])
def test_every_size_class_is_present_and_clear_of_the_limits(folder, split):
    areas = np.array([a['area'] for a in annotations(folder, split)['annotations']])
    counts = {name: sum(size_class(area) == name for area in areas) for name in scenes.SIZES}
    assert min(counts.values()) >= 5, counts
    sides = np.sqrt(areas)
    assert not ((sides > 31) & (sides < 34)).any() and not ((sides > 92) & (sides < 97)).any()


def test_boxes_match_pixels(monkeypatch):
    """On flat ground of one colour, the pixels that differ from it are exactly the boxes' ink."""
    monkeypatch.setattr(scenes, '_ground', lambda rng, size: np.full((size, size, 3), 100.))
    x_train, y_train, _, _ = load_digits_split()
    for i in range(24):
        rng = np.random.default_rng(i)
        pixels, objects = scenes.draw_scene(rng, x_train, y_train, 192, scenes.KINDS[i % 4])
        ink = (pixels != 100).any(axis=-1)
        assert objects
        for (x, y, w, h), _ in objects:
            inside = ink[y:y + h, x:x + w]
            # Tight: the outermost rows and columns hold ink, and the frame around the box holds none.
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()
            frame = ink[y - 1:y + h + 1, x - 1:x + w + 1].sum() - inside.sum()
            assert frame == 0
            ink[y:y + h, x:x + w] = False
        assert not ink.any()  # no ink without a box


def test_boxes_do_not_overlap_and_lie_inside(folder):
    content = annotations(folder, 'train')
    for image in content['images']:
        covered = np.zeros((192, 192), dtype=int)
        for a in content['annotations']:
            if a['image_id'] == image['id']:
                x, y, w, h = a['bbox']
                assert a['area'] == w * h and 0 < x and 0 < y and x + w < 192 and y + h < 192
                covered[y:y + h, x:x + w] += 1
        assert covered.max() == 1  # every scene has an object, and no pixel belongs to two


def test_train_and_val_scenes_use_disjoint_digits(monkeypatch, tmp_path):
    used = {}

    def note(rng, digits, targets, size, kind):
        used.setdefault(len(targets), set()).update(digit.tobytes() for digit in digits)
        return np.zeros((size, size, 3), np.uint8), []
    monkeypatch.setattr(scenes, 'draw_scene', note)
    write_scenes(tmp_path / 'a', train=4, val=4, classes=(3, 7))
    # Threes and sevens: 183 - 36 + 179 - 35 = 291 for training, 36 + 35 = 71 for validation.
    assert sorted(used) == [71, 291] and not used[71] & used[291]


def test_pycocotools_reads_the_annotations(folder):
    coco_module = pytest.importorskip('pycocotools.coco')
    coco = coco_module.COCO(str(folder / 'annotations' / 'instances_val.json'))
    assert len(coco.getImgIds()) == 20 and coco.getCatIds() == list(range(1, 11))
    assert {c['id']: c['name'] for c in coco.loadCats(coco.getCatIds())}[8] == '7'


def test_classes_limit_the_categories(tmp_path):
    content = annotations(write_scenes(tmp_path / 'a', train=8, val=4, classes=(8, 2)), 'train')
    assert [c['name'] for c in content['categories']] == ['2', '8']
    assert {a['category_id'] for a in content['annotations']} == {3, 9}


def test_existing_scenes_are_left_alone_and_other_content_is_refused(tmp_path):
    folder = write_scenes(tmp_path / 'a', train=4, val=4)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    write_scenes(folder, train=4, val=4)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob('*')} == before
    with pytest.raises(InputError, match="a' holds digit scenes made with train=4, seed=0; give another folder"):
        write_scenes(folder, train=5, val=4, seed=1)
    (folder / 'val' / '000002.png').unlink()
    with pytest.raises(InputError, match="val' lacks 1 of its 4 images"):
        write_scenes(folder, train=4, val=4)
    (tmp_path / 'thesis').mkdir()
    (tmp_path / 'thesis' / 'chapter1.txt').write_text('x')
    with pytest.raises(InputError, match="thesis' holds something other than digit scenes"):
        write_scenes(tmp_path / 'thesis')
    assert (tmp_path / 'thesis' / 'chapter1.txt').read_text() == 'x'


def test_a_failure_leaves_nothing_behind(monkeypatch, tmp_path):
    def fail(*args):
        raise RuntimeError('planted')
    monkeypatch.setattr(scenes, 'draw_scene', fail)
    with pytest.raises(RuntimeError, match='planted'):
        write_scenes(tmp_path / 'a', train=4, val=4)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_one_sentence(tmp_path):
    (tmp_path / 'file').write_text('x')
    with pytest.raises(InputError, match="Cannot write digit scenes to '.*file/a': "):
        write_scenes(tmp_path / 'file' / 'a', train=4, val=4)


@pytest.mark.parametrize('keywords, message', [
    ({'train': 3}, 'train must be a number of images of at least 4, one a kind of scene, not 3'),
    ({'image_size': 128}, 'image_size must be at least 160 pixels to hold objects above 96 x 96, not 128'),
    ({'classes': (1, 11)}, r'classes must be different digits from 0 to 9, not \[1, 11\]'),
    ({'classes': ()}, r'classes must be different digits from 0 to 9, not \[\]'),
])
def test_bad_arguments_are_named(tmp_path, keywords, message):
    with pytest.raises(InputError, match=message):
        write_scenes(tmp_path / 'a', **keywords)
    assert not (tmp_path / 'a').exists()


def test_progress_is_told(tmp_path, capsys):
    write_scenes(tmp_path / 'a', train=4, val=4, progress=True)
    assert 'scenes: 8 of 8, about 0 s left' in capsys.readouterr().err


def test_the_command_writes_and_refuses(tmp_path, capsys):
    arguments = [str(tmp_path / 'a'), '--train', '4', '--val', '4', '--classes', '1', '7']
    scenes.main(arguments)
    assert capsys.readouterr().out.strip() == str(tmp_path / 'a')
    assert all_bytes(tmp_path / 'a') == all_bytes(write_scenes(tmp_path / 'b', train=4, val=4, classes=(1, 7)))
    with pytest.raises(SystemExit) as stopped:
        scenes.main([*arguments[:-1], '12'])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == 'error: classes must be different digits from 0 to 9, not [1, 12].\n'
