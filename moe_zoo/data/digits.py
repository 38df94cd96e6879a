"""The 1,797 real handwritten digits that ship inside scikit-learn, with one fixed split.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
"""
from typing import Callable, Optional, Tuple

import numpy as np
from torch.utils.data import Dataset

from moe_zoo.errors import InputError

TEST_SHARE = 0.2  # 355 of 1,797 images: the floor of a fifth of every class


def load_digits_split(seed: int = 0) -> Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The digits in two disjoint parts, every class in the same proportion.

    Args:
        seed: Of the shuffle that decides which images are held out, and of their order.

    Returns:
        x_train: (1442, 8, 8) uint8, ink 255 on 0 (scikit-learn's 0..16 stretched).
        y_train: (1442,) int64, 0..9.
        x_test: (355, 8, 8) uint8.
        y_test: (355,) int64.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            'The handwritten digits come with scikit-learn, which is not installed: pip install scikit-learn.'
        ) from None
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    targets = digits.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(targets))
    test = np.zeros(len(targets), dtype=bool)
    for digit in range(10):
        of_class = order[targets[order] == digit]
        test[of_class[:int(TEST_SHARE * len(of_class))]] = True
    train_order, test_order = order[~test[order]], order[test[order]]
    return images[train_order], targets[train_order], images[test_order], targets[test_order]


class DigitsDataset(Dataset):
    """One part of the digits as (PIL image, target) pairs, for timm's loader and transforms.

    Args:
        split: 'train' (1442 images) or 'test' (355; 'val' and 'validation' mean the same).
        seed: Of the split, see `load_digits_split`.
        transform: Applied to the 8 x 8 image; timm's `create_loader` sets it.
        target_transform: Applied to the target.
        input_img_mode: PIL's mode of the images.
    """
    classes = tuple(str(digit) for digit in range(10))

    def __init__(
            self,
            split: str = 'train',
            seed: int = 0,
            transform: Optional[Callable] = None,
            target_transform: Optional[Callable] = None,
            input_img_mode: str = 'RGB',
    ):
        x_train, y_train, x_test, y_test = load_digits_split(seed)
        if split == 'train':
            self.images, self.targets = x_train, y_train
        elif split in ('test', 'val', 'validation'):
            self.images, self.targets = x_test, y_test
        else:
            raise InputError(f"split must be 'train' or 'test' for the digits, not {split!r}.")
        self.transform = transform
        self.target_transform = target_transform
        self.input_img_mode = input_img_mode

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int):
        from PIL import Image
        image = Image.fromarray(self.images[index]).convert(self.input_img_mode)
        target = int(self.targets[index])
        if self.transform is not None:
            image = self.transform(image)
        if self.target_transform is not None:
            target = self.target_transform(target)
        return image, target
