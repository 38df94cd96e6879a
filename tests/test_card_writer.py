"""Only what was measured or counted changes on a card; comments and everything written by hand stay to the letter."""
import tomllib

import pytest

from moe_zoo import card_writer
from moe_zoo.card_writer import with_block, with_cost, with_measured, write_cost, write_measured
from moe_zoo.cards import cards
from moe_zoo.errors import InputError

CARD = """name = "b"   # a comment
family = "f"
summary = 'say "b"'
twin = "resnet18"

[input]
size = [3, 32, 32]

[cost]  # at most; parameters = 5 is a comment
parameters = 1_000
active_parameters=900
macs   =   50
unit = "MACs"

[twin_args]
macs = 7  # of another table
"""
RUN = {
    'dataset': 'digits', 'data': '1,442 train, 355 test', 'images': 355, 'metric': 'top-1', 'mean': 99.25, 'std': 0.33,
    'seeds': [0, 1, 2], 'epochs': 8, 'pixels': 32, 'model_args': {'num_classes': 10, 'channels': [8, 16]},
    'parameters': 1000, 'macs': 30_000_000,
    'twin': {'model': 'resnet18', 'model_args': {}, 'mean': 99.72, 'seeds': [0], 'parameters': 90, 'macs': 20_000_000},
    'config': 'configs/demo/b.yaml', 'command': 'python tools/train_imagenet.py --config configs/demo/b.yaml',
    'commit': 'abc', 'versions': 'torch 2, timm 1', 'hardware': '2 threads',
}
EXPERIMENT = {'experiment': 'e', 'dataset': 'd', 'metric': 'm', 'mean': 1.0, 'std': 2.0, 'seeds': 3, 'verdict': 'seen',
              'commit': 'abc', 'versions': 'torch 2'}


@pytest.fixture
def root(tmp_path):
    """A checkout of one card and a README with both tables."""
    (tmp_path / 'registry' / 'f').mkdir(parents=True)
    (tmp_path / 'registry' / 'f' / 'b.toml').write_text(CARD)
    (tmp_path / 'README.md').write_text('above\n<!-- models -->\n<!-- /models -->\nbetween\n'
                                        '<!-- accuracy -->\nold\n<!-- /accuracy -->\nbelow\n')
    return tmp_path


def card_of(root):
    return (root / 'registry' / 'f' / 'b.toml').read_text()


def test_rows_come_below_what_was_written_by_hand_and_can_be_read_again(root):
    path = write_measured('b', [RUN, EXPERIMENT], root)
    text = path.read_text()
    assert text.startswith(CARD + card_writer.MEASURED)
    assert tomllib.loads(text)['measured'] == [RUN, EXPERIMENT]
    assert 'model_args = { num_classes = 10, channels = [8, 16] }\n' in text  # a line a value


def test_a_row_takes_the_place_of_the_same_one_and_others_stay(root):
    other = {**RUN, 'command': RUN['command'] + ' epochs=9'}
    write_measured('b', [EXPERIMENT, RUN, other], root)
    again = {**RUN, 'mean': 99.5, 'seeds': [0, 1, 2, 3]}
    write_measured('b', [again], root)
    assert tomllib.loads(card_of(root))['measured'] == [EXPERIMENT, again, other]
    before = card_of(root)
    write_measured('b', [again], root)
    assert card_of(root) == before


def test_no_rows_leave_no_trace():
    assert with_measured(with_measured(CARD, [RUN]), []) == CARD


def test_strings_survive_whatever_is_in_them(root):
    odd = {**EXPERIMENT, 'dataset': 'a "quoted" \\ back\nnew line\ttab \x7f \x01 ± ö 🙂', 'metric': "it's"}
    write_measured('b', [odd], root)
    assert tomllib.loads(card_of(root))['measured'] == [odd]


@pytest.mark.parametrize('row, message', [
    ({**RUN, 'epoch': 8}, "A row of runs has no 'epoch'. Did you mean 'epochs'?"),
    ({k: v for k, v in RUN.items() if k not in ('macs', 'commit')},
     'A row of runs lacks macs, commit; moe_zoo.cards says what it holds.'),
    ({**RUN, 'twin': {'model': 'resnet18'}},
     "The 'twin' of a row of runs lacks model_args, mean, seeds, parameters, macs; moe_zoo.cards says what it holds."),
    ({**RUN, 'seeds': [0]}, 'seeds=[0]: a row has std where there are several seeds, and only there.'),
    ({**RUN, 'twin': {**RUN['twin'], 'seeds': [0, 1]}},
     'seeds=[0, 1]: a row has std where there are several seeds, and only there.'),
    ({**EXPERIMENT, 'macs': 3}, "A row of an experiment has no 'macs'."),
    ({**RUN, 'dataset': 'ImageNet-1k'},
     "dataset='ImageNet-1k' with images=355: a row speaks of ImageNet only where all "
     '50,000 images of its validation set were evaluated; name these otherwise.'),
    ({**RUN, 'data': '200 samples of imagenet'},
     "dataset='digits' with images=355: a row speaks of ImageNet only where "
     'all 50,000 images of its validation set were evaluated; name these otherwise.'),
    ({**RUN, 'mean': float('nan')},
     'nan cannot be written on a card: give strings, finite numbers, lists or dictionaries.'),
    ({**RUN, 'model_args': {'drop': None}},
     'None cannot be written on a card: give strings, finite numbers, lists or dictionaries.'),
])
def test_a_row_that_is_not_one_is_refused_and_nothing_written(root, row, message):
    with pytest.raises(InputError) as refused:
        write_measured('b', [RUN, row], root)
    assert str(refused.value) == message
    assert card_of(root) == CARD


def test_imagenet_itself_may_be_named(root):
    write_measured('b', [{**RUN, 'dataset': 'ImageNet-1k', 'images': 50_000}], root)
    assert 'dataset = "ImageNet-1k"' in card_of(root)


def test_handwriting_among_the_rows_is_not_lost(root):
    path = write_measured('b', [RUN], root)
    path.write_text(text := path.read_text() + '# a note\n')
    with pytest.raises(InputError, match=r"The card '.*b\.toml' was edited by hand below the line '# Everything"):
        write_measured('b', [RUN], root)
    assert path.read_text() == text
    path.write_text(with_measured(CARD, [EXPERIMENT, RUN]).replace('mean = 1.0', 'mean = 1.5'))  # a number is no note
    write_measured('b', [RUN], root)
    assert cards(root / 'registry')['b']['measured'][0]['mean'] == 1.5


def test_an_interrupted_write_leaves_the_card_as_it_was(root, monkeypatch):
    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr('moe_zoo.errors.os.replace', full)
    with pytest.raises(InputError, match='No space left'):
        write_measured('b', [RUN], root)
    assert card_of(root) == CARD and [p.name for p in (root / 'registry' / 'f').iterdir()] == ['b.toml']


def test_costs_change_digits_alone(root):
    write_cost('b', {'parameters': 12, 'active_parameters': 11, 'macs': 1000}, root)
    assert card_of(root) == CARD.replace('1_000', '12').replace('=900', '=11').replace('=   50', '=   1000')
    with pytest.raises(InputError, match=r"no number 'flops' in its table \[cost\], where there must be one\."):
        with_cost(CARD, {'flops': 1})


def test_an_unknown_card_is_told_its_neighbours(root):
    with pytest.raises(InputError, match="There is no model 'bb' in moe_zoo"):
        write_cost('bb', {'macs': 1}, root)


def test_the_readme_follows_the_cards(root):
    write_measured('b', [RUN], root)
    text = (root / 'README.md').read_text()
    assert text.startswith('above\n<!-- models -->\n| model | ') and text.endswith('<!-- /accuracy -->\nbelow\n')
    assert '| `b` | 32 | 1.0 k | 0.9 k | 0.1 k | `resnet18` with `macs=7` |\n<!-- /models -->\nbetween\n' in text
    assert 'old' not in text and '|  | 30 M | `b` | 32 | 99.25 ± 0.33 | 3 | `configs/demo/b.yaml` |' in text
    write_cost('b', {'macs': 20_000_000}, root)
    assert '| 0.9 k | 20 M | `resnet18`' in (root / 'README.md').read_text()


def test_a_block_is_replaced_where_it_is_and_nowhere_else():
    text = 'a\n<!-- x -->\n1\n<!-- /x -->\n<!-- y -->\n2\n<!-- /y -->\n'
    assert with_block(text, 'x', '\\1\n') == 'a\n<!-- x -->\n\\1\n<!-- /x -->\n<!-- y -->\n2\n<!-- /y -->\n'
    assert with_block(text, 'z', 'new\n') == text


def test_a_wheel_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(card_writer, '__file__', str(tmp_path / 'moe_zoo' / 'card_writer.py'))
    with pytest.raises(InputError, match=r'are written in a checkout, and moe_zoo runs from'):
        write_cost('b', {'macs': 1})
