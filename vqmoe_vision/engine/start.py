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
    """Starts a new training: as every row does at this seed, or from weights.

    MoE layers begin anew with the weights, whichever option they came by.

    Args:
        model: As `create_model` built it, whole or pruned; a `Transformer` if there is a
            checkpoint.
        arguments: Of `create_model`, `model_name` among them.
        checkpoint: As `start_from`; None to leave it.
        features: As `start_features`.

    Returns:
        How images are to be normalised, as far as the weights say.

    Raises:
        ValueError: Weights are named twice, or a file cannot be read or does not fit; names keys
            and shapes.
    """
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
