"""Weights from elsewhere: state dictionaries in, state dictionaries out. Knows layers, never a model family."""
from .vmoe import import_vmoe

__all__ = ['import_vmoe']
