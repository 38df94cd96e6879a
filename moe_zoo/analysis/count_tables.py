"""What was counted, as tables: one row a model, or a module, an operator, an expert; and two models side by side.

Letters: E experts, K chosen.
"""
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from .cost import Cost, ImageCosts
from .cost_check import Comparison
from .tables import Column, Grid, Value

BY = ('module', 'operator', 'expert')
MANY_EXPERTS = 32  # a layer of more is one row


@dataclass(frozen=True)
class Result:
    """One model: its cost on a blank input of `input_size` (C, H, W), and on images where they were given.

    Attributes:
        open_ended: What is executed depends on weights and images, so that the blank input says nothing of it.
        counted: Paths of the images.
        skipped: Those that could not be read.
        loads: Layer name to (E,) times that an item used each expert on the images.
        check: The count by fvcore, beside this one.
        notes: Sentences to be said of the model.
        time_notes: Those that say where its MACs are no time.
    """
    name: str
    input_size: tuple[int, ...]
    open_ended: bool
    cost: Cost
    images: ImageCosts | None = None
    counted: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    loads: dict[str, list[float]] = field(default_factory=dict)
    check: tuple[Comparison, ...] = ()
    notes: tuple[str, ...] = ()
    time_notes: tuple[str, ...] = ()

    @property
    def uncounted(self) -> dict[str, tuple[str, ...]]:
        """Over the blank input and all images."""
        return {**self.cost.uncounted, **(self.images.uncounted if self.images else {})}

    def figure(self, by_image: str, blank: str) -> Value:
        """Mean over the images, or what the blank input tells, or None where it tells nothing."""
        if self.images:
            return self.images.spread(by_image).mean
        return None if self.open_ended else getattr(self.cost, blank)

    @property
    def at_most(self) -> Value:
        """Images of a detector have other sizes than its blank input."""
        return self.images.spread('at_most').mean if self.images else self.cost.macs_max


MODEL_COLUMNS = (
    Column('model', 'model', 'text'), Column('input', 'input', 'text'), Column('parameters', 'parameters'),
    Column('active', 'active'), Column('macs_max', 'MACs\nat most', unit_with='macs'),
    Column('not_time', '', 'mark'), Column('macs_executed', 'MACs\nexecuted', unit_with='macs'),
    Column('macs_expected', 'MACs\nexpected', unit_with='macs'),
    Column('activations', 'activations'), Column('peak_memory', 'memory', 'bytes'))


def model_grid(results: Sequence[Result]) -> Grid:
    """One row a model, a star where MACs are no time. The size of the input stands above where it is one for all."""
    sizes = [_size(result) for result in results]
    one = sizes[0] if len(set(sizes)) == 1 else None
    rows = []
    for result, size in zip(results, sizes):
        cost = result.cost
        rows.append((
            result.name, None if one else size, cost.parameters, cost.active_parameters, result.at_most,
            '*' if result.time_notes else None,
            result.figure('executed', 'macs_executed'),
            result.images.spread('expected').mean if result.images and cost.parameters_by_expert else None,
            result.figure('activations', 'activations'), result.figure('peak_memory', 'peak_memory')))
    title = f'cost of one image{f" ({one})" if one else ""}, in multiply-accumulates (MACs)'
    return Grid(title, MODEL_COLUMNS, tuple(rows)).without_empty_columns()


def _size(result: Result) -> str:
    if result.images and len(set(result.images.at_most) | {result.cost.macs_max}) > 1:
        return 'mean of the images'  # a detector resizes each
    return ' x '.join(map(str, result.input_size))


def breakdown(result: Result, by: str, depth: int) -> Grid:
    """MACs by module down to `depth` levels, or by operator; parameters and load by expert."""
    if by == 'module':
        return _modules(result, depth)
    return _operators(result) if by == 'operator' else _experts(result)


def _modules(result: Result, depth: int) -> Grid:
    """Rows of less than 0.005 % of the whole are left out."""
    at_most, executed = _by_module(result)
    total = at_most[''] or 1
    rows = []
    for name, macs in at_most.items():
        level = name.count('.') + 1 if name else 0
        if level <= depth and macs >= 5e-5 * total:
            rows.append((
                '  ' * level + (name or 'whole model'), result.cost.parameters_by_module.get(name), macs,
                100 * macs / total, executed.get(name)))
    columns = (
        Column('module', 'module', 'text'), Column('parameters', 'parameters'),
        Column('macs_max', 'MACs\nat most', unit_with='macs'),
        Column('percent', 'share', 'percent'), Column('macs_executed', 'MACs\nexecuted', unit_with='macs'))
    return Grid(result.name, columns, tuple(rows)).without_empty_columns()


def _by_module(result: Result) -> tuple[dict[str, float], dict[str, float]]:
    """At most, and executed where that is known."""
    measured = result.images or result.cost
    return measured.by_module_max, measured.by_module if result.images or not result.open_ended else {}


def _operators(result: Result) -> Grid:
    executed = by_operator(result)
    total = sum(executed.values()) or 1
    rows = sorted(((op, macs, 100 * macs / total) for op, macs in executed.items()), key=lambda row: -row[1])
    columns = (
        Column('operator', 'operator', 'text'), Column('macs_executed', 'MACs\nexecuted'),
        Column('percent', 'share', 'percent'))
    return Grid(result.name + _of_padded_path(result), columns, tuple(rows))


def by_operator(result: Result) -> dict[str, float]:
    """Executed MACs by operator."""
    return (result.images or result.cost).by_operator


def _of_padded_path(result: Result) -> str:
    if result.images or not result.open_ended:
        return ''
    return ', as it pads on a blank input (--images DIR counts what it chooses)'


def _experts(result: Result) -> Grid:
    """Experts that are alike share a row."""
    rows = []
    for layer, sizes in result.cost.parameters_by_expert.items():
        load = result.loads.get(layer) if len(sizes) <= MANY_EXPERTS else None
        each = list(zip(range(len(sizes)), sizes, load or [None] * len(sizes)))
        for (size, times), alike in groupby(each, key=lambda expert: expert[1:]):
            first, *rest = [expert[0] for expert in alike]
            rows.append((layer, f'{first} to {rest[-1]}' if rest else str(first), size, times and 100 * times))
    columns = (
        Column('layer', 'layer', 'text'), Column('expert', 'experts', 'text'),
        Column('parameters', 'parameters\nof one'), Column('load', 'items that\nused it', 'percent'))
    title = result.name if rows else f'{result.name}: no experts with parameters of their own'
    return Grid(title, columns, tuple(rows)).without_empty_columns()


def comparison(a: Result, b: Result, by: str, depth: int) -> Grid:
    """Two models side by side, by module or operator: at most, or executed where images were given for both.

    Ratio and difference are of the first to the second.
    """
    known = all(result.images or not result.open_ended for result in (a, b))
    if by == 'operator':
        what, sides = 'MACs executed', [by_operator(result) for result in (a, b)]
        words = [_of_padded_path(result) for result in (a, b)]
    else:
        what = 'MACs executed' if known and (a.images or b.images) else 'MACs at most'
        sides = [_by_module(result)[what == 'MACs executed'] for result in (a, b)]
        words = ['', '']
    rows = []
    for name in _in_order(*sides):
        level = 0 if by == 'operator' or not name else name.count('.') + 1
        left, right = (side.get(name) for side in sides)
        if level <= depth and (left or right):
            rows.append((
                '  ' * level + (name or 'whole model'), left, right, (left or 0) - (right or 0),
                left / right if left and right else None))
    columns = (
        Column(by, by, 'text'), Column('a', 'A', unit_with='a'), Column('b', 'B', unit_with='a'),
        Column('difference', 'A - B', unit_with='a'),
        Column('ratio', 'A / B', 'ratio'))
    return Grid(f'{what}: A {a.name}{words[0]}, B {b.name}{words[1]}', columns, tuple(rows))


def check_grid(result: Result) -> Grid:
    """The same count by fvcore, and why they differ where they do."""
    columns = (
        Column('operator', 'operator', 'text'), Column('ours', 'ours', unit_with='check'),
        Column('fvcore', 'fvcore', unit_with='check'), Column('why', 'difference', 'text'))
    rows = [(row.operator, row.ours, row.fvcore, row.why or 'none') for row in result.check]
    return Grid(f'{result.name}, MACs counted by fvcore too', columns, tuple(rows))


def _in_order(first: Iterable[str], second: Iterable[str]) -> list[str]:
    """Names of both; those of the second alone stand behind the name that comes before them there."""
    names, after = list(first), None
    known = set(names)
    for name in second:
        if name not in known:
            names.insert(names.index(after) + 1 if after is not None else 0, name)
        after = name
    return names
