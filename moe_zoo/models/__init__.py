"""The models, one file a family. Importing this package registers every one of them with timm."""
from . import condconv_efficientnet, condconv_resnet, dyconv, vmoe  # noqa: F401 - importing registers
