"""What an agent sees at a place of a floor plan, and the representations that frozen encoders make of it.

The picture of a place is a panorama: 8 views of 45 degrees, one a direction, north first, of 8 columns each. A column
is one ray: a slice of wall, furniture or door, the higher the nearer, up to 8 cells away, between a white ceiling and a
brown floor. The colour says what it is, its brightness which way the face looks (the light comes from the north-east).
Walls have the colour of the type of room that they surround, which one sees through an open passage, too, and a brick
pattern. Furniture and doors are as high as walls and hide what is behind them. Sensor noise is added.

`ENCODERS` stand for the 25 encoders of Taskonomy, trained for other tasks, that the paper takes: they are fixed
functions of the picture, each 4 channels x 64 columns (16 x 16 x 8 in the paper).

| encoder | stands for | channels |
| --- | --- | --- |
| depth | 3-D tasks: depth, distance | nearness, its change from column to column, room for 1 and for 3 steps |
| normals | surface normals | which of the four ways the face looks |
| semantics | semantic segmentation | whether it is a chair, a table, a bed, a door |
| colour | 2-D tasks: autoencoding, texture | mean red, green and blue over the width of a view, and contrast in it |
| edges | 2-D edges | whether the brightness changes, in four bands of rows |
| keypoints | 2-D keypoints | whether detail has a local maximum, in four bands of rows: mostly noise |

None of them tells the way alone: depth knows no goal when it sees one, semantics no wall.
Letters: N places, B pictures, R = 16 rows, W = 64 columns.
"""
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from .navigation import FLOOR, PASSAGE, WALL, Plan, walkable_cells

__all__ = ['COLUMNS', 'ENCODERS', 'ROWS', 'openness', 'render']

ROWS, VIEWS, VIEW_COLUMNS = 16, 8, 8
COLUMNS = VIEWS * VIEW_COLUMNS
NOISE = 8  # standard deviation, of 255

CEILING, GROUND = (245, 245, 245), (110, 80, 50)
# Walls by `Plan.paint`, then chair, table, bed, door.
PALETTE = np.array([
    (120, 150, 200), (200, 130, 120), (130, 190, 130), (190, 190, 120), (170, 170, 170), (230, 230, 200),
    (230, 60, 200), (240, 150, 20), (30, 60, 230), (20, 130, 80)], dtype=np.float64)
BRIGHTNESS = np.array([1., .9, .72, .8])  # of faces that look north, east, south, west
BRICKS = np.array([1., .94])  # brightness of every other brick


class Hits(NamedTuple):
    """What every ray of every place meets.

    Attributes:
        distance: (N, W) float64, in cells from the middle of the place.
        colour: (N, W) int64, index into `PALETTE`.
        face: (N, W) int64, 0 to 3: it looks north, east, south, west.
        along: (N, W) float64, where on the face, 0 to 1.
    """
    distance: np.ndarray
    colour: np.ndarray
    face: np.ndarray
    along: np.ndarray


def cast_rays(plan: Plan, cells: np.ndarray, angles: np.ndarray) -> Hits:
    """Follow rays from cell to cell until something stands in the way.

    Args:
        plan: Its border is wall.
        cells: (N, 2) rows and columns to look from.
        angles: (W,) radians clockwise from north.
    """
    count = len(cells) * len(angles)
    direction = np.stack([-np.cos(angles), np.sin(angles)], axis=1)  # down, right
    direction = np.where(np.abs(direction) < 1e-9, 1e-9, direction)
    direction = np.tile(direction, (len(cells), 1))  # (N W, 2)
    start = np.repeat(cells, len(angles), axis=0)
    cell, step = start.copy(), np.sign(direction).astype(np.int64)
    apart = 1 / np.abs(direction)  # between two crossings of one axis
    upcoming = apart / 2
    distance, axis = np.zeros(count), np.zeros(count, dtype=np.int64)
    last = cell.copy()  # the cell before
    active = np.arange(count)
    while len(active):
        which = upcoming[active].argmin(axis=1)
        distance[active], axis[active] = upcoming[active, which], which
        last[active] = cell[active]
        cell[active, which] += step[active, which]
        upcoming[active, which] += apart[active, which]
        active = active[plan.surface[tuple(cell[active].T)] == FLOOR]
    here = np.arange(count)
    along = (start + .5 + distance[:, None] * direction)[here, 1 - axis] % 1
    surface = plan.surface[tuple(cell.T)]
    colour = np.where(surface == WALL, plan.paint[tuple(last.T)], surface - WALL + PASSAGE)
    ahead = step[here, axis] > 0  # the face looks back at the ray
    face = np.where(axis == 0, np.where(ahead, 0, 2), np.where(ahead, 3, 1))
    return Hits(*(part.reshape(len(cells), len(angles)) for part in (distance, colour, face, along)))


def render(plan: Plan, seed: int = 0, noise: float = NOISE) -> torch.Tensor:
    """The pictures of all places of a plan, in the order of `build_graph`.

    Args:
        plan: The building.
        seed: Of the noise.
        noise: Its standard deviation, of 255.

    Returns:
        (N, 3, R, W) uint8.
    """
    _, cells = walkable_cells(plan)
    angles = 2 * math.pi * (np.arange(COLUMNS) - (VIEW_COLUMNS - 1) / 2) / COLUMNS
    hits = cast_rays(plan, cells, angles)
    row = np.abs(np.arange(ROWS) + .5 - ROWS / 2)[:, None]  # from the horizon
    half = np.minimum(ROWS / 2 / hits.distance, ROWS / 2)[:, None].clip(min=1)
    cover = (half - row + .5).clip(0, 1)[..., None]  # (N, R, W, 1) share of a pixel that is slice
    brick = np.where((np.floor(hits.along * 4)[:, None] + np.arange(ROWS)[:, None] // 3) % 2 > 0, *BRICKS)
    slices = (PALETTE[hits.colour] * BRIGHTNESS[hits.face][..., None])[:, None] * brick[..., None]
    ground = np.where(np.arange(ROWS)[:, None, None] < ROWS // 2, CEILING, GROUND)  # (R, 1, 3)
    pixels = cover * slices + (1 - cover) * ground
    pixels += np.random.default_rng(seed).normal(0, noise, pixels.shape)
    return torch.from_numpy(pixels.clip(0, 255).round().astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def openness(plan: Plan) -> torch.Tensor:
    """(N,) float32: mean distance to what stands in the way in the 8 directions, in cells."""
    _, cells = walkable_cells(plan)
    hits = cast_rays(plan, cells, 2 * math.pi * np.arange(VIEWS) / VIEWS)
    return torch.from_numpy(hits.distance.mean(axis=1)).float()


# --- Representations --------------------------------------------------------------------------------------------------

class Encoder(nn.Module):
    """A fixed function of the picture, without parameters: (B, 3, R, W) float from 0 to 1 -> (B, 4, W) float."""

    def __init__(self):
        super().__init__()
        colours = PALETTE[:, None] * BRIGHTNESS[:, None] * BRICKS.mean() / 255  # (10, 4, 3)
        self.register_buffer('codes', torch.from_numpy(colours).float().flatten(0, 1), persistent=False)

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """(B, W) index into the palette x 4 faces of what every column shows on the horizon."""
        return torch.cdist(_horizon(x).transpose(1, 2), self.codes).argmin(dim=2)


def _horizon(x: torch.Tensor) -> torch.Tensor:
    """(B, 3, W): the colour of the slices, which cover the two rows in the middle however far they are."""
    return x[:, :, ROWS // 2 - 1:ROWS // 2 + 1].mean(dim=2)


def _next(x: torch.Tensor) -> torch.Tensor:
    """The column to the right; the panorama is closed."""
    return x.roll(-1, dims=-1)


class Depth(Encoder):
    """Nearness of every slice from its height, by least squares over the rows above and below the horizon."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        slices = _horizon(x)[:, :, None]  # (B, 3, 1, W)
        above, below = x[:, :, :ROWS // 2], x[:, :, ROWS // 2:]
        overlap, square = 0., 0.
        for half, ground in ((above, CEILING), (below, GROUND)):
            ground = x.new_tensor(ground)[:, None, None] / 255
            difference = slices - ground
            part = ((half - ground) * difference).sum(dim=1)  # (B, R / 2, W)
            overlap = overlap + (part if half is below else part.flip(1))
            square = square + difference.square().sum(dim=1)
        height = (overlap / square).clamp(0, 1).sum(dim=1)  # (B, W), from the horizon
        nearness = (2 * height / ROWS).clamp(min=2 / ROWS)
        room = [torch.sigmoid(8 * (1 / nearness - cells)) for cells in (1., 3.)]
        return torch.stack([2 * nearness - 1, 2 * (_next(nearness) - nearness), *room], dim=1)


class Normals(Encoder):
    """Which way the faces look: north, east, south, west."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.one_hot(self.nearest(x) % 4, 4).transpose(1, 2).to(x.dtype)


class Semantics(Encoder):
    """Where a chair, a table, a bed, a door is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        things = self.nearest(x) // 4 - (len(PALETTE) - 4)
        return (things[:, None] == torch.arange(4, device=x.device)[:, None]).to(x.dtype)


class Colour(Encoder):
    """Mean colour of every view, and the contrast in it, repeated over its columns."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        views = _horizon(x).unflatten(2, (VIEWS, VIEW_COLUMNS))
        contrast = views.std(dim=3).mean(dim=1, keepdim=True)
        return torch.cat([2 * views.mean(dim=3) - 1, 8 * contrast], dim=1).repeat_interleave(VIEW_COLUMNS, dim=2)


class Edges(Encoder):
    """Where the brightness changes from column to column by more than noise, in four bands of rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bands = x.mean(dim=1).unflatten(1, (4, ROWS // 4)).mean(dim=2)
        return ((_next(bands) - bands).abs() > .04).to(x.dtype)


class Keypoints(Encoder):
    """Where the second difference along the columns has a local maximum, however small, in four bands of rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bands = x.mean(dim=1).unflatten(1, (4, ROWS // 4)).mean(dim=2)
        detail = (_next(bands) - 2 * bands + bands.roll(1, dims=-1)).abs()
        return (detail >= F.max_pool1d(F.pad(detail, (3, 3), mode='circular'), 7, 1)).to(x.dtype)


ENCODERS = {
    'depth': Depth, 'normals': Normals, 'semantics': Semantics, 'colour': Colour, 'edges': Edges,
    'keypoints': Keypoints,
}
