"""Ours beside fvcore's count: where they agree to the last MAC, and what is said where they do not."""
import types

import pytest
import timm
import torch
import torchvision
from fvcore.nn import ActivationCountAnalysis
from torch import nn
from torch.nn import functional as F

from moe_zoo.analysis import check_with_fvcore, count
from moe_zoo.errors import InputError


def compared(model, *inputs):
    """The rows by operator; what we count is in them to the last MAC."""
    rows = check_with_fvcore(model, inputs)
    assert sum(row.ours for row in rows) == count(model, inputs).macs_executed
    return {row.operator: row for row in rows}


def test_a_convolutional_network_agrees_and_what_is_free_is_named():
    rows = compared(timm.create_model('resnet50'), torch.rand(1, 3, 64, 64))
    for operator in ('convolution', 'matrix product'):
        assert rows[operator].ours == rows[operator].fvcore > 0 and rows[operator].why == ''
    assert rows['matrix product'].ours == 2048 * 1000
    assert rows['batch_norm'].ours == 0 < rows['batch_norm'].fvcore
    assert rows['batch_norm'].why == 'normalisation is free by our convention'
    assert rows['adaptive_avg_pool2d'].why == 'pooling is free by our convention'
    assert all(row.explained for row in rows.values())


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        return F.scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1))


def test_attention_is_the_named_difference():
    x = torch.rand(2, 5, 8)
    rows = compared(Attention(), x)
    # 5 tokens of 8 in 2 images: to 24; then scores and values, 5*5*8 each
    assert (rows['matrix product'].ours, rows['matrix product'].fvcore) == (2 * 5 * 8 * 24,) * 2
    assert (rows['attention'].ours, rows['attention'].fvcore) == (2 * 2 * 200, 0)
    assert rows['attention'].why == 'fvcore passes over it; its closed form is ours' and rows['attention'].explained
    # one that returns its weights is made of plain products, one that does not calls the same operator
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    for need, missed in ((True, 0), (False, 2 * 400)):
        rows = compared(Need(layer, need), x)
        assert sum(row.ours - row.fvcore for row in rows.values()) == missed
        assert all(row.explained for row in rows.values())


class Need(nn.Module):
    def __init__(self, attention, need_weights):
        super().__init__()
        self.attention, self.need_weights = attention, need_weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class Deformed(nn.Module):
    def __init__(self):
        super().__init__()
        self.offset = nn.Conv2d(4, 18, 3, padding=1)
        self.conv = torchvision.ops.DeformConv2d(4, 8, 3, padding=1)

    def forward(self, x):
        return self.conv(x, self.offset(x))


def test_deformable_convolution_is_a_named_difference():
    rows = compared(Deformed(), torch.rand(1, 4, 6, 6))
    assert rows['convolution'].ours == rows['convolution'].fvcore == 36 * 18 * 36
    assert (rows['deformable convolution'].ours, rows['deformable convolution'].fvcore) == (36 * 8 * 36, 0)
    assert rows['deformable convolution'].explained


def test_products_that_fvcore_passes_over_are_named():
    class Model(nn.Module):
        def forward(self, a, b):
            return torch.baddbmm(a, a, b), torch.mv(a[0], b[0, 0])

    row = compared(Model(), torch.rand(2, 3, 3), torch.rand(2, 3, 3))['matrix product']
    assert (row.ours, row.fvcore) == (2 * 27 + 9, 0)
    assert row.why == 'fvcore passes over aten::baddbmm (1 x), aten::mv (1 x)'


slow = pytest.mark.slow


@pytest.mark.parametrize(('name', 'keywords', 'size'), [
    ('resnet18', {}, 64),
    pytest.param('condconv_resnet18', dict(num_experts=2), 64, marks=slow),
    pytest.param('vit_tiny_patch16_224', {}, 224, marks=slow),
    pytest.param('mobilenetv3_small_050', {}, 64, marks=slow),
    pytest.param('convnext_atto', {}, 64, marks=slow),
    pytest.param('resmlp_12_224', {}, 224, marks=slow),
    pytest.param('condconv_efficientnet_b0', dict(num_experts=2), 64, marks=slow),
    pytest.param('dyconv_resnet18', {}, 64, marks=slow),
    pytest.param('deepmoe_resnet18', {}, 64, marks=slow),
    pytest.param('pmoe_cnn', {}, 84, marks=slow),
])
def test_models_agree_but_for_what_is_named(name, keywords, size):
    model = timm.create_model(name, **keywords)
    x = torch.rand(2, model.default_cfg['input_size'][0], size, size)
    rows = compared(model, x)
    for operator in ('convolution', 'matrix product'):
        assert operator not in rows or rows[operator].ours == rows[operator].fvcore
    assert all(row.explained for row in rows.values())
    made = ActivationCountAnalysis(model, x).unsupported_ops_warnings(False)
    with torch.no_grad():  # with gradients kernels are mixed by a function that a trace does not look into
        made.total()  # which it keeps
    if 'attention' not in rows:  # which puts out scores, too
        assert count(model, x).activations == made.total()


def test_what_nothing_explains_says_so(monkeypatch):
    from moe_zoo.analysis import cost_check
    monkeypatch.setattr(cost_check, 'PRODUCTS', cost_check.PRODUCTS - {'linear'})
    rows = {row.operator: row for row in check_with_fvcore(nn.Linear(3, 4), torch.rand(2, 3))}
    assert rows['matrix product'].why == 'no cause is known' and not rows['matrix product'].explained


def test_routed_layers_are_compared_on_their_padded_path():
    model = timm.create_model(
        'vmoe_vit_s', img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, representation_size=0,
        num_classes=5)
    x = torch.rand(2, 3, 64, 64)
    rows = {row.operator: row for row in check_with_fvcore(model, x)}
    assert rows['matrix product'].ours == pytest.approx(rows['matrix product'].fvcore, rel=1e-3)
    assert rows['matrix product'].why == 'both on the padded path of the routed layers'
    assert not next(model.parameters()).is_meta


def test_a_model_that_fvcore_cannot_trace_says_so_with_our_count():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            return {'logits': self.fc(x) if float(x.sum()) > 0 else None, 'words': types.SimpleNamespace()}

    with pytest.raises(InputError, match=r'^fvcore cannot trace Words, of which 24 MACs were counted: '):
        check_with_fvcore(Words(), torch.rand(2, 3))
