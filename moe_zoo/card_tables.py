"""What is told of cards: `moe-zoo list` and `show`, and the README's tables of models and of accuracy.

Cards come in as dictionaries, text goes out. Standard library only: nothing here waits for torch.
"""
import fnmatch
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from .cards import dense_twin
from .errors import InputError, nearest

Card = Mapping[str, Any]

ACCURACY = ('digits', 'CIFAR-10')  # data sets of the README's table of accuracy
LEAST = 12  # characters that a shortened column keeps


# --- moe-zoo list -----------------------------------------------------------------------------------------------------

def short(count: int) -> str:
    """1234567 -> '1.23 M'."""
    for size, letter in ((10**9, 'G'), (10**6, 'M')):
        if count >= size:
            return f'{count / size:.3g} {letter}' if count < 1000 * size else f'{count / size:.0f} {letter}'
    return f'{count:,}'


class Column(NamedTuple):
    """A column of `moe-zoo list`: what it holds, and a figure's text (texts are left-aligned and may be shortened)."""
    value: Callable[[Card], Any]
    figure: Callable[[int], str] | None = None


COLUMNS = {
    'model': Column(lambda card: card['name']),
    'family': Column(lambda card: card['family']),
    'pixels': Column(lambda card: card['input']['size'][-1], str),
    'parameters': Column(lambda card: card['cost']['parameters'], short),
    'active': Column(lambda card: card['cost']['active_parameters'], short),
    'MACs': Column(lambda card: card['cost']['macs'], short),
    'summary': Column(lambda card: card['summary']),
    'twin': Column(lambda card: _call(*dense_twin(card)) if 'twin' in card else None),
    'year': Column(lambda card: card['paper']['year'], str),
    'paper': Column(lambda card: card['paper']['title']),
    'recipe': Column(lambda card: card['recipe']['config']),
    'published': Column(lambda card: _first(card, 'published')),
    'measured': Column(lambda card: _first(card, 'measured')),
}
SHOWN = ('model', 'parameters', 'active', 'MACs', 'summary')


def find(known: Mapping[str, Card], pattern: str = '') -> list[Card]:
    """The cards of a family, or those whose name matches, by family and size.

    Args:
        known: All cards by name.
        pattern: A family, a part of names, or a pattern of names such as 'vmoe_*'.

    Raises:
        InputError: Nothing matches.
    """
    glob = pattern if any(c in pattern for c in '*?[') else f'*{pattern}*'
    found = [card for name, card in known.items() if fnmatch.fnmatchcase(name, glob) or card['family'] == pattern]
    if not found:
        families = {card['family'] for card in known.values()}
        hint = nearest(pattern, {*known, *families}) or ' `moe-zoo list` shows all names.'
        raise InputError(f'No model of moe_zoo matches {pattern!r}.{hint}')
    return by_size(found)


def by_size(found: Iterable[Card]) -> list[Card]:
    """Sorted by family, then parameters."""
    return sorted(found, key=lambda card: (card['family'], card['cost']['parameters'], card['name']))


def columns_of(text: str) -> tuple[str, ...]:
    """'model,macs' -> the names of these columns.

    Raises:
        InputError: There is no such column.
    """
    known = {name.lower(): name for name in COLUMNS}
    wanted = [part.strip() for part in text.split(',')]
    for name in wanted:
        if name.lower() not in known:
            hint = nearest(name.lower(), known) or f' There are {", ".join(COLUMNS)}.'
            raise InputError(f'--columns: there is no column {name!r}.{hint}')
    return tuple(known[name.lower()] for name in wanted)


def listing(found: Iterable[Card], columns: Iterable[str], width: int) -> str:
    """A table of cards that is at most `width` characters wide, where its figures leave room for its texts."""
    columns = tuple(columns)
    rows = [columns] + [tuple(_cell(COLUMNS[name], card) for name in columns) for card in found]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    texts = [i for i, name in enumerate(columns) if COLUMNS[name].figure is None and name != 'model']
    while texts and sum(widths) + 2 * (len(widths) - 1) > width:
        widest = max(texts, key=lambda i: widths[i])
        if widths[widest] <= LEAST:
            break
        widths[widest] -= 1
    right = [COLUMNS[name].figure is not None for name in columns]
    return '\n'.join('  '.join(map(_fit, row, widths, right)).rstrip() for row in rows)


def values(found: Iterable[Card], columns: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """The same as data: a dictionary a card, figures in full; `columns` None means all."""
    return [{name.lower(): COLUMNS[name].value(card) for name in columns or COLUMNS} for card in found]


def _cell(column: Column, card: Card) -> str:
    value = column.value(card)
    return '-' if value is None else column.figure(value) if column.figure else value


def _fit(text: str, width: int, right: bool) -> str:
    text = text if len(text) <= width else text[:width - 3].rstrip() + '...'
    return text.rjust(width) if right else text.ljust(width)


def _call(name: str, keywords: Mapping[str, Any]) -> str:
    return f'{name}({", ".join(f"{k}={v!r}" for k, v in keywords.items())})' if keywords else name


def _first(card: Card, kind: str) -> str | None:
    rows = [row for row in card.get(kind, []) if 'experiment' not in row]
    return ' '.join(_result(rows[0])) if rows else None


# --- moe-zoo show -----------------------------------------------------------------------------------------------------

def card_text(card: Card, width: int) -> str:
    """All that a card says, folded to `width` characters."""
    paper, cost, recipe = card['paper'], card['cost'], card['recipe']
    venue, year = paper['venue'], str(paper['year'])
    venue = venue if year in venue else f'{venue} {year}'
    lines = [
        ('paper', f'{paper["title"]}. {paper["authors"]}. {venue}. arXiv:{paper["arxiv"]}'),
        ('input', ' x '.join(map(str, card['input']['size']))),
        ('parameters', f'{cost["parameters"]:,}, of which {cost["active_parameters"]:,} work on an image or token'),
        ('MACs', f'{cost["macs"]:,} at most (multiply-adds; router and chosen experts for every item)'),
        ('dense twin', _call(*dense_twin(card)) if 'twin' in card else 'none: it is dense itself'),
        ('recipe', recipe['config']),
        ('train it', recipe['command']),
        *[('published', _told(row)) for row in card.get('published', [])],
        *[('measured', _told_run(card['name'], row) if 'command' in row else _told(row))
          for row in card.get('measured', [])],
        ('weights', card['weights']['note']),
        *[('deviation', text) for text in card.get('deviations', [])],
    ]
    label_width = max(len(label) for label, _ in lines)
    body = [
        textwrap.fill(
            f'{label:<{label_width}}  {text}', width, subsequent_indent=' ' * (label_width + 2),
            break_long_words=False, break_on_hyphens=False)
        for label, text in lines
    ]
    return '\n'.join([f'{card["name"]}: {card["summary"]}', *body])


def _result(row: Mapping[str, Any]) -> tuple[str, str]:
    """What was found and on what: ('99.25 +- 0.33', 'digits, top-1')."""
    spread = f' +- {round(row["std"], 2)}' if 'std' in row else ''
    value = str(row['value']) if 'value' in row else f'{round(row["mean"], 2)}{spread}'
    return value, ', '.join(str(row[key]) for key in ('dataset', 'metric') if key in row)


def _told(row: Mapping[str, Any]) -> str:
    """A [[published]] or [[measured]] row: what, how much, under which conditions, from where."""
    value, what = _result(row)
    said = {'dataset', 'metric', 'value', 'mean', 'std', 'source'}
    rest = ', '.join(f'{key} {_plain(each)}' for key, each in row.items() if key not in said)
    return f'{what}: {value}' + (f' ({rest})' if rest else '') + (f'; {row["source"]}' if 'source' in row else '')


def _told_run(name: str, row: Mapping[str, Any]) -> str:
    """A [[measured]] row of finished runs, its twin and how to train both."""
    twin = row.get('twin')
    beside = f'; dense twin {_call(twin["model"], twin["model_args"])}: {_reached(twin)}' if twin else ''
    return (
        f'{row["dataset"]} ({row["data"]}), {row["metric"]}, {row["pixels"]} px, {row["epochs"]} epochs: '
        f'{_call(name, row["model_args"])}: {_reached(row)}{beside}; train it: {row["command"]} '
        f'(commit {row["commit"]}, {row["versions"]}, {row["hardware"]})')


def _reached(row: Mapping[str, Any]) -> str:
    """99.25 +- 0.33 % (seeds 0 1 2), 30 M MACs at most, 20 M executed."""
    executed = f', {short(row["macs_executed"])} executed' if 'macs_executed' in row else ''
    return f'{_result(row)[0]} % (seeds {_plain(row["seeds"])}), {short(row["macs"])} MACs at most{executed}'


def _plain(value: Any) -> str:
    """A value of a card without the marks of Python: lists and tables as words."""
    if isinstance(value, Mapping):
        return ', '.join(f'{key} {_plain(each)}' for key, each in value.items())
    return ' '.join(map(str, value)) if isinstance(value, list) else str(value)


# --- README -----------------------------------------------------------------------------------------------------------

def models_table(known: Mapping[str, Card]) -> str:
    """The README's table of models, by family and size."""
    lines = ['| model | pixels | parameters | active | MACs | dense twin |',
             '| --- | ---: | ---: | ---: | ---: | --- |']
    for card in by_size(known.values()):
        cost = card['cost']
        twin = f'`{card["twin"]}`' if 'twin' in card else 'it is one'
        if card.get('twin_args'):
            twin += ' with ' + ', '.join(f'`{key}={value!r}`' for key, value in card['twin_args'].items())
        figures = (_amount(cost['parameters']), _amount(cost['active_parameters']), _macs(cost['macs']))
        lines.append(f'| `{card["name"]}` | {card["input"]["size"][-1]} | {" | ".join(figures)} | {twin} |')
    return '\n'.join(lines) + '\n'


class Point(NamedTuple):
    """A row of the table of accuracy: what one network reached on one set of data."""
    data: str
    macs: int
    mean: float
    accuracy: str
    name: str
    pixels: int
    seeds: int
    recipe: str

    def beats(self, other: 'Point') -> bool:
        """More accurate at no more MACs, or as accurate at fewer, on the same data."""
        return (self.data == other.data and self.macs <= other.macs and self.mean >= other.mean
                and (self.macs, self.mean) != (other.macs, other.mean))


def accuracy_table(known: Mapping[str, Card]) -> str:
    """The README's table of accuracy: every recorded run on the data sets `ACCURACY`, and its dense twin.

    By data, named in the first row of each, then MACs. What no other row of the same data beats is bold, so that the
    last bold row within a budget of MACs is the most accurate network for it. Empty where nothing was recorded.
    """
    points = {point for card in known.values() for row in card.get('measured', [])
              if 'experiment' not in row and row['dataset'] in ACCURACY for point in _points(card['name'], row)}
    if not points:
        return ''
    lines = ['| data | MACs | model | pixels | top-1, % | seeds | recipe |',
             '| --- | ---: | --- | ---: | ---: | ---: | --- |']
    told = None
    for point in sorted(points):
        bold = '' if any(other.beats(point) for other in points) else '**'
        data, told = '' if point.data == told else point.data, point.data
        lines.append(f'| {data} | {_macs(point.macs)} | {bold}{point.name}{bold} | {point.pixels} '
                     f'| {bold}{point.accuracy}{bold} | {point.seeds} | {point.recipe} |')
    return '\n'.join(lines) + '\n'


def _points(name: str, row: Mapping[str, Any]) -> list[Point]:
    """A recorded run, and its dense twin where it has one."""
    runs = [(f'`{name}`', row)] + ([(f'dense twin of `{name}`', row['twin'])] if 'twin' in row else [])
    recipe = ' '.join([row['config'], *re.findall(r'(?<= )\w+=\S+', row['command'])])  # with what won over it
    return [Point(data=f'{row["dataset"]}: {row["data"]}', macs=run['macs'], mean=run['mean'], accuracy=_accuracy(run),
                  name=title, pixels=row['pixels'], seeds=len(run['seeds']), recipe=f'`{recipe}`')
            for title, run in runs]


def _accuracy(row: Mapping[str, Any]) -> str:
    return f'{row["mean"]:.2f}' + (f' ± {row["std"]:.2f}' if 'std' in row else '')


def _amount(number: int) -> str:
    return f'{number / 1e6:,.1f} M' if number >= 1e5 else f'{number / 1e3:,.1f} k'


def _macs(number: int) -> str:
    """In millions but for the smallest."""
    return f'{number / 1e6:,.0f} M' if number >= 1e7 else _amount(number)
