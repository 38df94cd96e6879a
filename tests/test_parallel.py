"""Several processes compute what one does: experts spread over ranks, FSDP2, statistics over ranks, states in parts.

The reference is one process with the whole batch, in this process. Ranks start from other random weights than it,
except for the first: what they compute shows that the first one's were sent to them.
"""
import functools
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, Tuple

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from image_folders import write_images
from rank_group import run_ranks
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import moe_zoo  # noqa: F401  registers the models
from moe_zoo.checkpoints.parts import join_sharded
from moe_zoo.engine import parallel
from moe_zoo.engine.checkpoint import read_checkpoint
from moe_zoo.engine.config import load_config
from moe_zoo.engine.train import train
from moe_zoo.errors import InputError
from moe_zoo.losses import auxiliary_losses

IMAGES, GROUP = 16, 2  # images of the whole batch, and of a group of tokens: every rank has whole groups
VIT = dict(
    img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, representation_size=0, num_classes=3,
    head_zero_init=False, num_experts=4, same_init=False)
BALANCE = {'importance': 0.5, 'z': 0.1}
# Every router, with noise, dropped tokens and every kind of balance loss among them.
ROUTERS = {
    'vmoe': dict(router='vmoe', losses={**BALANCE, 'vmoe_load': 0.5}, capacity_factor=0.8),
    'priority': dict(router='vmoe', losses={'gshard': 0.5}, capacity_factor=0.5, batch_priority=True, num_selected=1),
    'cosine': dict(router='cosine', losses=BALANCE, router_args=dict(projection_features=8), num_shared_experts=1),
    'shazeer': dict(router='shazeer', losses={**BALANCE, 'load': 0.5}),
    'sigmoid': dict(router='sigmoid', losses=BALANCE),
    'hierarchical': dict(
        router='hierarchical', num_selected=2, losses={'importance': 0.5},
        router_args=dict(num_groups=2, groups_selected=1)),
    'expert_choice': dict(router='expert_choice', losses={'z': 0.1}),
    'soft': dict(router='soft', num_slots=2),
}


def tiny(name: str, **kwargs: Any) -> nn.Module:
    """A V-MoE of two blocks, the second with four experts: 4 patches and a class token an image."""
    groups = {} if name == 'soft' else {'group_images': GROUP}  # a group of Soft MoE is an image
    keywords = {**VIT, 'moe_layers': [1], **groups, **ROUTERS[name], **kwargs}
    return timm.create_model('vmoe_vit_s', **keywords).train()


def batch() -> Tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(IMAGES, 3, 16, 16, generator=generator), torch.randint(0, 3, (IMAGES,), generator=generator)


def fix_noise(model: nn.Module, part: slice = slice(None)) -> None:
    """Routers get the noise of the images of this part of the batch, which every process draws alike."""
    for module in model.modules():
        if hasattr(module, 'sample_noise'):
            module.sample_noise = functools.partial(_noise, part=part)


def _noise(logits: torch.Tensor, part: slice) -> torch.Tensor:
    drawn = torch.randn(IMAGES, 5, *logits.shape[1:], generator=torch.Generator().manual_seed(2))
    return drawn[part].flatten(0, 1)


def losses_of(model: nn.Module, images: torch.Tensor, target: torch.Tensor, **kwargs: Any) -> Dict[str, torch.Tensor]:
    output, routings = model(images)
    return {'task': F.cross_entropy(output, target), **auxiliary_losses(routings, target, **kwargs)}


def reference(name: str, **kwargs: Any) -> Tuple[Dict[str, torch.Tensor], Dict[str, torch.Tensor]]:
    """Losses and gradients of one process."""
    torch.manual_seed(0)
    model = tiny(name, **kwargs)
    model.set_aux_loss(True)
    fix_noise(model)
    losses = losses_of(model, *batch())
    sum(losses.values()).backward()
    return {k: v.detach() for k, v in losses.items()}, {k: p.grad for k, p in model.named_parameters()}


WHOLE = dict(group_images=IMAGES, capacity_factor=2.0, losses=BALANCE)  # one group for balance, and nothing dropped

# A model of each family, with its keywords and images.
FAMILIES = {
    'condconv_mobilenetv1_025': ({}, (3, 32, 32)),
    'deepmoe_resnet56_cifar': ({}, (3, 32, 32)),
    'dyconv_resnet10': ({}, (3, 32, 32)),
    'fusion_trio': (dict(encoders=('test_resnet', 'test_efficientnet')), (3, 64, 64)),
    'moe_resnet18_cifar': ({}, (3, 32, 32)),
    'moefied': (dict(base='resnet10t'), (3, 64, 64)),
    'pmoe_cnn': ({}, (1, 112, 112)),
    'softmoe_vit_s': (dict(VIT, moe_layers=[1]), (3, 16, 16)),
    'vmoe_vit_s_ec': (dict(VIT, moe_layers=[1]), (3, 16, 16)),
}


def of_family(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, **{'num_classes': 2, **FAMILIES[name][0]}).train()
    model.set_aux_loss(True)
    for module in model.modules():
        if hasattr(module, 'sample_noise'):  # alike wherever it is drawn
            module.sample_noise = lambda logits: torch.linspace(-1, 1, logits.numel()).view_as(logits)
    return model


def half(part: int, name: str) -> Tuple[torch.Tensor, torch.Tensor]:
    """Two images of four for a model, and their classes."""
    images = torch.randn(4, *FAMILIES[name][1], generator=torch.Generator().manual_seed(3))
    return images[2 * part:2 * part + 2], torch.tensor([0, 1, 1, 0])[2 * part:2 * part + 2]


def family_loss(model: nn.Module, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return sum(losses_of(model, images, target).values())


# ---- what the ranks do

def part_of(rank: int, world: int) -> slice:
    size = IMAGES // world
    return slice(rank * size, (rank + 1) * size)


def spread_model(name: str, rank: int, world: int, experts: int, sharded: bool = False, **kwargs: Any) -> nn.Module:
    torch.manual_seed(rank)
    model = tiny(name, **kwargs)
    model.set_aux_loss(True)
    fix_noise(model, part_of(rank, world))
    if experts > 1:
        parallel.parallelize_experts(model, parallel.create_mesh(experts))
    return parallel.shard_model(model) if sharded else model


def train_step(model: nn.Module, rank: int, world: int, **kwargs: Any) -> Dict[str, torch.Tensor]:
    """Backward of the loss of this rank's images; the losses, averaged over the ranks."""
    images, target = batch()
    part = part_of(rank, world)
    losses = losses_of(model, images[part], target[part], **kwargs)
    sum(losses.values()).backward()
    means = {}
    for name, value in losses.items():
        means[name] = value.detach() / world
        dist.all_reduce(means[name])
    return means


def gradients(model: nn.Module) -> Dict[str, torch.Tensor]:
    """Whole gradients by name, as they are now; every rank calls it."""
    return {name: parallel.whole(p.grad).clone() for name, p in model.named_parameters()}


def spread_experts(rank: int, world: int, folder: Path) -> None:
    """Every router on rows of 2 ranks; V-MoE's also on one row of all, checkpointing, and sharded by FSDP2."""
    runs = {name: dict(name=name, experts=2) for name in ROUTERS}
    runs.update({
        'one row': dict(name='vmoe', experts=world), 'checkpointing': dict(name='vmoe', experts=2),
        'sharded': dict(name='vmoe', experts=2, sharded=True),
        'sharded soft': dict(name='soft', experts=2, sharded=True),
        'sharded alone': dict(name='vmoe', experts=1, sharded=True)})
    found = {}
    for key, run in runs.items():
        model = spread_model(rank=rank, world=world, **run)
        model.set_grad_checkpointing(key == 'checkpointing')
        losses = train_step(model if run.get('sharded') else DistributedDataParallel(model), rank, world)
        found[key] = losses, gradients(model), float(parallel.clip_gradients(model.parameters(), 0.1))
        clipped = gradients(model)
        assert float(torch.cat([g.flatten() for g in clipped.values()]).norm()) == pytest.approx(0.1, rel=1e-3), key
        if key == 'sharded':
            assert model.blocks[1].mlp.fc1.weight.to_local().shape == (2, 64, 16)  # 2 of 4 experts
            assert model.blocks[1].mlp.router.weight.to_local().shape[0] == 4 // world
    if rank == 0:
        torch.save(found, folder / f'spread{world}.pt')


def balance_over_ranks(rank: int, world: int, folder: Path) -> None:
    """A group is the whole batch, of which a rank has a part: losses of the parts, and of the whole."""
    found = {}
    for over_ranks in (False, True):
        model = spread_model('vmoe', rank, world, experts=1, **WHOLE)
        losses = train_step(DistributedDataParallel(model), rank, world, over_ranks=over_ranks)
        found[over_ranks] = losses, gradients(model)
    if rank == 0:
        torch.save(found, folder / f'balance{world}.pt')


def save_in_parts(rank: int, world: int, folder: Path) -> None:
    """One step of SGD with momentum on 4 ranks, experts on rows of 2, the rest sharded; saved by every rank."""
    model = spread_model('vmoe', rank, world, experts=2, sharded=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_step(model, rank, world)
    optimizer.step()
    parallel.save_sharded(folder / 'parts', model, optimizer)
    plain = parallel.whole({'model': model.state_dict(), 'optimizer': optimizer.state_dict()})
    if rank == 0:
        torch.save(plain, folder / 'whole.pt')


def load_in_parts(rank: int, world: int, folder: Path) -> None:
    """The second step on 2 ranks, from the parts and from the whole file, spread in other ways."""
    plain = torch.load(folder / 'whole.pt', weights_only=True)
    found = {}
    for key, run in (('parts', dict(experts=2)), ('whole', dict(experts=1, sharded=True)),
                     ('whole to experts', dict(experts=2))):
        model = spread_model('vmoe', rank + 1, world, **run)  # other weights on every rank
        fix_noise(model, part_of(rank, world))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if key == 'parts':
            parallel.load_sharded(folder / 'parts', model, optimizer)
        else:
            model.load_state_dict(plain['model'])
            optimizer.load_state_dict(parallel.spread_optimizer_state(optimizer, plain['optimizer']))
        train_step(model if run.get('sharded') else DistributedDataParallel(model), rank, world)
        optimizer.step()
        found[key] = parallel.whole(model.state_dict())
    if rank == 0:
        torch.save(found, folder / 'second.pt')


def every_family(rank: int, world: int, folder: Path) -> None:
    """DistributedDataParallel and FSDP2 for a model of each family; its gradients, and its weights after a step."""
    found = {}
    for name in FAMILIES:
        for way in ('ddp', 'fsdp'):
            model = of_family(name, seed=rank)
            wrapped = DistributedDataParallel(model) if way == 'ddp' else parallel.shard_model(model)
            family_loss(wrapped, *half(rank, name)).backward()
            found[name, way] = gradients(model), parallel.all_finite(model)
    if rank == 0:
        torch.save(found, folder / 'families.pt')


RUN = dict(
    model='vmoe_vit_s', img_size=16, batch_size=2, workers=0, device='cpu', opt='adamw', lr=1e-3, epochs=3,
    warmup_epochs=0, clip_grad=1.0, no_prefetcher=True, recovery_interval=1, model_kwargs=dict(
        patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=4, group_images=1,
        representation_size=0))


def run_of_four(rank: int, world: int, folder: Path) -> None:
    """The first epoch of three."""
    options = dict(data_dir=str(folder / 'images'), expert_parallel=2, stop_epoch=1, balance_over_ranks=True)
    result = train(RUN, options, output=folder / 'run', quiet=True)
    assert result['parameters'] == sum(p.numel() for p in timm.create_model(
        'vmoe_vit_s', num_classes=2, img_size=16, **RUN['model_kwargs']).parameters())


def run_of_two(rank: int, world: int, folder: Path) -> None:
    """The second, by fewer processes and in another way."""
    options = dict(data_dir=str(folder / 'images'), expert_parallel=2, parallel='fsdp', stop_epoch=2)
    train(RUN, options, output=folder / 'run', resume='auto', quiet=True)


def four_ranks(rank: int, world: int, folder: Path) -> None:
    for part in (spread_experts, balance_over_ranks, save_in_parts, run_of_four):
        part(rank, world, folder)


def two_ranks(rank: int, world: int, folder: Path) -> None:
    for part in (spread_experts, load_in_parts, every_family, run_of_two):
        part(rank, world, folder)


# ---- and what is held against one process

@pytest.fixture(scope='module')
def ranks(tmp_path_factory) -> Path:
    """Where 4 ranks, then 2, have written what they computed."""
    folder = tmp_path_factory.mktemp('ranks')
    write_images(folder / 'images', {'train': 8, 'validation': 4})
    run_ranks(4, folder, four_ranks)
    run_ranks(2, folder, two_ranks)
    return folder


def load(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def check(found: Dict[str, torch.Tensor], expected: Dict[str, torch.Tensor], what: str) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f'{what} {n}: {m}')


@pytest.mark.slow
@pytest.mark.parametrize('world', [2, 4])
def test_spread_experts_compute_what_one_process_does(world, ranks):
    """Losses, gradients and their norm, for every router, with dropped tokens, noise and balance losses by groups."""
    found = load(ranks / f'spread{world}.pt')
    assert len(found) == len(ROUTERS) + 5
    for key, (losses, grads, norm) in found.items():
        name = key if key in ROUTERS else 'soft' if key == 'sharded soft' else 'vmoe'
        expected_losses, expected = reference(name)
        check(losses, expected_losses, key)
        check(grads, expected, key)
        assert norm == pytest.approx(float(torch.cat([g.flatten() for g in expected.values()]).norm()), rel=1e-4)
        assert grads['blocks.1.mlp.fc1.weight'].flatten(1).abs().sum(1).min() > 1e-4  # every expert has learned


@pytest.mark.slow
def test_balance_over_ranks(ranks):
    """The importance of 4 images differs from that of 16: only with `over_ranks` is it that of one process."""
    found = load(ranks / 'balance4.pt')
    losses, grads = reference('vmoe', **WHOLE)
    check(found[True][0], losses, 'over ranks')
    check(found[True][1], grads, 'over ranks')
    assert float(found[False][0]['importance'] / losses['importance']) > 1.02
    torch.testing.assert_close(found[False][0]['z'], losses['z'])  # a mean over tokens, whatever the group


def two_steps() -> Tuple[Dict[str, torch.Tensor], ...]:
    """The weights of one process after one step, and after two."""
    torch.manual_seed(0)
    model = tiny('vmoe')
    model.set_aux_loss(True)
    fix_noise(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    states = []
    for _ in range(2):
        optimizer.zero_grad()
        sum(losses_of(model, *batch()).values()).backward()
        optimizer.step()
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    return tuple(states)


@pytest.mark.slow
def test_parts_are_joined_and_loaded_on_other_numbers_of_ranks(ranks, tmp_path):
    """Written by 4 ranks, read by 2, by one, and without a model into a file; momentum is in it, too."""
    first, second = two_steps()
    for key, state in load(ranks / 'second.pt').items():
        check(state, second, key)
    check(load(ranks / 'whole.pt')['model'], first, 'gathered')

    join_sharded(ranks / 'parts', tmp_path / 'joined.safetensors')
    joined = load_file(tmp_path / 'joined.safetensors')
    check(joined, first, 'joined')
    tiny('vmoe').load_state_dict(joined)

    model = tiny('vmoe')
    model.set_aux_loss(True)
    fix_noise(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parallel.load_sharded(ranks / 'parts', model, optimizer)
    check(model.state_dict(), first, 'one process')
    sum(losses_of(model, *batch()).values()).backward()
    optimizer.step()
    check(model.state_dict(), second, 'one process')


@pytest.mark.slow
def test_ddp_and_fsdp_train_every_family(ranks):
    """Gradients are the mean of those of the two halves of the batch, each with its own batch statistics."""
    found = load(ranks / 'families.pt')
    for name in FAMILIES:
        halves = []
        for part in range(2):
            model = of_family(name, seed=0)
            family_loss(model, *half(part, name)).backward()
            halves.append({key: p.grad for key, p in model.named_parameters()})
        expected = {key: (halves[0][key] + halves[1][key]) / 2 for key in halves[0]}
        for way in ('ddp', 'fsdp'):
            grads, finite = found[name, way]
            check(grads, expected, f'{name} {way}')
            assert finite


@pytest.mark.slow
def test_a_run_continues_on_fewer_processes(ranks):
    """4 processes with experts on rows of 2, then 2 that shard the rest, then one: one file, that all read."""
    kept = read_checkpoint(ranks / 'run' / 'last.pth.tar')
    assert kept['epoch'] == 1 and {type(value) for value in kept['state_dict'].values()} == {torch.Tensor}
    moments = [entry['exp_avg'].shape for entry in kept['optimizer']['state'].values()]
    assert sorted(moments) == sorted(value.shape for value in kept['state_dict'].values())
    result = train(RUN, dict(data_dir=str(ranks / 'images')), output=ranks / 'run', resume='auto', quiet=True)
    assert [row['epoch'] for row in result['history']] == [0, 1, 2] and result['top1'] is not None
    rows = (ranks / 'run' / 'summary.csv').read_text().splitlines()
    assert len(rows) == 4 and rows[0].startswith('epoch')


def dies(rank: int, world: int, folder: Path) -> None:
    """The second rank is gone before the first exchange of tokens."""
    model = DistributedDataParallel(spread_model('vmoe', rank, world, experts=2))
    if rank == 1:
        os._exit(7)
    train_step(model, rank, world)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others(tmp_path):
    with pytest.raises(AssertionError, match='exit code 7|exitcode 7|Connection|closed|reset'):
        run_ranks(2, tmp_path, dies)


TASK = """
import torch
import torch.distributed as dist
from moe_zoo.engine.build import open_device
from moe_zoo.engine.config import load_config
args = load_config({}, {'device': 'cpu'})
open_device(args)
total = torch.tensor(args.rank + 1)
dist.all_reduce(total)
print(args.rank, args.world_size, int(total), flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_tasks_that_srun_starts_find_each_other():
    """Without torchrun, by what SLURM says in the environment: ranks 0 and 1 add up 1 + 2."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    known = {key: value for key, value in os.environ.items() if key not in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')}
    tasks = [subprocess.Popen([sys.executable, '-c', TASK], stdout=subprocess.PIPE, text=True, env={
        **known, 'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '2', 'SLURM_PROCID': rank, 'SLURM_LOCALID': rank,
        'MASTER_ADDR': 'localhost', 'MASTER_PORT': str(port), 'OMP_NUM_THREADS': '1'}) for rank in '01']
    try:
        assert [task.communicate(timeout=300)[0] for task in tasks] == ['0 2 3\n', '1 2 3\n']
    finally:
        for task in tasks:
            task.kill()
            task.wait()


# ---- what is refused

def options(**kwargs: Any) -> Any:
    args = load_config(RUN, kwargs)
    args.distributed = kwargs.get('expert_parallel') != 3
    return args


@pytest.mark.parametrize('given, sentence', [
    (dict(expert_parallel=3), 'expert_parallel=3 needs several processes: torchrun'),
    (dict(expert_parallel=2, model_ema=True), 'does not go with model_ema=true: the average is kept of a whole'),
    (dict(parallel='fsdp', torchcompile='inductor'), 'parallel=fsdp does not go with torchcompile=inductor'),
    (dict(parallel='fsdp', clip_mode='agc'), 'does not go with clip_mode=agc: use clip_mode=norm'),
    (dict(parallel='fsdp', freeze_gates=1), 'does not go with freeze_gates=1'),
])
def test_options_that_do_not_go_together_are_refused(given, sentence):
    with pytest.raises(InputError, match=sentence):
        parallel.check_options(options(**given))


def test_options_are_checked_where_they_are_read():
    with pytest.raises(InputError, match="parallel='fspd': use one of 'ddp', 'fsdp'"):
        load_config(RUN, dict(parallel='fspd'))
    with pytest.raises(InputError, match='expert_parallel=0: give at least 1'):
        load_config(RUN, dict(expert_parallel=0))


def test_parts_that_are_not_there_are_refused(tmp_path):
    for read in (lambda: parallel.load_sharded(tmp_path, nn.Linear(1, 1)),
                 lambda: join_sharded(tmp_path, tmp_path / 'x.safetensors')):
        with pytest.raises(InputError, match='is no sharded checkpoint'):
            read()
    (tmp_path / '.metadata').touch()
    with pytest.raises(InputError, match='name it so'):
        join_sharded(tmp_path, tmp_path / 'x.pth')


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/rendezvous', rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_models_and_meshes_that_do_not_fit_are_refused(alone):
    with pytest.raises(InputError, match='expert_parallel=2 does not divide the 1 processes'):
        parallel.create_mesh(2)
    with pytest.raises(InputError, match='ResNet has no experts that can be spread, which are those of MoEMlp'):
        parallel.parallelize_experts(timm.create_model('resnet10t'), parallel.create_mesh(1))


def test_one_rank_holds_all_experts(alone):
    """The way through the exchange, without anybody to exchange with: what one process computes."""
    model = spread_model('vmoe', 0, 1, experts=1)
    parallel.parallelize_experts(model, parallel.create_mesh(1))
    losses = train_step(model, 0, 1)
    expected_losses, expected = reference('vmoe')
    check(losses, expected_losses, 'alone')
    check(gradients(model), expected, 'alone')
    state = parallel.whole(model.state_dict())
    assert state['blocks.1.mlp.fc1.weight'].shape == (4, 64, 16) and type(state['head.weight']) is torch.Tensor
