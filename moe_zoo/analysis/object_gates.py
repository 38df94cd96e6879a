"""Where objects meet gates: which decisions of a routed layer an object of an image is said to have been served by.

Letters: N images, T routed items, t items of an image, P positions of a gate map, L feature levels, E experts, O
objects, S = 3 size classes.

| a record is about | its shape | an object has | `kind` |
| --- | --- | --- | --- |
| images | (N,) | the gate vector of its image | image |
| levels of a feature pyramid | (N, L), `levels` L | that of the level whose anchors fit its box best | level |
| places: tokens or map positions | (N, t), (N, H, W) | the mean over its box, on a grid of P cells | place |
| tokens that form no grid | (N, t) | the mean over all tokens of its image | tokens |
"""
from dataclasses import dataclass
from typing import Optional, Sequence, Tuple

import numpy as np

from ..layers.routed import token_grid
from ..routing import Routing

SIZES = ('small', 'medium', 'large')
AREA_LIMITS = (32 ** 2, 96 ** 2)  # COCO: pixels of the annotated image; the limits themselves count as medium
ATTRIBUTION = {
    'image': 'the gate vector of its image',
    'level': 'the gate vector of its FPN level, the one whose anchors overlap its box most',
    'place': 'the mean gate vector of the places inside its box',
    'tokens': 'the mean gate vector of all tokens of its image',
}


def size_classes(areas: Sequence[float]) -> np.ndarray:
    """(O,) areas in pixels of the annotated image to (O,) 0 small, 1 medium, 2 large."""
    areas = np.asarray(areas, dtype=np.float64)
    return (areas >= AREA_LIMITS[0]).astype(int) + (areas > AREA_LIMITS[1])


@dataclass
class Objects:
    """The objects of one image.

    Attributes:
        boxes: (O, 4) x0, y0, x1, y1 as shares of the image's width and height.
        areas: (O,) in pixels of the annotated image, as COCO counts them.
        levels: (O,) number of the FPN level of each; None where that is unknown.
    """
    boxes: np.ndarray
    areas: np.ndarray
    levels: Optional[np.ndarray] = None

    def __post_init__(self):
        self.boxes = np.asarray(self.boxes, dtype=np.float64).reshape(-1, 4)
        self.areas = np.asarray(self.areas, dtype=np.float64)
        self.sizes = size_classes(self.areas)

    def at(self, kind: str, positions: int) -> np.ndarray:
        """(O, P) how much every position of a gate map counts for each object; rows sum to one."""
        if kind == 'level':
            return np.eye(positions)[np.asarray(self.levels, dtype=int)]
        if kind != 'place':
            return np.ones((len(self.areas), 1))
        cells = int(round(positions ** 0.5))
        down = overlaps(self.boxes[:, 1], self.boxes[:, 3], cells)
        across = overlaps(self.boxes[:, 0], self.boxes[:, 2], cells)
        return np.einsum('oi,oj->oij', down, across).reshape(-1, positions)


@dataclass
class Layout:
    """How the items of a record lie in the images of a batch.

    Attributes:
        kind: A key of `ATTRIBUTION`.
        order: (N, t) number of every item of an image in the record.
        spread: (N or 1, P, t) share of every item in each position of a gate map; rows sum to one.
    """
    kind: str
    order: np.ndarray
    spread: np.ndarray

    def maps(self, shares: np.ndarray) -> np.ndarray:
        """(T, E) gate shares to (N, P, E) gate maps."""
        return self.spread @ shares[self.order]


def lay_out(
        routing: Routing,
        extents: Optional[np.ndarray],
        input_size: Optional[Tuple[int, int]],
        cells: int,
) -> Layout:
    """The layout of a record.

    Args:
        routing: The record; its shape begins with N.
        extents: (N, 2) share of the padded height and width that an image fills; None without padding.
        input_size: (height, width) of the batch in pixels, which tells the grid of tokens.
        cells: Rows and columns of the grid over the true area of an image, P = cells * cells.
    """
    shape = tuple(routing.shape)
    order = np.arange(int(np.prod(shape))).reshape(shape[0], -1)
    if routing.levels:
        return Layout('level', order, np.eye(routing.levels)[None])
    if len(shape) == 1:
        return Layout('image', order, np.ones((1, 1, 1)))
    grid = (0, *shape[1:])
    if len(shape) == 2:
        grid = token_grid(shape[1], input_size) if input_size else None
    if grid is None:
        return Layout('tokens', order, np.full((1, 1, shape[1]), 1 / shape[1]))
    front, rows, columns = grid
    return Layout('place', order[:, front:], _cells(rows, columns, extents, cells))


def _cells(rows: int, columns: int, extents: Optional[np.ndarray], cells: int) -> np.ndarray:
    """(N or 1, cells * cells, rows * columns) share of every position of a map in each cell of the true area."""
    ends = np.linspace(0., 1., cells + 1)
    found = []
    for height, width in [(1., 1.)] if extents is None else extents:
        down = overlaps(ends[:-1] * height, ends[1:] * height, rows)  # (cells, rows)
        across = overlaps(ends[:-1] * width, ends[1:] * width, columns)
        found.append(np.einsum('ih,jw->ijhw', down, across).reshape(cells * cells, rows * columns))
    return np.stack(found)


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


def gate_shares(routing: Routing) -> np.ndarray:
    """(T, E) share of an item's combine weight that each expert gets, before capacity; where experts choose, of those
    that took the item: capacity is then the choice itself. Zeros for an item that none of them took."""
    routing = routing if routing.by_expert else routing._replace(kept=None)
    weights = routing.combine_matrix().double().cpu().numpy()
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-12)
