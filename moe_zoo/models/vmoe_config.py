"""Reads a model entry of the original V-MoE's configurations: fields of its flax modules to keywords of ours."""
import math
from typing import Any, Dict, Mapping, Optional

from ..errors import InputError, nearest
from ..routing import compute_capacity


class _Fields:
    """A dictionary of which every entry must be asked for."""

    def __init__(self, fields: Mapping[str, Any], name: str):
        self.fields, self.name, self.known = dict(fields), name, []

    def take(self, key: str, *default: Any) -> Any:
        self.known.append(key)
        if key not in self.fields and not default:
            raise InputError(f'The {self.name} entry has no {key!r}.')
        return self.fields.pop(key, *default)

    def finish(self) -> None:
        for key in self.fields:
            raise InputError(
                f'The {self.name} entry has an unknown field {key!r}.{nearest(key, self.known)} '
                f'Known: {", ".join(self.known)}.')


def model_args(entry: Mapping[str, Any]) -> Dict[str, Any]:
    """Keywords of `moe_zoo.models.vmoe.VMoE` from the fields of the original's VisionTransformerMoe.

    Raises:
        InputError: A field is missing or unknown, or names something that is not built here.
    """
    fields = _Fields(entry, 'model')
    name = fields.take('name', 'VisionTransformerMoe')
    if name != 'VisionTransformerMoe':
        raise InputError(f"The model entry is named {name!r}: only 'VisionTransformerMoe' is built here.")
    classifier = fields.take('classifier', 'token')
    pools = {'token': 'token', '0': 'token', 'gap': 'avg', 'map': 'map'}
    if classifier not in pools:
        raise InputError(f'classifier={classifier!r} is unknown. Known: {", ".join(pools)}.')
    patch_size = fields.take('patch_size')
    encoder = _Fields(fields.take('encoder'), 'encoder')
    width, hidden = fields.take('hidden_size'), encoder.take('mlp_dim')
    args = dict(
        num_classes=fields.take('num_classes') or 0,
        patch_size=(patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size),
        embed_dim=width,
        global_pool=pools[classifier],
        class_token=classifier == 'token',
        representation_size=fields.take('representation_size', None) or 0,
        head_bias_init=fields.take('head_bias_init', 0.),
        head_zero_init=fields.take('head_kernel_zero_init', True),
        depth=encoder.take('num_layers'),
        num_heads=encoder.take('num_heads'),
        mlp_ratio=_ratio(hidden, width),
        proj_drop_rate=encoder.take('dropout_rate', 0.),
        attn_drop_rate=encoder.take('attention_dropout_rate', 0.),
        qk_norm=encoder.take('attention_qk_norm', False),
    )
    args['pos_drop_rate'] = args['proj_drop_rate']
    position = _Fields(encoder.take('position_emb', None) or {}, 'position_emb')
    kind = position.take('name', 'learned')
    args['pos_embed'] = 'learn' if kind == 'learned' else kind
    args['pos_temperature'] = position.take('temperature', 10_000.)
    moe = _Fields(encoder.take('moe', None) or {}, 'moe')
    args.update(_moe_args(moe, width, hidden) if moe.fields else dict(moe_layers=()))
    for each in (fields, encoder, position, moe):
        each.finish()
    return args


def _moe_args(moe: _Fields, width: int, hidden: int) -> Dict[str, Any]:
    """Keywords for the routed blocks; the router's defaults are those of the original's classes."""
    router = _Fields(moe.take('router', None) or {}, 'router')
    name = router.take('name', 'NoisyTopExpertsPerItemRouter')
    if name not in ROUTERS:
        raise InputError(f'The router {name!r} is not built here.{nearest(name, ROUTERS)} Known: {", ".join(ROUTERS)}.')
    args = dict(
        moe_layers=tuple(moe.take('layers', ())),
        num_experts=moe.take('num_experts'),
        group_size=moe.take('group_size', None),
        expert_drop_rate=moe.take('dropout_rate', None),
        expert_mlp_ratio=_ratio(moe.take('mlp_dim', hidden), width),
    )
    split = moe.take('split_rngs', False)
    args['same_init'] = not (split if isinstance(split, bool) else 'params' in split)
    args.update(ROUTERS[name](router, args['num_experts'], args['group_size']))
    router.finish()
    return args


def _top_experts(router: _Fields, *_) -> Dict[str, Any]:
    return dict(
        num_selected=router.take('num_selected_experts', 1),
        losses=dict(
            importance=router.take('importance_loss_weight', 1.0),
            vmoe_load=router.take('load_loss_weight', 1.0),
            gshard=router.take('gshard_loss_weight', 0.0),
        ),
        **_noise_args(router),
        **_dispatcher_args(_Fields(router.take('dispatcher', None) or {}, 'dispatcher')),
    )


def _top_items(router: _Fields, *_) -> Dict[str, Any]:
    """Expert Choice, whose capacity counts S / E tokens an expert as one."""
    return dict(
        router='expert_choice',
        num_selected=1,
        **_noise_args(router),
        **_dispatcher_args(_Fields(router.take('dispatcher', None) or {}, 'dispatcher')),
    )


def _noise_args(router: _Fields) -> Dict[str, Any]:
    return dict(
        noise_std=router.take('noise_std', 1.0), router_args=dict(deterministic=router.take('deterministic', None)))


def _soft(router: _Fields, num_experts: int, group_size: Optional[int]) -> Dict[str, Any]:
    """Soft MoE. Its noise, off by default there, is not built here."""
    slots, factor = router.take('num_slots', None), router.take('capacity_factor', None)
    if (slots is None) == (factor is None):
        raise InputError(
            f'The router entry has num_slots={slots} and capacity_factor={factor}: give exactly one of the two.')
    if slots is None:
        if group_size is None:
            raise InputError(
                f'The router entry has capacity_factor={factor}, but the moe entry has no group_size: give it, or '
                'num_slots.')
        slots = compute_capacity(group_size, num_experts, 1, factor, multiple_of=1, rounding='round')
    noise = router.take('noise_std', 0.)
    if noise:
        raise InputError(f"The router entry has noise_std={noise}: only 0 is built here for 'SoftRouter'.")
    for report in ('compute_similarity_metrics', 'deterministic'):  # what it logs, and what only noise asks for
        router.take(report, None)
    return dict(router='soft', num_slots=slots)


ROUTERS = {
    'NoisyTopExpertsPerItemRouter': _top_experts,
    'NoisyTopItemsPerExpertRouter': _top_items,
    'SoftRouter': _soft,
}


def _dispatcher_args(dispatcher: _Fields) -> Dict[str, Any]:
    kind = dispatcher.take('name', 'einsum')
    if kind not in ('einsum', 'indices'):
        raise InputError(f"The dispatcher {kind!r} is unknown: use 'einsum' or 'indices', which give the same numbers.")
    capacity, factor = dispatcher.take('capacity', None), dispatcher.take('capacity_factor', None)
    if (capacity is None) == (factor is None):
        raise InputError(
            f'The dispatcher entry has capacity={capacity} and capacity_factor={factor}: give exactly one of the two.')
    args = dict(
        capacity=capacity,
        capacity_factor=factor,
        eval_capacity_factor=factor,
        capacity_rounding=dispatcher.take('capacity_ceil_or_round', 'ceil'),
        capacity_multiple_of=dispatcher.take('capacity_multiple_of', 4) or 1,
        batch_priority=dispatcher.take('batch_priority', False),
        bfloat16_dispatch=dispatcher.take('bfloat16', False),
    )
    for placement in ('partition_spec', 'einsum_precision'):  # where and how TPUs compute, not what
        dispatcher.take(placement, None)
    dispatcher.finish()
    return args


def _ratio(hidden: int, width: int) -> float:
    """A ratio r with int(width * r) == hidden, whatever the rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
