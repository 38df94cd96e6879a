"""Reads the cards of registry/: what is known of a model without building it. Standard library only.

A card is `registry/<family>/<model>.toml`; model, file and timm name are one. Costs are MACs (a multiply-add is one).
The card of a dense model, which is there as the twin of a routed one, names no twin. Cards are written by hand, but for
two parts that only `moe_zoo.card_writer` changes: the numbers of [cost] (`moe-zoo cards --write` counts them), and the
[[measured]] rows at the end, of two kinds.

A row of an experiment (`tools/reproduce.py --publish`) has experiment, dataset, metric, mean, std, seeds (how many),
verdict, commit and versions. A row of finished runs (`tools/eval_imagenet.py --record`) has

    dataset     'digits', 'CIFAR-10', 'ImageNet-1k' or another name; "ImageNet" stands nowhere in a row unless all
                50,000 images of its validation set were evaluated
    data        what of it was used: '1,442 train, 355 test'
    images      how many were evaluated
    metric      'top-1'; in percent
    mean, std   over the seeds; std is that of a sample and left out where there is one seed
    seeds       which: [0, 1, 2]
    epochs      of training
    pixels      edge of an image as the model got it, in evaluation
    model_args  what timm.create_model was given beside the name: { num_classes = 10, img_size = 32, num_experts = 4 }
    parameters, macs
                of that model, MACs at most for one image of this size; `moe-zoo cards --check` counts them again
    macs_executed
                those that ran, the mean over evaluation images and seeds; left out where it was not counted
    twin        { model, model_args, mean, std, seeds, parameters, macs, macs_executed } of the dense twin that was
                trained on the same batches; left out where there was none
    config      the recipe, 'configs/...'
    command     what to type to train it, and its twin
    commit, versions, hardware
                of the runs: 'torch 2.14.1, timm 1.0.31'; '2 threads of an AMD EPYC 7B13'

The rows whose dataset is 'digits' or 'CIFAR-10' are the README's table of accuracy.
"""
import tomllib
from pathlib import Path

from .errors import InputError, nearest
from .resources import folder


def cards(registry: Path | None = None) -> dict[str, dict]:
    """Every card by model name, sorted by name.

    Args:
        registry: Another folder of cards than the package's own.

    Raises:
        InputError: A card is not valid TOML.
    """
    return {name: _read(path) for name, path in sorted(_paths(registry).items())}


def card(name: str, registry: Path | None = None) -> dict:
    """The card of one model: the tables of its TOML file as nested dictionaries.

    Raises:
        InputError: No card has this name (the nearest names are said), or the card is not valid TOML.
    """
    return _read(card_path(name, registry))


def card_path(name: str, registry: Path | None = None) -> Path:
    """The file of one card.

    Raises:
        InputError: No card has this name; the nearest names are said.
    """
    paths = _paths(registry)
    if name not in paths:
        hint = nearest(name, paths) or ' `moe-zoo list` shows all names.'
        raise InputError(f'There is no model {name!r} in moe_zoo.{hint}')
    return paths[name]


def dense_twin(entry: dict) -> tuple[str, dict]:
    """Name and keywords of the dense network that stands beside the model of a card.

    Raises:
        InputError: The model is dense itself.
    """
    if 'twin' not in entry:
        raise InputError(f"{entry['name']!r} is a dense network itself and has no twin; name a routed model.")
    return entry['twin'], entry.get('twin_args', {})


def _paths(registry: Path | None) -> dict[str, Path]:
    return {path.stem: path for path in (registry or folder('registry')).glob('*/*.toml')}


def _read(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError, OSError) as error:  # numbers and dates are wrong in ways of their own
        raise InputError(f"The card '{path}' is not valid TOML: {' '.join(str(error).split())}") from error
