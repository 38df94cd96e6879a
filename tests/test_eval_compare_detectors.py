"""`moe-zoo compare` of two detectors: AP of resampled images is COCO's, and runs are told apart by what they left."""
import contextlib
import io
import json

import numpy as np
import pytest

pytest.importorskip('detectron2')
from pycocotools.coco import COCO  # noqa: E402
from pycocotools.cocoeval import COCOeval  # noqa: E402

from moe_zoo.cli import main  # noqa: E402
from moe_zoo.detection.config import load_config  # noqa: E402
from moe_zoo.detection.difference import DETECTIONS, WeightedAp, ap_difference  # noqa: E402

IMAGES, SIZE = 12, 100


def scenes(images=IMAGES):
    """Annotations of two categories: one or two objects an image, none in the last, one of them a crowd."""
    random, annotations = np.random.default_rng(0), []
    for image in range(1, images):
        for number in range(1 + image % 2):
            x, y = random.integers(0, 60, 2).tolist()
            annotations.append({
                'id': len(annotations) + 1, 'image_id': image, 'category_id': 3 + (image + number) % 2,
                'bbox': [x, y, 30, 30], 'area': 900, 'iscrowd': int(image == 5 and number == 1)})
    return {'images': [{'id': i, 'file_name': f'{i}.png', 'width': SIZE, 'height': SIZE} for i in range(1, images + 1)],
            'annotations': annotations, 'categories': [{'id': 3, 'name': 'a'}, {'id': 4, 'name': 'b'}]}


def detections(truth, shift, seed=1):
    """Every object again, moved by up to `shift` pixels, and a false one in every image."""
    random, found = np.random.default_rng(seed), []
    for each in truth['annotations']:
        x, y, w, h = each['bbox']
        dx, dy = random.uniform(-shift, shift, 2).tolist()
        found.append({'image_id': each['image_id'], 'category_id': each['category_id'], 'bbox': [x + dx, y + dy, w, h],
                      'score': round(float(random.uniform(0.3, 1)), 3)})
    for image in truth['images']:
        found.append({'image_id': image['id'], 'category_id': 3, 'bbox': [0, 0, 20, 20],
                      'score': round(float(random.uniform(0, 0.8)), 3)})
    return found


def coco_of(content):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = content
        coco.createIndex()
    return coco


def cocos_ap(truth, found):
    with contextlib.redirect_stdout(io.StringIO()):
        outcome = COCOeval(coco_of(truth), coco_of(truth).loadRes([dict(each) for each in found]), 'bbox')
        outcome.evaluate()
        outcome.accumulate()
        outcome.summarize()
    return 100 * outcome.stats[0]


def repeated(truth, found, weights):
    """The data with image i as often as `weights[i]` says, each time under a number of its own."""
    images, annotations, again = [], [], []
    for image, count in zip(truth['images'], weights):
        for _ in range(count):
            number = len(images) + 1
            images.append({**image, 'id': number})
            for each in truth['annotations']:
                if each['image_id'] == image['id']:
                    annotations.append({**each, 'id': len(annotations) + 1, 'image_id': number})
            again += [{**each, 'image_id': number} for each in found if each['image_id'] == image['id']]
    return {**truth, 'images': images, 'annotations': annotations}, again


def test_ap_of_weighted_images_is_cocos_of_repeated_ones():
    truth = scenes()
    found = detections(truth, 6)
    ap = WeightedAp(coco_of(truth), found)
    assert ap(np.ones(IMAGES)) == pytest.approx(cocos_ap(truth, found), abs=1e-9)
    assert 20 < ap(np.ones(IMAGES)) < 80
    for weights in np.random.default_rng(4).multinomial(IMAGES, np.full(IMAGES, 1 / IMAGES), 5):
        assert ap(weights) == pytest.approx(cocos_ap(*repeated(truth, found, weights)), abs=1e-9)
    assert np.isnan(ap(np.eye(IMAGES)[-1]))  # an image without objects has no AP
    assert WeightedAp(coco_of(truth), [])(np.ones(IMAGES)) == 0


def test_a_detector_compared_with_itself_and_with_a_worse_one():
    truth = scenes()
    good, bad = (WeightedAp(coco_of(truth), detections(truth, shift)) for shift in (2, 14))
    same = ap_difference([good, bad], [good, bad], True, resamples=100)
    assert (same.mean, same.low, same.high, same.told) == (0, 0, 0, False)
    found = ap_difference([good], [bad], True, resamples=200)
    assert found.mean == pytest.approx(good(np.ones(IMAGES)) - bad(np.ones(IMAGES)))
    assert 0 < found.low < found.mean < found.high and found.told
    assert found == ap_difference([good], [bad], True, resamples=200)


def write_run(folder, data, shift):
    """What train-coco leaves, without checkpoints."""
    (folder / 'inference').mkdir(parents=True)
    cfg = load_config('configs/coco/retinanet_moe_res5_r50_fpn_1x.yaml', [
        'MOE.DATA.ROOT', str(data), 'SEED', '0', 'OUTPUT_DIR', str(folder), 'SOLVER.BASE_LR', str(0.01 + shift)])
    (folder / 'config.yaml').write_text(cfg.dump())
    (folder / 'metrics.json').write_text('{"iteration": 9, "total_loss": 1.0}\n')
    (folder / 'results.json').write_text('{"metrics": {"bbox": {"AP": 50.0}}, "unit": "percent"}\n')
    (folder / DETECTIONS).write_text(json.dumps(detections(scenes(), shift)))
    return str(folder)


def test_runs_of_detectors(tmp_path, capsys):
    data = tmp_path / 'data'
    (data / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        (data / split).mkdir()
        (data / 'annotations' / f'instances_{split}.json').write_text(json.dumps(scenes()))
    good, bad = write_run(tmp_path / 'good', data, 2), write_run(tmp_path / 'bad', data, 14)
    assert main(['compare', good, bad, '--resamples', '100', '--json', str(tmp_path / 'out.json')]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('good: AP of boxes ') and lines[1].startswith('bad: AP of boxes ')
    assert 'it leaves out 0' in lines[2] and '100 resamples of the 12 images' in lines[3]
    assert json.loads((tmp_path / 'out.json').read_text())['low'] > 0
    for words, sentence in (
            ([good, bad, 'val_split=test'], 'val_split: detectors are compared by the detections of their last'),
            ([good, str(tmp_path / 'out.json')], "out.json' is no detector's run: two detectors are compared by AP"),
            ([good, bad, '--resamples', '9'], '--resamples 9: give at least 100')):
        with pytest.raises(SystemExit):
            main(['compare', *words])
        assert sentence in capsys.readouterr().err
    (tmp_path / 'bad' / DETECTIONS).unlink()
    with pytest.raises(SystemExit):
        main(['compare', good, bad])
    assert f"bad' keeps no {DETECTIONS}: evaluate it by train-coco --eval-only" in capsys.readouterr().err
