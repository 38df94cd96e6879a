"""Figures from outcomes by image, checked by hand; class maps, numbered folders, ReaL labels."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_folders import write_images
from PIL import Image
from timm.data import RealLabelsImagenet

from moe_zoo.engine.config import load_config
from moe_zoo.engine.data import class_names, open_dataset
from moe_zoo.engine.inference import open_evaluation
from moe_zoo.engine.labels import imagenet_classes, read_class_map, read_real_labels, real_labels_of, synsets
from moe_zoo.engine.metrics import accuracy_by_class, calibration, real_accuracy
from moe_zoo.engine.outcomes import OutcomeLog, Outcomes, read_outcomes
from moe_zoo.errors import InputError


def outcomes(targets, likeliest, confidence=None, images=None):
    count = len(targets)
    confidence = np.full(count, 0.5) if confidence is None else np.array(confidence)
    images = images or [f'{i}.png' for i in range(count)]
    return Outcomes(images, np.array(targets), np.array(likeliest), confidence, np.zeros(count))


def test_accuracy_by_class():
    """Class 0: right, second, wrong of three. Class 2: right. Class 1 has no image, but one that was taken for it."""
    found = accuracy_by_class(outcomes([0, 0, 0, 2], [[0, 1], [2, 0], [1, 2], [2, 0]]), ['a', 'b', 'c'])
    assert found == [
        {'class': 0, 'name': 'a', 'images': 3, 'top1': pytest.approx(100 / 3), 'top5': pytest.approx(200 / 3),
         'predicted': 1},
        {'class': 2, 'name': 'c', 'images': 1, 'top1': 100, 'top5': 100, 'predicted': 2}]


def test_calibration_error_by_hand():
    """Four bins. (0.25, 0.5]: 0.5 and 0.4, one right: |1 - 0.9| = 0.1. (0.5, 0.75]: 0.6, wrong: 0.6. (0.75, 1]: 0.9
    and 1, both right: |2 - 1.9| = 0.1. The sum over five images: 0.8 / 5 = 16 points."""
    found = calibration(outcomes([0] * 5, [[0], [1], [1], [0], [0]], [0.5, 0.4, 0.6, 0.9, 1.0]), bins=4)
    assert found['error'] == pytest.approx(16) and found['bins'] == 4
    assert [row['images'] for row in found['table']] == [0, 2, 1, 2]  # 0.5 lies in the bin that it ends
    assert found['table'][0]['confidence'] is None
    assert found['table'][1] == {
        'low': 0.25, 'high': 0.5, 'images': 2, 'confidence': pytest.approx(45), 'accuracy': pytest.approx(50)}
    with pytest.raises(InputError, match='--bins 0: give the number of bins of confidence, at least 1'):
        calibration(outcomes([0], [[0]]), bins=0)


def test_a_calibrated_model_has_no_error():
    """Of 1000 images with confidence 0.7 the first 700 are right."""
    found = calibration(outcomes([0] * 1000, [[0]] * 700 + [[1]] * 300, [0.7] * 1000))
    assert found['error'] == pytest.approx(0, abs=1e-9) and found['bins'] == 15


def test_outcomes_of_batches(tmp_path):
    """Two batches of two classes, of which one image is left out; written, read, and the same."""
    logits = torch.tensor([[2., 0.], [0., 1.], [5., 5.1], [1., 0.]])
    log = OutcomeLog()
    log.add(logits[:3], torch.tensor([0, 0, -1]), torch.tensor([True, True, False]))
    log.add(logits[3:], torch.tensor([0]), torch.tensor([True]))
    found = log.finish(SimpleNamespace(), {'model': 'm'})
    assert found.images == ['image 0', 'image 1', 'image 3'] and found.right.tolist() == [True, False, True]
    assert found.among_five.all() and found.likeliest.tolist() == [[0, 1], [1, 0], [0, 1]]
    # softmax of (2, 0): 1 / (1 + e^-2) = 0.8808; cross-entropy of the second: ln(1 + e) = 1.3133
    assert found.confidence[0] == pytest.approx(0.8808, abs=1e-4) and found.losses[1] == pytest.approx(1.3133, abs=1e-4)
    found.write(tmp_path / 'out.json')
    again = read_outcomes(tmp_path / 'out.json')
    assert again.images == found.images and again.about == {'model': 'm'}
    for name in ('targets', 'likeliest', 'confidence', 'losses'):
        np.testing.assert_allclose(getattr(again, name), getattr(found, name), atol=1e-7)
    content = json.loads((tmp_path / 'out.json').read_text())
    (tmp_path / 'short.json').write_text(json.dumps({**content, 'targets': [0]}))
    with pytest.raises(InputError, match="short.json' is damaged: its lists of outcomes by image are empty or differ"):
        read_outcomes(tmp_path / 'short.json')
    with pytest.raises(InputError, match='no image that can be read'):
        OutcomeLog().finish(SimpleNamespace(), {})


# ---- ReaL

def test_real_labels_are_timms(tmp_path):
    """Three images, in another order than the labels: one has two, one none. The same as timm's evaluation."""
    labels = [[3, 7], [], [5]]
    (tmp_path / 'real.json').write_text(json.dumps(labels))
    names = [f'val/n01/ILSVRC2012_val_0000000{i}.JPEG' for i in (3, 1, 2)]
    logits = torch.randn(3, 1000)
    logits[1, 7] = 50.  # the first image's second label; image 3 is wrong, and its label is among five:
    logits[0, [1, 2, 5]] = torch.tensor([50., 40., 30.])
    likeliest = logits.topk(5).indices.numpy()
    found = real_accuracy(
        outcomes([0, 0, 0], likeliest, images=names), real_labels_of(names, read_real_labels(tmp_path / 'real.json')))
    assert found == {'images': 2, 'top1': 50, 'top5': 100}
    theirs = RealLabelsImagenet(names, str(tmp_path / 'real.json'))
    theirs.add_result(logits)
    assert (theirs.get_accuracy(1), theirs.get_accuracy(5)) == (found['top1'], found['top5'])


def test_real_labels_that_do_not_fit(tmp_path):
    path = tmp_path / 'real.json'
    with pytest.raises(InputError, match="There is no file '.*real.json' of ReaL labels"):
        read_real_labels(path)
    for text in ('[1, 2]', '{"a": [1]}', '[[1000]]', '[]'):
        path.write_text(text)
        with pytest.raises(InputError, match=r'must be a list with a list of classes \(0 to 999\) for every image'):
            read_real_labels(path)
    for name in ('a/tench.JPEG', 'ILSVRC2012_val_00000003.JPEG', 'ILSVRC2012_val_00000000.JPEG'):
        with pytest.raises(InputError, match=f"the image '{name}' has no entry among the 2 labels"):
            real_labels_of([name], [[1], [2]])
    with pytest.raises(InputError, match='none of the images has a label'):
        real_accuracy(outcomes([0], [[0]]), [[]])


# ---- class maps

@pytest.mark.parametrize('name, text', [
    ('keras.json', '{"0": ["n01", "tench"], "2": ["n03", "shark"], "1": ["n02", "goldfish"]}'),
    ('plain.json', '{"0": "n01", "1": "n02", "2": "n03"}'), ('names.json', '{"n03": 2, "n01": 0, "n02": 1}'),
    ('list.json', '["n01", "n02", "n03"]'), ('timm.txt', 'n01\nn02\nn03\n'),
])
def test_class_maps(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_class_map(tmp_path / name) == read_class_map(name, root=tmp_path) == {'n01': 0, 'n02': 1, 'n03': 2}


@pytest.mark.parametrize('name, text, sentence', [
    ('a.json', '{"x": "n01"}', r"The class map '.*a.json' cannot be read: it is neither \{\"0\": "),
    ('a.json', '{"0": ["a"], "1": ["a"]}', 'it is neither'), ('a.json', '{', 'cannot be read: '),
    ('a.json', '{"a": 0, "b": 0}', 'must give every name an index of its own, from 0'),
    ('a.json', '{"a": -1}', 'an index of its own, from 0'), ('a.csv', 'a', 'Unsupported class map file extension'),
])
def test_broken_class_maps(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=sentence):
        read_class_map(tmp_path / name)
    with pytest.raises(InputError, match="There is no class map 'gone.txt': give a .txt with a class a line"):
        read_class_map('gone.txt', tmp_path)


def test_a_class_map_for_a_folder(tmp_path):
    data = write_images(tmp_path, {'validation': 1})
    (tmp_path / 'index.json').write_text('{"0": ["grey", "g"], "1": ["bright", "b"], "2": ["dark", "d"]}')
    args = load_config({'data_dir': str(data), 'class_map': str(tmp_path / 'index.json')})
    dataset = open_dataset(args, False)
    assert [dataset[i][1] for i in range(2)] == [1, 2]
    (tmp_path / 'index.json').write_text('["other"]')
    with pytest.raises(InputError, match=r"no images in folders that the class map '.*index.json' names"):
        open_dataset(args, False)


# ---- ImageNet's classes

def test_folders_of_imagenet():
    """n01440764 is class 0, n15075141 the last one; numbers are what they say; what is neither has no place."""
    assert imagenet_classes(['n15075141', 'n01440764'])['n15075141'] == 999 and len(synsets()) == 1000
    numbered = imagenet_classes(['0', '07', '999'])
    assert (numbered['07'], numbered['999'], numbered['8'], len(numbered)) == (7, 999, 8, 1000) and '7' not in numbered
    assert imagenet_classes(['0', '1000']) == imagenet_classes(['7', '07']) == imagenet_classes(['0', 'cat']) == {}


@pytest.mark.parametrize('known', [{}, None])
def test_numbered_folders_for_a_model_of_a_thousand_classes(tmp_path, known):
    """As ImageNet V2 is laid out, here with three folders; also where the model was trained on folders of synsets."""
    for name in ('10', '2', '999'):
        (tmp_path / 'v2' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'v2' / name / 'a.jpeg')
    args = load_config({'data_dir': str(tmp_path / 'v2'), 'num_classes': 1000})
    dataset = open_evaluation(args, synsets() if known is None else known, False)
    assert [dataset[i][1] for i in range(3)] == [2, 10, 999] and len(class_names(dataset)) == 1000
    args.num_classes = 3
    assert [open_evaluation(args, {}, False)[i][1] for i in range(3)] == [0, 1, 2]  # a model of three classes
