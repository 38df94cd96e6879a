"""Several runs of one recipe: seeds, and the dense twin that is trained on the same batches."""
import argparse
import json
import re
import statistics
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..analysis.cost import count
from ..analysis.origin import versions
from ..analysis.timing import alternate, machine, ratio
from ..cards import card, dense_twin
from ..errors import InputError, atomic_write, counted
from .build import build_model, mixed_precision, prepare_model
from .config import load_config
from .log import duration

MEASURES = ('top1', 'top5', 'loss', 'seconds')


def run_all(
        config: Union[str, Path, Mapping[str, Any]],
        overrides: Mapping[str, Any],
        *,
        seeds: Optional[Sequence[int]] = None,
        twin: bool = False,
        resume: Optional[str] = None,
        strict_data: bool = False,
) -> Dict[str, List[Dict[str, Any]]]:
    """Train a model, over seeds and beside its twin where asked for, print the comparison and file it.

    Each run has a folder of its own: `seed3` and `twin` below that of the recipe, where `results.json` is written.

    Args:
        config: A recipe.
        overrides: Options that win over it.
        seeds: One run for each; None is the recipe's own seed.
        twin: Also train the dense twin that the model's card names, with the same seed.
        resume: 'auto' continues every run from its last checkpoint; a path continues a single run.

    Returns:
        'model' and 'twin' to the results of `moe_zoo.engine.train.train`, by seed.

    Raises:
        InputError: The model has no card, or what a run raises.
    """
    from .train import train
    args = load_config(config, overrides)
    many = seeds is not None and len(seeds) > 1
    if resume not in (None, 'auto') and (many or twin):
        raise InputError(f'--resume {resume} continues one run: with --seeds or --twin use --resume alone.')
    twin_overrides = dict(overrides, **twin_options(args)) if twin else None
    base = Path(args.output or 'output/train') / args.experiment if args.experiment else None
    if base is None and (many or twin):
        base = Path(args.output or 'output/train') / f'{args.model}-compared'
    results: Dict[str, List[Dict[str, Any]]] = {'model': [], 'twin': []}
    made_by = versions()  # before: the checkout may change meanwhile
    for seed in seeds or [args.seed]:
        folder = base / f'seed{seed}' if many else base
        common = dict(resume=resume, strict_data=strict_data)
        results['model'].append(train(config, dict(overrides, seed=seed), output=folder, **common))
        if twin:
            results['twin'].append(train(
                config, dict(twin_overrides, seed=seed), output=folder / 'twin', expect_routing=False, **common))
    if results['model'][0]['primary']:
        made_by['hardware'] = hardware(machine(args.device or ('cuda' if torch.cuda.is_available() else 'cpu')))
        _tell(results, base or Path(results['model'][0]['folder']), made_by)
    return results


def twin_options(args: Any) -> Dict[str, Any]:
    """Overrides that turn a recipe into that of the model's dense twin.

    Keywords of the recipe that the twin knows (image size, depth, width) are kept, those of routing fall away.

    Raises:
        InputError: The model has no card, or is dense itself, or its routes are part of the loss.
    """
    if args.route_consistency:
        raise InputError(
            f'route_consistency={args.route_consistency} with a dense twin, which has no routes: leave --twin out; the'
            ' control is route_consistency=jsd with route_consistency_weight=0, two views that nothing compares.')
    twin, twin_args = dense_twin(card(args.model.partition('.')[0]))
    twin = args.model_kwargs.get('base', twin)  # of a `moefied` model
    keywords = {**twin_args, **args.model_kwargs}
    if twin == args.model:  # timm has no such network: ours with its routing switched off, whatever the recipe
        keywords.update(twin_args)
    while True:
        try:
            timm.create_model(twin, device='meta', **keywords)
            # what only gates and experts have
            routed = {'freeze_gates': None, 'expert_parallel': 1}
            asked = {name: off for name, off in routed.items() if getattr(args, name) != off}
            return {'model': twin, 'model_kwargs': keywords, **asked}
        except TypeError as error:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if not unknown or unknown[1] not in keywords or unknown[1] in twin_args:
                raise InputError(f'The dense twin {twin!r} cannot be built: {error}') from error
            keywords.pop(unknown[1])


def beside_twin(args: Any, model: nn.Module, sample: torch.Tensor, rounds: int = 5) -> Optional[Dict[str, Any]]:
    """MACs and time of a model over those of its dense twin, which take turns on the same images.

    Args:
        args: Options that the model was built from.
        model: On its device, in evaluation mode.
        sample: Images.
        rounds: Timings of each.

    Returns:
        twin (its name), macs (executed, ratio), time, low and high (ratio: median and quartiles), and becomes_time:
        False where the time exceeds what the MACs say by more than the quartiles lie apart. None without a twin.
    """
    try:
        options = twin_options(args)
    except InputError:
        return None
    plain = dict(pretrained=False, pretrained_path=None, initial_checkpoint='')
    theirs = argparse.Namespace(**{**vars(args), **plain, **options})
    twin = prepare_model(theirs, build_model(theirs), sample.device).eval()
    autocast, _ = mixed_precision(args, sample.device)

    def forward(network: nn.Module) -> None:
        with torch.no_grad(), autocast():
            network(sample)
        if sample.device.type == 'cuda':
            torch.cuda.synchronize(sample.device)

    timings = alternate([partial(forward, model), partial(forward, twin)], rounds, min_seconds=0.05)
    macs = count(model, sample).macs_executed / count(twin, sample).macs_executed
    taken = ratio(*timings.seconds)
    return {'twin': options['model'], 'macs': macs, 'time': taken.median, 'low': taken.low, 'high': taken.high,
            'becomes_time': taken.median - macs <= taken.spread}


def paired(results: Mapping[str, List[Dict[str, Any]]], name: str) -> List[float]:
    """Model minus twin, seed by seed."""
    return [ours[name] - theirs[name] for ours, theirs in zip(results['model'], results['twin'])]


def mean_and_deviation(values: Sequence[float]) -> str:
    """`98.12` for one value, `98.12 +- 0.30` for several (sample standard deviation)."""
    mean = statistics.fmean(values)
    return f'{mean:.4g}' if len(values) < 2 else f'{mean:.4g} +- {statistics.stdev(values):.2g}'


def comparison_table(results: Mapping[str, List[Dict[str, Any]]]) -> Table:
    """A row a model and, with a twin, one of differences."""
    runs = len(results['model'])
    seeds = f'{runs} seeds, mean and sample deviation' if runs > 1 else 'one seed'
    table = Table(title=f'{results["model"][0]["model"]}: {seeds}', title_justify='left')
    for column in ('', 'top-1 %', 'loss', 'parameters', 'MACs at most', 'time'):
        table.add_column(column, justify='left' if not column else 'right')
    for runs_of_one in (results['model'], results['twin']):
        if runs_of_one:
            first = runs_of_one[0]
            table.add_row(
                first['model'] + (' (twin)' if runs_of_one is results['twin'] else ''),
                mean_and_deviation([r['top1'] for r in runs_of_one]),
                mean_and_deviation([r['loss'] for r in runs_of_one]),
                f'{first["parameters"]:,}', f'{first["macs"]:,}',
                duration(statistics.fmean(r['seconds'] for r in runs_of_one)))
    if results['twin']:
        ours, theirs = results['model'][0], results['twin'][0]
        times = [a['seconds'] / b['seconds'] for a, b in zip(results['model'], results['twin'])]
        table.add_row(
            'paired difference', mean_and_deviation(paired(results, 'top1')),
            mean_and_deviation(paired(results, 'loss')), f'{ours["parameters"] - theirs["parameters"]:+,}',
            f'{ours["macs"] - theirs["macs"]:+,} ({ours["macs"] / theirs["macs"]:.3f} x)',
            f'{mean_and_deviation(times)} x')
    return table


def _tell(results: Mapping[str, List[Dict[str, Any]]], folder: Path, made_by: Mapping[str, Optional[str]]) -> None:
    single = results['model'][0]
    out = Console(highlight=False, soft_wrap=True)
    if single['top1'] is not None and (len(results['model']) > 1 or results['twin']):
        out.print(comparison_table(results))
    else:
        shown = '' if single['top1'] is None else f'top-1 {single["top1"]:.2f} % after '
        took = f'{counted(single["epochs"], "epoch")} in {duration(single["seconds"])}'
        out.print(f'{shown}{took}; best: {single["best"]}', markup=False)
    figures = {
        'versions': made_by,
        **{name: [{k: v for k, v in run.items() if k not in ('history', 'primary')} for run in runs]
           for name, runs in results.items() if runs},
    }
    with atomic_write(folder / 'results.json') as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + '\n')
    out.print(f"results in '{folder / 'results.json'}'", markup=False)


def hardware(found: Mapping[str, Any]) -> str:
    """`2 threads of AMD EPYC 7B13`, of what `moe_zoo.analysis.timing.machine` tells."""
    return f'{counted(found["threads"], "thread")} of {found["device"]}'
