"""What the benchmarks time: every case with its contenders, their sizes and inputs, and every target, as they were.

Ratios in docs/speed.md are of these cases: a size that moves makes another comparison of the same name.
"""
import pytest
import torch
from kept_numbers import kept_names, moved

from moe_zoo.analysis import layer_cases
from moe_zoo.analysis.dispatch_cases import cells
from moe_zoo.analysis.layer_cases import cases
from moe_zoo.analysis.targets import TARGETS, aim_of

FILE = 'benchmark_cases.json'


def _case(name: str):
    case = cases()[name]
    with torch.device('meta'):
        contenders = case.build()
    inputs = [[list(x.shape) for x in contender.inputs] for contender in contenders]
    return [case.about, *case.modes, *(
        [contender.name, *own, *_described(contender.module)] for contender, own in zip(contenders, inputs))]


def _described(module: torch.nn.Module | None) -> list:
    """Shapes of the weights, and what our layers say of themselves."""
    if module is None:
        return []
    ours = {f'{type(part).__name__}({part.extra_repr()})' for part in module.modules()
            if type(part).__module__.startswith('moe_zoo.layers')}
    return [*(list(p.shape) for p in module.parameters()), *sorted(ours)]


@pytest.fixture(autouse=True)
def without_peers(monkeypatch):
    """They are packages that may be there or not."""
    monkeypatch.setattr(layer_cases, 'make_peer', lambda name, layer: None)


CASES = {
    **{name: lambda name=name: _case(name) for name in cases()},
    'cells of dispatch': lambda: {name: list(cell) for name, cell in cells().items()},
    'targets': lambda: [
        [round(target.at_most, 4), target.about, dict(target.match), target.what] for target in TARGETS],
    'aims': lambda: {f'{name} {mode} {twin}': aim_of(dict(kind='layer', case=name, mode=mode, twin=twin))
                     for name in cases() for mode in ('forward', 'train')
                     for twin in ('nn.Conv2d', 'timm CondConv2d', 'dense Mlp', 'dense', 'chosen experts alone')},
}


@pytest.mark.parametrize('name', CASES)
def test_a_case_is_what_it_was(name):
    assert not moved(FILE, CASES, name)


def test_no_case_is_left_over():
    assert kept_names(FILE) == set(CASES)
