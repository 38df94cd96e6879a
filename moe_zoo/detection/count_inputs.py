"""A detector from a config and images as it takes them, for `tools/count_flops.py --config-file`. On the CPU."""
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import transforms
from detectron2.data.detection_utils import read_image
from detectron2.modeling import build_model
from torch import nn

from .checkpoint import SafeCheckpointer
from .config import load_config


def load(config_file: str, opts: list[str], weights: str | None = None) -> tuple[CfgNode, nn.Module]:
    """The config with its overrides and the detector, with `weights` or freshly initialised.

    Raises:
        InputError: An unknown config or key, or weights of another model.
    """
    cfg = load_config(config_file, opts)
    cfg.MODEL.DEVICE = 'cpu'
    model = build_model(cfg)
    if weights:
        SafeCheckpointer(model, complete=True).load(weights)
    return cfg, model


def noise(cfg: CfgNode, size: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """Input of one image of noise: `size`, or the smaller test side of the config by 1.5 times that."""
    height = cfg.INPUT.MIN_SIZE_TEST
    height, width = size or (height, min(cfg.INPUT.MAX_SIZE_TEST, height * 3 // 2))
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, height, width), generator=generator).float()
    return [{'image': image, 'height': height, 'width': width}]


def read(cfg: CfgNode, path: Path) -> list[dict[str, Any]]:
    """Input of one image file, resized as the config says for testing.

    Raises:
        OSError: The file is no image.
    """
    image = read_image(str(path), format=cfg.INPUT.FORMAT)
    height, width = image.shape[:2]
    resize = transforms.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    image = resize.get_transform(image).apply_image(image)
    return [{'image': torch.as_tensor(image.astype('float32').transpose(2, 0, 1)), 'height': height, 'width': width}]
