"""The command line of evaluation: `tools/eval_imagenet.py`, `moe-zoo eval-imagenet`."""
import argparse
import csv
import json
from pathlib import Path
from typing import Any, List, Mapping, Optional, Sequence

from rich.console import Console

from ..analysis.run_folders import Unusable, read_training
from ..analysis.usage import usage_table
from ..errors import atomic_write, counted, exit_on_input_error
from .config import parse_command_line
from .evaluate import averaged, evaluate
from .metrics import BINS
from .outcomes import FILE
from .record import main as record

SHOWN = 5  # classes of the worst and of the best
PACE = {'workers', 'device', 'batch_size', 'validation_batch_size', 'pin_mem'}  # options that change no figure

EXAMPLES = """examples:
  moe-zoo eval-imagenet --checkpoint output/train/RUN/last.pth.tar --data-dir DIR      a run, by its own recipe
  moe-zoo eval-imagenet --model resnet50 --pretrained --data-dir IMAGENET              any model of timm
  moe-zoo eval-imagenet --model resnet50 --checkpoint FILE --data-dir DIR --class-map imagenet_class_index.json
  moe-zoo eval-imagenet --model resnet50 --pretrained --data-dir IMAGENET --real-labels real.json
  moe-zoo eval-imagenet --record output/train/RUN --data-name CIFAR-10       a result, on the card of its model
Options of the recipe are those of train-imagenet: val_split=test batch_size=64 device=cpu crop_pct=0.95.
Folders are synsets (any part of the thousand) or, as in ImageNet V2, numbers from 0 to 999."""


def parser() -> argparse.ArgumentParser:
    """The command line; everything of a recipe is `key=value`."""
    result = argparse.ArgumentParser(
        description='Accuracy (overall, by class, on ReaL labels), calibration, cost, throughput and expert use of a '
                    'classification model.',
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add('--config', '-c', metavar='FILE', help='recipe; by default that of the checkpoint')
    add('--model', metavar='NAME', help='any model of timm or moe_zoo; by default that of the checkpoint')
    add('--pretrained', action='store_true', help="take the model's published weights")
    add('--checkpoint', metavar='FILE', help='weights of this tool, of timm, or .safetensors')
    add('--use-ema', action='store_true', help='take the averaged weights of the checkpoint')
    add('--data-dir', metavar='DIR', help='folder with a folder for the split, or of class folders')
    add('--class-map', metavar='FILE', help="index of every class folder: timm's .txt or a class-index .json")
    add('--real-labels', metavar='FILE', help='real.json of google-research/reassessed-imagenet')
    add('--bins', type=int, default=BINS, metavar='N', help=f'bins of the calibration error (default {BINS})')
    add('--strict-data', action='store_true', help='refuse corrupt images instead of skipping them')
    add('--per-image-groups', action='store_true',
        help='routing groups of one image each: where capacity drops tokens, the figures depend on no batch size')
    add('--no-usage', action='store_true', help='leave out the second pass that measures expert use')
    add('--no-time', action='store_true', help='leave out the time beside that of the dense twin')
    add('--json', metavar='OUT', help='also write the figures to this file')
    add('--csv', metavar='OUT', help='also write accuracy by class to this file')
    add('--outcomes', metavar='OUT', help='also write what became of every image, for moe-zoo compare')
    add('--record', metavar='RUN', action='append',
        help='enter a finished run (the folder of its seeds, or several) into the card of its model')
    add('--data-name', metavar='NAME', help='with --record: what the data are called on the card')
    add('options', nargs='*', metavar='key=value', help='options that win over the recipe')
    return result


@exit_on_input_error
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit code."""
    flags, overrides = parse_command_line(argv, parser())
    if flags.record:
        return record(flags, overrides)
    for name in ('model', 'pretrained', 'class_map', 'per_image_groups'):
        if getattr(flags, name):
            overrides[name] = getattr(flags, name)
    result = evaluate(flags.config, overrides, checkpoint=flags.checkpoint, use_ema=flags.use_ema,
                      strict_data=flags.strict_data, usage=not flags.no_usage, real_labels=flags.real_labels,
                      bins=flags.bins, time_twin=not flags.no_time)
    out = Console(highlight=False, soft_wrap=True)
    for line in describe(result):
        out.print(line, markup=False)
    _write(result, flags, _kept_by_run(flags, overrides, result))
    return 0


def describe(result: Mapping[str, Any]) -> List[str]:
    """What `evaluate` found, as lines to print."""
    found = f'top-1 {result["top1"]:.2f} %, top-5 {result["top5"]:.2f} %, loss {result["loss"]:.4f}'
    cut, speed = result['input'], result['throughput']
    lines = [
        f'{result["model"]}: {found} on {counted(result["images"], "image")} of {result["data"]}',
        f'images: {" x ".join(map(str, cut["input_size"]))}, crop {cut["crop_pct"]:g} ({cut["crop_mode"]}),'
        f' {cut["interpolation"]}, mean {_triple(cut["mean"])}, std {_triple(cut["std"])}',
        f'calibration error {result["calibration"]["error"]:.2f} points (ECE, {result["calibration"]["bins"]} bins of'
        ' equal width)',
    ]
    if result['real']:
        real = result['real']
        lines.append(f'ReaL labels: top-1 {real["top1"]:.2f} %, top-5 {real["top5"]:.2f} % on the'
                     f' {counted(real["images"], "image")} that have any')
    ranked = sorted(result['classes'], key=lambda row: row['top1'])
    if len(ranked) > 1:
        lines += [f'{what} classes: {"; ".join(map(_class, rows))}' for what, rows in (
            ('worst', ranked[:SHOWN]), ('best', ranked[::-1][:SHOWN]))]
    rate = speed['model_images_per_second']
    lines += [
        f'{result["parameters"]:,} parameters, of which {result["active_parameters"]:,} work on one item;'
        f' at most {result["macs"]:,} MACs an image, {result["macs_executed"]:,.0f} executed',
        *_beside_twin(result['twin']),
        f'{speed["images_per_second"]:.1f} images a second, {rate:.1f} in the model alone'
        f' ({rate * result["macs_executed"] / 1e9:.1f} billion MACs a second), in batches of {speed["batch_size"]} on'
        f' {counted(speed["machine"]["threads"], "thread")} of {speed["machine"]["device"]}',
    ]
    if result['uncounted']:
        lines.append(f'not counted: {", ".join(result["uncounted"])}')
    return [*lines, usage_table(result['usage'])] if result['usage'] else lines


def _beside_twin(found: Optional[Mapping[str, Any]]) -> List[str]:
    """Whether the MACs turn into time, next to their number."""
    if not found:
        return []
    says = 'no more than the MACs say' if found['becomes_time'] else 'these MACs do not turn into time'
    return [f'{found["macs"]:.2f} of the MACs of the dense twin {found["twin"]}, {found["time"]:.2f} of its time'
            f' ({found["low"]:.2f} to {found["high"]:.2f}): {says}']


def _triple(values: Sequence[float]) -> str:
    return ' '.join(f'{value:g}' for value in values)


def _class(row: Mapping[str, Any]) -> str:
    return f'{row["name"]} {row["top1"]:.0f} % of {row["images"]}'


def _kept_by_run(flags: argparse.Namespace, overrides: Mapping[str, Any], result: Mapping[str, Any]) -> Optional[Path]:
    """Where a run keeps these outcomes: they are those of its own evaluation, of the weights that it ended with."""
    checkpoint = Path(flags.checkpoint or '')
    if checkpoint.name != 'last.pth.tar' or flags.config or set(overrides) - PACE or not result['as_trained']:
        return None
    try:
        run = read_training(checkpoint.parent)
    except Unusable:
        return None
    return run.folder / FILE if averaged(run.options) == flags.use_ema else None


def _write(result: Mapping[str, Any], flags: argparse.Namespace, kept: Optional[Path]) -> None:
    """The files that were asked for, and what the folder of a run keeps."""
    if flags.json:
        figures = {key: value for key, value in result.items() if key != 'outcomes'}
        figures['usage'] = [usage.as_dict() for usage in result['usage'].values()]
        with atomic_write(flags.json) as temporary:
            temporary.write_text(json.dumps(figures, indent=1) + '\n')
    if flags.csv:
        with atomic_write(flags.csv) as temporary, open(temporary, 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, list(result['classes'][0]))
            writer.writeheader()
            writer.writerows(result['classes'])
    for path in filter(None, (flags.outcomes, kept)):
        result['outcomes'].write(path)


if __name__ == '__main__':
    raise SystemExit(main())
