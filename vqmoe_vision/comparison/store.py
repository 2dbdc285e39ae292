"""Rows of results: a file of JSON for each finished run, a few kilobytes, to be checked in."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vqmoe_vision.engine.checkpoint_files import POINTER, last_checkpoint, write_atomically
from vqmoe_vision.engine.numbers import WEIGHTS
from vqmoe_vision.engine.record import BEGUN

from .results import Results, Usable
from .runs import Run
from .validity import (
    VERSION,
    Check,
    damage,
    other_config,
    other_options,
    refutation,
)


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a file, of which others see the old content or the new one."""
    # a line for each field, so that a difference of two versions can be read
    lines = ',\n'.join(f'{json.dumps(k)}: {json.dumps(v)}' for k, v in content.items())
    write_atomically(path, f'{{\n{lines}\n}}\n'.encode())


def load(path: Path) -> dict[str, Any]:
    """The object of JSON in a file."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} is damaged: it holds no object')
    return content


class Store:
    """The folder of a comparison's rows: `<row>-seed<n>.json` each, and `checks.json`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, run: Run) -> Path:
        """The file of a run."""
        return self.folder / f'{run.name}.json'

    def collect(self, run: Run) -> bool:
        """Writes the file of a run from its work dir, unless there is one that counts."""
        folder, comparison = run.folder, run.comparison
        files = [folder / 'run.json', *([folder / 'test.json'] if comparison.tested else [])]
        if not all(file.is_file() for file in files):
            return False
        record, *tests = map(load, files)
        test = tests[0] if tests else _last_validation(record, run)
        test.pop(WEIGHTS, None)  # a row has numbers alone, and one checkpoint
        tested = folder / 'test' / 'data.json'
        if tests and tested.is_file():
            record['data'] = {**record.get('data', {}), **load(tested)}
        metric = run.comparison.metric
        if metric not in test:
            names = ', '.join(name for name in test if '.' not in name)
            raise ValueError(f'metric {metric!r} is not a result of {run.name}; those are {names}')
        content = {
            'version': VERSION,
            'row': run.row,
            'command': shlex.join(run.train(folder)),
            'options': run.options,
            **record,
            'metric': metric,
            'stage': comparison.stage,
            'test': test,
            'held_out': _curve(record, metric),
            'config': run.resolved,
        }
        if reason := damage(content, run):
            raise ValueError(f'results in {folder} cannot be used: {reason}')
        with self._alone():
            if not self.read([run]).usable:
                save(self.path(run), content)
                self._forget_refutation(run)
        return True

    def _forget_refutation(self, run: Run) -> None:
        # it is of the training before, which may have had the same losses: then it would stand
        # against every training, however often the run is made anew
        checks, _ = self._readable_checks()
        if refutation(checks.get(run.name)):
            del checks[run.name]
            save(self.folder / 'checks.json', checks)

    def add(self, run: Run, **measured: dict[str, Any]) -> None:
        """Adds to a row what was measured of its checkpoints, beside what it has by now."""
        path = self.path(run)
        with self._alone():
            content = load(path)
            for field, more in measured.items():
                content[field] = {**content.get(field, {}), **more}
            save(path, content)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else writes into the folder meanwhile; the lock lives as long as its process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.folder, os.O_RDONLY)  # of the folder: a file would be left in it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def read(self, runs: Sequence[Run], checked: bool = True) -> Results:
        """Reads what is there and sorts out what may not be mixed with today's."""
        usable, left_out, missing, right = {}, {}, [], {}
        checks, unread = self._readable_checks()
        if unread is not None:
            left_out['checks.json'] = f'{unread}; no row counts as checked or refuted'
        for run in runs:
            path = self.path(run)
            if not path.exists():
                missing.append(run)
                continue
            try:
                content = load(path)
                reason = damage(content, run) or other_config(content, run)
                check = _check_of(content, run, checks)
                reason = reason or other_options(content, run, check)
            except ValueError as error:
                reason = str(error)
            if reason is None and checked:
                reason = refutation(check)
            if reason is None:
                usable[run.row, run.seed] = content
                if check is not None and check['equal']:
                    right[run.row, run.seed] = check['commit'] or 'outside git'
                    _add_start(content, check)
            else:
                left_out[path.name] = reason
        return Results(usable, left_out, missing, right)

    def unnamed(self, runs: Sequence[Run]) -> list[str]:
        """Names of rows that no run has, such as those of a seed that is not compared any more."""
        named = {self.path(run) for run in runs}
        return sorted(path.name for path in {*self.folder.glob('*-seed*.json')} - named)

    def with_checkpoints(self, runs: Sequence[Run]) -> tuple[Usable, list[Run], list[str]]:
        """Rows that count, their runs whose checkpoints are here, and the names of the others."""
        usable = self.read(runs).usable
        finished = [run for run in runs if (run.row, run.seed) in usable]
        absent = [
            run.name for run in finished if not _has_checkpoint(run, usable[run.row, run.seed])
        ]
        return usable, [run for run in finished if run.name not in absent], absent

    def stale(self, run: Run) -> str | None:
        """Why what the work dir of a run holds may not be gone on with; None if it may."""
        records = [run.folder / name for name in ('run.json', BEGUN)]
        path = next(filter(Path.is_file, records), None)
        if path is None:
            return None
        try:
            record = load(path)
        except ValueError:
            return None
        check = _check_of(record, run, self._readable_checks()[0])
        return refutation(check) or other_options(record, run, check)

    def set_aside(self, run: Run) -> str | None:
        """Renames the work dir of a stale run, and its lock with it; says why and where to."""
        if (reason := self.stale(run)) is None:
            return None
        names = (f'{run.folder.name}-stale{n}' for n in itertools.count(1))
        free = (p for p in map(run.folder.with_name, names) if not p.exists())
        there = run.folder.rename(next(free))
        return f'{reason}; what it left is in {there}'

    def checks(self) -> dict[str, Check]:
        """What `check` has found, by the name of the run."""
        path = self.folder / 'checks.json'
        return load(path) if path.exists() else {}

    def _readable_checks(self) -> tuple[dict[str, Check], str | None]:
        """The same, or none and why: a damaged file is no reason to stop."""
        try:
            return self.checks(), None
        except ValueError as error:
            return {}, str(error)

    def keep_check(self, run: Run, finding: dict[str, Any]) -> None:
        """Writes down what `check` has found."""
        with self._alone():
            checks = dict(sorted({**self.checks(), run.name: finding}.items()))
            save(self.folder / 'checks.json', checks)


def _has_checkpoint(run: Run, content: dict[str, Any]) -> bool:
    """Whether the checkpoint of a row is here, and not that of another training of its name."""
    folder, record = run.folder, run.folder / 'run.json'
    if not (
        record.is_file() and (folder / POINTER).is_file() and last_checkpoint(folder).is_file()
    ):
        return False
    return load(record).get('training_loss') == content['training_loss']


def _check_of(record: dict[str, Any], run: Run, checks: dict[str, Check]) -> Check | None:
    """The check of a training; one of another training of the same name says nothing of it."""
    check = checks.get(run.name)
    return check if check and check['losses'] == record.get('first_losses') else None


def _add_start(content: dict[str, Any], check: Check) -> None:
    """Of a row from before it was kept: the weights with which a check found it to be right."""
    if 'starting_weights' in check:
        content.setdefault('starting_weights', check['starting_weights'])


def _curve(record: dict[str, Any], metric: str) -> list[list[float]]:
    points = record.get('held_out') or []
    return [[step, values[metric]] for step, values in points if metric in values]


def _last_validation(record: dict[str, Any], run: Run) -> dict[str, float]:
    step, numbers = (record.get('held_out') or [(0, {})])[-1]
    if step != record.get('iterations'):
        raise ValueError(
            f'{run.name} has no validation at its end, after {record.get("iterations")} '
            f"iterations, which stage='dev' needs; the last is after {step}"
        )
    return numbers


def completed(results: Results, other: Store) -> Results:
    """Results with what another comparison has trained in the same way."""
    more = other.read(results.missing)
    waiting = {f'{run.name}.json': run for run in results.missing}
    refused = {
        name: f'in {other.folder}: {reason}'
        for name, reason in more.left_out.items()
        if name in waiting and _is_shared(waiting[name])
    }
    of_no_run = {
        f'{other.folder / name}': reason
        for name, reason in more.left_out.items()
        if name not in waiting
    }
    missing = [
        run
        for name, run in waiting.items()
        if name not in refused and (run.row, run.seed) not in more.usable
    ]
    return Results(
        {**results.usable, **more.usable},
        {**results.left_out, **refused, **of_no_run},
        missing,
        {**results.checked, **more.checked},
    )


def _is_shared(run: Run) -> bool:
    start = run.comparison.start
    if start is None or (run.row, run.seed) not in start.comparison.selected():
        return False
    return counts_for(Run(start.comparison, run.row, run.seed, run.root), run)


def counts_for(source: Run, run: Run) -> bool:
    """Whether the row of one is that of the other: the folder's name holds all that decides."""
    start = run.comparison.start
    return (
        start is not None
        and start.comparison.name == source.comparison.name
        and source.comparison.metric == run.comparison.metric
        and source.comparison.stage == run.comparison.stage
        and source.folder.name == run.folder.name
    )
