"""What a recipe makes of a model, a loss and an optimiser: timm's options, by numbers that can be checked by hand."""
import argparse

import pytest
import torch
from torch import nn

from moe_zoo.engine.build import build_optimizer, criterion_kwargs, open_device, prepare_model
from moe_zoo.engine.config import load_config
from moe_zoo.errors import InputError


class Tiny(nn.Module):
    """A norm and a head."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(2)
        self.head = nn.Linear(2, 3)
        nn.init.ones_(self.head.weight), nn.init.ones_(self.head.bias)

    def get_classifier(self):
        return self.head


def arguments(**options) -> argparse.Namespace:
    args = load_config({}, options)
    args.distributed, args.world_size = False, options.pop('world_size', 1)
    return args


@pytest.mark.parametrize('options, lr', [
    (dict(opt='sgd'), .025),  # 0.1 for 256 images, a quarter of it for 64
    (dict(opt='adamw'), .05),  # adaptive ones by the root of a quarter
    (dict(opt='lamb'), .05),
    (dict(opt='adamw', lr_base_scale='linear'), .025),
    (dict(opt='sgd', lr_base_scale='sqrt'), .05),
    (dict(opt='sgd', grad_accum_steps=8), .2),  # 512 images an update
    (dict(opt='sgd', lr=.3), .3),
])
def test_the_learning_rate_follows_the_batch_where_none_is_given(options, lr):
    args = arguments(**{'lr_base': .1, 'lr_base_size': 256, 'batch_size': 64, **options})
    assert build_optimizer(args, Tiny()).param_groups[0]['lr'] == pytest.approx(lr) == args.lr


def test_all_processes_count_for_the_learning_rate():
    args = arguments(opt='sgd', lr_base=.1, lr_base_size=256, batch_size=64)
    args.world_size = 2
    assert build_optimizer(args, Tiny()).param_groups[0]['lr'] == pytest.approx(.05)


@pytest.mark.parametrize('options, sentence', [
    (dict(opt='sdg'), "Unknown optimiser opt='sdg'. Did you mean 'sgd'"),
    (dict(opt='sgd', opt_kwargs={'nonsense': 1}), 'The optimiser opt=sgd cannot be built: .*nonsense'),
])
def test_optimisers_that_are_not_there_are_refused(options, sentence):
    with pytest.raises(InputError, match=sentence):
        build_optimizer(arguments(**options), Tiny())


def test_a_model_is_prepared_as_asked():
    model = prepare_model(arguments(head_init_scale=.5, head_init_bias=-2.), Tiny(), torch.device('cpu'))
    assert model.head.weight.tolist() == [[.5, .5]] * 3 and model.head.bias.tolist() == [-2., -2., -2.]
    assert prepare_model(arguments(model_dtype='bfloat16'), Tiny(), torch.device('cpu')).head.weight.dtype == \
        torch.bfloat16
    split = prepare_model(arguments(split_bn=True, aug_splits=3), Tiny(), torch.device('cpu'))
    assert len(split.bn.aux_bn) == 2  # one norm of the three is the model's own
    with pytest.raises(InputError, match='split_bn=true keeps a batch norm for each augmentation split: set aug_spl'):
        prepare_model(arguments(split_bn=True), Tiny(), torch.device('cpu'))


@pytest.mark.parametrize('options, expected', [
    (dict(smoothing=.2), dict(loss_type=None, smoothing=.2)),
    (dict(bce_loss=True, bce_target_thresh=.3), dict(loss_type='bce', bce_target_thresh=.3)),
    (dict(loss='bce', bce_sum=True), dict(loss_type='bce', bce_sum=True)),
    (dict(jsd_loss=True, aug_splits=3), dict(loss_type='jsd', jsd_splits=3)),
    (dict(loss='asl', asl_gamma_neg=3.), dict(loss_type='asl', asl_gamma_neg=3.)),
    (dict(loss='poly', poly_epsilon=2.), dict(loss_type='poly', poly_epsilon=2.)),
])
def test_the_options_of_a_loss_reach_timm(options, expected):
    found = criterion_kwargs(arguments(**options), mixup_active=False)
    assert {key: found[key] for key in expected} == expected and found['soft_targets'] is False


def test_a_loss_that_is_not_there_is_refused():
    with pytest.raises(InputError, match='loss=focal: '):
        criterion_kwargs(arguments(loss='focal'), mixup_active=False)


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(InputError, match="device='gpu' is not a device of torch: use 'cpu', 'cuda' or 'cuda:1'"):
        open_device(arguments(device='gpu'))
