"""The scripts of set-up: what they say, what they refuse, and that what is there is used, not fetched again."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = ('setup.sh', 'test.sh', 'demo.sh')


def _run(script: Path, *arguments, cwd=None, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(script), *arguments], capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL,
        env=os.environ | environment)


@pytest.fixture
def checkout(tmp_path, repository) -> Path:
    """A copy of the checkout without git and without .venv, in a folder whose name has a space."""
    copy = tmp_path / 'a folder' / 'moe_zoo'
    skip = shutil.ignore_patterns('.git', '.venv', 'runs', '__pycache__', '.pytest_cache', '.ruff_cache')
    shutil.copytree(repository, copy, ignore=skip)
    return copy


def _python(path: Path, version: str) -> Path:
    """A Python of the given version, as far as set-up asks: it fails the check and says its version."""
    answers = f'*version_info*) exit 1;; *python_version*) echo Python {version};;'
    path.write_text(f'#!/bin/sh\ncase "$2" in {answers} esac\n')
    path.chmod(0o755)
    return path


@pytest.mark.parametrize('script', SCRIPTS[:2])
def test_help_says_what_the_script_does(repository, tmp_path, script):
    done = _run(repository / 'tools' / script, '--help', cwd=tmp_path)
    assert done.returncode == 0 and not done.stderr
    assert f'  tools/{script} [--' in done.stdout
    assert 'set -euo' not in done.stdout


def test_an_unknown_option_of_set_up_is_one_sentence(repository):
    done = _run(repository / 'tools' / 'setup.sh', '--detectron')
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == (
        "error: tools/setup.sh does not know '--detectron'; it takes --detection, --no-detection, --bench or --help.\n")


def test_an_old_python_is_refused_in_one_sentence(checkout):
    old = _python(checkout.parent / 'python', '3.9.2')
    done = _run(checkout / 'tools' / 'setup.sh', PYTHON=str(old))
    assert done.returncode == 2
    assert done.stderr == f'error: PYTHON={old} is Python 3.9.2; moe_zoo runs on 3.11, 3.12 and 3.13.\n'
    assert not (checkout / '.venv').exists()
    absent = _run(checkout / 'tools' / 'setup.sh', PYTHON=str(old.parent / 'absent'))
    assert absent.returncode == 2
    assert absent.stderr.endswith('absent is nothing that runs; moe_zoo runs on 3.11, 3.12 and 3.13.\n')


def test_without_a_python_that_will_do_it_says_how_to_name_one(checkout):
    folder = checkout.parent / 'bin'
    folder.mkdir()
    for name in ('bash', 'cat', 'cksum', 'dirname', 'readlink', 'sh'):
        (folder / name).symlink_to(shutil.which(name))
    _python(folder / 'python3', '3.10.1')
    done = _run(checkout / 'tools' / 'setup.sh', PATH=str(folder), PYTHON='')
    assert done.returncode == 2
    assert done.stderr == (
        'error: moe_zoo runs on Python 3.11, 3.12 and 3.13, but python3 here is Python 3.10.1; '
        'install one of them, or name it: PYTHON=/path/to/python3.12 tools/setup.sh\n')


@pytest.mark.slow
def test_set_up_uses_what_the_calling_python_has_and_finishes_what_was_interrupted(checkout, tmp_path):
    pytest.importorskip('hatchling')
    import torch
    offline = {'PYTHON': sys.executable, 'PIP_NO_INDEX': '1'}
    set_up, venv = checkout / 'tools' / 'setup.sh', checkout / '.venv'
    torn = _run(set_up, cwd=tmp_path, **offline)
    assert torn.returncode != 0  # no index: pip cannot fetch what builds the package
    assert f'Using the torch {torch.__version__.partition("+")[0]} that is already there.' in torn.stdout
    assert not (venv / 'moe_zoo_setup').exists()

    python = venv / 'bin' / 'python'
    # Python 3.11 puts its old setuptools into .venv, in front of the caller's, and torch wants a newer one.
    subprocess.run([python, '-m', 'pip', 'uninstall', '-y', '-q', 'setuptools'], check=True)
    # timm's tests come from its source distribution.
    timm_tests = Path(sys.prefix) / 'share' / 'timm'
    if not timm_tests.is_dir():
        pytest.skip(f'{timm_tests} is missing: tools/setup.sh has not run here')
    shutil.copytree(timm_tests, venv / 'share' / 'timm')
    # Without isolation nothing more has to be fetched, torch least of all (0 turns it off: pip's spelling, not ours).
    done = _run(set_up, cwd=tmp_path, PIP_NO_BUILD_ISOLATION='0', **offline)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Set-up finished in .venv: Python 3.' in done.stdout.splitlines()[-1]
    assert not list(venv.rglob('libtorch*'))
    show = [python, '-c', 'import moe_zoo.resources as r; print(r.__file__)']
    where = subprocess.run(show, capture_output=True, text=True, cwd=tmp_path, check=True).stdout
    assert Path(where.strip()) == checkout / 'moe_zoo' / 'resources.py'

    again = _run(set_up, cwd=tmp_path, **offline)
    assert again.stdout == 'Set-up: .venv is up to date, nothing to install.\n'

    layers = _run(set_up, '--bench', cwd=tmp_path, **offline)
    if 'are there, nothing to install' not in layers.stdout:  # the caller has not all of them, and there is no index
        assert layers.returncode == 2
        assert 'Downloading at most 2 MB for tools/benchmark.py: ' in layers.stdout
        assert layers.stderr.endswith('the benchmarks run without them, or run this again.\n')
