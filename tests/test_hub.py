"""Round trips of one name of every family: pushed to a hub, or saved to a folder, and loaded again without a network.

Nothing but the network is replaced: what would be uploaded is kept as a folder, what would be downloaded is a file.
"""
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file
from test_upcycle import RESNET, ROUTED_VIT, VIT, lively
from timm.models import _hub, push_to_hf_hub, save_for_hf
from torch import nn

import moe_zoo  # noqa: F401 - registers the models
from moe_zoo.checkpoints import merge, prune
from moe_zoo.layers import RoutedLayer
from moe_zoo.routing import set_epoch, trace_routing

ROUTED_RESNET = dict(RESNET, num_classes=5)
TOKENS = dict(ROUTED_VIT, num_classes=5)
TRIO = ('test_resnet', 'test_efficientnet')
# family: name, its keywords, the dense network that it starts from (a dictionary: each from a hub), what it shrinks by
FAMILIES = {
    'condconv': ('condconv_resnet18', dict(ROUTED_RESNET, num_experts=3), 'resnet18', (prune, merge)),
    'dyconv': ('dyconv_resnet18', ROUTED_RESNET, 'resnet18', (prune, merge)),
    'deepmoe': ('deepmoe_resnet18', dict(ROUTED_RESNET, embed_widths=(16, 32)), 'resnet18', ()),
    'deepmoe-classifier': ('deepmoe_resnet18', dict(ROUTED_RESNET, embed_widths=(16, 32), embed_dim=7), None, ()),
    'moe': ('moe_resnet18', dict(ROUTED_RESNET, layer='conv'), 'resnet18', (prune, merge)),
    'moe-stage': ('moe_resnet18', dict(ROUTED_RESNET, constraint='relative'), 'resnet18', (prune,)),
    'pmoe': ('pmoe_cnn', dict(num_classes=5), None, ()),
    'vmoe': ('vmoe_vit_b', dict(TOKENS, router_args={'renormalise': True}), 'vit_tiny_patch16_224', (prune, merge)),
    'vmoe-cosine': ('vmoe_vit_b', dict(TOKENS, router='cosine'), None, (prune,)),
    'ec': ('vmoe_vit_b_ec', TOKENS, 'vit_tiny_patch16_224', (prune,)),
    'softmoe': ('softmoe_vit_s', dict(TOKENS, moe_layers=(1,)), None, (prune, merge)),
    'fusion': ('fusion_trio', dict(encoders=TRIO, num_classes=5), dict.fromkeys(TRIO, {}), ()),
    'moefied': ('moefied', dict(ROUTED_RESNET, base='resnet18.a1_in1k', num_experts=3), dict(resnet18=RESNET),
                (prune, merge)),
    'moefied-tokens': ('moefied', dict(VIT, num_classes=5, base='vit_tiny_patch16_224', targets='blocks.1.mlp',
                                       layer='moe_mlp', num_experts=4), None, (prune,)),
}
# Whatever would load or download something when the model is made again.
STARTERS = ('pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'encoder_pretrained', 'checkpoint_path',
            'cache_dir', 'file', 'state_dict', 'url', 'hf_hub_id')


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))

    def refuse(*args, **kwargs):
        raise AssertionError(f'a connection was opened: {args}')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'create_connection', refuse)


@contextlib.contextmanager
def downloads(shapes, tmp_path):
    """Where timm would download weights of these networks, it gets random ones; yields the cache of each."""
    asked = []

    def download(repo_id, filename, **kwargs):
        asked.append(kwargs['cache_dir'])
        name = repo_id.removeprefix('timm/').partition('.')[0]
        path = tmp_path / f'{name}.safetensors'
        save_file(lively(timm.create_model(name, **shapes[name])).state_dict(), path)
        return path
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_hub, 'hf_hub_download', download)
        yield asked


def build(family, tmp_path) -> nn.Module:
    """A model that began with what a user would give it, and has a life behind it."""
    name, kwargs, source, _ = FAMILIES[family]
    if isinstance(source, dict):
        with downloads(source, tmp_path) as asked:
            model = timm.create_model(name, pretrained=True, cache_dir=tmp_path / name, **kwargs)
        assert len(asked) == len(source)
        assert family == 'fusion' or asked == [tmp_path / name]
    elif source:
        dense = timm.create_model(source, num_classes=5, **(VIT if 'vit' in source else RESNET))
        save_file(lively(dense).state_dict(), tmp_path / 'dense.safetensors')
        overlay = dict(file=str(tmp_path / 'dense.safetensors'), num_classes=5)
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    else:
        model = lively(timm.create_model(name, **kwargs))
    set_epoch(model, 3)  # Dynamic Convolution's temperature follows from it
    return live(model)


@torch.no_grad()
def live(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def images_for(model: nn.Module) -> torch.Tensor:
    size = 84 if model.in_chans == 1 else 64 if hasattr(model, 'encoders') else 32
    return torch.randn(3, model.in_chans, size, size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(images_for(model))


def pushed(model: nn.Module, folder, monkeypatch, **kwargs):
    """The folder that timm would upload."""
    class Api:
        def __init__(self, *args, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return SimpleNamespace(repo_id=repo_id)

        def file_exists(self, **kwargs):
            return False

        def upload_folder(self, folder_path, **kwargs):
            shutil.copytree(folder_path, folder)
    monkeypatch.setattr(_hub, 'HfApi', Api)
    push_to_hf_hub(model, 'someone/model', **kwargs)
    return folder


def keys_of(tree):
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from keys_of(value)


def check_round_trip(model: nn.Module, folder) -> nn.Module:
    """The model again, from its folder and from its safetensors file. Returns it."""
    config = json.loads((folder / 'config.json').read_text())
    args = config['model_args']
    assert not set(STARTERS) & {*args, *keys_of(config['pretrained_cfg'])}
    assert str(folder.parent) not in json.dumps(config)
    again = timm.create_model(f'local-dir:{folder}', pretrained=True)
    by_hand = timm.create_model(config['architecture'], checkpoint_path=folder / 'model.safetensors', **args)
    wanted = logits(model)
    assert wanted.std() > 1e-3
    for each in (again, by_hand):
        assert type(each) is type(model) and torch.equal(logits(each), wanted)
    other = timm.create_model(f'local-dir:{folder}')  # its shape, not its weights
    assert not torch.equal(logits(other), wanted)
    return again


VARIANTS = ('moe-stage', 'vmoe-cosine', 'moefied-tokens')


@pytest.mark.parametrize('family', [
    pytest.param(family, marks=pytest.mark.slow if family in VARIANTS else ()) for family in FAMILIES])
def test_what_is_pushed_is_loaded_without_a_network(family, tmp_path, monkeypatch):
    model = build(family, tmp_path)
    folder = pushed(model, tmp_path / 'pushed', monkeypatch)
    assert {'README.md', 'config.json', 'model.safetensors', 'pytorch_model.bin'} <= {p.name for p in folder.iterdir()}
    again = check_round_trip(model, folder)
    # What it is saved as once more is the same.
    save_for_hf(again, tmp_path / 'again', safe_serialization=True)
    assert (tmp_path / 'again' / 'config.json').read_text() == (folder / 'config.json').read_text()
    # It is a start for other classes, by hand or by argument.
    again.reset_classifier(3)
    live(again)
    other = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=3)
    assert logits(other).shape == (3, 3)
    check_round_trip(again, pushed(again, tmp_path / 'other', monkeypatch))


@pytest.mark.parametrize('family, shrink', [
    pytest.param(family, each, marks=(
        pytest.mark.slow if family in VARIANTS or (each is merge and family != 'condconv') else ()))
    for family, row in FAMILIES.items() for each in row[3]])
def test_a_smaller_model_is_loaded_small(family, shrink, tmp_path, monkeypatch):
    model = build(family, tmp_path)
    with trace_routing(model) as trace:
        logits(model)
    smaller = shrink(model, trace, keep=2)
    again = check_round_trip(smaller, pushed(smaller, tmp_path / 'pushed', monkeypatch))
    assert {layer.num_experts for layer in again.modules() if isinstance(layer, RoutedLayer)} == {2}
    assert again._model_args['num_experts'] == 2


def test_arguments_that_are_given_are_added(tmp_path, monkeypatch):
    """Nobody has to: a model of timm.create_model knows its own."""
    model = timm.create_model('condconv_resnet18', num_experts=3, **ROUTED_RESNET)
    folder = pushed(model, tmp_path / 'pushed', monkeypatch, model_args=dict(drop_rate=0.2), model_config=dict(
        pretrained_cfg=dict(label_names=list('abcde'))))
    config = json.loads((folder / 'config.json').read_text())
    assert config['model_args'] == {
        **{key: list(value) if isinstance(value, tuple) else value for key, value in ROUTED_RESNET.items()},
        'num_experts': 3, 'drop_rate': 0.2, 'in_chans': 3, 'global_pool': 'avg'}
    assert timm.create_model(f'local-dir:{folder}', pretrained=True).drop_rate == 0.2


RELOAD = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError('a connection was opened')
socket.socket.connect = socket.create_connection = refuse
import timm, torch
import moe_zoo
for folder in sys.argv[1:]:
    model = timm.create_model('local-dir:' + folder, pretrained=True).eval()
    x = torch.load(folder + '/x.pt')
    with torch.no_grad():
        assert torch.equal(model(x['images']), x['logits']), folder
print('all equal')
"""


@pytest.mark.slow
def test_another_process_loads_them_offline(tmp_path):
    folders = []
    for family in FAMILIES:
        folder = tmp_path / family / 'saved'
        folder.mkdir(parents=True)
        model = build(family, folder.parent)
        save_for_hf(model, folder, safe_serialization=True)
        torch.save({'logits': logits(model), 'images': images_for(model)}, folder / 'x.pt')
        folders.append(str(folder))
    done = subprocess.run(
        [sys.executable, '-c', RELOAD, *folders], capture_output=True, text=True,
        env={**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path / 'home')})
    assert done.returncode == 0 and done.stdout.strip().endswith('all equal'), done.stderr
