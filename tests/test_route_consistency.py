"""Training on two views whose patches shall take the same routes: the task, the options, whole runs."""
import csv
import os

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing
from image_folders import write_images
from torch.nn import functional as F

from moe_zoo.data import Grid, match_items, pair_up, random_views
from moe_zoo.data.random_state import seed_stream
from moe_zoo.engine import RouteConsistencyTask
from moe_zoo.engine.config import load_config
from moe_zoo.engine.consistency import route_consistency
from moe_zoo.engine.data import create_loaders, open_dataset
from moe_zoo.engine.train import main, train
from moe_zoo.errors import InputError
from moe_zoo.losses import jsd_loss, prc_loss
from moe_zoo.routing import Routing

LOSSES = {'importance': 0.5, 'z': 0.1}
MODEL = dict(
    patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=4, num_selected=2,
    representation_size=0)


def tiny_model(**kwargs):
    torch.manual_seed(0)
    keywords = dict(
        MODEL, img_size=32, num_classes=3, head_zero_init=False, capacity_factor=None, losses=LOSSES, noise_std=0.0)
    return timm.create_model('vmoe_vit_s', **{**keywords, **kwargs}).train()


def batch(images: int = 8):
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(images, 3, 32, 32, generator=generator)
    return pair_up(random_views(pictures, generator=generator), torch.randint(0, 3, (images,), generator=generator))


def reference(model, images, target, kind):
    """Cross entropy of both views, the consistency loss and what is left of the auxiliary ones, written out."""
    model.set_aux_loss(True)
    output, (routing,) = model(images)
    pairs = match_items(target.maps, target.areas, (32, 32), Grid(4, 4, 1))
    loss = F.cross_entropy(output, target.targets) + 0.1 * routing.logits.logsumexp(dim=1).square().mean()
    if kind == 'prc':
        return loss + prc_loss(routing, pairs, 5.0, 50.0)
    gates = routing.gates.view(-1, 8 * 17, 4).sum(dim=1)  # groups of 8 images
    importance = (gates.var(dim=1, correction=0) / gates.mean(dim=1) ** 2).mean()
    return loss + 3.0 * jsd_loss(routing, pairs) + 0.5 * importance


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


WEIGHTS = {'jsd': (3.0,), 'prc': (5.0, 50.0)}  # large, so that a wrong scale cannot hide


@pytest.mark.parametrize('kind', WEIGHTS)
def test_gradient_of_the_task(kind):
    """And what it is the sum of, by name: with prc the losses that balance are gone, and others stay."""
    model, (images, target) = tiny_model(), batch()
    loss = reference(model, images, target, kind)
    loss.backward()
    expected = gradients(model)
    model.zero_grad()
    result = RouteConsistencyTask(model, loss=kind, weights=WEIGHTS[kind], verbose=False)(images, target)
    names = {name for name in result if name.startswith('loss_')}
    assert names == {f'loss_{kind}', 'loss_z'} | ({'loss_importance'} if kind == 'jsd' else set())
    torch.testing.assert_close(result['loss'], loss)
    torch.testing.assert_close(result['loss'].detach(), result['task_loss'] + sum(result[name] for name in names))
    assert result['balance'].keys() == {'blocks.1.mlp'} and result['output'].shape == (16, 3)
    result['loss'].backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    # The router hears of it: without the loss its gradient is another one.
    model.zero_grad()
    RouteConsistencyTask(model, loss='jsd', weights=(0,), verbose=False)(images, target)['loss'].backward()
    assert not torch.allclose(gradients(model)['blocks.1.mlp.router.weight'], expected['blocks.1.mlp.router.weight'])


def test_class_tokens_can_be_left_out():
    """Of 17 tokens an image the first has no counterpart then."""
    model, (images, target) = tiny_model(), batch()
    found = {}
    for match_prefix in (True, False):
        model.set_aux_loss(True)
        _, (routing,) = model(images)
        pairs = match_items(target.maps, target.areas, (32, 32), Grid(4, 4, 1), match_prefix)
        assert bool((pairs[:, :, 0] >= 0).any()) == match_prefix
        task = RouteConsistencyTask(model, weights=(1,), match_prefix=match_prefix, verbose=False)
        found[match_prefix] = task(images, target)['loss_jsd']
        torch.testing.assert_close(found[match_prefix], jsd_loss(routing, pairs).detach())
    assert found[True] != found[False]


def test_evaluation_is_the_plain_loss():
    model, (images, target) = tiny_model(), batch()
    task = RouteConsistencyTask(model, verbose=False).eval()
    result = task(images, target)
    torch.testing.assert_close(result['loss'], F.cross_entropy(model(images), target.targets))


def test_gradient_checkpointing_keeps_it():
    found = []
    for checkpointing in (False, True):
        model, (images, target) = tiny_model(), batch()
        model.set_grad_checkpointing(checkpointing)
        RouteConsistencyTask(model, loss='prc', verbose=False)(images, target)['loss'].backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def _rank(rank: int, folder: str) -> None:
    """One of two gloo ranks: half of the images, both of their views."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR='127.0.0.1')
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    images, target = batch(16)
    task = RouteConsistencyTask(tiny_model(), loss='prc', weights=WEIGHTS['prc'], verbose=False)
    task.prepare_distributed(device_ids=[torch.device('cpu')])
    task(*part_of(images, target, rank))['loss'].backward()
    if rank == 0:
        torch.save(gradients(task.trainable_module.module), f'{folder}/gradients.pt')
    dist.destroy_process_group()


def part_of(images, target, rank):
    mine = torch.arange(8 * rank, 8 * rank + 8)
    both = torch.cat([mine, 16 + mine])
    return images[both], type(target)(target.targets[both], target.maps[mine], target.areas[mine])


@pytest.mark.slow
def test_two_ranks(tmp_path):
    """DDP averages over the ranks, each of which counts its own pairs."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / 'gradients.pt', weights_only=True)
    images, target = batch(16)
    halves = []
    for rank in (0, 1):
        model = tiny_model()
        reference(model, *part_of(images, target, rank), 'prc').backward()
        halves.append(gradients(model))
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, (halves[0][name] + halves[1][name]) / 2, rtol=1e-4, atol=1e-6)


def test_every_layer_adds_a_term_on_its_own_grid():
    """Maps of 4 x 4 and, after a stride, 2 x 2, and tokens; one decision an image is left as it is."""
    _, target = batch(3)
    shapes = {(6, 4, 4): Grid(4, 4), (6, 2, 2): Grid(2, 2), (6, 17): Grid(4, 4, 1), (6,): None}
    records, expected = [], 0.
    for shape, grid in shapes.items():
        logits = torch.randn(torch.Size(shape).numel(), 8)
        records.append(Routing(logits, logits, logits, shape=shape))
        if grid is not None:
            expected = expected + jsd_loss(records[-1], match_items(target.maps, target.areas, (32, 32), grid))
    torch.testing.assert_close(route_consistency(records, target, (32, 32), weights=(1,)), expected)
    torch.testing.assert_close(route_consistency(records, target, (32, 32)), 0.01 * expected)
    with pytest.raises(InputError, match='route_consistency=jsd: no routed layer with patches was active'):
        route_consistency(records[-1:], target, (32, 32))
    with pytest.raises(InputError, match=r'shape \(6, 14\) has no grid of patches over an image of 32 x 32'):
        route_consistency([Routing(logits, logits, logits, shape=(6, 14))], target, (32, 32))


RECIPE = dict(
    model='vmoe_vit_s', model_kwargs=MODEL, img_size=16, workers=0, opt='adamw', lr=1e-2, epochs=1, warmup_epochs=0,
    device='cpu', log_interval=1000)
DIGITS = dict(RECIPE, dataset='digits', batch_size=360, aa='rand-m5-n2', crop_pct=1.0)


def rows_of(folder):
    with open(folder / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize('kind, names', [
    ('jsd', ['loss', 'task_loss', 'loss_importance', 'loss_vmoe_load', 'loss_jsd']),
    ('prc', ['loss', 'task_loss', 'loss_prc'])])
def test_training_on_digits(kind, names, tmp_path, capsys):
    """The command line, RandAugment and all: the loss is in the log by name, above 0, and the sum of its parts."""
    options = [f'{name}={value}' for name, value in DIGITS.items() if name != 'model_kwargs']
    options += [f'model_kwargs.{name}={value}' for name, value in MODEL.items()]
    flags = ['--route-consistency', kind, f'output={tmp_path}', 'experiment=run']
    assert main([*flags, *options]) == 0
    row, = rows_of(tmp_path / 'run')
    assert [name.removeprefix('train_') for name in row if name.startswith('train_')] == names
    assert float(row['train_loss']) == pytest.approx(sum(float(row[f'train_{name}']) for name in names[1:]), rel=1e-5)
    assert float(row[f'train_loss_{kind}']) > 0 and float(row['eval_top1']) > 0
    assert f'{kind} 0.0' in capsys.readouterr().out
    assert f'route_consistency: {kind}' in (tmp_path / 'run' / 'args.yaml').read_text()


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """52 training and 12 evaluation images of two classes, dark and bright, in folders."""
    return write_images(tmp_path_factory.mktemp('images'), {'train': 26, 'validation': 6})


def run(images, folder, resume=None, **options):
    recipe = dict(RECIPE, batch_size=8, epochs=2, data_dir=str(images), route_consistency='jsd')
    return train({**recipe, **options}, output=folder, resume=resume, quiet=True)


def first_batch(images, **options):
    """What the loop gets of the training loader, before the device."""
    args = load_config(dict(
        RECIPE, batch_size=8, data_dir=str(images), route_consistency='jsd', num_classes=2, **options))
    args.distributed, args.world_size = False, 1
    config = dict(input_size=(3, 16, 16), mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.3), interpolation='bilinear',
                  crop_pct=1.0, crop_mode='center')
    loader = create_loaders(args, config, open_dataset(args, True), None, torch.device('cpu')).train
    seed_stream(0, 0)
    return next(iter(loader))


def test_loaders_with_and_without_the_prefetcher(images):
    """The same views and maps; standardised in another order, and so up to rounding."""
    (views, target), (others, other) = (first_batch(images, no_prefetcher=off, aa='rand-m9') for off in (False, True))
    torch.testing.assert_close(views, others, rtol=0, atol=1e-4)
    assert all(torch.equal(field, same) for field, same in zip(target, other))


def test_training_without_the_prefetcher(images, tmp_path):
    row, = run(images, tmp_path, epochs=1, no_prefetcher=True)['history']
    assert row['train_loss_jsd'] > 0


@pytest.mark.parametrize('options', [
    pytest.param(dict(workers=2), id='worker processes'),
    pytest.param(dict(no_prefetcher=True, route_consistency='prc', model_ema=True), id='no prefetcher')])
def test_resumed_inside_an_epoch_is_uninterrupted(images, tmp_path, options):
    """From the recovery checkpoint after update 2 of 3 in epoch 2 (6 batches, 2 an update): to the last bit."""
    options = dict(grad_accum_steps=2, recovery_interval=2, reprob=0.3, aa='rand-m5', hflip=0.3, **options)
    whole = run(images, tmp_path / 'whole', **options)
    kept = sorted((tmp_path / 'whole').glob('recovery-1-*'))
    assert [path.name for path in kept] == ['recovery-1-3.pth.tar']
    parts = run(images, tmp_path / 'parts', resume=kept[0], **options)
    plain = [{k: v for k, v in result['history'][-1].items() if k != 'seconds'} for result in (whole, parts)]
    assert plain[0] == plain[1]
    one, other = (torch.load(tmp_path / name / 'last.pth.tar', weights_only=True) for name in ('whole', 'parts'))
    for key in {'state_dict', 'state_dict_ema'} & set(one):
        assert all(torch.equal(value, other[key][name]) for name, value in one[key].items())


def test_batch_size_counts_images(images):
    """Batches of 8 images are 16 views; view 2 of image i stands 8 places after view 1, with its target."""
    views, target = first_batch(images)
    assert views.shape == (16, 3, 16, 16) and target.maps.shape == (8, 2, 3, 3)
    assert torch.equal(target.targets[:8], target.targets[8:]) and len(target.targets) == 16
    brightness, dark = views.mean(dim=(1, 2, 3)), target.targets == 1  # bright images are of class 0
    assert brightness[dark].max() < brightness[~dark].min()


@pytest.mark.parametrize('options, message', [
    (dict(mixup=0.2), 'mixup=0.2 with route_consistency=jsd: mixed images have no patches that correspond; leave one'),
    (dict(cutmix=1.0), 'cutmix=1.0 with route_consistency=jsd: mixed images'),
    (dict(aug_splits=3), 'aug_splits=3 with route_consistency=jsd: two views take the place of splits'),
    (dict(no_aug=True), 'no_aug=True with route_consistency=jsd: two equal views'),
    (dict(train_crop_mode='rkrr'), 'train_crop_mode=rkrr with route_consistency=jsd: its views are'),
    (dict(aa='augmix-m5'), 'aa=augmix-m5 with route_consistency=jsd: where pixels go cannot be followed'),
    (dict(view_areas=[0.1, 0.5, 0.6]), r'view_areas=.* give two ranges of shares'),
    (dict(route_consistency_weight=[1, 2]), r'weight=\[1.0, 2.0\] with route_consistency=jsd: give one'),
    (dict(route_consistency='prc', route_consistency_weight=[1]), 'route_consistency=prc: give two numbers'),
    (dict(route_consistency=None, route_consistency_weight=[1]), r'weight=\[1.0\]: say also route_consistency=jsd or'),
    (dict(route_consistency='jds'), "route_consistency='jds': use jsd or prc. Did you mean 'jsd'?"),
    (dict(model='condconv_mobilenetv1_025', model_kwargs={}), 'decides once an image: leave the option'),
    (dict(model='test_vit', model_kwargs={}, img_size=160), "'test_vit' routes nothing: leave the option out, or"),
])
def test_refused(images, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        run(images, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_no_twin(images, tmp_path):
    from moe_zoo.engine.compare import run_all
    with pytest.raises(InputError, match='route_consistency=prc with a dense twin, which has no routes: leave --twin'):
        run_all(dict(RECIPE, data_dir=str(images), output=str(tmp_path)), {'route_consistency': 'prc'}, twin=True)
