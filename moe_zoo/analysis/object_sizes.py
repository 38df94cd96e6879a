"""Do experts follow object size? Gate mass on small, medium and large objects, and two tests that it is no accident.

Letters: N images, P positions of a gate map (1 where an image has one gate vector), E experts, S = 3 size classes,
O objects, R repetitions, T routed items.

**Gate mass.** A gate vector is the combine weight an item gives each expert, before capacity, divided by its sum. An
object inherits the gate vector of its image, or, where tokens or positions are routed, the mean over its box. The mass
of an expert on a size class is the mean over the objects of that class; over the experts it sums to one.

**Separation** of a layer is how far the size classes lie apart: the root of sum_e sum_s (n_s / n) (m_se - m_e)^2, with
n_s objects in class s, m_se the mass, and m_e its mean over all objects. 0: every size is served alike.

Two things that are no specialisation also give a separation above 0, and each has its test:

1. **Chance.** The objects of one image share its gates, so images, not objects, are the units that can be exchanged:
   the gate maps are permuted among the images while the boxes stay. What a router knows about position alone stays in
   the null distribution, and so does any imbalance between experts.
2. **Architecture.** Features of a scene full of small objects differ from those of a close-up, so that any router, even
   one that has learned nothing, answers with different gates. The entries of every weight of the router are shuffled,
   which keeps their size and forgets what was learned, and the shuffled router is run on the same features. For a
   router whose weights are independent draws (any usual initialisation) the shuffled ones are draws of the same kind,
   so that an untrained router is reported with the chosen probability `alpha` at most.

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
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from ..errors import InputError
from ..routing import Routing, current_image_sizes, routing_context
from .force import assign, rewrite_routing, routed_layers
from .permutation import max_p, permuted_mass, separation

SIZES = ('small', 'medium', 'large')
AREA_LIMITS = (32 ** 2, 96 ** 2)  # COCO: pixels of the annotated image; the limits themselves count as medium


def size_classes(areas: Sequence[float]) -> np.ndarray:
    """(O,) areas in pixels of the annotated image to (O,) 0 small, 1 medium, 2 large."""
    areas = np.asarray(areas, dtype=np.float64)
    return (areas >= AREA_LIMITS[0]).astype(int) + (areas > AREA_LIMITS[1])


@dataclass
class LayerSizes:
    """What one layer does with object sizes.

    Attributes:
        name: Module name; `name#1` is the second record of one forward.
        mass: (S, E) mean gate mass, rows sum to one; the row of a class without objects is NaN.
        expert_p: (E,) chance test of every expert, over all experts of all layers.
        separation: See the module's docstring.
        chance_p: Chance test of the layer, over all layers.
        untrained_separation: Mean separation of the shuffled routers; None where there were none.
        untrained_p: Architecture test of the layer, corrected for their number; None likewise.
        separates: Both tests are at most alpha; None where the second is missing.
        positions: P; 1 where a gate vector belongs to a whole image.
    """
    name: str
    mass: np.ndarray
    expert_p: np.ndarray
    separation: float
    chance_p: float
    untrained_separation: Optional[float]
    untrained_p: Optional[float]
    separates: Optional[bool]
    positions: int


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

    def as_dict(self) -> Dict:
        """Plain numbers for JSON; the mass of a class without objects is None."""
        layers = []
        for layer in self.layers:
            mass = {size: None if np.isnan(row).any() else row.tolist() for size, row in zip(SIZES, layer.mass)}
            layers.append({**vars(layer), 'mass': mass, 'expert_p': layer.expert_p.tolist()})
        return {'separates': self.separates, **vars(self), 'layers': layers}


# ---- where objects meet gates

def overlaps(low: np.ndarray, high: np.ndarray, cells: int) -> np.ndarray:
    """Share of every interval that lies in each of `cells` equal cells of [0, 1].

    >>> overlaps(np.array([0.25]), np.array([1.0]), cells=2)  # 1/3 of it in the first half, 2/3 in the second
    array([[0.33333333, 0.66666667]])

    Args:
        low, high: (n,) ends of the intervals; an empty one counts as the cell it lies in.

    Returns:
        (n, cells), rows sum to one.
    """
    edges = np.linspace(0., 1., cells + 1)
    low, high = np.clip(low, 0., 1.), np.clip(high, 0., 1.)
    inside = np.minimum(high[:, None], edges[None, 1:]) - np.maximum(low[:, None], edges[None, :-1])
    inside = np.clip(inside, 0., None)
    empty = high <= low
    inside[empty] = np.eye(cells)[np.minimum((low[empty] * cells).astype(int), cells - 1)]
    return inside / inside.sum(axis=1, keepdims=True)


def token_grid(tokens: int, input_size: Tuple[int, int]) -> Optional[Tuple[int, int, int]]:
    """(tokens in front, rows, columns) of a sequence of patches: the only whole square patch that gives their number.

    >>> token_grid(197, (224, 224))
    (1, 14, 14)

    Returns:
        None where no square patch gives this number of tokens with at most 8 in front.
    """
    height, width = input_size
    for front in range(min(9, tokens)):
        patch = round((height * width / (tokens - front)) ** 0.5)
        if patch and height % patch == 0 and width % patch == 0 \
                and (height // patch) * (width // patch) == tokens - front:
            return front, height // patch, width // patch
    return None


def gate_shares(routing: Routing) -> np.ndarray:
    """(T, E) share of an item's combine weight that each expert gets, before capacity; where experts choose, of those
    that took the item: capacity is then the choice itself. Zeros for an item that none of them took."""
    routing = routing if routing.by_expert else routing._replace(kept=None)
    weights = routing.combine_matrix().double().cpu().numpy()
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)


def place(
        shares: np.ndarray,
        shape: Tuple[int, ...],
        extents: Optional[np.ndarray],
        input_size: Optional[Tuple[int, int]],
        cells: int,
) -> np.ndarray:
    """Gate vectors image by image, those of places on one common grid over the true area of every image.

    Args:
        shares: (T, E).
        shape: Of the record: (N,), (N, tokens) or (N, H, W).
        extents: (N, 2) share of the padded height and width that an image fills; None without padding.
        input_size: (height, width) of the batch in pixels, which tells the grid of tokens. Tokens without a grid are
            averaged over the image.
        cells: Rows and columns of the common grid.

    Returns:
        (N, 1, E), or (N, cells * cells, E) where places were routed.
    """
    images = shape[0]
    shares = shares.reshape(images, -1, shares.shape[-1])  # (N, T / N, E)
    if len(shape) == 2:
        grid = token_grid(shape[1], input_size) if input_size else None
        if grid is None:
            return shares.mean(axis=1, keepdims=True)
        shares, shape = shares[:, grid[0]:], (images, *grid[1:])
    if len(shape) == 1:
        return shares
    maps = shares.reshape(images, *shape[1:], -1)
    ends = np.linspace(0., 1., cells + 1)
    out = np.empty((images, cells * cells, maps.shape[-1]))
    for n in range(images):
        height, width = (1., 1.) if extents is None else extents[n]
        down = overlaps(ends[:-1] * height, ends[1:] * height, shape[1])  # (cells, H)
        across = overlaps(ends[:-1] * width, ends[1:] * width, shape[2])
        out[n] = np.einsum('ih,jw,hwe->ije', down, across, maps[n]).reshape(cells * cells, -1)
    return out


def object_weights(boxes: np.ndarray, sizes: np.ndarray, positions: int) -> np.ndarray:
    """How much every position counts for the objects of each size class in one image.

    Args:
        boxes: (O, 4) x0, y0, x1, y1 as shares of the image's width and height.
        sizes: (O,) size classes.
        positions: P, a square number.

    Returns:
        (S, P); the row of a class sums to its number of objects.
    """
    out = np.zeros((len(SIZES), positions))
    if len(boxes):
        cells = int(round(positions ** 0.5))
        down, across = overlaps(boxes[:, 1], boxes[:, 3], cells), overlaps(boxes[:, 0], boxes[:, 2], cells)
        np.add.at(out, sizes, np.einsum('oi,oj->oij', down, across).reshape(len(boxes), positions))
    return out


# ---- collecting both over a data set

@dataclass
class _Batch:
    """What the caller said of the batch that is running."""
    boxes: List[np.ndarray]
    sizes: List[np.ndarray]
    input_size: Optional[Tuple[int, int]]


@dataclass
class _Call:
    """One router call, until its shuffled versions have run."""
    features: torch.Tensor
    shape: Tuple[int, ...]
    extents: Optional[np.ndarray]
    input_size: Optional[Tuple[int, int]]
    objects: np.ndarray  # (N, S, P)


class SizeCollector:
    """Gathers gates and objects while a model runs, whatever the model.

    >>> with SizeCollector(model) as collector:
    ...     for images, boxes, areas in loader:
    ...         with collector.batch(boxes, areas):
    ...             model(images)
    >>> print(size_table(collector.analyze()))

    Args:
        model: Holds routed layers; to be run in evaluation mode, uncompiled.
        shuffles: R, shuffled versions of every router; 0 does without the second test.
        seed: Of the shuffles.
        cells: Rows and columns of the grid on which gate maps are compared.
    """
    buffer_items = 4096  # router calls are gathered up to so many items, then the shuffled routers run on them at once

    def __init__(self, model: nn.Module, shuffles: int = 1999, seed: int = 0, cells: int = 16):
        routed_layers(model)  # refuses a model without any
        self.model, self.shuffles, self.seed, self.cells = model, shuffles, seed, cells
        self.names = {id(module): name for name, module in model.named_modules()}
        self.routers: Dict[str, nn.Module] = {}
        self.skipped: Dict[str, str] = {}
        self.now: Optional[_Batch] = None
        self._gates: Dict[str, List[np.ndarray]] = {}
        self._objects: Dict[str, List[np.ndarray]] = {}
        self._shuffled: Dict[str, _ShuffledRouter] = {}
        self._waiting: Dict[str, List[_Call]] = {}
        self._untrained: Dict[str, np.ndarray] = {}  # (R, S, E) sums over objects
        self._calls: Dict[int, tuple] = {}
        self._hooks: list = []

    def __enter__(self) -> 'SizeCollector':
        self._hooks = [module.register_forward_hook(self._note_call) for module in self.model.modules()]
        return self

    def __exit__(self, *exc_info) -> None:
        for hook in self._hooks:
            hook.remove()

    @contextlib.contextmanager
    def batch(
            self,
            boxes: Sequence[np.ndarray],
            areas: Sequence[np.ndarray],
            input_size: Optional[Tuple[int, int]] = None,
    ) -> Iterator[None]:
        """Run the model once inside.

        Args:
            boxes: For every image (O, 4) x0, y0, x1, y1 as shares of its width and height.
            areas: For every image (O,) areas in pixels of the annotated image, as COCO counts them.
            input_size: (height, width) of the batch in pixels; needed where tokens are routed and nothing is padded.
        """
        sizes = [size_classes(a) for a in areas]
        self.now = _Batch([np.asarray(b, dtype=np.float64).reshape(-1, 4) for b in boxes], sizes, input_size)
        try:
            with torch.no_grad(), routing_context() as context:
                yield
            seen: Dict[str, int] = {}
            for module, routing in context.records:
                name = self.names.get(id(module))
                if name is None:
                    continue
                count = seen[name] = seen.get(name, -1) + 1
                self._add(f'{name}#{count}' if count else name, routing)
        finally:
            self.now = None
            self._calls.clear()

    def _note_call(self, module: nn.Module, inputs: tuple, output) -> None:
        if self.now is not None and isinstance(output, Routing):
            # A record keeps the logits of the call it came from, whatever its layer adds.
            self._calls[id(output.logits)] = (module, inputs, current_image_sizes(), output)

    def _add(self, name: str, routing: Routing) -> None:
        images = len(self.now.boxes)
        if not routing.shape or routing.shape[0] != images:
            self.skipped[name] = f'its record has shape {tuple(routing.shape)}, which does not begin with the images'
            return
        router, inputs, padding, _ = self._calls.get(id(routing.logits), (None, (), None, None))
        extents, input_size = None, self.now.input_size
        if padding is not None:
            extents, input_size = (padding[0].cpu().double() / torch.tensor(padding[1])).numpy(), tuple(padding[1])
        gates = place(gate_shares(routing), routing.shape, extents, input_size, self.cells)
        objects = np.stack([
            object_weights(b, s, gates.shape[1]) for b, s in zip(self.now.boxes, self.now.sizes)])
        if name in self._gates and self._gates[name][0].shape[1] != gates.shape[1]:
            raise InputError(f'layer {name!r}: tokens form a grid in some batches and not in others.')
        filled = objects.any(axis=(1, 2))  # images without objects say nothing about sizes
        self._gates.setdefault(name, []).append(gates[filled])
        self._objects.setdefault(name, []).append(objects[filled])
        # A router whose experts choose does not know their capacity: shuffled, it would be another kind of choice.
        shufflable = router is not None and not routing.by_expert and len(inputs) == 1 and inputs[0].dim() == 2
        if shufflable and self.shuffles:
            self.routers.setdefault(name, router)
            waiting = self._waiting.setdefault(name, [])
            waiting.append(_Call(inputs[0].detach(), routing.shape, extents, input_size, objects))
            if sum(len(call.features) for call in waiting) >= self.buffer_items:
                self._run_shuffled(name)

    def _run_shuffled(self, name: str) -> None:
        calls = self._waiting.pop(name, [])
        if not calls:
            return
        if name not in self._shuffled:
            seed = zlib.crc32(f'{self.seed}.{name}'.encode())
            self._shuffled[name] = _ShuffledRouter(self.routers[name], self.shuffles, seed)
        ends = np.cumsum([len(call.features) for call in calls])[:-1]
        sums = []
        for routing in self._shuffled[name].run(torch.cat([call.features for call in calls])):
            pieces = np.split(gate_shares(routing), ends)
            sums.append(sum(
                np.einsum('npe,nsp->se', place(p, c.shape, c.extents, c.input_size, self.cells), c.objects)
                for p, c in zip(pieces, calls)))
        self._untrained[name] = self._untrained.get(name, 0.) + np.stack(sums)

    def analyze(self, permutations: int = 999, alpha: float = 0.01) -> SizeAnalysis:
        """Both tests on what was gathered; see `analyze`."""
        for name in list(self._waiting):
            self._run_shuffled(name)
        if not self._gates:
            raise InputError('No gate was seen: run the model inside `with collector.batch(...)`.')
        gates = {name: np.concatenate(parts) for name, parts in self._gates.items()}
        objects = {name: np.concatenate(parts) for name, parts in self._objects.items()}
        untrained = {
            name: total / np.maximum(objects[name].sum(axis=(0, 2)), 1e-12)[:, None]
            for name, total in self._untrained.items()}
        result = analyze(gates, objects, untrained, permutations, alpha, self.seed)
        result.skipped = self.skipped
        return result


class _ShuffledRouter:
    """Versions of a router whose weights keep their values and lose their places."""

    def __init__(self, router: nn.Module, count: int, seed: int):
        self.router, self.count, self.seed = copy.deepcopy(router).eval(), count, seed
        for module in self.router.modules():
            module._forward_hooks.clear()
        self.parameters = {name: p.detach() for name, p in self.router.named_parameters()}

    @torch.no_grad()
    def run(self, features: torch.Tensor) -> Iterator[Routing]:
        """(T, D) features through every version; the same versions in every call."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.count):
            state = {
                name: p.flatten()[torch.randperm(p.numel(), generator=generator).to(p.device)].view_as(p)
                for name, p in self.parameters.items()}
            yield functional_call(self.router, state, (features,))


# ---- the result

def analyze(
        gates: Dict[str, np.ndarray],
        objects: Dict[str, np.ndarray],
        untrained: Optional[Dict[str, np.ndarray]] = None,
        permutations: int = 999,
        alpha: float = 0.01,
        seed: int = 0,
) -> SizeAnalysis:
    """Gate mass by object size and both tests.

    Args:
        gates: Layer to (N, P, E) gate maps of the images that hold objects.
        objects: Layer to (N, S, P) weights of its positions, see `object_weights`.
        untrained: Layer to (R, S, E) gate mass under shuffled routers, the same R for all; a layer may be missing.
        permutations: Number of permutations of the chance test.
        alpha: Level of both tests.
        seed: Of the permutations.

    Raises:
        InputError: There are fewer than two images or size classes with objects, or alpha cannot be reached.
    """
    untrained = untrained or {}
    names = list(gates)
    images = len(objects[names[0]])
    counts = np.rint(objects[names[0]].sum(axis=(0, 2))).astype(int)
    shuffles = min([len(null) for null in untrained.values()], default=0)
    _check(counts, images, alpha, permutations, shuffles, len(untrained))

    rng = np.random.default_rng(seed)
    orders = np.stack([np.arange(images), *(rng.permutation(images) for _ in range(permutations))])
    mass = {name: permuted_mass(gates[name], objects[name], orders) for name in names}  # row 0 is the observed one
    experts = [separation(mass[name], counts) for name in names]  # (1 + R, E) each
    layers = np.stack([np.linalg.norm(e, axis=1) for e in experts], axis=1)  # (1 + R, layers)
    chance_p = max_p(layers[0], layers[1:])
    every = np.concatenate(experts, axis=1)
    expert_p = np.split(max_p(every[0], every[1:]), np.cumsum([e.shape[1] for e in experts])[:-1])

    results = []
    for i, name in enumerate(names):
        untrained_mean, untrained_p, separates = None, None, None
        if name in untrained:
            null = np.linalg.norm(separation(untrained[name], counts), axis=1)
            reached = 1 + (null >= layers[0, i] - 1e-9).sum()
            untrained_mean, untrained_p = float(null.mean()), min(1., len(untrained) * reached / (len(null) + 1))
            separates = bool(max(chance_p[i], untrained_p) <= alpha)
        results.append(LayerSizes(
            name=name,
            mass=np.where((counts > 0)[:, None], mass[name][0], np.nan),
            expert_p=expert_p[i],
            separation=float(layers[0, i]),
            chance_p=float(chance_p[i]),
            untrained_separation=untrained_mean,
            untrained_p=untrained_p,
            separates=separates,
            positions=gates[name].shape[1],
        ))
    return SizeAnalysis(
        results, dict(zip(SIZES, counts.tolist())), images, alpha, permutations, shuffles, seed)


def _check(counts: np.ndarray, images: int, alpha: float, permutations: int, shuffles: int, layers: int) -> None:
    if (counts > 0).sum() < 2 or images < 2:
        found = ', '.join(f'{n} {size}' for size, n in zip(SIZES, counts))
        raise InputError(
            f'The data set has {found} objects in {images} images: comparing sizes needs at least two size classes '
            'and two images with objects.')
    if not 0 < alpha < 1:
        raise InputError(f'alpha={alpha}: use a level between 0 and 1.')
    needed = {'permutations': int(np.ceil(1 / alpha)) - 1, 'shuffles': int(np.ceil(layers / alpha)) - 1}
    for name, number in (('permutations', permutations), ('shuffles', shuffles)):
        if number < needed[name] and (number or name == 'permutations'):
            raise InputError(
                f'{name}={number} cannot give a p-value of alpha={alpha} or less for {layers} layers: use at least '
                f'{needed[name]}.')


def size_table(analysis: SizeAnalysis) -> str:
    """A plain-text table: one row an expert, one verdict a layer."""
    objects = ', '.join(f'{n} {size}' for size, n in analysis.objects.items())
    lines = [f'Gate mass in % on the objects of {analysis.images} images ({objects})']
    for layer in analysis.layers:
        where = 'one gate vector an image' if layer.positions == 1 else 'gates averaged over every box'
        lines += ['', f'{layer.name} ({where})', '  expert    small   medium    large   p (chance)']
        for e in range(layer.mass.shape[1]):
            cells = ' '.join(f'{"-":>8}' if np.isnan(v) else f'{100 * v:8.1f}' for v in layer.mass[:, e])
            lines.append(f'  {e:>6} {cells}   {layer.expert_p[e]:10.3f}')
        lines += textwrap.wrap(verdict(layer, analysis.alpha), 118, initial_indent='  ', subsequent_indent='  ')
    lines += [f'not analysed: {name}, because {reason}' for name, reason in analysis.skipped.items()]
    return '\n'.join(lines)


def verdict(layer: LayerSizes, alpha: float) -> str:
    """One sentence on one layer."""
    text = f'separation {layer.separation:.3f}; images permuted: p = {layer.chance_p:.3f}; '
    if layer.untrained_p is None:
        return text + 'no shuffled router to compare with, so no verdict.'
    text += f'shuffled routers reach {layer.untrained_separation:.3f} on average: p = {layer.untrained_p:.3f}. '
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
        sizes = collector.now.sizes
        items = len(routing.logits)
        if items % len(sizes):
            return routing
        dominant = [np.bincount(s, minlength=len(SIZES)).argmax() if len(s) else 0 for s in sizes]
        experts = torch.as_tensor(dominant, device=routing.logits.device) % routing.num_experts
        return assign(routing, experts.repeat_interleave(items // len(sizes)))
    return rewrite_routing(model, rule)
