"""What detectron2's own scripts want besides our parts, which `moe_zoo.run` gives them: see `prepare`."""
import atexit
import functools
from typing import Any, Dict

import detectron2.engine
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import defaults
from torch import distributed, nn

from ..errors import InputError
from .checkpoint import read_pickle
from .coco import register_user_data
from .config import sentences
from .optimizer import build_optimizer

_create_ddp_model = defaults.create_ddp_model


def create_ddp_model(model: nn.Module, **options: Any) -> nn.Module:
    """detectron2's, which always names a CUDA device, for processes on the CPU as well: those have none."""
    if not next(model.parameters()).is_cuda:
        options.setdefault('device_ids', None)
    return _create_ddp_model(model, **options)


def leave_group_at_exit() -> None:
    """Let a process leave its group before the interpreter ends: detectron2's never do, and a thread of gloo that still
    runs then aborts the process now and then, after all its work is done."""
    atexit.register(lambda: distributed.is_initialized() and distributed.destroy_process_group())


def prepare() -> None:
    """Let scripts of detectron2 train several processes on the CPU, use the data that MOE.DATA and the optimiser that
    MOE.OPTIMIZER names, answer a wrong config by one sentence, and read pickles without running what is in them."""
    if defaults.create_ddp_model is create_ddp_model:
        return
    leave_group_at_exit()
    defaults.create_ddp_model = detectron2.engine.create_ddp_model = create_ddp_model
    defaults.build_optimizer = build_optimizer
    for name, where in (('merge_from_file', "'{}'"), ('merge_from_list', 'the command line')):
        setattr(CfgNode, name, _in_one_sentence(getattr(CfgNode, name), where))
    CfgNode.freeze = _with_data(CfgNode.freeze)
    DetectionCheckpointer._load_file = with_plain_pickles(DetectionCheckpointer._load_file)


def with_plain_pickles(load_file):
    """The method of a checkpointer that reads a file, for .pkl by `read_pickle`."""
    @functools.wraps(load_file)
    def load_file_safely(self: DetectionCheckpointer, filename: str) -> Dict[str, Any]:
        if not filename.endswith('.pkl'):
            return load_file(self, filename)
        try:
            return read_pickle(filename)
        except Exception as error:  # a stranger's pickle fails in every way
            reason = ' '.join(str(error).split()) or type(error).__name__
            raise InputError(f"Checkpoint '{filename}' is not read: {reason}.") from error
    return load_file_safely


def _in_one_sentence(merge, where: str):
    @functools.wraps(merge)
    def merge_in_one_sentence(cfg: CfgNode, given: Any, *args: Any, **kwargs: Any) -> None:
        with sentences(cfg, where.format(given)):
            merge(cfg, given, *args, **kwargs)
    return merge_in_one_sentence


def _with_data(freeze):
    """Scripts freeze their config when it is complete, and read data afterwards."""
    @functools.wraps(freeze)
    def freeze_with_data(cfg: CfgNode) -> None:
        if 'MOE' in cfg:
            register_user_data(cfg)
        freeze(cfg)
    return freeze_with_data
