"""What the experts of a classifier do, as numbers: from one pass over images, and from passes with overruled routers.

Of any model that holds routed layers; `analyze` puts everything into one dictionary that JSON can hold, and `MEANINGS`
says of every number what it tells somebody who did not train the model.

Letters: N images, E experts, K chosen experts, Y classes.
"""
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch
from torch import nn

from ..errors import counted
from ..layers import ChannelGate, RoutedLayer
from .expert_records import BINS, LayerExperts, watch
from .expert_trials import (
    MOST_FORCED,
    Pass,
    common_experts,
    forced_accuracies,
    proportion,
    sweeps,
    swept_accuracies,
)

NEAR = 0.1  # a gate is near 0 below it, near 1 above one minus it
TWIN_USE, TWIN_WEIGHTS = 0.9, 0.2
TOP_CLASSES, TOP_IMAGES, TOP_PLACES = 3, 4, 6
MOST_LISTED, LISTED = 32, 16  # of more experts than the first, tables by class are of the second number of them

MEANINGS = {
    'accuracy': 'Share of the images whose likeliest class is the right one, in percent; `se` is its standard error: '
                'two accuracies less than about two of them apart may differ by chance.',
    'importance': 'Share of the combine weight of the layer that an expert has; 1 / E where all work alike.',
    'entropy': '1 where all experts are used alike, 0 where one expert does everything.',
    'cv': 'Standard deviation of the shares over their mean: 0 is perfect balance.',
    'dropped': 'Share of the choices that found no room at their expert; of the items that no expert took, where '
               'experts choose.',
    'dead': 'Experts with at most 1 % of the weight (of more than ten experts: a tenth of a fair share): they cost '
            'memory and do nothing.',
    'twins': f'Experts whose shares over the images correlate by at least {TWIN_USE} and whose weights differ by at '
             f'most {100 * TWIN_WEIGHTS:.0f} % of their length: together they are little more than one expert.',
    'most_alike': 'The two experts of a layer whose weights differ least, as a share of the length of the weights '
                  '(1.41 for unrelated ones), and how their shares over the images correlate.',
    'classes': 'Mean share that an expert has in the images of a class, with its standard error over these images.',
    'lift': 'Share of an expert in the images of a class over its share in all images: 2 is twice as much as usual.',
    'near_zero': f'Share of the gate values below {NEAR}; with `near_one` it tells whether gates are switches (both '
                 'together near 1) or dimmers.',
    'near_one': f'Share of the gate values above {1 - NEAR}.',
    'between': 'Share of the variance of the gates between images that lies between classes: 0, the class of an image '
               'does not matter to the router; 1, nothing else does; `within` is the rest, among images of one class. '
               '`chance` is what a router that ignores the class would show with as few images.',
    'forced': 'Accuracy where one expert does all the work of a layer (or of every layer) with the whole combine '
              'weight. Near the accuracy of the free router, the choice of the expert matters little there.',
    'k': 'Accuracy where only the K experts of largest gate work for an item, without training anew: where all are '
         'mixed, with the weight that all had together; of channels, a share of them.',
    'difference': 'Accuracy minus that of the free router on the same images, in points; beyond about two of its '
                  'standard errors it is no chance.',
}


# ---- tables by class

def class_table(shares: torch.Tensor, targets: torch.Tensor, num_classes: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean of (N, E) values over the images of every class, and the standard error of this mean.

    Returns:
        (Y, E) means, zero for a class without images, and (Y, E) standard errors, NaN below two images.
    """
    values, one_hot = shares.double(), nn.functional.one_hot(targets, num_classes).double()
    count = one_hot.sum(dim=0)[:, None]  # (Y, 1)
    mean = one_hot.T @ values / count.clamp_min(1)
    squares = one_hot.T @ (values - mean[targets]).square()
    return mean, (squares / (count - 1)).clamp_min(0).sqrt() / count.sqrt()


def top_classes(shares: torch.Tensor, targets: torch.Tensor, num_classes: int) -> List[List[Dict[str, Any]]]:
    """Of every expert the classes in whose images it has the largest share: class, share, se and lift."""
    mean, error = class_table(shares, targets, num_classes)
    usual = shares.double().mean(dim=0).clamp_min(1e-12)
    seen = torch.bincount(targets, minlength=num_classes) > 0
    result = []
    for e in range(shares.shape[1]):
        order = mean[:, e].masked_fill(~seen, -1).argsort(descending=True, stable=True)[:TOP_CLASSES].tolist()
        result.append([
            {'class': y, 'share': float(mean[y, e]), 'se': _finite(error[y, e]), 'lift': float(mean[y, e] / usual[e])}
            for y in order if seen[y]])
    return result


def top_images(shares: torch.Tensor) -> List[List[Dict[str, Any]]]:
    """Of every expert the images in which it has the largest share, the first of several equal ones."""
    order = shares.argsort(dim=0, descending=True, stable=True)[:TOP_IMAGES]
    return [[{'image': int(i), 'share': float(shares[i, e])} for i in order[:, e]] for e in range(shares.shape[1])]


def top_places(layer: LayerExperts) -> List[List[Dict[str, Any]]]:
    """Of every expert the places where it weighs most, at most one an image: image, row, column and weight."""
    order = layer.best.argsort(dim=0, descending=True, stable=True)[:TOP_PLACES]
    columns = layer.grid[1]
    return [
        [{'image': i, 'row': int(layer.places[i, e]) // columns, 'column': int(layer.places[i, e]) % columns,
          'weight': float(layer.best[i, e])} for i in order[:, e].tolist() if layer.best[i, e] > 0]
        for e in range(layer.best.shape[1])]


# ---- gates

def variance_split(gates: torch.Tensor, targets: torch.Tensor) -> Dict[str, Any]:
    """How much of the variance of (N, E) gates over images lies between classes and how much within.

    Returns:
        total: Variance, summed over the experts.
        between: Share of it between classes; None where nothing varies. within: The rest.
        between_se: Its standard error, from leaving out every tenth image in turn; None below 20 images.
        chance: What is expected of `between` where the class does not matter: (classes - 1) / (N - 1).
        by_expert: (E) the same of every expert, None where its gate does not vary.
    """
    overall, between = _squares(gates, targets)
    tiny = 1e-11 * len(gates) * gates.double().square().mean().clamp_min(1e-30)
    varies, error = bool(overall.sum() > tiny), None
    if varies and len(gates) >= 20:  # the jackknife over ten groups
        fold = torch.arange(len(gates)) % 10
        parts = [_squares(gates[fold != i], targets[fold != i]) for i in range(10)]
        shares = torch.stack([b.sum() / o.sum().clamp_min(1e-300) for o, b in parts])
        error = float((9 * shares.var(unbiased=False)).sqrt())
    return {
        'total': float(overall.sum() / len(gates)),
        'between': float(between.sum() / overall.sum()) if varies else None,
        'within': 1 - float(between.sum() / overall.sum()) if varies else None,
        'between_se': error,
        'chance': (len(targets.unique()) - 1) / (len(gates) - 1) if len(gates) > 1 else None,
        'by_expert': [float(b / o) if o > tiny else None for b, o in zip(between, overall)],
    }


def _squares(gates: torch.Tensor, targets: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """(E,) sums of squares of (N, E) gates around their mean: of the images, and of the means of their classes."""
    values = gates.double()
    mean = class_table(gates, targets, int(targets.max()) + 1)[0]
    return tuple((v - values.mean(dim=0)).square().sum(dim=0) for v in (values, mean[targets]))


def gate_summary(layer: LayerExperts) -> Dict[str, Any]:
    """The histogram of gate values, and how many are at its ends."""
    counts, total = layer.counts, int(layer.counts.sum())
    near = round(NEAR * BINS)
    return {
        'counts': counts.tolist(),
        'near_zero': int(counts[:near].sum()) / total,
        'near_one': int(counts[BINS - near:].sum()) / total,
        'zero': layer.zeros / total,
    }


# ---- experts that are alike

def weight_distances(layer: RoutedLayer) -> Optional[torch.Tensor]:
    """(E, E) distance between the parameters of two experts over the mean of their lengths; None where they are of
    unlike build, are not named, or are channels, whose kernel is not the gate's."""
    try:
        groups = [] if isinstance(layer, ChannelGate) else layer.expert_parameters()
    except NotImplementedError:
        groups = []
    if not groups:
        return None
    experts, gram = layer.num_experts, 0.
    for group in groups:
        if len(group) == 1 and group[0].shape[0] == experts:
            stacked = group[0].detach().reshape(experts, -1)
        elif len(group) == experts and len({p.shape for p in group}) == 1:
            stacked = torch.stack([p.detach().flatten() for p in group])
        else:
            return None
        for part in stacked.split(1 << 20, dim=1):  # in double precision, without a copy of everything
            gram = gram + part.double() @ part.double().T
    square = gram.diagonal()
    length = square.sqrt()
    distance = (square[:, None] + square - 2 * gram).clamp_min(0).sqrt()
    distance = distance / ((length[:, None] + length) / 2).clamp_min(1e-12)
    return distance.fill_diagonal_(0).cpu()


def use_correlations(shares: torch.Tensor) -> torch.Tensor:
    """(N, E) shares to the (E, E) correlation of two experts' shares over the images; NaN where one is constant."""
    centred = shares.double() - shares.double().mean(dim=0)
    length = centred.square().sum(dim=0).sqrt()
    length = torch.where(length > 1e-6 * len(shares) ** 0.5, length, torch.nan)  # less is rounding
    return (centred.T @ centred) / (length[:, None] * length)


def find_twins(layer: LayerExperts) -> Tuple[List[List[int]], Optional[Dict[str, Any]]]:
    """Groups of twins (see `MEANINGS`), and the pair whose weights differ least; None where weights tell nothing."""
    distance = weight_distances(layer.layer)
    if distance is None or len(distance) < 2:
        return [], None
    correlation = use_correlations(layer.shares)
    alike = (correlation >= TWIN_USE) & (distance <= TWIN_WEIGHTS)  # NaN is not
    rest, groups = set(range(len(alike))), []
    while rest:
        group, frontier = set(), [min(rest)]
        while frontier:
            expert = frontier.pop()
            group.add(expert)
            frontier += [int(o) for o in alike[expert].nonzero().flatten() if int(o) not in group]
        rest -= group
        groups += [sorted(group)] if len(group) > 1 else []
    apart = distance + torch.diag(torch.full((len(distance),), float('inf'), dtype=distance.dtype))
    i, j = divmod(int(apart.argmin()), len(distance))
    pair = {'experts': [i, j], 'distance': float(distance[i, j]), 'correlation': _finite(correlation[i, j])}
    return groups, pair


# ---- everything

def spread(names: Sequence[str], most: int) -> List[str]:
    """At most so many of the names, evenly over their order, the first and the last among them."""
    if len(names) <= most:
        return list(names)
    if most == 1:
        return [names[-1]]
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def describe_layer(layer: LayerExperts, targets: torch.Tensor, num_classes: int) -> Dict[str, Any]:
    """All numbers of one layer for JSON; see `MEANINGS`."""
    split = variance_split(layer.gates, targets)
    listed = list(range(layer.usage.num_experts))
    if len(listed) > MOST_LISTED:
        ranked = sorted(listed, key=lambda e: -(split['by_expert'][e] or 0) * float(layer.usage.importance[e]))
        listed = sorted(ranked[:LISTED])
    twins, pair = find_twins(layer)
    usage = layer.usage.as_dict()
    del usage['layer'], usage['class_mass']
    mean, error = class_table(layer.shares[:, listed], targets, num_classes)
    gates, gate_error = class_table(layer.gates[:, listed], targets, num_classes)
    places = None if layer.grid is None else top_places(layer)
    seen = torch.bincount(targets, minlength=num_classes) > 0
    return {
        'layer': layer.name, 'kind': layer.kind, 'unit': layer.unit, 'experts': layer.usage.num_experts,
        'selected': layer.layer.num_selected, **usage, 'twins': twins, 'most_alike': pair, 'listed': listed,
        'classes': {'share': _numbers(mean, seen), 'se': _numbers(error, seen)},
        'top_classes': top_classes(layer.shares[:, listed], targets, num_classes),
        'top_images': top_images(layer.shares[:, listed]), 'grid': layer.grid,
        'top_places': None if places is None else [places[e] for e in listed],
        'gates': {**gate_summary(layer), 'by_class': _numbers(gates, seen), 'by_class_se': _numbers(gate_error, seen),
                  'variance': split},
    }


def analyze(
        model: nn.Module,
        run: Pass,
        num_classes: int,
        most_layers: int = 6,
        force: bool = True,
        expect: Callable[[int], None] = lambda passes: None,
) -> Dict[str, Any]:
    """Everything of `MEANINGS` about a classifier on a set of images, for JSON.

    Args:
        model: A classifier that holds routed layers, uncompiled.
        run: Title of a pass to its batches; the images must be the same in every pass.
        num_classes: Y.
        most_layers: Layers in which experts are forced one by one, evenly over the depth.
        force: Whether to make the passes with forced experts and other K.
        expect: Told, after the first pass, how many there will be.

    Returns:
        images, free (accuracy and its error), targets, predicted, layers (in order), forced, k, left_out (sentences).
    """
    watched = watch(model, run('left free'), num_classes)
    layers = [describe_layer(layer, watched.targets, num_classes) for layer in watched.layers.values()]
    free = proportion(watched.right)
    left_out = [f'`{name}`: {reason}.' for name, reason in watched.skipped.items()]
    left_out += _cut_tables(layers)
    result = {
        'images': len(watched.targets),
        'free': {'accuracy': free.accuracy, 'se': free.se},
        'targets': watched.targets.tolist(), 'predicted': watched.predicted.tolist(), 'layers': layers,
        'forced': None, 'k': [], 'left_out': left_out, 'meanings': MEANINGS,
    }
    if force:
        names = [layer['layer'] for layer in layers if _can_be_forced(layer)]
        chosen = spread(names, most_layers)
        mixes = all(layer['kind'] in ('mix', 'soft', 'channels') for layer in layers)
        forced = sum(layer['experts'] for layer in layers if layer['layer'] in chosen)
        expect(1 + common_experts(model) + forced + len(sweeps(model, mixes)))
        result['forced'] = forced_accuracies(model, run, watched.right, chosen)
        result['k'] = swept_accuracies(model, run, watched.right, mixes)
        if len(chosen) < len(names):
            left_out.append(f'Experts were forced one by one in {len(chosen)} of {len(names)} layers.')
        if len(names) < len(layers):
            left_out.append(
                f'No expert was forced in {counted(len(layers) - len(names), "layer")}: one channel alone computes '
                f'nothing, and more than {MOST_FORCED} experts would take too long.')
    return result


def _can_be_forced(layer: Dict[str, Any]) -> bool:
    return '#' not in layer['layer'] and layer['kind'] != 'channels' and layer['experts'] <= MOST_FORCED


def _cut_tables(layers: Sequence[Dict[str, Any]]) -> List[str]:
    cut = [layer for layer in layers if len(layer['listed']) < layer['experts']]
    if not cut:
        return []
    return [f'Tables by class have {LISTED} experts of {counted(len(cut), "layer")} with up to '
            f'{max(layer["experts"] for layer in cut)}: those whose gates differ most between classes.']


def _numbers(table: torch.Tensor, seen: torch.Tensor) -> List[Optional[List[Optional[float]]]]:
    """Rounded for JSON, which has no NaN; None in place of the row of a class that was not seen."""
    rows = [[round(v, 6) if v == v else None for v in row] for row in table.tolist()]
    return [row if known else None for row, known in zip(rows, seen)]


def _finite(value: torch.Tensor) -> Optional[float]:
    return float(value) if bool(torch.isfinite(value)) else None
