"""torch.export and ONNX for every family, any batch, routes that follow the image; the command `moe-zoo export`."""
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from graph_cases import CASES, batch, build, decisions

from moe_zoo.cli import main as moe_zoo
from moe_zoo.engine import export as exporter
from moe_zoo.engine.checkpoint import save_atomically
from moe_zoo.layers import CondConv2d, cond_conv

FAST = ('vmoe',)
BATCH = ({0: torch.export.Dim('batch', min=1)},)
ALL = [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


def check_other_images(case: str, model: torch.nn.Module, run) -> None:
    """What was made with one batch of images gives the model's outputs for others, which choose other experts."""
    for number in (1, 2, 5):
        x = batch(case, number, seed=number)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
    traced, others = decisions(model, batch(case, 3)), decisions(model, batch(case, 5, seed=5))
    for layer, record in traced.items():
        before, after = record.combine_matrix(), others[layer].combine_matrix()[:len(record.weights)]
        assert (after - before).abs().max() > 1e-3
        assert record.indices is None or ((after > 0) != (before > 0)).any(), f'{layer} chooses as it chose'


@pytest.mark.parametrize('case', ALL)
def test_an_exported_program_routes_other_images_in_any_batch(case):
    model = build(case)
    program = torch.export.export(model, (batch(case, 3),), dynamic_shapes=BATCH)
    check_other_images(case, model, program.module())


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # of the exporter, about itself
# Without moefied_conv, which has the layer of condconv_resnet, and condconv_mobile, which takes the exporter a minute.
@pytest.mark.parametrize('case', [case for case in CASES if case not in ('moefied_conv', 'condconv_mobile')])
def test_an_onnx_file_routes_other_images_in_any_batch(case, tmp_path):
    runtime = pytest.importorskip('onnxruntime')
    pytest.importorskip('onnxscript')
    model = build(case)
    program = torch.onnx.export(
        model, (batch(case, 3),), dynamo=True, input_names=['images'], dynamic_shapes=BATCH, verbose=False)
    program.save(tmp_path / 'model.onnx')
    session = runtime.InferenceSession(tmp_path / 'model.onnx', providers=['CPUExecutionProvider'])
    check_other_images(case, model, lambda x: torch.from_numpy(session.run(None, {'images': x.numpy()})[0]))


@pytest.mark.parametrize('kwargs', [
    dict(kernel_size=3, groups=4, stride=2), dict(kernel_size=(3, 5), padding=(1, 2), bias=True, dilation=(1, 2)),
    dict(kernel_size=3, groups=2, padding='same', stride=(2, 1), bias=True), dict(kernel_size=1, padding=1)])
def test_kernels_as_matrix_products_are_those_convolutions(kwargs, monkeypatch):
    layer = CondConv2d(4, 8, num_experts=3, **kwargs)
    x, weights = torch.randn(5, 4, 9, 8), torch.rand(5, 3)
    monkeypatch.setattr(cond_conv, 'becomes_onnx', lambda: True)
    monkeypatch.setattr(layer, '_convolve_in_calls', None)
    torch.testing.assert_close(layer(x, weights), layer.forward_reference(x, weights), atol=1e-5, rtol=1e-4)


def test_a_route_that_was_frozen_is_noticed():
    model = build('moe_resnet')
    wrong = {layer: record.weights for layer, record in decisions(model, batch('moe_resnet', 5)).items()}

    def frozen(x):
        """The model with the decisions of the first batch."""
        hooks = [model.get_submodule(layer).router.register_forward_hook(
            lambda m, i, record, layer=layer: record._replace(
                indices=decided[layer].indices[:len(record.indices)], weights=wrong[layer][:len(record.indices)]))
            for layer in wrong]
        try:
            return model(x)
        finally:
            for hook in hooks:
                hook.remove()

    decided = decisions(model, batch('moe_resnet', 5))
    with pytest.raises(AssertionError, match='Tensor-likes are not close'), torch.no_grad():
        check_other_images('moe_resnet', model, frozen)


# --- the command

@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A file of a patch-routed network of ten classes, as a training writes it."""
    torch.manual_seed(0)
    model = timm.create_model('pmoe_cnn', num_classes=10)
    args = {'model': 'pmoe_cnn', 'num_classes': 10, 'mean': [0.25], 'std': [0.5]}
    classes = [f'digit {n}' for n in range(10)]
    content = {'state_dict': model.state_dict(), 'args': args, 'moe_zoo': {'classes': classes}}
    save_atomically(content, tmp_path / 'last.pth.tar')
    return tmp_path / 'last.pth.tar'


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', [pytest.param('onnx', marks=pytest.mark.slow), 'pt2', 'torchscript'])
def test_a_checkpoint_becomes_a_file_that_says_what_it_is(kind, checkpoint, tmp_path, capsys):
    out = tmp_path / f'model{exporter.FORMATS[kind]}'
    assert moe_zoo(['export', str(checkpoint), '--output', str(out)]) == 0
    assert re.fullmatch(
        rf"'{out}' \({kind}\) takes images, \(any number, 1, 112, 112\) float32, and returns 10 logits for each; equal "
        r"to the model's (to \de-\d\d|exactly) on 8 images in batches of 1, 2 and 5.\n", capsys.readouterr().out)
    if kind == 'onnx':
        import onnxruntime
        session = onnxruntime.InferenceSession(out, providers=['CPUExecutionProvider'])
        about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    else:
        extra = {exporter.EXTRA: ''}
        (torch.export.load if kind == 'pt2' else torch.jit.load)(
            str(out), **{'extra_files' if kind == 'pt2' else '_extra_files': extra})
        about = json.loads(extra[exporter.EXTRA])
    assert about['model'] == 'pmoe_cnn' and about['trained'] and about['classes'][3] == 'digit 3'
    assert (about['mean'], about['std'], about['input_size']) == ([0.25], [0.5], [1, 112, 112])


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_models_by_name_and_folders_of_timm_are_exported(tmp_path, capsys):
    out = tmp_path / 'one.pt2'
    assert moe_zoo(['export', 'vmoe_vit_s', '-o', str(out), '--img-size', '64', '--batch', '4', 'num_classes=3']) == 0
    printed = capsys.readouterr().out
    assert '(4, 3, 64, 64)' in printed and 'on 4 images in a batch of 4. Its weights are random' in printed
    with pytest.raises(Exception, match='shape|size'):
        torch.export.load(out).module()(torch.zeros(2, 3, 64, 64))
    model = timm.create_model('moe_resnet18_cifar', num_classes=3)
    timm.models.save_for_hf(model, tmp_path / 'saved')
    assert moe_zoo(['export', str(tmp_path / 'saved'), '-o', str(tmp_path / 'saved.ts')]) == 0
    assert 'random' not in capsys.readouterr().out
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(torch.jit.load(tmp_path / 'saved.ts')(x), model.eval()(x))


def refusal(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        moe_zoo(['export', *arguments])
    assert stop.value.code == 2
    line, = [line for line in capsys.readouterr().err.splitlines() if line.startswith('error: ')]
    return line.removeprefix('error: ')


@pytest.mark.parametrize('arguments, message', [
    (['pmoe_cnn', '-o', 'x.bin'], "--output 'x.bin' ends in none of .onnx, .pt2, .ts: give --format."),
    (['pmoe_cnn', '-o', 'x', '--format', 'onx'], "--format 'onx' is not one of onnx, pt2, torchscript. Did you mean"),
    (['pmoe_cnn', '-o', 'x.ts', '--batch', '0'], "--batch 0: give a number of images, at least 1, or 'dynamic'."),
    (['pmoe_cn', '-o', 'x.ts'], "Unknown model 'pmoe_cn'. Did you mean 'pmoe_cnn'"),
    (['./nowhere', '-o', 'x.ts'], "The run 'nowhere' is no folder and no checkpoint"),
    (['pmoe_cnn', '-o', 'x.ts', '--img-size', '20'], 'patch_size=28 x 28 does not divide a map of 20 x 20'),
    (['pmoe_cnn', '-o', 'folder.ts'], "Cannot write to 'folder.ts': Is a directory"),
])
def test_what_cannot_be_exported_is_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'folder.ts').mkdir()
    assert message in refusal(capsys, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ['folder.ts']


def test_onnx_without_its_packages_says_what_to_install(tmp_path, monkeypatch, capsys):
    found = exporter.importlib.util.find_spec
    monkeypatch.setattr(exporter.importlib.util, 'find_spec', lambda name: None if 'onnx' in name else found(name))
    assert refusal(capsys, 'pmoe_cnn', '-o', str(tmp_path / 'x.onnx')) == (
        'ONNX files are written and checked with onnx, onnxscript, onnxruntime, not installed here: pip install '
        "'moe_zoo[export]'.")


def test_a_file_that_gives_other_logits_is_not_left_behind(checkpoint, tmp_path, monkeypatch, capsys):
    def read_wrong(file):
        loaded = torch.jit.load(str(file))
        return lambda x: loaded(x) + (len(x) > 2) * 0.5

    monkeypatch.setitem(exporter._WRITERS, 'torchscript', (exporter._write_torchscript, read_wrong))
    (tmp_path / 'old.ts').write_text('before')
    message = refusal(capsys, str(checkpoint), '-o', str(tmp_path / 'old.ts'))
    assert message == ('Nothing was written: on a batch of 5 what was exported gives other logits than the model, by up'
                       ' to 5.0e-01.')
    assert (tmp_path / 'old.ts').read_text() == 'before' and len(list(tmp_path.iterdir())) == 2
