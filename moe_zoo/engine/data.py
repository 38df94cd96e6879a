"""Images for training and evaluation: timm's datasets, transforms, mixup and loader, checked before they are used.

`dataset: digits` is scikit-learn's handwritten digits; every other name, or a plain folder, is timm's business.
"""
import argparse
import copy
import logging
import pickle
import random
import tarfile
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

import torch
import torch.distributed as dist
from timm.data import AugMixDataset, FastCollateMixup, ImageDataset, Mixup, create_dataset, create_loader
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch.utils.data import Dataset

from ..data import collate_two_views
from ..data.images import read_image, refuse_no_file
from ..errors import InputError, counted, nearest
from .consistency import check_options, two_view_transform
from .labels import read_class_map

_logger = logging.getLogger(__name__)

PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')  # timm's dataset types
LEFT_OUT = -1  # target that stands for an image which evaluation must not count
SYNONYMS = {
    'train': ('training',),
    'validation': ('val', 'valid', 'eval', 'evaluation'),
    'val': ('validation', 'valid', 'eval', 'evaluation'),
}


class Loaders(NamedTuple):
    """What one run draws from."""
    train: Any
    eval: Any
    mixup: Optional[Mixup]  # applied by the loop; None where the loader's collate does it, or nothing


class CheckedImages(ImageDataset):
    """timm's image dataset, except that an image which cannot be read is named and counted.

    In training the next readable image takes its place; in evaluation its target becomes `LEFT_OUT`.

    Args:
        reader: A reader of timm's, which knows files and targets.
        training: Whether another image may take the place of a corrupt one.
        strict: Refuse the first corrupt image instead.
        input_img_mode: Mode that images are converted to.
    """

    def __init__(self, reader: Any, training: bool, strict: bool = False, input_img_mode: str = 'RGB'):
        super().__init__(root=None, reader=reader, input_img_mode=input_img_mode)
        self.training = training
        self.strict = strict
        # In shared memory, where worker processes write and this one reads.
        self.corrupt = torch.zeros(len(reader), dtype=torch.bool).share_memory_()

    def __getitem__(self, index: int):
        if not 0 <= index < len(self.reader):
            raise IndexError(f'image {index} of {len(self.reader)}')
        for step in range(len(self.reader)):
            position = (index + step) % len(self.reader)
            if self.corrupt[position]:
                continue
            try:
                if isinstance(self.reader, ReaderImageFolder):
                    refuse_no_file(self.reader.samples[position][0])  # the reader opens it
                file, target = self.reader[position]
                with file:
                    image = read_image(file, self.input_img_mode)
            except Exception:  # the readers of files and tars have no error in common; this one is not to be had
                self.corrupt[position] = True
                if self.strict:
                    break
                continue
            if position != index and not self.training:
                target = LEFT_OUT
            return (image if self.transform is None else self.transform(image)), target
        raise InputError(self.refusal())

    def refusal(self) -> str:
        """The sentence for data that cannot be used."""
        names = self.corrupt_files()
        if self.strict and names:
            return (
                f"Corrupt image '{names[0]}': --strict-data refuses data with unreadable images; repair or remove it,"
                ' or leave the flag out to skip and count them.')
        return f'All {len(self)} images are unreadable, the first is {self.filename(0, absolute=True)!r}.'

    def corrupt_files(self) -> List[str]:
        """Paths of the images found unreadable so far, on any rank and in any worker."""
        flags = self.corrupt
        if dist.is_available() and dist.is_initialized():
            device = 'cuda' if dist.get_backend() == 'nccl' else 'cpu'
            shared = flags.to(device=device, dtype=torch.uint8)
            dist.all_reduce(shared, dist.ReduceOp.MAX)
            flags = shared.cpu().bool()
        return [self.filename(i, absolute=True) for i in flags.nonzero().flatten().tolist()]


def open_dataset(args: argparse.Namespace, training: bool, strict: bool = False, class_map: Any = None) -> Dataset:
    """The training or evaluation images that a recipe names.

    Args:
        args: Options, see `moe_zoo.engine.config`.
        training: Which split: `train_split` or `val_split`.
        strict: Refuse unreadable images.
        class_map: Class name to index; the training folder's, for the evaluation folder.

    Raises:
        InputError: The folder is missing or empty, or holds no such split.
    """
    split = args.train_split if training else args.val_split
    if args.dataset == 'digits':
        from ..data import DigitsDataset
        return DigitsDataset(split, input_img_mode=image_mode(args))
    folder = '/' not in args.dataset
    shared = folder and holds_out(args)
    known = ('', 'digits', 'folder', *PREFIXES)
    if args.dataset.partition('/')[0] not in known:
        raise InputError(
            f'dataset={args.dataset!r} is not known.{nearest(args.dataset, known)} Leave it empty for a folder of'
            f" images, or use 'digits' or timm's {', '.join(f'{p}/NAME' for p in PREFIXES)}.")
    root = args.data_dir
    if folder:
        root = _find_split(root, args.train_split if shared else split, training, shared)
    try:
        dataset = ImageDataset(
            str(root), ReaderImageInTar(str(root), class_map or _class_map(args, root)),
            input_img_mode=image_mode(args),
        ) if folder and _tars(root) else create_dataset(
            '' if folder else args.dataset,
            root=str(root) if root else None,
            split=split,
            is_training=training,
            search_split=not folder,
            class_map=class_map or _class_map(args, root),
            download=args.dataset_download,
            batch_size=args.batch_size,
            seed=args.seed,
            input_img_mode=image_mode(args),
            input_key=args.input_key,
            target_key=args.target_key,
            num_samples=args.train_num_samples if training else args.val_num_samples,
            trust_remote_code=args.dataset_trust_remote_code,
        )
    except ImportError as error:
        raise InputError(
            f'dataset={args.dataset} needs {error.name!r}, which is not installed: pip can install it.') from error
    except (AssertionError, RuntimeError, OSError, EOFError, ValueError, tarfile.TarError, pickle.PickleError) as error:
        empty = 'Found 0 images' in str(error)
        folders = f"folders that the class map '{args.class_map}' names" if args.class_map else 'folders of classes'
        reason = f"The data folder '{root}' has no images in {folders}." if empty else str(error)
        raise InputError(reason if empty else f'The dataset cannot be opened: {reason}') from error
    if isinstance(dataset, ImageDataset) and folder:
        reader = _part_of(dataset.reader, args, training) if shared else dataset.reader
        dataset = CheckedImages(reader, training, strict, image_mode(args))
    return dataset


def _class_map(args: argparse.Namespace, root: Any) -> Any:
    return read_class_map(args.class_map, root) if args.class_map else ''


def _tars(root: Path) -> List[Path]:
    """The .tar files of a folder that holds nothing else to read: shards, or one a class."""
    folders = root.is_dir() and any(p.is_dir() for p in root.iterdir())
    return [] if folders else sorted(root.glob('*.tar'))


def holds_out(args: argparse.Namespace) -> bool:
    """Whether evaluation images are a share of the training images: where asked for, and no folder of them is there."""
    if not args.val_share or not args.data_dir or not Path(args.data_dir).is_dir() or not args.val_split:
        return False
    names = (args.val_split, *SYNONYMS.get(args.val_split, ()))
    return not any((Path(args.data_dir) / name).is_dir() for name in names)


def _part_of(reader: Any, args: argparse.Namespace, training: bool) -> Any:
    """A reader of the images of a folder that are for training, or of those held out: the same share of every class."""
    if not isinstance(reader, ReaderImageFolder):
        raise InputError(f'val_share={args.val_share} is of a folder of images, not of tar files: give them their own.')
    by_class: Dict[int, List[Any]] = {}
    for sample in reader.samples:
        by_class.setdefault(sample[1], []).append(sample)
    chosen: List[Any] = []
    for target, samples in sorted(by_class.items()):
        number = min(len(samples) - 1, max(1, round(args.val_share * len(samples))))
        held_out = set(random.Random(f'{args.seed} {target}').sample(range(len(samples)), number))
        chosen += [sample for i, sample in enumerate(samples) if (i in held_out) != training]
    if not chosen:
        raise InputError(
            f"val_share={args.val_share}: no class of '{reader.root}' has two images, so that none can be held out; add"
            f" images, or a folder '{args.val_split}'.")
    part = copy.copy(reader)
    part.samples = chosen
    return part


def image_mode(args: argparse.Namespace) -> str:
    """RGB for three channels, grey otherwise, unless `input_img_mode` says more."""
    channels = args.input_size[0] if args.input_size else args.in_chans or 3
    return args.input_img_mode or ('RGB' if channels == 3 else 'L')


def _find_split(data_dir: Optional[str], split: str, training: bool, whole: bool = False) -> Path:
    """The folder of a split, or its tar file; `whole`: class folders directly will do for training, too."""
    if not data_dir:
        raise InputError(
            f"No data: give --data-dir DIR, a folder with '{split}' in it, or dataset=digits for the embedded digits.")
    root = Path(data_dir)
    if not root.exists():
        raise InputError(f"The data folder '{root}' does not exist.")
    if root.is_file():
        if root.suffix != '.tar':
            raise InputError(f"The data '{root}' is a file: give a folder of class folders, or a .tar of them.")
        return root
    for name in (split, *SYNONYMS.get(split, ())):
        if (root / name).is_dir():
            return root / name
        if (root / f'{name}.tar').is_file():
            return root / f'{name}.tar'
    inside = sorted(p.name for p in root.iterdir() if p.is_dir())
    if (whole or not training) and inside and not {'train', 'training', 'test', 'val', 'validation'} & set(inside):
        return root  # class folders directly, as timm's validate.py takes them
    if not inside:
        raise InputError(f"The data folder '{root}' is empty: it needs '{split}' with a folder for each class.")
    option = 'train_split' if training else 'val_split'
    raise InputError(
        f"The data folder '{root}' has no folder '{split}', only: {', '.join(inside[:6])}"
        f"{', ...' if len(inside) > 6 else ''}; name it with {option}=NAME.")


def class_names(dataset: Dataset) -> Optional[Dict[str, int]]:
    """Class name to index, or None where the dataset does not tell."""
    reader = getattr(dataset, 'reader', dataset)
    mapping = getattr(reader, 'class_to_idx', None) or getattr(reader, 'class_name_to_idx', None)  # of tars
    if mapping is None and getattr(dataset, 'classes', None) is not None:
        mapping = {str(name): index for index, name in enumerate(dataset.classes)}
    return mapping or None


def class_list(names: Optional[Mapping[str, int]], num_classes: int) -> List[str]:
    """Name of every class by index; its number where there is none."""
    listed = [str(index) for index in range(num_classes)]
    for name, index in (names or {}).items():
        if index < num_classes:
            listed[index] = name
    return listed


def settle_num_classes(args: argparse.Namespace, train: Optional[Dataset], evaluation: Optional[Dataset]) -> None:
    """Fill `args.num_classes` from the data where the recipe leaves it open, and hold it against them otherwise.

    Raises:
        InputError: Data and recipe differ in the number of classes.
    """
    dataset = evaluation if train is None else train
    names = class_names(dataset)
    if names is None:
        return
    highest = max(names.values()) + 1
    if args.num_classes is None:
        args.num_classes = highest
    if highest > args.num_classes or (highest < args.num_classes and not args.class_map):
        raise InputError(
            f'The data have {counted(highest, "class")}, but num_classes={args.num_classes}: set num_classes={highest}'
            + (', or give class_map=FILE with the index of every class.' if highest < args.num_classes else '.'))


def open_datasets(args: argparse.Namespace, strict: bool = False) -> tuple:
    """(training, evaluation) datasets with one class index between them; evaluation is None where `val_split` is empty.

    Raises:
        InputError: See `open_dataset` and `settle_num_classes`; or evaluation has a class that training lacks.
    """
    train = open_dataset(args, True, strict)
    evaluation = open_dataset(args, False, strict) if args.val_split else None
    if isinstance(train, CheckedImages) and evaluation is not None and not args.class_map:
        names, own = class_names(train), class_names(evaluation)
        extra = sorted(set(own) - set(names))
        if extra:
            raise InputError(
                f"The evaluation folder '{evaluation.reader.root}' has classes that training lacks:"
                f" {', '.join(extra[:5])}.")
        if own != names:  # a class without evaluation images must not shift the index of those after it
            evaluation = open_dataset(args, False, strict, class_map=names)
    settle_num_classes(args, train, evaluation)
    return train, evaluation


def create_loaders(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        train: Optional[Dataset],
        evaluation: Optional[Dataset],
        device: torch.device,
) -> Loaders:
    """timm's loaders, transforms and mixup for both datasets (either may be None).

    Raises:
        InputError: Fewer training images than a batch, or options that exclude each other.
    """
    common = dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        img_dtype=getattr(torch, args.model_dtype or 'float32'),
        device=device,
        distributed=args.distributed,
        use_prefetcher=args.prefetcher,
        # New workers every epoch: their random states then follow from the epoch, not from the epochs before.
        persistent_workers=False,
    )
    train_loader, mixup = (None, None) if train is None else _train_loader(args, data_config, train, common)
    eval_loader = None
    if evaluation is not None:
        eval_loader = create_loader(
            evaluation,
            batch_size=args.validation_batch_size or args.batch_size,
            interpolation=data_config['interpolation'],
            crop_pct=data_config['crop_pct'],
            crop_mode=data_config['crop_mode'],
            **common,
        )
    return Loaders(train_loader, eval_loader, mixup)


def _train_loader(args: argparse.Namespace, data_config: Dict[str, Any], dataset: Dataset, common: Dict[str, Any]):
    per_batch = args.batch_size * args.world_size
    if hasattr(dataset, '__len__') and 0 < len(dataset) < per_batch:
        raise InputError(
            f'The training data have {counted(len(dataset), "image")}, fewer than one batch of {per_batch}: lower'
            ' batch_size.')
    if args.aug_repeats and not args.distributed:
        raise InputError(f'aug_repeats={args.aug_repeats:g} needs several processes (torchrun): set it to 0.')
    mixup, collate = _mixup(args), None
    if args.route_consistency:
        check_options(args)
        collate = collate_two_views
    if mixup is not None and args.prefetcher:
        if args.aug_splits:
            raise InputError('aug_splits with mixup or cutmix needs no_prefetcher=true.')
        mixup, collate = None, mixup
    if args.aug_splits:
        dataset = AugMixDataset(dataset, num_splits=args.aug_splits)
    plain = args.no_aug or not args.train_interpolation
    interpolation = data_config['interpolation'] if plain else args.train_interpolation
    loader = create_loader(
        dataset,
        batch_size=args.batch_size,
        is_training=True,
        no_aug=args.no_aug,
        re_prob=args.reprob,
        re_mode=args.remode,
        re_count=args.recount,
        re_split=args.resplit,
        train_crop_mode=args.train_crop_mode,
        scale=args.scale,
        ratio=args.ratio,
        hflip=args.hflip,
        vflip=args.vflip,
        color_jitter=args.color_jitter,
        color_jitter_prob=args.color_jitter_prob,
        grayscale_prob=args.grayscale_prob,
        gaussian_blur_prob=args.gaussian_blur_prob,
        auto_augment=args.aa,
        num_aug_repeats=args.aug_repeats,
        num_aug_splits=2 if args.route_consistency else args.aug_splits,  # transforms in three parts
        interpolation=interpolation,
        collate_fn=collate,
        worker_seeding=args.worker_seeding,
        **common,
    )
    if args.route_consistency:
        _, augment, finish = dataset.transform
        size = data_config['input_size'][-2:]
        dataset.transform = two_view_transform(args, size, interpolation, augment, finish)
    return loader, mixup


def _mixup(args: argparse.Namespace) -> Optional[Mixup]:
    """Mixup or CutMix; inside the collate function under the prefetcher."""
    if args.mixup <= 0 and args.cutmix <= 0 and args.cutmix_minmax is None:
        return None
    if args.batch_size % 2:
        raise InputError(f'batch_size={args.batch_size} with mixup or cutmix, which mix images in pairs: make it even.')
    kind = FastCollateMixup if args.prefetcher else Mixup
    return kind(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.num_classes,
    )
