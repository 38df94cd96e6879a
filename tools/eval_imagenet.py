#!/usr/bin/env python
"""Accuracy, cost and expert use of a trained classification model: the same as `moe-zoo eval-imagenet`."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_zoo.cli import main  # noqa: E402 - the checkout first

if __name__ == '__main__':
    main(['eval-imagenet', *sys.argv[1:]])
