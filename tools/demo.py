#!/usr/bin/env python
"""Trains, counts and explains small models, and writes runs/demo/index.html. tools/demo.sh sets up and runs this."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from moe_zoo.demo import main  # noqa: E402

if __name__ == '__main__':
    sys.exit(main())
