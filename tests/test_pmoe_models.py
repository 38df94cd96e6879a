"""pMoE networks: sizes, fixed output weights, separate training, checkpointing, features.

timm's own tests run on every name in test_timm_host.py; here stands what timm cannot know.
"""
import os

import pytest
import timm
import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from torch import nn

from moe_zoo.analysis import count
from moe_zoo.engine.task import MoEClassificationTask
from moe_zoo.errors import InputError
from moe_zoo.models.pmoe import FixedLinear
from moe_zoo.routing import set_epoch, trace_routing

# A network of 4 patches of 2 x 2 pixels.
TINY = dict(patch_size=2, num_filters=8, num_experts=2, patches_per_expert=2)
# WRN-pMoE for 64 x 64 faces: 16 patches of 4 x 4 cells.
FACES = dict(num_experts=8, patches_per_expert=2, patch_size=4, kernel_size=3)
NARROW = dict(stem_chs=4, channels=(8, 8, 16))


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def tiny(**kwargs) -> nn.Module:
    return timm.create_model('pmoe_cnn', **{**TINY, **kwargs})


def separate(**kwargs) -> nn.Module:
    return tiny(**{**dict(gate_order='hard', output_weights='signed', init_std=.1, router_init_std=.1), **kwargs})


# Sizes

def test_last_group_of_the_wide_resnets():
    plain = timm.create_model('pmoe_wrn10_10_dense', device='meta').stages[3]
    # norm 640 + 1280, convolutions 320 x 640 x 9 + 640 and 640 x 640 x 9 + 640, shortcut 320 x 640 + 640
    assert parameters(plain) == 5_738_240
    norm, _, conv, routed = timm.create_model('pmoe_wrn10_10', device='meta').stages[3]
    # convolution as above; routers 4 x 640, norms 4 x 1280, experts 4 x (640 x 160 + 160). The norm of group 2's
    # output, 640, is part of the plain group's count and not of this one.
    assert parameters(conv) + parameters(routed) == 2_261_760 and parameters(norm) == 640
    norm, _, conv, routed = timm.create_model('pmoe_wrn10_10', device='meta', **FACES).stages[3]
    # routers 8 x 640 x 16, norms 8 x 1280, experts 8 x (640 x 80 x 9 + 80)
    assert parameters(conv) + parameters(routed) == 5_623_040 and parameters(norm) == 640


def test_hidden_units_of_the_two_layer_networks():
    cost = count(timm.create_model('pmoe_cnn'), torch.zeros(1, 1, 112, 112))
    # 40 filters and 8 routers of 28 x 28; routers on 16 patches, 8 x 5 filters on 6
    assert (cost.parameters, cost.macs_max) == (48 * 784, 784 * (16 * 8 + 40 * 6) + 80)
    dense = timm.create_model('pmoe_cnn_dense')
    # 40 filters on 16 patches, 2 rows of output weights
    assert (parameters(dense), count(dense, torch.zeros(1, 1, 112, 112)).macs_max) == (40 * 784, 784 * 40 * 16 + 80)
    assert parameters(timm.create_model('pmoe_cnn_dense', num_filters=4)) == 4 * 784


def test_faces_have_16_patches_and_every_expert_takes_two():
    model = timm.create_model('pmoe_wrn10_10', **FACES, **NARROW).eval()
    with trace_routing(model) as trace, torch.no_grad():
        model(torch.randn(2, 3, 64, 64))
    routing, = trace['stages.3.3']
    assert routing.shape == (2, 4, 4) and routing.kept.sum(dim=0).tolist() == [4] * 8


# The two-layer form

@pytest.mark.parametrize('normalise, by', [('patches', 4), ('chosen', 2)])
def test_output_by_hand(normalise, by):
    # one expert of two filters, one pixel a patch, gates 1: sum over chosen patches of a_r relu(w_r x), by n or by l
    model = tiny(patch_size=1, num_filters=2, num_experts=1, num_classes=1, gate_order='hard', normalise=normalise)
    with torch.no_grad():
        model.stages[0].router.weight.fill_(1.)
        model.stages[0].weight.copy_(torch.tensor([[[1.], [-1.]]]))
        model.head.fc.weight.copy_(torch.tensor([[10., 100.]]))
    # patches 1, 2, -1, -2: chosen are 1 and 2, which only the first filter answers
    assert model(torch.tensor([[1., 2.], [-1., -2.]]).view(1, 1, 2, 2)).item() == 10 * 3 / by
    with torch.no_grad():
        model.stages[0].router.weight.fill_(-1.)
    assert model(torch.tensor([[1., 2.], [-1., -2.]]).view(1, 1, 2, 2)).item() == 100 * 3 / by


def test_the_twin_is_the_network_with_all_gates_one():
    model, twin = tiny(num_experts=1, patches_per_expert=4, gate_order='hard'), timm.create_model(
        'pmoe_cnn_dense', patch_size=2, num_filters=8)
    with torch.no_grad():
        twin.stages[0].weight.copy_(model.stages[0].weight.view(8, 1, 2, 2))
    twin.head.fc.load_state_dict(model.head.fc.state_dict())
    x = torch.randn(3, 1, 4, 4)
    torch.testing.assert_close(model(x), twin(x))


@pytest.mark.parametrize('name', ['pmoe_cnn', 'pmoe_cnn_dense'])
def test_output_weights_are_buffers_also_after_a_reset(name):
    model = timm.create_model(name, num_classes=1)
    for num_classes in (1, 5):
        model.reset_classifier(num_classes)
        assert isinstance(model.head.fc, FixedLinear) and not list(model.head.parameters())
        assert model.state_dict()['head.fc.weight'].shape == (num_classes, 40)
        assert model(torch.zeros(2, 1, 112, 112)).shape == (2, num_classes)
    before = model.head.fc.weight.clone()
    model(torch.rand(4, 1, 112, 112)).square().sum().backward()
    create_optimizer_v2(model, opt='sgd', lr=.1, weight_decay=.1).step()
    assert torch.equal(model.head.fc.weight, before)
    model.to(torch.float64).train().reset_classifier(3, 'max')
    assert model.head.fc.weight.dtype == torch.float64 and model.head.fc.training
    assert model.head.global_pool.pool_type == 'max'


def test_fixed_weights_are_standard_normal_or_signed():
    assert FixedLinear(10_000, 1).weight.std().item() == pytest.approx(1., abs=.05)
    # two experts of two filters: class 1 minus class 0 is -1 for the filters of expert 0, +1 for those of expert 1
    assert FixedLinear(4, 1, 'signed', 2).weight.tolist() == [[-1., -1., 1., 1.]]
    assert FixedLinear(4, 2, 'signed', 2).weight.tolist() == [[.5, .5, -.5, -.5], [-.5, -.5, .5, .5]]
    assert FixedLinear(3, 3, 'signed', 3).weight.diag().tolist() == pytest.approx([2 / 3] * 3)


# Separate training

def test_routers_first_then_experts_and_only_what_trains_moves():
    model = separate(router_epochs=2)
    task = MoEClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    optimizer = create_optimizer_v2(model, opt='momentum', lr=.2, weight_decay=.1)
    x, y = torch.rand(6, 1, 4, 4), torch.tensor([0, 1] * 3)
    for epoch in range(4):
        set_epoch(model, epoch)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        task.train()
        result = task(x, y)
        optimizer.zero_grad()
        result['loss'].backward()
        optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        # decay and momentum included: what is frozen has no gradient at all
        assert moved == {'stages.0.router.weight' if epoch < 2 else 'stages.0.weight'}
        assert ('loss_linear_router' in result) == (epoch < 2)


def _two_parts(model: nn.Module, task: MoEClassificationTask, x: torch.Tensor, y: torch.Tensor) -> dict:
    """An epoch of two steps for the routers, one for the experts; the weights they lead to."""
    optimizer = create_optimizer_v2(model, opt='momentum', lr=.2, weight_decay=.1)
    for epoch in range(2):
        task.set_epoch(epoch)
        for _ in range(2):
            optimizer.zero_grad()
            task(x, y)['loss'].backward()
            optimizer.step()
    return model.state_dict()


def _problem() -> tuple:
    torch.manual_seed(0)
    model = separate(router_epochs=1)
    return model, MoEClassificationTask(model.train(), verbose=False), torch.rand(6, 1, 4, 4), torch.arange(6) % 2


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    model, task, x, y = _problem()
    task.prepare_distributed(device_ids=[torch.device('cpu')])
    state = _two_parts(model, task, x[3 * rank:3 * rank + 3], y[3 * rank:3 * rank + 3])
    torch.save(state, os.path.join(folder, f'{rank}.pt'))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_train_separately(tmp_path):
    """What trains changes under DDP: the same weights as one process with the whole batch."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    expected = _two_parts(*_problem())
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f'{rank}.pt', weights_only=True), expected)


def test_one_step_of_the_routers_by_hand():
    # Gradient of the loss of one image of class 1: -sum of patches for router 1, + for router 0.
    model = separate().train()
    model.set_mode('router')
    model.set_aux_loss(True)
    task = MoEClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
    x = torch.arange(16.).view(1, 1, 4, 4)
    task(x, torch.tensor([1]))['loss'].backward()
    # pixels of the four patches, summed: 0 + 2 + 8 + 10, 1 + 3 + 9 + 11, 4 + 6 + 12 + 14, 5 + 7 + 13 + 15
    assert model.stages[0].router.weight.grad.tolist() == [[20, 24, 36, 40], [-20, -24, -36, -40]]
    assert model.stages[0].weight.grad is None


def test_trained_routers_keep_the_patch_of_their_class():
    # class 0 has a bright pixel at the left of one patch, class 1 at the right; other patches are dark
    model = separate(num_filters=2, patches_per_expert=1, patch_size=(1, 2), router_init_std=1e-3)
    images = torch.zeros(16, 1, 4, 4)
    labels, where = torch.arange(16) % 2, torch.arange(16) // 2
    images.view(16, 8, 2)[torch.arange(16), where, labels] = 1.
    model.set_mode('router')
    model.set_aux_loss(True)
    task = MoEClassificationTask(model.train(), nn.CrossEntropyLoss(), verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=.2)
    for _ in range(5):
        task(images, labels)['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
    with trace_routing(model) as trace, torch.no_grad():
        model.eval()(images)
    kept = trace['stages.0'][0].kept.view(16, 8, 2)
    assert kept[torch.arange(16), where, labels].all()


# Training, features

@pytest.mark.parametrize('name, kwargs', [('pmoe_cnn', {}), ('pmoe_wrn10_10', NARROW)])
@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointing_changes_neither_gradients_nor_records(name, kwargs, reentrant, monkeypatch):
    monkeypatch.setattr('moe_zoo.models.pmoe.use_reentrant_ckpt', lambda: reentrant)
    model = timm.create_model(name, drop_rate=0., **kwargs).train()
    model.set_aux_loss(True)
    x = torch.randn(2, *model.pretrained_cfg['input_size'], requires_grad=True)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        output, records = model(x)
        (output.square().sum() + sum(r.gates.square().sum() for r in records)).backward()
        found.append([output.detach(), *(p.grad.clone() for p in model.parameters())])
        assert len(records) == 1 and records[0].by_expert
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize('name', ['pmoe_cnn', 'pmoe_wrn10_10'])
def test_an_image_does_not_depend_on_another(name):
    model = timm.create_model(name, **(NARROW if 'wrn' in name else {})).eval()
    x = torch.randn(3, *model.pretrained_cfg['input_size'])
    with torch.no_grad():
        torch.testing.assert_close(model(x)[:1], model(x[:1]))
        assert torch.equal(model(x), model(x))


def test_keywords_reach_the_routed_layer():
    layer = timm.create_model('pmoe_wrn10_10', gate_order='after', norm_first=True, bn_eps=.5, **NARROW).stages[3][3]
    assert layer.router.gate_order == 'after' and layer.experts[0].norm_first and layer.experts[0].norm.eps == .5
    names = [list(timm.create_model(name, features_only=True).feature_info.reduction()) for name in (
        'pmoe_cnn', 'pmoe_wrn10_10')]
    assert names == [[28, 28, 28], [1, 1, 2, 4]]


# Bad input

@pytest.mark.parametrize('name, kwargs, message', [
    ('pmoe_cnn', dict(normalise='patch'), r"normalise='patch' is not one of patches, chosen\. Did you mean 'patches'"),
    ('pmoe_cnn', dict(output_weights='sign'), r"output_weights='sign' is not one of normal, signed\. Did you mean "),
    ('pmoe_cnn', dict(output_weights='signed'), 'num_experts=8, num_classes=2: use one expert a class, 2 experts for'),
    ('pmoe_cnn', dict(router_epochs=5), "router_epochs=5 with num_experts=8, gate_order='after': separate training"),
    ('pmoe_wrn10_10', dict(num_experts=3), 'num_experts=3 with 640 channels in the last group: use a divisor of them'),
])
def test_arguments_that_cannot_work(name, kwargs, message):
    with pytest.raises(InputError, match=message):
        timm.create_model(name, device='meta', **kwargs)


@pytest.mark.parametrize('name, size, message', [
    ('pmoe_cnn', (1, 100, 112), 'patch_size=28 x 28 does not divide a map of 100 x 112'),
    ('pmoe_cnn_dense', (1, 100, 112), 'patch_size=28 x 28 does not divide a map of 100 x 112'),
    ('pmoe_wrn10_10', (3, 12, 12), 'patches_per_expert=16, but a map of 3 x 3 has 9 patches of 1 x 1: choose between '),
])
def test_images_that_cannot_work(name, size, message):
    with pytest.raises(InputError, match=message):
        timm.create_model(name, device='meta')(torch.empty(1, *size, device='meta'))


def test_cells_that_do_not_fill_the_map():
    with pytest.raises(InputError, match='patch_size=4 x 4 does not divide a map of 6 x 6'):
        timm.create_model('pmoe_wrn10_10', **FACES, **NARROW)(torch.zeros(1, 3, 24, 24))
