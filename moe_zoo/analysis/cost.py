"""What a model costs: parameters, MACs, and what could not be counted.

One unit everywhere: one multiply-accumulate (MAC) is one. Matrix products and convolutions count; normalisation,
pooling, activations, softmax, interpolation and moving data do not. Two numbers for a routed model: `macs_max`, what
the architecture can cost (its router plus `num_selected` experts for every item, no padding), and `macs_executed`, what
it did cost on these inputs. The second is a property of weights and inputs: quote it for a set of images
(`count_images`), with its spread. An operator that is neither counted nor known to be free is listed by name.

Letters: B images, E experts, K chosen.
"""
import contextlib
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torchvision.ops  # noqa: F401 - registers the operators of torch.ops.torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..layers.routed import RoutedLayer

aten = torch.ops.aten


@dataclass(frozen=True)
class Cost:
    """The cost of one forward pass in evaluation mode. MACs are totals over the images of the input.

    Attributes:
        images: Images in the input.
        parameters: Elements of all parameters.
        active_parameters: The same, with K of E experts of every routed layer: what one routed item meets.
        macs_max: Router plus K experts for every item, no padding. Equal to `macs_executed` without routed layers.
        macs_executed: What ran. A path that pads, or computes every expert, costs what it computed.
        by_module: Module name to executed MACs, children included; '' is the whole model.
        by_module_max: The same at most; the inside of a routed layer is left out, as only the layer knows its bound.
        by_operator: Operator name to executed MACs.
        uncounted: Operators that ran, are not counted and not known to be free, to the modules that called them.
    """
    images: int
    parameters: int
    active_parameters: int
    macs_max: int
    macs_executed: int
    by_module: dict[str, int]
    by_module_max: dict[str, int]
    by_operator: dict[str, int]
    uncounted: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class ImageCosts:
    """MACs of every image of a set, one at a time.

    Attributes:
        executed: MACs that ran, by image.
        at_most: Router plus K experts for every item, by image; constant unless the images differ in size.
        by_module: Mean of executed MACs by module name.
        by_module_max: Mean of MACs at most, as in `Cost`.
        uncounted: As in `Cost`, over all images.
    """
    executed: tuple[int, ...]
    at_most: tuple[int, ...]
    by_module: dict[str, float]
    by_module_max: dict[str, float]
    uncounted: dict[str, tuple[str, ...]]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.executed)

    @property
    def std(self) -> float:
        """Sample standard deviation over the images, 0 for a single one."""
        return statistics.stdev(self.executed) if len(self.executed) > 1 else 0.


def count(model: nn.Module, inputs: Any) -> Cost:
    """Count one forward pass of any module in evaluation mode; the model is left as it was.

    Runs on meta tensors too, where a model of any size costs no memory. Routed layers then take their padded path, so
    that `macs_executed` describes that path; `macs_max` does not depend on it.

    An operator that torch does not know gets a formula by `torch.utils.flop_counter.register_flop_formula` (in FLOPs,
    two a MAC), and is then counted here.

    Args:
        model: A timm model, a detector, any module.
        inputs: Its argument; a tuple holds several. A detector's list of dictionaries is one argument.
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    watch = _Watch(counter)
    with _evaluation(model), _countable_attention(), _routed_calls(model, counter) as routed:
        with watch, counter:
            model(*arguments)

    root = type(model).__name__
    executed = _by_module(model, counter)
    at_most = _at_most(executed, routed)
    return Cost(
        images=_num_images(arguments),
        parameters=_elements(model),
        active_parameters=active_parameters(model),
        macs_max=at_most[''],
        macs_executed=executed[''],
        by_module=executed,
        by_module_max=at_most,
        by_operator={_op_name(op): n // 2 for op, n in counter.get_flop_counts().get('Global', {}).items()},
        uncounted={op: tuple(sorted(_relative(m, root) for m in where)) for op, where in watch.uncounted.items()},
    )


def count_images(model: nn.Module, inputs: Iterable[Any]) -> ImageCosts:
    """Count what each image of a set costs.

    Args:
        model: As in `count`.
        inputs: The model's input for one image at a time: (1, C, H, W), or a list of one dictionary for a detector.
    """
    costs = [count(model, each) for each in inputs]
    uncounted: dict[str, set[str]] = defaultdict(set)
    for cost in costs:
        for op, where in cost.uncounted.items():
            uncounted[op].update(where)
    return ImageCosts(
        executed=tuple(cost.macs_executed for cost in costs),
        at_most=tuple(cost.macs_max for cost in costs),
        by_module=_mean(cost.by_module for cost in costs),
        by_module_max=_mean(cost.by_module_max for cost in costs),
        uncounted={op: tuple(sorted(where)) for op, where in uncounted.items()},
    )


def _mean(rows: Iterable[dict[str, int]]) -> dict[str, float]:
    """Mean by name; a module that an image did not reach costs it 0."""
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: statistics.fmean(row.get(name, 0) for row in rows) for name in names}


def active_parameters(model: nn.Module) -> int:
    """Parameters that one routed item meets: all of them, but only K of the E experts of each routed layer."""
    layers = _routed_layers(model).values()
    idle = sum(_elements(layer) - layer.active_parameters() for layer in layers)
    return _elements(model) - idle


def _elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _routed_layers(model: nn.Module) -> dict[str, RoutedLayer]:
    """The outermost routed layers by name: a layer's own bound covers whatever is routed inside it."""
    layers: dict[str, RoutedLayer] = {}
    for name, module in model.named_modules():  # parents come first
        inside = any(name.startswith(f'{outer}.') or outer == '' for outer in layers)
        if isinstance(module, RoutedLayer) and not inside:
            layers[name] = module
    return layers


@contextlib.contextmanager
def _routed_calls(model: nn.Module, counter: FlopCounterMode) -> Iterator[dict[str, list[int]]]:
    """Collect, by name of a routed layer, [MACs executed inside it, MACs at most] over all its calls."""
    calls: dict[str, list[int]] = {}
    handles = []

    def watch(name: str, layer: RoutedLayer) -> None:
        started = []

        def before(module, args, kwargs):
            started.append(counter.get_total_flops())

        def after(module, args, kwargs, output):
            x = args[0] if args else next(iter(kwargs.values()))
            entry = calls.setdefault(name, [0, 0])
            entry[0] += (counter.get_total_flops() - started.pop()) // 2
            entry[1] += layer.max_macs(tuple(x.shape))

        handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(layer.register_forward_hook(after, with_kwargs=True))

    try:
        for name, layer in _routed_layers(model).items():
            watch(name, layer)
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _by_module(model: nn.Module, counter: FlopCounterMode) -> dict[str, int]:
    """Executed MACs by module, in the order of the model; containers that are never called get their children's sum."""
    root = type(model).__name__
    macs = {_relative(name, root): sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    macs.setdefault('', 0)
    modules = dict(model.named_modules())
    for name, module in reversed(modules.items()):  # children come before their parents
        if name not in macs:
            inside = [macs[f'{name}.{child}'] for child, _ in module.named_children() if f'{name}.{child}' in macs]
            if inside:
                macs[name] = sum(inside)
    order = {name: i for i, name in enumerate(modules)}
    return {name: macs[name] for name in sorted(macs, key=lambda name: order.get(name, len(order)))}


def _at_most(executed: dict[str, int], routed: dict[str, list[int]]) -> dict[str, int]:
    """Put the bound of every routed layer in the place of what it executed, up to the whole model."""
    inside = tuple(f'{layer}.' for layer in routed if layer)
    bound = {name: macs for name, macs in executed.items() if not name.startswith(inside)}
    if '' in routed:  # the model is a routed layer itself
        bound = {'': executed['']}
    for layer, (ran, at_most) in routed.items():
        parts = layer.split('.') if layer else []
        for depth in range(len(parts) + 1):
            name = '.'.join(parts[:depth])
            bound[name] = bound.get(name, 0) + at_most - ran
    return bound


@contextlib.contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's and parameter's own flag back afterwards."""
    training = [module for module in model.modules() if module.training]
    trained = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for p in trained:  # a parameter as an argument of a module trips torch's module tracker otherwise
        p.requires_grad_(False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for p in trained:
            p.requires_grad_(True)


@contextlib.contextmanager
def _countable_attention() -> Iterator[None]:
    """Attention as its two matrix products: the fused kernels for CPU and the native fast path hide them."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Watch(TorchDispatchMode):
    """Sees what really ran below the counter (decompositions included) and files what nobody counted."""
    supports_higher_order_operators = True

    def __init__(self, counter: FlopCounterMode):
        super().__init__()
        self.counter = counter
        self.uncounted: dict[str, set[str]] = defaultdict(set)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = getattr(func, '_overloadpacket', func)
        if packet not in self.counter.flop_registry and not _is_free(func, packet, args, kwargs):
            innermost = max(self.counter.mod_tracker.parents, key=lambda name: (name != 'Global', name.count('.')))
            self.uncounted[_op_name(packet)].add(innermost)
        return func(*args, **kwargs)


def _is_free(func: Any, packet: Any, args: tuple, kwargs: dict) -> bool:
    """Does an operator cost no MACs by convention: a view, elementwise, a reduction, in `FREE`, or without input."""
    if _op_name(packet) in FREE or getattr(func, 'is_view', False):
        return True
    if FREE_TAGS.intersection(getattr(func, 'tags', ())):
        return True
    return not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs)))


def _op_name(packet: Any) -> str:
    """'aten.bmm', 'torchvision.nms'; the in-place form and the plain one share a name."""
    return str(packet).removesuffix('_')


def _relative(name: str, root: str) -> str:
    """The tracker's names begin with the class of the model ('Global' being everything): make them the model's own."""
    return '' if name in ('Global', root) else name.removeprefix(f'{root}.')


def _num_images(arguments: tuple) -> int:
    """Images of an input: the length of a detector's list, or the first axis of the first tensor."""
    if arguments and isinstance(arguments[0], (list, tuple)):
        return len(arguments[0])
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    return tensors[0].shape[0] if tensors and tensors[0].dim() else 1


# Formulas for what FlopCounterMode does not know. In FLOPs, two a MAC, from the shapes of the arguments, as it wants.

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

    cat stack split unsafe_split unsafe_split_with_sizes unsafe_chunk _unsafe_view _reshape_alias repeat roll flip
    constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d im2col col2im
    pixel_shuffle pixel_unshuffle channel_shuffle clone copy _to_copy lift_fresh contiguous resize set resize_as
    empty_like zeros_like ones_like full_like new_empty new_empty_strided new_zeros new_ones new_full
    rand_like randn_like randint_like uniform normal bernoulli multinomial exponential
    _local_scalar_dense item _assert_async _assert_tensor_metadata is_same_size
""".split()) | frozenset(f'torchvision.{name}' for name in 'nms roi_align roi_pool ps_roi_align ps_roi_pool'.split())
