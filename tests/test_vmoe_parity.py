"""Numbers of the original V-MoE (JAX) against ours, given the same weights, inputs and router noise.

Recorded by the unmodified reference on CPU in float32. Tolerances: logits 2e-5 absolute, losses 1e-4 relative,
gradients 1e-5 of their largest element.

Letters: B images, N tokens, D width, G groups, S tokens a group, E experts.
"""
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from moe_zoo.checkpoints import import_vmoe
from moe_zoo.losses import LOSSES, auxiliary_losses
from moe_zoo.models.vmoe import from_config
from moe_zoo.routing import trace_routing

FILES = [
    'vmoe_tiny_a', 'vmoe_tiny_b', 'vmoe_tiny_b_vanilla', 'vmoe_tiny_c_gap_sincos', 'vmoe_tiny_map',
    'vmoe_tiny_expert_choice', 'vmoe_tiny_soft',
]


class Case:
    """One recorded configuration and our model with its weights."""

    def __init__(self, folder, name):
        self.info = json.loads((folder / 'vmoe' / f'{name}.json').read_text())
        with np.load(folder / 'vmoe' / f'{name}.npz') as arrays:
            self.arrays = dict(arrays)
        self.params = {k: v for k, v in self.arrays.items() if k.startswith('params/')}
        self.model = from_config(self.info['model'], img_size=self.info['image_size'])
        self.model.load_state_dict(import_vmoe(self.params))
        self.routed = self.info['model']['encoder']['moe']['layers']
        self.layers = {f'encoderblock_{i}': self.model.blocks[i].mlp for i in self.routed}
        self.inputs = self.tensor('inputs').permute(0, 3, 1, 2)  # NHWC to NCHW
        self.is_soft = name == 'vmoe_tiny_soft'

    def tensor(self, key):
        return torch.from_numpy(self.arrays[key])

    def put_noise(self):
        """Make the routers draw the recorded noise, (G, S, E) standard normal."""
        for name, layer in self.layers.items():
            if self.is_soft:
                continue  # its router has none
            noise = self.tensor(f'train/noise/{name}').flatten(0, 1)
            layer.router.sample_noise = lambda logits, noise=noise: noise

    def drop_noise(self):
        for layer in self.layers.values():
            if not self.is_soft:
                layer.router.noise_std = 0.

    def check_metrics(self, prefix, routings):
        """Every recorded loss or statistic, group by group."""
        total = 0.
        for (name, layer), routing in zip(self.layers.items(), routings):
            size = layer.group_size
            groups = [one_group(routing, g, size) for g in range(routing.logits.shape[0] // size)]
            if self.is_soft:
                ours = soft_statistics(groups)
            elif routing.by_expert:
                ours = expert_choice_statistics(groups)
            else:
                ours = balance_losses(groups)
            recorded = {k.rpartition('/')[2] for k in self.arrays if k.startswith(f'{prefix}/metrics/{name}/')}
            assert recorded == set(ours)
            for key, value in ours.items():
                close(value, self.tensor(f'{prefix}/metrics/{name}/{key}'), rtol=1e-4, atol=1e-7)
            total = total + ours['auxiliary_loss']
        close(total, self.tensor(f'{prefix}/metrics/auxiliary_loss'), rtol=1e-4, atol=1e-7)


def balance_losses(groups):
    """By name, (G,)."""
    ours = {
        'importance_loss': [LOSSES['importance'](g) for g in groups],
        'gshard_loss': [LOSSES['gshard'](g) for g in groups],
        'auxiliary_loss': [sum(auxiliary_losses([g]).values()) for g in groups],
    }
    if groups[0].noisy_logits is not None:
        ours['load_loss'] = [LOSSES['vmoe_load'](g) for g in groups]
    return {key: torch.stack(values) for key, values in ours.items()}


def expert_choice_statistics(groups):
    """Experts a token has, and the gates that were chosen, (G,); there is no loss."""
    assert all(auxiliary_losses([g]) == {} for g in groups)
    counts = torch.stack([g.kept.sum(dim=1) for g in groups])  # (G, S)
    chosen = torch.stack([g.weights[g.kept] for g in groups])  # (G, E * C)
    shares = {
        f'ratio_processed_items_by_at_least_{n}_experts': (counts >= n).float().mean(dim=1) for n in (1, 2, 4)}
    for g, share in zip(groups, shares['ratio_processed_items_by_at_least_1_experts']):
        close(1 - g.dropped(), share)
    return {
        **shares,
        'num_experts_per_item_min': counts.amin(dim=1).float(),
        'num_experts_per_item_max': counts.amax(dim=1).float(),
        'min_selected_gate': chosen.amin(dim=1),
        'max_selected_gate': chosen.amax(dim=1),
        'auxiliary_loss': torch.zeros(()),
    }


def soft_statistics(groups):
    """Means of the smallest and the largest weight: over slots of the tokens', over tokens of the slots'."""
    assert all(auxiliary_losses([g]) == {} for g in groups)
    dispatch, combine = (torch.stack(each) for each in zip(*map(soft_weights, groups)))  # (G, S, E, P)
    dispatch, combine = dispatch.flatten(2), combine.flatten(2)
    return {
        'dispatch_weights_min_mean': dispatch.amin(dim=1).mean(),
        'dispatch_weights_max_mean': dispatch.amax(dim=1).mean(),
        'combine_weights_min_mean': combine.amin(dim=2).mean(),
        'combine_weights_max_mean': combine.amax(dim=2).mean(),
        'auxiliary_loss': torch.zeros(()),
    }


def soft_weights(group):
    """(S, E, P) dispatch and combine weights that the record of one group of Soft MoE tells."""
    dispatch = torch.softmax(group.slot_logits, dim=0)
    return dispatch, group.weights.unsqueeze(-1) * torch.softmax(group.slot_logits, dim=-1)


def one_group(routing, g, size):
    """The record of group g alone."""
    rows = slice(g * size, (g + 1) * size)
    per_token = ('logits', 'gates', 'weights', 'indices', 'kept', 'noisy_logits', 'slot_logits')
    fields = {name: getattr(routing, name) for name in per_token}
    return routing._replace(**{name: None if field is None else field[rows] for name, field in fields.items()})


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual.detach(), expected, **tolerance)


@pytest.fixture(scope='module', params=FILES)
def name(request):
    return request.param


@pytest.fixture
def case(shared_parity, name):
    return Case(shared_parity, name)


def test_evaluation(case):
    """Logits, encoded tokens, every router's logits, combine weights and dispatch mask, every layer's output."""
    model = case.model.eval()
    outputs = {}
    for name, layer in case.layers.items():
        layer.register_forward_hook(lambda m, i, out, name=name: outputs.__setitem__(name, out))
    with torch.no_grad(), trace_routing(model) as trace:
        logits = model(case.inputs)
        encoded = model.forward_features(case.inputs)
    close(logits, case.tensor('eval/logits'), rtol=0, atol=2e-5)
    close(encoded, case.tensor('eval/encoded'), rtol=0, atol=2e-5)
    records = []
    for i, (name, layer) in zip(case.routed, case.layers.items()):
        routing = trace[f'blocks.{i}.mlp'][0]
        records.append(routing)
        close(outputs[name], case.tensor(f'eval/{name}/moe_out'), rtol=0, atol=2e-5)
        group = (-1, layer.group_size, layer.num_experts)
        if case.is_soft:
            groups = [one_group(routing, g, layer.group_size) for g in range(4)]
            dispatch, combine = (torch.stack(each) for each in zip(*map(soft_weights, groups)))
            close(dispatch, case.tensor(f'eval/{name}/dispatch_weights_GSEP'), rtol=0, atol=2e-6)
            close(combine, case.tensor(f'eval/{name}/combine_weights_GSE'), rtol=0, atol=2e-6)
            continue
        mask = routing._replace(weights=torch.ones_like(routing.weights)).combine_matrix().bool()
        assert torch.equal(mask.view(group), case.tensor(f'eval/{name}/dispatch_mask_GSE'))
        close(routing.logits.view(group), case.tensor(f'eval/{name}/router_logits'), rtol=0, atol=2e-5)
        close(routing.combine_matrix().view(group), case.tensor(f'eval/{name}/combine_weights_GSE'), rtol=0, atol=2e-6)
        # The counts in the description: pairs kept, expert by expert, in every group.
        assert mask.view(group).sum(1).tolist() == case.info['routing'][name]['tokens_per_expert_kept']
    case.check_metrics('eval', records)


def test_training_with_recorded_noise(case):
    """Logits, every loss, their sum, and the gradient of every parameter."""
    model = case.model.train()
    model.set_aux_loss(True)
    case.put_noise()
    logits, routings = model(case.inputs)
    main = F.cross_entropy(logits, case.tensor('train/labels').long())
    auxiliary = sum(auxiliary_losses(routings).values(), torch.zeros(()))
    total = main + auxiliary
    close(logits, case.tensor('train/logits'), rtol=0, atol=2e-5)
    close(main, case.tensor('train/main_loss'), rtol=1e-4, atol=0)
    close(auxiliary, case.tensor('train/aux_loss_mean'), rtol=1e-4, atol=0)
    close(total, case.tensor('train/total_loss'), rtol=1e-4, atol=0)
    case.check_metrics('train', routings)

    total.backward()
    # The gradients travel through the same renaming as the parameters.
    gradients = import_vmoe({k: case.arrays['train/grad/' + k.removeprefix('params/')] for k in case.params})
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        expected = gradients[name]
        error = (parameter.grad - expected).abs().max().item()
        assert error <= 1e-5 * max(expected.abs().max().item(), 1e-3), f'{name}: off by {error}'


def test_training_without_noise(case):
    """noise_std = 0: no load loss, clean gates everywhere."""
    model = case.model.train()
    model.set_aux_loss(True)
    case.drop_noise()
    logits, routings = model(case.inputs)
    close(logits, case.tensor('train_noise0/logits'), rtol=0, atol=2e-5)
    case.check_metrics('train_noise0', routings)


def test_without_an_image_size_the_weights_decide(case):
    """`from_config` with the entry alone, as the original, which learns the size from its first input."""
    model = from_config(case.info['model'])
    model.load_state_dict(import_vmoe(case.params))
    with torch.no_grad():
        close(model.eval()(case.inputs), case.tensor('eval/logits'), rtol=0, atol=2e-5)
