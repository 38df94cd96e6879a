"""Every chart as it was when somebody looked at it: tests/drawings/ has the files, letter by letter.

Where ink goes is nothing to compute by hand; that it moved should be seen. After a change that is meant,
`MOE_ZOO_REDRAW=1 .venv/bin/python -m pytest tests/test_drawings.py` writes the files anew: look at them (a browser
shows them without the colours of the page), and commit them with the change.
"""
import os
from pathlib import Path

import pytest

from moe_zoo.analysis import charts
from moe_zoo.analysis.charts import Mark

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


@pytest.mark.parametrize('name', DRAWINGS)
def test_a_drawing_is_the_one_that_was_looked_at(name):
    drawn, path = DRAWINGS[name](), FOLDER / f'{name}.svg'
    drawn = drawn.replace('><', '>\n<') + '\n'
    if os.environ.get('MOE_ZOO_REDRAW'):
        path.write_text(drawn, encoding='utf-8')
    assert drawn.splitlines() == path.read_text(encoding='utf-8').splitlines()


def test_no_drawing_is_left_over():
    assert {path.stem for path in FOLDER.glob('*.svg')} == set(DRAWINGS)
