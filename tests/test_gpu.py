"""What a GPU computes, held against the CPU: every model, several ranks over NCCL, every detector, the table of times.

`tools/gpu_check.sh` runs this file. Where MOE_ZOO_GPU_DEVICE=cpu it is a rehearsal: the same lines on the CPU, smaller.
Float32 is float32 here: TensorFloat-32 is off. How far a result may be off is no constant: fresh networks let rounding
grow, some a thousandfold. What is right is computed on the CPU in float64, and a GPU may be off by `TIMES` as much as
the CPU is in the same precision.

Letters: E experts, K chosen experts.
"""
import contextlib
import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import gpu_ranks
import pytest
import torch
import torch.nn.functional as F
from image_folders import write_images
from small_models import NAMES, images_of, routes, run_traced, small_model
from torch import nn

from moe_zoo.analysis import benchmark_cli
from moe_zoo.analysis.force import rewrite_routing
from moe_zoo.engine.build import mixed_precision
from moe_zoo.engine.checkpoint import read_checkpoint
from moe_zoo.engine.config import load_config
from moe_zoo.engine.train import train
from moe_zoo.layers import RoutedLayer
from moe_zoo.losses import auxiliary_losses
from moe_zoo.resources import folder
from moe_zoo.routing import Routing

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings('ignore')]

DEVICE = torch.device(os.environ.get('MOE_ZOO_GPU_DEVICE', 'cuda'))
REHEARSAL = DEVICE.type == 'cpu'
COCO = folder('configs') / 'coco'
DETECTORS = sorted(path.stem for path in COCO.glob('*.yaml') if not path.stem.startswith('Base'))
ITERATIONS = 3 if REHEARSAL else 20
IMAGES = 4
TIMES = 4
# Or by this: the logits, of the largest; the gradient, of its norm. The last bit is 6e-8 in float32, 4e-3 in bfloat16.
FLOORS = {'float32': (1e-5, 1e-4), 'bfloat16': (2e-2, 5e-2), 'amp': (2e-2, 5e-2)}
TIMED = {
    'models': ['condconv_mobilenetv2_100', 'dyconv_resnet18', 'moe_resnet18'] if not REHEARSAL else ['dyconv_resnet10'],
    'equal MACs': ['vmoe_vit_s'] if not REHEARSAL else []}


@pytest.fixture(autouse=True)
def exact():
    """No TensorFloat-32, which has 10 bits of mantissa."""
    parts = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [part.allow_tf32 for part in parts]
    for part in parts:
        part.allow_tf32 = False
    yield
    for part, value in zip(parts, before):
        part.allow_tf32 = value


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, of the largest value that is expected."""
    return float((found.detach().cpu().double() - expected).abs().max() / expected.abs().max())


def check_difference(found: float, of_cpu: float, floor: float, record_property: Any, what: str = 'difference') -> None:
    """Fail where a result is off by more than it may be."""
    bound = max(floor, TIMES * of_cpu)
    record_property(what, found)
    record_property(f'{what}: bound', bound)
    assert found <= bound, f'{what}: {found:.1e}, and the CPU is off by {of_cpu:.1e} in the same precision'


# ---- every model

@pytest.mark.parametrize('name', NAMES)
def test_a_model_evaluates_as_on_the_cpu(name, record_property):
    """Logits, and the same routes wherever the margin is larger than 1e-3."""
    model = small_model(name)
    x = images_of(name, model, IMAGES)
    of_cpu, records = run_traced(model, x)
    found, again = run_traced(model.to(DEVICE), x.to(DEVICE))
    assert found.device.type == DEVICE.type and len(again) == len(records)
    expected, _ = run_traced(small_model(name).double(), x.double())
    check_difference(difference(found, expected), difference(of_cpu, expected), FLOORS['float32'][0], record_property)
    for ours, theirs in zip(again, records):
        chosen, sure = routes(theirs, margin=1e-3)
        if chosen.dtype == torch.bool:
            assert not ((routes(ours)[0].cpu() != chosen) & sure).any()


class Step(NamedTuple):
    """What a training step has computed.

    Attributes:
        logits: Of the images.
        loss: Task and auxiliary losses.
        gradient: Of all parameters, as one vector.
        records: Of the routed layers, in order.
    """
    logits: torch.Tensor
    loss: float
    gradient: torch.Tensor
    records: List[Routing]


def replay(records: List[Routing]):
    """A rule by which routers choose what they chose before: bfloat16 turns close calls over."""
    rest = iter(records)

    def rule(layer: str, routing: Routing) -> Routing:
        before = next(rest)
        if routing.indices is None:
            return routing
        device = routing.indices.device
        kept = None if before.kept is None else before.kept.to(device)
        return routing._replace(indices=before.indices.to(device), kept=kept, by_expert=False)
    return rule


def train_step(name: str, device: torch.device, precision: str, records: Optional[List[Routing]] = None) -> Step:
    """One step in training without noise and dropout; by the choices of `records`, if there are any.

    Args:
        precision: 'float64', 'float32', 'bfloat16' (weights, too), or 'amp': what the trainer makes of amp=true.
    """
    model = small_model(name).train()
    for module in model.modules():
        if hasattr(module, 'sample_noise'):
            module.sample_noise = lambda logits: torch.linspace(
                -1, 1, logits.numel(), device=logits.device).view_as(logits)
        if isinstance(module, nn.Dropout):
            module.p = 0.
    routed = any(isinstance(module, RoutedLayer) for module in model.modules())
    if routed:
        model.set_aux_loss(True)
    x, target = images_of(name, model, IMAGES).to(device), (torch.arange(IMAGES) % 5).to(device)
    dtype = {'amp': torch.float32}.get(precision) or getattr(torch, precision)
    model.to(device, dtype)
    autocast, scaler = mixed_precision(load_config({}, dict(amp=precision == 'amp')), device)
    with contextlib.ExitStack() as stack:
        if routed and records is not None:
            stack.enter_context(rewrite_routing(model, replay(records)))
        with autocast():
            output = model(x.to(dtype))
            logits, routings = output if routed else (output, [])
            losses = auxiliary_losses(routings, target)
            loss = sum(losses.values(), F.cross_entropy(logits if dtype == torch.float64 else logits.float(), target))
        _backward(model, loss, scaler)
    missing = [key for key, p in model.named_parameters() if p.grad is None]
    assert not missing, f'{missing[0]} has no gradient'
    gradient = torch.cat([p.grad.double().flatten().cpu() for p in model.parameters()])
    return Step(logits.detach().double().cpu(), float(loss.detach()), gradient, [r.detach() for r in routings])


def _backward(model: nn.Module, loss: torch.Tensor, scaler: Any) -> None:
    """As the trainer does. The optimiser, which unscales, moves nothing."""
    if scaler is None:
        loss.backward()
    else:
        scaler(loss, torch.optim.SGD(model.parameters(), lr=0.))


# ---- training and ranks

RUN = dict(
    model='vmoe_vit_s', img_size=16, batch_size=8, workers=0, opt='adamw', lr=1e-3, epochs=2, warmup_epochs=0,
    log_interval=1000, model_kwargs=dict(
        patch_size=8, embed_dim=64, depth=2, num_heads=4, moe_layers=[1], num_experts=4, representation_size=0))


@pytest.mark.parametrize('options', [
    pytest.param({}, id='float32'), pytest.param(dict(amp=True), id='amp'),
    pytest.param(dict(amp=True, amp_dtype='bfloat16', channels_last=True), id='bfloat16'),
    pytest.param(dict(model='condconv_mobilenetv1_025', model_kwargs={}, img_size=32, amp=True, channels_last=True),
                 id='kernels, amp')])
def test_a_run_trains_evaluates_and_is_repeated(options, tmp_path, record_property):
    """tools/train_imagenet.py on two classes. Whether a second run has the same bits is said, not demanded."""
    write_images(tmp_path / 'images', {'train': 20, 'validation': 8})
    weights = []
    for name in ('one', 'other'):
        found = train({**RUN, 'data_dir': str(tmp_path / 'images'), 'device': str(DEVICE)}, options,
                      output=tmp_path / name, quiet=True)
        assert math.isfinite(found['loss']) and len(found['history']) == 2
        weights.append(read_checkpoint(tmp_path / name / 'last.pth.tar')['state_dict'])
    record_property('same bits', all(torch.equal(value, weights[1][key]) for key, value in weights[0].items()))


@pytest.fixture(scope='module')
def ranks(tmp_path_factory) -> Dict[str, Any]:
    """What a step over the ranks computed: two, or as many as there are devices if that is one."""
    path = tmp_path_factory.mktemp('ranks') / 'found.pt'
    world = 2 if REHEARSAL else min(2, torch.cuda.device_count())
    here = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={world}',
         str(here / 'gpu_ranks.py'), str(path)], capture_output=True, text=True, timeout=300, cwd=here.parent,
        env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join((str(here), str(here.parent)))))
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize('way', gpu_ranks.WAYS)
def test_ranks_compute_what_one_process_does(way, ranks, record_property):
    """Data parallel, sharded and with experts spread: the gradients of the whole batch on the CPU."""
    model = gpu_ranks.model_of(way)
    gpu_ranks.step(model, *gpu_ranks.batch(model))
    expected, found = gpu_ranks.gradients(model), ranks['gradients'][way]
    assert found.keys() == expected.keys()
    worst = max(difference(found[name], value) for name, value in expected.items() if value.any())
    record_property('difference', worst)
    record_property('backend', f'{ranks["backend"]}, {ranks["world"]} ranks')
    assert ranks['backend'] == ('gloo' if REHEARSAL else 'nccl')
    assert worst < 1e-3


# ---- detectors

@pytest.fixture(scope='module')
def scenes(tmp_path_factory) -> Path:
    pytest.importorskip('detectron2', reason='detectron2 is not installed: tools/setup.sh --detection')
    from detectors import write_scenes_with_masks
    return write_scenes_with_masks(tmp_path_factory.mktemp('data') / 'digit_scenes')


def losses_in(run: Path) -> List[float]:
    lines = [json.loads(line) for line in (run / 'metrics.json').read_text().splitlines()]
    return [line['total_loss'] for line in lines if 'total_loss' in line]


def train_detector(name: str, scenes: Path, run: Path, *more: str) -> Dict[str, Any]:
    from test_coco_configs import path_of, small

    from moe_zoo.detection.train import main
    found = main(['--config-file', path_of(name), *small(name), 'MODEL.DEVICE', str(DEVICE), 'SOLVER.MAX_ITER',
                  str(ITERATIONS), 'MOE.DATA.ROOT', str(scenes), 'OUTPUT_DIR', str(run), *more])
    losses = losses_in(run)
    assert losses and all(map(math.isfinite, losses))
    return found


@pytest.mark.parametrize('name', DETECTORS)
def test_a_detector_trains_and_evaluates(name, scenes, tmp_path):
    assert 'AP' in train_detector(name, scenes, tmp_path / 'run')['bbox']


@pytest.mark.parametrize('name', ['retinanet_moe_res5_r50_fpn_1x', 'retinanet_condconv_r50_fpn_1x'])
def test_a_detector_trains_in_mixed_precision(name, scenes, tmp_path):
    """detectron2's AMPTrainer on CUDA; bfloat16 on the CPU."""
    assert 'AP' in train_detector(name, scenes, tmp_path / 'run', 'SOLVER.AMP.ENABLED', 'True')['bbox']


def test_fcos_trains_and_evaluates_under_the_unmodified_script(scenes, tmp_path):
    from test_coco_configs import run_lazy
    done = run_lazy('fcos_condconv_r50_fpn_1x', scenes, tmp_path / 'run', str(DEVICE), ITERATIONS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(map(math.isfinite, losses_in(tmp_path / 'run')))


# ---- time

@pytest.mark.parametrize('what', [what for what, names in TIMED.items() if names])
def test_the_table_of_times(what, tmp_path, record_property):
    """Models beside their dense twins, as tools/benchmark.py times them; no time is a failure."""
    out = tmp_path / 'times.json'
    size = ['--batch-size', '2', '--img-size', '32', '--mode', 'forward'] if REHEARSAL else ['--batch-size', '32']
    equal = ['--equal-macs'] if what == 'equal MACs' else []
    assert benchmark_cli.main(
        ['model', *TIMED[what], *equal, *size, '--rounds', '3', '--device', str(DEVICE), '--json', str(out)]) == 0
    content = json.loads(out.read_text())
    assert content['rows']
    record_property('benchmark', content['rows'])


# ---- every model, in training: last, because it takes longest

@functools.lru_cache(maxsize=1)
def right(name: str) -> Step:
    return train_step(name, torch.device('cpu'), 'float64')


def differences(found: Step, expected: Step) -> Tuple[float, float]:
    """Of the logits, and of the gradient."""
    of_gradient = (found.gradient - expected.gradient).norm() / expected.gradient.norm()
    return difference(found.logits, expected.logits), float(of_gradient)


@pytest.mark.parametrize('precision', FLOORS)
@pytest.mark.parametrize('name', NAMES)
def test_a_model_trains_as_on_the_cpu(name, precision, record_property):
    """A step, with auxiliary losses and what capacity drops; all by the choices of the first, in float64 on the CPU."""
    expected = right(name)
    of_cpu = differences(train_step(name, torch.device('cpu'), precision, expected.records), expected)
    found = train_step(name, DEVICE, precision, expected.records)
    assert math.isfinite(found.loss) and found.gradient.isfinite().all()
    for what, ours, theirs, floor in zip(
            ('difference', 'difference of the gradient'), differences(found, expected), of_cpu, FLOORS[precision]):
        check_difference(ours, theirs, floor, record_property, what)
