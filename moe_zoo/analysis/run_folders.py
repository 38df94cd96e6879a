"""The folder of one training, read: what `train-imagenet` and `train-coco` leave, checked and brought into one form.

A classifier leaves args.yaml and summary.csv, and above it results.json; a detector config.yaml, metrics.json and
results.json.
"""
import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Optional

import yaml

from ..cards import card
from ..documents import parse_json, parse_yaml
from ..errors import InputError

MARKS = {'args.yaml': 'summary.csv', 'config.yaml': 'metrics.json'}  # what marks a training, and its log


class Unusable(Exception):
    """A folder that is no finished training; the message is one sentence that names it."""


@dataclass(frozen=True)
class Training:
    """One training, of one seed.

    Attributes:
        folder: Where it lies.
        kind: 'classification' or 'detection'.
        model: Name of the classifier; meta-architecture of the detector, and timm's backbone if it has one.
        card: Name of the card of the model or backbone, where there is one.
        layer: Kind of routed layer of a detector, where it has no card.
        twin: Name of the dense network that stands beside the model, where the card or the recipe names one.
        routed: Whether anything routed.
        dataset: Name of the evaluation data.
        seed: None where it was drawn.
        metrics: At the end, in percent; a loss as it is. None: could not be measured.
        rows: Of `step` (epochs or iterations done), `loss`, `score`; what a row lacks was not measured then.
        balance: Layer to (step, evenness of the experts).
        live: Layer of channel gates to (step, share of the channels that are on).
        options: The recipe.
        cost: parameters, active_parameters and macs_max, as far as results.json tells.
        versions: Of what trained it.
        checkpoint: The last one; None where it is gone.
    """
    folder: Path
    kind: str
    model: str
    routed: bool
    dataset: str
    seed: Optional[int]
    metrics: Mapping[str, Optional[float]]
    rows: tuple[Mapping[str, float], ...]
    balance: Mapping[str, tuple[tuple[float, float], ...]]
    options: Mapping[str, Any]
    live: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    card: str = ''
    layer: str = ''
    twin: str = ''
    cost: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Optional[str]] = field(default_factory=dict)
    checkpoint: Optional[Path] = None


def read_training(folder: Path) -> Training:
    """Read one folder.

    Raises:
        Unusable: It is unfinished, damaged, or was not written by our tools.
    """
    read = _classifier if (folder / 'args.yaml').is_file() else _detector
    try:
        return _of_numbers(read(folder))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, csv.Error) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise Unusable(f"'{folder}' is damaged: {reason}.") from error


def _of_numbers(training: Training) -> Training:
    """The same with figures that can be worked with: what is not finite was not measured, nor is a cost of None known.

    Raises:
        ValueError: Something else than a number stands where one belongs, or something else than a text.
    """
    for name, value in {**training.metrics, **training.cost}.items():
        if not isinstance(value, (int, float, type(None))):
            raise ValueError(f'{name} is {value!r}, which is no number')
    texts = {name: getattr(training, name) for name in ('model', 'dataset', 'card', 'layer', 'twin')}
    for name, value in {**texts, **training.versions}.items():
        if not isinstance(value, (str, type(None))):
            raise ValueError(f'{name} is {value!r}, which is no text')
    if any('step' not in row for row in training.rows):
        raise ValueError('its log has a row of no epoch, or of no iteration')
    if not isinstance(training.seed, (int, type(None))):
        raise ValueError(f'the seed is {training.seed!r}, which is no whole number')
    finite = {name: value if value is not None and math.isfinite(value) else None
              for name, value in training.metrics.items()}
    return replace(
        training, metrics=finite, cost={name: value for name, value in training.cost.items() if value is not None})


# ---- classifiers

def _classifier(folder: Path) -> Training:
    options = _mapping(folder / 'args.yaml')
    if 'model' not in options or 'epochs' not in options:
        raise Unusable(f"'{folder}' is of another program: its args.yaml names no model and epochs.")
    rows = _summary(folder / 'summary.csv')
    planned = min(options['epochs'], options.get('stop_epoch') or options['epochs'])
    if not rows or rows[-1]['epoch'] + 1 < planned:
        done = int(rows[-1]['epoch']) + 1 if rows else 0
        raise Unusable(f"'{folder}' is unfinished: {done} of {planned} epochs are done.")
    final = next((row for row in reversed(rows) if 'eval_top1' in row), {})
    averaged = 'ema_' if 'eval_ema_top1' in final else ''
    name = str(options['model']).partition('.')[0]
    results, versions = _results(folder)
    kwargs = options.get('model_kwargs') or {}
    return Training(
        folder=folder, kind='classification', model=options['model'], card=name,
        routed=any(key.startswith(('balance_', 'live_')) for key in rows[-1]),
        dataset=options.get('dataset') or Path(options.get('data_dir') or options.get('data') or 'unnamed').name,
        seed=options.get('seed'),
        metrics={key: final.get(f'eval_{averaged}{key}') for key in ('top1', 'top5', 'loss')},
        rows=tuple(_epoch(row, f'eval_{averaged}top1') for row in rows),
        balance=_by_layer(rows, 'balance_'), live=_by_layer(rows, 'live_'),
        options=options, twin=kwargs.get('base') or _twin_of(name),
        cost={'macs_max' if key == 'macs' else key: results[key]
              for key in ('parameters', 'active_parameters', 'macs') if key in results},
        versions=versions, checkpoint=_existing(folder / 'last.pth.tar'))


def _summary(path: Path) -> list[dict[str, float]]:
    """Rows of summary.csv; empty cells are left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding='utf-8')
    if text and not text.endswith('\n'):
        raise ValueError(f'the last row of {path.name} is cut off')
    reader = csv.DictReader(text.splitlines(), strict=True)
    rows = [{key: float(value) for key, value in row.items() if value not in ('', None)} for row in reader]
    if any('epoch' not in row for row in rows):
        raise ValueError(f'{path.name} has a row without an epoch')
    return rows


def _epoch(row: Mapping[str, float], score: str) -> dict[str, float]:
    found = {'step': row['epoch'] + 1, 'loss': row.get('train_loss'), 'score': row.get(score)}
    return {key: value for key, value in found.items() if value is not None and math.isfinite(value)}


def _by_layer(rows: list[dict[str, float]], prefix: str) -> dict[str, tuple[tuple[float, float], ...]]:
    names = dict.fromkeys(key for row in rows for key in row if key.startswith(prefix))
    return {name.removeprefix(prefix): tuple(
                (row['epoch'] + 1, row[name]) for row in rows if math.isfinite(row.get(name, math.nan)))
            for name in names}


def _results(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entry of this training in the results.json of its own folder or one above, and the versions beside it."""
    for place in (folder, *folder.resolve().parents[:3]):
        path = place / 'results.json'
        if not path.is_file():
            continue
        content = _json(path)
        entries = [*content.get('model', []), *content.get('twin', [])] if isinstance(content, dict) else []
        below = folder.resolve().relative_to(place.resolve()).parts
        for entry in entries:  # folders are named as they were: only their ends survive a move
            if isinstance(entry, dict) and Path(entry.get('folder', '')).parts[-len(below) - 1:][1:] == below:
                return entry, content.get('versions', {})
    return {}, {}


def _twin_of(name: str) -> str:
    try:
        return card(name).get('twin', '')
    except InputError:  # no card: a network of timm's
        return ''


# ---- detectors

def _detector(folder: Path) -> Training:
    options = _mapping(folder / 'config.yaml')
    if 'MODEL' not in options or 'SOLVER' not in options:
        raise Unusable(f"'{folder}' is of another program: its config.yaml is no config of detectron2.")
    lines = _lines(folder / 'metrics.json')
    path, last = folder / 'results.json', max((line['iteration'] for line in lines), default=-1)
    if not any('total_loss' in line for line in lines):
        raise Unusable(f"'{folder}' holds no training: metrics.json logs no iteration.")
    if not path.is_file():
        raise Unusable(f"'{folder}' is unfinished: it has no results.json after {int(last) + 1} of "
                       f'{options["SOLVER"]["MAX_ITER"]} iterations.')
    content = _json(path)
    metrics = content.get('metrics') or {}
    if 'bbox' not in metrics and metrics:  # several test sets: the first
        metrics = next(iter(metrics.values()))
    backbone, layer, routed = _network(options)
    logged = any(key.startswith('moe/') for line in lines for key in line)
    return Training(
        folder=folder, kind='detection', card=backbone, layer=layer, routed=routed or logged,
        model=' '.join(filter(None, [options['MODEL']['META_ARCHITECTURE'].removeprefix('MoE'), backbone])),
        dataset=_test_set(options), seed=options['SEED'] if options['SEED'] >= 0 else None,
        metrics={**metrics.get('bbox', {}),
                 **{f'mask {key}': value for key, value in metrics.get('segm', {}).items()}},
        rows=tuple(_iteration(line) for line in lines if 'total_loss' in line or 'bbox/AP' in line),
        balance=_balance_of_iterations(lines), options=options, versions=content.get('versions', {}),
        checkpoint=_existing(folder / 'model_final.pth'))


def _network(options: Mapping[str, Any]) -> tuple[str, str, bool]:
    """Name of timm's backbone, if it is one; kind of the routed layers of the rest; whether the config asks for any."""
    ours, backbone = options.get('MOE', {}), options['MODEL']['BACKBONE']['NAME']
    timm = ours.get('TIMM', {}).get('NAME', '') if 'timm' in backbone else ''
    stages = ours.get('RESNET', {}).get('STAGES') if backbone == 'build_moe_resnet_fpn_backbone' else []
    head = ours.get('HEAD', {}).get('SUBNETS', 'none') != 'none'
    layer = ours['RESNET']['LAYER'] if stages else 'moe' if head else ''
    return timm, layer, bool(layer or (timm and _twin_of(timm)))



def _lines(path: Path) -> list[dict[str, float]]:
    if not path.is_file():
        return []
    lines = [parse_json(line) for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
    if not all(isinstance(line, dict) and 'iteration' in line for line in lines):
        raise ValueError(f'{path.name} has a line without an iteration')
    return lines


def _test_set(options: Mapping[str, Any]) -> str:
    """The name of the data: of the folder or file that was given, else the registered one."""
    data, named = options.get('MOE', {}).get('DATA', {}), options['DATASETS']['TEST']
    if data.get('TEST_JSON'):
        return Path(data['TEST_JSON']).stem
    if data.get('ROOT'):
        return Path(data['ROOT']).name
    return named[0] if named else 'none'


def _iteration(line: Mapping[str, float]) -> dict[str, float]:
    done = line['iteration'] + ('total_loss' in line)  # an evaluation is filed under the iterations before it
    found = {'step': done, 'loss': line.get('total_loss'), 'score': line.get('bbox/AP')}
    return {key: value for key, value in found.items() if value is not None and math.isfinite(value)}


def _balance_of_iterations(lines: list[dict[str, float]]) -> dict[str, tuple[tuple[float, float], ...]]:
    """Evenness of the logged shares, layer by layer."""
    found: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        layers: dict[str, list[float]] = {}
        for key, value in line.items():
            if key.startswith('moe/') and key.endswith('_share'):
                layers.setdefault(key[4:].rpartition('/')[0], []).append(value)
        for layer, shares in layers.items():
            found.setdefault(layer, []).append((line['iteration'] + 1, evenness(shares)))
    return {layer: tuple(points) for layer, points in found.items()}


def evenness(shares: list[float]) -> float:
    """Entropy over ln E: 1 where all experts are used alike, 0 where one does everything."""
    total = sum(shares)
    if len(shares) == 1 or total <= 0:
        return 1.
    parts = [share / total for share in shares if share > 0]
    return abs(sum(p * math.log(p) for p in parts)) / math.log(len(shares))


# ---- files

def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(path.read_text(encoding='utf-8'))
    except yaml.YAMLError as error:
        mark = getattr(error, 'problem_mark', None)
        where = f' in line {mark.line + 1}' if mark else ''
        raise ValueError(f'{path.name} is not yaml: {getattr(error, "problem", None) or error}{where}') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path.name} holds no options')
    return content


def _json(path: Path) -> Any:
    try:
        return parse_json(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON: {error}") from error


def _existing(path: Path) -> Optional[Path]:
    return path if path.is_file() else None
