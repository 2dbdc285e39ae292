"""Vision transformers with mixture-of-experts layers; importing registers them with timm."""

from . import models
from .installed import config_path
from .moe import collect_losses, per_expert, update_state

__version__ = '0.1.0.dev0'

__all__ = [
    '__version__',
    'collect_losses',
    'config_path',
    'models',
    'per_expert',
    'update_state',
]
