"""What is to be done: runs that have no row, and before them the runs that they start from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .runs import Run
from .store import Store, counts_for


@dataclass(frozen=True)
class Task:
    """A run that has something left to do."""

    run: Run
    store: Store
    leaves: Path | None = None  # checkpoint that others start from
    row: bool = True  # is missing; otherwise it is trained again for the checkpoint alone

    @property
    def name(self) -> str:
        """Tells it from a run of the same name in the comparison that starts from it."""
        name = self.run.name
        return name if self.leaves is None else f'{self.run.comparison.name}/{name}'

    @property
    def tested(self) -> bool:
        """Whether a test belongs to it."""
        return self.row and self.run.comparison.tested

    @property
    def trained(self) -> bool:
        """Whether its training is over."""
        return all(file.is_file() for file in (self.run.folder / 'run.json', *self._checkpoint))

    @property
    def missing(self) -> list[str]:
        """Names of the files that it has not left yet."""
        files = self._checkpoint
        if self.row:
            files += [self.run.folder / 'run.json']
        if self.tested:
            files += [self.run.folder / 'test.json']
        return [file.name for file in files if not file.is_file()]

    @property
    def _checkpoint(self) -> list[Path]:
        return [] if self.leaves is None else [self.leaves]

    def collect(self) -> bool:
        """Writes its row, if that is missing; returns whether nothing is left to do."""
        return not self.missing and (not self.row or self.store.collect(self.run))

    def line(self) -> str:
        """Its commands as one line for a shell."""
        return self.run.line(self.tested, self.leaves)


def tasks_of(runs: Sequence[Run], store: Store) -> list[Task]:
    """What is to be done for the rows of runs: first the runs that they start from, where due."""
    sources = list(_sources(runs, store.folder.parent).values())
    # a row that the comparison which others start from trains in the same way counts here too
    coming = {
        task.run.folder.name
        for task in sources
        if task.row and any(counts_for(task.run, run) for run in runs)
    }
    own = [Task(run, store) for run in runs if run.folder.name not in coming]
    return [*sources, *own]


def _sources(runs: Sequence[Run], rows: Path) -> dict[Path, Task]:
    """The runs that runs start from, as far as they are due, by their checkpoints."""
    found: dict[Path, Task] = {}
    for first, checkpoint in (source for run in runs for source in run.sources.values()):
        if checkpoint in found:
            continue
        store = Store(rows / first.comparison.name)
        task = Task(first, store, checkpoint, row=not store.read([first]).usable)
        if not task.trained and not checkpoint.is_file():
            found |= _sources([first], rows)
        elif not (task.row and task.trained):
            continue  # without a record it is a checkpoint that somebody has put there
        found[checkpoint] = task
    return found
