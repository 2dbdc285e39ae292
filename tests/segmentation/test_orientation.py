"""An image and its label map lie the same way, whichever way the camera held it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmseg.structures import SegDataSample
from PIL import ExifTags, Image

from vqmoe_vision.classification.datasets import load_image
from vqmoe_vision.engine.images import displayed
from vqmoe_vision.segmentation.datasets import CheckedDataset
from vqmoe_vision.segmentation.inference import _read
from vqmoe_vision.segmentation.transforms import LoadImage, LoadLabels
from vqmoe_vision.segmentation.visualization import OverlayHook, OverlayVisualizer

TURNS = range(1, 9)
NAMES = ['a.jpg', 'a.png', 'a.tif']


def scene(height: int = 16, width: int = 24) -> np.ndarray:
    """Labels 0 and 1: an L that looks different in every orientation."""
    labels = np.zeros((height, width), np.uint8)
    labels[:8, :8] = labels[8:, :4] = 1
    return labels


def write_image(path: Path, pixels: np.ndarray, turn: int) -> None:
    """The file's pixels are as they stand here; labels as white where they are 1."""
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = turn
    path.parent.mkdir(exist_ok=True)
    if path.parent.name == 'images':
        pixels = np.repeat(pixels[..., None] * 255, 3, axis=2)
    Image.fromarray(pixels).save(path, exif=tags, quality=100)


def load(root: Path, name: str, labels: str = '.png', **kwargs: Any) -> dict[str, Any]:
    data = CheckedDataset(
        metainfo=dict(classes=('a', 'b')),
        data_root=str(root),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        img_suffix=Path(name).suffix,
        seg_map_suffix=labels,
        serialize_data=False,  # or mmengine collects garbage for most of a second
        pipeline=[dict(type='LoadImageFromFile', **kwargs), dict(type='LoadAnnotations')],
    )
    return data[0]


def agree(results: dict[str, Any]) -> bool:
    return bool(((results['img'].mean(axis=2) > 127) == results['gt_seg_map']).all())


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('turn', TURNS)
def test_labels_may_be_drawn_on_stored_or_on_displayed_pixels(turn, name, backend, tmp_path):
    drawn = [(scene(), scene()), (scene(16, 16), scene(16, 16))]  # of a square the stored count
    if turn >= 5:
        drawn.append((scene(), displayed(scene(), turn)))
    (tmp_path / 'labels').mkdir()
    for stored, labels in drawn:
        write_image(tmp_path / 'images' / name, stored, turn)
        Image.fromarray(labels).save(tmp_path / 'labels/a.png')
        results = load(tmp_path, name, imdecode_backend=backend)
        assert results['ori_shape'] == labels.shape
        assert agree(results)


@pytest.mark.parametrize('turn', TURNS)
def test_a_label_map_is_never_turned(turn, tmp_path):
    """A TIFF with an orientation of its own, as a tool may copy it from the image."""
    write_image(tmp_path / 'images/a.jpg', scene(), turn)
    write_image(tmp_path / 'labels/a.tif', scene(), turn)
    results = load(tmp_path, 'a.jpg', '.tif')
    assert (results['gt_seg_map'] == scene()).all()
    assert agree(results)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('turn', TURNS)
def test_without_labels_both_tasks_see_what_is_displayed(turn, name, tmp_path):
    path = tmp_path / 'images' / name
    write_image(path, scene(), turn)
    expected = displayed(scene(), turn)
    places = {'img_path': str(path), 'seg_map_path': str(tmp_path / 'not there.png')}
    for pixels in (
        LoadImage().read(str(path)),
        _read(path, LoadImage()),  # what predict.py reads with
        LoadImage().transform(places)['img'],  # a test may have no label maps
        np.asarray(load_image(str(path))),
    ):
        assert ((pixels.mean(axis=2) > 127) == expected).all()


@pytest.mark.parametrize('labels', [scene(), displayed(scene(), 6)], ids=['stored', 'displayed'])
def test_a_picture_of_a_prediction_lies_as_the_labels(labels, tmp_path):
    write_image(tmp_path / 'images/a.jpg', scene(), 6)
    Image.fromarray(labels).save(tmp_path / 'a.png')
    files = dict(img_path=str(tmp_path / 'images/a.jpg'), seg_map_path=str(tmp_path / 'a.png'))
    OverlayVisualizer.get_instance(str(tmp_path))
    image = OverlayHook()._image_of(np.empty(0), SegDataSample(metainfo=files))
    assert ((image.mean(axis=2) > 127) == labels).all()


RAMP = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16)


def test_deep_pixels_mean_the_same_in_both_tasks(tmp_path):
    floats = (RAMP / RAMP.max()).astype(np.float32)
    for name, pixels in (('a.png', RAMP), ('a.tif', RAMP), ('b.tif', floats)):
        path = str(tmp_path / name)
        Image.fromarray(pixels).save(path)
        segmented = LoadImage().read(path)
        assert (segmented[..., ::-1] == np.asarray(load_image(path))).all()
        # the whole range, without a step left out: neither clipped nor divided twice
        assert np.unique(segmented).tolist() == list(range(256))


def test_every_loader_names_a_bomb(tmp_path, monkeypatch):
    Image.fromarray(scene()).save(tmp_path / 'a.png')
    path = str(tmp_path / 'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)  # 16 x 24 is more than twice as many
    labels = dict(img_path='b.png', seg_map_path=path, reduce_zero_label=False)
    for read in (
        lambda: load_image(path),
        lambda: LoadImage().read(path),
        lambda: LoadImage(imdecode_backend='pillow').read(path),
        lambda: LoadImage(color_type='grayscale').read(path),
        lambda: LoadLabels().transform(labels),
        lambda: LoadLabels(imdecode_backend='cv2').transform(labels),
    ):
        with pytest.raises(ValueError, match=r'a\.png is too large'):
            read()
