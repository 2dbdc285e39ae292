"""Every config: its model can be built and run, and its pipelines run on generated images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import DATASETS, MODELS

from vqmoe_vision.engine.cli import load_config

from .conftest import write_pair

CONFIGS = Path(__file__).parents[2] / 'configs' / 'segmentation'
LEAVES = sorted(
    path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob('*.py') if path.stem != '_base_'
)
ROWS = ('dense', 'vqmoe', 'softmoe', 'smoe', 'stablemoe', 'xmoe')
# one leaf of every folder: its data set and schedule are those of the others
FOLDERS = ('ade20k', 'pascal_context', 'cityscapes', 'camvid', 'camvid/budget', 'digit_scenes')


def test_every_row_is_there() -> None:
    sizes = ('tiny', 'small', 'base', 'large')
    expected = {f'ade20k/segmenter_vit_{s}_{row}_ade20k.py' for s in sizes for row in ROWS}
    expected |= {f'digit_scenes/segmenter_vit_tiny_{row}_digit_scenes.py' for row in ROWS}
    expected |= {f'camvid/budget/segmenter_{row}_camvid_budget.py' for row in ROWS}
    original = 'ade20k/original_schedule/segmenter_vit_small_{}_ade20k_original.py'
    expected |= {original.format(row) for row in ROWS}
    for data, pair in (
        ('camvid', ('tiny', 'small')),
        ('pascal_context', ('tiny', 'base')),
        ('cityscapes', ('tiny', 'base')),
    ):
        expected |= {f'{data}/segmenter_vit_{s}_{row}_{data}.py' for s in pair for row in ROWS}
    assert expected <= set(LEAVES)


def test_names_differ_because_they_name_the_work_dir() -> None:
    stems = [Path(leaf).stem for leaf in LEAVES]
    assert len(set(stems)) == len(stems)


@pytest.mark.parametrize('leaf', LEAVES)
def test_model_can_be_built_and_run(leaf: str) -> None:
    config = load_config(str(CONFIGS / leaf))
    model_config = config.model
    size = model_config.data_preprocessor['size']
    # in parts, as mmseg's mask transformer reads the values of a tensor when it is built
    head = MODELS.build(model_config.decode_head).to('meta').eval()
    with torch.device('meta'):
        backbone = MODELS.build(model_config.backbone).eval()
        features = backbone(torch.empty(1, 3, *size))
        if 'neck' in model_config:
            features = MODELS.build(model_config.neck)(features)
        logits = head(features)
    assert model_config.type == 'MoeEncoderDecoder'
    patch = backbone.model.patch_embed.patch_size[0]
    assert logits.shape[:2] == (1, model_config.decode_head.num_classes)
    if 'upernet' not in leaf:
        assert logits.shape[2:] == (size[0] // patch, size[1] // patch)
    assert model_config.decode_head.num_classes == len(
        DATASETS.get(dataset(config).type).METAINFO['classes']
    )


@pytest.mark.parametrize('leaf', [leaf for leaf in LEAVES if '_softmoe_' in leaf])
def test_softmoe_has_two_slots_per_token(leaf: str) -> None:
    model = load_config(str(CONFIGS / leaf)).model
    with torch.device('meta'):
        backbone = MODELS.build(model.backbone).model
    slots = {block.mlp.num_slots for block in backbone.blocks if hasattr(block.mlp, 'num_slots')}
    assert slots == {2 * backbone.patch_embed.num_patches}


def dataset(config: Config, split: str = 'train') -> Any:
    return config[f'{split}_dataloader'].dataset


def leaf_of(folder: str) -> Config:
    return load_config(str(next(iter(sorted((CONFIGS / folder).glob('*vqmoe*.py'))))))


FILES = {
    'ade20k': ('images/{}/a.jpg', 'annotations/{}/a.png', ('training', 'validation')),
    'camvid': ('images/{}/a.jpg', 'annotations/{}/a.png', ('train', 'val')),
    'camvid/budget': ('images/{}/a.jpg', 'annotations/{}/a.png', ('train', 'val')),
    'pascal_context': ('JPEGImages/a.jpg', 'SegmentationClassContext/a.png', ('train', 'val')),
    'cityscapes': (
        'leftImg8bit/{}/town/a_leftImg8bit.png',
        'gtFine/{}/town/a_gtFine_labelTrainIds.png',
        ('train', 'val'),
    ),
}


@pytest.mark.parametrize('folder', FOLDERS)
def test_pipelines_run(folder: str, tmp_path: Path) -> None:
    config = leaf_of(folder)
    if folder in FILES:
        image, label, splits = FILES[folder]
        labels = np.random.default_rng(0).integers(1, 5, (45, 60))
        for split in splits:
            write_pair(tmp_path, image.format(split), label.format(split), labels)
            lists = tmp_path / 'ImageSets/SegmentationContext'
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f'{split}.txt').write_text('a\n')
    pipelines = [('train', None), ('val', None), ('test', config.tta_pipeline)]
    for split, pipeline in pipelines:
        settings = dataset(config, split).copy()
        if folder in FILES:
            settings.data_root = str(tmp_path)
        if pipeline is not None:
            settings.pipeline = pipeline
        sample = DATASETS.build(settings)[0]
        versions = sample['inputs'] if pipeline is not None else [sample['inputs']]
        for tensor in versions:
            assert tensor.dtype == torch.uint8 and tensor.ndim == 3
        samples = sample['data_samples']
        first = samples[0] if pipeline is not None else samples
        found = first.gt_sem_seg.data.unique().tolist()
        assert set(found) <= {*range(config.model.decode_head.num_classes), 255}


def test_only_bases_are_long() -> None:
    for leaf in LEAVES:
        assert len((CONFIGS / leaf).read_text().splitlines()) <= 15, leaf
