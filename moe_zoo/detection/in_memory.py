"""Train a detector without writing anything: for experiments that look at it and throw it away."""
import contextlib

from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn

from .train import Trainer


def train_in_memory(cfg: CfgNode) -> nn.Module:
    """The detector of a config after SOLVER.MAX_ITER steps on DATASETS.TRAIN, in evaluation mode.

    On one process, by the parts of `Trainer`: its model, optimiser, schedule and batches.
    """
    model = Trainer.build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    schedule = Trainer.build_lr_scheduler(cfg, optimizer)
    model.train()
    with EventStorage() as storage, contextlib.closing(iter(Trainer.build_train_loader(cfg))) as batches:
        for _ in range(cfg.SOLVER.MAX_ITER):
            optimizer.zero_grad()
            sum(model(next(batches)).values()).backward()
            optimizer.step()
            schedule.step()
            storage.step()
    return model.eval()
