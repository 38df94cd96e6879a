"""A detector on real images: RetinaNet with experts in its last stage, from random weights, beside its dense twin.

Every run is what `tools/train_coco.py` does with a config of configs/demo; detectron2 is imported when it does.
"""
import contextlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
import yaml

from moe_zoo.errors import MissingPackage, atomic_write
from moe_zoo.resources import folder as packaged

from . import object_sizes
from .experiment import Arm, Claim, Experiment
from .object_sizes import Part
from .runner import fingerprint, made_for

CHECKPOINTS = 350  # iterations between two: what a killed run loses at most
KEPT = ('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl')  # and AP of every category


class Cells(NamedTuple):
    """Images of blood cells in three parts, and a folder for the runs' checkpoints."""
    train: Part
    validation: Part
    test: Part
    description: str
    folder: Path


def load(folder: Optional[str], files: Path) -> Cells:
    """BCCD, or other COCO-style data of three categories, as `object_sizes.load` finds them.

    Raises:
        InputError: There is no such data.
        MissingPackage: No folder is given, or detectron2 is not installed.
    """
    if folder is None:
        raise MissingPackage('bccd needs images of blood cells, which moe_zoo does not have: --data-dir DIR with '
                             'annotations/instances_{train,val,test}.json, train/, val/ and test/.')
    found = object_sizes.load(folder, files)
    return Cells(found.train, found.validation, found.test, found.description, files / 'training')


def run(options: dict[str, Any], seed: int, data: Cells) -> dict[str, float]:
    """Train and evaluate one detector; a run that was killed goes on from its last checkpoint.

    Args:
        options: A detectron2 config, complete but for data, seed and output.

    Returns:
        KEPT and AP of every category, in percent, where the test images have such objects; parameters; minutes of
        training. The weights stay in the folder of the run.
    """
    from moe_zoo.detection.train import run as train
    place = data.folder / made_for(fingerprint(BCCD, data), Arm('', options), seed)
    config = place.with_suffix('.yaml')
    with atomic_write(config) as temporary:
        temporary.write_text(yaml.safe_dump(options))
    words = {
        'MOE.DATA.TRAIN_JSON': data.train.annotations, 'MOE.DATA.TRAIN_IMAGES': data.train.images,
        'MOE.DATA.TEST_JSON': data.test.annotations, 'MOE.DATA.TEST_IMAGES': data.test.images, 'SEED': seed,
        'SOLVER.CHECKPOINT_PERIOD': CHECKPOINTS, 'OUTPUT_DIR': place}
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):  # the log is in a file as well
        results = train(['--config-file', str(config), '--resume',
                         *(str(word) for pair in words.items() for word in pair)])['bbox']
    parameters = _keep_weights(place)
    kept = {key: float(value) for key, value in results.items() if key in KEPT or key.startswith('AP-')}
    return {'AP': 0., 'AP50': 0.,  # of a detector that finds nothing, where detectron2 says NaN
            **{key: value for key, value in kept.items() if math.isfinite(value)}, 'parameters': parameters,
            'minutes': _minutes(place / 'metrics.json', options['SOLVER']['MAX_ITER'])}


def _keep_weights(place: Path) -> int:
    """Leave of a run's checkpoints the last one, without the optimiser's state; returns the number of parameters."""
    final = place / 'model_final.pth'
    weights = torch.load(final, map_location='cpu', weights_only=True)['model']
    (place / 'last_checkpoint').unlink()  # nothing goes on from weights alone
    with atomic_write(final) as temporary:
        torch.save({'model': weights}, temporary)
    for checkpoint in set(place.glob('model_*.pth')) - {final}:
        checkpoint.unlink()
    shutil.rmtree(place / 'inference', ignore_errors=True)
    statistics = ('running_mean', 'running_var', 'num_batches_tracked')
    return sum(value.numel() for key, value in weights.items() if not key.endswith(statistics))


def _minutes(log: Path, iterations: int) -> float:
    """Time of all iterations by detectron2's log, in which those that a killed run did again come twice."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    times = {line['iteration']: line['time'] for line in lines if 'time' in line}
    return iterations * sum(times.values()) / len(times) / 60


def merged(path: Path) -> dict[str, Any]:
    """A config and those it builds on as one, in plain yaml."""
    own = yaml.safe_load(path.read_text(encoding='utf-8'))
    base = own.pop('_BASE_', None)
    return _over(merged(path.parent / base), own) if base else own


def _over(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    both = {key: _over(base[key], own[key]) for key in base.keys() & own.keys()
            if isinstance(base[key], dict) and isinstance(own[key], dict)}
    return {**base, **own, **both}


def _arm(name: str) -> Arm:
    options = merged(packaged('configs') / 'demo' / f'retinanet_{name}_bccd.yaml')
    options['SOLVER']['AMP'] = {'ENABLED': True}  # six runs: 1.6 times as fast where a CPU computes in bfloat16
    options['INPUT']['MIN_SIZE_TEST'] = 240  # as planned: the config's 252 was found on validation images afterwards
    return Arm(name, {key: value for key, value in options.items() if key not in ('OUTPUT_DIR', 'SEED', 'DATASETS')})


NO_PAPER = 'ours: no paper trains this detector on these images'

BCCD = Experiment(
    name='bccd',
    title='A detector on real images: blood cells, with experts and without',
    paper='[Balanced MoE, Pavlitska et al., 2022](https://arxiv.org/abs/2204.10598)',
    question='A RetinaNet on a ResNet-18, a pyramid of 64 channels and two convolutions a head, learns red cells, '
             'white cells and platelets of BCCD from random weights, in images of 288 x 216 to 352 x 264: 1,400 '
             'iterations of 8 images, AdamW, a cosine from 0.001, bfloat16 by autocast (otherwise as '
             'configs/demo/retinanet_dense_bccd.yaml). Its twin '
             'has 4 copies of the last stage, moved apart, of which a gate chooses 2 for every image, with the losses '
             'kl and load (retinanet_moe_bccd.yaml). The paper puts experts into detectors of COCO, which start from '
             'trained weights. Sizes of images and anchors and the loss of boxes were chosen by validation images (AP '
             '52.9 with one size, three anchors and smooth L1, 56.8 as it is, one run each of the mixture); a dense '
             'run with other sizes was measured on the test images before. The expected deviation is a guess.',
    arms=(_arm('dense'), _arm('moe')),
    claims=(
        Claim('A RetinaNet with four experts in its last stage detects blood cells better than its dense twin.',
              'AP', 'moe', 'dense', deviation=1.5, source=NO_PAPER),
        Claim('It finds more of them: AP50.', 'AP50', 'moe', 'dense', deviation=1.5, source=NO_PAPER),
    ),
    run=run,
    load=load,
    seeds=3,
    files=True,
    computes=('detection', 'reproduce/object_sizes.py', 'data/random_state.py'),
)

EXPERIMENTS = (BCCD,)
