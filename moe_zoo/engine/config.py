"""Recipes: YAML files with the argument names of timm's train.py, so that one file serves timm's script and ours.

Everything that train.py of timm 1.0.31 knows is accepted with its default. What this engine leaves to timm's own
script (`moe-zoo run train.py`) is refused in one sentence when it is switched on.
"""
import argparse
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import yaml

from ..documents import parse_yaml
from ..errors import InputError, nearest
from ..resources import folder

# name: (kind, default). Kinds in brackets are lists of that kind; `dict` is a mapping or 'key=value key=value'.
OPTIONS: Dict[str, tuple] = {
    # data
    'data': (str, None), 'data_dir': (str, None), 'dataset': (str, ''), 'train_split': (str, 'train'),
    'val_split': (str, 'validation'), 'train_num_samples': (int, None), 'val_num_samples': (int, None),
    'dataset_download': (bool, False), 'class_map': (str, ''), 'input_img_mode': (str, None),
    'input_key': (str, None), 'target_key': (str, None), 'dataset_trust_remote_code': (bool, False),
    # model
    'model': (str, 'resnet50'), 'pretrained': (bool, False), 'pretrained_path': (str, None),
    'pretrained_cfg_overlay': (dict, None), 'initial_checkpoint': (str, ''), 'resume': (str, ''),
    'no_resume_opt': (bool, False), 'num_classes': (int, None), 'gp': (str, None), 'img_size': (int, None),
    'in_chans': (int, None), 'input_size': ([int], None), 'crop_pct': (float, None), 'crop_mode': (str, None),
    'mean': ([float], None), 'std': ([float], None), 'interpolation': (str, ''), 'batch_size': (int, 128),
    'validation_batch_size': (int, None), 'channels_last': (bool, False), 'grad_accum_steps': (int, 1),
    'grad_checkpointing': (bool, False), 'fast_norm': (bool, False), 'model_kwargs': (dict, {}),
    'head_init_scale': (float, None), 'head_init_bias': (float, None), 'torchcompile': (str, None),
    'torchcompile_mode': (str, None),
    # device
    'device': (str, None), 'amp': (bool, False), 'amp_dtype': (str, 'float16'), 'amp_impl': (str, 'native'),
    'model_dtype': (str, None), 'no_ddp_bb': (bool, False), 'synchronize_step': (bool, False),
    'local_rank': (int, 0), 'device_modules': ([str], None),
    # optimiser
    'opt': (str, 'sgd'), 'opt_eps': (float, None), 'opt_betas': ([float], None), 'momentum': (float, 0.9),
    'weight_decay': (float, 2e-5), 'clip_grad': (float, None), 'clip_mode': (str, 'norm'),
    'layer_decay': (float, None), 'layer_decay_min_scale': (float, 0.0), 'layer_decay_no_opt_scale': (float, None),
    'opt_foreach': (bool, None), 'opt_kwargs': (dict, {}),
    # schedule
    'sched': (str, 'cosine'), 'sched_on_updates': (bool, False), 'lr': (float, None), 'lr_base': (float, 0.1),
    'lr_base_size': (int, 256), 'lr_base_scale': (str, ''), 'lr_noise': ([float], None),
    'lr_noise_pct': (float, 0.67), 'lr_noise_std': (float, 1.0), 'lr_cycle_mul': (float, 1.0),
    'lr_cycle_decay': (float, 0.5), 'lr_cycle_limit': (int, 1), 'lr_k_decay': (float, 1.0),
    'lr_decay_fn': (str, None), 'lr_stable_timescale': (float, None), 'warmup_lr': (float, 1e-5),
    'min_lr': (float, 0.0), 'epochs': (int, 300), 'start_epoch': (int, None),
    'stop_epoch': (int, None), 'decay_milestones': ([int], [90, 180, 270]), 'decay_epochs': (float, None),
    'warmup_epochs': (int, 5), 'warmup_prefix': (bool, False), 'cooldown_epochs': (int, 0),
    'patience_epochs': (int, 10), 'decay_rate': (float, 0.1),
    # augmentation and loss
    'no_aug': (bool, False), 'train_crop_mode': (str, None), 'scale': ([float], [0.08, 1.0]),
    'ratio': ([float], [3 / 4, 4 / 3]), 'hflip': (float, 0.5), 'vflip': (float, 0.0), 'color_jitter': (float, 0.4),
    'color_jitter_prob': (float, None), 'grayscale_prob': (float, 0.0), 'gaussian_blur_prob': (float, 0.0),
    'aa': (str, None), 'aug_repeats': (float, 0), 'aug_splits': (int, 0), 'jsd_loss': (bool, False),
    'bce_loss': (bool, False), 'bce_sum': (bool, False), 'bce_target_thresh': (float, None),
    'bce_pos_weight': (float, None), 'loss': (str, None), 'poly_epsilon': (float, 2.0),
    'asl_gamma_pos': (float, 1.0), 'asl_gamma_neg': (float, 4.0), 'asl_clip': (float, 0.05),
    'reprob': (float, 0.0), 'remode': (str, 'pixel'), 'recount': (int, 1), 'resplit': (bool, False),
    'mixup': (float, 0.0), 'cutmix': (float, 0.0), 'cutmix_minmax': ([float], None), 'mixup_prob': (float, 1.0),
    'mixup_switch_prob': (float, 0.5), 'mixup_mode': (str, 'batch'), 'mixup_off_epoch': (int, 0),
    'smoothing': (float, 0.1), 'train_interpolation': (str, 'random'), 'drop': (float, 0.0),
    'drop_connect': (float, None), 'drop_path': (float, None), 'drop_block': (float, None),
    # batch norm and moving average
    'bn_momentum': (float, None), 'bn_eps': (float, None), 'sync_bn': (bool, False), 'dist_bn': (str, 'reduce'),
    'split_bn': (bool, False), 'model_ema': (bool, False), 'model_ema_force_cpu': (bool, False),
    'model_ema_decay': (float, 0.9998), 'model_ema_warmup': (bool, False),
    # share of the training images to evaluate on, where there is no folder for it; ours
    'val_share': (float, 0.0),
    # the gates of DeepMoE: epochs until they are frozen; ours, timm's train.py has no such option
    'freeze_gates': (int, None),
    # routes that do not depend on the view: 'jsd' or 'prc', its weights (none: 0.01; 0.005 and 0.05), and the areas of
    # the two crops; ours, too.
    # Every image of a batch is trained in two views, which doubles the compute; `view_areas` replaces `scale`.
    'route_consistency': (str, None), 'route_consistency_weight': ([float], None),
    'view_areas': ([float], [0.05, 0.7, 0.6, 1.0]),
    # groups of routed tokens are of one image each, so that capacity depends on no other image; ours, too
    'per_image_groups': (bool, False),
    # several processes: 'ddp' or 'fsdp', the ranks that share the experts, balance losses of the whole batch; ours, too
    'parallel': (str, 'ddp'), 'expert_parallel': (int, 1), 'balance_over_ranks': (bool, False),
    # the rest
    'seed': (int, 42), 'worker_seeding': (str, 'all'), 'log_interval': (int, 50), 'val_interval': (int, 1),
    'recovery_interval': (int, 0), 'checkpoint_hist': (int, 10), 'save_epochs': ([int], None),
    'workers': (int, 4), 'pin_mem': (bool, False), 'no_prefetcher': (bool, False), 'output': (str, ''),
    'experiment': (str, ''), 'eval_metric': (str, 'top1'),
}

# Known to timm's train.py and left to it: refused when switched on, otherwise without effect.
LEFT_TO_TIMM: Dict[str, str] = {
    'task': 'multi-label targets', 'naflex_loader': 'NaFlex loading', 'kd_model_name': 'distillation',
    'torchscript': 'training a scripted model', 'fuser': 'the choice of a TorchScript fuser',
    'log_wandb': 'logging to wandb', 'tta': 'test-time augmentation', 'save_images': 'saving input batches',
    'train_size_schedule': 'scheduled image sizes', 'train_input_sizes': 'scheduled image sizes',
    'train_img_sizes': 'scheduled image sizes', 'class_stats': 'class statistics', 'target_format': 'target formats',
    'loss_pos_weight': 'class weights', 'loss_class_weight': 'class weights', 'use_train_size': 'scheduled image sizes',
    'use_multi_epochs_loader': 'keeping workers between epochs', 'sweep_locks': 'sweeps',
    'sweep_attempt': 'sweeps', 'epoch_repeats': 'repeated epochs',
}
# Settings of the above: without effect as long as none of them is on.
SETTINGS_OF_THOSE = (
    'naflex_', 'kd_', 'wandb_', 'train_size_', 'train_batch_', 'loss_weight_', 'db_', 'twoway_', 'multilabel_',
    'distill_loss_weight', 'task_loss_weight', 'poly_gamma', 'poly_alpha', 'asl_reduction',
)
OFF = (None, False, '', 0, [], 'classification', 'constant', 'none')


def load_config(
        config: Union[str, os.PathLike, Mapping[str, Any]],
        overrides: Union[Sequence[str], Mapping[str, Any]] = (),
) -> argparse.Namespace:
    """Read a recipe.

    Args:
        config: A YAML file (as given, or below the `configs` folder that the package carries), or its content.
        overrides: `key=value` strings, values as YAML reads them, or a mapping; they win over the file.

    Returns:
        Every option of `OPTIONS` as an attribute, as timm's helpers take them.

    Raises:
        InputError: The file is missing or not YAML, a key is unknown (the nearest is named), a value has the wrong
            kind, or an option is one that timm's script keeps.
    """
    source = 'the configuration' if isinstance(config, Mapping) else f"'{config}'"
    given = dict(config if isinstance(config, Mapping) else _read_yaml(find_config(config)))
    overrides = overrides if isinstance(overrides, Mapping) else parse_overrides(overrides)
    values = {name: _copy(default) for name, (_, default) in OPTIONS.items()}
    for where, entries in ((source, given), ('the command line', overrides)):
        for key, value in entries.items():
            name, _, entry = str(key).replace('-', '_').partition('.')
            if entry and OPTIONS.get(name, (None,))[0] is dict:  # model_kwargs.num_experts=4
                values[name] = {**(values[name] or {}), entry: value}
            elif name in OPTIONS:
                values[name] = _convert(name, value, where)
            _refuse_unknown_or_left_out(name, value, where)
    return _settle(argparse.Namespace(**values))


def find_config(path: Union[str, os.PathLike]) -> Path:
    """The file itself, or the one of this name in the package's `configs` folder.

    Raises:
        InputError: Neither exists; the nearest recipes are named.
    """
    path = Path(path)
    packaged = folder('configs')
    parts = path.parts[1:] if path.parts[:1] == ('configs',) else path.parts
    for candidate in (path, packaged.joinpath(*parts), packaged.joinpath(*parts).with_suffix('.yaml')):
        if candidate.is_file():
            return candidate
    known = {p.stem: f'configs/{p.relative_to(packaged)}' for p in sorted(packaged.glob('*/*.yaml'))}
    raise InputError(f"There is no config file '{path}'.{nearest(path.stem, known)}")


def options_help() -> str:
    """Names and defaults of every option, for `--help`."""
    return ', '.join(f'{name}={default}' for name, (_, default) in OPTIONS.items() if name != 'data')


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        content = parse_yaml(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = ' '.join(str(error).split())
        raise InputError(f"The config '{path}' is not valid YAML: {reason}") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise InputError(f"The config '{path}' must hold 'name: value' lines, not a {type(content).__name__}.")
    return content


def parse_overrides(texts: Sequence[str]) -> Dict[str, Any]:
    """`key=value` strings as a mapping.

    Raises:
        InputError: A text has no `=`.
    """
    return dict(_split_override(text) for text in texts)


def _split_override(text: str) -> tuple:
    key, separator, value = text.partition('=')
    if not separator or not key:
        raise InputError(f'Cannot read {text!r}: options are given as key=value, for example epochs=10.')
    try:
        return key.lstrip('-'), parse_yaml(value) if value else ''
    except yaml.YAMLError:
        return key.lstrip('-'), value


def _refuse_unknown_or_left_out(name: str, value: Any, where: str) -> None:
    if name in LEFT_TO_TIMM and value not in OFF:
        raise InputError(
            f"{name}={value!r} in {where}: {LEFT_TO_TIMM[name]} is left to timm's own script, which trains these models"
            " through `moe-zoo run train.py ...`.")
    if name not in OPTIONS and name not in LEFT_TO_TIMM and not name.startswith(SETTINGS_OF_THOSE):
        hint = nearest(name, OPTIONS) or " Options have the names of timm's train.py; --help lists them."
        raise InputError(f'Unknown option {name!r} in {where}.{hint}')


def _copy(default: Any) -> Any:
    return type(default)(default) if isinstance(default, (list, dict)) else default


def _convert(name: str, value: Any, where: str) -> Any:
    """`value` as the kind that the option has. YAML 1.1 reads 3e-4 as a string: numbers may come as strings."""
    kind, default = OPTIONS[name]
    if value is None:
        return _copy(default)
    if name == 'torchcompile' and value is True:
        return 'inductor'  # the flag without a value
    try:
        if isinstance(kind, list):
            items = value if isinstance(value, (list, tuple)) else str(value).replace(',', ' ').split()
            return [_scalar(kind[0], item) for item in items]
        return _mapping(value) if kind is dict else _scalar(kind, value)
    except (TypeError, ValueError, AttributeError, OverflowError):
        wanted = f'a list of {kind[0].__name__}' if isinstance(kind, list) else kind.__name__
        raise InputError(f'{name}={value!r} in {where} must be {wanted}.') from None


def _scalar(kind: type, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ('true', 'yes', 'on', '1', 'false', 'no', 'off', '0'):
            return str(value).lower() in ('true', 'yes', 'on', '1')
        raise ValueError
    if isinstance(value, (bool, list, dict)):
        raise ValueError
    if kind is int and float(value) != int(float(value)):
        raise ValueError
    return int(float(value)) if kind is int else kind(value)


def _mapping(value: Any) -> Dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    items: List[str] = value if isinstance(value, list) else str(value).split()
    pairs = [item.partition('=') for item in items]
    if not all(separator for _, separator, _ in pairs):
        raise ValueError
    return {key: parse_yaml(text) for key, _, text in pairs}


def _settle(args: argparse.Namespace) -> argparse.Namespace:
    """Options that follow from others, and bounds that timm leaves to an assertion."""
    args.data_dir = args.data_dir or args.data
    args.prefetcher = not args.no_prefetcher
    for name in ('epochs', 'batch_size', 'grad_accum_steps', 'log_interval', 'val_interval', 'checkpoint_hist',
                 'expert_parallel'):
        if getattr(args, name) < 1:
            raise InputError(f'{name}={getattr(args, name)}: give at least 1.')
    _one_of(args, 'amp_dtype', ('float16', 'bfloat16'))
    _one_of(args, 'amp_impl', ('native',))
    _one_of(args, 'model_dtype', (None, 'float32', 'bfloat16', 'float16'))
    _one_of(args, 'eval_metric', ('top1', 'top5', 'loss'))
    _one_of(args, 'parallel', ('ddp', 'fsdp'))
    _one_of(args, 'dist_bn', ('reduce', 'broadcast', ''))
    if args.amp and args.model_dtype not in (None, 'float32'):
        raise InputError(f'amp=true with model_dtype={args.model_dtype}: mixed precision keeps the model in float32.')
    if args.aug_splits == 1:
        raise InputError('aug_splits=1: use 0 for none, or at least 2.')
    if args.stop_epoch is not None and not 1 <= args.stop_epoch:
        raise InputError(f'stop_epoch={args.stop_epoch}: give at least 1.')
    if not 0 <= args.val_share < 1:
        raise InputError(f'val_share={args.val_share}: give a share of the training images from 0 to below 1.')
    if args.freeze_gates is not None and args.freeze_gates < 0:
        raise InputError(f'freeze_gates={args.freeze_gates}: give the number of epochs that the gates train, or none.')
    if args.route_consistency_weight and not args.route_consistency:
        raise InputError(
            f'route_consistency_weight={args.route_consistency_weight}: say also route_consistency=jsd or =prc.')
    if args.jsd_loss and args.aug_splits < 2:
        raise InputError('jsd_loss=true compares augmented versions of an image: set aug_splits to at least 2.')
    return args


def _one_of(args: argparse.Namespace, name: str, accepted: Sequence[Optional[str]]) -> None:
    if getattr(args, name) not in accepted:
        listed = ', '.join(repr(a) for a in accepted if a)
        raise InputError(f'{name}={getattr(args, name)!r}: use one of {listed}.')


def parse_command_line(
        argv: Optional[Sequence[str]],
        arguments: argparse.ArgumentParser,
) -> Tuple[argparse.Namespace, Dict[str, Any]]:
    """Parse a command line whose flags and `key=value` options may stand in any order.

    Returns:
        The flags, and the options that win over a recipe: those given as `key=value`, and --data-dir.

    Raises:
        InputError: A flag is unknown; options of timm are given without dashes.
    """
    flags, unknown = arguments.parse_known_args(argv)
    for text in [text for text in unknown if text.startswith('-')]:
        name = text.lstrip('-').partition('=')[0]
        raise InputError(f"Unknown flag {text!r}: options of the recipe are given as {name.replace('-', '_')}=VALUE.")
    flags.options += unknown
    for name in ('resume', 'seeds'):  # flags with an open number of values swallow the options after them
        values = getattr(flags, name, None)
        if name == 'resume' and values and '=' in values and not Path(values).exists():
            flags.options.append(values)
            flags.resume = 'auto'
        elif name == 'seeds' and values:
            flags.options += [value for value in values if '=' in value]
            flags.seeds = [value for value in values if '=' not in value]
    overrides = parse_overrides(flags.options)
    if flags.data_dir:
        overrides['data_dir'] = flags.data_dir
    return flags, overrides
