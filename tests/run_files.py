"""Folders of runs with chosen numbers, as train-imagenet and train-coco leave them, for tests of what reads them."""
import csv
import json

import yaml


def write_classifier(folder, rows, **options):
    """args.yaml and summary.csv; `rows` are dictionaries of columns. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {'model': 'vmoe_vit_s', 'epochs': len(rows), 'seed': 0, 'dataset': 'digits', 'data_dir': None,
               'model_kwargs': {}, 'lr': .001, 'experiment': folder.name, **options}
    (folder / 'args.yaml').write_text(yaml.safe_dump(options))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(folder / 'summary.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return folder


def epochs(*top1, loss=2., **layers):
    """One row an epoch; `layers` are balance columns, one value for each epoch."""
    return [{'epoch': n, 'train_loss': loss - n, 'eval_loss': 1.5, 'eval_top1': score, 'eval_top5': 99.,
             **{f'balance_{layer}': values[n] for layer, values in layers.items()}} for n, score in enumerate(top1)]


def write_detector(folder, lines, metrics, seed=1, stages=('res5',), **moe):
    """config.yaml, metrics.json and, unless `metrics` is None, results.json. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        'MODEL': {'META_ARCHITECTURE': 'MoERetinaNet', 'BACKBONE': {'NAME': 'build_moe_resnet_fpn_backbone'}},
        'MOE': {'RESNET': {'STAGES': list(stages), 'LAYER': 'moe'}, 'HEAD': {'SUBNETS': 'none'},
                'DATA': {'ROOT': 'somewhere/cells'}, **moe},
        'DATASETS': {'TEST': ['coco_2017_val']}, 'SOLVER': {'MAX_ITER': 100, 'BASE_LR': .01}, 'SEED': seed,
        'OUTPUT_DIR': str(folder)}
    (folder / 'config.yaml').write_text(yaml.safe_dump(config))
    (folder / 'metrics.json').write_text('\n'.join(map(json.dumps, lines)))
    if metrics is not None:
        (folder / 'results.json').write_text(json.dumps({'metrics': metrics, 'unit': 'percent'}))
    return folder


def iterations(*shares):
    """A line of the log each 20 iterations, with the shares of two experts of one layer."""
    return [{'iteration': 20 * n + 19, 'total_loss': 3. - n, 'moe/res5/cv': 0.,
             **{f'moe/res5/expert{e}_share': share for e, share in enumerate(pair)}} for n, pair in enumerate(shares)]
