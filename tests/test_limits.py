"""Limits and rare cases of the analyses, on both sides of the limit, by hand.

Letters: B images, E experts, N images of a data set.
"""
import contextlib
import io
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn_runs import trainings
from PIL import Image
from test_benchmark import QUICK
from test_drawings import FOLDER, RESULT, SIZE_LAYERS
from test_scale import RATES, SHAPES
from test_speed_page import a_model
from test_tables import GRID
from timm.layers import Mlp
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from moe_zoo.analysis import (
    benchmark_cli,
    bootstrap,
    charts,
    consistency,
    count,
    count_cli,
    count_remarks,
    expert_figures,
    expert_page,
    expert_trials,
    figures,
    measure_runs,
    model_cases,
    object_sizes,
    origin,
    paper_charts,
    paper_figures,
    report_page,
    run_folders,
    runs,
    shuffled_routers,
    targets,
    timing,
    view_figures,
)
from moe_zoo.analysis.cost import ImageCosts, _num_images
from moe_zoo.analysis.count_tables import Result, breakdown
from moe_zoo.analysis.layer_cases import half_live
from moe_zoo.analysis.object_gates import Objects
from moe_zoo.analysis.page import Section
from moe_zoo.analysis.runs import LayerUse
from moe_zoo.analysis.scale_cli import estimate
from moe_zoo.analysis.tables import as_rich
from moe_zoo.data import Grid
from moe_zoo.errors import InputError
from moe_zoo.layers import ChannelGate, MoEConv2d, MoEMlp
from moe_zoo.routing import routing_context

matplotlib = pytest.importorskip('matplotlib')
PAGE = json.loads((FOLDER / 'experts.json').read_text())


# ---- where a number comes from

@pytest.mark.parametrize('top, head, status, name', [
    (None, 'abc', '', None),  # no git, or no repository
    ('/elsewhere', 'abc', '', None),  # installed inside somebody else's
    ('here', 'abc', '', 'abc'), ('here', 'abc', ' M moe_zoo/a.py', 'abc-dirty'), ('here', None, '', None)])
def test_the_commit_says_whether_it_was_changed(top, head, status, name, monkeypatch):
    answers = {'rev-parse --show-toplevel': str(origin._root()) if top == 'here' else top, 'rev-parse HEAD': head,
               'status --porcelain -- moe_zoo configs': status}
    monkeypatch.setattr(origin, '_git', lambda *words: answers[' '.join(words)])
    assert origin.commit() == name
    if name:
        assert origin.short_commit(name.replace('abc', 'abc' * 9)) == name.replace('abc', 'abc' * 4)


# ---- costs

def image_costs(*macs):
    return ImageCosts(macs, macs, macs, macs, macs, macs, {'': 1.}, {'': 1.}, {}, {})


def test_two_images_have_a_deviation_and_one_has_none():
    assert image_costs(1, 3).std == pytest.approx(2 ** .5)  # (1 + 1) / (2 - 1)
    assert tuple(image_costs(5).spread()) == (5., 0., 5, 5)
    assert tuple(image_costs(1, 3, 8).spread('activations')) == pytest.approx((4., 13 ** .5, 1, 8))  # (9 + 1 + 16) / 2


def test_images_of_every_kind_of_input():
    x = torch.zeros(3, 2)
    assert [_num_images(each) for each in (x, (x, x[:1]), {'a': x}, [{}, {}], ([{}] * 4, x), torch.tensor(1.), ())] == \
        [3, 3, 3, 2, 4, 1, 1]


def test_modules_below_a_twentieth_of_a_thousandth_are_left_out():
    """5e-5 of 1,000,000 is 50. Two levels of names, of which the second is asked for or not."""
    macs = {'': 1_000_000, 'a': 50, 'b': 49, 'a.x': 60, 'a.x.y': 70}
    cost = SimpleNamespace(by_module=macs, by_module_max=macs, parameters_by_module={'a': 7})
    result = Result('net', (3, 8, 8), False, cost)
    assert [row[0] for row in breakdown(result, 'module', 1).rows] == ['whole model', '  a']
    grid = breakdown(result, 'module', 2)
    assert [row[0] for row in grid.rows] == ['whole model', '  a', '    a.x']
    assert grid.rows[1][1] == 7 and [row[-2] for row in grid.rows] == pytest.approx([100., .005, .006])


def test_use_is_measured_where_it_is_asked_for(tmp_path, monkeypatch):
    """The load of experts takes a pass of its own."""
    (tmp_path / 'a.png').touch(), (tmp_path / 'b.txt').touch(), (tmp_path / 'c.JPG').touch()
    monkeypatch.setattr(count_cli, 'count_images', lambda model, inputs: [*inputs])
    monkeypatch.setattr(count_cli, 'measure_usage', lambda model, inputs: {
        'layer': SimpleNamespace(load=[path.name for path in inputs])})

    def loads(by, experts, most=9):
        cost = SimpleNamespace(parameters_by_expert=experts)
        found = count_cli._on_images(Result('net', (3,), False, cost), None, lambda path: path, Namespace(
            images=str(tmp_path), max_images=most, by=by))
        assert found.counted == tuple(str(tmp_path / name) for name in ('a.png', 'c.JPG')[:most])
        return found.loads

    assert loads('module', {'layer': (1, 1)}) == loads('expert', {}) == {}
    assert loads('expert', {'layer': (1, 1)}) == {'layer': ['a.png', 'c.JPG']}
    assert loads('expert', {'layer': (1, 1)}, 1) == {'layer': ['a.png']}


def test_numbers_do_not_wrap_and_names_do():
    columns = as_rich(GRID).columns  # a name, three numbers, a mark
    assert [column.no_wrap for column in columns] == [False, True, True, True, False]
    assert [column.justify for column in columns] == ['left', 'right', 'right', 'right', 'left']


# ---- estimates of many GPUs

@pytest.mark.parametrize('gpus, batch, shared_by, fits', [
    (2, 20, 2, True), (2, 10, 1, True), (2, 6, 2, False),  # 6 images go to 2 GPUs, not by fives
    (6, 60, 3, False), (4, 40, 8, False)])  # 8 experts do not go to 3, nor do 8 share what 4 have
def test_numbers_that_divide_each_other(gpus, batch, shared_by, fits):
    if fits:
        assert estimate(SHAPES, RATES, gpus, batch, 5, shared_by).times == batch // (gpus * 5)
    else:
        with pytest.raises(InputError, match='does not divide|is no multiple'):
            estimate(SHAPES, RATES, gpus, batch, 5, shared_by)


def test_one_full_machine_uses_no_network():
    """4 GPUs, in pairs, on one machine or on two: 800 bytes at 100 a second, or at 10."""
    rates = replace(RATES, per_node=4)
    found, split = (estimate(SHAPES, each, 4, 20, 5, 2) for each in (rates, RATES))
    assert found.sent_gradients == split.sent_gradients == 800  # a ring of 2: half of 200 numbers, twice
    assert (found.seconds_gradients, split.seconds_gradients) == (8., 80.)
    assert found.seconds_tokens == split.seconds_tokens  # the pair is on one machine both times


# ---- statistics

def test_outcomes_of_no_image_are_refused_and_so_are_99_resamples():
    for ours, theirs, paired in (((2, 0), (2, 0), False), ((2, 3), (2, 4), False), ((2, 3), (1, 3), True)):
        with pytest.raises(InputError, match='needs the same images'):
            bootstrap.paired_difference(np.zeros(ours), np.zeros(theirs), paired)
    assert bootstrap.paired_difference(np.zeros((2, 3)), np.zeros((1, 3)), resamples=100).resamples == 100
    with pytest.raises(InputError, match='--resamples 99: give at least 100'):
        bootstrap.paired_difference(np.zeros((2, 3)), np.zeros((1, 3)), resamples=99)


def test_nobody_is_infallible_on_a_few_images():
    """Of N right ones the error is that of one wrong: sqrt(1/N (1 - 1/N) / N); of one image that of a coin."""
    errors = [expert_trials.proportion(torch.ones(count, dtype=torch.bool)).se for count in (1, 2, 4)]
    assert errors == pytest.approx([50., 100 * (.25 / 2) ** .5, 100 * (.1875 / 4) ** .5])


def test_four_places_evenly_over_an_object():
    assert shuffled_routers._thinned(np.array([0., .2, 0., .3])).tolist() == [0., .5, 0., .5]
    assert np.flatnonzero(shuffled_routers._thinned(np.full(10, .1))).tolist() == [0, 3, 6, 9]
    assert shuffled_routers._thinned(np.full(10, .1)).sum() == 1.


# ---- timing

def test_memory_on_the_target_reaches_it():
    """Ours 3.4 MB, of which 0.8 MB are gradients of further parameters; the twin 2 MB: 2.6 / 2 = 1.3, as aimed at."""
    row = a_model('vmoe_vit_s', 1, 1, 1, 'train', equal_macs=True) | {'memory': 3_400_000}
    assert [each.verdict for each in targets.judge([row]) if each.target.what == 'memory'] == ['reached']
    assert [each.verdict for each in targets.judge([row | {'memory': 3_400_001}])][1:] == ['missed']


def test_what_allocates_nothing_holds_nothing():
    assert timing.peak_memory(lambda: None, 'cpu') == 0
    held = []  # 1000 and 500 numbers at one time, then 250 more after the first are gone
    assert timing.peak_memory(lambda: held.append(torch.empty(1000)) or held.append(torch.empty(500)), 'cpu') == 6000


def test_memory_is_measured_without_gradients_of_before():
    layer, seen = nn.Linear(2, 1), []
    layer(torch.ones(1, 2)).sum().backward()
    model_cases.memory_of(layer, lambda: seen.append(layer.weight.grad), 'cpu')
    assert seen == [None]


def test_twins_are_as_wide_as_all_experts_of_a_token():
    """2 chosen ones and one that all tokens share, of 6 each: 18."""
    for shared, hidden in ((1, 18), (0, 12)):
        model = nn.ModuleDict({'mlp': MoEMlp(4, 6, num_experts=4, num_shared_experts=shared)})
        twin = nn.ModuleDict({'mlp': Mlp(4, 6)})
        assert model_cases.widen(twin, model) == ['mlp']
        assert [*twin['mlp'].fc1.weight.shape, *twin['mlp'].fc2.weight.shape] == [hidden, 4, 4, hidden]
    assert model_cases.widen(twin, nn.Linear(1, 1)) == []


@pytest.mark.parametrize('share', [0., 1.01, -1.])
def test_no_channel_or_more_than_all_are_no_share(share):
    with pytest.raises(InputError, match=f'--live {share:g}: give the share'):
        model_cases.benchmark_live('deepmoe_resnet50', share, None, QUICK)


def test_gates_are_closed_at_even_distances():
    gate = ChannelGate(8, 1)
    opened = []
    for share in (.25, .5, 1.):
        model_cases.close(gate, share)
        opened.append((gate.weight[:, 0] > 0).nonzero().flatten().tolist())
    assert opened == [[3, 7], [1, 3, 5, 7], [*range(8)]]


# ---- folders of runs

def test_every_row_of_a_summary_needs_an_epoch(tmp_path):
    path = tmp_path / 'summary.csv'
    path.write_text('epoch,train_loss,eval_top1\n0,1.5,\n1,1.25,50\n')
    assert run_folders._summary(path) == [{'epoch': 0., 'train_loss': 1.5},
                                          {'epoch': 1., 'train_loss': 1.25, 'eval_top1': 50.}]
    path.write_text('epoch,train_loss\n0,1.5\n,1.25\n')
    with pytest.raises(ValueError, match='summary.csv has a row without an epoch'):
        run_folders._summary(path)
    path.write_text('epoch,train_loss\n0,1.5\n1,1.2')
    with pytest.raises(ValueError, match='the last row of summary.csv is cut off'):
        run_folders._summary(path)
    assert run_folders._summary(Path('none.csv')) == []


def test_deviations_around_a_mean_do_not_reach_zero():
    assert report_page._around(10., 3., 2.) == (3.5, 6.5)
    assert report_page._around(10., 8., 1.) == (5., 18.)  # half of the mean, not 2
    assert report_page._around(10., 0., 1.) is None


# ---- the page about experts

def test_further_sections_come_before_what_was_left_out():
    pixels = torch.zeros(22, 1, 16, 16, dtype=torch.uint8)
    titles = [part.title for part in expert_page.expert_page(PAGE, pixels, (), [Section('more', 'done')]).sections]
    assert titles[-2:] == ['more', 'What was left out'] and titles[0] == 'What was found'


def test_what_was_left_out_is_said():
    first = PAGE['layers'][0]

    def said(**changes):
        usual = dict(left_out=[], corrupt=[], chosen_classes=[], layers=[first], drawn_layers=['a'])
        return expert_page._left_out(PAGE | usual | changes)[:-1]

    assert said() == ['Nothing.'] and said(left_out=['That.']) == ['That.']
    assert said(layers=[first] * 3, drawn_layers=['a', 'b']) == [
        '2 of 3 layers are drawn, evenly over the depth.']
    assert said(layers=[first] * 3, drawn_layers=['a'] * 3) == ['Nothing.']
    assert said(layers=[first] * 4, drawn_layers=['a'] * 4) == [
        'Tables of classes and images are drawn for three layers.']
    assert said(layers=[first | {'experts': 8}]) == ['Nothing.']
    assert said(layers=[first | {'experts': 9}])[0].startswith('At most 8 experts of a layer are drawn with images')
    seen = PAGE['targets'][0]
    assert said(chosen_classes=[seen]) == ['Nothing.']
    assert said(targets=[0], classes=['cat', 'dog'], chosen_classes=[0, 1]) == ['There is no image of dog.']
    assert said(corrupt=['a', 'b']) == ['2 images could not be read: a and b.']


def test_bars_are_drawn_of_up_to_32_experts(monkeypatch):
    drawn = []
    monkeypatch.setattr(expert_page, 'share_bars', lambda bars: drawn.append([name for name, _ in bars]) or '')
    monkeypatch.setattr(expert_page, '_fair', lambda layers: '')
    layers = [PAGE['layers'][0] | {'layer': f'of {number}', 'experts': number} for number in (31, 32, 33)]
    expert_page._use(PAGE | {'layers': layers, 'drawn_layers': [layer['layer'] for layer in layers]}, {})
    assert drawn == [['of 31', 'of 32']]


def test_shares_of_more_than_32_experts_have_a_digit(monkeypatch):
    formats = []
    monkeypatch.setattr(expert_page, 'heat_map', lambda *args, value_format, **rest: formats.append(value_format) or '')
    for number in (32, 33):
        layer = PAGE['layers'][0] | {'experts': number}
        expert_page._classes(PAGE | {'layers': [layer], 'drawn_layers': [layer['layer']]}, None)
    assert formats == ['{:.0f}', '{:.1f}']


def test_patches_are_cut_out_with_their_surroundings(monkeypatch):
    """6 x 4 places of 2 x 3 pixels: three of them each way, moved inwards at the borders."""
    cut = []
    monkeypatch.setattr(expert_page, 'picture', lambda crop, size: cut.append(
        (int(crop[0, 0, 0]), int(crop[0, -1, -1]))) or b'')
    monkeypatch.setattr(expert_page, 'pictures', lambda *args, **rest: '')
    pixels = (torch.arange(12)[:, None] * 12 + torch.arange(12))[None, None]  # 12 row + column
    spots = [dict(row=row, column=column, image=0) for row, column in ((0, 0), (2, 1), (3, 2), (5, 3))]
    layer = PAGE['layers'][0] | {'grid': [6, 4], 'listed': [0], 'experts': 1, 'top_places': [spots], 'importance': [1.]}
    expert_page._crops(PAGE | {'layers': [layer], 'drawn_layers': [layer['layer']], 'targets': [0]}, pixels)
    corners = [(0, 0), (2, 0), (4, 3), (6, 3)]  # top and left; 6 pixels high and 9 wide
    assert cut == [(12 * top + left, 12 * (top + 5) + left + 8) for top, left in corners]


# ---- figures

def test_the_ninth_bar_has_the_first_colour_again():
    rows = {'free': dict(APs=1.), **{f'expert {e}': dict(APs=1.) for e in range(9)}}
    figure = figures.size_figure(SimpleNamespace(layers=SIZE_LAYERS[:1]), rows)
    colours = [matplotlib.colors.to_hex(bars[0].get_facecolor()) for bars in figure.axes[-1].containers]
    assert colours == ['#7b8794', *figures.COLOURS, figures.COLOURS[0]] and len(set(colours)) == 9


def test_every_shown_image_has_a_row_of_panels():
    result = RESULT | {'shown': [2, 0], 'places': [dict(
        RESULT['places'][0], images=[dict(top=[[0, 1], [1, 1]]), dict(top=[[1, 0], [0, None]])])]}
    axes = expert_figures.patches(result, torch.zeros(3, 3, 8, 8, dtype=torch.uint8)).axes
    assert [axis.get_title() for axis in axes] == ['dog', 'blocks.1', '', 'cat', 'blocks.1', '']  # targets 0, 1, 1
    assert [len(axis.images) for axis in axes] == [1, 2, 0, 1, 2, 0]


def test_a_legend_of_bars_names_twelve_experts():
    layer = dict(layer='a', experts=14, importance=[1 / 14] * 14, listed=[*range(14)])
    legend, = expert_figures.usage_bars([layer]).legends
    assert [text.get_text() for text in legend.get_texts()] == [f'expert {e}' for e in range(12)]


def test_dashes_are_twice_as_long_as_gaps():
    chart = charts.curves([('a', [(1, 1), (2, 2)]), ('b', [(1, 2), (2, 3)])], 'x', 'y', dashed=[1])
    lines = paper_charts.redraw(chart, 3.25).axes[0].lines
    dashes = {tuple(dash) for line in lines if (dash := line._unscaled_dash_pattern[1])}
    assert dashes == {(4, 2)}


def looks(*names):
    return [paper_figures.Look(name, 'red', 'o', '-', False) for name in names]


@pytest.mark.parametrize('names, columns, rows', [
    (['a', 'b', 'c'], 3, 1),  # .45 + .062 inches each: six of them in 3.25 inches
    (['a'] * 7, 6, 2), (['n' * 19] * 2, 1, 2), (['n' * 18] * 2, 2, 1),  # .45 + .062 x 19 = 1.628 > 3.25 / 2 > 1.566
    (['n' * 60], 1, 1)])
def test_a_legend_has_columns_for_its_names(names, columns, rows):
    figure = matplotlib.figure.Figure(figsize=(3.25, 1.))
    paper_figures._legend(figure, looks(*names), 3.25)
    assert figure.legends[0]._ncols == columns and figure.get_figheight() == pytest.approx(1 + .14 * rows)


def test_costs_are_logarithmic_from_a_factor_of_three():
    scales = []
    for top in (2.9, 3.):
        axis = matplotlib.figure.Figure().subplots()
        paper_figures._scale(axis, [1., top, 2.])
        scales.append(axis.get_xscale())
    assert scales == ['linear', 'log']


def test_use_is_drawn_a_row_a_layer_with_whole_experts():
    use = [LayerUse(name, (.5, .5), (.5, .5), 1., 0., ()) for name in ('n' * 22, 'n' * 23, 'n' * 34, 'n' * 35)]
    found = {}
    for width in (3.25, 6.75):
        figure = paper_figures.usage_map(use, width)
        axis = figure.axes[0]
        found[width] = [len(tick.get_text()) for tick in axis.get_yticklabels()]
        assert all(tick == int(tick) for tick in axis.get_xticks()) and axis.get_xlim() == (-.5, 1.5)
    assert found == {3.25: [22, 22, 22, 22], 6.75: [22, 23, 34, 34]}
    heights = [paper_figures.usage_map(use[:1] * layers, 6.75).get_figheight() for layers in (1, 5, 10)]
    assert heights == pytest.approx([1.4, 1.4, 2.2])  # half an inch, and .17 a layer, .9 at least


# ---- colours, pictures and names

def test_eight_experts_have_their_own_colours_and_of_nine_the_most_frequent():
    assert expert_page._most_common([[[0, 7, None]]]) == [*range(8)]
    cells = [8, 8, 8, 1, 1, 2, 3, 4, 5, 6, 7, 7, 0]  # 0 stands once, the others twice or three times
    assert expert_page._most_common([[cells, [2, 3, 4, 5, 6]]]) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_only_larger_pictures_are_made_small():
    wide = torch.zeros(1, 4, 10, dtype=torch.uint8)
    found = [Image.open(io.BytesIO(expert_page.picture(wide, size))) for size in (10, 5)]
    assert [(image.format, image.size) for image in found] == [('PNG', (10, 4)), ('JPEG', (5, 2))]


def test_a_name_goes_where_nothing_is():
    """Of 10 letters, 73 wide: beside the point, then above and below it, ever further away."""
    taken, name = [], 10 * 'n'
    found = [charts._place(200., 100., name, taken, 50., 160.) for _ in range(8)]
    assert found == [(212, 104), (115, 104), *((163.5, 100 + dy) for dy in (-13, 22, -30, 39, -47, 56))]
    for top, y in ((91, 87), (90, 122)):  # above it the name ends at 90; not into the axis, at 50
        assert charts._place(60., 100., name, [(70, top, 80, 100)], 50., 160.) == (52, y)
    assert charts._place(420., 100., name, [], 50., 160.) == (440 - 73, 104)  # nor over the edge
    assert [charts._place(200., 100., name, [], 50., bottom) for bottom in (107., 108.)] == [(163.5, 87), (212, 104)]


def test_patches_need_not_be_square():
    axis = matplotlib.figure.Figure().subplots()
    view_figures._draw(axis, torch.zeros(1, 8, 16), [[0, None, 1, 1]], None, {0: 'red', 1: 'blue'})
    assert axis.get_aspect() == 2.  # 4 patches of 4 x 8 pixels: drawn twice as high as wide
    axis = matplotlib.figure.Figure().subplots()
    view_figures._draw(axis, torch.zeros(1, 8, 16), [[0, 1], [0, 1]], None, {0: 'red', 1: 'blue'})
    assert axis.get_aspect() == .5


def test_bars_have_two_spines_and_legends_no_frame():
    figure = figures.size_figure(SimpleNamespace(layers=SIZE_LAYERS[:1]))
    spines = figure.axes[0].spines
    assert [side for side in spines if spines[side].get_visible()] == ['left', 'bottom']
    view = matplotlib.figure.Figure(figsize=(6, 2))
    view_figures._legend(view, {0: 'red', 1: 'blue'}, True)
    for legend, words in ((figure.legends[0], 2), (view.legends[0], 4)):
        assert not legend.get_frame_on() and len(legend.get_texts()) == words
    assert view.legends[0]._ncols == 4


# ---- words and rows of benchmarks

def test_what_was_measured_is_of_one_image_unless_it_says_so():
    row = dict(mode='forward', twin='b', macs_ratio=1., time_ratio=dict(median=2., low=2., high=2.))
    machine = dict(device='a chip', threads=2)
    assert count_remarks._sentence(row, machine).startswith('measured: a forward pass of 1 image takes 2.00 (spread')
    assert 'of 3 images' in count_remarks._sentence(row | dict(batch_size=3), machine)


@pytest.mark.parametrize('groups, channels, said', [(1, 1, False), (2, 2, True), (1, 2, False)])
def test_depthwise_convolutions_have_more_than_one_channel(groups, channels, said):
    model = nn.Sequential(nn.Conv2d(channels, channels, 3, groups=groups))
    notes = count_remarks.time_notes(model, count(model, torch.zeros(1, channels, 4, 4)))
    assert any('depthwise' in note for note in notes) == said


def test_depthwise_convolutions_are_named_above_a_hundredth():
    model = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2))
    for macs, said in ((1, False), (2, True)):
        cost = SimpleNamespace(macs_max=100, images=1, by_module={'0': macs})
        assert bool(count_remarks.time_notes(model, cost)) == said


class Turns:
    """Calls everything twice and says what it took."""
    device = 'cpu'

    def alternate(self, runs):
        for run in [*runs, *runs]:
            run()
        return timing.Timings([[float(n), n + 1., n + 2.] for n, _ in enumerate(runs, 1)], [.5, .5])


class Gated(nn.Module):
    """Its copy says 0.0005 of it more."""

    def __init__(self, out: float):
        super().__init__()
        self.out, self.gate = out, ChannelGate(4, 1)

    def __deepcopy__(self, memo):
        return Gated(1.0005 * self.out)

    def forward(self, x):
        return x.new_full((1, 1), self.out)


def test_live_channels_are_compared_by_how_much_outputs_differ(monkeypatch):
    monkeypatch.setattr(model_cases, 'sparse_inference', lambda model: contextlib.nullcontext())
    made = []

    def build(name, device, size, **more):
        made.append((name, device, size, more, Gated(1000.)))
        return made[-1][-1]

    row, = model_cases.benchmark_live('deepmoe_resnet50', .5, build, Turns(), img_size=8)
    assert made[0][:4] == ('deepmoe_resnet50', 'cpu', (8, 8), {})
    assert (made[0][-1].gate.weight[:, 0] > 0).tolist() == [False, True, False, True]
    assert row.pop('difference') == pytest.approx(5e-4, rel=1e-3) and row.pop('memory') and row.pop('twin_memory')
    ratio = row.pop('time_ratio')  # 1 / 2, 2 / 3 and 3 / 4
    assert ratio == pytest.approx(dict(median=2 / 3, low=7 / 12, high=17 / 24))
    assert row == dict(
        kind='model', model='deepmoe_resnet50', twin_args={}, equal_macs=False, live=.5, macs_ratio=1., batch_size=1,
        input_size=[3, 8, 8], twin='all channels, masked', mode='forward', loads=[.5, .5], seconds=[1., 2., 3.],
        twin_seconds=[2., 3., 4.])
    monkeypatch.setattr(Gated, '__deepcopy__', lambda self, memo: Gated(1.001095 * self.out))
    with pytest.raises(InputError, match='sliced and masked outputs differ by 0.00109'):
        model_cases.benchmark_live('deepmoe_resnet50', .5, build, Turns(), img_size=8)


def test_the_optimiser_steps_and_changes_nothing():
    layer = nn.Linear(2, 1)
    layer(torch.ones(1, 2)).sum().backward()
    before, steps = layer.weight.detach().clone(), []
    hook = register_optimizer_step_post_hook(lambda *_: steps.append(1))
    assert model_cases.optimizer_seconds([layer, layer], Turns()) == [[1., 2., 3.], [2., 3., 4.]]
    hook.remove()
    assert len(steps) == 4 and torch.equal(layer.weight, before)


def test_a_batch_of_all_images_can_be_loaded():
    for images, batch, fits in ((8, 8, True), (8, 9, False), (8, 0, False)):
        with contextlib.nullcontext() if fits else pytest.raises(InputError, match='give at least one batch'):
            assert benchmark_cli.data_jobs(Namespace(images=images, batch_size=batch, workers=0), QUICK)


@pytest.mark.parametrize('command', ['model', 'compile'])
def test_no_image_is_no_batch(command, capsys):
    with pytest.raises(SystemExit):
        benchmark_cli.main([command, 'condconv_mobilenetv1_025', '--batch-size', '0'])
    assert 'error: --batch-size 0: use at least 1 image.' in capsys.readouterr().err


# ---- experts

def test_all_numbers_of_experts_up_to_the_largest_layer_are_tried():
    model = nn.Sequential(*(MoEMlp(4, 4, num_experts=experts, num_selected=k) for experts, k in ((3, 1), (5, 2))))
    assert [(sweep.label, sweep.native) for sweep in expert_trials.sweeps(model, False)] == [
        ('K = 1', False), ('K = 2', False), ('K = 3', False), ('K = 4', False), ('K = 5', False)]  # 1 here, 2 there


@pytest.mark.parametrize('areas, expert', [([], 0), ([2000.], 1), ([20000., 100., 30000.], 2), ([100., 2000.], 0)])
def test_planted_routers_follow_the_most_frequent_size(areas, expert):
    model = MoEConv2d(2, 2, 1, num_experts=4, num_selected=1, noise=False).eval()
    objects = Objects([[0., 0., 1., 1.]] * len(areas), areas)
    with object_sizes.planted_sizes(model, SimpleNamespace(now=[objects])), routing_context() as seen:
        model(torch.ones(1, 2, 2, 2))
    assert seen.routings[0].combine_matrix().argmax(dim=1).tolist() == [expert]


def test_without_objects_there_is_no_analysis():
    with pytest.raises(InputError, match='object'):
        object_sizes.analyze({'a': np.ones((2, 1, 2))}, {'a': 'image'}, [Objects([], []), Objects([], [])])


def test_seeds_are_in_order_and_options_may_stand_in_any(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = trainings('a', False, {3: 50., 1: 60.})
    made = [replace(first, options={'a': 1, 'b': 2}), replace(second, options={'b': 2, 'a': 1}),
            replace(first, seed=None, options={'a': 1, 'b': 2})]
    run, = runs._group(made)
    assert [training.seed for training in run.trainings] == [1, 3, None]
    assert len(runs._group([*made, made[0]])) == 2  # a seed that comes twice
    assert len(runs._group([made[0], replace(second, options={'a': 1, 'b': 3})])) == 2


@pytest.mark.parametrize('processor, text, name', [
    ('', None, 'arm64'), ('a kind', None, 'a kind'), ('x', 'flags: none\n', 'x'),
    ('x', 'model name\t: A chip\n', 'A chip')])
def test_the_processor_has_a_name_everywhere(processor, text, name, monkeypatch):
    def read(*_, **__):
        if text is None:
            raise OSError
        return text

    monkeypatch.setattr(timing.platform, 'processor', lambda: processor)
    monkeypatch.setattr(timing.platform, 'machine', lambda: 'arm64')
    monkeypatch.setattr(timing.Path, 'read_text', read)
    assert timing.machine('cpu')['device'] == name


# ---- layers and runs

def test_use_is_as_even_as_its_entropy():
    """One expert and no use at all are even; all by one of two is 0; 3 of 4 and 1 of 4 are .8113 bits."""
    shares = ([3.], [0., 0.], [2., 0.], [3., 1.], [1., 1., 1.])
    assert [run_folders.evenness(each) for each in shares] == pytest.approx([1., 1., 0., .8113, 1.], abs=1e-4)


def test_the_expert_of_a_size_is_above_its_usual_share():
    """Of small objects expert 0 has .6, but .75 of all; expert 1 has .4 instead of .25. Of large ones nobody knows."""
    layer = SimpleNamespace(
        mass=np.array([[.6, .4], [.9, .1], [np.nan, np.nan]]), gates=np.array([[.6, .4], [.9, .1]]))
    assert [object_sizes.LayerSizes.expert_of(layer, size) for size in range(3)] == [1, 0, 0]
    layer.gates = np.array([[.2, .8], [0., 0.], [1e-10, 0.], [.7, .3]])
    assert object_sizes.LayerSizes.leader.fget(layer).tolist() == [1, -1, -1, 0]


def test_what_is_measured_of_a_run():
    """A linear layer of 2 x 3 for images of one and of two rows: 6 and 12 MACs."""
    class Fourier(nn.Linear):
        def forward(self, x):
            return torch.fft.fft(super().forward(x)).real

    inputs = [torch.ones(1, 2), torch.ones(2, 2)]
    found = measure_runs.measure(measure_runs.Opened(Fourier(2, 3), inputs, None, True))
    assert (found.images, found.input_size, found.parameters, found.active_parameters) == (2, (2,), 9, 9)
    assert (found.macs_max, found.macs_executed, found.macs_sd) == (9., 9., pytest.approx(18 ** .5))
    assert found.layers == () and len(found.uncounted) == 1 and 'fft' in found.uncounted[0]
    noise = measure_runs.measure(measure_runs.Opened(Fourier(2, 3), inputs[:1], None, False))
    assert (noise.images, noise.macs_sd) == (0, 0.)


def test_gated_convolutions_count_their_channels():
    layer, _ = half_live(1, channels=6, size=3)
    assert (layer.module.num_experts, layer.module.num_selected) == (6, 6)


def test_patches_without_a_partner_are_left_out():
    """2 x 2 patches of 2 x 2 pixels, seen again one patch further: a row of each view is in the other."""
    maps, areas = torch.eye(3).repeat(1, 2, 1, 1), torch.ones(1, 2)
    same = consistency.patch_pairs(maps, areas, (4, 4), Grid(2, 2, 0))
    assert same.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    maps[0, 1, 0, 2] = 2.
    assert consistency.patch_pairs(maps, areas, (4, 4), Grid(2, 2, 0)).tolist() == [[0, 1], [6, 7]]


def test_maps_of_logits_have_the_shape_of_the_image(monkeypatch):
    ratios = []
    monkeypatch.setattr(expert_page, 'pictures', lambda *args, ratio=1., **rest: ratios.append(ratio) or '')
    place = dict(layer='a', experts=[0], images=[dict(logits=[[[1., 2.]]])])
    expert_page._logit_maps(PAGE | {'places': [place], 'shown': [0]}, torch.zeros(22, 1, 8, 16, dtype=torch.uint8))
    assert ratios == [.5]
