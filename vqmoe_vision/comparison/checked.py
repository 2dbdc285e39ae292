"""What a table says of the checks of its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from .results import Results
from .spec import Comparison


def said_of_checks(comparison: Comparison, results: Results) -> str:
    """How many rows have been checked and where, and which have not."""
    total, right = len(results.usable), results.checked
    open_ = [key for key in results.usable if key not in right]
    at = ', '.join(f'{commit} ({n})' for commit, n in sorted(Counter(right.values()).items()))
    found = f'The first losses of {len(right)} of {total} runs came out again when checked'
    line = f'{found}, at {"commits" if len(set(right.values())) > 1 else "commit"} {at}.'
    if not right:
        line = f'None of the {total} runs has been checked: `tools/compare.py check` does so.'
    elif open_:
        line += f' Not checked: {_by_row(comparison, open_)}.'
    return line


def _by_row(comparison: Comparison, keys: Iterable[tuple[str, int]]) -> str:
    seeds: dict[str, list[int]] = {}
    for row, seed in keys:
        seeds.setdefault(row, []).append(seed)
    rows = filter(seeds.__contains__, comparison.rows)
    return ', '.join(f'{row} ({", ".join(map(str, sorted(seeds[row])))})' for row in rows)
