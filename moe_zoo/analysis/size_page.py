"""The object-size analysis in words, tables and charts: a section of the page, and the lines that a terminal shows.

Letters: O objects, E experts, S = 3 size classes.
"""
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from ..errors import counted
from .charts import curves, heat_map
from .object_gates import SIZES
from .object_sizes import LayerSizes, SizeAnalysis
from .page import Block, Figure, Section, Stats, Table

CONTROLS = {  # name -> whether it must separate, and what it is
    'untrained': (False, 'routers drawn anew: must not separate'),
    'planted': (True, 'routers that know the object sizes: must separate'),
}
DRAWN_LAYERS = 3
DRAWN = 8  # experts of a layer: as many as there are colours
COLUMNS = {  # heading of a table -> the metrics of it, of all objects and by size
    'AP': ('AP', 'APs', 'APm', 'APl'),
    'AP50': ('AP50', 'AP50s', 'AP50m', 'AP50l'),
    'AR': ('AR', 'ARs', 'ARm', 'ARl'),
}


def control_sentence(name: str, control: SizeAnalysis) -> str:
    """What a control had to show and did show."""
    expected, what = CONTROLS[name]
    strongest = control.strongest
    outcome = 'as it must' if control.separates == expected else 'AGAINST EXPECTATION: do not trust the verdicts above'
    return (f'Control {name} ({what}): {"separates" if control.separates else "does not separate"}, {outcome} '
            f'(separation {strongest.separation:.3f}, p = {strongest.chance_p:.3f} for permuted images, '
            f'{"none" if strongest.untrained_p is None else f"{strongest.untrained_p:.3f}"} for shuffled routers).')


def matches_by_expert(layer: LayerSizes, sizes: np.ndarray, found: np.ndarray) -> Dict[str, Any]:
    """How many objects each expert of a layer leads, and how many of them the detector found.

    Args:
        layer: Tells the leading expert of every object.
        sizes: (O,) size classes.
        found: (O,) whether the detector found each.

    Returns:
        layer; rows: for every expert, and for -1 where objects are led by none, `expert`, and by size `objects` and
        `found`.
    """
    rows = []
    for expert in [*range(layer.mass.shape[1]), *([-1] if (layer.leader < 0).any() else [])]:
        led = layer.leader == expert
        rows.append({
            'expert': expert,
            'objects': {size: int((led & (sizes == s)).sum()) for s, size in enumerate(SIZES)},
            'found': {size: int((led & found & (sizes == s)).sum()) for s, size in enumerate(SIZES)}})
    return {'layer': layer.name, 'rows': rows}


def trial_table(ap: Mapping[str, Mapping[str, Optional[float]]]) -> List[str]:
    """AP, AP50 and AR in percent, of all objects and by size, as lines of text."""
    keys = [key for group in COLUMNS.values() for key in group]
    lines = ['In %, of all objects and of small, medium and large ones (expert: does all the work; without: taken out; '
             'K: so many work)', f'{"":<12}' + ''.join(f'{key:>7}' for key in keys)]
    for name, row in ap.items():
        lines.append(f'{name:<12}' + ''.join(
            f'{"-":>7}' if row.get(key) is None else f'{row[key]:7.1f}' for key in keys))
    return lines


def size_section(
        content: Mapping[str, Any],
        pictures: Sequence[Tuple[str, bytes, str]] = (),
        command: str = '',
        title: str = 'Which expert serves which object size',
) -> Section:
    """The section of the page.

    Args:
        content: As object_sizes.json holds it.
        pictures: (file name, bytes, words) of scenes with boxes.
        command: That makes all this again.
        title: Heading.
    """
    sizes = content['sizes']
    layers = sorted(sizes['layers'], key=lambda layer: -layer['separation'])[:DRAWN_LAYERS]
    blocks: List[Block] = [
        Stats([(f'{number:,}', f'{size} objects') for size, number in sizes['objects'].items()]
              + [(f'{sizes["images"]:,}', 'images with objects')]),
        *[block for layer in layers for block in _layer(layer, sizes)],
        *_tests(sizes), *_left_out(sizes, layers), *_trials(content['ap'], content['passes']),
        *_matches(content['matches']), *_pictures(pictures, content['matches']['layer']),
        *(control['sentence'] for control in content['controls'].values()),
        *([command] if command else []),
    ]
    return Section(title, 'done', _headline(layers[0], sizes), blocks, content['seconds']['all'])


def _headline(layer: Mapping[str, Any], sizes: Mapping[str, Any]) -> str:
    found = 'Experts **separate** object sizes' if sizes['separates'] else \
        'Experts do **not** separate object sizes more than chance and architecture make them'
    if layer['explained'] is None:
        return f'{found}: all objects have the same gates.'
    untrained = '' if layer['untrained_separation'] is None else \
        f', separation {layer["separation"]:.3f} where shuffled routers have {layer["untrained_separation"]:.3f}'
    return (f'{found}: in `{layer["name"]}` size explains {100 * layer["explained"]:.0f} % of the variance of the '
            f'gates among objects ({100 * layer["explained_by_chance"]:.1f} % by chance){untrained}.')


def _layer(layer: Mapping[str, Any], sizes: Mapping[str, Any]) -> List[Block]:
    experts = len(layer['expert_p'])
    shown = _most_moved(layer, experts)
    known = [size for size in SIZES if layer['mass'][size] is not None]
    mass = [[100 * layer['mass'][size][e] for size in known] for e in shown]
    rows = [[f'expert {e}', *(_cell(layer, size, e) for size in SIZES), f'{layer["expert_p"][e]:.3f}'] for e in shown]
    rest = [100 * (1 - sum(layer['mass'][size])) for size in known]
    if max(rest, default=0) > .1:
        rows.append(['no one', *(f'{100 * (1 - sum(layer["mass"][size])):.1f} %' if size in known else None
                                 for size in SIZES), None])
    note = '' if len(shown) == experts else \
        f' {len(shown)} of {experts} experts are drawn, those whose mass differs most.'
    blocks: List[Block] = [
        f'**`{layer["name"]}`.** An object has {layer["attribution"]}.{note}',
        Figure(heat_map([str(e) for e in shown], known, mass, 'expert', 'objects', '{:.1f}'),
               f'Gate mass of each expert of {layer["name"]} on objects by size; the numbers are drawn in.',
               f'`{layer["name"]}`: gate mass of each expert on the objects of a size, %.')]
    if layer['curve']:
        lines = [(f'expert {e}', [(area ** .5, 100 * mean[e], 100 * half[e]) for area, mean, half in layer['curve']])
                 for e in shown]
        ends = '; '.join(f'{name}: {line[0][1]:.0f} % to {line[-1][1]:.0f} %' for name, line in lines)
        blocks.append(Figure(
            curves(lines, 'root of the area of the object, pixels', 'gate, %', '{:.0f}', least=0.),
            f'Mean gate over the size of objects, from the smallest to the largest. {ends}.',
            "Mean gate over the size of objects (COCO's classes end at 32 and 96), 95 % intervals by image."))
    return [*blocks, Table(
        ['', *(f'{size} ({sizes["objects"][size]})' for size in SIZES), 'p (chance)'], rows,
        'Gate mass, half its 95 % interval (images are the independent cases; ? where they are fewer than four), and '
        'in brackets the objects that the expert leads.'), layer['verdict'][:1].upper() + layer['verdict'][1:]]


def _most_moved(layer: Mapping[str, Any], experts: int) -> List[int]:
    known = np.array([row for row in layer['mass'].values() if row is not None])
    order = np.argsort(-np.ptp(known, axis=0), kind='stable')[:DRAWN]
    return sorted(order.tolist()) if experts > DRAWN else list(range(experts))


def _cell(layer: Mapping[str, Any], size: str, expert: int) -> Optional[str]:
    if layer['mass'][size] is None:
        return None
    half = '?' if layer['half'][size] is None else f'{100 * layer["half"][size][expert]:.1f}'
    return f'{100 * layer["mass"][size][expert]:.1f} ± {half} % ({layer["leads"][size][expert]})'


def _tests(sizes: Mapping[str, Any]) -> List[Block]:
    return [
        f'A layer separates sizes where two tests agree at {sizes["alpha"]:g}. **Chance:** gates are permuted among '
        f'the images ({sizes["permutations"]} times; where gates are those of FPN levels, among the levels as well). '
        '**Architecture:** features tell sizes, so that a router that learned nothing separates them too; the trained '
        f'one is compared with {sizes["shuffles"]} versions of itself whose weights are shuffled, on the same '
        'features. It is an association: an expert may follow scenes in which small objects are common.']


def _left_out(sizes: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> List[Block]:
    rows = [[layer['name'], layer['separation'], layer['chance_p'], layer['untrained_p'],
             {True: 'separates', False: 'no', None: 'no verdict'}[layer['separates']]] for layer in sizes['layers']]
    blocks: List[Block] = []
    if len(rows) > len(layers):
        blocks.append(Table(['layer', 'separation', 'p (chance)', 'p (shuffled)', 'verdict'], rows,
                            f'All routed layers; the {len(layers)} with the largest separation are drawn above.'))
    return blocks + [f'Not analysed: `{name}`, because {reason}.' for name, reason in sizes['skipped'].items()]


def _trials(ap: Mapping[str, Mapping[str, Optional[float]]], passes: int) -> List[Block]:
    keys = [key for group in COLUMNS.values() for key in group]
    rows = [[name, *(None if row.get(key) is None else f'{row[key]:.1f}' for key in keys)] for name, row in ap.items()]
    blocks: List[Block] = [Table(
        ['router', *keys], rows,
        'In %: AP and AP50, and AR of 100 detections, of all, small, medium and large objects. `expert 0`: does all '
        'the work with the whole combine weight; `without 0`: taken out; `K = 1`: so many experts work. '
        f'{counted(passes, "evaluation")} in all.')]
    forced = {name: row for name, row in ap.items() if name.startswith('expert ')}
    by_size = {size: key for size, key in zip(SIZES, COLUMNS['AP'][1:]) if ap['free'].get(key) is not None}
    if forced and by_size:
        lost = [[max(0., ap['free'][key] - (row.get(key) or 0.)) for key in by_size.values()]
                for row in forced.values()]
        blocks.insert(0, Figure(
            heat_map(list(forced), list(by_size), lost, '', 'objects', '{:.1f}'),
            'Points of AP that are lost by object size with every expert forced; the numbers are drawn in.',
            'Points of AP that objects of a size lose where one expert does all the work.'))
    return blocks


def _matches(matches: Mapping[str, Any]) -> List[Block]:
    rows = []
    for row in matches['rows']:
        total, found = (sum(row[key].values()) for key in ('objects', 'found'))
        cells = [_share(row['found'][size], row['objects'][size]) for size in SIZES]
        name = f'expert {row["expert"]}' if row['expert'] >= 0 else 'no one'
        rows.append([name, total, _share(found, total), *cells])
    return [Table(
        ['leader', 'objects', 'found', *SIZES], rows,
        f'Objects by the expert of `{matches["layer"]}` that leads them, and how many of them were found: by a '
        'detection of the right category and a score above 0.5 that overlaps by a half.')]


def _share(found: int, objects: int) -> Optional[str]:
    return f'{100 * found / objects:.0f} % of {objects}' if objects else None


def _pictures(pictures: Sequence[Tuple[str, bytes, str]], layer: str) -> List[Block]:
    if not pictures:
        return []
    return [f'Detections in the colour of the expert of `{layer}` that leads them, with its share; objects that were '
            'missed are dashed.', *(Figure(data, f'A scene with boxes. {words}', words) for _, data, words in pictures)]

