"""The detector on blood cells: twins of one recipe, and runs that go on where they were killed."""
import copy
import json

import pytest
import torch
import yaml
from PIL import Image

from moe_zoo.data.scenes import write_scenes
from moe_zoo.errors import MissingPackage
from moe_zoo.reproduce import bccd, find_experiment, runner
from moe_zoo.resources import folder

pytestmark = pytest.mark.filterwarnings('ignore')  # of detectron2's older code
DEMO = folder('configs') / 'demo'
SMALL = {
    'MODEL': {'RESNETS': {'STEM_OUT_CHANNELS': 8, 'RES2_OUT_CHANNELS': 8}, 'FPN': {'OUT_CHANNELS': 8},
              'RETINANET': {'NUM_CLASSES': 5, 'NUM_CONVS': 1}},
    'INPUT': {'MIN_SIZE_TRAIN': [64], 'MIN_SIZE_TEST': 64},
    'SOLVER': {'IMS_PER_BATCH': 2, 'MAX_ITER': 4, 'WARMUP_ITERS': 1}}


def test_twins_differ_by_their_last_stage_alone():
    dense, moe = (copy.deepcopy(arm.options) for arm in bccd.BCCD.arms)
    assert dense['MOE'].pop('RESNET') == {'STAGES': []}
    assert moe['MOE'].pop('RESNET')['STAGES'] == ['res5']
    assert dense == moe


@pytest.mark.parametrize('name', ['dense', 'moe'])
def test_an_arm_is_the_config(name, tmp_path):
    pytest.importorskip('detectron2', reason='detectron2 is not installed: tools/setup.sh --detection')
    from moe_zoo.detection import load_config
    whole = tmp_path / 'whole.yaml'
    whole.write_text(yaml.safe_dump(bccd.merged(DEMO / f'retinanet_{name}_bccd.yaml')))
    assert load_config(whole) == load_config(f'configs/demo/retinanet_{name}_bccd.yaml')


def test_training_images_are_turned_over(tmp_path):
    pytest.importorskip('detectron2', reason='detectron2 is not installed: tools/setup.sh --detection')
    from moe_zoo.detection import load_config
    from moe_zoo.detection.coco import ReadableMapper
    Image.new('RGB', (30, 20), 'white').save(tmp_path / 'a.png')
    box = {'bbox': [0, 0, 10, 5], 'bbox_mode': 0, 'category_id': 0}  # x0, y0, x1, y1
    cfg = load_config('configs/demo/retinanet_dense_bccd.yaml', ['INPUT.MIN_SIZE_TRAIN', '(20,)', 'INPUT.MIN_SIZE_TEST',
                                                                 '20'])
    found = set()
    for is_train in (True, False):
        mapper = ReadableMapper(cfg, is_train)
        mapper.is_train = True  # boxes are given
        found.add(frozenset(tuple(mapper({'file_name': str(tmp_path / 'a.png'), 'annotations': [{**box}]})['instances']
                                  .gt_boxes.tensor[0].tolist()) for _ in range(40 if is_train else 4)))
    corners = {(x, y, x + 10, y + 5) for x in (0, 20) for y in (0, 15)}
    assert found == {frozenset(corners), frozenset({(0, 0, 10, 5)})}  # 4 * .75 ** 40 = 4e-5


def test_without_images_it_is_left_out(tmp_path):
    with pytest.raises(MissingPackage, match='bccd needs images of blood cells.* --data-dir DIR'):
        bccd.load(None, tmp_path)


def test_minutes_count_an_iteration_once(tmp_path):
    log = tmp_path / 'metrics.json'
    lines = [{'iteration': 19, 'time': 2.}, {'iteration': 39, 'time': 9.}, {'iteration': 39, 'time': 4.}, {'AP': 1.}]
    log.write_text('\n'.join(map(json.dumps, lines)))
    assert bccd._minutes(log, 40) == 40 * (2 + 4) / 2 / 60  # the later of two that are the same


@pytest.fixture(scope='module')
def cells(tmp_path_factory):
    """Scenes of digits in the place of cells."""
    pytest.importorskip('detectron2', reason='detectron2 is not installed: tools/setup.sh --detection')
    root = write_scenes(tmp_path_factory.mktemp('data') / 'scenes', train=8, val=4, image_size=160, classes=range(5))
    return bccd.load(str(root), tmp_path_factory.mktemp('files'))


@pytest.mark.slow
def test_a_killed_run_goes_on_and_leaves_its_weights(cells, tmp_path, monkeypatch):
    from moe_zoo.detection import load_config, train
    monkeypatch.setattr(bccd, 'CHECKPOINTS', 2)
    options = bccd._over(find_experiment('bccd').arms[1].options, SMALL)
    whole = bccd.run(options, 0, cells._replace(folder=tmp_path / 'whole'))
    assert whole['AP'] == whole['AP50'] == 0 and whole['minutes'] > 0  # it has learnt nothing yet
    model = train.Trainer.build_model(load_config(next((tmp_path / 'whole').glob('*.yaml'))))
    assert whole['parameters'] == sum(parameter.numel() for parameter in model.parameters())
    place, = (tmp_path / 'whole').glob('*/')
    assert [path.name for path in place.glob('*.pth')] == ['model_final.pth']
    weights = torch.load(place / 'model_final.pth', weights_only=True)['model']

    killed = tmp_path / 'killed'
    keep = bccd._keep_weights
    monkeypatch.setattr(bccd, '_keep_weights', lambda place: 0)
    bccd.run(options, 0, cells._replace(folder=killed))
    other, = killed.glob('*/')
    assert other.name == place.name  # it is found again
    (other / 'model_final.pth').unlink()
    (other / 'model_0000003.pth').unlink()
    (other / 'last_checkpoint').write_text('model_0000001.pth')
    monkeypatch.setattr(bccd, '_keep_weights', keep)
    again = bccd.run(options, 0, cells._replace(folder=killed))
    assert {**again, 'minutes': 0} == {**whole, 'minutes': 0}
    assert 'Starting training from iteration 2' in (other / 'log.txt').read_text()
    found = torch.load(other / 'model_final.pth', weights_only=True)['model']
    assert all(torch.equal(value, found[key]) for key, value in weights.items())


def test_other_recipes_and_seeds_have_folders_of_their_own(cells):
    code = runner.fingerprint(bccd.BCCD, cells)
    first, second = bccd.BCCD.arms
    assert len({runner.made_for(code, arm, seed) for arm in (first, second) for seed in (0, 1)}) == 4
