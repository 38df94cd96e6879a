"""Several gloo ranks for tests: one process that has imported everything, forked.

`run_ranks` starts `python rank_group.py WORLD FOLDER MODULE FUNCTION`, which calls `FUNCTION(rank, world, folder)` of a
test module in every rank. Forking spares the imports; a process of its own, because torch's autograd cannot be forked
once it ran. Nothing hangs: collectives give up after `PATIENCE` seconds, and the whole group is ended after `LIMIT`.
"""
import datetime
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

PATIENCE, LIMIT = 300, 1500


def run_ranks(world: int, folder: Path, function) -> str:
    """Run a function of a test module in `world` ranks; returns what they printed. Fails where a rank fails."""
    here = Path(__file__).resolve()
    command = [sys.executable, str(here), str(world), str(folder), function.__module__, function.__name__]
    path = os.pathsep.join((str(here.parent), str(here.parents[1]), os.environ.get('PYTHONPATH', '')))
    process = subprocess.Popen(
        command, env=dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=path), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        printed, _ = process.communicate(timeout=LIMIT)
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)  # ranks that outlive the first one, if any
        except ProcessLookupError:
            pass
    assert process.returncode == 0, printed
    return printed


def _rank(rank: int, world: int, folder: str, function) -> None:
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/rendezvous-{os.getppid()}', rank=rank, world_size=world,
        timeout=datetime.timedelta(seconds=PATIENCE))
    function(rank, world, Path(folder))
    dist.barrier()
    dist.destroy_process_group()


def main(world: str, folder: str, module: str, function: str) -> None:
    import torch.multiprocessing
    task = getattr(importlib.import_module(module), function)
    torch.multiprocessing.start_processes(
        _rank, (int(world), folder, task), nprocs=int(world), start_method='fork')


if __name__ == '__main__':
    main(*sys.argv[1:])
