"""Modules that keep a state hear of epochs and steps, and the training tool tells them."""
import pytest
from torch import nn

from moe_zoo.errors import InputError
from moe_zoo.routing import end_step, set_epoch


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
