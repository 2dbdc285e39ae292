import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from mmengine.runner import Runner

from vqmoe_vision.engine import RoutingStatistics
from vqmoe_vision.engine.hooks import lines_of
from vqmoe_vision.engine.record import _change, read_history
from vqmoe_vision.engine.record import _sample as sample
from vqmoe_vision.moe import METHODS

from .tiny import config_of, resumed, trained


def test_an_expert_that_one_batch_does_not_use_is_not_unused() -> None:
    statistics = RoutingStatistics()
    statistics.add({'a/load': torch.tensor([1.0, 0.0, 0.0])})
    statistics.add({'a/load': torch.tensor([0.5, 0.5, 0.0])})
    # means 0.75, 0.25, 0; entropy 0.75 ln(4 / 3) + 0.25 ln 4 = 0.5623, e^0.5623 = 1.7548
    assert statistics.summary() == {
        'a/load_min': 0.0,
        'a/load_max': 0.75,
        'a/load_unused': 1,
        'a/load_perplexity': pytest.approx(1.7548, abs=1e-4),
    }


def test_every_statistic_of_a_layer_is_averaged_and_reported() -> None:
    statistics = RoutingStatistics()
    share = torch.tensor([0.25, 0.75])
    statistics.add({'a/load': share, 'a/new': torch.tensor(0.5), 'a/none': torch.tensor(0.0)})
    statistics.add({'a/load': share, 'a/new': torch.tensor(1.0), 'b/load': share})
    assert statistics.summary()['a/new'] == 0.75
    assert statistics.summary()['b/load_max'] == 0.75
    perplexity = math.exp(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    load = f'load 0.250..0.750 perplexity {perplexity:.2f} unused 0/2'
    assert lines_of(statistics.means()) == [f'a  {load}  new 0.75', f'b  {load}']


def test_values_that_are_not_finite_are_left_out() -> None:
    statistics = RoutingStatistics()
    statistics.add({'a/error': torch.tensor(0.5), 'a/bad': torch.tensor(torch.nan)})
    statistics.add({'a/error': torch.tensor(torch.inf), 'a/bad': torch.tensor(torch.nan)})
    statistics.add({'a/error': torch.tensor(1.0), 'a/bad': torch.tensor(torch.nan)})
    assert statistics.summary() == {'a/error': 0.75, 'a/bad': 0.0}


# of 20 iterations a line after every third, so that a checkpoint after ten lies between two
HISTORY = {
    'default_hooks.routing_history.type': 'RoutingHistoryHook',
    'default_hooks.routing_history.records': 6,
}


def history(folder: Path) -> list[dict[str, Any]]:
    return read_history(folder / 'routing.jsonl')


def losses_of(runner: Runner) -> list[float]:
    return runner.message_hub.get_scalar('train/loss').data[0].tolist()


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """A run of two epochs, trained, with a history."""
    return trained(config_of(tmp_path_factory.mktemp('history') / 'whole', **HISTORY))


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
    trained(config_of(folder, **half))
    assert [line['iteration'] for line in history(folder)] == [3, 6, 9]
    with (folder / 'routing.jsonl').open('a') as file:  # work that a kill has lost, and half a line
        file.write('{"iteration": 11, "layers": {}}\n{"iterat')
    trained(resumed(folder, **HISTORY))
    assert history(folder) == history(Path(whole.work_dir))


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
        'model.model_name': f'vit_tiny_{method}',
        **options,
        'train_cfg.max_epochs': 1,
        'train_cfg.val_interval': 2,
        'train_dataloader.batch_size': 240,
    }
    plain = trained(config_of(tmp_path / 'plain', **short))
    recorded = trained(config_of(tmp_path / 'recorded', **short, **HISTORY))
    assert not (tmp_path / 'plain' / 'routing.jsonl').exists()
    assert len(history(tmp_path / 'recorded')) == len(losses_of(plain)) == 5
    assert losses_of(plain) == losses_of(recorded)
    with_history = recorded.model.state_dict()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, with_history[name]), name


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
