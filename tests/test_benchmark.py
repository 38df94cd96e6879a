"""The benchmark's arithmetic and order of events; nothing here depends on how fast the machine is."""
import functools
import json
import sys

import pytest
import timm
import torch
from torch import nn

from moe_zoo import cli
from moe_zoo.analysis import count, layer_cases
from moe_zoo.analysis.benchmark_cli import (
    EQUAL_MACS_AIMS,
    MODEL_AIMS,
    main,
    make_layer_run,
    make_run,
    spread_evenly,
    widen,
)
from moe_zoo.analysis.layer_cases import (
    Case,
    Contender,
    choose,
    cond_conv,
    dropping_tokens,
    find_cases,
    half_live,
    soft_tokens,
    tokens,
)
from moe_zoo.analysis.timing import Ratio, alternate, ratio
from moe_zoo.cards import cards
from moe_zoo.errors import InputError
from moe_zoo.routing import Routing, trace_routing


def test_ratio_is_the_median_of_paired_ratios():
    # 1.4, 1.5, 1.6, 1.5, 1.9 of twins that drift by a factor of 10; sorted 1.4 1.5 1.5 1.6 1.9: quartiles 1.5 and 1.6
    found = ratio([1.4, 15, 160, 1.5, 1.9], [1, 10, 100, 1, 1])
    assert found == Ratio(median=1.5, low=1.5, high=1.6)
    assert found.resolved and str(found) == '1.50 (spread 0.10)'


def test_a_ratio_inside_its_spread_is_not_quoted():
    found = ratio([0.9, 1.05, 1.2], [1, 1, 1])  # quartiles 0.975 and 1.125
    assert not found.resolved
    assert str(found) == 'not resolved (spread 0.15)'
    with pytest.raises(InputError, match='at least 3'):
        ratio([1, 2], [1, 1])


def test_an_aim_is_reached_or_missed_where_the_quartiles_agree():
    found = Ratio(median=1.05, low=1., high=1.125)
    assert [found.judge(at_most) for at_most in (1.2, 1.125, 1.1, 1., .9)] == [
        'reached', 'reached', 'not resolved', 'not resolved', 'missed']


def test_rounds_alternate_and_a_timing_is_a_mean_over_calls():
    now, calls = [0.], []

    def run(name, seconds):
        def call():
            now[0] += seconds
            calls.append(name)
        return call

    runs = [run('a', 0.1), run('b', 0.3)]
    seconds, loads = alternate(runs, rounds=3, min_seconds=0.2, clock=lambda: now[0])
    # Warm-up and one trial each; then 0.2 / 0.1 = 2 calls of a and 1 of b, b first in the second round.
    assert ''.join(calls) == 'ab' + 'ab' + 'aab' + 'baa' + 'aab'
    assert seconds == [pytest.approx([0.1] * 3), pytest.approx([0.3] * 3)]
    assert len(loads) == 3 and min(loads) >= 0


def test_a_training_step_steps_with_the_auxiliary_loss():
    class Model(nn.Linear):
        aux = False

        def set_aux_loss(self, enable):
            self.aux = enable

        def forward(self, x):
            return (super().forward(x), []) if self.aux and self.training else super().forward(x)

    model, x = Model(3, 2), torch.rand(4, 3)
    before = model.weight.detach().clone()
    make_run(model, x, 'forward')()
    assert torch.equal(model.weight, before) and not model.training
    make_run(model, x, 'train')()
    assert model.aux and model.training and not torch.equal(model.weight, before)


def test_a_layer_is_timed_with_the_gradients_of_inputs_and_parameters():
    layer, calls = nn.Linear(3, 2), []
    layer.register_forward_hook(lambda module, args, out: calls.append((module.training, args[0].requires_grad)))
    contender = Contender('linear', layer, (torch.rand(4, 3),))
    make_layer_run(contender, 'forward')()
    assert calls == [(False, False)] and layer.weight.grad is None
    run = make_layer_run(contender, 'train')
    run(), run()
    assert calls[-1] == (True, True)
    assert torch.equal(layer.bias.grad, torch.full((2,), 4.))  # once, not summed over calls: 4 images of slope 1


def test_rivals_compute_the_same():
    contenders = cond_conv(2, 3, 5, in_channels=4, out_channels=6, kernel_size=3)
    ours, plain, theirs = (c.module(*c.inputs) for c in contenders)
    torch.testing.assert_close(ours, theirs)
    assert plain.shape == ours.shape


@pytest.mark.parametrize('name', ['MoEConv2d', 'MoEStage'])
@pytest.mark.parametrize('num_selected', [1, 2])
def test_images_are_spread_over_the_experts(name, num_selected):
    layer, alone = choose(name, num_selected, batch=8, channels=8, size=4)
    assert type(layer.module).__name__ == name
    with trace_routing(layer.module) as trace:
        out = layer.module(*layer.inputs)
    counts = trace[''][0].indices.flatten().bincount(minlength=4)
    assert counts.tolist() == [8 * num_selected // 4] * 4
    assert len(alone.module.experts) == num_selected and alone.module(*alone.inputs).shape == out.shape


def test_half_of_the_channels_are_computed_on_both_sides():
    ours, dense = half_live(2, channels=8, size=5)
    whole = torch.zeros_like(dense.inputs[0])
    whole[:, ::2] = ours.inputs[0]  # the dead channels of the input
    expected = dense.module.eval()(whole)[:, 4:]  # of the output, whose live gates are 1
    torch.testing.assert_close(ours.module.eval()(*ours.inputs), expected)


def test_items_of_a_model_are_spread_over_the_experts():
    logits = torch.tensor([[9., 1., 0.]]).expand(4, 3)  # all four would choose experts 0 and 1
    gates = logits.softmax(dim=1)
    weights, indices = gates.topk(2)
    found = spread_evenly('layer', Routing(logits, gates, weights, indices))
    assert found.indices.tolist() == [[0, 1], [1, 2], [2, 0], [0, 1]]
    assert found.weights is weights
    mixed = Routing(logits, gates, gates)
    assert spread_evenly('layer', mixed) is mixed


def test_tokens_meet_a_dense_mlp_of_equal_macs():
    layer, dense, _ = tokens(2, 1)
    weights = [m.weight.numel() for m in (dense.module.fc1, dense.module.fc2)]
    assert layer.module.max_macs((197, 384)) == 197 * (sum(weights) + 384 * 8)  # and the router
    layer.module.eval()
    assert layer.module(*layer.inputs).shape == dense.module(*dense.inputs).shape


PEERS_LIKE_OURS = [
    ('pytorch-mixtures', tokens, 1, dict(router='shazeer', router_args=dict(zero_init=False))),
    ('pytorch-mixtures', tokens, 2, dict(router='shazeer', router_args=dict(zero_init=False))),
    ('mixture-of-experts', dropping_tokens, 2, dict(router_args=dict(renormalise=True), bias=False)),
    ('st-moe-pytorch', dropping_tokens, 2, dict(router_args=dict(renormalise=True))),
]


@pytest.mark.parametrize('name, build, num_selected, layer_args', PEERS_LIKE_OURS)
def test_peers_compute_the_same_with_the_same_weights(name, build, num_selected, layer_args):
    ours, _, *others = build(num_selected, batch=2, width=24, same_init=False, noise_std=0., **layer_args)
    theirs, = (other for other in others if other.name == name)
    if theirs.module is None:
        pytest.skip(f'{name} is not installed: tools/setup.sh --bench')
    x, = ours.inputs
    with trace_routing(ours.module) as trace:
        out = ours.module(x)
    kept = trace[''][0].kept
    assert kept is None if build is tokens else not kept.all()
    torch.testing.assert_close(theirs.module(x), out)


def test_soft_peers_have_the_same_sizes():
    ours, _, theirs = soft_tokens(batch=1, width=8)
    if theirs.module is None:
        pytest.skip('soft-moe-pytorch is not installed: tools/setup.sh --bench')
    assert theirs.module(*theirs.inputs).shape == ours.module(*ours.inputs).shape
    experts = [sum(p.numel() for p in m.parameters()) for m in (ours.module.fc1, ours.module.fc2)]
    assert sum(p.numel() for p in theirs.module.experts.parameters()) == sum(experts)


def test_what_is_not_installed_is_said_and_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'pytorch_mixtures', None)  # importing it fails
    tiny = Case('a tiny one', functools.partial(tokens, 1, 1, width=8), modes=('forward',))
    monkeypatch.setattr(layer_cases, 'cases', lambda: {'tiny': tiny})
    assert main(['layer', 'tiny', '--rounds', '3']) == 0
    printed = capsys.readouterr()
    assert 'note: tiny goes without pytorch-mixtures, which `tools/setup.sh --bench` installs\n' in printed.err
    assert 'dense Mlp' in printed.out and 'pytorch-mixtures' not in printed.out


def test_a_twin_of_equal_macs_has_wider_mlps_beside_experts(capsys):
    with torch.device('meta'):
        model = timm.create_model('vmoe_vit_s')
        twin = timm.create_model('vit_base_patch32_224', embed_dim=512, depth=8, num_heads=8)
        x = torch.rand(1, 3, 224, 224)
    assert widen(twin, model) == ['blocks.5.mlp', 'blocks.7.mlp']
    assert [block.mlp.fc1.out_features for block in twin.blocks] == [2048] * 5 + [4096, 2048, 4096]
    # What is left is two routers, 50 tokens x 512 x 8 experts, and the layer before the head.
    assert count(model, x).macs_max - count(twin, x).macs_max == 2 * 50 * 512 * 8 + 512 * 512
    assert widen(twin, twin) == []
    with pytest.raises(SystemExit):
        main(['model', 'condconv_resnet18', '--equal-macs', '--img-size', '32'])
    assert capsys.readouterr().err.endswith(
        'error: --equal-macs widens MLPs that stand beside a MoEMlp, and condconv_resnet18 has none: leave it out.\n')


def test_every_case_says_what_it_is():
    cases = find_cases([])
    assert all(case.about and set(case.modes) <= set(layer_cases.MODES) for case in cases.values())
    assert set(MODEL_AIMS) | set(EQUAL_MACS_AIMS) <= set(cards())
    for k in (1, 2):
        case = cases[f'tokens-k{k}-b32']
        assert [case.aim('dense Mlp', mode) for mode in layer_cases.MODES] == [1.05, 1.15]
        assert [case.aim('pytorch-mixtures', mode) for mode in layer_cases.MODES] == [None, 1.]
    assert [cases['condconv-1x1-e4-b8'].aim('nn.Conv2d', mode) for mode in layer_cases.MODES] == [1.1, 1.1]
    for name in ('condconv-1x1-e4-b8', 'condconv-1x1-e4-b32'):
        assert cases[name].at_most == {'nn.Conv2d': 1.1, 'timm CondConv2d': 1.}
    assert list(find_cases(['tokens-k1-*', 'moe-*-k1-b8'])) == [
        'tokens-k1-b8', 'tokens-k1-b32', 'moe-conv-k1-b8', 'moe-stage-k1-b8']


def test_layers_from_the_command_line(tmp_path, capsys, monkeypatch):
    build = functools.partial(cond_conv, 2, 1, 4, in_channels=4, out_channels=4, kernel_size=1)
    tiny = Case('a tiny one', build, {'nn.Conv2d': 1e6, 'timm CondConv2d': 1e-6}, modes=('forward',))
    monkeypatch.setattr(layer_cases, 'cases', lambda: {'tiny': tiny})
    assert main(['layer', '--list']) == 0
    assert capsys.readouterr().out.split(maxsplit=1) == ['tiny', 'a tiny one\n']
    out = tmp_path / 'times.json'
    assert cli.main(['benchmark', 'layer', 'tiny', '--rounds', '3', '--clock', 'cpu', '--json', str(out)]) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert [(row['case'], row['twin'], row['verdict']) for row in found['rows']] == [
        ('tiny', 'nn.Conv2d', 'reached'), ('tiny', 'timm CondConv2d', 'missed')]
    for row in found['rows']:
        assert len(row['seconds']) == len(row['twin_seconds']) == len(row['loads']) == 3
    assert found['machine']['clock'] == 'cpu' and found['machine']['threads'] == 1
    assert 'torch threads: 1, cpu time, 3 rounds; load ' in printed
    assert 'reached' in printed and 'missed' in printed


def test_models_from_the_command_line(tmp_path, capsys):
    out = tmp_path / 'times.json'
    arguments = ['condconv_resnet18', '--mode', 'forward', '--img-size', '32', '--batch-size', '1', '--rounds', '3']
    assert main(['model', *arguments, '--json', str(out)]) == 0
    row, = json.loads(out.read_text())['rows']
    assert (row['model'], row['twin'], row['input_size']) == ('condconv_resnet18', 'resnet18', [3, 32, 32])
    assert len(row['seconds']) == len(row['twin_seconds']) == len(row['loads']) == 3
    assert row['macs_ratio'] > 1
    assert 'condconv_resnet18 / resnet18' in capsys.readouterr().out


@pytest.mark.parametrize(('arguments', 'sentence'), [
    (['condconv_resnet18'],
        "error: benchmark.py has the commands model, layer, detector, coco-eval, not 'condconv_resnet18'. Models are "
        'timed by: benchmark.py model condconv_resnet18.'),
    (['layers'],
        "error: benchmark.py has the commands model, layer, detector, coco-eval, not 'layers'. Did you mean 'layer'?"),
    (['model', 'condconv_resnet19'], "error: There is no model 'condconv_resnet19' in moe_zoo. Did you mean '"),
    (['model', 'condconv_resnet18', '--rounds', '2'],
        'error: --rounds 2 --batch-size 8: use at least 3 rounds and 1 image.'),
    (['layer', 'condconv-1x1-e4-b9'], "error: There is no layer case 'condconv-1x1-e4-b9'. Did you mean 'condconv-1x1"),
    (['layer', 'zz*'], "error: There is no layer case 'zz*'. `benchmark.py layer --list` shows all."),
    (['layer', 'moe-conv-k1-b8', '--rounds', '2'], 'error: --rounds 2: use at least 3 rounds.'),
])
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith(sentence)
