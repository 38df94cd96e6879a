"""What the experts of a classifier do: `tools/analyze_experts.py`, `moe-zoo analyze-experts`.

    tools/analyze_experts.py --checkpoint runs/x/model_best.pth.tar --data-dir DIR

Numbers first (experts.json, all of them), then figures (PNG), then one page (index.html) that needs no network.
"""
import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import torch
from rich.console import Console
from rich.progress import Progress
from timm.models import safe_model_name

from .. import __version__
from ..analysis.expert_figures import write_figures
from ..analysis.expert_page import expert_page
from ..analysis.expert_records import locate
from ..analysis.expert_words import findings, report
from ..analysis.experts import analyze, spread
from ..analysis.page import Section, duration
from ..errors import InputError, atomic_write, counted, exit_on_input_error, nearest
from .analyze_routes import compare_routes, open_pair, routes_section
from .config import parse_command_line
from .inference import Classifier, Images, load_images, open_classifier


class Passes:
    """The same images again and again, each time with a bar that says what the pass is for."""

    def __init__(self, classifier: Classifier, images: Images, quiet: bool = False):
        self.classifier, self.images = classifier, images
        self.console = Console(stderr=True, highlight=False)
        self.quiet, self.hidden = quiet, quiet or not self.console.is_terminal
        self.done, self.total, self.start = 0, 1, time.monotonic()

    def expect(self, total: int) -> None:
        """Say what is to come, once the first pass is done."""
        self.total, seconds = total, time.monotonic() - self.start
        if not self.quiet:
            self.console.print(f'{counted(total, "pass")} over {counted(len(self.images.targets), "image")}, about '
                               f'{duration(seconds * total)} in all')

    def __call__(self, title: str) -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        size, self.done = self.classifier.args.validation_batch_size or self.classifier.args.batch_size, self.done + 1
        with Progress(console=self.console, transient=True, disable=self.hidden) as bar:
            task = bar.add_task(f'pass {self.done} of {self.total}: {title}', total=len(self.images.targets))
            for images, targets in self.images.batches(self.classifier, size):
                yield images, targets
                bar.advance(task, len(targets))


def analyze_classifier(
        classifier: Classifier,
        images: Images,
        classes: Sequence[int] = (),
        shown: int = 6,
        most_layers: int = 6,
        force: bool = True,
        quiet: bool = False,
) -> Dict[str, Any]:
    """Every number about the experts of a classifier on a set of images, for JSON.

    Args:
        classifier: From `open_classifier`.
        images: From `load_images`.
        classes: Classes to single out; none takes the first four that have images.
        shown: Images over which patches are drawn, where tokens or positions are routed.
        most_layers: Layers that are forced one by one, and drawn.
        force: Whether to make the passes with forced experts and other K.

    Returns:
        What `moe_zoo.analysis.experts.analyze` returns, and model, trained, classes, chosen_classes, files, corrupt,
        drawn_layers and places (see `locate`) of the images `shown`.
    """
    run = Passes(classifier, images, quiet)
    with classifier.autocast():
        result = analyze(classifier.model, run, len(classifier.classes), most_layers, force, run.expect)
        chosen = list(classes) or images.targets.unique()[:4].tolist()
        numbers = pick_images(images.targets, chosen if classes else images.targets.unique().tolist(), shown)
        places = []
        if numbers:
            places = locate(classifier.model, classifier.normalise(images.pixels[numbers]))
    if images.total is None or len(images.targets) + len(images.corrupt) < images.total:
        whole = 'the data set' if images.total is None else f'{images.total:,}'
        result['left_out'].append(
            f'{len(images.targets):,} of {whole} images were looked at, evenly over the data; --max-images takes more.')
    result = {
        'model': classifier.args.model, 'trained': classifier.trained, 'classes': classifier.classes,
        'chosen_classes': chosen, **result, 'files': images.files, 'corrupt': images.corrupt,
        'drawn_layers': spread([layer['layer'] for layer in result['layers']], most_layers),
        'shown': numbers if places else [], 'places': places,
    }
    return {'findings': findings(result), **result}


def pick_images(targets: torch.Tensor, classes: Sequence[int], count: int) -> List[int]:
    """The first image of each of some classes, then the second of each, until there are enough."""
    by_class = [(targets == y).nonzero().flatten().tolist() for y in classes]
    rounds = max(map(len, by_class), default=0)
    return [numbers[i] for i in range(rounds) for numbers in by_class if i < len(numbers)][:count]


def parse_classes(text: Optional[str], names: Sequence[str]) -> List[int]:
    """`cat,dog` or `3,5` to class numbers.

    Raises:
        InputError: A class is unknown.
    """
    found = []
    for word in filter(None, map(str.strip, (text or '').split(','))):
        if word in names:
            found.append(list(names).index(word))
        elif word.isdecimal() and int(word) < len(names):
            found.append(int(word))
        else:
            raise InputError(
                f'--classes {word!r} is no class of this model.{nearest(word, names)} Give names or numbers from 0 to '
                f'{len(names) - 1}, joined by commas.')
    return list(dict.fromkeys(found))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog=sys.argv[0],
        description='What the experts of a classifier do: who is used and how evenly, for which classes and images, '
                    'where in an image, and what accuracy would be with one expert forced or with more or fewer of '
                    'them. Writes experts.json, figures and index.html, a page for readers who did not train the '
                    'model.',
        epilog='Options of the recipe may follow as key=value, for example val_split=test batch_size=64 device=cpu. '
               'Every forced expert takes a pass over the images: --max-images, --layers and --no-force bound the '
               'time.')
    add = result.add_argument
    add('--checkpoint', metavar='FILE', help='weights of train-imagenet, which know their model, data and classes')
    add('--model', metavar='NAME', help='a model without a checkpoint: pretrained=true, or random weights, to see what '
                                        'an untrained router does')
    add('--config', '-c', metavar='FILE', help='recipe; by default that of the checkpoint')
    add('--data-dir', metavar='DIR', help='folder with a folder for the split, or of class folders; by default the '
                                          'data of the recipe')
    add('--use-ema', action='store_true', help='take the averaged weights of the checkpoint')
    add('--strict-data', action='store_true', help='refuse corrupt images instead of skipping them')
    add('--per-image-groups', action='store_true',
        help='routing groups of one image each: where capacity drops tokens, nothing then depends on the batch')
    add('--out', metavar='DIR', type=Path, help='folder of the results (default: runs/analyze/NAME)')
    add('--classes', metavar='A,B', help='classes to single out in the gates and images (default: the first four)')
    add('--images', metavar='N', type=int, default=6, help='images over which patches are drawn (default: 6)')
    add('--max-images', metavar='N', type=int, default=1000, help='images to look at (default: 1000)')
    add('--layers', metavar='N', type=int, default=6,
        help='layers that are drawn, and forced one by one; evenly over the depth (default: 6)')
    add('--no-force', action='store_true', help='leave out the passes with forced experts and with other K')
    add('--consistency', action='store_true',
        help='also measure how often patches get other experts when the image is cropped, flipped or noised')
    add('--before', metavar='FILE', help='a checkpoint to set beside it in --consistency, or "untrained"')
    add('--no-figures', action='store_true', help='write no PNG files')
    add('--json', action='store_true', help='print the JSON instead of the findings')
    add('options', nargs='*', metavar='key=value', help='options that win over the recipe')
    return result


def _check(flags: argparse.Namespace) -> None:
    if not flags.checkpoint and not flags.model and not flags.config:
        raise InputError('Nothing to analyse: give --checkpoint FILE, or --model NAME.')
    for name, least in (('images', 0), ('max_images', 2), ('layers', 1)):
        if getattr(flags, name) < least:
            raise InputError(f'--{name.replace("_", "-")} {getattr(flags, name)}: give at least {least}.')


@exit_on_input_error
def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; returns the exit code."""
    flags, overrides = parse_command_line(argv, parser())
    _check(flags)
    if flags.model:
        overrides['model'] = flags.model
    if flags.per_image_groups:
        overrides['per_image_groups'] = True
    classifier, dataset = open_classifier(
        flags.checkpoint, flags.config, overrides, flags.use_ema, strict_data=flags.strict_data)
    classes = parse_classes(flags.classes, classifier.classes)
    if not classifier.trained:
        print('warning: UNTRAINED: these weights are random, so that nothing below was learned.', file=sys.stderr)
    images = load_images(classifier, dataset, flags.max_images)
    for file in images.corrupt:
        print(f"warning: skipped corrupt image '{file}'", file=sys.stderr)
    routes = None
    if flags.consistency or flags.before:  # first: a model without patches is refused before the long passes
        named = open_pair(classifier, flags.checkpoint, flags.before, flags.config, overrides)
        numbers = pick_images(images.targets, classes or images.targets.unique().tolist(), flags.images)
        routes = compare_routes(named, images, numbers)
    result = analyze_classifier(
        classifier, images, classes, flags.images, flags.layers, not flags.no_force)
    if routes is not None:
        result['consistency'] = routes
        result['findings'] = findings(result)
    out = flags.out or Path('runs/analyze') / _name(flags)
    text = json.dumps(result)
    with atomic_write(out / 'experts.json') as part:
        part.write_text(text, encoding='utf-8')
    further = [] if routes is None else [_routes_section(routes, images, None if flags.no_figures else out)]
    expert_page(result, images.pixels, _facts(flags, classifier, images), further).write(out / 'index.html')
    if not flags.no_figures:
        try:
            write_figures(result, images.pixels, out)
        except InputError as error:
            print(f'warning: {error}', file=sys.stderr)
    print(text if flags.json else '\n'.join(report(result)))
    print(f'written: {out / "index.html"} and what it rests on', file=sys.stderr)
    return 0


def _routes_section(routes: Dict[str, Any], images: Images, folder: Optional[Path]) -> Section:
    try:
        return routes_section(routes, images.pixels, folder)
    except InputError as error:  # no matplotlib
        print(f'warning: {error}', file=sys.stderr)
        return routes_section({**routes, 'pairs': []}, images.pixels)


def _facts(flags: argparse.Namespace, classifier: Classifier, images: Images) -> List[Tuple[str, str]]:
    """For the foot of the page."""
    weights = 'random: untrained' if not classifier.trained else flags.checkpoint or 'pretrained'
    data = classifier.args.data_dir or classifier.args.dataset
    return [
        ('Weights', f'`{weights}`{", averaged" if flags.use_ema else ""}'),
        ('Images', f'{counted(len(images.targets), "image")} of `{data}`, split `{classifier.args.val_split}`'),
        ('Input', ' x '.join(map(str, images.pixels.shape[1:]))),
        ('Software', f'moe_zoo {__version__}, torch {torch.__version__}'),
    ]


def _name(flags: argparse.Namespace) -> str:
    """Of the results: the run that a checkpoint lies in, or the model."""
    if flags.checkpoint:
        path = Path(flags.checkpoint).resolve()
        return path.parent.name if path.name.endswith('.pth.tar') else path.stem
    return safe_model_name(flags.model or Path(flags.config).stem)


if __name__ == '__main__':
    raise SystemExit(main())
