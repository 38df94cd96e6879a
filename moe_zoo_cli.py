"""The installed command `moe-zoo`.

`import moe_zoo` registers the models, which takes torch, timm and seconds; `moe-zoo list` reads text files. So this
module reads cards.py, cli.py and the few files that these need by their path: it is a package that has the files of
moe_zoo/ and, in place of its __init__, nothing. `moe_zoo.cli` imports what a tool needs by its real name.
"""
import importlib
import os
import sys
from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent / 'moe_zoo')]


def main() -> int:
    """Run `moe-zoo COMMAND ...`; returns the exit code."""
    try:
        code = importlib.import_module(f'{__name__}.cli').main()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `moe-zoo list | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13  # as a program that the signal ended
