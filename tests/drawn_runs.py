"""Finished runs of chosen numbers, for the drawings and pages that tests/drawings/ holds."""
from pathlib import Path

from moe_zoo.analysis.run_folders import Training
from moe_zoo.analysis.runs import Found, LayerUse, Measured, Run

USE = (LayerUse('stage.1', (.5, .25, .25), (.5, .25, .25), .95, .125, ()),
       LayerUse('a.long.name.of.a.module.stage.3.mlp', (.9, .1, 0., 0.), (.9, .1, 0., 0.), .23, 0., (2, 3)),
       LayerUse('gate', (1., 0.), (1., 0.), 0., 0., (1,), channels=True))
RISING = tuple(n / 55 for n in range(11))
MANY = tuple(LayerUse(f'blocks.{n}.mlp', RISING, RISING, .9 - .01 * n, 0., (0,)) for n in range(7))
CHIP = {'device': 'a chip', 'threads': 2, 'cores': 4, 'load': 4.6}


def trainings(name: str, routed: bool, scores: dict, kind: str = 'classification', **fields) -> tuple[Training, ...]:
    """One for each seed; its folder is made below the working directory."""
    made = []
    for seed, score in scores.items():
        folder = Path('runs', name, f'seed{seed}')
        folder.mkdir(parents=True, exist_ok=True)
        rows = tuple({'step': n, 'loss': 2 / n + seed / 10} | ({'score': score - 9 / n} if n % 2 else {})
                     for n in range(1, 2 if name == 'vit' else 6))  # of one epoch there is no curve
        balance = {f'stage.{n}': tuple((step, (.5 + .05 * n) + .01 * step) for step in range(1, 6))
                   for n in range(8) if routed}
        live = {'gate': ((1, .9), (2, .8)), 'later.gate': ((1, .7), (2, .75))} if 'gates' in name else {}
        made.append(Training(
            folder=folder, kind=kind, model='', routed=routed, dataset='', seed=seed, rows=rows, balance=balance,
            live=live, metrics={'top1' if kind == 'classification' else 'AP': score}, options={}, **fields))
    return tuple(made)


def run_of(name: str, model: str, scores: dict, seconds=(), use=(), twin=None, kind='classification', **fields) -> Run:
    routed = bool(use)
    executed = fields.pop('executed', None)
    measured = executed and Measured(
        images=4, input_size=(3, 32, 48), parameters=2_500_000, active_parameters=1_250_000, macs_max=1.5 * executed,
        macs_executed=executed, macs_sd=.05 * executed * routed, layers=use, seconds=seconds, session='a',
        machine=CHIP, uncounted=('aten::sort', 'aten::fft') if routed else ())
    return Run(
        name=name, kind=kind, model=model, family='moe' if routed else 'dense', routed=routed,
        dataset='cells' if kind == 'detection' else 'digits', options={}, twin=twin, measured=measured or None,
        trainings=trainings(name, routed, scores, kind, card=model), **fields)


def found_runs() -> Found:
    """A mixture with its twin, both measured; one that was not; one that costs most; two detectors."""
    versions = {'commit': '0123456789abcdef', 'moe_zoo': '1.2', 'torch': '2.14', 'timm': None}
    twin = run_of('moe/twin', 'resnet18', {0: 90., 1: 92.}, (.010, .012, .011), executed=40e6, versions=versions,
                  parameters=1_000_000, active_parameters=1_000_000, macs_max=40e6)
    moe = run_of('moe/model', 'moe_resnet18_cifar', {0: 93., 1: 94., 2: 98.}, (.020, .025, .022), USE, twin,
                 executed=60e6, versions=versions, parameters=2_500_000, active_parameters=1_250_000, macs_max=90e6)
    vit = run_of('vit', 'vmoe_vit_s', {0: 88.}, (.041, .040, .042, .043), MANY, executed=300e6,
                 versions=versions | {'commit': 'fedcba9876543210'})
    gates = run_of('some gates', 'deepmoe_resnet18', {0: 95., 1: 95.5}, macs_max=55e6, problems=['its data are gone.'])
    dense = run_of('det/twin', 'MoERetinaNet', {1: 30.}, (1.1, 1.2, 1.), kind='detection', executed=4e9)
    detector = run_of('det/model', 'MoERetinaNet moe', {1: 29., 2: 31.5}, (1.4, 1.5, 1.2), USE[:1], dense,
                      'detection', executed=12e9)
    gates.routed, gates.family = True, 'deepmoe'
    return Found([moe, twin, vit, gates, detector, dense], ["'runs/half' is unfinished: 1 of 9 epochs are done."])
