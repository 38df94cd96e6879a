"""What a trained detector sees in images: boxes drawn into copies of them, and one JSON of all.

    tools/predict_coco.py --config-file configs/demo/retinanet_digits.yaml --weights model_final.pth --images DIR
        --output DIR [KEY VALUE ...]
"""
import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from PIL import Image, ImageColor, ImageDraw, ImageFont
from pycocotools import mask as mask_util
from rich.console import Console
from rich.progress import track
from torch import nn

from ..data.images import UnreadableImage
from ..errors import InputError, atomic_write, counted, exit_on_input_error
from .config import load_config
from .count_inputs import load_weights, read
from .images import read_image

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
SATURATION, LIGHTNESS = 90, 45  # of the colours of classes, in percent


def find_images(path: Path, output: Path) -> List[Tuple[Path, Path]]:
    """Every image below a folder, or the one that is named, with the place of its copy below `output`.

    Raises:
        InputError: There is none, or the copies would replace the images.
    """
    folder = path if path.is_dir() else path.parent
    found = sorted(p for p in path.rglob('*') if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not path.exists() or not found:
        raise InputError(f"--images '{path}': there is no image ({', '.join(SUFFIXES)}).")
    if output.resolve() == folder.resolve():
        raise InputError(f"--output '{output}' is the folder of the images, which the drawings would replace: give "
                         'another.')
    inside = output.resolve()
    real = {p: Path(os.path.realpath(p)) for p in found}  # a link may lead to itself, where Path.resolve raises
    return [(p, output / p.relative_to(folder)) for p in found if inside not in real[p].parents]


@torch.no_grad()
def detect(cfg: CfgNode, model: nn.Module, path: Path, classes: List[str], threshold: float) -> List[Dict[str, Any]]:
    """Objects in an image file: class, score, box [x, y, width, height] in its pixels, and a mask where there is one.

    Raises:
        UnreadableImage: The file is no image.
    """
    found = model(read(cfg, path))[0]['instances'].to('cpu')
    objects = []
    for entry in instances_to_coco_json(found[found.scores >= threshold], 0):
        row = {'class': classes[entry['category_id']], 'score': round(entry['score'], 4),
               'box': [round(value, 2) for value in entry['bbox']]}
        objects.append(row | {key: entry[key] for key in ('segmentation',) if key in entry})
    return objects


def draw(image: Image.Image, objects: List[Dict[str, Any]], classes: List[str]) -> Image.Image:
    """A copy of an image with boxes, class names and scores, and masks as a veil; one colour a class."""
    image = image.convert('RGB')
    size = max(10, round(max(image.size) / 50))
    pen = ImageDraw.Draw(image)
    for entry in reversed(objects):  # the surest on top
        hue = round(360 * classes.index(entry['class']) / len(classes))
        colour = ImageColor.getrgb(f'hsl({hue}, {SATURATION}%, {LIGHTNESS}%)')
        if 'segmentation' in entry:
            veil = Image.fromarray(100 * mask_util.decode(entry['segmentation']).astype(np.uint8))
            image.paste(colour, mask=veil)
        x, y, width, height = entry['box']
        pen.rectangle([x, y, x + max(width, 1), y + max(height, 1)], outline=colour, width=max(2, size // 6))
        text, font = f'{entry["class"]} {entry["score"]:.2f}', ImageFont.load_default(size)
        above = y - size - 4 if y >= size + 4 else y
        pen.rectangle(pen.textbbox((x + 2, above), text, font=font), fill=colour)
        pen.text((x + 2, above), text, fill='white', font=font)
    return image


def predict(
        cfg: CfgNode,
        images: Iterable[Tuple[Path, Path]],
        threshold: float,
) -> Tuple[Dict[str, Any], List[str]]:
    """Look at images and write their drawings.

    Args:
        cfg: A config whose MODEL.WEIGHTS are complete.
        images: Files, each with the place of its drawing.
        threshold: Objects below this score are left out.

    Returns:
        weights, classes, threshold, and images: file, width, height and objects of each.
        A sentence on each image that could not be read.
    """
    model, about = load_weights(cfg)
    rows, unreadable = [], []
    for path, copy in track(list(images), description='images', console=Console(stderr=True), transient=True):
        try:
            objects = detect(cfg, model, path, about['classes'], threshold)
            image = Image.fromarray(read_image(str(path), format='RGB'))
        except UnreadableImage as error:
            unreadable.append(f"The image '{path}' cannot be read: {error}.")
            continue
        with atomic_write(copy) as part:
            draw(image, objects, about['classes']).save(part, format=Image.registered_extensions()[copy.suffix.lower()])
        rows.append({'image': str(path), 'width': image.width, 'height': image.height, 'objects': objects})
    return {**about, 'threshold': threshold, 'images': rows}, unreadable


@exit_on_input_error
def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line; returns the exit code."""
    args = _parser().parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    if not 0 <= args.threshold <= 1:
        raise InputError(f'--threshold {args.threshold}: scores lie between 0 and 1.')
    output = Path(args.output)
    images = find_images(Path(args.images), output)
    cfg = load_config(args.config_file, [*args.opts, *(['MODEL.WEIGHTS', args.weights] if args.weights else [])])
    found, unreadable = predict(cfg, images, args.threshold)
    for sentence in unreadable:
        print(f'error: {sentence}', file=sys.stderr)
    if found['images']:
        with atomic_write(output / 'predictions.json') as part:
            part.write_text(json.dumps(found, indent=1))
        objects = counted(sum(len(row['objects']) for row in found['images']), 'object')
        print(f"{objects} of a score of {args.threshold:g} or more in {counted(len(found['images']), 'image')}: "
              f"drawings and predictions.json are in '{output}'")
    return 2 if unreadable else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name,
        description='Detect objects in images: writes a copy of each image with its boxes, and predictions.json.',
        epilog='KEY VALUE pairs change the config. An image that cannot be read is reported and the others are still '
               'looked at; the exit code is then 2.')
    add = parser.add_argument
    add('--config-file', required=True, metavar='FILE', help='detectron2 yaml that the detector was trained with')
    add('--weights', default='', metavar='FILE', help="its checkpoint (default: the config's MODEL.WEIGHTS)")
    add('--images', required=True, metavar='PATH', help='folder of images, or one image')
    add('--output', required=True, metavar='DIR', help='receives the drawings and predictions.json')
    add('--threshold', type=float, default=0.5, metavar='S', help='least score of an object (default: 0.5)')
    add('opts', nargs='*', metavar='KEY VALUE', help='config keys to change')
    return parser


if __name__ == '__main__':
    raise SystemExit(main())
