"""Rows of results: a file of JSON for each finished run, a few kilobytes, to be checked in."""

from __future__ import annotations

import fcntl
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqmoe_vision.engine.checkpoint_files import POINTER, last_checkpoint, write_atomically
from vqmoe_vision.engine.config import flat

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
SPLITS = ('train', 'val', 'test')
Place = tuple[str, str]  # what was given to a run, and how its config names that


@dataclass
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
            if not (path := self.path(run)).exists():
                results.missing.append(run)
                continue
            try:
                content = load(path)
                reason = damage(content, run)
                if reason is None and (then := content['recipe']) != run.recipe:
                    by = content['commit']
                    reason = f'stale: recipe {then} of commit {by}, today {run.recipe}'
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
        if tests and (file := folder / 'test/data.json').is_file():
            record['data'] = {**record.get('data', {}), **load(file)}
        if tests and (file := folder / 'test/correct.json').is_file():
            record['correct'] = load(file)['correct']
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

    def set_aside(self, run: Run) -> str | None:
        """Renames the work dir of a refuted row, its lock and the row with it; says where to."""
        try:
            reason = refutation(load(self.path(run)))
        except ValueError:  # there is no row, or none that can be read
            return None
        if reason is None:
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
    own = {'row': run.row, 'seed': run.seed, 'metric': run.comparison.metric}
    for name, value in {**own, 'stage': run.comparison.stage}.items():
        if content[name] != value:
            return f'it is of {name}={content[name]!r}, not of {value!r}'
    score = content['test'].get(run.comparison.metric)
    if score is None or not math.isfinite(score):
        return f'it is damaged: test has no number for {run.comparison.metric!r}'
    return None


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
    record, pointer = run.folder / 'run.json', run.folder / POINTER
    there = record.is_file() and pointer.is_file() and last_checkpoint(run.folder).is_file()
    return there and load(record).get('training_loss') == content['training_loss']


def _last_validation(record: Mapping[str, Any], run: Run) -> dict[str, float]:
    step, numbers = (record.get('held_out') or [(0, {})])[-1]
    if step != record.get('iterations'):
        raise ValueError(
            f'{run.name} has no validation at its end, after {record.get("iterations")} '
            f"iterations, which stage='dev' needs; the last is after {step}"
        )
    return numbers


def leave_out_other_inputs(results: Results, runs: Sequence[Run]) -> None:
    """Leaves out rows whose data or starting weights differ from those of most others.

    Their recipes are equal all the same. Of two halves none stays.
    """
    named = {(run.row, run.seed): run for run in runs}
    inputs = {key: dict(_inputs(named[key], of)) for key, of in results.usable.items()}
    seen: dict[Place, Counter[str]] = {}
    for of_run in inputs.values():
        for place, given in of_run.items():
            seen.setdefault(place, Counter())[given] += 1
    for key, of_run in inputs.items():
        for place, given in of_run.items():
            others = {what: rows for what, rows in seen[place].items() if what != given}
            usual = max(others, key=others.__getitem__, default=given)
            if usual != given and seen[place][given] <= others[usual]:
                mixed = f'its {place[0]} are {given}, those of {others[usual]} others {usual}'
                results.left_out[f'{named[key].name}.json'] = f'mixed: {mixed}'
                del results.usable[key]
                break


def _inputs(run: Run, content: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """What was given to a run, by how its config names it."""
    config = run.resolved
    for split, what in data_of(content):
        dataset = (config.get(f'{split}_dataloader') or {}).get('dataset') or {}
        place = {name: value for name, value in dataset.items() if name != 'transform'}
        yield (f'{split} data', json.dumps(place, sort_keys=True)), what
    named = {**flat(config['model'], 'model'), 'load_from': config.get('load_from')}
    for option, digest in content.get('starting_weights', {}).items():
        # by the comparison, the row and the seed that its folders are named by
        file = '/'.join(Path(named[option]).parts[-3:])
        yield ('starting weights', file), f'{file} ({digest})'


def data_of(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Splits, and what they were."""
    for split, data in content.get('data', {}).items():
        yield split, f'{data["samples"]:,} samples ({data["digest"]})'
