"""Detection scenes made of real digits: small, medium and large ones on textured ground, as COCO JSON and PNG.

Every byte follows from the arguments. Image i of a set is the same whatever the length of the set.
"""
import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from moe_zoo.errors import InputError, exit_on_input_error

from .digits import load_digits_split

SIZES = ('small', 'medium', 'large')
AREA_LIMITS = (32 ** 2, 96 ** 2)  # COCO's own, in pixels of the image as annotated

# Side of the square of equal area, in pixels. Away from the limits, so that rounding cannot move an object across.
SIDES = {'small': (14., 30.), 'medium': (36., 88.), 'large': (100., 128.)}
KINDS = (*SIZES, 'mixed')
MIN_IMAGE_SIZE = 160
FORMAT = 1  # raise when the same arguments would give other pixels
MARGIN = 3  # free pixels between two objects, and between an object and the edge


def size_class(area: float) -> str:
    """COCO's name for an area in pixels; the limits themselves count as medium."""
    if area < AREA_LIMITS[0]:
        return 'small'
    return 'medium' if area <= AREA_LIMITS[1] else 'large'


def write_scenes(
        folder: Union[str, os.PathLike],
        train: int = 400,
        val: int = 100,
        seed: int = 0,
        image_size: int = 192,
        classes: Sequence[int] = tuple(range(10)),
        progress: Optional[bool] = None,
) -> Path:
    """Write a training and a validation set of digit scenes, or find them already written.

    Scene i is of kind i mod 4: only small objects (3 to 6), only medium ones (1 to 3), one large one, or a mixture,
    as wide views, close-ups and everyday photographs are. Digits of the two sets come from disjoint images.
    Boxes are tight around the ink and do not overlap; `area` is width x height of the box.

    Args:
        folder: Receives `annotations/instances_{train,val}.json`, `train/` and `val/`; renamed into place when
            complete. A folder that holds the same scenes is left alone.
        train: Number of training images.
        val: Number of validation images.
        seed: Of everything random.
        image_size: Height and width in pixels, at least 160, so that an object above 96 x 96 finds room.
        classes: Digits to use; category id is digit + 1.
        progress: Print a line to stderr every two seconds; None does so from 200 images on.

    Returns:
        `folder` as a path.

    Raises:
        InputError: An argument is out of range, or `folder` holds something else.
    """
    recipe = _checked_recipe(train, val, seed, image_size, classes)
    folder = Path(folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        _refuse_other_content(folder, recipe)
        return folder

    x_train, y_train, x_val, y_val = load_digits_split(seed)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f'.{folder.name}.'))
    except OSError as error:
        raise InputError(f"Cannot write digit scenes to '{folder}': {error.strerror or error}.") from error
    report = _Progress(train + val, (train + val >= 200) if progress is None else progress)
    try:
        beside.chmod(0o755)
        (beside / 'annotations').mkdir()
        _write_set(beside, 'train', x_train, y_train, recipe, report)
        _write_set(beside, 'val', x_val, y_val, recipe, report)
        os.replace(beside, folder)  # an empty folder may be replaced, a filled one may not
    except OSError as error:
        raise InputError(f"Cannot write digit scenes to '{folder}': {error.strerror or error}.") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _checked_recipe(train, val, seed, image_size, classes) -> Dict:
    for name, count in (('train', train), ('val', val)):
        if int(count) != count or count < len(KINDS):
            raise InputError(f'{name} must be a number of images of at least {len(KINDS)}, one a kind of scene, '
                             f'not {count!r}.')
    if int(image_size) != image_size or image_size < MIN_IMAGE_SIZE:
        raise InputError(f'image_size must be at least {MIN_IMAGE_SIZE} pixels to hold objects above 96 x 96, '
                         f'not {image_size!r}.')
    classes = [int(digit) for digit in classes]
    if not classes or len(set(classes)) != len(classes) or not set(classes) <= set(range(10)):
        raise InputError(f'classes must be different digits from 0 to 9, not {classes}.')
    return {'format': FORMAT, 'train': int(train), 'val': int(val), 'seed': int(seed),
            'image_size': int(image_size), 'classes': classes}


def _refuse_other_content(folder: Path, recipe: Dict) -> None:
    """Return only where `folder` holds exactly what `recipe` would write."""
    for split in ('train', 'val'):
        try:
            annotations = json.loads((folder / 'annotations' / f'instances_{split}.json').read_text())
            found = annotations['info']['recipe']
            names = {image['file_name'] for image in annotations['images']}
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"'{folder}' holds something other than digit scenes; give an empty or a new folder."
                             ) from None
        if found != recipe:
            other = ', '.join(f'{key}={found.get(key)!r}' for key in recipe if found.get(key) != recipe[key])
            raise InputError(f"'{folder}' holds digit scenes made with {other}; give another folder or remove it.")
        missing = names - set(os.listdir(folder / split) if (folder / split).is_dir() else ())
        if missing:
            raise InputError(f"'{folder / split}' lacks {len(missing)} of its {len(names)} images; "
                             'remove the folder and run again.')


def _write_set(folder: Path, split: str, digits: np.ndarray, targets: np.ndarray, recipe: Dict, report) -> None:
    """Draw one set and its annotations."""
    from PIL import Image
    (folder / split).mkdir()
    usable = np.isin(targets, recipe['classes'])
    digits, targets = digits[usable], targets[usable]
    size = recipe['image_size']
    images, annotations = [], []
    for i in range(recipe[split]):
        rng = np.random.default_rng([recipe['seed'], ('train', 'val').index(split), i])
        pixels, objects = draw_scene(rng, digits, targets, size, KINDS[i % len(KINDS)])
        name = f'{i + 1:06d}.png'
        Image.fromarray(pixels).save(folder / split / name, compress_level=6)
        images.append({'id': i + 1, 'file_name': name, 'height': size, 'width': size})
        for box, digit in objects:
            annotations.append({
                'id': len(annotations) + 1, 'image_id': i + 1, 'category_id': digit + 1, 'bbox': list(box),
                'area': box[2] * box[3], 'iscrowd': 0,
            })
        report.step()
    content = {
        'info': {
            'description': "Scenes of scikit-learn's handwritten digits (UCI Optical Recognition of Handwritten "
                           'Digits, CC BY 4.0), written by moe_zoo.data.scenes',
            'recipe': recipe,
        },
        'images': images,
        'annotations': annotations,
        'categories': [{'id': digit + 1, 'name': str(digit)} for digit in sorted(recipe['classes'])],
    }
    (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))


def draw_scene(
        rng: np.random.Generator,
        digits: np.ndarray,
        targets: np.ndarray,
        size: int,
        kind: str,
) -> Tuple[np.ndarray, List[Tuple[Tuple[int, int, int, int], int]]]:
    """Draw one scene.

    Args:
        rng: The only source of chance.
        digits: (n, 8, 8) uint8.
        targets: (n,) their classes.
        size: Height and width in pixels.
        kind: 'small', 'medium', 'large' or 'mixed'.

    Returns:
        pixels: (size, size, 3) uint8.
        objects: ((x, y, width, height), digit) of every object.
    """
    pixels = _ground(rng, size)
    taken = np.zeros((size, size), dtype=bool)
    objects = []
    for name in _plan(rng, kind):
        which = rng.integers(len(targets))
        ink = _enlarge(rng, digits[which], name, int(0.9 * size))
        place = _free_place(rng, taken, ink.shape)
        if place is None:
            continue
        y, x = place
        h, w = ink.shape
        taken[max(y - MARGIN, 0):y + h + MARGIN, max(x - MARGIN, 0):x + w + MARGIN] = True
        region = pixels[y:y + h, x:x + w]
        region += ink[..., None] * (_ink_colour(rng, region) - region)
        objects.append(((int(x), int(y), int(w), int(h)), int(targets[which])))
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8), objects


def _plan(rng: np.random.Generator, kind: str) -> List[str]:
    """Sizes of the objects to place, largest first: the first always finds room."""
    if kind == 'small':
        return ['small'] * int(rng.integers(3, 7))
    if kind == 'medium':
        return ['medium'] * int(rng.integers(1, 4))
    if kind == 'large':
        return ['large']
    names = [SIZES[int(i)] for i in rng.integers(0, 3, size=rng.integers(2, 6))]
    return sorted(names, key=SIZES.index, reverse=True)


def _enlarge(rng: np.random.Generator, digit: np.ndarray, name: str, longest: int) -> np.ndarray:
    """Enlarge a digit until its ink box has an area of the class `name`.

    Returns:
        (h, w) float in 0..1, ink in every border row and column, at most `longest` long.
    """
    from PIL import Image
    low, high = SIDES[name]
    side = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    rows, cols = np.nonzero(digit >= 96)
    digit = digit[rows.min():rows.max() + 1, cols.min():cols.max() + 1]
    # Thin ones are broadened to half their height: a large "1" must fit into the scene.
    aspect = np.clip(digit.shape[1] / digit.shape[0] * rng.uniform(0.9, 1.1), 0.5, 1.)
    height, width = side / np.sqrt(aspect), side * np.sqrt(aspect)
    if height > longest:
        height, width = longest, side * side / longest
    height, width = int(round(height)), int(round(width))
    image = Image.fromarray(np.pad(digit, 1)).resize((width, height), Image.Resampling.BICUBIC)
    return _trim(np.asarray(image, dtype=np.float64) / 255, height, width)


def _trim(ink: np.ndarray, height: int, width: int) -> np.ndarray:
    """Cut to the ink, stretch that to the wanted size, and cut what fell below the threshold of visible ink."""
    from PIL import Image
    rows, cols = np.nonzero(ink > 0.4)
    box = (int(cols.min()), int(rows.min()), int(cols.max()) + 1, int(rows.max()) + 1)
    image = Image.fromarray((ink * 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC, box=box)
    ink = np.asarray(image, dtype=np.float64) / 255
    ink = np.where(ink > 0.3, ink, 0.)
    rows, cols = np.nonzero(ink)
    return ink[rows.min():rows.max() + 1, cols.min():cols.max() + 1]


def _free_place(rng: np.random.Generator, taken: np.ndarray, shape: Tuple[int, int]) -> Optional[Tuple[int, int]]:
    """Top left corner of a free place, or None where 60 tries found none."""
    size = len(taken)
    h, w = shape
    for _ in range(60):
        y = int(rng.integers(MARGIN, size - h - MARGIN + 1))
        x = int(rng.integers(MARGIN, size - w - MARGIN + 1))
        if not taken[y:y + h, x:x + w].any():
            return y, x
    return None


def _ground(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) float ground: a colour, a slope, blotches of three sizes and fine grain."""
    from PIL import Image
    ground = np.zeros((size, size, 3)) + rng.uniform(60, 190, size=3)
    for cells, contrast in ((2, 20.), (6, 14.), (24, 8.)):
        coarse = rng.normal(size=(cells, cells)).astype(np.float32)
        blotches = Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)
        ground += contrast * np.asarray(blotches, dtype=np.float64)[..., None] * rng.uniform(0.6, 1., size=3)
    return ground + rng.normal(scale=3., size=(size, size, 1))


def _ink_colour(rng: np.random.Generator, region: np.ndarray) -> np.ndarray:
    """(3,) a colour that stands out from the ground: dark on bright or bright on dark."""
    bright = region.mean() < 125
    return rng.uniform(200, 255, size=3) if bright else rng.uniform(0, 50, size=3)


class _Progress:
    """One line to stderr every two seconds."""

    def __init__(self, total: int, shown: bool):
        self.total, self.shown, self.done = total, shown, 0
        self.start = self.last = time.monotonic()

    def step(self) -> None:
        self.done += 1
        now = time.monotonic()
        if self.shown and (now - self.last >= 2 or self.done == self.total):
            self.last = now
            left = (now - self.start) / self.done * (self.total - self.done)
            print(f'scenes: {self.done} of {self.total}, about {left:.0f} s left', file=sys.stderr)


@exit_on_input_error
def main(argv: Optional[Sequence[str]] = None) -> None:
    """`python -m moe_zoo.data FOLDER` writes digit scenes; see `--help`."""
    parser = argparse.ArgumentParser(
        prog='python -m moe_zoo.data', description='Write detection scenes of real digits as COCO JSON and PNG.')
    parser.add_argument('folder', help='receives annotations/instances_{train,val}.json, train/ and val/')
    parser.add_argument('--train', type=int, default=400, metavar='N', help='training scenes (default: 400)')
    parser.add_argument('--val', type=int, default=100, metavar='N', help='validation scenes (default: 100)')
    parser.add_argument('--seed', type=int, default=0, help='of everything random (default: 0)')
    parser.add_argument('--image-size', type=int, default=192, metavar='PIXELS', help='side (default: 192)')
    parser.add_argument('--classes', type=int, nargs='+', default=list(range(10)), metavar='DIGIT',
                        help='digits to use (default: all)')
    args = parser.parse_args(argv)
    print(write_scenes(args.folder, args.train, args.val, args.seed, args.image_size, args.classes))
