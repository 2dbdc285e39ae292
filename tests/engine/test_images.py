"""Image files: which way is up, what deep pixels mean, and what is refused."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from vqmoe_vision.engine.images import displayed, list_images, opened, orientation, read_rgb, stored

from .. import cases, refused
from ..damaged import damaged

TURNS = range(1, 9)
FORMATS = {'a.jpg': {'quality': 100}, 'a.png': {}, 'a.tif': {}, 'a.webp': {'lossless': True}}


def exif(turn: int) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = turn
    return tags


def read(path: Path) -> np.ndarray:
    with opened(path, str(path)) as image:
        return np.asarray(read_rgb(image, str(path)))


@pytest.mark.parametrize('turn', TURNS)
@pytest.mark.parametrize('shape', [(2, 3), (2, 3, 3)])
def test_turns_are_pillows(turn, shape):
    pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    image = Image.fromarray(pixels)
    image.getexif()[ExifTags.Base.Orientation] = turn
    upright = np.asarray(ImageOps.exif_transpose(image))
    assert (displayed(pixels, turn) == upright).all()
    assert (stored(upright, turn) == pixels).all()


@pytest.mark.parametrize('name', FORMATS)
@pytest.mark.parametrize('turn', TURNS)
def test_a_file_is_read_as_it_is_displayed(name, turn, tmp_path):
    # a bright corner at the top left of an image that is wider than high, in the file
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8] = 255
    Image.fromarray(pixels).save(tmp_path / name, exif=exif(turn), **FORMATS[name])
    with opened(tmp_path / name, name) as image:
        assert orientation(image) == turn
    found = read(tmp_path / name)
    assert found.shape == displayed(pixels, turn).shape
    assert np.abs(found.astype(int) - displayed(pixels, turn)).max() < 8  # JPEG is lossy


@pytest.mark.parametrize('name', ['a.png', 'a.tif'])
def test_16_bits_are_cut_to_the_upper_8_and_floats_are_from_0_to_1(name, tmp_path):
    ramp = np.array([[0, 255, 256, 0x1234, 0x7FFF, 0xFFFF]], np.uint16)
    Image.fromarray(ramp).save(tmp_path / name)
    grey = [0, 0, 1, 0x12, 0x7F, 0xFF]
    assert read(tmp_path / name)[0].tolist() == [[value] * 3 for value in grey]
    Image.fromarray(np.array([[0.0, 0.25, 0.5, 1.0]], np.float32)).save(tmp_path / 'a.tif')
    found = read(tmp_path / 'a.tif')[0, :, 0].tolist()
    assert found == [0, 64, 128, 255]  # 63.75, and 127.5 to the even


@cases(
    'pixels, message',
    (np.float32([[0, 200]]), r'has floats of 0\.0\.\.200\.0; they must lie in 0\.\.1'),
    (np.float32([[-0.1, 1]]), r'has floats of -0\.1'),
    (np.float32([[np.nan, 1]]), 'has floats of nan'),
    (np.int32([[0, 200]]), 'has integers of 32 bits'),
)
def test_pixels_without_a_meaning(pixels, message, tmp_path):
    Image.fromarray(pixels).save(tmp_path / 'a.tif')
    refused(rf'a\.tif {message}', read, tmp_path / 'a.tif')


def test_a_bomb_is_named_before_it_goes_off(tmp_path):
    """A file of 100 bytes that claims 40,000 x 40,000 pixels, 4.8 GB."""
    path = tmp_path / 'a.png'
    Image.new('RGB', (1, 1)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = (40_000).to_bytes(4, 'big') * 2
    data[29:33] = PngImagePlugin._crc32(data[12:29]).to_bytes(4, 'big')
    path.write_bytes(data)
    message = r'a\.png is too large .*1600000000 pixels.*MAX_IMAGE_PIXELS'
    with pytest.raises(ValueError, match=message), opened(path, str(path)):
        pytest.fail('the header alone says how large it is')


def _sound_files() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 3), np.uint8)
    files = []
    for name, options in FORMATS.items():
        content = io.BytesIO()
        kind = Image.registered_extensions()[Path(name).suffix]
        Image.fromarray(pixels).save(content, kind, exif=exif(6), **options)
        files.append(content.getvalue())
    return files


@settings(max_examples=200)
@given(damaged(_sound_files()))
@pytest.mark.filterwarnings('ignore::UserWarning:PIL', 'ignore::RuntimeWarning:PIL')
def test_a_damaged_file_is_an_image_or_one_line(content):
    try:
        with opened(io.BytesIO(content), 'a.file') as image:
            assert read_rgb(image, 'a.file').mode == 'RGB'
    except ValueError as error:
        assert str(error).startswith('a.file ') and '\n' not in str(error)


def test_of_a_folder_regular_files_alone_are_images(tmp_path):
    Image.new('RGB', (2, 2)).save(tmp_path / 'a.png')
    (tmp_path / 'b.png').symlink_to(tmp_path / 'a.png')
    (tmp_path / 'c.png').mkdir()
    os.mkfifo(tmp_path / 'd.png')
    assert [path.name for path in list_images(tmp_path)] == ['a.png', 'b.png']
