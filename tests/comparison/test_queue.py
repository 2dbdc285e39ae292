"""A queue of runs: several at a time, resumed, paused, and no lost run loses another."""

import json
import os
import shlex
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from shutil import rmtree

import pytest

from vqmoe_vision.comparison import store
from vqmoe_vision.comparison.cli import compare
from vqmoe_vision.comparison.queue import lock_of, visible_gpus
from vqmoe_vision.comparison.spec import read_comparison
from vqmoe_vision.comparison.store import Run

from .. import cases
from ..forked import METHOD
from .conftest import SPEC

WORK = Path('work_dirs/comparisons')
ROWS = Path('docs/results/rows')
LONG = pytest.mark.long
needs_proc = pytest.mark.skipif(not Path('/proc/self/stat').exists(), reason='needs /proc')


def calls() -> list[str]:
    return Path('calls').read_text().splitlines() if Path('calls').exists() else []


def run_of(path: str, row: str, seed: int = 1) -> Run:
    return Run(read_comparison(path), row, seed, WORK)


def collected(name: str = 'spec') -> set[str]:
    return {path.stem for path in (ROWS / name).glob('*.json')}


def work_through(path: str, folder: Path) -> None:
    store.FOLDER = folder  # of this process, as `repository` of the other
    os.chdir(folder)
    os.dup2(os.open('said', os.O_WRONLY | os.O_CREAT), 2)
    compare(['run', path])


def until(happens: Callable[[], bool]) -> None:
    while not happens():
        time.sleep(0.02)


def test_finished_runs_leave_rows_and_are_not_repeated(spec, says):
    path = spec(other='train_cfg.row=3')
    assert '0 of 4 runs are there already' in says('run', path)
    assert len(collected()) == len(calls()) == 4
    row, run = json.loads((ROWS / 'spec/other-seed2.json').read_text()), run_of(path, 'other', 2)
    assert row['test']['mIoU'] == 3.0 and row['held_out'] == [[1, 1.0], [2, 2.0]]
    assert row['recipe'] == run.recipe and row['images'] == 2
    assert shlex.join(run.train(run.folder)[2:]) in calls()
    assert '4 of 4 runs are there already' in says('run', path)
    assert len(calls()) == 4


def test_runs_that_fail_or_are_killed_are_listed_and_lose_no_other(spec, says, capsys):
    path = spec('seeds = [1]', bad='train_cfg.kind=fails', dead='train_cfg.kind=killed', good='')
    line = says('run', path)
    assert line == 'error: 2 of 4 runs failed: bad-seed1, dead-seed1'
    assert collected() == {'dense-seed1', 'good-seed1'}
    said = capsys.readouterr().out
    assert 'bad-seed1 failed: error: there is no memory left (work_dirs/' in said
    assert 'dead-seed1 failed: killed by SIGKILL' in said


@cases(
    'harm, said',
    (lambda folder: (folder / 'train.log').mkdir(), 'train.log'),
    (lambda folder: (folder / 'lock').mkdir(), 'lock'),
    (lambda folder: (folder / 'run.json').write_text('{}'), 'last_checkpoint'),
)
def test_files_that_cannot_be_used_lose_no_other_run(spec, says, capsys, harm, said):
    path = spec('seeds = [1]', slow='train_cfg.kind=slow', good='')
    folder = run_of(path, 'dense').folder
    folder.mkdir(parents=True)
    harm(folder)
    train = Path('tools/train.py').read_text()
    Path('tools/train.py').write_text(f'import time; time.sleep(0.5)\n{train}')
    line = says('run', path, '--jobs', '2')
    assert collected() == {'slow-seed1', 'good-seed1'}
    assert line == 'error: 1 of 3 runs failed: dense-seed1'
    shown = capsys.readouterr().out
    assert f'{folder}/{said}' in shown.split('dense-seed1 failed: ')[1].splitlines()[0]


def test_jobs_run_at_the_same_time(spec, says):
    """Each of two waits until the other is there."""
    says('run', spec(both='train_cfg.kind=meets'), '--rows', 'both', '--jobs', '2')
    assert len(collected()) == 2


@pytest.mark.parametrize('signal_', [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=LONG)])
def test_a_killed_queue_goes_on_where_it_was(spec, says, signal_):
    path = spec('seeds = [1]', slow='train_cfg.kind=waits')
    queue = get_context(METHOD).Process(target=work_through, args=(path, Path.cwd()))
    queue.start()
    until(Path('pid').exists)
    os.kill(queue.pid, signal_)
    queue.join()
    assert queue.exitcode != 0
    lock = lock_of(run_of(path, 'slow').folder / 'lock')
    if signal_ == signal.SIGKILL:  # its run lives, and nobody else may begin it
        assert lock is None
        os.kill(int(Path('pid').read_text()), signal.SIGKILL)
    else:
        assert lock is not None
        lock.close()
        said = Path('said').read_text().splitlines()
        assert said[-1].startswith('error: stopped; the same command goes on')
    says('run', path)
    assert collected() == {'dense-seed1', 'slow-seed1'}
    slow = [line for line in calls() if 'kind=waits' in line]
    assert len(calls()) == 3 and len(slow) == 2
    assert '--resume' not in slow[0] and '--resume' in slow[1]


def test_two_queues_do_not_work_on_the_same_run(spec, says):
    path = spec('seeds = [1]')
    folder = run_of(path, 'dense').folder
    folder.mkdir(parents=True)
    other = lock_of(folder / 'lock')

    def finish() -> None:
        assert calls() == []
        other.close()

    threading.Timer(0.5, finish).start()
    says('run', path)
    assert len(calls()) == 1


@needs_proc
def test_a_paused_queue_stops_its_runs_and_starts_none(spec, says):
    path = spec('seeds = [1]', slow='train_cfg.kind=waits')
    pause, states = Path('work_dirs/comparisons/spec/PAUSE'), []

    def state() -> str:
        stat = Path(f'/proc/{Path("pid").read_text()}/stat').read_text()
        return stat.rpartition(')')[2].split()[0]

    def operate() -> None:
        until(lambda: Path('pid').exists() and bool(Path('pid').read_text()))
        pause.touch()
        until(lambda: state() == 'T')
        Path('go').touch()
        time.sleep(0.3)
        states.append(state())
        pause.unlink()

    operator = threading.Thread(target=operate)
    operator.start()
    says('run', path)
    operator.join()
    assert states == ['T']
    assert len(collected()) == 2


@cases(
    'named, count, gpus',
    (None, 2, ['0', '1']),
    ('', 0, []),  # hides all
    ('3,1', 2, ['3', '1']),
    ('0,-1,2', 1, ['0']),  # what follows is hidden
    ('MIG-a1,MIG-b2', 1, ['MIG-a1', 'MIG-b2']),  # of which a process opens one
    ('MIG-a1', 0, []),
)
def test_runs_get_the_gpus_that_cuda_sees(named, count, gpus):
    assert visible_gpus(named, count) == gpus


STARTED = 'smoe model.checkpoint={start}'


@pytest.fixture
def started(spec):
    """Writes `first.py`, and a comparison with a row that starts from its row dense."""

    def write(dense: str = 'train_cfg.row=1', **rows: str) -> str:
        Path('first.py').write_text(SPEC.format(rows=f'dense={dense!r}'))
        return spec("start = 'first.py dense iter_2.pth'", started=STARTED, **rows)

    return write


def trained() -> list[str]:
    """The work dirs of all trainings so far, without what decides them."""
    folders = [Path(line.split('--work-dir ')[1].split()[0]) for line in calls()]
    return [f'{f.parent.name}/{f.name.rpartition("-")[0]}' for f in folders]


def test_a_fresh_clone_trains_what_rows_start_from_and_keeps_its_rows(started, says):
    path = started()
    says('run', 'first.py')
    rmtree(WORK)
    Path('calls').unlink()
    before = {path: path.stat().st_mtime_ns for path in (ROWS / 'first').iterdir()}
    said = says('run', path)
    assert '2 runs that others start from come first: first/dense-seed1, first/dense-seed2' in said
    one = ['first/dense-seed1', 'spec/dense-seed1', 'spec/started-seed1']
    assert trained() == [*one, *(name.replace('seed1', 'seed2') for name in one)]
    assert {path: path.stat().st_mtime_ns for path in (ROWS / 'first').iterdir()} == before
    assert not list((WORK / 'first').rglob('test.json'))
    assert collected() == {'dense-seed1', 'dense-seed2', 'started-seed1', 'started-seed2'}
    assert '4 of 4 runs are there already' in says('run', path)
    assert len(trained()) == 6


def test_a_source_without_a_row_leaves_one_which_counts_for_both(started, says):
    path = started('dense_1x')  # as the row dense of the other
    said = says('run', path, '--rows', 'dense', 'started', '--seeds', '2')
    assert '0 of 2 runs are there already' in said
    assert trained() == ['first/dense-seed2', 'spec/started-seed2']
    assert collected('first') == {'dense-seed2'} and collected() == {'started-seed2'}
    assert '2 of 2 runs are there already' in says('run', path, '--seeds', '2')


def test_a_source_that_fails_holds_back_only_what_starts_from_it(started, says, capsys):
    path = started('train_cfg.kind=fails', other='train_cfg.row=3')
    line = says('run', path, '--seeds', '1')
    assert line == 'error: 2 of 4 runs failed: first/dense-seed1, started-seed1'
    assert collected() == {'dense-seed1', 'other-seed1'}
    said = capsys.readouterr().out
    assert 'started-seed1 failed: first/dense-seed1 has left no work_dirs/' in said


def test_runs_wait_while_their_source_is_trained(started, says):
    """Though there is room for all of them at once: they would fail without its checkpoint."""
    says('run', started(), '--jobs', '6')
    assert len(collected()) == 4


def test_sources_of_sources_come_first(started, spec, says):
    Path('second.py').write_text(Path(started()).read_text())
    path = spec("start = 'second.py started iter_2.pth'", third=STARTED)
    says('run', path, '--rows', 'third', '--seeds', '1')
    assert trained() == ['first/dense-seed1', 'second/started-seed1', 'spec/third-seed1']
