"""What classification and segmentation both hang into mmengine's Runner.

Importing this package registers the hooks, optimizer wrappers and the log processor, so that a
config needs no more than `custom_imports`.
"""

from . import hooks, log, optim, seeding
from .model import MoeTrainingMixin, NonFiniteError
from .routing import RoutingStatistics

__all__ = [
    'MoeTrainingMixin',
    'NonFiniteError',
    'RoutingStatistics',
    'hooks',
    'log',
    'optim',
    'seeding',
]
