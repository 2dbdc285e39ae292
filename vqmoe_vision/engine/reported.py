"""Which numbers an evaluator can report, known before it has seen anything."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import singledispatch
from typing import Any

from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.registry import METRICS
from mmengine.runner import Runner, ValLoop

from vqmoe_vision.moe.collect import moe_layers
from vqmoe_vision.moe.config import check

from .model import MoeTrainingMixin, unwrapped

# Whose hooks are known: no other than MoeStateHook adds to the metrics of a validation.
_KNOWN = ('mmengine', 'mmseg', 'vqmoe_vision')


@singledispatch
def names_of(metric: Any) -> Collection[str] | None:
    """Names of what a metric can report, without its prefix; None if that is not known."""
    return None


def reported(evaluator: Any) -> set[str] | None:
    """Names of what an evaluator can report; None if one of its metrics is of unknown kind."""
    if isinstance(evaluator, Mapping):
        evaluator = evaluator.get('metrics', evaluator)
    found: set[str] = set()
    for each in evaluator if isinstance(evaluator, list | tuple) else [evaluator]:
        metric = METRICS.build(each) if isinstance(each, Mapping) else each
        # a class derived of a known one may report more
        names = names_of(metric) if type(metric) in names_of.registry else None
        if names is None:
            return None
        found |= {f'{metric.prefix}/{name}' if metric.prefix else name for name in names}
    return found


def check_reported(runner: Runner, field: str, metric: str) -> None:
    """Refuses a metric that the first validation would turn out not to have."""
    loop: Any = runner.val_loop
    if type(loop) is not ValLoop:
        return
    evaluator = loop.evaluator
    if type(evaluator) is not Evaluator or any(map(_may_add, runner.hooks)):
        return
    model = unwrapped(runner)
    layers = moe_layers(model.routed_model) if isinstance(model, MoeTrainingMixin) else {}
    names = reported(evaluator.metrics)
    if names is None or metric.rpartition('/')[0] in layers:
        return
    allowed = f'what val_evaluator reports, which is {", ".join(sorted(names)) or "nothing"}'
    check(metric in names, field, metric, allowed)


def _may_add(hook: Hook) -> bool:
    """Whether a hook may add to the metrics of a validation, as far as is known."""
    return type(hook).after_val_epoch.__module__.split('.')[0] not in _KNOWN
