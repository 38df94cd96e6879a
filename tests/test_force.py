"""Forced experts: what comes out is what the one expert computes, in sparse and in mixing layers."""
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import moe_zoo  # noqa: F401 - registers the models
from moe_zoo.analysis.force import assign, force_expert, rewrite_routing, routed_layers
from moe_zoo.errors import InputError
from moe_zoo.layers.cond_conv import CondLinear, RoutedConv2d
from moe_zoo.layers.moe_mlp import MoEMlp
from moe_zoo.layers.moe_stage import MoEStage
from moe_zoo.routing import Routing, trace_routing


def stage(num_experts=3, num_selected=2):
    experts = [nn.Conv2d(2, 4, 1) for _ in range(num_experts)]
    layer = MoEStage(experts, 2, num_selected=num_selected, noise=False)
    nn.init.normal_(layer.router.weight)
    return layer.eval()


def mlp(**kwargs):
    return MoEMlp(4, 6, num_experts=4, num_selected=2, same_init=False, **kwargs).eval()


def test_forced_stage_is_its_expert():
    layer, x = stage(), torch.randn(5, 2, 3, 3)
    free = layer(x)
    for e in range(3):
        with force_expert(layer, e):
            assert torch.allclose(layer(x), layer.experts[e](x), atol=1e-6)
    assert torch.equal(layer(x), free)  # nothing is left behind
    assert not torch.allclose(free, layer.experts[0](x), atol=1e-3)


def test_forced_mixing_layer_uses_one_kernel():
    layer, x = RoutedConv2d(2, 4, 3, num_experts=3, bias=True).eval(), torch.randn(5, 2, 6, 6)
    kernel, bias = layer.weight[2].view(4, 2, 3, 3), layer.bias[2]
    with force_expert(layer, 2):
        assert torch.allclose(layer(x), F.conv2d(x, kernel, bias, padding=1), atol=1e-5)
    # With the mass kept, the kernel is scaled by the sum of the image's sigmoids.
    with trace_routing(layer) as trace:
        layer(x)
    mass = trace[''][0].weights.sum(dim=1).view(5, 1, 1, 1)
    with force_expert(layer, 2, keep_mass=True):
        assert torch.allclose(layer(x), mass * F.conv2d(x, kernel, bias, padding=1), atol=1e-5)


@pytest.mark.parametrize('keywords', [{}, {'eval_capacity_factor': 2.0}, {'num_shared_experts': 1}])
def test_forced_mlp_is_its_expert(keywords):
    layer, x = mlp(**keywords), torch.randn(3, 7, 4)
    for e in range(4):
        chunks = [x.reshape(-1, 4) if i == e else x.new_zeros(0, 4) for i in range(4)]
        expected = layer.run_experts(chunks)[0].view(3, 7, 4)
        if layer.shared is not None:
            expected = expected + layer.shared(x)
        with force_expert(layer, e):
            assert torch.allclose(layer(x), expected, atol=1e-5)


def test_records_are_one_hot():
    model = nn.ModuleDict({'a': stage(), 'b': CondLinear(2, 3, num_experts=3)}).eval()
    with trace_routing(model) as trace, force_expert(model, 1):
        model['a'](torch.randn(5, 2, 3, 3))
        model['b'](torch.randn(4, 2))
    assert torch.equal(trace['a'][0].combine_matrix(), torch.tensor([[0., 1., 0.]]).expand(5, 3))
    assert torch.equal(trace['b'][0].combine_matrix(), torch.tensor([[0., 1., 0.]]).expand(4, 3))
    assert torch.equal(trace['a'][0].gates, trace['a'][0].combine_matrix())


def test_one_layer_can_be_forced_alone():
    model = nn.Sequential(stage(), nn.Conv2d(4, 2, 1), stage(num_experts=2)).eval()
    x = torch.randn(5, 2, 3, 3)
    with trace_routing(model) as free:
        model(x)
    with trace_routing(model) as trace, force_expert(model, 2, layer='0'):
        model(x)
    assert (trace['0'][0].combine_matrix()[:, 2] == 1).all()
    assert not ((trace['2'][0].weights == 1) | (trace['2'][0].weights == 0)).any()
    assert free.keys() == trace.keys()


def test_a_nested_layer_is_not_forced_with_its_parent():
    outer = MoEStage([nn.Sequential(RoutedConv2d(2, 2, 1, num_experts=2)) for _ in range(2)], 2, 1, noise=False).eval()
    with trace_routing(outer) as trace, force_expert(outer, 1, layer=''):
        outer(torch.randn(2, 2, 3, 3))
    assert torch.equal(trace[''][0].combine_matrix(), torch.tensor([[0., 1.], [0., 1.]]))
    inner = trace['experts.1.0'][0].weights
    assert ((inner > 0) & (inner < 1)).all() and 'experts.0.0' not in trace


def test_assign_keeps_the_number_of_choices():
    # V-MoE's weights need not sum to one: .5 + .3 and .6 + .1.
    routing = Routing(torch.zeros(2, 4), torch.zeros(2, 4), torch.tensor([[.5, .3], [.6, .1]]),
                      torch.tensor([[0, 1], [2, 3]]), shape=(2,))
    forced = assign(routing, torch.tensor([3, 0]))
    assert forced.indices.tolist() == [[3, 0], [0, 1]] and forced.weights.tolist() == [[1, 0], [1, 0]]
    assert torch.allclose(assign(routing, torch.tensor([3, 0]), keep_mass=True).weights,
                          torch.tensor([[.8, 0], [.7, 0]]))


def test_a_rule_sees_layer_names_and_follows_exceptions():
    model, seen = nn.Sequential(stage()), []
    with rewrite_routing(model, lambda name, routing: seen.append((name, routing.shape)) or routing):
        model(torch.randn(5, 2, 3, 3))
    assert seen == [('0', (5,))]
    with pytest.raises(KeyError), force_expert(model, 0):
        raise KeyError
    assert not any(module._forward_hooks for module in model.modules())


def test_gradients_flow_through_a_forced_expert():
    layer = stage().train()
    with force_expert(layer, 1):
        layer(torch.randn(3, 2, 3, 3)).sum().backward()
    assert layer.experts[1].weight.grad.abs().sum() > 0
    assert layer.experts[0].weight.grad.abs().sum() == 0


def test_bad_arguments_are_named():
    model = nn.Sequential(stage(num_experts=3))
    with pytest.raises(InputError, match="expert=3: layer '0' has 3 experts, 0 to 2"):
        force_expert(model, 3)
    with pytest.raises(InputError, match="layer='1' is no routed layer. Routed layers: 0."):
        with force_expert(model, 0, layer='1'):
            pass
    with pytest.raises(InputError, match='model: Linear has no routed layer'):
        routed_layers(nn.Linear(1, 1))


@pytest.mark.parametrize('name, keywords', [
    ('condconv_mobilenetv1_025', {'num_experts': 3}),
    ('condconv_mobilenetv1_025', {'num_experts': 3, 'route_fn': 'single'}),  # later blocks follow the first one
    ('vmoe_vit_s', {'img_size': 64, 'num_experts': 3}),
])
def test_registered_models_can_be_forced(name, keywords):
    model = timm.create_model(name, num_classes=5, **keywords).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(), trace_routing(model) as trace, force_expert(model, 2):
        forced = model.forward_features(x)  # a fresh head may be zero
        assert trace and all((r.combine_matrix().argmax(-1) == 2).all() for records in trace.values() for r in records)
        # An expert that nobody asks does not matter, the one that all ask does.
        for expert, matters in ((0, False), (2, True)):
            for layer in routed_layers(model).values():
                for group in layer.expert_parameters():
                    for parameter in group:
                        parameter[expert] += torch.randn_like(parameter[expert])
            assert torch.allclose(model.forward_features(x), forced) != matters
