"""`moefied` under detectron2: named by MOE.TIMM it stands where its base stands, and trains with its own losses."""
import pytest
import torch

pytest.importorskip('detectron2', reason='detectron2 is not installed')

from detectron2.config import CfgNode  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402
from test_detection import SMALL, images, path_of  # noqa: E402
from test_moefied import SMALL_SWIN, dense  # noqa: E402

from moe_zoo.detection import load_config  # noqa: E402
from moe_zoo.errors import InputError  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')  # of detectron2's older code

# keywords of the base, targets, layer, its balance losses
BASES = {
    'convnext_atto': ({}, 'stages.2.*.mlp', 'moe_mlp', ('importance', 'vmoe_load')),
    'swinv2_tiny_window8_256': (
        {key: list(each) if isinstance(each, tuple) else each for key, each in SMALL_SWIN.items()}, 'layers.*.mlp',
        'moe_mlp', ('importance', 'vmoe_load')),
    'resnet18': ({}, ['layer4.*.conv2', 'layer3.0.conv1'], 'moe_conv', ('importance_unbiased',)),
    'tf_efficientnet_lite0': ({}, 'blocks.5.*.conv_pw', 'condconv', ()),
}


def detector(name: str, args: dict, checkpoint: str = ''):
    """A RetinaNet whose backbone is a timm model, on images of any size."""
    cfg = load_config(path_of('coco/retinanet_condconv_r50_fpn_1x'), [
        *SMALL, 'MODEL.FPN.OUT_CHANNELS', '16', 'MODEL.RETINANET.NUM_CONVS', '1', 'MOE.TIMM.CHECK_INPUT', 'False',
        'MOE.TIMM.NAME', name, 'MOE.TIMM.CHECKPOINT', checkpoint])
    cfg.MOE.TIMM.ARGS = CfgNode(args)
    return build_model(cfg)


@pytest.mark.parametrize('base', [
    'swinv2_tiny_window8_256', 'resnet18',
    *(pytest.param(base, marks=pytest.mark.slow) for base in ('convnext_atto', 'tf_efficientnet_lite0'))])
def test_it_stands_where_its_base_stands(base, tmp_path):
    kwargs, targets, layer, losses = BASES[base]
    path = tmp_path / 'dense.pth'
    torch.save(dense(base, **kwargs).state_dict(), path)  # of 5 classes, which no feature needs
    args = dict(base=base, targets=targets, layer=layer, num_experts=2, **kwargs)
    plain, model = detector(base, kwargs, str(path)), detector('moefied', args, str(path))
    shapes = [d.backbone.bottom_up.output_shape() for d in (plain, model)]
    assert shapes[0] == shapes[1] and {s.stride for s in shapes[0].values()} == {8, 16, 32}
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected, found = (d.eval().backbone.bottom_up(x) for d in (plain, model))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)

    with EventStorage():
        got = model.train()(images((64, 96), (64, 64)))
    assert set(got) == {'loss_cls', 'loss_box_reg', *(f'loss_moe_{name}' for name in losses)}
    sum(got.values()).backward()
    routers = [p for name, p in model.named_parameters() if 'router.weight' in name or 'routing_fn.weight' in name]
    assert routers and all(p.grad.abs().max() > 0 for p in routers)
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('args, message', [
    (dict(base='convnext_ato'), "base='convnext_ato' is no model of timm. Did you mean 'convnext_atto'"),
    (dict(base='convnext_atto', targets='stages.9.*', layer='moe_mlp'), "targets='stages.9.*' matches no module, and"),
])
def test_what_cannot_be_built_is_told(args, message):
    with pytest.raises(InputError) as error:
        detector('moefied', args)
    assert message in str(error.value) and '\n' not in str(error.value)
