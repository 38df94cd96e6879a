"""timm 1.0.31's own tests/test_models.py on every model of this package (see timm_host.py for how it is run).

Fast: everything for the smallest model, and for every name what runs on the meta device (head, pooling, device and
dtype at every level, unknown keywords, weight decay and parameter groups). Slow: everything for every name that fits.
"""
import functools
import tempfile
from pathlib import Path

import pytest
import timm
import timm_host

import moe_zoo  # noqa: F401 - registers the models

ENTRYPOINTS = {
    name: timm.models.model_entrypoint(name).__module__ for name in timm.list_models()
    if timm.models.model_entrypoint(name).__module__.startswith('moe_zoo.')}
NAMES = tuple(sorted(ENTRYPOINTS))
MODULES = sorted({module.rpartition('.')[2] for module in ENTRYPOINTS.values()})
SMALLEST = 'condconv_mobilenetv1_025'
# Beyond this many parameters on the meta device only: a backward pass through FX alone then takes 7 GB and minutes.
LARGEST = 200e6

# What makes a larger model small enough for everything.
SMALLER = {'softmoe_vit_s': {'num_experts': 4}}

# timm's tests of one model. Token and fusion models have their own test of the configuration, and no features_only
# through a list of stages.
EVERY = {
    'test_model_forward', 'test_model_backward', 'test_model_forward_torchscript',
    'test_model_forward_intermediates_features', 'test_model_forward_intermediates',
    'test_prune_intermediate_layers_contract', 'test_model_forward_fx', 'test_model_backward_fx',
    'test_model_forward_fx_torchscript',
}
GRID = EVERY | {'test_model_default_cfgs', 'test_model_forward_features'}
TOKENS = EVERY | {'test_model_default_cfgs_non_std'}
# Tests that timm itself skips for a name, and why.
SKIPPED: dict[str, dict[str, str]] = {}

needs_timm_tests = pytest.mark.skipif(
    not timm_host.timm_tests().is_file(),
    reason=f"{timm_host.timm_tests()} is missing: tools/setup.sh fetches timm's tests from its sdist")


def is_large(name: str) -> bool:
    model = timm.create_model(name, device='meta', **SMALLER.get(name, {}))
    return sum(p.numel() for p in model.parameters()) > LARGEST


@functools.cache
def outcomes(names: tuple[str, ...], meta_only: tuple[str, ...] = ()) -> dict[str, list[timm_host.Outcome]]:
    """Of one process for all the names together: what takes long is to import and to collect."""
    smaller = {name: kwargs for name, kwargs in SMALLER.items() if name not in meta_only}
    with tempfile.TemporaryDirectory() as folder:
        return timm_host.run(names, MODULES, Path(folder), meta_only, kwargs=smaller)


def asked_for(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """The models that a test was selected for: all of them, or those of `-k NAME`."""
    items = [item for item in request.session.items if item.originalname == request.node.originalname]
    return tuple(sorted({item.callspec.params['name'] for item in items}))


def check(name: str, found: list[timm_host.Outcome], expected: set[str]) -> None:
    failed = [f'{o.test}: {o.reason}' for o in found if o.outcome == 'failed']
    assert not failed, '\n\n'.join(failed)
    assert {o.test: o.reason for o in found if o.outcome == 'skipped'} == SKIPPED.get(name, {})
    assert {o.test for o in found} == expected


def expected_tests(name: str, meta: bool) -> set[str]:
    tokens = any(Path(name).match(pattern) for pattern in timm_host.NON_STD_FILTERS)
    tests = TOKENS if tokens else GRID
    return tests & set(timm_host.META_TESTS) if meta else tests


@needs_timm_tests
@pytest.mark.parametrize('name', NAMES)
def test_on_the_meta_device_and_the_smallest_everywhere(name, request):
    names = asked_for(request)
    meta_only = tuple(each for each in names if each != SMALLEST)
    check(name, outcomes(names, meta_only)[name], expected_tests(name, meta=name in meta_only))


@needs_timm_tests
@pytest.mark.slow
@pytest.mark.parametrize('name', [name for name in NAMES if name != SMALLEST])
def test_every_model(name, request):
    if is_large(name):
        pytest.skip(f'more than {LARGEST:.0f} parameters: on the meta device only')
    rest = tuple(each for each in asked_for(request) if not is_large(each))
    check(name, outcomes(rest)[name], expected_tests(name, meta=False))


def test_a_failure_a_skip_and_a_test_that_did_not_run_are_told():
    passed = [timm_host.Outcome(test, 'passed', '') for test in GRID]
    check(SMALLEST, passed, GRID)
    with pytest.raises(AssertionError):
        check(SMALLEST, passed[1:], GRID)
    for outcome, message in (('failed', 'test_model_forward: no gradient'), ('skipped', 'no gradient')):
        other = timm_host.Outcome('test_model_forward', outcome, 'no gradient')
        with pytest.raises(AssertionError, match=message):
            check(SMALLEST, [o for o in passed if o.test != other.test] + [other], GRID)


@needs_timm_tests
def test_two_lists_are_extended_and_nothing_else():
    source = timm_host.timm_tests().read_text()
    ours = timm_host.extended_source(source, ['a_*'], ['b']).splitlines()
    added = [line for line in ours if line not in source.splitlines()]
    assert added == ['import moe_zoo', "NON_STD_FILTERS += ['a_*']", "FEAT_INTER_FILTERS += ['b']"]
    for line in added:
        ours.remove(line)
    assert ours == source.splitlines()
    with pytest.raises(ValueError, match='not the file of timm 1.0.31'):
        timm_host.extended_source('import timm\n', [], [])


def test_model_files_have_names_of_their_own():
    # timm groups models by the last part of the module's name: ours must not join one of its groups.
    theirs = {path.stem for path in Path(timm.models.__file__).parent.glob('*.py')}
    assert not theirs & set(MODULES)
