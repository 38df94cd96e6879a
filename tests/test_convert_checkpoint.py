"""Checkpoints that the authors of V-MoE released: read bit for bit, converted with little memory, refused if broken.

The files made here come from the msgpack package, the reader has its own few lines of it.
Letters: D width, E experts, M hidden width.
"""
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_vmoe_models import ENTRY, flax_tree, tiny

from moe_zoo import cli
from moe_zoo.cards import card
from moe_zoo.checkpoints import import_vmoe, plan_vmoe, read_vmoe, write_safetensors
from moe_zoo.checkpoints.convert_cli import main
from moe_zoo.errors import InputError
from moe_zoo.models.vmoe import RELEASED, from_config

MARK = '__msgpack_array_chunk_a87ca2__'


def pack_slices(where):
    msgpack = pytest.importorskip('msgpack')
    return msgpack.packb([msgpack.packb([start, stop, None]) for start, stop in where])


def write_checkpoint(prefix, tree, shards=2, chunk=1000):
    """The released format. Every array is halved along its first axis, the halves dealt to the data files in turn.

    Args:
        tree: Arrays by path.
        chunk: Elements a chunk of a piece has at most.
    """
    msgpack = pytest.importorskip('msgpack')
    index, data = {}, [{MARK: True} for _ in range(shards)]
    for number, name in enumerate(sorted(tree, key=lambda name: name.split('/'))):
        array = np.asarray(tree[name])
        cuts = [[(0, size) for size in array.shape]]
        if array.ndim and array.shape[0] > 1:
            half = array.shape[0] // 2
            cuts = [[rows, *cuts[0][1:]] for rows in ((0, half), (half, array.shape[0]))]
        owners = [(number + i) % shards for i in range(len(cuts))]
        for where, shard in zip(cuts, owners):
            flat = array[tuple(slice(*s) for s in where)].ravel()
            chunks = [flat[i:i + chunk] for i in range(0, len(flat), chunk)]
            packed = [msgpack.ExtType(1, msgpack.packb([[len(c)], str(c.dtype), c.tobytes()])) for c in chunks]
            data[shard].setdefault(str(number), []).append([packed, msgpack.ExtType(6, pack_slices(where))])
        at = index
        *folders, leaf = name.split('/')
        for folder in folders:
            at = at.setdefault(folder, {})
        info = [msgpack.packb([list(array.shape), str(array.dtype), False, {}]), [pack_slices(c) for c in cuts], owners]
        at[leaf] = msgpack.ExtType(8, msgpack.packb(info))
    Path(f'{prefix}.index').write_bytes(
        msgpack.packb({'shard_count': shards, 'index': index, 'version': '20220622'}))
    for shard, content in enumerate(data):
        Path(f'{prefix}.data-{shard:05d}-of-{shards:05d}').write_bytes(msgpack.packb(content))
    return str(prefix)


@pytest.fixture
def released(tmp_path):
    """A small V-MoE in the released format, and its state dictionary."""
    model = tiny(depth=2, moe_layers=(1,))
    return write_checkpoint(tmp_path / 'small', flax_tree(model)), model


def test_the_recorded_checkpoint_bit_for_bit(shared_parity):
    """Written by the original's own code, 2 files, chunks of 4 KB."""
    weights = read_vmoe(shared_parity / 'vmoe' / 'vmoe_tiny_a_ckpt' / 'ckpt')
    with np.load(shared_parity / 'vmoe' / 'vmoe_tiny_a.npz') as arrays:
        expected = {key.removeprefix('params/'): arrays[key] for key in arrays if key.startswith('params/')}
    assert weights.keys() == expected.keys()
    for key, array in expected.items():
        read = np.asarray(weights[key])
        assert (read.dtype, read.shape, read.tobytes()) == (array.dtype, array.shape, array.tobytes()), key


def test_the_recorded_checkpoint_converted_computes_what_was_recorded(shared_parity, tmp_path, capsys):
    folder = shared_parity / 'vmoe'
    out = tmp_path / 'out.safetensors'
    assert main(['vmoe', str(folder / 'vmoe_tiny_a_ckpt' / 'ckpt'), str(out)]) == 0
    assert 'No registered model has these shapes' in capsys.readouterr().out
    model = from_config(json.loads((folder / 'vmoe_tiny_a.json').read_text())['model'], img_size=32).eval()
    model.load_state_dict(load_file(out))
    with np.load(folder / 'vmoe_tiny_a.npz') as arrays, torch.no_grad():
        logits = model(torch.from_numpy(arrays['inputs']).permute(0, 3, 1, 2))
        torch.testing.assert_close(logits, torch.from_numpy(arrays['eval/logits']), rtol=0, atol=2e-5)


def test_what_another_msgpack_wrote_is_read(released):
    prefix, model = released
    for given in (prefix, f'{prefix}.index', Path(prefix)):
        state = import_vmoe(read_vmoe(given))
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_other_types_and_arrays_without_axes(tmp_path):
    """1.5 is 0x3fc0 in bfloat16, -2 is 0xc000."""
    msgpack = pytest.importorskip('msgpack')
    tree = {'a/half': np.arange(6, dtype=np.float16).reshape(2, 3), 'b': np.array(7, np.int32)}
    prefix = write_checkpoint(tmp_path / 'mixed', tree, shards=1)
    weights = read_vmoe(prefix)
    assert np.array_equal(weights['a/half'], tree['a/half']) and weights['a/half'].dtype == np.float16
    assert np.asarray(weights['b']).shape == () and np.asarray(weights['b']) == 7

    info = [msgpack.packb([[2], 'bfloat16', False, {}]), [pack_slices([(0, 2)])], [0]]
    (tmp_path / 'b.index').write_bytes(msgpack.packb(
        {'shard_count': 1, 'index': {'x': msgpack.ExtType(8, msgpack.packb(info))}}))
    numbers = msgpack.ExtType(1, msgpack.packb([[2], 'bfloat16', b'\xc0\x3f\x00\xc0']))
    (tmp_path / 'b.data-00000-of-00001').write_bytes(msgpack.packb(
        {MARK: True, '0': [[[numbers], msgpack.ExtType(6, pack_slices([(0, 2)]))]]}))
    assert np.asarray(read_vmoe(tmp_path / 'b')['x']).tolist() == [1.5, -2.]


def test_pieces_across_columns(tmp_path):
    """A piece that is no run of memory: columns 0 and 1, and column 2, of a 2 x 3 array in two files."""
    msgpack = pytest.importorskip('msgpack')
    cuts = [[(0, 2), (0, 2)], [(0, 2), (2, 3)]]
    info = [msgpack.packb([[2, 3], 'float32', False, {}]), [pack_slices(c) for c in cuts], [0, 1]]
    (tmp_path / 'c.index').write_bytes(msgpack.packb(
        {'shard_count': 2, 'index': {'x': msgpack.ExtType(8, msgpack.packb(info))}}))
    for shard, (cut, values) in enumerate(zip(cuts, ([1, 2, 4, 5], [3, 6]))):
        flat = np.array(values, np.float32)
        piece = msgpack.ExtType(1, msgpack.packb([[len(flat)], 'float32', flat.tobytes()]))
        (tmp_path / f'c.data-{shard:05d}-of-00002').write_bytes(msgpack.packb(
            {MARK: True, '0': [[[piece], msgpack.ExtType(6, pack_slices(cut))]]}))
    assert np.asarray(read_vmoe(tmp_path / 'c')['x']).tolist() == [[1, 2, 3], [4, 5, 6]]
    # The index has a row too many: the data files do not cover it. Or it says another type.
    for shape, stored, message in (
            ([3, 3], 'float32', "do not belong together: the pieces of 'x' differ"),
            ([2, 3], 'int32', 'do not belong together: the pieces of array number 0 differ'),
            ([2, 3], 'object', "is not a file of a released V-MoE checkpoint: an array is of the type 'object'")):
        info[0] = msgpack.packb([shape, stored, False, {}])
        (tmp_path / 'c.index').write_bytes(msgpack.packb(
            {'shard_count': 2, 'index': {'x': msgpack.ExtType(8, msgpack.packb(info))}}))
        with pytest.raises(InputError, match=message):
            read_vmoe(tmp_path / 'c')


def test_a_plan_knows_shapes_and_types_without_reading(released, tmp_path):
    prefix, model = released
    weights = read_vmoe(prefix)
    for path in tmp_path.glob('small.data-*'):
        path.unlink()  # nothing below may read them
    plan = plan_vmoe(weights)
    assert {name: (t.shape, t.dtype) for name, t in plan.items()} == {
        name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}


def test_the_file_is_an_ordinary_safetensors_file(released, tmp_path):
    prefix, model = released
    out = tmp_path / 'out.safetensors'
    assert main(['vmoe', prefix, str(out)]) == 0
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in load_file(out).items())
    with safe_open(out, framework='pt') as file:
        assert file.metadata() == {'format': 'pt', 'source': 'small'}
        assert set(file.keys()) == set(model.state_dict())
    header = int.from_bytes(out.read_bytes()[:8], 'little')
    assert header % 8 == 0
    # timm loads it by its path.
    again = tiny(depth=2, moe_layers=(1,), checkpoint_path=str(out))
    assert torch.equal(again.head.weight, model.head.weight)


def test_positions_are_resized_corner_to_corner(released, tmp_path):
    """A table that falls from row to row, 4 x 4 to 8 x 8: row r of 8 is at 3 r / 7 of the old rows; the class stays."""
    prefix, model = released
    with torch.no_grad():
        model.pos_embed[0, 0] = 9.
        model.pos_embed[0, 1:] = torch.arange(4.).repeat_interleave(4).unsqueeze(1)
    write_checkpoint(prefix, flax_tree(model))
    out = tmp_path / 'out.safetensors'
    assert main(['vmoe', prefix, str(out), '--img-size', '64']) == 0
    table = load_file(out)['pos_embed']
    assert table.shape == (1, 65, 32) and (table[0, 0] == 9.).all()
    torch.testing.assert_close(table[0, 1::8, 5], torch.arange(8) * 3 / 7)
    # As the original: scipy's zoom of order 1 on the (1, 4, 4, D) grid.
    with torch.no_grad():
        model.pos_embed.normal_()
    write_checkpoint(prefix, flax_tree(model))
    assert main(['vmoe', prefix, str(out), '--img-size', '64']) == 0
    table = load_file(out)['pos_embed']
    zoom = pytest.importorskip('scipy.ndimage').zoom
    grid = zoom(model.pos_embed.detach()[:, 1:].view(1, 4, 4, 32).numpy(), (1, 2, 2, 1), order=1)
    torch.testing.assert_close(table[:, 1:], torch.from_numpy(grid).view(1, 64, 32), rtol=1e-5, atol=1e-6)
    # The same as the model's own way.
    larger = tiny(depth=2, moe_layers=(1,))
    larger.load_state_dict(model.state_dict())
    larger.set_input_size(img_size=(64, 64))
    torch.testing.assert_close(table, larger.pos_embed.detach())
    # timm's way to a file resizes too.
    assert main(['vmoe', prefix, str(out)]) == 0
    overlay = dict(file=str(out), num_classes=10, input_size=(3, 32, 32))
    loaded = tiny(depth=2, moe_layers=(1,), img_size=64, pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(loaded.pos_embed.detach(), table)


def flax_shapes(D):
    """Shapes by the original's names of the arrays of V-MoE-S/32, Last 2, or of one that is narrower."""
    M, E = 4 * D, 8
    shapes = {
        'embedding/kernel': (32, 32, 3, D), 'embedding/bias': (D,), 'cls': (1, 1, D),
        'Encoder/posembed_input/pos_embedding': (1, 50, D), 'Encoder/encoder_norm/scale': (D,),
        'Encoder/encoder_norm/bias': (D,), 'pre_logits/kernel': (D, D), 'pre_logits/bias': (D,),
        'head/kernel': (D, 1000), 'head/bias': (1000,)}
    for i in range(8):
        block = f'Encoder/encoderblock_{i}/'
        for norm in ('LayerNorm_0', 'LayerNorm_1'):
            shapes |= {f'{block}{norm}/scale': (D,), f'{block}{norm}/bias': (D,)}
        for name in ('query', 'key', 'value'):
            shapes |= {
                f'{block}SelfAttention/{name}/kernel': (D, 8, D // 8), f'{block}SelfAttention/{name}/bias': (8, D // 8)}
        shapes |= {f'{block}SelfAttention/out/kernel': (8, D // 8, D), f'{block}SelfAttention/out/bias': (D,)}
        routed = i in (5, 7)
        mlp, experts = (f'{block}Moe/Mlp/', (E,)) if routed else (f'{block}Mlp/', ())
        shapes |= {
            f'{mlp}Dense_0/kernel': (*experts, D, M), f'{mlp}Dense_0/bias': (*experts, M),
            f'{mlp}Dense_1/kernel': (*experts, M, D), f'{mlp}Dense_1/bias': (*experts, D)}
        if routed:
            shapes[f'{block}Moe/Router/dense/kernel'] = (D, E)
    return shapes


# What getrusage calls the peak is at least that of the parent process; Linux forgets VmHWM when asked to.
MEASURE = """
import pathlib, re, sys
from moe_zoo.checkpoints.convert_cli import main
def megabytes(what):
    return int(re.search(what + r':\\s+(\\d+) kB', pathlib.Path('/proc/self/status').read_text())[1]) / 1e3
small, prefix, out = sys.argv[1:]
main(['vmoe', small, out])  # everything is imported and was used once
pathlib.Path('/proc/self/clear_refs').write_text('5')
before = megabytes('VmRSS')
main(['vmoe', prefix, out])
print(megabytes('VmHWM') - before)
"""


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='the peak is measured by /proc')
@pytest.mark.parametrize('width', [192, pytest.param(512, marks=pytest.mark.slow)])
def test_a_large_checkpoint_needs_the_memory_of_one_array(released, tmp_path, width):
    """Of a whole V-MoE-S/32, 228 MB, the largest array is an expert stack of 8 x 512 x 2048 floats, 34 MB.

    It is held together with its transpose, and with one chunk that is read.
    """
    shapes = flax_shapes(width)
    tree = {name: np.broadcast_to(np.float32(i), shape) for i, (name, shape) in enumerate(shapes.items())}
    prefix = write_checkpoint(tmp_path / 'large', tree, shards=3, chunk=1 << 18)
    out = tmp_path / 'large.safetensors'
    done = subprocess.run(
        [sys.executable, '-c', MEASURE, released[0], prefix, str(out)], capture_output=True, text=True, check=True)
    *_, report, peak = done.stdout.strip().splitlines()
    total, largest = sum(map(math.prod, shapes.values())), 8 * width * 4 * width
    assert f'{total:,} parameters' in report and out.stat().st_size > 4 * total
    bound = 3 * 4e-6 * largest + 4
    assert bound < 0.6 * 4e-6 * total  # or it would allow to hold the whole
    assert 4e-6 * largest < float(peak) < bound, f'{peak} MB for a file of {4e-6 * total:.0f} MB'
    number = list(shapes).index('Encoder/encoderblock_7/Moe/Mlp/Dense_1/kernel')
    assert (load_file(out)['blocks.7.mlp.fc2.weight'] == number).all()
    if width == 512:  # vmoe_vit_s itself
        assert total == 56_999_400 and "create_model('vmoe_vit_s', checkpoint_path=" in report
        model = timm.create_model('vmoe_vit_s', checkpoint_path=str(out))
        assert (model.blocks[7].mlp.fc2.weight == number).all()


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


def refused(tmp_path, capsys, *arguments):
    """The sentence by which the tool refuses, with exit code 2 and without a trace."""
    before = sorted(tmp_path.rglob('*'))
    with pytest.raises(SystemExit) as stopped:
        cli.main(['convert-checkpoint', 'vmoe', *map(str, arguments)])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ''
    assert sorted(tmp_path.rglob('*')) == before
    assert captured.err.startswith('error: ') and captured.err.count('\n') == 1
    return captured.err.removeprefix('error: ').strip()


BROKEN = [
    (lambda d: (d / 'small.index').unlink(), r"'.*small' is no checkpoint of the original V-MoE, and '.*\.index' is"),
    (lambda d: (d / 'small.data-00001-of-00002').unlink(),
     r"'.*small' is incomplete: its index counts 2 data files, and '.*small\.data-00001-of-00002' is missing\."),
    (lambda d: cut(d / 'small.data-00001-of-00002', 5000), r"'.*data-00001-of-00002' is truncated: fetch it again\."),
    (lambda d: cut(d / 'small.data-00000-of-00002', 0), r"'.*data-00000-of-00002' is truncated"),
    (lambda d: cut(d / 'small.index', 700), r"'.*small\.index' is truncated"),
    (lambda d: (d / 'small.index').write_bytes(b'\x89PNG' * 100),
     r"'.*small\.index' is not a file of a released V-MoE checkpoint: it does not begin with 'shard_count'\."),
    (lambda d: (d / 'small.index').write_bytes(
        (d / 'small.index').read_bytes().replace(b'shard_count\x02', b'shard_count\xc0')),
     r"'.*small\.index' is not a file of a released V-MoE checkpoint: its msgpack holds something else\."),
    (lambda d: (d / 'small.index').write_bytes(b'\x82\xa5index' + b'\x91' * 5000),
     r"'.*small\.index' is not a file of a released V-MoE checkpoint: its msgpack holds something else\."),
    (lambda d: (d / 'small.data-00000-of-00002').write_bytes((d / 'small.index').read_bytes()),
     r"'.*data-00000-of-00002' is not a file of a released V-MoE checkpoint: it does not begin with '__msgpack"),
    (lambda d: (d / 'small.data-00000-of-00002').write_bytes((d / 'small.data-00001-of-00002').read_bytes()),
     r"'.*small\.index' and its data files do not belong together: the pieces of '.*' differ\."),
]


@pytest.mark.parametrize('damage, message', BROKEN)
def test_a_broken_checkpoint_is_named(released, tmp_path, capsys, damage, message):
    prefix, _ = released
    damage(tmp_path)
    text = refused(tmp_path, capsys, prefix, tmp_path / 'out.safetensors')
    assert re.match(message, text), text


def test_wherever_a_file_is_cut_it_is_noticed(released, tmp_path):
    prefix, _ = released
    for path in (tmp_path / 'small.index', tmp_path / 'small.data-00000-of-00002'):
        whole = path.read_bytes()
        for size in [*range(0, 300, 3), *range(300, len(whole), 2999), len(whole) - 1]:
            path.write_bytes(whole[:size])
            with pytest.raises(InputError):
                read_vmoe(prefix)
        path.write_bytes(whole)
    read_vmoe(prefix)


def test_whatever_byte_is_wrong_nothing_but_a_sentence_comes(released, tmp_path):
    prefix, _ = released
    random = np.random.default_rng(0)
    outcomes = set()
    for path in (tmp_path / 'small.index', tmp_path / 'small.data-00000-of-00002'):
        whole = path.read_bytes()
        for _ in range(120):
            damaged = bytearray(whole)
            damaged[random.integers(min(len(whole), 3000))] = random.integers(256)
            path.write_bytes(damaged)
            try:
                import_vmoe(read_vmoe(prefix))
                outcomes.add('read')  # a number of an array was hit
            except InputError:
                outcomes.add('refused')
        path.write_bytes(whole)
    assert outcomes == {'read', 'refused'}


def test_what_is_not_for_the_model_is_refused(released, tmp_path, capsys):
    prefix, model = released
    out = tmp_path / 'out.safetensors'
    text = refused(tmp_path, capsys, prefix, out, '--model', 'vmoe_vit_s')
    assert text.endswith(
        'holds weights that are not for vmoe_vit_s: cls_token is of shape (1, 1, 32) in them, and of shape (1, 1, 512)'
        ' in the model.')
    assert "--model 'vmoe_vit_x' is no V-MoE. Did you mean 'vmoe_vit_s" in refused(
        tmp_path, capsys, prefix, out, '--model', 'vmoe_vit_x')
    assert refused(tmp_path, capsys, prefix, tmp_path / 'out.pt').endswith(
        'use a name that ends in .safetensors, by which timm knows the format.')
    text = refused(tmp_path, capsys, prefix, out, '--img-size', 50)
    assert text == '--img-size 50: use a multiple of the patch size 8.'
    tree = flax_tree(model)
    del tree['Encoder/posembed_input/pos_embedding']
    write_checkpoint(prefix, tree)
    text = refused(tmp_path, capsys, prefix, out, '--img-size', 64)
    assert text.endswith('has no square table of positions to be resized.')


def test_ensembles_are_refused(released, tmp_path, capsys):
    """E3: the router of 2 members over 4 experts is (D, 2, 2)."""
    prefix, model = released
    tree = flax_tree(model)
    tree['Encoder/encoderblock_1/Moe/Router/dense/kernel'] = np.zeros((32, 2, 2), np.float32)
    write_checkpoint(prefix, tree)
    assert refused(tmp_path, capsys, prefix, tmp_path / 'out.safetensors') == (
        "'Encoder/encoderblock_1/Moe/Router/dense/kernel' has the shape (32, 2, 2): that is an ensemble (E3, the "
        'released eee_*), and only single models are imported.')


def test_a_file_that_vanishes_while_it_is_converted_leaves_the_old_one(released, tmp_path):
    prefix, _ = released
    out = tmp_path / 'out.safetensors'
    out.write_bytes(b'old')
    plan = plan_vmoe(read_vmoe(prefix))
    cut(tmp_path / 'small.data-00001-of-00002', 5000)
    with pytest.raises(InputError, match=r"data-00001-of-00002' is truncated: fetch it again\."):
        write_safetensors(out, plan, {})
    assert out.read_bytes() == b'old' and not list(tmp_path.glob('.out*'))


def test_soft_moe_comes_over_too(tmp_path):
    """Slots (D, E, P) and a scale without axes."""
    moe = dict(num_experts=4, layers=(1,), router=dict(name='SoftRouter', num_slots=3))
    model = from_config({**ENTRY, 'encoder': {**ENTRY['encoder'], 'moe': moe}}, img_size=32)
    prefix = write_checkpoint(tmp_path / 'soft', flax_tree(model))
    imported = import_vmoe(read_vmoe(prefix))
    assert imported.keys() == model.state_dict().keys()
    assert all(torch.equal(imported[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize('name', RELEASED)
def test_cards_say_where_the_released_weights_are(name):
    note = card(name)['weights']['note']
    assert 'gs://vmoe_checkpoints' in note and 'tools/convert_checkpoint.py vmoe' in note
    assert all(released in note for released in RELEASED[name])
    assert sum(map(len, RELEASED.values())) == 5
