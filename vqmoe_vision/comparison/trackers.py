"""Rows as runs of a tracker."""

from collections import defaultdict
from contextlib import redirect_stdout, suppress
from io import StringIO
from typing import Any

from .spec import Comparison
from .store import Usable


def to_trackio(comparison: Comparison, usable: Usable) -> None:
    """Writes a run of trackio per row, in the place of those of its name."""
    import trackio

    named = {f'{row}-seed{seed}': content for (row, seed), content in usable.items()}
    with suppress(ValueError):  # of a project that is not there yet
        for run in trackio.Api().runs(comparison.name):
            if run.name in named:
                run.delete()
    for name, content in named.items():
        numbers: dict[int, dict[str, Any]] = defaultdict(dict)
        for step, loss in content['training_loss']:
            numbers[step]['train/loss'] = loss
        for step, score in content['held_out']:
            numbers[step][f'val/{comparison.metric}'] = score
        for test, value in content['test'].items():
            numbers[content['iterations']][f'test/{test}'] = value
        said = {n: value for n, value in content.items() if isinstance(value, str | int | float)}
        given = {'project': comparison.name, 'name': name, 'group': content['row'], 'config': said}
        with redirect_stdout(StringIO()):  # lines for each run
            trackio.init(**given, embed=False, auto_log_cpu=False, auto_log_gpu=False)
            for step in sorted(numbers):
                trackio.log(numbers[step], step=step)
            trackio.finish()
