"""The pages of docs/families: every family has one, in one form; what they name exists, what they state was measured.

That their code runs and their links resolve is for `test_docs.py`.
"""
import inspect
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import timm

import moe_zoo.layers
import moe_zoo.routing
from moe_zoo.cards import cards
from moe_zoo.layers import DynamicConv2d, LocalExperts, MoEMlp
from moe_zoo.losses import LOSSES, TARGET_LOSSES
from moe_zoo.models.condconv_resnet import CondConvResNet
from moe_zoo.models.deepmoe_blocks import DeepMoEModel, GatedBottleneck
from moe_zoo.models.dyconv import DynamicMobile, DynamicResNet
from moe_zoo.models.fusion import PlainFusionNet
from moe_zoo.models.moe_resnet import MoEResNet
from moe_zoo.models.pmoe import PMoECNN, PMoEWideResNet
from moe_zoo.models.vmoe import VMoE
from moe_zoo.reproduce import FILES, report
from moe_zoo.routing import NoisyTopKRouter

REPOSITORY = Path(__file__).resolve().parents[1]
FOLDER = REPOSITORY / 'docs' / 'families'
EXPERIMENTS = REPOSITORY / 'docs' / 'experiments'
PAGES = sorted(path.stem for path in FOLDER.glob('*.md') if path.stem != 'README')
SECTIONS = ['Equation', 'Use', 'Train', 'Cost', 'Reproduced here', 'Where it differs from the paper', 'References']
# Words in backticks that are names of models: those of our families, and what looks like one of timm's.
OURS = re.compile(r'(?:condconv|dyconv|deepmoe|pmoe|vmoe|softmoe|fusion|moefied)_\w+|moe_resnet\w*')
TIMMS = re.compile(r'(?:wide_)?(?:resnet|convnext|vit|mobilenet|swin|efficientnet|tf_)\w*[\d_]\w*')


def read(page):
    return (FOLDER / f'{page}.md').read_text(encoding='utf-8')


def prose(page):
    """A page without its blocks of code and its tables of claims."""
    return re.sub(r'^```.*?^```$|<!-- claims.*?<!-- /claims -->', '', read(page), flags=re.S | re.M)


def quoted(page):
    return re.findall(r'`([^`\n]+)`', prose(page))


def tables(page):
    """Experiments that the page has tables of, and the verdicts in them."""
    found = report.CLAIMS.findall(read(page))
    names = [name for _, words, _ in found for name in words.split()]
    text = ''.join(re.findall(r'<!-- claims.*?<!-- /claims -->', read(page), flags=re.S))
    return names, set(re.findall(r'\*\*(.+?)\*\*', text))


def test_every_family_has_a_page_that_names_its_models_and_the_index_has_them_all():
    for name, card in cards().items():
        assert f'`{name}`' in read(card['family']), f'{card["family"]}.md does not name {name}'
    linked = re.findall(r'\| \[[^]]+\]\((\w+)\.md\)', read('README'))
    assert sorted(linked) == PAGES


@pytest.mark.parametrize('page', PAGES)
def test_a_page_has_its_sections_a_picture_and_an_equation(page):
    text = read(page)
    assert [title.replace('papers', 'paper') for title in re.findall(r'^## (.*)', text, re.M)] == SECTIONS
    assert text.count('$$\n') >= 2 and text.count('```python\n') >= 1 and text.count('```sh\n') >= 1
    (alt, figure), = re.findall(r'^!\[(.+)\]\((.+)\)$', text, re.M)
    path = (FOLDER / figure).resolve()
    assert path.name == f'family-{page}.svg' and len(alt) > 40
    drawing = ElementTree.parse(path).getroot()
    kinds = {element.tag.partition('}')[2] for element in drawing.iter()}
    assert path.stat().st_size < 15_000 and 'text' in kinds and not kinds & {'image', 'script', 'foreignObject', 'a'}
    style = drawing.find('{*}style').text
    assert 'prefers-color-scheme: dark' in style and 'url(' not in style.replace('url(#head)', '')
    assert set(re.findall(r'var\((--[\w-]+)\)', style)) <= set(re.findall(r'(--[\w-]+):', style))


@pytest.mark.parametrize('page', ['README', *PAGES])
def test_models_and_classes_that_are_named_exist(page):
    known = {*timm.list_models(), *LOSSES, *TARGET_LOSSES}
    names = [word for word in quoted(page) if OURS.fullmatch(word) or TIMMS.fullmatch(word)]
    assert not [name for name in names if name not in known]
    layers = {name for module in (moe_zoo.layers, moe_zoo.routing, timm.layers) for name in dir(module)}
    for name in quoted(page):
        if re.fullmatch(r'[A-Z]\w+(Mlp|Conv2d|Stage|Linear|MoE|Router|Experts|Fusion)', name):
            assert name in layers, f'{page}.md names {name}, which is no layer or router'


@pytest.mark.parametrize('page, classes', [
    ('condconv', (CondConvResNet,)), ('dyconv', (DynamicConv2d, DynamicResNet, DynamicMobile)),
    ('deepmoe', (DeepMoEModel, GatedBottleneck)), ('moe', (MoEResNet,)), ('pmoe', (PMoECNN, PMoEWideResNet)),
    ('vmoe', (VMoE, MoEMlp)), ('mixtures', (LocalExperts, NoisyTopKRouter)), ('fusion', (PlainFusionNet,))])
def test_keywords_and_defaults_are_those_of_the_code(page, classes):
    known = {}  # keyword -> its defaults
    for each in classes:
        for name, parameter in inspect.signature(each.__init__).parameters.items():
            known.setdefault(name, []).append(str(parameter.default))
    lists = re.findall(r'(?:Keywords|keywords|Those)\b[^:]*: (.*?)\.(?:\s[A-Z]|\n\n)', prose(page), re.S)
    named = re.findall(r"`(\w+)`(?: \(`?([\d.]+|True|False|None|'\w+')`?[):;])?", ' '.join(lists))
    assert len(named) >= 3
    for name, value in named:
        assert name in known, f'{page}.md: there is no keyword {name}'
        value = value.strip("'")
        assert not value or any(value == given or same(value, given) for given in known[name]), f'{name}={value}'


def same(value, default):
    """Whether two texts are one number."""
    try:
        return float(value) == float(default)
    except ValueError:
        return False


def test_costs_in_running_text_are_those_of_the_cards():
    known = cards()
    for page in PAGES:
        for name, number in re.findall(r'`(\w+)`,? ([\d,.]+) M MACs', prose(page)):
            assert number == f'{known[name]["cost"]["macs"] / 1e6:,.0f}'


@pytest.mark.parametrize('page', PAGES)
def test_verdicts_are_those_that_were_measured_and_the_text_says_what_is_unwelcome(page):
    assert report.renewed_page(read(page), EXPERIMENTS) == read(page), 'run tools/reproduce.py --publish'
    names, verdicts = tables(page)
    assert set(names) <= set(FILES)
    words = re.search(r'## Reproduced here\n(.*?)\n## ', prose(page), re.S)[1]
    for verdict, said in (('opposite', 'opposite'), ('undecided', 'undecided|nothing could be told'),
                          ('not seen', r'was not\s+seen|no difference that')):
        if verdict in verdicts:
            assert re.search(said, words), f'{page}.md does not say in its text that something is {verdict}'


def test_every_experiment_stands_on_one_page():
    shown = [name for page in PAGES for name in tables(page)[0]]
    assert sorted(shown) == sorted(FILES)


def test_a_table_of_claims_says_what_is_not_published(tmp_path):
    page = 'before\n<!-- claims: condconv vowels -->\nold\n<!-- /claims -->\nafter\n'
    (tmp_path / 'vowels.json').write_bytes((EXPERIMENTS / 'vowels.json').read_bytes())
    text = report.renewed_page(page, tmp_path)
    assert text.startswith('before\n<!-- claims: condconv vowels -->\n| experiment |') and text.endswith('after\n')
    assert '\nold\n' not in text and text.count('| not published here | | |') == 1
    assert '[`vowels`](../experiments/vowels.json), 25 seeds | Four local experts' in text
    assert '| -4.65 points (-5.96 to -3.35) |  | **opposite** |' in text
    assert report.renewed_page(text, tmp_path) == text
