"""One seed is one pair: every row sees the same images and starts from the same shared tensors."""

from functools import cache
from typing import Any

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from vqmoe_vision.engine.cli import load_config

from .rows import CONFIGS, ROWS, row_options

# a config of each task, where it holds the timm model, and its loss
CLASSIFICATION = ('classification/digits/demo/vit_tiny_vqmoe_demo.py', 'model')
SEGMENTATION = (
    'segmentation/digit_scenes/segmenter_vit_tiny_vqmoe_digit_scenes.py',
    'model.backbone',
)
TASKS = pytest.mark.parametrize(
    'task', [CLASSIFICATION, SEGMENTATION], ids=['classification', 'segmentation']
)
CROP_FLIP = dict(type='crop_flip', input_size=48, mean=(0.0,) * 3, std=(1.0,) * 3)
LOADER = {'batch_size': 4, 'persistent_workers': False}


class EnoughError(Exception):
    """Ends a run."""


class Keep(Hook):
    """How a run starts, and what its model is shown in three iterations."""

    def before_train(self, runner: Runner) -> None:
        self.start = {k: v.clone() for k, v in runner.model.state_dict().items()}
        self.images: list[Tensor] = []

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        inputs = data_batch['inputs'] if isinstance(data_batch, dict) else data_batch[0]
        self.images.append(torch.stack(list(inputs)))
        if len(self.images) == 3:
            raise EnoughError


@pytest.fixture(scope='module')
def keep(tmp_path_factory):
    """Runs a row of a task."""

    @cache
    def run(task: tuple[str, str], row: str, num_workers: int = 0, seed: int = 1) -> Keep:
        leaf, model = task
        small = {'depth': 4, 'embed_dim': 12, 'num_heads': 3}
        loader = {**LOADER, 'num_workers': num_workers}
        options = {
            **row_options(row, model=model),
            **{f'{model}.{name}': value for name, value in small.items()},
            **{f'train_dataloader.{name}': value for name, value in loader.items()},
            'randomness.seed': seed,
        }
        config = load_config(str(CONFIGS / leaf), options)
        if 'transform' in config.train_dataloader.dataset:
            # it draws from torch's generator, as routers do; timm's draws from python's
            config.train_dataloader.dataset.transform = CROP_FLIP
        config.work_dir = str(tmp_path_factory.mktemp('run'))
        config.experiment_name = f'{row}_{num_workers}_{seed}_{len(model)}'
        config.visualizer.vis_backends = []
        runner = Runner.from_cfg(config)
        hook = Keep()
        runner.register_hook(hook)
        with pytest.raises(EnoughError):
            runner.train()
        return hook

    return run


def shared(one: Keep, other: Keep) -> list[str]:
    """Names of the tensors that two rows have in common."""
    return [k for k, v in one.start.items() if k in other.start and v.shape == other.start[k].shape]


@TASKS
@pytest.mark.parametrize('row', ROWS)
def test_rows_at_one_seed_are_a_pair(keep, task, row: str) -> None:
    dense, other = keep(task, 'dense'), keep(task, row)
    names = shared(dense, other)
    assert len(names) > 0.6 * len(dense.start)  # but the MLPs that are experts, or wider
    assert [k for k in names if not torch.equal(dense.start[k], other.start[k])] == []
    assert torch.equal(torch.stack(dense.images), torch.stack(other.images))


@TASKS
def test_experts_start_alike_whatever_routes_to_them(keep, task) -> None:
    rows = [keep(task, row) for row in ROWS if not row.startswith('dense')]
    for row in rows[1:]:
        experts = [name for name in shared(rows[0], row) if '.experts.' in name]
        assert len(experts) == 8  # two layers with weight and bias in two blocks
        assert all(torch.equal(rows[0].start[k], row.start[k]) for k in experts)


@TASKS
def test_the_number_of_workers_changes_no_image(keep, task) -> None:
    images = [torch.stack(keep(task, 'smoe', n).images) for n in (0, 1, 2)]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


@TASKS
def test_another_seed_is_another_pair(keep, task) -> None:
    one, other = keep(task, 'vqmoe'), keep(task, 'vqmoe', seed=2)
    assert not torch.equal(torch.stack(one.images), torch.stack(other.images))
    told = {'normalization'}  # by the config
    drawn = [
        name
        for name, value in one.start.items()
        if value.is_floating_point() and value.unique().numel() > 1 and name not in told
    ]
    assert [k for k in drawn if torch.equal(one.start[k], other.start[k])] == []
