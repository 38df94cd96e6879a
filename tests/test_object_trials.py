"""Object sizes in a detector: dropped experts, the trials, COCO's numbers by size, matches, levels, page, pictures."""
import json

import numpy as np
import pytest
import torch
from test_object_sizes import Gated
from torch import nn

from moe_zoo.analysis.force import drop_expert, without_expert
from moe_zoo.errors import InputError
from moe_zoo.routing import (
    ExpertChoiceRouter,
    HierarchicalRouter,
    NoisyTopKRouter,
    Routing,
    SigmoidRouter,
    SoftmaxTopKRouter,
    trace_routing,
)

ROUTERS = {
    'softmax, top 2': lambda: SoftmaxTopKRouter(6, 4, 2),
    'top 2, softmax': lambda: NoisyTopKRouter(6, 4, 2, zero_init=False),
    'all of them': lambda: NoisyTopKRouter(6, 4, 4, zero_init=False),
    'mixed': lambda: SigmoidRouter(6, 4),
    'experts choose': lambda: ExpertChoiceRouter(6, 4),
    'in groups': lambda: HierarchicalRouter(6, 4, 2, 2, 1),
}


def decisions(model, x, expert=None, layer=None):
    with trace_routing(model) as trace:
        if expert is None:
            model(x)
        else:
            with drop_expert(model, expert, layer):
                model(x)
    return next(iter(trace.values()))[0]


@pytest.mark.parametrize('make', ROUTERS.values(), ids=ROUTERS)
def test_a_dropped_expert_has_no_weight_and_the_next_best_takes_its_place(make):
    torch.manual_seed(0)
    model, x = Gated(make()).eval(), torch.randn(20, 6)
    free, without, after = decisions(model, x), decisions(model, x, 1), decisions(model, x)
    assert torch.equal(free.weights, after.weights) and 'compute_logits' not in vars(model.router)
    mass = without.combine_matrix()
    assert not mass[:, 1].any() and mass.isfinite().all()
    if isinstance(model.router, SoftmaxTopKRouter) and not free.by_expert:
        # By hand: the two best of the other three, their gates from a softmax over these.
        others = free.logits.clone()
        others[:, 1] = -torch.inf
        assert torch.equal(without.indices, others.topk(2).indices)
        assert torch.allclose(without.weights, others.softmax(dim=1).topk(2).values)
    elif free.indices is None:
        assert torch.allclose(mass.sum(dim=1), free.weights.sum(dim=1))  # the others share what all had


def test_the_others_share_the_weight_by_hand():
    weights = torch.tensor([[.3, .1], [.5, .2]])
    routing = Routing(torch.zeros(2, 3), weights, weights, torch.tensor([[0, 2], [1, 0]]))
    # Item 0 keeps expert 2 with .1 * .4 / .1 = .4; item 1 has expert 1 with .5 * .7 / .5.
    assert torch.allclose(without_expert(routing, 0).combine_matrix(), torch.tensor([[0, 0, .4], [0, .7, 0]]))
    # Item 0 has experts 0 and 2 only; without both there is nothing to share.
    assert not without_expert(without_expert(routing, 0), 2).combine_matrix()[0].any()


def test_only_experts_that_are_there_can_be_dropped():
    model = nn.Sequential(Gated(SoftmaxTopKRouter(6, 4, 2)), Gated(SoftmaxTopKRouter(6, 1, 1))).eval()
    with pytest.raises(InputError, match="expert=4: layer '0' has 4 experts, of which one of several can be dropped"):
        decisions(model, torch.randn(2, 6), 4, '0')
    with pytest.raises(InputError, match="expert=0: layer '1' has 1 expert, of which one of several"):
        decisions(model, torch.randn(2, 6), 0)
    assert decisions(model, torch.randn(2, 6), 0, '0').indices.min() > 0


# ---- in a detector

detectron2 = pytest.importorskip('detectron2')


def boxes_of(rng, count):
    corner, side = rng.uniform(0, 100, size=(count, 2)), np.exp(rng.uniform(2.5, 5.2, size=(count, 2)))
    return np.concatenate([corner, side], axis=1)


@pytest.fixture(scope='module')
def noisy():
    """COCO objects of all sizes with a crowd, and detections: perturbed, of a wrong class, and none for some."""
    from pycocotools.coco import COCO
    rng = np.random.default_rng(0)
    coco, annotations, found = COCO(), [], []
    for image in range(1, 13):
        for box in boxes_of(rng, 5):
            number = len(annotations) + 1
            annotations.append({
                'id': number, 'image_id': image, 'category_id': int(rng.integers(1, 4)), 'bbox': box.tolist(),
                'area': float(box[2:].prod()), 'iscrowd': int(number % 17 == 0)})
            if rng.random() < .8:
                moved = box + rng.normal(size=4) * .1 * box[2:].min()
                found.append({
                    'image_id': image, 'category_id': annotations[-1]['category_id'] if rng.random() < .9 else 1,
                    'bbox': moved.tolist(), 'score': float(rng.random())})
    coco.dataset = {'images': [{'id': i, 'width': 256, 'height': 256} for i in range(1, 13)],
                    'categories': [{'id': i, 'name': str(i)} for i in (1, 2, 3)], 'annotations': annotations,
                    'info': {}}
    coco.createIndex()
    return coco, found


def test_numbers_by_size_are_pycocotools(noisy):
    from pycocotools.cocoeval import COCOeval

    from moe_zoo.detection.size_metrics import METRICS, size_metrics
    coco, found = noisy
    outcome = COCOeval(coco, coco.loadRes([dict(each) for each in found]), 'bbox')
    outcome.evaluate()
    outcome.accumulate()
    outcome.summarize()
    ours = size_metrics(coco, found)
    names = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl', None, None, 'AR', 'ARs', 'ARm', 'ARl')
    for name, value in zip(names, outcome.stats):
        assert name is None or ours[name] == pytest.approx(100 * value)
    for a, name in enumerate(('AP50s', 'AP50m', 'AP50l'), 1):  # which COCO does not print
        precision = outcome.eval['precision'][0, :, :, a, 2]
        assert ours[name] == pytest.approx(100 * precision[precision > -1].mean())
    assert 0 < ours['AP50s'] < 100 and size_metrics(coco, []) == dict.fromkeys(METRICS)


def test_found_objects_are_pycocotools_matches(noisy):
    from moe_zoo.detection.size_metrics import found_objects
    coco, found = noisy
    matches = found_objects(coco, found)
    crowds = {a['id'] for a in coco.dataset['annotations'] if a['iscrowd']}
    real = set(coco.anns) - crowds
    assert 10 < len(real & set(matches)) < len(real) and found_objects(coco, []) == {}
    # Perfect boxes find everything that is no crowd.
    perfect = [{**{key: a[key] for key in ('image_id', 'category_id', 'bbox')}, 'score': .5 + a['id'] / 1000}
               for a in coco.dataset['annotations']]
    complete = found_objects(coco, perfect)
    assert real <= set(complete) and complete[1] == pytest.approx(.501)


def test_an_object_is_on_the_level_whose_anchor_overlaps_it_most():
    from moe_zoo.detection.object_sizes import best_levels
    anchors = [np.array([[16., 16.], [24., 12.]]), np.array([[32., 32.]])]
    # 20 x 20 = 400: 256 / 400 with the first, 400 / 1024 with the second level; 30 x 30; 24 x 12 is the first's own.
    assert best_levels(np.array([[20., 20.], [30., 30.], [24., 12.]]), anchors).tolist() == [0, 1, 0]


class Pair(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.a, self.b = Gated(first), Gated(second)


def test_trials_are_counted_and_named():
    from moe_zoo.detection.object_sizes import plan_trials
    model = Pair(SoftmaxTopKRouter(6, 4, 2), SoftmaxTopKRouter(6, 3, 2))

    def names(*arguments, **keywords):
        return [name for name, _ in plan_trials(model, *arguments, **keywords)]
    assert names(['forced', 'dropped', 'k']) == [
        'expert 0', 'expert 1', 'expert 2', 'without 0', 'without 1', 'without 2', 'K = 1', 'K = 3', 'K = 4']
    assert names(['dropped'], layer='a') == ['without 0', 'without 1', 'without 2', 'without 3']
    assert names(['forced', 'k'], experts=[2, 0, 2]) == ['expert 2', 'expert 0', 'K = 1', 'K = 3', 'K = 4']
    assert names([]) == []
    with pytest.raises(InputError, match="--layer 'c' is no routed layer; there are a, b"):
        names(['forced'], layer='c')
    with pytest.raises(InputError, match='--experts 3: these layers have the experts 0 to 2'):
        names(['forced'], experts=[3])
    model = Pair(SigmoidRouter(6, 4), SigmoidRouter(6, 4))  # all are mixed: the largest weights alone
    assert names(['k']) == ['K = 1', 'K = 2', 'K = 3']


def test_trials_do_what_they_are_called():
    from moe_zoo.detection.object_sizes import plan_trials
    torch.manual_seed(0)
    model, x = Gated(SoftmaxTopKRouter(6, 4, 2)).eval(), torch.randn(9, 6)
    used = {}
    for name, overruled in plan_trials(model, ['forced', 'dropped', 'k']):
        with overruled(), trace_routing(model) as trace:
            model(x)
        used[name] = (trace[''][0].combine_matrix() > 0)
    assert used['expert 3'][:, 3].all() and not used['expert 3'][:, :3].any()
    assert not used['without 3'][:, 3].any() and (used['without 3'].sum(dim=1) == 2).all()
    assert (used['K = 1'].sum(dim=1) == 1).all() and used['K = 4'].all()


HEAD = ['MOE.RESNET.STAGES', '[]', 'MOE.HEAD.SUBNETS', 'both', 'MOE.HEAD.SHARED_GATE', 'True']


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    pytest.importorskip('sklearn')
    from moe_zoo.data import write_scenes
    return write_scenes(tmp_path_factory.mktemp('data') / 'scenes', train=4, val=24, classes=range(5))


@pytest.mark.slow
def test_the_tool_on_a_head_with_a_gate_for_every_level(scenes, repository, tmp_path, capsys):
    from moe_zoo.detection.object_sizes import main
    content = main([
        '--config-file', str(repository / 'configs/demo/retinanet_digits.yaml'), '--output', str(tmp_path),
        '--trials', 'forced,dropped,k', '--experts', '1', '--control', 'untrained', '--control', 'planted',
        '--pictures', '2', 'MOE.DATA.ROOT', str(scenes), 'MODEL.RETINANET.SCORE_THRESH_TEST', '0.0', *HEAD])
    out, err = capsys.readouterr()
    # Free, two controls, expert 1 forced, dropped, K = 1, 3, 4: eight evaluations, all announced.
    assert content['passes'] == 8
    assert '8 passes over 24 images: 1 with the router left free, 2 controls, 5 trials' in err
    assert all(f'pass {number} of 8, ' in err for number in range(1, 9))
    assert list(content['ap']) == ['free', 'expert 1', 'without 1', 'K = 1', 'K = 3', 'K = 4']
    layer, = content['sizes']['layers']
    assert layer['name'] == 'head.cls_experts' and layer['kind'] == 'level' and 'FPN level' in layer['attribution']
    assert not content['sizes']['separates'] and content['controls']['planted']['separates']
    assert not content['controls']['untrained']['separates']
    led = sum(sum(row['objects'].values()) for row in content['matches']['rows'])
    assert led == sum(content['sizes']['objects'].values())
    assert 'an object has the gate vector of its FPN level' in out and 'without 1' in out
    assert json.loads((tmp_path / 'object_sizes.json').read_text()) == json.loads(json.dumps(content))
    page = (tmp_path / 'index.html').read_text()
    assert page.count('data:image/jpeg') == 2 and 'Control planted' in page and 'without 1' in page
    assert len(list(tmp_path.glob('scene_*.jpg'))) == 2


@pytest.mark.slow
def test_boxes_are_drawn_in_the_colour_of_their_expert(scenes, repository, tmp_path):
    """A stand-in that detects the true boxes, and whose gate sends small objects to expert 1."""
    from io import BytesIO

    from detectron2.structures import Boxes, Instances
    from PIL import Image

    from moe_zoo.analysis.figures import COLOURS
    from moe_zoo.analysis.object_sizes import LayerSizes
    from moe_zoo.detection import load_config
    from moe_zoo.detection.object_sizes import Scenes
    from moe_zoo.detection.size_pictures import draw_scenes
    from moe_zoo.layers import RoutedLayer
    from moe_zoo.routing import record
    cfg = load_config(repository / 'configs/demo/retinanet_digits.yaml', ['MOE.DATA.ROOT', str(scenes)])
    tests = Scenes(cfg)
    tests.anchors = [np.array([[24., 24.]]), np.array([[90., 90.]])]  # level 0 is for small objects

    class Oracle(RoutedLayer):
        num_experts = num_selected = 2

        def forward(self, batch):
            gates = torch.tensor([[0., 1.], [1., 0.]])
            record(self, Routing(gates, gates, gates, shape=(1, 2), levels=2))
            entries = tests.coco.imgToAnns[batch[0]['image_id']]
            boxes = torch.tensor([a['bbox'] for a in entries]).float()
            boxes[:, 2:] += boxes[:, :2]
            return [{'instances': Instances((192, 192), pred_boxes=Boxes(boxes), scores=torch.ones(len(boxes)))}]
    layer = LayerSizes(*(None,) * 17)
    layer.name = ''
    pictures = draw_scenes(tests, Oracle(), layer, 3)
    assert len(pictures) == 3 and all('Missed: 0.' in words for *_, words in pictures)
    assert 'led: ' in pictures[0][2] and any('by expert 1' in words for *_, words in pictures)
    name, data, _ = pictures[0]
    number = int(name[6:10])  # as numbered among the images, which are numbered from 1
    picture = np.asarray(Image.open(BytesIO(data)).convert('RGB')).astype(int)
    assert picture.shape == (576, 576, 3)  # 192 pixels three times: at least 480
    for entry in tests.coco.imgToAnns[number + 1]:
        x, y, w, h = (3 * side for side in entry['bbox'])
        expert = 1 if w * h / 9 < 40 ** 2 else 0
        wanted = np.array([int(COLOURS[expert][i:i + 2], 16) for i in (1, 3, 5)])
        edge = picture[int(y + h / 2), int(x) + 1]  # in the middle of the left edge
        assert np.abs(edge - wanted).max() < 40


def test_objects_that_no_box_overlaps_by_a_half_are_missed():
    pytest.importorskip('detectron2')
    from moe_zoo.detection.size_pictures import _missed
    objects = np.array([[0., 0., 10., 10.], [20., 0., 30., 10.], [50., 50., 60., 60.]])
    boxes = np.array([[0., 0., 10., 5.], [20., 0., 30., 4.9]])  # 50 of 100 and 49 of 100 square pixels in common
    assert _missed(objects, boxes).tolist() == objects[1:].tolist()
    assert _missed(objects, boxes[:0]).tolist() == objects.tolist() and _missed(objects[:0], boxes).shape == (0, 4)


def test_missed_objects_are_dashed_and_boxes_of_no_expert_grey():
    pytest.importorskip('detectron2')
    from PIL import Image, ImageDraw

    from moe_zoo.detection.size_pictures import GREY, _dashed, _labelled
    image = Image.new('RGB', (60, 60))
    _dashed(ImageDraw.Draw(image), [10, 10, 40, 40])
    # Dashes of 6 pixels begin every 12: at 10, 22 and 34, above and below, left and right.
    for x, white in ((12, True), (19, False), (24, True), (31, False), (36, True)):
        for place in ((x, 10), (x, 40), (10, x), (40, x)):
            assert image.getpixel(place) == ((255, 255, 255) if white else (0, 0, 0)), place
    assert image.getpixel((25, 25)) == (0, 0, 0)
    _labelled(ImageDraw.Draw(image), [10, 5, 50, 50], -1, 'no one')
    # No room for 15 pixels of words above the box: they are inside, grey down to 20.
    grey = tuple(int(GREY[i:i + 2], 16) for i in (1, 3, 5))
    assert image.getpixel((10, 40)) == image.getpixel((11, 19)) == grey and image.getpixel((11, 4)) == (0, 0, 0)


def test_a_picture_is_told_in_words():
    pytest.importorskip('detectron2')
    from moe_zoo.analysis.object_gates import Objects
    from moe_zoo.detection.size_pictures import _words
    objects = Objects(np.zeros((3, 4)), [100., 100., 20000.])  # below 32^2 is small, from 96^2 on large
    assert _words(objects, [1, -1, 1], 2) == (
        'Objects: 2 small, 1 large. Detections led: 1 by no one, 2 by expert 1. Missed: 2.')
    assert _words(Objects([], []), [], 0) == 'Objects: none. Detections led: none. Missed: 0.'


def test_what_cannot_be_tried_is_named(repository, tmp_path, capsys):
    from moe_zoo.detection.object_sizes import main
    demo = ['--config-file', str(repository / 'configs/demo/retinanet_digits.yaml'), '--output', str(tmp_path)]
    for arguments, sentence in (
            (['--trials', 'forcd'], "--trials 'forcd': 'forcd' is not one of forced, dropped, k, none. Did you mean"),
            (['--experts', 'one'], "--experts 'one': give numbers, such as 0,2."),
            (['--layer', 'head.bbox_experts', 'MOE.HEAD.SUBNETS', 'both', 'MOE.HEAD.SHARED_GATE', 'True'],
             "--layer 'head.bbox_experts' follows the decisions of another layer"),
            (['--layer', 'res5'], "--layer 'res5' is no routed layer; there are backbone.bottom_up.res5")):
        with pytest.raises(SystemExit) as stopped:
            main([*demo, *arguments])
        assert stopped.value.code == 2 and sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
