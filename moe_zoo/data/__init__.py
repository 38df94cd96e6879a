"""Data that needs no download: scikit-learn's handwritten digits, and scenes and patch images made of digits."""
from .digits import DigitsDataset, load_digits_split
from .scenes import AREA_LIMITS, SIZES, size_class, write_scenes
from .synthetic_mnist import build_synthetic_mnist, load_digit_sources, shade_border, write_synthetic_mnist

__all__ = [
    'AREA_LIMITS',
    'DigitsDataset',
    'SIZES',
    'build_synthetic_mnist',
    'load_digit_sources',
    'load_digits_split',
    'shade_border',
    'size_class',
    'write_scenes',
    'write_synthetic_mnist',
]
