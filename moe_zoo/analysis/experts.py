"""What the experts of a classifier do, as numbers: from one pass over images, and from passes with overruled routers.

Of any model that holds routed layers; `analyze` puts everything into one dictionary that JSON can hold, and `MEANINGS`
says of every number what it tells somebody who did not train the model.

Letters: N images, T routed items, E experts, K chosen experts, Y classes.
"""
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import nn

from ..errors import InputError, counted
from ..layers import ChannelGate, RoutedLayer
from ..routing import Routing, trace_routing
from .force import choosing_layers, force_expert, routed_layers, select_experts
from .object_sizes import token_grid
from .usage import LayerUsage, UsageSums, evaluation_mode, image_shares

Batches = Iterable[Tuple[torch.Tensor, torch.Tensor]]
Pass = Callable[[str], Batches]  # title of a pass over the same images to its batches of (images, targets)

BINS = 20  # of the histogram, on [0, 1]; what lies above 1 is counted in the last
NEAR = 0.1  # a gate is near 0 below it, near 1 above one minus it
TWIN_USE, TWIN_WEIGHTS = 0.9, 0.2
TOP_CLASSES, TOP_IMAGES, TOP_PLACES = 3, 4, 6
MOST_LISTED, LISTED = 32, 16  # of more experts than the first, tables by class are of the second number of them
MOST_FORCED = 64  # experts of a layer

KINDS = {
    'mix': 'every expert takes part, weighed by its gate',
    'top-k': 'the K experts of largest gate take part',
    'by expert': 'every expert takes the items that it likes best',
    'soft': 'every expert reads mixtures of all items',
    'channels': 'every channel is an expert, which a gate scales or switches off',
}
UNITS = ('image', 'token', 'position')  # by the number of axes of a record's shape

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
               'does not matter to the router; 1, nothing else does. `chance` is what a router that ignores the class '
               'would show with as few images.',
    'forced': 'Accuracy where one expert does all the work of a layer (or of every layer) with the whole combine '
              'weight. Near the accuracy of the free router, the choice of the expert matters little there.',
    'k': 'Accuracy where every item gets K experts, without training anew.',
    'difference': 'Accuracy minus that of the free router on the same images, in points; beyond about two of its '
                  'standard errors it is no chance.',
}


class Proportion(NamedTuple):
    """Percent right, its standard error, and the difference to the free router, paired image by image."""
    accuracy: float
    se: float
    difference: Optional[float] = None
    difference_se: Optional[float] = None


@dataclass
class LayerExperts:
    """What one routed layer did with N images.

    Attributes:
        name: Module name; `name#1` is the second record of one forward.
        layer: The module.
        kind: A key of `KINDS`.
        unit: What is routed: image, token or position.
        usage: Shares, balance, drops.
        shares: (N, E) share of combine weight that an expert has in an image.
        gates: (N, E) mean gate of an expert over the items of an image; of those that it took, where experts choose.
        counts: (BINS,) gate values of all items.
        zeros: Gate values that are exactly 0.
        best: (N, E) the largest weight that an expert has at a place of an image; None where there are no places.
        places: (N, E) that place, row by row from 0.
        grid: (rows, columns) of places.
    """
    name: str
    layer: RoutedLayer
    kind: str
    unit: str
    usage: LayerUsage
    shares: torch.Tensor
    gates: torch.Tensor
    counts: torch.Tensor
    zeros: int
    best: Optional[torch.Tensor] = None
    places: Optional[torch.Tensor] = None
    grid: Optional[Tuple[int, int]] = None


@dataclass
class Watched:
    """One pass: the layers in the order of the network, and (N,) targets and predicted classes."""
    layers: Dict[str, LayerExperts]
    targets: torch.Tensor
    predicted: torch.Tensor
    skipped: Dict[str, str]

    @property
    def right(self) -> torch.Tensor:
        return self.targets == self.predicted


class _Sums:
    """Running sums of one layer."""

    def __init__(self, layer: RoutedLayer, routing: Routing):
        self.layer, self.kind, self.unit = layer, kind_of(layer, routing), UNITS[len(routing.shape) - 1]
        self.usage, self.counts, self.zeros = UsageSums(), torch.zeros(BINS, dtype=torch.int64), 0
        self.shares: List[torch.Tensor] = []
        self.gates: List[torch.Tensor] = []
        self.best: List[torch.Tensor] = []
        self.grid: Optional[Tuple[int, int, int]] = None

    def add(self, routing: Routing, targets: List[int], size: Tuple[int, int]) -> None:
        gates = routing.gates.float().cpu()
        self.usage.add(routing, targets)
        self.shares.append(image_shares(routing).float().cpu())
        # Where experts choose, a gate that nobody used may be part of a sum over the image that is always 1.
        used = routing.combine_matrix().float().cpu() if routing.by_expert else gates
        self.gates.append(used.reshape(routing.shape[0], -1, used.shape[-1]).mean(dim=1))
        self.counts += torch.histc(gates.clamp(0, 1), BINS, 0, 1).long()
        self.zeros += int((gates == 0).sum())
        self.grid = grid_of(routing, size)
        if self.grid is not None:
            weights = routing.combine_matrix().float().cpu().reshape(routing.shape[0], -1, gates.shape[-1])
            self.best.append(torch.stack(weights[:, self.grid[0]:].max(dim=1)))  # (2, B, E) weights and places

    def finish(self, name: str, num_classes: int) -> LayerExperts:
        best, places = torch.cat(self.best, dim=1) if self.best else (None, None)
        return LayerExperts(
            name, self.layer, self.kind, self.unit, self.usage.finish(name, num_classes), torch.cat(self.shares),
            torch.cat(self.gates), self.counts, self.zeros, best, None if places is None else places.long(),
            self.grid and self.grid[1:])


def grid_of(routing: Routing, size: Tuple[int, int]) -> Optional[Tuple[int, int, int]]:
    """(tokens in front, rows, columns) of the places that a record is about in images of (height, width), or None."""
    if len(routing.shape) == 3:
        return 0, routing.shape[1], routing.shape[2]
    return token_grid(routing.shape[1], size) if len(routing.shape) == 2 else None


def kind_of(layer: nn.Module, routing: Routing) -> str:
    """The key of `KINDS` that a layer and its record belong to."""
    if isinstance(layer, ChannelGate):
        return 'channels'
    if routing.slot_logits is not None:
        return 'soft'
    if routing.indices is None:
        return 'mix'
    return 'by expert' if routing.by_expert else 'top-k'


@torch.no_grad()
def watch(model: nn.Module, batches: Batches, num_classes: int) -> Watched:
    """Run a model in evaluation mode over images and keep what every routed layer did with each of them.

    Args:
        model: Any classifier that holds routed layers; its training mode is restored.
        batches: (images, targets), on the device of the model.
        num_classes: Y.

    Raises:
        InputError: There is no image, or no active routed layer.
    """
    layers, sums, skipped = routed_layers(model), {}, {}
    targets: List[int] = []
    predicted: List[torch.Tensor] = []
    with evaluation_mode(model):
        for images, batch_targets in batches:
            with trace_routing(model) as trace:
                predicted.append(model(images).argmax(dim=1).cpu())
            targets += batch_targets.tolist()
            for name, routing in numbered(trace, layers):
                if not routing.shape or routing.shape[0] != len(images):
                    skipped[name] = 'it sees some of the images only'
                    continue
                sums.setdefault(name, _Sums(layers[name.partition('#')[0]], routing)).add(
                    routing, batch_targets.tolist(), tuple(images.shape[2:]))
    if not predicted:
        raise InputError('There is no image to look at.')
    found = {name: total.finish(name, num_classes) for name, total in sums.items() if name not in skipped}
    if not found:
        raise InputError(f'{type(model).__name__} has no active routed layer: there is no expert to analyse.')
    return Watched(found, torch.tensor(targets), torch.cat(predicted), skipped)


def numbered(trace: Dict[str, List[Routing]], layers: Dict[str, RoutedLayer]) -> Iterable[Tuple[str, Routing]]:
    """Records of routed layers, the second one of a layer under the name `layer#1`."""
    for name, records in trace.items():
        if name in layers:
            for number, routing in enumerate(records):
                yield (f'{name}#{number}' if number else name), routing


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
        between: Share of it between classes; None where nothing varies.
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


# ---- what other choices would give

def proportion(right: torch.Tensor, free: Optional[torch.Tensor] = None) -> Proportion:
    """Percent of an (N,) bool tensor that is true, and against another one of the same images.

    The standard error of 0 or N right ones is that of one wrong or right: nobody is infallible on N images.
    """
    count = len(right)
    share = float(right.double().mean())
    bounded = min(max(share, 1 / count), 1 - 1 / count) if count > 1 else 0.5
    error = 100 * (bounded * (1 - bounded) / count) ** 0.5
    if free is None:
        return Proportion(100 * share, error)
    change = right.double() - free.double()
    return Proportion(
        100 * share, error, 100 * float(change.mean()), 100 * float(change.std(unbiased=False)) / count ** 0.5)


@torch.no_grad()
def predict_right(model: nn.Module, batches: Batches) -> torch.Tensor:
    """(N,) bool: which images a model gets right."""
    with evaluation_mode(model):
        return torch.cat([(model(images).argmax(dim=1) == targets).cpu() for images, targets in batches])


def forced_accuracies(model: nn.Module, run: Pass, free: torch.Tensor, layers: Sequence[str]) -> Dict[str, Any]:
    """Accuracy with every expert forced, in every layer at once and in each of some.

    Args:
        model: The classifier.
        run: Gives the batches of a pass.
        free: (N,) bool, what is right without force.
        layers: Names of the layers to force one by one.

    Returns:
        everywhere: A row for every expert that all layers have; layers: name to a row for every expert.
    """
    experts = {name: layer.num_experts for name, layer in routed_layers(model).items()}

    def rows(number: int, layer: Optional[str] = None) -> List[Dict[str, Any]]:
        found = []
        for expert in range(number):
            where = layer or 'every layer'
            with force_expert(model, expert, layer, keep_mass=True):
                right = predict_right(model, run(f'expert {expert} forced in {where}'))
            found.append({'expert': expert, **proportion(right, free)._asdict()})
        return found

    return {
        'everywhere': rows(common_experts(model)),
        'layers': {name: rows(experts[name], name) for name in layers},
    }


def common_experts(model: nn.Module) -> int:
    """Experts that all layers have and that can be forced in all of them; 0 where these are channels, or too many."""
    layers = routed_layers(model).values()
    fewest = min(layer.num_experts for layer in layers)
    return 0 if fewest > MOST_FORCED or any(isinstance(layer, ChannelGate) for layer in layers) else fewest


def swept_numbers(model: nn.Module) -> List[int]:
    """The K to try: small ones, those that the layers were built with, and all; none where no layer chooses."""
    layers = [modules[0] for modules in choosing_layers(model).values()]
    if not layers:
        return []
    most = max(layer.num_experts for layer in layers)
    small = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
    return sorted({k for k in small if k < most} | {layer.num_selected for layer in layers} | {most})


def swept_accuracies(model: nn.Module, run: Pass, free: torch.Tensor) -> List[Dict[str, Any]]:
    """Accuracy for several K in every layer that chooses the best experts of an item; empty where none does."""
    native = {modules[0].num_selected for modules in choosing_layers(model).values()}
    result = []
    for k in swept_numbers(model):
        with select_experts(model, k):
            right = predict_right(model, run(f'{counted(k, "expert")} an item'))
        result.append({'k': k, 'native': native == {k}, **proportion(right, free)._asdict()})
    return result


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
        forced = sum(layer['experts'] for layer in layers if layer['layer'] in chosen)
        expect(1 + common_experts(model) + forced + len(swept_numbers(model)))
        result['forced'] = forced_accuracies(model, run, watched.right, chosen)
        result['k'] = swept_accuracies(model, run, watched.right)
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


# ---- where in the image

@torch.no_grad()
def locate(model: nn.Module, images: torch.Tensor) -> List[Dict[str, Any]]:
    """Which expert had which place of a few images, in every layer that routes tokens or positions.

    Args:
        model: The classifier.
        images: (B, C, H, W).

    Returns:
        For every such layer: layer, kind, rows, columns, experts (the numbers of those listed) and images, a list of
        top (rows x columns, the expert with the largest weight; None where none took the place), share (of this
        expert), front (the experts of the tokens in front), logits (a map for each listed expert) and, where experts
        choose, taken (the flat places that each listed expert took).
    """
    layers, found = routed_layers(model), []
    with evaluation_mode(model), trace_routing(model) as trace:
        model(images)
    for name, routing in numbered(trace, layers):
        place = grid_of(routing, tuple(images.shape[2:]))
        if place is not None and routing.shape[0] == len(images):
            found.append(_places(name, kind_of(layers[name.partition('#')[0]], routing), routing, *place))
    return found


def _places(name: str, kind: str, routing: Routing, front: int, rows: int, columns: int) -> Dict[str, Any]:
    B, E = routing.shape[0], routing.num_experts
    weights = routing.combine_matrix().float().cpu().reshape(B, -1, E)
    logits = routing.logits.float().cpu().reshape(B, -1, E)[:, front:]
    listed = sorted(weights.sum(dim=(0, 1)).argsort(descending=True, stable=True)[:LISTED].tolist())
    images = []
    for weight, logit in zip(weights, logits):
        total, (best, top) = weight.sum(dim=1), weight.max(dim=1)
        tops = [int(e) if w > 0 else None for e, w in zip(top, total)]
        shares = [round(float(b / w), 4) if w > 0 else None for b, w in zip(best, total)]
        image = {
            'front': tops[:front], 'top': _in_rows(tops[front:], columns), 'share': _in_rows(shares[front:], columns),
            'logits': [_in_rows([round(v, 4) for v in logit[:, e].tolist()], columns) for e in listed],
        }
        if routing.by_expert:
            image['taken'] = [(weight[front:, e] > 0).nonzero().flatten().tolist() for e in listed]
        images.append(image)
    return {'layer': name, 'kind': kind, 'rows': rows, 'columns': columns, 'experts': listed, 'images': images}


def _in_rows(values: List[Any], columns: int) -> List[List[Any]]:
    return [values[i:i + columns] for i in range(0, len(values), columns)]


def _numbers(table: torch.Tensor, seen: torch.Tensor) -> List[Optional[List[Optional[float]]]]:
    """Rounded for JSON, which has no NaN; None in place of the row of a class that was not seen."""
    rows = [[round(v, 6) if v == v else None for v in row] for row in table.tolist()]
    return [row if known else None for row, known in zip(rows, seen)]


def _finite(value: torch.Tensor) -> Optional[float]:
    return float(value) if bool(torch.isfinite(value)) else None
