"""The command `moe-zoo`: its tables, its doors, its sentences for what it cannot do."""
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_zoo import __version__, cli
from moe_zoo.card_tables import COLUMNS
from moe_zoo.cards import cards

NO_MODEL = "error: There is no model 'zzz' in moe_zoo. `moe-zoo list` shows all names.\n"
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


def test_list_prints_every_model_by_family_and_size(capsys):
    assert cli.main(['list']) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ['model', 'parameters', 'active', 'MACs', 'summary']
    names = [row.split()[0] for row in rows]
    known = cards()
    assert sorted(names) == sorted(known)
    order = [(known[name]['family'], known[name]['cost']['parameters']) for name in names]
    assert order == sorted(order)


@pytest.mark.parametrize('columns, most', [('', 100), ('80', 80), ('140', 140), ('60', 73)])
def test_a_table_fits_the_terminal_or_100_columns(capsys, monkeypatch, columns, most):
    monkeypatch.setenv('COLUMNS', columns)
    monkeypatch.setattr(sys, '__stdout__', None)  # no terminal
    cli.main(['list'])
    rows = capsys.readouterr().out.splitlines()
    assert most - 6 <= max(map(len, rows)) <= most  # figures and 12 letters of a summary are never cut
    cli.main(['list', '--columns', 'model,family,MACs,twin,paper'])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= max(most, 29 + 8 + 7 + 2 * 12 + 4 * 2)


def test_columns_are_chosen(capsys):
    cli.main(['list', 'moe_resnet18_cifar', '--columns', 'model, pixels,macs,TWIN'])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ['model', 'pixels', 'MACs', 'twin']
    assert row.split(maxsplit=4) == ['moe_resnet18_cifar', '32', '552', 'M', 'moe_resnet18_cifar(stages=[])']
    cli.main(['list', 'pmoe_cnn_dense', '--columns=twin'])
    assert capsys.readouterr().out.splitlines() == ['twin', '-']


def test_list_as_json_has_every_column_and_figures_in_full(capsys):
    cli.main(['list', 'condconv_resnet50', '--json'])
    entry, = json.loads(capsys.readouterr().out)
    assert entry.keys() == {name.lower() for name in COLUMNS}
    assert (entry['model'], entry['parameters'], entry['macs']) == ('condconv_resnet50', 129872800, 4208394048)
    cli.main(['list', 'condconv_resnet50', '--json', '--columns', 'MACs'])
    assert json.loads(capsys.readouterr().out) == [{'macs': 4208394048}]


def test_list_shortens_figures(capsys):
    cli.main(['list', 'condconv_resnet50'])
    row = capsys.readouterr().out.splitlines()[1]
    assert re.match(r'condconv_resnet50 +130 M +130 M +4\.21 G  \S', row)  # 129,872,800 and 4,208,394,048


@pytest.mark.parametrize('pattern, expected', [
    ('resnet', {'condconv_resnet18', 'condconv_resnet34', 'condconv_resnet50'}),
    ('vmoe_*', {'vmoe_vit_s', 'vmoe_vit_b', 'vmoe_vit_l', 'vmoe_vit_h'}),
    ('condconv_resnet?8', {'condconv_resnet18'}),
    ('vmoe', {'vmoe_vit_s', 'softmoe_vit_s'}),  # of the family, too
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


def test_show_prints_the_bibliography_entry_or_the_whole_card(capsys):
    cli.main(['show', 'vmoe_vit_s', '--bibtex'])
    out = capsys.readouterr().out
    assert out.startswith('@inproceedings{riquelme2021scaling,\n') and out.endswith('\n}\n')
    cli.main(['show', 'vmoe_vit_s', '--json'])
    assert json.loads(capsys.readouterr().out) == cards()['vmoe_vit_s']


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
    (['list', 'vmeo'], "No model of moe_zoo matches 'vmeo'. Did you mean 'vmoe'?"),
    (['list', 'a', 'b'], 'moe-zoo list: unrecognized arguments: b; `moe-zoo list --help` says how it is used.'),
    (['list', '--columns', 'model,parameter'],
     "--columns: there is no column 'parameter'. Did you mean 'parameters'?"),
    (['list', '--columns', 'macs,'], "--columns: there is no column ''. There are model, family, pixels, parameters, "
     'active, MACs, summary, twin, year, paper, recipe, published, measured.'),
    (['show'], 'moe-zoo show: the following arguments are required: NAME; `moe-zoo show --help` says how it is used.'),
    (['show', 'vmoe_vit_s', '--bibtex', '--json'], 'moe-zoo show: argument --json: not allowed with argument --bibtex; '
     '`moe-zoo show --help` says how it is used.'),
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
def test_reading_cards_imports_text_readers_alone(arguments):
    loaded = set(re.findall(r'| +([\w.]+)$', _loaded(*arguments), re.M))
    assert 'moe_zoo_cli.cards' in loaded and 'moe_zoo' not in loaded
    assert not loaded & {'torch', 'timm', 'numpy', 'rich', 'yaml'}


@pytest.mark.slow
def test_the_command_and_the_module_are_one(repository):
    """`python -m moe_zoo` imports the package, the installed command does not: they print the same."""
    here = {'cwd': repository, 'capture_output': True, 'text': True, 'check': True}
    code = "import sys, moe_zoo_cli; sys.argv = ['moe-zoo', 'list', 'vmoe']; sys.exit(moe_zoo_cli.main())"
    outputs = [subprocess.run([sys.executable, *arguments], **here).stdout for arguments in (
        ['-c', code], ['-m', 'moe_zoo', 'list', 'vmoe'])]
    assert outputs[0] == outputs[1] and outputs[0].startswith('model ')


def test_a_reader_that_leaves_early_is_no_error(repository):
    """`moe-zoo list | head -1`"""
    code = "import sys, moe_zoo_cli; sys.argv = ['moe-zoo', 'list', '--json']; sys.exit(moe_zoo_cli.main())"
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    process = subprocess.Popen([sys.executable, '-c', code], cwd=repository, **pipes)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b'', 141)  # 128 + SIGPIPE


def test_an_error_of_the_installed_command_is_one_sentence_also_of_a_tool(repository):
    code = "import sys, moe_zoo_cli; sys.argv = ['moe-zoo', *sys.argv[1:]]; sys.exit(moe_zoo_cli.main())"
    for arguments, message in (
            (['show', 'zzz'], NO_MODEL),
            (['cards', '--check', 'zzz'], NO_MODEL)):
        done = subprocess.run([sys.executable, '-c', code, *arguments], cwd=repository, capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (2, '', message)
