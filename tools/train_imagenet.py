#!/usr/bin/env python
"""Train a classification model from a recipe: the same as `moe-zoo train-imagenet`."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_zoo.cli import main  # noqa: E402 - the checkout first

if __name__ == '__main__':
    main(['train-imagenet', *sys.argv[1:]])
