"""What a classifier made of every image of a data set: collected batch by batch, kept beside a run, read again.

A run keeps the outcomes of its last evaluation in `outcomes.json`, so that two runs can be compared image by image
(`moe_zoo.engine.difference`) without their data.

Letters: B images of a batch, N images of a data set, Y classes, T = min(5, Y).
"""
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Union

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import Dataset

from ..documents import parse_json
from ..errors import InputError, atomic_write
from .inference import name_of_image

FILE = 'outcomes.json'  # in the folder of a run
TOP = 5


@dataclass
class Outcomes:
    """Images in the order of the data set, without those that could not be read.

    Attributes:
        images: N names, relative to the folder of the split.
        targets: (N,) classes.
        likeliest: (N, T) classes that were predicted, the likeliest first.
        confidence: (N,) probability of the likeliest class.
        losses: (N,) cross-entropy.
        about: What was evaluated: model, weights, data, split, pixels, commit ...
    """
    images: List[str]
    targets: np.ndarray
    likeliest: np.ndarray
    confidence: np.ndarray
    losses: np.ndarray
    about: Dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def right(self) -> np.ndarray:
        """(N,) whether the likeliest class is the image's."""
        return self.likeliest[:, 0] == self.targets

    @property
    def among_five(self) -> np.ndarray:
        """(N,) whether the image's class is one of the five likeliest."""
        return (self.likeliest == self.targets[:, None]).any(axis=1)

    def write(self, path: Union[str, Path]) -> None:
        """Write a JSON file: lists by name, an entry an image."""
        content = {
            'about': self.about, 'images': self.images, 'targets': self.targets.tolist(),
            'likeliest': self.likeliest.tolist(),
            'confidence': [round(value, 7) for value in self.confidence.tolist()],
            'losses': [round(value, 7) for value in self.losses.tolist()],
        }
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(content) + '\n', encoding='utf-8')


def read_outcomes(path: Union[str, Path]) -> Outcomes:
    """What `Outcomes.write` wrote.

    Raises:
        InputError: The file is missing, or something else.
    """
    path = Path(path)
    try:
        content = parse_json(path.read_text(encoding='utf-8'))
        arrays = {name: np.asarray(content[name]) for name in ('targets', 'likeliest', 'confidence', 'losses')}
        found = Outcomes(list(content['images']), about=dict(content['about']), **arrays)
        whole = found.likeliest.ndim == 2 and {len(found), *map(len, arrays.values())} == {len(found)}
    except FileNotFoundError:
        raise InputError(f"There is no file '{path}' of outcomes by image.") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(
            f"'{path}' is no file of outcomes by image, as --outcomes of eval-imagenet writes it ({error}).") from error
    if not whole or not len(found):
        raise InputError(f"'{path}' is damaged: its lists of outcomes by image are empty or differ in length.")
    return found


class OutcomeLog:
    """Collects outcomes while a loader is gone through, in order on one process, in turns on several.

    Args:
        rank: Of this process.
        world_size: Number of processes; process r sees images r, r + world_size, ... (timm's sampler).
    """

    def __init__(self, rank: int = 0, world_size: int = 1):
        self.rank, self.world_size = rank, world_size
        self.seen = 0
        self.rows: List[tuple] = []

    def add(self, output: torch.Tensor, target: torch.Tensor, real: torch.Tensor) -> None:
        """Add a batch.

        Args:
            output: (B, Y) logits.
            target: (B,) classes.
            real: (B,) whether an image counts; the others are repetitions or could not be read.
        """
        numbers = self.rank + self.world_size * torch.arange(self.seen, self.seen + len(target))
        self.seen += len(target)
        output, target = output[real].float(), target[real]
        if not len(target):
            return
        likeliest = output.topk(min(TOP, output.shape[1]), dim=1).indices
        confidence = output.softmax(dim=1).amax(dim=1)
        losses = torch.nn.functional.cross_entropy(output, target, reduction='none')
        self.rows.append((numbers[real.cpu()], target, likeliest, confidence, losses))

    def finish(self, dataset: Dataset, about: Dict[str, Any]) -> Outcomes:
        """All of it, from every process, in the order of the data set.

        Raises:
            InputError: No image could be read.
        """
        parts = [tuple(column.cpu() for column in row) for row in self.rows]
        if self.world_size > 1:
            gathered: List[Any] = [None] * self.world_size
            dist.all_gather_object(gathered, parts)
            parts = [row for rows in gathered for row in rows]
        if not parts:
            raise InputError('The data have no image that can be read.')
        numbers, targets, likeliest, confidence, losses = (torch.cat(column) for column in zip(*parts))
        order = numbers.argsort()
        names = [name_of_image(dataset, int(number)) for number in numbers[order]]
        return Outcomes(names, *(column[order].numpy() for column in (targets, likeliest, confidence, losses)), about)
