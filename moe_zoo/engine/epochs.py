"""How timm's train.py tells a model of epochs, though it offers no call for it: through its learning rate schedule.

The schedule is stepped to the next epoch at the end of each, and to the first one where a run resumes. Only with
`--sched-on-updates` a resumed run hears of no epoch until its first one ends, and trains that one at the temperature
that the checkpoint holds. Our own training tool does not need this.
"""
import warnings
import weakref
from typing import Callable, List, Optional

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model

from ..routing.notices import is_trained_by

_TASKS: 'weakref.WeakSet[TrainingTask]' = weakref.WeakSet()


def set_epoch_after_schedule(task: TrainingTask) -> None:
    """Call `task.set_epoch` where a schedule made by `create_telling_scheduler` steps an optimiser of its model."""
    if any(hasattr(module, 'set_epoch') for module in task.trainable_module.modules()):
        _TASKS.add(task)


def _trained_by(optimizer: torch.optim.Optimizer) -> List[TrainingTask]:
    return [task for task in list(_TASKS) if is_trained_by(unwrap_model(task.trainable_module), optimizer)]


def create_telling_scheduler(create_scheduler: Callable) -> Callable:
    """timm's `create_scheduler_v2`, given; the same with schedules that tell, returned."""
    def create(optimizer: torch.optim.Optimizer, *args, **kwargs):
        schedule, epochs = create_scheduler(optimizer, *args, **kwargs)
        if schedule is not None:
            schedule.__class__ = _telling(type(schedule))
        elif _trained_by(optimizer):
            warnings.warn(
                'Without a learning rate schedule nothing tells this model of epochs, so that what follows from them '
                '(the temperature of Dynamic Convolution) stays as it is: name one, or call moe_zoo.routing.set_epoch.')
        return schedule, epochs
    return create


def _telling(schedule_cls: type) -> type:
    """A class of schedules that does what `schedule_cls` does, and tells."""
    class Telling(schedule_cls):
        def step(self, epoch: int, metric: Optional[float] = None) -> None:
            super().step(epoch, metric)
            for task in _trained_by(self.optimizer):
                task.set_epoch(epoch)

    return Telling
