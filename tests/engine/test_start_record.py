"""A run says which weights it started from, by their values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.runner import Runner
from safetensors.torch import load_file
from timm.models import create_model, save_for_hf

from vqmoe_vision.engine.record import BEGUN, starting_weights

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
    # the same bytes
    zeros = [torch.zeros(2, dtype=dtype) for dtype in (torch.float32, torch.int32)]
    assert len({digest(written(tmp_path / 'zeros.pth', {'a': value})) for value in zeros}) == 2
    reshaped = {**STATE, 'a': STATE['a'].reshape(2, 2)}
    assert digest(written(tmp_path / 'reshaped.pth', reshaped)) != expected


def test_only_weights_on_this_machine_count(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path('vit_tiny').write_text('a file that is called as a model is')
    Path('resnet').mkdir()
    options = {'model_name': 'vit_tiny', 'features': 'resnet', 'moe': None, 'text': 'x' * 5_000}
    assert starting_weights(ConfigDict(checkpoint='gone.pth', **options), 'gone.pth') == {}


@pytest.fixture
def timm_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = create_model('vit_tiny_patch16_224', depth=1, img_size=16)
    save_for_hf(model, str(tmp_path / 'timm'), safe_serialization=True)
    return tmp_path / 'timm'


def test_weights_count_however_they_are_named(timm_folder: Path, tmp_path: Path) -> None:
    weights = str(timm_folder / 'model.safetensors')
    state = load_file(weights)
    copy = str(written(tmp_path / 'weights.ckpt', state))
    bare = tmp_path / 'bare'
    bare.mkdir()
    torch.save(state, bare / 'pytorch_model.bin')
    named = {
        'model.upcycle': f'local-dir:{timm_folder}',
        'model.checkpoint': copy,
        'model.backbone.pretrained_cfg_overlay.file': copy,
        'model.teachers.0': str(timm_folder),
        'model.teachers.1': str(bare),
        'model.other': weights,
    }
    model = ConfigDict(
        upcycle=named['model.upcycle'],
        checkpoint=copy,
        backbone={'pretrained_cfg_overlay': {'file': copy}},
        teachers=(str(timm_folder), str(bare)),
        other=weights,
    )
    found = starting_weights(model, copy)
    assert found.keys() == {*named, 'load_from'}
    assert len(set(found.values())) == 1  # the same values


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


def test_a_run_that_finds_nothing_to_resume_says_what_it_starts_from(
    first: Path, tmp_path: Path
) -> None:
    """It may have been killed before its first checkpoint, and left what it began with."""
    (tmp_path / 'killed').mkdir()
    left = {'moe_options': {}, 'starting_weights': {'model.checkpoint': 'lost'}}
    (tmp_path / 'killed' / BEGUN).write_text(json.dumps(left))
    anew = config_of(tmp_path / 'killed', **{'model.checkpoint': str(first)})
    anew.resume, anew.train_cfg.max_epochs = True, 1
    Runner.from_cfg(anew).train()
    found = record(tmp_path / 'killed')
    assert found['starting_weights'] == {'model.checkpoint': digest(first)}
    assert found['moe_options']['num_experts'] > 0


def test_what_mmengine_loads_counts_too(first: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / 'loaded')
    config.load_from, config.train_cfg.max_epochs = str(first), 1
    Runner.from_cfg(config).train()
    assert record(tmp_path / 'loaded')['starting_weights'] == {'load_from': digest(first)}
