"""Object sizes where gates are those of FPN levels, or where experts choose; intervals and curves of objects."""
import numpy as np
import pytest
import torch
from scipy import stats
from test_object_sizes import Gated, pooled_features, scene_sizes, whole
from torch import nn

from moe_zoo.analysis.object_gates import Objects
from moe_zoo.analysis.object_sizes import SizeCollector, planted_sizes, size_table, untrained_routers
from moe_zoo.analysis.permutation import clustered_means, curve, level_permutations, t_quantile
from moe_zoo.analysis.shuffled_routers import choose_again, item_weights, taken_by_expert
from moe_zoo.layers import MoEMlp, PatchMoE, RoutedLayer
from moe_zoo.routing import ExpertChoiceRouter, NoisyTopKRouter, Routing, SoftmaxTopKRouter, record, trace_routing

LEVELS = 3


class PerLevel(Gated):
    """A gate for every level: (N, L, D) features."""

    def forward(self, x):
        record(self, self.router(x.flatten(0, 1))._replace(shape=tuple(x.shape[:2]), levels=x.shape[1]))
        return x


def objects_on_levels(sizes):
    """Small objects on level 0, medium ones on 1, large ones on 2."""
    boxes = whole(sizes)
    return Objects(boxes.boxes, boxes.areas, sizes)


def level_features(rng, sizes, width=24):
    """Features that tell level and image, as those of any pyramid do."""
    levels = 2 * rng.normal(size=(1, LEVELS, width)) + rng.normal(size=(len(sizes), LEVELS, width))
    return torch.tensor(np.maximum(levels, 0), dtype=torch.float32)


def analyse_levels(model, x, sizes, around=None, **keywords):
    collector = SizeCollector(model, seed=keywords['seed'], shuffles=keywords.pop('shuffles'))
    seed = keywords.pop('seed')
    model = model.eval()
    manager = around(collector) if around else untrained_routers({})
    with manager, collector, collector.batch([objects_on_levels(s) for s in sizes]):
        model(x)
    found = collector.analyze(permutations=99, alpha=.1)
    assert seed == found.seed
    return found


# ---- intervals

def test_means_of_objects_in_images_by_hand():
    # Image 0 has two objects of 1, image 1 one of 0, images 2 and 3 one of 1 and 0. Mean 3 / 5 = .6. Deviations summed
    # by image: .8, -.6, .4, -.6; squares .64 + .36 + .16 + .36 = 1.52. Images by weight: 25 / (4 + 1 + 1 + 1) = 25 / 7.
    values, images = np.array([[1.], [1.], [0.], [1.], [0.]]), np.array([0, 0, 1, 2, 3])
    mean, half = clustered_means(values, np.ones(5), images)
    assert mean == pytest.approx([.6]) and half is None  # 3.57 images are too few
    mean, half = clustered_means(np.tile(values, (2, 1)), np.ones(10), np.concatenate([images, images + 4]))
    number = 100 / 14
    error = (2 * 1.52 * number / (number - 1)) ** .5 / 10
    assert mean == pytest.approx([.6]) and half == pytest.approx([t_quantile(number - 1) * error])


@pytest.mark.parametrize('freedom', [3, 5, 9, 30, 500])
def test_t_quantile(freedom):
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(.975, freedom), rel=.01)


def test_intervals_hold_the_true_mean_as_often_as_they_say():
    held, naive = [], []
    for seed in range(250):
        rng = np.random.default_rng(seed)
        images = np.repeat(np.arange(25), rng.integers(1, 7, size=25))
        values = (rng.normal(size=25)[images] + .5 * rng.normal(size=len(images)))[:, None]  # objects share their image
        mean, half = clustered_means(values, np.ones(len(images)), images)
        held.append(abs(mean[0]) <= half[0])
        naive.append(abs(mean[0]) <= 1.96 * values.std() / len(images) ** .5)
    # 95 % of 250 with a standard deviation of 1.4 points. Objects taken for independent are far off.
    assert .90 < np.mean(held) < .99 and np.mean(naive) < .85


def test_the_curve_follows_the_area():
    rng = np.random.default_rng(0)
    areas = np.exp(rng.uniform(4, 10, size=2000))
    values = np.stack([areas > np.exp(7), areas <= np.exp(7)], axis=1).astype(float)
    points = curve(values, areas, np.arange(2000))
    assert len(points) == 25 and all(np.isclose(mean.sum(), 1) for _, mean, _ in points)
    first, last = points[0], points[-1]
    assert first[0] < np.exp(4.2) and last[0] > np.exp(9.8) and first[1][0] < .01 and last[1][0] > .99
    middle = min(points, key=lambda p: abs(np.log(p[0]) - 7))
    assert abs(middle[1][0] - .5) < .1 and 0 < middle[2][0] < .1
    assert curve(values[:3], np.full(3, 50.), np.arange(3)) == []  # one area is no curve


# ---- levels

def test_levels_are_exchanged_within_their_image():
    orders = level_permutations(4, 3, 50, np.random.default_rng(0))
    assert orders.shape == (50, 12) and (np.sort(orders, axis=1) == np.arange(12)).all()
    assert (np.ptp(orders.reshape(50, 4, 3) // 3, axis=2) == 0).all()  # three of one image stay together
    assert len(np.unique(orders % 3, axis=0)) > 40


def test_gates_of_levels_meet_the_objects_there():
    class Fixed(RoutedLayer):
        num_experts = num_selected = 2

        def forward(self, x):
            gates = torch.tensor([[1., 0.], [.5, .5], [0., 1.], [.8, .2], [.5, .5], [0., 1.]])  # image by image
            record(self, Routing(gates, gates, gates, shape=(2, 3), levels=3))
    with SizeCollector(Fixed(), shuffles=0) as collector:
        with collector.batch([objects_on_levels(np.array([0, 2])), objects_on_levels(np.array([0, 1]))]):
            collector.model(None)
    layer = collector.analyze().layers[0]
    # Small: 1 and .8 of expert 0; medium .5; large 0.
    assert layer.kind == 'level' and np.allclose(layer.mass, [[.9, .1], [.5, .5], [0, 1]])
    assert layer.leads.tolist() == [[2, 0], [1, 0], [0, 1]] and layer.leader.tolist() == [0, 1, 0, 0]
    # Total variance of one expert: values 1, 0, .8, .5 with mean .575: (.4225 ** 2 ...) is told by the gates.
    gates = np.array([1, 0, .8, .5])
    between = (2 * (.9 - gates.mean()) ** 2 + (.5 - gates.mean()) ** 2 + gates.mean() ** 2) / 4
    assert layer.explained == pytest.approx(between / gates.var())


def test_levels_need_to_be_known():
    rng = np.random.default_rng(0)
    sizes = scene_sizes(rng, 8)
    model = nn.ModuleList([PerLevel(SoftmaxTopKRouter(24, 4, 2)), Gated(SoftmaxTopKRouter(24, 4, 2))]).eval()
    with SizeCollector(model, shuffles=199) as collector, collector.batch([whole(s) for s in sizes]):
        model[0](level_features(rng, sizes))
        model[1](pooled_features(rng, sizes))
    found = collector.analyze()
    assert [layer.name for layer in found.layers] == ['1']
    assert 'not analysed: 0, because its gates are those of FPN levels, and nothing tells' in size_table(found)


def untrained_levels(seeds):
    reported, by_chance = [], []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        sizes = scene_sizes(rng, 30)
        model = PerLevel(SoftmaxTopKRouter(24, 4, 2))
        found = analyse_levels(model, level_features(rng, sizes), sizes, seed=seed, shuffles=99)
        reported.append(found.separates)
        by_chance.append(found.layers[0].chance_p <= .1)
    return np.mean(reported), np.mean(by_chance)


@pytest.mark.parametrize('seeds', [8, pytest.param(40, marks=pytest.mark.slow)])
def test_untrained_gates_of_levels_are_reported_at_the_nominal_rate_at_most(seeds):
    reported, by_chance = untrained_levels(seeds)
    assert reported <= .1 + 3 * (.09 / seeds) ** .5
    assert by_chance > .8  # levels differ, and stand for sizes: chance alone would report every router


@pytest.mark.slow
def test_gates_that_do_not_know_level_or_image_are_chance():
    p = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        sizes = scene_sizes(rng, 30)
        x = torch.tensor(rng.normal(size=(30, LEVELS, 24)), dtype=torch.float32)
        torch.manual_seed(seed)
        found = analyse_levels(PerLevel(SoftmaxTopKRouter(24, 4, 2)), x, sizes, seed=seed, shuffles=9)
        p.append(found.layers[0].chance_p)
    # Nominal 10 % of 40, standard deviation 4.7 points.
    assert np.mean(np.array(p) <= .1) < .1 + 3 * .047 and .35 < np.mean(p) < .65


def test_a_router_that_learned_levels_is_reported():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    sizes = scene_sizes(rng, 40)
    x, model = level_features(rng, sizes), PerLevel(NoisyTopKRouter(24, 4, 2, zero_init=False))
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    for _ in range(150):
        logits = model.eval().router(x.flatten(0, 1)).logits
        loss = nn.functional.cross_entropy(logits, torch.arange(LEVELS).repeat(40))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = analyse_levels(model, x, sizes, seed=0, shuffles=199)
    assert found.separates and found.layers[0].explained > .5
    assert [found.layers[0].expert_of(size) for size in range(3)] == [0, 1, 2]
    planted = analyse_levels(PerLevel(SoftmaxTopKRouter(24, 4, 2)), x, sizes, seed=0, shuffles=199,
                             around=lambda c: planted_sizes(c.model, c))
    assert planted.separates


# ---- experts that choose

def test_an_object_is_looked_at_in_few_places():
    from moe_zoo.analysis.object_gates import lay_out
    layout = lay_out(Routing(torch.zeros(64, 2), None, None, shape=(1, 8, 8)), None, None, 8)
    objects = [Objects([[0, 0, 1, 1], [0, 0, .125, .125]], [20000, 100])]
    weights = item_weights(layout, objects, 64)
    assert weights.sum(axis=1).tolist() == [1, 0, 1] and weights[0, 0] == 1
    assert np.flatnonzero(weights[2]).tolist() == [0, 21, 42, 63]  # evenly over the 64 places


def test_experts_choose_again_as_many():
    # Groups of 3 and 2 items. Expert 0 took 1 and 1, expert 1 took 2 and none.
    kept = torch.tensor([[True, True], [False, True], [False, False], [False, False], [True, False]])
    every = torch.tensor([[0, 1]] * 5)
    gates = torch.full((5, 2), .5)
    taken = taken_by_expert(Routing(gates, gates, gates, every, kept=kept, by_expert=True), 3)
    assert taken.tolist() == [[1, 2], [1, 0]]
    logits = torch.tensor([[0., 1.], [2., 0.], [1., 3.], [5., 0.], [9., 0.]])
    swapped = torch.tensor([[1, 0]] * 5)  # the order of the pairs does not matter
    again = choose_again(Routing(logits, gates, gates, swapped, by_expert=True), 3, taken)
    # Of the first group expert 0 takes item 1, expert 1 items 2 and 0; of the second expert 0 takes item 4.
    assert again.kept.flip(1).tolist() == [[False, True], [True, False], [False, True], [False, False], [True, False]]
    outside = choose_again(Routing(logits, gates, gates, every, by_expert=True), 3, taken,
                           torch.tensor([True, False, True, True, False]))
    # Expert 0 likes item 0 better than item 2 (.27 and .12), may not have items 1 and 4.
    assert outside.kept[:, 0].tolist() == [True, False, False, True, False]


def scenes_of_tokens(rng, images, width=16):
    """4 x 4 tokens an image whose features tell object from ground, and objects on the left or right half."""
    x = rng.normal(size=(images, 16, width)).astype(np.float32)
    objects = []
    left = np.tile([1, 1, 0, 0], 4).astype(bool)
    for n in range(images):
        small = n % 2 == 0
        x[n, left == small, :4] += 2 if small else -2
        objects.append(Objects([[0, 0, .5, 1] if small else [.5, 0, 1, 1]], [100 if small else 20000]))
    return torch.tensor(x), objects


def run_tokens(layer, x, objects, seed=0, shuffles=99):
    collector = SizeCollector(layer.eval(), shuffles, seed)
    with collector:
        for start in range(0, len(x), 8):
            with collector.batch(objects[start:start + 8], (32, 32)):
                layer(x[start:start + 8])
    return collector.analyze(permutations=99, alpha=.1)


def expert_choice(seed):
    torch.manual_seed(seed)
    return MoEMlp(16, 8, num_experts=4, router='expert_choice', capacity_factor=.25, group_size=16)


def test_layers_whose_experts_choose_have_a_verdict():
    x, objects = scenes_of_tokens(np.random.default_rng(0), 24)
    fresh = run_tokens(expert_choice(0), x, objects).layers[0]
    assert fresh.kind == 'place' and fresh.separates is False
    # What no expert took is no expert's: each takes 4 of 16 items, and they overlap.
    assert (fresh.mass.sum(axis=1)[[0, 2]] < 1).all()
    learned = expert_choice(0)
    with torch.no_grad():
        learned.router.weight.zero_()
        learned.router.weight[:, :4] = torch.tensor([3., -3., 0., 0.])[:, None]
    found = run_tokens(learned, x, objects).layers[0]
    assert found.separates and found.expert_of(0) == 0 and found.expert_of(2) == 1


@pytest.mark.parametrize('seeds', [6, pytest.param(25, marks=pytest.mark.slow)])
def test_shuffled_routers_of_experts_that_choose_are_untrained_ones(seeds):
    rates = [run_tokens(expert_choice(seed), *scenes_of_tokens(np.random.default_rng(seed), 16), seed).separates
             for seed in range(seeds)]
    assert np.mean(rates) <= .1 + 3 * (.09 / seeds) ** .5


def test_routers_that_take_patches_themselves_have_a_verdict():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    _, objects = scenes_of_tokens(rng, 16)
    layer = PatchMoE(3, 8, 8, num_experts=4, patches_per_expert=4)
    found = run_tokens(layer, torch.tensor(rng.normal(size=(16, 3, 32, 32)), dtype=torch.float32), objects).layers[0]
    assert found.kind == 'place' and found.untrained_p is not None and found.separates is False


def test_a_router_that_is_called_level_by_level_is_found():
    class Joined(PerLevel):
        def forward(self, x):
            each = [self.router(x[:, level]) for level in range(LEVELS)]
            fields = [torch.cat([getattr(r, key) for r in each]) for key in ('logits', 'gates', 'weights', 'indices')]
            record(self, Routing(*fields, shape=(LEVELS * len(x),)))
    model = Joined(SoftmaxTopKRouter(24, 4, 2)).eval()
    with SizeCollector(model, shuffles=9) as collector, trace_routing(model) as trace:
        collector.now = [whole([0])]
        model(torch.randn(2, LEVELS, 24))
        router, features, _ = collector._source(trace[''][0])
    assert router is model.router and features.shape == (2 * LEVELS, 24)


def test_expert_choice_router_alone_is_of_one_group():
    x, objects = scenes_of_tokens(np.random.default_rng(1), 8)
    assert run_tokens(Gated(ExpertChoiceRouter(16, 4)), x, objects).layers[0].untrained_p is not None
