"""The benchmark's arithmetic and order of events; nothing here depends on how fast the machine is."""
import functools
import json
import re
import sys

import pytest
import timm
import torch
from rich.console import Console
from torch import nn

from moe_zoo import cli
from moe_zoo.analysis import benchmark_cli, count, dispatch_cases, layer_cases, peers, speed_tables, targets
from moe_zoo.analysis.benchmark_cli import main
from moe_zoo.analysis.count_cli import build_model
from moe_zoo.analysis.dispatch_cases import benchmark_dispatch, exchange_of_one, find_cells, find_ways
from moe_zoo.analysis.layer_cases import (
    Case,
    Contender,
    choose,
    cond_conv,
    dropping_tokens,
    find_cases,
    half_live,
    make_layer_run,
    soft_tokens,
    tokens,
)
from moe_zoo.analysis.model_cases import (
    benchmark_model,
    close,
    expert_bytes,
    make_run,
    memory_of,
    read_experts,
    spread_evenly,
    widen,
)
from moe_zoo.analysis.targets import Target
from moe_zoo.analysis.timing import Ratio, Settings, alternate, ratio
from moe_zoo.engine import loading_benchmark as loading
from moe_zoo.errors import InputError
from moe_zoo.layers import ChannelGate, MoEMlp, RoutedConv2d
from moe_zoo.routing import Routing, dispatch_reference, trace_routing

QUICK = Settings(rounds=3, min_seconds=0)


@pytest.fixture(autouse=True)
def no_repeated_calls(monkeypatch):
    """A timing of the command line is one call."""
    monkeypatch.setattr(benchmark_cli, 'Settings', functools.partial(Settings, min_seconds=0))


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

    runs = [run('a', 0.125), run('b', 0.375)]
    seconds, loads = alternate(runs, rounds=3, min_seconds=0.25, clock=lambda: now[0])
    # Warm-up, and trials of 0.25 seconds; then 0.25 / 0.125 = 2 calls of a and 1 of b, b first in the second round.
    assert ''.join(calls) == 'ab' + 'aab' + 'aab' + 'baa' + 'aab'
    assert seconds == [pytest.approx([0.125] * 3), pytest.approx([0.375] * 3)]
    assert len(loads) == 3 and min(loads) >= 0


def test_a_call_that_was_held_up_does_not_tell_how_many_fill_a_round():
    """The first trial takes 0.15 seconds, all others 0.01: 0.2 / 0.01 = 20 calls a round, not 1."""
    now, calls = [0.], []

    def run():
        now[0] += 0.15 if len(calls) == 1 else 0.01
        calls.append(now[0])

    (seconds,), _ = alternate([run], rounds=1, min_seconds=0.2, clock=lambda: now[0])
    assert len(calls) == 1 + (1 + 5) + 20 and seconds == [pytest.approx(0.01)]


def test_a_training_step_has_the_auxiliary_loss_and_no_optimiser():
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
    assert model.aux and model.training and torch.equal(model.weight, before)
    grad = model.weight.grad.clone()
    make_run(model, x, 'train')()
    assert grad.any() and torch.equal(model.weight.grad, grad)  # of one step, not summed over calls


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


@pytest.mark.parametrize('bias', [True, False])
def test_peers_get_the_weights_of_every_expert(bias):
    ours = MoEMlp(2, 3, num_experts=2, bias=bias, same_init=False)
    theirs = [(nn.Linear(2, 3), nn.Linear(3, 2)) for _ in range(2)]
    peers._copy_experts(ours, theirs)
    for e, pair in enumerate(theirs):
        for stack, linear in zip((ours.fc1, ours.fc2), pair):
            assert torch.equal(linear.weight, stack.weight[e])
            assert torch.equal(linear.bias, stack.bias[e] if bias else torch.zeros(len(linear.bias)))


def test_losses_of_a_peer_are_left_out():
    lstm = nn.LSTM(2, 3)  # a layer that returns more than its output
    x = torch.rand(4, 1, 2)
    assert torch.equal(peers._FirstOutput(lstm)(x), lstm(x)[0])


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
    assert list(find_cases(['tokens-k1-*', 'moe-*-k1-b8'])) == [
        'tokens-k1-b8', 'tokens-k1-b32', 'moe-conv-k1-b8', 'moe-stage-k1-b8']


def test_layers_from_the_command_line(tmp_path, capsys, monkeypatch):
    build = functools.partial(cond_conv, 2, 1, 4, in_channels=4, out_channels=4, kernel_size=1)
    tiny = Case('a tiny one', build, modes=('forward',))
    monkeypatch.setattr(layer_cases, 'cases', lambda: {'tiny': tiny})
    monkeypatch.setattr(targets, 'TARGETS', [
        Target(1e6, '', {'case': 'tiny', 'twin': 'nn.Conv2d'}), Target(1e-6, '', {'case': 'tiny', 'twin': 'timm *'})])
    assert main(['layer', '--list']) == 0
    assert capsys.readouterr().out.split(maxsplit=1) == ['tiny', 'a tiny one\n']
    out = tmp_path / 'times.json'
    assert cli.main(['benchmark', 'layer', 'tiny', '--rounds', '3', '--clock', 'cpu', '--json', str(out)]) == 0
    printed, found = capsys.readouterr().out, json.loads(out.read_text())
    assert [(row['case'], row['twin'], row['verdict']) for row in found['rows']] == [
        ('tiny', 'nn.Conv2d', 'reached'), ('tiny', 'timm CondConv2d', 'missed')]
    for row in found['rows']:
        assert len(row['seconds']) == len(row['twin_seconds']) == len(row['loads']) == 3
        assert row['memory'] >= row['twin_memory'] >= 4 * 4 * 4 * 4  # the output, which both make
    assert found['machine']['clock'] == 'cpu' and found['machine']['threads'] == 1
    assert 'torch threads: 1, cpu time, 3 rounds; load ' in printed
    assert 'reached' in printed and 'missed' in printed


SMALL = ['--img-size', '32', '--batch-size', '2', '--rounds', '3']


def test_models_from_the_command_line(tmp_path, capsys):
    out = tmp_path / 'times.json'
    assert main(['model', 'condconv_mobilenetv1_025', '--mode', 'forward', '--floor', *SMALL, '--json', str(out)]) == 0
    row, = json.loads(out.read_text())['rows']
    assert (row['model'], row['twin'], row['input_size']) == (*['condconv_mobilenetv1_025'] * 2, [3, 32, 32])
    assert len(row['seconds']) == len(row['twin_seconds']) == len(row['loads']) == len(row['reading_seconds']) == 3
    assert row['macs_ratio'] > 1 and row['verdict'] == '' and 'optimizer_seconds' not in row
    assert row['memory'] > 0 and row['twin_memory'] > 0
    printed = capsys.readouterr().out
    assert re.search(r'condconv_mobilenetv1_025 / .*\n +condconv_mobilenetv1_025 ', printed)
    assert 'MB of its experts once takes' in printed


def test_the_optimiser_stands_apart_from_a_training_step():
    row, = benchmark_model('condconv_mobilenetv1_025', 'train', build_model, QUICK, batch_size=2, img_size=32)
    assert len(row['optimizer_seconds']) == len(row['twin_optimizer_seconds']) == 3
    assert row['parameters'] > 4 * row['twin_parameters']
    gradients = 4 * row['parameters']
    assert gradients < row['memory'] < 3 * gradients  # with the activations of two images of 32 x 32
    assert 4 * row['twin_parameters'] < row['twin_memory'] < row['memory']


def test_memory_counts_the_gradients_of_every_call():
    layer, x = nn.Linear(1000, 1000, bias=False), torch.rand(1, 1000)
    run = make_layer_run(Contender('linear', layer, (x,)), 'train')
    run()
    assert 4_000_000 <= memory_of(layer, run, 'cpu') < 4_100_000  # of 1000 x 1000 weights, there before or not


def test_the_floor_of_mixing_reads_the_experts_alone():
    ours = RoutedConv2d(4, 6, 3, num_experts=3, bias=False)
    assert expert_bytes(ours) == 3 * 6 * 4 * 3 * 3 * 4 < 4 * sum(p.numel() for p in ours.parameters())
    read_experts(ours)()


def test_a_share_of_the_channels_stays_open():
    gate = ChannelGate(8, 3)
    close(gate, 0.25)
    e = torch.tensor([[.2, .5, .3]])
    assert gate.mix(e)[1].gt(0)[0].tolist() == [False, False, False, True] * 2
    close(gate, 1.)
    assert gate.mix(e)[1].gt(0).all()


def test_live_channels_alone_beside_all_of_them(tmp_path, capsys):
    out = tmp_path / 'times.json'
    arguments = ['model', 'deepmoe_narrow_resnet18', *SMALL, '--live', '0.5']
    assert main([*arguments, '--json', str(out)]) == 0
    row, = json.loads(out.read_text())['rows']
    assert (row['twin'], row['mode'], row['live']) == ('all channels, masked', 'forward', 0.5)
    assert row['difference'] < 1e-3
    for more, sentence in ((['--floor'], '--live compares a model with itself, forward: leave --equal-macs'),
                           (['--live', '2'], '--live 2: give the share of the channels that stay live, above 0')):
        with pytest.raises(SystemExit):
            main([*arguments, *more])
        assert sentence in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(['model', 'condconv_mobilenetv1_025', *SMALL, '--live', '0.5'])
    assert 'EfficientNet has no channel gates' in capsys.readouterr().err


# ---- dispatch

def test_every_way_to_the_experts_computes_the_same():
    layer = MoEMlp(8, 32, num_experts=4, num_selected=2, same_init=False)
    nn.init.normal_(layer.fc1.bias), nn.init.normal_(layer.fc2.bias)
    x = torch.randn(12, 8)
    routing = spread_evenly('', layer.router(x)._replace(shape=(12,)))
    expected = dispatch_reference(x, routing, layer.run_experts)
    with exchange_of_one() as exchange:
        ways = find_ways(layer, routing, 6, exchange)  # 12 x 2 pairs over 4 experts
        assert list(ways) == ['sorted', 'padded', 'grouped', 'exchange']
        for way in ways.values():
            torch.testing.assert_close(way(x), expected)


@pytest.mark.parametrize('mode', layer_cases.MODES)
def test_ways_are_timed_beside_the_experts_alone(mode, monkeypatch):
    monkeypatch.setattr(dispatch_cases, 'TOKENS', (16,))
    rows = benchmark_dispatch('tokens16-e8-k2', mode, QUICK, width=8)
    assert [row['layer'] for row in rows] == ['sorted', 'padded', 'grouped', 'exchange']
    assert {(row['twin'], row['mode']) for row in rows} == {('experts alone', mode)}
    assert len({tuple(row['twin_seconds']) for row in rows}) == 1  # all beside the same rounds


def test_cells_are_chosen_by_pattern():
    assert list(find_cells(['tokens1576-*-k1'])) == ['tokens1576-e8-k1', 'tokens1576-e32-k1']
    with pytest.raises(InputError, match="There is no cell of dispatch 'zz'. `benchmark.py dispatch --help` shows"):
        find_cells(['zz'])


# ---- loading

@pytest.mark.parametrize('name', loading.CASES)
def test_loaders_are_timed_on_the_same_images(name, tmp_path):
    loading.write_images(tmp_path, 8, height=16, width=20)
    row, = loading.benchmark_loading(name, tmp_path, QUICK, workers=0, batch_size=4, size=16)
    assert row['images'] == 8 and len(row['seconds']) == len(row['twin_seconds']) == 3
    root = tmp_path / ('train.tar' if name == 'tar' else 'train')
    ours = loading.our_loader(root, loading.CASES[name][1], 0, 4, 16)
    theirs = loading.timm_loader(root, 0, 4, 16)
    views = 2 if name == 'two-views' else 1
    assert [len(images) for images, _ in ours] == [4 * views] * 2 and [len(images) for images, _ in theirs] == [4] * 2


# ---- tables

def printed_rows(command, rows):
    console = Console(width=250)
    with console.capture() as capture:
        console.print(speed_tables.table(command, rows))
    heading, _, *lines = filter(str.strip, capture.get().splitlines())
    return [re.split(r'\s{2,}', line.strip()) for line in (heading, *lines)]


def test_loaders_are_printed_by_images_a_second():
    row = {'about': 'a folder', 'twin': 'timm', 'time_ratio': {'median': .5, 'low': .4, 'high': .6}, 'images': 3000,
           'seconds': [1., 2., 8.], 'twin_seconds': [4., 3., 5.], 'workers': 2}  # medians of 2 s and 4 s
    heading, found = printed_rows('data', [row])
    assert heading == ['data', 'beside', 'time ratio', 'images a second', 'of the other', 'workers']
    assert found == ['a folder', 'timm', '0.50 (spread 0.20)', '1,500', '750', '2']


def test_detectors_are_printed_beside_the_first():
    same = {'mode': 'forward', 'input_size': [3, 640, 800], 'parameters': 1234567, 'memory': 2_500_000, 'verdict': ''}
    rows = [same | {'config': 'configs/coco/plain.yaml', 'first': True, 'macs': 2e9, 'macs_ratio': 1., 'at_most': None,
                    'seconds': [.25] * 3, 'time_ratio': {'median': 1., 'low': 1., 'high': 1.}},
            same | {'config': 'routed.yaml', 'first': False, 'macs': 3e9, 'macs_ratio': 1.5, 'at_most': 1.6,
                    'seconds': [.5] * 3, 'time_ratio': {'median': 2., 'low': 1.9, 'high': 2.}, 'verdict': 'missed'}]
    _, plain, routed = printed_rows('detector', rows)
    assert plain == ['plain', 'forward', '640x800', '1,234,567', '2.000', '250.00', '2.5', '1', '1']
    assert routed == ['routed', 'forward', '640x800', '1,234,567', '3.000', '500.00', '2.5', '1.500',
                      '2.00 (spread 0.10)', '1.60', 'missed']


# ---- compiled

@pytest.mark.slow
def test_compiled_models_are_timed_beside_eager_ones(tmp_path, capsys):
    out = tmp_path / 'times.json'
    arguments = ['pmoe_cnn', '--mode', 'forward', '--batch-size', '2', '--rounds', '3', '--json', str(out)]
    assert main(['compile', *arguments]) == 0
    row, = json.loads(out.read_text())['rows']
    assert (row['twin'], row['graph_breaks']) == ('eager', 0)
    assert row['compile_seconds'] > max(row['seconds'])


# ---- what is refused

COMMANDS = ('model', 'compile', 'layer', 'dispatch', 'detector', 'data', 'coco-eval', 'all', 'page')


@pytest.mark.parametrize(('arguments', 'sentence'), [
    (['condconv_resnet18'],
        f"error: benchmark.py has the commands {', '.join(COMMANDS)}, not 'condconv_resnet18'. "
        "Models are timed by: benchmark.py model condconv_resnet18."),
    (['layers'], f"error: benchmark.py has the commands {', '.join(COMMANDS)}, not 'layers'. Did you mean 'layer'?"),
    (['model', 'condconv_resnet19'], "error: There is no model 'condconv_resnet19' in moe_zoo. Did you mean '"),
    (['model', 'condconv_resnet18', '--rounds', '2'], 'error: --rounds 2: use at least 3 rounds.'),
    (['model', 'condconv_resnet18', '--batch-size', '0'], 'error: --batch-size 0: use at least 1 image.'),
    (['layer', 'condconv-1x1-e4-b9'], "error: There is no layer case 'condconv-1x1-e4-b9'. Did you mean 'condconv-1x1"),
    (['layer', 'zz*'], "error: There is no layer case 'zz*'. `benchmark.py layer --list` shows all."),
    (['layer', 'moe-conv-k1-b8', '--rounds', '2'], 'error: --rounds 2: use at least 3 rounds.'),
    (['data', '--images', '8'], 'error: --images 8 --batch-size 32: give at least one batch of images.'),
])
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith(sentence)
