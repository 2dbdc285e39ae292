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
from PIL import Image

from vqmoe_vision.segmentation.transforms import Albumentations, LoadImage, LoadLabels

from .. import cases
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
    # half of the image has come in from outside
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


@pytest.mark.filterwarnings('ignore:.* is a specialized version of XYMasking')
@pytest.mark.parametrize('name', MAKES_HOLES)
def test_labels_under_holes_stay(name):
    needed = {
        'ConstrainedCoarseDropout': dict(
            mask_indices=[3], hole_height_range=(0.5, 0.5), hole_width_range=(0.5, 0.5)
        ),
        'XYMasking': dict(num_masks_x=(1, 1), mask_x_length=(3, 3)),
        'TimeMasking': dict(time_mask_param=7),
        'FrequencyMasking': dict(freq_mask_param=7),
    }
    holes = dict(type=name, p=1.0, **needed.get(name, {}))

    def draw(**options: int) -> list[dict[str, Any]]:
        augment = Albumentations([dict(holes, **options)])
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
    floats = dict(sample(), img=sample()['img'].astype(np.float32))
    with pytest.raises(ValueError, match=r"^results\['img'\]\.dtype='float32'"):
        Albumentations([dict(type='ColorJitter')]).transform(floats)


@cases(
    'config, named',
    (dict(type='Cutout'), "type='Cutout'"),
    (dict(type='Rotate', value=0), 'Rotate.value'),
    (dict(type='OneOf', transforms=[dict(type='Rotate', mask_value=0)]), 'Rotate.mask_value'),
    (dict(type='GridElasticDeform', num_grid_xy=(4, 4), magnitude=10), "type='Grid"),
)
def test_what_albumentations_would_ignore_is_refused(config, named):
    with pytest.raises(ValueError, match=named):
        Albumentations([config])


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
        with pytest.raises(ValueError, match=r'b\.png .* label 2; allowed are 0\.\.1, and 255'):
            load(tmp_path, 2)
    write_labels(tmp_path, [[0, 1], [2, 3]], kind)
    reduced = load(tmp_path, 3, reduce_zero_label=True)['gt_seg_map']
    assert reduced.tolist() == [[255, 0], [1, 2]]
    with pytest.raises(ValueError, match=r'holds the label 3; allowed are 1\.\.2, and 0 for'):
        load(tmp_path, 2, reduce_zero_label=True)


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
        with pytest.raises(ValueError, match=message):
            load(tmp_path, 5, reduce_zero_label=reduced)


def test_another_size_and_damage_name_the_file(tmp_path):
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
@pytest.mark.parametrize('height, width', [(4, 6), (1, 16), (16, 1)])
def test_colours_are_no_label_map_whatever_their_number(mode, height, width, tmp_path):
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
def test_a_damaged_file_is_a_label_map_or_one_line(tmp_path_factory, content):
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
