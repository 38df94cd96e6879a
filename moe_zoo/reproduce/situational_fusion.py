"""Situational fusion's experiment: which representation an agent should trust in a corridor, and which in a room.

Situational Fusion of Visual Representation for Visual Navigation, Shen, Xu, Zhu, Guibas, Fei-Fei, Savarese, ICCV 2019,
https://arxiv.org/abs/1908.09073. The task is `moe_zoo.data.navigation`, the representations those of
`moe_zoo.data.navigation_views`.
Letters: N places, K representations, G = 4 goals, A = 9 actions, B places of a batch.
"""
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from moe_zoo.analysis.charts import grid_map, heat_map
from moe_zoo.analysis.page import Figure
from moe_zoo.data import navigation, navigation_views
from moe_zoo.data.navigation import ACTIONS, GOALS, IN_CORRIDOR, IN_PASSAGE, IN_ROOM, Graph
from moe_zoo.data.navigation_views import COLUMNS, ENCODERS, ROWS, VIEW_COLUMNS, VIEWS
from moe_zoo.errors import InputError
from moe_zoo.layers.situational_fusion import SituationalFusion, disturb_representations, linear_cka
from moe_zoo.losses import auxiliary_losses
from moe_zoo.routing import routing_context

from .experiment import Arm, Claim, Experiment
from .training import Data

NAMES = tuple(ENCODERS)
GEOMETRY, MEANING = ('depth', 'normals'), ('semantics', 'colour')  # 3-D tasks; tasks that tell what is where
BUILDINGS = (8, 6, 6)  # for training, validation and test
SIZE = 40  # cells along their sides
STEPS, BATCH, LR = 800, 256, 3e-3
SHARPNESS = 8.  # of the probabilities that actions are drawn by: close to the most probable one
NOISE = .5  # of noised representations, over the root mean square of their values


class World(NamedTuple):
    """Buildings as tensors: the fields of `Graph`, and what the agent sees.

    Attributes:
        pictures: (N, 3, R, W) uint8.
        representations: (N, K, D) float16, one row an encoder of `ENCODERS`.
        openness: (N,) mean free distance in the 8 directions.
        places, goals: (1024,) where episodes begin.
    """
    following: torch.Tensor
    distance: torch.Tensor
    optimal: torch.Tensor
    situation: torch.Tensor
    cell: torch.Tensor
    pictures: torch.Tensor
    representations: torch.Tensor
    openness: torch.Tensor
    places: torch.Tensor
    goals: torch.Tensor

    @property
    def graph(self) -> Graph:
        return Graph(*self[:len(Graph._fields)])


def load(folder: Optional[str], buildings: Sequence[int] = BUILDINGS, size: int = SIZE) -> Data:
    """Generated buildings; those of training, validation and test differ.

    Args:
        folder: None: the buildings are generated.
        buildings: How many of the three.
        size: Cells along their sides.

    Raises:
        InputError: A folder is given.
    """
    if folder is not None:
        raise InputError(f"--data-dir '{folder}': situational-fusion generates its buildings and reads no folder.")
    worlds = [_world(range(1000 * part, 1000 * part + count), size) for part, count in enumerate(buildings)]
    counts = ', '.join(
        f'{count} buildings ({len(world.situation):,} places) {kind}'
        for count, world, kind in zip(buildings, worlds, ('train', 'validation', 'test')))
    return Data(*worlds, len(ACTIONS), f'generated buildings of {size} x {size} cells: {counts}')


def _world(seeds: Sequence[int], size: int) -> World:
    plans = [navigation.generate_plan(seed, size) for seed in seeds]
    graph = navigation.merge_graphs([navigation.build_graph(plan, seed) for seed, plan in zip(seeds, plans)])
    pictures = [navigation_views.render(plan, seed) for plan, seed in zip(plans, seeds)]
    openness = torch.cat([navigation_views.openness(plan) for plan in plans])
    encoders = [encoder() for encoder in ENCODERS.values()]
    representations = [
        torch.stack([encoder(part.float() / 255).flatten(1) for encoder in encoders], dim=1).half()
        for part in pictures]
    starts = navigation.sample_starts(graph)
    return World(*graph, torch.cat(pictures), torch.cat(representations), openness, *starts)


# --- The agent --------------------------------------------------------------------------------------------------------

class ViewGate(nn.Module):
    """The gate's eye: one linear map and ReLU on each of the 8 views of the raw picture, side by side."""

    def __init__(self, channels: int = 16):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, (ROWS, VIEW_COLUMNS), stride=(ROWS, VIEW_COLUMNS))
        self.num_features = VIEWS * channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x)).flatten(1)

    def macs(self, input_shape: tuple) -> int:
        return input_shape[0] * VIEWS * self.conv.weight.numel()


class Agent(nn.Module):
    """A policy on all representations, or on one of them.

    Args:
        mode: Of `SituationalFusion`.
        only: Name of the representation of mode 'single'.
        affinity: (K, K) for the loss of that name.
        losses: Of the gate.
    """

    def __init__(self, mode: str, only: Optional[str] = None, affinity=None, losses=()):
        super().__init__()
        self.chosen = list(range(len(NAMES))) if only is None else [NAMES.index(only)]
        self.fusion = SituationalFusion(
            [4 * COLUMNS] * len(self.chosen), len(ACTIONS), mode, gate=ViewGate(), goal_dim=len(GOALS),
            head_dim=64, affinity=affinity if only is None else None, losses=losses)

    def forward(self, pictures: torch.Tensor, representations: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
        """(B, 3, R, W) uint8, (B, K, D), (B,). Returns (B, A) log-probabilities."""
        goal = F.one_hot(goals, len(GOALS)).float()
        pictures = pictures.float() / 127.5 - 1
        chosen = [representations[:, k].float() for k in self.chosen]
        return F.log_softmax(self.fusion(pictures, chosen, goal), dim=1)

    def candidates(self, representations: torch.Tensor, goals: torch.Tensor) -> torch.Tensor:
        """(B, K, A) log-probabilities of the heads one by one."""
        goal = F.one_hot(goals, len(GOALS)).float()
        return F.log_softmax(self.fusion.propose(list(representations.float().unbind(1)), goal), dim=2)


def imitation(log_probabilities: torch.Tensor, optimal: torch.Tensor) -> torch.Tensor:
    """Minus the logarithm of the probability of all optimal actions together, a mean over everything before them."""
    return -log_probabilities.masked_fill(~optimal, -torch.inf).logsumexp(dim=-1).mean()


def train_heads(world: World, seed: int) -> Agent:
    """An agent of mode 'mean' whose heads have learned each for itself: on heads as these, gates are trained."""
    agent = Agent('mean')

    def loss_of(pictures, representations, goals, optimal):
        heads = agent.candidates(representations, goals)
        return len(NAMES) * imitation(heads, optimal[:, None].expand_as(heads))  # the sum: no head hears of another

    _descend(agent, loss_of, world, seed)
    return agent


def train(agent: Agent, world: World, seed: int) -> None:
    """Imitate the shortest paths of all places and goals with Adam; what is frozen stays as it is.

    Args:
        agent: Left in evaluation mode.
        world: What it learns from.
        seed: Of the batches: two agents with one seed meet the same ones.
    """
    def loss_of(pictures, representations, goals, optimal):
        with routing_context() as context:
            loss = imitation(agent(pictures, representations, goals), optimal)
        return loss + sum(auxiliary_losses(context.routings).values())

    _descend(agent, loss_of, world, seed)


def _descend(agent: Agent, loss_of: Callable, world: World, seed: int) -> None:
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    random = torch.Generator().manual_seed(seed)
    agent.train()
    for _ in range(STEPS):
        places = torch.randint(len(world.situation), (BATCH,), generator=random)
        goals = torch.randint(len(GOALS), (BATCH,), generator=random)
        loss = loss_of(
            world.pictures[places], world.representations[places], goals, world.optimal[goals, places])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    agent.eval()


@torch.no_grad()
def policy(agent: Agent, world: World, batch_size: int = 4096) -> torch.Tensor:
    """(G, N, A) probabilities at every place for every goal."""
    rows = []
    for goal in range(len(GOALS)):
        rows.append(torch.cat([
            agent(pictures, representations, torch.full((len(pictures),), goal)).exp()
            for pictures, representations in zip(
                world.pictures.split(batch_size), world.representations.split(batch_size))]))
    return torch.stack(rows)


def success(probabilities: torch.Tensor, world: World) -> float:
    """Percent of the 1,024 episodes of a world that succeed."""
    episodes = navigation.rollout(world.graph, probabilities, world.places, world.goals, sharpness=SHARPNESS)
    return 100 * episodes.success.double().mean().item()


# --- A run ------------------------------------------------------------------------------------------------------------

def run_agents(options: list[dict[str, Any]], seed: int, data: Data) -> list[dict[str, Any]]:
    """Train the agents of one seed, let them loose, and take their representations away.

    Args:
        options: Of every agent `mode` of `SituationalFusion`, or 'random'; `only`: the representation of 'single';
            `end_to_end`: whether the heads of 'action' learn with the gate; `losses`: of the gate. The heads of
            'single', 'mean' and 'action' without `end_to_end` are the same ones, trained each for itself.

    Returns:
        success, success_seen: Percent of the episodes in buildings that it has not and that it has trained on.
        optimal: Percent of the probability that is on optimal actions, in unseen buildings.
        dropped, noised: Success in unseen buildings where a representation is zeroed, a mean over them, and where all
            of them have noise; hurt_dropped, hurt_noised: what that costs. For agents that have several.
        Of agents that have several, see `look_at_gate`.
        episode: One episode to draw.
    """
    torch.manual_seed(seed)
    heads = train_heads(data.train, seed).fusion.heads.requires_grad_(False)
    affinity = measure(data.train)
    found = []
    for each in options:
        if each['mode'] == 'random':
            even = [torch.ones(len(GOALS), len(world.situation), len(ACTIONS)) for world in (data.test, data.train)]
            found.append({'success': success(even[0], data.test), 'success_seen': success(even[1], data.train)})
            continue
        torch.manual_seed(seed)
        agent = Agent(each['mode'], each.get('only'), affinity, each.get('losses', ()))
        if each['mode'] in ('single', 'mean', 'action') and not each.get('end_to_end'):
            agent.fusion.heads = nn.ModuleList(heads[k] for k in agent.chosen)
        if each['mode'] in ('single', 'mean'):
            agent.eval()
        else:
            train(agent, data.train, seed)
        found.append(assess(agent, data))
    return found


def assess(agent: Agent, data: Data) -> dict[str, Any]:
    """What an agent can do, see `run_agents`."""
    probabilities = policy(agent, data.test)
    found = {
        'success': success(probabilities, data.test),
        'success_seen': success(policy(agent, data.train), data.train),
        'optimal': 100 * (probabilities * data.test.optimal).sum(dim=2).mean().item(),
    }
    if len(agent.chosen) > 1:
        found |= disturbed(agent, data.test, found['success'])
        found |= look_at_gate(agent, data.test)
    return {**found, 'episode': example(agent, probabilities, data.test)}


def measure(world: World) -> torch.Tensor:
    """(K, K) affinity of the representations, by linear CKA on 500 places."""
    some = torch.randperm(len(world.situation), generator=torch.Generator().manual_seed(0))[:500]
    values = world.representations[some].float()
    affinity = torch.zeros(len(NAMES), len(NAMES))
    for i in range(len(NAMES)):
        for j in range(i):
            affinity[i, j] = affinity[j, i] = linear_cka(values[:, i], values[:, j])
    return affinity


def disturbed(agent: Agent, world: World, undisturbed: float) -> dict[str, float]:
    """Success without each of the representations, and with noise on all; see `run_agents`."""
    def left(chosen: list[int], noise: Optional[float] = None) -> float:
        with disturb_representations(agent, chosen, noise=noise, generator=torch.Generator().manual_seed(0)):
            return success(policy(agent, world), world)

    every = range(len(NAMES))
    dropped, noised = sum(left([k]) for k in every) / len(NAMES), left(list(every), NOISE)
    return {'dropped': dropped, 'hurt_dropped': undisturbed - dropped,
            'noised': noised, 'hurt_noised': undisturbed - noised}


@torch.no_grad()
def weigh(agent: Agent, world: World) -> torch.Tensor:
    """(N, K) weights of the gate, which does not know the goal."""
    pictures = world.pictures.float() / 127.5 - 1
    return agent.fusion.weigh(pictures)


def look_at_gate(agent: Agent, world: World) -> dict[str, Any]:
    """What is weighed where, in unseen buildings; agents without a gate have even weights.

    Returns:
        geometry_shift: How much more weight depth and normals have in corridors than in rooms, in points.
        meaning_shift: How much more weight semantics and colour have in rooms than in corridors, in points.
        openness: Correlation of openness and the weight of semantics and colour, over places; 0 for even weights.
        representations: exp of the entropy of the weights of a place, a mean: how many representations share them.
        redundancy: w^T A w of the measured affinity, in percent.
        weights: situation -> K mean weights.
    """
    weights = weigh(agent, world).double()
    rows = {name: weights[world.situation == code].mean(dim=0)
            for name, code in (('rooms', IN_ROOM), ('corridors', IN_CORRIDOR), ('passages', IN_PASSAGE))}
    change = 100 * (rows['corridors'] - rows['rooms'])
    geometry, meaning = ([NAMES.index(name) for name in names] for names in (GEOMETRY, MEANING))
    share = weights[:, meaning].sum(dim=1)
    both = torch.corrcoef(torch.stack([share, world.openness])) if share.std() > 1e-6 else torch.zeros(2, 2)
    entropy = -torch.xlogy(weights, weights).sum(dim=1)
    shared = torch.einsum('ni,ij,nj->n', weights, measure(world).double(), weights)
    return {
        'geometry_shift': change[geometry].sum().item(),
        'meaning_shift': -change[meaning].sum().item(),
        'openness': both[0, 1].item(),
        'representations': entropy.exp().mean().item(),
        'redundancy': 100 * shared.mean().item(),
        'weights': {name: row.tolist() for name, row in rows.items()},
    }


def example(agent: Agent, probabilities: torch.Tensor, world: World) -> dict[str, Any]:
    """The first episode that began 15 or more steps away and succeeded, or else the first: building, goal, way.

    The way is [row, column, representation with the largest weight] of every place.
    """
    episodes = navigation.rollout(world.graph, probabilities, world.places, world.goals, sharpness=SHARPNESS)
    good = episodes.success & (world.distance[world.goals, world.places] >= 15)
    first = int(good.int().argmax())
    goal, way = int(world.goals[first]), episodes.visited[first].unique_consecutive()
    leading = weigh(agent, world)[way].argmax(dim=1)
    cells = world.cell[way]
    return {
        'building': int(cells[0, 0]), 'goal': GOALS[goal],
        'way': torch.cat([cells[:, 1:], leading[:, None]], dim=1).tolist()}


# --- Figures ----------------------------------------------------------------------------------------------------------

def floor_map(plan: navigation.Plan, way: Sequence[Sequence[int]]) -> str:
    """The plan and a way on it: walls dark, corridors light, first letters for furniture and doors."""
    fills = np.full(plan.surface.shape, '', dtype=object)
    fills[plan.paint == navigation.CORRIDOR] = 'var(--line)'
    fills[plan.surface == navigation.WALL] = 'var(--soft)'
    marks = [(int(row), int(column), GOALS[plan.surface[row, column] - navigation.CHAIR][0])
             for row, column in np.argwhere(plan.surface >= navigation.CHAIR)]
    return grid_map(fills.tolist(), marks, way, NAMES)


def figures(results: dict[str, Any]) -> list[Figure]:
    """A way through an unseen building; the weights of rooms and corridors; success seen, unseen and disturbed."""
    runs = [run['metrics'] for run in results['runs'] if run['arm'] == 'action']
    episode = runs[0]['episode']
    goal, way = episode['goal'], episode['way']
    leading = ', '.join(dict.fromkeys(NAMES[k] for *_, k in way))
    blocks = [Figure(
        floor_map(navigation.generate_plan(episode['building'], SIZE), way),
        f'Plan of a building with the way of the agent of action fusion to the nearest {goal}, {len(way) - 1} steps. '
        f'The most weight on the way has {leading}.',
        f'A building that the agent has never seen: its way from the ring to the nearest {goal} (letters: chair, '
        'table, bed, door), coloured by the representation that has the most weight. The first episode of 15 '
        f'steps or more that succeeded, seed {results["plan"]["seeds"][0]}.')]
    situations = list(runs[0]['weights'])
    shares = [[100 * sum(run['weights'][name][k] for run in runs) / len(runs) for name in situations]
              for k in range(len(NAMES))]
    blocks.append(Figure(
        heat_map(NAMES, situations, shares), 'Mean weight of every representation in rooms, corridors and passages',
        'Mean weights of action fusion in unseen buildings, percent.'))
    columns = {'success_seen': 'seen', 'success': 'unseen', 'dropped': 'dropped', 'noised': 'noised'}
    arms = [arm for arm in results['arms'] if 'dropped' in arm['metrics']]
    values = [[arm['metrics'][name]['mean'] for name in columns] for arm in arms]
    blocks.append(Figure(
        heat_map([arm['name'] for arm in arms], list(columns.values()), values, value_format='{:.1f}'),
        'Success of every agent with several representations in seen and unseen buildings, and in unseen ones with one '
        'representation dropped or all noised',
        'Percent of the episodes that succeed; one representation dropped, or all noised, in unseen buildings.'))
    return blocks


# --- The experiment ---------------------------------------------------------------------------------------------------

UNREAD = "the paper's table could not be read; the order of the agents is that of a digest of its slides"
LOSSES = [['affinity', .3], ['gate_entropy', .3]]


def _above(better: str, worse: str, text: str, deviation: float, metric='success', **kwargs) -> Claim:
    return Claim(text, metric, better, worse, deviation, **kwargs)


EXPERIMENT = Experiment(
    name='situational-fusion',
    title='Situational fusion: which representation to trust where',
    paper='[Situational Fusion, Shen et al., ICCV 2019](https://arxiv.org/abs/1908.09073)',
    question='An agent is to go to the nearest chair, table, bed or door of a building that it has never seen, '
             f'in place of the Gibson buildings of the paper: generated plans of {SIZE} x {SIZE} cells, rooms of '
             'four types along corridors, 8 directions and stop, starts 6 to 32 steps away, success within 3 '
             'steps of the goal after at most 39 steps. It imitates shortest paths from what it sees at a place,'
             f' a panorama of 8 views; it does not turn back, and draws its actions by the {SHARPNESS:.0f}th '
             'power of their probabilities. Six fixed functions of the panorama stand for the 25 encoders of '
             'Taskonomy; each has a policy of its own, an agent of one representation, and `action` mixes their '
             'probabilities by a gate on the raw panorama that is trained on these policies; `mean` mixes them '
             'evenly. `feature` scales the representations by the gate and has one policy, `concat` has no gate.'
             ' `+ affinity` penalises w^T A w, A being the linear CKA of the representations, by 0.3, and, as '
             'that alone can be had by trusting one representation, the gap of the entropy of the weights from '
             "its largest value, by 0.3, which is alone in `+ entropy`: both forms are this project's. `end to end` "
             f'trains policies and gate at once. {STEPS} iterations of Adam on batches of {BATCH} in place of '
             '16,000; `action` has as many again for its gate. Twice as many did not help the others (two seeds on '
             'validation buildings: `concat` 34.4 and 33.8 %, `feature` 37.0 and 36.8 %, `end to end + affinity` '
             '45.9 and 42.1 %). Settings (the buildings and their number, iterations, power, weights of the losses) '
             'were searched on validation buildings with one seed. `hurt_dropped` is the success lost where a '
             f'representation is zeroed, a mean over the six, `hurt_noised` where all have noise of {NOISE} times '
             'their size; '
             '`geometry_shift` is how much more weight depth and normals have in corridors than in rooms, '
             '`meaning_shift` semantics and colour in rooms than in corridors; `openness` the correlation of the '
             'latter with the mean free distance; `representations` how many share the weight of a place; '
             '`redundancy` w^T A w in percent.',
    arms=(
        Arm('random', {'mode': 'random'}),
        *(Arm(name, {'mode': 'single', 'only': name}) for name in NAMES),
        Arm('mean', {'mode': 'mean'}),
        Arm('concat', {'mode': 'concat'}),
        Arm('feature', {'mode': 'feature'}),
        Arm('action', {'mode': 'action'}),
        Arm('action + affinity', {'mode': 'action', 'losses': LOSSES}),
        Arm('action + entropy', {'mode': 'action', 'losses': LOSSES[1:]}),
        Arm('end to end', {'mode': 'action', 'end_to_end': True}),
        Arm('end to end + affinity', {'mode': 'action', 'end_to_end': True, 'losses': LOSSES}),
    ),
    claims=(
        _above('action + affinity', 'concat', 'Action fusion with affinity regularisation, the method of the paper, '
               'reaches more goals in unseen buildings than one policy on all representations.', 1.6, source=UNREAD),
        _above('action + affinity', 'depth', 'It reaches more than depth, the best agent of one representation on the '
               'validation buildings.', 2.1),
        _above('action + affinity', 'feature', 'It reaches more than feature fusion.', 1.8),
        _above('action + affinity', 'mean', 'What the gate learns helps: it reaches more than the even mean of the '
               'same policies.', 1.),
        _above('action', 'concat', 'Without regularisation, too, action fusion is better than one policy on all '
               'representations.', 1.8),
        _above('action + affinity', 'action', 'The regularisation helps action fusion.', 1.),
        _above('action + affinity', 'action + entropy', 'Of the two losses, that of affinity helps beside that of '
               'entropy.', 0.3),
        _above('end to end + affinity', 'end to end', 'The regularisation helps where policies and gate are trained at '
               'once.', 2.1),
        _above('feature', 'action + affinity', 'Losing a representation hurts action fusion less than feature fusion.',
               0.7, 'hurt_dropped'),
        _above('feature', 'action + affinity', 'Noise on the representations hurts action fusion less than feature '
               'fusion.', 2.4, 'hurt_noised'),
        _above('action', 'mean', 'The gate gives geometry more weight in corridors than in rooms.', 3.8,
               'geometry_shift'),
        _above('action', 'mean', 'It gives meaning more weight in rooms than in corridors.', 1., 'meaning_shift'),
        _above('action', 'mean', 'The more open a place, the more weight meaning has.', .02, 'openness',
               unit='correlation'),
    ),
    run=run_agents,
    load=load,
    seeds=8,
    charts=figures,
    together=True,
)

EXPERIMENTS = (EXPERIMENT,)
