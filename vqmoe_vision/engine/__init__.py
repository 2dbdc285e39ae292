"""What classification and segmentation both hang into mmengine's Runner.

Importing this package registers it, under names of its own.
"""

from . import (
    checkpoint,
    checkpoint_files,
    checkpoint_hook,
    config,
    hooks,
    loops,
    optim,
    record,
    routing_log,
    seeding,
    step_values,
)
from .finite import NonFiniteError
from .model import MoeTrainingMixin
from .routing import RoutingStatistics

__all__ = [
    'MoeTrainingMixin',
    'NonFiniteError',
    'RoutingStatistics',
    'checkpoint',
    'checkpoint_files',
    'checkpoint_hook',
    'config',
    'hooks',
    'loops',
    'optim',
    'record',
    'routing_log',
    'seeding',
    'step_values',
]
