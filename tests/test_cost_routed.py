"""What routed layers cost at most, as executed and as expected under a load, against numbers worked out by hand.

Letters: B images, N tokens, D width, E experts, K chosen.
"""
import pytest
import timm
import torch
from torch import nn

from moe_zoo.analysis import count, count_images
from moe_zoo.analysis.usage import measure_usage
from moe_zoo.errors import InputError
from moe_zoo.layers import MoEConv2d, MoEMlp, MoEStage, SoftMoEMlp
from moe_zoo.layers.deep_moe import ChannelGate, ChannelGated, scale_channels, sparse_inference


def crowded(**keywords):
    """Two of 4 experts for every token of width 4, 8 hidden. All tokens want experts 0 and 1, which have 2 slots each.

    An expert is 4 * 8 + 8 * 4 = 64 MACs a token and 64 + 8 + 4 = 76 parameters; the router 4 * 4 of both.
    """
    layer = MoEMlp(4, 8, num_experts=4, num_selected=2, capacity=2, group_images=1, **keywords).eval()
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[4.], [3.], [2.], [1.]]).expand(4, 4))
    return layer


def test_experts_of_tokens_under_a_known_load():
    cost = count(crowded(), torch.ones(1, 4, 4))
    assert cost.macs_max == 4 * 16 + 4 * 2 * 64
    assert cost.macs_executed == cost.macs_expected == 4 * 16 + 4 * 64  # 2 slots of 2 experts are taken
    assert cost.parameters_by_expert == {'': (76, 76, 76, 76)}
    assert cost.parameters == 4 * 76 + 16
    assert cost.active_parameters == cost.used_parameters == 2 * 76 + 16


def test_images_meet_more_parameters_than_a_token():
    layer = crowded()
    x = torch.ones(2, 4, 4)
    x[1] *= -1  # wants experts 3 and 2
    cost = count(layer, x)
    assert (cost.active_parameters, cost.used_parameters) == (2 * 76 + 16, 4 * 76 + 16)
    assert count_images(layer, [x[:1], x[1:]]).used_parameters == (168, 168)


def test_a_load_that_was_measured_elsewhere():
    model = nn.Sequential(crowded())
    x = torch.ones(1, 4, 4)
    # on average a token used expert 0 once and expert 1 half the time: 4 * 1.5 pairs
    assert count(model, x, load={'0': [1, .5, 0, 0]}).macs_expected == 4 * 16 + 4 * 1.5 * 64
    usage = measure_usage(model, [x, -x, torch.cat((x, x))])
    load = {name: each.load for name, each in usage.items()}
    assert load == {'0': [.5 * 3 / 4, .5 * 3 / 4, .5 / 4, .5 / 4]}
    assert count(model, x, load=load).macs_expected == 4 * 16 + 4 * 64
    # meta tensors have no load of their own
    meta = count(model.to('meta'), x.to('meta'))
    assert meta.macs_expected is None and meta.used_parameters is None
    assert count(model, x.to('meta'), load=load).macs_expected == 4 * 16 + 4 * 64


@pytest.mark.parametrize(('load', 'message'), [
    ({'1': [1, 1, 0, 0]}, "load: the model has no layer '1'."),
    ({'0': [1, 1]}, "load['0'] is of 2 experts: the layer has 4."),
    ({}, 'load: it lacks a routed layer that ran; it names none.'),
])
def test_a_load_that_does_not_fit(load, message):
    with pytest.raises(InputError) as failure:
        count(nn.Sequential(crowded()), torch.ones(1, 4, 4), load=load)
    assert str(failure.value) == message


def test_experts_that_choose_fill_all_slots():
    layer = MoEMlp(4, 8, num_experts=4, num_selected=2, capacity=3, group_images=1, router='expert_choice').eval()
    cost = count(layer, torch.rand(2, 5, 4))
    # 10 tokens through the router; 4 experts with 3 slots in each of 2 images
    assert cost.macs_max == cost.macs_executed == cost.macs_expected == 10 * 16 + 2 * 4 * 3 * 64
    # more slots than tokens: there is nothing to fill them with
    assert count(layer, torch.rand(2, 2, 4)).macs_max == 4 * 16 + 2 * 4 * 2 * 64


def test_soft_experts_compute_all_slots_whatever_the_router_says():
    layer = SoftMoEMlp(4, 8, num_experts=3, num_slots=2).eval()
    cost = count(layer, torch.rand(2, 5, 4))
    # 10 tokens, 6 slots of 4: logits and mixture in, mixture out; 6 slots of 2 images through an expert
    assert cost.macs_max == 10 * 6 * 4 + 10 * 6 * (4 + 4) + 2 * 6 * 64
    assert cost.macs_executed == cost.macs_expected == cost.macs_max
    assert cost.used_parameters == cost.parameters


class Gated(ChannelGated):
    """3 -> 4 -> 6 channels, 3x3, both gated, on the mixture weight that comes with the image."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(6)
        self.gate1, self.gate2 = ChannelGate(4, 1), ChannelGate(6, 1)
        self.act = nn.ReLU()
        with torch.no_grad():  # e = 1 opens 1 of 4 and 2 of 6; e = -1 the others
            self.gate1.weight.copy_(torch.tensor([[1.], [-1.], [-1.], [-1.]]))
            self.gate2.weight.copy_(torch.tensor([[1.], [-1.], [1.], [-1.], [-1.], [-1.]]))
        self.count_experts()

    def chain(self):
        return [(self.conv1, self.norm1, self.gate1, self.act), (self.conv2, self.norm2, self.gate2, self.act)]

    def forward(self, x, e):
        if self.runs_live(x):
            return self.run_live(x, e)[0]
        x = self.act(scale_channels(self.norm1(self.conv1(x)), self.gate1.gates(e)))
        return scale_channels(self.norm2(self.conv2(x)), self.gate2.gates(e))


def test_channels_behind_closed_gates_cost_nothing_where_they_are_left_out():
    block = Gated().eval()
    x, open_, other = torch.rand(1, 3, 5, 5), torch.ones(1, 1), -torch.ones(1, 1)
    gates = 4 + 6
    dense = count(block, (x, open_))
    assert dense.macs_max == dense.macs_executed == 25 * (4 * 27 + 6 * 36) + gates
    assert dense.macs_expected == 25 * (1 * 27 + 2 * 9) + gates
    with sparse_inference(block):
        live = count(block, (x, open_))
        assert count(block, (x, other)).macs_executed == 25 * (3 * 27 + 4 * 27) + gates
    assert live.macs_executed == live.macs_expected == dense.macs_expected
    assert live.macs_max == dense.macs_max
    # a channel is its filter, norm and row of the gate: 27 + 2 + 1 and 36 + 2 + 1
    assert dense.parameters_by_expert == {'': (30,) * 4 + (39,) * 6}
    assert dense.used_parameters == dense.parameters - 3 * 30 - 4 * 39
    # a data set that opens every gate half the time: 2 of 4 and 3 of 6 on average
    half = {'gate1': [.5] * 4, 'gate2': [.5] * 6}
    assert count(block, (x, open_), load=half).macs_expected == 25 * (2 * 27 + 3 * 18) + gates


def test_experts_of_images():
    layer = MoEConv2d(2, 3, 3, padding=1, num_experts=4, num_selected=2).eval()
    x = torch.rand(3, 2, 4, 4)
    cost = count(layer, x)
    assert cost.macs_max == cost.macs_executed == cost.macs_expected == 3 * (2 * 4 + 2 * 16 * 3 * 18)
    assert cost.parameters_by_expert == {'': (54,) * 4}
    assert count(layer, x, load={'': [.5, .5, 0, 0]}).macs_expected == 3 * (2 * 4 + 16 * 3 * 18)


def test_unlike_experts_are_expected_by_their_own_cost():
    experts = [nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.Sequential()]
    layer = MoEStage(experts, 2, num_selected=1).eval()
    x = torch.rand(1, 2, 4, 4)
    gate, small, large = 2 * 3, 16 * 4, 16 * 36
    assert count(layer, x).macs_max == gate + large
    for e, macs in enumerate((small, large, 0)):
        with torch.no_grad():
            layer.router.weight.zero_()[e] = 1.
        cost = count(layer, x)
        assert cost.macs_executed == cost.macs_expected == gate + macs
        assert cost.used_parameters == cost.parameters - (4 + 36) + (4, 36, 0)[e]
    assert cost.parameters_by_expert == {'': (4, 36, 0)}
    load = {'': [.5, .25, .25]}
    assert count(layer, x, load=load).macs_expected == gate + .5 * small + .25 * large


@pytest.mark.parametrize(('name', 'keywords'), [
    ('condconv_mobilenetv1_025', dict(num_experts=2)),
    ('pmoe_cnn', {}),
])
def test_what_always_runs_is_expected_to(name, keywords):
    model = timm.create_model(name, **keywords)
    x = torch.rand(1, *model.default_cfg['input_size'])
    cost = count(model, x)
    assert cost.macs_expected == cost.macs_max and cost.used_parameters == cost.parameters
    meta = count(model.to('meta'), x.to('meta'))
    assert meta.macs_expected == cost.macs_max and meta.used_parameters == cost.parameters


def test_expected_macs_of_a_set_are_the_mean_of_its_images():
    model = timm.create_model(
        'vmoe_vit_s', img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, representation_size=0,
        num_classes=5, capacity=4).eval()
    torch.manual_seed(1)
    images = torch.rand(4, 1, 3, 64, 64) * torch.arange(4).view(4, 1, 1, 1, 1)
    costs = count_images(model, images)
    assert costs.expected == costs.executed  # the loop over experts does not pad
    load = {name: usage.load for name, usage in measure_usage(model, images).items()}
    assert count(model, images[0], load=load).macs_expected == pytest.approx(costs.spread('expected').mean)
