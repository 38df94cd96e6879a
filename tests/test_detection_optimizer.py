"""Optimisers of timm's for detectors: SOLVER's numbers, clipping, resume, refusals."""
import pytest
import torch
from torch import nn

pytest.importorskip('detectron2', reason='detectron2 is not installed: tools/setup.sh --detection')

from detectron2.config import LazyConfig  # noqa: E402
from test_detection_training import left_behind, scenes, tiny  # noqa: E402, F401

from moe_zoo.detection import load_config  # noqa: E402
from moe_zoo.detection.optimizer import build_optimizer  # noqa: E402
from moe_zoo.detection.train import main  # noqa: E402
from moe_zoo.errors import InputError  # noqa: E402
from moe_zoo.resources import folder  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')  # of detectron2's older code
ADAMW = ['MOE.OPTIMIZER.NAME', 'adamw', 'SOLVER.BASE_LR', '0.001', 'SOLVER.WEIGHT_DECAY', '0.05']


class Small(nn.Module):
    """A layer, a norm and a table that is not decayed."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.norm = nn.BatchNorm1d(3)
        self.pos_embed = nn.Parameter(torch.ones(3))

    def no_weight_decay(self):
        return {'pos_embed'}


def config(*opts):
    return load_config('configs/demo/retinanet_digits.yaml', opts)


def test_without_a_name_detectron2s_own_is_built():
    optimizer = build_optimizer(config(), Small())
    assert type(optimizer) is torch.optim.SGD and optimizer.defaults['momentum'] == 0.9


def test_solver_sets_rates_and_decays():
    model = Small()
    optimizer = build_optimizer(config(
        *ADAMW, 'SOLVER.WEIGHT_DECAY_NORM', '0.01', 'SOLVER.WEIGHT_DECAY_BIAS', '0.02', 'SOLVER.BIAS_LR_FACTOR', '2.',
        'MOE.OPTIMIZER.ARGS.betas', '(0.8, 0.9)'), model)
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults['betas'] == (0.8, 0.9)
    found = {id(p): (group['lr'], group['weight_decay']) for group in optimizer.param_groups for p in group['params']}
    assert {name: found[id(p)] for name, p in model.named_parameters()} == {
        'linear.weight': (0.001, 0.05), 'linear.bias': (0.002, 0.02), 'pos_embed': (0.001, 0.),
        'norm.weight': (0.001, 0.01), 'norm.bias': (0.002, 0.02)}  # detectron2 lets the rule of biases win


def test_momentum_is_solvers_where_there_is_one():
    assert build_optimizer(config('MOE.OPTIMIZER.NAME', 'rmsprop', 'SOLVER.MOMENTUM', '0.7'), Small()
                           ).defaults['momentum'] == 0.7


def test_gradients_are_clipped():
    model = Small()
    optimizer = build_optimizer(config(
        'MOE.OPTIMIZER.NAME', 'momentum', 'SOLVER.CLIP_GRADIENTS.ENABLED', 'True',
        'SOLVER.CLIP_GRADIENTS.CLIP_VALUE', '2.', 'SOLVER.BASE_LR', '1.', 'SOLVER.MOMENTUM', '0.',
        'SOLVER.WEIGHT_DECAY', '0.'), model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.pos_embed.grad = torch.tensor([5., 1., -5.])
    optimizer.step()
    assert model.pos_embed.tolist() == [-1., 0., 3.]  # 1 - (2, 1, -2)


@pytest.mark.parametrize('name', ['lion', 'lamb', 'adan', 'muon', 'nadamw'])
def test_others_of_timms_step(name):
    model = Small()
    optimizer = build_optimizer(config('MOE.OPTIMIZER.NAME', name, *ADAMW[2:]), model)
    before = model.linear.weight.detach().clone()
    model.linear(torch.ones(1, 2)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.linear.weight, before)


@pytest.mark.parametrize('opts, sentence', [
    (['MOE.OPTIMIZER.NAME', 'adamww'], "MOE.OPTIMIZER.NAME 'adamww' is none of the optimisers .* Did you mean 'adamw'"),
    (['MOE.OPTIMIZER.NAME', 'adahessian'], "'adahessian' is none of the optimisers .* that take plain gradients"),
    (['MOE.OPTIMIZER.NAME', 'adamw', 'MOE.OPTIMIZER.ARGS.beta', '0.9'],
     r"MOE.OPTIMIZER adamw with ARGS {'beta': 0.9} cannot be built: .*beta"),
    (['MOE.OPTIMIZER.NAME', 'adamw', 'MOE.OPTIMIZER.ARGS.betas', '(2., 0.9)'], 'Invalid beta'),
])
def test_what_cannot_be_used_is_one_sentence(opts, sentence):
    with pytest.raises(InputError, match=sentence):
        build_optimizer(config(*opts), Small())


def test_yaml_and_lazyconfig_of_vmoe_train_alike():
    lazy = LazyConfig.load(str(folder('configs') / 'coco' / 'retinanet_vmoe_s_fpn_1x.py')).optimizer
    optimizer = build_optimizer(load_config('configs/coco/retinanet_vmoe_s_fpn_1x.yaml'), Small())
    assert type(optimizer) is lazy._target_
    assert {key: optimizer.defaults[key] for key in ('lr', 'betas', 'weight_decay')} == {
        'lr': lazy.lr, 'betas': tuple(lazy.betas), 'weight_decay': lazy.weight_decay}


@pytest.mark.slow
def test_a_resumed_run_is_the_uninterrupted_one(tiny, tmp_path):  # noqa: F811
    """Both moments of AdamW and the cosine schedule go on where they were."""
    argv = [*tiny, *ADAMW, 'SOLVER.LR_SCHEDULER_NAME', 'WarmupCosineLR', 'SOLVER.MAX_ITER', '4']
    main(argv)
    left_behind(tmp_path / 'run', 'model_0000001.pth', tmp_path / 'killed')
    main([*argv, '--resume', 'OUTPUT_DIR', str(tmp_path / 'killed')])
    one, other = (torch.load(tmp_path / run / 'model_final.pth', weights_only=True) for run in ('run', 'killed'))
    assert all(torch.equal(value, other['model'][key]) for key, value in one['model'].items())
    states = [each['trainer']['_trainer']['optimizer']['state'] for each in (one, other)]
    assert states[0] and all(torch.equal(state[moment], states[1][number][moment])
                             for number, state in states[0].items() for moment in ('step', 'exp_avg', 'exp_avg_sq'))
