"""What a COCO JSON must be before pycocotools reads it: that is C, which takes a number in a file for what it says.

An outline of one edge a billion pixels long, or a mask that calls itself 60,000 pixels high, makes it ask for
gigabytes, and where there are none the process ends by a segmentation fault.

Letters of the format: an RLE mask is {size: [height, width], counts: lengths of runs, as numbers or packed as text}.
"""
import math
from typing import Any, Dict, Iterable, List, Mapping

from PIL import Image

from ..errors import InputError

FARTHEST = 1e7  # pixels from the corner of an image
OUTLINE = 100  # length of a polygon, in (width + height) of its image


def check_content(json_file: str, content: Any) -> None:
    """Look at the images, categories and objects of a COCO JSON that was read.

    Raises:
        InputError: Something in it is not what detectron2 and pycocotools take; one sentence names it.
    """
    lacking = [key for key in ('images', 'annotations', 'categories')
               if not isinstance(content, dict) or not isinstance(content.get(key), list)]
    if lacking or not content['images']:
        raise InputError(f"'{json_file}' is not COCO JSON: it lacks the list {' and '.join(lacking or ['of images'])}.")
    images = _by_id(json_file, 'image', content['images'])
    categories = _by_id(json_file, 'category', content['categories'])
    _by_id(json_file, 'annotation', content['annotations'])
    for number, image in images.items():
        sides = [image.get('width'), image.get('height')]
        most = 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
        if not all(_is_number(side, int) and side > 0 for side in sides) or sides[0] * sides[1] > most:
            raise _wrong(json_file, f'image {number}', 'width and height', sides, 'numbers of pixels that can be read')
        _check_text(json_file, f'image {number}', image, 'file_name')
    for number, category in categories.items():
        _check_text(json_file, f'category {number}', category, 'name')
    for annotation in content['annotations']:
        if annotation.get('category_id') not in categories:
            raise InputError(
                f"'{json_file}': annotation {annotation['id']} has category_id {annotation.get('category_id')}, "
                f'which is not among the {len(categories)} ids in categories'
                + (f' (from {min(categories)} to {max(categories)}).' if categories else '.'))
        _check_object(json_file, annotation, images.get(annotation.get('image_id')))


def _by_id(json_file: str, kind: str, rows: List[Any]) -> Dict[int, Mapping[str, Any]]:
    """Raises: InputError: A row has no id, that of another, or is no row."""
    found: Dict[int, Mapping[str, Any]] = {}
    for place, row in enumerate(rows):
        number = row.get('id') if isinstance(row, dict) else None
        if not _is_id(number) or number in found:
            other = ', which another has' if _is_id(number) else ', which is no whole number of 64 bits'
            raise InputError(f"'{json_file}': {kind} at place {place} has the id {_short(number)}{other}.")
        for key in ('image_id', 'category_id'):
            if kind == 'annotation' and not _is_id(row.get(key)):
                raise _wrong(json_file, f'annotation {number}', key, row.get(key), 'a whole number')
        found[number] = row
    return found


def _check_object(json_file: str, row: Mapping[str, Any], image: Any) -> None:
    """One annotation; where it is of none of the images, `image` is None and its mask is never looked at."""
    who, box, mask = f'annotation {row["id"]}', row.get('bbox', ()), row.get('segmentation')
    if not isinstance(box, list) or len(box) != 4 or not _are_near(box):
        raise _wrong(json_file, who, 'bbox', box, 'four numbers x, y, width, height')
    if 'area' in row and not (_is_number(row['area']) and 0 <= row['area'] <= FARTHEST ** 2):
        raise _wrong(json_file, who, 'area', row['area'], 'a number of pixels')
    if row.get('iscrowd', 0) not in (0, 1):
        raise _wrong(json_file, who, 'iscrowd', row['iscrowd'], '0 or 1')
    if not mask or image is None:
        return
    width, height = image['width'], image['height']
    if isinstance(mask, list):
        for polygon in mask:
            if not isinstance(polygon, list) or not _are_near(polygon) or (
                    _length(polygon) > OUTLINE * (width + height)):
                raise _wrong(json_file, who, 'segmentation', polygon, 'the corners x, y, x, y ... of outlines')
    elif not isinstance(mask, dict) or mask.get('size') != [height, width] or (
            _covered(mask.get('counts')) != width * height):
        raise _wrong(json_file, who, 'segmentation', mask, f'runs that cover its image of {width} x {height} pixels')


def _length(polygon: List[float]) -> float:
    points = list(zip(polygon[::2], polygon[1::2]))
    return sum(max(abs(x - u), abs(y - v)) for (x, y), (u, v) in zip(points, points[1:] + points[:1]))


def _covered(counts: Any) -> int:
    """Pixels that the runs of a mask cover; -1 where they are no runs."""
    if isinstance(counts, str):
        counts = _unpacked(counts)
    if not isinstance(counts, list) or not all(_is_number(run, int) and run >= 0 for run in counts):
        return -1
    return sum(counts)


def _unpacked(text: str) -> List[int]:
    """Runs from text: five bits a character, least first, the sixth says that more follow; from the fourth run on, the
    difference to the last but one. Empty where the text ends inside a run."""
    runs: List[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return []
        value |= (bits & 0x1f) << shift
        shift += 5
        if not bits & 0x20:
            value -= (1 << shift) if bits & 0x10 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return [] if shift else runs


def _is_number(value: Any, kind: Any = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return _is_number(value, int) and abs(value) < 2 ** 63


def _are_near(values: Iterable[Any]) -> bool:
    return all(_is_number(value) and -FARTHEST <= value <= FARTHEST for value in values)  # NaN is not


def _check_text(json_file: str, who: str, row: Mapping[str, Any], key: str) -> None:
    text = row.get(key)
    if not isinstance(text, str) or not text or '\0' in text:
        raise _wrong(json_file, who, key, text, 'a text')


def _wrong(json_file: str, who: str, what: str, value: Any, wanted: str) -> InputError:
    return InputError(f"'{json_file}': {who} has {what} {_short(value)}, which is not {wanted}.")


def _short(value: Any) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) < 80 else f'{text[:77]}...'
