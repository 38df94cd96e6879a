"""What may happen to a long run, and what is done about it: signals, a second run in its folder, processes that die.

A signal interrupts nothing. `listening` remembers it; a training loop asks `Leaving` where its state can be saved, and
raises `Leave`, saves, and ends by `leave`. Of several processes any one may have been told, and all leave at the same
step.
"""
import contextlib
import multiprocessing.util
import os
import re
import signal
import socket
import threading
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NoReturn, Optional, Tuple, Union

import torch
import torch.distributed as dist

from .errors import InputError, cannot_write, fcntl, make_folder, remove_leftovers, unwritten

# ---- signals

SIGNALS = tuple(getattr(signal, name) for name in ('SIGINT', 'SIGUSR1', 'SIGTERM') if hasattr(signal, name))
_listeners = 0  # blocks of `listening` that are open
_received = 0  # the signal that was received, SIGINT only where no other was; 0 for none
_active: Optional['Leaving'] = None


class Leave(BaseException):
    """A run was asked to leave and is to be saved first. No `Exception`: nothing that failed."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Lost(InputError):
    """Another process is gone that this one needs."""


@contextlib.contextmanager
def listening(told: Callable[[int], None] = lambda number: None) -> Iterator[None]:
    """Remember SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) inside, for `Leaving` to read; a second SIGINT ends the process.

    Worker processes that are forked inside never see these signals, which schedulers and terminals send to all
    processes of a group: their parent still needs them to come to a step that it can save.

    A rank that torchrun tells to end because the first one has refused something has nothing to add to its words.

    Args:
        told: Called with every signal.
    """
    global _listeners, _received
    if threading.current_thread() is not threading.main_thread():  # where Python handles no signals
        yield
        return

    def remember(number: int, frame: Any) -> None:
        global _received
        if number == signal.SIGINT and _received == signal.SIGINT:
            raise KeyboardInterrupt
        if not _received and not (dist.is_available() and dist.is_initialized() and dist.get_rank()):
            again = '; Ctrl-C again ends it at once' if number == signal.SIGINT else ''
            os.write(2, f'{signal.Signals(number).name}: the run is saved, then it ends{again}\n'.encode())
        _received = max(_received, number)
        told(number)

    before = {} if _listeners else {number: signal.signal(number, remember) for number in SIGNALS}
    _listeners += 1
    if before:
        multiprocessing.util.Finalize(None, _end_workers, exitpriority=10)
    try:
        yield
    except InputError as error:
        if before and _received and os.environ.get('LOCAL_RANK', '0') != '0' and not isinstance(error, Lost):
            raise SystemExit(2) from error
        raise
    finally:
        _listeners -= 1
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if before:
            _received = 0


def received() -> int:
    """The signal that this process was told of, or 0."""
    return _received


def leave(number: int) -> NoReturn:
    """End the process: as done (exit code 0) after a scheduler's signal, as interrupted (130) after Ctrl-C."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(0)


class Leaving:
    """Tells all processes of a run of a signal that one of them received; used as a context, the one that
    `interruptible` asks.

    All processes ask equally often. Each tells the others what it knows and reads what they told at the question
    before, so that nobody waits: an answer is one question late, and the same everywhere.
    """

    def __init__(self):
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        # A group of its own on the CPU: flags neither wait for the GPU nor come between gradients.
        self.group = dist.new_group(backend='gloo') if several else None
        self.told: Optional[Tuple[Any, torch.Tensor]] = None

    def __enter__(self) -> 'Leaving':
        global _active
        _active = self
        return self

    def __exit__(self, *error) -> None:
        global _active
        _active = None

    def check(self) -> None:
        """Raises: Leave: A process of the run was asked to leave."""
        number = self._asked()
        if number:
            raise Leave(number)

    def _asked(self) -> int:
        if self.group is None:
            return _received
        before, flag = self.told, torch.tensor(_received)
        self.told = dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group, async_op=True), flag
        if before is None:
            return 0
        work, flag = before
        work.wait()
        return int(flag)


def interruptible(batches: Iterable, checks: Optional[int] = None) -> Iterator:
    """Iterate, asking the run that this belongs to, if any, after every batch whether it is to leave.

    Args:
        checks: After how many batches, which is equal on all processes; None is after each.
    """
    for number, batch in enumerate(batches):
        yield batch
        if _active is not None and (checks is None or number < checks):
            _active.check()


def _shut_ears() -> None:
    if _listeners:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _end_workers() -> None:
    """When a process ends; multiprocessing would end them by SIGTERM, which they do not see, and wait."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_shut_ears)


# ---- a second run

@contextlib.contextmanager
def locked(folder: Union[str, os.PathLike], instead: str) -> Iterator[None]:
    """Hold the folder of a run, which is made, for this process alone: until the block ends, or the process does.

    The kernel releases the lock however a process ends. It is POSIX's, which worker processes do not inherit: none of
    them can hold it longer. Over NFS it holds between machines where the server locks; where a file system knows no
    locks, a warning says so. What a killed process left half-written in the folder is removed.

    Args:
        folder: Of the run.
        instead: What else the user can do, behind 'wait for it, end it, or'.

    Raises:
        InputError: Another process holds it, or it cannot be made.
    """
    folder = Path(folder)
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    handle = _lock(folder / 'run.lock', instead) if fcntl else None
    try:
        remove_leftovers(folder)
        yield
    finally:
        if handle is not None:
            (folder / 'run.lock').unlink(missing_ok=True)  # still held: nobody can have taken it meanwhile
            os.close(handle)
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()  # where nothing was written


def _lock(path: Path, instead: str) -> Optional[int]:
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(cannot_write(path.parent, error.errno)) from error
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = os.read(handle, 200).decode(errors='replace').strip() or 'another process'
            os.close(handle)
            raise InputError(
                f"'{path.parent}' is being written to by a run that is not over ({holder}): wait for it, end it, or"
                f' {instead}.') from None
        except OSError as error:
            os.close(handle)
            warnings.warn(f"'{path.parent}' cannot be locked ({error.strerror}): start no second run in it.")
            return None
        if path.exists() and os.path.samestat(os.fstat(handle), os.stat(path)):
            break
        os.close(handle)  # the run that held it has just ended, and its file is gone
    os.ftruncate(handle, 0)
    since = time.strftime('%Y-%m-%d %H:%M')
    os.write(handle, f'process {os.getpid()} on {socket.gethostname()} since {since}'.encode())
    return handle


# ---- processes that die

# What torch says of connections to a process that is gone (gloo, NCCL, the store).
_LOST = re.compile(
    r'gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|timed? ?out|Socket|TCPStore', re.I)
_WORKER = re.compile(r'DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\)(?: is killed by signal: (\w[\w ]*))?')


def what_died(error: BaseException) -> Optional[str]:
    """A sentence, where torch's error means that a worker process or another process of the run is gone."""
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    worker = _WORKER.search(text)
    if worker:
        how = f'was killed ({worker[2].strip()})' if worker[2] else 'ended'
        return (f'A process that reads images {how}, PID {worker[1].strip()}, most often because memory, or shared'
                ' memory, ran out: read with fewer workers or smaller batches')
    if dist.is_available() and dist.is_initialized() and (isinstance(error, dist.DistError) or _LOST.search(text)):
        return 'Another process of this run is gone, or does not answer: its own words, if it had any, say why'
    return None


@contextlib.contextmanager
def one_sentence(
        kept: Callable[[], str],
        kind: type = Lost,
        folder: Union[str, os.PathLike] = '',
) -> Iterator[None]:
    """Turn what Python and torch raise when another process has died, or when a log cannot be written, into a sentence.

    Args:
        kept: What is left of the run, as the end of the sentence.
        kind: Of the error.
        folder: Where the logs are.

    Raises:
        InputError: Another process died, or the disk is full or broken.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        died, disk = what_died(error), unwritten(error, folder)
        if not (died or disk):
            raise
        raise kind(f'{died}; {kept()}.' if died else disk) from error
