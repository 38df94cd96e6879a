"""Checkpoints: timm's saver with atomic files, and reading that names what is wrong with a file.

A file is written beside and renamed into place; a full disk leaves the old one. Files are read with
`weights_only=True`: nothing in them is executed.
"""
import argparse
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from timm.task import TrainingTask
from timm.utils import CheckpointSaver
from torch import nn

from ..checkpoints.archive import refuse_packed
from ..errors import InputError, atomic_write

PathLike = Union[str, os.PathLike]

LAST_EPOCH = 2 ** 31 - 1
SPARE = 2 ** 20  # bytes that a tensor may seem to have beyond those in its file


class AtomicCheckpointSaver(CheckpointSaver):
    """timm's checkpoint saver (names, ranking, history and content), whose files are never half-written.

    Args:
        run_state: Called at each save; what it returns is stored under `moe_zoo` (where in the run this is, random
            states). Plain containers, numbers and tensors only.
        Others: As timm's.
    """

    def __init__(self, *args, run_state: Callable[[], Dict[str, Any]], **kwargs):
        super().__init__(*args, **kwargs)
        self.run_state = run_state
        self.ranking = False  # `save_checkpoint` finds its file written

    def continue_from(self, path: PathLike) -> None:
        """Go on with the history of a checkpoint of this folder.

        A process that was killed right after it had written the last checkpoint has not ranked it: its copies under its
        own name and as the best are missing, or an older one is there. That is made good.

        Raises:
            InputError: It holds no history of timm's kind.
        """
        state = _history(read_checkpoint(path, mmap=True).get('saver') or {}, path)
        epoch, metric = state.get('pending', (None, None))
        if Path(path).name != 'last.pth.tar' or epoch is None:
            self.load_state_dict(state)
            return
        self.load_state_dict({**state, 'pending': (None, None)})
        self.ranking = True
        self.save_checkpoint(epoch, metric)
        self.ranking = False

    def save_recovery(self, epoch: int, batch_idx: int = 0) -> None:
        """As timm's, which keeps two of this process; here, of all that worked on the run."""
        super().save_recovery(epoch, batch_idx)
        found = Path(self.recovery_dir).glob(f'{self.recovery_prefix}-*{self.extension}')
        for path in sorted(found, key=lambda each: each.stat().st_mtime_ns)[:-2]:
            path.unlink()

    def _save(self, save_path: PathLike, epoch: int, metric: Optional[float] = None) -> None:
        if self.ranking:
            return
        state = {
            'epoch': epoch,
            'arch': self.args.model,
            'args': vars(self.args),  # a dict, where timm stores a Namespace: readable without timm
            'version': 2,
            **tensors_of_run(self.task, self.optimizer),
            'saver': self.state_dict(epoch, metric),
            'moe_zoo': self.run_state(),
        }
        if self.amp_scaler is not None:
            state[self.amp_scaler.state_dict_key] = self.amp_scaler.state_dict()
        if metric is not None:
            state['metric'] = metric
        # timm saves under a temporary name; a full disk is told of by the name that the file was to get.
        path = Path(save_path)
        batch = state['moe_zoo'].get('batch', 0) - 1
        final = path.name.replace('recovery_tmp', f'{self.recovery_prefix}-{epoch}-{batch}').replace('tmp.', 'last.')
        save_atomically(state, path, shown=path.with_name(final))

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """As timm's; what is listed there, and will be removed in its turn, are checkpoints in this folder alone."""
        own = re.compile(rf'{re.escape(self.save_prefix)}-\d+{re.escape(self.extension)}')
        listed = [entry for entry in state_dict.get('checkpoint_files', ()) if own.fullmatch(str(entry[0]))]
        super().load_state_dict({**state_dict, 'checkpoint_files': listed})

    def _replace(self, src: PathLike, dst: PathLike) -> None:
        if not self.ranking:
            os.replace(src, dst)

    def _duplicate(self, src: PathLike, dst: PathLike) -> None:
        with atomic_write(dst) as temporary:
            temporary.unlink()
            try:
                os.link(src, temporary)  # costs no space
            except OSError:
                shutil.copy2(src, temporary)


def _history(state: Any, path: PathLike) -> Dict[str, Any]:
    """What timm's saver wrote about the checkpoints of a run, once it is known to be that: files are linked and removed
    by it.

    Raises:
        InputError: It is anything else.
    """
    def number(value: Any) -> bool:
        return value is None or isinstance(value, (int, float))

    def epoch(value: Any) -> bool:
        return value is None or (isinstance(value, int) and 0 <= value <= LAST_EPOCH)

    def pair(value: Any, first: Callable[[Any], bool]) -> bool:
        return isinstance(value, (list, tuple)) and len(value) == 2 and first(value[0]) and number(value[1])

    files = state.get('checkpoint_files', []) if isinstance(state, dict) else None
    if not (isinstance(files, (list, tuple)) and all(pair(each, lambda name: isinstance(name, str)) for each in files)
            and pair(state.get('pending', (None, None)), epoch)
            and epoch(state.get('best_epoch')) and number(state.get('best_metric'))):
        raise InputError(
            f"'{path}' holds weights, but what it says of the checkpoints beside it, under 'saver', is not what timm"
            f' writes there: use initial_checkpoint={path} instead.')
    return state


def tensors_of_run(task: TrainingTask, optimizer: torch.optim.Optimizer) -> Dict[str, Any]:
    """The optimiser, the model and its average in a checkpoint, whole.

    Where processes hold parts of them, all call it at the same time: the parts are gathered.
    """
    state = {
        'optimizer': optimizer.state_dict(), **task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True)}
    if not any(hasattr(p, 'full_tensor') for p in task.trainable_module.parameters()):
        return state
    from .parallel import whole
    return whole(state)


def save_atomically(state: Any, path: PathLike, shown: PathLike = '') -> None:
    """`torch.save` to a file beside `path`, then rename; a full disk is told of by the name `shown`, if any.

    Raises:
        InputError: No space is left; what was at `path` before is intact.
    """
    with atomic_write(path, shown) as temporary, open(temporary, 'wb') as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            # torch closes its archive after a failed write, and that error hides the one of the file system.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_checkpoint(path: PathLike, mmap: bool = False) -> Dict[str, Any]:
    """A checkpoint as a dictionary: one of ours or timm's, a plain state dict, or a .safetensors file.

    Args:
        path: The file.
        mmap: Leave the tensors of torch's files where they are, to be read when they are used.

    Raises:
        InputError: The file is missing, truncated, not a checkpoint, or wants code to be executed.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"There is no checkpoint file '{path}'.")
    try:
        if path.suffix == '.safetensors':
            return load_file(path)
        refuse_packed(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
    except InputError:
        raise
    except (SafetensorError, EOFError, RuntimeError, ValueError, KeyError, OSError, AttributeError) as error:
        raise InputError(f"The checkpoint '{path}' cannot be read: {_damage(path)}.") from error
    except Exception as error:  # pickle.UnpicklingError has many shapes
        raise InputError(
            f"The checkpoint '{path}' cannot be read: {_damage(path)} (files that need code to be executed are not"
            ' loaded).') from error
    if not isinstance(content, dict):
        raise InputError(f"The checkpoint '{path}' holds a {type(content).__name__}, not weights by name.")
    return content


def _damage(path: Path) -> str:
    size = path.stat().st_size
    if not size:
        return 'it is empty'
    with open(path, 'rb') as file:
        is_zip = file.read(2) == b'PK'
    if is_zip and not zipfile.is_zipfile(path):
        return f'it is truncated after {size:,} bytes'
    if path.suffix == '.safetensors':
        return f'its {size:,} bytes are truncated or not in the safetensors format'
    return 'its content is damaged' if is_zip else f'its {size:,} bytes are not a checkpoint of torch'


def find_weights(checkpoint: Dict[str, Any], path: PathLike, use_ema: bool = False) -> Dict[str, torch.Tensor]:
    """The state dict inside a checkpoint, wrapper prefixes removed.

    Raises:
        InputError: There is none, or `use_ema` asks for averaged weights that were not saved.
    """
    if use_ema and 'state_dict_ema' not in checkpoint:
        raise InputError(f"The checkpoint '{path}' has no averaged (EMA) weights.")
    for key in ('state_dict_ema',) if use_ema else ('state_dict', 'model'):
        if isinstance(checkpoint.get(key), dict):
            return clean_state_dict(_tensors(checkpoint[key], path))
    if not any(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        held = ', '.join(map(str, list(checkpoint)[:5]))
        raise InputError(f"The checkpoint '{path}' holds no weights by name, only: {held}.")
    return clean_state_dict(_tensors(checkpoint, path))


def _tensors(weights: Dict[Any, Any], path: PathLike) -> Dict[str, torch.Tensor]:
    """The same; a few bytes can call themselves a tensor of any size, which is not let in.

    Raises:
        InputError: A name is no text, a value no tensor, or a tensor larger than its bytes in the file.
    """
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise InputError(
                f"The checkpoint '{path}' holds no weights by name: {str(name)[:60]!r} is a {type(value).__name__}.")
        if value.layout != torch.strided or value.device.type != 'cpu' or value.is_quantized or (
                value.numel() * value.element_size() > value.untyped_storage().nbytes() + SPARE):
            raise InputError(
                f"The checkpoint '{path}' cannot be used: the values of {name[:60]!r}, of shape {tuple(value.shape)}, "
                'are not in it one by one.')
    return weights


def check_fits(model: nn.Module, weights: Dict[str, torch.Tensor], path: PathLike, name: str) -> None:
    """Compare names and shapes before anything is loaded.

    Raises:
        InputError: The classes differ in number, or the weights are of another model.
    """
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in weights]
    unexpected = [key for key in weights if key not in wanted]
    shapes = [key for key in wanted if key in weights and wanted[key].shape != weights[key].shape]
    if not (missing or unexpected or shapes):
        return
    head = _classifier_prefixes(model)
    if not (missing or unexpected) and head and all(key.startswith(head) for key in shapes):
        saved, ours = weights[shapes[-1]].shape, wanted[shapes[-1]].shape
        raise InputError(
            f"The checkpoint '{path}' has another number of classes than the model: {shapes[-1]} is {tuple(saved)}"
            f' there and {tuple(ours)} with num_classes={model.num_classes}.')
    parts = [
        f'{len(keys)} {what} (first {keys[0]!r})'
        for what, keys in (('missing', missing), ('unknown', unexpected), ('of another shape', shapes)) if keys
    ]
    raise InputError(f"The checkpoint '{path}' does not fit the model {name!r}: {', '.join(parts)}.")


def _classifier_prefixes(model: nn.Module) -> Tuple[str, ...]:
    names = getattr(model, 'pretrained_cfg', {}).get('classifier') or ()
    return tuple(f'{name}.' for name in ((names,) if isinstance(names, str) else names))


def classes_in(model: nn.Module, weights: Dict[str, torch.Tensor]) -> Optional[int]:
    """Number of classes that weights of this model are for; None where they hold no classifier of its kind.

    Args:
        model: With any number of classes, also on the meta device.
    """
    own = model.state_dict()
    for name in (f'{prefix}weight' for prefix in _classifier_prefixes(model)):
        if name in own and name in weights and own[name].dim() == weights[name].dim():
            pairs = [(ours, theirs) for ours, theirs in zip(own[name].shape, weights[name].shape) if ours != theirs]
            if len(pairs) < 2:  # experts may hold several classifiers in one row
                ours, theirs = pairs[0] if pairs else (1, 1)
                return model.num_classes * theirs // ours
    return None
