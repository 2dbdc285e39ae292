"""What makes a row another one, and what leaves it as it is."""

import json
from pathlib import Path
from typing import Any

import pytest

from vqmoe_vision.comparison import spec as spec_module
from vqmoe_vision.comparison.spec import canonical, recipe_of
from vqmoe_vision.moe import METHODS

pytestmark = pytest.mark.usefixtures('tables_alone')
ROWS = Path('docs/results/rows/spec')
SCORES = {'dense': [10.0, 20.0], 'other': [11.0, 20.0]}
CONFIG: Any = METHODS['smoe'].config
MODEL = {'type': 'Classifier', 'model_name': 'vit_tiny_vqmoe', 'moe': {'preset': 'matched'}}
# An option that a method gets belongs into `spec._ADDED`, with the value that changes nothing. A
# default that changes makes another recipe, and all rows that had it stale: then its line changes.
RECIPES = {
    'smoe': '512ba48df4e4b278',
    'xmoe': 'c77d062be8bb875b',
    'stablemoe': '466f7bbc6cff6f8b',
    'softmoe': '76971d7955890699',
    'vqmoe': '55751df684565036',
    'ecmoe': 'aaa079d26de7a2ff',
    'hashmoe': 'c68418b1b471d22a',
    'mocle': 'c0d20abfb7a55e51',
}


def table() -> str:
    return Path('docs/results/tables/spec.md').read_text()


@pytest.mark.parametrize('method', METHODS)
def test_recipes_of_today_are_those_of_the_rows(method: str) -> None:
    config = {'model': {'model_name': f'vit_tiny_{method}', 'moe': {'preset': 'paper'}}}
    if METHODS[method].needs_features:
        config['model']['features'] = 'dense.pth'
    assert recipe_of(config) == RECIPES[method]


@pytest.mark.parametrize(
    'change',
    [
        {'work_dir': 'elsewhere', 'resume': True, 'launcher': 'pytorch'},
        {'randomness': {'seed': 7}},
        {'default_hooks': {'checkpoint': {'interval': 7}, 'logger': {'interval': 7}}},
        {'tta_model': {'type': 'SegTTAModel'}, 'tta_pipeline': [{'type': 'TestTimeAug'}]},
        {'model': {**MODEL, 'drop': 0}},  # given as 0.0
        {'custom_hooks': [{'type': 'B'}, {'type': 'A', 'momentum': 0.1}]},
        {'val_cfg': {}},
    ],
)
def test_what_changes_no_number_leaves_a_recipe(change: dict[str, Any]) -> None:
    config = {
        'model': {**MODEL, 'drop': 0.0},
        'custom_hooks': [{'type': 'A', 'momentum': 0.1}, {'type': 'B'}],
    }
    assert recipe_of({**config, **change}) == recipe_of(config)


@pytest.mark.parametrize(
    'change',
    [
        {'custom_hooks': [{'type': 'EMAHook'}]},
        {'default_hooks': {'param_scheduler': None}},
        {'randomness': {'seed': 7, 'deterministic': True}},
        {'train_cfg': {'max_epochs': 7}},
        {'model': {**MODEL, 'moe': {'preset': 'matched', 'moe_layers': (2, 3)}}},
        {'model': {**MODEL, 'moe': {'preset': 'matched', 'ema_decay': 0.9}}},
        {'model': {**MODEL, 'moe': {'preset': 'paper'}}},
        {'a_field_that_nobody_knows': 1},
    ],
)
def test_what_may_change_a_number_changes_the_recipe(change: dict[str, Any]) -> None:
    assert recipe_of({'model': MODEL, **change}) != recipe_of({'model': MODEL})


def test_an_option_that_is_added_leaves_recipes_unless_it_is_used(monkeypatch) -> None:
    config, used = {'model': MODEL}, {'model': {**MODEL, 'moe': {'output_norm': True}}}
    before, other = canonical(config), recipe_of(used)
    monkeypatch.setattr(spec_module, '_ADDED', {'moe.output_norm': False})
    assert canonical(config) == {n: v for n, v in before.items() if n != 'moe.output_norm'}
    assert recipe_of(used) == other


def change_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIG.__init__.__kwdefaults__, 'router_noise', 0.125)


@pytest.mark.parametrize('of_preset', [False, True])
def test_a_changed_default_or_preset_makes_rows_stale(fill, says, monkeypatch, of_preset) -> None:
    path = fill(SCORES, "rows['dense'] = 'dense_1x train_cfg.row=dense'")
    says('table', path)
    assert 'stale' not in table()
    if of_preset:
        monkeypatch.setitem(CONFIG.PRESETS['paper'], 'router_noise', 0.125)
    else:
        change_default(monkeypatch)
    says('table', path)
    recipe_then = json.loads((ROWS / 'other-seed1.json').read_text())['recipe']
    reason = f'stale: recipe {recipe_then} of commit abc, today '
    assert f'`other-seed1.json`: {reason}' in table() and f'`other-seed2.json`: {reason}' in table()
    # what they left is in another folder: they are trained again
    assert '2 of 4 runs are there already' in says('run', path)
    says('table', path)
    assert 'stale' not in table()


@pytest.fixture
def started(spec, says) -> str:
    """A comparison with results whose rows start from another's, and the row behind each."""
    says('run', spec())
    for folder in Path('work_dirs/comparisons/spec').glob('dense-seed*'):
        (folder / 'iter_2.pth').touch()
    text = "config = 'config.py'\nmetric = 'mIoU'\nseeds = [1, 2]\n"
    text += "start = 'spec.py dense iter_2.pth'\n"
    Path('started.py').write_text(text + "rows = dict(one='model.checkpoint={start}')\n")
    assert says('run', 'started.py').startswith('0 of 2')
    return 'started.py'


@pytest.mark.parametrize(
    'change',
    [
        ('spec.py', 'dense=', 'plain='),
        ('spec.py', "'dense_1x'", "'dense_1x train_cfg.max_iters=3'"),
        ('started.py', 'iter_2', 'iter_1'),
    ],
)
def test_rows_that_would_start_from_another_run_are_stale(started, says, change) -> None:
    file, before, after = change
    path = Path(file)
    path.write_text(path.read_text().replace(before, after))
    if after == 'plain=':
        own = Path(started).read_text().replace('spec.py dense', 'spec.py plain')
        Path(started).write_text(own)
    line = says('table', started, '--work-dir', 'elsewhere')
    assert 'one-seed1.json: stale: recipe ' in line
