"""Run a script of timm or detectron2 unmodified, with what moe_zoo adds to both: `moe-zoo run SCRIPT ARGS...`.

    moe-zoo run train.py --data-dir DIR --model vmoe_vit_s                      # timm's, auxiliary losses included
    torchrun --nproc_per_node=8 -m moe_zoo.run train.py ...
    moe-zoo run tools/train_net.py --config-file configs/coco/retinanet_moe_res5_r50_fpn_1x.yaml

Models are registered with timm. `timm.task.ClassificationTask`, which timm's train.py trains with, is the one that adds
auxiliary losses; a script that trains a routed model without it is warned. timm's learning rate schedules tell the
model of such a task of epochs. A script that speaks of detectron2 finds our backbones, meta-architectures and config
keys, and may train several processes on the CPU (`moe_zoo.detection.upstream`). Processes that the script spawns
(`--num-gpus 2`) are prepared in the same way. Imports are absolute: spawned processes run this file by its path.
"""
import functools
import importlib.util
import os
import runpy
import sys
from multiprocessing import spawn
from pathlib import Path
from typing import Any, Dict, List, Optional

from torch import nn
from torch.multiprocessing import ProcessRaisedException

import moe_zoo  # noqa: F401 - registers the models
from moe_zoo.errors import InputError, exit_on_input_error
from moe_zoo.routing import Routing
from moe_zoo.routing.context import on_unheard

SCRIPT = 'MOE_ZOO_RUN_SCRIPT'  # environment variable that tells spawned processes what they are part of


@exit_on_input_error
def main(argv: Optional[List[str]] = None) -> int:
    """Run `SCRIPT ARGS...` as `python SCRIPT ARGS...` would.

    Raises:
        InputError: There is no such script, or a process that it spawned ended by one.
    """
    script, *arguments = (sys.argv[1:] if argv is None else argv) or ['--help']
    if script in ('-h', '--help'):
        print('usage: moe-zoo run SCRIPT ARGS...\n\n' + __doc__.strip())
        return 0
    path = Path(script).expanduser()
    if not path.is_file():
        raise InputError(
            f"There is no script '{script}': give the path of a Python file, for example train.py of timm's repository"
            ' (its package does not hold it).')
    os.environ[SCRIPT] = str(path.resolve())
    _prepare_children()
    sys.argv = [script, *arguments]
    try:
        enter(path, '__main__')
    except ProcessRaisedException as error:  # which holds the other process's traceback as text
        sentence = str(error).rpartition('InputError: ')[2].strip()
        raise (InputError(sentence) if '\n' not in sentence else error) from None
    return 0


def enter(script: Path, run_name: str) -> Dict[str, Any]:
    """Make moe_zoo known, run a script under a name, and return its globals."""
    use_routed_tasks()
    detection = 'detectron2' in script.read_text(encoding='utf-8') and bool(importlib.util.find_spec('detectron2'))
    on_unheard(functools.partial(_warn_of_own_loop, detection))
    if detection:
        from moe_zoo.detection import upstream
        upstream.prepare()
    sys.path.insert(0, str(script.resolve().parent))  # where Python puts the folder of a script
    return runpy.run_path(str(script), run_name=run_name)


def use_routed_tasks() -> None:
    """Put our tasks and telling schedules in the place of timm's, before a script imports them by name."""
    import timm.scheduler.scheduler_factory
    import timm.task.classification

    from moe_zoo.engine.epochs import create_telling_scheduler
    from moe_zoo.engine.task import MoEClassificationTask, MoEMultiLabelClassificationTask
    for module in (timm.task, timm.task.classification):
        module.ClassificationTask = MoEClassificationTask
        module.MultiLabelClassificationTask = MoEMultiLabelClassificationTask
    create_scheduler = create_telling_scheduler(timm.scheduler.create_scheduler_v2)
    for module in (timm.scheduler, timm.scheduler.scheduler_factory):
        module.create_scheduler_v2 = create_scheduler


def _warn_of_own_loop(detection: bool, layer: nn.Module, routing: Routing) -> None:
    """Tell what a script has to do that trains a routed model by a loop of its own."""
    if os.environ.get('RANK', '0') != '0':
        return
    problems = []
    if routing.losses:
        names = ', '.join(name for name, _ in routing.losses)
        remedy = 'set MODEL.META_ARCHITECTURE MoERetinaNet' if detection else \
            'build timm.task.ClassificationTask, or call model.set_aux_loss() and add moe_zoo.losses.auxiliary_losses'
        problems.append(f'auxiliary losses ({names}) are not added: {remedy}')
    wanted = [name for name in ('set_epoch', 'end_step') if any(hasattr(m, name) for m in layer.modules())]
    if wanted:
        problems.append(f'it must call moe_zoo.routing.{" and ".join(wanted)} itself')
    print(f'warning: {sys.argv[0]} trains {type(layer).__name__} by a loop of its own: {"; ".join(problems)}.',
          file=sys.stderr)


def _prepare_children() -> None:
    """Let spawned processes import this file as their main module; by themselves they would import the bare script."""
    original = spawn.get_preparation_data

    def get_preparation_data(name: str) -> Dict[str, Any]:
        data = original(name)
        data.pop('init_main_from_name', None)
        data['init_main_from_path'] = str(Path(__file__).resolve())
        return data

    spawn.get_preparation_data = get_preparation_data


if __name__ == '__main__':
    raise SystemExit(main())
if __name__ == '__mp_main__':
    globals().update(enter(Path(os.environ[SCRIPT]), '__mp_main__'))
