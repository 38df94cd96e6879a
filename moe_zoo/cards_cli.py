"""`moe-zoo cards`: counts again what the cards say (`--check`), or writes what a count finds (`--write`).

Counted are parameters, active parameters and MACs of every card, and of every recorded run and its dense twin, on meta
tensors. Compared are the input size with the model's, the twin (it can be built and routes nothing), the recipe (it is
there and trains this model), and the README's tables with the cards.
"""
import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import moe_zoo  # noqa: F401 - registers the models

from .analysis.cost import count
from .card_writer import README_TABLES, check_row, checkout, renew_readme, with_block, write_cost, write_measured
from .cards import card, card_path, cards, dense_twin
from .engine.config import load_config
from .errors import InputError, counted, exit_on_input_error
from .layers import RoutedLayer

EXAMPLES = """
examples:
  %(prog)s --check                     every card and the README's tables; exit code 2 and a sentence for every drift
  %(prog)s --check vmoe_vit_s dyconv_resnet10
  %(prog)s --write                     parameters and MACs as counted, and the README's tables

Nothing else of a card is written: accuracy enters by tools/eval_imagenet.py --record and tools/reproduce.py --publish,
the rest by hand.
"""
TRAINING = re.compile(r'(python|torchrun( --\S+)*) tools/train_imagenet\.py ')  # how the command of a card begins
COUNTED = ('parameters', 'active_parameters', 'macs')
NEEDED = {  # tables of a card, and what they hold
    'paper': ('title', 'authors', 'year', 'venue', 'arxiv', 'bibtex'), 'input': ('size',), 'cost': (*COUNTED, 'unit'),
    'recipe': ('config', 'command'), 'weights': ('note',)}

Card = dict[str, Any]


# --- Counting ---------------------------------------------------------------------------------------------------------

def counts(name: str, model_args: Mapping[str, Any], size: Sequence[int]) -> dict[str, int]:
    """What a model costs, under the names of a card's [cost].

    Args:
        model_args: What timm.create_model gets beside the name.
        size: (C, H, W) of one image.

    Raises:
        InputError: It cannot be built, or runs operators that no count knows.
    """
    cost = count(_build(name, model_args), torch.empty(1, *size, device='meta'))
    if cost.uncounted:
        raise InputError(f'{name} runs operators that no count knows: {", ".join(cost.uncounted)}.')
    return dict(zip(COUNTED, (cost.parameters, cost.active_parameters, cost.macs_max)))


def recounted(entry: Card) -> Card:
    """A card as a count says that it should be: [cost], and the costs of its recorded runs and their twins.

    Raises:
        InputError: As `counts`.
    """
    size = entry['input']['size']
    cost = entry['cost'] | counts(entry['name'], {}, size)
    rows = [_recounted_run(entry['name'], row, size[0]) for row in entry.get('measured', [])]
    return entry | {'cost': cost} | ({'measured': rows} if rows else {})


def _recounted_run(name: str, row: Card, channels: int) -> Card:
    if 'model_args' not in row:  # of an experiment, which counts its own networks
        return row
    size = (row['model_args'].get('in_chans', channels), row['pixels'], row['pixels'])
    row = _recosted(name, row, size)
    return row | {'twin': _recosted(row['twin']['model'], row['twin'], size)} if 'twin' in row else row


def _recosted(name: str, part: Card, size: Sequence[int]) -> Card:
    found = counts(name, part['model_args'], size)
    return part | {key: found[key] for key in ('parameters', 'macs')}


def _build(name: str, model_args: Mapping[str, Any]) -> nn.Module:
    try:
        return timm.create_model(name, device='meta', **model_args).eval()
    except Exception as error:  # whatever a constructor raises
        raise InputError(f'{name} cannot be built: {" ".join(str(error).split())}') from error


# --- Comparing --------------------------------------------------------------------------------------------------------

def drifts(entry: Card) -> Iterator[str]:
    """A sentence for everything of a card that is not so."""
    incomplete = list(_form_drifts(entry))
    if incomplete:
        yield from incomplete
        return
    name = entry['name']
    try:
        model, now = _build(name, {}), recounted(entry)
    except InputError as error:
        yield str(error)
        return
    for where, stated, found in _differences(entry, now):
        yield f'{name}: the card says {where} = {stated}, a count finds {found}.'
    size, stated = list(model.pretrained_cfg['input_size']), entry['input']['size']
    if stated != size:
        yield f'{name}: the card says input size {stated}, the model says {size}.'
    if entry['family'] != (folder := card_path(name).parent.name):
        yield f"{name}: the card says family = {entry['family']!r} and lies in the folder {folder!r}."
    yield from _twin_drifts(entry, model)
    yield from _recipe_drifts(entry)


def _form_drifts(entry: Card) -> Iterator[str]:
    name = entry.get('name', 'a card without a name')
    lacking = [key for key in ('name', 'family', 'summary') if key not in entry]
    lacking += [f'{table}.{key}' for table, keys in NEEDED.items() for key in keys if key not in entry.get(table, {})]
    if lacking:
        yield f'{name}: the card lacks {", ".join(lacking)}.'
    elif entry['cost']['unit'] != 'MACs':
        yield f"{name}: the card says cost.unit = {entry['cost']['unit']!r}, costs are in 'MACs'."
    for number, row in enumerate(entry.get('measured', [])):
        try:
            check_row(row)
        except InputError as error:
            yield f'{name}: measured[{number}]: {error}'


def _differences(stated: Any, found: Any, where: str = '') -> Iterator[tuple[str, Any, Any]]:
    """Numbers of a card that differ from those of another, with their places: ('cost.macs', 1, 2)."""
    if isinstance(stated, dict):
        for key, value in stated.items():
            yield from _differences(value, found[key], f'{where}.{key}' if where else key)
    elif isinstance(stated, list):
        for i, (a, b) in enumerate(zip(stated, found)):
            yield from _differences(a, b, f'{where}[{i}]')
    elif stated != found:
        yield where, stated, found


def _twin_drifts(entry: Card, model: nn.Module) -> Iterator[str]:
    if 'twin' in entry:
        name, model_args = dense_twin(entry)
        try:
            model = _build(name, model_args)
        except InputError as error:
            yield f'{entry["name"]}: its dense twin {error}'
            return
    if any(isinstance(module, RoutedLayer) for module in model.modules()):
        yield f'{entry["name"]}: ' + (f'its twin {name} routes.' if 'twin' in entry else 'it routes and names no twin.')


def _recipe_drifts(entry: Card) -> Iterator[str]:
    name, recipe = entry['name'], entry['recipe']
    try:
        trained = load_config(recipe['config']).model
    except InputError as error:
        yield f'{name}: its recipe cannot be used: {error}'
        return
    if trained != name:
        yield f"{name}: its recipe '{recipe['config']}' trains {trained}."
    if not TRAINING.match(recipe['command']) or f" --config {recipe['config']} " not in recipe['command'] + ' ':
        yield f"{name}: the command {recipe['command']!r} does not train its recipe '{recipe['config']}'."


def registered() -> list[str]:
    """Names of all models that moe_zoo has registered with timm."""
    return [name for name in timm.list_models()
            if timm.models.model_entrypoint(name).__module__.startswith('moe_zoo.')]


def readme_drifts(root: Path) -> Iterator[str]:
    """A sentence for every table of the README that is not what the cards say."""
    text, known = (root / 'README.md').read_text(encoding='utf-8'), cards(root / 'registry')
    for name, table in README_TABLES.items():
        if with_block(text, name, table(known)) != text:
            yield f"README.md: the table '{name}' is not what the cards say; `moe-zoo cards --write` renews it."


# --- The command ------------------------------------------------------------------------------------------------------

def check(names: Iterable[str], progress: Progress) -> list[str]:
    """Every drift of these cards."""
    return [text for name in progress.track(list(names), description='counting') for text in drifts(card(name))]


def write(names: Iterable[str], progress: Progress, root: Path) -> list[str]:
    """Write what a count finds on these cards, and the README's tables; says what changed."""
    readme, changed = root / 'README.md', []
    before = readme.read_text(encoding='utf-8')
    for name in progress.track(list(names), description='counting'):
        entry = card(name)
        now = recounted(entry)
        changed += [f'{name}: {where} {stated} -> {found}' for where, stated, found in _differences(entry, now)]
        write_cost(name, {key: now['cost'][key] for key in COUNTED}, root)
        write_measured(name, [row for row in now.get('measured', []) if 'model_args' in row], root)
    renew_readme(root)
    return changed + (['README.md: tables renewed'] if readme.read_text(encoding='utf-8') != before else [])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description='Count again what the cards of registry/ say.', epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    what = result.add_mutually_exclusive_group(required=True)
    what.add_argument('--check', action='store_true', help='say what is not so; exit code 2 if anything is not')
    what.add_argument('--write', action='store_true', help='write what a count finds, in a checkout')
    result.add_argument('names', nargs='*', metavar='NAME', help='of models; all by default')
    return result


@exit_on_input_error
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code, which is 2 where something has drifted."""
    args = parser().parse_args(argv)
    for name in args.names:
        card(name)  # unknown ones are refused before anything is counted
    known = cards()
    names = args.names or list(known)
    console = Console(stderr=True)
    columns = TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        if args.write:
            changed = write(names, progress, checkout())
            print('\n'.join(changed) or f'{counted(len(names), "card")}: nothing to write.')
            return 0
        found = check(names, progress)
    readme = Path(__file__).resolve().parents[1] / 'README.md'
    if not args.names:
        found += [f'{name} is registered and has no card.' for name in registered() if name not in known]
        found += readme_drifts(readme.parent) if readme.is_file() else []  # a wheel has none
    print(''.join(f'error: {text}\n' for text in found), end='', file=sys.stderr)
    if not found:
        print(f'{counted(len(names), "card")}: everything is as a count finds it.')
    return 2 if found else 0


if __name__ == '__main__':
    raise SystemExit(main())
