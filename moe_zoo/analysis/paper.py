"""The files that a paper takes from finished runs: figures, the table, the references, and a list of them.

All of it is made from `moe_zoo.analysis.runs`; nothing is typed by hand. The same runs give the same files.
"""
import csv
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Optional, Union

from ..cards import card, cards
from ..errors import InputError, atomic_write, counted
from .figures import import_matplotlib, save
from .origin import short_commit
from .page import Figure
from .paper_charts import redraw
from .paper_figures import STYLE, WIDTHS, learning_curves, looks_of, score_against, usage_map
from .report_page import analyses_of, macs
from .runs import KINDS, Run, by_data
from .tables import TEX, unit_of

SOFTWARE = {  # key -> entry; as their projects ask to be cited
    'rw2019timm': """@misc{rw2019timm,
  author = {Ross Wightman},
  title = {{PyTorch} Image Models},
  year = {2019},
  doi = {10.5281/zenodo.4414861},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}""",
    'wu2019detectron2': """@misc{wu2019detectron2,
  author = {Yuxin Wu and Alexander Kirillov and Francisco Massa and Wan-Yen Lo and Ross Girshick},
  title = {Detectron2},
  year = {2019},
  howpublished = {\\url{https://github.com/facebookresearch/detectron2}}
}""",
}
LATEX = TEX | str.maketrans({
    '<': r'\textless{}', '>': r'\textgreater{}', '|': r'\textbar{}', '"': r'\textquotedbl{}', '±': r'$\pm$',
    '×': r'$\times$', '–': '--'})


@dataclass(frozen=True)
class Drawing:
    """One figure: its file's name without width and ending, what it shows, and what draws it at a width in inches."""
    name: str
    caption: str
    draw: Callable[[float], Any]


def write_paper(runs: Sequence[Run], folder: Union[str, Path]) -> list[Path]:
    """Write figures as PDF and SVG in two widths, table.tex, table.csv, references.bib and README.md.

    Args:
        runs: From `moe_zoo.analysis.runs.read_runs`, measured as far as they are.
        folder: Made where it is missing. Files of these names are replaced, others are left alone.

    Returns:
        The files, README.md last.

    Raises:
        InputError: There is no run, `folder` is a file, or matplotlib is not installed.
    """
    folder = Path(folder)
    if not runs:
        raise InputError('runs is empty: there is nothing to write about.')
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--paper '{folder}' is a file: name a folder to write into.")
    written, drawings = [], drawings_of(runs)
    with import_matplotlib().rc_context(STYLE):
        for drawing in drawings:
            for width, inches in WIDTHS.items():
                figure = drawing.draw(inches)
                written += [save(figure, folder / f'{drawing.name}-{width}.{kind}') for kind in ('pdf', 'svg')]
    texts = {
        'table.tex': latex_table(runs), 'references.bib': bibliography(runs), 'README.md': index(runs, drawings)}
    written.append(_write_csv(runs, folder / 'table.csv'))
    for name, text in texts.items():
        with atomic_write(folder / name) as part:
            part.write_text(text, encoding='utf-8')
        written.append(folder / name)
    return written


def groups_of(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that can be compared, for they learned the same kind of thing and were evaluated on the same data."""
    return list(by_data(runs).values())


def shown_names(runs: Sequence[Run]) -> dict[Run, str]:
    """The name of each run's model, where no other run of its group has the same; else the name of the run."""
    found = {}
    for group in groups_of(runs):
        models = [run.model for run in group]
        found.update({run: run.model if models.count(run.model) == 1 else run.name for run in group})
    return found


# ---- figures

def drawings_of(runs: Sequence[Run]) -> list[Drawing]:
    """What there is to draw, each under a name of its own; nothing is drawn yet."""
    names, found = shown_names(runs), {}
    for drawing in (drawing for group in groups_of(runs) for drawing in _drawings(group, names)):
        stem, number = drawing.name, 1
        while drawing.name in found:  # two names that differ in what a file's name cannot hold
            number += 1
            drawing = replace(drawing, name=f'{stem}-{number}')
        found[drawing.name] = drawing
    return list(found.values())


def _drawings(group: Sequence[Run], names: dict[Run, str]) -> Iterator[Drawing]:
    first, looks = group[0], looks_of(group, names)
    stem, scored = slug(f'{first.kind}-{first.dataset}'), [run for run in group if run.scores()]
    bars = 'bars: sample standard deviation over the seeds' if any(run.sd() for run in group) else 'one seed each'
    said = f'on {first.dataset} ({KINDS[first.kind][1]}; {bars})'
    joined = 'a line joins a routed model to its dense twin (hollow)'
    costs = {run: macs(run) for run in scored if macs(run)}
    if costs:
        size, letter, _ = unit_of(list(costs.values()))
        places = {run: _bar(x, run.measured.macs_sd if run.measured else 0., size) for run, x in costs.items()}
        which, label = 'MACs an image that ran', 'MACs an image'
        if not all(run.measured for run in costs):
            which, label = 'MACs an image, at most where those that ran were not counted', 'MACs an image (at most)'
        label += f', {letter}' if letter else ''
        yield Drawing(
            f'{stem}-macs', f'Score {said} against {which} (mean, sample deviation over the images); {joined}.',
            lambda width: score_against(looks, places, label, width))
    timed = _timed_together(scored)
    if timed:
        times = {run: tuple(1e3 * run.measured.latency[i] for i in (1, 0, 2)) for run in timed}
        device = timed[0].measured.machine.get('device', 'an unnamed machine')
        yield Drawing(
            f'{stem}-time', f'Score {said} against the time of an image on {device} (median, quartiles over '
            f'{counted(len(timed[0].measured.seconds), "round")}); {joined}.',
            lambda width: score_against(looks, times, 'time of an image, ms', width))
    if any(len(run.curve) > 1 for run in group):
        yield Drawing(
            f'{stem}-curves', f'Training on {first.dataset}, means over the seeds: loss, score, evenness of the '
            'experts (entropy of their shares over ln E), share of the channels that gates leave on; of the layers the '
            'mean, the least and the largest.',
            lambda width: learning_curves(looks, width))
    for run in group:
        use = [layer for layer in run.use if not layer.channels]
        if use:
            yield Drawing(
                f'{stem}-usage-{slug(names[run])}', f'Use of the experts of {names[run]} on the evaluation images of '
                f'{first.dataset}, as a multiple of the fair share; crosses mark dead experts.',
                lambda width, use=use: usage_map(use, width))
        for number, figure in enumerate(_of_analyses(run), 1):
            yield Drawing(
                f'{stem}-analysis-{slug(names[run])}-{number}', f'{names[run]}: {figure.caption or figure.alt}',
                lambda width, chart=figure.image: redraw(chart, width))


def _of_analyses(run: Run) -> list[Figure]:
    """The charts of what analyze-experts and analyze-object-sizes left in the folders of a run; no pictures."""
    return [block for section in analyses_of(run, []) for block in section.blocks
            if isinstance(block, Figure) and isinstance(block.image, str) and '<image' not in block.image]


def slug(name: str) -> str:
    """Letters, digits and underscores of a name; what is between them becomes a hyphen."""
    return re.sub(r'[^A-Za-z0-9_]+', '-', name).strip('-') or 'unnamed'


def _bar(x: float, sd: float, size: float) -> tuple[float, float, float]:
    sd = min(sd, .9 * x)  # a logarithmic axis has no 0
    return x / size, (x - sd) / size, (x + sd) / size


def _timed_together(runs: Sequence[Run]) -> list[Run]:
    """The runs of the session that timed most of them: times of different sessions are not compared."""
    sessions: dict[str, list[Run]] = {}
    for run in runs:
        if run.measured and run.measured.latency:
            sessions.setdefault(run.measured.session, []).append(run)
    return max(sessions.values(), key=len, default=[])


# ---- the table

def table_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """All numbers of the table, in full, one row a run; None where there is none."""
    names, rows = shown_names(runs), []
    for run in runs:
        measured, gain, time = run.measured, run.gain, run.time_ratio
        quartiles = measured.latency if measured and measured.latency else (None, None, None)
        rows.append({
            'name': names[run], 'run': run.name, 'model': run.model, 'family': run.family, 'kind': run.kind,
            'dataset': run.dataset, 'metric': run.metric, 'seeds': len(run.scores()), 'mean': run.mean(),
            'sd': run.sd(), 'parameters': run.parameters, 'active_parameters': run.active_parameters,
            'macs_at_most': run.macs_max, 'macs_executed': measured and measured.macs_executed,
            'macs_executed_sd': measured and measured.macs_sd, 'macs_images': measured and measured.images,
            'seconds_q1': quartiles[0], 'seconds_median': quartiles[1], 'seconds_q3': quartiles[2],
            'twin': run.twin.name if run.twin else None,
            'difference_mean': statistics.fmean(gain) if gain else None,
            'difference_sd': statistics.stdev(gain) if len(gain) > 1 else None,
            'macs_ratio': run.macs_ratio, 'time_ratio': time and time.median,
            'time_ratio_spread': time and time.spread,
            'dead_experts': sum(map(len, run.dead.values())) if run.use else None,
            'commit': run.versions.get('commit'),
        })
    return rows


def _write_csv(runs: Sequence[Run], path: Path) -> Path:
    rows = table_rows(runs)
    with atomic_write(path) as part, open(part, 'w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def latex_table(runs: Sequence[Run]) -> str:
    """A tabular for booktabs: a part for each kind of task and data, a row a run, with references."""
    rows = dict(zip(runs, table_rows(runs)))
    costs, heads = {run: [] for run in runs}, []
    for pair in ({'parameters': 'Params', 'active_parameters': 'Active'},
                 {'macs_at_most': 'MACs at most', 'macs_executed': 'MACs run'}):  # each pair in one unit
        size, letter, decimals = unit_of([row[key] for row in rows.values() for key in pair if row[key]])
        heads += [f'{head} ({letter})' if letter else head for head in pair.values()]
        for run, row in rows.items():
            costs[run] += [f'{row[key] / size:.{decimals}f}' if row[key] else '--' for key in pair]
    columns = ['Model', 'Seeds', *heads, 'Time (ms)', 'Score', 'To twin']
    lines = [
        '% Written by moe-zoo report --paper; needs \\usepackage{booktabs}.',
        '% Score: mean and sample standard deviation over the seeds; to twin: the same of the paired differences.',
        f'\\begin{{tabular}}{{l{"r" * (len(columns) - 1)}}}', '\\toprule', f'{" & ".join(columns)} \\\\']
    for group in groups_of(runs):
        title = f'{group[0].kind.capitalize()} on {group[0].dataset}: {KINDS[group[0].kind][1]}'
        lines += ['\\midrule', f'\\multicolumn{{{len(columns)}}}{{l}}{{\\emph{{{escape(title)}}}}} \\\\']
        for run in group:
            row, key = rows[run], _reference(run)
            time = row['seconds_median']
            cells = [
                escape(row['name']) + (f'~\\cite{{{key}}}' if key else ''), str(row['seeds']),
                *costs[run], _figures(time and 1e3 * time),
                _pm(row['mean'], row['sd']), _pm(row['difference_mean'], row['difference_sd'], '+')]
            lines.append(f'{" & ".join(cells)} \\\\')
    return '\n'.join([*lines, '\\bottomrule', '\\end{tabular}', ''])


def escape(text: str) -> str:
    """Text as LaTeX prints it."""
    return ' '.join(text.split()).translate(LATEX)


def _figures(value: Optional[float]) -> str:
    """Three significant digits, never an exponent."""
    if value is None:
        return '--'
    places = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f'{value:.{places}f}'


def _pm(mean: Optional[float], sd: Optional[float], sign: str = '') -> str:
    if mean is None:
        return '--'
    return f'${mean:{sign}.2f}$' if sd is None else f'${mean:{sign}.2f} \\pm {sd:.2f}$'


# ---- references

def bibliography(runs: Sequence[Run]) -> str:
    """BibTeX of the papers of the routed models, from their cards, and of timm and detectron2 where they were used."""
    entries = {}
    for run in runs:
        text = _paper(run)
        if text:
            entries.setdefault(_key(text), text)
        if run.kind == 'classification' or run.trainings[0].card:
            entries['rw2019timm'] = SOFTWARE['rw2019timm']
        if run.kind == 'detection':
            entries['wu2019detectron2'] = SOFTWARE['wu2019detectron2']
    return '\n\n'.join(text for _, text in sorted(entries.items())) + '\n'


def _paper(run: Run) -> str:
    """BibTeX of the card of a routed model; nothing where it has no card."""
    try:
        found = card(run.trainings[0].card)['paper'].get('bibtex', '') if run.routed else ''
    except InputError:
        return ''
    return found.strip()


def _reference(run: Run) -> str:
    """Key of what a run's model is cited by: of its card's paper; of timm, where the dense network is timm's."""
    name, text = run.trainings[0].card, _paper(run)
    if run.routed or not name:
        return _key(text) if text else ''
    return '' if name in cards() else 'rw2019timm'


def _key(text: str) -> str:
    return re.match(r'@\w+\{\s*([^,\s]+)\s*,', text)[1]


# ---- what is there

def index(runs: Sequence[Run], drawings: Sequence[Drawing]) -> str:
    """README.md: every file, with words for its caption, and what the runs lack."""
    lines = [
        '# Figures, table and references', '',
        'Written by `moe-zoo report --paper`; written again, the same runs give the same files.', '',
        f'Every figure is there as PDF (fonts embedded) and SVG (text stays text), {WIDTHS["1col"]} inches wide '
        f'(`-1col`) and {WIDTHS["2col"]} inches wide (`-2col`). Include them unscaled: all type is 7 points.', '',
        '```latex', '\\usepackage{booktabs,graphicx,url}',
        *([f'\\includegraphics{{{drawings[0].name}-1col}}'] if drawings else []),
        '\\input{table}', '\\bibliographystyle{plain}', '\\bibliography{references}', '```', '',
        '| file | what it shows |', '| --- | --- |',
        *(f'| `{drawing.name}-{{1col,2col}}.{{pdf,svg}}` | {_cell(drawing.caption)} |' for drawing in drawings),
        '| `table.tex` | All runs: cost, time, score with its standard deviation over the seeds, difference to the '
        'dense twin. |',
        '| `table.csv` | The same numbers in full, and those they come from. |',
        '| `references.bib` | The papers of the routed models, and the software. |', '', '## Runs', '',
    ]
    for run, name in shown_names(runs).items():
        seeds = ', '.join('drawn' if seed is None else str(seed) for seed in run.seeds)
        lacks = [] if run.measured else ['not measured: MACs at most, no time, no use of its experts']
        lacks += [problem.rstrip('.') for problem in run.problems]
        note = f': {"; ".join(lacks)}' if lacks else ''
        commit = f', commit {short_commit(run.versions["commit"])}' if run.versions.get('commit') else ''
        lines.append(f'- `{name}` ({run.name}; seeds {seeds}{commit}){note}.')
    return '\n'.join([*lines, ''])


def _cell(text: str) -> str:
    return text.replace('|', '\\|')
