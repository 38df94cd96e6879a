"""What operators cost: formulas for those that torch's counter does not know, and the list of those that cost nothing.

One unit everywhere: one multiply-accumulate (MAC) is one. Matrix products and convolutions count; normalisation,
pooling, activations, softmax, interpolation and moving data (index dispatch to experts among it) do not. The formulas
are in FLOPs, two a MAC, from the shapes of the arguments, as `torch.utils.flop_counter` wants them.

What torch knows: matrix products of all kinds, convolutions (one a image too, whose batch is folded into groups), fused
attention on a GPU.
"""
import math
from collections.abc import Callable
from typing import Any

import torch
import torchvision.ops  # noqa: F401 - registers the operators of torch.ops.torchvision
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import sdpa_flop_count

aten = torch.ops.aten


def op_name(packet: Any) -> str:
    """'aten.bmm', 'torchvision.nms'; the in-place form and the plain one share a name."""
    return str(packet).removesuffix('_')


def is_free(func: Any, packet: Any, args: tuple, kwargs: dict) -> bool:
    """Does an operator cost no MACs by convention: a view, elementwise, a reduction, in `FREE`, or without input."""
    if op_name(packet) in FREE or getattr(func, 'is_view', False):
        return True
    if FREE_TAGS.intersection(getattr(func, 'tags', ())):
        return True
    return not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs)))


def _vector_product(a, b, *args, **kwargs) -> int:
    return 2 * math.prod(a)


def _plus_matrix_vector(bias, a, b, *args, **kwargs) -> int:
    return 2 * math.prod(a)


def _matrix_product(a, b, *args, **kwargs) -> int:
    return 2 * math.prod(a) * b[-1]


def _plus_matrix_product(bias, a, b, *args, **kwargs) -> int:
    return 2 * math.prod(a) * b[-1]


def _linear(x, weight, *args, **kwargs) -> int:
    return 2 * math.prod(x) * weight[0]


def _grouped_product(a, b, *args, **kwargs) -> int:
    """torch's grouped_mm: rows, columns or the inner axis of 2-D operands are cut into groups; every element of `a`
    meets each column of its group once, and only 3-D by 2-D cuts the columns themselves.
    """
    return 2 * math.prod(a[-2:]) * b[-1] * (a[0] if len(a) == len(b) == 3 else 1)


def _attention(query, key, value, *args, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _trilinear(a, b, c, *args, **kwargs) -> int:
    """nn.Bilinear, a (N, I), b (O, I, J), c (N, J): every matrix of b with a, then the rest with c."""
    o, i, j = b
    return 2 * a[0] * o * j * (i + 1)


def _distances(a, b, *args, **kwargs) -> int:
    return 2 * math.prod(a) * b[-2]


def _recurrent(x, input_weight, hidden_weight, *args, **kwargs) -> int:
    """One direction of one layer: x (steps, batch, features), both weight matrices at every step."""
    return 2 * math.prod(x[:-1]) * (math.prod(input_weight) + math.prod(hidden_weight))


def _deformable_convolution(x, weight, *args, out_shape=None, **kwargs) -> int:
    """A convolution on sampled positions; the sampling itself is interpolation, which is free by convention."""
    return 2 * math.prod(weight) * out_shape[0] * math.prod(out_shape[2:])


# By operator; older versions of torch lack a few.
FORMULAS: dict[Any, Callable[..., int]] = {
    getattr(aten, name): formula for name, formula in {
        'mv': _vector_product,
        'dot': _vector_product,
        'vdot': _vector_product,
        'addmv': _plus_matrix_vector,
        'addbmm': _plus_matrix_product,
        '_addmm_activation': _plus_matrix_product,
        'linear': _linear,
        '_int_mm': _matrix_product,
        '_grouped_mm': _grouped_product,
        '_scaled_dot_product_flash_attention_for_cpu': _attention,
        '_scaled_dot_product_fused_attention_overrideable': _attention,
        '_trilinear': _trilinear,
        '_cdist_forward': _distances,
        'mkldnn_rnn_layer': _recurrent,
    }.items() if hasattr(aten, name)
}
FORMULAS[torch.ops.torchvision.deform_conv2d] = _deformable_convolution
FREE_TAGS = {
    getattr(torch.Tag, name) for name in ('pointwise', 'reduction', 'view_copy', 'inplace_view')
    if hasattr(torch.Tag, name)
}
# What the tags of torch do not say, by family. In-place forms are meant too.
FREE = frozenset(f'aten.{name}' for name in """
    native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training native_layer_norm native_group_norm
    _fused_rms_norm _softmax _safe_softmax _log_softmax logsumexp _weight_norm_interface norm linalg_vector_norm

    avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_max_pool2d adaptive_max_pool3d
    max_pool2d_with_indices max_pool3d_with_indices fractional_max_pool2d max_unpool2d

    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact2d upsample_linear1d
    upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    grid_sampler_2d grid_sampler_3d affine_grid_generator

    hardswish hardsigmoid hardtanh prelu _prelu_kernel glu rrelu_with_noise native_dropout floor_divide
    sum mean prod any all max min amax amin aminmax argmax argmin median mode kthvalue std var std_mean var_mean
    cumsum cumprod cummax cummin diff histc bincount

    index _unsafe_index gather scatter scatter_add scatter_reduce index_add index_copy index_fill index_put
    _unsafe_index_put index_reduce index_select take masked_select masked_fill masked_scatter nonzero embedding
    _embedding_bag _embedding_bag_forward_only slice_scatter select_scatter diagonal_scatter tril triu diag_embed
    sort argsort topk searchsorted bucketize unique_dim _unique2 unique_consecutive isin equal

    cat stack split unsafe_split unsafe_split_with_sizes unsafe_chunk _unsafe_view _reshape_alias repeat
    repeat_interleave roll flip
    constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d im2col col2im
    pixel_shuffle pixel_unshuffle channel_shuffle clone copy _to_copy lift_fresh contiguous resize set resize_as
    empty_like zeros_like ones_like full_like new_empty new_empty_strided new_zeros new_ones new_full
    rand_like randn_like randint_like uniform normal bernoulli multinomial exponential
    _local_scalar_dense item _assert_async _assert_tensor_metadata is_same_size
""".split()) | frozenset(f'torchvision.{name}' for name in 'nms roi_align roi_pool ps_roi_align ps_roi_pool'.split())
