"""The wheel stands alone: built, installed elsewhere, and used with the checkout out of sight."""
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
pytest.importorskip('hatchling')

USE = """
import pathlib, tomllib, yaml
import timm
import moe_zoo
from moe_zoo.cards import card
from moe_zoo.resources import folder
site = pathlib.Path(moe_zoo.__file__).parent
entry = card('condconv_resnet50')
config = folder('configs') / entry['recipe']['config'].removeprefix('configs/')
assert site in folder('registry').parents and site in config.parents, 'data of the checkout, not of the wheel'
print(site, entry['cost']['parameters'], yaml.safe_load(config.read_text())['model'])
print(sum(p.numel() for p in timm.create_model('condconv_resnet50', device='meta').parameters()))
"""


@pytest.fixture(scope='module')
def built(tmp_path_factory, repository) -> Path:
    """The wheel, made with no network: hatchling is in the environment."""
    out = tmp_path_factory.mktemp('wheel')
    _run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', out, repository)
    wheel, = out.glob('*.whl')
    return wheel


@pytest.fixture(scope='module')
def site(tmp_path_factory, built) -> Path:
    """A folder of its own that the wheel is installed to."""
    site = tmp_path_factory.mktemp('site')
    _run(sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-index', '--target', site, built)
    return site


def _run(*command, cwd=None, env=None) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _elsewhere(site: Path, cwd: Path, *command) -> str:
    """Runs outside the checkout; PYTHONPATH comes before an editable install of the checkout."""
    return _run(*command, cwd=cwd, env=os.environ | {'PYTHONPATH': str(site)})


def test_the_wheel_reads_its_cards_and_configs_and_builds_models(site, tmp_path):
    where, parameters, model, counted = _elsewhere(site, tmp_path, sys.executable, '-c', USE).split()
    assert Path(where) == site / 'moe_zoo'
    assert (parameters, model, counted) == ('129872800', 'condconv_resnet50', '129872800')


def test_the_command_works_from_the_wheel(site, tmp_path, repository):
    command = [sys.executable, site / 'bin' / 'moe-zoo']
    out = _elsewhere(site, tmp_path, *command, 'list')
    assert len(out.splitlines()) == 1 + len(list((repository / 'registry').glob('*/*.toml')))
    out = _elsewhere(site, tmp_path, *command, 'cards', '--check', 'pmoe_cnn')
    assert out == '1 card: everything is as a count finds it.\n'


def test_the_wheel_holds_the_package_and_nothing_else(built, repository):
    names = set(zipfile.ZipFile(built).namelist())
    assert {name.partition('/')[0] for name in names} == {'moe_zoo', 'moe_zoo_cli.py', 'moe_zoo-0.1.0.dist-info'}
    data = [p for folder in ('registry', 'configs') for p in (repository / folder).rglob('*')]
    code = [p for p in (repository / 'moe_zoo').rglob('*') if p.suffix in {'.py', '.css', '.js'}]
    wanted = {f'moe_zoo/{p.relative_to(repository)}' for p in data if p.is_file() and '__pycache__' not in p.parts}
    wanted |= {str(p.relative_to(repository)) for p in code}
    assert wanted <= names
    assert 'moe_zoo-0.1.0.dist-info/licenses/LICENSE' in names


def test_a_wheel_of_the_source_distribution_is_the_same(built, tmp_path, repository):
    _run(sys.executable, '-m', 'hatchling', 'build', '-t', 'sdist', '-d', tmp_path, cwd=repository)
    source, = tmp_path.glob('*.tar.gz')
    _run(sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-w', tmp_path, source)
    again, = tmp_path.glob('*.whl')
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(built).namelist())
