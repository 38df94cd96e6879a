"""Experts in RetinaNet's head, and auxiliary losses in any meta-architecture."""
import logging
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('detectron2', reason='detectron2 is not installed')

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import CfgNode, instantiate  # noqa: E402
from detectron2.config import LazyCall as L  # noqa: E402
from detectron2.layers import CycleBatchNormList, ShapeSpec  # noqa: E402
from detectron2.modeling import FPN, build_model  # noqa: E402
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator  # noqa: E402
from detectron2.modeling.backbone import BasicStem, ResNet  # noqa: E402
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7  # noqa: E402
from detectron2.modeling.backbone.resnet import BasicBlock  # noqa: E402
from detectron2.modeling.box_regression import Box2BoxTransform  # noqa: E402
from detectron2.modeling.matcher import Matcher  # noqa: E402
from detectron2.modeling.meta_arch.fcos import FCOSHead  # noqa: E402
from detectron2.modeling.poolers import ROIPooler  # noqa: E402
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead  # noqa: E402
from detectron2.modeling.roi_heads import (  # noqa: E402
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    MaskRCNNConvUpsampleHead,
    StandardROIHeads,
)
from detectron2.structures import BitMasks, Boxes, Instances  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402
from timm.layers import FrozenBatchNormAct2d  # noqa: E402
from torch import nn  # noqa: E402

from moe_zoo.analysis import count  # noqa: E402
from moe_zoo.analysis.force import force_expert, routed_layers, select_experts  # noqa: E402
from moe_zoo.detection import (  # noqa: E402
    EpochHook,
    MoEFCOS,
    MoEGeneralizedRCNN,
    MoERetinaNet,
    MoERetinaNetHead,
    load_config,
    route_resnet,
    with_moe_losses,
)
from moe_zoo.errors import InputError  # noqa: E402
from moe_zoo.layers import DynamicConv2d  # noqa: E402
from moe_zoo.losses import auxiliary_losses, kl_loss  # noqa: E402
from moe_zoo.routing import end_step, routing_context, set_epoch, trace_routing  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')  # of detectron2's older code


def head(channels=2, levels=2, convs=1, **kwargs):
    """A head of 3 classes and one anchor, of experts that differ much."""
    made = MoERetinaNetHead(
        input_shape=[ShapeSpec(channels=channels)] * levels, num_classes=3, num_anchors=1,
        conv_dims=[channels] * convs, **{'num_experts': 3, **kwargs})
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.5)
    return made


def images(*sizes, masks=False):
    """Inputs as detectron2's mapper gives them, with one object each."""
    inputs = []
    for height, width in sizes:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[4., 4., 40., 40.]]))
        instances.gt_classes = torch.zeros(1, dtype=torch.long)
        if masks:
            instances.gt_masks = BitMasks(torch.zeros(1, height, width, dtype=torch.bool))
            instances.gt_masks.tensor[:, 4:40, 4:40] = True
        pixels = torch.randint(0, 255, (3, height, width), dtype=torch.uint8)
        inputs.append({'image': pixels, 'instances': instances, 'height': height, 'width': width})
    return inputs


# --- the gate

def decided(made, levels):
    """The record of one image whose levels are constant maps of these values a channel."""
    maps = [torch.tensor(values).view(1, -1, 1, 1).expand(1, -1, 4 - i, 4 - i) for i, values in enumerate(levels)]
    with torch.no_grad(), trace_routing(made) as trace:
        made(maps)
    return trace


def test_weights_of_every_level_are_the_softmax_of_its_own_chosen_logits():
    made = head(subnets='box').eval()
    made.bbox_experts.router.weight.data = torch.tensor([[1., 0.], [0., 1.], [-1., -1.]])
    record, = decided(made, [(math.log(3), 0.), (0., math.log(4))])['bbox_experts']
    # Level 1: logits ln 3, 0, -ln 3: experts 0 and 1, 3/4 and 1/4. Level 2: 0, ln 4, -ln 4: 1 and 0, 4/5 and 1/5.
    torch.testing.assert_close(record.combine_matrix(), torch.tensor([[0.75, 0.25, 0.], [0.2, 0.8, 0.]]))
    assert record.shape == (1, 2) and record.levels == 2
    # One importance over both levels: shares .95 / 2, 1.05 / 2 and 0.
    wanted = .475 * math.log(3 * .475) + .525 * math.log(3 * .525)
    assert kl_loss(record).item() == pytest.approx(wanted, rel=1e-5)
    assert auxiliary_losses([record])['kl'].item() == pytest.approx(0.25 * wanted, rel=1e-5)


def test_a_gate_of_an_image_decides_once_from_the_mean_of_its_levels():
    made = head(subnets='cls', gate_per='image').eval()
    made.cls_experts.router.weight.data = torch.tensor([[1., 0.], [0., 1.], [-1., -1.]])
    record, = decided(made, [(math.log(9), 0.), (0., 0.)])['cls_experts']  # the mean is ln 3, 0
    torch.testing.assert_close(record.combine_matrix(), torch.tensor([[0.75, 0.25, 0.]]))
    assert record.shape == (1,) and record.levels == 0


def test_a_shared_gate_decides_and_records_once_for_both_sub_nets():
    made = head(shared_gate=True).eval()
    assert set(decided(made, [(1., 0.), (0., 1.)])) == {'cls_experts'}
    apart = head().eval()
    assert set(decided(apart, [(1., 0.), (0., 1.)])) == {'cls_experts', 'bbox_experts'}
    assert not any(key.startswith('bbox_experts.router') for key in made.state_dict())
    features = [torch.randn(2, 2, 4, 4), torch.randn(2, 2, 2, 2)]
    with torch.no_grad(), force_expert(made, 2):  # the follower follows a rule too
        boxes = made(features)[1]
        wanted = [made.bbox_experts.experts[2](x) for x in features]
    torch.testing.assert_close(boxes, wanted)


def reference(made, features, name, layer):
    """Every expert on every level of every image, written out."""
    shared, prediction = (getattr(made, part) for part in (f'{name}_subnet', {'cls': 'cls_score', 'bbox': 'bbox_pred'}[
        name]))
    outputs = []
    for x in features:
        images = []
        for image in x.split(1):
            logits = layer.router.weight @ image.mean(dim=(2, 3))[0]
            values, chosen = logits.topk(2)
            read = shared(image)
            images.append(prediction(sum(
                w * layer.experts[e](read) for w, e in zip(values.softmax(0), chosen.tolist()))))
        outputs.append(torch.cat(images))
    return outputs


@pytest.mark.parametrize('experts', ['subnet', 'last_conv', 'output'])
def test_outputs_and_gradients_are_those_of_the_definition(experts):
    made = head(3, 3, convs=2, experts=experts, noise=False)
    features = [torch.randn(3, 3, n, n) for n in (4, 2, 1)]
    found = made(features)
    for name, outputs in zip(('cls', 'bbox'), found):
        wanted = reference(made, features, name, getattr(made, f'{name}_experts'))
        torch.testing.assert_close(outputs, wanted)
        parameters = list(getattr(made, f'{name}_experts').parameters())
        grads = [torch.autograd.grad(sum(y.square().sum() for y in ys), parameters, retain_graph=True)
                 for ys in (outputs, wanted)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_what_an_expert_is():
    names = {}
    for experts in ('subnet', 'last_conv', 'output'):
        made = head(convs=2, experts=experts, subnets='cls', norm='GN', channels=32)
        names[experts] = sorted({key.split('.', 3)[3] for key in made.state_dict() if '.experts.0.' in f'.{key}'})
        assert sum(p.numel() for p in made.parameters() if p.dim() == 4) == {
            # Towers of two 3 x 3 convolutions 32 to 32, prediction layers 32 to 3 and to 4, one or three of them.
            'subnet': 9 * 32 * (3 * (64 + 3) + 64 + 4), 'last_conv': 9 * 32 * (32 + 3 * 32 + 3 + 64 + 4),
            'output': 9 * 32 * (64 + 3 * 3 + 64 + 4)}[experts]
    # 0, 1, 2: convolution, norm, ReLU; 3, 4, 5: the same again.
    tower = [f'cls_subnet.{i}' for i in (0, 1, 3, 4)]
    assert names['subnet'] == [f'{layer}.{kind}' for layer in ('cls_score', *tower) for kind in ('bias', 'weight')]
    assert names['last_conv'] == [f'cls_subnet.{i}.{kind}' for i in (3, 4) for kind in ('bias', 'weight')]
    assert names['output'] == ['cls_score.bias', 'cls_score.weight']


def test_only_chosen_experts_run_and_the_others_get_zeros():
    made = head(subnets='box', num_selected=1, noise=False)
    made.bbox_experts.router.weight.data = torch.tensor([[1., 0.], [0., 1.], [-1., -1.]])
    ran = []
    for e, expert in enumerate(made.bbox_experts.experts):
        expert.register_forward_hook(lambda m, inputs, output, e=e: ran.append((e, tuple(inputs[0].shape))))
    features = [torch.zeros(2, 2, 4, 4), torch.zeros(2, 2, 2, 2)]
    features[0][0, 0], features[0][1, 0] = 1, 2  # level 1: both images choose expert 0
    features[1][0, 1], features[1][1, 0] = 1, 1  # level 2: the first image chooses 1, the second 0
    sum(y.sum() for ys in made(features) for y in ys).backward()
    assert ran == [(0, (2, 2, 4, 4)), (0, (1, 2, 2, 2)), (1, (1, 2, 2, 2))]
    third = [p.grad for p in made.bbox_experts.experts[2].parameters()]
    assert all(grad is not None and not grad.any() for grad in third)
    assert all(p.grad.any() for p in made.bbox_experts.experts[1].parameters())


def test_a_hard_constraint_counts_all_levels_of_a_step():
    made = head(levels=3, subnets='cls', num_experts=2, num_selected=1, constraint='relative', constraint_value=0.5)
    router = made.cls_experts.router
    assert router.losses == () and router.noise_weight is None
    router.weight.data = torch.tensor([[1., 0.], [0., 1.]])
    # The levels want experts 0, 0 and 1: I = (2, 1), R_0 = (2 - 1.5) / 1.5 = 1 / 3 after a step. After two it is
    # 2 / 3 > 0.5, so that the third step leaves expert 0 out; evaluation does not.
    levels, chosen = [(1., 0.), (1., 0.), (0., 1.)], []
    for _ in range(2):
        chosen.append(decided(made, levels)['cls_experts'][0].indices.flatten().tolist())
        end_step(made)
    assert chosen == [[0, 0, 1], [0, 0, 1]]
    torch.testing.assert_close(router.constraint.excess, torch.tensor([2 / 3, -2 / 3]))
    assert decided(made, levels)['cls_experts'][0].indices.flatten().tolist() == [1, 1, 1]
    assert decided(made.eval(), levels)['cls_experts'][0].indices.flatten().tolist() == [0, 0, 1]


def test_padding_of_a_level_stays_out_of_the_gate():
    """The same features alone, and in the corner of a padded batch whose padding is not zero."""
    made = head(3, 3).eval()
    alone = [torch.randn(1, 3, n, n) for n in (8, 4, 2)]
    padded = [torch.full((2, 3, n, 2 * n), 7.) for n in (8, 4, 2)]
    for small, large in zip(alone, padded):
        large[:1, :, :, :small.shape[3]] = small
    records = []
    for features, sizes, size in ((alone, [[64, 64]], (64, 64)), (padded, [[64, 64], [64, 128]], (64, 128))):
        with torch.no_grad(), routing_context(torch.tensor(sizes), size), trace_routing(made) as trace:
            made(features)
        records.append(trace['cls_experts'][0].logits[:3])  # the first image's three levels
    torch.testing.assert_close(*records)
    with torch.no_grad(), trace_routing(made) as trace:
        made(padded)
    assert (trace['cls_experts'][0].logits[:3] - records[0]).abs().max() > 0.1


def test_evaluation_is_deterministic_and_images_stand_for_themselves():
    made = head(3, 2).eval()
    features = [torch.randn(4, 3, n, n) for n in (4, 2)]
    with torch.no_grad():
        first, again, alone = made(features), made(features), made([x[2:3] for x in features])
    for some, same, single in zip(first, again, alone):
        for a, b, c in zip(some, same, single):
            assert torch.equal(a, b)
            torch.testing.assert_close(a[2:3], c)


def test_norms_of_every_level_are_its_own_whichever_experts_it_calls():
    made = head(2, 2, subnets='cls', num_selected=1, norm='BN').eval()
    made.cls_experts.router.weight.data = torch.tensor([[1., 0.], [0., 1.], [-1., -1.]])
    for expert in made.cls_experts.experts:
        norm, = (m for m in expert.modules() if isinstance(m, CycleBatchNormList))
        nn.init.ones_(norm.weight), nn.init.zeros_(norm.bias)
        for level, each in enumerate(norm):
            nn.init.constant_(each.running_mean, 10. * level)
    # Level 2 alone calls expert 1: its norm must be the second one, though this is its first call.
    features = [torch.tensor(v).view(1, 2, 1, 1).expand(1, 2, 2, 2) for v in [(1., 0.), (0., 1.)]]
    expert = made.cls_experts.experts[1]
    with torch.no_grad():
        found = made(features)[0][1]
        conv, norm, act = expert.cls_subnet
        wanted = expert.cls_score(act(norm[1](conv(features[1]))))
    torch.testing.assert_close(found, wanted)


def test_costs_and_analysis_know_the_head():
    made = head(4, 2, convs=2).eval()
    features = [torch.randn(1, 4, n, n) for n in (4, 2)]
    cost = count(made, (features,))
    # K = 2 experts on 16 + 4 places, of two 3 x 3 convolutions 4 to 4 and one to 3 or 4; a gate 4 x 3 a level and net.
    assert cost.macs_max == cost.macs_executed == 2 * 20 * 9 * 4 * (2 * 8 + 3 + 4) + 2 * 2 * 12
    per_expert = sum(p.numel() for p in made.cls_experts.experts[0].parameters())
    assert made.cls_experts.active_parameters() == 2 * per_expert + 2 * 3 * 4  # clean and noise matrix
    assert set(routed_layers(made)) == {'cls_experts', 'bbox_experts'}
    with torch.no_grad(), select_experts(made, 3), trace_routing(made) as trace:
        made(features)
    assert trace['bbox_experts'][0].indices.shape == (2, 3)


@pytest.mark.slow
def test_exported_compiled_and_on_meta_tensors_the_head_is_the_same():
    made = head(4, 2, convs=2).eval()
    features = [torch.randn(2, 4, n, n) for n in (4, 2)]
    with torch.no_grad():
        wanted = made(features)
        torch.testing.assert_close(torch.export.export(made, (features,)).module()(features), wanted)
        torch.testing.assert_close(torch.compile(made, backend='eager')(features), wanted)
    shapes = [[y.shape for y in ys] for ys in made.to('meta')([x.to('meta') for x in features])]
    assert shapes == [[y.shape for y in ys] for ys in wanted]


@pytest.mark.parametrize('kwargs, message', [
    (dict(subnets='boxes'), r"subnets='boxes' \(MOE.HEAD.SUBNETS\) is not one of cls, box, both. Did you mean 'box'"),
    (dict(experts='last'), "experts='last' .* is not one of subnet, last_conv, output. Did you mean 'last_conv'"),
    (dict(gate_per='levels'), "gate_per='levels' .* Did you mean 'level'"),
    (dict(subnets='cls', shared_gate=True), "shared_gate=True with subnets='cls': two sub-nets share a gate"),
    (dict(num_selected=4), 'num_selected=4 with num_experts=3'),
    (dict(num_experts=0), 'num_experts=0'),
    (dict(gate='gap'), "gate='gap' is not one of gap_fc"),
    (dict(norm='SyncBN'), 'SyncBatchNorm inside the experts'),
])
def test_unfit_heads_are_refused(kwargs, message):
    with pytest.raises(InputError, match=message):
        head(**kwargs)


# --- in a detector

TINY = [
    'MODEL.DEVICE', 'cpu', 'MODEL.RESNETS.STEM_OUT_CHANNELS', '8', 'MODEL.RESNETS.RES2_OUT_CHANNELS', '8',
    'MODEL.FPN.OUT_CHANNELS', '8', 'MODEL.RETINANET.SCORE_THRESH_TEST', '0.0', 'MOE.RESNET.LAYER', 'dyconv',
    'MOE.RESNET.NUM_EXPERTS', '2',
]


def detector(*opts):
    return build_model(load_config('configs/demo/retinanet_digits.yaml', [*TINY, *opts]))


def unlike_random(model):
    """Statistics that are not 0 and 1, and classes that differ from place to place."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2), module.running_var.uniform_(0.6, 1.)
    nn.init.normal_(model.head.cls_score.weight, std=0.3)
    nn.init.normal_(model.head.bbox_pred.weight, std=0.1)
    return model


VARIANTS = [
    (subnets, experts, per, shared) for subnets, shared in (('cls', False), ('box', False), ('both', False),
                                                            ('both', True))
    for experts in ('subnet', 'last_conv', 'output') for per in ('level', 'image')]


@pytest.mark.parametrize('variants', [VARIANTS[::7], pytest.param(VARIANTS, marks=pytest.mark.slow)])
def test_detections_of_a_dense_checkpoint_are_kept_by_every_variant(variants, tmp_path):
    dense = unlike_random(detector()).eval()
    torch.save({'model': dense.state_dict()}, tmp_path / 'dense.pth')
    inputs = images((64, 64), (50, 90))
    with torch.no_grad():
        wanted = dense(inputs)
    assert min(len(found['instances']) for found in wanted) > 10
    for subnets, experts, per, shared in variants:
        model = detector('MOE.HEAD.SUBNETS', subnets, 'MOE.HEAD.EXPERTS', experts, 'MOE.HEAD.GATE_PER', per,
                         'MOE.HEAD.SHARED_GATE', str(shared)).eval()
        DetectionCheckpointer(model).load(str(tmp_path / 'dense.pth'))  # detectron2's own, as upstream's tools use it
        with torch.no_grad():
            for found, kept in zip(model(inputs), wanted):
                found, kept = found['instances'], kept['instances']
                torch.testing.assert_close(found.scores, kept.scores, rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(found.pred_boxes.tensor, kept.pred_boxes.tensor, rtol=1e-4, atol=1e-3)
                assert torch.equal(found.pred_classes, kept.pred_classes)


def test_noise_of_the_gate_parts_equal_experts(tmp_path):
    torch.manual_seed(1)
    model = detector('MOE.HEAD.SUBNETS', 'box').train()
    torch.save({'model': detector().state_dict()}, tmp_path / 'dense.pth')
    DetectionCheckpointer(model).load(str(tmp_path / 'dense.pth'))
    weights = [expert.bbox_pred.weight for expert in model.head.bbox_experts.experts]
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with EventStorage():
        losses = model(images((64, 64), (64, 64)))
    assert set(losses) == {'loss_cls', 'loss_box_reg', 'loss_moe_kl'}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert len({weight.sum().item() for weight in weights}) > 2


def test_only_the_new_heads_train(tmp_path):
    """Of the detector nothing else moves: no weight, and no statistic of a norm."""
    options = ['MOE.HEAD.SUBNETS', 'box', 'MOE.HEAD.TRAIN_ONLY_NEW', 'True']
    dense, model = unlike_random(detector()), detector(*options).train()
    torch.save({'model': dense.state_dict()}, tmp_path / 'dense.pth')
    DetectionCheckpointer(model).load(str(tmp_path / 'dense.pth'))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f'head.bbox_experts.{name}' for name, _ in model.head.bbox_experts.named_parameters()}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with EventStorage():
        sum(model(images((64, 64), (64, 64))).values()).backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved and all(key.startswith('head.bbox_experts.') for key in moved)
    torch.testing.assert_close(model.head.cls_score.weight, dense.head.cls_score.weight)
    with pytest.raises(InputError, match='MOE.HEAD.TRAIN_ONLY_NEW True: the head has no experts'):
        detector('MOE.HEAD.TRAIN_ONLY_NEW', 'True')


def test_frozen_norms_of_timms_models_keep_their_activation():
    """BatchNorm and activation are one module in a ResNetV2: frozen, it must not become an affine map alone."""
    options = ['MODEL.BACKBONE.NAME', 'build_timm_fpn_backbone', 'MOE.TIMM.NAME', 'resnetv2_18', 'MOE.TIMM.CHECK_INPUT',
               'False', 'MOE.HEAD.SUBNETS', 'box', 'MOE.HEAD.EXPERTS', 'last_conv']
    free, frozen = detector(*options).eval(), detector(*options, 'MOE.HEAD.TRAIN_ONLY_NEW', 'True').eval()
    frozen.load_state_dict(unlike_random(free).state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(frozen.backbone(x), free.backbone(x), rtol=1e-3, atol=1e-3)
    assert any(isinstance(m, FrozenBatchNormAct2d) for m in frozen.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.backbone.modules())


def test_a_random_gate_over_a_frozen_detector_is_no_cut_loss():
    """Neither the gate nor what it sees trains there, so that no gradient is missing; the experts have theirs."""
    model = detector('MOE.HEAD.SUBNETS', 'box', 'MOE.HEAD.GATE', 'random_fc', 'MOE.HEAD.TRAIN_ONLY_NEW', 'True').train()
    with EventStorage():
        losses = model(images((64, 64), (64, 96)))
    assert 'loss_moe_kl' in losses and not losses['loss_moe_kl'].requires_grad
    sum(losses.values()).backward()
    assert any(p.grad.any() for p in model.head.bbox_experts.experts.parameters())


def test_shares_of_the_head_are_logged():
    model = detector('MOE.HEAD.SUBNETS', 'both').train()
    with EventStorage(19) as storage:
        model(images((64, 64), (64, 96)))
        latest = storage.latest()
    for name in ('cls', 'bbox'):
        assert sum(latest[f'moe/head.{name}_experts/expert{e}_share'][0] for e in range(4)) == pytest.approx(1)


# --- LazyConfig, and any meta-architecture

def lazy_backbone(top_block, features, layer='condconv', **kwargs):
    return L(FPN)(
        bottom_up=L(route_resnet)(
            resnet=L(ResNet)(
                stem=L(BasicStem)(in_channels=3, out_channels=8),
                stages=[L(ResNet.make_stage)(
                    block_class=BasicBlock, num_blocks=1, in_channels=ins, out_channels=outs,
                    stride_per_block=[1 if outs == 8 else 2]) for ins, outs in ((8, 8), (8, 16), (16, 32), (32, 64))],
                out_features=features),
            layer=layer, stages=['res5'], **kwargs),
        in_features=features, out_channels=8, top_block=top_block)


PIXELS = dict(pixel_mean=[125.] * 3, pixel_std=[60.] * 3)


def lazy_retinanet():
    return L(MoERetinaNet)(
        backbone=lazy_backbone(L(LastLevelP6P7)(in_channels=64, out_channels=8), ['res3', 'res4', 'res5']),
        head=L(MoERetinaNetHead)(
            input_shape=[ShapeSpec(channels=8)] * 5, num_classes=5, num_anchors=3, conv_dims=[8], subnets='both',
            constraint='importance', constraint_value=0.5),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[x] for x in (16, 32, 64, 128, 256)], aspect_ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128]),
        box2box_transform=L(Box2BoxTransform)(weights=[1., 1., 1., 1.]),
        anchor_matcher=L(Matcher)(thresholds=[0.4, 0.5], labels=[0, -1, 1], allow_low_quality_matches=True),
        num_classes=5, head_in_features=['p3', 'p4', 'p5', 'p6', 'p7'], **PIXELS)


def lazy_fcos():
    return L(MoEFCOS)(
        backbone=lazy_backbone(
            L(LastLevelP6P7)(in_channels=64, out_channels=8), ['res3', 'res4', 'res5'], 'moe', constraint='kl'),
        head=L(FCOSHead)(input_shape=[ShapeSpec(channels=8)] * 5, num_classes=5, conv_dims=[8]),
        num_classes=5, head_in_features=['p3', 'p4', 'p5', 'p6', 'p7'], **PIXELS)


def lazy_rcnn(masks):
    levels = ['p2', 'p3', 'p4', 'p5']
    pooler = lambda size: L(ROIPooler)(  # noqa: E731
        output_size=size, scales=(1 / 4, 1 / 8, 1 / 16, 1 / 32), sampling_ratio=0, pooler_type='ROIAlignV2')
    mask = dict(
        mask_in_features=levels, mask_pooler=pooler(7),
        mask_head=L(MaskRCNNConvUpsampleHead)(
            input_shape=ShapeSpec(channels=8, width=7, height=7), num_classes=5, conv_dims=[8, 8]),
    ) if masks else {}
    return L(MoEGeneralizedRCNN)(
        backbone=lazy_backbone(L(LastLevelMaxPool)(), ['res2', 'res3', 'res4', 'res5'], 'moe', constraint='kl'),
        proposal_generator=L(RPN)(
            in_features=[*levels, 'p6'], head=L(StandardRPNHead)(in_channels=8, num_anchors=3),
            anchor_generator=L(DefaultAnchorGenerator)(
                sizes=[[16], [32], [64], [128], [256]], aspect_ratios=[0.5, 1.0, 2.0], strides=[4, 8, 16, 32, 64]),
            anchor_matcher=L(Matcher)(thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True),
            box2box_transform=L(Box2BoxTransform)(weights=[1., 1., 1., 1.]), batch_size_per_image=32,
            positive_fraction=0.5, pre_nms_topk=(100, 100), post_nms_topk=(50, 20)),
        roi_heads=L(StandardROIHeads)(
            num_classes=5, batch_size_per_image=16, positive_fraction=0.25,
            proposal_matcher=L(Matcher)(thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False),
            box_in_features=levels, box_pooler=pooler(7),
            box_head=L(FastRCNNConvFCHead)(
                input_shape=ShapeSpec(channels=8, height=7, width=7), conv_dims=[], fc_dims=[16]),
            box_predictor=L(FastRCNNOutputLayers)(
                input_shape=ShapeSpec(channels=16), box2box_transform=L(Box2BoxTransform)(weights=[10., 10., 5., 5.]),
                num_classes=5), **mask),
        input_format='BGR', **PIXELS)


RPN_LOSSES = {'loss_rpn_cls', 'loss_rpn_loc', 'loss_cls', 'loss_box_reg', 'loss_moe_kl'}


@pytest.mark.parametrize('config, losses', [
    (lazy_retinanet, {'loss_cls', 'loss_box_reg', 'loss_moe_importance_unbiased'}),
    (lazy_fcos, {'loss_fcos_cls', 'loss_fcos_loc', 'loss_fcos_ctr', 'loss_moe_kl'}),
    (lambda: lazy_rcnn(False), RPN_LOSSES),
    (lambda: lazy_rcnn(True), {*RPN_LOSSES, 'loss_mask'}),
], ids=['RetinaNet', 'FCOS', 'Faster R-CNN', 'Mask R-CNN'])
def test_every_meta_architecture_trains_a_step_with_its_losses_and_no_more(config, losses):
    model = instantiate(config()).train()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with EventStorage(19) as storage:
        found = model(images((64, 64), (64, 96), masks=True))
        assert any(key.startswith('moe/') and key.endswith('_share') for key in storage.latest())
    assert set(found) == losses
    assert all(value.dim() == 0 and value.requires_grad and value.isfinite() for value in found.values())
    sum(found.values()).backward()
    optimizer.step()
    moved = [name for (name, p), old in zip(model.named_parameters(), before) if not torch.equal(p, old)]
    assert any('router' in name or 'routing_fn' in name for name in moved)
    with torch.no_grad():
        outputs = model.eval()(images((64, 64)))
    assert set(outputs[0]) == {'instances'}


def test_a_meta_architecture_of_ones_own_gets_the_losses_too():
    class Halved(MoEFCOS.__mro__[3]):  # detectron2's FCOS, as somebody changed it
        def forward_training(self, *args):
            return {name: value / 2 for name, value in super().forward_training(*args).items()}

    config = lazy_fcos()
    config._target_ = with_moe_losses(Halved)
    assert config._target_.__name__ == 'MoEHalved'
    with EventStorage():
        found = instantiate(config).train()(images((64, 64), (64, 64)))
    assert 'loss_moe_kl' in found and len(found) == 4


def test_a_yaml_and_a_lazy_config_build_the_same_head():
    cfg = load_config('configs/demo/retinanet_digits.yaml', [
        *TINY, 'MOE.HEAD.SUBNETS', 'both', 'MOE.HEAD.LOSSES', '[]', 'MOE.HEAD.CONSTRAINT', 'relative',
        'MOE.HEAD.CONSTRAINT_VALUE', '0.3', 'MODEL.RETINANET.NORM', ''])
    by_yaml = build_model(cfg).head
    by_lazy = instantiate(L(MoERetinaNetHead)(
        input_shape=[ShapeSpec(channels=8)] * 5, num_classes=5, num_anchors=2, conv_dims=[8], constraint='relative',
        constraint_value=0.3))
    shapes = [{key: value.shape for key, value in made.state_dict().items()} for made in (by_yaml, by_lazy)]
    assert shapes[0] == shapes[1] and repr(by_yaml) == repr(by_lazy)


def test_the_hook_tells_the_model_of_epochs():
    model = instantiate(lazy_backbone(None, ['res5'], 'dyconv', temperature=4., anneal_epochs=3))
    layers = [m for m in model.modules() if isinstance(m, DynamicConv2d)]
    hook = EpochHook(2.5)  # 5 images, two a batch
    seen = []
    for iteration in (0, 2, 3, 5, 8):
        hook.trainer = SimpleNamespace(iter=iteration, model=model)
        hook.before_step()
        seen.append({layer.routing_fn.current_temperature().item() for layer in layers})
    assert seen == [{4.}, {4.}, {3.}, {2.}, {1.}]  # epochs 0, 0, 1, 2, 3


def test_under_a_trainer_that_tells_of_no_epochs_they_follow_from_the_iteration(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger('moe_zoo'), 'propagate', True)  # a run before may have switched it off
    cfg = load_config('configs/demo/retinanet_digits.yaml', TINY)
    cfg.MOE.RESNET.ARGS = CfgNode({'temperature': 4., 'anneal_epochs': 3})
    silent = build_model(cfg).train()
    cfg.MOE.ITERATIONS_PER_EPOCH = 2
    model = build_model(cfg).train()
    router = next(m for m in model.modules() if isinstance(m, DynamicConv2d)).routing_fn
    temperatures = []
    for iteration in range(5):
        with EventStorage(iteration):
            model(images((64, 64), (64, 64)))
        temperatures.append(router.current_temperature().item())
    assert temperatures == [4., 4., 3., 3., 2.]
    set_epoch(model, 0)  # a trainer that tells is believed
    with EventStorage(6):
        model(images((64, 64), (64, 64)))
    assert router.current_temperature().item() == 4. and 'MOE.ITERATIONS_PER_EPOCH' not in caplog.text
    with EventStorage(), caplog.at_level(logging.WARNING):
        silent(images((64, 64), (64, 64)))
    assert 'set MOE.ITERATIONS_PER_EPOCH' in caplog.text


@pytest.mark.slow
def test_a_traced_detector_sends_levels_to_experts_by_their_own_gates():
    from detectron2.export import TracingAdapter
    model = unlike_random(detector()).eval()
    routed = detector('MOE.HEAD.SUBNETS', 'box').eval()
    routed.load_state_dict(model.state_dict(), strict=False)
    for parameter in routed.head.bbox_experts.parameters():
        nn.init.normal_(parameter, std=0.1)
    first, other = ([{'image': image}] for image in (torch.rand(3, 64, 96) * 255, torch.zeros(3, 64, 96)))
    adapter = TracingAdapter(routed, first)
    with torch.no_grad(), trace_routing(routed) as trace:
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        found = adapter.outputs_schema(traced(other[0]['image'], *adapter.flattened_inputs[1:]))
        wanted = routed(other)
    chosen = [routing.indices.sort(dim=1).values for routing in trace['head.bbox_experts']]
    assert not torch.equal(chosen[0], chosen[-1])  # else the trace would have nothing to get wrong
    torch.testing.assert_close(found[0]['instances'].pred_boxes.tensor, wanted[0]['instances'].pred_boxes.tensor)


def test_a_head_that_a_meta_architecture_has_not_is_refused():
    cfg = load_config('configs/coco/faster_rcnn_moe_res5_r50_fpn_1x.yaml', [
        'MODEL.DEVICE', 'cpu', 'MODEL.RESNETS.DEPTH', '18', 'MODEL.RESNETS.RES2_OUT_CHANNELS', '8',
        'MODEL.RESNETS.STEM_OUT_CHANNELS', '8', 'MODEL.FPN.OUT_CHANNELS', '8', 'MODEL.ROI_BOX_HEAD.FC_DIM', '8'])
    assert build_model(cfg).proposal_generator is not None
    cfg.MOE.HEAD.SUBNETS = 'box'
    with pytest.raises(InputError, match="SUBNETS 'box': only .* MoERetinaNet .* set 'none' for MoEGeneralizedRCNN"):
        build_model(cfg)


def test_fcos_of_a_yaml_is_refused_in_one_sentence():
    with pytest.raises(InputError, match='MODEL.META_ARCHITECTURE MoEFCOS: detectron2 has FCOS in LazyConfigs only'):
        detector('MODEL.META_ARCHITECTURE', 'MoEFCOS')
