"""ADE20K from ImageNet weights: two iterations with experts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from vqmoe_vision.engine.checkpoint import read_content

from ..rows import CONFIGS
from ..runs import train
from .conftest import write_pair

ADE = CONFIGS / 'segmentation/ade20k'
SIZES: dict[str, Any] = dict(patch_size=16, depth=4, embed_dim=12, num_heads=3)
# crops and windows of 64 pixels
SMALL = [
    'model.data_preprocessor.size=(64,64)',
    'model.backbone.img_size=(64,64)',
    'model.test_cfg.crop_size=(64,64)',
    'model.test_cfg.stride=(60,60)',
    'train_dataloader.dataset.pipeline.2.scale=(256,64)',
    'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
    'val_dataloader.dataset.pipeline.1.scale=(256,64)',
]
TINY = """
_base_ = BASE
model = dict(backbone=BACKBONE, decode_head=dict(num_layers=1))
data = dict(data_root=ROOT, dev_size=2)
loader = dict(batch_size=2, num_workers=0, persistent_workers=False)
train_dataloader = dict(dataset=data, **loader)
val_dataloader = dict(dataset=data, **loader)
test_dataloader = dict(dataset=dict(data_root=ROOT), **loader)
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2))
del data, loader
"""


@pytest.mark.parametrize('way', ['pretrained', 'checkpoint'])
def test_two_iterations(way: str, tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 151, (40, 60))
    for name in 'abcd':
        image, label = f'images/training/{name}.jpg', f'annotations/training/{name}.png'
        write_pair(tmp_path / 'data', image, label, labels)
    dense: Any = timm.create_model('vit_small_patch16_384', img_size=96, **SIZES)
    path = str(tmp_path / 'dense.pth')  # in the place of the hub
    torch.save(dense.state_dict(), path)
    given = dict(pretrained=True, pretrained_cfg_overlay=dict(file=path))
    if way == 'checkpoint':
        given = dict(pretrained=False, checkpoint=path)
    base = ADE / 'segmenter_vit-s-vqmoe-in21k-pre_mask_8xb1-160k_ade20k-512x512.py'
    backbone = {**SIZES, 'moe': dict(num_experts=2), **given}
    text = TINY.replace('BASE', repr(str(base))).replace('BACKBONE', repr(backbone))
    (tmp_path / 'tiny.py').write_text(text.replace('ROOT', repr(f'{tmp_path}/data')))
    # nothing moves: what a run saves is what it has started from
    still = [*SMALL, 'optim_wrapper.optimizer.lr=0.0', 'param_scheduler=[]']
    train(tmp_path / 'tiny.py', tmp_path / 'w', *still)
    state = read_content(str(tmp_path / 'w/iter_2.pth'))['state_dict']
    assert state['normalization'].unique().tolist() == [0.5]
    for weight in state['backbone.model.blocks.3.mlp.experts.fc1.weight']:
        assert torch.equal(weight, dense.state_dict()['blocks.3.mlp.fc1.weight'])
    assert state['backbone.model.pos_embed'].shape == (1, 17, 12)
