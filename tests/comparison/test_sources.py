"""Rows that start from the runs of another comparison: those come first, by the tool itself."""

from pathlib import Path
from shutil import rmtree

import pytest

from .conftest import SPEC

WORK = Path('work_dirs/comparisons')
ROWS = Path('docs/results/rows')
STARTED = 'smoe model.checkpoint={start}'


@pytest.fixture
def started(spec):
    """Writes `first.py`, and a comparison with a row that starts from its row dense."""

    def write(dense: str = 'train_cfg.row=1', **rows: str) -> str:
        Path('first.py').write_text(SPEC.format(rows=f'dense={dense!r}'))
        return spec("start = 'first.py dense iter_2.pth'", started=STARTED, **rows)

    return write


def calls() -> list[str]:
    """The work dirs of all trainings so far, without what decides them."""
    lines = Path('calls').read_text().splitlines() if Path('calls').exists() else []
    folders = [Path(line.split('--work-dir ')[1].split()[0]) for line in lines]
    return [f'{f.parent.name}/{f.name.rpartition("-")[0]}' for f in folders]


def collected(name: str) -> set[str]:
    return {path.stem for path in (ROWS / name).glob('*.json')}


def test_a_fresh_clone_trains_what_rows_start_from_and_keeps_its_rows(started, says) -> None:
    path = started()
    says('run', 'first.py')
    rmtree(WORK)
    Path('calls').unlink()
    before = {path: path.stat().st_mtime_ns for path in (ROWS / 'first').iterdir()}
    said = says('run', path)
    assert '2 runs that others start from come first: first/dense-seed1, first/dense-seed2' in said
    # a seed is whole before the next begins
    one = ['first/dense-seed1', 'spec/dense-seed1', 'spec/started-seed1']
    assert calls() == [*one, *(name.replace('seed1', 'seed2') for name in one)]
    assert {path: path.stat().st_mtime_ns for path in (ROWS / 'first').iterdir()} == before
    assert not list((WORK / 'first').rglob('test.json'))
    assert collected('spec') == {'dense-seed1', 'dense-seed2', 'started-seed1', 'started-seed2'}
    assert '4 of 4 runs are there already' in says('run', path)
    assert len(calls()) == 6


def test_a_source_without_a_row_leaves_one_which_counts_for_both(started, says) -> None:
    path = started('dense_1x')  # as the row dense of the other
    said = says('run', path, '--rows', 'dense', 'started', '--seeds', '2')
    assert '0 of 2 runs are there already' in said
    assert calls() == ['first/dense-seed2', 'spec/started-seed2']
    assert collected('first') == {'dense-seed2'} and collected('spec') == {'started-seed2'}
    assert '2 of 2 runs are there already' in says('run', path, '--seeds', '2')


def test_a_source_that_fails_holds_back_only_what_starts_from_it(started, says, capsys) -> None:
    path = started('train_cfg.kind=fails', other='train_cfg.row=3')
    line = says('run', path, '--seeds', '1')
    assert line == 'error: 2 of 4 runs failed: first/dense-seed1, started-seed1'
    assert collected('spec') == {'dense-seed1', 'other-seed1'}
    said = capsys.readouterr().out
    assert 'started-seed1 failed: first/dense-seed1 has left no work_dirs/' in said


def test_runs_wait_while_their_source_is_trained(started, says) -> None:
    """Though there is room for all of them at once: they would fail without its checkpoint."""
    says('run', started(), '--jobs', '6')
    assert len(collected('spec')) == 4


def test_sources_of_sources_come_first(started, spec, says) -> None:
    Path('second.py').write_text(Path(started()).read_text())
    path = spec("start = 'second.py started iter_2.pth'", third=STARTED)
    says('run', path, '--rows', 'third', '--seeds', '1')
    assert calls() == ['first/dense-seed1', 'second/started-seed1', 'spec/third-seed1']


def test_a_source_that_was_trained_and_not_tested_is_tested(started, says) -> None:
    path = started()
    says('run', path, '--seeds', '1')
    next((WORK / 'first').rglob('test.json')).unlink()
    (ROWS / 'first/dense-seed1.json').unlink()
    (ROWS / 'spec/started-seed1.json').unlink()
    says('run', path, '--seeds', '1')
    assert collected('first') == {'dense-seed1'}
    assert len(calls()) == 3
