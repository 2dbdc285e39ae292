"""What a run says of itself covers the whole run, however often it was resumed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.runner import Runner
from PIL import Image
from timm.models import create_model, save_for_hf

from vqmoe_vision.classification.datasets import class_folder
from vqmoe_vision.engine.record import described, starting_weights
from vqmoe_vision.models.moe_vit import complexity
from vqmoe_vision.moe import METHODS

from .tiny import config_of, resumed, trained

RECORD = {'default_hooks.record.type': 'RunRecordHook'}
ONCE = {**RECORD, 'train_cfg.max_epochs': 1}


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / 'run.json').read_text())


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A run of two epochs, trained."""
    return trained(config_of(tmp_path_factory.mktemp('record') / 'whole', **RECORD))


def test_a_resumed_run_has_the_record_of_one_that_was_not_interrupted(
    whole: Runner, tmp_path: Path
) -> None:
    trained(config_of(tmp_path / 'parts', **ONCE))
    before = record(tmp_path / 'parts')
    assert len(before['first_losses']) == 10
    # its experts were made once, by what was the default then
    then = {**before['moe_options'], 'upcycling': {'drop': 0.5}}
    path = tmp_path / 'parts/epoch_1.pth'
    content = torch.load(path, weights_only=False)
    content['run_record']['begun']['moe_options'] = then
    torch.save(content, path)
    trained(resumed(tmp_path / 'parts', **RECORD))
    one, other = record(Path(whole.work_dir)), record(tmp_path / 'parts')
    # the commit once, not once for each part
    for field in ('first_losses', 'held_out', 'training_loss', 'params', 'macs', 'commit'):
        assert one[field] == other[field], field
    assert len(one['first_losses']) == 20 and len(one['held_out']) == 2
    assert one['starting_weights'] == {}
    assert other['moe_options'] == then
    assert other['minutes'] > before['minutes'] and other['cpu_minutes'] > before['cpu_minutes']
    assert one['macs'] == complexity(whole.model.routed_model).macs
    assert (Path(whole.work_dir) / 'progress').read_text() == '20 20\n'


def test_the_first_losses_can_be_had_alone(whole: Runner, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        trained(
            config_of(tmp_path / 'first', **RECORD, **{'default_hooks.record.only_first': True})
        )
    assert end.value.code == 0
    found = record(tmp_path / 'first')
    assert len(found['training_loss']) == 20
    assert found['first_losses'] == record(Path(whole.work_dir))['first_losses']


def test_a_run_is_not_resumed_with_other_defaults_or_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(config_of(tmp_path / 'parts', **ONCE))
    with pytest.raises(ValueError, match=r'data.train=.* is not possible: .* as when the run'):
        trained(resumed(tmp_path / 'parts', **RECORD, **{'train_dataloader.dataset.imbalance': 2}))
    monkeypatch.setitem(METHODS['vqmoe'].config.__init__.__kwdefaults__, 'code_share', 0.3)
    with pytest.raises(ValueError, match=r'moe.code_share=0.3 is not possible: 0.05, as when'):
        trained(resumed(tmp_path / 'parts', **RECORD))


TRANSFORM = dict(type='timm', input_size=8, mean=[0.5] * 3, std=[0.5] * 3)


def folder(root: Path, names: list[str]) -> dict[str, Any]:
    for name in names:
        path = root / 'train' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(path)
    return described(class_folder(str(root), 'train', TRANSFORM))


def test_folders_of_classes(tmp_path: Path) -> None:
    names = ['cat/1.png', 'cat/2.png', 'dog/3.png']
    one = folder(tmp_path / 'one', names)
    assert one['samples'] == 3
    assert folder(tmp_path / 'elsewhere', names[::-1]) == one
    in_memory = class_folder(str(tmp_path / 'one'), 'train', TRANSFORM, in_memory=True)
    assert described(in_memory) == one
    digests = {
        folder(tmp_path / str(number), other)['digest']
        for number, other in enumerate(
            [names[:2], ['cat/1.png', 'dog/2.png', 'dog/3.png'], ['cat/1.png', 'cat/4.png']]
        )
    }
    assert len(digests | {one['digest']}) == 4


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
    for a in (STATE['a'].view(torch.int32), STATE['a'].reshape(2, 2)):  # the same bytes
        assert digest(written(tmp_path / 'other.pth', {**STATE, 'a': a})) != expected


def test_weights_count_however_they_are_named(tmp_path: Path) -> None:
    model = create_model('vit_tiny_patch16_224', depth=1, img_size=16)
    save_for_hf(model, str(tmp_path / 'timm'), safe_serialization=True)
    weights, bare = str(tmp_path / 'timm/model.safetensors'), tmp_path / 'bare'
    copy = str(written(tmp_path / 'weights.ckpt', model.state_dict()))
    bare.mkdir()
    torch.save(model.state_dict(), bare / 'pytorch_model.bin')
    config = ConfigDict(
        upcycle=f'local-dir:{tmp_path}/timm',
        checkpoint=copy,
        backbone={'pretrained_cfg_overlay': {'file': copy}},
        teachers=(str(tmp_path / 'timm'), str(bare)),
        other=weights,
        features='gone.pth',
        text='x' * 5_000,
    )
    found = starting_weights(config, copy)
    names = 'upcycle checkpoint backbone.pretrained_cfg_overlay.file teachers.0 teachers.1 other'
    assert found.keys() == {*(f'model.{name}' for name in names.split()), 'load_from'}
    assert len(set(found.values())) == 1  # the same values


def test_a_run_says_what_it_started_from_and_not_what_is_there_now(
    whole: Runner, tmp_path: Path
) -> None:
    source, folder = tmp_path / 'source.pth', tmp_path / 'run'
    shutil.copy(Path(whole.work_dir) / 'epoch_2.pth', source)
    expected, start = {'model.checkpoint': digest(source)}, {'model.checkpoint': str(source)}
    trained(resumed(folder, **ONCE, **start))  # of one that was killed before its first checkpoint
    assert record(folder)['starting_weights'] == expected
    assert record(folder)['moe_options']['num_experts'] > 0
    content = torch.load(source, weights_only=False)
    changed = {name: value + 1 for name, value in content['state_dict'].items()}
    torch.save({**content, 'state_dict': changed}, source)
    trained(resumed(folder, **RECORD, **start))
    assert record(folder)['starting_weights'] == expected != {'model.checkpoint': digest(source)}
