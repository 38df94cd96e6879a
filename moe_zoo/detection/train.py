"""Train or evaluate a detector from a detectron2 config, on detectron2's DefaultTrainer.

    tools/train_coco.py --config-file configs/coco/retinanet_moe_res5_r50_fpn_1x.yaml [--eval-only] [--num-gpus 8]
        [--resume] KEY VALUE ...

A run that was killed and resumed is the uninterrupted one, to the last bit on the same machine: batch, augmentation and
what the model draws in iteration n follow from the seed, n and the rank.
"""
import argparse
import contextlib
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import time
import warnings
import weakref
from pathlib import Path
from typing import Any, Dict, List, Mapping, NoReturn, Optional

import torch
from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer, default_setup, launch
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils import logger as detectron2_logger
from detectron2.utils.logger import setup_logger
from torch import distributed, multiprocessing, nn
from torch.utils.checkpoint import CheckpointError

from ..analysis.origin import versions
from ..checkpoints.optimizer_state import refuse_odd_options
from ..data.random_state import seed_stream
from ..errors import InputError, atomic_write, exit_on_input_error, nearest
from ..faults import Leave, Leaving, leave, listening, locked, one_sentence, received, what_died
from .checkpoint import SafeCheckpointer
from .coco import (
    ReadableMapper,
    check_same_categories,
    class_names,
    load_datasets,
    skipped_images,
    unreadable_images,
)
from .config import load_config
from .evaluation import Evaluator, NonEmpty, build_evaluator, build_test_loader
from .export import export
from .loader import Batches
from .meta_arch import LOG_PERIOD, EpochHook
from .optimizer import build_optimizer
from .upstream import create_ddp_model, leave_group_at_exit

_LOGGER = logging.getLogger(__name__)


class Stopped(InputError):
    """A run that stopped by itself; what it wrote is worth keeping."""


class Trainer(DefaultTrainer):
    """DefaultTrainer, with checked data, batches that a resumed run enters where it was killed, checkpoints that are
    never half-written, and ranks or bfloat16 on the CPU."""

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        dataset = _training_set(cfg)  # first, because data is what most often is wrong
        self.classes = class_names(cfg.DATASETS.TRAIN[0])
        loader = self.build_train_loader(cfg, dataset)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        model = create_ddp_model(
            model, broadcast_buffers=False, find_unused_parameters=cfg.MOE.FIND_UNUSED_PARAMETERS)
        if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE != 'cpu':
            self._trainer = AmpStep(model, loader, optimizer)
        else:
            self._trainer = Step(model, loader, optimizer, bfloat16=cfg.SOLVER.AMP.ENABLED)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._last_eval_results: Dict[str, Any] = {}
        self.leaving = Leaving()
        self.ranks: Optional[List[Dict[str, Any]]] = None  # what each holds that the checkpoint of one does not tell
        epoch = len(dataset) / cfg.SOLVER.IMS_PER_BATCH
        self.register_hooks([
            EpochHook(epoch), OneRanksBuffers(cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD), *self.build_hooks(),
            StarvedExperts(epoch), AskedToLeave()])

    def resume_or_load(self, resume: bool = True) -> None:
        """As detectron2's; a checkpoint to resume from must be whole, weights to start from need not be."""
        self.checkpointer.complete = resume and self.checkpointer.has_checkpoint()
        super().resume_or_load(resume)
        self.data_loader.start = self.start_iter

    def run_step(self) -> None:
        seed_stream(self.data_loader.seed, self.iter, comm.get_rank())
        super().run_step()

    def state_dict(self) -> Dict[str, Any]:
        ranks = {} if self.ranks is None else {'ranks': self.ranks}
        return {**super().state_dict(), 'seed': self.data_loader.seed, 'classes': self.classes,
                'loss_normalizer': _normalizer(self.model), **ranks}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        optimizer = self._trainer.optimizer
        fresh = optimizer.param_groups
        super().load_state_dict(state_dict)
        refuse_odd_options(fresh, optimizer.param_groups)
        self.data_loader.seed = state_dict.get('seed', self.data_loader.seed)
        if not all(isinstance(number, int) and 0 <= number < 2 ** 63 for number in (self.iter, self.data_loader.seed)):
            raise InputError(f'its iteration is {str(self.iter)[:60]!r}, its seed {str(self.data_loader.seed)[:60]!r}')
        _set_normalizer(self.model, state_dict.get('loss_normalizer'))
        ranks = state_dict.get('ranks', ())
        if len(ranks) == comm.get_world_size():
            _set_normalizer(self.model, ranks[comm.get_rank()]['loss_normalizer'])
            own = dict(self.model.named_buffers())
            for name, value in ranks[comm.get_rank()]['buffers'].items():
                own[name].copy_(value)
        if state_dict.get('classes', self.classes) != self.classes:
            raise InputError(f'it was trained on the categories {_some(state_dict["classes"])}, '
                             f'and DATASETS.TRAIN has {_some(self.classes)}')

    def save_and_leave(self, request: Leave) -> NoReturn:
        """A checkpoint after the iteration that was the last, and the end of this process."""
        if self.iter + 1 < self.max_iter:  # else it is the final one, and what is left is an evaluation
            self.ranks = comm.all_gather({
                'loss_normalizer': _normalizer(self.model),
                'buffers': {name: buffer.cpu() for name, buffer in self.model.named_buffers()}})
            self.checkpointer.save('model_recovery', iteration=self.iter)
        _LOGGER.info('%s: left after iteration %d of %d; --resume goes on from there.', request,
                     min(self.iter + 1, self.max_iter), self.max_iter)
        leave(request.number)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        try:
            return super().build_model(cfg)
        except (AssertionError, KeyError) as error:  # detectron2's way of refusing a config
            raise InputError(f'The model cannot be built from this config: {_refusal(error)}') from error

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, dataset: Optional[List[Dict[str, Any]]] = None) -> Batches:
        dataset = _training_set(cfg) if dataset is None else dataset
        return Batches(cfg, dataset, ReadableMapper(cfg, True, unreadable_images(cfg)))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> NonEmpty:
        return build_test_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> Evaluator:
        return build_evaluator(cfg, dataset_name)


class Step(SimpleTrainer):
    """One iteration, which ends the run at the first loss or gradient that is not finite.

    Args:
        bfloat16: Run forward under bfloat16 autocast, on the CPU; weights and gradients stay float32.
    """

    def __init__(self, model: nn.Module, data_loader: Batches, optimizer: torch.optim.Optimizer, bfloat16: bool):
        super().__init__(model, data_loader, optimizer)
        self.bfloat16 = bfloat16

    def run_step(self) -> None:
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        with torch.autocast('cpu', torch.bfloat16, enabled=self.bfloat16):
            losses = self.model(batch)
        _refuse_infinite(losses, self.iter, self.data_loader.files)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.after_backward()
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not torch.isfinite(nn.utils.get_total_norm(gradients)):  # equal on all ranks, which therefore all come here
            files = sum(comm.all_gather(self.data_loader.files), [])
            raise FloatingPointError(_where(f'the gradient is not finite (losses: {_shown(losses)})', self.iter, files))
        self._write_metrics(losses, data_time)
        self.optimizer.step()


class AmpStep(AMPTrainer):
    """detectron2's mixed precision on CUDA, whose scaler passes over an infinite gradient."""

    def _write_metrics(self, loss_dict: Mapping[str, torch.Tensor], data_time: float, *args: Any, **kwargs: Any):
        _refuse_infinite(loss_dict, self.iter, self.data_loader.files)
        super()._write_metrics(loss_dict, data_time, *args, **kwargs)


def _refuse_infinite(losses: Mapping[str, torch.Tensor], iteration: int, files: List[str]) -> None:
    if not all(torch.isfinite(loss) for loss in losses.values()):
        raise FloatingPointError(_where(f'the loss is NaN or infinite ({_shown(losses)})', iteration, files))


def _where(what: str, iteration: int, files: List[str]) -> str:
    folder = os.path.dirname(os.path.commonpath(files)) if len(files) == 1 else os.path.commonpath(files)
    names = ', '.join(os.path.relpath(file, folder) for file in files)
    return f"{what} in iteration {iteration}, on {names} of '{folder}'"


def _shown(losses: Mapping[str, torch.Tensor]) -> str:
    return ', '.join(f'{name} {loss.item():.4g}' for name, loss in losses.items())


class OneRanksBuffers(HookBase):
    """Before a checkpoint or an evaluation, every rank takes over the buffers (BatchNorm's, routers') of the first, and
    its running normaliser of the loss.

    A checkpoint holds those of the first alone, and a resumed run shall not differ; nor shall the ranks of an
    evaluation. Parameters are equal anyway.

    Args:
        periods: Iterations between two checkpoints, two evaluations; 0 for none.
    """

    def __init__(self, *periods: int):
        self.periods = [period for period in periods if period > 0]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if comm.get_world_size() > 1 and (
                done >= self.trainer.max_iter or any(done % period == 0 for period in self.periods)):
            for buffer in self.trainer.model.buffers():
                distributed.broadcast(buffer, 0)
            _set_normalizer(self.trainer.model, comm.all_gather(_normalizer(self.trainer.model))[0])


def _normalizer(model: nn.Module) -> Optional[float]:
    """The running mean of positive anchors that RetinaNet and FCOS divide by: a plain attribute, in no state_dict."""
    value = getattr(getattr(model, 'module', model), 'loss_normalizer', None)
    return None if value is None else float(value)


def _set_normalizer(model: nn.Module, value: Optional[float]) -> None:
    if value is not None:
        getattr(model, 'module', model).loss_normalizer = value


class AskedToLeave(HookBase):
    """Raise `Leave` between two iterations where a process of the run was asked to leave; before the final evaluation,
    that asks by itself."""

    def after_step(self) -> None:
        if self.trainer.iter + 1 < self.trainer.max_iter:
            self.trainer.leaving.check()


class StarvedExperts(HookBase):
    """Warn once a layer where an expert gets less than a tenth of its fair share over an epoch.

    Args:
        epoch: Iterations an epoch.
    """

    def __init__(self, epoch: float):
        self.window = max(1, math.ceil(epoch / LOG_PERIOD))  # so many values of the event storage are an epoch
        self.warned = set()

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % (self.window * LOG_PERIOD):
            return
        shares: Dict[str, List[float]] = {}
        for key, history in self.trainer.storage.histories().items():
            if key.startswith('moe/') and key.endswith('_share'):
                shares.setdefault(key.rpartition('/')[0][4:], []).append(history.avg(self.window))
        for layer, share in shares.items():
            starved = [e for e, value in enumerate(share) if value < 0.1 / len(share)]
            if starved and layer not in self.warned:
                self.warned.add(layer)
                _LOGGER.warning(
                    'Layer %s: of %d experts, %s got less than a tenth of the fair share over an epoch (the least '
                    '%.2f%%); raise the weights of its balance losses, add gate noise, or use fewer experts.',
                    layer, len(share), starved, 100 * min(share))


@exit_on_input_error
def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    """The command line of `run`, which it returns the metrics of."""
    return run(argv)


def run(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    """Train, evaluate or export as the words of a command line say; see `--help`.

    Returns:
        COCO metrics of the last evaluation, `{'bbox': {'AP': ..., 'AP50': ..., ...}}` in percent, and 'segm' for masks;
        one such entry a test set where there are several. Also in OUTPUT_DIR/results.json.

    Raises:
        InputError: Something that was given cannot be used, in which case a new OUTPUT_DIR goes again, and the results
            in an old one stay with their config; or the training diverged.
    """
    args = _parser().parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    cfg = _config(args)
    processes = max(args.num_gpus, args.num_processes)
    _check_processes(cfg, args, processes)
    if args.export:
        print(export(cfg, args.export))
        return {}
    new, config = not Path(cfg.OUTPUT_DIR).exists(), Path(cfg.OUTPUT_DIR) / 'config.yaml'
    made_by = config.read_bytes() if config.is_file() and _results(cfg).exists() else None
    try:
        if processes * args.num_machines == 1:
            return work(args)
        return _launch(cfg, args, processes)
    except InputError as error:
        if new and not isinstance(error, Stopped) and not any(Path(cfg.OUTPUT_DIR).glob('*.pth')):
            shutil.rmtree(cfg.OUTPUT_DIR, ignore_errors=True)
        elif made_by is not None and _results(cfg).exists():  # they stay those of the config beside them
            config.write_bytes(made_by)
        raise


def _launch(cfg: CfgNode, args: argparse.Namespace, processes: int) -> Dict[str, Any]:
    if cfg.MODEL.DEVICE == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''  # else detectron2 chooses NCCL
    sentences = multiprocessing.get_context('spawn').SimpleQueue()
    address = args.dist_url or ('auto' if args.num_machines == 1 else None)
    try:
        with contextlib.nullcontext() if args.eval_only else listening(_forward):
            try:
                launch(_rank, processes, args.num_machines, args.machine_rank, address,
                       args=(args, processes, sentences))
            finally:
                asked = received()
    except (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException) as error:
        killed = getattr(error, 'signal_name', None)
        if killed and not asked:
            raise Stopped(f'Process {error.error_index} of {processes} was killed ({killed}), most often because memory'
                          f' ran out, and the others were ended; {_kept(cfg)}.') from None
        if not sentences.empty():
            kind, sentence = sentences.get()
            raise {'Stopped': Stopped}.get(kind, InputError)(sentence) from None
        if not asked:
            raise
    if asked:
        leave(asked)
    return json.loads(_results(cfg).read_text())['metrics'] if _results(cfg).exists() else {}


def _forward(number: int) -> None:
    """To the processes of the run, which a terminal or a scheduler may have told by itself: once more does no harm."""
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGUSR1)


def work(args: argparse.Namespace) -> Dict[str, Any]:
    """What one process does: everything, or its share of it."""
    cfg = _config(args)
    with contextlib.ExitStack() as held:
        if not args.eval_only:
            held.enter_context(listening())
        if comm.is_main_process() and not args.eval_only:
            held.enter_context(locked(cfg.OUTPUT_DIR, 'name another OUTPUT_DIR'))
        comm.synchronize()  # nobody writes before
        return _work(cfg, args)


def _work(cfg: CfgNode, args: argparse.Namespace) -> Dict[str, Any]:
    cfg.freeze()
    made_by = versions()  # before: the checkout may change meanwhile
    _forget_loggers()
    warnings.filterwarnings('ignore', message='torch.meshgrid')  # detectron2's, once a process
    warnings.filterwarnings('ignore', message='The given NumPy array is not writable')  # fvcore's, which copies it
    try:
        default_setup(cfg, args)
        setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name='moe_zoo')
    except OSError as error:
        raise InputError(f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' cannot be written: {error.strerror or error}.") from error
    # A user's mistake is told in one sentence at the end; detectron2 would print its traceback before.
    logging.getLogger('detectron2.engine.train_loop').addFilter(_no_traceback)
    try:
        with one_sentence(lambda: _kept(cfg), Stopped, cfg.OUTPUT_DIR):
            results = _evaluate(cfg, args.resume) if args.eval_only else _train(cfg, args.resume)
    except FloatingPointError as error:
        raise Stopped(_divergence(cfg, error)) from error
    except CheckpointError as error:
        raise InputError('Gradient checkpointing recomputed a routed layer without the true image sizes: checkpoint '
                         'through moe_zoo.routing.checkpoint_routed, which keeps them.') from error
    except ValueError as error:
        raise _in_a_sentence(error) from error
    if comm.is_main_process():
        _report(cfg, results, made_by)
    return results


def _train(cfg: CfgNode, resume: bool) -> Dict[str, Any]:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    _begin(cfg)
    # The scripted losses of detectron2 are compiled anew in every process, after a first call that rounds otherwise.
    with trainer.leaving, torch.jit.optimized_execution(cfg.MODEL.DEVICE != 'cpu'):
        try:
            trainer.train()
        except Leave as request:
            trainer.save_and_leave(request)
    return trainer._last_eval_results


def _evaluate(cfg: CfgNode, resume: bool) -> Dict[str, Any]:
    model = Trainer.build_model(cfg)
    checkpointer = SafeCheckpointer(model, save_dir=cfg.OUTPUT_DIR, complete=True)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        _LOGGER.warning('MODEL.WEIGHTS is empty: an untrained detector is evaluated.')
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    _begin(cfg)
    return Trainer.test(cfg, model)


def _begin(cfg: CfgNode) -> None:
    """Take away what an earlier run in this folder found, once nothing refuses this one."""
    if comm.is_main_process():
        for stale in (unreadable_images(cfg), _results(cfg)):
            stale.unlink(missing_ok=True)
    comm.synchronize()


def _rank(args: argparse.Namespace, processes: int, sentences) -> None:
    """One of several processes; a user's mistake travels to the parent, which prints it once."""
    if not torch.cuda.is_available() and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    leave_group_at_exit()
    try:
        work(args)
    except InputError as error:
        sentences.put((type(error).__name__, str(error)))
        sys.stdout.flush()
        os._exit(2)  # at once: the other ranks may wait for this one inside a collective operation


def _config(args: argparse.Namespace) -> CfgNode:
    cfg = load_config(args.config_file, args.opts)
    if args.strict_data:
        cfg.MOE.DATA.STRICT = True
    return cfg


def _check_processes(cfg: CfgNode, args: argparse.Namespace, processes: int) -> None:
    total = processes * args.num_machines
    if processes < 1:
        raise InputError(f'--num-gpus {args.num_gpus}: at least one process is needed.')
    if cfg.MODEL.DEVICE.startswith('cuda') and processes > torch.cuda.device_count():
        raise InputError(f'--num-gpus {processes}: this machine has {torch.cuda.device_count()}; for processes on the '
                         'CPU add MODEL.DEVICE cpu.')
    if cfg.SOLVER.IMS_PER_BATCH < 1:
        raise InputError(f'SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}: at least one image is needed.')
    if not args.eval_only and cfg.SOLVER.IMS_PER_BATCH % (cfg.SOLVER.REFERENCE_WORLD_SIZE or total):
        raise InputError(f'SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} does not divide into {total} processes.')


def _results(cfg: CfgNode) -> Path:
    return Path(cfg.OUTPUT_DIR) / 'results.json'


def _report(cfg: CfgNode, results: Dict[str, Any], made_by: Dict[str, Optional[str]]) -> None:
    """Write results.json, and say what was left out."""
    content = {'metrics': _plain(results), 'unit': 'percent', 'versions': made_by}
    with atomic_write(_results(cfg)) as part:
        part.write_text(json.dumps(content, indent=1))
    skipped = skipped_images(unreadable_images(cfg))
    if skipped:
        _LOGGER.warning(
            'Unreadable images skipped: %d (in an evaluation their objects count as missed), listed in %s, such as %s.',
            len(skipped), unreadable_images(cfg), skipped[0])


def _plain(value: Any) -> Any:
    """JSON has no NaN: what could not be measured is null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    value = float(value)
    return value if math.isfinite(value) else None


def _divergence(cfg: CfgNode, error: FloatingPointError) -> str:
    return (f'Training stopped because {" ".join(str(error).split())}; {_kept(cfg)}; lower SOLVER.BASE_LR or lengthen '
            'SOLVER.WARMUP_ITERS, or look at these images.')


def _kept(cfg: CfgNode) -> str:
    mark = Path(cfg.OUTPUT_DIR) / 'last_checkpoint'
    return f"the last good checkpoint is '{mark.with_name(mark.read_text())}'" if mark.exists() \
        else 'no checkpoint was written before'


def _in_a_sentence(error: ValueError) -> ValueError:
    """An InputError that a loader's worker process raised arrives with its traceback as text."""
    text = str(error)
    if 'InputError: ' in text:
        return InputError(text.rsplit('InputError: ', 1)[1].strip())
    if 'Expected more than 1 value per channel' in text:
        return InputError('A BatchNorm layer saw one value a channel, from which it cannot learn: this batch is too '
                          'small in images or in pixels; set the NORM keys of MODEL to GN or FrozenBN, or raise '
                          'SOLVER.IMS_PER_BATCH or INPUT.MIN_SIZE_TRAIN.')
    return error


def _no_traceback(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, ValueError):
        error = _in_a_sentence(error)
    return not isinstance(error, (InputError, FloatingPointError, CheckpointError)) and not what_died(error)


def _refusal(error: Exception) -> str:
    """What detectron2 says, as a sentence, and the nearest name where it knows none."""
    reason = ' '.join(str(error).strip('"\'').split()).rstrip('.!')
    unknown = re.search(r"No object named '(.*)' found in '(.*)' registry", reason)
    registry = getattr(modeling, f'{unknown[2]}_REGISTRY', ()) if unknown else ()
    return f'{reason}.{nearest(unknown[1], [name for name, _ in registry]) if unknown else ""}'


def _forget_loggers() -> None:
    """A second run in one process writes to its own stdout and log file, not to those of the first as well."""
    setup_logger.cache_clear()
    detectron2_logger._cached_log_stream.cache_clear()  # the file may be gone
    for name in ('detectron2', 'fvcore', 'moe_zoo'):
        logging.getLogger(name).handlers.clear()


def _training_set(cfg: CfgNode) -> List[Dict[str, Any]]:
    """The images to train on; those to evaluate on are looked at as well, before hours of training."""
    found = load_datasets(cfg, cfg.DATASETS.TRAIN, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)
    for name in cfg.DATASETS.TEST:
        load_datasets(cfg, [name], filter_empty=False)
    check_same_categories([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    return found


def _some(names: List[str]) -> str:
    return f'{", ".join(names[:5])}{f" and {len(names) - 5} more" if len(names) > 5 else ""}'


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Train or evaluate a detector from a detectron2 yaml config.',
        epilog='KEY VALUE pairs change the config, as in SOLVER.BASE_LR 0.005 MOE.RESNET.NUM_EXPERTS 8. Data: '
               'DETECTRON2_DATASETS as in detectron2, or MOE.DATA.ROOT DIR (annotations/instances_{train,val}.json, '
               'train/, val/), or MOE.DATA.{TRAIN,TEST}_{JSON,IMAGES}.')
    parser.add_argument('--config-file', required=True, metavar='FILE', help='detectron2 yaml (configs/coco/*.yaml)')
    parser.add_argument('--eval-only', action='store_true', help='evaluate MODEL.WEIGHTS on DATASETS.TEST')
    parser.add_argument('--export', metavar='FILE', help='write MODEL.WEIGHTS as a TorchScript file and stop')
    parser.add_argument('--resume', action='store_true', help='go on from the last checkpoint in OUTPUT_DIR')
    parser.add_argument('--num-gpus', type=int, default=1, metavar='N', help='processes on this machine, one a GPU')
    parser.add_argument('--num-processes', type=int, default=1, metavar='N', help='the same, for processes on the CPU')
    parser.add_argument('--num-machines', type=int, default=1, metavar='N', help='machines of the run')
    parser.add_argument('--machine-rank', type=int, default=0, metavar='R', help='number of this machine, from 0')
    parser.add_argument('--dist-url', default='', metavar='URL', help='meeting point, tcp://HOST:PORT')
    parser.add_argument('--strict-data', action='store_true', help='refuse an unreadable image instead of skipping it')
    parser.add_argument('opts', nargs='*', metavar='KEY VALUE', help='config keys to change')
    return parser


if __name__ == '__main__':
    main()
