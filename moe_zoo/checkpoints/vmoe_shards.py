"""Reads the checkpoints that the authors of V-MoE released: `<prefix>.index` and `<prefix>.data-00000-of-00008` etc.

Both are msgpack. The index is a tree of leaves, each with a shape, a dtype, and the slices it was cut into with the
number of the data file that has each. A data file maps the number of a leaf (in the order of the sorted tree) to pieces
and their slices, a piece being the bytes of an array in one or more chunks.

Bytes of arrays are not read but remembered by their place, so that files of tens of gigabytes are opened at once, and
every array is read when it is wanted. That is why the few lines of msgpack are here: its own package reads through.
"""
import contextlib
import math
import operator
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Dict, Iterator, List, NamedTuple, Optional, Set, Tuple, Union

import numpy as np

from ..errors import InputError

CHUNKED = '__msgpack_array_chunk_a87ca2__'  # the first key of a data file
INDEX_KEYS = ('shard_count', 'index')
# As stored -> as read: NumPy has no bfloat16. Others, Python objects above all, are not read.
TYPES = {name: np.dtype(name) for name in 'float64 float32 float16 int64 int32 uint32 uint8 bool'.split()}
TYPES['bfloat16'] = np.dtype(np.float32)
NDARRAY, SCALAR, INFO = 1, 3, 8  # codes of what msgpack has no type for: an array, a number, a leaf's entry


class Blob(NamedTuple):
    """Bytes in a file: where they start, how many, and the code of an extension, None for plain bytes."""
    start: int
    size: int
    code: Optional[int] = None


@dataclass(frozen=True)
class ShardedArray:
    """An array in pieces, which `numpy.asarray` reads and joins.

    Attributes:
        shape: Of the whole.
        dtype: As NumPy has it; float32 for bfloat16, which it has not.
        stored: Name of the type in the files.
        pieces: For every piece its file, its slice of the whole, and the places of its bytes in order.
    """
    shape: Tuple[int, ...]
    dtype: np.dtype
    stored: str
    pieces: Tuple[Tuple[Path, Tuple[slice, ...], Tuple[Blob, ...]], ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        whole = np.empty(self.shape, self.dtype)
        for path, where, blobs in self.pieces:
            part = whole[(*where, ...)]  # a view, also of an array without axes
            # A piece that lies in one run of memory is read into its place.
            target = part if part.flags.c_contiguous and self.stored != 'bfloat16' else None
            read = _read_piece(path, blobs, self.dtype, self.stored, target)
            if target is None:
                part[...] = read.reshape(part.shape)
        return whole if dtype is None else whole.astype(dtype, copy=False)


def read_vmoe(prefix: Union[str, os.PathLike]) -> Dict[str, ShardedArray]:
    """Open a released checkpoint; no array is read yet.

    >>> weights = read_vmoe('vmoe_s32_last2_ilsvrc2012_randaug_light1')
    >>> state = import_vmoe(weights)

    Args:
        prefix: Path without `.index` and `.data-...`.

    Returns:
        Arrays by their path in the tree, joined with '/'.

    Raises:
        InputError: A file is missing, truncated or of another kind, or the files do not belong together.
    """
    prefix = os.fspath(prefix).removesuffix('.index')
    index_path = Path(f'{prefix}.index')
    with _opened(index_path, f'{prefix!r} is no checkpoint of the original V-MoE') as file:
        index = _decode_map(file, INDEX_KEYS)
        leaves = {name: _leaf(file, info) for name, info in _flatten(index['index'], index_path)}
        shards = range(index['shard_count'])
    names = list(leaves)
    pieces: Dict[str, list] = {name: [] for name in names}
    for shard in shards:
        path = Path(f'{prefix}.data-{shard:05d}-of-{len(shards):05d}')
        with _opened(path, f'{prefix!r} is incomplete: its index counts {len(shards)} data files') as file:
            for number, where, blobs, types in _shard(file):
                if not 0 <= number < len(names) or types != {leaves[names[number]][1]}:
                    raise _apart(index_path, f'array number {number}')
                pieces[names[number]].append((path, where, blobs))
    return {name: _joined(name, leaf, pieces[name], index_path) for name, leaf in leaves.items()}


def _joined(name: str, leaf: Tuple, pieces: list, index_path: Path) -> ShardedArray:
    """One array, whose pieces in the data files must be those that the index has."""
    shape, stored, slices = leaf
    itemsize = 2 if stored == 'bfloat16' else TYPES[stored].itemsize
    found = [_bounds(where, shape) for _, where, _ in pieces]
    sizes = [math.prod(stop - start for start, stop in where) for where in found]
    different = dict(zip(found, sizes))  # a piece may be stored more than once
    if different.keys() != {_bounds(where, shape) for where in slices} or sum(different.values()) != math.prod(shape):
        raise _apart(index_path, repr(name))
    for (path, _, blobs), size in zip(pieces, sizes):
        if sum(blob.size for blob in blobs) != size * itemsize:
            raise _wrong(path, f'the bytes of {name!r} do not fill its shape')
    return ShardedArray(shape, TYPES[stored], stored, tuple(pieces))


def _flatten(tree: Any, path: Path, prefix: str = '') -> Iterator[Tuple[str, Blob]]:
    """Leaves of nested dictionaries by path, in the order of sorted keys, which numbers them."""
    if isinstance(tree, dict):
        for key in sorted(tree):
            yield from _flatten(tree[key], path, f'{prefix}/{key}' if prefix else key)
    elif isinstance(tree, Blob) and tree.code == INFO:
        yield prefix, tree
    else:
        raise _wrong(path, f'{prefix!r} is no array')


def _leaf(file: BinaryIO, info: Blob) -> Tuple[Tuple[int, ...], str, list]:
    """Shape, type and slices of an entry of the index."""
    array, slices, _ = _decode_blob(file, info)
    shape, stored, *_ = _decode_blob(file, array)
    if stored not in TYPES:
        raise _wrong(file.name, f'an array is of the type {stored!r}')
    if min(shape, default=0) < 0:
        raise ValueError
    return tuple(map(operator.index, shape)), stored, [_slices(file, each) for each in slices]


def _shard(file: BinaryIO) -> Iterator[Tuple[int, Tuple[slice, ...], Tuple[Blob, ...], Set[str]]]:
    """Number of the array, slice, places of the bytes and names of their types, of every piece in a data file."""
    tree = _decode_map(file, (CHUNKED,))
    for number, pieces in tree.items():
        if number == CHUNKED:
            continue
        for chunks, where in pieces:
            # A chunk is an array of its own: shape, type, bytes.
            arrays = [_decode_blob(file, chunk) for chunk in chunks if chunk.code in (NDARRAY, SCALAR)]
            blobs = tuple(Blob(array[2].start, array[2].size) for array in arrays)
            yield int(number), _slices(file, where), blobs, {array[1] for array in arrays}


def _slices(file: BinaryIO, blob: Blob) -> Tuple[slice, ...]:
    """An n-dimensional slice: [start, stop, None] by axis."""
    bounds = [_decode_blob(file, each)[:2] for each in _decode_blob(file, blob)]
    return tuple(slice(*(None if end is None else operator.index(end) for end in pair)) for pair in bounds)


def _bounds(where: Tuple[slice, ...], shape: Tuple[int, ...]) -> Tuple[Tuple[int, int], ...]:
    """(start, stop) by axis; of other axes than the shape has, nothing that covers it."""
    return tuple(each.indices(size)[:2] for each, size in zip(where, shape)) if len(where) == len(shape) else ()


def _read_piece(
        path: Path,
        blobs: Tuple[Blob, ...],
        dtype: np.dtype,
        stored: str,
        target: Optional[np.ndarray],
) -> np.ndarray:
    """The bytes of one piece, into `target` where it is given."""
    raw = np.empty(sum(blob.size for blob in blobs), np.uint8) if target is None else target.reshape(-1).view(np.uint8)
    at = 0
    with open(path, 'rb') as file:
        for blob in blobs:
            file.seek(blob.start)
            if file.readinto(memoryview(raw)[at:at + blob.size]) != blob.size:
                raise _truncated(path)
            at += blob.size
    if stored == 'bfloat16':  # the upper half of a float32
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype)


@contextlib.contextmanager
def _opened(path: Path, without: str) -> Iterator[BinaryIO]:
    """Opens a file for reading; everything that a broken one makes go wrong becomes one sentence."""
    try:
        file = open(path, 'rb')
    except FileNotFoundError:
        raise InputError(f"{without}, and '{path}' is missing.") from None
    with file:
        try:
            yield file
        except InputError:
            raise
        except EOFError:
            raise _truncated(path) from None
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, struct.error):
            raise _wrong(path, 'its msgpack holds something else') from None


def _truncated(path: Path) -> InputError:
    return InputError(f"'{path}' is truncated: fetch it again.")


def _apart(index_path: Path, what: str) -> InputError:
    return InputError(f"'{index_path}' and its data files do not belong together: the pieces of {what} differ.")


def _wrong(path: Union[str, Path], why: str) -> InputError:
    return InputError(f"'{path}' is not a file of a released V-MoE checkpoint: {why}.")


# The msgpack format, as far as it is used: first byte -> how many bytes say the length, and of what.
_LENGTHS = {
    0xc4: (1, 'bin'), 0xc5: (2, 'bin'), 0xc6: (4, 'bin'), 0xc7: (1, 'ext'), 0xc8: (2, 'ext'), 0xc9: (4, 'ext'),
    0xd9: (1, 'str'), 0xda: (2, 'str'), 0xdb: (4, 'str'), 0xdc: (2, 'array'), 0xdd: (4, 'array'),
    0xde: (2, 'map'), 0xdf: (4, 'map'),
}
_NUMBERS = {
    0xca: '>f', 0xcb: '>d', 0xcc: '>B', 0xcd: '>H', 0xce: '>I', 0xcf: '>Q', 0xd0: '>b', 0xd1: '>h', 0xd2: '>i',
    0xd3: '>q',
}
_CONSTANTS = {0xc0: None, 0xc2: False, 0xc3: True}


def _decode_map(file: BinaryIO, keys: Tuple[str, ...]) -> Dict:
    """The map that a file is, of which one of these keys is the first: a file of another kind is told by it."""
    head = file.read(64)
    file.seek(0)
    if len(head) == 64 and not any(key.encode() in head for key in keys):
        raise _wrong(file.name, f'it does not begin with {keys[0]!r}')
    value = _decode(file)
    if not set(keys) <= value.keys():
        raise ValueError
    return value


def _decode_blob(file: BinaryIO, blob: Blob) -> List:
    """What is packed inside bytes or an extension: an array."""
    file.seek(blob.start)
    value = _decode(file)
    if not isinstance(value, list) or file.tell() > blob.start + blob.size:
        raise ValueError
    return value


def _decode(file: BinaryIO) -> Any:
    """The value at the file's position; bytes and extensions as a `Blob`."""
    first = _exactly(file, 1)[0]
    if first <= 0x7f or first >= 0xe0:
        return first if first <= 0x7f else first - 0x100
    if first in _CONSTANTS:
        return _CONSTANTS[first]
    if first in _NUMBERS:
        return struct.unpack(_NUMBERS[first], _exactly(file, struct.calcsize(_NUMBERS[first])))[0]
    if first in _LENGTHS:
        width, kind = _LENGTHS[first]
        return _decode_sized(file, kind, int.from_bytes(_exactly(file, width), 'big'))
    if 0xd4 <= first <= 0xd8:
        return _decode_sized(file, 'ext', 1 << (first - 0xd4))
    if first <= 0xbf:
        kind, mask = ('map', 0x0f) if first <= 0x8f else ('array', 0x0f) if first <= 0x9f else ('str', 0x1f)
        return _decode_sized(file, kind, first & mask)
    raise ValueError


def _decode_sized(file: BinaryIO, kind: str, length: int) -> Any:
    if kind == 'map':
        return {_decode(file): _decode(file) for _ in range(length)}
    if kind == 'array':
        return [_decode(file) for _ in range(length)]
    if kind == 'str':
        return _exactly(file, length).decode()
    code = struct.unpack('>b', _exactly(file, 1))[0] if kind == 'ext' else None
    blob = Blob(file.tell(), length, code)
    if length:
        file.seek(length - 1, os.SEEK_CUR)
        _exactly(file, 1)  # the last byte is there
    return blob


def _exactly(file: BinaryIO, size: int) -> bytes:
    if size > 64 and size > os.fstat(file.fileno()).st_size - file.tell():
        raise EOFError  # before memory is taken for what is not there
    data = file.read(size)
    if len(data) != size:
        raise EOFError
    return data
