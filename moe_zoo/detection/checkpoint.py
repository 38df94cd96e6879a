"""Checkpoints of detectors: strangers' files read without running their code, own ones never half-written."""
import functools
import inspect
import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling.backbone.resnet import BottleneckBlock
from safetensors.torch import load_file

from ..checkpoints.archive import refuse_packed
from ..errors import InputError, atomic_write


class _Type:
    """A NumPy dtype in a pickle: of numbers, nothing else."""

    def __init__(self, name: str, *_):
        self.dtype = np.dtype(name) if isinstance(name, str) and len(name) < 9 else np.dtype('V1')
        if self.dtype.kind not in 'biufc':
            raise pickle.UnpicklingError(f'it holds NumPy values of type {str(name)[:20]!r}, which are no numbers')

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ('<', '>'):
            self.dtype = self.dtype.newbyteorder(state[1])

    def read(self, data: Union[bytes, str], shape: Tuple[int, ...], order: str = 'C') -> np.ndarray:
        """Numbers from their bytes, which Python 2 has pickled as text."""
        data = data.encode('latin1') if isinstance(data, str) else data
        return np.frombuffer(data, self.dtype).reshape(shape, order=order).astype(self.dtype.newbyteorder('='))


class _Array:
    """A NumPy array in a pickle: what is empty at first gets its value with its state."""
    value: Optional[np.ndarray] = None

    def __init__(self, *_):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        self.value = kind.read(data, shape, 'F' if fortran else 'C')


def _from_buffer(data: bytes, kind: _Type, shape: Tuple[int, ...], order: str) -> np.ndarray:
    return kind.read(data, shape, order)


def _scalar(kind: _Type, data: Union[bytes, str]) -> np.generic:
    return kind.read(data, ())[()]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != 'latin1':
        raise pickle.UnpicklingError('it asks for a text encoding other than latin1')
    return text.encode('latin1')


def _no_bytes() -> bytes:
    return b''  # how old protocols write them


# What a pickle may name, and what it gets: nothing of NumPy's is ever called with a stranger's arguments.
_PLAIN: Dict[Tuple[str, str], Any] = {
    ('collections', 'OrderedDict'): OrderedDict,
    ('_codecs', 'encode'): _encode,
    ('numpy', 'ndarray'): 'ndarray',  # an argument of _reconstruct, which needs none
    ('numpy', 'dtype'): _Type,
}
for _core in ('numpy.core', 'numpy._core'):
    _PLAIN.update({
        (f'{_core}.multiarray', '_reconstruct'): _Array,
        (f'{_core}.multiarray', 'scalar'): _scalar,
        (f'{_core}.numeric', '_frombuffer'): _from_buffer,
    })
for _builtins in ('builtins', '__builtin__'):
    _PLAIN.update({(_builtins, kind.__name__): kind for kind in (dict, list, set)})
    _PLAIN[_builtins, 'bytes'] = _no_bytes


class PlainUnpickler(pickle._Unpickler):
    """Reads NumPy arrays of numbers and plain containers, which is all that detectron2's model zoo files hold.

    Arrays are given as such where weights are: values of the outermost dictionary, or of a dictionary in it. It is the
    unpickler in Python, which is quick enough for some hundred arrays: with the one in C, ten bytes that name place two
    billion of the memo take 32 GB.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f'it asks for {module}.{name}, which is neither an array nor a container')
        found = _PLAIN[module, name]
        return functools.partial(found) if inspect.isfunction(found) else found  # a pickle can change what it holds

    def load(self) -> Any:
        return _with_arrays(super().load(), depth=2)


def _with_arrays(value: Any, depth: int) -> Any:
    if isinstance(value, dict) and depth:
        return {key: _with_arrays(each, depth - 1) for key, each in value.items()}
    return value.value if isinstance(value, _Array) else value


def read_pickle(filename: str) -> Dict[str, Any]:
    """A .pkl of detectron2's model zoo, or of Caffe2, as detectron2's checkpointer wants it.

    Raises:
        UnpicklingError: It holds anything but numbers in plain containers; other errors for other nonsense.
    """
    with open(filename, 'rb') as file:
        data = PlainUnpickler(file, encoding='latin1').load()
    if 'model' in data and '__author__' in data:
        return data
    data = data.get('blobs', data)  # Detectron's own files
    weights = {key: value for key, value in data.items() if not key.endswith('_momentum')}
    return {'model': weights, '__author__': 'Caffe2', 'matching_heuristics': True}


def detectron2_name(key: str) -> str:
    """
    >>> detectron2_name('layer1.0.downsample.1.weight')
    'res2.0.shortcut.norm.weight'
    """
    key = re.sub(r'^layer(\d)', lambda found: f'res{int(found[1]) + 1}', key)
    key = re.sub(r'\bbn(\d)', r'conv\1.norm', key)
    key = key.replace('downsample.0', 'shortcut').replace('downsample.1', 'shortcut.norm')
    return key if key.startswith('res') else f'stem.{key}'


class SafeCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer, with every refusal as one sentence.

    Args:
        model: As in detectron2.
        save_dir: As in detectron2.
        complete: Refuse a file that lacks a tensor of the model: for evaluation, where a random rest is never meant.
        checkpointables: As in detectron2.
    """

    def __init__(self, model: torch.nn.Module, save_dir: str = '', *, complete: bool = False, **checkpointables):
        super().__init__(model, save_dir, **checkpointables)
        self.complete = complete

    def load(self, path: str, *args, **kwargs) -> Dict[str, Any]:
        """As detectron2's.

        Raises:
            InputError: The file is missing, truncated, no checkpoint, or of another model.
        """
        try:
            return super().load(path, *args, **kwargs)
        except Exception as error:  # a stranger's file fails in every way
            reason = ' '.join(str(error).split())[:300] or type(error).__name__
            if '://' in path and isinstance(error, OSError):
                raise InputError(f"Checkpoint '{path}' cannot be fetched: {reason}; give a file.") from error
            if not os.path.isfile(path) and '://' not in path:
                raise InputError(f"Checkpoint '{path}' does not exist.") from error
            raise InputError(f"Checkpoint '{path}' is truncated, or no checkpoint of this model: {reason.rstrip('.')}."
                             ) from error
        finally:
            self._parsed_url_during_load = None  # else a second load asserts

    def save(self, name: str, **kwargs: Any) -> None:
        """As detectron2's, written beside and renamed into place; the mark `last_checkpoint` moves afterwards.

        Raises:
            FloatingPointError: A weight is no longer finite: the checkpoint before stays the last one.
            InputError: The disk is full.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {'model': self.model.state_dict()}
        for key, value in data['model'].items():
            if not torch.isfinite(value).all():
                raise FloatingPointError(f'{key} is no longer finite')
        data.update((key, obj.state_dict()) for key, obj in self.checkpointables.items())
        data.update(kwargs)
        path = Path(self.save_dir) / f'{name}.pth'
        self.logger.info(f'Saving checkpoint to {path}')
        with atomic_write(path) as part, open(part, 'wb') as file:
            try:
                torch.save(data, file)
            except RuntimeError as error:  # torch fails once more while closing, which hides the full disk
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_write(Path(self.save_dir) / 'last_checkpoint') as part:
            part.write_text(last_filename_basename)

    def _load_file(self, filename: str) -> Dict[str, Any]:
        return read_pickle(filename) if filename.endswith('.pkl') else self._convert(super()._load_file(filename))

    def _convert(self, loaded: Dict[str, Any]) -> Dict[str, Any]:
        """A classifier by torchvision's and timm's names, which detectron2 does not know, under detectron2's.

        Raises:
            InputError: The model has the stride of a bottleneck where these networks do not.
        """
        weights = loaded['model'].get('state_dict', loaded['model'])
        if not {'conv1.weight', 'bn1.weight', 'layer1.0.conv1.weight'} <= set(weights):
            return loaded
        for name, block in self.model.named_modules():
            if isinstance(block, BottleneckBlock) and getattr(block.conv1, 'stride', None) == (2, 2):
                raise InputError(f'the stride of {name} is in its 1 x 1 convolution, and in the 3 x 3 one there: set '
                                 'MODEL.RESNETS.STRIDE_IN_1X1 False')
        weights = {detectron2_name(key): value for key, value in weights.items() if not key.startswith('fc.')}
        return {'model': weights, '__author__': 'torchvision', 'matching_heuristics': True}

    def _torch_load(self, filename: str) -> Dict[str, Any]:
        if filename.endswith('.safetensors'):
            return load_file(filename)
        refuse_packed(filename)
        return torch.load(filename, map_location='cpu', weights_only=True)

    def _load_model(self, checkpoint: Dict[str, Any]):
        model = self.model.state_dict()
        held = len(checkpoint['model'])
        found = super()._load_model(checkpoint)
        unset = {key for key in found.missing_keys if not key.endswith('num_batches_tracked')}
        unset.update(key for key, *_ in found.incorrect_shapes)
        if all(key in unset for key in model if not key.endswith('num_batches_tracked')):
            raise InputError(f'none of its {held} tensors belongs here')
        if self.complete and found.incorrect_shapes:
            key, given, wanted = found.incorrect_shapes[0]
            raise InputError(f'{key} has shape {given} there and {wanted} here'
                             f"{', for another number of classes' if 'cls_score' in key else ''}")
        if self.complete and unset:
            raise InputError(f'it lacks {len(unset)} of {len(model)} tensors, such as {sorted(unset)[0]}')
        return found
