"""Fine-tune a model on a folder of images, in one line: `moe-zoo finetune --model NAME --data-dir DIR`.

`train-imagenet` with a recipe that fits (configs/finetune/default.yaml): weights of the dense twin, upcycled while they
load; classes and their names from the folders, stored in the checkpoint; layer-wise learning rates.
"""
import argparse
from pathlib import Path
from typing import Optional, Sequence

from ..errors import InputError, exit_on_input_error
from .config import parse_command_line
from .train import add_run_arguments, run

RECIPE = 'configs/finetune/default.yaml'


def parser() -> argparse.ArgumentParser:
    """The command line; everything of a recipe is `key=value`."""
    result = argparse.ArgumentParser(
        description='Fine-tune a model on a folder of images: DIR/train and DIR/val with a folder for each class, or'
                    ' the folders of classes alone, of which a tenth is then held out by the seed.',
        epilog='Options are those of train-imagenet, for example epochs=5 batch_size=32 lr=1e-4 img_size=160. A model'
               ' of timm with routed layers of your choice: --model moefied'
               " model_kwargs.base=convnext_tiny.fb_in1k model_kwargs.targets='stages.2.*.mlp'"
               ' model_kwargs.layer=moe_mlp. What came out: moe-zoo predict RUN IMAGE...')
    result.add_argument('--model', metavar='NAME', required=True, help='model; `moe-zoo list` names them')
    result.add_argument('--data-dir', metavar='DIR', required=True, help='folder of images')
    result.add_argument('--from-dense', metavar='FILE', help='weights to begin with, of the dense twin or of the model,'
                                                             ' instead of those that pretrained=true would download')
    result.add_argument('--config', '-c', metavar='FILE', default=RECIPE, help=f'recipe (default: {RECIPE})')
    add_run_arguments(result)
    return result


@exit_on_input_error
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit code."""
    flags, overrides = parse_command_line(argv, parser())
    overrides['model'] = flags.model
    overrides.setdefault('output', 'output/finetune')
    if flags.from_dense:
        if not Path(flags.from_dense).is_file():
            raise InputError(f"--from-dense: there is no file '{flags.from_dense}'.")
        overrides['pretrained_path'] = flags.from_dense
    return run(flags, overrides)


if __name__ == '__main__':
    raise SystemExit(main())
