"""What a paper takes from finished runs: figures of exact widths, a table whose numbers are the runs', references."""
import csv
import json
import re
import shutil
import subprocess
import zlib
from xml.etree import ElementTree

import pytest

from moe_zoo.analysis import charts
from moe_zoo.analysis.figures import import_matplotlib, save
from moe_zoo.analysis.paper import bibliography, drawings_of, escape, index, latex_table, slug, table_rows, write_paper
from moe_zoo.analysis.paper_charts import redraw
from moe_zoo.analysis.paper_figures import POINTS, STYLE, WIDTHS, looks_of
from moe_zoo.analysis.run_folders import Training
from moe_zoo.analysis.runs import LayerUse, Measured, Run
from moe_zoo.errors import InputError

EVIL = r'_a&b 50% $x$ #1 {~^\} <é>' + ' long' * 8


def trained(folder, model, scores, routed, kind='classification', card='', **fields):
    """A training for each seed: `scores` by seed."""
    for seed in scores:
        (folder / f'seed{seed}').mkdir(parents=True, exist_ok=True)
    metric = 'top1' if kind == 'classification' else 'AP'
    return tuple(Training(
        folder=folder / f'seed{seed}', kind=kind, model=model, routed=routed, dataset='digits', seed=seed,
        metrics={metric: score},
        rows=tuple({'step': step, 'loss': 2 / step, 'score': score - 9 / step} for step in range(1, 9)),
        balance={layer: tuple((step, low + .01 * step) for step in range(1, 9))
                 for layer, low in (('stage.1', .8), ('stage.3', .6)) if routed},
        options={}, card=card, **fields) for seed, score in scores.items())


def run_of(folder, name, model, scores, macs, seconds, twin=None, routed=True, kind='classification', card=''):
    trainings = trained(folder / name, model, scores, routed, kind, card)
    use = (LayerUse('stage.1', (.5, .25, .25), (.5, .25, .25), .95, 0., ()),
           LayerUse('stage.3', (.75, .25, 0.), (.75, .25, 0.), .51, 0., (2,)))
    return Run(
        name=name, kind=kind, model=model, family='moe' if routed else 'dense', routed=routed, dataset='digits',
        trainings=trainings, options={}, twin=twin, parameters=2_500_000,
        active_parameters=1_250_000, macs_max=1.5 * macs, versions={'commit': '0123456789abcdef'},
        measured=Measured(
            images=4, input_size=(3, 32, 32), parameters=2_500_000, active_parameters=1_250_000, macs_max=1.5 * macs,
            macs_executed=macs, macs_sd=.05 * macs * routed, layers=use if routed else (), seconds=seconds, session='a',
            machine={'device': 'a chip'}))


def runs_below(folder):
    dense = run_of(folder, 'moe/twin', 'resnet18', {0: 90., 1: 92.}, 40e6, (.010, .012, .011), routed=False,
                   card='resnet18')
    moe = run_of(folder, 'moe/model', 'moe_resnet18_cifar', {0: 93., 1: 94., 2: 98.}, 60e6, (.020, .025, .022),
                 twin=dense, card='moe_resnet18_cifar')
    vit = run_of(folder, 'vit', 'vmoe_vit_s', {0: 88.}, 300e6, (.041, .040, .042), card='vmoe_vit_s')
    return [moe, dense, vit]


@pytest.fixture
def runs(tmp_path):
    return runs_below(tmp_path)


@pytest.fixture(scope='module')
def paper(tmp_path_factory):
    """The folder that `write_paper` writes of these runs, one of which has a name that is not easy."""
    pytest.importorskip('matplotlib')
    folder = tmp_path_factory.mktemp('paper')
    runs = runs_below(folder)
    runs[2].model = EVIL
    assert sorted(write_paper(runs, folder / 'out')) == sorted((folder / 'out').iterdir())
    return folder / 'out'


STEM = 'classification-digits'
WHAT = ('macs', 'time', 'curves', 'usage-moe_resnet18_cifar', f'usage-{slug(EVIL)}')  # a dense run routes nothing


def test_every_figure_is_there_in_two_widths_and_two_formats(paper):
    files = {f'{STEM}-{what}-{width}.{kind}' for what in WHAT for width in WIDTHS for kind in ('pdf', 'svg')}
    assert {path.name for path in paper.iterdir()} == files | {'table.tex', 'table.csv', 'references.bib', 'README.md'}
    assert all(re.fullmatch(r'[A-Za-z0-9_-]+\.\w+', path.name) for path in paper.iterdir())
    text = (paper / 'README.md').read_text()
    assert all(f'| `{STEM}-{what}-{{1col,2col}}.{{pdf,svg}}` |' in text for what in WHAT)
    assert '- `moe_resnet18_cifar` (moe/model; seeds 0, 1, 2, commit 0123456789ab).' in text


@pytest.mark.parametrize('width, inches', [('1col', 3.25), ('2col', 6.75)])
@pytest.mark.parametrize('what', WHAT)
def test_a_pdf_has_its_width_its_fonts_and_type_of_seven_points(paper, what, width, inches):
    pdf = (paper / f'{STEM}-{what}-{width}.pdf').read_bytes()
    box = re.search(rb'/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+) ?\]', pdf)
    assert float(box[1]) == pytest.approx(72 * inches, abs=.01) and 72 < float(box[2]) < 400
    fonts = re.findall(rb'/Type /FontDescriptor', pdf)
    assert fonts and len(re.findall(rb'/FontFile2 ', pdf)) == len(fonts) and b'/Type3' not in pdf
    packed = re.findall(rb'FlateDecode.*?stream\n(.*?)\nendstream', pdf, re.S)
    sizes = re.findall(rb'/F\d+ ([\d.]+) Tf', b'\n'.join(map(zlib.decompress, packed)))
    assert set(map(float, sizes)) == {POINTS} == {7}


@pytest.mark.parametrize('width, inches', [('1col', 3.25), ('2col', 6.75)])
def test_an_svg_keeps_its_text(paper, width, inches):
    svg = ElementTree.parse(paper / f'{STEM}-macs-{width}.svg').getroot()
    assert svg.get('width') == f'{72 * inches:g}pt'
    texts = [''.join(element.itertext()) for element in svg.iter('{http://www.w3.org/2000/svg}text')]
    assert {'moe_resnet18_cifar', 'MACs an image, M', 'top-1 accuracy, %'} <= set(texts)
    # matplotlib would take what is between dollars for mathematics, and leave a name that begins with _ out
    assert EVIL[-40:] in texts[-1] and (width == '1col' or EVIL in texts)
    sizes = re.findall(r'font-size: ([\d.]+)px', ElementTree.tostring(svg, 'unicode'))
    assert set(map(float, sizes)) == {POINTS}


def test_the_same_runs_give_the_same_file(runs):
    curves = next(drawing for drawing in drawings_of(runs) if drawing.name.endswith('curves'))
    with import_matplotlib().rc_context(STYLE):
        for kind in ('pdf', 'svg'):
            first, second = (save(curves.draw(3.25), runs[0].trainings[0].folder.parent / f'{n}.{kind}') for n in 'ab')
            assert first.read_bytes() == second.read_bytes()


def test_without_measurements_macs_are_those_at_most_and_the_index_says_so(runs, tmp_path):
    for run in runs:
        run.measured = None
    runs[2].problems.append('its checkpoint is gone.')
    drawings = drawings_of(runs)
    assert [drawing.name for drawing in drawings] == [f'{STEM}-macs', f'{STEM}-curves']
    assert 'at most where those that ran were not counted' in drawings[0].caption
    figure = drawings[0].draw(3.25)
    assert figure.axes[0].get_xlabel() == 'MACs an image (at most), M'
    assert [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_marker() == 'o'] == [90., 60.]
    text = index(runs, drawings)
    assert 'not measured: MACs at most, no time, no use of its experts; its checkpoint is gone.' in text
    assert '450.0 & -- & -- & $88.00$ & -- \\\\' in latex_table(runs)


def test_only_times_of_one_session_are_drawn(runs):
    object.__setattr__(runs[2].measured, 'session', 'b')
    texts = {drawing.name: [text.get_text() for text in drawing.draw(3.25).legends[0].texts]
             for drawing in drawings_of(runs)[:2]}
    assert texts == {f'{STEM}-macs': ['moe_resnet18_cifar', 'resnet18', 'vmoe_vit_s'],
                     f'{STEM}-time': ['moe_resnet18_cifar', 'resnet18']}


def test_points_lie_where_the_numbers_are(runs):
    # Medians 22 and 11 ms, quartiles of .020, .022, .025: 21 and 23.5 ms. Scores 95 with deviation 2.65 and 91.
    time = drawings_of(runs)[1].draw(6.75).axes[0]
    places = {(*line.get_xdata(), *line.get_ydata()) for line in time.lines if len(line.get_xdata()) == 1}
    assert {(22., 95.), (11., 91.), (41., 88.)} <= {tuple(round(v, 6) for v in place) for place in places}
    assert {(21., 95.), (23.5, 95.)} <= {tuple(round(v, 6) for v in place) for place in places}  # ends of the bar
    joined = [tuple(line.get_xdata()) for line in time.lines if len(line.get_xdata()) == 2]
    assert [tuple(round(x, 6) for x in ends) for ends in joined] == [(11., 22.)]


def test_runs_are_told_apart_without_colour(runs, tmp_path):
    many = [run_of(tmp_path, str(i), str(i), {0: 1.}, 1e6, ()) for i in range(40)]
    looks = looks_of([*many, runs[1]], {run: run.name for run in [*many, runs[1]]})
    routed = [looks[run] for run in many]
    assert len({(look.marker, look.dash) for look in routed}) == 40
    assert len({(look.marker, look.colour) for look in routed}) == 40
    assert len({look.marker for look in routed[:8]}) == 8 and looks[runs[1]].hollow and not routed[0].hollow


# ---- charts of the page

def test_every_kind_of_chart_is_redrawn_with_its_words_where_they_were():
    drawn = [
        charts.intervals([('a', [1., 2.]), ('b_c', [3.])], 'accuracy, %'),
        charts.heat_map(['one', 'two'], ['x', 'y'], [[1., 2.], [3., None]], 'rows', 'columns'),
        charts.histogram([1, 2, 3], 'gate'),
        charts.share_bars([('layer', [.25, .75])]),
        charts.strips([('layer', [[.1, .2], [.3, .4]])], ['s', 't'], ['0', '1'], 'expert'),
        charts.curves([('a', [(1, 2.), (3, 4.)]), ('b', [(1, 1.)])], 'x', 'y', dashed=[0]),
        charts.estimates([('a', 50., 2.)], 'accuracy, %'),
    ]
    with import_matplotlib().rc_context(STYLE):
        for chart in drawn:
            figure = redraw(chart, 3.25)
            words = [''.join(element.itertext()) for element in ElementTree.fromstring(chart).iter()
                     if element.tag.endswith('}text')]
            assert [text.get_text() for text in figure.axes[0].texts] == words and len(words) > 2
            assert figure.get_figwidth() == 3.25 and {text.get_fontsize() for text in figure.axes[0].texts} == {7}
    assert redraw(drawn[0], 6.75).get_figheight() > redraw(drawn[0], 3.25).get_figheight()


def test_a_chart_is_redrawn_at_its_places_and_in_its_colours():
    chart = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 440 100" fill="currentColor">'
        '<rect x="10" y="20" width="30" height="40" fill="var(--expert-0)" fill-opacity=".5"/>'
        '<circle cx="5" cy="6" r="4" fill="var(--accent)"><title>not drawn</title></circle>'
        '<line x1="0" y1="1" x2="2" y2="3" stroke="var(--line)" stroke-dasharray="4 3"/>'
        '<g transform="rotate(-90 14 50)"><text x="14" y="50" text-anchor="middle">up</text></g></svg>')
    figure = redraw(chart, 3.25)
    axis, = figure.axes
    bar, = axis.patches
    assert bar.get_bbox().bounds == (10, 20, 30, 40) and bar.get_facecolor()[:3] == pytest.approx(
        (0x0e / 255, 0x8a / 255, 0x8a / 255)) and bar.get_alpha() == .5
    dot, line = axis.lines
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (5, 6) and dot.get_markerfacecolor() == '#0b6f73'
    assert list(line.get_xdata()) == [0, 2] and line.is_dashed() and bar.zorder < dot.zorder < line.zorder
    assert axis.texts[0].get_rotation() == 90 and axis.get_ylim() == (100, 0)  # SVG counts from the top
    with pytest.raises(InputError, match='chart: a figure for print is made of no <image>'):
        redraw(chart.replace('<rect', '<image'), 3.25)


def test_charts_of_the_analyses_of_a_run_are_drawn_too(runs, monkeypatch):
    pytest.importorskip('sklearn')
    from moe_zoo.engine.analyze_experts import main
    small = dict(patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=3, representation_size=0)
    monkeypatch.setattr('sys.argv', ['analyze-experts'])
    main(['--model', 'vmoe_vit_s', 'dataset=digits', 'val_split=test', 'device=cpu', 'img_size=16', '--no-force',
          f'model_kwargs={json.dumps(small)}', '--max-images', '22', '--no-figures',
          '--out', str(runs[2].trainings[0].folder / 'experts')])
    found = [drawing for drawing in drawings_of(runs) if '-analysis-' in drawing.name]
    assert [drawing.name for drawing in found] == [
        f'{STEM}-analysis-vmoe_vit_s-{number}' for number in range(1, len(found) + 1)]
    assert len(found) >= 4 and all(drawing.caption.startswith('vmoe_vit_s: ') for drawing in found)
    assert 'blocks.1.mlp' in [text.get_text() for text in found[0].draw(3.25).axes[0].texts]


# ---- the table

def test_the_numbers_of_the_table_are_those_of_the_runs(runs):
    # Scores 93, 94 and 98: mean 95, deviation sqrt((4 + 1 + 9) / 2) = 2.65. The twin has 90 and 92 for seeds 0 and 1:
    # differences 3 and 2, mean 2.5, deviation .71. MACs 60 and 40 M, at most 90 M; median times 22 and 11 ms.
    lines = latex_table(runs).splitlines()
    moe, dense, vit = (line for line in lines if '\\cite' in line)
    assert moe == (r'moe\_resnet18\_cifar~\cite{pavlitska2022balancing} & 3 & 2500 & 1250 & 90.0 & 60.0 & 22.0 & '
                   r'$95.00 \pm 2.65$ & $+2.50 \pm 0.71$ \\')
    assert dense == r'resnet18~\cite{rw2019timm} & 2 & 2500 & 1250 & 60.0 & 40.0 & 11.0 & $91.00 \pm 1.41$ & -- \\'
    assert vit == (
        r'vmoe\_vit\_s~\cite{riquelme2021scaling} & 1 & 2500 & 1250 & 450.0 & 300.0 & 41.0 & $88.00$ & -- \\')
    assert r'Model & Seeds & Params (k) & Active (k) & MACs at most (M) & MACs run (M) & Time (ms) & Score' in lines[4]
    assert r'\multicolumn{9}{l}{\emph{Classification on digits: top-1 accuracy, \%}} \\' in lines


def test_the_csv_holds_all_digits(paper):
    runs = runs_below(paper.parent)
    runs[2].model = EVIL
    with open(paper / 'table.csv', newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    for row, exact in zip(rows, table_rows(runs), strict=True):
        assert {key: '' if value is None else str(value) for key, value in exact.items()} == row
    assert float(rows[0]['sd']) == pytest.approx(7 ** .5) and float(rows[0]['macs_ratio']) == 1.5
    assert rows[0]['twin'] == 'moe/twin' and rows[0]['dead_experts'] == '1' and rows[2]['sd'] == ''


def test_names_that_latex_would_read_are_escaped(paper):
    assert escape('a_b & 50% {#1}\n~^\\') == (
        r'a\_b \& 50\% \{\#1\} \textasciitilde{}\textasciicircum{}\textbackslash{}')
    row = next(line for line in (paper / 'table.tex').read_text().splitlines() if 'long' in line)
    assert r'\_a\&b 50\% \$x\$ \#1 \{\textasciitilde{}\textasciicircum{}\textbackslash{}\}' in row
    assert len(re.findall(r'(?<!\\)&', row)) == 8


def test_one_file_for_every_name_also_where_slugs_agree(runs):
    runs[0].model, runs[2].model = 'a/b', 'a b'
    assert slug('a/b') == slug('a b') == 'a-b' and slug('../') == 'unnamed'
    assert [drawing.name for drawing in drawings_of(runs)][-2:] == [f'{STEM}-usage-a-b', f'{STEM}-usage-a-b-2']


def test_the_table_compiles(paper, tmp_path):
    if not shutil.which('pdflatex'):
        pytest.skip('pdflatex is not installed')
    (tmp_path / 'main.tex').write_text(
        '\\documentclass{article}\\usepackage[T1]{fontenc}\\usepackage{booktabs,graphicx,url}\\begin{document}\n'
        f'\\graphicspath{{{{{paper}/}}}}\\input{{{paper}/table}}\\includegraphics{{{STEM}-macs-1col}}\\end{{document}}\n')
    done = subprocess.run(['pdflatex', '-interaction=nonstopmode', '-halt-on-error', 'main'], cwd=tmp_path,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / 'main.pdf').stat().st_size > 10_000


# ---- references

def test_references_are_of_the_families_used_and_of_the_software(runs, tmp_path):
    def keys(chosen):
        return re.findall(r'^@\w+\{([^,]+),$', bibliography(chosen), re.M)

    again = run_of(tmp_path, 'again', 'vmoe_vit_b', {0: 1.}, 1e9, (), card='vmoe_vit_b')
    assert keys([*runs, again]) == ['pavlitska2022balancing', 'riquelme2021scaling', 'rw2019timm']
    plain = run_of(tmp_path, 'det', 'RetinaNet', {0: 30.}, 1e9, (), kind='detection')  # no card, no backbone of timm's
    assert keys([plain]) == ['wu2019detectron2']
    ours = run_of(tmp_path, 'det', 'FCOS x', {0: 30.}, 1e9, (), kind='detection', card='condconv_resnet50')
    assert keys([ours]) == ['rw2019timm', 'wu2019detectron2', 'yang2019condconv']
    name = 'moe_resnet18_cifar'  # with its routing off it is neither timm's nor the paper's
    assert 'cite' not in latex_table([run_of(tmp_path, 'own', name, {0: 1.}, 1e9, (), routed=False, card=name)])
    text = bibliography(runs)
    assert text.count('{') == text.count('}')
    assert set(re.findall(r'\\cite\{(\w+)\}', latex_table(runs))) <= set(keys(runs))


def test_what_cannot_be_written_is_one_sentence(runs, tmp_path):
    with pytest.raises(InputError, match='runs is empty: there is nothing to write about'):
        write_paper([], tmp_path)
    (tmp_path / 'file').write_text('precious')
    with pytest.raises(InputError, match=r"--paper '.*file' is a file: name a folder to write into"):
        write_paper(runs, tmp_path / 'file')
    assert (tmp_path / 'file').read_text() == 'precious'
