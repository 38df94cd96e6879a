"""Which class a folder or an image is of: class maps, numbered folders (ImageNet V2), and reassessed labels (ReaL).

ReaL: Beyer et al., Are we done with ImageNet?, arXiv 2006.07159; its real.json is a list with, for every image of
ILSVRC 2012's validation set in the order of their names, the list of its labels, which may be empty.
"""
import functools
import re
from pathlib import Path
from typing import Any, Collection, Dict, List, Sequence, Union

from timm.data import ImageNetInfo
from timm.data.readers.class_map import load_class_map

from ..documents import parse_json
from ..errors import InputError

IMAGE = re.compile(r'ILSVRC2012_val_(\d{8})\.\w+$')
CLASSES = 1000


def read_class_map(path: Union[str, Path], root: Union[str, Path, None] = None) -> Dict[str, int]:
    """Name of a folder to the index of its class.

    Args:
        path: timm's `.txt` (a name a line, in the order of the classes) or `.pkl`; or a `.json` with
            `{"0": ["n01440764", "tench"], ...}` as Keras has it, `{"0": "n01440764", ...}`, `{"n01440764": 0, ...}`,
            or a list of names.
        root: Folder of the data, where timm looks for the file too.

    Raises:
        InputError: The file is missing, or of another form.
    """
    file = Path(path)
    if not file.is_file() and root is not None:
        file = Path(root) / path
    if not file.is_file():
        raise InputError(f"There is no class map '{path}': give a .txt with a class a line, or a class-index .json.")
    try:
        if file.suffix.lower() != '.json':
            return load_class_map(str(file))
        found = _class_index(parse_json(file.read_text(encoding='utf-8')))
    except Exception as error:  # a pickle that timm refuses has many
        raise InputError(f"The class map '{file}' cannot be read: {' '.join(str(error).split())}.") from error
    indices = sorted(found.values())
    if not found or indices[0] < 0 or len(set(indices)) < len(indices):
        raise InputError(f"The class map '{file}' must give every name an index of its own, from 0.")
    return found


def _class_index(content: Any) -> Dict[str, int]:
    """Raises: ValueError: The content is none of the forms of `read_class_map`."""
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return {name: index for index, name in enumerate(content)}
    if isinstance(content, dict):
        if all(isinstance(index, int) and not isinstance(index, bool) for index in content.values()):
            return dict(content)
        if all(index.isdigit() for index in content):
            names = {int(index): name[0] if isinstance(name, list) and name else name
                     for index, name in content.items()}
            if all(isinstance(name, str) for name in names.values()) and len(set(names.values())) == len(names):
                return {name: index for index, name in names.items()}
    raise ValueError('it is neither {"0": ["n01440764", "tench"], ...} nor {"n01440764": 0, ...} nor a list of names')


@functools.cache
def synsets() -> Dict[str, int]:
    """Synset of every class of ImageNet-1k to its index."""
    return {name: index for index, name in enumerate(ImageNetInfo().label_names())}


def imagenet_classes(folders: Collection[str]) -> Dict[str, int]:
    """Index of every class of ImageNet-1k under the names that these folders have; empty where they are none of them.

    They are synsets, as in ILSVRC 2012, or numbers from 0 to 999, as in ImageNet V2; any part of the classes will do.
    """
    if set(folders) <= set(synsets()):
        return dict(synsets())
    numbers = {name: int(name) for name in folders if name.isascii() and name.isdigit() and int(name) < CLASSES}
    if len(numbers) < len(folders) or len(set(numbers.values())) < len(numbers):
        return {}
    return {**{str(index): index for index in set(range(CLASSES)) - set(numbers.values())}, **numbers}


def read_real_labels(path: Union[str, Path]) -> List[List[int]]:
    """The labels of every image of ILSVRC 2012's validation set.

    Raises:
        InputError: The file is missing, or no list of lists of classes.
    """
    try:
        content = parse_json(Path(path).read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise InputError(f"There is no file '{path}' of ReaL labels.") from None
    except (ValueError, OSError) as error:
        raise InputError(f"The ReaL labels '{path}' are not JSON: {error}.") from error
    if not isinstance(content, list) or not content or not all(
            isinstance(each, list) and all(type(y) is int and 0 <= y < CLASSES for y in each) for each in content):
        raise InputError(
            f"The ReaL labels '{path}' must be a list with a list of classes (0 to {CLASSES - 1}) for every image, as"
            " google-research/reassessed-imagenet's real.json is.")
    return content


def real_labels_of(images: Sequence[str], labels: Sequence[Sequence[int]]) -> List[Sequence[int]]:
    """The labels of these images, found by the number in their names: image 1 has the first list.

    Raises:
        InputError: An image is not named as in ILSVRC 2012's validation set, or the labels end before it.
    """
    found = []
    for name in images:
        number = IMAGE.search(name)
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise InputError(
                f"--real-labels: the image '{name}' has no entry among the {len(labels):,} labels, which are of"
                " ILSVRC2012_val_00000001.JPEG and those after it.")
        found.append(labels[int(number[1]) - 1])
    return found
