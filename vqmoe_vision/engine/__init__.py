"""What classification and segmentation both hang into mmengine's Runner.

Importing this package registers it, under names of its own.
"""

from . import checkpoint_hook, hooks, optim, record, trackers
from .model import MoeTrainingMixin, RoutingStatistics
from .step_values import NonFiniteError

__all__ = [
    'MoeTrainingMixin',
    'NonFiniteError',
    'RoutingStatistics',
    'checkpoint_hook',
    'hooks',
    'optim',
    'record',
    'trackers',
]
