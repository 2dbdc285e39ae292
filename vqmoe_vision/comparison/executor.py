"""Works through runs as jobs of submitit: an array of Slurm, or processes of this machine.

A job is a run. What ends it may start it again at any time: it goes on from its last checkpoint.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from vqmoe_vision.moe.config import check

from .queue import Queue, Task, claimed, lock_of

# Seconds in which the processes of a job that was killed are gone, and with them their lock.
_PATIENCE = 30
# How often a run may reach its limit of time, and the minutes of one without a limit.
_REQUEUES, _WITHOUT_LIMIT = 1000, 10**6


@dataclass
class Job:
    """What a job does, on its own machine; submitit keeps it as a file."""

    task: Task
    gpus: Sequence[str]

    def __call__(self) -> str:
        """Works on the run to its end; returns what went wrong."""
        until = time.monotonic() + _PATIENCE
        while (lock := claimed(self.task)) is None:
            if time.monotonic() > until:
                return 'another job works on it'
            time.sleep(1)
        try:
            for _ in self.task.work(lock, self.gpus):
                time.sleep(0.2)
        except (OSError, ValueError) as error:
            return str(error)
        finally:
            self.task.stop()
        return ''

    def checkpoint(self) -> Any:
        """Where the limit of time is near: the run is saved, and comes again."""
        from submitit.helpers import DelayedSubmission

        self.task.stop()
        return DelayedSubmission(Job(replace(self.task, process=None), self.gpus))


class Submitted(Queue):
    """Works through tasks as jobs, and waits for them."""

    def __init__(
        self, tasks: Sequence[Task], jobs: int | None, pause: Path, executor: str,
        minutes: int | None, more: Mapping[str, Any],
    ) -> None:  # fmt: skip
        import submitit

        super().__init__(tasks, jobs, pause)
        size, workers = tasks[0].processes, max(map(_workers, tasks))
        self._folder, self._here = pause.parent / 'jobs', executor == 'local'
        self._new: list[Task] = []
        self._submitted: dict[Task, Any] = {}
        kind = submitit.LocalExecutor if self._here else submitit.SlurmExecutor
        self._executor: Any = kind(self._folder, max_num_timeout=_REQUEUES)
        if self._here:
            groups = range(len(self._gpus) // size)
            allowed = f'at most {len(self._gpus)}, a GPU each'
            check(bool(groups) or not self._gpus, '--processes-per-run', size, allowed)
            self._gpus = [','.join(self._gpus[i * size : (i + 1) * size]) for i in groups]
            self._slots = range(jobs or max(len(self._gpus), 1))
            self._executor.update_parameters(timeout_min=minutes or _WITHOUT_LIMIT)
            return
        check(minutes is not None, '--minutes', None, 'given, Slurm limits the time of each job')
        self._gpus, self._slots, self.seconds = [], range(len(tasks)), 5.0
        self.stopped = 'no longer waiting; jobs go on, and the same command waits for them again'
        given: dict[str, Any] = {
            'job_name': pause.parent.name,
            'time': minutes,
            'gpus_per_node': size,
        }
        given |= {'cpus_per_task': size * (1 + workers), 'array_parallelism': jobs or len(tasks)}
        given |= {'additional_parameters': {'requeue': True}, **more}  # also after a preemption
        self._executor.update_parameters(nodes=1, ntasks_per_node=1, **given)

    def _begin(self, task: Task) -> Iterator[None] | None:
        """As a job, or as the one that an earlier call has submitted and that is not over."""
        folder = task.run.folder
        folder.mkdir(parents=True, exist_ok=True)
        if (note := folder / 'job').is_file():
            job = self._executor.job_class(self._folder, note.read_text())
            if not job.done():
                self._submitted[task] = job
                return self._wait(task)
        if (lock := lock_of(folder / 'lock')) is None:
            return None
        lock.close()  # the job takes it
        self._new.append(task)
        return self._wait(task)

    def _wait(self, task: Task) -> Iterator[None]:
        if new := self._new:  # all that have begun together are one array
            self._new = []
            with patch.dict(os.environ, PYTHONSAFEPATH='1'):  # the jobs import nothing from here
                jobs = self._executor.submit_array([Job(each, self._gpus) for each in new])
            for one, job in zip(new, jobs, strict=True):
                self._submitted[one] = job
                (one.run.folder / 'job').write_text(job.job_id)
        while not self._submitted[task].done():
            yield
        job = self._submitted.pop(task)
        try:
            said = job.result()
        except Exception as error:  # of submitit, with all that the job has printed
            raise ValueError(f'its job has ended, see {job.paths.stderr}') from error
        if said:
            raise ValueError(said)

    def _stop(self) -> None:
        """Those of this machine end; those of Slurm go on."""
        for job in self._submitted.values() if self._here else ():
            job.cancel()
            job.wait()


def _workers(task: Task) -> int:
    return (task.run.resolved.get('train_dataloader') or {}).get('num_workers', 0)
