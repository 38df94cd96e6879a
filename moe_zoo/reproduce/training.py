"""Data in memory and a compact training loop on timm's parts: what every experiment shares.

Data come in three splits. Hyper-parameters are chosen on validation; the test split is for finished experiments alone.
The loop is timm's optimiser and schedule around `MoEClassificationTask`, as in `moe_zoo.engine.train`, without
workers, checkpoints and logs.
Letters: N images, B images of a batch, C channels, H x W pixels.
"""
import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from PIL import Image
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import ImageFolder

from moe_zoo.analysis import count
from moe_zoo.data import load_digits_split
from moe_zoo.data.images import UnreadableImage, read_image
from moe_zoo.engine.task import MoEClassificationTask
from moe_zoo.errors import InputError
from moe_zoo.routing import set_epoch

__all__ = [
    'Data', 'Split', 'accuracy', 'batches', 'cost', 'fit', 'load_digits_data', 'load_folder', 'load_images', 'predict',
    'scattered', 'shifted',
]

HELD_OUT = 0.2  # of every class of the training images, for validation where no folder of it is given


class Split(NamedTuple):
    """Images and their classes; standardised by the mean and deviation of the training images, or from 0 to 1.

    Attributes:
        images: (N, C, H, W) float32.
        targets: (N,) int64.
    """
    images: torch.Tensor
    targets: torch.Tensor

    def take(self, positions: torch.Tensor) -> 'Split':
        """Some of the images, by position."""
        return Split(self.images[positions], self.targets[positions])


class Data(NamedTuple):
    """What an experiment learns from; `data._replace(train=data.train.take(some))` learns from fewer images."""
    train: Split
    validation: Split
    test: Split
    num_classes: int
    description: str

    @property
    def model_kwargs(self) -> dict[str, int]:
        """Keywords that fit a timm model to these data."""
        return {'in_chans': self.train.images.shape[1], 'num_classes': self.num_classes}


def load_images(folder: Optional[str], size: int = 32, standardise: bool = True) -> Data:
    """The images of a folder, see `load_folder`, or scikit-learn's digits where none is given."""
    return load_digits_data(size, standardise) if folder is None else load_folder(folder, size, standardise)


def load_digits_data(size: int = 32, standardise: bool = True) -> Data:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, enlarged to `size` x `size`."""
    x_train, y_train, x_test, y_test = load_digits_split()
    return _assemble("scikit-learn's digits", size, standardise, (x_train, y_train), (x_test, y_test))


def load_folder(folder: str, size: int = 32, standardise: bool = True) -> Data:
    """Images from an npz file, or from folders of one class each: `train/` and `test/` or `val/`.

    Where `val/` and `test/` are both there, `val/` is for validation; else a fifth of the training images is.

    Args:
        folder: The folder; or an npz file, or a folder with one, with `x_train`, `y_train`, `x_test`, `y_test`: uint8
            (N, H, W) or (N, H, W, C), and integers (N,).
        size: Height and width that images are brought to.
        standardise: Bring the mean of the training images to 0 and their deviation to 1, channel by channel; or else
            leave pixels from 0 to 1.

    Raises:
        InputError: There is no such data.
    """
    path = Path(folder).expanduser()
    archives = [path] if path.is_file() else sorted(path.glob('*.npz'))
    if len(archives) == 1:
        try:
            with np.load(archives[0], allow_pickle=False) as arrays:
                parts = [(arrays[f'x_{name}'], arrays[f'y_{name}'].astype(np.int64)) for name in ('train', 'test')]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"--data-dir '{archives[0]}' is no npz with x_train, y_train, x_test, y_test: {error}") from error
        return _assemble(path.resolve().name, size, standardise, *parts)
    folders = [path / name for name in ('train', 'test', 'val') if (path / name).is_dir()]
    if len(folders) < 2 or folders[0].name != 'train':
        raise InputError(f"--data-dir '{folder}' holds neither one npz file nor the folders train and test (or val).")
    try:
        found = [ImageFolder(part, loader=lambda file: _read(file, size)) for part in folders]
    except FileNotFoundError as error:
        raise InputError(f"--data-dir '{folder}': {error}") from error
    if any(part.classes != found[0].classes for part in found):
        raise InputError(f"--data-dir '{folder}': its parts hold folders of different classes.")
    parts = [(np.stack([image for image, _ in part]), np.asarray(part.targets)) for part in found]
    return _assemble(path.resolve().name, size, standardise, *parts)


def scattered(data: Data, copies: int = 4) -> Data:
    """A harder task from small images on a plain ground, which fewer weights cannot learn by heart.

    Every training image comes `copies` times, the others half as often, each time turned by up to 30 degrees, shrunk to
    between half and all of its size and put anywhere that it fits.
    """
    parts = [
        _scattered(split, number, seed)
        for seed, (split, number) in enumerate(zip(data[:3], (copies, copies // 2, copies // 2)))]
    text = f'{data.description}, scattered: {copies} copies of a training image, {copies // 2} of the others'
    return Data(*parts, data.num_classes, text)


def _scattered(split: Split, copies: int, seed: int) -> Split:
    split = split.take(torch.arange(len(split.targets)).repeat(copies))
    random = torch.Generator().manual_seed(seed)
    turn, shrink, right, down = torch.rand(4, len(split.targets), generator=random)
    scale = 1 - shrink / 2
    sine, cosine = (f((2 * turn - 1) * math.pi / 6) / scale for f in (torch.sin, torch.cos))
    matrix = torch.stack([torch.stack([cosine, -sine], 1), torch.stack([sine, cosine], 1)], 1)  # output to input
    room = torch.stack([2 * right - 1, 2 * down - 1], 1) * (1 - scale[:, None])
    theta = torch.cat([matrix, -matrix @ room[:, :, None]], 2)
    ground = split.images.amin(dim=(0, 2, 3), keepdim=True)
    grid = F.affine_grid(theta, split.images.shape, align_corners=False)
    return split._replace(images=F.grid_sample(split.images - ground, grid, align_corners=False) + ground)


def _read(file: str, size: int) -> np.ndarray:
    """(size, size, 3) uint8."""
    try:
        image = read_image(file, 'RGB')
        return np.asarray(image if image.size == (size, size) else image.resize((size, size), Image.BILINEAR))
    except UnreadableImage as error:
        raise InputError(f"The image '{file}' cannot be read: {error}") from error


def _assemble(
        name: str,
        size: int,
        standardise: bool,
        train: tuple[np.ndarray, np.ndarray],
        test: tuple[np.ndarray, np.ndarray],
        validation: Optional[tuple[np.ndarray, np.ndarray]] = None,
) -> Data:
    """Tensors of one size; validation images are held out of the training images where none are given."""
    if validation is None:
        held_out = _hold_out(train[1])
        train, validation = (tuple(a[~held_out] for a in train), tuple(a[held_out] for a in train))
    splits = [Split(_tensor(images, size), torch.from_numpy(targets)) for images, targets in (train, validation, test)]
    if standardise:
        mean = splits[0].images.mean(dim=(0, 2, 3), keepdim=True)
        std = splits[0].images.std(dim=(0, 2, 3), keepdim=True)
        splits = [split._replace(images=(split.images - mean) / std) for split in splits]
    counts = ', '.join(f'{len(s.targets):,} {kind}' for s, kind in zip(splits, ('train', 'validation', 'test')))
    num_classes = int(splits[0].targets.max()) + 1
    return Data(*splits, num_classes, f'{name}, {size} x {size} pixels: {counts}')


def _hold_out(targets: np.ndarray) -> np.ndarray:
    """(N,) bool: a fixed fifth of every class."""
    held_out = np.zeros(len(targets), dtype=bool)
    order = np.random.default_rng(0).permutation(len(targets))
    for target in np.unique(targets):
        of_class = order[targets[order] == target]
        held_out[of_class[:int(HELD_OUT * len(of_class))]] = True
    return held_out


def _tensor(images: np.ndarray, size: int) -> torch.Tensor:
    """(N, H, W) or (N, H, W, C) uint8 -> (N, C, size, size) float32 from 0 to 1."""
    x = torch.from_numpy(images if images.ndim == 4 else images[..., None]).permute(0, 3, 1, 2).float() / 255
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x, size=(size, size), mode='bilinear', antialias=True)
    return x.contiguous()


def fit(
        model: nn.Module,
        data: Data,
        epochs: float,
        batch_size: int = 64,
        lr: float = 0.05,
        seed: int = 0,
        opt: str = 'sgd',
        weight_decay: float = 1e-4,
        warmup_epochs: int = 1,
        sched: str = 'cosine',
        shift: int = 0,
        ema: Optional[float] = None,
        criterion: Optional[nn.Module] = None,
        on_epoch: Optional[Callable[[int, nn.Module], None]] = None,
        make_task: Callable[..., MoEClassificationTask] = MoEClassificationTask,
        prepare: Optional[Callable[[torch.Tensor, torch.Tensor, torch.Generator], tuple[Any, Any]]] = None,
) -> Optional[nn.Module]:
    """Train a model on `data.train`, auxiliary losses included. It is left in evaluation mode.

    Two arms with one seed meet the same batches, shifted alike, whatever their models draw.

    Args:
        model: A classifier; `set_epoch` is called on its modules as every epoch begins, `end_step` after every step.
        epochs, batch_size: Of the training images; the last batch of an epoch is left out unless it is full, and a
            fraction of an epoch is rounded to whole batches.
        lr, opt, weight_decay: Of timm's optimiser.
        warmup_epochs, sched: Of timm's schedule, which moves after every step.
        shift: Every training image is moved by up to so many pixels along both axes, the edge being repeated.
        ema: Decay of a moving average of the weights; None keeps none.
        criterion: Instead of cross entropy.
        on_epoch: Called with the number of finished epochs and the model, in training mode, after every epoch.
        make_task: Called with model and criterion; wants what `prepare` returns.
        prepare: Images and targets of a batch, and the generator of the batches, to what the task is given.

    Returns:
        The averaged model in evaluation mode, or None without `ema`.
    """
    task = make_task(model, criterion or nn.CrossEntropyLoss(), verbose=False)
    if ema is not None:
        task.setup_ema(decay=ema)
    optimizer = create_optimizer_v2(model, opt=opt, lr=lr, weight_decay=weight_decay)
    per_epoch = max(1, len(data.train.targets) // batch_size)
    steps = max(1, round(epochs * per_epoch))
    schedule, _ = create_scheduler_v2(
        optimizer, sched, num_epochs=steps / per_epoch, warmup_epochs=warmup_epochs, warmup_lr=lr / 10,
        step_on_epochs=False, updates_per_epoch=per_epoch)
    order = torch.Generator().manual_seed(seed)
    done = 0
    for epoch in range(math.ceil(steps / per_epoch)):
        task.train()
        set_epoch(model, epoch)
        for batch in islice(batches(data.train, batch_size, order, shift), steps - done):
            if schedule is not None:
                schedule.step_update(done)
            optimizer.zero_grad()
            task(*(prepare(*batch, order) if prepare else batch))['loss'].backward()
            optimizer.step()
            done += 1
            task.update_ema(step=done)
        if on_epoch is not None:
            on_epoch(epoch + 1, model)
    task.eval()
    return None if ema is None else task.get_eval_model(ema=True)


def batches(split: Split, batch_size: int, order: torch.Generator, shift: int = 0) -> Iterator[Split]:
    """One epoch of full batches in random order; of a split smaller than a batch, one with all of it."""
    positions = torch.randperm(len(split.targets), generator=order)
    for start in range(0, max(1, len(positions) - batch_size + 1), batch_size):
        images, targets = split.take(positions[start:start + batch_size])
        yield Split(shifted(images, shift, order) if shift else images, targets)


def shifted(images: torch.Tensor, most: int, random: torch.Generator) -> torch.Tensor:
    """(B, C, H, W), every image moved by up to `most` pixels along both axes, the edge being repeated."""
    B, C, H, W = images.shape
    padded = F.pad(images, (most,) * 4, mode='replicate')
    down, right = torch.randint(0, 2 * most + 1, (2, B, 1), generator=random)
    rows, columns = down + torch.arange(H), right + torch.arange(W)  # (B, H), (B, W)
    return padded[torch.arange(B)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.inference_mode()
def predict(model: nn.Module, images: torch.Tensor, batch_size: int = 256) -> torch.Tensor:
    """(N, classes) outputs in evaluation mode."""
    model.eval()
    return torch.cat([model(batch) for batch in images.split(batch_size)])


def accuracy(model: nn.Module, split: Split, batch_size: int = 256) -> float:
    """Share of the images whose class the model names, in percent."""
    right = predict(model, split.images, batch_size).argmax(dim=1) == split.targets
    return 100 * right.double().mean().item()


def cost(model: nn.Module, data: Data) -> dict[str, int]:
    """`parameters`, and `macs` of one image at most (see `moe_zoo.analysis.count`)."""
    counted = count(model, data.train.images[:1])
    return {'parameters': counted.parameters, 'macs': counted.macs_max}
