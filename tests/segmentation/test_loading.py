"""Files as pipelines read them: what is a label map, what is refused, and with which options."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image

from vqmoe_vision.segmentation.transforms import LoadImage, LoadLabels

from ..damaged import damaged
from .conftest import write_pair


def load(root: Path, num_classes: int, **kwargs: Any) -> dict[str, Any]:
    results = dict(
        img_path=str(root / 'a.png'),
        seg_map_path=str(root / 'b.png'),
        reduce_zero_label=kwargs.get('reduce_zero_label', False),
        label_map=None,
        seg_fields=[],
    )
    return LoadLabels(num_classes).transform(LoadImage().transform(results))


def write_labels(folder: Path, labels: Any, kind: type, file_format: str = 'PNG') -> None:
    array = np.array(labels, kind)
    write_pair(folder, 'a.png', 'b.png', np.zeros(array.shape))
    Image.fromarray(array).save(folder / 'b.png', format=file_format)


@pytest.mark.parametrize('kind', [np.uint8, np.uint16])
def test_labels_within_the_classes(kind: type, tmp_path: Path) -> None:
    for labels in ([[0, 1], [2, 255]], [[0, 1, 2]], [[0], [1], [2]]):
        write_labels(tmp_path, labels, kind)
        assert load(tmp_path, 3)['gt_seg_map'].tolist() == labels
        with pytest.raises(
            ValueError, match=r'b\.png holds the label 2; allowed are 0\.\.1, and 255'
        ):
            load(tmp_path, 2)
    write_labels(tmp_path, [[0, 1], [2, 3]], kind)
    reduced = load(tmp_path, 3, reduce_zero_label=True)['gt_seg_map']
    assert reduced.tolist() == [[255, 0], [1, 2]]
    with pytest.raises(ValueError, match=r'holds the label 3; allowed are 1\.\.2, and 0 for'):
        load(tmp_path, 2, reduce_zero_label=True)


@pytest.mark.parametrize(
    ('label', 'kind'),
    # in 8 bits 256 would be class 0, 259 class 3, and 65535 ignored
    [*((n, np.uint16) for n in (256, 259, 65535)), (-1, np.int32), (0.5, np.float32)],
)
def test_labels_beyond_8_bits_are_not_wrapped_around(
    label: float, kind: type, tmp_path: Path
) -> None:
    write_labels(tmp_path, [[0, 1], [label, 2]], kind, 'TIFF')
    for reduced, allowed in ((False, r'0\.\.4, and 255'), (True, r'1\.\.5, and 0')):
        message = rf'b\.png holds the label {label}; allowed are {allowed}'
        with pytest.raises(ValueError, match=message):
            load(tmp_path, 5, reduce_zero_label=reduced)


def test_another_size_and_damage_name_the_file(tmp_path: Path) -> None:
    write_pair(tmp_path, 'a.png', 'b.png', np.zeros((4, 6)), image_size=(4, 5))
    with pytest.raises(ValueError, match=r'b\.png has 6x4 pixels, .*a\.png has 5x4'):
        load(tmp_path, 3)
    (tmp_path / 'b.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'b\.png cannot be read as a label map'):
        load(tmp_path, 3)
    for content in (b'', b'no image', (tmp_path / 'a.png').read_bytes()[:40]):
        (tmp_path / 'a.png').write_bytes(content)
        with pytest.raises(ValueError, match=r'a\.png cannot be read as an image'):
            load(tmp_path, 3)


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA', 'CMYK'])
@pytest.mark.parametrize(('height', 'width'), [(4, 6), (1, 16), (16, 1)])
def test_colours_are_no_label_map_whatever_their_number(
    mode: str, height: int, width: int, tmp_path: Path
) -> None:
    # as many pixels as the map has numbers, and as the map has pixels
    for numbers in (len(mode), 1):
        write_pair(tmp_path, 'a.png', 'b.png', np.zeros((height, width * numbers)))
        Image.new(mode, (width, height)).save(tmp_path / 'b.png', 'TIFF')
        with pytest.raises(ValueError, match=r'b\.png is a colour image; a label map has one'):
            load(tmp_path, 3)


def _sound_maps() -> list[bytes]:
    labels = Image.fromarray(np.random.default_rng(0).integers(0, 3, (12, 8), np.uint8))
    deep = Image.fromarray(np.asarray(labels).astype(np.uint16))
    files = [io.BytesIO() for _ in range(4)]
    for image, kind, file in zip(
        (labels, labels.convert('P'), deep, labels),
        ('PNG', 'PNG', 'PNG', 'TIFF'),
        files,
        strict=True,
    ):
        image.save(file, kind)
    return [file.getvalue() for file in files]


@settings(max_examples=200)
@given(damaged(_sound_maps()))
@pytest.mark.filterwarnings('ignore::UserWarning:PIL', 'ignore::RuntimeWarning:PIL')
def test_a_damaged_file_is_a_label_map_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / 'damaged.file'
    path.write_bytes(content)
    results = dict(
        img_path='image', seg_map_path=str(path), ori_shape=(12, 8), reduce_zero_label=False,
        seg_fields=[],
    )  # fmt: skip
    try:
        assert LoadLabels(3).transform(results)['gt_seg_map'].shape == (12, 8)
    except ValueError as error:
        assert str(error).startswith(f'{path} ') and '\n' not in str(error)
