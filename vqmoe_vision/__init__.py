"""Vision transformers with mixture-of-experts layers; importing registers them with timm."""

import sys

if (  # `python -m` has put the current folder first, where no file may stand for torch or timm
    sys.argv[:1] == ['-m']
    and sys.orig_argv[-len(sys.argv)].removeprefix('-m').partition('.')[0] == __name__
    and not getattr(sys.flags, 'safe_path', False)
):
    sys.path.pop(0)
from pathlib import Path

from . import models
from .moe import collect_losses, per_expert, update_state

__version__ = '0.1.0'
_PACKAGE = Path(__file__).parent
# In a wheel configs and tools are where OpenMMLab's packages have theirs; a clone has them beside
# the package.
FOLDER = _PACKAGE / '.mim' if (_PACKAGE / '.mim').is_dir() else _PACKAGE.parent


def config_path(name: str) -> str:
    """Path of a config that comes with the package.

    A config that any program of mmengine or mmseg reads can build on it:
    `_base_ = __import__('vqmoe_vision').config_path('classification/cifar10.py')`.

    Args:
        name: Such as 'classification/cifar10.py'. Whoever reads the file finds out if it exists.
    """
    return str(FOLDER / 'configs' / name)


__all__ = ['__version__', 'collect_losses', 'config_path', 'models', 'per_expert', 'update_state']
