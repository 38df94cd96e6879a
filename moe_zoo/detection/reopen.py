"""The detector of a finished run, brought back with its test images, for `moe-zoo report` to measure."""
import itertools
import logging
import warnings

from ..analysis.measure_runs import COUNTED, USED, Opened
from ..analysis.run_folders import Training
from ..errors import InputError
from .count_inputs import load, noise
from .evaluation import build_test_loader


def reopen(training: Training) -> Opened:
    """The detector of a training with its last weights on the CPU, and images of its first test set.

    Raises:
        InputError: The config or the checkpoint cannot be used.
    """
    logging.getLogger('fvcore.common.checkpoint').setLevel(logging.WARNING)
    warnings.filterwarnings('ignore', message='torch.meshgrid')  # detectron2's, once a process
    cfg, model = load(str(training.folder / 'config.yaml'), ['DATALOADER.NUM_WORKERS', '0'], str(training.checkpoint))
    model.eval()
    try:
        loader = build_test_loader(cfg, cfg.DATASETS.TEST[0])
        every = max(1, len(loader) // COUNTED)
        inputs = list(itertools.islice(loader, 0, every * COUNTED, every))
    except (InputError, IndexError):  # the data moved, or there never was a test set
        inputs = []
    if not inputs:
        return Opened(model, [noise(cfg)], None, False)
    return Opened(model, inputs, itertools.islice(loader, USED), True)
