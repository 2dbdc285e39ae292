"""What every action of `tools/compare.py` begins with: the runs that it is about."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vqmoe_vision.engine.cli import make_folder

from .inputs import without_other_inputs
from .measured import check_shifts
from .results import Results, Usable
from .runs import Run
from .spec import read_comparison
from .store import Store, completed
from .tasks import Task, tasks_of


class Work:
    """The rows and seeds that an action was asked for, and what is there of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.comparison = read_comparison(args.spec)
        name = self.comparison.name
        self._all = [
            Run(self.comparison, row, seed, args.work_dir)
            for row, seed in self.comparison.selected()
        ]
        self._chosen = set(self.comparison.selected(args.rows, args.seeds))
        self.runs = [one for one in self._all if (one.row, one.seed) in self._chosen]
        for one in self.runs:  # a mistake in any of them is found before the first starts
            one.folder  # noqa: B018
        check_shifts(self._all[0])
        self.folder = args.work_dir / name
        rows = args.results / 'rows'
        self.store = Store(rows / name)
        start = self.comparison.start
        self._others = [] if start is None else [Store(rows / start.comparison.name)]

    def read(self) -> Results:
        """What is there, with a line for all that is left out."""
        return self._read()[0]

    def unfinished(self) -> list[Run]:
        """The runs without results; one of other inputs has some, and would end as it did."""
        _, stored = self._read()
        return [one for one in self.runs if (one.row, one.seed) not in stored]

    def _read(self) -> tuple[Results, set[tuple[str, int]]]:
        """What counts, and which rows are there, those of other inputs among them."""
        results = self.store.read(self._all)  # what most were given is a matter of the whole
        if others := self.store.unnamed(self._all):
            results.left_out[', '.join(others)] = 'the comparison names no such row or seed'
        # what was trained in the same way for the comparison that rows start from counts here too
        for other in self._others:
            results = completed(results, other)
        stored = set(results.usable)
        results = without_other_inputs(results).restricted(self._chosen, self.comparison.selected())
        for name, reason in results.left_out.items():
            print(f'left out: {name}: {reason}', file=sys.stderr)
        return results, stored

    def own(self, what: str, checked: bool = True) -> tuple[Store, Usable]:
        """Its rows and what counts of them, which is to be done something with."""
        missing = self.store.read(self.runs).missing
        for other in self._others:
            if names := [f'{row}-seed{seed}' for row, seed in other.read(missing).usable]:
                print(
                    f'{len(names)} rows are those of {other.folder.name}, with which this has to '
                    f'be done for them: {", ".join(names)}',
                    file=sys.stderr,
                )
        results = self.store.read(self.runs, checked)
        if not results.usable:
            name = self.comparison.name
            raise ValueError(f'no run of {name} can be {what}{results.why_none}')
        make_folder(self.store.folder)
        return self.store, results.usable

    def current(self) -> list[Task]:
        """What is left to do for those, but where a work dir holds what may not be gone on with."""
        tasks: list[Task] = []
        left: set[Path] = set()
        for task in tasks_of(self.unfinished(), self.store):  # first what others start from
            sources = [first for first, _ in task.run.sources.values() if first.folder in left]
            reason = task.store.stale(task.run)
            if reason is not None:
                what = f'what {task.run.folder} holds is {reason}'
            elif sources:
                what = f'it starts from {sources[0].name}, which is left out'
            else:
                tasks.append(task)
                continue
            left.add(task.run.folder)
            print(
                f'left out: {task.name}: {what}; the action run sets aside what is stale and '
                'begins anew',
                file=sys.stderr,
            )
        return tasks
