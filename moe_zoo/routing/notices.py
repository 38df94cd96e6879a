"""What a training loop tells the modules of a model that keep a state: an epoch begins, an optimiser step was taken.

The tools of this package tell them by themselves. A loop of one's own calls the two functions; a module that wants to
know has a method of the same name.
"""
from torch import nn


def set_epoch(model: nn.Module, epoch: int) -> None:
    """Tell a model that an epoch begins: the temperature of Dynamic Convolution, for one, follows from it.

    >>> for epoch in range(epochs):
    ...     set_epoch(model, epoch)
    ...     train_one_epoch(model)

    Args:
        model: Any module; modules without a method `set_epoch` are passed by.
        epoch: Finished epochs, from 0.
    """
    for module in model.modules():
        if hasattr(module, 'set_epoch'):
            module.set_epoch(epoch)


def end_step(model: nn.Module) -> None:
    """Tell a model that an optimiser step has been taken: hard constraints and selection biases move by it.

    Call it on every rank of a distributed run, because modules sum over the ranks.
    """
    for module in model.modules():
        if hasattr(module, 'end_step'):
            module.end_step()
