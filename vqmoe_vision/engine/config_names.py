"""Configs by name: `vqmoe_vision::classification/cifar10.py` comes with the package."""

from collections.abc import Iterator
from contextlib import contextmanager

from mmengine.config import Config, ConfigDict

from vqmoe_vision.installed import config_path

_PREFIX = 'vqmoe_vision::'


def find_config(path: str) -> str:
    """The file of a config."""
    return config_path(path.removeprefix(_PREFIX)) if path.startswith(_PREFIX) else path


def innermost(dataset: ConfigDict) -> Iterator[ConfigDict]:
    """The data sets of a config that are no wrappers of others, in order."""
    found = [dataset.get('dataset'), *(dataset.get('datasets') or [])]
    wrapped = [inner for inner in found if isinstance(inner, dict)]
    if not wrapped:
        yield dataset
    for inner in wrapped:
        yield from innermost(inner)


def _base_path(base: str, filename: str) -> tuple[str, str | None]:
    """File and scope of a `_base_`, which may also be one that comes with the package."""
    if base.startswith(_PREFIX):
        return find_config(base), None
    return _mmengine_base_path(base, filename)


_mmengine_base_path = Config._get_cfg_path


@contextmanager
def bases_by_name() -> Iterator[None]:
    """Lets a config that is read inside the block build on one of the package by name."""
    Config._get_cfg_path = staticmethod(_base_path)
    try:
        yield
    finally:
        Config._get_cfg_path = staticmethod(_mmengine_base_path)
