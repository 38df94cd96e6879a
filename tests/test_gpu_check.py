"""tools/gpu_check.sh without a GPU: what it says, a part of its rehearsal, and what its report holds."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import test_gpu
import torch
from small_models import small_model


def run(repository: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    kept = {key: value for key, value in os.environ.items() if key != 'MOE_ZOO_GPU_DEVICE'}
    return subprocess.run(
        [str(repository / 'tools' / 'gpu_check.sh'), *arguments], capture_output=True, text=True,
        stdin=subprocess.DEVNULL, env={**kept, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1', **environment})


@pytest.mark.skipif(torch.cuda.is_available(), reason='speaks of machines without CUDA')
def test_without_cuda_it_is_one_sentence(repository, tmp_path):
    done = run(repository, str(tmp_path / 'out.json'))
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    assert done.stderr == (
        'error: torch sees no CUDA device here, which is what this checks; MOE_ZOO_GPU_DEVICE=cpu rehearses it on the'
        ' CPU.\n')


def test_other_mistakes_are_one_sentence_too(repository, tmp_path):
    done = run(repository, 'out.txt')
    assert done.returncode == 2 and done.stderr == "error: OUT 'out.txt': name the file that is to be written *.json.\n"
    done = run(repository, PYTHON='/nowhere/python')
    assert done.returncode == 2
    assert done.stderr == (
        'error: /nowhere/python has no torch or no pytest: run tools/setup.sh, or name another by'
        ' PYTHON=/path/to/python.\n')
    done = run(repository, '--help')
    assert done.returncode == 0 and '  tools/gpu_check.sh [OUT.json]' in done.stdout and 'set -euo' not in done.stdout


@pytest.mark.parametrize('precision', list(test_gpu.FLOORS))
def test_the_lines_that_a_gpu_runs(precision, monkeypatch):
    """On the CPU, without the script: bfloat16 has 8 bits of mantissa, float32 has 24."""
    monkeypatch.setattr(test_gpu, 'DEVICE', torch.device('cpu'))
    found = {}
    test_gpu.test_a_model_trains_as_on_the_cpu('vmoe_vit_s', precision, found.__setitem__)
    low, high = (1e-8, 1e-5) if precision == 'float32' else (1e-4, 1e-2)
    assert low < found['difference'] < high and low < found['difference of the gradient'] < 10 * high
    test_gpu.test_a_model_evaluates_as_on_the_cpu('pmoe_cnn', found.__setitem__)
    assert found['difference'] < 1e-5


def test_what_is_too_far_off_fails(monkeypatch):
    """Four times what the CPU is off, or the floor: 4 * 0.01 = 0.04, and 0.05 where the CPU is off by nothing."""
    found = {}
    test_gpu.check_difference(0.039, 0.01, 0., found.__setitem__)
    test_gpu.check_difference(0.049, 0., 0.05, found.__setitem__)
    assert found == {'difference': 0.049, 'difference: bound': 0.05}
    for off, of_cpu, floor in ((0.041, 0.01, 0.), (0.051, 0., 0.05), (float('nan'), 1., 1.)):
        with pytest.raises(AssertionError, match='and the CPU is off by'):
            test_gpu.check_difference(off, of_cpu, floor, found.__setitem__)
    # a device that computes something else: another model on the same images
    monkeypatch.setattr(test_gpu, 'DEVICE', torch.device('cpu'))
    monkeypatch.setattr(test_gpu, 'small_model', lambda name: spoiled(small_model(name)))
    with pytest.raises(AssertionError):
        test_gpu.test_a_model_evaluates_as_on_the_cpu('pmoe_cnn', found.__setitem__)


def spoiled(model: torch.nn.Module) -> torch.nn.Module:
    """Moved to a device, it computes a thousandth more."""
    move = model.to
    model.to = lambda device: move(device).requires_grad_(False).apply(_more)
    return model


def _more(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.mul_(1.001)


@pytest.mark.slow
def test_a_part_of_the_rehearsal(repository, tmp_path):
    """A model in three precisions, and a row of the table, in the folder of the caller."""
    out = tmp_path / 'a folder' / 'found.json'
    done = run(repository, str(out), '-k', 'vmoe_vit_l or table', MOE_ZOO_GPU_DEVICE='cpu')
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = json.loads(out.read_text())
    assert (found['pass'], found['fail'], found['skip']) == (5, 0, 0) and found['device']['rehearsal'] is True
    assert found['versions']['torch'] == torch.__version__ and found['versions']['moe_zoo']
    for check in found['checks']:
        if 'table' not in check['check']:
            assert 0 < check['difference'] <= check['difference: bound']
    row, = found['benchmark']
    assert row['model'] == 'dyconv_resnet10' and row['time_ratio']['median'] > 0


@pytest.mark.slow
def test_a_failure_and_a_skip_are_told(repository, tmp_path):
    """In a session of its own: the report of tests that pass, fail, skip, and come too late."""
    (tmp_path / 'test_some.py').write_text("""
import gpu_report
import pytest

def test_passes(record_property):
    record_property('difference', 0.5)

def test_fails():
    assert 1 == 2

def test_skips():
    pytest.skip('no reason')

def test_breaks(nothing):
    pass

def test_is_the_last_in_time(monkeypatch):
    gpu_report.LIMIT = -1

def test_is_late():
    raise ValueError
""")
    report = tmp_path / 'out.json'
    path = os.pathsep.join((str(repository / 'tests'), str(repository)))
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-c', os.devnull, '--rootdir', str(tmp_path), '-p', 'gpu_report',
         '-p', 'no:cacheprovider', 'test_some.py'], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, 'PYTHONPATH': path, 'MOE_ZOO_GPU_REPORT': str(report), 'MOE_ZOO_GPU_DEVICE': 'cpu'})
    assert done.returncode == 1
    found = json.loads(report.read_text())
    assert (found['pass'], found['fail'], found['skip']) == (2, 2, 2)
    by_name = {check['check']: check for check in found['checks']}
    assert by_name['test_passes']['difference'] == 0.5 and by_name['test_passes']['outcome'] == 'pass'
    assert 'assert 1 == 2' in by_name['test_fails']['reason']
    assert "fixture 'nothing' not found" in by_name['test_breaks']['reason']
    assert by_name['test_skips']['reason'] == 'no reason'
    assert by_name['test_is_late']['reason'] == '-1 seconds were over'
