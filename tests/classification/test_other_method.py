"""A test of a checkpoint whose experts have the same tensors as the model's, of another method."""

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import MODELS

from vqmoe_vision.engine import cli
from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.publish import publish
from vqmoe_vision.engine.trained import load_trained, scope_of
from vqmoe_vision.models.compat import STATED, state_network

from ..rows import CONFIGS
from ..runs import NORMALIZATION

DIGITS = str(CONFIGS / 'classification/digits/demo/vit_tiny_vqmoe_demo.py')
SMALL: dict[str, Any] = dict(
    img_size=48, patch_size=16, depth=4, embed_dim=12, num_heads=3, class_token=False,
    global_pool='avg', num_classes=10, model_name='vit_tiny_smoe', moe=dict(num_experts=4),
)  # fmt: skip
MESSAGE = "saved with method='smoe', the model has method='ecmoe'"


@pytest.fixture
def left(tmp_path: Path) -> Path:
    """A work dir with a config and a checkpoint of random weights that says what they are of."""
    config = load_config(DIGITS, {f'model.{name}': value for name, value in SMALL.items()})
    config.model.moe = SMALL['moe']
    with scope_of(config):
        model = MODELS.build(config.model)
    model.normalize_as(NORMALIZATION)
    run = tmp_path / 'run'
    run.mkdir()
    config.dump(run / 'run.py')
    meta = {'epoch': 1, 'iter': 2, 'seed': 7, 'dataset_meta': {'classes': tuple('0123456789')}}
    content = {'state_dict': model.state_dict(), 'message_hub': {}}
    stated = state_network(model.routed_model)
    torch.save({**content, 'meta': {**meta, STATED: stated}}, run / 'epoch_1.pth')
    (run / 'last_checkpoint').write_text('epoch_1.pth')
    return run


def test_a_checkpoint_of_the_discrete_form_is_told_of_it() -> None:
    config = load_config(DIGITS, {f'model.{name}': value for name, value in SMALL.items()})
    config.model.update(model_name='vit_tiny_vqmoe', moe=dict(num_experts=4))
    with scope_of(config):
        full = MODELS.build(config.model)
        config.model.moe['form'] = 'discrete'
        discrete = MODELS.build(config.model)
    for alone in (discrete.state_dict(), discrete.routed_model.state_dict()):
        assert full.misfit(alone).startswith('missing keys: ')
        assert discrete.misfit(alone) == ''
    assert discrete.misfit(full.state_dict()) == full.misfit(full.state_dict()) == ''


@pytest.mark.parametrize('place', ['run', 'folder'])
def test_a_trained_model_of_another_method_is_refused(
    place: str, left: Path, tmp_path: Path
) -> None:
    path = left / 'epoch_1.pth'
    if place == 'folder':
        path = tmp_path / 'folder'
        publish([str(left), str(path)])
    run = str(left / 'run.py')
    load_trained(load_config(run), str(path), 'cpu')
    with pytest.raises(ValueError, match=MESSAGE):
        load_trained(load_config(run, {'model.model_name': 'vit_tiny_ecmoe'}), str(path), 'cpu')


def test_the_test_of_a_run_is_refused(left: Path, tmp_path: Path) -> None:
    command = [str(left / 'run.py'), str(left / 'epoch_1.pth'), '--work-dir', str(tmp_path / 'w')]
    name = f'experiment_name=other {tmp_path}'
    with pytest.raises(SystemExit, match=MESSAGE):
        cli.test([*command, '--cfg-options', 'model.model_name=vit_tiny_ecmoe', name])


def test_options_that_the_run_had_otherwise_are_logged(left: Path, tmp_path: Path) -> None:
    command = [str(left / 'run.py'), str(left / 'epoch_1.pth'), '--work-dir', str(tmp_path / 'w')]
    name = f'experiment_name=options {tmp_path}'
    cli.test([*command, '--cfg-options', 'model.moe.top_k=1', name])
    (log,) = (tmp_path / 'w').rglob('*.log')
    assert 'the experts were trained with top_k=2, the model has top_k=1' in log.read_text()
