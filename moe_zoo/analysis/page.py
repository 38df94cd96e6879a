"""The one page writer: sections in, one self-contained HTML file out. Standard library only.

A page is a list of sections; a section is a title, a status, a headline and blocks (prose, tables, figures, key
numbers). `Page.write` renders all of it and renames the file into place, so that a run calls it after every stage
and a reader always finds a whole page that says what is done, what is running and what is still to come. The file
needs no network: its style is inline, its images are data URIs, and it follows the reader's light or dark setting.
"""
import base64
import html
import os
import re
from dataclasses import dataclass, field
from typing import Sequence, Union

from moe_zoo.errors import InputError, atomic_write

__all__ = ['Figure', 'Page', 'Section', 'Stats', 'Table']

Cell = Union[str, int, float, None]
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
    """
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ''

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise InputError(f'rows: {row!r} has {len(row)} cells, but the table has {len(self.columns)} columns.')


@dataclass(frozen=True)
class Figure:
    """An image: SVG text, or the bytes of a PNG or JPEG file. `alt` says in words what it shows.

    An SVG that draws in `currentColor` or in the page's colours (`var(--ink)`, `var(--expert-0)`, ...) is put in line
    and follows light and dark. Any other image is shown as it is, on white paper.
    """
    image: Union[str, bytes]
    alt: str
    caption: str = ''


@dataclass(frozen=True)
class Stats:
    """A few key numbers, large: pairs of (value, what it is)."""
    items: Sequence[tuple[str, str]]


Block = Union[str, Table, Figure, Stats]


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
        unfinished = any(s.status in ('pending', 'running') for s in self.sections)
        return '\n'.join([
            '<!doctype html>',
            '<html lang="en">',
            '<head>',
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f'<title>{html.escape(self.title)}</title>',
            f'<link rel="icon" href="{_data_uri(_MARK.encode(), "image/svg+xml")}">',
            f'<style>{_STYLE}</style>',
            '</head>',
            '<body>',
            '<header class="wrap">',
            f'<p class="brand">{_MARK}<span>moe_zoo</span></p>',
            f'<h1>{html.escape(self.title)}</h1>',
            f'<div class="lead">{_prose(self.lead)}</div>',
            _contents(self.sections),
            _WATCH if unfinished else '',
            '</header>',
            '<main class="wrap">',
            *(_section(number, section) for number, section in enumerate(self.sections, 1)),
            '</main>',
            _facts(self.facts),
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
        items.append(
            f'<li class="{section.status}"><a href="#s{number}">{html.escape(section.title)}</a>'
            f'<span class="state">{_state(section)}</span></li>'
        )
    closed = sum(s.status not in ('pending', 'running') for s in sections)
    label = f'{closed} of {len(sections)} parts finished'
    return (
        f'<nav aria-label="Parts of this page"><p class="count">{label}</p>'
        f'<div class="bar" role="img" aria-label="{label}"><i style="width:{100 * closed / len(sections):.0f}%"></i></div>'
        f'<ol>{"".join(items)}</ol></nav>'
    )


def _state(section: Section) -> str:
    """`done · 1 min 5 s`, or `still to come · about 40 s`."""
    text = STATUS[section.status]
    if section.seconds is None:
        return text
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
    return (
        f'<section id="s{number}" class="{section.status}" aria-labelledby="h{number}">'
        f'<div class="head"><h2 id="h{number}">{html.escape(section.title)}</h2>'
        f'<span class="badge">{_state(section)}</span></div>'
        f'{headline}{"".join(_block(b) for b in section.blocks)}</section>'
    )


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
    raise InputError(f'blocks: a {type(block).__name__} is not a block: use a str, Table, Figure or Stats.')


def _prose(text: str) -> str:
    parts = []
    for paragraph in re.split(r'\n\s*\n', text.strip()) if text.strip() else []:
        if paragraph.startswith('$ '):
            parts.append(f'<pre tabindex="0"><code>{html.escape(paragraph[2:])}</code></pre>')
        else:
            parts.append(f'<p>{_inline(paragraph)}</p>')
    return ''.join(parts)


def _inline(text: str) -> str:
    """Escape everything, then mark `code`, **bold** and [links](https://...) up; code is taken literally."""
    pieces = re.split(r'`([^`]+)`', text)  # every second piece was between backticks
    for i, piece in enumerate(pieces):
        piece = html.escape(piece)
        if i % 2:
            pieces[i] = f'<code>{piece}</code>'
        else:
            piece = re.sub(r'(?<=\d) (?=(?:%|[kMGTµm]|s|ms|min|MB|GB)(?!\w))', '\u00a0', piece)  # 98.2 % stays on one line
            piece = re.sub(r'\*\*(.+?)\*\*', r'<strong>\1</strong>', piece)
            pieces[i] = re.sub(r'\[([^\]]+)\]\((https?://[^\s)]+)\)', r'<a href="\2">\1</a>', piece)
    return ''.join(pieces)


def _table(table: Table) -> str:
    """A table that scrolls sideways by itself where the screen is narrow, the row's name staying in view."""
    right = [_is_numeric([row[i] for row in table.rows]) for i in range(len(table.columns))]
    head = ''.join(
        f'<th scope="col"{_CLASS_RIGHT if r else ""}>{_inline(c)}</th>' for c, r in zip(table.columns, right)
    )
    body = []
    for row in table.rows:
        cells = [f'<th scope="row">{_inline(_cell(row[0]))}</th>'] if row else []
        cells += [f'<td{_CLASS_RIGHT if r else ""}>{_inline(_cell(c))}</td>' for c, r in zip(row[1:], right[1:])]
        body.append(f'<tr>{"".join(cells)}</tr>')
    label = html.escape(table.caption or 'Table')
    caption = f'<caption>{_inline(table.caption)}</caption>' if table.caption else ''
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table>{caption}'
        f'<thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


_CLASS_RIGHT = ' class="n"'


def _cell(value: Cell) -> str:
    if value is None:
        return '–'
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
        kind = 'image/svg+xml'
        if isinstance(image, bytes):
            kind = 'image/jpeg' if image[:2] == b'\xff\xd8' else 'image/png'
        data = image.encode() if isinstance(image, str) else image
        drawing = f'<img class="paper" alt="{alt}" src="{_data_uri(data, kind)}">'
    caption = f'<figcaption>{_inline(figure.caption)}</figcaption>' if figure.caption else ''
    return f'<figure>{drawing}{caption}</figure>'


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

# Only on an unfinished page. Without scripting the text before the box is still true.
_WATCH = (
    '<p class="watch">This run is still going: reload to see more. <label hidden><input type="checkbox" checked> '
    'Reload by itself every 10 seconds</label></p>'
    '<script>(()=>{const l=document.querySelector(".watch label"),b=l.firstChild;l.hidden=false;'
    'try{b.checked=sessionStorage.watch!=="no";b.onchange=()=>{sessionStorage.watch=b.checked?"":"no"}}catch(e){}'
    'setInterval(()=>{if(b.checked)location.reload()},10000)})()</script>'
)

_STYLE = '''
:root{color-scheme:light dark;--paper:#f5f7f8;--card:#fff;--ink:#16222c;--soft:#52616d;--line:#d8dfe4;--wash:#edf1f3;
--accent:#0b6f73;--good:#1c7a43;--warn:#9a5b00;--bad:#b3261e;
--expert-0:#0e8a8a;--expert-1:#d9822b;--expert-2:#4c6fd1;--expert-3:#b8448f;
--expert-4:#6a9a2d;--expert-5:#c4453c;--expert-6:#7a5cc0;--expert-7:#8a7440}
@media(prefers-color-scheme:dark){:root{--paper:#0f161b;--card:#172027;--ink:#e4eaee;--soft:#9fb0bc;--line:#2c3942;
--wash:#1e2931;--accent:#5fc9c6;--good:#6fcf8f;--warn:#e9b25c;--bad:#ff8f84;
--expert-0:#3fb8b4;--expert-1:#eba04f;--expert-2:#86a2f2;--expert-3:#dd7fbb;
--expert-4:#98c65a;--expert-5:#ec7f75;--expert-6:#ab92ec;--expert-7:#c2ac74}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--paper);color:var(--ink);line-height:1.55;
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",Arial,sans-serif}
.wrap{max-width:60rem;margin:0 auto;padding:0 1.25rem}
header{padding-top:2rem!important}
.brand{display:flex;align-items:center;gap:.6rem;margin:0 0 1.5rem;color:var(--soft);
font:600 1rem/1 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
h1{font-size:clamp(1.75rem,1.2rem + 2.4vw,2.6rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 .75rem;text-wrap:balance}
h2{font-size:1.3rem;line-height:1.25;letter-spacing:-.01em;margin:0}
p{margin:.75rem 0;max-width:44rem}
.lead{font-size:1.1rem;color:var(--soft)}.lead p{margin-top:0}
a{color:var(--accent);text-underline-offset:.15em}
a:focus-visible,[tabindex]:focus-visible,input:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;background:var(--wash);
padding:.1em .3em;border-radius:4px;overflow-wrap:anywhere}
pre{background:var(--wash);border-radius:8px;padding:.8rem 1rem;overflow-x:auto;margin:.9rem 0}
pre code{background:none;padding:0;overflow-wrap:normal}
nav{margin:1.75rem 0 1rem}
.count{margin:0 0 .4rem;font-size:.9rem;color:var(--soft)}
.bar{height:6px;border-radius:3px;background:var(--line);overflow:hidden}.bar i{display:block;height:100%;background:var(--accent)}
nav ol{list-style:none;margin:.9rem 0 0;padding:0;display:grid;gap:.1rem 2rem;grid-template-columns:repeat(auto-fit,minmax(17rem,1fr))}
nav li{padding:.4rem 0 .5rem 1.3rem;border-bottom:1px solid var(--line);position:relative;line-height:1.35}
nav li::before{content:"";position:absolute;left:.1rem;top:.65rem;width:.6rem;height:.6rem;border-radius:50%;border:2px solid var(--soft)}
nav li.done::before{background:var(--good);border-color:var(--good)}
nav li.running::before{background:var(--accent);border-color:var(--accent)}
nav li.failed::before{background:var(--bad);border-color:var(--bad);border-radius:2px}
nav li.skipped::before{border-radius:2px;height:0;top:.9rem;border-width:0 0 3px}
nav li a{color:var(--ink);text-decoration:none}nav li a:hover{text-decoration:underline}
.state{display:block;font-size:.85rem;color:var(--soft)}
.watch{font-size:.9rem;color:var(--soft)}.watch label{white-space:nowrap}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:1.5rem;margin:1.25rem 0;scroll-margin-top:1rem}
section>:last-child{margin-bottom:0}
section.pending,section.skipped{background:none;border-style:dashed}
.head{display:flex;flex-wrap:wrap;justify-content:space-between;align-items:baseline;gap:.25rem 1rem}
.badge{font-size:.85rem;color:var(--soft)}
.done .badge{color:var(--good)}.running .badge{color:var(--accent);font-weight:600}
.failed .badge{color:var(--bad);font-weight:600}.skipped .badge{color:var(--warn)}
.headline{font-size:1.1rem;margin:.6rem 0 1rem}
.pending .headline,.skipped .headline{color:var(--soft);font-size:1rem;margin-bottom:0}
.stats{display:grid;grid-template-columns:repeat(auto-fit,minmax(9rem,1fr));gap:1rem 1.5rem;margin:1.25rem 0}
.stats div{display:flex;flex-direction:column-reverse;justify-content:flex-end;border-left:3px solid var(--accent);padding-left:.8rem}
.stats dd{margin:0;font-size:1.6rem;font-weight:650;line-height:1.2;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.stats dt{font-size:.88rem;color:var(--soft);line-height:1.35}
.scroll{overflow-x:auto;margin:1.1rem 0;max-width:100%}
table{border-collapse:collapse;width:100%;font-size:.94rem;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--soft);font-size:.9rem;padding-bottom:.5rem;caption-side:top}
th,td{text-align:left;padding:.45rem .9rem .45rem 0;border-bottom:1px solid var(--line);vertical-align:baseline}
thead th{font-size:.85rem;color:var(--soft);font-weight:600;border-bottom:2px solid var(--line);vertical-align:bottom}
tbody th{font-weight:600;position:sticky;left:0;background:var(--card)}
tbody tr:last-child>*{border-bottom:0}
td+td,th+td,th+th{padding-left:.9rem}
.n{text-align:right;padding-right:.2rem;white-space:nowrap}
figure{margin:1.25rem 0}
figcaption{font-size:.9rem;color:var(--soft);margin-top:.5rem;max-width:44rem}
.drawing{overflow-x:auto}.drawing svg{display:block;max-width:100%;height:auto}
.paper{display:block;max-width:100%;height:auto;background:#fff;border-radius:8px;padding:.5rem}
footer{padding-top:1rem!important;padding-bottom:3rem!important;color:var(--soft);font-size:.9rem}
footer h2{font-size:1rem;color:var(--ink);margin-bottom:.5rem}
footer dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(15rem,1fr));gap:.5rem 2rem;margin:0}
footer dt{font-weight:600}footer dd{margin:0;overflow-wrap:anywhere}
@media(max-width:36rem){section{padding:1.1rem;border-radius:10px}.wrap{padding:0 .8rem}
.stats{grid-template-columns:1fr 1fr}.stats dd{font-size:1.3rem}tbody th{max-width:45vw}}
@media print{body{background:#fff}section{break-inside:avoid}.watch{display:none}}
@media(prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
'''
