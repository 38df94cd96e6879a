"""Image files as they are found: read to the right pixels, or refused before they cost memory.

Whatever Pillow reads is read, by its content and not by its name; the pixels are those of Pillow's `convert`, which is
what timm's loader and detectron2 use, but for this:

- 16-bit grey is scaled to 8 bits. Pillow clips it, which makes nearly every such image white.
- EPS is refused: Pillow hands it to Ghostscript, a program that runs what is in it.
- What is no file (a pipe, which whoever opens it waits for, a socket, a device) is not opened, whatever its name.
- A classifier's image that is more than `LONGEST` times as long as wide is cut to its middle. Resized by its shorter
  side, as timm does before it takes the middle, one row of 60,000 pixels would cost gigabytes.

Pillow's own limits hold: a file that claims more than 2 x `PIL.Image.MAX_IMAGE_PIXELS` (179 million) pixels is refused
before any is decoded, texts in a PNG that unpack to more than 1 MB are too, and what is cut off is never filled up.
"""
import functools
import os
import stat
from typing import BinaryIO, Optional, Tuple, Union

import numpy as np
from PIL import Image

LONGEST = 100  # times the shorter side
ORIENTATION = 0x0112  # EXIF
# What turns an image upright, by its orientation in EXIF; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}


class UnreadableImage(ValueError):
    """A file that is no image, or not all of one; the message says why."""


def read_image(file: Union[str, os.PathLike, BinaryIO], mode: str) -> Image.Image:
    """An image for a classifier, in a mode of Pillow's such as 'RGB'.

    Its pixels are as they are stored: like timm and torchvision, by which published accuracies were measured, a
    classifier does not turn images as EXIF says.

    Raises:
        UnreadableImage: It cannot be decoded to its end, or there is no way from its mode to this one.
    """
    image = open_image(file)
    width, height = image.size
    most = LONGEST * min(width, height)
    if max(width, height) > most:
        left, top = max(0, width - most) // 2, max(0, height - most) // 2
        image = image.crop((left, top, left + min(width, most), top + min(height, most)))
    try:
        return image if image.mode == mode else image.convert(mode)
    except Exception as error:  # as in `open_image`
        raise UnreadableImage(reason(error)) from error


def open_image(file: Union[str, os.PathLike, BinaryIO], upright: bool = False) -> Image.Image:
    """An image, decoded to its end; of an animation the first.

    Args:
        file: Path, or an open file.
        upright: Turn it as EXIF says, as detectron2 does.

    Raises:
        UnreadableImage: It cannot be decoded.
    """
    if isinstance(file, (str, os.PathLike)):
        refuse_no_file(file)
    try:
        with Image.open(file, formats=_formats()) as image:
            image.load()  # turns a TIFF upright by itself
            turn = TURNS.get(_orientation(image)) if upright else None
            sixteen_bits = image.mode.startswith('I;16') or (image.mode == 'I' and image.format == 'PPM')
            image = image if turn is None else image.transpose(turn)
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)) if sixteen_bits else image
    except Exception as error:  # Pillow's readers of a broken file raise nearly everything
        raise UnreadableImage(reason(error)) from error


def refuse_no_file(path: Union[str, os.PathLike]) -> None:
    """Look at what a path leads to without opening it: to open a pipe is to wait until somebody writes to it.

    Raises:
        UnreadableImage: It leads to a directory, a pipe, a socket or a device, or nowhere.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise UnreadableImage(reason(error)) from error
    if not stat.S_ISREG(mode):
        raise UnreadableImage('it is no file')


def reason(error: BaseException) -> str:
    """What an error says, in one line; a file that is no image is not named once more."""
    text = ' '.join(str(error).split())
    return 'it is no image' if text.startswith('cannot identify image file') else text or type(error).__name__


def _orientation(image: Image.Image) -> Optional[int]:
    try:
        found = image.getexif().get(ORIENTATION)
    except Exception:  # EXIF that is damaged says nothing; the pixels may be sound
        return None
    return found if isinstance(found, int) else None


@functools.cache
def _formats() -> Tuple[str, ...]:
    Image.init()
    return tuple(name for name in Image.ID if name != 'EPS')
