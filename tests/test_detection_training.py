"""Detectors in training: killed and resumed, two processes, odd images, bfloat16, NaN, and what bad input leaves."""
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from detectors import TINY_RETINANET, refusal
from PIL import Image

pytest.importorskip('detectron2', reason='detectron2 is not installed')

from detectron2.modeling import RetinaNet, build_model  # noqa: E402
from torch import nn  # noqa: E402

from moe_zoo.data.random_state import get_random_state  # noqa: E402
from moe_zoo.data.scenes import write_scenes  # noqa: E402
from moe_zoo.detection import load_config  # noqa: E402
from moe_zoo.detection.evaluation import Evaluator  # noqa: E402
from moe_zoo.detection.loader import Batches  # noqa: E402
from moe_zoo.detection.train import Trainer, main  # noqa: E402
from moe_zoo.errors import InputError  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')  # of detectron2's older code

TINY = TINY_RETINANET + """
INPUT: {{MIN_SIZE_TRAIN: [64, 80], MIN_SIZE_TEST: 64}}
DATASETS: {{TEST: []}}
SOLVER: {{IMS_PER_BATCH: 2, BASE_LR: 0.001, MAX_ITER: 6, WARMUP_ITERS: 2, STEPS: [4], CHECKPOINT_PERIOD: 2}}
"""


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('data') / 'scenes', train=8, val=4, image_size=160, classes=range(5))


@pytest.fixture
def tiny(scenes, tmp_path, repository):
    """Command line of a run on the training scenes alone: a small ResNet-18 whose last stage is routed, with noise."""
    config = tmp_path / 'tiny.yaml'
    config.write_text(TINY.format(base=repository / 'configs' / 'coco' / 'Base-RetinaNet.yaml'))
    annotations = scenes / 'annotations' / 'instances_train.json'
    return ['--config-file', str(config), 'MOE.DATA.TRAIN_JSON', str(annotations), 'MOE.DATA.TRAIN_IMAGES',
            str(scenes / 'train'), 'OUTPUT_DIR', str(tmp_path / 'run')]


def evaluated(scenes):
    return ['MOE.DATA.TEST_JSON', str(scenes / 'annotations' / 'instances_val.json'), 'MOE.DATA.TEST_IMAGES',
            str(scenes / 'val')]


def config_of(argv, *opts):
    return load_config(argv[1], [*argv[2:], *opts])


def assert_same_training(one, other):
    """Weights, buffers, momentum and schedule of two checkpoints, to the last bit."""
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    assert one['iteration'] == other['iteration']
    assert one['model'].keys() == other['model'].keys()
    differing = [key for key, value in one['model'].items() if not torch.equal(value, other['model'][key])]
    assert not differing
    momenta = [state['trainer']['_trainer']['optimizer']['state'] for state in (one, other)]
    assert momenta[0].keys() == momenta[1].keys() and momenta[0]
    assert all(torch.equal(a['momentum_buffer'], momenta[1][i]['momentum_buffer']) for i, a in momenta[0].items())
    assert one['trainer']['hooks'] == other['trainer']['hooks']


def left_behind(run, checkpoint, folder):
    """The folder of a run that was killed after writing `checkpoint`."""
    folder.mkdir()
    shutil.copy(run / checkpoint, folder)
    (folder / 'last_checkpoint').write_text(checkpoint)
    return folder


# --- resume

def test_a_resumed_run_is_the_uninterrupted_one(tiny, scenes, tmp_path):
    """Order, augmentation, router noise, momentum and schedule: whatever the workers, whatever is evaluated between."""
    main([*tiny, *evaluated(scenes), 'TEST.EVAL_PERIOD', '3'])
    for checkpoint, workers in (('model_0000001.pth', '0'), ('model_0000003.pth', '2')):
        folder = left_behind(tmp_path / 'run', checkpoint, tmp_path / workers)
        main([*tiny, '--resume', 'OUTPUT_DIR', str(folder), 'DATALOADER.NUM_WORKERS', workers])
        assert_same_training(tmp_path / 'run' / 'model_final.pth', folder / 'model_final.pth')


@pytest.mark.slow
def test_what_is_no_state_of_a_run_is_not_resumed(tiny, tmp_path, capsys):
    main([*tiny, 'SOLVER.MAX_ITER', '1'])
    path = tmp_path / 'run' / 'model_final.pth'
    content = torch.load(path, weights_only=True)
    state = content['trainer']
    group, *rest = state['_trainer']['optimizer']['param_groups']
    spoilt = {**state['_trainer']['optimizer'], 'param_groups': [{**group, 'momentum': 'x'}, *rest]}
    for changed, said in ((dict(iteration='x'), "its iteration is 'x', its seed '"), (dict(seed=[1]), "its seed '[1]'"),
                          (dict(_trainer={**state['_trainer'], 'optimizer': spoilt}), "its momentum is 'x'")):
        torch.save({**content, 'trainer': {**state, **changed}}, path)
        sentence = refusal(capsys, [*tiny, '--resume'])
        assert sentence.startswith(f"error: Checkpoint '{path}' is truncated, or no checkpoint of this model: ")
        assert said in sentence


def test_without_a_seed_the_checkpoint_knows_the_one_that_was_drawn(tiny, tmp_path):
    main([*tiny, 'SEED', '-1'])
    folder = left_behind(tmp_path / 'run', 'model_0000001.pth', tmp_path / 'other')
    main([*tiny, '--resume', 'SEED', '-1', 'OUTPUT_DIR', str(folder)])
    assert_same_training(tmp_path / 'run' / 'model_final.pth', folder / 'model_final.pth')


def drawn(cfg, dataset, start, count, mapper=None):
    """(index, random numbers) of the images of `count` batches."""
    def draw(image):
        return {**image, 'drawn': (np.random.rand(), torch.rand(1).item())}

    batches = Batches(cfg, dataset, mapper or draw)
    batches.start = start
    iterator = iter(batches)
    return [[(image['file_name'], image['drawn']) for image in next(iterator)] for _ in range(count)]


@pytest.mark.parametrize('sampler', ['TrainingSampler', 'RepeatFactorTrainingSampler'])
def test_batches_are_entered_anywhere_without_reading_images(tiny, sampler):
    cfg = config_of(tiny, 'DATALOADER.SAMPLER_TRAIN', sampler, 'SEED', '7')
    rng = np.random.default_rng(0)
    dataset = [{'file_name': str(i), 'width': int(rng.integers(10, 20)), 'height': 15, 'annotations': []}
               for i in range(9)]
    before = get_random_state()
    whole = drawn(cfg, dataset, 0, 12)
    assert torch.equal(get_random_state()['torch'], before['torch'])  # what the model draws is not moved
    assert drawn(cfg, dataset, 5, 7) == whole[5:]
    np.random.rand(), torch.rand(3)
    cfg.DATALOADER.NUM_WORKERS = 2
    assert drawn(cfg, dataset, 0, 12) == whole
    for batch in whole:  # the two of a batch are both wide or both not
        assert len({dataset[int(name)]['width'] > 15 for name, _ in batch}) == 1
    draws = [numbers for batch in whole for _, numbers in batch]
    assert len(set(draws)) == len(draws)  # an image that comes again is augmented anew


def test_another_image_stands_in_for_one_that_cannot_be_read_and_always_the_same(tiny):
    cfg = config_of(tiny)
    dataset = [{'file_name': str(i), 'width': 8, 'height': 8, 'annotations': []} for i in range(4)]

    def mapper(image):
        return None if image['file_name'] == '2' else {**image, 'drawn': 0}

    found = drawn(cfg, dataset, 0, 8, mapper)
    assert {name for batch in found for name, _ in batch} == {'0', '1', '3'}
    assert drawn(cfg, dataset, 3, 5, mapper) == found[3:]
    with pytest.raises(InputError, match='No image of the training set can be read'):
        drawn(cfg, dataset, 0, 1, lambda image: None)


def command(repository, argv):
    return [sys.executable, str(repository / 'tools' / 'train_coco.py'), *argv]


def wait_for(condition, process, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_two_processes_killed_at_any_moment_and_resumed(tiny, scenes, tmp_path, repository):
    """SIGKILL to both and their loaders, somewhere after the first checkpoint; SIGTERM to the one that started them.

    Their images choose different experts, and they must not wait for each other; both evaluate, and every image once.
    """
    argv = [*tiny, *evaluated(scenes), '--num-processes', '2', 'SOLVER.MAX_ITER', '24', 'SOLVER.CHECKPOINT_PERIOD', '3',
            'DATALOADER.NUM_WORKERS', '1', 'DATALOADER.ASPECT_RATIO_GROUPING', 'False']
    run = dict(cwd=repository, capture_output=True, check=True, timeout=300)
    subprocess.run(command(repository, argv), **run)
    for number, name in ((signal.SIGKILL, 'killed'), (signal.SIGTERM, 'left')):
        again = [*argv, 'OUTPUT_DIR', str(tmp_path / name)]
        with open(tmp_path / 'output', 'w') as output:
            process = subprocess.Popen(command(repository, again), cwd=repository, stdout=output, stderr=output,
                                       start_new_session=True)
            wait_for((tmp_path / name / 'last_checkpoint').exists, process)
            time.sleep(0.1)
            (os.killpg if number == signal.SIGKILL else os.kill)(process.pid, number)
            assert process.wait(300) == (-number if number == signal.SIGKILL else 0), (tmp_path / 'output').read_text()
        assert not (tmp_path / name / 'model_final.pth').exists()
        assert (tmp_path / name / 'model_recovery.pth').exists() == (name == 'left')
        subprocess.run(command(repository, [*again, '--resume']), **run)
        assert_same_training(tmp_path / 'run' / 'model_final.pth', tmp_path / name / 'model_final.pth')
    for folder in ('run', 'killed', 'left'):
        predictions = torch.load(tmp_path / folder / 'inference' / 'instances_predictions.pth', weights_only=True)
        assert sorted(p['image_id'] for p in predictions) == [1, 2, 3, 4]
        assert 'AP50' in json.loads((tmp_path / folder / 'results.json').read_text())['metrics']['bbox']


# --- asked to leave

@pytest.mark.parametrize('opts, where, call, saved', [
    ([], (Trainer, 'run_step'), 3, 'model_recovery.pth'),
    (['TEST.EVAL_PERIOD', '3'], (Evaluator, 'process'), 2, 'model_recovery.pth'),
    pytest.param([], (Evaluator, 'process'), 2, 'model_final.pth', marks=pytest.mark.slow),
    pytest.param([], (torch, 'save'), 1, 'model_recovery.pth', marks=pytest.mark.slow),
], ids=['iteration', 'evaluation', 'final evaluation', 'writing'])
def test_a_scheduler_is_obeyed_and_the_resumed_run_is_the_uninterrupted_one(
        opts, where, call, saved, tiny, scenes, tmp_path, monkeypatch):
    argv = [*tiny, *evaluated(scenes), *opts]
    main(argv)
    folder = tmp_path / 'left'
    argv += ['OUTPUT_DIR', str(folder)]
    owner, name = where
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, counted)
        with pytest.raises(SystemExit) as left:
            main(argv)
    assert left.value.code == 0 and not (folder / 'results.json').exists()
    assert (folder / 'last_checkpoint').read_text() == saved
    main([*argv, '--resume'])
    assert_same_training(tmp_path / 'run' / 'model_final.pth', folder / 'model_final.pth')
    metrics = [json.loads((each / 'results.json').read_text())['metrics'] for each in (tmp_path / 'run', folder)]
    assert metrics[0] == metrics[1]


def test_a_second_run_is_refused_and_an_evaluation_is_not(tiny, scenes, tmp_path, capsys):
    main([*tiny, 'SOLVER.MAX_ITER', '2'])
    hold = 'import fcntl, sys, time; file = open(sys.argv[1], "a+"); fcntl.lockf(file, fcntl.LOCK_EX); ' \
           'print(flush=True); time.sleep(600)'
    lock = str(tmp_path / 'run' / 'run.lock')
    with subprocess.Popen([sys.executable, '-c', hold, lock], stdout=subprocess.PIPE) as run:
        run.stdout.readline()
        assert f"'{tmp_path / 'run'}' is being written to by a run that is not over (another process): wait for it, " \
            'end it, or name another OUTPUT_DIR.' in refusal(capsys, [*tiny, '--resume'])
        main([*tiny, *evaluated(scenes), '--eval-only', 'MODEL.WEIGHTS', str(tmp_path / 'run' / 'model_final.pth')])
        run.kill()
    main([*tiny, '--resume'])


def test_a_worker_that_is_killed_ends_the_run_with_one_sentence(tiny, tmp_path, capsys, monkeypatch):
    def run_step(self):
        original(self)
        if self.iter == 3:
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            time.sleep(1)

    original = Trainer.run_step
    monkeypatch.setattr(Trainer, 'run_step', run_step)
    sentence = refusal(capsys, [*tiny, 'DATALOADER.NUM_WORKERS', '1'])
    assert re.search(r'A process that reads images was killed \(Killed\), PID \d+, .* smaller batches; the last good '
                     rf"checkpoint is '{tmp_path}/run/model_0000001.pth'\.", sentence)


# --- odd images

@pytest.fixture
def odd(tmp_path):
    """Builds a data set of one image of each (height, width, annotations), as command line."""
    def build(*images):
        folder = tmp_path / 'odd'
        (folder / 'images').mkdir(parents=True)
        content = {'images': [], 'annotations': [], 'categories': [{'id': i, 'name': str(i)} for i in range(1, 6)]}
        for i, (height, width, boxes) in enumerate(images, 1):
            Image.new('RGB', (width, height), (40 * i,) * 3).save(folder / 'images' / f'{i}.png')
            content['images'].append({'id': i, 'file_name': f'{i}.png', 'height': height, 'width': width})
            for crowd, box in boxes:
                content['annotations'].append({
                    'id': len(content['annotations']) + 1, 'image_id': i, 'category_id': 1, 'bbox': box,
                    'area': box[2] * box[3], 'iscrowd': crowd})
        (folder / 'odd.json').write_text(json.dumps(content))
        return ['MOE.DATA.TRAIN_JSON', str(folder / 'odd.json'), 'MOE.DATA.TRAIN_IMAGES', str(folder / 'images')]
    return build


def logged(folder):
    return [json.loads(line) for line in (folder / 'metrics.json').read_text().splitlines()]


@pytest.mark.parametrize('backbone', ['moe_resnet18', 'condconv_resnet18'])
def test_empty_crowd_and_narrow_images_train_one_at_a_time(backbone, tiny, odd, tmp_path):
    """A stride is 8 to 128 pixels; 5 x 300 with a shorter side of 64 is cut to 22 x 1333 by MAX_SIZE."""
    data = odd((64, 64, []), (64, 64, [(1, [3, 3, 20, 20])]), (5, 300, [(0, [9, 1, 40, 3])]),
               (300, 6, [(0, [1, 9, 3, 40])]), (64, 64, [(0, [3, 3, 20, 20]), (1, [30, 30, 9, 9])]))
    argv = [*tiny, *data, 'DATALOADER.FILTER_EMPTY_ANNOTATIONS', 'False', 'SOLVER.IMS_PER_BATCH', '1',
            'SOLVER.MAX_ITER', '5', 'MOE.TIMM.NAME', backbone]
    main(argv)
    assert math.isfinite(logged(tmp_path / 'run')[-1]['total_loss'])
    cfg = config_of(argv)
    read = sum(drawn_files(Trainer.build_train_loader(cfg), 5), [])
    assert sorted(os.path.basename(name) for name in read) == ['1.png', '2.png', '3.png', '4.png', '5.png']


def drawn_files(batches, count):
    iterator = iter(batches)
    return [[image['file_name'] for image in next(iterator)] for _ in range(count)]


def test_a_set_of_only_crowds_and_empty_images_is_refused_unless_asked_for(tiny, odd, capsys):
    data = odd((64, 64, []), (64, 64, [(1, [3, 3, 20, 20])]))
    assert 'is not usable COCO JSON: No valid data found' in refusal(capsys, [*tiny, *data])


def test_a_batch_that_batch_norm_cannot_learn_from_is_one_sentence(tiny, odd, capsys, tmp_path):
    """One image of 32 pixels: a single position on P5, and on what follows."""
    argv = [*tiny, *odd((32, 32, [(0, [3, 3, 20, 20])])), 'SOLVER.IMS_PER_BATCH', '1', 'INPUT.MIN_SIZE_TRAIN', '(32,)',
            'MODEL.FPN.NORM', 'BN']
    assert 'A BatchNorm layer saw one value a channel' in refusal(capsys, argv)


# --- precision, divergence

def test_bfloat16_on_the_cpu(tiny, tmp_path):
    """Products in bfloat16; losses, gates, weights and their gradients in float32."""
    argv = [*tiny, 'SOLVER.AMP.ENABLED', 'True', 'SOLVER.MAX_ITER', '5']
    seen = {}
    cfg = config_of(argv, 'OUTPUT_DIR', str(tmp_path / 'other'))
    os.makedirs(cfg.OUTPUT_DIR)
    trainer = Trainer(cfg)
    for name, module in trainer.model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y.dtype}))
    trainer.train()
    assert seen['backbone.fpn_lateral3'] == torch.bfloat16
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trainer.model.parameters())
    main(argv)
    losses = {key: value for key, value in logged(tmp_path / 'run')[-1].items() if 'loss' in key}
    main([*tiny, 'SOLVER.MAX_ITER', '5', 'OUTPUT_DIR', str(tmp_path / 'whole')])
    for key, value in logged(tmp_path / 'whole')[-1].items():
        if 'loss' in key:
            assert losses[key] == pytest.approx(value, rel=0.05)  # 8 bits of mantissa: 0.4 % a number
            assert losses[key] != value or 'moe' in key  # a fresh gate is zero: its loss is that of the noise


@pytest.mark.parametrize('what', ['loss', 'gradient'])
def test_nan_stops_with_iteration_and_files(what, tiny, tmp_path, capsys, monkeypatch):
    """In the fourth iteration; the two images of its batch are named, the checkpoint before is kept."""
    cfg = config_of(tiny)
    fourth = sorted(os.path.basename(name) for name in drawn_files(Trainer.build_train_loader(cfg), 4)[3])
    capsys.readouterr()
    losses_of, calls = RetinaNet.losses, []

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.nan

    def losses(self, *args):
        found = losses_of(self, *args)
        calls.append(1)
        if len(calls) == 4:
            found['loss_cls'] = Poison.apply(found['loss_cls']) if what == 'gradient' else found['loss_cls'] * math.nan
        return found

    monkeypatch.setattr(RetinaNet, 'losses', losses)
    sentence = refusal(capsys, tiny)
    named = re.search(r"iteration 3, on (\S+), (\S+) of '(.*?)';", sentence)
    assert sorted(named.groups()[:2]) == fourth and named[3].endswith('scenes/train')
    wanted = 'the loss is NaN or infinite (loss_cls nan, ' if what == 'loss' else 'the gradient is not finite (losses: '
    assert f'Training stopped because {wanted}' in sentence
    assert f"the last good checkpoint is '{tmp_path / 'run' / 'model_0000001.pth'}'" in sentence


# --- bad input

def test_sets_whose_categories_have_other_names_are_refused(tiny, scenes, tmp_path, capsys):
    content = json.loads((scenes / 'annotations' / 'instances_val.json').read_text())
    content['categories'][3]['name'], content['categories'][4]['name'] = '4', '3'
    (tmp_path / 'val.json').write_text(json.dumps(content))
    argv = [*tiny, 'MOE.DATA.TEST_JSON', str(tmp_path / 'val.json'), 'MOE.DATA.TEST_IMAGES', str(scenes / 'val')]
    assert re.search("Category 4 is '3' in '.*instances_train.json' and '4' in '.*val.json'", refusal(capsys, argv))


def test_a_run_on_other_categories_is_not_resumed(tiny, scenes, tmp_path, capsys):
    main([*tiny, 'SOLVER.CHECKPOINT_PERIOD', '9'])
    content = json.loads((scenes / 'annotations' / 'instances_train.json').read_text())
    for category in content['categories']:
        category['name'] = f'digit {category["name"]}'
    (tmp_path / 'train.json').write_text(json.dumps(content))
    argv = [*tiny, '--resume', 'MOE.DATA.TRAIN_JSON', str(tmp_path / 'train.json')]
    assert 'it was trained on the categories 0, 1, 2, 3, 4, and DATASETS.TRAIN has digit 0' in refusal(capsys, argv)
    assert (tmp_path / 'run' / 'model_final.pth').exists()  # what was there stays


@pytest.mark.parametrize('opts, message', [
    (['MOE.TIMM.NAM', 'resnet18'],
     "Unknown config key 'MOE.TIMM.NAM' in the command line. Did you mean 'MOE.TIMM.NAME'"),
    (['MOE.DATA.TRAIN_JSON', '', 'MOE.DATA.TRAIN_IMAGES', ''],
     "Data set 'coco_2017_train' is missing: there is no file 'datasets/coco/annotations/instances_train2017.json'; "
     "set DETECTRON2_DATASETS .now 'datasets'. or MOE.DATA.ROOT"),
    (['MODEL.FPN.IN_FEATURES', "['res3', 'res9']"], r"MODEL.FPN.IN_FEATURES \['res3', 'res9'\]"),
    (['MODEL.MASK_ON', 'True'], "MODEL.MASK_ON True: '.*' has an object without segmentation"),
    (['DATASETS.TEST', "('coco_2017_val',)"], "Data set 'coco_2017_val' is missing"),
])
def test_bad_input_leaves_nothing(opts, message, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('DETECTRON2_DATASETS', raising=False)
    assert re.search(message, refusal(capsys, [*tiny, *opts]))
    assert not (tmp_path / 'run').exists()


def test_weights_of_another_head_leave_nothing(tiny, scenes, tmp_path, capsys):
    model = build_model(config_of(tiny, 'MODEL.RETINANET.NUM_CLASSES', '12'))
    torch.save({'model': model.state_dict()}, tmp_path / 'twelve.pth')
    argv = [*tiny, *evaluated(scenes), '--eval-only', 'MODEL.WEIGHTS', str(tmp_path / 'twelve.pth')]
    assert 'for another number of classes' in refusal(capsys, argv)
    assert not (tmp_path / 'run').exists()


def test_a_pickle_of_foreign_classes_leaves_nothing(tiny, tmp_path, capsys):
    import pickle
    (tmp_path / 'foreign.pkl').write_bytes(pickle.dumps({'model': {'a': logging.getLogger('x')}}))
    argv = [*tiny, 'MODEL.WEIGHTS', str(tmp_path / 'foreign.pkl')]
    assert 'asks for logging.getLogger, which is neither an array nor a container' in refusal(capsys, argv)
    assert not (tmp_path / 'run').exists()
