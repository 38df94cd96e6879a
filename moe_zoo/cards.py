"""Reads the cards of registry/: what is known of a model without building it. Standard library only.

A card is `registry/<family>/<model>.toml`; model, file and timm name are one. Costs are MACs (a multiply-add is one).
The card of a dense model, which is there as the twin of a routed one, names no twin.
"""
import tomllib
from pathlib import Path

from moe_zoo.errors import InputError, nearest
from moe_zoo.resources import folder


def cards() -> dict[str, dict]:
    """Every card by model name, sorted by name.

    Raises:
        InputError: A card is not valid TOML.
    """
    return {name: _read(path) for name, path in sorted(_paths().items())}


def card(name: str) -> dict:
    """The card of one model: the tables of its TOML file as nested dictionaries.

    Raises:
        InputError: No card has this name (the nearest names are said), or the card is not valid TOML.
    """
    paths = _paths()
    if name not in paths:
        hint = nearest(name, paths) or ' `moe-zoo list` shows all names.'
        raise InputError(f'There is no model {name!r} in moe_zoo.{hint}')
    return _read(paths[name])


def dense_twin(entry: dict) -> tuple[str, dict]:
    """Name and keywords of the dense network that stands beside the model of a card.

    Raises:
        InputError: The model is dense itself.
    """
    if 'twin' not in entry:
        raise InputError(f"{entry['name']!r} is a dense network itself and has no twin; name a routed model.")
    return entry['twin'], entry.get('twin_args', {})


def _paths() -> dict[str, Path]:
    return {path.stem: path for path in folder('registry').glob('*/*.toml')}


def _read(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text(encoding='utf-8'))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"The card '{path}' is not valid TOML: {error}") from error
