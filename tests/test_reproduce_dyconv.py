"""The temperature experiment: what its numbers measure."""
import pytest
import timm
import torch

from moe_zoo.layers import DynamicConv2d
from moe_zoo.reproduce.dyconv import BLOCKS, TEMPERATURE, evenness, sharpened
from moe_zoo.reproduce.training import Data, Split
from moe_zoo.routing import trace_routing


def model(**kwargs) -> torch.nn.Module:
    return timm.create_model(
        'dyconv_mobilenetv2_050', arch_def=BLOCKS, num_features=64, in_chans=1, num_classes=3, **kwargs).eval()


def data(number: int = 4) -> Data:
    split = Split(torch.randn(number, 1, 16, 16), torch.arange(number) % 3)
    return Data(split, split, split, 3, 'noise')


def gates(network: torch.nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    with trace_routing(network) as trace, torch.no_grad():
        network(images)
    return [record.weights for record, in trace.values()]


@pytest.mark.parametrize('arm', TEMPERATURE.arms, ids=lambda arm: arm.name)
def test_an_attention_is_made_flat_or_hard_in_a_copy(arm):
    network, images = model(**arm.options), data().test.images
    for module in network.modules():
        if isinstance(module, DynamicConv2d):
            torch.nn.init.normal_(module.routing_fn.bias)  # or a hidden layer that is silent would leave a tie
    before = gates(network, images)
    experts = arm.options.get('num_experts', 4)
    for weights in gates(sharpened(network, 0.), images):
        torch.testing.assert_close(weights, torch.full((4, experts), 1 / experts))
    for weights in gates(sharpened(network, 1e9), images):
        torch.testing.assert_close(weights.max(dim=1).values, torch.ones(4))
    torch.testing.assert_close(gates(network, images), before)


def test_evenness_by_hand():
    network = model(temperature=1., anneal_epochs=0)
    convs = [module for module in network.modules() if isinstance(module, DynamicConv2d)]
    assert len(convs) == 20
    with torch.no_grad():
        for conv in convs:
            conv.routing_fn.weight.zero_()
            conv.routing_fn.bias.copy_(torch.tensor([0., 0., -100., -100.]))
        # two of four kernels at 1/2: ln 2 / ln 4
        assert evenness(network, data()) == pytest.approx(0.5)
        for conv in convs[:10]:
            conv.routing_fn.bias.zero_()
    assert evenness(network, data()) == pytest.approx(0.75)
    assert evenness(model(num_experts=1), data()) == 1.
