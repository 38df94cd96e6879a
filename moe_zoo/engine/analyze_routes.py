"""`tools/analyze_experts.py --consistency [--before FILE]`: do routes stay with what they show, of one model or of two.

What is measured and drawn is in `moe_zoo.analysis.consistency` and `moe_zoo.analysis.view_figures`.
"""
import io
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch

from ..analysis.consistency import consistency_section, locate_pairs, measure_consistency
from ..analysis.figures import save
from ..analysis.page import Section
from ..errors import InputError
from .checkpoint import read_checkpoint
from .inference import Classifier, Images, open_classifier, recipe_of

UNTRAINED = 'untrained'  # instead of a checkpoint: the same model with random weights
CAPTION = (
    'Corresponding patches of layer `{layer}` in the colour of their best expert: what shows the same thing should have'
    ' the same colour on the left and on the right. Frames mark patches of the crop whose experts differ; what lies'
    ' outside of the crop is grey.')


def open_pair(
        classifier: Classifier,
        checkpoint: Optional[str],
        before: Optional[str],
        config: Any = None,
        overrides: Mapping[str, Any] = {},  # noqa: B006 - read only
) -> List[Tuple[str, Classifier]]:
    """The classifiers to compare, by name: the one at hand, and the one before it where it is given.

    Args:
        classifier: The one at hand.
        checkpoint: Its weights, config and overrides: its recipe and what won over it, as for `open_classifier`.
        before: Another checkpoint, or 'untrained'.

    Raises:
        InputError: The checkpoint cannot be used, or sees images of another size.
    """
    if before is None:
        return [(classifier.args.model, classifier)]
    if before == UNTRAINED:
        torch.manual_seed(classifier.args.seed)
        content = read_checkpoint(checkpoint) if checkpoint else {}
        recipe = recipe_of(config, content, overrides, checkpoint)
        settled = {**overrides, 'num_classes': classifier.model.num_classes, 'pretrained': False,
                   'pretrained_path': None, 'initial_checkpoint': ''}
        other, _ = open_classifier(None, recipe, settled, with_data=False)
    else:
        other, _ = open_classifier(before, config, overrides, with_data=False)
    sizes = [tuple(each.data_config['input_size']) for each in (other, classifier)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"--before '{before}' sees images of {' x '.join(map(str, sizes[0]))}, the model to compare it with of"
            f' {" x ".join(map(str, sizes[1]))}: give a checkpoint of the same input size.')
    names = (UNTRAINED, 'trained') if before == UNTRAINED else ('before', 'after')
    return list(zip(names, (other, classifier)))


def compare_routes(
        named: Sequence[Tuple[str, Classifier]],
        images: Images,
        shown: Sequence[int] = (),
        **options: Any,
) -> Dict[str, Any]:
    """Everything about the consistency of routes, for JSON.

    Args:
        named: From `open_pair`.
        images: From `moe_zoo.engine.inference.load_images`.
        shown: Numbers of the images whose patches are to be drawn.
        options: Keywords of `measure_consistency`.

    Returns:
        measured: for each name, `name` and what `measure_consistency` returns; shown; pairs: for each name, `name` and
        what `locate_pairs` returns, empty where nothing is shown.

    Raises:
        InputError: A model routes no patches.
    """
    measured, pairs = [], []
    for name, classifier in named:
        size = classifier.args.validation_batch_size or classifier.args.batch_size
        with classifier.autocast():
            measured.append({
                'name': name, **measure_consistency(classifier.model, images.batches(classifier, size), **options)})
            if len(shown):
                pixels = classifier.normalise(images.pixels[list(shown)])
                pairs.append({'name': name, **locate_pairs(classifier.model, pixels)})
    return {'measured': measured, 'shown': list(shown), 'pairs': pairs}


def routes_section(result: Mapping[str, Any], pixels: torch.Tensor, folder: Optional[Path] = None) -> Section:
    """The section of the page.

    Args:
        result: From `compare_routes`.
        pixels: (N, C, H, W) uint8, all images in order.
        folder: Where to write the picture too, as consistency.png; None does not.

    Raises:
        InputError: There is a picture to draw and matplotlib is not installed.
    """
    picture, caption = None, ''
    if result['pairs']:
        from ..analysis.view_figures import views_figure
        named = [(each['name'], each) for each in result['pairs']]
        figure = views_figure(named, pixels[result['shown']].float() / 255)
        if folder is not None:
            save(figure, folder / 'consistency.png')
        drawn = io.BytesIO()
        figure.savefig(drawn, format='png', dpi=110)
        picture, caption = drawn.getvalue(), CAPTION.format(layer=named[-1][1]['layer'])
    return consistency_section([(each['name'], each) for each in result['measured']], picture, caption)
