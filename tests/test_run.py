"""`moe-zoo run`: scripts of timm and detectron2, unmodified."""
import csv
import importlib.util
import os
import shlex
import subprocess
import sys
from multiprocessing import spawn
from pathlib import Path

import pytest
import timm.scheduler.scheduler_factory
import timm.task.classification
import torch

from moe_zoo import run
from moe_zoo.routing import context

# What timm's train.py does, and nothing else: import the task by name, build it, divide, differentiate, step, log.
MINIATURE = """
import argparse
import sys

import torch
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask
from timm.utils import NativeScaler, ParseKwargs

import helper

parser = argparse.ArgumentParser()
parser.add_argument('--model')
parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
parser.add_argument('--grad-accum-steps', type=int, default=2)


def main():
    args = parser.parse_args()
    torch.manual_seed(0)
    model = create_model(args.model, num_classes=3, img_size=16, **args.model_kwargs)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1)
    task = ClassificationTask(model=model, criterion=torch.nn.CrossEntropyLoss(), device=torch.device('cpu'),
                              dtype=None, verbose=False)
    task.setup_ema(decay=0.9)
    task.train()
    for step in range(args.grad_accum_steps):
        result = task(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))
        (result['loss'] / args.grad_accum_steps).backward()
    optimizer.step()
    task.update_ema(step=1)
    task.get_eval_model().eval()
    assert task.get_eval_model()(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    print(type(task).__name__, sorted(name for name in result if name.startswith('loss_')), sys.argv[0], helper.VALUE)


if __name__ == '__main__':
    main()
"""
# What detectron2's launch does: spawn, and pickle a function of the script by its name.
SPAWNING = """
import timm
import torch
from timm.task import ClassificationTask


def worker(rank, folder):
    model = timm.create_model('vmoe_vit_s', patch_size=8, img_size=16, embed_dim=16, depth=2, num_heads=2)
    open(f'{folder}/{rank}', 'w').write(ClassificationTask(model, verbose=False).__class__.__name__)


if __name__ == '__main__':
    import sys
    torch.multiprocessing.spawn(worker, (sys.argv[1],), nprocs=1)
"""
# A loop of one's own, twice around.
OWN_LOOP = """
import sys

import timm
import torch

router = {'router': 'sigmoid', 'router_args': {'bias_rate': 0.01}} if 'bias' in sys.argv else {}
model = timm.create_model('vmoe_vit_s', patch_size=8, img_size=16, embed_dim=16, depth=2, num_heads=2, **router)
if 'listens' in sys.argv:
    model.set_aux_loss()
for step in range(2):
    model(torch.randn(2, 3, 16, 16))
"""
# What timm's train.py does with epochs: its schedule is stepped to the next one at the end, to the first on resuming.
EPOCHS = """
import sys

import timm
import torch
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask

sched, start, stop = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = timm.create_model('dyconv_resnet10', channels=(8, 8, 8, 8), num_classes=2, anneal_epochs=4, temperature=9.)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
task = ClassificationTask(model, verbose=False)
router = model.layer4[0].conv2.routing_fn
schedule, _ = create_scheduler_v2(optimizer, sched, num_epochs=stop)
if start:
    schedule.step(start)
for epoch in range(start, stop):
    task.train()
    print(f'{router.current_temperature().item():g}', end=' ')
    task(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))['loss'].backward()
    optimizer.step()
    if schedule is not None:
        schedule.step(epoch + 1, None)
"""
TINY = ['patch_size=8', 'embed_dim=16', 'depth=2', 'num_heads=2', 'representation_size=0', 'num_experts=4']


def moe_zoo_run(repository, *arguments, cwd=None):
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(repository))
    return subprocess.run(
        [sys.executable, '-m', 'moe_zoo.run', *map(str, arguments)], cwd=cwd, env=environment, capture_output=True,
        text=True, timeout=600)


@pytest.fixture
def run_here(monkeypatch):
    """`moe_zoo.run.main` in this process, with everything that it changes put back."""
    for module in (timm.task, timm.task.classification):
        for name in ('ClassificationTask', 'MultiLabelClassificationTask'):
            monkeypatch.setattr(module, name, getattr(module, name))
    for module in (timm.scheduler, timm.scheduler.scheduler_factory):
        monkeypatch.setattr(module, 'create_scheduler_v2', module.create_scheduler_v2)
    if importlib.util.find_spec('detectron2'):
        import detectron2.engine
        for name in ('merge_from_file', 'merge_from_list', 'freeze'):
            monkeypatch.setattr(detectron2.config.CfgNode, name, getattr(detectron2.config.CfgNode, name))
        for module in (detectron2.engine, detectron2.engine.defaults):
            monkeypatch.setattr(module, 'create_ddp_model', module.create_ddp_model)
    monkeypatch.setattr(context, '_OPEN', [])
    monkeypatch.setattr(spawn, 'get_preparation_data', spawn.get_preparation_data)
    monkeypatch.setattr(sys, 'argv', list(sys.argv))
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setenv(run.SCRIPT, '')
    return lambda *arguments: run.main([str(argument) for argument in arguments])


def test_script_that_builds_timms_task(run_here, tmp_path, capsys):
    """Registered models, auxiliary losses in timm's task, and neighbours of the script importable."""
    (tmp_path / 'train.py').write_text(MINIATURE)
    (tmp_path / 'helper.py').write_text('VALUE = 7\n')
    assert run_here(tmp_path / 'train.py', '--model', 'vmoe_vit_s', '--model-kwargs', *TINY) == 0
    assert capsys.readouterr() == (
        f"MoEClassificationTask ['loss_importance', 'loss_vmoe_load'] {tmp_path / 'train.py'} 7\n", '')


def test_a_loop_that_loses_auxiliary_losses_is_warned_once(run_here, tmp_path, capsys, monkeypatch):
    script = tmp_path / 'own.py'
    script.write_text(OWN_LOOP)
    begin, losses = f'warning: {script} trains MoEMlp by a loop of its own: ', (
        'auxiliary losses (importance, vmoe_load) are not added: build timm.task.ClassificationTask, or call '
        'model.set_aux_loss() and add moe_zoo.losses.auxiliary_losses')
    run_here(script)
    assert capsys.readouterr().err == f'{begin}{losses}.\n'
    run_here(script, 'bias')
    assert capsys.readouterr().err == f'{begin}it must call moe_zoo.routing.end_step itself.\n'
    run_here(script, 'listens')
    monkeypatch.setenv('RANK', '1')
    run_here(script)
    assert capsys.readouterr().err == ''


@pytest.mark.filterwarnings('ignore:PlateauLRScheduler is deprecated')
def test_schedules_tell_the_epochs(run_here, tmp_path, capsys):
    """A temperature that falls from 9 to 1 over 4 epochs: 9 - 2 epoch."""
    script = tmp_path / 'train.py'
    script.write_text(EPOCHS)
    for sched in ('cosine', 'plateau'):  # the latter has a `step` of its own
        run_here(script, sched, 0, 6)
        assert capsys.readouterr().out == '9 7 5 3 1 1 '
        run_here(script, sched, 2, 4)
        assert capsys.readouterr().out == '5 3 '
    with pytest.warns(UserWarning, match='Without a learning rate schedule nothing tells this model of epochs'):
        run_here(script, 'none', 0, 2)
    assert capsys.readouterr().out == '9 9 '


@pytest.mark.slow
def test_spawned_processes_know_it_too(repository, tmp_path):
    (tmp_path / 'spawning.py').write_text(SPAWNING)
    done = moe_zoo_run(repository, tmp_path / 'spawning.py', tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / '0').read_text() == 'MoEClassificationTask'


def test_exit_codes_and_sentences(run_here, tmp_path, capsys):
    """What the user caused is a sentence and 2; what the script says is passed on."""
    (tmp_path / 'leaves.py').write_text('raise SystemExit(5)\n')
    (tmp_path / 'wrong.py').write_text("import timm\ntimm.create_model('vmoe_vit_s', num_selected=9)\n")
    for script, code, sentence in (
            ('missing.py', 2, f"error: There is no script '{tmp_path / 'missing.py'}'"),
            ('leaves.py', 5, ''),
            ('wrong.py', 2, 'error: num_selected=9 with num_experts=8: choose between 1 and 8 experts.')):
        with pytest.raises(SystemExit) as exit:
            run_here(tmp_path / script)
        assert exit.value.code == code
        assert capsys.readouterr().err.startswith(sentence)
    assert run_here('--help') == 0 and 'usage: moe-zoo run SCRIPT' in capsys.readouterr().out


def upstream_tool(name: str) -> Path:
    """A script of detectron2's own tools folder, where the set-up keeps them."""
    if importlib.util.find_spec('detectron2') is None:
        pytest.skip('detectron2 is not installed')
    for root in (Path(sys.prefix) / 'share', Path(importlib.util.find_spec('detectron2').origin).parents[1]):
        for path in (root / 'detectron2' / 'tools' / name, root / 'tools' / name):
            if path.is_file():
                return path
    pytest.skip(f'{name} of detectron2 is not on this machine')


# A small detector on the scenes of digits, as overrides of our configs.
SMALL = {
    'yaml': 'MODEL.RESNETS.STEM_OUT_CHANNELS 8 MODEL.RESNETS.RES2_OUT_CHANNELS 8 MODEL.FPN.OUT_CHANNELS 8 '
            'MODEL.FPN.NORM "" MODEL.RETINANET.NORM "" MODEL.DEVICE cpu INPUT.MIN_SIZE_TRAIN (64,) '
            'INPUT.MIN_SIZE_TEST 64 SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 2 SOLVER.STEPS () OUTPUT_DIR run '
            'MOE.OPTIMIZER.NAME adamw',
    'py': 'model.backbone.bottom_up.name=condconv_resnet18 model.backbone.bottom_up.pretrained=False '
          'model.backbone.bottom_up.freeze_at=0 model.backbone.bottom_up.norm= '
          'model.backbone.top_block.in_channels=512 model.num_classes=5 '
          'train.device=cpu train.max_iter=2 train.eval_period=2 train.output_dir=run '
          'dataloader.train.dataset.names=digit_scenes_train dataloader.test.dataset.names=digit_scenes_val '
          'dataloader.train.total_batch_size=2 dataloader.train.num_workers=0 dataloader.test.num_workers=0 '
          'dataloader.train.mapper.augmentations.0.short_edge_length=[64] '
          'dataloader.test.mapper.augmentations.0.short_edge_length=64',
}
YAML, PY = 'demo/retinanet_digits.yaml', 'coco/retinanet_condconv_r50_fpn_1x.py'


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    """Folder for DETECTRON2_DATASETS."""
    pytest.importorskip('sklearn')
    from moe_zoo.data import write_scenes
    folder = tmp_path_factory.mktemp('datasets')
    write_scenes(folder / 'digit_scenes', train=4, val=4, classes=range(5))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('tool, config, arguments', [
    ('train_net.py', YAML, []),
    ('train_net.py', YAML, ['--num-gpus', '2', '--dist-url', 'auto']),
    ('lazyconfig_train_net.py', PY, []),
    ('lazyconfig_train_net.py', PY, ['--num-gpus', '2', '--dist-url', 'auto']),
    ('analyze_model.py', YAML, ['--tasks', 'flop', 'activation', 'parameter', 'structure', '-n', '2']),
])
def test_tools_of_detectron2(tool, config, arguments, scenes, repository, tmp_path, monkeypatch):
    """Upstream's own scripts, unmodified: two iterations and an evaluation on the CPU, in one process and in two."""
    monkeypatch.setenv('DETECTRON2_DATASETS', str(scenes))
    small = shlex.split(SMALL[config.rpartition('.')[2]])
    done = moe_zoo_run(repository, upstream_tool(tool), '--config-file', repository / 'configs' / config, *arguments,
                       *small, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'by a loop of its own' not in done.stderr  # the meta-architecture collects the auxiliary losses
    if tool == 'analyze_model.py':
        assert 'expert' in done.stdout + done.stderr
        return
    assert (tmp_path / 'run' / 'model_final.pth').is_file()
    assert 'loss_cls' in (tmp_path / 'run' / 'metrics.json').read_text()
    assert ('loss_moe' in (tmp_path / 'run' / 'metrics.json').read_text()) == (config == YAML)
    if config == YAML:
        state = torch.load(tmp_path / 'run' / 'model_final.pth', weights_only=True)['trainer']['_trainer']['optimizer']
        assert 'exp_avg' in state['state'][0]  # of AdamW, which MOE.OPTIMIZER named
    assert 'copypaste: AP,AP50' in done.stdout
    assert f'World size: {2 if arguments else 1}' in done.stdout


def test_a_misspelt_key_given_to_a_tool_of_detectron2_is_one_sentence(run_here, tmp_path, capsys, monkeypatch):
    """In this process, and in one that the script spawned."""
    pytest.importorskip('detectron2')
    script = tmp_path / 'own.py'
    script.write_text("from detectron2.config import get_cfg\nget_cfg().merge_from_list(['MOE.TIMM.NAM', 'x'])\n")
    sentence = "error: Unknown config key 'MOE.TIMM.NAM' in the command line. Did you mean 'MOE.TIMM.NAME'"
    with pytest.raises(SystemExit) as exit:
        run_here(script)
    assert exit.value.code == 2 and capsys.readouterr().err.startswith(sentence)

    def raised(*_):
        raise run.ProcessRaisedException(f'Traceback\n\nmoe_zoo.errors.InputError: {sentence[7:]}\n', 0, 1)

    monkeypatch.setattr(run, 'enter', raised)
    with pytest.raises(SystemExit) as exit:
        run_here(script)
    assert exit.value.code == 2 and capsys.readouterr().err.startswith(sentence)


def test_data_named_by_the_config_is_registered_when_a_script_freezes_it(run_here, tmp_path):
    pytest.importorskip('detectron2')
    script = tmp_path / 'own.py'
    script.write_text(
        "from detectron2.config import get_cfg\ncfg = get_cfg()\nassert cfg.DATASETS.TRAIN == ()\n"
        "cfg.merge_from_list(['MOE.DATA.ROOT', '/some/where'])\ncfg.freeze()\n"
        "assert cfg.DATASETS.TRAIN == ('instances_train of /some/where/annotations',), cfg.DATASETS.TRAIN\n")
    assert run_here(script) == 0


def test_timms_own_script(repository, tmp_path):
    """timm's train.py on two classes of images, where MOE_ZOO_TIMM_TRAIN names a copy (its package has none)."""
    script = os.environ.get('MOE_ZOO_TIMM_TRAIN')
    if not script:
        pytest.skip("set MOE_ZOO_TIMM_TRAIN to timm's train.py")
    from PIL import Image
    for split in ('train', 'validation'):
        for level in (60, 190):
            (tmp_path / 'data' / split / str(level)).mkdir(parents=True)
            for i in range(4):
                Image.new('RGB', (16, 16), (level,) * 3).save(tmp_path / 'data' / split / str(level) / f'{i}.png')
    done = moe_zoo_run(
        repository, script, '--data-dir', tmp_path / 'data', '--model', 'vmoe_vit_s', '--model-kwargs', *TINY,
        '--num-classes', '2', '--img-size', '16', '--device', 'cpu', '--workers', '0', '--batch-size', '4', '--epochs',
        '1', '--warmup-epochs', '0', '--opt', 'sgd', '--lr', '0.01', '--output', tmp_path, '--experiment', 'run')
    assert done.returncode == 0, done.stderr
    with open(tmp_path / 'run' / 'summary.csv', newline='') as file:
        assert len(list(csv.DictReader(file))) == 1
