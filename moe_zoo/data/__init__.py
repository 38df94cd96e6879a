"""Data that needs no download: scikit-learn's real handwritten digits, and detection scenes made of them."""
from .digits import DigitsDataset, load_digits_split
from .scenes import AREA_LIMITS, SIZES, size_class, write_scenes

__all__ = ['AREA_LIMITS', 'DigitsDataset', 'SIZES', 'load_digits_split', 'size_class', 'write_scenes']
