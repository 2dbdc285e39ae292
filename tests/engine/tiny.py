"""A training of digits in twenty iterations of a model of a few hundred weights."""

from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

from vqmoe_vision.engine.cli import load_config

from .. import rows

DIGITS = rows.CONFIGS / rows.DIGITS
OPTIONS = {
    'model.depth': 2,
    'model.embed_dim': 12,
    'model.patch_size': 16,
    # 309 images of 1,257, which are most of a tiny training's time: 10 batches
    'train_dataloader.dataset.imbalance': 100,
    'train_dataloader.batch_size': 30,
    'train_cfg.max_epochs': 2,
    'train_cfg.val_interval': 1,
    'param_scheduler.1.end': 3,
    'default_hooks.checkpoint.interval': 1,
}
NO_VALIDATION = {
    **dict.fromkeys(('val_cfg', 'val_dataloader', 'val_evaluator')),
    'default_hooks.checkpoint.save_best': None,
}
TRANSFORM = dict(type='timm', input_size=8, mean=[0.5] * 3, std=[0.5] * 3)
# the same as a file, of three iterations an epoch
TINY = f"""
_base_ = {str(DIGITS)!r}
model = dict(patch_size=16, embed_dim=12, depth=2, num_heads=3, moe=dict(num_experts=2))
train_dataloader = dict(batch_size=100, dataset=dict(imbalance=100))  # 309 images
train_cfg = dict(max_epochs=2, val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1))
"""


def write_config(folder: Path) -> str:
    # mmengine keeps one logger per name in a process
    (folder / 'tiny.py').write_text(f'{TINY}experiment_name = {folder.name!r}\n')
    return str(folder / 'tiny.py')


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (8, 8)).save(path)


def config_of(folder: Path, **more: Any) -> Config:
    config = load_config(str(DIGITS), {**OPTIONS, **more})
    # mmengine keeps one logger per name in a process
    config.work_dir, config.experiment_name = str(folder), f'{folder.parent.name}_{folder.name}'
    return config


def resumed(folder: Path, **more: Any) -> Config:
    config = config_of(folder, **more)
    config.resume, config.experiment_name = True, f'{config.experiment_name} goes on {len(more)}'
    return config


def trained(config: Config) -> Runner:
    runner = Runner.from_cfg(config)
    runner.train()
    return runner
