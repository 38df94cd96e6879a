"""Known answers: the parameters and MACs that the fact sheets of the papers state, as they print them.

A figure is given with the digits of its source, computed or read there (recalled ones are not tested), and holds to
half a unit of its last digit; '~' stands where the source cut or rounded up, and allows a whole one. Everything is
counted on meta tensors. What needs a network taken apart stands beside its family: the groups of pMoE and the hidden
units of its small networks (test_pmoe_models.py), the halved stage of balanced CNNs (test_moe_resnet.py), DeepMoE's
identity of sparse cost (test_deep_moe.py), one position of Shazeer's layer (test_hierarchical_moe.py).

Letters: C channels, E experts, R mixed elements (weights and biases), N tokens, D width.
"""
import functools

import pytest
import timm
import torch
from torch import nn

import moe_zoo
from moe_zoo.analysis import Cost, count
from moe_zoo.analysis.count_cli import count_model
from moe_zoo.layers import MoEMlp, SituationalFusion
from moe_zoo.layers.cond_conv import CondConv2d, CondLinear
from moe_zoo.layers.deep_moe import ChannelGate

cost = functools.lru_cache(maxsize=None)(count_model)
META = torch.device('meta')
UNITS = {'': 1, 'M': 1e6, 'G': 1e9, '%': 1}


def agrees(found: float, figure: str) -> bool:
    """Whether a number is what a printed figure such as '57.00 M', '26.9 %' or '1,814,073,344' says."""
    number, _, unit = figure.lstrip('~').partition(' ')
    decimals = len(number.partition('.')[2])
    last_digit = UNITS[unit] / 10 ** decimals
    allowed = last_digit * (1 if figure.startswith('~') else 0.5)
    return abs(found - float(number.replace(',', '')) * UNITS[unit]) <= allowed * (1 + 1e-9)


def test_a_figure_holds_to_its_last_digit():
    assert agrees(57.004e6, '57.00 M') and not agrees(57.006e6, '57.00 M') and agrees(57.006e6, '~57.00 M')
    assert agrees(26.94, '26.9 %') and not agrees(26.96, '26.9 %')
    assert agrees(1_234, '1,234') and not agrees(1_235, '1,234')


# Whole models: name, keywords, parameters, active parameters, MACs; None is not stated. 1000 classes, 224 pixels.

CONDCONV = [  # condconv.md, "Numbers to check against"; MACs by mixing kernels
    ('resnet50', {}, '25,557,032', '4,089,184,256'),
    ('condconv_resnet50', dict(num_experts=4), '70,267,888', '4,148,789,152'),
    ('condconv_resnet50', {}, '129,872,800', '4,208,394,048'),
    ('condconv_resnet50', dict(num_experts=4, cond_fc=False), '64,112,692', '4,140,584,960'),
    ('condconv_resnet50', dict(cond_fc=False), '115,513,408', '4,191,985,664'),
    ('condconv_resnet18', {}, '81,353,120', '1,893,687,104'),
    ('condconv_resnet34', {}, '116,235,936', '3,771,688,768'),
    ('condconv_mobilenetv1_100', {}, '32,826,824', '601,413,952'),
    ('condconv_mobilenetv1_100', dict(num_experts=32), '130,847,840', '699,434,752'),
    ('condconv_mobilenetv1_050', dict(num_experts=32), '41,291,584', '190,743,040'),
    ('condconv_mobilenetv1_025', dict(num_experts=32), '14,624,816', '55,639,936'),
    ('condconv_mobilenetv2_100', {}, '27,457,768', '328,145,856'),
    ('condconv_mnasnet_a1', {}, '14,984,718', '324,261,184'),
    ('condconv_efficientnet_b0', dict(num_experts=4), '13,314,116', '396,513,888'),
    ('condconv_efficientnet_b0', {}, '24,013,284', '407,213,024'),
    ('tf_efficientnet_cc_b0_4e', {}, '13,314,116', '396,513,888'),  # timm's own
    ('tf_efficientnet_cc_b0_8e', {}, '24,013,284', '407,213,024'),
    ('tf_efficientnet_cc_b1_8e', {}, '39,715,968', None),
    # section 2: where mixing starts in MobileNetV1 and V2 (block 7, the last 6 blocks), and V2 of half the width
    ('condconv_mobilenetv1_100', dict(start_block=7), None, '600.3 M'),
    ('condconv_mobilenetv2_100', dict(start_block=6), '27.56 M', '328.3 M'),
    ('condconv_mobilenetv2_100', dict(start_block=12, cond_head=False), '22.9 M', '323 M'),
    ('condconv_mobilenetv2_100', dict(width=0.5), '15.51 M', None),
    # sections 4 and 6, read: parameters of the authors' README and of FDConv's tables
    ('tf_efficientnet_b0', {}, '5.3 M', None),
    ('efficientnet_b1', {}, '7.8 M', None),
    # section 5: by the first mixed block, 1 to 13; 14 leaves the classifier; then nothing is mixed
    *[('condconv_mobilenetv1_025', dict(num_experts=32, start_block=start), None, macs) for start, macs in [
        (1, '55.94 M'), (3, '55.91 M'), (5, '55.79 M'), (6, '55.64 M'), (7, '55.36 M'), (13, '51.44 M'),
        (14, '49.26 M')]],
    ('condconv_mobilenetv1_025', dict(start_block=14, cond_fc=False), None, '41.03 M'),
]
DYNAMIC = [  # dynamic_conv.md: 4 kernels, reduction 4
    ('resnet18', {}, '11.690 M', '1,814.1 M'),
    ('dyconv_resnet18', {}, '45.47 M', '1,859.0 M'),
    ('dyconv_resnet50', {}, '100.878 M', '4,187.9 M'),
    ('dyconv_mobilenetv2_100', dict(dynamic_head=True), '12.40 M', '311.9 M'),
    ('dyconv_mobilenetv2_100', {}, '11.15 M', '310.2 M'),  # bottlenecks only
    ('dyconv_mobilenetv2_050', dict(dynamic_head=True), '4.57 M', '100.4 M'),
    ('dyconv_mobilenetv2_050', {}, '3.95 M', '99.6 M'),
    ('dyconv_resnet18', dict(dynamic_downsample=False), '44.93 M', None),
    ('dyconv_resnet50', dict(dynamic_downsample=False), '92.22 M', None),
]
CIFAR = 'deepmoe_resnet{}_cifar_dense'
DENSE = [  # deepmoe.md: the dense networks
    ('resnet18', {}, '11,689,512', '1,814.07 M'),
    ('resnet34', {}, '21,797,672', '3,663.76 M'),
    ('resnet50', {}, '25,557,032', '4,089.18 M'),
    (CIFAR.format(56), dict(layers=(3, 3, 3)), '272,474', '40.81 M'),  # ResNet-20
    (CIFAR.format(56), dict(layers=(5, 5, 5)), '466,906', '69.12 M'),  # ResNet-32
    (CIFAR.format(56), {}, '855,770', '125.75 M'),
    (CIFAR.format(110), {}, '1,730,714', '253,149,824'),
    ('deepmoe_vgg16_cifar_dense', {}, '14,724,042', '313,201,664'),  # which it does not state
]


# What takes longest to build and to count, beside relatives that do not.
LONG = {'tf_efficientnet_cc_b1_8e', 'dyconv_mobilenetv2_100', 'deepmoe_resnet110_cifar', 'vmoe_vit_l', 'vmoe_vit_h'}


def cases(table) -> list:
    """Rows with a name each; those that take long, and most starts of mixing, run with the slow tests."""
    params = []
    for case in table:
        name, keywords = case[:2]
        slow = name in LONG or keywords.get('start_block', 14) < 13
        words = '-'.join([name, *(f'{key}={value}' for key, value in keywords.items())])
        params.append(pytest.param(case, id=words, marks=[pytest.mark.slow] * slow))
    return params


@pytest.mark.parametrize('case', cases([*CONDCONV, *DYNAMIC, *DENSE]))
def test_models_without_choice_cost_what_the_sheets_say(case):
    name, keywords, parameters, macs = case
    found = cost(name, **keywords)
    assert parameters is None or agrees(found.parameters, parameters), found.parameters
    assert macs is None or agrees(found.macs_max, macs), found.macs_max
    # every kernel is mixed, and runs
    assert (found.active_parameters, found.macs_executed, found.uncounted) == (found.parameters, found.macs_max, {})


# vmoe.md, section 6: parameters, active parameters, MACs at exactly K = 2 of 8 experts; then what a closed form needs,
# (patch, D, blocks, of which routed, classes, image size, width of the pre-logits)
VMOE = [
    ('vmoe_vit_s', {}, '56,999,400', '31.80 M', '1.57 G', (32, 512, 8, 2, 1000, 224, 512)),
    ('vmoe_vit_s', dict(representation_size=0), '56.79 M', '31.59 M', '4.66 G', (32, 512, 8, 2, 1000, 384, 0)),
    ('vmoe_vit_s', dict(moe_layers='every_2'), '86.40 M', '36.01 M', '1.78 G', (32, 512, 8, 4, 1000, 224, 512)),
    ('vmoe_vit_b', dict(patch_size=32, moe_layers='last_2', representation_size=768),
     '154.94 M', '98.27 M', '4.88 G', (32, 768, 12, 2, 1000, 224, 768)),
    ('vmoe_vit_b', dict(patch_size=32, representation_size=768),
     '287.19 M', '117.19 M', '5.83 G', (32, 768, 12, 6, 1000, 224, 768)),
    ('vmoe_vit_b', dict(num_classes=21843), '300.97 M', '130.97 M', '23.16 G', (16, 768, 12, 6, 21843, 224, 0)),
    ('vmoe_vit_b', {}, '285.24 M', '115.23 M', '71.84 G', (16, 768, 12, 6, 1000, 384, 0)),
    ('vmoe_vit_l', dict(moe_layers='last_2'), '421.86 M', '321.13 M', '64.86 G', (16, 1024, 24, 2, 1000, 224, 0)),
    ('vmoe_vit_l', {}, '1009.50 M', '405.15 M', '~81.41 G', (16, 1024, 24, 12, 1000, 224, 0)),
    ('vmoe_vit_h', {}, '1091.07 M', '697.66 M', '184.15 G', (14, 1280, 32, 5, 1000, 224, 0)),
]


@pytest.mark.parametrize('case', cases(VMOE))
def test_v_moe_costs_what_its_sheet_and_the_closed_form_say(case):
    name, keywords, parameters, active, macs, (P, D, blocks, routed, classes, size, R) = case
    found = cost(name, (size, size), **keywords)
    assert agrees(found.parameters, parameters) and agrees(found.active_parameters, active)
    N = (size // P) ** 2 + 1
    patches = (N - 1) * 3 * P * P * D
    attention = blocks * (4 * N * D * D + 2 * N * N * D)
    mlps = (blocks - routed + 2 * routed) * N * 8 * D * D  # hidden width 4 D; 2 experts in a routed block
    routers = routed * N * D * 8
    head = R * D + (R or D) * classes
    assert found.macs_max == patches + attention + mlps + routers + head
    assert agrees(found.macs_max, macs) and not found.uncounted


# DeepMoE: the widened networks alone, without embedding and gates, which its sheet counts apart.

WIDENED = [  # deepmoe.md; with gated channels, in a basic block of twice the inner width 3/2 of those of a plain one
    ('deepmoe_narrow_resnet18', {}, '11,689,512', '1,814.07 M', 3_840),
    ('deepmoe_narrow_resnet34', {}, '21,797,672', '3,663.76 M', 7_552),
    ('deepmoe_narrow_resnet50', {}, '25,557,032', '4,089.18 M', 7_552),
    ('deepmoe_narrow_resnet50', dict(bottleneck='B'), '25,557,032', '4,089.18 M', 3_776),
    ('deepmoe_resnet50', {}, '68,883,240', '11,398.02 M', 15_104),
    ('deepmoe_resnet18', dict(widen='all'), '45,618,216', '6,695.71 M', 7_680),
    ('deepmoe_resnet34', dict(widen='all'), '86,036,008', '14,094.46 M', 15_104),
    ('deepmoe_resnet50', dict(widen='all'), '97,953,576', '15,870.15 M', 15_104),
    ('deepmoe_resnet56_cifar', dict(width=1), '855,770', '125.75 M', 2_016),
    ('deepmoe_resnet110_cifar', dict(width=1), '1,730,714', '253.15 M', 4_032),
    ('deepmoe_resnet56_cifar', dict(layers=(3, 3, 3)), '540,410', '80.92 M', 1_008),  # ResNet-20, inner channels twice
    ('deepmoe_resnet56_cifar', dict(layers=(5, 5, 5)), '928,826', '137.54 M', 1_680),  # ResNet-32
    ('deepmoe_resnet56_cifar', {}, '1,705,658', '250.79 M', 3_024),
    ('deepmoe_resnet110_cifar', {}, '3,453,530', '505.59 M', 6_048),
    # two that it does not state; 12 convolutions of VGG-16 after the stem, 64 + 2 * 128 + 3 * 256 + 6 * 512 channels
    ('deepmoe_resnet18', {}, '22,678,824', '3,490,353,152', 5_760),
    ('deepmoe_vgg16_cifar', dict(width=1), '14,724,042', '313,201,664', 4_160),
]


@pytest.mark.parametrize('case', cases(WIDENED))
def test_gated_networks_cost_what_the_sheet_says(case):
    name, keywords, parameters, macs, gated = case
    model = timm.create_model(name, device=META, **keywords)
    gates = [module for module in model.modules() if isinstance(module, ChannelGate)]
    found = count(model, torch.empty(1, *model.default_cfg['input_size'], device=META))
    weights = sum(size(gate) for gate in gates)  # of linear maps without bias, a MAC each
    assert agrees(found.parameters - size(model.embedding) - weights, parameters)
    assert agrees(found.macs_max - found.by_module['embedding'] - weights, macs)
    assert weights == gated * model.num_classes
    assert (found.active_parameters, found.macs_executed, found.uncounted) == (found.parameters, found.macs_max, {})


EMBEDDINGS = [  # deepmoe.md; the first and the last are the defaults
    ('deepmoe_narrow_resnet18', {}, '4,462,248', '413.98 M'),
    ('deepmoe_narrow_resnet18', dict(embed_stem=0, embed_widths=(64, 64, 128, 256, 512)), '2,101,928', '311.20 M'),
    ('deepmoe_narrow_resnet18', dict(embed_stem=0, embed_widths=(16, 32, 64, 128, 256)), '650,104', '63.48 M'),
    ('deepmoe_resnet110_cifar', {}, '410,826', '5.16 M'),
]


@pytest.mark.parametrize('case', cases(EMBEDDINGS))
def test_embedding_networks_cost_what_the_sheet_says(case):
    name, keywords, parameters, macs = case
    found = embedding(name, **keywords)
    assert agrees(found.parameters, parameters) and agrees(found.macs_max, macs)


@functools.lru_cache(maxsize=None)
def embedding(name: str, **keywords) -> Cost:
    model = timm.create_model(name, device=META, **keywords)
    return count(model.embedding, torch.empty(1, *model.default_cfg['input_size'], device=META))


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# Formulas of the sheets.

@pytest.mark.parametrize('name, dense, keywords, E, R', [  # condconv.md: base networks, experts, R
    ('condconv_resnet50', 'resnet50', {}, 8, 14_894_056),
    ('condconv_resnet50', 'resnet50', dict(num_experts=4), 4, 14_894_056),
    ('condconv_resnet50', 'resnet50', dict(cond_fc=False), 8, 12_845_056),
    ('condconv_resnet18', 'resnet18', {}, 8, 9_950_184),
    ('condconv_resnet34', 'resnet34', {}, 8, 13_489_128),
    ('condconv_mobilenetv1_100', 'mobilenetv1_100', {}, 8, 4_078_824),
    ('condconv_mobilenetv1_050', None, dict(num_experts=32), 32, 1_286_248),
    ('condconv_mobilenetv1_025', None, dict(num_experts=32), 32, 455_208),
    ('condconv_mobilenetv2_100', 'mobilenetv2_100', {}, 8, 3_418_792),
    ('condconv_mnasnet_a1', 'semnasnet_100', {}, 8, 1_584_480),
    ('condconv_efficientnet_b0', 'tf_efficientnet_b0', {}, 8, 2_673_600),
    ('condconv_efficientnet_lite0', 'tf_efficientnet_lite0', dict(num_experts=5), 5, None),
])
def test_condconv_follows_its_formulas(name, dense, keywords, E, R):
    """Parameters: base + (E - 1) R + C E + E a router; MACs: base + E R + C E a router."""
    model = timm.create_model(name, device=META, **keywords)
    mixed = sum(p.numel() for module in model.modules() if isinstance(module, (CondConv2d, CondLinear))
                for p in module.parameters(recurse=False)) // E
    routers = [module.in_features for module in model.modules() if hasattr(module, 'mix')]
    base = cost(dense) if dense else cost(name, start_block=14, cond_fc=False)  # which mixes nothing
    found = cost(name, **keywords)
    assert mixed == R or R is None
    assert found.parameters == base.parameters + (E - 1) * mixed + sum(C * E + E for C in routers)
    assert found.macs_max == base.macs_max + E * mixed + sum(C * E for C in routers)


def test_an_expert_more_of_condconv_costs_a_mac_a_parameter():
    four, eight = cost('condconv_resnet50', num_experts=4), cost('condconv_resnet50')
    biases = 4 * 4  # of four routers to four experts more, which are added and not multiplied
    assert eight.parameters - four.parameters - biases == eight.macs_max - four.macs_max


def test_every_3_x_3_convolution_of_a_small_resnet_mixed():
    """condconv.md, read in CondConv.MXNet, which counts the running statistics of the norms too."""
    def resnet20() -> nn.Module:
        return timm.create_model(CIFAR.format(56), layers=(3, 3, 3), device=META)

    statistics = sum(b.numel() for name, b in resnet20().named_buffers() if 'running' in name)
    assert agrees(size(resnet20()) + statistics, '274,042')
    for E, figure in ((4, '1,078,402'), (8, '2,150,026'), (16, '4,293,274'), (32, '8,579,770')):
        routed = moe_zoo.moefy(resnet20(), 'blocks.*.conv*', layer='condconv', num_experts=E)
        assert agrees(size(routed) + statistics, figure), E


def test_attention_of_a_dynamic_layer():
    # dynamic_conv.md: C h + h + h K + K parameters with h = C // 4. ResNet-18 has 19 such layers: four on 64 channels,
    # then in each stage two on the channels of the one before (one is the shortcut) and three on its own
    layers = 4 * [64] + 2 * [64] + 3 * [128] + 2 * [128] + 3 * [256] + 2 * [256] + 3 * [512]
    attention = sum(C * (C // 4) + C // 4 + C // 4 * 4 + 4 for C in layers)
    dense = timm.create_model('resnet18', device=META)
    kernels = size(dense) - size(dense.fc) - size(dense.conv1) - sum(
        size(module) for module in dense.modules() if isinstance(module, nn.BatchNorm2d))
    assert len(layers) == 19 and cost('dyconv_resnet18').parameters == size(dense) + 3 * kernels + attention


def macs(name: str, **keywords) -> int:
    return cost(name, **keywords).macs_max


def parameters(name: str, **keywords) -> int:
    return cost(name, **keywords).parameters


def percent_more(name: str, **keywords) -> float:
    """MACs of 32 experts beside those of the network in which nothing is mixed."""
    return 100 * (macs(name, num_experts=32, **keywords) / macs(name, start_block=14, cond_fc=False) - 1)


def with_squeeze_excitation() -> int:
    """MnasNet-A1 with its squeeze-and-excitation mixed as well, from 8: a MAC an element."""
    blocks = timm.create_model('semnasnet_100', device=META).blocks[4:7]
    return macs('condconv_mnasnet_a1') + 8 * sum(size(m) for name, m in blocks.named_modules() if name.endswith('.se'))


def language_model(E: int, groups: int = 0) -> int:
    """Shazeer's: the layer of 512 -> 1024 -> 512 and two LSTMs of 512 units, without embedding and softmax."""
    router = dict(router='hierarchical', router_args=dict(num_groups=groups)) if groups else dict(router='shazeer')
    layer = MoEMlp(512, 1024, num_experts=E, num_selected=4, bias=False, device=META, **router)
    return size(layer) + size(nn.LSTM(512, 512, 2, bias=False, device=META))


def fusion(mode: str) -> Cost:
    """25 representations of 16 x 16 x 8, linear heads to 9 actions."""
    layer = SituationalFusion([16 * 16 * 8] * 25, 9, mode, device=META)
    maps = [torch.empty(1, 8, 16, 16, device=META) for _ in range(25)]
    return count(layer, (torch.empty(1, 3, 64, 64, device=META), maps))


V1_050, V1_100, B0 = 'condconv_mobilenetv1_050', 'condconv_mobilenetv1_100', 'condconv_efficientnet_b0'
FIGURES = {
    'condconv.md 2, ResNet-50: MACs that 8 experts add':
        ('119.2 M', lambda: macs('condconv_resnet50') - macs('resnet50')),
    'condconv.md 2, ResNet-50: parameters that they add to a backbone, computed':
        ('89.96 M', lambda: parameters('condconv_resnet50', cond_fc=False) - parameters('resnet50')),
    'condconv.md 2 and 6, the same, read in FDConv':
        ('90.0 M', lambda: parameters('condconv_resnet50', cond_fc=False) - parameters('resnet50')),
    'condconv.md 2, MnasNet-A1 with squeeze-and-excitation mixed': ('326.3 M', with_squeeze_excitation),
    'condconv.md 2, MobileNetV2 1.0x, read in the paper on dynamic convolution':
        ('27.5 M', lambda: parameters('condconv_mobilenetv2_100')),
    'condconv.md 4, EfficientNet-B0, 4 experts: README, 391 to 402 M (both rounded)':
        ('~11 M', lambda: macs(B0, num_experts=4) - macs('tf_efficientnet_b0')),
    'condconv.md 4, EfficientNet-B0, 8 experts: README, 391 to 413 M (both rounded)':
        ('~22 M', lambda: macs(B0) - macs('tf_efficientnet_b0')),
    'condconv.md 4, the same as counted here': ('21.4 M', lambda: macs(B0) - macs('tf_efficientnet_b0')),
    'condconv.md 4, V1 0.5x, 32 experts, from block 7': ('26.9 %', lambda: percent_more(V1_050, start_block=7)),
    'condconv.md 4, V1 0.5x, 32 experts, from block 6': ('27.6 %', lambda: percent_more(V1_050)),
    'condconv.md 4, V1 1.0x, 32 experts, from block 7': ('22.2 %', lambda: percent_more(V1_100, start_block=7)),
    'condconv.md 4, V1 1.0x, 32 experts, from block 6': ('23.0 %', lambda: percent_more(V1_100)),
    'dynamic_conv.md, ResNet-50: parameters that 4 kernels add, read in FDConv':
        ('75.3 M', lambda: parameters('dyconv_resnet50') - parameters('resnet50')),
    'dynamic_conv.md, MobileNetV2 1.0x with 4 kernels, read':
        ('~11.1 M', lambda: parameters('dyconv_mobilenetv2_100')),
    'dynamic_conv.md, MobileNetV2 0.5x with 4 kernels, read':
        ('~4.0 M', lambda: parameters('dyconv_mobilenetv2_050')),
    'deepmoe.md, gate weights of the widened ResNet-50, e of 1000':
        ('15,104,000', lambda: gate_weights('deepmoe_resnet50')),
    'deepmoe.md, the same, e of 128': ('1,933,312', lambda: gate_weights('deepmoe_resnet50', embed_dim=128)),
    'deepmoe.md, embedding beside CIFAR ResNet-110':
        ('2.04 %', lambda: 100 * embedding('deepmoe_resnet110_cifar').macs_max / macs(CIFAR.format(110))),
    'deepmoe.md, embedding beside ResNet-50':
        ('10.1 %', lambda: 100 * embedding('deepmoe_narrow_resnet18').macs_max / macs('resnet50')),
    'deepmoe.md, embedding beside the widened ResNet-50': ('3.6 %', lambda: 100 * embedding(
        'deepmoe_narrow_resnet18').macs_max / 11_398.02e6),
    'deepmoe.md, embedding of 16 to 256 channels beside ResNet-50': ('1.6 %', lambda: 100 * embedding(
        *EMBEDDINGS[2][:1], **EMBEDDINGS[2][1]).macs_max / macs('resnet50')),
    'sparse_gate.md, language model with 32 experts, read': ('37.8 M', lambda: language_model(32)),
    'sparse_gate.md, 256 experts, read': ('272.9 M', lambda: language_model(256)),
    'sparse_gate.md, 1024 experts in 16 groups, read': ('1079.0 M', lambda: language_model(1024, 16)),
    'sparse_gate.md, 4096 experts in 16 groups, read': ('4303.4 M', lambda: language_model(4096, 16)),
    'situational_fusion.md, 51,200 values to one head of 9': (f'{51_200 * 9:,}', lambda: fusion('concat').macs_max),
    'situational_fusion.md, 25 heads of 9 on 2,048 values, with biases':
        (f'{25 * (2_048 + 1) * 9:,}', lambda: fusion('mean').parameters),
}


def gate_weights(name: str, **keywords) -> int:
    model = timm.create_model(name, device=META, **keywords)
    return sum(size(module) for module in model.modules() if isinstance(module, ChannelGate))


@pytest.mark.parametrize('words', FIGURES)
def test_differences_shares_and_layers_are_what_the_sheets_say(words):
    figure, compute = FIGURES[words]
    found = compute()
    assert agrees(found, figure), found


@pytest.mark.parametrize('name, dense', [
    ('condconv_mobilenetv1_100', 'mobilenetv1_100'), ('condconv_mobilenetv2_100', 'mobilenetv2_100'),
    ('condconv_mnasnet_a1', 'semnasnet_100'), ('condconv_resnet50', 'resnet50'), (B0, 'tf_efficientnet_b0')])
def test_eight_kernels_add_less_than_a_tenth(name, dense):
    """condconv.md 4, read: the overhead is below 10 % in all of the paper's main table."""
    assert 1 < macs(name) / macs(dense) < 1.1
