"""Runs as jobs of submitit: stopped and resumed to the same rows, an array of Slurm."""

import json
import os
import pickle
import re
import signal
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from vqmoe_vision.comparison.cli import compare
from vqmoe_vision.comparison.executor import Job, Submitted
from vqmoe_vision.comparison.queue import Task, tasks_of
from vqmoe_vision.comparison.store import Store

from .. import cases
from ..rows import CONFIGS
from .test_queue import ROWS, calls, collected, needs_proc, run_of, until
from .test_real_run import SPEC

pytest.importorskip('submitit')

BATCH = "seeds = [1]\noptions = ['train_dataloader.batch_size=6', 'train_dataloader.num_workers=3']"


def test_a_job_at_its_limit_of_time_goes_on_where_it_was(spec):
    """As submitit does: it asks for the rest of a job, keeps that as a file, and calls it later."""
    task = Task(run_of(spec(slow='train_cfg.kind=waits'), 'slow'), Store(ROWS / 'spec'))
    job, kept = pickle.loads(pickle.dumps(Job(task, []))), list[bytes]()

    def reach_the_limit() -> None:
        until(lambda: Path('pid').exists() and bool(Path('pid').read_text()))
        kept.append(pickle.dumps(job.checkpoint()))

    limit = Thread(target=reach_the_limit)
    limit.start()
    assert job().startswith('killed by SIGTERM')
    limit.join()
    assert not collected()
    assert pickle.loads(kept[0]).result() == ''
    assert ['--resume' in line for line in calls()] == [False, True]
    assert collected() == {'slow-seed1'}


def test_what_goes_wrong_in_a_job_is_told(spec):
    task = Task(run_of(spec(bad='train_cfg.kind=fails'), 'bad'), Store(ROWS / 'spec'))
    assert Job(task, [])().startswith('error: there is no memory left (work_dirs/')


def test_a_job_has_the_recipe_of_when_it_begins(spec):
    job = pickle.dumps(run := run_of(spec(), 'dense'))
    before = run.recipe
    Path('config.py').write_text(Path('config.py').read_text().replace('depth=2', 'depth=3'))
    assert pickle.loads(job).recipe != run.recipe == before


def test_processes_share_the_batch_of_one(spec):
    run = run_of(spec(BATCH), 'dense')
    alone, three = (run.train(Path('w'), processes=number) for number in (1, 3))
    assert 'train_dataloader.batch_size=2' in three and '--launcher=pytorch' in three
    assert '--nproc_per_node=3' in three and not [a for a in alone if 'launcher' in a or '=2' in a]
    total = run_of(spec(BATCH.replace("['", "['total_batch_size=6', '")), 'dense')
    assert 'train_dataloader.batch_size=2' not in total.train(Path('w'), processes=3)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> None:
    """The commands of Slurm that submitit calls, of a cluster that begins no job."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    commands = {
        'sbatch': 'cp "$1" submitted.sh\necho $PYTHONSAFEPATH > safe\necho Submitted batch job 12',
        'srun': '"$@"',
    }
    for name, text in {**commands, 'sacct': 'echo "JobID|State|NodeList"'}.items():
        (folder / name).write_text(f'#!/bin/sh\n{text}\n')
        (folder / name).chmod(0o755)
    monkeypatch.setenv('PATH', f'{folder}:{os.environ["PATH"]}')


def test_runs_are_an_array_of_slurm(spec, slurm):
    path = spec(BATCH, other='train_cfg.row=3')
    runs = [run_of(path, row) for row in ('dense', 'other')]
    tasks = tasks_of(runs, Store(ROWS / 'spec'), 2)
    given = (Path('work_dirs/comparisons/spec/PAUSE'), 'slurm', 90)
    queue = Submitted(tasks, 1, *given, {'mem': '64GB', 'partition': 'gpu'})
    first, _ = waiting = [queue._begin(task) for task in tasks]
    assert all(waiting)
    next(first)
    flags = set(re.findall('^#SBATCH --(.*)', Path('submitted.sh').read_text(), re.M))
    asked = {'array=0-1%1', 'time=90', 'mem=64GB', 'partition=gpu', 'requeue', 'job-name=spec'}
    assert flags >= asked | {'nodes=1', 'gpus-per-node=2', 'cpus-per-task=8', 'ntasks-per-node=1'}
    assert Path('safe').read_text() == '1\n'  # a job begins in the current folder
    jobs = sorted((given[0].parent / 'jobs').glob('12_*_submitted.pkl'))
    kept = [pickle.loads(job.read_bytes()).function for job in jobs]
    assert [job.task.run.name for job in kept] == ['dense-seed1', 'other-seed1']
    assert {job.task.processes for job in kept} == {2}
    # the same command later submits none of them again
    Path('submitted.sh').unlink()
    again = Submitted(tasks, 1, *given, {})
    assert next(again._begin(tasks[0])) is None and not Path('submitted.sh').exists()


@cases(
    'arguments, message',
    (['--minutes', '5'], '--minutes=5'),
    (['--executor', 'local', '--slurm', 'mem=4GB'], '--slurm='),
    (['--executor', 'local', '--processes-per-run', '4'], '--processes-per-run=4 .*divisor of 6'),
    ids=str,
)
def test_a_mistake_is_one_line(spec, says, arguments, message):
    said = says('run', spec(BATCH), *arguments)
    assert said.startswith('error: ') and re.search(message, said)
    assert not calls()


def row_in(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / 'rows/digits/vqmoe-seed3.json').read_text())
    return {n: value for n, value in content.items() if n not in ('minutes', 'cpu_minutes')}


def begun_by(pid: int) -> list[int]:
    children = Path(f'/proc/{pid}/task/{pid}/children')
    found = list(map(int, children.read_text().split())) if children.exists() else []
    return [*found, *(each for child in found for each in begun_by(child))]


@pytest.mark.long
@pytest.mark.timeout(900)
@needs_proc
def test_a_comparison_of_two_processes_a_run_is_stopped_and_resumed_to_the_same_rows(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(CONFIGS.parent)
    (tmp_path / 'digits.py').write_text(SPEC.replace('max_epochs=2', 'max_epochs=6'))

    def run(folder: Path, action: str = 'run', how: str = '') -> None:
        where = ['--work-dir', str(folder), '--results', str(folder)]
        compare([action, str(tmp_path / 'digits.py'), *how.split(), *where])

    two = 'run', '--executor local --processes-per-run 2'
    run(tmp_path / 'whole', *two)
    expected = row_in(tmp_path / 'whole')
    assert expected['processes'] == 2 and expected['iterations'] == 114
    folder = tmp_path / 'stopped'

    def done() -> int:
        progress = [*folder.glob('digits/*/progress')]
        return int(progress[0].read_text().split()[0]) if progress else 0

    def stop() -> None:
        until(lambda: done() >= 10)
        (job,) = folder.glob('digits/*/job')
        controller = int(job.read_text())
        task = begun_by(controller)[0]
        os.kill(task, signal.SIGUSR2)  # as where the limit of time is near
        until(lambda: begun_by(controller)[:1] not in ([], [task]) and done() >= 60)
        for process in [controller, *begun_by(controller)]:
            os.kill(process, signal.SIGKILL)

    operator = Thread(target=stop)
    operator.start()
    with pytest.raises(SystemExit, match='1 of 1 runs failed: vqmoe-seed3'):
        run(folder, *two)
    operator.join()
    assert 'its job has ended' in capsys.readouterr().out
    run(folder, *two)
    assert row_in(folder) == expected
    logs = [log.read_text() for log in folder.glob('digits/*/*/*.log')]
    assert sum('resumed epoch' in log for log in logs) >= 2
    run(folder, 'check')  # by two processes too
    assert 'of 1 of 1 rows came out again' in capsys.readouterr().out
