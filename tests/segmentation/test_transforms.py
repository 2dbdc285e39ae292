import inspect
from typing import Any

import albumentations
import numpy as np
import pytest
import torch
from albumentations.augmentations.dropout.transforms import BaseDropout
from mmengine.runner import Runner
from torch.utils.data import Dataset

import vqmoe_vision.engine  # noqa: F401  registers keep_worker_seed
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
        (
            dict(type='GridElasticDeform', num_grid_xy=(4, 4), magnitude=10),
            "type='GridElasticDeform' is not possible: another: its pixels from outside have",
        ),
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
