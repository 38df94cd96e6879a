"""The tables and the figure of docs/speed.md, made of what `tools/benchmark.py all` measured."""
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import counted
from .charts import ratios
from .origin import short_commit
from .page import chart_file
from .speed_tables import milliseconds, twin_of
from .targets import TARGETS, Judgement, Target, aim_of, judge, judged, memory_ratio
from .timing import Ratio

Row = Mapping[str, Any]
MODES = {'forward': 'forward', 'train': 'step', 'epoch': 'epoch', 'evaluate': ''}


def blocks(report: Mapping[str, Any]) -> dict[str, str]:
    """Name of every generated part of the page to its text; a part without rows says so."""
    rows = [judged(row) for row in report['rows']]
    makers = {
        'speed-machine': lambda found: machine_text(report), 'speed-targets': targets_table,
        'speed-models': models_table, 'speed-floor': floor_text, 'speed-layers': layers_table,
        'speed-dispatch': dispatch_table, 'speed-detectors': detectors_table, 'speed-data': loading_table,
        'speed-compile': compile_table}
    kinds = {'speed-models': 'model', 'speed-layers': 'layer', 'speed-dispatch': 'dispatch',
             'speed-detectors': 'detector', 'speed-data': 'data', 'speed-compile': 'compile'}
    found = {}
    for name, make in makers.items():
        own = [row for row in rows if row['kind'] == kinds.get(name, row['kind'])]
        found[name] = make(own) if own else 'Not measured yet.\n'
    return found


def machine_text(report: Mapping[str, Any]) -> str:
    """The conditions, in a paragraph."""
    machine, rows = report['machine'], report['rows']
    loads = sorted(load for row in rows for load in row['loads'])
    rounds = sorted({len(row['seconds']) for row in rows})
    between = f'{rounds[0]} to ' * (len(rounds) > 1) + counted(rounds[-1], 'round')
    commits = ', '.join(sorted({f'`{short_commit(row["commit"])}`' for row in rows if row['commit']})) or 'unknown'
    busy = ('' if statistics.median(loads) <= machine['cores'] + 1 else
            '**Others were busy on the machine: these numbers are provisional.** ')
    return (
        f'{busy}{machine["device"]}, {machine["cores"]} cores, {counted(machine["threads"], "thread")} of torch '
        f'{machine["torch"]}, timm {machine["timm"]}, {machine["clock"]} time, {between}. '
        f'Load average (one minute, the benchmark itself counted) {machine["load"]:.1f} before, then {loads[0]:.1f} to '
        f'{loads[-1]:.1f}, median {statistics.median(loads):.1f}. Commit {commits}.\n')


# ---- targets

def targets_table(rows: Sequence[Row]) -> str:
    """Every target, what was measured, and whether that reaches it; targets of many rows by their sum."""
    judgements = judge(rows)
    lines = ['| target | at most | measured | verdict |', '| --- | ---: | --- | --- |']
    for target in TARGETS:
        own = [judgement for judgement in judgements if judgement.target is target]
        lines.append(f'| {target.about} | {target.at_most:.2f} | {_measured(own)} | {_verdict(target, own)} |')
    return _text(lines)


def _measured(judgements: Sequence[Judgement]) -> str:
    if len(judgements) < 2:
        return judgements[0].measured if judgements else 'not measured'
    quoted = [(Ratio(**each.row['time_ratio']), each.row['case']) for each in judgements]
    quoted = sorted((ratio.median, case) for ratio, case in quoted if ratio.resolved)
    rest = len(judgements) - len(quoted)
    words = [f'{quoted[-1][0]:.2f} (`{quoted[-1][1]}`)'] if quoted else []
    if len(quoted) > 1:
        words[0] = f'{quoted[0][0]:.2f} to {words[0]}'
    return ', '.join(words + [f'{rest} not resolved'] * bool(rest))


def _verdict(target: Target, judgements: Sequence[Judgement]) -> str:
    """Reached, or by how much missed; of several rows how many."""
    if len(judgements) == 1:
        one, = judgements
        if one.verdict != 'missed':
            return one.verdict
        ratio = Ratio(**one.row['time_ratio'])
        if target.what == 'time' and not ratio.resolved:
            return '**missed**'
        value = memory_ratio(one.row) if target.what == 'memory' else ratio.median
        return f'**missed by {value - target.at_most:.2f}**'
    counts = Counter(judgement.verdict for judgement in judgements)
    words = {'reached': '{} reached', 'not resolved': '{} not resolved', 'missed': '**{} missed**'}
    return ', '.join(word.format(counts[verdict]) for verdict, word in words.items() if counts[verdict])


# ---- tables by kind

def models_table(rows: Sequence[Row]) -> str:
    lines = [
        '| model | beside | images | | MACs | time | ms | of twin | optimiser, ms | of twin | MB | of twin |',
        '| --- | --- | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |']
    for row in rows:
        cells = (f'`{row["model"]}`', twin_of(row), row['batch_size'], MODES[row['mode']], f'{row["macs_ratio"]:.3f}',
                 Ratio(**row['time_ratio']), *_times(row), *_times(row, 'optimizer_seconds'), *_memory(row))
        lines.append(_line(cells))
    return _text(lines)


def floor_text(rows: Sequence[Row]) -> str:
    """What mixing costs at least: a sentence for each model that was timed with `--floor`."""
    lines = []
    for row in rows:
        if 'reading_seconds' not in row:
            continue
        ours, twin, reading = (statistics.median(row[key]) for key in ('seconds', 'twin_seconds', 'reading_seconds'))
        size = row['expert_bytes']
        lines.append(
            f'- `{row["model"]}`, {row["batch_size"]} image, forward: the weights of its experts are {size / 1e6:,.0f} '
            f'MB, which this machine reads in {1e3 * reading:.1f} ms ({size / reading / 1e9:.1f} GB/s). With the '
            f'{1e3 * twin:.1f} ms of `{row["twin"]}` that is a floor of {(twin + reading) / twin:.2f}; measured are '
            f'{1e3 * ours:.1f} ms, {ours / twin:.2f}, or {ours / (twin + reading):.2f} of the floor.')
    return _text(lines or ['Not measured yet.'])


def layers_table(rows: Sequence[Row]) -> str:
    lines = ['| layer | | beside | time | verdict | ms | of the other | MB | of the other |',
             '| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: |']
    told = None
    for row in rows:
        name = '' if (row['case'], row['mode']) == told else f'`{row["case"]}`'
        told = row['case'], row['mode']
        aim = f'{row["verdict"]} ({row["at_most"]:.2f})' if row['verdict'] else ''
        lines.append(_line((name, MODES[row['mode']] if name else '', row['twin'], Ratio(**row['time_ratio']), aim,
                            *_times(row), *_memory(row))))
    abouts = {row['case']: row['about'] for row in rows}
    return _text([*lines, '', *(f'- `{case}`: {about}' for case, about in abouts.items())])


def dispatch_table(rows: Sequence[Row]) -> str:
    """One line a cell and mode, one column a way; the experts alone, which they are ratios to, in milliseconds."""
    ways = list(dict.fromkeys(row['layer'] for row in rows))
    cells = {}
    for row in rows:
        cells.setdefault((row['case'], row['mode']), {})[row['layer']] = row
    lines = [f'| tokens, experts, k | | experts alone, ms | {" | ".join(ways)} |',
             f'| --- | --- | ---: |{" --- |" * len(ways)}']
    for (case, mode), found in cells.items():
        alone = _times(next(iter(found.values())))[1]
        lines.append(_line((f'`{case}`', MODES[mode], alone, *(Ratio(**found[way]['time_ratio']) for way in ways))))
    return _text(lines)


def detectors_table(rows: Sequence[Row]) -> str:
    lines = ['| detector, one image | | pixels | parameters | GMACs | time | ms | MB |',
             '| --- | --- | --- | ---: | ---: | --- | ---: | ---: |']
    for row in rows:
        name = row['config'].rpartition('/')[2].replace('.yaml', '')
        size = ' x '.join(map(str, row['input_size'][1:]))
        lines.append(_line((name, MODES[row['mode']], size, f'{row["parameters"]:,}', f'{row["macs"] / 1e9:.1f}',
                            1 if row['first'] else Ratio(**row['time_ratio']), _times(row)[0], _memory(row)[0])))
    return _text(lines)


def loading_table(rows: Sequence[Row]) -> str:
    lines = ["| data | time to timm's | images a second | timm's | workers |", '| --- | --- | ---: | ---: | ---: |']
    for row in rows:
        rates = (f'{row["images"] / statistics.median(row[key]):,.0f}' for key in ('seconds', 'twin_seconds'))
        lines.append(_line((row['about'], Ratio(**row['time_ratio']), *rates, row['workers'])))
    return _text(lines)


def compile_table(rows: Sequence[Row]) -> str:
    lines = ['| model | images | | compiled / eager | compiled, ms | eager, ms | compilation, s | graph breaks |',
             '| --- | ---: | --- | --- | ---: | ---: | ---: | ---: |']
    for row in rows:
        lines.append(_line((f'`{row["model"]}`', row['batch_size'], MODES[row['mode']], Ratio(**row['time_ratio']),
                            *_times(row), f'{row["compile_seconds"]:.0f}', row['graph_breaks'])))
    return _text(lines)


def _times(row: Row, key: str = 'seconds') -> list[str]:
    """Medians in milliseconds, of ours and of the other."""
    return [milliseconds(row[name]).removesuffix(' ms') if name in row else '' for name in (key, f'twin_{key}')]


def _memory(row: Row) -> list[str]:
    return [f'{row[name] / 1e6:,.0f}' if name in row else '' for name in ('memory', 'twin_memory')]


def _line(cells: Sequence[Any]) -> str:
    return f'| {" | ".join(map(str, cells))} |'


def _text(lines: Sequence[str]) -> str:
    return '\n'.join(lines) + '\n'


# ---- figure

def figure(report: Mapping[str, Any]) -> str:
    """The ratio of time of every model to its dense twin, a dot a round, as an SVG file."""
    groups: dict[str, list[tuple[str, list[float], float | None]]] = {}
    said = []
    for row in report['rows']:
        if row['kind'] == 'model' and row['live'] is None:
            label = f'{MODES[row["mode"]]}, {counted(row["batch_size"], "image")}'
            of_rounds = [a / b for a, b in zip(row['seconds'], row['twin_seconds'])]
            groups.setdefault(row['model'], []).append((label, of_rounds, aim_of(row)))
            said.append(f'{row["model"]}, {label} {Ratio(**row["time_ratio"])}')
    chart = ratios(groups, 'time / time of the twin; a dot a round, red: at most')
    return chart_file(chart, 'Time of a model to that of its dense twin', f'Median ratio of time: {"; ".join(said)}')
