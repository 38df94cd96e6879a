"""Evaluate a classification model: `tools/eval_imagenet.py`, `moe-zoo eval-imagenet`."""
import argparse
import contextlib
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Union

import torch
from rich.console import Console
from timm import utils
from timm.data import resolve_data_config
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from torch import nn
from torch.utils.data import Dataset

from ..data.random_state import iterate_apart
from ..errors import InputError, atomic_write, counted, exit_on_input_error
from ..layers import RoutedLayer
from .build import mixed_precision, open_device
from .checkpoint import read_checkpoint
from .config import load_config, parse_command_line, parse_overrides
from .data import LEFT_OUT, CheckedImages, create_loaders, settle_num_classes
from .inference import known_classes, load_model, open_evaluation, recipe_of
from .log import Reporter


@torch.no_grad()
def evaluate_loader(
        model: nn.Module,
        loader: Any,
        evaluator: ClassificationEvaluator,
        args: argparse.Namespace,
        device: torch.device,
        autocast: Callable = contextlib.nullcontext,
) -> Dict[str, float]:
    """Loss and accuracy over a loader, summed over ranks; images that could not be read are left out.

    Args:
        model: Anything that maps images to logits; left in evaluation mode.
        evaluator: timm's accumulator.

    Returns:
        loss, top1 and top5, the latter two in percent.
    """
    model.eval()
    dtype = getattr(torch, args.model_dtype or 'float32')
    limit, seen = evaluation_sample_limit(loader), 0
    for images, target in iterate_apart(loader, args.seed, 0, args.rank):
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
    return {name: float(value) for name, value in evaluator.compute(distributed=args.distributed).items()}


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

    Returns:
        model, images, top1, top5, loss, parameters, active_parameters, macs (at most, of one image), usage (layer name
        to the figures of `moe_zoo.analysis.measure_usage`) and corrupt (paths of skipped images).

    Raises:
        InputError: Something that was given cannot be used.
    """
    from ..analysis.cost import count
    from ..analysis.usage import measure_usage
    content = read_checkpoint(checkpoint) if checkpoint else {}
    overrides = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    args = load_config(recipe_of(config, content, overrides, checkpoint), overrides)
    if not (checkpoint or args.initial_checkpoint or args.pretrained or args.pretrained_path):
        raise InputError('Nothing to evaluate: give --checkpoint FILE, or pretrained=true for a model with weights.')
    reporter, device = Reporter(quiet), open_device(args)
    reporter.primary = utils.is_primary(args)
    dataset = open_evaluation(args, known_classes(content), strict_data)
    settle_num_classes(args, None, dataset)
    model = load_model(args, content, checkpoint, use_ema, device)
    data_config = resolve_data_config(vars(args), model=model, use_test_size=not (args.img_size or args.input_size))
    loader = create_loaders(args, data_config, None, dataset, device).eval
    autocast, _ = mixed_precision(args, device)
    found = evaluate_loader(model, loader, ClassificationEvaluator(device=device), args, device, autocast)
    image = torch.zeros(1, *data_config['input_size'], device=device, dtype=next(model.parameters()).dtype)
    cost = count(model, image)
    corrupt = report_corrupt(reporter, dataset)
    return {
        'model': args.model,
        'images': len(dataset) - len(corrupt),
        **{name: found[name] for name in ('top1', 'top5', 'loss')},
        'parameters': cost.parameters,
        'active_parameters': cost.active_parameters,
        'macs': cost.macs_max,
        'usage': measure_usage(model, loader) if usage and _routes(model) else {},
        'corrupt': corrupt,
    }


def _routes(model: nn.Module) -> bool:
    return any(isinstance(module, RoutedLayer) for module in model.modules())


def parser() -> argparse.ArgumentParser:
    """The command line; everything of a recipe is `key=value`."""
    result = argparse.ArgumentParser(
        description='Accuracy, cost and expert use of a trained classification model.',
        epilog='Options are those of train-imagenet, for example val_split=test batch_size=64 device=cpu.')
    result.add_argument('--config', '-c', metavar='FILE', help='recipe; by default that of the checkpoint')
    result.add_argument('--checkpoint', metavar='FILE', help='weights of this tool, of timm, or .safetensors')
    result.add_argument('--data-dir', metavar='DIR', help='folder with a folder for the split, or of class folders')
    result.add_argument('--use-ema', action='store_true', help='take the averaged weights of the checkpoint')
    result.add_argument('--strict-data', action='store_true', help='refuse corrupt images instead of skipping them')
    result.add_argument('--no-usage', action='store_true', help='leave out the second pass that measures expert use')
    result.add_argument('--json', metavar='OUT', help='also write the figures to this file')
    result.add_argument('options', nargs='*', metavar='key=value', help='options that win over the recipe')
    return result


@exit_on_input_error
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit code."""
    from ..analysis.usage import usage_table
    flags, overrides = parse_command_line(argv, parser())
    result = evaluate(flags.config, overrides, checkpoint=flags.checkpoint, use_ema=flags.use_ema,
                      strict_data=flags.strict_data, usage=not flags.no_usage)
    out = Console(highlight=False, soft_wrap=True)
    found = f'top-1 {result["top1"]:.2f} %, top-5 {result["top5"]:.2f} %, loss {result["loss"]:.4f}'
    out.print(f'{result["model"]}: {found} on {counted(result["images"], "image")}', markup=False)
    out.print(f'{result["parameters"]:,} parameters, of which {result["active_parameters"]:,} work on one item;'
              f' at most {result["macs"]:,} MACs an image', markup=False)
    if result['usage']:
        out.print(usage_table(result['usage']), markup=False)
    if flags.json:
        figures = {**result, 'usage': [usage.as_dict() for usage in result['usage'].values()]}
        with atomic_write(flags.json) as temporary:
            temporary.write_text(json.dumps(figures, indent=1) + '\n')
    return 0


if __name__ == '__main__':
    raise SystemExit(main())
