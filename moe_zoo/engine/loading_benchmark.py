"""What `tools/benchmark.py data` times: an epoch of training images through our loader and through timm's own.

The images are generated JPEG files of 320 x 256, in a folder and in a tar; the transforms are those of a recipe that
says nothing. Ours names and counts unreadable images (`CheckedImages`), or makes two views of every image.

Letters: B images.
"""
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_loader

from ..analysis.timing import Settings, comparison
from ..errors import InputError
from .config import load_config
from .data import create_loaders, open_dataset

CASES = {  # name: what is read, options of the recipe
    'folder': ('a folder of JPEG files', {}),
    'tar': ('a tar of JPEG files', {}),
    'two-views': ('a folder of JPEG files, two views of each image', {'route_consistency': 'jsd'}),
}
CLASSES = 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def benchmark_loading(
        name: str,
        folder: Path,
        settings: Settings,
        workers: int = 2,
        batch_size: int = 32,
        size: int = 224,
) -> list[dict]:
    """Time an epoch of one case, against timm's loader on the same files, which makes one view of each.

    Args:
        name: A key of `CASES`.
        folder: Made by `write_images`.
        settings: How it is timed.
        workers: Processes that read.
        batch_size: B.
        size: Side of the images that come out.

    Returns:
        One row; `images` is how many an epoch has.
    """
    about, options = CASES[name]
    root = folder / 'train.tar' if name == 'tar' else folder / 'train'
    ours = our_loader(root, options, workers, batch_size, size)
    theirs = timm_loader(root, workers, batch_size, size)
    runs = [epoch_of(ours), epoch_of(theirs)]
    timings = settings._replace(min_seconds=0).alternate(runs)
    images = len(theirs) * batch_size
    row = {'kind': 'data', 'case': name, 'about': about, 'layer': 'ours', 'images': images, 'workers': workers}
    return [row | comparison("timm's loader", 'epoch', *timings.seconds, timings.loads)]


def our_loader(root: Path, options: dict, workers: int, batch_size: int, size: int):
    """The training loader of a recipe."""
    args = load_config({'data_dir': str(root.parent), 'batch_size': batch_size, 'workers': workers, **options})
    args.distributed, args.world_size = False, 1
    if root.suffix == '.tar':
        args.data_dir = str(root)
    dataset = open_dataset(args, training=True)
    config = {'input_size': (3, size, size), 'mean': MEAN, 'std': STD, 'interpolation': 'bicubic', 'crop_pct': 0.875,
              'crop_mode': 'center'}
    return create_loaders(args, config, dataset, None, torch.device('cpu')).train


def timm_loader(root: Path, workers: int, batch_size: int, size: int):
    """timm's own dataset and loader, with the same transforms; its workers, too, are new in every epoch."""
    args = load_config({})
    return create_loader(
        create_dataset('', root=str(root)), (3, size, size), batch_size, is_training=True, scale=args.scale,
        ratio=args.ratio, hflip=args.hflip, color_jitter=args.color_jitter, interpolation=args.train_interpolation,
        mean=MEAN, std=STD, num_workers=workers, pin_memory=args.pin_mem, persistent_workers=False,
        device=torch.device('cpu'))


def epoch_of(loader) -> Callable[[], None]:
    """One epoch as a function: every batch is taken, and nothing is done with it."""
    def run() -> None:
        for _ in loader:
            pass

    return run


def write_images(folder: Path, images: int, height: int = 256, width: int = 320) -> Path:
    """Images of smooth noise, as hard to decode as photographs, as JPEG files in folders of classes and in a tar.

    Raises:
        InputError: Fewer images than classes.
    """
    if images < CLASSES:
        raise InputError(f'--images {images}: give at least {CLASSES}, one a class.')
    rng = np.random.default_rng(0)
    with tarfile.open(folder / 'train.tar', 'w') as tar:
        for number in range(images):
            small = rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(buffer, 'JPEG', quality=90)
            name = f'class{number % CLASSES}/{number:05d}.jpg'
            path = folder / 'train' / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(buffer.getvalue())
            tar.add(path, name)
    return folder
