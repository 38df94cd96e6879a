"""`python -m moe_zoo` is `moe-zoo`."""
import sys

from moe_zoo.cli import main

sys.exit(main())
