"""The modules that a config needs: a list in a config replaces that of its base."""

import sys
from functools import cache
from pathlib import Path

from mmengine.config import Config

from vqmoe_vision.installed import config_path
from vqmoe_vision.moe.config import check

_FIELD = 'custom_imports.imports'


def check_imports(config: Config) -> None:
    """Refuses a config whose own imports have replaced those of a base of this package."""
    read = config.text.splitlines()  # the path of each file, bases too, stands above its text
    listed = _imports(config)
    for runtime in sorted(Path(config_path('_base_')).glob('*_runtime.py')):
        if str(runtime) not in read:
            continue
        missing = [m for m in _needed(runtime) if m not in listed and m not in sys.modules]
        allowed = (
            f'it lacks {", ".join(map(repr, missing))} of configs/_base_/{runtime.name}, as a list '
            f'replaces that of a base: custom_imports=dict(imports={[*missing, *listed]})'
        )
        check(not missing, _FIELD, listed, allowed)


@cache  # a comparison reads its config once for each run, and this file does not change
def _needed(runtime: Path) -> tuple[str, ...]:
    return tuple(_imports(Config.fromfile(runtime, import_custom_modules=False)))


def _imports(config: Config) -> list[str]:
    found = (config.get('custom_imports') or {}).get('imports') or []
    return [found] if isinstance(found, str) else list(found)
