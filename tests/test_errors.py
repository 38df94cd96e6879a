"""Bad input to the classification tools: one sentence on stderr, exit code 2, no traceback, nothing half-written."""
import errno
import os
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image

from moe_zoo import errors
from moe_zoo.engine import checkpoint, evaluate_cli, train
from moe_zoo.errors import InputError, atomic_write, counted, exit_on_input_error, nearest

TINY = ['patch_size=8', 'embed_dim=16', 'depth=2', 'num_heads=2', 'moe_layers=[1]', 'num_experts=4',
        'representation_size=0']
OPTIONS = ['model=vmoe_vit_s', *(f'model_kwargs.{text}' for text in TINY), 'img_size=16', 'batch_size=4', 'workers=0',
           'epochs=1', 'warmup_epochs=0', 'opt=adamw', 'lr=1e-3', 'device=cpu']


@pytest.fixture
def images(tmp_path):
    root = tmp_path / 'data'
    for split, count in (('train', 4), ('validation', 2)):
        for name, level in (('dark', 60), ('light', 190)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new('RGB', (16, 16), (level + i,) * 3).save(root / split / name / f'{i}.png')
    return root


@pytest.fixture
def says(images, tmp_path, capsys):
    """Run a tool; it must exit with 2 and one line on stderr, which comes back."""
    def run(*arguments, tool=train.main, data=images):
        folder = [] if tool is evaluate_cli.main else [f'output={tmp_path}', 'experiment=run']
        with pytest.raises(SystemExit) as exit:
            tool([*folder, *(['--data-dir', str(data)] if data else []), *map(str, arguments)])
        error = capsys.readouterr().err
        assert exit.value.code == 2
        line = error.strip().split('\n')[-1]
        assert line.startswith('error: ') and 'Traceback' not in error
        return line.removeprefix('error: ')
    return run


def test_unknown_model(says):
    assert says('model=vmoe_vit_sm') == (
        "Unknown model 'vmoe_vit_sm'. Did you mean 'vmoe_vit_s' or 'vmoe_vit_l' or 'vmoe_vit_h'?")


def test_unknown_option_in_file_and_command_line(says, tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('model: vmoe_vit_s\nwarmup_epoch: 5\n')
    assert says('--config', recipe).startswith(
        f"Unknown option 'warmup_epoch' in '{recipe}'. Did you mean 'warmup_epochs' or ")
    assert says('model=vmoe_vit_s', 'batchsize=4').startswith("Unknown option 'batchsize' in the command line. Did you")
    assert says('--epochs', '3') == "Unknown flag '--epochs': options of the recipe are given as epochs=VALUE."
    assert says('epochs') == "Cannot read 'epochs': options are given as key=value, for example epochs=10."


def test_wrong_values(says):
    assert says('model=vmoe_vit_s', 'lr=fast') == "lr='fast' in the command line must be float."
    assert says('model=vmoe_vit_s', 'epochs=0') == 'epochs=0: give at least 1.'
    assert says('model=vmoe_vit_s', 'eval_metric=top2') == "eval_metric='top2': use one of 'top1', 'top5', 'loss'."
    assert says(*OPTIONS, 'opt=adamx').startswith("Unknown optimiser opt='adamx'. Did you mean 'adam")
    assert says(*OPTIONS, 'sched=cosin').startswith("Unknown schedule sched='cosin'. Did you mean 'cosine'")
    assert says(*OPTIONS, 'device=cuda').startswith('device=cuda: torch sees no CUDA device') or (
        torch.cuda.is_available())
    assert says(*OPTIONS, 'naflex_loader=true').startswith('naflex_loader=True in the command line: NaFlex loading is')
    assert says(*OPTIONS, 'mixup=0.5', 'batch_size=3').startswith('batch_size=3 with mixup or cutmix')
    assert says('--seeds', 'one', 'model=vmoe_vit_s') == '--seeds one: seeds are whole numbers.'


def test_missing_config(says):
    assert says('--config', 'configs/imagenet/vmoe_vit_z.yaml').startswith(
        "There is no config file 'configs/imagenet/vmoe_vit_z.yaml'.")
    assert says() == 'Nothing to train: give --config FILE, or at least model=NAME.'


def test_config_that_is_not_yaml(says, tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('model: [vmoe\n')
    assert says('--config', recipe).startswith(f"The config '{recipe}' is not valid YAML: ")
    recipe.write_text('- model\n')
    assert says('--config', recipe) == f"The config '{recipe}' must hold 'name: value' lines, not a list."
    # A tag that would construct an object is refused, not executed.
    recipe.write_text('model: !!python/object/apply:os.system ["true"]\n')
    assert 'could not determine a constructor' in says('--config', recipe)


def test_routing_keywords(says):
    assert says(*OPTIONS, 'model_kwargs.num_selected=5') == (
        'num_selected=5 with num_experts=4: choose between 1 and 4 experts.')
    message = says(*OPTIONS, 'model_kwargs.group_size=7')
    assert message.startswith('group_size=7 does not divide the 20 tokens of a batch')
    assert says(*OPTIONS, 'model_kwargs.num_expert=5').endswith(
        "unexpected keyword argument 'num_expert'. Did you mean 'num_experts'?")
    message = says(*OPTIONS, 'model_kwargs.qqq=5')
    assert message.endswith("unexpected keyword argument 'qqq'")
    message = says('model=resnet18', *OPTIONS[-4:], 'model_kwargs.cardinalty=5')  # a keyword of timm's class
    assert message.endswith("'cardinalty'. Did you mean 'cardinality'?")


def test_data_folder(says, tmp_path, images):
    assert says(*OPTIONS, data=tmp_path / 'nowhere') == f"The data folder '{tmp_path / 'nowhere'}' does not exist."
    (tmp_path / 'empty' / 'train').mkdir(parents=True)
    assert says(*OPTIONS, data=tmp_path / 'empty') == (
        f"The data folder '{tmp_path / 'empty' / 'train'}' has no images in folders of classes.")
    (tmp_path / 'bare').mkdir()
    assert says(*OPTIONS, data=tmp_path / 'bare') == (
        f"The data folder '{tmp_path / 'bare'}' is empty: it needs 'train' with a folder for each class.")
    assert says(*OPTIONS, 'val_split=test') == (
        f"The data folder '{images}' has no folder 'test', only: train, validation; name it with val_split=NAME.")
    assert says(*OPTIONS, data=None).startswith(
        "No data: give --data-dir DIR, a folder with 'train' in it, or dataset=")
    assert says(*OPTIONS, 'dataset=digit', data=None).startswith("dataset='digit' is not known. Did you mean 'digits'?")
    assert says(*OPTIONS, 'batch_size=16') == (
        'The training data have 8 images, fewer than one batch of 16: lower batch_size.')


def test_class_counts(says, images):
    assert says(*OPTIONS, 'num_classes=3') == (
        'The data have 2 classes, but num_classes=3: set num_classes=2, or give class_map=FILE with the index of every'
        ' class.')
    assert says(*OPTIONS, 'num_classes=1') == 'The data have 2 classes, but num_classes=1: set num_classes=2.'
    (images / 'validation' / 'grey').mkdir()
    Image.new('RGB', (16, 16)).save(images / 'validation' / 'grey' / '0.png')
    assert says(*OPTIONS) == (
        f"The evaluation folder '{images / 'validation'}' has classes that training lacks: grey.")


def test_corrupt_image_under_strict_data(says, images):
    """Also out of a worker process, whose traceback stays there."""
    bad = images / 'train' / 'dark' / '1.png'
    bad.write_bytes(bad.read_bytes()[:40])
    for workers in (0, 1):
        assert says(*OPTIONS, '--strict-data', f'workers={workers}') == (
            f"Corrupt image '{bad}': --strict-data refuses data with unreadable images; repair or remove it, or leave"
            ' the flag out to skip and count them.')


@pytest.fixture
def trained(images, tmp_path):
    folder = tmp_path / 'run'
    assert train.main([*OPTIONS, f'output={tmp_path}', 'experiment=run', '--data-dir', str(images)]) == 0
    return folder / 'last.pth.tar'


def test_a_run_introduces_itself(capsys, trained):
    assert '1 routed layer, 2 classes, input 3x16x16; 8 images, 2 updates an epoch, 1 process on cpu;' in (
        ' '.join(capsys.readouterr().out.split()))


def test_checkpoints(says, trained, tmp_path, capsys):
    """Truncated, empty, foreign, of another model, of other classes, wanting code: told apart."""
    whole = trained.read_bytes()
    bad = tmp_path / 'bad.pth.tar'

    def evaluating(path, *more):
        return says('--checkpoint', path, *more, tool=evaluate_cli.main)

    assert evaluating(tmp_path / 'none.pth') == f"There is no checkpoint file '{tmp_path / 'none.pth'}'."
    bad.write_bytes(whole[:len(whole) // 2])
    truncated = f"The checkpoint '{bad}' cannot be read: it is truncated after {len(whole) // 2:,} bytes."
    assert evaluating(bad) == truncated
    assert says(*OPTIONS, '--resume', bad) == truncated
    assert says(*OPTIONS, f'initial_checkpoint={bad}') == truncated
    bad.write_bytes(b'')
    assert evaluating(bad) == f"The checkpoint '{bad}' cannot be read: it is empty."
    bad.write_text('a text')
    assert evaluating(bad).startswith(
        f"The checkpoint '{bad}' cannot be read: its 6 bytes are not a checkpoint of torch")
    torch.save({'weights': Image.new('RGB', (2, 2))}, bad)  # a class that loading would have to import
    assert 'files that need code to be executed are not loaded' in evaluating(bad)
    torch.save([1, 2], bad)
    assert evaluating(bad) == f"The checkpoint '{bad}' holds a list, not weights by name."
    torch.save({'a': torch.zeros(2)}, bad)
    assert says(*OPTIONS, f'initial_checkpoint={bad}').startswith(
        f"The checkpoint '{bad}' does not fit the model 'vmoe_vit_s': ")
    assert says(*OPTIONS, '--resume', bad).startswith(f"The checkpoint '{bad}' does not fit the model 'vmoe_vit_s'")
    assert evaluating(bad) == (
        f"The checkpoint '{bad}' does not say what it was trained with: give --config FILE or model=NAME.")
    assert evaluating(trained, 'model_kwargs.depth=3').startswith(f"The checkpoint '{trained}' does not fit the model")
    assert says(tool=evaluate_cli.main).startswith('Nothing to evaluate: give --checkpoint FILE')


def test_checkpoint_with_other_classes(says, trained, images, tmp_path):
    for split in ('train', 'validation'):
        (images / split / 'third').mkdir()
        for i in range(4):
            Image.new('RGB', (16, 16)).save(images / split / 'third' / f'{i}.png')
    message = (f"The checkpoint '{trained}' has another number of classes than the model: head.bias is (2,) there and"
               ' (3,) with num_classes=3.')
    assert says(*OPTIONS, f'initial_checkpoint={trained}', 'experiment=other') == message
    assert says('--checkpoint', trained, 'num_classes=3', tool=evaluate_cli.main) == message
    assert says('--checkpoint', trained, tool=evaluate_cli.main) == (
        f"The data folder '{images / 'validation'}' has classes that the model was not trained on: third.")


def test_weights_are_not_a_run(says, trained, tmp_path):
    weights = torch.load(trained, weights_only=True)['state_dict']
    torch.save(weights, tmp_path / 'weights.pth')
    assert says(*OPTIONS, '--resume', tmp_path / 'weights.pth') == (
        f"'{tmp_path / 'weights.pth'}' holds weights but no state of a run: use"
        f" initial_checkpoint={tmp_path / 'weights.pth'} instead.")


def test_disk_full_while_saving(says, trained, monkeypatch):
    """The second epoch cannot be written: the checkpoint of the first stays, and nothing lies beside it."""
    before = trained.read_bytes()

    def full(state, file):
        file.write(b'part')
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(checkpoint.torch, 'save', full)
    message = says(*OPTIONS, '--resume', 'epochs=2')
    assert message == (
        f"No space left to write '{trained}': free some and run again; what was there before is intact.")
    message = says(*OPTIONS, '--resume', 'epochs=2', 'recovery_interval=1')
    assert message.startswith(f"No space left to write '{trained.with_name('recovery-1-0.pth.tar')}': ")
    assert trained.read_bytes() == before
    assert {path.name for path in trained.parent.glob('*pth*')} == {
        'last.pth.tar', 'model_best.pth.tar', 'checkpoint-0.pth.tar'}


def test_nan_loss(says, tmp_path):
    """A step of 1e38 overflows: the second forward is not finite."""
    message = says(*OPTIONS, 'opt=sgd', 'lr=1e38', 'epochs=2', 'sched=constant')
    assert message.startswith('The loss is not finite (NaN or infinite) at step 2 of 2 in epoch 1; training stopped.')
    assert 'No checkpoint had been written yet' in message and 'lower lr' in message
    assert not list((tmp_path / 'run').glob('*.pth.tar'))


def test_a_process_exits_with_two(images, tmp_path, repository):
    """The door in tools/, as a person opens it."""
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(yaml.safe_dump({'model': 'no_such_model'}))
    done = subprocess.run(
        [sys.executable, str(repository / 'tools' / 'train_imagenet.py'), '--config', str(recipe), '--data-dir',
         str(images)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ''
    assert done.stderr.startswith("error: Unknown model 'no_such_model'.") and done.stderr.count('\n') == 1


def test_nearest():
    assert nearest('adamw', ['sgd']) == ''
    assert nearest('cosin', ['cosine', 'tanh']) == " Did you mean 'cosine'?"


def test_exit_on_input_error(capsys):
    @exit_on_input_error
    def main(error):
        raise error

    for error, code, text in ((InputError('a=1: use 2.'), 2, 'error: a=1: use 2.\n'),
                              (KeyboardInterrupt(), 130, 'interrupted\n')):
        with pytest.raises(SystemExit) as exit:
            main(error)
        assert exit.value.code == code and capsys.readouterr().err == text
    with pytest.raises(ZeroDivisionError):  # a fault of ours keeps its traceback
        main(ZeroDivisionError())


def test_one_rank_speaks(capsys, monkeypatch):
    """The others wait to be ended by torchrun, and speak if they are not."""
    waited = []
    monkeypatch.setattr(errors.time, 'sleep', waited.append)

    @exit_on_input_error
    def main():
        raise InputError('a=1: use 2.')

    for rank, waits in (('0', []), ('1', [errors.PATIENCE])):
        monkeypatch.setenv('LOCAL_RANK', rank)
        with pytest.raises(SystemExit) as exit:
            main()
        assert exit.value.code == 2 and waited == waits and capsys.readouterr().err == 'error: a=1: use 2.\n'


@pytest.mark.slow
def test_torchrun_prints_a_sentence_once(images, repository):
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=0', '--nnodes=1',
         '--rdzv_backend=c10d', '--rdzv_endpoint=localhost:0', '-m', 'moe_zoo.engine.train', 'model=no_such_model',
         'device=cpu', '--data-dir', str(images)],
        env=dict(os.environ, PYTHONPATH=str(repository)), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and done.stderr.count("error: Unknown model 'no_such_model'.") == 1, done.stderr


def test_counted():
    assert [counted(n, 'image') for n in (0, 1, 2000)] == ['0 images', '1 image', '2,000 images']
    assert [counted(n, 'class') for n in (1, 2)] == ['1 class', '2 classes']


def test_atomic_write(tmp_path):
    path = tmp_path / 'out.txt'
    with atomic_write(path) as temporary:
        temporary.write_text('one')
    with pytest.raises(ZeroDivisionError), atomic_write(path) as temporary:
        temporary.write_text('two')
        raise ZeroDivisionError
    assert path.read_text() == 'one' and list(tmp_path.iterdir()) == [path]
