"""Tasks of timm that train what MoE layers add: auxiliary losses, codebooks and stages.

timm's `train.py` takes its classes from `timm.task` by name, and `install` puts ours there.
"""

from typing import Any

import timm.optim
import timm.task
from timm.optim import create_optimizer_v2
from timm.task import ClassificationTask, TrainingTask
from torch import Tensor, nn
from torch.optim import Optimizer

from ..moe import collect_losses, update_state
from ..moe.optimizer import mixes_experts, per_expert


class TrainsExperts:
    """Mixin before a task of timm's, whose `update_ema` a loop calls after each optimizer step."""

    trainable_module: nn.Module

    def forward(self: Any, input: Tensor, target: Tensor) -> dict:
        """What timm's task returns, its loss with the auxiliary losses of the same pass."""
        with collect_losses(self.trainable_module, update_state=False) as collected:
            result = super().forward(input, target)  # type: ignore[misc]
            auxiliary = collected.total()
        return {**result, 'loss': result['loss'] + auxiliary, 'auxiliary_loss': auxiliary.detach()}

    def update_ema(self: Any, step: int | None = None) -> None:
        """Move the state that learns without gradients, then timm's moving average."""
        update_state(self.trainable_module)
        super().update_ema(step)  # type: ignore[misc]


class MoeClassificationTask(TrainsExperts, ClassificationTask):
    """timm's `ClassificationTask` for models with MoE layers, with the same arguments."""


def install() -> None:
    """Put tasks and optimizers that know experts in the place of timm's, for scripts."""
    for name, task in list(vars(timm.task).items()):
        theirs = isinstance(task, type) and issubclass(task, TrainingTask)
        if theirs and task is not TrainingTask and not issubclass(task, TrainsExperts):
            ours = type(f'Moe{task.__name__}', (TrainsExperts, task), {'__module__': __name__})
            setattr(timm.task, name, MoeClassificationTask if task is ClassificationTask else ours)
    timm.optim.create_optimizer_v2 = _taught


def _taught(model_or_params: Any, *args: Any, **kwargs: Any) -> Optimizer:
    """Timm's optimizer, which knows the experts."""
    optimizer = create_optimizer_v2(model_or_params, *args, **kwargs)
    if isinstance(model_or_params, nn.Module) and mixes_experts(optimizer):
        per_expert(optimizer, model_or_params)
    return optimizer
