"""Where the configs and tools that come with the package lie."""

from pathlib import Path

_PACKAGE = Path(__file__).parent
# In a wheel they are where OpenMMLab's packages have theirs; a clone has them beside the package.
FOLDER = _PACKAGE / '.mim' if (_PACKAGE / '.mim').is_dir() else _PACKAGE.parent


def config_path(name: str) -> str:
    """Path of a config that comes with the package.

    A config that any program of mmengine or mmseg reads can build on it:
    `_base_ = __import__('vqmoe_vision').config_path('classification/cifar10.py')`.

    Args:
        name: Such as 'classification/cifar10.py'. Whoever reads the file finds out if it exists.
    """
    return str(FOLDER / 'configs' / name)
