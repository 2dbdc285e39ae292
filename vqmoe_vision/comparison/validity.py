"""Whether a row may stand beside today's."""

from __future__ import annotations

import math
from typing import Any

from vqmoe_vision.engine.config import flat

from .runs import Run

VERSION = 1
Check = dict[str, Any]  # what `check` has found of a run
# What tables, figures and commands use of every row. Some have more: `data`, `stage`, `moe_options`
# and `starting_weights`, which the first rows lack, and `routing`, `shifts` and `shift_routing`.
FIELDS = (
    'config', 'options', 'command', 'row', 'seed', 'metric', 'test', 'commit', 'device', 'hardware',
    'minutes', 'cpu_minutes', 'iterations', 'params', 'active_params', 'macs', 'first_losses',
    'training_loss', 'held_out',
)  # fmt: skip


def damage(content: dict[str, Any], run: Run) -> str | None:
    """Says why a row cannot be read."""
    if content.get('version') != VERSION:
        return f'it is of version {content.get("version")}, this program reads version {VERSION}'
    if missing := [name for name in FIELDS if content.get(name) is None]:
        return f'it is damaged: {missing} are missing'
    if (content['row'], content['seed']) != (run.row, run.seed):
        return f'it is damaged: it holds {content["row"]}, seed {content["seed"]}'
    if content['metric'] != (metric := run.comparison.metric):
        return f'its curves are of {content["metric"]!r}, not of {metric!r}: collect it again'
    # the first rows, which do not say it, were all tested
    if (then := content.get('stage', 'test')) != (stage := run.comparison.stage):
        return f'its numbers are of stage={then!r}, not of {stage!r}'
    score = content['test'].get(metric)
    if score is None or not math.isfinite(score):
        return f'it is damaged: test has no number for {metric!r}'
    return None


def named_weights(config: dict[str, Any]) -> dict[str, str]:
    """What a run may have started from, by the options that name it."""
    named = {**flat(config['model'], 'model'), 'load_from': config.get('load_from')}
    return {option: path for option, path in named.items() if isinstance(path, str)}


def other_config(content: dict[str, Any], run: Run) -> str | None:
    """Says where the config of a row differs from today's."""
    then, now = run.counting(content['config']), run.counting(run.resolved)
    # how processes talk; a work dir has it in its name, by which others start from its checkpoint
    names = {name for name in then | now if not name.startswith('env_cfg.dist_cfg')}
    return _difference(then, now, names)


def other_options(record: dict[str, Any], run: Run, check: Check | None) -> str | None:
    """Says where the options of MoE layers differ from today's, defaults and presets included."""
    # a row that does not hold them has those with which a check found it to be right
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
