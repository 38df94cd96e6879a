"""Train or evaluate a detector from a detectron2 config, on detectron2's DefaultTrainer.

    tools/train_coco.py --config-file configs/coco/retinanet_moe_res5_r50_fpn_1x.yaml [--eval-only] [--num-gpus 8]
        [--resume] KEY VALUE ...
"""
import argparse
import json
import logging
import math
import os
import sys
import warnings
import weakref
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.data.samplers import InferenceSampler
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    create_ddp_model,
    default_setup,
    launch,
)
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import COCOEvaluator, coco_evaluation
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import multiprocessing, nn
from torch.utils.checkpoint import CheckpointError

from ..errors import InputError, atomic_write, exit_on_input_error
from .checkpoint import SafeCheckpointer
from .coco import ReadableMapper, load_datasets, skipped_images
from .config import load_config
from .retinanet import LOG_PERIOD

_LOGGER = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """DefaultTrainer, with checked data, checkpoints that are never half-written, CPU ranks, and COCO metrics by
    faster-coco-eval, which gives pycocotools' numbers in a tenth of the time."""

    def __init__(self, cfg: CfgNode):
        TrainerBase.__init__(self)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        dataset = _training_set(cfg)  # first, because data is what most often is wrong
        loader = self.build_train_loader(cfg, dataset)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        model = distribute(model, cfg.MOE.FIND_UNUSED_PARAMETERS)
        step = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = step(model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = SafeCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._last_eval_results: Dict[str, Any] = {}
        self.register_hooks([*self.build_hooks(), StarvedExperts(len(dataset) / cfg.SOLVER.IMS_PER_BATCH)])

    def resume_or_load(self, resume: bool = True) -> None:
        """As detectron2's; a checkpoint to resume from must be whole, weights to start from need not be."""
        self.checkpointer.complete = resume and self.checkpointer.has_checkpoint()
        super().resume_or_load(resume)

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        try:
            return super().build_model(cfg)
        except (AssertionError, KeyError) as error:  # detectron2's way of refusing a config
            reason = ' '.join(str(error).strip('"\'').split())
            raise InputError(f'The model cannot be built from this config: {reason}.') from error

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, dataset: Optional[List[Dict[str, Any]]] = None):
        dataset = _training_set(cfg) if dataset is None else dataset
        return build_detection_train_loader(cfg, dataset=dataset, mapper=ReadableMapper(cfg, True, _unreadable(cfg)))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        dataset = load_datasets([dataset_name], cfg.MODEL.RETINANET.NUM_CLASSES, filter_empty=False)
        return NonEmpty(build_detection_test_loader(
            dataset,
            mapper=ReadableMapper(cfg, False, _unreadable(cfg)),
            sampler=InferenceSampler(len(dataset)),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            collate_fn=_readable,
        ))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        try:
            from faster_coco_eval import COCOeval_faster
            coco_evaluation.COCOeval_opt = COCOeval_faster
        except ImportError:
            _LOGGER.warning('faster-coco-eval is not installed: COCO metrics come from pycocotools, ten times slower.')
        evaluator = COCOEvaluator(dataset_name, tasks=('bbox',), output_dir=os.path.join(cfg.OUTPUT_DIR, 'inference'))
        if any('area' not in annotation for annotation in evaluator._coco_api.anns.values()):
            raise InputError(f"'{evaluator._metadata.json_file}' has annotations without area, which COCO's metrics "
                             'for small, medium and large objects need.')
        return evaluator


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


class NonEmpty:
    """A loader without the batches that hold no readable image."""

    def __init__(self, loader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        return (batch for batch in self.loader if batch)


def distribute(model: nn.Module, find_unused_parameters: bool = False) -> nn.Module:
    """DDP where there are several ranks. detectron2 always names a CUDA device, which CPU ranks do not have."""
    if comm.get_world_size() == 1:
        return model
    return create_ddp_model(
        model,
        device_ids=[comm.get_local_rank()] if next(model.parameters()).is_cuda else None,
        broadcast_buffers=False,
        find_unused_parameters=find_unused_parameters,
    )


@exit_on_input_error
def main(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    """The command line of `run`, which it returns the metrics of."""
    return run(argv)


def run(argv: Optional[List[str]] = None) -> Dict[str, Any]:
    """Train or evaluate as the words of a command line say; see `--help`.

    Returns:
        COCO metrics of the last evaluation, `{'bbox': {'AP': ..., 'AP50': ..., ...}}` in percent; one such entry a test
        set where there are several. Also in OUTPUT_DIR/results.json.

    Raises:
        InputError: Something that was given cannot be used, or the training diverged.
    """
    parser = _parser()
    args = parser.parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    cfg = _config(args)
    processes = max(args.num_gpus, args.num_processes)
    _check_processes(cfg, args, processes)
    if processes * args.num_machines == 1:
        return work(args)
    if cfg.MODEL.DEVICE == 'cpu':
        os.environ['CUDA_VISIBLE_DEVICES'] = ''  # else detectron2 chooses NCCL
    sentences = multiprocessing.get_context('spawn').SimpleQueue()
    address = args.dist_url or ('auto' if args.num_machines == 1 else None)
    try:
        launch(_rank, processes, args.num_machines, args.machine_rank, address, args=(args, processes, sentences))
    except (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException):
        if sentences.empty():
            raise
        raise InputError(sentences.get()) from None
    results = Path(cfg.OUTPUT_DIR) / 'results.json'
    return json.loads(results.read_text())['metrics'] if results.exists() else {}


def work(args: argparse.Namespace) -> Dict[str, Any]:
    """What one process does: everything, or its share of it."""
    cfg = _config(args)
    cfg.freeze()
    _forget_loggers()
    warnings.filterwarnings('ignore', message='torch.meshgrid')  # detectron2's, once a process
    try:
        default_setup(cfg, args)
        setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name='moe_zoo')
    except OSError as error:
        raise InputError(f"OUTPUT_DIR '{cfg.OUTPUT_DIR}' cannot be written: {error.strerror or error}.") from error
    # A user's mistake is told in one sentence at the end; detectron2 would print its traceback before.
    logging.getLogger('detectron2.engine.train_loop').addFilter(_no_traceback)
    if comm.is_main_process():
        for stale in (_unreadable(cfg), Path(cfg.OUTPUT_DIR) / 'results.json'):
            stale.unlink(missing_ok=True)
    comm.synchronize()
    try:
        results = _evaluate(cfg, args.resume) if args.eval_only else _train(cfg, args.resume)
    except FloatingPointError as error:
        raise InputError(_divergence(cfg, error)) from error
    except CheckpointError as error:
        raise InputError('Gradient checkpointing recomputed a routed layer without the true image sizes: checkpoint '
                         'through moe_zoo.routing.checkpoint_routed, which keeps them.') from error
    except ValueError as error:
        raise _from_worker(error) from error
    if comm.is_main_process():
        _report(cfg, results)
    return results


def _train(cfg: CfgNode, resume: bool) -> Dict[str, Any]:
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer._last_eval_results


def _evaluate(cfg: CfgNode, resume: bool) -> Dict[str, Any]:
    model = Trainer.build_model(cfg)
    checkpointer = SafeCheckpointer(model, save_dir=cfg.OUTPUT_DIR, complete=True)
    if not cfg.MODEL.WEIGHTS and not (resume and checkpointer.has_checkpoint()):
        _LOGGER.warning('MODEL.WEIGHTS is empty: an untrained detector is evaluated.')
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    return Trainer.test(cfg, model)


def _rank(args: argparse.Namespace, processes: int, sentences) -> None:
    """One of several processes; a user's mistake travels to the parent, which prints it once."""
    if not torch.cuda.is_available() and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    try:
        work(args)
    except InputError as error:
        sentences.put(str(error))
        sys.stdout.flush()
        os._exit(2)  # at once: the other ranks may wait for this one inside a collective operation


def _config(args: argparse.Namespace) -> CfgNode:
    cfg = load_config(args.config_file, args.opts)
    if args.strict_data:
        cfg.MOE.DATA.STRICT = True
    if cfg.MODEL.DEVICE == 'cuda' and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = 'cpu'
    return cfg


def _check_processes(cfg: CfgNode, args: argparse.Namespace, processes: int) -> None:
    total = processes * args.num_machines
    if processes < 1:
        raise InputError(f'--num-gpus {args.num_gpus}: at least one process is needed.')
    if cfg.MODEL.DEVICE.startswith('cuda') and processes > torch.cuda.device_count():
        raise InputError(f'--num-gpus {processes}: this machine has {torch.cuda.device_count()}; for processes on the '
                         'CPU add MODEL.DEVICE cpu.')
    if not args.eval_only and cfg.SOLVER.IMS_PER_BATCH % (cfg.SOLVER.REFERENCE_WORLD_SIZE or total):
        raise InputError(f'SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} does not divide into {total} processes.')
    if cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE == 'cpu' and not args.eval_only:
        raise InputError('SOLVER.AMP.ENABLED True: mixed precision in detectron2 needs CUDA, and MODEL.DEVICE is cpu.')


def _report(cfg: CfgNode, results: Dict[str, Any]) -> None:
    """Write results.json, and say what was left out."""
    with atomic_write(Path(cfg.OUTPUT_DIR) / 'results.json') as part:
        part.write_text(json.dumps({'metrics': _plain(results), 'unit': 'percent'}, indent=1))
    skipped = skipped_images(_unreadable(cfg))
    if skipped:
        _LOGGER.warning(
            'Unreadable images skipped: %d (in an evaluation their objects count as missed), listed in %s, such as %s.',
            len(skipped), _unreadable(cfg), skipped[0])


def _plain(value: Any) -> Any:
    """JSON has no NaN: what could not be measured is null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    value = float(value)
    return value if math.isfinite(value) else None


def _divergence(cfg: CfgNode, error: FloatingPointError) -> str:
    mark = Path(cfg.OUTPUT_DIR) / 'last_checkpoint'
    kept = f"the last good checkpoint is '{mark.with_name(mark.read_text())}'" if mark.exists() \
        else 'no checkpoint was written before'
    return (f'Training stopped because the loss or a weight is NaN or infinite ({" ".join(str(error).split())[:300]}); '
            f'{kept}; lower SOLVER.BASE_LR or lengthen SOLVER.WARMUP_ITERS.')


def _from_worker(error: ValueError) -> ValueError:
    """An InputError that a loader's worker process raised arrives with its traceback as text."""
    text = str(error)
    if 'InputError: ' in text:
        return InputError(text.rsplit('InputError: ', 1)[1].strip())
    if 'larger than population' in text.lower():
        return InputError('No image of the training set can be read; the log names them.')
    return error


def _no_traceback(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, ValueError):
        error = _from_worker(error)
    return not isinstance(error, (InputError, FloatingPointError, CheckpointError))


def _forget_loggers() -> None:
    """A second run in one process writes to its own stdout and log file, not to those of the first as well."""
    setup_logger.cache_clear()
    for name in ('detectron2', 'fvcore', 'moe_zoo'):
        logging.getLogger(name).handlers.clear()


def _training_set(cfg: CfgNode) -> List[Dict[str, Any]]:
    return load_datasets(
        cfg.DATASETS.TRAIN, cfg.MODEL.RETINANET.NUM_CLASSES, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)


def _readable(batch: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    return [image for image in batch if image]


def _unreadable(cfg: CfgNode) -> Path:
    return Path(cfg.OUTPUT_DIR) / 'unreadable_images.txt'


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description='Train or evaluate a detector from a detectron2 yaml config.',
        epilog='KEY VALUE pairs change the config, as in SOLVER.BASE_LR 0.005 MOE.RES5.NUM_EXPERTS 8. Data: '
               'DETECTRON2_DATASETS as in detectron2, or MOE.DATA.ROOT DIR (annotations/instances_{train,val}.json, '
               'train/, val/), or MOE.DATA.{TRAIN,TEST}_{JSON,IMAGES}.')
    parser.add_argument('--config-file', required=True, metavar='FILE', help='detectron2 yaml (configs/coco/*.yaml)')
    parser.add_argument('--eval-only', action='store_true', help='evaluate MODEL.WEIGHTS on DATASETS.TEST')
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
