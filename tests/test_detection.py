"""detectron2: configs, backbones, the meta-architecture, training, and what bad input is answered with."""
import json
import logging
import math
import os
import pickle
import resource
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from detectors import refusal
from PIL import Image

pytest.importorskip('detectron2', reason='detectron2 is not installed')

from detectron2.checkpoint import DetectionCheckpointer  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.layers import ShapeSpec  # noqa: E402
from detectron2.modeling import build_model, build_resnet_backbone  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402
from detectron2.utils.events import EventStorage  # noqa: E402
from torch import nn  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

from moe_zoo.data.scenes import write_scenes  # noqa: E402
from moe_zoo.detection import (  # noqa: E402
    add_moe_config,
    load_config,
)
from moe_zoo.detection.checkpoint import SafeCheckpointer  # noqa: E402
from moe_zoo.detection.train import StarvedExperts, Trainer, main  # noqa: E402
from moe_zoo.errors import InputError  # noqa: E402
from moe_zoo.layers.moe_stage import MoEStage  # noqa: E402
from moe_zoo.routing import checkpoint_routed, current_image_sizes, trace_routing  # noqa: E402

pytestmark = pytest.mark.filterwarnings('ignore')  # of detectron2's older code

CONFIGS = ['coco/retinanet_condconv_r50_fpn_1x', 'coco/retinanet_moe_res5_r50_fpn_1x', 'demo/retinanet_digits']
SMALL = [
    'MODEL.DEVICE', 'cpu', 'MODEL.WEIGHTS', '', 'MODEL.RESNETS.NORM', 'BN', 'MODEL.BACKBONE.FREEZE_AT', '0',
    'MOE.TIMM.PRETRAINED', 'False', 'MOE.TIMM.NORM', '',
    'INPUT.MIN_SIZE_TRAIN', '(64,)', 'INPUT.MIN_SIZE_TEST', '64', 'DATALOADER.NUM_WORKERS', '0',
    'SOLVER.IMS_PER_BATCH', '2', 'SOLVER.MAX_ITER', '2', 'SOLVER.WARMUP_ITERS', '0', 'SOLVER.STEPS', '()', 'SEED', '1',
]
TINY = [  # the demonstration's detector, narrower still
    *SMALL, 'MODEL.RESNETS.STEM_OUT_CHANNELS', '8', 'MODEL.RESNETS.RES2_OUT_CHANNELS', '8',
    'MODEL.FPN.OUT_CHANNELS', '8',
]


def path_of(name):
    return f'configs/{name}.yaml'


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    return write_scenes(tmp_path_factory.mktemp('data') / 'scenes', train=8, val=4, image_size=160, classes=range(5))


@pytest.fixture
def tiny(scenes, tmp_path):
    """Arguments of a run of a few seconds."""
    return ['--config-file', path_of('demo/retinanet_digits'), *TINY, 'MOE.DATA.ROOT', str(scenes),
            'OUTPUT_DIR', str(tmp_path / 'run')]


def tiny_model(name='demo/retinanet_digits', *opts):
    return build_model(load_config(path_of(name), [*(TINY if 'demo' in name else SMALL), *opts]))


def images(*sizes, objects=1):
    """Inputs as detectron2's mapper gives them, with one object each."""
    inputs = []
    for height, width in sizes:
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[4., 4., 40., 40.]] * objects))
        instances.gt_classes = torch.zeros(objects, dtype=torch.long)
        pixels = torch.randint(0, 255, (3, height, width), dtype=torch.uint8)
        inputs.append({'image': pixels, 'instances': instances, 'height': height, 'width': width})
    return inputs


# --- configs

@pytest.mark.parametrize('name', [*CONFIGS, 'coco/Base-RetinaNet'])
def test_configs_are_plain_yaml_and_load(name, repository):
    assert isinstance(yaml.safe_load((repository / path_of(name)).read_text()), dict)
    cfg = load_config(path_of(name))
    assert cfg.MODEL.META_ARCHITECTURE == 'MoERetinaNet'
    if 'demo' not in name:  # x * 2^(i/3), as detectron2's python expression says
        wanted = [[x * 2 ** (i / 3) for i in range(3)] for x in (32, 64, 128, 256, 512)]
        assert np.allclose(cfg.MODEL.ANCHOR_GENERATOR.SIZES, wanted, rtol=1e-12)


def test_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(path_of(CONFIGS[0])).MOE.TIMM.NAME == 'condconv_resnet50'


def test_overrides_anywhere_and_nested_arguments(tmp_path):
    file = tmp_path / 'own.yaml'
    file.write_text('VERSION: 2\nMOE: {TIMM: {NAME: condconv_resnet18, ARGS: {num_experts: 3, new_one: true}}}\n')
    cfg = load_config(file, ['MOE.RESNET.NUM_EXPERTS', '8', 'MOE.TIMM.ARGS.num_experts', '5'])
    assert dict(cfg.MOE.TIMM.ARGS) == {'num_experts': 5, 'new_one': True} and cfg.MOE.RESNET.NUM_EXPERTS == 8


@pytest.mark.parametrize('text, opts, message', [
    ('MOE: {RESNET: {NUM_EXPERT: 4}}', [],
     "Unknown config key 'MOE.RESNET.NUM_EXPERT' in .*own.yaml'.* 'MOE.RESNET.NUM_EXPERTS'"),
    ('', ['SOLVER.BASE_LRR', '1'], "Unknown config key 'SOLVER.BASE_LRR' in the command line.* 'SOLVER.BASE_LR'"),
    ('', ['SOLVER.MAX_ITER', 'many'], 'the command line cannot be used as a config: Type mismatch.*SOLVER.MAX_ITER'),
    ('', ['SOLVER.MAX_ITER'], 'KEY VALUE pairs, but there are 1 words'),
    ('MODEL: {X: !!python/object/apply:eval ["1"]}', [], 'holds a python tag'),
    ('MODEL: [', [], 'is not yaml: .* in line'),
    ('_BASE_: nowhere.yaml', [], 'cannot be read: No such file'),
])
def test_a_wrong_config_is_one_sentence(tmp_path, text, opts, message):
    file = tmp_path / 'own.yaml'
    file.write_text(f'VERSION: 2\n{text}\n')
    with pytest.raises(InputError, match=message):
        load_config(file, opts)


def test_a_missing_config_names_the_nearest():
    with pytest.raises(InputError, match="is not a file. Did you mean 'configs/demo/retinanet_digits.yaml'"):
        load_config('configs/demo/retinanet_digit.yaml')


def test_detectron2_knows_our_keys_once_we_are_imported(repository):
    cfg = get_cfg()
    cfg.merge_from_file(str(repository / path_of(CONFIGS[1])))
    assert cfg.MOE.RESNET.NUM_EXPERTS == 4
    cfg.MOE.RESNET.NUM_EXPERTS = 6
    add_moe_config(cfg)
    assert cfg.MOE.RESNET.NUM_EXPERTS == 6  # what older scripts call changes nothing
    assert get_cfg().MOE.RESNET.NUM_EXPERTS == 4  # nor does one config the next


# --- backbones

def test_res5_is_routed_and_everything_before_it_is_detectron2s():
    cfg = load_config(path_of(CONFIGS[1]), SMALL)
    model = build_model(cfg)
    resnet = model.backbone.bottom_up
    assert isinstance(resnet.res5, MoEStage) and resnet.stages[-1] is resnet.res5
    dense = build_resnet_backbone(cfg, ShapeSpec(channels=3))
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    gate = 2 * 1024 * 4  # clean and noise matrix
    assert count(resnet) == count(dense) + 3 * count(dense.res5) + gate
    assert list(model.backbone.output_shape()) == ['p3', 'p4', 'p5', 'p6', 'p7']


@pytest.mark.parametrize('opts, message', [
    (['MOE.RESNET.NUM_SELECTED', '5'], 'num_selected=5 with num_experts=4'),
    (['MODEL.RESNETS.OUT_FEATURES', "['res3', 'res4']"], 'this ResNet has res2, res3, res4; it ends at'),
    (['MODEL.RESNETS.NORM', 'SyncBN'], "NORM 'SyncBN': experts see different images"),
    (['MODEL.FPN.IN_FEATURES', "['res3', 'res6']"], r"IN_FEATURES \['res3', 'res6'\]: this backbone gives"),
    (['MOE.RESNET.LOSSES', "[['kll', 0.1]]"], "Unknown auxiliary loss 'kll'. Did you mean 'kl'"),
])
def test_unfit_routed_backbones_are_refused(opts, message):
    with pytest.raises(InputError, match=message):
        model = tiny_model('demo/retinanet_digits', *opts)
        with EventStorage():
            model.train()(images((64, 64), (64, 64)))


def test_random_weights_under_frozen_batch_norm_are_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger('moe_zoo'), 'propagate', True)  # a run before may have switched it off
    with caplog.at_level(logging.WARNING):
        tiny_model('demo/retinanet_digits', 'MODEL.RESNETS.NORM', 'FrozenBN')
    assert 'diverge within a few iterations' in caplog.text


# --- weights

def dense_names(model):
    """State of the dense twin of a model with a routed res5, made from its first expert."""
    state = {k: v.clone() for k, v in model.state_dict().items() if 'res5.' not in k}
    expert = model.backbone.bottom_up.res5.experts[0].state_dict()
    state.update({f'backbone.bottom_up.res5.{k}': v.clone() for k, v in expert.items()})
    return state


def test_dense_detector_weights_become_every_expert(tmp_path):
    source, model = tiny_model(), tiny_model()
    torch.save({'model': dense_names(source)}, tmp_path / 'dense.pth')
    DetectionCheckpointer(model).load(str(tmp_path / 'dense.pth'))  # detectron2's own, as upstream's tools use it
    wanted = source.backbone.bottom_up.res5.experts[0][1].conv2.weight
    for expert in model.backbone.bottom_up.res5.experts:
        assert 0 < (expert[1].conv2.weight - wanted).std() < 0.2 * wanted.std()
    assert torch.equal(model.head.cls_score.weight, source.head.cls_score.weight)


def test_model_zoo_pickle_of_a_classifier_becomes_every_expert(tmp_path):
    """ImageNet weights carry bare names, which detectron2 matches by their ends."""
    source, model = tiny_model(), tiny_model()
    prefix = 'backbone.bottom_up.'
    weights = {k[len(prefix):]: v.numpy() for k, v in dense_names(source).items() if k.startswith(prefix)}
    file = tmp_path / 'R-18.pkl'
    file.write_bytes(pickle.dumps({'model': weights, '__author__': 'torchvision', 'matching_heuristics': True}))
    SafeCheckpointer(model).load(str(file))
    wanted = source.backbone.bottom_up.res5.experts[0][0].conv1.weight
    for expert in model.backbone.bottom_up.res5.experts:
        assert 0 < (expert[0].conv1.weight - wanted).std() < 0.2 * wanted.std()
    assert torch.equal(model.backbone.bottom_up.stem.conv1.weight, source.backbone.bottom_up.stem.conv1.weight)


def test_caffe2_names_of_imagenet_weights_become_every_expert(tmp_path):
    """detectron2://ImageNetPretrained/MSRA/R-50.pkl, the default of its RetinaNet, is a flat file of such names."""
    source, model = tiny_model(), tiny_model()
    resnet = source.backbone.bottom_up
    expert = resnet.res5.experts[0]
    weights = {'conv1_w': resnet.stem.conv1.weight, 'res4_1_branch2b_w': resnet.res4[1].conv2.weight,
               'res5_0_branch1_w': expert[0].shortcut.weight, 'res5_0_branch1_bn_s': expert[0].shortcut.norm.weight + 1}
    file = tmp_path / 'R-50.pkl'
    file.write_bytes(pickle.dumps({k: v.detach().numpy() for k, v in weights.items()}))
    SafeCheckpointer(model).load(str(file))
    loaded = model.backbone.bottom_up
    assert torch.equal(loaded.stem.conv1.weight, resnet.stem.conv1.weight)
    assert torch.equal(loaded.res4[1].conv2.weight, resnet.res4[1].conv2.weight)
    for own in loaded.res5.experts:
        assert 0 < (own[0].shortcut.weight - expert[0].shortcut.weight).std() < 0.2 * expert[0].shortcut.weight.std()
        assert torch.equal(own[0].shortcut.norm.weight, expert[0].shortcut.norm.weight + 1)


def test_a_traced_detector_routes_other_images_by_their_own_gates():
    from detectron2.export import TracingAdapter
    model = tiny_model('demo/retinanet_digits', 'MODEL.RETINANET.SCORE_THRESH_TEST', '0.0').eval()
    nn.init.normal_(model.head.cls_score.weight, std=0.5)
    first, other = ([{'image': image}] for image in (torch.rand(3, 64, 96) * 255, torch.zeros(3, 64, 96)))
    stage = model.backbone.bottom_up.res5
    pooled = []
    hook = stage.router.register_forward_pre_hook(lambda router, inputs: pooled.append(inputs[0][0]))
    with torch.no_grad():
        model(first), model(other)
    hook.remove()
    # By Cauchy and Schwarz an image likes its own direction best: the first takes experts 0 and 1, the other 2 and 3.
    stage.router.weight.data = nn.functional.normalize(torch.stack([pooled[0], pooled[0], pooled[1], pooled[1]]))
    for inputs, experts in ((first, [0, 1]), (other, [2, 3])):
        with torch.no_grad(), trace_routing(model) as trace:
            model(inputs)
        assert sorted(trace['backbone.bottom_up.res5'][0].indices[0].tolist()) == experts
    adapter = TracingAdapter(model, first)
    with torch.no_grad():
        traced = torch.jit.trace(adapter, adapter.flattened_inputs, check_trace=False)
        found = adapter.outputs_schema(traced(other[0]['image'], *adapter.flattened_inputs[1:]))
        wanted = model(other)
    torch.testing.assert_close(found[0]['instances'].scores, wanted[0]['instances'].scores)


class Harm:
    def __reduce__(self):
        return os.system, ('echo harm',)


def test_strangers_pickles_are_not_run(tmp_path, capfd):
    file = tmp_path / 'evil.pkl'
    file.write_bytes(pickle.dumps({'model': {'a': Harm()}}))
    with pytest.raises(InputError, match=r"evil.pkl' is truncated, or no checkpoint.*asks for posix.system"):
        SafeCheckpointer(tiny_model()).load(str(file))
    assert 'harm' not in capfd.readouterr().out


def test_broken_and_foreign_checkpoints_are_refused(tmp_path):
    model = tiny_model()
    SafeCheckpointer(model, str(tmp_path)).save('good')
    whole = (tmp_path / 'good.pth').read_bytes()
    (tmp_path / 'short.pth').write_bytes(whole[:len(whole) // 2])
    torch.save({'model': {'conv.weight': torch.zeros(3)}}, tmp_path / 'foreign.pth')
    for name, message in (('short', 'is truncated'), ('foreign', 'none of its 1 tensors belongs here'),
                          ('absent', "Checkpoint '.*absent.pth' does not exist")):
        with pytest.raises(InputError, match=message):
            SafeCheckpointer(model).load(str(tmp_path / f'{name}.pth'))
    more_classes = tiny_model('demo/retinanet_digits', 'MODEL.RETINANET.NUM_CLASSES', '12')
    with pytest.raises(InputError, match='cls_score.weight has shape .* for another number of classes'):
        SafeCheckpointer(more_classes, complete=True).load(str(tmp_path / 'good.pth'))
    SafeCheckpointer(more_classes).load(str(tmp_path / 'good.pth'))  # fine-tuning may replace the classifier


def test_saving_is_all_or_nothing(tmp_path):
    model = tiny_model()
    checkpointer = SafeCheckpointer(model, str(tmp_path))
    checkpointer.save('model')
    before = (tmp_path / 'model.pth').read_bytes()

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # a full disk, as the kernel tells it
    try:
        with pytest.raises(InputError, match='No space left'):
            checkpointer.save('model')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / 'model.pth').read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ['last_checkpoint', 'model.pth']
    with torch.no_grad():
        model.head.cls_score.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match='head.cls_score.bias'):
        checkpointer.save('model')


# --- the meta-architecture

def test_loss_dictionary_holds_losses_only_and_diagnostics_go_to_the_storage():
    losses = "[['kl', 0.25], ['importance_unbiased', 0.5]]"
    model = tiny_model('demo/retinanet_digits', 'MOE.RESNET.LOSSES', losses).train()
    with EventStorage(19) as storage:  # the twentieth iteration, which detectron2's writers write
        losses = model(images((64, 64), (64, 96)))
        latest = storage.latest()
    assert set(losses) == {'loss_cls', 'loss_box_reg', 'loss_moe_kl', 'loss_moe_importance_unbiased'}
    assert all(value.requires_grad and value.dim() == 0 for value in losses.values())
    shares = [latest[f'moe/backbone.bottom_up.res5/expert{e}_share'][0] for e in range(4)]
    assert sum(shares) == pytest.approx(1) and 'moe/backbone.bottom_up.res5/cv' in latest
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())  # the idle experts' too: DDP waits for them
    assert model.backbone.bottom_up.res5.router.weight.grad.abs().sum() > 0


def test_auxiliary_loss_is_the_weighted_loss_of_the_records():
    model = tiny_model().train()
    model.backbone.bottom_up.res5.router.sample_noise = torch.zeros_like
    with EventStorage():
        loss = model(images((64, 64), (64, 64)))['loss_moe_kl']
    # A zero gate without noise sends both images to experts 0 and 1, half each: KL to uniform over 4 is ln 2.
    assert loss.item() == pytest.approx(0.25 * math.log(2), rel=1e-4)


def test_context_carries_true_sizes_and_is_empty_afterwards():
    model = tiny_model().eval()
    seen = []
    model.backbone.bottom_up.res5.register_forward_pre_hook(lambda *_: seen.append(current_image_sizes()))
    with torch.no_grad():
        model(images((60, 64), (50, 90)))
    sizes, padded = seen[0]
    assert sizes.tolist() == [[60, 64], [50, 90]] and padded == (64, 96)  # up to multiples of 32
    assert current_image_sizes() is None
    with EventStorage(), pytest.raises(KeyError):
        model.train()([{'image': torch.zeros(3, 64, 64), 'instances': None}, {}])
    assert current_image_sizes() is None  # after a failure too


def test_evaluation_gives_detections_and_does_not_depend_on_the_company():
    model = tiny_model('demo/retinanet_digits', 'MODEL.RETINANET.SCORE_THRESH_TEST', '0.0').eval()
    nn.init.normal_(model.backbone.bottom_up.res5.router.weight)
    nn.init.normal_(model.head.cls_score.weight, std=0.5)
    inputs = images((64, 96), (64, 96))
    with torch.no_grad():
        together, alone = model(inputs), model(inputs[:1])
    assert set(together[0]) == {'instances'} and len(together[0]['instances']) > 0
    torch.testing.assert_close(together[0]['instances'].scores, alone[0]['instances'].scores)
    torch.testing.assert_close(together[0]['instances'].pred_boxes.tensor, alone[0]['instances'].pred_boxes.tensor)


def test_padding_does_not_move_the_gate():
    """Convolutions that see one position have no border effects: then the gate of the image alone is met exactly."""
    model = tiny_model().eval()
    nn.init.normal_(model.backbone.bottom_up.res5.router.weight)
    for module in model.backbone.bottom_up.modules():
        if isinstance(module, nn.Conv2d):
            centre = torch.zeros_like(module.weight)
            middle = centre.shape[-1] // 2
            centre[:, :, middle, middle] = module.weight[:, :, middle, middle]
            module.weight.data = centre
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.bias, 0.5)  # the padding is not zero inside a network
    small, large = images((64, 64), (64, 128))
    logits = {}
    for name, inputs in (('alone', [small]), ('padded', [small, large])):
        with torch.no_grad(), trace_routing(model) as trace:
            model(inputs)
        logits[name] = trace['backbone.bottom_up.res5'][0].logits[0]
    with torch.no_grad(), trace_routing(model) as trace:  # the same, by a gate that knows nothing of padding
        batch = model.preprocess_image([small, large])
        model.backbone(batch.tensor)
    torch.testing.assert_close(logits['padded'], logits['alone'])
    assert (trace['backbone.bottom_up.res5'][0].logits[0] - logits['alone']).abs().max() > 0.1


def test_reentrant_checkpointing_is_refused_in_one_sentence():
    model = tiny_model().train()
    stage = model.backbone.bottom_up.stages[-1]
    inputs = images((64, 64), (64, 64))
    for reentrant in (False, True):
        def run(x, reentrant=reentrant):
            return checkpoint(stage, x, use_reentrant=True) if reentrant else checkpoint_routed(stage, x)
        run_stage = nn.Module()
        run_stage.forward = run
        model.backbone.bottom_up.stages[-1] = run_stage
        with EventStorage():
            if reentrant:
                with pytest.raises(InputError, match='res5 runs under re-entrant gradient checkpointing'):
                    model(inputs)
            else:
                sum(model(inputs).values()).backward()
                assert stage.router.noise_weight.grad is not None


# --- training

def test_a_starved_expert_is_warned_of_once(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger('moe_zoo'), 'propagate', True)
    hook = StarvedExperts(epoch=40)  # two values of the storage
    hook.trainer = SimpleNamespace(iter=0, storage=EventStorage())
    with caplog.at_level(logging.WARNING):
        for iteration in range(120):
            hook.trainer.iter = iteration
            if (iteration + 1) % 20 == 0:
                # Mean over 40 iterations: 0.03 is above a tenth of 1 / 4, then 0.02 below.
                low = (0.04, 0.02, 0.02, 0.02, 0.02, 0.02)[iteration // 20]
                for e, share in enumerate((low, 0.4, 0.3, 0.3 - low)):
                    hook.trainer.storage.put_scalar(f'moe/res5/expert{e}_share', share)
            hook.after_step()
            # By object: other tests may have left a second way from the logger to the handler.
            warned = {id(record) for record in caplog.records if 'fair share' in record.getMessage()}
            assert len(warned) == (iteration >= 79)
    assert 'Layer res5: of 4 experts, [0] got less than a tenth of the fair share over an epoch (the least 2.00%)' \
        in caplog.text


def logged(run):
    return [json.loads(line) for line in (run / 'metrics.json').read_text().splitlines()]


def test_a_run_trains_evaluates_and_resumes(tiny, tmp_path):
    results = main([*tiny, 'SOLVER.CHECKPOINT_PERIOD', '1'])
    run = tmp_path / 'run'
    assert set(results['bbox']) >= {'AP', 'AP50', 'AP75', 'APs', 'APm', 'APl'}
    written = json.loads((run / 'results.json').read_text())
    assert written['metrics'].keys() == {'bbox'} and written['versions']['torch'] == torch.__version__
    assert (run / 'last_checkpoint').read_text() == 'model_final.pth'
    assert [line['iteration'] for line in logged(run) if 'loss_moe_kl' in line] == [1]
    main([*tiny, '--resume', 'SOLVER.MAX_ITER', '4'])
    assert [line['iteration'] for line in logged(run) if 'loss_moe_kl' in line] == [1, 3]
    state = torch.load(run / 'model_final.pth', weights_only=True)
    assert state['iteration'] == 3 and state['trainer']['_trainer']['optimizer']['state']
    weights = str(run / 'model_final.pth')
    # Nothing is left to train: it evaluates again.
    assert main([*tiny, '--resume', 'SOLVER.MAX_ITER', '4'])['bbox'].keys() == results['bbox'].keys()
    evaluated = main([*tiny, '--eval-only', 'MODEL.WEIGHTS', weights])
    assert evaluated['bbox'].keys() == results['bbox'].keys()


def test_a_refused_run_leaves_earlier_results_and_their_config(tiny, tmp_path, capsys):
    run, foreign = tmp_path / 'run', tmp_path / 'foreign.pth'
    run.mkdir()
    torch.save({'model': {'a': torch.ones(1)}}, foreign)
    kept = {'results.json': '{"metrics": {}}', 'config.yaml': 'SEED: 1', 'unreadable_images.txt': 'a.png'}
    for name, text in kept.items():
        (run / name).write_text(text)
    for wrong in (['--eval-only'], []):
        sentence = refusal(capsys, [*tiny, 'MODEL.WEIGHTS', str(foreign), *wrong])
        assert 'none of its 1 tensors belongs here' in sentence
        assert {name: (run / name).read_text() for name in kept} == kept
    (run / 'results.json').unlink()  # the config of a run without results is that of the last command
    refusal(capsys, [*tiny, 'MODEL.WEIGHTS', str(foreign)])
    assert (run / 'config.yaml').read_text() != 'SEED: 1'


def test_coco_metrics_come_from_the_fast_evaluator(tiny, scenes):
    from detectron2.evaluation import coco_evaluation
    from faster_coco_eval import COCOeval_faster
    cfg = load_config(tiny[1], tiny[2:])
    Trainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])  # which reads the category ids
    evaluator = Trainer.build_evaluator(cfg, cfg.DATASETS.TEST[0])
    assert coco_evaluation.COCOeval_opt is COCOeval_faster and evaluator._use_fast_impl
    truth = json.loads((scenes / 'annotations' / 'instances_val.json').read_text())
    evaluator.reset()
    for image in truth['images']:  # perfect detections
        objects = [a for a in truth['annotations'] if a['image_id'] == image['id']]
        instances = Instances((image['height'], image['width']))
        boxes = torch.tensor([a['bbox'] for a in objects], dtype=torch.float32)
        instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1))
        instances.scores = torch.ones(len(objects))
        instances.pred_classes = torch.tensor([a['category_id'] - 1 for a in objects])
        evaluator.process([{'image_id': image['id']}], [{'instances': instances}])
    metrics = evaluator.evaluate()['bbox']
    assert metrics['AP'] == pytest.approx(100) and metrics['APs'] == pytest.approx(100)


def test_a_hard_constraint_in_the_backbone_hears_of_every_step_of_an_optimiser():
    cfg = load_config(path_of('coco/retinanet_condconv_r50_fpn_1x'), [
        *SMALL, 'MOE.TIMM.NAME', 'moe_resnet18', 'MODEL.BACKBONE.FREEZE_AT', '0'])
    cfg.MOE.TIMM.ARGS = type(cfg)({'constraint': 'relative', 'channels': (8, 8, 8, 8)})
    model = build_model(cfg).train()
    router = next(m.router for m in model.modules() if isinstance(m, MoEStage))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.)
    for step in (1, 2):
        with EventStorage():
            sum(model(images((64, 64), (64, 96))).values()).backward()
        assert router.constraint.importance.sum() > 0
        optimizer.step()
        assert router.constraint.steps == step and not router.constraint.importance.any()


def test_gates_of_a_condconv_backbone_are_logged_and_ask_for_no_loss():
    model = tiny_model('coco/retinanet_condconv_r50_fpn_1x', 'MOE.TIMM.NAME', 'condconv_resnet18').train()
    with EventStorage(19) as storage:
        losses = model(images((64, 64), (64, 96)))
        shares = [key for key in storage.latest() if key.startswith('moe/backbone.bottom_up.net.') and 'share' in key]
    assert set(losses) == {'loss_cls', 'loss_box_reg'} and len(shares) >= 8
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.slow
def test_both_coco_configs_train_and_evaluate(scenes, tmp_path):
    for name in CONFIGS[:2]:
        results = main(['--config-file', path_of(name), *SMALL, 'MODEL.RETINANET.NUM_CLASSES', '5', 'MOE.DATA.ROOT',
                        str(scenes), 'OUTPUT_DIR', str(tmp_path / name), 'SOLVER.MAX_ITER', '1'])
        assert 'AP50' in results['bbox']


def test_single_files_may_be_named_instead_of_a_folder(tiny, scenes):
    argv = tiny[:tiny.index('MOE.DATA.ROOT')] + tiny[tiny.index('MOE.DATA.ROOT') + 2:]
    annotations = scenes / 'annotations'
    cfg = load_config(argv[1], [
        *argv[2:], 'MOE.DATA.TRAIN_JSON', str(annotations / 'instances_train.json'), 'MOE.DATA.TRAIN_IMAGES',
        str(scenes / 'train')])
    assert 'instances_train' in cfg.DATASETS.TRAIN[0] and cfg.DATASETS.TEST == ('digit_scenes_val',)
    with pytest.raises(InputError, match='MOE.DATA.TEST_JSON and MOE.DATA.TEST_IMAGES come together'):
        load_config(argv[1], ['MOE.DATA.TEST_JSON', 'some.json'])


@pytest.mark.parametrize('opts, message', [
    (['MOE.RESNET.NUM_SELECTED', '9'], 'num_selected=9 with num_experts=4: choose between 1 and 4'),
    (['MODEL.RETINANET.NUM_CLASSES', '80'],
     "instances_train.json' has 5 categories and MODEL.RETINANET.NUM_CLASSES is 80"),
    (['MOE.DATA.ROOT', '/nowhere'], "is missing: there is no file '/nowhere/annotations/instances_train.json'"),
    (['MOE.DATA.ROOT', '', 'DATASETS.TRAIN', "('coco_2017_trian',)"],
     "Unknown data set 'coco_2017_trian'. Did you mean 'coco_2017_train'"),
    (['MODEL.WEIGHTS', '/nowhere.pth'], "Checkpoint '/nowhere.pth' does not exist"),
    (['MODEL.BACKBONE.NAME', 'build_timm_fpn'], "The model cannot be built .* 'build_timm_fpn' found in 'BACKBONE' "
     "registry. Did you mean 'build_timm_fpn_backbone'"),
    (['MODEL.META_ARCHITECTURE', 'MoeRetinaNet'], "registry. Did you mean 'MoERetinaNet'"),
    (['MOE.ITERATIONS_PER_EPOCH', '-3'], 'MOE.ITERATIONS_PER_EPOCH -3: use a number above 0'),
    (['SOLVER.IMS_PER_BATCH', '0'], 'SOLVER.IMS_PER_BATCH 0: at least one image is needed'),
    (['--num-processes', '3'], 'IMS_PER_BATCH 2 does not divide into 3 processes'),
    (['SOLVER.BASE_LR', '1e12', 'SOLVER.MAX_ITER', '9', 'SOLVER.CHECKPOINT_PERIOD', '1'],
     'Training stopped because the (loss|gradient) is .* in iteration [0-9]'),
])
def test_bad_input_ends_with_one_sentence_and_code_2(tiny, capsys, opts, message):
    import re
    assert re.search(message, refusal(capsys, [*tiny, *opts]))


def test_divergence_keeps_the_last_good_checkpoint(tiny, tmp_path, capsys):
    main([*tiny, 'SOLVER.CHECKPOINT_PERIOD', '1'])
    infinite = ['MOE.RESNET.LOSSES', "[['kl', 1e39]]"]  # beyond float32
    sentence = refusal(capsys, [*tiny, '--resume', 'SOLVER.MAX_ITER', '20', *infinite])
    assert f"the last good checkpoint is '{tmp_path / 'run' / 'model_final.pth'}'" in sentence
    assert 'the loss is NaN or infinite (loss_' in sentence and 'loss_moe_kl inf) in iteration 2, on 0000' in sentence
    state = torch.load(tmp_path / 'run' / 'model_final.pth', weights_only=True)['model']
    assert all(torch.isfinite(value).all() for value in state.values())


def damaged(scenes, folder, split='train', change=None, cut=()):
    """A copy of the scenes with a changed JSON, or with some images cut short."""
    import shutil
    shutil.copytree(scenes, folder)
    file = folder / 'annotations' / f'instances_{split}.json'
    content = json.loads(file.read_text())
    if change is not None:
        change(content)
        file.write_text(json.dumps(content))
    for name in cut:
        path = folder / split / name
        path.write_bytes(path.read_bytes()[:200])
    return folder


@pytest.mark.parametrize('change, message', [
    (lambda c: c['annotations'][2].update(category_id=99),
     'annotation 3 has category_id 99, .* 5 ids .*from 1 to 5'),
    (lambda c: c['annotations'][0].update(bbox=[1, 2, 3]), r'annotation 1 has bbox \[1, 2, 3\]'),
    (lambda c: c.pop('categories'), 'is not COCO JSON: it lacks the list categories'),
])
def test_broken_coco_json_is_named(tiny, scenes, tmp_path, capsys, change, message):
    import re
    folder = damaged(scenes, tmp_path / 'damaged', change=change)
    assert re.search(message, refusal(capsys, [*tiny, 'MOE.DATA.ROOT', str(folder)]))


def test_unreadable_images_are_named_skipped_and_counted(tiny, scenes, tmp_path, capsys):
    folder = damaged(scenes, tmp_path / 'damaged', cut=['000001.png'])
    (folder / 'val' / '000002.png').write_text('no image')
    main([*tiny, 'MOE.DATA.ROOT', str(folder), 'SOLVER.MAX_ITER', '6'])
    out = capsys.readouterr().out
    assert 'Unreadable images skipped: 2' in out and "train/000001.png' cannot be read" in out
    listed = (tmp_path / 'run' / 'unreadable_images.txt').read_text().splitlines()
    assert sorted(os.path.basename(name) for name in listed) == ['000001.png', '000002.png']
    predictions = torch.load(tmp_path / 'run' / 'inference' / 'instances_predictions.pth', weights_only=True)
    assert sorted(p['image_id'] for p in predictions) == [1, 3, 4]  # no other image stands in for the second
    for workers in ('0', '1'):
        sentence = refusal(capsys, [*tiny, '--strict-data', 'MOE.DATA.ROOT', str(folder), 'SOLVER.MAX_ITER', '6',
                                    'DATALOADER.NUM_WORKERS', workers])
        assert '000001.png' in sentence and 'MOE.DATA.STRICT is on' in sentence


def test_a_training_set_without_one_readable_image_ends(tiny, scenes, tmp_path, capsys):
    folder = damaged(scenes, tmp_path / 'damaged', cut=os.listdir(scenes / 'train'))
    assert 'No image of the training set can be read' in refusal(capsys, [*tiny, 'MOE.DATA.ROOT', str(folder)])


def test_grey_and_odd_sized_images_train(tiny, scenes, tmp_path):
    folder = damaged(scenes, tmp_path / 'odd', change=lambda c: [i.update(height=117, width=133) for i in c['images']])
    for name in os.listdir(folder / 'train'):
        Image.open(folder / 'train' / name).convert('L').resize((133, 117)).save(folder / 'train' / name)
    argv = [*tiny, 'MOE.DATA.ROOT', str(folder)]
    cfg = load_config(argv[1], argv[2:])
    for image in next(iter(Trainer.build_train_loader(cfg))):  # three channels; 117 x 133 with a short side of 64
        assert image['image'].shape == (3, 64, 73) and (image['image'][0] == image['image'][2]).all()
    results = main(argv)
    last, = [line for line in logged(tmp_path / 'run') if 'total_loss' in line]
    assert last['iteration'] == 1 and math.isfinite(last['total_loss'])
    assert not (tmp_path / 'run' / 'unreadable_images.txt').exists()  # none was passed over
    assert set(results['bbox']) >= {'AP', 'AP50'}


def gradients_of(model, inputs):
    with EventStorage():
        sum(model(inputs).values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_auxiliary_gradients_arrive_once():
    """The gradient of the gate is that of the task plus that of the auxiliary loss, no more, no less."""
    grads = []
    for losses in ('[]', "[['kl', 1.0]]", "[['kl', 2.0]]"):
        torch.manual_seed(0)
        model = tiny_model('demo/retinanet_digits', 'MOE.RESNET.LOSSES', losses).train()
        torch.manual_seed(1)
        inputs = images((64, 64), (64, 64))
        torch.manual_seed(2)
        grads.append(gradients_of(model, inputs)['backbone.bottom_up.res5.router.weight'])
    none, once, twice = grads
    torch.testing.assert_close(twice - once, once - none, rtol=1e-3, atol=1e-6)
    assert (once - none).abs().max() > 1e-4


@pytest.mark.slow
def test_a_mistake_in_one_of_two_processes_is_one_sentence(tiny, repository):
    command = [sys.executable, str(repository / 'tools' / 'train_coco.py'), *tiny, '--num-gpus', '2',
               'MODEL.RETINANET.NUM_CLASSES', '3']
    done = subprocess.run(command, capture_output=True, text=True, cwd=repository, timeout=300)
    assert done.returncode == 2
    assert done.stderr.count('error: ') == 1 and 'has 5 categories' in done.stderr and 'Traceback' not in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason='speaks of machines without CUDA')
def test_a_config_for_a_gpu_is_one_for_the_cpu_where_there_is_none():
    path = 'configs/coco/retinanet_moe_res5_r50_fpn_1x.yaml'
    assert load_config(path).MODEL.DEVICE == 'cpu'
    assert load_config(path, ['MODEL.DEVICE', 'meta']).MODEL.DEVICE == 'meta'
