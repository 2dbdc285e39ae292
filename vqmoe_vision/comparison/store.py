"""Runs as commands that anybody can repeat, and rows of results: a file of JSON for each.

A row is a few kilobytes, to be checked in.
"""

import fcntl
import itertools
import json
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mmengine.config import Config

from vqmoe_vision import FOLDER
from vqmoe_vision.engine.checkpoint_files import POINTER, last_checkpoint, write_atomically
from vqmoe_vision.engine.cli import as_typed, load_config, one_line
from vqmoe_vision.engine.config import flat, parse_options
from vqmoe_vision.engine.model import check_model
from vqmoe_vision.moe.config import check, has_type

from .spec import SOURCE, Comparison, recipe_of
from .statistics import pooled_noise

# the environment of a run's process
ONE_THREAD = {'OMP_NUM_THREADS': '1', 'OMP_WAIT_POLICY': 'PASSIVE'}
# as `python -m torch.distributed.run`, without the modules of the current folder
_TORCHRUN = (
    'import sys; sys.path[:] = filter(None, sys.path); '
    'from torch.distributed.run import main; main()'
)


@dataclass(frozen=True)
class Run:
    """One row of a comparison at one seed."""

    comparison: Comparison
    row: str
    seed: int  # of everything that is drawn
    root: Path  # folder of all comparisons' runs

    __getstate__ = Comparison.__getstate__  # a job that begins later finds its own recipe

    @property
    def name(self) -> str:
        """Names its file of results."""
        return f'{self.row}-seed{self.seed}'

    @property
    def place(self) -> tuple[str, int]:
        """Where its results stand in `Usable`."""
        return self.row, self.seed

    @property
    def options(self) -> list[str]:
        """All of `--cfg-options`."""
        given = [*self.comparison.options, *self.comparison.rows[self.row]]
        given = [SOURCE.sub(lambda found: str(self.sources[found[0]][1]), each) for each in given]
        return [*given, f'randomness.seed={self.seed}', 'default_hooks.record.type=RunRecordHook']

    @cached_property
    def sources(self) -> dict[str, tuple['Run', Path]]:
        """The runs that leave what this one starts from, and where, by what options say for it."""
        sources = {}
        for found in SOURCE.finditer(' '.join(self.comparison.rows[self.row])):
            assert self.comparison.start is not None
            comparison, row, file = self.comparison.start
            run = Run(comparison, found[1] or row, self.seed, self.root)
            path = run.folder / file
            allowed = 'a path without a comma, at which --cfg-options divide a value'
            check(',' not in str(path), found[0], str(path), allowed)
            sources[found[0]] = run, path
        return sources

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """The config with all options merged in, as JSON has it."""
        return as_json(self.merged())

    def merged(self, *more: str) -> Config:
        """As `config`, without importing the modules that the file names."""
        return self.comparison.merged([*self.options, *more])

    def config(self, *more: str) -> Config:
        """The config with all options merged in."""
        return load_config(self.comparison.config, parse_options([*self.options, *more]))

    @cached_property
    def recipe(self) -> str:
        """What its row has to be made by: the same for all seeds, wherever its sources lie."""
        sources = {
            str(file.relative_to(self.root)): f'{r.comparison.name}/{r.row}/{r.recipe}/{file.name}'
            for r, file in self.sources.values()
        }
        try:
            return recipe_of(self.resolved, sources)
        except ValueError as error:
            raise ValueError(self._said(error)) from error

    @property
    def key(self) -> tuple[str, ...]:
        """What has to be equal for a row of another comparison to be this one's too."""
        return self.name, self.recipe, self.comparison.metric, self.comparison.stage

    @cached_property
    def folder(self) -> Path:
        """Its work dir, named by its recipe too: another one never resumes its checkpoints."""
        return self.root / self.comparison.name / f'{self.name}-{self.recipe[:8]}'

    def build(self) -> None:
        """Builds its model without memory for it: a mistake there would end all runs of the row."""
        config = self.merged()
        model = config.model.get('backbone', config.model)
        try:
            fits = not (model.get('pretrained') and model.get('extra_mlps'))
            check(fits, 'extra_mlps', model.get('extra_mlps'), '0 beside pretrained weights')
            check_model(config)
        except Exception as error:  # whatever a library makes of a value
            raise ValueError(self._said(error)) from error

    def _said(self, error: Exception) -> str:
        said = as_typed(one_line(error), parse_options(self.options))
        return f'comparison {self.comparison.name}: row {self.row}: {said}'

    def train(self, folder: Path, *more: str, processes: int = 1) -> list[str]:
        """Command line of its training, whose processes share what is a batch of one."""
        loader, batch = self.resolved.get('train_dataloader') or {}, []
        images = loader.get('batch_size', 1)
        allowed = f'a divisor of {images}, the images of a batch of {self.name}'
        check(images % processes == 0, '--processes-per-run', processes, allowed)
        if processes > 1 and self.resolved.get('total_batch_size') is None:
            batch = [f'train_dataloader.batch_size={images // processes}']
        given = ['--work-dir', str(folder), '--cfg-options', *self.options, *batch, *more]
        return self._command('train', processes, given)

    def test(self, folder: Path, processes: int = 1) -> list[str]:
        """Command line of the test of its last checkpoint, once that is there."""
        out = ['--work-dir', str(folder / 'test'), '--out', str(folder / 'test.json')]
        given = [str(last_checkpoint(folder)), *out, '--cfg-options', *self.options]
        return self._command('test', processes, given)

    def _command(self, tool: str, processes: int, given: list[str]) -> list[str]:
        command = [str(FOLDER / f'tools/{tool}.py'), self.comparison.config, *given]
        if processes == 1:
            return [sys.executable, *command]
        started = ['-c', _TORCHRUN, '--standalone', f'--nproc_per_node={processes}']
        # in front of the options, which end with the command
        return [sys.executable, *started, *command[:2], '--launcher=pytorch', *command[2:]]


def as_json(config: Config) -> dict[str, Any]:
    """A config as plain values."""
    return json.loads(json.dumps(config.to_dict(), default=str))


VERSION = 2
# What a run leaves and a row keeps, as it is.
_RECORDED = (
    'seed', 'commit', 'versions', 'device', 'hardware', 'processes', 'threads', 'minutes',
    'cpu_minutes', 'iterations', 'params', 'active_params', 'macs', 'data', 'starting_weights',
    'first_losses', 'training_loss', 'correct',
)  # fmt: skip
# What tables, figures and commands use of every row. The first rows have neither `data` nor
# `correct`, a bit per test image; `checked`, `shifts`, `shift_routing` and `routing` come later.
FIELDS: dict[str, Any] = {
    **dict.fromkeys(('row', 'recipe', 'budget', 'metric', 'stage'), str),
    **dict.fromkeys(('commit', 'device', 'hardware'), str),
    **dict.fromkeys(('seed', 'iterations', 'images', 'params', 'active_params', 'macs'), int),
    **dict.fromkeys(('minutes', 'cpu_minutes'), float),
    **{'test': dict[str, float], 'first_losses': list[float]},
    **dict.fromkeys(('training_loss', 'held_out'), list[tuple[int, float]]),
}
_LATER: dict[str, Any] = {
    **{'correct': str, 'routing': dict, 'starting_weights': dict[str, str]},
    'data': dict[str, dict[str, int | str | None]],
    'checked': dict[str, bool | float | str | None],
    **dict.fromkeys(('shifts', 'shift_routing'), dict[str, dict[str, float]]),
}
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
                if reason := damage(content, run) or (None if refuted else refutation(content)):
                    raise ValueError(reason)
                dict(_inputs(run, content))  # which may be of another config
                results.usable[run.place] = content
            except ValueError as error:
                results.left_out[path.name] = str(error)
            except (AttributeError, KeyError, TypeError) as error:
                results.left_out[path.name] = f'it is damaged: {error!r}'
        return results

    def collect(self, run: Run) -> None:
        """Writes the file of a run from its work dir, unless there is one that counts."""
        folder, comparison = run.folder, run.comparison
        metric, record = comparison.metric, load(folder / 'run.json')
        held_out, done = record.get('held_out') or [], record.get('iterations')
        step, test = held_out[-1] if held_out else (0, {})
        if comparison.tested:
            test = load(folder / 'test.json')
            if (file := folder / 'test/data.json').is_file():
                record['data'] = {**record.get('data', {}), **load(file)}
            if (file := folder / 'test/correct.json').is_file():
                record |= load(file)
        else:
            allowed = f"a validation after {done} iterations, its end, which stage='dev' needs"
            check(step == done, f'{run.name}: held_out', step, allowed)
        names = ', '.join(name for name in test if '.' not in name)
        check(metric in test, 'metric', metric, f'a result of {run.name}: {names}')
        content = {
            'version': VERSION,
            'row': run.row,
            'recipe': run.recipe,
            # of all rows: without a row's options
            'budget': recipe_of(as_json(comparison.merged(comparison.options))),
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

    def add(self, run: Run, **measured: dict[str, Any]) -> None:
        """Adds to a row what was found of it later, beside what it has by now."""
        path = self.path(run)
        with self._alone():
            content = load(path)
            for field, more in measured.items():
                content[field] = content.get(field, {}) | more
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

    def set_aside(self, run: Run) -> str | None:
        """Renames the work dir of a refuted row, its lock and the row with it; says where to."""
        path, folder = self.path(run), run.folder
        with suppress(ValueError):  # there is no row, or none that can be read
            if reason := refutation(load(path)):
                names = (folder.with_name(f'{folder.name}-stale{n}') for n in itertools.count(1))
                there = folder.rename(next(name for name in names if not name.exists()))
                write_atomically(there / 'row.json', path.read_bytes())
                path.unlink()
                return f'{reason}; what it left is in {there}'
        return None


def noise_of(folder: Path, usable: Usable) -> tuple[float, int]:
    """The noise of a comparison's rows, and of others of its budget and data that agree.

    Args:
        folder: Of the comparison's rows, beside those of others.
        usable: Its rows.
    """
    found: dict[Path, Any] = defaultdict(lambda: defaultdict(dict))
    budgets = {(content['budget'], content['metric']) for content in usable.values()}
    data = set(map(_trained_on, usable.values())) | {None}  # which the first rows do not say
    for path in folder.parent.glob('*/*-seed*.json'):
        with suppress(AttributeError, KeyError, TypeError, ValueError):  # of a damaged one
            content = load(path)
            if _mistyped(content):
                continue
            score = content['test'][content['metric']]
            same = (content['budget'], content['metric']) in budgets and math.isfinite(score)
            if same and _trained_on(content) in data and refutation(content) is None:
                found[path.parent][content['row']][content['seed']] = score
    own = found.pop(folder, {})
    return pooled_noise(own, (found[other] for other in sorted(found)))


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
    except (OSError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f'{path} is damaged: {error}') from error


def damage(content: Mapping[str, Any], run: Run) -> str | None:
    """Says why a row cannot be read, or is none of today's."""
    if content.get('version') != VERSION:
        return f'it is of version {content.get("version")}, this program reads version {VERSION}'
    if mistyped := _mistyped(content):
        return f'it is damaged: {mistyped} are missing or of another type'
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


def _mistyped(content: Mapping[str, Any]) -> list[str]:
    types = FIELDS | {name: hint for name, hint in _LATER.items() if name in content}
    return [name for name, hint in types.items() if not has_type(content.get(name), hint)]


def refutation(content: Mapping[str, Any]) -> str | None:
    """Says what a check has found against a row."""
    checked = content.get('checked')
    return f'stale: {checked["finding"]}' if checked and not checked['equal'] else None


def images_seen(config: Mapping[str, Any], record: Mapping[str, Any]) -> int:
    """How many images a run has been trained on, those that it saw again counted again."""
    loader = config.get('train_dataloader') or {}
    batch, done = loader.get('batch_size', 1), record.get('iterations', 0)  # as torch has it
    samples = record.get('data', {}).get('train', {}).get('samples')
    if not samples or 'max_epochs' not in config.get('train_cfg', {}) or loader.get('drop_last'):
        return batch * done
    epochs, rest = divmod(done, -(-samples // batch))  # the last batch of each is smaller
    return samples * epochs + batch * rest


def has_checkpoint(run: Run, content: Mapping[str, Any]) -> bool:
    """Whether the checkpoint of a row is here, and not that of another training of its name."""
    record, pointer = run.folder / 'run.json', run.folder / POINTER
    there = record.is_file() and pointer.is_file() and last_checkpoint(run.folder).is_file()
    return there and load(record).get('training_loss') == content['training_loss']


def leave_out_other_inputs(results: Results, runs: Sequence[Run]) -> None:
    """Leaves out rows whose data or starting weights differ from those of most others.

    Their recipes are equal all the same. Of two halves none stays.
    """
    usable = results.usable
    given = [(run, dict(_inputs(run, usable[run.place]))) for run in runs if run.place in usable]
    seen: dict[Any, Counter[str]] = defaultdict(Counter)
    for _, inputs in given:
        for place, what in inputs.items():
            seen[place][what] += 1
    for run, inputs in given:
        for place, what in inputs.items():
            others = (seen[place] - Counter({what: len(given)})).most_common(1)
            if others and seen[place][what] <= others[0][1]:
                mixed = f'its {place[0]} are {what}, those of {others[0][1]} others {others[0][0]}'
                results.left_out[f'{run.name}.json'] = f'mixed: {mixed}'
                del usable[run.place]
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
