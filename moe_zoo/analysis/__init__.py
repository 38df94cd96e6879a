"""What a model costs and what its experts do. Handed any `nn.Module`; knows routed layers and routing records only."""
from .cost import Cost, CountError, ImageCosts, Spread, count, count_images
from .cost_check import Comparison, check_with_fvcore

__all__ = [
    'Comparison', 'Cost', 'CountError', 'ImageCosts', 'Spread', 'check_with_fvcore', 'count', 'count_images']
