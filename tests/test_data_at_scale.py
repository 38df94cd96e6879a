"""Data that is no folder of files: tars through timm's reader, and the names of its other readers."""
import sys
import tarfile

import pytest
import torch
from image_folders import write_images

from moe_zoo.engine.config import load_config
from moe_zoo.engine.data import class_names, open_datasets
from moe_zoo.engine.train import train
from moe_zoo.errors import InputError

TINY = dict(
    model='vmoe_vit_s', img_size=16, batch_size=4, workers=0, device='cpu', opt='sgd', lr=0.1, epochs=1,
    warmup_epochs=0, no_prefetcher=True, model_kwargs=dict(
        patch_size=8, embed_dim=16, depth=2, num_heads=2, moe_layers=[1], num_experts=4, representation_size=0))


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / 'images', {'train': 4, 'validation': 2})


def pack(source, target, members):
    target.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(target, 'w') as tar:
        for member in members:
            tar.add(source / member, member)


def one_a_split(images, root):
    for split in ('train', 'validation'):
        pack(images / split, root / f'{split}.tar', ['bright', 'dark'])


def one_a_class(images, root):
    """As ImageNet is handed out: the name of the tar is that of the class."""
    for split in ('train', 'validation'):
        for name in ('bright', 'dark'):
            files = sorted(path.name for path in (images / split / name).iterdir())
            pack(images / split / name, root / split / f'{name}.tar', files)


def shards(images, root):
    """Both classes in every shard."""
    for split, half in (('train', 2), ('validation', 1)):
        names = [f'{name}/{i:02d}.png' for i in range(2 * half) for name in ('bright', 'dark')]
        for number in range(2):
            part = names[2 * half * number:2 * half * (number + 1)]
            pack(images / split, root / split / f'shard-{number}.tar', part)


@pytest.mark.parametrize('layout', [one_a_split, one_a_class, shards])
def test_tars_hold_what_the_folders_do(images, tmp_path, layout):
    """Same classes, same pixels in the same number, whichever tar an image is in."""
    layout(images, tmp_path / 'tars')
    opened = {}
    for name in ('images', 'tars'):
        args = load_config(TINY, {'data_dir': str(tmp_path / name)})
        opened[name] = open_datasets(args)
        assert args.num_classes == 2
    for folder, tar in zip(opened['images'], opened['tars']):
        assert class_names(tar) == class_names(folder) == {'bright': 0, 'dark': 1}
        pixels = [
            sorted((target, image.tobytes()) for image, target in map(data.__getitem__, range(len(data))))
            for data in (folder, tar)]
        assert pixels[0] == pixels[1] and len(pixels[0]) in (8, 4)


def test_training_reads_tars(images, tmp_path):
    """8 images in shards, batches of 4: two updates, and all 4 evaluation images are counted."""
    shards(images, tmp_path / 'tars')
    result = train(TINY, {'data_dir': str(tmp_path / 'tars')}, output=tmp_path / 'run', quiet=True)
    assert result['top1'] in (0.0, 25.0, 50.0, 75.0, 100.0) and result['corrupt'] == []
    weights = torch.load(result['checkpoint'], weights_only=True)['state_dict']
    assert weights['head.weight'].shape == (2, 16)


def test_bad_tars_are_refused(images, tmp_path):
    root = tmp_path / 'tars'
    one_a_split(images, root)
    (root / 'train.tar').write_bytes(b'no tar')
    with pytest.raises(InputError, match='The dataset cannot be opened'):
        open_datasets(load_config(TINY, {'data_dir': str(root)}))
    (root / 'train.tar').unlink()
    shards(images, root)
    (root / 'validation.tar').unlink()
    args = load_config(TINY, {'data_dir': str(root), 'val_split': 'nowhere', 'val_share': 0.25})
    with pytest.raises(InputError, match='val_share=0.25 is of a folder of images, not of tar files'):
        open_datasets(args)


@pytest.mark.parametrize('name, package', [
    ('wds/imagenet-w21', 'webdataset'), ('hfds/uoft-cs/cifar10', 'datasets'), ('hfids/uoft-cs/cifar10', 'datasets'),
    ('tfds/imagenet2012', 'tensorflow')])
def test_names_of_other_readers_reach_timm(monkeypatch, tmp_path, name, package):
    """timm's factory gets the name, the split and the folder; where the package is missing, a sentence says which."""
    import moe_zoo.engine.data as data
    asked = []
    create = data.create_dataset

    def create_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return create(*args, **kwargs)

    monkeypatch.setattr(data, 'create_dataset', create_dataset)
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    args = load_config(TINY, dict(data_dir=str(tmp_path), dataset=name, train_split='train-{00..03}', num_classes=2))
    with pytest.raises(InputError, match=f'{package}|installed|cannot be opened'):
        open_datasets(args)
    (given,), keywords = asked[0]
    assert given == name and keywords['split'] == 'train-{00..03}' and keywords['root'] == str(tmp_path)
    assert keywords['is_training'] and keywords['search_split']
