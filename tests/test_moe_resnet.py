"""Balanced mixture-of-experts ResNets: exact sizes, where routed layers stand, and training with idle experts.

timm's own tests run on every name in test_timm_host.py; here stands what timm cannot know.
"""
import math
import os

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing
from timm.models.resnet import BasicBlock
from torch import nn

from moe_zoo.analysis import count
from moe_zoo.engine import MoEClassificationTask
from moe_zoo.errors import InputError
from moe_zoo.layers import MoEConv2d, MoEStage
from moe_zoo.routing import trace_routing


def tiny(name: str = 'moe_resnet18_cifar', **kwargs) -> nn.Module:
    """One block a stage of 8 to 16 channels after a stem of 64."""
    defaults = dict(channels=(8, 8, 8, 16), layers=(1, 1, 1, 2), num_classes=3)
    return timm.create_model(name, **{**defaults, **kwargs})


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# Parameters and MACs.

def test_the_widths_halve_a_stage():
    # Stage 4 of ResNet-18: 256*512*9 + 3*512*512*9 + 256*512 + 5 norms of 2*512. An expert: 256*180*9 + 180*180*9 +
    # 256*180, then 180*512*9 + 512*512*9 + 180*512, and 3 norms each of 2*180 and 2*512.
    dense = timm.create_model('resnet18', device='meta')
    routed = timm.create_model('moe_resnet18', device='meta', stages=(1, 2, 3, 4))
    assert size(dense.layer4) == 8_393_728
    stage = routed.layer4[0]
    assert [size(expert) for expert in stage.experts] == [4_037_448] * 4
    assert size(stage.router) == 2 * 4 * 256  # gate and noise
    assert size(stage.shortcut) == 256 * 512 + 2 * 512
    for number in (1, 2, 3, 4):  # k = 2 experts about cost a stage
        share = size(getattr(routed, f'layer{number}')[0].experts[0]) / size(getattr(dense, f'layer{number}'))
        assert 0.46 < share < 0.53


def test_the_widths_of_resnet50_halve_a_stage_too():
    dense = timm.create_model('resnet50', device='meta')
    routed = timm.create_model('moe_resnet50', device='meta', stages=(1, 2, 3, 4))
    for number in (1, 2, 3, 4):
        share = size(getattr(routed, f'layer{number}')[0].experts[0]) / size(getattr(dense, f'layer{number}'))
        assert 0.48 < share < 0.52


def test_macs_are_within_a_percent_of_the_dense_network():
    for name, twin, pixels in (('moe_resnet18', 'resnet18', 224), ('moe_resnet18_cifar', None, 32)):
        x = torch.empty(1, 3, pixels, pixels, device='meta')
        model = timm.create_model(name, device='meta')
        dense = timm.create_model(twin or name, device='meta', **({} if twin else {'stages': ()}))
        assert abs(count(model, x).macs_max / count(dense, x).macs_max - 1) < 0.01


def test_the_layer_states_what_the_counter_sees():
    model = tiny(stages=(2, 4), noise=False, gate='conv_gap')
    x = torch.randn(3, 3, 32, 32)
    cost = count(model, x)
    for number in (2, 4):
        name = f'layer{number}.0'
        assert cost.by_module[name] == cost.by_module_max[name] > 0
    assert not cost.uncounted


# Structure.

def test_the_cifar_network_keeps_its_pixels():
    model = timm.create_model('moe_resnet18_cifar', features_only=True, out_indices=(0, 1, 2, 3, 4))
    assert model.feature_info.reduction() == [1, 1, 2, 4, 8]
    assert [tuple(y.shape[1:]) for y in model(torch.randn(1, 3, 32, 32))] == [
        (64, 32, 32), (64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


def test_a_residual_stage_adds_an_identity_or_a_strided_convolution_and_no_relu():
    model = timm.create_model('moe_resnet18_cifar', stages=(1, 4), device='meta')
    assert isinstance(model.layer1[0].shortcut, nn.Identity)
    conv, norm = model.layer4[0].shortcut
    assert (conv.kernel_size, conv.stride, conv.bias) == ((1, 1), (2, 2), None) and isinstance(norm, nn.BatchNorm2d)
    model = tiny(residual=True, noise=False).eval()
    x = torch.randn(2, 8, 8, 8)
    stage, without = model.layer4[0], tiny(residual=False, noise=False).eval().layer4[0]
    without.load_state_dict({k: v for k, v in stage.state_dict().items() if not k.startswith('shortcut')})
    y = stage(x)
    torch.testing.assert_close(y, without(x) + stage.shortcut(x))
    assert y.min() < 0 <= without(x).min()


def test_every_convolution_of_a_stage_is_routed():
    model = tiny(layer='conv', stages=(3, 4), num_experts=3)
    routed = {name: m for name, m in model.named_modules() if isinstance(m, MoEConv2d)}
    assert list(routed) == ['layer3.0.conv1', 'layer3.0.conv2', 'layer4.0.conv1', 'layer4.0.conv2', 'layer4.1.conv1',
                            'layer4.1.conv2']
    assert [m.stride for m in routed.values()][:2] == [(2, 2), (1, 1)]
    assert not isinstance(model.layer4[0].downsample[0], MoEConv2d)
    task = MoEClassificationTask(model.train(), verbose=False)
    result = task(torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0]))
    assert list(result['balance']) == list(routed)  # the losses of the layers are summed
    # all convolutions start with timm's spread: sqrt(2 / (9 * 16)) for every expert
    for kernel in model.layer4[1].conv1.weight:
        assert kernel.std().item() == pytest.approx(math.sqrt(2 / (9 * 16)), rel=0.1)


def test_widths_can_be_given():
    model = tiny(stages=(3, 4), widths=(2, 3))
    assert [model.layer4[0].experts[0][i].conv1.out_channels for i in (0, 1)] == [3, 16]  # the last is the stage's
    assert model.layer3[0].experts[0][0].conv1.out_channels == 8  # one block is the last
    assert tiny(stages=4, widths=5).layer4[0].experts[0][0].conv1.out_channels == 5
    assert tiny().layer4[0].experts[0][0].conv1.out_channels == 6  # 180 * 16 / 512


def test_no_routed_stage_is_timms_network():
    dense = timm.create_model('resnet18', num_classes=7).eval()
    model = timm.create_model('moe_resnet18', stages=(), num_classes=7).eval()
    model.load_state_dict(dense.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), dense(x))


# Behaviour.

@pytest.mark.parametrize('kwargs', [
    dict(constraint='relative'), dict(constraint='mean', gate='relu_gap_fc'), dict(constraint='bias', num_selected=1),
    dict(constraint='kl', residual=False), dict(layer='conv', constraint='relative'),
    dict(gate='conv', drop_path_rate=0.2),
])
def test_evaluation_is_by_image_and_scripts(kwargs):
    model = tiny(stages=(3, 4), **kwargs)
    task = MoEClassificationTask(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        task.train()(torch.randn(6, 3, 32, 32), torch.randint(0, 3, (6,)))['loss'].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    if kwargs['constraint'] in ('relative', 'mean') if 'constraint' in kwargs else False:
        assert all(m.router.constraint.steps == 2 for m in model.modules() if isinstance(m, (MoEStage, MoEConv2d)))
    model.eval()
    x = torch.randn(4, 3, 32, 32)
    y = model(x)
    torch.testing.assert_close(y, torch.cat([model(image) for image in x.split(1)]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.jit.script(model)(x), y)


def test_no_constraint_can_be_asked_for_by_name():
    # timm.create_model drops keywords that are None
    assert tiny(constraint=None).layer4[0].router.losses == (('importance_unbiased', 0.5),)
    router = tiny(constraint='none').layer4[0].router
    assert router.losses == () and router.constraint is None


def test_k_sweep_of_a_trained_model():
    model = tiny(stages=(4,), num_selected=2).eval()
    stage, x = model.layer4[0], torch.randn(3, 3, 16, 16)
    for k in (1, 2, 3, 4):
        stage.set_num_selected(k)
        with trace_routing(model) as trace:
            model(x)
        assert (trace['layer4.0'][0].weights > 0).sum(dim=1).tolist() == [k] * 3


def test_one_image_on_a_single_position_trains():
    model = tiny(stages=(4,), constraint='relative', residual=False).train()
    task = MoEClassificationTask(model, verbose=False)
    # 16 pixels are 2 x 2 after stage 4: 8 pixels are 1 x 1, where an expert with one image has no variance.
    task(torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 2]))['loss'].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(m.running_var.isfinite().all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def _starve(rank: int, folder: str) -> None:
    """One of two ranks; on each another expert is never chosen in the first step."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1')
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    torch.manual_seed(0)
    model = tiny(stages=(4,), num_experts=2, num_selected=1, constraint='relative')
    images, used = torch.randn(4, 3, 16, 16), []
    router = model.layer4[0].router
    # The image's own choice is overruled: rank 0 wants expert 0, rank 1 expert 1; in the second step both want 0.
    wanted = [rank, 0, 0]
    router.compute_logits = lambda x: x.float() @ router.weight.t() * 0 + torch.eye(2)[wanted[len(used)]]
    task = MoEClassificationTask(model, verbose=False)
    task.prepare_distributed(device_ids=[torch.device('cpu')])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        with trace_routing(model) as trace:
            loss = task.train()(images, torch.tensor([0, 1, 2, 0]))['loss']
        loss.backward()
        used.append(trace['layer4.0'][-1].indices.flatten().tolist())
        optimizer.step()
    torch.save({'used': used, 'excess': router.constraint.excess, 'weight': model.layer4[0].experts[1][0].conv1.weight,
                'finite': all(p.grad.isfinite().all() for p in model.parameters())}, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


def test_two_ranks_that_starve_different_experts(tmp_path):
    torch.multiprocessing.spawn(_starve, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in (0, 1))
    # Step 1: four images for expert 0 on rank 0, four for expert 1 on rank 1: balanced over the ranks, R = 0. Step 2:
    # all eight for expert 0, R = (1, -1). Step 3: expert 0 is excluded on both ranks, R = 0.
    assert one['used'] == [[0] * 4, [0] * 4, [1] * 4] and two['used'] == [[1] * 4, [0] * 4, [1] * 4]
    assert one['excess'].tolist() == two['excess'].tolist() == [0, 0]
    assert torch.equal(one['weight'], two['weight']) and one['finite'] and two['finite']


# Bad input.

@pytest.mark.parametrize('kwargs, message', [
    (dict(num_selected=5), 'num_selected=5 with num_experts=4: choose between 1 and 4 experts.'),
    (dict(stages=(4, 5)), r'stages=\(4, 5\): choose among 1, 2, 3 and 4, each once.'),
    (dict(layer='stages'), r"layer='stages' is not one of stage, conv\. Did you mean 'stage'\?"),
    (dict(gate='conv_gapp'), r"gate='conv_gapp' is not one of .* Did you mean 'conv_gap'"),
    (dict(constraint='relativ'), r"constraint='relativ' is not one of .* Did you mean 'relative'\?"),
    (dict(constraint_value='half'), "constraint_value='half': use a number"),
    (dict(widths=(1, 2)), r'widths=\(1, 2\): give one number, or one for each of 1 routed stages.'),
    (dict(widths=0), 'widths=0: an expert is at least 1 channel wide.'),
    (dict(stages=(3, 4), widths=(5, -1)), r'widths=\(5, -1\): an expert is at least 1 channel wide.'),
    (dict(layer='conv', widths=3), "widths=3 is for layer='stage'"),
    (dict(layer='conv', residual=True), "residual=True is for layer='stage'"),
    (dict(avg_down=True), 'avg_down=True: the experts of a routed stage are plain ResNet blocks'),
    (dict(stem_type='deep', stages=()), 'small_stem=True has one 3 x 3 convolution'),
])
def test_bad_keywords_are_one_sentence(kwargs, message):
    with pytest.raises(InputError, match=message):
        timm.create_model('moe_resnet18_cifar', device='meta', **kwargs)


def test_options_of_timms_blocks_work_where_single_convolutions_are_routed():
    model = timm.create_model('moe_resnet18_cifar', layer='conv', avg_down=True, device='meta')
    assert model(torch.empty(1, 3, 32, 32, device='meta')).shape == (1, 100)
    assert isinstance(model.layer4[0], BasicBlock)
