#!/usr/bin/env python
"""Train or evaluate a detector from a detectron2 config: the same as `moe-zoo train-coco`."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_zoo.cli import main  # noqa: E402 - the checkout first

if __name__ == '__main__':
    main(['train-coco', *sys.argv[1:]])
