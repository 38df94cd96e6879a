"""Object sizes: arithmetic by hand, error rates by simulation, both controls, also with a real detector."""
import contextlib
import json
import shlex

import numpy as np
import pytest
import torch
from torch import nn

from moe_zoo.analysis import object_gates, object_sizes, permutation, shuffled_routers
from moe_zoo.analysis.figures import class_figure, save, size_figure, usage_figure
from moe_zoo.analysis.object_gates import Objects, gate_shares, lay_out, overlaps, size_classes
from moe_zoo.analysis.object_sizes import SizeCollector, analyze, planted_sizes, size_table, untrained_routers
from moe_zoo.analysis.permutation import (
    max_p,
    permuted_mass,
    separation,
)
from moe_zoo.analysis.usage import LayerUsage
from moe_zoo.errors import InputError
from moe_zoo.layers import RoutedLayer
from moe_zoo.layers.routed import token_grid
from moe_zoo.routing import (
    NoisyTopKRouter,
    Routing,
    SigmoidRouter,
    SigmoidTopKRouter,
    SoftmaxTopKRouter,
    record,
    routing_context,
)

AREAS = np.array([400., 3000., 12000.])  # one of each class
WHOLE = np.array([0., 0., 1., 1.])


def whole(sizes):
    """Objects of these sizes whose boxes are the whole image."""
    return Objects(np.tile(WHOLE, (len(sizes), 1)), AREAS[sizes])


class Gated(RoutedLayer):
    """A router and nothing else: what is tested here is the decision."""

    def __init__(self, router):
        super().__init__()
        self.router = router
        self.num_experts, self.num_selected = router.num_experts, router.num_selected

    def forward(self, x):
        record(self, self.router(x.flatten(0, -2))._replace(shape=tuple(x.shape[:-1])))
        return x


def scene_sizes(rng, images=60):
    """As the digit scenes: only small objects, only medium ones, a large one, a mixture, in turns."""
    numbers = [lambda: np.full(rng.integers(3, 7), 0), lambda: np.full(rng.integers(1, 4), 1), lambda: np.full(1, 2),
               lambda: rng.integers(0, 3, size=rng.integers(2, 6))]
    return [numbers[i % 4]() for i in range(images)]


def pooled_features(rng, sizes, width=24):
    """Features that tell the sizes of an image, as those of any backbone do, beside much that all images share."""
    mix = np.stack([np.bincount(s, minlength=3) / len(s) for s in sizes])
    x = 2 * rng.normal(size=width) + mix @ rng.normal(size=(3, width)) + 0.5 * rng.normal(size=(len(sizes), width))
    return torch.tensor(np.maximum(x, 0), dtype=torch.float32)


def collect(model, inputs, sizes, around=None, **keywords):
    """One batch through every layer of `model`, each with its own input, boxes over the whole image."""
    collector = SizeCollector(model, **keywords)
    with around(collector) if around else contextlib.nullcontext(), collector:
        with collector.batch([whole(s) for s in sizes]):
            for layer, x in zip(model, inputs):
                layer(x)
    return collector


# ---- arithmetic

def test_size_classes_use_coco_limits():
    assert size_classes([1, 1023, 1024, 9216, 9217]).tolist() == [0, 0, 1, 1, 2]


def test_overlaps_by_hand():
    # Halves of [0, 1]. 0.25 to 1: 0.25 and 0.5, which is 1/3 and 2/3. A point at 0.75 lies in the second; 1 is its end.
    found = overlaps(np.array([.25, .75, 1., -1.]), np.array([1., .75, 1., .5]), 2)
    assert np.allclose(found, [[1 / 3, 2 / 3], [0, 1], [0, 1], [1, 0]])


@pytest.mark.parametrize('tokens, size, expected', [
    (196, (224, 224), (0, 14, 14)), (197, (224, 224), (1, 14, 14)), (6, (32, 48), (0, 2, 3)),
    (201, (224, 224), (5, 14, 14)), (150, (224, 224), None)])
def test_token_grid(tokens, size, expected):
    assert token_grid(tokens, size) == expected


def test_shares_ignore_capacity_and_sum_to_one():
    routing = Routing(torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor([[.3, .1], [.5, .5]]),
                      torch.tensor([[0, 2], [1, 0]]), kept=torch.tensor([[True, False], [False, False]]))
    assert np.allclose(gate_shares(routing), [[.75, 0, .25], [.5, .5, 0]])
    # Where experts choose, what they did not take has no share: item 0 is expert 1's alone, item 1 is nobody's.
    every, gates = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[.6, .4], [.5, .5]])
    chosen = Routing(gates, gates, gates, every, kept=torch.tensor([[False, True], [False, False]]), by_expert=True)
    assert np.allclose(gate_shares(chosen), [[0, 1], [0, 0]])


def gate_maps(share, shape, extents=None, input_size=None, cells=2):
    """Maps of expert 0, whose shares are given; expert 1 has the rest."""
    shares = np.stack([share, 1 - np.asarray(share)], axis=1)
    routing = Routing(torch.zeros(len(share), 2), None, None, shape=shape)
    return lay_out(routing, extents, input_size, cells).maps(shares)[:, :, 0]


def test_maps_are_cut_to_the_true_area():
    # One image of 2 x 4 positions, right half padding. The share of expert 0 counts the columns.
    share = np.tile([0., .1, .7, .9], 2)
    assert np.allclose(gate_maps(share, (1, 2, 4), np.array([[1., .5]])), [[0, .1, 0, .1]])
    # Without padding each of the two columns covers two positions.
    assert np.allclose(gate_maps(share, (1, 2, 4)), [[.05, .8, .05, .8]])


def test_tokens_find_their_places():
    # A class token and 2 x 2 patches of a 32 x 32 image; expert 0 has the upper patches.
    share = [.5, 1., 1., 0., 0.]
    assert gate_maps(share, (1, 5), None, (32, 32)).tolist() == [[1, 1, 0, 0]]
    # Without the size there is no grid: the mean over the tokens, 2.5 / 5.
    assert gate_maps(share, (1, 5)).tolist() == [[.5]]


def test_objects_weigh_positions_by_overlap():
    # A small object on the upper left quarter, a large one on the lower half, of a 2 x 2 grid.
    objects = Objects([[0, 0, .5, .5], [0, .5, 1, 1]], [100, 20000], np.array([1, 4]))
    assert objects.sizes.tolist() == [0, 2]
    assert objects.at('place', 4).tolist() == [[1, 0, 0, 0], [0, 0, .5, .5]]
    assert objects.at('level', 5).tolist() == [[0, 1, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert objects.at('image', 1).tolist() == objects.at('tokens', 1).tolist() == [[1], [1]]
    assert Objects([], []).at('place', 4).shape == (0, 4)


def test_separation_by_hand():
    # 3 small objects with mass (1, 0), 1 large with (0, 1): m = (.75, .25), variance .75 * .25^2 + .25 * .75^2 = .1875.
    mass = np.array([[1., 0.], [9., 9.], [0., 1.]])  # the row without objects does not count
    assert np.allclose(separation(mass, np.array([3, 0, 1])), [.1875 ** .5] * 2)
    assert separation(np.full((3, 2), .3), np.array([1, 2, 3])).tolist() == [0, 0]


def test_permuted_mass_is_the_plain_loop(monkeypatch):
    rng = np.random.default_rng(0)
    gates, objects = rng.random((5, 4, 3)), rng.random((5, 2, 4))
    orders = np.stack([rng.permutation(5) for _ in range(7)])
    expected = np.stack([
        sum(objects[n] @ gates[order[n]] for n in range(5)) / objects.sum(axis=(0, 2))[:, None] for order in orders])
    assert np.allclose(permuted_mass(gates, objects, orders), expected)


def test_max_p_by_hand():
    # Outcomes of the first statistic: 4 (observed), 1, 2, 3, 0; of the second, 5, 5, 5, 5, 5: never varies.
    observed, null = np.array([4., 5.]), np.array([[1., 5.], [2., 5.], [3., 5.], [0., 5.]])
    assert max_p(observed, null).tolist() == [1 / 5, 1]
    # Two statistics of equal spread: the second null reaches what the first one's observed value is.
    observed, null = np.array([4., 0.]), np.array([[0., 4.], [1., 1.], [2., 2.], [3., 3.]])
    assert max_p(observed, null).tolist() == [2 / 5, 1]


def test_layers_that_say_the_same_cost_no_power():
    """All layers are permuted alike: of three that are one, the largest is each of them, and p that of one alone."""
    rng = np.random.default_rng(3)
    sizes = scene_sizes(rng, 20)
    gates = rng.dirichlet(np.ones(4), size=20)
    scenes, chance = [whole(s) for s in sizes], {'permutations': 99, 'alpha': .1}
    alone = analyze({'a': gates[:, None]}, {'a': 'image'}, scenes, **chance).layers[0].chance_p
    assert .02 < alone < .9
    three = analyze(dict.fromkeys('abc', gates[:, None]), dict.fromkeys('abc', 'image'), scenes, **chance)
    assert [layer.chance_p for layer in three.layers] == [alone] * 3


# ---- error rates

def clustered_null(seed):
    """Gates that know nothing of sizes, and scenes whose objects share them: p of the test, and of a naive one."""
    rng = np.random.default_rng(seed)
    sizes = scene_sizes(rng)
    gates = rng.dirichlet(np.ones(4), size=len(sizes))
    chance = {'permutations': 99, 'alpha': .1, 'seed': seed}
    p = analyze({'a': gates[:, None]}, {'a': 'image'}, [whole(s) for s in sizes], **chance).layers[0].chance_p
    # Naive: objects as if each were an image with a gate vector of its own.
    each = np.repeat(gates, [len(s) for s in sizes], axis=0)
    labels = [whole([s]) for s in np.concatenate(sizes)]
    naive = analyze({'a': each[:, None]}, {'a': 'image'}, labels, **chance).layers[0].chance_p
    return p, naive


@pytest.mark.parametrize('scenes', [30, pytest.param(120, marks=pytest.mark.slow)])
def test_chance_test_keeps_its_level_where_objects_share_gates(scenes):
    p, naive = np.array([clustered_null(seed) for seed in range(scenes)]).T
    # Nominal: 10 % of 120 with standard deviation sqrt(.1 * .9 / 120) = 2.7 %; three of them either side.
    assert .1 - 3 * (.09 / scenes) ** .5 < (p <= .1).mean() < .1 + 3 * (.09 / scenes) ** .5
    assert .5 - .9 / scenes ** .5 < p.mean() < .5 + .9 / scenes ** .5  # a uniform p has a deviation of .29
    # Objects as units, which are no units, are reported far too often: the reason for permuting images.
    assert (naive <= .1).mean() > .3


ROUTERS = {
    'sigmoid': lambda: SigmoidRouter(24, 8),
    'softmax, top 2': lambda: SoftmaxTopKRouter(24, 4, 2),
    'top 2, softmax': lambda: NoisyTopKRouter(24, 4, 2, zero_init=False),
    'sigmoid, top 2': lambda: SigmoidTopKRouter(24, 4, 2),
}


def two_layers(make, seed):
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model = nn.ModuleList([Gated(make()), Gated(make())]).eval()
    sizes = scene_sizes(rng)
    return model, [pooled_features(rng, sizes), pooled_features(rng, sizes)], sizes


@pytest.mark.parametrize('make, seeds', [
    pytest.param(ROUTERS['softmax, top 2'], 12, id='few'),
    *(pytest.param(make, 40, id=name, marks=pytest.mark.slow) for name, make in ROUTERS.items())])
def test_untrained_routers_are_reported_at_the_nominal_rate_at_most(make, seeds):
    reported, by_chance = [], []
    for seed in range(seeds):
        collector = collect(*two_layers(make, seed), shuffles=99, seed=seed)
        result = collector.analyze(permutations=99, alpha=.1)
        reported.append(result.separates)
        by_chance.append(min(layer.chance_p for layer in result.layers) <= .1)
    assert np.mean(reported) <= .1 + 3 * (.09 / seeds) ** .5  # of 40, 10 % have a standard deviation of 4.7 %
    # The features tell sizes, so an untrained router does differ between them: permuted images alone would report it.
    assert np.mean(by_chance) > .8


@pytest.mark.parametrize('make', ROUTERS.values(), ids=ROUTERS)
def test_planted_sizes_are_reported(make):
    for seed in range(2):
        model, inputs, sizes = two_layers(make, seed)
        result = collect(model, inputs, sizes, lambda c: planted_sizes(model, c), shuffles=499).analyze()  # noqa: B023
        assert result.separates and all(layer.separates for layer in result.layers)
        assert result.layers[0].mass[0, 0] > .8  # expert 0 serves most small objects, mixed scenes apart
        # one that differs the most is the largest of all permutations and experts: p is 1 of 2,000, and may tie
        assert all(layer.expert_p.min() <= .01 for layer in result.layers)


def test_a_router_that_learned_sizes_is_reported():
    model, inputs, sizes = two_layers(lambda: SoftmaxTopKRouter(24, 4, 2), 0)
    mix = torch.tensor(np.stack([np.bincount(s, minlength=3) / len(s) for s in sizes]), dtype=torch.float32)
    optimizer = torch.optim.Adam(model[1].parameters(), 1e-2)
    for _ in range(200):
        loss = -(mix * model[1].router(inputs[1]).logits[:, :3].log_softmax(-1)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    result = collect(model, inputs, sizes, shuffles=999).analyze()
    assert [layer.separates for layer in result.layers] == [False, True]


def test_constant_gates_are_no_separation():
    # A fresh router of Shazeer's starts at zero: every image gets experts 0 and 1.
    model, inputs, sizes = two_layers(lambda: NoisyTopKRouter(24, 4, 2), 0)
    result = collect(model, inputs, sizes, shuffles=199).analyze()
    assert not result.separates and [layer.separation for layer in result.layers] == [0, 0]
    assert [layer.chance_p for layer in result.layers] == [1, 1]
    # Drawn instead, it is the control that has something to show.
    collector = collect(model, inputs, sizes, shuffles=199)
    with untrained_routers(collector.routers, seed=1):
        drawn = collect(model, inputs, sizes, shuffles=199).analyze()
    assert drawn.layers[0].separation > 0 and not drawn.separates
    assert not model[0].router.weight.any()  # and the weights are back


# ---- a real detector

DETECTORS = {
    'top 2 of 4 experts in res5': [],
    'CondConv in every late block': [
        'MODEL.BACKBONE.NAME', 'build_timm_fpn_backbone', 'MOE.TIMM.NAME', 'condconv_resnet18',
        'MOE.TIMM.CHECK_INPUT', 'False'],
}


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    pytest.importorskip('sklearn')
    from moe_zoo.data import write_scenes
    return write_scenes(tmp_path_factory.mktemp('data') / 'scenes', train=8, val=60, classes=range(5))


@pytest.mark.slow
@pytest.mark.parametrize('options', DETECTORS.values(), ids=DETECTORS)
def test_controls_with_a_real_detector(options, scenes, repository, tmp_path, capsys):
    pytest.importorskip('detectron2')
    from moe_zoo.detection.object_sizes import main
    found = main([
        '--config-file', str(repository / 'configs/demo/retinanet_digits.yaml'), '--trials', 'none',
        '--output', str(tmp_path),
        '--control', 'untrained', '--control', 'planted', 'MOE.DATA.ROOT', str(scenes), *options])
    assert not found['sizes']['separates']  # a detector fresh from the constructor
    assert not found['controls']['untrained']['separates'] and found['controls']['planted']['separates']
    drawn = found['controls']['untrained']['layers'][-1]
    assert drawn['separation'] > 0  # the control had gates that vary
    printed = capsys.readouterr().out
    assert 'Control untrained' in printed and 'AGAINST EXPECTATION' not in printed
    assert json.loads((tmp_path / 'object_sizes.json').read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / 'object_sizes.png').read_bytes()[:4] == b'\x89PNG'
    assert found['command'].endswith(f'MOE.DATA.ROOT {scenes} {shlex.join(options)}'.rstrip())
    assert f'--control planted MOE.DATA.ROOT {scenes}' in (tmp_path / 'index.html').read_text()


@pytest.mark.slow
def test_forced_experts_give_their_own_ap(scenes, repository, tmp_path, capsys):
    """A detector that sees nothing but what expert 1 lets through has AP with this expert alone."""
    pytest.importorskip('detectron2')
    from moe_zoo.analysis.force import force_expert
    from moe_zoo.detection import load_config
    from moe_zoo.detection.object_sizes import Scenes
    cfg = load_config(repository / 'configs/demo/retinanet_digits.yaml', [
        'MOE.DATA.ROOT', str(scenes), 'OUTPUT_DIR', str(tmp_path)])
    test_set = Scenes(cfg)

    class Oracle(nn.Module):
        """Detects every object, scored by the gate of expert 1, as far as that is above one half."""
        def __init__(self):
            super().__init__()
            self.gate = Gated(SigmoidRouter(1, 2))

        def forward(self, batch):
            from detectron2.structures import Boxes, Instances
            with routing_context() as context:
                self.gate(torch.zeros(len(batch), 1))
            outputs = []
            for image, gates in zip(batch, context.routings[0].weights):
                entries = test_set.coco.imgToAnns[image['image_id']] if gates[1] > .6 else []
                boxes = torch.tensor([a['bbox'] for a in entries]).reshape(-1, 4).float()
                boxes[:, 2:] += boxes[:, :2]
                outputs.append({'instances': Instances(
                    (image['height'], image['width']), pred_boxes=Boxes(boxes), scores=gates[1].expand(len(boxes)),
                    pred_classes=torch.tensor([a['category_id'] - 1 for a in entries], dtype=torch.int64))})
            return outputs
    model = Oracle().eval()
    with force_expert(model, 1):
        assert set(test_set.run(model, 'expert 1').values()) == {100}
    assert test_set.found().all()
    with force_expert(model, 0):
        assert set(test_set.run(model, 'expert 0').values()) == {None}
    assert not test_set.found().any()
    # The objects handed to the analysis are COCO's: as many as annotations, and inside the image.
    objects = [test_set.objects(image) for batch in test_set.loader for image in batch]
    boxes, areas = [each.boxes for each in objects], [each.areas for each in objects]
    assert sum(map(len, boxes)) == len(test_set.coco.anns)
    assert all(((0 <= b) & (b <= 1)).all() for b in boxes)
    assert np.allclose(np.concatenate(areas),
                       np.concatenate([(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in boxes]) * 192 ** 2)


def test_the_tool_names_what_it_cannot_use(repository, tmp_path, capsys):
    pytest.importorskip('detectron2')
    from moe_zoo.detection.object_sizes import main
    demo = str(repository / 'configs/demo/retinanet_digits.yaml')

    def refusal(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(['--output', str(tmp_path), *arguments])
        assert stopped.value.code == 2
        return capsys.readouterr().err
    assert "'nothing.yaml' is not a file" in refusal('--config-file', 'nothing.yaml')
    assert "Checkpoint 'none.pth' does not exist" in refusal('--config-file', demo, '--weights', 'none.pth')
    assert 'RetinaNet has no routed layer' in refusal(
        '--config-file', demo, 'MODEL.META_ARCHITECTURE', 'RetinaNet', 'MODEL.BACKBONE.NAME',
        'build_retinanet_resnet_fpn_backbone', 'MODEL.RESNETS.RES2_OUT_CHANNELS', '64')
    assert 'the analysis takes one data set' in refusal(
        '--config-file', demo, 'DATASETS.TEST', "('digit_scenes_val', 'digit_scenes_train')")
    # before a pass over images, of which there are none here
    assert 'seed=-1: use a number of at least 0.' in refusal('--config-file', demo, '--seed', '-1')
    assert 'shuffles=-3 cannot give a p-value of alpha=0.01 or less for 1 layer: use' in refusal(
        '--config-file', demo, '--shuffles', '-3')
    assert 'permutations=9 cannot give' in refusal('--config-file', demo, '--permutations', '9')
    assert 'alpha=0.0: use a level between 0 and 1' in refusal('--config-file', demo, '--alpha', '0')
    assert not list(tmp_path.iterdir())


# ---- collecting

def test_gates_of_places_meet_the_boxes_there():
    """Expert 0 on the left half, 1 on the right, in two images of 4 x 4 positions; objects on either side."""
    class Halves(RoutedLayer):
        num_experts = num_selected = 2

        def forward(self, x):
            left = torch.tensor([1., 1., 0., 0.]).expand(2, 4, 4)
            gates = torch.stack([left, 1 - left], dim=-1).flatten(0, 2)
            record(self, Routing(gates, gates, gates, shape=(2, 4, 4)))
    model = Halves()
    with SizeCollector(model, shuffles=0, cells=4) as collector:
        with collector.batch([
                Objects([[0, 0, .5, 1]], [100]), Objects([[.5, 0, 1, 1], [.25, 0, .75, .5]], [20000, 3000])]):
            model(torch.zeros(2, 1))
    result = collector.analyze()
    layer = result.layers[0]
    assert layer.mass.tolist() == [[1, 0], [.5, .5], [0, 1]] and layer.kind == 'place'
    assert result.objects == {'small': 1, 'medium': 1, 'large': 1} and result.images == 2
    assert layer.separates is None and 'no shuffled router' in size_table(result)


def test_padding_is_taken_from_the_open_context():
    class Columns(RoutedLayer):
        """Positions of a map whose router sends the padding, marked by a zero feature, to expert 1."""
        def __init__(self):
            super().__init__()
            self.router = SigmoidRouter(1, 2)
            self.num_experts = self.num_selected = 2
            with torch.no_grad():
                self.router.weight.copy_(torch.tensor([[40.], [-40.]]))
                self.router.bias.copy_(torch.tensor([-20., 20.]))

        def forward(self, x):
            record(self, self.router(x.reshape(-1, 1))._replace(shape=tuple(x.shape)))
    model = Columns().eval()
    x = torch.ones(2, 4, 4)
    x[0, :, 2:] = 0  # the first image fills the left half
    with SizeCollector(model, shuffles=0) as collector, collector.batch([whole([0]), whole([2])]):
        with routing_context(torch.tensor([[32, 16], [32, 32]]), (32, 32)):
            model(x)
    assert np.allclose(collector.analyze().layers[0].mass[[0, 2], 0], 1)


def test_batches_add_up_and_empty_images_do_not_count(monkeypatch):
    rng = np.random.default_rng(0)
    sizes = scene_sizes(rng, 12)
    x = pooled_features(rng, sizes)
    model = nn.ModuleList([Gated(SoftmaxTopKRouter(24, 4, 2))]).eval()
    at_once = collect(model, [x], sizes, shuffles=199)
    parts = SizeCollector(model, shuffles=199)
    monkeypatch.setattr(shuffled_routers, 'BUFFER_ITEMS', 3)  # the shuffled routers run in between
    with parts:
        for i, s in enumerate(sizes):
            with parts.batch([whole(s), Objects([], [])]):
                model[0](torch.stack([x[i], x[0]]))
    a, b = at_once.analyze(), parts.analyze()
    assert b.images == 12 and np.allclose(a.layers[0].mass, b.layers[0].mass)
    assert np.isclose(a.layers[0].untrained_separation, b.layers[0].untrained_separation)
    assert a.layers[0].untrained_p == b.layers[0].untrained_p


def test_repeated_records_are_kept_apart_and_foreign_ones_named():
    class Pyramid(RoutedLayer):
        num_experts = num_selected = 2

        def forward(self, x):
            for gates in ([[1., 0.], [1., 0.]], [[0., 1.], [1., 0.]]):
                gates = torch.tensor(gates)
                record(self, Routing(gates, gates, gates, shape=(2,)))
            record(self, Routing(gates[:1], gates[:1], gates[:1], shape=(1,)))
    model = nn.ModuleList([Pyramid()])
    result = collect(model, [torch.zeros(2, 1)], [np.array([0]), np.array([2])], shuffles=0).analyze()
    assert [layer.name for layer in result.layers] == ['0', '0#1']
    assert result.layers[1].mass[[0, 2]].tolist() == [[0, 1], [1, 0]]
    assert 'not analysed: 0#2, because its record has shape (1,)' in size_table(result)


def test_nothing_is_left_on_the_model():
    model, inputs, sizes = two_layers(ROUTERS['sigmoid'], 0)
    collect(model, inputs, sizes, lambda c: planted_sizes(model, c), shuffles=199).analyze()
    assert not any(module._forward_hooks for module in model.modules())


def test_results_are_json_and_text_and_figures(tmp_path):
    model, inputs, sizes = two_layers(ROUTERS['sigmoid'], 0)
    result = collect(model, inputs, [np.minimum(s, 1) for s in sizes], shuffles=199).analyze()
    content = json.loads(json.dumps(result.as_dict()))
    assert content['layers'][0]['mass']['large'] is None and len(content['layers'][0]['mass']['small']) == 8
    assert content['objects']['large'] == 0
    table = size_table(result)
    assert '(an object has the gate vector of its image)' in table
    assert 'by chance); images permuted: p = ' in ' '.join(table.split())
    ap = {'free': {'APs': 10., 'APm': 20., 'APl': None}, 'expert 0': {'APs': 5., 'APm': 2., 'APl': 1.}}
    usage = LayerUsage('a', 4, torch.tensor([3., 1.]), torch.tensor([3., 1.]), 0., torch.eye(2))
    figures = {'a.png': size_figure(result, ap), 'a.svg': usage_figure({'a': usage}), 'a.pdf': class_figure(usage)}
    for name, figure in figures.items():
        assert save(figure, tmp_path / name).stat().st_size > 2000
    assert (tmp_path / 'a.png').read_bytes()[:4] == b'\x89PNG' and '<svg' in (tmp_path / 'a.svg').read_text()
    with pytest.raises(InputError, match="figure '.*a.bmp': end its name in .png, .svg or .pdf"):
        save(figures['a.png'], tmp_path / 'a.bmp')


@pytest.mark.parametrize('sizes, keywords, message', [
    ([[0], [0]], {}, 'The data set has 2 small, 0 medium, 0 large objects in 2 images: .* at least two size classes'),
    ([[0, 2]], {}, 'The data set has 1 small, 0 medium, 1 large objects in 1 images'),
    ([[0], [1]], {'alpha': 2}, 'alpha=2: use a level between 0 and 1'),
    ([[0], [1]], {'permutations': 50}, 'permutations=50 cannot give a p-value of alpha=0.01 or less .* at least 99'),
])
def test_bad_data_and_arguments_are_named(sizes, keywords, message):
    model = nn.ModuleList([Gated(SigmoidRouter(2, 2))])
    sizes = [np.array(s) for s in sizes]
    with pytest.raises(InputError, match=message):
        collect(model, [torch.randn(len(sizes), 2)], sizes, shuffles=99).analyze(**keywords)


def test_too_few_shuffles_are_named():
    # Two layers at alpha .01 need 2 / (shuffles + 1) <= .01.
    with pytest.raises(InputError, match='shuffles=99 .* alpha=0.01 or less for 2 layers: use at least 199'):
        collect(*two_layers(ROUTERS['sigmoid'], 0), shuffles=99).analyze()
    with pytest.raises(InputError, match='No gate was seen'):
        SizeCollector(nn.ModuleList([Gated(SigmoidRouter(2, 2))])).analyze()
    with pytest.raises(InputError, match='model: Linear has no routed layer'):
        SizeCollector(nn.Linear(1, 1))


def test_statistics_know_no_model():
    """The permutation tests are plain NumPy; the analysis knows records, not families or detectors."""
    import ast
    from pathlib import Path
    for module, allowed in (
            (permutation, {'numpy', 'typing'}), (object_sizes, None), (object_gates, None), (shuffled_routers, None)):
        names = {getattr(node, 'module', None) or alias.name
                 for node in ast.walk(ast.parse(Path(module.__file__).read_text()))
                 if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
        assert not any('detection' in n or 'models' in n or 'detectron2' in n for n in names)
        assert allowed is None or names == allowed


def test_untrained_routers_forget_all_but_themselves():
    """What training left goes, the bias to zero; a matrix that starts at zero is drawn; afterwards it is all back."""
    routers = {'top-k': NoisyTopKRouter(400, 100), 'mix': SigmoidRouter(4, 3)}
    for router in routers.values():
        for p in router.parameters():
            nn.init.constant_(p, 7.)
    with untrained_routers(routers, seed=1):
        drawn = {name: {key: value.clone() for key, value in router.state_dict().items()}
                 for name, router in routers.items()}
        assert drawn['top-k']['weight'].std().item() == pytest.approx(1 / 20, rel=.05)
        assert drawn['mix']['bias'].tolist() == [0, 0, 0] and drawn['mix']['weight'].abs().max() < 1
    assert all((p == 7).all() for router in routers.values() for p in router.parameters())
    with untrained_routers(routers, seed=2):
        assert not torch.equal(routers['mix'].weight, drawn['mix']['weight'])
