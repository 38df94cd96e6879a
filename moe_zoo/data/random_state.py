"""Random states that make a resumed run the uninterrupted one, and a twin's batches those of the model.

Every epoch (of a detector: every iteration and every image) starts from states that depend on seed, epoch and rank
alone, so that it can be entered without the ones before it. Data (order, worker seeds, augmentation, mixup) draw from a
state of their own, so that what a model draws (dropout, router noise) does not move them.
"""
import random
from typing import Any, Dict, Iterable, Iterator

import numpy as np
import torch

from ..errors import InputError

MODEL, DATA = 0, 1  # streams of random numbers within an epoch


def seed_stream(seed: int, epoch: int, rank: int = 0, stream: int = MODEL) -> None:
    """Set the states of Python, NumPy and torch for one stream of one epoch (iteration, image) on one rank."""
    word = int(np.random.SeedSequence([seed, epoch, rank, stream]).generate_state(1)[0])
    random.seed(word)
    np.random.seed(word)
    torch.manual_seed(word)


def get_random_state(cuda: bool = True) -> Dict[str, Any]:
    """The states of Python, NumPy, torch and the current CUDA device, in types that `weights_only=True` loads."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if cuda and torch.cuda.is_available() else None,
    }


def set_random_state(state: Dict[str, Any]) -> None:
    """Undo everything drawn since `get_random_state` returned `state`."""
    version, words, gauss = state['python']
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state['torch'])
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


def iterate_apart(loader: Iterable, seed: int, epoch: int, rank: int = 0) -> Iterator:
    """Iterate over `loader` with a random state of its own, started for this epoch.

    Whatever the caller draws between two batches neither moves the data nor is moved by them. On a GPU the state of
    the device is shared (random erasing in pixel mode draws there).
    """
    outside = get_random_state(cuda=False)
    seed_stream(seed, epoch, rank, DATA)
    iterator, refusal = None, ''
    while True:
        # Entered with the data's state set, left with the caller's.
        try:
            iterator = iter(loader) if iterator is None else iterator
            batch = next(iterator)
        except StopIteration:
            return
        except InputError as error:  # from a worker process its text is that one's traceback
            refusal = str(error).rpartition('InputError: ')[2].strip()
            error.__traceback__ = None  # which holds the loader, whose workers would linger
        finally:
            inside = get_random_state(cuda=False)
            set_random_state(outside)
        if refusal:
            iterator = None
            raise InputError(refusal)
        yield batch
        outside = get_random_state(cuda=False)
        set_random_state(inside)
