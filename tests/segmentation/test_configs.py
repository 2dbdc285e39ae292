"""Every config: its model can be built and run in each row and size, and its pipelines run."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import DATASETS

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.models.vit_moe import SIZES

from .. import cases
from ..rows import CONFIGS, ROWS, ade20k, leaves, row_options
from .conftest import build, write_pair

LEAVES = leaves('segmentation')
ADE = 'segmentation/ade20k'
DATA_SETS = (
    f'{ADE}/{ade20k("tiny", "vqmoe")}.py',
    'segmentation/segmenter_vit-t-vqmoe_mask_8xb2-80k_pascal-context-59-480x480.py',
    'segmentation/segmenter_vit-t-vqmoe_mask_8xb1-80k_cityscapes-768x768.py',
    'segmentation/segmenter_vit-t-vqmoe_mask_8xb1-20k_camvid-352x480.py',
)
LARGE = f'{ADE}/{ade20k("large", "vqmoe")}.py'
ORIGINAL = f'{ADE}/segmenter-original_vit-s-vqmoe_mask_8xb1-162k_ade20k-512x512.py'
UPERNET = f'{ADE}/upernet_vit-b-vqmoe_mln_8xb2-160k_ade20k-512x512.py'
BUDGET = 'segmentation/segmenter_vit-4x128-vqmoe_mask_1xb8-600_camvid-192x192.py'
DIGITS = 'segmentation/segmenter_vit-4x96-vqmoe_mask_1xb64-1k_digits-48x48.py'
SMALL = {
    LARGE: 'large',
    f'{ADE}/segmenter_vit-s-vqmoe_linear_8xb1-160k_ade20k-512x512.py': 'small',
    ORIGINAL: 'small',
    UPERNET: 'base',
    BUDGET: 'tiny',
    DIGITS: 'tiny',
}


def load(leaf: str, row: str = '', size: str = 'tiny') -> Config:
    options = row_options(row, size, 'model.backbone') if row else {}
    return load_config(str(CONFIGS / leaf), options)


def dataset(config: Config, split: str = 'train') -> Any:
    return config[f'{split}_dataloader'].dataset


def some_rows(leaf: str) -> list[str]:
    """All for the first leaf; every third for another, and the one whose slots it has to fit."""
    number = [*DATA_SETS, *SMALL].index(leaf)
    return [r for i, r in enumerate(ROWS) if not number or (number + i) % 3 == 0 or r == 'softmoe']


FITTED = dict.fromkeys(DATA_SETS, 'tiny') | SMALL


@cases(
    'leaf, size, row',
    *((DATA_SETS[0], size, 'vqmoe') for size in SIZES if size != 'tiny'),
    *((leaf, size, row) for leaf, size in FITTED.items() for row in some_rows(leaf)),
)
def test_every_config_takes_every_row(leaf, size, row, monkeypatch):
    config = load(leaf, row, size)
    model = build(config, monkeypatch)
    backbone, head = model.routed_model, model.decode_head
    routed = [block.mlp for block in backbone.blocks if hasattr(block.mlp, 'experts')]
    assert len(routed) == (0 if row.startswith('dense') else 2)
    if row == 'softmoe':  # two slots per token
        assert {mlp.num_slots for mlp in routed} == {2 * backbone.patch_embed.num_patches}
    assert head.in_channels in (backbone.embed_dim, [backbone.embed_dim] * 4)
    if leaf in DATA_SETS:
        width, heads = (SIZES[size][name] for name in ('embed_dim', 'num_heads'))
        assert backbone.embed_dim == head.channels == head.cls_emb.shape[-1] == width
        assert {layer.attn.attn.num_heads for layer in head.layers} == {heads}
    height, width = config.model.data_preprocessor['size']
    with torch.inference_mode():
        logits = model(torch.empty(1, 3, height, width, device='meta'), mode='tensor')
    classes = DATASETS.get(dataset(config).type).METAINFO['classes']
    assert logits.shape[:2] == (1, len(classes)) == (1, model.num_classes)
    if not model.with_neck:
        patch = backbone.patch_embed.patch_size[0]
        assert logits.shape[2:] == (height // patch, width // patch)


FILES = {
    'ade20k': ('images/{}/a.jpg', 'annotations/{}/a.png', ('training', 'validation')),
    'camvid': ('images/{}/a.jpg', 'annotations/{}/a.png', ('train', 'val')),
    'pascal-context': ('JPEGImages/a.jpg', 'SegmentationClassContext/a.png', ('train', 'val')),
    'cityscapes': (
        'leftImg8bit/{}/town/a_leftImg8bit.png',
        'gtFine/{}/town/a_gtFine_labelTrainIds.png',
        ('train', 'val'),
    ),
}
ALBUMENTATIONS = f'{ADE}/segmenter_vit-s-vqmoe_mask_8xb1-albu-160k_ade20k-512x512.py'


@pytest.mark.parametrize('leaf', [*DATA_SETS, LARGE, ALBUMENTATIONS, BUDGET, DIGITS])
def test_pipelines_run(leaf, tmp_path):
    config = load(leaf)
    files = next((files for name, files in FILES.items() if name in leaf), None)
    if files is not None:
        image, label, splits = files
        labels = np.random.default_rng(0).integers(1, 5, (45, 60))
        lists = tmp_path / 'ImageSets/SegmentationContext'
        lists.mkdir(parents=True)
        for split in splits:
            write_pair(tmp_path, image.format(split), label.format(split), labels)
            (lists / f'{split}.txt').write_text('a\n')
    shapes = []
    for split in ('train', 'val', 'test', 'tta'):
        settings = dataset(config, 'test' if split == 'tta' else split).copy()
        if files is not None:
            # one pair of each kind, of which nothing can be set aside
            settings.update(data_root=str(tmp_path), part='all')
        if split == 'tta':
            settings.pipeline = config.tta_pipeline
        sample = DATASETS.build(settings)[0]
        if split != 'tta':
            sample = {name: [value] for name, value in sample.items()}
        assert all(pixels.dtype == torch.uint8 and pixels.ndim == 3 for pixels in sample['inputs'])
        shapes.append([tuple(pixels.shape) for pixels in sample['inputs']])
        found = sample['data_samples'][0].gt_sem_seg.data.unique().tolist()
        assert set(found) <= {*range(config.model.decode_head.num_classes), 255}
    # --tta has smaller and larger versions of what a test sees, and that itself
    *_, [tested], augmented = shapes
    assert tested in augmented and min(augmented) < tested < max(augmented)


@pytest.mark.parametrize('leaf', LEAVES)
def test_a_name_says_processes_and_the_batch_of_each(leaf):
    (processes, batch), *_ = re.findall(r'_(\d+)xb(\d+)-', leaf)
    theirs = Config.fromfile(CONFIGS / leaf, import_custom_modules=False)  # as mmseg reads it
    assert theirs.train_dataloader.batch_size == int(batch)
    # and what one process of ours has
    assert load(leaf).train_dataloader.batch_size == int(processes) * int(batch)
