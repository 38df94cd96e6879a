"""Situational fusion: mixtures by hand, every mode against a plain reference, the affinity and its loss."""
import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moe_zoo.analysis import count
from moe_zoo.analysis.force import force_expert
from moe_zoo.errors import InputError
from moe_zoo.layers.situational_fusion import (
    MODES,
    Encoder,
    ImageGate,
    SituationalFusion,
    disturb_representations,
    linear_cka,
    measure_affinity,
    renormalise,
)
from moe_zoo.losses import affinity_loss, auxiliary_losses, gate_entropy_loss
from moe_zoo.routing import Routing, checkpoint_routed, routing_context, trace_routing

FUSED = [mode for mode in MODES if mode != 'single']


def inputs(dims=(3, 5, 4), batch=6, goal_dim=0):
    goal = torch.randn(batch, goal_dim) if goal_dim else None
    return torch.randn(batch, 3, 16, 16), [torch.randn(batch, d) for d in dims], goal


def fusion(*args, **kwargs):
    """With a gate that has opinions: as made, its weights are even."""
    layer = SituationalFusion(*args, **kwargs)
    if layer.gate is not None:
        nn.init.normal_(layer.router.weight)
    return layer


def constant(mode, weights, outputs, **kwargs):
    """Two representations of one value each; the gate gives `weights`, head k gives `outputs[k]`, whatever comes in."""
    layer = SituationalFusion([1, 1], 2, mode, **kwargs)
    with torch.no_grad():
        layer.router.bias.copy_(torch.tensor(weights).log())
        for head, output in zip(layer.heads, outputs):
            head.weight.zero_()
            head.bias.copy_(torch.tensor(output))
    return layer


def routing(gates, affinity=None):
    gates = torch.tensor(gates)
    return Routing(gates.log(), gates, gates, affinity=None if affinity is None else torch.tensor(affinity))


# The mixture

def test_a_mixture_of_distributions_by_hand():
    # p = (0.8, 0.2) and (0.4, 0.6) with weights 3/4 and 1/4: (0.7, 0.3); the output is its logarithm
    logits = [[math.log(4.), 0.], [math.log(2 / 3), 0.]]
    y = constant('action', [0.75, 0.25], logits)(torch.randn(1, 3, 8, 8), [torch.zeros(1, 1)] * 2)
    torch.testing.assert_close(y.exp(), torch.tensor([[0.7, 0.3]]))
    assert F.cross_entropy(y, torch.tensor([0])).item() == pytest.approx(-math.log(0.7))


def test_logits_are_summed_on_request_and_may_decide_otherwise():
    # p = (0.01, 0.99) and (0.6, 0.4), weights 1/3 and 2/3: probabilities (0.403, 0.597);
    # logits -ln 99 / 3 + 2/3 ln 1.5 = -1.261
    logits = [[-math.log(99.), 0.], [math.log(1.5), 0.]]
    x, phi = torch.randn(1, 3, 8, 8), [torch.zeros(1, 1)] * 2
    mixture = constant('action', [1 / 3, 2 / 3], logits)(x, phi)
    torch.testing.assert_close(mixture.exp(), torch.tensor([[0.01 / 3 + 0.4, 0.99 / 3 + 0.8 / 3]]))
    summed = constant('action', [1 / 3, 2 / 3], logits, mix='logits')(x, phi)
    torch.testing.assert_close(summed, torch.tensor([[-math.log(99.) / 3 + math.log(1.5) * 2 / 3, 0.]]))


def test_even_gates_are_the_modes_without_a_gate():
    # a new gate is even: (0.8 + 0.4) / 2 = 0.6
    x, phi = torch.randn(1, 3, 8, 8), [torch.full((1, 1), 2.), torch.full((1, 1), 5.)]
    logits = [[math.log(4.), 0.], [math.log(2 / 3), 0.]]
    mean = SituationalFusion([1, 1], 2, 'mean')
    action = constant('action', [0.5, 0.5], logits)
    mean.heads.load_state_dict(action.heads.state_dict())
    torch.testing.assert_close(mean(x, phi).exp(), torch.tensor([[0.6, 0.4]]))
    torch.testing.assert_close(action(x, phi), mean(x, phi))
    for mode in FUSED:  # K w_k = 1: the representations as they are
        assert SituationalFusion([1, 1], 0, mode)(x, phi).tolist() == [[2., 5.]]


def test_features_are_scaled_by_weights_before_the_one_head():
    # weights 3/4 and 1/4 times K = 2: 2 * 1.5 = 3 and 5 * 0.5 = 2.5; head (1, 10): 3 + 25 = 28
    layer = SituationalFusion([1, 1], 1, 'feature')
    with torch.no_grad():
        layer.router.bias.copy_(torch.tensor([0.75, 0.25]).log())
        layer.heads[0].weight.copy_(torch.tensor([[1., 10.]]))
        layer.heads[0].bias.zero_()
    x, phi = torch.randn(1, 3, 8, 8), [torch.full((1, 1), 2.), torch.full((1, 1), 5.)]
    torch.testing.assert_close(layer(x, phi), torch.tensor([[28.]]))
    torch.testing.assert_close(layer(x, phi, pre_logits=True), torch.tensor([[3., 2.5]]))


def plain(layer, x, phi, goal, mode, mix):
    """The same in the plainest torch, with the layer's own parameters."""
    K = len(phi)
    w = torch.full((len(x), K), 1 / K)
    if mode in ('action', 'feature'):
        situation = layer.gate.convs(x).mean(dim=(2, 3))
        situation = torch.cat([situation, goal], dim=1)
        w = torch.softmax(situation @ layer.router.weight.T + layer.router.bias, dim=1)

    def head(k, z):
        hidden = torch.relu(layer.heads[k][0](torch.cat([z, goal], dim=1)))
        return layer.heads[k][2](hidden)

    if mode == 'feature':
        return head(0, torch.cat([K * w[:, k, None] * phi[k] for k in range(K)], dim=1))
    if mode == 'concat':
        return head(0, torch.cat(phi, dim=1))
    outputs = [head(k, phi[k]) for k in range(K)]
    if mix == 'logits':
        return sum(w[:, k, None] * outputs[k] for k in range(K))
    return sum(w[:, k, None] * outputs[k].softmax(dim=1) for k in range(K)).log()


@pytest.mark.parametrize('mix', ['probabilities', 'logits'])
@pytest.mark.parametrize('mode', MODES)
def test_values_and_gradients_are_those_of_the_plain_reference(mode, mix):
    dims = (4,) if mode == 'single' else (3, 5, 4)
    x, phi, goal = inputs(dims, goal_dim=2)
    layer = fusion(dims, 4, mode, mix, goal_dim=2, goal_to_gate=True, head_dim=7)
    found = []
    for compute in (layer, lambda *args: plain(layer, *args, mode, mix)):
        sources = [each.clone().requires_grad_() for each in (x, *phi, goal)]
        y = compute(sources[0], sources[1:-1], sources[-1])
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
        found.append([y, *torch.autograd.grad(loss, [*sources, *layer.parameters()], allow_unused=True)])
    for ours, reference in zip(*found):
        assert (ours is None) == (reference is None)
        if ours is not None:
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_the_gate_sees_the_image_and_nothing_else():
    layer = fusion([3, 5, 4], 4, mix='logits').eval()
    x, phi, _ = inputs()
    phi = [each.requires_grad_() for each in phi]
    with routing_context() as context:
        layer(x, phi)
        layer(x, [-each for each in phi])
        layer(x.flip(0), phi)
    first, other_phi, other_x = (record.weights for record in context.routings)
    assert torch.equal(first, other_phi)
    torch.testing.assert_close(first.flip(0), other_x)
    assert torch.autograd.grad(first.sum(), phi, allow_unused=True) == (None, None, None)
    assert (first[0] - first[1]).abs().max() > 0.01
    torch.testing.assert_close(first.sum(dim=1), torch.ones(6))


def test_heads_are_independent_of_the_other_representations():
    layer = SituationalFusion([3, 5, 4], 4)
    x, phi, _ = inputs()
    with force_expert(layer, 1):
        y = layer(x, phi)
        torch.testing.assert_close(y, layer.heads[1](phi[1]).log_softmax(dim=1))
        y[:, 0].sum().backward()
    assert layer.heads[1].weight.grad.abs().max() > 0
    assert all(layer.heads[k].weight.grad.abs().max() < 1e-30 for k in (0, 2))


def test_heads_are_trained_one_by_one_on_what_they_propose():
    layer = fusion([3, 5, 4], 4)
    x, phi, _ = inputs()
    proposed = layer.propose(phi)
    assert proposed.shape == (6, 3, 4)
    for k in range(3):
        torch.testing.assert_close(proposed[:, k], layer.heads[k](phi[k]))
    loss = F.cross_entropy(proposed.flatten(0, 1), torch.arange(6).remainder(4).repeat_interleave(3))
    gradients = torch.autograd.grad(loss, [layer.heads[k].weight for k in range(3)])
    alone = F.cross_entropy(layer.heads[1](phi[1]), torch.arange(6) % 4) / 3  # no head hears of another
    torch.testing.assert_close(gradients[1], torch.autograd.grad(alone, layer.heads[1].weight)[0])
    with routing_context() as context:
        layer.propose(phi)
    assert not context.routings


def test_goals_enter_the_heads_and_the_gate_where_asked():
    x, phi, goal = inputs(goal_dim=2)
    for to_gate in (False, True):
        layer = fusion([3, 5, 4], 4, goal_dim=2, goal_to_gate=to_gate)
        with routing_context() as context:
            assert (layer(x, phi, goal) - layer(x, phi, -goal)).abs().max() > 0.01
        one, other = (record.weights for record in context.routings)
        assert torch.equal(one, other) != to_gate


# The record

def test_the_record_is_float32_and_holds_what_others_read():
    layer = fusion([3, 5, 4], 4, losses=[('affinity', 0.5), ('importance', 0.)], affinity=torch.ones(3, 3)).bfloat16()
    x, phi, _ = inputs()
    with trace_routing(nn.ModuleDict({'fusion': layer})) as trace:
        y = layer(x.bfloat16(), [each.bfloat16() for each in phi])
    assert y.dtype == torch.bfloat16
    record, = trace['fusion']
    assert all(f.dtype == torch.float32 for f in record if isinstance(f, torch.Tensor))
    assert record.losses == (('affinity', 0.5),) and record.shape == (6,)
    assert record.affinity.tolist() == [[0., 1., 1.], [1., 0., 1.], [1., 1., 0.]]
    torch.testing.assert_close(record.weights, torch.softmax(record.logits, dim=1))


@pytest.mark.parametrize('mode', FUSED)
def test_every_mode_takes_a_forced_expert(mode):
    layer = fusion([3, 5, 4], 4, mode)
    x, phi, _ = inputs()
    with force_expert(layer, 2), trace_routing(layer) as trace:
        y = layer(x, phi)
    assert trace[''][0].weights.tolist() == [[0., 0., 1.]] * 6
    if mode in ('action', 'mean'):
        torch.testing.assert_close(y, layer.heads[2](phi[2]).log_softmax(dim=1))
    else:
        alone = [torch.zeros(6, 3), torch.zeros(6, 5), 3 * phi[2]]
        torch.testing.assert_close(y, layer.heads[0](torch.cat(alone, dim=1)))


@pytest.mark.parametrize('reentrant', [False, True])
def test_the_affinity_loss_survives_checkpointing(reentrant):
    layer = fusion([3, 5, 4], 4, losses=[('affinity', 0.5)], affinity=torch.ones(3, 3))
    x, phi, _ = inputs()
    grads = []
    for run in (lambda x, *phi: layer(x, list(phi)),
                lambda x, *phi: checkpoint_routed(lambda x, *phi: layer(x, list(phi)), x, *phi,
                                                  use_reentrant=reentrant)):
        layer.zero_grad()
        with routing_context() as context:
            y = run(x.requires_grad_(), *phi)
        (auxiliary_losses(context.routings)['affinity'] + 0 * y.sum()).backward()
        grads.append(layer.router.weight.grad.clone())
    assert grads[0].abs().max() > 1e-4
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('mode', MODES)
def test_costs_are_what_a_count_finds(mode):
    dims = (4,) if mode == 'single' else (3, 5, 4)
    layer = SituationalFusion(dims, 4, mode, goal_dim=2, goal_to_gate=True, head_dim=7).eval()
    x, phi, goal = inputs(dims, goal_dim=2)
    cost = count(layer, (x[:, :, :15, :9], phi, goal))
    assert cost.macs_executed == cost.macs_max == layer.max_macs((6, 3, 15, 9)) and not cost.uncounted
    assert cost.active_parameters == cost.parameters
    # heads alone: a hidden layer of 7 units on each representation and the goal, or on all of them; 4 outputs
    heads = [sum(dims)] if mode in ('feature', 'concat') else dims
    gate = 0
    if mode in ('action', 'feature'):
        # 8 x 5, 4 x 3 and 2 x 2 positions of 3 x 3 kernels, then 64 features and the goal to 3 weights
        gate = 9 * (40 * 3 * 16 + 12 * 16 * 32 + 4 * 32 * 64) + 66 * 3
    assert cost.macs_max == 6 * (gate + sum((d + 2) * 7 + 7 * 4 for d in heads))


@pytest.mark.parametrize('mode', MODES)
def test_scripted_it_is_the_same(mode):
    dims = (4,) if mode == 'single' else (3, 5, 4)
    x, phi, goal = inputs(dims, goal_dim=2)
    layer = fusion(dims, 4, mode, goal_dim=2, goal_to_gate=True).eval()
    torch.testing.assert_close(torch.jit.script(layer)(x, phi, goal), layer(x, phi, goal))


# Dropped representations

def test_dropped_representations_leave_their_weight_to_the_others():
    layer = fusion([3, 5, 4], 4, representation_drop=0.5)
    x, phi, _ = inputs(batch=400)
    with routing_context() as context:
        layer(x, phi)
    record, = context.routings
    stays = record.weights > 0
    assert stays.any(dim=1).all()
    torch.testing.assert_close(record.weights.sum(dim=1), torch.ones(400))
    torch.testing.assert_close(record.weights, record.gates * stays / (record.gates * stays).sum(dim=1, keepdim=True))
    # each stays with 1/2, and one of the three in the 1/8 where all would go: 1/2 + 1/24 = 0.54, standard error 0.025
    assert (stays.float().mean(dim=0) - 13 / 24).abs().max() < 0.1
    with routing_context() as context:
        layer.eval()(x, phi)
    assert torch.equal(context.routings[0].weights, context.routings[0].gates)


def test_one_representation_always_stays():
    layer = SituationalFusion([3, 5, 4], 4, representation_drop=0.99)
    with routing_context() as context:
        y = layer(*inputs(batch=50)[:2])
    weights = context.routings[0].weights
    assert torch.isfinite(y).all() and ((weights > 0).sum(dim=1) >= 1).all() and weights.max() == 1
    # even where the gate had given it nothing
    alone = renormalise(torch.tensor([[1., 0., 0.]]), torch.tensor([[False, True, True]]))
    torch.testing.assert_close(alone, torch.tensor([[0., 0.5, 0.5]]))


def test_gradients_stay_finite_where_weights_are_zero():
    layer = fusion([3, 5, 4], 4, representation_drop=0.9)
    x, phi, _ = inputs(batch=30)
    F.cross_entropy(layer(x, phi), torch.arange(30) % 4).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_disturbed_representations():
    layer = fusion([3, 5, 4], 4).eval()
    x, phi, _ = inputs()
    zeroed = [torch.zeros_like(phi[0]), phi[1], torch.zeros_like(phi[2])]
    expected, alone = layer(x, zeroed), layer.heads[1](phi[1]).log_softmax(dim=1)
    with disturb_representations(layer, [0, 2]):
        torch.testing.assert_close(layer(x, phi), expected)
        torch.testing.assert_close(layer(x, representations=phi), expected)
    with disturb_representations(layer, [0, 2], renormalised=True):
        torch.testing.assert_close(layer(x, phi), alone)
    assert not layer._forward_pre_hooks and not layer.router._forward_hooks


def test_noise_is_measured_by_the_values_of_each_image():
    layer = SituationalFusion([2000, 3], 0).eval()  # without outputs: returns what it sees
    x, phi, _ = inputs((2000, 3), batch=2)
    phi[0][1] *= 10
    with disturb_representations(layer, [0], noise=0.5, generator=torch.Generator().manual_seed(0)):
        noise = layer(x, phi) - torch.cat(phi, dim=1)
    # root mean square 1 and 10 (2000 values: within some per cent), half of it
    torch.testing.assert_close(noise[:, :2000].std(dim=1), torch.tensor([0.5, 5.0]), rtol=0.1, atol=0.)
    assert noise[:, 2000:].abs().max() < 1e-5


def test_a_frozen_encoder_does_not_move():
    def net():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten())
    frozen, free = Encoder(net(), freeze=True).train(), Encoder(net()).train()
    both = nn.ModuleList([frozen, free]).train()
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(both[0](x), both[0](x))  # no dropout
    both[1](x)
    assert not any(m.training for m in frozen.modules()) and all(m.training for m in free.modules())
    assert frozen.net[1].num_batches_tracked == 0 and free.net[1].num_batches_tracked == 1
    assert frozen.net[1].running_mean.abs().max() == 0 < free.net[1].running_mean.abs().max()
    assert not any(p.requires_grad for p in frozen.parameters()) and all(p.requires_grad for p in free.parameters())
    assert not frozen(x).requires_grad and free(x).requires_grad


# The affinity

def test_the_affinity_loss_by_hand():
    even = [[1 / 25] * 25]
    ones = torch.ones(25, 25).tolist()  # the diagonal does not count
    assert affinity_loss(routing(even, ones)).item() == pytest.approx(1 - 1 / 25)  # 0.96
    one_hot = [[0.] * 24 + [1.]]
    assert affinity_loss(routing(one_hot, ones)).item() == 0
    # 2 * 0.5 * 0.5 * 0.3 = 0.15 on the first image, 0 on the second: 0.075 on average
    pairs = [[1., .3, 0.], [.3, 1., 0.], [0., 0., 1.]]
    assert affinity_loss(routing([[.5, .5, 0.], [0., .5, .5]], pairs)).item() == pytest.approx(0.075)


def test_a_constant_affinity_favours_one_expert_and_differences_say_who_may_share():
    def descend(affinity, entropy):
        logits = torch.tensor([[0.3, 0., 0.2, 0.]])
        for _ in range(300):
            logits.requires_grad_()
            gates = torch.softmax(logits, dim=1)
            record = Routing(logits, gates, gates, affinity=affinity)
            loss = affinity_loss(record) + entropy * gate_entropy_loss(record)
            logits = (logits - 2 * torch.autograd.grad(loss, logits)[0]).detach()
        return torch.softmax(logits, dim=1)[0]

    ones, pairs = torch.ones(4, 4), torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    assert descend(ones, 0.)[0] > 0.9 and descend(pairs, 0.)[0] > 0.9  # by itself: one expert
    # With 1/4 of the entropy loss: one expert costs ln 4 / 4 = 0.35. With ones, even weights cost 3/4, two halves
    # 1/2 + ln 2 / 4 = 0.67. Where 0 and 1 tell the same, and 2 and 3, halves on 0 and 2 cost 0 + ln 2 / 4 = 0.17.
    assert descend(ones, 0.25)[0] > 0.8
    spread = descend(pairs, 0.25)
    assert spread[[0, 2]].min() > 0.4 and spread[[1, 3]].max() < 0.1


def test_the_entropy_loss_by_hand():
    assert gate_entropy_loss(routing([[.25] * 4])).item() == pytest.approx(0., abs=1e-6)
    # one of four: ln 4; halves on two of four: ln 4 - ln 2; averaged 1.5 ln 2
    found = gate_entropy_loss(routing([[1., 0., 0., 0.], [0., .5, .5, 0.]]))
    assert found.item() == pytest.approx(1.5 * math.log(2))


def test_losses_reach_the_gate_by_name():
    layer = fusion([3, 5, 4], 4, losses=[('affinity', 0.5), ('gate_entropy', 0.25)], affinity=torch.ones(3, 3))
    with routing_context() as context:
        layer(*inputs()[:2])
    record, = context.routings
    losses = auxiliary_losses(context.routings)
    torch.testing.assert_close(losses['affinity'], 0.5 * (1 - record.gates.square().sum(dim=1)).mean())
    torch.testing.assert_close(losses['gate_entropy'], 0.25 * gate_entropy_loss(record))
    sum(losses.values()).backward()
    assert all(p.grad.abs().max() > 0 for p in (layer.router.weight, layer.gate.convs[0].weight))
    assert all(p.grad is None for p in layer.heads.parameters())
    with pytest.raises(InputError, match=r"The loss 'affinity' needs a record with an affinity of experts"):
        affinity_loss(record._replace(affinity=None))


def test_alignment_of_equal_and_of_orthogonal_representations():
    x = torch.randn(64, 10)
    rotation = torch.linalg.qr(torch.randn(10, 10))[0]
    assert linear_cka(x, x).item() == pytest.approx(1., abs=1e-6)
    assert linear_cka(x, 3 * x @ rotation + 7).item() == pytest.approx(1., abs=1e-5)
    # columns of a Hadamard matrix: without mean, and orthogonal
    first, second = torch.tensor([1., -1., 1., -1.] * 2), torch.tensor([1., 1., -1., -1.] * 2)
    assert linear_cka(first[:, None], second[:, None]).item() == 0
    assert linear_cka(first[:, None], first[:, None]).item() == pytest.approx(1.)
    # half of the values shared: of a = (u, v) and b = (u, w) the alignment is |u u'|^2 / |a a'|^2 = 1/2
    u, v, w = torch.randn(3, 4000, 1)
    assert linear_cka(torch.cat([u, v], 1), torch.cat([u, w], 1)).item() == pytest.approx(0.5, abs=0.03)


def test_unrelated_wide_representations_have_no_alignment():
    x, y = torch.randn(2, 64, 1000)
    a, b = ((z - z.mean(dim=0)) @ (z - z.mean(dim=0)).T for z in (x, y))
    assert (a * b).sum() / (a.norm() * b.norm()) > 0.9  # the plain estimate is misled by 64 images
    assert linear_cka(x, y).item() < 0.1


class Net(nn.Module):
    def __init__(self, scale=1.):
        super().__init__()
        nets = [nn.Flatten(), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48)), nn.Flatten()]
        self.encoders = nn.ModuleList(Encoder(net) for net in nets)
        self.fusion = fusion([48] * 3, 4)

    def forward(self, x):
        phi = [encoder(x) for encoder in self.encoders]
        return self.fusion(x, [phi[0], phi[1], phi[2].square()])


def test_affinity_is_measured_on_a_calibration_batch():
    model = Net().train()
    model.encoders[0].eval()
    x = torch.randn(200, 3, 4, 4)
    affinity = measure_affinity(model, x)
    assert affinity.diagonal().tolist() == [0.] * 3 and torch.equal(affinity, affinity.T)
    assert affinity[0, 1] > 0.99 and affinity[0, 2] < 0.1  # normalised, the same; squares, uncorrelated
    assert model.training and model.encoders[1].training and not model.encoders[0].training
    assert model.encoders[1].net[1].num_batches_tracked == 0 and not model.fusion._forward_pre_hooks
    model.fusion.set_affinity(affinity)
    assert torch.equal(model.state_dict()['fusion.affinity'], affinity)
    again = copy.deepcopy(model)
    assert torch.equal(again.fusion.affinity, affinity)


# What users may get wrong

@pytest.mark.parametrize('kwargs, message', [
    (dict(mode='acton'), r"mode='acton' is not one of action, feature, concat, mean, single\. Did you mean 'action'"),
    (dict(mix='logit'), r"mix='logit' is not one of probabilities, logits\. Did you mean 'logits'"),
    (dict(dims=[]), 'a routed layer needs at least one expert'),
    (dict(mode='single'), r"mode='single' with 2 representations: hand over the one that is to be used"),
    (dict(num_outputs=1), r"One output with mix='probabilities' is a distribution over one class: use mix='logits'"),
    (dict(representation_drop=1.), r'representation_drop=1\.0: choose a probability of at least 0 and below 1'),
    (dict(affinity=[[0, .2], [.9, 0]]),
     r'affinity is not symmetric, \[0\]\[1\] is 0\.2 and \[1\]\[0\] is 0\.9: give a symmetric 2 x 2 matrix of values '
     r'from 0 to 1\.'),
    (dict(affinity=[[0, 2.], [2., 0]]), r'affinity holds 2: give a symmetric 2 x 2 matrix'),
    (dict(affinity=[[0, math.nan], [math.nan, 0]]), r'affinity holds nan: give a symmetric'),
    (dict(affinity=torch.ones(3, 3)), r'affinity of shape \(3, 3\) for 2 representations: give a symmetric 2 x 2'),
    (dict(affinity='cka'), r"affinity='cka' is no matrix: give a symmetric 2 x 2"),
])
def test_a_wrong_argument_is_one_sentence(kwargs, message):
    with pytest.raises(InputError, match=message):
        SituationalFusion(**{'dims': [3, 4], 'num_outputs': 2, **kwargs})


def test_wrong_inputs_are_one_sentence():
    layer = SituationalFusion([3, 5, 4], 4, goal_dim=2)
    x, phi, goal = inputs(goal_dim=2)
    with pytest.raises(InputError, match=r'representations of \(3, 5\) values: the fusion was made for \(3, 5, 4\)'):
        layer(x, phi[:2], goal)
    with pytest.raises(InputError, match=r'goal of 0 values: the fusion was made for goal_dim=2'):
        layer(x, phi)
    with pytest.raises(InputError, match=r'goal of 0 values: the fusion was made for goal_dim=2'):
        SituationalFusion([3, 5, 4], 4, goal_dim=2, goal_to_gate=True)(x, phi)
    with pytest.raises(InputError, match='One output with mix=.probabilities.'):
        layer.reset_heads(1)
    with pytest.raises(InputError, match=r'An affinity measured on 3 images: use 4 at least'):
        measure_affinity(Net(), torch.randn(3, 3, 4, 4))
    assert measure_affinity(Net(), torch.randn(4, 3, 4, 4)).isfinite().all()
    with pytest.raises(InputError, match=r'model: Linear has no SituationalFusion'):
        measure_affinity(nn.Linear(3, 3), x)
    for chosen, renormalised in (([3], False), ([0, 1, 2], True)):
        with pytest.raises(InputError, match=r'the fusion has 3 representations, counted from 0'):
            with disturb_representations(layer, chosen, renormalised=renormalised):
                pass
    assert ImageGate(3, ()).num_features == 3  # the mean colour
