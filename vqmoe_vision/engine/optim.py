"""Optimizer wrappers: timm's weight decay groups, and mixed precision on the CPU."""

import fnmatch
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from timm.optim import param_groups_weight_decay
from torch import nn

from vqmoe_vision.moe.optimizer import mixes_experts, per_expert


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16 on the CPU, where mmengine's `AmpOptimWrapper` refuses to run.

    bfloat16 has float32's range, so there is no loss scale.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Runs the forward pass under autocast.

        Args:
            model: The model in training.
        """
        with super().optim_context(model), torch.autocast('cpu', dtype=torch.bfloat16):
            yield


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmOptimWrapperConstructor:
    """Builds an optimizer in which biases, norms and `no_weight_decay()` names do not decay.

    These are timm's rules, and make two parameter groups; mmengine's own constructor would make
    one per parameter, which is slow to step.

    Args:
        optim_wrapper_cfg: As in every mmengine config: `type`, `optimizer`, `clip_grad`, ...
        paramwise_cfg: Not supported: must be None.

    Raises:
        ValueError: `paramwise_cfg` was given.
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        if paramwise_cfg is not None:
            raise ValueError(
                f'paramwise_cfg={paramwise_cfg} has no effect with TimmOptimWrapperConstructor: '
                "leave it out, or set optim_wrapper.constructor='DefaultOptimWrapperConstructor'"
            )
        self.optim_wrapper_cfg = optim_wrapper_cfg

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Builds the wrapper for a model, which may be wrapped for distributed training."""
        wrapper_cfg = dict(self.optim_wrapper_cfg)
        optimizer_cfg = dict(wrapper_cfg.pop('optimizer'))
        decay = optimizer_cfg.get('weight_decay', 0.0)
        optimizer_cfg['params'] = self.param_groups(model, decay)
        wrapper_cfg.setdefault('type', 'OptimWrapper')
        optimizer = OPTIMIZERS.build(optimizer_cfg)
        if mixes_experts(optimizer):
            per_expert(optimizer, model)
        return OPTIM_WRAPPERS.build(wrapper_cfg, default_args={'optimizer': optimizer})

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters that decay and those that do not.

        Args:
            model: The model.
            weight_decay: Weight decay of the first kind.
        """
        return param_groups_weight_decay(
            model, weight_decay, no_weight_decay_list=undecayed_parameters(model)
        )


def undecayed_parameters(model: nn.Module) -> set[str]:
    """Full names of the parameters that some submodule lists in its `no_weight_decay()`.

    Args:
        model: Any module; timm models inside it may list names or patterns such as `*.codebook`.
    """
    names = [name for name, _ in model.named_parameters()]
    found: set[str] = set()
    for prefix, module in model.named_modules():
        if hasattr(module, 'no_weight_decay'):
            for pattern in module.no_weight_decay():
                full = f'{prefix}.{pattern}' if prefix else pattern
                found.update(fnmatch.filter(names, full))
    return found
