"""Enters finished runs into the card of their model: `tools/eval_imagenet.py --record RUN`.

The weights that every seed ended with are evaluated again; their mean and deviation become a row of the card
(`moe_zoo.cards` says what it holds), beside those of the dense twin where one was trained. Never the best checkpoint of
a run: it was chosen on the images that it would be measured on.
"""
import argparse
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import yaml

from ..analysis.origin import DIRTY, short_commit, uncommitted
from ..analysis.runs import SEEDLESS, Run, read_runs
from ..card_writer import checkout, write_measured
from ..cards import card_path
from ..errors import InputError
from ..resources import folder
from .build import model_keywords
from .compare import hardware
from .config import OPTIONS, load_config
from .data import holds_out, open_dataset
from .difference import evaluate_run

NAMES = {'digits': 'digits', 'cifar10': 'CIFAR-10', 'cifar-10': 'CIFAR-10'}  # of folders, as the cards call them
# Options that a run fills in itself where its recipe leaves them open.
FILLED_IN = ('lr', 'num_classes', 'device')
# Keywords of a model that are about training alone.
OF_TRAINING = ('drop_rate', 'drop_path_rate', 'drop_block_rate', 'bn_momentum', 'bn_eps')


def record(
        paths: Sequence[Union[str, Path]],
        overrides: Mapping[str, Any] = {},  # noqa: B006 - read only
        data_name: Optional[str] = None,
        root: Optional[Path] = None,
) -> Dict[Path, Dict[str, Any]]:
    """Enter every run (with all its seeds) that the folders hold into a card.

    Args:
        paths: Folders of runs, or of their seeds.
        overrides: Options of the evaluation that win over those of the run, such as val_split or data_dir.
        data_name: What the data are called on the card; by default the name of their folder.
        root: Of the checkout; None is the one that runs.

    Returns:
        The files of the cards, and the rows that they got.

    Raises:
        InputError: A run is unfinished or no classifier's, its model has no card, or the images were used for choosing.
    """
    root = root or checkout()
    found = read_runs(paths)
    if found.left_out:
        raise InputError(f'--record takes finished runs only. {found.left_out[0]}')
    twins = [run.twin for run in found.runs if run.twin]
    written = {}
    for run in [run for run in found.runs if not any(run is twin for twin in twins)]:
        if run.kind != 'classification':
            raise InputError(f"'{run.trainings[0].folder}' is a detector's run: only classifiers are recorded.")
        name = run.model.partition('.')[0]
        card_path(name, root / 'registry')  # before anything takes time
        check_split(run, overrides)
        row = measured_row(run, overrides, data_name)
        written[write_measured(name, [row], root)] = row
    return written


def check_split(run: Run, overrides: Mapping[str, Any]) -> None:
    """Raises: InputError: The images that a run would be measured on were used to train it or to choose."""
    trained = load_config(run.options)
    asked = load_config(run.options, overrides)
    where = f"--record '{run.trainings[0].folder}': its evaluation images"
    remedy = 'name others, with val_split=NAME or --data-dir DIR.'
    if asked.val_split == asked.train_split and _place(asked)[:2] == _place(trained)[:2]:
        raise InputError(f'{where} (val_split={asked.val_split}) are those that it was trained on; {remedy}')
    if _place(asked) != _place(trained):
        return
    if holds_out(trained):
        raise InputError(f'{where} are the share of the training images (val_share={trained.val_share:g}) that was held'
                         f' out for choosing; {remedy}')
    if trained.sched == 'plateau':
        raise InputError(f'{where} chose its learning rate (sched=plateau); {remedy}')


def _place(args: argparse.Namespace) -> Tuple[Any, ...]:
    where = None if args.dataset == 'digits' or not args.data_dir else Path(args.data_dir).resolve()
    return args.dataset, where, args.val_split


def measured_row(run: Run, overrides: Mapping[str, Any], data_name: Optional[str] = None) -> Dict[str, Any]:
    """The row of a run's card, measured now."""
    args = load_config(run.options, overrides)
    print(f"evaluating {len(run.trainings)} seed(s) of '{run.name}'", file=sys.stderr)
    results, part = _measure(run, overrides)
    config, changed = nearest_recipe(run.options)
    images, seeds = results[0]['images'], part['seeds']
    if len({result['images'] for result in results}) > 1:
        raise InputError(f"The seeds of '{run.name}' were evaluated on unequally many images.")
    twin = None
    if run.twin is not None:
        theirs, twin = _measure(run.twin, overrides)
        if theirs[0]['outcomes'].images != results[0]['outcomes'].images:
            raise InputError(f"'{run.name}' and its twin were evaluated on different images.")
        twin = {'model': run.twin.model, **twin}
    folder_name = Path(args.data_dir).resolve().name if args.data_dir and args.dataset != 'digits' else args.dataset
    return {
        'dataset': data_name or NAMES.get(folder_name.lower(), folder_name),
        'data': f'{_training_images(run, overrides):,} train, {images:,} {args.val_split}',
        'images': images,
        'metric': 'top-1',
        **{key: part[key] for key in ('mean', 'std', 'seeds') if key in part},
        'epochs': int(run.trainings[0].rows[-1]['step']),
        'pixels': results[0]['input']['input_size'][-1],
        **{key: part[key] for key in ('model_args', 'parameters', 'macs', 'macs_executed')},
        **({'twin': twin} if twin else {}),
        'config': config,
        'command': command(config, changed, args, seeds, twin is not None),
        'commit': _commit(run),
        'versions': ', '.join(f'{key} {run.versions[key]}' for key in ('torch', 'timm') if run.versions.get(key)),
        'hardware': run.versions.get('hardware') or hardware(results[0]['throughput']['machine']),
    }


def _training_images(run: Run, overrides: Mapping[str, Any]) -> int:
    """How many there are where the run had them, or, should they have moved, where it is evaluated."""
    try:
        return len(open_dataset(load_config(run.options), True))
    except InputError:
        if 'data_dir' not in overrides:
            raise
        return len(open_dataset(load_config(run.options, overrides), True))


def _measure(run: Run, overrides: Mapping[str, Any]) -> Tuple[List[Dict[str, Any]], Dict[str, Any]]:
    """What `evaluate` says of every seed, and what of it stands on a card."""
    results = [evaluate_run(training, overrides) for training in run.trainings]
    scores = [result['top1'] for result in results]
    part = {
        'model_args': model_arguments(load_config(run.options)),
        'mean': round(statistics.fmean(scores), 2),
        **({'std': round(statistics.stdev(scores), 2)} if len(scores) > 1 else {}),
        'seeds': list(run.seeds),
        'parameters': results[0]['parameters'],
        'macs': results[0]['macs'],
        'macs_executed': round(statistics.fmean(result['macs_executed'] for result in results)),
    }
    return results, part


def model_arguments(args: argparse.Namespace) -> Dict[str, Any]:
    """What a run gave timm.create_model beside the name, as far as it says what the model is."""
    left = ('model_name', 'pretrained_cfg', *OF_TRAINING)
    found = {key: value for key, value in model_keywords(args).items() if key not in left and value is not None}
    size = found.get('img_size')
    if isinstance(size, (list, tuple)) and len(set(size)) == 1:
        found['img_size'] = size[0]
    return found


def nearest_recipe(options: Mapping[str, Any]) -> Tuple[str, Dict[str, Any]]:
    """The recipe in configs/ that a run of these options departs from least, and what it changes in it.

    Raises:
        InputError: No recipe is of this model.
    """
    base = folder('configs')
    candidates = []
    for path in sorted(base.glob('*/*.yaml')):
        if str(options['model']) not in path.read_text(encoding='utf-8') or path.parent.name == 'coco':
            continue
        recipe = vars(load_config(path))
        if recipe['model'] == options['model']:
            changed = {
                key: value for key, value in options.items()
                if key in OPTIONS and key not in SEEDLESS and value != recipe[key]
                and not (key in FILLED_IN and recipe[key] is None)}
            candidates.append((len(changed), f'configs/{path.relative_to(base).as_posix()}', changed))
    if not candidates:
        raise InputError(f"No recipe in configs/ is of the model {options['model']!r}, and a row of a card names one.")
    _, config, changed = min(candidates, key=lambda each: each[:2])
    return config, changed


def command(config: str, changed: Mapping[str, Any], args: argparse.Namespace, seeds: Sequence[int], twin: bool) -> str:
    """What to type to train it again."""
    words = ['python', 'tools/train_imagenet.py', '--config', config]
    words += ['--data-dir', 'DIR'] if args.data_dir and args.dataset != 'digits' else []
    words += [f'{key}={_flow(value)}' for key, value in sorted(changed.items())]
    words += ['--seeds', *map(str, seeds)]
    return shlex.join(words + ['--twin'] * twin)


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix('...\n').strip()


def _commit(run: Run) -> str:
    """The commits that trained the seeds, marked where files of the package were changed then, or are now."""
    commits = list(dict.fromkeys(training.versions.get('commit') for training in run.trainings))
    if None in commits:
        return 'unknown'
    dirty = any(commit.endswith(DIRTY) for commit in commits)
    if not dirty and uncommitted():
        dirty = True
        print('warning: moe_zoo has uncommitted changes; the row is marked as such', file=sys.stderr)
    elif dirty:
        print(f"warning: '{run.name}' was trained with uncommitted changes; the row is marked as such", file=sys.stderr)
    return ', '.join(short_commit(commit.removesuffix(DIRTY)) for commit in commits) + DIRTY * dirty


def main(flags: argparse.Namespace, overrides: Dict[str, Any]) -> int:
    """`eval-imagenet --record`; returns the exit code."""
    for name in ('config', 'model', 'pretrained', 'checkpoint', 'use_ema', 'real_labels'):
        if getattr(flags, name):
            raise InputError(f'--{name.replace("_", "-")} with --record, which evaluates the weights and the recipe of '
                             'the run: leave it out.')
    if flags.class_map:
        overrides['class_map'] = flags.class_map
    for path, row in record(flags.record, overrides, flags.data_name).items():
        spread = f' +- {row["std"]}' if 'std' in row else ''
        beside = f', twin {row["twin"]["mean"]}' if 'twin' in row else ''
        print(f"{row['mean']}{spread} % top-1 on {row['dataset']} ({row['data']}){beside}: now on '{path}'")
    return 0
