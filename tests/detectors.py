"""A detector of a few seconds, scenes, and what tools/train_coco.py prints for bad input, for tests of detection."""
import json
from pathlib import Path

import pytest

from moe_zoo.data.scenes import write_scenes

# A ResNet-18 of 8 channels with a routed last stage, for scenes of five digits; `base` is that of configs/coco.
TINY_RETINANET = """
_BASE_: {base}
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  BACKBONE: {{NAME: build_timm_fpn_backbone, FREEZE_AT: 0}}
  FPN: {{OUT_CHANNELS: 8}}
  RETINANET: {{NUM_CLASSES: 5, NUM_CONVS: 1}}
MOE:
  TIMM: {{NAME: moe_resnet18, ARGS: {{channels: [8, 8, 8, 8]}}, CHECK_INPUT: false}}
DATALOADER: {{NUM_WORKERS: 0}}
SEED: 1
"""


def refusal(capsys, argv):
    """What the command line prints for bad input: one line, exit code 2."""
    from moe_zoo.detection.train import main  # not where tests are collected without detectron2
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert 'Traceback' not in err + out
    sentence, = [line for line in err.splitlines() if line.startswith('error: ')]
    return sentence


def write_scenes_with_masks(root: Path) -> Path:
    """Eight scenes of five digits to train on and four to evaluate, with the boxes as masks. Returns `root`."""
    write_scenes(root, train=8, val=4, image_size=160, classes=range(5))
    for file in (root / 'annotations').glob('*.json'):
        content = json.loads(file.read_text())
        for annotation in content['annotations']:
            x, y, w, h = annotation['bbox']
            annotation['segmentation'] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        file.write_text(json.dumps(content))
    return root
