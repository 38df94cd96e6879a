"""Training batches that can be entered anywhere: batch n follows from the seed and n, whatever was read before it.

detectron2's own loader begins its order anew when a run is resumed, and its augmentation draws from states that live in
the worker processes. Here order and grouping by aspect ratio are planned in the main process, for which no image is
read, and every image draws its augmentation from a state of its own: the number of workers changes nothing.
"""
import contextlib
import random
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.build import _train_loader_from_config
from detectron2.utils import comm
from torch import Generator
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data.random_state import DATA, get_random_state, seed_stream, set_random_state
from ..errors import InputError

Place = Tuple[int, int]  # how many images this rank drew before, and which image of the data set it is


class Batches:
    """Endless batches of mapped images for this rank.

    Args:
        cfg: Names sampler, batch size, grouping and workers by detectron2's keys.
        dataset: Images and objects in detectron2's format.
        mapper: Reads one of them; None where it cannot be read, and another image is drawn.

    Attributes:
        seed: Of order and augmentation; the same on every rank.
        start: Number of the first batch that is given.
        files: Names of the images of the batch given last.
    """

    def __init__(
            self,
            cfg: CfgNode,
            dataset: List[Dict[str, Any]],
            mapper: Callable[[Dict[str, Any]], Optional[Dict[str, Any]]],
    ):
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self.start = 0
        self.files: List[str] = []
        self.cfg, self.dataset, self.mapper = cfg, dataset, mapper

    def __iter__(self) -> Iterator[List[Dict[str, Any]]]:
        loader = DataLoader(
            _Images(self.dataset, self.mapper, self.seed),
            batch_sampler=_Plan(self.cfg, self.dataset, self.seed, self.start),
            num_workers=self.cfg.DATALOADER.NUM_WORKERS,
            collate_fn=list,
            generator=Generator(),  # else it would draw from the model's
        )
        for batch in loader:
            self.files = [image['file_name'] for image in batch]
            yield batch


class _Plan(Sampler):
    """Batches of places from batch `start` on, those before it counted but not given."""

    def __init__(self, cfg: CfgNode, dataset: List[Dict[str, Any]], seed: int, start: int):
        with drawing_apart(seed):  # what detectron2's samplers draw when they are made follows from the seed as well
            self.order = _train_loader_from_config(cfg, mapper=lambda _: None, dataset=dataset)['sampler']
        if hasattr(self.order, '_seed'):
            self.order._seed = seed
        self.size = cfg.SOLVER.IMS_PER_BATCH // comm.get_world_size()
        grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING
        self.wide = [grouped and image['width'] > image['height'] for image in dataset]
        self.start = start

    def __iter__(self) -> Iterator[List[Place]]:
        waiting: Dict[bool, List[Place]] = {False: [], True: []}
        number = 0
        for drawn, index in enumerate(self.order):
            batch = waiting[self.wide[index]]
            batch.append((drawn, index))
            if len(batch) == self.size:
                waiting[self.wide[index]] = []
                if number >= self.start:
                    yield batch
                number += 1


class _Images(Dataset):
    """Images by place, each mapped with random states of its own."""

    def __init__(self, dataset: List[Dict[str, Any]], mapper: Callable, seed: int):
        self.dataset = DatasetFromList(dataset, copy=False)  # serialised: shared between workers
        self.mapper, self.seed = mapper, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Place) -> Dict[str, Any]:
        drawn, index = place
        with drawing_apart(self.seed, drawn):
            found = self.mapper(self.dataset[index])
            if found is None:
                others = iter(random.sample(range(len(self)), len(self)))
                found = next((image for i in others if (image := self.mapper(self.dataset[i])) is not None), None)
        if found is None:
            raise InputError('No image of the training set can be read; the log names them.')
        return found


@contextlib.contextmanager
def drawing_apart(seed: int, number: int = 0) -> Iterator[None]:
    """Random states that follow from seed, number and rank inside, and those of before outside."""
    outside = get_random_state(cuda=False)
    seed_stream(seed, number, comm.get_rank(), DATA)
    try:
        yield
    finally:
        set_random_state(outside)
