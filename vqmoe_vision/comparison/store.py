"""Rows of results: a file of JSON for each finished run, a few kilobytes, to be checked in."""

import fcntl
import itertools
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vqmoe_vision.engine.checkpoint_files import POINTER, last_checkpoint, write_atomically
from vqmoe_vision.engine.config import flat
from vqmoe_vision.moe.config import check

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


@dataclass
class Results:
    """What is there of a comparison."""

    usable: Usable  # rows that count
    left_out: dict[str, str]  # reasons by file
    missing: list[Run]
    noise: tuple[float, int] = (math.nan, 0)  # of a difference in all comparisons of the budget
    stored: Collection[tuple[str, int]] = ()  # rows that are there, those of other inputs too

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
                reason = damage(content, run) or (None if refuted else refutation(content))
            except ValueError as error:
                reason = str(error)
            if reason is None:
                results.usable[run.row, run.seed] = content
            else:
                results.left_out[path.name] = reason
        return results

    def collect(self, run: Run) -> None:
        """Writes the file of a run from its work dir, unless there is one that counts."""
        folder, metric = run.folder, run.comparison.metric
        record = load(folder / 'run.json')
        held_out, done = record.get('held_out') or [], record.get('iterations')
        step, test = held_out[-1] if held_out else (0, {})
        if run.comparison.tested:
            test = load(folder / 'test.json')
            if (file := folder / 'test/data.json').is_file():
                record['data'] = {**record.get('data', {}), **load(file)}
            if (file := folder / 'test/correct.json').is_file():
                record['correct'] = load(file)['correct']
        else:
            allowed = f"a validation after {done} iterations, its end, which stage='dev' needs"
            check(step == done, f'{run.name}: held_out', step, allowed)
        names = ', '.join(name for name in test if '.' not in name)
        check(metric in test, 'metric', metric, f'a result of {run.name}: {names}')
        content = {
            'version': VERSION,
            'row': run.row,
            'recipe': run.recipe,
            'budget': budget_of(run.comparison),
            **{name: record[name] for name in _RECORDED if name in record},
            'images': images_seen(run.resolved, record),
            'metric': metric,
            'stage': run.comparison.stage,
            # numbers alone, and not which weights were tested
            'test': {n: v for n, v in test.items() if isinstance(v, int | float)},
            'held_out': [[step, found[metric]] for step, found in held_out if metric in found],
        }
        if reason := damage(content, run):
            raise ValueError(f'results in {folder} cannot be used: {reason}')
        with self._alone():
            if not self.read([run]).usable:
                save(self.path(run), content)

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
        here = [run for run in finished if _has_checkpoint(run, usable[run.row, run.seed])]
        return usable, here, [run.name for run in finished if run not in here]

    def set_aside(self, run: Run) -> str | None:
        """Renames the work dir of a refuted row, its lock and the row with it; says where to."""
        reason = None
        with suppress(ValueError):  # there is no row, or none that can be read
            reason = refutation(load(self.path(run)))
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
    found: dict[Path, Any] = defaultdict(lambda: defaultdict(dict))
    budgets = {(content['budget'], content['metric']) for content in usable.values()}
    data = set(map(_trained_on, usable.values())) | {None}  # which the first rows do not say
    for path in rows.glob('*/*-seed*.json'):
        with suppress(ValueError, KeyError, TypeError):  # of a damaged one
            content = load(path)
            score = content['test'][content['metric']]
            same = (content['budget'], content['metric']) in budgets and math.isfinite(score)
            if same and _trained_on(content) in data and refutation(content) is None:
                found[path.parent][content['row']][content['seed']] = score
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
        return dict(json.loads(path.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is damaged: {error}') from error


def damage(content: Mapping[str, Any], run: Run) -> str | None:
    """Says why a row cannot be read, or is none of today's."""
    if content.get('version') != VERSION:
        return f'it is of version {content.get("version")}, this program reads version {VERSION}'
    if missing := [name for name in FIELDS if content.get(name) is None]:
        return f'it is damaged: {missing} are missing'
    metric, stage = run.comparison.metric, run.comparison.stage
    own = {'row': run.row, 'seed': run.seed, 'metric': metric, 'stage': stage}
    if others := [name for name in own if content[name] != own[name]]:
        return f'it is of {others[0]}={content[others[0]]!r}, not of {own[others[0]]!r}'
    score = content['test'].get(metric)
    if score is None or not math.isfinite(score):
        return f'it is damaged: test has no number for {metric!r}'
    if (then := content['recipe']) != run.recipe:
        return f'stale: recipe {then} of commit {content["commit"]}, today {run.recipe}'
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
    if not samples or 'max_epochs' not in config.get('train_cfg', {}) or loader.get('drop_last'):
        return batch * done
    epochs, rest = divmod(done, -(-samples // batch))  # the last batch of each is smaller
    return samples * epochs + batch * rest


def rounded(value: Any) -> Any:
    """Numbers to five digits, so that a row is a few kilobytes."""
    return json.loads(json.dumps(value), parse_float=lambda digits: float(f'{float(digits):.5g}'))


def _has_checkpoint(run: Run, content: Mapping[str, Any]) -> bool:
    """Whether the checkpoint of a row is here, and not that of another training of its name."""
    record, pointer = run.folder / 'run.json', run.folder / POINTER
    there = record.is_file() and pointer.is_file() and last_checkpoint(run.folder).is_file()
    return there and load(record).get('training_loss') == content['training_loss']


def leave_out_other_inputs(results: Results, runs: Sequence[Run]) -> None:
    """Leaves out rows whose data or starting weights differ from those of most others.

    Their recipes are equal all the same. Of two halves none stays.
    """
    named = {(run.row, run.seed): run for run in runs}
    inputs = {key: dict(_inputs(named[key], of)) for key, of in results.usable.items()}
    seen = Counter(each for of_run in inputs.values() for each in of_run.items())
    for key, of_run in inputs.items():
        for place, given in of_run.items():
            others = {what: n for (at, what), n in seen.items() if at == place and what != given}
            usual = max(others, key=others.__getitem__, default=given)
            if seen[place, given] <= others.get(usual, 0):
                mixed = f'its {place[0]} are {given}, those of {others[usual]} others {usual}'
                results.left_out[f'{named[key].name}.json'] = f'mixed: {mixed}'
                del results.usable[key]
                break


def _inputs(run: Run, content: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    """What was given to a run, by what it is and how its config names it."""
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
