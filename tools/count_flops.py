#!/usr/bin/env python
"""What models cost: parameters, MACs at most and as executed. `tools/count_flops.py --help` has examples."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from moe_zoo.analysis.count_cli import main  # noqa: E402

if __name__ == '__main__':
    sys.exit(main())
