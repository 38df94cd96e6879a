"""Two views of an image that remember where they come from, for routes that shall not depend on the view.

Source: Kada, Yoshihashi, Kawakami, Ikehata, Sato (PRC), IEEE OJSP 6 (2025), doi 10.1109/OJSP.2025.3536853, and its
code.

A map is a 3 x 3 matrix that takes points of the original image to points of a view. A point is the column (y, x, 1) in
pixels, 0 at the upper left corner of the image: pixel i reaches from i to i + 1, and its centre is i + 1/2.

Letters: B images, C channels, H x W pixels of a view.
"""
import copy
import math
import random
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from PIL import Image
from timm.data import auto_augment as timm_ops
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.layers import to_2tuple
from torch.nn import functional as F
from torch.utils.data import default_collate
from torchvision import transforms
from torchvision.transforms import functional as vision

from ..errors import InputError

Range = Tuple[float, float]

# Shares of the image that the crops of the two views cover.
FINE_TUNING_AREAS: Tuple[Range, Range] = ((0.05, 0.7), (0.6, 1.0))
PRETRAINING_AREAS: Tuple[Range, Range] = ((0.05, 1.0), (0.05, 1.0))
RATIO: Range = (3 / 4, 4 / 3)  # of width and height of a crop


class TwoViews(NamedTuple):
    """Two views of one image, or, with a leading B in every shape, of a batch: what `default_collate` makes of them.

    Attributes:
        views: Two (C, H, W) tensors.
        maps: (2, 3, 3) float32, points of the image to points of each view.
        areas: (2,) float32, share of the image that the crop of each view covers.
    """
    views: Sequence[torch.Tensor]
    maps: torch.Tensor
    areas: torch.Tensor


class ViewTargets(NamedTuple):
    """Targets of a batch of 2B views, view 1 of all images and then view 2, with the geometry that tells patches apart.

    Attributes:
        targets: (2B,) classes, or (2B, classes) soft targets.
        maps: (B, 2, 3, 3), see `TwoViews`.
        areas: (B, 2).
    """
    targets: torch.Tensor
    maps: torch.Tensor
    areas: torch.Tensor

    def to(self, *args, **kwargs) -> 'ViewTargets':
        """Move all of it, as a tensor is moved; so that loaders and loops need not know of it."""
        return ViewTargets(*(field.to(*args, **kwargs) for field in self))


class TwoViewTransform:
    """A PIL image to `TwoViews`: random resized crop, flips, then operations that may shear, shift and rotate.

    Draws from Python's `random` and from NumPy's, as timm's transforms do.

    Args:
        size: Height and width of both views.
        areas: Range of the share of the image that each crop covers: `FINE_TUNING_AREAS` (the original's default) or
            `PRETRAINING_AREAS`.
        ratio: Range of width over height of a crop.
        hflip, vflip: Probabilities of a horizontal and a vertical flip, for each view by itself.
        interpolation: 'bilinear', 'bicubic', or 'random' for either.
        augment: Further operations on the cropped image. The affine ones of timm's RandAugment and AutoAugment, inside
            of others too, are followed (`timm.data.rand_augment_transform('rand-m10-n2', {})`); all others must leave
            the geometry alone, as changes of colour do. The fill that an operation brings in counts as image.
        finish: Image to tensor; `torchvision.transforms.ToTensor()` if None.

    Raises:
        InputError: Areas that are no shares, or an `augment` whose geometry cannot be followed.
    """

    def __init__(
            self,
            size: Union[int, Tuple[int, int]],
            areas: Tuple[Range, Range] = FINE_TUNING_AREAS,
            ratio: Range = RATIO,
            hflip: float = 0.5,
            vflip: float = 0.0,
            interpolation: str = 'random',
            augment: Optional[Callable[[Image.Image], Image.Image]] = None,
            finish: Optional[Callable[[Image.Image], torch.Tensor]] = None,
    ):
        check_areas(areas)
        self.size = to_2tuple(size)
        self.crops = [
            RandomResizedCropAndInterpolation(self.size, tuple(area), tuple(ratio), interpolation) for area in areas]
        self.hflip = hflip
        self.vflip = vflip
        self.finish = finish or transforms.ToTensor()
        self._followed: List[np.ndarray] = []  # maps of what `augment` did to the view at hand
        self.augment = _follow(copy.deepcopy(augment), self._followed)

    def __call__(self, image: Image.Image) -> TwoViews:
        views, maps, areas = zip(*(self._draw(image, crop) for crop in self.crops))
        return TwoViews(views, torch.from_numpy(np.stack(maps)).float(), torch.tensor(areas))

    def _draw(self, image: Image.Image, crop: RandomResizedCropAndInterpolation):
        """One view, its map and the share of the image that its crop covers."""
        top, left, height, width = crop.get_params(image, crop.scale, crop.ratio)
        choices = crop.interpolation
        interpolation = random.choice(choices) if isinstance(choices, (tuple, list)) else choices
        view = vision.resized_crop(image, top, left, height, width, list(self.size), interpolation)
        (rows, columns), share = self.size, height * width / (image.width * image.height)
        y, x = rows / height, columns / width
        to_view = np.array([[y, 0, -top * y], [0, x, -left * x], [0, 0, 1]], dtype=np.float64)
        if random.random() < self.hflip:
            view = vision.hflip(view)
            to_view = np.array([[1, 0, 0], [0, -1, columns], [0, 0, 1]]) @ to_view
        if random.random() < self.vflip:
            view = vision.vflip(view)
            to_view = np.array([[-1, 0, rows], [0, 1, 0], [0, 0, 1]]) @ to_view
        if self.augment is not None:
            self._followed.clear()
            view = self.augment(view)
            for step in self._followed:
                to_view = step @ to_view
        return self.finish(view), to_view, share


def check_areas(areas: Sequence[Sequence[float]], name: str = 'areas') -> None:
    """Raises: InputError: Not two ranges of shares of an image."""
    pairs = [tuple(area) for area in areas]
    if len(pairs) != 2 or any(len(p) != 2 or not 0 < p[0] <= p[1] <= 1 for p in pairs):
        raise InputError(
            f'{name}={pairs}: give two ranges of shares above 0 and up to 1, for example {FINE_TUNING_AREAS}.')


def pair_up(views: TwoViews, targets: torch.Tensor) -> Tuple[torch.Tensor, ViewTargets]:
    """A batch of `TwoViews` and its (B,) or (B, classes) targets to one batch of 2B images, and what belongs to it."""
    return torch.cat(list(views.views)), ViewTargets(torch.cat([targets, targets]), views.maps, views.areas)


def collate_two_views(samples: List[Tuple[TwoViews, Any]]) -> Tuple[torch.Tensor, ViewTargets]:
    """Collate (`TwoViews`, target) samples for `pair_up`; class indices become int64, whatever their type."""
    views, targets = default_collate(samples)
    return pair_up(views, targets.long() if targets.ndim == 1 else targets)


def random_view(
        images: torch.Tensor,
        area: Range = (0.25, 1.0),
        ratio: Range = RATIO,
        hflip: float = 0.5,
        generator: Optional[torch.Generator] = None,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A crop of every image of a batch, enlarged to the image's own size (bilinear), perhaps flipped.

    Args:
        images: (B, C, H, W), standardised or not.
        area: Range of the share of the image that a crop covers. A crop that its ratio makes longer than the image is
            cut off.
        ratio: Range of width over height of a crop, in relation to that of the image.
        hflip: Probability of a horizontal flip.
        generator: Of the random numbers, on the CPU.

    Returns:
        views: (B, C, H, W).
        maps: (B, 3, 3) float32, points of the images to points of the views.
        areas: (B,) float32.
    """
    B, _, H, W = images.shape
    share, shape, down, right, flip = torch.rand(5, B, generator=generator)
    share = area[0] + (area[1] - area[0]) * share
    shape = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * shape)
    height, width = (share / shape).sqrt().clamp(max=1), (share * shape).sqrt().clamp(max=1)  # shares of H and W
    top, left = down * (1 - height), right * (1 - width)
    side = torch.where(flip < hflip, -1.0, 1.0)
    zero, one = torch.zeros(B), torch.ones(B)
    # grid_sample counts from -1 to 1 across the image, x first, and asks where a point of the view comes from.
    theta = torch.stack([
        torch.stack([side * width, zero, 2 * left + width - 1], dim=1),
        torch.stack([zero, height, 2 * top + height - 1], dim=1),
    ], dim=1)
    grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid, mode='bilinear', padding_mode='border', align_corners=False)
    x, offset = side / width, torch.where(side > 0, -left / width, 1 + left / width) * W
    maps = torch.stack([
        torch.stack([1 / height, zero, -top / height * H], dim=1),
        torch.stack([zero, x, offset], dim=1),
        torch.stack([zero, zero, one], dim=1),
    ], dim=1)
    return views, maps.to(images.device), (height * width).to(images.device)


def random_views(
        images: torch.Tensor,
        areas: Tuple[Range, Range] = FINE_TUNING_AREAS,
        ratio: Range = RATIO,
        hflip: float = 0.5,
        generator: Optional[torch.Generator] = None,
) -> TwoViews:
    """Two views of every image of a batch in memory, see `random_view`; `pair_up` makes them a batch to train on."""
    check_areas(areas)
    drawn = [random_view(images, area, ratio, hflip, generator) for area in areas]
    views, maps, shares = zip(*drawn)
    return TwoViews(views, torch.stack(maps, dim=1), torch.stack(shares, dim=1))


def _rotation(degrees: float, width: int, height: int) -> Tuple[float, ...]:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2  # stays where it is
    return (cosine, -sine, x - cosine * x + sine * y, sine, cosine, y - sine * x - cosine * y)


# timm's affine operations: (level, width, height) to (a, b, c, d, e, f); the point (x, y) of the result shows the point
# (a x + b y + c, d x + e y + f) of the source, as in PIL's Image.transform.
_AFFINE: Dict[Callable, Callable[[float, int, int], Tuple[float, ...]]] = {
    timm_ops.shear_x: lambda level, width, height: (1, level, 0, 0, 1, 0),
    timm_ops.shear_y: lambda level, width, height: (1, 0, 0, level, 1, 0),
    timm_ops.translate_x_abs: lambda level, width, height: (1, 0, level, 0, 1, 0),
    timm_ops.translate_y_abs: lambda level, width, height: (1, 0, 0, 0, 1, level),
    timm_ops.translate_x_rel: lambda level, width, height: (1, 0, level * width, 0, 1, 0),
    timm_ops.translate_y_rel: lambda level, width, height: (1, 0, 0, 0, 1, level * height),
    timm_ops.rotate: _rotation,
}

# Geometric operations that nobody follows.
_LOST = (
    timm_ops.AugMixAugment, transforms.RandomAffine, transforms.RandomRotation, transforms.RandomPerspective,
    transforms.ElasticTransform, transforms.RandomResizedCrop, transforms.RandomCrop, transforms.RandomHorizontalFlip,
    transforms.RandomVerticalFlip, transforms.RandAugment, transforms.AutoAugment, transforms.TrivialAugmentWide,
    transforms.AugMix,
)


class _Followed:
    """One of timm's affine operations that also files what it did to the geometry."""

    def __init__(self, operation: Callable, maps: List[np.ndarray]):
        self.operation = operation
        self.maps = maps

    def __call__(self, image: Image.Image, level: float, **kwargs) -> Image.Image:
        a, b, c, d, e, f = _AFFINE[self.operation](level, *image.size)
        self.maps.append(np.linalg.inv(np.array([[e, d, f], [b, a, c], [0, 0, 1]], dtype=np.float64)))
        return self.operation(image, level, **kwargs)


def _follow(augment: Any, maps: List[np.ndarray]) -> Any:
    """`augment`, whose affine operations from now on append their maps to `maps`.

    Raises:
        InputError: It holds an operation that moves pixels and cannot be followed.
    """
    if isinstance(augment, _LOST):
        raise InputError(
            f"augment: where pixels go in {type(augment).__name__} cannot be followed; use timm's RandAugment"
            ' (rand-...) or AutoAugment, or operations that change colours only.')
    if isinstance(augment, timm_ops.AugmentOp):
        if augment.aug_fn in _AFFINE:
            augment.aug_fn = _Followed(augment.aug_fn, maps)
    elif isinstance(augment, (list, tuple, torch.nn.ModuleList)):
        for part in augment:
            _follow(part, maps)
    else:  # transforms.Compose and its like, RandAugment, AutoAugment
        for name in ('transforms', 'ops', 'policy'):
            _follow(getattr(augment, name, []), maps)
    return augment
