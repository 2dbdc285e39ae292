"""A user's own images, with the config of docs/how-to/own-data.md in a folder outside the clone."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqmoe_vision.classification import datasets

from ..rows import printed_config
from ..runs import score, train

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


def test_trains_and_tests(tmp_path: Path) -> None:
    for name in [f'{split}/{name}' for split in ('train', 'val') for name in ('cat', 'dog', 'owl')]:
        (tmp_path / 'data' / name).mkdir(parents=True)
        for side in (20, 50):
            pixels = np.random.randint(0, 256, (side, 30, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / 'data' / name / f'{side}.jpg')
    (tmp_path / 'mine.py').write_text(printed_config('Classification', str(tmp_path / 'data')))
    (tmp_path / 'tiny.py').write_text(TINY)
    work = train(tmp_path / 'tiny.py', tmp_path / 'w')
    metrics = score(tmp_path / 'tiny.py', work / 'epoch_1.pth', work)
    assert 0 <= metrics['accuracy/top1'] <= 100 == metrics['accuracy/top5']


def test_files_that_are_left_out_for_their_ending_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ('cat/a.png', 'cat/b.heic', 'cat/c.gif'):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new('RGB', (4, 4)).save(path, 'png')
    told: list[str] = []
    monkeypatch.setattr(datasets, 'print_log', lambda text, *_: told.append(text))
    assert len(datasets._image_folder(tmp_path)) == 1
    assert len(told) == 1 and '2 files are left out' in told[0]
