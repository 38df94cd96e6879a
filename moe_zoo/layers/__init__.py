"""Routed layers, drop-in for a convolution, an MLP or a residual stage."""
from .routed import RoutedLayer, RoutedModel, masked_mean

__all__ = ['RoutedLayer', 'RoutedModel', 'masked_mean']
