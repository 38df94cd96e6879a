"""What a model costs and what its experts do. Handed any `nn.Module`; knows routed layers and routing records only."""
from .cost import Cost, ImageCosts, count, count_images

__all__ = ['Cost', 'ImageCosts', 'count', 'count_images']
