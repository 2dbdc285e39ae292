"""Vision transformers with mixture-of-experts layers; importing registers them with timm."""

from . import models
from .moe import collect_losses, update_state

__version__ = '0.1.0'

__all__ = ['__version__', 'collect_losses', 'models', 'update_state']
