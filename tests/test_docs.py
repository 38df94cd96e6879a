"""The pages: every code block of README.md, CONTRIBUTING.md, CHANGELOG.md and docs/ runs, commands and links are good.

What a block may be, by its language:

- `python` is executed, the blocks of a page in order and in one namespace; those that name detectron2 or
  moe_zoo.detection in one of their own. A block whose first line is `# PATH`, such as `# moe_zoo/models/x.py`, is that
  file: modules are imported under that name, functions `test_*` of a file in tests/ are called.
- `text` right after a `python` block is what that block printed, to the letter.
- `sh`: one command a line. Commands that cost little are run on small data, the others are read by the tool's own
  parser and their recipe is loaded, with the placeholders (DIR, FILE, RUN ...) filled in. Commands in running text and
  in tables are checked alike.
- `toml` and `yaml` are parsed; a recipe is loaded.
- none: a drawing.
"""
import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, Iterator

import host_contract
import pytest
import timm
import torch
import yaml
from image_folders import write_images
from pages import REPOSITORY, Block, blocks_of, commands_of, find_pages, prose_of, read

from moe_zoo import cli
from moe_zoo.analysis import count
from moe_zoo.engine import config as engine_config
from moe_zoo.engine.train import train

LANGUAGES = ('python', 'text', 'sh', 'toml', 'yaml', '')
# Tools that take seconds on small data; the others train, time, write cards or need data that is not here.
CHEAP = ('list', 'show', 'count-flops', 'predict', 'eval-imagenet', 'analyze-experts', 'report', 'compare')
SLOW = re.compile(r'analyze.experts(\.py)? -|moe-zoo (report|compare) ')  # of these, those that take many
PLACEHOLDERS = {
    'NAME': 'condconv_resnet18', 'RECIPE': 'configs/digits/dyconv_resnet10.yaml', 'PREFIX': 'prefix', 'OUT': 'out',
    'OUT.safetensors': 'out.safetensors'}
TRAINED = dict(  # a V-MoE of two blocks, for two classes of 16 pixels
    model='vmoe_vit_s', img_size=16, batch_size=8, workers=0, opt='adamw', lr=1e-2, epochs=2, warmup_epochs=0,
    device='cpu', model_kwargs=dict(
        patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=4, representation_size=0))


PAGES = find_pages()
BLOCKS = [block for page in PAGES for block in blocks_of(page)]
NEW = {block.path: block for block in BLOCKS if block.path}  # files that a page tells its reader to write


# ---- what a page says in Python

@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder like the checkout, into which a page may write."""
    return _furnish(tmp_path, monkeypatch)


def _furnish(folder: Path, monkeypatch) -> Path:
    for name in ('README.md', 'docs', 'registry', 'tests', 'tools'):
        (folder / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / 'configs', folder / 'configs')
    for path in [path for path in NEW if path.startswith('configs/')]:
        (folder / path).write_text(NEW[path].text, encoding='utf-8')
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def registry_of_before() -> Iterator[None]:
    """timm forgets the models that a page registered, Python the modules."""
    from timm.models import _registry
    entrypoints = dict(_registry._model_entrypoints)
    yield
    for name in _registry._model_entrypoints.keys() - entrypoints.keys():
        _registry._clear_model_entries(name)
        del _registry._model_entrypoints[name]
    for path in NEW:
        sys.modules.pop(module_name(path), None)


def module_name(path: str) -> str:
    return path.removesuffix('.py').replace('/', '.')


def run_blocks(blocks: list[Block], folder: Path) -> dict[str, Any]:
    """Execute the Python blocks of a page; `text` behind one must be what it prints."""
    names: dict[str, Any] = {'__name__': 'page'}
    printed = ''
    for block in blocks:
        if block.language == 'python':
            with contextlib.redirect_stdout(io.StringIO()) as out:
                if block.path:
                    names[block.path] = _write_and_import(block, folder)
                else:
                    # as many empty lines in front as the page has: a traceback names the line of the page
                    exec(compile('\n' * (block.line - 1) + block.text, block.page, 'exec'), names)
            printed = out.getvalue()
        elif block.language == 'text':
            assert block.text == printed, f'{block.page}:{block.line} does not show what the block above prints'
    return names


def _write_and_import(block: Block, folder: Path) -> Any:
    path = folder / 'new' / block.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(block.text, encoding='utf-8')
    name = module_name(block.path)
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if name.startswith('tests.'):
        for each in [value for key, value in vars(module).items() if key.startswith('test_')]:
            each()
    return module


def _with_text(page: str, detection: bool) -> list[Block]:
    """The Python blocks of a page with the text behind each: those that name detectron2, or the others."""
    chosen, taken = [], False
    for block in blocks_of(page):
        if block.language == 'python':
            taken = bool(re.search(r'\bdetectron2\b|moe_zoo\.detection', block.text)) == detection
        if taken and block.language in ('python', 'text'):
            chosen.append(block)
    return chosen


def pages_with(detection: bool) -> list[str]:
    return [page for page in PAGES if _with_text(page, detection)]


@pytest.mark.parametrize('page', pages_with(detection=False))
def test_python_of_a_page_runs_in_order(page, place, registry_of_before):
    names = run_blocks(_with_text(page, detection=False), place)
    if page in CHECKS:
        CHECKS[page](names)


@pytest.mark.parametrize('page', pages_with(detection=True))
def test_python_of_a_page_with_detectron2_runs(page, place, registry_of_before, monkeypatch):
    pytest.importorskip('detectron2')
    from detectron2.config.defaults import _C
    monkeypatch.setitem(_C.MODEL, 'DEVICE', 'cpu')
    names = run_blocks(_with_text(page, detection=True), place)
    if page == 'README.md':
        assert type(names['detector']).__name__ == 'MoERetinaNet'


def check_readme(names: dict[str, Any]) -> None:
    assert [maps.shape for maps in names['maps']] == 3 * [(8, 128, 16, 16)]
    assert names['chosen'].shape == (100, 2)
    assert names['cost'].macs_max > 0 and names['loss'].requires_grad


# ---- the page that adds a model

ADD = 'docs/add-a-model.md'
ADDED = 'moe_se_resnet10'


def file_with(suffix: str) -> Block:
    found, = [block for block in NEW.values() if block.page == ADD and block.path.endswith(suffix)]
    return found


def check_added(names: dict[str, Any]) -> None:
    """The model of the page is one of timm's in every respect, and costs what its card says."""
    cost = count(timm.create_model(ADDED, device='meta'), torch.empty(1, 3, 224, 224, device='meta'))
    card = tomllib.loads(file_with('.toml').text)
    assert not cost.uncounted
    assert card['name'] == ADDED and f'/{card["family"]}/{ADDED}.toml' in file_with('.toml').path
    assert (card['cost']['parameters'], card['cost']['active_parameters'], card['cost']['macs']) == (
        cost.parameters, cost.active_parameters, cost.macs_max)
    twin = timm.create_model(card['twin'], device='meta', **card['twin_args'])
    assert sum(p.numel() for p in twin.parameters()) < cost.parameters
    assert yaml.safe_load(file_with('.yaml').text)['model'] == ADDED
    host_contract.check_host_contract(timm.create_model(ADDED, num_classes=5))


CHECKS = {'README.md': check_readme, ADD: check_added}


@pytest.mark.slow
def test_the_page_takes_a_checkout_to_a_passing_suite(tmp_path):
    """In a copy of the checkout, the files of the page and nothing else: timm's own tests, and ours of one model."""
    timm_host = pytest.importorskip('timm_host')
    if not timm_host.timm_tests().is_file():
        pytest.skip(f"{timm_host.timm_tests()} is missing: tools/setup.sh fetches timm's tests from its sdist")
    for name in ('moe_zoo', 'registry', 'configs', 'tests', 'docs'):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('README.md', 'pyproject.toml'):
        shutil.copy(REPOSITORY / name, tmp_path)
    for block in [block for block in NEW.values() if block.page == ADD]:
        path = tmp_path / block.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text, encoding='utf-8')
    models = tmp_path / 'moe_zoo' / 'models' / '__init__.py'
    models.write_text(models.read_text().replace('    moe_resnet,\n', '    moe_resnet,\n    moe_se_resnet,\n'))
    everything = (
        'import json, pathlib, sys; sys.path.insert(0, "tests"); import timm_host; '
        f'print(json.dumps(timm_host.run(["{ADDED}"], ["moe_se_resnet"], pathlib.Path(sys.argv[1]))))')
    (tmp_path / 'host').mkdir()
    found = json.loads(_python(tmp_path, '-c', everything, str(tmp_path / 'host')).splitlines()[-1])[ADDED]
    assert len(found) > 9 and not [each for each in found if each[1] != 'passed'], found
    _python(tmp_path, '-m', 'moe_zoo', 'cards', '--write', ADDED)
    assert (tmp_path / file_with('.toml').path).read_text() == file_with('.toml').text  # its figures were right
    ours = ['tests/test_cards.py', 'tests/test_architecture.py', 'tests/test_moe_se.py', 'tests/test_readme.py']
    _python(tmp_path, '-m', 'pytest', '-q', '-c', os.devnull, '--rootdir', '.', '-p', 'no:cacheprovider', *ours, '-k',
            f'{ADDED} or moe_se or every_model_has_a_card or readme')


def _python(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
        env=os.environ | {'PYTHONPATH': str(folder)})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


# ---- other blocks

def test_every_block_is_of_a_known_language():
    strange = [f'{block.page}:{block.line} {block.language}' for block in BLOCKS if block.language not in LANGUAGES]
    assert not strange, f'not one of {LANGUAGES}: {strange}'
    for page in PAGES:
        blocks = blocks_of(page)
        for before, block in zip([None, *blocks], blocks):
            shown = block.language != 'text' or (before is not None and before.language == 'python')
            assert shown, f'{page}:{block.line}: text that no python block in front of it prints'


def test_the_reader_of_blocks_knows_what_it_reads():
    page = 'a\n```sh\nmoe-zoo list  # all\n```\n- b\n  ```python\n  if 1:\n      2\n  ```\n```\n+--+\n```\n'
    assert blocks_of('p', page) == [
        Block('p', 3, 'sh', 'moe-zoo list  # all\n'), Block('p', 7, 'python', 'if 1:\n    2\n'),
        Block('p', 11, '', '+--+\n')]
    with pytest.raises(AssertionError, match='the block at line 2 does not end'):
        blocks_of('p', '```python\n1\n')
    assert Block('p', 1, 'python', '# moe_zoo/models/x.py\n').path == 'moe_zoo/models/x.py'
    with pytest.raises(AssertionError, match='p:1 does not show what the block above prints'):
        run_blocks([Block('p', 1, 'python', 'print(2)\n'), Block('p', 1, 'text', '3\n')], Path())


@pytest.mark.parametrize(
    'block', [block for block in BLOCKS if block.language in ('toml', 'yaml')], ids=lambda b: f'{b.page}:{b.line}')
def test_tables_and_recipes_are_read(block):
    if block.language == 'toml':
        assert tomllib.loads(block.text)
        return
    content = yaml.safe_load(block.text)
    if 'model' in content:
        engine_config.load_config(content)


# ---- commands

class Parsed(BaseException):
    """A command line was read without complaint; no tool takes it for an error of its own."""


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> dict[str, str]:
    """What the placeholders of commands stand for: two classes of noise, and two networks trained on them."""
    root = tmp_path_factory.mktemp('small')
    data, run = root / 'data', root / 'a'
    write_images(data, {'train': 8, 'validation': 4})
    for name, depth in (('a', 2), ('b', 3)):
        kwargs = {**TRAINED['model_kwargs'], 'depth': depth}
        train({**TRAINED, 'data_dir': str(data), 'model_kwargs': kwargs}, output=root / name, quiet=True)
    values = {
        **dict.fromkeys(('DIR', 'FOLDER', 'CIFAR10', 'BCCD'), data), 'IMAGE': data / 'validation' / 'dark' / '00.png',
        'RUN': run, 'RUN_A': run, 'RUN_B': root / 'b', **dict.fromkeys(('FILE', 'DENSE'), run / 'model_best.pth.tar'),
    }
    return PLACEHOLDERS | {key: str(value) for key, value in values.items()}


def fill(words: list[str], values: dict[str, str]) -> list[str]:
    """The words of a command with its placeholders filled in."""
    return [values.get(word.removesuffix('...'), word) for word in words]


def marked(command: str) -> Any:
    """A parameter of the test of one command; those that take seconds to run are slow."""
    return pytest.param(command, id=' '.join(command.split()), marks=pytest.mark.slow if SLOW.search(command) else ())


@pytest.mark.parametrize('command', [marked(c) for c in dict.fromkeys(c for page in PAGES for c in commands_of(page))])
def test_a_command_is_one(command, small, tmp_path, monkeypatch, capsys):
    _furnish(tmp_path, monkeypatch)
    words = shlex.split(command, comments=True)
    while re.match(r'[A-Z_]+=', words[0]):  # environment
        del words[0]
    if not {'NAME', 'COMMAND'} & set(words[1:2]):
        check(fill(words, small), monkeypatch)


def check(words: list[str], monkeypatch) -> None:
    """Fail where a command would be refused."""
    program, *arguments = words
    program = program.removeprefix('.venv/bin/')
    if program == 'python':
        program, *arguments = arguments
    if program == 'srun':
        check(arguments, monkeypatch)
    elif program == 'torchrun':
        from torch.distributed.run import get_args_parser
        launched = get_args_parser().parse_args(arguments)
        check([launched.training_script, *launched.training_script_args], monkeypatch)
    elif program == 'pip':
        check_pip(arguments)
    elif program.endswith('.sh'):
        check_script(REPOSITORY / program, arguments, monkeypatch)
    elif program.startswith('tools/'):
        assert (REPOSITORY / program).is_file(), f'there is no {program}'
        name = Path(program).stem.replace('_', '-')
        if name in cli.TOOLS:
            check_tool(name, arguments, monkeypatch)
        elif arguments not in ([], ['--help']):
            check_developers_tool(REPOSITORY / program, arguments, monkeypatch)
    elif program == 'moe-zoo':
        check_tool(arguments[0] if arguments else '--help', arguments[1:], monkeypatch)
    else:
        pytest.fail(f'what does {program!r} do in a page?')


def check_pip(arguments: list[str]) -> None:
    """pip reads the line, in a process of its own: importing it changes how others import distutils."""
    read = 'import sys\nfrom pip._internal.commands import create_command\n' \
           'print(*create_command(sys.argv[1]).parse_args(sys.argv[2:])[1], sep="\\n")'
    found = subprocess.run([sys.executable, '-c', read, *arguments], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    extras = tomllib.loads((REPOSITORY / 'pyproject.toml').read_text())['project']['optional-dependencies']
    for package in found.stdout.split('\n'):
        named = re.match(r'(?:moe_zoo|\.)\[([\w,]+)\]', package)
        assert not named or set(named[1].split(',')) <= set(extras), f'{package}: extras are {list(extras)}'


def check_script(script: Path, arguments: list[str], monkeypatch) -> None:
    """A shell script of ours: its flags are in its text, or those of the tool behind it."""
    assert os.access(script, os.X_OK), f'{script} is not there, or not executable'
    text = script.read_text()
    rest = [a for a in arguments if not (a.startswith('--') and re.search(rf'(?<![\w-]){re.escape(a)}(?![\w-])', text))]
    if script.name == 'demo.sh' and rest:
        check_tool('demo', rest, monkeypatch)
    elif script.name == 'test.sh':
        paths = [a for a in rest if a.startswith('tests/')]
        assert not [a for a in paths if a not in NEW and not (REPOSITORY / a).exists()]
        assert not [a for a in rest if a.startswith('-') and a not in ('-k', '-x')]
    elif script.name == 'gpu_check.sh':
        assert not [a for a in rest if not a.endswith('.json')]
    else:
        assert not rest, f'{script.name} does not know {rest}'


def check_developers_tool(script: Path, arguments: list[str], monkeypatch) -> None:
    """A script that no installed package has: its options are read."""
    monkeypatch.syspath_prepend(script.parent)
    main = runpy.run_path(str(script))['main']
    stop_after_reading(monkeypatch)
    with pytest.raises(Parsed):
        main(arguments)


def check_tool(name: str, arguments: list[str], monkeypatch) -> None:
    """A command of `moe-zoo`: mentioned, run, or read."""
    assert name in ('--help', '--version', *cli.OWN, *cli.TOOLS), f'moe-zoo has no command {name!r}'
    if not arguments and name not in cli.OWN or '...' in arguments:
        return  # the tool as such
    if cli.TOOLS.get(name, ('', '', ''))[2] == 'detection' or 'detector' in arguments or '--config-file' in arguments:
        pytest.importorskip('detectron2')
    if name == 'run':
        check_run(arguments)
    elif name in CHEAP and not {'--weights', '--config-file', '--record', '--times'} & set(arguments):
        assert cli.main([name, *arguments]) == 0
    else:
        stop_after_reading(monkeypatch)
        with pytest.raises(Parsed) as read:
            cli.main([name, *arguments])
        check_options(read.value.args[0])


def stop_after_reading(monkeypatch) -> None:
    """Every tool ends where its command line has been read; those with a recipe, where the recipe has been."""
    def stopping(original):
        def read(*args, **kwargs):
            raise Parsed(original(*args, **kwargs))
        return read

    for method in ('parse_args', 'parse_intermixed_args'):
        monkeypatch.setattr(argparse.ArgumentParser, method, stopping(getattr(argparse.ArgumentParser, method)))
    load_config = engine_config.load_config
    import moe_zoo.engine.compare
    import moe_zoo.engine.evaluate
    import moe_zoo.engine.inference
    for module in (moe_zoo.engine.compare, moe_zoo.engine.evaluate, moe_zoo.engine.inference):
        if getattr(module, 'load_config', None) is load_config:
            monkeypatch.setattr(module, 'load_config', stopping(load_config))


def check_options(found: argparse.Namespace) -> None:
    """What a parser leaves to its tool: names of models and experiments, configs of detectors and their keys."""
    for path in [getattr(found, 'config_file', None), *getattr(found, 'configs', ())]:
        if path:
            from moe_zoo.detection.config import load_config
            load_config(path, getattr(found, 'opts', ()) or ())
    if hasattr(found, 'pilot'):  # of reproduce
        from moe_zoo.reproduce.cli import FILES
        assert set(found.names) - {PLACEHOLDERS['NAME']} <= {*FILES, 'all'}
    if getattr(found, 'command', '') == 'model':
        assert all(map(timm.is_model, found.names))
    if isinstance(getattr(found, 'model', None), str):
        assert found.model == ADDED or timm.is_model(found.model)


def check_run(arguments: list[str]) -> None:
    """A script of timm or detectron2, which is not here: the options that it has."""
    script, *options = arguments
    if Path(script).name == 'train.py':
        names = [option.lstrip('-').replace('-', '_') for option in options if option.startswith('--')]
        assert names and set(names) <= {*engine_config.OPTIONS, *engine_config.LEFT_TO_TIMM}
    else:
        assert Path(script).name in ('train_net.py', 'lazyconfig_train_net.py', 'analyze_model.py')
        pytest.importorskip('detectron2')
        from detectron2.engine import default_argument_parser
        check_options(default_argument_parser().parse_args(options))


def test_a_command_that_would_be_refused_fails(small, tmp_path, monkeypatch):
    _furnish(tmp_path, monkeypatch)
    recipe = ['--config', 'configs/imagenet/vmoe_vit_s.yaml', '--data-dir', 'DIR']
    for words in (
            ['moe-zoo', 'train-imagenet', *recipe, '--twins'],
            ['moe-zoo', 'train-imagenet', *recipe, 'epoch=3'],
            ['moe-zoo', 'train-imagenet', '--config', 'configs/imagenet/vmoe_vit_x.yaml'],
            ['moe-zoo', 'benchmark', 'model', 'condconv_resnet50', '--fast'],
            ['moe-zoo', 'show', 'condconv_resnet5'],
            ['torchrun', '--nproc_per_nodes=8', 'tools/train_imagenet.py', *recipe],
            ['tools/mutation.py', '--samples=many'],
    ):
        with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
            check(fill(words, small), patched)
        assert stopped.value.code == 2, words
    for words in (['moe-zoo', 'lst'], ['tools/test.sh', '--most'], ['pip', 'install', '.[fast]'], ['make', 'docs'],
                  ['moe-zoo', 'run', 'train.py', '--modl', 'vmoe_vit_s'], ['moe-zoo', 'reproduce', 'condcon']):
        with monkeypatch.context() as patched, pytest.raises((AssertionError, pytest.fail.Exception)):
            check(fill(words, small), patched)


# ---- files and links

@pytest.mark.parametrize('page', PAGES)
def test_every_file_and_link_of_a_page_is_there(page):
    text = read(page)
    new = {block.path for block in blocks_of(page) if block.path}
    paths = set(re.findall(r'(?<![\w/.-])((?:tools|configs|tests|registry|docs|moe_zoo)/[\w./-]*\w)', text)) - new
    gone = [p for p in paths if not (REPOSITORY / p).exists() and not re.search('NAME|FAMILY|PAGE', p)]
    assert not gone, f'{page} names files that are not there: {gone}'
    links = re.findall(r'\]\(([^)\s]+)\)|(?:src|href)="([^"]+)"', prose_of(page))
    for link in filter(None, sum(links, ())):
        if not re.match(r'[a-z]+:', link):
            target, _, anchor = link.partition('#')
            target = (REPOSITORY / page).parent / target if target else REPOSITORY / page
            assert target.exists(), f'{page} links to {link}'
            assert not anchor or anchor in anchors(target), f'{page} links to {link}: there is no such heading'


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    headings = re.findall(r'^#+ (.+)$', path.read_text(encoding='utf-8'), re.M)
    return {re.sub(r'[^\w\- ]', '', heading.replace('`', '').lower()).replace(' ', '-') for heading in headings}


def test_every_page_can_be_reached():
    linked = {(REPOSITORY / page).parent.joinpath(link.partition('#')[0]).resolve()
              for page in PAGES for link in re.findall(r'\]\(([^)\s:]+\.md(?:#[\w-]*)?)\)', read(page))}
    lost = [page for page in PAGES if page != 'README.md' and (REPOSITORY / page).resolve() not in linked]
    assert not lost, f'no page links to {lost}'
