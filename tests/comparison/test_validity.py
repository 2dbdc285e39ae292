"""Which rows may stand beside today's."""

import json
from pathlib import Path
from typing import Any

import pytest

from vqmoe_vision.comparison.cli import compare
from vqmoe_vision.comparison.runs import Run
from vqmoe_vision.comparison.spec import read_comparison
from vqmoe_vision.engine.record import BEGUN
from vqmoe_vision.models.create import options_in_full
from vqmoe_vision.moe import METHODS

pytestmark = pytest.mark.usefixtures('tables_alone')
ROWS = Path('docs/results/rows/spec')
SCORES = {'dense': [10.0, 20.0], 'other': [11.0, 20.0]}
CONFIG: Any = METHODS['smoe'].config


def table() -> str:
    return Path('docs/results/tables/spec.md').read_text()


def change_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIG.__init__.__kwdefaults__, 'router_noise', 0.125)


@pytest.mark.parametrize('of_preset', [False, True])
def test_a_changed_default_or_preset_makes_rows_stale(fill, says, monkeypatch, of_preset) -> None:
    options = options_in_full({'model_name': 'vit_tiny_smoe'})
    path = fill(SCORES, other={'moe_options': options})
    says('table', path)
    assert 'stale' not in table()
    if of_preset:
        monkeypatch.setitem(CONFIG.PRESETS['paper'], 'router_noise', 0.125)
    else:
        change_default(monkeypatch)
    says('table', path)
    reason = f'stale: moe_options.router_noise={options["router_noise"]!r}, today 0.125'
    assert f'`other-seed1.json`: {reason}' in table() and f'`other-seed2.json`: {reason}' in table()
    # rows of before do not say what their defaults were
    assert '`dense-seed1.json`' not in table()
    # what they left is no result of today's: they are trained again
    assert '2 of 4 runs are there already' in says('run', path)
    assert len(Path('calls').read_text().splitlines()) == 2
    says('table', path)
    assert 'stale' not in table()


def test_an_option_that_came_later_makes_no_row_stale(fill, says) -> None:
    options = options_in_full({'model_name': 'vit_tiny_smoe'})
    del options['router_noise']
    says('table', fill(SCORES, other={'moe_options': options}))
    assert 'stale' not in table()


def test_an_option_that_the_config_got_later_makes_rows_stale(fill, says) -> None:
    """Unlike one of the code: who writes it into a config wants it."""
    path = fill(SCORES)
    spec = Path(path).read_text()
    Path(path).write_text(spec.replace('row=other', 'row=other train_cfg.val_interval=5'))
    says('table', path)
    assert '`other-seed1.json`: stale: train_cfg.val_interval=None, today 5' in table()
    assert 'dense-seed1.json' not in table()


def test_a_check_says_what_the_defaults_of_a_row_of_before_were(spec, says, monkeypatch) -> None:
    path = spec(other='train_cfg.row=3')
    says('run', path)
    for row in ROWS.glob('*.json'):
        content = json.loads(row.read_text())
        del content['moe_options']
        row.write_text(json.dumps(content))
    program = Path('tools/train.py')
    options = options_in_full({'model_name': 'vit_tiny_smoe'})
    program.write_text(program.read_text().replace('moe_options={}', f'moe_options={options}'))
    assert says('check', path, '--rows', 'other', '--seeds', '2').startswith('the first losses')
    change_default(monkeypatch)
    says('table', path)
    assert '`other-seed2.json`: stale: moe_options.router_noise=' in table()
    assert 'other-seed1.json' not in table()


@pytest.mark.parametrize('changed', [False, True])
def test_half_a_run_goes_on_unless_a_default_has_changed(
    spec, says, monkeypatch, capsys, changed
) -> None:
    path = spec('seeds = [1]', half='train_cfg.row=3')
    run = Run(read_comparison(path), 'half', 1, Path('work_dirs/comparisons'))
    run.folder.mkdir(parents=True)
    (run.folder / BEGUN).write_text(json.dumps({'moe_options': run.moe_options}))
    (run.folder / 'last_checkpoint').write_text('iter_1.pth')
    (run.folder / 'iter_1.pth').touch()
    if changed:
        change_default(monkeypatch)
    compare(['list', path])
    reason = 'stale: moe_options.router_noise=1.0, today 0.125'
    assert (reason in capsys.readouterr().err) == changed
    said = says('run', path, '--rows', 'half')
    assert (f'half-seed1 begins anew: {reason}; what it left is in work_dirs/' in said) == changed
    assert ('--resume' in Path('calls').read_text()) == (not changed)
    aside = [folder / 'iter_1.pth' for folder in run.folder.parent.glob('half-seed1-*-stale1')]
    assert [file.is_file() for file in aside] == [True] * changed
    assert says('run', path, '--rows', 'half').startswith('1 of 1 runs are there already')


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


def test_where_the_runs_lie_that_rows_start_from_does_not_count(started, says) -> None:
    row = json.loads(Path('docs/results/rows/started/one-seed1.json').read_text())
    assert row['config']['model']['checkpoint'].startswith(
        'work_dirs/comparisons/spec/dense-seed1-'
    )
    for folder in ('work_dirs/comparisons', 'elsewhere', '.', str(Path('far').absolute())):
        assert says('list', started, '--work-dir', folder) == ''
    says('table', started, '--work-dir', 'elsewhere')
    assert 'stale' not in Path('docs/results/tables/started.md').read_text()


@pytest.mark.parametrize(
    'change',
    [
        ('spec.py', 'dense=', 'plain='),
        ('spec.py', "'dense'", "'dense train_cfg.max_iters=3'"),
        ('started.py', 'iter_2', 'iter_1'),
    ],
)
def test_rows_that_would_start_from_another_run_are_stale(started, says, change) -> None:
    file, before, after = change
    path = Path(file)
    path.write_text(path.read_text().replace(before, after))
    if after == 'plain=':
        Path(started).write_text(
            Path(started).read_text().replace('spec.py dense', 'spec.py plain')
        )
    line = says('table', started, '--work-dir', 'elsewhere')
    assert (
        "one-seed1.json: stale: model.checkpoint='work_dirs/comparisons/spec/dense-seed1-" in line
    )
