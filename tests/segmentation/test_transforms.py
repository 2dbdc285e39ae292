import inspect
import io
from pathlib import Path
from typing import Any

import albumentations
import numpy as np
import pytest
import torch
from albumentations.augmentations.dropout.transforms import BaseDropout
from hypothesis import given, settings
from mmseg.structures import SegDataSample
from PIL import ExifTags, Image

from vqmoe_vision.classification.datasets import load_image
from vqmoe_vision.engine.images import displayed
from vqmoe_vision.segmentation.datasets import CheckedDataset
from vqmoe_vision.segmentation.inference import _read
from vqmoe_vision.segmentation.transforms import Albumentations, LoadImage, LoadLabels
from vqmoe_vision.segmentation.visualization import OverlayHook, OverlayVisualizer

from .. import cases, refused
from ..damaged import damaged
from .conftest import write_pair


def sample() -> dict[str, Any]:
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0] = 200  # blue, in BGR
    return dict(img=image, gt_seg_map=np.full((8, 8), 3, np.uint8))


def test_transforms_see_rgb_and_the_result_is_bgr():
    # grey of pure blue 200: 0.114 * 200 = 23; of pure red it would be 0.299 * 200 = 60
    out = Albumentations([dict(type='ToGray', p=1.0)]).transform(sample())
    assert np.unique(out['img']).tolist() == [23]
    untouched = Albumentations([dict(type='HorizontalFlip', p=1.0)]).transform(sample())
    assert (untouched['img'] == sample()['img']).all()


def test_pixels_from_outside_are_ignored():
    shift = dict(type='Affine', translate_percent={'x': 0.5}, p=1.0)
    labels = Albumentations([shift]).transform(sample())['gt_seg_map']
    assert np.unique(labels).tolist() == [3, 255]
    assert (labels == 255).mean() == 0.5
    one_of = Albumentations([dict(type='OneOf', transforms=[shift], p=1.0)]).transform(sample())
    assert 255 in one_of['gt_seg_map']
    as_told = Albumentations([dict(shift, fill_mask=1)]).transform(sample())
    assert np.unique(as_told['gt_seg_map']).tolist() == [1, 3]


MAKES_HOLES = [
    name
    for name, kind in vars(albumentations).items()
    if isinstance(kind, type) and issubclass(kind, BaseDropout) and kind is not BaseDropout
]


NEEDED = {
    'ConstrainedCoarseDropout': dict(
        mask_indices=[3], hole_height_range=(0.5, 0.5), hole_width_range=(0.5, 0.5)
    ),
    'XYMasking': dict(num_masks_x=(1, 1), mask_x_length=(3, 3)),
    'TimeMasking': dict(time_mask_param=7),
    'FrequencyMasking': dict(freq_mask_param=7),
}


@pytest.mark.filterwarnings('ignore:.* is a specialized version of XYMasking')
@pytest.mark.parametrize('name', MAKES_HOLES)
def test_labels_under_holes_stay(name):
    def draw(**options: int) -> list[dict[str, Any]]:
        augment = Albumentations([dict(type=name, p=1.0, **NEEDED.get(name, {}), **options)])
        return [augment.transform(sample()) for _ in range(20)]  # some holes have no pixel

    found = draw()
    assert any((out['img'] == 0).all(axis=2).any() for out in found)
    assert all((out['gt_seg_map'] == 3).all() for out in found)
    if 'fill_mask' in inspect.signature(getattr(albumentations, name)).parameters:
        assert any(7 in out['gt_seg_map'] for out in draw(fill_mask=7))


def test_images_that_are_no_bytes_are_refused_and_labels_may_be_missing():
    results = dict(img=sample()['img'])
    out = Albumentations([dict(type='Resize', height=4, width=6)]).transform(results)
    assert out['img'].shape[:2] == out['img_shape'] == out['pad_shape'] == (4, 6)
    floats, said = dict(sample(), img=np.zeros((8, 8, 3), np.float32)), r"^results\['img'\]\.dtype"
    refused(said, Albumentations([dict(type='ColorJitter')]).transform, floats)


@cases(
    'config, named',
    (dict(type='Cutout'), "type='Cutout'"),
    (dict(type='Rotate', value=0), 'Rotate.value'),
    (dict(type='OneOf', transforms=[dict(type='Rotate', mask_value=0)]), 'Rotate.mask_value'),
    (dict(type='GridElasticDeform', num_grid_xy=(4, 4), magnitude=10), "type='Grid"),
)
def test_what_albumentations_would_ignore_is_refused(config, named):
    refused(named, Albumentations, [config])


def test_random_numbers_are_torchs():  # which differ between workers
    augment = Albumentations([dict(type='RandomBrightnessContrast', p=1.0)])

    def drawn(seed: int) -> list[float]:
        torch.manual_seed(seed)
        return [augment.transform(sample())['img'].mean() for _ in range(8)]

    assert len(set(drawn(0))) > 6
    assert drawn(0) == drawn(0) != drawn(1)


def load(root: Path, num_classes: int, **kwargs: Any) -> dict[str, Any]:
    results: Any = dict(img_path=str(root / 'a.png'), seg_map_path=str(root / 'b.png'))
    results |= {'reduce_zero_label': False, 'label_map': None, 'seg_fields': [], **kwargs}
    return LoadLabels(num_classes).transform(LoadImage().transform(results))


def write_labels(folder: Path, labels: Any, kind: type, file_format: str = 'PNG') -> None:
    array = np.array(labels, kind)
    write_pair(folder, 'a.png', 'b.png', np.zeros(array.shape))
    Image.fromarray(array).save(folder / 'b.png', format=file_format)


@pytest.mark.parametrize('kind', [np.uint8, np.uint16])
def test_labels_within_the_classes(kind, tmp_path):
    for labels in ([[0, 1], [2, 255]], [[0, 1, 2]], [[0], [1], [2]]):
        write_labels(tmp_path, labels, kind)
        assert load(tmp_path, 3)['gt_seg_map'].tolist() == labels
        refused(r'b\.png .* label 2; allowed are 0\.\.1, and 255', load, tmp_path, 2)
    write_labels(tmp_path, [[0, 1], [2, 3]], kind)
    reduced = load(tmp_path, 3, reduce_zero_label=True)['gt_seg_map']
    assert reduced.tolist() == [[255, 0], [1, 2]]
    said = r'holds the label 3; allowed are 1\.\.2, and 0 for'
    refused(said, load, tmp_path, 2, reduce_zero_label=True)


@cases(
    'label, kind',
    # in 8 bits 256 would be class 0, 259 class 3, and 65535 ignored
    *((n, np.uint16) for n in (256, 259, 65535)),
    (-1, np.int32),
    (0.5, np.float32),
)
def test_labels_beyond_8_bits_are_not_wrapped_around(label, kind, tmp_path):
    write_labels(tmp_path, [[0, 1], [label, 2]], kind, 'TIFF')
    for reduced, allowed in ((False, r'0\.\.4, and 255'), (True, r'1\.\.5, and 0')):
        message = rf'b\.png holds the label {label}; allowed are {allowed}'
        refused(message, load, tmp_path, 5, reduce_zero_label=reduced)


def test_another_size_and_damage_name_the_file(tmp_path):
    write_pair(tmp_path, 'a.png', 'b.png', np.zeros((4, 6)), image_size=(4, 5))
    refused(r'b\.png has 6x4 pixels, .*a\.png has 5x4', load, tmp_path, 3)
    (tmp_path / 'b.png').write_bytes(b'no image')
    refused(r'b\.png cannot be read as a label map', load, tmp_path, 3)
    for content in (b'', b'no image', (tmp_path / 'a.png').read_bytes()[:40]):
        (tmp_path / 'a.png').write_bytes(content)
        refused(r'a\.png cannot be read as an image', load, tmp_path, 3)


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'LA', 'CMYK'])
@pytest.mark.parametrize('height, width', [(4, 6), (1, 16), (16, 1)])
def test_colours_are_no_label_map_whatever_their_number(mode, height, width, tmp_path):
    # as many pixels as the map has numbers, and as the map has pixels
    for numbers in (len(mode), 1):
        write_pair(tmp_path, 'a.png', 'b.png', np.zeros((height, width * numbers)))
        Image.new(mode, (width, height)).save(tmp_path / 'b.png', 'TIFF')
        refused(r'b\.png is a colour image; a label map has one', load, tmp_path, 3)


def _sound_maps() -> list[bytes]:
    labels = Image.fromarray(np.random.default_rng(0).integers(0, 3, (12, 8), np.uint8))
    deep, files = Image.fromarray(np.asarray(labels).astype(np.uint16)), []
    for image, kind in ((labels.convert('P'), 'PNG'), (deep, 'PNG'), (labels, 'TIFF')):
        image.save(file := io.BytesIO(), kind)
        files.append(file.getvalue())
    return files


@settings(max_examples=200)
@given(damaged(_sound_maps()))
@pytest.mark.filterwarnings('ignore::UserWarning:PIL', 'ignore::RuntimeWarning:PIL')
def test_a_damaged_file_is_a_label_map_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / 'damaged.file'
    path.write_bytes(content)
    results = dict(img_path='image', seg_map_path=str(path), ori_shape=(12, 8), seg_fields=[])
    results['reduce_zero_label'] = False
    try:
        assert LoadLabels(3).transform(results)['gt_seg_map'].shape == (12, 8)
    except ValueError as error:
        assert str(error).startswith(f'{path} ') and '\n' not in str(error)


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


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('turn', TURNS)
def test_labels_may_be_drawn_on_stored_or_on_displayed_pixels(turn, name, backend, tmp_path):
    """Which have an orientation too, as a tool may copy it from the image, and are not turned."""
    drawn = [(scene(), scene()), (scene(16, 16), scene(16, 16))]  # of a square the stored count
    if turn >= 5:
        drawn.append((scene(), displayed(scene(), turn)))
    steps = [dict(type='LoadImageFromFile', imdecode_backend=backend), dict(type='LoadAnnotations')]
    for stored, labels in drawn:
        write_image(tmp_path / 'images' / name, stored, turn)
        write_image(tmp_path / 'labels/a.tif', labels, turn)
        data = CheckedDataset(
            metainfo=dict(classes=('a', 'b')),
            data_root=str(tmp_path),
            data_prefix=dict(img_path='images', seg_map_path='labels'),
            img_suffix=Path(name).suffix,
            seg_map_suffix='.tif',
            serialize_data=False,  # or mmengine collects garbage for most of a second
            pipeline=steps,
        )
        results = data[0]
        assert results['ori_shape'] == labels.shape and (results['gt_seg_map'] == labels).all()
        assert ((results['img'].mean(axis=2) > 127) == labels).all()


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
        assert np.unique(segmented).tolist() == list(range(256))


def test_every_loader_names_a_bomb(tmp_path, monkeypatch):
    Image.fromarray(scene()).save(tmp_path / 'a.png')
    path = str(tmp_path / 'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)  # 16 x 24 is more than twice as many
    labels = dict(img_path='b.png', seg_map_path=path, reduce_zero_label=False)
    images = LoadImage(), LoadImage(imdecode_backend='pillow'), LoadImage(color_type='grayscale')
    for read in (load_image, *(loader.read for loader in images)):
        refused(r'a\.png is too large', read, path)
    for loader in (LoadLabels(), LoadLabels(imdecode_backend='cv2')):
        refused(r'a\.png is too large', loader.transform, labels)
