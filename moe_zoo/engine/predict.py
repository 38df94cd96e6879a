"""What a trained classifier sees in single images, and which experts it asked: `moe-zoo predict RUN IMAGE...`.

    moe-zoo predict runs/digits photo.png other.jpg

Letters: E experts.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from PIL import Image

from ..analysis.expert_records import kind_of, numbered
from ..analysis.force import routed_layers
from ..analysis.usage import image_shares
from ..data.images import UnreadableImage
from ..data.images import read_image as decode
from ..errors import InputError, exit_on_input_error
from ..routing import Routing, trace_routing
from .inference import Classifier, open_classifier
from .train import newest_checkpoint

NAMED = 4  # experts of a layer that are printed
TOP = 5  # classes


def find_run(run: Path) -> Path:
    """The checkpoint that a run stands for: the file itself, or the best of a folder, else its last.

    Raises:
        InputError: There is none.
    """
    if run.is_file():
        return run
    best = run / 'model_best.pth.tar'
    found = best if best.is_file() else newest_checkpoint(run)
    if found is None:
        what = 'has no model_best.pth.tar or last.pth.tar' if run.is_dir() else 'is no folder and no checkpoint'
        raise InputError(f"The run '{run}' {what}: give a folder that train-imagenet wrote, or a checkpoint.")
    return found


def read_image(path: Path, mode: str = 'RGB') -> Image.Image:
    """An image file, decoded to its end, in a mode of Pillow's.

    Raises:
        InputError: It is missing, or no image.
    """
    if not path.exists():
        raise InputError(f"There is no image '{path}'.")
    try:
        return decode(path, mode)
    except UnreadableImage as error:
        raise InputError(f"The image '{path}' cannot be read: {error}.") from error


@torch.no_grad()
def predict(classifier: Classifier, image: Image.Image) -> Dict[str, Any]:
    """The likeliest classes of one image, and the experts that it was given to.

    Returns:
        classes: name and probability of the `TOP` likeliest, best first.
        layers: For every routed layer its name, kind, items (tokens, positions; 1 where the image is routed as a
            whole), weight (E shares of its combine weight) and first (E shares of the items for which an expert weighs
            most; None where the image is routed as a whole).
    """
    model = classifier.model
    layers = routed_layers(model, required=False)
    with classifier.autocast(), trace_routing(model) as trace:
        logits = model(classifier.normalise(classifier.pixels(image)[None]))
    chances = torch.softmax(logits[0].float(), dim=0).cpu()
    best = chances.argsort(descending=True, stable=True)[:TOP].tolist()
    return {
        'classes': [{'name': classifier.classes[y], 'probability': float(chances[y])} for y in best],
        'layers': [_layer(name, kind_of(layers[name.partition('#')[0]], routing), routing)
                   for name, routing in numbered(trace, layers) if routing.shape and routing.shape[0] == 1],
    }


def _layer(name: str, kind: str, routing: Routing) -> Dict[str, Any]:
    weights = routing.combine_matrix().float().cpu()
    first = None
    if len(weights) > 1:
        taken = weights[weights.sum(dim=1) > 0]
        first = (torch.bincount(taken.argmax(dim=1), minlength=weights.shape[1]) / len(weights)).tolist()
    return {'layer': name, 'kind': kind, 'items': len(weights), 'weight': image_shares(routing)[0].tolist(),
            'first': first}


def describe(found: Dict[str, Any]) -> List[str]:
    """One image as lines: classes, then one line a layer."""
    lines = [f'  {100 * row["probability"]:5.1f} %  {row["name"]}' for row in found['classes']]
    width = max((len(layer['layer']) for layer in found['layers']), default=0)
    for layer in found['layers']:
        shares = layer['first'] or layer['weight']
        ranked = sorted(range(len(shares)), key=lambda e: -shares[e])
        if layer['kind'] == 'channels':
            text = f'{sum(share > 0 for share in shares)} of {len(shares)} channels on'
        else:
            named = [f'{e} ({100 * shares[e]:.0f} %)' for e in ranked[:NAMED] if shares[e] > 0]
            rest = sum(shares[e] > 0 for e in ranked[NAMED:])
            text = f'{"experts" if len(named) > 1 else "expert"} {", ".join(named)}'
            text += f' and {rest} more' if rest else ''
            text += f' of {layer["items"]} items' if layer['first'] else ' of the weight'
        lines.append(f'  {layer["layer"]:<{width}}  {text}')
    return lines


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog=sys.argv[0],
        description='The five likeliest classes of images, and the experts that each was given to, layer by layer: '
                    'where a layer routes patches, the share of the patches in which an expert comes first, else its '
                    'share of the weight.',
        epilog='An image that cannot be read is reported and the others are still looked at; the exit code is then 2.')
    add = result.add_argument
    add('run', metavar='RUN', type=Path, help='folder of train-imagenet (its best checkpoint), or a checkpoint file')
    add('images', metavar='IMAGE', nargs='+', help='image files')
    add('--use-ema', action='store_true', help='take the averaged weights of the checkpoint')
    add('--per-image-groups', action='store_true',
        help='routing groups of one image each, also where the model was built with a group_size')
    add('--json', action='store_true', help='print everything as JSON: a list with one entry for each image')
    return result


@exit_on_input_error
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit code."""
    flags = parser().parse_args(argv)
    overrides = {'per_image_groups': True} if flags.per_image_groups else {}
    classifier, _ = open_classifier(
        find_run(flags.run), overrides=overrides, use_ema=flags.use_ema, with_data=False)
    results, failed = [], False
    for path in flags.images:
        try:
            found = {'image': path, **predict(classifier, read_image(Path(path), classifier.mode))}
        except InputError as error:
            print(f'error: {error}', file=sys.stderr)
            failed, found = True, {'image': path, 'error': str(error)}
        results.append(found)
        if not flags.json and 'error' not in found:
            print('\n'.join([path, *describe(found)]), flush=True)
    if flags.json:
        print(json.dumps(results, indent=1))
    return 2 if failed else 0


if __name__ == '__main__':
    raise SystemExit(main())
