"""Optimizers that look at a tensor as a whole, and experts that are stacked in one.

AdamW and its like work element by element: (E, out, in) is no different from E matrices. Others
would let experts share what each matrix of a dense model has for itself: LAMB and LARS one norm,
Muon one orthogonal factor, Shampoo and SOAP correlations along every dimension, 'cautious' variants
one mean. `collect_losses` refuses them, unless `per_expert` has taught them the experts.

Legend: E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Class names in timm, torch, apex, torch_optimizer and SOAP's repository, in small letters. The
# tests hold every optimizer that timm lists against E separate matrices. apex's LARC is none: it
# scales gradients before another optimizer steps, which nothing here sees.
_WHOLE_TENSOR = {
    'adafactor', 'adafactorbigvision', 'adamp', 'fusedlamb', 'fusednovograd', 'kron', 'lamb',
    'lars', 'mars', 'muon', 'novograd', 'nvnovograd', 'sgdp', 'shampoo', 'soap',
}  # fmt: skip
# What timm's `Lookahead` keeps of a parameter, in the state of the optimizer that it wraps.
_SLOW = 'lookahead_slow_buff'


def mixes_experts(optimizer: Optimizer) -> bool:
    """Whether an optimizer would update the experts of a stacked weight as one tensor."""
    cautious = any(group.get('caution') for group in optimizer.param_groups)
    names = {kind.__name__.lower() for kind in type(optimizer).__mro__}
    return cautious or not names.isdisjoint(_WHOLE_TENSOR)


def per_expert(optimizer: Optimizer, model: nn.Module) -> Optimizer:
    """Let an optimizer update each expert as it would the same matrix alone; returns it.

    While it steps, saves or loads, a stacked parameter is replaced by views of its experts.
    Otherwise groups hold the model's parameters, for schedulers, clipping and gradient scalers.

    Args:
        optimizer: Any over parameters of `model`, changed in place (inside timm's `Lookahead`).
            Teach it before its state is loaded, and a copy of it anew.
        model: Holds the experts.
    """
    inner = _inside(optimizer)
    views = _ExpertViews(_untaught(inner, model))
    if not views.views:
        return optimizer
    inner.register_step_pre_hook(views.before_step)
    inner.register_step_post_hook(views.join)
    inner.register_state_dict_pre_hook(views.before_save)
    inner.register_state_dict_post_hook(views.after_save)
    inner.register_load_state_dict_pre_hook(views.split)
    inner.register_load_state_dict_post_hook(views.after_load)
    return optimizer


def check_optimizer(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer that would mix the experts of a model."""
    if not mixes_experts(inner := _inside(optimizer)):
        return
    stacked = {*_untaught(inner, model)}
    if any(p in stacked for group in inner.param_groups for p in group['params']):
        raise ValueError(
            f'optimizer={type(inner).__name__} is not possible as it is: it would update all '
            'experts of a layer as one tensor; call vqmoe_vision.per_expert(optimizer, model) '
            'once, or take one that works element by element, such as AdamW'
        )


def _untaught(inner: Optimizer, model: nn.Module) -> list[nn.Parameter]:
    """Parameters that have the experts as their first dimension, without those with views."""
    hooks = inner._optimizer_step_pre_hooks.values()
    views = [getattr(hook, '__self__', None) for hook in hooks]
    taught = {p for each in views if isinstance(each, _ExpertViews) for p in each.views}
    modules = (m for m in model.modules() if getattr(m, 'stacks_experts', False))
    found = (p for module in modules for p in module.parameters(recurse=False))
    return [p for p in found if p not in taught]


def _inside(optimizer: Optimizer) -> Optimizer:
    inner: Optimizer = getattr(optimizer, '_base_optimizer', optimizer)  # of timm's `Lookahead`
    return inner


class _ExpertViews:
    """Exchanges stacked parameters and views of their experts in parameter groups."""

    def __init__(self, stacked: list[nn.Parameter]) -> None:
        self.views: dict[Tensor, list[Tensor]] = {p: list(p.detach().unbind()) for p in stacked}
        self.owners = {views[0]: p for p, views in self.views.items()}
        self.others = {view for views in self.views.values() for view in views[1:]}
        # states of parameters and of views, while a state dict is made
        self._whole: dict[Tensor, dict[str, Any]] = {}
        self._own: dict[Tensor, dict[str, Any]] = {}

    def before_step(
        self, optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Split; a closure, which makes the gradients, runs on the parameters themselves."""
        self.split(optimizer)
        # the optimizer itself comes first
        closure = args[1] if len(args) > 1 else kwargs.get('closure')
        if closure is None:
            return args, kwargs

        def on_parameters() -> Any:
            self.join(optimizer)
            try:
                return closure()
            finally:
                self.split(optimizer)

        others = {name: value for name, value in kwargs.items() if name != 'closure'}
        return (args[0], on_parameters, *args[2:]), others

    def split(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            group['params'] = [part for p in group['params'] for part in self._parts(p)]

    def join(self, optimizer: Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            group['params'] = [
                self.owners.get(p, p) for p in group['params'] if p not in self.others
            ]
        for views in self.views.values():
            for view in views:
                view.grad = None  # or it would keep the gradient of the whole parameter alive

    def before_save(self, optimizer: Optimizer) -> None:
        """Split, what `Lookahead` keeps too: of its steps it knows the whole parameters alone."""
        self.split(optimizer)
        state = optimizer.state
        for parameter, views in self.views.items():
            if _SLOW not in state.get(parameter, {}):
                continue
            self._whole[parameter] = state.pop(parameter)
            for view, slow in zip(views, self._whole[parameter][_SLOW], strict=True):
                # a new dictionary: the saved state holds this one
                self._own[view], state[view] = state[view], {**state[view], _SLOW: slow}

    def after_save(self, optimizer: Optimizer, *_: Any) -> None:
        optimizer.state.update({**self._whole, **self._own})
        self._whole, self._own = {}, {}
        self.join(optimizer)

    def after_load(self, optimizer: Optimizer) -> None:
        self.join(optimizer)
        state = optimizer.state
        for parameter, views in self.views.items():
            if all(_SLOW in state.get(view, {}) for view in views):
                slow = torch.stack([state[view].pop(_SLOW) for view in views])
                state[parameter][_SLOW] = slow

    def _parts(self, parameter: Tensor) -> list[Tensor]:
        if parameter not in self.views:
            return [parameter]
        views = self.views[parameter]
        # again at each step: a model that was moved or cast has other memory behind its parameters
        for i, view in enumerate(views):
            view.data = parameter.detach()[i]
            view.grad = None if parameter.grad is None else parameter.grad[i]
        return views
