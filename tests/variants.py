"""Every method with every preset and trial that runs other code."""

from typing import Any

from vqmoe_vision.moe import METHODS

# by id: the method, and its options
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {}
for _name, _method in METHODS.items():
    _config = _method.config
    VARIANTS[_name] = (_name, {})
    VARIANTS |= {f'{_name}-{p}': (_name, {'preset': p}) for p, o in _config.PRESETS.items() if o}
    VARIANTS |= {f'{_name}-{trial}': (_name, options) for trial, options in _config.trials().items()}
