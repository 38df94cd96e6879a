"""YAML and JSON that somebody wrote, read so that nothing in it runs, ends in a loop, or outgrows its file.

Both readers give plain values, or raise an error whose text is a clause. What a short text could do to a reader, and to
every code that walks over or prints what was read: brackets nested beyond Python's stack, aliases of YAML that refer to
lists of aliases (a billion values in a few lines), numbers of thousands of digits, which neither fit a float nor print.
"""
import json
from typing import Any, Dict, Tuple

import yaml

DEEPEST = 100  # lists in lists
MOST = 1_000_000  # values of a YAML document, each as often as it is referred to
DIGITS = 40  # of a whole number

_Weight = Tuple[int, int]  # values in a node, and how deep they are nested


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: It is not JSON, nested too deeply, or has a whole number that is too long.
    """
    try:
        value = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError(_too_deep()) from None
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(DEEPEST):
        level = [each for node in level for each in (node.values() if isinstance(node, dict) else node)
                 if isinstance(each, (dict, list))]
        if not level:
            return value
    raise ValueError(_too_deep())


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; python tags are refused, as by PyYAML's safe loader.

    Raises:
        yaml.YAMLError: It is not YAML, or more than its text should be; `problem` says what.
    """
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {})
        return loader.construct_document(node)
    except yaml.reader.ReaderError as error:  # which has no `problem`
        raise _refusal(f'the character {error.character:#x} at position {error.position} is not allowed') from error
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise _refusal(_too_deep()) from None
    except Exception as error:  # what converts numbers and dates lets all through that is wrong with them
        raise _refusal(f'a value cannot be read: {" ".join(str(error).split()) or type(error).__name__}') from error
    finally:
        if loader is not None:
            loader.dispose()


def _weigh(node: yaml.Node, known: Dict[int, Any]) -> _Weight:
    """Raises: YAMLError: A node holds itself, too many values, too many levels, or too long a number."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == 'tag:yaml.org,2002:int' and len(node.value) > DIGITS:
            raise _refusal(f'the number {node.value[:20]}... is too long', node)
        return 1, 0
    if id(node) not in known:
        known[id(node)] = None  # until it is weighed
        below = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        weights = [_weigh(each, known) for each in below]
        known[id(node)] = 1 + sum(values for values, _ in weights), 1 + max((deep for _, deep in weights), default=0)
    if known[id(node)] is None:
        raise _refusal('it holds an alias of something that the alias is part of', node)
    values, deep = known[id(node)]
    if values > MOST:
        raise _refusal(f'its aliases stand for more than {MOST:,} values', node)
    if deep > DEEPEST:
        raise _refusal(_too_deep(), node)
    return values, deep


def _refusal(problem: str, node: Any = None) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark if node is not None else None)


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f'the number {digits[:20]}... is too long')
    return int(digits)


def _too_deep() -> str:
    return f'it is nested more than {DEEPEST} deep'
