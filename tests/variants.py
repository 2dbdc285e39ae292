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


_OF_TESTS = {'top_k': 2, 'expert_mlp_ratio': 4.0}  # few, that are made of dense MLPs


def presets(config: type[MoeConfig]) -> dict[str, dict[str, Any]]:
    """Options by preset; one that has experts of its own number and width has those of tests."""
    found = config.PRESETS.items()
    return {p: {'preset': p, **(_OF_TESTS if 'num_experts' in o else {})} for p, o in found}


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {}
for _name, _method in METHODS.items():
    _config = _method.config
    VARIANTS[_name] = (_name, {})
    VARIANTS |= {
        f'{_name}-{p}': (_name, o) for p, o in presets(_config).items() if _config.PRESETS[p]
    }
    VARIANTS |= {f'{_name}-{trial}': (_name, options) for trial, options in trials(_config).items()}
