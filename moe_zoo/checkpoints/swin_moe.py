"""Parameters of the released Swin-MoEs, one file a rank, joined and renamed for timm's Swin with `MoEMlp`s.

What the files hold, as read in https://github.com/microsoft/Swin-Transformer/blob/main/ (config.py, main_moe.py,
utils_moe.py, models/swin_transformer_moe.py, configs/swinmoe/), https://github.com/microsoft/tutel/blob/main/ (doc/
CHECKPOINT.md, tutel/experts/ffn.py, tutel/gates/, tutel/impls/moe_layer.py, tutel/checkpoint/gather.py) and in the
shapes that https://github.com/microsoft/Tutel/issues/248 shows of the released one with 32 experts:

- NAME.pth.rank0 and so on, one a GPU, and NAME.pth.master; each is {'model': weights by name}. A rank has its trained
  experts, the master all the rest; without a master, every rank has all the rest too.
- `layers.S.blocks.B.mlp._moe_layer.experts.batched_fc1_w` and `_fc2_w`, both (n, X, D): n experts of the rank, their
  hidden width by their width; the second is used as it is, the first transposed. `batched_fc1_bias` and `_fc2_bias` are
  (n, X) and (n, D), in early files with an axis of one between. Rank r has experts r n to r n + n - 1.
- Where there are fewer experts than GPUs, s of them in a row share one: n is 1, X the hidden width / s, and the second
  bias is cut into s parts, each of D / s rounded up.
- The configurations switch the second bias off: it is frozen at zero, and is then no parameter of a rank but in the
  master, as that of rank 0. Dense MLPs have no second bias at all.
- The router is `gates.0.wg.weight` (E, D) without a bias; or `gates.0.cosine_projector` to P dimensions,
  `gates.0.sim_matrix` (P, E), and `gates.0.temperature` (1,), the logarithm of a factor. Softmax before top-1, gates
  not normalised, noise of standard deviation 1 / E on the logits in training, capacity factor 1.25 in training and
  evaluation over the images of one GPU, tokens of large gates first. `_num_global_experts`, if there, is E.
- The attention is that of the first Swin, pre-norm and with scaled products; the bias of its relative positions is a
  small network of stored coordinates, two linear maps with a ReLU between. A table of what it says is timm's parameter.
- Downsampling is at the end of a stage, in timm at the start of the next; `head` is timm's `head.fc`.

In training, the model that takes them drops tokens by the same factor, rounded otherwise, in groups of `group_images`;
in evaluation it drops none, so that no image depends on another, unless `eval_capacity_factor=1.25` asks for it.

Letters: E experts, D width, H heads, X hidden width, N positions in a table of relative positions.
"""
import math
import re
from typing import Any, Callable, Dict, Mapping, NamedTuple, Sequence, Tuple

import torch
from torch.nn import functional as F

from ..errors import InputError, counted
from .lazy import DTYPES, LazyTensor

StateDict = Mapping[str, torch.Tensor]
Plan = Dict[str, LazyTensor]

EXPERTS = re.compile(r'(.*\.mlp)\._moe_layer\.experts\.(batched_fc[12]_(?:w|bias))')
# What timm makes itself, and the positions, which become a table.
DERIVED = re.compile(r'.*(relative_position_index|attn_mask|relative_coords_table|\.cpb_mlp\.\d\.(weight|bias))')


class SwinMoE(NamedTuple):
    """A joined checkpoint.

    Attributes:
        plan: Tensors by timm's names.
        kwargs: Keywords of timm's Swin, its size of images, and those of `moefied` and its layers.
    """
    plan: Plan
    kwargs: Dict[str, Any]


def plan_swin_moe(ranks: Sequence[StateDict], master: StateDict) -> SwinMoE:
    """What to make of which tensors, whose data is not read yet, but for what must be equal or zero.

    Args:
        ranks: Weights of every rank, in order.
        master: Those of the master file; empty where there is none.

    Raises:
        InputError: The weights are no Swin-MoE's, ranks disagree, or some are missing.
    """
    rest = _common(ranks, master)
    targets = list(dict.fromkeys(match[1] for key in ranks[0] if (match := EXPERTS.fullmatch(key))))
    if not targets:
        raise InputError('There are no experts of Tutel: no name has ...mlp._moe_layer.experts.batched_fc1_w in it.')
    plan: Plan = {}
    for key, value in rest.items():
        if key.endswith('.cpb_mlp.0.weight'):
            name = key.removesuffix('.cpb_mlp.0.weight')
            plan[f'{name}.relative_position_bias_table'] = _positions(name, rest)
        elif not DERIVED.fullmatch(key) and '._moe_layer.' not in key:
            plan[_renamed(key)] = _lazy(lambda x: x, value)
        if key.endswith('.mlp.fc2.weight') and key.replace('.weight', '.bias') not in rest:
            plan[key.replace('.weight', '.bias')] = _lazy(lambda x: x.new_zeros(x.shape[0]), value)
    counts = set()
    for name in targets:
        router, num_experts = _router(name, rest)
        plan.update(router)
        plan.update(_experts(name, ranks, rest, num_experts))
        counts.add(num_experts)
    if len(counts) > 1:
        raise InputError(f'The layers have different numbers of experts: {", ".join(map(str, sorted(counts)))}.')
    kwargs = dict(
        _shape(rest), targets=sorted(targets, key=lambda n: [int(i) for i in re.findall(r'\d+', n)]), layer='moe_mlp',
        num_experts=counts.pop(), num_selected=1, router='vmoe', router_args={'renormalise': False},
        capacity_factor=1.25, capacity_multiple_of=1, batch_priority=True)
    directions = plan[f'{targets[0]}.router.weight'].shape[1]
    if f'{targets[0]}.router.projection.weight' in plan:
        kwargs.update(router='cosine', router_args={'renormalise': False, 'projection_features': directions})
    return SwinMoE(plan, kwargs)


def _common(ranks: Sequence[StateDict], master: StateDict) -> StateDict:
    """What is not of one rank: the master's, or what all ranks have alike.

    Raises: InputError: Ranks have other tensors, or others of other shapes or values, than the first.
    """
    first = {key: (tuple(value.shape), value.dtype) for key, value in ranks[0].items()}
    for number, rank in enumerate(ranks[1:], 1):
        found = {key: (tuple(value.shape), value.dtype) for key, value in rank.items()}
        for key in dict.fromkeys([*first, *found]):
            if first.get(key) != found.get(key):
                what = [f'of shape {each[key][0]} and {each[key][1]}' if key in each else 'missing'
                        for each in (first, found)]
                raise InputError(f'The ranks disagree: {key} is {what[0]} in rank 0, and {what[1]} in rank {number}.')
            if not master and not EXPERTS.fullmatch(key) and not torch.equal(ranks[0][key], rank[key]):
                raise InputError(
                    f'The ranks disagree: {key}, which is no expert, has other values in rank {number} than in rank 0.')
    rest = master or {key: value for key, value in ranks[0].items() if not EXPERTS.fullmatch(key)}
    for key, value in [*ranks[0].items(), *rest.items()]:
        if value.is_floating_point() and value.dtype not in DTYPES:
            raise InputError(f'{key} is of the type {value.dtype}: float16, float32 or float64 can be joined.')
    return rest


def _lazy(make: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.detach().numpy() for tensor in tensors), make)


def _take(rest: StateDict, key: str) -> torch.Tensor:
    if key not in rest:
        raise InputError(f'The weights have no {key!r}, which a Swin-MoE has.')
    return rest[key]


def _renamed(key: str) -> str:
    key = re.sub(r'^layers\.(\d+)\.downsample\.', lambda m: f'layers.{int(m[1]) + 1}.downsample.', key)
    return re.sub(r'^head\.', 'head.fc.', key)


def _positions(name: str, rest: StateDict) -> LazyTensor:
    """(N, H) biases from the (1, 2 W - 1, 2 W - 1, 2) coordinates of an attention, `name`."""
    def table(coords, weight1, bias1, weight2):
        return F.linear(F.linear(coords.reshape(-1, 2), weight1, bias1).relu(), weight2)
    keys = ('relative_coords_table', 'cpb_mlp.0.weight', 'cpb_mlp.0.bias', 'cpb_mlp.2.weight')
    return _lazy(table, *[_take(rest, f'{name}.{key}') for key in keys])


def _router(name: str, rest: StateDict) -> Tuple[Plan, int]:
    """The router of a layer, and E."""
    gate = f'{name}._moe_layer.gates.0.'
    if f'{gate}sim_matrix' in rest:
        directions = rest[f'{gate}sim_matrix']
        plan = {
            f'{name}.router.weight': _lazy(torch.t, directions),
            f'{name}.router.log_factor': _lazy(lambda x: x.reshape(1), _take(rest, f'{gate}temperature'))}
        for part in ('weight', 'bias'):
            plan[f'{name}.router.projection.{part}'] = _lazy(lambda x: x, _take(rest, f'{gate}cosine_projector.{part}'))
    else:
        plan = {f'{name}.router.weight': _lazy(lambda x: x, _take(rest, f'{gate}wg.weight'))}
    num_experts = plan[f'{name}.router.weight'].shape[0]
    stored = rest.get(f'{name}._moe_layer._num_global_experts')
    if stored is not None and int(stored) != num_experts:
        raise InputError(f'{name} has a router of {num_experts} experts, and says that it has {int(stored)}.')
    return plan, num_experts


def _experts(name: str, ranks: Sequence[StateDict], rest: StateDict, num_experts: int) -> Plan:
    """All experts of a layer: the pieces of the ranks one after the other."""
    prefix = f'{name}._moe_layer.experts.batched_'
    fc1, fc2, bias1 = (_take(ranks[0], f'{prefix}{part}') for part in ('fc1_w', 'fc2_w', 'fc1_bias'))
    bias2 = ranks[0].get(f'{prefix}fc2_bias', rest.get(f'{prefix}fc2_bias'))
    width = _take(rest, f'{name[:-len("mlp")]}norm2.weight').shape[0]
    if fc1.ndim != 3 or fc1.shape != fc2.shape or fc1.shape[2] != width:
        raise InputError(
            f'{prefix}fc1_w and fc2_w are of shapes {tuple(fc1.shape)} and {tuple(fc2.shape)}, which is another layout:'
            f' (experts, hidden width, {width}) was expected of both.')
    local = fc1.shape[0]
    cut = len(ranks) * local // num_experts  # ranks that share an expert
    if cut * num_experts != len(ranks) * local or local > 1 < cut or (
            bias2 is not None and bias2.numel() != local * -(-width // cut)):
        raise InputError(
            f'{name} has {counted(num_experts, "expert")}, which {counted(len(ranks), "file")} of {local} each do not'
            ' make: is one missing?')

    def join(make: Callable[[torch.Tensor], torch.Tensor], part: str, axes: Tuple[int, ...]) -> LazyTensor:
        pieces = [rank[f'{prefix}{part}'] for rank in ranks]
        return _lazy(lambda *x: make(torch.cat([each.reshape(local, *axes) for each in x]).reshape(
            num_experts, *axes)), *pieces)

    plan = {
        f'{name}.fc1.weight': join(lambda x: x, 'fc1_w', (-1, width)),
        f'{name}.fc1.bias': join(lambda x: x, 'fc1_bias', (-1,)),
        f'{name}.fc2.weight': join(lambda x: x.transpose(1, 2), 'fc2_w', (-1, width)),
    }
    if f'{prefix}fc2_bias' in ranks[0]:
        plan[f'{name}.fc2.bias'] = join(lambda x: x[:, :width], 'fc2_bias', (-1,))
    elif bias2 is not None and bias2.any():
        raise InputError(f'{prefix}fc2_bias is in the master file, that of rank 0 alone, and it is not zero.')
    else:
        plan[f'{name}.fc2.bias'] = _lazy(lambda x: x.new_zeros(num_experts, width), bias1)
    return plan


def _shape(rest: StateDict) -> Dict[str, Any]:
    """Keywords of timm's Swin: what its shape follows from."""
    blocks = [match for key in rest if (match := re.match(r'layers\.(\d+)\.blocks\.(\d+)\.', key))]
    depths = [1 + max((int(m[2]) for m in blocks if int(m[1]) == stage), default=-1)
              for stage in range(len({m[1] for m in blocks}))]
    windows, heads = [], []
    for stage in range(len(depths)):
        attention = f'layers.{stage}.blocks.0.attn.'
        windows.append((_take(rest, f'{attention}relative_coords_table').shape[1] + 1) // 2)
        heads.append(_take(rest, f'{attention}cpb_mlp.2.weight').shape[0])
    patches = _take(rest, 'patch_embed.proj.weight')
    hidden = next((rest[key].shape for key in rest if key.endswith('.mlp.fc1.weight')), (4, 1))
    side = _side(rest, depths, windows) * patches.shape[2]
    return dict(
        img_size=side, patch_size=patches.shape[2], in_chans=patches.shape[1],
        num_classes=rest['head.weight'].shape[0] if 'head.weight' in rest else 0, embed_dim=patches.shape[0],
        depths=tuple(depths), num_heads=tuple(heads), window_size=max(windows), mlp_ratio=hidden[0] / hidden[1])


def _side(rest: StateDict, depths: Sequence[int], windows: Sequence[int]) -> int:
    """Patches along a side of an image.

    Every second block shifts its windows, and stores a mask for each of them, unless one window is the whole image.
    """
    for stage, (depth, window) in enumerate(zip(depths, windows)):
        if depth > 1:
            mask = rest.get(f'layers.{stage}.blocks.1.attn_mask')
            count = 1 if mask is None else mask.shape[0]
            if math.isqrt(count) ** 2 != count:
                raise InputError(f'The images are not square: layers.{stage} has {count} windows.')
            return window * 2 ** stage * math.isqrt(count)
    raise InputError('The size of the images cannot be told: no stage has a second block.')
