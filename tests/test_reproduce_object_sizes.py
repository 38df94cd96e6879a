"""The object-size experiment: its data, its sizes, and one short run from scenes to metrics."""
import json

import pytest
import torch

from moe_zoo.errors import InputError
from moe_zoo.reproduce import find_experiment, object_sizes, runner

pytest.importorskip('detectron2')


def write_set(root, split, areas):
    """Annotations without pictures: one object of each area an image."""
    (root / 'annotations').mkdir(parents=True, exist_ok=True)
    (root / split).mkdir()
    images = [{'id': i + 1, 'file_name': f'{i}.png', 'height': 300, 'width': 300} for i in range(len(areas))]
    objects = [{'id': i + 1, 'image_id': i + 1, 'category_id': 1, 'bbox': [0, 0, a ** .5, a ** .5], 'area': a,
                'iscrowd': 0} for i, a in enumerate(areas)]
    content = {'images': images, 'annotations': objects, 'categories': [{'id': 1, 'name': 'thing'}]}
    (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))


def test_data_with_a_test_set_are_taken_as_they_are(tmp_path):
    for split, areas in (('train', [100] * 6), ('val', [5000] * 4), ('test', [20000] * 3)):
        write_set(tmp_path / 'cells', split, areas)
    data = object_sizes.load(str(tmp_path / 'cells'), tmp_path / 'files')
    assert data.description == 'cells: 6 train, 4 validation, 3 test'
    assert data.validation.images == tmp_path / 'cells' / 'val' and data.options['MODEL.RETINANET.NUM_CLASSES'] == 1
    assert not (tmp_path / 'files').exists()


def test_a_fifth_of_the_training_images_is_for_validation_where_there_is_no_test_set(tmp_path):
    for split, areas in (('train', [100, 200, 300, 400, 500, 600, 700]), ('val', [5000] * 4)):
        write_set(tmp_path / 'things', split, areas)
    data = object_sizes.load(str(tmp_path / 'things'), tmp_path / 'files')
    found = [[a['area'] for a in part.content['annotations']] for part in data[:3]]
    assert found == [[200, 300, 400, 500, 700], [100, 600], [5000] * 4]
    assert data.validation.images == data.train.images == tmp_path / 'things' / 'train'
    assert data.validation.annotations.parent == tmp_path / 'files'  # nothing is written beside the user's own
    # An experiment is recognised by its annotations.
    other = data._replace(test=data.train)
    assert len({runner.fingerprint(object_sizes.OBJECT_SIZES, each) for each in (data, data, other)}) == 2


def test_the_smallest_and_largest_size_with_objects_enough_are_compared(tmp_path):
    def extremes(number, areas):
        write_set(tmp_path / str(number), 'val', areas)
        part = object_sizes.Part(tmp_path / str(number) / 'annotations' / 'instances_val.json', tmp_path)
        return object_sizes.extremes(object_sizes.Scenes(part, part, part, 'these data', {}))
    assert extremes(0, [100] * 10 + [5000] * 3 + [20000] * 12) == (0, 2)
    assert extremes(1, [100] * 9 + [5000] * 10 + [20000] * 12) == (1, 2)
    with pytest.raises(InputError, match='these data: the validation images have 10 small, 9 medium and 0 large'):
        extremes(2, [100] * 10 + [5000] * 9)


def test_losses_are_relative():
    assert object_sizes._lost({'APs': 40.}, {'APs': 30.}, 'APs') == 25
    assert object_sizes._lost({'APs': 40.}, {'APs': None}, 'APs') == 100
    assert object_sizes._lost({'APs': None}, {'APs': 30.}, 'APs') == 0


def test_what_is_no_data_is_named(tmp_path):
    with pytest.raises(InputError, match='is no COCO-style data'):
        object_sizes.load(str(tmp_path), tmp_path / 'files')
    assert find_experiment('object-sizes') is object_sizes.OBJECT_SIZES


@pytest.mark.slow
def test_a_short_run_from_scenes_to_metrics(tmp_path, monkeypatch):
    monkeypatch.setattr(object_sizes, 'SCENES', {'train': 8, 'val': 32, 'seed': 0, 'classes': range(5)})
    monkeypatch.setattr(object_sizes, 'VALIDATION', 16)
    monkeypatch.setattr(object_sizes, 'STEPS', 12)
    monkeypatch.setattr(object_sizes, 'SHUFFLES', 99)
    monkeypatch.setattr(object_sizes, 'LEAST', 2)
    data = object_sizes.load(None, tmp_path)
    assert data.description == 'digit scenes of 192 x 192 pixels: 8 train, 16 validation, 16 test'
    assert len({i['id'] for part in data[1:3] for i in part.content['images']}) == 32  # apart
    arms = object_sizes.OBJECT_SIZES.arms
    torch.manual_seed(0)
    found = dict(zip([arm.name for arm in arms], object_sizes.run([arm.options for arm in arms], 0, data)))
    json.dumps(found)
    assert 0 <= found['trained']['p_shuffled'] <= 1 and found['shuffled']['separation'] > 0
    assert sorted(found['small objects']) == ['lost_to_large', 'lost_to_small']
    for claim in object_sizes.OBJECT_SIZES.claims:
        assert claim.metric in found[claim.better] and claim.metric in found[claim.worse]
    results = {'runs': [{'arm': name, 'seed': 0, 'metrics': metrics} for name, metrics in found.items()], 'arms': [
        {'name': name, 'metrics': {key: {'mean': value} for key, value in metrics.items()}}
        for name, metrics in found.items()]}
    blocks = object_sizes.figures(results)
    assert len(blocks) == 3 and all('<svg' in block.image for block in blocks)
