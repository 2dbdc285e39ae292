"""Dictionaries of a config of which mmengine reads some names, and passes over all others.

Others may be there for a runner, a data set or a metric of one's own. So only what is almost a name
that is read is taken for a misspelt one: a letter is missing, too many or another, or all are
capitals. More in front or behind, or a number, makes another name.
"""

import inspect
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, SupportsFloat

from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing

from vqmoe_vision.moe.config import check, did_you_mean

# What mmengine's Runner reads in `scale_lr` and `setup_env`; no signature has the first two.
_OF_SCALE = ('base_batch_size', 'enable')
_OF_ENVIRONMENT = ('cudnn_benchmark', 'dist_cfg', 'mp_cfg', 'resource_limit')
_OF_WORKERS = inspect.signature(set_multi_processing).parameters.keys() - {'distributed'}
_OF_RANDOMNESS = inspect.signature(Runner.set_randomness).parameters.keys() - {'self'}
# Hooks that it adds to every run, and leaves out where a config says None.
_HOOKS = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')
_ALMOST = 0.85


def check_spelling(field: str, given: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuses names that are almost one of those that are read, in letters of either case."""
    for name in given.keys() - known:
        meant = _meant(str(name).lower(), known)
        check(meant is None, f'{field}.{name}', given[name], f'did you mean {meant}?')


def _meant(name: str, known: Collection[str]) -> str | None:
    for similar in get_close_matches(name, sorted(known), 1, _ALMOST):
        more = name.replace(similar, '', 1) if similar in name else ''
        return similar if not more or (len(more) == 1 and more.isalpha()) else None
    return None


def check_names(config: Config) -> None:
    """Refuses names that mmengine would pass over and that seem to be meant for it."""
    environment = _checked('env_cfg', config.get('env_cfg', {}), _OF_ENVIRONMENT)
    _checked('env_cfg.mp_cfg', environment.get('mp_cfg', {}), _OF_WORKERS)
    _checked('randomness', config.get('randomness', {}), _OF_RANDOMNESS)
    if config.get('auto_scale_lr') is not None:
        scale = _checked('auto_scale_lr', config.auto_scale_lr, _OF_SCALE)
        base = scale.get('base_batch_size')
        numeric = float(base) if isinstance(base, SupportsFloat) else 0.0
        possible = numeric > 0 and type(base) is not bool
        allowed = 'a number above 0, the batch size that the learning rate is for'
        check(possible or not scale.get('enable'), 'auto_scale_lr.base_batch_size', base, allowed)
    if config.get('default_hooks') is not None:
        _check_default_hooks(config.default_hooks)
    _check_compile(config.get('compile'))


def _check_compile(options: Any) -> None:
    """What is read for the log after some steps would be that of the last replay of a graph."""
    mode = options.get('mode') if isinstance(options, dict) else None
    allowed = "one without CUDA graphs: 'default' or 'max-autotune-no-cudagraphs'"
    check(mode not in ('reduce-overhead', 'max-autotune'), 'compile.mode', mode, allowed)


def check_left_out(config: Config, options: Mapping[str, Any]) -> None:
    """Refuses to leave out a hook that there is not, which merged with a config cannot be seen."""
    known = {*(config.get('default_hooks') or {}), *_HOOKS}
    left_out = [name.split('.') for name, value in options.items() if value is None]
    for hook in [parts[1] for parts in left_out if parts[0] == 'default_hooks' and len(parts) == 2]:
        allowed = f'there is no hook of this name to leave out{did_you_mean(hook, known)}'
        check(hook in known, f'default_hooks.{hook}', None, allowed)


def _checked(field: str, given: Any, known: Collection[str]) -> dict[str, Any]:
    allowed = f'a dictionary with some of {", ".join(sorted(known))}'
    check(isinstance(given, dict), field, given, allowed)
    check_spelling(field, given, known)
    return given


def _check_default_hooks(hooks: Any) -> None:
    check(isinstance(hooks, dict), 'default_hooks', hooks, 'a dictionary of hooks by name')
    typed = {name for name, hook in hooks.items() if isinstance(hook, dict) and 'type' in hook}
    for name in hooks.keys() - typed:
        if hooks[name] is not None:
            allowed = f'a hook of this name needs a type{did_you_mean(name, typed)}'
            check(False, f'default_hooks.{name}', hooks[name], allowed)
        elif name not in _HOOKS:
            check_spelling('default_hooks', {name: None}, typed.union(_HOOKS))
            hooks.pop(name)
