"""Fine-tuning from dense weights: two iterations of each config, averages, early stopping."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from vqmoe_vision.classification import datasets
from vqmoe_vision.engine.checkpoint import read_content
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.publish import publish

from .. import cases
from ..rows import CONFIGS, leaves, printed_config
from ..runs import score, train

FOLDERS = 'classification/finetune/class_folders.py'
SIZES: dict[str, Any] = dict(embed_dim=12, depth=4, num_heads=3)
NAME = 'vit_small_patch16_224.augreg_in21k_ft_in1k'


def write_images(root: Path, classes: list[str], *sizes: tuple[int, int]) -> None:
    for folder in [root / split / name for split in ('train', 'val') for name in classes]:
        folder.mkdir(parents=True)
        for number, size in enumerate(sizes):
            pixels = np.random.randint(0, 256, (*size, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f'{number}.png')


def write_config(folder: Path, leaf: str, **model: Any) -> str:
    """A config beside tiny data and a tiny dense checkpoint; an epoch has two iterations."""
    classes = 100 if 'cifar100' in leaf else 3 if leaf == FOLDERS else 10
    write_images(folder / 'data', [f'{i:03}' for i in range(classes)], *[(8, 8)] * 4)
    images = dict(img_size=32, patch_size=8)
    dense = timm.create_model('vit_small_patch16_224', num_classes=7, **images, **SIZES)
    torch.save(dense.state_dict(), folder / 'dense.pth')
    given = dict(pretrained=False, checkpoint=str(folder / 'dense.pth')) | model
    data = dict(data_root=str(folder / 'data'), transform=dict(input_size=32))
    held_out = 0 if leaf == FOLDERS else classes
    batch = (classes * 4 - held_out) // 4 * 2  # mixup wants an even number
    lines = [
        f'_base_ = {str(CONFIGS / leaf)!r}',
        f'model = {dict(img_size=32, moe=dict(num_experts=2), **SIZES) | given}',
        f'data = dict(dev_size={held_out}, **{data})',
        f'train_dataloader = dict(num_workers=0, batch_size={batch}, dataset=data)',
        'val_dataloader = dict(num_workers=0, dataset=data)',
        'test_dataloader = val_dataloader',
        'train_cfg = dict(max_epochs=1)',
        'del data',
    ]
    (folder / 'tiny.py').write_text('\n'.join(lines))
    return str(folder / 'tiny.py')


def content(work: Path, epoch: int = 1) -> Any:
    return read_content(str(work / f'epoch_{epoch}.pth'))


def log(work: Path) -> str:
    return next(work.glob('*/*.log')).read_text()


@pytest.mark.parametrize('leaf', leaves('classification/finetune'))
def test_two_iterations_of_each_config(leaf, tmp_path):
    config = write_config(tmp_path, leaf)
    work = train(config, tmp_path / 'w')
    saved = content(work)
    assert saved['meta']['iter'] == 2
    assert 'made of dense MLPs: blocks.1.mlp.experts.fc1.weight' in log(work)
    groups = saved['optimizer']['param_groups']
    rates = sorted({round(group['initial_lr'] / groups[-1]['initial_lr'], 6) for group in groups})
    assert rates == sorted({round(0.65**i, 6) for i in range(6)})
    assert 0 <= score(config, work / 'epoch_1.pth', work)['accuracy/top1'] <= 100


def test_weights_by_name_bring_their_normalisation(tmp_path):
    file = dict(file=str(tmp_path / 'dense.pth'))  # in the place of the hub
    given = dict(pretrained=True, checkpoint=None, pretrained_cfg_overlay=file, patch_size=8)
    config = write_config(tmp_path, FOLDERS, **given)
    work = train(config, tmp_path / 'w', 'optim_wrapper.optimizer.lr=0.0')
    state = content(work)['state_dict']
    assert state['normalization'].unique().tolist() == [0.5]  # the config has ImageNet's
    dense = torch.load(file['file'])
    for expert in state['model.blocks.1.mlp.experts.fc1.weight']:
        assert torch.equal(expert, dense['blocks.1.mlp.fc1.weight'])
    for line in ('the head is a fresh one', 'made of dense MLPs: blocks.1.mlp.experts.fc1.weight'):
        assert f'dense.pth: {line}' in log(work)
    publish([str(work), str(tmp_path / 'out')])
    model = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[f'model.{name}'])


MOE: Any = dict(_delete_=True, num_experts=2)
OWN: Any = dict(model_name='vit_small_smoe', pretrained=False, moe=MOE)


@cases(
    'given',
    dict(pretrained=True, pretrained_cfg_overlay=dict(file='{}/model.safetensors')),
    dict(OWN, upcycle='local-dir:{}'),
    dict(OWN, checkpoint='{}/model.safetensors'),
    ids=lambda given: ' '.join(given),
)
def test_nobody_needs_what_a_run_started_from(given, tmp_path):
    source = tmp_path / 'source'
    dense = timm.create_model('deit_tiny_patch16_224', img_size=32, patch_size=8, **SIZES)
    save_for_hf(dense, source, safe_serialization=True)
    given = json.loads(json.dumps(given).replace('{}', str(source)))
    config = write_config(tmp_path, FOLDERS, patch_size=8, **{'checkpoint': None, **given})
    whole = train(config, tmp_path / 'whole', 'train_cfg.max_epochs=2')
    work = train(config, tmp_path / 'w')
    before = score(config, work / 'epoch_1.pth', work)
    shutil.rmtree(source)
    assert score(config, work / 'epoch_1.pth', work) == before
    train(config, work, 'train_cfg.max_epochs=2', resume=True)
    expected, found = content(whole, 2), content(work, 2)
    assert found['state_dict']['normalization'][0, 0] == pytest.approx(0.485)
    assert found['param_schedulers'] == expected['param_schedulers']
    for part in ('state_dict', 'optimizer'):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
    assert load_config(str(work / 'tiny.py')).model == load_config(str(whole / 'tiny.py')).model
    publish([str(work), str(tmp_path / 'out')])
    published: Any = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    assert published.pretrained_cfg['mean'][0] == pytest.approx(0.485)


TINY = """
_base_ = 'mine.py'
model = dict(img_size=32, depth=4, embed_dim=12, num_heads=3, moe=dict(num_experts=2))
small = dict(num_workers=0, dataset=dict(transform=dict(input_size=32)))
train_dataloader = dict(batch_size=4, **small)
val_dataloader = small
test_dataloader = small
train_cfg = dict(max_epochs=1)
param_scheduler = []
del small
"""


def test_trains_and_tests(tmp_path):
    write_images(tmp_path / 'data', ['cat', 'dog', 'owl'], (20, 30), (50, 30))
    (tmp_path / 'mine.py').write_text(printed_config('Classification', str(tmp_path / 'data')))
    (tmp_path / 'tiny.py').write_text(TINY)
    work = train(tmp_path / 'tiny.py', tmp_path / 'w')
    metrics = score(tmp_path / 'tiny.py', work / 'epoch_1.pth', work)
    assert 0 <= metrics['accuracy/top1'] <= 100 == metrics['accuracy/top5']


def test_files_that_are_left_out_for_their_ending_are_told(tmp_path, monkeypatch):
    (tmp_path / 'cat').mkdir()
    for name in ('a.png', 'b.heic', 'c.gif'):
        Image.new('RGB', (4, 4)).save(tmp_path / 'cat' / name, 'png')
    told: list[str] = []
    monkeypatch.setattr(datasets, 'print_log', lambda text, *_: told.append(text))
    assert len(datasets._image_folder(tmp_path)) == 1
    assert len(told) == 1 and '2 files are left out' in told[0]
