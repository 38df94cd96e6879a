"""What is told of results: verdict line, section of the page, files of docs/experiments, README's table, cards.

All of it is made from results.json; nothing is typed by hand.
"""
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Optional, Union

from moe_zoo.analysis.charts import intervals
from moe_zoo.analysis.page import Block, Figure, Page, Section, Table, chart_file
from moe_zoo.card_writer import checkout, measured_rows, renew, with_block, with_measured
from moe_zoo.errors import InputError, atomic_write, counted

from . import FILES, find_experiment
from .experiment import Experiment

__all__ = ['card_rows', 'draw_figures', 'publish', 'readme_table', 'renewed_card', 'verdict_line', 'write_page']

TITLE = "The papers' experiments, reproduced at desk scale"
LEAD = (
    'Every experiment fixed its claims, test, seeds and smallest detectable effect before its first run, and chose '
    'nothing on the test images. The data are small: a verdict speaks of these data and networks, not of ImageNet.'
)
MOST_BYTES = 40_000  # of a published file

Results = dict[str, Any]


def verdict_line(results: Results) -> str:
    """The verdict on the first claim in one line."""
    claim, found = results['plan']['claims'][0], results['claims'][0]
    unit, seeds = claim['unit'], len(results['plan']['seeds'])
    published = '' if claim['published'] is None else f'; published {_signed(claim["published"])}'
    return (
        f'{found["verdict"]}: {claim["better"]} minus {claim["worse"]} {found["difference"]:+.2f} {unit} of '
        f'{claim["metric"]} (95 % interval {found["low"]:+.2f} to {found["high"]:+.2f}, p = {found["p"]:.2g}, {seeds} '
        f'seeds; detectable {found["detectable"]:.2f}{published})')


def write_page(output: Path, running: Optional[str] = None, failure: Optional[str] = None) -> Path:
    """Write index.html: a section for every experiment with results in `output`, in the order of the registry.

    Args:
        output: Folder of all experiments.
        running: Name of the experiment that is being run.
        failure: Why it ended early.
    """
    sections = []
    for name in FILES:
        path = output / name / 'results.json'
        if path.is_file():
            results = json.loads(path.read_text(encoding='utf-8'))
            status = 'pending' if name != running else 'failed' if failure else 'running'
            sections.append(section(results, status, failure or ''))
    Page(TITLE, LEAD, sections).write(output / 'index.html')
    return output / 'index.html'


def section(results: Results, unfinished: str = 'pending', reason: str = '') -> Section:
    """The section of one experiment; `unfinished` is its status, and `reason` why, where runs are missing."""
    claim = results['plan']['claims'][0]
    if results['status'] != 'done':
        total = len(results['plan']['seeds']) * len(results['arms'])
        headline = f'{claim["text"]} {len(results["runs"])} of {total} runs are done. {reason}'.strip()
        return Section(results['title'], unfinished, headline)
    experiment = find_experiment(results['name'])
    # Results of an earlier version of the experiment may lack what its charts of today draw.
    same = [arm.name for arm in experiment.arms] == [arm['name'] for arm in results['arms']]
    blocks = [
        f'{results["question"]} After {results["paper"]}.',
        *_claims(results),
        _intervals(results, claim['metric']),
        *(_charts(experiment, results) if experiment.charts and same else ()),
        _arms_table(results),
        f'Data: {results["plan"]["data"]}. Plan fixed {results["plan"]["written"]}; {results["plan"]["test"]}. '
        + ', '.join(f'{name} {value}' for name, value in results['made_by'].items() if value) + '.',
        f'$ python tools/reproduce.py {results["name"]}',
    ]
    return Section(results['title'], 'done', f'**{_capital(verdict_line(results))}**', blocks, results['seconds'])


def _charts(experiment: Experiment, results: Results) -> list[Block]:
    """The charts of an experiment; a sentence in their place where they draw single runs, which nobody publishes."""
    try:
        return list(experiment.charts(results))
    except KeyError as missing:
        if missing.args != ('runs',):
            raise
        return ['Its charts draw single runs, which are not among what is published.']


def _claims(results: Results) -> list[Union[str, Table]]:
    """The claims in words, and what the test says of each."""
    rows, words = [], []
    for number, (claim, found) in enumerate(zip(results['plan']['claims'], results['claims']), 1):
        source = f' Published: {claim["source"]}.' if claim['source'] else ''
        words.append(f'**Claim {number}.** {claim["text"]}{source}')
        rows.append([
            f'{number}. {claim["better"]} minus {claim["worse"]}, {claim["metric"]}',
            f'{found["difference"]:+.2f}', f'{found["low"]:+.2f} to {found["high"]:+.2f}', f'{found["p"]:.2g}',
            f'{claim["detectable"]:.2f}, {found["detectable"]:.2f}', _signed(claim['published']), found['verdict']])
    columns = ['difference of arms', 'mean', '95 % interval', 'p', 'detectable', 'published', 'verdict']
    return [*words, Table(columns, rows, 'Detectable: as planned, and by the deviation observed.')]


def _signed(value: Optional[float]) -> Optional[str]:
    return None if value is None else f'{value:+.3g}'


def _arms_table(results: Results) -> Table:
    metrics = list(dict.fromkeys(name for arm in results['arms'] for name in arm['metrics']))
    rows = [[arm['name'], *(_mean(arm['metrics'].get(name)) for name in metrics)] for arm in results['arms']]
    return Table(['arm', *metrics], rows, f'Mean ± standard deviation over {len(results["plan"]["seeds"])} seeds.')


def _mean(metric: Optional[dict[str, Any]]) -> Optional[str]:
    if metric is None:
        return None
    number = f'{metric["mean"]:,.0f}' if abs(metric['mean']) >= 1000 else f'{metric["mean"]:.4g}'
    return f'{number} ± {metric["std"]:.2g}' if metric['std'] else number


def _intervals(results: Results, metric: str) -> Figure:
    rows = [(arm['name'], arm['metrics'][metric]['values']) for arm in results['arms'] if metric in arm['metrics']]
    alt = '; '.join(f'{name}: {", ".join(f"{v:.4g}" for v in values)}' for name, values in rows)
    label = 'test accuracy, %' if metric == 'accuracy' else metric
    return Figure(intervals(rows, label), f'{label} of every run. {alt}', 'A dot is a run, the bar the mean of an arm.')


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- What the repository keeps ----------------------------------------------------------------------------------------

def publish(results: Results, root: Optional[Path] = None) -> Path:
    """Keep finished results, without the single runs, in docs/experiments; renew what is made of all that are there.

    That is the README's table and its figures in docs/figures, the tables in docs/families, and the cards. Results on
    other data than those that are there get a file beside these, NAME-DATA.json.

    Raises:
        InputError: They are not finished, or too large to keep.
    """
    root = root or checkout()
    if results['status'] != 'done':
        raise InputError(f'{results["name"]} is not finished: only finished results are published.')
    text = json.dumps({key: value for key, value in results.items() if key != 'runs'}, indent=1) + '\n'
    text = re.sub(r'\[[^\[\]{}]*\]', lambda found: re.sub(r'\s+', ' ', found[0]), text)  # a list of numbers a line
    if len(text.encode()) > MOST_BYTES:
        raise InputError(f'{results["name"]}: {len(text)} bytes of results; at most {MOST_BYTES} are published.')
    path = _file_of(results, root / 'docs' / 'experiments')
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding='utf-8')
    draw_figures(root)
    table, rows = readme_table(path.parent), card_rows(path.parent)
    renew(root / 'README.md', lambda text: with_block(text, 'experiments', table))
    for page in (root / 'docs' / 'families').glob('*.md'):
        renew(page, lambda text: renewed_page(text, path.parent))
    for card in (root / 'registry').glob('*/*.toml'):
        renew(card, lambda text, path=card: renewed_card(text, rows.get(path.stem, []), path))
    return path


def draw_figures(root: Path) -> list[Path]:
    """Draw the figures that the README shows, docs/figures, from what docs/experiments holds."""
    paths = []
    for name, text in readme_figures(root / 'docs' / 'experiments').items():
        path = root / 'docs' / 'figures' / f'{name}.svg'
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding='utf-8')
        paths.append(path)
    return paths


def readme_figures(folder: Path) -> dict[str, str]:
    """Name of every published experiment that is `pictured` to its first chart as an SVG file."""
    figures = {}
    for path, results in _published(folder):
        experiment = find_experiment(results['name'])
        if experiment.pictured and path.stem == experiment.name:
            figure = experiment.charts(results)[0]
            figures[results['name']] = chart_file(figure.image, results['title'], figure.alt)
    return figures


def readme_table(folder: Path) -> str:
    """The README's table from the files in docs/experiments: a row an experiment, by the claim that decides.

    Empty where nothing is published yet.
    """
    lines = [
        '| experiment | claim | measured here (95 % interval of the difference) | seeds | detectable | published '
        '| verdict | further claims |',
        '| --- | --- | --- | ---: | ---: | ---: | --- | --- |',
    ]
    for path, results in _published(folder):
        claim, found = results['plan']['claims'][0], results['claims'][0]
        means = {arm['name']: arm['metrics'][claim['metric']]['mean'] for arm in results['arms']
                 if claim['metric'] in arm['metrics']}
        further = Counter(other['verdict'] for other in results['claims'][1:])
        cells = (
            f'`{results["name"]}`{_other_data(path, results)}', claim['text'].rstrip('.'),
            f'{means[claim["worse"]]:.2f} to {means[claim["better"]]:.2f}, {found["difference"]:+.2f} {claim["unit"]} '
            f'({found["low"]:+.2f} to {found["high"]:+.2f})',
            str(len(results['plan']['seeds'])), f'{found["detectable"]:.2f}',
            _signed(claim['published']) or 'unknown', f'**{found["verdict"]}**',
            ', '.join(f'{number} {verdict}' for verdict, number in further.items()) or 'none')
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n' if len(lines) > 2 else ''


CLAIMS = re.compile(r'(<!-- claims: ([\w -]+?) -->\n).*?(<!-- /claims -->)', re.S)


def renewed_page(text: str, folder: Path) -> str:
    """The text of a page of docs/families with its tables of claims, `<!-- claims: EXPERIMENT ... -->`, made anew."""
    return CLAIMS.sub(lambda found: f'{found[1]}{claims_table(folder, found[2].split())}{found[3]}', text)


def claims_table(folder: Path, names: Iterable[str]) -> str:
    """Every claim of some experiments and its verdict, on all their data; a row for one that is not published."""
    lines = [
        '| experiment | claim | measured (95 % interval) | published | verdict |', '| --- | --- | --- | ---: | --- |']
    for name in names:
        files = _files_of(name, folder)
        if not files:
            lines.append(f'| `{name}` | {find_experiment(name).claims[0].text.rstrip(".")} | not published here | | |')
        for path, results in files:
            first = (f'[`{name}`](../experiments/{path.name}){_other_data(path, results)}, '
                     f'{counted(len(results["plan"]["seeds"]), "seed")}')
            for claim, found in zip(results['plan']['claims'], results['claims']):
                lines.append(
                    f'| {first} | {claim["text"].rstrip(".")} | {found["difference"]:+.2f} {claim["unit"]} '
                    f'({found["low"]:+.2f} to {found["high"]:+.2f}) | {_signed(claim["published"]) or ""} '
                    f'| **{found["verdict"]}** |')
                first = ''
    return '\n'.join(lines) + '\n'


def card_rows(folder: Path) -> dict[str, list[Results]]:
    """Model name to the rows of its card: the claim that decides of every experiment that names it."""
    rows: dict[str, list[Results]] = {}
    for _, results in _published(folder):
        claim, found, made_by = results['plan']['claims'][0], results['claims'][0], results['made_by']
        row = {
            'experiment': results['name'], 'dataset': results['plan']['data'],
            'metric': f'small version, {claim["better"]} minus {claim["worse"]}, {claim["metric"]} in {claim["unit"]}',
            'mean': round(found['difference'], 2), 'std': round(found['deviation'], 2),
            'seeds': len(results['plan']['seeds']), 'verdict': found['verdict'], 'commit': made_by['commit'],
            'versions': f'torch {made_by["torch"]}, timm {made_by["timm"]}'}
        for card in find_experiment(results['name']).cards:
            rows.setdefault(card, []).append(row)
    return rows


def renewed_card(text: str, rows: list[Results], path: Optional[Path] = None) -> str:
    """The text of a card with these rows of experiments; those of runs stay."""
    runs = [row for row in measured_rows(text, path) if 'experiment' not in row]
    return with_measured(text, [*rows, *runs])


# Results on the first data that were published are NAME.json, those on others NAME-DATA.json.

def _file_of(results: Results, folder: Path) -> Path:
    """Where to publish."""
    path = folder / f'{results["name"]}.json'
    if path.is_file() and _data_word(json.loads(path.read_text(encoding='utf-8'))) != _data_word(results):
        return path.with_stem(f'{path.stem}-{_data_word(results)}')
    return path


def _data_word(results: Results) -> str:
    """The first word that the plan says of the data, as a part of a file's name."""
    return re.sub(r'[^\w.-]', '', results['plan']['data'].split()[0])


def _other_data(path: Path, results: Results) -> str:
    return '' if path.stem == results['name'] else f' on {_data_word(results)}'


def _files_of(name: str, folder: Path) -> list[tuple[Path, Results]]:
    """The files of an experiment, NAME.json first, and what they hold."""
    paths = sorted(folder.glob(f'{name}*.json'), key=lambda path: path.stem)
    found = [(path, json.loads(path.read_text(encoding='utf-8'))) for path in paths]
    return [(path, results) for path, results in found if results['name'] == name]


def _published(folder: Path) -> Iterable[tuple[Path, Results]]:
    """Files and their results in the order of the registry."""
    return (file for name in FILES for file in _files_of(name, folder))
