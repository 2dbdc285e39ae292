"""The options of a config's MoE layers in full, with what a config leaves to code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ..moe.methods import METHODS
from .hosts import method_of
from .upcycle import read_upcycling

# Fields of a model that give it weights to start from, of which experts may be made.
STARTS = ('checkpoint', 'checkpoint_path', 'pretrained', 'upcycle')


def options_in_full(model: Mapping[str, Any]) -> dict[str, Any]:
    """What the MoE layers of a config's model would be built with today."""
    moe, name = model.get('moe') or {}, model.get('model_name')
    own = method_of(name) if isinstance(name, str) else None
    # a model of this package takes the options of its method beside its own too
    given = {**model, **moe} if own is not None else moe
    method = own if own is not None else moe.get('method')
    if method not in METHODS:
        return {}
    known = METHODS[method].config.option_names()
    options: dict[str, Any] = {n: v for n, v in given.items() if n in known}
    try:
        config = METHODS[method].config.from_options(**options)
        options = {n: v for n, v in asdict(config).items() if n not in config.unused()}
    except ValueError:  # a finished comparison may name what is possible no more
        pass
    if any(model.get(start) for start in STARTS):
        options['upcycling'] = asdict(read_upcycling(model.get('upcycling')))
    return {'method': method, **options}
