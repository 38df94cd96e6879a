"""The object-size analysis in words, tables and charts, of results that are made by hand."""
import copy
import re
from dataclasses import replace

import numpy as np
import pytest

from moe_zoo.analysis.object_sizes import LayerSizes, SizeAnalysis
from moe_zoo.analysis.page import Figure, Stats, Table
from moe_zoo.analysis.size_page import control_sentence, matches_by_expert, size_section, trial_table

NAN = float('nan')
# Three small objects and a large one, that no expert took: of the small ones, two are expert 0's and one expert 1's.
SIZES = np.array([0, 0, 0, 2])
GATES = np.array([[.9, .1], [.9, .1], [.3, .7], [0., 0.]])
LAYER = LayerSizes(
    name='router', kind='place', mass=np.array([[.7, .3], [NAN, NAN], [0., 0.]]),
    half=np.array([[.05, .05], [NAN, NAN], [NAN, NAN]]), leads=np.array([[2, 1], [0, 0], [0, 0]]),
    expert_p=np.array([.004, 1.]), separation=.25, explained=.4, explained_by_chance=.015, chance_p=.002,
    untrained_separation=.1, untrained_high=.2, thinned_separation=.25, untrained_p=.004, separates=True,
    curve=[(100., np.array([.7, .3]), np.array([.05, .05])), (10000., np.array([.2, .8]), np.array([.1, .1]))],
    gates=GATES)
ANALYSIS = SizeAnalysis(
    [LAYER], {'small': 3, 'medium': 0, 'large': 1}, images=2, alpha=.01, permutations=999, shuffles=199, seed=0,
    skipped={'gate': 'its record has shape (1,)'})
AP = {
    'free': {'AP': 50., 'APs': 40., 'APm': None, 'APl': 60., 'AP50': 70., 'AR': 55.},
    'expert 0': {'AP': 40., 'APs': 39.5, 'APl': 10.}, 'expert 1': {'AP': 20., 'APs': None, 'APl': 61.}}


def content(*layers, ap=AP, controls=(), **changes):
    """As object_sizes.json holds it."""
    analysis = replace(ANALYSIS, layers=list(layers) or [LAYER], **changes)
    return {
        'sizes': copy.deepcopy(analysis.as_dict()), 'ap': ap, 'passes': len(ap),
        'matches': matches_by_expert(LAYER, SIZES, np.array([True, False, True, False])),
        'controls': {name: {'sentence': name} for name in controls}, 'seconds': {'all': 12.}}


def of_kind(kind, section):
    return [block for block in section.blocks if isinstance(block, kind)]


def test_objects_are_counted_by_the_expert_that_leads_them():
    found = matches_by_expert(LAYER, SIZES, np.array([True, False, True, False]))
    assert found == {'layer': 'router', 'rows': [
        {'expert': 0, 'objects': {'small': 2, 'medium': 0, 'large': 0},
         'found': {'small': 1, 'medium': 0, 'large': 0}},
        {'expert': 1, 'objects': {'small': 1, 'medium': 0, 'large': 0},
         'found': {'small': 1, 'medium': 0, 'large': 0}},
        {'expert': -1, 'objects': {'small': 0, 'medium': 0, 'large': 1},
         'found': {'small': 0, 'medium': 0, 'large': 0}}]}
    led = replace(LAYER, gates=GATES[:3])  # where all are led, no row for none
    assert [row['expert'] for row in matches_by_expert(led, SIZES[:3], np.ones(3, bool))['rows']] == [0, 1]


def test_a_section_tells_shares_trials_and_matches():
    section = size_section(content(controls=['untrained']), command='$ make it again')
    assert (section.status, section.seconds) == ('done', 12.)
    assert section.headline == (
        'Experts **separate** object sizes: in `router` size explains 40 % of the variance of the gates among objects '
        '(1.5 % by chance), separation 0.250 where shuffled routers have 0.100.')
    assert of_kind(Stats, section)[0].items == [
        ('3', 'small objects'), ('0', 'medium objects'), ('1', 'large objects'), ('2', 'images with objects')]
    mass, trials, matches = of_kind(Table, section)
    assert mass.columns == ['', 'small (3)', 'medium (0)', 'large (1)', 'p (chance)']
    assert mass.rows == [
        ['expert 0', '70.0 ± 5.0 % (2)', None, '0.0 ± ? % (0)', '0.004'],
        ['expert 1', '30.0 ± 5.0 % (1)', None, '0.0 ± ? % (0)', '1.000'],
        ['no one', '0.0 %', None, '100.0 %', None]]
    none = [None] * 3
    assert trials.rows == [
        ['free', '50.0', '40.0', None, '60.0', '70.0', *none, '55.0', *none],
        ['expert 0', '40.0', '39.5', None, '10.0', *none, None, *none, None],
        ['expert 1', '20.0', None, None, '61.0', *none, None, *none, None]]
    assert trials.caption.endswith('3 evaluations in all.')
    assert matches.rows == [
        ['expert 0', 2, '50 % of 2', '50 % of 2', None, None], ['expert 1', 1, '100 % of 1', '100 % of 1', None, None],
        ['no one', 1, '0 % of 1', None, None, '0 % of 1']]
    assert section.blocks[-2:] == ['untrained', '$ make it again']
    words = '\n'.join(block for block in section.blocks if isinstance(block, str))
    assert '**`router`.** An object has the mean gate vector of the places inside its box.' in words
    assert 'Not analysed: `gate`, because its record has shape (1,).' in words
    assert 'two tests agree at 0.01' in words and '(999 times;' in words and 'with 199 versions' in words


def test_a_section_draws_shares_curves_and_losses():
    mass, curve, lost = of_kind(Figure, size_section(content()))
    assert re.findall(r'>(\d+\.\d)<', mass.image) == ['70.0', '0.0', '30.0', '0.0']
    # Curves run over the side of an object: areas of 100 and 10000 square pixels are 10 and 100.
    assert 'expert 0: 10, 70<' in curve.image and 'expert 1: 100, 80<' in curve.image
    assert curve.alt.endswith('expert 0: 70 % to 20 %; expert 1: 30 % to 80 %.')
    # 40 - 39.5 and 60 - 10 points with expert 0; with 1 all of 40, since nothing small was found, and none of 61.
    assert re.findall(r'>(\d+\.\d)<', lost.image) == ['0.5', '50.0', '40.0', '0.0']
    assert len(of_kind(Figure, size_section(content(replace(LAYER, curve=[]), ap={'free': AP['free']})))) == 1


def test_of_many_experts_those_that_move_are_drawn_and_of_many_layers_the_strongest():
    small = np.array([.1] * 10)
    large = small + np.array([.09, 0, .08, -.07, .06, .01, -.05, .04, -.11, -.05])  # experts 1 and 5 move least
    many = replace(
        LAYER, name='wide', mass=np.stack([small, np.full(10, NAN), large]), half=np.full((3, 10), NAN),
        leads=np.zeros((3, 10), int), expert_p=np.ones(10), curve=[], separation=.5, untrained_separation=None,
        untrained_p=None, separates=None)
    layers = [many, *(replace(LAYER, name=f'layer {i}', separation=i / 10, separates=False) for i in range(3))]
    section = size_section(content(*layers))
    assert section.headline == (
        'Experts do **not** separate object sizes more than chance and architecture make them: in `wide` size explains '
        '40 % of the variance of the gates among objects (1.5 % by chance).')
    wide, second, third, all_layers, *_ = of_kind(Table, section)
    assert [row[0] for row in wide.rows] == [f'expert {e}' for e in (0, 2, 3, 4, 6, 7, 8, 9)]
    assert any('8 of 10 experts are drawn, those whose mass differs most.' in block for block in section.blocks
               if isinstance(block, str))
    drawn = [block.split('`')[1] for block in section.blocks if str(block).startswith('**`')]
    assert drawn == ['wide', 'layer 2', 'layer 1']
    assert all_layers.rows == [
        ['wide', .5, .002, None, 'no verdict'], ['layer 0', 0., .002, .004, 'no'], ['layer 1', .1, .002, .004, 'no'],
        ['layer 2', .2, .002, .004, 'no']]


def test_gates_that_never_vary_are_said():
    section = size_section(content(replace(LAYER, explained=None, explained_by_chance=None, separates=False)))
    assert section.headline.endswith('than chance and architecture make them: all objects have the same gates.')


def test_pictures_come_with_the_layer_that_colours_them():
    section = size_section(content(), [('scene.png', b'\x89PNG', 'Two cells.')])
    words, picture = section.blocks[-2:]
    assert 'the expert of `router` that leads them' in words
    assert picture == Figure(b'\x89PNG', 'A scene with boxes. Two cells.', 'Two cells.')


@pytest.mark.parametrize('name, separates, outcome', [
    ('untrained', False, 'does not separate, as it must'), ('planted', True, 'separates, as it must'),
    ('untrained', True, 'separates, AGAINST EXPECTATION: do not trust the verdicts above'),
    ('planted', False, 'does not separate, AGAINST EXPECTATION'),
])
def test_controls_say_whether_they_did_as_they_must(name, separates, outcome):
    weaker = replace(LAYER, separation=.1, chance_p=.5, separates=False)
    sentence = control_sentence(name, replace(ANALYSIS, layers=[weaker, replace(LAYER, separates=separates)]))
    assert sentence.startswith(f'Control {name} (routers ') and outcome in sentence
    assert sentence.endswith('(separation 0.250, p = 0.002 for permuted images, 0.004 for shuffled routers).')
    alone = control_sentence(name, replace(ANALYSIS, layers=[replace(LAYER, untrained_p=None)]))
    assert alone.endswith('none for shuffled routers).')


def test_trials_are_lines_of_a_terminal():
    _, heading, free, first, _ = trial_table(AP)
    assert heading.split() == ['AP', 'APs', 'APm', 'APl', 'AP50', 'AP50s', 'AP50m', 'AP50l', 'AR', 'ARs', 'ARm', 'ARl']
    assert free.split() == ['free', '50.0', '40.0', '-', '60.0', '70.0', '-', '-', '-', '55.0', '-', '-', '-']
    assert first.split()[:5] == ['expert', '0', '40.0', '39.5', '-'] and len(free) == len(heading) == 12 + 12 * 7
