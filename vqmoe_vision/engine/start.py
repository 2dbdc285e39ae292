"""How a new training of a timm model starts, in every task: as all rows do, or from weights."""

from typing import Any

import torch
from mmengine.logging import print_log
from torch import nn

from vqmoe_vision.models.hosts import Transformer
from vqmoe_vision.models.normalization import Normalization
from vqmoe_vision.models.shared_start import share_start
from vqmoe_vision.models.sources import check_one_source
from vqmoe_vision.moe import restart

from .checkpoint import log_weights, start_from
from .features import start_features
from .normalization import has_weights, weights_normalization


def start_model(
    model: nn.Module, arguments: dict[str, Any], checkpoint: str | None, features: str | None
) -> Normalization | None:
    """Starts a new training: as every row does at this seed, or from weights."""
    check_one_source({**arguments, 'checkpoint': checkpoint})
    share_start(model, seed=torch.initial_seed(), **arguments)
    log_weights(model, arguments)
    if checkpoint is not None:
        assert isinstance(model, Transformer)
        start_from(model, checkpoint)
    for note in restart(model):
        print_log(note, logger='current')
    weights = weights_normalization(model, checkpoint, arguments)
    return start_features(model, features, has_weights(checkpoint, arguments), weights)
