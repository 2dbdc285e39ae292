"""Works through runs: several at a time, one thread each, and one lost run loses no other.

A run holds a lock while it works. The lock is inherited by the process that trains and lives as
long as that does: a queue that was killed leaves no lock, and no second process on a run either.
"""

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from tqdm import tqdm

from vqmoe_vision.engine.checkpoint_files import candidates
from vqmoe_vision.engine.cli import make_folder

from .store import ONE_THREAD, Run, Store


@dataclass(eq=False)
class Task:
    """A run that has something left to do."""

    run: Run
    store: Store
    leaves: Path | None = None  # checkpoint that others start from
    row: bool = True  # is missing; otherwise it is trained again for the checkpoint alone
    processes: int = 1
    # while it is worked on
    slot: int = 0
    process: subprocess.Popen | None = None

    @property
    def name(self) -> str:
        """Tells it from a run of the same name in the comparison that starts from it."""
        name = self.run.name
        return name if self.leaves is None else f'{self.run.comparison.name}/{name}'

    def stop(self) -> None:
        """Tells its process to end, which it has saved by then."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    @property
    def trained(self) -> bool:
        """Whether its training is over."""
        record = self.run.folder / 'run.json'
        return record.is_file() and (self.leaves is None or self.leaves.is_file())

    def work(self, lock: IO[str], gpus: Sequence[str]) -> Iterator[None]:
        """Trains and tests it as far as that is due, and collects its row; yields meanwhile."""
        folder, tested = self.run.folder, self.row and self.run.comparison.tested
        due = [] if self.trained else ['train']
        due += ['test'] if tested and (due or not (folder / 'test.json').is_file()) else []
        environment = {**os.environ, **ONE_THREAD}
        if gpus:
            environment['CUDA_VISIBLE_DEVICES'] = gpus[self.slot % len(gpus)]
        with lock:
            for name in due:
                make = self.run.test if name == 'test' else self.run.train
                command = make(folder, processes=self.processes)
                if name == 'train' and candidates(folder):
                    command.insert(command.index('--work-dir'), '--resume')
                with (log := folder / f'{name}.log').open('a') as file:
                    self.process = subprocess.Popen(
                        command,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        stdin=subprocess.DEVNULL,
                        env=environment,
                        pass_fds=[lock.fileno()],
                    )
                while (code := self.process.poll()) is None:
                    yield
                if code < 0:
                    raise ValueError(f'killed by {signal.Signals(-code).name}, see {log}')
                if code > 0:
                    said = log.read_text(errors='replace').strip() or 'it said nothing'
                    lines = said.splitlines()
                    # torchrun has a report of its own behind the line of a rank
                    errors = [line for line in lines if line.startswith('error: ')]
                    raise ValueError(f'{(errors or lines)[-1].strip()} ({log})')
            needed = {self.leaves: True, folder / 'run.json': self.row}
            needed |= {folder / 'test.json': tested}
            if left := [f.name for f, must in needed.items() if f and must and not f.is_file()]:
                raise ValueError(f'its commands left no {" and ".join(left)} in {folder}')
            if self.row:
                self.store.collect(self.run)


def tasks_of(runs: Sequence[Run], store: Store, processes: int = 1) -> list[Task]:
    """What is to be done for the rows of runs: first the runs that they start from, where due."""
    sources = list(_sources(runs, store.folder.parent).values())
    # a row that the comparison which others start from trains in the same way counts here too
    coming = {task.run.key for task in sources if task.row}
    tasks = [*sources, *(Task(run, store) for run in runs if run.key not in coming)]
    for task in tasks:
        task.processes = processes
        task.run.train(task.run.folder, processes=processes)  # a batch that it does not divide
    return tasks


def _sources(runs: Sequence[Run], rows: Path) -> dict[Path, Task]:
    """The runs that runs start from, as far as they are due, by their checkpoints."""
    found: dict[Path, Task] = {}
    for first, checkpoint in (source for run in runs for source in run.sources.values()):
        if checkpoint in found:
            continue
        store = Store(rows / first.comparison.name)
        task = Task(first, store, checkpoint, row=not store.read([first]).usable)
        if not task.trained and not checkpoint.is_file():
            found |= _sources([first], rows) | {checkpoint: task}
        elif task.row and task.trained:  # without a record somebody has put the checkpoint there
            found[checkpoint] = task
    return found


class Queue:
    """Works through tasks in their order; a task waits for what it starts from."""

    seconds = 0.2  # between two looks at what is under way
    stopped = 'stopped; the same command goes on from the last checkpoints'

    def __init__(self, tasks: Sequence[Task], jobs: int | None, pause: Path) -> None:
        self._gpus = visible_gpus(os.environ.get('CUDA_VISIBLE_DEVICES'), torch.cuda.device_count())
        self._slots = range(jobs or max(len(self._gpus), 1))
        self._waiting, self._pause = list(tasks), pause
        self._jobs: dict[Task, Iterator[None]] = {}
        self._failed: list[str] = []
        for folder in {pause.parent, *(task.store.folder for task in tasks)}:
            make_folder(folder)

    def work(self) -> list[str]:
        """Works until nothing is left; returns the names of what failed."""
        total = len(self._waiting)
        # a queue that is told to end takes its runs with it
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        bar = tqdm(total=total, smoothing=0, unit='run', disable=None)
        try:
            while self._waiting or self._jobs:
                self._hold_while_paused()
                for task in list(self._waiting):
                    self._start(task)
                for task, job in list(self._jobs.items()):
                    try:
                        next(job)
                    except StopIteration:
                        self._end(task)
                    except (OSError, ValueError) as error:  # of its files: it ends alone
                        self._end(task, str(error))
                bar.update(
                    total
                    - len(self._waiting)
                    - len(self._jobs)
                    + sum(map(_share, self._jobs))
                    - bar.n
                )
                bar.set_postfix_str(', '.join(task.name for task in self._jobs), False)
                time.sleep(self.seconds)
        finally:
            self._stop()
            bar.close()
            signal.signal(signal.SIGTERM, before)
        return self._failed

    def _start(self, task: Task) -> None:
        """Takes a task up, if there is room and what it starts from is there."""
        if not (free := {*self._slots} - {job.slot for job in self._jobs}):
            return
        try:
            unfinished = {other.run.folder for other in (*self._waiting, *self._jobs)}
            for first, checkpoint in task.run.sources.values():
                if first.folder in unfinished:
                    return
                if not checkpoint.is_file():
                    name = f'{first.comparison.name}/{first.name}'
                    raise ValueError(f'{name} has left no {checkpoint}')
            task.slot = min(free)
            if (job := self._begin(task)) is None:
                return  # another queue works on it: perhaps it is finished when we look again
            self._jobs[task] = job
        except (OSError, ValueError) as error:
            self._end(task, str(error))
        self._waiting.remove(task)

    def _begin(self, task: Task) -> Iterator[None] | None:
        lock = claimed(task)
        return None if lock is None else task.work(lock, self._gpus)

    def _stop(self) -> None:
        for task in self._jobs:
            task.stop()

    def _end(self, task: Task, error: str = '') -> None:
        self._jobs.pop(task, None)
        self._failed += [task.name] if error else []
        tqdm.write(f'{task.name} failed: {error}' if error else f'{task.name} is finished')

    def _processes(self) -> list[subprocess.Popen]:
        return [task.process for task in self._jobs if task.process is not None]

    def _hold_while_paused(self) -> None:
        if not self._pause.exists():
            return
        tqdm.write(f'paused until {self._pause} is removed')
        for process in self._processes():
            process.send_signal(signal.SIGSTOP)
        try:
            while self._pause.exists():
                time.sleep(self.seconds)
        finally:
            for process in self._processes():
                process.send_signal(signal.SIGCONT)


def visible_gpus(named: str | None, count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES of one run after another is set to, a GPU each."""
    # CUDA reads names up to the first unknown one; of parts of a GPU (MIG) it opens a single one
    names = named.split(',') if named else [str(index) for index in range(count)]
    return names if named and count and 'MIG' in named else names[:count]


def claimed(task: Task) -> IO[str] | None:
    """The lock of a run, unless another process has it; what a check refuted is set aside."""
    folder = task.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    if (lock := lock_of(folder / 'lock')) is None:
        return None
    make_folder(folder)  # that of another process is not written to
    if (moved := task.store.set_aside(task.run)) is None:
        return lock
    tqdm.write(f'{task.name} begins anew: {moved}')
    lock.close()  # it went with the folder, and the next folder has one of its own
    return claimed(task)


def lock_of(path: Path) -> IO[str] | None:
    """A file that is locked until it is closed; None where another process has locked it."""
    file = path.open('w')
    with suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    file.close()
    return None


def _share(task: Task) -> float:
    with suppress(OSError, ValueError, ZeroDivisionError):  # not there yet, or written in half
        done, total = map(int, (task.run.folder / 'progress').read_text().split())
        return done / total
    return 0.0
