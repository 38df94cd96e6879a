"""Expert usage: sums that can be checked by hand, from records and through a real model."""
import math

import pytest
import torch
from torch import nn

from moe_zoo.analysis.usage import LayerUsage, evaluation_mode, image_shares, measure_usage, usage_table
from moe_zoo.errors import InputError
from moe_zoo.layers import RoutedLayer
from moe_zoo.routing import Routing, record


class Replay(RoutedLayer):
    """A layer that records what it is given, batch after batch."""
    num_experts, num_selected = 3, 2

    def __init__(self, routings):
        super().__init__()
        self.routings = list(routings)
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        record(self, self.routings.pop(0))
        return x


def sparse(indices, weights, kept=None, shape=None, experts=3):
    indices, weights = torch.tensor(indices), torch.tensor(weights)
    logits = torch.zeros(len(indices), experts)
    kept = None if kept is None else torch.tensor(kept)
    return Routing(logits, logits, weights, indices, kept=kept, shape=shape or (len(indices),))


def soft(weights):
    weights = torch.tensor(weights)
    return Routing(weights, weights, weights, shape=(len(weights),))


def test_sparse_usage_over_two_batches():
    # Batch 1: image 0 takes experts 0 (.75), 1 (.25); image 1 takes 0 (.5), 2 (.5). Batch 2: image 2 takes 0 (1.), and
    # its second choice, expert 1 (.5), is dropped.
    layer = Replay([
        sparse([[0, 1], [0, 2]], [[.75, .25], [.5, .5]]),
        sparse([[0, 1]], [[1., .5]], kept=[[True, False]]),
    ])
    model = nn.Sequential(nn.Identity(), layer)
    loader = [(torch.zeros(2, 1), torch.tensor([4, 1])), (torch.zeros(1, 1), torch.tensor([4]))]
    usage = measure_usage(model, loader)['1']
    assert usage.items == 3 and usage.choices.tolist() == [3, 1, 1] and usage.mass.tolist() == [2.25, .25, .5]
    assert usage.share.tolist() == [.6, .2, .2]
    assert usage.importance.tolist() == [.75, 1 / 12, 1 / 6]
    assert usage.dropped == pytest.approx(1 / 6)  # 1 of 6 pairs
    # Mean 1/3, deviations 4/15, -2/15, -2/15: variance (16 + 4 + 4) / 225 / 3 = 8/225; cv = 3 sqrt(8) / 15.
    assert usage.cv == pytest.approx(3 * math.sqrt(8) / 15)
    assert usage.entropy == pytest.approx(-(.6 * math.log(.6) + .4 * math.log(.2)) / math.log(3))
    assert usage.living == 3
    # Class 4: images 0 and 2, shares (.75, .25, 0) and (1, 0, 0); class 1: image 1.
    assert usage.class_mass.shape == (5, 3)
    assert usage.class_mass[4].tolist() == [.875, .125, 0] and usage.class_mass[1].tolist() == [.5, 0, .5]
    assert usage.class_mass[0].tolist() == [0, 0, 0]


def test_soft_usage_and_dead_experts():
    layer = Replay([soft([[.5, .5, .005], [.6, .4, .005]])])
    usage = measure_usage(layer, [torch.zeros(2, 1)])['']
    # Weights are what is shared out where every expert is mixed: 1.1, .9 and .01 of 2.01.
    assert usage.share.tolist() == pytest.approx([1.1 / 2.01, .9 / 2.01, .01 / 2.01])
    assert usage.living == 2 and usage.dropped == 0 and usage.class_mass is None
    assert usage.as_dict()['class_mass'] is None and usage.as_dict()['living'] == 2


def test_tokens_are_gathered_by_image():
    # Two images of two tokens, one expert a token.
    routing = sparse([[0], [0], [1], [2]], [[.9], [.1], [.3], [.1]], shape=(2, 2))
    assert torch.allclose(image_shares(routing), torch.tensor([[1., 0., 0.], [0., .75, .25]]))
    usage = measure_usage(Replay([routing]), [(torch.zeros(2, 1), torch.tensor([0, 1]))], num_classes=3)['']
    assert usage.items == 4
    assert torch.allclose(usage.class_mass, torch.tensor([[1, 0, 0], [0, .75, .25], [0, 0, 0]], dtype=torch.float64))


def test_soft_targets_give_no_class_table():
    usage = measure_usage(Replay([soft([[1., 0., 0.]])]), [(torch.zeros(1, 1), torch.tensor([[.5, .5]]))])['']
    assert usage.class_mass is None


def test_max_batches_and_modes():
    layer = Replay([soft([[1., 0., 0.]])] * 3)
    model = nn.Sequential(nn.BatchNorm1d(1).eval(), layer).train()
    model[0].eval()
    assert measure_usage(model, [torch.zeros(1, 1)] * 3, max_batches=2)['1'].items == 2
    assert layer.modes == [False, False]  # measured in evaluation mode,
    assert model.training and layer.training and not model[0].training  # and every module has its own mode back
    with pytest.raises(KeyError), evaluation_mode(model):
        raise KeyError
    assert layer.training


def test_nothing_to_measure_is_said():
    with pytest.raises(InputError, match='loader is empty'):
        measure_usage(Replay([]), [])
    with pytest.raises(InputError, match='model: Linear has no active routed layer'):
        measure_usage(nn.Linear(1, 1), [torch.zeros(1, 1)])


def test_table_has_one_row_a_layer():
    usages = measure_usage(nn.Sequential(Replay([sparse([[0]], [[1.]])])), [torch.zeros(1, 1)])
    lines = usage_table(usages).splitlines()
    assert len(lines) == 2
    # One of three experts has everything: cv = sqrt(2) = 1.41, entropy 0.
    assert lines[1].split() == ['0', '3', '1', '1.41', '0.000', '0.0', '%', '100.0', '0.0', '0.0']


def test_entropy_of_one_and_of_two_experts():
    """3 of 4 and 1 of 4: .75 log2(4 / 3) + .25 log2 4 = .8113 bits, of 1 at most; one expert is always even."""
    one, two = (LayerUsage('a', 4, torch.tensor(choices), torch.tensor(choices), 0.) for choices in ([4.], [3., 1.]))
    assert one.entropy == 1. and two.entropy == pytest.approx(.8113, abs=1e-4)
    assert two.cv == pytest.approx(.5) and one.cv == 0.  # shares .75 and .25: deviation .25 of a mean of .5
