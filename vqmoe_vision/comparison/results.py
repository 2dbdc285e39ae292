"""Rows of results: a file of JSON for each finished run, a few kilobytes, to be checked in."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqmoe_vision.engine.checkpoint_files import POINTER

from .runs import Run, what_counts

VERSION = 1
Usable = dict[tuple[str, int], dict[str, Any]]
_NEEDED = {
    'config',
    'options',
    'command',
    'row',
    'seed',
    'metric',
    'test',
    'first_losses',
    'held_out',
}


@dataclass(frozen=True)
class Results:
    """What is there of a comparison.

    Args:
        usable: Contents of the files that count, by row and seed.
        left_out: Reasons by the name of a file that does not count.
        missing: Runs without a file.
    """

    usable: Usable
    left_out: dict[str, str]
    missing: list[Run]

    def completed(self, more: Usable) -> Results:
        """These with rows of another comparison that were trained in the same way.

        Args:
            more: Some of what is missing, by row and seed.
        """
        missing = [run for run in self.missing if (run.row, run.seed) not in more]
        return Results({**self.usable, **more}, self.left_out, missing)


class Store:
    """The folder of a comparison's rows.

    Args:
        folder: Holds `<row>-seed<n>.json` and `checks.json`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, run: Run) -> Path:
        """The file of a run."""
        return self.folder / f'{run.name}.json'

    def collect(self, run: Run) -> bool:
        """Writes the file of a run from its work dir.

        Returns:
            Whether the run is finished.

        Raises:
            ValueError: A file of the run is damaged, or its numbers have no such metric or, without
                a test, are not of the end of the training.
        """
        folder, comparison = run.folder, run.comparison
        files = [folder / 'run.json', *([folder / 'test.json'] if comparison.tested else [])]
        if not all(file.is_file() for file in files):
            return False
        record, *tests = map(_load, files)
        test = tests[0] if tests else _last_validation(record, run)
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
            'held_out': [[i, values[metric]] for i, values in record['held_out']],
            'config': run.resolved,
        }
        self.write(run, content)
        return True

    def write(self, run: Run, content: dict[str, Any]) -> None:
        """Writes the file of a run.

        Args:
            run: The run.
            content: Of its file.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        _save(self.path(run), content)

    def read(self, runs: Sequence[Run], checked: bool = True) -> Results:
        """Reads what is there and sorts out what may not be mixed with today's.

        Args:
            runs: Of one comparison.
            checked: Leave out what a check has found to be stale.
        """
        usable, left_out, missing = {}, {}, []
        for run in runs:
            path = self.path(run)
            if not path.is_file():
                missing.append(run)
                continue
            try:
                content = _load(path)
                reason = _damage(content, run) or _stale(content['config'], run.resolved)
            except ValueError as error:
                reason = str(error)
            if reason is None and checked:
                reason = self.refuted(run, content)
            if reason is None:
                usable[run.row, run.seed] = content
            else:
                left_out[path.name] = reason
        return Results(usable, left_out, missing)

    def with_checkpoints(self, runs: Sequence[Run]) -> tuple[Usable, list[Run], list[str]]:
        """Finished runs that can be looked at again.

        Args:
            runs: Of one comparison.

        Returns:
            Contents of the rows that count, their runs whose checkpoints are here, and the names of
            the others.
        """
        usable = self.read(runs).usable
        finished = [run for run in runs if (run.row, run.seed) in usable]
        absent = [run.name for run in finished if not (run.folder / POINTER).is_file()]
        return usable, [run for run in finished if run.name not in absent], absent

    def refuted(self, run: Run, record: dict[str, Any]) -> str | None:
        """What `check` has found against a record, if it has.

        Args:
            run: The run.
            record: What it left.
        """
        check = self.checks().get(run.name)
        # a check of another training of the same name says nothing
        if check is None or check['equal'] or check['losses'] != record['first_losses']:
            return None
        return f'stale: {check["finding"]}'

    def is_refuted(self, run: Run) -> bool:
        """Whether a check has refuted what the work dir of a run holds.

        Args:
            run: The run.

        Raises:
            ValueError: The record in its work dir is damaged.
        """
        record = run.folder / 'run.json'
        return record.is_file() and self.refuted(run, _load(record)) is not None

    def set_aside(self, run: Run) -> bool:
        """Renames the work dir of a refuted run, so that the next one starts from nothing.

        Args:
            run: The run, whose lock is held: the lock goes with the folder.

        Returns:
            Whether it was renamed.

        Raises:
            ValueError: The record in its work dir is damaged.
        """
        if not self.is_refuted(run):
            return False
        names = (f'{run.folder.name}-stale{n}' for n in itertools.count(1))
        free = (p for p in map(run.folder.with_name, names) if not p.exists())
        run.folder.rename(next(free))
        return True

    def checks(self) -> dict[str, dict[str, Any]]:
        """What `check` has found, by the name of the run."""
        path = self.folder / 'checks.json'
        return _load(path) if path.is_file() else {}

    def keep_check(self, run: Run, finding: dict[str, Any]) -> None:
        """Writes down what `check` has found.

        Args:
            run: The run.
            finding: Whether its first losses came out again, and what is to be said of it.
        """
        checks = dict(sorted({**self.checks(), run.name: finding}.items()))
        _save(self.folder / 'checks.json', checks)


def _save(path: Path, content: dict[str, Any]) -> None:
    # a line for each field, so that a difference of two versions can be read
    lines = ',\n'.join(f'{json.dumps(k)}: {json.dumps(v)}' for k, v in content.items())
    path.write_text(f'{{\n{lines}\n}}\n')


def _load(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} is damaged: it holds no object')
    return content


def _damage(content: dict[str, Any], run: Run) -> str | None:
    if content.get('version') != VERSION:
        return f'it is of version {content.get("version")}, this program reads version {VERSION}'
    if missing := sorted(_NEEDED - content.keys()):
        return f'it is damaged: {missing} are missing'
    if (content['row'], content['seed']) != (run.row, run.seed):
        return f'it is damaged: it holds {content["row"]}, seed {content["seed"]}'
    if content['metric'] != (metric := run.comparison.metric):
        return f'its curves are of {content["metric"]!r}, not of {metric!r}: collect it again'
    # before there were two, all were tested
    if (then := content.get('stage', 'test')) != (stage := run.comparison.stage):
        return f'its numbers are of stage={then!r}, not of {stage!r}'
    return None


def _last_validation(record: dict[str, Any], run: Run) -> dict[str, float]:
    """The numbers on held-out data of the model that the training ended with."""
    step, numbers = record['held_out'][-1] if record['held_out'] else (0, {})
    if step != record['iterations']:
        raise ValueError(
            f'{run.name} has no validation at its end, after {record["iterations"]} iterations, '
            f"which stage='dev' needs; the last is after {step}"
        )
    return numbers


def _stale(then: dict[str, Any], now: dict[str, Any]) -> str | None:
    """Says where a config differs from today's."""
    flat_then, flat_now = what_counts(then), what_counts(now)
    every = sorted(flat_then.keys() | flat_now.keys())
    # how processes talk; a work dir has it in its name, by which others start from its checkpoint
    names = [name for name in every if not name.startswith('env_cfg.dist_cfg')]
    changed = [n for n in names if flat_then.get(n) != flat_now.get(n)]
    if not changed:
        return None
    name = changed[0]
    others = f' and {len(changed) - 1} more' if len(changed) > 1 else ''
    return f'stale: {name}={flat_then.get(name)!r}, today {flat_now.get(name)!r}{others}'
