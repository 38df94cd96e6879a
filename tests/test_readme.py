"""The README: its tables of models and of accuracy are what the cards say. Its code and links: test_docs.py."""
from moe_zoo.card_tables import accuracy_table
from moe_zoo.cards import cards
from moe_zoo.cards_cli import readme_drifts


def test_the_tables_of_models_and_accuracy_are_what_the_cards_say(repository):
    text = (repository / 'README.md').read_text(encoding='utf-8')
    assert '<!-- models -->\n| model |' in text
    assert '<!-- accuracy -->\n| data |' in text or not accuracy_table(cards())
    assert list(readme_drifts(repository)) == []
