"""The classifier of a finished run, brought back with its evaluation images, for `moe-zoo report` to measure."""
import torch

from ..analysis.measure_runs import COUNTED, USED, Opened
from ..analysis.run_folders import Training
from ..errors import InputError
from .inference import load_images, open_classifier


def reopen(training: Training) -> Opened:
    """The model of a training with its last weights, and images of the split it was evaluated on.

    Raises:
        InputError: The checkpoint cannot be used.
    """
    overrides = {'workers': 0}
    try:
        classifier, dataset = open_classifier(training.checkpoint, overrides=overrides)
        images = load_images(classifier, dataset, USED)
    except InputError:  # the data moved; if it is the checkpoint that is bad, the next line says so
        classifier, _ = open_classifier(training.checkpoint, overrides=overrides, with_data=False)
        images = None
    options = {'device': str(classifier.device), 'precision': classifier.autocast}
    if images is None:
        noise = torch.randn(1, *classifier.data_config['input_size'], device=classifier.device)
        return Opened(classifier.model, [noise.to(next(classifier.model.parameters()).dtype)], None, False, **options)
    number = len(images.targets)
    some = [i * number // min(COUNTED, number) for i in range(min(COUNTED, number))]
    inputs = list(classifier.normalise(images.pixels[some]).split(1))
    size = classifier.args.validation_batch_size or classifier.args.batch_size
    return Opened(classifier.model, inputs, images.batches(classifier, size), True, **options)
