"""Optimizer wrappers: timm's weight decay groups, mixed precision, and what a card is better at."""

import fnmatch
import inspect
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from vqmoe_vision.moe.config import check, check_type

# What `custom_keys` multiply, and which field of the optimizer gives.
_MULTIPLIERS = {'lr_mult': 'lr', 'decay_mult': 'weight_decay'}


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16 on the CPU, where mmengine's `AmpOptimWrapper` refuses to run.

    bfloat16 has float32's range, so there is no loss scale.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Runs the forward pass under autocast, on a GPU too."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield


def use_amp(config: Config) -> None:
    """Turns on mixed precision in a config."""
    wrapper = config.optim_wrapper
    given = wrapper.get('type', 'OptimWrapper')
    known = ('OptimWrapper', 'AmpOptimWrapper', 'CpuAmpOptimWrapper')
    check(given in known, 'optim_wrapper.type', given, f'with --amp one of {", ".join(known)}')
    if torch.cuda.is_available():
        # None is float16, and the wrapper's default
        if wrapper.get('dtype') is None:
            wrapper.dtype = _low_dtype()
        # a loss scale reads back at each step, and only float16 has too small a range without one
        scaled = wrapper.dtype in ('float16', torch.float16)
        wrapper.setdefault('loss_scale', 'dynamic' if scaled else dict(enabled=False))
        wrapper.type = 'AmpOptimWrapper'
        return
    wrapper.type = 'CpuAmpOptimWrapper'
    for name in sorted(inspect.signature(AmpOptimWrapper).parameters.keys() & wrapper.keys()):
        told = f'optim_wrapper.{name}={wrapper.pop(name)!r} is for CUDA'
        print_log(f'--amp: {told}, this is bfloat16 without a loss scale', 'current')


def _low_dtype() -> str:
    exact = torch.cuda.is_bf16_supported(including_emulation=False)
    return 'bfloat16' if exact else 'float16'


def suit_card(config: Config, file: str) -> str:
    """Takes what a CUDA card is better at, unless a config says otherwise; tells what is left."""
    wrapper, spread = config.get('optim_wrapper') or {}, config.get('parallel')
    if not torch.cuda.is_available():
        return ''
    options = wrapper.get('optimizer') or {}
    chosen = options.keys() & {'fused', 'foreach', 'differentiable'}
    if options.get('type') == 'AdamW' and not chosen and spread is None:
        options['fused'] = True  # one kernel for all tensors; parts of tensors it does not take
    low = (spread or {}).get('param_dtype') not in (None, 'float32')
    if wrapper.get('type', 'OptimWrapper') != 'OptimWrapper' or low:
        return ''
    return f'float32 is slow on this card; in {_low_dtype()}: vqmoe train {file} --amp'


# Options of an optimizer for kernels that take lists of tensors of one layout.
KERNELS_FOR_LISTS = ('foreach', 'fused')


def with_kernels(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What is saved of an optimizer, with the kernels that it was built with."""
    for group in state['param_groups']:
        group.update({n: optimizer.defaults.get(n) for n in KERNELS_FOR_LISTS if n in group})
    return state


def scales_loss(wrapper: OptimWrapper) -> bool:
    """Whether backward passes start from a loss that was multiplied by a scale."""
    scaler = getattr(wrapper, 'loss_scaler', None)
    return scaler is not None and scaler.is_enabled()


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmOptimWrapperConstructor:
    """Builds an optimizer in which biases, norms and `no_weight_decay()` names do not decay.

    By timm's rules, in two parameter groups; mmengine's own makes one per parameter.

    Args:
        optim_wrapper_cfg: As in every mmengine config: `type`, `optimizer`, `clip_grad`, ...
        paramwise_cfg: `dict(custom_keys={part of a name: dict(lr_mult=..., decay_mult=...)})`. As
            in mmengine, the longest key in a name counts; what does not decay still does not.

    Raises:
        ValueError: `paramwise_cfg` has other options, or what they hold is something else.
    """

    paramwise_options: tuple[str, ...] = ('custom_keys',)

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        self.optim_wrapper_cfg = optim_wrapper_cfg
        self.paramwise_cfg = paramwise_cfg or {}
        for option, value in self.paramwise_cfg.items():
            allowed = f'{type(self).__name__} takes {" and ".join(self.paramwise_options)}'
            check(option in self.paramwise_options, f'paramwise_cfg.{option}', value, allowed)
        self.custom_keys = self.paramwise_cfg.get('custom_keys', {})
        allowed = f'{" or ".join(_MULTIPLIERS)}, a number of at least 0'
        for key, factors in self.custom_keys.items():
            for name, value in factors.items():
                valid = isinstance(value, int | float) and 0 <= value < math.inf
                field = f'paramwise_cfg.custom_keys[{key!r}].{name}'
                check(valid and name in _MULTIPLIERS, field, value, allowed)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Builds the wrapper for a model, which may be wrapped for distributed training."""
        wrapper = {'type': 'OptimWrapper', **self.optim_wrapper_cfg}
        options = wrapper.pop('optimizer')
        custom_keys = self.custom_keys
        ordered = sorted(sorted(custom_keys), key=len, reverse=True)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        key_of = {i: next((k for k in ordered if k in name), None) for i, name in names.items()}
        for key in ordered:
            allowed = (
                f'a part of a name without a longer one, as {", ".join([*names.values()][:3])}'
            )
            check(key in key_of.values(), 'paramwise_cfg.custom_keys', key, allowed)
        parts: list[dict[str, Any]] = []
        for group in self._param_groups(model, options.get('weight_decay', 0.0)):
            # each of these keys, or none, in the order of their first parameters
            for matched in dict.fromkeys(key_of[id(p)] for p in group['params']) or (None,):
                part = {**group, 'params': [p for p in group['params'] if key_of[id(p)] == matched]}
                for factor, value in custom_keys.get(matched or '', {}).items():
                    field = _MULTIPLIERS[factor]
                    part[field] = part.get(field, options[field]) * value
                parts.append(part)
        wrapper['optimizer'] = OPTIMIZERS.build({**options, 'params': parts})
        return OPTIM_WRAPPERS.build(wrapper)

    def _param_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Parameters that decay, with this weight decay, and those that do not."""
        return param_groups_weight_decay(
            model, weight_decay, no_weight_decay_list=undecayed_parameters(model)
        )


def undecayed_parameters(model: nn.Module) -> set[str]:
    """Full names of the parameters that some submodule lists in its `no_weight_decay()`."""
    names = [name for name, _ in model.named_parameters()]
    modules: Iterable[Any] = model.named_modules()
    return {
        name
        for prefix, module in modules
        if hasattr(module, 'no_weight_decay')
        for pattern in module.no_weight_decay()
        for name in fnmatch.filter(names, f'{prefix}.{pattern}'.lstrip('.'))
    }


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(TimmOptimWrapperConstructor):
    """timm's layer-wise decay for the timm model, the full learning rate for heads beside it.

    The last layer, a classifier's head or a backbone's last block and norm, has the full rate. Each
    layer before has `layer_decay` times that of the next.

    Args:
        optim_wrapper_cfg: As in every mmengine config; `optimizer.lr` is the full rate.
        paramwise_cfg: `dict(layer_decay=...)`, above 0 and at most 1, and `custom_keys`, whose
            factors come on top.

    Raises:
        ValueError: `paramwise_cfg` has other options, or no `layer_decay`.
    """

    paramwise_options = ('layer_decay', 'custom_keys')

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        self.layer_decay = self.paramwise_cfg.get('layer_decay', 0.0)
        check_type('paramwise_cfg.layer_decay', float, self.layer_decay)
        allowed = 'above 0 and at most 1'
        check(0 < self.layer_decay <= 1, 'paramwise_cfg.layer_decay', self.layer_decay, allowed)

    def _param_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Groups of a `MoeTrainingMixin`, which may be wrapped for distributed training."""
        whole: Any = model.module if is_model_wrapper(model) else model
        encoder = whole.routed_model
        groups = param_groups_layer_decay(
            encoder,
            weight_decay,
            no_weight_decay_list=undecayed_parameters(encoder),
            layer_decay=self.layer_decay,
        )
        for group in groups:
            group['lr'] = self.optim_wrapper_cfg['optimizer']['lr'] * group.pop('lr_scale')
        inside = {id(parameter) for parameter in encoder.parameters()}
        for group in super()._param_groups(whole, weight_decay):
            if heads := [p for p in group['params'] if id(p) not in inside]:
                groups.append({**group, 'params': heads})
        return groups
