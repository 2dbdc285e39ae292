"""A list of hooks replaces that of its base: whoever trains without VQMoE's is told."""

from pathlib import Path

import pytest
from mmengine.runner import Runner

from vqmoe_vision.engine.cli import load_config, train
from vqmoe_vision.engine.hooks import check_hooks
from vqmoe_vision.moe import METHODS
from vqmoe_vision.moe.collect import moe_layers

from ..logs import messages
from .test_cli import DIGITS, TINY

OWN = "custom_hooks = [dict(type='EMAHook', momentum=0.01)]\n"
NEEDED = [hook['type'] for hook in load_config(str(DIGITS)).custom_hooks]
ONCE = {
    'train_dataloader.batch_size': 60,
    'train_cfg.max_epochs': 1,
    'val_cfg': None,
    'val_dataloader': None,
    'val_evaluator': None,
    'default_hooks.checkpoint.save_best': None,
}


def write(folder: Path, hooks: str = '') -> str:
    path = folder / 'tiny.py'
    path.write_text(TINY.replace('NAME', repr(folder.name)) + hooks)
    return str(path)


def runner_of(folder: Path, hooks: str, **options: object) -> Runner:
    config = load_config(write(folder, hooks), {**ONCE, **options})
    config.work_dir = str(folder / 'run')
    return Runner.from_cfg(config)


def test_a_list_of_ones_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        train([write(tmp_path, OWN), '--work-dir', str(tmp_path / 'run')])
    text = str(caught.value.code)
    missing = f'it lacks {", ".join(NEEDED)} of configs/_base_/default_runtime.py'
    assert text.startswith(f"error: custom_hooks=['EMAHook'] is not possible: {missing}")
    assert 'default_hooks.NAME' in text and '\n' not in text


@pytest.mark.parametrize('left_out', NEEDED)
def test_any_hook_that_is_left_out_is_named(left_out: str, tmp_path: Path) -> None:
    kept = [dict(type=name) for name in NEEDED if name != left_out]
    runner = runner_of(tmp_path, f'custom_hooks = {kept}\n')
    with pytest.raises(ValueError, match=f'it lacks {left_out} of'):
        check_hooks(runner)


@pytest.mark.parametrize(
    'hooks',
    [
        "default_hooks['ema'] = dict(type='EMAHook')\n",
        "custom_hooks = [*_base_.custom_hooks, dict(type='EMAHook')]\n",
        # where they are does not matter
        f'custom_hooks = []\ndefault_hooks.update({ {name: {"type": name} for name in NEEDED} })\n',
    ],
)
def test_hooks_beside_those_that_are_needed(hooks: str, tmp_path: Path) -> None:
    check_hooks(runner_of(tmp_path, hooks))


@pytest.mark.parametrize(
    ('method', 'options'),
    [*((name, {}) for name in METHODS), ('vqmoe', {'model.moe.codebook': 'plain'})],
)
def test_a_runner_without_the_hook_says_that_state_stands_still(
    method: str, options: dict, tmp_path: Path
) -> None:
    options = {**options, 'model.model_name': f'vit_tiny_{method}'}
    runner = runner_of(tmp_path, 'custom_hooks = []\n', **options)
    runner.train()
    layers = moe_layers(runner.model).values()
    told = [line for line in messages(tmp_path / 'run') if 'has no MoeStateHook' in line]
    assert len(told) == any(layer.moves_state() for layer in layers)


def test_a_runner_with_the_hook_says_nothing(tmp_path: Path) -> None:
    runner_of(tmp_path, '').train()
    assert not [line for line in messages(tmp_path / 'run') if 'has no MoeStateHook' in line]


@pytest.mark.parametrize('priority', ['VERY_HIGH', 'LOWEST', 'ABOVE_NORMAL', 'NORMAL', 'LOW'])
def test_averages_are_taken_between_the_codebooks_and_the_save(
    priority: str, tmp_path: Path
) -> None:
    ema = {'default_hooks.ema.type': 'EMAHook', 'default_hooks.ema.priority': priority}
    name = f'{tmp_path.name} {priority}'
    runner = runner_of(tmp_path, '', **ema, experiment_name=name)
    if priority in ('NORMAL', 'LOW'):
        check_hooks(runner)
        return
    said = rf"^EMAHook\.priority='{priority}' is not possible: after MoeStateHook "
    with pytest.raises(ValueError, match=said):
        check_hooks(runner)
