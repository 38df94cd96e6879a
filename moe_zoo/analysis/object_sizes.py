"""Do experts follow object size? Gate mass on small, medium and large objects, and two tests that it is no accident.

Letters: N images, P positions of a gate map (1 where an image has one gate vector), E experts, S = 3 size classes,
O objects, R repetitions, T routed items.

**Gate mass.** A gate vector is the combine weight an item gives each expert, before capacity, divided by its sum; where
experts choose, of those that took the item. Which gate vectors are an object's is told in `object_gates`. The mass of
an expert on a size class is the mean over the objects of that class; over the experts it sums to one, less the share of
the places that no expert took. Its 95 % interval counts images, not objects, as independent.

**Separation** of a layer is how far the size classes lie apart: the root of sum_e sum_s (n_s / n) (m_se - m_e)^2, with
n_s objects in class s, m_se the mass, and m_e its mean over all objects. 0: every size is served alike. Its square over
the variance of the gate vectors among the objects is the effect size, the share of it that size explains (eta squared).

Two things that are no specialisation also give a separation above 0, and each has its test:

1. **Chance.** The objects of one image share its gates, so images, not objects, are the units that can be exchanged:
   the gate maps are permuted among the images while the boxes stay. What a router knows about position alone stays in
   the null distribution, and so does any imbalance between experts. Where gates are those of FPN levels, which stand
   for sizes, the levels of an image are exchanged as well.
2. **Architecture.** Features of a scene full of small objects differ from those of a close-up, and those of one FPN
   level from those of another, so that any router, even one that has learned nothing, answers with different gates. The
   entries of every weight of the router are shuffled, which keeps their size and forgets what was learned, and the
   shuffled router is run on the same features (see `shuffled_routers`). For a router whose weights are independent
   draws (any usual initialisation) the shuffled ones are draws of the same kind, so that an untrained router is
   reported with the chosen probability `alpha` at most.

A layer *separates* sizes where both p-values are at most `alpha`. Both hold for all layers at once. Permuted images:
the separations are standardised by their null distributions and compared with the maximum of the null over the layers
(for single experts: over all experts of all layers). Shuffled routers, whose null distributions differ much in form:
the layer's own p-value times the number of layers (Bonferroni). What is shown is association: an expert may as well
follow scenes, in which small objects are common.
"""
import contextlib
import copy
import textwrap
import zlib
from dataclasses import dataclass, field
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn

from ..errors import InputError, counted
from ..routing import Routing, current_image_sizes, routing_context
from .force import assign, rewrite_routing, routed_layers
from .object_gates import ATTRIBUTION, SIZES, Objects, gate_shares, lay_out
from .permutation import clustered_means, curve, level_permutations, max_p, permuted_mass, separation
from .shuffled_routers import ShuffledRouters


@dataclass
class LayerSizes:
    """What one layer does with object sizes.

    Attributes:
        name: Module name; `name#1` is the second record of one forward.
        kind: A key of `object_gates.ATTRIBUTION`.
        mass: (S, E) mean gate mass, rows sum to one; the row of a class without objects is NaN.
        half: (S, E) half the width of its 95 % interval; NaN for a class of fewer than four images.
        leads: (S, E) objects for which this expert has the largest share.
        expert_p: (E,) chance test of every expert, over all experts of all layers.
        separation: See the module's docstring.
        explained: The share of the variance of the gates among objects that size explains; None where nothing varies.
        explained_by_chance: The same with images permuted, on average; of the variance that is there unpermuted.
        chance_p: Chance test of the layer, over all layers.
        untrained_separation: Mean separation of the shuffled routers; None where there were none.
        untrained_high: Its 95 % quantile.
        thinned_separation: The separation that is compared with it, where only some places of an object are looked at.
        untrained_p: Architecture test of the layer, corrected for their number; None likewise.
        separates: Both tests are at most alpha; None where the second is missing.
        curve: (area, (E,) mean gate, (E,) half width of its 95 % interval) over the area of objects.
        gates: (O, E) gate vector of every object; not part of the JSON.
    """
    name: str
    kind: str
    mass: np.ndarray
    half: np.ndarray
    leads: np.ndarray
    expert_p: np.ndarray
    separation: float
    explained: Optional[float]
    explained_by_chance: Optional[float]
    chance_p: float
    untrained_separation: Optional[float]
    untrained_high: Optional[float]
    thinned_separation: Optional[float]
    untrained_p: Optional[float]
    separates: Optional[bool]
    curve: List[Tuple[float, np.ndarray, np.ndarray]]
    gates: np.ndarray

    @property
    def leader(self) -> np.ndarray:
        """(O,) the expert with the largest share of each object; -1 for one that no expert took."""
        return np.where(self.gates.sum(axis=1) > 1e-9, self.gates.argmax(axis=1), -1)

    def expert_of(self, size: int) -> int:
        """The expert whose share of this size class exceeds its share of all objects most."""
        return int(np.nan_to_num(self.mass[size] - self.gates.mean(axis=0)).argmax())

    def as_dict(self) -> Dict[str, Any]:
        """Plain numbers for JSON; what cannot be said is None."""
        plain = {key: value for key, value in vars(self).items() if key not in ('mass', 'half', 'leads', 'gates')}
        return {
            **plain,
            'attribution': ATTRIBUTION[self.kind],
            **{key: {size: _plain(row) for size, row in zip(SIZES, getattr(self, key))}
               for key in ('mass', 'half', 'leads')},
            'expert_p': self.expert_p.tolist(),
            'curve': [[area, mean.tolist(), half.tolist()] for area, mean, half in self.curve],
        }


def _plain(row: np.ndarray) -> Optional[List[float]]:
    return None if np.isnan(row).any() else row.tolist()


@dataclass
class SizeAnalysis:
    """The outcome over all layers; `separates` where any layer does."""
    layers: List[LayerSizes]
    objects: Dict[str, int]
    images: int
    alpha: float
    permutations: int
    shuffles: int
    seed: int
    skipped: Dict[str, str] = field(default_factory=dict)

    @property
    def separates(self) -> bool:
        return any(layer.separates for layer in self.layers)

    @property
    def strongest(self) -> LayerSizes:
        """The layer with the largest separation."""
        return max(self.layers, key=lambda layer: layer.separation)

    def as_dict(self) -> Dict[str, Any]:
        """Plain numbers for JSON."""
        layers = [{**layer.as_dict(), 'verdict': verdict(layer, self.alpha)} for layer in self.layers]
        return {'separates': self.separates, **vars(self), 'layers': layers}


# ---- collecting gates and objects over a data set

class _Call(NamedTuple):
    """One call of a router, with the padding that was known then. The output keeps its tensors, and so their ids."""
    module: nn.Module
    inputs: tuple
    padding: Optional[tuple]
    output: Routing


@dataclass
class _Seen:
    """What was gathered of one layer."""
    kind: str
    maps: List[np.ndarray] = field(default_factory=list)  # (n, P, E) a batch
    gates: List[np.ndarray] = field(default_factory=list)  # (o, E) a batch


class SizeCollector:
    """Gathers gates and objects while a model runs, whatever the model.

    >>> with SizeCollector(model) as collector:
    ...     for images, objects in loader:
    ...         with collector.batch(objects):
    ...             model(images)
    >>> print(size_table(collector.analyze()))

    Args:
        model: Holds routed layers; to be run in evaluation mode, uncompiled.
        shuffles: R, shuffled versions of every router; 0 does without the second test.
        seed: Of the shuffles.
        cells: Rows and columns of the grid on which gate maps are compared.
    """

    def __init__(self, model: nn.Module, shuffles: int = 499, seed: int = 0, cells: int = 16):
        self.layers = routed_layers(model)  # refuses a model without any
        self.model, self.shuffles, self.seed, self.cells = model, shuffles, seed, cells
        self.names = {id(module): name for name, module in model.named_modules()}
        self.skipped: Dict[str, str] = {}
        self.now: List[Objects] = []
        self.objects: List[Objects] = []  # of all images
        self.routers: Dict[str, nn.Module] = {}
        self._input_size: Optional[Tuple[int, int]] = None
        self._seen: Dict[str, _Seen] = {}
        self._shuffled: Dict[str, ShuffledRouters] = {}
        self._calls: List[_Call] = []
        self._hooks: list = []

    def __enter__(self) -> 'SizeCollector':
        modules = {id(m): m for layer in self.layers.values() for m in layer.modules()}
        self._hooks = [module.register_forward_hook(self._note_call) for module in modules.values()]
        return self

    def __exit__(self, *exc_info) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def batch(self, objects: Sequence[Objects], input_size: Optional[Tuple[int, int]] = None) -> Iterator[None]:
        """Run the model once inside.

        Args:
            objects: Those of every image.
            input_size: (height, width) of the batch in pixels; needed where tokens are routed and nothing is padded.
        """
        self.now, self._input_size = list(objects), input_size
        try:
            with torch.no_grad(), routing_context() as context:
                yield
            seen: Dict[str, int] = {}
            for module, routing in context.records:
                name = self.names.get(id(module))
                if name is not None:
                    count = seen[name] = seen.get(name, -1) + 1
                    self._add(f'{name}#{count}' if count else name, routing)
            self.objects += self.now
        finally:
            self.now = []
            self._calls.clear()

    def _note_call(self, module: nn.Module, inputs: tuple, output) -> None:
        if self.now and isinstance(output, Routing):
            self._calls.append(_Call(module, inputs, current_image_sizes(), output))

    def _add(self, name: str, routing: Routing) -> None:
        reason = self._refusal(routing)
        if reason:
            self.skipped[name] = reason
            return
        router, features, padding = self._source(routing)
        extents, input_size = None, self._input_size
        if padding is not None:
            extents, input_size = (padding[0].cpu().double() / torch.tensor(padding[1])).numpy(), tuple(padding[1])
        layout = lay_out(routing, extents, input_size, self.cells)
        maps = layout.maps(gate_shares(routing))
        seen = self._seen.setdefault(name, _Seen(layout.kind))
        if seen.maps and (seen.kind, seen.maps[0].shape[1]) != (layout.kind, maps.shape[1]):
            raise InputError(f'layer {name!r}: tokens form a grid in some batches and not in others.')
        seen.maps.append(maps)
        seen.gates += [each.at(layout.kind, maps.shape[1]) @ gates for each, gates in zip(self.now, maps)]
        if router is not None and self.shuffles:
            self.routers.setdefault(name, router)
            self._shuffled_router(name).add(features, routing, layout, self.now)

    def _refusal(self, routing: Routing) -> str:
        if routing.levels and any(each.levels is None for each in self.now):
            return 'its gates are those of FPN levels, and nothing tells the level of an object'
        if routing.shape[:1] != (len(self.now),):
            return f'its record has shape {tuple(routing.shape)}, which does not begin with the images'
        return ''

    def _source(self, routing: Routing) -> Tuple[Optional[nn.Module], Optional[torch.Tensor], Optional[tuple]]:
        """The router that decided, the features it met, and the padding known then. A record keeps the logits of the
        call it came from, whatever its layer adds; or, of several calls of one router, joined."""
        for call in self._calls:
            if call.output.logits is routing.logits:
                return self._usable(call.module, [call])
        for module in dict.fromkeys(call.module for call in self._calls):
            calls = [call for call in self._calls if call.module is module]
            logits = torch.cat([call.output.logits for call in calls])
            if logits.shape == routing.logits.shape and torch.equal(logits, routing.logits):
                return self._usable(module, calls)
        return None, None, None

    @staticmethod
    def _usable(module: nn.Module, calls: List[_Call]):
        """Routers of features alone; which items lie on padding changes no decision upon the others."""
        features = [call.inputs[0] for call in calls]
        others = [each for call in calls for each in call.inputs[1:] if each is not None]
        if any(each.dim() not in (2, 3) for each in features) or any(each.dtype != torch.bool for each in others):
            return None, None, calls[0].padding
        return module, torch.cat([each.detach() for each in features]), calls[0].padding

    def _shuffled_router(self, name: str) -> ShuffledRouters:
        if name not in self._shuffled:
            seed = zlib.crc32(f'{self.seed}.{name}'.encode())
            self._shuffled[name] = ShuffledRouters(self.routers[name], self.shuffles, seed)
        return self._shuffled[name]

    @property
    def sizes(self) -> np.ndarray:
        """(O,) size classes of all objects so far."""
        return np.concatenate([each.sizes for each in self.objects])

    def gates(self, name: str) -> np.ndarray:
        """(O, E) gate vector that a layer gave every object so far."""
        return np.concatenate(self._seen[name].gates)

    def analyze(self, permutations: int = 999, alpha: float = 0.01) -> SizeAnalysis:
        """Both tests on what was gathered.

        Args:
            permutations: Number of permutations of the chance test.
            alpha: Level of both tests.

        Raises:
            InputError: There are fewer than two images or size classes with objects, or alpha cannot be reached.
        """
        for name in [name for name in self._seen if sum(map(len, self._seen[name].maps)) < len(self.objects)]:
            self.skipped[name] = 'it was not run on all batches'
            del self._seen[name], self._shuffled[name]
        if not self._seen:
            reasons = ''.join(f' {name}: {reason}.' for name, reason in self.skipped.items())
            raise InputError(f'No gate was seen: run the model inside `with collector.batch(...)`.{reasons}')
        for shuffled in self._shuffled.values():
            shuffled.run()
        maps = {name: np.concatenate(seen.maps) for name, seen in self._seen.items()}
        kinds = {name: seen.kind for name, seen in self._seen.items()}
        found = analyze(maps, kinds, self.objects, self._shuffled, permutations, alpha, self.seed)
        found.skipped = self.skipped
        return found


# ---- the result

def analyze(
        maps: Dict[str, np.ndarray],
        kinds: Dict[str, str],
        objects: Sequence[Objects],
        shuffled: Optional[Dict[str, ShuffledRouters]] = None,
        permutations: int = 999,
        alpha: float = 0.01,
        seed: int = 0,
) -> SizeAnalysis:
    """Gate mass by object size and both tests.

    Args:
        maps: Layer to (N, P, E) gate maps.
        kinds: Layer to a key of `object_gates.ATTRIBUTION`.
        objects: Those of each of the N images.
        shuffled: Layer to its shuffled routers, having run; a layer may be missing.
        permutations, alpha, seed: See `SizeCollector.analyze`.
    """
    shuffled = shuffled or {}
    filled = [n for n, each in enumerate(objects) if len(each.areas)]  # others say nothing about sizes
    objects = [objects[n] for n in filled]
    maps = {name: each[filled] for name, each in maps.items()}
    sizes = np.concatenate([each.sizes for each in objects]) if objects else np.zeros(0, int)
    counts = np.bincount(sizes, minlength=len(SIZES))
    shuffles = min([each.count for each in shuffled.values()], default=0)
    _check_objects(counts, len(objects))
    check_tests(alpha, permutations, shuffles, seed, len(shuffled))

    null = {name: _permuted(maps[name], kinds[name], objects, permutations, seed) for name in maps}
    experts = [separation(mass, counts) for mass in null.values()]  # (1 + R, E) each
    layers = np.stack([np.linalg.norm(e, axis=1) for e in experts], axis=1)  # (1 + R, layers)
    chance_p = max_p(layers[0], layers[1:])
    every = np.concatenate(experts, axis=1)
    expert_p = np.split(max_p(every[0], every[1:]), np.cumsum([e.shape[1] for e in experts])[:-1])
    results = [
        _layer(name, kinds[name], maps[name], objects, layers[:, i], chance_p[i], expert_p[i],
               _against_shuffled(shuffled[name], len(shuffled)) if name in shuffled else None, alpha)
        for i, name in enumerate(maps)]
    return SizeAnalysis(
        results, dict(zip(SIZES, counts.tolist())), len(objects), alpha, permutations, shuffles, seed)


def _permuted(
        maps: np.ndarray,
        kind: str,
        objects: Sequence[Objects],
        permutations: int,
        seed: int,
) -> np.ndarray:
    """(1 + R, S, E) gate mass: the observed one, and with the gates exchanged; images alike in all layers, whose
    dependence the maximum over them thus keeps."""
    rng = np.random.default_rng(seed)
    images, positions, experts = maps.shape
    weights = np.stack([_by_class(each.at(kind, positions), each.sizes) for each in objects])  # (N, S, P)
    if kind == 'level':
        orders = level_permutations(images, positions, permutations, rng)
        maps = maps.reshape(-1, 1, experts)
        weights = weights.transpose(0, 2, 1).reshape(images * positions, len(SIZES), 1)
    else:
        orders = np.stack([rng.permutation(images) for _ in range(permutations)])
    return permuted_mass(maps, weights, np.concatenate([np.arange(len(maps))[None], orders]))


def _by_class(rows: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """(O, P) to (S, P) sums."""
    return np.eye(len(SIZES))[:, sizes] @ rows


def _against_shuffled(shuffled: ShuffledRouters, layers: int) -> Tuple[float, float, float, float]:
    """Separation on what was looked at, mean and 95 % quantile of the shuffled routers, p times the layers."""
    counts = shuffled.objects
    number = np.maximum(counts, 1)[:, None]
    observed = float(np.linalg.norm(separation(shuffled.observed / number, counts)))
    null = np.linalg.norm(separation(shuffled.versions / number, counts), axis=1)
    reached = 1 + (null >= observed - 1e-6 * max(1., observed)).sum()  # routers are float32
    return observed, float(null.mean()), float(np.quantile(null, .95)), min(1., layers * int(reached) / (len(null) + 1))


def _layer(
        name: str,
        kind: str,
        maps: np.ndarray,
        objects: Sequence[Objects],
        null: np.ndarray,
        chance_p: float,
        expert_p: np.ndarray,
        against: Optional[Tuple[float, float, float, float]],
        alpha: float,
) -> LayerSizes:
    """All numbers of one layer; `null` is its separation, observed and permuted."""
    gates = np.concatenate([each.at(kind, maps.shape[1]) @ rows for each, rows in zip(objects, maps)])
    sizes, areas = (np.concatenate([getattr(each, key) for each in objects]) for key in ('sizes', 'areas'))
    images = np.repeat(np.arange(len(objects)), [len(each.areas) for each in objects])
    mass, half, leads = np.full((3, len(SIZES), gates.shape[1]), np.nan)
    for s in range(len(SIZES)):
        leads[s] = np.bincount(gates[(sizes == s) & (gates.sum(axis=1) > 1e-9)].argmax(axis=1), minlength=len(mass[s]))
        if (sizes == s).any():
            mass[s], width = clustered_means(gates, (sizes == s).astype(float), images)
            half[s] = np.nan if width is None else width
    total = float(gates.var(axis=0).sum())
    share = (null ** 2 / total).tolist() if total > 1e-12 else []
    observed, mean, high, untrained_p = against or (None,) * 4
    return LayerSizes(
        name=name, kind=kind, mass=mass, half=half, leads=leads.astype(int), expert_p=expert_p,
        separation=float(null[0]),
        explained=min(1., share[0]) if share else None,
        explained_by_chance=min(1., float(np.mean(share[1:]))) if share else None,
        chance_p=float(chance_p),
        untrained_separation=mean, untrained_high=high, thinned_separation=observed, untrained_p=untrained_p,
        separates=None if against is None else bool(max(chance_p, untrained_p) <= alpha),
        curve=curve(gates, areas, images), gates=gates,
    )


def _check_objects(counts: np.ndarray, images: int) -> None:
    if (counts > 0).sum() < 2 or images < 2:
        found = ', '.join(f'{n} {size}' for size, n in zip(SIZES, counts))
        raise InputError(
            f'The data set has {found} objects in {images} images: comparing sizes needs at least two size classes '
            'and two images with objects.')


def check_tests(alpha: float, permutations: int, shuffles: int, seed: int = 0, layers: int = 1) -> None:
    """Refuse what the tests cannot use, as far as is known of so many layers with shuffled routers.

    Raises:
        InputError: Of alpha, permutations, shuffles or seed.
    """
    if not 0 < alpha < 1:
        raise InputError(f'alpha={alpha}: use a level between 0 and 1.')
    needed = {'permutations': int(np.ceil(1 / alpha)) - 1, 'shuffles': int(np.ceil(layers / alpha)) - 1}
    for name, number in (('permutations', permutations), ('shuffles', shuffles)):
        if number < needed[name] and (number or name == 'permutations'):
            raise InputError(
                f'{name}={number} cannot give a p-value of alpha={alpha} or less for {counted(layers, "layer")}: use '
                f'at least {needed[name]}.')
    if seed < 0:
        raise InputError(f'seed={seed}: use a number of at least 0.')


def size_table(analysis: SizeAnalysis) -> str:
    """A plain-text table: one row an expert, one verdict a layer."""
    objects = ', '.join(f'{n} {size}' for size, n in analysis.objects.items())
    lines = [f'Gate mass in % on the objects of {analysis.images} images ({objects}), half its 95 % interval, and the '
             'objects that the expert leads']
    for layer in analysis.layers:
        lines += ['', f'{layer.name} (an object has {ATTRIBUTION[layer.kind]})',
                  '  expert' + ''.join(f'{size:>20}' for size in SIZES) + '   p (chance)']
        for e in range(layer.mass.shape[1]):
            cells = ''.join(f'{mass_cell(layer, s, e):>20}' for s in range(len(SIZES)))
            lines.append(f'  {e:>6}{cells}   {layer.expert_p[e]:10.3f}')
        if not np.allclose(np.nan_to_num(layer.mass.sum(axis=1), nan=1.), 1.):
            lines.append('  no one' + ''.join(f'{100 * (1 - m):>13.1f}       ' for m in layer.mass.sum(axis=1)))
        lines += textwrap.wrap(verdict(layer, analysis.alpha), 118, initial_indent='  ', subsequent_indent='  ')
    lines += [f'not analysed: {name}, because {reason}' for name, reason in analysis.skipped.items()]
    return '\n'.join(lines)


def mass_cell(layer: LayerSizes, size: int, expert: int) -> str:
    """`43.2 ± 2.1 (17)`: percent, half its interval, objects led; - for a class without objects."""
    mass, half = 100 * layer.mass[size, expert], 100 * layer.half[size, expert]
    if np.isnan(mass):
        return '-'
    return f'{mass:.1f} ± {"?" if np.isnan(half) else f"{half:.1f}"} ({layer.leads[size, expert]})'


def verdict(layer: LayerSizes, alpha: float) -> str:
    """One or two sentences on one layer."""
    text = f'separation {layer.separation:.3f}'
    if layer.explained is not None:
        text += (f', size explains {100 * layer.explained:.1f} % of the variance of the gates among objects '
                 f'({100 * layer.explained_by_chance:.1f} % by chance)')
    text += f'; images{" and levels" if layer.kind == "level" else ""} permuted: p = {layer.chance_p:.3f}; '
    if layer.untrained_p is None:
        return text + 'no shuffled router to compare with, so no verdict.'
    thinned = '' if abs(layer.thinned_separation - layer.separation) < 5e-4 else \
        f' (of {layer.thinned_separation:.3f} on the places looked at)'
    text += f'shuffled routers reach {layer.untrained_separation:.3f} on average{thinned}: '
    text += f'p = {layer.untrained_p:.3f}. '
    if layer.separates:
        return text + 'Its experts separate object sizes.'
    if layer.chance_p <= alpha:
        return text + 'Gates differ between sizes, but no more than with shuffled weights: no separation.'
    return text + 'No separation by object size.'


# ---- controls: what the tests must not report, and what they must

@contextlib.contextmanager
def untrained_routers(routers: Dict[str, nn.Module], seed: int = 0) -> Iterator[None]:
    """Routers as they are before training, for a while; everything else stays.

    Matrices that start at zero, and would give all images the same gates, are drawn instead: normal, variance 1 / fan
    in.

    Args:
        routers: As `SizeCollector.routers` found them.
        seed: Of the draws.
    """
    saved = {name: copy.deepcopy(router.state_dict()) for name, router in routers.items()}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            for router in routers.values():
                for module in router.modules():
                    if hasattr(module, 'reset_parameters'):
                        module.reset_parameters()
                for p in router.parameters():
                    if p.dim() > 1 and not p.any():
                        p.normal_(std=p[0].numel() ** -0.5)
        yield
    finally:
        for name, router in routers.items():
            router.load_state_dict(saved[name])


def planted_sizes(model: nn.Module, collector: SizeCollector):
    """Routers that know the answer: every item goes to the expert of its image's most frequent object size.

    A context manager, to be entered before the collector. Small, medium and large go to experts 0, 1 and 2 (modulo E;
    the smaller size of a tie, expert 0 without objects).
    """
    def rule(name: str, routing: Routing) -> Routing:
        items, images = len(routing.logits), len(collector.now)
        if not images or items % images:
            return routing
        dominant = [np.bincount(each.sizes).argmax() if len(each.sizes) else 0 for each in collector.now]
        experts = torch.tensor(dominant).repeat_interleave(items // images)
        return assign(routing, experts.to(routing.logits.device) % routing.num_experts)
    return rewrite_routing(model, rule)
