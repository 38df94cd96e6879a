"""Weights from elsewhere: state dictionaries in, state dictionaries out. Knows layers, never a model family."""
from .lazy import LazyTensor, write_safetensors
from .shrink import merge, prune, to_dense
from .upcycle import is_routed, token_features, upcycle
from .vmoe import import_vmoe, plan_vmoe
from .vmoe_shards import read_vmoe

__all__ = [
    'LazyTensor',
    'import_vmoe',
    'is_routed',
    'merge',
    'plan_vmoe',
    'prune',
    'read_vmoe',
    'to_dense',
    'token_features',
    'upcycle',
    'write_safetensors',
]
