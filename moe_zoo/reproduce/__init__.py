"""The papers' own experiments at desk scale: `tools/reproduce.py NAME`, or `moe-zoo reproduce NAME`.

Five words. An `Experiment` (experiment.py) has arms and claims, fixed before anything runs. The runner (runner.py)
trains every arm with every seed in worker processes, keeps each finished run in a file and writes `results.json`. The
verdict (verdict.py) is a paired t-test by seed. The report (report.py) is a section of the page and a row of the
README's table. Every experiment is one top-level `Experiment` in the `EXPERIMENTS` of a file of this package.
"""
import importlib

from moe_zoo.errors import InputError, nearest

from .experiment import Arm, Claim, Experiment

__all__ = ['Arm', 'Claim', 'Experiment', 'find_experiment']

# name -> the file of this package whose `EXPERIMENTS` holds it; a file is imported when its experiment is asked for
FILES = {
    'condconv': 'condconv',
    'condconv-routes': 'condconv',
    'condconv-placement': 'condconv',
    'condconv-experts': 'condconv',
    'dyconv-temperature': 'dyconv',
    'balance': 'balance',
    'deepmoe': 'deepmoe',
    'pmoe-samples': 'pmoe',
    'pmoe-spurious': 'pmoe',
    'vmoe-priority': 'vmoe',
    'route-consistency': 'route_consistency',
    'situational-fusion': 'situational_fusion',
    'vowels': 'vowels',
    'object-sizes': 'object_sizes',
    'bccd': 'bccd',
    'finetune-cnn': 'finetune',
    'finetune-vit': 'finetune',
    'upcycle': 'dense_weights',
    'prune': 'dense_weights',
}


def find_experiment(name: str) -> Experiment:
    """The experiment of a name.

    Raises:
        InputError: There is none; the nearest names are said.
    """
    if name not in FILES:
        hint = nearest(name, FILES) or f' Known are {", ".join(FILES)}.'
        raise InputError(f'There is no experiment {name!r}.{hint}')
    found = importlib.import_module(f'.{FILES[name]}', __name__).EXPERIMENTS
    return next(experiment for experiment in found if experiment.name == name)
