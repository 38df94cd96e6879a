"""Small things that several stages say or look up."""
import os
import shlex
from pathlib import Path

from torch import nn

from moe_zoo.layers import RoutedLayer


def num_experts(model: nn.Module) -> int:
    """The largest number of experts of a routed layer; 0 in a dense model."""
    return max((layer.num_experts for layer in model.modules() if isinstance(layer, RoutedLayer)), default=0)


def short(number: float) -> str:
    """`129.9 M` of 129872800."""
    for size, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if number >= size:
            return f'{number / size:.{1 if size < 1e9 else 2}f} {letter}'
    return str(number)


def command(*words: str) -> str:
    """A block of the page that shows a command; paths below the working directory as a person there would type them."""
    below = [os.path.relpath(w) if os.path.isabs(w) and Path(w).is_relative_to(Path.cwd()) else w for w in words]
    return f'$ python {shlex.join(below)}'
