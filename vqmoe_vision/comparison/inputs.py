"""Rows that were given other data or other weights than the others, although configs are equal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .results import Results
from .spec import STARTS, Comparison
from .validity import named_weights

SPLITS = ('train', 'val', 'test')
# What was given to a run, and how its config names that.
Place = tuple[str, str]
_WEIGHTS = 'starting weights'
_REMEDY = 'to run it again, remove this file and its work dir'
# those of most may be gone, and then this row is the one that can be repeated
_REMEDIES = {
    _WEIGHTS: 'remove the files and work dirs of those that began with what is not there any more'
}


def without_other_inputs(results: Results) -> Results:
    """Leaves out rows whose data or starting weights differ from those of most others."""
    inputs = {run: _inputs(content) for run, content in results.usable.items()}
    seen: dict[Place, Counter[str]] = {}
    for of_run in inputs.values():
        for place, given in of_run.items():
            seen.setdefault(place, Counter())[given] += 1
    usable, left_out = {}, dict(results.left_out)
    for (row, seed), content in results.usable.items():
        of_run = inputs[row, seed]
        found = (_mixed(place[0], given, seen[place]) for place, given in of_run.items())
        mixed = list(filter(None, found))
        if mixed:
            left_out[f'{row}-seed{seed}.json'] = mixed[0]
        else:
            usable[row, seed] = content
    checked = {key: commit for key, commit in results.checked.items() if key in usable}
    return replace(results, usable=usable, left_out=left_out, checked=checked)


def _mixed(kind: str, given: str, seen: Counter[str]) -> str | None:
    """What to say of a row, unless most that name the same were given that; of two halves none."""
    others = {what: rows for what, rows in seen.items() if what != given}
    usual = max(others, key=others.__getitem__, default=None)
    if usual is None or seen[given] > others[usual]:
        return None
    those = f'those of {others[usual]} others {usual}'
    return f'mixed: its {kind} are {given}, {those}; {_REMEDIES.get(kind, _REMEDY)}'


def said_of_inputs(comparison: Comparison, results: Results) -> list[str]:
    """Which data the rows of a table have seen, and of which it is known what they started from."""
    return [_said_of_data(results), *_said_of_starts(comparison, results)]


def _said_of_data(results: Results) -> str:
    seen: dict[str, list[str]] = {split: [] for split in SPLITS}
    unknown = len(results.usable)
    for content in results.usable.values():
        unknown -= 'data' in content
        for split, _, data in _data(content):
            if data not in seen[split]:
                seen[split].append(data)
    parts = [f'{split} {" and ".join(found)}' for split, found in seen.items() if found]
    if not parts:
        return 'Which data the runs have seen is not recorded: they are from before that was kept.'
    line = f'Data: {"; ".join(parts)}.'
    return line + (f' Not recorded of {unknown} of {len(results.usable)} runs.' if unknown else '')


def _said_of_starts(comparison: Comparison, results: Results) -> list[str]:
    started = [
        bool(content.get('starting_weights'))
        for (row, _), content in results.usable.items()
        if STARTS.search(' '.join(comparison.rows[row]))
    ]
    if not started:
        return []
    known, total = sum(started), len(started)
    same = '; where two name the same run, those were the same weights' if known > 1 else ''
    return [f'Which weights it started from is recorded of {known} of {total} started runs{same}.']


def _inputs(content: dict[str, Any]) -> dict[Place, str]:
    data = {(f'{split} data', config): what for split, config, what in _data(content)}
    return data | dict(_weights(content))


def _data(content: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Split, how its config describes the data, and what they were."""
    for split, data in content.get('data', {}).items():
        loader = content['config'].get(f'{split}_dataloader') or {}
        config = {n: v for n, v in (loader.get('dataset') or {}).items() if n != 'transform'}
        what = f'{data["samples"]:,} samples ({data["digest"]})'
        yield split, json.dumps(config, sort_keys=True), what


def _weights(content: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    named = named_weights(content['config'])
    for option, digest in content.get('starting_weights', {}).items():
        # by the comparison, the row and the seed that its folders are named by
        file = '/'.join(Path(named[option]).parts[-3:])
        yield (_WEIGHTS, file), f'{file} ({digest})'
