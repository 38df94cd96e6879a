"""Odd image files, sound and broken, drawn from a seed, each with the pixels that a reader has to give.

Every name ends in .png, .jpg or .jpeg, which timm looks for, whatever the file is. What a file should read as is
worked out here from the picture that went in, by NumPy and not by the reader.
"""
import functools
import io
import os
import stat
import struct
import zlib
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

import numpy as np
from PIL import Image

LOSSY = 8.  # levels that a pixel of a JPEG may be off, on average over the image


class Odd(NamedTuple):
    """One file.

    Attributes:
        path: Where it lies.
        kind: How it was made, a key of `SOUND` or `BROKEN`.
        pixels: (H, W, 3) as a classifier has to read them; None where the file is broken.
        upright: The same, turned as EXIF says, as a detector has to read them.
        off: Levels that the pixels may be off, on average.
    """
    path: Path
    kind: str
    pixels: Optional[np.ndarray]
    upright: Optional[np.ndarray] = None
    off: float = 0.


Writer = Callable[[Path, str, np.random.Generator], Odd]


def write_odd_images(folder: Path, count: int, seed: int = 0, kinds: Optional[Dict[str, Writer]] = None) -> List[Odd]:
    """`count` files in a folder, of all kinds in turn (or of those given)."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds, found = kinds or {**SOUND, **BROKEN}, []
    for number in range(count):
        kind = list(kinds)[number % len(kinds)]
        draw = np.random.default_rng([seed, number])
        suffix = ('.png', '.jpg', '.jpeg', '.JPG')[number % 4]
        strange = ' \u2014 \u56f3 \U0001f642 (1)' if number % 5 == 0 else ''
        found.append(kinds[kind](folder / f'{number:04d} {kind}{strange}{suffix}', kind, draw))
    return found


def picture(draw: np.random.Generator, channels: int = 3, height: int = 0, width: int = 0) -> np.ndarray:
    """Blocks of colour, which a JPEG keeps: (H, W, 3) or (H, W), no two alike."""
    height, width = height or int(draw.integers(24, 56)), width or int(draw.integers(24, 56))
    blocks = draw.integers(0, 256, (height // 16 + 1, width // 16 + 1, channels), dtype=np.uint8)
    found = blocks.repeat(16, axis=0).repeat(16, axis=1)[:height, :width]
    return found if channels == 3 else found[..., 0]


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, axis=-1)


def save(image: Image.Image, path: Path, format: str, **options) -> None:
    with open(path, 'wb') as file:
        image.save(file, format=format, **options)


def png(path: Path, width: int, height: int, bits: int, colour: int, rows: bytes, extra: bytes = b'') -> None:
    """A PNG by hand: its header says what it is told to say."""
    header = struct.pack('>IIBBBBB', width, height, bits, colour, 0, 0, 0)
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + extra + chunk(b'IDAT', rows) + chunk(b'IEND', b''))


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))


# ---- sound ones

def _plain(format: str, off: float = 0., before: str = '', **options) -> Writer:
    """A picture through a format of Pillow's; `before`: the mode that it is saved in."""
    def write(path: Path, kind: str, draw: np.random.Generator) -> Odd:
        found = picture(draw)
        image = Image.fromarray(found)
        save(image.convert(before) if before else image, path, format, **options)
        return Odd(path, kind, found, found, off)
    return write


_JPEG = {'quality': 95, 'subsampling': 0}


def _grey(format: str, off: float = 0., **options) -> Writer:
    def write(path: Path, kind: str, draw: np.random.Generator) -> Odd:
        found = picture(draw, channels=1)
        save(Image.fromarray(found), path, format, **options)
        return Odd(path, kind, rgb(found), rgb(found), off)
    return write


def _sixteen_bits(format: str) -> Writer:
    """The picture in the upper eight bits, noise in the lower."""
    def write(path: Path, kind: str, draw: np.random.Generator) -> Odd:
        found = picture(draw, channels=1)
        words = found.astype(np.uint16) * 256 + draw.integers(0, 256, found.shape, dtype=np.uint16)
        if format == 'PPM':
            path.write_bytes(b'P5 %d %d 65535\n' % found.shape[::-1] + words.astype('>u2').tobytes())
        else:
            save(Image.fromarray(words), path, format)
        return Odd(path, kind, rgb(found), rgb(found))
    return write


def _sixteen_bit_colour(path: Path, kind: str, draw: np.random.Generator) -> Odd:
    found = picture(draw)
    words = found.astype('>u2') * 256 + draw.integers(0, 256, found.shape).astype('>u2')
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in words)
    png(path, found.shape[1], found.shape[0], 16, 2, zlib.compress(rows))
    return Odd(path, kind, found, found)


def _palette(transparent: bool, format: str = 'PNG') -> Writer:
    def write(path: Path, kind: str, draw: np.random.Generator) -> Odd:
        colours = draw.integers(0, 256, (8, 3), dtype=np.uint8)
        places = picture(draw, channels=1) % 8
        image = Image.fromarray(places, mode=None)
        image.putpalette(colours.tobytes())
        save(image, path, format, **({'transparency': bytes(range(0, 256, 32))} if transparent else {}))
        return Odd(path, kind, colours[places], colours[places])
    return write


def _with_alpha(channels: int, format: str = 'PNG', **options) -> Writer:
    """LA or RGBA: the colours are read, whatever shines through."""
    def write(path: Path, kind: str, draw: np.random.Generator) -> Odd:
        found = picture(draw, channels=channels - 1)
        alpha = draw.integers(0, 256, found.shape[:2], dtype=np.uint8)
        found = found if channels == 4 else found[..., None]
        save(Image.fromarray(np.concatenate([found, alpha[..., None]], axis=-1)), path, format, **options)
        found = found if channels == 4 else rgb(found[..., 0])
        return Odd(path, kind, found, found)
    return write


def _one_bit(path: Path, kind: str, draw: np.random.Generator) -> Odd:
    found = picture(draw, channels=1) > 127
    save(Image.fromarray(found), path, 'PNG')
    found = rgb(found.astype(np.uint8) * 255)
    return Odd(path, kind, found, found)


def _animated(path: Path, kind: str, draw: np.random.Generator) -> Odd:
    """The first of three frames counts."""
    frames = [picture(draw, channels=1, height=40, width=32) for _ in range(3)]
    first, *others = [Image.fromarray(frame) for frame in frames]
    save(first, path, 'GIF', save_all=True, append_images=others)
    return Odd(path, kind, rgb(frames[0]), rgb(frames[0]))


# What a viewer does with the stored picture, by EXIF's orientation.
TURNED = {
    1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1), 7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90}


def _turned(orientation: int, format: str, off: float = 0.) -> Writer:
    def write(path: Path, kind: str, draw: np.random.Generator) -> Odd:
        found = picture(draw)
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {'JPEG': _JPEG, 'WEBP': {'lossless': True}}.get(format, {})
        save(Image.fromarray(found), path, format, exif=exif, **options)
        upright = TURNED[orientation](found)
        # Pillow itself turns a TIFF, for everybody.
        return Odd(path, kind, upright if format == 'TIFF' else found, upright, off)
    return write


def _damaged_exif(path: Path, kind: str, draw: np.random.Generator) -> Odd:
    found = picture(draw)
    save(Image.fromarray(found), path, 'JPEG', exif=b'Exif\0\0MM\0*' + draw.bytes(40), **_JPEG)
    return Odd(path, kind, found, found, LOSSY)


def _of_size(height: int, width: int) -> Writer:
    """A classifier gets the middle hundred of what is longer than that."""
    def write(path: Path, kind: str, draw: np.random.Generator) -> Odd:
        found = picture(draw, height=height, width=width)
        save(Image.fromarray(found), path, 'PNG')
        most = 100 * min(height, width)
        top, left = max(0, height - most) // 2, max(0, width - most) // 2
        return Odd(path, kind, found[top:top + most, left:left + most], found)
    return write


def _trailing(path: Path, kind: str, draw: np.random.Generator) -> Odd:
    found = picture(draw)
    save(Image.fromarray(found), path, 'JPEG', **_JPEG)
    with open(path, 'ab') as file:
        file.write(draw.bytes(500))
    return Odd(path, kind, found, found, LOSSY)


SOUND: Dict[str, Writer] = {
    'png': _plain('PNG'), 'jpeg': _plain('JPEG', LOSSY, **_JPEG), 'bmp': _plain('BMP'), 'tiff': _plain('TIFF'),
    'lzw tiff': _plain('TIFF', compression='tiff_lzw'), 'webp': _plain('WEBP', lossless=True),
    'progressive': _plain('JPEG', LOSSY, progressive=True, **_JPEG), 'cmyk': _plain('JPEG', LOSSY, 'CMYK', **_JPEG),
    'cmyk tiff': _plain('TIFF', 2., 'CMYK'), 'ppm': _plain('PPM'), 'gif': _grey('GIF'),
    'grey': _grey('PNG'), 'grey jpeg': _grey('JPEG', LOSSY, quality=95), 'animated': _animated,
    **{f'turned {n}': _turned(n, 'JPEG', LOSSY) for n in range(1, 9)}, 'turned png': _turned(6, 'PNG'),
    'turned webp': _turned(8, 'WEBP'), 'turned tiff': _turned(6, 'TIFF'), 'damaged exif': _damaged_exif,
    '16 bits': _sixteen_bits('PNG'), '16 bit tiff': _sixteen_bits('TIFF'), '16 bit pgm': _sixteen_bits('PPM'),
    '16 bit colour': _sixteen_bit_colour, 'palette': _palette(False), 'clear palette': _palette(True),
    'grey alpha': _with_alpha(2), 'alpha': _with_alpha(4),
    'alpha webp': _with_alpha(4, 'WEBP', lossless=True, exact=True), 'one bit': _one_bit,
    'one pixel': _of_size(1, 1), 'wide': _of_size(1, 4000), 'tall': _of_size(4000, 2), 'trailing': _trailing,
}


# ---- broken ones

def _sound_bytes(draw: np.random.Generator) -> bytes:
    file = io.BytesIO()
    noise = draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)  # whose last rows need the last bytes
    Image.fromarray(noise).save(file, format=('PNG', 'JPEG', 'GIF', 'BMP', 'TIFF', 'WEBP')[int(draw.integers(6))])
    return file.getvalue()


def _bytes(make: Callable[[np.random.Generator], bytes]) -> Writer:
    def write(path: Path, kind: str, draw: np.random.Generator) -> Odd:
        path.write_bytes(make(draw))
        return Odd(path, kind, None)
    return write


def _truncated(draw: np.random.Generator) -> bytes:
    whole = _sound_bytes(draw)
    return whole[:int(len(whole) * draw.uniform(.05, .9))]


def _directory(path: Path, kind: str, draw: np.random.Generator) -> Odd:
    path.mkdir()
    return Odd(path, kind, None)


def _pipe(path: Path, kind: str, draw: np.random.Generator) -> Odd:
    """To which nobody writes: a program that opens it waits forever."""
    os.mkfifo(path)
    return Odd(path, kind, None)


def _socket(path: Path, kind: str, draw: np.random.Generator) -> Odd:
    os.mknod(path, stat.S_IFSOCK | 0o600)
    return Odd(path, kind, None)


def _device(path: Path, kind: str, draw: np.random.Generator) -> Odd:
    """A link to one that never ends."""
    path.symlink_to('/dev/zero')
    return Odd(path, kind, None)


def _dangling(path: Path, kind: str, draw: np.random.Generator) -> Odd:
    path.symlink_to(path.with_name('nowhere'))
    return Odd(path, kind, None)


def _forbidden(path: Path, kind: str, draw: np.random.Generator) -> Odd:
    """Without leave to read; root, whom nothing is forbidden, gets a link that leads to itself instead."""
    if os.geteuid() == 0:
        path.symlink_to(path)
        return Odd(path, kind, None)
    path.write_bytes(_sound_bytes(draw))
    path.chmod(0)
    return Odd(path, kind, None)


@functools.cache
def _zeros(size: int) -> bytes:
    """So many zeros, packed: a thousandth of them."""
    packer = zlib.compressobj(9)
    parts = [packer.compress(bytes(2 ** 20)) for _ in range(size // 2 ** 20)]
    return b''.join([*parts, packer.compress(bytes(size % 2 ** 20)), packer.flush()])


def _bomb(path: Path, kind: str, draw: np.random.Generator) -> Odd:
    """30,000 x 30,000 white pixels that are really there, in 110 kB: as one bit each, 112 MB, as RGB 2.7 GB."""
    png(path, 30000, 30000, 1, 0, _zeros(30000 * (1 + 30000 // 8)))
    return Odd(path, kind, None)


def _claim(path: Path, kind: str, draw: np.random.Generator) -> Odd:
    """A header of 40,000 pixels and more a side over nothing, in five formats."""
    width, height = (int(each) for each in draw.integers(40000, 60000, 2))
    which = int(draw.integers(4))
    if which == 0:
        png(path, width, height, 8, 2, zlib.compress(bytes(100)))
    elif which == 1:
        path.write_bytes(b'GIF89a' + struct.pack('<HHBBB', width, height, 0, 0, 0) + b',' + struct.pack(
            '<HHHHB', 0, 0, width, height, 0) + b'\x02\x02D\x01\0;')
    elif which == 2:
        path.write_bytes(b'BM' + struct.pack('<IHHI', 200, 0, 0, 54) + struct.pack(
            '<IiiHHIIiiII', 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(100))
    else:
        file = io.BytesIO()
        Image.new('RGB', (16, 16)).save(file, format='JPEG')
        whole = bytearray(file.getvalue())
        at = whole.index(b'\xff\xc0') + 5  # height and width in the start of frame
        whole[at:at + 4] = struct.pack('>HH', height, width)
        path.write_bytes(bytes(whole))
    return Odd(path, kind, None)


def _bad_sum(path: Path, kind: str, draw: np.random.Generator) -> Odd:
    """A PNG whose header does not fit its check sum."""
    found = picture(draw)
    save(Image.fromarray(found), path, 'PNG')
    whole = bytearray(path.read_bytes())
    whole[29] ^= 0xff  # of the four bytes behind the header
    path.write_bytes(bytes(whole))
    return Odd(path, kind, None)


def _text_bomb(path: Path, kind: str, draw: np.random.Generator) -> Odd:
    """A text of 64 MB in a PNG of one pixel."""
    text = chunk(b'zTXt', b'Comment\0\0' + _zeros(64 * 2 ** 20))
    png(path, 1, 1, 8, 0, zlib.compress(b'\0\0'), text)
    return Odd(path, kind, None)


_MAGIC = (b'\x89PNG\r\n\x1a\n', b'\xff\xd8\xff\xe0', b'GIF89a', b'BM', b'II*\0', b'RIFF\0\0\0\0WEBPVP8 ')
_EPS = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(made) (w) file closefile\nshowpage\n%%EOF\n'

BROKEN: Dict[str, Writer] = {
    'truncated': _bytes(_truncated), 'empty': _bytes(lambda draw: b''), 'text': _bytes(lambda draw: b'no image at all'),
    'noise': _bytes(lambda draw: draw.bytes(int(draw.integers(1, 4000)))), 'eps': _bytes(lambda draw: _EPS),
    'directory': _directory, 'pipe': _pipe, 'socket': _socket, 'device': _device, 'dangling': _dangling,
    'forbidden': _forbidden, 'bomb': _bomb, 'claim': _claim, 'bad sum': _bad_sum, 'text bomb': _text_bomb,
    'magic': _bytes(lambda draw: _MAGIC[int(draw.integers(len(_MAGIC)))] + draw.bytes(60)),
}
