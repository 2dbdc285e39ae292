"""Every config: its model can be built and run in each row and size, and its pipelines run."""

import re
import shlex
from pathlib import Path
from typing import Any

import mmseg
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import DATASETS

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.models.complexity import complexity
from vqmoe_vision.models.vit_moe import SIZES
from vqmoe_vision.moe import METHODS

from ..rows import (
    CONFIGS,
    ROWS,
    ade20k,
    every_two,
    leaves,
    parse_options,
    result_options,
    row_options,
)
from .conftest import build, write_pair

LEAVES = leaves('segmentation')
ADE = 'segmentation/ade20k'
DATA_SETS = (
    f'{ADE}/segmenter_vit-t-vqmoe_mask_8xb1-160k_ade20k-512x512.py',
    'segmentation/segmenter_vit-t-vqmoe_mask_8xb2-80k_pascal-context-59-480x480.py',
    'segmentation/segmenter_vit-t-vqmoe_mask_8xb1-80k_cityscapes-768x768.py',
    'segmentation/segmenter_vit-t-vqmoe_mask_8xb1-20k_camvid-352x480.py',
)
# of one size
SMALL = {
    f'{ADE}/segmenter_vit-l-vqmoe_mask_8xb1-160k_ade20k-640x640.py': 'large',
    f'{ADE}/segmenter_vit-s-vqmoe_linear_8xb1-160k_ade20k-512x512.py': 'small',
    f'{ADE}/segmenter-original_vit-s-vqmoe_mask_8xb1-162k_ade20k-512x512.py': 'small',
    f'{ADE}/upernet_vit-b-vqmoe_mln_8xb2-160k_ade20k-512x512.py': 'base',
    'segmentation/segmenter_vit-4x128-vqmoe_mask_1xb8-600_camvid-192x192.py': 'tiny',
    'segmentation/segmenter_vit-4x96-vqmoe_mask_1xb64-1k_digits-48x48.py': 'tiny',
}
EVERY = [(leaf, size) for leaf in DATA_SETS for size in SIZES] + list(SMALL.items())


def run(config: Config, model: Any) -> None:
    """One image of the size of a crop."""
    size = config.model.data_preprocessor['size']
    with torch.inference_mode():
        logits = model(torch.empty(1, 3, *size, device='meta'), mode='tensor')
    classes = DATASETS.get(dataset(config).type).METAINFO['classes']
    assert logits.shape[:2] == (1, len(classes)) == (1, model.num_classes)
    if not model.with_neck:
        patch = model.routed_model.patch_embed.patch_size[0]
        assert logits.shape[2:] == (size[0] // patch, size[1] // patch)


@pytest.mark.parametrize(
    ('leaf', 'size', 'row'),
    [*every_two(DATA_SETS), *((leaf, size, row) for leaf, size in SMALL.items() for row in ROWS)],
)
def test_every_config_takes_every_row(
    leaf: str, size: str, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(str(CONFIGS / leaf), row_options(row, size, 'model.backbone'))
    model = build(config, monkeypatch)
    backbone = model.routed_model
    if leaf in DATA_SETS:
        assert backbone.embed_dim == SIZES[size]['embed_dim']
    routed = sum(hasattr(block.mlp, 'experts') for block in backbone.blocks)
    assert routed == (0 if row.startswith('dense') else 2)
    head = model.decode_head
    assert head.in_channels in (backbone.embed_dim, [backbone.embed_dim] * 4)
    run(config, model)


def test_heads_of_the_decoder_are_those_of_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, given in SIZES.items():
        config = load_config(str(CONFIGS / ADE / f'{ade20k(size, "smoe")}.py'))
        head = build(config, monkeypatch).decode_head
        assert (head.channels, head.cls_emb.shape[-1]) == (given['embed_dim'],) * 2
        assert {layer.attn.attn.num_heads for layer in head.layers} == {given['num_heads']}


@pytest.mark.parametrize('line', result_options('model.backbone'))
def test_rows_of_the_results_can_be_built(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = CONFIGS / 'segmentation/segmenter_vit-4x128-vqmoe_mask_1xb8-600_camvid-192x192.py'
    assert build(load_config(str(budget), parse_options(line)), monkeypatch).num_classes == 11


@pytest.mark.parametrize(('leaf', 'size'), EVERY)
def test_softmoe_has_two_slots_per_token(
    leaf: str, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(str(CONFIGS / leaf), row_options('softmoe', size, 'model.backbone'))
    backbone = build(config, monkeypatch).routed_model
    slots = {block.mlp.num_slots for block in backbone.blocks if hasattr(block.mlp, 'num_slots')}
    assert slots == {2 * backbone.patch_embed.num_patches}


@pytest.mark.parametrize('leaf', [*DATA_SETS[1::2], *list(SMALL)[-2:]])
def test_rows_are_matched_in_active_compute(leaf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    macs = {}
    for row in ROWS:
        config = load_config(str(CONFIGS / leaf), row_options(row, 'tiny', 'model.backbone'))
        macs[row] = complexity(build(config, monkeypatch).routed_model).macs
    dense = macs.pop('dense_1x')
    assert all(value > 1.05 * dense for value in macs.values())
    for row, value in macs.items():
        # SoftMoE's mixing, which grows with the square of the tokens, comes on top of its experts
        tolerance = 0.21 if row == 'softmoe' else 0.02
        assert value == pytest.approx(macs['dense_2x'], rel=tolerance), row


def changes(one: Any, other: Any, name: str = '') -> dict[str, Any]:
    """What `other` has where it differs from `one`, by dotted name."""
    if type(one) is type(other) is dict:
        return {
            key: value
            for part in one.keys() | other.keys()
            for key, value in changes(one.get(part), other.get(part), f'{name}.{part}').items()
        }
    if type(one) is type(other) is list and len(one) == len(other):
        pairs = zip(one, other, strict=True)
        return {
            k: v for i, (a, b) in enumerate(pairs) for k, v in changes(a, b, f'{name}.{i}').items()
        }
    return {} if one == other else {name.removeprefix('.'): other}


def flat(leaf: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """A config without the variables that its parts were made of."""
    config = load_config(str(CONFIGS / ADE / leaf), options).to_dict()
    return {k: v for k, v in config.items() if k not in ('train_pipeline', 'test_pipeline')}


LARGE = 'segmenter_vit-l-vqmoe_mask_8xb1-160k_ade20k-640x640.py'
AT_640 = {
    'model.data_preprocessor.size': (640, 640),
    'model.backbone.img_size': (640, 640),
    'model.test_cfg.crop_size': (640, 640),
    'train_dataloader.dataset.pipeline.2.scale': (2560, 640),
    'train_dataloader.dataset.pipeline.3.crop_size': (640, 640),
    'val_dataloader.dataset.pipeline.1.scale': (2560, 640),
    'test_dataloader.dataset.pipeline.1.scale': (2560, 640),
    # --tta sees sizes around the same
    **{
        f'tta_pipeline.1.transforms.0.{i}.scale': (640 * quarters, 160 * quarters)
        for i, quarters in enumerate(range(2, 8))
    },
}


def test_large_has_the_crops_of_its_reference() -> None:
    row = row_options('vqmoe', 'large', 'model.backbone')
    tiny = flat('segmenter_vit-t-vqmoe_mask_8xb1-160k_ade20k-512x512.py', row)
    assert changes(tiny, flat(LARGE)) == {**AT_640, 'model.test_cfg.stride': (608, 608)}


def test_the_original_schedule_of_every_size() -> None:
    page = (CONFIGS.parent / 'docs/segmentation.md').read_text()
    (line,) = re.findall(
        r'^python tools/train.py .*/segmenter-original_.*\\\n(.*)',
        page,
        re.M,
    )
    line = line.replace('--cfg-options', '').strip()
    assert parse_options(line) == row_options('vqmoe', 'large', 'model.backbone')
    original = 'segmenter-original_vit-s-vqmoe_mask_8xb1-162k_ade20k-512x512.py'
    ours = flat('segmenter_vit-s-vqmoe_mask_8xb1-160k_ade20k-512x512.py')
    schedule = changes(ours, flat(original))
    assert schedule == {
        'optim_wrapper.optimizer.nesterov': True,
        'train_cfg.max_iters': 161700,
        'train_cfg.val_interval': 16170,
        'default_hooks.checkpoint.interval': 16170,
        'param_scheduler.0.eta_min': 1e-5,
        'param_scheduler.0.end': 161700,
        'model.decode_head.drop_path_rate': 0.0,
        'model.decode_head.drop_rate': 0.1,
        'model.backbone.norm_eps': 1e-5,
        'model.test_cfg.stride': (512, 512),
    }
    # Large at 640, whose windows do not overlap either
    (printed,) = re.findall(r'```\n(python tools/train.py \S+/segmenter_vit-l.*?)```', page, re.S)
    words = shlex.split(printed.replace('\\\n', ' '))
    options = parse_options(' '.join(words[words.index('--cfg-options') + 1 :]))
    expected = flat(
        original, {**parse_options(line), **AT_640, 'model.test_cfg.stride': (640, 640)}
    )
    assert changes(expected, flat(words[2].removeprefix(f'configs/{ADE}/'), options)) == {}


def test_the_table_of_configs_says_what_they_have() -> None:
    page = (CONFIGS.parent / 'docs/segmentation.md').read_text()
    table = page.split('| config | data |')[1].split('\n\n')[0]
    found = set()
    for row in table.splitlines()[2:]:
        cells = [cell.strip() for cell in row.strip('|').split('|')]
        leaf = cells[0].strip('`').replace('SIZE-ROW', 't-vqmoe')
        found.add(f'segmentation/{leaf}.py')
        config = load_config(str(CONFIGS / f'segmentation/{leaf}.py'))
        if cells[3] != 'its own':
            file = Path(cells[3].strip('`'))
            folder = '_base_/schedules' if file.name == str(file) else 'segmentation'
            schedule = Config.fromfile(CONFIGS / folder / file)
            for name in ('optim_wrapper', 'param_scheduler'):
                assert config[name] == schedule[name]
        optimizer, rate = cells[4].split(', ')
        assert optimizer.startswith(config.optim_wrapper.optimizer.type)
        assert float(rate) == config.optim_wrapper.optimizer.lr
        assert int(re.sub(r'\D', '', cells[5])) == config.train_cfg.max_iters
        crop = config.model.data_preprocessor['size']
        assert cells[2].startswith('x'.join(str(side) for side in dict.fromkeys(crop)))
    others = {f'{ADE}/{ade20k(size, row)}.py' for size in SIZES for row in ('dense', *METHODS)}
    others.remove(DATA_SETS[0])
    assert found == {leaf for leaf in LEAVES if leaf not in others}


def test_the_page_says_which_configs_draw_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    page = (CONFIGS.parent / 'docs/scaling.md').read_text()
    (option,) = re.findall(r'scenes\s+of digits draw none with `(.*?)`', page)

    def drawing(leaf: str, options: str = '') -> set[str]:
        """Which parts of a model draw masks while it trains."""
        config = load_config(str(CONFIGS / leaf), parse_options(options))
        modules = build(config, monkeypatch).named_modules()
        rates = {name: getattr(m, 'drop_prob', getattr(m, 'p', 0)) for name, m in modules}
        return {name.split('.')[0] for name, rate in rates.items() if rate}

    for leaf in (*DATA_SETS, *SMALL):
        assert drawing(leaf)
        if 'vit-4x' in leaf:
            # a default of mmseg's, of which their configs say nothing
            assert drawing(leaf) == {'decode_head'} and not drawing(leaf, option)


def test_albumentations_replace_flips_and_colours() -> None:
    other = flat('segmenter_vit-s-vqmoe_mask_8xb1-albu-160k_ade20k-512x512.py')
    (changed,) = changes(
        flat('segmenter_vit-s-vqmoe_mask_8xb1-160k_ade20k-512x512.py'), other
    ).items()
    name, pipeline = changed
    assert name == 'train_dataloader.dataset.pipeline'
    assert [step['type'] for step in pipeline[-2:]] == ['Albumentations', 'PackSegInputs']
    ours = flat('segmenter_vit-s-vqmoe_mask_8xb1-160k_ade20k-512x512.py')['train_dataloader'][
        'dataset'
    ]['pipeline']
    assert pipeline[:-2] == ours[:-3]


def test_upernet_is_trained_as_its_reference() -> None:
    mmseg_configs = Path(mmseg.__file__).parent / '.mim/configs/vit'
    theirs = Config.fromfile(mmseg_configs / 'vit_deit-b16_upernet_8xb2-160k_ade20k-512x512.py')
    ours = load_config(str(CONFIGS / ADE / 'upernet_vit-b-vqmoe_mln_8xb2-160k_ade20k-512x512.py'))
    assert ours.optim_wrapper.optimizer == theirs.optim_wrapper.optimizer
    for a, b in zip(ours.param_scheduler, theirs.param_scheduler, strict=True):
        assert {**a, 'type': a.type} == b
    assert ours.train_cfg.max_iters == theirs.train_cfg.max_iters
    assert ours.train_dataloader.batch_size == 8 * theirs.train_dataloader.batch_size
    assert ours.model.test_cfg == theirs.model.test_cfg
    assert ours.model.data_preprocessor['size'] == theirs.model.data_preprocessor['size']
    for head in ('decode_head', 'auxiliary_head'):
        shared = (ours.model[head].keys() & theirs.model[head].keys()) - {'norm_cfg'}
        assert {'loss_decode', 'channels', 'in_index', 'dropout_ratio'} <= shared
        assert all(ours.model[head][k] == theirs.model[head][k] for k in shared)


def dataset(config: Config, split: str = 'train') -> Any:
    return config[f'{split}_dataloader'].dataset


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


def _one_of_each_data() -> list[str]:
    """Configs, of those that differ in the model alone one."""
    found: dict[str, str] = {}
    for leaf in LEAVES:
        config = load_config(str(CONFIGS / leaf), import_modules=False).to_dict()
        names = ('train_dataloader', 'val_dataloader', 'test_dataloader', 'tta_pipeline')
        found.setdefault(repr([config[name] for name in names]), leaf)
    return list(found.values())


@pytest.mark.parametrize('leaf', _one_of_each_data())
def test_pipelines_run(leaf: str, tmp_path: Path) -> None:
    config = load_config(str(CONFIGS / leaf))
    files = next((files for name, files in FILES.items() if name in leaf), None)
    if files is not None:
        image, label, splits = files
        labels = np.random.default_rng(0).integers(1, 5, (45, 60))
        for split in splits:
            write_pair(tmp_path, image.format(split), label.format(split), labels)
            lists = tmp_path / 'ImageSets/SegmentationContext'
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f'{split}.txt').write_text('a\n')
    pipelines = [
        ('train', None), ('val', None), ('test', None), ('test', config.tta_pipeline)
    ]  # fmt: skip
    shapes = []
    for split, pipeline in pipelines:
        settings = dataset(config, split).copy()
        if files is not None:
            # one pair of each kind, of which nothing can be set aside
            settings.update(data_root=str(tmp_path), part='all')
        if pipeline is not None:
            settings.pipeline = pipeline
        sample = DATASETS.build(settings)[0]
        versions = sample['inputs'] if pipeline is not None else [sample['inputs']]
        for tensor in versions:
            assert tensor.dtype == torch.uint8 and tensor.ndim == 3
        shapes.append([tuple(tensor.shape) for tensor in versions])
        samples = sample['data_samples']
        first = samples[0] if pipeline is not None else samples
        found = first.gt_sem_seg.data.unique().tolist()
        assert set(found) <= {*range(config.model.decode_head.num_classes), 255}
    # --tta has smaller and larger versions of what a test sees, and that itself
    *_, [tested], augmented = shapes
    assert tested in augmented and min(augmented) < tested < max(augmented)
