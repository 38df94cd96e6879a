"""The command `moe-zoo`: lists and shows model cards, and opens the door to every tool of tools/.

A tool is a module with `main(argv)`; it is imported, by its full name, only when it is called: `moe-zoo list` and
`show` read text files and need no torch. What is imported here is therefore imported relatively (see moe_zoo_cli.py).
"""
import argparse
import importlib
import json
import shutil
import sys
from collections.abc import Callable

from .card_tables import COLUMNS, SHOWN, card_text, columns_of, find, listing, values
from .cards import card, cards
from .errors import InputError, exit_on_input_error, nearest
from .version import __version__

# command -> (module that has main(argv), what it does, extra of pyproject.toml that it needs)
TOOLS = {
    'train-imagenet': ('moe_zoo.engine.train', 'train a classification model from a YAML recipe', None),
    'finetune': ('moe_zoo.engine.finetune', 'fine-tune a model on a folder of images, from dense weights', None),
    'eval-imagenet': ('moe_zoo.engine.evaluate_cli', 'accuracy, calibration, cost and expert use of a model', None),
    'compare': ('moe_zoo.engine.difference_cli', 'two runs, or a run and its twin, on the same images', None),
    'predict': ('moe_zoo.engine.predict', 'the likeliest classes of images, and the experts that saw them', None),
    'export': ('moe_zoo.engine.export', 'a classifier as an ONNX, pt2 or TorchScript file, checked', None),
    'analyze-experts': ('moe_zoo.engine.analyze_experts', 'what the experts of a trained model do, as a page', None),
    'count-flops': ('moe_zoo.analysis.count_cli', 'parameters and MACs, at most and as executed', None),
    'convert-checkpoint': ('moe_zoo.checkpoints.convert_cli', 'released or dense checkpoints into safetensors', None),
    'report': ('moe_zoo.analysis.report_cli', 'finished runs on one page: accuracy, cost, the use of experts', None),
    'estimate-scale': (
        'moe_zoo.analysis.scale_cli', 'memory, traffic and time of training on many GPUs, on paper', None),
    'benchmark': ('moe_zoo.analysis.benchmark_cli', 'time of a model or layer as a ratio to its dense twin', None),
    'train-coco': ('moe_zoo.detection.train', 'train or evaluate a detector from a detectron2 config', 'detection'),
    'predict-coco': ('moe_zoo.detection.predict', 'the objects that a detector sees in images, drawn', 'detection'),
    'analyze-object-sizes': (
        'moe_zoo.detection.object_sizes', 'which expert serves small, medium and large objects', 'detection'),
    'demo': ('moe_zoo.demo', 'train, count and explain small models, and write one page about it', 'demo'),
    'reproduce': ('moe_zoo.reproduce.cli', "the papers' own experiments, small, each with its verdict", 'demo'),
    'run': ('moe_zoo.run', "run any script of timm or detectron2 with moe_zoo's models known", None),
    'cards': ('moe_zoo.cards_cli', 'count again what the cards say, and write what was counted', None),
}
OWN = {
    'list': 'every model, or those of a family, or whose name matches: a part of it, or a pattern such as "vmoe_*"',
    'show': 'the card of one model: paper, cost, recipe, results, deviations, the command that trains it',
}
LIST_EXAMPLES = f"""
examples:
  %(prog)s                                           every model, by family and size
  %(prog)s vmoe                                      a family
  %(prog)s resnet50 --columns model,MACs,twin,recipe
  %(prog)s 'moe_*' --json                            figures in full, every column

columns: {', '.join(COLUMNS)}
"""
SHOW_EXAMPLES = """
examples:
  %(prog)s vmoe_vit_s
  %(prog)s vmoe_vit_s --bibtex >> paper.bib
  %(prog)s vmoe_vit_s --json
"""


@exit_on_input_error
def main(argv: list[str] | None = None) -> int:
    """Run `moe-zoo COMMAND ...`; returns the exit code."""
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ['--help']
    if command in ('-h', '--help'):
        print(usage())
    elif command == '--version':
        print(f'moe_zoo {__version__}')
    elif command == 'list':
        print(_of_cards(list_cards, arguments))
    elif command == 'show':
        print(_of_cards(show_card, arguments))
    elif command in TOOLS:
        return _run_tool(command, arguments)
    else:
        hint = nearest(command, [*OWN, *TOOLS]) or ' `moe-zoo --help` lists them.'
        raise InputError(f'moe-zoo has no command {command!r}.{hint}')
    return 0


def usage() -> str:
    """What `moe-zoo --help` prints."""
    rows = [('list [FILTER] ...', OWN['list']), ('show NAME ...', OWN['show'])]
    rows += [(f'{name} ...', about) for name, (_, about, _) in TOOLS.items()]
    lines = [f'  {left:<25}{about}' for left, about in rows]
    return '\n'.join(['usage: moe-zoo COMMAND ...', '', *lines, '', 'moe-zoo COMMAND --help says more of each tool.'])


def list_cards(arguments: list[str]) -> str:
    """What `moe-zoo list ...` prints: a table of models that fits the terminal, or 100 columns, or JSON.

    Raises:
        InputError: No model matches, or there is no such column or option.
    """
    parser = _Parser(prog='moe-zoo list', description=f'List {OWN["list"]}.', epilog=LIST_EXAMPLES)
    parser.add_argument('filter', nargs='?', default='', metavar='FILTER', help='family, part of names, or pattern')
    parser.add_argument('--columns', metavar='A,B,C', help=f'by default {",".join(SHOWN)}')
    parser.add_argument('--json', action='store_true', help='figures in full; by default of every column')
    args = parser.parse_args(arguments)
    columns = columns_of(args.columns) if args.columns is not None else None
    found = find(cards(), args.filter)
    if args.json:
        return json.dumps(values(found, columns), indent=1, ensure_ascii=False)
    return listing(found, columns or SHOWN, _width())


def _of_cards(tell: Callable[[list[str]], str], arguments: list[str]) -> str:
    try:
        return tell(arguments)
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f'A card is not what it should be ({type(error).__name__}: {error}): `moe-zoo cards --check` names it, and '
            'what it lacks.') from error


def show_card(arguments: list[str]) -> str:
    """What `moe-zoo show ...` prints: a card as text, as JSON, or its paper as BibTeX.

    Raises:
        InputError: No card has this name, or there is no such option.
    """
    parser = _Parser(prog='moe-zoo show', description=f'Show {OWN["show"]}.', epilog=SHOW_EXAMPLES)
    parser.add_argument('name', metavar='NAME', help='of a model, as `moe-zoo list` has it')
    form = parser.add_mutually_exclusive_group()
    form.add_argument('--bibtex', action='store_true', help="the paper's entry for a bibliography, and nothing else")
    form.add_argument('--json', action='store_true', help='the whole card')
    args = parser.parse_args(arguments)
    entry = card(args.name)
    if args.bibtex:
        return entry['paper']['bibtex'].strip()
    if args.json:
        return json.dumps(entry, indent=1, ensure_ascii=False)
    return card_text(entry, min(120, _width()))


class _Parser(argparse.ArgumentParser):
    """argparse that says what is wrong in one sentence."""

    def __init__(self, **keywords):
        super().__init__(**keywords, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message: str):
        raise InputError(f'{self.prog}: {message}; `{self.prog} --help` says how it is used.')


def _width() -> int:
    return max(60, shutil.get_terminal_size((100, 24)).columns)


def _run_tool(command: str, arguments: list[str]) -> int:
    module, _, extra = TOOLS[command]
    try:
        tool = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or '').partition('.')[0] == 'moe_zoo':
            raise  # a fault of ours, not a package that somebody left out
        how = f"the extra {extra!r} brings it (pip install '.[{extra}]')" if extra else 'pip can install it'
        how = 'tools/setup.sh installs its Python part' if error.name == 'detectron2' else how
        raise InputError(f'moe-zoo {command} needs {error.name!r}, which is not installed: {how}.') from error
    sys.argv = [f'moe-zoo {command}', *arguments]  # argparse names it in the usage line, child processes inherit it
    code = tool.main(arguments)
    return code if isinstance(code, int) else 0
