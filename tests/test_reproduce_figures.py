"""What the charts of experiments show of results that are made by hand."""
import re

from moe_zoo.reproduce import balance, condconv, deepmoe, object_sizes, route_consistency


def arm(name, options=None, **means):
    return {'name': name, 'options': options or {},
            'metrics': {key: {'mean': mean, 'std': mean / 10} for key, mean in means.items()}}


def drawn_in(figure):
    """The numbers written into the cells of a heat map."""
    return re.findall(r'"middle">([\d.]+)</text>', figure.image)


def test_accuracy_over_macs_has_a_line_for_every_width():
    arms = [arm('c', {'width': 25}, macs=40_000, accuracy=80.), arm('a', {'width': 25}, macs=20_000, accuracy=70.),
            arm('b', {'width': 50}, macs=80_400, accuracy=90.)]
    figure, = condconv.trade_off({'arms': arms})
    assert figure.alt == 'Accuracy over MACs. width 0.25: 20 k 70.0 %, 40 k 80.0 %; width 0.5: 80 k 90.0 %'
    assert figure.image.count('<polyline') == 2 and 'width 0.25: 20, 70.0<' in figure.image


def test_accuracy_over_executed_macs_has_a_line_for_every_kind_of_network():
    arms = [arm('dense', {'kind': 'dense'}, executed=40., accuracy=90.),
            arm('wide 0.02', {'kind': 'wide', 'gate_l1': .02}, executed=30., accuracy=91.),
            arm('wide 0.04', {'kind': 'wide', 'gate_l1': .04}, executed=20., accuracy=89.),
            arm('blind', {'kind': 'wide', 'gate_l1': .04, 'embed_loss': 0.}, executed=25., accuracy=88.)]
    figure, = deepmoe.trade_off({'arms': arms})
    assert figure.alt == ('Accuracy over executed MACs. dense: 40 k 90.0 %; wide: 20 k 89.0 %, 30 k 91.0 %; '
                          'wide, no embedding loss: 25 k 88.0 %')
    assert figure.image.count('<polyline') == 3


def test_balance_is_drawn_by_classes_and_pairs_of_the_first_seed():
    accuracies = {f'k{k}': 80. + k for k in range(1, balance.EXPERTS + 1)}
    pairs = [[10 * i + j for j in range(balance.EXPERTS)] for i in range(balance.EXPERTS)]
    even = [[1 / balance.EXPERTS] * balance.EXPERTS]
    runs = [{'arm': name, 'seed': seed, 'metrics': {'classes': even, 'pairs': pairs}}
            for name in ('none', 'importance', 'relative') for seed in (5, 6)]
    over_k, classes, together, *others = balance.figures({'arms': [arm('none', **accuracies)], 'runs': runs})
    assert over_k.alt.startswith('Accuracy over the number of experts at test time. none: 81.0 %, 82.0 %, ')
    assert drawn_in(classes) == [f'{100 / balance.EXPERTS:.0f}'] * balance.EXPERTS
    assert drawn_in(together) == [str(number) for row in pairs for number in row]
    assert classes.caption == 'Classes by expert, percent of the weight: `importance`, seed 5.'
    assert [figure.caption.split('`')[1] for figure in others] == ['relative'] * 2


def test_changed_routes_are_drawn_with_their_deviations():
    noise = {f'noise_{sigma:g}': 10. * i for i, sigma in enumerate(route_consistency.SIGMAS, 1)}
    figure, = route_consistency.noise_curves({'arms': [arm('none', **noise), arm('prc', **noise)]})
    none, prc = figure.alt.removeprefix('Changed routes over noise. ').split('; ')
    assert none.split(', ')[0] == f'none: {route_consistency.SIGMAS[0]:g} 10.0 %'
    assert prc.split(', ')[-1] == f'{route_consistency.SIGMAS[-1]:g} {10. * len(noise):.1f} %'
    assert figure.image.count('stroke-opacity=".6"') == 2 * len(noise)  # bars of a tenth


def test_object_sizes_are_drawn_of_the_first_seed_and_losses_of_all():
    metrics = {'mass': {'small': [.75, .25], 'medium': None, 'large': [.5, .5]}, 'named': {'small': 0, 'large': 1},
               'curve': [[100., [.7, .3]], [10000., [.4, .6]]]}
    runs = [{'arm': 'shuffled', 'seed': 2, 'metrics': {}},
            *({'arm': 'trained', 'seed': seed, 'metrics': metrics} for seed in (3, 4))]
    arms = [arm('small objects', lost_to_small=1., lost_to_large=20.),
            arm('large objects', lost_to_small=30., lost_to_large=4.)]
    mass, curve, lost = object_sizes.figures({'runs': runs, 'arms': arms})
    assert drawn_in(mass) == ['75.0', '50.0', '25.0', '50.0']
    assert mass.caption.endswith(
        'seed 3. The expert of small objects is 0, that of large ones 1, by the validation images.')
    # Sides of 10 and 100 pixels are areas of 100 and 10000.
    assert 'expert 0: 10, 70<' in curve.image and 'expert 1: 100, 60<' in curve.image
    assert drawn_in(lost) == ['1.0', '30.0', '20.0', '4.0']  # a row an expert, a column a size
