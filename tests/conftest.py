"""Fixtures of every test: fixed seeds, few threads, and the folders of real data where they exist."""
import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]

# One thread: the tensors are small, sums keep one order from machine to machine, and nothing waits for a busy core.
torch.set_num_threads(1)
os.environ.setdefault('OMP_NUM_THREADS', '1')  # for the processes that tests start


@pytest.fixture(autouse=True)
def seeds():
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def loggers():
    """No detector that was trained before goes on writing to what was its test's standard output."""
    for name in ('detectron2', 'fvcore', 'moe_zoo'):
        logging.getLogger(name).handlers.clear()


@pytest.fixture(scope='session')
def repository() -> Path:
    """The checkout that these tests belong to."""
    return REPOSITORY


@pytest.fixture(scope='session')
def shared_data() -> Path:
    """Folder of real test data: MOE_ZOO_TEST_DATA, or ../shared/data beside the repository."""
    return _existing(_data_folder())


@pytest.fixture(scope='session')
def shared_parity() -> Path:
    """Folder of recorded outputs of original implementations: parity/ beside the data folder."""
    return _existing(_data_folder().parent / 'parity')


def _data_folder() -> Path:
    return Path(os.environ.get('MOE_ZOO_TEST_DATA') or REPOSITORY.parent / 'shared' / 'data')


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f'{folder} is missing (set MOE_ZOO_TEST_DATA to the folder of test data)')
    return folder.resolve()


def pytest_collection_modifyitems(items):
    """Tests marked gpu skip themselves where CUDA is missing, but for the rehearsal of tools/gpu_check.sh."""
    if torch.cuda.is_available() or os.environ.get('MOE_ZOO_GPU_DEVICE', 'cuda') == 'cpu':
        return
    skip = pytest.mark.skip(reason='needs CUDA')
    for item in items:
        if item.get_closest_marker('gpu'):
            item.add_marker(skip)
