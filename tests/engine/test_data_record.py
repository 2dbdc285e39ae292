"""Other data are seen by their number, names and classes, wherever they lie."""

from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset
from PIL import Image

from vqmoe_vision.classification.datasets import class_folder, digits
from vqmoe_vision.engine.record import described

TRANSFORM = dict(type='timm', input_size=8, mean=[0.5] * 3, std=[0.5] * 3)


def folder(root: Path, names: list[str]) -> dict[str, Any]:
    for name in names:
        path = root / 'train' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(path)
    return described(class_folder(str(root), 'train', TRANSFORM))


def test_folders_of_classes(tmp_path: Path) -> None:
    names = ['cat/1.png', 'cat/2.png', 'dog/3.png']
    one = folder(tmp_path / 'one', names)
    assert one['samples'] == 3
    assert folder(tmp_path / 'elsewhere', names[::-1]) == one
    in_memory = class_folder(str(tmp_path / 'one'), 'train', TRANSFORM, in_memory=True)
    assert described(in_memory) == one
    digests = {
        folder(tmp_path / str(number), other)['digest']
        for number, other in enumerate(
            [names[:2], ['cat/1.png', 'dog/2.png', 'dog/3.png'], ['cat/1.png', 'cat/4.png']]
        )
    }
    assert len(digests | {one['digest']}) == 4


def test_images_that_are_no_files_have_classes() -> None:
    found = described(digits('train', TRANSFORM))
    assert found['samples'] == 1257
    tail = described(digits('train', TRANSFORM, imbalance=10))
    assert tail['samples'] < 1257 and tail['digest'] != found['digest']


class Pairs(BaseDataset):
    def load_data_list(self) -> list[dict[str, Any]]:
        names = self.metainfo['names']
        return [
            {'img_path': f'{self.data_root}/{n}.jpg', 'seg_map_path': f'{self.data_root}/{n}.png'}
            for n in names
        ]


def test_pairs_of_files(tmp_path: Path) -> None:
    def of(root: str, *names: str) -> dict[str, Any]:
        return described(Pairs(metainfo={'names': names}, data_root=str(tmp_path / root)))

    assert of('a', 'x', 'y') == of('b', 'x', 'y')
    assert of('a', 'x', 'y')['samples'] == 2
    assert of('a', 'x', 'y')['digest'] != of('a', 'x', 'z')['digest']


def test_a_data_set_that_names_nothing() -> None:
    assert described([1, 2]) == {'samples': 2, 'digest': None}
