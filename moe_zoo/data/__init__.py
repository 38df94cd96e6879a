"""Data that needs no download (scikit-learn's handwritten digits, scenes and patch images made of them), and two views.
"""
from .coco_subset import write_subset
from .correspondence import Grid, match_items, match_patches
from .digits import DigitsDataset, load_digits_split
from .scenes import AREA_LIMITS, SIZES, size_class, write_scenes
from .synthetic_mnist import build_synthetic_mnist, load_digit_sources, shade_border, write_synthetic_mnist
from .two_views import (
    FINE_TUNING_AREAS,
    PRETRAINING_AREAS,
    TwoViews,
    TwoViewTransform,
    ViewTargets,
    check_areas,
    collate_two_views,
    pair_up,
    random_view,
    random_views,
)

__all__ = [
    'AREA_LIMITS',
    'DigitsDataset',
    'FINE_TUNING_AREAS',
    'Grid',
    'PRETRAINING_AREAS',
    'SIZES',
    'TwoViewTransform',
    'TwoViews',
    'ViewTargets',
    'build_synthetic_mnist',
    'check_areas',
    'collate_two_views',
    'load_digit_sources',
    'load_digits_split',
    'match_items',
    'match_patches',
    'pair_up',
    'random_view',
    'random_views',
    'shade_border',
    'size_class',
    'write_scenes',
    'write_subset',
    'write_synthetic_mnist',
]
