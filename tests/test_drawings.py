"""Every chart as it was when somebody looked at it: tests/drawings/ has the files, letter by letter.

Where ink goes is nothing to compute by hand; that it moved should be seen. After a change that is meant,
`MOE_ZOO_REDRAW=1 .venv/bin/python -m pytest tests/test_drawings.py` writes the files anew: look at them (a browser
shows them without the colours of the page), and commit them with the change.
"""
import base64
import dataclasses
import hashlib
import html
import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn_runs import found_runs
from PIL import Image

from moe_zoo.analysis import charts, expert_figures, figures, paper, paper_charts, paper_figures
from moe_zoo.analysis.charts import Mark
from moe_zoo.analysis.expert_page import expert_page
from moe_zoo.analysis.report_page import report_page
from moe_zoo.analysis.view_figures import views_figure

FOLDER = Path(__file__).parent / 'drawings'
GRID = [['var(--expert-1)', 'var(--expert-1)', None], ['var(--expert-0)', None, None]]
DRAWINGS = {
    'scatter': lambda: charts.scatter(
        [('condconv_resnet18', 38, 99.4, True), ('resnet18', 38.1, 99.39, False), ('a third one', 38.2, 99.38, True),
         ('narrow', 4.5, 97, False), ('wide', 900, 98.2, True)], 'million MACs', 'accuracy, %'),
    'trade_offs': lambda: charts.trade_offs(
        [Mark('moe', 10, 80, 0, x_range=(9, 12), y_half=1.), Mark('dense', 8, 79, 0, True), Mark('other', 9, 70, 1),
         Mark('far', 40, 99.5, 2, y_half=2.)], [(1, 0), (2, 3)], ['moe', 'other', 'far'], 'MACs', 'accuracy, %',
        most=100),
    'trade_offs_linear': lambda: charts.trade_offs(
        [Mark('a', 10, 80, 3), Mark('b', 25, 70, 4, y_half=.2)], [(0, 1)], ['a', 'b', 'c', 'd', 'e'], 'ms', '%'),
    'curves': lambda: charts.curves(
        [('narrow', [(10, 1, .5), (100, 2, 1), (1000, 3, .25)]), ('wide', [(20, 4), (300, 4.5)])], 'MACs', 'accuracy',
        least=0),
    'curves_dashed': lambda: charts.curves(
        [('a line with a long name of its own', [(1, .97), (2, .99)]), ('another line, named', [(1, .98), (2, .99)]),
         ('short', [(1, .7), (3, .8)])], 'epochs', 'evenness', '{:.2f}', log=False, series=[3, 3, 1], dashed=[1],
        span=(.5, 1.)),
    'intervals': lambda: charts.intervals(
        [('a', [0, 10, 4]), ('a longer name', [5]), ('b', [7.5, 8])], 'accuracy, %'),
    'share_bars': lambda: charts.share_bars([('layer<1>', [.25, .75]), ('layer2', [.5, .25, .2, .05])]),
    'heat_map': lambda: charts.heat_map(
        ['0', '1'], ['cat', 'dog', 'owl'], [[0, 10, 40], [20, None, 0]], 'digit', 'expert'),
    'heat_map_of_many': lambda: charts.heat_map(
        ['layer', 'a later layer'], [str(n) for n in range(40)], [[n / 10 for n in range(40)], [1.] * 40]),
    'histogram': lambda: charts.histogram([1, 3, 0, 2], 'gate', -1., 3.),
    'estimates': lambda: charts.estimates([('a', 50, 5), ('a longer name', 70, 0)], 'accuracy', ('free', 60)),
    'estimates_far': lambda: charts.estimates([('a', 50, 5), ('b', 0, 1)], 'accuracy', ('free', 90)),
    'intervals_long': lambda: charts.intervals([('a name that leaves less than half of the room', [1, 2])], 'x'),
    'histogram_of_nothing': lambda: charts.histogram([0, 0], 'gate'),
    'strips_of_nothing': lambda: charts.strips([('first', [[0, 0]])], ['cat'], ['0', '1'], 'expert'),
    'ratios': lambda: charts.ratios(
        {'a model': [('forward', [1., 2., 1.5], 1.25), ('step', [1.], None)], 'b': [('step', [.6, .7], .8)]}, 'time'),
    'strips': lambda: charts.strips(
        [('first', [[.2, .4], [.1, 0]]), ('last', [[2, 1], [0, 4]])], ['cat', 'dog'], ['0', '1'], 'expert'),
    'pictures': lambda: charts.pictures(
        [('a', b'\x89PNG', None), ('b', b'\xff\xd8', GRID), ('a long name under a picture', b'\x89PNG', GRID)], 2,
        [('expert 0', 'var(--expert-0)'), ('expert 1', 'var(--expert-1)')], ratio=.5),
    'grid_map': lambda: charts.grid_map(
        [['', 'red', 'red', 'blue'], ['', '', 'red', '']], [(1, 3, 'b'), (0, 1, 'long name')],
        [(0, 0, 1), (1, 1, 1), (1, 2, 0)], ['depth', 'semantics', 'edges']),
}


LAYERS = [
    dict(layer='blocks.1', experts=3, importance=[.5, .3, .2], listed=[0, 1, 2],
         classes=dict(share=[[.2, .3, .5], [1, 0, 0]]),
         gates=dict(counts=[1, 3, *[0] * 18], variance=dict(between=.25, between_se=.05, chance=.01))),
    dict(layer='a.long.name.of.a.module.inside.a.module.2', experts=2, importance=[.9, .1], listed=[0, 1],
         classes=dict(share=[[.4, .6], [.1, .9]]),
         gates=dict(counts=[0] * 19 + [4], variance=dict(between=.5, between_se=None, chance=.01)))]
PLACES = [dict(layer='blocks.1', experts=[0, 1], images=[
    dict(top=[[0, 1], [None, 1]], logits=[[[1., 2], [3, 4]], [[0, -1], [-2, 5]]])])]
RESULT = dict(
    layers=LAYERS, classes=['cat', 'dog'], targets=[0, 1, 1], places=PLACES, shown=[2], free=dict(accuracy=70.),
    forced=dict(everywhere=[dict(expert=0, accuracy=60., se=2.), dict(expert=1, accuracy=50., se=1.)], layers={
        'blocks.1': [dict(expert=0, accuracy=65., se=2.5)], 'blocks.2': []}),
    k=[dict(k=1, accuracy=68., se=1.5)])
PIXELS = torch.arange(3 * 8 * 8 * 3, dtype=torch.uint8).reshape(3, 3, 8, 8)
SIZE_LAYERS = [
    SimpleNamespace(name=f'layer{i}', separation=(3 * i) % 14, separates=(True, False, None)[i % 3],
                    mass=np.array([[.1 * i, 1 - .1 * i], [.5, .5], [np.nan, .25]])) for i in range(14)]
USAGES = {
    'layer1': SimpleNamespace(num_experts=3, share=[.5, .3, .2]),
    'layer2': SimpleNamespace(num_experts=2, share=[.6, .4])}
BY_CLASS = SimpleNamespace(name='layer1', num_experts=2, class_mass=torch.tensor([[.1, .9], [.8, .2], [.5, .5]]))
PAIRS = dict(area=(.5, .5), hflip=0., seed=3, experts=10, images=[
    dict(image=[[0, 9], [None, 3]], crop=[[0, 1], [2, 3]], changed=[[False, True], [False, False]])])
FIGURES = {
    'usage_bars': lambda: expert_figures.usage_bars(LAYERS),
    'class_maps': lambda: expert_figures.class_maps(LAYERS, ['cat', 'dog'], [1, 0, 1]),
    'gate_histograms': lambda: expert_figures.gate_histograms(LAYERS),
    'class_variance': lambda: expert_figures.class_variance(LAYERS),
    'accuracies': lambda: expert_figures.accuracies(RESULT),
    'patches': lambda: expert_figures.patches(RESULT, PIXELS),
    'logit_maps': lambda: expert_figures.logit_maps(RESULT, PIXELS[:, :1]),
    'sizes': lambda: figures.size_figure(SimpleNamespace(layers=SIZE_LAYERS), {
        'free': dict(APs=10., APm=20., APl=None), 'expert 1': dict(APs=5., APm=float('nan'), APl=7.), 'other': {}}),
    'sizes_alone': lambda: figures.size_figure(SimpleNamespace(layers=SIZE_LAYERS[:2])),
    'usage': lambda: figures.usage_figure(USAGES),
    'by_class': lambda: figures.class_figure(BY_CLASS, ['cat', 'dog', 'owl']),
    'views': lambda: views_figure([('one', PAIRS), ('two', PAIRS)], PIXELS[:1] / 255),
}
TEXTS = {
    'paper_1col': lambda: _paper(3.25),
    'paper_2col': lambda: _paper(6.75),
    'paper': lambda: _paper_texts(),
    'redrawn': lambda: _redrawn(),
}


def _paper(width: float) -> list[str]:
    """Every figure for a paper, one after the other, in its style."""
    lines = []
    with figures.import_matplotlib().rc_context(paper_figures.STYLE):
        for drawing in paper.drawings_of(found_runs().runs):
            lines += [f'{drawing.name}: {drawing.caption}', *_describe(drawing.draw(width))]
    return lines


def _paper_texts() -> list[str]:
    """Index, table, numbers and looks of the same runs."""
    runs = found_runs().runs
    many = [*runs, *(dataclasses.replace(run, name=f'{run.name} {n}') for n in range(4) for run in runs[:3])]
    looks = paper_figures.looks_of(many, {run: run.name for run in many})
    rows = [', '.join(f'{key} {value}' for key, value in row.items()) for row in paper.table_rows(runs)]
    return [*paper.index(runs, paper.drawings_of(runs)).splitlines(), *paper.latex_table(runs).splitlines(), *rows,
            *(str((look, look.style)) for look in looks.values())]


def _redrawn() -> list[str]:
    """Charts of the page, drawn again for print."""
    with figures.import_matplotlib().rc_context(paper_figures.STYLE):
        return [line for name in ('curves_dashed', 'estimates', 'heat_map', 'strips')
                for line in _describe(paper_charts.redraw(DRAWINGS[name](), 3.25))]


def _experts(**changes):
    """The page of a small V-MoE on 22 digits, whose numbers tests/drawings/experts.json keeps."""
    result = json.loads((FOLDER / 'experts.json').read_text()) | changes
    pixels = torch.arange(22 * 16 * 16, dtype=torch.int32).remainder(251).to(torch.uint8).reshape(22, 1, 16, 16)
    return expert_page(result, pixels, [('commit', 'abc')])


def _many_experts():
    """Five layers of nine experts, the last three alike; fourteen classes, of which the chosen ones are not first."""
    result = json.loads((FOLDER / 'experts.json').read_text())
    layers = [_nine(layer) | {'layer': f'blocks.{n}.mlp'} for n, layer in enumerate(
        [*result['layers'], *reversed(result['layers']), result['layers'][0]])]
    layers[2]['experts'] = 40
    names = [layer['layer'] for layer in layers]
    shown = [place | {'layer': name} for place, name in zip(result['places'] * 2, names)]
    return _experts(layers=layers, drawn_layers=names, places=shown, corrupt=['a', 'b', 'c', 'd'],
                    chosen_classes=[3, 12], classes=[f'a class called {n}' for n in range(14)],
                    targets=[n % 14 for n in range(22)])


def _nine(layer):
    """The layer with its experts three times."""
    gates = layer['gates'] | {'by_class': _wide(layer['gates']['by_class'])}
    return layer | {
        'experts': 9, 'listed': list(range(9)), 'importance': [each / 3 for each in layer['importance']] * 3,
        'top_images': layer['top_images'] * 3, 'top_classes': layer['top_classes'] * 3,
        'top_places': layer['top_places'] * 3, 'grid': [4, 4], 'gates': gates,
        'classes': layer['classes'] | {'share': _wide(layer['classes']['share'])}}


def _wide(rows):
    """Fourteen rows of three times the columns, each row another one."""
    rows = [row for row in rows if row]
    return [[(value or 0) / 3 + .001 * n for value in rows[n % len(rows)]] * 3 for n in range(14)]


CLEAR = dict(  # what a trained model might have said
    trained=True, free=dict(accuracy=81.8, se=8.2),
    forced=dict(everywhere=[dict(expert=e, accuracy=a, se=9., difference=a - 81.8, difference_se=5.)
                            for e, a in enumerate((50., 78., 81.8))], layers={}),
    k=[dict(k=f'K = {k}', native=k == 2, accuracy=a, se=8., difference=a - 81.8, difference_se=4.)
       for k, a in ((1, 60.), (2, 81.8), (3, 80.))])
PAGES = {'experts': _experts, 'experts_clear': lambda: _experts(**CLEAR),
         'experts_many': _many_experts, 'runs': lambda: report_page(found_runs(), [('Written by', 'us')])}
MARKED = ('experts_many', 'runs')  # too large to keep their charts in full


def _numbers(values) -> str:
    return ' '.join(f'{value:.4g}' for value in np.asarray(values, dtype=float).flatten())


def _label(artist) -> str:
    return repr('' if artist.get_label().startswith('_') else artist.get_label())  # the others name themselves


def _describe(figure) -> list[str]:
    """What somebody put into a figure of matplotlib, without what its version decides."""
    from matplotlib.colors import to_hex
    from matplotlib.ticker import FixedLocator
    lines = [f'figure {_numbers(figure.get_size_inches())}']
    for axis in figure.axes:
        lines += [f'axis {axis.get_title()!r} {axis.get_xlabel()!r} {axis.get_ylabel()!r} shown {axis.axison} '
                  f'{_numbers([part.get_fontsize() for part in (axis.title, axis.xaxis.label, axis.yaxis.label)])}',
                  f'  x {_numbers(axis.get_xlim())}, y {_numbers(axis.get_ylim())}']
        chosen = [side for side in (axis.xaxis, axis.yaxis) if isinstance(side.get_major_locator(), FixedLocator)]
        lines += [f'  tick {_numbers(tick.get_position())} {tick.get_text()!r} {tick.get_fontsize():.4g} '
                  f'{tick.get_rotation():.0f} {tick.get_ha()}' for side in chosen for tick in side.get_ticklabels()]
        lines += [f'  box {_numbers(box.get_bbox().bounds)} {to_hex(box.get_facecolor(), True)} {_label(box)}'
                  for box in axis.patches]
        lines += [f'  line {_numbers(line.get_xdata())} / {_numbers(line.get_ydata())} {line.get_color()} '
                  f'{line.get_linestyle()} {line.get_marker()} {_label(line)} {line.get_markerfacecolor()} '
                  f'{_numbers([line.get_linewidth(), line.get_markersize(), line.get_zorder()])}'
                  for line in axis.lines]
        bands = [part for part in axis.collections if not hasattr(part, 'get_segments')]
        lines += [f'  band {_numbers(path.vertices)} {_numbers(band.get_facecolor())}'
                  for band in bands if axis.get_label() != '<colorbar>' for path in band.get_paths()]
        bars = [part for bars in axis.collections if hasattr(bars, 'get_segments') for part in bars.get_segments()]
        lines += [f'  bar {_numbers(part)}' for part in bars]
        lines += [f'  text {_numbers(text.get_position())} {text.get_text()!r} {text.get_fontsize():.4g}'
                  for text in axis.texts]
        for image in axis.images:
            shades = f'{_numbers(image.get_clim())} {image.get_cmap().name} ' if image.get_array().ndim == 2 else ''
            lines.append(f'  image {_numbers(image.get_extent())} {shades}{_numbers(image.get_array())}')
    return lines + [f'legend {[(text.get_text(), round(text.get_fontsize(), 2)) for text in legend.get_texts()]}'
                    for legend in figure.legends]


def _shape(found: re.Match) -> str:
    """Of a chart the words in it, and a mark of the rest, pictures aside, which other files show in full."""
    words = ' | '.join(re.findall(r'<(?:text|title)[^>]*>([^<]*)<', found[0]))
    pictures = ' '.join(_content(each) for each in re.finditer(r'data:\w+/(\w+);base64,([^"]*)', found[0]))
    rest = re.sub(r'data:[^"]*', '', found[0])
    return f'[{words} | {pictures} | {hashlib.sha256(rest.encode()).hexdigest()[:8]}]'


def _content(found: re.Match) -> str:
    """Of a data URI: JSON as it is; of a picture its size and a mark of its pixels, however they were packed."""
    content = base64.b64decode(found[2])
    if found[1] == 'json':
        return html.escape(content.decode())
    picture = Image.open(io.BytesIO(content))
    return f'{picture.mode} {picture.size} {hashlib.sha256(picture.tobytes()).hexdigest()[:8]}'


@pytest.fixture(autouse=True)
def away(tmp_path, monkeypatch):
    """Runs have folders."""
    monkeypatch.chdir(tmp_path)


def _kept(name: str, drawn: str) -> list[str]:
    """The lines of a file of drawings, which MOE_ZOO_REDRAW=1 writes anew."""
    path = FOLDER / name
    if os.environ.get('MOE_ZOO_REDRAW'):
        path.write_text(drawn, encoding='utf-8')
    return path.read_text(encoding='utf-8').splitlines()


@pytest.mark.parametrize('name', DRAWINGS)
def test_a_drawing_is_the_one_that_was_looked_at(name):
    drawn = DRAWINGS[name]().replace('><', '>\n<') + '\n'
    assert drawn.splitlines() == _kept(f'{name}.svg', drawn)


@pytest.mark.parametrize('name', FIGURES)
def test_a_figure_holds_what_was_looked_at(name):
    pytest.importorskip('matplotlib')
    drawn = '\n'.join(_describe(FIGURES[name]())) + '\n'
    assert drawn.splitlines() == _kept(f'{name}.txt', drawn)


@pytest.mark.parametrize('name', TEXTS)
def test_what_a_paper_takes_is_what_was_looked_at(name):
    pytest.importorskip('matplotlib')
    drawn = '\n'.join(TEXTS[name]()) + '\n'
    assert drawn.splitlines() == _kept(f'{name}.txt', drawn)


@pytest.mark.parametrize('name', PAGES)
def test_a_page_says_what_was_read(name):
    text = re.sub(r'<(style|script)>.*?</\1>|<link rel="icon".*?>', '', PAGES[name]().html(), flags=re.S)
    text = re.sub(r'<svg.*?</svg>', _shape, text, flags=re.S) if name in MARKED else text
    text = re.sub(r'data:\w+/(\w+);base64,([^"]*)', _content, text)
    drawn = text.replace('><', '>\n<')
    assert drawn.splitlines() == _kept(f'{name}.html', drawn)


def test_no_drawing_is_left_over():
    expected = {'experts.json', *(f'{name}.html' for name in PAGES)}
    expected |= {f'{name}.svg' for name in DRAWINGS} | {f'{name}.txt' for name in (*FIGURES, *TEXTS)}
    assert {path.name for path in FOLDER.iterdir()} == expected
