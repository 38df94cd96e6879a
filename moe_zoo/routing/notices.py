"""What a training loop tells the modules of a model that keep a state: an epoch begins, an optimiser step was taken.

The tools of this package tell them by themselves. A loop of one's own calls the two functions; a module that wants to
know has a method of the same name.
"""
import weakref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..errors import InputError


def set_epoch(model: nn.Module, epoch: int) -> None:
    """Tell a model that an epoch begins: the temperature of Dynamic Convolution, for one, follows from it.

    >>> for epoch in range(epochs):
    ...     set_epoch(model, epoch)
    ...     train_one_epoch(model)

    Args:
        model: Any module; modules without a method `set_epoch` are passed by.
        epoch: Finished epochs, from 0.

    Raises:
        InputError: `epoch` is negative.
    """
    if epoch < 0:
        raise InputError(f'epoch={epoch}: epochs are counted from 0.')
    for module in model.modules():
        if hasattr(module, 'set_epoch'):
            module.set_epoch(epoch)


def end_step(model: nn.Module) -> None:
    """Tell a model that an optimiser step has been taken: hard constraints and selection biases move by it.

    Call it on every rank of a distributed run, because modules sum over the ranks. Where gradients are accumulated
    under DistributedDataParallel, all but the last forward belong inside its `no_sync()`: it sends the buffers of the
    first rank to the others before every other forward, and their counts would be lost.
    """
    for module in model.modules():
        if hasattr(module, 'end_step'):
            module.end_step()


def end_step_after_optimizer(model: nn.Module) -> None:
    """Call `end_step` after each step of an optimiser of the model, whichever loop takes it.

    A hook of torch's, because neither timm's loop nor detectron2's offers a model a call after a step; it goes when the
    model does.
    """
    if not any(hasattr(module, 'end_step') for module in model.modules()):
        return
    watched = weakref.ref(model)

    def hook(optimizer: torch.optim.Optimizer, *_) -> None:
        model = watched()
        if model is not None and is_trained_by(model, optimizer):
            end_step(model)

    weakref.finalize(model, register_optimizer_step_post_hook(hook).remove)


def is_trained_by(model: nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser holds parameters of a model."""
    parameters = {id(p) for p in model.parameters()}
    return any(id(p) in parameters for group in optimizer.param_groups for p in group['params'][:1])
