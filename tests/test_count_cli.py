"""`tools/count_flops.py`: what it prints, what it writes, and what it says of input that cannot be used."""
import argparse
import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from moe_zoo.analysis import count
from moe_zoo.analysis.count_cli import count_model, main

TINY = ['vmoe_vit_s', '--img-size', '64', '--model-kwargs', 'patch_size=16', 'embed_dim=32', 'depth=2', 'num_heads=2',
        'representation_size=0', 'num_classes=5', 'capacity=4', 'head_zero_init=False']


def run_cli(arguments, tmp_path):
    out = tmp_path / 'cost.json'
    assert main([*arguments, '--json', str(out)]) == 0
    report = json.loads(out.read_text())
    assert report['unit'] == 'MACs'
    return report['models']


def test_counts_models_of_both_houses(tmp_path, capsys):
    routed, dense = run_cli(['vmoe_vit_s', 'resnet18.a1_in1k'], tmp_path)
    assert (routed['parameters'], routed['macs_max']) == (56_999_400, count_model('vmoe_vit_s').macs_max)
    assert 'macs_executed' not in routed  # depends on weights and images: of the padded meta path it would be false
    assert dense['macs_executed'] == dense['macs_max'] == count_model('resnet18').macs_max
    printed = capsys.readouterr().out
    assert '56,999,400' in printed and '31,802,856' in printed and '--images DIR measures it' in printed


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
    rows = [row['macs_executed'] for row in executed['images']]
    assert all(4 < n < entry['macs_max'] for n in rows)  # capacity drops
    assert executed['mean'] == sum(rows) / 2 and (executed['min'], executed['max']) == (min(rows), max(rows))
    transform = create_transform(**resolve_model_data_config(model, {'input_size': (3, 64, 64)}))
    with Image.open(photos / 'b.png') as image:
        assert rows[0] == count(model, transform(image).unsqueeze(0)).macs_executed
    again = run_cli([*TINY, '--images', str(photos), '--weights', str(weights), '--max-images', '1'], tmp_path)
    assert [row['macs_executed'] for row in again[0]['executed']['images']] == rows[:1]
    printed = capsys.readouterr()
    assert 'executed on 2 images, 1 unreadable skipped' in printed.out
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
    assert ' images ' in capsys.readouterr().out  # instead of a size that was not run
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


class Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.rfft(x).abs()


def test_names_what_it_did_not_count(tmp_path, capsys, monkeypatch):
    build = timm.create_model

    def with_spectrum(name, **kwargs):
        model = build(name, **kwargs)
        model.fc = nn.Sequential(model.fc, Spectrum())
        return model

    monkeypatch.setattr(timm, 'create_model', with_spectrum)
    entry, = run_cli(['resnet18', '--model-kwargs', 'num_classes=4'], tmp_path)
    assert entry['uncounted'] == {'aten._fft_r2c': ['fc.1']}
    assert 'resnet18: NOT COUNTED aten._fft_r2c, in fc.1' in capsys.readouterr().out


BAD = {
    'nothing': ([], 'Give the names of models, or --config-file'),
    'unknown': (['vmoe_vit_t'], "timm and moe_zoo have no model 'vmoe_vit_t'. Did you mean 'vmoe_vit_"),
    'keyword': (['resnet18', '--model-kwargs', 'experts=4'], 'resnet18 cannot be built with experts=4: '),
    'near keyword': (
        ['condconv_resnet18', '--model-kwargs', 'num_expert=4'],
        'condconv_resnet18 cannot be built with num_expert=4: ResNet.__init__() got an unexpected keyword argument '
        "'num_expert'. Did you mean 'num_experts'?"),
    'pair': (['resnet18', '--model-kwargs', 'experts'], "--model-kwargs: 'experts' is not of the form key=value."),
    'size': (['resnet18', '--img-size', '3x4x5'], "--img-size '3x4x5' is neither one side, as 224, nor height x width"),
    'no size': (['resnet18', '--img-size', '0'], "--img-size '0' is neither one side, as 224, nor height x width"),
    'fixed': (['mixer_b16_224', '--img-size', '256'], 'mixer_b16_224 cannot be run on (1, 3, 256, 256): Input height'),
    'folder': (['resnet18', '--images', 'nowhere'], "--images: 'nowhere' is not a folder."),
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
