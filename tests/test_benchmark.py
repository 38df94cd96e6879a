"""The benchmark's arithmetic and order of events; nothing here depends on how fast the machine is."""
import json

import pytest
import torch
from torch import nn

from moe_zoo.analysis.benchmark_cli import Ratio, alternate, main, make_run, ratio
from moe_zoo.errors import InputError


def test_ratio_is_the_median_of_paired_ratios():
    # 1.4, 1.5, 1.6, 1.5, 1.9 of twins that drift by a factor of 10; sorted 1.4 1.5 1.5 1.6 1.9: quartiles 1.5 and 1.6
    found = ratio([1.4, 15, 160, 1.5, 1.9], [1, 10, 100, 1, 1])
    assert found == Ratio(median=1.5, spread=pytest.approx(0.1), resolved=True)
    assert str(found) == '1.50 (spread 0.10)'


def test_a_ratio_inside_its_spread_is_not_quoted():
    found = ratio([0.9, 1.05, 1.2], [1, 1, 1])  # quartiles 0.975 and 1.125
    assert not found.resolved
    assert str(found) == 'not resolved (spread 0.15)'
    with pytest.raises(InputError, match='at least 3'):
        ratio([1, 2], [1, 1])


def test_rounds_alternate_and_a_timing_is_a_mean_over_calls():
    now, calls = [0.], []

    def run(name, seconds):
        def call():
            now[0] += seconds
            calls.append(name)
        return call

    seconds = alternate([run('a', 0.1), run('b', 0.3)], rounds=3, min_seconds=0.2, clock=lambda: now[0])
    # Warm-up and one trial each; then 0.2 / 0.1 = 2 calls of a and 1 of b, b first in the second round.
    assert ''.join(calls) == 'ab' + 'ab' + 'aab' + 'baa' + 'aab'
    assert seconds == [pytest.approx([0.1] * 3), pytest.approx([0.3] * 3)]


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


def test_command_line_writes_every_timing(tmp_path, capsys):
    out = tmp_path / 'times.json'
    arguments = ['condconv_resnet18', '--mode', 'forward', '--img-size', '32', '--batch-size', '1', '--rounds', '3']
    assert main([*arguments, '--json', str(out)]) == 0
    row, = json.loads(out.read_text())['rows']
    assert (row['model'], row['twin'], row['input_size']) == ('condconv_resnet18', 'resnet18', [3, 32, 32])
    assert len(row['seconds']) == len(row['twin_seconds']) == 3
    assert row['macs_ratio'] > 1
    assert 'condconv_resnet18 / resnet18' in capsys.readouterr().out


@pytest.mark.parametrize(('arguments', 'sentence'), [
    (['condconv_resnet19'], "error: There is no model 'condconv_resnet19' in moe_zoo. Did you mean '"),
    (['condconv_resnet18', '--rounds', '2'], 'error: --rounds 2 --batch-size 8: use at least 3 rounds and 1 image.'),
])
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert capsys.readouterr().err.startswith(sentence)
