"""V-MoE's experiment: how tokens are served, and what is counted, on a network small enough to train here."""
import json

import pytest
import timm
import torch

from moe_zoo.layers import MoEMlp
from moe_zoo.reproduce import find_experiment, vmoe
from moe_zoo.reproduce.training import Split, predict
from moe_zoo.routing import Routing, trace_routing

MODEL = dict(
    img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=(0, 1), num_experts=4, num_selected=1,
    in_chans=1, num_classes=10, representation_size=0, head_zero_init=False)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model('vmoe_vit_s', **MODEL).eval()


@pytest.fixture(scope='module')
def images():
    return torch.randn(20, 1, 32, 32, generator=torch.Generator().manual_seed(1))


def served(model, images, order, capacity):
    with vmoe.serving(model, order, capacity), trace_routing(model) as trace:
        outputs = predict(model, images)
    return outputs, trace['blocks.0.mlp'][0]


def test_who_is_served_first(model, images):
    """20 images of 16 patches and a class token are 340 tokens; with a factor of 1/5, 340 / 4 / 5 = 17, raised to 20,
    slots an expert."""
    found = {order: served(model, images, order, .2)[1] for order in ('position', 'priority', 'random')}
    first = found['position']
    expert, gate = first.indices[:, 0], first.weights[:, 0]
    for order, routing in found.items():
        assert torch.equal(routing.indices, first.indices) and torch.equal(routing.weights, first.weights)
        taken = [routing.kept[expert == e, 0] for e in range(4)]
        assert [int(t.sum()) for t in taken] == [min(20, len(t)) for t in taken]
        for e, t in enumerate(taken):
            gates = gate[expert == e]
            if order == 'position':
                assert t[:20].all() and not t[20:].any()
            elif order == 'priority' and len(t) > 20:
                assert gates[t].min() >= gates[~t].max()
    late = found['random'].kept.view(20, 17)[10:].double().mean()
    assert .3 < late / found['random'].kept.double().mean() < 1.7  # the late images get their part
    assert found['position'].kept.view(20, 17)[10:].double().mean() < .5 * late


def test_with_room_for_all_the_order_is_the_same_and_settings_are_set_back(model, images):
    plain = predict(model, images)
    for order in ('position', 'priority', 'random'):
        outputs, routing = served(model, images, order, 4.)
        assert routing.kept is None and torch.equal(outputs, plain)
        assert not torch.equal(served(model, images, order, .1)[0], plain)
    for layer in model.modules():
        if isinstance(layer, MoEMlp):
            assert (layer.group_images, layer.eval_capacity_factor, layer.batch_priority) == (8, None, False)
    assert torch.equal(predict(model, images), plain)


def test_patches_with_contrast_are_told_from_the_others():
    """Two images of four patches of 4 x 4 pixels; in the first the last patch has contrast, in the second the first."""
    images = torch.zeros(2, 1, 8, 8)
    images[0, 0, 5, 5] = images[1, 0, 1, 1] = 1
    tokens = torch.tensor([[1, 1, 0, 0, 1], [0, 0, 1, 1, 1]], dtype=torch.bool)  # class token, four patches
    all_kept = Routing(*torch.zeros(3, 10, 1), shape=(2, 5))
    records = [all_kept._replace(kept=tokens.view(10, 1)), all_kept]
    found = vmoe.kept_by_contrast(records[:1], images)
    # with contrast: the last of image 0 is kept, the first of image 1 is not; the others: 1 of 3 and 3 of 3
    assert found == {'busy': 50, 'calm': pytest.approx(100 * 4 / 6)}
    # a second layer that drops nothing
    assert vmoe.kept_by_contrast(records, images) == {'busy': 75, 'calm': pytest.approx(100 * 10 / 12)}


def test_digits_are_elsewhere_in_images_that_are_not_for_training():
    data = vmoe.load(None)
    ground = data.train.images.min()
    border = torch.ones(32, 32, dtype=torch.bool)
    border[8:24, 8:24] = False
    assert (data.train.images[:, 0, border] == ground).all()
    for split in (data.validation, data.test):
        assert split.images.shape[1:] == (1, 32, 32) and (split.images[:, 0, border] > ground).any()
        share = (split.images > ground).double().mean() / (data.train.images > ground).double().mean()
        assert .95 < share.item() < 1.05  # none is cut off
    assert len(data.test.targets) % vmoe.BATCH == 0


def test_all_arms_come_from_one_training(monkeypatch):
    trained = []
    monkeypatch.setattr(vmoe, 'fit', lambda model, data, **settings: trained.append(model))
    monkeypatch.setattr(vmoe, 'CAPACITIES', (.05, .2, .5))
    experiment = find_experiment('vmoe-priority')
    data = experiment.load(None)
    few = Split(data.test.images[:20], data.test.targets[:20])
    found = experiment.run([arm.options for arm in experiment.arms], 0, data._replace(test=few))
    assert experiment.together and len(trained) == 1 and len(found) == 3
    json.dumps(found)
    for claim in experiment.claims:
        assert all(0 <= metrics[claim.metric] <= 100 for metrics in found)
    assert all(metrics['dropped_0.05'] > metrics['dropped_0.5'] for metrics in found)
