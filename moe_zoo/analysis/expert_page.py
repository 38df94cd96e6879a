"""The page about the experts of a classifier: from the numbers of `moe_zoo.analysis.experts` to sections of a `Page`.

Every figure has a sentence for somebody who did not train the model. What is drawn is bounded, and what was left out is
said. Letters: E experts, K chosen experts.
"""
import io
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from PIL import Image

from ..errors import counted
from .charts import curves, estimates, expert_colour, heat_map, histogram, pictures, share_bars, strips
from .expert_records import KINDS
from .expert_words import findings, listing, percent
from .experts import MEANINGS, spread
from .page import Block, Figure, Page, Section, Stats, Table

DRAWN = 8  # experts: as many as there are colours
COLUMNS = 12  # experts of a table of shades
ROWS = 12  # classes of a table of shades, and experts of a chart
THUMBNAIL = 96  # pixels
WHOLE = 224  # pixels of a picture over which patches are drawn

LEFT_OUT = 'What was left out'  # the last section, where anything was

LEAD = (
    'A mixture of experts is a network in which a router decides, image by image or patch by patch, how much each of '
    'several sub-networks, the experts, has to say. This page shows what the router of one model decides, on '
    'images that you chose. Every figure and every sentence comes from this run.')


def expert_page(
        result: Mapping[str, Any],
        pixels: torch.Tensor,
        facts: Sequence[Tuple[str, str]] = (),
        further: Sequence[Section] = (),
) -> Page:
    """The whole page.

    Args:
        result: From `moe_zoo.engine.analyze_experts.analyze_classifier`.
        pixels: (N, C, H, W) uint8, the images in order.
        facts: Of the run, for the foot of the page.
        further: Sections to put before the last, which says what was left out.
    """
    sections = expert_sections(result, pixels)
    last = len(sections) - (sections[-1].title == LEFT_OUT)
    return Page(
        f'What the experts of {result["model"]} do', LEAD, [*sections[:last], *further, *sections[last:]], facts)


def expert_sections(result: Mapping[str, Any], pixels: Optional[torch.Tensor] = None) -> List[Section]:
    """The sections, in order; those without anything to show are left out, and without pixels the images."""
    said = findings(result)
    parts = [
        ('What was found', said['overview'], _overview(result, said)),
        ('Who does the work', said['balance'], _use(result, said)),
        ('Which classes and images an expert serves', said['classes'], _classes(result, pixels)),
        ('What the gates look like', said['depth'], _gates(result, said)),
        ('Where in the image', _where(result), _places(result, pixels)),
        ('If the router chose otherwise', said.get('forced', said.get('k', '')), _otherwise(result, said)),
        (LEFT_OUT, '', _left_out(result)),
    ]
    return [Section(title, 'done', headline, blocks) for title, headline, blocks in parts if blocks]


# ---- sections

def _overview(result: Mapping[str, Any], said: Mapping[str, str]) -> List[Block]:
    layers, free = result['layers'], result['free']
    total = sum(layer['experts'] for layer in layers)
    alive = total - sum(len(layer['dead']) for layer in layers)
    between = [layer['gates']['variance']['between'] for layer in layers]
    stats = [
        (f'{free["accuracy"]:.1f} %', f'of {result["images"]:,} images right'),
        (f'{alive:,} of {total:,}', 'experts in use'),
    ]
    if between[-1] is not None:
        stats.append((percent(between[-1]), 'of what the last router does is explained by the class'))
    if result['forced'] and result['forced']['everywhere']:
        best = max(row['accuracy'] for row in result['forced']['everywhere'])
        stats.append((f'{best - free["accuracy"]:+.1f} points', 'with the best single expert doing everything'))
    return [Stats(stats), *(said[key] for key in said if key != 'overview'),
            'Behind ± is one standard error: numbers that are less than about two of them apart may differ by chance.']


def _use(result: Mapping[str, Any], said: Mapping[str, str]) -> List[Block]:
    layers = result['layers']
    few = [layer for layer in _drawn(result) if layer['experts'] <= 32]
    blocks: List[Block] = [said['alike']] if 'alike' in said else []
    if few:
        bars = [(_short(layer['layer']), layer['importance']) for layer in few]
        alt = '; '.join(f'{name}: ' + ', '.join(percent(s) for s in shares) for name, shares in bars)
        blocks.append(Figure(
            share_bars(bars), f'Share of the weight of every expert. {alt}',
            'One bar a layer, divided by how much of the weight each expert carries. ' + _fair(few)))
    rows = [
        [layer['layer'], layer['experts'], _chosen(layer), layer['unit'], layer['living'],
         f'{layer["entropy"]:.3f}', f'{100 * layer["dropped"]:.1f} %', _pair(layer)]
        for layer in (layers if len(layers) <= 2 * ROWS else _drawn(result))]
    blocks += [
        Table(['layer', 'experts', 'at work', 'decides by', 'in use', 'evenness', 'dropped', 'most alike'], rows),
        '**Evenness:** entropy of the shares, 1 where all are used alike. **Dropped:** found no room at their expert, '
        'or were taken by none. **Most alike:** the two experts whose weights differ least, and by how much.',
        f'**Dead:** {MEANINGS["dead"]} **Twins:** {MEANINGS["twins"]}',
        'How the layers decide: ' + '; '.join(
            f'`{kind}`: {KINDS[kind]}' for kind in dict.fromkeys(layer['kind'] for layer in layers)) + '.',
    ]
    return blocks


def _classes(result: Mapping[str, Any], pixels: Optional[torch.Tensor]) -> List[Block]:
    names, blocks = result['classes'], []
    for layer in _drawn(result, 3):
        columns = _experts_of(layer, COLUMNS)
        rows = _classes_of(result, layer)
        shares = layer['classes']['share']
        values = [[100 * shares[y][c] for c in columns] for y in rows]
        blocks.append(Figure(
            heat_map([_cut(names[y], 14) for y in rows], [str(layer['listed'][c]) for c in columns], values,
                     column_label=f'expert of {_short(layer["layer"])}',
                     value_format='{:.0f}' if layer['experts'] <= 32 else '{:.1f}'),
            f'Share of every expert of {layer["layer"]} by class in percent; the numbers are drawn in.',
            f'`{layer["layer"]}`: percent of the weight that an expert has in the images of a class. Were the class of '
            'no matter to the router, all rows would be equal.'))
    return blocks if pixels is None else [*blocks, *_sheets(result, pixels)]


def _sheets(result: Mapping[str, Any], pixels: torch.Tensor) -> List[Block]:
    """The images that weigh most for each expert of some layers."""
    blocks: List[Block] = []
    blocks.append('**The images that weigh most.** For each expert the images in which it has its largest share of the '
                  'weight, and below it the classes for which it works most.')
    alike = []
    for layer in _drawn(result, 3):
        sheets = [_sheet(result, pixels, layer, c) for c in _experts_of(layer, DRAWN) if _stands_out(layer, c)]
        blocks += sheets
        alike += [] if sheets else [f'`{layer["layer"]}`']
    if alike:
        blocks.append(f'In {listing(alike)} every expert has nearly the same share in every image: none stands out.')
    return blocks


def _stands_out(layer: Mapping[str, Any], column: int) -> bool:
    """Whether the share of an expert in some image is clearly more than usual."""
    return layer['top_images'][column][0]['share'] > 1.02 * layer['importance'][layer['listed'][column]]


def _sheet(result: Mapping[str, Any], pixels: torch.Tensor, layer: Mapping[str, Any], column: int) -> Figure:
    names, expert = result['classes'], layer['listed'][column]
    panels = []
    for row in layer['top_images'][column]:
        target = result['targets'][row['image']]
        panels.append((f'{_cut(names[target], 8)} {percent(row["share"])}', picture(pixels[row['image']], THUMBNAIL),
                       None))
    tops = [f'**{names[row["class"]]}** {percent(row["share"])} ± {percent(row["se"] or 0, 1)}'
            for row in layer['top_classes'][column]]
    state = ', dead' if expert in layer['dead'] else ''
    share = percent(layer['importance'][expert], 1)
    return Figure(
        pictures(panels, 4, ratio=pixels.shape[2] / pixels.shape[3]),
        f'Images in which expert {expert} of {layer["layer"]} weighs most: {", ".join(p[0] for p in panels)}.',
        f'**Expert {expert}** of `{layer["layer"]}` ({share} of the weight{state}): most in {listing(tops)}.')


def _gates(result: Mapping[str, Any], said: Mapping[str, str]) -> List[Block]:
    chosen = [y for y in result['chosen_classes'] if y in set(result['targets'])]
    drawn, names = _drawn(result), [result['classes'][y] for y in chosen]
    blocks: List[Block] = []
    same = [layer for layer in drawn if layer['experts'] == drawn[-1]['experts']]
    columns = {layer['layer']: _experts_of(layer, DRAWN) for layer in same}
    if names:
        rows = [(_short(layer['layer']), [[layer['gates']['by_class'][y][c] for c in columns[layer['layer']]]
                                          for y in chosen]) for layer in same]
        labels = [str(n) for n in range(len(columns[same[0]['layer']]))]
        blocks.append(Figure(
            strips(rows, [_cut(name, 14) for name in names], labels, 'expert'),
            f'Mean gate of each expert for {listing(names)}, layer by layer from the input to the output.',
            'Mean gate of every expert for some classes, from the first layer (top) to the last. Where the dots of a '
            'column lie on each other, the class does not matter to this gate.'))
    blocks += _between(result)
    blocks.append(said['gates'])
    for layer in spread(drawn, 4):
        gates = layer['gates']
        blocks.append(Figure(
            histogram(gates['counts'], f'gate value in {_short(layer["layer"])}'),
            f'Histogram of gate values of {layer["layer"]}.',
            f'`{layer["layer"]}`: {percent(gates["near_zero"])} of the gate values are below 0.1, '
            f'{percent(gates["near_one"])} above 0.9, {percent(gates["zero"])} exactly 0.'
            f'{_competing(layer)}'))
    return blocks


def _between(result: Mapping[str, Any]) -> List[Block]:
    """How class-specific the gates are: with their errors where the layers are few, as a curve where they are many."""
    splits = {layer['layer']: layer['gates']['variance'] for layer in result['layers']}
    splits = {name: split for name, split in splits.items() if split['between'] is not None}
    if not splits:
        return []
    chance = 100 * next(iter(splits.values()))['chance']
    label, alt = 'variance between classes, %', [f'{n}: {percent(v["between"], 1)}' for n, v in splits.items()]
    if len(splits) <= ROWS:
        rows = [(_short(n, 20), 100 * v['between'], 100 * (v['between_se'] or 0)) for n, v in splits.items()]
        chart = estimates(rows, label, ('chance', chance))
    else:
        lines = [(name, [(n, 100 * v[key]) for n, v in enumerate(splits.values(), 1)])
                 for name, key in (('between classes', 'between'), ('chance', 'chance'))]
        chart = curves(lines, 'routed layer, from the input on', label, '{:.0f}', log=False)
    return [Figure(chart, '; '.join(alt), MEANINGS['between'].replace('`', ''))]


def _where(result: Mapping[str, Any]) -> str:
    if not result['places']:
        return ''
    last = result['places'][-1]
    shares = [s for image in last['images'] for row in image['share'] for s in row]
    lost = sum(s is None for s in shares)
    kept = [s for s in shares if s is not None]
    text = (f'In `{last["layer"]}` the first expert of a patch carries {percent(sum(kept) / max(len(kept), 1))} of its '
            'weight on average')
    return f'{text}, and {percent(lost / len(shares))} of the patches are taken by none.' if lost else f'{text}.'


def _places(result: Mapping[str, Any], pixels: Optional[torch.Tensor]) -> List[Block]:
    places = spread(result['places'], 3)
    if not places or pixels is None:
        return []
    blocks: List[Block] = [
        'Every patch in the colour of the expert that weighs most there. Where patches of one colour follow things in '
        'the image, the router looks at content; where they follow the frame, it looks at position. Veiled patches '
        'went to no expert.']
    common = _most_common([image['top'] for place in places for image in place['images']])
    for number, image in enumerate(result['shown']):
        tops = [_tops(place, number) for place in places]
        photo = picture(pixels[image], WHOLE)
        panels = [(_cut(result['classes'][result['targets'][image]], 18), photo, None)]
        for place, top in zip(places, tops):
            grid = [[None if e is None else _colour(e, common) for e in row] for row in top]
            panels.append((_short(place['layer'], 22), photo, grid))
        legend = [(f'expert {e}' if i == 0 else str(e), expert_colour(i)) for i, e in enumerate(common)]
        legend += [('others', 'var(--soft)')] if any(e not in common for e in _flat(tops) if e is not None) else []
        blocks.append(Figure(
            pictures(panels, 3 if len(panels) == 3 else 2, legend, pixels.shape[2] / pixels.shape[3]),
            f'Patches of {result["files"][image]} by expert.', _patch_caption(result, image, places, number)))
    return [*blocks, *_crops(result, pixels), *_logit_maps(result, pixels)]


def _crops(result: Mapping[str, Any], pixels: torch.Tensor) -> List[Block]:
    """For each expert of the last layer that sees places, the patches that it weighs most, with their surroundings."""
    layer = [each for each in _drawn(result) if each['grid']][-1]
    (rows, columns), (height, width) = layer['grid'], pixels.shape[2:]
    tall, wide = max(1, height // rows), max(1, width // columns)
    blocks: List[Block] = []
    for column in _experts_of(layer, DRAWN):
        panels = []
        for spot in layer['top_places'][column]:
            top, left = (min(max(at * size - size, 0), whole - 3 * size) for at, size, whole in (
                (spot['row'], tall, height), (spot['column'], wide, width)))
            crop = pixels[spot['image']][:, max(top, 0):max(top, 0) + 3 * tall, max(left, 0):max(left, 0) + 3 * wide]
            name = result['classes'][result['targets'][spot['image']]]
            panels.append((_cut(name, 7), picture(crop, THUMBNAIL), None))
        if panels:
            expert = layer['listed'][column]
            blocks.append(Figure(
                pictures(panels, 6, ratio=tall / wide), f'Patches where expert {expert} weighs most.',
                f'Expert {expert} of `{layer["layer"]}`.'))
    return ['**The patches that an expert likes most**, at most one an image, each in the middle of its surroundings '
            '(at the border of an image, beside them).', *blocks]


def _logit_maps(result: Mapping[str, Any], pixels: torch.Tensor) -> List[Block]:
    """For the first images, what the last router that sees places thinks of every place, expert by expert."""
    place, blocks = result['places'][-1], []
    for number, image in list(enumerate(result['shown']))[:2]:
        maps = torch.tensor(place['images'][number]['logits'])  # (E, rows, columns)
        weight = [(i, e) for i, e in enumerate(place['experts'])][:DRAWN]
        low, high = float(maps.min()), float(maps.max())
        photo = picture(pixels[image], WHOLE)
        panels = [(_cut(result['classes'][result['targets'][image]], 12), photo, None)]
        panels += [(f'expert {e}', _shades((maps[i] - low) / max(high - low, 1e-12)), None) for i, e in weight]
        blocks.append(Figure(
            pictures(panels, 3, ratio=pixels.shape[2] / pixels.shape[3]),
            f'Router logits of {place["layer"]} over {result["files"][image]}, a map for each expert.',
            f'The darker, the better the router likes the expert there (logits from {low:.2f} to {high:.2f}, one scale '
            'for all maps of an image).'))
    return [f'**Maps of gate logits.** The score that the last router, `{place["layer"]}`, gives every expert at every '
            'place, before any choice.', *blocks]


def _otherwise(result: Mapping[str, Any], said: Mapping[str, str]) -> List[Block]:
    forced, free, blocks = result['forced'], result['free'], []
    trials = [('every layer', forced['everywhere'])] if forced else []
    trials += [(f'layer `{name}`', rows) for name, rows in forced['layers'].items()] if forced else []
    for where, rows in trials:
        if rows:
            best = sorted(rows, key=lambda row: -row['accuracy'])[:ROWS]
            note = f' (the {ROWS} best of {len(rows)})' if len(rows) > ROWS else ''
            blocks.append(_accuracies(
                [(f'expert {row["expert"]}', row) for row in rows if row in best], free,
                f'One expert does all the work of {where}{note}.'))
    if result['k']:
        blocks.append(_accuracies(
            [(f'{row["k"]}{" *" if row["native"] else ""}', row) for row in result['k']], free,
            'Only the experts of largest gate work, image by image or patch by patch; * is as the model was trained.'))
    if not blocks:
        return []
    by_expert = ' Where experts choose, the forced one gets every place, with the weight that all of them gave it.' \
        if any(layer['kind'] == 'by expert' for layer in result['layers']) else ''
    told = [MEANINGS[key] for key in ('forced', 'k') if key in said]
    second = [said['k']] if 'k' in said and 'forced' in said else []
    return [*second, 'Dots are accuracies, lines two standard errors to either side, the dashed line the router left '
            f'free. {" ".join(told)} A difference is called clear where it is more '
            'than two of its standard errors; it is measured image by image, and so more exactly than the dots.'
            f'{by_expert}',
            *blocks]


def _accuracies(rows: Sequence[Tuple[str, Mapping[str, float]]], free: Mapping[str, float], caption: str) -> Figure:
    points = [(name, row['accuracy'], row['se']) for name, row in rows]
    clear = [name.rstrip(' *') for name, row in rows if abs(row['difference']) > 2 * row['difference_se']]
    return Figure(
        estimates(points, 'accuracy, %', ('free', free['accuracy'])),
        '; '.join(f'{name}: {value:.1f} ± {error:.1f} %' for name, value, error in points),
        f'{caption} Clearly different from the free router on the same images: {listing(clear)}.')


def _left_out(result: Mapping[str, Any]) -> List[Block]:
    drawn = result['drawn_layers']
    out = list(result['left_out'])
    if len(drawn) < len(result['layers']):
        out.append(f'{len(drawn)} of {len(result["layers"])} layers are drawn, evenly over the depth.')
    if max(layer['experts'] for layer in result['layers']) > DRAWN:
        out.append(f'At most {DRAWN} experts of a layer are drawn with images, those that carry most of the weight; '
                   f'colours come again after {DRAWN}.')
    if len(result['layers']) > 3:
        out.append('Tables of classes and images are drawn for three layers.')
    unseen = [result['classes'][y] for y in result['chosen_classes'] if y not in set(result['targets'])]
    if unseen:
        out.append(f'There is no image of {listing(unseen)}.')
    if result['corrupt']:
        out.append(f'{counted(len(result["corrupt"]), "image")} could not be read: {listing(result["corrupt"], 3)}.')
    return [*(out or ['Nothing.']), 'All numbers, also of what is not drawn, are in `experts.json` beside this page.']


# ---- small things

def _drawn(result: Mapping[str, Any], most: Optional[int] = None) -> List[Dict[str, Any]]:
    """The layers that are drawn; of these, at most so many."""
    layers = [layer for layer in result['layers'] if layer['layer'] in result['drawn_layers']]
    return spread(layers, most or len(layers))


def _experts_of(layer: Mapping[str, Any], most: int) -> List[int]:
    """Positions in `listed` of the experts to draw: those with the largest weight, by number."""
    order = sorted(range(len(layer['listed'])), key=lambda c: -layer['importance'][layer['listed'][c]])
    return sorted(order[:most])


def _classes_of(result: Mapping[str, Any], layer: Mapping[str, Any]) -> List[int]:
    """The classes to show: all that have images; of many the chosen ones and those that move the shares most."""
    seen = sorted(set(result['targets']))
    if len(seen) <= ROWS:
        return seen
    shares, usual = layer['classes']['share'], [layer['importance'][e] for e in layer['listed']]
    moved = sorted(seen, key=lambda y: -sum(abs(s - u) for s, u in zip(shares[y], usual)))
    return sorted(dict.fromkeys([*result['chosen_classes'], *moved]).keys() & set(seen),
                  key=lambda y: (y not in result['chosen_classes'], moved.index(y)))[:ROWS]


def _chosen(layer: Mapping[str, Any]) -> str:
    if layer['kind'] == 'top-k':
        return f'{layer["selected"]} of {layer["experts"]}'
    return {'by expert': 'experts choose', 'soft': 'all, by slots', 'channels': 'those not 0'}.get(layer['kind'], 'all')


def _pair(layer: Mapping[str, Any]) -> Optional[str]:
    pair = layer['most_alike']
    return f'{pair["experts"][0]} and {pair["experts"][1]}, {percent(pair["distance"])}' if pair else None


def _fair(layers: Sequence[Mapping[str, Any]]) -> str:
    numbers = sorted({layer['experts'] for layer in layers})
    return 'Fair shares would be ' + listing([f'{percent(1 / n, 1)} of {n} experts' for n in numbers]) + '.'


def _competing(layer: Mapping[str, Any]) -> str:
    if layer['kind'] in ('mix', 'channels'):
        return ''
    return f' The gates of an item compete: {layer["experts"]} of them share 1, so that most must be small.'


def _tops(place: Mapping[str, Any], number: int) -> List[List[Optional[int]]]:
    return place['images'][number]['top']


def _flat(tops: Sequence) -> List[Optional[int]]:
    return [e for top in tops for row in top for e in row]


def _most_common(tops: Sequence) -> List[int]:
    """The experts that get a colour: all of the first eight where there are no others, else the most frequent ones."""
    cells = [e for e in _flat(tops) if e is not None]
    if max(cells, default=0) < DRAWN:
        return list(range(max(cells, default=0) + 1))
    return sorted(sorted(set(cells), key=lambda e: -cells.count(e))[:DRAWN])


def _colour(expert: int, common: Sequence[int]) -> str:
    return expert_colour(list(common).index(expert)) if expert in common else 'var(--soft)'


def _patch_caption(result: Mapping[str, Any], image: int, places: Sequence[Mapping[str, Any]], number: int) -> str:
    place = places[-1]
    cells = [e for e in _flat([_tops(place, number)]) if e is not None]
    most = max(set(cells), key=cells.count) if cells else None
    front = [e for e in place['images'][number]['front'] if e is not None]
    target, found = (result['classes'][result[key][image]] for key in ('targets', 'predicted'))
    text = f'`{result["files"][image]}`, ' + ('which the model gets right' if target == found else
                                              f'which the model takes for **{found}**')
    if most is not None:
        every = place['rows'] * place['columns']
        text += f'. In `{place["layer"]}` expert {most} leads in {cells.count(most)} of {every} patches'
    return f'{text}; the class token goes to expert {front[0]} first.' if len(front) == 1 else f'{text}.'


def picture(pixels: torch.Tensor, size: int) -> bytes:
    """(C, H, W) uint8 as the bytes of a small file: JPEG where it is larger than `size`, else PNG as it is."""
    array = pixels.permute(1, 2, 0).numpy()
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array[:, :, :3])
    large = max(image.size) > size
    if large:
        image.thumbnail((size, size), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, 'JPEG' if large else 'PNG', **({'quality': 82} if large else {'optimize': True}))
    return file.getvalue()


def _shades(values: torch.Tensor) -> bytes:
    """(rows, columns) in [0, 1] as a PNG whose opacity they are, which suits light and dark pages."""
    alpha = (255 * values.clamp(0, 1)).round().to(torch.uint8)
    colour = torch.tensor([11, 111, 115], dtype=torch.uint8).expand(*alpha.shape, 3)  # --accent
    file = io.BytesIO()
    Image.fromarray(torch.cat([colour, alpha.unsqueeze(-1)], dim=-1).numpy(), 'RGBA').save(file, 'PNG')
    return file.getvalue()


def _short(name: str, length: int = 30) -> str:
    """The end of a long module name, which is what tells layers apart."""
    return name if len(name) <= length else f'…{name[-length + 1:]}'


def _cut(name: str, length: int) -> str:
    """The beginning of a long class name."""
    return name if len(name) <= length else f'{name[:length - 1]}…'
