"""Some images of COCO-style annotations."""
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Union

from ..documents import parse_json
from ..errors import InputError, atomic_write


def write_subset(json_file: Union[str, Path], numbers: Iterable[int], path: Union[str, Path]) -> Path:
    """Write annotations of some images as a file of their own; it has all the categories, and the images stay in place.

    Args:
        json_file: COCO JSON.
        numbers: Positions among its images, from 0.
        path: File to write.

    Raises:
        InputError: `json_file` is no COCO JSON, or has no image at a position.
    """
    try:
        content = parse_json(Path(json_file).read_text(encoding='utf-8'))
        images = [content['images'][number] for number in numbers]
        annotations = content['annotations']
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"'{json_file}' cannot be read as COCO JSON: {' '.join(str(error).split())}.") from error
    except IndexError as error:
        raise InputError(f"'{json_file}' has {len(content['images'])} images, and a position beyond is asked for."
                         ) from error
    kept = {image['id'] for image in images}
    annotations = [annotation for annotation in annotations if annotation['image_id'] in kept]
    with atomic_write(path) as part:
        part.write_text(json.dumps({**content, 'images': images, 'annotations': annotations}), encoding='utf-8')
    return Path(path)
