"""A run says which weights it started from, by their values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.runner import Runner
from timm.models import create_model, save_for_hf

from vqmoe_vision.engine.record import BEGUN
from vqmoe_vision.engine.start_record import starting_weights

from .test_record import config_of, record


def written(path: Path, state: dict[str, Any], **more: Any) -> Path:
    torch.save({'state_dict': state, **more}, path)
    return path


def digest(path: Path) -> str:
    found = starting_weights(ConfigDict(type='Model', backbone={'checkpoint': str(path)}))
    assert list(found) == ['model.backbone.checkpoint']
    return found['model.backbone.checkpoint']


STATE = {'a': torch.arange(4.0), 'b': torch.tensor(3), 'c': torch.ones(2, dtype=torch.bfloat16)}


def test_the_digest_is_of_names_and_values(tmp_path: Path) -> None:
    expected = digest(written(tmp_path / 'first.pth', STATE, meta={'time': 'Monday'}))
    turned = dict(reversed(STATE.items()))
    assert digest(written(tmp_path / 'later.pth', turned, meta={'time': 'Tuesday'})) == expected
    for name, value in STATE.items():
        other = {**STATE, name: value + 1}
        assert digest(written(tmp_path / f'{name}.pth', other)) != expected, name
    renamed = {f'{name}s': value for name, value in STATE.items()}
    assert digest(written(tmp_path / 'renamed.pth', renamed)) != expected
    reshaped = {**STATE, 'a': STATE['a'].reshape(2, 2)}
    assert digest(written(tmp_path / 'reshaped.pth', reshaped)) != expected


def test_only_weights_on_this_machine_count(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path('vit_tiny').write_text('a file that is called as a model is')
    options = ConfigDict(model_name='vit_tiny', checkpoint='gone.pth', moe=None, text='x' * 5_000)
    assert starting_weights(options) == {}
    torch.manual_seed(0)
    save_for_hf(create_model('vit_tiny_patch16_224', depth=1, img_size=16), 'timm')
    assert list(starting_weights(ConfigDict(teachers=['timm']))) == ['model.teachers.0']


@pytest.fixture(scope='module')
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of an epoch."""
    folder = tmp_path_factory.mktemp('start') / 'first'
    config = config_of(folder)
    config.train_cfg.max_epochs = 1
    Runner.from_cfg(config).train()
    return folder / 'epoch_1.pth'


def test_a_resumed_run_says_what_it_started_from_and_not_what_is_there_now(
    first: Path, tmp_path: Path
) -> None:
    source = tmp_path / 'source.pth'
    source.write_bytes(first.read_bytes())
    started = config_of(tmp_path / 'run', **{'model.checkpoint': str(source)})
    started.train_cfg.max_epochs = 1
    Runner.from_cfg(started).train()
    expected = {'model.checkpoint': digest(first)}
    assert record(tmp_path / 'run')['starting_weights'] == expected
    content = torch.load(source, weights_only=False)
    changed = {name: value + 1 for name, value in content['state_dict'].items()}
    torch.save({**content, 'state_dict': changed}, source)
    again = config_of(tmp_path / 'run', **{'model.checkpoint': str(source)})
    again.resume, again.experiment_name = True, 'goes_on'
    Runner.from_cfg(again).train()
    assert record(tmp_path / 'run')['starting_weights'] == expected
    assert digest(source) != digest(first)


def test_a_run_of_before_does_not_say_what_is_there_now(first: Path, tmp_path: Path) -> None:
    started = config_of(tmp_path / 'old', **{'model.checkpoint': str(first)})
    started.train_cfg.max_epochs = 1
    Runner.from_cfg(started).train()
    (tmp_path / 'old' / BEGUN).unlink()
    again = config_of(tmp_path / 'old', **{'model.checkpoint': str(first)})
    again.resume, again.experiment_name = True, 'goes_on_without'
    Runner.from_cfg(again).train()
    assert 'starting_weights' not in record(tmp_path / 'old')
    assert 'starting_weights' not in json.loads((tmp_path / 'old' / BEGUN).read_text())
