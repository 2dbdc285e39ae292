"""Rows lose nothing to who else writes, and a damaged file is one file less."""

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from vqmoe_vision.comparison import cli
from vqmoe_vision.comparison.queue import Queue, Task
from vqmoe_vision.comparison.report import draw_figures
from vqmoe_vision.comparison.spec import read_comparison
from vqmoe_vision.comparison.store import FIELDS, Run, Store

pytestmark = pytest.mark.usefixtures('tables_alone')
ROWS = Path('docs/results/rows/spec')
WORK = Path('work_dirs/comparisons')
SCORES = {'dense': [10.0, 20.0, 30.0], 'same': [11.0, 20.0, 29.0]}


@pytest.fixture
def finished(spec, says) -> list[Run]:
    """Runs that have rows."""
    path = spec()
    says('run', path)
    comparison = read_comparison(path)
    return [Run(comparison, *which, WORK) for which in comparison.selected()]


def row(run: Run) -> dict[str, Any]:
    return json.loads((ROWS / f'{run.name}.json').read_text())


def test_another_queue_leaves_what_was_measured_meanwhile(finished) -> None:
    """It took the runs up before they were finished, and comes to them when they are."""
    store = Store(ROWS)
    store.add(finished[0], shifts={'fog': {'a': 1.0}})
    assert Queue([Task(run, store) for run in finished], 1, WORK / 'PAUSE').work() == []
    assert len(Path('calls').read_text().splitlines()) == 2
    assert row(finished[0])['shifts'] == {'fog': {'a': 1.0}}


def test_many_writers_at_the_same_moment(finished) -> None:
    run, names = finished[0], {str(number) for number in range(16)}
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: Store(ROWS).add(run, shifts={n: {n: 1.0}}), names))
    assert row(run)['shifts'].keys() == names
    assert {path.name for path in ROWS.iterdir()} == {f'{run.name}.json' for run in finished}


def test_tables_and_figures_use_no_other_field(fill, says, monkeypatch) -> None:
    monkeypatch.setattr(cli, 'draw_figures', draw_figures)
    path = fill(SCORES)
    for file in ROWS.iterdir():
        content = json.loads(file.read_text())
        file.write_text(json.dumps({field: content[field] for field in ('version', *FIELDS)}))
    assert 'spec-curves.png' in says('table', path)


def having(**changes: Any) -> Callable[[str], str]:
    """Without what is None."""

    def harm(text: str) -> str:
        content = {**json.loads(text), **changes}
        return json.dumps({n: v for n, v in content.items() if v is not None})

    return harm


@pytest.mark.parametrize(
    ('harm', 'said'),
    [
        *((having(**{name: None}), name) for name in ('row', 'test', 'held_out')),
        (having(test={'mIoU': math.nan}), 'test'),
        (having(test={'mAcc': 3.0}), 'test'),
        (having(version=1), 'version 1'),
        (having(seed=3), 'seed=3'),
        (having(metric='mAcc'), "metric='mAcc'"),
        (having(stage='dev'), "stage='dev'"),
        (lambda text: '<<<<<<< HEAD', 'Expecting value'),
        (lambda text: '[]', 'version None'),
    ],
)
def test_a_damaged_row_is_left_out_alone(fill, says, harm: Any, said: str) -> None:
    path = fill(SCORES)
    damaged = ROWS / 'same-seed1.json'
    damaged.write_text(harm(damaged.read_text()))
    says('table', path)
    shown = Path('docs/results/tables/spec.md').read_text()
    (line,) = [line for line in shown.splitlines() if line.startswith('- `same-seed1.json`: ')]
    assert said in line and '| 24.50 ' in shown  # of the seeds that are left


@pytest.mark.parametrize('harm', ['{', '{}', '{"first_losses": 3}'])
def test_a_damaged_record_of_a_run_loses_no_other(finished, says, capsys, harm: str) -> None:
    for run in finished:
        (ROWS / f'{run.name}.json').unlink()
    (finished[0].folder / 'run.json').write_text(harm)
    assert says('run', 'spec.py') == 'error: 1 of 2 runs failed: dense-seed1'
    assert [path.name for path in ROWS.iterdir()] == ['dense-seed2.json']
    said = capsys.readouterr().out
    assert 'dense-seed1 failed: ' in said and str(finished[0].folder) in said


def test_of_stage_dev_the_score_is_that_of_the_last_validation(
    repository: Path, spec, says, capsys
) -> None:
    (repository / 'tools/test.py').write_text("import sys; sys.exit('error: it was tested')")
    path = spec("stage = 'dev'", other='train_cfg.row=3')
    says('run', path, '--rows', 'dense')
    rows = [json.loads(file.read_text()) for file in sorted(ROWS.glob('*.json'))]
    assert [(row['row'], row['stage']) for row in rows] == [('dense', 'dev')] * 2
    assert rows[0]['test'] == {'mIoU': 2.0, 'blocks.1.mlp/load_unused': 1.0}
    says('table', path)
    shown = Path('docs/results/tables/spec.md').read_text()
    assert 'mIoU at the end of training on held-out data; no test data was seen.' in shown
    assert 'the same on held-out images' not in shown  # they are these
    assert says('shifts', path) == 'error: spec.py: shifts names none'
    assert "routing is measured on test data, which stage='dev' spares" in says('routing', path)
    # a training that does not end with a validation
    train = (repository / 'tools/train.py').read_text()
    (repository / 'tools/train.py').write_text(train.replace('iterations=2', 'iterations=3'))
    assert says('run', path, '--seeds', '1') == 'error: 1 of 1 runs failed: other-seed1'
    said = capsys.readouterr().out
    assert 'other-seed1: held_out=2 ' in said and 'after 3 iterations' in said
