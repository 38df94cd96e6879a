"""The shape of the house: who imports whom, what `import moe_zoo` loads, which names are free."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / 'moe_zoo'
CORE = {'errors', 'routing', 'losses', 'layers', 'checkpoints'}

# part of moe_zoo -> the other parts it may import; parts that are not here are doors and may import everything
MAY_IMPORT = {
    'errors': set(),
    'resources': set(),
    'documents': set(),
    'version': set(),
    'faults': {'errors'},
    'cards': {'errors', 'resources'},
    'card_tables': {'errors', 'cards'},
    'card_writer': {'errors', 'cards', 'card_tables'},
    'routing': {'errors'},
    'losses': {'errors', 'routing'},
    'layers': {'errors', 'routing', 'losses'},
    'checkpoints': {'errors', 'routing', 'losses', 'layers'},
    'models': CORE,
    'data': {'errors', 'resources', 'documents'},
    'analysis': {'errors', 'routing', 'losses', 'layers', 'data', 'resources', 'documents', 'cards', 'version'},
    'engine': CORE | {'faults', 'models', 'analysis', 'data', 'resources', 'documents', 'cards', 'card_writer'},
    'detection': CORE | {'faults', 'models', 'analysis', 'data', 'resources', 'documents', 'cards'},
    '__init__': {'models', 'version'},
}
DOORS = {'cli', '__main__', 'run', 'demo', 'reproduce'}
# packages that only the named parts may import; a part that is missing here may import none of them
THIRD_PARTY = {
    'errors': set(),
    'resources': set(),
    'documents': {'yaml'},
    'cards': set(),
    'version': set(),
    'card_tables': set(),
    'card_writer': set(),
    'faults': {'torch'},
    'routing': {'torch'},
    'losses': {'torch'},
    'layers': {'torch', 'timm'},
    'checkpoints': {'torch', 'timm', 'numpy', 'safetensors'},
    'models': {'torch', 'timm', 'numpy'},
}


def _files():
    return sorted(PACKAGE.rglob('*.py'))


def _part(path: Path) -> str:
    """`moe_zoo/layers/moe_mlp.py` -> `layers`; a command line inside a package (`*_cli.py`) is a door."""
    if path.stem.endswith('_cli'):
        return 'cli'
    return path.relative_to(PACKAGE).with_suffix('').parts[0]


def _imports(path: Path) -> list[tuple[str, ...]]:
    """Every import of a file, also those inside functions, as absolute dotted names split at the dots."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.split('.')) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else ()
            module = base + tuple(node.module.split('.') if node.module else ())
            # `from moe_zoo import layers` and `from .. import layers` name the part after `import`
            found += [module + (alias.name,) for alias in node.names] if len(module) == 1 else [module]
    return found


def _parse(text: str, at: str, tmp_path: Path, monkeypatch) -> list[tuple[str, ...]]:
    monkeypatch.setattr(sys.modules[__name__], 'ROOT', tmp_path)
    path = tmp_path / at
    path.parent.mkdir(parents=True)
    path.write_text(text)
    return _imports(path)


def test_the_import_reader_resolves_every_spelling(tmp_path, monkeypatch):
    lines = ['import a.b', 'from . import x', 'from ..routing import Routing', 'from .. import cards',
             'from moe_zoo import models']
    text = '\n'.join(lines)
    assert _parse(text, 'moe_zoo/layers/conv.py', tmp_path, monkeypatch) == [
        ('a', 'b'), ('moe_zoo', 'layers'), ('moe_zoo', 'routing'), ('moe_zoo', 'cards'), ('moe_zoo', 'models')]


@pytest.mark.parametrize('path', _files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    part = _part(path)
    assert part in MAY_IMPORT or part in DOORS, f'say in MAY_IMPORT what {part} may import'
    if part in DOORS:
        return
    ours = {name[1:2] for name in _imports(path) if name[0] == 'moe_zoo'}
    whole = () in ours  # `import moe_zoo` needs the models registered: not a matter of the layers below them
    assert not whole or part in {'engine', 'detection'}, f'{part} imports the whole package'
    others = {name[0] for name in ours if name} - {part, '__version__'}
    assert others <= MAY_IMPORT[part], f'{part} must not import {sorted(others - MAY_IMPORT[part])}'


@pytest.mark.parametrize('path', _files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_third_party_imports_stay_where_they_belong(path):
    part = _part(path)
    foreign = {name[0] for name in _imports(path)} - {'moe_zoo'} - set(sys.stdlib_module_names)
    if part in THIRD_PARTY:
        assert foreign <= THIRD_PARTY[part]
    if part != 'detection':
        assert 'detectron2' not in foreign, 'detection/ is the only package that imports detectron2'
    assert not foreign & {'tools', 'tests', 'registry', 'configs'}, 'folders of the checkout are not in the wheel'


@pytest.mark.parametrize('path', _files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_file_says_what_lives_there(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding='utf-8')))


def _modules_after(code: str) -> set[str]:
    text = f'{code}\nimport json, sys\nprint(json.dumps(sorted({{m.partition(".")[0] for m in sys.modules}})))'
    done = subprocess.run([sys.executable, '-c', text], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_import_moe_zoo_stays_light():
    loaded = _modules_after('import moe_zoo')
    assert 'timm' in loaded  # it registers the models
    unwanted = {'detectron2', 'fvcore', 'matplotlib', 'pycocotools', 'rich', 'sklearn', 'tensorboard', 'cv2'}
    assert not loaded & unwanted


def test_model_files_do_not_carry_names_of_timm():
    import timm  # names of timm's own modules, without ours: timm groups models by the last part of the module name
    theirs = {path.stem for path in (Path(timm.__file__).parent / 'models').glob('*.py')}
    ours = {path.stem for path in (PACKAGE / 'models').glob('*.py')} - {'__init__'}
    assert not ours & theirs


def test_nothing_names_a_machine_or_a_package_index():
    places = '|'.join(['root', 'home', 'work', 'opt', 'tmp', 'Users'])
    forbidden = re.compile(rf'(?<![\w.}}])/({places})/|pypi\.' + r'org|python' + r'hosted|npm' + r'js')
    kinds = {'.py', '.sh', '.toml', '.yaml', '.md', '.css', ''}
    folders = [ROOT / name for name in ('moe_zoo', 'registry', 'configs', 'docs', 'tools', 'tests', '.ci')]
    files = [p for folder in folders for p in folder.rglob('*') if p.is_file() and p.suffix in kinds]
    files += [ROOT / name for name in ('README.md', 'pyproject.toml', '.gitignore')]
    found = [
        f'{path.relative_to(ROOT)}:{number}: {line.strip()}'
        for path in files for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1)
        if forbidden.search(line)
    ]
    assert not found, '\n'.join(found)
