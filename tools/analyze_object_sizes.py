#!/usr/bin/env python
"""Which expert serves small, medium and large objects. `tools/analyze_object_sizes.py --help` has the options."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a checkout that is not installed

from moe_zoo.detection.object_sizes import main  # noqa: E402

if __name__ == '__main__':
    main()
