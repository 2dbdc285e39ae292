"""Rows of results: a file of JSON for each finished run, a few kilobytes, to be checked in."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqmoe_vision.engine.checkpoint_files import POINTER, last_checkpoint, write_atomically

from .runs import Run, budget_of
from .statistics import pooled_noise

VERSION = 2
# What a run leaves and a row keeps, as it is.
_RECORDED = (
    'seed', 'commit', 'versions', 'device', 'hardware', 'threads', 'minutes', 'cpu_minutes',
    'iterations', 'params', 'active_params', 'macs', 'data', 'starting_weights', 'first_losses',
    'training_loss', 'correct',
)  # fmt: skip
# What tables, figures and commands use of every row. The first rows have neither `data` nor
# `correct`, a bit per test image; `checked`, `shifts`, `shift_routing` and `routing` come later.
FIELDS = (
    'row', 'seed', 'recipe', 'budget', 'metric', 'stage', 'test', 'commit', 'device', 'hardware',
    'minutes', 'cpu_minutes', 'iterations', 'images', 'params', 'active_params', 'macs',
    'first_losses', 'training_loss', 'held_out',
)  # fmt: skip
Usable = dict[tuple[str, int], dict[str, Any]]


@dataclass(frozen=True)
class Results:
    """What is there of a comparison."""

    usable: Usable  # rows that count
    left_out: dict[str, str]  # reasons by file
    missing: list[Run]
    noise: tuple[float, int] = (math.nan, 0)  # of a difference in all comparisons of the budget

    @property
    def why_none(self) -> str:
        """How a sentence ends that says that none counts."""
        kept = '; '.join(f'{name}: {why}' for name, why in self.left_out.items())
        return f' ({kept})' if kept else ': none is finished, tools/compare.py run trains them'


class Store:
    """The folder of a comparison's rows: `<row>-seed<n>.json` each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, run: Run) -> Path:
        """The file of a run."""
        return self.folder / f'{run.name}.json'

    def read(self, runs: Sequence[Run], refuted: bool = False) -> Results:
        """Reads what is there and sorts out what may not stand beside today's."""
        results = Results({}, {}, [])
        for run in runs:
            path = self.path(run)
            if not path.exists():
                results.missing.append(run)
                continue
            try:
                content = load(path)
                reason = damage(content, run) or stale(content, run)
                if reason is None and not refuted:
                    reason = refutation(content)
            except ValueError as error:
                reason = str(error)
            if reason is None:
                results.usable[run.row, run.seed] = content
            else:
                results.left_out[path.name] = reason
        return results

    def unnamed(self, runs: Sequence[Run]) -> list[str]:
        """Names of rows that no run has, such as those of a seed that is not compared any more."""
        named = {self.path(run) for run in runs}
        return sorted(path.name for path in {*self.folder.glob('*-seed*.json')} - named)

    def collect(self, run: Run) -> bool:
        """Writes the file of a run from its work dir, unless there is one that counts."""
        folder, comparison = run.folder, run.comparison
        files = [folder / 'run.json', *([folder / 'test.json'] if comparison.tested else [])]
        if not all(file.is_file() for file in files):
            return False
        record, *tests = map(load, files)
        test = tests[0] if tests else _last_validation(record, run)
        seen, right = (folder / 'test' / name for name in ('data.json', 'correct.json'))
        if tests and seen.is_file():
            record['data'] = {**record.get('data', {}), **load(seen)}
        if tests and right.is_file():
            record['correct'] = load(right)['correct']
        metric = comparison.metric
        if metric not in test:
            names = ', '.join(name for name in test if '.' not in name)
            raise ValueError(f'metric {metric!r} is not a result of {run.name}; those are {names}')
        held_out = record.get('held_out') or []
        content = {
            'version': VERSION,
            'row': run.row,
            'recipe': run.recipe,
            'budget': budget_of(comparison),
            **{name: record[name] for name in _RECORDED if name in record},
            'images': images_seen(run.resolved, record),
            'metric': metric,
            'stage': comparison.stage,
            # numbers alone, and not which weights were tested
            'test': {n: v for n, v in test.items() if isinstance(v, int | float)},
            'held_out': [[step, found[metric]] for step, found in held_out if metric in found],
        }
        if reason := damage(content, run):
            raise ValueError(f'results in {folder} cannot be used: {reason}')
        with self._alone():
            if not self.read([run]).usable:
                save(self.path(run), content)
        return True

    def add(self, run: Run, **measured: dict[str, Any]) -> None:
        """Adds to a row what was found of it later, beside what it has by now."""
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

    def with_checkpoints(self, runs: Sequence[Run]) -> tuple[Usable, list[Run], list[str]]:
        """Rows that count, their runs whose checkpoints are here, and the names of the others."""
        usable = self.read(runs).usable
        finished = [run for run in runs if (run.row, run.seed) in usable]
        absent = [
            run.name for run in finished if not _has_checkpoint(run, usable[run.row, run.seed])
        ]
        return usable, [run for run in finished if run.name not in absent], absent

    def refuted(self, run: Run) -> str | None:
        """What a check has found against the row of a run, which its work dir has left."""
        try:
            return refutation(load(self.path(run)))
        except ValueError:  # none, or none that can be read
            return None

    def set_aside(self, run: Run) -> str | None:
        """Renames the work dir of a refuted row, its lock and the row with it; says where to."""
        if (reason := self.refuted(run)) is None:
            return None
        names = (f'{run.folder.name}-stale{n}' for n in itertools.count(1))
        free = (p for p in map(run.folder.with_name, names) if not p.exists())
        there = run.folder.rename(next(free))
        write_atomically(there / 'row.json', self.path(run).read_bytes())
        self.path(run).unlink()
        return f'{reason}; what it left is in {there}'


def noise_of(rows: Path, usable: Usable) -> tuple[float, int]:
    """The noise of all comparisons with the budget and the training data of some rows."""
    found: dict[Path, dict[str, dict[int, float]]] = {}
    budgets = {(content['budget'], content['metric']) for content in usable.values()}
    data = set(map(_trained_on, usable.values())) | {None}  # which the first rows do not say
    for path in rows.glob('*/*-seed*.json'):
        with suppress(ValueError, KeyError):  # of a damaged one
            content = load(path)
            same = (content['budget'], content['metric']) in budgets
            score = content['test'][content['metric']]
            finite = isinstance(score, int | float) and math.isfinite(score)
            if same and finite and _trained_on(content) in data and refutation(content) is None:
                of_row = found.setdefault(path.parent, {}).setdefault(content['row'], {})
                of_row[content['seed']] = score
    return pooled_noise(found[folder] for folder in sorted(found))


def _trained_on(content: Mapping[str, Any]) -> str | None:
    return content.get('data', {}).get('train', {}).get('digest')


def save(path: Path, content: Mapping[str, Any]) -> None:
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


def damage(content: Mapping[str, Any], run: Run) -> str | None:
    """Says why a row cannot be read."""
    if content.get('version') != VERSION:
        return f'it is of version {content.get("version")}, this program reads version {VERSION}'
    if missing := [name for name in FIELDS if content.get(name) is None]:
        return f'it is damaged: {missing} are missing'
    for name, value in (('row', run.row), ('seed', run.seed), ('metric', run.comparison.metric)):
        if content[name] != value:
            return f'it is of {name}={content[name]!r}, not of {value!r}'
    if (then := content['stage']) != (stage := run.comparison.stage):
        return f'its numbers are of stage={then!r}, not of {stage!r}'
    score = content['test'].get(run.comparison.metric)
    if score is None or not math.isfinite(score):
        return f'it is damaged: test has no number for {run.comparison.metric!r}'
    return None


def stale(content: Mapping[str, Any], run: Run) -> str | None:
    """Says whether a row is of another recipe than today's."""
    if (then := content['recipe']) == run.recipe:
        return None
    return f'stale: recipe {then} of commit {content["commit"]}, today {run.recipe}'


def refutation(content: Mapping[str, Any]) -> str | None:
    """Says what a check has found against a row."""
    checked = content.get('checked', {'equal': True})
    return None if checked['equal'] else f'stale: {checked["finding"]}'


def images_seen(config: Mapping[str, Any], record: Mapping[str, Any]) -> int:
    """How many images a run has been trained on, those that it saw again counted again."""
    loader = config.get('train_dataloader') or {}
    batch, done = loader.get('batch_size', 1), record.get('iterations', 0)  # as torch has it
    samples = record.get('data', {}).get('train', {}).get('samples')
    in_epochs = 'max_epochs' in (config.get('train_cfg') or {})
    if not (samples and in_epochs) or loader.get('drop_last'):
        return batch * done
    epochs, rest = divmod(done, -(-samples // batch))  # the last batch of each is smaller
    return samples * epochs + batch * rest


def rounded(value: Any) -> Any:
    """Numbers to five digits, so that a row is a few kilobytes."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f'{value:.5g}') if isinstance(value, float) else value


def _has_checkpoint(run: Run, content: Mapping[str, Any]) -> bool:
    """Whether the checkpoint of a row is here, and not that of another training of its name."""
    folder, record = run.folder, run.folder / 'run.json'
    if not (
        record.is_file() and (folder / POINTER).is_file() and last_checkpoint(folder).is_file()
    ):
        return False
    return load(record).get('training_loss') == content['training_loss']


def _last_validation(record: Mapping[str, Any], run: Run) -> dict[str, float]:
    step, numbers = (record.get('held_out') or [(0, {})])[-1]
    if step != record.get('iterations'):
        raise ValueError(
            f'{run.name} has no validation at its end, after {record.get("iterations")} '
            f"iterations, which stage='dev' needs; the last is after {step}"
        )
    return numbers
