"""What an image costs, by part: no part is counted twice, and none is left out."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmark import data
from benchmark.cli import main
from benchmark.data import PartClock, add_clocks, data_table

CONFIGS = Path(__file__).parents[2] / 'configs'


def test_every_part_is_what_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, 'process_time', lambda: now[0])

    def taking(seconds: float):
        def call(value):
            now[0] += seconds
            return value + 1

        return call

    class Flip:
        __call__ = staticmethod(taking(3))

    class Source(list):
        def __getitem__(self, index):
            return taking(5)(index)

    transform = SimpleNamespace(transforms=[Flip(), Flip()])
    dataset = SimpleNamespace(source=Source([0]), transform=transform)
    loader, clock = SimpleNamespace(dataset=dataset, collate_fn=taking(7)), PartClock()
    add_clocks(loader, clock)
    value = loader.dataset.source[0]
    for step in transform.transforms:
        value = step(value)
    assert loader.collate_fn(value) == 4  # each of the four has added one
    assert clock.seconds == {'reading, decoding': 5, 'Flip': 3, 'Flip #2': 3, 'collate': 7}


def test_rate_and_workers() -> None:
    # 4 ms per image are 250 images per second; 1,000 of them need four workers
    text = data_table({'parts_ms': {'collate': 1.0, data.REST: 3.0}, 'images_per_s': 250.0})
    assert 'for 1,000 images per second: 4' in text and '75.0%' in text


@pytest.mark.parametrize(
    ('config', 'parts'),
    [
        (
            'classification/digits/demo/vit_tiny_vqmoe_demo.py',
            ['reading, decoding', 'RandomResizedCropAndInterpolation', 'ColorJitter'],
        ),
        ('segmentation/digit_scenes/segmenter_vit_tiny_vqmoe_digit_scenes.py', []),
    ],
)
def test_a_config_end_to_end(config: str, parts: list[str], tmp_path: Path, capsys) -> None:
    out = tmp_path / 'run.json'
    batch = ['--cfg-options', 'train_dataloader.batch_size=4']
    main(['data', str(CONFIGS / config), '--images', '9', '--out', str(out), *batch])
    (row,) = json.loads(out.read_text())['rows']
    assert row['images'] == 12  # three whole batches
    assert [*row['parts_ms']][: len(parts)] == parts
    assert [*row['parts_ms']][-2:] == ['collate', data.REST]
    assert all(ms >= 0 for ms in row['parts_ms'].values())
    assert sum(row['parts_ms'].values()) == pytest.approx(1000 / row['images_per_s'])
    assert 'images per second of processor time' in capsys.readouterr().out
