"""The navigation task: distances and labels by hand, the limits of an episode, what is seen and what is made of it."""
import numpy as np
import pytest
import torch

from moe_zoo.data import navigation as nav
from moe_zoo.data import navigation_views as views
from moe_zoo.data.navigation import ACTIONS, FAR, GOALS, STOP
from moe_zoo.errors import InputError

CODES = dict(zip('.#ctbd', (nav.FLOOR, nav.WALL, nav.CHAIR, nav.TABLE, nav.BED, nav.DOOR)))
CHAIR, TABLE, BED, DOOR = range(4)  # goals


def plan_of(*rows):
    """A plan from text: all of it a hall, doors in passages."""
    surface = np.array([[CODES[c] for c in row] for row in rows])
    paint = np.select([surface == nav.WALL, surface == nav.DOOR], [-1, nav.PASSAGE], nav.HALL)
    return nav.Plan(surface, paint)


def names(actions):
    return {name for name, optimal in zip(ACTIONS, actions.tolist()) if optimal}


# A wall comes down from the north between the chair and the west; places are numbered row by row:
#   0 . 1      1 above it is the chair, no place
#   2 . 3      3
#   4 5 6
CORNER = plan_of(
    '#####',
    '#.#c#',
    '#.#.#',
    '#...#',
    '#####')


def test_distances_and_labels_by_hand():
    graph = nav.build_graph(CORNER)
    assert graph.cell.tolist() == [[0, 1, 1], [0, 2, 1], [0, 2, 3], [0, 3, 1], [0, 3, 2], [0, 3, 3]]
    # No diagonal past the end of the wall at (2, 2): from (1, 1) down twice, right twice, up once, and up onto the
    # chair. (2, 1) -> (3, 2) would cut the corner, so it is two steps.
    assert graph.distance[CHAIR].tolist() == [6, 5, 1, 4, 3, 2]
    assert [names(row) for row in graph.optimal[CHAIR]] == [{'S'}, {'S'}, {'stop'}, {'E'}, {'E'}, {'N'}]
    assert (graph.distance[TABLE] == FAR).all()


def test_where_steps_lead():
    graph = nav.build_graph(CORNER)
    #                                    N  NE E  SE S  SW W  NW stop
    assert graph.following[1].tolist() == [0, 1, 1, 1, 3, 1, 1, 1, 1]  # SE, to place 4, would cut the corner
    assert graph.following[2].tolist() == [2, 2, 2, 2, 5, 2, 2, 2, 2]  # N is the chair, SW cuts the other corner
    assert graph.following[4].tolist() == [4, 4, 5, 4, 4, 4, 3, 4, 4]


def test_in_the_open_diagonals_count_one_and_all_shortest_ways_are_labels():
    graph = nav.build_graph(plan_of(
        '######',
        '#....#',
        '#....#',
        '#...t#',
        '######'))
    # Steps of the king in chess, but none past the table's corner: (2, 3) -> the table is SE past (3, 3) and (2, 4),
    # both free.
    assert graph.distance[TABLE].reshape(-1)[:8].tolist() == [3, 2, 2, 2, 3, 2, 1, 1]
    assert names(graph.optimal[TABLE, 0]) == {'SE', 'E'}  # (1, 1), over (2, 2) or (1, 2), both at 2
    assert names(graph.optimal[TABLE, 1]) == {'SE'}


def test_doors_are_walked_through_and_are_places():
    graph = nav.build_graph(plan_of(
        '#######',
        '#..d..#',
        '#######'))
    assert graph.distance[DOOR].tolist() == [2, 1, 0, 1, 2]
    assert [names(row) for row in graph.optimal[DOOR]] == [{'E'}, {'stop'}, {'stop'}, {'stop'}, {'W'}]
    assert graph.following[1, ACTIONS.index('E')] == 2 and graph.following[2, ACTIONS.index('E')] == 3
    assert graph.situation.tolist() == [nav.IN_ROOM] * 2 + [nav.IN_PASSAGE] + [nav.IN_ROOM] * 2


def test_a_plan_that_is_open_at_its_border_is_refused():
    with pytest.raises(InputError, match='plan: the border of a plan must be wall.'):
        nav.build_graph(plan_of('###', '#..', '###'))
    with pytest.raises(InputError, match='size=20: a building in which ways of 32 steps are likely has 24 cells'):
        nav.generate_plan(0, 20)


# --- Episodes ---------------------------------------------------------------------------------------------------------

LONG = nav.build_graph(plan_of(
    '#' * 50,
    '#' + '.' * 47 + 'b' + '#',
    '#' * 50))  # place i is 47 - i steps from the bed


def always(graph, name):
    return torch.eye(9)[ACTIONS.index(name)].expand(len(GOALS), len(graph.situation), 9)


@pytest.mark.parametrize('place, success', [
    (5, True),  # 42 steps away: the 39th ends 3 steps from the goal
    (4, False),  # 43
    (44, True),  # is there already
])
def test_39_steps_and_3_steps(place, success):
    episodes = nav.rollout(LONG, always(LONG, 'E'), torch.tensor([place]), torch.tensor([BED]))
    assert episodes.success.tolist() == [success] and episodes.visited.shape == (1, 40)
    assert LONG.distance[BED, episodes.visited[0, -1]] == (3 if success else 4)


@pytest.mark.parametrize('name, last, success', [('stop', 41, False), ('W', 2, False), ('N', 41, False)])
def test_stopping_early_ends_it_and_bumping_costs_steps(name, last, success):
    episodes = nav.rollout(LONG, always(LONG, name), torch.tensor([41]), torch.tensor([BED]))
    assert episodes.success.tolist() == [success] and episodes.visited[0, -1] == last


def test_success_counts_from_where_it_is_reached():
    policy = always(LONG, 'E').clone()
    policy[:, 44] = torch.eye(9)[ACTIONS.index('W')]  # it would walk away again
    episodes = nav.rollout(LONG, policy, torch.tensor([41]), torch.tensor([BED]))
    assert episodes.success.all() and episodes.visited[0, :5].tolist() == [41, 42, 43, 44, 44]


def test_the_agent_does_not_turn_back_unless_barred():
    west_or_east = torch.zeros(4, 47, 9)
    west_or_east[..., ACTIONS.index('E')], west_or_east[..., ACTIONS.index('W')] = .4, .6
    west_or_east[:, 20] = torch.eye(9)[ACTIONS.index('E')]
    episodes = nav.rollout(LONG, west_or_east, torch.tensor([20]), torch.tensor([BED]), seed=None)
    assert episodes.visited[0, :25].tolist() == list(range(20, 45)) and episodes.success.all()
    # Westwards to the wall, where the way is barred.
    west_or_east[:, 0] = torch.tensor([0, 0, .4, 0, 0, 0, .6, 0, 0])
    west_or_east[:, 1:21] = west_or_east[:, 21:22]
    episodes = nav.rollout(LONG, west_or_east, torch.tensor([2]), torch.tensor([BED]), seed=None)
    assert episodes.visited[0, :5].tolist() == [2, 1, 0, 0, 0]  # barred again and again: W is the most probable there
    west_or_east[:, 0] = torch.eye(9)[ACTIONS.index('E')]
    episodes = nav.rollout(LONG, west_or_east, torch.tensor([2]), torch.tensor([BED]), seed=None)
    assert episodes.visited[0, :5].tolist() == [2, 1, 0, 1, 2]  # nothing else has probability: it turns


def plain_rollout(graph, policy, place, goal, draws, sharpness):
    """One episode, step by step."""
    visited, last = [place], None
    for draw in draws:
        if graph.distance[goal, place] <= 3:
            break
        weights = [w ** sharpness for w in policy[goal, place].double().tolist()]
        if last is not None:
            kept = [w if a == STOP or min((a - last) % 8, (last - a) % 8) <= 2 else 0. for a, w in enumerate(weights)]
            weights = kept if sum(kept) > 0 else weights
        level, total = draw * sum(weights), 0.
        action = -1
        while total <= level:
            action += 1
            total += weights[action]
        if action == STOP:
            break
        following = graph.following[place, action].item()
        last = action if following != place else None
        place = following
        visited.append(place)
    return bool(graph.distance[goal, place] <= 3), visited


@pytest.fixture(scope='module')
def buildings():
    plans = [nav.generate_plan(seed, size=28) for seed in (0, 1)]
    return plans, nav.merge_graphs([nav.build_graph(plan, i) for i, plan in enumerate(plans)])


def test_rollouts_at_once_are_rollouts_one_by_one(buildings):
    graph = buildings[1]
    places, goals = nav.sample_starts(graph, 40, seed=3)
    random = torch.rand(4, len(graph.situation), 9, generator=torch.Generator().manual_seed(0))
    policy = (random + 2 * graph.optimal).softmax(dim=2)
    draws = torch.rand(39, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    episodes = nav.rollout(graph, policy, places, goals, seed=7, sharpness=2.)
    plain = [plain_rollout(graph, policy, p, g, draws[:, i].tolist(), 2.) for i, (p, g) in enumerate(
        zip(places.tolist(), goals.tolist()))]
    assert episodes.success.tolist() == [success for success, _ in plain] and 0 < episodes.success.sum() < 40
    for row, (_, visited) in zip(episodes.visited.tolist(), plain):
        assert row == visited + visited[-1:] * (40 - len(visited))


# --- Generated buildings ----------------------------------------------------------------------------------------------

def test_starts_are_6_to_32_steps_away_and_labels_lead_there(buildings):
    graph = buildings[1]
    places, goals = nav.sample_starts(graph)
    distance = graph.distance[goals, places]
    assert len(places) == 1024 and distance.min() == 6 and 24 < distance.max() <= 32
    assert sorted(goals.unique().tolist()) == [0, 1, 2, 3]
    assert graph.optimal.any(dim=2).all()
    optimal = graph.optimal / graph.optimal.sum(dim=2, keepdim=True)
    for seed in (0, None):
        episodes = nav.rollout(graph, optimal, places, goals, seed=seed)
        assert episodes.success.all()
        # No step is lost: it arrives 3 steps from the goal after as many as lay between.
        assert torch.equal(graph.distance[goals, episodes.visited.gather(1, (distance - 3)[:, None])[:, 0]],
                           torch.full((1024,), 3))
    even = torch.full((4, len(graph.situation), 9), 1 / 9)
    assert nav.rollout(graph, even, places, goals).success.float().mean() < .1
    with pytest.raises(InputError, match='graph: none of its places is 6 to 32 steps away from a goal.'):
        nav.sample_starts(nav.build_graph(plan_of('####', '#.c#', '####')))


def test_buildings_follow_from_their_seed(buildings):
    plans, graph = buildings
    again = nav.generate_plan(0, size=28)
    assert np.array_equal(again.surface, plans[0].surface) and np.array_equal(again.paint, plans[0].paint)
    assert not np.array_equal(plans[0].surface, plans[1].surface)
    assert (graph.following[graph.cell[:, 0] == 0] < (graph.cell[:, 0] == 0).sum()).all()  # no way between buildings
    assert torch.equal(graph.distance, torch.cat([nav.build_graph(plan).distance for plan in plans], dim=1))


def test_passages_are_narrow_rooms_are_wide_and_furniture_stands_in_rooms(buildings):
    plans, graph = buildings
    for building, plan in enumerate(plans):
        free = plan.surface != nav.WALL
        labels = dict(zip(map(tuple, graph.cell[graph.cell[:, 0] == building, 1:].tolist()),
                          graph.situation[graph.cell[:, 0] == building].tolist()))
        assert set(labels.values()) == {nav.IN_ROOM, nav.IN_CORRIDOR, nav.IN_PASSAGE}
        for (row, column), label in labels.items():
            sides = [bool(free[row + down, column + right]) for down, right in nav.DIRECTIONS[::2]]
            if label == nav.IN_PASSAGE:  # between two walls
                assert sides in ([True, False, True, False], [False, True, False, True])
            if label == nav.IN_ROOM:  # 4 cells along a side or more
                near = free[max(row - 3, 0):row + 4, column], free[row, max(column - 3, 0):column + 4]
                assert max(map(sum, near)) >= 4
        furniture = (plan.surface >= nav.CHAIR) & (plan.surface <= nav.BED)
        assert (plan.paint[furniture] < nav.CORRIDOR).all()
        assert (plan.paint[plan.surface == nav.DOOR] == nav.PASSAGE).all()


def test_rooms_of_a_type_are_at_their_end_of_the_building():
    plans = [nav.generate_plan(seed) for seed in range(6)]
    rows, columns = ({kind: np.concatenate([np.nonzero(plan.paint == kind)[axis] for plan in plans])
                      for kind in (nav.BEDROOM, nav.DINING, nav.STUDY, nav.HALL)} for axis in (0, 1))
    assert rows[nav.BEDROOM].mean() < 15 and rows[nav.DINING].mean() > 25
    assert columns[nav.HALL].mean() < 15 and columns[nav.STUDY].mean() > 25


# --- What is seen -----------------------------------------------------------------------------------------------------

ROOM = plan_of(
    '#######',
    '#.....#',
    '#.....#',
    '#....b#',
    '#.....#',
    '##.####',
    '#######')


def test_rays_by_hand():
    cells = np.array([[3, 3]])
    hits = views.cast_rays(ROOM, cells, np.radians([0, 90, 180, 270, 45]))
    # From the middle of (3, 3): north to the wall at row 0 two and a half cells, east to the bed at column 5 one and a
    # half, south to row 5 and west to column 0. North-east to the corner: 2.5 up and 2.5 right.
    assert hits.distance[0].tolist() == pytest.approx([2.5, 1.5, 1.5, 2.5, 2.5 * 2 ** .5])
    assert hits.face[0, :4].tolist() == [2, 3, 0, 1]  # the face looks back: south, west, north, east
    bed = views.PALETTE.shape[0] - 4 + BED
    assert hits.colour[0].tolist() == [nav.HALL, bed, nav.HALL, nav.HALL, nav.HALL]
    assert hits.along[0, :4].tolist() == pytest.approx([.5] * 4)
    _, cells = nav.walkable_cells(ROOM)
    place = cells.tolist().index([3, 3])
    # Diagonals: NE 3.5355, SE past the bed's corner to (4.5 + .5, ...): 1.5 down and right, SW the same, NW 3.5355.
    rows = views.cast_rays(ROOM, np.array([[3, 3]]), np.radians([135, 225, 315])).distance[0]
    expected = (2.5 + 1.5 + 1.5 + 2.5 + 2.5 * 2 ** .5 + rows.sum()) / 8
    assert views.openness(ROOM)[place].item() == pytest.approx(expected, rel=1e-6)


def test_encoders_read_the_picture():
    pictures = views.render(ROOM, noise=0.)
    _, cells = nav.walkable_cells(ROOM)
    place = cells.tolist().index([3, 3])
    assert pictures.shape == (len(cells), 3, views.ROWS, views.COLUMNS) and pictures.dtype == torch.uint8
    x = pictures.float() / 255
    found = {name: encoder()(x) for name, encoder in views.ENCODERS.items()}
    assert all(each.shape == (len(cells), 4, views.COLUMNS) for each in found.values())
    angles = 2 * np.pi * (np.arange(views.COLUMNS) - 3.5) / views.COLUMNS
    hits = views.cast_rays(ROOM, cells, angles)
    nearness = (found['depth'][:, 0] + 1) / 2
    assert (nearness - torch.from_numpy(1 / hits.distance).clamp(1 / 8, 1)).abs().mean() < .02
    bed = hits.colour == views.PALETTE.shape[0] - 4 + BED
    assert bed[place].sum() >= 4 and np.array_equal(found['semantics'][:, BED].numpy() > 0, bed)
    assert found['semantics'].sum(dim=(0, 2))[[CHAIR, TABLE, DOOR]].tolist() == [0, 0, 0]
    assert (found['normals'].argmax(dim=1).numpy() == hits.face).mean() > .9
    east = slice(16, 24)  # columns of the view to the east, where the bed is, which is blue
    assert found['colour'][place, 2, east].unique().numel() == 1
    assert found['colour'][place, 2, 16] > found['colour'][place, 0, 16]


def test_noise_follows_from_the_seed():
    assert torch.equal(views.render(ROOM, 1), views.render(ROOM, 1))
    assert not torch.equal(views.render(ROOM, 1), views.render(ROOM, 2))


def test_a_wall_has_the_colour_of_the_side_that_is_seen():
    plan = plan_of('#####', '#.#.#', '#####')
    plan.paint[1, 1], plan.paint[1, 3] = nav.BEDROOM, nav.CORRIDOR
    hits = views.cast_rays(plan, np.array([[1, 1], [1, 3]]), np.radians([90, 270]))
    assert hits.colour.tolist() == [[nav.BEDROOM] * 2, [nav.CORRIDOR] * 2]
