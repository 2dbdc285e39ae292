"""Mixture-of-experts layers for token tensors: routing, dispatch, experts, codebooks, losses."""

from .collect import Collected, collect_losses, moe_layers, restart, start_training, update_state
from .config import MoeConfig
from .kernels import use_kernel
from .layer import MoeLayer
from .methods import METHODS
from .optimizer import per_expert

__all__ = [
    'METHODS',
    'Collected',
    'MoeConfig',
    'MoeLayer',
    'collect_losses',
    'moe_layers',
    'per_expert',
    'restart',
    'start_training',
    'update_state',
    'use_kernel',
]
