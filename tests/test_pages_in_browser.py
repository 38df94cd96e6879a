"""Every page as a reader meets it in Chromium: nothing goes wrong, nothing is fetched or cut off, all that moves works.

Each page is made by the tool that writes it, in miniature, the first time that a test asks for it.
"""
import json
import os
import shutil

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
    """Every published experiment but those whose charts draw single runs, which are not published."""
    from moe_zoo.reproduce.report import write_page
    for path in (repository / 'docs' / 'experiments').glob('*.json'):
        if path.stem not in ('balance', 'situational-fusion', 'vowels'):
            (folder / path.stem).mkdir()
            shutil.copy(path, folder / path.stem / 'results.json')
    return write_page(folder)


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
