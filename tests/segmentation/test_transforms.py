import inspect
from pathlib import Path
from typing import Any

import albumentations
import cv2
import numpy as np
import pytest
import torch
from albumentations.augmentations.dropout.transforms import BaseDropout
from mmengine.runner import Runner
from PIL import Image
from torch.utils.data import Dataset

import vqmoe_vision.engine  # noqa: F401  registers keep_worker_seed
from vqmoe_vision.analysis.corruptions import Corruption
from vqmoe_vision.segmentation.transforms import Albumentations, LoadImage, LoadLabels

from .conftest import write_pair


def sample() -> dict[str, Any]:
    image = np.zeros((8, 8, 3), np.uint8)
    image[..., 0] = 200  # blue, in BGR
    return dict(img=image, gt_seg_map=np.full((8, 8), 3, np.uint8))


def test_transforms_see_rgb_and_the_result_is_bgr() -> None:
    # grey of pure blue 200: 0.114 * 200 = 23; of pure red it would be 0.299 * 200 = 60
    out = Albumentations([dict(type='ToGray', p=1.0)]).transform(sample())
    assert np.unique(out['img']).tolist() == [23]
    untouched = Albumentations([dict(type='HorizontalFlip', p=1.0)]).transform(sample())
    assert (untouched['img'] == sample()['img']).all()


def test_pixels_from_outside_are_ignored() -> None:
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
    if isinstance(kind, type) and issubclass(kind, BaseDropout)
    if 'fill_mask' in inspect.signature(kind).parameters
]


@pytest.mark.parametrize('name', MAKES_HOLES)
def test_labels_under_holes_stay(name: str) -> None:
    needed = {
        'ConstrainedCoarseDropout': dict(
            mask_indices=[3], hole_height_range=(0.5, 0.5), hole_width_range=(0.5, 0.5)
        ),
        'XYMasking': dict(num_masks_x=(1, 1), mask_x_length=(3, 3)),
    }
    holes = dict(type=name, p=1.0, **needed.get(name, {}))
    out = Albumentations([holes]).transform(sample())
    assert (out['img'] == 0).all(axis=2).any()
    assert (out['gt_seg_map'] == 3).all()
    assert 7 in Albumentations([dict(holes, fill_mask=7)]).transform(sample())['gt_seg_map']


def test_images_that_are_no_bytes_are_refused() -> None:
    jitter = Albumentations([dict(type='ColorJitter')])
    floats = dict(sample(), img=sample()['img'].astype(np.float32))
    with pytest.raises(ValueError, match=r"\['img'\].dtype='float32' is not possible: uint8, as"):
        jitter.transform(floats)


def test_image_without_labels_and_new_size() -> None:
    results = sample()
    del results['gt_seg_map']
    resize = dict(type='Resize', height=4, width=6)
    out = Albumentations([resize]).transform(results)
    assert out['img'].shape[:2] == out['img_shape'] == out['pad_shape'] == (4, 6)


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (dict(type='Cutout'), "type='Cutout' is not in albumentations"),
        (dict(type='Rotate', value=0), 'Rotate.value is not possible; it has limit'),
        (dict(type='OneOf', transforms=[dict(type='Rotate', mask_value=0)]), 'Rotate.mask_value'),
    ],
)
def test_what_albumentations_would_ignore_is_refused(config: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Albumentations([config])


class Noise(Dataset):
    """What augmentation makes of the same grey image, as one number."""

    def __init__(self) -> None:
        self.augment = Albumentations([dict(type='RandomBrightnessContrast', p=1.0)])

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> float:
        image = np.full((4, 4, 3), 128, np.uint8)
        image[0, 0] = 10
        return float(self.augment.transform(dict(img=image))['img'].astype(float).mean())


def drawn(seed: int) -> list[float]:
    loader = Runner.build_dataloader(
        dict(
            dataset=Noise(),
            sampler=dict(type='DefaultSampler', shuffle=False),
            batch_size=4,
            num_workers=2,
            worker_init_fn=dict(type='keep_worker_seed'),
            collate_fn=dict(type='default_collate'),
        ),
        seed=0,
    )
    torch.manual_seed(seed)
    return [value for batch in loader for value in batch.tolist()]


def test_every_worker_has_its_own_stream_and_the_seed_repeats_it() -> None:
    first = drawn(0)
    assert len(set(first)) > 6  # two batches from two workers: nothing is drawn twice
    assert first[:4] != first[4:]
    assert drawn(0) == first
    assert drawn(1) != first


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


def test_a_shift_corrupts_the_image_as_in_classification(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    loaded = LoadImage(shift='fog_3').transform({'img_path': str(tmp_path / 'image.png')})
    assert (loaded['img'][..., ::-1] == Corruption('fog_3')(pixels)).all()
    with pytest.raises(ValueError, match="shift='fog' is not possible"):
        LoadImage(shift='fog')
