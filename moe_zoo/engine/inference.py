"""A trained classifier as it was trained (model, transform, class names), and images for it, held as pixels.

What `moe_zoo.engine.predict` and `moe_zoo.engine.analyze_experts` share.

Letters: N images, C channels, H x W pixels.
"""
import argparse
import functools
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple, Union

import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from timm.data.loader import adapt_to_chs
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from ..errors import InputError
from .build import build_model, create_on_meta, mixed_precision, open_device, prepare_model
from .checkpoint import check_fits, find_weights, read_checkpoint
from .config import OPTIONS, load_config
from .data import LEFT_OUT, class_list, class_names, image_mode, open_dataset, settle_num_classes
from .labels import imagenet_classes, synsets

# What of a recipe describes the process that trained, and does not carry over to this machine.
# Nor does leave to run code of a data set's author: whoever evaluates gives it anew.
ELSEWHERE = ('device', 'resume', 'initial_checkpoint', 'pretrained', 'pretrained_path', 'device_modules',
             'dataset_trust_remote_code')


def recipe_of(config: Any, content: Mapping[str, Any], overrides: Mapping[str, Any], checkpoint: Any) -> Any:
    """The recipe that was given, or the options that the checkpoint was trained with, which it then must tell.

    Images of another folder than that of training are for evaluation all of them, whatever share was held out there.

    Raises:
        InputError: Neither is there.
    """
    if config is not None:
        return config
    saved = content.get('args')
    saved = vars(saved) if isinstance(saved, argparse.Namespace) else saved if isinstance(saved, dict) else None
    if not saved and checkpoint and 'model' not in overrides:
        raise InputError(
            f"The checkpoint '{checkpoint}' does not say what it was trained with: give --config FILE or"
            ' model=NAME.')
    recipe = {name: value for name, value in (saved or {}).items() if name in OPTIONS and name not in ELSEWHERE}
    given, trained = overrides.get('data_dir'), recipe.get('data_dir')
    if given and (not trained or Path(given).resolve() != Path(trained).resolve()):
        recipe.pop('val_share', None)
    return recipe


def load_model(
        args: argparse.Namespace,
        content: Mapping[str, Any],
        checkpoint: Any,
        use_ema: bool,
        device: torch.device,
) -> nn.Module:
    """The model of a recipe with the weights of a checkpoint (None: its own), in evaluation mode."""
    if not checkpoint:
        return prepare_model(args, build_model(args), device).eval()
    weights = find_weights(content, checkpoint, use_ema)
    try:
        blank = create_on_meta(args)
    except Exception:  # building it in earnest tells what is wrong in a sentence
        blank = None
    if blank is not None:  # a checkpoint cannot ask for a model of more memory than its own weights have
        check_fits(blank, weights, checkpoint, args.model)
    model = build_model(args)
    check_fits(model, weights, checkpoint, args.model)
    model.load_state_dict(weights)
    return prepare_model(args, model, device).eval()


@dataclass
class Classifier:
    """A classifier that is ready to look at images.

    Attributes:
        model: In evaluation mode.
        args: The options it was built from.
        data_config: Input size, mean, deviation and crop.
        device: Where it is.
        classes: Name of every class.
        trained: Whether the weights were learned; False: they are random.
    """
    model: nn.Module
    args: argparse.Namespace
    data_config: Dict[str, Any]
    device: torch.device
    classes: List[str]
    trained: bool

    @functools.cached_property
    def transform(self):
        """PIL image to uint8 pixels, as the loader of evaluation cuts them."""
        keys = ('input_size', 'interpolation', 'mean', 'std', 'crop_pct', 'crop_mode')
        return create_transform(**{key: self.data_config[key] for key in keys}, use_prefetcher=True)

    @property
    def mode(self) -> str:
        """Mode of Pillow's that images are converted to."""
        grey = self.data_config['input_size'][0] == 1 and not self.args.input_img_mode
        return 'L' if grey else image_mode(self.args)

    def pixels(self, image: Image.Image) -> torch.Tensor:
        """(C, H, W) uint8: what the model will see of an image."""
        return torch.as_tensor(self.transform(image.convert(self.mode)))

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W) uint8 to the model's input, on its device."""
        dtype = getattr(torch, self.args.model_dtype or 'float32')
        mean, std = (
            torch.tensor([255 * v for v in adapt_to_chs(self.data_config[key], pixels.shape[1])], dtype=dtype)
            .view(1, -1, 1, 1).to(self.device) for key in ('mean', 'std'))
        images = pixels.to(self.device, dtype).sub_(mean).div_(std)
        return images.contiguous(memory_format=torch.channels_last) if self.args.channels_last else images

    def autocast(self):
        """The precision that the recipe names, as a context."""
        return mixed_precision(self.args, self.device)[0]()


def open_classifier(
        checkpoint: Optional[Union[str, Path]] = None,
        config: Any = None,
        overrides: Mapping[str, Any] = {},  # noqa: B006 - read only
        use_ema: bool = False,
        with_data: bool = True,
        strict_data: bool = False,
) -> Tuple[Classifier, Optional[Dataset]]:
    """A classifier and the evaluation split that its recipe names.

    Args:
        checkpoint: Weights; without them those that the recipe names, or random ones.
        config: A recipe; without one, what the checkpoint says of its own.
        overrides: Options that win over it.
        use_ema: Take the averaged weights of the checkpoint.
        with_data: Whether to open the data set; otherwise it is None.
        strict_data: Refuse unreadable images.

    Raises:
        InputError: Something that was given cannot be used.
    """
    content = read_checkpoint(checkpoint) if checkpoint else {}
    overrides = dict(overrides)
    recipe = recipe_of(config, content, overrides, checkpoint)
    if overrides.get('data_dir'):
        overrides.setdefault('dataset', '')  # a folder that is given wins over the digits of a recipe
    args = load_config(recipe, overrides)
    device, known = open_device(args), known_classes(content)
    torch.manual_seed(args.seed)  # of what is drawn where there are no weights
    dataset = open_evaluation(args, known, strict_data) if with_data else None
    if dataset is not None:
        settle_num_classes(args, None, dataset)
    model = load_model(args, content, checkpoint, use_ema, device)
    data_config = resolve_data_config(vars(args), model=model, use_test_size=not (args.img_size or args.input_size))
    names = known or (class_names(dataset) if dataset is not None else None) or {}
    classes = [readable(name) for name in class_list(names, model.num_classes)]
    trained = bool(checkpoint or args.initial_checkpoint or args.pretrained or args.pretrained_path)
    return Classifier(model, args, data_config, device, classes, trained), dataset


def known_classes(content: Mapping[str, Any]) -> Dict[str, int]:
    """Class name to index as the checkpoint tells it, or nothing."""
    run = content.get('moe_zoo')
    names = run.get('classes') if isinstance(run, dict) else None
    return {str(name): index for index, name in enumerate(names if isinstance(names, (list, tuple)) else ())}


def open_evaluation(args: argparse.Namespace, known: Mapping[str, int], strict_data: bool) -> Dataset:
    """The evaluation split, its folders numbered as the model numbers its classes.

    Folders of ImageNet's classes, some or all, get their places among the thousand of a model that has as many.

    Raises:
        InputError: It has a class that the model was not trained on, or what `open_dataset` raises.
    """
    dataset = open_dataset(args, False, strict_data)
    own = class_names(dataset)
    if args.class_map or own is None or args.dataset == 'digits':
        return dataset
    thousand = args.num_classes == 1000 or (args.pretrained and args.num_classes is None)
    if thousand and (not known or dict(known) == synsets()):
        known = imagenet_classes(own) or known
    if len(known) != (args.num_classes or len(known)) or own == dict(known) or not known:
        return dataset
    extra = sorted(set(own) - set(known))
    if extra:
        raise InputError(
            f"The data folder '{dataset.reader.root}' has classes that the model was not trained on:"
            f" {', '.join(extra[:5])}{', ...' if len(extra) > 5 else ''}.")
    return open_dataset(args, False, strict_data, class_map=dict(known))


def readable(name: str) -> str:
    """`tench` of `n01440764`; every other name as it is."""
    return ImageNetInfo().label_name_to_description(name).partition(',')[0] if name in synsets() else name


# ---- images

@dataclass
class Images:
    """Images as the model sees them.

    Attributes:
        pixels: (N, C, H, W) uint8.
        targets: (N,) classes.
        files: Their names.
        corrupt: Paths of images that could not be read and are not among them.
        total: Images in the data set, as far as it tells.
    """
    pixels: torch.Tensor
    targets: torch.Tensor
    files: List[str]
    corrupt: List[str] = field(default_factory=list)
    total: Optional[int] = None

    def batches(self, classifier: Classifier, size: int) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        """(images, targets) on the device of the model."""
        for pixels, targets in zip(self.pixels.split(size), self.targets.split(size)):
            yield classifier.normalise(pixels), targets.to(classifier.device)


def load_images(classifier: Classifier, dataset: Dataset, most: int) -> Images:
    """At most so many images of a data set, evenly over its order, so that every class has its share.

    Raises:
        InputError: None can be read.
    """
    total = None if isinstance(dataset, IterableDataset) else len(dataset)
    if total is None:
        items = ((number, *item) for number, item in enumerate(itertools.islice(dataset, most)))
    else:
        count = min(most, total)
        items = ((i, *dataset[i]) for i in (number * total // count for number in range(count)))
    found = [(classifier.pixels(image), int(target), i) for i, image, target in items if target != LEFT_OUT]
    if not found:
        raise InputError('The data have no image that can be read.')
    pixels, targets, numbers = zip(*found)
    corrupt = dataset.corrupt_files() if hasattr(dataset, 'corrupt_files') else []
    files = [name_of_image(dataset, number) for number in numbers]
    return Images(torch.stack(pixels), torch.tensor(targets), files, corrupt, total)


def name_of_image(dataset: Dataset, number: int) -> str:
    """Its file, relative to the folder of the data; a number where images are not files."""
    if hasattr(dataset, 'filename') and not isinstance(dataset, IterableDataset):
        return str(dataset.filename(number))
    return f'image {number}'
