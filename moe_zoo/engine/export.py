"""A classifier as one file that runs without this package: ONNX, a program of torch.export, or TorchScript.

    moe-zoo export runs/digits --output digits.onnx

A file is written after it has been run, and compared with the model on images of which it saw none when it was made.
Detectors are exported by `moe-zoo train-coco --export`.

Letters: B images.
"""
import argparse
import contextlib
import importlib.util
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Sequence, Tuple

import torch
from timm.data.loader import adapt_to_chs
from torch import nn

from ..analysis.origin import versions
from ..errors import InputError, MissingPackage, atomic_write, counted, exit_on_input_error, nearest
from .config import parse_command_line
from .inference import Classifier, open_classifier
from .predict import find_run

FORMATS = {'onnx': '.onnx', 'pt2': '.pt2', 'torchscript': '.ts'}  # and what names of such files end in
EXTRA = 'moe_zoo.json'  # inside a file of torch's, what it is; ONNX has metadata
BATCHES = (1, 2, 5)  # of the comparison; the example of an export is a batch of 3
TOLERANCE = 1e-4
LARGEST = 2**31 - 2**24  # bytes of a protobuf file, less what the graph may take

EXAMPLES = """examples:
  moe-zoo export runs/digits --output digits.onnx                a run's best checkpoint, by its own recipe
  moe-zoo export runs/digits/last.pth.tar --output digits.pt2
  moe-zoo export vmoe_vit_b --pretrained --output vmoe.onnx      a model by name, with its published weights
  moe-zoo export folder --output model.ts                        a folder that timm saved
  moe-zoo export condconv_resnet50 --checkpoint FILE --batch 1 --output one.onnx
Options of the recipe are those of train-imagenet: num_classes=10 model_kwargs.num_experts=4."""


def export(classifier: Classifier, file: str, kind: str, batch: Optional[int] = None) -> str:
    """Write a classifier to a file, and compare the two before the file gets its name.

    It takes images, (B, C, H, W) float32 and normalised, and returns logits, (B, classes). Its metadata say what it is:
    model, input size, mean, std, crop, interpolation, classes.

    Args:
        classifier: Its model is left in float32, contiguous, in evaluation mode.
        file: Receives it.
        kind: A key of `FORMATS`.
        batch: B of every call; None is any. TorchScript takes any.

    Returns:
        What was written, in a sentence.

    Raises:
        MissingPackage: ONNX needs packages that are not there.
        InputError: The model cannot be exported, or the file does not give its outputs.
    """
    if kind == 'onnx':
        _check_packages()
    model = classifier.model.cpu().float().to(memory_format=torch.contiguous_format).eval().requires_grad_(False)
    size = tuple(classifier.data_config['input_size'])
    if kind == 'torchscript':
        batch = None
    about = describe(classifier)
    write, read = _WRITERS[kind]
    sizes = BATCHES if batch is None else (batch,)
    with atomic_write(file) as part:
        with _quiet():
            _capture(write, model, images((batch or 3, *size), seed=0), batch is None, about, part)
            run = read(part)
        apart = max(_difference(model, run, images((n, *size), seed=n)) for n in sizes)
    counts = ', '.join(str(n) for n in sizes[:-1])
    batches = f'in batches of {counts} and {sizes[-1]}' if counts else f'in a batch of {batch}'
    shape = ', '.join(map(str, (batch or 'any number', *size)))
    closeness = f'to {apart:.0e}' if apart else 'exactly'
    weights = '' if classifier.trained else ' Its weights are random: give --checkpoint, or --pretrained.'
    return (f"'{file}' ({kind}) takes images, ({shape}) float32, and returns {counted(len(about['classes']), 'logit')} "
            f"for each; equal to the model's {closeness} on {counted(sum(sizes), 'image')} {batches}.{weights}")


def describe(classifier: Classifier) -> Dict[str, Any]:
    """What an exported file says of itself."""
    config = classifier.data_config
    return {
        'model': classifier.args.model, 'trained': classifier.trained, **versions(),
        **{key: adapt_to_chs(config[key], config['input_size'][0]) for key in ('mean', 'std')},
        **{key: config[key] for key in ('input_size', 'crop_pct', 'crop_mode', 'interpolation')},
        'classes': classifier.classes,
    }


def images(shape: Tuple[int, ...], seed: int) -> torch.Tensor:
    """(B, C, H, W): coarse and fine noise, dark to bright, so that images choose different experts."""
    generator = torch.Generator().manual_seed(seed)
    coarse = nn.functional.interpolate(
        torch.randn((*shape[:2], 4, 4), generator=generator), shape[2:], mode='bilinear')
    return coarse * 2 + torch.randn(shape, generator=generator) * torch.rand((shape[0], 1, 1, 1), generator=generator)


@torch.no_grad()
def _difference(model: nn.Module, run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """The largest distance between what the model and its export give for a batch.

    Raises:
        InputError: It is above the tolerance.
    """
    wanted, found = model(x), run(x)
    apart = (found - wanted).abs()
    if found.shape != wanted.shape or not (apart <= TOLERANCE * (1 + wanted.abs())).all():
        raise InputError(
            f'Nothing was written: on a batch of {len(x)} what was exported gives other logits than the model, by up to'
            f' {apart.max():.1e}.')
    return float(apart.max())


def _capture(write: Callable, model: nn.Module, *args) -> None:
    try:
        write(model, *args)
    except (InputError, OSError):
        raise
    except Exception as error:  # torch has a dozen kinds of error for it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f'{type(model).__name__} cannot be exported: {reason[:300]}') from error


def _dynamic(free: bool) -> Optional[Tuple[Dict[int, Any]]]:
    return ({0: torch.export.Dim('batch', min=1)},) if free else None


def _write_onnx(model: nn.Module, example: torch.Tensor, free: bool, about: Dict[str, Any], part: Path) -> None:
    total = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if total > LARGEST:
        raise InputError(f'{about["model"]} has {total / 1e9:.1f} GB of weights, and an ONNX file holds 2: use pt2.')
    program = torch.onnx.export(
        model, (example,), dynamo=True, input_names=['images'], output_names=['logits'], dynamic_shapes=_dynamic(free),
        verbose=False)
    program.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
    program.save(part, external_data=False)


def _read_onnx(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(None, {'images': x.numpy()})[0])


def _write_pt2(model: nn.Module, example: torch.Tensor, free: bool, about: Dict[str, Any], part: Path) -> None:
    program = torch.export.export(model, (example,), dynamic_shapes=_dynamic(free))
    with open(part, 'wb') as file:
        torch.export.save(program, file, extra_files={EXTRA: json.dumps(about)})


def _read_pt2(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    with open(file, 'rb') as stream:
        return torch.export.load(stream).module()


def _write_torchscript(model: nn.Module, example: torch.Tensor, free: bool, about: Dict[str, Any], part: Path) -> None:
    torch.jit.save(torch.jit.script(model), str(part), _extra_files={EXTRA: json.dumps(about)})


def _read_torchscript(file: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.jit.load(str(file))


_WRITERS = {
    'onnx': (_write_onnx, _read_onnx),
    'pt2': (_write_pt2, _read_pt2),
    'torchscript': (_write_torchscript, _read_torchscript),
}


def _check_packages() -> None:
    """Raises: MissingPackage: What writes and runs ONNX files is not installed."""
    missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackage(
            f"ONNX files are written and checked with {', '.join(missing)}, not installed here: pip install "
            "'moe_zoo[export]'.")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters tell of their own workings: the comparison says what matters."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter('ignore')
        yield


def open_target(target: str, flags: argparse.Namespace, overrides: Dict[str, Any]) -> Classifier:
    """The classifier that a command line names.

    Raises:
        InputError: There is no such run, checkpoint, folder or model, or it cannot be used.
    """
    path, checkpoint = Path(target), flags.checkpoint
    if (path / 'config.json').is_file():  # a folder that timm saved
        overrides.update(model=f'local-dir:{target}', pretrained=True)
    elif path.exists() or os.sep in target:
        if checkpoint:
            raise InputError(f"'{target}' has weights of its own: leave out --checkpoint {checkpoint}.")
        checkpoint = find_run(path)
    else:
        overrides['model'] = target
    if flags.pretrained:
        overrides['pretrained'] = True
    overrides.update(device='cpu', channels_last=False)
    config = {} if 'model' in overrides and not checkpoint else None
    return open_classifier(checkpoint, config, overrides, flags.use_ema, with_data=False)[0]


def parser() -> argparse.ArgumentParser:
    """The command line; everything of a recipe is `key=value`."""
    result = argparse.ArgumentParser(
        prog=sys.argv[0],
        description='Write a classifier as a file that runs without this package, and compare the two.',
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add('target', metavar='NAME|CHECKPOINT|FOLDER', help='a model, a checkpoint, a run, or a folder that timm saved')
    add('--output', '-o', metavar='FILE', required=True, help='file to write')
    add('--format', metavar='F', help=f'{", ".join(FORMATS)}; by default what FILE ends in: '
        f'{", ".join(FORMATS.values())}')
    add('--batch', metavar='N', default='dynamic', help='images a call; by default any number')
    add('--img-size', metavar='N', type=int, help='side of the images; by default that of the model or run')
    add('--checkpoint', metavar='FILE', help='weights for a model that is named')
    add('--pretrained', action='store_true', help="the model's published weights")
    add('--use-ema', action='store_true', help='take the averaged weights of the checkpoint')
    add('options', nargs='*', metavar='key=value', help='options that win over the recipe')
    result.set_defaults(data_dir=None)
    return result


@exit_on_input_error
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit code."""
    flags, overrides = parse_command_line(argv, parser())
    kind, batch = _format(flags), _batch(flags.batch)
    if flags.img_size is not None:
        overrides['img_size'] = flags.img_size
    if kind == 'onnx':
        _check_packages()  # before weights are read
    print(export(open_target(flags.target, flags, overrides), flags.output, kind, batch))
    return 0


def _format(flags: argparse.Namespace) -> str:
    if flags.format is None:
        found = [kind for kind, ending in FORMATS.items() if flags.output.endswith(ending)]
        if not found:
            raise InputError(f"--output '{flags.output}' ends in none of {', '.join(FORMATS.values())}: give --format.")
        return found[0]
    if flags.format not in FORMATS:
        hint = nearest(flags.format, FORMATS)
        raise InputError(f"--format {flags.format!r} is not one of {', '.join(FORMATS)}.{hint}")
    return flags.format


def _batch(text: str) -> Optional[int]:
    if text == 'dynamic':
        return None
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"--batch {text}: give a number of images, at least 1, or 'dynamic'.")
    return int(text)


if __name__ == '__main__':
    raise SystemExit(main())
