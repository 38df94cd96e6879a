"""MoEClassificationTask: the auxiliary losses reach the gradient exactly once and at the right scale.

Every mechanism is checked against gradients written out here, and then with a task that drops, doubles or fails to
scale the auxiliary losses, which the same check must notice.
"""
import contextlib
import copy
import gc
import os

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from timm.layers import set_reentrant_ckpt
from timm.task import ClassificationTask
from timm.utils import NativeScaler
from torch import nn

from moe_zoo.engine import MoEClassificationTask, MoEMultiLabelClassificationTask
from moe_zoo.losses import auxiliary_losses
from moe_zoo.routing import SigmoidTopKRouter

IMPORTANCE, Z = 0.5, 0.1  # large, so that a wrong scale cannot hide
SCALE = 4.0  # every loss is multiplied by it before backward and every gradient divided after


def tiny_model(**kwargs) -> nn.Module:
    """Two blocks of width 16 on four patches, the second routed, without noise."""
    torch.manual_seed(0)
    keywords = dict(
        img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=4, num_selected=2,
        representation_size=0, num_classes=3, head_zero_init=False, noise_std=0.0, capacity_factor=None,
        group_images=4, losses={'importance': IMPORTANCE, 'z': Z})
    return timm.create_model('vmoe_vit_s', **{**keywords, **kwargs}).train()


def batch(images: int = 16):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, 16, 16, generator=generator), torch.randint(0, 3, (images,), generator=generator)


def reference_gradients(model: nn.Module, images: torch.Tensor, target: torch.Tensor) -> dict:
    """Gradients of cross-entropy + 0.5 * importance + 0.1 * z, both written out, on a copy of the model."""
    model = copy.deepcopy(model)
    model.set_aux_loss(True)
    output, routings = model(images)
    loss = F.cross_entropy(output, target)
    assert len(routings) == 1
    for routing in routings:
        gates = routing.gates.reshape(-1, 4 * 5, 4)  # groups of 4 images, 4 patches and a class token each; 4 experts
        importance = gates.sum(dim=1)
        mean = importance.mean(dim=1, keepdim=True)
        loss = loss + IMPORTANCE * (((importance - mean) ** 2).mean(dim=1) / mean.squeeze(1) ** 2).mean()
        loss = loss + Z * (routing.logits.exp().sum(dim=1).log() ** 2).mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Inject(torch.autograd.Function):
    """The loss as it is; in backward, a gradient of 1 for the extra one, whatever the loss is multiplied by."""

    @staticmethod
    def forward(ctx, loss, extra):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.ones_like(gradient)


class SabotagedTask(MoEClassificationTask):
    """The task with one of the faults that the tests must notice."""
    fault = None

    def forward(self, input, target):
        output = self.trainable_module(input)
        output, routings = output
        loss, extra = self.criterion(output, target), sum(auxiliary_losses(routings).values())
        if self.fault == 'doubled':
            loss = loss + 2 * extra
        elif self.fault == 'unscaled':
            loss = Inject.apply(loss, extra)
        return {'loss': loss, 'output': output}


def task_class(fault):
    return MoEClassificationTask if fault is None else type('Task', (SabotagedTask,), {'fault': fault})


FAULTS = [None, 'dropped', 'doubled', 'unscaled']


def check(found: dict, expected: dict, fault) -> None:
    """Gradients equal the expected ones; with a fault, they must not."""
    with contextlib.nullcontext() if fault is None else pytest.raises(AssertionError):
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f'{n}: {m}')


def gradients(model: nn.Module, scale: float = 1.0) -> dict:
    return {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('fault', FAULTS)
def test_plain(fault):
    model, (images, target) = tiny_model(), batch()
    expected = reference_gradients(model, images, target)
    task = task_class(fault)(model, verbose=False)
    (SCALE * task(images, target)['loss']).backward()
    check(gradients(model, SCALE), expected, fault)


@pytest.mark.parametrize('fault', FAULTS)
def test_accumulation(fault):
    """Two halves, each loss divided by two as timm does: the mean of the two reference gradients."""
    model, (images, target) = tiny_model(), batch()
    halves = [reference_gradients(model, images[i:i + 8], target[i:i + 8]) for i in (0, 8)]
    expected = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    task = task_class(fault)(model, verbose=False)
    for i in (0, 8):
        (task(images[i:i + 8], target[i:i + 8])['loss'] / 2).backward()
    check(gradients(model), expected, fault)


@pytest.mark.parametrize('fault', FAULTS)
def test_grad_scaler(fault):
    """timm's scaler multiplies the loss by 2^16 and divides the gradients before clipping (here at infinity)."""
    model, (images, target) = tiny_model(), batch()
    expected = reference_gradients(model, images, target)
    task = task_class(fault)(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scaler, loss = NativeScaler(device='cpu'), task(images, target)['loss']
    scaler(loss, optimizer, clip_grad=float('inf'), clip_mode='norm', parameters=model.parameters())
    check(gradients(model), expected, fault)


@pytest.mark.parametrize('reentrant', [False, True])
@pytest.mark.parametrize('fault', FAULTS)
def test_gradient_checkpointing(fault, reentrant):
    model, (images, target) = tiny_model(), batch()
    images.requires_grad_()  # re-entrant checkpointing wants an input that does
    expected = reference_gradients(model, images, target)
    model.set_grad_checkpointing(True)
    task = task_class(fault)(model, verbose=False)
    set_reentrant_ckpt(reentrant)
    try:
        (SCALE * task(images, target)['loss']).backward()
    finally:
        set_reentrant_ckpt(False)
    check(gradients(model, SCALE), expected, fault)


def test_compile():
    """One compiled model for all faults, which lie in the task outside of it."""
    model, (images, target) = tiny_model(), batch()
    expected = reference_gradients(model, images, target)
    compiled = None
    for fault in FAULTS:
        model.zero_grad()
        task = task_class(fault)(model, verbose=False)
        compiled = task.compile(backend='aot_eager') if compiled is None else compiled
        task.trainable_module = compiled
        result = task(images, target)
        assert isinstance(result['output'], torch.Tensor)
        (SCALE * result['loss']).backward()
        check(gradients(model, SCALE), expected, fault)


@pytest.mark.parametrize('fault', FAULTS)
def test_ema(fault):
    """One step of SGD at rate 0.1, then an average at decay 0.5: start - 0.5 * 0.1 * gradient.

    The copy is made after a forward, so nothing may be left on the model that cannot be copied.
    """
    model, (images, target) = tiny_model(), batch()
    expected = reference_gradients(model, images, target)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    task = task_class(fault)(model, verbose=False)
    task(images, target)
    task.setup_ema(decay=0.5)
    model.zero_grad()
    (SCALE * task(images, target)['loss']).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= SCALE
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    task.update_ema()
    averaged = dict(task.get_eval_model(ema=True).module.named_parameters())
    found = {name: (start[name] - averaged[name].detach()) / 0.05 for name in expected}
    with contextlib.nullcontext() if fault is None else pytest.raises(AssertionError):
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-5)


def _rank(rank: int, folder: str) -> None:
    """One of two gloo ranks: half of the batch, all faults in turn; rank 0 writes the gradients."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1')
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    images, target = batch()
    part = slice(8 * rank, 8 * rank + 8)
    found = {}
    for fault in FAULTS:
        model = tiny_model()
        task = task_class(fault)(model, verbose=False)
        task.prepare_distributed(device_ids=[torch.device('cpu')])  # as timm's train.py passes it, on CPU too
        (SCALE * task(images[part], target[part])['loss']).backward()
        found[fault] = gradients(model, SCALE)
    if rank == 0:
        torch.save(found, f'{folder}/gradients.pt')
    dist.destroy_process_group()


def test_two_ranks(tmp_path):
    """DDP averages over ranks: the mean of the two halves' reference gradients."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / 'gradients.pt', weights_only=True)
    model, (images, target) = tiny_model(), batch()
    halves = [reference_gradients(model, images[i:i + 8], target[i:i + 8]) for i in (0, 8)]
    expected = {name: (halves[0][name] + halves[1][name]) / 2 for name in halves[0]}
    for fault in FAULTS:
        check(found[fault], expected, fault)


def test_everything_is_named():
    """loss = task loss + every auxiliary loss; balance carries the layer's name in the model."""
    model, (images, target) = tiny_model(), batch()
    result = MoEClassificationTask(model, verbose=False)(images, target)
    assert set(result) == {'loss', 'output', 'task_loss', 'loss_importance', 'loss_z', 'balance'}
    total = result['task_loss'] + result['loss_importance'] + result['loss_z']
    torch.testing.assert_close(result['loss'].detach(), total)
    assert not result['loss_z'].requires_grad and result['loss'].requires_grad
    assert list(result['balance']) == ['blocks.1.mlp']
    share = result['balance']['blocks.1.mlp']['share']
    assert share.shape == (4,) and float(share.sum()) == pytest.approx(1.0)


def test_naming_the_layers_changes_nothing():
    """The forward that finds the names is in evaluation: modes, buffers and random state stay."""
    model, (images, _) = tiny_model(proj_drop_rate=0.1), batch()
    model.blocks[0].eval()  # frozen by a user
    task = MoEClassificationTask(model, verbose=False)
    state = torch.get_rng_state()
    task._name_layers(images)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and not model.blocks[0].training and model.blocks[1].training


def test_records_only_in_training():
    model, (images, _) = tiny_model(), batch()
    MoEClassificationTask(model, verbose=False)
    assert isinstance(model(images), tuple)
    assert isinstance(model.eval()(images), torch.Tensor)


def test_dense_model_trains_as_under_timm():
    torch.manual_seed(0)
    model = timm.create_model('test_vit', num_classes=3).train()
    images, target = torch.randn(2, 3, 160, 160), torch.tensor([0, 2])
    theirs = ClassificationTask(model, verbose=False)(images, target)
    ours = MoEClassificationTask(model, verbose=False)(images, target)
    assert torch.equal(ours['loss'], theirs['loss']) and torch.equal(ours['output'], theirs['output'])
    assert ours['balance'] == {} and not [name for name in ours if name.startswith('loss_')]


def test_multi_label():
    model, (images, _) = tiny_model(), batch()
    result = MoEMultiLabelClassificationTask(model, verbose=False)(images, torch.ones(16, 3))
    total = result['task_loss'] + result['loss_importance'] + result['loss_z']
    torch.testing.assert_close(result['loss'].detach(), total)


def test_adaptive_routers_are_told_of_steps():
    """The selection bias moves once per optimiser step of this model, whatever the loop; 0.25 at most per step here."""
    model = tiny_model(router='sigmoid', router_args={'bias_rate': 0.25}, losses={})
    images, target = batch()
    router = next(m for m in model.modules() if isinstance(m, SigmoidTopKRouter))
    task = MoEClassificationTask(model, verbose=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.0)

    task(images[:8], target[:8])['loss'].backward()
    other.step()
    bias, load = router.constraint.selection_bias, router.constraint.load
    assert not bias.any() and int(load.sum()) == 8 * 5 * 2  # 8 images, 5 tokens, 2 experts

    scaler = NativeScaler(device='cpu')
    scaler(task(images[8:], target[8:])['loss'], optimizer)
    assert int(load.sum()) == 0
    assert set(bias.abs().tolist()) <= {0.0, 0.25} and bias.any()


def test_hook_goes_with_the_model():
    """Nothing of a deleted model stays in torch's optimisers."""
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks
    gc.collect()  # models of other tests that wait to be deleted have hooks of their own
    before = len(hooks)
    task = MoEClassificationTask(tiny_model(router='sigmoid', losses={}), verbose=False)
    assert len(hooks) == before + 1
    del task
    gc.collect()
    assert len(hooks) == before
