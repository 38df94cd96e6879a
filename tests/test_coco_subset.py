"""Some images of COCO-style annotations, and the config that learns twenty of them by heart."""
import json

import pytest

from moe_zoo.data import write_subset
from moe_zoo.errors import InputError


@pytest.fixture
def annotations(tmp_path):
    path = tmp_path / 'all.json'
    path.write_text(json.dumps({
        'info': 'kept', 'categories': [{'id': 3}], 'images': [{'id': 10}, {'id': 11}, {'id': 12}],
        'annotations': [{'id': 1, 'image_id': 12}, {'id': 2, 'image_id': 11}, {'id': 3, 'image_id': 10}]}))
    return path


def test_images_keep_their_objects_and_all_categories(annotations, tmp_path):
    found = json.loads(write_subset(annotations, (2, 0), tmp_path / 'some.json').read_text())
    assert found == {
        'info': 'kept', 'categories': [{'id': 3}], 'images': [{'id': 12}, {'id': 10}],
        'annotations': [{'id': 1, 'image_id': 12}, {'id': 3, 'image_id': 10}]}


def test_what_is_not_there_is_one_sentence(annotations, tmp_path):
    with pytest.raises(InputError, match='has 3 images, and a position beyond is asked for'):
        write_subset(annotations, range(4), tmp_path / 'some.json')
    annotations.write_text('[]')
    with pytest.raises(InputError, match='cannot be read as COCO JSON'):
        write_subset(annotations, [0], tmp_path / 'some.json')
    assert not (tmp_path / 'some.json').exists()


def test_the_config_of_twenty_images_is_that_of_cells_without_augmentation():
    pytest.importorskip('detectron2', reason='detectron2 is not installed: tools/setup.sh --detection')
    from moe_zoo.detection import load_config
    cells, twenty = (load_config(f'configs/demo/retinanet_moe_{name}.yaml') for name in ('bccd', 'overfit'))
    assert cells.MOE.DATA.UPSIDE_DOWN and not twenty.MOE.DATA.UPSIDE_DOWN
    assert twenty.MOE.RESNET == cells.MOE.RESNET and twenty.MODEL.RESNETS == cells.MODEL.RESNETS
    assert twenty.MODEL.RETINANET.NUM_CLASSES == 80 and twenty.INPUT.RANDOM_FLIP == 'none'
    assert list(twenty.INPUT.MIN_SIZE_TRAIN) == [twenty.INPUT.MIN_SIZE_TEST]
