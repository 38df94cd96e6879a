"""Routed layers, drop-in for a convolution, an MLP or a residual stage."""
from .cond_conv import CondConv2d, CondLinear, RoutedConv2d
from .deep_moe import ChannelGate, ChannelGated, ShallowEmbedding, sparse_inference
from .dynamic_conv import DynamicConv2d
from .local_experts import LocalExperts
from .moe_conv import MoEConv2d
from .moe_mlp import MoEMlp
from .moe_stage import MoEStage
from .patch_moe import PatchMoE, PatchMoEConv2d
from .routed import RoutedLayer, RoutedModel, masked_mean
from .situational_fusion import SituationalFusion
from .soft_moe_mlp import SoftMoEMlp

__all__ = [
    'ChannelGate',
    'ChannelGated',
    'CondConv2d',
    'CondLinear',
    'DynamicConv2d',
    'LocalExperts',
    'MoEConv2d',
    'MoEMlp',
    'MoEStage',
    'PatchMoE',
    'PatchMoEConv2d',
    'RoutedConv2d',
    'RoutedLayer',
    'RoutedModel',
    'ShallowEmbedding',
    'SituationalFusion',
    'SoftMoEMlp',
    'masked_mean',
    'sparse_inference',
]
