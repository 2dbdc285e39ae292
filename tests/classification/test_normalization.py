"""A classifier is fed as the weights that it starts from were, from training to the survey."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner import Runner
from PIL import Image

from vqmoe_vision.classification.transforms import normalization_of
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.model import load_trained
from vqmoe_vision.models.normalization import Normalization

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
def weights(config: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a run with a normalisation of its own."""
    run = tmp_path_factory.mktemp('weights') / 'run'
    leave_run(run, config, {}, '0123456789')
    return run / 'epoch_1.pth'


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
    config: str, weights: Path, tmp_path: Path
) -> None:
    runner = runner_of(config, tmp_path / 'train', {'model.checkpoint': str(weights)})
    same(fed(runner, 'train'), SCRATCH)
    runner.train()
    runner.test()
    for split in SPLITS:
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
def test_weights_of_which_nothing_is_known_change_nothing(
    stated: bool, config: str, weights: Path, tmp_path: Path
) -> None:
    model = load_trained(load_config(config), str(weights), 'cpu').model
    torch.save(model.state_dict(), tmp_path / 'bare.pth')
    options = {'model.upcycle': str(tmp_path / 'bare.pth')}
    expected = NORMALIZATION if stated else SCRATCH
    runner = runner_of(
        config, tmp_path / 'w', options | (stating(NORMALIZATION, 'train') if stated else {})
    )
    runner.train()
    for split in ('train', 'val'):
        same(fed(runner, split), expected)
    same(Normalization.of(runner.model.model.pretrained_cfg), expected)
    (log,) = (tmp_path / 'w').glob('*/*.log')
    told = 'and std [0.4,0.5,0.6], as train_dataloader.dataset.transform had them'
    assert log.read_text().count(told) == stated and 'as the weights' not in log.read_text()


@pytest.mark.parametrize(
    ('split', 'stated', 'start', 'owner'),
    [
        ('train', SCRATCH, 'model.checkpoint', 'the weights'),
        ('test', SCRATCH, 'load_from', 'the weights'),
        ('val', NORMALIZATION, None, 'train_dataloader.dataset.transform'),
    ],
)
def test_what_a_data_set_states_counts_with_one_warning(
    split: str,
    stated: Normalization,
    start: str | None,
    owner: str,
    config: str,
    weights: Path,
    tmp_path: Path,
) -> None:
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
