"""The recipe of a run: a hash of all that decides what it gives, in a form that outlasts names.

A default that changes is another recipe, because the function has changed. An option that comes
with a value that changes nothing is said below; it leaves the recipes of all rows as they are.
"""

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from vqmoe_vision.engine.config import flat
from vqmoe_vision.models.create import options_in_full

# Of a config: what keeps, logs and draws a run, finds its types, or is of tests with --tta, which
# no row has; and the pipelines of mmseg's configs, which their data sets repeat.
_LEFT_OUT = {
    'custom_imports', 'default_scope', 'env_cfg', 'launcher', 'log_level', 'log_processor',
    'resume', 'test_pipeline', 'train_pipeline', 'tta_model', 'tta_pipeline', 'vis_backends',
    'visualizer', 'work_dir',
}  # fmt: skip
_KEEPING = {  # default hooks
    'checkpoint', 'logger', 'record', 'routing_history', 'runtime_info', 'visualization',
}  # fmt: skip
# Options that came later, by the value with which nothing changes.
_ADDED: dict[str, Any] = {}


def recipe_of(config: Mapping[str, Any], sources: Mapping[str, str] = {}) -> str:
    """16 digits of the sha256 of a resolved config.

    Args:
        config: As JSON has it.
        sources: What stands for checkpoints of other runs, by the ends of their paths.
    """
    text = json.dumps(canonical(config, sources), sort_keys=True)
    return sha256(text.encode()).hexdigest()[:16]


def canonical(config: Mapping[str, Any], sources: Mapping[str, str] = {}) -> dict[str, Any]:
    """All that decides what a run gives, by dotted name."""
    counting = {name: value for name, value in config.items() if name not in _LEFT_OUT}
    hooks, drawn = config.get('default_hooks', {}), config.get('randomness', {})
    counting |= {
        'default_hooks': {n: hook for n, hook in hooks.items() if n not in _KEEPING},
        # by their types: where one stands among the others is no matter
        'custom_hooks': {hook['type']: hook for hook in config.get('custom_hooks') or ()},
        'randomness': {n: v for n, v in drawn.items() if n != 'seed'},
    }
    moe = options_in_full(config['model'].get('backbone', config['model']))
    # defaults and presets included; where MoE layers stand is none of the options in full
    given = rf'.*\.moe\.({"|".join([*moe, "preset"])})(\..*)?'
    found = {n: value for n, value in flat(counting).items() if not re.fullmatch(given, n)}
    found |= flat({'moe': moe})
    plain = {n: _plain(value, sources) for n, value in found.items() if value not in ({}, [])}
    return {n: v for n, v in plain.items() if not (n in _ADDED and v == _ADDED[n])}


def _plain(value: Any, sources: Mapping[str, str]) -> Any:
    """As JSON has it; 1.0 is 1, and the run behind a checkpoint stands for its path."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return value
    return next((run for end, run in sources.items() if f'/{value}'.endswith(f'/{end}')), value)
