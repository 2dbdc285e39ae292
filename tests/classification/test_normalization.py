"""A classifier is fed as the weights that it starts from were, from training to the survey."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import TRANSFORMS
from mmengine.runner import Runner
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vqmoe_vision.classification.transforms import normalization_of, normalized_as
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.trained import load_trained
from vqmoe_vision.models.normalization import Normalization

from ..rows import CONFIGS

DIGITS = CONFIGS / 'classification/digits/demo/vit_tiny_vqmoe_demo.py'
TINY = f"""
_base_ = {str(DIGITS)!r}
model = dict(patch_size=16, embed_dim=12, depth=2, num_heads=3, moe=dict(num_experts=2))
train_dataloader = dict(batch_size=600)
train_cfg = dict(max_epochs=1, val_interval=1)
param_scheduler = []
"""
SCRATCH = Normalization((0.3,) * 3, (0.35,) * 3)
IMAGENET = Normalization(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
SPLITS = ('train', 'val', 'test')


def stating(normalization: Normalization, *splits: str) -> dict[str, Any]:
    """Options with which the transforms state what they normalise with."""
    fields = {'mean': list(normalization.mean), 'std': list(normalization.std)}
    return {
        f'{split}_dataloader.dataset.transform.{name}': value
        for split in splits
        for name, value in fields.items()
    }


@pytest.fixture(scope='module')
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp('config') / 'tiny.py'
    path.write_text(TINY)
    return str(path)


def runner_of(config: str, work: Path, options: dict[str, Any]) -> Runner:
    settings = load_config(config, options)
    settings.update(work_dir=str(work), experiment_name=str(work))
    return Runner.from_cfg(settings)


@pytest.fixture(scope='module')
def imagenet(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a run that was told to normalise as ImageNet's configs do."""
    work = tmp_path_factory.mktemp('imagenet')
    runner_of(config, work, stating(IMAGENET, *SPLITS)).train()
    return work / 'epoch_1.pth'


def fed(runner: Runner, split: str) -> Normalization:
    """What a data set of a run normalises with."""
    found = normalization_of(getattr(runner, f'{split}_dataloader').dataset.transform)
    assert found is not None
    return found


def same(found: Normalization | None, expected: Normalization) -> None:
    assert found is not None
    # float32 keeps seven digits of the numbers
    torch.testing.assert_close(found.values(), expected.values(), rtol=1e-6, atol=0)


def test_training_validation_and_tests_are_fed_as_the_weights_were(
    config: str, imagenet: Path, tmp_path: Path
) -> None:
    runner = runner_of(config, tmp_path / 'train', {'model.checkpoint': str(imagenet)})
    same(fed(runner, 'train'), SCRATCH)
    runner.train()
    runner.test()
    for split in SPLITS:
        same(fed(runner, split), IMAGENET)
    same(Normalization.of(runner.model.model.pretrained_cfg), IMAGENET)
    last = str(tmp_path / 'train/epoch_1.pth')
    tested = runner_of(config, tmp_path / 'test', {'load_from': last})
    tested.test()
    assert fed(tested, 'test') == fed(runner, 'test')
    model = load_trained(load_config(config), last, 'cpu')
    same(Normalization.of(model.model.pretrained_cfg), IMAGENET)
    image = tmp_path / 'images/a.png'
    image.parent.mkdir()
    Image.new('RGB', (48, 48), (100, 100, 100)).save(image)
    dataset = load_config(config).test_dataloader.dataset
    for source in (model.source(dataset), model.source(dataset, str(image.parent))):
        same(source.normalization, IMAGENET)
        pixels = source.normalization.pixels(source.samples[0].image[None])
        assert pixels.min() >= 0 and pixels.max() <= 1
    expected = (100 / 255 - torch.tensor(IMAGENET.mean)) / torch.tensor(IMAGENET.std)
    torch.testing.assert_close(source.samples[0].image[:, 0, 0], expected)


def test_from_scratch_the_config_says_it_and_timm_would_save_it(
    config: str, tmp_path: Path
) -> None:
    runner = runner_of(config, tmp_path, {})
    runner.train()
    for split in ('train', 'val'):
        same(fed(runner, split), SCRATCH)
    same(runner.model.known_normalization, SCRATCH)
    same(Normalization.of(runner.model.model.pretrained_cfg), SCRATCH)


@pytest.mark.parametrize('stated', [False, True])
def test_weights_of_which_nothing_is_known_change_nothing(
    stated: bool, config: str, imagenet: Path, tmp_path: Path
) -> None:
    model = load_trained(load_config(config), str(imagenet), 'cpu').model
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    options = {'model.upcycle': str(tmp_path / 'bare.pth')}
    expected = IMAGENET if stated else SCRATCH
    runner = runner_of(
        config, tmp_path / 'w', options | (stating(IMAGENET, 'train') if stated else {})
    )
    runner.train()
    for split in ('train', 'val'):
        same(fed(runner, split), expected)
    same(Normalization.of(runner.model.model.pretrained_cfg), expected)
    (log,) = (tmp_path / 'w').glob('*/*.log')
    told = 'and std [0.229,0.224,0.225], as train_dataloader.dataset.transform had them'
    assert log.read_text().count(told) == stated and 'as the weights' not in log.read_text()


def warnings_of(work: Path) -> list[str]:
    return [
        line
        for log in work.glob('*/*.log')
        for line in log.read_text().splitlines()
        if ' - WARNING - ' in line and 'contradict' in line
    ]


def test_a_training_set_that_contradicts_counts_with_one_warning(
    config: str, imagenet: Path, tmp_path: Path
) -> None:
    work = tmp_path / 'w'
    options = stating(SCRATCH, 'train') | {'model.checkpoint': str(imagenet)}
    runner = runner_of(config, work, options)
    runner.train()
    for split in ('train', 'val'):
        same(fed(runner, split), SCRATCH)
    same(runner.model.known_normalization, SCRATCH)
    (line,) = warnings_of(work)
    assert 'train_dataloader.dataset.transform' in line and '[0.485,0.456,0.406]' in line
    model = load_trained(load_config(config), str(work / 'epoch_1.pth'), 'cpu')
    same(Normalization.of(model.model.pretrained_cfg), SCRATCH)


def test_a_test_set_that_contradicts_counts_with_one_warning(
    config: str, imagenet: Path, tmp_path: Path
) -> None:
    work = tmp_path / 'w'
    runner = runner_of(config, work, stating(SCRATCH, 'test') | {'load_from': str(imagenet)})
    runner.test()
    same(fed(runner, 'test'), SCRATCH)
    (line,) = warnings_of(work)
    assert 'test_dataloader.dataset.transform' in line


def test_validation_that_contradicts_training_is_a_warning(config: str, tmp_path: Path) -> None:
    runner = runner_of(config, tmp_path, stating(IMAGENET, 'val'))
    runner.train()
    same(fed(runner, 'val'), IMAGENET)
    same(runner.model.known_normalization, SCRATCH)
    (line,) = warnings_of(tmp_path)
    assert 'contradict train_dataloader.dataset.transform' in line


@TRANSFORMS.register_module(name='of_a_user')
def of_a_user(size: int) -> Any:
    return TRANSFORMS.build(dict(type='timm', input_size=size, mean=(0.5,) * 3, std=(0.5,) * 3))


@pytest.mark.parametrize('name', ['timm', 'crop_flip'])
def test_transforms_follow(name: str) -> None:
    config = ConfigDict(type=name, input_size=8, from_scratch=vars(SCRATCH))
    same(normalization_of(normalized_as(config, None, 'a')), SCRATCH)
    same(normalization_of(normalized_as(config, IMAGENET, 'a')), IMAGENET)
    # it is stated, and the weights agree
    same(normalization_of(normalized_as(config | vars(IMAGENET), IMAGENET, 'a')), IMAGENET)


def test_a_transform_of_a_user_cannot_follow() -> None:
    config = ConfigDict(type='of_a_user', size=8)
    half = Normalization((0.5,) * 3, (0.5,) * 3)
    same(normalization_of(normalized_as(config, half, 'a')), half)
    same(normalization_of(normalized_as(config, IMAGENET, 'a')), half)


def test_a_transform_that_says_nothing() -> None:
    with pytest.raises(ValueError, match=r'^transform\.mean=None is not possible: .* from_scratch'):
        TRANSFORMS.build(dict(type='crop_flip', input_size=8))


@pytest.mark.parametrize(
    ('path', 'mean', 'std'),
    [
        ('cifar10', (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ('cifar10_budget', (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ('cifar100', (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        ('digits/demo/vit_tiny_vqmoe_demo', SCRATCH.mean, SCRATCH.std),
        ('imagenet/vit_tiny_vqmoe_imagenet', IMAGENET.mean, IMAGENET.std),
        ('stl10', (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ('svhn', (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    ],
)
def test_from_scratch_the_configs_say_what_they_said(path: str, mean: Any, std: Any) -> None:
    config = load_config(str(CONFIGS / f'classification/{path}.py'))
    for split in SPLITS:
        transform = TRANSFORMS.build(config[f'{split}_dataloader'].dataset.transform)
        found = normalization_of(transform)
        assert found is not None
        torch.testing.assert_close(found.values(), Normalization(mean, std).values())
