"""What a run survives: signals, a second run in its folder, dying processes, full disks, a kill at a bad moment.

`tools/torture.py` does at length, with whole processes, what is done here once.
"""
import importlib.util
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from image_folders import write_images
from rank_group import run_ranks
from safetensors.torch import load_file, save_file

from moe_zoo import faults
from moe_zoo.engine import checkpoint, evaluate, evaluate_cli
from moe_zoo.engine import train as training
from moe_zoo.engine.checkpoint import read_checkpoint
from moe_zoo.engine.log import EpochLog
from moe_zoo.engine.train import newest_checkpoint, train
from moe_zoo.errors import InputError, atomic_write, remove_leftovers
from moe_zoo.faults import Leave, Leaving, interruptible, listening, locked, one_sentence, received

# Two blocks of width 16 on four patches, the second routed; dropout and router noise draw random numbers.
RECIPE = dict(
    model='vmoe_vit_s', img_size=16, batch_size=4, workers=0, opt='adamw', lr=1e-2, epochs=2, warmup_epochs=0,
    device='cpu', checkpoint_hist=1, reprob=0.3, grad_accum_steps=2, model_kwargs=dict(
        patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=4, representation_size=0,
        proj_drop_rate=0.1))
BATCHES = 5  # an epoch: 20 images in batches of 4, of which two are an update, and the last is one


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'), {'train': 10, 'validation': 4})


@pytest.fixture(scope='module')
def whole(images, tmp_path_factory):
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp('whole') / 'run'
    run(images, folder)
    return folder


def run(images, folder, resume=None, **options):
    return train({**RECIPE, 'data_dir': str(images)}, options, output=folder, resume=resume, quiet=True)


def assert_same_run(folder: Path, whole: Path) -> None:
    """Weights, moments, the log and the files that a run leaves, to the last bit."""
    one, other = (read_checkpoint(each / 'last.pth.tar') for each in (folder, whole))
    assert one['epoch'] == other['epoch']
    assert all(torch.equal(value, other['state_dict'][name]) for name, value in one['state_dict'].items())
    for number, moments in one['optimizer']['state'].items():
        assert all(torch.equal(value, other['optimizer']['state'][number][key]) for key, value in moments.items())
    assert rows_of(folder) == rows_of(whole)
    assert files_of(folder) == files_of(whole)
    best = [read_checkpoint(each / 'model_best.pth.tar')['epoch'] for each in (folder, whole)]
    assert best[0] == best[1]


def rows_of(folder: Path) -> list[str]:
    """Of the log, without their last column: seconds."""
    return [line.rpartition(',')[0] for line in (folder / 'summary.csv').read_text().splitlines()]


def files_of(folder: Path) -> set[str]:
    """Without the logs, and the checkpoints that signals and intervals ask for."""
    return {path.name for path in folder.iterdir() if not re.match('recovery-|tensorboard', path.name)}


# ---- signals

def tell(number: int) -> None:
    os.kill(os.getpid(), number)


def at_call(monkeypatch, owner, name: str, call: int, action) -> None:
    """Do something before the n-th call of a function."""
    original, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(None)
        if len(calls) == call:
            action()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize('number, where, call, saved', [
    (signal.SIGTERM, 'batch', 2, 'recovery-0-1'),  # the second batch is an update, and the run leaves after it
    (signal.SIGUSR1, 'batch', 8, 'recovery-1-3'),  # the third of the second epoch is none: one more
    (signal.SIGTERM, 'evaluation', 1, 'recovery-0-4'),  # after all five batches
    (signal.SIGUSR1, 'evaluation', 4, 'recovery-1-4'),  # of the second epoch, which ends the run, the last batch
    (signal.SIGUSR1, 'write', 1, 'last'),  # of the checkpoint at the end of the first epoch
])
def test_a_scheduler_is_obeyed_and_the_resumed_run_is_the_uninterrupted_one(
        number, where, call, saved, images, whole, tmp_path, monkeypatch, capfd):
    owner, name = {
        'batch': (training.Trainer, 'train_batch'), 'evaluation': (evaluate.ClassificationEvaluator, 'update'),
        'write': (torch, 'save')}[where]
    before = [signal.getsignal(each) for each in faults.SIGNALS]
    with monkeypatch.context() as patched:
        at_call(patched, owner, name, call, lambda: tell(number))
        with pytest.raises(SystemExit) as left:
            run(images, tmp_path)
    assert left.value.code == 0
    assert newest_checkpoint(tmp_path).name == f'{saved}.pth.tar'
    assert capfd.readouterr().err == f'{signal.Signals(number).name}: the run is saved, then it ends\n'
    assert [signal.getsignal(each) for each in faults.SIGNALS] == before and not received()
    run(images, tmp_path, resume='auto')
    assert_same_run(tmp_path, whole)


def test_ctrl_c_saves_and_a_second_one_does_not_wait(images, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        at_call(patched, training.Trainer, 'train_batch', 3, lambda: tell(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            run(images, tmp_path / 'once')
    assert newest_checkpoint(tmp_path / 'once').name == 'recovery-0-3.pth.tar'
    with monkeypatch.context() as patched:
        at_call(patched, training.Trainer, 'train_batch', 3, lambda: (tell(signal.SIGINT), tell(signal.SIGINT)))
        with pytest.raises(KeyboardInterrupt):
            run(images, tmp_path / 'twice')
    assert newest_checkpoint(tmp_path / 'twice') is None
    run(images, tmp_path / 'once', resume='auto')
    assert_same_run(tmp_path / 'once', whole)


def test_a_run_that_leaves_again_and_again_keeps_two_recovery_checkpoints(images, whole, tmp_path, monkeypatch):
    for _ in range(4):  # a process, an update
        with monkeypatch.context() as patched:
            at_call(patched, training.Trainer, 'train_batch', 1, lambda: tell(signal.SIGUSR1))
            with pytest.raises(SystemExit):
                run(images, tmp_path, resume='auto')
    kept = sorted(path.name for path in tmp_path.glob('recovery-*'))
    assert kept == ['recovery-1-1.pth.tar', 'recovery-1-3.pth.tar'] or len(kept) == 2
    run(images, tmp_path, resume='auto')
    assert_same_run(tmp_path, whole)


def test_worker_processes_outlive_what_the_whole_group_is_told(images, whole, tmp_path, monkeypatch):
    """Ctrl-C, and many a scheduler, tell the workers as well, from which the last batches still have to come."""
    others = set(multiprocessing.active_children())  # of other tests

    def tell_all():
        workers = set(multiprocessing.active_children()) - others
        assert len(workers) == 2
        for worker in workers:
            os.kill(worker.pid, signal.SIGTERM)
        tell(signal.SIGTERM)

    with monkeypatch.context() as patched:
        at_call(patched, training.Trainer, 'train_batch', 1, tell_all)
        with pytest.raises(SystemExit):
            run(images, tmp_path / 'run', workers=2)
    run(images, tmp_path / 'run', resume='auto', workers=2)
    run(images, tmp_path / 'whole', workers=2)
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


def test_nobody_leaves_where_nothing_listens():
    """An evaluation of its own is ended by signals, as any command."""
    assert list(interruptible([1, 2])) == [1, 2]
    with listening(), Leaving() as leaving:
        leaving.check()
        tell(signal.SIGUSR1)
        with pytest.raises(Leave, match='SIGUSR1'):
            list(interruptible([1, 2]))
        assert list(interruptible([1, 2], checks=0)) == [1, 2]
    assert list(interruptible([1, 2])) == [1, 2]


def test_sums_of_an_epoch_are_not_added_up_twice(monkeypatch):
    """A run that left during the evaluation has reduced them already."""
    log = EpochLog()
    log.add({'loss': torch.tensor(2.0), 'balance': {}}, 3)
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.distributed, 'all_reduce', lambda flat: flat.mul_(2))
    log.reduce()
    again = EpochLog()
    again.load_state_dict(log.state_dict())
    again.reduce()
    assert again.weight == 6 and again.means() == {'loss': 2.0}


# ---- a second run in the folder

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], 'a+')
fcntl.lockf(file, fcntl.LOCK_EX)
file.write('process 7 on host')
file.flush()
print('held', flush=True)
time.sleep(600)
"""


@pytest.fixture
def another_run():
    """Starts a process that holds the lock of a folder, as a run does."""
    started = []

    def start(folder: Path) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        process = subprocess.Popen([sys.executable, '-c', HOLD, str(folder / 'run.lock')], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b'held\n'
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_two_runs_do_not_share_a_folder(another_run, images, whole, tmp_path, capsys):
    folder = tmp_path / 'run'
    shutil.copytree(whole, folder)
    before = {path.name: path.read_bytes() for path in folder.glob('*.*') if path.is_file()}
    process = another_run(folder)
    for resume in (None, 'auto'):
        with pytest.raises(InputError) as error:
            run(images, folder, resume=resume, epochs=3)
        assert str(error.value) == (
            f"'{folder}' is being written to by a run that is not over (process 7 on host): wait for it, end it, or"
            ' name another experiment=NAME.')
    assert {path.name: path.read_bytes() for path in folder.glob('*.*') if path.is_file()} == {
        **before, 'run.lock': b'process 7 on host'}
    # Who evaluates it is not locked out.
    assert evaluate_cli.main(
        ['--checkpoint', str(folder / 'last.pth.tar'), '--no-usage', '--no-time', '--data-dir', str(images)]) == 0
    process.kill()  # as kill -9: the kernel releases the lock
    process.wait()
    run(images, folder, resume='auto', epochs=3)
    assert not (folder / 'run.lock').exists()


def test_a_lock_leaves_nothing_behind(tmp_path):
    with locked(tmp_path / 'a' / 'b', 'go'):
        assert re.fullmatch(r'process \d+ on \S+ since [\d-]+ [\d:]+', (tmp_path / 'a' / 'b' / 'run.lock').read_text())
    assert not (tmp_path / 'a' / 'b').exists()
    (tmp_path / 'file').touch()
    with pytest.raises(InputError, match=f"Cannot write to '{tmp_path}/file/run': Not a directory; choose another"):
        with locked(tmp_path / 'file' / 'run', 'go'):
            pass


def test_a_checkpoint_that_is_not_there_makes_no_folder(images, tmp_path):
    with pytest.raises(InputError, match="There is no checkpoint file '.*gone/last.pth.tar'"):
        train({**RECIPE, 'data_dir': str(images)}, resume=tmp_path / 'gone' / 'last.pth.tar', quiet=True)
    assert not list(tmp_path.iterdir())


# ---- kills at bad moments

def test_a_kill_between_the_last_checkpoint_and_its_copies(images, tmp_path, monkeypatch):
    """Three epochs, of which the second is the best, and the process is gone before its copies are made."""
    metrics = iter([1.0, 3.0, 2.0, 3.0, 2.0])
    monkeypatch.setattr(training.Trainer, 'evaluate', lambda self, keep=False: {'top1': next(metrics)})
    options = dict(epochs=3)
    run(images, tmp_path / 'whole', **options)
    assert read_checkpoint(tmp_path / 'whole' / 'model_best.pth.tar')['epoch'] == 1

    metrics = iter([1.0, 3.0])
    folder, duplicate = tmp_path / 'killed', checkpoint.AtomicCheckpointSaver._duplicate

    class Killed(BaseException):
        pass

    def die(self, src, dst):
        if read_checkpoint(src)['epoch'] == 1:
            raise Killed
        duplicate(self, src, dst)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(checkpoint.AtomicCheckpointSaver, '_duplicate', die)
        run(images, folder, **options)
    assert read_checkpoint(folder / 'model_best.pth.tar')['epoch'] == 0
    metrics = iter([2.0])
    run(images, folder, resume='auto', **options)
    assert_same_run(folder, tmp_path / 'whole')


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    """With the next writing of the file; what a living process writes stays, and what is no leftover."""
    for name in ('.a.json.abcd_123.part', '.b.json.abcd1234.part', '.a.json.part', 'a.json.abcd1234.part'):
        (tmp_path / name).touch()
    with atomic_write(tmp_path / 'b.json') as mine:
        assert not (tmp_path / '.b.json.abcd1234.part').exists()
        with atomic_write(tmp_path / 'a.json') as part:
            part.write_text('{}')
        remove_leftovers(tmp_path)
        mine.write_text('[]')  # still there
    names = {'a.json', 'b.json', '.a.json.part', 'a.json.abcd1234.part'}
    assert {path.name for path in tmp_path.iterdir()} == names
    with locked(tmp_path, 'go'):
        pass
    assert {path.name for path in tmp_path.iterdir()} == names


# ---- processes that die

def test_a_worker_that_is_killed_ends_the_run_with_one_sentence(images, tmp_path, monkeypatch):
    others = set(multiprocessing.active_children())  # of other tests

    def kill():
        (worker,) = set(multiprocessing.active_children()) - others
        os.kill(worker.pid, signal.SIGKILL)
        time.sleep(1)

    with monkeypatch.context() as patched:
        at_call(patched, training.Trainer, 'train_batch', BATCHES + 2, kill)  # in the second epoch
        with pytest.raises(InputError) as error:
            run(images, tmp_path / 'run', workers=1)
    assert re.fullmatch(
        r'A process that reads images was killed \(Killed\), PID \d+, most often because memory, or shared memory, ran'
        rf" out: read with fewer workers or smaller batches; --resume goes on from '{tmp_path}/run/last.pth.tar'\.",
        str(error.value))
    assert read_checkpoint(tmp_path / 'run' / 'last.pth.tar')['epoch'] == 0
    run(images, tmp_path / 'run', resume='auto', workers=1)
    run(images, tmp_path / 'whole', workers=1)
    assert_same_run(tmp_path / 'run', tmp_path / 'whole')


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match='of another kind'), one_sentence(lambda: ''):
        raise RuntimeError('of another kind: Connection closed by peer')  # and there are no processes
    with pytest.raises(FileNotFoundError), one_sentence(lambda: ''):
        open('/nowhere/at/all')


# ---- disks

@pytest.fixture
def small_disk():
    """A limit on the size of files, which fails a write as a full disk does (EFBIG instead of ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_the_run_with_one_sentence(images, whole, tmp_path, small_disk):
    run(images, tmp_path / 'run', stop_epoch=1)
    size = (tmp_path / 'run' / 'last.pth.tar').stat().st_size
    small_disk(size // 2)
    with pytest.raises(InputError, match=f"No space left to write '{tmp_path}/run/last.pth.tar': .* before is intact"):
        run(images, tmp_path / 'run', resume='auto')
    small_disk(resource.RLIM_INFINITY)
    run(images, tmp_path / 'run', resume='auto')
    assert_same_run(tmp_path / 'run', whole)


def test_a_full_disk_in_the_words_of_another_language(tmp_path, small_disk):
    """safetensors writes in Rust, whose errors are none of Python's."""
    path = tmp_path / 'weights.safetensors'
    save_file({'a': torch.zeros(2)}, path)
    small_disk(1000)
    with pytest.raises(InputError, match=f"No space left to write '{path}'"), atomic_write(path) as part:
        save_file({'a': torch.zeros(1000)}, part)
    assert torch.equal(load_file(path)['a'], torch.zeros(2)) and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_to(images, tmp_path):
    (tmp_path / 'file').touch()
    for folder in (tmp_path / 'file', Path('/proc/run')):
        with pytest.raises(InputError, match=f"Cannot write to '{folder}.*; choose another place"):
            run(images, folder)
        with pytest.raises(InputError, match=f"Cannot write to '{folder}.*; choose another place"):
            with atomic_write(folder / 'x.json'):
                pass
    (tmp_path / 'folder').mkdir()
    with pytest.raises(InputError, match=f"Cannot write to '{tmp_path}/folder': Is a directory"):
        with atomic_write(tmp_path / 'folder') as part:
            part.touch()


# ---- several processes

RANKS = dict(RECIPE, batch_size=2, grad_accum_steps=1)


def _tell_rank(number: int, batch: int) -> None:
    """This process gets a signal before it trains a batch of the next run, counted from 1."""
    train_batch, calls = training.Trainer.train_batch, []

    def counted(self, *args):
        calls.append(None)
        if len(calls) == batch:
            tell(number)
        return train_batch(self, *args)

    training.Trainer.train_batch = counted


# Each process with the whole model, or with its part: of the experts, and of all else.
WAYS = {'whole models': {}, 'parts of one': dict(parallel='fsdp', expert_parallel=2)}


def leave_and_resume(rank: int, world: int, folder: Path) -> None:
    """Only the second rank is told, twice: in the first epoch, and in the second."""
    original = training.Trainer.train_batch
    for way, options in WAYS.items():
        common = dict(options, data_dir=str(folder / 'images'), epochs=2)
        train(RANKS, common, output=folder / way / 'uninterrupted', quiet=True)
        for number, batch in ((signal.SIGUSR1, 2), (signal.SIGTERM, 3)):
            if rank == 1:
                _tell_rank(number, batch)
            with pytest.raises(SystemExit) as left:
                train(RANKS, common, output=folder / way / 'run', resume='auto', quiet=True)
            assert left.value.code == 0
            training.Trainer.train_batch = original
        train(RANKS, common, output=folder / way / 'run', resume='auto', quiet=True)


def lose_a_rank(rank: int, world: int, folder: Path) -> None:
    if rank == 1:
        _tell_rank(signal.SIGKILL, 7)  # in the second epoch of five batches
    try:
        train(RANKS, dict(data_dir=str(folder / 'images'), epochs=3), output=folder / 'lost', quiet=True)
    except InputError as error:
        (folder / f'said-{rank}').write_text(str(error))
        os._exit(2)


@pytest.mark.slow
def test_all_ranks_leave_when_one_is_told_and_stop_when_one_dies(tmp_path):
    write_images(tmp_path / 'images', {'train': 10, 'validation': 8})
    run_ranks(2, tmp_path, leave_and_resume)
    for way in WAYS:
        assert_same_run(tmp_path / way / 'run', tmp_path / way / 'uninterrupted')
        kept = sorted(path.name for path in (tmp_path / way / 'run').glob('recovery-*'))
        # The others hear of it at the next update: after batch 3 of the first epoch. Then 2 batches are left of it, so
        # that batch 3 is the first of the second.
        assert kept == ['recovery-0-2.pth.tar', 'recovery-1-1.pth.tar']
    with pytest.raises(AssertionError, match='SIGKILL'):
        run_ranks(2, tmp_path, lose_a_rank)
    assert (tmp_path / 'said-0').read_text() == (
        'Another process of this run is gone, or does not answer: its own words, if it had any, say why; --resume goes'
        f" on from '{tmp_path}/lost/last.pth.tar'.")
    assert read_checkpoint(tmp_path / 'lost' / 'last.pth.tar')['epoch'] == 0


# ---- the tool that does all this at length

@pytest.fixture(scope='module')
def torture(repository):
    spec = importlib.util.spec_from_file_location('torture', repository / 'tools' / 'torture.py')
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


def test_the_torture_sees_what_is_damaged(torture, tmp_path):
    (tmp_path / 'a.json').write_text('{"a": 1}')
    (tmp_path / 'metrics.json').write_text('{"a": 1}\n{"a": 2}\n')
    (tmp_path / 'a.csv').write_text('a,b\n1,2\n')
    (tmp_path / 'index.html').write_text('<html></html>\n')
    save_file({'a': torch.zeros(9)}, tmp_path / 'a.safetensors')
    for name in ('a.pth', 'a.pth.tar'):
        torch.save({'a': torch.zeros(9)}, tmp_path / name)
    (tmp_path / '.a.json.abcd1234.part').write_text('{')  # is not visible
    assert torture.problems_of(tmp_path) == []
    names = sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith('.'))
    for name in names:  # without its last three bytes each is damaged, and nothing else is
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-3])
        assert [problem.split()[0] for problem in torture.problems_of(tmp_path)] == [name]
        (tmp_path / name).write_bytes(whole)
    assert torture.leftovers(tmp_path) == ['.a.json.abcd1234.part was left behind']


def test_the_torture_sees_what_differs(torture, whole, tmp_path):
    other = tmp_path / 'run'
    shutil.copytree(whole, other)
    assert torture.classifier_differences(other, whole) == []
    state = read_checkpoint(other / 'last.pth.tar')
    next(iter(state['state_dict'].values())).view(-1)[0] += 1e-7
    state['optimizer']['state'][0]['exp_avg'].view(-1)[0] += 1e-7
    torch.save(state, other / 'last.pth.tar')
    text = (other / 'summary.csv').read_text()
    (other / 'summary.csv').write_text(text.replace('0.', '1.', 1))
    (other / 'args.yaml').unlink()
    assert torture.classifier_differences(other, whole) == [
        "other files: ['args.yaml']", 'state_dict of last.pth.tar differs', 'optimizer of last.pth.tar differs',
        'summary.csv differs']
