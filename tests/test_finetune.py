"""`moe-zoo finetune`: from a dense file and a folder of classes to a model that knows their names."""
import json
import shutil
import socket
from collections import Counter

import huggingface_hub.constants
import pytest
import timm
import torch
from PIL import Image
from timm.optim import create_optimizer_v2

import moe_zoo  # noqa: F401 - registers the models
from moe_zoo.data import load_digits_split
from moe_zoo.engine import finetune
from moe_zoo.engine.build import build_model
from moe_zoo.engine.compare import twin_options
from moe_zoo.engine.config import load_config
from moe_zoo.engine.data import open_datasets
from moe_zoo.engine.evaluate import evaluate
from moe_zoo.engine.predict import main as predict
from moe_zoo.errors import InputError
from moe_zoo.layers import RoutedLayer

NAMES = ['eight', 'one', 'two']  # of the folders; sorted


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*args):
        raise AssertionError(f'asked the network for {args[-1]}')

    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))


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
    for run in ('run', 'run/twin'):
        checkpoint = torch.load(tmp_path / 'out' / run / 'last.pth.tar', weights_only=True)
        assert checkpoint['moe_zoo']['classes'] == NAMES and checkpoint['args']['num_classes'] == 3
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


VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2)
MOEFIED_VIT = dict(base='vit_tiny_patch16_224', targets='blocks.1.mlp', layer='moe_mlp', num_experts=3, **VIT)


@pytest.mark.parametrize('dense, name, kwargs, options', [
    ('resnet18', 'condconv_resnet18', dict(num_experts=2), {}),
    ('resnet18', 'moefied', dict(base='resnet18', targets='layer4.1.conv2', num_experts=2), {}),
    ('vit_tiny_patch16_224', 'moefied', MOEFIED_VIT, dict(img_size=48)),  # of 4 x 4 patches; to be of 6 x 6
])
def test_what_is_fine_tuned_begins_as_the_dense_network(dense, name, kwargs, options, tmp_path):
    """The file has another head, or none; for a `moefied` model the configuration is that of the base."""
    shape = VIT if 'vit' in dense else {}
    network = timm.create_model(dense, num_classes=0, **shape)
    torch.save(network.state_dict(), tmp_path / 'dense.pth')
    size = options.get('img_size', 32)
    kwargs = {k: v for k, v in kwargs.items() if k != 'img_size'}
    args = load_config(finetune.RECIPE, dict(
        model=name, model_kwargs=kwargs, num_classes=3, pretrained_path=str(tmp_path / 'dense.pth'), **options))
    model = build_model(args).eval()
    larger = timm.create_model(dense, pretrained=True, pretrained_cfg_overlay=dict(
        state_dict=network.state_dict(), num_classes=0), num_classes=0, **{**shape, **options}).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), larger.forward_features(x), rtol=1e-4, atol=1e-4)
    assert model.num_classes == 3
    for key in ('mean', 'std', 'classifier', 'interpolation', 'crop_pct'):
        assert model.pretrained_cfg[key] == larger.pretrained_cfg[key]


def test_the_twin_of_a_moefied_model_is_its_base():
    args = load_config(finetune.RECIPE, dict(model='moefied', model_kwargs=MOEFIED_VIT))
    assert twin_options(args) == {'model': 'vit_tiny_patch16_224', 'model_kwargs': VIT}


# Name, keywords, and by block the rate under a decay of a half, by hand: the head has 1, each block half of the next.
# In timm's ViT the last block has that of the norm after it and of the head.
RATES = [
    ('condconv_resnet50', {}, {'layer4.0': 1 / 8, 'layer4.1': 1 / 4, 'layer4.2': 1 / 2, 'fc': 1}),
    ('vmoe_vit_s', {}, {'blocks.5': 1 / 8, 'blocks.7': 1 / 2}),
    ('moefied', dict(base='vit_small_patch14_dinov2', targets=['blocks.7.mlp', 'blocks.11.mlp'], layer='moe_mlp'),
     {'blocks.7': 1 / 16, 'blocks.11': 1}),
    ('moefied', {}, {'layer4.0': 1 / 4, 'layer4.1': 1 / 2}),
]


@pytest.mark.parametrize('name, kwargs, blocks', RATES)
def test_experts_and_routers_learn_at_the_rate_of_their_block(name, kwargs, blocks):
    model = timm.create_model(name, device='meta', **kwargs)
    optimizer = create_optimizer_v2(model, 'adamw', lr=1.0, layer_decay=0.5)
    rates = {id(p): group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    found = {name: rates[id(p)] for name, p in model.named_parameters()}
    routed = [name for name, module in model.named_modules() if isinstance(module, RoutedLayer)]
    assert routed and all(name.startswith(tuple(blocks)) for name in routed)
    for block, rate in blocks.items():
        here = {name: found[name] for name in found if name.startswith(f'{block}.')}
        assert set(here.values()) == {rate}
        assert any('.router.' in name or '.routing_fn.' in name for name in here)
    assert rates[id(list(model.parameters())[-1])] == 1


OTHER = 'of another architecture than the model: '
STEM = 'conv1.weight is missing in them, and the model takes shape (64, 3, 7, 7).'
NOT_FETCHED = (
    '{} cannot be fetched (LocalEntryNotFoundError); pass its model.safetensors as pretrained_path=FILE (finetune: '
    '--from-dense FILE).')


@pytest.mark.parametrize('model, weights, message', [
    ('condconv_resnet18', 'gone.pth', "--from-dense: there is no file 'gone.pth'."),
    ('condconv_resnet18', 'none.pth', "The checkpoint 'none.pth' cannot be read: it is empty."),
    ('condconv_resnet18', 'other.pth', f'The dense weights are {OTHER}{STEM}'),
    ('resnet18', 'other.pth', f"The weights in 'other.pth' are {OTHER}bn1.weight has shape (16) in them, and the model "
     'takes (64).'),
    ('convnext_atto', 'other.pth', "The weights in 'other.pth' are of another architecture than the model, which has "
     'no classifier.weight.'),
    ('resnet34', 'resnet18.pth', f"The weights in 'resnet18.pth' are {OTHER}layer1.2.conv1.weight is missing in them, "
     'and the model takes shape (64, 64, 3, 3).'),
    ('condconv_resnet50', '', NOT_FETCHED.format(
        'pretrained=True: the weights of condconv_resnet50 are those of timm/resnet50.a1_in1k, which')),
    ('resnet18', '', NOT_FETCHED.format('pretrained=true: the weights of resnet18')),
])
def test_refusals(model, weights, message, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model('mobilenetv2_050').state_dict(), 'other.pth')
    torch.save(timm.create_model('resnet18', num_classes=7).state_dict(), 'resnet18.pth')
    (tmp_path / 'none.pth').touch()
    with pytest.raises(SystemExit) as stop:
        finetune.main(
            ['--model', model, '--data-dir', str(folder), *(['--from-dense', weights] if weights else [])])
    assert stop.value.code == 2 and capsys.readouterr().err == f'error: {message}\n'
    assert not (tmp_path / 'output').exists()
