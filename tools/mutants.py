"""What `tools/mutation.py` changes: every small fault that it can put into a Python file, one at a time.

A mutant replaces one span of the text by another. Spans come from `ast`, so that strings and comments stay as they are;
text that only a reader sees (docstrings, annotations, messages of errors, help of options) is never touched.

| kind | what is changed |
| --- | --- |
| comparison | `<` and `<=`, `>` and `>=`, `==` and `!=`, `is` and `is not`, `in` and `not in` |
| logic | `and` and `or`, `&` and `|`, `not x` to `x` |
| arithmetic | `+` and `-`, `*` and `/`, `//` to `*`, `**` to `*` |
| term | `a + b` to `a`, and the same of `-`, `*`, `/`, `//`, `%` |
| sign | `-x` and `~x` to `x` |
| axis | `dim=1` to `dim=0`, `-1` to `-2`, `0` to `-1`; `x.transpose(a, b)` to `x`; two axes of `permute` swapped |
| constant | `n` to `n + 1`, from 1000 on to `2 n`; `True` and `False` |
| statement | a call, an in-place update or an entry that is set, whose value nobody takes, to `pass` |
| function | `min` and `max`, `any` and `all`, `floor` and `ceil` |
| keyword | a keyword argument that has a default is left out |

Positions are of UTF-8 bytes, as in `ast`.
"""
import ast
import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Optional, Union

Scope = Union[ast.FunctionDef, ast.AsyncFunctionDef]
COMPARISONS = {
    ast.Lt: ('<', '<='), ast.LtE: ('<=', '<'), ast.Gt: ('>', '>='), ast.GtE: ('>=', '>'), ast.Eq: ('==', '!='),
    ast.NotEq: ('!=', '=='), ast.Is: ('is', 'is not'), ast.IsNot: (r'is\s+not', 'is'), ast.In: ('in', 'not in'),
    ast.NotIn: (r'not\s+in', 'in')}
OPERATORS = {
    ast.Add: ('+', '-'), ast.Sub: ('-', '+'), ast.Mult: ('*', '/'), ast.Div: ('/', '*'), ast.FloorDiv: ('//', '*'),
    ast.Pow: ('**', '*'), ast.BitAnd: ('&', '|'), ast.BitOr: ('|', '&')}
TERMS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod)
TWINS = {a: b for pair in (
    ('min', 'max'), ('amin', 'amax'), ('argmin', 'argmax'), ('minimum', 'maximum'), ('any', 'all'), ('floor', 'ceil'),
) for a, b in (pair, pair[::-1])}
AXIS_KEYWORDS = {'dim', 'dims', 'axis', 'dim0', 'dim1', 'start_dim', 'end_dim'}
# Functions and methods of tensors whose integers by position are axes; 'cat' and 'stack' name theirs second.
AXIS_METHODS = {
    'softmax', 'log_softmax', 'logsumexp', 'sum', 'mean', 'std', 'var', 'amax', 'amin', 'argmax', 'argmin', 'cumsum',
    'prod', 'any', 'all', 'sort', 'argsort', 'flatten', 'unsqueeze', 'squeeze', 'size', 'gather', 'scatter', 'scatter_',
    'scatter_add', 'scatter_add_', 'index_select', 'index_add', 'index_add_', 'index_copy_', 'unbind', 'cat', 'stack',
    'norm', 'select', 'narrow', 'movedim'}
# Keywords of torch, numpy and Python that have a default; those of our own functions are read from their definitions.
DEFAULTS = {
    'keepdim', 'keepdims', 'key', 'reverse', 'default', 'descending', 'stable', 'eps', 'correction', 'unbiased',
    'dtype', 'bias', 'stride', 'padding', 'dilation', 'groups', 'largest', 'minlength', 'inplace', 'persistent',
    'training', 'sort_keys', 'parents', 'exist_ok', 'accumulate', 'requires_grad', 'memory_format', 'side', 'right',
    'reduction', 'label_smoothing', 'nargs', 'choices'}
# Text for readers: calls and keywords whose arguments stay as they are, and methods that only describe.
SPEAKING = {'print', 'warn', 'warning', 'info', 'debug', 'add_argument_group'}
TEXT_KEYWORDS = {'help', 'metavar', 'description', 'epilog', 'usage', 'prog'}
DESCRIBING = {'extra_repr', '__repr__', '__str__'}


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        path: File, from the root of the checkout.
        kind: As in the table above.
        where: Function or class around it, dotted; empty at the top of the file.
        line: Its line, from 1.
        first, last: Lines whose execution reaches it: of the statement, of the body for a default of a function.
        start, end: The bytes that are replaced.
        text: By what.
        before, after: The lines around, as they were and as they become, without indent.
        number: Counts mutants of one function that look the same, from 0.
    """
    path: str
    kind: str
    where: str
    line: int
    first: int
    last: int
    start: int
    end: int
    text: str
    before: str
    after: str
    number: int = 0

    @cached_property
    def key(self) -> str:
        """12 letters; the same as long as its function has these lines, wherever in the file it stands."""
        parts = (self.path, self.kind, self.where, self.before, self.after, str(self.number))
        return hashlib.sha256('\0'.join(parts).encode()).hexdigest()[:12]

    def apply(self, source: bytes) -> bytes:
        return source[:self.start] + self.text.encode() + source[self.end:]


def find_mutants(path: str, source: str, defaults: dict[str, set[str]]) -> list[Mutant]:
    """All mutants of a file that compile and are other programs.

    Args:
        path: Its name, from the root of the checkout.
        source: Its text.
        defaults: Of `collect_defaults`.
    """
    finder = _Finder(path, source, defaults)
    finder.visit(finder.tree)
    found, seen = [], Counter()
    for mutant in finder.found:
        if finder.differs(mutant):
            look = (mutant.kind, mutant.where, mutant.before, mutant.after)
            found.append(replace(mutant, number=seen[look]))
            seen[look] += 1
    return found


def collect_defaults(sources: list[str]) -> dict[str, set[str]]:
    """Names of functions and classes, each with the parameters that have a default in every definition of that name."""
    found: dict[str, list[set[str]]] = {}
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, []).append(_defaults_of(node.args))
            elif isinstance(node, ast.ClassDef):
                made = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == '__init__']
                fields = {part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and part.value}
                found.setdefault(node.name, []).append(_defaults_of(made[0].args) if made else fields)
    return {name: set.intersection(*kinds) for name, kinds in found.items()}


def _defaults_of(arguments: ast.arguments) -> set[str]:
    places = [*arguments.posonlyargs, *arguments.args]
    names = {place.arg for place in places[len(places) - len(arguments.defaults):]}
    return names | {place.arg for place, value in zip(arguments.kwonlyargs, arguments.kw_defaults) if value is not None}


def _is_text(node: ast.AST) -> bool:
    """Whether an operand is a string, so that `+` joins and `%` formats."""
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and node.func.attr in ('join', 'format', 'ljust', 'rjust')
    return isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)


def _name_of(function: ast.AST) -> str:
    """`sum` of `torch.sum` and of `sum`; empty for what is no name."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, 'id', '')


def _integer(node: ast.AST) -> Optional[int]:
    """The value of `2` and of `-2`."""
    sign = 1
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        sign, node = -1, node.operand
    known = isinstance(node, ast.Constant) and type(node.value) is int
    return sign * node.value if known else None


class _Finder(ast.NodeVisitor):
    """Walks a file and notes mutants in `found`."""

    def __init__(self, path: str, source: str, defaults: dict[str, set[str]]):
        self.path = path
        self.source = source.encode()
        self.tree = ast.parse(source)
        self.defaults = defaults
        self.found: list[Mutant] = []
        self.names: list[str] = []
        self.lines = (1, len(source.splitlines()))  # whose execution reaches what is visited
        self.in_function = False
        self.starts = [0]
        for line in self.source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

        self.parts = [(*self._span(part), ast.dump(part)) for part in self.tree.body]

    def differs(self, mutant: Mutant) -> bool:
        """Whether the statement at the top of the file around a mutant compiles to something else."""
        start, end, meant = next(part for part in self.parts if mutant.end <= part[1])
        shifted = replace(mutant, start=mutant.start - start, end=mutant.end - start)
        try:
            changed = ast.parse(shifted.apply(self.source[start:end])).body
        except SyntaxError:
            return False
        return [ast.dump(part) for part in changed] != [meant]

    # ---- noting

    def _span(self, node: ast.AST) -> tuple[int, int]:
        return (self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset)

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        text = self.source[start:end].decode()
        plain = isinstance(node, (ast.Name, ast.Constant, ast.Call, ast.Attribute, ast.Subscript))
        return text if plain else f'({text})'

    def _note(self, kind: str, start: int, end: int, text: str) -> None:
        begin = self.source.rfind(b'\n', 0, start) + 1
        stop = self.source.find(b'\n', end)
        stop = len(self.source) if stop < 0 else stop
        before = self.source[begin:stop].decode().strip()
        after = (self.source[begin:start] + text.encode() + self.source[end:stop]).decode().strip()
        line = self.source.count(b'\n', 0, start) + 1
        self.found.append(Mutant(
            self.path, kind, '.'.join(self.names), line, *self.lines, start, end, text, before, after))

    def _swap_between(self, kind: str, left: ast.AST, right: ast.AST, pattern: str, text: str) -> None:
        """Replace an operator, which stands between two operands and maybe their brackets."""
        start, end = self._span(left)[1], self._span(right)[0]
        found = re.search(pattern, self.source[start:end].decode())
        if found:
            self._note(kind, start + found.start(), start + found.end(), text)

    # ---- where it is

    def _body(self, node: Union[Scope, ast.ClassDef, ast.Lambda], lines: tuple[int, int]) -> None:
        kept = self.lines, self.in_function
        self.lines = lines
        for part in node.body if isinstance(node.body, list) else [node.body]:
            self.visit(part)
        self.lines, self.in_function = kept

    def visit_FunctionDef(self, node: Scope) -> None:
        if node.name in DESCRIBING:
            return
        self.names.append(node.name)
        kept = self.lines
        self.lines = (node.body[0].lineno, node.end_lineno)  # a default is reached where the body runs
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        self.lines, inside = kept, self.in_function
        self.in_function = True
        self._body(node, kept)
        self.in_function = inside
        self.names.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names.append(node.name)
        self._body(node, (node.lineno, node.end_lineno))
        self.names.pop()

    def visit(self, node: ast.AST) -> None:
        """A statement inside a function is reached by its own lines, of which a compound one has only the head."""
        if not isinstance(node, ast.stmt) or not self.in_function:
            super().visit(node)
            return
        kept = self.lines
        body = getattr(node, 'body', None)
        last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
        self.lines = (node.lineno, last)
        super().visit(node)
        self.lines = kept

    # ---- what stays

    def visit_Raise(self, node: ast.Raise) -> None:
        """Which error and its words; the condition around it is mutated."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Text; before Python 3.12 its parts have no position either."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        names = {part.id for part in ast.walk(node.test) if isinstance(part, ast.Name)}
        if not names & {'TYPE_CHECKING', '__name__'}:
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        if '__all__' in names:
            return
        if any(isinstance(target, ast.Subscript) for target in node.targets):
            self._note('statement', *self._span(node), 'pass')
        self.generic_visit(node)

    # ---- statements

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and _name_of(node.value.func) not in SPEAKING:
            self._note('statement', *self._span(node), 'pass')
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if not _is_text(node.value):
            self._note('statement', *self._span(node), 'pass')
            if type(node.op) in OPERATORS and not isinstance(node.value, (ast.List, ast.ListComp, ast.Tuple)):
                symbol, other = OPERATORS[type(node.op)]
                kind = 'logic' if isinstance(node.op, (ast.BitAnd, ast.BitOr)) else 'arithmetic'
                self._swap_between(kind, node.target, node.value, re.escape(symbol), other)
        self.generic_visit(node)

    # ---- expressions

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, right, op in zip(operands, operands[1:], node.ops):
            symbol, other = COMPARISONS[type(op)]
            self._swap_between('comparison', left, right, symbol, other)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        symbol, other = ('and', 'or') if isinstance(node.op, ast.And) else ('or', 'and')
        for left, right in zip(node.values, node.values[1:]):
            self._swap_between('logic', left, right, rf'\b{symbol}\b', other)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if _is_text(node):
            return
        lists = any(isinstance(part, (ast.List, ast.ListComp, ast.Tuple)) for part in (node.left, node.right))
        if type(node.op) in OPERATORS and not lists:
            symbol, other = OPERATORS[type(node.op)]
            kind = 'logic' if isinstance(node.op, (ast.BitAnd, ast.BitOr)) else 'arithmetic'
            self._swap_between(kind, node.left, node.right, re.escape(symbol), other)
        if isinstance(node.op, TERMS):
            self._note('term', *self._span(node), self._text(node.left))
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        value = _integer(node)
        if value is not None:
            self._note('constant', *self._span(node), str(value + 1))
            return
        if not isinstance(node.op, ast.UAdd):
            kind = 'logic' if isinstance(node.op, ast.Not) else 'sign'
            self._note(kind, *self._span(node), self._text(node.operand))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._note('constant', *self._span(node), str(not node.value))
        elif isinstance(node.value, (int, float)):
            more = node.value + 1 if abs(node.value) < 1000 else 2 * node.value  # 1e9 + 1 would do the same
            self._note('constant', *self._span(node), repr(more))

    def visit_Call(self, node: ast.Call) -> None:
        name = _name_of(node.func)
        if name in SPEAKING or name.endswith('Error'):
            return
        if name in TWINS:
            end = self._span(node.func)[1]
            self._note('function', end - len(name), end, TWINS[name])
        self._transposed(node, name)
        self.visit(node.func)
        for argument in node.args:
            if name in AXIS_METHODS and _integer(argument) is not None:
                self._axis(argument)
            elif name not in ('transpose', 'permute', 'swapaxes') or _integer(argument) is None:
                self.visit(argument)
        for keyword in node.keywords:
            self._keyword(node, name, keyword)

    def _transposed(self, node: ast.Call, name: str) -> None:
        method = isinstance(node.func, ast.Attribute) and getattr(node.func.value, 'id', '') not in ('torch', 'np')
        if name in ('transpose', 'swapaxes') and method:
            self._note('axis', *self._span(node), self._text(node.func.value))
        elif name == 'permute' and len(node.args) > 1:
            first, second = node.args[-2:]
            between = self.source[self._span(first)[1]:self._span(second)[0]].decode()
            swapped = self._text(second).strip('()') + between + self._text(first).strip('()')
            self._note('axis', self._span(first)[0], self._span(second)[1], swapped)

    def _axis(self, node: ast.AST) -> None:
        self._note('axis', *self._span(node), str(_integer(node) - 1))

    def _keyword(self, call: ast.Call, name: str, keyword: ast.keyword) -> None:
        if keyword.arg in TEXT_KEYWORDS:
            return
        if keyword.arg is not None and keyword.arg in self.defaults.get(name, DEFAULTS):
            self._note('keyword', *self._with_comma(call, keyword), '')
        if keyword.arg in AXIS_KEYWORDS and _integer(keyword.value) is not None:
            self._axis(keyword.value)
        else:
            self.visit(keyword.value)

    def _with_comma(self, call: ast.Call, keyword: ast.keyword) -> tuple[int, int]:
        """The bytes of a keyword and of the comma that goes with it."""
        start, end = self._span(keyword)
        others = [part for part in (*call.args, *call.keywords) if part is not keyword]
        ahead = [self._span(part)[1] for part in others if self._span(part)[1] <= start]
        comma = self.source.rfind(b',', max(ahead), start) if ahead else -1
        if comma >= 0:
            return comma, end
        behind = [self._span(part)[0] for part in others if self._span(part)[0] >= end]
        return start, min(behind, default=end)


def read_mutants(root, folders: list[str]) -> Iterator[Mutant]:
    """All mutants of the Python files below the folders of a checkout, file by file."""
    sources = {path: path.read_text(encoding='utf-8') for path in sorted((root / 'moe_zoo').rglob('*.py'))}
    defaults = collect_defaults(list(sources.values()))
    for path, source in sources.items():
        name = path.relative_to(root).as_posix()
        if any(name == folder or name.startswith(f'{folder}/') for folder in folders):
            yield from find_mutants(name, source, defaults)
