"""Layers, routers and losses compute what they computed: a checkpoint that was trained must go on meaning the same.

Weights and inputs are written by a formula, so that nothing depends on a random generator; kept_numbers.py says how the
numbers are made anew.

Letters: B images, C channels, T items, E experts.
"""
import pytest
import torch
from kept_numbers import kept_names, marks, moved, wave
from torch import nn

from moe_zoo import layers, losses, routing
from moe_zoo.layers.cond_conv import ROUTE_FNS
from moe_zoo.layers.image_moe import GATES
from moe_zoo.layers.moe_mlp import ROUTERS
from moe_zoo.layers.patch_moe import GATE_ORDERS
from moe_zoo.layers.situational_fusion import MODES, disturb_representations
from moe_zoo.routing import Routing, routing_context

FILE = 'numbers.json'
MAP, TOKENS, ITEMS = (3, 4, 8, 8), (4, 6, 4), (6, 4)
PADDED = dict(image_sizes=torch.tensor([[16, 16], [9, 16], [12, 5]]), padded_size=(16, 16))
ALL = tuple((name, .5) for name in losses.LOSSES if name not in ('affinity', 'vmoe_load', 'load'))


def _stage() -> nn.Module:
    experts = [nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU()) for _ in range(4)]
    return layers.MoEStage(experts, 4, shortcut=nn.Conv2d(4, 6, 1, 2), losses=ALL)


def _fusion(mode: str, **kwargs) -> nn.Module:
    dims = [8] if mode == 'single' else [8, 6, 5]
    return layers.SituationalFusion(dims, 4, mode, in_chans=4, goal_dim=2, **kwargs)


LAYERS = {
    **{f'condconv {name}': (
        lambda name=name: layers.RoutedConv2d(4, 6, 3, 2, 1, groups=2, bias=True, route_fn=name), MAP)
       for name in ROUTE_FNS},
    'condconv depthwise': (lambda: layers.RoutedConv2d(4, 8, 5, padding='same', groups=4, num_experts=3), MAP),
    'condconv single image': (lambda: layers.RoutedConv2d(4, 6, 3, dilation=2), (1, 4, 9, 7)),
    'condlinear': (lambda: layers.CondLinear(4, 5), ITEMS),
    'dynamic conv': (lambda: layers.DynamicConv2d(4, 6, 3, 1, 1, bias=True), MAP),
    **{f'moe conv {gate}': (lambda gate=gate: layers.MoEConv2d(4, 6, 3, 2, 1, bias=True, gate=gate, losses=ALL), MAP)
       for gate in GATES if gate != 'random_fc'},
    'moe conv of one': (lambda: layers.MoEConv2d(4, 6, num_selected=1, constraint='mean', noise=True), MAP),
    'moe stage': (_stage, MAP),
    **{f'patches {order}': (lambda order=order: layers.PatchMoE(4, 6, (2, 4), 3, 2, order), MAP)
       for order in GATE_ORDERS},
    'patch conv': (lambda: layers.PatchMoEConv2d(4, 3, 2, 5), MAP),
    'patch conv first': (lambda: layers.PatchMoEConv2d(4, 3, 2, 3, 2, 3, norm_first=True), MAP),
    'local experts': (lambda: layers.LocalExperts(4, 3, 3, act_layer=nn.Tanh, gate_hidden_features=5), ITEMS),
    'embedding': (lambda: layers.ShallowEmbedding(5, 4, (6, 8), 6, dim=3), (3, 4, 32, 32)),
    'channel gate': (lambda: layers.ChannelGate(6, 4), ITEMS),
    **{f'mlp {name}': (lambda name=name: layers.MoEMlp(4, 6, 5, num_experts=4, router=name, noise_std=.5), TOKENS)
       for name in ROUTERS},
    'mlp tight': (lambda: layers.MoEMlp(4, 6, num_experts=4, capacity_factor=.5, capacity_multiple_of=1,
                                        batch_priority=True, group_images=2, num_shared_experts=1), TOKENS),
    'mlp on a map': (lambda: layers.MoEMlp(4, 6, num_experts=4, use_conv=True), MAP),
    'soft mlp': (lambda: layers.SoftMoEMlp(4, 6, 5, num_experts=3, num_slots=2), TOKENS),
}
FUSIONS = {
    **{mode: lambda mode=mode: _fusion(mode) for mode in MODES},
    'logits': lambda: _fusion('action', mix='logits', head_dim=7, goal_to_gate=True,
                              affinity=[[0, .5, .2], [.5, 0, .1], [.2, .1, 0]],
                              losses=(('affinity', .1), ('gate_entropy', .01)))}
ROUTER_CASES = {
    **{f'{name} {selected}': lambda name=name, selected=selected: getattr(routing, name)(4, 5, num_selected=selected)
       for name in ('NoisyTopKRouter', 'SoftmaxTopKRouter', 'CosineTopKRouter', 'SigmoidTopKRouter')
       for selected in (1, 2, 5)},
    'hierarchical': lambda: routing.HierarchicalRouter(4, 12, 4, 4, 2),
    'annealed': lambda: routing.AnnealedSoftmaxRouter(4, 5, hidden_features=3),
    'softmax': lambda: routing.SoftmaxRouter(4, 5, 2., bias=False),
    'sigmoid': lambda: routing.SigmoidRouter(4, 5, hidden_features=3),
}


def prepared(module: nn.Module) -> nn.Module:
    """The module with weights by formula, and noise that is no noise."""
    with torch.no_grad():
        for number, (name, parameter) in enumerate(module.named_parameters()):
            parameter.copy_(.6 * wave(*parameter.shape, slope=1.3, start=number))
            if 'temperature' in name:
                parameter.abs_().add_(.5)
    for part in module.modules():
        if hasattr(part, 'sample_noise'):
            part.sample_noise = lambda logits: wave(*logits.shape, slope=2.1)
    return module


def described(record: Routing) -> dict:
    fields = {name: field for name, field in record._asdict().items() if field is not None}
    found = {name: marks(field) if isinstance(field, torch.Tensor) else field for name, field in fields.items()}
    for name in ('importance', 'gshard', 'z', 'kl', 'gate_l1', 'gate_entropy'):
        found[f'loss {name}'] = marks(losses.LOSSES[name](record))
    return found | {f'balance {name}': marks(value) for name, value in losses.balance(record).items()}


def run(module: nn.Module, *inputs, training: bool = False, **context) -> dict:
    """Output, records, their losses, gradients and buffers of one forward."""
    module = prepared(module).train(training)
    with routing_context(**context) as found:
        out = module(*inputs)
    records = list(found.routings)
    if isinstance(out, Routing):
        records, out = [out], out.weights
    wanted = losses.auxiliary_losses([r for r in records if not {n for n, _ in r.losses} & {*losses.TARGET_LOSSES}])
    loss = (out.float() * wave(*out.shape, slope=.3)).sum() + sum(wanted.values())
    if loss.requires_grad:
        loss.backward()
    return {
        'out': [list(out.shape), *marks(out)], 'records': [described(record) for record in records],
        'losses': {name: marks(value) for name, value in wanted.items()},
        'gradients': marks(*(p.grad for p in module.parameters() if p.grad is not None)),
        'buffers': marks(*module.buffers()),
        'macs': module.max_macs(inputs[0].shape) if hasattr(module, 'max_macs') else
        module.macs(7) if hasattr(module, 'macs') else None}


def _record(**changes) -> Routing:
    """Ten items of five experts, two chosen, noise and all that a loss can ask for."""
    logits, noisy = wave(10, 5), wave(10, 5) + .3 * wave(10, 5, slope=2.)
    gates = torch.softmax(logits, dim=1)
    weights, indices = gates.topk(2)
    affinity = wave(5, 5).abs()
    return Routing(logits, gates, weights, indices, weights > .2, noisy, wave(10, 5, slope=.2).abs() + .1, (5, 2),
                   affinity=affinity)._replace(**changes)


RECORDS = {
    'one group': lambda: _record(), 'groups of four': lambda: _record(group_size=4),
    'groups of five': lambda: _record(group_size=5), 'a larger group': lambda: _record(group_size=99),
    'padded': lambda: _record(group_size=4, inside=torch.tensor([1, 1, 0, 1, 0, 0, 0, 0, 1, 1]).bool()),
    'mixed': lambda: _record(indices=None, kept=None, weights=torch.softmax(wave(10, 5), dim=1), noise_std=None,
                             noisy_logits=None),
    'by expert': lambda: _record(indices=torch.arange(5).expand(10, 5), weights=wave(10, 5).abs(),
                                 kept=wave(10, 5) > .5, by_expert=True),
    'two levels': lambda: _record(logits=wave(10, 6), gates=torch.softmax(wave(10, 6), dim=1), noise_std=None,
                                  noisy_logits=wave(10, 6), affinity=wave(6, 6).abs(), chances=wave(10, 6).abs(),
                                  group_chances=wave(10, 3, slope=.9).abs()),
}


def _losses(record: Routing) -> dict:
    names = [name for name in losses.LOSSES if name != 'vmoe_load' or record.group_chances is None]
    fields = {'combined': record.combine_matrix(), 'dropped': record.dropped(),
              'without padding': record.without_padding().gates}
    return {**{name: marks(losses.LOSSES[name](record)) for name in names},
            **{name: marks(field) for name, field in (losses.balance(record) | fields).items()}}


def _losses_of_targets() -> dict:
    record, pairs = _record(), torch.tensor([[0, 1, 2, 3, -1, 5], [4, 3, -1, 9, 0, 6]])
    outputs, target = wave(10, 5, 3), torch.arange(10) % 3
    local = {name: getattr(losses, name) for name in ('mixture_loss', 'competitive_loss', 'cooperative_loss')}
    return {
        'embedding': marks(losses.embedding_loss(record, torch.arange(10) % 5)),
        'soft embedding': marks(losses.embedding_loss(record, torch.softmax(wave(10, 5, slope=.4), dim=1))),
        **{name: marks(loss(outputs, record.logits, wave(10, 3, slope=.4))) for name, loss in local.items()},
        'responsibilities': marks(losses.responsibilities(outputs, record.logits, wave(10, 3, slope=.4))),
        'class mixture': marks(losses.class_mixture_loss(outputs, record.logits, target)),
        'jsd': marks(losses.jsd_loss(record, pairs)), 'jsd eps': marks(losses.jsd_loss(record, pairs, 2., .1)),
        'prc': marks(losses.prc_loss(record, pairs)), 'prc terms': marks(*losses.prc_terms(record, pairs)),
        'squared cv': marks(losses.squared_cv(wave(3, 4)), losses.squared_cv(wave(3, 4), True),
                            losses.squared_cv(wave(3, 4), eps=.5))}


def cases() -> dict:
    """Name -> what makes the numbers."""
    found = {}
    for name, (make, shape) in LAYERS.items():
        for training in (False, True):
            found[f'{name}, {"training" if training else "evaluation"}'] = (
                lambda make=make, shape=shape, training=training: run(make(), wave(*shape), training=training))
        if shape == MAP:
            found[f'{name}, padded'] = lambda make=make: run(make(), wave(*MAP), **PADDED)
    found |= {f'losses of {name}': lambda make=make: _losses(make()) for name, make in RECORDS.items()}
    found['losses of targets'] = _losses_of_targets
    for name, make in FUSIONS.items():
        found[f'fusion {name}'] = lambda make=make, name=name: _run_fusion(make())
    for name, make in ROUTER_CASES.items():
        for training in (False, True):
            found[f'router {name}, {"training" if training else "evaluation"}'] = (
                lambda make=make, training=training: run(make(), wave(*ITEMS), training=training))
    return found


def _run_fusion(module: nn.Module) -> dict:
    parts = [wave(3, dim, start=dim) for dim in module.dims]
    inputs = wave(3, 4, 16, 16), parts, wave(3, 2)
    found = run(module, *inputs)
    with torch.no_grad():
        found['before'] = marks(module(*inputs, pre_logits=True))
        with disturb_representations(module, [0], noise=0.):
            found['undisturbed'] = marks(module(*inputs))
        if len(parts) > 1:
            with disturb_representations(module, [0], renormalised=True):
                found['disturbed'] = marks(module(*inputs))
    return found


CASES = cases()


@pytest.mark.parametrize('name', CASES)
def test_the_numbers_are_those_they_were(name):
    assert not moved(FILE, CASES, name)


def test_no_number_is_left_over():
    assert kept_names(FILE) == set(CASES)
