"""A detector trained on scenes of digits, and which expert serves which object size. Needs detectron2.

Whatever a `show_*` function says comes from the result that its work function measured in this run.
"""
import contextlib
import io
import math
import re
import sys
import warnings
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from rich.console import Console

from moe_zoo.analysis import count
from moe_zoo.analysis.charts import heat_map
from moe_zoo.analysis.page import Block, Figure, Stats, Table
from moe_zoo.data.scenes import write_scenes
from moe_zoo.routing import trace_routing

from .run import Settings
from .words import command, num_experts, short

DETECTOR_RECIPE = 'retinanet_digits.yaml'
SCENES = {'train': 400, 'val': 100}
CONFIDENT = .5  # score from which a detection is drawn
METRICS = {
    'AP': 'at 50 to 95 % overlap', 'AP50': 'at 50 %', 'AP75': 'at 75 %',
    'APs': 'small objects', 'APm': 'medium objects', 'APl': 'large objects',
}


class Quiet(io.TextIOBase):
    """Stands in for stdout while detectron2 logs: passes its progress on in short; the rest is in log.txt."""

    def __init__(self, console: Console):
        self.console = console

    def write(self, text: str) -> int:
        found = re.search(r'eta: ([\d:]+).*?iter: (\d+).*?total_loss: ([\d.]+)', text)
        if found:
            left, step, loss = found.groups()
            self.console.print(f'step {step}  loss {loss}  left {left}', highlight=False)
        return len(text)


def detect(settings: Settings, folder: Path, results: dict) -> dict:
    """Write digit scenes, train the detector on them (it resumes), and draw what it finds in four of them."""
    from moe_zoo.detection.config import load_config
    from moe_zoo.detection.train import run
    config = settings.recipes / DETECTOR_RECIPE
    classes = range(load_config(config).MODEL.RETINANET.NUM_CLASSES)
    scenes = write_scenes(folder / 'scenes', **SCENES, seed=settings.seed, classes=classes, progress=False)
    options = {
        'SOLVER.CHECKPOINT_PERIOD': 200,
        **settings.overrides.get(DETECTOR_RECIPE, {}),
        'MOE.DATA.ROOT': scenes, 'OUTPUT_DIR': folder / 'model', 'SEED': settings.seed,
    }
    options = [str(word) for pair in options.items() for word in pair]
    with contextlib.redirect_stdout(Quiet(Console(file=sys.stdout))), warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of detectron2's older code
        metrics = run(['--config-file', str(config), '--resume', *options])['bbox']
    # detectron2 leaves the config that it ran next to the weights: what follows rests on that, not on the recipe.
    config, weights = str(folder / 'model' / 'config.yaml'), str(folder / 'model' / 'model_final.pth')
    return {
        'config': config, 'weights': weights, 'scenes': SCENES,
        'metrics': {name: finite(metrics[name]) for name in METRICS},
        **look(config, weights, scenes, folder),
    }


def look(config: str, weights: str, scenes: Path, folder: Path) -> dict:
    """Cost of the detector, and the first four test scenes with what it finds and which experts it asks."""
    from moe_zoo.detection.count_inputs import load, read
    cfg, model = load(config, [], weights)
    model.eval()
    files = sorted((scenes / 'val').iterdir())[:4]
    pictures = []
    for file in files:
        inputs = read(cfg, file)
        with torch.no_grad(), trace_routing(model) as trace:
            found = model(inputs)[0]['instances']
        layer, records = next(iter(trace.items()))
        image = Image.open(file).convert('RGB')
        draw_boxes(image, found).save(folder / f'found_{file.name}')
        weight = records[0].combine_matrix()[0]
        pictures.append({
            'file': f'found_{file.name}', 'found': int((found.scores > CONFIDENT).sum()),
            'layer': layer, 'experts': (weight / weight.sum()).tolist(),
        })
    cost = count(model, read(cfg, files[0]))
    return {
        'pictures': pictures, 'experts': num_experts(model), 'parameters': cost.parameters,
        'active_parameters': cost.active_parameters, 'macs': cost.macs_max, 'size': list(image.size),
        'classes': cfg.MODEL.RETINANET.NUM_CLASSES, 'depth': cfg.MODEL.RESNETS.DEPTH,
        'width': cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, 'pyramid': cfg.MODEL.FPN.OUT_CHANNELS,
        'selected': cfg.MOE.RESNET.NUM_SELECTED, 'steps': cfg.SOLVER.MAX_ITER, 'batch': cfg.SOLVER.IMS_PER_BATCH,
    }


def draw_boxes(image: Image.Image, instances, scale: int = 2) -> Image.Image:
    """The image, enlarged, with every confident detection as a box and its digit."""
    image = image.resize([scale * side for side in image.size])
    pen = ImageDraw.Draw(image)
    for box, label, score in zip(instances.pred_boxes.tensor, instances.pred_classes, instances.scores):
        if score > CONFIDENT:
            x0, y0, x1, y1 = (scale * box).tolist()
            pen.rectangle((x0, y0, x1, y1), outline='#ffb000', width=2)
            pen.rectangle((x0, y0 - 15, x0 + 11, y0), fill='#ffb000')
            pen.text((x0 + 3, y0 - 14), str(int(label)), fill='black')
    return image


def show_detect(settings: Settings, result: dict, folder: Path) -> tuple[str, list[Block]]:
    metrics, scenes = result['metrics'], result['scenes']
    headline = (
        f'A RetinaNet whose last stage is {result["experts"]} experts finds digits in unseen scenes with '
        f'**AP50 {percent(metrics["AP50"])}**.'
    )
    figures = []
    for picture in result['pictures']:
        experts = [f'{e} ({100 * w:.0f} %)' for e, w in enumerate(picture['experts']) if w > 0]
        found = f'{picture["found"]} digits found with a score above {CONFIDENT}'
        text = f'{found}; experts {" and ".join(experts)} at work'
        figures.append(Figure((folder / picture['file']).read_bytes(), f'A scene of digits. {text}.', f'{text}.'))
    return headline, [
        Stats([(percent(metrics['AP50']), 'AP50'), (short(result['parameters']), 'parameters'),
               (short(result['active_parameters']), 'active for one image'), (short(result['macs']), 'MACs, at most')]),
        Table(['COCO metric', 'of what', 'value'],
              [[name, what, percent(metrics[name])] for name, what in METRICS.items()],
              f'{scenes["val"]} test scenes of {" x ".join(map(str, result["size"]))} pixels; trained on '
              f'{scenes["train"]}, from random weights, seed {settings.seed}.'),
        *figures,
        f'A ResNet-{result["depth"]} that starts {result["width"]} channels wide, its last stage '
        f'{result["experts"]} experts of which {result["selected"]} serve an image, under a pyramid of '
        f'{result["pyramid"]} channels; {result["classes"]} classes; {result["steps"]} steps of {result["batch"]} '
        'scenes.',
        command('tools/train_coco.py', '--eval-only', '--config-file', result['config'],
                'MODEL.WEIGHTS', result['weights']),
    ]


def finite(value: float) -> float | None:
    """COCO metrics of a detector that found nothing are not a number, which JSON does not have."""
    return value if math.isfinite(value) else None


def percent(value: float | None) -> str:
    """COCO metrics come in percent."""
    return '–' if value is None else f'{value:.1f} %'


# --- which expert serves which object size ----------------------------------------------------------------------------

def sizes(settings: Settings, folder: Path, results: dict) -> dict:
    """Gate mass and average precision by object size, and the two controls without which no test is trusted."""
    from moe_zoo.analysis.object_sizes import verdict
    from moe_zoo.analysis.size_page import control_sentence
    from moe_zoo.detection.count_inputs import load
    from moe_zoo.detection.object_sizes import analyze_detector
    detector = results['detector']
    cfg, model = load(detector['config'], ['OUTPUT_DIR', str(folder)], detector['weights'])
    found = analyze_detector(cfg, model, controls=('untrained', 'planted'), trials=('forced',), seed=settings.seed)
    analysis = found['sizes']
    return {
        'analysis': analysis.as_dict(),
        'verdicts': [verdict(layer, analysis.alpha) for layer in analysis.layers],
        'controls': [control_sentence(name, control) for name, control in found['controls'].items()],
        'ap': found['ap'],
        'config': detector['config'], 'weights': detector['weights'],
    }


def show_sizes(settings: Settings, result: dict, folder: Path) -> tuple[str, list[Block]]:
    analysis, ap = result['analysis'], result['ap']
    names = list(analysis['objects'])
    objects = ', '.join(f'{count} {name}' for name, count in analysis['objects'].items())
    figures = []
    for layer in analysis['layers']:
        mass = [[100 * (layer['mass'][size] or [0] * len(layer['expert_p']))[e] for size in names]
                for e in range(len(layer['expert_p']))]
        figures.append(Figure(
            heat_map([str(e) for e in range(len(mass))], names, mass, 'expert', f'objects, {layer["name"]}', '{:.1f}'),
            f'Gate mass of each expert of {layer["name"]} on small, medium and large objects; numbers are drawn in.',
            f'Gate mass of each expert on the objects of a size, % ({objects}).'))
    precision = [[row[key] or 0. for key in ('APs', 'APm', 'APl')] for row in ap.values()]
    figures.append(Figure(
        heat_map(list(ap), names, precision, '', 'objects', '{:.1f}'),
        'Average precision by object size with every expert forced and left free; the numbers are drawn in.',
        'AP by object size, %: the router left free, and every image sent to one expert alone.'))
    headline = 'Its experts **separate** object sizes.' if analysis['separates'] else \
        'Its experts do **not** separate object sizes.'
    verdicts = [f'`{layer["name"]}`: {text}' for layer, text in zip(analysis['layers'], result['verdicts'])]
    return headline, [
        *figures,
        f'A layer separates sizes where two tests agree at {analysis["alpha"]:g}: gates permuted among the '
        f'{analysis["images"]} scenes ({analysis["permutations"]} times), and routers whose weights are shuffled '
        f'({analysis["shuffles"]} times). It is an association: an expert may follow scenes in which small objects are '
        'common.',
        *verdicts,
        *result['controls'],
        command('tools/analyze_object_sizes.py', '--config-file', result['config'], '--weights', result['weights']),
    ]
