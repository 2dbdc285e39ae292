"""The history of routing: what it holds, and that it changes nothing.

A resumed run has the history of one that was not interrupted.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from vqmoe_vision.engine.cli import load_config
from vqmoe_vision.engine.routing_log import SAMPLED, RoutingHistoryHook, _change, read_history
from vqmoe_vision.engine.routing_log import _picked as picked
from vqmoe_vision.engine.routing_log import _sample as sample
from vqmoe_vision.moe import METHODS

from ..rows import CONFIGS

OPTIONS = {
    'model.depth': 2,
    'model.embed_dim': 12,
    'model.patch_size': 16,
    'train_dataloader.batch_size': 120,
    'train_cfg.max_epochs': 2,
    'train_cfg.val_interval': 1,
    'param_scheduler.1.end': 3,
    'default_hooks.checkpoint.interval': 1,
}
# of 20 iterations a line after every third, so that a checkpoint after ten lies between two
HISTORY = {
    'default_hooks.routing_history.type': 'RoutingHistoryHook',
    'default_hooks.routing_history.records': 6,
}


def config_of(folder: Path, method: str, **more: Any) -> Config:
    leaf = CONFIGS / 'classification/digits/demo/vit_tiny_vqmoe_demo.py'
    options = {**OPTIONS, 'model.model_name': f'vit_tiny_{method}', **more}
    config = load_config(str(leaf), options)
    config.work_dir, config.experiment_name = str(folder), f'{folder.parent.name}_{folder.name}'
    return config


def trained(config: Config) -> Runner:
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


def history(folder: Path) -> list[dict[str, Any]]:
    return read_history(folder / 'routing.jsonl')


def losses_of(runner: Runner) -> list[float]:
    return runner.message_hub.get_scalar('train/loss').data[0].tolist()


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A run of two epochs, trained, with a history."""
    return trained(config_of(tmp_path_factory.mktemp('history') / 'whole', 'vqmoe', **HISTORY))


def test_a_line_holds_shares_and_changes(whole: Runner) -> None:
    lines = history(Path(whole.work_dir))
    assert [line['iteration'] for line in lines] == [3, 6, 9, 12, 15, 18]
    for line in lines:
        (layer,) = line['layers'].values()
        assert sum(layer['load']) == pytest.approx(1, abs=1e-4)
        assert sum(layer['code_usage']) == pytest.approx(1, abs=1e-4)
        assert layer['change'].keys() == {'router', 'experts', 'gate', 'quantizer', 'codebook'}
        assert all(change > 0 for change in layer['change'].values())
    (first,) = lines[0]['layers'].values()
    assert first['change']['gate'] == 1  # |w - 0| / |w|: it starts at zero


def test_a_resumed_run_has_the_history_of_one_that_was_not_interrupted(
    whole: Runner, tmp_path: Path
) -> None:
    folder = tmp_path / 'parts'
    half = {**HISTORY, 'default_hooks.routing_history.records': 3, 'train_cfg.max_epochs': 1}
    trained(config_of(folder, 'vqmoe', **half))
    assert [line['iteration'] for line in history(folder)] == [3, 6, 9]
    with (folder / 'routing.jsonl').open('a') as file:  # work that a kill has lost, and half a line
        file.write('{"iteration": 11, "layers": {}}\n{"iterat')
    second = config_of(folder, 'vqmoe', **HISTORY)
    second.resume, second.experiment_name = True, 'second_part_of_history'
    trained(second)
    assert history(folder) == history(Path(whole.work_dir))


def test_a_new_run_in_the_same_folder_starts_a_new_file(tmp_path: Path) -> None:
    folder = tmp_path / 'again'
    folder.mkdir()
    (folder / 'routing.jsonl').write_text('{"iteration": 1, "layers": {}}\n')
    trained(config_of(folder, 'smoe', **HISTORY, **{'train_cfg.max_epochs': 1}))
    assert [line['iteration'] for line in history(folder)] == list(range(1, 11))


@pytest.mark.parametrize(
    ('method', 'options'),
    [
        # one that decides by features has to have them first
        *(
            pytest.param(name, {}, marks=[pytest.mark.long] * (name != 'vqmoe'))
            for name, method in METHODS.items()
            if not method.needs_features
        ),
        ('smoe', {'model.moe.router_noise': 0.5}),
    ],
)
def test_losses_and_weights_are_those_of_a_run_without(
    method: str, options: dict[str, float], tmp_path: Path
) -> None:
    short = {
        **options,
        'train_cfg.max_epochs': 1,
        'train_cfg.val_interval': 2,
        'train_dataloader.batch_size': 240,
    }
    plain = trained(config_of(tmp_path / 'plain', method, **short))
    recorded = trained(config_of(tmp_path / 'recorded', method, **short, **HISTORY))
    assert not (tmp_path / 'plain' / 'routing.jsonl').exists()
    assert len(history(tmp_path / 'recorded')) == len(losses_of(plain)) == 5
    assert losses_of(plain) == losses_of(recorded)
    with_history = recorded.model.state_dict()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, with_history[name]), name


def test_change_by_hand() -> None:
    # |(3, 4) - (0, 0)| / |(3, 4)| = 1; |(6, 8) - (3, 4)| / |(6, 8)| = 5 / 10
    old, new = torch.tensor([3.0, 4.0]), torch.tensor([6.0, 8.0])
    zero = torch.zeros(2)
    before = {'router': zero, 'experts': old, 'gate': zero}
    now = {'router': old, 'experts': new, 'gate': zero}
    assert _change(before, now) == {'router': 1.0, 'experts': 0.5, 'gate': 0.0}


def test_a_sample_stands_for_all_weights() -> None:
    weights = torch.randn(40, SAMPLED)
    # of n entries a squared norm is known to sqrt(2 / n) = 1.1 %, the norm to half of it
    assert picked(weights).norm().item() == pytest.approx(weights.norm().item(), rel=0.03)
    assert torch.equal(picked(weights), picked(weights))
    state = torch.get_rng_state()
    picked(weights)
    assert torch.equal(torch.get_rng_state(), state)  # a run that does not reseed would differ
    few = torch.randn(3, 5)
    kept = picked(few)
    assert torch.equal(kept, few.flatten())
    few.zero_()
    assert kept.norm() > 0  # a copy


@pytest.mark.parametrize('method', METHODS)
def test_every_part_of_a_layer_is_recorded(method: str) -> None:
    model = timm.create_model(
        f'vit_tiny_{method}', img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=3
    )
    layer = model.blocks[1].mlp
    parts = sample(layer)
    trained_parts = {name.partition('.')[0] for name, _ in layer.named_parameters()}
    assert trained_parts <= parts.keys()
    with torch.no_grad():
        layer.experts.fc1.weight.mul_(1.5)
    changed = _change(parts, sample(layer))
    assert {name for name, change in changed.items() if change > 0} == {'experts'}


def test_a_line_that_a_kill_has_cut_off_is_none(tmp_path: Path) -> None:
    (file := tmp_path / 'routing.jsonl').write_bytes(b'{"iteration": 1, "layers": {}}\n{"iterat')
    assert read_history(file) == [{'iteration': 1, 'layers': {}}]


def test_records_are_counted_from_one() -> None:
    with pytest.raises(ValueError, match='records=0 is not possible: at least 1'):
        RoutingHistoryHook(records=0)
    with pytest.raises(ValueError, match="records='many' is not possible: int is expected"):
        RoutingHistoryHook(records='many')


def test_a_model_without_experts_has_lines_without_layers(tmp_path: Path) -> None:
    model = SimpleNamespace(routed_model=nn.Linear(1, 1))
    runner: Any = SimpleNamespace(
        model=model, iter=0, max_iters=2, work_dir=str(tmp_path), _resume=False
    )
    hook = RoutingHistoryHook()
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)
    assert history(tmp_path) == [{'iteration': 1, 'layers': {}}]
