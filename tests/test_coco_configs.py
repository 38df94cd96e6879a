"""The configs of configs/coco: plain, documented by what they train, and every one trained and evaluated, made small.

COCO itself is not here: scenes of digits stand in, with the boxes as masks where masks are learnt.
"""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from detectors import write_scenes_with_masks

pytest.importorskip('detectron2', reason='detectron2 is not installed: tools/setup.sh --detection')

from detectron2.config import LazyConfig, instantiate  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402

from moe_zoo.detection import load_config  # noqa: E402
from moe_zoo.detection.train import main  # noqa: E402
from moe_zoo.resources import folder  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')  # of detectron2's older code

COCO = folder('configs') / 'coco'
YAML = sorted(path.stem for path in COCO.glob('*.yaml') if not path.stem.startswith('Base'))
LAZY = sorted(path.stem for path in COCO.glob('*.py'))

SMALL = [
    'MODEL.DEVICE', 'cpu', 'MODEL.WEIGHTS', '', 'MODEL.BACKBONE.FREEZE_AT', '0', 'SEED', '1',
    'MODEL.RESNETS.NORM', 'BN', 'MODEL.RESNETS.DEPTH', '18', 'MODEL.RESNETS.STEM_OUT_CHANNELS', '8',
    'MODEL.RESNETS.RES2_OUT_CHANNELS', '8', 'MODEL.FPN.OUT_CHANNELS', '8',
    'MODEL.RETINANET.NUM_CLASSES', '5', 'MODEL.RETINANET.NUM_CONVS', '1',
    'MODEL.ROI_HEADS.NUM_CLASSES', '5', 'MODEL.ROI_BOX_HEAD.FC_DIM', '16', 'MODEL.ROI_MASK_HEAD.CONV_DIM', '8',
    'MODEL.ROI_MASK_HEAD.NUM_CONV', '1', 'MODEL.RPN.PRE_NMS_TOPK_TEST', '50', 'MODEL.RPN.POST_NMS_TOPK_TEST', '20',
    'MOE.TIMM.PRETRAINED', 'False', 'MOE.TIMM.NORM', '',
    'INPUT.MIN_SIZE_TRAIN', '(64,)', 'INPUT.MIN_SIZE_TEST', '64', 'DATALOADER.NUM_WORKERS', '0',
    'SOLVER.IMS_PER_BATCH', '2', 'SOLVER.MAX_ITER', '2', 'SOLVER.WARMUP_ITERS', '0', 'SOLVER.STEPS', '()',
    'SOLVER.BASE_LR', '0.0001',
]
# What makes a model of timm's small, by the name that the config gives it.
CONDCONV = {'layers': [1, 1, 1, 1], 'channels': [8, 16, 32, 64], 'num_experts': 2}
SMALL_TIMM = {
    'condconv_resnet50': CONDCONV,
    'vmoe_vit_s': {'depth': 3, 'embed_dim': 16, 'num_heads': 2, 'moe_layers': [1], 'num_experts': 2},
    'vmoe_vit_b': {'depth': 3, 'embed_dim': 16, 'num_heads': 2, 'moe_layers': [1], 'num_experts': 2},
    'moefied': {'base': 'convnext_atto', 'num_experts': 2},
}


def path_of(name: str) -> str:
    return f'configs/coco/{name}.yaml'


def small(name: str) -> list[str]:
    """Overrides that make a config's detector one of a few seconds."""
    if 'moe_heads' in name:  # detectron2's own ResNet-18 has one width
        return [*SMALL, 'MODEL.RESNETS.STEM_OUT_CHANNELS', '64', 'MODEL.RESNETS.RES2_OUT_CHANNELS', '64']
    return [*SMALL, *(small_timm(name) if 'TIMM' in read(name).get('MOE', {}) else ())]


def small_timm(name: str) -> list[str]:
    options = load_config(path_of(name)).MOE.TIMM
    return [word for key, value in SMALL_TIMM[options.NAME].items() for word in (f'MOE.TIMM.ARGS.{key}', str(value))]


def read(name: str) -> dict:
    """What a config and those it builds on say, as plain yaml."""
    own = yaml.safe_load((COCO / f'{name}.yaml').read_text())
    base = own.pop('_BASE_', None)
    return {**read(base.removesuffix('.yaml')), **own} if base else own


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return write_scenes_with_masks(tmp_path_factory.mktemp('data') / 'digit_scenes')


def test_every_variant_is_there():
    retinanets = ['condconv', 'dyconv', 'moe_res5', 'deepmoe', 'moe_heads_box', 'moe_heads_cls', 'moe_heads_both']
    assert set(YAML) == {
        *(f'retinanet_{variant}_r50_fpn_1x' for variant in retinanets),
        'retinanet_condconv_r50_fpn_3x', 'retinanet_moe_res5_r50_fpn_3x',
        'retinanet_vmoe_s_fpn_1x', 'retinanet_vmoe_b_fpn_1x', 'retinanet_moefied_convnext_t_fpn_1x',
        'faster_rcnn_condconv_r50_fpn_1x', 'faster_rcnn_moe_res5_r50_fpn_1x', 'mask_rcnn_condconv_r50_fpn_1x',
    }
    assert LAZY == ['fcos_condconv_r50_fpn_1x', 'retinanet_condconv_r50_fpn_1x', 'retinanet_vmoe_s_fpn_1x']


@pytest.mark.parametrize('name', YAML)
def test_a_config_states_its_command_its_schedule_and_its_figures(name):
    text = (COCO / f'{name}.yaml').read_text()
    assert isinstance(yaml.safe_load(text), dict)
    assert f'tools/train_coco.py --config-file {path_of(name)}' in text
    cfg = load_config(path_of(name))
    assert cfg.OUTPUT_DIR == f'runs/{name}'
    iterations = {'1x': 90000, '3x': 270000}[name.rpartition('_')[2]]
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH) == (iterations, 16)
    arithmetic = r'([\d,]+)\siterations (?:# )?of 16 images = ([\d.]+) M images, ([\d.]+)\sepochs'
    stated = re.search(arithmetic, flat(text))
    if stated is None:  # or the words are those of the config that it builds on
        assert re.search('Schedule(,| and) ', flat(text))
        stated = re.search(arithmetic, flat((COCO / yaml.safe_load(text)['_BASE_']).read_text()))
    assert int(stated[1].replace(',', '')) == iterations
    assert float(stated[2]) == pytest.approx(iterations * 16 / 1e6)
    assert float(stated[3]) == pytest.approx(iterations * 16 / 118287, abs=0.05)  # images of COCO 2017 train
    assert 'Ours: ' in flat(text)


def flat(text: str) -> str:
    """Comment lines as one line."""
    return re.sub(r'\n#? ?', ' ', text)


@pytest.mark.slow
@pytest.mark.parametrize('name', YAML)
def test_a_config_trains_and_evaluates(name, scenes, tmp_path):
    results = main(['--config-file', path_of(name), *small(name), 'MOE.DATA.ROOT', str(scenes),
                    'OUTPUT_DIR', str(tmp_path / 'run')])
    assert 'AP' in results['bbox']
    assert ('segm' in results) == name.startswith('mask_rcnn')
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.json').read_text().splitlines()]
    losses = {key for line in lines for key in line if key.startswith('loss_moe_')}
    nodes = [node for node in read(name).get('MOE', {}).values() if isinstance(node, dict)]
    assert {f'loss_moe_{loss}' for node in nodes for loss, _ in node.get('LOSSES', ())} <= losses
    assert all(torch.isfinite(torch.tensor(line['total_loss'])) for line in lines if 'total_loss' in line)


def lazy(name: str):
    cfg = LazyConfig.load(str(COCO / f'{name}.py'))
    backbone = cfg.model.backbone.get('bottom_up') or cfg.model.backbone.net
    backbone.model_args = SMALL_TIMM[backbone.name]
    backbone.pretrained = False
    if backbone.name == 'condconv_resnet50':
        cfg.model.backbone.top_block.in_channels = 4 * CONDCONV['channels'][-1]
    return cfg


@pytest.mark.parametrize('name', [name for name in LAZY if name in YAML])
def test_both_kinds_of_config_build_the_same_model(name):
    cfg = load_config(path_of(name), ['MODEL.DEVICE', 'cpu', 'MOE.TIMM.PRETRAINED', 'False', *small_timm(name)])
    ours = build_model(cfg).eval()
    theirs = instantiate(lazy(name).model).eval()
    assert type(ours) is type(theirs)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()]
    theirs.load_state_dict(ours.state_dict())
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad}
    image = [{'image': torch.randint(0, 255, (3, 64, 96), dtype=torch.uint8), 'height': 64, 'width': 96}]
    with torch.no_grad():
        a, b = ours(image)[0]['instances'], theirs(image)[0]['instances']
    assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor) and torch.equal(a.scores, b.scores)


SMALL_LAZY = {  # what else is small than in every LazyConfig; FCOS takes P6 from P5, RetinaNet from res5
    'fcos_condconv_r50_fpn_1x': {'model.backbone.top_block.in_channels': 32},
    'retinanet_condconv_r50_fpn_1x': {'model.backbone.top_block.in_channels': 4 * CONDCONV['channels'][-1]},
    'retinanet_vmoe_s_fpn_1x': {'model.backbone.net.pretrained': False,
                                'model.backbone.net.model_args': SMALL_TIMM['vmoe_vit_s']},
}


def run_lazy(name: str, scenes: Path, run: Path, device: str, iterations: int) -> subprocess.CompletedProcess:
    """A lazy config, small, under detectron2's own script."""
    script = Path(sys.prefix) / 'share' / 'detectron2' / 'tools' / 'lazyconfig_train_net.py'
    if not script.is_file():
        pytest.skip(f'{script} is missing: tools/setup.sh installs the scripts of detectron2 there')
    backbone = {
        'model.backbone.bottom_up.pretrained': False, 'model.backbone.bottom_up.norm': '',
        'model.backbone.bottom_up.freeze_at': 0, 'model.backbone.bottom_up.model_args': CONDCONV}
    overrides = {
        **(backbone if 'condconv' in name else {}), **SMALL_LAZY[name],
        'model.num_classes': 5, 'model.backbone.out_channels': 32, 'model.head.conv_dims': [32],
        'model.head.input_shape': [{'channels': 32}] * 5,
        'dataloader.train.dataset.names': 'digit_scenes_train', 'dataloader.test.dataset.names': 'digit_scenes_val',
        'dataloader.train.total_batch_size': 2, 'dataloader.train.num_workers': 0, 'dataloader.test.num_workers': 0,
        'train.max_iter': iterations, 'train.device': device, 'train.output_dir': run,
    }
    return subprocess.run(
        [sys.executable, '-m', 'moe_zoo', 'run', str(script), '--config-file', str(COCO / f'{name}.py'),
         *(f'{key}={str(value).replace(chr(39), "")}' for key, value in overrides.items())],
        capture_output=True, text=True, env={**os.environ, 'DETECTRON2_DATASETS': str(scenes.parent)})


@pytest.mark.slow
@pytest.mark.parametrize('name', LAZY)
def test_a_lazy_config_trains_and_evaluates_under_the_unmodified_script(name, scenes, tmp_path):
    done = run_lazy(name, scenes, tmp_path / 'run', 'cpu', 2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / 'run' / 'model_final.pth').exists()
    assert 'copypaste: Task: bbox' in done.stdout + done.stderr


@pytest.mark.parametrize('name', LAZY)
def test_a_lazy_config_states_its_command_and_its_schedule(name):
    text, cfg = flat((COCO / f'{name}.py').read_text()), LazyConfig.load(str(COCO / f'{name}.py'))
    assert f'--config-file configs/coco/{name}.py' in text and 'Ours: ' in text
    assert (cfg.train.max_iter, cfg.dataloader.train.total_batch_size) == (90000, 16)
    assert 'Schedule 1x: 90,000 iterations of 16 images = 1.44 M images, 12.2 epochs' in text  # of 118,287
