"""The models, one file a family. Importing this package registers every one of them with timm.

What timm.create_model makes knows its arguments, also when it has been pruned, merged or changed by `moefy`: timm's own
functions save it and load it again, without a network and without the dense weights that it began with.

>>> timm.models.push_to_hf_hub(model, 'someone/model')              # or save_for_hf(model, 'folder')
>>> timm.create_model('hf-hub:someone/model', pretrained=True)      # or 'local-dir:folder'
"""
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
