"""From options to the parts of a run: device, model, precision, loss, optimiser, schedule."""
import argparse
import contextlib
import functools
import importlib
import logging
import re
from typing import Any, Dict, Iterator, Mapping, Optional, Tuple

import timm
import torch
import torch.distributed as dist
from timm import utils
from timm.layers import convert_splitbn_model, convert_sync_batchnorm, set_fast_norm
from timm.loss import create_classification_loss
from timm.models import get_pretrained_cfg_value, is_model, list_models, resolve_model_input_args
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import NativeScaler
from torch import nn

from ..checkpoints import is_routed
from ..errors import InputError, nearest, nearest_keyword
from ..layers.expert_mlps import group_by_image
from ..models.pretrained import HOW
from .checkpoint import check_fits, find_weights, read_checkpoint

SCHEDULES = ('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd', 'rsqrt', 'constant', 'plateau', 'none')
PATH = 'as pretrained_path=FILE (finetune: --from-dense FILE)'  # what a command line says instead of `HOW`


def open_device(args: argparse.Namespace) -> torch.device:
    """The device of this process; joins the process group under torchrun. Fills in rank and world size.

    Raises:
        InputError: The device is not there.
    """
    for name in args.device_modules or ():
        importlib.import_module(name)
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        raise InputError(f'device={args.device}: torch sees no CUDA device here; leave it out or use device=cpu.')
    try:
        torch.device(args.device)
    except RuntimeError:
        raise InputError(f"device={args.device!r} is not a device of torch: use 'cpu', 'cuda' or 'cuda:1'.") from None
    if dist.is_available() and dist.is_initialized():  # a second run of this process: twin, seeds
        args.distributed, args.rank, args.world_size = True, dist.get_rank(), dist.get_world_size()
        return torch.device(args.device)
    return utils.init_distributed_device(args)


def build_model(args: argparse.Namespace) -> nn.Module:
    """The model of a recipe, on the CPU.

    Raises:
        InputError: The name is unknown (the nearest are said), a keyword is not the model's, or weights do not fit.
    """
    if ':' not in args.model and not is_model(args.model.partition('.')[0]):
        raise InputError(f'Unknown model {args.model!r}.{nearest(args.model, list_models())}')
    weights = None
    if args.pretrained_path:
        weights = find_weights(read_checkpoint(args.pretrained_path), args.pretrained_path)
    try:
        keywords = model_keywords(args)
        with _told_by_us(weights is not None):
            model = timm.create_model(pretrained=args.pretrained or weights is not None, **keywords)
    except (TypeError, AssertionError) as error:
        hint = nearest_keyword(error, functools.partial(timm.create_model, args.model, device='meta'))
        raise InputError(f'The model {args.model!r} cannot be built with these options: {error}{hint}') from error
    except (RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise InputError(str(error).replace(HOW, PATH)) from error
        raise InputError(_mismatch(error, args) or f'The model {args.model!r} cannot be built: {error}') from error
    except (ArithmeticError, IndexError, AttributeError, MemoryError) as error:  # of a model of timm's
        raise InputError(f'The model {args.model!r} cannot be built with these options: {error!r}') from error
    except KeyError as error:
        if weights is None:
            raise InputError(f'The model {args.model!r} cannot be built with these options: {error!r}') from error
        raise InputError(
            f"The weights in '{args.pretrained_path}' are of another architecture than the model, which has no"
            f' {error.args[0]}.') from error
    except OSError as error:  # of a model of timm's; ours say it themselves
        raise InputError(
            f'pretrained=true: the weights of {args.model} cannot be fetched ({type(error).__name__}); pass its'
            f' model.safetensors {PATH}.') from error
    if weights is not None:
        _check_taken(model, weights, args.pretrained_path)
    if args.initial_checkpoint:
        weights = find_weights(read_checkpoint(args.initial_checkpoint), args.initial_checkpoint)
        check_fits(model, weights, args.initial_checkpoint, args.model)
        model.load_state_dict(weights)
    args.num_classes = model.num_classes
    if 'act_layer' in model._model_args:  # which dense weights may have brought with them
        args.model_kwargs = {**args.model_kwargs, 'act_layer': model._model_args['act_layer']}
    return model


def create_on_meta(args: argparse.Namespace) -> nn.Module:
    """The model that `build_model` has built, without weights."""
    model = timm.create_model(device='meta', **model_keywords(args)).eval()
    if args.per_image_groups:
        group_by_image(model)
    return model


def model_keywords(args: argparse.Namespace) -> Dict[str, Any]:
    overlay = dict(args.pretrained_cfg_overlay or {})
    if args.pretrained_path:
        overlay.update(file=args.pretrained_path, num_classes=-1)  # -1: the head is always adapted
    options = dict(
        num_classes=args.num_classes,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path if args.drop_path is not None else args.drop_connect,
        drop_block_rate=args.drop_block,
        global_pool=args.gp,
        bn_momentum=args.bn_momentum,
        bn_eps=args.bn_eps,
    )
    keywords = {**options, **_size_of_base(args), **args.model_kwargs}  # a keyword of the model wins over an option
    return resolve_model_input_args(args.model, vars(args), pretrained_cfg_overlay=overlay or None, **keywords)


@contextlib.contextmanager
def _told_by_us(ours: bool) -> Iterator[None]:
    """Silence timm's list of the names that do not fit where `_check_taken` follows."""
    logger = logging.getLogger('timm.models._builder')
    level = logger.level
    logger.setLevel(logging.ERROR if ours else level)
    try:
        yield
    finally:
        logger.setLevel(level)


MISMATCH = re.compile(
    r'size mismatch for (\S+): copying a param with shape torch.Size\(\[(.*?)\]\) from checkpoint, '
    r'the shape in current model is torch.Size\(\[(.*?)\]\)')


def _mismatch(error: Exception, args: argparse.Namespace) -> Optional[str]:
    """One sentence on the first tensor of another shape, where that is what torch says of a file of weights."""
    found = MISMATCH.search(str(error)) if args.pretrained_path else None
    return found and (
        f"The weights in '{args.pretrained_path}' are of another architecture than the model: {found[1]} has shape "
        f'({found[2]}) in them, and the model takes ({found[3]}).')


def _check_taken(model: nn.Module, weights: Mapping[str, torch.Tensor], path: str) -> None:
    """Where the classifier is another one, timm loads the weights that have the model's names, and lets the rest be.

    A weight was taken if its name or its values are in the file, which may also be of a layout that timm converts;
    dense weights in a routed model have been held against it by upcycling.

    Raises:
        InputError: A weight of the model is not in the file, which has the model's names, or none is.
    """
    if not is_routed(weights, model):
        return
    by_shape: Dict[Any, list] = {}
    for tensor in weights.values():
        by_shape.setdefault(tensor.shape, []).append(tensor)
    heads = tuple(f'{head}.' for head in _as_list(model.pretrained_cfg.get('classifier')))
    wanted = {k: p for k, p in model.named_parameters() if p.dim() > 1 and not k.startswith(heads)}
    left = [
        k for k, p in wanted.items()
        if k not in weights and not any(torch.equal(p, t.to(p.dtype)) for t in by_shape.get(p.shape, ()))]
    if left and (len(left) == len(wanted) or any(k in weights for k in wanted)):
        raise InputError(
            f"The weights in '{path}' are of another architecture than the model: {left[0]} is missing in them, and the"
            f' model takes shape {tuple(wanted[left[0]].shape)}.')


def _as_list(value: Any) -> list:
    return [] if not value else [value] if isinstance(value, str) else list(value)


def _size_of_base(args: argparse.Namespace) -> Dict[str, int]:
    """`img_size` for a `moefied` model whose base is built for one size: timm asks the name's own configuration."""
    base, size = args.model_kwargs.get('base'), args.img_size or (args.input_size or [None])[-1]
    try:
        return {'img_size': size} if base and size and get_pretrained_cfg_value(base, 'fixed_input_size') else {}
    except RuntimeError:
        return {}  # of an unknown tag the model tells


def prepare_model(args: argparse.Namespace, model: nn.Module, device: torch.device) -> nn.Module:
    """Everything that changes a model before it trains: groups, head, checkpointing, batch norm, dtype, layout."""
    if args.per_image_groups:
        group_by_image(model)
    if args.fast_norm:
        set_fast_norm()
    with torch.no_grad():
        if args.head_init_scale is not None:
            for parameter in model.get_classifier().parameters():
                parameter.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            model.get_classifier().bias.fill_(args.head_init_bias)
    if args.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    if args.split_bn:
        if args.aug_splits < 2 and not args.resplit:
            raise InputError('split_bn=true keeps a batch norm for each augmentation split: set aug_splits or resplit.')
        model = convert_splitbn_model(model, max(args.aug_splits, 2))
    model.to(device=device, dtype=getattr(torch, args.model_dtype or 'float32'))
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.distributed and args.sync_bn:
        args.dist_bn = ''  # statistics are shared at every step
        model = convert_sync_batchnorm(model)
    return model


def criterion_kwargs(args: argparse.Namespace, mixup_active: bool) -> Dict[str, Any]:
    """Arguments of timm's `create_classification_loss`; the flags jsd_loss and bce_loss are older names of `loss`."""
    kind = args.loss or ('jsd' if args.jsd_loss else 'bce' if args.bce_loss else None)
    keywords = dict(loss_type=kind, smoothing=args.smoothing, soft_targets=mixup_active)
    if kind == 'bce':
        keywords.update(
            bce_target_thresh=args.bce_target_thresh, bce_sum=args.bce_sum, pos_weight=args.bce_pos_weight)
    elif kind == 'jsd':
        keywords.update(jsd_splits=args.aug_splits)
    elif kind == 'asl':
        keywords.update(asl_gamma_pos=args.asl_gamma_pos, asl_gamma_neg=args.asl_gamma_neg, asl_clip=args.asl_clip)
    elif kind == 'poly':
        keywords.update(poly_epsilon=args.poly_epsilon)
    try:
        create_classification_loss(**keywords)
    except ValueError as error:
        raise InputError(f'loss={kind}: {error}') from error
    return keywords


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimiser by name; `lr` follows from `lr_base` and the global batch where it is not given.

    Raises:
        InputError: The name is unknown, or an argument is not the optimiser's.
    """
    if not args.lr:
        ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
        by_root = args.lr_base_scale == 'sqrt' or (
            not args.lr_base_scale and any(part in args.opt.lower() for part in ('ada', 'lamb')))
        args.lr = args.lr_base * (ratio ** 0.5 if by_root else ratio)
    if args.opt.lower().split('_')[-1] not in list_optimizers():
        raise InputError(f'Unknown optimiser opt={args.opt!r}.{nearest(args.opt, list_optimizers())}')
    try:
        return create_optimizer_v2(model, **optimizer_kwargs(cfg=args), **args.opt_kwargs)
    except (TypeError, ValueError) as error:
        raise InputError(f'The optimiser opt={args.opt} cannot be built: {error}') from error


def build_schedule(
        args: argparse.Namespace,
        optimizer: torch.optim.Optimizer,
        updates_per_epoch: int,
) -> Tuple[Optional[Any], int]:
    """timm's schedule and the number of epochs it lasts, warm-up prefix, cycles and cool-down included.

    Raises:
        InputError: The name is unknown, or its lengths do not fit.
    """
    if args.sched not in SCHEDULES:
        raise InputError(f'Unknown schedule sched={args.sched!r}.{nearest(args.sched, SCHEDULES)}')
    try:
        return create_scheduler_v2(
            optimizer,
            **scheduler_kwargs(args, decreasing_metric=args.eval_metric == 'loss'),
            updates_per_epoch=updates_per_epoch,
        )
    except (AssertionError, ValueError) as error:
        raise InputError(f'The schedule sched={args.sched} cannot be built: {error}') from error


def mixed_precision(args: argparse.Namespace, device: torch.device) -> tuple:
    """(autocast context factory, loss scaler or None). On CPU mixed precision is bfloat16: float16 needs a scaler."""
    if not args.amp:
        return contextlib.nullcontext, None
    half = args.amp_dtype == 'float16' and device.type != 'cpu'
    dtype = torch.float16 if half else torch.bfloat16
    scaler = NativeScaler(device=device.type) if half and device.type == 'cuda' else None
    return functools.partial(torch.autocast, device_type=device.type, dtype=dtype), scaler
