"""Cards say what the models are: one card a registered model, with costs that a count repeats."""
import re
from pathlib import Path

import pytest
import timm
import torch
import yaml

import moe_zoo  # noqa: F401 - registers the models
from moe_zoo.analysis import count
from moe_zoo.cards import card, cards, dense_twin
from moe_zoo.errors import InputError
from moe_zoo.layers import RoutedLayer
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
def test_costs_are_what_a_count_finds(name):
    model = timm.create_model(name, device='meta').eval()
    size = tuple(card(name)['input']['size'])
    assert model.pretrained_cfg['input_size'] == size
    cost = count(model, torch.empty(1, *size, device='meta'))
    assert not cost.uncounted
    stated = card(name)['cost']
    assert (stated['parameters'], stated['active_parameters'], stated['macs'], stated['unit']) == (
        cost.parameters, cost.active_parameters, cost.macs_max, 'MACs')


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
    for row in entry.get('measured', []):
        recipe = 'experiment' if 'experiment' in row else 'epochs'  # of tools/reproduce.py, or the card's own
        assert {'dataset', 'metric', 'mean', 'std', 'seeds', recipe, 'commit', 'versions'} <= set(row)


@pytest.mark.parametrize('name', REGISTERED)
def test_the_recipe_of_a_card_trains_this_model(name):
    recipe = card(name)['recipe']
    config = recipe['config']
    assert config.startswith('configs/') and config in recipe['command']
    settings = yaml.safe_load((folder('configs') / config.removeprefix('configs/')).read_text())
    assert settings['model'] == name


@pytest.mark.parametrize('name', REGISTERED)
def test_the_dense_twin_routes_nothing_and_is_smaller(name):
    entry = card(name)
    if 'twin' not in entry:  # dense itself: the twin of another
        assert not any(isinstance(m, RoutedLayer) for m in timm.create_model(name, device='meta').modules())
        assert name in {other.get('twin') for other in cards().values()}
        with pytest.raises(InputError, match=f"'{name}' is a dense network itself and has no twin"):
            dense_twin(entry)
        return
    twin_name, keywords = dense_twin(entry)
    twin = timm.create_model(twin_name, device='meta', **keywords)
    assert not any(isinstance(module, RoutedLayer) for module in twin.modules())
    if name != 'pmoe_wrn10_10':  # whose experts see a quarter of the channels of the convolution that they replace
        assert sum(p.numel() for p in twin.parameters()) < entry['cost']['parameters']


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
