"""The optimiser of a detector: detectron2's SGD, or one of timm's with the learning rates and decays of SOLVER."""
from typing import Set

import torch
from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_sgd
from detectron2.solver import get_default_optimizer_params
from detectron2.solver.build import maybe_add_gradient_clipping
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn

from ..errors import InputError, nearest


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that MOE.OPTIMIZER names.

    As in detectron2, parameters differ by SOLVER.WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS and BIAS_LR_FACTOR, and gradients
    are clipped as SOLVER.CLIP_GRADIENTS says. What a model of timm's wants undecayed, such as a position table, is.

    Raises:
        InputError: timm has no such optimiser, it takes no such keyword, or wants a package or a machine that is not
            there.
    """
    options, solver = cfg.MOE.OPTIMIZER, cfg.SOLVER
    if not options.NAME:
        return build_sgd(cfg, model)
    # Second derivatives are what no trainer here computes.
    known = [name for name in list_optimizers() if not get_optimizer_info(name).second_order]
    if options.NAME not in known:
        raise InputError(f'MOE.OPTIMIZER.NAME {options.NAME!r} is none of the optimisers of '
                         f'timm.optim.list_optimizers() that take plain gradients.{nearest(options.NAME, known)}')
    groups = get_default_optimizer_params(
        model, base_lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR, weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        overrides={name: {'weight_decay': 0.} for name in _undecayed(model)})
    kwargs = dict(options.ARGS)
    if get_optimizer_info(options.NAME).has_momentum:
        kwargs.setdefault('momentum', solver.MOMENTUM)
    try:
        optimizer = create_optimizer_v2(groups, options.NAME, solver.BASE_LR, solver.WEIGHT_DECAY, **kwargs)
    except (TypeError, ValueError, AssertionError, ImportError, RuntimeError) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise InputError(f'MOE.OPTIMIZER {options.NAME} with ARGS {dict(options.ARGS)} cannot be built: {reason}.'
                         ) from error
    return maybe_add_gradient_clipping(cfg, optimizer)


def _undecayed(model: nn.Module) -> Set[str]:
    """Last names of the parameters that parts of the model exempt; 'weight' and 'bias' would mean all of that name."""
    names = {name.rpartition('.')[2] for module in model.modules() if hasattr(module, 'no_weight_decay')
             for name in module.no_weight_decay()}
    return names - {'weight', 'bias'}
