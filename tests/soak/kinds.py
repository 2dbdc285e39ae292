"""Kinds of training that the kills are tried on: tiny, each of a few seconds; and what is alike."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
TINY = (
    'patch_size=16, embed_dim=12, depth=2, num_heads=3, moe=dict(num_experts=2, _delete_=True MOE)'
)
CLASSIFICATION = f"""
_base_ = {str(ROOT / 'configs/classification/digits/demo/vit_tiny_vqmoe_demo.py')!r}
model = dict(model_name=METHOD, drop_path_rate=0.2, {TINY})
train_dataloader = dict(batch_size=300)  # four iterations an epoch
train_cfg = dict(max_epochs=3, val_interval=1)
default_hooks = dict(reached=dict(type='ReachedHook'), checkpoint=dict(CHECKPOINT), MORE)
"""
SCENES = ROOT / 'configs/segmentation/segmenter_vit-4x96-vqmoe_mask_1xb64-1k_digits-48x48.py'
FOUR_SCENES = """
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False, dataset=dict(num_scenes=4),
    sampler=dict(type='SeededInfiniteSampler'),
)
val_dataloader = dict(batch_size=2, dataset=dict(num_scenes=2))
test_dataloader = val_dataloader
param_scheduler = [dict(type='LinearLR', start_factor=0.1, end=6, by_epoch=False)]
"""
SEGMENTATION = f"""
_base_ = {str(SCENES)!r}
model = dict(backbone=dict(model_name=METHOD, {TINY}), decode_head=dict(num_layers=1))
train_cfg = dict(max_iters=9, val_interval=3)
default_hooks = dict(reached=dict(type='ReachedHook'), checkpoint=dict(CHECKPOINT), MORE)
{FOUR_SCENES}"""
# the loop of mmengine that is counted in iterations, and goes through three epochs
ITERATIONS = f"""{CLASSIFICATION}
train_cfg = dict(_delete_=True, by_epoch=False, max_iters=10, val_interval=5)
param_scheduler = [dict(type='LinearLR', start_factor=0.1, end=6, by_epoch=False)]
log_processor = dict(by_epoch=False)
"""
AVERAGES = {'MORE': "ema=dict(type='EMAHook', momentum=0.1)"}
STABLE = {'METHOD': "'vit_tiny_stablemoe'", 'MOE': ', stage1_steps=5'}


@dataclass(frozen=True)
class Kind:
    config: str
    interval: int
    values: dict[str, str]
    arguments: tuple[str, ...] = ()

    def write(self, folder: Path) -> Path:
        text = self.config
        for word in ('METHOD', 'MOE', 'CHECKPOINT', 'MORE'):
            text = text.replace(word, self.values.get(word, ''))
        path = folder / 'config.py'
        path.write_text(text)
        return path


VQMOE = {'METHOD': "'vit_tiny_vqmoe'"}
BY_3 = {'CHECKPOINT': 'interval=3, by_epoch=False'}
EACH, SECOND = {'CHECKPOINT': 'interval=1'}, {'CHECKPOINT': 'interval=2'}
ADDED = CLASSIFICATION + 'optim_wrapper = dict(accumulative_counts=3)\n'
KINDS = {
    'classification': Kind(CLASSIFICATION, 4, VQMOE | EACH),
    'classification, iterations, StableMoE, EMA': Kind(CLASSIFICATION, 3, STABLE | BY_3 | AVERAGES),
    'classification, loop over iterations': Kind(ITERATIONS, 3, VQMOE | BY_3),
    'classification, accumulation': Kind(ADDED, 4, VQMOE | EACH),
    'segmentation, EMA': Kind(SEGMENTATION, 2, VQMOE | SECOND | AVERAGES),
    'segmentation, StableMoE, AMP': Kind(SEGMENTATION, 2, STABLE | SECOND, ('--amp',)),
}


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
