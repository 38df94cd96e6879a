"""Folders of small images that a network can tell apart, for tests of training and evaluation."""
import numpy as np
from PIL import Image


def write_images(root, splits):
    """Two classes, dark and bright noise of 20 x 20: `splits[split]` images of each. Returns `root`."""
    noise = np.random.default_rng(0)
    for split, count in splits.items():
        for level, name in ((60, 'dark'), (190, 'bright')):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(level - 50, level + 50, (20, 20, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f'{i:02d}.png')
    return root
