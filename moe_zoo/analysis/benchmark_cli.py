"""`tools/benchmark.py`: the time of a routed model beside that of its dense twin, of a routed layer beside a plain one,
of detectors beside one another, and of COCO's metrics by two libraries.

Time stands next to MACs, because MACs that are saved or added do not always turn into time. How it is measured is in
`timing.py`, which layers are in `layer_cases.py`.

Letters: B images.
"""
import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

import moe_zoo
from moe_zoo.cards import card, dense_twin
from moe_zoo.errors import InputError, atomic_write, exit_on_input_error, nearest

from ..layers import MoEMlp, RoutedLayer
from ..losses import auxiliary_losses
from ..routing import Routing
from .cost import count
from .count_cli import build_model, parse_size
from .force import rewrite_routing
from .layer_cases import MODES, Case, Contender, find_cases
from .timing import CLOCKS, Ratio, alternate, machine, peak_memory, ratio, settle_memory

# Ratios of time that models aim at: to the dense twin, and to it at equal MACs.
MODEL_AIMS = {'moe_resnet18': 1.2}
EQUAL_MACS_AIMS = {'vmoe_vit_s': 1.15}
DETECTOR_AIM = 1.1  # to the dense twin of equal MACs
COCO_AIM = 0.25  # time of faster-coco-eval to that of pycocotools
COMMANDS = ('model', 'layer', 'detector', 'coco-eval')
EXAMPLES = """examples:
  tools/benchmark.py model condconv_resnet50 --mode forward
  tools/benchmark.py model vmoe_vit_s --equal-macs --batch-size 32
  tools/benchmark.py layer --list
  tools/benchmark.py layer 'condconv-1x1-*' --threads 2 --json times.json
  tools/benchmark.py detector configs/coco/retinanet_{moe_res5,condconv}_r50_fpn_1x.yaml --img-size 640
  tools/benchmark.py detector configs/coco/retinanet_moe_res5_r50_fpn_1x.yaml --equal-macs
  tools/benchmark.py coco-eval
  OMP_WAIT_POLICY=passive tools/benchmark.py layer --clock cpu      on a machine that others use"""


def make_run(model: nn.Module, x: torch.Tensor, mode: str) -> Callable[[], None]:
    """One forward or one training step of a model as a function without arguments, finished when it returns."""
    if mode == 'forward':
        return _forward(model, (x,))
    model.train()
    if hasattr(model, 'set_aux_loss'):
        model.set_aux_loss(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    target = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)

    def step() -> None:
        output = model(x)
        output, routings = output if isinstance(output, tuple) else (output, [])
        loss = sum(auxiliary_losses(routings, target).values(), F.cross_entropy(output, target))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _finish(x)

    return step


def make_layer_run(contender: Contender, mode: str) -> Callable[[], None]:
    """One forward of a layer, or one forward and backward to its inputs and parameters."""
    _, module, inputs = contender
    if mode == 'forward':
        return _forward(module, inputs)
    module.train()
    inputs = tuple(x.clone().requires_grad_() for x in inputs)
    slope = torch.ones_like(module(*inputs))

    def step() -> None:
        output = module(*inputs)
        for leaf in (*inputs, *module.parameters()):
            leaf.grad = None
        output.backward(slope)
        _finish(slope)

    return step


def _forward(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    module.eval()

    def forward() -> None:
        with torch.inference_mode():
            module(*inputs)
        _finish(inputs[0])

    return forward


def _finish(x: torch.Tensor | list) -> None:
    """Wait for a GPU. A detector takes a list, of which it is not known where it went."""
    if torch.cuda.is_available() and not (isinstance(x, torch.Tensor) and x.device.type == 'cpu'):
        torch.cuda.synchronize()


def benchmark_model(name: str, mode: str, args: argparse.Namespace) -> list[dict]:
    """Time one model, its items spread evenly over its experts, against the dense twin that its card names.

    Returns:
        One row: what was run, the ratio of MACs, the ratio of time, and every timing in seconds.

    Raises:
        InputError: A size that the model does not take, or a model that is dense itself; with `equal_macs`, one that
            has no `MoEMlp`.
    """
    entry = card(name)
    channels, *own = entry['input']['size']
    size = (args.img_size, args.img_size) if args.img_size else tuple(own)
    twin, keywords = dense_twin(entry)
    models = [build_model(name, args.device, size), build_model(twin, args.device, size, **keywords)]
    if args.equal_macs and not widen(models[1], models[0]):
        raise InputError(f'--equal-macs widens MLPs that stand beside a MoEMlp, and {name} has none: leave it out.')
    x = torch.rand(args.batch_size, channels, *size, device=args.device)
    macs = [count(model, x).macs_max for model in models]
    with rewrite_routing(models[0], spread_evenly):
        timings = alternate([make_run(model, x, mode) for model in models], args.rounds, clock=CLOCKS[args.clock])
    aims = EQUAL_MACS_AIMS if args.equal_macs else MODEL_AIMS
    row = {
        'model': name, 'twin_args': keywords, 'equal_macs': args.equal_macs, 'batch_size': args.batch_size,
        'input_size': [channels, *size], 'macs_ratio': macs[0] / macs[1],
    }
    return [row | _compare(twin, mode, timings.seconds, timings.loads, aims.get(name))]


def widen(twin: nn.Module, model: nn.Module) -> list[str]:
    """Give a dense twin the MACs of a routed model: its MLPs beside a `MoEMlp` become as wide as K experts.

    The router's own MACs stay a difference, and what else the model has that its twin has not.

    Returns:
        Names of the MLPs; none where the model has no `MoEMlp`.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, MoEMlp)}
    for name, layer in layers.items():
        dense = twin.get_submodule(name)
        hidden = (layer.num_selected + layer.num_shared_experts) * layer.hidden_features
        place = {'device': dense.fc1.weight.device, 'dtype': dense.fc1.weight.dtype}
        dense.fc1 = nn.Linear(layer.in_features, hidden, **place)
        dense.fc2 = nn.Linear(hidden, layer.out_features, **place)
    return list(layers)


def spread_evenly(layer: str, routing: Routing) -> Routing:
    """Item t chooses experts t, t + 1 ... modulo E: as balanced as training can make it.

    Fresh routers send most items to the same few experts, which is faster than any use of the model would be.
    """
    if routing.indices is None or routing.by_expert:
        return routing
    items, ranks = (torch.arange(n, device=routing.indices.device) for n in routing.indices.shape)
    return routing._replace(indices=(items[:, None] + ranks) % routing.num_experts)


def benchmark_layer(name: str, mode: str, case: Case, args: argparse.Namespace) -> list[dict]:
    """Time the contenders of one case; those of packages that are not installed are said and left out.

    Returns:
        One row for each contender after the first, as those of `benchmark_model`.
    """
    contenders = []
    for contender, module, inputs in case.build():
        if module is None:
            print(f'note: {name} goes without {contender}, which `tools/setup.sh --bench` installs', file=sys.stderr)
        else:
            inputs = tuple(x.to(args.device) for x in inputs)
            contenders.append(Contender(contender, module.to(args.device), inputs))
    runs = [make_layer_run(contender, mode) for contender in contenders]
    timings = alternate(runs, args.rounds, clock=CLOCKS[args.clock])
    ours = timings.seconds[0]
    return [
        {'case': name, 'about': case.about, 'layer': contenders[0].name}
        | _compare(other.name, mode, (ours, theirs), timings.loads, case.aim(other.name, mode))
        for other, theirs in zip(contenders[1:], timings.seconds[1:])
    ]


def benchmark_detectors(args: argparse.Namespace) -> list[dict]:
    """Time one image through detectors, each beside the first; their MACs and memory.

    Returns:
        One row for each config; with `equal_macs` the first is that of the dense twin.

    Raises:
        InputError: A config cannot be used, or with `equal_macs` there are several, or it has no twin.
    """
    from moe_zoo.detection import benchmark  # an extra: imported where it is asked for

    warnings.filterwarnings('ignore', category=FutureWarning)  # detectron2's own affair, as the next
    warnings.filterwarnings('ignore', message='torch.meshgrid')
    names, size = args.configs, parse_size(args.img_size)
    built = [benchmark.build_detector(name, args.opts, args.device, size) for name in names]
    if args.equal_macs:
        if len(names) > 1:
            raise InputError(f'--equal-macs compares one config with its dense twin, and there are {len(names)}.')
        names = [f'{names[0]}, dense and wider', *names]
        built.insert(0, (benchmark.build_twin(args.configs[0], args.opts, args.device, size), built[0][1]))
    costs = [count(model, inputs) for model, inputs in built]
    runs = [_forward(model, (inputs,)) for model, inputs in built]
    with contextlib.ExitStack() as spread:
        for model, _ in built:
            if any(isinstance(module, RoutedLayer) for module in model.modules()):
                spread.enter_context(rewrite_routing(model, spread_evenly))
        timings = alternate(runs, args.rounds, clock=CLOCKS[args.clock])
        memory = [peak_memory(run, args.device) for run in runs]
    return [
        {'config': config, 'opts': args.opts, 'equal_macs': args.equal_macs,
         'input_size': list(inputs[0]['image'].shape), 'parameters': cost.parameters, 'macs': cost.macs_max,
         'macs_ratio': cost.macs_max / costs[0].macs_max, 'memory': held}
        | _compare(names[0], 'forward', (seconds, timings.seconds[0]), timings.loads,
                   DETECTOR_AIM if args.equal_macs and number else None)
        for number, (config, (_, inputs), cost, held, seconds) in enumerate(
            zip(names, built, costs, memory, timings.seconds))]


def benchmark_coco(args: argparse.Namespace) -> list[dict]:
    """Time COCO's metrics on generated objects, through detectron2's evaluator.

    Raises:
        InputError: The metrics differ, or there is no image.
    """
    from moe_zoo.detection import benchmark

    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = runs = benchmark.coco_runs(args.images, Path(folder))
        difference = benchmark.largest_difference(ours(), theirs())
        if difference > 1e-9:
            raise InputError(f'faster-coco-eval and pycocotools differ by {difference:g} %: their times say nothing.')
        timings = alternate(runs, args.rounds, min_seconds=0, clock=CLOCKS[args.clock])
    row = {'case': 'coco-eval', 'about': f'{args.images} images', 'layer': 'faster-coco-eval', 'difference': difference}
    return [row | _compare('pycocotools', 'evaluate', timings.seconds, timings.loads, COCO_AIM)]


def _compare(
        twin: str, mode: str, seconds: tuple[list[float], ...], loads: list[float], at_most: float | None) -> dict:
    found = ratio(*seconds)
    return {
        'twin': twin, 'mode': mode, 'time_ratio': asdict(found), 'at_most': at_most,
        'verdict': '' if at_most is None else found.judge(at_most), 'loads': loads, 'seconds': seconds[0],
        'twin_seconds': seconds[1],
    }


@exit_on_input_error
def main(argv: list[str] | None = None) -> int:
    """Benchmark what the command line names; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith('-') and argv[0] not in COMMANDS:
        hint = nearest(argv[0], COMMANDS) or f' Models are timed by: benchmark.py model {argv[0]}.'
        raise InputError(f'benchmark.py has the commands {", ".join(COMMANDS)}, not {argv[0]!r}.{hint}')
    args = _parser().parse_args(argv)
    work = WORK[args.command](args)
    if args.command == 'layer' and args.list:
        print('\n'.join(f'{name:<26}{case.about}' for name, case in find_cases(args.cases).items()))
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        raise InputError(f'--device {args.device}: torch sees no CUDA device here; use cpu.')
    before = machine(args.device) | {'clock': args.clock, 'moe_zoo': moe_zoo.__version__}
    if before['load'] > before['cores'] / 2:
        print(f'note: load {before["load"]:.1f} on {before["cores"]} cores; others are busy here', file=sys.stderr)
    settle_memory()
    rows = []
    for name, mode, run in work:
        rows += (found := run())
        for row in found[1:] if args.command == 'detector' else found:
            print(f'{row.get("config", name)}, {mode}, to {row["twin"]}: {Ratio(**row["time_ratio"])}', file=sys.stderr)
    _report(rows, before, args)
    return 0


Work = list[tuple[str, str, Callable[[], list[dict]]]]  # name, mode, how to time it


def _model_work(args: argparse.Namespace) -> Work:
    if args.rounds < 3 or args.batch_size < 1:
        raise InputError(f'--rounds {args.rounds} --batch-size {args.batch_size}: use at least 3 rounds and 1 image.')
    for name in args.names:
        card(name)  # a wrong name is said before an hour of timings
    modes = [args.mode] if args.mode else MODES
    return [(n, mode, lambda n=n, mode=mode: benchmark_model(n, mode, args)) for n in args.names for mode in modes]


def _layer_work(args: argparse.Namespace) -> Work:
    if args.rounds < 3:
        raise InputError(f'--rounds {args.rounds}: use at least 3 rounds.')
    return [
        (name, mode, lambda name=name, mode=mode, case=case: benchmark_layer(name, mode, case, args))
        for name, case in find_cases(args.cases).items() for mode in case.modes if args.mode in (None, mode)]


def _detector_work(args: argparse.Namespace) -> Work:
    if args.rounds < 3:
        raise InputError(f'--rounds {args.rounds}: use at least 3 rounds.')
    return [('detectors', 'forward', lambda: benchmark_detectors(args))]


def _coco_work(args: argparse.Namespace) -> Work:
    if args.rounds < 3:
        raise InputError(f'--rounds {args.rounds}: use at least 3 rounds.')
    return [('coco-eval', 'evaluate', lambda: benchmark_coco(args))]


WORK = {'model': _model_work, 'layer': _layer_work, 'detector': _detector_work, 'coco-eval': _coco_work}


def _report(rows: list[dict], before: dict, args: argparse.Namespace) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120)
    tables = {'model': _model_table, 'detector': _detector_table}
    console.print(tables.get(args.command, _layer_table)(rows))
    loads = [load for row in rows for load in row['loads']]
    during = f'{min(loads):.1f} to {max(loads):.1f} while timing' if loads else ''
    console.print(
        f'{before["device"]}, {before["cores"]} cores, torch threads: {before["threads"]}, {before["clock"]} time, '
        f'{args.rounds} rounds; load {before["load"]:.1f} before, {during}; torch {before["torch"]}, '
        f'timm {before["timm"]}', highlight=False, markup=False)
    if args.json:
        with atomic_write(args.json) as path:
            path.write_text(json.dumps({'machine': before, 'rows': rows}, indent=1) + '\n', encoding='utf-8')
        console.print(f'wrote {args.json}', highlight=False, markup=False)


def _model_table(rows: list[dict]) -> Table:
    table = _table('model / twin', 'mode', 'images', 'MACs ratio', 'time ratio', 'at most', '', 'model', 'twin')
    for row in rows:
        twin = row['twin'] + ''.join(f' {key}={value}' for key, value in row['twin_args'].items())
        twin += ', wider MLPs' if row['equal_macs'] else ''
        table.add_row(
            f'{row["model"]} / {twin}', row['mode'], str(row['batch_size']), f'{row["macs_ratio"]:.3f}',
            str(Ratio(**row['time_ratio'])), *_aim(row), *_times(row))
    return table


def _detector_table(rows: list[dict]) -> Table:
    table = _table('detector, one image', 'input', 'parameters', 'GMACs at most', 'time', 'memory', 'MACs', 'ratio',
                   'at most', '')
    for row in rows:
        first = row is rows[0]
        table.add_row(
            row['config'].rpartition('/')[2].replace('.yaml', ''), 'x'.join(map(str, row['input_size'][1:])),
            f'{row["parameters"]:,}',
            f'{row["macs"] / 1e9:,.3f}', _times(row)[0], f'{row["memory"] / 1e6:,.1f} MB',
            '1' if first else f'{row["macs_ratio"]:.3f}', '1' if first else str(Ratio(**row['time_ratio'])), *_aim(row))
    return table


def _layer_table(rows: list[dict]) -> Table:
    table = _table('case', 'mode', 'beside', 'time ratio', 'at most', '', 'layer', 'other')
    for row in rows:
        table.add_row(
            row['case'], row['mode'], row['twin'], str(Ratio(**row['time_ratio'])), *_aim(row), *_times(row))
    return table


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow='fold')
    return table


def _aim(row: dict) -> tuple[str, str]:
    return '' if row['at_most'] is None else f'{row["at_most"]:.2f}', row['verdict']


def _times(row: dict) -> list[str]:
    return [f'{1e3 * statistics.median(row[key]):,.2f} ms' for key in ('seconds', 'twin_seconds')]


def _parser() -> argparse.ArgumentParser:
    timing = argparse.ArgumentParser(add_help=False)
    add = timing.add_argument
    add('--rounds', type=int, default=9, metavar='R', help='timings of each, in turns (default: 9, at least 3)')
    add('--device', default='cpu', help='cpu or cuda (default: cpu)')
    add('--threads', type=int, metavar='T', help="torch threads (default: torch's choice)")
    add('--clock', choices=CLOCKS, default='wall', help='wall time, or CPU time of the process (default: wall)')
    add('--json', metavar='OUT', help='write every timing to this file')
    shared = argparse.ArgumentParser(add_help=False, parents=[timing])
    shared.add_argument(
        '--mode', choices=MODES, help='forward: evaluation mode, no gradients; train: with backward (default: both)')

    parser = argparse.ArgumentParser(
        description='Time of routed models, layers and detectors as a ratio to others, in alternating rounds.',
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True, metavar='|'.join(COMMANDS))
    model = commands.add_parser(
        'model', parents=[shared], help='models beside their dense twins',
        description='Time of routed models as a ratio to their dense twins, which their cards name. A training step '
        'includes the losses and an SGD step; items are spread evenly over the experts they choose among.')
    model.add_argument('names', nargs='+', metavar='NAME', help='models of moe_zoo (moe-zoo list shows them)')
    model.add_argument('--batch-size', type=int, default=8, metavar='B', help='images a batch (default: 8)')
    model.add_argument(
        '--equal-macs', action='store_true', help="widen the twin's MLPs K-fold where the model has K experts a token")
    model.add_argument('--img-size', type=int, metavar='S', help="side of the images (default: the card's)")
    layer = commands.add_parser(
        'layer', parents=[shared], help='layers beside plain ones and those of others',
        description='Time of routed layers as a ratio to plain layers and to those of others, forward and with '
        'backward; an aim is reached where three rounds of four are.')
    layer.add_argument('cases', nargs='*', metavar='CASE', help="names or patterns, '*-b8' (default: every case)")
    layer.add_argument('--list', action='store_true', help='show the cases and stop')
    detector = commands.add_parser(
        'detector', parents=[timing], help='detectors of configs, beside the first',
        description='Time and memory of one image of noise through detectors, random weights, beside their MACs; the '
        'ratios are to the first. Memory is what a forward holds at most beyond weights and input.')
    detector.add_argument('configs', nargs='+', metavar='FILE', help='detectron2 yaml files')
    detector.add_argument(
        '--equal-macs', action='store_true', help='beside the config, first, its dense twin: stages of '
        "detectron2's ResNet plain instead of routed, and as wide as the K experts of an image")
    detector.add_argument('--opts', nargs='*', default=[], metavar='KEY VALUE', help='config keys to change in all')
    detector.add_argument('--img-size', metavar='HxW', help="size of the image (default: the config's test size)")
    coco = commands.add_parser(
        'coco-eval', parents=[timing], help="COCO's metrics by faster-coco-eval, beside pycocotools",
        description="Time of COCO's metrics on generated objects through detectron2's evaluator, loading included.")
    coco.add_argument('--images', type=int, default=500, metavar='N', help='images (default: 500)')
    return parser


if __name__ == '__main__':
    sys.exit(main())
