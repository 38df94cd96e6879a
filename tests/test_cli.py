"""The command `moe-zoo`: its tables, its doors, its sentences for what it cannot do."""
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_zoo import __version__, cli
from moe_zoo.cards import cards

COMMAND = Path(sys.executable).parent / 'moe-zoo'


def _fails(capsys, *arguments) -> str:
    """Standard error of a call that must end with code 2 and print nothing else."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    printed = capsys.readouterr()
    assert stopped.value.code == 2
    assert not printed.out
    assert printed.err.count('\n') == 1
    return printed.err.removeprefix('error: ').rstrip()


def test_list_prints_every_model(capsys):
    assert cli.main(['list']) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ['model', 'parameters', 'active', 'MACs', 'summary']
    assert [row.split()[0] for row in rows] == sorted(cards())


def test_list_shortens_figures(capsys):
    cli.main(['list', 'condconv_resnet50'])
    row = capsys.readouterr().out.splitlines()[1]
    assert re.match(r'condconv_resnet50 +130 M +130 M +4\.21 G  \S', row)  # 129,872,800 and 4,208,394,048


@pytest.mark.parametrize('pattern, expected', [
    ('resnet', {'condconv_resnet18', 'condconv_resnet34', 'condconv_resnet50'}),
    ('vmoe_*', {'vmoe_vit_s', 'vmoe_vit_b', 'vmoe_vit_l', 'vmoe_vit_h'}),
    ('condconv_resnet?8', {'condconv_resnet18'}),
])
def test_list_filters_by_part_or_pattern(capsys, pattern, expected):
    cli.main(['list', pattern])
    found = {row.split()[0] for row in capsys.readouterr().out.splitlines()[1:]}
    assert expected <= found
    assert 'condconv_mnasnet_a1' not in found


@pytest.mark.parametrize('name', sorted(cards()))
def test_show_prints_a_whole_card(capsys, name):
    entry = cards()[name]
    assert cli.main(['show', name]) == 0
    out = ' '.join(capsys.readouterr().out.split())  # lines are folded to the width of the terminal
    assert out.startswith(f'{name}: ')
    for text in (f'{entry["cost"]["parameters"]:,}', f'{entry["cost"]["macs"]:,} at most', entry['recipe']['command'],
                 entry.get('twin', 'none: it is dense itself'), *entry['deviations']):
        assert ' '.join(text.split()) in out


def test_help_names_every_command(capsys):
    assert cli.main([]) == cli.main(['--help']) == 0
    first, second = capsys.readouterr().out.split('usage: ')[1:]
    assert first.strip() == second.strip()
    for command in ('list', 'show', *cli.TOOLS):
        assert f'\n  {command} ' in first


def test_version(capsys):
    assert cli.main(['--version']) == 0
    assert capsys.readouterr().out == f'moe_zoo {__version__}\n'


@pytest.mark.parametrize('arguments, message', [
    (['lst'], "moe-zoo has no command 'lst'. Did you mean 'list'?"),
    (['zzz'], "moe-zoo has no command 'zzz'. `moe-zoo --help` lists them."),
    (['list', 'zzz'], "No model of moe_zoo matches 'zzz'. `moe-zoo list` shows all names."),
    (['list', 'a', 'b'], 'Use it as: moe-zoo list [FILTER] (given: a b).'),
    (['show'], 'Use it as: moe-zoo show NAME (given: nothing).'),
    (['show', '--json'], 'Use it as: moe-zoo show NAME (given: --json).'),
])
def test_what_it_cannot_do_is_one_sentence(capsys, arguments, message):
    assert _fails(capsys, *arguments) == message


def test_a_misspelt_model_is_told_its_neighbours(capsys):
    assert _fails(capsys, 'show', 'vmoe_vit_x').startswith("There is no model 'vmoe_vit_x' in moe_zoo. Did you mean '")


@pytest.mark.parametrize('command', cli.TOOLS)
def test_every_tool_opens_and_explains_itself(command, capsys):
    module, _, extra = cli.TOOLS[command]
    if extra == 'detection':
        pytest.importorskip('detectron2')
    assert callable(importlib.import_module(module).main)
    try:
        code = cli.main([command, '--help'])
    except SystemExit as stopped:  # argparse leaves this way
        code = stopped.code
    assert code == 0
    assert 'usage: ' in capsys.readouterr().out


def test_a_missing_package_is_named_with_its_extra(capsys, monkeypatch):
    monkeypatch.setitem(cli.TOOLS, 'train-coco', ('needs_pycocotools', '', 'detection'))
    monkeypatch.setattr(importlib, 'import_module', lambda name: _missing('pycocotools.mask'))
    assert _fails(capsys, 'train-coco') == (
        "moe-zoo train-coco needs 'pycocotools.mask', which is not installed: "
        "the extra 'detection' brings it (pip install '.[detection]').")
    monkeypatch.setattr(importlib, 'import_module', lambda name: _missing('detectron2'))
    assert _fails(capsys, 'train-coco').endswith("'detectron2', which is not installed: "
                                                 'tools/setup.sh installs its Python part.')


def test_a_missing_module_of_ours_is_not_blamed_on_the_user(monkeypatch):
    monkeypatch.setattr(importlib, 'import_module', lambda name: _missing('moe_zoo.engine.gone'))
    with pytest.raises(ModuleNotFoundError):
        cli.main(['train-imagenet'])


def _missing(name: str):
    raise ModuleNotFoundError(f'No module named {name!r}', name=name)


def _loaded(*arguments) -> str:
    """What the installed command imports, from the interpreter's own account on standard error."""
    if not COMMAND.is_file():
        pytest.skip('moe_zoo is not installed in this environment')
    done = subprocess.run(
        [sys.executable, '-X', 'importtime', COMMAND, *arguments], capture_output=True, text=True, check=True,
        env=os.environ | {'COLUMNS': '80'})
    assert done.stdout
    return done.stderr


@pytest.mark.parametrize('arguments', [['list'], ['show', 'condconv_resnet18'], ['--version'], []])
def test_reading_cards_needs_no_torch(arguments):
    loaded = _loaded(*arguments)
    assert ' moe_zoo.cards\n' in loaded
    assert ' torch\n' not in loaded and ' timm\n' not in loaded


def test_a_tool_finds_the_models_registered():
    loaded = _loaded('count-flops', '--help')
    assert ' moe_zoo.models\n' in loaded
