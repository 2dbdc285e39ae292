"""Whether a row may stand beside today's."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

from vqmoe_vision.engine.options import flat

from .runs import Run

VERSION = 1
Check = dict[str, Any]  # what `check` has found of a run


def _is_number(value: Any) -> bool:
    # JSON has whole numbers that are too large to compute with
    few = isinstance(value, int) and abs(value) <= sys.float_info.max
    return isinstance(value, float) or (few and not isinstance(value, bool))


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_time(value: Any) -> bool:
    return _is_finite(value) and value >= 0


def _is_count(value: Any) -> bool:
    return _is_finite(value) and value > 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_curve(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(point, list) and len(point) == 2 and all(map(_is_number, point))
        for point in value
    )


def _are_losses(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _holds(inside: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """An object with such values."""
    return lambda value: isinstance(value, dict) and all(map(inside, value.values()))


def _is_data(value: Any) -> bool:
    return isinstance(value, dict) and _is_number(value.get('samples')) and 'digest' in value


_IS_OBJECT = _holds(lambda _: True)
_NUMBERS_BY_NAME = _holds(_holds(_is_number))


def _is_layer(value: Any) -> bool:
    ranks = {'effective_rank_before', 'effective_rank_after'}
    return _holds(_is_number)(value) and ranks <= value.keys()


def _knows_chance(layers: dict[str, Any], changes: dict[str, float]) -> bool:
    """Of all whose experts may change; slots take every token, and have none that could."""
    return all(
        f'{decided.removeprefix(f"{name}.")}/changed_by_chance' in numbers
        for name, numbers in layers.items()
        for decided in changes
        if decided.startswith(f'{name}.')
    )


def _is_way(value: Any) -> bool:
    return isinstance(value, dict) and _are_losses(value.get('distance'))


def _is_routing(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return value == {}  # of a dense model
    return (
        type(value.get('images')) is int
        and _holds(_is_layer)(value.get('layers'))
        and _NUMBERS_BY_NAME(value.get('shifts'))
        and 'flip' in value['shifts']
        and isinstance(value.get('changes'), list)
        and all(map(_holds(_is_number), value['changes']))
        and _holds(_is_way)(value.get('convergence'))
        and all(
            _knows_chance(value['layers'], changes)
            for changes in (*value['shifts'].values(), *value['changes'])
        )
    )


# What tables, figures and commands use of a row, and whether a value can be that.
FIELDS: dict[str, Callable[[Any], bool]] = {
    'config': lambda value: _IS_OBJECT(value) and _IS_OBJECT(value.get('model')),
    'options': lambda value: isinstance(value, list) and all(map(_is_text, value)),
    'command': _is_text,
    'row': _is_text,
    'seed': lambda value: type(value) is int,
    'metric': _is_text,
    'test': _holds(_is_number),
    'commit': _is_text,
    'device': _is_text,
    'hardware': _is_text,
    'minutes': _is_time,
    'cpu_minutes': _is_time,
    'iterations': _is_count,
    'params': _is_count,
    'active_params': _is_count,
    'macs': _is_count,
    'first_losses': _are_losses,
    'training_loss': _is_curve,
    'held_out': _is_curve,
}
# What some rows have beside these: of a measurement, or since a later version.
_LATER: dict[str, Callable[[Any], bool]] = {
    'moe_options': _IS_OBJECT,
    'data': _holds(_is_data),
    'starting_weights': _holds(_is_text),
    'routing': _is_routing,
    'shifts': _NUMBERS_BY_NAME,
    'shift_routing': _NUMBERS_BY_NAME,
    'stage': _is_text,
}
_OF_CHECK: dict[str, Callable[[Any], bool]] = {
    'equal': lambda value: isinstance(value, bool),
    'finding': _is_text,
    'losses': _are_losses,
    'commit': lambda value: value is None or _is_text(value),
}


def damage(content: dict[str, Any], run: Run) -> str | None:
    """Says why a row cannot be read."""
    if content.get('version') != VERSION:
        return f'it is of version {content.get("version")}, this program reads version {VERSION}'
    if reason := _wrong(content, FIELDS, _LATER):
        return f'it is damaged: {reason}'
    if (content['row'], content['seed']) != (run.row, run.seed):
        return f'it is damaged: it holds {content["row"]}, seed {content["seed"]}'
    if content['metric'] != (metric := run.comparison.metric):
        return f'its curves are of {content["metric"]!r}, not of {metric!r}: collect it again'
    # before there were two, all were tested
    if (then := content.get('stage', 'test')) != (stage := run.comparison.stage):
        return f'its numbers are of stage={then!r}, not of {stage!r}'
    named = named_weights(content['config'])
    if unknown := sorted(content.get('starting_weights', {}).keys() - named.keys()):
        return f'it is damaged: starting_weights of {unknown}, which its config does not name'
    if not _is_finite(content['test'].get(metric)):
        return f'it is damaged: test has no number for {metric!r}'
    return None


def named_weights(config: dict[str, Any]) -> dict[str, str]:
    """What a run may have started from, by the options that name it."""
    named = {**flat(config['model'], 'model'), 'load_from': config.get('load_from')}
    return {option: path for option, path in named.items() if _is_text(path)}


def damage_of_check(check: Any) -> str | None:
    """Says why what `check` has left of a run cannot be read."""
    return _wrong(check, _OF_CHECK, _LATER) if isinstance(check, dict) else 'it is no object'


def _wrong(
    content: dict[str, Any],
    needed: dict[str, Callable[[Any], bool]],
    later: dict[str, Callable[[Any], bool]],
) -> str | None:
    if missing := sorted(needed.keys() - content.keys()):
        return f'{missing} are missing'
    for name, possible in {**needed, **later}.items():
        if name in content and not possible(content[name]):
            return f'{name}={json.dumps(content[name])[:60]} is not possible'
    return None


def other_config(content: dict[str, Any], run: Run) -> str | None:
    """Says where the config of a row differs from today's."""
    then, now = run.counting(content['config']), run.counting(run.resolved)
    # how processes talk; a work dir has it in its name, by which others start from its checkpoint
    names = {name for name in then | now if not name.startswith('env_cfg.dist_cfg')}
    return _difference(then, now, names)


def other_options(record: dict[str, Any], run: Run, check: Check | None) -> str | None:
    """Says where the options of MoE layers differ from today's, defaults and presets included."""
    options = record.get('moe_options', (check or {}).get('moe_options'))
    if not options:  # a dense model has none
        return None
    then, now = flat(options, 'moe_options'), flat(run.moe_options, 'moe_options')
    # what is no option any more is of the row's day
    return _difference(then, now, then.keys() & now.keys())


def refutation(check: Check | None) -> str | None:
    """Says what a check has found against a row."""
    return None if check is None or check['equal'] else f'stale: {check["finding"]}'


def _difference(then: dict[str, Any], now: dict[str, Any], names: set[str]) -> str | None:
    changed = sorted(name for name in names if then.get(name) != now.get(name))
    if not changed:
        return None
    name = changed[0]
    others = f' and {len(changed) - 1} more' if len(changed) > 1 else ''
    return f'stale: {name}={then.get(name)!r}, today {now.get(name)!r}{others}'
