"""Evaluate a classification model: accuracy (overall, by class, on ReaL labels), calibration, cost, speed, expert use.

The accuracy is that of timm's validate.py on the same weights and batches, to its last digit.
"""
import argparse
import contextlib
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Union

import timm
import torch
from timm import utils
from timm.data import resolve_data_config, resolve_input_data_config
from timm.models import is_model
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from ..analysis.cost import count
from ..analysis.timing import machine
from ..analysis.usage import measure_usage
from ..data.random_state import iterate_apart
from ..errors import InputError, counted
from ..faults import interruptible
from ..layers import RoutedLayer
from .build import mixed_precision, model_keywords, open_device
from .checkpoint import classes_in, find_weights, read_checkpoint
from .compare import beside_twin
from .config import load_config, parse_overrides
from .data import LEFT_OUT, CheckedImages, class_list, class_names, create_loaders, holds_out, settle_num_classes
from .inference import known_classes, load_model, open_evaluation, readable, recipe_of
from .labels import CLASSES, read_real_labels, real_labels_of
from .log import Reporter
from .metrics import BINS, accuracy_by_class, calibration, real_accuracy
from .outcomes import OutcomeLog

COUNTED = 16  # images whose MACs are counted as executed


@torch.no_grad()
def evaluate_loader(
        model: nn.Module,
        loader: Any,
        evaluator: ClassificationEvaluator,
        args: argparse.Namespace,
        device: torch.device,
        autocast: Callable = contextlib.nullcontext,
        log: Optional[OutcomeLog] = None,
) -> Dict[str, float]:
    """Loss and accuracy over a loader, summed over ranks; images that could not be read are left out.

    Args:
        model: Anything that maps images to logits; left in evaluation mode.
        evaluator: timm's accumulator.
        log: Is told what became of every image.

    Returns:
        loss, top1 and top5, the latter two in percent.
    """
    model.eval()
    dtype = getattr(torch, args.model_dtype or 'float32')
    limit, seen = evaluation_sample_limit(loader), 0
    # Of a stream, processes may read unequally many batches.
    checks = 0 if args.distributed and isinstance(loader.dataset, IterableDataset) else None
    for images, target in interruptible(iterate_apart(loader, args.seed, 0, args.rank), checks):
        if not args.prefetcher:
            images, target = images.to(device, dtype), target.to(device)
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast():
            output = model(images)
        output = output[0] if isinstance(output, (tuple, list)) else output
        real = target != LEFT_OUT
        if limit is not None:  # the sampler repeats images so that ranks have equally many
            real &= torch.arange(seen, seen + len(target), device=target.device) < limit
            seen += len(target)
        evaluator.update(output[real], target[real])
        if log is not None:
            log.add(output, target, real)
    return {name: float(value) for name, value in evaluator.compute(distributed=args.distributed).items()}


class Stopwatch:
    """While it is open: how many images a model saw in each forward pass, and the seconds that took.

    Attributes:
        passes: (images, seconds) of every pass.
        sample: The first images, at most `COUNTED`.
    """

    def __init__(self, model: nn.Module, device: torch.device):
        self.model, self.device = model, device
        self.passes: List[tuple] = []
        self.sample: Optional[torch.Tensor] = None

    def __enter__(self) -> 'Stopwatch':
        self.hooks = [self.model.register_forward_pre_hook(self._before), self.model.register_forward_hook(self._after)]
        return self

    def __exit__(self, *error) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, model: nn.Module, inputs: tuple) -> None:
        if self.sample is None:
            self.sample = inputs[0][:COUNTED].clone()
        self.begun = self._now()

    def _after(self, model: nn.Module, inputs: tuple, output: Any) -> None:
        self.passes.append((len(inputs[0]), self._now() - self.begun))

    def _now(self) -> float:
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def rate(self) -> float:
        """Images a second of the model alone; the first pass warms up, where there are more."""
        images, seconds = zip(*(self.passes[1:] or self.passes))
        return sum(images) / sum(seconds)


def report_corrupt(reporter: Reporter, *datasets: Optional[Dataset]) -> List[str]:
    """Name the unreadable images that were found since the last call, and return all of them."""
    files: List[str] = []
    for dataset in datasets:
        if isinstance(dataset, CheckedImages):
            files += dataset.corrupt_files()
    named = getattr(reporter, 'corrupt', set())
    for file in files:
        if file not in named:
            reporter.warn(f"skipped corrupt image '{file}'")
    if set(files) - named:
        reporter.warn(f'{counted(len(files), "corrupt image")} skipped so far; --strict-data refuses them')
    reporter.corrupt = named | set(files)
    return files


def evaluate(
        config: Union[str, Path, Mapping[str, Any], None] = None,
        overrides: Union[Sequence[str], Mapping[str, Any]] = (),
        *,
        checkpoint: Optional[Union[str, Path]] = None,
        use_ema: bool = False,
        strict_data: bool = False,
        usage: bool = True,
        real_labels: Optional[Union[str, Path]] = None,
        bins: int = BINS,
        as_trained: bool = False,
        time_twin: bool = False,
        quiet: bool = False,
) -> Dict[str, Any]:
    """Evaluate one model on the evaluation split of a data set.

    Args:
        config: A recipe; without one, what the checkpoint says of its own.
        overrides: `key=value` strings or a mapping that win over it.
        checkpoint: Weights; without them `initial_checkpoint` or `pretrained` of the recipe.
        use_ema: Take the averaged weights of the checkpoint.
        strict_data: Refuse unreadable images.
        usage: Also measure how the experts were used, in a second pass.
        real_labels: real.json of google-research/reassessed-imagenet.
        bins: Of confidence, for the calibration error.
        as_trained: Crop the images as training evaluated them, where the model's configuration has another size or
            crop for tests.
        time_twin: Also time the model beside its dense twin.

    Returns:
        What `figures` returns, usage (layer name to the figures of `moe_zoo.analysis.measure_usage`), and twin (what
        `compare.beside_twin` returns, or None).

    Raises:
        InputError: Something that was given cannot be used.
    """
    labels = read_real_labels(real_labels) if real_labels else None
    content = read_checkpoint(checkpoint) if checkpoint else {}
    overrides = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    recipe = recipe_of(config, content, overrides, checkpoint)
    args = load_config(recipe, overrides)
    if not (checkpoint or args.initial_checkpoint or args.pretrained or args.pretrained_path):
        raise InputError('Nothing to evaluate: give --checkpoint FILE, or --pretrained for a model with weights.')
    reporter, device = Reporter(quiet), open_device(args)
    reporter.primary = utils.is_primary(args)
    model, dataset = _open(args, content, checkpoint, use_ema, strict_data, device)
    if labels is not None and model.num_classes != CLASSES:
        raise InputError(f'--real-labels are of {CLASSES:,} classes, and {args.model!r} has {model.num_classes:,}.')
    data_config = _input(args, model, recipe, as_trained)
    loader = create_loaders(args, data_config, None, dataset, device).eval
    found = figures(args, model, dataset, loader, data_config, reporter, labels, bins)
    routes, sample = any(isinstance(module, RoutedLayer) for module in model.modules()), found.pop('sample')
    return {
        **found,
        'usage': measure_usage(model, loader) if usage and routes else {},
        'twin': beside_twin(args, model, sample) if time_twin and routes else None,
    }


def figures(
        args: argparse.Namespace,
        model: nn.Module,
        dataset: Dataset,
        loader: Any,
        data_config: Mapping[str, Any],
        reporter: Reporter,
        labels: Optional[Sequence[Sequence[int]]] = None,
        bins: int = BINS,
) -> Dict[str, Any]:
    """Everything that one pass over the images tells.

    Returns:
        model, data (its name), images, top1, top5, loss, parameters, active_parameters, macs (at most, of one image),
        macs_executed (mean of the first `COUNTED` images), uncounted (operators), corrupt (paths of skipped images),
        classes (rows of `metrics.accuracy_by_class`), calibration, real (None without labels), input (size and crop of
        the images), as_trained (whether training evaluates with these), throughput, outcomes
        (`moe_zoo.engine.outcomes.Outcomes`) and sample (the first `COUNTED` images).
    """
    device = torch.device(args.device)
    autocast, _ = mixed_precision(args, device)
    log, begun = OutcomeLog(args.rank, args.world_size), time.perf_counter()
    with Stopwatch(model, device) as watch:
        found = evaluate_loader(model, loader, ClassificationEvaluator(device=device), args, device, autocast, log)
    seconds = time.perf_counter() - begun
    name = data_name(args, dataset)
    outcomes = log.finish(dataset, {'model': args.model, 'data': name, 'split': args.val_split})
    names = [readable(each) for each in class_list(class_names(dataset), model.num_classes)]
    return {
        'model': args.model,
        'data': name,
        'images': len(outcomes),
        **{key: found[key] for key in ('top1', 'top5', 'loss')},
        **_costs(model, watch.sample),
        'corrupt': report_corrupt(reporter, dataset),
        'classes': accuracy_by_class(outcomes, names),
        'calibration': calibration(outcomes, bins),
        'real': real_accuracy(outcomes, real_labels_of(outcomes.images, labels)) if labels is not None else None,
        'input': data_config,
        'as_trained': data_config == resolve_data_config(vars(args), model=model),
        'throughput': _throughput(args, seconds, len(outcomes), watch),
        'outcomes': outcomes,
        'sample': watch.sample,
    }


def _open(args: argparse.Namespace, content: Mapping, checkpoint: Any, use_ema: bool, strict: bool, device: Any):
    """The model with its weights, and the images."""
    known = known_classes(content)
    source = checkpoint or args.initial_checkpoint
    if source and args.num_classes is None:
        weights = find_weights(content or read_checkpoint(source), source, use_ema)
        args.num_classes = len(known) or _classes_of_weights(args, weights)
    if args.num_classes is None and not args.pretrained:  # nothing but the data tells
        settle_num_classes(args, None, open_evaluation(args, known, strict))
    model = load_model(args, content, checkpoint, use_ema, device)
    dataset = open_evaluation(args, known, strict)
    settle_num_classes(args, None, dataset)
    return model, dataset


def _classes_of_weights(args: argparse.Namespace, weights: Mapping[str, torch.Tensor]) -> Optional[int]:
    """Number of classes of a bare file of weights; None where it cannot be told."""
    if ':' not in args.model and not is_model(args.model.partition('.')[0]):
        return None  # building it will say so
    try:
        return classes_in(timm.create_model(device='meta', **model_keywords(args)), weights)
    except (TypeError, ValueError, RuntimeError, AssertionError):
        return None


def _input(args: argparse.Namespace, model: nn.Module, recipe: Mapping[str, Any], as_trained: bool) -> Dict[str, Any]:
    """Size, crop, interpolation, mean and deviation of the images: the model's own but for what was given.

    A recipe's size is that of training: images are then cropped as training evaluated them. Otherwise by the
    configuration for tests, as timm's validate.py does.
    """
    sized = not isinstance(recipe, Mapping) or any(recipe.get(name) for name in ('img_size', 'input_size'))
    if as_trained or sized and (args.img_size or args.input_size):
        return resolve_data_config(vars(args), model=model)
    try:
        return resolve_input_data_config(model, vars(args), use_test_size=True)
    except ValueError as error:
        raise InputError(f'The images cannot be made for {args.model!r}: {error}') from error


def _costs(model: nn.Module, sample: torch.Tensor) -> Dict[str, Any]:
    bound, ran = count(model, sample[:1]), count(model, sample)
    return {
        'parameters': bound.parameters, 'active_parameters': bound.active_parameters, 'macs': bound.macs_max,
        'macs_executed': ran.macs_executed / len(sample), 'uncounted': sorted(bound.uncounted)}


def _throughput(args: argparse.Namespace, seconds: float, images: int, watch: Stopwatch) -> Dict[str, Any]:
    return {
        'images_per_second': images / seconds, 'model_images_per_second': watch.rate(),
        'batch_size': args.validation_batch_size or args.batch_size, 'workers': args.workers,
        'processes': args.world_size, 'machine': machine(args.device)}


def data_name(args: argparse.Namespace, dataset: Dataset) -> str:
    """What was evaluated on: the digits, the folder of the images, or timm's name with the split."""
    if args.dataset == 'digits':
        return f"scikit-learn's digits, {args.val_split}"
    reader = getattr(dataset, 'reader', None)
    if isinstance(dataset, CheckedImages):
        folder, held = Path(reader.root).resolve(), f', {args.val_share:g} of it held out' if holds_out(args) else ''
        return f"the folder '{'/'.join(folder.parts[-2:])}'{held}"
    return f'{args.dataset}, {args.val_split}'


def averaged(options: Mapping[str, Any]) -> bool:
    """Whether a run with these options tells of the moving average of its weights."""
    return bool(options.get('model_ema') and not options.get('model_ema_force_cpu'))
