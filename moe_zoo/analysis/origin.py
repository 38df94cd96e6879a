"""What produces a number: the commit of this package, and whether it was changed; versions of what it stands on."""
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Dict, Optional

import torch

from ..version import __version__

DIRTY = '-dirty'  # ends the name of a commit that was changed


def versions() -> Dict[str, Optional[str]]:
    """What produces a number: this package, its commit as `commit` tells it, torch and timm."""
    return {'moe_zoo': __version__, 'commit': commit(), 'torch': torch.__version__,
            'timm': importlib.metadata.version('timm')}


def commit() -> Optional[str]:
    """The commit of the checkout that runs, marked `DIRTY` where its package or recipes were changed since; None where
    the package was installed, be it into an environment inside somebody else's repository."""
    if _git('rev-parse', '--show-toplevel') != str(_root()):
        return None
    name = _git('rev-parse', 'HEAD')
    return name and name + DIRTY * uncommitted()


def short_commit(name: str) -> str:
    """Twelve digits of a commit, and the mark of one that was changed."""
    return name.removesuffix(DIRTY)[:12] + DIRTY * name.endswith(DIRTY)


def uncommitted() -> bool:
    """Whether the package or its recipes differ from the commit that is checked out."""
    return bool(_git('status', '--porcelain', '--', 'moe_zoo', 'configs'))


def _root() -> Path:
    return Path(__file__).resolve().parents[2]


def _git(*words: str) -> Optional[str]:
    try:
        found = subprocess.run(['git', '-C', str(_root()), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
