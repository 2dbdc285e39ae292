"""Files as pipelines read them: what is a label map, what is refused, and with which options."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from mmengine.config import Config
from mmseg.structures import SegDataSample
from PIL import Image

from vqmoe_vision.analysis.shifts import Corruption
from vqmoe_vision.segmentation.loading import LoadImage, LoadLabels
from vqmoe_vision.segmentation.visualization import OverlayHook, OverlayVisualizer

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
@pytest.mark.parametrize('shape', [(4, 6), (1, 16), (16, 1)])
def test_colours_are_no_label_map_whatever_their_number(
    mode: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    height, width = shape
    bands = len(Image.new(mode, (1, 1)).getbands())
    # as many pixels as the map has numbers, and as the map has pixels
    for size in ((height, width * bands), shape):
        write_pair(tmp_path, 'a.png', 'b.png', np.zeros(size))
        Image.new(mode, (width, height)).save(tmp_path / 'b.png', 'TIFF')
        with pytest.raises(ValueError, match=r'b\.png is a colour image; a label map has one'):
            load(tmp_path, 3)


def _sound_maps() -> list[bytes]:
    labels = Image.fromarray(np.random.default_rng(0).integers(0, 3, (12, 8), np.uint8))
    deep = Image.fromarray(np.asarray(labels).astype(np.uint16))
    files = []
    for image, kind in (
        (labels, 'PNG'),
        (labels.convert('P'), 'PNG'),
        (deep, 'PNG'),
        (labels, 'TIFF'),
    ):
        image.save(content := io.BytesIO(), kind)
        files.append(content.getvalue())
    return files


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


@pytest.mark.parametrize('split', ['val', 'test'])
@pytest.mark.parametrize('options', [{}, {'shift': 'fog_3'}, {'color_type': 'grayscale'}])
def test_a_picture_shows_what_was_read(split: str, options: dict[str, str], tmp_path: Path) -> None:
    path = str(tmp_path / 'image.png')
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    OverlayVisualizer.get_instance(str(tmp_path))
    hook = OverlayHook(draw=True)
    steps = [dict(type='LoadImageFromFile', **options), dict(type='LoadAnnotations')]
    inner = dict(type='CheckedDataset', pipeline=steps)
    cfg = Config({f'{split}_dataloader': dict(dataset=dict(type='RepeatDataset', dataset=inner))})
    getattr(hook, f'before_{split}')(SimpleNamespace(cfg=cfg))
    image = hook._image_of(np.empty(0), SegDataSample(metainfo=dict(img_path=path)))
    seen = LoadImage(**options).transform({'img_path': path})['img']
    expected = np.repeat(seen[..., None], 3, axis=2) if seen.ndim == 2 else seen[..., ::-1]
    assert (image == expected).all()
    if options.get('shift'):  # as in classification
        assert (image == Corruption('fog_3')(pixels)).all()
