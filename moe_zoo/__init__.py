"""Mixture-of-experts vision models for timm and detectron2.

`import moe_zoo` registers every model with timm: `timm.create_model('condconv_resnet50')` works from then on.
"""
from moe_zoo import models  # noqa: F401 - imported for its effect
from moe_zoo.models.moefied import moefy  # noqa: F401
from moe_zoo.version import __version__  # noqa: F401
