"""What every action of `tools/compare.py` begins with: the runs that it is about."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from vqmoe_vision.engine.cli import make_folder

from .inputs import without_other_inputs
from .measured import check_shifts
from .queue import Task, tasks_of
from .runs import Run
from .spec import read_comparison
from .store import Results, Store, Usable, noise_of


class Work:
    """The rows and seeds that an action was asked for, and what is there of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.comparison = read_comparison(args.spec)
        name = self.comparison.name
        self._all = [
            Run(self.comparison, row, seed, args.work_dir)
            for row, seed in self.comparison.selected()
        ]
        chosen = self.comparison.selected(args.rows, args.seeds)
        self.runs = [one for one in self._all if (one.row, one.seed) in chosen]
        for one in self.runs:  # a mistake in any of them is found before the first starts
            one.folder  # noqa: B018
        check_shifts(self._all[0])
        self.folder = args.work_dir / name
        rows = args.results / 'rows'
        self._rows, self.store = rows, Store(rows / name)
        start = self.comparison.start
        self._others = [] if start is None else [Store(rows / start.comparison.name)]

    def read(self) -> Results:
        """What is there of the whole comparison, with a line for all that is left out."""
        results = self.store.read(self._all)
        if others := self.store.unnamed(self._all):
            results.left_out[', '.join(others)] = 'the comparison names no such row or seed'
        # what was trained in the same way for the comparison that rows start from counts here too
        for other in self._others:
            results.usable.update(other.read(results.missing).usable)
        self._stored = set(results.usable)  # one of other inputs would end as it did
        for name, reason in (results := without_other_inputs(results, self._all)).left_out.items():
            print(f'left out: {name}: {reason}', file=sys.stderr)
        missing = [run for run in results.missing if (run.row, run.seed) not in self._stored]
        return replace(results, missing=missing, noise=noise_of(self._rows, results.usable))

    def unfinished(self) -> list[Run]:
        """The chosen runs without results."""
        self.read()
        return [run for run in self.runs if (run.row, run.seed) not in self._stored]

    def own(self, what: str, refuted: bool = False) -> tuple[Store, Usable]:
        """Its rows and what counts of them, which is to be done something with."""
        missing = self.store.read(self.runs).missing
        for other in self._others:
            if names := [f'{row}-seed{seed}' for row, seed in other.read(missing).usable]:
                print(
                    f'{len(names)} rows are those of {other.folder.name}, with which this has to '
                    f'be done for them: {", ".join(names)}',
                    file=sys.stderr,
                )
        results = self.store.read(self.runs, refuted)
        if not results.usable:
            name = self.comparison.name
            raise ValueError(f'no run of {name} can be {what}{results.why_none}')
        make_folder(self.store.folder)
        return self.store, results.usable

    def current(self) -> list[Task]:
        """What is left to do, but for runs whose rows a check has refuted, and what needs them."""
        tasks: list[Task] = []
        left: set[Path] = set()
        for task in tasks_of(self.unfinished(), self.store):  # first what others start from
            sources = {first.folder for first, _ in task.run.sources.values()}
            reason = task.store.refuted(task.run)
            if reason is None and sources.isdisjoint(left):
                tasks.append(task)
                continue
            left.add(task.run.folder)
            why = reason or 'it starts from a run that is left out'
            print(f'left out: {task.name}: {why}; the action run begins it anew', file=sys.stderr)
        return tasks
