"""The training loop: what a run writes, resuming to the last bit, warnings, seeds and twin, torchrun."""
import csv
import json
import os
import resource
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
import yaml
from image_folders import write_images

from moe_zoo.data.random_state import get_random_state, iterate_apart, seed_stream, set_random_state
from moe_zoo.engine import compare
from moe_zoo.engine.checkpoint import read_checkpoint, save_atomically
from moe_zoo.engine.config import load_config
from moe_zoo.engine.log import BalanceWatch, EpochLog, describe_losses, duration
from moe_zoo.engine.outcomes import read_outcomes
from moe_zoo.engine.train import newest_checkpoint, train
from moe_zoo.errors import InputError
from moe_zoo.resources import folder

# Two blocks of width 16 on four patches, the second routed; dropout and router noise draw random numbers.
MODEL = dict(
    patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=4, num_selected=2,
    representation_size=0, proj_drop_rate=0.1)
RECIPE = dict(
    model='vmoe_vit_s', model_kwargs=MODEL, img_size=16, batch_size=8, workers=0, opt='adamw', lr=1e-2, epochs=2,
    warmup_epochs=1, device='cpu', checkpoint_hist=2, log_interval=1000)


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """52 training and 12 evaluation images of two classes, dark and bright, in folders."""
    return write_images(tmp_path_factory.mktemp('images'), {'train': 26, 'validation': 6})


def run(images, folder, resume=None, **options):
    return train({**RECIPE, 'data_dir': str(images)}, options, output=folder, resume=resume, quiet=True)


def test_what_a_run_leaves(images, tmp_path):
    """CSV with every loss and the balance by layer, TensorBoard, options, and checkpoints that need no code to read."""
    seen = []
    result = train({**RECIPE, 'data_dir': str(images)}, output=tmp_path, quiet=True, on_epoch=seen.append)
    with open(tmp_path / 'summary.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['epoch'] for row in rows] == ['0', '1']
    assert list(rows[0]) == [
        'epoch', 'train_loss', 'train_task_loss', 'train_loss_importance', 'train_loss_vmoe_load', 'eval_loss',
        'eval_top1', 'eval_top5', 'lr', 'balance_blocks.1.mlp', 'dropped_blocks.1.mlp', 'seconds']
    parts = sum(float(rows[1][f'train_{name}']) for name in ('task_loss', 'loss_importance', 'loss_vmoe_load'))
    assert float(rows[1]['train_loss']) == pytest.approx(parts, rel=1e-6)
    assert seen == result['history'] and result['top1'] == seen[-1]['eval_top1'] and result['epochs'] == 2
    assert list((tmp_path / 'tensorboard').glob('events*'))
    options = yaml.safe_load((tmp_path / 'args.yaml').read_text())
    assert options['num_classes'] == 2 and options['model_kwargs'] == MODEL  # 2: from the folders
    assert vars(load_config(options))  # every line of it is an option again

    checkpoint = torch.load(tmp_path / 'last.pth.tar', weights_only=True)  # refuses anything that needs code
    assert checkpoint['epoch'] == 1 and checkpoint['args']['model'] == 'vmoe_vit_s'
    written = {path.name for path in tmp_path.glob('*.pth.tar')}
    assert written == {'last.pth.tar', 'model_best.pth.tar', 'checkpoint-0.pth.tar', 'checkpoint-1.pth.tar'}
    assert not list(tmp_path.glob('.*.part'))
    assert result['parameters'] == sum(v.numel() for k, v in checkpoint['state_dict'].items())


def exact(rows):
    """Everything but the time, bit for bit."""
    return [{name: value for name, value in row.items() if name != 'seconds'} for row in rows]


HARD = dict(
    model_ema=True, model_ema_decay=0.9, grad_accum_steps=4, sched_on_updates=True, mixup=0.2, cutmix=0.5, reprob=0.3,
    drop=0.1, epochs=3, aa='rand-m5')  # 52 images are 6 batches of 8, so that the last accumulation has 2 parts


@pytest.mark.parametrize('options', [
    pytest.param(dict(HARD), id='one process'),
    pytest.param(dict(HARD, workers=2), id='worker processes'),
    pytest.param(dict(HARD, no_prefetcher=True, mixup_off_epoch=2), id='mixup in the loop'),
    pytest.param(dict(HARD, amp=True, grad_checkpointing=True, clip_grad=1.0), id='bfloat16 and checkpointing'),
    pytest.param({'model_kwargs.router': 'sigmoid', 'model_kwargs.router_args': {'bias_rate': 0.01}, 'opt': 'sgd',
                  'epochs': 3}, id='router with buffers'),
])
def test_resumed_run_is_the_uninterrupted_one(images, tmp_path, options):
    """Stopped after one of three epochs and continued: the same losses, metrics and weights to the last bit."""
    whole = run(images, tmp_path / 'whole', **options)
    run(images, tmp_path / 'parts', stop_epoch=1, **options)
    # Something else happens between the two processes.
    torch.rand(10), np.random.rand(10)
    parts = run(images, tmp_path / 'parts', resume='auto', **options)
    assert exact(parts['history']) == exact(whole['history']) and len(whole['history']) == 3
    one, other = (read_checkpoint(tmp_path / name / 'last.pth.tar') for name in ('whole', 'parts'))
    keys = [key for key in ('state_dict', 'state_dict_ema') if key in one]
    assert len(keys) == 1 + bool(options.get('model_ema'))
    for key in keys:
        for name, value in one[key].items():
            assert torch.equal(value, other[key][name]), f'{key} {name}'
    if options.get('opt') == 'sgd':
        assert any('selection_bias' in name and value.any() for name, value in one['state_dict'].items())
    # The comparison can fail: another seed gives other losses.
    another = run(images, tmp_path / 'another', seed=1, stop_epoch=1, **options)
    assert another['history'][0]['train_loss'] != whole['history'][0]['train_loss']


@pytest.mark.parametrize('workers', [0, 2])
def test_resuming_inside_an_epoch(images, tmp_path, workers):
    """From a recovery checkpoint after update 4 of 6 in epoch 2: the rest of it, and its mean loss, are the same."""
    options = dict(epochs=2, workers=workers, recovery_interval=2, reprob=0.3)
    whole = run(images, tmp_path / 'whole', **options)
    kept = sorted((tmp_path / 'whole').glob('recovery-*'))
    assert [path.name for path in kept] == ['recovery-1-3.pth.tar', 'recovery-1-5.pth.tar']
    parts = run(images, tmp_path / 'parts', resume=kept[0], **options)
    assert exact(parts['history'])[-1] == exact(whole['history'])[-1]


def test_resume_auto_takes_the_newest_checkpoint(images, tmp_path):
    """A run killed inside an epoch goes on from there: not from the epoch's start, and not anew in the first one."""
    options = dict(epochs=2, recovery_interval=2)
    whole = run(images, tmp_path / 'whole', **options)
    for epoch in (0, 1):
        folder = tmp_path / f'killed-{epoch}'
        run(images, folder, stop_epoch=epoch + 1, **options)
        for path in folder.glob('*.pth.tar'):  # as if killed after update 6 of 6, before the epoch was evaluated
            if path.name != f'recovery-{epoch}-5.pth.tar' and (epoch == 0 or path.name != 'checkpoint-0.pth.tar'):
                path.unlink()
        if epoch == 1:
            (folder / 'checkpoint-0.pth.tar').rename(folder / 'last.pth.tar')
        recovery = folder / f'recovery-{epoch}-5.pth.tar'
        assert newest_checkpoint(folder) == recovery
        parts = run(images, folder, resume='auto', **options)
        assert exact(parts['history'])[-1] == exact(whole['history'])[-1]
        assert newest_checkpoint(folder) == folder / 'last.pth.tar'
    with pytest.raises(InputError, match='already holds a run'):
        folder = tmp_path / 'recovery only'
        folder.mkdir()
        (folder / 'recovery-0-1.pth.tar').touch()
        run(images, folder, **options)


def test_inside_an_epoch_the_processes_must_be_as_many(images, tmp_path):
    """Their random states are part of such a checkpoint; the end of an epoch takes any number."""
    run(images, tmp_path, epochs=1, recovery_interval=2)
    for name, refused in (('recovery-0-3.pth.tar', True), ('last.pth.tar', False)):
        state = read_checkpoint(tmp_path / name)
        if refused:
            state['moe_zoo'].update(random=state['moe_zoo']['random'] * 2, logs=state['moe_zoo']['logs'] * 2)
        torch.save(state, tmp_path / f'two-{name}')
        with pytest.raises(InputError, match='by 2 processes, and this is a run of 1') if refused else nullcontext():
            run(images, tmp_path / f'again-{name}', epochs=2, resume=tmp_path / f'two-{name}')


def test_broken_weights_are_not_kept(images, tmp_path, monkeypatch):
    """Every loss of an epoch was finite, its last update was not: the checkpoint of the epoch before stays the last."""
    run(images, tmp_path, epochs=3, stop_epoch=1)
    before = (tmp_path / 'last.pth.tar').read_bytes()
    step, taken = torch.optim.AdamW.step, []

    def breaking_step(self, *args, **kwargs):
        step(self, *args, **kwargs)
        taken.append(self)
        if len(taken) == 6:  # the last of the epoch
            self.param_groups[0]['params'][0].data.fill_(float('nan'))

    monkeypatch.setattr(torch.optim.AdamW, 'step', breaking_step)
    with pytest.raises(InputError, match='not finite .* after step 6 of 6 in epoch 2; .* last good checkpoint is'):
        run(images, tmp_path, resume='auto', epochs=3)
    assert (tmp_path / 'last.pth.tar').read_bytes() == before


def test_resume_auto_without_a_checkpoint_starts(images, tmp_path):
    assert run(images, tmp_path / 'new', resume='auto', epochs=1)['epochs'] == 1
    # A finished run has nothing left to do, and says what it had.
    again = run(images, tmp_path / 'new', resume='auto', epochs=1)
    assert len(again['history']) == 1 and again['top1'] is not None


def test_a_run_is_not_overwritten(images, tmp_path):
    run(images, tmp_path, epochs=1)
    with pytest.raises(InputError, match='already holds a run: add --resume to continue it'):
        run(images, tmp_path, epochs=1)


def test_milestones_and_evaluation_interval(images, tmp_path):
    result = run(images, tmp_path, epochs=3, val_interval=3, save_epochs=[1])
    assert (tmp_path / 'milestone-1.pth.tar').is_file()
    assert ['eval_top1' in row for row in result['history']] == [True, False, True]  # 1: milestone, 3: interval


def test_nan_stops_and_keeps_the_last_good_checkpoint(images, tmp_path):
    """One good epoch, then a learning rate that overflows."""
    run(images, tmp_path, epochs=3, stop_epoch=1)
    before = (tmp_path / 'last.pth.tar').read_bytes()
    with pytest.raises(InputError) as error:
        run(images, tmp_path, resume='auto', epochs=3, lr=1e-2, no_resume_opt=True, opt='sgd', **{
            'opt_kwargs': {}, 'lr_base': 1.0, 'sched': 'constant', 'warmup_epochs': 0, 'weight_decay': 1e38})
    message = str(error.value)
    assert 'not finite' in message and 'in epoch 2' in message and 'step ' in message
    assert f"The last good checkpoint is '{tmp_path / 'last.pth.tar'}'" in message
    assert (tmp_path / 'last.pth.tar').read_bytes() == before


def test_full_disk_leaves_the_old_file(tmp_path):
    """A limit on the size of files fails the write as a full disk does (EFBIG instead of ENOSPC)."""
    path = tmp_path / 'last.pth.tar'
    save_atomically({'weights': torch.zeros(10)}, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(InputError, match=f"No space left to write '{path}'.*what was there before is intact"):
            save_atomically({'weights': torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_warns_of_an_expert_without_work(images, tmp_path):
    """Expert 0 of 4 can never be chosen (selection bias -10, frozen): named once in two epochs."""
    keywords = {**MODEL, 'router': 'sigmoid', 'router_args': {'bias_rate': 0.0}}
    model = timm.create_model('vmoe_vit_s', img_size=16, num_classes=2, **keywords)
    with torch.no_grad():
        model.blocks[1].mlp.router.constraint.selection_bias[0] = -10.0
    torch.save(model.state_dict(), tmp_path / 'start.pth')
    result = run(images, tmp_path / 'run', model_kwargs=keywords, initial_checkpoint=str(tmp_path / 'start.pth'))
    told = [text for text in result['warnings'] if 'expert' in text]
    assert len(told) == 1
    assert told[0].startswith(
        "Layer 'blocks.1.mlp': expert 0 of 4 got less than a tenth of the fair share of 25.00% in epoch 1")
    assert 'raise the weights of its balance losses' in told[0]


def test_warns_where_nothing_routes(images, tmp_path):
    result = run(images, tmp_path, model_kwargs={**MODEL, 'moe_layers': []})
    assert [text for text in result['warnings'] if 'No routed layer is active' in text and 'vmoe_vit_s' in text]
    assert len(result['warnings']) == 1


def test_balance_watch():
    """0.02 of four experts' fair 0.25 is less than a tenth; 0.03 is not. Each layer is named once."""
    watch = BalanceWatch('m')
    starved, fed = torch.tensor([0.02, 0.4, 0.4, 0.18]), torch.tensor([0.03, 0.4, 0.4, 0.17])
    assert len(watch.check({'a': {'share': starved}, 'b': {'share': fed}}, True)) == 1
    assert watch.check({'a': {'share': starved}}, True) == []
    assert 'expert 0 of 4' in watch.check({'b': {'share': starved}}, True)[0]
    assert 'forward returned no routing records' in watch.check({}, True)[0]


def test_epoch_log_weighs_by_images():
    """Losses 1 on 3 images and 5 on 1: mean (3 * 1 + 1 * 5) / 4 = 2."""
    log = EpochLog()
    for value, count in ((1.0, 3), (5.0, 1)):
        log.add({'loss': torch.tensor(value), 'task_loss': torch.tensor(value), 'balance': {}}, count)
    assert log.means() == {'loss': 2.0, 'task_loss': 2.0}
    assert describe_losses(log.means()) == 'loss 2'
    text = describe_losses({'loss': 1.25, 'task_loss': 1.0, 'loss_importance': 0.25})
    assert text == 'loss 1.25 = task 1 + importance 0.25'
    assert (duration(75), duration(4000)) == ('1:15', '1:06:40')


def test_data_do_not_move_with_what_the_model_draws():
    """The same batches whether or not the caller draws between them, and the caller's stream is untouched."""
    def batches():
        for _ in range(3):
            yield float(torch.rand(())), float(np.random.rand())

    seed_stream(0, 0)
    quiet = list(iterate_apart(batches(), seed=5, epoch=2))
    expected = torch.rand(2)
    seed_stream(0, 0)
    loud, drawn = [], []
    for batch in iterate_apart(batches(), seed=5, epoch=2):
        loud.append(batch)
        drawn.append(float(torch.rand(())))
    assert loud == quiet and drawn[:2] == expected.tolist()
    assert list(iterate_apart(batches(), seed=5, epoch=3)) != quiet
    state = get_random_state()
    first = float(torch.rand(())), np.random.rand()
    set_random_state(state)
    assert (float(torch.rand(())), np.random.rand()) == first


def test_twin_sees_the_same_batches(images, tmp_path, monkeypatch):
    """Model and twin are trained on equal images and targets; the file has the paired difference."""
    monkeypatch.setattr(compare, 'card', lambda name: {'twin': 'vit_base_patch32_224', 'twin_args': {'embed_dim': 512}})
    drawn = []
    from moe_zoo.engine.task import MoEClassificationTask
    forward = MoEClassificationTask.forward

    def remember(self, input, target):
        drawn.append((input.clone(), target.clone()))
        return forward(self, input, target)

    monkeypatch.setattr(MoEClassificationTask, 'forward', remember)
    options = dict(output=str(tmp_path), experiment='both', epochs=1, aa='rand-m5', reprob=0.3)
    results = compare.run_all({**RECIPE, 'data_dir': str(images)}, options, seeds=[0, 1], twin=True)
    assert len(drawn) == 4 * 6  # two seeds, model and twin, six batches
    for first in (0, 12):
        for (image, target), (other, other_target) in zip(drawn[first:first + 6], drawn[first + 6:first + 12]):
            assert torch.equal(image, other) and torch.equal(target, other_target)
    assert not torch.equal(drawn[0][0], drawn[12][0])
    assert len(results['model']) == len(results['twin']) == 2
    assert not any('routed layer' in text for run in results['twin'] for text in run['warnings'])
    filed = json.loads((tmp_path / 'both' / 'results.json').read_text())
    assert filed['twin'][0]['macs'] < filed['model'][0]['macs'] and filed['versions']['timm'] == timm.__version__
    differences = compare.paired(results, 'top1')
    assert differences == [a['top1'] - b['top1'] for a, b in zip(results['model'], results['twin'])]


def test_twin_keeps_the_keywords_it_knows(monkeypatch):
    """A timm ResNet-18 takes the stem width of the recipe and no number of experts."""
    monkeypatch.setattr(compare, 'card', lambda name: {'twin': 'resnet18'})
    args = load_config({'model': 'condconv_resnet18', 'model_kwargs': {'num_experts': 4, 'stem_width': 32}})
    assert compare.twin_options(args) == {'model': 'resnet18', 'model_kwargs': {'stem_width': 32}}


def test_the_twin_of_every_recipe_is_built():
    """Also where the card's keywords of the twin are options of the tool, such as global_pool of Soft MoE's."""
    from moe_zoo.cards import card
    from moe_zoo.engine.build import model_keywords
    for recipe in RECIPES:
        args = load_config(recipe)
        if 'twin' in card(args.model) and not args.route_consistency:
            twin = load_config(recipe, compare.twin_options(args))
            model = timm.create_model(device='meta', **model_keywords(twin))
            assert sum(p.numel() for p in model.parameters()) > 0, recipe


def test_mean_and_deviation():
    """1, 2, 3: mean 2, sample deviation sqrt((1 + 0 + 1) / 2) = 1."""
    assert compare.mean_and_deviation([1.0, 2.0, 3.0]) == '2 +- 1'
    assert compare.mean_and_deviation([98.125]) == '98.12'


def test_learning_rate_from_the_batch():
    """lr = lr_base * batch * accumulation / 256 for SGD, with the square root for AdamW."""
    from moe_zoo.engine.build import build_optimizer
    model = torch.nn.Linear(2, 2)
    for opt, expected in (('sgd', 0.1 * 2), ('adamw', 0.1 * 2 ** 0.5)):
        args = load_config({'opt': opt, 'batch_size': 64, 'grad_accum_steps': 8})
        args.world_size = 1
        assert build_optimizer(args, model).param_groups[0]['lr'] == pytest.approx(expected)


def test_digits(tmp_path):
    """The embedded data set needs no folder; eight updates learn something."""
    pytest.importorskip('sklearn')
    options = dict(dataset='digits', val_split='test', epochs=1, batch_size=180, hflip=0.0)
    result = train(RECIPE, options, output=tmp_path, quiet=True)
    assert result['top1'] is not None and result['history'][0]['train_loss'] < 2.5


@pytest.mark.slow
def test_torchrun(images, tmp_path, repository):
    """Two gloo ranks, accumulation, EMA and resume: half of the batches each, one log, one set of checkpoints."""
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(yaml.safe_dump({**RECIPE, 'data_dir': str(images), 'batch_size': 4, 'output': str(tmp_path)}))
    environment = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(repository))
    command = [
        sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=0', '--nnodes=1',
        '--rdzv_backend=c10d', '--rdzv_endpoint=localhost:0', '-m', 'moe_zoo.engine.train', '--config', str(recipe),
        'experiment=run', 'model_ema=true', 'grad_accum_steps=2', 'recovery_interval=2']
    for stop in (['stop_epoch=1'], ['--resume']):
        done = subprocess.run(command + stop, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert '2 processes' in done.stdout and 'continuing from' in done.stdout
    with open(tmp_path / 'run' / 'summary.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [row['epoch'] for row in rows] == ['0', '1'] and float(rows[1]['eval_ema_top1']) >= 0
    kept = read_outcomes(tmp_path / 'run' / 'outcomes.json')  # of both ranks, in the order of the data
    assert kept.images == sorted(kept.images) and len(set(kept.images)) == len(kept)
    assert 100 * kept.right.mean() == pytest.approx(float(rows[1]['eval_ema_top1']))
    assert torch.load(tmp_path / 'run' / 'last.pth.tar', weights_only=True)['epoch'] == 1


@pytest.mark.slow
@pytest.mark.parametrize('options', [
    dict(torchcompile='aot_eager'), dict(torchcompile='aot_eager', amp=True, model_ema=True)])
def test_compiled_training(images, tmp_path, options):
    """The same first loss as without compilation, and checkpoints without wrapper prefixes."""
    plain = run(images, tmp_path / 'plain', epochs=1, **{k: v for k, v in options.items() if k != 'torchcompile'})
    compiled = run(images, tmp_path / 'compiled', epochs=1, **options)
    assert compiled['history'][0]['train_task_loss'] == pytest.approx(plain['history'][0]['train_task_loss'], rel=0.05)
    weights = read_checkpoint(tmp_path / 'compiled' / 'last.pth.tar')['state_dict']
    assert set(weights) == set(read_checkpoint(tmp_path / 'plain' / 'last.pth.tar')['state_dict'])


RECIPES = sorted(
    path for kind in ('imagenet', 'cifar', 'digits', 'demo') for path in (folder('configs') / kind).glob('*.yaml')
    if 'retinanet' not in path.name)


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda path: f'{path.parent.name}/{path.stem}')
def test_recipes_are_whole(recipe):
    """Every key is an option of timm's train.py, and model, loss, optimiser and schedule can be built from it."""
    from moe_zoo.engine.build import build_optimizer, build_schedule, criterion_kwargs
    args = load_config(recipe)
    args.world_size = 8
    assert recipe.stem.startswith(args.model)
    model = timm.create_model(args.model, device='meta', **args.model_kwargs)
    assert model.get_classifier() is not None
    criterion_kwargs(args, args.mixup > 0 or args.cutmix > 0)
    schedule, epochs = build_schedule(args, build_optimizer(args, torch.nn.Linear(2, 2)), updates_per_epoch=100)
    assert (schedule is None) == (args.sched == 'none') and epochs >= args.epochs
