"""Rows that were given other data or other weights than the others, although configs are equal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .results import Results
from .validity import named_weights

SPLITS = ('train', 'val', 'test')
Place = tuple[str, str]  # what was given to a run, and how its config names that


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
    return f'mixed: its {kind} are {given}, those of {others[usual]} others {usual}'


def _inputs(content: dict[str, Any]) -> dict[Place, str]:
    data = {(f'{split} data', config): what for split, config, what in data_of(content)}
    return data | dict(_weights(content))


def data_of(content: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
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
        yield ('starting weights', file), f'{file} ({digest})'
