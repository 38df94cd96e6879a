"""The README: its table of models is what the cards say. Its code, commands and links: test_docs.py."""
import re
from pathlib import Path

from moe_zoo.cards import cards

README = Path(__file__).resolve().parents[1] / 'README.md'


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
