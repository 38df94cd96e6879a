"""What is told of cards, on made-up ones: the README's tables, the front of accuracy against MACs, a card as text."""
import pytest

from moe_zoo.card_tables import accuracy_table, card_text, columns_of, find, listing, models_table, values
from moe_zoo.errors import InputError


def made_up(name, family='f', parameters=1_000_000, macs=50_000_000, **more):
    return {
        'name': name, 'family': family, 'summary': f'what {name} is', 'input': {'size': [3, 32, 32]},
        'cost': {'parameters': parameters, 'active_parameters': parameters // 2, 'macs': macs},
        'paper': {'title': 'A Paper', 'authors': 'Someone', 'venue': 'ICML 2020', 'year': 2020, 'arxiv': '1234.5'},
        'recipe': {'config': f'configs/cifar/{name}.yaml', 'command': f'train {name}'}, 'weights': {'note': 'none'},
        'deviations': ['fewer epochs'], **more}


def run(mean, macs, dataset='digits', data='5 + 5', std=0.5, twin=None, **more):
    several = {'seeds': [0, 1], 'std': std} if std is not None else {'seeds': [0]}
    row = {'dataset': dataset, 'data': data, 'metric': 'top-1', 'mean': mean, 'epochs': 8, 'pixels': 32,
           'model_args': {}, 'macs': macs, 'parameters': 10, 'config': 'configs/x.yaml', 'command': 'train it',
           'commit': 'abc', 'versions': 'torch 2', 'hardware': '2 threads', **several, **more}
    return row | ({'twin': twin} if twin else {})


def dense(mean, macs, model='resnet18', **more):
    return {'model': model, 'model_args': {}, 'mean': mean, 'seeds': [0], 'parameters': 5, 'macs': macs, **more}


def test_models_by_family_and_size_with_figures_in_millions():
    table = models_table({card['name']: card for card in (
        made_up('b', parameters=1_250_000, macs=9_940_000, twin='resnet18', twin_args={'layers': [1, 1]}),
        made_up('a', parameters=99_900, macs=12_345_678_901), made_up('z', 'e'))})
    assert table.splitlines() == [
        '| model | pixels | parameters | active | MACs | dense twin |', '| --- | ---: | ---: | ---: | ---: | --- |',
        '| `z` | 32 | 1.0 M | 0.5 M | 50 M | it is one |',
        '| `a` | 32 | 99.9 k | 50.0 k | 12,346 M | it is one |',  # 99,900 / 2 = 49,950
        '| `b` | 32 | 1.2 M | 0.6 M | 9.9 M | `resnet18` with `layers=[1, 1]` |']


def test_accuracy_by_data_then_macs_with_the_front_in_bold():
    known = {
        'a': made_up('a', measured=[run(98.0, 30_000_000, twin=dense(97.0, 20_000_000, std=0.25, seeds=[0, 1, 2]))]),
        'b': made_up('b', measured=[run(97.5, 40_000_000, twin=dense(97.4, 29_000_000)),  # a has more for fewer MACs
                                    run(55.0, 90_000_000, dataset='CIFAR-10', std=None,
                                        command='train -c x epochs=9 --seeds 0')]),
        'c': made_up('c', measured=[run(99.0, 60_000_000), run(99.9, 1_000, dataset='scenes'),  # of another data set
                                    {'experiment': 'e', 'dataset': 'digits', 'metric': 'm', 'mean': 1.0}])}
    lines = accuracy_table(known).splitlines()
    assert lines[0] == '| data | MACs | model | pixels | top-1, % | seeds | recipe |'
    assert lines[2:] == [
        '| CIFAR-10: 5 + 5 | 90 M | **`b`** | 32 | **55.00** | 1 | `configs/x.yaml epochs=9` |',
        '| digits: 5 + 5 | 20 M | **dense twin of `a`** | 32 | **97.00 ± 0.25** | 3 | `configs/x.yaml` |',
        '|  | 29 M | **dense twin of `b`** | 32 | **97.40** | 1 | `configs/x.yaml` |',
        '|  | 30 M | **`a`** | 32 | **98.00 ± 0.50** | 2 | `configs/x.yaml` |',
        '|  | 40 M | `b` | 32 | 97.50 ± 0.50 | 2 | `configs/x.yaml` |',
        '|  | 60 M | **`c`** | 32 | **99.00 ± 0.50** | 2 | `configs/x.yaml` |']


def test_equals_are_both_on_the_front_and_other_data_do_not_count():
    rows = accuracy_table({
        'a': made_up('a', measured=[run(90.0, 100), run(95.0, 50, data='other')]),
        'b': made_up('b', measured=[run(90.0, 100)]), 'c': made_up('c', measured=[run(90.0, 101)])}).splitlines()[2:]
    assert [row.split(' | ')[2] for row in rows] == ['**`a`**', '**`b`**', '`c`', '**`a`**']


def test_without_recorded_runs_there_is_no_table():
    assert accuracy_table({'a': made_up('a')}) == ''


def test_a_card_tells_what_was_measured_its_twin_and_how_to_train_both():
    text = card_text(made_up('a', twin='resnet18', measured=[
        run(99.254, 30_000_000, macs_executed=25_000_000, model_args={'num_experts': 4},
            twin=dense(99.7, 20_000_000, model_args={'width': 8})),
        {'experiment': 'e', 'dataset': 'd', 'metric': 'm', 'mean': 1.0, 'std': 2.0, 'seeds': 3}],
        published=[{'metric': 'top-1', 'value': '76 %', 'source': 'table 2'}]), 1000)
    assert text.splitlines() == [
        'a: what a is',
        'paper       A Paper. Someone. ICML 2020. arXiv:1234.5',
        'input       3 x 32 x 32',
        'parameters  1,000,000, of which 500,000 work on an image or token',
        'MACs        50,000,000 at most (multiply-adds; router and chosen experts for every item)',
        'dense twin  resnet18',
        'recipe      configs/cifar/a.yaml',
        'train it    train a',
        'published   top-1: 76 %; table 2',
        'measured    digits (5 + 5), top-1, 32 px, 8 epochs: a(num_experts=4): 99.25 +- 0.5 % (seeds 0 1), '
        '30 M MACs at most, 25 M executed; dense twin resnet18(width=8): 99.7 % (seeds 0), 20 M MACs at most; '
        'train it: train it (commit abc, torch 2, 2 threads)',
        'measured    d, m: 1.0 +- 2.0 (experiment e, seeds 3)',
        'weights     none',
        'deviation   fewer epochs']


def test_filters_know_families_names_and_patterns():
    known = {card['name']: card for card in (made_up('soft', 'vmoe'), made_up('vmoe_s', 'vmoe', 10), made_up('other'))}
    names = lambda pattern: [card['name'] for card in find(known, pattern)]
    assert names('') == ['other', 'vmoe_s', 'soft'] and names('vmoe') == ['vmoe_s', 'soft']
    assert names('*m*') == names('moe_') == ['vmoe_s'] and names('ft') == ['soft']
    with pytest.raises(InputError, match=r"No model of moe_zoo matches 'vmeo'\. Did you mean 'vmoe'"):
        find(known, 'vmeo')


def test_only_texts_are_shortened():
    long = made_up('a_rather_long_name', parameters=123_456_789, summary='x' * 50, twin='t' * 40)
    assert listing([long], columns_of('model,parameters,summary,twin'), 75).splitlines() == [
        'model               parameters  summary               twin',
        f'a_rather_long_name       123 M  {"x" * 17}...  {"t" * 18}...']  # 18 + 10 + 20 + 21 + 3 x 2 = 75
    assert len(listing([long], columns_of('model,parameters,summary,twin'), 10).splitlines()[1]) == 18 + 10 + 2 * 12 + 6


def test_columns_hold_the_first_result_in_words():
    card = made_up('a', published=[{'metric': 'top-1', 'value': '76 %', 'source': 's'}],
                   measured=[{'experiment': 'e', 'dataset': 'd', 'metric': 'm', 'mean': 1.0, 'std': 2.0}, run(99.0, 5)])
    assert values([card], columns_of('published,measured,twin')) == [
        {'published': '76 % top-1', 'measured': '99.0 +- 0.5 digits, top-1', 'twin': None}]
