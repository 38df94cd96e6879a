"""The MOE keys of a detectron2 config, and configs read so that a mistake is one sentence.

    import moe_zoo.detection
    cfg = get_cfg()
    cfg.merge_from_file('configs/coco/retinanet_moe_res5_r50_fpn_1x.yaml')
"""
import functools
from pathlib import Path
from typing import Iterator, Sequence, Tuple, Union

import torch
import yaml
from detectron2.config import CfgNode, get_cfg

from ..documents import parse_yaml
from ..errors import InputError, nearest
from ..resources import folder
from .coco import register_user_data


def add_moe_config(cfg: CfgNode) -> None:
    """Add the node MOE, which holds every key of ours, where a config has none yet.

    Importing `moe_zoo.detection` does this to detectron2's defaults, so that every `get_cfg()` has it: there is no need
    to call this, and no harm.
    """
    if 'MOE' in cfg:
        return
    moe = cfg.MOE = CfgNode()

    # build_timm_fpn_backbone: any model of timm or moe_zoo that gives features, under a pyramid. MODEL.FPN.IN_FEATURES
    # [res3, res4, res5] makes P3 to P7, [res2, res3, res4, res5] P2 to P6; MODEL.BACKBONE.FREEZE_AT n freezes what is
    # before the first stage, and n - 1 stages, which in a plain transformer are blocks.
    moe.TIMM = CfgNode()
    moe.TIMM.NAME = 'condconv_resnet50'
    moe.TIMM.ARGS = CfgNode(new_allowed=True)  # keywords of timm.create_model, such as {num_experts: 4}
    moe.TIMM.PRETRAINED = False  # weights that timm knows by the model's name
    # Or a classification checkpoint of this model or of its dense twin, as tools/train_imagenet.py writes.
    moe.TIMM.CHECKPOINT = ''
    # BatchNorm as it is, '', as a fixed affine map, FrozenBN (with trained weights only), or over all ranks of a run on
    # CUDA, SyncBN.
    moe.TIMM.NORM = ''
    moe.TIMM.CHECKPOINTING = False  # compute activations anew in backward: less memory, more time
    # timm's models expect RGB and their own mean and std. False: trust INPUT.FORMAT, PIXEL_MEAN and PIXEL_STD as given.
    moe.TIMM.CHECK_INPUT = True

    # build_moe_resnet_fpn_backbone: detectron2's ResNet with routed stages.
    moe.RESNET = CfgNode()
    moe.RESNET.LAYER = 'moe'  # moe, condconv, dyconv or deepmoe
    moe.RESNET.STAGES = ['res5']
    moe.RESNET.NUM_EXPERTS = 4
    moe.RESNET.PERTURB = 0.1  # how far copies of dense weights are moved apart, relative to each weight's spread
    moe.RESNET.ARGS = CfgNode(new_allowed=True)  # keywords of the layer; see resnet_backbone.LAYERS
    # Of moe alone:
    moe.RESNET.NUM_SELECTED = 2
    moe.RESNET.GATE = 'gap_fc'  # a key of moe_zoo.layers.image_moe.GATES
    moe.RESNET.NOISE = None  # learned noise on the gate while training; None: yes, but not under a hard constraint
    moe.RESNET.LOSSES = [['kl', 0.25]]  # (name, weight) pairs; names as in moe_zoo.losses.LOSSES
    moe.RESNET.CONSTRAINT = 'none'  # relative, mean: hard ones, with LOSSES []; all in moe_zoo.layers.image_moe
    moe.RESNET.CONSTRAINT_VALUE = None  # threshold or rate; None: the constraint's own

    # MoERetinaNet: experts in its head.
    moe.HEAD = CfgNode()
    moe.HEAD.SUBNETS = 'none'  # which are routed: none, cls, box or both
    moe.HEAD.EXPERTS = 'subnet'  # subnet, last_conv or output; see heads.EXPERTS
    moe.HEAD.GATE_PER = 'level'  # level or image
    moe.HEAD.SHARED_GATE = False  # one gate for both sub-nets
    moe.HEAD.NUM_EXPERTS = 4
    moe.HEAD.NUM_SELECTED = 2
    moe.HEAD.GATE = 'gap_fc'  # GATE to CONSTRAINT_VALUE: as above
    moe.HEAD.NOISE = None
    moe.HEAD.LOSSES = [['kl', 0.25]]
    moe.HEAD.CONSTRAINT = 'none'
    moe.HEAD.CONSTRAINT_VALUE = None
    moe.HEAD.PERTURB = 0.0  # above 0 the detections of a dense detector are not kept
    moe.HEAD.TRAIN_ONLY_NEW = False  # freeze all but the experts and gates of the head

    # Instead of detectron2's SGD, an optimiser of timm's, such as adamw, with SOLVER's BASE_LR, WEIGHT_DECAY,
    # WEIGHT_DECAY_NORM, WEIGHT_DECAY_BIAS, BIAS_LR_FACTOR, MOMENTUM where it has one, and CLIP_GRADIENTS.
    moe.OPTIMIZER = CfgNode()
    moe.OPTIMIZER.NAME = ''  # a name of timm.optim.list_optimizers()
    moe.OPTIMIZER.ARGS = CfgNode(new_allowed=True)  # its keywords, such as {betas: [0.9, 0.95]}

    # Own data, for the tools of moe_zoo: a folder with annotations/instances_{train,val}.json, train/ and val/, or the
    # single pieces. They replace DATASETS.TRAIN and DATASETS.TEST.
    moe.DATA = CfgNode()
    moe.DATA.ROOT = ''
    moe.DATA.TRAIN_JSON = ''
    moe.DATA.TRAIN_IMAGES = ''
    moe.DATA.TEST_JSON = ''
    moe.DATA.TEST_IMAGES = ''
    moe.DATA.STRICT = False  # refuse an unreadable image instead of skipping and counting it
    moe.DATA.UPSIDE_DOWN = False  # turn every second training image over, besides what INPUT.RANDOM_FLIP does

    # For trainers that do not tell of epochs, such as detectron2's own tools: images of the training set by images a
    # batch, which the temperature of Dynamic Convolution follows. tools/train_coco.py counts them itself.
    moe.ITERATIONS_PER_EPOCH = 0

    moe.FIND_UNUSED_PARAMETERS = False  # DDP; our layers give every parameter a gradient, other models may not


def load_config(config_file: Union[str, Path], opts: Sequence[str] = ()) -> CfgNode:
    """Read a config with our keys, `_BASE_` and KEY VALUE overrides included, and register the data it names.

    Unlike detectron2's own loading, python tags are refused: only plain yaml is read. Where there is no CUDA,
    MODEL.DEVICE 'cuda', the default, becomes 'cpu'.

    Args:
        config_file: A yaml file; one below `configs/` is also found in an installed package.
        opts: KEY VALUE KEY VALUE ...

    Raises:
        InputError: The file or a key does not exist, or a value has the wrong type.
    """
    path = _find(config_file)
    cfg = get_cfg()
    with sentences(cfg, f"'{path}'"):
        check_yaml(path)
        cfg.merge_from_file(str(path), allow_unsafe=False)
    if len(opts) % 2:
        raise InputError(f'Overrides come as KEY VALUE pairs, but there are {len(opts)} words: {" ".join(opts)}.')
    with sentences(cfg, 'the command line'):
        _open_free_nodes(cfg, opts[::2])
        cfg.merge_from_list(list(opts))
    if cfg.MODEL.DEVICE == 'cuda' and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = 'cpu'
    register_user_data(cfg)
    return cfg


def check_yaml(path: Path, above: Tuple[Path, ...] = ()) -> None:
    """Look at a config, and at those that it builds on by `_BASE_`, before yacs copies what is in them.

    Raises:
        YAMLError: One of them is more than its text should be, as `moe_zoo.documents.parse_yaml` says.
        InputError: One builds on itself.
    """
    if path.resolve() in above:
        raise InputError(f"'{path}' builds on itself by _BASE_.")
    content = parse_yaml(path.read_text(encoding='utf-8'))
    bases = content.get('_BASE_', []) if isinstance(content, dict) else []
    for base in bases if isinstance(bases, list) else [bases]:
        if isinstance(base, str) and '://' not in base:
            check_yaml(path.parent / Path(base).expanduser(), (*above, path.resolve()))


def _open_free_nodes(cfg: CfgNode, keys: Sequence[str]) -> None:
    """Let a word of the command line be new in a node of keywords, such as MOE.TIMM.ARGS, as a file does."""
    for key in keys:
        *path, leaf = key.split('.')
        node = functools.reduce(lambda found, name: found.get(name) if isinstance(found, CfgNode) else None, path, cfg)
        if isinstance(node, CfgNode) and node.is_new_allowed():
            node.setdefault(leaf, None)  # yacs lets None become anything


def _find(config_file: Union[str, Path]) -> Path:
    path = Path(config_file).expanduser()
    if path.suffix == '.py':
        raise InputError(f"'{path}' is a LazyConfig: run it by `moe-zoo run lazyconfig_train_net.py`; this takes yaml.")
    if not path.exists() and path.parts[:1] == ('configs',) and (folder('configs').parent / path).exists():
        return folder('configs').parent / path
    if not path.is_file():
        known = [f'configs/{p.parent.name}/{p.name}' for p in folder('configs').glob('*/retinanet_*.yaml')]
        raise InputError(f"--config-file '{path}' is not a file.{nearest(str(path), known)}")
    return path


class sentences:
    """Turn what yacs, yaml and the file system raise about a config into one sentence each."""

    def __init__(self, cfg: CfgNode, where: str):
        self.cfg, self.where = cfg, where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if error is None or isinstance(error, InputError) or not isinstance(error, Exception):
            return
        text = str(error.args[0]) if len(error.args) == 1 else str(error)
        if isinstance(error, (KeyError, AssertionError)) and 'Non-existent' in text:
            key = text.rsplit(': ', 1)[1]
            raise InputError(f'Unknown config key {key!r} in {self.where}.{nearest(key, _keys(self.cfg))}') from error
        if isinstance(error, yaml.constructor.ConstructorError):
            raise InputError(f'{self.where} holds a python tag ({error.problem}): write the values out in plain yaml.'
                             ) from error
        if isinstance(error, yaml.YAMLError):
            line = getattr(error, 'problem_mark', None)
            raise InputError(f'{self.where} is not yaml: {getattr(error, "problem", error)}'
                             f'{f" in line {line.line + 1}" if line else ""}.') from error
        if isinstance(error, OSError):
            raise InputError(f"{self.where} cannot be read: {error.strerror or error} ('{error.filename}').") from error
        text = ' '.join(text.split())[:300] or repr(error)
        raise InputError(f'{self.where} cannot be used as a config: {text}.') from error


def _keys(node: CfgNode, prefix: str = '') -> Iterator[str]:
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from _keys(value, f'{prefix}{key}.')
