"""Modules that keep a state hear of epochs and steps, and the training tool tells them."""
import gc

import pytest
import torch
from torch import nn

from moe_zoo.errors import InputError
from moe_zoo.routing import end_step, set_epoch
from moe_zoo.routing.notices import end_step_after_optimizer


class Listener(nn.Module):
    def __init__(self):
        super().__init__()
        self.heard = []

    def set_epoch(self, epoch):
        self.heard.append(epoch)

    def end_step(self):
        self.heard.append('step')


def test_every_module_that_listens_hears_once():
    model = nn.Sequential(Listener(), nn.ReLU(), nn.Sequential(Listener()))
    set_epoch(model, 3)
    end_step(model)
    assert model[0].heard == model[2][0].heard == [3, 'step']


def test_epochs_are_counted_from_0():
    model = Listener()
    with pytest.raises(InputError, match='epoch=-1: epochs are counted from 0'):
        set_epoch(model, -1)
    assert model.heard == []


def test_a_model_hears_of_the_steps_of_its_own_optimiser_while_it_lives():
    model = nn.Sequential(Listener(), nn.Linear(1, 1))
    other = nn.Linear(1, 1)
    end_step_after_optimizer(model)
    for module in (other, model, other):
        torch.optim.SGD(module.parameters(), lr=0.).step()
    listener = model[0]
    assert listener.heard == ['step']
    del model, module
    gc.collect()
    torch.optim.SGD(other.parameters(), lr=0.).step()
    assert listener.heard == ['step']
