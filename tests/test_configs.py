"""Every config: each row and size can be built, and its pipelines run on generated images."""

import re
from inspect import unwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from PIL import Image
from yapf.yapflib import yapf_api

import vqmoe_vision.classification
import vqmoe_vision.segmentation  # noqa: F401  both register types
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.models.moe_vit import complexity
from vqmoe_vision.models.vit_moe import SIZES

from . import cases, on_meta
from .rows import CONFIGS, DIGITS, ROWS, SCENES, ade20k, leaves, row_options

ROOT = CONFIGS.parent
BUDGET = 'classification/cifar10_budget.py'
DATA_SETS = (
    *(f'classification/{name}.py' for name in ('cifar10', 'cifar100', 'stl10', 'svhn')),
    'classification/imagenet/vit_tiny_vqmoe_imagenet.py',
)
SEGMENTERS = (
    'segmentation/segmenter_vit-t-vqmoe_mask_8xb2-80k_pascal-context-59-480x480.py',
    'segmentation/segmenter_vit-t-vqmoe_mask_8xb1-20k_camvid-352x480.py',
    'segmentation/segmenter_vit-4x128-vqmoe_mask_1xb8-600_camvid-192x192.py',
)
# the rows of the paper, which have a file each; methods added since are options
PAPER = ('dense', 'smoe', 'softmoe', 'stablemoe', 'vqmoe', 'xmoe')


def named(model: str, size: str, row: str) -> Path:
    if model == 'model':
        return CONFIGS / f'classification/imagenet/vit_{size}_{row}_imagenet.py'
    return CONFIGS / f'segmentation/ade20k/{ade20k(size, row)}.py'


def test_at_most_90_files():
    """What is added is an option of a config that is there, and no leaf."""
    assert len([path for path in CONFIGS.rglob('*') if path.is_file()]) <= 90


def test_names_differ_because_they_name_the_work_dir():
    stems = [Path(leaf).stem for leaf in leaves('classification') + leaves('segmentation')]
    assert len(set(stems)) == len(stems)


@cases('model, size', ('model', 'tiny'), ('model', 'base'), *(('model.backbone', s) for s in SIZES))
def test_named_rows_are_what_options_make_of_another(model, size):
    # Large has crops of its own, and is compared with itself
    other = named(model, 'large' if size == 'large' else 'tiny', 'vqmoe')
    for row in PAPER:
        leaf = named(model, size, row)
        options = row_options('dense_1x' if row == 'dense' else row, size, model)
        expected = load_config(str(other), options if leaf != other else {})
        assert load_config(str(leaf)).to_dict() == expected.to_dict(), row


@pytest.mark.parametrize('leaf', leaves('classification'))
def test_model_and_pipelines(leaf):
    # weights of others are not fetched
    config = load_config(str(CONFIGS / leaf), {'model.pretrained': False})
    with on_meta():
        model = MODELS.build(config.model).eval()
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8))
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        transform = TRANSFORMS.build(loader.dataset.transform)
        batch = torch.stack([transform(image) for _ in range(2)])
        assert batch.dtype == torch.float32 and batch.isfinite().all()
        with torch.inference_mode():
            assert model(batch.to('meta')).shape == (2, config.model.num_classes)


@pytest.mark.parametrize('leaf', [DIGITS, BUDGET, *DATA_SETS])
def test_configs_choose_by_what_training_leaves_out(leaf):
    config = load_config(str(CONFIGS / leaf))
    train, val, test = (config[f'{n}_dataloader'].dataset for n in ('train', 'val', 'test'))
    assert (train.split, val.split, test.split) == ('train', 'dev', 'test')
    assert val == {**train, 'split': 'dev', 'transform': val.transform}
    assert val == {**test, 'split': 'dev'}


@cases(
    'leaf, size, row',
    *((DATA_SETS[0], size, row) for size in SIZES for row in ROWS),
    *((leaf, 'tiny', row) for leaf in DATA_SETS[1:] for row in ROWS),
)
def test_every_data_set_takes_every_row_and_size(leaf, size, row):
    config = load_config(str(CONFIGS / leaf), row_options(row, size))
    with on_meta():
        model = MODELS.build(config.model).model
    assert model.embed_dim == SIZES[size]['embed_dim']
    assert model.head.out_features == config.model.num_classes
    routed = [i for i, block in enumerate(model.blocks) if hasattr(block.mlp, 'experts')]
    last = len(model.blocks) - 1
    assert routed == ([] if row.startswith('dense') else [last - 2, last])
    hidden = model.blocks[0].mlp.fc1.out_features
    assert (hidden > 4 * model.embed_dim) == (row == 'dense_2x')


@pytest.mark.parametrize('size, dense, routed', [('tiny', 5.36, 9.51), ('base', 85.15, 113.5)])
def test_sizes_are_the_10m_and_110m_of_the_paper(size, dense, routed):
    for row, millions in (('dense_1x', dense), ('smoe', routed), ('vqmoe', routed)):
        config = load_config(str(CONFIGS / 'classification/cifar10.py'), row_options(row, size))
        with on_meta():
            model = MODELS.build(config.model).model
        # within half a percent: routers and codebooks are not in the arithmetic of the expectation
        assert complexity(model).params / 1e6 == pytest.approx(millions, rel=5e-3), row


@cases(
    'leaf, softmoe',
    *((leaf, 0.07) for leaf in (DIGITS, BUDGET, *DATA_SETS[:4:2], DATA_SETS[-1])),
    # its mixing grows with the square of the tokens
    *((leaf, 0.21) for leaf in (*SEGMENTERS, SCENES)),
)
def test_rows_are_matched_in_active_compute(leaf, softmoe):
    macs = {}
    for row in ROWS:
        field = 'model' if leaf.startswith('classification') else 'model.backbone'
        config = load_config(str(CONFIGS / leaf), row_options(row, model=field))
        with DefaultScope.overwrite_default_scope('mmseg'), on_meta():
            model = MODELS.build(config.model.get('backbone', config.model)).model
        macs[row] = complexity(model).macs
    dense = macs.pop('dense_1x')
    for row, value in macs.items():
        # routers and codebooks come on top of the experts
        tolerance = softmoe if row == 'softmoe' else 0.04
        assert value == pytest.approx(macs['dense_2x'], rel=tolerance) and value > 1.05 * dense, row


@pytest.mark.parametrize('leaf', [DIGITS, SCENES])
def test_what_checkpoints_keep_is_the_config(leaf, monkeypatch):
    config = load_config(str(CONFIGS / leaf))
    unformatted = config.pretty_text  # as in all tests but this one
    monkeypatch.setattr(yapf_api, 'FormatCode', unwrap(yapf_api.FormatCode))
    assert config.pretty_text != unformatted
    for text in (config.pretty_text, unformatted):
        assert Config.fromstring(text, '.py').to_dict() == config.to_dict()


def test_docs_name_configs_that_are_there():
    pages = [*ROOT.glob('*.md'), *ROOT.glob('docs/[!a]*/*.md')]  # not the archive
    pattern = r'(?:configs/|vqmoe_vision::)([\w/-]+\.py)'
    names = {name for path in pages for name in re.findall(pattern, path.read_text())}
    assert len(names) > 5 and all((CONFIGS / name).is_file() for name in names), names
