"""Classifiers trained on handwritten digits, each beside its dense twin, and what their experts do.

Whatever a `show_*` function says comes from the result that its work function measured in this run.
"""
import math
from pathlib import Path

import timm
import yaml

from moe_zoo.analysis.charts import heat_map, scatter, share_bars
from moe_zoo.analysis.page import Block, Figure, Table, duration
from moe_zoo.engine.compare import twin_options
from moe_zoo.engine.config import load_config
from moe_zoo.engine.data import open_dataset
from moe_zoo.engine.evaluate import evaluate
from moe_zoo.engine.train import train

from .run import Settings, read_recipe
from .words import command, num_experts, short

CNN_RECIPE = 'condconv_resnet18_digits.yaml'
VIT_RECIPE = 'vmoe_vit_s_digits.yaml'


def learn(recipe: str, settings: Settings, folder: Path, results: dict) -> dict:
    """Train the model of a recipe, then its dense twin on the same batches. Both resume where they were interrupted."""
    config = yaml.safe_load(read_recipe(settings.recipes / recipe))  # once: both runs follow the same text
    options = {**settings.overrides.get(recipe, {}), 'seed': settings.seed}
    routed = train(config, options, output=folder / 'model', resume='auto')
    dense = twin_options(load_config(config, options))
    twin = train(config, {**options, **dense}, output=folder / 'twin', resume='auto', expect_routing=False)
    args = load_config(config, options)
    model = timm.create_model(args.model, device='meta', **args.model_kwargs)
    kept = ('model', 'checkpoint', 'epochs', 'seconds', 'top1', 'parameters', 'active_parameters', 'macs', 'warnings')
    return {
        'recipe': str(settings.recipes / recipe),
        'options': options,
        'images': len(open_dataset(args, False)),
        'experts': num_experts(model),
        'keywords': {'img_size': args.img_size, **args.model_kwargs},
        'model': {key: routed[key] for key in kept},
        'twin': {key: twin[key] for key in kept},
    }


def show_learn(settings: Settings, result: dict, folder: Path) -> tuple[str, list[Block]]:
    routed, twin = result['model'], result['twin']
    images = result['images']
    headline = (
        f'`{routed["model"]}` with {result["experts"]} experts reads **{routed["top1"]:.1f} %** of {images} unseen '
        f'digits right; its dense twin, trained on the same batches, {twin["top1"]:.1f} %.'
    )
    return headline, [
        Table(
            ['model', 'test accuracy', 'parameters', 'active', 'MACs', 'epochs', 'training'],
            [[r['model'] if r is routed else f'dense twin ({r["model"]})', f'{r["top1"]:.2f} %', short(r['parameters']),
              short(r['active_parameters']), short(r['macs']), r['epochs'], duration(r['seconds'])]
             for r in (routed, twin)],
            f'Seed {settings.seed}, final epoch. One test image is {100 / images:.2f} %.',
        ),
        f'Built with {", ".join(f"`{k}={v}`" for k, v in result["keywords"].items())}. The digits have 8 x 8 pixels, '
        'enlarged to `img_size`.',
        *(f'**Warning while training:** {text}' for text in routed['warnings']),
        command('tools/train_imagenet.py', '--config', result['recipe'], '--twin', f'seed={settings.seed}'),
    ]


def compare(settings: Settings, folder: Path, results: dict) -> dict:
    """Put what was trained side by side."""
    rows = []
    for result in results.values():
        rows += [dict(result['model'], routed=True), dict(result['twin'], routed=False)]
    return {'rows': rows, 'images': max(r['images'] for r in results.values())}


def show_compare(settings: Settings, result: dict, folder: Path) -> tuple[str, list[Block]]:
    rows = result['rows']
    pairs = list(zip(rows[::2], rows[1::2]))
    texts = [f'`{a["model"]}` {a["top1"] - b["top1"]:+.1f} points at {a["macs"] / b["macs"]:.2f} times the MACs'
             for a, b in pairs]
    chart = scatter(
        [(a['model'], a['macs'] / 1e6, a['top1'], True) for a, _ in pairs]
        + [(f'twin of {a["model"]}', b['macs'] / 1e6, b['top1'], False) for a, b in pairs],
        'million MACs an image (at most)', 'test accuracy, %',
    )
    alt = '; '.join(f'{r["model"]}: {r["macs"] / 1e6:.1f} million MACs, {r["top1"]:.1f} %' for r in rows)
    right = min(max(r['top1'] for r in rows) / 100, 1 - 1 / result['images'])
    error = 100 * math.sqrt(right * (1 - right) / result['images'])
    return f'Over the dense twin: {"; ".join(texts)}.', [
        Figure(chart, alt, 'Filled: mixture of experts. Rings: dense twins.'),
        f'One seed and {result["images"]} test images: at {100 * right:.1f} % right, an accuracy has a standard error '
        f'of {error:.1f} points. These digits are easy: they show that everything works, not which model is better.',
    ]


def use(settings: Settings, folder: Path, results: dict) -> dict:
    """Run both classifiers over the test digits and read what their routers chose."""
    models = []
    for result in results.values():
        found = evaluate(result['recipe'], result['options'], checkpoint=result['model']['checkpoint'], quiet=True)
        layers = [usage.as_dict() for usage in found['usage'].values()]
        models.append({'model': found['model'], 'images': found['images'], 'layers': layers})
    return {'models': models}


def show_use(settings: Settings, result: dict, folder: Path) -> tuple[str, list[Block]]:
    living, experts = (
        sum(value(layer) for m in result['models'] for layer in m['layers'])
        for value in (lambda layer: layer['living'], lambda layer: len(layer['share'])))
    blocks: list[Block] = []
    for model in result['models']:
        layers = model['layers']
        last = next(layer for layer in reversed(layers) if layer['class_mass'])
        mass = [[100 * share for share in row] for row in last['class_mass']]
        name, digits = model['model'], [str(digit) for digit in range(len(mass))]
        shares = [(layer['layer'], layer['share']) for layer in layers]
        alt = '; '.join(f'{n}: ' + ', '.join(f'{100 * s:.0f} %' for s in share) for n, share in shares)
        blocks += [
            f'**`{name}`** on {model["images"]} test digits',
            Figure(share_bars(shares), f'Share of each expert by layer. {alt}', 'Share of each expert by layer.'),
            Figure(
                heat_map(digits, [str(e) for e in range(len(mass[0]))], mass, 'digit', f'expert of {last["layer"]}'),
                f'Share of the weight of each expert of {last["layer"]} by digit, in percent; numbers are drawn in.',
                'Share of the combine weight in the images of a digit, %.'),
        ]
    table = Table(
        ['layer', 'model', 'experts', 'living', 'entropy', 'dropped'],
        [[layer['layer'], model['model'], len(layer['share']), layer['living'], f'{layer["entropy"]:.3f}',
          f'{100 * layer["dropped"]:.1f} %'] for model in result['models'] for layer in model['layers']],
        'Living: carries more than 1 % of the weight. Entropy 1: all experts are used alike. Dropped: found no slot.',
    )
    share, expert, digit, layer, model = strongest(result['models'])
    headline = (
        f'**{living} of {experts}** experts carry more than 1 % of the weight of their layer. The closest pair: expert '
        f'{expert} of `{layer}` in `{model}` carries {100 * share:.0f} % of it in images of a **{digit}**.'
    )
    return headline, [*blocks, table]


def strongest(models: list[dict]) -> tuple[float, int, int, str, str]:
    """The largest share of an expert in a class, against the fair share: (share, expert, class, layer, model)."""
    cells = [
        (share * len(row), share, expert, digit, layer['layer'], model['model'])
        for model in models for layer in model['layers']
        for digit, row in enumerate(layer['class_mass'] or []) for expert, share in enumerate(row)
    ]
    return max(cells)[1:]
