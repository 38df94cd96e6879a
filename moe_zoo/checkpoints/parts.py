"""Checkpoints in parts, as torch.distributed.checkpoint writes them, read without running anything that is in them.

A folder has files of tensors and `.metadata`, the index: a pickle, which torch would run. Here it may name the index's
own classes and nothing else, and plain records stand in for those. They become torch's once every field was checked.
"""
import io
import math
import os
import pickle
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Tuple, Union

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ..errors import InputError
from .lazy import DTYPES, write_safetensors

PathLike = Union[str, os.PathLike]
INDEX = '.metadata'
WEIGHTS = 'model.'  # what the names of a model's tensors begin with


# ---- the index


class _Record:
    """What stands in for one of torch's classes: whatever it is made of is kept, and nothing is done with it."""
    state: Any = None

    def __init__(self, *arguments: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Index(_Record):
    pass


class _Tensor(_Record):
    pass


class _Bytes(_Record):
    pass


_METADATA, _PATHS = 'torch.distributed.checkpoint.metadata', ('pathlib', 'pathlib._local')
# What an index may name, and what it gets.
_NAMED: Dict[Tuple[str, str], Any] = {
    (_METADATA, 'Metadata'): _Index,
    (_METADATA, 'TensorStorageMetadata'): _Tensor,
    (_METADATA, 'BytesStorageMetadata'): _Bytes,
    **{(_METADATA, name): _Record for name in (
        'TensorProperties', 'ChunkStorageMetadata', 'MetadataIndex', 'StorageMeta', '_MEM_FORMAT_ENCODING')},
    ('torch.distributed.checkpoint.filesystem', '_StorageInfo'): _Record,
    ('torch', 'Size'): tuple,
    ('torch.serialization', '_get_layout'): _Record,
    **{(module, name): _Record for module in _PATHS for name in ('PosixPath', 'WindowsPath')},
    **{('torch', name): dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype)},
}


class _Unpickler(pickle._Unpickler):
    """Reads an index. In Python, because the one in C reserves as much memory as a number in the file says."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMED:
            raise pickle.UnpicklingError(f'it asks for {str(module)[:40]}.{str(name)[:40]}, which no index is made of')
        return _NAMED[module, name]

    def load_setitem(self) -> None:
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        _check_keys(self.stack[::2])
        super().load_setitems()

    # Of the rest, what makes sets, keys or objects in other ways: no index needs it.
    dispatch = {
        code: action for code, action in pickle._Unpickler.dispatch.items()
        if bytes([code]) not in (pickle.DICT, pickle.EMPTY_SET, pickle.FROZENSET, pickle.ADDITEMS, pickle.INST,
                                 pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4)}
    dispatch.update({pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems})


def _check_keys(keys: List[Any]) -> None:
    """Names and records only: to hash a tuple of tuples of tuples would end the process."""
    if not all(isinstance(key, (str, _Record)) for key in keys):
        raise pickle.UnpicklingError('it has keys that are no names')


def read_index(folder: PathLike) -> Metadata:
    """The index of a checkpoint in parts. What it says is checked against the files that are there.

    Raises:
        InputError: There is no such checkpoint, or the index is damaged, asks for code to be run, or speaks of data
            that its files do not hold.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file():
        raise InputError(f"'{folder}' is no sharded checkpoint: it holds no file '{INDEX}'.")
    try:
        found = _Unpickler(io.BytesIO((folder / INDEX).read_bytes())).load()
        if not isinstance(found, _Index):
            raise ValueError('it is another kind of pickle')
        files = {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name != INDEX}
        return _checked(found.state, files)
    except Exception as error:  # a stranger's pickle fails in every way
        reason = ' '.join(str(error).split())[:200]
        raise InputError(
            f"The index '{folder / INDEX}' cannot be read: {reason or type(error).__name__}.") from error


def _checked(index: Mapping[str, Any], files: Mapping[str, int]) -> Metadata:
    """torch's index of the records.

    Args:
        index: Fields of the outermost record.
        files: Bytes of every other file in the folder.

    Raises:
        Many: The fields are not those of an index, or tell of more than the files hold.
    """
    stored = {_place(key): _checked_storage(value.state, files) for key, value in index['storage_data'].items()}
    entries: Dict[str, Any] = {}
    total = 0
    for name, entry in index['state_dict_metadata'].items():
        if isinstance(entry, _Tensor):
            entries[name] = _checked_tensor(name, entry.state, stored)
            total += math.prod(entries[name].size) * entries[name].properties.dtype.itemsize
        elif isinstance(entry, _Bytes) and MetadataIndex(name) in stored:
            entries[name] = BytesStorageMetadata()
        else:
            raise ValueError(f'{name!r} is neither a tensor nor bytes')
    if total > sum(files.values()):
        raise ValueError(f'it tells of {total:,} bytes, and the files have {sum(files.values()):,}')
    return Metadata(entries, storage_data=stored, storage_meta=StorageMeta())


def _place(record: _Record) -> MetadataIndex:
    name, offset = record.state['fqn'], record.state.get('offset')
    if not isinstance(name, str):
        raise ValueError('an entry has no name')
    return MetadataIndex(name, None if offset is None else _sizes(offset))


def _checked_storage(fields: Mapping[str, Any], files: Mapping[str, int]) -> _StorageInfo:
    file, (begin, length) = fields['relative_path'], _sizes((fields['offset'], fields['length']))
    if file not in files:
        raise ValueError(f"the file '{str(file)[:80]}' is missing beside it")
    if begin + length > files[file]:
        raise ValueError(f"the file '{file}' is truncated after {files[file]:,} bytes")
    if fields.get('transform_descriptors'):
        raise ValueError('its tensors are compressed, which is not supported')
    return _StorageInfo(file, begin, length)


def _checked_tensor(
        name: str,
        fields: Mapping[str, Any],
        stored: Mapping[MetadataIndex, _StorageInfo],
) -> TensorStorageMetadata:
    size, dtype = _sizes(fields['size']), fields['properties'].state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f'{name!r} has no type')
    chunks, volume = [], 0
    for record in fields['chunks']:
        offsets, sizes = _sizes(record.state['offsets']), _sizes(record.state['sizes'])
        if not len(offsets) == len(sizes) == len(size) or any(o + s > n for o, s, n in zip(offsets, sizes, size)):
            raise ValueError(f'a part of {name!r} lies outside of it')
        if stored[MetadataIndex(name, offsets)].length < math.prod(sizes) * dtype.itemsize:
            raise ValueError(f'a part of {name!r} is larger than what is stored of it')
        if math.prod(sizes):  # a rank may have got nothing
            volume += math.prod(sizes)
            chunks.append(ChunkStorageMetadata(offsets, sizes))
    if volume != math.prod(size) or len({chunk.offsets for chunk in chunks}) < len(chunks):
        raise ValueError(f'the parts of {name!r} do not make it whole')
    return TensorStorageMetadata(TensorProperties(dtype), size, chunks)


def _sizes(values: Any) -> torch.Size:
    if not (isinstance(values, tuple) and all(type(value) is int and 0 <= value < 2 ** 63 for value in values)):
        raise ValueError('it has sizes that are no whole numbers')
    return torch.Size(values)


# ---- what torch reads by it


class PlainReader(dcp.FileSystemReader):
    """torch's reader of a folder, by an index of `read_index`.

    Raises:
        InputError: See `read_index`.
    """

    def __init__(self, folder: PathLike):
        super().__init__(folder)
        self.index = read_index(folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index


class PlainPlanner(dcp.DefaultLoadPlanner):
    """torch's planner, which unpickles what is no tensor; here nothing is run."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), plain)  # written anew by ourselves
        plain.seek(0)
        super().load_bytes(read_item, plain)


# ---- one file


class JoinedTensor(NamedTuple):
    """A tensor whose parts are read when it is wanted; see `LazyTensor`.

    Attributes:
        name: In the index.
        entry: Its type, shape and parts.
        stored: Where in which file each part is.
        folder: Of the files.
    """
    name: str
    entry: TensorStorageMetadata
    stored: Mapping[MetadataIndex, _StorageInfo]
    folder: Path

    @property
    def shape(self) -> Tuple[int, ...]:
        return tuple(self.entry.size)

    @property
    def dtype(self) -> torch.dtype:
        return self.entry.properties.dtype

    def load(self) -> torch.Tensor:
        whole = torch.empty(self.shape, dtype=self.dtype)
        for chunk in self.entry.chunks:
            place = self.stored[MetadataIndex(self.name, chunk.offsets)]
            part = self._read(place)
            if not isinstance(part, torch.Tensor) or part.shape != chunk.sizes or part.dtype != self.dtype:
                raise InputError(
                    f"'{self.folder / place.relative_path}' holds something else than the part of {self.name!r} that"
                    ' the index tells of.')
            whole[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes))].copy_(part)
        return whole

    def _read(self, place: _StorageInfo) -> Any:
        path = self.folder / place.relative_path
        with open(path, 'rb') as file:
            file.seek(place.offset)
            content = io.BytesIO(file.read(place.length))
        try:
            return torch.load(content, map_location='cpu', weights_only=True)
        except Exception as error:  # pickle.UnpicklingError has many shapes
            raise InputError(
                f"'{path}' cannot be read at {self.name!r}: it is damaged, or wants code to be executed.") from error


def plan_parts(folder: PathLike) -> Dict[str, JoinedTensor]:
    """The weights of a model in a folder of parts, by their names in the model.

    Raises:
        InputError: See `read_index`; or the folder holds no weights of a model.
    """
    index = read_index(folder)
    plan = {
        name.removeprefix(WEIGHTS): JoinedTensor(name, entry, index.storage_data, Path(folder))
        for name, entry in index.state_dict_metadata.items()
        if name.startswith(WEIGHTS) and isinstance(entry, TensorStorageMetadata)}
    if not plan:
        held = ', '.join(list(index.state_dict_metadata)[:3]) or 'nothing'
        raise InputError(f"'{folder}' holds no weights, whose names begin with '{WEIGHTS}', but {held}.")
    return plan


def join_sharded(folder: PathLike, path: PathLike) -> Dict[str, JoinedTensor]:
    """Write the weights in a folder of parts as one .safetensors file, which loads into the plain model.

    Needs neither the model nor other processes, and the memory of the largest tensor. Nothing in the folder is run.

    Returns:
        What was written, by name.

    Raises:
        InputError: `path` does not end in .safetensors, the folder cannot be used, or the disk is full; what was at
            `path` before is then intact.
    """
    if Path(path).suffix != '.safetensors':
        raise InputError(f"'{path}': the joined file is a .safetensors file, name it so.")
    plan = plan_parts(folder)
    for name, tensor in plan.items():
        if tensor.dtype not in DTYPES:
            raise InputError(f"'{folder}' has {name!r} in {tensor.dtype}, which is not written into one file here.")
    by_width = sorted(plan.items(), key=lambda item: -item[1].dtype.itemsize)  # so that all of them are aligned
    write_safetensors(path, dict(by_width), {'source': Path(folder).name})
    return plan
