"""Tensors that are made when they are wanted, and a safetensors file that is written one of them at a time.

What does not fit into memory twice, or at all, is converted this way: the plan needs shapes only.
"""
import json
import os
import struct
from typing import Any, Callable, Mapping, NamedTuple, Tuple, Union

import numpy as np
import torch

from ..errors import atomic_write

# Names of the safetensors format.
DTYPES = {
    torch.float64: 'F64', torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16', torch.int64: 'I64',
    torch.int32: 'I32', torch.int16: 'I16', torch.int8: 'I8', torch.uint8: 'U8', torch.bool: 'BOOL'}


class LazyTensor(NamedTuple):
    """A tensor made of arrays.

    Attributes:
        arrays: Things with a `shape` and a `dtype` that `numpy.asarray` reads.
        make: From one tensor for each array to the tensor; shapes only follow from it on the meta device.
    """
    arrays: Tuple[Any, ...]
    make: Callable[..., torch.Tensor]

    @property
    def shape(self) -> Tuple[int, ...]:
        return tuple(self.make(*[torch.empty(tuple(a.shape), device='meta') for a in self.arrays]).shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.from_numpy(np.empty(0, _read_type(self.arrays[0]))).dtype

    def load(self) -> torch.Tensor:
        """The tensor, contiguous, in memory of its own."""
        tensors = [torch.from_numpy(np.array(a, dtype=_read_type(a))) for a in self.arrays]
        return self.make(*tensors).contiguous()


def _read_type(array: Any) -> np.dtype:
    """float32 for every type but NumPy's own floats: bfloat16 comes as one that torch does not read."""
    return array.dtype if array.dtype in (np.float32, np.float64, np.float16) else np.dtype(np.float32)


def write_safetensors(
        path: Union[str, os.PathLike],
        tensors: Mapping[str, Union[LazyTensor, torch.Tensor]],
        metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file and hold one tensor at a time.

    safetensors' own `save_file` writes beside the file that it is given, where a process that is killed leaves it.

    Args:
        path: Written beside and renamed into place.
        tensors: By name.
        metadata: Texts for the header.

    Raises:
        InputError: A tensor cannot be read, or the disk is full; what was at `path` before is intact.
    """
    header = {'__metadata__': {'format': 'pt', **metadata}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize
        header[name] = {'dtype': DTYPES[tensor.dtype], 'shape': list(tensor.shape), 'data_offsets': [begin, end]}
    text = json.dumps(header).encode()
    text += b' ' * (-len(text) % 8)  # the data begins at a multiple of 8
    with atomic_write(path) as part, open(part, 'wb') as file:
        file.write(struct.pack('<Q', len(text)) + text)
        for tensor in tensors.values():
            # Of bytes, because NumPy has no bfloat16, and of one axis, because a view of none cannot become bytes.
            whole = tensor.detach() if isinstance(tensor, torch.Tensor) else tensor.load()
            file.write(whole.contiguous().reshape(-1).view(torch.uint8).numpy().data)
