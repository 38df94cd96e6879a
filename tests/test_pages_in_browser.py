"""Every page as a reader meets it in Chromium: nothing goes wrong, nothing is fetched or cut off, all that moves works.

Each page is made by the tool that writes it, in miniature, the first time that a test asks for it.
"""
import json
import os

import pytest
from browser import Browser, find_browser

WIDTHS = (400, 1400)
PAGES = {}  # name -> function of (folder, repository, patch) that makes the page and returns its file


def page(function):
    """Enter the maker of a page."""
    PAGES[function.__name__] = function
    return function


@page
def demo(folder, repository, patch):
    pytest.importorskip('sklearn')
    from test_demo import miniature_settings, run

    from moe_zoo.demo import STAGES
    run(miniature_settings(folder, patch), STAGES)
    return folder / 'index.html'


@page
def experts(folder, repository, patch):
    """The longest kind of this page: a router of tokens, whose choices are drawn over images."""
    pytest.importorskip('sklearn')
    from moe_zoo.engine.analyze_experts import main
    small = dict(patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[0, 1], num_experts=3)
    main(['--model', 'vmoe_vit_s', 'dataset=digits', 'val_split=test', 'device=cpu', 'img_size=16',
          f'model_kwargs={json.dumps(dict(small, representation_size=0))}', '--max-images', '22', '--images', '2',
          '--no-figures', '--out', str(folder)])
    return folder / 'index.html'


@page
def object_sizes(folder, repository, patch):
    pytest.importorskip('detectron2')
    from moe_zoo.data import write_scenes
    from moe_zoo.detection.object_sizes import main
    scenes = write_scenes(folder / 'scenes', train=8, val=12, classes=range(5))
    main(['--config-file', str(repository / 'configs/demo/retinanet_digits.yaml'), '--trials', 'none', '--pictures',
          '2', '--control', 'planted', '--output', str(folder), 'MOE.DATA.ROOT', str(scenes)])
    return folder / 'index.html'


@page
def reproduce(folder, repository, patch):
    """Every published experiment."""
    from moe_zoo.reproduce import report
    sections = [report.section(results) for _, results in report._published(repository / 'docs' / 'experiments')]
    report.Page(report.TITLE, report.LEAD, sections).write(folder / 'index.html')
    return folder / 'index.html'


@page
def report(folder, repository, patch):
    """Six models of chosen numbers on two data sets, and a folder that is no finished run."""
    from run_files import epochs, iterations, write_classifier, write_detector

    from moe_zoo.analysis.report_page import report_page
    from moe_zoo.analysis.runs import read_runs
    runs = folder / 'runs'
    for seed, score in ((0, 81.), (1, 83.)):  # 82 ± 1.41
        write_classifier(runs / 'vit' / f'seed{seed}', epochs(70., score, **{'blocks.9.mlp': [.8, .9]}), seed=seed)
        write_classifier(runs / 'vit' / f'seed{seed}' / 'twin', epochs(60., score - 3), model='vit_small_patch16_224',
                         seed=seed)
    write_classifier(runs / 'mixed_with_a_long_name', epochs(50., 90., fc=[.9, 1.]), model='condconv_resnet18')
    write_classifier(runs / 'dense', epochs(50., 9.5), model='resnet18')
    write_classifier(runs / 'unfinished', epochs(50.), epochs=9)
    write_detector(runs / 'cells', iterations((.5, .5), (.25, .75)), {'bbox': {'AP': 33., 'AP50': 50.}})
    plain = [{'iteration': n, 'total_loss': 3. - n / 50} for n in (19, 39)]
    write_detector(runs / 'cells_dense', plain, {'bbox': {'AP': 31.}}, stages=())
    found = read_runs([runs])
    for number, run in enumerate(found.runs):
        run.measured = measured_by_hand(run, number + 1) if run.name != 'dense' else None
    report_page(found, [('Written by', 'a test')]).write(folder / 'index.html')
    return folder / 'index.html'


def measured_by_hand(run, number):
    from moe_zoo.analysis.runs import LayerUse, Measured
    share = (.4, .3, .1, .1, .05, .05, 0., 0.)
    layers = tuple(LayerUse(f'blocks.{n}.with_a_long_name.mlp', share, share, .7, .02, (6, 7)) for n in range(12))
    cost = 10. ** (12 - number)
    return Measured(
        4, (3, 224, 224), 1000 * number, 500 * number, cost, cost, cost / 20, (), layers if run.routed else (),
        tuple(number / 1000 * f for f in (.9, 1., 1.1)), 'one', {
            'device': 'a chip', 'cores': 2, 'threads': 1, 'load': .5, 'torch': '2', 'timm': '1'})


SLOW = ('demo', 'object_sizes')
every_page = pytest.mark.parametrize(
    'name', [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PAGES])
every_width = pytest.mark.parametrize('width', WIDTHS)


@pytest.fixture(scope='module')
def browser():
    executable = find_browser()
    if executable is None:
        reason = 'pages are tested in Chromium, and none is on the PATH (Debian: apt-get install chromium)'
        pytest.fail(reason) if os.environ.get('MOE_ZOO_REQUIRE_BROWSER') else pytest.skip(reason)
    with Browser(executable) as started:
        yield started


@pytest.fixture(scope='module')
def made(browser, tmp_path_factory, repository):
    """Name of a page to its file; each is made once."""
    files = {}

    def file_of(name):
        if name not in files:
            with pytest.MonkeyPatch.context() as patch:
                files[name] = PAGES[name](tmp_path_factory.mktemp(name), repository, patch)
        return files[name]

    return file_of


def cut_off(tab, width):
    """What reaches over the sides of the window, without what a box of its own scrolls."""
    tab.resize(width)
    return tab.evaluate("""(() => {
        const root = document.documentElement, edge = Math.min(root.clientWidth, %d) + 1;
        const scrolls = e => e !== document.body && getComputedStyle(e).overflowX !== 'visible';
        const boxed = e => e && e !== root && (scrolls(e) || boxed(e.parentElement));
        const over = [...document.body.querySelectorAll('*')].filter(e => {
            const box = e.getBoundingClientRect();
            return box.width && (box.right > edge || box.left < -1) && !boxed(e.parentElement);
        }).map(e => `${e.tagName} ${e.className} ${e.textContent.slice(0, 40)}`);
        return root.scrollWidth > edge ? [`the page is ${root.scrollWidth} wide`, ...over] : over;
    })()""" % width)


def clipped_text(tab):
    """Words of drawings that their drawing cuts off."""
    return tab.evaluate("""[...document.querySelectorAll('svg text')].filter(e => {
        const box = e.getBoundingClientRect(), whole = e.ownerSVGElement.getBoundingClientRect();
        return box.width && (box.left < whole.left - 2 || box.right > whole.right + 2
            || box.top < whole.top - 2 || box.bottom > whole.bottom + 2);
    }).map(e => `${e.textContent} (${e.closest('[aria-label]')?.ariaLabel.slice(0, 60)})`)""")


@every_page
def test_nothing_goes_wrong_and_nothing_is_fetched(browser, made, name):
    with browser.open(made(name)) as tab:
        assert tab.evaluate('document.title') and tab.evaluate('document.querySelectorAll("section").length') > 0
        tab.settle()
        assert tab.evaluate('[...document.images].filter(i => !i.complete || !i.naturalWidth).length') == 0
        assert tab.problems == [] and tab.requests == []


@every_page
@every_width
def test_nothing_is_cut_off(browser, made, name, width):
    with browser.open(made(name), width) as tab:
        assert cut_off(tab, width) == []
        assert clipped_text(tab) == []


@every_page
@every_width
def test_links_lead_to_their_parts(browser, made, name, width):
    with browser.open(made(name), width) as tab:
        links = tab.evaluate('[...document.querySelectorAll(\'a[href^="#"]\')].map(a => a.getAttribute("href"))')
        assert links
        for number, link in enumerate(links):
            tab.click('a[href^="#"]', number)
            top, bottom = tab.evaluate(f"""(() => {{
                const box = document.getElementById({json.dumps(link[1:])}).getBoundingClientRect();
                return [box.top, box.bottom];
            }})()""")
            assert tab.evaluate('location.hash') == link
            assert top < 900 and bottom > 0, f'{link} is not in the window'


@every_page
def test_what_can_be_saved_is_json(browser, made, name):
    with browser.open(made(name)) as tab:
        names = tab.evaluate('[...document.querySelectorAll("a[download]")].map(a => a.download)')
    assert len(names) == len(set(names)) and all(file.endswith('.json') for file in names)
    for first in range(0, len(names), 8):  # Chromium lets a tab save ten files, then asks
        with browser.open(made(name)) as tab:
            for number in range(first, min(first + 8, len(names))):
                assert json.loads(tab.download('a[download]', number), parse_constant=pytest.fail)
            assert tab.problems == [] and tab.requests == []


# ---- what moves on the page of a report

ROWS = '[...document.querySelector(".sortable tbody").rows]'


def shown(tab):
    """Names of the runs in the table, from top to bottom, without the hidden ones."""
    return tab.evaluate(f'{ROWS}.filter(r => r.offsetHeight).map(r => r.cells[0].firstChild.textContent)')


def test_every_figure_of_a_report_has_its_numbers(browser, made):
    with browser.open(made('report')) as tab:
        links = '.map(figure => figure.querySelectorAll("a[download]").length)'
        saved = tab.evaluate(f'[...document.querySelectorAll("figure")]{links}')
        assert len(saved) >= 12 and set(saved) == {1}  # 2 data sets: costs and curves; of each mixture use and balance
        assert 'runs.json' in tab.evaluate('[...document.querySelectorAll("a[download]")].map(a => a.download)')


@every_width
def test_a_report_sorts_by_every_column(browser, made, width):
    with browser.open(made('report'), width) as tab:
        before = shown(tab)
        assert len(before) == 6
        columns = tab.evaluate('[...document.querySelectorAll(".sortable")[0].querySelectorAll("thead th")].length')
        for column in range(columns):
            seen = []
            for _ in range(2):
                tab.click('.sortable thead button', column)
                direction, cells = tab.evaluate(f"""[
                    document.querySelectorAll('.sortable thead th')[{column}].getAttribute('aria-sort'),
                    {ROWS}.map(r => r.cells[{column}])
                        .map(c => c.dataset.key ? Number(c.dataset.key) : c.firstChild.textContent)
                ]""")
                there = [cell for cell in cells if cell != '–']
                assert cells == there + ['–'] * (len(cells) - len(there)), 'what is missing comes last'
                assert there == sorted(there, reverse=direction == 'descending')
                assert sorted(shown(tab)) == sorted(before)
                seen.append(direction)
            assert sorted(seen) == ['ascending', 'descending']
            assert tab.evaluate('document.querySelectorAll(".sortable")[0].querySelectorAll("[aria-sort]").length') == 1
        assert tab.problems == []


def test_the_first_click_on_a_number_puts_the_largest_on_top(browser, made):
    with browser.open(made('report')) as tab:
        tab.click('.sortable thead button', 1)  # 90, 82, 79, 33, 31 and 9.5, which letters would put first
        assert shown(tab) == ['mixed_with_a_long_name', 'vit', 'vit/twin', 'cells', 'cells_dense', 'dense']
        tab.evaluate('document.querySelector(".sortable thead button").focus()')
        tab.press('Enter')
        assert shown(tab) == ['cells', 'cells_dense', 'dense', 'mixed_with_a_long_name', 'vit', 'vit/twin']


@every_width
def test_a_report_filters_by_words_and_by_family(browser, made, width):
    def count():
        return tab.evaluate('document.querySelector(".sortable output").textContent')

    with browser.open(made('report'), width) as tab:
        assert count() == '6 of 6 shown'
        tab.click('.sortable input')
        tab.type('VIT patch16')  # both words, whatever their case
        assert shown(tab) == ['vit/twin'] and count() == '1 of 6 shown'
        tab.type(' nothing of the kind')
        assert shown(tab) == [] and count() == '0 of 6 shown'
        tab.evaluate('document.querySelector(".sortable input").select()')
        tab.type('res')
        assert set(shown(tab)) == {'mixed_with_a_long_name', 'dense'}
        tab.evaluate("""(() => {
            const choice = document.querySelector('.sortable select');
            choice.value = 'condconv';
            choice.dispatchEvent(new Event('change', {bubbles: true}));
        })()""")
        assert 'mixed_with_a_long_name' in shown(tab) and 'vit' not in shown(tab)
        assert cut_off(tab, width) == [] and tab.problems == []


# ---- what is checked can fail

BAD = """<!doctype html><title>Bad</title><meta name="viewport" content="width=device-width, initial-scale=1">
<div style="width: 2000px" class="wide">wide</div><div style="overflow-x: auto"><p style="width: 3000px">boxed</p></div>
<svg viewBox="0 0 100 20" width="100"><text x="60" y="15">longer than its drawing</text></svg>
<img src="http://example.invalid/a.png"><script>console.error("a complaint"); setTimeout(() => missing(), 0)</script>
<a href="data:application/json,%5B1%5D" download="one.json">raw</a><section>"""


def test_what_is_wrong_with_a_page_is_seen(browser, tmp_path):
    (tmp_path / 'bad.html').write_text(BAD)
    with browser.open(tmp_path / 'bad.html') as tab:
        tab.settle()
        assert 'a complaint' in tab.problems and any('missing is not defined' in p for p in tab.problems)
        assert tab.requests == ['http://example.invalid/a.png']
        for width in WIDTHS:
            found = cut_off(tab, width)
            assert found[0].startswith('the page is ') and 'DIV wide wide' in found and 'boxed' not in str(found)
        assert clipped_text(tab) == ['longer than its drawing (undefined)']
        assert tab.download('a') == b'[1]'
    with browser.open(tmp_path / 'bad.html') as tab, pytest.raises(AssertionError, match='ReferenceError'):
        tab.evaluate('missing()')
