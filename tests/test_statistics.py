"""What the analyses say of small networks and made records is what it was: see kept_numbers.py.

Letters: B images, E experts.
"""
import json
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kept_numbers import kept_names, marks, moved, wave
from torch import nn

from moe_zoo import layers
from moe_zoo.analysis import (
    bootstrap,
    consistency,
    count,
    count_images,
    expert_records,
    expert_trials,
    expert_words,
    experts,
    force,
    object_gates,
    object_sizes,
    permutation,
    timing,
    usage,
)
from moe_zoo.analysis.count_cli import depends_on_input
from moe_zoo.analysis.count_remarks import remarks, time_notes
from moe_zoo.analysis.count_tables import Result, breakdown, comparison, model_grid
from moe_zoo.analysis.object_gates import ATTRIBUTION, Objects
from moe_zoo.analysis.tables import as_csv, as_markdown
from moe_zoo.routing import routing_context

FILE = 'statistics.json'
PIXELS, TARGETS = wave(7, 3, 16, 16), torch.tensor([0, 1, 2, 0, 1, 0, 0])
BATCHES = [(PIXELS[:4], TARGETS[:4]), (PIXELS[4:], TARGETS[4:])]


class Net(nn.Module):
    """A map of 4 x 4 cells of 4 pixels, two routed layers, 4 classes, the last of which has no image."""

    def __init__(self, make, tokens: bool):
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 6, 4, 4), make(), make()
        self.head, self.tokens = nn.Linear(6, 4), tokens
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(.8 * wave(*parameter.shape, slope=1.3, start=number))

    def forward(self, x):
        x = self.stem(x)
        x = x.flatten(2).transpose(1, 2) if self.tokens else x
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(x.mean(dim=1 if self.tokens else (2, 3)))


NETS = {
    'top-k': lambda: Net(lambda: layers.MoEMlp(6, 8, num_experts=4, noise_std=0., capacity_factor=1.), True),
    'by expert': lambda: Net(lambda: layers.MoEMlp(6, 8, num_experts=3, router='expert_choice', losses={}), True),
    'soft': lambda: Net(lambda: layers.SoftMoEMlp(6, 8, num_experts=3), True),
    'mix': lambda: Net(lambda: layers.RoutedConv2d(6, 6, 3, padding=1, num_experts=3), False),
    'images': lambda: Net(lambda: layers.MoEConv2d(6, 6, 3, padding=1, num_experts=4), False),
    'patches': lambda: Net(lambda: layers.PatchMoEConv2d(6, 3, 2, 5), False),
}


def plain(value):
    """Anything as JSON, lists of numbers as two of them."""
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        flat = _flat(value)
        return [*map(plain, value)] if flat is None else [len(flat), *marks(torch.tensor(flat, dtype=torch.float64))]
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return plain(value.tolist())
    if isinstance(value, (float, np.floating)):
        return float(f'{value:.5g}') if value == value else 'nan'
    return int(value) if isinstance(value, np.integer) else value


def _flat(values) -> list[float] | None:
    """The numbers of nested lists, -9 for what is none; None where they hold anything else."""
    found = []
    for value in values:
        inner = _flat(value) if isinstance(value, (list, tuple, np.ndarray)) else None
        if inner is not None:
            found += inner
        elif value is None or isinstance(value, (int, float, np.number)):
            found.append(-9. if value is None or value != value else float(value))
        else:
            return None
    return found


def _experts(name: str):
    result = experts.analyze(NETS[name]().eval(), lambda title: BATCHES, 4, most_layers=1)
    del result['meanings']
    return plain(result)


def _consistency(name: str):
    model = NETS[name]()
    found = consistency.measure_consistency(model, BATCHES, sigmas=(.1, 1.), seed=3)
    pairs = consistency.locate_pairs(model, PIXELS[:2], hflip=1.)
    return plain({'measured': found, 'pairs': pairs, 'said': consistency.describe_consistency([('a net', found)])})


def _usage(name: str):
    found = usage.measure_usage(NETS[name](), BATCHES)
    table = usage.usage_table(found).splitlines()
    return {'table': table, **{name: plain(each.as_dict()) for name, each in found.items()}}


def _overruled(name: str):
    """Outputs and records under every way to overrule a router."""
    model, found = NETS[name]().eval(), {}
    ways = {'forced': force.force_expert(model, 1),
            'forced one': force.force_expert(model, 1, 'second', keep_mass=True),
            'dropped': force.drop_expert(model, 0, 'first'), 'largest': force.keep_largest(model, 1),
            'share': force.keep_largest(model, .5, keep_mass=False)}
    if force.choosing_layers(model):
        ways |= {'one': force.select_experts(model, 1), 'all': force.select_experts(model, 9, 'second')}
    for way, context in ways.items():
        with context, torch.no_grad(), routing_context() as seen:
            out = model(PIXELS)
        fields = {key: field for key, field in seen.routings[0]._asdict().items() if isinstance(field, torch.Tensor)}
        found[way] = {'out': marks(out), **{key: marks(field) for key, field in fields.items()}}
    return found


def _objects(kind: str) -> list[Objects]:
    """Of 12 images, one of which has none."""
    found = []
    for n in range(12):
        number = n % 4
        corner = np.array([[.1 * k, .05 * n] for k in range(number)]).reshape(-1, 2)
        areas = [[200, 3000, 1024, 20000][(n + k) % 4] * (1 + .1 * k) for k in range(number)]
        found.append(Objects(np.concatenate([corner, corner + .3], axis=1), areas,
                             np.arange(number) % 3 if kind == 'level' else None))
    return found


def _sizes(kind: str):
    positions = {'image': 1, 'tokens': 1, 'level': 3, 'place': 16}[kind]
    maps = {name: wave(12, positions, 3, slope=slope).abs().double().numpy() for name, slope in (('a', .7), ('b', 1.9))}
    maps['constant'] = np.full((12, positions, 2), .5)
    maps['a'][:, :, 0] += np.arange(12)[:, None] % 4
    found = object_sizes.analyze(maps, dict.fromkeys(maps, kind), _objects(kind), permutations=99, alpha=.05)
    text = object_sizes.size_table(found).splitlines()
    return {'table': text, 'layers': [{key: plain(getattr(layer, key)) for key in (
        'mass', 'half', 'leads', 'expert_p', 'separation', 'explained', 'explained_by_chance', 'chance_p', 'leader')}
        | {'curve': [marks(*map(torch.as_tensor, point[1:])) for point in layer.curve]} for layer in found.layers]}


def _permutation():
    values, images = wave(20, 2).double().numpy(), np.arange(20) // 3
    weights = wave(20, slope=.4).abs().double().numpy()
    return plain({
        't': [permutation.t_quantile(n) for n in (3, 5, 10, 100)],
        'means': permutation.clustered_means(values, weights, images),
        'of three': permutation.clustered_means(values[:9], weights[:9], images[:9]),
        'curve': [list(point) for point in permutation.curve(values, np.exp(4 * weights) * 100, images, points=5)],
        'no curve': permutation.curve(values, np.ones(20), images)})


def _bootstrap():
    ours, theirs = (wave(3, 40, slope=slope).numpy() > cut for slope, cut in ((.7, -.3), (.9, .1)))
    return {'plain': plain(bootstrap.paired_difference(ours, theirs[:2])),
            'paired': plain(bootstrap.paired_difference(ours, theirs, True, 500, 4)),
            'one seed': plain(bootstrap.paired_difference(ours[:1], theirs[:1], resamples=100))}


def _collected(name: str):
    """Both tests of object sizes, of what the layers of a network do with three batches of images."""
    model, objects, pixels = NETS[name]().eval(), _objects('image'), wave(12, 3, 16, 16, slope=2.3)
    with object_sizes.SizeCollector(model, shuffles=99, seed=2, cells=4) as collector, torch.no_grad():
        for start in range(0, 12, 4):
            with collector.batch(objects[start:start + 4], (16, 16)):
                model(pixels[start:start + 4])
    found = collector.analyze(permutations=99, alpha=.05)
    return {'whole': plain(found.as_dict()), 'table': object_sizes.size_table(found).splitlines(),
            'gates': [marks(torch.as_tensor(collector.gates(layer.name))) for layer in found.layers]}


def _tables():
    """Classes, gates and places of made numbers: 45 images of 5 classes, the last of which has one."""
    shares, targets = wave(45, 4, slope=1.1).abs(), torch.tensor([n % 4 for n in range(44)] + [4])
    shares[:, 3] = .25
    return plain({
        'classes': [each.nan_to_num(nan=-9.) for each in experts.class_table(shares, targets, 6)],
        'top': [experts.top_classes(shares, targets, 6), experts.top_images(shares)],
        'split': [experts.variance_split(shares[:count], targets[:count]) for count in (45, 20, 19)],
        'alike': experts.use_correlations(shares).nan_to_num(nan=-9.)})


def _grids():
    """Shares of cells, and gate masses of permuted images."""
    low, high = np.array([0., .25, .3, .9, .5]), np.array([1., .3, .85, 1.2, .5])
    objects = _objects('place')
    extents = np.array([[1., .75], [.5, 1.]])
    gates, boxes = (wave(*shape).abs().double().numpy() for shape in ((6, 4, 3), (6, 3, 4)))
    order = np.stack([np.roll(np.arange(6), by) for by in range(4)])
    boxes[:, 2] *= .05
    return plain({
        'overlaps': [object_gates.overlaps(low, high, cells) for cells in (1, 3, 4)],
        'at': [each.at('place', 9) for each in objects[:4]],
        'cells': [object_gates._cells(3, 5, each, 2) for each in (None, extents)],
        'mass': permutation.permuted_mass(gates, boxes, order),
        'of none': permutation.permuted_mass(gates, boxes * [[[1.], [0.], [1.]]], order),
        'separation': [permutation.separation(wave(3, 4).double().numpy(), np.array(counts))
                       for counts in ([3, 5, 1], [2, 0, 2])],
        'levels': permutation.level_permutations(5, 3, 4, np.random.default_rng(1))})


def _places(name: str):
    """Who had which place of two images, and which numbers of experts are tried."""
    model = NETS[name]().eval()
    return plain({'places': expert_records.locate(model, PIXELS[:2]), 'sweeps': [
        [sweep.label, sweep.native] for sweep in expert_trials.sweeps(model, True)]})


def _layer_words():
    """What is said of a layer of every outcome."""
    layer = dict(kind='image', separation=.1234, explained=.5, explained_by_chance=.25, chance_p=.01, untrained_p=.02,
                 untrained_separation=.05, thinned_separation=.1234, separates=True)
    outcomes = ({}, dict(kind='level'), dict(explained=None), dict(untrained_p=None), dict(thinned_separation=.1239),
                dict(thinned_separation=.124), dict(separates=False), dict(separates=False, chance_p=.05),
                dict(separates=False, chance_p=.051))
    return [object_sizes.verdict(SimpleNamespace(**layer | outcome), .05) for outcome in outcomes]


def _words():
    """What is said of experts, of results at and around the limits of every sentence."""
    base = json.loads((Path(__file__).parent / 'drawings' / 'experts.json').read_text())
    first, second = base['layers']
    gates = first['gates']

    def changed(layer, **changes):
        return base | {'layers': [layer | changes]}

    def variance(between, error, chance=.1):
        return first | {'gates': gates | {'variance': {'between': between, 'between_se': error, 'chance': chance}}}

    def row(difference, accuracy=50.):
        return dict(
            expert=0, accuracy=accuracy, se=5., difference=difference, difference_se=1., k='K = 1', native=False)

    alike = dict(experts=[0, 2], distance=.05, correlation=.9)
    tie = {'class': 1, 'share': .6, 'se': .1, 'lift': 2.}
    ends = [(.25, .25), (.4, .1), (.41, .09), (.3, .19), (0., 0.)]
    results = [
        base, base | {'trained': True}, changed(first, experts=1),
        changed(first, dead=[0]), changed(first, dead=[0, 1]),
        base | {'layers': [first | {'dead': [0]}] * 4}, base | {'layers': [first | {'dead': [0]}] * 6},
        changed(first, entropy=.9999), changed(first, entropy=.99991), changed(first, most_alike=None),
        *(changed(first, most_alike=alike | each, twins=[]) for each in (
            {}, {'distance': .1}, {'distance': .02}, {'distance': .2, 'correlation': None})),
        changed(first, twins=[[0, 1]]), base | {'layers': [first | {'twins': [[0, 1]]}] * 6},
        *(changed(first, listed=[0], top_classes=[[tie | each]]) for each in (
            {}, {'lift': 1.9}, {'lift': 1.5}, {'se': None}, {'se': .15}, {'se': .2}, {'lift': 0.})),
        *(changed(first, gates=gates | {'near_zero': low, 'near_one': high}) for low, high in ends),
        *(base | {'layers': layers} for layers in (
            [variance(None, None)], [variance(.3, .1)], [variance(.3, .1, .5)], [variance(.3, .1, .51)],
            [variance(.1, .03), variance(.2, .04)], [variance(.1, .01), variance(.2, .01)],
            [variance(.2, .01), variance(.1, .01)], [variance(.2, .01), variance(.5, .1), variance(.1, None)])),
        *(base | {'forced': forced} for forced in (
            None, dict(everywhere=[], layers={}), dict(everywhere=[row(0.)], layers={}),
            dict(everywhere=[row(9.)], layers={}), dict(everywhere=[row(0.), row(1., 50.04)], layers={}),
            dict(everywhere=[], layers={'a': [row(9.), row(-9., 40.)], 'b': [row(0.)]}),
            dict(everywhere=[row(9.), row(2.), row(3.)], layers={}))),
        *(base | {'k': rows} for rows in (
            [], [row(0.)], [row(0.) | {'native': True}, row(1.)], [row(9.), row(-9., 70.) | {'native': True}])),
    ]
    usual, *others = map(expert_words.findings, results)
    return [usual, *({key: text for key, text in said.items() if usual.get(key) != text} for said in others)]


CASES = {
    'words about experts': _words,
    **{f'experts of {name}': lambda name=name: _experts(name) for name in NETS},
    **{f'consistency of {name}': lambda name=name: _consistency(name) for name in ('top-k', 'by expert', 'patches')},
    **{f'usage of {name}': lambda name=name: _usage(name) for name in NETS},
    **{f'{name} overruled': lambda name=name: _overruled(name) for name in NETS},
    **{f'places of {name}': lambda name=name: _places(name) for name in NETS},
    'tables of classes': _tables,
    'bootstrap': _bootstrap,
    'ratio': lambda: plain(timing.ratio([1., 2., 4., 3.], [2., 2., 5., 1.])),
}

SIZES = {
    **{f'object sizes by {kind}': lambda kind=kind: _sizes(kind) for kind in ATTRIBUTION},
    **{f'object sizes of {name}': lambda name=name: _collected(name) for name in NETS if name != 'patches'},
    'grids': _grids,
    'words about object sizes': _layer_words,
    'permutation': _permutation,
}


def _costs(name: str):
    """Counts of a blank image and of three, and every table of them."""
    model = NETS[name]().eval()
    cost, images = count(model, PIXELS[:1]), count_images(model, PIXELS[:3].split(1))
    blank = Result(name, (3, 16, 16), depends_on_input(model, cost), cost, time_notes=time_notes(model, cost))
    load = {key: each.load for key, each in usage.measure_usage(model, BATCHES).items()}
    measured = replace(blank, name='measured', images=images, counted=('a', 'b', 'c'), skipped=('d',), loads=load,
                       notes=('A note.',))
    grids = [model_grid([blank]), model_grid([blank, measured]),
             *(breakdown(result, 'module', depth) for result in (blank, measured) for depth in (0, 1, 2)),
             *(breakdown(result, by, 1) for result in (blank, measured) for by in ('operator', 'expert')),
             *(comparison(first, second, by, 2) for by in ('module', 'operator')
               for first, second in ((blank, measured), (measured, measured)))]
    return {'cost': plain(cost), 'images': plain(images), 'said': remarks([blank, measured]),
            'tables': [[grid.title, *as_csv(grid).splitlines()] for grid in grids],
            'shown': [as_markdown(grid).splitlines()[2:] for grid in grids[:2]]}


# Not of convolutions whose way to compute is chosen for speed: it changes operators and memory.
COSTS = {name: lambda name=name: _costs(name) for name in NETS if name not in ('mix', 'images')}


@pytest.mark.parametrize('name', COSTS)
def test_the_costs_are_those_they_were(name):
    assert not moved('costs.json', COSTS, name)


@pytest.mark.parametrize('name', SIZES)
def test_what_is_said_of_object_sizes_is_what_it_was(name):
    assert not moved('object_sizes.json', SIZES, name)


@pytest.mark.parametrize('name', CASES)
def test_the_statistics_are_those_they_were(name):
    assert not moved(FILE, CASES, name)


def test_no_statistic_is_left_over():
    assert kept_names(FILE) == set(CASES) and kept_names('costs.json') == set(COSTS)
    assert kept_names('object_sizes.json') == set(SIZES)
