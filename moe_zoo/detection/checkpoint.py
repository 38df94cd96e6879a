"""Checkpoints of detectors: strangers' files read without running their code, own ones never half-written."""
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, Dict

import torch
from detectron2.checkpoint import DetectionCheckpointer
from safetensors.torch import load_file

from ..errors import InputError, atomic_write

_PLAIN = {
    ('collections', 'OrderedDict'), ('builtins', 'dict'), ('builtins', 'list'), ('builtins', 'set'),
    ('_codecs', 'encode'),
    *((f'numpy.{core}.multiarray', name) for core in ('core', '_core') for name in ('_reconstruct', 'scalar')),
    ('numpy', 'ndarray'), ('numpy', 'dtype'),
}


class PlainUnpickler(pickle.Unpickler):
    """Reads NumPy arrays and plain containers, which is all that detectron2's model zoo files hold."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f'it asks for {module}.{name}, which is neither an array nor a container')
        return super().find_class(module, name)


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
        except (OSError, AssertionError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, KeyError,
                ValueError, TypeError, AttributeError, IndexError) as error:
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
        if not filename.endswith('.pkl'):
            return super()._load_file(filename)
        with open(filename, 'rb') as file:
            data = PlainUnpickler(file, encoding='latin1').load()
        if 'model' in data and '__author__' in data:
            return data
        data = data.get('blobs', data)  # Detectron's own files
        weights = {key: value for key, value in data.items() if not key.endswith('_momentum')}
        return {'model': weights, '__author__': 'Caffe2', 'matching_heuristics': True}

    def _torch_load(self, filename: str) -> Dict[str, Any]:
        if filename.endswith('.safetensors'):
            return load_file(filename)
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
