#!/usr/bin/env python
"""Detect objects in images and draw them: the same as `moe-zoo predict-coco`."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_zoo.cli import main  # noqa: E402 - the checkout first

if __name__ == '__main__':
    sys.exit(main(['predict-coco', *sys.argv[1:]]))
