"""Runs timm's own tests/test_models.py on our model names, as timm's maintainers would run it on theirs.

timm's sdist carries the file, its wheel does not; `tools/setup.sh` puts it into `.venv/share/timm/tests`. Two of its
lists are extended and nothing else is changed: `NON_STD_FILTERS` by our token and fusion name patterns,
`FEAT_INTER_FILTERS` by our module names. The file's tests are chosen by name and by what a model of that size can bear:
where `meta_only` names a model, the tests that run on meta tensors only.
"""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Dict, Iterable, List, Mapping, NamedTuple

# Token and fusion models have no grid of the usual kind, as timm's own vit_* and the like (its NON_STD_FILTERS).
NON_STD_FILTERS = ['vmoe_vit_*', 'softmoe_vit_*', 'fusion_*']
DOWNLOADS = ('test_model_load_pretrained', 'test_model_features_pretrained')  # wherever a name has weights on the hub
META_TESTS = ('test_model_default_cfgs', 'test_model_default_cfgs_non_std')
# The two marks between which timm defines both lists and first uses them.
_IMPORT = 'import timm\n'
_EXTEND = 'NUM_NON_STD = len(NON_STD_FILTERS)\n'


class Outcome(NamedTuple):
    """What became of one of timm's tests for one model: 'passed', 'failed' or 'skipped', and why."""
    test: str
    outcome: str
    reason: str


def timm_tests() -> Path:
    """timm's test_models.py, of the version that the package index has as sdist."""
    return Path(sys.prefix) / 'share' / 'timm' / 'tests' / 'test_models.py'


def extended_source(source: str, non_std: Iterable[str], modules: Iterable[str]) -> str:
    """timm's file with the two lists extended, and an import that registers our models.

    Raises:
        ValueError: The file is not shaped as timm 1.0.31's.
    """
    for mark in (_IMPORT, _EXTEND):
        if source.count(f'\n{mark}') != 1:
            raise ValueError(f'test_models.py has not exactly one line {mark.strip()!r}: not the file of timm 1.0.31')
    source = source.replace(f'\n{_IMPORT}', f'\n{_IMPORT}import moe_zoo\n')
    lists = f'NON_STD_FILTERS += {list(non_std)!r}\nFEAT_INTER_FILTERS += {list(modules)!r}\n'
    return source.replace(f'\n{_EXTEND}', f'\n{lists}{_EXTEND}')


def run(
        names: Iterable[str],
        modules: Iterable[str],
        folder: Path,
        meta_only: Iterable[str] = (),
        non_std: Iterable[str] = tuple(NON_STD_FILTERS),
        kwargs: Mapping[str, dict] = MappingProxyType({}),
) -> Dict[str, List[Outcome]]:
    """Run timm's tests on models, in a process of its own.

    Args:
        names: Registered model names.
        modules: Their module names, as `timm.list_modules` gives them.
        folder: Where the extended file and the report go.
        meta_only: Names too large for real tensors here.
        non_std: Name patterns for `NON_STD_FILTERS`.
        kwargs: Keywords that a name is built with, where the test gives no others: for models that are too large. The
            size of an image is then the built model's, not the one that is registered for the name.

    Returns:
        The outcomes by model name. A model that no test was found for has an empty list.
    """
    names = list(names)
    copy = folder / 'test_models.py'
    copy.write_text(extended_source(timm_tests().read_text(), non_std, modules))
    (folder / 'pytest.ini').write_text('[pytest]\n')  # this folder is the root: no settings of ours apply
    report = folder / 'report.json'
    here = Path(__file__).resolve().parent
    request = {'names': names, 'meta_only': list(meta_only), 'report': str(report), 'kwargs': dict(kwargs)}
    environment = dict(
        os.environ, MOE_ZOO_TIMM_HOST=json.dumps(request),
        PYTHONPATH=os.pathsep.join([str(here.parent), str(here), os.environ.get('PYTHONPATH', '')]))
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', str(copy), '-p', 'timm_host', '-p', 'no:cacheprovider', '-q', '-W', 'ignore'],
        cwd=folder, env=environment, capture_output=True, text=True)
    if not report.exists():
        raise RuntimeError(f"timm's tests did not run:\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}")
    found = json.loads(report.read_text())
    return {name: [Outcome(*each) for each in found.get(name, [])] for name in names}


# What follows is a pytest plugin, loaded into that process by `-p timm_host`.

_outcomes: Dict[str, List[Outcome]] = {}


def _request() -> dict:
    return json.loads(os.environ['MOE_ZOO_TIMM_HOST'])


def _model_name(item) -> str:
    """The model an item is for, without its tag; '' for tests that are not parametrised by model."""
    callspec = getattr(item, 'callspec', None)
    return str(callspec.params.get('model_name', '')).partition('.')[0] if callspec else ''


def pytest_configure():
    """timm's tests are parametrised by `timm.list_models`: with our names only, thousands are not collected."""
    import timm

    import moe_zoo  # noqa: F401 - registers the models
    everything, names = timm.list_models, set(_request()['names'])

    def list_models(*args, **kwargs):
        return [name for name in everything(*args, **kwargs) if name.partition('.')[0] in names]

    timm.list_models = list_models
    create_model, kwargs = timm.create_model, _request()['kwargs']

    def create_smaller(model_name, *args, **given):
        return create_model(model_name, *args, **{**kwargs.get(model_name, {}), **given})

    timm.create_model = create_smaller
    get_value = timm.get_pretrained_cfg_value

    def value_of_smaller(model_name, key):
        if model_name not in kwargs:
            return get_value(model_name, key)
        return create_smaller(model_name, device='meta').pretrained_cfg.get(key)

    timm.get_pretrained_cfg_value = value_of_smaller


def pytest_collection_modifyitems(items):
    request = _request()
    chosen = [
        item for item in items if _model_name(item) in request['names']
        and (_model_name(item) not in request['meta_only'] or item.originalname in META_TESTS)
        and item.originalname not in DOWNLOADS]
    for item in chosen:
        item.user_properties.append(('model', _model_name(item)))  # travels with the report
    items[:] = chosen


def pytest_runtest_setup(item):
    import torch
    torch.manual_seed(0)


def pytest_runtest_logreport(report):
    if report.when == 'call' or report.outcome != 'passed':
        test = report.nodeid.partition('::')[2].partition('[')[0]
        model = dict(report.user_properties)['model']
        reason = str(report.longrepr[2]) if report.outcome == 'skipped' else report.longreprtext[-3000:]
        _outcomes.setdefault(model, []).append(Outcome(test, report.outcome, reason))


def pytest_sessionfinish(session):
    Path(_request()['report']).write_text(json.dumps(_outcomes))
