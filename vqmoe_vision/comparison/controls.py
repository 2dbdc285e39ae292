"""Which rows a control is there for: those that learn to route and begin as it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vqmoe_vision.models.create import STARTS, options_in_full
from vqmoe_vision.moe import METHODS

from .runs import Run
from .spec import Comparison


def challengers(comparison: Comparison, control: str) -> list[str]:
    """The rows that have to beat a control: all that learn to route and begin as it does."""
    started = is_started(comparison, control)
    models = {row: _model(comparison, row) for row in comparison.rows}
    return [
        row
        for row, model in models.items()
        if row not in comparison.controls
        and _learns_routing(model)
        and _is_started(model) == started
    ]


def is_started(comparison: Comparison, row: str) -> bool:
    """Whether a row begins with trained weights, of another run or of anywhere else."""
    return _is_started(_model(comparison, row))


def _model(comparison: Comparison, row: str) -> dict[str, Any]:
    model = Run(comparison, row, comparison.seeds[0], Path()).resolved['model']
    return model.get('backbone', model)


def _is_started(model: dict[str, Any]) -> bool:
    return any(model.get(start) for start in STARTS)


def _learns_routing(model: dict[str, Any]) -> bool:
    options = options_in_full(model)
    if not options:  # dense
        return False
    config = METHODS[options['method']].config
    names = config.option_names()
    own = {name: value for name, value in options.items() if name in names}
    try:
        return config.from_options(**own).learns_routing
    except ValueError:  # as `options_in_full`
        return True
