"""Rows that count for two comparisons: for one, and for the one that its rows start from."""

from __future__ import annotations

from .results import Results
from .runs import Run
from .store import Store


def completed(results: Results, other: Store) -> Results:
    """Results with what another comparison has trained in the same way."""
    more = other.read(results.missing)
    waiting = {f'{run.name}.json': run for run in results.missing}
    refused = {
        name: f'in {other.folder}: {reason}'
        for name, reason in more.left_out.items()
        if name in waiting and _is_shared(waiting[name])
    }
    of_no_run = {
        f'{other.folder / name}': reason
        for name, reason in more.left_out.items()
        if name not in waiting
    }
    missing = [
        run
        for name, run in waiting.items()
        if name not in refused and (run.row, run.seed) not in more.usable
    ]
    return Results(
        {**results.usable, **more.usable},
        {**results.left_out, **refused, **of_no_run},
        missing,
        {**results.checked, **more.checked},
    )


def _is_shared(run: Run) -> bool:
    start = run.comparison.start
    if start is None or (run.row, run.seed) not in start.comparison.selected():
        return False
    return counts_for(Run(start.comparison, run.row, run.seed, run.root), run)


def counts_for(source: Run, run: Run) -> bool:
    """Whether the row of one is that of the other: the folder's name holds all that decides."""
    start = run.comparison.start
    return (
        start is not None
        and start.comparison.name == source.comparison.name
        and source.comparison.metric == run.comparison.metric
        and source.comparison.stage == run.comparison.stage
        and source.folder.name == run.folder.name
    )
