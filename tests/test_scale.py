"""The estimate of `moe-zoo estimate-scale`, against arithmetic by hand and against the page that shows it."""
import re

import pytest

from moe_zoo.analysis.scale_cli import Rates, Shapes, estimate, main, parser, shapes_of

# A dense part of 1000 parameters, 400 of experts, 8 of them, 2 a token; 10 tokens of width 4, experts of 6.
SHAPES = Shapes(
    dense=1000, expert=400, block=100, macs=500, tokens=10, width=4, depth=3, routed=2, experts=8, selected=2, hidden=6)
RATES = Rates(macs=1000., node=100., network=10., per_node=2)


def test_one_machine():
    """2 GPUs share the experts, 5 images at a time, 2 times: 20 images."""
    found = estimate(SHAPES, RATES, gpus=2, batch=20, images=5, shared_by=2)
    assert found.times == 2
    assert found.memory_state == 16 * (500 + 200)
    assert found.memory_block == 8 * 100
    # inputs of 3 blocks of width 4; of the one at work 5 x 4 outputs of attention, 2 experts of 6 + 4, and gradients
    assert found.memory_activations == 4 * 5 * 10 * (3 * 4 + 2 * (20 + 20))
    assert found.memory == 11200 + 800 + 18400
    assert found.sent_shards == 3 * 2 * 4000 / 2  # half of 1000 float32 numbers, three ways, twice
    assert found.sent_gradients == 0  # nobody else holds the same experts
    assert found.sent_tokens == 6 * 2 * 2 * 5 * 10 * 2 * 4 * 4 / 2
    assert found.seconds_compute == 4 * 2 * 5 * 500 / 1000
    assert (found.seconds_shards, found.seconds_tokens) == (120., 192.)  # 12,000 and 19,200 bytes at 100 a second
    assert found.seconds == (312., 312. + 20.)


def test_several_machines():
    """8 GPUs in machines of 2, experts over 4: two of the three others that hold experts are on another machine."""
    found = estimate(SHAPES, RATES, gpus=8, batch=40, images=5, shared_by=4)
    assert found.times == 1
    assert found.memory_state == 16 * (125 + 100)
    assert found.sent_gradients == 2 * 400 / 2  # a ring over the 2 that hold the same 100 parameters: 400 bytes
    assert found.seconds_gradients == 40.  # by its own network card
    assert found.seconds_shards == 3 * 4000 * 7 / 8 / 20  # by those of both GPUs of a machine
    tokens = 6 * 2 * 5 * 10 * 2 * 4 * 4 * 3 / 4
    assert found.seconds_tokens == pytest.approx(tokens * (1 / 3 / 100 + 2 / 3 / 10))


def test_the_page_shows_what_the_tool_prints(repository, capsys):
    assert main(['vmoe_vit_h', '--macs', '60', '--node', '200', '--network', '20', '--per-node', '8']) == 0
    table = capsys.readouterr().out
    assert table in (repository / 'docs' / 'scale.md').read_text()
    shapes = shapes_of('vmoe_vit_h')
    assert shapes.dense + shapes.expert == 1091073000  # as on its card
    assert shapes.expert == 5 * 8 * (2 * 1280 * 5120 + 5120 + 1280)


@pytest.mark.parametrize('arguments, sentence', [
    (['resnet10t'], 'error: resnet10t: the estimate is of vision transformers with experts of tokens'),
    (['vmoe_vit_x'], "error: Unknown model 'vmoe_vit_x'. Did you mean"),
    (['vmoe_vit_s', '--gpus', '12'], 'error: --expert-parallel 8 does not divide 12 GPUs and 8 experts: use'),
    (['vmoe_vit_s', '--gpus', '8', '--batch', '100'], 'error: --batch 100 is no multiple of 8 GPUs x 8 images'),
    (['vmoe_vit_s', '--images', '0'], 'error: --images 0: give a number above 0.'),
])
def test_what_does_not_fit_is_refused(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith(sentence)


def test_the_help_says_what_the_defaults_are():
    """`(default 60)` of --macs, and so on; and those without words: 8, 64 and 512 GPUs."""
    made = parser()
    defaults = vars(made.parse_args(['vmoe_vit_s']))
    told = {action.dest: re.search(r'\(default ([\d.]+)\)', action.help or '') for action in made._actions}
    told = {name: float(found[1]) for name, found in told.items() if found}
    assert told == {name: defaults[name] for name in told} and len(told) == 6
    assert defaults['gpus'] == [8, 64, 512] and defaults['expert_parallel'] is None
