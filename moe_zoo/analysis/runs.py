"""Finished runs as plain numbers: what the folders of `train-imagenet` and `train-coco` say, without building a model.

A folder is one training. Trainings that differ in nothing but their seed are one `Run`. A dense run whose recipe
differs from that of a routed one in the network alone is its twin. What a folder cannot tell (MACs executed, time, who
did the work at the end) is measured by `moe-zoo report` and joins a run as `measured`.

Letters: E experts.
"""
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

from ..cards import card
from ..errors import InputError, counted
from .run_folders import MARKS, Training, Unusable, read_training
from .timing import Ratio, ratio

KINDS = {  # what a run learned -> (metric of the page, its name with the unit)
    'classification': ('top1', 'top-1 accuracy, %'),
    'detection': ('AP', 'AP of boxes, %'),
}
SEEDLESS = frozenset(  # options that say where, how fast and how often a run was done, not what it learned
    'seed experiment output resume start_epoch no_resume_opt checkpoint_hist recovery_interval log_interval '
    'val_interval save_epochs workers device device_modules local_rank pin_mem no_prefetcher worker_seeding '
    'torchcompile torchcompile_mode data data_dir'.split())
NETWORK = frozenset({'model', 'model_kwargs', 'freeze_gates', 'num_classes', 'initial_checkpoint'})
# The same of a detector's config, by dotted prefix.
SEEDLESS_KEYS = (
    'SEED', 'OUTPUT_DIR', 'VERSION', 'VIS_PERIOD', 'MOE.DATA.ROOT', 'MOE.DATA.TRAIN_', 'MOE.DATA.TEST_',
    'MOE.DATA.STRICT', 'DATALOADER.NUM_WORKERS', 'SOLVER.CHECKPOINT_PERIOD', 'TEST.EVAL_PERIOD', 'MODEL.DEVICE',
    'CUDNN')
NETWORK_KEYS = (
    'MOE.RESNET', 'MOE.HEAD', 'MOE.TIMM', 'MOE.FIND_UNUSED', 'MODEL.BACKBONE', 'MODEL.META_ARCHITECTURE',
    'MODEL.WEIGHTS')


@dataclass(frozen=True)
class LayerUse:
    """What the experts of a routed layer did with the evaluation images; see `moe_zoo.analysis.usage.LayerUsage`.

    Attributes:
        layer: Module name.
        share: (E,) share of the choices, which sum to one (of the weight, where every expert is mixed).
        importance: (E,) share of the combine weight.
        evenness: Entropy of `share` over ln E; 1 where all experts are used alike.
        dropped: Share of what found no room at its expert.
        dead: Numbers of the experts that carry next to nothing.
        channels: Whether its experts are channels that a gate switches off, which is then the aim.
    """
    layer: str
    share: tuple[float, ...]
    importance: tuple[float, ...]
    evenness: float
    dropped: float
    dead: tuple[int, ...]
    channels: bool = False


@dataclass(frozen=True)
class Measured:
    """What a checkpoint costs and does, measured on the first seed of a run.

    Attributes:
        images: Evaluation images that MACs were counted on; 0: one image of noise, because the data are not there.
        input_size: (channels, height, width) of the first of them.
        parameters, active_parameters: All, and those that one routed item meets.
        macs_max: MACs at most of an image: router plus K experts for every item, no padding; mean over the images.
        macs_executed: MACs that ran, mean over the images.
        macs_sd: Sample deviation of that over the images.
        uncounted: Operators that were not counted.
        layers: What the experts did with all evaluation images; nothing for a dense run.
        seconds: One image, forward, in every round; the n-th rounds of the runs of one `session` took turns.
        session: Names the timing that `seconds` come from; only times of one session are compared.
        machine: As `moe_zoo.analysis.timing.machine` tells.
    """
    images: int
    input_size: tuple[int, ...]
    parameters: int
    active_parameters: int
    macs_max: float
    macs_executed: float
    macs_sd: float
    uncounted: tuple[str, ...] = ()
    layers: tuple[LayerUse, ...] = ()
    seconds: tuple[float, ...] = ()
    session: str = ''
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def latency(self) -> Optional[tuple[float, float, float]]:
        """Lower quartile, median and upper quartile of the seconds an image takes; None where nothing was timed."""
        return tuple(statistics.quantiles(self.seconds, n=4, method='inclusive')) if len(self.seconds) > 1 else None

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> 'Measured':
        """The inverse of `dataclasses.asdict` and JSON."""
        lists = {name: tuple(content[name]) for name in ('input_size', 'uncounted', 'seconds')}
        layers = tuple(
            LayerUse(**{k: tuple(v) if isinstance(v, list) else v for k, v in layer.items()})
            for layer in content['layers'])
        return cls(**{**content, **lists, 'layers': layers})


@dataclass(eq=False)
class Run:
    """One model, trained by one recipe with one or more seeds.

    Attributes:
        name: Of its folder, unique among the runs read together.
        kind: A key of `KINDS`.
        model: Registered name of a classifier; meta-architecture (and backbone) of a detector.
        family: Of the model's card; 'dense' where nothing routes.
        routed: Whether it has routed layers.
        dataset: Name of the evaluation data.
        trainings: By seed.
        options: The recipe: options of the classifier, config of the detector.
        twin: The dense run beside it, where one was read too.
        parameters, active_parameters, macs_max: As the folder tells or, where it does not, as measured.
        versions: Of what trained it: moe_zoo, commit, torch, timm.
        measured: None where nothing was measured.
        problems: Sentences about what this run lacks.
    """
    name: str
    kind: str
    model: str
    family: str
    routed: bool
    dataset: str
    trainings: tuple[Training, ...]
    options: Mapping[str, Any]
    twin: Optional['Run'] = None
    parameters: Optional[int] = None
    active_parameters: Optional[int] = None
    macs_max: Optional[float] = None
    versions: Mapping[str, Optional[str]] = field(default_factory=dict)
    measured: Optional[Measured] = None
    problems: list[str] = field(default_factory=list)

    @property
    def seeds(self) -> tuple[Optional[int], ...]:
        return tuple(training.seed for training in self.trainings)

    @property
    def metric(self) -> str:
        """The one that the page compares: 'top1' or 'AP', in percent."""
        return KINDS[self.kind][0]

    def scores(self, metric: str = '') -> tuple[float, ...]:
        """A metric at the end of training by seed; seeds without it are left out."""
        metric = metric or self.metric
        return tuple(t.metrics[metric] for t in self.trainings if t.metrics.get(metric) is not None)

    def mean(self, metric: str = '') -> Optional[float]:
        scores = self.scores(metric)
        return statistics.fmean(scores) if scores else None

    def sd(self, metric: str = '') -> Optional[float]:
        """Sample standard deviation over the seeds; None for one seed."""
        scores = self.scores(metric)
        return statistics.stdev(scores) if len(scores) > 1 else None

    @property
    def unit(self) -> str:
        """What the learning curve counts: 'epoch' or 'iteration'."""
        return 'epoch' if self.kind == 'classification' else 'iteration'

    @property
    def curve(self) -> list[dict[str, float]]:
        """Rows of `step` (epochs or iterations done), `loss` (of training, auxiliary losses included) and `score`
        (the metric, where it was measured), each the mean over the seeds that have it."""
        steps = sorted({row['step'] for training in self.trainings for row in training.rows})
        found = {step: {} for step in steps}
        for training in self.trainings:
            for row in training.rows:
                for key in ('loss', 'score'):
                    if row.get(key) is not None:
                        found[row['step']].setdefault(key, []).append(row[key])
        return [{'step': step, **{key: statistics.fmean(values) for key, values in row.items()}}
                for step, row in found.items() if row]

    @property
    def balance(self) -> dict[str, list[tuple[float, float]]]:
        """Layer to (step, evenness of its experts while training), the mean over the seeds; in network order."""
        return _mean_by_layer(training.balance for training in self.trainings)

    @property
    def live(self) -> dict[str, list[tuple[float, float]]]:
        """Layer of channel gates to (step, share of the channels that were on while training), likewise."""
        return _mean_by_layer(training.live for training in self.trainings)

    @property
    def use(self) -> tuple[LayerUse, ...]:
        """Who did the work at the end, by layer: as measured, or nothing."""
        return self.measured.layers if self.measured else ()

    @property
    def dead(self) -> dict[str, tuple[int, ...]]:
        """Layer to its dead experts; layers without any, and gates of channels, are left out."""
        return {layer.layer: layer.dead for layer in self.use if layer.dead and not layer.channels}

    @property
    def gain(self) -> tuple[float, ...]:
        """Points of the metric over the twin, seed by seed; nothing without a twin or a common seed."""
        if self.twin is None:
            return ()
        theirs = {t.seed: t.metrics.get(self.metric) for t in self.twin.trainings}
        pairs = [(t.metrics.get(self.metric), theirs.get(t.seed)) for t in self.trainings]
        return tuple(a - b for a, b in pairs if a is not None and b is not None)

    @property
    def macs_ratio(self) -> Optional[float]:
        """Executed MACs over those of the twin."""
        if self.twin is None or self.measured is None or self.twin.measured is None:
            return None
        return self.measured.macs_executed / self.twin.measured.macs_executed

    @property
    def time_ratio(self) -> Optional[Ratio]:
        """Time of an image over that of the twin, where both were timed in turns."""
        ours, theirs = self.measured, self.twin and self.twin.measured
        if not ours or not theirs or ours.session != theirs.session or len(ours.seconds) < 3:
            return None
        return ratio(ours.seconds, theirs.seconds)

    @property
    def macs_become_time(self) -> Optional[bool]:
        """False where the time over the twin's exceeds the MACs over the twin's by more than the spread."""
        if self.macs_ratio is None or self.time_ratio is None:
            return None
        return self.time_ratio.median - self.macs_ratio <= self.time_ratio.spread

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; the twin by name."""
        kept = ('name', 'kind', 'model', 'family', 'routed', 'dataset', 'seeds', 'parameters', 'active_parameters',
                'macs_max', 'curve', 'balance', 'live', 'problems')
        return {
            **{key: getattr(self, key) for key in kept},
            'metrics': [training.metrics for training in self.trainings],
            'folders': [str(training.folder) for training in self.trainings],
            'twin': self.twin.name if self.twin else None,
            'versions': dict(self.versions),
            'measured': asdict(self.measured) if self.measured else None,
        }


@dataclass(frozen=True)
class Found:
    """What was read: the runs, and one sentence for every folder that was left out."""
    runs: list[Run]
    left_out: list[str]


def read_runs(paths: Iterable[Union[str, os.PathLike]]) -> Found:
    """Read every finished run at or below some folders.

    A folder that is unfinished, corrupt or no run at all is named in one sentence and left out.

    Args:
        paths: Folders of runs, or folders that hold such.

    Returns:
        The runs, routed and dense, in the order given; names are unique.

    Raises:
        InputError: No path was given, or no finished run is left; the reasons are said.
    """
    trainings, left_out = [], []
    for folder in _folders(paths, left_out):
        try:
            trainings.append(read_training(folder))
        except Unusable as error:
            left_out.append(str(error))
    if not trainings:
        reasons = ' '.join(left_out) or 'No folder was given.'
        raise InputError(f'There is no finished run to report. {reasons}')
    runs = _group(trainings)
    _name(runs)
    for run in runs:
        run.twin = _twin(run, runs)
    return Found(runs, left_out)


def _folders(paths: Iterable[Union[str, os.PathLike]], left_out: list[str]) -> list[Path]:
    """Every folder that looks like one training, once."""
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        here = [Path(root) for root, _, files in sorted(os.walk(path)) if any(mark in files for mark in MARKS)]
        if not path.is_dir():
            left_out.append(f"'{path}' is no folder.")
        elif not here:
            left_out.append(f"'{path}' holds no run: neither {' nor '.join(MARKS)} is in it or below it.")
        for folder in here:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def by_data(runs: Iterable[Run]) -> dict[tuple[str, str], list[Run]]:
    """(kind, name of the data) to runs: only such runs are compared."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.kind, run.dataset), []).append(run)
    return groups


# ---- from trainings to runs

def _mean_by_layer(
        trainings: Iterable[Mapping[str, Sequence[tuple[float, float]]]],
) -> dict[str, list[tuple[float, float]]]:
    """Layer to (step, value), the mean over the trainings that have it."""
    found: dict[str, dict[float, list[float]]] = {}
    for layers in trainings:
        for layer, points in layers.items():
            for step, value in points:
                found.setdefault(layer, {}).setdefault(step, []).append(value)
    return {layer: [(step, statistics.fmean(values)) for step, values in sorted(points.items())]
            for layer, points in found.items()}


def _group(trainings: Sequence[Training]) -> list[Run]:
    """Trainings with one recipe become one run; a seed that comes twice begins another."""
    groups: dict[str, list[list[Training]]] = {}
    for training in trainings:
        alike = groups.setdefault(_recipe(training), [])
        group = next((g for g in alike if training.seed not in [t.seed for t in g]), None)
        if group is None:
            alike.append([training])
        else:
            group.append(training)
    order = {id(training): number for number, training in enumerate(trainings)}
    found = sorted((g for alike in groups.values() for g in alike), key=lambda g: order[id(g[0])])
    return [_run(tuple(sorted(group, key=lambda t: (t.seed is None, t.seed or 0)))) for group in found]


def _run(trainings: tuple[Training, ...]) -> Run:
    first = trainings[0]
    run = Run(
        name='', kind=first.kind, model=first.model, family=_family(first), routed=first.routed, dataset=first.dataset,
        trainings=trainings, options=first.options, **first.cost)
    commits = {training.versions.get('commit') for training in trainings}
    run.versions = first.versions
    if len(commits) > 1:
        run.problems.append(f'its seeds were trained by {counted(len(commits), "commit")} of moe_zoo.')
    if not run.scores():
        run.problems.append(f'it measured no {run.metric}.')
    return run


def _family(training: Training) -> str:
    if not training.routed:
        return 'dense'
    try:
        return card(training.card).get('family', 'other') if training.card else training.layer or 'other'
    except InputError:
        return 'other'


def _name(runs: Sequence[Run]) -> None:
    """The last parts of each run's folder, as many as make the names differ; `seed3` says nothing here."""
    parts = {}
    for run in runs:
        own = [p for p in run.trainings[0].folder.resolve().parts if not p.removeprefix('seed').isdecimal()]
        parts[id(run)] = own
    depth = {id(run): 2 if parts[id(run)][-1] in ('twin', 'model') else 1 for run in runs}
    while True:
        for run in runs:
            run.name = '/'.join(parts[id(run)][-depth[id(run)]:])
        names = [run.name for run in runs]
        double = [run for run in runs if names.count(run.name) > 1]
        if not double:
            return
        if all(depth[id(run)] >= len(parts[id(run)]) for run in double):
            for number, run in enumerate(double, 1):  # one folder holds several: seeds that come twice
                run.name += f' ({number})'
            return
        for run in double:
            depth[id(run)] += 1


def _recipe(training: Training, without_network: bool = False) -> str:
    """What a training learned from, as one text: its options without place, pace and seed."""
    if training.kind == 'classification':
        left = SEEDLESS | (NETWORK if without_network else set())
        kept = {key: value for key, value in training.options.items() if key not in left}
    else:
        left = SEEDLESS_KEYS + (NETWORK_KEYS if without_network else ())
        kept = {key: value for key, value in _flat(training.options).items() if not key.startswith(left)}
    return json.dumps([training.kind, training.dataset, kept], sort_keys=True, default=str)


def _flat(node: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    found = {}
    for key, value in node.items():
        found.update(_flat(value, f'{prefix}{key}.') if isinstance(value, Mapping) else {f'{prefix}{key}': value})
    return found


def _twin(run: Run, runs: Sequence[Run]) -> Optional[Run]:
    """The dense run that differs in the network alone: the one in its own folder, else the one that its card names."""
    if not run.routed:
        return None
    recipe = _recipe(run.trainings[0], without_network=True)
    alike = [other for other in runs if not other.routed and other.kind == run.kind
             and _recipe(other.trainings[0], without_network=True) == recipe]
    first = run.trainings[0].folder.resolve()
    beside = (first / 'twin', first.parent / 'twin')
    near = [other for other in alike if any(t.folder.resolve() in beside for t in other.trainings)]
    if near:
        return near[0]
    named = [other for other in alike if run.kind == 'detection' or other.model in (run.trainings[0].twin, run.model)]
    return named[0] if named else None
