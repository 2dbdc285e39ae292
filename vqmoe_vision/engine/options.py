"""`--cfg-options`: how they are written, and which ones a config takes."""

import argparse
import ast
import inspect
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from ..moe.config import did_you_mean
from .known_names import check_left_out

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


class _CfgOptions(DictAction):
    """mmengine's action, but takes dictionaries, and says which argument is not NAME=VALUE."""

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        """A value with a dictionary is written as in Python; mmengine would leave a string."""
        if not val.startswith(('{', '[', '(')) or '{' not in val:
            return DictAction._parse_iterable(val)
        said = f"--cfg-options {val}: write a dictionary as in Python, such as {{'lr_mult': 0.1}}"
        try:
            value = ast.literal_eval(val)
        except (ValueError, SyntaxError, TypeError) as error:
            raise ValueError(said) from error
        if isinstance(value, set):
            raise ValueError(said)
        return value

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for value in values:
            if '=' not in value:
                raise ValueError(f'--cfg-options {value}: write it as name=value')
        super().__call__(parser, namespace, values, option_string)


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
    """Merges options of the command line into a config, which has to be able to take them."""
    fields = (set(inspect.signature(Runner).parameters) | _EXTRA_FIELDS) - {'cfg'}
    for name in options:
        first, *others = name.split('.')
        if first not in fields:
            raise ValueError(
                f'--cfg-options {name}: {first!r} is not a field that an option can change'
                f'{did_you_mean(first, fields) or "."} Those are {", ".join(sorted(fields))}'
            )
        owner, value = first, options.get(first, config.get(first, {}))
        for part in others:
            if not isinstance(value, dict | list):
                raise ValueError(f'--cfg-options {name}: {owner} is {value!r}, it has no {part!r}')
            if isinstance(value, list) and not (part.isdecimal() and int(part) < len(value)):
                raise ValueError(
                    f'--cfg-options {name}: {owner} is a list of {len(value)}, counted from 0; it '
                    f'has no {part!r}'
                )
            owner = f'{owner}.{part}'
            inside = value.get(part, {}) if isinstance(value, dict) else value[int(part)]
            value = options.get(owner, inside)
    check_left_out(config, options)
    config.merge_from_dict(options)


def expanded(value: Any) -> Any:
    """Paths with the user's folder in the place of `~`, which a shell replaces in some words only."""  # LONG
    if isinstance(value, dict):
        inside = {name: expanded(inner) for name, inner in value.items()}
        return inside if any(inside[name] is not value[name] for name in value) else value
    if isinstance(value, list | tuple):
        parts = [expanded(inner) for inner in value]
        same = all(new is old for new, old in zip(parts, value, strict=True))
        return value if same else tuple(parts) if isinstance(value, tuple) else parts
    if not isinstance(value, str | Path):
        return value
    scheme, colon, path = str(value).rpartition('local-dir:')
    found = os.path.expanduser(path)
    return value if found == path else type(value)(scheme + colon + found)


def expand_config(config: Config) -> None:
    """As `expanded`, of all paths of a config."""
    _expand(config, list(config))


def _expand(holder: Any, keys: Iterable[Any]) -> None:
    """In place, so that a config that is built lazily stays so."""
    for key in keys:
        inner = holder[key]
        if isinstance(inner, dict):
            _expand(inner, list(inner))
        elif isinstance(inner, list):
            _expand(inner, range(len(inner)))
        elif (new := expanded(inner)) is not inner:
            holder[key] = new


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
