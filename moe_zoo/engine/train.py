"""Train a classification model from a recipe: `tools/train_imagenet.py`, `moe-zoo train-imagenet`.

One loop on timm's parts. What it adds to timm's train.py: auxiliary losses and expert balance in every log, resuming
that repeats the uninterrupted run exactly on CPU, and a dense twin trained on the same batches.
"""
import argparse
import contextlib
import math
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NoReturn, Optional, Sequence, Union

import torch
import torch.distributed as dist
import yaml
from timm import utils
from timm.data import resolve_data_config
from timm.models import safe_model_name
from timm.utils import dispatch_clip_grad, unwrap_model

from ..checkpoints.optimizer_state import refuse_odd_options
from ..data.random_state import get_random_state, iterate_apart, seed_stream, set_random_state
from ..errors import InputError, atomic_write, counted, exit_on_input_error
from ..faults import Leave, Leaving, leave, listening, locked, one_sentence
from ..layers import ChannelGate, RoutedLayer, ShallowEmbedding
from . import parallel
from .build import (
    build_model,
    build_optimizer,
    build_schedule,
    create_on_meta,
    criterion_kwargs,
    mixed_precision,
    open_device,
    prepare_model,
)
from .checkpoint import (
    LAST_EPOCH,
    AtomicCheckpointSaver,
    check_fits,
    find_weights,
    read_checkpoint,
    tensors_of_run,
)
from .config import OPTIONS, load_config, options_help, parse_command_line
from .consistency import RouteConsistencyTask, check_routes
from .data import class_list, class_names, create_loaders, open_datasets
from .evaluate import data_name, evaluate_loader, report_corrupt
from .log import BalanceWatch, Clock, EpochLog, Reporter, describe_balance, describe_live, describe_losses, track
from .outcomes import FILE, OutcomeLog
from .task import MoEClassificationTask

NEVER = torch.iinfo(torch.int64).max


class Trainer:
    """One run: everything that a recipe names, built, and the loop over it.

    Args:
        args: Options, see `moe_zoo.engine.config`; completed in place (classes, learning rate, ranks).
        reporter: Where the run is told.
        strict_data: Refuse unreadable images instead of skipping them.

    Raises:
        InputError: Something that was given cannot be used.
    """

    def __init__(self, args: argparse.Namespace, reporter: Reporter, strict_data: bool = False):
        self.args, self.reporter = args, reporter
        self.device = open_device(args)
        reporter.primary = utils.is_primary(args)
        utils.random_seed(args.seed, args.rank)
        self.train_set, self.eval_set = open_datasets(args, strict_data)
        model = build_model(args)
        self.data_config = resolve_data_config(vars(args), model=model)
        self.loaders = create_loaders(args, self.data_config, self.train_set, self.eval_set, self.device)
        model = prepare_model(args, model, self.device)
        self.spread = args.parallel == 'fsdp' or args.expert_parallel > 1  # processes hold parts of the model
        if self.spread:
            model = parallel.spread(args, model, self.device)
        if args.freeze_gates is not None and not hasattr(model, 'freeze_gates'):
            raise InputError(
                f'freeze_gates={args.freeze_gates}: {args.model!r} has no gates to freeze; leave the option out, or'
                ' train a DeepMoE model.')
        self.routed = any(isinstance(module, RoutedLayer) for module in model.modules())
        self.autocast, self.scaler = mixed_precision(args, self.device)
        self.optimizer = build_optimizer(args, model)
        self.task = self._create_task(model)
        if args.model_ema:
            cpu = 'cpu' if args.model_ema_force_cpu else None
            self.task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup, device=cpu)
        self.batches = len(self.loaders.train)
        self.updates = math.ceil(self.batches / args.grad_accum_steps)
        self.schedule, epochs = build_schedule(args, self.optimizer, self.updates)
        self.stop = min(epochs, args.stop_epoch or epochs)
        self.gates = {name for name, module in model.named_modules() if isinstance(module, ChannelGate)}
        embeddings = {name for name, module in model.named_modules() if isinstance(module, ShallowEmbedding)}
        # Channels that no image wants are the aim, and a class is no expert.
        self.watch = BalanceWatch(args.model, self.gates | embeddings)
        self.log = EpochLog()
        self.epoch = self.batch = 0  # where the next step belongs
        self.random: Optional[List[Dict[str, Any]]] = None  # states to continue an epoch with, by rank
        self.restored: Optional[Path] = None  # of the optimiser's state, until it has been used
        self.first_bad = torch.full((), NEVER, device=self.device)
        self.saver: Optional[AtomicCheckpointSaver] = None
        self.outcomes: Optional[OutcomeLog] = None  # of the last evaluation of the run

    def _create_task(self, model: torch.nn.Module) -> MoEClassificationTask:
        args, dtype = self.args, getattr(torch, self.args.model_dtype or 'float32')
        mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
        create = MoEClassificationTask
        if args.route_consistency:
            image = torch.zeros(1, *self.data_config['input_size'], device=self.device, dtype=dtype)
            check_routes(model, args.model, image)
            create = partial(RouteConsistencyTask, loss=args.route_consistency, weights=args.route_consistency_weight)
        return create(
            model, criterion_kwargs=criterion_kwargs(args, mixes), device=self.device, dtype=dtype, verbose=False,
            balance_over_ranks=args.balance_over_ranks)

    def resume(self, path: Path) -> None:
        """Continue where a checkpoint was written. Call before `start`.

        Raises:
            InputError: The file is not a checkpoint of a run of this model.
        """
        args, checkpoint = self.args, read_checkpoint(path)
        model = unwrap_model(self.task.trainable_module)
        weights = find_weights(checkpoint, path)
        check_fits(model, weights, path, args.model)
        if 'optimizer' not in checkpoint or 'epoch' not in checkpoint:
            raise InputError(f"'{path}' holds weights but no state of a run: use initial_checkpoint={path} instead.")
        try:
            self._restore(checkpoint, weights, path)
        except InputError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            raise InputError(_no_state(path, error)) from error
        if args.start_epoch is not None:
            self.epoch, self.batch = args.start_epoch, 0

    def _restore(self, checkpoint: Mapping[str, Any], weights: Mapping[str, torch.Tensor], path: Path) -> None:
        args = self.args
        self.task.load_checkpoint_state(weights)
        if args.model_ema:
            averaged = find_weights(checkpoint, path, use_ema='state_dict_ema' in checkpoint)
            self.task.load_checkpoint_state(averaged, ema=True)
        if not args.no_resume_opt:
            self._load_optimizer(checkpoint, path)
        run = checkpoint.get('moe_zoo') or {'epoch': checkpoint['epoch'] + 1, 'batch': 0}
        self.epoch, self.batch, self.random = run['epoch'], run['batch'], run.get('random')
        if not all(isinstance(number, int) and 0 <= number <= LAST_EPOCH for number in (self.epoch, self.batch)):
            raise TypeError(f'epoch {self.epoch!r}, batch {self.batch!r}')
        self.watch.seen = set(run.get('warned_of', ()))
        if self.batch and self.random is not None:
            if len(self.random) != args.world_size:
                raise InputError(
                    f"'{path}' was written inside an epoch by {len(self.random)} processes, and this is a run of"
                    f' {args.world_size}: use as many, or --resume with a checkpoint from the end of an epoch.')
            self.log.load_state_dict(run['logs'][args.rank])
            set_random_state(self.random[args.rank])  # again where the epoch goes on: what cannot be set is told here

    def _load_optimizer(self, checkpoint: Mapping[str, Any], path: Path) -> None:
        fresh, self.restored = self.optimizer.param_groups, path
        try:
            state = checkpoint['optimizer']
            self.optimizer.load_state_dict(
                parallel.spread_optimizer_state(self.optimizer, state) if self.spread else state)
            refuse_odd_options(fresh, self.optimizer.param_groups)
        except (ValueError, KeyError) as error:
            raise InputError(
                f"The optimiser state of '{path}' does not fit opt={self.args.opt}: {error};"
                ' no_resume_opt=true leaves it out.') from error
        if self.scaler is not None and self.scaler.state_dict_key in checkpoint:
            self.scaler.load_state_dict(checkpoint[self.scaler.state_dict_key])
        schedule = (checkpoint.get('moe_zoo') or {}).get('plateau')
        if schedule is not None and self.args.sched == 'plateau':
            self.schedule.lr_scheduler.load_state_dict(schedule)

    def start(self, folder: Path, resumed: Optional[Path] = None) -> None:
        """Wrap the model (compilation, DDP), open the logs, bring the schedule to where the run is."""
        args = self.args
        if args.torchcompile:
            if args.distributed and args.grad_checkpointing:
                torch._dynamo.config.optimize_ddp = False  # which cannot split a checkpointed graph; as timm does
            self.task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if args.distributed:
            self.task.prepare_distributed(device_ids=[self.device], broadcast_buffers=not args.no_ddp_bb)
        if self.schedule is not None and args.sched != 'plateau':
            if args.sched_on_updates:
                self.schedule.step_update(self.epoch * self.updates + self.batch // args.grad_accum_steps)
            else:
                self.schedule.step(self.epoch)
        self.folder, self.leaving = folder, Leaving()
        if not self.reporter.primary:
            return
        self.saver = AtomicCheckpointSaver(
            unwrap_model(self.task.trainable_module), self.optimizer, args=args, amp_scaler=self.scaler, task=self.task,
            checkpoint_dir=str(folder), recovery_dir=str(folder), decreasing=args.eval_metric == 'loss',
            max_history=args.checkpoint_hist, run_state=self._run_state)
        if resumed is not None and resumed.resolve().parent == folder.resolve():
            self.saver.continue_from(resumed)
            if resumed.name == 'last.pth.tar' and self.epoch in (args.save_epochs or ()):
                self.saver.save_milestone(self.epoch)
        with atomic_write(folder / 'args.yaml') as temporary:
            temporary.write_text(yaml.safe_dump({k: v for k, v in vars(args).items() if k in OPTIONS}))
        self.reporter.open(folder, self.epoch)

    def fit(self) -> None:
        """Train from the current epoch to the last, evaluating and saving after each.

        Raises:
            SystemExit: A scheduler asked a process of the run to leave, by a signal; the run was saved.
            KeyboardInterrupt: Ctrl-C did.
        """
        with self.leaving:
            try:
                self._fit()
            except Leave as request:
                self._save_and_leave(request)

    def _fit(self) -> None:
        args = self.args
        self.clock = Clock(self.stop * self.batches, self.epoch * self.batches + self.batch)
        self.optimizer.zero_grad(set_to_none=True)
        while self.epoch < self.stop:
            started = time.monotonic()
            self.train_epoch()
            losses, balance = self.log.means(), self.log.balance()
            rates = [group['lr'] for group in self.optimizer.param_groups]
            last = self.epoch + 1 == self.stop
            milestone = self.epoch + 1 in (args.save_epochs or ())
            metrics = self.evaluate(last) if last or milestone or (self.epoch + 1) % args.val_interval == 0 else {}
            self._check_worth_keeping(metrics)
            self._keep_outcomes()
            experts = {layer: measures for layer, measures in balance.items() if layer not in self.watch.spared}
            live = {layer: float(measures['live']) for layer, measures in balance.items() if layer in self.gates}
            row = {
                'epoch': self.epoch,
                **{f'train_{name}': value for name, value in losses.items()},
                **{f'eval_{name}': value for name, value in metrics.items()},
                'lr': sum(rates) / len(rates),
                **{f'balance_{layer}': float(measures['entropy']) for layer, measures in experts.items()},
                **{f'dropped_{layer}': float(measures['dropped']) for layer, measures in experts.items()},
                **{f'live_{layer}': share for layer, share in live.items()},
            }
            key = ('ema_' if f'ema_{args.eval_metric}' in metrics else '') + args.eval_metric
            metric = metrics.get(key, losses['loss'] if self.eval_set is None else None)
            self.epoch, self.batch, self.random = self.epoch + 1, 0, None
            self.log = EpochLog()
            if self.schedule is not None:
                self.schedule.step(self.epoch, metric)
            for message in self.watch.check(balance, self.routed, self.epoch):
                self.reporter.warn(message)
            row['seconds'] = time.monotonic() - started
            # Told before it is saved: what a killed run has told too early, a resumed one drops.
            self._tell(row, losses, metrics, experts)
            if live:
                self.reporter.say(f'  live channels  {describe_live(live)}')
            self._save(row, metric, milestone)
            if self.epoch < self.stop:
                self.leaving.check()

    def train_epoch(self) -> None:
        """One pass over the training data, or what is left of one."""
        args, loader, first = self.args, self.loaders.train, self.batch
        seed_stream(args.seed, self.epoch, args.rank)
        if first and self.random is not None:
            set_random_state(self.random[args.rank])
        for part in (self.train_set, getattr(loader, 'sampler', None)):
            if hasattr(part, 'set_epoch'):
                part.set_epoch(self.epoch)
        self._mixup_until(args.mixup_off_epoch)
        self._freeze_gates_from(args.freeze_gates)
        self.task.set_epoch(self.epoch)
        self.task.trainable_module.train()
        batches = iterate_apart(loader, args.seed, self.epoch, args.rank) if first < self.batches else ()
        title = f'epoch {self.epoch + 1}/{self.stop}'
        for index, (images, target) in enumerate(track(self.reporter, batches, self.batches, title)):
            if index < first:
                continue  # trained before the run was interrupted
            self.train_batch(index, images, target)
            self.batch = index + 1
            update = self.batch // args.grad_accum_steps
            if self.batch % args.grad_accum_steps == 0:
                tells = update % args.log_interval == 0
                saves = bool(args.recovery_interval) and update % args.recovery_interval == 0
                self._check_finite(tells or saves)
                if tells:
                    self._tell_progress(title, update)
                if saves:
                    self._save_recovery(index)
                self.leaving.check()
        self._check_finite(True)
        if hasattr(self.optimizer, 'sync_lookahead'):
            self.optimizer.sync_lookahead()
        self.log.reduce()

    def train_batch(self, index: int, images: torch.Tensor, target: torch.Tensor) -> None:
        """Forward, backward and, at the end of an accumulation, the update."""
        args, accumulate = self.args, self.args.grad_accum_steps
        whole = self.batches - self.batches % accumulate
        parts = accumulate if index < whole else self.batches % accumulate
        update = (index + 1) % accumulate == 0 or index + 1 == self.batches
        images, target = self._to_device(images, target)
        if self.loaders.mixup is not None:
            images, target = self.loaders.mixup(images, target)
        with contextlib.nullcontext() if update else self.task.no_sync():
            with self.autocast():
                result = self.task(images, target)
            self._notice_bad(result)
            # The auxiliary losses are inside: divided and scaled exactly as the task's loss.
            self._backward(result['loss'] / parts, update)
        self.log.add(result, len(images))
        if update:
            self.optimizer.zero_grad(set_to_none=True)
            number = self.epoch * self.updates + index // accumulate + 1
            self.task.update_ema(step=number)
            if self.schedule is not None:
                self.schedule.step_update(number)
            if args.synchronize_step and self.device.type == 'cuda':
                torch.cuda.synchronize()

    def _backward(self, loss: torch.Tensor, update: bool) -> None:
        args = self.args
        parameters = self.task.get_clip_parameters(exclude_head='agc' in args.clip_mode)
        create_graph = getattr(self.optimizer, 'is_second_order', False)
        if self.scaler is not None:
            self.scaler(loss, self.optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=parameters,
                        create_graph=create_graph, need_update=update)
            return
        loss.backward(create_graph=create_graph)
        if update:
            if args.clip_grad is not None and self.spread:
                parallel.clip_gradients(parameters, args.clip_grad)
            elif args.clip_grad is not None:
                dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
            self._update()

    def _update(self) -> None:
        """Raises: InputError: What was restored of the optimiser is nothing that it can go on from."""
        try:
            self.optimizer.step()
        except (LookupError, TypeError, AttributeError, ValueError, AssertionError) as error:
            if self.restored is None:
                raise
            raise InputError(_no_state(self.restored, error)) from error
        self.restored = None

    def _to_device(self, images: torch.Tensor, target: torch.Tensor) -> tuple:
        if not self.args.prefetcher:
            dtype = getattr(torch, self.args.model_dtype or 'float32')
            images, target = images.to(self.device, dtype), target.to(self.device)
        if self.args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, target

    def _mixup_until(self, epoch: int) -> None:
        if epoch and self.epoch >= epoch:
            for mixing in (self.loaders.train, self.loaders.mixup):
                if hasattr(mixing, 'mixup_enabled'):
                    mixing.mixup_enabled = False

    def _freeze_gates_from(self, epoch: Optional[int]) -> None:
        """Before the model trains on: a resumed run may have loaded frozen gates already."""
        if epoch is not None and self.epoch >= epoch:
            if not bool(unwrap_model(self.task.trainable_module).gates_frozen):
                self.reporter.say(f'epoch {self.epoch + 1}: embedding and gates are frozen, their losses are dropped')
                self.task.freeze_gates()

    def _notice_bad(self, result: Mapping[str, Any]) -> None:
        """Remember the first step whose loss is not finite, without waiting for the device."""
        step = torch.full_like(self.first_bad, self.epoch * self.batches + self.batch)
        never = torch.full_like(self.first_bad, NEVER)
        found = torch.where(torch.isfinite(result['loss'].detach()), never, step)
        self.first_bad = torch.minimum(self.first_bad, found)
        if self.device.type == 'cpu' and not self.args.distributed:
            self._check_finite(True)

    def _check_finite(self, now: bool) -> None:
        """Raises: InputError: A loss was not finite. Waits for the device, and for the other ranks."""
        if not now:
            return
        first = self.first_bad.clone()
        if self.args.distributed:
            dist.all_reduce(first, dist.ReduceOp.MIN)
        if int(first) != NEVER:
            self._stop('The loss is not finite (NaN or infinite) at', int(first))

    def _check_worth_keeping(self, metrics: Mapping[str, float]) -> None:
        """Raises: InputError: The last step of an epoch broke the weights, which no loss in training has shown yet."""
        model = unwrap_model(self.task.trainable_module)
        if not all(map(math.isfinite, metrics.values())) or not parallel.all_finite(model):
            self._stop(
                'The weights, or the loss in evaluation, are not finite (NaN or infinite) after',
                (self.epoch + 1) * self.batches - 1)

    def _stop(self, problem: str, step: int) -> None:
        epoch, batch = divmod(step, self.batches)
        kept = newest_checkpoint(self.folder)
        good = f"The last good checkpoint is '{kept}'" if kept else 'No checkpoint had been written yet'
        raise InputError(
            f'{problem} step {batch + 1} of {self.batches} in epoch {epoch + 1}; training stopped. {good};'
            ' lower lr, lengthen warmup_epochs or set clip_grad.')

    def evaluate(self, keep: bool = False) -> Dict[str, float]:
        """Metrics of the model and, with a prefix, of its moving average.

        Args:
            keep: Also collect what became of every image: of the average, where there is one.
        """
        args, metrics = self.args, {}
        if args.distributed and args.dist_bn:
            utils.distribute_bn(self.task.trainable_module, args.world_size, args.dist_bn == 'reduce')
        if self.loaders.eval is None:
            return metrics
        averaged = self.task.get_eval_model(ema=True) if args.model_ema and not args.model_ema_force_cpu else None
        for prefix, model in (('', self.task.get_eval_model()), ('ema_', averaged)):
            if model is not None:
                self.outcomes = OutcomeLog(args.rank, args.world_size) if keep else None
                found = evaluate_loader(model, self.loaders.eval, self.task.create_evaluator(), args, self.device,
                                        self.autocast, self.outcomes)
                metrics.update({prefix + name: value for name, value in found.items()})
        return metrics

    def _keep_outcomes(self) -> None:
        """Write what became of every image beside the run, once it is over."""
        if self.outcomes is None:
            return
        name = data_name(self.args, self.eval_set)
        found = self.outcomes.finish(
            self.eval_set, {'model': self.args.model, 'data': name, 'split': self.args.val_split})
        if self.reporter.primary:
            found.write(self.folder / FILE)

    def _run_state(self) -> Dict[str, Any]:
        """What a checkpoint adds to timm's: where the run is."""
        state = {'epoch': self.epoch, 'batch': self.batch, 'warned_of': sorted(self.watch.seen)}
        names = class_names(self.train_set)
        if names is not None:
            state['classes'] = class_list(names, self.args.num_classes)
        if self.batch:
            state.update(random=self.random, logs=self._logs)
        if self.args.sched == 'plateau':
            state['plateau'] = self.schedule.lr_scheduler.state_dict()
        return state

    def _save(self, row: Dict[str, Any], metric: Optional[float], milestone: bool) -> None:
        if self.saver is None:
            self._take_part_in_saving()
            return
        self.saver.save_checkpoint(row['epoch'], metric)
        if milestone:
            self.saver.save_milestone(row['epoch'] + 1)

    def _save_recovery(self, index: int) -> None:
        """A checkpoint inside an epoch, with the random states and sums of every rank."""
        self.random = _gather(get_random_state(), self.args)
        self._logs = _gather(self.log.state_dict(), self.args)
        if self.saver is not None:
            self.saver.save_recovery(self.epoch, index)
        else:
            self._take_part_in_saving()

    def _save_and_leave(self, request: Leave) -> NoReturn:
        """A checkpoint of where the run is, between two updates or in an evaluation, and the end of this process."""
        if self.batch:  # else it is that of the end of an epoch
            self._check_finite(True)
            self._save_recovery(self.batch - 1)
        self.reporter.say(
            f"{request}: left in epoch {self.epoch + 1} of {self.stop}, after {self.batch} of {self.batches} batches;"
            f" --resume goes on from '{newest_checkpoint(self.folder)}'")
        leave(request.number)

    def _take_part_in_saving(self) -> None:
        """On the other ranks: hand over what they hold, while the first one writes."""
        if self.spread:
            tensors_of_run(self.task, self.optimizer)

    def _tell_progress(self, title: str, update: int) -> None:
        left = self.clock.left(self.epoch * self.batches + self.batch)
        text = f'left {left}  {describe_losses(self.log.means())}'
        if self.reporter.bar is not None:
            self.reporter.bar.status(text)
        else:
            self.reporter.say(f'{title} [{update}/{self.updates}]  {text}')

    def _tell(self, row: Mapping[str, Any], losses: Mapping, metrics: Mapping, balance: Mapping) -> None:
        self.reporter.add_epoch(row, balance)
        shown = '  '.join(f'{name} {value:.4g}' for name, value in metrics.items())
        self.reporter.say(
            f'epoch {row["epoch"] + 1}/{self.stop}  {describe_losses(losses)}  | {shown}  |'
            f' {row["seconds"]:.1f} s, left {self.clock.left(self.epoch * self.batches)}')
        if balance:
            self.reporter.say(f'  balance (1 is even)  {describe_balance(balance)}')
        report_corrupt(self.reporter, self.train_set, self.eval_set)


def _no_state(path: Path, error: BaseException) -> str:
    return (f"'{path}' holds weights, but no state that a run can go on from ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}): use initial_checkpoint={path} instead.")


def _gather(value: Any, args: argparse.Namespace) -> List[Any]:
    if not args.distributed:
        return [value]
    values: List[Any] = [None] * args.world_size
    dist.all_gather_object(values, value)
    return values


def train(
        config: Union[str, Path, Mapping[str, Any]],
        overrides: Union[Sequence[str], Mapping[str, Any]] = (),
        *,
        output: Optional[Union[str, Path]] = None,
        resume: Optional[Union[str, Path]] = None,
        strict_data: bool = False,
        expect_routing: bool = True,
        quiet: bool = False,
        on_epoch: Optional[Callable[[Dict[str, Any]], None]] = None,
) -> Dict[str, Any]:
    """Train one model.

    Args:
        config: A recipe: a YAML file or its content, with timm's argument names.
        overrides: `key=value` strings or a mapping that win over it.
        output: Folder of the run; otherwise `output`/`experiment` of the recipe.
        resume: A checkpoint, or 'auto': the last one in the folder of the run, if there is one.
        strict_data: Refuse unreadable images.
        expect_routing: Warn where nothing routes; a dense twin does not.
        quiet: Print warnings only.
        on_epoch: Called with a row of numbers after every epoch.

    Returns:
        model, primary (whether this is the first rank), folder, checkpoint (last), best (by the metric), epochs,
        seconds of training and evaluation, history (rows of summary.csv), the final top1, top5 and loss,
        parameters, active_parameters, macs (at most, of one image), warnings and corrupt (paths of skipped images).

    Raises:
        InputError: Something that was given cannot be used, the loss is not finite, or the disk is full.
    """
    args = load_config(config, overrides)
    reporter = Reporter(quiet, on_epoch)
    trainer = Trainer(args, reporter, strict_data)
    if not expect_routing:
        trainer.watch.seen.add('')
    with listening(), contextlib.ExitStack() as held:
        folder, checkpoint = _folder_and_checkpoint(trainer, output, resume or args.resume or None, held)
        if checkpoint is not None:
            trainer.resume(checkpoint)
            reporter.say(f"continuing from '{checkpoint}' at epoch {trainer.epoch + 1} of {trainer.stop}")
        try:
            with one_sentence(lambda: _kept(folder), folder=folder):
                trainer.start(folder, checkpoint)
                _introduce(trainer)
                trainer.fit()
        finally:
            reporter.close()
        return _result(trainer)


def _kept(folder: Path) -> str:
    checkpoint = newest_checkpoint(folder)
    return f"--resume goes on from '{checkpoint}'" if checkpoint else 'no checkpoint had been written yet'


def _folder_and_checkpoint(trainer: Trainer, output: Any, resume: Any, held: contextlib.ExitStack):
    """Where the run writes, and what it continues (None: it starts anew). The first rank decides for all, and locks the
    folder until `held` is closed."""
    chosen: List[Any] = [None, None, None]
    if trainer.reporter.primary:
        try:
            chosen = list(_choose_folder(trainer.args, trainer.data_config['input_size'][-1], output, resume, held))
        except InputError as error:
            chosen[2] = str(error)
    if trainer.args.distributed:
        dist.broadcast_object_list(chosen)
    folder, checkpoint, problem = chosen
    if problem:
        raise InputError(problem)
    return folder, checkpoint


def _choose_folder(args: argparse.Namespace, size: int, output: Any, resume: Any, held: contextlib.ExitStack) -> tuple:
    """(folder, which is locked, checkpoint or None, sentence for the user where neither can be).

    Raises: InputError: The folder cannot be written to, another run writes to it, or there is no such checkpoint.
    """
    base, stem = Path(args.output or 'output/train'), f'{safe_model_name(args.model)}-{size}'
    named = Path(output) if output else base / args.experiment if args.experiment else None
    given = Path(resume) if resume and str(resume) != 'auto' else None
    if given is not None and not given.is_file():
        raise InputError(f"There is no checkpoint file '{given}'.")
    if named is None and given is not None:
        named = given.parent
    elif named is None and resume:
        newest = newest_checkpoint(*base.glob(f'*-{stem}'))
        named = newest.parent if newest else None
    folder = named or base / f'{datetime.now():%Y%m%d-%H%M%S}-{stem}'
    held.enter_context(locked(folder, 'name another experiment=NAME'))
    last = given or newest_checkpoint(folder)
    problem = None
    if last and not resume:
        problem = f"'{folder}' already holds a run: add --resume to continue it, or name another experiment=NAME."
    return folder, last, problem


def newest_checkpoint(*folders: Path) -> Optional[Path]:
    """Where the runs in these folders got to: the end of an epoch, or a recovery checkpoint inside one."""
    names = ('last.pth.tar', 'recovery-*.pth.tar')
    found = [path for folder in folders for name in names for path in folder.glob(name)]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _introduce(trainer: Trainer) -> None:
    args, model = trainer.args, unwrap_model(trainer.task.trainable_module)
    count = sum(p.numel() for p in model.parameters())
    size = 'x'.join(map(str, trainer.data_config['input_size']))
    layers = sum(isinstance(m, RoutedLayer) for m in model.modules())
    trainer.reporter.say(
        f'{args.model}: {count:,} parameters, {counted(layers, "routed layer")}, {counted(args.num_classes, "class")},'
        f' input {size}; {counted(len(trainer.train_set), "image")}, {counted(trainer.updates, "update")} an epoch,'
        f' {counted(args.world_size, "process")} on {trainer.device}; writing to {trainer.folder}')


def _result(trainer: Trainer) -> Dict[str, Any]:
    from ..analysis.cost import count
    args, rows = trainer.args, trainer.reporter.rows
    model = unwrap_model(trainer.task.trainable_module)
    image = torch.zeros(1, *trainer.data_config['input_size'], device=trainer.device, dtype=trainer.task.dtype)
    if trainer.spread:
        model, image = create_on_meta(args), image.to('meta')
    cost = count(model, image)
    final = next((row for row in reversed(rows) if 'eval_top1' in row), {})
    best = trainer.folder / 'model_best.pth.tar'
    last = trainer.folder / 'last.pth.tar'
    averaged = 'ema_' if 'eval_ema_top1' in final else ''
    return {
        'model': args.model,
        'primary': trainer.reporter.primary,
        'folder': str(trainer.folder),
        'checkpoint': str(last),
        'best': str(best if best.is_file() else last),
        'epochs': trainer.epoch,
        'seconds': sum(row['seconds'] for row in rows),
        'history': rows,
        **{name: final.get(f'eval_{averaged}{name}') for name in ('top1', 'top5', 'loss')},
        'parameters': cost.parameters,
        'active_parameters': cost.active_parameters,
        'macs': cost.macs_max,
        'warnings': trainer.reporter.warnings,
        'corrupt': report_corrupt(trainer.reporter, trainer.train_set, trainer.eval_set),
    }


def parser() -> argparse.ArgumentParser:
    """The command line; everything of a recipe is `key=value`."""
    result = argparse.ArgumentParser(
        description="Train a classification model from a YAML recipe with the argument names of timm's train.py.",
        epilog=f'Options, in the recipe or as key=value, with their defaults: {options_help()}. '
               'Several processes: torchrun --nproc_per_node=N tools/train_imagenet.py ...')
    result.add_argument('--config', '-c', metavar='FILE', help='recipe, for example configs/imagenet/vmoe_vit_s.yaml')
    result.add_argument('--data-dir', metavar='DIR', help='folder with a folder for each split')
    result.add_argument('--parallel', choices=('ddp', 'fsdp'),
                        help='several processes: each has the whole model (ddp, the default) or a part of it (fsdp)')
    result.add_argument('--expert-parallel', type=int, metavar='N',
                        help='spread the experts over N processes each; divides their number and that of the experts')
    result.add_argument('--per-image-groups', action='store_true', default=None,
                        help='routing groups of one image each: capacity then depends on no other image')
    result.add_argument('--route-consistency', metavar='jsd|prc',
                        help='train on two views of every image, at twice the compute, and pull the routes of their'
                             ' patches together')
    add_run_arguments(result)
    return result


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `run` reads, beside --config."""
    add = parser.add_argument
    add('--resume', nargs='?', const='auto', metavar='CHECKPOINT',
        help='continue from the last checkpoint of the run, or from this one')
    add('--strict-data', action='store_true', help='refuse corrupt images instead of skipping them')
    add('--twin', action='store_true',
        help='also train the dense twin on the same batches and print the paired difference')
    add('--seeds', nargs='+', metavar='N', help='one run for each seed; prints mean and deviation')
    add('options', nargs='*', metavar='key=value', help='options that win over the recipe')


@exit_on_input_error
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit code."""
    flags, overrides = parse_command_line(argv, parser())
    for name in ('route_consistency', 'per_image_groups', 'parallel', 'expert_parallel'):
        if getattr(flags, name) is not None:
            overrides[name] = getattr(flags, name)
    if not flags.config and 'model' not in overrides:
        raise InputError('Nothing to train: give --config FILE, or at least model=NAME.')
    return run(flags, overrides)


def run(flags: argparse.Namespace, overrides: Dict[str, Any]) -> int:
    """Train what the flags of a command line ask for: config, seeds, twin, resume, strict_data.

    Raises:
        InputError: Something that was given cannot be used.
    """
    from .compare import run_all
    try:
        seeds = None if flags.seeds is None else [int(seed) for seed in flags.seeds]
    except ValueError:
        raise InputError(f'--seeds {" ".join(flags.seeds)}: seeds are whole numbers.') from None
    try:
        with listening():
            run_all(flags.config or {}, overrides, seeds=seeds, twin=flags.twin, resume=flags.resume,
                    strict_data=flags.strict_data)
    except SystemExit:  # asked to leave, as all processes were
        _leave_group()
        raise
    _leave_group()
    return 0


def _leave_group() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


if __name__ == '__main__':
    raise SystemExit(main())
