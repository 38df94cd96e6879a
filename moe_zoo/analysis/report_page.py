"""The page about finished runs: what they reach, what they cost, how they learned and what their experts do.

From the runs of `moe_zoo.analysis.runs` to sections of a `Page`. Runs are compared on one data set only. A routed run
and its dense twin share a colour and a shape; the twin is hollow, its lines are dashed.

Letters: E experts.
"""
import json
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Optional

from ..documents import parse_json
from ..errors import counted
from .charts import Mark, curves, heat_map, trade_offs
from .consistency import consistency_section
from .expert_page import LEFT_OUT, expert_sections
from .expert_words import listing
from .origin import short_commit
from .page import Block, Cell, Data, Figure, Page, Section, Sorted, Table
from .runs import KINDS, Found, LayerUse, Run, by_data
from .size_page import size_section

LINES = 6  # layers of a chart of balance

LEAD = (
    'Finished trainings side by side: what they reach, what it costs, and what the experts did for it. Filled marks '
    'are mixtures of experts, hollow ones dense networks; a dashed line joins a mixture to its dense twin, which was '
    'trained by the same recipe.')
COSTS = (
    '**MACs** are multiply-adds of one image, those that ran: routers, chosen experts and all the rest, counted on '
    'evaluation images at the size that the run uses. **Time** is that of one image, forward, in the median; models '
    'took turns on one machine, so that their ratios are worth more than the milliseconds.')
LEARNING = (
    'Auxiliary losses are part of the loss of a mixture, so that it may lie above that of its twin. Curves of several '
    'seeds are their mean.')
BALANCE = (
    "**Evenness** is the entropy of the experts' shares over its largest value: 1 where all are used alike, 0 where "
    'one does everything. An expert is **dead** when it carries less than 1 % of the weight (with more than ten '
    'experts, less than a tenth of a fair share). **Dropped** is what found no room at its expert.')


def report_page(found: Found, facts: Sequence[tuple[str, str]] = ()) -> Page:
    """The whole page.

    Args:
        found: From `read_runs`, measured or not.
        facts: For the foot of the page.
    """
    runs, groups = found.runs, by_data(found.runs)
    broken: list[str] = []
    sections: list[Optional[Section]] = [_all_runs(runs)]
    for part, meaning in ((_costs, COSTS), (_learning, LEARNING), (_experts, BALANCE)):
        found_parts = [part(data, group) for data, group in groups.items()]
        sections += _explained([section for section in found_parts if section is not None], meaning)
    for run in runs:
        sections += analyses_of(run, broken)
    sections.append(_left_out(found, broken))
    names = listing(list(dict.fromkeys(data for _, data in groups)))
    return Page(
        f'{counted(len(runs), "model")} on {names}: accuracy against cost', LEAD,
        [section for section in sections if section is not None], [*facts, *_facts(runs)])


def _explained(sections: Sequence[Section], meaning: str) -> list[Section]:
    """Sections of one sort, the first of which says what its words mean."""
    return [replace(section, blocks=[*section.blocks, meaning]) if number == 0 else section
            for number, section in enumerate(sections)]


# ---- the table

def _all_runs(runs: Sequence[Run]) -> Section:
    kinds = {run.kind for run in runs}
    score = KINDS[kinds.pop()][1] if len(kinds) == 1 else 'top-1 or AP, %'
    columns = [
        'run', score, 'MACs an image', 'time an image', 'parameters', 'evenness', 'dead experts', 'family']
    rows = [[
        f'{run.name}\n{run.model}', _score_cell(run), _macs_cell(run), _time_cell(run), _parameters_cell(run),
        _evenness(run), _dead_cell(run), f'{run.family}\non {run.dataset}',
    ] for run in runs]
    shown = [n for n, _ in enumerate(columns) if any(row[n] for row in rows)]
    columns, rows = [columns[n] for n in shown], [[row[n] for n in shown] for row in rows]
    table = Table(columns, rows, 'At the end of training; ±: deviation over seeds',
                  [_families(run, runs) for run in runs], 'Family')
    slow = [run for run in runs if run.macs_become_time is False]
    blocks: list[Block] = [table, Data('runs.json', [run.as_dict() for run in runs])]
    if slow:
        blocks.append('**MACs that do not turn into time:** ' + '; '.join(
            f'`{run.name}` runs {run.macs_ratio:.2f} × the MACs of its twin in {run.time_ratio.median:.2f} × its time '
            f'(spread {run.time_ratio.spread:.2f})' for run in slow) + '.')
    trainings = sum(len(run.trainings) for run in runs)
    routed = sum(run.routed for run in runs)
    headline = (f'{counted(len(runs), "model")} from {counted(trainings, "training")}: {routed} with experts, '
                f'{len(runs) - routed} dense.')
    return Section('All runs', 'done', headline, blocks)


def _families(run: Run, runs: Sequence[Run]) -> list[str]:
    """What a row is chosen by: a twin also stands with the families it is compared to."""
    return list(dict.fromkeys([run.family, *(other.family for other in runs if other.twin is run)]))


def _score_cell(run: Run) -> Cell:
    if run.mean() is None:
        return None
    seeds = counted(len(run.scores()), 'seed')
    gain = run.gain
    over = f'{_signed(statistics.fmean(gain))} over its twin\n{seeds}' if gain else seeds
    return Sorted(f'{score_text(run)}\n{over}', run.mean())


def score_text(run: Run) -> str:
    """`97.31 ± 0.24` for several seeds, `97.31` for one."""
    sd = run.sd()
    return f'{run.mean():.2f}' if sd is None else f'{run.mean():.2f} ± {sd:.2f}'


def _signed(points: float) -> str:
    return f'{points:+.2f}'.replace('-', '−')


def _macs_cell(run: Run) -> Cell:
    if macs(run) is None:
        return None
    note = f'\n{run.macs_ratio:.2f} × its twin' if run.macs_ratio else ''
    return Sorted(quantity(macs(run)) + ('' if run.measured else ' at most') + note, macs(run))


def _time_cell(run: Run) -> Cell:
    latency = run.measured.latency if run.measured else None
    if latency is None:
        return None
    ratio, note = run.time_ratio, ''
    if ratio is not None:
        note = f'\n{ratio.median:.2f} × its twin' if ratio.resolved else '\nratio not resolved'
    note += '\nMACs do not turn into time' if run.macs_become_time is False else ''
    return Sorted(f'{_milliseconds(latency[1])}{note}', latency[1])


def _parameters_cell(run: Run) -> Cell:
    if run.parameters is None:
        return None
    active = run.active_parameters
    note = f'\n{quantity(active)} active' if active not in (None, run.parameters) else ''
    return Sorted(quantity(run.parameters) + note, run.parameters)


def _evenness(run: Run) -> Cell:
    values = [use.evenness for use in run.use if not use.channels]
    return Sorted(f'{statistics.fmean(values):.3f}', statistics.fmean(values)) if values else None


def _dead_cell(run: Run) -> Cell:
    layers = [use for use in run.use if not use.channels]
    if not layers:
        return None
    dead, all_of_them = (sum(map(len, parts)) for parts in ([u.dead for u in layers], [u.share for u in layers]))
    return Sorted(f'{dead} of {all_of_them}', dead)


def quantity(number: float) -> str:
    """1234567 -> '1.23 M'."""
    for size, letter in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if number >= size:
            return f'{number / size:.3g} {letter}' if number < 999.5 * size else f'{number / size:.0f} {letter}'
    return f'{number:.0f}'


def _milliseconds(seconds: float) -> str:
    return f'{1000 * seconds:.3g} ms' if seconds < 1 else f'{seconds:.3g} s'


def macs(run: Run) -> Optional[float]:
    """MACs of an image: those that ran, where they were counted, else at most."""
    return run.measured.macs_executed if run.measured else run.macs_max


# ---- accuracy against cost

def _costs(data: tuple[str, str], runs: Sequence[Run]) -> Optional[Section]:
    kind, name = data
    known = [run for run in runs if run.mean() is not None and macs(run)]
    if not known:
        return None
    best = max(known, key=lambda run: (run.mean(), -macs(run)))  # of equals the cheapest
    headline = (f'**{best.name}** reaches most, {score_text(best)} %, with {quantity(macs(best))} MACs an image'
                f'{_pixels(best)}{_beside_twins(known)}.')
    blocks: list[Block] = [*_cost_figures(known, kind, name), *_budgets(known, kind)]
    blocks += _busy(known)
    blocks += [f'`{run.name}`: MACs leave out {listing([f"`{op}`" for op in run.measured.uncounted])}, which could not '
               'be counted.' for run in known if run.measured and run.measured.uncounted]
    return Section(f'{name}: what is reached at which cost', 'done', headline, blocks)


def _pixels(run: Run) -> str:
    """` of 32 x 32 pixels`, where that was measured."""
    return f' of {run.measured.input_size[-2]} x {run.measured.input_size[-1]} pixels' if run.measured else ''


def _busy(runs: Sequence[Run]) -> list[Block]:
    """Said where the machine had more to do than to time."""
    machines = [run.measured.machine for run in runs if run.measured and run.measured.machine]
    load, cores = max(((m['load'], m['cores']) for m in machines), default=(0., 1))
    return [f'**The machine was busy** while it timed (load {load:.1f} on {counted(cores, "core")}): milliseconds are '
            'too many, and spreads wide.'] if load > cores + .5 else []


def _beside_twins(runs: Sequence[Run]) -> str:
    """`; over their dense twins, a gains +0.4 points and b loses 1.2`, where there are twins."""
    gains = [(run, run.gain) for run in runs if run.gain]
    if not gains:
        return ''
    texts = [f'`{run.name}` {_signed(statistics.fmean(gain))}'
             + (f' ± {statistics.stdev(gain):.2f}' if len(gain) > 1 else '') for run, gain in gains]
    return f'. Points over the dense twin: {"; ".join(texts)}'


def _cost_figures(runs: Sequence[Run], kind: str, name: str) -> list[Figure]:
    """Accuracy over MACs, and over time where it was measured."""
    series = _series(runs)
    counted_all = all(run.measured for run in runs)
    unit, letter = (1e9, 'billion') if max(map(macs, runs)) >= 1e9 else (1e6, 'million')
    figures = [_trade_off(
        runs, series, {run.name: macs(run) / unit for run in runs},
        {run.name: _around(run.measured.macs_executed, run.measured.macs_sd, unit) for run in runs if run.measured},
        f'{letter} MACs an image' + ('' if counted_all else ' (at most, where not counted)'), kind,
        f'{_score_name(kind)} against MACs', 'Across: deviation over the images.', f'{name}-macs.json')]
    timed = [run for run in runs if run.measured and run.measured.latency]
    if timed:
        times = {run.name: [1000 * t for t in run.measured.latency] for run in timed}
        figures.append(_trade_off(
            timed, series, {key: time[1] for key, time in times.items()},
            {key: (time[0], time[2]) for key, time in times.items()}, 'milliseconds an image', kind,
            f'{_score_name(kind)} against time', 'Across: quartiles of the rounds.', f'{name}-time.json'))
    return figures


def _around(mean: float, sd: float, unit: float) -> Optional[tuple[float, float]]:
    """From one deviation below to one above; nothing where every image costs the same."""
    return (max(mean - sd, mean / 2) / unit, (mean + sd) / unit) if sd else None


def _trade_off(
        runs: Sequence[Run],
        series: Mapping[str, int],
        x: Mapping[str, float],
        ranges: Mapping[str, Optional[tuple[float, float]]],
        x_label: str,
        kind: str,
        title: str,
        note: str,
        file: str,
) -> Figure:
    marks = [Mark(run.name, x[run.name], run.mean(), series[run.name], not run.routed, ranges.get(run.name), run.sd())
             for run in runs]
    place = {run.name: number for number, run in enumerate(runs)}
    joined = [(place[run.twin.name], place[run.name]) for run in runs if run.twin and run.twin.name in place]
    names = {number: name for name, number in reversed(series.items())}
    bars = ' Upright bars: deviation over the seeds.' if any(run.sd() is not None for run in runs) else ''
    across = f' {note}' if any(ranges.values()) else ''
    words = '; '.join(f'{mark.name}: {mark.x:.4g} {x_label}, {mark.y:.2f} %' for mark in marks)
    content = [{'run': mark.name, x_label: mark.x, 'from to': mark.x_range, KINDS[kind][1]: mark.y,
                'deviation over seeds': mark.y_half, 'dense': mark.hollow} for mark in marks]
    shown = [names[number] for number in sorted(names)]
    chart = trade_offs(marks, joined, shown, x_label, KINDS[kind][1], '{:.4g}', most=100)
    return Figure(chart, f'{title}. {words}', f'**{title}.**{bars}{across}', Data(file, content))


def _series(runs: Sequence[Run]) -> dict[str, int]:
    """A number for each run; a twin has that of the first mixture beside it."""
    numbers: dict[str, int] = {}
    ordered = sorted(runs, key=lambda run: not run.routed)
    for run in ordered:
        if run.name not in numbers:
            numbers[run.name] = len(set(numbers.values()))
        if run.twin is not None and run.twin in runs:
            numbers.setdefault(run.twin.name, numbers[run.name])
    return numbers


def _budgets(runs: Sequence[Run], kind: str) -> list[Block]:
    """The runs that no cheaper one beats, by cost, and how to train them."""
    front: list[Run] = []
    for run in sorted(runs, key=lambda run: (macs(run), -run.mean())):
        if not front or run.mean() > front[-1].mean():
            front.append(run)
    rows = [[quantity(macs(run)), run.name, f'{score_text(run)} %'] for run in front]
    table = Table(['from MACs', 'most accurate', _score_name(kind)], rows,
                  'From which number of MACs an image on which model is the most accurate')
    return [table, 'To train them again, from the most accurate on:',
            '$ ' + '\n'.join(training_command(run) for run in reversed(front))]


def training_command(run: Run) -> str:
    """Trains a run again, in another folder."""
    folder = run.trainings[0].folder
    if run.kind == 'classification':
        words = ['moe-zoo', 'train-imagenet', '--config', str(folder / 'args.yaml'), 'experiment=again']
    else:
        words = ['moe-zoo', 'train-coco', '--config-file', str(folder / 'config.yaml'), 'OUTPUT_DIR', 'runs/again']
    return shlex.join(words)


# ---- learning

def _learning(data: tuple[str, str], runs: Sequence[Run]) -> Optional[Section]:
    kind, name = data
    learned = [run for run in runs if run.curve]
    if not learned:
        return None
    series = _series(runs)
    figures = []
    for key, label, form in (('score', KINDS[kind][1], '{:.1f}'), ('loss', 'loss in training', '{:.2f}')):
        lines = {run.name: [(row['step'], row[key]) for row in run.curve if key in row] for run in learned}
        lines = {each: points for each, points in lines.items() if len(points) > 1}
        if lines:
            figures.append(_curve_figure(lines, learned, series, label, form, f'{name}-{key}.json'))
    figures += [figure for run in learned for figure in _balance_figures(run)]
    if not figures:
        return None
    least = sorted((run.curve[-1]['loss'], run.name) for run in learned if 'loss' in run.curve[-1])
    ends = listing([f'`{run}` {loss:.3f}' for loss, run in least], 4)
    title = f'{name}: how they learned'
    return Section(title, 'done', f'Loss at the end, the least first: {ends}.' if least else '', figures)


def _curve_figure(
        lines: Mapping[str, Sequence[tuple[float, float]]],
        runs: Sequence[Run],
        series: Mapping[str, int],
        label: str,
        form: str,
        file: str,
) -> Figure:
    drawn = [run for run in runs if run.name in lines]
    chart = curves(
        [(run.name, lines[run.name]) for run in drawn], f'{drawn[0].unit}s done', label, form, log=False,
        series=[series[run.name] for run in drawn], dashed=[n for n, run in enumerate(drawn) if not run.routed])
    dashed = ' Dashed: dense.' if any(run.routed for run in drawn) and not all(run.routed for run in drawn) else ''
    words = '; '.join(f'{each}: from {points[0][1]:.4g} to {points[-1][1]:.4g}' for each, points in lines.items())
    return Figure(chart, f'{label} while learning. {words}.', f'**{_capital(label)}.**{dashed}',
                  Data(file, dict(lines)))


def _balance_figures(run: Run) -> list[Figure]:
    """Evenness of the layers that end least even; the share of live channels where gates switch them off."""
    figures = []
    for what, layers, text in (
            ('evenness', run.balance, 'Evenness of the experts'), ('live', run.live, 'Channels that are on')):
        layers = {layer: points for layer, points in layers.items() if len(points) > 1}
        if not layers:
            continue
        least = sorted(layers, key=lambda layer: layers[layer][-1][1])[:LINES]
        chart = curves(
            [(_end(layer), layers[layer]) for layer in layers if layer in least], f'{run.unit}s done',
            'evenness' if what == 'evenness' else 'share of channels', '{:.2f}', log=False, span=(.9, 1.))
        left = f' The {LINES} least of {len(layers)} layers.' if len(layers) > LINES else ''
        words = '; '.join(f'{layer}: {layers[layer][-1][1]:.3f} at the end' for layer in least)
        figures.append(Figure(
            chart, f'{text} of {run.name} while learning. {words}.', f'**{text}** of `{run.name}`.{left}',
            Data(f'{_file(run)}-{what}.json', layers)))
    return figures


# ---- experts

def _experts(data: tuple[str, str], runs: Sequence[Run]) -> Optional[Section]:
    """Who did the work at the end, by layer."""
    used = [run for run in runs if any(not use.channels for use in run.use)]
    if not used:
        return None
    layers = [(run, use) for run in used for use in run.use if not use.channels]
    dead = [(run, use) for run, use in layers if use.dead]
    total = sum(len(use.share) for _, use in layers)
    headline = (f'**{sum(len(use.dead) for _, use in dead)} of {total:,} experts are dead**, in '
                f'{len(dead)} of {counted(len(layers), "layer")}.' if dead else
                f'No expert is dead: all {total:,} in {counted(len(layers), "layer")} carry their part.')
    rows = [[f'{run.name}\n{use.layer}', len(use.share), Sorted(f'{use.evenness:.3f}', use.evenness),
             Sorted(f'{100 * use.dropped:.1f} %', use.dropped), _range(use),
             _named(use.dead)] for run, use in layers]
    groups = [[run.name] for run, _ in layers]
    table = Table(['layer', 'experts', 'evenness', 'dropped', 'shares from, to', 'dead experts'], rows,
                  'Every routed layer on the evaluation images', groups, 'Run')
    return Section(f'{data[1]}: who does the work', 'done', headline,
                   [*(_use_figure(run) for run in used), table])


def _named(dead: Sequence[int]) -> str:
    return f'expert{"s" * (len(dead) > 1)} {listing(dead)}' if dead else 'none'


def _range(use: LayerUse) -> Cell:
    low, high = 100 * min(use.share), 100 * max(use.share)
    return Sorted(f'{low:.1f} to {high:.1f} %', low)


def _use_figure(run: Run) -> Figure:
    layers = [use for use in run.use if not use.channels]
    most = max(len(use.share) for use in layers)
    values = [[100 * share for share in use.share] + [None] * (most - len(use.share)) for use in layers]
    words = '; '.join(f'{use.layer}: ' + ', '.join(f'{100 * s:.1f} %' for s in use.share) for use in layers)
    fair = sorted({len(use.share) for use in layers})
    return Figure(
        heat_map([_end(use.layer) for use in layers], [str(e) for e in range(most)], values, '', 'expert'),
        f'Share of the work of every expert of {run.name} by layer. {words}.',
        f'`{run.name}`: share of every expert by layer, %. A fair share is '
        + listing([f'{100 / n:.3g} %' for n in fair]) + '.',
        Data(f'{_file(run)}-experts.json', {use.layer: {'share': use.share, 'dead': use.dead} for use in layers}))


# ---- what the analyses of a run said

def analyses_of(run: Run, broken: list[str]) -> list[Section]:
    """Sections from experts.json and object_sizes.json in the folders of a run, or one below."""
    sections = []
    for training in run.trainings:
        own = [training.folder, *(each for each in sorted(training.folder.iterdir())
                                  if each.is_dir() and not (each / 'args.yaml').exists())]
        for name, build in (('experts.json', _expert_section), ('object_sizes.json', _size_section)):
            for path in (folder / name for folder in own if (folder / name).is_file()):
                try:
                    sections.append(build(run, parse_json(path.read_text(encoding='utf-8'))))
                except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                    reason = f'it lacks {error}' if isinstance(error, KeyError) else str(error)
                    broken.append(f"'{path}' is no analysis that can be read: {reason}.")
    return sections


def _expert_section(run: Run, result: Mapping[str, Any]) -> Section:
    """The sections of analyze-experts as one, without the pictures, which the JSON does not hold."""
    parts = [part for part in expert_sections(result) if part.title != LEFT_OUT]
    if 'consistency' in result:
        parts.append(consistency_section([(each['name'], each) for each in result['consistency']['measured']]))
    blocks: list[Block] = []
    for number, part in enumerate(parts):
        title = f'**{part.title}{"" if part.title.endswith("?") else "."}** {part.headline}'
        blocks += [title] * (number > 0) + list(part.blocks)
    return Section(f'What the experts of {run.name} do', 'done', parts[0].headline,
                   [*blocks, Data(f'{_file(run)}-analysis.json', result)])


def _size_section(run: Run, content: Mapping[str, Any]) -> Section:
    section = size_section(content, title=f'Which expert of {run.name} serves which object size')
    return Section(section.title, 'done', section.headline,
                   [*section.blocks, Data(f'{_file(run)}-object-sizes.json', content)])


# ---- what is missing

def _left_out(found: Found, broken: Sequence[str]) -> Optional[Section]:
    lacking = [f'`{run.name}`: {problem}' for run in found.runs for problem in run.problems]
    texts = [*found.left_out, *broken, *lacking]
    if not texts:
        return None
    folders = len(found.left_out)
    headline = f'{counted(folders, "folder")} could not be used.' if folders else 'Something is missing.'
    return Section('What was left out', 'done', headline, texts)


def _facts(runs: Sequence[Run]) -> list[tuple[str, str]]:
    facts = []
    for name in ('moe_zoo', 'commit', 'torch', 'timm'):
        values = list(dict.fromkeys(run.versions[name] for run in runs if run.versions.get(name)))
        if values:
            values = list(map(short_commit, values)) if name == 'commit' else values
            facts.append(('Trained by commit' if name == 'commit' else f'Trained with {name}', listing(values)))
    machines = {json.dumps(run.measured.machine, sort_keys=True): run.measured for run in runs if run.measured}
    for measured in list(machines.values())[:1]:
        where = measured.machine
        if where:
            facts.append(('Timed on', f'{where["device"]}, {where["threads"]} of {where["cores"]} threads, load '
                                      f'{where["load"]:.1f}, {measured.session}'))
    return facts


# ---- small things

def _end(layer: str, length: int = 18) -> str:
    """The end of a long module name, which tells layers apart."""
    return layer if len(layer) <= length else f'…{layer[-length + 1:]}'


def _score_name(kind: str) -> str:
    """`Top-1 accuracy`."""
    return _capital(KINDS[kind][1].partition(',')[0])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _file(run: Run) -> str:
    return run.name.replace('/', '-').replace(' ', '-')
