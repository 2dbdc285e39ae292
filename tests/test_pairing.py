"""One seed is one pair: every row sees the same images and starts from the same shared tensors."""

import gc
import hashlib
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from vqmoe_vision.classification.datasets import ImageClassification, digits
from vqmoe_vision.comparison.spec import FEATURE_ROWS, PRESET_ROWS
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.moe import METHODS

from . import cases
from .rows import CONFIGS, DIGITS, ROWS, SCENES, row_options

# a method's presets are the same layers in both tasks
PAIRED = {
    'classification': (*ROWS, *FEATURE_ROWS, *PRESET_ROWS),
    'segmentation': (*ROWS, *FEATURE_ROWS),
}
# Presets with experts of their own number and width.
OWN = [r for r, (m, p) in PRESET_ROWS.items() if 'num_experts' in METHODS[m].config.PRESETS[p]]
SIZES = {'patch_size': 16, 'depth': 4, 'embed_dim': 12, 'num_heads': 3}
# two iterations, a validation, and on: into the next epoch
EPOCHS = {
    'train_dataloader.batch_size': 4,
    'train_dataloader.dataset.type': 'few_digits',
    'val_dataloader.dataset.type': 'few_digits',
    'train_cfg.val_interval': 1,
}
# two iterations are all scenes; a validation after the second, and on: all scenes again
ITERATIONS = {
    'train_dataloader.batch_size': 2,
    'train_dataloader.dataset.num_scenes': 4,
    'train_dataloader.persistent_workers': False,
    'val_dataloader.dataset.num_scenes': 1,
    'train_cfg.val_interval': 2,
    'model.decode_head.num_layers': 1,
    'model.test_cfg.stride': (48, 48),
}
# torchvision's augmentation draws from torch's generator, as routers do
CROP_FLIP = dict(_delete_=True, type='crop_flip', input_size=48, mean=[0.0] * 3, std=[1.0] * 3)
# a config of each kind, where it holds the timm model, and its options; the transform of the first
# is timm's, which draws from python's generator
KINDS = {
    'timm': (DIGITS, 'model', EPOCHS),
    'classification': (DIGITS, 'model', EPOCHS | {'train_dataloader.dataset.transform': CROP_FLIP}),
    'segmentation': (SCENES, 'model.backbone', ITERATIONS),
}
TASKS = pytest.mark.parametrize('task', PAIRED)


@DATASETS.register_module()
def few_digits(**options: Any) -> ImageClassification:
    dataset = digits(**options)
    dataset.source = dataset.source[:8]
    return dataset


class EnoughError(Exception):
    """Ends a run."""


class Keep(Hook):
    """How a run starts, and what its model is shown in four iterations around a validation."""

    validated = False

    def before_train(self, runner: Runner) -> None:
        self.start, self.images = deepcopy(runner.model.state_dict()), list[str]()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        inputs = data_batch['inputs'] if isinstance(data_batch, dict) else data_batch[0]
        batch = torch.stack(list(inputs)).numpy()
        self.images.append(hashlib.sha256(batch.tobytes()).hexdigest())
        if len(self.images) == 4:
            assert self.validated
            raise EnoughError

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        assert len(self.images) == 2
        self.validated = True


@pytest.fixture(scope='module')
def keep(tmp_path_factory):
    @cache
    def run(kind: str, row: str, num_workers: int = 0, seed: int = 1) -> Keep:
        leaf, model, options = KINDS[kind]
        folder = tmp_path_factory.mktemp('run')
        given = row_options(row, model=model) | options
        given |= {f'{model}.{name}': value for name, value in SIZES.items()}
        given |= {'train_dataloader.num_workers': num_workers, 'randomness.seed': seed}
        given |= features(kind, model, folder) if row in FEATURE_ROWS else {}
        given |= {f'{model}.moe.num_clusters': 4} if row == FEATURE_ROWS[0] else {}
        config = load_config(str(CONFIGS / leaf), given)
        config.work_dir = str(folder)
        config.experiment_name = f'{kind}_{row}_{num_workers}_{seed}'
        config.visualizer.vis_backends = []
        runner, hook = Runner.from_cfg(config), Keep()
        runner.register_hook(hook)
        with pytest.raises(EnoughError):
            runner.train()
        # as garbage, whose queues may go first, each worker is waited for five seconds
        for left in gc.get_objects() if num_workers else ():
            if isinstance(left, _MultiProcessingDataLoaderIter):
                left._shutdown_workers()
        return hook

    def features(kind: str, model: str, folder: Path) -> dict[str, Any]:
        torch.save({'state_dict': run(kind, 'dense_1x').start}, folder / 'dense.pth')
        return {f'{model}.features': str(folder / 'dense.pth')}

    return run


def shared(one: Keep, other: Keep) -> list[str]:
    return [k for k, v in one.start.items() if k in other.start and v.shape == other.start[k].shape]


@cases('task, row', *((task, row) for task, rows in PAIRED.items() for row in rows))
def test_rows_at_one_seed_are_a_pair(keep, task, row):
    dense, other = keep(task, 'dense_1x'), keep(task, row)
    names = shared(dense, other)
    assert len(names) > 0.6 * len(dense.start)  # but the MLPs that are experts, or wider
    assert [k for k in names if not torch.equal(dense.start[k], other.start[k])] == []
    assert dense.images == other.images
    assert len(set(dense.images)) == 4


@TASKS
def test_experts_start_alike_whatever_routes_to_them(keep, task):
    routed = [row for row in PAIRED[task] if not row.startswith('dense') and row not in OWN]
    rows = [keep(task, row) for row in routed]
    for row in rows[1:]:
        experts = [name for name in shared(rows[0], row) if '.experts.' in name]
        assert len(experts) == 8  # two layers with weight and bias in two blocks
        assert all(torch.equal(rows[0].start[k], row.start[k]) for k in experts)


@cases(
    'kind, row',
    *(('timm', row) for row in ('dense_2x', 'smoe', 'vqmoe', FEATURE_ROWS[0])),
    *((kind, 'smoe') for kind in KINDS if kind != 'timm'),
)
def test_the_number_of_workers_changes_no_image(keep, kind, row):
    assert keep(kind, row, num_workers=2).images == keep(kind, 'dense_1x').images


@TASKS
def test_another_seed_is_another_pair(keep, task):
    one, other = keep(task, 'vqmoe'), keep(task, 'vqmoe', seed=2)
    assert not set(one.images) & set(other.images)
    # what is constant, or told by the config, is no draw
    drawn = {k: v for k, v in one.start.items() if v.is_floating_point() and v.unique().numel() > 1}
    assert {k for k, v in drawn.items() if torch.equal(v, other.start[k])} <= {'normalization'}
