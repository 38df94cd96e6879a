"""From options to the parts of a run: device, model, precision, loss, optimiser, schedule."""
import argparse
import contextlib
import functools
import importlib
from typing import Any, Dict, Optional, Tuple

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

from ..errors import InputError, nearest, nearest_keyword
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
    overlay = dict(args.pretrained_cfg_overlay or {})
    if args.pretrained_path:
        overlay.update(file=args.pretrained_path, num_classes=-1)  # -1: the head is always adapted
    try:
        keywords = resolve_model_input_args(
            args.model,
            vars(args),
            pretrained_cfg_overlay=overlay or None,
            num_classes=args.num_classes,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path if args.drop_path is not None else args.drop_connect,
            drop_block_rate=args.drop_block,
            global_pool=args.gp,
            bn_momentum=args.bn_momentum,
            bn_eps=args.bn_eps,
            **{**_size_of_base(args), **args.model_kwargs},
        )
        model = timm.create_model(pretrained=args.pretrained or bool(args.pretrained_path), **keywords)
    except (TypeError, AssertionError) as error:
        hint = nearest_keyword(error, functools.partial(timm.create_model, args.model, device='meta'))
        raise InputError(f'The model {args.model!r} cannot be built with these options: {error}{hint}') from error
    except (RuntimeError, ValueError) as error:
        if isinstance(error, InputError):
            raise InputError(str(error).replace(HOW, PATH)) from error
        raise InputError(f'The model {args.model!r} cannot be built: {error}') from error
    except OSError as error:  # of a model of timm's; ours say it themselves
        raise InputError(
            f'pretrained=true: the weights of {args.model} cannot be fetched ({type(error).__name__}); pass its'
            f' model.safetensors {PATH}.') from error
    if args.initial_checkpoint:
        weights = find_weights(read_checkpoint(args.initial_checkpoint), args.initial_checkpoint)
        check_fits(model, weights, args.initial_checkpoint, args.model)
        model.load_state_dict(weights)
    args.num_classes = model.num_classes
    return model


def _size_of_base(args: argparse.Namespace) -> Dict[str, int]:
    """`img_size` for a `moefied` model whose base is built for one size: timm asks the name's own configuration."""
    base, size = args.model_kwargs.get('base'), args.img_size or (args.input_size or [None])[-1]
    try:
        return {'img_size': size} if base and size and get_pretrained_cfg_value(base, 'fixed_input_size') else {}
    except RuntimeError:
        return {}  # of an unknown tag the model tells


def prepare_model(args: argparse.Namespace, model: nn.Module, device: torch.device) -> nn.Module:
    """Everything that changes a model before it trains: head, checkpointing, batch norm, dtype, device, layout."""
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
