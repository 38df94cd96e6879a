"""Released Swin-MoEs: files of their layout, joined, do what a plain forward of the same weights does.

Letters: B images, G patches along a side, W positions along a window, D width, H heads, E experts, X hidden width.
"""
import math
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from moe_zoo import cli
from moe_zoo.checkpoints.convert_cli import main
from moe_zoo.routing import trace_routing

SIZE, PATCH, WINDOW, WIDTH, DEPTHS, HEADS, CLASSES = 32, 4, 4, 8, (2, 2, 2), (1, 2, 2), 5
RATIO = 3
ROUTED = ('layers.0.blocks.1', 'layers.2.blocks.1')
NAME = 'swin_moe_test.pth'
EXPERTS = '.mlp._moe_layer.experts.batched_'


def weights_of(num_experts, cosine=False, second_bias=False):
    """Random weights of all experts together by the names of the files. G is 8, 4 and 2 in the three stages."""
    def rand(*shape):
        return torch.randn(shape) / math.sqrt(math.prod(shape[1:]) or 1)

    def norm(name, D):
        return {f'{name}.weight': 1 + 0.2 * torch.randn(D), f'{name}.bias': 0.2 * torch.randn(D)}

    state = {'patch_embed.proj.weight': rand(WIDTH, 3, PATCH, PATCH), 'patch_embed.proj.bias': 0.2 * torch.randn(WIDTH),
             **norm('patch_embed.norm', WIDTH)}
    for stage, (depth, H) in enumerate(zip(DEPTHS, HEADS)):
        D, G = WIDTH * 2 ** stage, SIZE // PATCH // 2 ** stage
        W = min(WINDOW, G)
        for block in range(depth):
            name = f'layers.{stage}.blocks.{block}'
            state |= {**norm(f'{name}.norm1', D), **norm(f'{name}.norm2', D)}
            if block % 2 and W < G:
                state[f'{name}.attn_mask'] = torch.zeros((G // W) ** 2, W * W, W * W)
            offsets = torch.arange(1 - W, W).float() / (W - 1) * 8
            offsets = offsets.sign() * torch.log2(offsets.abs() + 1) / 3
            state |= {
                f'{name}.attn.relative_coords_table': torch.stack(torch.meshgrid(
                    offsets, offsets, indexing='ij'), dim=-1).unsqueeze(0),
                f'{name}.attn.relative_position_index': torch.zeros(W * W, W * W, dtype=torch.int64),
                f'{name}.attn.cpb_mlp.0.weight': torch.randn(32, 2), f'{name}.attn.cpb_mlp.0.bias': torch.randn(32),
                f'{name}.attn.cpb_mlp.2.weight': rand(H, 32) * 3,
                f'{name}.attn.qkv.weight': rand(3 * D, D), f'{name}.attn.qkv.bias': 0.2 * torch.randn(3 * D),
                f'{name}.attn.proj.weight': rand(D, D), f'{name}.attn.proj.bias': 0.2 * torch.randn(D)}
            if name not in ROUTED:
                state |= {
                    f'{name}.mlp.fc1.weight': rand(RATIO * D, D), f'{name}.mlp.fc1.bias': 0.2 * torch.randn(RATIO * D),
                    f'{name}.mlp.fc2.weight': rand(D, RATIO * D)}
                continue
            gate = f'{name}.mlp._moe_layer.gates.0.'
            state |= {
                f'{gate}temperature': torch.tensor([1.5]), f'{gate}sim_matrix': torch.randn(6, num_experts),
                f'{gate}cosine_projector.weight': rand(6, D), f'{gate}cosine_projector.bias': 0.2 * torch.randn(6),
            } if cosine else {f'{gate}wg.weight': 3 * rand(num_experts, D)}
            state |= {
                f'{name}{EXPERTS}fc1_w': rand(num_experts, RATIO * D, D) * D, f'{name}{EXPERTS}fc2_w': torch.randn(
                    num_experts, RATIO * D, D) / math.sqrt(RATIO * D),
                f'{name}{EXPERTS}fc1_bias': torch.randn(num_experts, RATIO * D),
                f'{name}{EXPERTS}fc2_bias': torch.randn(num_experts, D) * second_bias}
        if stage + 1 < len(DEPTHS):
            state |= {f'layers.{stage}.downsample.reduction.weight': rand(2 * D, 4 * D),
                      **norm(f'layers.{stage}.downsample.norm', 4 * D)}
    return state | {**norm('norm', D), 'head.weight': rand(CLASSES, D) * 5, 'head.bias': torch.randn(CLASSES)}


def write_files(folder, state, num_ranks, master=True, early=True):
    """One file a rank: slices of the experts in order, of one where they are fewer than ranks. Frozen biases stay with
    the master, as rank 0 has them."""
    folder.mkdir(exist_ok=True)
    frozen = all(not value.any() for key, value in state.items() if key.endswith('fc2_bias'))
    rest = {key: value for key, value in state.items() if EXPERTS not in key}
    for rank in range(num_ranks):
        own = {}
        for key, value in state.items():
            if EXPERTS in key:
                shared = max(1, num_ranks // len(value))
                size = -(-value.shape[1] // shared)
                if value.ndim == 2:
                    value = F.pad(value, (0, size * shared - value.shape[1]))
                piece = value.reshape(-1, size, *value.shape[2:]).chunk(num_ranks)[rank]
                if early and value.ndim == 2:
                    piece = piece.unsqueeze(1)
                (rest if frozen and master and key.endswith('fc2_bias') else own).setdefault(key, piece.clone())
        torch.save({'model': own if master else {**rest, **own}}, folder / f'{NAME}.rank{rank}')
    if master:
        torch.save({'model': rest}, folder / f'{NAME}.master')
    return folder


def reference(state, x):
    """Logits of (B, 3, SIZE, SIZE), as plainly as can be said; nothing is dropped."""
    def linear(name, x):
        return F.linear(x, state[f'{name}.weight'], state.get(f'{name}.bias'))

    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f'{name}.weight'], state[f'{name}.bias'])

    x = F.conv2d(x, state['patch_embed.proj.weight'], state['patch_embed.proj.bias'], stride=PATCH)
    x = norm('patch_embed.norm', x.permute(0, 2, 3, 1))  # (B, G, G, D)
    for stage, (depth, H) in enumerate(zip(DEPTHS, HEADS)):
        for block in range(depth):
            name = f'layers.{stage}.blocks.{block}'
            shift = WINDOW // 2 if block % 2 and x.shape[1] > WINDOW else 0
            x = x + attention(state, f'{name}.attn', norm(f'{name}.norm1', x), H, shift)
            y = norm(f'{name}.norm2', x)
            if name in ROUTED:
                x = x + torch.stack([chosen(state, name, token) for token in y.flatten(0, 2)]).view_as(y)
            else:
                x = x + linear(f'{name}.mlp.fc2', F.gelu(linear(f'{name}.mlp.fc1', y)))
        if stage + 1 < len(DEPTHS):
            corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]  # rows first
            x = linear(f'layers.{stage}.downsample.reduction', norm(
                f'layers.{stage}.downsample.norm', torch.cat(corners, dim=-1)))
    return linear('head', norm('norm', x).mean(dim=(1, 2)))


def chosen(state, name, token):
    """One token through the expert of its largest gate, which scales it."""
    gate = f'{name}.mlp._moe_layer.gates.0.'
    if f'{gate}wg.weight' in state:
        logits = state[f'{gate}wg.weight'] @ token
    else:
        point = state[f'{gate}cosine_projector.weight'] @ token + state[f'{gate}cosine_projector.bias']
        experts = state[f'{gate}sim_matrix'].t()
        cosines = torch.stack([point @ e / point.norm() / e.norm() for e in experts])
        logits = cosines * min(math.exp(state[f'{gate}temperature'].item()), 100)
    gates = logits.softmax(dim=0)
    e = int(gates.argmax())
    part = {key: state[f'{name}{EXPERTS}{key}'][e] for key in ('fc1_w', 'fc1_bias', 'fc2_w', 'fc2_bias')}
    hidden = F.gelu(part['fc1_w'] @ token + part['fc1_bias'])
    return gates[e] * (hidden @ part['fc2_w'] + part['fc2_bias'])


def attention(state, name, x, H, shift):
    """Every position to those of its window that were its neighbours before the shift."""
    B, G, _, D = x.shape
    W = min(WINDOW, G)
    qkv = F.linear(x, state[f'{name}.qkv.weight'], state[f'{name}.qkv.bias']).view(B, G * G, 3, H, D // H)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, G * G, D / H)
    rows, columns = torch.meshgrid(torch.arange(G), torch.arange(G), indexing='ij')
    rows, columns = rows.flatten(), columns.flatten()
    # A window that wraps around holds up to four regions, which do not see each other.
    wrapped = [((p - shift) % G // W) * 2 + (p < shift) for p in (rows, columns)]
    seen = (wrapped[0][:, None] == wrapped[0]) & (wrapped[1][:, None] == wrapped[1])
    table = state[f'{name}.relative_coords_table'][0]
    between = table[(rows[:, None] - rows).clamp(1 - W, W - 1) + W - 1,
                    (columns[:, None] - columns).clamp(1 - W, W - 1) + W - 1]
    hidden = F.linear(between, state[f'{name}.cpb_mlp.0.weight'], state[f'{name}.cpb_mlp.0.bias']).relu()
    bias = F.linear(hidden, state[f'{name}.cpb_mlp.2.weight']).permute(2, 0, 1)  # (H, G * G, G * G)
    scores = q @ k.transpose(-2, -1) / math.sqrt(D // H) + bias
    y = scores.masked_fill(~seen, -math.inf).softmax(dim=-1) @ v
    return F.linear(y.transpose(1, 2).reshape(B, G, G, D), state[f'{name}.proj.weight'], state[f'{name}.proj.bias'])


def join(folder, out, capsys):
    """Joins, and runs the call that is printed."""
    assert cli.main(['convert-checkpoint', 'swin-moe', str(folder), str(out)]) == 0
    printed = capsys.readouterr().out
    call = re.search(r'Load it by (timm\.create_model\(.*\))\.$', printed.strip())
    assert call, printed
    return eval(call[1], {'timm': timm}).eval(), printed


@pytest.mark.parametrize('num_experts, num_ranks, kwargs, files', [
    (4, 4, {}, {}),  # as most of those released
    (4, 4, dict(cosine=True), dict(early=False)),
    (2, 4, {}, {}),  # as 8 experts of 32 GPUs
    (2, 6, dict(second_bias=True), {}),  # 8 biases in 3 parts of 3, the last one padded
    (8, 4, dict(second_bias=True), dict(master=False)),
])
def test_joined_it_does_what_the_parts_did(tmp_path, capsys, num_experts, num_ranks, kwargs, files):
    state = weights_of(num_experts, **kwargs)
    folder = write_files(tmp_path / 'files', state, num_ranks, **files)
    model, _ = join(folder, tmp_path / 'out.safetensors', capsys)
    x = 4 * torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad(), trace_routing(model) as trace:
        found = model(x)
    expected = reference(state, x)
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert set(trace) == {f'{name}.mlp' for name in ROUTED}
    assert len(trace['layers.0.blocks.1.mlp'][0].indices.unique()) > 1


def test_what_is_printed_builds_the_model_of_the_weights(tmp_path, capsys):
    folder, out = write_files(tmp_path / 'files', weights_of(4, cosine=True), 2), tmp_path / 'out.safetensors'
    model, printed = join(folder, out, capsys)
    assert printed.startswith(f"'{out}': ") and ' parameters of 2 ranks. ' in printed
    for words in ("base='swin_tiny_patch4_window7_224'", 'embed_dim=8', 'depths=(2, 2, 2)', 'window_size=4',
                  "targets=['layers.0.blocks.1.mlp', 'layers.2.blocks.1.mlp']", 'num_experts=4, num_selected=1',
                  "router='cosine'", 'batch_priority=True', "'num_classes': 5, 'input_size': (3, 32, 32)"):
        assert words in printed
    assert model.pretrained_cfg['input_size'] == (3, 32, 32) and model.num_classes == 5
    layer = model.layers[2].blocks[1].mlp
    # 1.25 slots for each of T / E tokens in training: 2 images of 4 tokens, 4 experts, ceil(1.25 x 8 / 4) = 3.
    assert layer.train()._capacity(8) == 3 and layer.eval()._capacity(8) == 0
    weights = load_file(out)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    # The directory of one checkpoint among several.
    (folder / 'other.pth.rank0').write_bytes(b'')
    assert main(['swin-moe', str(folder / NAME), str(out)]) == 0


def damaged(number, change):
    """A damage to the file of one rank, or of the master: `change` its weights."""
    def damage(folder):
        path = folder / (f'{NAME}.rank{number}' if isinstance(number, int) else f'{NAME}.{number}')
        content = torch.load(path, weights_only=True)
        change(content['model'])
        torch.save(content, path)
    return damage


KEY = 'layers.0.blocks.1.mlp._moe_layer.experts.batched_fc1_w'
REFUSED = [
    (lambda d: (d / f'{NAME}.rank1').unlink(),
     rf"'.*' has files of ranks up to 3, and '{NAME}.rank1' is missing\."),
    (lambda d: (d / f'{NAME}.rank3').unlink(),
     r"FOLDER '.*': layers.0.blocks.1.mlp has 4 experts, which 3 files of 1 each do not make: is one missing\?"),
    (lambda d: [path.unlink() for path in d.iterdir()],
     r"'.*' has no files NAME.pth.rank0, NAME.pth.rank1 and so on\."),
    (lambda d: [path.rename(d / f'{NAME}.global') for path in d.iterdir()],
     rf"'.*' has no files NAME.pth.rank0, .* '{NAME}.global' has the experts of one rank only\."),
    (lambda d: (d / 'b.pth.rank0').write_bytes(b''), r"'.*' has 2 checkpoints: say which, such as '.*/b.pth'\."),
    (lambda d: (d / f'{NAME}.rank2').write_bytes(b'PK' * 50), rf"The checkpoint '.*{NAME}.rank2' cannot be read"),
    (lambda d: (d / f'{NAME}.master').unlink(), r"FOLDER '.*': The weights have no '.*', which a Swin-MoE has\."),
    (damaged(2, lambda w: w.update({KEY: w[KEY][:, :5]})),
     rf"FOLDER '.*': The ranks disagree: {KEY} is of shape \(1, 24, 8\) and torch.float32 in rank 0, and of shape "
     r'\(1, 5, 8\) and torch.float32 in rank 2\.'),
    (damaged(3, lambda w: w.pop(KEY)), rf'.*The ranks disagree: {KEY} is .* in rank 0, and missing in rank 3\.'),
    (lambda d: [damaged(r, lambda w: w.update({KEY: w[KEY].transpose(1, 2)}))(d) for r in range(4)],
     rf".*{KEY.removesuffix('fc1_w')}fc1_w and fc2_w are of shapes \(1, 8, 24\) and \(1, 24, 8\), which is another"),
    (lambda d: [damaged(r, lambda w: [w.update({k.replace('batched_', '0.'): w.pop(k)}) for k in [*w]])(d)
                for r in range(4)], r"FOLDER '.*': There are no experts of Tutel: no name has"),
    (damaged('master', lambda w: w.update({KEY.replace('fc1_w', 'fc2_bias'): torch.ones(1, 1, 8)})),
     r'.*fc2_bias is in the master file, that of rank 0 alone, and it is not zero\.'),
    (damaged('master', lambda w: w.update(absolute_pos_embed=torch.zeros(1, 64, 8))),
     r"FOLDER '.*': The weights are of another model than timm's Swin: absolute_pos_embed is of shape \(1, 64, 8\)"),
    (damaged('master', lambda w: w.pop('layers.0.blocks.1.mlp._moe_layer.gates.0.wg.weight')),
     r".*The weights have no 'layers.0.blocks.1.mlp._moe_layer.gates.0.wg.weight'"),
    (damaged('master', lambda w: w.update({'layers.2.blocks.1.mlp._moe_layer._num_global_experts': torch.tensor(9)})),
     r'.*layers.2.blocks.1.mlp has a router of 4 experts, and says that it has 9\.'),
]


@pytest.mark.parametrize('damage, message', REFUSED)
def test_what_cannot_be_joined_is_told(tmp_path, capsys, damage, message):
    folder, out = write_files(tmp_path / 'files', weights_of(4), 4), tmp_path / 'out.safetensors'
    damage(folder)
    with pytest.raises(SystemExit) as stopped:
        cli.main(['convert-checkpoint', 'swin-moe', str(folder), str(out)])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ''
    assert captured.err.startswith('error: ') and captured.err.count('\n') == 1
    assert re.match(message, captured.err.removeprefix('error: ').strip()), captured.err
    assert [path.name for path in tmp_path.iterdir()] == ['files']


def test_without_a_master_ranks_have_the_rest_alike(tmp_path, capsys):
    folder = write_files(tmp_path / 'files', weights_of(4), 2, master=False)
    damaged(1, lambda w: w['head.bias'].add_(1))(folder)
    with pytest.raises(SystemExit):
        cli.main(['convert-checkpoint', 'swin-moe', str(folder), str(tmp_path / 'out.safetensors')])
    assert 'The ranks disagree: head.bias, which is no expert, has other values in rank 1' in capsys.readouterr().err


def test_files_that_execute_code_are_not_read(tmp_path, capsys):
    folder = write_files(tmp_path / 'files', weights_of(4), 2)
    torch.save({'model': {}, 'config': Path}, folder / f'{NAME}.rank1')
    with pytest.raises(SystemExit):
        cli.main(['convert-checkpoint', 'swin-moe', str(folder), str(tmp_path / 'out.safetensors')])
    assert 'files that need code to be executed are not loaded' in capsys.readouterr().err
