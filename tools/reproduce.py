#!/usr/bin/env python
"""Runs a paper's experiment at desk scale and writes its verdict; `--list` names the experiments."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from moe_zoo.reproduce.cli import main  # noqa: E402

if __name__ == '__main__':
    sys.exit(main())
