"""Mixture-of-experts vision models for timm and detectron2.

`import moe_zoo` registers every model with timm: `timm.create_model('condconv_resnet50')` works from then on.
"""
import sys
from pathlib import Path

__version__ = '0.1.0'


def _answers_from_cards() -> bool:
    """True for `moe-zoo list` and its like: they read text files and should not wait seconds for torch."""
    program, command = (*sys.argv, '', '')[:2]
    return Path(program).name == 'moe-zoo' and command in ('', 'list', 'show', '-h', '--help', '--version')


if not _answers_from_cards():
    from moe_zoo import models  # noqa: F401 - imported for its effect
    from moe_zoo.models.moefied import moefy  # noqa: F401
