"""What has to be said beside numbers of cost: spread over images, what was not counted, and MACs that are no time.

Letters: E experts, K chosen.
"""
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..documents import parse_json
from ..errors import InputError, counted
from ..layers import ChannelGated
from ..layers.cond_conv import CondConv2d, CondLinear
from ..layers.routed import RoutedLayer
from .cost import Cost
from .count_tables import Result
from .tables import quantity
from .timing import Ratio


def remarks(results: Sequence[Result]) -> list[str]:
    """What has to be said beside the table."""
    lines = []
    for result in results:
        if result.images:
            spread, skipped = result.images.spread(), counted(len(result.skipped), 'unreadable one')
            lines.append(
                f'{result.name}: executed {spread.mean:,.0f} +- {spread.std:,.0f} MACs on '
                f'{counted(len(result.counted), "image")}, from {spread.least:,} to {spread.most:,}'
                + (f'; {skipped} skipped' if result.skipped else ''))
        lines += [f'{result.name}: NOT COUNTED {words}' for words in uncounted_words(result.uncounted)]
        lines += [f'{result.name}: {note}' for note in result.notes]
        lines += [f'* {result.name}, time: {note}' for note in result.time_notes]
    if any(result.open_ended and not result.images for result in results):
        lines.append('"-": what a routed model executes depends on weights and images; --images DIR measures it.')
    return lines


def time_notes(model: nn.Module, cost: Cost) -> tuple[str, ...]:
    """Sentences on MACs of a model that take more time than others, and on time that no MAC stands for.

    What is said holds on any machine; how much time it is, only a timing tells (`measured_notes`).
    """
    total = cost.macs_max or 1
    images = cost.images or 1
    mixed = images * sum(
        p.numel() for module in model.modules() if isinstance(module, (CondConv2d, CondLinear))
        for p in module.parameters(recurse=False))
    depthwise = sum(
        cost.by_module.get(name, 0) for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1)
    choosing = [layer for layer in model.modules() if isinstance(layer, RoutedLayer) and _dispatches(layer)]
    notes = []
    if mixed:
        notes.append(
            f'{quantity(mixed)} of the MACs ({100 * mixed / total:.1f} %) mix kernels, anew for every image: it '
            'reads all experts from memory, which takes longer than as many MACs of a convolution')
    if depthwise > 0.01 * total:
        notes.append(
            f'{quantity(depthwise)} of the MACs ({100 * depthwise / total:.1f} %) are depthwise convolutions, '
            'which wait for memory: a MAC takes longer there than in others')
    if choosing:
        notes.append('sorting what is routed, and moving it to its experts and back, takes time and no MACs')
    if any(isinstance(module, ChannelGated) for module in model.modules()):
        notes.append(
            'channels that a gate closes are computed all the same, unless single images run under '
            'moe_zoo.layers.sparse_inference')
    return tuple(notes)


def _dispatches(layer: RoutedLayer) -> bool:
    return layer.num_selected < layer.num_experts


class Timings:
    """What `tools/benchmark.py --json` wrote, to be said beside the MACs of the models it timed."""

    def __init__(self, path: str):
        """
        Raises:
            InputError: The file is missing or of another program.
        """
        try:
            self.report = parse_json(Path(path).read_text(encoding='utf-8'))
            self.notes = [(_timed(row), _sentence(row, self.report['machine'])) for row in self.report['rows']]
        except FileNotFoundError:
            raise InputError(f"--times: there is no file '{path}'; tools/benchmark.py --json writes one.") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--times: '{path}' is not what tools/benchmark.py --json writes ({type(error).__name__}: {error})."
            ) from error

    def of(self, name: str) -> tuple[str, ...]:
        """Sentences on one model or detector; none where it was not timed."""
        return tuple(note for timed, note in self.notes if timed == name)


def _timed(row: dict[str, Any]) -> str:
    """The model, or the detector by the name of its config; '' for a layer."""
    return row.get('model') or Path(row.get('config', '')).stem


def _sentence(row: dict[str, Any], machine: dict[str, Any]) -> str:
    what = 'a training step' if row['mode'] == 'train' else 'a forward pass'
    images = row.get('batch_size', 1)
    twin = row['twin'] + (' of equal MACs' if row.get('equal_macs') else '')
    return (
        f'measured: {what} of {counted(images, "image")} takes {Ratio(**row["time_ratio"])} times as long as '
        f'{twin}, at {row["macs_ratio"]:.3f} of its MACs ({machine["device"]}, {machine["threads"]} threads)')


def uncounted_words(uncounted: dict[str, Iterable[str]]) -> list[str]:
    """Every operator that was not counted, with up to three modules that call it."""
    words = []
    for op, where in sorted(uncounted.items()):
        where = [name or 'the model itself' for name in where]
        words.append(f'{op}, in {", ".join(where[:3])}{" and others" if len(where) > 3 else ""}')
    return words
