"""A user's own images, with the config of docs/own-data.md in a folder outside the clone."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqmoe_vision.classification import datasets
from vqmoe_vision.engine import cli

from ..rows import printed_config

TINY = """
_base_ = 'mine.py'
model = dict(img_size=32, depth=4, embed_dim=12, num_heads=3, moe=dict(num_experts=2))
small = dict(num_workers=0, dataset=dict(transform=dict(input_size=32)))
train_dataloader = dict(batch_size=4, **small)
val_dataloader = small
test_dataloader = small
train_cfg = dict(max_epochs=1)
param_scheduler = []
experiment_name = NAME  # mmengine keeps one logger per name in a process
del small
"""


def write_config(folder: Path, classes: dict[str, tuple[str, ...]]) -> str:
    rng = np.random.default_rng(0)
    for split, names in classes.items():
        for name in names:
            (folder / 'data' / split / name).mkdir(parents=True)
            for i, side in enumerate((20, 50)):
                image = Image.fromarray(rng.integers(0, 256, (side, 30, 3), np.uint8))
                image.save(folder / 'data' / split / name / f'{i}.jpg')
    (folder / 'mine.py').write_text(printed_config('Classification', str(folder / 'data')))
    (folder / 'tiny.py').write_text(TINY.replace('NAME', repr(f'own {folder}')))
    return str(folder / 'tiny.py')


def test_trains_and_tests(tmp_path: Path) -> None:
    names = ('cat', 'dog', 'owl')
    config = write_config(tmp_path, dict(train=names, val=names))
    work = ['--work-dir', str(tmp_path / 'w')]
    cli.train([config, *work])
    checkpoint, out = str(tmp_path / 'w/epoch_1.pth'), tmp_path / 'm.json'
    cli.test([config, checkpoint, *work, '--out', str(out), '--cfg-options', 'experiment_name=c'])
    metrics = json.loads(out.read_text())
    assert 0 <= metrics['accuracy/top1'] <= 100 == metrics['accuracy/top5']


@pytest.mark.parametrize(
    ('last', 'options', 'message'),
    [
        (None, [], r'num_classes=3, but the data set has 2 classes \(cat, dog'),
        ('elk', [], r'different classes: only one of them has elk, owl'),
        ('owl', ['train_dataloader.batch_size=7'], r'=7 .* at most 6'),
        ('owl', ['model.mixup={}', 'train_dataloader.batch_size=3'], r'batch_size=3 is not poss'),
    ],
)
def test_bad_data_is_one_line(
    tmp_path: Path, last: str | None, options: list[str], message: str
) -> None:
    names = ('cat', 'dog', *([last] if last else []))
    config = write_config(tmp_path, dict(train=names, val=('cat', 'dog', 'owl')))
    work = ['--work-dir', str(tmp_path / 'w')]
    with pytest.raises(SystemExit, match=message) as caught:
        cli.train([config, *work, '--cfg-options', 'resume=False', *options])
    assert '\n' not in str(caught.value)


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
