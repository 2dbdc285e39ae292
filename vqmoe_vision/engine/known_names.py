"""Dictionaries of a config of which mmengine reads some names, and passes over all others."""

import inspect
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing

from vqmoe_vision.moe.config import check, did_you_mean

from .class_arguments import check_arguments

# What mmengine's Runner reads in `scale_lr` and `setup_env`; no signature has the first two.
_OF_SCALE = ('base_batch_size', 'enable')
_OF_ENVIRONMENT = ('cudnn_benchmark', 'dist_cfg', 'mp_cfg', 'resource_limit')
_OF_WORKERS = inspect.signature(set_multi_processing).parameters.keys() - {'distributed'}
_OF_RANDOMNESS = inspect.signature(Runner.set_randomness).parameters.keys() - {'self'}
# Hooks that it adds to every run, and leaves out where a config says None.
_HOOKS = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')


def check_names(config: Config) -> None:
    """Refuses names that nothing would read, such as misspelt ones.

    Args:
        config: Of a run. Hooks that are None are taken out of it: mmengine does that with its own
            and fails on others.

    Raises:
        ValueError: A name is unknown, a hook has no type, or there is no batch size to scale the
            learning rate by; names the most similar name that there is.
    """
    environment = _checked('env_cfg', config.get('env_cfg'), _OF_ENVIRONMENT)
    _checked('env_cfg.mp_cfg', environment.get('mp_cfg'), _OF_WORKERS)
    _checked('randomness', config.get('randomness'), _OF_RANDOMNESS)
    scale = _checked('auto_scale_lr', config.get('auto_scale_lr'), _OF_SCALE)
    base = scale.get('base_batch_size')
    possible = not scale.get('enable') or (type(base) is int and base > 0)
    allowed = 'the batch size that the learning rate is for, a whole number above 0'
    check(possible, 'auto_scale_lr.base_batch_size', base, allowed)
    _check_default_hooks(config.get('default_hooks') or {})


def _checked(field: str, given: Any, known: Any) -> dict[str, Any]:
    """What a config says there, which may be nothing."""
    options = {} if given is None else given
    allowed = f'a dictionary with some of {", ".join(sorted(known))}'
    check(isinstance(options, dict), field, given, allowed)
    check_arguments(field, options, known)
    return options


def _check_default_hooks(hooks: dict[str, Any]) -> None:
    typed = {name for name, hook in hooks.items() if isinstance(hook, dict) and 'type' in hook}
    for name in hooks.keys() - typed:
        hook = hooks[name]
        if hook is not None:
            allowed = f'a hook of this name needs a type{did_you_mean(name, typed)}'
            check(False, f'default_hooks.{name}', hook, allowed)
        elif name not in _HOOKS:
            similar = did_you_mean(name, typed.union(_HOOKS))
            allowed = f'there is no hook of this name to leave out{similar}'
            check(not similar, f'default_hooks.{name}', None, allowed)
            hooks.pop(name)
