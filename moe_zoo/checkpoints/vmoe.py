"""Parameters of the original V-MoE (google-research/vmoe, flax) renamed and reshaped for `moe_zoo.models.vmoe`.

Letters: P x Q patch, C channels, D width, H heads, h width of a head, M hidden width, X that of an expert, E experts,
N tokens, R pre-logits, K classes. Each has one size in all arrays of a file.
"""
import re
from typing import Any, Dict, Mapping

import numpy as np
import torch

from ..errors import InputError, nearest

StateDict = Dict[str, torch.Tensor]


def import_vmoe(weights: Mapping[str, np.ndarray]) -> StateDict:
    """Turn the original's parameter tree into a state dictionary.

    >>> state = import_vmoe(dict(np.load('weights.npz')))
    >>> timm.create_model('vmoe_vit_s').load_state_dict(state)

    Args:
        weights: Arrays by flax path joined with '/', such as 'Encoder/encoderblock_0/Moe/Router/dense/kernel'; a
            leading 'params/' is accepted.

    Returns:
        Tensors by the names of `moe_zoo.models.vmoe.VMoE`, strict: every array is used, none is invented.

    Raises:
        InputError: A key is unknown or missing, or the shape of an array does not fit the others.
    """
    tree = _Tree(weights)
    state = {
        'patch_embed.proj.weight': tree.take('embedding/kernel', 'PQCD').permute(3, 2, 0, 1),
        'patch_embed.proj.bias': tree.take('embedding/bias', 'D'),
    }
    if tree.has('cls'):
        state['cls_token'] = tree.take('cls', '11D')
    if tree.has('Encoder/posembed_input/'):
        state['pos_embed'] = tree.take('Encoder/posembed_input/pos_embedding', '1ND')
    for i in range(tree.depth()):
        state.update(_prefixed(f'blocks.{i}.', _block(tree, f'Encoder/encoderblock_{i}/')))
    state.update(_norm(tree, 'Encoder/encoder_norm', 'norm'))
    if tree.has('MapHead/'):
        state.update(_prefixed('attn_pool.', _map_head(tree)))
    if tree.has('pre_logits/'):
        state.update(_linear(tree, 'pre_logits', 'pre_logits.fc', 'DR'))
    if tree.has('head/'):
        state.update(_linear(tree, 'head', 'head', 'RK' if 'pre_logits.fc.weight' in state else 'DK'))
    tree.finish()
    return {name: tensor.contiguous() for name, tensor in state.items()}


class _Tree:
    """The arrays not taken yet."""

    def __init__(self, weights: Mapping[str, Any]):
        self.arrays: Dict[str, Any] = {}
        self.sizes = {'1': 1}  # by letter, as the first array that has it tells
        for key, array in weights.items():
            key = key.removeprefix('params/')
            if key in self.arrays:
                raise InputError(f"The weights hold {key!r} twice, with and without the prefix 'params/'.")
            self.arrays[key] = array

    def has(self, prefix: str) -> bool:
        return any(key.startswith(prefix) for key in self.arrays)

    def depth(self) -> int:
        """Encoder blocks; a file without any still misses its first."""
        found = (re.match(r'Encoder/encoderblock_(\d+)/', key) for key in self.arrays)
        return max((int(match[1]) + 1 for match in found if match), default=1)

    def take(self, key: str, axes: str) -> torch.Tensor:
        """The array as a tensor of its own; its axes, a letter each, must have the sizes they have elsewhere."""
        if key not in self.arrays:
            raise InputError(
                f'The weights have no {key!r}.{nearest(key, self.arrays)} A V-MoE checkpoint needs it: is the file '
                'complete, and are its keys joined with "/"?')
        array = np.asarray(self.arrays.pop(key))
        if array.ndim != len(axes):
            ensemble = ' Ensembles of experts (E3) are not supported.' if key.endswith('Router/dense/kernel') else ''
            raise InputError(f'{key!r} has the shape {array.shape}: {len(axes)} axes were expected.{ensemble}')
        shape = tuple(self.sizes.setdefault(axis, size) for axis, size in zip(axes, array.shape))
        if array.shape != shape:
            raise InputError(f'{key!r} has the shape {array.shape}: {shape} would fit the other arrays.')
        if array.dtype not in (np.float32, np.float64, np.float16):
            array = array.astype(np.float32)  # bfloat16 comes as a type that torch does not read
        return torch.tensor(array)

    def finish(self) -> None:
        if self.arrays:
            first = min(self.arrays)
            raise InputError(
                f'{len(self.arrays)} of the keys belong to no V-MoE that is known here, the first is {first!r}.')


def _block(tree: _Tree, source: str) -> StateDict:
    state = {
        **_norm(tree, f'{source}LayerNorm_0', 'norm1'),
        **_attention(tree, f'{source}SelfAttention/', ('query', 'key', 'value'), 'attn.qkv', 'attn.'),
        **_norm(tree, f'{source}LayerNorm_1', 'norm2'),
    }
    if not tree.has(f'{source}Moe/'):
        return {**state, **_mlp(tree, f'{source}Mlp/', 'mlp.')}
    state['mlp.router.weight'] = tree.take(f'{source}Moe/Router/dense/kernel', 'DE').T
    for target, dense, axes in (('mlp.fc1', 'Dense_0', 'DX'), ('mlp.fc2', 'Dense_1', 'XD')):
        state[f'{target}.weight'] = tree.take(f'{source}Moe/Mlp/{dense}/kernel', f'E{axes}').transpose(1, 2)
        state[f'{target}.bias'] = tree.take(f'{source}Moe/Mlp/{dense}/bias', f'E{axes[1]}')
    return state


def _map_head(tree: _Tree) -> StateDict:
    attention = 'MapHead/MultiHeadDotProductAttention/'
    return {
        'latent': tree.take('MapHead/probe', '11D'),
        **_projections(tree, attention, ('query',), 'q'),
        **_attention(tree, attention, ('key', 'value'), 'kv', ''),
        **_norm(tree, 'MapHead/LayerNorm', 'norm'),
        **_mlp(tree, 'MapHead/Mlp/', 'mlp.'),
    }


def _attention(tree: _Tree, source: str, names: tuple, target: str, prefix: str) -> StateDict:
    """Input projections stacked into one, output projection, and the optional norms of queries and keys."""
    state = {
        **_projections(tree, source, names, target),
        f'{prefix}proj.weight': tree.take(f'{source}out/kernel', 'HhD').flatten(0, 1).T,
        f'{prefix}proj.bias': tree.take(f'{source}out/bias', 'D'),
    }
    if tree.has(f'{source}query_ln/') or tree.has(f'{source}key_ln/'):
        state[f'{prefix}q_norm.weight'] = tree.take(f'{source}query_ln/scale', 'h')
        state[f'{prefix}k_norm.weight'] = tree.take(f'{source}key_ln/scale', 'h')
    return state


def _projections(tree: _Tree, source: str, names: tuple, target: str) -> StateDict:
    kernels = [tree.take(f'{source}{name}/kernel', 'DHh').flatten(1).T for name in names]  # (H * h, D)
    biases = [tree.take(f'{source}{name}/bias', 'Hh').flatten() for name in names]
    return {f'{target}.weight': torch.cat(kernels), f'{target}.bias': torch.cat(biases)}


def _mlp(tree: _Tree, source: str, target: str) -> StateDict:
    return {
        **_linear(tree, f'{source}Dense_0', f'{target}fc1', 'DM'),
        **_linear(tree, f'{source}Dense_1', f'{target}fc2', 'MD'),
    }


def _linear(tree: _Tree, source: str, target: str, axes: str) -> StateDict:
    kernel, bias = tree.take(f'{source}/kernel', axes), tree.take(f'{source}/bias', axes[1])
    return {f'{target}.weight': kernel.T, f'{target}.bias': bias}


def _norm(tree: _Tree, source: str, target: str) -> StateDict:
    return {f'{target}.weight': tree.take(f'{source}/scale', 'D'), f'{target}.bias': tree.take(f'{source}/bias', 'D')}


def _prefixed(prefix: str, state: StateDict) -> StateDict:
    return {prefix + name: tensor for name, tensor in state.items()}
