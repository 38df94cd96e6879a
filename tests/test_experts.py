"""What experts do: numbers by hand from made records, and the whole tool once for every kind of routing."""
import json
import math
import re
from html.parser import HTMLParser

import pytest
import timm
import torch
from torch import nn

import moe_zoo  # noqa: F401 - registers the models
from moe_zoo.analysis.expert_records import BINS, kind_of, locate, watch
from moe_zoo.analysis.expert_trials import forced_accuracies, predict_right, proportion, swept_accuracies
from moe_zoo.analysis.expert_words import findings, listing
from moe_zoo.analysis.experts import (
    class_table,
    find_twins,
    gate_summary,
    spread,
    top_classes,
    top_images,
    top_places,
    use_correlations,
    variance_split,
    weight_distances,
)
from moe_zoo.analysis.force import choosing_layers, keep_largest, select_experts
from moe_zoo.analysis.usage import LayerUsage, living_share
from moe_zoo.engine.analyze_experts import analyze_classifier, main, parse_classes, pick_images
from moe_zoo.engine.inference import load_images, open_classifier
from moe_zoo.errors import InputError
from moe_zoo.layers import MoEMlp, RoutedLayer
from moe_zoo.routing import Routing, record


class Replay(RoutedLayer):
    """Records what it is given, batch after batch, and answers with class 0; its experts are the rows of a matrix."""
    num_selected = 1

    def __init__(self, routings, experts=None):
        super().__init__()
        self.num_experts = routings[0].num_experts
        self.routings = list(routings)
        self.weight = nn.Parameter(torch.eye(self.num_experts) if experts is None else torch.tensor(experts))

    def forward(self, x):
        record(self, self.routings.pop(0))
        return torch.tensor([[1., 0.]]).expand(len(x), 2)

    def expert_parameters(self):
        return [[self.weight]]


def mixed(gates):
    gates = torch.tensor(gates)
    return Routing(gates, gates, gates, shape=(len(gates),))


def look(routing, targets, experts=None, size=2):
    """The one layer of one batch."""
    layer = Replay([routing], experts)
    images = torch.zeros(len(targets), 1, size, size)
    return watch(layer, [(images, torch.tensor(targets))], 2).layers['']


# ---- tables

def test_class_table_by_hand():
    # Class 0: .2 and .4; class 2: 1.; class 1 has no image.
    mean, error = class_table(torch.tensor([[.2], [1.], [.4]]), torch.tensor([0, 2, 0]), 3)
    assert mean.flatten().tolist() == pytest.approx([.3, 0, 1])
    # Variance of .2 and .4 is .02; of the mean of two, .01.
    assert error[0].item() == pytest.approx(.1) and error[2].isnan().all()


def test_top_classes_and_images():
    shares = torch.tensor([[.9, .1], [.7, .3], [.2, .8], [.2, .8]])
    rows = top_classes(shares, torch.tensor([0, 0, 1, 1]), 3)
    # Expert 0 has .8 in class 0 and .5 in all images: a lift of 1.6. Class 2 has no image and is not named.
    assert [row['class'] for row in rows[0]] == [0, 1]
    assert rows[0][0]['share'] == pytest.approx(.8) and rows[0][0]['lift'] == pytest.approx(1.6)
    assert rows[1][0]['class'] == 1 and rows[1][0]['se'] == pytest.approx(0, abs=1e-7)
    assert [row['image'] for row in top_images(shares)[1]] == [2, 3, 1, 0]


def test_watch_keeps_shares_gates_and_hits():
    found = watch(Replay([mixed([[.5, 1.5], [1., 1.]]), mixed([[0., .04]])]),
                  [(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1])), (torch.zeros(1, 1, 2, 2), torch.tensor([0]))], 2)
    layer = found.layers['']
    assert found.right.tolist() == [True, False, True]  # the model always says 0
    assert torch.allclose(layer.shares, torch.tensor([[.25, .75], [.5, .5], [0., 1.]]))
    assert layer.kind == 'mix' and layer.unit == 'image' and layer.grid is None
    # Gates .5, 1.5, 1, 1, 0 and .04: two below .1, one of them 0; three above .9 (1.5 counts in the last bin).
    summary = gate_summary(layer)
    assert summary['near_zero'] == 2 / 6 and summary['near_one'] == 3 / 6 and summary['zero'] == 1 / 6
    assert summary['counts'][BINS // 2] == 1 and sum(summary['counts']) == 6


def test_variance_within_and_between_classes():
    # Expert 0: class means 1 and 3, images 0, 2 and 2, 4: 4 of the sum of squares of 8 lie between. Expert 1 is idle.
    gates = torch.tensor([[0., 1.], [2., 1.], [2., 1.], [4., 1.]])
    split = variance_split(gates, torch.tensor([0, 0, 1, 1]))
    assert split['between'] == pytest.approx(.5) and split['total'] == pytest.approx(2)
    assert split['chance'] == pytest.approx(1 / 3) and split['between_se'] is None
    assert split['by_expert'][0] == pytest.approx(.5) and split['by_expert'][1] is None
    assert variance_split(gates[:, 1:], torch.tensor([0, 0, 1, 1]))['between'] is None
    # Where the class decides everything, all of it lies between, whatever is left out.
    targets = torch.arange(40) % 2
    split = variance_split(targets[:, None].float(), targets)
    assert split['between'] == pytest.approx(1) and split['between_se'] == pytest.approx(0, abs=1e-9)


def test_chance_is_what_a_blind_router_shows():
    targets = torch.arange(500) % 10
    found = [variance_split(torch.randn(500, 4), targets) for _ in range(20)]
    assert sum(f['between'] for f in found) / 20 == pytest.approx(9 / 499, rel=.15)


# ---- experts that are dead or alike

def test_dead_experts():
    assert living_share(4) == .01 and living_share(128) == .1 / 128
    usage = LayerUsage('x', 9, torch.tensor([9., 0., 0.]), torch.tensor([98.5, 1., .5]), 0.)
    assert usage.dead == [1, 2] and usage.living == 1 and usage.as_dict()['dead'] == [1, 2]


def test_weight_distances():
    # (3, 4) and (3, 3): 1 apart, lengths 5 and sqrt(18); opposite vectors are two lengths apart.
    distance = weight_distances(Replay([mixed([[1., 1., 1.]])], [[3., 4.], [3., 3.], [-3., -4.]]))
    assert distance[0, 1].item() == pytest.approx(1 / ((5 + math.sqrt(18)) / 2))
    assert distance[0, 2].item() == pytest.approx(2) and distance[1, 1] == 0
    apart = Replay([mixed([[1., 1.]])])
    apart.expert_parameters = lambda: [list(nn.Linear(1, 1).parameters()), list(nn.Linear(2, 1).parameters())]
    assert weight_distances(apart) is None  # experts of unlike build


def test_use_correlations():
    found = use_correlations(torch.tensor([[.1, .2, .7], [.2, .3, .5], [.3, .4, .3]]))
    assert found[0, 1] == pytest.approx(1) and found[0, 2] == pytest.approx(-1)
    assert use_correlations(torch.tensor([[.5, .1], [.5, .2]]))[0].isnan().all()


def test_twins_are_used_alike_and_nearly_equal():
    # Experts 0 and 1 rise together, 2 falls; 3 rises too, but its weights are others.
    gates = [[.1, .11, .6, .19], [.2, .21, .3, .29], [.3, .31, .0, .39]]
    near = [[10., 0.], [10., 1.], [10., .5], [0., 10.]]
    groups, pair = find_twins(look(mixed(gates), [0, 1, 0], near))
    assert groups == [[0, 1]]
    # The closest pair of weights is 0 and 2 (or 1 and 2), .5 apart of a length of 10, though they are used apart.
    assert pair['experts'] == [1, 2] and pair['distance'] == pytest.approx(.05, rel=.01)
    assert pair['correlation'] == pytest.approx(-1, abs=.01)
    groups, _ = find_twins(look(mixed(gates), [0, 1, 0], [[10., 0.], [0., 10.], [-10., 0.], [0., -10.]]))
    assert groups == []


# ---- places

def sparse_tokens():
    """Two images of a class token and 2 x 2 patches, one of two experts a token."""
    chosen = torch.tensor([[1], [0], [1], [0], [0], [1], [1], [1], [0], [1]])
    weights = torch.tensor([.5, .9, .6, .5, .3, .5, .2, .4, .5, .8])[:, None]
    logits = torch.zeros(10, 2).scatter(1, chosen, weights)
    return Routing(logits, logits, weights, chosen, shape=(2, 5))


def test_places_of_tokens():
    layer = Replay([sparse_tokens()])
    found, = locate(layer, torch.zeros(2, 1, 4, 4))
    assert (found['rows'], found['columns'], found['experts']) == (2, 2, [0, 1])
    first, second = found['images']
    assert first['front'] == [1] and first['top'] == [[0, 1], [0, 0]] and second['top'] == [[1, 1], [0, 1]]
    assert first['share'] == [[1, 1], [1, 1]] and 'taken' not in first
    assert torch.allclose(torch.tensor(first['logits']), torch.tensor([[[.9, 0], [.5, .3]], [[0, .6], [0, 0]]]))


def test_patches_that_experts_took():
    # Three patches in a row: expert 0 took the first, both took the second, nobody the third.
    kept = torch.tensor([[True, False], [True, True], [False, False]])
    gates = torch.tensor([[.7, .1], [.3, .6], [.2, .2]])
    every = torch.tensor([0, 1]).expand(3, 2)
    found, = locate(Replay([Routing(gates, gates, gates, every, kept, shape=(1, 1, 3), by_expert=True)]),
                    torch.zeros(1, 1, 2, 6))
    image, = found['images']
    assert found['kind'] == 'by expert' and image['top'] == [[0, 1, None]]
    assert image['share'] == [[1, pytest.approx(2 / 3, abs=1e-4), None]] and image['taken'] == [[0, 1], [1]]


def test_top_places_are_one_an_image():
    rows = top_places(look(sparse_tokens(), [0, 1], size=4))
    # Expert 0: .9 at the upper left of image 0, .5 at the lower left of image 1; expert 1: .8 and .6.
    assert [(r['image'], r['row'], r['column']) for r in rows[0]] == [(0, 0, 0), (1, 1, 0)]
    assert [(r['image'], r['row'], r['column']) for r in rows[1]] == [(1, 1, 1), (0, 0, 1)]
    assert rows[1][0]['weight'] == pytest.approx(.8)


def test_decisions_for_images_have_no_places():
    assert locate(Replay([mixed([[1., 0.]])]), torch.zeros(1, 1, 4, 4)) == []


# ---- other choices

def test_proportions_have_errors():
    right = torch.tensor([True] * 3 + [False])
    found = proportion(right)
    assert found.accuracy == 75 and found.se == pytest.approx(100 * math.sqrt(.75 * .25 / 4))
    # Of four images one is lost: -25 points; -1, 0, 0, 0 has a deviation of sqrt(3)/4.
    paired = proportion(torch.tensor([True, True, False, False]), right)
    assert paired.difference == -25 and paired.difference_se == pytest.approx(100 * math.sqrt(3) / 4 / 2)
    # All right of 100 is not infallible: as if one was wrong.
    assert proportion(torch.ones(100, dtype=torch.bool)).se == pytest.approx(100 * math.sqrt(.01 * .99 / 100))


class Tokens(nn.Module):
    """A classifier of two routed layers on (B, 5, 6) tokens."""

    def __init__(self, num_selected=2):
        super().__init__()
        common = dict(num_experts=4, same_init=False, losses={})
        self.first = MoEMlp(6, 8, num_selected=num_selected, **common)
        self.second = MoEMlp(6, 8, num_selected=num_selected, eval_capacity_factor=1., **common)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head((x + self.first(x) + self.second(x)).mean(dim=1))


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    model = Tokens().eval()
    return model, [(torch.randn(12, 5, 6), torch.arange(12) % 3)]


@pytest.mark.parametrize('k', [1, 2, 3, 4])
def test_a_swept_k_is_that_k(tokens, k):
    """The very numbers of a model that was built with this K, capacity included; afterwards it is as before."""
    model, batches = tokens
    free, native = model(batches[0][0]), Tokens(k).eval()
    native.load_state_dict(model.state_dict())
    with select_experts(model, k):
        assert torch.equal(model(batches[0][0]), native(batches[0][0]))
    assert torch.equal(model(batches[0][0]), free) and model.first.num_selected == 2


def test_sweep_and_force(tokens):
    model, batches = tokens
    titles = []

    def run(title):
        titles.append(title)
        return batches

    free = predict_right(model, batches)
    rows = swept_accuracies(model, run, free, mixes=False)
    assert [row['k'] for row in rows] == ['K = 1', 'K = 2', 'K = 3', 'K = 4']
    assert [row['native'] for row in rows] == [False, True, False, False]
    assert rows[1]['difference'] == rows[1]['difference_se'] == 0 and rows[1]['accuracy'] == proportion(free).accuracy
    forced = forced_accuracies(model, run, free, ['second'])
    assert len(forced['everywhere']) == 4 and list(forced['layers']) == ['second']
    assert titles[4:] == [f'expert {e} forced in {where}' for where in ('every layer', 'second') for e in range(4)]


def test_only_layers_that_choose_are_swept():
    assert choosing_layers(nn.Sequential(MoEMlp(4, 4, router='expert_choice', num_experts=2))) == {}
    # K / 2 in each of two groups: another K would change the groups, and with them what K = 4 itself means
    assert choosing_layers(nn.Sequential(MoEMlp(4, 4, router='hierarchical', num_experts=8, num_selected=4))) == {}
    with pytest.raises(InputError, match='Linear has no routed layer'):
        choosing_layers(nn.Linear(1, 1))
    layer = nn.Sequential(MoEMlp(4, 4, num_experts=2))
    with pytest.raises(InputError, match='num_selected=0: choose at least 1 expert'), select_experts(layer, 0):
        pass
    with pytest.raises(InputError, match="layer '1' has no router that chooses"), select_experts(layer, 1, '1'):
        pass
    with select_experts(layer, 5):
        assert layer[0].num_selected == layer[0].router.num_selected == 2  # all there are


def test_the_largest_weights_alone():
    # .5, .3 and .2: of two, .5 / .8 and .3 / .8; the sum of sigmoids, 1.5, goes to the one that is left.
    class Fixed(nn.Module):
        def forward(self, x):
            return mixed([[.5, .3, .2], [.2, .6, .7]])

    layer = Replay([mixed([[1., 1., 1.]])])
    layer.router = Fixed()
    for number, expected in (
            (2, [[.625, .375, 0], [0, 1.5 * .6 / 1.3, 1.5 * .7 / 1.3]]), (1, [[1, 0, 0], [0, 0, 1.5]]),
            (.34, [[.625, .375, 0], [0, 1.5 * .6 / 1.3, 1.5 * .7 / 1.3]]), (3, [[.5, .3, .2], [.2, .6, .7]])):
        with keep_largest(layer, number):
            assert torch.allclose(layer.router(None).weights, torch.tensor(expected), atol=1e-6)
    with keep_largest(layer, 1, keep_mass=False):
        assert torch.allclose(layer.router(None).weights, torch.tensor([[.5, 0, 0], [0, 0, .7]]))
    with pytest.raises(InputError, match='num_kept=0: keep at least 1 expert'):
        keep_largest(layer, 0)


# ---- words

def told(**changes):
    """A result of one layer of four experts, evenly used, and what is to be said about it."""
    gates = {'near_zero': 0., 'near_one': 0., 'zero': 0.,
             'variance': {'between': None, 'between_se': None, 'chance': .1, 'by_expert': [None] * 4}}
    row = {'class': 0, 'share': .5, 'se': .01, 'lift': 2.}
    layer = {
        'layer': 'a', 'experts': 4, 'dead': [], 'entropy': 1., 'importance': [.25] * 4, 'twins': [], 'most_alike': None,
        'listed': [0, 1, 2, 3], 'top_classes': [[row]] * 4, 'gates': gates}
    for name in [name for name in changes if name in layer]:
        layer[name] = changes.pop(name)
    gates.update(changes.pop('ends', {}))
    gates['variance'].update(changes.pop('variance', {}))
    result = {'model': 'm', 'trained': True, 'images': 100, 'targets': [0, 1] * 50, 'classes': ['cat', 'dog'],
              'free': {'accuracy': 80., 'se': 4.}, 'layers': [layer], 'forced': None, 'k': []}
    return findings({**result, **changes})


def test_words_follow_the_numbers():
    assert told()['overview'] == '`m` gets **80.0 ± 4.0 %** of 100 images of 2 classes right. It has 4 experts in 1 ' \
                                 'routed layer.'
    assert told(trained=False)['overview'].startswith('**Untrained:** the weights are random')
    assert told()['balance'] == '**All 4 experts are in use.** Every layer shares the work evenly among its experts.'
    uneven = told(dead=[1, 3], entropy=.5, importance=[.7, 0., .3, 0.])['balance']
    assert uneven.startswith('**2 of 4 experts are dead**: 1 and 3 of `a`.') and 'expert 0 carries 70.0 %' in uneven
    assert told()['classes'].startswith('The closest tie: expert 0 of `a` carries **50 %** (± 1.0 %) of the weight in '
                                        'images of **cat**, 2.0 times its usual 25 %')
    noise = [[{'class': 0, 'share': .5, 'se': .1, 'lift': 2.}]] * 4  # .25 above the usual share: 2.5 standard errors
    assert told(top_classes=noise)['classes'].startswith('**No expert is tied to a class**')
    assert set(told()) == {'overview', 'balance', 'classes', 'gates', 'depth'}  # nothing was forced, nothing compared


def test_words_about_twins():
    pair = {'experts': [0, 2], 'distance': .5, 'correlation': None}
    assert told(most_alike=pair)['alike'].startswith('**No twins.** The most alike are experts 0 and 2 of `a`: their')
    assert told(most_alike={**pair, 'distance': .1})['alike'].startswith('**Nearly equal experts, not used alike.**')
    assert told(most_alike=pair, twins=[[0, 2]])['alike'] == (
        '**Twins** (used alike, nearly equal weights): 0 and 2 of `a`.')


def test_words_about_gates():
    assert '**dimmers, not switches**' in told(ends={'near_zero': .8, 'near_one': .05})['gates']
    assert '**switches (off or on) in 1 of 1 layer**' in told(ends={'near_zero': .4, 'near_one': .2})['gates']
    assert told()['depth'].startswith('No gate varies between images')
    assert '**30 %** of the variance' in told(variance={'between': .3})['depth']
    assert told(variance={'between': .9, 'chance': .8})['depth'] == (
        '100 images of 2 classes are too few to tell how class-specific the gates are.')


def test_words_about_other_choices():
    rows = [{'expert': e, 'accuracy': a, 'se': 4., 'difference': a - 80, 'difference_se': 3.}
            for e, a in enumerate((79., 60.))]
    said = told(forced={'everywhere': rows, 'layers': {}})['forced']
    assert 'accuracy is **60.0 to 79.0 %** instead of 80.0 %; 1 of 2 differences is clear.' in said
    said = told(forced={'everywhere': rows[:1], 'layers': {}})['forced']
    assert 'accuracy is **79.0 %** instead' in said and said.endswith('the difference is not clear.')
    swept = [{'k': f'K = {k}', 'native': k == 2, **rows[0]} for k in (1, 2)]
    assert told(k=swept)['k'].endswith('told from chance: 79.0 % (trained with K = 2).')
    swept[0].update(accuracy=60., difference=-20.)
    assert told(k=swept)['k'] == ('Against K = 2, with which it was trained, accuracy changes clearly with K = 1 '
                                  '(-20.0 points).')


def test_spread_and_listing():
    assert spread('abcdefg', 3) == ['a', 'd', 'g'] and spread('ab', 3) == ['a', 'b'] and spread('abc', 1) == ['c']
    assert listing([1, 4, 7]) == '1, 4 and 7' and listing([1]) == '1' and listing([]) == 'none'
    assert listing(range(5), 2) == '0, 1 and 3 more'


def test_pick_images_goes_round_the_classes():
    targets = torch.tensor([0, 0, 1, 0, 2])
    assert pick_images(targets, [0, 1, 2], 4) == [0, 2, 4, 1] and pick_images(targets, [5], 3) == []


def test_classes_by_name_and_number():
    assert parse_classes('cat, 0', ['dog', 'cat']) == [1, 0] and parse_classes(None, ['dog']) == []
    with pytest.raises(InputError, match=r"--classes 'cta' is no class of this model\. Did you mean 'cat'\? Give names "
                                         'or numbers from 0 to 1'):
        parse_classes('cta', ['dog', 'cat'])


# ---- everything, for every kind of routing

VIT = dict(patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[0, 1], num_experts=3)
KINDS = {
    'mix': ('condconv_resnet18', dict(num_experts=2)),
    'top-k': ('moe_resnet18_cifar', dict(num_experts=3)),
    'top-k of tokens': ('vmoe_vit_s', dict(VIT, representation_size=0)),
    'by expert': ('vmoe_vit_s_ec', dict(VIT, representation_size=0)),
    'soft': ('softmoe_vit_s', VIT),
    'channels': ('deepmoe_narrow_resnet18', {}),
    'by expert of patches': ('pmoe_cnn', {}),
}


class Parts(HTMLParser):
    """Counts the elements of a page and holds open ones against closed ones."""

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in ('meta', 'link', 'img', 'input', 'br'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def check_page(text, images):
    parts = Parts(text)
    assert not parts.open and not parts.wrong
    assert not re.search(r'\bnan\b|\bNone\b|\binf\b', re.sub(r'base64,[^"]*|<style>.*?</style>', '', text, flags=re.S))
    assert text.count('data:image/png') >= images and 'src="http' not in text and len(text) < 2_000_000


@pytest.mark.parametrize('kind', KINDS)
def test_the_whole_tool(kind, tmp_path, capsys):
    """Random weights on the digits: JSON, page and words hold together, and say that nothing was learned."""
    name, keywords = KINDS[kind]
    size = [] if name == 'pmoe_cnn' else ['img_size=16']
    code = main([
        '--model', name, 'dataset=digits', 'val_split=test', 'device=cpu', *size,
        f'model_kwargs={json.dumps(keywords)}',
        '--max-images', '22', '--images', '2', '--layers', '2', '--no-figures', '--out', str(tmp_path),
        '--classes', '3,8'])
    printed = capsys.readouterr()
    assert code == 0 and 'UNTRAINED' in printed.err and 'Untrained' in printed.out and '**' not in printed.out
    passes = int(re.search(r'(\d+) pass(es)? over 22 images, about', printed.err)[1])
    result = json.loads((tmp_path / 'experts.json').read_text(), parse_constant=pytest.fail)  # no NaN
    layers = result['layers']
    assert {layer['kind'] for layer in layers} == {kind.partition(' of ')[0]}
    assert result['images'] == 22 and result['classes'] == [str(d) for d in range(10)] and not result['trained']
    assert result['findings'] == findings(result) and result['chosen_classes'] == [3, 8]
    for layer in layers:
        assert sum(layer['importance']) == pytest.approx(1, abs=1e-6)
        assert len(layer['top_classes']) == len(layer['top_images']) == len(layer['listed'])
    places = {'top-k of tokens': (2, 2), 'by expert': (2, 2), 'soft': (2, 2), 'by expert of patches': (4, 4)}.get(kind)
    assert {layer['grid'] and tuple(layer['grid']) for layer in layers} == {places}
    assert [result['targets'][i] for i in result['shown']] == ([3, 8] if places else [])
    swept = {'by expert': [], 'channels': ['5 % of channels', '100 % of channels']}.get(
        kind.partition(' of ')[0], ['K = 1', f'K = {layers[0]["experts"]}'])
    assert [row['k'] for row in result['k']][::max(len(result['k']) - 1, 1)] == swept
    for row in result['k']:
        if row['native']:
            assert row['difference'] == row['difference_se'] == 0
    forced = result['forced']
    assert passes == 1 + sum(map(len, [forced['everywhere'], *forced['layers'].values(), result['k']]))
    if kind == 'channels':
        assert not result['forced']['everywhere'] and 'one channel alone computes nothing' in str(result['left_out'])
    else:
        assert len(result['forced']['everywhere']) == layers[0]['experts']
    check_page((tmp_path / 'index.html').read_text(), 2 if places else 0)


def test_figures_and_a_run_of_ones_own(tmp_path):
    """What the tool is made of, from Python, with figures; nothing forced."""
    from moe_zoo.analysis.expert_figures import write_figures
    classifier, dataset = open_classifier(None, {'model': 'vmoe_vit_s', 'dataset': 'digits'}, {
        'val_split': 'test', 'img_size': 16, 'device': 'cpu', 'model_kwargs': dict(VIT, representation_size=0)})
    images = load_images(classifier, dataset, 20)
    result = analyze_classifier(classifier, images, force=False, shown=1, quiet=True)
    assert result['forced'] is None and result['k'] == [] and 'forced' not in result['findings']
    names = {path.name for path in write_figures(result, images.pixels, tmp_path)}
    assert names == {'usage.png', 'classes.png', 'gates.png', 'depth.png', 'patches.png', 'logits.png'}
    assert all((tmp_path / name).stat().st_size > 5000 for name in names)


def test_kinds_are_told_from_records():
    model = timm.create_model('deepmoe_narrow_resnet18', num_classes=2).eval()
    gate = model.get_submodule('layer1.0.gate1')
    assert kind_of(gate, gate(torch.ones(1, gate.weight.shape[1]))) == 'channels'


@pytest.mark.parametrize('arguments, message', [
    ([], 'Nothing to analyse: give --checkpoint FILE, or --model NAME.'),
    (['--model', 'vmoe_vit_x', 'dataset=digits'], "Unknown model 'vmoe_vit_x'. Did you mean"),
    (['--model', 'resnet18', 'dataset=digits', 'val_split=test', 'device=cpu', 'img_size=32'],
     'ResNet has no routed layer.'),
    (['--model', 'vmoe_vit_s', '--max-images', '1'], '--max-images 1: give at least 2.'),
    (['--model', 'vmoe_vit_s', '--layers', '0'], '--layers 0: give at least 1.'),
    (['--checkpoint', 'nowhere.pth'], "There is no checkpoint file 'nowhere.pth'."),
    (['--model', 'vmoe_vit_s', '--data-dir', 'nowhere'], "The data folder 'nowhere' does not exist."),
])
def test_what_cannot_be_used_is_one_sentence(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, '--out', str(tmp_path / 'out')])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and message in printed and not (tmp_path / 'out').exists()
