"""A classifier is fed as the weights that it starts from were, from training to the survey."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.registry import TRANSFORMS
from mmengine.runner import Runner
from PIL import Image
from timm.data import create_transform
from torchvision import transforms

import vqmoe_vision.classification  # noqa: F401  registers the transforms
from vqmoe_vision.analysis.shifts import Corruption
from vqmoe_vision.classification.transforms import normalization_of, preprocessing_of
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.model import load_trained
from vqmoe_vision.models.normalization import Normalization

from .. import cases, refused
from ..rows import CONFIGS
from ..runs import NORMALIZATION, leave_run

DIGITS = CONFIGS / 'classification/digits/demo/vit_tiny_vqmoe_demo.py'
TINY = f"""
_base_ = {str(DIGITS)!r}
model = dict(patch_size=16, embed_dim=12, depth=2, num_heads=3, moe=dict(num_experts=2))
train_dataloader = dict(batch_size=600)
train_cfg = dict(max_epochs=1, val_interval=1)
param_scheduler = []
"""
SCRATCH = Normalization((0.3,) * 3, (0.35,) * 3)


def stating(normalization: Normalization, split: str) -> dict[str, Any]:
    """Options with which a transform states what it normalises with."""
    place = f'{split}_dataloader.dataset.transform'
    return {f'{place}.mean': list(normalization.mean), f'{place}.std': list(normalization.std)}


@pytest.fixture(scope='module')
def config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp('config') / 'tiny.py'
    path.write_text(TINY)
    return str(path)


def runner_of(config: str, work: Path, options: dict[str, Any]) -> Runner:
    settings = load_config(config, options)
    settings.update(work_dir=str(work), experiment_name=str(work))
    return Runner.from_cfg(settings)


@pytest.fixture(scope='module')
def weights(config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp('weights') / 'run'
    leave_run(run, config, {}, '0123456789')
    return run / 'epoch_1.pth'


def fed(runner: Runner, split: str) -> Normalization | None:
    """What a data set of a run normalises with."""
    return normalization_of(getattr(runner, f'{split}_dataloader').dataset.transform)


def same(found: Normalization | None, expected: Normalization) -> None:
    assert found is not None
    # float32 keeps seven digits of the numbers
    torch.testing.assert_close(found.values(), expected.values(), rtol=1e-6, atol=0)


def test_training_validation_and_tests_are_fed_as_the_weights_were(config, weights, tmp_path):
    runner = runner_of(config, tmp_path / 'train', {'model.checkpoint': str(weights)})
    same(fed(runner, 'train'), SCRATCH)
    runner.train()
    runner.test()
    for split in ('train', 'val', 'test'):
        same(fed(runner, split), NORMALIZATION)
    same(Normalization.of(runner.model.model.pretrained_cfg), NORMALIZATION)
    last = str(tmp_path / 'train/epoch_1.pth')
    tested = runner_of(config, tmp_path / 'test', {'load_from': last})
    tested.test()
    assert fed(tested, 'test') == fed(runner, 'test')
    model = load_trained(load_config(config), last, 'cpu')
    same(Normalization.of(model.model.pretrained_cfg), NORMALIZATION)
    file = tmp_path / 'images/a.png'
    file.parent.mkdir()
    Image.new('RGB', (48, 48), (100, 100, 100)).save(file)
    dataset = load_config(config).test_dataloader.dataset
    for source in (model.source(dataset), model.source(dataset, str(file.parent))):
        same(source.normalization, NORMALIZATION)
        image = source.read(source.found[0]).image
        pixels = source.normalization.pixels(image[None])
        assert pixels.min() >= 0 and pixels.max() <= 1
    expected = (100 / 255 - torch.tensor(NORMALIZATION.mean)) / torch.tensor(NORMALIZATION.std)
    torch.testing.assert_close(image[:, 0, 0], expected)


@pytest.mark.parametrize('stated', [False, True])
def test_weights_of_which_nothing_is_known_change_nothing(stated, config, weights, tmp_path):
    model = load_trained(load_config(config), str(weights), 'cpu').model
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    options = {'model.upcycle': str(tmp_path / 'bare.pth')}
    expected = NORMALIZATION if stated else SCRATCH
    options |= stating(NORMALIZATION, 'train') if stated else {}
    runner = runner_of(config, tmp_path / 'w', options)
    runner.train()
    for split in ('train', 'val'):
        same(fed(runner, split), expected)
    same(Normalization.of(runner.model.model.pretrained_cfg), expected)
    (log,) = (tmp_path / 'w').glob('*/*.log')
    told = 'and std [0.4,0.5,0.6], as train_dataloader.dataset.transform had them'
    assert log.read_text().count(told) == stated and 'as the weights' not in log.read_text()


@cases(
    'split, stated, start, owner',
    ('train', SCRATCH, 'model.checkpoint', 'the weights'),
    ('test', SCRATCH, 'load_from', 'the weights'),
    ('val', NORMALIZATION, None, 'train_dataloader.dataset.transform'),
)
def test_what_a_data_set_states_counts(split, stated, start, owner, config, weights, tmp_path):
    given = {start: str(weights)} if start else {}
    runner = runner_of(config, tmp_path, stating(stated, split) | given)
    runner.test() if split == 'test' else runner.train()
    same(fed(runner, split), stated)
    if split != 'test':
        same(runner.model.known_normalization, SCRATCH)
        same(fed(runner, 'train'), SCRATCH)
    lines = [line for log in tmp_path.glob('*/*.log') for line in log.read_text().splitlines()]
    (line,) = [line for line in lines if ' - WARNING - ' in line and 'contradict' in line]
    assert f'{split}_dataloader.dataset.transform' in line and f'contradict {owner}' in line


CROP_MODES = ('center', 'squash', 'border')
ZERO = dict(mean=(0.0,) * 3, std=(1.0,) * 3)


def test_crop_flip_shifts_by_at_most_the_padding():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[4, 4] = 255
    image = Image.fromarray(pixels)
    transform = TRANSFORMS.build(dict(type='crop_flip', input_size=8, padding=2, hflip=0.0, **ZERO))
    found = {tuple(transform(image)[0].nonzero()[0].tolist()) for _ in range(300)}
    # 5 x 5 shifts; 300 draws miss a given one with probability (24/25)^300 = 5e-6
    assert found == {(row, column) for row in range(2, 7) for column in range(2, 7)}


def test_a_table_normalises_every_byte_as_torchvision_does():
    # each byte in each channel, as 3 and 256 have no common divisor
    image = Image.fromarray(np.arange(768).astype(np.uint8).reshape(16, 16, 3))
    numbers = dict(mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
    ours = TRANSFORMS.build(dict(type='crop_flip', input_size=16, padding=0, hflip=0, **numbers))
    torchvisions = transforms.Compose([transforms.ToTensor(), transforms.Normalize(**numbers)])
    found, expected = ours(image), torchvisions(image)
    assert torch.equal(found, expected) and found.stride() == expected.stride()


@pytest.mark.parametrize('name', ['timm', 'crop_flip'])
def test_what_is_left_open_is_that_of_a_training_from_scratch(name):
    scratch = dict(mean=(0.5,) * 3, std=(0.25,) * 3)
    config = dict(type=name, input_size=8, mean=None, from_scratch=scratch)
    found = normalization_of(TRANSFORMS.build(dict(**config, std=None)))
    assert found == Normalization((0.5,) * 3, (0.25,) * 3)
    message = r'^transform\.std=\(0\.5, .*\) is not possible: beside transform\.mean$'
    refused(message, TRANSFORMS.build, dict(**config, std=(0.5,) * 3))


@pytest.mark.parametrize('place', ['transform', 'transform.from_scratch'])
@pytest.mark.parametrize('name', ['timm', 'crop_flip'])
@pytest.mark.parametrize('field', ['mean', 'std'])
@cases('value', (0.5,) * 2, (0.5,) * 4, 0.5, 'abc', ('0.5',) * 3, (127.5,) * 3, ids=str)
def test_numbers_that_no_images_have_are_refused(place, name, field, value):
    numbers: dict[str, Any] = {**ZERO, field: value}
    numbers = dict(from_scratch=numbers) if 'scratch' in place else numbers
    with pytest.raises(ValueError, match=re.escape(f'{place}.{field}={value!r} is not possible')):
        TRANSFORMS.build(dict(type=name, input_size=8, **numbers))


def test_a_shift_corrupts_the_image_of_a_test_alike_each_time():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    recipe = dict(type='timm', input_size=40, crop_pct=1.0, **ZERO)
    corrupted = TRANSFORMS.build(dict(recipe, shift='gaussian_noise_3'))(Image.fromarray(pixels))
    expected = Corruption('gaussian_noise_3')(pixels)
    assert (corrupted.permute(1, 2, 0) * 255).round().byte().equal(torch.from_numpy(expected))
    # severity 3 of ImageNet-C is a standard deviation of 0.18, before what leaves [0, 1] is cut off
    plain = TRANSFORMS.build(recipe)(Image.fromarray(pixels))
    assert 0.08 < (corrupted - plain).std() < 0.18


@pytest.mark.parametrize('stated', [{}, *({'crop_mode': mode} for mode in CROP_MODES)])
def test_what_is_said_of_a_test_prepares_images_as_it_did(stated):
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
