"""V-MoE: vision transformers whose MLPs are sparse mixtures of experts (sizes are the original's: S is 8 blocks x 512).

Paper: `Scaling Vision with Sparse Mixture of Experts`, Riquelme et al., NeurIPS 2021, https://arxiv.org/abs/2106.05974
Original code: https://github.com/google-research/vmoe (JAX, Apache-2.0); numerically equal given the same weights.

In the same code, and here by the keyword `router`: experts that choose their tokens (`Mixture-of-Experts with Expert
Choice Routing`, Zhou et al., NeurIPS 2022, https://arxiv.org/abs/2202.09368), and Soft MoE (`From Sparse to Soft
Mixtures of Experts`, Puigcerver et al., ICLR 2024, https://arxiv.org/abs/2308.00951).

What differs from timm's VisionTransformer: in some blocks the MLP is a `MoEMlp` or a `SoftMoEMlp`; GELU is the tanh
approximation; an optional tanh layer before the head; initialisation; position tables are resized as the original does;
the final norm precedes pooling always.

Letters: B images, N tokens, D width, E experts, K chosen experts.
"""
import inspect
import math
import re
from collections import OrderedDict
from functools import partial
from typing import Any, Callable, Dict, Final, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from timm.data import IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD
from timm.layers import (
    Attention,
    Mlp,
    get_device_dtype,
    lecun_normal_,
    register_notrace_function,
    resample_abs_pos_embed,
    use_reentrant_ckpt,
)
from timm.models import generate_default_cfgs, named_apply, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_checkpoint_filter_fn
from torch import nn

from ..checkpoints import import_vmoe, is_routed
from ..errors import InputError
from ..layers import MoEMlp, RoutedModel, SoftMoEMlp
from ..routing import checkpoint_routed
from .pretrained import build, upcycled_cfgs
from .pretrained import checkpoint_filter_fn as upcycling_filter_fn
from .vmoe_config import model_args

__all__ = ['VMoE', 'from_config']

GELU_TANH = partial(nn.GELU, approximate='tanh')

# Keywords of the model that go to every routed MLP as they are: those that timm's Mlp does not have.
MOE_KEYWORDS = (
    (inspect.signature(MoEMlp).parameters.keys() | inspect.signature(SoftMoEMlp).parameters.keys())
    - inspect.signature(Mlp).parameters.keys())


class ScaleNormAttention(Attention):
    """Attention whose query and key norms have a scale and no bias, as flax's."""

    def __init__(self, *args, qk_norm: bool = False, device=None, dtype=None, **kwargs):
        super().__init__(*args, qk_norm=qk_norm, device=device, dtype=dtype, **kwargs)
        if qk_norm:
            _norm_by_scale(self, self.head_dim, device, dtype)


def _norm_by_scale(attention: nn.Module, head_dim: int, device, dtype) -> None:
    for name in ('q_norm', 'k_norm'):
        setattr(attention, name, nn.LayerNorm(head_dim, eps=1e-6, bias=False, device=device, dtype=dtype))


class RoutedBlock(Block):
    """timm's block, which checkpoints itself so that routing records leave the recomputed region as outputs of it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.grad_checkpointing = False

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """x: (B, N, D), same out."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            run = partial(self.run, attn_mask=attn_mask, is_causal=is_causal)
            return checkpoint_routed(run, x, use_reentrant=use_reentrant_ckpt())
        return self.run(x, attn_mask, is_causal)

    def run(self, x: torch.Tensor, attn_mask: Optional[torch.Tensor], is_causal: bool) -> torch.Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class VMoE(RoutedModel, VisionTransformer):
    """V-MoE.

    Every keyword of timm's VisionTransformer is accepted (`img_size`, `patch_size`, `dynamic_img_size`, ...), and every
    one of `MoEMlp` from `num_experts` on (`num_selected`, `capacity_factor`, `eval_capacity_factor`, `batch_priority`,
    `noise_std`, `group_size`, `group_images`, `router`, `losses`, ...). With `router='soft'` the routed MLP is a
    `SoftMoEMlp`, whose keywords are accepted instead (`num_experts`, `num_slots`, `group_size`, ...).

    Args:
        moe_layers: Blocks with experts, counted from 0: their numbers, or as the original's descriptions say, 'last_2'
            (the last two blocks of odd number) or 'every_2' (every second block, from the second on).
        expert_drop_rate: Dropout inside experts; `proj_drop_rate` if None.
        expert_mlp_ratio: Hidden width of an expert over D; `mlp_ratio` if None.
        pos_embed: 'learn', 'sincos2d' (fixed, added to the patches only) or 'none'.
        pos_temperature: Of 'sincos2d'.
        representation_size: Width of the tanh layer before the head; 0 for none.
        head_bias_init: Initial bias of the head; -log(num_classes) if None, a good start for a sigmoid loss.
        head_zero_init: Start the head's weights at zero.
        act_layer: None is the original's GELU by tanh; dense weights that are loaded by `pretrained=True` make it the
            exact one, timm's, and an argument of the model from then on.
        global_pool: 'token', 'avg', 'map' (attention pooling), or timm's others.
        class_token: Without one, 'token' pools the first patch.
        weight_init: '' is the original's, else a mode of timm's ('skip', 'jax', 'moco', 'reset').

    Raises:
        InputError: A block that does not exist is to be routed, the position table is unknown, or what `MoEMlp` raises.
    """
    dynamic_img_size: Final[bool]

    def __init__(
            self,
            num_classes: int = 1000,
            global_pool: str = 'token',
            embed_dim: int = 768,
            depth: int = 12,
            num_heads: int = 12,
            moe_layers: Union[str, Sequence[int]] = 'every_2',
            expert_drop_rate: Optional[float] = None,
            expert_mlp_ratio: Optional[float] = None,
            qk_norm: bool = False,
            class_token: bool = True,
            pos_embed: str = 'learn',
            pos_temperature: float = 10_000.,
            representation_size: int = 0,
            head_bias_init: Optional[float] = None,
            head_zero_init: bool = True,
            act_layer: Any = None,
            weight_init: str = '',
            device=None,
            dtype=None,
            **kwargs,
    ):
        dd = {'device': device, 'dtype': dtype}
        if pos_embed not in ('learn', 'sincos2d', 'none', ''):
            raise InputError(f"pos_embed={pos_embed!r} is unknown: use 'learn', 'sincos2d' or 'none'.")
        if pos_embed == 'sincos2d' and (embed_dim % 4 or embed_dim < 8):
            raise InputError(f"embed_dim={embed_dim} with pos_embed='sincos2d': use a multiple of 4, at least 8.")
        moe_args = {name: kwargs.pop(name) for name in MOE_KEYWORDS if name in kwargs}
        block_fn = _block_fn(_moe_layers(moe_layers, depth), expert_drop_rate, expert_mlp_ratio, moe_args)
        first_token = global_pool == 'token' and not class_token  # which timm refuses
        super().__init__(
            num_classes=num_classes,
            global_pool='' if first_token else global_pool,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            qk_norm=qk_norm,
            class_token=class_token,
            pos_embed='none' if pos_embed == 'sincos2d' else pos_embed,
            weight_init='skip',
            act_layer=GELU_TANH if act_layer is None else act_layer,
            **{'block_fn': block_fn, 'attn_layer': ScaleNormAttention, 'fc_norm': False, **kwargs},
            **dd,
        )
        self.act_by_default = act_layer is None
        self.global_pool = global_pool
        self.sincos2d = pos_embed == 'sincos2d'
        self.pos_temperature = pos_temperature
        if qk_norm and global_pool == 'map':
            _norm_by_scale(self.attn_pool, embed_dim // num_heads, **dd)
        self.head_bias_init = head_bias_init
        self.head_zero_init = head_zero_init
        self.pre_logits = nn.Identity()
        if representation_size:
            self.head_hidden_size = representation_size
            self.pre_logits = nn.Sequential(OrderedDict(
                fc=nn.Linear(embed_dim, representation_size, **dd), act=nn.Tanh()))
            self.head = nn.Linear(representation_size, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.weight_init_mode = 'reset' if weight_init == 'skip' else weight_init
        if weight_init != 'skip':
            self.init_weights(needs_reset=False)

    @torch.no_grad()
    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """Initialise as the original, or in one of timm's modes; see timm's VisionTransformer."""
        mode = mode or self.weight_init_mode
        if mode:
            super().init_weights(mode, needs_reset)
            return
        named_apply(partial(_init_original, needs_reset=needs_reset), self)
        if self.pos_embed is not None:
            nn.init.normal_(self.pos_embed, std=.02)
        for token in (self.cls_token, self.reg_token):
            if token is not None:
                nn.init.zeros_(token)
        if self.attn_pool is not None and hasattr(self.attn_pool, 'latent'):
            limit = math.sqrt(6. / (1 + self.embed_dim))  # Xavier on the fans of a (1, 1, D) array
            nn.init.uniform_(self.attn_pool.latent, -limit, limit)
        self._init_head()

    @torch.no_grad()
    def _init_head(self) -> None:
        if not isinstance(self.head, nn.Linear):
            return
        if self.head_zero_init:
            nn.init.zeros_(self.head.weight)
        else:
            lecun_normal_(self.head.weight)
        bias = -math.log(self.num_classes) if self.head_bias_init is None else self.head_bias_init
        nn.init.constant_(self.head.bias, bias)

    @torch.jit.ignore
    def load_pretrained(self, checkpoint_path: str, prefix: str = '') -> None:
        """Load an .npz of the original's parameters (`moe_zoo.checkpoints.import_vmoe`)."""
        with np.load(checkpoint_path, allow_pickle=False) as arrays:
            weights = {key.removeprefix(prefix): arrays[key] for key in arrays if key.startswith(prefix)}
        self.load_state_dict(checkpoint_filter_fn(import_vmoe(weights), self))

    @torch.jit.ignore
    def no_weight_decay(self):
        """The original decays kernels only."""
        slots = {name for name, _ in self.named_parameters() if name.endswith('router.mu')}
        return super().no_weight_decay() | {'attn_pool.latent'} | slots

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for block in self.blocks:
            block.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """A new head on the pre-logits, initialised as the original; see timm's VisionTransformer."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0:
            self.head = nn.Linear(self.head_hidden_size, num_classes, **get_device_dtype(self)).train(self.training)
            self._init_head()

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Remove what these features do not need; see timm's VisionTransformer."""
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.pre_logits = nn.Identity()
            self.head_hidden_size = self.embed_dim
        return take_indices

    def set_input_size(
            self,
            img_size: Optional[Tuple[int, int]] = None,
            patch_size: Optional[Tuple[int, int]] = None,
    ) -> None:
        """Change the image or patch size; a learned position table is resized as the original does."""
        table, grid = self.pos_embed, self.patch_embed.grid_size
        super().set_input_size(img_size, patch_size)
        if self.pos_embed is not table:
            resized = resize_table(table.detach(), self.patch_embed.grid_size, grid, self._prefix_positions())
            self.pos_embed = nn.Parameter(resized, requires_grad=table.requires_grad)

    def _prefix_positions(self) -> int:
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, D), or (B, H, W, D) where the size is dynamic, to (B, N + prefix, D) with positions."""
        if self.dynamic_img_size:
            B, H, W, D = x.shape
            x = x.reshape(B, H * W, D)
        else:
            H, W = self.patch_embed.grid_size
        if self.sincos2d:
            x = x + sincos2d_table(H, W, x.shape[-1], self.pos_temperature, x)
        table = self.pos_embed
        if table is not None and self.dynamic_img_size:
            table = resize_table(table, (H, W), self.patch_embed.grid_size, self._prefix_positions())
        if table is not None and self.no_embed_class:
            x = x + table
        prefix: List[torch.Tensor] = []
        if self.cls_token is not None:
            prefix.append(self.cls_token.expand(x.shape[0], -1, -1))
        if self.reg_token is not None:
            prefix.append(self.reg_token.expand(x.shape[0], -1, -1))
        if len(prefix) > 0:
            x = torch.cat(prefix + [x], dim=1)
        if table is not None and not self.no_embed_class:
            x = x + table
        return self.pos_drop(x)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        x = self.fc_norm(self.pool(x))
        x = self.head_drop(self.pre_logits(x))
        return x if pre_logits else self.head(x)


def _block_fn(
        routed: Sequence[int],
        drop_rate: Optional[float],
        mlp_ratio: Optional[float],
        moe_args: Dict[str, Any],
) -> Callable[..., RoutedBlock]:
    """What timm's VisionTransformer calls to make a block: the numbers in `routed` get a routed MLP."""
    layer = MoEMlp
    if moe_args.get('router') == 'soft':
        layer, moe_args = SoftMoEMlp, {name: value for name, value in moe_args.items() if name != 'router'}

    def routed_mlp(in_features: int, hidden_features: int, drop: float, **mlp_args) -> nn.Module:
        hidden_features = hidden_features if mlp_ratio is None else int(in_features * mlp_ratio)
        drop = drop if drop_rate is None else drop_rate
        return layer(in_features, hidden_features, drop=drop, **mlp_args, **moe_args)

    def block_fn(depth: int, mlp_layer: Any, **block_args) -> RoutedBlock:
        return RoutedBlock(depth=depth, mlp_layer=routed_mlp if depth in routed else mlp_layer, **block_args)
    return block_fn


@torch.fx.wrap
@register_notrace_function
def resize_table(table: torch.Tensor, size: List[int], old_size: List[int], num_prefix: int) -> torch.Tensor:
    """A (1, prefix + N, D) position table on another grid, linear from corner to corner, as the original resizes."""
    return resample_abs_pos_embed(
        table, size, old_size, num_prefix, interpolation='bilinear', antialias=False, align_corners=True)


@torch.fx.wrap
@register_notrace_function
def sincos2d_table(height: int, width: int, dim: int, temperature: float, like: torch.Tensor) -> torch.Tensor:
    """(1, height * width, dim) of [sin x, cos x, sin y, cos y] at dim / 4 frequencies, both ends included.

    The frequencies are temperature^(-j / (dim / 4 - 1)), as in MoCo v3 and the original; timm's table differs.
    """
    steps = torch.arange(dim // 4, device=like.device, dtype=torch.float32) / (dim // 4 - 1)
    omega = 1. / (temperature ** steps)
    x = torch.arange(width, device=like.device, dtype=torch.float32).unsqueeze(1) * omega  # (width, dim / 4)
    y = torch.arange(height, device=like.device, dtype=torch.float32).unsqueeze(1) * omega
    x = x.unsqueeze(0).expand(height, -1, -1)
    y = y.unsqueeze(1).expand(-1, width, -1)
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=-1).reshape(1, height * width, dim).to(like.dtype)


def _moe_layers(layers: Union[str, Sequence[int]], depth: int) -> Tuple[int, ...]:
    """Numbers of the routed blocks; 'last_n' takes the last n of odd number, 'every_n' the blocks n-1, 2n-1, ..."""
    if isinstance(layers, str):
        found = re.fullmatch(r'(last|every)_?([1-9]\d*)', layers)
        if not found:
            raise InputError(f"moe_layers={layers!r}: use block numbers, 'last_n' or 'every_n', for example 'last_2'.")
        n = int(found[2])
        return tuple(range(1, depth, 2))[-n:] if found[1] == 'last' else tuple(range(n - 1, depth, n))
    wrong = [layer for layer in layers if not 0 <= layer < depth]
    if wrong:
        raise InputError(f'moe_layers has {wrong[0]}, but the {depth} blocks are numbered 0 to {depth - 1}.')
    return tuple(layers)


def _init_original(module: nn.Module, name: str, needs_reset: bool) -> None:
    """One module as in the original: Xavier kernels (each projection on its own fans), Lecun for patches and logits."""
    if isinstance(module, nn.Linear):
        if 'pre_logits' in name:
            lecun_normal_(module.weight)
        else:
            # Queries, keys and values are separate kernels there.
            parts = {'qkv': 3, 'kv': 2}.get(name.split('.')[-1], 1)
            for kernel in module.weight.chunk(parts):
                nn.init.xavier_uniform_(kernel)
        if module.bias is not None:
            nn.init.normal_(module.bias, std=1e-6) if '.mlp.' in name else nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        lecun_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif needs_reset and hasattr(module, 'reset_parameters'):
        module.reset_parameters()


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: VMoE) -> Dict[str, torch.Tensor]:
    """As timm's for its ViTs, but position tables are resized as the original does, and the pre-logits stay.

    The weights of a dense ViT pass timm's own filter, and are upcycled; they bring their activation with them.
    """
    state_dict = state_dict.get('model', state_dict)
    state_dict = state_dict.get('state_dict', state_dict)
    if not is_routed(state_dict, model):
        if model.act_by_default:
            _take_exact_gelu(model)
        return upcycling_filter_fn(vit_checkpoint_filter_fn(state_dict, model), model)
    pre_logits = {name: value for name, value in state_dict.items() if name.startswith('pre_logits.')}
    filtered = vit_checkpoint_filter_fn(
        state_dict, model, interpolation='bilinear', antialias=False, align_corners=True)
    return {**filtered, **pre_logits}


def _take_exact_gelu(model: VMoE) -> None:
    """The activation of timm's ViTs, from which the one by tanh moves logits by 7e-4; it is saved with the model."""
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = 'none'
    model._model_args = {**getattr(model, '_model_args', {}), 'act_layer': 'gelu'}


def from_config(entry: Mapping[str, Any], img_size: Union[None, int, Tuple[int, int]] = None, **kwargs) -> VMoE:
    """Build any model of the original from the `model` entry of its configuration.

    Args:
        entry: Fields of `VisionTransformerMoe`, as in the original's configurations.
        img_size: Image size, which the original takes from its first input. Without one the model takes any size, and
            a learned position table has the size of the weights that are loaded.
        kwargs: Further keywords of `VMoE`, which override the entry.

    Returns:
        The model. Unlike the registered models it keeps the capacity in evaluation, as the original does.

    Raises:
        InputError: A field is unknown, or names something that is not built here.
    """
    args = model_args(entry)
    args.update(kwargs)
    if img_size is not None:
        return VMoE(img_size=img_size, **args)
    args.setdefault('dynamic_img_size', True)
    patch_size = args['patch_size']
    model = VMoE(img_size=tuple(14 * size for size in patch_size), **args)
    model.register_load_state_dict_pre_hook(_adopt_table_size)
    return model


def _adopt_table_size(model: VMoE, state_dict: Mapping[str, torch.Tensor], prefix: str, *_) -> None:
    """Before loading: give a model without an image size the grid of the table that comes, for square images."""
    table = state_dict.get(f'{prefix}pos_embed')
    if table is None or model.pos_embed is None or table.shape == model.pos_embed.shape:
        return
    height, width = model.patch_embed.patch_size
    side = math.isqrt((table.shape[1] - model._prefix_positions()) * height * width)
    if (side // height) * (side // width) == table.shape[1] - model._prefix_positions():
        model.set_input_size(img_size=(side, side))


def _cfg(**kwargs) -> Dict[str, Any]:
    return {
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': None,
        'crop_pct': 0.875,
        'interpolation': 'bilinear',
        'fixed_input_size': True,
        'mean': IMAGENET_INCEPTION_MEAN,  # values in [-1, 1]
        'std': IMAGENET_INCEPTION_STD,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
        **kwargs,
    }


default_cfgs = generate_default_cfgs({
    'vmoe_vit_s': _cfg(),
    'vmoe_vit_s_ec': _cfg(),
    'softmoe_vit_s': _cfg(),
    **upcycled_cfgs({
        'vmoe_vit_b': 'vit_base_patch16_224.augreg_in21k_ft_in1k',
        'vmoe_vit_b_ec': 'vit_base_patch16_224.augreg_in21k_ft_in1k',
        'vmoe_vit_l': 'vit_large_patch16_224.augreg_in21k_ft_in1k',
        'vmoe_vit_h': 'vit_huge_patch14_224.orig_in21k',  # without a head, which stays new
    }, _cfg),
})

# What the authors released in gs://vmoe_checkpoints, by the model that takes it; the cards say more.
RELEASED = {
    'vmoe_vit_s': (
        'vmoe_s32_last2_ilsvrc2012_randaug_light1',
        'vmoe_s32_last2_ilsvrc2012_randaug_light1_ft_ilsvrc2012',
        'vmoe_s32_last2_ilsvrc2012_randaug_medium',
    ),
    'vmoe_vit_b': (
        'vmoe_b16_imagenet21k_randaug_strong',
        'vmoe_b16_imagenet21k_randaug_strong_ft_ilsvrc2012',
    ),
}


def _create_vmoe(variant: str, pretrained: bool = False, **kwargs) -> VMoE:
    released = ', '.join(map(repr, RELEASED.get(variant, ())))
    return build(
        VMoE,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        takes=released and f'one that the authors released ({released}) and tools/convert_checkpoint.py converted',
        feature_cfg=dict(out_indices=kwargs.pop('out_indices', 3), feature_cls='getter'),
        **kwargs,
    )


S32_LAST2 = dict(patch_size=32, embed_dim=512, depth=8, num_heads=8, moe_layers='last_2', representation_size=512)
B16_EVERY2 = dict(patch_size=16, embed_dim=768, depth=12, num_heads=12, moe_layers='every_2')
# Every expert takes S K / E tokens of every image, rounded: K experts a token on average.
EXPERT_CHOICE = dict(
    router='expert_choice', capacity_factor=1.0, capacity_rounding='round', capacity_multiple_of=1, group_images=1)


@register_model
def vmoe_vit_s(pretrained: bool = False, **kwargs) -> VMoE:
    """V-MoE-S/32, Last 2: 8 blocks x 512, not timm's 12 x 384; experts in blocks 5 and 7; 56,999,400 parameters."""
    return _create_vmoe('vmoe_vit_s', pretrained=pretrained, **dict(S32_LAST2, **kwargs))


@register_model
def vmoe_vit_b(pretrained: bool = False, **kwargs) -> VMoE:
    """V-MoE-B/16, Every 2: 12 blocks x 768, experts in every second block."""
    return _create_vmoe('vmoe_vit_b', pretrained=pretrained, **dict(B16_EVERY2, **kwargs))


@register_model
def vmoe_vit_l(pretrained: bool = False, **kwargs) -> VMoE:
    """V-MoE-L/16, Every 2: 24 blocks x 1024, experts in every second block."""
    model_args = dict(patch_size=16, embed_dim=1024, depth=24, num_heads=16, moe_layers='every_2')
    return _create_vmoe('vmoe_vit_l', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmoe_vit_h(pretrained: bool = False, **kwargs) -> VMoE:
    """V-MoE-H/14, Last 5: 32 blocks x 1280, experts in blocks 23, 25, 27, 29, 31."""
    model_args = dict(patch_size=14, embed_dim=1280, depth=32, num_heads=16, moe_layers='last_5')
    return _create_vmoe('vmoe_vit_h', pretrained=pretrained, **dict(model_args, **kwargs))



@register_model
def vmoe_vit_s_ec(pretrained: bool = False, **kwargs) -> VMoE:
    """vmoe_vit_s with Expert Choice: its experts choose their tokens in every image, as many as cost the same."""
    model_args = {**S32_LAST2, **EXPERT_CHOICE}
    return _create_vmoe('vmoe_vit_s_ec', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def vmoe_vit_b_ec(pretrained: bool = False, **kwargs) -> VMoE:
    """vmoe_vit_b with Expert Choice: its experts choose their tokens in every image, as many as cost the same."""
    model_args = {**B16_EVERY2, **EXPERT_CHOICE}
    return _create_vmoe('vmoe_vit_b_ec', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def softmoe_vit_s(pretrained: bool = False, **kwargs) -> VMoE:
    """Soft MoE-S/16: 12 blocks x 384, query-key norms, 128 experts of one slot in each of the last six blocks."""
    model_args = dict(
        patch_size=16, embed_dim=384, depth=12, num_heads=6, qk_norm=True, global_pool='avg', class_token=False,
        moe_layers=(6, 7, 8, 9, 10, 11), router='soft', num_experts=128, num_slots=1)
    return _create_vmoe('softmoe_vit_s', pretrained=pretrained, **dict(model_args, **kwargs))
