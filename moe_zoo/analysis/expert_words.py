"""What `moe_zoo.analysis.experts.analyze` found, in sentences. Every one follows from the numbers.

Letters: E experts, K chosen experts.
"""
from typing import Any, Dict, List, Mapping, Optional, Sequence

from ..errors import counted
from .consistency import describe_consistency
from .experts import TWIN_WEIGHTS

CLEAR = 4  # standard errors by which a share must differ: tables of classes and experts have many cells
LIFT = 1.1  # and the share over the usual one
FORCED_CLEAR = 2  # standard errors by which an accuracy must differ


def findings(result: Mapping[str, Any]) -> Dict[str, str]:
    """One sentence or two on each part: overview, balance, alike, classes, gates, depth, forced, k and consistency.

    Args:
        result: From `moe_zoo.engine.analyze_experts.analyze_classifier`.

    Returns:
        Only parts that were measured.
    """
    parts = {
        'overview': _overview, 'balance': _balance, 'alike': _alike, 'classes': _classes, 'gates': _gates,
        'depth': _depth, 'forced': _forced, 'k': _sweep, 'consistency': _consistency,
    }
    found = {key: say(result) for key, say in parts.items()}
    return {key: text for key, text in found.items() if text}


def percent(share: float, digits: int = 0) -> str:
    return f'{100 * share:.{digits}f} %'


def listing(items: Sequence[Any], most: int = 8) -> str:
    """`1, 4 and 7`; of many the first ones and how many more."""
    words = [str(item) for item in items]
    if len(words) > most:
        return f'{", ".join(words[:most])} and {len(words) - most} more'
    return ' and '.join(filter(None, [', '.join(words[:-1]), words[-1]])) if words else 'none'


def _consistency(result: Mapping[str, Any]) -> str:
    if 'consistency' not in result:
        return ''
    return describe_consistency([(each['name'], each) for each in result['consistency']['measured']])


def _overview(result: Mapping[str, Any]) -> str:
    free, layers = result['free'], result['layers']
    experts = sum(layer['experts'] for layer in layers)
    start = '' if result['trained'] else (
        '**Untrained:** the weights are random, so that nothing here was learned; it shows what the architecture alone '
        'does. ')
    classes = len(set(result['targets']))
    return (
        f'{start}`{result["model"]}` gets **{free["accuracy"]:.1f} ± {free["se"]:.1f} %** of {result["images"]:,} '
        f'images of {counted(classes, "class")} right. It has {counted(experts, "expert")} in '
        f'{counted(len(layers), "routed layer")}.')


def _balance(result: Mapping[str, Any]) -> str:
    layers = result['layers']
    dead = [(layer['layer'], layer['dead']) for layer in layers if layer['dead']]
    total = sum(layer['experts'] for layer in layers)
    idle = sum(len(experts) for _, experts in dead)
    if idle:
        named = '; '.join(f'{listing(experts)} of `{layer}`' for layer, experts in dead[:4])
        rest = '' if len(dead) <= 4 else f'; and some of {counted(len(dead) - 4, "further layer")}'
        first = f'**{idle:,} of {total:,} experts are dead**: {named}{rest}.'
    else:
        first = f'**All {total:,} experts are in use.**' if total > 1 else '**The one expert is in use.**'
    worst = min(layers, key=lambda layer: layer['entropy'])
    share = max(worst['importance'])
    if worst['entropy'] > 0.9999:
        return f'{first} Every layer shares the work evenly among its experts.'
    return (
        f'{first} The least balanced layer is `{worst["layer"]}`, where expert {worst["importance"].index(share)} '
        f'carries {percent(share, 1)} of the weight; a fair share would be {percent(1 / worst["experts"], 1)}.')


def _alike(result: Mapping[str, Any]) -> str:
    layers = [layer for layer in result['layers'] if layer['most_alike']]
    if not layers:
        return ''
    twins = [(layer['layer'], group) for layer in layers for group in layer['twins']]
    if twins:
        named = '; '.join(f'{listing(group)} of `{layer}`' for layer, group in twins[:4])
        rest = '' if len(twins) <= 4 else f'; and {counted(len(twins) - 4, "further group")}'
        return f'**Twins** (used alike, nearly equal weights): {named}{rest}.'
    closest = min(layers, key=lambda layer: layer['most_alike']['distance'])
    pair = closest['most_alike']
    use = 'the use of one of them never varies' if pair['correlation'] is None else \
        f'their use over the images correlates by {pair["correlation"]:.2f}'
    head = '**No twins.**' if pair['distance'] > TWIN_WEIGHTS else '**Nearly equal experts, not used alike.**'
    return (
        f'{head} The most alike are experts {listing(pair["experts"])} of `{closest["layer"]}`: their weights '
        f'differ by {percent(pair["distance"])} of their length, and {use}.')


def strongest_tie(result: Mapping[str, Any]) -> Optional[Dict[str, Any]]:
    """The expert and class whose share is most times the usual one, among those clear of chance; None without any."""
    best = None
    for layer in result['layers']:
        for expert, rows in zip(layer['listed'], layer['top_classes']):
            for row in rows:
                usual = row['share'] / row['lift'] if row['lift'] else 0.
                known = row['se'] is not None and row['lift'] >= LIFT
                if known and row['share'] - usual > CLEAR * row['se'] and (best is None or row['lift'] > best['lift']):
                    best = {**row, 'expert': expert, 'layer': layer['layer'], 'usual': usual}
    return best


def _classes(result: Mapping[str, Any]) -> str:
    tie = strongest_tie(result)
    if tie is None:
        return (f'**No expert is tied to a class**: no share in the images of a class is {LIFT} times the usual one '
                f'and more than {CLEAR} standard errors above it.')
    name = result['classes'][tie['class']]
    return (
        f'The closest tie: expert {tie["expert"]} of `{tie["layer"]}` carries **{percent(tie["share"])}** '
        f'(± {percent(tie["se"], 1)}) of the weight in images of **{name}**, {tie["lift"]:.1f} times its usual '
        f'{percent(tie["usual"])}.')


def is_bimodal(gates: Mapping[str, Any]) -> bool:
    """Half of the values or more at the ends, and a tenth at each."""
    ends = gates['near_zero'], gates['near_one']
    return sum(ends) >= 0.5 and min(ends) >= 0.1


def _gates(result: Mapping[str, Any]) -> str:
    layers = result['layers']
    ends = {each['layer']: (each['gates']['near_zero'], each['gates']['near_one']) for each in layers}
    layer = max(layers, key=lambda each: (min(ends[each['layer']]), sum(ends[each['layer']])))
    gates, bimodal = layer['gates'], sum(is_bimodal(each['gates']) for each in layers)
    middle = 1 - gates['near_zero'] - gates['near_one']
    verdict = f'switches (off or on) in {bimodal} of {counted(len(layers), "layer")}' if bimodal else \
        'dimmers, not switches'
    return (
        f'The gates are **{verdict}**. Nearest to switches is `{layer["layer"]}`: {percent(gates["near_zero"])} of the '
        f'values are below 0.1, {percent(gates["near_one"])} above 0.9 and {percent(middle)} between.')


def _depth(result: Mapping[str, Any]) -> str:
    layers = [layer for layer in result['layers'] if layer['gates']['variance']['between'] is not None]
    if not layers:
        return 'No gate varies between images: every expert has the same weight in every image.'
    chance = layers[0]['gates']['variance']['chance']
    if chance > 0.5:
        return (f'{counted(result["images"], "image")} of {counted(len(set(result["targets"])), "class")} are too few '
                'to tell how class-specific the gates are.')
    first, last = layers[0], layers[-1]
    most = max(layers, key=lambda layer: layer['gates']['variance']['between'])

    def between(layer):
        return percent(layer['gates']['variance']['between'])

    if len(layers) == 1:
        return (f'In `{first["layer"]}` **{between(first)}** of the variance of the gates lies between classes '
                f'(chance: {percent(chance)}).')
    change = last['gates']['variance']['between'] - first['gates']['variance']['between']
    errors = [layer['gates']['variance']['between_se'] for layer in (first, last)]
    clear = None not in errors and abs(change) > 2 * sum(error ** 2 for error in errors) ** 0.5
    trend = f'become {"more" if change > 0 else "less"} class-specific' if clear else 'are about equally class-specific'
    text = (f'Gates {trend} with depth: **{between(first)}** of their variance lies between classes in '
            f'`{first["layer"]}`, **{between(last)}** in `{last["layer"]}` (chance: {percent(chance)}).')
    return text if most in (first, last) else f'{text} The most is {between(most)}, in `{most["layer"]}`.'


def _forced(result: Mapping[str, Any]) -> str:
    forced = result['forced']
    if not forced or not (forced['everywhere'] or forced['layers']):
        return ''
    rows = forced['everywhere'] or [row for each in forced['layers'].values() for row in each]
    where = 'everywhere' if forced['everywhere'] else 'in one layer'
    clear = sum(abs(row['difference']) > FORCED_CLEAR * row['difference_se'] for row in rows)
    low, high = min(row['accuracy'] for row in rows), max(row['accuracy'] for row in rows)
    told = f'none of the {len(rows)} differences is clear on this many images.'
    if len(rows) == 1:
        told = f'the difference is {"" if clear else "not "}clear.'
    elif clear:
        told = f'{clear} of {counted(len(rows), "difference")} {"is" if clear == 1 else "are"} clear.'
    return (
        f'With a single expert doing all the work {where}, accuracy is **{_range(low, high)}** instead of '
        f'{result["free"]["accuracy"]:.1f} %; {told}')


def _sweep(result: Mapping[str, Any]) -> str:
    rows = result['k']
    if not rows:
        return ''
    best = max(rows, key=lambda row: row['accuracy'])
    low = min(rows, key=lambda row: row['accuracy'])
    clear = [row for row in rows if abs(row['difference']) > FORCED_CLEAR * row['difference_se']]
    native = next((row['k'] for row in rows if row['native']), 'the K of every layer')
    if not clear:
        return (f'Other numbers of experts an item change nothing that could be told from chance: '
                f'{_range(low["accuracy"], best["accuracy"])} (trained with {native}).')
    named = listing([f'{row["k"]} ({row["difference"]:+.1f} points)' for row in clear])
    return f'Against {native}, with which it was trained, accuracy changes clearly with {named}.'


def _range(low: float, high: float) -> str:
    return f'{low:.1f} %' if f'{low:.1f}' == f'{high:.1f}' else f'{low:.1f} to {high:.1f} %'


def report(result: Mapping[str, Any]) -> List[str]:
    """The findings as lines for a terminal, without marks."""
    return [text.replace('**', '').replace('`', '') for text in findings(result).values()]
