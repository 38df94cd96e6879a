"""What a router, a layer or a loss does when nothing is asked for: the values that recipes and cards rely on.

Written out rather than read from the code: a default that moves changes every recipe that leaves it alone, so it has to
be moved here too. A new keyword needs no line.
"""
import inspect

import pytest
import torch
from torch import nn

from moe_zoo import layers, losses, routing
from moe_zoo.routing import Routing
from moe_zoo.routing.constraints import STEP_CONSTRAINTS

CONV = {'stride': 1, 'padding': '', 'dilation': 1, 'groups': 1, 'bias': False, 'num_experts': 4}
VMOE_LOSSES = (('importance', 0.005), ('vmoe_load', 0.005))  # Riquelme et al. 2021, appendix A: 0.005 each
SHAZEER_LOSSES = (('importance', 0.1), ('load', 0.1))  # Shazeer et al. 2017, section 5.1: 0.1 each
DEFAULTS = {
    'routing.AnnealedSoftmaxRouter': {'temperature': 30.0, 'anneal_epochs': 10, 'bias': True, 'losses': ()},
    'routing.CosineTopKRouter': {
        'num_selected': 2, 'noise_std': 1.0, 'renormalise': False, 'losses': VMOE_LOSSES, 'projection_features': 256,
        'temperature': 0.5},
    'routing.ExpertChoiceRouter': {'noise_std': 1.0, 'losses': ()},
    'routing.HierarchicalRouter': {
        'num_selected': 4, 'num_groups': 4, 'groups_selected': 2, 'noise': True, 'noise_epsilon': 0.01,
        'zero_init': None, 'losses': SHAZEER_LOSSES},
    'routing.NoisyTopKRouter': {
        'num_selected': 2, 'noise': True, 'noise_epsilon': 0.01, 'zero_init': None, 'losses': SHAZEER_LOSSES,
        'constraint': None, 'constraint_value': None},
    'routing.Routing': {
        'shape': (), 'group_size': None, 'losses': (), 'by_expert': False, 'inside': None, 'levels': 0},
    'routing.SigmoidRouter': {'bias': True, 'hidden_features': None, 'losses': ()},
    'routing.SigmoidTopKRouter': {'num_selected': 2, 'bias_rate': 0.001, 'losses': ()},
    'routing.SoftRouter': {'num_slots': 1, 'losses': ()},
    'routing.SoftmaxRouter': {'temperature': 1.0, 'bias': True, 'hidden_features': None, 'losses': ()},
    'routing.SoftmaxTopKRouter': {
        'num_selected': 2, 'noise_std': 1.0, 'renormalise': False, 'deterministic': None, 'losses': VMOE_LOSSES},
    'routing.compute_capacity': {'multiple_of': 4, 'rounding': 'ceil'},
    'routing.keep_within_capacity': {'batch_priority': False},
    'routing.routing_context': {'image_sizes': None, 'padded_size': None, 'isolated': False},
    'layers.ChannelGate': {'init': 'ones', 'l1': 0.001},
    'layers.CondConv2d': {'kernel_size': 3, **CONV},
    'layers.CondLinear': {'bias': True, 'num_experts': 8, 'route_fn': 'sigmoid', 'expert_drop_rate': 0.0},
    'layers.DynamicConv2d': {'kernel_size': 3, **CONV, 'reduction': 4, 'temperature': 30.0, 'anneal_epochs': 10},
    'layers.LocalExperts': {'num_experts': 4, 'gate_features': None, 'gate_hidden_features': None, 'losses': ()},
    'layers.MoEConv2d': {
        'kernel_size': 3, **CONV, 'num_selected': 2, 'gate': 'gap_fc', 'constraint': 'importance',
        'constraint_value': None, 'noise': None, 'losses': (), 'perturb': 0.1},
    'layers.MoEMlp': {
        'bias': True, 'drop': 0.0, 'use_conv': False, 'num_experts': 8, 'num_selected': 2, 'router': 'vmoe',
        'noise_std': 1.0, 'capacity_factor': 1.05, 'capacity_multiple_of': 4, 'capacity_rounding': 'ceil',
        'batch_priority': False, 'group_images': 8, 'group_size': None, 'num_shared_experts': 0, 'expert_ratio': 1,
        'same_init': True, 'bfloat16_dispatch': False},
    'layers.MoEStage': {
        'num_selected': 2, 'gate': 'gap_fc', 'constraint': 'importance', 'losses': (), 'perturb': 0.1},
    'layers.PatchMoE': {
        'num_filters': 40, 'patch_size': 28, 'num_experts': 8, 'patches_per_expert': 6, 'gate_order': 'after',
        'init_std': 0.01, 'router_init_std': 0.0001},
    'layers.PatchMoEConv2d': {
        'num_experts': 4, 'patches_per_expert': 16, 'patch_size': 1, 'kernel_size': 1, 'gate_order': 'before',
        'norm_first': False, 'router_init_std': 0.0001},
    'layers.RoutedConv2d': {'route_fn': 'sigmoid', 'expert_drop_rate': 0.0},
    'layers.ShallowEmbedding': {
        'in_chans': 3, 'widths': (64, 128, 256, 512, 512), 'stem_width': 64, 'softmax': True, 'loss_weight': 1.0},
    'layers.SituationalFusion': {
        'mode': 'action', 'mix': 'probabilities', 'in_chans': 3, 'goal_dim': 0, 'goal_to_gate': False, 'head_dim': 0,
        'drop_rate': 0.0, 'representation_drop': 0.0, 'losses': ()},
    'layers.SoftMoEMlp': {
        'bias': True, 'drop': 0.0, 'use_conv': False, 'num_experts': 128, 'num_slots': 1, 'group_size': None,
        'same_init': True, 'bfloat16_dispatch': False},
    'layers.masked_mean': {'cut': 0},
    'losses.auxiliary_losses': {'target': None, 'over_ranks': False},
    'losses.importance_loss': {'unbiased': False},
    'losses.jsd_loss': {'weight': 1.0, 'eps': 1e-07},
    'losses.prc_loss': {'diagonal_weight': 0.005, 'off_diagonal_weight': 0.05},
    'losses.squared_cv': {'unbiased': False, 'eps': 1e-10},
}


RECORD = Routing(torch.tensor([[.3, .1], [.2, .9]]), torch.tensor([[.6, .4], [.3, .7]]), torch.tensor([[.6], [.7]]),
                 torch.tensor([[0], [1]]))
NEEDED = {  # arguments without a default; of a router or layer for 4 channels, mostly
    'routing.HierarchicalRouter': (4, 8), 'routing.Routing': (torch.zeros(1, 2),) * 3, 'routing.compute_capacity':
    (8, 2, 1, 1.), 'routing.keep_within_capacity': (RECORD.indices[None], RECORD.weights[None], 2, 1),
    'routing.routing_context': (), 'layers.DynamicConv2d': (8, 4), 'layers.LocalExperts': (4, 2), 'layers.MoEMlp': (4,),
    'layers.MoEStage': ([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)], 4), 'layers.PatchMoE': (1,),
    'layers.ShallowEmbedding': (10,), 'layers.SituationalFusion': ([4, 4], 2), 'layers.SoftMoEMlp': (4,),
    'layers.masked_mean': (torch.zeros(1, 1, 2, 2),), 'losses.auxiliary_losses': ([RECORD],),
    'losses.importance_loss': (RECORD,), 'losses.jsd_loss': (RECORD, torch.tensor([[0], [1]])),
    'losses.prc_loss': (RECORD, torch.tensor([[0], [1]])), 'losses.squared_cv': (torch.ones(2),)}


@pytest.mark.parametrize('name', DEFAULTS)
def test_defaults(name):
    place, _, function = name.partition('.')
    function = getattr({'routing': routing, 'layers': layers, 'losses': losses}[place], function)
    found = {key: inspect.signature(function).parameters[key].default for key in DEFAULTS[name]}
    assert found == DEFAULTS[name]
    assert [type(value) for value in found.values()] == [type(value) for value in DEFAULTS[name].values()]  # 1 is True
    function(*NEEDED.get(name, (4, 4)))  # they fit together


def test_constraints():
    assert {name: cls(2).value for name, cls in STEP_CONSTRAINTS.items()} == {'relative': .5, 'mean': .3, 'bias': 1e-3}


IMAGE, TOKEN = torch.ones(1, 2, 4, 4), torch.ones(1, 2, 2)
LEAST = {  # the smallest numbers that each allows: one less is refused, or means another thing
    'layers.CondConv2d': (lambda: layers.RoutedConv2d(2, 1, 1, num_experts=1, expert_drop_rate=0.), IMAGE),
    'layers.CondLinear': (lambda: layers.CondLinear(2, 1, num_experts=1), TOKEN[0]),
    'layers.DynamicConv2d': (
        lambda: layers.DynamicConv2d(2, 1, 1, num_experts=1, reduction=1, temperature=1., anneal_epochs=1), IMAGE),
    'layers.LocalExperts': (lambda: layers.LocalExperts(2, 1, num_experts=1, gate_hidden_features=1), TOKEN[0]),
    'layers.MoEConv2d': (lambda: layers.MoEConv2d(2, 1, 1, num_experts=1, num_selected=1, perturb=0.), IMAGE),
    'layers.MoEMlp': (lambda: layers.MoEMlp(2, 1, num_experts=1, num_selected=1, capacity=1, noise_std=0.,
                                            capacity_multiple_of=1, group_images=1, expert_ratio=1), TOKEN),
    'layers.MoEMlp by expert': (lambda: layers.MoEMlp(
        2, 1, num_experts=1, num_selected=1, router='expert_choice', losses={}, group_size=1,
        capacity_factor=1.), TOKEN),
    'layers.MoEStage': (lambda: layers.MoEStage([nn.Conv2d(2, 2, 1)], 2, num_selected=1, perturb=0.), IMAGE),
    'layers.PatchMoE': (lambda: layers.PatchMoE(
        2, num_filters=1, patch_size=1, num_experts=1, patches_per_expert=1), IMAGE),
    'layers.PatchMoE, all patches': (lambda: layers.PatchMoE(
        2, num_filters=1, patch_size=2, num_experts=1, patches_per_expert=4), IMAGE),
    'layers.PatchMoEConv2d': (lambda: layers.PatchMoEConv2d(2, 1, num_experts=1, patches_per_expert=1), IMAGE),
    'layers.ShallowEmbedding': (lambda: layers.ShallowEmbedding(1, 2, widths=(1,), stem_width=0, dim=1), IMAGE),
    'layers.SoftMoEMlp': (lambda: layers.SoftMoEMlp(2, 1, num_experts=1, num_slots=1, group_size=2), TOKEN),
    'routing.HierarchicalRouter': (lambda: routing.HierarchicalRouter(
        2, 1, num_selected=1, num_groups=1, groups_selected=1), TOKEN[0]),
    'routing.HierarchicalRouter, all': (lambda: routing.HierarchicalRouter(
        2, 4, num_selected=4, num_groups=2, groups_selected=2), TOKEN[0]),
    **{f'routing.{name}': (lambda name=name: getattr(routing, name)(2, 1, num_selected=1), TOKEN[0])
       for name in ('NoisyTopKRouter', 'SoftmaxTopKRouter', 'CosineTopKRouter', 'SigmoidTopKRouter')},
    'routing.AnnealedSoftmaxRouter': (lambda: routing.AnnealedSoftmaxRouter(
        2, 1, temperature=1., anneal_epochs=1, hidden_features=1), TOKEN[0]),
}


@pytest.mark.parametrize('name', LEAST)
@pytest.mark.parametrize('training', [False, True])
def test_the_least_is_allowed(name, training):
    """One expert, one patch, one slot, one channel: it is made, it runs, and no number is infinite."""
    make, x = LEAST[name]
    with routing.routing_context() as context:
        out = make().train(training)(x)
    out = [out] if isinstance(out, torch.Tensor) else [out.weights, out.gates]
    assert all(each.isfinite().all() for each in out)
    assert all(record.num_experts == record.combine_matrix().shape[1] for record in context.routings)
    for record in context.routings:
        assert all(loss.isfinite() for loss in losses.balance(record).values() if loss.dim() == 0)
