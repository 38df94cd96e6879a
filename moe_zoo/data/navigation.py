"""Navigation at desk scale: generated floor plans, the graph of places on them, shortest-path labels and rollouts.

After the task of Situational Fusion of Visual Representation for Visual Navigation, Shen, Xu, Zhu, Guibas, Fei-Fei,
Savarese, ICCV 2019, https://arxiv.org/abs/1908.09073. What stands for what:

- A Gibson building is a generated plan: rooms of four types and corridors between walls, doors and open passages.
- The octile grid of places is every cell that can be walked on. There are 9 actions: a step to one of the 8 neighbours,
  or stop. A step into a wall or a piece of furniture, and a diagonal one past the corner of either, leaves the agent
  where it is and counts as a step.
- The goal is the nearest chair, table, bed or door. The distance of a place is the number of steps to it, every step
  counting one, the last one onto it: a place beside a bed is at distance 1, a doorway with a door at distance 0.
- The label of a place is the set of the optimal actions: every step that leads one closer; stop at 1 or less.
- Rooms of a type are more frequent in one part of the buildings: bedrooms in the north, dining rooms in the south,
  studies in the east, empty halls in the west. It is what an agent can know of a building it has never seen.
- An episode starts 6 to 32 steps away and succeeds when the agent is within 3 steps of the goal, after 39 steps at
  most. Stopping further away ends it.
- The agent sees the place that it is at, and remembers the direction of its last step only so far as not to turn back:
  a turn by more than 90 degrees is on no shortest path. Where its way was barred it is free to turn.

Views and representations of a place are in `moe_zoo.data.navigation_views`.
Letters: H x W cells of a plan, N places, G = 4 goals, A = 9 actions, B episodes.
"""
import itertools
from typing import NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from moe_zoo.errors import InputError

__all__ = [
    'ACTIONS', 'DIRECTIONS', 'Episodes', 'GOALS', 'Graph', 'Plan', 'STOP', 'build_graph', 'generate_plan',
    'merge_graphs', 'rollout', 'sample_starts', 'walkable_cells',
]

DIRECTIONS = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # (down, right): N, NE, E, ...
ACTIONS = ('N', 'NE', 'E', 'SE', 'S', 'SW', 'W', 'NW', 'stop')
STOP = 8
GOALS = ('chair', 'table', 'bed', 'door')

# Codes of Plan.surface: what is in a cell.
FLOOR, WALL = 0, 1
CHAIR, TABLE, BED, DOOR = 2, 3, 4, 5  # GOALS in order
# Codes of Plan.paint: the colour of the walls around a cell.
BEDROOM, DINING, STUDY, HALL, CORRIDOR, PASSAGE = range(6)
# Codes of Graph.situation.
IN_ROOM, IN_CORRIDOR, IN_PASSAGE = range(3)

FAR = 1_000_000  # distance of what cannot be reached
START_DISTANCES = (6, 32)
STEPS, RADIUS = 39, 3  # of an episode

MIN_ROOM, MAX_ROOM = 4, 10  # cells along a side
CORRIDOR_SPAN = 16  # cells along a side from which a part of the building is divided by a corridor
DOOR_SHARE = 0.25  # of the openings between rooms and corridors; the others are open passages
ORDER = 5.  # rooms of a type are exp(5) times as frequent, before normalisation, at their end as at the other


class Plan(NamedTuple):
    """One building.

    Attributes:
        surface: (H, W) int64, what is in a cell: FLOOR, WALL, CHAIR, TABLE, BED or DOOR. The border is WALL.
        paint: (H, W) int64, type of the room or CORRIDOR that a cell is in, PASSAGE in an opening, -1 in a wall.
    """
    surface: np.ndarray
    paint: np.ndarray


class Graph(NamedTuple):
    """The places of one building or of several, and where every action leads.

    Attributes:
        following: (N, A) int64, the place an action leads to: the same one for stop, and where the way is barred.
        distance: (G, N) int64, steps to the nearest goal of a kind.
        optimal: (G, N, A) bool, the set of optimal actions; at least one everywhere.
        situation: (N,) int64: IN_ROOM, IN_CORRIDOR or IN_PASSAGE.
        cell: (N, 3) int64: building, row and column of a place.
    """
    following: torch.Tensor
    distance: torch.Tensor
    optimal: torch.Tensor
    situation: torch.Tensor
    cell: torch.Tensor


# --- Plans ------------------------------------------------------------------------------------------------------------

def generate_plan(seed: int, size: int = 40) -> Plan:
    """A building of `size` x `size` cells; the same for the same arguments.

    Every place can be reached from every other, all goals are there, and for each of them there are places to start.

    Args:
        seed: Of everything random.
        size: H = W.

    Raises:
        InputError: `size` leaves no room for distances from 6 to 32 steps.
    """
    if size < 24:
        raise InputError(f'size={size}: a building in which ways of 32 steps are likely has 24 cells a side or more.')
    for attempt in itertools.count():
        random = np.random.default_rng((seed, attempt))
        plan = _build(size, random)
        graph = build_graph(plan)
        eligible = (graph.distance >= START_DISTANCES[0]) & (graph.distance <= START_DISTANCES[1])
        if graph.distance.max() < FAR and eligible.sum(dim=1).min() >= 30:
            return plan


def _build(size: int, random: np.random.Generator) -> Plan:
    surface = np.full((size, size), WALL)
    region = np.full((size, size), -1)
    parts = _divide((1, 1, size - 1, size - 1), random)
    paints = []
    for number, (top, left, bottom, right, is_corridor) in enumerate(parts):
        surface[top:bottom, left:right] = FLOOR
        region[top:bottom, left:right] = number
        south, east = (top + bottom) / 2 / size, (left + right) / 2 / size
        paints.append(CORRIDOR if is_corridor else _room_type(south, east, random))
    paint = np.where(region < 0, -1, np.asarray(paints)[region])
    _open(surface, paint, region, random)
    for (top, left, bottom, right, _), kind in zip(parts, paints):
        _furnish(surface, paint, (top, left, bottom, right), kind, random)
    return Plan(surface, paint)


def _divide(area: Tuple[int, int, int, int], random: np.random.Generator) -> list:
    """Rooms and corridors of an area (top, left, bottom, right), the ends not included; walls lie between them.

    Returns:
        (top, left, bottom, right, whether it is a corridor) of each.
    """
    top, left, bottom, right = area
    height, width = bottom - top, right - left
    across = height > width or (height == width and random.random() < .5)  # the cut runs from left to right
    span = max(height, width)
    if span <= MAX_ROOM:
        return [(*area, False)]
    corridor = int(random.integers(1, 3)) if span >= CORRIDOR_SPAN else 0
    strip = corridor + 2 if corridor else 1  # with its walls
    cut = int(random.integers(MIN_ROOM, span - strip - MIN_ROOM + 1))
    if across:
        first, second = (top, left, top + cut, right), (top + cut + strip, left, bottom, right)
        between = (top + cut + 1, left, top + cut + 1 + corridor, right, True)
    else:
        first, second = (top, left, bottom, left + cut), (top, left + cut + strip, bottom, right)
        between = (top, left + cut + 1, bottom, left + cut + 1 + corridor, True)
    return [*_divide(first, random), *_divide(second, random), *([between] if corridor else [])]


def _room_type(south: float, east: float, random: np.random.Generator) -> int:
    """BEDROOM, DINING, STUDY or HALL, by where the room is: from 0, the north and the west, to 1."""
    weights = np.exp(ORDER * np.array([.5 - south, south - .5, east - .5, .5 - east]))
    return int(random.choice(4, p=weights / weights.sum()))


def _open(surface: np.ndarray, paint: np.ndarray, region: np.ndarray, random: np.random.Generator) -> None:
    """Open walls between neighbouring regions, so that all are connected, with some ways round; doors in a few."""
    walls: dict = {}  # pair of regions -> cells of the wall between them
    for row, column in np.argwhere(surface == WALL):
        for sides in (((row - 1, column), (row + 1, column)), ((row, column - 1), (row, column + 1))):
            if all(0 <= r < len(surface) and 0 <= c < len(surface) and region[r, c] >= 0 for r, c in sides):
                pair = tuple(sorted(int(region[side]) for side in sides))
                walls.setdefault(pair, []).append((row, column))
    corridors = set(np.unique(region[paint == CORRIDOR]).tolist())
    group = list(range(region.max() + 1))  # regions of a group are connected
    pairs = [list(walls)[i] for i in random.permutation(len(walls))]
    for first, second in sorted(pairs, key=lambda pair: -len(corridors & set(pair))):  # corridors first
        kind = len(corridors & {first, second})
        connected = group[first] == group[second]
        if connected and random.random() >= (.15, .3, 1.)[kind]:
            continue
        group = [group[first] if g == group[second] else g for g in group]
        cells = walls[first, second]
        for cell in cells if kind == 2 else [cells[random.integers(len(cells))]]:
            paint[cell] = CORRIDOR if kind == 2 else PASSAGE
            surface[cell] = DOOR if kind == 1 and random.random() < DOOR_SHARE else FLOOR


def _furnish(surface: np.ndarray, paint: np.ndarray, area: tuple, kind: int, random: np.random.Generator) -> None:
    """Put a bed of two cells, a table with chairs, or a chair into a room, away from its openings."""
    top, left, bottom, right = area
    free = np.zeros(surface.shape, dtype=bool)
    for row, column in itertools.product(range(top, bottom), range(left, right)):
        around = (slice(row - 1, row + 2), slice(column - 1, column + 2))
        free[row, column] = not (paint[around] == PASSAGE).any()
    spots = np.argwhere(free)
    if not len(spots):
        return
    row, column = spots[random.integers(len(spots))]
    beside = [(row + down, column + right) for down, right in DIRECTIONS[::2]]
    beside = [cell for cell in (beside[i] for i in random.permutation(4)) if free[cell]]
    if kind == BEDROOM:
        cells = [(row, column), *beside[:1]]
        pieces = [BED] * len(cells)
    elif kind == DINING:
        cells = [(row, column), *beside[:1 + int(random.integers(2))]]
        pieces = [TABLE, CHAIR, CHAIR]
    else:
        cells, pieces = [(row, column)] * (kind == STUDY), [CHAIR]
    for cell, piece in zip(cells, pieces):
        surface[tuple(cell)] = piece


# --- The graph --------------------------------------------------------------------------------------------------------

def build_graph(plan: Plan, building: int = 0) -> Graph:
    """Places, where actions lead, distances and labels of one plan.

    Args:
        plan: Its border is wall.
        building: Number of it, for `Graph.cell`.

    Raises:
        InputError: The border of the plan is not all wall.
    """
    surface = plan.surface
    if (surface[[0, -1]] != WALL).any() or (surface[:, [0, -1]] != WALL).any():
        raise InputError('plan: the border of a plan must be wall.')
    walkable, cells = walkable_cells(plan)
    number = np.full(surface.shape, -1)
    number[walkable] = np.arange(len(cells))
    here, reached = np.arange(len(cells))[:, None], _neighbours(cells)
    free = walkable[reached] & _uncut(walkable, cells)
    following = np.concatenate([np.where(free, number[reached], here), here], axis=1)
    distance = np.stack([_distances(surface, walkable, cells, following, kind) for kind in (CHAIR, TABLE, BED, DOOR)])
    optimal = distance[:, following] == distance[:, :, None] - 1  # (G, N, A)
    optimal[distance <= 1] = np.arange(len(ACTIONS)) == STOP
    paint = plan.paint[walkable]
    situation = np.select([paint == CORRIDOR, paint == PASSAGE], [IN_CORRIDOR, IN_PASSAGE], IN_ROOM)
    cell = np.concatenate([np.full((len(cells), 1), building), cells], axis=1)
    return Graph(*map(torch.from_numpy, (following, distance, optimal, situation, cell)))


def walkable_cells(plan: Plan) -> Tuple[np.ndarray, np.ndarray]:
    """(H, W) bool, where one can walk, and (N, 2) rows and columns of it: the places, in the order of the graph."""
    walkable = (plan.surface == FLOOR) | (plan.surface == DOOR)
    return walkable, np.argwhere(walkable)


def _neighbours(cells: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Rows and columns, (N, 8) each, of the cells around (N, 2) cells, in the order of `DIRECTIONS`."""
    return tuple(np.moveaxis(cells[:, None] + np.asarray(DIRECTIONS), -1, 0))


def _uncut(walkable: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """(N, 8) bool: whether the two cells that a diagonal step passes between can be walked on; true for other steps."""
    row, column = cells.T[:, :, None]
    down, right = np.asarray(DIRECTIONS).T
    return (down * right == 0) | (walkable[row + down, column] & walkable[row, column + right])


def _distances(
        surface: np.ndarray,
        walkable: np.ndarray,
        cells: np.ndarray,
        following: np.ndarray,
        kind: int,
) -> np.ndarray:
    """(N,) steps to the nearest cell of a kind; breadth first, one ring of places after the other."""
    goal = surface == kind
    distance = np.full(len(cells), FAR)
    touches = goal[_neighbours(cells)] & _uncut(walkable, cells)
    distance[touches.any(axis=1)] = 1
    distance[goal[tuple(cells.T)]] = 0
    for ring in itertools.count():
        front = distance == ring
        if ring > 1 and not front.any():
            return distance
        distance[front[following].any(axis=1) & (distance > ring)] = ring + 1


def merge_graphs(graphs: Sequence[Graph]) -> Graph:
    """Several buildings as one graph, between which no step leads."""
    offsets = np.cumsum([0, *(len(graph.situation) for graph in graphs)])
    following = torch.cat([graph.following + int(offset) for graph, offset in zip(graphs, offsets)])
    distance, optimal = (torch.cat(parts, dim=1) for parts in zip(*((g.distance, g.optimal) for g in graphs)))
    situation, cell = (torch.cat(parts) for parts in zip(*((g.situation, g.cell) for g in graphs)))
    return Graph(following, distance, optimal, situation, cell)


# --- Episodes ---------------------------------------------------------------------------------------------------------

def sample_starts(graph: Graph, count: int = 1024, seed: int = 0) -> Tuple[torch.Tensor, torch.Tensor]:
    """Where episodes begin: pairs of a place and a goal 6 to 32 steps away, all such pairs being as likely.

    Returns:
        places, goals: (count,) int64 each.

    Raises:
        InputError: There is no such pair.
    """
    eligible = ((graph.distance >= START_DISTANCES[0]) & (graph.distance <= START_DISTANCES[1])).nonzero()
    if not len(eligible):
        raise InputError('graph: none of its places is 6 to 32 steps away from a goal.')
    chosen = torch.randint(len(eligible), (count,), generator=torch.Generator().manual_seed(seed))
    goals, places = eligible[chosen].unbind(dim=1)
    return places, goals


class Episodes(NamedTuple):
    """What came of B episodes.

    Attributes:
        success: (B,) bool.
        visited: (B, STEPS + 1) int64, the places from the start on; the last one again after the end.
    """
    success: torch.Tensor
    visited: torch.Tensor


def rollout(
        graph: Graph,
        policy: torch.Tensor,
        places: torch.Tensor,
        goals: torch.Tensor,
        seed: Optional[int] = 0,
        sharpness: float = 1.,
        steps: int = STEPS,
        radius: int = RADIUS,
) -> Episodes:
    """Walk from all starts at once. What the agent does follows from the place, the goal and its last direction.

    Args:
        graph: Where it walks.
        policy: (G, N, A) probabilities of the actions at every place for every goal.
        places, goals: (B,) starts.
        seed: Of the numbers by which actions are drawn, the same ones for every policy; None takes the most probable
            action, the first of several.
        sharpness: Actions are drawn in proportion to this power of their probabilities.
        steps: The limit, steps that go nowhere included.
        radius: Steps from the goal at which an episode succeeds; it ends there, or where the agent stops.
    """
    draws = None if seed is None else torch.rand(
        steps, len(places), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    onward = _onward()
    last = torch.full_like(places, STOP)  # no direction yet
    visited, ended = [places], graph.distance[goals, places] <= radius
    for step in range(steps):
        weights = policy[goals, places].double() ** sharpness
        kept = weights * onward[last]
        weights = torch.where(kept.sum(dim=1, keepdim=True) > 0, kept, weights)
        if draws is None:
            actions = weights.argmax(dim=1)
        else:
            cumulative = weights.cumsum(dim=1)
            actions = (cumulative <= draws[step, :, None] * cumulative[:, -1:]).sum(dim=1)
        ended = ended | (actions == STOP)
        following = torch.where(ended, places, graph.following[places, actions])
        last = torch.where(following != places, actions, STOP)
        places = following
        ended = ended | (graph.distance[goals, places] <= radius)
        visited.append(places)
    return Episodes(graph.distance[goals, places] <= radius, torch.stack(visited, dim=1))


def _onward() -> torch.Tensor:
    """(A, A) bool: whether an action may follow on a step in a direction; all may where the last action was no step."""
    direction = torch.arange(len(ACTIONS))
    turn = (direction - direction[:, None]) % 8
    onward = torch.minimum(turn, 8 - turn) <= 2
    onward[STOP] = onward[:, STOP] = True
    return onward
