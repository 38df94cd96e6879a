"""Writes what was measured and counted into the cards of registry/ and into the README. Standard library only.

A card is written by hand but for two parts: the numbers of [cost], and the rows below the line `MEASURED`. Only these
change here; comments, order and spelling of everything else stay. A file is replaced as a whole or stays as it was.
What a row holds is said in `moe_zoo.cards`.
"""
import json
import math
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .card_tables import accuracy_table, models_table
from .cards import card_path, cards
from .errors import InputError, atomic_write, nearest

MEASURED = '\n# Everything below is written by tools/reproduce.py --publish and tools/eval_imagenet.py --record.\n'
IMAGENET = 50_000  # images of the validation set

RUN = ('dataset', 'data', 'images', 'metric', 'mean', 'seeds', 'epochs', 'pixels', 'model_args', 'parameters', 'macs',
       'config', 'command', 'commit', 'versions', 'hardware')
RUN_TWIN = ('model', 'model_args', 'mean', 'seeds', 'parameters', 'macs')
EXPERIMENT = ('experiment', 'dataset', 'metric', 'mean', 'std', 'seeds', 'verdict', 'commit', 'versions')
README_TABLES = {'models': models_table, 'accuracy': accuracy_table}  # between <!-- name --> and <!-- /name -->


def write_measured(name: str, rows: Iterable[Mapping[str, Any]], root: Path | None = None) -> Path:
    """Put results of runs on the card of a model, and renew the README's tables.

    A row takes the place of an older one with the same experiment, dataset, data, metric and command (but for its seeds
    and twin); others stay.

    Args:
        name: Of the model, as on the card.
        rows: As `moe_zoo.cards` describes them.
        root: Of the checkout; None is the one that runs.

    Returns:
        The card's file.

    Raises:
        InputError: moe_zoo does not run from a checkout, there is no such card, its rows were edited by hand, or a row
            lacks something, has something unknown, or speaks of ImageNet without having been measured there.
    """
    root = root or checkout()
    rows = [dict(row) for row in rows]
    for row in rows:
        check_row(row)
    path = card_path(name, root / 'registry')
    if renew(path, lambda text: with_measured(
        text, {_key(row): row for row in (*measured_rows(text, path), *rows)}.values())):
        renew_readme(root)
    return path


def write_cost(name: str, cost: Mapping[str, int], root: Path | None = None) -> Path:
    """Renew the numbers of [cost] on the card of a model, and the README's tables.

    Args:
        cost: Any of parameters, active_parameters and macs.

    Raises:
        InputError: moe_zoo does not run from a checkout, there is no such card, or it has no such number.
    """
    root = root or checkout()
    path = card_path(name, root / 'registry')
    if renew(path, lambda text: with_cost(text, cost)):
        renew_readme(root)
    return path


def renew_readme(root: Path) -> bool:
    """Write the README's tables of models and of accuracy from the cards; says whether that changed it."""
    known = cards(root / 'registry')

    def change(text: str) -> str:
        for name, table in README_TABLES.items():
            text = with_block(text, name, table(known))
        return text

    return renew(root / 'README.md', change)


def checkout() -> Path:
    """Root of the checkout that runs.

    Raises:
        InputError: moe_zoo runs from an installed wheel.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / 'pyproject.toml').is_file():
        raise InputError(f"Cards, docs/ and README.md are written in a checkout, and moe_zoo runs from '{root}'.")
    return root


def renew(path: Path, change: Callable[[str], str]) -> bool:
    """Replace the text of a file by what `change` makes of it, if it changes anything; says whether it did."""
    before = path.read_text(encoding='utf-8')
    after = change(before)
    if after == before:
        return False
    with atomic_write(path) as temporary:
        temporary.write_text(after, encoding='utf-8')
    return True


# --- Texts ------------------------------------------------------------------------------------------------------------

def with_block(text: str, name: str, content: str) -> str:
    """The text with `content` between the lines `<!-- name -->` and `<!-- /name -->`, where it has them."""
    pattern = re.compile(rf'(<!-- {name} -->\n).*?(<!-- /{name} -->)', re.S)
    return pattern.sub(lambda found: f'{found[1]}{content}{found[2]}', text)


def with_measured(text: str, rows: Iterable[Mapping[str, Any]]) -> str:
    """The text of a card with these rows as all that is written below its line `MEASURED`.

    Raises:
        InputError: A value cannot be written as TOML.
    """
    by_hand = text.partition(MEASURED)[0]
    rows = ''.join(map(_table, rows))
    return by_hand + MEASURED + rows if rows else by_hand


def measured_rows(text: str, path: Path | None = None) -> list[dict[str, Any]]:
    """The rows below the line `MEASURED` of a card.

    Raises:
        InputError: Something there was not written by this module, and would be lost by writing.
    """
    written = text.partition(MEASURED)[2]
    try:
        rows = tomllib.loads(written).get('measured', [])
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"The card '{path}' is not valid TOML: {error}") from error
    if ''.join(map(_table, rows)) != written:
        raise InputError(
            f"The card '{path}' was edited by hand below the line '{MEASURED.strip()}': move that above it.")
    return rows


def with_cost(text: str, cost: Mapping[str, int]) -> str:
    """The text of a card with these numbers in its table [cost].

    Raises:
        InputError: The table lacks one of them.
    """
    head, mark, rest = text.partition('\n[cost]')
    table, end, tail = rest.partition('\n[')
    for key, value in cost.items():
        table, found = re.subn(rf'(?m)^({key} *= *)[\d_]+', rf'\g<1>{value}', table)
        if found != 1:
            raise InputError(f'The card has no number {key!r} in its table [cost], where there must be one.')
    return head + mark + table + end + tail


def _table(row: Mapping[str, Any]) -> str:
    return '\n[[measured]]\n' + ''.join(f'{_word(key)} = {_toml(value)}\n' for key, value in row.items())


def _word(key: str) -> str:
    return key if re.fullmatch(r'[\w-]+', key, re.A) else json.dumps(key, ensure_ascii=False)


def _toml(value: Any) -> str:
    """A number, string, list or dictionary as TOML on one line; JSON's strings and numbers are TOML's."""
    if isinstance(value, Mapping):
        return '{ ' + ', '.join(f'{_word(key)} = {_toml(each)}' for key, each in value.items()) + ' }'
    if isinstance(value, (list, tuple)):
        return '[' + ', '.join(map(_toml, value)) + ']'
    if not isinstance(value, (str, bool, int, float)) or isinstance(value, float) and not math.isfinite(value):
        raise InputError(f'{value!r} cannot be written on a card: give strings, finite numbers, lists or dictionaries.')
    return json.dumps(value, ensure_ascii=False).replace('\x7f', '\\u007f')


# --- Rows -------------------------------------------------------------------------------------------------------------

def _key(row: Mapping[str, Any]) -> tuple:
    """What makes two rows results of the same: with more seeds, or a twin, a run is the same one."""
    recipe = re.sub(r' --twin\b| --seeds( -?\d+)+', '', row.get('command', ''))
    return (*(row.get(part) for part in ('experiment', 'dataset', 'data', 'metric')), recipe)


def check_row(row: Mapping[str, Any]) -> None:
    """Refuse a row that is not as `moe_zoo.cards` describes it.

    Raises:
        InputError: What is missing, unknown or not so.
    """
    if 'experiment' in row:
        _check_keys('A row of an experiment', row, EXPERIMENT, ())
    else:
        _check_keys('A row of runs', row, RUN, ('std', 'twin', 'macs_executed'))
        if 'twin' in row:
            _check_keys("The 'twin' of a row of runs", row['twin'], RUN_TWIN, ('std', 'macs_executed'))
        for part in (row, row.get('twin', {'seeds': [0]})):
            if ('std' in part) != (len(part['seeds']) > 1):
                raise InputError(f'seeds={part["seeds"]}: a row has std where there are several seeds, and only there.')
    if says_imagenet(row) and row.get('images') != IMAGENET:
        raise InputError(f'dataset={row["dataset"]!r} with images={row.get("images")}: a row speaks of ImageNet only '
                         f'where all {IMAGENET:,} images of its validation set were evaluated; name these otherwise.')


def says_imagenet(row: Mapping[str, Any]) -> bool:
    """Whether a row speaks of ImageNet; the name of a recipe or script does not."""
    told = [str(value) for key, value in row.items() if key not in ('config', 'command')]
    return 'imagenet' in ' '.join(told).lower()


def _check_keys(what: str, row: Mapping[str, Any], needed: tuple[str, ...], optional: tuple[str, ...]) -> None:
    missing = [key for key in needed if key not in row]
    unknown = [key for key in row if key not in needed + optional]
    if unknown:
        raise InputError(f'{what} has no {unknown[0]!r}.{nearest(unknown[0], needed + optional)}')
    if missing:
        raise InputError(f'{what} lacks {", ".join(missing)}; moe_zoo.cards says what it holds.')
