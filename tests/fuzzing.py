"""Damage that is drawn and not thought of: bytes and values changed at random places, and what has to answer them."""
import copy
import math
from random import Random
from typing import Any, Callable, List, Optional, Tuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_zoo.errors import InputError

LONGEST = 2000  # characters of a sentence
SECONDS = [pytest.param(1, id='few'), pytest.param(20, id='many', marks=pytest.mark.slow)]  # times as many examples
# What stands in files where something else belongs.
ODD_VALUES = (
    None, True, False, 0, 1, -1, 7, 2 ** 31, 2 ** 63, -2 ** 63, 10 ** 30, .5, -.5, 1e308, math.inf, -math.inf, math.nan,
    '', 'x', '\0', '../..', '1e5', 'nan', '\u56f3', 'a' * 300, [], {}, [[]], [None], ['x'], [1, 2, 3], {'a': 1},
    {'': {}})


def fuzz(check: Callable[[Random], Any], examples: int) -> None:
    """Call `check` so many times, with a source of randomness that is the same in every run."""
    @settings(max_examples=examples, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=True))  # seeded by Hypothesis: unlike draws of its own, they are not all small
    def property(random: Random) -> None:
        check(random)
    property()


def answer(call: Callable[[], Any], *others: type) -> Optional[str]:
    """The sentence that a call refuses with, None where it works; any other error than these and InputError fails."""
    try:
        call()
    except (InputError, *others) as error:
        sentence = str(error)
        assert sentence.strip() and len(sentence) < LONGEST and '\n' not in sentence, sentence
        return sentence
    return None


def damage(data: bytes, random: Random) -> bytes:
    """The same bytes, cut, flipped, doubled, overwritten or filled in at one to four places."""
    found = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at, kind = random.randint(0, len(found)), random.randint(0, 6)
        end = min(len(found), at + random.choice((1, 2, 4, 8, 100)))
        if kind == 0:
            del found[at:]
        elif kind == 1:
            del found[at:end]
        elif kind == 2 and at < len(found):
            found[at] ^= 1 << random.randint(0, 7)
        elif kind == 3:
            found[at:at] = found[at:end] * random.choice((1, 50))
        elif kind == 4:
            found[at:end] = random.choice((b'\0', b'\xff', b'\x7f')) * (end - at)
        elif kind == 5:
            found[at:at] = bytes(random.randint(0, 255) for _ in range(random.randint(1, 9)))
        else:
            found[at:end] = random.choice((b'[', b'{', b'"', b': ', b'&a ', b'*a', b'\n', b'9999999999', b'-', b'\r\t'))
    return bytes(found)


def mutate(tree: Any, random: Random, values: Tuple[Any, ...] = ODD_VALUES) -> Any:
    """A copy of nested lists and dictionaries with one to three values replaced, left out, added or doubled."""
    found = [copy.deepcopy(tree)]
    for _ in range(random.randint(1, 3)):
        places = _places(found)
        node, key = places[random.randint(0, len(places) - 1)]
        kind = random.randint(0, 4)
        if kind == 0 and node is not found:
            del node[key]
        elif kind == 1 and isinstance(node[key], dict):
            node[key][random.choice(('x', '', *node[key]))] = copy.deepcopy(random.choice(values))
        elif kind == 1 and isinstance(node[key], list):
            node[key].append(copy.deepcopy(random.choice((*values, *node[key]))))
        else:
            node[key] = copy.deepcopy(random.choice(values))
    return found[0]


def _places(tree: Any) -> List[Tuple[Any, Any]]:
    """(container, key) of every value below."""
    found, todo = [], [tree]
    while todo:
        node = todo.pop()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            found.append((node, key))
            if isinstance(value, (dict, list)):
                todo.append(value)
    return found
