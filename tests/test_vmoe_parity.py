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

FILES = ['vmoe_tiny_a', 'vmoe_tiny_b', 'vmoe_tiny_b_vanilla', 'vmoe_tiny_c_gap_sincos', 'vmoe_tiny_map']


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

    def tensor(self, key):
        return torch.from_numpy(self.arrays[key])

    def put_noise(self):
        """Make the routers draw the recorded noise, (G, S, E) standard normal."""
        for name, layer in self.layers.items():
            noise = self.tensor(f'train/noise/{name}').flatten(0, 1)
            layer.router.sample_noise = lambda logits, noise=noise: noise

    def drop_noise(self):
        for layer in self.layers.values():
            layer.router.noise_std = 0.

    def check_metrics(self, prefix, routings):
        """Every recorded loss, group by group."""
        total = 0.
        for (name, layer), routing in zip(self.layers.items(), routings):
            groups = [one_group(routing, g) for g in range(routing.logits.shape[0] // layer.group_size)]
            ours = {
                'importance_loss': [LOSSES['importance'](g) for g in groups],
                'gshard_loss': [LOSSES['gshard'](g) for g in groups],
                'auxiliary_loss': [sum(auxiliary_losses([g]).values()) for g in groups],
            }
            if routing.noisy_logits is not None:
                ours['load_loss'] = [LOSSES['vmoe_load'](g) for g in groups]
            recorded = {k.rpartition('/')[2] for k in self.arrays if k.startswith(f'{prefix}/metrics/{name}/')}
            assert recorded == set(ours)
            for key, values in ours.items():
                close(torch.stack(values), self.tensor(f'{prefix}/metrics/{name}/{key}'), rtol=1e-4, atol=1e-7)
            total = total + torch.stack(ours['auxiliary_loss'])
        close(total, self.tensor(f'{prefix}/metrics/auxiliary_loss'), rtol=1e-4, atol=1e-7)


def one_group(routing, g):
    """The record of group g alone."""
    rows = slice(g * routing.group_size, (g + 1) * routing.group_size)
    per_token = ('logits', 'gates', 'weights', 'indices', 'kept', 'noisy_logits')
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
        group = (-1, layer.group_size, layer.num_experts)
        mask = routing._replace(weights=torch.ones_like(routing.weights)).combine_matrix().bool()
        assert torch.equal(mask.view(group), case.tensor(f'eval/{name}/dispatch_mask_GSE'))
        close(routing.logits.view(group), case.tensor(f'eval/{name}/router_logits'), rtol=0, atol=2e-5)
        close(routing.combine_matrix().view(group), case.tensor(f'eval/{name}/combine_weights_GSE'), rtol=0, atol=2e-6)
        close(outputs[name], case.tensor(f'eval/{name}/moe_out'), rtol=0, atol=2e-5)
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
    auxiliary = sum(auxiliary_losses(routings).values())
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


def test_query_and_key_norms(shared_parity):
    """The expert-choice file has them (its router is another): the logits of its first router follow from them."""
    info = json.loads((shared_parity / 'vmoe' / 'vmoe_tiny_expert_choice.json').read_text())
    with np.load(shared_parity / 'vmoe' / 'vmoe_tiny_expert_choice.npz') as arrays:
        arrays = dict(arrays)
    info['model']['encoder']['moe']['router'] = dict(dispatcher=dict(capacity_factor=1.0))
    model = from_config(info['model'], img_size=32).eval()
    model.load_state_dict(import_vmoe({k: v for k, v in arrays.items() if k.startswith('params/')}))
    with torch.no_grad(), trace_routing(model) as trace:
        model(torch.from_numpy(arrays['inputs']).permute(0, 3, 1, 2))
    expected = torch.from_numpy(arrays['eval/encoderblock_0/router_logits']).flatten(0, 1)
    close(trace['blocks.0.mlp'][0].logits, expected, rtol=0, atol=2e-5)
