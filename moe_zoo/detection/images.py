"""Image files for detectors, upright and to the right pixels: what detectron2's mapper reads through."""
import os
from typing import Optional, Union

import numpy as np
from detectron2.data import detection_utils

from ..data.images import UnreadableImage, open_image, reason


def read_image(file_name: Union[str, os.PathLike], format: Optional[str] = None) -> np.ndarray:
    """detectron2's function of this name, by `moe_zoo.data.images`: 16-bit grey is not clipped to white, a TIFF is not
    turned twice, and every file that cannot be read raises the same error.

    Args:
        file_name: A path.
        format: 'RGB', 'BGR' or another of detectron2's; None leaves the image as it is.

    Returns:
        (H, W, C), or (H, W) where the image has one channel and `format` is None.

    Raises:
        UnreadableImage: The file is no image, or not all of one.
    """
    image = open_image(detection_utils.PathManager.get_local_path(os.fspath(file_name)), upright=True)
    try:
        return detection_utils.convert_PIL_to_numpy(image, format)
    except Exception as error:  # there is no way from its mode to that format
        raise UnreadableImage(reason(error)) from error


def use_careful_reading() -> None:
    """Let detectron2's mapper, which looks its reader up in this module, read by `read_image`.

    Called when `moe_zoo.detection` is imported.
    """
    detection_utils.read_image = read_image
