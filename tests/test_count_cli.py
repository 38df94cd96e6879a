"""`tools/count_flops.py`: what it prints, what it writes, and what it says of input that cannot be used."""
import argparse
import csv
import io
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from moe_zoo.analysis import count, count_cli
from moe_zoo.analysis.cost_check import Comparison
from moe_zoo.analysis.count_cli import count_model, main

TINY = ['vmoe_vit_s', '--img-size', '64', '--model-kwargs', 'patch_size=16', 'embed_dim=32', 'depth=2', 'num_heads=2',
        'representation_size=0', 'num_classes=5', 'capacity=4', 'head_zero_init=False']


def run_cli(arguments, tmp_path):
    out = tmp_path / 'cost.json'
    assert main([*arguments, '--json', str(out)]) == 0
    report = json.loads(out.read_text())
    assert report['unit'] == 'MACs'
    return report['models']


def words(text):
    """Without line breaks."""
    return ' '.join(text.split())


def test_counts_models_of_both_houses(tmp_path, capsys):
    routed, dense = run_cli(['vmoe_vit_s', 'resnet18.a1_in1k'], tmp_path)
    assert (routed['parameters'], routed['macs_max']) == (56_999_400, count_model('vmoe_vit_s').macs_max)
    assert 'macs_executed' not in routed  # depends on weights and images: of the padded meta path it would be false
    assert dense['macs_executed'] == dense['macs_max'] == count_model('resnet18').macs_max
    assert {'activations', 'peak_memory', 'by_operator'} <= set(dense) - set(routed)
    printed = capsys.readouterr().out
    assert 'cost of one image (3 x 224 x 224)' in printed and '--images DIR measures it' in printed
    # parameters, active, MACs at most, MACs executed of both in millions; the star says that moving tokens takes time
    lines = [line.split() for line in printed.splitlines() if line.startswith((' vmoe_vit_s', ' resnet18'))]
    assert [line[:6] for line in lines] == [['vmoe_vit_s', '57.0', '31.8', '1,567', '*', '-'],
                    ['resnet18.a1_in1k', '11.7', '11.7', '1,814', '1,814', '2,485']]
    assert '* vmoe_vit_s, time: sorting what is routed' in printed and '* resnet18' not in printed


def test_lists_modules_to_a_depth(tmp_path, capsys):
    main(['vmoe_vit_s', '--depth', '2'])
    printed = capsys.readouterr().out
    assert '    blocks.5' in printed and 'blocks.5.mlp' not in printed
    main(['vmoe_vit_s', '--depth', '0'])
    assert 'blocks' not in capsys.readouterr().out


@pytest.fixture()
def photos(tmp_path):
    """Three images, one of them torn, one in a folder below."""
    folder = tmp_path / 'photos'
    (folder / 'more').mkdir(parents=True)
    pixels = (torch.rand(2, 80, 70, 3) * 255).byte().numpy()
    Image.fromarray(pixels[0]).save(folder / 'b.png')
    Image.fromarray(pixels[1]).convert('L').save(folder / 'more' / 'a.jpg')
    (folder / 'torn.png').write_bytes((folder / 'b.png').read_bytes()[:200])
    return folder


def test_counts_what_is_executed_on_images(photos, tmp_path, capsys):
    weights = tmp_path / 'weights.pth'
    model = timm.create_model(
        'vmoe_vit_s', img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, representation_size=0,
        num_classes=5, capacity=4)
    args = argparse.Namespace(model='vmoe_vit_s')  # which checkpoints of timm's and our trainers hold
    torch.save({'state_dict': model.state_dict(), 'args': args, 'epoch': 3}, weights)
    entry, = run_cli([*TINY, '--images', str(photos), '--weights', str(weights)], tmp_path)
    executed = entry['executed']
    assert [row['path'] for row in executed['images']] == [str(photos / 'b.png'), str(photos / 'more' / 'a.jpg')]
    assert executed['skipped'] == [str(photos / 'torn.png')]
    assert executed['load'] == {}  # only a table by expert asks for it
    rows = [row['macs_executed'] for row in executed['images']]
    assert all(4 < n < entry['macs_max'] for n in rows)  # capacity drops
    assert executed['mean'] == sum(rows) / 2 and (executed['min'], executed['max']) == (min(rows), max(rows))
    transform = create_transform(**resolve_model_data_config(model, {'input_size': (3, 64, 64)}))
    with Image.open(photos / 'b.png') as image:
        assert rows[0] == count(model, transform(image).unsqueeze(0)).macs_executed
    again = run_cli([*TINY, '--images', str(photos), '--weights', str(weights), '--max-images', '1'], tmp_path)
    assert [row['macs_executed'] for row in again[0]['executed']['images']] == rows[:1]
    printed = capsys.readouterr()
    assert 'MACs on 2 images, from' in words(printed.out) and '; 1 unreadable one skipped' in words(printed.out)
    assert 'torn.png' in printed.err


CONFIG = str(Path(__file__).resolve().parents[1] / 'configs' / 'coco' / 'retinanet_{}_r50_fpn_1x.yaml')


def test_detector_from_its_config(photos, tmp_path, capsys):
    pytest.importorskip('detectron2')
    from detectron2.utils.analysis import FlopCountAnalysis

    from moe_zoo.detection import count_inputs
    overrides = ['MODEL.RETINANET.NUM_CLASSES', '3', 'INPUT.MIN_SIZE_TEST', '64', 'INPUT.MAX_SIZE_TEST', '96']
    config = CONFIG.format('moe_res5')
    arguments = ['--config-file', config, '--img-size', '64x128', '--images', str(photos), *overrides]
    entry, = run_cli(arguments, tmp_path)
    cfg, model = count_inputs.load(config, overrides)
    assert entry['input_size'] == [3, 64, 128]
    # Images of 80 x 70 become 73 x 64, padded to 96 x 64: three quarters of the blank image's 64 x 128.
    assert [row['macs_max'] / entry['macs_max'] for row in entry['executed']['images']] == [
        pytest.approx(3 / 4, rel=0.02)] * 2
    assert 'cost of one image (mean of the images)' in capsys.readouterr().out  # not a size that was not run
    # fvcore traces the same forward; detectron2's own operators without products are its unsupported ones
    inputs = count_inputs.read(cfg, photos / 'b.png')
    traced = FlopCountAnalysis(model.eval(), inputs).unsupported_ops_warnings(False)
    products = sum(n for op, n in traced.by_operator().items() if 'norm' not in op and 'pool' not in op)
    assert count(model, inputs).macs_executed == pytest.approx(products, rel=1e-3)
    # two of four experts idle: an expert is res5 of ResNet-50 without the affine parameters of its frozen norms
    expert = 1024 * 512 + 9 * 512 * 512 + 512 * 2048 + 1024 * 2048 + 2 * (2048 * 512 + 9 * 512 * 512 + 512 * 2048)
    assert entry['parameters'] - entry['active_parameters'] == 2 * expert


@pytest.mark.slow
def test_a_plain_retinanet_costs_what_is_known(tmp_path):
    pytest.importorskip('detectron2')
    # detectron2's RetinaNet R50 at 800 x 1216: 222.15 G, FlopCounterMode / 2 of that model
    arguments = ['--config-file', CONFIG.format('moe_res5'), '--img-size', '800x1216']
    plain = ['MODEL.BACKBONE.NAME', 'build_retinanet_resnet_fpn_backbone']
    entry, = run_cli([*arguments, *plain], tmp_path)
    assert entry['macs_executed'] / 1e9 == pytest.approx(222.15, abs=0.005)


# Tables, sorted and side by side.

def as_rows(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_keeps_every_digit_and_prints_nothing_else(capsys):
    assert main(['resnet18', 'vmoe_vit_s', 'resnet50', '--sort', 'macs_max', '--csv', '-']) == 0
    printed = capsys.readouterr()
    rows = as_rows(printed.out)
    assert [row['model'] for row in rows] == ['resnet50', 'resnet18', 'vmoe_vit_s']  # 4.09, 1.81 and 1.57 G
    assert rows[2]['parameters'] == '56999400' and rows[2]['macs_executed'] == '' and rows[2]['not_time'] == '*'
    assert rows[0]['macs_max'] == '4089184256' and '* vmoe_vit_s, time' in printed.err
    main(['vmoe_vit_s', 'resnet18', '--sort', 'model', '--csv', '-'])
    assert [row['model'] for row in as_rows(capsys.readouterr().out)] == ['resnet18', 'vmoe_vit_s']


def test_two_models_side_by_side(capsys):
    main(['--compare', 'resnet34', 'resnet18', '--sort', 'difference', '--csv', '-'])
    rows = {row['module'].strip(): row for row in as_rows(capsys.readouterr().out)}
    # one block more in layer1: two convolutions of 64 x 64 x 9 on 56 x 56
    assert int(rows['layer1']['difference']) == 2 * 64 * 64 * 9 * 56 * 56
    assert (rows['fc']['difference'], rows['fc']['ratio']) == ('0', '1.0')
    whole = rows['whole model']
    assert int(whole['a']) - int(whole['b']) == int(whole['difference']) and list(rows)[0] == 'whole model'
    main(['--compare', 'vmoe_vit_s', 'twin', '--depth', '2'])
    printed = capsys.readouterr().out
    assert 'MACs at most: A vmoe_vit_s, B vit_base_patch32_224' in printed
    # N 50, D 512, 2 experts instead of one MLP of 8 D^2 and a router of 8 D a token: 50 * (8 D^2 + 8 D) = 105.06 M
    row = next(line.split() for line in printed.splitlines() if line.strip().startswith('blocks.5 '))
    assert row == ['blocks.5', '264.909', '159.846', '105.062', '1.657']
    assert [line.split()[2] for line in printed.splitlines() if 'pre_logits.fc' in line] == ['-']  # the twin has none


def test_operators(capsys):
    main(['vit_tiny_patch16_224', '--by', 'operator', '--csv', '-'])
    rows = {row['operator']: int(row['macs_executed']) for row in as_rows(capsys.readouterr().out)}
    # 196 patches of 768 values to 192; attention of 12 blocks: twice 197 x 197 x 192
    assert rows['aten.convolution'] == 196 * 768 * 192 and rows['aten.bmm'] == 12 * 2 * 197 * 197 * 192
    assert list(rows.values()) == sorted(rows.values(), reverse=True)
    main(['--compare', 'resnet18', 'vmoe_vit_s', '--by', 'operator'])
    printed = words(capsys.readouterr().out)
    assert 'B vmoe_vit_s, as it pads on a blank input' in printed


def test_experts_and_their_load(photos, tmp_path, capsys):
    main(['vmoe_vit_s', '--by', 'expert', '--csv', '-'])
    rows = as_rows(capsys.readouterr().out)
    # two linear layers of 512 x 2048 with biases, eight times in two blocks
    assert [(row['layer'], row['expert'], row['parameters']) for row in rows] == [
        (f'blocks.{i}.mlp', '0 to 7', str(2 * 512 * 2048 + 2048 + 512)) for i in (5, 7)]
    entry, = run_cli([*TINY, '--images', str(photos), '--by', 'expert'], tmp_path)
    load, = entry['executed']['load'].values()
    assert len(load) == 8 and 0 < sum(load) <= 2  # K = 2, less what capacity drops
    assert 'items that' in capsys.readouterr().out
    main(['resnet18', '--by', 'expert'])
    assert 'resnet18: no experts with parameters of their own' in capsys.readouterr().out


def test_expected_is_at_most_less_what_capacity_drops(photos, tmp_path, capsys):
    entry, = run_cli([*TINY, '--images', str(photos)], tmp_path)
    for row in entry['executed']['images']:
        assert row['macs_executed'] == row['macs_expected'] < row['macs_max']
    heading = capsys.readouterr().out.split('---')[0]
    assert 'expected' in heading and 'activations' in heading and 'memory' in heading


def test_latex_and_markdown_go_to_files(tmp_path, capsys):
    files = [tmp_path / 'table.tex', tmp_path / 'table.md']
    main(['condconv_resnet18', '--latex', str(files[0]), '--markdown', str(files[1])])
    tex, markdown = (path.read_text() for path in files)
    assert r'condconv\_resnet18 & 81.4 & 81.4 & 1,894 & * &' in tex and tex.count(r'\toprule') == 1
    assert '| condconv_resnet18 | 81.4 | 81.4 | 1,894 | * |' in markdown
    printed = capsys.readouterr()
    assert 'condconv_resnet18' in printed.out and str(files[0]) in printed.err


# What a number does not say, and whether it is complete.

def test_strict_ends_with_what_was_not_counted(capsys, tmp_path, monkeypatch):
    assert main(['resnet18', '--strict']) == 0
    plant(monkeypatch, Spectrum())
    with pytest.raises(SystemExit) as exit:
        main(['resnet18', '--strict', '--json', str(tmp_path / 'cost.json')])
    assert exit.value.code == 2
    assert capsys.readouterr().err.endswith('error: --strict: resnet18 does not count aten._fft_r2c, in fc.1.\n')
    assert json.loads((tmp_path / 'cost.json').read_text())['models'][0]['macs_max'] > 1e9


class Choosy(nn.Module):
    def forward(self, x):
        return x if x.sum().item() > 0 else -x


def test_a_model_that_cannot_run_on_meta_tensors_runs_on_real_ones(capsys, monkeypatch):
    plain = count_model('test_resnet')
    plant(monkeypatch, Choosy())
    assert count_model('test_resnet').macs_max == plain.macs_max
    main(['test_resnet'])
    assert 'test_resnet: counted on real tensors with random weights, because on meta tensors: ' in words(
        capsys.readouterr().out)


def test_fvcore_is_asked_too(capsys, tmp_path, monkeypatch):
    entry, = run_cli(['test_vit', '--check', '--strict'], tmp_path)
    ours = {row['operator']: row for row in entry['fvcore']}
    assert ours['convolution']['ours'] == ours['convolution']['fvcore'] > 0
    assert sum(row['ours'] for row in entry['fvcore']) == entry['macs_executed']
    assert 'normalisation is free by our convention' in capsys.readouterr().out
    wrong = Comparison('convolution', 3, 5, 'no cause is known', explained=False)
    monkeypatch.setattr(count_cli, 'check_with_fvcore', lambda model, inputs: [wrong])
    with pytest.raises(SystemExit):
        main(['test_vit', '--check', '--strict'])
    assert 'test_vit has 3 MACs of convolution, and fvcore counts 5.' in capsys.readouterr().err


def test_what_the_benchmark_measured_stands_below_the_macs(tmp_path, capsys):
    times = tmp_path / 'times.json'
    row = {'model': 'condconv_resnet18', 'twin': 'resnet18', 'mode': 'train', 'batch_size': 8, 'equal_macs': False,
           'macs_ratio': 1.044, 'time_ratio': {'median': 1.5, 'low': 1.45, 'high': 1.55}}
    machine = {'device': 'a processor', 'threads': 2}
    times.write_text(json.dumps({'machine': machine, 'rows': [row]}))
    main(['condconv_resnet18', 'resnet18', '--times', str(times)])
    printed = words(capsys.readouterr().out)
    assert ('* condconv_resnet18, time: measured: a training step of 8 images takes 1.50 (spread 0.10) times as long '
            'as resnet18, at 1.044 of its MACs (a processor, 2 threads)') in printed
    assert '* condconv_resnet18, time: 79.60 M of the MACs (4.2 %) mix kernels' in printed
    times.write_text('{"rows": [{}]}')
    with pytest.raises(SystemExit):
        main(['resnet18', '--times', str(times)])
    assert "times.json' is not what tools/benchmark.py --json writes (KeyError: 'machine')" in capsys.readouterr().err


@pytest.mark.parametrize(('name', 'sentence'), [
    ('mobilenetv2_050', 'are depthwise convolutions'), ('deepmoe_narrow_resnet18', 'channels that a gate closes'),
    ('moe_resnet18', 'sorting what is routed')])
def test_where_macs_are_no_time(name, sentence, capsys):
    main([name, '--depth', '0'])
    assert f'* {name}, time: ' in (printed := words(capsys.readouterr().out)) and sentence in printed


def plant(monkeypatch, module):
    """Put a module behind the classifier of every model that timm makes."""
    build = timm.create_model

    def planted(name, **kwargs):
        model = build(name, **kwargs)
        model.fc = nn.Sequential(model.fc, module)
        return model

    monkeypatch.setattr(timm, 'create_model', planted)


class Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.rfft(x).abs()


def test_names_what_it_did_not_count(tmp_path, capsys, monkeypatch):
    plant(monkeypatch, Spectrum())
    entry, = run_cli(['resnet18', '--model-kwargs', 'num_classes=4'], tmp_path)
    assert entry['uncounted'] == {'aten._fft_r2c': ['fc.1']}
    assert 'resnet18: NOT COUNTED aten._fft_r2c, in fc.1' in capsys.readouterr().out


BAD = {
    'nothing': ([], 'Give the names of models, --compare A B, or --config-file'),
    'unknown': (['vmoe_vit_t'], "timm and moe_zoo have no model 'vmoe_vit_t'. Did you mean 'vmoe_vit_"),
    'keyword': (['resnet18', '--model-kwargs', 'experts=4'], 'resnet18 cannot be built with experts=4: '),
    'near keyword': (
        ['condconv_resnet18', '--model-kwargs', 'num_expert=4'],
        'condconv_resnet18 cannot be built with num_expert=4: ResNet.__init__() got an unexpected keyword argument '
        "'num_expert'. Did you mean 'num_experts'?"),
    'pair': (['resnet18', '--model-kwargs', 'experts'], "--model-kwargs: 'experts' is not of the form key=value."),
    'size': (['resnet18', '--img-size', '3x4x5'], "--img-size '3x4x5' is neither one side, as 224, nor height x width"),
    'no size': (['resnet18', '--img-size', '0'], "--img-size '0' is neither one side, as 224, nor height x width"),
    'fixed': (['mixer_b16_224', '--img-size', '256'], 'mixer_b16_224: MlpMixer cannot be run on (1, 3, 256, 256), '),
    'folder': (['resnet18', '--images', 'nowhere'], "--images: 'nowhere' is not a folder."),
    'both': (['resnet18', '--compare', 'resnet18', 'resnet34'], '--compare resnet18 resnet34 takes both models itself'),
    'no twin': (['--compare', 'pmoe_cnn_dense', 'twin'], "'pmoe_cnn_dense' is a dense network itself and has no twin"),
    'no card': (['--compare', 'resnet18', 'twin'], "There is no model 'resnet18' in moe_zoo."),
    'pairs': (['--compare', 'vmoe_vit_s', 'twin', '--by', 'expert'], '--compare goes by module or operator; experts'),
    'depth': (['resnet18', '--depth', '-1'], '--depth -1: the whole model is 0, its children are 1.'),
    'column': (['resnet18', '--sort', 'parameter'], "--sort 'parameter': there is no such column. Did you mean 'param"),
    'two': (['resnet18', '--csv', '-', '--latex', '-'], '--csv - and --latex - both print; give one of them a file.'),
    'times': (['resnet18', '--times', 'nowhere.json'], "--times: there is no file 'nowhere.json'; tools/benchmark.py"),
    'one model': (['resnet18', 'resnet34', '--images', '.', '--weights', 'x'], '--weights are those of one model'),
    'weights alone': (['resnet18', '--weights', 'x.pth'], '--weights matters only for what is executed on images'),
    'experts': (['vmoe_vit_s', '--model-kwargs', 'num_selected=9'], 'vmoe_vit_s cannot be built with num_selected=9: '),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_one_sentence(case, capsys):
    arguments, sentence = BAD[case]
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f'error: {sentence}') and error.count('\n') == 1, error


def test_bad_folders_and_weights_are_one_sentence(photos, tmp_path, capsys):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'torn.pth').write_bytes(b'PK torn')
    torch.save({'state_dict': {'stranger': torch.zeros(1)}}, tmp_path / 'foreign.pth')
    cases = [(['--images', str(tmp_path / 'empty')], 'holds no readable image (0 unreadable; looked for .bmp')]
    for name, sentence in (
            ('torn.pth', "torn.pth' cannot be read: it is truncated"),
            ('foreign.pth', "foreign.pth' does not fit the model 'resnet18': 122 missing"),
            ('missing.pth', 'There is no checkpoint file'),
    ):
        cases.append((['--images', str(photos), '--weights', str(tmp_path / name)], sentence))
    for arguments, sentence in cases:
        with pytest.raises(SystemExit) as exit:
            main(['resnet18', *arguments])
        assert exit.value.code == 2
        error = capsys.readouterr().err
        assert sentence in error and error.count('\n') == 1, error


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as exit:
        main(['--help'])
    assert exit.value.code == 0
    printed = capsys.readouterr().out
    for part in ('--config-file', '--images', 'multiply-accumulate', 'without padding', 'condconv_resnet50 resnet50'):
        assert part in printed
