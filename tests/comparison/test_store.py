"""Rows lose nothing to who else writes, and a damaged file is one file less."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from vqmoe_vision.comparison import cli, measured
from vqmoe_vision.comparison.queue import Queue, Task
from vqmoe_vision.comparison.report import draw_figures
from vqmoe_vision.comparison.runs import Run
from vqmoe_vision.comparison.spec import read_comparison
from vqmoe_vision.comparison.store import FIELDS, Store
from vqmoe_vision.engine.checkpoint_files import SaveError

pytestmark = pytest.mark.usefixtures('tables_alone')
ROWS = Path('docs/results/rows/spec')
WORK = Path('work_dirs/comparisons')
RANKS = {'effective_rank_before': 1.0, 'effective_rank_after': 1.0}
# of slots, which have no expert that could change
LAYERS = {'a': {**RANKS, 'slots/load_entropy': 1.0}}
CHANGES = {'shifts': {'flip': {}, 'fog 3': {}}, 'changes': [], 'convergence': {}}
ROUTING = {'images': 360, 'layers': LAYERS, **CHANGES}
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


def at_once(*works: Any) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_another_queue_leaves_what_was_measured_meanwhile(finished) -> None:
    """It took the runs up before they were finished, and comes to them when they are."""
    store = Store(ROWS)
    store.add(finished[0], shifts={'fog': {'a': 1.0}})
    assert Queue([Task(run, store) for run in finished], 1, WORK / 'PAUSE').work() == {}
    assert len(Path('calls').read_text().splitlines()) == 2
    assert row(finished[0])['shifts'] == {'fog': {'a': 1.0}}


def test_measurements_side_by_side_lose_nothing(finished, monkeypatch) -> None:
    store = Store(ROWS)

    def measure(run: Run) -> dict[str, Any]:
        store.add(run, shifts={'fog': {'a': 1.0}})  # another process, while this one measures
        return {}

    monkeypatch.setattr(measured, '_routing', measure)
    assert measured.measure_routing(finished, store) == []
    for run in finished:
        assert (row(run)['routing'], row(run)['shifts']) == ({}, {'fog': {'a': 1.0}})


@pytest.mark.parametrize('gone', ['iter_2.pth', 'last_checkpoint'])
def test_a_checkpoint_that_was_deleted_stops_no_other(finished, gone: str, monkeypatch) -> None:
    monkeypatch.setattr(measured, '_routing', lambda run: {})
    (finished[0].folder / gone).unlink()
    assert measured.measure_routing(finished, Store(ROWS)) == [finished[0].name]
    assert ['routing' in row(run) for run in finished] == [False, True]


def test_many_writers_at_the_same_moment(finished) -> None:
    run, names = finished[0], [str(number) for number in range(16)]
    at_once(*(lambda n=n: Store(ROWS).add(run, shifts={n: {n: 1.0}}) for n in names))
    assert row(run)['shifts'].keys() == set(names)
    assert {path.name for path in ROWS.iterdir()} == {f'{run.name}.json' for run in finished}


def test_a_full_disk_leaves_the_row_as_it_was(finished, monkeypatch) -> None:
    before = row(finished[0])

    def full(descriptor: int) -> None:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(SaveError):
        Store(ROWS).add(finished[0], shifts={'fog': {'a': 1.0}})
    assert row(finished[0]) == before


@pytest.mark.parametrize('field', ['row', 'recipe', 'test', 'held_out', 'images'])
def test_a_row_without_a_field_is_left_out_alone(fill, says, field: str) -> None:
    path = fill(SCORES)
    damaged = ROWS / 'same-seed1.json'
    content = json.loads(damaged.read_text())
    del content[field]
    damaged.write_text(json.dumps(content))
    says('table', path)
    shown = Path('docs/results/tables/spec.md').read_text()
    (line,) = [line for line in shown.splitlines() if line.startswith('- `same-seed1.json`: it is')]
    assert field in line
    assert '| same ' in shown and '| 24.50 ' in shown  # of the seeds that are left


def test_tables_and_figures_use_no_other_field(fill, says, monkeypatch) -> None:
    monkeypatch.setattr(cli, 'draw_figures', draw_figures)
    path = fill(SCORES)
    for file in ROWS.iterdir():
        content = json.loads(file.read_text())
        file.write_text(json.dumps({field: content[field] for field in ('version', *FIELDS)}))
    assert 'spec-curves.png' in says('table', path)


@pytest.mark.parametrize('test', [{'mIoU': None}, {'mIoU': float('nan')}, {'mAcc': 3.0}])
def test_a_row_without_a_score_is_left_out_alone(fill, says, test: dict[str, Any]) -> None:
    path = fill(SCORES)
    damaged = ROWS / 'same-seed1.json'
    damaged.write_text(json.dumps({**json.loads(damaged.read_text()), 'test': test}))
    says('table', path)
    shown = Path('docs/results/tables/spec.md').read_text()
    assert '`same-seed1.json`: it is damaged: test' in shown and '| 24.50 ' in shown


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ('harm', 'said'),
    [
        (lambda path: path.write_text('<<<<<<< HEAD'), 'is damaged: Expecting value'),
        (lambda path: path.write_text('[]'), 'is damaged: it holds no object'),
        (make_folder, 'is damaged: [Errno 21] Is a directory'),
    ],
    ids=['text', 'list', 'folder'],
)
def test_what_is_no_row_at_all_is_left_out_alone(fill, says, harm: Any, said: str) -> None:
    path = fill(SCORES)
    harm(ROWS / 'same-seed1.json')
    says('table', path)
    shown = Path('docs/results/tables/spec.md').read_text()
    (line,) = [line for line in shown.splitlines() if line.startswith('- `same-seed1.json`: ')]
    assert said in line and 'Not run' not in shown
    assert '| 24.50 ' in shown


def test_a_routing_with_all_of_its_content_counts(fill, says) -> None:
    path = fill(SCORES)
    file = ROWS / 'same-seed1.json'
    file.write_text(json.dumps({**json.loads(file.read_text()), 'routing': ROUTING}))
    says('table', path)
    shown = Path('docs/results/tables/spec.md').read_text()
    assert 'damaged' not in shown and 'last checkpoints is like on 360 test images;' in shown


@pytest.mark.parametrize('harm', ['{', '{}', '{"first_losses": 3}'])
def test_a_damaged_record_of_a_run_loses_no_other(finished, says, capsys, harm: str) -> None:
    for run in finished:
        (ROWS / f'{run.name}.json').unlink()
    (finished[0].folder / 'run.json').write_text(harm)
    assert len(says('list', 'spec.py').splitlines()) == 2
    assert says('collect', 'spec.py') == 'error: results of 1 runs are damaged: dense-seed1'
    assert [path.name for path in ROWS.iterdir()] == ['dense-seed2.json']
    line = says('run', 'spec.py')
    assert line == 'error: 1 of 1 runs failed: dense-seed1'
    said = capsys.readouterr()
    assert 'dense-seed1 failed: ' in said.out and str(finished[0].folder) in said.out
