"""Which numbers an evaluator can report, known before it has seen anything."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import singledispatch
from typing import Any

from mmengine.registry import METRICS


@singledispatch
def names_of(metric: Any) -> Collection[str] | None:
    """Names of what a metric can report, without its prefix; None if that is not known.

    A task registers what its metrics say.
    """
    return None


def reported(evaluator: Any) -> set[str] | None:
    """Names of what an evaluator can report; None if one of its metrics is of unknown kind.

    Args:
        evaluator: As in a config: a metric, several, or a dictionary with `metrics`.
    """
    if isinstance(evaluator, Mapping):
        evaluator = evaluator.get('metrics', evaluator)
    found: set[str] = set()
    for each in evaluator if isinstance(evaluator, list | tuple) else [evaluator]:
        metric = METRICS.build(each)
        # a class derived of a known one may report more
        names = names_of(metric) if type(metric) in names_of.registry else None
        if names is None:
            return None
        found |= {f'{metric.prefix}/{name}' if metric.prefix else name for name in names}
    return found
