"""COCO metrics of detectors, masks, exported models, and detections drawn into images."""
import contextlib
import io
import json
import logging
import math
import re
import shutil

import numpy as np
import pytest
import torch
from detectors import TINY_RETINANET
from PIL import Image

pytest.importorskip('detectron2', reason='detectron2 is not installed')
pytest.importorskip('faster_coco_eval', reason='faster-coco-eval is not installed')

from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from detectron2.evaluation import coco_evaluation  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, ResNet  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from faster_coco_eval import COCOeval_faster  # noqa: E402
from pycocotools import mask as mask_util  # noqa: E402
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402
from torch import nn  # noqa: E402

from moe_zoo.analysis import count  # noqa: E402
from moe_zoo.analysis.benchmark_cli import main as benchmark  # noqa: E402
from moe_zoo.analysis.timing import peak_memory  # noqa: E402
from moe_zoo.cli import main as moe_zoo  # noqa: E402
from moe_zoo.data.scenes import write_scenes  # noqa: E402
from moe_zoo.detection import load_config, register_coco  # noqa: E402
from moe_zoo.detection.benchmark import _set_width, widen  # noqa: E402
from moe_zoo.detection.count_inputs import load_weights, noise  # noqa: E402
from moe_zoo.detection.evaluation import Evaluator  # noqa: E402
from moe_zoo.detection.export import _compare, _detect, _same, load_exported  # noqa: E402
from moe_zoo.detection.train import main  # noqa: E402
from moe_zoo.errors import InputError  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')  # of detectron2's older code

RETINANET = TINY_RETINANET + """
INPUT: {{MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}}
SOLVER: {{IMS_PER_BATCH: 2, MAX_ITER: 2, STEPS: []}}
"""
MASK_RCNN = """
VERSION: 2
MODEL:
  META_ARCHITECTURE: GeneralizedRCNN
  DEVICE: cpu
  WEIGHTS: ""
  MASK_ON: true
  BACKBONE: {NAME: build_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS: {DEPTH: 18, NORM: BN, RES2_OUT_CHANNELS: 64, OUT_FEATURES: [res2, res3, res4, res5]}
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 8}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6], PRE_NMS_TOPK_TEST: 50, POST_NMS_TOPK_TEST: 20}
  ROI_HEADS: {NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5], NUM_CLASSES: 5, SCORE_THRESH_TEST: 0.0}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 1, FC_DIM: 16, POOLER_RESOLUTION: 3}
  ROI_MASK_HEAD: {NAME: MaskRCNNConvUpsampleHead, NUM_CONV: 1, CONV_DIM: 8, POOLER_RESOLUTION: 4}
INPUT: {MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64}
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 2, STEPS: []}
SEED: 1
"""


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('data') / 'scenes', train=4, val=4, image_size=160, classes=range(5))


@pytest.fixture
def config(tmp_path, repository):
    file = tmp_path / 'tiny.yaml'
    file.write_text(RETINANET.format(base=repository / 'configs' / 'coco' / 'Base-RetinaNet.yaml'))
    return file


def trained_like(config, folder, *opts):
    """Random weights that find objects everywhere, with scores that differ, as a checkpoint: (file, model)."""
    torch.manual_seed(3)
    cfg = load_config(config, opts)
    model = build_model(cfg).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if 'router' in name or 'routing_fn' in name:
            nn.init.normal_(weight)
    logits = []
    hook = model.head.cls_score.register_forward_hook(lambda m, x, y: logits.append(y.flatten()))
    model(noise(cfg))
    hook.remove()
    spread = (torch.cat(logits) - model.head.cls_score.bias[0]).std()
    model.head.cls_score.weight.mul_(1.5 / spread)  # scores of 0.01 to 0.9, no two alike
    nn.init.constant_(model.head.cls_score.bias, -2.)
    classes = ['null', 'eins', 'zwei', 'drei', 'vier']
    torch.save({'model': model.state_dict(), 'trainer': {'classes': classes}}, folder / 'trained.pth')
    return folder / 'trained.pth', model


# --- metrics

def perturbed(truth, seed=0):
    """Detections made of true objects: moved, missed, doubled, of another class, with tied scores; masks alike."""
    rng = np.random.default_rng(seed)
    categories, found = truth.getCatIds(), []
    for image in truth.dataset['images'][:60]:
        for entry in truth.imgToAnns[image['id']]:
            for _ in range(rng.integers(0, 4)):
                x, y, w, h = entry['bbox']
                dx, dy = rng.normal(scale=0.1, size=2) * (w, h)
                grow = np.exp(rng.normal(scale=0.1))
                mask = np.roll(truth.annToMask(entry), (round(dy), round(dx)), axis=(0, 1))
                found.append({
                    'image_id': image['id'], 'score': round(float(rng.uniform()), 1),
                    'category_id': entry['category_id'] if rng.uniform() < 0.8 else int(rng.choice(categories)),
                    'bbox': [x + dx, y + dy, w * grow, h * grow],
                    'segmentation': mask_util.encode(np.asfortranarray(mask)),
                })
    return found


def stats(evaluator, truth, found, task):
    with contextlib.redirect_stdout(io.StringIO()):
        if task == 'segm':  # as detectron2 does: the area of a detection is that of its mask
            found = [{key: value for key, value in entry.items() if key != 'bbox'} for entry in found]
        measured = evaluator(truth, truth.loadRes(found), task)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return measured.stats[:12]


def test_all_twelve_metrics_are_pycocotools_on_real_objects(shared_data):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(shared_data / 'coco-mini' / 'annotations' / 'instances_val.json'))
    found = perturbed(truth)
    for task in ('bbox', 'segm'):
        theirs, ours = (stats(evaluator, truth, found, task) for evaluator in (COCOeval, COCOeval_faster))
        assert len(theirs) == 12 and 0.05 < theirs[0] < 0.9  # neither all right nor all wrong
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_detectron2_measures_by_the_fast_code_once_we_are_imported():
    assert coco_evaluation.COCOeval_opt is COCOeval_faster


@pytest.fixture
def two_categories(tmp_path):
    """Six objects in one image: of category a small 2, medium 1, large 1; of category b small 2."""
    boxes = [(1, [0, 0, 10, 10]), (1, [20, 0, 10, 10]), (1, [0, 50, 50, 50]), (1, [100, 100, 120, 120]),
             (2, [40, 0, 10, 10]), (2, [60, 0, 10, 10])]
    content = {
        'images': [{'id': 1, 'file_name': '1.png', 'height': 256, 'width': 256}],
        'categories': [{'id': 1, 'name': 'a'}, {'id': 2, 'name': 'b'}],
        'annotations': [{'id': i, 'image_id': 1, 'category_id': category, 'bbox': box, 'area': box[2] * box[3],
                         'iscrowd': 0} for i, (category, box) in enumerate(boxes, 1)]}
    (tmp_path / 'two.json').write_text(json.dumps(content))
    register_coco('two categories', str(tmp_path / 'two.json'), str(tmp_path))
    DatasetCatalog.get('two categories')
    yield boxes
    DatasetCatalog.remove('two categories')
    MetadataCatalog.remove('two categories')


def test_ap_by_category_and_size(two_categories, caplog, monkeypatch):
    """All of a but one small object are found, none of b."""
    import logging
    monkeypatch.setattr(logging.getLogger('moe_zoo'), 'propagate', True)
    found = torch.tensor([box for category, box in two_categories[1:4]], dtype=torch.float)
    instances = Instances((256, 256), pred_boxes=Boxes(torch.cat([found[:, :2], found[:, :2] + found[:, 2:]], dim=1)),
                          scores=torch.ones(3), pred_classes=torch.zeros(3, dtype=torch.long))
    evaluator = Evaluator('two categories', tasks=('bbox',))
    evaluator.reset()
    evaluator.process([{'image_id': 1}], [{'instances': instances}])
    with caplog.at_level(logging.INFO):
        metrics = evaluator.evaluate()['bbox']
    # Precision is 1 up to a recall of 3 / 4: 76 of 101 points of the curve; of small ones up to 1 / 2: 51 of 101.
    assert metrics['AP-a'] == pytest.approx(100 * 76 / 101) and metrics['APs-a'] == pytest.approx(100 * 51 / 101)
    assert metrics['APm-a'] == metrics['APl-a'] == pytest.approx(100)
    assert metrics['AP-b'] == metrics['APs-b'] == 0
    assert math.isnan(metrics['APm-b']) and math.isnan(metrics['APl-b'])
    assert metrics['AP'] == pytest.approx(50 * 76 / 101) and metrics['APm'] == pytest.approx(100)
    # Recall: a 3 of 4, b 0 of 2; with one detection an image a 1 of 4; small ones a 1 of 2, b 0 of 2.
    assert [metrics[key] for key in ('AR1', 'AR10', 'AR100', 'ARs', 'ARm', 'ARl')] == pytest.approx(
        [12.5, 37.5, 37.5, 25, 100, 100])
    table = caplog.text[caplog.text.index('bbox AP in % by category'):]
    assert re.search(r'\| a +\| +75.2 \(4\) \| +50.5 \(2\) \| +100.0 \(1\) \| +100.0 \(1\) \|', table)
    assert re.search(r'\| b +\| +0.0 \(2\) \| +0.0 \(2\) \| +- \| +- \|', table)


def test_masks_are_measured(scenes, tmp_path):
    """Mask R-CNN, two iterations and an evaluation; the objects' masks are their boxes without a corner."""
    for split in ('train', 'val'):
        file = scenes / 'annotations' / f'instances_{split}.json'
        content = json.loads(file.read_text())
        for entry in content['annotations']:
            x, y, w, h = entry['bbox']
            entry['segmentation'] = [[x, y, x + w, y, x + w, y + h / 2, x + w / 2, y + h, x, y + h]]
        (tmp_path / f'{split}.json').write_text(json.dumps(content))
    (tmp_path / 'mask.yaml').write_text(MASK_RCNN)
    argv = ['--config-file', str(tmp_path / 'mask.yaml'), 'OUTPUT_DIR', str(tmp_path / 'run')]
    for key, split in (('TRAIN', 'train'), ('TEST', 'val')):
        argv += [f'MOE.DATA.{key}_JSON', str(tmp_path / f'{split}.json'), f'MOE.DATA.{key}_IMAGES', str(scenes / split)]
    results = main(argv)
    assert set(results) == {'bbox', 'segm'}
    assert math.isfinite(results['segm']['AP']) and {'APs-3', 'AR100'} <= set(results['segm'])
    written = json.loads((tmp_path / 'run' / 'results.json').read_text())['metrics']
    assert written['segm']['AP'] == results['segm']['AP']
    found = json.loads((tmp_path / 'run' / 'inference' / 'coco_instances_results.json').read_text())
    assert {tuple(entry['segmentation']['size']) for entry in found} == {(160, 160)}
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / 'val.json'))
        assert 100 * stats(COCOeval, truth, found, 'segm')[0] == pytest.approx(results['segm']['AP'], abs=1e-9)


# --- export

@pytest.mark.parametrize('backbone', [
    'moe_resnet18', *(pytest.param(f'{name}18', marks=pytest.mark.slow)
                      for name in ('resnet', 'condconv_resnet', 'dyconv_resnet', 'deepmoe_resnet'))])
def test_an_exported_detector_gives_the_same_detections(backbone, config, tmp_path, capsys):
    config.write_text(config.read_text().replace('moe_resnet18', backbone))
    weights, model = trained_like(config, tmp_path)
    main(['--config-file', str(config), 'OUTPUT_DIR', str(tmp_path / 'run'), '--export', str(tmp_path / 'model.ts'),
          'MODEL.WEIGHTS', str(weights)])
    assert re.search(r"'.*model.ts' is TorchScript for torch and torchvision: it takes one image of any size, "
                     r"\(3, height, width\) float32 in 0..255, BGR, and returns boxes, classes, scores; equal to the "
                     r"detector's on [1-9]\d+ detections", capsys.readouterr().out)
    assert not (tmp_path / 'run').exists()
    exported, about = load_exported(str(tmp_path / 'model.ts'))
    assert about['classes'] == ['null', 'eins', 'zwei', 'drei', 'vier'] and about['outputs'][0] == 'boxes'
    for size in ((64, 96), (80, 48)):
        image = noise(load_config(config), size, seed=7)[0]['image']
        with torch.no_grad():
            wanted, found = _detect(model, [{'image': image}]), exported(image)
        assert len(wanted[0]) > 4
        for ours, theirs, small in zip(found, wanted, (2e-3, 0, 1e-4)):  # boxes in pixels, classes, scores
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=small)


def test_a_model_that_gives_other_detections_is_not_exported(config, tmp_path):
    _, model = trained_like(config, tmp_path)
    cfg = load_config(config)
    other = torch.jit.trace(
        lambda image: _detect(model, [{'image': image + 9}]), noise(cfg)[0]['image'], check_trace=False)
    with pytest.raises(InputError, match='it gives other detections'):
        _compare(model, other, noise(cfg, seed=1))


def test_detections_of_equal_scores_may_come_in_another_order():
    boxes, classes, scores = torch.tensor([[0., 0., 9., 9.], [5., 5., 8., 8.], [1., 2., 3., 4.]]), torch.tensor(
        [0, 1, 0]), torch.tensor([.5, .5, .25])
    masks = torch.eye(3).bool().view(3, 1, 3)
    wanted = boxes, classes, scores, masks
    assert _same(wanted, wanted) and _same(tuple(each[:0] for each in wanted), tuple(each[:0] for each in wanted))
    swapped = [1, 0, 2]
    assert _same(tuple(each[swapped] for each in wanted), wanted)
    assert not _same(tuple(each[[0, 2, 1]] for each in wanted), wanted)  # of other scores
    assert not _same((boxes[swapped], classes, scores, masks), wanted)  # a box with the class of another
    assert not _same((boxes[swapped], classes[swapped], scores, masks), wanted)  # with its mask
    assert not _same((boxes[[0, 0, 2]], classes[[0, 0, 2]], scores, masks[[0, 0, 2]]), wanted)  # one twice, one never
    assert not _same((boxes + 1e-2, classes, scores, masks), wanted) and _same(
        (boxes + 1e-5, classes, scores, masks), wanted)
    assert not _same(tuple(each[:2] for each in wanted), wanted)


def test_an_export_without_weights_is_refused(config, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(['--config-file', str(config), '--export', str(tmp_path / 'model.ts')])
    assert 'MODEL.WEIGHTS is empty' in capsys.readouterr().err and not (tmp_path / 'model.ts').exists()


# --- prediction

def test_prediction_on_a_folder(config, scenes, tmp_path, capsys):
    weights, model = trained_like(config, tmp_path)
    images = tmp_path / 'images'
    (images / 'below').mkdir(parents=True)
    shutil.copy(scenes / 'val' / '000001.png', images / 'one.png')
    Image.open(scenes / 'val' / '000002.png').save(images / 'below' / 'two.jpg')
    argv = ['predict-coco', '--config-file', str(config), '--weights', str(weights), '--images', str(images),
            '--output', str(tmp_path / 'out'), '--threshold', '0.2']
    assert moe_zoo(argv) == 0
    assert re.search(r'\d+ objects of a score of 0.2 or more in 2 images: drawings', capsys.readouterr().out)
    found = json.loads((tmp_path / 'out' / 'predictions.json').read_text())
    assert [row['image'] for row in found['images']] == [str(images / 'below' / 'two.jpg'), str(images / 'one.png')]
    assert found['classes'][1] == 'eins' and found['weights'] == str(weights)
    row = found['images'][1]
    assert (row['width'], row['height']) == (160, 160) and row['objects']
    assert all(entry['score'] >= 0.2 and entry['class'] in found['classes'] for entry in row['objects'])
    assert all(0 <= x <= x + w <= 160.01 for x, _, w, _ in (entry['box'] for entry in row['objects']))
    before, after = (np.asarray(Image.open(folder / 'one.png').convert('RGB')) for folder in (images, tmp_path / 'out'))
    assert before.shape == after.shape and (before != after).any()
    assert Image.open(tmp_path / 'out' / 'below' / 'two.jpg').format == 'JPEG'
    (images / 'broken.png').write_bytes(b'no image')
    assert moe_zoo(argv) == 2
    assert f"error: The image '{images / 'broken.png'}' cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize('change, message', [
    (['--images', '/nowhere'], "--images '/nowhere': there is no image"),
    (['--output', 'IMAGES'], 'is the folder of the images, which the drawings would replace'),
    (['--threshold', '7'], '--threshold 7.0: scores lie between 0 and 1'),
    (['--weights', '/nowhere.pth'], "Checkpoint '/nowhere.pth' does not exist"),
    (['MODEL.RETINANET.NUM_CLASSES', '4'], 'for another number of classes'),
])
def test_what_cannot_be_predicted_is_one_sentence(change, message, config, scenes, tmp_path, capsys):
    weights, _ = trained_like(config, tmp_path)
    change = [str(scenes / 'val') if word == 'IMAGES' else word for word in change]
    argv = ['predict-coco', '--config-file', str(config), '--weights', str(weights), '--images', str(scenes / 'val'),
            '--output', str(tmp_path / 'out'), *change]
    with pytest.raises(SystemExit) as stop:
        moe_zoo(argv)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_classes_are_numbers_where_nothing_names_them(config, tmp_path):
    weights, model = trained_like(config, tmp_path)
    torch.save({'model': model.state_dict()}, weights)
    assert load_weights(load_config(config, ['MODEL.WEIGHTS', str(weights)]))[1]['classes'] == list('01234')


# --- timing

def test_memory_of_a_call_is_its_peak():
    def run():
        one, two = torch.ones(1_000_000), torch.ones(1_000_000)  # 4 MB each
        del one
        three = torch.ones(500_000)
        return two, three

    assert peak_memory(run, 'cpu') == 8_000_000


def test_metrics_of_two_libraries_are_timed_where_they_are_equal(tmp_path, capsys):
    level = logging.getLogger('moe_zoo').level
    assert benchmark(['coco-eval', '--images', '6', '--rounds', '3', '--json', str(tmp_path / 'times.json')]) == 0
    row, = json.loads((tmp_path / 'times.json').read_text())['rows']
    assert row['difference'] < 1e-9 and len(row['seconds']) == len(row['twin_seconds']) == 3
    assert row['verdict'] in ('reached', 'missed', 'not resolved') and row['at_most'] == 0.25
    assert logging.getLogger('moe_zoo').level == level  # later runs in this process tell what they have to
    with pytest.raises(SystemExit):
        benchmark(['coco-eval', '--images', '0'])
    assert '--images 0: at least one image is needed' in capsys.readouterr().err


def test_detectors_are_timed_beside_their_macs_and_memory(config, tmp_path, capsys):
    dense = tmp_path / 'dense.yaml'
    dense.write_text(config.read_text().replace('moe_resnet18', 'resnet18'))
    benchmark(['detector', str(dense), str(config), '--img-size', '128x160', '--rounds', '3', '--json',
               str(tmp_path / 'times.json'), '--opts', 'MODEL.FPN.OUT_CHANNELS', '16'])
    first, second, *steps = json.loads((tmp_path / 'times.json').read_text())['rows']
    assert [row['mode'] for row in (first, second, *steps)] == ['forward'] * 2 + ['train'] * 2
    assert [row['memory'] - 4 * row['parameters'] > 0 for row in steps] == [True, True]  # gradients and more
    assert first['macs_ratio'] == 1
    assert second['macs_ratio'] == pytest.approx(second['macs'] / first['macs'], rel=1e-3)
    assert first['input_size'] == [3, 128, 160] and first['memory'] > 128 * 160 * 3 * 4  # the normalised image
    assert second['parameters'] != first['parameters'] and len(second['seconds']) == 3
    assert re.search(r'dense +forward +128x160 +[0-9,]+ +\d\.\d+ ', capsys.readouterr().out)


NARROW = ['--img-size', '64x64', '--rounds', '3', '--mode', 'forward', '--opts', 'MODEL.RESNETS.STEM_OUT_CHANNELS', '8',
          'MODEL.RESNETS.RES2_OUT_CHANNELS', '8', 'MODEL.FPN.OUT_CHANNELS', '8']


def test_a_detector_is_timed_beside_its_dense_twin_of_equal_macs(tmp_path):
    times = tmp_path / 'times.json'
    assert benchmark(['detector', 'configs/demo/retinanet_digits.yaml', '--equal-macs', '--json', str(times), *NARROW]
                     ) == 0
    twin, routed = json.loads(times.read_text())['rows']
    assert twin['config'] == 'configs/demo/retinanet_digits.yaml, dense and wider'
    assert routed['macs_ratio'] == pytest.approx(1, abs=0.02)  # the gate, and the twin's last channel
    assert (twin['at_most'], routed['at_most']) == (None, 1.1) and routed['verdict']


@pytest.mark.parametrize('block, inside', [(BasicBlock, {}), (BottleneckBlock, {'bottleneck_channels': 8})])
def test_a_widened_stage_has_the_macs_asked_for(block, inside):
    stage = nn.Sequential(*ResNet.make_stage(
        block, 2, stride_per_block=[2, 1], in_channels=16, out_channels=32, norm='BN', **inside))
    x = torch.rand(1, 16, 16, 16)
    before, shape = count(stage, x).macs_max, stage(x).shape
    widen(stage, 2)
    width = stage[0].conv1.out_channels
    assert stage[0].conv1.norm.num_features == stage[1].conv1.out_channels == width
    assert stage(x).shape == shape
    after = count(stage, x).macs_max
    assert 2 * before <= after < 2.2 * before
    _set_width(stage, width - 1)
    assert count(stage, x).macs_max < 2 * before  # it is no wider than it must be


@pytest.mark.parametrize('config, more, sentence', [
    (['configs/demo/retinanet_digits.yaml'] * 2, [], '--equal-macs compares one config with its dense twin, and there '
     'are 2.'),
    (['configs/demo/retinanet_digits.yaml'], ['MOE.RESNET.LAYER', 'condconv'], "--equal-macs widens stages of "
     "detectron2's ResNet that stand for experts, and 'configs/demo/retinanet_digits.yaml' has none"),
])
def test_what_has_no_twin_of_equal_macs_is_refused(config, more, sentence, capsys):
    with pytest.raises(SystemExit):
        benchmark(['detector', *config, '--equal-macs', *NARROW, *more])
    assert sentence in capsys.readouterr().err
