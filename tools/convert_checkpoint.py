#!/usr/bin/env python
"""Turn a released or dense checkpoint into a safetensors file: the same as `moe-zoo convert-checkpoint`."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_zoo.cli import main  # noqa: E402 - the checkout first

if __name__ == '__main__':
    main(['convert-checkpoint', *sys.argv[1:]])
