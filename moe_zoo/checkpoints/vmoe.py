"""Parameters of the original V-MoE (google-research/vmoe, flax) renamed and reshaped for `moe_zoo.models.vmoe`.

Letters: P x Q patch, C channels, D width, H heads, h width of a head, M hidden width, X that of an expert, E experts,
s slots of an expert, N tokens, R pre-logits, K classes. Each has one size in all arrays of a file.
"""
import re
from typing import Any, Callable, Dict, List, Mapping

import numpy as np
import torch

from ..errors import InputError, nearest
from .lazy import LazyTensor

StateDict = Dict[str, torch.Tensor]
Plan = Dict[str, LazyTensor]


def import_vmoe(weights: Mapping[str, np.ndarray]) -> StateDict:
    """Turn the original's parameter tree into a state dictionary.

    >>> state = import_vmoe(dict(np.load('weights.npz')))
    >>> timm.create_model('vmoe_vit_s').load_state_dict(state)

    Args:
        weights: Arrays by flax path joined with '/', such as 'Encoder/encoderblock_0/Moe/Router/dense/kernel'; a
            leading 'params/' is accepted. `moe_zoo.checkpoints.read_vmoe` reads them from a released checkpoint.

    Returns:
        Tensors by the names of `moe_zoo.models.vmoe.VMoE`, strict: every array is used, none is invented.

    Raises:
        InputError: A key is unknown or missing, or the shape of an array does not fit the others.
    """
    return {name: tensor.load() for name, tensor in plan_vmoe(weights).items()}


def plan_vmoe(weights: Mapping[str, Any]) -> Plan:
    """What `import_vmoe` makes, checked by shapes alone and not made yet.

    Args:
        weights: Arrays, or things with a `shape`, an `ndim` and a `dtype` that `numpy.asarray` reads when asked.
    """
    tree = _Tree(weights)
    plan = {
        'patch_embed.proj.weight': tree.take('embedding/kernel', 'PQCD', lambda x: x.permute(3, 2, 0, 1)),
        'patch_embed.proj.bias': tree.take('embedding/bias', 'D'),
    }
    if tree.has('cls'):
        plan['cls_token'] = tree.take('cls', '11D')
    if tree.has('Encoder/posembed_input/'):
        plan['pos_embed'] = tree.take('Encoder/posembed_input/pos_embedding', '1ND')
    for i in range(tree.depth()):
        plan.update(_prefixed(f'blocks.{i}.', _block(tree, f'Encoder/encoderblock_{i}/')))
    plan.update(_norm(tree, 'Encoder/encoder_norm', 'norm'))
    if tree.has('MapHead/'):
        plan.update(_prefixed('attn_pool.', _map_head(tree)))
    if tree.has('pre_logits/'):
        plan.update(_linear(tree, 'pre_logits', 'pre_logits.fc', 'DR'))
    if tree.has('head/'):
        plan.update(_linear(tree, 'head', 'head', 'RK' if 'pre_logits.fc.weight' in plan else 'DK'))
    tree.finish()
    return plan


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

    def take(self, key: str, axes: str, make: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> LazyTensor:
        """A tensor made of one array; its axes, a letter each, must have the sizes they have elsewhere."""
        if key not in self.arrays:
            raise InputError(
                f'The weights have no {key!r}.{nearest(key, self.arrays)} A V-MoE checkpoint needs it: is the file '
                'complete, and are its keys joined with "/"?')
        array = self.arrays.pop(key)
        if array.ndim != len(axes):
            expected = f'{len(axes)} axes were expected'
            if key.endswith('Router/dense/kernel') and array.ndim == 3:
                expected = 'that is an ensemble (E3, the released eee_*), and only single models are imported'
            raise InputError(f'{key!r} has the shape {array.shape}: {expected}.')
        shape = tuple(self.sizes.setdefault(axis, size) for axis, size in zip(axes, array.shape))
        if array.shape != shape:
            raise InputError(f'{key!r} has the shape {array.shape}: {shape} would fit the other arrays.')
        return LazyTensor((array,), make)

    def finish(self) -> None:
        if self.arrays:
            first = min(self.arrays)
            raise InputError(
                f'{len(self.arrays)} of the keys belong to no V-MoE that is known here, the first is {first!r}.')


def _block(tree: _Tree, source: str) -> Plan:
    plan = {
        **_norm(tree, f'{source}LayerNorm_0', 'norm1'),
        **_attention(tree, f'{source}SelfAttention/', ('query', 'key', 'value'), 'attn.qkv', 'attn.'),
        **_norm(tree, f'{source}LayerNorm_1', 'norm2'),
    }
    if not tree.has(f'{source}Moe/'):
        return {**plan, **_mlp(tree, f'{source}Mlp/', 'mlp.')}
    router = f'{source}Moe/Router/'
    if tree.has(f'{router}mu'):  # Soft MoE
        plan['mlp.router.mu'] = tree.take(f'{router}mu', 'DEs', lambda x: x.permute(1, 2, 0))
        plan['mlp.router.scale'] = tree.take(f'{router}scale', '', lambda x: x.reshape(1))
    else:
        plan['mlp.router.weight'] = tree.take(f'{router}dense/kernel', 'DE', torch.t)
    for target, dense, axes in (('mlp.fc1', 'Dense_0', 'DX'), ('mlp.fc2', 'Dense_1', 'XD')):
        plan[f'{target}.weight'] = tree.take(
            f'{source}Moe/Mlp/{dense}/kernel', f'E{axes}', lambda x: x.transpose(1, 2))
        plan[f'{target}.bias'] = tree.take(f'{source}Moe/Mlp/{dense}/bias', f'E{axes[1]}')
    return plan


def _map_head(tree: _Tree) -> Plan:
    attention = 'MapHead/MultiHeadDotProductAttention/'
    return {
        'latent': tree.take('MapHead/probe', '11D'),
        **_projections(tree, attention, ('query',), 'q'),
        **_attention(tree, attention, ('key', 'value'), 'kv', ''),
        **_norm(tree, 'MapHead/LayerNorm', 'norm'),
        **_mlp(tree, 'MapHead/Mlp/', 'mlp.'),
    }


def _attention(tree: _Tree, source: str, names: tuple, target: str, prefix: str) -> Plan:
    """Input projections stacked into one, output projection, and the optional norms of queries and keys."""
    plan = {
        **_projections(tree, source, names, target),
        f'{prefix}proj.weight': tree.take(f'{source}out/kernel', 'HhD', lambda x: x.flatten(0, 1).T),
        f'{prefix}proj.bias': tree.take(f'{source}out/bias', 'D'),
    }
    if tree.has(f'{source}query_ln/') or tree.has(f'{source}key_ln/'):
        plan[f'{prefix}q_norm.weight'] = tree.take(f'{source}query_ln/scale', 'h')
        plan[f'{prefix}k_norm.weight'] = tree.take(f'{source}key_ln/scale', 'h')
    return plan


def _projections(tree: _Tree, source: str, names: tuple, target: str) -> Plan:
    kernels = [tree.take(f'{source}{name}/kernel', 'DHh') for name in names]
    biases = [tree.take(f'{source}{name}/bias', 'Hh') for name in names]
    return {
        f'{target}.weight': _joined(kernels, lambda *parts: torch.cat([x.flatten(1).T for x in parts])),  # (H * h, D)
        f'{target}.bias': _joined(biases, lambda *parts: torch.cat([x.flatten() for x in parts])),
    }


def _joined(parts: List[LazyTensor], make: Callable[..., torch.Tensor]) -> LazyTensor:
    return LazyTensor(tuple(array for part in parts for array in part.arrays), make)


def _mlp(tree: _Tree, source: str, target: str) -> Plan:
    return {
        **_linear(tree, f'{source}Dense_0', f'{target}fc1', 'DM'),
        **_linear(tree, f'{source}Dense_1', f'{target}fc2', 'MD'),
    }


def _linear(tree: _Tree, source: str, target: str, axes: str) -> Plan:
    return {
        f'{target}.weight': tree.take(f'{source}/kernel', axes, torch.t),
        f'{target}.bias': tree.take(f'{source}/bias', axes[1]),
    }


def _norm(tree: _Tree, source: str, target: str) -> Plan:
    return {f'{target}.weight': tree.take(f'{source}/scale', 'D'), f'{target}.bias': tree.take(f'{source}/bias', 'D')}


def _prefixed(prefix: str, plan: Plan) -> Plan:
    return {prefix + name: tensor for name, tensor in plan.items()}
