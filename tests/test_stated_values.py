"""What the modules of the analyses state without being asked: constants, tables, and what arguments are by default.

A limit, a size or a default that moves changes what a page or a table says, and no case made by hand goes over all of
them. Each module is run anew here, and what it states is held to stated_values.json (kept_numbers.py says why).
"""
import ast
import importlib.util
import inspect
import pkgutil
import re
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
from kept_numbers import kept_names, moved

from moe_zoo import analysis

FILE = 'stated_values.json'
PLAIN = (bool, int, float, type(None), complex)


def _run(name: str) -> ModuleType:
    """The module once more, beside the imported one."""
    spec = importlib.util.find_spec(f'{analysis.__name__}.{name}')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _stated(name: str) -> dict:
    module = _run(name)
    names = []
    for node in ast.parse(Path(module.__file__).read_text(encoding='utf-8')).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        for target in getattr(node, 'targets', [getattr(node, 'target', node)]):
            names += [part.id for part in ast.walk(target) if isinstance(part, ast.Name)
                      and isinstance(part.ctx, ast.Store) and part.id in vars(module)]
    return {each: said for each in names if (said := _say(vars(module)[each])) != []}


def _say(value):
    """Numbers and short words in anything; [] where there are none."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, str):
        return value if len(value) < 60 else []
    if isinstance(value, re.Pattern):
        return [value.pattern, int(value.flags)]
    if isinstance(value, partial):
        return _say([value.args, value.keywords])
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    value = inspect.unwrap(value) if callable(value) else value
    if not (getattr(value, '__module__', None) or 'moe_zoo').startswith('moe_zoo'):
        return []
    if isinstance(value, FunctionType):
        parameters = inspect.signature(value).parameters
        return _say({key: each.default for key, each in parameters.items() if each.default is not each.empty})
    if isinstance(value, type):
        given = {key: getattr(value, '_field_defaults', {}).get(key, each) for key, each in vars(value).items()}
        return _say({key: each for key, each in given.items() if not key.startswith('__') or key == '__init__'})
    if isinstance(value, dict):
        return {str(key): said for key, each in value.items() if (said := _say(each)) != []} or []
    if isinstance(value, (list, tuple, set, frozenset)):
        return [said for each in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value)
                if (said := _say(each)) != []]
    return []


CASES = {module.name: partial(_stated, module.name) for module in pkgutil.iter_modules(analysis.__path__)}


@pytest.mark.parametrize('name', CASES)
def test_a_module_states_what_it_did(name):
    assert not moved(FILE, CASES, name)


def test_no_module_is_left_over():
    assert kept_names(FILE) == set(CASES)
