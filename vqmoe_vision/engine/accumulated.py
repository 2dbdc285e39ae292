"""What waits for more batches before a step of the optimizer, in checkpoints."""

from typing import Any

from mmengine.dist import get_world_size
from mmengine.runner import Runner
from mmengine.utils import apply_to
from torch import Tensor

from vqmoe_vision.moe import moe_layers

from .model import unwrapped

_KEY = 'accumulated'


def keep_accumulated(runner: Runner, checkpoint: dict[str, Any]) -> None:
    """Adds gradients, and what layers have observed, that no step has used yet to a checkpoint."""
    if runner.optim_wrapper.should_update() or get_world_size() > 1:  # of several they are lost
        return
    if 'optimizer' not in checkpoint:  # as in the best one, from which no training goes on
        return
    model = unwrapped(runner)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    observed = {name: layer.observed for name, layer in moe_layers(model).items()}
    # as mmengine keeps all else
    kept = {'gradients': gradients, 'observed': observed}
    checkpoint[_KEY] = apply_to(kept, lambda x: isinstance(x, Tensor), Tensor.cpu)


def restore_accumulated(runner: Runner, checkpoint: dict[str, Any]) -> None:
    """Puts what a checkpoint kept where the next batch adds to it."""
    if _KEY not in checkpoint:
        return
    model, kept = unwrapped(runner), checkpoint[_KEY]
    parameters, layers = dict(model.named_parameters()), moe_layers(model)
    try:
        for name, gradient in kept['gradients'].items():
            parameter = parameters[name]
            parameter.grad = gradient.to(parameter.device).view_as(parameter)
        for name, observed in kept['observed'].items():
            layers[name].observed = observed
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f'{_KEY!r} of the checkpoint does not fit the model: {error}') from error
    # mmengine warns that they are lost
    runner.logger.info('What waits for more batches is that of the checkpoint')
