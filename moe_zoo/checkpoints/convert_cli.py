"""`tools/convert_checkpoint.py`: released or dense checkpoints into safetensors files that timm loads.

The arrays of a released V-MoE are read, renamed and written one by one: a file of tens of gigabytes needs the memory of
its largest array.
"""
import argparse
import inspect
import math
import re
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform, get_img_extensions, resolve_data_config
from timm.models.swin_transformer import SwinTransformer
from torch import nn

import moe_zoo  # noqa: F401 - registers the models

from ..engine.checkpoint import find_weights, read_checkpoint
from ..engine.config import parse_overrides
from ..engine.predict import read_image
from ..errors import InputError, counted, exit_on_input_error, nearest, nearest_keyword
from ..layers import MoEMlp
from ..models.pretrained import misfit
from ..models.vmoe import resize_table
from . import LazyTensor, plan_vmoe, read_vmoe, token_features, upcycle, write_safetensors
from .parts import join_sharded, plan_parts
from .swin_moe import plan_swin_moe
from .upcycle import METHODS, ROUTERS

SWIN = 'swin_tiny_patch4_window7_224'  # of timm, which all keywords of a Swin make another
TOKEN_IMAGES = 64  # for clusters
EXAMPLES = """
examples:
  %(prog)s vmoe_s32_last2_ilsvrc2012_randaug_light1 vmoe_s.safetensors --model vmoe_vit_s
  %(prog)s vmoe_b16_imagenet21k_randaug_strong vmoe_b_384.safetensors --img-size 384

PREFIX stands for PREFIX.index and PREFIX.data-00000-of-00008 and so on, as in gs://vmoe_checkpoints. The two ensembles
there (eee_*) cannot be converted. Exit code 2: the input cannot be used, and nothing was written.
"""
UPCYCLE_EXAMPLES = """
examples:
  %(prog)s resnet50.pth condconv_resnet50.safetensors --model condconv_resnet50
  %(prog)s vit_s14.safetensors moe_vit.safetensors --model vmoe_vit_b --model-kwargs embed_dim=384 num_heads=6 \\
      patch_size=14 img_size=518 act_layer=gelu
  %(prog)s vit_b16.safetensors vmoe_b.safetensors --model vmoe_vit_b --router kmeans --images photos

DENSE is a checkpoint of timm, of this project's training, or a plain state dictionary. Exit code 2: the input cannot be
used, and nothing was written.
"""
SWIN_EXAMPLES = """
examples:
  %(prog)s swin_moe_small_patch4_window12_192_32expert_32gpu_22k swin_moe_s.safetensors

FOLDER has NAME.pth.rank0, NAME.pth.rank1 and so on and NAME.pth.master, as in Swin-Transformer's archives; where it has
several NAMEs, say which: FOLDER/NAME.pth. Exit code 2: the input cannot be used, and nothing was written.
"""
JOIN_EXAMPLES = """
examples:
  %(prog)s runs/vmoe_h/step1000 vmoe_h.safetensors --model vmoe_vit_h
  %(prog)s step1 small.safetensors --model vmoe_vit_s --model-kwargs num_classes=10 img_size=32

FOLDER has .metadata and __0_0.distcp and so on, as torch.distributed.checkpoint writes them; weights are the entries
model.*, the optimiser stays behind. Nothing in it is run. Exit code 2: it cannot be used, and nothing was written.
"""


@exit_on_input_error
def main(argv: list[str] | None = None) -> int:
    """Convert what the command line names; returns the exit code."""
    args = _parser().parse_args(argv)
    if args.format == 'vmoe':
        print(convert_vmoe(args.prefix, args.out, args.model, args.img_size))
    elif args.format == 'swin-moe':
        print(convert_swin_moe(args.folder, args.out))
    elif args.format == 'join':
        print(join(args.folder, args.out, args.model, parse_overrides(args.model_kwargs)))
    else:
        print(convert_dense(
            args.dense, args.out, args.model, parse_overrides(args.model_kwargs),
            images=args.images, router=args.router, method=args.method, noise=args.noise, ignore=args.ignore))
    return 0


def convert_vmoe(prefix: str, out: str | Path, model: str | None = None, img_size: int | None = None) -> str:
    """Turn a checkpoint of the original V-MoE into a safetensors file.

    Args:
        prefix: As in `moe_zoo.checkpoints.read_vmoe`.
        out: File to write, `*.safetensors`.
        model: Registered name of the model that has to take it.
        img_size: Resize the table of positions for square images of this size, as the original does.

    Returns:
        What was written, and the call that loads it.

    Raises:
        InputError: The checkpoint is broken or for another model; nothing is written then.
    """
    out = _output(out)
    known = timm.list_models(['vmoe_vit_*', 'softmoe_vit_*'])
    if model is not None and model not in known:
        raise InputError(f'--model {model!r} is no V-MoE.{nearest(model, known)} Known: {", ".join(known)}.')
    plan = plan_vmoe(read_vmoe(prefix))
    if img_size is not None:
        _resize(plan, img_size, prefix)
    kwargs = _model_kwargs(plan)
    if model is not None:
        different = _misfit(plan, model, kwargs)
        if different:
            raise InputError(f'{prefix!r} holds weights that are not for {model}: {different}.')
    else:
        model = next((name for name in known if not _misfit(plan, name, kwargs)), None)
    write_safetensors(out, plan, {'source': Path(prefix).name})
    return f"'{out}': {len(plan)} tensors, {_parameters(plan):,} parameters. {_usage(model, kwargs, out)}"


def convert_swin_moe(folder: str | Path, out: str | Path) -> str:
    """Join a released Swin-MoE, which has one file a rank, into a safetensors file for timm's Swin made routed.

    Tensors are read, joined and written one by one.

    Args:
        folder: Of the files; or the path that they have in common, up to `.pth`.
        out: File to write, `*.safetensors`.

    Returns:
        What was written, and the call that loads it.

    Raises:
        InputError: Files are missing or of another layout, or do not belong together; nothing is written then.
    """
    out = _output(out)
    paths, master = _rank_files(Path(folder))
    ranks, rest = [_weights_in(path) for path in paths], _weights_in(master) if master else {}
    try:
        plan, kwargs = plan_swin_moe(ranks, rest)
    except InputError as error:
        raise InputError(f"FOLDER '{folder}': {error}") from error
    different = _misfit(plan, 'moefied', dict(kwargs, base=SWIN))
    if different:
        raise InputError(f"FOLDER '{folder}': The weights are of another model than timm's Swin: {different}.")
    write_safetensors(out, plan, {'source': paths[0].name.removesuffix('.rank0')})
    # What timm takes from the configuration, where the images' size and the classes are looked up too.
    size, classes, channels = (kwargs.pop(key) for key in ('img_size', 'num_classes', 'in_chans'))
    overlay = dict(file=str(out), num_classes=classes, input_size=(channels, size, size))
    defaults = inspect.signature(SwinTransformer.__init__).parameters
    kwargs = {k: v for k, v in kwargs.items() if k not in defaults or v != defaults[k].default}
    words = ''.join(f', {key}={value!r}' for key, value in kwargs.items())
    return (
        f"'{out}': {len(plan)} tensors, {_parameters(plan):,} parameters of {counted(len(ranks), 'rank')}. Load it by "
        f"timm.create_model('moefied', pretrained=True, base='{SWIN}'{words}, pretrained_cfg_overlay={overlay}).")


def join(folder: str | Path, out: str | Path, model: str | None = None, kwargs: dict[str, Any] | None = None) -> str:
    """Join a checkpoint in parts, as torch.distributed.checkpoint writes it, into a safetensors file.

    Tensors are read and written one by one, and nothing in the folder is run.

    Args:
        folder: Of the parts.
        out: File to write, `*.safetensors`.
        model: Registered name of the model that has to take it.
        kwargs: Its keywords.

    Returns:
        What was written, and the call that loads it.

    Raises:
        InputError: The folder cannot be used, or is of another model; nothing is written then.
    """
    out, kwargs = _output(out), kwargs or {}
    if model is None and kwargs:
        raise InputError('--model-kwargs are those of --model NAME: give it, too.')
    if model is not None:
        _check_known(model)
        wanted = _create(model, kwargs, device='meta').state_dict()
        different = misfit(
            {key: value.shape for key, value in plan_parts(folder).items()},
            {key: tuple(value.shape) for key, value in wanted.items()})
        if different:
            raise InputError(f"FOLDER '{folder}' holds weights that are not for {model}: {different}.")
    plan = join_sharded(folder, out)
    usage = _usage(model or 'NAME', kwargs, out)
    return f"'{out}': {len(plan)} tensors, {_parameters(plan):,} numbers. {usage}"


def _rank_files(folder: Path) -> tuple[list[Path], Path | None]:
    """Files of the ranks in order, and the master's where there is one.

    Raises: InputError: There are none, those of several checkpoints, or one is missing.
    """
    stem = '' if folder.is_dir() else folder.name
    around = folder if folder.is_dir() else folder.parent
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(around.glob('*.rank*')):
        match = re.fullmatch(r'(.+)\.rank(\d+)', path.name)
        if match and stem in ('', match[1]):
            found.setdefault(match[1], {})[int(match[2])] = path
    if not found:
        whole = next(iter(sorted(around.glob('*.global'))), None)
        raise InputError(
            f"'{folder}' has no files NAME.pth.rank0, NAME.pth.rank1 and so on." + (
                f" '{whole.name}' has the experts of one rank only." if whole else ''))
    if len(found) > 1:
        raise InputError(f"'{folder}' has {len(found)} checkpoints: say which, such as '{around / next(iter(found))}'.")
    (name, ranks), = found.items()
    for number in range(max(ranks)):
        if number not in ranks:
            raise InputError(f"'{folder}' has files of ranks up to {max(ranks)}, and '{name}.rank{number}' is missing.")
    master = around / f'{name}.master'
    return [ranks[number] for number in sorted(ranks)], master if master.exists() else None


def _weights_in(path: Path) -> dict[str, torch.Tensor]:
    return find_weights(read_checkpoint(path, mmap=True), path)


def convert_dense(
        dense: str | Path,
        out: str | Path,
        name: str,
        kwargs: dict[str, Any],
        images: str | Path | None = None,
        **options,
) -> str:
    """Upcycle a dense checkpoint into a safetensors file of a routed model.

    Args:
        dense: Checkpoint of the dense network.
        out: File to write, `*.safetensors`.
        name: Registered name of the routed model.
        kwargs: Keywords of the model.
        images: Folder of images, at any depth, for routers that start from clusters of tokens (router='kmeans').
        options: Of `moe_zoo.checkpoints.upcycle`.

    Returns:
        What was written, and the call that loads it.

    Raises:
        InputError: The checkpoint cannot be read or is of another architecture, or the model cannot be built; nothing
            is written then.
    """
    out = _output(out)
    _check_known(name)
    if (images is None) != (options.get('router') != 'kmeans'):
        raise InputError('--router kmeans and --images DIR belong together: clusters are those of tokens of images.')
    weights = find_weights(read_checkpoint(dense), dense)
    model = _create(name, kwargs)
    _check_parts(model, options)
    if images is not None:
        # With any router that keeps the function, the routed model's tokens are those of the dense one.
        model.load_state_dict(upcycle(weights, model, **{**options, 'router': None}))
        options['tokens'] = _token_features(model.eval(), kwargs, Path(images))
    state = upcycle(weights, model, **options)
    by_width = sorted(state.items(), key=lambda item: -item[1].dtype.itemsize)  # so that all of them are aligned
    write_safetensors(out, dict(by_width), {'source': Path(dense).name, 'note': 'upcycled, not trained'})
    size = sum(p.numel() for p in model.parameters())
    return f"'{out}': {len(state)} tensors, {size:,} parameters, upcycled, not trained. {_usage(name, kwargs, out)}"


def _check_known(name: str) -> None:
    if not timm.is_model(name):
        raise InputError(f'--model {name!r} is unknown.{nearest(name, timm.list_models())}')


def _create(name: str, kwargs: dict[str, Any], **more: Any) -> nn.Module:
    """Raises: InputError: The model has no such keywords."""
    try:
        return timm.create_model(name, **kwargs, **more)
    except TypeError as error:
        hint = nearest_keyword(error, lambda **others: timm.create_model(name, device='meta', **others))
        raise InputError(f'The model {name!r} cannot be built with these --model-kwargs: {error}{hint}') from error


def _check_parts(model: nn.Module, options: dict[str, Any]) -> None:
    """Raises: InputError: An option is about parts that the model does not have, and would do nothing."""
    parts = dict(model.named_modules())
    for name in options.get('ignore', ()):
        if name not in parts:
            raise InputError(f'--ignore {name!r}: the model has no part of that name.{nearest(name, parts)}')
    if options.get('method') == 'split' and not any(isinstance(part, MoEMlp) for part in parts.values()):
        raise InputError('--method split: the model has no token experts, which slices of a dense MLP could start.')


def _token_features(model: nn.Module, kwargs: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """What the routed MLPs of a model read of at most `TOKEN_IMAGES` images of a folder, evenly over its order.

    Args:
        kwargs: Keywords of the model, which may tell the size of its images.

    Raises:
        InputError: The model has no such MLPs, the folder no images, or one cannot be read.
    """
    names = [name for name, layer in model.named_modules() if isinstance(layer, MoEMlp)]
    if not names:
        raise InputError('--router kmeans: the model has no token experts, which clusters of tokens could start.')
    found = sorted(path for path in folder.rglob('*') if path.suffix.lower() in get_img_extensions())
    if not found:
        raise InputError(f"--images '{folder}': there are no images in it.")
    count = min(TOKEN_IMAGES, len(found))
    transform = create_transform(**resolve_data_config(kwargs, model=model), is_training=False)
    mode = 'L' if model.in_chans == 1 else 'RGB'
    return token_features(model, names, torch.stack([
        transform(read_image(found[i * len(found) // count], mode)) for i in range(count)]))


def _output(out: str | Path) -> Path:
    if Path(out).suffix != '.safetensors':
        raise InputError(f"OUT '{out}': use a name that ends in .safetensors, by which timm knows the format.")
    return Path(out)


def _parameters(plan: dict[str, LazyTensor]) -> int:
    return sum(math.prod(tensor.shape) for tensor in plan.values())


def _resize(plan: dict[str, LazyTensor], img_size: int, prefix: str) -> None:
    table, patch = plan.get('pos_embed'), plan['patch_embed.proj.weight'].shape[2:]
    num_prefix = int('cls_token' in plan)
    side = math.isqrt(table.shape[1] - num_prefix) if table else 0
    if not table or side * side != table.shape[1] - num_prefix:
        raise InputError(f'--img-size {img_size}: {prefix!r} has no square table of positions to be resized.')
    if img_size < 1 or any(img_size % size for size in patch):
        raise InputError(f'--img-size {img_size}: use a multiple of the patch size {patch[0]}.')
    grid = [img_size // size for size in patch]
    plan['pos_embed'] = table._replace(
        make=lambda *arrays: resize_table(table.make(*arrays), grid, [side, side], num_prefix))


def _model_kwargs(plan: dict[str, LazyTensor]) -> dict[str, Any]:
    """What a model needs to know beside its name: image size, classes and the width before the head."""
    def width(name: str) -> int:
        return plan[name].shape[0] if name in plan else 0
    kwargs = dict(num_classes=width('head.bias'), representation_size=width('pre_logits.fc.bias'))
    if 'pos_embed' in plan:
        grid = math.isqrt(plan['pos_embed'].shape[1] - int('cls_token' in plan))
        kwargs['img_size'] = grid * plan['patch_embed.proj.weight'].shape[2]
    return kwargs


def _misfit(plan: dict[str, LazyTensor], name: str, kwargs: dict[str, Any]) -> str:
    """The first tensor that differs from what a model wants, as a clause; empty where all fit."""
    model = timm.create_model(name, device='meta', **kwargs)
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    return misfit({key: value.shape for key, value in plan.items()}, wanted)


def _usage(model: str | None, kwargs: dict[str, Any], out: Path) -> str:
    if model is None:
        return 'No registered model has these shapes: moe_zoo.models.vmoe.from_config builds it from its configuration.'
    words = ''.join(f', {key}={value!r}' for key, value in kwargs.items())
    return f"Load it by timm.create_model('{model}', checkpoint_path='{out}'{words})."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    formats = parser.add_subparsers(dest='format', required=True, metavar='FORMAT')
    vmoe = formats.add_parser(
        'vmoe', help="the original V-MoE's PREFIX.index and PREFIX.data-*", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    vmoe.add_argument('prefix', metavar='PREFIX', help='path without .index')
    vmoe.add_argument('--model', metavar='NAME', help='refuse what this model does not take')
    vmoe.add_argument('--img-size', metavar='N', type=int, help='resize the table of positions for N x N images')
    swin = formats.add_parser(
        'swin-moe', help='a released Swin-MoE, one file a rank, joined', epilog=SWIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    swin.add_argument('folder', metavar='FOLDER', help='of the files of all ranks')
    parts = formats.add_parser(
        'join', help='a checkpoint in parts, of torch.distributed.checkpoint, joined', epilog=JOIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parts.add_argument('folder', metavar='FOLDER', help='of the parts')
    parts.add_argument('--model', metavar='NAME', help='refuse what this model does not take')
    parts.add_argument(
        '--model-kwargs', metavar='KEY=VALUE', nargs='+', default=(), help='its keywords, such as num_classes=10')
    dense = formats.add_parser(
        'upcycle', help="a dense network's weights, as the start of a routed model", epilog=UPCYCLE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    dense.add_argument('dense', metavar='DENSE', help='checkpoint of the dense network')
    dense.add_argument('--model', metavar='NAME', required=True, help='the routed model')
    dense.add_argument('--model-kwargs', metavar='KEY=VALUE', nargs='+', default=(),
                       help='its keywords, such as num_classes=10')
    dense.add_argument('--router', choices=list(ROUTERS),
                       help='start of the routers (default: whatever keeps the function)')
    dense.add_argument('--images', metavar='DIR', help='folder of images whose tokens kmeans clusters')
    dense.add_argument('--method', choices=list(METHODS), default='copy', help='of token experts (%(default)s)')
    dense.add_argument('--noise', metavar='SHARE', type=float,
                       help="of a weight's standard deviation (default: 0.1 where the function stays)")
    dense.add_argument('--ignore', metavar='MODULE', nargs='+', default=(), help='parts that start anew, such as fc')
    for command in (vmoe, swin, parts, dense):
        command.add_argument('out', metavar='OUT', help='safetensors file to write')
    return parser


if __name__ == '__main__':
    sys.exit(main())
