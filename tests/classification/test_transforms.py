import re
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.registry import TRANSFORMS
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

import vqmoe_vision.classification  # noqa: F401  registers the transforms
from vqmoe_vision.analysis.shifts import Corruption
from vqmoe_vision.classification.transforms import normalization_of, preprocessing_of
from vqmoe_vision.models.normalization import Normalization

CROP_MODES = ('center', 'squash', 'border')
ZERO = dict(mean=(0.0,) * 3, std=(1.0,) * 3)


def test_crop_flip_shifts_by_at_most_the_padding() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[4, 4] = 255
    transform = TRANSFORMS.build(dict(type='crop_flip', input_size=8, padding=2, hflip=0.0, **ZERO))
    places = {
        tuple(transform(Image.fromarray(pixels))[0].nonzero()[0].tolist()) for _ in range(300)
    }
    # 5 x 5 shifts; 300 draws miss a given one with probability (24/25)^300 = 5e-6
    assert places == {(row, column) for row in range(2, 7) for column in range(2, 7)}


def test_a_table_normalises_every_byte_as_torchvision_does() -> None:
    # each byte in each channel, as 3 and 256 have no common divisor
    image = Image.fromarray(np.arange(768).astype(np.uint8).reshape(16, 16, 3))
    numbers = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
    crop_flip = TRANSFORMS.build(
        dict(type='crop_flip', input_size=16, padding=0, hflip=0, **numbers)
    )
    torchvisions = transforms.Compose([transforms.ToTensor(), transforms.Normalize(**numbers)])
    found, expected = crop_flip(image), torchvisions(image)
    assert torch.equal(found, expected) and found.stride() == expected.stride()


@pytest.mark.parametrize('name', ['timm', 'crop_flip'])
def test_what_is_left_open_is_that_of_a_training_from_scratch(name: str) -> None:
    scratch = dict(mean=(0.5,) * 3, std=(0.25,) * 3)
    config = dict(type=name, input_size=8, mean=None, from_scratch=scratch)
    found = normalization_of(TRANSFORMS.build(dict(**config, std=None)))
    assert found == Normalization((0.5,) * 3, (0.25,) * 3)
    # that of another training is no half of the pair
    message = r'^transform\.std=\(0\.5, .*\) is not possible: beside transform\.mean$'
    with pytest.raises(ValueError, match=message):
        TRANSFORMS.build(dict(**config, std=(0.5,) * 3))


@pytest.mark.parametrize('place', ['transform', 'transform.from_scratch'])
@pytest.mark.parametrize('name', ['timm', 'crop_flip'])
@pytest.mark.parametrize('field', ['mean', 'std'])
@pytest.mark.parametrize(
    'value', [(0.5,) * 2, (0.5,) * 4, 0.5, 'abc', ('0.5',) * 3, (127.5,) * 3], ids=str
)
def test_numbers_that_no_images_have_are_refused(
    place: str, name: str, field: str, value: object
) -> None:
    numbers: dict[str, Any] = {**ZERO, field: value}
    if place == 'transform.from_scratch':
        numbers = dict(from_scratch=numbers)
    with pytest.raises(ValueError, match=re.escape(f'{place}.{field}={value!r} is not possible')):
        TRANSFORMS.build(dict(type=name, input_size=8, **numbers))


def test_a_shift_corrupts_the_image_of_a_test_alike_each_time() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    recipe = dict(type='timm', input_size=40, crop_pct=1.0, **ZERO)
    corrupted = TRANSFORMS.build(dict(recipe, shift='gaussian_noise_3'))(Image.fromarray(pixels))
    expected = Corruption('gaussian_noise_3')(pixels)
    assert (corrupted.permute(1, 2, 0) * 255).round().byte().equal(torch.from_numpy(expected))
    # severity 3 of ImageNet-C is a standard deviation of 0.18, before what leaves [0, 1] is cut off
    plain = TRANSFORMS.build(recipe)(Image.fromarray(pixels))
    assert 0.08 < (corrupted - plain).std() < 0.18


@pytest.mark.parametrize('stated', [{}, *({'crop_mode': mode} for mode in CROP_MODES)])
def test_what_is_said_of_a_test_prepares_images_as_it_did(stated: dict) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    config = dict(type='timm', input_size=24, crop_pct=0.75, interpolation='bicubic', **stated)
    said = preprocessing_of(config, 'transform')
    assert said.keys() == {'input_size', 'crop_pct', 'crop_mode', 'interpolation'}
    found, expected = create_transform(**said)(image), TRANSFORMS.build(config)(image)
    assert found.equal(expected)
    # no two modes make the same of an image that is no square
    others = {mode: create_transform(**{**said, 'crop_mode': mode})(image) for mode in CROP_MODES}
    assert sum(other.shape == found.shape and other.equal(found) for other in others.values()) == 1
