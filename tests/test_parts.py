"""Checkpoints in parts: joined by a command, and nothing in a stranger's folder is run, whatever its pickles say.

Parts of several ranks are in test_parallel.py; here one process writes, and files are broken by hand.
"""
import io
import os
import pickle
import random
import re
from pathlib import Path
from typing import Any, Dict

import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

import moe_zoo  # noqa: F401  registers the models
from moe_zoo.checkpoints.convert_cli import main
from moe_zoo.checkpoints.parts import join_sharded, plan_parts, read_index
from moe_zoo.engine.parallel import load_sharded, save_sharded
from moe_zoo.errors import InputError

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is')
SMALL = dict(
    num_classes=3, img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=4)
WORDS = ['--model-kwargs', *(f'{key}={value}'.replace(' ', '') for key, value in SMALL.items())]


def write_parts(folder: Path, weights: Dict[str, torch.Tensor], **more: Any) -> Path:
    dcp.save({'model': weights, **more}, checkpoint_id=str(folder), no_dist=True)
    return folder


def content() -> Dict[str, torch.Tensor]:
    """Every kind of tensor that models have."""
    return {
        'weight': torch.randn(3, 4), 'half': torch.randn(5).bfloat16(), 'steps': torch.tensor(7),
        'mask': torch.tensor([True, False, True]), 'none': torch.zeros(0, 2), 'double': torch.randn(2).double()}


@pytest.fixture
def parts(tmp_path) -> Path:
    moments = {'lr': 0.1, 'betas': [0.9, 0.99], 'moment': torch.ones(3)}
    return write_parts(tmp_path / 'parts', content(), optimizer=moments)


# ---- what is sound

def test_every_tensor_comes_out_as_it_went_in(tmp_path):
    wanted = content()
    write_parts(tmp_path / 'parts', wanted, optimizer={'moment': torch.ones(1000)})
    plan = join_sharded(tmp_path / 'parts', tmp_path / 'joined.safetensors')
    found = load_file(tmp_path / 'joined.safetensors')
    assert found.keys() == plan.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert (tmp_path / 'joined.safetensors').stat().st_size < 2000  # the moments stayed behind


def test_the_index_says_what_torch_reads(parts):
    """Field by field what torch unpickles, but for what loading does not need."""
    with open(parts / '.metadata', 'rb') as file:
        theirs = pickle.load(file)
    ours = read_index(parts)
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys() and len(ours.state_dict_metadata) == 9
    assert ours.storage_data == theirs.storage_data
    for name, entry in theirs.state_dict_metadata.items():
        found = ours.state_dict_metadata[name]
        assert type(found) is type(entry)
        if hasattr(entry, 'size'):
            assert (found.size, found.properties) == (entry.size, entry.properties)
            assert found.chunks == [chunk for chunk in entry.chunks if chunk.sizes.numel()]


def test_the_command_joins_and_tells_how_to_load(tmp_path, capsys):
    model = timm.create_model('vmoe_vit_s', **SMALL)
    write_parts(tmp_path / 'parts', model.state_dict())
    out = tmp_path / 'joined.safetensors'
    assert main(['join', str(tmp_path / 'parts'), str(out), '--model', 'vmoe_vit_s', *WORDS]) == 0
    said = capsys.readouterr().out
    assert f"'{out}': {len(model.state_dict())} tensors, " in said
    call = re.search(r'Load it by (timm\.create_model\(.*\))\.$', said.strip())[1]
    again = eval(call, {'timm': timm})  # what it says is what a reader types
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert main(['join', str(tmp_path / 'parts'), str(tmp_path / 'other.safetensors')]) == 0
    assert "create_model('NAME'" in capsys.readouterr().out


def test_model_and_optimiser_are_loaded_back(tmp_path):
    """What is no tensor, such as the learning rate, comes through `weights_only=True`."""
    def trained(rate: float):
        model = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = trained(0.125)
    save_sharded(tmp_path / 'parts', model, optimizer)
    other, its = trained(0.5)
    load_sharded(tmp_path / 'parts', other, its)
    assert torch.equal(other.weight, model.weight) and its.param_groups[0]['lr'] == 0.125
    assert torch.equal(its.state[other.weight]['exp_avg'], optimizer.state[model.weight]['exp_avg'])
    with pytest.raises(InputError, match=r"parts' does not fit the model: Size mismatch"):
        load_sharded(tmp_path / 'parts', nn.Linear(3, 5))
    with pytest.raises(InputError, match=r"parts' does not fit the model: Missing key in checkpoint"):
        load_sharded(tmp_path / 'parts', nn.Sequential(nn.Linear(3, 2)))


# ---- what is refused

def refusal(capsys, *words: Any) -> str:
    with pytest.raises(SystemExit) as stop:
        main(['join', *map(str, words)])
    assert stop.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    return line


def test_what_the_command_refuses(parts, tmp_path, capsys):
    out = tmp_path / 'out.safetensors'
    assert f"'{tmp_path}' is no sharded checkpoint: it holds no file '.metadata'" in refusal(capsys, tmp_path, out)
    assert 'use a name that ends in .safetensors' in refusal(capsys, parts, tmp_path / 'out.pth')
    assert "Did you mean 'vmoe_vit_s'" in refusal(capsys, parts, out, '--model', 'vmoe_vit_ss')
    assert "Did you mean 'num_experts'" in refusal(
        capsys, parts, out, '--model', 'vmoe_vit_s', '--model-kwargs', 'num_expert=4')
    assert 'not for vmoe_vit_s: cls_token is missing in them' in refusal(capsys, parts, out, '--model', 'vmoe_vit_s')
    assert '--model-kwargs are those of --model NAME' in refusal(capsys, parts, out, '--model-kwargs', 'depth=2')
    write_parts(tmp_path / 'without', {})
    dcp.save({'weight': torch.ones(1)}, checkpoint_id=str(tmp_path / 'flat'), no_dist=True)
    assert "begin with 'model.', but weight." in refusal(capsys, tmp_path / 'flat', out)
    write_parts(tmp_path / 'complex', {'weight': torch.ones(2, dtype=torch.complex64)})
    assert "has 'weight' in torch.complex64" in refusal(capsys, tmp_path / 'complex', out)
    assert not out.exists()


def test_a_damaged_part_leaves_the_old_file(parts, tmp_path, capsys):
    out, data = tmp_path / 'out.safetensors', parts / '__0_0.distcp'
    out.write_bytes(b'old')
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    assert f"the file '__0_0.distcp' is truncated after {len(whole) - 1:,} bytes" in refusal(capsys, parts, out)
    data.write_bytes(b'\0' * len(whole))
    assert "distcp' cannot be read at 'model." in refusal(capsys, parts, out)
    data.unlink()
    assert "the file '__0_0.distcp' is missing beside it" in refusal(capsys, parts, out)
    assert out.read_bytes() == b'old' and not list(tmp_path.glob('.*.part'))


def rewritten(parts: Path, change: Any) -> None:
    """The index, as torch unpickles it, with a change."""
    index = pickle.loads((parts / '.metadata').read_bytes())
    change(index)
    (parts / '.metadata').write_bytes(pickle.dumps(index))


def entry(index: Any):
    return index.state_dict_metadata['model.weight']


def place(index: Any):
    return index.storage_data[MetadataIndex('model.weight', (0, 0))]


def set_to(get: Any, name: str, value: Any):
    return lambda index: setattr(get(index), name, value)


@pytest.mark.parametrize('change, sentence', [
    (set_to(place, 'relative_path', '../secret'), "the file '../secret' is missing beside it"),
    (set_to(place, 'relative_path', '/etc/passwd'), "the file '/etc/passwd' is missing beside it"),
    (set_to(place, 'offset', 10 ** 15), 'is truncated after'),
    (set_to(place, 'offset', -1), 'sizes that are no whole numbers'),
    (set_to(place, 'length', 8), "a part of 'model.weight' is larger than what is stored of it"),
    (set_to(place, 'transform_descriptors', ['zstd']), 'its tensors are compressed'),
    (set_to(entry, 'size', torch.Size((3, 5))), "the parts of 'model.weight' do not make it whole"),
    (set_to(entry, 'size', torch.Size((3,))), "a part of 'model.weight' lies outside of it"),
    (set_to(entry, 'size', (2 ** 70, 4)), 'sizes that are no whole numbers'),
    (set_to(entry, 'size', (True, 4)), 'sizes that are no whole numbers'),
    (set_to(entry, 'chunks', []), "the parts of 'model.weight' do not make it whole"),
    (lambda index: entry(index).chunks.append(entry(index).chunks[0]), 'do not make it whole'),
    (lambda index: index.state_dict_metadata.update(more=3), "'more' is neither a tensor nor bytes"),
    (lambda index: index.storage_data.clear(), 'cannot be read'),
    (set_to(lambda index: index, 'storage_data', None), 'cannot be read'),
    (set_to(entry, 'properties', None), 'cannot be read'),
])
def test_an_index_is_held_against_its_files(change, sentence, parts, capsys, tmp_path):
    rewritten(parts, change)
    assert sentence in refusal(capsys, parts, tmp_path / 'out.safetensors')


def test_one_part_cannot_stand_for_a_thousand_tensors(parts, tmp_path):
    """A small file that would be joined into a large one."""
    def many(index):
        for number in range(1000):
            name = f'model.weight{number}'
            index.state_dict_metadata[name] = entry(index)
            index.storage_data[MetadataIndex(name, (0, 0))] = place(index)
    rewritten(parts, many)
    with pytest.raises(InputError, match='it tells of 48,[0-9]{3} bytes, and the files have'):
        join_sharded(parts, tmp_path / 'out.safetensors')


def test_another_tensor_than_the_index_tells_of(parts, tmp_path):
    def turned(index):
        entry(index).size = torch.Size((4, 3))
        entry(index).chunks = [ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((4, 3)))]
    rewritten(parts, turned)
    with pytest.raises(InputError, match="holds something else than the part of 'model.weight'"):
        join_sharded(parts, tmp_path / 'out.safetensors')


# ---- strangers

class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def evil_pickles(trace: Path) -> Dict[str, bytes]:
    """Pickles that run code, or would end the process, each in its own way."""
    deep = b'\x80\x04}(' + b')' + b'\x85' * 200_000 + b'K\x01u.'  # a key of tuples in tuples
    module = b'\x8c' + bytes([len(os.mkdir.__module__)]) + os.mkdir.__module__.encode()
    made = b'\x8c' + bytes([len(str(trace))]) + str(trace).encode()
    return {
        'reduce': pickle.dumps(Evil(trace)),
        'inside': pickle.dumps({'state': [Evil(trace)]}, protocol=2),
        'text': pickle.dumps(Evil(trace), protocol=0),
        'stack': b'\x80\x04' + module + b'\x8c\x05mkdir\x93' + made + b'\x85R.',
        'instance': b'(S' + repr(str(trace)).encode() + b'\ni' + os.mkdir.__module__.encode() + b'\nmkdir\n.',
        'attribute': b'\x80\x04\x8c\x05torch\x8c\x0ahub.os.mkdir\x93' + made + b'\x85R.',
        'by number': b'\x80\x04\x82\x01.',
        'deep key': deep,
        'deep key, one': deep.replace(b'}(', b'}').replace(b'u.', b's.'),
        'old dict': b'(' + b')' + b'\x85' * 200_000 + b'K\x01d.',
        'set': b'\x80\x04\x8f(' + b')' + b'\x85' * 200_000 + b'\x90.',
        'far memory': b'\x80\x02}r\xff\xff\xff\x7f.',
        'long text': b'\x80\x04\x8d' + (2 ** 62).to_bytes(8, 'little') + b'x.',
        'changed class': b'\x80\x04\x8c\x29torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93N}\x8c\x08__init__K'
                         b'\x01s\x86b.',
        'changed size': b'\x80\x02ctorch\nSize\n}X\x01\x00\x00\x00xK\x01sb.',
        'empty': b'',
    }


@pytest.mark.parametrize('kind', evil_pickles(Path('x')))
def test_nothing_in_a_strangers_index_is_run(kind, parts, tmp_path, capsys):
    trace = tmp_path / 'trace'
    (parts / '.metadata').write_bytes(evil_pickles(trace)[kind])
    before = dict(vars(pickle.loads(pickle.dumps(torch.Size((1,)))).__class__))
    assert "The index '" in refusal(capsys, parts, tmp_path / 'out.safetensors')
    with pytest.raises(InputError, match='cannot be read'):
        load_sharded(parts, nn.Linear(1, 1))
    assert not trace.exists() and dict(vars(torch.Size)) == before


def test_nothing_in_a_strangers_parts_is_run(tmp_path):
    """What torch would unpickle of a part: bytes of an optimiser, or a tensor that is none."""
    trace = tmp_path / 'trace'
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    save_sharded(tmp_path / 'parts', model, optimizer)
    held = pickle.loads((tmp_path / 'parts' / '.metadata').read_bytes()).storage_data
    names = {key.fqn: where for key, where in held.items()}
    data = tmp_path / 'parts' / '__0_0.distcp'
    whole = data.read_bytes()
    rate = next(name for name in names if name.startswith('optimizer.param_groups'))
    for name in (rate, 'model.weight'):
        evil = io.BytesIO()
        torch.save(Evil(trace), evil)
        where = names[name]
        assert len(evil.getvalue()) <= where.length + len(whole)
        data.write_bytes(whole + evil.getvalue())
        rewritten(tmp_path / 'parts', lambda index, name=name, evil=evil: vars(next(
            place for key, place in index.storage_data.items() if key.fqn == name)).update(
                offset=len(whole), length=len(evil.getvalue())))
        with pytest.raises(InputError, match='does not fit the model: .*(weights_only|Weights only)'):
            load_sharded(tmp_path / 'parts', model, optimizer)
        assert not trace.exists()
    with pytest.raises(InputError, match='it is damaged, or wants code to be executed'):
        join_sharded(tmp_path / 'parts', tmp_path / 'out.safetensors')
    assert not trace.exists()


def test_whatever_byte_is_wrong_nothing_but_a_sentence_comes(parts):
    """150 indices with one byte changed, 50 that end too early: read as an index, or refused."""
    good = (parts / '.metadata').read_bytes()
    chance, refused = random.Random(0), 0
    damaged = [good[:at] + bytes([chance.randrange(256)]) + good[at + 1:]
               for at in (chance.randrange(len(good)) for _ in range(150))]
    for text in damaged + [good[:chance.randrange(len(good))] for _ in range(50)]:
        (parts / '.metadata').write_bytes(text)
        try:
            plan_parts(parts)
        except InputError as error:
            refused += 1
            assert 'cannot be read' in str(error) or 'holds no weights' in str(error)
    assert refused > 100
