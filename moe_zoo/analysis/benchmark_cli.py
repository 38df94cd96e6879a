"""`tools/benchmark.py`: the time of routed models and layers beside that of dense ones and of others' layers, of
detectors, of dispatch, of loading images, of COCO's metrics, and of compiled models beside eager ones.

Time stands next to MACs, because MACs that are saved or added do not always turn into time. How it is measured is in
`timing.py`, what is aimed at in `targets.py`; `all` measures the set of `published.py`, of which `page` makes
docs/speed.md (`speed_page.py`).

Letters: B images.
"""
import argparse
import functools
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

import moe_zoo
from moe_zoo.card_writer import checkout, renew, with_block
from moe_zoo.cards import card
from moe_zoo.errors import InputError, atomic_write, exit_on_input_error, nearest

from . import dispatch_cases, published, speed_page, speed_tables
from .count_cli import build_model, parse_size
from .layer_cases import MODES, benchmark_layer, find_cases
from .model_cases import benchmark_compiled, benchmark_live, benchmark_model
from .origin import commit
from .targets import judged
from .timing import CLOCKS, Ratio, Settings, machine, settle_memory

EXAMPLES = """examples:
  tools/benchmark.py model condconv_resnet50 --mode forward
  tools/benchmark.py model vmoe_vit_s --equal-macs --batch-size 32
  tools/benchmark.py model condconv_resnet50 --batch-size 1 --mode forward --floor
  tools/benchmark.py model deepmoe_resnet50 --batch-size 1 --live 0.5
  tools/benchmark.py compile vmoe_vit_s condconv_resnet18
  tools/benchmark.py layer --list
  tools/benchmark.py layer 'condconv-1x1-*' --threads 2 --json times.json
  tools/benchmark.py dispatch 'tokens6304-*'
  tools/benchmark.py detector configs/coco/retinanet_{moe_res5,condconv}_r50_fpn_1x.yaml --img-size 640
  tools/benchmark.py detector configs/coco/retinanet_moe_res5_r50_fpn_1x.yaml --equal-macs
  tools/benchmark.py data
  tools/benchmark.py coco-eval
  tools/benchmark.py all --json times.json     everything of docs/speed.md; killed and called again, it goes on
  tools/benchmark.py page times.json           docs/speed.md and its figure, from that
  OMP_WAIT_POLICY=passive tools/benchmark.py layer --clock cpu      on a machine that others use"""


class Job(NamedTuple):
    """One comparison: its name, what is timed of it, and how to time it, which returns rows."""
    name: str
    mode: str
    run: Callable[[], list[dict]]


# ---- what a command line asks for

def model_jobs(args: argparse.Namespace, settings: Settings) -> list[Job]:
    _check_images(args)
    if args.live is not None:
        if args.equal_macs or args.floor or args.mode == 'train':
            raise InputError(
                '--live compares a model with itself, forward: leave --equal-macs, --floor and --mode out.')
        run = functools.partial(
            benchmark_live, share=args.live, build=build_model, settings=settings, batch_size=args.batch_size,
            img_size=args.img_size)
        return [Job(name, 'forward', functools.partial(run, name)) for name in args.names]
    run = functools.partial(
        benchmark_model, build=build_model, settings=settings, batch_size=args.batch_size, img_size=args.img_size,
        equal_macs=args.equal_macs, floor=args.floor, twin_channels_last=args.twin_channels_last)
    return [Job(name, mode, functools.partial(run, name, mode)) for name in args.names for mode in _modes(args)]


def compile_jobs(args: argparse.Namespace, settings: Settings) -> list[Job]:
    _check_images(args)
    run = functools.partial(
        benchmark_compiled, build=build_model, settings=settings, batch_size=args.batch_size, img_size=args.img_size)
    return [Job(name, mode, functools.partial(run, name, mode)) for name in args.names for mode in _modes(args)]


def _check_images(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise InputError(f'--batch-size {args.batch_size}: use at least 1 image.')
    for name in args.names:
        card(name)  # a wrong name is said before an hour of timings


def _modes(args: argparse.Namespace) -> Sequence[str]:
    return [args.mode] if args.mode else MODES


def layer_jobs(args: argparse.Namespace, settings: Settings) -> list[Job]:
    return [Job(name, mode, functools.partial(benchmark_layer, name, mode, case, settings))
            for name, case in find_cases(args.cases).items() for mode in case.modes if args.mode in (None, mode)]


def dispatch_jobs(args: argparse.Namespace, settings: Settings) -> list[Job]:
    return [Job(name, mode, functools.partial(dispatch_cases.benchmark_dispatch, name, mode, settings))
            for name in dispatch_cases.find_cells(args.cells) for mode in _modes(args)]


def detector_jobs(args: argparse.Namespace, settings: Settings) -> list[Job]:
    size = parse_size(args.img_size)

    def run(mode: str) -> list[dict]:
        from moe_zoo.detection import benchmark  # an extra: imported where it is asked for
        return benchmark.benchmark_detectors(args.configs, args.opts, mode, settings, size, args.equal_macs)

    return [Job(' '.join(args.configs), mode, functools.partial(run, mode)) for mode in _modes(args)]


def data_jobs(args: argparse.Namespace, settings: Settings) -> list[Job]:
    from moe_zoo.engine import loading_benchmark as loading

    def run(name: str) -> list[dict]:
        with tempfile.TemporaryDirectory() as folder:
            files = loading.write_images(Path(folder), args.images)
            return loading.benchmark_loading(name, files, settings, args.workers, args.batch_size)

    if args.images < args.batch_size or args.batch_size < 1:
        raise InputError(f'--images {args.images} --batch-size {args.batch_size}: give at least one batch of images.')
    return [Job(name, 'epoch', functools.partial(run, name)) for name in loading.CASES]


def coco_jobs(args: argparse.Namespace, settings: Settings) -> list[Job]:
    def run() -> list[dict]:
        from moe_zoo.detection import benchmark
        return benchmark.benchmark_coco(args.images, settings)

    return [Job('coco-eval', 'evaluate', run)]


JOBS = {'model': model_jobs, 'compile': compile_jobs, 'layer': layer_jobs, 'dispatch': dispatch_jobs,
        'detector': detector_jobs, 'data': data_jobs, 'coco-eval': coco_jobs}
COMMANDS = (*JOBS, 'all', 'page')


# ---- the program

@exit_on_input_error
def main(argv: list[str] | None = None) -> int:
    """Benchmark what the command line names; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith('-') and argv[0] not in COMMANDS:
        hint = nearest(argv[0], COMMANDS) or f' Models are timed by: benchmark.py model {argv[0]}.'
        raise InputError(f'benchmark.py has the commands {", ".join(COMMANDS)}, not {argv[0]!r}.{hint}')
    args = make_parser().parse_args(argv)
    if args.command == 'page':
        return write_page(list(map(Path, args.files)), Path(args.root) if args.root else checkout())
    if args.command == 'layer' and args.list:
        print('\n'.join(f'{name:<26}{case.about}' for name, case in find_cases(args.cases).items()))
        return 0
    return measure_all(args) if args.command == 'all' else measure(args)


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """The comparisons of a command line.

    Raises:
        InputError: Fewer than 3 rounds, or what the command itself refuses.
    """
    if args.rounds < 3:
        raise InputError(f'--rounds {args.rounds}: use at least 3 rounds.')
    return JOBS[args.command](args, Settings(args.rounds, args.device, args.clock))


def measure(args: argparse.Namespace) -> int:
    """Run the comparisons of one command line, print a table, write JSON if asked to."""
    jobs = jobs_of(args)
    before = _prepare(args)
    rows = []
    for job in jobs:
        rows += (found := [judged(row) for row in job.run()])
        for row in found:
            if not row.get('first'):
                words = filter(None, (row.get('config', job.name), row.get('layer'), job.mode))
                print(f'{", ".join(words)}, to {row["twin"]}: {Ratio(**row["time_ratio"])}',
                      file=sys.stderr)
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(speed_tables.table(args.command, rows))
    console.print(speed_tables.conditions(before, args.rounds, rows), highlight=False, markup=False)
    if args.json:
        published.write(args.json, before, rows)
        console.print(f'wrote {args.json}', highlight=False, markup=False)
    return 0


def measure_all(args: argparse.Namespace) -> int:
    """Run the published set, or what of it is not in the file yet; every finished comparison is written at once."""
    parser, planned = make_parser(), []
    for line, seconds in published.chosen(args.only):
        given = parser.parse_args([*line.split(), '--device', args.device, '--clock', args.clock])
        if args.rounds:
            line, given.rounds = f'{line} --rounds {args.rounds}', args.rounds
        planned += [(published.Key(line, job.name, job.mode), seconds, job.run) for job in jobs_of(given)]
    return published.run(planned, Path(args.json), _prepare(args), commit)


def write_page(files: Sequence[Path], root: Path) -> int:
    """docs/speed.json, the tables of docs/speed.md and docs/figures/speed.svg, of what `measure_all` wrote."""
    report, docs = published.merge(files), root / 'docs'
    published.write(docs / 'speed.json', report['machine'], report['rows'])
    blocks = speed_page.blocks(report)
    renew(docs / 'speed.md', lambda text: functools.reduce(
        lambda so_far, block: with_block(so_far, *block), blocks.items(), text))
    with atomic_write(docs / 'figures' / 'speed.svg') as part:
        part.write_text(speed_page.figure(report), encoding='utf-8')
    for name in ('speed.json', 'speed.md', 'figures/speed.svg'):
        print(f'wrote {docs / name}')
    return 0


def _prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Set threads and memory as for all timings; returns what is known of the machine."""
    if args.device.startswith('cuda') and not torch.cuda.is_available():
        raise InputError(f'--device {args.device}: torch sees no CUDA device here; use cpu.')
    if args.threads:
        torch.set_num_threads(args.threads)
    found = machine(args.device) | {'clock': args.clock, 'moe_zoo': moe_zoo.__version__}
    if found['load'] > found['cores'] / 2:
        print(f'note: load {found["load"]:.1f} on {found["cores"]} cores; others are busy here', file=sys.stderr)
    settle_memory()
    return found


# ---- the command line

def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Time of routed models, layers and detectors as a ratio to others, in alternating rounds. A ratio '
        'that lies closer to 1 than its quartiles lie apart is not quoted.',
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True, metavar='|'.join(COMMANDS))
    _add_models(commands)
    _add_layers(commands)
    _add_detectors(commands)
    _add_published(commands)
    return parser


def _timing(rounds: int | None = 9, json: str = 'write every timing to this file') -> argparse.ArgumentParser:
    """Options of every command that measures."""
    options = argparse.ArgumentParser(add_help=False)
    add = options.add_argument
    add('--rounds', type=int, default=rounds, metavar='R', help='timings of each, in turns, at least 3 (default: '
        f'{rounds or "7 or 5, by how long they take"})')
    add('--device', default='cpu', help='cpu or cuda (default: cpu)')
    add('--threads', type=int, default=None if rounds else 2, metavar='T',
        help=f'torch threads (default: {"that of torch" if rounds else 2})')
    add('--clock', choices=CLOCKS, default='wall', help='wall time, or CPU time of the process (default: wall)')
    add('--json', metavar='OUT', required=not rounds, help=json)
    return options


def _with_mode() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, parents=[_timing()])
    options.add_argument('--mode', choices=MODES, help='forward: evaluation mode, no gradients; train: forward, losses '
                         'and backward, the optimiser apart (default: both)')
    return options


def _add_models(commands: Any) -> None:
    model = commands.add_parser(
        'model', parents=[_with_mode()], help='models beside their dense twins',
        description='Time and memory of routed models as a ratio to their dense twins, which their cards name. A '
        'training step is forward, losses and backward; the time of the optimiser (AdamW) stands apart. Items are '
        'spread evenly over the experts they choose among.')
    compiled = commands.add_parser(
        'compile', parents=[_with_mode()], help='compiled models beside eager ones',
        description='Time of models under torch.compile as a ratio to the same models without, the seconds that '
        'compilation takes into an empty cache, and how often the graph breaks.')
    for command in (model, compiled):
        add = command.add_argument
        add('names', nargs='+', metavar='NAME', help='models of moe_zoo (moe-zoo list shows them)')
        add('--batch-size', type=int, default=8, metavar='B', help='images a batch (default: 8)')
        add('--img-size', type=int, metavar='S', help="side of the images (default: the card's)")
    add = model.add_argument
    add('--twin-channels-last', action='store_true',
        help='the twin in channels-last memory, which convolutional ones of ours choose by themselves')
    add('--equal-macs', action='store_true', help="widen the twin's MLPs K-fold where the model has K experts a token")
    add('--floor', action='store_true', help='time also how long it takes to read the weights of the experts once')
    add('--live', type=float, metavar='SHARE', help='of a model with channel gates: leave this share of the channels '
        'open, and time it computing those alone beside itself computing and masking all')


def _add_layers(commands: Any) -> None:
    layer = commands.add_parser(
        'layer', parents=[_with_mode()], help='layers beside plain ones and those of others',
        description='Time and memory of routed layers as a ratio to plain layers and to those of others, forward and '
        'with backward; an aim is reached where three rounds of four are.')
    layer.add_argument('cases', nargs='*', metavar='CASE', help="names or patterns, '*-b8' (default: every case)")
    layer.add_argument('--list', action='store_true', help='show the cases and stop')
    dispatch = commands.add_parser(
        'dispatch', parents=[_with_mode()], help='the ways of tokens to experts, beside the experts alone',
        description='Time of the ways of tokens to their experts and back (sorted, padded, grouped, through an '
        'exchange between processes) as a ratio to the experts alone, on chunks made beforehand.')
    cells = ', '.join(dispatch_cases.cells())
    dispatch.add_argument('cells', nargs='*', metavar='CELL', help=f'names or patterns of {cells} (default: every one)')


def _add_detectors(commands: Any) -> None:
    detector = commands.add_parser(
        'detector', parents=[_with_mode()], help='detectors of configs, beside the first',
        description='Time and memory of one image of noise through detectors, random weights, beside their MACs; the '
        'ratios are to the first. A training step has 7 objects and no optimiser. Memory is what a call holds at most '
        'beyond weights and input.')
    detector.add_argument('configs', nargs='+', metavar='FILE', help='detectron2 yaml files')
    detector.add_argument(
        '--equal-macs', action='store_true', help='beside the config, first, its dense twin: stages of '
        "detectron2's ResNet plain instead of routed, and as wide as the K experts of an image")
    detector.add_argument('--opts', nargs='*', default=[], metavar='KEY VALUE', help='config keys to change in all')
    detector.add_argument('--img-size', metavar='HxW', help="size of the image (default: the config's test size)")
    coco = commands.add_parser(
        'coco-eval', parents=[_timing()], help="COCO's metrics by faster-coco-eval, beside pycocotools",
        description="Time of COCO's metrics on generated objects through detectron2's evaluator, loading included.")
    coco.add_argument('--images', type=int, default=500, metavar='N', help='images (default: 500)')
    data = commands.add_parser(
        'data', parents=[_timing()], help="loading of images, beside timm's",
        description="Time of an epoch of training images through our loaders as a ratio to timm's: generated JPEG "
        'files in a folder and in a tar, and two views of every image.')
    data.add_argument('--images', type=int, default=512, metavar='N', help='images (default: 512)')
    data.add_argument('--batch-size', type=int, default=32, metavar='B', help='images a batch (default: 32)')
    data.add_argument('--workers', type=int, default=2, metavar='W', help='processes that read (default: 2)')


def _add_published(commands: Any) -> None:
    whole = commands.add_parser(
        'all', parents=[_timing(rounds=None, json='the file: what is in it already is not measured again')],
        help='everything that docs/speed.md shows', formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Measure the set that docs/speed.md is made of. Every finished comparison is written at once; a '
        'run that was killed goes on when it is called again.\n\n' + published.plan())
    whole.add_argument('--only', nargs='+', choices=tuple(JOBS), metavar='COMMAND', help='of the set, these commands')
    page = commands.add_parser(
        'page', help='docs/speed.md and its figure from what `all` wrote',
        description='Write the tables of docs/speed.md and its figure. Of several files the later ones count where '
        'both have a comparison; what they have together becomes docs/speed.json.')
    page.add_argument('files', nargs='+', metavar='FILE', help='JSON files of `all`')
    page.add_argument('--root', metavar='DIR', help='a checkout (default: the one that this program is of)')


if __name__ == '__main__':
    sys.exit(main())
