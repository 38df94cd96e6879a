"""Cost counting against closed forms that a reader can multiply out, and against known models.

Letters: B images, N tokens, D width, E experts, K chosen.
"""
import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry, register_flop_formula

from moe_zoo.analysis import CountError, count, count_images
from moe_zoo.analysis.count_cli import count_model
from moe_zoo.analysis.timing import peak_memory
from moe_zoo.layers import RoutedLayer


class Call(nn.Module):
    """A function as a model."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def macs(function, *inputs):
    """Executed MACs of a function or module; nothing may be left uncounted."""
    cost = count(function if isinstance(function, nn.Module) else Call(function), inputs)
    assert cost.uncounted == {}
    assert cost.macs_max == cost.macs_executed == cost.by_module['']
    assert sum(cost.by_operator.values()) == cost.macs_executed
    return cost.macs_executed


# Closed forms, one operator each.

@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_operators_against_closed_forms(device):
    def t(*shape):
        return torch.rand(*shape, device=device)

    # 2 images, 3 -> 8 channels, 5x5 kernel; 9x9 with stride 2 and padding 2 -> 5x5: 2 * 5*5 * 8 * 3*5*5
    assert macs(nn.Conv2d(3, 8, 5, 2, 2, device=device), t(2, 3, 9, 9)) == 2 * 25 * 8 * 75
    # groups: every output channel sees 6 / 3 = 2 inputs: 4*4 positions * 9 outputs * 2*3*3
    assert macs(nn.Conv2d(6, 9, 3, 1, 1, groups=3, device=device), t(1, 6, 4, 4)) == 16 * 9 * 18
    # transposed: every input position meets the whole kernel: 3*3 * (4 * 6 * 2*2)
    assert macs(nn.ConvTranspose2d(4, 6, 2, 2, device=device), t(1, 4, 3, 3)) == 9 * 96
    # linear on tokens, bias free: 2 * 5 * 7 * 11
    assert macs(nn.Linear(7, 11, device=device), t(2, 5, 7)) == 770
    # batched product: 4 * (2x3 @ 3x5)
    assert macs(torch.bmm, t(4, 2, 3), t(4, 3, 5)) == 4 * 30
    # matrix by vector 6 * 7, dot 7, outer product free (elementwise)
    assert macs(torch.mv, t(6, 7), t(7)) == 42
    assert macs(torch.dot, t(7), t(7)) == 7
    assert macs(torch.outer, t(6), t(7)) == 0
    # einsum of two: a batched product, 2 * 3 * 4 * 5
    assert macs(lambda a, b: torch.einsum('bij,bjk->bik', a, b), t(2, 3, 4), t(2, 4, 5)) == 120
    # distances of 3 to 5 points of 4 coordinates in 2 sets
    assert macs(torch.cdist, t(2, 3, 4), t(2, 5, 4)) == 2 * 3 * 5 * 4
    # bilinear form, 6 rows: 5 outputs, 3x4 matrix each, then the remaining 4
    assert macs(nn.Bilinear(3, 4, 5, device=device), t(6, 3), t(6, 4)) == 6 * 5 * (3 * 4 + 4)
    # one LSTM layer, 3 steps of 2 rows: 4 gates of width 5 from 4 inputs and 5 hidden, both directions
    assert macs(nn.LSTM(4, 5, bidirectional=True, device=device), t(3, 2, 4)) == 2 * 3 * 2 * 20 * (4 + 5)
    # deformable convolution: as the plain one on its 4x4 outputs: 16 * 8 * 4*3*3
    assert macs(torchvision.ops.deform_conv2d, t(1, 4, 6, 6), t(1, 18, 4, 4), t(8, 4, 3, 3)) == 16 * 8 * 36


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_attention_counts_both_products(device):
    q = torch.rand(2, 3, 5, 4, device=device)  # 2 images, 3 heads, 5 tokens, 4 channels a head
    assert macs(F.scaled_dot_product_attention, q, q, q) == 2 * 3 * (5 * 5 * 4) * 2
    assert set(count(Call(F.scaled_dot_product_attention), (q, q, q)).by_operator) == {'aten.bmm'}
    # 8 channels, 5 tokens of 2 images. in 5*8*24, out 5*8*8, two products of 2 heads 5*5*4, an image; the fast path of
    # nn.MultiheadAttention in evaluation mode would hide the products
    x = torch.rand(2, 5, 8, device=device)
    attention = nn.MultiheadAttention(8, 2, batch_first=True, device=device).eval()
    assert macs(attention, x, x, x) == 2 * (960 + 320 + 2 * 2 * 100)
    # a whole encoder layer (a fast path of its own): attention as above, and an MLP of hidden width 16
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, device=device).eval()
    assert macs(layer, x) == 2 * (960 + 320 + 400 + 2 * 5 * 8 * 16)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_model_that_insists_on_a_fused_kernel_is_counted_all_the_same():
    def attention(q):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, q, q)

    q = torch.rand(2, 3, 5, 4)
    assert macs(attention, q) == 2 * 3 * (5 * 5 * 4) * 2
    assert set(count(Call(attention), q).by_operator) == {'aten._scaled_dot_product_flash_attention_for_cpu'}


def test_inference_mode_inside_a_model_changes_nothing():
    def forward(x, weight):  # composite operators reach the counter whole here
        with torch.inference_mode():
            return F.dropout(F.scaled_dot_product_attention(*[F.linear(x, weight) @ weight] * 3), training=False)

    # 2 images, 1 head, 5 tokens of 4: two products with a 4 x 4 matrix, then the two of attention
    assert macs(forward, torch.rand(2, 1, 5, 4), torch.rand(4, 4)) == 2 * (2 * 5 * 4 * 4 + 2 * 5 * 5 * 4)


def test_a_convolution_per_image_costs_one_convolution_per_image():
    # B images folded into groups, each with its own kernel: B * 4*4 positions * 6 outputs * 3*3*3
    x, kernels = torch.rand(5, 3, 4, 4), torch.rand(5 * 6, 3, 3, 3)
    assert macs(lambda x, w: F.conv2d(x.view(1, 15, 4, 4), w, padding=1, groups=5), x, kernels) == 5 * 16 * 6 * 27


def test_grouped_matrix_product_counts_every_row_once():
    ends = torch.tensor([4, 16], dtype=torch.int32)
    a, b = torch.rand(16, 8), torch.rand(2, 8, 12)
    assert macs(lambda a, b: F.grouped_mm(a, b, offs=ends), a, b) == 16 * 8 * 12
    assert macs(lambda a, b: F.grouped_mm(a, b), torch.rand(2, 4, 8), b) == 2 * 4 * 8 * 12


def test_moving_normalising_and_pooling_are_free():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Hardswish(), nn.MaxPool2d(2), nn.PReLU(), nn.GroupNorm(2, 4),
                          nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LayerNorm(16))
    assert macs(model, torch.rand(2, 4, 8, 8)) == 0
    rows, order = torch.rand(6, 4), torch.tensor([5, 0, 0])
    assert macs(lambda x, i: x.index_add(0, i, x[i]).gather(0, x.argsort(0)).cumsum(0).topk(2).values, rows, order) == 0


# What was not counted.

@pytest.fixture(scope='module')
def planted():
    """An operator with a matrix product inside, which no counter knows."""
    @torch.library.custom_op('moe_zoo_test::opaque', mutates_args=())
    def opaque(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight

    return torch.ops.moe_zoo_test.opaque


class Planted(nn.Module):
    def __init__(self, op):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.hidden = Call(lambda x: op(x, torch.eye(4)))

    def forward(self, x):
        return torch.fft.rfft(self.hidden(self.first(x)))


def test_an_unknown_operator_is_named_with_its_module(planted):
    cost = count(Planted(planted), torch.rand(3, 4))
    assert cost.macs_executed == 3 * 4 * 4  # the linear layer alone
    assert cost.uncounted == {'moe_zoo_test.opaque': ('hidden',), 'aten._fft_r2c': ('',)}


def test_a_formula_registered_with_torch_is_used(planted):
    register_flop_formula(planted)(lambda x, weight, out_shape=None: 2 * math.prod(x) * weight[1])
    try:
        cost = count(Planted(planted), torch.rand(3, 4))
    finally:
        del flop_registry[planted]
    assert cost.macs_executed == 2 * 3 * 4 * 4
    assert cost.uncounted == {'aten._fft_r2c': ('',)}


# Parameters, modules, images, and the model left as it was.

def test_rows_by_module_add_up_and_follow_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.late = nn.Linear(6, 2)
            self.blocks = nn.ModuleList([nn.Linear(3, 6), nn.Linear(6, 6)])  # never called itself

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.late(x)

    cost = count(Model(), torch.rand(4, 3))
    assert list(cost.by_module.items()) == [
        ('', 4 * (18 + 36 + 12)), ('late', 48), ('blocks', 4 * 54), ('blocks.0', 72), ('blocks.1', 144)]
    assert cost.by_module_max == cost.by_module
    assert cost.by_operator == {'aten.addmm': 264}
    assert (cost.images, cost.parameters, cost.active_parameters) == (4, 14 + 24 + 42, 80)


def test_the_model_is_left_as_it_was_even_when_it_fails():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), Tokens())
    model[0].weight.requires_grad_(False)
    model[1].eval()
    for x in (torch.rand(2, 3), torch.rand(2, 4)):
        if x.shape[1] == 3:
            count(model, x)
        else:
            with pytest.raises(CountError, match='cannot be multiplied'):
                count(model, x)
        assert [m.training for m in model.modules()] == [True, True, False, True, True]
        assert [p.requires_grad for p in model.parameters()] == [False, True, True]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert torch.backends.mha.get_fastpath_enabled()
        assert (model[0](torch.rand(2, 3))).requires_grad


class Tokens(nn.Module):
    """Hands a parameter to a module, as class-attention models do, and holds a routed layer."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 3))
        self.inner = nn.Identity()

    def forward(self, x):
        return x + self.inner(self.token)


# Routed layers.

class Switch(RoutedLayer):
    """Two of four linear experts for a row; capacity drops whatever is beyond `capacity` rows an expert."""

    def __init__(self, width, num_experts=4, num_selected=2, capacity=None):
        super().__init__()
        self.num_experts, self.num_selected, self.capacity = num_experts, num_selected, capacity
        self.router = nn.Linear(width, num_experts, bias=False)
        self.weight = nn.Parameter(torch.rand(num_experts, width, width))

    def expert_parameters(self):
        return [[self.weight]]

    def max_macs(self, input_shape):
        rows, width = math.prod(input_shape[:-1]), input_shape[-1]
        return rows * width * (self.num_experts + self.num_selected * width)

    def forward(self, x):
        if x.is_meta:  # shape-static: every expert on everything
            return sum(self.router(x)[..., :1] * (x @ w) for w in self.weight.unbind())
        chosen = self.router(x).topk(self.num_selected).indices
        out = torch.zeros_like(x)
        for e, weight in enumerate(self.weight.unbind()):
            rows = (chosen == e).any(-1).nonzero().squeeze(-1)[:self.capacity]
            out[rows] += x[rows] @ weight
        return out


def test_at_most_is_router_and_k_experts_whatever_path_runs():
    # width 3, 10 rows: router 10*3*4, an expert 3*3 a row. at most 2 a row: 120 + 180; the linear layer before 10*3*3
    model = nn.Sequential(nn.Linear(3, 3), Switch(3))
    cost = count(model, torch.rand(10, 3))
    assert cost.macs_max == cost.macs_executed == 90 + 300
    assert cost.by_module_max == {'': 390, '0': 90, '1': 300}  # the inside of a routed layer is its own affair
    assert cost.by_module == {'': 390, '0': 90, '1': 300, '1.router': 120}
    # the static path runs all four experts and the router once for each
    cost = count(model.to('meta'), torch.empty(10, 3, device='meta'))
    assert cost.macs_max == 390
    assert cost.macs_executed == 90 + 4 * (120 + 90)
    # linear 12, router 12 and 2 of 4 experts of 9
    assert (cost.parameters, cost.active_parameters) == (12 + 12 + 36, 12 + 12 + 18)


def test_capacity_drops_show_in_executed_only():
    # One row an expert, four experts: at least two of them are chosen, so 2 to 4 of 20 pairs of 9 MACs run.
    cost = count(Switch(3, capacity=1), torch.rand(10, 3))
    assert cost.macs_max == 120 + 20 * 9
    assert 120 + 2 * 9 <= cost.macs_executed <= 120 + 4 * 9
    assert cost.by_module_max == {'': 300}


def test_every_call_of_a_shared_layer_counts_and_parameters_count_once():
    layer = Switch(3)
    model = Call(lambda x: layer(layer(x)))
    model.layer = layer
    cost = count(model, torch.rand(10, 3))
    assert cost.macs_max == 2 * 300
    assert (cost.parameters, cost.active_parameters) == (48, 30)


def test_a_routed_layer_inside_another_is_covered_by_the_outer_bound():
    class Outer(Switch):
        def __init__(self):
            super().__init__(3)
            self.inner = Switch(3, capacity=1)

        def max_macs(self, input_shape):
            return 7

        def forward(self, x):
            return self.inner(x)

    cost = count(nn.Sequential(Outer()), torch.rand(10, 3))
    assert cost.macs_max == 7 and 120 < cost.macs_executed < 300


def test_images_are_counted_one_at_a_time():
    costs = count_images(nn.Conv2d(1, 1, 1), (torch.rand(1, 1, 1, n) for n in (2, 4, 9)))
    assert costs.executed == costs.at_most == (2, 4, 9)
    assert costs.mean == 5
    assert costs.by_module == costs.by_module_max == {'': 5}
    assert costs.std == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert count_images(nn.Conv2d(1, 1, 1), [torch.rand(1, 1, 1, 3)]).std == 0


# Activations, memory, and models of other houses.

def test_activations_are_what_products_and_convolutions_put_out():
    # 3x3 map of 8 channels: 72; 8 -> 5 on the pooled vector: 5. Norm, activation and pool put out nothing that counts.
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    cost = count(model, torch.rand(2, 3, 5, 5))
    assert cost.activations == 2 * (72 + 5)
    assert cost.activations_by_module == {'': 154, '0': 144, '5': 10}
    assert cost.activations_by_operator == {'aten.convolution': 144, 'aten.addmm': 10}
    assert cost.parameters_by_module == {'': 224 + 16 + 45, '0': 224, '1': 16, '5': 45}
    # attention, 3 heads: a 5x5 map of scores and 5x4 values out of each
    q = torch.rand(1, 3, 5, 4)
    assert count(Call(F.scaled_dot_product_attention), (q, q, q)).activations == 3 * (25 + 20)


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_peak_memory_by_hand(device):
    # float32. Parameters 3*4 + 4 + 4*2 + 2 = 26, input 5*3; at the activation the 5x4 it reads and the 5x4 it makes.
    x = torch.rand(5, 3, device=device)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(device)
    assert count(model, x).peak_memory == 4 * (26 + 15 + 20 + 20)
    # in place it makes none; the fullest moment is the last product, 5x4 in and 5x2 out
    model[1] = nn.ReLU(inplace=True)
    assert count(model, x).peak_memory == 4 * (26 + 15 + 20 + 10)
    # a view is not new; a buffer of 7 is there from the start
    model.register_buffer('numbers', torch.zeros(7, device=device))
    assert count(Call(lambda x: x.view(3, 5).t()[1:]), x).peak_memory == 4 * 15
    assert count(model, x).peak_memory == 4 * (26 + 15 + 20 + 10 + 7)


def test_peak_memory_is_that_of_fused_attention_where_the_model_has_it():
    q = torch.rand(1, 1, 256, 4)  # 1024 numbers; a map of scores would be 65,536
    cost = count(Call(F.scaled_dot_product_attention), (q, q, q))
    assert cost.by_operator == {'aten.bmm': 2 * 256 * 256 * 4}
    assert 4 * 2 * 1024 <= cost.peak_memory < 4 * 8 * 1024
    plain = count(Call(lambda q: (q @ q.mT).softmax(-1) @ q), q)
    assert plain.macs_executed == cost.macs_executed
    assert plain.peak_memory >= 4 * 2 * 65_536


def test_peak_memory_is_what_torchs_allocator_hands_out():
    model, x = timm.create_model('vit_tiny_patch16_224', depth=2, num_classes=9).eval(), torch.rand(2, 3, 224, 224)
    there = 4 * (sum(p.numel() for p in model.parameters()) + x.numel())
    with torch.no_grad():
        handed_out = peak_memory(lambda: model(x), 'cpu')  # seen by the profiler: kernels may take a little more
    assert 0.99 * handed_out <= count(model, x).peak_memory - there <= handed_out


class Encoder(nn.Module):
    """Keywords in, a dictionary out, as models of other libraries have it."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 2, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, pixel_values=None, output_hidden_states=False, return_dict=True):
        hidden = self.embed(pixel_values).flatten(2).transpose(1, 2)
        out = {'logits': self.head(hidden.mean(dim=1))}
        return {**out, 'hidden_states': (hidden,)} if output_hidden_states else out


def test_keywords_go_in_and_dictionaries_come_out():
    cost = count(Encoder(), {'pixel_values': torch.rand(2, 3, 6, 6), 'output_hidden_states': True})
    assert cost.images == 2
    assert cost.by_module == {'': 2 * (9 * 4 * 12 + 8), 'embed': 2 * 432, 'head': 2 * 8}


def test_models_of_torchvision():
    with torch.device('meta'):
        model = torchvision.models.vit_b_32(image_size=64)
    # 4 patches of 3*32*32 and a class token, D 768, 12 blocks: 12 D^2 a token and 2 N^2 D; the head
    blocks = 12 * (5 * 12 * 768 * 768 + 2 * 25 * 768)
    cost = count(model, torch.empty(1, 3, 64, 64, device='meta'))
    assert cost.macs_executed == 4 * 3072 * 768 + blocks + 768 * 1000
    assert cost.uncounted == {} and cost.parameters_by_expert == {}
    assert cost.parameters == cost.active_parameters == cost.used_parameters
    assert cost.macs_expected == cost.macs_max == cost.macs_executed


@pytest.mark.slow
def test_a_detector_of_torchvision():
    model = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    scenes = [torch.rand(3, 50, 60), torch.rand(3, 40, 30)]
    cost = count(model, (scenes,))
    assert cost.images == 2 and cost.uncounted == {}
    assert cost.macs_executed == 2 * count(model, [scenes[0]]).macs_executed  # all are resized to 320


def test_a_model_that_cannot_be_run_says_so_with_what_was_counted():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 5)
            self.second = nn.Linear(4, 2)

        def forward(self, x):
            return self.second(self.first(x))

    with pytest.raises(CountError) as failure:
        count(Broken(), torch.rand(2, 3))
    assert re.fullmatch(
        r"Broken cannot be run on \(2, 3\) and counted no further than 30 MACs, in module 'second': mat1 and mat2 .*",
        str(failure.value))
    assert failure.value.cost.by_module == {'': 30, 'first': 30}
    with pytest.raises(CountError, match=r'Call cannot be run on \(4,\), meta tensors, .* in the model itself'):
        count(Call(lambda x: x.nonzero()), torch.rand(4, device='meta'))


def test_figures_of_images_are_summed_up():
    costs = count_images(nn.Conv2d(1, 2, 1), (torch.rand(1, 1, 1, n) for n in (2, 4, 9)))
    assert costs.activations == (4, 8, 18) and costs.expected == costs.executed == (4, 8, 18)
    assert costs.peak_memory == tuple(4 * (4 + n + 2 * n) for n in (2, 4, 9))  # 2 weights and biases, input, output
    assert costs.used_parameters == (4, 4, 4)
    assert costs.by_operator == {'aten.convolution': 10}
    assert costs.spread() == pytest.approx((10, math.sqrt((36 + 4 + 64) / 2), 4, 18))
    assert costs.spread('activations').most == 18


# Known models.

KNOWN = {  # MACs of one 224 px image
    'resnet50': 4_089_184_256,
    'vit_small_patch16_224': 4_598_882_304,
    'tf_efficientnet_cc_b0_4e': 396_513_888,
}


@pytest.mark.parametrize('name', KNOWN)
def test_known_models_on_the_meta_device(name):
    cost = count_model(name)
    assert cost.macs_max == cost.macs_executed == KNOWN[name]
    assert cost.parameters == cost.active_parameters
    assert cost.uncounted == {}


def test_vit_small_by_hand():
    # 196 patches of 768 values to D 384; 12 blocks on N 197: qkv, out, MLP 4x = 12 D^2 a token, attention 2 N^2 D; head
    D, N = 384, 197
    blocks = 12 * (N * 12 * D * D + 2 * N * N * D)
    assert count_model('vit_small_patch16_224').macs_max == 196 * 768 * D + blocks + D * 1000


def test_a_batch_costs_its_images_and_features_cost_no_classifier():
    x = torch.empty(2, 3, 224, 224, device='meta')
    cost = count(timm.create_model('tf_efficientnet_cc_b0_4e', device='meta'), x)
    assert (cost.images, cost.macs_executed) == (2, 2 * KNOWN['tf_efficientnet_cc_b0_4e'])
    features = count(timm.create_model('resnet50', features_only=True, device='meta'), x)
    assert features.macs_executed == 2 * (KNOWN['resnet50'] - 2048 * 1000)


# Our models.

@pytest.mark.parametrize('batch', [1, 3, 9])
def test_condconv_executes_what_it_may_whatever_the_path(batch):
    # 1x1 convolutions run as batched products, 3x3 as grouped convolutions, 8 images at a time.
    model = timm.create_model('condconv_mobilenetv1_025', num_experts=2)
    x = torch.rand(batch, 3, 32, 32)
    one = count(model, x[:1])
    assert one.macs_executed == one.macs_max
    # The classifier of a batch mixes 2 results instead of 2 matrices: 256 * 1000 fewer an image, 2 * 1000 more.
    fewer = batch * (256_000 - 2_000) if batch > 1 else 0
    for device in ('cpu', 'meta'):
        cost = count(model.to(device), x.to(device))
        assert (cost.macs_max, cost.macs_executed) == (batch * one.macs_max, batch * one.macs_max - fewer)


def small_vmoe(**keywords):
    return timm.create_model(
        'vmoe_vit_s', img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=2, representation_size=0,
        num_classes=5, **keywords).eval()


def test_vmoe_executes_at_most_in_evaluation_and_less_where_capacity_drops():
    x = torch.rand(3, 3, 64, 64)
    cost = count(small_vmoe(), x)
    assert cost.macs_executed == cost.macs_max  # by default nothing can be dropped
    # N 17, 3 images in one group, 2 routed blocks, an expert 2 * 32 * 128. Capacity 4 of 8 experts: at most 32 pairs
    # of 3 * 17 * 2 = 102 run in each block.
    tight = count(small_vmoe(capacity=4), x)
    assert tight.macs_max == cost.macs_max
    fewer = (tight.macs_max - tight.macs_executed) / (2 * 32 * 128)
    assert fewer.is_integer() and 2 * (102 - 32) <= fewer <= 2 * (102 - 2 * 4)


def test_vmoe_on_meta_pads_and_is_bounded_all_the_same():
    cpu, meta = small_vmoe(), small_vmoe(device='meta')
    x = torch.rand(3, 3, 64, 64)
    cost = count(meta, x.to('meta'))
    assert cost.macs_executed > cost.macs_max == count(cpu, x).macs_max


def test_shared_experts_are_paid_by_every_token():
    x = torch.empty(1, 3, 64, 64, device='meta')  # 16 patches and a class token, 2 routed blocks
    plain, shared = (count(small_vmoe(device='meta', num_shared_experts=n), x) for n in (0, 1))
    weights = 2 * 32 * 128
    assert shared.macs_max - plain.macs_max == 2 * 17 * weights
    assert shared.active_parameters - plain.active_parameters == 2 * (weights + 128 + 32)


def test_spread_over_images_under_capacity():
    torch.manual_seed(1)
    images = torch.rand(6, 1, 3, 64, 64) * torch.arange(6).view(6, 1, 1, 1, 1)
    costs = count_images(small_vmoe(capacity=4), images)
    assert len(costs.executed) == 6 and set(costs.at_most) == {count(small_vmoe(), images[0]).macs_max}
    assert min(costs.executed) < max(costs.executed) < costs.at_most[0]
    assert min(costs.executed) < costs.mean < max(costs.executed) and costs.std > 0
    assert costs.by_module[''] == costs.mean
    assert costs.by_module['blocks.3.mlp'] < costs.by_module_max['blocks.3.mlp']
    assert costs.by_module['blocks.2'] == costs.by_module_max['blocks.2']  # dense

