"""Any model of timm is counted whole: one small architecture of each of its model files, on meta tensors."""
import math
from collections import defaultdict

import pytest
import timm
import torch
from torch import nn

from moe_zoo.analysis import count
from moe_zoo.analysis.count_cli import build_model

SMALL = ('test_', 'femto', 'atto', 'zepto', 'pico', 'nano', 'tiny', '_xxs', '_xs', '_xxt', '_050', '_s_', 'small',
         '2d_s')


def families() -> dict[str, str]:
    """Model file of timm to one of its names: the shortest of those that sound smallest."""
    names = defaultdict(list)
    for name in timm.list_models():
        package, _, file = timm.models.model_entrypoint(name).__module__.rpartition('.')
        if package == 'timm.models':
            names[file].append(name)
    return {file: _smallest(each) for file, each in sorted(names.items())}


def _smallest(names: list[str]) -> str:
    for size in SMALL:
        found = [name for name in names if size in name]
        if found:
            return min(found, key=lambda name: (len(name), name))
    return min(names, key=lambda name: (len(name), name))


FAMILIES = families()


def layer_macs(model: nn.Module, x: torch.Tensor) -> int:
    """Products of convolutions and linear layers as layers, from what they put out; attention has none."""
    macs, handles = [0], []

    def add(layer: nn.Module, inputs: tuple, out: torch.Tensor) -> None:
        macs[0] += out.numel() * math.prod(layer.weight.shape[1:])

    for layer in model.modules():
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            handles.append(layer.register_forward_hook(add))
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return macs[0]


def test_there_are_families():
    assert len(FAMILIES) >= 80 and FAMILIES['resnet'] == 'test_resnet' and FAMILIES['deit'] == 'deit_tiny_patch16_224'


@pytest.mark.slow
@pytest.mark.parametrize('file', FAMILIES)
def test_a_model_of_every_file_is_counted_whole(file):
    model = build_model(FAMILIES[file], 'meta')
    x = torch.empty(1, *model.pretrained_cfg['input_size'], device='meta')
    cost = count(model, x)
    assert cost.uncounted == {}
    assert cost.macs_max == cost.macs_executed == sum(cost.by_operator.values())
    assert cost.parameters == cost.active_parameters == sum(p.numel() for p in model.parameters())
    # Layers are a lower bound; what comes on top is attention, and products that a model writes out itself.
    assert 0.5 * cost.macs_executed < layer_macs(model, x) <= cost.macs_executed
