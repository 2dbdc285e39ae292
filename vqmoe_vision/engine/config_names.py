"""Configs by name: `vqmoe_vision::classification/cifar10.py` comes with the package."""

import re
from difflib import get_close_matches
from pathlib import Path

from mmengine.config import Config

from vqmoe_vision.installed import config_path

from .former_configs import replacement

_PREFIX = 'vqmoe_vision::'
_SUFFIXES = ('.py', '.yml', '.yaml', '.json')  # those that mmengine reads


def find_config(path: str, where: str = '') -> str:
    """The file of a config."""
    file = config_path(path.removeprefix(_PREFIX)) if path.startswith(_PREFIX) else path
    if Path(file).is_dir():
        raise ValueError(f'config {path!r}{where} is a folder')
    if not Path(file).is_file():
        raise missing_config(path, where)
    if Path(file).suffix not in _SUFFIXES:
        raise ValueError(f'config {path!r}{where} must end in {", ".join(_SUFFIXES)}')
    return file


def missing_config(path: str, where: str = '') -> FileNotFoundError:
    """The error for a config that does not exist; says what replaces it, or was meant."""
    former, nearest = replacement(path), _nearest(path)
    hint = f'; did you mean {nearest}?' if nearest else ''
    hint = f'; in its place: {former}' if former else hint
    return FileNotFoundError(f'config {path!r}{where} does not exist{hint}')


def _nearest(path: str) -> str | None:
    """The config that is named most like `path`, beside it or of this package."""
    configs = Path(config_path(''))
    match = re.match(rf'{_PREFIX}|(.*/)?configs/|', path)
    root = match[0] if match else ''
    candidates = [str(file) for file in sorted(Path(path).parent.glob('*.py'))]
    for file in sorted(configs.rglob('*.py')):
        name = file.relative_to(configs).as_posix()
        candidates.append(root + name if Path(root + name).is_file() else _PREFIX + name)
    # the end of a name tells configs apart: two in one folder have most of their paths in common
    stems = get_close_matches(Path(path).stem, sorted({Path(c).stem for c in candidates}), 1)
    named = [candidate for candidate in candidates if Path(candidate).stem in stems]
    return next(iter(get_close_matches(path, named, 1, cutoff=0)), None)


def _base_path(base: str, filename: str) -> tuple[str, str | None]:
    """File and scope of a `_base_`, which may also be one that comes with the package."""
    if base.startswith(_PREFIX):
        return find_config(base, f', on which {filename!r} builds,'), None
    return _mmengine_base_path(base, filename)


_mmengine_base_path = Config._get_cfg_path
Config._get_cfg_path = staticmethod(_base_path)
