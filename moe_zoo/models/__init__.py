"""The models, one file a family. Importing this package registers every one of them with timm."""
from . import (  # noqa: F401 - importing registers
    condconv_efficientnet,
    condconv_resnet,
    deepmoe,
    deepmoe_cifar,
    dyconv,
    fusion,
    moe_resnet,
    moefied,
    pmoe,
    vmoe,
)
