#!/usr/bin/env python
"""What the experts of a classifier do: the same as `moe-zoo analyze-experts`."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from moe_zoo.cli import main  # noqa: E402 - the checkout first

if __name__ == '__main__':
    main(['analyze-experts', *sys.argv[1:]])
