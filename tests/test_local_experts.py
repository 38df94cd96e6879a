"""`LocalExperts` and its losses: gradients are the responsibilities of the paper, by hand and by autograd.

Letters: T items, D input width, O output width, F width of what the gate sees, E experts.
"""
import math
from functools import partial

import pytest
import torch
from timm.layers import Mlp
from torch import nn
from torch.nn import functional as F

from moe_zoo.analysis import count
from moe_zoo.analysis.force import force_expert
from moe_zoo.errors import InputError
from moe_zoo.layers import LocalExperts
from moe_zoo.losses import (
    class_mixture_loss,
    competitive_loss,
    cooperative_loss,
    mixture_loss,
    responsibilities,
)
from moe_zoo.routing import routing_context


def example(T=1, E=3, O=2):
    """Outputs, logits and target of T items, the first two with gradients."""
    return torch.randn(T, E, O, requires_grad=True), torch.randn(T, E, requires_grad=True), torch.randn(T, O)


# Losses.

def test_two_experts_by_hand():
    """p = (1/2, 1/2), squared distances 0 and 2: h_1 = 1 / (1 + 1/e) = 0.7311, loss -ln(1/2 (1 + 1/e)) = 0.3799."""
    outputs, logits, target = torch.tensor([[[1.0], [1 + math.sqrt(2)]]]), torch.zeros(1, 2), torch.tensor([[1.0]])
    assert mixture_loss(outputs, logits, target).item() == pytest.approx(0.3799, abs=5e-5)
    torch.testing.assert_close(responsibilities(outputs, logits, target), torch.tensor([[0.7311, 0.2689]]), atol=5e-5,
                               rtol=0)
    assert competitive_loss(outputs, logits, target).item() == pytest.approx(1)  # 1/2 0 + 1/2 2
    # The blend is 1 + sqrt(2) / 2, its squared distance 1/2.
    assert cooperative_loss(outputs, logits, target).item() == pytest.approx(0.5)


def test_the_mixtures_gradients_are_the_responsibilities():
    outputs, logits, target = example(T=5)
    by_output, by_logit = torch.autograd.grad(5 * mixture_loss(outputs, logits, target), (outputs, logits))
    p = torch.softmax(logits, dim=1)
    joint = p * torch.exp(-(target[:, None] - outputs).square().sum(dim=2) / 2)
    h = joint / joint.sum(dim=1, keepdim=True)
    torch.testing.assert_close(responsibilities(outputs, logits, target), h)
    torch.testing.assert_close(by_output, -h[:, :, None] * (target[:, None] - outputs))
    torch.testing.assert_close(by_logit, p - h)


def test_the_competitive_and_the_cooperative_gradients():
    outputs, logits, target = example(T=5)
    p = torch.softmax(logits, dim=1)[:, :, None]
    (competing,) = torch.autograd.grad(5 * competitive_loss(outputs, logits, target), outputs)
    torch.testing.assert_close(competing, -2 * p * (target[:, None] - outputs))
    (cooperating,) = torch.autograd.grad(5 * cooperative_loss(outputs, logits, target), outputs)
    rest = target - (p * outputs).sum(dim=1)  # all experts are moved by the one error of the blend
    torch.testing.assert_close(cooperating, -2 * p * rest[:, None])


def test_the_expert_that_fits_best_learns_fastest_early_on():
    """Equal gates, distances 1 and 3: h_1 / h_2 = exp((9 - 1) / 2) = e^4, where the competitive form pulls 1 : 3."""
    outputs = torch.tensor([[[1.0], [3.0]]], requires_grad=True)
    logits, target = torch.zeros(1, 2), torch.zeros(1, 1)
    (mixture,) = torch.autograd.grad(mixture_loss(outputs, logits, target), outputs)
    (competing,) = torch.autograd.grad(competitive_loss(outputs, logits, target), outputs)
    assert (mixture[0, 0] / mixture[0, 1]).item() == pytest.approx(math.exp(4) / 3, rel=1e-5)
    assert (competing[0, 0] / competing[0, 1]).item() == pytest.approx(1 / 3)


@pytest.mark.parametrize('near', [0.0, 1e4])
def test_experts_far_off_leave_loss_and_gradients_finite(near):
    """exp(-(1e4)^2 / 2) is 0 in any precision. Equal gates: the nearest expert explains all, h = (1, 0)."""
    outputs = torch.tensor([[[near], [2e4]]], requires_grad=True)
    logits = torch.zeros(1, 2, requires_grad=True)
    loss = mixture_loss(outputs, logits, torch.zeros(1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2) + near ** 2 / 2)
    assert outputs.grad.flatten().tolist() == [near, 0]
    assert logits.grad.tolist() == [[-0.5, 0.5]]  # p - h


def test_the_form_for_classes():
    """p = (3/4, 1/4); the experts give class 1 a probability of 1/5 and 4/5: -ln(3/20 + 4/20)."""
    logits = torch.tensor([[3.0, 1.0]]).log()
    classes = torch.tensor([[[4.0, 1.0], [1.0, 4.0]]]).log()
    assert class_mixture_loss(classes, logits, torch.tensor([1])).item() == pytest.approx(-math.log(7 / 20))
    logits, classes = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3, 4, requires_grad=True)
    target = torch.arange(6) % 4
    (by_logit,) = torch.autograd.grad(6 * class_mixture_loss(classes, logits, target), logits)
    p, right = torch.softmax(logits, dim=1), torch.softmax(classes, dim=2)[torch.arange(6), :, target]
    torch.testing.assert_close(by_logit, p - p * right / (p * right).sum(dim=1, keepdim=True))


def test_a_class_that_no_expert_believes_in_costs_a_finite_loss():
    classes = torch.tensor([[[1e4, 0.0], [2e4, 0.0]]], requires_grad=True)
    loss = class_mixture_loss(classes, torch.zeros(1, 2), torch.tensor([1]))
    loss.backward()
    assert loss.item() == pytest.approx(1e4 + math.log(2))
    assert classes.grad.isfinite().all()


# The layer.

def test_the_blend_of_linear_experts_by_a_gate_with_its_own_input():
    layer = LocalExperts(2, 3, num_experts=4, gate_features=5)
    x, seen = torch.randn(6, 2), torch.randn(6, 5)
    p = torch.softmax(seen @ layer.router.weight.T + layer.router.bias, dim=1)
    expected = sum(p[:, e:e + 1] * F.linear(x, expert.weight, expert.bias) for e, expert in enumerate(layer.experts))
    with routing_context() as context:
        y = layer(x, seen)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(context.routings[0].weights, p)
    assert context.routings[0].indices is None  # every expert is mixed
    # Further axes are items, too.
    torch.testing.assert_close(layer(x.view(2, 3, 2), seen.view(2, 3, 5)).view(6, 3), expected)


def test_any_module_is_an_expert_and_every_parameter_gets_a_gradient():
    layer = LocalExperts(
        4, 3, num_experts=2, expert=partial(Mlp, hidden_features=5), act_layer=partial(nn.Softmax, dim=-1),
        gate_hidden_features=6)
    x = torch.randn(7, 4)
    outputs, routing = layer.forward_experts(x)
    torch.testing.assert_close(outputs.sum(dim=2), torch.ones(7, 2))
    torch.testing.assert_close(layer(x), (routing.weights.unsqueeze(2) * outputs).sum(dim=1))
    mixture_loss(outputs, routing.logits, torch.randn(7, 3)).backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())


def test_training_by_the_mixture_loss_parts_a_task_between_experts():
    """y = x on the left and y = 5 - x on the right: two linear experts can, one leaves a squared error of 1.65.

    Its best slope is E[x y] / E[x^2] = 3 (1/6 + 5/4 - 1/6) = 3.75: the variance 6.33 less 3.75^2 / 3.
    """
    x = torch.linspace(-1, 1, 40).view(-1, 1)
    target = torch.where(x < 0, x, 5 - x)
    layer = LocalExperts(1, 1, num_experts=2)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        outputs, routing = layer.forward_experts(x)
        mixture_loss(outputs, routing.logits, target).backward()
        optimizer.step()
    assert F.mse_loss(layer(x), target) < 0.4
    chosen = routing.weights.argmax(dim=1)
    assert chosen[:20].unique().numel() == chosen[20:].unique().numel() == 1 and chosen[0] != chosen[-1]


def test_cost_by_hand_and_one_expert_forced():
    layer = LocalExperts(2, 3, num_experts=4, gate_features=5)
    # An item: the gate 5 * 4, four experts of 2 * 3. Parameters: 20 + 4, and 4 * (6 + 3).
    assert layer.max_macs((7, 2)) == 7 * (20 + 24)
    assert layer.active_parameters() == 24 + 36
    assert [[p.numel() for p in group] for group in layer.expert_parameters()] == [[6] * 4, [3] * 4]
    plain = LocalExperts(2, 3)
    x = torch.randn(1, 2)
    assert count(plain, x).macs_max == 2 * 4 + 24
    with force_expert(plain, 2):
        torch.testing.assert_close(plain(x), plain.experts[2](x))


def test_meta_and_other_types():
    with torch.device('meta'):
        layer = LocalExperts(2, 3)
    assert layer(torch.randn(5, 2, device='meta')).shape == (5, 3)
    layer = LocalExperts(2, 3, dtype=torch.bfloat16)
    x = torch.randn(5, 2, dtype=torch.bfloat16)
    outputs, routing = layer.forward_experts(x)
    assert layer(x).dtype == outputs.dtype == torch.bfloat16 and routing.logits.dtype == torch.float32
    assert mixture_loss(outputs, routing.logits, torch.randn(5, 3)).dtype == torch.float32


def test_bad_input_is_one_sentence():
    layer = LocalExperts(2, 3, gate_features=5)
    x = torch.randn(6, 2)
    with pytest.raises(InputError, match=r'gate_input: the gate sees shape \(6, 2\), and for \(6, 2\) it wants '
                                         r'\(6, 5\)'):
        layer(x)
    with pytest.raises(InputError, match=r'sees shape \(3, 5\), and for \(6, 2\) it wants \(6, 5\)'):
        layer(x, torch.randn(3, 5))
    with pytest.raises(InputError, match='num_experts=0: a routed layer needs at least one expert'):
        LocalExperts(2, 3, num_experts=0)
