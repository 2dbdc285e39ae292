"""What a run says of itself covers the whole run, however often it was resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.record import BEGUN
from vqmoe_vision.models.complexity import complexity
from vqmoe_vision.moe import METHODS

from ..rows import CONFIGS

OPTIONS = {
    'model.depth': 2,
    'model.embed_dim': 12,
    'model.patch_size': 16,
    'train_dataloader.batch_size': 120,  # 10 batches
    'train_cfg.max_epochs': 2,
    'train_cfg.val_interval': 1,
    'param_scheduler.1.end': 3,
    'default_hooks.checkpoint.interval': 1,
    'default_hooks.record.type': 'RunRecordHook',
}


def config_of(folder: Path, **more: Any) -> Config:
    leaf = CONFIGS / 'classification/digits/demo/vit_tiny_vqmoe_demo.py'
    config = load_config(str(leaf), {**OPTIONS, **more})
    config.work_dir, config.experiment_name = str(folder), f'{folder.parent.name}_{folder.name}'
    return config


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / 'run.json').read_text())


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A run of two epochs, trained."""
    runner = Runner.from_cfg(config_of(tmp_path_factory.mktemp('record') / 'whole'))
    runner.train()
    return runner


def test_a_resumed_run_has_the_record_of_one_that_was_not_interrupted(
    whole: Runner, tmp_path: Path
) -> None:
    first = config_of(tmp_path / 'parts')
    first.train_cfg.max_epochs = 1
    Runner.from_cfg(first).train()
    before = record(tmp_path / 'parts')
    assert len(before['first_losses']) == 10
    # its experts were made once, by what was the default then
    then = {**before['moe_options'], 'upcycling': {'drop': 0.5}}
    (tmp_path / 'parts' / BEGUN).write_text(json.dumps({'moe_options': then}))
    second = config_of(tmp_path / 'parts')
    second.resume, second.experiment_name = True, 'second_part'
    Runner.from_cfg(second).train()
    one, other = record(Path(whole.work_dir)), record(tmp_path / 'parts')
    for field in ('first_losses', 'held_out', 'training_loss', 'params', 'macs'):
        assert one[field] == other[field], field
    assert len(one['first_losses']) == 20 and len(one['held_out']) == 2
    begun = json.loads((Path(whole.work_dir) / BEGUN).read_text())
    assert begun == {'moe_options': one['moe_options'], 'starting_weights': {}}
    assert other['moe_options'] == then
    assert other['minutes'] > before['minutes']
    assert other['cpu_minutes'] > before['cpu_minutes']
    assert one['commit'] == other['commit']  # once, not once for each part
    assert one['macs'] == complexity(whole.model.routed_model).macs
    assert (Path(whole.work_dir) / 'progress').read_text() == '20 20\n'


def test_the_first_losses_can_be_had_alone(whole: Runner, tmp_path: Path) -> None:
    runner = Runner.from_cfg(
        config_of(tmp_path / 'first', **{'default_hooks.record.only_first': True})
    )
    with pytest.raises(SystemExit) as end:
        runner.train()
    assert end.value.code == 0
    found = record(tmp_path / 'first')
    assert len(found['training_loss']) == 20
    assert found['first_losses'] == record(Path(whole.work_dir))['first_losses']


def test_a_run_is_not_resumed_with_other_defaults_or_data(
    whole: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert record(Path(whole.work_dir))['moe_options']['code_share'] == 0.05
    first = config_of(tmp_path / 'parts')
    first.train_cfg.max_epochs = 1
    Runner.from_cfg(first).train()
    other = config_of(tmp_path / 'parts', **{'train_dataloader.dataset.imbalance': 2})
    other.resume, other.experiment_name = True, 'with_other_data'
    with pytest.raises(
        ValueError, match=r'data.train=.* is not possible: .* as when the run began'
    ):
        Runner.from_cfg(other).train()
    monkeypatch.setitem(METHODS['vqmoe'].config.__init__.__kwdefaults__, 'code_share', 0.3)
    second = config_of(tmp_path / 'parts')
    second.resume, second.experiment_name = True, 'with_other_defaults'
    with pytest.raises(ValueError, match=r'moe.code_share=0.3 is not possible: 0.05, as when'):
        Runner.from_cfg(second).train()
