"""The object-size question: do the experts of a detector's head part objects by size, and does that matter?

Pavlitska, Hubschneider, Struppek, Zöllner, "Balancing Expert Utilization in Mixture-of-Experts Layers Embedded in CNNs"
(https://arxiv.org/abs/2204.10598), whose experts are sub-nets of RetinaNet with a gate for every level of its pyramid.

detectron2 is imported when the experiment runs. Letters: O objects, E experts, S = 3 size classes.
"""
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from torch import nn

from moe_zoo.analysis.charts import curves, heat_map
from moe_zoo.analysis.force import force_expert
from moe_zoo.analysis.object_gates import SIZES, size_classes
from moe_zoo.analysis.object_sizes import LayerSizes, SizeCollector
from moe_zoo.analysis.page import Block, Figure
from moe_zoo.data import write_scenes, write_subset
from moe_zoo.errors import InputError, MissingPackage
from moe_zoo.resources import folder as packaged

from .experiment import Arm, Claim, Experiment

SCENES = {'train': 400, 'val': 300, 'seed': 0, 'classes': range(5)}
VALIDATION = 100  # of the 300, the first ones
HELD_OUT = 5  # every so many-th training image, for validation where a folder has no set for it
LEAST = 10  # objects of a size class, for it to be compared
STEPS, BATCH = 450, 8
HEAD = 'head.cls_experts'  # the layer that decides; that of the boxes follows
SHUFFLES = 499


class Part:
    """A set of annotated images; iterating gives what an experiment is recognised by, the bytes of its annotations.

    Attributes:
        annotations: COCO JSON.
        images: Folder of the images.
        content: The parsed annotations.
    """

    def __init__(self, annotations: Path, images: Path):
        self.annotations, self.images = annotations, images
        text = annotations.read_bytes()
        self.content = json.loads(text)
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([self.bytes])


class Scenes(NamedTuple):
    """Detection data in three parts."""
    train: Part
    validation: Part
    test: Part
    description: str
    options: dict[str, Any]


def load(folder: Optional[str], files: Path) -> Scenes:
    """Digit scenes, written into the folder of the experiment, or COCO-style data.

    Args:
        folder: With annotations/instances_{train,val}.json and train/, val/, as BCCD; instances_test.json and test/ are
            used where they are there, else val/ is for the test and a fifth of the training images for validation.
        files: Receives what is written.

    Raises:
        InputError: There is no such data.
        MissingPackage: detectron2 is not installed.
    """
    _need_detectron2()
    if folder is None:
        return _digit_scenes(files)
    root, name = Path(folder).expanduser(), Path(folder).resolve().name
    try:
        parts = {split: Part(root / 'annotations' / f'instances_{split}.json', root / split)
                 for split in ('train', 'val', 'test') if split != 'test' or (root / 'test').is_dir()}
    except (OSError, ValueError) as error:
        raise InputError(f"--data-dir '{folder}' is no COCO-style data: {error}") from error
    if 'test' not in parts:
        train, numbers = parts['train'], range(len(parts['train'].content['images']))
        parts = {
            'train': _some(train, [i for i in numbers if i % HELD_OUT], files / f'{name}_train.json'),
            'val': _some(train, [i for i in numbers if not i % HELD_OUT], files / f'{name}_validation.json'),
            'test': parts['val']}
    return _described(name, parts['train'], parts['val'], parts['test'], {'MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS': [
        [0.5, 1.0, 2.0]], 'INPUT.MIN_SIZE_TRAIN': [240], 'INPUT.MIN_SIZE_TEST': 240, 'INPUT.RANDOM_FLIP': 'horizontal'})


def _digit_scenes(files: Path) -> Scenes:
    root = write_scenes(files / 'scenes', **SCENES)
    train, val = (Part(root / 'annotations' / f'instances_{split}.json', root / split) for split in ('train', 'val'))
    validation = _some(val, range(VALIDATION), files / 'scenes_validation.json')
    test = _some(val, range(VALIDATION, SCENES['val']), files / 'scenes_test.json')
    return _described('digit scenes of 192 x 192 pixels', train, validation, test, {})


def _described(name: str, train: Part, validation: Part, test: Part, options: dict[str, Any]) -> Scenes:
    counts = ', '.join(f'{len(part.content["images"])} {kind}' for part, kind in (
        (train, 'train'), (validation, 'validation'), (test, 'test')))
    options = {**options, 'MODEL.RETINANET.NUM_CLASSES': len(train.content['categories'])}
    return Scenes(train, validation, test, f'{name}: {counts}', options)


def _some(part: Part, numbers, path: Path) -> Part:
    """Some images of a part, as annotations of their own."""
    return Part(write_subset(part.annotations, numbers, path), part.images)


def _need_detectron2() -> None:
    if find_spec('detectron2') is None:
        raise MissingPackage('object-sizes needs detectron2, which is not installed: tools/setup.sh installs it.')


# ---- one run

def run(options: list[dict[str, Any]], seed: int, data: Scenes) -> list[dict[str, Any]]:
    """Train one detector, and look at it as every arm says.

    The experts of small and of large objects are named on the validation images: those whose share of these exceeds
    their share of all objects most.

    Returns:
        For 'trained': separation in percent; explained; ap by size; both p-values; mass (S, E); curve.
        For 'shuffled': separation of the routers whose weights are shuffled, the mean.
        For a size of objects: how much of their AP they lose where the expert of small ones does all the work
            (`lost_to_small`) or that of large ones (`lost_to_large`), in percent of it.
    """
    from moe_zoo.detection.in_memory import train_in_memory
    from moe_zoo.detection.object_sizes import Scenes as TestSet

    model = train_in_memory(config(data, data.validation, seed))
    small, large = extremes(data)
    validation = TestSet(config(data, data.validation, seed), model, quiet=True)
    named = _sizes(validation, model, shuffles=0)[0]
    tests = TestSet(config(data, data.test, seed), model, quiet=True)
    sizes, free = _sizes(tests, model, SHUFFLES)
    named = {'small': named.expert_of(small), 'large': named.expert_of(large)}
    lost = {}
    for name, expert in named.items():
        with force_expert(model, expert, HEAD):
            forced = tests.run(model, name)
        lost[name] = {size: _lost(free, forced, f'AP{"sml"[s]}') for size, s in (('small', small), ('large', large))}
    views = {
        'trained': {
            'separation': 100 * sizes.separation, 'explained': 100 * (sizes.explained or 0.),
            **{f'ap{size}': free[f'AP{size}'] or 0. for size in ('', 's', 'm', 'l')},
            'p_chance': sizes.chance_p, 'p_shuffled': sizes.untrained_p,
            'mass': sizes.as_dict()['mass'], 'named': named,
            'curve': [[area, mean.tolist()] for area, mean, _ in sizes.curve]},
        'shuffled': {'separation': 100 * sizes.untrained_separation},
        **{f'{size} objects': {f'lost_to_{name}': lost[name][size] for name in lost} for size in named},
    }
    return [views[each['view']] for each in options]


def _lost(free: dict[str, Optional[float]], forced: dict[str, Optional[float]], key: str) -> float:
    """Percent of a metric that is lost; none where there is nothing to lose."""
    return 100 * (1 - (forced[key] or 0.) / free[key]) if free[key] else 0.


def _sizes(tests, model: nn.Module, shuffles: int) -> tuple[LayerSizes, dict[str, Optional[float]]]:
    """What the head does with sizes, and COCO's metrics, of one pass."""
    with SizeCollector(model, shuffles) as collector:
        metrics = tests.run(model, 'free', collector)
    found = collector.analyze()
    return next(layer for layer in found.layers if layer.name == HEAD), metrics


def extremes(data: Scenes) -> tuple[int, int]:
    """The smallest and the largest size class with objects enough, by validation images.

    Raises:
        InputError: There are not two.
    """
    areas = [a['area'] for a in data.validation.content['annotations'] if not a.get('iscrowd', 0)]
    counts = [int((size_classes(areas) == s).sum()) for s in range(len(SIZES))]
    enough = [s for s, count in enumerate(counts) if count >= LEAST]
    if len(enough) < 2:
        raise InputError(f'{data.description}: the validation images have {counts[0]} small, {counts[1]} medium and '
                         f'{counts[2]} large objects; two of the sizes need {LEAST}.')
    return enough[0], enough[-1]


def config(data: Scenes, part: Part, seed: int):
    """The config of a run, tested on a part of the data."""
    from moe_zoo.detection import load_config
    options = {
        'MOE.RESNET.STAGES': [], 'MOE.HEAD.SUBNETS': 'both', 'MOE.HEAD.SHARED_GATE': True,
        'MOE.HEAD.LOSSES': [['kl', .25], ['load', .25]], 'SOLVER.IMS_PER_BATCH': BATCH, 'SOLVER.MAX_ITER': STEPS,
        'SOLVER.STEPS': (int(.75 * STEPS), int(.93 * STEPS)), 'SEED': seed, **data.options,
        'MOE.DATA.TRAIN_JSON': str(data.train.annotations), 'MOE.DATA.TRAIN_IMAGES': str(data.train.images),
        'MOE.DATA.TEST_JSON': str(part.annotations), 'MOE.DATA.TEST_IMAGES': str(part.images)}
    words = [str(word) for pair in options.items() for word in pair]
    return load_config(packaged('configs') / 'demo' / 'retinanet_digits.yaml', words)


# ---- what is told

def figures(results: dict[str, Any]) -> list[Block]:
    """Gate mass by size, the gate over the size, and what is lost, of the first seed; and the losses of all."""
    first = next(each for each in results['runs'] if each['arm'] == 'trained')
    found, blocks = first['metrics'], []
    known = {size: row for size, row in found['mass'].items() if row}
    experts = len(next(iter(known.values())))
    mass = [[100 * row[e] for row in known.values()] for e in range(experts)]
    blocks.append(Figure(
        heat_map([f'expert {e}' for e in range(experts)], list(known), mass, '', 'objects', '{:.1f}'),
        'Gate mass of each expert on objects by size; the numbers are drawn in.',
        f'Gate mass of each expert on the test objects of a size, %, seed {first["seed"]}. The expert of small objects '
        f'is {found["named"]["small"]}, that of large ones {found["named"]["large"]}, by the validation images.'))
    lines = [(f'expert {e}', [(area ** .5, 100 * mean[e]) for area, mean in found['curve']]) for e in range(experts)]
    blocks.append(Figure(
        curves(lines, 'root of the area of the object, pixels', 'gate, %', '{:.0f}'),
        'Mean gate of each expert over the size of objects.', f'Mean gate over the size of objects, seed '
        f'{first["seed"]}.'))
    means = {arm['name']: arm['metrics'] for arm in results['arms']}
    rows = [[means[f'{size} objects'][f'lost_to_{name}']['mean'] for size in ('small', 'large')]
            for name in ('small', 'large')]
    blocks.append(Figure(
        heat_map(['of small', 'of large'], ['small', 'large'], rows, 'expert', 'objects', '{:.1f}'),
        'Percent of their AP that objects lose where one expert does all the work; the numbers are drawn in.',
        'Percent of their AP that small and large objects lose where the expert of small, or of large ones does all '
        'the work, mean over the seeds.'))
    return blocks


UNREAD = "the paper's tables could not be read"

OBJECT_SIZES = Experiment(
    name='object-sizes',
    title='Experts and object sizes: what the experts of a detector part, and whether it matters',
    paper='[Balanced MoE, Pavlitska et al., 2022](https://arxiv.org/abs/2204.10598)',
    question='A RetinaNet whose head is 4 pairs of sub-nets, for classes and for boxes, of which a gate chooses 2 for '
             'every level of the pyramid of every image, learns digits of 14 to 128 pixels in scenes from random '
             f'weights: a ResNet-18 of half the width, {STEPS} steps of {BATCH} scenes, the losses kl and load. The '
             'paper trains such heads on a finished detector of COCO, each kind of sub-net with a gate of its own. An '
             'object has the gate vector of the FPN level whose anchors overlap it most. `separation` is the distance '
             "of the size classes' mean gates in percent, `explained` the percent of the variance of the gates among "
             'objects that size explains. Levels stand for sizes, so that a router that learned nothing separates them '
             f'too: `shuffled` is the mean of {SHUFFLES} versions of the trained router whose weights lost their '
             'places, on the same features. The expert of small objects is the one whose share of them exceeds its '
             'share of all objects most, on validation images. `lost_to_small` is the percent of their AP on test '
             'images that objects lose where it does all the work, `lost_to_large` where that of large ones does. All '
             'arms look at one detector a seed. '
             'Of other data the smallest and largest COCO size with 10 validation objects stand for small and large.',
    arms=tuple(Arm(view, {'view': view}) for view in ('trained', 'shuffled', 'small objects', 'large objects')),
    claims=(
        Claim('Training makes experts separate objects by size: more than shuffled routers do on the same features.',
              'separation', 'trained', 'shuffled', deviation=15., source=UNREAD),
        Claim('Forcing the expert of small objects costs large objects more of their AP than small ones.',
              'lost_to_small', 'large objects', 'small objects', deviation=20., source=UNREAD, unit='% of the AP'),
        Claim('Forcing the expert of large objects costs small objects more of their AP than large ones.',
              'lost_to_large', 'small objects', 'large objects', deviation=20., source=UNREAD, unit='% of the AP'),
    ),
    run=run,
    load=load,
    seeds=10,
    charts=figures,
    together=True,
    files=True,
    computes=('detection', 'analysis/object_gates.py', 'analysis/object_sizes.py', 'analysis/permutation.py',
              'analysis/shuffled_routers.py', 'data/scenes.py'),
)

EXPERIMENTS = (OBJECT_SIZES,)
