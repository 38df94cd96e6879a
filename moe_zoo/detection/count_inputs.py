"""A detector from a config, with or without weights, and images as it takes them, for the tools that look at one."""
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, transforms
from detectron2.modeling import build_model
from torch import nn

from ..data.images import UnreadableImage
from ..errors import InputError
from .checkpoint import SafeCheckpointer
from .coco import class_names, classes_of_model
from .config import load_config
from .images import read_image


def load(config_file: str, opts: list[str], weights: str | None = None) -> tuple[CfgNode, nn.Module]:
    """The config with its overrides and the detector on the CPU, with `weights` or freshly initialised.

    Raises:
        InputError: An unknown config or key, or weights of another model.
    """
    cfg = load_config(config_file, opts)
    cfg.MODEL.DEVICE = 'cpu'
    model = build_model(cfg)
    if weights:
        SafeCheckpointer(model, complete=True).load(weights)
    return cfg, model


def load_weights(cfg: CfgNode) -> tuple[nn.Module, dict[str, Any]]:
    """The detector of a config with all its weights, in evaluation mode, and what is known of it.

    Returns:
        The model, on its device.
        `weights`, and `classes`: the names of its categories, or their numbers where nothing names them.

    Raises:
        InputError: MODEL.WEIGHTS is empty, or not of the whole of this model.
    """
    if not cfg.MODEL.WEIGHTS:
        raise InputError('MODEL.WEIGHTS is empty: give the checkpoint of a trained detector.')
    logging.getLogger('fvcore.common.checkpoint').setLevel(logging.WARNING)
    warnings.filterwarnings('ignore', message='torch.meshgrid')  # detectron2's, once a process
    model = build_model(cfg)
    rest = SafeCheckpointer(model, complete=True).load(cfg.MODEL.WEIGHTS)
    trained_on = rest.get('trainer', {}).get('classes')
    named = [names for name in cfg.DATASETS.TEST if name in DatasetCatalog.list() and (names := class_names(name))]
    number = classes_of_model(cfg)[1]
    classes = trained_on or next((names for names in named if len(names) == number), None) or map(str, range(number))
    return model.eval(), {'weights': cfg.MODEL.WEIGHTS, 'classes': list(classes)}


def noise(cfg: CfgNode, size: tuple[int, int] | None = None, seed: int = 0) -> list[dict[str, Any]]:
    """Input of one image of noise: `size`, or the smaller test side of the config by 1.5 times that."""
    height = cfg.INPUT.MIN_SIZE_TEST
    height, width = size or (height, min(cfg.INPUT.MAX_SIZE_TEST, height * 3 // 2))
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(256, (3, height, width), generator=generator).float()
    return [{'image': image, 'height': height, 'width': width}]


def read(cfg: CfgNode, path: Path) -> list[dict[str, Any]]:
    """Input of one image file, resized as the config says for testing.

    Raises:
        UnreadableImage: The file is no image, or so long and thin that its shorter side vanishes.
    """
    image = read_image(str(path), format=cfg.INPUT.FORMAT)
    height, width = image.shape[:2]
    resize = transforms.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    transform = resize.get_transform(image)
    if min(transform.new_h, transform.new_w) < 1:
        raise UnreadableImage(f'of its {width} x {height} pixels, the shorter side vanishes when it is resized')
    image = transform.apply_image(image)
    return [{'image': torch.as_tensor(image.astype('float32').transpose(2, 0, 1)), 'height': height, 'width': width}]
