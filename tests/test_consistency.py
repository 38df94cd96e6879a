"""How often routes change: against routers whose answer is known, the figure, the section and the command."""
import json

import pytest
import timm
import torch
from torch import nn

from moe_zoo.analysis.consistency import (
    chosen_sets,
    consistency_section,
    describe_consistency,
    find_grid,
    locate_pairs,
    measure_consistency,
)
from moe_zoo.analysis.page import Page
from moe_zoo.engine.analyze_experts import main
from moe_zoo.errors import InputError
from moe_zoo.routing import Routing, record

SIZE, SIDE = 16, 4  # images of 4 x 4 patches of 4 pixels, 4 experts


class Router(nn.Module):
    """Sends every patch to one expert by a rule on its mean colours and its place, (B, 4, 4, C) and (4, 4, 2)."""

    def __init__(self, rule, tokens: bool = False):
        super().__init__()
        self.rule, self.tokens = rule, tokens

    def forward(self, x):
        means = nn.functional.avg_pool2d(x, SIZE // SIDE).permute(0, 2, 3, 1)
        places = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing='ij'), dim=-1)
        expert = self.rule(means, places.expand(len(x), -1, -1, -1)).long()  # (B, 4, 4)
        shape = tuple(expert.shape)
        if self.tokens:  # behind a class token that always goes to expert 0
            expert = torch.cat([torch.zeros(len(x), 1, dtype=torch.long), expert.flatten(1)], dim=1)
            shape = (len(x), 1 + SIDE * SIDE)
        logits = nn.functional.one_hot(expert.flatten(), 4).float()
        weights, indices = logits.max(dim=1, keepdim=True)
        record(self, Routing(logits, logits, weights, indices, shape=shape))
        return x


class Whole(nn.Module):
    def forward(self, x):
        logits = torch.eye(4)[:1].expand(len(x), 4)
        record(self, Routing(logits, logits, logits, shape=(len(x),)))
        return x


def by_column(means, places):
    return places[..., 1]


def by_colour(means, places):
    return means.argmax(dim=-1)


def mosaics(count: int = 6) -> torch.Tensor:
    """Images whose patches have one of four colours, in four channels."""
    colours = nn.functional.one_hot(torch.randint(0, 4, (count, SIDE, SIDE)), 4).float().permute(0, 3, 1, 2)
    return nn.functional.interpolate(colours, scale_factor=SIZE // SIDE)


def flipped(rule, images=None, tokens=False, **options):
    images = mosaics() if images is None else images
    return measure_consistency(
        nn.Sequential(Router(rule, tokens)), images.split(4), area=(1.0, 1.0), hflip=1.0, **options)


@pytest.mark.parametrize('tokens', [False, True])
def test_routes_by_place(tokens):
    """The column decides, of four. In a flip the column c meets 3 - c: all 6 * 16 pairs change; by chance two patches
    share a column in a quarter of the cases, 3/4. Noise changes nothing. The class token is not counted."""
    result = flipped(by_column, tokens=tokens, sigmas=(0.5,))
    layer, = result['layers']
    assert layer['crop'] == {'changed': 1.0, 'chance': 0.75, 'pairs': 96}
    assert layer['noise'] == [{'sigma': 0.5, 'changed': 0.0, 'chance': 0.75, 'pairs': 96}]
    assert (layer['experts'], layer['selected'], layer['rows'], layer['columns']) == (4, 1, 4, 4)
    assert result['overall'] == {'crop': layer['crop'], 'noise': layer['noise']} and result['images'] == 6


def test_routes_by_content():
    """The colour decides and goes along with the flip. Chance: 1 - sum of the squared shares of the colours."""
    images = mosaics()
    result = flipped(by_colour, images, sigmas=(0.0, 1.0, 100.0))
    shares = images.mean(dim=(0, 2, 3))  # how much of each colour
    crop = result['overall']['crop']
    assert crop['changed'] == 0 and crop['chance'] == pytest.approx(1 - shares.square().sum().item())
    still, some, lost = (each['changed'] for each in result['overall']['noise'])
    # Noise of a patch has a deviation of 1/4 of a pixel's; at 100 nothing of the colours is left: 3/4 by chance.
    assert still == 0 < some < lost and abs(lost - 0.75) < 0.15


def test_everything_to_one_expert():
    result = flipped(lambda means, places: torch.zeros(means.shape[:-1]))
    assert result['overall']['crop'] == {'changed': 0.0, 'chance': 0.0, 'pairs': 96}


def test_crops_without_flip():
    """Quarters of the area: routes by colour stay but near the edges of colours, routes by column do not. Several
    patches of the crop share one of the image: all of its 16 are compared."""
    found = {}
    for rule in (by_colour, by_column):
        images = mosaics(40)
        result = measure_consistency(nn.Sequential(Router(rule)), [images], area=(0.25, 0.25), hflip=0.0)
        crop = result['overall']['crop']
        assert crop['pairs'] == 40 * 16
        found[rule] = crop['changed']
    assert found[by_colour] < 0.3 < 0.5 < found[by_column]


def test_chance_is_the_mean_over_permutations():
    """Dealt out a thousand times to the patches of all images."""
    rule = lambda means, places: (means.argmax(dim=-1) + places[..., 1]) % 3  # noqa: E731
    images = mosaics()
    chance = flipped(rule, images)['overall']['crop']['chance']
    place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing='ij'), dim=-1)
    first, second = (rule(x[:, :, ::4, ::4].permute(0, 2, 3, 1), place).flatten() for x in (images, images.flip(3)))
    dealt = torch.stack([(first != second[torch.randperm(96)]).double().mean() for _ in range(1000)])
    assert chance == pytest.approx(dealt.mean().item(), abs=4 * dealt.std().item() / 1000 ** 0.5)


def test_sets_of_every_kind_of_choice():
    """K = 2 in any order; experts that choose: those that took the item; all mixed: the one of largest weight."""
    logits = torch.tensor([[1., 3., 2.], [4., 0., 5.]])
    indices = torch.tensor([[1, 2], [2, 0]])
    two = Routing(logits, logits, torch.ones(2, 2), indices, kept=torch.tensor([[True, False], [True, True]]))
    assert chosen_sets(two).tolist() == [[False, True, True], [True, False, True]]  # room is not the router's choice
    order = indices[:, [1, 0]]
    assert torch.equal(chosen_sets(two._replace(indices=order)), chosen_sets(two))
    three = torch.tensor([[1, 2, 0], [2, 0, 1]])
    taken = torch.tensor([[True, False, False], [False, False, False]])
    chosen = Routing(logits, logits, torch.ones(2, 3), three, kept=taken, by_expert=True)
    assert chosen_sets(chosen).tolist() == [[False, True, False], [False, False, False]]
    assert chosen_sets(Routing(logits, logits, logits)).tolist() == [[False, True, False], [False, False, True]]


@pytest.mark.parametrize('keywords, selected', [
    (dict(num_selected=2), 2), (dict(router='expert_choice', group_images=1), None), (dict(router='soft'), None)])
def test_real_models(keywords, selected):
    """JSON, the same numbers again, the training mode given back; nothing changes where nothing is changed."""
    model = timm.create_model(
        'vmoe_vit_s', img_size=32, patch_size=8, embed_dim=16, depth=4, num_heads=2, moe_layers=[1, 3], num_experts=4,
        **keywords).train()
    batches = [(torch.randn(3, 3, 32, 32), torch.zeros(3))] * 2
    result = measure_consistency(model, batches, sigmas=(0.0, 0.3))
    assert model.training and model.blocks[1].training
    assert json.loads(json.dumps(result)) == result == measure_consistency(model, batches, sigmas=(0.0, 0.3))
    assert [layer['layer'] for layer in result['layers']] == ['blocks.1.mlp', 'blocks.3.mlp']
    assert result['layers'][0]['selected'] == selected and result['layers'][0]['rows'] == 4
    still, noised = result['overall']['noise']
    assert still['changed'] == 0 < noised['changed'] and noised['pairs'] == 2 * 6 * 16
    assert 0 < result['overall']['crop']['changed'] <= 1
    assert measure_consistency(model, batches, seed=1) != result


def test_layers_that_decide_once_an_image():
    both = nn.Sequential(Whole(), Router(by_column))
    result = measure_consistency(both, [mosaics()])
    assert result['left_out'] == ['0'] and [layer['layer'] for layer in result['layers']] == ['1']
    assert '`0`' in consistency_section([('m', result)]).blocks[-1]
    with pytest.raises(InputError, match='model: Sequential routes no patches, so that there are no routes to compare'):
        measure_consistency(nn.Sequential(Whole()), [mosaics()])
    with pytest.raises(InputError, match='loader is empty'):
        measure_consistency(both, [])
    with pytest.raises(InputError, match="layer='0' is not one of those that route patches: 1"):
        locate_pairs(both, mosaics(), layer='0')


def test_grids():
    assert find_grid((2, 197), (224, 224)) == (14, 14, 1) and find_grid((2, 7, 5), (224, 160)) == (7, 5, 0)
    with pytest.raises(InputError, match=r'shape \(2,\) has no grid of patches'):
        find_grid((2,), (224, 224))


def flipped_pairs(rule, images, experts=4):
    return locate_pairs(nn.Sequential(Router(rule)), images, area=(1.0, 1.0), hflip=1.0)


def test_located_pairs_say_which_expert_is_where():
    pairs = flipped_pairs(by_column, mosaics(2))
    rows = [[0, 1, 2, 3]] * 4
    assert [image['image'] for image in pairs['images']] == [rows, rows]  # both views are routed by their columns
    assert pairs['images'][0]['crop'] == rows and pairs['images'][0]['changed'] == [[True] * 4] * 4
    images = mosaics(3)
    for image, found in zip(images, flipped_pairs(by_colour, images)['images']):
        colours = image[:, ::4, ::4].argmax(dim=0)
        assert found['image'] == colours.tolist() and found['crop'] == colours.flip(1).tolist()
        assert found['changed'] == [[False] * 4] * 4
    quarter = locate_pairs(nn.Sequential(Router(by_colour)), images, area=(0.25, 0.25))
    empty = [expert is None for image in quarter['images'] for line in image['image'] for expert in line]
    assert sum(empty) >= 3 * 6  # at least six patches of every image are outside of the crop
    assert json.loads(json.dumps(quarter)) == quarter
    two = nn.Sequential(Router(by_column), Router(by_colour))
    last = locate_pairs(two, images, area=(1.0, 1.0), hflip=1.0)
    assert last['images'] == flipped_pairs(by_colour, images)['images']  # of several layers the last one
    assert locate_pairs(two, images, '0', (1.0, 1.0), 1.0)['images'] == flipped_pairs(by_column, images)['images']


def test_figure(tmp_path):
    """Two models side by side; frames and numbers; with more than eight experts the eight most chosen have colours."""
    pytest.importorskip('matplotlib')
    from moe_zoo.analysis.figures import COLOURS, save
    from moe_zoo.analysis.view_figures import OTHERS, views_figure
    images = mosaics(2)
    named = [('before', flipped_pairs(by_column, images)), ('after', flipped_pairs(by_colour, images))]
    figure = views_figure(named, images[:, :3])
    axes = figure.axes
    assert len(axes) == 8
    assert [a.get_title() for a in axes[:4]] == ['before: image', 'before: crop', 'after: image', 'after: crop']
    assert [len(a.patches) for a in axes[:4]] == [0, 16, 0, 0]  # frames: every column has another expert in a flip
    assert [t.get_text() for t in axes[0].texts[:4]] == ['0', '1', '2', '3']
    assert save(figure, tmp_path / 'views.png').stat().st_size > 1000
    words = [t.get_text() for t in figure.legends[0].get_texts()]
    assert words == ['expert 0', 'expert 1', 'expert 2', 'expert 3', 'experts differ']

    many = flipped_pairs(by_column, images[:1])
    many['experts'] = 12
    line = [[0, 2, 3, 4], [5, 6, 7, 8], [9, 0, 2, 3], [4, 5, 6, 7]]  # 8 and 9 once, all others twice
    many['images'][0].update(image=line, crop=[[11] * 4] * 4)
    drawn = views_figure([('many', many)], images[:1, :1])
    words = [t.get_text() for t in drawn.legends[0].get_texts()]
    assert words[:2] == ['expert 0', 'expert 2'] and 'expert 9' not in words and 'other experts' in words
    assert len(words) == len(COLOURS) + 2 and OTHERS not in COLOURS
    with pytest.raises(InputError, match='results of the same 1 images and the same crops'):
        views_figure(named, images[:1])


def test_section():
    """One model, and one before and after: numbers by layer, the curve of the noise, a headline that says it."""
    before, after = flipped(by_column), flipped(by_colour)
    one = consistency_section([('m', before)])
    assert one.headline == (
        'Patches that show the same thing get other experts after crop and flip: 100.0 % of them (by chance 75.0 %).')
    assert one.blocks[2].rows == [['`0`', 4, 1, '4 x 4', '100.0 %', '75.0 %']]
    two = consistency_section([('before', before), ('after', after)], b'\x89PNG', 'what it shows')
    assert 'before: 100.0 % of them' in two.headline and 'after: 0.0 % of them' in two.headline
    assert [row[0] for row in two.blocks[2].rows] == ['before: `0`', 'after: `0`']
    assert two.blocks[3].alt.startswith('Share of patches whose experts change under noise. before: 0.0 % at 0.05')
    assert two.blocks[4] == 'what it shows' and 'Do routes stay' in Page('t', '', [two]).html()
    quiet = consistency_section([('m', flipped(by_column, sigmas=()))])
    assert len(quiet.blocks) == 3
    nothing = {'overall': {'crop': {'changed': None, 'chance': None, 'pairs': 0}}}
    assert describe_consistency([('m', nothing)]).endswith('nothing to compare.')


MODEL = dict(patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=4)
SHORT = ['--no-force', '--max-images', '30', '--images', '2']


def write_checkpoint(path, size: int):
    """Random weights that look like a run of train-imagenet on the digits."""
    model = timm.create_model('vmoe_vit_s', img_size=size, num_classes=10, **MODEL)
    args = dict(model='vmoe_vit_s', img_size=size, num_classes=10, model_kwargs=MODEL, dataset='digits', batch_size=16)
    torch.save({'state_dict': model.state_dict(), 'args': args}, path)
    return str(path)


def test_the_command(tmp_path, capsys):
    """Beside an untrained one: numbers in the JSON, a section on the page, a picture, a sentence."""
    torch.manual_seed(1)
    checkpoint = write_checkpoint(tmp_path / 'weights.pth', 32)
    flags = ['--checkpoint', checkpoint, '--out', str(tmp_path), '--before', 'untrained', 'device=cpu']
    assert main([*flags, *SHORT, '--consistency']) == 0
    found = json.loads((tmp_path / 'experts.json').read_text())['consistency']
    assert [each['name'] for each in found['measured']] == ['untrained', 'trained']
    assert found['measured'][0]['images'] == 30
    assert found['measured'][0]['overall'] != found['measured'][1]['overall']
    assert len(found['shown']) == len(found['pairs'][0]['images']) == 2
    page = (tmp_path / 'index.html').read_text()
    assert 'Do routes stay with what they show?' in page and 'untrained: ' in page
    assert (tmp_path / 'consistency.png').stat().st_size > 1000
    assert 'Patches that show the same thing get other experts' in capsys.readouterr().out


def test_the_command_refuses(tmp_path, capsys):
    """Before the long passes, and before anything is written."""
    out = ['--out', str(tmp_path / 'out'), 'device=cpu']
    whole = ['--model', 'condconv_mobilenetv1_025', 'dataset=digits', 'img_size=32', 'num_classes=10', '--consistency']
    small, large = (write_checkpoint(tmp_path / f'{size}.pth', size) for size in (16, 32))
    for flags, message in (
            (whole, 'model: CondConvEfficientNet routes no patches'),
            (['--checkpoint', large, '--before', small], f"--before '{small}' sees images of 3 x 16 x 16, the"),
            (['--checkpoint', large, '--before', str(tmp_path / 'none.pth')], 'none.pth')):
        with pytest.raises(SystemExit) as stopped:
            main([*flags, *SHORT, *out])
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()
