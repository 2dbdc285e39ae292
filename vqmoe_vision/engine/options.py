"""`--cfg-options`: how they are written, and which ones a config takes."""

import argparse
import ast
import inspect
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from ..moe.config import check

# Fields that mmengine's Runner takes from the config without being arguments of its constructor,
# that of sharded.py, and those of tests with --tta.
_EXTRA_FIELDS = frozenset(
    {
        'activation_checkpointing',
        'compile',
        'efficient_conv_bn_eval',
        'find_unused_parameters',
        'model_wrapper_cfg',
        'parallel',
        'runner_type',
        'sync_bn',
        'tta_model',
        'tta_pipeline',
    }
)
# Of these mmengine's Runner reads the named entries, and passes over all others.
_READ = {
    'env_cfg': ('cudnn_benchmark', 'dist_cfg', 'mp_cfg', 'resource_limit'),
    'auto_scale_lr': ('base_batch_size', 'enable'),
}
# Hooks that it adds to every run, and leaves out where a config says None.
_HOOKS = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')


class _CfgOptions(DictAction):
    """mmengine's action, but takes dictionaries, and says which argument is not NAME=VALUE."""

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        """A value with a dictionary is written as in Python; mmengine would leave a string."""
        if not val.startswith(('{', '[', '(')) or '{' not in val:
            return DictAction._parse_iterable(val)
        try:
            return ast.literal_eval(val)
        except (ValueError, SyntaxError, TypeError) as error:
            allowed = "a dictionary as in Python, such as {'lr_mult': 0.1}"
            raise ValueError(f'--cfg-options {val}: write {allowed}') from error

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        for value in values:
            if '=' not in value:
                raise ValueError(f'--cfg-options {value}: write it as name=value')
        super().__call__(parser, namespace, values, option)


def add_config_options(
    parser: argparse.ArgumentParser,
    purpose: str = 'change fields of the config, for example train_cfg.max_epochs=5 '
    'model.moe.top_k=1',
) -> None:
    """Adds `--cfg-options` to a parser."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_CfgOptions,
        default={},
        metavar='NAME=VALUE',
        help=purpose,
    )


def parse_options(options: Sequence[str]) -> dict[str, Any]:
    """The values of options by dotted name."""
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    return parser.parse_args(['--cfg-options', *options] if options else []).cfg_options


def as_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """Options as keyword arguments: what has a dotted name is in a dictionary."""
    nested = Config()
    nested.merge_from_dict(options)
    return dict(nested.to_dict())


def merge_options(config: Config, options: dict[str, Any]) -> None:
    """Merges options of the command line into a config; refuses those that nothing would read."""
    fields = (set(inspect.signature(Runner).parameters) | _EXTRA_FIELDS) - {'cfg'}
    hooks = {*(config.get('default_hooks') or {}), *_HOOKS}
    for name, value in options.items():
        first, _, hook = name.partition('.')
        check(first in fields, name, value, f'a field of {", ".join(sorted(fields))}')
        left_out = first == 'default_hooks' and value is None and hook and '.' not in hook
        allowed = f'left out is one of {", ".join(sorted(hooks))}'
        check(not left_out or hook in hooks, name, value, allowed)
    try:
        config.merge_from_dict(options)
    except (KeyError, TypeError) as error:  # of an element that a list lacks, or of what holds none
        raise ValueError(f'--cfg-options {" ".join(options)}: {error}') from error


def check_fields(config: Config) -> None:
    """Refuses what mmengine would pass over in silence; drops other hooks that None leaves out."""
    for field, known in _READ.items():
        for name, value in (config.get(field) or {}).items():
            check(name in known, f'{field}.{name}', value, f'it has {", ".join(known)}')
    hooks = config.get('default_hooks') or {}
    for name in [name for name, hook in hooks.items() if hook is None and name not in _HOOKS]:
        hooks.pop(name)  # of any name but its own six mmengine wants a hook
    # of a CUDA graph, what is read for the log after some steps would be that of the last replay
    compiled = config.get('compile')
    mode = compiled.get('mode') if isinstance(compiled, dict) else None
    allowed = "one without CUDA graphs: 'default' or 'max-autotune-no-cudagraphs'"
    check(mode not in ('reduce-overhead', 'max-autotune'), 'compile.mode', mode, allowed)


def expand(holder: Any) -> None:
    """Puts the user's folder in the place of `~` in all paths of a config, dictionary or list."""
    # in place: a config that is built lazily stays so; a shell does it in some words only
    for key in range(len(holder)) if isinstance(holder, list) else list(holder):
        inner = holder[key]
        if isinstance(inner, dict | list):
            expand(inner)
        elif isinstance(inner, str | Path):
            scheme, colon, path = str(inner).rpartition('local-dir:')
            if (found := os.path.expanduser(path)) != path:
                holder[key] = type(inner)(scheme + colon + found)


def flat(value: Any, name: str = '') -> dict[str, Any]:
    """Values by dotted name."""
    if isinstance(value, list | tuple) and value:
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {name: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f'{name}.{key}' if name else str(key))
    return found
