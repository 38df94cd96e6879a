"""Cards say what the models are: one card a registered model, with costs that a count repeats."""
import itertools
import re
from pathlib import Path

import pytest
import timm

from moe_zoo import cards_cli  # registers the models
from moe_zoo.card_writer import check_row, measured_rows, says_imagenet, with_measured
from moe_zoo.cards import card, cards, dense_twin
from moe_zoo.cards_cli import drifts
from moe_zoo.errors import InputError
from moe_zoo.resources import folder

REGISTERED = sorted(
    name for name in timm.list_models() if timm.models.model_entrypoint(name).__module__.startswith('moe_zoo.'))


def test_every_model_has_a_card_and_every_card_a_model():
    assert sorted(cards()) == REGISTERED


def test_names_are_free_in_timm():
    # read from its files: in the registry of this process ours would have taken the place of theirs
    files = (Path(timm.__file__).parent / 'models').glob('*.py')
    theirs = {name for path in files for name in re.findall(r'@register_model\s+def (\w+)\(', path.read_text())}
    assert len(theirs) > 1000 and 'resnet50' in theirs
    assert not theirs & set(REGISTERED)


@pytest.mark.parametrize('name', REGISTERED)
def test_a_card_says_what_a_count_finds_and_its_twin_and_recipe_work(name):
    assert list(drifts(card(name))) == []


@pytest.mark.parametrize('name', REGISTERED)
def test_a_card_is_complete(name):
    entry = card(name)
    path, = folder('registry').glob(f'*/{name}.toml')
    assert (entry['name'], entry['family']) == (name, path.parent.name)
    assert 10 < len(entry['summary']) <= 100 and '\n' not in entry['summary']
    paper = entry['paper']
    assert all(isinstance(paper[key], str) and paper[key] for key in ('title', 'authors', 'venue', 'arxiv', 'bibtex'))
    assert 2016 < paper['year'] < 2030
    assert paper['bibtex'].startswith('@')
    assert entry['weights']['note']
    assert all(isinstance(text, str) and text for text in entry['deviations'])
    for row in entry.get('published', []):
        assert row['metric'] and row['value'] and row['source']
        assert not row['source'].lstrip('[').startswith('M-'), 'a recalled figure'
    rows = entry.get('measured', [])
    assert measured_rows(path.read_text(encoding='utf-8'), path) == rows  # written by tools, all of them
    for row in rows:
        check_row(row)


@pytest.mark.parametrize('name', REGISTERED)
def test_no_card_says_imagenet_of_a_number_that_was_not_measured_there(name):
    entry = card(name)
    for row in entry.get('measured', []):
        assert not says_imagenet(row) or (row['dataset'], row['images']) == ('ImageNet-1k', 50_000)
    ours = [entry['summary'], entry['weights']['note'], *entry['deviations']]
    assert not [text for text in ours if re.search('imagenet', text, re.I) and re.search(r'\d ?(%|points?\b)', text)]


def test_a_dense_model_is_the_twin_of_another_and_twins_are_smaller():
    known = cards()
    twins = {entry.get('twin') for entry in known.values()}
    for name, entry in known.items():
        if 'twin' not in entry:
            assert name in twins
            with pytest.raises(InputError, match=f"'{name}' is a dense network itself and has no twin"):
                dense_twin(entry)
        elif name != 'pmoe_wrn10_10':  # whose experts see a quarter of the channels of the convolution they replace
            twin, keywords = dense_twin(entry)
            model = timm.create_model(twin, device='meta', **keywords)
            assert sum(p.numel() for p in model.parameters()) < entry['cost']['parameters']


# --- BibTeX -----------------------------------------------------------------------------------------------------------

NEEDED = {'inproceedings': {'booktitle'}, 'article': {'journal'}, 'misc': {'eprint'}}


def fields(body):
    """`name = {value}, ...` of a BibTeX entry as a dictionary; braces in values are balanced."""
    found, rest = {}, body
    while rest := rest.strip().removeprefix(',').strip():
        name, rest = re.fullmatch(r'(\w+)\s*=\s*(\{.*)', rest, re.S).groups()
        depths = list(itertools.accumulate({'{': 1, '}': -1}.get(letter, 0) for letter in rest))
        end = depths.index(0)
        found[name.lower()], rest = rest[1:end], rest[end + 1:]
        assert not rest.strip() or rest.lstrip().startswith(',')
    return found


def test_the_bibtex_reader_knows_an_entry_that_is_none():
    assert fields('title = {A {B} c}, year = {2020}') == {'title': 'A {B} c', 'year': '2020'}
    for wrong in ('title = {A', 'title {A}', 'title = {A} year = {2020}'):
        with pytest.raises((AssertionError, AttributeError, ValueError)):
            fields(wrong)


def test_bibtex_is_valid_and_a_key_has_one_entry():
    entries = {}
    for name, entry in cards().items():
        text = entry['paper']['bibtex'].strip()
        kind, key, body = re.fullmatch(r'@(\w+)\{([\w:-]+),\s(.*)\}', text, re.S).groups()
        found = fields(body)
        assert {'title', 'author', 'year'} | NEEDED[kind] <= found.keys(), name
        assert all(author.count(',') == 1 for author in re.split(r'\sand\s', found['author'])), name  # Last, First
        assert found['year'] == str(entry['paper']['year'])
        assert plain(found['title']) == plain(entry['paper']['title'])
        assert not re.search(r'(?<!\\)[%&#_$~^]', ''.join(found.values())), name  # LaTeX would read them otherwise
        assert entries.setdefault(key, text) == text


def plain(title):
    return re.sub(r'[\s{}]+', ' ', title.replace('{', '').replace('}', '')).strip()


# --- moe-zoo cards ----------------------------------------------------------------------------------------------------

DENSE = 'configs/mnist/pmoe_cnn_dense.yaml'
RUN = {
    'dataset': 'digits', 'data': '80 train, 20 test', 'images': 20, 'metric': 'top-1', 'mean': 90.0, 'seeds': [0],
    'epochs': 1, 'pixels': 56, 'model_args': {'patch_size': 14}, 'parameters': 1, 'macs': 2,
    'twin': {'model': 'pmoe_cnn_dense', 'model_args': {'patch_size': 14}, 'mean': 80.0, 'seeds': [0], 'parameters': 3,
             'macs': 4},
    'config': 'configs/mnist/pmoe_cnn.yaml', 'command': 'c', 'commit': 'c', 'versions': 'v', 'hardware': 'h'}


@pytest.mark.parametrize('change, told', [
    (lambda c: c['cost'].update(macs=288593), 'pmoe_cnn: the card says cost.macs = 288593, a count finds 288592.'),
    (lambda c: c['cost'].update(active_parameters=1),
     'pmoe_cnn: the card says cost.active_parameters = 1, a count finds 37632.'),
    (lambda c: c.update(name='pmoe_cnnn'), 'pmoe_cnnn cannot be built: Unknown model (pmoe_cnnn)'),
    (lambda c: c.update(twin='zzz'), 'pmoe_cnn: its dense twin zzz cannot be built: Unknown model (zzz)'),
    (lambda c: c.update(twin='resnet18', twin_args={'width': 3}),
     "pmoe_cnn: its dense twin resnet18 cannot be built: ResNet.__init__() got an unexpected keyword argument 'width'"),
    (lambda c: c.update(twin='pmoe_cnn'), 'pmoe_cnn: its twin pmoe_cnn routes.'),
    (lambda c: c.pop('twin'), 'pmoe_cnn: it routes and names no twin.'),
    (lambda c: c['recipe'].update(config='configs/mnist/pmoe_cnm.yaml', command='configs/mnist/pmoe_cnm.yaml'),
     "pmoe_cnn: its recipe cannot be used: There is no config file 'configs/mnist/pmoe_cnm.yaml'. Did you mean "
     "'pmoe_cnn' or 'pmoe_cnn_dense'?"),
    (lambda c: c['recipe'].update(config=DENSE, command=f'python tools/train_imagenet.py --config {DENSE}'),
     f"pmoe_cnn: its recipe '{DENSE}' trains pmoe_cnn_dense."),
    (lambda c: c['recipe'].update(command='train'),
     "pmoe_cnn: the command 'train' does not train its recipe 'configs/mnist/pmoe_cnn.yaml'."),
    (lambda c: c['recipe'].update(command='rm x; ' + c['recipe']['command']),
     "pmoe_cnn: the command 'rm x; python tools/train_imagenet.py --config configs/mnist/pmoe_cnn.yaml --data-dir DIR' "
     "does not train its recipe 'configs/mnist/pmoe_cnn.yaml'."),
    (lambda c: c.update(family='vmoe'), "pmoe_cnn: the card says family = 'vmoe' and lies in the folder 'pmoe'."),
    (lambda c: (c['cost'].pop('macs'), c.pop('recipe')),
     'pmoe_cnn: the card lacks cost.macs, recipe.config, recipe.command.'),
    (lambda c: c['cost'].update(unit='FLOPs'), "pmoe_cnn: the card says cost.unit = 'FLOPs', costs are in 'MACs'."),
    (lambda c: c.update(measured=[{**RUN, 'dataset': 'ImageNet-1k'}]),
     "pmoe_cnn: measured[0]: dataset='ImageNet-1k' with images=20: a row speaks of ImageNet only where all 50,000 "
     'images of its validation set were evaluated; name these otherwise.'),
])
def test_every_drift_is_told_in_a_sentence(change, told):
    entry = card('pmoe_cnn')
    assert list(drifts(entry)) == []
    change(entry)
    assert list(drifts(entry)) == [told]


def test_another_input_size_is_told():
    entry = card('dyconv_resnet10')
    entry['input']['size'] = [3, 192, 192]
    macs, size = drifts(entry)
    assert macs.startswith(f'dyconv_resnet10: the card says cost.macs = {entry["cost"]["macs"]}, a count finds ')
    assert size == 'dyconv_resnet10: the card says input size [3, 192, 192], the model says [3, 224, 224].'


@pytest.fixture
def root(tmp_path, monkeypatch, repository):
    """A checkout with a card whose MACs are wrong, those of a recorded run and its twin included."""
    path = tmp_path / 'registry' / 'pmoe' / 'pmoe_cnn.toml'
    path.parent.mkdir(parents=True)
    text = (repository / 'registry' / 'pmoe' / 'pmoe_cnn.toml').read_text().replace('macs = 288592', 'macs = 1  # one')
    path.write_text(with_measured(text, [RUN]))
    (tmp_path / 'README.md').write_text('<!-- models -->\n<!-- /models -->\n<!-- accuracy -->\n<!-- /accuracy -->\n')
    monkeypatch.setattr('moe_zoo.cards.folder', lambda name: tmp_path / 'registry')
    monkeypatch.setattr('moe_zoo.cards_cli.checkout', lambda: tmp_path)
    return tmp_path


def test_check_tells_drifts_and_write_mends_them(root, capsys):
    # 16 patches of 14 x 14: 8 routers see all, 8 experts of 5 filters see 6 each, 40 responses make 2 logits
    macs, dense = 8 * 16 * 196 + 8 * 6 * 5 * 196 + 80, 16 * 40 * 196 + 80
    told = [('cost.macs', 1, 288592), ('measured[0].parameters', 1, 48 * 196), ('measured[0].macs', 2, macs),
            ('measured[0].twin.parameters', 3, 40 * 196), ('measured[0].twin.macs', 4, dense)]
    assert cards_cli.main(['--check', 'pmoe_cnn']) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines() == [
        f'error: pmoe_cnn: the card says {where} = {stated}, a count finds {found}.' for where, stated, found in told]
    assert not printed.out
    assert list(cards_cli.readme_drifts(root)) == [
        f"README.md: the table '{name}' is not what the cards say; `moe-zoo cards --write` renews it."
        for name in ('models', 'accuracy')]

    path = root / 'registry' / 'pmoe' / 'pmoe_cnn.toml'
    before = path.read_text()
    assert cards_cli.main(['--write']) == 0
    assert capsys.readouterr().out.splitlines() == [
        *(f'pmoe_cnn: {where} {stated} -> {found}' for where, stated, found in told), 'README.md: tables renewed']
    after = path.read_text()
    assert 'macs = 288592  # one\n' in after and len(after.splitlines()) == len(before.splitlines())
    assert sum(a != b for a, b in zip(before.splitlines(), after.splitlines())) == 4  # a twin is one line
    assert list(cards_cli.readme_drifts(root)) == []
    assert cards_cli.main(['--check', 'pmoe_cnn']) == 0
    assert cards_cli.main(['--write', 'pmoe_cnn']) == 0
    assert capsys.readouterr().out == '1 card: everything is as a count finds it.\n1 card: nothing to write.\n'


def test_a_registered_model_without_a_card_is_told(root, monkeypatch, capsys):
    monkeypatch.setattr(cards_cli, 'drifts', lambda entry: [])
    monkeypatch.setattr(cards_cli, 'readme_drifts', lambda root: [])
    assert cards_cli.main(['--check']) == 2
    lines = capsys.readouterr().err.splitlines()
    assert 'error: pmoe_cnn_dense is registered and has no card.' in lines and len(lines) == len(REGISTERED) - 1


# --- Names and files --------------------------------------------------------------------------------------------------

def test_an_unknown_name_is_told_its_neighbours():
    with pytest.raises(InputError, match=r"no model 'condconv_resnet5' in moe_zoo\. Did you mean 'condconv_resnet50'"):
        card('condconv_resnet5')
    with pytest.raises(InputError, match=r"no model 'zzz' in moe_zoo\. `moe-zoo list` shows all names\."):
        card('zzz')


def test_a_broken_card_is_named(tmp_path, monkeypatch):
    (tmp_path / 'family').mkdir()
    (tmp_path / 'family' / 'torn.toml').write_text('name = "torn')
    monkeypatch.setattr('moe_zoo.cards.folder', lambda name: tmp_path)
    with pytest.raises(InputError, match=r"The card '.*torn\.toml' is not valid TOML: "):
        card('torn')
