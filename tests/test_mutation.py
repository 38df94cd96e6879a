"""The faults that tools/mutation.py puts in, the sample that it draws, and a package of four lines put through it."""
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / 'tools'


@pytest.fixture(scope='module')
def mutants():
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module('mutants')
    sys.path.remove(str(TOOLS))


@pytest.fixture(scope='module')
def mutation(mutants):
    return importlib.import_module('mutation')


def _changes(mutants, source: str, **defaults) -> list[str]:
    """`kind: line as it becomes` of every mutant of a text."""
    return [f'{m.kind}: {m.after}' for m in mutants.find_mutants('a.py', source, defaults)]


@pytest.mark.parametrize('source, expected', [
    ('a < b', ['comparison: a <= b']),
    ('a is not  None', ['comparison: a is  None']),
    ('(a) not in (b)', ['comparison: (a) in (b)']),
    ('a <= b < c', ['comparison: a < b < c', 'comparison: a <= b <= c']),
    ('a and b or not c', ['logic: a and b and not c', 'logic: a or b or not c', 'logic: a and b or c']),
    ('a * (b - c)', ['arithmetic: a / (b - c)', 'term: a', 'arithmetic: a * (b + c)', 'term: a * (b)']),
    ('d - (a - b) * c', ['arithmetic: d + (a - b) * c', 'term: d', 'arithmetic: d - (a - b) / c', 'term: d - (a - b)',
                         'arithmetic: d - (a + b) * c', 'term: d - (a) * c']),
    ('mask & ~other', ['logic: mask | ~other', 'sign: mask & other']),
    ('f(-x, 0.5, -1, True)', ['statement: pass', 'sign: f(x, 0.5, -1, True)', 'constant: f(-x, 1.5, -1, True)',
                              'constant: f(-x, 0.5, 0, True)', 'constant: f(-x, 0.5, -1, False)']),
    ('y = 1e9 + x', ['arithmetic: y = 1e9 - x', 'term: y = 1e9', 'constant: y = 2000000000.0 + x']),
    ('y = x.sum(-1)', ['axis: y = x.sum(-2)']),
    ('y = x.sum(dim=1, keepdim=True)', ['axis: y = x.sum(dim=0, keepdim=True)', 'keyword: y = x.sum(dim=1)',
                                        'constant: y = x.sum(dim=1, keepdim=False)']),
    ('y = x.transpose(1, 2)', ['axis: y = x']),
    ('y = x.permute(0, 2, 1)', ['axis: y = x.permute(0, 1, 2)']),
    ('y = min(a, key=len)', ['function: y = max(a, key=len)', 'keyword: y = min(a)']),
    ('x[i] = y', ['statement: pass']),
    ('x += y', ['statement: pass', 'arithmetic: x -= y']),
])
def test_every_kind_of_fault(mutants, source, expected):
    assert _changes(mutants, source) == expected


@pytest.mark.parametrize('source', [
    '"""1 < 2"""', 'a: Tuple[int, 2]', '__all__ = [1]', 'raise InputError(1 + 2)', "f'{a + 1}'", 'print(1)',
    'warnings.warn(1 < 2)', "a + 'text'", "'%s' % a", 'import a', 'from . import b',
    'if TYPE_CHECKING:\n    a = 1', 'def extra_repr(self):\n    return 1', '@data(frozen=True)\nclass A:\n    pass',
    'def f(a: Tuple[2]) -> 3:\n    pass'])
def test_what_only_a_reader_sees_stays(mutants, source):
    assert _changes(mutants, source) == []


def test_the_help_of_an_option_stays(mutants):
    assert _changes(mutants, "p = add('--n', help=1, metavar=2, type=int)") == []


def test_a_keyword_goes_only_where_a_default_exists(mutants):
    source = 'def f(a, b, *, c=None):\n    pass\n\n\nclass A:\n    d: int = G\n    e: int'
    defaults = mutants.collect_defaults([source])
    assert defaults == {'f': {'c'}, 'A': {'d'}}
    calls = 'y = f(1, b=x, c=x)\nz = A(d=x, e=x)'
    changes = [m.after for m in mutants.find_mutants('a.py', calls, defaults) if m.kind == 'keyword']
    assert changes == ['y = f(1, b=x)', 'z = A(e=x)']


def test_where_a_fault_stands_and_what_reaches_it(mutants):
    source = ('N = 1\n\n\nclass A:\n    def f(self, n=2):\n        if n > K:\n            return n\n'
              '        return (\n            n +\n            m)\n')
    found = {(m.kind, m.where, m.line, m.first, m.last) for m in mutants.find_mutants('a.py', source, {})}
    assert found == {
        ('constant', '', 1, 1, 10),  # the whole file imports it
        ('constant', 'A.f', 5, 6, 10),  # a default is used where the body runs
        ('comparison', 'A.f', 6, 6, 6),  # of an `if` the head only
        ('arithmetic', 'A.f', 9, 8, 10), ('term', 'A.f', 9, 8, 10)}


def test_a_mutant_keeps_its_name_where_the_file_grows(mutants):
    function = 'def f(a):\n    return a < 1 or a < 1\n'
    names = [m.key for m in mutants.find_mutants('a.py', function, {})]
    assert len(set(names)) == len(names) == 5  # two <, one or, two constants
    assert [m.key for m in mutants.find_mutants('a.py', 'B = C\n' + function, {})] == names


def test_letters_of_more_than_one_byte(mutants):
    assert _changes(mutants, "x = 'ä', a < b") == ["comparison: x = 'ä', a <= b"]


def test_a_sample_takes_every_file_by_its_share(mutation, mutants):
    def of(path, count):
        return [mutants.Mutant(path, 'term', '', i, i, i, 0, 0, '', str(i), '') for i in range(count)]
    everything = of('a.py', 60) + of('b.py', 30) + of('c.py', 10)
    drawn = mutation.sample(everything, 10, seed=0)
    assert [sum(m.path == path for m in drawn) for path in ('a.py', 'b.py', 'c.py')] == [6, 3, 1]
    assert set(drawn) < set(mutation.sample(everything, 20, seed=0))  # 12, 6, 2: more of the same
    assert set(drawn) != set(mutation.sample(everything, 10, seed=1))
    assert len(mutation.sample(everything, None, seed=0)) == 100


def test_the_interval_of_a_share(mutation):
    # Wilson: (p + z²/2n ± z √(p(1-p)/n + z²/4n²)) / (1 + z²/n), z = 1.96. For 50 of 100, z²/n = 0.038416:
    # (0.519208 ± 1.96 √(0.0025 + 0.00009604)) / 1.038416 = (0.519208 ± 0.099864) / 1.038416
    assert mutation.interval(50, 100) == pytest.approx((40.383, 59.617), abs=1e-3)
    low, high = mutation.interval(10, 10)
    assert 72 < low < 73 and high == pytest.approx(100)


SOURCE = """
def share(part, whole):
    return part / whole


def least(a):
    return min(a, 3)


def alone(n):
    return n + 1
"""
TESTS = """
from moe_zoo.losses.share import least, share


def test_share():
    assert share(2, 4) == .5


def test_least():
    assert least(3) == 3
"""


@pytest.mark.slow
def test_a_package_of_four_lines(tmp_path):
    for path, text in {'moe_zoo/__init__.py': '', 'moe_zoo/losses/__init__.py': '', 'moe_zoo/losses/share.py': SOURCE,
                       'tests/test_share.py': TESTS, '.gitignore': 'runs/\n'}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    (tmp_path / 'tools').mkdir()
    for name in ('mutation.py', 'mutants.py'):
        shutil.copy(TOOLS / name, tmp_path / 'tools')
    git = ['git', '-C', str(tmp_path), '-c', 'user.name=n', '-c', 'user.email=e']
    for words in (['init', '-q'], ['add', '.'], ['commit', '-q', '-m', 'first']):
        subprocess.run([*git, *words], check=True)

    def run(*options):
        done = subprocess.run([sys.executable, 'tools/mutation.py', *options], cwd=tmp_path, capture_output=True,
                              text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    # / to * and part alone die; min to max and 3 to 4 keep least(3) at 3; +, + 1 and 1 are in a function without tests
    assert '2 of 7 mutants were noticed: 28.6 %. Of the other 5, 0 are explained.' in run('--all', '--workers', '2')
    kept, = tmp_path.glob('runs/mutation/*/results.jsonl')
    entries = [json.loads(line) for line in kept.read_text().splitlines()]
    killed = {entry['after']: entry['by'] for entry in entries if entry.get('result') == 'killed'}
    assert killed == dict.fromkeys(['return part * whole', 'return part'], 'tests/test_share.py::test_share')
    assert {'key': 'sound tests/test_share.py::test_share', 'passed': True} in entries
    assert '0 mutants to run, 7 known' in run('--all')  # it goes on where it stopped

    with (tmp_path / 'tests' / 'test_share.py').open('a') as file:
        file.write('\n\ndef test_more():\n    assert least(5) == 3\n')
    (tmp_path / 'tools' / 'mutation.toml').write_text(
        '[[explained]]\nfile = "moe_zoo/losses/share.py"\nbefore = "return n + 1"\nafter = "return n"\nwhy = "W."\n')
    subprocess.run([*git, 'commit', '-q', '-a', '-m', 'a test'], check=True)
    assert '4 of 7 mutants were noticed' in run('--again')
    told = run('--report')
    assert '| losses/share.py | 7 | 7 | 4 | 0 | 0 | 3 | 57 % |' in told
    assert '  - return n + 1\n  + return n\n  = W.' in told and 'Of the other 3, 1 are explained.' in told
    assert subprocess.run([*git, 'status', '--short', 'moe_zoo'], capture_output=True, text=True).stdout == ''
