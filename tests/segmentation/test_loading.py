"""Files as pipelines read them: what is a label map, what is refused, and with which options."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from mmengine.config import Config
from mmseg.structures import SegDataSample
from PIL import Image

from vqmoe_vision.analysis.corruptions import Corruption
from vqmoe_vision.segmentation.loading import LoadImage, LoadLabels, image_loader
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


def test_labels_within_the_classes(tmp_path: Path) -> None:
    labels = np.array([[0, 1], [2, 255]])
    write_pair(tmp_path, 'a.png', 'b.png', labels)
    assert (load(tmp_path, 3)['gt_seg_map'] == labels).all()
    with pytest.raises(ValueError, match=r'b\.png holds the label 2; allowed are 0\.\.1, and 255'):
        load(tmp_path, 2)


def test_reduced_zero_label(tmp_path: Path) -> None:
    write_pair(tmp_path, 'a.png', 'b.png', np.array([[0, 1], [2, 3]]))
    out = load(tmp_path, 3, reduce_zero_label=True)['gt_seg_map']
    assert out.tolist() == [[255, 0], [1, 2]]
    with pytest.raises(ValueError, match=r'holds the label 3; allowed are 1\.\.2, and 0 for'):
        load(tmp_path, 2, reduce_zero_label=True)


@pytest.mark.parametrize('label', [256, 259, 65535])
def test_labels_above_8_bits_are_not_wrapped_around(tmp_path: Path, label: int) -> None:
    # in 8 bits 256 would be class 0, 259 class 3, and 65535 ignored
    deep = np.array([[0, 1], [label, 2]], np.uint16)
    write_pair(tmp_path, 'a.png', 'b.png', np.zeros((2, 2)))
    assert cv2.imwrite(str(tmp_path / 'b.png'), deep)
    message = rf'b\.png holds the label {label}; allowed are 0\.\.4, and 255'
    with pytest.raises(ValueError, match=message):
        load(tmp_path, 5)
    with pytest.raises(ValueError, match=rf'the label {label}; allowed are 1\.\.5, and 0 for'):
        load(tmp_path, 5, reduce_zero_label=True)


def test_labels_in_16_bits(tmp_path: Path) -> None:
    write_pair(tmp_path, 'a.png', 'b.png', np.zeros((2, 2)))
    assert cv2.imwrite(str(tmp_path / 'b.png'), np.array([[0, 1], [255, 2]], np.uint16))
    assert load(tmp_path, 5)['gt_seg_map'].tolist() == [[0, 1], [255, 2]]


def test_labels_of_a_tiff_are_integers_from_0(tmp_path: Path) -> None:
    write_pair(tmp_path, 'a.png', 'b.png', np.zeros((2, 2)))
    for labels, label in (([[0, -1]] * 2, '-1'), ([[0, 0.5]] * 2, '0.5')):
        kind = np.int32 if label == '-1' else np.float32
        Image.fromarray(np.array(labels, kind)).save(tmp_path / 'b.png', format='TIFF')
        with pytest.raises(ValueError, match=rf'b\.png holds the label {label}; allowed'):
            load(tmp_path, 5)


def test_one_pixel_high(tmp_path: Path) -> None:
    write_pair(tmp_path, 'a.png', 'b.png', np.zeros((1, 5)))
    assert load(tmp_path, 3)['gt_seg_map'].shape == (1, 5)
    write_pair(tmp_path, 'a.png', 'b.png', np.zeros((6, 1)), image_size=(5, 1))
    with pytest.raises(ValueError, match=r'b\.png has 1x6 pixels, .*a\.png has 1x5'):
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


def test_other_size_colours_and_damage_name_the_file(tmp_path: Path) -> None:
    write_pair(tmp_path, 'a.png', 'b.png', np.zeros((4, 6)), image_size=(4, 5))
    with pytest.raises(ValueError, match=r'b\.png has 6x4 pixels, .*a\.png has 5x4'):
        load(tmp_path, 3)
    write_pair(tmp_path, 'a.png', 'b.png', np.zeros((4, 6, 3)), image_size=(4, 6))
    with pytest.raises(ValueError, match=r'b\.png is a colour image'):
        load(tmp_path, 3)
    (tmp_path / 'b.png').write_bytes(b'no image')
    with pytest.raises(ValueError, match=r'b\.png cannot be read as a label map'):
        load(tmp_path, 3)
    for content in (b'', b'no image', (tmp_path / 'a.png').read_bytes()[:40]):
        (tmp_path / 'a.png').write_bytes(content)
        with pytest.raises(ValueError, match=r'a\.png cannot be read as an image'):
            load(tmp_path, 3)


def _sound_maps() -> list[bytes]:
    labels = np.random.default_rng(0).integers(0, 3, (12, 8), np.uint8)
    with_colours = Image.fromarray(labels).convert('P')
    files = []
    for image, kind in (
        (Image.fromarray(labels), 'PNG'),
        (with_colours, 'PNG'),
        (Image.fromarray(labels.astype(np.uint16)), 'PNG'),
        (Image.fromarray(labels), 'TIFF'),
    ):
        content = io.BytesIO()
        image.save(content, kind)
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


def test_a_shift_corrupts_the_image_as_in_classification(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    loaded = LoadImage(shift='fog_3').transform({'img_path': str(tmp_path / 'image.png')})
    assert (loaded['img'][..., ::-1] == Corruption('fog_3')(pixels)).all()
    with pytest.raises(ValueError, match="shift='fog' is not possible"):
        LoadImage(shift='fog')


def reading(**options: Any) -> dict[str, Any]:
    """A data set in a wrapper, whose pipeline reads images with options."""
    steps = [dict(type='LoadImageFromFile', **options), dict(type='LoadAnnotations')]
    return dict(type='RepeatDataset', times=2, dataset=dict(type='CheckedDataset', pipeline=steps))


@pytest.mark.parametrize('split', ['val', 'test'])
@pytest.mark.parametrize('options', [{}, {'shift': 'fog_3'}, {'color_type': 'grayscale'}])
def test_a_picture_shows_what_was_read(split: str, options: dict[str, str], tmp_path: Path) -> None:
    path = str(tmp_path / 'image.png')
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    cv2.imwrite(path, pixels)
    OverlayVisualizer.get_instance(str(tmp_path))
    hook = OverlayHook(draw=True)
    cfg = Config({f'{split}_dataloader': dict(dataset=reading(**options))})
    getattr(hook, f'before_{split}')(SimpleNamespace(cfg=cfg))
    image = hook._image_of(np.empty(0), SegDataSample(metainfo=dict(img_path=path)))
    seen = LoadImage(**options).transform({'img_path': path})['img']
    expected = np.repeat(seen[..., None], 3, axis=2) if seen.ndim == 2 else seen[..., ::-1]
    assert (image == expected).all()


def test_data_sets_that_read_images_in_different_ways() -> None:
    both = dict(type='ConcatDataset', datasets=[reading(), reading(to_float32=True)])
    with pytest.raises(ValueError, match='sets of ConcatDataset read images with different opt'):
        image_loader(both)
    assert image_loader(reading(to_float32=True), imdecode_backend='pillow').to_float32
