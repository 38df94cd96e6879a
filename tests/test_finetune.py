"""`moe-zoo finetune`: from a dense file and a folder of classes to a model that knows their names."""
import json
import shutil
from collections import Counter

import pytest
import timm
import torch
from PIL import Image
from timm.optim import create_optimizer_v2

import moe_zoo  # noqa: F401 - registers the models
from moe_zoo.data import load_digits_split
from moe_zoo.engine import finetune
from moe_zoo.engine.config import load_config
from moe_zoo.engine.data import open_datasets
from moe_zoo.engine.evaluate import evaluate
from moe_zoo.engine.predict import main as predict
from moe_zoo.errors import InputError

NAMES = ['eight', 'one', 'two']  # of the folders; sorted


@pytest.fixture
def folder(tmp_path):
    """20 digits of each of three classes, in folders of classes without train/ and val/."""
    images, targets, _, _ = load_digits_split()
    for name, digit in zip(NAMES, (8, 1, 2)):
        (tmp_path / 'data' / name).mkdir(parents=True)
        for i, image in enumerate(images[targets == digit][:20]):
            Image.fromarray(image).resize((32, 32)).save(tmp_path / 'data' / name / f'{i}.png')
    return tmp_path / 'data'


def test_a_share_of_every_class_is_held_out_by_the_seed(folder):
    def files(**options):
        parts = open_datasets(load_config({'data_dir': str(folder), 'val_share': 0.1, **options}))
        return [[path for path, _ in part.reader.samples] for part in parts]

    train, held_out = files(seed=1)
    assert (len(train), len(held_out)) == (54, 6) and not set(train) & set(held_out)
    assert Counter(path.split('/')[-2] for path in held_out) == dict.fromkeys(NAMES, 2)
    assert files(seed=1) == [train, held_out] and files(seed=2)[1] != held_out
    (folder / 'train').mkdir()
    for name in NAMES:
        (folder / name).rename(folder / 'train' / name)
    assert [len(part) for part in files()] == [54, 6]  # below train/ as well
    (folder / 'val').mkdir()
    for name in NAMES:
        (folder / 'val' / name).mkdir()
        (folder / 'train' / name / '0.png').rename(folder / 'val' / name / '0.png')
    assert [len(part) for part in files()] == [57, 3]  # a folder for evaluation wins


def test_nothing_is_not_evaluated(folder):
    for name in NAMES:
        for i in range(1, 20):
            (folder / name / f'{i}.png').unlink()
    with pytest.raises(InputError, match="^val_share=0.1: no class of '.*' has two images, so that none can be held"):
        open_datasets(load_config({'data_dir': str(folder), 'val_share': 0.1}))


def test_from_dense_weights_beside_the_twin_to_names(folder, tmp_path, capsys):
    torch.manual_seed(0)
    dense = timm.create_model('resnet18', num_classes=1000)
    torch.save(dense.state_dict(), tmp_path / 'dense.pth')
    options = ['img_size=32', 'epochs=1', 'warmup_epochs=0', 'batch_size=18', 'workers=0', 'layer_decay=0.5']
    assert finetune.main([
        '--model', 'condconv_resnet18', '--data-dir', str(folder), '--from-dense', str(tmp_path / 'dense.pth'),
        '--twin', 'model_kwargs.num_experts=2', f'output={tmp_path / "out"}', 'experiment=run', *options]) == 0
    results = json.loads((tmp_path / 'out/run/results.json').read_text())
    assert results['model'][0]['model'] == 'condconv_resnet18' and results['twin'][0]['model'] == 'resnet18'
    capsys.readouterr()
    assert predict([str(tmp_path / 'out/run'), str(folder / 'one' / '3.png')]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)
    # A tenth of the folder of training was held out; of another folder all images are for evaluation.
    shutil.copytree(folder, tmp_path / 'other')
    checkpoint = tmp_path / 'out/run/last.pth.tar'
    for data, images in ((folder, 6), (tmp_path / 'other', 60)):
        found = evaluate(overrides={'data_dir': str(data)}, checkpoint=checkpoint, usage=False, quiet=True)
        assert found['images'] == images


def test_experts_and_routers_learn_at_the_rate_of_their_block():
    model = timm.create_model('vmoe_vit_s', depth=4, embed_dim=32, num_heads=2, num_experts=2, img_size=32)
    optimizer = create_optimizer_v2(model, 'adamw', lr=1.0, layer_decay=0.5)
    rates = {id(p): group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    routed = next(name for name in found if '.router.' in name).split('.router.')[0]  # blocks.I.mlp
    block = routed.rpartition('.')[0]
    here = {rate for name, rate in found.items() if name.startswith(f'{block}.')}
    assert len(here) == 1 and here != {found['head.weight']} and here != {found['patch_embed.proj.weight']}


@pytest.mark.parametrize('weights, message', [
    ('gone.pth', "--from-dense: there is no file 'gone.pth'."),
    ('other.pth', 'of another architecture than the model: conv1.weight is missing'),
])
def test_refusals(weights, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model('mobilenetv2_050').state_dict(), 'other.pth')
    with pytest.raises(SystemExit) as stop:
        finetune.main(['--model', 'condconv_resnet18', '--data-dir', str(folder), '--from-dense', weights])
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / 'output').exists()
