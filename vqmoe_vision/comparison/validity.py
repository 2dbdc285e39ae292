"""Whether a row may stand beside today's."""

from __future__ import annotations

from typing import Any

from .runs import Run, flat

VERSION = 1
Check = dict[str, Any]  # what `check` has found of a run
_NEEDED = {
    'config',
    'options',
    'command',
    'row',
    'seed',
    'metric',
    'test',
    'first_losses',
    'held_out',
}


def damage(content: dict[str, Any], run: Run) -> str | None:
    """Says why a row cannot be read.

    Args:
        content: Of its file.
        run: Whose it should be.
    """
    if content.get('version') != VERSION:
        return f'it is of version {content.get("version")}, this program reads version {VERSION}'
    if missing := sorted(_NEEDED - content.keys()):
        return f'it is damaged: {missing} are missing'
    if (content['row'], content['seed']) != (run.row, run.seed):
        return f'it is damaged: it holds {content["row"]}, seed {content["seed"]}'
    if content['metric'] != (metric := run.comparison.metric):
        return f'its curves are of {content["metric"]!r}, not of {metric!r}: collect it again'
    return None


def other_config(content: dict[str, Any], run: Run) -> str | None:
    """Says where the config of a row differs from today's.

    Args:
        content: Of its file.
        run: As it would be today.
    """
    then, now = run.counting(content['config']), run.counting(run.resolved)
    # how processes talk; a work dir has it in its name, by which others start from its checkpoint
    names = {name for name in then | now if not name.startswith('env_cfg.dist_cfg')}
    return _difference(then, now, names)


def other_options(record: dict[str, Any], run: Run, check: Check | None) -> str | None:
    """Says where the options of MoE layers differ from today's, defaults and presets included.

    A row from before they were kept has those with which a check found it to be right. Without one
    nothing can be said. An option that did not exist then is not compared: no row could say it.

    Args:
        record: A row, or what a run left.
        run: As it would be today.
        check: What a check has found of this very training, if there was one.
    """
    options = record.get('moe_options', (check or {}).get('moe_options'))
    if not options:  # a dense model has none
        return None
    then, now = flat(options, 'moe_options'), flat(run.moe_options, 'moe_options')
    return _difference(then, now, set(then))


def refutation(check: Check | None) -> str | None:
    """Says what a check has found against a row.

    Args:
        check: Of this very training, if there was one.
    """
    return None if check is None or check['equal'] else f'stale: {check["finding"]}'


def _difference(then: dict[str, Any], now: dict[str, Any], names: set[str]) -> str | None:
    changed = sorted(name for name in names if then.get(name) != now.get(name))
    if not changed:
        return None
    name = changed[0]
    others = f' and {len(changed) - 1} more' if len(changed) > 1 else ''
    return f'stale: {name}={then.get(name)!r}, today {now.get(name)!r}{others}'
