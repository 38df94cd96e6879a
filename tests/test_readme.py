"""The README: its examples run, its commands exist, its table of models is what the cards say."""
import re
from pathlib import Path

import pytest

from moe_zoo.cards import cards

README = Path(__file__).resolve().parents[1] / 'README.md'


def blocks(language):
    return re.findall(rf'```{language}\n(.*?)```', README.read_text(encoding='utf-8'), re.S)


def between(name):
    return re.search(rf'<!-- {name} -->\n(.*?)<!-- /{name} -->', README.read_text(encoding='utf-8'), re.S)[1]


def amount(number):
    return f'{number / 1e6:,.1f} M' if number >= 1e5 else f'{number / 1e3:,.1f} k'


def model_rows():
    """The rows that the cards ask for, in millions but for the smallest."""
    rows = []
    for name, card in sorted(cards().items(), key=lambda item: (item[1]['family'], item[1]['cost']['parameters'])):
        cost = card['cost']
        macs = f'{cost["macs"] / 1e6:,.0f} M' if cost['macs'] >= 1e7 else amount(cost['macs'])
        twin = f'`{card["twin"]}`' if 'twin' in card else 'it is one'
        keywords = card.get('twin_args', {})
        if keywords:
            twin += ' with ' + ', '.join(f'`{k}={v!r}`' for k, v in keywords.items())
        figures = [amount(cost[key]) for key in ('parameters', 'active_parameters')]
        rows.append(f'| `{name}` | {card["input"]["size"][-1]} | {" | ".join(figures)} | {macs} | {twin} |')
    return rows


def test_the_table_of_models_is_what_the_cards_say():
    table = between('models').strip().splitlines()
    assert table[2:] == model_rows()


def test_python_examples_run_in_order(monkeypatch, repository):
    monkeypatch.chdir(repository)
    names = {}
    plain, detection = [], []
    for block in blocks('python'):
        (detection if 'detectron2' in block else plain).append(block)
    assert len(plain) == 6 and len(detection) == 1
    for block in plain:
        exec(block, names)
    assert [maps.shape for maps in names['maps']] == 3 * [(8, 128, 16, 16)]
    assert names['chosen'].shape == (100, 2)
    assert names['cost'].macs_max > 0 and names['loss'].requires_grad


def test_the_detectron2_example_runs(monkeypatch, repository):
    pytest.importorskip('detectron2')
    monkeypatch.chdir(repository)
    block = next(block for block in blocks('python') if 'detectron2' in block)
    names = {}
    exec(block.replace('detector = ', "cfg.MODEL.DEVICE = 'cpu'\ndetector = "), names)
    assert type(names['detector']).__name__ == 'MoERetinaNet'


def test_every_file_and_command_that_is_named_exists(repository):
    text = README.read_text(encoding='utf-8')
    paths = set(re.findall(r'\b((?:tools|configs|tests|registry)/[\w./-]*\w)', text))
    assert len(paths) > 10
    assert not [p for p in paths if not (repository / p).exists() and 'NAME' not in p]
    from moe_zoo.cli import OWN, TOOLS
    used = set(re.findall(r'`moe-zoo ([a-z][\w-]*)', text))
    assert used and used <= {*OWN, *TOOLS}
