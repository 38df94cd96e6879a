"""DeepMoE models: exact sizes, the dense networks they start as, the two stages of training, under the tool and DDP.

timm's own tests run on every name in test_timm_host.py; the layers are in test_deep_moe.py.
"""
import json
import os

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing
from image_folders import write_images
from timm.optim import create_optimizer_v2
from torch import nn

from moe_zoo.analysis.force import force_expert
from moe_zoo.analysis.usage import LayerUsage, measure_usage, usage_table
from moe_zoo.engine import MoEClassificationTask
from moe_zoo.engine.checkpoint import read_checkpoint
from moe_zoo.engine.compare import twin_options
from moe_zoo.engine.config import load_config
from moe_zoo.engine.log import BalanceWatch, describe_live
from moe_zoo.engine.train import train
from moe_zoo.errors import InputError
from moe_zoo.layers import ChannelGate, sparse_inference
from moe_zoo.routing import trace_routing

SMALLEST = 'deepmoe_resnet56_cifar'
TINY = dict(layers=(1, 1, 1), channels=(4, 6, 8), embed_widths=(4, 6))
CIFAR = ('resnet56', 'resnet110', 'vgg16')


def tiny(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(SMALLEST, **{**TINY, 'num_classes': 3, **kwargs})


def batch(images: int = 8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, 16, 16, generator=generator), torch.randint(0, 3, (images,), generator=generator)


def gates_of(model: nn.Module) -> list:
    return [m for m in model.modules() if isinstance(m, ChannelGate)]


def test_twelve_names():
    assert sorted(timm.list_models('deepmoe_*')) == sorted(
        [f'deepmoe_{kind}resnet{depth}' for kind in ('', 'narrow_') for depth in (18, 34, 50)]
        + [f'deepmoe_{net}_cifar{kind}' for net in CIFAR for kind in ('', '_dense')])


# The dense start

@pytest.mark.parametrize('name, twin, kwargs', [
    (SMALLEST, 'deepmoe_resnet56_cifar_dense', dict(layers=(2, 1, 1), channels=(4, 6, 8), stem_width=4)),
    ('deepmoe_vgg16_cifar', 'deepmoe_vgg16_cifar_dense', dict(channels=(8, 8, 8, 8, 8), stem_width=8)),
    ('deepmoe_narrow_resnet18', 'resnet18', {}),
    pytest.param('deepmoe_narrow_resnet50', 'resnet50', {}, marks=pytest.mark.slow),
])
def test_gates_of_one_start_as_the_dense_network(name, twin, kwargs):
    dense = timm.create_model(twin, num_classes=7, zero_init_last=False, **kwargs).eval()
    model = timm.create_model(name, num_classes=7, width=1., **kwargs).eval()
    missing, unexpected = model.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected and all('gate' in key or key.startswith('embedding.') for key in missing)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        # A softmax sums to 1 up to rounding.
        torch.testing.assert_close(model(x), dense(x), rtol=1e-4, atol=1e-5)


def test_eval_does_not_depend_on_the_neighbours():
    model = tiny(gate_init=(-1., 1.)).eval()
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[2:3], model(x[2:3]))
        assert torch.equal(model(x), model(x))


def test_cifar_networks_take_other_sizes():
    for net in CIFAR:
        model = timm.create_model(f'deepmoe_{net}_cifar', device='meta').eval()
        assert model(torch.empty(1, 3, 224, 224, device='meta')).shape == (1, 10)


@pytest.mark.parametrize('name', ['deepmoe_vgg16_cifar', 'deepmoe_vgg16_cifar_dense'])
def test_images_that_vgg_cannot_halve_four_times(name):
    model = timm.create_model(name, device='meta').eval()
    assert model(torch.empty(1, 3, 16, 16, device='meta')).shape == (1, 10)
    with pytest.raises(InputError, match='A max-pool meets a map of 1 x 2, which it cannot halve: use larger images.'):
        model(torch.empty(1, 3, 15, 16, device='meta'))


def test_new_classes_keep_the_gates():
    model = tiny(gate_init=(-1., 1.)).eval()
    x = batch(2)[0]
    with trace_routing(model) as before:
        model(x)
    model.reset_classifier(5)
    with trace_routing(model) as after:
        assert model(x).shape == (2, 5)
    assert after['embedding'][0].logits.shape == (2, 5)
    for name in before:
        if 'gate' in name:
            assert torch.equal(before[name][0].gates, after[name][0].gates)


def test_arguments_are_json_and_bad_ones_are_told():
    arguments = tiny(gate_init=(-1., 1.))._model_args
    json.dumps(arguments)
    for kwargs, message in (
            (dict(width=0), 'width=0: give a factor above 0; 2 is the wide network, 1 the narrow one'),
            (dict(widen='iner'), r"widen='iner': use 'inner' or 'all'\. Did you mean 'inner'\?"),
            (dict(bottleneck='C'), "bottleneck='C': use 'A' or 'B'"),
            (dict(embed_dim=0), 'embed_dim=0: the embedding needs at least one mixture weight')):
        with pytest.raises(InputError, match=message):
            timm.create_model('deepmoe_resnet50', device='meta', **kwargs)


def test_parameter_groups_cover_the_embedding_with_the_stem():
    from timm.models import group_parameters
    model = tiny()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups['embedding.fc.weight'] == groups['conv1.weight'] == 0
    assert groups['blocks.0.0.gate1.weight'] == groups['blocks.0.0.conv1.weight'] == 1


# The losses

def test_three_part_loss():
    model, (x, target) = tiny(gate_l1=0.01, embed_loss=0.5), batch()
    task = MoEClassificationTask(model, verbose=False)
    result = task(x, target)
    assert {name for name in result if name.startswith('loss_')} == {'loss_gate_l1', 'loss_embedding'}
    # All gates are 1: 8 + 4, 12 + 6 and 16 + 8 of them
    assert float(result['loss_gate_l1']) == pytest.approx(0.54, rel=1e-5)
    with trace_routing(model) as trace:
        model(x)
    logits = trace['embedding'][0].logits
    expected = 0.5 * nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(result['loss_embedding'], expected)
    total = result['task_loss'] + result['loss_gate_l1'] + result['loss_embedding']
    torch.testing.assert_close(result['loss'].detach(), total)
    # The task's loss reaches the gates, and through gates that differ the embedding.
    model = tiny(gate_init=(0., 1.))
    model(x).logsumexp(dim=1).sum().backward()
    assert all(gate.weight.grad.any() for gate in gates_of(model))
    assert model.embedding.fc.weight.grad.any() and model.embedding.convs[0].weight.grad.any()


def test_checkpointing_keeps_the_gradient_of_the_losses():
    found = []
    for checkpointing in (False, True):
        model, (x, target) = tiny(gate_init=(-1., 1.), gate_l1=0.1), batch()
        model.set_grad_checkpointing(checkpointing)
        MoEClassificationTask(model.train(), verbose=False)(x, target)['loss'].backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=lambda m, n=name: f'{n}: {m}')


def test_usage_and_the_watch_bear_zero_gates():
    model = tiny(gate_init=(-1., 1.)).eval()
    usages = measure_usage(model, [batch()])
    assert list(usages)[0] == 'embedding' and usages['blocks.0.0.gate1'].num_experts == 8
    assert 'blocks.2.0.gate2' in usage_table(usages)
    share = torch.ones(100, dtype=torch.float64)
    share[0] = 0.
    # Of a hundred channels one is off: 0 and 1/99, not a hundred numbers.
    assert usage_table({'gate': LayerUsage('gate', 1, share, share, 0.)}).endswith('%  0.00 to 1.01')
    balance = {'a': {'share': torch.tensor([1., 0.])}, 'b': {'share': torch.tensor([1., 0.])}}
    message, = BalanceWatch('model', {'a'}).check(balance, True)
    assert message.startswith("Layer 'b'")
    assert describe_live({'a': 0.5, 'b': 0.25}) == '37.5% in the mean of 2 layers, least b 25.0%'


# The second stage

def step(task, optimizer, x, target) -> None:
    optimizer.zero_grad()
    task(x, target)['loss'].backward()
    optimizer.step()


@pytest.mark.parametrize('name', ['sgd', 'adamw'])
def test_frozen_gates_stay(name):
    """Neither weight decay nor momentum moves them, their losses are gone, the norms keep their statistics."""
    model, (x, target) = tiny(gate_init=(-1., 1.)).train(), batch()
    task = MoEClassificationTask(model, verbose=False)
    optimizer = create_optimizer_v2(model, opt=name, lr=0.1, weight_decay=0.1, momentum=0.9)
    step(task, optimizer, x, target)

    def frozen_state():
        return {k: v.clone() for k, v in model.state_dict().items() if 'embedding' in k or '.gate' in k}

    start = frozen_state()
    step(task, optimizer, x, target)
    assert any(not torch.equal(v, start[k]) for k, v in frozen_state().items())  # it moves before

    task.freeze_gates()
    start, conv = frozen_state(), model.conv1.weight.clone()
    model.train()
    for _ in range(2):
        step(task, optimizer, x, target)
    assert all(torch.equal(v, start[k]) for k, v in frozen_state().items())
    assert not torch.equal(model.conv1.weight, conv)
    assert not any(n.startswith('loss_') for n in task(x, target))
    assert not any(m.training for m in model.embedding.modules()) and model.bn1.training

    model.freeze_gates(False)
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    result = task(x, target)
    assert 'loss_gate_l1' in result and 'loss_embedding' in result


def test_the_state_is_saved_with_the_weights():
    model = tiny()
    assert not model.gates_frozen
    model.freeze_gates()
    other = tiny().train()
    other.load_state_dict(model.state_dict())
    assert other.gates_frozen and not other.embedding.fc.weight.requires_grad and not other.embedding.training
    assert other.conv1.weight.requires_grad and other.training
    other.load_state_dict(tiny().state_dict())
    assert not other.gates_frozen and other.embedding.fc.weight.requires_grad and other.embedding.training


def _rank(rank: int, folder: str) -> None:
    """One of two gloo ranks: two steps, the freeze, two more; rank 0 writes the weights of all three moments."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1')
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    model, (x, target) = tiny(gate_init=(-1., 1.), norm_layer=_no_norm).train(), batch()
    model.embedding.eval()  # statistics of half a batch would not be those of the whole
    part = slice(4 * rank, 4 * rank + 4)
    task = MoEClassificationTask(model, verbose=False)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.05, weight_decay=0.01, momentum=0.9)
    task.prepare_distributed(device_ids=[torch.device('cpu')])
    states = _two_stages(model, task, optimizer, x[part], target[part])
    if rank == 0:
        torch.save(states, f'{folder}/states.pt')
    dist.destroy_process_group()


def _no_norm(*_, **__) -> nn.Module:
    return nn.Identity()


def _two_stages(model, task, optimizer, x, target) -> list:
    states = []
    for _ in range(2):
        for _ in range(2):
            step(task, optimizer, x, target)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        if len(states) == 1:
            task.freeze_gates()
    return states


@pytest.mark.slow
def test_two_ranks_freeze(tmp_path):
    """DDP wrapped anew: the same weights as one process with the whole batch, before and after the freeze."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / 'states.pt', weights_only=True)
    model, (x, target) = tiny(gate_init=(-1., 1.), norm_layer=_no_norm).train(), batch()
    model.embedding.eval()
    task = MoEClassificationTask(model, verbose=False)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.05, weight_decay=0.01, momentum=0.9)
    expected = _two_stages(model, task, optimizer, x, target)
    for state, reference in zip(found, expected):
        for name, value in reference.items():
            torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f'{n}: {m}')
    gates = [name for name in expected[0] if '.gate' in name]
    assert all(torch.equal(found[0][name], found[1][name]) for name in gates)
    assert not torch.equal(found[0]['conv1.weight'], found[1]['conv1.weight'])


# Our training tool

RECIPE = dict(
    model=SMALLEST, model_kwargs=dict(TINY, gate_init=[-1., 1.]), num_classes=2, img_size=16, batch_size=8, workers=0,
    opt='sgd', lr=0.05, weight_decay=0.05, epochs=3, warmup_epochs=0, device='cpu', log_interval=1000, freeze_gates=1)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """20 images of two classes, dark and bright."""
    return write_images(tmp_path_factory.mktemp('images'), {'train': 8, 'validation': 2})


def run(folders, folder, **kwargs):
    resume = kwargs.pop('resume', None)
    return train({**RECIPE, 'data_dir': str(folders)}, kwargs, output=folder, resume=resume, quiet=True)


@pytest.mark.parametrize('stop', [1, 2])
def test_the_tool_freezes_and_resumes_before_and_after(folders, tmp_path, stop):
    options = dict(model_ema=True, model_ema_decay=0.5)
    whole = run(folders, tmp_path / 'whole', **options)
    first, *later = whole['history']
    assert {'train_loss_gate_l1', 'train_loss_embedding'} <= set(first)
    assert all('train_loss_gate_l1' not in row and row['train_loss'] == row['train_task_loss'] for row in later)
    assert whole['warnings'] == []  # zero gates starve nobody
    live = {name: value for name, value in first.items() if name.startswith('live_')}
    assert set(live) == {f'live_blocks.{i}.0.gate{j}' for i in (0, 1, 2) for j in (1, 2)}
    assert 0 < min(live.values()) < 1 and not any(name.startswith(('balance_', 'dropped_')) for name in first)
    run(folders, tmp_path / 'parts', stop_epoch=stop, **options)
    kept = read_checkpoint(tmp_path / 'parts' / 'last.pth.tar')['state_dict']
    assert bool(kept['gates_frozen']) == (stop == 2)
    run(folders, tmp_path / 'parts', resume='auto', **options)
    one, other = (read_checkpoint(tmp_path / name / 'last.pth.tar') for name in ('whole', 'parts'))
    for key in ('state_dict', 'state_dict_ema'):
        for name, value in one[key].items():
            assert torch.equal(value, other[key][name]), f'{key} {name}'
    for name, value in one['state_dict'].items():  # nothing of the gating network moved since the epoch of the freeze
        if 'gate1' in name or name.startswith('embedding.'):
            assert torch.equal(value, kept[name]), name
    assert one['state_dict']['gates_frozen'] and one['state_dict_ema']['gates_frozen']


def test_freezing_what_has_no_gates(folders, tmp_path):
    with pytest.raises(InputError, match="freeze_gates=1: 'resnet10t' has no gates to freeze; leave the option out"):
        run(folders, tmp_path, model='resnet10t', model_kwargs={})
    with pytest.raises(InputError, match='freeze_gates=-1: give the number of epochs that the gates train'):
        load_config(RECIPE, {'freeze_gates': -1})
    # The dense twin of such a recipe trains without.
    options = twin_options(load_config(RECIPE))
    assert options['model'] == 'deepmoe_resnet56_cifar_dense' and options['freeze_gates'] is None
    assert load_config(RECIPE, options).freeze_gates is None


def test_a_gate_can_be_forced():
    model, x = tiny(gate_init=(-1., 1.)).eval(), batch(2)[0]
    with force_expert(model, 3, layer='blocks.1.0.gate1'), trace_routing(model) as trace, torch.no_grad():
        forced = model(x)
    gates = trace['blocks.1.0.gate1'][0].gates
    assert gates.tolist() == [[0., 0., 0., 1.] + [0.] * 8] * 2
    with torch.no_grad():
        with force_expert(model, 3, layer='blocks.1.0.gate1'), sparse_inference(model):
            torch.testing.assert_close(model(x), forced)
        assert not torch.allclose(model(x), forced)


def test_a_single_small_image_trains():
    # 64 px / 2 / 2^5 = 1: the embedding's last norm meets one value a channel, which has no variance
    model = timm.create_model('deepmoe_resnet18', num_classes=3).train()
    before = model.embedding.convs[-2].running_mean.clone()
    model(torch.randn(1, 3, 64, 64)).sum().backward()
    assert model.embedding.fc.weight.grad.isfinite().all() and model.embedding.convs[-2].training
    assert torch.equal(model.embedding.convs[-2].running_mean, before)
