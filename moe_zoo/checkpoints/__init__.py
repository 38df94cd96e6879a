"""Weights from elsewhere: state dictionaries in, state dictionaries out. Knows layers, never a model family."""
from .lazy import LazyTensor, write_safetensors
from .vmoe import import_vmoe, plan_vmoe
from .vmoe_shards import read_vmoe

__all__ = ['LazyTensor', 'import_vmoe', 'plan_vmoe', 'read_vmoe', 'write_safetensors']
