"""What produces a number: the commit of this package, and whether it was changed; versions of what it stands on."""
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Dict, Optional

import torch

from ..version import __version__

DIRTY = '-dirty'  # ends the name of a commit that was changed


def versions() -> Dict[str, Optional[str]]:
    """What produces a number: this package and its commit where it is a checkout (marked `DIRTY`), torch and timm."""
    commit = _git('rev-parse', 'HEAD')
    commit = commit and commit + DIRTY * uncommitted()
    return {'moe_zoo': __version__, 'commit': commit, 'torch': torch.__version__,
            'timm': importlib.metadata.version('timm')}


def uncommitted() -> bool:
    """Whether the package or its recipes differ from the commit that is checked out."""
    return bool(_git('status', '--porcelain', '--', 'moe_zoo', 'configs'))


def _git(*words: str) -> Optional[str]:
    source = Path(__file__).resolve().parents[2]
    try:
        found = subprocess.run(['git', '-C', str(source), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
