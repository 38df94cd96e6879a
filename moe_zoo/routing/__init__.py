"""How inputs meet experts: records, routers, capacity, dispatch. Pure tensor code that knows no image and no model."""
from .capacity import compute_capacity, keep_chosen_by_experts, keep_within_capacity
from .constraints import STEP_CONSTRAINTS, create_constraint
from .context import (
    RoutingContext,
    checkpoint_routed,
    current_image_sizes,
    record,
    routing_context,
    trace_routing,
)
from .dispatch import dispatch_padded, dispatch_reference, dispatch_sorted
from .exchange import ExpertExchange, gather_routing
from .expert_routers import ExpertChoiceRouter, SoftRouter
from .hierarchical import HierarchicalRouter
from .notices import end_step, end_step_after_optimizer, set_epoch
from .routers import (
    AnnealedSoftmaxRouter,
    CosineTopKRouter,
    NoisyTopKRouter,
    SigmoidRouter,
    SigmoidTopKRouter,
    SoftmaxRouter,
    SoftmaxTopKRouter,
    check_num_selected,
    linear_float32,
)
from .types import Routing

__all__ = [
    'AnnealedSoftmaxRouter',
    'CosineTopKRouter',
    'ExpertChoiceRouter',
    'ExpertExchange',
    'HierarchicalRouter',
    'NoisyTopKRouter',
    'Routing',
    'RoutingContext',
    'SigmoidRouter',
    'SigmoidTopKRouter',
    'SoftRouter',
    'SoftmaxRouter',
    'STEP_CONSTRAINTS',
    'SoftmaxTopKRouter',
    'check_num_selected',
    'checkpoint_routed',
    'compute_capacity',
    'create_constraint',
    'current_image_sizes',
    'dispatch_padded',
    'dispatch_reference',
    'dispatch_sorted',
    'end_step',
    'end_step_after_optimizer',
    'gather_routing',
    'keep_chosen_by_experts',
    'keep_within_capacity',
    'linear_float32',
    'record',
    'routing_context',
    'set_epoch',
    'trace_routing',
]
