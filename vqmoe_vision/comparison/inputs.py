"""Rows that were given other data or other weights than the others, although recipes are equal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vqmoe_vision.engine.config import flat

from .runs import Run
from .store import Results

SPLITS = ('train', 'val', 'test')
Place = tuple[str, str]  # what was given to a run, and how its config names that


def without_other_inputs(results: Results, runs: Sequence[Run]) -> Results:
    """Leaves out rows whose data or starting weights differ from those of most others."""
    named = {(run.row, run.seed): run for run in runs}
    inputs = {key: dict(_inputs(named[key], of)) for key, of in results.usable.items()}
    seen: dict[Place, Counter[str]] = {}
    for of_run in inputs.values():
        for place, given in of_run.items():
            seen.setdefault(place, Counter())[given] += 1
    usable, left_out = {}, dict(results.left_out)
    for key, content in results.usable.items():
        found = (_mixed(place[0], given, seen[place]) for place, given in inputs[key].items())
        if mixed := next(filter(None, found), None):
            left_out[f'{named[key].name}.json'] = mixed
        else:
            usable[key] = content
    return Results(usable, left_out, results.missing)


def _mixed(kind: str, given: str, seen: Counter[str]) -> str | None:
    """What to say of a row, unless most that name the same were given that; of two halves none."""
    others = {what: rows for what, rows in seen.items() if what != given}
    usual = max(others, key=others.__getitem__, default=None)
    if usual is None or seen[given] > others[usual]:
        return None
    return f'mixed: its {kind} are {given}, those of {others[usual]} others {usual}'


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
