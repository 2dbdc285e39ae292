"""What classification and segmentation both hang into mmengine's Runner.

Importing this package registers the hooks, optimizer wrappers and the log processor, so that a
config needs no more than `custom_imports`, puts a hook that saves safely, one that waits for no
value of a step, a loop that resumes in the middle of an epoch, and loaders that run no code in the
place of mmengine's, lets `_base_` name the configs of this package, and teaches mmengine's count of
FLOPs the operators of these models.
"""

from . import (
    checkpoint,
    checkpoint_files,
    checkpoint_hook,
    config_names,
    flops,
    hooks,
    layer_decay,
    log,
    loops,
    optim,
    other_hooks,
    record,
    routing_history,
    seeding,
    step_values,
    stop,
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
    'layer_decay',
    'log',
    'loops',
    'optim',
    'other_hooks',
    'record',
    'routing_history',
    'seeding',
    'step_values',
    'stop',
]
