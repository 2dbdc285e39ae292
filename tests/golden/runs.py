"""A run of each task, tiny, made once by `tools/train.py` for all files of pins."""

import functools
from pathlib import Path

from ..forked import ROOT, run_tool

# SMoE: ECMoE's tensors have the same names and shapes
BACKBONE = "model_name='vit_tiny_smoe', embed_dim=12, num_heads=3, moe=dict(num_experts=2), "
TINY = f"""
_base_ = {str(ROOT / 'configs/classification/digits/demo/vit_tiny_vqmoe_demo.py')!r}
model = dict({BACKBONE} depth=2, patch_size=16)
train_dataloader = dict(batch_size=600)
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1))
"""
LOADER = 'batch_size=2, num_workers=0, persistent_workers=False'
DIGIT_SCENES = 'configs/segmentation/segmenter_vit-4x96-vqmoe_mask_1xb64-1k_digits-48x48.py'
SCENES = f"""
_base_ = {str(ROOT / DIGIT_SCENES)!r}
model = dict(backbone=dict({BACKBONE} depth=2, patch_size=16), decode_head=dict(num_layers=1))
train_dataloader = dict({LOADER}, dataset=dict(num_scenes=4))
test_dataloader = dict(dataset=dict(num_scenes=2))
train_cfg = dict(max_iters=1, val_interval=9)
default_hooks = dict(checkpoint=dict(interval=1, save_best=None))
"""


@functools.cache
def runs_in(base: Path) -> Path:
    """A folder with tiny.py and its run c, scenes.py and its run s.

    Args:
        base: Where the folder is made.
    """
    folder = base / 'golden-runs'
    folder.mkdir()
    for work, (config, text) in {'c': ('tiny.py', TINY), 's': ('scenes.py', SCENES)}.items():
        (folder / config).write_text(text)
        done = run_tool('train.py', config, '--work-dir', work, folder=folder)
        assert done.returncode == 0, done.stderr
    return folder
