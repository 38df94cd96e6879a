#!/usr/bin/env python
"""Time of routed models and layers as a ratio to others; see `tools/benchmark.py --help`."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from moe_zoo.analysis.benchmark_cli import main  # noqa: E402

if __name__ == '__main__':
    sys.exit(main())
