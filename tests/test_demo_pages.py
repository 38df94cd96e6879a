"""What the demonstration says of its results, of results that are made by hand: the arithmetic of its sentences."""
import re

import pytest

from moe_zoo.analysis.page import Figure
from moe_zoo.demo import digits, first, scenes
from moe_zoo.demo.run import Settings

PIXELS = b'\x89PNG'


@pytest.fixture
def settings(tmp_path):
    return Settings(tmp_path, 3, tmp_path, {}, {})


def drawn_in(figure):
    """The numbers written into the cells of a heat map."""
    return re.findall(r'"middle">([\d.]+)</text>', figure.image)


def model(name, top1, macs, **more):
    return dict(model=name, top1=top1, macs=macs, parameters=2_000_000, active_parameters=500_000, epochs=10,
                seconds=75., warnings=[], **more)


def test_a_large_model_stands_beside_its_twin(settings, tmp_path):
    rows = [{'name': 'big', 'parameters': 50_000_000, 'macs': 1_020_000_000, 'seconds': .05, 'output': (1, 10),
             'experts': 8},
            {'name': 'plain', 'parameters': 20_000_000, 'macs': 1_000_000_000, 'seconds': .02, 'output': (1, 10),
             'experts': 0}]
    result = {'input': [3, 8, 8], 'rows': rows, 'paper': {'title': 'A paper', 'arxiv': '1904.04971'}}
    headline, blocks = first.show_meet(settings, result, tmp_path)
    assert headline == (
        '`big` holds **2.5 times** the parameters of `plain` and costs **2.0 %** more multiply-adds an image.')
    stats, table, words, again = blocks
    assert stats.items[-1] == ('+2.0 %', 'MACs over the twin')
    assert table.rows == [['big', 50_000_000, 1_020_000_000, '50 ms', '1 x 10'],
                          ['plain', 20_000_000, 1_000_000_000, '20 ms', '1 x 10']]
    assert 'mixes 8 kernels' in words and '[A paper](https://arxiv.org/abs/1904.04971)' in words
    assert again.startswith('$ ') and again.endswith('big plain')


def test_photographs_are_named_by_their_likeliest_class(settings, tmp_path):
    rows = [{'file': f'{name}.jpg', 'classes': [f'{name}, a kind of it', 'thing, synonym'],
             'probabilities': [.75, .125]} for name in ('flower', 'temple')]
    for row in rows:
        (tmp_path / row['file']).write_bytes(row['file'].encode())
    headline, (flower, temple, words) = first.show_photos(settings, {'rows': rows, 'size': (3, 224, 256)}, tmp_path)
    assert headline == 'What it sees first: **flower** (75 %) and **temple** (75 %).'
    assert (flower.image, temple.image) == (b'flower.jpg', b'temple.jpg')
    assert flower.caption == '`flower.jpg`: flower 75 %, thing 12 %.' and 'at 224 x 256 pixels' in words


def test_a_training_stands_beside_that_of_its_twin(settings, tmp_path):
    result = {
        'recipe': 'r.yaml', 'options': {}, 'images': 200, 'experts': 4, 'keywords': {'img_size': 32, 'depth': 2},
        'model': {**model('routed', 95., 3e6), 'warnings': ['an expert died']}, 'twin': model('dense', 94.5, 2e6)}
    headline, (table, words, warning, again) = digits.show_learn(settings, result, tmp_path)
    assert headline == ('`routed` with 4 experts reads **95.0 %** of 200 unseen digits right; its dense twin, trained '
                        'on the same batches, 94.5 %.')
    assert [row[:2] + row[-2:] for row in table.rows] == [
        ['routed', '95.00 %', 10, '1 min 15 s'], ['dense twin (dense)', '94.50 %', 10, '1 min 15 s']]
    assert table.caption == 'Seed 3, final epoch. One test image is 0.50 %.'
    assert words.startswith('Built with `img_size=32`, `depth=2`.')
    assert warning == '**Warning while training:** an expert died' and again.endswith('--twin seed=3')


def test_classifiers_are_compared_with_their_own_twins(settings, tmp_path):
    results = {key: {'images': 100, 'model': model(key, *of_model), 'twin': model(f'{key} twin', *of_twin)}
               for key, of_model, of_twin in (('a', (90., 3e6), (88., 2e6)), ('b', (85., 1e6), (86.5, 4e6)))}
    result = digits.compare(settings, tmp_path, results)
    assert [(row['model'], row['routed']) for row in result['rows']] == [
        ('a', True), ('a twin', False), ('b', True), ('b twin', False)]
    headline, (chart, words) = digits.show_compare(settings, result, tmp_path)
    assert headline == (
        'Over the dense twin: `a` +2.0 points at 1.50 times the MACs; `b` -1.5 points at 0.25 times the MACs.')
    assert chart.alt.startswith('a: 3.0 million MACs, 90.0 %; a twin: 2.0 million MACs, 88.0 %; b: 1.0 ')
    # Of the best, 90 of 100: the root of .9 * .1 / 100 is 3 points.
    assert 'at 90.0 % right, an accuracy has a standard error of 3.0 points' in words
    for row in result['rows']:
        row['top1'] = 100.  # no standard error of nothing: as if one of 100 were wrong, the root of .99 * .01 / 100
    assert 'at 99.0 % right, an accuracy has a standard error of 1.0 points' in digits.show_compare(
        settings, result, tmp_path)[1][1]


def test_the_experts_of_digits_are_counted(settings, tmp_path):
    """Of five experts in three layers one is dead; expert 1 of the last has 3/4 of the weight in digit 1."""
    def layer(name, share, mass, living):
        return {'layer': name, 'share': share, 'class_mass': mass, 'living': living, 'entropy': .5, 'dropped': .125}
    models = [
        {'model': 'm', 'images': 20, 'layers': [layer('early', [1., 0.], [[1., 0.], [1., 0.]], 1),
                                                layer('late', [.5, .5], [[.5, .5], [.25, .75]], 2)]},
        {'model': 'n', 'images': 20, 'layers': [layer('one', [1.], [[1.], [1.]], 1)]}]
    headline, blocks = digits.show_use(settings, {'models': models}, tmp_path)
    # The closest pair is relative to the fair share: all of one of two experts, not all of the only one.
    assert headline == (
        '**4 of 5** experts carry more than 1 % of the weight of their layer. The closest pair: expert 0 of `early` in '
        '`m` carries 100 % of it in images of a **1**.')
    assert blocks[0] == '**`m`** on 20 test digits'
    assert blocks[1].alt.endswith('early: 100 %, 0 %; late: 50 %, 50 %')
    assert drawn_in(blocks[2]) == ['50', '50', '25', '75']  # of the last layer
    assert blocks[-1].rows[1] == ['late', 'm', 2, 2, '0.500', '12.5 %']


def test_found_digits_are_told_with_the_experts_at_work(settings, tmp_path):
    (tmp_path / 'found.png').write_bytes(PIXELS)
    metrics = {name: None for name in scenes.METRICS} | {'AP50': 61.5}
    result = {
        'metrics': metrics, 'scenes': {'train': 8, 'val': 4}, 'experts': 4, 'parameters': 2_000_000,
        'active_parameters': 1_000_000, 'macs': 3_000_000, 'size': [192, 160], 'depth': 18, 'width': 8, 'pyramid': 16,
        'classes': 5, 'selected': 2, 'steps': 100, 'batch': 4, 'config': 'c.yaml', 'weights': 'w.pth',
        'pictures': [{'file': 'found.png', 'found': 3, 'layer': 'res5', 'experts': [.75, 0., .25, 0.]}]}
    headline, (stats, table, picture, words, again) = scenes.show_detect(settings, result, tmp_path)
    assert headline.endswith('stage is 4 experts finds digits in unseen scenes with **AP50 61.5 %**.')
    assert [value for value, _ in stats.items] == ['61.5 %', '2.0 M', '1.0 M', '3.0 M']
    assert [row[2] for row in table.rows] == ['–', '61.5 %', '–', '–', '–', '–']
    assert table.caption == '4 test scenes of 192 x 160 pixels; trained on 8, from random weights, seed 3.'
    assert picture == Figure(
        PIXELS, 'A scene of digits. 3 digits found with a score above 0.5; experts 0 (75 %) and 2 (25 %) at work.',
        '3 digits found with a score above 0.5; experts 0 (75 %) and 2 (25 %) at work.')
    assert '4 experts of which 2 serve an image' in words and again.endswith('--config-file c.yaml MODEL.WEIGHTS w.pth')
    assert scenes.finite(float('nan')) is None and scenes.finite(3.) == 3


@pytest.mark.parametrize('separates, told', [(True, '**separate**'), (False, 'do **not** separate')])
def test_sizes_are_told_with_their_controls(separates, told, settings, tmp_path):
    layer = {'name': 'res5', 'expert_p': [.1, .2], 'mass': {'small': [.75, .25], 'medium': None, 'large': [.5, .5]}}
    result = {
        'analysis': {'objects': {'small': 2, 'medium': 0, 'large': 1}, 'layers': [layer], 'separates': separates,
                     'alpha': .01, 'images': 3, 'permutations': 999, 'shuffles': 199},
        'ap': {'free': {'APs': 12.5, 'APm': None, 'APl': 50.}}, 'verdicts': ['yes or no'], 'controls': ['as it must'],
        'config': 'c.yaml', 'weights': 'w.pth'}
    headline, (mass, precision, words, verdict, control, again) = scenes.show_sizes(settings, result, tmp_path)
    assert headline == f'Its experts {told} object sizes.'
    assert drawn_in(mass) == ['75.0', '0.0', '50.0', '25.0', '0.0', '50.0']  # no medium object: none of the mass
    assert mass.caption.endswith('% (2 small, 0 medium, 1 large).')
    assert drawn_in(precision) == ['12.5', '0.0', '50.0']
    assert 'two tests agree at 0.01' in words and 'among the 3 scenes (999 times)' in words and '(199 times)' in words
    assert (verdict, control) == ('`res5`: yes or no', 'as it must')
    assert again.endswith('--config-file c.yaml --weights w.pth')
