"""COCO-style data: sets registered by name or from a user's own files, checked, and read past unreadable images."""
import logging
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.data.transforms import RandomFlip

from ..documents import parse_json
from ..errors import InputError, nearest
from .coco_check import check_content

_LOGGER = logging.getLogger(__name__)


def register_coco(name: str, json_file: str, images: str) -> None:
    """Let DATASETS.TRAIN and DATASETS.TEST use `name` for a COCO JSON and the folder of its images.

    Nothing is read yet. A name registered before gets the new files.
    """
    if name in DatasetCatalog.list():
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_coco_instances(name, {}, str(json_file), str(images))


def register_digit_scenes() -> None:
    """`digit_scenes_train` and `digit_scenes_val`, as `moe_zoo.data.scenes.write_scenes` writes them, below
    DETECTRON2_DATASETS (default: datasets) like detectron2's own sets."""
    root = Path(os.environ.get('DETECTRON2_DATASETS', 'datasets')).expanduser() / 'digit_scenes'
    for split in ('train', 'val'):
        register_coco(f'digit_scenes_{split}', *_in_root(root, split))


def register_user_data(cfg: CfgNode) -> None:
    """Register what MOE.DATA names, and let DATASETS.TRAIN and DATASETS.TEST point to it."""
    data = cfg.MOE.DATA
    for key, split in (('TRAIN', 'train'), ('TEST', 'val')):
        json_file, images = _in_root(Path(data.ROOT), split) if data.ROOT else ('', '')
        json_file = data[f'{key}_JSON'] or json_file
        images = data[f'{key}_IMAGES'] or images
        if bool(json_file) != bool(images):
            raise InputError(f'MOE.DATA.{key}_JSON and MOE.DATA.{key}_IMAGES come together, but only '
                             f"'{json_file or images}' is given.")
        if json_file:
            name = f'{Path(json_file).stem} of {Path(json_file).resolve().parent}'
            register_coco(name, json_file, images)
            cfg.DATASETS[key] = (name,)


def load_datasets(cfg: CfgNode, names: Sequence[str], filter_empty: bool) -> List[Dict[str, Any]]:
    """The images and objects of data sets in detectron2's format.

    Raises:
        InputError: A set is unknown, missing, or not COCO JSON; a category is out of range; the number of categories is
            not the model's; the model learns masks and an object has none.
    """
    for name in names:
        if name not in DatasetCatalog.list():
            raise InputError(f'Unknown data set {name!r}.{nearest(name, DatasetCatalog.list())} Own data: '
                             'MOE.DATA.ROOT, or MOE.DATA.TRAIN_JSON with TRAIN_IMAGES.')
        _check_files(name)
    if not names:
        raise InputError('No data set is named: set DATASETS.TRAIN and DATASETS.TEST, or MOE.DATA.ROOT.')
    label = ', '.join(_json_file(name) or name for name in names)
    try:
        dicts = get_detection_dataset_dicts(list(names), filter_empty=filter_empty, check_consistency=len(names) > 1)
    except KeyError as error:
        raise InputError(f"'{label}': {_sentence(error)}") from error
    except (AssertionError, ValueError, TypeError, IndexError, AttributeError, ArithmeticError) as error:
        raise InputError(f"'{label}' is not usable COCO JSON: {_sentence(error)}") from error
    key, num_classes = classes_of_model(cfg)
    for name in names:
        classes = class_names(name)
        if classes and len(classes) != num_classes:
            raise InputError(f"'{_json_file(name) or name}' has {len(classes)} categories and {key} is {num_classes}: "
                             f'set it to {len(classes)}.')
    if cfg.MODEL.MASK_ON:
        for image in dicts:
            if not all('segmentation' in entry for entry in image['annotations']):
                raise InputError(f"MODEL.MASK_ON True: '{image['file_name']}' has an object without segmentation in "
                                 f"'{label}'; without masks set MODEL.MASK_ON False.")
    return dicts


def classes_of_model(cfg: CfgNode) -> Tuple[str, int]:
    """The config key that holds the number of classes of this meta-architecture, and its value."""
    part = 'ROI_HEADS' if 'RCNN' in cfg.MODEL.META_ARCHITECTURE else 'RETINANET'
    return f'MODEL.{part}.NUM_CLASSES', cfg.MODEL[part].NUM_CLASSES


def class_names(name: str) -> List[str]:
    """The categories of a data set that was loaded, in the order of their ids; none where they are not known."""
    return list(MetadataCatalog.get(name).get('thing_classes') or ())


def check_same_categories(names: Sequence[str]) -> None:
    """Refuse data sets, already loaded, whose n-th categories differ: class n of the model would mean two things.

    Raises:
        InputError: Two sets differ.
    """
    first, *others = names
    for other in others:
        pairs = enumerate(zip(class_names(first), class_names(other)))
        differing = next(((n, a, b) for n, (a, b) in pairs if a != b), None)
        if differing:
            n, ours, theirs = differing
            raise InputError(f"Category {n + 1} is {ours!r} in '{_json_file(first) or first}' and {theirs!r} in "
                             f"'{_json_file(other) or other}': the ids of both must name the same classes.")


class ReadableMapper(DatasetMapper):
    """detectron2's mapper, which survives an unreadable image: it is named, written down once, and left out.

    Worker processes and ranks share one list through the file `unreadable`, one name a line.

    Args:
        cfg: The config; MOE.DATA.STRICT refuses instead.
        is_train: As in detectron2.
        unreadable: File that receives the names.
    """

    def __init__(self, cfg: CfgNode, is_train: bool, unreadable: Optional[Path] = None):
        super().__init__(cfg, is_train)
        self.strict = cfg.MOE.DATA.STRICT
        self.unreadable = unreadable
        self.named = set()

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> Dict[str, Any]:
        options = super().from_config(cfg, is_train)
        if is_train and cfg.MOE.DATA.UPSIDE_DOWN:
            options['augmentations'].append(RandomFlip(horizontal=False, vertical=True))
        return options

    def __call__(self, dataset_dict: Dict[str, Any]) -> Optional[Dict[str, Any]]:
        """The mapped image. Where it cannot be read: None in training, for which detectron2 draws another image, and an
        empty dictionary in evaluation, where none may stand in for another."""
        try:
            return super().__call__(dataset_dict)
        except ValueError as error:  # an UnreadableImage, or another size than the annotations say
            name = dataset_dict['file_name']
            reason = f"image '{name}' cannot be read ({_sentence(error)})"
            if self.strict:
                raise InputError(f'{reason}; MOE.DATA.STRICT is on: repair or remove it.') from error
            if name not in self.named:
                self.named.add(name)
                _LOGGER.warning('%s and is skipped', reason)
                if self.unreadable is not None:
                    with open(self.unreadable, 'a') as file:
                        file.write(f'{name}\n')
            return None if self.is_train else {}


def unreadable_images(cfg: CfgNode) -> Path:
    """The file that names, one a line, the images that a run passed over."""
    return Path(cfg.OUTPUT_DIR) / 'unreadable_images.txt'


def skipped_images(unreadable: Path) -> List[str]:
    """The names that mappers wrote down, each once."""
    return sorted(set(unreadable.read_text().splitlines())) if unreadable.exists() else []


def _in_root(root: Path, split: str) -> Tuple[str, str]:
    return str(root / 'annotations' / f'instances_{split}.json'), str(root / split)


def _json_file(name: str) -> str:
    return MetadataCatalog.get(name).get('json_file', '')


def _check_files(name: str) -> None:
    """Missing files and broken JSON, before anything is built on them."""
    json_file, images = _json_file(name), MetadataCatalog.get(name).get('image_root')
    if not json_file:
        return
    where = f"set DETECTRON2_DATASETS (now {os.environ.get('DETECTRON2_DATASETS', 'datasets')!r}) or MOE.DATA.ROOT"
    if name.startswith('digit_scenes_'):
        where += ", or write them: moe_zoo.data.scenes.write_scenes('datasets/digit_scenes', classes=range(5))"
    if not Path(json_file).is_file():
        raise InputError(f"Data set {name!r} is missing: there is no file '{json_file}'; {where}.")
    if not Path(images).is_dir() or not any(Path(images).iterdir()):
        raise InputError(f"Data set {name!r} has no images: '{images}' is missing or empty; {where}.")
    if Path(json_file).stat().st_size < 50e6:  # COCO's own training file takes 10 s and needs no such check
        try:
            content = parse_json(Path(json_file).read_text())
        except (ValueError, OSError) as error:
            raise InputError(f"'{json_file}' is not JSON: {_sentence(error)}.") from error
        check_content(json_file, content)


def _sentence(error: BaseException) -> str:
    text = error.args[0] if isinstance(error, KeyError) and error.args else str(error)
    return ' '.join(str(text).split()).rstrip('.') or type(error).__name__
