#!/usr/bin/env python
"""Kills processes of training, evaluation, conversion and report at random moments, and looks at what is left.

    tools/torture.py                       50 kills, and every other fault once; run it again to go on where it stopped
    tools/torture.py --publish             the same, and the table of docs/reliability.md

A kill is `kill -9` of a process and all that it started, half of them at any moment, half while a file is being
written. After each, everything that is visible must be whole, and no checkpoint may be lost; a training is then
continued, killed again, and so on until it comes to its end: with the weights, moments and logs of a run that nothing
happened to, to the last bit. Then come the faults that a run is to report in one sentence: full and read-only disks
(small ones of their own, for which Linux wants root), dead workers, dead ranks, NaN, and the signals of schedulers.

Processes are forked from one that has imported everything, which spares the imports and nothing else.
"""
import argparse
import csv
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault('OMP_NUM_THREADS', '1')

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors import safe_open  # noqa: E402

from moe_zoo.analysis.origin import short_commit, versions  # noqa: E402
from moe_zoo.analysis.timing import machine  # noqa: E402
from moe_zoo.card_writer import checkout, renew, with_block  # noqa: E402
from moe_zoo.engine.log import Reporter, track  # noqa: E402
from moe_zoo.engine.train import newest_checkpoint  # noqa: E402
from moe_zoo.errors import InputError, atomic_write, exit_on_input_error  # noqa: E402

PRELOAD = ['torch', 'moe_zoo.engine.train', 'moe_zoo.engine.evaluate_cli', 'moe_zoo.checkpoints.convert_cli',
           'moe_zoo.analysis.report_cli', 'moe_zoo.detection.train', 'torch.utils.tensorboard']
PATIENCE = 1800  # seconds that any one process is waited for
PAGE = Path('docs') / 'reliability.md'
MODEL = dict(patch_size=8, embed_dim=32, depth=2, num_heads=2, moe_layers=[1], num_experts=4, representation_size=0,
             proj_drop_rate=0.1)
RECIPE = dict(
    model='vmoe_vit_s', img_size=32, batch_size=8, workers=1, opt='adamw', lr=1e-2, epochs=4, warmup_epochs=0,
    device='cpu', reprob=0.3, checkpoint_hist=2, recovery_interval=3, save_epochs=[2], model_kwargs=MODEL)
DETECTOR = """
_BASE_: {base}
MODEL:
  DEVICE: cpu
  WEIGHTS: ""
  BACKBONE: {{NAME: build_timm_fpn_backbone, FREEZE_AT: 0}}
  FPN: {{OUT_CHANNELS: 8}}
  RETINANET: {{NUM_CLASSES: 5, NUM_CONVS: 1}}
MOE:
  TIMM: {{NAME: moe_resnet18, ARGS: {{channels: [8, 8, 8, 8]}}, CHECK_INPUT: false}}
  DATA: {{ROOT: {scenes}}}
DATALOADER: {{NUM_WORKERS: 1}}
SEED: 1
INPUT: {{MIN_SIZE_TRAIN: [64, 80], MIN_SIZE_TEST: 64}}
SOLVER: {{IMS_PER_BATCH: 2, BASE_LR: 0.001, MAX_ITER: 12, WARMUP_ITERS: 2, STEPS: [8], CHECKPOINT_PERIOD: 3}}
TEST: {{EVAL_PERIOD: 6}}
"""

# ---- processes


class Job(NamedTuple):
    """A command: its module, and its arguments for the folder that it is to write to."""
    module: str
    arguments: Callable[[Path], list[str]]


def start(job: Job, folder: Path, environment: Optional[dict[str, str]] = None, **more: Any):
    """Begin a job in a process group of its own; its output goes to a file beside the folder."""
    arguments = [*job.arguments(folder), *(f'{key}={value}' for key, value in more.items())]
    process = multiprocessing.get_context('forkserver').Process(
        target=_work, args=(job.module, arguments, str(log_of(folder)), environment or {}))
    process.start()
    return process


def _work(module: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    multiprocessing.set_start_method('fork', force=True)  # as everywhere; forkserver is that of this tool
    with open(log, 'wb', buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    code = sys.modules[module].main(arguments)
    sys.exit(code if isinstance(code, int) else 0)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


def end(process, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process and all that it started."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:  # it has no group yet
        os.kill(process.pid, number)


def wait(process) -> int:
    """The exit code; a process that does not end is a fault."""
    process.join(PATIENCE)
    if process.exitcode is None:
        end(process)
        process.join()
        raise RuntimeError(f'process {process.pid} did not end within {PATIENCE} s')
    return process.exitcode


def finish(job: Job, folder: Path, **more: Any) -> None:
    """A job from beginning to end.

    Raises:
        InputError: It failed, with what it said.
    """
    code = wait(start(job, folder, **more))
    if code:
        raise InputError(f"{job.module} ended with {code}, see '{log_of(folder)}': {said(folder)}")


def log_of(folder: Path) -> Path:
    return folder.parent.with_name(f'{folder.name}.log')  # which may be a disk that is full


def said(folder: Path) -> list[str]:
    """The sentences by which the last process ended."""
    lines = log_of(folder).read_text(errors='replace').splitlines()
    return [line for line in lines if line.startswith('error: ')]


# ---- what is whole


def problems_of(folder: Path) -> list[str]:
    """Everything visible in a folder that cannot be read to its end."""
    found = []
    for path in sorted(folder.rglob('*')):
        read = READERS.get(path.name.partition('.')[2])
        if path.is_file() and read and not path.name.startswith('.'):
            try:
                read(path)
            except Exception as error:  # of any kind, it is what is looked for
                found.append(f'{path.name} is damaged ({type(error).__name__}: {error})')
    return found


def _read_csv(path: Path) -> None:
    with open(path, newline='', encoding='utf-8') as file:
        rows = list(csv.reader(file))
    if len({len(row) for row in rows}) != 1:
        raise ValueError('rows of unequal length')


def _read_page(path: Path) -> None:
    if not path.read_text(encoding='utf-8').rstrip().endswith('</html>'):
        raise ValueError('the page does not end')


def _read_safetensors(path: Path) -> None:
    with safe_open(path, 'pt') as file:
        for name in file.keys():
            file.get_tensor(name)


def _load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


READERS: dict[str, Callable[[Path], Any]] = {
    'pth': _load, 'pth.tar': _load, 'safetensors': _read_safetensors, 'csv': _read_csv, 'html': _read_page,
    'json': lambda path: [json.loads(line) for line in path.read_text().splitlines()]
    if path.name == 'metrics.json' else json.loads(path.read_text()),
    'yaml': lambda path: yaml.safe_load(path.read_text())}


def leftovers(folder: Path) -> list[str]:
    return [f'{path.name} was left behind' for path in folder.rglob('.*')]


def writing(folder: Path) -> bool:
    """Whether a file of the folder is being written."""
    try:
        return any(entry.name.endswith('.part') for entry in os.scandir(folder))
    except FileNotFoundError:
        return False


# ---- trainings


class Training(NamedTuple):
    """How far a run is, and in what it differs from one that nothing happened to."""
    checkpoint: Callable[[Path], Optional[Path]]
    progress: Callable[[dict[str, Any]], Any]
    differences: Callable[[Path, Path], list[str]]


def _differ(one: Any, other: Any) -> bool:
    """Whether two states differ in any bit."""
    if isinstance(one, torch.Tensor):
        return not torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() != other.keys() or any(_differ(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) != len(other) or any(map(_differ, one, other))
    return one != other


def classifier_differences(folder: Path, whole: Path) -> list[str]:
    found, names = [], [{path.name for path in each.iterdir() if not re.match(r'recovery-|tensorboard|\.', path.name)}
                        for each in (folder, whole)]
    if names[0] != names[1]:
        found.append(f'other files: {sorted(names[0] ^ names[1])}')
    for name in sorted(names[0] & names[1]):
        if name.endswith('.pth.tar'):
            one, other = _load(folder / name), _load(whole / name)
            found += [f'{key} of {name} differs' for key in ('epoch', 'state_dict', 'optimizer')
                      if _differ(one[key], other[key])]
    rows = [[line.rpartition(',')[0] for line in (each / 'summary.csv').read_text().splitlines()]
            for each in (folder, whole)]
    return [*found, *leftovers(folder), *(['summary.csv differs'] if rows[0] != rows[1] else [])]


def last_of_detector(folder: Path) -> Optional[Path]:
    mark = folder / 'last_checkpoint'
    return folder / mark.read_text() if mark.exists() else None


def detector_differences(folder: Path, whole: Path) -> list[str]:
    one, other = _load(folder / 'model_final.pth'), _load(whole / 'model_final.pth')
    found = [f'{key} of model_final.pth differs' for key in ('model', 'iteration') if _differ(one[key], other[key])]
    state = [each['trainer']['_trainer']['optimizer']['state'] for each in (one, other)]
    metrics = [json.loads((each / 'results.json').read_text())['metrics'] for each in (folder, whole)]
    return [*found, *leftovers(folder), *(['the momentum differs'] if _differ(*state) else []),
            *(['results.json differs'] if metrics[0] != metrics[1] else [])]


TRAININGS = {
    'training': Training(newest_checkpoint, lambda state: (state['moe_zoo']['epoch'], state['moe_zoo']['batch']),
                         classifier_differences),
    'detector': Training(last_of_detector, lambda state: state['iteration'], detector_differences)}
SHARES = {'training': 15, 'detector': 15, 'evaluation': 6, 'conversion': 7, 'report': 7}  # of 50 kills


# ---- the run of this tool


class Torture:
    """All kills and faults, kept in OUTPUT/results.json as they come."""

    def __init__(self, output: Path, seed: int):
        self.output, self.seed = output, seed
        self.data = output / 'data'
        self.kept = output / 'results.json'
        self.results: dict[str, Any] = {'seed': seed, 'kills': [], 'ends': [], 'faults': [], 'seconds': {}}
        if self.kept.exists():
            self.results = json.loads(self.kept.read_text())
        self.jobs = {
            'training': Job('moe_zoo.engine.train', self._train),
            'detector': Job('moe_zoo.detection.train', self._detect),
            'evaluation': Job('moe_zoo.engine.evaluate_cli', self._evaluate),
            'conversion': Job('moe_zoo.checkpoints.convert_cli', self._convert),
            'report': Job('moe_zoo.analysis.report_cli', self._report)}

    # -- commands

    def _train(self, folder: Path) -> list[str]:
        return ['--config', str(self.data / 'recipe.yaml'), '--data-dir', str(self.data / 'images'), '--resume',
                f'output={folder.parent}', f'experiment={folder.name}']

    def _detect(self, folder: Path) -> list[str]:
        return ['--config-file', str(self.data / 'detector.yaml'), '--resume', 'OUTPUT_DIR', str(folder)]

    def _evaluate(self, folder: Path) -> list[str]:
        return ['--checkpoint', str(self.whole('training') / 'last.pth.tar'), '--no-time', '--json',
                str(folder / 'figures.json'), '--csv', str(folder / 'classes.csv'), '--outcomes',
                str(folder / 'outcomes.json'), '--data-dir', str(self.data / 'images'), 'workers=1']

    def _convert(self, folder: Path) -> list[str]:
        return ['upcycle', str(self.data / 'dense.pth'), str(folder / 'routed.safetensors'), '--model',
                'condconv_resnet18', '--model-kwargs', 'num_experts=2']

    def _report(self, folder: Path) -> list[str]:
        return [str(self.whole('training')), '--out', str(folder)]

    def whole(self, name: str) -> Path:
        """What a job leaves that nothing happens to."""
        return self.output / 'whole' / name

    def prepare(self) -> None:
        """Data, and a run of everything that nothing happens to, timed."""
        if not (self.data / 'dense.pth').exists():
            write_data(self.data)
        for name, job in self.jobs.items():
            folder = self.whole(name)
            if name not in self.results['seconds']:
                shutil.rmtree(folder, ignore_errors=True)
                folder.parent.mkdir(exist_ok=True)
                begun = time.monotonic()
                finish(job, folder)
                self.results['seconds'][name] = time.monotonic() - begun
                self.keep()

    def keep(self) -> None:
        with atomic_write(self.kept) as part:
            part.write_text(json.dumps(self.results, indent=1) + '\n')

    # -- kills

    def kills(self, number: int) -> Iterator[dict[str, Any]]:
        """Those that are left of so many."""
        for name, share in SHARES.items():
            done = [kill for kill in self.results['kills'] if kill['job'] == name]
            for index in range(len(done), max(1, round(number * share / sum(SHARES.values())))):
                found = self.kill(name, index)
                self.results['kills'].append(found)
                self.keep()
                yield found
            self._end_life(name)

    def kill(self, name: str, index: int) -> dict[str, Any]:
        """One kill: of a process that was started until it did not end before."""
        draw = random.Random(f'{self.seed} {name} {index}')
        folder, job = self._folder(name), self.jobs[name]
        aimed = bool(index % 2)
        if name == 'report':  # nothing is known that was measured before
            (self.whole('training') / 'last.pth.tar').touch()
        while True:
            before = self._progress(name, folder)
            process, begun = start(job, folder), time.monotonic()
            moment = draw.uniform(0.05, 1) * self.results['seconds'][name]
            while process.exitcode is None and (
                    time.monotonic() - begun < moment or aimed and not writing(folder)):
                time.sleep(0.0005)
            time.sleep(draw.uniform(0, draw.choice((0.004, 0.1))) if aimed else 0)
            if process.exitcode is None:
                break
            self._ended(name, folder, wait(process))
            folder = self._folder(name)
            self.results['seconds'][name] *= 0.8  # the machine is quicker than it was
        struck = writing(folder)
        end(process)
        wait(process)
        problems = problems_of(folder) if folder.exists() else []
        after = self._progress(name, folder)
        if before is not None and (after is None or after < before):
            problems.append(f'fell back from {before} to {after}')
        return {'job': name, 'seconds': round(time.monotonic() - begun, 2), 'while_writing': struck,
                'problems': problems, 'reached': after}

    def _folder(self, name: str) -> Path:
        """Where the life goes on that is being killed; output of the other commands, from before, lies there."""
        folder = self._life(name)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if name not in TRAININGS and not folder.exists():
            shutil.copytree(self.whole(name), folder)
        return folder

    def _life(self, name: str) -> Path:
        return self.output / 'lives' / f'{name}-{sum(each["job"] == name for each in self.results["ends"])}'

    def _progress(self, name: str, folder: Path) -> Any:
        path = TRAININGS[name].checkpoint(folder) if name in TRAININGS else None
        found = TRAININGS[name].progress(_load(path)) if path else None
        return list(found) if isinstance(found, tuple) else found

    def _ended(self, name: str, folder: Path, code: int) -> None:
        """A process came to its end before it was killed."""
        problems = [f'exit code {code}: {said(folder)}'] if code else []
        problems += problems_of(folder)
        if name in TRAININGS and not code:
            problems += TRAININGS[name].differences(folder, self.whole(name))
        elif not code:
            problems += leftovers(folder)
            problems += [f'{file} differs' for file in ('classes.csv', 'outcomes.json', 'routed.safetensors')
                         if (folder / file).exists() and
                         (folder / file).read_bytes() != (self.whole(name) / file).read_bytes()]
        self.results['ends'].append({'job': name, 'problems': problems})
        self.keep()
        if not problems:
            shutil.rmtree(folder)

    def _end_life(self, name: str) -> None:
        folder = self._life(name)
        if folder.exists():
            self._ended(name, folder, wait(start(self.jobs[name], folder)))

    # -- other faults

    def faults(self) -> Iterator[dict[str, Any]]:
        """Each once: what the process said and how it ended, and whether the resumed run is the whole one."""
        known = {each['fault'] for each in self.results['faults']}
        for name, job, strike, code in FAULTS:
            if name in known or strike in (full_disk, read_only) and os.geteuid():
                continue
            folder = self.output / 'faults' / 'disk' / re.sub(r'\W+', '-', name)
            unmount(folder.parent)
            shutil.rmtree(folder.parent, ignore_errors=True)
            folder.parent.mkdir(parents=True)
            found, problems, compared = strike(self, job, folder), [], False
            if found != code:
                problems.append(f'exit code {found}, not {code}')
            sentences = [line.removeprefix('error: ').replace(str(self.output), '...') for line in said(folder)]
            if code == 2 and (len(sentences) != 1 or 'Traceback' in log_of(folder).read_text()):
                problems.append(f'{len(sentences)} sentences, or a traceback')
            problems += problems_of(folder)
            if not problems and strike not in (ranks, not_a_number):  # whose runs have other gradients
                finish(self.jobs[job], folder)
                problems += TRAININGS[job].differences(folder, self.whole(job))
                compared = True
            unmount(folder.parent)
            self.results['faults'].append(
                {'fault': name, 'job': job, 'code': found, 'sentence': sentences[:1], 'compared': compared,
                 'problems': problems})
            self.keep()
            yield self.results['faults'][-1]


# ---- ways to go wrong


def mount(folder: Path, size: str, *options: str) -> None:
    """A disk of its own, or what is there with other options."""
    made = ['-t', 'tmpfs', 'tmpfs'] if not options else []
    command = ['mount', *made, '-o', ','.join((*options, f'size={size}')), str(folder)]
    for _ in range(50):  # for as long as a killed process still has a file open
        if subprocess.run(command, capture_output=True).returncode == 0:
            return
        time.sleep(0.2)
    subprocess.run(command, check=True)


def unmount(folder: Path) -> None:
    if os.path.ismount(folder):
        subprocess.run(['umount', '-l', str(folder)], check=True)


def full_disk(torture: Torture, job: str, folder: Path) -> int:
    """A disk that has room for what comes before the second checkpoint. Room is made afterwards."""
    mount(folder.parent, '1g')
    process = start(torture.jobs[job], folder)
    wait_until(lambda: torture._progress(job, folder) is not None, process)
    used = shutil.disk_usage(folder.parent).used
    mount(folder.parent, str(used // 1024 + 8) + 'k', 'remount')
    code = wait(process)
    mount(folder.parent, '1g', 'remount')
    return code


def read_only(torture: Torture, job: str, folder: Path) -> int:
    """A disk that turns read-only for a run that is continued."""
    mount(folder.parent, '1g')
    finish_some(torture, job, folder)
    mount(folder.parent, '1g', 'remount', 'ro')
    code = wait(start(torture.jobs[job], folder))
    mount(folder.parent, '1g', 'remount', 'rw')
    return code


def finish_some(torture: Torture, job: str, folder: Path) -> None:
    process = start(torture.jobs[job], folder)
    wait_until(lambda: torture._progress(job, folder) is not None, process)
    end(process)
    wait(process)


def wait_until(happened: Callable[[], bool], process) -> None:
    while process.exitcode is None and not happened():
        time.sleep(0.01)


def dead_worker(torture: Torture, job: str, folder: Path) -> int:
    """`kill -9` of the process that reads images, once there is a checkpoint."""
    process = start(torture.jobs[job], folder)
    wait_until(lambda: torture._progress(job, folder) is not None and children(process.pid), process)
    for pid in children(process.pid):
        os.kill(pid, signal.SIGKILL)
    return wait(process)


def children(pid: int) -> list[int]:
    try:
        return [int(text) for text in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]
    except FileNotFoundError:
        return []


def told(number: int, group: bool = False, aimed: bool = False) -> Callable[[Torture, str, Path], int]:
    """A signal at a moment of the second half: to the process or its group, at any time or into a file's writing."""
    def strike(torture: Torture, job: str, folder: Path) -> int:
        process = start(torture.jobs[job], folder)
        wait_until(lambda: torture._progress(job, folder) is not None and (not aimed or writing(folder)), process)
        if group:
            end(process, number)
        else:
            os.kill(process.pid, number)
        return wait(process)
    return strike


def not_a_number(torture: Torture, job: str, folder: Path) -> int:
    """The weights of a run are multiplied until the loss overflows; its own checkpoints are then continued."""
    finish_some(torture, job, folder)
    return wait(start(torture.jobs[job], folder, lr=1e30, opt='sgd', no_resume_opt='true', sched='constant'))


def ranks(torture: Torture, job: str, folder: Path) -> int:
    """Two ranks, as srun starts them, of which one is killed; the exit code of the other."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    common = dict(WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    other = folder.with_name('other')
    jobs = torture.jobs[job]
    both = [start(jobs._replace(arguments=lambda _: jobs.arguments(folder)), place,
                  dict(common, RANK=str(rank), LOCAL_RANK=str(rank))) for rank, place in enumerate((folder, other))]
    wait_until(lambda: torture._progress(job, folder) is not None, both[0])
    end(both[1])
    wait(both[1])
    return wait(both[0])


FAULTS: list[tuple[str, str, Callable[[Torture, str, Path], int], int]] = [
    ('SIGTERM', 'training', told(signal.SIGTERM), 0),
    ('SIGUSR1 to the workers too', 'training', told(signal.SIGUSR1, group=True), 0),
    ('SIGTERM to the workers too', 'training', told(signal.SIGTERM, group=True), 0),
    ('SIGTERM while a file is written', 'training', told(signal.SIGTERM, aimed=True), 0),
    ('Ctrl-C', 'training', told(signal.SIGINT, group=True), 130),
    ('SIGTERM, detector', 'detector', told(signal.SIGTERM), 0),
    ('SIGUSR1 while a file is written, detector', 'detector', told(signal.SIGUSR1, aimed=True), 0),
    ('Ctrl-C, detector', 'detector', told(signal.SIGINT, group=True), 130),
    ('full disk', 'training', full_disk, 2),
    ('full disk, detector', 'detector', full_disk, 2),
    ('read-only disk', 'training', read_only, 2),
    ('read-only disk, detector', 'detector', read_only, 2),
    ('killed worker', 'training', dead_worker, 2),
    ('killed worker, detector', 'detector', dead_worker, 2),
    ('killed rank', 'training', ranks, 2),
    ('loss that is no number', 'training', not_a_number, 2),
]


# ---- data, table


def write_data(folder: Path) -> None:
    """Two classes of noise, scenes of digits, a dense network, and the recipes."""
    import timm

    from moe_zoo.data.scenes import write_scenes
    from moe_zoo.resources import folder as resources
    noise = np.random.default_rng(0)
    for split, count in (('train', 24), ('validation', 8)):
        for level, name in ((60, 'dark'), (190, 'bright')):
            (folder / 'images' / split / name).mkdir(parents=True, exist_ok=True)
            for number in range(count):
                pixels = noise.integers(level - 50, level + 50, (40, 40, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / 'images' / split / name / f'{number:02d}.png')
    write_scenes(folder / 'scenes', train=8, val=4, image_size=160, classes=range(5), progress=False)
    base = resources('configs') / 'coco' / 'Base-RetinaNet.yaml'
    (folder / 'recipe.yaml').write_text(yaml.safe_dump(RECIPE))
    (folder / 'detector.yaml').write_text(DETECTOR.format(base=base, scenes=(folder / 'scenes').resolve()))
    with atomic_write(folder / 'dense.pth') as part:
        torch.save(timm.create_model('resnet18').state_dict(), part)


def table(results: dict[str, Any]) -> str:
    """What docs/reliability.md shows."""
    made_by = results['made_by']
    lines = ['| `kill -9` of | kills | while a file was written | damaged or lost | went on to the end | differ |',
             '| --- | ---: | ---: | ---: | ---: | ---: |']
    for name in SHARES:
        kills = [each for each in results['kills'] if each['job'] == name]
        ends = [each for each in results['ends'] if each['job'] == name]
        lines.append(
            f'| {name} | {len(kills)} | {sum(each["while_writing"] for each in kills)} |'
            f' {sum(bool(each["problems"]) for each in kills)} | {len(ends)} |'
            f' {sum(bool(each["problems"]) for each in ends)} |')
    kills = results['kills']
    lines += [
        f'| **all** | **{len(kills)}** | {sum(each["while_writing"] for each in kills)} |'
        f' **{sum(bool(each["problems"]) for each in kills)}** | {len(results["ends"])} |'
        f' **{sum(bool(each["problems"]) for each in results["ends"])}** |', '',
        '| fault | of | exit code | what it said | resumed |', '| --- | --- | ---: | --- | --- |']
    for each in results['faults']:
        problems = '; '.join(each['problems'])
        resumed = problems or ('to the last bit' if each['compared'] else 'readable')
        sentence = each['sentence'][0].replace('|', r'\|') if each['sentence'] else ''
        lines.append(f'| {each["fault"].partition(",")[0]} | {each["job"]} | {each["code"]} | {sentence} | {resumed} |')
    commit = short_commit(made_by['commit']) if made_by['commit'] else 'unknown'
    lines += ['', f'Seed {results["seed"]}, commit {commit}, torch {made_by["torch"]}, timm {made_by["timm"]},'
                  f' {made_by["date"]}, one process at a time on {made_by["machine"]}.']
    return '\n'.join(lines) + '\n'


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        description=__doc__.partition('\n')[0], formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='examples:\n  %(prog)s\n  %(prog)s --kills 500 --no-faults --output runs/long\n  %(prog)s --publish\n\n'
               'Exit code 1: something was damaged, lost, or differed.')
    add = result.add_argument
    add('--kills', metavar='N', type=int, default=50, help='in all, those of before included (%(default)s)')
    add('--seed', type=int, default=0, help='of the moments (%(default)s)')
    add('--no-faults', action='store_true', help='kills only')
    add('--output', metavar='DIR', type=Path, default=Path('runs/torture'), help='where it happens (%(default)s)')
    add('--publish', action='store_true', help='write the table into docs/reliability.md')
    add('--table', action='store_true', help='run nothing: print the table of what is in DIR')
    return result


@exit_on_input_error
def main(argv: Optional[list[str]] = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    torture = Torture(args.output.resolve(), args.seed)
    if args.table and not torture.kept.exists():
        raise InputError(f"'{args.output}' has no results: leave --table out.")
    if not args.table:
        run(torture, args.kills, not args.no_faults)
    print(table(torture.results), end='')
    if args.publish:
        renew(checkout() / PAGE, lambda text: with_block(text, 'torture', table(torture.results)))
    results = torture.results
    return int(any(each['problems'] for each in (*results['kills'], *results['ends'], *results['faults'])))


def run(torture: Torture, kills: int, faults: bool) -> None:
    multiprocessing.get_context('forkserver').set_forkserver_preload(PRELOAD)
    torture.results['made_by'] = versions() | {'machine': machine('cpu')['device'], 'date': time.strftime('%Y-%m-%d')}
    reporter = Reporter()
    reporter.say('data, and one run of everything that nothing happens to')
    torture.prepare()
    for title, found, total in (
            ('kills', torture.kills(kills), kills - len(torture.results['kills'])),
            ('faults', torture.faults() if faults else (), len(FAULTS) - len(torture.results['faults']))):
        _follow(reporter, title, found, max(1, total))


def _follow(reporter: Reporter, title: str, found: Iterable[dict[str, Any]], total: int) -> None:
    for number, each in enumerate(track(reporter, found, total, title), 1):
        what = each.get('fault') or f'{each["job"]}, {each["seconds"]} s'
        reporter.say(f'{title} {number}/{total}: {what}: {"; ".join(each["problems"]) or "sound"}')


if __name__ == '__main__':
    sys.exit(main())
