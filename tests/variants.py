"""Every method with every preset, and with every trial value of its options."""

from dataclasses import fields
from typing import Any

from vqmoe_vision.moe import METHODS, MoeConfig


def trials(config: type[MoeConfig]) -> dict[str, dict[str, Any]]:
    """Combinations that have every trial of every field, as few as are possible together."""
    packed: list[dict[str, Any]] = []
    combined: list[dict[str, Any]] = []
    for field in fields(config):
        for value in field.metadata['trials']:
            if isinstance(value, dict):
                combined.append(value)
                continue
            free = (each for each in packed if field.name not in each)
            fits = (each for each in free if _possible(config, {**each, field.name: value}))
            if (found := next(fits, None)) is None:
                packed.append(found := {})
            found[field.name] = value
    return {f'trial-{number}': each for number, each in enumerate(packed + combined, 1)}


def _possible(config: type[MoeConfig], options: dict[str, Any]) -> bool:
    try:
        config.from_options(**options)
    except ValueError:
        return False
    return True


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {}
for _name, _method in METHODS.items():
    _config = _method.config
    VARIANTS[_name] = (_name, {})
    VARIANTS |= {f'{_name}-{p}': (_name, {'preset': p}) for p, o in _config.PRESETS.items() if o}
    VARIANTS |= {f'{_name}-{trial}': (_name, options) for trial, options in trials(_config).items()}
