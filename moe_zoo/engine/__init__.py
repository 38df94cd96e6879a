"""Train and evaluate classification on timm's parts: its loader, transforms, mixup, optimiser, schedule, EMA and task.

`moe_zoo.engine.train.train(...)` and `moe_zoo.engine.evaluate.evaluate(...)` are the functions behind
`tools/train_imagenet.py` and `tools/eval_imagenet.py`.
"""
from .consistency import RouteConsistencyTask
from .task import MoEClassificationTask, MoEMultiLabelClassificationTask

__all__ = ['MoEClassificationTask', 'MoEMultiLabelClassificationTask', 'RouteConsistencyTask']
