"""What classification and segmentation both hang into mmengine's Runner.

Importing this package registers the hooks, optimizer wrappers and the log processor, so that a
config needs no more than `custom_imports`, and lets torch read mmengine's checkpoints as data.
"""

from . import checkpoint, hooks, log, optim, record, seeding
from .model import MoeTrainingMixin, NonFiniteError
from .routing import RoutingStatistics

__all__ = [
    'MoeTrainingMixin',
    'NonFiniteError',
    'RoutingStatistics',
    'checkpoint',
    'hooks',
    'log',
    'optim',
    'record',
    'seeding',
]
