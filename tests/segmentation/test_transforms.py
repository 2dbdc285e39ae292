import inspect
from typing import Any

import albumentations
import numpy as np
import pytest
import torch
from albumentations.augmentations.dropout.transforms import BaseDropout

from vqmoe_vision.segmentation.transforms import Albumentations


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
    if isinstance(kind, type) and issubclass(kind, BaseDropout) and kind is not BaseDropout
]


@pytest.mark.filterwarnings('ignore:.* is a specialized version of XYMasking')
@pytest.mark.parametrize('name', MAKES_HOLES)
def test_labels_under_holes_stay(name: str) -> None:
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


def test_images_that_are_no_bytes_are_refused_and_labels_may_be_missing() -> None:
    results = dict(img=sample()['img'])
    out = Albumentations([dict(type='Resize', height=4, width=6)]).transform(results)
    assert out['img'].shape[:2] == out['img_shape'] == out['pad_shape'] == (4, 6)
    floats = dict(sample(), img=sample()['img'].astype(np.float32))
    with pytest.raises(ValueError, match=r"^results\['img'\]\.dtype='float32'"):
        Albumentations([dict(type='ColorJitter')]).transform(floats)


@pytest.mark.parametrize(
    ('config', 'named'),
    [
        (dict(type='Cutout'), "type='Cutout'"),
        (dict(type='Rotate', value=0), 'Rotate.value'),
        (dict(type='OneOf', transforms=[dict(type='Rotate', mask_value=0)]), 'Rotate.mask_value'),
        (dict(type='GridElasticDeform', num_grid_xy=(4, 4), magnitude=10), "type='Grid"),
    ],
)
def test_what_albumentations_would_ignore_is_refused(config: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Albumentations([config])


def test_random_numbers_are_torchs() -> None:  # which differ between workers
    augment = Albumentations([dict(type='RandomBrightnessContrast', p=1.0)])

    def drawn(seed: int) -> list[float]:
        torch.manual_seed(seed)
        return [augment.transform(sample())['img'].mean() for _ in range(8)]

    assert len(set(drawn(0))) > 6
    assert drawn(0) == drawn(0) != drawn(1)
