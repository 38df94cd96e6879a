"""The one page writer: sections in, one self-contained HTML file out. Standard library only.

A page is a list of sections; a section is a title, a status, a headline and blocks (prose, tables, figures, key
numbers). `Page.write` renders all of it and renames the file into place, so that a run calls it after every stage
and a reader always finds a whole page that says what is done, what is running and what is still to come. The file
needs no network: its style is inline, its images are data URIs, and it follows the reader's light or dark setting.
"""
import base64
import html
import itertools
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Sequence, Union

from moe_zoo.errors import InputError, atomic_write, counted

__all__ = ['Data', 'Figure', 'Page', 'Section', 'Sorted', 'Stats', 'Table']


class Sorted(NamedTuple):
    """A cell: what it shows, and the number that its column is sorted by. A second line of `text` is shown small."""
    text: str
    key: float


Cell = Union[str, int, float, Sorted, None]
STYLE = Path(__file__).with_name('page.css')
SCRIPT = Path(__file__).with_name('page.js')
STATUS = {  # what a section's badge says, and to whom the page still owes something
    'done': 'done',
    'running': 'running now',
    'pending': 'still to come',
    'skipped': 'skipped',
    'failed': 'failed',
}


@dataclass(frozen=True)
class Table:
    """Rows under named columns; the first column names the row. Numbers align right, None shows as a dash.

    An int is grouped (1,234), a float shows four significant digits; give a str where something else is wanted.

    Attributes:
        groups: Makes the table sort at a click on a heading, and filter by words and by these: for each row, the names
            that it is chosen by. Without script it is a table like any other.
        group_label: What the groups are.
    """
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ''
    groups: Sequence[Sequence[str]] = ()
    group_label: str = ''

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise InputError(f'rows: {row!r} has {len(row)} cells, but the table has {len(self.columns)} columns.')
        if self.groups and len(self.groups) != len(self.rows):
            raise InputError(f'groups: there are {len(self.groups)} of them for {counted(len(self.rows), "row")}.')

    def texts(self) -> list[list[str]]:
        """The rows as they are shown."""
        return [[_cell(value) for value in row] for row in self.rows]

    def numeric(self) -> list[bool]:
        """Which columns hold numbers; the first one holds names, also where they begin with a digit."""
        return [i > 0 and _is_numeric([row[i] for row in self.rows]) for i in range(len(self.columns))]


@dataclass(frozen=True)
class Data:
    """Numbers to take away: a link that saves `content` as the file `name` (JSON), with no server behind it."""
    name: str
    content: Any


@dataclass(frozen=True)
class Figure:
    """An image: SVG text, or the bytes of a PNG or JPEG file. `alt` says in words what it shows.

    An SVG that draws in `currentColor` or in the page's colours (`var(--ink)`, `var(--expert-0)`, ...) is put in line
    and follows light and dark. Any other image is shown as it is, on white paper. Figures that follow each other in a
    section stand side by side where the screen is wide enough.

    Attributes:
        data: The numbers behind it.
    """
    image: Union[str, bytes]
    alt: str
    caption: str = ''
    data: Union[Data, None] = None


@dataclass(frozen=True)
class Stats:
    """A few key numbers, large: pairs of (value, what it is)."""
    items: Sequence[tuple[str, str]]


Block = Union[str, Table, Figure, Stats, Data]


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Args:
        title: The heading.
        status: A key of `STATUS`.
        headline: The result in one sentence; before there is one, what the section will show.
        blocks: In order. A str is prose: blank lines part paragraphs, `code`, **bold** and [links](https://...) work,
            and a paragraph that begins with `$ ` is a command to copy.
        seconds: How long it took; or, of a section still to come, about how long it will.
    """
    title: str
    status: str = 'pending'
    headline: str = ''
    blocks: Sequence[Block] = ()
    seconds: Union[float, None] = None

    def __post_init__(self):
        if self.status not in STATUS:
            raise InputError(f'status={self.status!r} is not known: use one of {", ".join(STATUS)}.')


@dataclass
class Page:
    """A title, a sentence that leads in, sections, and the facts of the run (pairs of name and value)."""
    title: str
    lead: str = ''
    sections: list[Section] = field(default_factory=list)
    facts: Sequence[tuple[str, str]] = ()

    def write(self, path: Union[str, os.PathLike]) -> None:
        """Render the page and rename it onto `path`: a reader sees the old page or the new one, never a part."""
        with atomic_write(path) as temporary:
            temporary.write_text(self.html(), encoding='utf-8')

    def html(self) -> str:
        """The whole document."""
        running = any(s.status == 'running' for s in self.sections)
        sortable = any(isinstance(block, Table) and block.groups for s in self.sections for block in s.blocks)
        wide = ' class="wide"' if sortable else ''  # such tables have many columns
        return '\n'.join([
            '<!doctype html>',
            '<html lang="en">',
            '<head>',
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f'<title>{html.escape(self.title)}</title>',
            f'<link rel="icon" href="{_data_uri(_MARK.encode(), "image/svg+xml")}">',
            f'<style>{STYLE.read_text(encoding="utf-8")}</style>',
            '</head>',
            f'<body{wide}>',
            '<header class="wrap">',
            f'<p class="brand">{_MARK}<span>moe_zoo</span></p>',
            f'<h1>{html.escape(self.title)}</h1>',
            f'<div class="lead">{_prose(self.lead)}</div>',
            _contents(self.sections),
            _WATCH if running else '',
            '</header>',
            '<main class="wrap">',
            *(_section(number, section) for number, section in enumerate(self.sections, 1)),
            '</main>',
            _facts(self.facts),
            f'<script>{SCRIPT.read_text(encoding="utf-8")}</script>' if sortable else '',
            '</body>',
            '</html>',
            '',
        ])


def _contents(sections: Sequence[Section]) -> str:
    """What there is, what is running and what is still to come, as a list of links."""
    if not sections:
        return ''
    items = []
    for number, section in enumerate(sections, 1):
        state = f'<span class="state">{_state(section)}</span>' if _state(section) else ''
        items.append(f'<li class="{section.status}"><a href="#s{number}">{html.escape(section.title)}</a>{state}</li>')
    plain = ' class="plain"' if _is_report(sections) else ''
    return f'<nav aria-label="Parts of this page"{plain}>{_progress(sections)}<ol>{"".join(items)}</ol></nav>'


def _is_report(sections: Sequence[Section]) -> bool:
    """Whether there is nothing to say about progress: all is done, and nobody took the time."""
    return all(section.status == 'done' and section.seconds is None for section in sections)


def _progress(sections: Sequence[Section]) -> str:
    if _is_report(sections):
        return ''
    closed = sum(s.status not in ('pending', 'running') for s in sections)
    share = 100 * closed / len(sections)
    return (
        f'<p class="count">{closed} of {len(sections)} parts finished</p>'
        f'<div class="bar" aria-hidden="true"><i style="width:{share:.0f}%"></i></div>')


def _state(section: Section) -> str:
    """`done · 1 min 5 s`, or `still to come · about 40 s`; nothing of what is done and was not timed."""
    text = STATUS[section.status]
    if section.seconds is None:
        return '' if section.status == 'done' else text
    about = '' if section.status in ('done', 'failed') else 'about '
    return f'{text} · {about}{duration(section.seconds)}'


def duration(seconds: float) -> str:
    """Seconds as a person says them: `0.4 s`, `12 s`, `2 min 5 s`, `1 h 3 min`."""
    if seconds < 9.95:
        return f'{seconds:.1f} s'
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f'{minutes // 60} h {minutes % 60} min'
    return ' '.join(f'{n} {unit}' for n, unit in ((minutes, 'min'), (rest, 's')) if n)


def _section(number: int, section: Section) -> str:
    headline = f'<p class="headline">{_inline(section.headline)}</p>' if section.headline else ''
    badge = f'<span class="badge">{_state(section)}</span>' if _state(section) else ''
    return (
        f'<section id="s{number}" class="{section.status}" aria-labelledby="h{number}">'
        f'<div class="head"><h2 id="h{number}">{html.escape(section.title)}</h2>'
        f'{badge}</div>'
        f'{headline}{_blocks(section.blocks)}</section>'
    )


def _blocks(blocks: Sequence[Block]) -> str:
    parts = []
    for is_figure, group in itertools.groupby(blocks, lambda block: isinstance(block, Figure)):
        inside = ''.join(map(_block, group))
        parts.append(f'<div class="figures">{inside}</div>' if is_figure else inside)
    return ''.join(parts)


def _block(block: Block) -> str:
    if isinstance(block, str):
        return _prose(block)
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Figure):
        return _figure(block)
    if isinstance(block, Stats):
        items = ''.join(f'<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>' for v, k in block.items)
        return f'<dl class="stats">{items}</dl>'
    if isinstance(block, Data):
        return f'<p class="data">{_download(block)}</p>'
    raise InputError(f'blocks: a {type(block).__name__} is not a block: use a str, Table, Figure, Stats or Data.')


def _prose(text: str) -> str:
    parts = []
    for paragraph in re.split(r'\n\s*\n', text.strip()) if text.strip() else []:
        if paragraph.startswith('$ '):
            parts.append(f'<pre tabindex="0"><code>{html.escape(paragraph[2:])}</code></pre>')
        else:
            parts.append(f'<p>{_inline(paragraph)}</p>')
    return ''.join(parts)


_UNIT = re.compile(r'(?<=\d) (?=(?:%|[kMGT]|s|ms|min|MB|GB|px)(?!\w))')  # the space that must not break: 98.2 %


def _inline(text: str) -> str:
    """Escape everything, then mark `code`, **bold** and [links](https://...) up; code is taken literally."""
    pieces = re.split(r'`([^`]+)`', text)  # every second piece was between backticks, and is set aside
    codes = iter([f'<code>{html.escape(piece)}</code>' for piece in pieces[1::2]])
    marked = html.escape('`'.join(pieces[::2]))
    marked = _UNIT.sub('\u00a0', marked)
    marked = re.sub(r'\*\*(.+?)\*\*', r'<strong>\1</strong>', marked)
    marked = re.sub(r'\[([^\]]+)\]\((https?://[^\s)]+)\)', r'<a href="\2">\1</a>', marked)
    return re.sub('`', lambda _: next(codes, '`'), marked)


def _table(table: Table) -> str:
    """A table that scrolls sideways by itself where the screen is narrow, the row's name staying in view."""
    right = table.numeric()
    head = ''.join(
        f'<th scope="col"{_CLASS_RIGHT if r else ""}>{_inline(c)}</th>' for c, r in zip(table.columns, right)
    )
    body = []
    for number, (row, texts) in enumerate(zip(table.rows, table.texts())):
        cells = []
        for column, (value, text) in enumerate(zip(row, texts)):
            tag, marks = ('td', _CLASS_RIGHT if right[column] else '') if column else ('th', ' scope="row"')
            cells.append(f'<{tag}{marks}{_key(value) if table.groups else ""}>{_lines(text)}</{tag}>')
        groups = f' data-groups="{html.escape("|".join(table.groups[number]))}"' if table.groups else ''
        body.append(f'<tr{groups}>{"".join(cells)}</tr>')
    label = html.escape(table.caption or 'Table')
    caption = f'<caption>{_inline(table.caption)}</caption>' if table.caption else ''
    scroll = (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table>{caption}'
        f'<thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )
    return f'<div class="sortable" data-label="{html.escape(table.group_label)}">{scroll}</div>' if table.groups \
        else scroll


_CLASS_RIGHT = ' class="n"'


def _lines(text: str) -> str:
    """The first line as it is, the others small."""
    first, *others = map(_inline, text.split('\n'))
    return first + ''.join(f'<small>{line}</small>' for line in others)


def _key(value: Cell) -> str:
    """What the script sorts a cell by, where that is a number."""
    number = value.key if isinstance(value, Sorted) else value
    return f' data-key="{number!r}"' if isinstance(number, (int, float)) and not isinstance(number, bool) else ''


def _cell(value: Cell) -> str:
    if value is None:
        return '–'
    if isinstance(value, Sorted):
        return value.text
    if isinstance(value, bool) or isinstance(value, str):
        return str(value)
    return f'{value:,}' if isinstance(value, int) else f'{value:,.4g}'


def _is_numeric(cells: Sequence[Cell]) -> bool:
    """Whether a column holds numbers, units included (`4.09 G`, `98.2 %`, `+0.4`); dashes do not decide."""
    cells = [c for c in cells if c not in (None, '', '–')]
    return bool(cells) and all(not isinstance(c, str) or re.match(r'[-+−±<>≤≥]? ?\d', c) for c in cells)


def _figure(figure: Figure) -> str:
    alt = html.escape(figure.alt)
    image = figure.image
    if isinstance(image, str) and ('currentColor' in image or 'var(--' in image):
        start = image.find('<svg')  # drops an XML declaration, which has no place inside HTML
        drawing = f'<div class="drawing" role="img" aria-label="{alt}">{image[start:]}</div>'
    else:
        data = image.encode() if isinstance(image, str) else image
        photograph = data[:2] == b'\xff\xd8'  # a JPEG, which has no transparent parts
        kind = 'jpeg' if photograph else 'png' if isinstance(image, bytes) else 'svg+xml'
        style = '' if photograph else ' class="paper"'
        drawing = f'<img{style} alt="{alt}" src="{_data_uri(data, f"image/{kind}")}">'
    words = ' '.join(filter(None, [_inline(figure.caption), _download(figure.data) if figure.data else '']))
    caption = f'<figcaption>{words}</figcaption>' if words else ''
    return f'<figure>{drawing}{caption}</figure>'


def _download(data: Data) -> str:
    """A link that saves the numbers as a file."""
    content = json.dumps(data.content, indent=1, default=str).encode()
    uri, name = _data_uri(content, 'application/json'), html.escape(data.name)
    return f'<a class="data" download="{name}" href="{uri}">{name}</a>'


def chart_file(chart: str, title: str, alt: str) -> str:
    """A chart of `moe_zoo.analysis.charts` as an SVG file of its own: on a card, light or dark as the reader's system.

    Args:
        chart: The SVG text, in the page's colours.
        title: Written above it.
        alt: What it shows, in words.
    """
    light, dark = re.findall(r':root {(.*?)}', STYLE.read_text(encoding='utf-8'), re.S)
    width, height = (float(number) for number in re.search(r'viewBox="0 0 (\S+) (\S+)"', chart).groups())
    inner = re.sub(r' width="[^"]*"', f' x="20" y="46" width="{width:g}" height="{height:g}"', chart, count=1)
    style = f'svg {{{light}  color: var(--ink);\n}}\n@media(prefers-color-scheme:dark) {{\n  svg {{{dark}}}\n}}'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 40:g} {height + 60:g}" width="{width + 40:g}" '
        f'fill="currentColor" font-family="system-ui, sans-serif" role="img" aria-label="{html.escape(alt)}">\n'
        f'<style>\n{style}\n</style>\n'
        f'<rect width="100%" height="100%" rx="8" fill="var(--card)" stroke="var(--line)"/>\n'
        f'<text x="20" y="30" font-size="14" font-weight="600">{html.escape(title)}</text>\n{inner}\n</svg>\n')


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    if not facts:
        return ''
    items = ''.join(f'<div><dt>{html.escape(k)}</dt><dd>{_inline(v)}</dd></div>' for k, v in facts)
    return f'<footer class="wrap"><h2>About this run</h2><dl>{items}</dl></footer>'


def _data_uri(data: bytes, kind: str) -> str:
    return f'data:{kind};base64,{base64.b64encode(data).decode()}'


# One router, four experts: the mark of the project and the page's icon. Colours of its own, for the icon has no page.
_MARK = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="32" height="32" aria-hidden="true">'
    '<g fill="none" stroke="#7b8794" stroke-width="2">'
    '<path d="M7 16C15 16 15 5 24 5M7 16C15 16 15 12.3 24 12.3M7 16C15 16 15 19.7 24 19.7M7 16C15 16 15 27 24 27"/></g>'
    '<circle cx="6" cy="16" r="4.5" fill="#7b8794"/><circle cx="26" cy="5" r="3.5" fill="#0e8a8a"/>'
    '<circle cx="26" cy="12.3" r="3.5" fill="#d9822b"/><circle cx="26" cy="19.7" r="3.5" fill="#4c6fd1"/>'
    '<circle cx="26" cy="27" r="3.5" fill="#b8448f"/></svg>'
)

# Only while something runs. Without scripting the text before the box is still true.
_WATCH = (
    '<p class="watch">This run is still going: reload to see more. <label hidden><input type="checkbox" checked> '
    'Reload by itself every 10 seconds</label></p>'
    '<script>(()=>{const l=document.querySelector(".watch label"),b=l.firstChild;l.hidden=false;'
    'try{b.checked=sessionStorage.watch!=="no";b.onchange=()=>{sessionStorage.watch=b.checked?"":"no"}}catch(e){}'
    'setInterval(()=>{if(b.checked)location.reload()},10000)})()</script>'
)
