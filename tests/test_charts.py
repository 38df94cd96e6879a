"""Charts of the page: where marks land, what is said in words, colours that follow the page."""
import re
import xml.etree.ElementTree as ElementTree

import pytest

from moe_zoo.analysis.charts import (
    WIDTH,
    Mark,
    curves,
    estimates,
    expert_colour,
    grid_map,
    heat_map,
    histogram,
    intervals,
    pictures,
    ratios,
    scatter,
    share_bars,
    strips,
    ticks,
    trade_offs,
)
from moe_zoo.errors import InputError

SVG = '{http://www.w3.org/2000/svg}'


def drawn(svg, tag):
    return [element for element in ElementTree.fromstring(svg).iter(SVG + tag)]


def words(svg):
    return [element.text for element in drawn(svg, 'text')]


@pytest.mark.parametrize('low, high, expected', [
    (95.3, 99.4, [95, 96, 97, 98, 99, 100]),  # a span of 4.1: step 2 would give 3 intervals, step 1 gives 5
    (0, 1, [0, .5, 1]),
    (97, 97, None),
])
def test_ticks_enclose_and_are_round(low, high, expected):
    marks = ticks(low, high)
    assert marks[0] <= low and high <= marks[-1] and len(marks) >= 2
    steps = {round(b - a, 12) for a, b in zip(marks, marks[1:])}
    assert len(steps) == 1 or expected is None
    if expected is not None and len(expected) == len(marks):
        assert marks == pytest.approx(expected)


def test_scatter_is_logarithmic_in_x_and_linear_in_y():
    svg = scatter([('a', 10, 0, True), ('b', 100, 5, False), ('c', 1000, 10, False)], 'MACs', 'accuracy')
    circles = drawn(svg, 'circle')
    x, y = ([float(c.get(k)) for c in circles] for k in ('cx', 'cy'))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=.2) and x[0] < x[1]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=.2) and y[0] > y[1]
    assert [c.get('fill') for c in circles] == ['var(--accent)', 'var(--card)', 'var(--card)']
    assert {'a', 'b', 'c', 'MACs', 'accuracy', '10', '100', '1000'} <= set(words(svg))


def test_names_of_close_points_do_not_cover_each_other():
    names = ['condconv_resnet18', 'resnet18', 'the third one']
    points = [(name, 38 + i / 10, 99.4 - i / 100, True) for i, name in enumerate(names)]
    svg = scatter([*points, ('low', 38, 95, False)], 'x', 'y')
    boxes = [
        (float(t.get('x')), float(t.get('y')), float(t.get('x')) + 7 * len(t.text))
        for t in drawn(svg, 'text') if t.text in names
    ]
    assert len(boxes) == 3
    for i, a in enumerate(boxes):
        assert 0 <= a[0] and a[2] <= WIDTH + 1
        for b in boxes[i + 1:]:
            assert a[2] < b[0] or b[2] < a[0] or abs(a[1] - b[1]) >= 13


def test_scatter_refuses_what_a_logarithm_cannot_take():
    with pytest.raises(InputError, match='at least one point, and x above 0'):
        scatter([('a', 0, 1, True)], 'x', 'y')
    with pytest.raises(InputError, match='at least one point'):
        scatter([], 'x', 'y')


def test_share_bars_are_as_wide_as_the_shares():
    svg = share_bars([('layer<1>', [.25, .75]), ('layer2', [.5, .25, .25])])
    bars = [r for r in drawn(svg, 'rect') if r.get('height') == '20']
    assert [float(r.get('width')) for r in bars] == pytest.approx(
        [WIDTH / 4 - 1, WIDTH * 3 / 4 - 1, WIDTH / 2 - 1, WIDTH / 4 - 1, WIDTH / 4 - 1])
    assert [float(r.get('x')) for r in bars] == pytest.approx([0, WIDTH / 4, 0, WIDTH / 2, WIDTH * 3 / 4])
    assert drawn(svg, 'title')[1].text == 'layer<1>, expert 1: 75.0 %'
    assert words(svg) == ['layer<1>', 'layer2', 'expert 0', '1', '2']  # the legend names the most experts


def test_heat_map_shades_by_the_largest_value_and_writes_the_numbers():
    svg = heat_map(['0', '1'], ['0', '1', '2'], [[0, 10, 40], [20, 20, 0]], 'digit', 'expert')
    shades = [float(r.get('fill-opacity')) for r in drawn(svg, 'rect')]
    assert shades == [0, .12, .5, .25, .25, 0]  # half of value / 40; 0.125 is written with two digits
    assert words(svg).count('20') == 2 and {'digit', 'expert', '40'} <= set(words(svg))


def test_histogram_bars_are_as_high_as_the_shares():
    svg = histogram([1, 3, 0, 0], 'gate')  # 25 and 75 %
    heights = [float(r.get('height')) for r in drawn(svg, 'rect')]
    assert heights[1] == pytest.approx(3 * heights[0], abs=.2) and heights[2:] == [0, 0]
    assert drawn(svg, 'title')[1].text == '0.25 to 0.50: 75.0 %' and {'gate', 'share, %'} <= set(words(svg))


def test_estimates_reach_two_standard_errors_to_either_side():
    svg = estimates([('a', 50, 5), ('b', 70, 0)], 'accuracy', ('free', 60))
    a, b = (float(c.get('cx')) for c in drawn(svg, 'circle'))
    line, none = [e for e in drawn(svg, 'line') if e.get('stroke') == 'var(--accent)']
    free, = [e for e in drawn(svg, 'line') if e.get('stroke-dasharray')]
    unit = (b - a) / 20  # of one percent
    assert float(line.get('x2')) - a == pytest.approx(10 * unit, abs=.2) == a - float(line.get('x1'))
    assert none.get('x1') == none.get('x2') and float(free.get('x1')) == pytest.approx((a + b) / 2, abs=.1)
    assert {'a', 'b', 'free 60.0', 'accuracy'} <= set(words(svg))


def test_strips_have_a_scale_of_their_own():
    svg = strips([('first', [[.2, .4], [.1, 0]]), ('last', [[2, 1], [0, 4]])], ['cat', 'dog'], ['0', '1'], 'expert')
    dots = drawn(svg, 'circle')
    height = [float(d.get('cy')) for d in dots]
    # In the first strip .4 is the top, in the last 4: half of it lies half way.
    assert height[0] == pytest.approx((height[1] + height[3]) / 2) and height[4] == pytest.approx(
        (height[6] + height[7]) / 2)
    assert [d.get('fill') for d in dots[:4]] == ['var(--expert-0)'] * 2 + ['var(--expert-1)'] * 2
    assert {'first', 'last', 'cat', 'dog', 'expert', '0.4', '4'} <= set(words(svg))


def test_pictures_carry_their_bytes_and_colours():
    grid = [['var(--expert-1)', 'var(--expert-1)', None], ['var(--expert-0)', None, None]]
    svg = pictures([('a', b'\x89PNG', None), ('b', b'\xff\xd8', grid)], 2, [('expert 0', 'var(--expert-0)')], ratio=.5)
    first, second = drawn(svg, 'image')
    assert first.get('href').startswith('data:image/png;base64,iVBORw') and 'image/jpeg' in second.get('href')
    assert float(first.get('height')) == pytest.approx(float(first.get('width')) / 2)
    cells = [r for r in drawn(svg, 'rect') if r.get('fill-opacity')]
    width = float(first.get('width')) / 3
    # Neighbours of one colour are one rectangle: two and one in the first row, one and two in the second.
    assert [float(r.get('width')) for r in cells] == pytest.approx([2 * width, width, width, 2 * width], abs=.1)
    assert [r.get('fill') for r in cells] == ['var(--expert-1)', 'var(--card)', 'var(--expert-0)', 'var(--card)']
    assert words(svg) == ['a', 'b', 'expert 0']


def test_every_colour_is_one_of_the_page():
    svgs = [scatter([('a', 1, 1, True)], 'x', 'y'), share_bars([('l', [.1] * 10)]), heat_map(['a'], ['b'], [[1]])]
    for svg in svgs:
        fills = re.findall(r'(?:fill|stroke)="([^"]+)"', svg)
        assert all(f == 'currentColor' or f.startswith('var(--') for f in fills)
    assert expert_colour(0) == expert_colour(8) == 'var(--expert-0)'


@pytest.mark.parametrize('log, third', [(True, 1000), (False, 190)])
def test_curves_join_the_points_of_a_line_in_its_colour(log, third):
    """Equal ratios are equal steps on a logarithmic axis, equal differences on a linear one."""
    lines = [('narrow', [(10, 1), (100, 2), (third, 3)]), ('wide', [(20, 4)])]
    svg = curves(lines, 'MACs', 'accuracy', log=log)
    first, second = drawn(svg, 'polyline')
    points = [tuple(map(float, point.split(','))) for point in first.get('points').split()]
    assert points[1][0] - points[0][0] == pytest.approx(points[2][0] - points[1][0], abs=.2)
    assert points[0][1] > points[1][1] > points[2][1]
    assert (first.get('stroke'), second.get('stroke')) == (expert_colour(0), expert_colour(1))
    assert len(drawn(svg, 'circle')) == 4
    assert {'narrow', 'wide', 'MACs', 'accuracy'} <= set(words(svg))


def test_curves_show_deviations():
    svg = curves([('a', [(1, 10, 2), (2, 30, 5)]), ('b', [(1, 20)])], 'x', 'y', log=False)
    bars = [line for line in drawn(svg, 'line') if 'stroke-opacity' in line.attrib]
    heights = [float(bar.get('y1')) - float(bar.get('y2')) for bar in bars]
    points = [float(c.get('cy')) for c in drawn(svg, 'circle')]
    scale = (points[0] - points[1]) / 20  # of the points 10 and 30
    assert heights == pytest.approx([4 * scale, 10 * scale], abs=.2)
    assert min(float(bar.get('y2')) for bar in bars) > 0  # 35 is inside


def test_names_of_many_curves_stay_inside():
    svg = curves([(f'a line with the name {i}', [(1, i)]) for i in range(5)], 'x', 'y', log=False)
    places = [(float(r.get('x')), float(r.get('y'))) for r in drawn(svg, 'rect')]
    assert len(set(places)) == 5
    assert all(x + 17 + 7.5 * 22 <= WIDTH + 60 for x, _ in places)
    height = float(ElementTree.fromstring(svg).get('viewBox').split()[3])
    assert max(y for _, y in places) + 12 < height


@pytest.mark.parametrize('lines, log', [([], False), ([('a', [(0, 1)])], True)])
def test_curves_refuse_what_cannot_be_drawn(lines, log):
    with pytest.raises(InputError, match='a chart needs at least one point'):
        curves(lines, 'x', 'y', log=log)


def test_intervals_show_every_value_and_the_mean():
    svg = intervals([('a', [0, 10]), ('b', [5])], 'accuracy, %')
    dots = [float(c.get('cx')) for c in drawn(svg, 'circle')]
    bars = [float(r.get('x')) + 1.5 for r in drawn(svg, 'rect')]
    assert bars == pytest.approx([(dots[0] + dots[1]) / 2, dots[2]], abs=.2) and dots[0] < dots[2] < dots[1]
    assert bars[0] == pytest.approx(bars[1], abs=.2)  # both means are 5
    assert {'a', 'b', '0', '5', '10', 'accuracy, %'} <= set(words(svg))


def test_a_way_lies_on_its_cells_in_the_colours_of_its_experts():
    fills = [['', 'red', 'red', 'blue'], ['', '', 'red', '']]
    svg = grid_map(fills, [(1, 3, 'b')], [(0, 0, 1), (1, 1, 1), (1, 2, 0)], ['depth', 'semantics', 'edges'])
    side = WIDTH / 4
    boxes = [(float(r.get('x')), float(r.get('y')), r.get('fill')) for r in drawn(svg, 'rect')][:3]
    assert boxes == [(side, 0, 'red'), (3 * side, 0, 'blue'), (2 * side, side, 'red')]  # two red cells are one box
    dots = [(float(c.get('cx')), float(c.get('cy')), c.get('fill')) for c in drawn(svg, 'circle')]
    assert dots == [(side / 2, side / 2, expert_colour(1)), (1.5 * side, 1.5 * side, expert_colour(1)),
                    (2.5 * side, 1.5 * side, expert_colour(0)), (side / 2, side / 2, 'none')]  # the ring at the start
    assert words(svg) == ['b', 'depth', 'semantics']  # edges is not on the way


def test_trade_offs_differ_in_shape_and_fill_and_join_twins():
    marks = [Mark('moe', 10, 80, 0, x_range=(9, 12), y_half=1.), Mark('dense', 8, 79, 0, True), Mark('other', 9, 70, 1)]
    svg = trade_offs(marks, [(1, 0)], ['moe', 'other'], 'million MACs', 'accuracy, %')
    shapes = drawn(svg, 'path')
    assert len(shapes) == 3 + 2  # and the legend
    moe, dense, other = shapes[:3]
    assert moe.get('d') == dense.get('d') != other.get('d') and moe.get('stroke') == dense.get('stroke')
    assert moe.get('fill') == moe.get('stroke') and dense.get('fill') == 'var(--card)'
    assert moe.find(SVG + 'title').text == 'moe: 10, 80.0'
    x, y = (float(number) for number in re.fullmatch(r'translate\((\S+) (\S+)\)', moe.get('transform')).groups())
    joint, = [line for line in drawn(svg, 'line') if line.get('stroke-dasharray')]
    assert (float(joint.get('x2')), float(joint.get('y2'))) == (x, y)
    across, upright = [line for line in drawn(svg, 'line') if line.get('stroke') == 'var(--expert-0)'
                       and not line.get('stroke-dasharray')]
    assert float(across.get('x1')) < x < float(across.get('x2')) and across.get('y1') == across.get('y2') == f'{y:.1f}'
    assert float(upright.get('y1')) - y == pytest.approx(y - float(upright.get('y2')), abs=.11)
    assert {'million MACs', 'accuracy, %', 'moe', 'other'} <= set(words(svg))


@pytest.mark.parametrize('most, logarithmic', [(30, False), (31, True)])
def test_trade_offs_are_logarithmic_where_costs_are_far_apart(most, logarithmic):
    middle = 17.6  # about the geometric mean of 10 and 31, far from their arithmetic mean
    svg = trade_offs([Mark('', x, 50, 0) for x in (10, middle, most)], [], ['a'], 'x', 'y')
    places = [float(re.match(r'translate\((\S+) ', path.get('transform'))[1]) for path in drawn(svg, 'path')[:3]]
    share = (places[1] - places[0]) / (places[2] - places[0])
    assert share == pytest.approx(.5 if logarithmic else (middle - 10) / (most - 10), abs=.01)


def test_one_point_still_has_an_axis_with_different_numbers():
    svg = trade_offs([Mark('a', 5, 33.3, 0)], [], ['a'], 'x', 'y')
    numbers = [word for word in words(svg) if re.fullmatch(r'\d\d\.\d', word or '')]
    assert len(numbers) >= 2 and len(set(numbers)) == len(numbers)


def test_an_accuracy_of_a_hundred_ends_the_axis():
    svg = trade_offs([Mark('a', 5, 99.8, 0, y_half=3.), Mark('b', 5, 60, 1)], [], ['a', 'b'], 'x', 'y', most=100)
    numbers = [float(word) for word in words(svg) if re.fullmatch(r'\d+\.0', word or '')]
    assert max(numbers) == 100
    bar, = [line for line in drawn(svg, 'line') if line.get('stroke') == 'var(--expert-0)']
    assert bar.get('y2') == '14.0'  # the upper end of the plane, not above it


def test_trade_offs_refuse_what_is_no_cost():
    with pytest.raises(InputError, match='at least one point, and costs above 0'):
        trade_offs([Mark('a', 0, 1, 0)], [], ['a'], 'x', 'y')
    with pytest.raises(InputError, match='at least one point'):
        trade_offs([], [], [], 'x', 'y')


def test_forty_series_differ():
    svg = trade_offs([Mark('', 1, 1, n) for n in range(40)], [], [], 'x', 'y')
    assert len({(path.get('d'), path.get('stroke')) for path in drawn(svg, 'path')}) == 40


def test_dashed_curves_keep_the_colour_of_their_series_and_reach_the_span():
    lines = [('moe', [(1, .97), (2, .99)]), ('dense', [(1, .98), (2, .99)])]
    svg = curves(lines, 'epochs', 'evenness', '{:.2f}', log=False, series=[3, 3], dashed=[1], span=(.5, 1.))
    moe, dense = drawn(svg, 'polyline')
    assert moe.get('stroke') == dense.get('stroke') == expert_colour(3)
    assert moe.get('stroke-dasharray') is None and dense.get('stroke-dasharray')
    assert '0.40' in words(svg)  # the tick that encloses .5
    filled, hollow = drawn(svg, 'rect')
    assert filled.get('fill') == expert_colour(3) and hollow.get('fill') == 'none'


def test_long_curves_have_no_dots():
    assert len(drawn(curves([('a', [(n, n) for n in range(1, 41)])], 'x', 'y'), 'circle')) == 40
    assert not drawn(curves([('a', [(n, n) for n in range(1, 42)])], 'x', 'y'), 'circle')


def test_a_heat_map_of_many_columns_names_some_and_shows_numbers_beside_the_pointer():
    svg = heat_map(['layer'], [str(n) for n in range(64)], [[1.] * 63 + [None]])
    cells = drawn(svg, 'rect')
    assert len(cells) == 63 and cells[5].find(SVG + 'title').text == 'layer, 5: 1'
    # 440 - 67.5 units for 64 columns are 5.8 each: every fourth is named
    assert [word for word in words(svg) if word != 'layer'] == [str(n) for n in range(0, 64, 4)]


def test_names_of_a_heat_map_keep_to_their_room():
    def labels(*names, rows=('0',)):
        svg = heat_map(rows, names, [[1.] * len(names)] * len(rows), '', '')
        return {text.text: float(text.get('x')) for text in drawn(svg, 'text')}, drawn(svg, 'title')

    # 440 - 37.5 units for 3 columns are 134 each: 17 letters of 7.5
    found, titles = labels('room', 'w' * 17, 'passage between two')
    assert {'room', 'w' * 17, 'passage between…'} < set(found) and found['passage between…'] == pytest.approx(372.9)
    assert [title.text for title in titles] == ['passage between two']
    # 3.8 units a column: every eighth of three letters, 22.5 and 6 to part them; the last one stays inside
    found, _ = labels(*map(str, range(105)))
    assert set(found) == set(map(str, range(0, 105, 8))) and found['104'] == pytest.approx(440 - 11.25, abs=.1)
    # names of rows have half of the chart, without 30 for the label beside them: 25 letters
    found, titles = labels('a', rows=('x' * 25, 'y' * 26))
    assert {'x' * 25, 'y' * 24 + '…'} < set(found) and titles[0].text == 'y' * 26


def test_ratios_stand_around_their_median_with_the_one_they_aim_at():
    svg = ratios({'a model': [('forward', [1., 2., 1.5], 1.25), ('step', [1.], None)]}, 'time')
    x = [float(circle.get('cx')) for circle in drawn(svg, 'circle')]
    assert x[2] == pytest.approx((x[0] + x[1]) / 2, abs=.1) and x[3] == x[0]
    bars = [(float(bar.get('x')) + float(bar.get('width')) / 2, bar.get('fill')) for bar in drawn(svg, 'rect')]
    expected = [(x[2], 'var(--accent)'), ((x[0] + x[2]) / 2, 'var(--bad)'), (x[0], 'var(--accent)')]
    assert [fill for _, fill in bars] == [fill for _, fill in expected]
    assert [at for at, _ in bars] == pytest.approx([at for at, _ in expected], abs=.1)
    broken, = [line for line in drawn(svg, 'line') if line.get('stroke-dasharray')]
    assert float(broken.get('x1')) == x[0]  # the line of 1
    assert {'a model', 'forward', 'step', 'time'} <= set(words(svg))
