"""What classification and segmentation both hang into mmengine's Runner.

Importing this package registers the hooks, optimizer wrappers and the log processor, so that a
config needs no more than `custom_imports`, lets torch read mmengine's checkpoints as data, and
teaches mmengine's count of FLOPs the operators of these models.
"""

from . import checkpoint, flops, hooks, log, optim, seeding
from .model import MoeTrainingMixin, NonFiniteError
from .routing import RoutingStatistics

__all__ = [
    'MoeTrainingMixin',
    'NonFiniteError',
    'RoutingStatistics',
    'checkpoint',
    'flops',
    'hooks',
    'log',
    'optim',
    'seeding',
]
