"""A pytest plugin: what became of every test, in one JSON file, for `tools/gpu_check.sh`.

Loaded by `-p gpu_report`; MOE_ZOO_GPU_REPORT names the file. What a test found besides comes by `record_property`:
`difference` (to the CPU, of the largest value), `bound` (what it may be), `benchmark` (rows of a table), and others.
After `LIMIT` seconds no further test is started.
"""
import json
import os
import platform
import time
from typing import Any, Dict, List

import pytest
import torch

from moe_zoo.analysis.origin import versions
from moe_zoo.errors import atomic_write

LIMIT = 540
OUTCOMES = {'passed': 'pass', 'failed': 'fail', 'skipped': 'skip'}

_checks: List[Dict[str, Any]] = []
_started = time.monotonic()


def pytest_runtest_setup(item):
    if time.monotonic() - _started > LIMIT:
        pytest.skip(f'{LIMIT} seconds were over')


def pytest_runtest_logreport(report):
    if report.when != 'call' and report.outcome == 'passed':
        return
    check = {
        'check': report.nodeid.rpartition('::')[2], 'outcome': OUTCOMES[report.outcome],
        'seconds': round(report.duration, 2), **dict(report.user_properties)}
    if report.outcome == 'skipped':
        check['reason'] = str(report.longrepr[2]).removeprefix('Skipped: ')
    elif report.outcome == 'failed':
        check['reason'] = report.longreprtext[-2000:]
    _checks.append(check)


def pytest_sessionfinish(session):
    counts = {outcome: sum(check['outcome'] == outcome for check in _checks) for outcome in OUTCOMES.values()}
    content = {
        'about': 'tools/gpu_check.sh of moe_zoo', 'device': device(), 'versions': software(),
        'seconds': round(time.monotonic() - _started, 1), **counts,
        'benchmark': [row for check in _checks for row in check.pop('benchmark', ())], 'checks': _checks}
    with atomic_write(os.environ['MOE_ZOO_GPU_REPORT']) as part:
        part.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')


def software() -> Dict[str, Any]:
    found = {**versions(), 'python': platform.python_version(), 'platform': platform.platform()}
    for name in ('torchvision', 'detectron2', 'triton'):
        try:
            found[name] = getattr(__import__(name), '__version__', 'unknown')
        except ImportError:
            found[name] = None
    if torch.version.cuda:
        nccl = torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None
        found.update(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), nccl=nccl and str(nccl))
    return found


def device() -> Dict[str, Any]:
    """The first GPU; of a rehearsal, the CPU."""
    name = os.environ.get('MOE_ZOO_GPU_DEVICE', 'cuda')
    if not name.startswith('cuda'):
        return {'name': platform.processor() or platform.machine(), 'rehearsal': True}
    first = torch.cuda.get_device_properties(0)
    return {
        'name': first.name, 'capability': f'{first.major}.{first.minor}', 'memory': first.total_memory,
        'number': torch.cuda.device_count(), 'bfloat16': torch.cuda.is_bf16_supported(), 'rehearsal': False}
