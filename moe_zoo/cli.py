"""The command `moe-zoo`: lists and shows model cards, and opens the door to every tool of tools/.

A tool is a module with `main(argv)`; it is imported only when it is called, so that `moe-zoo list` needs no torch.
"""
import fnmatch
import importlib
import shutil
import sys
import textwrap

import moe_zoo
from moe_zoo.cards import card, cards, dense_twin
from moe_zoo.errors import InputError, exit_on_input_error, nearest

# command -> (module that has main(argv), what it does, extra of pyproject.toml that it needs)
TOOLS = {
    'train-imagenet': ('moe_zoo.engine.train', 'train a classification model from a YAML recipe', None),
    'finetune': ('moe_zoo.engine.finetune', 'fine-tune a model on a folder of images, from dense weights', None),
    'eval-imagenet': ('moe_zoo.engine.evaluate', 'accuracy, cost and expert use of a trained model', None),
    'predict': ('moe_zoo.engine.predict', 'the likeliest classes of images, and the experts that saw them', None),
    'analyze-experts': ('moe_zoo.engine.analyze_experts', 'what the experts of a trained model do, as a page', None),
    'count-flops': ('moe_zoo.analysis.count_cli', 'parameters and MACs, at most and as executed', None),
    'convert-checkpoint': ('moe_zoo.checkpoints.convert_cli', 'released or dense checkpoints into safetensors', None),
    'benchmark': ('moe_zoo.analysis.benchmark_cli', 'time of a model or layer as a ratio to its dense twin', None),
    'train-coco': ('moe_zoo.detection.train', 'train or evaluate a detector from a detectron2 config', 'detection'),
    'predict-coco': ('moe_zoo.detection.predict', 'the objects that a detector sees in images, drawn', 'detection'),
    'analyze-object-sizes': (
        'moe_zoo.detection.object_sizes', 'which expert serves small, medium and large objects', 'detection'),
    'demo': ('moe_zoo.demo', 'train, count and explain small models, and write one page about it', 'demo'),
    'reproduce': ('moe_zoo.reproduce.cli', "the papers' own experiments, small, each with its verdict", 'demo'),
    'run': ('moe_zoo.run', "run any script of timm or detectron2 with moe_zoo's models known", None),
}
OWN = {
    'list': 'every model, or those whose name matches FILTER (a part of the name, or a pattern such as "vmoe_*")',
    'show': 'the card of one model: paper, cost, recipe, results, deviations',
}


@exit_on_input_error
def main(argv: list[str] | None = None) -> int:
    """Run `moe-zoo COMMAND ...`; returns the exit code."""
    command, *arguments = (sys.argv[1:] if argv is None else argv) or ['--help']
    if command in ('-h', '--help'):
        print(usage())
    elif command == '--version':
        print(f'moe_zoo {moe_zoo.__version__}')
    elif command == 'list':
        print(list_cards(*_operands('list [FILTER]', arguments, at_least=0)))
    elif command == 'show':
        print(show_card(*_operands('show NAME', arguments, at_least=1)))
    elif command in TOOLS:
        return _run_tool(command, arguments)
    else:
        hint = nearest(command, [*OWN, *TOOLS]) or ' `moe-zoo --help` lists them.'
        raise InputError(f'moe-zoo has no command {command!r}.{hint}')
    return 0


def usage() -> str:
    """What `moe-zoo --help` prints."""
    rows = [('list [FILTER]', OWN['list']), ('show NAME', OWN['show'])]
    rows += [(f'{name} ...', about) for name, (_, about, _) in TOOLS.items()]
    lines = [f'  {left:<25}{about}' for left, about in rows]
    return '\n'.join(['usage: moe-zoo COMMAND ...', '', *lines, '', 'moe-zoo COMMAND --help says more of each tool.'])


def list_cards(pattern: str = '') -> str:
    """A table of the models: name, parameters (all and active), MACs at most, summary.

    Raises:
        InputError: No model's name matches `pattern`.
    """
    known = cards()
    glob = pattern if any(c in pattern for c in '*?[') else f'*{pattern}*'
    found = {name: entry for name, entry in known.items() if fnmatch.fnmatchcase(name, glob)}
    if not found:
        hint = nearest(pattern, known) or ' `moe-zoo list` shows all names.'
        raise InputError(f'No model of moe_zoo matches {pattern!r}.{hint}')
    rows = [('model', 'parameters', 'active', 'MACs', 'summary')]
    for name, entry in found.items():
        cost = entry['cost']
        figures = (_short(cost[key]) for key in ('parameters', 'active_parameters', 'macs'))
        rows.append((name, *figures, entry['summary']))
    name_width, *widths = (max(len(row[i]) for row in rows) for i in range(4))
    return '\n'.join(
        f'{row[0]:<{name_width}}  ' + '  '.join(f'{cell:>{w}}' for cell, w in zip(row[1:4], widths)) + f'  {row[4]}'
        for row in rows
    )


def show_card(name: str) -> str:
    """The card of one model as text.

    Raises:
        InputError: No card has this name.
    """
    entry = card(name)
    paper, cost, recipe = entry['paper'], entry['cost'], entry['recipe']
    venue, year = paper['venue'], str(paper['year'])
    venue = venue if year in venue else f'{venue} {year}'
    lines = [
        ('paper', f'{paper["title"]}. {paper["authors"]}. {venue}. arXiv:{paper["arxiv"]}'),
        ('input', ' x '.join(map(str, entry['input']['size']))),
        ('parameters', f'{cost["parameters"]:,}, of which {cost["active_parameters"]:,} work on an image or token'),
        ('MACs', f'{cost["macs"]:,} at most (multiply-adds; router and chosen experts for every item)'),
        ('dense twin', _call(*dense_twin(entry)) if 'twin' in entry else 'none: it is dense itself'),
        ('recipe', recipe['config']),
        ('train it', recipe['command']),
        *[('published', _result(row)) for row in entry.get('published', [])],
        *[('measured', _result(row)) for row in entry.get('measured', [])],
        ('weights', entry['weights']['note']),
        *[('deviation', text) for text in entry.get('deviations', [])],
    ]
    width = max(len(label) for label, _ in lines)
    columns = max(60, min(120, shutil.get_terminal_size().columns))
    body = [
        textwrap.fill(
            f'{label:<{width}}  {text}', columns, subsequent_indent=' ' * (width + 2),
            break_long_words=False, break_on_hyphens=False)
        for label, text in lines
    ]
    return '\n'.join([f'{entry["name"]}: {entry["summary"]}', *body])


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


def _operands(form: str, arguments: list[str], at_least: int) -> list[str]:
    if not at_least <= len(arguments) <= 1 or any(a.startswith('-') for a in arguments):
        raise InputError(f'Use it as: moe-zoo {form} (given: {" ".join(arguments) or "nothing"}).')
    return arguments


def _short(count: int) -> str:
    """1234567 -> '1.23 M'."""
    for size, letter in ((10**9, 'G'), (10**6, 'M')):
        if count >= size:
            return f'{count / size:.3g} {letter}' if count < 1000 * size else f'{count / size:.0f} {letter}'
    return f'{count:,}'


def _call(name: str, keywords: dict) -> str:
    return f'{name}({", ".join(f"{k}={v!r}" for k, v in keywords.items())})' if keywords else name


def _result(row: dict) -> str:
    """`[[published]]` and `[[measured]]` rows: what, how much, from where."""
    row = dict(row)
    value = row.pop('value', None)
    if value is None:
        value = f'{row.pop("mean")} +- {row.pop("std")}'
    what = ' '.join(str(row.pop(key)) for key in ('dataset', 'metric') if key in row)
    rest = ', '.join(f'{key} {_plain(value)}' for key, value in row.items() if key != 'source')
    return f'{what}: {value}' + (f' ({rest})' if rest else '') + (f'; {row["source"]}' if 'source' in row else '')


def _plain(value) -> str:
    """A value of a card without the marks of Python: lists and tables as words."""
    if isinstance(value, dict):
        return ', '.join(f'{key} {_plain(v)}' for key, v in value.items())
    return ' '.join(map(str, value)) if isinstance(value, list) else str(value)
