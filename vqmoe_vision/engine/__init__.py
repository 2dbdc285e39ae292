"""What classification and segmentation both hang into mmengine's Runner.

Importing this package registers the hooks, optimizer wrappers and the log processor, so that a
config needs no more than `custom_imports`, lets torch read mmengine's checkpoints as data, lets
`_base_` name the configs of this package, and teaches mmengine's count of FLOPs the operators of
these models.
"""

from . import (
    checkpoint,
    config_names,
    flops,
    hooks,
    layer_decay,
    log,
    optim,
    record,
    routing_history,
    seeding,
)
from .model import MoeTrainingMixin, NonFiniteError
from .routing import RoutingStatistics

__all__ = [
    'MoeTrainingMixin',
    'NonFiniteError',
    'RoutingStatistics',
    'checkpoint',
    'config_names',
    'flops',
    'hooks',
    'layer_decay',
    'log',
    'optim',
    'record',
    'routing_history',
    'seeding',
]
