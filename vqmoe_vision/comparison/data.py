"""Rows that have seen other data than the others, although their configs are equal."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from typing import Any

from .results import Results

SPLITS = ('train', 'val', 'test')
Place = tuple[str, str]  # the split, and how its config describes the data


def without_other_data(results: Results) -> Results:
    """Leaves out rows whose data differ from those of most others with the same config of data.

    Rows from before this was recorded say nothing of it, and count.

    Args:
        results: Of a comparison.
    """
    seen: dict[Place, Counter[str]] = {}
    for content in results.usable.values():
        for place, data in _data_of(content).items():
            seen.setdefault(place, Counter())[data] += 1
    most = {place: counter.most_common(1)[0] for place, counter in seen.items()}
    usable, left_out = {}, dict(results.left_out)
    for (row, seed), content in results.usable.items():
        other = [p for p, data in _data_of(content).items() if data != most[p][0]]
        if not other:
            usable[row, seed] = content
            continue
        data, (usual, rows) = _data_of(content)[other[0]], most[other[0]]
        left_out[f'{row}-seed{seed}.json'] = (
            f'mixed: its {other[0][0]} data are {data}, those of {rows} others {usual}; '
            'to run it again, remove this file and its work dir'
        )
    checked = {key: commit for key, commit in results.checked.items() if key in usable}
    return replace(results, usable=usable, left_out=left_out, checked=checked)


def said_of_data(results: Results) -> str:
    """Which data the rows of a table have seen.

    Args:
        results: As `without_other_data` leaves them.
    """
    seen: dict[str, list[str]] = {split: [] for split in SPLITS}
    unknown = len(results.usable)
    for content in results.usable.values():
        unknown -= 'data' in content
        for (split, _), data in _data_of(content).items():
            if data not in seen[split]:
                seen[split].append(data)
    parts = [f'{split} {" and ".join(found)}' for split, found in seen.items() if found]
    if not parts:
        return 'Which data the runs have seen is not recorded: they are from before that was kept.'
    line = f'Data: {"; ".join(parts)}.'
    return line + (f' Not recorded of {unknown} of {len(results.usable)} runs.' if unknown else '')


def _data_of(content: dict[str, Any]) -> dict[Place, str]:
    found = {}
    for split, data in content.get('data', {}).items():
        loader = content['config'].get(f'{split}_dataloader') or {}
        config = {n: v for n, v in (loader.get('dataset') or {}).items() if n != 'transform'}
        place = split, json.dumps(config, sort_keys=True)
        found[place] = f'{data["samples"]:,} samples ({data["digest"]})'
    return found
