"""What classification and segmentation both hang into mmengine's Runner.

Importing this package registers it; docs/reliability.md says what takes the names of mmengine's.
"""

from . import (
    checkpoint,
    checkpoint_files,
    checkpoint_hook,
    config_names,
    flops,
    hooks,
    log,
    loops,
    optim,
    record,
    routing_history,
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
    'config_names',
    'flops',
    'hooks',
    'log',
    'loops',
    'optim',
    'record',
    'routing_history',
    'seeding',
    'step_values',
]
