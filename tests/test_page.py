"""The page writer: whole, self-contained, escaped, honest about what is still to come, never half-written."""
import base64
import json
import re
from html.parser import HTMLParser

import pytest

from moe_zoo.analysis.page import Data, Figure, Page, Section, Sorted, Stats, Table, duration
from moe_zoo.errors import InputError

VOID = {'meta', 'link', 'img', 'input', 'br', 'path', 'circle', 'rect'}


class Checker(HTMLParser):
    """Holds what a browser would be told: balanced tags, attributes by tag, visible text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(text)
        assert not self.open, f'left open: {self.open}'

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f'</{tag}> closes nothing'

    def handle_data(self, data):
        if not {'style', 'script'} & set(self.open):
            self.text.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(*blocks, **section):
    return Page('A title', 'A lead.', [Section('A part', blocks=blocks, **section)])


def test_a_page_is_one_balanced_document_that_fetches_nothing():
    png = b'\x89PNG\r\n\x1a\n0000'
    svg = '<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"><rect fill="red"/></svg>'
    blocks = ['Prose.', Stats([('3', 'things')]), Table(['a', 'b'], [['x', 1]]), Figure(png, 'p'), Figure(svg, 's')]
    checker = Checker(page_of(*blocks, status='running').html())
    sources = [a[k] for _, a in checker.tags for k in ('src', 'href') if k in a]
    assert len(sources) == 4  # the icon, the link to the part, two images
    assert all(s.startswith(('data:', '#')) for s in sources)
    assert '@import' not in page_of().html() and 'url(' not in page_of().html()


def test_every_status_is_said_in_words_and_open_ones_say_what_is_to_come():
    page = Page('T', '', [
        Section('One', 'done', seconds=65.2),
        Section('Two', 'running', seconds=40),
        Section('Three', 'pending', 'Will show usage.', seconds=20),
        Section('Four', 'skipped', 'No detectron2.'),
    ])
    text = ' '.join(Checker(page.html()).text)
    assert '2 of 4 parts finished' in text
    assert 'done · 1 min 5 s' in text
    assert 'running now · about 40 s' in text
    assert 'still to come · about 20 s' in text and 'Will show usage.' in text
    assert 'This run is still going' in text
    page.sections = [Section('One', 'done'), Section('Four', 'skipped'), Section('Five', 'failed'), Section('Six')]
    text = ' '.join(Checker(page.html()).text)
    assert '3 of 4 parts finished' in text
    assert 'still going' not in text  # where nothing runs, nothing asks for a reload, and there is no script
    assert '<script' not in page.html()


def test_text_is_escaped_everywhere():
    evil = '<script>alert("x")</script>&'
    page = Page(evil, evil, [Section(evil, 'done', evil, [
        evil, f'`{evil}`', Stats([(evil, evil)]), Table([evil], [[evil]], evil), Figure(b'\x89PNG', evil, evil),
    ])], [(evil, evil)])
    checker = Checker(page.html())
    assert not checker.all('script')
    assert checker.all('img')[0]['alt'] == evil
    # title, h1, lead, contents; h2, headline, prose, code; 2 of the numbers, 3 of the table, 1 of the figure; 2 facts
    assert sum('alert("x")' in t for t in checker.text) == 4 + 4 + 2 + 3 + 1 + 2


def test_inline_marks():
    html = page_of('Use `a **b** [c](https://d)` **now**, see [e](https://f.org/g?h=1&i) not [j](javascript:k).').html()
    assert '<code>a **b** [c](https://d)</code> <strong>now</strong>' in html
    assert '<a href="https://f.org/g?h=1&amp;i">e</a>' in html
    assert '[j](javascript:k)' in html
    assert '<strong><code>a</code> b</strong> one ` alone' in page_of('**`a` b** one ` alone').html()
    assert '98.2\u00a0% in 3\u00a0s of 12 steps' in page_of('98.2 % in 3 s of 12 steps').html()


def test_paragraphs_and_commands():
    html = page_of('One.\n\nTwo.\n\n$ moe-zoo list <all>').html()
    assert '<p>One.</p><p>Two.</p><pre tabindex="0"><code>moe-zoo list &lt;all&gt;</code></pre>' in html


def test_a_table_is_accessible_and_aligns_numbers():
    table = Table(['model', 'parameters', 'top-1', 'note'],
                  [['a', 129872800, '98.2 %', 'x'], ['b', None, 0.123456, '3']], 'Counted')
    html = page_of(table).html()
    checker = Checker(html)
    assert [(a.get('scope'), a.get('class')) for a in checker.all('th')] == [
        ('col', None), ('col', 'n'), ('col', 'n'), ('col', None), ('row', None), ('row', None)]
    assert '<caption>Counted</caption>' in html
    scroll = [a for a in checker.all('div') if a.get('class') == 'scroll']
    assert scroll == [{'class': 'scroll', 'role': 'region', 'tabindex': '0', 'aria-label': 'Counted'}]
    assert re.findall(r'<td class="n">([^<]*)</td>', html) == ['129,872,800', '98.2\u00a0%', '–', '0.1235']


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(InputError, match=r"rows: \['a'\] has 1 cells, but the table has 2 columns"):
        Table(['x', 'y'], [['a']])


def test_unknown_status_and_block_are_refused():
    with pytest.raises(InputError, match=r"status='finished' is not known: use one of done, running, pending"):
        Section('A', 'finished')
    with pytest.raises(InputError, match='a dict is not a block: use a str, Table, Figure, Stats or Data'):
        page_of({}).html()


def test_figures_follow_the_theme_only_when_drawn_in_its_colours():
    themed = '<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><path fill="var(--expert-0)"></path></svg>'
    html = page_of(Figure(themed, 'bars')).html()
    assert '<div class="drawing" role="img" aria-label="bars"><svg' in html and '<?xml' not in html
    plain = themed.replace('var(--expert-0)', '#123456')
    image = Checker(page_of(Figure(plain, 'plot')).html()).all('img')[0]
    assert image['class'] == 'paper' and image['alt'] == 'plot'
    assert base64.b64decode(image['src'].removeprefix('data:image/svg+xml;base64,')).decode() == plain
    jpeg = Checker(page_of(Figure(b'\xff\xd8\xff', 'photo')).html()).all('img')[0]
    assert jpeg['src'].startswith('data:image/jpeg;base64,')


@pytest.mark.parametrize('seconds, text', [
    (0.04, '0.0 s'), (9.94, '9.9 s'), (9.96, '10 s'), (59.6, '1 min'), (125, '2 min 5 s'), (3780, '1 h 3 min'),
])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_writing_renames_into_place_and_a_failure_keeps_the_old_page(tmp_path):
    path = tmp_path / 'runs' / 'index.html'
    page_of('first').write(path)
    assert 'first' in path.read_text(encoding='utf-8')
    with pytest.raises(InputError, match='is not a block'):
        page_of(3.5).write(path)
    assert 'first' in path.read_text(encoding='utf-8')
    assert [p.name for p in path.parent.iterdir()] == ['index.html']


def test_a_table_of_groups_brings_its_script_and_says_what_to_sort_by():
    table = Table(['run', 'MACs', 'epochs', 'note'], [
        ['a', Sorted('4.09 G\n1.2 × its twin', 4.09e9), 12, 'x'], ['b', Sorted('830 M', 8.3e8), None, None]],
        groups=[['vmoe'], ['dense', 'vmoe & <co>']], group_label='Family')
    html = page_of(table).html()
    checker = Checker(html)
    keys = [cell.get('data-key') for cell in checker.all('td')]
    assert keys == ['4090000000.0', '12', None, '830000000.0', None, None]
    assert [row.get('data-groups') for row in checker.all('tr')] == [None, 'vmoe', 'dense|vmoe & <co>']
    assert '<div class="sortable" data-label="Family">' in html and '<small>1.2 × its twin</small>' in html
    assert html.count('<script>') == 1 and '<body class="wide">' in html
    assert '<button' not in html and '<input' not in html  # which only the script brings: nothing that does nothing
    plain = page_of(Table(table.columns, table.rows)).html()
    assert '<script' not in plain and 'data-key' not in plain and '<body>' in plain


def test_groups_are_one_for_each_row():
    with pytest.raises(InputError, match='groups: there are 1 of them for 2 rows'):
        Table(['a'], [['x'], ['y']], groups=[['g']])


def test_numbers_can_be_taken_away():
    content = {'a <b>': [1, .5, None]}
    figure = Figure('<svg fill="currentColor"></svg>', 'a chart', 'A chart.', Data('chart.json', content))
    links = Checker(page_of(figure, Data('all "it".json', content)).html()).all('a')
    links = [link for link in links if 'download' in link]
    assert [link['download'] for link in links] == ['chart.json', 'all "it".json']
    for link in links:
        head, _, data = link['href'].partition(',')
        assert head == 'data:application/json;base64' and json.loads(base64.b64decode(data)) == content


def test_a_finished_page_that_was_not_timed_says_nothing_of_progress():
    text = ' '.join(Checker(page_of(status='done').html()).text)
    assert 'parts finished' not in text and 'done' not in text
